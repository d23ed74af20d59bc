"""What the folders of two networks say of them beside the weights: settings in a config.json."""

from pathlib import Path
from typing import Any

from lmc_curvature.storage import parse_json

# What says nothing of how a network computes from its weights, or is read off the weights.
_OTHER = {"_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}


def folder_of(path: Path) -> Path:
    """The folder of a network, which has a config.json beside its weights; else the path itself."""
    return path.parent if path.is_file() and (path.parent / "config.json").is_file() else path


def setting_notes(a: Path, b: Path) -> list[str]:
    """A sentence on settings that differ between the folders of two networks; none where one has no config.json."""
    first, second = (_settings(folder_of(path) / "config.json") for path in (a, b))
    if first is None or second is None:
        return []
    absent = object()
    names = [name for name in first | second if first.get(name, absent) != second.get(name, absent)]
    if not names:
        return []
    shown = ", ".join(f"{name} ({first.get(name, 'not there')}, {second.get(name, 'not there')})" for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"config.json of {folder_of(a)} and of {folder_of(b)} differ in {shown}{more}: are they one architecture?"]


def _settings(path: Path) -> dict[str, Any] | None:
    """Every setting by its name, those within others with a dot."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    settings: dict[str, Any] = {}

    def add(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                add(f"{prefix}{name}.", value)
            elif name not in _OTHER:
                settings[prefix + name] = value

    add("", found if isinstance(found, dict) else {})
    return settings
