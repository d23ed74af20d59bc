"""k forward tangents and one adjoint: UᵀHU of one batch from its captured graphs."""

from lmc_curvature.curvature.sweep.compiled import (
    CompiledBatch,
    Evaluation,
    batch_key,
    compile_batch,
    compile_part,
    evaluate_batch,
    expected_bytes,
    is_current,
    part_size,
)
from lmc_curvature.curvature.sweep.mixing import mixes_examples, state_near
from lmc_curvature.curvature.sweep.sweep import sweep_batch
from lmc_curvature.curvature.sweep.tree import BatchTree

__all__ = [
    "BatchTree",
    "CompiledBatch",
    "Evaluation",
    "batch_key",
    "compile_batch",
    "compile_part",
    "evaluate_batch",
    "expected_bytes",
    "is_current",
    "mixes_examples",
    "part_size",
    "state_near",
    "sweep_batch",
]
