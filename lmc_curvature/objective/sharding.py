"""Networks that are spread over processes, each of which holds a part of every parameter."""

from collections.abc import Mapping

from torch import Tensor, nn

from lmc_curvature.errors import UnsupportedModelError

# Torch's, by name: not every build has them. Between passes they hold parts, within one whole parameters.
_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}

GATHERS = "_gathers_its_parameters"
"""An attribute of modules that bring parts together by themselves; see `gathering`."""


def is_sharded_module(module: nn.Module) -> bool:
    """Whether `fully_shard` has made a unit of a module."""
    return any(kind.__name__ == "FSDPModule" and kind.__module__.startswith("torch.") for kind in type(module).__mro__)


def is_spread(state: Mapping[str, Tensor]) -> bool:
    """Whether this process holds a part of each entry alone."""
    return any(hasattr(tensor, "full_tensor") for tensor in state.values())


def sharded_part(model: nn.Module) -> str:
    """What of a network is spread over processes, by FSDP, tensor parallelism or DeepSpeed's third stage; or nothing.

    Returns:
        The beginning of a sentence, such as `"Parameter '0.weight'"`; empty if the network is whole.
    """
    if any(vars(module).get(GATHERS) for module in model.modules()):
        return ""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") or name.endswith("_flat_param"):
            return f"Parameter {name!r}"
    for name, module in model.named_modules():
        if any(kind.__name__ in _SHARDED and kind.__module__.startswith("torch.") for kind in type(module).__mro__):
            return f"Module {name!r}" if name else "The network"
    return ""


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a network of which this process holds a part.

    Raises:
        UnsupportedModelError: It is one; names what is spread, and says how to have all of it.
    """
    if part := sharded_part(model):
        raise UnsupportedModelError(
            f"{part} is spread over several processes, and the library computes with whole networks. Load all of it "
            "into a network that is not spread: torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True, cpu_offload=True)) returns it on rank 0, to be loaded "
            "there or saved for every process. Batches may be shared by group=."
        )
