"""Spectra of symmetric operators: Lanczos runs, eigenpairs, densities and traces."""

from lmc_curvature.curvature.spectra.density import SpectralDensity, spectral_density
from lmc_curvature.curvature.spectra.eigenpairs import Eigenpairs, top_eigenpairs
from lmc_curvature.curvature.spectra.lanczos import Lanczos, lanczos
from lmc_curvature.curvature.spectra.symmetric import SymmetricOperator
from lmc_curvature.curvature.spectra.trace import Estimate, trace

__all__ = [
    "Eigenpairs",
    "Estimate",
    "Lanczos",
    "SpectralDensity",
    "SymmetricOperator",
    "lanczos",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
