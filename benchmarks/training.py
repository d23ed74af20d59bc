"""Speed of training siblings, beside a plain loop over a DataLoader, and of several at once.

An epoch by `Trainer`, which keeps all images in one tensor and augments a batch at once, beside the loop that everybody
writes first, over torchvision's transforms and a `DataLoader`; and several siblings one after another and at once. On a
GPU also a step of ResNet-20: operation by operation and as a CUDA graph, alone and with siblings side by side.

    python -m benchmarks.training [--network resnet20] [--width 8] [--data FOLDER] [--device cuda] [--quick]
"""

import argparse
import gc
import multiprocessing
import os
import time
import warnings
from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.support import options, timing
from benchmarks.support.charts import draw_points
from benchmarks.support.report import Bar, Report, Table, new_report, publish
from benchmarks.support.timing import Spread
from lmc_curvature.errors import NonFiniteError
from lmc_curvature.forking import Trainer, TrainingConfig
from lmc_curvature.sources import ImageDataset, load_data, make_model

SIZES = {
    "full": {"network": "resnet20", "width": 8, "examples": 5000, "batch": 128, "epochs": 3, "siblings": (2, 4)},
    "quick": {"network": "resnet20", "width": 8, "examples": 1280, "batch": 128, "epochs": 2, "siblings": (2,)},
    "smoke": {"network": "resnet", "width": 2, "examples": 64, "batch": 32, "epochs": 1, "siblings": (2,)},
}
# A short batch ends each epoch, as it does on CIFAR-10.
STEPS = {
    "full": {"network": "resnet20", "width": 16, "examples": 25_680, "batch": 128, "siblings": 7, "rounds": 3},
    "quick": {"network": "resnet20", "width": 16, "examples": 6_480, "batch": 128, "siblings": 7, "rounds": 2},
    "smoke": {"network": "resnet", "width": 2, "examples": 100, "batch": 32, "siblings": 2, "rounds": 1},
}
# Precision, whether siblings are side by side, and whether a step is a CUDA graph; what matters most comes first.
_ON_A_GPU = (
    ("bfloat16", False, True),
    ("bfloat16", True, True),
    ("tf32", False, True),
    ("tf32", True, True),
    ("tf32", False, False),
    ("bfloat16", False, False),
    ("float32", False, True),
    ("float32", True, True),
    ("float32", False, False),
)
_ON_A_CPU = (("float32", False, False), ("float32", True, False), ("bfloat16", False, False))
EAGER, GRAPH = "eager", "CUDA graph"
_SECONDS_TO_WAIT = 900.0
_OVER = object()
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
    if chosen.device.type == "cuda":
        tables, bars, notes = training_report(chosen.device, _SECONDS_TO_WAIT, size=chosen.size)
        report.tables += tables
        report.bars += bars
        report.notes += notes
    return publish(report, chosen, draw_points({row["road"]: row["seconds"] for row in rows}, [OURS], "seconds"))


def training_report(
    device: torch.device, seconds: float, *, size: Literal["full", "quick", "smoke"] = "full"
) -> tuple[list[Table], list[Bar], list[str]]:
    """Time a step of training, by precision, as a CUDA graph or not, of one sibling and of several side by side.

    Args:
        device: Where to train.
        seconds: When these are spent, no further row is begun.
        size: Of the network and the data.

    Returns:
        A table, promises (of a GPU), and remarks: what was left out, and why.
    """
    plan, end, rows, notes = STEPS[size], time.monotonic() + seconds, [], []
    data = images(None, plan["examples"]).to(device)
    cases = _ON_A_GPU if device.type == "cuda" else _ON_A_CPU
    for number, (precision, together, graph) in enumerate(cases):
        if time.monotonic() >= end:
            left = "; ".join(_case_name(*case, plan["siblings"]) for case in cases[number:])
            notes.append(f"Left out for want of time: {left}.")
            break
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                rows.append(_step_row(plan, data, precision, plan["siblings"] if together else 1, graph, end))
            except (RuntimeError, NonFiniteError) as error:
                notes.append(f"{_case_name(precision, together, graph, plan['siblings'])}: {error}")
        notes += [f"{_case_name(precision, together, graph, plan['siblings'])}: {each.message}" for each in caught]
        _free(device)
    # Beside what training was before steps were recorded, and rounded as torch does by itself.
    rows.sort(key=lambda row: (row["road"], row["dtype"]) != (EAGER, "tf32"))
    if rows and rows[0]["road"] == EAGER:
        rows = [{**row, "ratio": rows[0]["ms"].median / row["ms"].median} for row in rows]
    table = Table("training-steps", "A step of one sibling, of those that are trained side by side", rows)
    return [table], _step_bars(rows) if device.type == "cuda" else [], notes


