"""What an objective holds, in a few lines."""

import operator
from typing import TYPE_CHECKING

from lmc_curvature.errors import counted
from lmc_curvature.objective.loaders import loader_length
from lmc_curvature.objective.losses import BatchLoss
from lmc_curvature.plotting.summary import Display, Summary

if TYPE_CHECKING:
    from lmc_curvature.objective.risk import Objective


def objective_summary(objective: "Objective") -> Summary:
    """The network, the loss, the size of the data where that is known, and where and how it is computed."""
    state = objective.snapshot
    return Summary(
        f"Objective: mean {_loss_name(objective.loss_fn)} of a {type(objective.network).__name__}",
        {
            "network": f"{sum(p.numel() for p in objective.network.parameters()):,} parameters; "
            f"{counted(len(state), 'entry')} with {sum(t.numel() for t in state.values()):,} numbers can move",
            "data": _data_size(objective),
            "batch_norm": objective.batch_norm,
            "device, dtype": f"{objective.device}, {objective.dtype}" + (", TF32" if objective.allow_tf32 else ""),
        },
        ".loss(), .gradient(), HessianOperator(objective), project_hessian(objective, …)",
    )


class ObjectiveDisplay(Display):
    """Shows an objective by its summary."""

    def _summary(self: "Objective") -> Summary:  # type: ignore[misc]
        return objective_summary(self)


def _loss_name(loss_fn: object) -> str:
    function = loss_fn.fn if isinstance(loss_fn, BatchLoss) else loss_fn
    # Partial functions have none of their own.
    function = getattr(function, "func", function)
    name = str(getattr(function, "__name__", type(function).__name__))
    return f"BatchLoss {name}" if isinstance(loss_fn, BatchLoss) else name


def _data_size(objective: "Objective") -> str:
    """Batches and examples, as far as the loader tells without being visited."""
    batches = loader_length(objective.loader, objective.max_batches)
    found = "a loader that does not say how many batches it has" if batches is None else counted(batches, "batch")
    examples = operator.length_hint(getattr(objective.loader, "dataset", None) or ())
    part = "" if objective.max_batches is None else f"; max_batches={objective.max_batches}"
    return found + (f" of a data set of {counted(examples, 'example')}" if examples else "") + part
