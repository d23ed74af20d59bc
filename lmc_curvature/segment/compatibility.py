"""Comparison of the architectures of two networks, whose entries can be averaged if they are the same."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmc_curvature.errors import ArchitectureMismatchError, counted
from lmc_curvature.objective.network import entries_of, tied_names
from lmc_curvature.objective.normalization import is_batch_counter, statistic_names, tracked_modules
from lmc_curvature.objective.settings import setting_differences


def check_same_architecture(model_a: nn.Module, model_b: nn.Module) -> None:
    """Refuse two networks between which there is no third.

    Raises:
        ArchitectureMismatchError: They differ in entries, shapes, types, ties, or in buffers that a segment does not
            move; lists the differences, and those between modules that may explain them.
    """
    differences = (
        entry_differences(entries_of(model_a), entries_of(model_b))
        or _tie_differences(model_a, model_b)
        or _fixed_buffer_differences(model_a, model_b)
    )
    if differences:
        differences += map(str, setting_differences(model_a, model_b))
        counts = [counted(_count_weight_modules(model), "module") for model in (model_a, model_b)]
        detail = f" (model_a has {counts[0]} with parameters, model_b has {counts[1]})"
        refuse_differences(differences, "networks", detail)


def refuse_differences(differences: Sequence[str], what: str, detail: str = "") -> None:
    """Refuse two things between which there is nothing, if there are differences.

    Raises:
        ArchitectureMismatchError: There are; lists the first of them.
    """
    if differences:
        shown = "\n".join(f"  {line}" for line in differences[:10])
        more = f"\n  … and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise ArchitectureMismatchError(
            f"The two {what} are not of one architecture{detail}:\n{shown}{more}\nBoth must be built alike, so that "
            "their entries can be averaged."
        )


def _count_weight_modules(model: nn.Module) -> int:
    return sum(any(True for _ in module.parameters(recurse=False)) for module in model.modules())


def _unequal(of_a: Mapping[str, Any], of_b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Names whose values differ, with both values; None where a name is missing."""
    for name in {**of_a, **of_b}:
        if of_a.get(name) != of_b.get(name):
            yield name, of_a.get(name), of_b.get(name)


def entry_differences(
    of_a: Mapping[str, Tensor], of_b: Mapping[str, Tensor], names: tuple[str, str] = ("model_a", "model_b")
) -> list[str]:
    """Differences between two sets of entries in names, shapes and types, a line each.

    Args:
        of_a: Name to entry of the first.
        of_b: Name to entry of the second.
        names: What the two are called in the lines.
    """
    forms = ({name: (tuple(entry.shape), entry.dtype) for name, entry in of.items()} for of in (of_a, of_b))
    differences = []
    for name, a, b in _unequal(*forms):
        if a is None:
            differences.append(f"{name}: only in {names[1]}, with shape {b[0]}")
        elif b is None:
            differences.append(f"{name}: only in {names[0]}, with shape {a[0]}")
        elif a[0] != b[0]:
            differences.append(f"{name}: shape {a[0]} in {names[0]}, {b[0]} in {names[1]}")
        else:
            differences.append(f"{name}: type {a[1]} in {names[0]}, {b[1]} in {names[1]}")
    return differences


def _tie_differences(*models: nn.Module) -> list[str]:
    ties = (tied_names(model) for model in models)
    return [f"{name}: tied to {a} in model_a, to {b} in model_b" for name, a, b in _unequal(*ties)]


def _fixed_buffer_differences(model_a: nn.Module, model_b: nn.Module) -> list[str]:
    """Buffers that no segment moves: where they differ, no one network lies between the two."""
    statistics = {entry for name, _ in tracked_modules(model_a) for entry in statistic_names(name)}
    buffers_b = dict(model_b.named_buffers())
    return [
        f"buffer {name}: its values differ, and a segment moves parameters and running statistics only; make it "
        "equal in both, or a parameter"
        for name, buffer in model_a.named_buffers()
        if name not in statistics
        and not is_batch_counter(name)
        and not torch.equal(buffer, buffers_b[name].to(buffer.device))
    ]
