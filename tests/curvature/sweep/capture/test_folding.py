"""Claim: scales and shifts per channel move into the convolution before them, where nothing else reads it."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from lmc_curvature import Objective
from lmc_curvature.curvature.sweep.capture import capture
from lmc_curvature.sources.resnets import resnet20
from tests.support.capturing import captured_right, counts, numbers, run


def _convolved_and_normalized(x, weight, scale, shift):
    return F.conv2d(x, weight, padding=1) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def test_scales_and_shifts_fold_into_convolutions():
    state = [numbers(3, 2, 3, 3), numbers(3), numbers(3)]
    first, second = captured_right(
        lambda w, s, t, x: _convolved_and_normalized(x, w, s, t), state, [numbers(4, 2, 5, 5)]
    )
    assert counts(second) == {"aten.convolution.default": 1}
    assert counts(first)["aten.mul.Tensor"] == 1


@pytest.mark.check
def test_the_normalization_of_a_residual_network_is_gone_from_its_graph():
    model = resnet20(width=4).double().eval()
    objective = Objective(model, [(numbers(2, 3, 8, 8), torch.tensor([1, 2]))])
    names, state = zip(*objective.state().items(), strict=True)
    x = numbers(2, 3, 8, 8)

    def function(*tensors):
        return functional_call(objective.network, dict(zip(names, tensors, strict=False)), tensors[len(names) :])

    stages = capture(function, state, [x])
    operations = counts(stages[1])
    # 19 convolutions of 3×3 and two of 1×1; nine residual sums; nothing else touches the images but rectifiers.
    assert operations["aten.convolution.default"] == 21
    assert operations["aten.add.Tensor"] == 9
    assert operations["aten.mul.Tensor"] == 0
    with torch.no_grad():
        torch.testing.assert_close(run(stages, state, [x]), function(*state, x))


@pytest.mark.parametrize(
    ("name", "function", "shapes"),
    [
        # Somebody else reads the convolution's result.
        ("shared", lambda w, s, x: (lambda z: z * s.view(1, -1, 1, 1) + z.sin())(F.conv2d(x, w)), [(3, 2, 2, 2), (3,)]),
        # The scale depends on the data.
        ("gated", lambda w, x: (lambda z: z * z.mean((0, 2, 3), keepdim=True))(F.conv2d(x, w)), [(3, 2, 2, 2)]),
        # A scale for each pixel.
        ("pixels", lambda w, s, x: F.conv2d(x, w) * s, [(3, 2, 2, 2), (1, 1, 4, 4)]),
        ("transposed", lambda w, s, x: F.conv_transpose2d(x, w) * s.view(1, -1, 1, 1), [(2, 3, 2, 2), (3,)]),
        ("alpha", lambda w, s, x: torch.add(F.conv2d(x, w), s.view(1, -1, 1, 1), alpha=2), [(3, 2, 2, 2), (3,)]),
    ],
)
def test_what_does_not_fold_is_left_alone(name, function, shapes):
    _, second = captured_right(function, [numbers(*shape) for shape in shapes], [numbers(4, 2, 5, 5)])
    assert counts(second)["aten.mul.Tensor"] + counts(second)["aten.add.Tensor"] >= 1, name


def test_a_bias_is_scaled_with_the_weight():
    state = [numbers(4, 1, 3), numbers(4), numbers(4)]
    _, second = captured_right(
        lambda w, b, s, x: F.conv1d(x, w, b, groups=2) * s.view(1, -1, 1), state, [numbers(3, 2, 6, seed=1)]
    )
    assert counts(second) == {"aten.convolution.default": 1}
