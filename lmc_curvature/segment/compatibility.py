"""Comparison of the architectures of two networks, whose entries can be averaged if they are the same."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

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
        _entry_differences(model_a, model_b)
        or _tie_differences(model_a, model_b)
        or _fixed_buffer_differences(model_a, model_b)
    )
    if differences:
        differences += map(str, setting_differences(model_a, model_b))
        shown = "\n".join(f"  {line}" for line in differences[:10])
        more = f"\n  … and {len(differences) - 10} more" if len(differences) > 10 else ""
        counts = [counted(_count_weight_modules(model), "module") for model in (model_a, model_b)]
        raise ArchitectureMismatchError(
            f"The two networks are not of one architecture (model_a has {counts[0]} with parameters, model_b "
            f"has {counts[1]}):\n{shown}{more}\nBoth must be built alike, so that their entries can be averaged."
        )


def _count_weight_modules(model: nn.Module) -> int:
    return sum(any(True for _ in module.parameters(recurse=False)) for module in model.modules())


def _unequal(of_a: Mapping[str, Any], of_b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Names whose values differ, with both values; None where a name is missing."""
    for name in {**of_a, **of_b}:
        if of_a.get(name) != of_b.get(name):
            yield name, of_a.get(name), of_b.get(name)


def _entry_differences(*models: nn.Module) -> list[str]:
    forms = ({name: (tuple(entry.shape), entry.dtype) for name, entry in entries_of(m).items()} for m in models)
    differences = []
    for name, a, b in _unequal(*forms):
        if a is None:
            differences.append(f"{name}: only in model_b, with shape {b[0]}")
        elif b is None:
            differences.append(f"{name}: only in model_a, with shape {a[0]}")
        elif a[0] != b[0]:
            differences.append(f"{name}: shape {a[0]} in model_a, {b[0]} in model_b")
        else:
            differences.append(f"{name}: type {a[1]} in model_a, {b[1]} in model_b")
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
