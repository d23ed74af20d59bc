"""What predictions and measurements have in common about their notes."""

import dataclasses
from pathlib import Path
from typing import Any

from lmc_curvature.storage import load_arrays, save_arrays


def check_notes(result: Any, kind: str, directory: Path) -> None:
    """Notes are printed and kept in files, and files of earlier versions, which have none, are read."""
    assert result.notes == ()
    noted = dataclasses.replace(result, notes=("frozen at model_a: fc (2 entries)", "another"))
    noted.save(directory / "noted")
    assert type(result).load(directory / "noted").notes == noted.notes
    added = [line for line in str(noted).splitlines() if line not in str(result).splitlines()]
    assert added == [f"  {note}" for note in noted.notes]
    arrays, metadata = load_arrays(directory / "noted", kind)
    del metadata["notes"]
    save_arrays(directory / "old", kind, arrays, **metadata)
    assert str(type(result).load(directory / "old")) == str(result)
