"""Checkpoints of any origin are read into a network, without running code."""

import os
from pathlib import Path

from torch import nn

from lmc_curvature.checkpoints.entries import load_entries
from lmc_curvature.checkpoints.files import read_contents
from lmc_curvature.checkpoints.unwrapping import unwrap


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, key: str | None = None, strip_prefix: str | None = None
) -> nn.Module:
    """Load a checkpoint into a network, strictly: the same entries with the same shapes.

    Accepts safetensors files, our own snapshots, what `torch.save` wrote as long as it holds tensors and plain values
    only, and checkpoints in shards: the index (`model.safetensors.index.json`, `pytorch_model.bin.index.json`), or the
    directory. A state dict may lie at the top or one or two keys below (`state_dict`, `model`, `net`, `ema`, …), its
    names may have a prefix in common (`net.`, as Lightning writes them), and what wrappers insert into names
    (`module.`, `_orig_mod.` and the like: DataParallel, AveragedModel, torch.compile, FSDP) makes no difference. Where
    the network's entries are found in one way only, that is how they are read. Where there are several, as in a
    checkpoint with a network and its moving average, `key` and `strip_prefix` choose.

    Args:
        model: The network; changed in place.
        path: The file, or the directory with the shards.
        key: The key of the state dict, or keys joined by dots; `""` is the top.
        strip_prefix: What the names of the network's entries begin with; entries that do not are left out. `""` leaves
            out what stands under a prefix beside the network's own names.

    Returns:
        The same network.

    Raises:
        CheckpointError: The file is missing, damaged, would have to run code to be read, holds no state dict,
            does not fit the network, or fits in several ways; the message then lists them.
    """
    path = Path(path)
    own = model.state_dict()
    entries, source = unwrap(read_contents(path), own, key=key, strip_prefix=strip_prefix, source=str(path))
    load_entries(model, entries, source=source)
    return model
