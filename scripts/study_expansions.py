"""How well do expansions predict barriers of sets of layers, of several kinds of networks?

    python scripts/study_expansions.py --out runs/study [--siblings DIRECTORY --images FOLDER]

Every pair is predicted with nine anchors, of which fewer are used later, and measured: the whole curve at 21 positions,
each layer and random sets of layers at α = 1/2. Results go to --out, a pair is not computed again, and the tables are
printed in Markdown. Pairs: siblings of digits (those of `lmc-curvature demo`); networks without normalisation, forked
late and of different initialisations; small language models on the text of Python's help topics; and, where they are,
ResNet-20 on CIFAR-10, forked at initialisation and after 15 epochs (`--siblings`: a folder with `final.safetensors` and
`snapshots.safetensors`, entries named fork0015.child0.<entry>; `--images`: an ImageFolder).
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from lmc_curvature import (
    BarrierMeasurement,
    BarrierPrediction,
    LayerPartition,
    forking,
    measure_barrier,
    predict_barrier,
)
from lmc_curvature.averages import rank_correlation
from lmc_curvature.barrier.expansions import Expansion
from lmc_curvature.cli.demo import CONFIG
from lmc_curvature.figures import save_figure
from lmc_curvature.merging.residuals import Correction
from lmc_curvature.merging.rises import points_of
from lmc_curvature.plotting.axes import heading, legend_line
from lmc_curvature.plotting.style import GREY, TEXT_WIDTH, look, new_figure
from lmc_curvature.sources import ImageDataset, load_data, make_model

Networks = tuple[nn.Module, nn.Module]
Pair = tuple[Networks, Iterable[Any]]

ANCHORS = 9
EXAMPLES = 768
SETS = 60
# Barriers below are nothing to be relative to.
FLOOR = 1e-4
FORKS = (15, 0)
# A sweep's cost in forward passes, by which the rival may measure as many sets; see docs/results.md.
SWEEP_F = 18


Out = Annotated[Path, typer.Option(help="Where networks and results are kept.")]
Siblings = Annotated[Path | None, typer.Option(help="CIFAR-10 siblings.")]
Images = Annotated[Path | None, typer.Option(help="CIFAR-10 as a folder of images.")]
Only = Annotated[list[str] | None, typer.Option(help="Names of pairs.")]
Threads = Annotated[int, typer.Option(help="Threads to compute in.")]


def main(
    out: Out = Path("runs/study"),
    siblings: Siblings = None,
    images: Images = None,
    only: Only = None,
    threads: Threads = 1,
) -> None:
    """Predict, measure and compare."""
    torch.set_num_threads(threads)
    pairs = make_pairs(out, siblings, images, only)
    found = {name: results(out / name, make) for name, make in tqdm(pairs.items(), desc="pairs")}
    for title, table in tables(found).items():
        print(f"**{title}**\n\n{table}\n")
    save_figure(draw_sets(found), out / "sets")


def results(folder: Path, make: Callable[[], Pair]) -> tuple[BarrierPrediction, BarrierMeasurement, BarrierMeasurement]:
    """The prediction of a pair, the measurement of its sets at α = 1/2, and that of its whole curve."""
    paths = [folder / f"{name}.safetensors" for name in ("predicted", "sets", "curve")]
    if not all(path.exists() for path in paths):
        networks, loader = make()
        batches = list(loader)
        if not paths[0].exists():
            predict_barrier(*networks, batches, anchors=ANCHORS, keep_partial=False).save(paths[0])
        if not paths[1].exists():
            names = np.array(LayerPartition.of(networks[0]).names)
            sets = [tuple(names[row]) for row in (*np.eye(len(names), dtype=bool), *random_sets(len(names)))]
            options = {"metrics": ("loss",), "keep_partial": False}
            measure_barrier(*networks, batches, sets=sets, alphas=[0, 0.5, 1], **options).save(paths[1])
        if not paths[2].exists():
            measure_barrier(*networks, batches, alphas=21, metrics=("loss",), keep_partial=False).save(paths[2])
    sets, curve = (BarrierMeasurement.load(path) for path in paths[1:])
    return BarrierPrediction.load(paths[0]), sets, curve


def random_sets(layers: int, seed: int = 0) -> Bool[np.ndarray, "sets layers"]:
    """Random sets of 2 to L−1 layers."""
    rng = np.random.default_rng(seed)
    members = np.zeros((SETS, layers), dtype=bool)
    for row in members:
        row[rng.choice(layers, rng.integers(2, layers), replace=False)] = True
    return members


# --- Pairs of networks


def make_pairs(
    out: Path, siblings: Path | None, images: Path | None, only: list[str] | None = None, examples: int = EXAMPLES
) -> dict[str, Callable[[], Pair]]:
    """Names of the pairs, all or those that were named, each with what makes it; of the examples, at most so many."""
    pairs: dict[str, Callable[[], Pair]] = {}
    for fork in CONFIG.fork_epochs:
        pairs[f"digits, fork {fork}"] = lambda fork=fork: digits(out / "forks", fork, examples)
    if siblings is not None and images is not None:
        for fork in FORKS:
            pairs[f"CIFAR-10, fork {fork}"] = lambda fork=fork: cifar10(siblings, images, fork, 160, examples)
        for epoch in (20, 80):
            name = f"CIFAR-10, fork 15, epoch {epoch}"
            pairs[name] = lambda epoch=epoch: cifar10(siblings, images, 15, epoch, examples)
    pairs["no normalisation, late fork"] = lambda: without_normalisation(4, examples)
    pairs["no normalisation, different initialisations"] = lambda: without_normalisation(0, examples)
    for steps in (0, 100, 400):
        pairs[f"language model, fork at step {steps}"] = lambda steps=steps: language_models(steps, examples // 16)
    return {name: make for name, make in pairs.items() if not only or name in only}


def digits(forks: Path, fork: int, examples: int) -> Pair:
    """Children of the demo's experiment on digits."""
    forking.run_forks(CONFIG, forks)
    first, second = (forking.load_child(forks, fork, child) for child in (0, 1))
    return (first, second), _first(forking.load_fork_data(forks), examples)


