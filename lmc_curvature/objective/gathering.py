"""Networks that FSDP2 has sharded, computed with in their parts: whole parameters exist a unit at a time.

Entries of states stay `DTensor`s, of which every rank holds its part, and all ranks compute the same.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmc_curvature.errors import OptionError, RankError, UnsupportedModelError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.explanations import quoted
from lmc_curvature.objective.loaders import digest
from lmc_curvature.objective.network import State, check_module
from lmc_curvature.objective.sharding import GATHERS, is_sharded_module, sharded_part


@contextlib.contextmanager
def gathering(
    model_a: nn.Module, model_b: nn.Module, *, method: str, group: object
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Two networks as they are to be computed with, and how: as they are, unless `fully_shard` has sharded both.

    Then each is a plain module with the same parameters, which gathers those of a unit while its forward runs, and
    again for its backward pass. Within the block numbers are read, and tensors compared, that are spread over ranks.

    Args:
        model_a: The first network.
        model_b: The second network.
        method: The method to compute curvature by.
        group: What was given as processes that share the batches.

    Raises:
        UnsupportedModelError: The method takes two derivatives of sharded networks.
        OptionError: Sharded networks are to share the batches, too.
    """
    check_module("model_a", model_a)
    check_module("model_b", model_b)
    if not all(any(map(is_sharded_module, model.modules())) for model in (model_a, model_b)):
        yield model_a, model_b
        return
    if method not in ("differences", "losses"):
        raise UnsupportedModelError(
            f"{sharded_part(model_a)} is spread over several processes by fully_shard, and such networks are not "
            f"differentiated twice, as by method={method!r}: predict with method='differences'."
        )
    if group is not None:
        raise OptionError(
            f"group={group!r}: networks that are spread over processes are computed by all of these together, on the "
            "same batches. Leave group out."
        )
    for model in (model_a, model_b):
        _refuse_spread_twice(model)
    from torch.distributed.tensor.experimental import implicit_replication

    with implicit_replication(), _Readable():
        yield _plain(model_a, {}), _plain(model_b, {})


def same_batches(batches: Iterator[Batch], state: State) -> Iterator[Batch]:
    """Pass on batches, and see to it that the ranks over which a state is spread, if any, have the same.

    Raises:
        RankError: They have not, or the loader of another has failed; on all ranks.
    """
    spread: Any = next((tensor for tensor in state.values() if hasattr(tensor, "full_tensor")), None)
    if spread is None:
        yield from batches
        return
    mesh = spread.device_mesh
    for number in itertools.count():
        try:
            batch = next(batches, None)
        except Exception as error:
            _gather(mesh, f"The loader of another rank failed: {quoted(error)}.")
            raise
        found = _gather(mesh, digest(batch.data) if batch else None)
        if failure := next((each for each in found if isinstance(each, str)), ""):
            raise RankError(failure)
        if any(other != found[0] for other in found):
            raise RankError(
                f"The ranks' loaders yield different batches (batch {number}), and the ranks over which a network is "
                "spread compute together: seed what shuffles or augments alike, and use no DistributedSampler."
            )
        if batch is None:
            return
        yield batch


def _gather(mesh: Any, value: Any) -> list[Any]:
    """What all ranks of a mesh have."""
    values = [value]
    for axis in range(mesh.ndim):
        found: list[Any] = [None] * mesh.size(axis)
        torch.distributed.all_gather_object(found, values, group=mesh.get_group(axis))
        values = [each for part in found for each in part]
    return values


def _refuse_spread_twice(model: nn.Module) -> None:
    """Refuse tensor parallelism within what is sharded.

    Raises:
        UnsupportedModelError: A parameter is spread along two axes of the mesh.
    """
    for name, parameter in model.named_parameters():
        placements = getattr(parameter, "placements", ())
        if sum(not placement.is_replicate() for placement in placements) > 1:
            raise UnsupportedModelError(
                f"Parameter {name!r} is spread over several processes along two axes of the mesh, as by tensor "
                "parallelism: only networks that fully_shard alone has sharded can be predicted so."
            )