def _case_name(precision: str, together: bool, graph: bool, siblings: int) -> str:
    return f"{GRAPH if graph else EAGER}, {precision}, {siblings if together else 1} together"


def _step_row(
    plan: dict[str, Any], data: ImageDataset, precision: str, siblings: int, graph: bool, end: float
) -> dict[str, Any]:
    """The milliseconds of a step, from whole epochs of all siblings, drawing and metrics included."""
    device = data.images.device
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_reserved(device) if on_gpu else 0
    config = _config(plan, 10_000, precision)
    trainers = [Trainer(_model(plan).to(device), data, config, cuda_graph=graph) for _ in range(siblings)]
    for seed, trainer in enumerate(trainers):
        for _ in islice(trainer.steps(seed), 5):
            pass
    steps, samples = -(-len(data) // plan["batch"]), []
    while not samples or (len(samples) < plan["rounds"] and time.monotonic() < end):
        samples.append(timing.seconds_once(lambda: _epochs_in_turns(trainers))[0] / (steps * siblings))
    spread = Spread.of([1e3 * sample for sample in samples])
    return {
        "road": GRAPH if trainers[0].replays else EAGER,
        "dtype": precision,
        "siblings": siblings,
        "ms": spread,
        "rate": len(data) / steps / spread.median * 1e3,
        "peak_mib": (torch.cuda.memory_reserved(device) - before) / 2**20 if on_gpu else None,
        "samples": len(samples),
    }


def _epochs_in_turns(trainers: Sequence[Trainer]) -> None:
    """An epoch of each, step by step."""
    epochs = [trainer.steps(seed) for seed, trainer in enumerate(trainers)]
    while epochs:
        epochs = [epoch for epoch in epochs if next(epoch, _OVER) is not _OVER]


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _step_bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """What a GPU is to reach, of the rows that were measured."""
    found = {(row["siblings"] > 1, row["dtype"]): row["ms"] for row in rows if row["road"] == GRAPH}
    bars = [
        Bar(f"ms a step, one sibling, {precision}", found[False, precision], "at most", 3.5)
        for precision in ("bfloat16", "tf32")
        if (False, precision) in found
    ]
    if (True, "bfloat16") in found:
        bars.append(Bar("ms a step of a sibling, seven together, bfloat16", found[True, "bfloat16"], "at most", 1.3))
    return bars


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


def _config(size: dict[str, Any], epochs: int, precision: str = "float32") -> TrainingConfig:
    return TrainingConfig(
        epochs=epochs,
        learning_rate=0.1,
        weight_decay=1e-4,
        batch_size=size["batch"],
        augmentation="crop-flip",
        precision=precision,
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
        # Epochs enough never to end.
        self.trainer = Trainer(_model(size).to(device), data, _config(size, 10_000))

    def epoch(self) -> None:
        for _ in self.trainer.steps(0):
            pass


class _Images(Dataset):
    """Images one at a time, as torchvision's CIFAR10 gives them."""

    def __init__(self, data: ImageDataset):
        # Here alone, so that steps can be timed where it is missing.
        from PIL import Image
        from torchvision import transforms

        self.picture = Image.fromarray
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
        return self.transform(self.picture(self.pixels[index])), self.targets[index]


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
