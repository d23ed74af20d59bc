"""Speed of training siblings, beside a plain loop over a DataLoader, and of several at once.

An epoch by `train`, which keeps all images in one tensor and augments a batch at once, beside the loop that everybody
writes first, over torchvision's transforms and a `DataLoader`; and several siblings one after another and at once.

    python -m benchmarks.training [--network resnet20] [--width 8] [--data FOLDER] [--device cuda] [--quick]
"""

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.support import options, timing
from benchmarks.support.charts import draw_points
from benchmarks.support.report import Bar, Report, new_report, publish
from benchmarks.support.timing import Spread
from lmc_curvature.forking import TrainingConfig, TrainingState, train
from lmc_curvature.sources import ImageDataset, load_data, make_model

SIZES = {
    "full": {"network": "resnet20", "width": 8, "examples": 5000, "batch": 128, "epochs": 3, "siblings": (2, 4)},
    "quick": {"network": "resnet20", "width": 8, "examples": 1280, "batch": 128, "epochs": 2, "siblings": (2,)},
    "smoke": {"network": "resnet", "width": 2, "examples": 64, "batch": 32, "epochs": 1, "siblings": (2,)},
}
_SECONDS_TO_WAIT = 900.0
OURS = "lmc_curvature: one tensor, batches augmented at once"


NOTES = (
    "Every loop takes the same steps of SGD on crops and mirror images padded by 4; an epoch is all the data.",
    "The plain loop is what torchvision's examples do: an image at a time through Pillow, transforms, DataLoader.",
    "Siblings at once are processes with a thread each; start-up is not counted.",
)


def main(argv: Sequence[str] | None = None) -> Report:
    """Parse, measure, print and write."""
    chosen = options.parse_options(__file__, __doc__, argv, _add_options)
    size = options.chosen_size(chosen, SIZES)
    data = images(chosen.data, size["examples"])
    report = new_report(chosen, "How fast are siblings trained?", NOTES, **size, data=chosen.data or "noise")
    rows = _loop_rows(size, data, chosen.device)
    report.add("loop", "An epoch of one network", rows)
    report.add("siblings", "An epoch of several siblings, one after another and at once", _sibling_rows(size, chosen))
    ours, *plain = (row["seconds"] for row in rows)
    fastest = min(plain, key=lambda spread: spread.median)
    report.bars.append(Bar("fastest plain loop / ours", fastest.over(ours), "at least", 1.5))
    return publish(report, chosen, draw_points({row["road"]: row["seconds"] for row in rows}, [OURS], "seconds"))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", help="resnet20, cifar-resnet18, …")
    parser.add_argument("--width", type=int, help="of a resnet")
    parser.add_argument("--batch", type=int, help="examples a batch")
    parser.add_argument("--data", help="cifar10 or a folder of images; by default noise of the same size")


def images(spec: str | None, count: int) -> ImageDataset:
    """Some images of 32 × 32 pixels: of a data set, or noise, which takes as long."""
    if spec is not None:
        return load_data(spec, limit=count)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    half = torch.full((3,), 0.5)
    return ImageDataset(pixels, torch.arange(count) % 10, tuple("0123456789"), half, half)


def _config(size: dict[str, Any], epochs: int) -> TrainingConfig:
    return TrainingConfig(
        epochs=epochs, learning_rate=0.1, weight_decay=1e-4, batch_size=size["batch"], augmentation="crop-flip"
    )


def _model(size: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    resnet = size["network"].startswith("resnet")
    settings = {"width": size["width"], "shortcut": "identity"} if resnet else {}
    if size["network"] == "resnet":
        settings["depth"] = 8
    return make_model(size["network"], **settings)


def _loop_rows(size: dict[str, Any], data: ImageDataset, device: torch.device) -> list[dict[str, Any]]:
    """Rows of our loop, and of the plain one with several numbers of worker processes, which take turns."""
    loops = {OURS: _Ours(size, data, device).epoch}
    for workers in (0, 2):
        loops[f"plain loop over a DataLoader, num_workers={workers}"] = _Plain(size, data, device, workers).epoch
    for epoch in loops.values():
        epoch()
    return [
        {"road": name, "seconds": Spread.of(each), "rate": len(data) / Spread.of(each).median, "samples": len(each)}
        for name, each in timing.seconds_in_turns(loops, size["epochs"]).items()
    ]


class _Ours:
    """The library's training, an epoch at a time, as forks are trained."""

    def __init__(self, size: dict[str, Any], data: ImageDataset, device: torch.device):
        self.model, self.data = _model(size).to(device), data.to(device)
        # Long enough never to end.
        self.config = _config(size, 10_000)
        self.state: TrainingState | None = None

    def epoch(self) -> None:
        epoch = 0 if self.state is None else self.state.epoch
        self.state = train(
            self.model, self.data, self.config, order_seed=0, start=self.state, until=epoch + 1, progress=False
        )


class _Images(Dataset):
    """Images one at a time, as torchvision's CIFAR10 gives them."""

    def __init__(self, data: ImageDataset):
        self.pixels = data.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = data.targets.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(data.mean.tolist(), data.std.tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.targets[index]


class _Plain:
    """The loop that everybody writes first."""

    def __init__(self, size: dict[str, Any], data: ImageDataset, device: torch.device, workers: int):
        self.model, self.device = _model(size).to(device), device
        self.loader = DataLoader(
            _Images(data),
            batch_size=size["batch"],
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        config = _config(size, 1)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )

    def epoch(self) -> None:
        self.model.train()
        for x, y in self.loader:
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            self.optimizer.zero_grad()
            loss = functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()


def _sibling_rows(size: dict[str, Any], chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows with the seconds of an epoch of several siblings: one after another, and at once."""
    rows = []
    for count in size["siblings"]:
        plans = ((1, torch.get_num_threads()), (1, 1), (min(count, os.cpu_count() or 1), 1))
        seconds = {
            (processes, threads): _seconds_in_processes(size, chosen, count, processes, threads)
            for processes, threads in dict.fromkeys(plans)
        }
        rows += [
            {
                "siblings": count,
                "processes": processes,
                "threads": threads,
                "seconds": each,
                "ratio": seconds[plans[0]] / each,
            }
            for (processes, threads), each in seconds.items()
        ]
    return rows


def _seconds_in_processes(
    size: dict[str, Any], chosen: argparse.Namespace, siblings: int, processes: int, threads: int
) -> float:
    """Median seconds of an epoch of all siblings, shared evenly among processes that are warm."""
    context = multiprocessing.get_context("spawn")
    # A process that died would otherwise be waited for.
    barrier = context.Barrier(processes + 1, timeout=_SECONDS_TO_WAIT)
    shares = [siblings // processes + (number < siblings % processes) for number in range(processes)]
    workers = [
        context.Process(target=_train_share, args=(barrier, size, chosen.data, str(chosen.device), share, threads))
        for share in shares
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    # One wait starts them, the other ends with the last of them.
    seconds = [timing.seconds_once(lambda: (barrier.wait(), barrier.wait()))[0] for _ in range(size["epochs"])]
    for worker in workers:
        worker.join()
    return Spread.of(seconds).median


def _train_share(
    barrier: Any, size: dict[str, Any], data: str | None, device: str, siblings: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    place = torch.device(device)
    networks = [_Ours(size, images(data, size["examples"]), place) for _ in range(siblings)]
    for network in networks:
        network.epoch()
    barrier.wait()
    for _ in range(size["epochs"]):
        barrier.wait()
        for network in networks:
            network.epoch()
        if place.type == "cuda":
            torch.cuda.synchronize()
        barrier.wait()


if __name__ == "__main__":
    main()
