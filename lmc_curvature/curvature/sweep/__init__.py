"""k forward tangents and one adjoint: UᵀHU of one batch from its captured graphs."""

from lmc_curvature.curvature.sweep.compiled import CompiledBatch, batch_key, compile_batch, compile_tile, is_current
from lmc_curvature.curvature.sweep.mixing import copies_stay_apart, tiles_join
from lmc_curvature.curvature.sweep.sweep import sweep_batch
from lmc_curvature.curvature.sweep.tree import BatchTree

__all__ = [
    "BatchTree",
    "CompiledBatch",
    "batch_key",
    "compile_batch",
    "compile_tile",
    "copies_stay_apart",
    "is_current",
    "sweep_batch",
    "tiles_join",
]
