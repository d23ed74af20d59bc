"""Claim: derivatives that are not those of the function are found on the first batch, and no others."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from torch import nn
from torch.utils.checkpoint import checkpoint

from lmc_curvature import GGNOperator, HessianOperator, Objective, cross_layer_hessian, measure_barrier, predict_barrier
from lmc_curvature.errors import UnsupportedModelError
from lmc_curvature.sources import make_model
from tests.support.cases import CASES
from tests.support.networks import NETWORKS, Watched, untouched
from tests.support.random_networks import FAULTS, OutsideAutograd, RandomNetwork, WrongScale, random_networks


def _check(objective):
    with objective.one_pass(progress=False) as batches:
        for batch in batches:
            objective.check_derivatives(objective.complete({}), batch)


# --- No false alarm


@pytest.mark.check(after=12)
@pytest.mark.parametrize("case", {**CASES, **NETWORKS}.values(), ids={**CASES, **NETWORKS})
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_networks_of_all_kinds_are_compared_in_full(case, dtype):
    objective = Objective(case.model(), case.batches((6,)), dtype=dtype, **case.options)
    _check(objective)
    assert objective.notes == ()


@pytest.mark.check
@settings(max_examples=200, deadline=None, derandomize=True)
@given(random_networks)
def test_random_networks_raise_no_alarm(network):
    objective = network.objective()
    _check(objective)
    assert objective.notes == ()


@pytest.mark.check
@pytest.mark.parametrize("name", ["resnet20", "digits-resnet"])
def test_networks_with_many_kinks_raise_no_alarm(name):
    torch.manual_seed(0)
    side, channels = (8, 1) if name == "digits-resnet" else (16, 3)
    objective = Objective(make_model(name), [(torch.randn(12, channels, side, side), torch.arange(12) % 10)])
    _check(objective)


def test_what_is_computed_in_lower_precision_somewhere_raises_no_alarm():
    class Rounded(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def forward(self, x):
            return F.layer_norm(x.to(self.dtype), (16,)).to(x.dtype)

    torch.manual_seed(0)
    x, y = torch.randn(20, 16), torch.arange(20) % 3
    for dtype in (torch.float32, torch.bfloat16):
        network = nn.Sequential(nn.Linear(16, 16), Rounded(dtype), nn.Tanh(), nn.Linear(16, 3))
        _check(Objective(network, [(x, y)]))


def test_a_network_of_single_precision_alone_is_compared_in_it():
    def single(function):
        def loss(output, target):
            assert output.dtype == torch.float32
            return F.cross_entropy(function(output), target)

        return loss

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = (torch.randn(40, 4), torch.arange(40) % 3)
    _check(Objective(network, [batch], loss_fn=single(torch.tanh)))
    with pytest.raises(UnsupportedModelError, match="slope of the loss"):
        _check(Objective(network, [batch], loss_fn=single(lambda x: x.detach() / 2 + x / 2)))


def test_a_network_without_second_derivatives_is_compared_in_slopes():
    batch = (torch.randint(5, (9, 2)), torch.arange(9) % 3)
    for fault, alarm in ((lambda x: x, False), (WrongScale.apply, True)):
        network = nn.Sequential(nn.EmbeddingBag(5, 3), nn.Linear(3, 3))
        objective = Objective(network, [batch], loss_fn=lambda output, y, f=fault: F.cross_entropy(f(output), y))
        if alarm:
            with pytest.raises(UnsupportedModelError, match="slope of the loss.*WrongScale"):
                _check(objective)
        else:
            _check(objective)
            assert objective.notes == ("of the derivatives, only the first was compared with differences of the loss",)


# --- Catches


# A little off its state, all units behind the fault are off.
GOING_OFF = RandomNetwork(False, (0, 0), False, False, 0, False, "interpolate", 2, 18263)


@pytest.mark.check
@settings(max_examples=200, deadline=None, derandomize=True)
@given(random_networks, st.sampled_from(sorted(FAULTS)), st.integers(0, 3))
@example(GOING_OFF, "gradient hook", 0)
def test_wrong_backward_passes_in_random_networks_are_found(network, fault, place):
    function, right = FAULTS[fault]
    try:
        _check(network.objective(function, place))
    except UnsupportedModelError as error:
        assert "along a random direction is" in str(error)
        return
    # There is nothing to find where the fault changes nothing, as behind units that are all saturated.
    H, expected = (HessianOperator(network.objective(f, place, witness=False)) for f in (function, right))
    along = torch.ones(H.shape[1], dtype=torch.float64).cumsum(0).sin()
    assert float((H @ along - expected @ along).norm()) < 1e-3 * float((expected @ along).norm())


def _outside(fault=OutsideAutograd.apply):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.last(fault(self.first(x)))

    torch.manual_seed(0)
    return Net().double()


BATCH = (torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(9) % 3)


def test_every_second_derivative_asks_the_witness():
    network = _outside()
    asking = {
        "hessian": lambda objective: HessianOperator(objective) @ torch.ones(43),
        "dense": lambda objective: HessianOperator(objective).to_dense(),
        "ggn": lambda objective: GGNOperator(objective).to_dense(),
        "block": lambda objective: cross_layer_hessian(objective, None, "first", "last"),
    }
    for call in asking.values():
        with untouched(network), pytest.raises(UnsupportedModelError, match="curvature of the loss.*OutsideAutograd"):
            call(Objective(network, [BATCH]))
    for method in ("auto", "sweep", "hvp"):
        with pytest.raises(UnsupportedModelError, match=r"curvature.*NumPy.*detach.*witness=False"):
            predict_barrier(network, _outside(), [BATCH], method=method, progress=False)


def test_a_first_derivative_asks_for_the_first_alone():
    network, batch = _outside(), BATCH
    plain = nn.Sequential(network.first, nn.Identity(), network.last)
    plain[1].forward = lambda h: h**3 + h
    expected = torch.autograd.grad(F.cross_entropy(plain(batch[0]), batch[1]), network.first.weight)[0]
    torch.testing.assert_close(Objective(network, [batch]).gradient()["first.weight"], expected)
    with pytest.raises(UnsupportedModelError, match="slope of the loss.*WrongScale"):
        Objective(_outside(WrongScale.apply), [batch]).gradient()


def test_a_measurement_asks_nobody():
    network = Watched(_outside(WrongScale.apply))
    measure_barrier(network, Watched(_outside(WrongScale.apply)), [BATCH], progress=False)
    assert Objective(network, [BATCH]).loss() > 0


def test_who_detaches_on_purpose_says_so():
    network = _outside(lambda h: h.detach() * h)
    with pytest.raises(UnsupportedModelError, match="slope of the loss"):
        HessianOperator(Objective(network, [BATCH])).to_dense()
    objective = Objective(network, [BATCH], witness=False)
    assert HessianOperator(objective).to_dense().isfinite().all()
    assert objective.notes == ("derivatives were not compared with differences of the loss (witness=False)",)


def test_a_checkpointed_region_without_the_library_would_be_found():
    # The region reads a buffer, which is not the state's any more when the values are computed again.
    class Net(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.linear, self.reentrant = nn.Linear(4, 3), reentrant
            self.register_buffer("power", torch.tensor(3.0))

        def forward(self, x):
            h = self.linear(x)
            if self.reentrant is None:
                return h.sign() * h.abs() ** self.power
            return checkpoint(lambda h: h.sign() * h.abs() ** self.power, h, use_reentrant=self.reentrant)

    networks = [Net(kind).double() for kind in (None, False, True)]
    dense = []
    for network in networks:
        network.load_state_dict(networks[0].state_dict())
        dense.append(HessianOperator(Objective(network, [BATCH])).to_dense())
    torch.testing.assert_close(dense[1], dense[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dense[2], dense[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nothing", [lambda h: h.detach() + 0 * h, lambda h: h + 0 * h.detach() - h + h.detach()])
def test_a_derivative_of_nothing_is_something(nothing):
    with pytest.raises(UnsupportedModelError, match="slope of the loss along a random direction is 0 by autograd"):
        _check(Objective(nn.Sequential(nn.Linear(4, 3), _Function(nothing)).double(), [BATCH]))


class _Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _wrong_at_the_second():
    """Two networks; what is rounded is reached at the second alone."""

    def clamped(h):
        return h + (h.clamp(-3, 3) - h).detach()

    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 5), _Function(clamped), nn.Tanh(), nn.Linear(5, 3)).double() for _ in range(2)]
    with torch.no_grad():
        nets[1][0].weight.mul_(40)
        nets[1][3].weight.mul_(40)
    return nets


def test_every_state_has_a_witness():
    nets = _wrong_at_the_second()
    objective, other = Objective(nets[0], [BATCH]), nets[1].state_dict()
    HessianOperator(objective).to_dense()
    objective.gradient()
    with pytest.raises(UnsupportedModelError, match="by autograd"):
        objective.gradient(other)
    with pytest.raises(UnsupportedModelError, match="by autograd"):
        HessianOperator(objective, state=other).to_dense()


def test_a_layer_of_little_weight_has_a_witness():
    # Beside the others' curvature, that of the first layer is nothing.
    network = nn.Sequential(nn.Linear(4, 4), _Function(OutsideAutograd.apply), _Function(lambda h: 1e-6 * h))
    network = nn.Sequential(network, nn.Linear(4, 3)).double()
    with torch.no_grad():
        network[1].bias.add_(torch.arange(3))
    objective = Objective(network, [BATCH])
    with pytest.raises(UnsupportedModelError, match="by autograd"):
        HessianOperator(objective, layers="0.0", partition="module").to_dense()


def test_both_ends_of_a_prediction_have_a_witness():
    nets = _wrong_at_the_second()
    HessianOperator(Objective(nets[0], [BATCH])).to_dense()
    with pytest.raises(UnsupportedModelError, match="by autograd"):
        HessianOperator(Objective(nets[1], [BATCH])).to_dense()
    with pytest.raises(UnsupportedModelError, match="by autograd"):
        predict_barrier(*nets, [BATCH], progress=False)


class _Squash(torch.autograd.Function):
    """tanh, whose backward pass hides from autograd."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, slope):
        (y,) = ctx.saved_tensors
        with torch.no_grad():
            inner = 1 - y.square()
        return slope * inner


