"""A network seen from outside: its entries and their names, its structure without values, its device and type."""

import copy
import functools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmc_curvature.errors import DirectionError, NonFiniteError, OptionError, UnsupportedModelError, suggest
from lmc_curvature.objective.batches import describe, tensors_in, to_device
from lmc_curvature.objective.normalization import BatchNormPolicy, statistic_names, tracked_modules
from lmc_curvature.objective.numerics import largest_values

State = Mapping[str, Tensor]
"""Entry name to tensor: parameters, and the running statistics that a segment moves."""


def check_module(name: str, model: object) -> None:
    """Refuse what is not a network that can be evaluated at a state.

    Raises:
        UnsupportedModelError: It is no `torch.nn.Module`, or is a TorchScript module.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{name} is {describe(model)}; expected a torch.nn.Module. Load a state dict into its network first."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(f"{name} is a TorchScript module; pass the nn.Module that it was made from.")


def acts_on_modes(model: nn.Module) -> bool:
    """Whether a module does something of its own where it is put into training or evaluation mode."""
    kinds = [type(module) for module in model.modules()]
    return any(kind.train is not nn.Module.train or kind.eval is not nn.Module.eval for kind in kinds)


def entries_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a network by name, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def placed_entries(model: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of every parameter and buffer on a device, floating-point ones in the given type."""
    return {name: to_device(t.detach(), device, dtype).clone() for name, t in entries_of(model).items()}


def movable_entries(model: nn.Module, batch_norm: BatchNormPolicy) -> tuple[str, ...]:
    """Names of the entries a segment may move, in the order of the network's modules.

    All parameters, tied ones once; under `"interpolate"` the running statistics, too.

    Raises:
        UnsupportedModelError: An entry is uninitialised, or a parameter is not of a real floating-point type.
    """
    for name, tensor in entries_of(model).items():
        is_parameter = isinstance(tensor, nn.Parameter)
        if nn.parameter.is_lazy(tensor):
            kind = "Parameter" if is_parameter else "Buffer"
            raise UnsupportedModelError(f"{kind} {name!r} is uninitialised: run the network on one batch first.")
        if is_parameter and not tensor.is_floating_point():
            raise UnsupportedModelError(
                f"Parameter {name!r} has type {tensor.dtype}: a direction moves real floating-point numbers only. "
                "Register it as a buffer if it is a constant."
            )
    own = set(dict(model.named_parameters()))
    statistics = {name: statistic_names(name) for name, _ in tracked_modules(model)}
    names: list[str] = []
    for prefix, module in model.named_modules():
        names += [name for name, _ in module.named_parameters(prefix=prefix, recurse=False) if name in own]
        if batch_norm == "interpolate":
            names += statistics.get(prefix, ())
    return tuple(names)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters, to the name they are listed under first."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def with_first_names(state: State, ties: Mapping[str, str]) -> dict[str, Tensor]:
    """A state in which tied parameters have the name that they are listed under first.

    Args:
        state: Entry name to tensor.
        ties: Further names of tied parameters, to the first; see `tied_names`.

    Raises:
        DirectionError: One parameter has different numbers under two names.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        first = ties.get(name, name)
        own = found.setdefault(first, tensor)
        if own is not tensor and not equal(own, tensor):
            names = sorted(other for other in state if ties.get(other, other) == first)
            raise DirectionError(
                f"Entries {' and '.join(map(repr, names))} are one parameter of the network, and have different "
                "numbers: give it under one name, or the same under each."
            )
    return found


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and the same values, not-a-number among them."""
    if one.shape != other.shape:
        return False
    other = other.to(one)
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def check_finite(state: State, owner: str, question: str = "Has its training diverged?") -> None:
    """Refuse a state with values that are infinite or not a number; the message ends with a question.

    Raises:
        NonFiniteError: Names the entry and its owner, and counts the values.
    """
    if largest_values(tensor for tensor in state.values() if torch.is_floating_point(tensor)).isfinite().all():
        return
    for name, tensor in state.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NonFiniteError(
                f"Entry {name!r} of {owner} has {bad} of {tensor.numel()} values that are infinite or not a number. "
                f"{question}"
            )


def check_gradient(gradient: State) -> None:
    """Refuse a gradient with values that are infinite or not a number.

    Raises:
        NonFiniteError: Names the entry, and counts the values.
    """
    question = "Does the network compute something without a derivative there, such as a square root at zero?"
    check_finite(gradient, "the gradient", question)


def copies_of(state: State) -> dict[str, Tensor]:
    """Copies of a state's tensors that nothing has written into."""
    # By its version, the copy of a tensor made in inference mode was written into.
    return {name: tensor.detach().clone().data for name, tensor in state.items()}


def check_entries(state: State, entries: State, movable: Collection[str]) -> None:
    """Refuse a state or direction that does not fit a network.

    Args:
        state: Entry name to tensor.
        entries: All entries of the network.
        movable: Names of those that move, to suggest.

    Raises:
        DirectionError: An entry is unknown, has another shape, or is not of a real floating-point type.
    """
    for name, tensor in state.items():
        if name not in entries:
            raise DirectionError(f"The network has no entry {name!r}: {suggest(name, movable)}")
        if tensor.shape != entries[name].shape:
            raise DirectionError(
                f"Entry {name!r} has shape {tuple(tensor.shape)}; expected {tuple(entries[name].shape)}."
            )
        if not tensor.is_floating_point():
            raise DirectionError(
                f"Entry {name!r} has type {tensor.dtype}; expected real floating-point numbers. Leave out counters "
                "and other buffers that do not move."
            )


