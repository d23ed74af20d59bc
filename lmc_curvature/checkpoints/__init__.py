"""Checkpoints: those of any origin are read into networks, and training states are written and read."""

from lmc_curvature.checkpoints.entries import load_entries
from lmc_curvature.checkpoints.reading import load_checkpoint
from lmc_curvature.checkpoints.snapshots import read_snapshot, write_snapshot

__all__ = ["load_checkpoint", "load_entries", "read_snapshot", "write_snapshot"]