class _Seen(_Squash):
    """The same with a backward pass that autograd sees into."""

    @staticmethod
    def backward(ctx, slope):
        (y,) = ctx.saved_tensors
        return slope * (1 - y.square())


@pytest.mark.parametrize("dispatch", [lambda x: x.dtype == torch.float32, lambda x: len(x) >= 40], ids=["type", "size"])
@pytest.mark.parametrize("kernel", [_Squash, _Seen])
def test_a_kernel_that_a_few_examples_in_float64_do_not_call_is_compared_too(kernel, dispatch):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x):
            x = self.first(x)
            return self.last(kernel.apply(x) if dispatch(x) else x.tanh())

    generator = torch.Generator().manual_seed(0)
    loader = [(torch.randn(48, 6, generator=generator), torch.randint(3, (48,), generator=generator))]
    objective = Objective(Network(), loader)
    operator = HessianOperator(objective)
    vector = torch.ones(operator.shape[1])
    if kernel is _Squash:
        with pytest.raises(UnsupportedModelError, match="the backward pass of _Squash"):
            operator @ vector
    else:
        assert (operator @ vector).isfinite().all()
        assert objective.notes == ()


class _Saving(nn.Module):
    """Of large batches most examples have no part in the gradient, to save memory, or all have."""

    def __init__(self, saves):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.saves = nn.Linear(6, 12), nn.Linear(12, 3), saves

    def forward(self, x):
        if len(x) <= 32:
            return self.last(torch.tanh(self.first(x)))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.saves):
            rest = torch.tanh(self.first(x[32:]))
        return self.last(torch.cat([torch.tanh(self.first(x[:32])), rest]))


