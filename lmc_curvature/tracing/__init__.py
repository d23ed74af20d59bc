"""Barriers between siblings, predicted and measured epoch by epoch, and their geometry, as tables."""

from lmc_curvature.tracing.tables import Traces, read_traces
from lmc_curvature.tracing.trace import trace_forks

__all__ = ["Traces", "read_traces", "trace_forks"]
