"""Do verified selections of layers keep their budgets, and are they heavier than those of simpler rules?

    python scripts/study_selection.py --out runs/study [--siblings DIRECTORY --images FOLDER]

The pairs are those of `study_expansions.py`. Half of every batch is for choosing, the other half is held out. Budgets
are parts of the measured barrier of the whole network at α = 1/2. A selection has three anchors and ten measurements.
Its rivals order the layers by a score for each parameter and average the first k of them: by squared distance, by
Hessian energy, or by the least increase of the second-order barrier. The largest k within the budget is found by
bisection, for both bases, with as many measurements and as carefully as ours. Rows go to --out, a pair is not computed
again, and shares of the parameters are printed in Markdown.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from jaxtyping import Float, Int
from study_expansions import Images, Networks, Only, Out, Pair, Siblings, Threads, make_pairs
from tqdm.auto import tqdm

from lmc_curvature import BarrierPrediction, measure_barrier, predict_barrier, select_layers
from lmc_curvature.merging import Verification
from lmc_curvature.merging.rises import points_of

BUDGETS = (0.1, 0.25, 0.5)
EXAMPLES, BATCH = 2048, 32
MEASUREMENTS, CAUTION = 10, 2.0
# Whole networks with a lower barrier than this part of the mean loss have nothing to choose.
LEAST = 0.01


def main(
    out: Out = Path("runs/study"),
    siblings: Siblings = None,
    images: Images = None,
    only: Only = None,
    threads: Threads = 1,
) -> None:
    """Select, verify and compare."""
    torch.set_num_threads(threads)
    pairs = make_pairs(out, siblings, images, only, EXAMPLES)
    rows = [row for name, make in tqdm(pairs.items(), desc="pairs") for row in rows_of(out / name, make)]
    print(table(rows), summary(rows), sep="\n\n")


def rows_of(folder: Path, make: Callable[[], Pair]) -> list[dict[str, Any]]:
    """The rows of a pair, computed or from the file that they were written to."""
    path = folder / "selections.json"
    if not path.exists():
        rows = compare(folder.name, make)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1))
    return json.loads(path.read_text())


def compare(name: str, make: Callable[[], Pair]) -> list[dict[str, Any]]:
    """A row a budget: shares of the parameters by each rule, and whether ours holds on held-out data."""
    networks, loader = make()
    chosen_on, held_out = halves(list(loader))
    prediction = predict_barrier(*networks, chosen_on, anchors=3, progress=False)
    whole = measure_barrier(*networks, chosen_on, alphas=[0.5], metrics=("loss",), progress=False)
    if whole.barrier() < LEAST * np.mean(whole.ends()):
        return []
    orders = orders_of(prediction)
    rows = []
    for part in BUDGETS:
        budget = part * whole.barrier()
        found = select_layers(prediction, budget).verify(
            *networks, chosen_on, measurements=MEASUREMENTS, held_out=held_out, caution=CAUTION, progress=False
        )
        heaviest = {rule: greedy(networks, chosen_on, prediction, order, budget) for rule, order in orders.items()}
        rows.append({"pair": name, "budget": budget, **ours(found), **heaviest})
    return rows


def ours(found: Verification) -> dict[str, Any]:
    """What is told of a verified selection."""
    assert found.held_out is not None
    rises = {"rise": found.chosen.rise, "held-out rise": found.held_out.rise, "holds": found.holds}
    return {"measured sets": len(found.trials), **rises, "selected": found.selection.share}


def halves(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The two halves of every batch, in parts of few examples, so that their spread tells a standard error.

    A batch is a tensor, or a dictionary or a tuple of them.
    """
    found: tuple[list[Any], list[Any]] = [], []
    for batch in batches:
        size = next(len(each) for each in _tensors(batch))
        for half, first, end in ((found[0], 0, size // 2), (found[1], size // 2, size)):
            half += [_part(batch, slice(start, min(start + BATCH, end))) for start in range(first, end, BATCH)]
    return found


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    else:
        for each in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(each)


def _part(batch: Any, rows: slice) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch[rows]
    if isinstance(batch, dict):
        return {key: _part(each, rows) for key, each in batch.items()}
    return tuple(_part(each, rows) for each in batch)


def orders_of(prediction: BarrierPrediction) -> dict[str, Int[np.ndarray, " L"]]:
    """Rules by name, each with the layers in the order in which it averages them."""
    assert prediction.parameters is not None
    sizes = prediction.parameters
    scores = {"by distance": prediction.distances**2 / sizes, "by Hessian energy": prediction.hessian_energy / sizes}
    return {rule: np.argsort(score) for rule, score in scores.items()} | {"by second order": growing(prediction, sizes)}


def growing(prediction: BarrierPrediction, sizes: Int[np.ndarray, " L"]) -> Int[np.ndarray, " L"]:
    """Layers in the order in which the second-order barrier of their union grows least for each parameter."""
    members, order = np.zeros(len(sizes), dtype=bool), []
    for _ in sizes:
        rest = np.flatnonzero(~members)
        more = np.tile(members, (len(rest), 1))
        more[np.arange(len(rest)), rest] = True
        order.append(rest[int((prediction.set_barriers(more, expansion="second-order") / sizes[rest]).argmin())])
        members[order[-1]] = True
    return np.array(order)


def greedy(
    networks: Networks,
    batches: Sequence[Any],
    prediction: BarrierPrediction,
    order: Int[np.ndarray, " L"],
    budget: float,
) -> float:
    """The largest share of the parameters, over both bases, of the first k layers of an order within a budget."""
    assert prediction.parameters is not None
    heaviest = 0
    for base in ("a", "b"):
        least, most = 0, len(order)
        for _ in range(MEASUREMENTS // 2):
            if most - least > 1:
                count = (least + most) // 2
                members = np.isin(np.arange(len(order)), order[:count])
                inside = rise(networks, batches, prediction, points_of(members, base)[0]) <= budget
                least, most = (count, most) if inside else (least, count)
        heaviest = max(heaviest, prediction.parameters[order[:least]].sum())
    return float(heaviest / prediction.parameters.sum())


def rise(
    networks: Networks, batches: Sequence[Any], prediction: BarrierPrediction, point: Float[np.ndarray, " L"]
) -> float:
    """The rise measured at a point of the cube, carefully."""
    named = dict(zip(prediction.layers, point.tolist(), strict=True))
    measured = measure_barrier(*networks, batches, points=[named], alphas=[0.5], metrics=("loss",), progress=False)
    return float(measured.rises()[0] + CAUTION * np.nan_to_num(measured.rise_errors()[0]))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows in Markdown."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_text(row[column]) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The share of selections that hold, and that are heavier or not lighter than those of every rival."""
    rivals = np.array([[value for rule, value in row.items() if rule.startswith("by ")] for row in rows])
    selected = np.array([row["selected"] for row in rows])
    lines = [f"{np.mean([row['holds'] for row in rows]):.0%} of {len(rows)} selections hold on held-out data."]
    for number, rule in enumerate(rule for rule in rows[0] if rule.startswith("by ")):
        lighter, heavier = (selected < rivals[:, number] - 1e-9).mean(), (selected > rivals[:, number] + 1e-9).mean()
        lines.append(f"Against {rule}: {heavier:.0%} are heavier, {lighter:.0%} lighter.")
    best = rivals.max(axis=1)
    lines.append(f"Against the best of them: {(selected > best + 1e-9).mean():.0%} are heavier.")
    return "\n".join([*lines, f"{(selected >= best - 1e-9).mean():.0%} are not lighter than any."])


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    typer.run(main)