def flattened(state: State, entries: State) -> Tensor:
    """A state that has just some entries, as one vector in their order.

    Raises:
        DirectionError: It lacks one of them, has another beside them, or one of another shape or type.
    """
    check_entries(state, entries, entries.keys())
    missing = [name for name in entries if name not in state]
    if missing:
        raise DirectionError(f"Entry {missing[0]!r} is missing: expected all of {', '.join(map(repr, entries))}.")
    return torch.cat([state[name].flatten() for name in entries])


def as_leaves(state: State) -> dict[str, Tensor]:
    """A state of the same values, as new leaves of the autograd graph."""
    return {name: tensor.detach().requires_grad_() for name, tensor in state.items()}


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the autograd graph that some tensors were computed by; a leaf's node has a `variable`."""
    seen: set[Any] = set()
    pending = [tensor.grad_fn for tensor in tensors]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending.extend(following for following, _ in node.next_functions)


def operation_counts(tensors: Iterable[Tensor]) -> Counter[str]:
    """How many operations of each name are in the autograd graph that some tensors were computed by."""
    return Counter(type(node).__name__ for node in graph_nodes(tensors))


def skeleton_of(model: nn.Module) -> nn.Module:
    """Copy a network's structure without its tensors, in evaluation mode.

    Parameters and buffers become placeholders: every value comes from the state at hand, and what reaches past it
    finds not-a-number, or is found by `Objective` among the leaves of the graph. So does what modules hold that was
    computed from parameters.
    """
    placeholders: dict[int, Any] = {id(buffer): _placeholder(buffer) for buffer in model.buffers()}
    own = {id(parameter) for parameter in model.parameters()}
    placeholders |= {
        id(tensor): _placeholder(tensor)
        for tensor in _computed_tensors(model)
        if any(id(getattr(node, "variable", None)) in own for node in graph_nodes([tensor]))
    }
    placeholders |= {id(parameter): nn.Parameter(_placeholder(parameter)) for parameter in model.parameters()}
    return copy_in_evaluation(model, placeholders)


def copy_in_evaluation(model: nn.Module, replacements: Mapping[int, Any] | None = None) -> nn.Module:
    """A copy in evaluation mode, in which objects are replaced by others that are given by `id`.

    Raises:
        UnsupportedModelError: The network cannot be copied, or put into evaluation mode.
    """
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in _computed_tensors(model)}
    try:
        copied = copy.deepcopy(model, memo | dict(replacements or {}))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({error}). Its modules must support copy.deepcopy."
        ) from error
    try:
        # Not returned by the call: networks that override train() often forget to return themselves.
        copied.eval()
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be put into evaluation mode ({type(error).__name__}: {error}). A train() "
            "of its own must bear to be called again: call model.eval() first, and keep what is done in a flag."
        ) from error
    return copied


def _computed_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors with a graph that modules hold: pruning and the older parametrisations leave what they compute there."""
    for module in model.modules():
        yield from (tensor for tensor in tensors_in(list(vars(module).values())) if not tensor.is_leaf)


def _placeholder(tensor: Tensor) -> Tensor:
    """Not-a-number (or zero, for integers) in the shape of a tensor, with the storage of one element."""
    value = torch.nan if tensor.is_floating_point() or tensor.is_complex() else 0
    return torch.full((), value, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def choose_device(device: torch.device | str | None, tensors: Sequence[Tensor]) -> torch.device:
    """The device asked for, or else that of the first of a network's tensors; the CPU for a network without any.

    Raises:
        OptionError: There is no such device here.
    """
    if device is not None:
        return parse_device(device)
    return tensors[0].device if tensors else torch.device("cpu")


def choose_dtype(dtype: torch.dtype | None, tensors: Sequence[Tensor]) -> torch.dtype:
    """The type asked for, or else the one that holds all floating-point tensors of a network, float32 at least.

    Raises:
        OptionError: It is not a floating-point type.
    """
    if dtype is None:
        dtypes = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        # In half precision a barrier is noise.
        return functools.reduce(torch.promote_types, dtypes, torch.float32) if dtypes else torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise OptionError(f"dtype={dtype!r} is not a floating-point type: expected torch.float32, torch.float64, …")
    return dtype


def precision_note(dtype: torch.dtype, tensors: Sequence[Tensor]) -> str:
    """A few words on a type in half precision, or that is not that of a network in it; none in other cases."""
    halves = {tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.dtype.itemsize < 4}
    names = ", ".join(sorted(str(half).removeprefix("torch.") for half in halves - {dtype}))
    said = [f"of entries in {names}"] if names else []
    if dtype.itemsize < 4:
        said.append(f"which rounds every number by up to {50 * torch.finfo(dtype).eps:.2g}%")
    return ", ".join([f"computed in {str(dtype).removeprefix('torch.')}", *said]) if said else ""


def parse_device(device: torch.device | str) -> torch.device:
    """The device of a name.

    Raises:
        OptionError: There is no such device here.
    """
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device={device!r} is not a device: expected 'cpu', 'cuda', 'cuda:1', …") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device={device!r}: no CUDA device was found.")
    return place
