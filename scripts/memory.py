"""How much memory do a sweep and a prediction take, and how much are they expected to?

    python scripts/memory.py

Sweeps of three networks, each in several budgets, are measured at their peaks, which the table in `docs/reliability.md`
compares with the model that tiles are chosen from; and the barrier between two GPT-2s of 124 million parameters is
predicted in a process of its own, whose resident memory is measured. Nothing is downloaded: weights are random.
"""

import copy
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.language import SIZES
from benchmarks.support.memory import peak_bytes
from benchmarks.support.problems import Problem, image_problem, language_problem, mlp_problem
from lmc_curvature import predict_barrier
from lmc_curvature.curvature import problem as curvature
from lmc_curvature.curvature.projection.by_sweep import project_by_sweep
from lmc_curvature.curvature.sweep import expected_bytes, sweep_batch
from tests.support.sweeping import compiled_batches

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
GIB = 2**30
BUDGETS = (None, 0.1, 0.05)

NETWORKS: dict[str, Callable[[], Problem]] = {
    "ResNet-20, 64 images of 32 × 32": lambda: image_problem("resnet20", 64),
    "perceptron, 2 × 4,096 wide, 512 examples": lambda: mlp_problem(4096, 512),
    "GPT-2, 4 blocks, 4,096 tokens, 2 × 64 of them": lambda: language_problem(**SIZES["quick"], device="cpu"),
}


def sweep_row(name: str, posed: Problem, budget: float | None) -> str:
    """A row of the table: one network in one budget, in GiB."""
    objective = posed.new_objective()
    problem = curvature.Problem.of(objective, [posed.state], posed.directions, memory_gib=budget)
    with objective.one_pass(progress=False) as visit:
        batch = next(iter(visit))
        project_by_sweep(problem, problem.points[0], batch)
    (compiled,) = compiled_batches(objective, posed.directions, memory_gib=budget)
    taken = peak_bytes(lambda: sweep_batch(problem, compiled, problem.points[0], batch)[0](), objective.device)
    expected, tiling = expected_bytes(problem, compiled), compiled.tiling
    told = "default" if budget is None else f"{1024 * budget:.0f} MiB"
    layers = f"{min(tiling.directions, len(problem.directions))} of {len(problem.directions)}"
    sizes = f"{expected / 2**20:.0f} MiB | {taken / 2**20:.0f} MiB | {expected / taken:.2f}"
    return f"| {name} | {told} | {tiling.examples} of {compiled.size} | {layers} | {sizes} |"


def resident(size: str) -> dict[str, float]:
    """Seconds of a processor that a prediction at three anchors takes, and GiB resident before it and at its peak."""
    torch.set_num_threads(2)
    posed = language_problem(**SIZES[size], device="cpu")
    other = copy.deepcopy(posed.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model, batches, loss = posed.model, list(posed.batches), posed.loss
    del posed
    before, start = _resident_gib("VmRSS"), time.process_time()
    predict_barrier(model, other, batches, loss_fn=loss, progress=False)
    return {"before": before, "peak": _resident_gib("VmHWM"), "seconds": time.process_time() - start}


def _resident_gib(name: str) -> float:
    (kib,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) * 1024 / GIB


def write(name: str, text: str) -> None:
    """Put a text between the markers of the page."""
    page, marks = PAGE.read_text(encoding="utf-8"), (f"<!-- {name}: by scripts/memory.py -->", f"<!-- /{name} -->")
    pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
    assert pattern.search(page)
    PAGE.write_text(pattern.sub(f"{marks[0]}\n\n{text}\n\n{marks[1]}", page), encoding="utf-8")


def main(
    sweeps: Annotated[bool, typer.Option(help="Measure sweeps.")] = True,
    prediction: Annotated[str, typer.Option(help="Size of the GPT-2 to predict, full or quick; '' for none.")] = "full",
    child: Annotated[bool, typer.Option("--child", hidden=True)] = False,
) -> None:
    """Measure, print tables, and write them to the page."""
    if child:
        print(json.dumps(resident(prediction)))
        return
    if sweeps:
        lines = ["| network | budget | examples | layers | expected | taken | ratio |"]
        lines.append("| --- | --- | --- | --- | ---: | ---: | ---: |")
        for name, make in NETWORKS.items():
            posed = make()
            lines += [sweep_row(name, posed, budget) for budget in BUDGETS]
        table = "\n".join(lines)
        print(table)
        write("sweeps", table)
    if prediction:
        command = [sys.executable, __file__, "--child", "--prediction", prediction]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(said.splitlines()[-1])
        text = (
            f"The process had {found['before']:.1f} GiB before, both networks among them, and {found['peak']:.1f} GiB "
            f"at its peak; it took {found['seconds']:.0f} seconds of a processor."
        )
        print(text)
        if prediction == "full":
            write("resident", text)


if __name__ == "__main__":
    typer.run(main)