def _plain(model: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """A network without what `fully_shard` has made of its modules, which gathers by itself; it shares the tensors."""
    if id(model) in known:
        return known[id(model)]
    is_unit = is_sharded_module(model)
    # Of a class that fully_shard has made, the bases are FSDPModule and the module's own.
    kind = type(model).__bases__[1] if is_unit else type(model)
    known[id(model)] = plain = object.__new__(kind)
    own = vars(plain)
    own |= vars(model)
    # What was compiled in place calls the original.
    own.pop("_compiled_call_impl", None)
    if is_unit:
        # After a pass, the outermost module holds whole parameters for a while.
        model.reshard()  # pyright: ignore[reportCallIssue]
    own["_modules"] = {n: None if child is None else _plain(child, known) for n, child in model._modules.items()}
    own |= {name: dict(getattr(model, name)) for name in ("_parameters", "_buffers")}
    if is_unit:
        for name in [name for name in own if name.startswith("__composable_api") or "fsdp" in name]:
            del own[name]
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            own[name] = type(own[name])((key, hook) for key, hook in own[name].items() if not _is_of_fsdp(hook))
            for others in (f"{name}_with_kwargs", f"{name}_always_called"):
                if others in own:
                    own[others] = own[others].copy()
        own[GATHERS], unit = True, _Unit()
        plain.register_forward_pre_hook(unit.gather, prepend=True)
        plain.register_forward_hook(unit.release, always_call=True)
    return plain


def _is_of_fsdp(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")


class _Unit:
    """The parameters that are gathered together, as hooks of the module that `fully_shard` was called with."""

    def __init__(self) -> None:
        # A module may call itself.
        self._calls: list[tuple[list[tuple[nn.Module, str, Any]], Any]] = []

    def gather(self, module: nn.Module, args: Any) -> None:
        entries: list[tuple[nn.Module, str, Any]] = [
            (member, name, entry) for member in _members(module) for name, entry in member._parameters.items()
        ]
        spread = [each for each in entries if hasattr(each[2], "full_tensor")]
        parts: dict[int, Any] = {}
        for member, name, parameter in spread:
            member._parameters[name] = whole = parameter.full_tensor()
            if whole.numel():
                parts[whole.untyped_storage().data_ptr()] = parameter.detach()
        # Backward passes gather again what they need: a graph of whole parameters would hold all of the network.
        saving = torch.autograd.graph.saved_tensors_hooks(lambda tensor: _part_of(tensor, parts), _whole_of)
        saving.__enter__()
        self._calls.append((spread, saving))

    def release(self, module: nn.Module, args: Any, output: Any) -> None:
        spread, saving = self._calls.pop()
        saving.__exit__(None, None, None)
        for member, name, parameter in spread:
            member._parameters[name] = parameter


def _members(unit: nn.Module) -> Iterator[nn.Module]:
    """The modules of a unit: all below it that are in no unit of their own."""
    yield unit
    for child in unit.children():
        if not vars(child).get(GATHERS):
            yield from _members(child)


def _part_of(tensor: Tensor, parts: dict[int, Any]) -> Any:
    spread = hasattr(tensor, "full_tensor") or tensor.layout != torch.strided
    part = None if spread else parts.get(tensor.untyped_storage().data_ptr())
    return tensor if part is None else (part, tensor.size(), tensor.stride(), tensor.storage_offset())


def _whole_of(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    part, size, stride, offset = saved
    return part.full_tensor().as_strided(size, stride, offset)


class _Readable(TorchFunctionMode):
    """Within it, what Python reads of a tensor that is spread over ranks is that of the whole, the same on all.

    By itself a sum that is not yet brought together gives the part of the rank.
    """

    _READ = frozenset({"item", "tolist", "numpy", "__float__", "__bool__", "__int__", "equal", "allclose", "flatten"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self._READ:
            args = [arg.full_tensor() if hasattr(arg, "full_tensor") else arg for arg in args]
        return func(*args, **(kwargs or {}))
