"""Merges as configurations of mergekit (Goddard et al. 2024), which merges the same from directories of checkpoints."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from lmc_curvature.checkpoints.files import files_of
from lmc_curvature.checkpoints.streaming import MappedCheckpoint
from lmc_curvature.errors import CheckpointError
from lmc_curvature.merging.descriptions import folder_of
from lmc_curvature.storage import write_atomically

_HEAD = """# Written by lmc_curvature: the weighted mean of two checkpoints, entry by entry.
# Run it with mergekit: mergekit-yaml THIS_FILE OUTPUT_DIRECTORY
# mergekit takes an entry's weight from the first filter that is a part of its name.
"""


def recipe(a: Path, b: Path, base: Literal["a", "b"], coordinates: Mapping[str, float]) -> dict[str, Any]:
    """A merge as a configuration of mergekit, by its method `linear`.

    Args:
        a: The checkpoint at coordinate 0.
        b: The checkpoint at coordinate 1.
        base: The one whose configuration and tokenizer mergekit copies.
        coordinates: Entry name to coordinate.
    """
    paths = [str(folder_of(path)) for path in (a, b)]
    # A filter of one entry may be a part of another's name: the longest is looked at first, and names its own.
    default = Counter(coordinates.values()).most_common(1)[0][0]
    filters = {name: alpha for name, alpha in coordinates.items() if alpha != default}
    filters |= {n: alpha for n, alpha in coordinates.items() if alpha == default and any(f in n for f in filters)}
    ordered = sorted(filters, key=len, reverse=True)

    def weights(of_b: bool) -> Any:
        def weight(alpha: float) -> float:
            return alpha if of_b else 1 - alpha

        listed = [{"filter": name, "value": weight(filters[name])} for name in ordered]
        return [*listed, {"value": weight(default)}] if listed else weight(default)

    models = [{"model": path, "parameters": {"weight": weights(path is paths[1])}} for path in paths]
    return {"models": models, "merge_method": "linear", "base_model": paths[1 if base == "b" else 0]}


def check_plain(*checkpoints: MappedCheckpoint) -> None:
    """Refuse checkpoints in which mergekit would not find the entries.

    Raises:
        CheckpointError: A checkpoint has them under a key, or with what wrappers insert in their names, or is not the
            one that mergekit reads from its directory.
    """
    for checkpoint in checkpoints:
        if checkpoint.wrapping is not None:
            raise CheckpointError(
                f"{checkpoint.path} has its entries {checkpoint.wrapping}, where mergekit does not look for them: save "
                "the plain state dict to a file of its own, or leave mergekit out."
            )
        directory = folder_of(checkpoint.path)
        if directory.is_dir() and files_of(checkpoint.path)[0] not in (own := _read_by_mergekit(directory)):
            raise CheckpointError(
                f"{checkpoint.path} is not what mergekit reads from {directory}, which is "
                f"{own[0].name if own else 'model.safetensors or pytorch_model.bin, and not there'}: move it to a "
                "directory of its own under such a name, beside its config.json, or leave mergekit out."
            )


def write_recipe(path: Path, a: Path, b: Path, base: Literal["a", "b"], coordinates: Mapping[str, float]) -> None:
    """Write a merge as a configuration of mergekit; see `recipe`."""
    text = yaml.safe_dump(recipe(a, b, base, coordinates), sort_keys=False)
    with write_atomically(path) as temporary:
        temporary.write_text(_HEAD + text, encoding="utf-8")


def _read_by_mergekit(directory: Path) -> list[Path]:
    """The checkpoint that mergekit reads from a directory, or the index of its shards; empty if there is none."""
    names = (f"{kind}{index}" for kind in ("model.safetensors", "pytorch_model.bin") for index in (".index.json", ""))
    return [path for name in names if (path := directory / name).is_file()][:1]
