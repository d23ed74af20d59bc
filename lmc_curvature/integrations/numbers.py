"""The numbers that a callback records: barriers between a network and a reference, and eigenvalues of its Hessian."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from torch import nn

from lmc_curvature.barrier.measure import measure_barrier
from lmc_curvature.barrier.metrics import Metric
from lmc_curvature.barrier.predict import predict_barrier
from lmc_curvature.curvature.operators import HessianOperator
from lmc_curvature.curvature.spectra.eigenpairs import top_eigenpairs
from lmc_curvature.errors import OptionError, check_choice
from lmc_curvature.objective import LossFunction, Objective

Quantity = Literal["barrier", "predicted-barrier", "eigenvalues"]


def check_quantities(quantities: Sequence[str]) -> None:
    """Refuse what cannot be recorded.

    Raises:
        OptionError: There is none, or one is unknown.
    """
    if isinstance(quantities, str) or not quantities:
        raise OptionError(f"record={quantities!r}: expected a list of {', '.join(map(repr, get_args(Quantity)))}.")
    for quantity in quantities:
        check_choice("record", quantity, get_args(Quantity))


def network_numbers(
    network: nn.Module,
    reference: nn.Module | None,
    loader: Iterable[Any],
    quantities: Sequence[Quantity],
    *,
    loss_fn: LossFunction | None = None,
    metrics: Sequence[Metric] = ("loss",),
    eigenvalues: int = 1,
    max_batches: int | None = None,
    **options: Any,
) -> dict[str, float]:
    """Compute what is to be recorded of a network; neither network is modified.

    Args:
        network: The network.
        reference: The network at the other end of the barriers; without it there are none.
        loader: The data; visited once for each of the quantities, and many times for eigenvalues.
        quantities: What to compute.
        loss_fn: The loss; see `measure_barrier`.
        metrics: What is measured of a barrier; see `measure_barrier`.
        eigenvalues: How many of the largest eigenvalues to compute.
        max_batches: Use only this many batches.
        **options: Options of barriers, as `measure_barrier` and `predict_barrier` both take them.

    Returns:
        Name to number. `barrier` is the loss halfway to the reference, minus the mean loss of both, with its sign, and
        `barrier_standard_error` belongs to it; `error_barrier` is that of the classification error.
        `predicted_barrier` is the same number by the prediction, which evaluates the midpoint, too. `predicted_maximum`
        is the highest point of the anchored curve, at the least the 0 of its ends, with two errors of its own, of
        sampling and of the expansion. `eigenvalue_1` is the largest eigenvalue of the Hessian in the parameters:
        running statistics, which training does not descend in, are no coordinates.
    """
    found: dict[str, float] = {}
    shared: dict[str, Any] = {"loss_fn": loss_fn, "max_batches": max_batches, "keep_partial": False, "progress": False}
    if reference is not None and "barrier" in quantities:
        measured = measure_barrier(
            network, reference, loader, alphas=[0.5], metrics=tuple(metrics), **shared, **options
        )
        for metric in measured.metrics:
            name = "barrier" if metric == "loss" else f"{metric}_barrier"
            # Halfway alone, so the highest point of the curve is the value there, with its sign.
            found[name], found[f"{name}_standard_error"] = measured.barrier(metric), measured.standard_error(metric)
    if reference is not None and "predicted-barrier" in quantities:
        predicted = predict_barrier(network, reference, loader, **shared, **options)
        found["predicted_barrier"] = float(predicted.curve([0.5])[0])
        found["predicted_barrier_standard_error"] = predicted.standard_error(alpha=0.5)
        found["predicted_maximum"] = predicted.barrier()
        found["predicted_maximum_standard_error"] = predicted.standard_error()
        found["predicted_maximum_expansion_error"] = predicted.expansion_error()
    if "eigenvalues" in quantities:
        batch_norm = {name: value for name, value in options.items() if name in ("batch_norm", "device", "dtype")}
        objective = Objective(network, loader, loss_fn=loss_fn, max_batches=max_batches, **batch_norm)
        hessian = HessianOperator(objective, statistics=False)
        values = top_eigenpairs(hessian, eigenvalues, progress=False).values.tolist()
        found |= {f"eigenvalue_{place}": value for place, value in enumerate(values, start=1)}
    # One batch alone has no spread.
    return {name: float(number) for name, number in found.items() if number == number}
