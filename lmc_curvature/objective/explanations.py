"""What a network or a loss raises, told in a sentence that says what it was given and what to pass instead."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lmc_curvature.errors import LMCCurvatureError, LoaderError, LossError, UnsupportedModelError, counted
from lmc_curvature.objective.batches import describe

_CHANNELS = re.compile(r"expected input.* to have (\d+) channels, but got (\d+)")


@contextlib.contextmanager
def translate_errors(explain: Callable[[Exception], LMCCurvatureError]) -> Iterator[None]:
    """Within the block, errors become ours, but for those that are, want of memory and a loader's death."""
    try:
        yield
    except (LMCCurvatureError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # The capture of a graph names the line at fault itself; the death of a loader's own process is told wherever it
        # becomes known.
        if torch.compiler.is_compiling() or str(error).startswith("DataLoader worker (pid"):
            raise
        raise explain(error) from error


@contextlib.contextmanager
def naming_what_has_no_derivative(task: str) -> Iterator[None]:
    """Within the block, which differentiates, errors of torch become ours, but for want of memory.

    Args:
        task: What the loss then cannot be: `"differentiated"`, or `"differentiated twice"`.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        method = "differences" if task == "differentiated twice" else "losses"
        raise UnsupportedModelError(
            f"The loss cannot be {task}: {str(error).rstrip('.')}. Replace that operation, or switch off "
            f"what hides it (torch.compile, checkpointing, sparse gradients), or predict with method={method!r}."
        ) from error


def network_error(error: Exception, inputs: Any, index: int) -> LMCCurvatureError:
    """The error for what a network raised on its inputs."""
    kind = UnsupportedModelError if isinstance(error, (NotImplementedError, NameError)) else LoaderError
    where = f"The network failed on batch {index}, whose inputs are {describe(inputs)}: {quoted(error)}."
    return kind(f"{where} {_network_remedy(error, inputs)}".rstrip())


def loss_error(error: Exception, output: Any, target: Any, index: int, *, of_classes: bool) -> LossError:
    """The error for what a loss raised; `of_classes` if it is cross-entropy or `nll_loss`."""
    remedy = _output_remedy(output)
    if not remedy and of_classes:
        remedy = (
            "Cross-entropy compares outputs (n, classes, …) with class indices (n, …) of type torch.int64, or with "
            "class probabilities of the output's shape; for real-valued targets pass loss_fn=F.mse_loss."
        )
    where = f"loss_fn failed on batch {index}, whose outputs are {describe(output)} and targets {describe(target)}"
    return LossError(f"{where}: {quoted(error)}. {remedy}".rstrip())


def batch_loss_error(error: Exception, data: Any, index: int) -> LossError:
    """The error for what the function of a `BatchLoss` raised."""
    remedy = ""
    if "does not require grad" in str(error):
        remedy = " Losses are evaluated without gradients: one that takes some itself does so in torch.enable_grad()."
    where = f"The function of the BatchLoss failed on batch {index}, {describe(data)}"
    return LossError(f"{where}: {quoted(error)}.{remedy}")


def quoted(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says, without a full stop."""
    text = str(error).strip()
    name = type(error).__name__
    return f"{name}: {text.splitlines()[0].rstrip('.')}" if text else name


def _network_remedy(error: Exception, inputs: Any) -> str:
    if not isinstance(inputs, Tensor):
        call = "model(**batch[0])" if isinstance(inputs, Mapping) else "model(*batch[0])"
        return (
            "A network is called with the x of (x, y) alone; for several inputs pass loss_fn=BatchLoss(fn) with "
            f"fn(model, batch) -> scalar mean, such as lambda model, batch: F.cross_entropy({call}, batch[1])."
        )
    expected = _CHANNELS.search(str(error))
    if expected is not None:
        needed, found = expected.groups()
        last = inputs.ndim == 4 and inputs.shape[-1] == int(needed)
        remedy = "move the channels to the front: x.permute(0, 3, 1, 2)" if last else "convert the images"
        return f"A convolution takes {counted(int(needed), 'channel')}, and the images have {found}: {remedy}."
    if inputs.dtype == torch.uint8:
        return "Images of type torch.uint8 are to be converted to floating-point numbers: x.float() / 255."
    if inputs.is_floating_point() or not inputs.numel():
        return ""
    if "type" in str(error):
        return "Inputs that are no indices are to be floating-point numbers: x.float()."
    beyond = isinstance(error, IndexError)
    return f"Their values run from {inputs.min()} to {inputs.max()}: is an embedding smaller?" if beyond else ""


def _output_remedy(output: Any) -> str:
    """What to pass where the output is not the tensor that a loss takes; empty for a tensor."""
    if isinstance(output, Tensor):
        return ""
    if isinstance(output, Mapping):
        part = f"[{('logits' if 'logits' in output else next(iter(output), 'logits'))!r}]"
    else:
        part = "[0]" if isinstance(output, (tuple, list)) else ".logits"
    return (
        f"The network's output is no tensor: choose the part that the loss is of, as in loss_fn=lambda output, target: "
        f"F.cross_entropy(output{part}, target), or pass loss_fn=BatchLoss(fn) with fn(model, batch) -> scalar mean."
    )
