"""Claim: recorded convolutions have torch's values, and first and second derivatives that differences confirm."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.parametrizations import weight_norm

from lmc_curvature import HessianOperator, Objective
from lmc_curvature.curvature.products import BatchGradient
from lmc_curvature.curvature.products.convolutions import DifferentiableConvolutions
from lmc_curvature.objective.batches import Batch

CONVOLUTIONS = {
    "1d": (F.conv1d, (2, 4, 7), (3, 4, 3), {}),
    "2d": (F.conv2d, (2, 2, 5, 4), (3, 2, 3, 2), {"padding": 1}),
    "3d": (F.conv3d, (2, 2, 3, 3, 4), (2, 2, 2, 2, 2), {}),
    "strided": (F.conv2d, (2, 2, 6, 5), (3, 2, 3, 3), {"stride": (2, 1), "padding": (1, 0)}),
    "stride that leaves pixels over": (F.conv2d, (2, 2, 6, 6), (3, 2, 3, 3), {"stride": 2}),
    "dilated": (F.conv2d, (1, 2, 6, 6), (2, 2, 2, 2), {"dilation": 2}),
    "grouped": (F.conv2d, (2, 4, 4, 4), (6, 2, 3, 3), {"groups": 2, "padding": [1]}),
    "depthwise": (F.conv2d, (2, 4, 4, 4), (4, 1, 3, 3), {"groups": 4}),
}


def _recorded(func, options):
    def convolve(*tensors):
        with DifferentiableConvolutions():
            return func(*tensors, **options)

    return convolve


def _operands(shape, weight_shape, bias):
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, weight_shape, *([weight_shape[:1]] if bias else [])]
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.check(after=1)
@pytest.mark.parametrize("bias", [True, False], ids=["with bias", "without bias"])
@pytest.mark.parametrize(("func", "shape", "weight_shape", "options"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_derivatives_equal_differences(func, shape, weight_shape, options, bias):
    operands = _operands(shape, weight_shape, bias)
    convolve = _recorded(func, options)
    output = convolve(*operands)
    assert "_Convolution" in type(output.grad_fn).__name__
    torch.testing.assert_close(output, func(*operands, **options), rtol=1e-12, atol=1e-12)
    assert gradcheck(convolve, operands)
    assert gradgradcheck(convolve, operands)


@pytest.mark.parametrize("fixed", [0, 1], ids=["input", "weight"])
def test_an_operand_without_gradient_is_left_alone(fixed):
    operands = _operands((2, 2, 5, 5), (3, 2, 3, 3), bias=False)
    operands[fixed] = operands[fixed].detach()
    convolve = _recorded(F.conv2d, {})
    assert gradgradcheck(convolve, operands)


def test_products_need_no_value_of_a_gradient_in_weights():
    generator = torch.Generator().manual_seed(0)
    # One kernel is an entry, one is computed from entries, and one is used twice.
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), weight_norm(nn.Conv2d(3, 3, 2)), nn.Tanh(), nn.Flatten())
    network.append(_Twice()).append(nn.Linear(3, 2)).double()
    batch = torch.randn(4, 2, 5, 5, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    objective = Objective(network, [batch])
    state, direction = objective.state(), {n: torch.randn_like(t) for n, t in objective.state().items()}
    for_products, whole = (
        BatchGradient(objective, state, Batch(0, 4, batch), list(state), with_slopes=with_slopes)
        for with_slopes in (False, True)
    )
    for name, product in whole.product(direction).items():
        torch.testing.assert_close(for_products.product(direction)[name], product, rtol=0, atol=0)
    near = [objective.gradient({n: t + h * direction[n] for n, t in state.items()}) for h in (1e-5, -1e-5)]
    for name, product in for_products.product(direction).items():
        torch.testing.assert_close(product, (near[0][name] - near[1][name]) / 2e-5, rtol=1e-6, atol=1e-7)
    assert whole.slope(direction).isfinite()
    with pytest.raises(ValueError, match="with_slopes=True"):
        for_products.slope(direction)


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = x.view(len(x), 3, 2, 2)
        return self.convolution(self.convolution(x).tanh()).tanh().mean((2, 3))


def test_derivatives_that_are_left_out_change_no_other():
    x, w, v = (torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mode = DifferentiableConvolutions()
    with mode:
        loss = F.conv2d(torch.tanh(F.conv2d(x, w, padding=2)), v).pow(3).sum()
    slopes = torch.autograd.grad(loss, [w, v], create_graph=True)
    both = torch.autograd.grad(slopes, [w, v], [torch.ones_like(w), torch.ones_like(v)], retain_graph=True)
    with mode.backward(without=[v]):
        (alone,) = torch.autograd.grad(slopes, [w], [torch.ones_like(w), torch.ones_like(v)], retain_graph=True)
    torch.testing.assert_close(alone, both[0], rtol=1e-12, atol=1e-12)
    again = torch.autograd.grad(slopes, [w, v], [torch.ones_like(w), torch.ones_like(v)])
    torch.testing.assert_close(again, both, rtol=1e-12, atol=1e-12)


def test_a_derivative_in_the_cotangent_alone_is_a_forward_pass_of_tangents():
    x, w, v = (torch.randn(2, 2, 4, 4, dtype=torch.float64) for _ in range(3))
    w.requires_grad_(), v.requires_grad_()

    def network(w, v):
        return F.conv2d(torch.tanh(F.conv2d(x, w, padding=2)), v)

    mode = DifferentiableConvolutions()
    with mode:
        output = network(w, v)
    cotangent = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, [w, v], cotangent, create_graph=True)
    tangents = [torch.randn_like(w), torch.randn_like(v)]
    with mode.backward(linear=True):
        (found,) = torch.autograd.grad(pulled, [cotangent], tangents)
    _, expected = torch.func.jvp(network, (w.detach(), v.detach()), tuple(tangents))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("func", "operands"),
    [
        (lambda x, w: F.conv2d(x, w, padding="same"), ((2, 2, 4, 4), (3, 2, 3, 3))),
        (lambda x, w: F.conv2d(x, w), ((2, 4, 4), (3, 2, 3, 3))),
        (lambda x, w: torch.func.vmap(F.conv2d, (0, None))(x, w), ((5, 1, 2, 4, 4), (3, 2, 3, 3))),
        (F.conv_transpose2d, ((2, 3, 4, 4), (3, 2, 3, 3))),
    ],
    ids=["padding by name", "a single image", "under vmap", "transposed"],
)
def test_what_is_not_recorded_is_torchs_own(func, operands):
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in operands]
    with DifferentiableConvolutions():
        found = func(*tensors)
    torch.testing.assert_close(found, func(*tensors), rtol=0, atol=0)
    assert "_Convolution" not in type(found.grad_fn).__name__


def test_half_precision_convolutions_keep_torchs_casts():
    x, w = torch.randn(2, 2, 4, 4), torch.randn(3, 2, 3, 3, requires_grad=True)
    with DifferentiableConvolutions(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.conv2d(x, w).dtype == torch.bfloat16


def test_a_network_that_uses_a_kernel_twice_and_computes_another():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 2, 3, 3))
            self.back = nn.Conv2d(3, 2, 3, padding=1, stride=(1, 1), padding_mode="circular")

        def forward(self, x):
            x = torch.tanh(F.conv2d(x, self.kernel, padding=1))
            x = torch.tanh(self.back(x))
            x = torch.tanh(F.conv2d(input=x, weight=self.kernel * self.kernel.abs().mean(), padding=1))
            return x.mean((2, 3))

    torch.manual_seed(0)
    x, y = torch.randn(4, 2, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    objective = Objective(Odd().double(), [(x, y)])
    H = HessianOperator(objective)
    state, h = objective.state(), 1e-5
    direction = {name: torch.cos(torch.arange(t.numel()).double()).view_as(t) for name, t in state.items()}
    up, down = (
        objective.gradient({name: state[name] + sign * h * direction[name] for name in state}) for sign in (1, -1)
    )
    for name, product in (H @ direction).items():
        torch.testing.assert_close(product, (up[name] - down[name]) / (2 * h), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "rectify", [F.relu, torch.relu, Tensor.relu, nn.ReLU()], ids=["F", "torch", "method", "module"]
)
def test_derivatives_of_rectifiers_equal_differences(rectify):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)

    def recorded(x):
        with DifferentiableConvolutions():
            return rectify(x) ** 3

    output = recorded(x)
    assert "_Rectifier" in {type(node).__name__.removesuffix("Backward") for node, _ in output.grad_fn.next_functions}
    torch.testing.assert_close(output, x.clamp(min=0) ** 3, rtol=1e-12, atol=1e-12)
    assert gradcheck(recorded, x)
    assert gradgradcheck(recorded, x)


def test_a_rectifier_is_flat_at_zero():
    x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    with DifferentiableConvolutions():
        output = F.relu(x)
    (slope,) = torch.autograd.grad(output.sum(), x)
    assert slope.tolist() == [0, 0, 1]


def test_a_rectifier_in_place_stays_in_place():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with DifferentiableConvolutions():
        moved = x * 1
        output = F.relu(moved, inplace=True)
    assert output is moved
    assert (output >= 0).all()