@pytest.mark.parametrize("saves", [True, False])
def test_examples_without_a_part_in_the_gradient_are_found(saves):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(96, 6, generator=generator), torch.arange(96) % 3)]
    objective = Objective(_Saving(saves), batches)
    if not saves:
        _check(objective)
        return
    with pytest.raises(UnsupportedModelError, match="by autograd, and"):
        _check(objective)


class _Cutting(nn.Module):
    """Of large batches some layers have no part in the gradient: others have the same operations, or fewer."""

    def __init__(self, cut):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last, self.cut = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), cut

    def forward(self, x):
        h = torch.tanh(self.first(x))
        large = len(x) > 32
        if self.cut == "a layer":
            h = h.detach() if large else h
        if self.cut == "a branch":
            h = h + (torch.tanh(h).detach() if large else torch.tanh(h))
        return self.last(torch.tanh(self.middle(h)))


@pytest.mark.parametrize("cut", ["a layer", "a branch"])
def test_layers_that_large_batches_leave_out_are_found(cut):
    generator = torch.Generator().manual_seed(0)
    objective = Objective(_Cutting(cut), [(torch.randn(48, 6, generator=generator), torch.arange(48) % 3)])
    with pytest.raises(UnsupportedModelError, match="by autograd, and"):
        _check(objective)


class _BlockWise(torch.autograd.Function):
    """A hyperbolic tangent whose backward pass forgets all rows but the first 32."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        found = gradient * (1 - y * y)
        return torch.cat([found[:32], torch.zeros_like(found[32:])])


@pytest.mark.parametrize("size", [32, 48])
def test_a_backward_pass_that_forgets_rows_of_large_batches_is_found(size):
    generator = torch.Generator().manual_seed(0)
    network = _outside(_BlockWise.apply)
    objective = Objective(network, [(torch.randn(size, 4, generator=generator).double(), torch.arange(size) % 3)])
    if size <= 32:
        _check(objective)
        return
    with pytest.raises(UnsupportedModelError, match="by autograd, and"):
        _check(objective)
