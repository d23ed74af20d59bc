"""Claim: a captured graph computes what the function computes, in two stages, from operations the rules know."""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lmc_curvature import Objective, project_hessian
from lmc_curvature.curvature.sweep.capture.graph import capture
from lmc_curvature.curvature.sweep.plan import Plan
from lmc_curvature.errors import CaptureError, FallbackWarning
from lmc_curvature.sources.networks import resnet20
from tests.support.sweeping import around, layer_directions

aten = torch.ops.aten


def _numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _run(stages, state, data):
    """What the two stages compute, one after the other."""
    first, second = (Plan(stage, []) for stage in stages)
    values = first.run(state)
    operands = [values[node] for node in first.stage.outputs]
    return second.run([*operands, *data])[second.stage.outputs[0]]


def _counts(stage):
    return collections.Counter(str(node.target) for node in stage.operations)


def _captured(model, *data):
    """Both stages of a network in evaluation mode, and its state."""
    names, state = zip(*{**dict(model.named_parameters()), **dict(model.named_buffers())}.items(), strict=True)

    def function(*tensors):
        entries = dict(zip(names, tensors, strict=False))
        return functional_call(model, entries, tensors[len(names) :])

    state = [tensor.detach() for tensor in state]
    return capture(function, state, data), state


def _check(function, state, data, seed=9):
    """Capture a function, check that the graph computes it at other values, and return the stages."""
    stages = capture(function, state, data)
    others = [
        [
            _numbers(*tensor.shape, seed=seed + place) if tensor.is_floating_point() else tensor
            for place, tensor in enumerate(some)
        ]
        for some in (state, data)
    ]
    with torch.no_grad():
        torch.testing.assert_close(_run(stages, *others), function(*others[0], *others[1]))
    return stages


def _convolved_and_normalized(x, weight, scale, shift):
    return F.conv2d(x, weight, padding=1) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def test_scales_and_shifts_fold_into_convolutions():
    state = [_numbers(3, 2, 3, 3), _numbers(3), _numbers(3)]
    first, second = _check(lambda w, s, t, x: _convolved_and_normalized(x, w, s, t), state, [_numbers(4, 2, 5, 5)])
    assert _counts(second) == {"aten.convolution.default": 1}
    assert _counts(first)["aten.mul.Tensor"] == 1


def test_the_normalization_of_a_residual_network_is_gone_from_its_graph():
    model = resnet20(width=4).double().eval()
    objective = Objective(model, [(_numbers(2, 3, 8, 8), torch.tensor([1, 2]))])
    names, state = zip(*objective.state().items(), strict=True)
    x = _numbers(2, 3, 8, 8)

    def function(*tensors):
        return functional_call(objective.network, dict(zip(names, tensors, strict=False)), tensors[len(names) :])

    stages = capture(function, state, [x])
    counts = _counts(stages[1])
    # 19 convolutions of 3×3 and two of 1×1; nine residual sums; nothing else touches the images but rectifiers.
    assert counts["aten.convolution.default"] == 21
    assert counts["aten.add.Tensor"] == 9
    assert counts["aten.mul.Tensor"] == 0
    with torch.no_grad():
        torch.testing.assert_close(_run(stages, state, [x]), function(*state, x))


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
    _, second = _check(function, [_numbers(*shape) for shape in shapes], [_numbers(4, 2, 5, 5)])
    assert _counts(second)["aten.mul.Tensor"] + _counts(second)["aten.add.Tensor"] >= 1, name


def test_a_bias_is_scaled_with_the_weight():
    state = [_numbers(4, 1, 3), _numbers(4), _numbers(4)]
    _, second = _check(
        lambda w, b, s, x: F.conv1d(x, w, b, groups=2) * s.view(1, -1, 1), state, [_numbers(3, 2, 6, seed=1)]
    )
    assert _counts(second) == {"aten.convolution.default": 1}


def test_what_the_state_alone_decides_is_a_stage_of_its_own():
    def function(v, g, x):
        return torch.tanh(x @ (v * (g / v.norm())).T)

    first, second = _check(function, [_numbers(3, 5), _numbers(1)], [_numbers(4, 5)])
    assert _counts(first)["aten.linalg_vector_norm.default"] == 1
    assert _counts(second) == {"aten.mm.default": 1, "aten.tanh.default": 1}
    # Only what the network reads is handed on.
    assert len(first.outputs) == 1
    assert first.inputs[0] not in first.outputs


def test_a_state_that_nothing_reads_is_still_an_input():
    first, second = _check(lambda unused, w, x: x @ w, [_numbers(2, 2), _numbers(5, 3)], [_numbers(4, 5)])
    assert len(first.inputs) == 2
    assert first.outputs == (first.inputs[1],)
    assert len(second.operations) == 1


def test_data_may_have_no_part_in_the_result():
    _check(lambda w, x: w.sin().sum(), [_numbers(3)], [_numbers(4, 5)])


def _in_place(w, x):
    z = x @ w
    z += 1
    z[:, 0] *= 2
    z[:, 1:].clamp_(min=0.1)
    view = z.view(-1)
    view[::2] = 0.5
    return F.relu_(z)


