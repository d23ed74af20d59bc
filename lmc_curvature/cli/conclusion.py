"""What a selection of layers comes to, in sentences and as the command that merges them."""

import dataclasses
import shlex
from typing import TYPE_CHECKING

from lmc_curvature.cli.options import Comparison

if TYPE_CHECKING:
    from lmc_curvature.merging import Selection, Verification

# What `merge` has to be told of the networks and, where it evaluates them, of how to do that.
_NETWORKS = ("model", "model_option", "key", "strip_prefix")
_EVALUATION = ("loss", "data", "split", "limit", "mean", "std", "resize", "transform", "batch_size", "max_batches")
_EVALUATION += ("recalibration", "augmentation", "device", "threads")


def conclusion(selection: "Selection", verification: "Verification | None") -> list[str]:
    """Sentences as `merging.conclusion` has them, with the options that measure more."""
    from lmc_curvature.merging.conclusion import conclusion

    options = {"unmeasured": "Nothing was measured: --measurements 10 does.", "hold_out": "--held-out measures that"}
    return conclusion(selection, verification, **options)


def merge_command(comparison: Comparison, selection: "Selection") -> str | None:
    """The command that writes the merged network of a selection; None where it is one of the two as it is.

    Of the mean of both merges it writes the one with base a.
    """
    if not selection.members:
        return None
    words = merge_words(comparison)
    if len(selection.members) < len(selection.choice.weights):
        words += ["--layers", ",".join(selection.members), "--base", "b" if selection.base == "b" else "a"]
    return shlex.join([*words, "--out", "merged" if comparison.are_folders() else "merged.safetensors"])


def merge_words(comparison: Comparison) -> list[str]:
    """The command that merges two networks, without its layers and without the file to write."""
    words = ["lmc-curvature", "merge", str(comparison.a), str(comparison.b)]
    recalibrate = comparison.batch_norm == "recalibrate"
    for name in (*_NETWORKS, *(_EVALUATION if recalibrate else ())):
        words += _option(comparison, name)
    words += ["--batch-norm", "recalibrate"] if recalibrate else []
    return words + (["--partition", comparison.layers] if comparison.layers != "fused" else [])


def _option(comparison: Comparison, name: str) -> list[str]:
    """An option as it is given; nothing where it has its default."""
    value, fields = getattr(comparison, name), {field.name: field.default for field in dataclasses.fields(Comparison)}
    if value == fields[name]:
        return []
    values = value if isinstance(value, list) else [value]
    return [word for each in values for word in (f"--{name.replace('_', '-')}", str(each))]
