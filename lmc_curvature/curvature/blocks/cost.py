"""The cost of a dense block by either road, estimated from the shapes of its layers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """A layer, as the cost of its block depends on it.

    Attributes:
        width: Outputs of the affine map (units, or channels) at one position.
        features: Inputs of the affine map at one position (for a convolution, of one patch), and one for a bias.
        positions: Positions of an example that the map is applied at.
        others: Parameters of the layer that are not the affine map's.
    """

    width: int
    features: int
    positions: int = 1
    others: int = 0

    @property
    def affine(self) -> int:
        """Parameters of the affine map."""
        return self.width * self.features

    @property
    def parameters(self) -> int:
        """Parameters of the layer."""
        return self.affine + self.others


def road_costs(first: LayerShape, second: LayerShape | None = None) -> dict[str, int]:
    """Cost of the block between two layers (of one with itself when `second` is None) by either road.

    A product through an affine map costs own = positions × parameters multiplications forth and as many back, for
    each of the two layers, and what lies above them is taken to cost the same again. Then, with N parameters,

        products      min(N_first, N_second) · 2 own
        structured    width · positions · (own + outer)  +  others · 2 own

    where outer, the products with the inputs of both layers, is N_second · (positions_second + features_first), and
    N_second · positions_second more for a layer that may be fed. Of a layer with itself the structured road is thus
    the cheaper one as long as it has no more positions than features: always without positions, and for convolutions
    whose images have no more pixels than a patch has values. (Half of outer is saved there by symmetry, and lost to
    the smaller products.)

    Args:
        first: The layer that is called first.
        second: The layer that is called second.

    Returns:
        Multiplications an example by `"structured"` and by `"products"`, estimated.
    """
    other = second or first
    own = first.positions * first.affine + other.positions * other.affine
    outer = other.affine * (other.positions * (1 if second is None else 2) + first.features)
    others = first.others if second is None else first.others + second.others
    return {
        "structured": first.width * first.positions * (own + outer) + others * 2 * own,
        "products": min(first.parameters, other.parameters) * 2 * own,
    }