def cifar10(siblings: Path, images: Path, fork: int, epoch: int, examples: int) -> Pair:
    """Children of ResNet-20 trained on CIFAR-10 for 160 epochs, at the end or on the way."""
    last = epoch == 160
    networks = []
    for child in (0, 1):
        prefix = f"fork{fork:04d}.child{child}." + ("" if last else f"epoch{epoch:04d}.")
        network = make_model("resnet20", shortcut="identity")
        with safe_open(siblings / ("final.safetensors" if last else "snapshots.safetensors"), "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - a file is no mapping
            state = {name.removeprefix(prefix): file.get_tensor(name).float() for name in names}
        counters = {name: tensor for name, tensor in network.state_dict().items() if name.endswith("batches_tracked")}
        network.load_state_dict(counters | state)
        networks.append(network)
    return (networks[0], networks[1]), load_data(images, limit=examples).batches(128)


def without_normalisation(common_epochs: int, examples: int) -> Pair:
    """Small convolutional networks without normalisation on digits: siblings, or of different initialisations."""
    data = load_data("digits")
    x, y = (torch.cat(parts) for parts in zip(*data.batches(512), strict=True))

    def train(network: nn.Module, seed: int, epochs: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).split(32):
                optimizer.zero_grad()
                F.cross_entropy(network(x[rows]), y[rows]).backward()
                optimizer.step()
        return network

    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        convolutions = [nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)]
        layers = [each for convolution in convolutions for each in (convolution, nn.ReLU())]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))

    if common_epochs:
        parent = train(fresh(0), 99, common_epochs)
        networks = [train(copy.deepcopy(parent), seed, 12 - common_epochs) for seed in (1, 2)]
    else:
        networks = [train(fresh(seed), seed, 12) for seed in (1, 2)]
    return (networks[0], networks[1]), _first(data, examples)


def _first(data: ImageDataset, examples: int) -> Iterable[Any]:
    return data.subset(min(examples, len(data))).batches(256)


