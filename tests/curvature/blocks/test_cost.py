"""Claim: the estimated cost of a block is what the formulas of both roads say."""

from lmc_curvature.curvature.blocks.cost import LayerShape, road_costs


def test_costs_of_both_roads():
    last = road_costs(LayerShape(width=10, features=65))
    assert last == {"structured": 10 * (2 * 650 + 650 * (1 + 65)), "products": 650 * 2 * 2 * 650}
    # A 3×3 convolution of 64 channels: 8×8 images are fewer positions than a patch of 576 values, 32×32 are more.
    for side, chosen in ((8, "structured"), (32, "products")):
        costs = road_costs(LayerShape(64, 576, positions=side**2))
        assert min(costs, key=lambda road: costs[road]) == chosen
    pair = road_costs(LayerShape(8, 5, others=6), LayerShape(3, 9))
    own, outer = 8 * 5 + 3 * 9, 27 * (1 + 5 + 1)
    assert pair == {"structured": 8 * (own + outer) + 6 * 2 * own, "products": 27 * 2 * own}