def _by_mask_in_place(w, x):
    mask = torch.zeros(3, 3, dtype=torch.float64).masked_fill_(torch.ones(3, 3).triu(1).bool(), -1.0)
    return F.pad((x @ w + mask.sum(0)).unsqueeze(1), (1, 1), mode="circular")


@pytest.mark.parametrize("function", [_in_place, _by_mask_in_place])
def test_changes_in_place_become_functions(function):
    stages = _check(function, [_numbers(5, 3)], [_numbers(4, 5)])
    for stage in stages:
        assert not any(node.target._schema.is_mutable for node in stage.operations if hasattr(node.target, "_schema"))


@pytest.mark.parametrize("module", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_come_apart(module):
    layer = module(3, 4, num_layers=2, bidirectional=True, batch_first=True).double()
    x = _numbers(2, 5, 3)

    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)[0]

    stages, state = _captured(Outputs(), x)
    with torch.no_grad():
        torch.testing.assert_close(_run(stages, state, [x]), layer(x)[0])
    assert not any("rnn" in str(node.target) or "lstm" in str(node.target) for node in stages[1].operations)
    assert torch.backends.mkldnn.enabled


def test_constants_are_kept():
    mask = torch.tensor([[True, False, True]])
    _check(lambda w, x: (x @ w).masked_fill(mask, 0.3) + torch.arange(3), [_numbers(5, 3)], [_numbers(4, 5)])


def test_what_torch_takes_for_a_constant_is_detached():
    def function(w, x):
        z = x @ w
        with torch.no_grad():
            top = (2 * z).amax(-1, keepdim=True)
        return z - top

    _, second = _check(function, [_numbers(5, 3)], [_numbers(4, 5)])
    detached = [node for node in second.operations if node.target is aten.detach.default]
    assert detached
    (difference,) = (node for node in second.operations if node.target is aten.sub.Tensor)
    assert difference.args[1] in detached


def test_assertions_about_values_have_no_part():
    class Tripled(nn.Module):
        def forward(self, x):
            x.shape[0]
            unused = x.sin()
            unused.add_(1)
            return 3 * x

    (_, second), _ = _captured(nn.Sequential(nn.Linear(2, 2).double(), Tripled()), _numbers(3, 2))
    assert _counts(second)["aten.sin.default"] == 0


def _branching(x):
    if x.sum() > 0:
        return x
    return 2 * x


def _reading(x):
    scale = x.abs().max().item()
    return x / scale


def _strided(x):
    return x.as_strided((3, 2), (6, 2))


def _selecting(x):
    return x[x > 0].mean() * x


def _counting(x):
    return x * torch.nonzero(x).shape[0]


def _complex(x):
    return torch.fft.rfft(x).abs()


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class _StraightToo(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g


def _straight(x):
    return _Straight.apply(x)


def _straight_too(x):
    return _StraightToo.apply(x)


_REFUSED = {
    "branch": (_branching, r"a number is read off a tensor.*test_graph.py:\d+, in _branching: if x.sum\(\) > 0:"),
    "item": (_reading, r"a number is read off a tensor.*in _reading: scale = x.abs\(\).max\(\).item\(\)"),
    "strides": (
        _strided,
        r"as_strided.*layout of its argument in memory \(at test_graph.py:\d+, in _strided: return x",
    ),
    "mask": (_selecting, r"index.*has a result whose shape depends on values \(at test_graph.py.*in _selecting: "),
    "nonzero": (_counting, r"nonzero.*has a result whose shape depends on values \(at test_graph.py.*in _counting: "),
    "complex": (
        _complex,
        r"_fft_r2c.* computes with complex numbers \(at test_graph.py.*in _complex: return torch.fft",
    ),
    "function": (_straight, r"an autograd.Function has derivatives of its own.*in _straight: return _Straight.apply"),
    "new function": (_straight_too, r"an autograd.Function has derivatives of its own.*in _straight_too: "),
}


@pytest.mark.parametrize(("function", "message"), _REFUSED.values(), ids=_REFUSED)
def test_what_cannot_be_captured_is_named_with_its_line(function, message):
    objective = around(function, (6,))
    directions = layer_directions(objective)
    with pytest.raises(CaptureError, match=message):
        project_hessian(objective, {}, directions, method="sweep")
    with pytest.warns(FallbackWarning, match=f"{message}.*Falling back on one Hessian-vector product a direction"):
        found = project_hessian(objective, {}, directions)
    expected = project_hessian(objective, {}, directions, method="hvp")
    torch.testing.assert_close(found.curvature, expected.curvature, rtol=0, atol=0)


def test_an_operation_without_a_second_derivative_is_named_with_its_line():
    def margins(output, target):
        return F.multi_margin_loss(output, target)

    objective = around(torch.tanh, (6,), loss_fn=margins)
    with pytest.raises(
        CaptureError, match=r"multi_margin_loss.*cannot be swept \(at test_graph.py.*in margins: return"
    ):
        project_hessian(objective, {}, layer_directions(objective), method="sweep")


def test_a_shape_that_depends_on_constants_alone_is_fine():
    kept = torch.tensor([True, False, True])

    def function(w, x):
        return (x @ w)[:, kept]

    _check(function, [_numbers(5, 3)], [_numbers(4, 5)])