class LanguageModel(nn.Module):
    """A small GPT over characters: four pre-norm blocks of width 64."""

    def __init__(self, characters: int, width: int = 64, blocks: int = 4, length: int = 64):
        super().__init__()
        self.tokens = nn.Embedding(characters, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, characters, length)."""
        length = x.shape[1]
        mask = torch.full((length, length), -math.inf, dtype=self.places.dtype).triu(1)
        h = self.tokens(x) + self.places[:length]
        for block in self.blocks:
            h = block(h, src_mask=mask)
        return self.head(self.norm(h)).transpose(1, 2)


def language_models(common_steps: int, sequences: int) -> Pair:
    """Small language models on the help topics that come with Python, forked after some common steps."""
    import pydoc_data.topics

    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    places = {character: place for place, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([places[character] for character in text])
    length, count = 64, (len(text) - 1) // 64
    x, y = tokens[: count * length].view(count, length), tokens[1 : count * length + 1].view(count, length)

    def train(network: nn.Module, seed: int, steps: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
        for _ in range(steps):
            rows = torch.randint(count, (16,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
        return network

    torch.manual_seed(0)
    parent = train(LanguageModel(len(places)), 99, common_steps)
    first, second = (train(copy.deepcopy(parent), seed, 700).eval() for seed in (1, 2))
    rows = torch.randint(count, (sequences,), generator=torch.Generator().manual_seed(5))
    return (first, second), [(x[part], y[part]) for part in rows.split(16)]


# --- Comparisons

Results = dict[str, tuple[BarrierPrediction, BarrierMeasurement, BarrierMeasurement]]
Score = tuple[float, float]


def with_anchors(prediction: BarrierPrediction, count: int) -> BarrierPrediction:
    """The prediction from fewer of its anchors."""
    step = (len(prediction.anchors) - 1) // (count - 1)
    return dataclasses.replace(prediction, anchors=prediction.anchors[::step])


def score(predicted: Float[np.ndarray, " n"], measured: Float[np.ndarray, " n"]) -> Score:
    """Median relative error, and Spearman's ρ."""
    relative = np.abs(predicted - measured) / np.maximum(np.abs(measured), FLOOR)
    return float(np.median(relative)), rank_correlation(predicted, measured)


def rival(measured: BarrierMeasurement, layers: int, count: int, distances: Float[np.ndarray, " L"]) -> Score:
    """Sets that were not measured, interpolated between `count` that were, without curvature.

    A Gaussian process over indicators, scaled by the layers' distances, with the width that is likeliest.
    """
    values = measured.layer_curves()[layers:, 1]
    x = random_sets(layers) * np.sqrt(distances**2 / (distances**2).sum())
    known, unknown = np.arange(len(values)) < count, np.arange(len(values)) >= count
    squares = ((x[:, None] - x) ** 2).sum(2)
    best: tuple[float, np.ndarray] = (-np.inf, np.zeros(unknown.sum()))
    for width in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2):
        K = np.exp(-squares / (2 * width**2)) + 1e-6 * np.eye(len(values))
        mean = values[known].mean()
        solved = np.linalg.solve(K[np.ix_(known, known)], values[known] - mean)
        variance = (values[known] - mean) @ solved / known.sum()
        likelihood = -known.sum() * np.log(variance) - np.linalg.slogdet(K[np.ix_(known, known)])[1]
        if likelihood > best[0]:
            best = likelihood, mean + K[np.ix_(unknown, known)] @ solved
    return score(best[1], values[unknown])


def corrected(prediction: BarrierPrediction, measured: BarrierMeasurement, count: int) -> Score:
    """Sets that were not measured, predicted and corrected by `count` that were, both of whose sides are known."""
    layers = len(prediction.layers)
    rises = measured.sides()[layers:, 1] - np.mean(measured.ends())
    near, far = points_of(random_sets(layers), "mean")
    known = Correction.of(prediction).extended(
        np.concatenate([near[:count], far[:count]]), rises[:count].T.ravel(), np.zeros(2 * count)
    )
    found = (known.at(near[count:])[0] + known.at(far[count:])[0]) / 2
    return score(found, measured.layer_curves()[layers + count :, 1])


