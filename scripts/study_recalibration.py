"""Re-estimated statistics of batch normalisation: on images as the networks were trained on, or on clean ones?

    python scripts/study_recalibration.py --siblings DIRECTORY --images FOLDER

The pair is ResNet-20 on CIFAR-10 after 160 epochs, forked after 15, as in `study_expansions.py`. Losses are of clean
training images: of the two networks and of their average by the statistics that they have, and by statistics that were
re-estimated on clean images or on augmented ones.
"""

import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from study_expansions import FORKS, Threads, cifar10

from lmc_curvature import measure_barrier
from lmc_curvature.sources import load_data
from lmc_curvature.sources.augmentation import Crops


def main(
    siblings: Annotated[Path, typer.Option(help="CIFAR-10 siblings.")],
    images: Annotated[Path, typer.Option(help="CIFAR-10 as a folder of images.")],
    examples: Annotated[int, typer.Option(help="Training images.")] = 2048,
    threads: Threads = 1,
) -> None:
    """Measure, and print a table in Markdown."""
    torch.set_num_threads(threads)
    networks, clean = cifar10(siblings, images, FORKS[0], 160, examples)
    data = load_data(images, limit=examples)
    crops = Crops.draw(len(data), torch.Generator().manual_seed(0))
    ways = {
        "the networks' own, interpolated": {},
        "re-estimated on clean images": {"batch_norm": "recalibrate", "recalibration": clean},
        "re-estimated on augmented images": {
            "batch_norm": "recalibrate",
            "recalibration": data.batches(128, crops=crops),
        },
    }
    print("| statistics | model_a | average | model_b |\n| --- | --- | --- | --- |")
    for way, options in ways.items():
        with warnings.catch_warnings():
            # That statistics of clean images make a network worse is what is shown.
            warnings.simplefilter("ignore")
            found = measure_barrier(*networks, clean, alphas=3, metrics=("loss",), **options)
        print("| " + " | ".join([way, *(f"{value:.3f}" for value in found.values())]) + " |")


if __name__ == "__main__":
    typer.run(main)
