"""The sweep, believed only after one of its answers was compared with a Hessian-vector product."""

import warnings

import numpy as np

from lmc_curvature.curvature.problem import BatchValues
from lmc_curvature.curvature.projection.by_products import Products
from lmc_curvature.curvature.sweep.cache import Captured
from lmc_curvature.curvature.sweep.program import Data
from lmc_curvature.curvature.sweep.sweep import Sweep
from lmc_curvature.errors import CaptureError, FallbackWarning, SweepError
from lmc_curvature.objective.batches import Batch


class VerifiedSweep:
    """Projects batches by the sweep, and compares what each newly captured graph gives with a product.

    Args:
        sweep: The sweep.
        products: The same projection by Hessian-vector products.
    """

    def __init__(self, sweep: Sweep, products: Products):
        self._sweep = sweep
        self._products = products
        self._fallen_back = False

    def project(self, number: int, batch: Batch) -> BatchValues:
        """Loss, slopes and curvature of one batch at one of the states.

        Raises:
            CaptureError: The loss cannot be captured.
            MemoryBudgetError: Too few examples or directions would fit the budget.
            SweepError: The sweep's answer is not that of a Hessian-vector product.
            UnsupportedModelError: An operation has no second derivative.
        """
        values = self._in_tiles(number, batch)
        captured = self._sweep.captures.of(batch)
        if captured.verified or not _finite(values):
            return values
        disagreement = self._disagreement_in_budget(captured, values, number, batch)
        if captured.cut.examples < batch.size and (disagreement or not self._sweep.keeps_alike_apart(number, batch)):
            # The network mixes examples: whole batches it is.
            self._sweep.sweep_whole_batches()
            values = self._sweep.project(number, batch)
            captured = self._sweep.captures.of(batch)
            disagreement = self._disagreement(values, number, batch)
        if disagreement:
            raise SweepError(disagreement)
        captured.verified = True
        return values

    def _disagreement_in_budget(self, captured: Captured, values: BatchValues, number: int, batch: Batch) -> str:
        """What is wrong with the sweep's values, found with a product of a part of the batch where memory is short."""
        if captured.cut.keeps_values or captured.cut.examples == batch.size:
            return self._disagreement(values, number, batch)
        # A product holds the graph of all that it is of. A tile has the derivatives, the whole batch needs values only.
        if self._sweep.is_cut_rightly(number, batch) and self._agrees_in_part(captured.cut.examples, number, batch):
            return ""
        return self._disagreement(values, number, batch)

    def _agrees_in_part(self, size: int, number: int, batch: Batch) -> bool:
        """Whether the sweep of the first examples agrees with a product; not if there is no loss of these alone."""
        part = Batch(batch.index, size, Data.of(batch.data).rows(0, size, batch.size).structure)
        try:
            values = self._sweep.project(number, part)
            return _finite(values) and not self._disagreement(values, number, part)
        except Exception:  # noqa: BLE001 - what a loss makes of a part is nobody's concern: the whole is compared
            return False

    def _in_tiles(self, number: int, batch: Batch) -> BatchValues:
        try:
            return self._sweep.project(number, batch)
        except CaptureError:
            if not self._sweep.captures.cuts(batch):
                raise
            # The network insists on its batch size, or its inputs do not begin with the examples.
            self._sweep.sweep_whole_batches()
            return self._sweep.project(number, batch)

    def project_or_fall_back(self, number: int, batch: Batch) -> BatchValues:
        """As `project`, and by products, with a warning, from where the sweep cannot go on."""
        if not self._fallen_back:
            try:
                return self.project(number, batch)
            except (CaptureError, SweepError) as error:
                self._fallen_back = True
                warnings.warn(
                    f"{error} Falling back on one Hessian-vector product a direction, which is slower.",
                    FallbackWarning,
                    stacklevel=4,
                )
        return self._products.project(number, batch)

    def _disagreement(self, values: BatchValues, number: int, batch: Batch) -> str:
        """What is wrong with the sweep's values, or nothing: a row of UᵀHUr for a random r at a time."""
        loss, slopes, curvature = values
        precision = self._sweep.objective.rounding
        # Far above rounding, and what it does at the kinks of rectifiers; far below a forgotten term.
        margin = precision**0.4
        # What cancels exactly comes out as rounding of what cancelled, which the loss gives the size of.
        rounding = 30 * precision * max(1.0, abs(loss))
        # Signs, scaled so that every direction has its say.
        size = np.sqrt(np.maximum(np.abs(curvature).max(1), rounding))
        coefficients = np.random.default_rng(0).choice([-1.0, 1.0], len(size)) / size
        slope, row = self._products.combination(number, batch, coefficients)
        compared = {
            # In single precision a unit near a kink moves the slopes of all layers alike, small ones too.
            "slope": (slopes, slope, size * (np.abs(slopes) / size).sum() + rounding / margin),
            "curvature": (
                curvature @ coefficients,
                row,
                np.abs(curvature) @ np.abs(coefficients)
                + size * np.sqrt(len(size))
                + rounding / margin * np.abs(coefficients).sum(),
            ),
        }
        for name, (swept, expected, scale) in compared.items():
            wrong = np.flatnonzero(~(np.abs(swept - expected) <= margin * scale))
            if len(wrong):
                along = f"direction {wrong[0]}" + (" and a random combination of all" if name == "curvature" else "")
                return (
                    f"The sweep's {name} along {along} is {swept[wrong[0]]:.6g} on batch {batch.index}, and "
                    f"{expected[wrong[0]]:.6g} by a Hessian-vector product. Does the network have derivatives of its "
                    "own (autograd.Function, no_grad, detach)?"
                )
        return ""


def _finite(values: BatchValues) -> bool:
    return all(np.isfinite(value).all() for value in values)