def tables(found: Results) -> dict[str, str]:
    """Title to table."""
    columns = list(found)
    sets, layers, curves, errors = {}, {}, {}, {}
    methods: list[tuple[str, int, Expansion]] = [
        ("second order", 2, "second-order"),
        ("with slopes", 2, "with-slopes"),
        *((f"anchored, {count} anchors", count, "anchored") for count in (2, 3, 5, 9)),
    ]
    for name, count, expansion in methods:
        for pair, (nine, measured, curve) in found.items():
            prediction, L = with_anchors(nine, count), len(nine.layers)
            true = measured.layer_curves()[:, 1]
            members = np.concatenate([np.eye(L, dtype=bool), random_sets(L)])
            predicted = prediction.set_barriers(members, 0.5, expansion)
            layers.setdefault(name, {})[pair] = score(predicted[:L], true[:L])
            sets.setdefault(name, {})[pair] = score(predicted[L:], true[L:])
            most = max(curve.barrier(), 0.02 * (1 + max(map(abs, curve.ends()))))
            off = np.abs(prediction.curve(curve.alphas, None, expansion) - curve.curve()).max()
            curves.setdefault(name, {})[pair] = float(off / most)
            if expansion == "anchored" and count > 2:
                stated = prediction.set_expansion_errors(members)[L:]
                off = np.abs(predicted - true)[L:]
                errors.setdefault(name, {})[pair] = (float((off <= stated).mean()), float(np.median(stated / off)))
    name = "anchored, 5 anchors, and 10 sets measured, on the others"
    sets[name] = {pair: corrected(with_anchors(nine, 5), measured, 10) for pair, (nine, measured, _) in found.items()}
    for anchors in range(1, 6):
        # As many as cost what so many anchors do: both sides of a set are forward passes.
        count = anchors * SWEEP_F // 2
        name = f"{count} sets measured, no curvature"
        sets[name] = {
            pair: rival(measured, len(nine.layers), count, nine.distances)
            for pair, (nine, measured, _) in found.items()
        }
    return {
        "Sets of layers: median relative error / Spearman's ρ": table(sets, columns),
        "Single layers: median relative error / Spearman's ρ": table(layers, columns),
        "Whole curve: largest error over the barrier": table(curves, columns),
        "Stated expansion error of sets: share of sets covered / how many times too wide in the median": table(
            errors, columns
        ),
    }


@look()
def draw_sets(found: Results) -> Figure:
    """Predicted against measured barriers of sets at α = 1/2, a panel an expansion, relative to the largest of a pair.

    Bars of the anchored panel are the stated expansion errors.
    """
    figure = new_figure(TEXT_WIDTH, 3.9)
    panels: list[tuple[str, int, Expansion]] = [
        ("second order, two anchors", 2, "second-order"),
        ("anchored, three anchors", 3, "anchored"),
    ]
    kinds = list(dict.fromkeys(pair.split(",")[0] for pair in found))
    colors = dict(zip(kinds, ("C0", "C1", "C2", "C3"), strict=False))
    cells = figure.subplots(1, 2)
    for axes, (title, count, expansion) in zip(cells, panels, strict=True):
        axes.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
        pooled = []
        for pair, (nine, measured, _) in found.items():
            prediction, L = with_anchors(nine, count), len(nine.layers)
            members, true = random_sets(L), measured.layer_curves()[L:, 1]
            unit = np.abs(true).max()
            predicted = prediction.set_barriers(members, 0.5, expansion) / unit
            errors = prediction.set_expansion_errors(members) / unit if expansion == "anchored" else None
            kind = pair.split(",")[0]
            style = {"color": colors[kind], "alpha": 0.6, "linestyle": "none", "elinewidth": 0.3}
            axes.errorbar(true / unit, predicted, errors, marker="o", markersize=2.5, label=f"_{pair}", **style)
            pooled.append(score(predicted * unit, true))
        error, rank = np.mean(pooled, axis=0)
        heading(axes, title, f"relative error {error:.2f}, Spearman's ρ {rank:.2f}")
        axes.set(xlim=(-0.4, 1.1), ylim=(-0.6, 1.6), xlabel="measured barrier of a set", ylabel="predicted")
    point: dict[str, Any] = {"marker": "o", "markersize": 4, "linestyle": "none"}
    figure.legend(
        handles=[legend_line(kind, color=color, **point) for kind, color in colors.items()],
        loc="outside lower left",
        ncols=len(colors),
    )
    return figure


def table(rows: dict[str, dict[str, Any]], columns: list[str]) -> str:
    """A Markdown table."""

    def text(value: Any) -> str:
        return " / ".join(f"{part:.2f}" for part in (value if isinstance(value, tuple) else (value,)))

    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(text(row[column]) if column in row else "" for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    typer.run(main)
