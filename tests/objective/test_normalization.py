"""Claim: under each policy, normalisation is what torch does in evaluation, in training, or after `update_bn`."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

from lmc_curvature import BatchLoss, HessianOperator, Objective, project_hessian
from lmc_curvature.errors import LoaderError, UnsupportedModelError
from lmc_curvature.objective.normalization import Normalization, normalize_by, statistic_names, tracked_modules
from tests.support.cases import CASES
from tests.support.networks import NORMS, joined, normalized_net, plain_loss, randomized, state_of

norms = pytest.mark.parametrize("norm", NORMS)


def _model(norm, seed=0):
    return randomized(normalized_net(norm).double(), seed)


def _batches(sizes=(6, 6, 3)):
    return CASES["conv, batch"].batches(sizes)


def _torch_gradient(model, batches, *, training):
    """Mean loss over all examples and its gradient, batch by batch, in torch's own training or evaluation mode."""
    model = copy.deepcopy(model).train(training)
    loss = sum(len(x) * F.cross_entropy(model(x), y) for x, y in batches) / sum(len(x) for x, _ in batches)
    parameters = dict(model.named_parameters())
    return loss.item(), dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@norms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_derivatives_the_output_is_the_same(norm, dtype):
    model, (x, _) = _model(norm).to(dtype).eval(), _batches()[0]
    Normalization(model)
    with torch.no_grad():
        found = model(x.to(dtype))
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found, model(x.to(dtype)).detach(), rtol=8 * rounding, atol=8 * rounding)


@norms
def test_forward_mode_is_right_where_gradients_are_switched_off(norm):
    model, (x, _) = _model(norm).eval(), _batches()[0]
    Normalization(model)
    state = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    direction = randomized(copy.deepcopy(model), seed=1).state_dict()
    direction = {name: direction[name] for name in state}

    def loss(state):
        return torch.func.functional_call(model, state, (x,)).square().mean()

    expected = torch.func.jvp(loss, (state,), (direction,))
    with torch.no_grad():
        found = torch.func.jvp(loss, (state,), (direction,))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 2), (2, 3, 2, 2, 2)])
def test_the_affine_map_is_batch_norm_in_evaluation(shape, affine):
    generator = torch.Generator().manual_seed(0)
    x, mean, variance, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in (shape, 3, 3, 3, 3)
    )
    with torch.no_grad():
        variance.abs_().add_(0.1)
    scale, shift = (weight, bias) if affine else (None, None)
    expected = F.batch_norm(x, mean.detach(), variance.detach(), scale, shift, False, 0.1, 0.01)
    torch.testing.assert_close(normalize_by(x, mean, variance, scale, shift, 0.01), expected, rtol=1e-12, atol=1e-12)
    inputs = (x, mean, variance, weight, bias) if affine else (x, mean, variance)
    assert torch.autograd.gradcheck(lambda x, m, v, w=None, b=None: normalize_by(x, m, v, w, b, 0.01), inputs)


@pytest.mark.check(after=3)
@norms
@pytest.mark.parametrize("policy", ["interpolate", "batch", "recalibrate"])
def test_derivatives_in_the_parameters_are_torchs(norm, policy):
    model, batches = _model(norm), _batches()
    loss, expected = _torch_gradient(model, batches, training=policy != "interpolate")
    objective = Objective(model, batches, batch_norm=policy)
    gradient = objective.gradient()
    torch.testing.assert_close({name: gradient[name] for name in expected}, expected, rtol=1e-9, atol=1e-12)
    if policy != "recalibrate":
        assert objective.loss() == pytest.approx(loss, rel=1e-12)
        assert gradient.keys() == (state_of(model).keys() if policy == "interpolate" else expected.keys())


@norms
def test_derivatives_in_the_running_statistics_are_central_differences(norm):
    model, batches, h = _model(norm).eval(), _batches(), 1e-5
    gradient = Objective(model, batches).gradient()
    for entry in statistic_names("1"):
        statistic = model.get_buffer(entry)
        for channel in range(3):
            ends = []
            for step in (h, -2 * h):
                statistic[channel] += step
                ends.append(plain_loss(model, joined(batches)).item())
            statistic[channel] += h
            slope = (ends[0] - ends[1]) / (2 * h)
            assert abs(slope) > 1e-6, "the statistic does not matter: nothing to check"
            assert gradient[entry][channel].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def _statistics_by_torch(model, batches):
    """Each batch's statistics as torch's training mode finds them, averaged over examples."""
    total = {}
    for x, _ in batches:
        trained = copy.deepcopy(model).train()
        trained[1].momentum = 1.0
        trained(x)
        for entry in statistic_names("1"):
            total[entry] = total.get(entry, 0) + len(x) * trained.get_buffer(entry)
    return {entry: value / sum(len(x) for x, _ in batches) for entry, value in total.items()}


@norms
def test_recalibrated_statistics_are_means_over_examples(norm):
    model, batches = _model(norm), _batches()
    expected = _statistics_by_torch(model, batches)
    objective = Objective(model, batches, batch_norm="recalibrate")
    torch.testing.assert_close(objective.recalibrated([{}]), [expected], rtol=1e-10, atol=1e-12)
    calibrated = copy.deepcopy(model).eval()
    calibrated.load_state_dict(expected, strict=False)
    assert objective.loss() == pytest.approx(plain_loss(calibrated, joined(batches)).item(), rel=1e-10)


@norms
@pytest.mark.parametrize(
    "loss_fn",
    [
        BatchLoss(
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), size=lambda batch: 100 // len(batch[0])
        ),
        BatchLoss(
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), size=lambda batch: 0.5 / len(batch[0])
        ),
        nn.CrossEntropyLoss(weight=torch.tensor([9.0, 0.1, 0.0]).double()),
    ],
)
def test_recalibrated_statistics_do_not_ask_what_an_example_weighs(norm, loss_fn):
    model, batches = _model(norm), _batches()
    found = Objective(model, batches, loss_fn=loss_fn, batch_norm="recalibrate").recalibrated([{}])
    torch.testing.assert_close(found, [_statistics_by_torch(model, batches)], rtol=1e-10, atol=1e-12)


def _with_shared_norm():
    norm = nn.BatchNorm2d(2)
    return nn.Sequential(norm, nn.Conv2d(2, 2, 1), norm, nn.Flatten(), nn.Linear(50, 3))


@pytest.mark.parametrize("make", [CASES["conv, batch"].make_model, _with_shared_norm])
def test_recalibration_equals_update_bn_when_batches_have_one_size(make):
    model, batches = randomized(make().double()), _batches((5, 5, 5))
    objective = Objective(model, batches, batch_norm="recalibrate")
    calibrated = copy.deepcopy(model)
    update_bn(batches, calibrated)
    assert objective.loss() == pytest.approx(plain_loss(calibrated.eval(), joined(batches)).item(), rel=1e-10)
    assert objective.loss() != pytest.approx(plain_loss(model.eval(), joined(batches)).item(), rel=1e-3)


@norms
def test_statistics_are_recorded_only_when_asked_for(norm):
    model, (x, _) = _model(norm), _batches()[0]
    normalization, records = Normalization(model), {}
    for statistics, asked, calls in (
        ("running", {}, 0),
        ("batch", None, 0),
        ("batch", records, 1),
        ("batch", records, 2),
    ):
        with normalization.by(statistics, asked):
            model(x)
        model(x)
        # What is kept without need holds on to the graph of every batch.
        assert [len(found) for found in records.values()] == ([calls, calls] if calls else [])


@norms
def test_statistics_are_as_before_when_a_block_ends(norm):
    model, (x, _) = _model(norm), _batches()[0]
    normalization = Normalization(model, "batch")
    expected = model(x)
    with pytest.raises(KeyError), normalization.by("running"):
        assert not torch.equal(model(x), expected)
        raise KeyError
    assert torch.equal(model(x), expected)


def test_many_states_are_recalibrated_in_one_pass():
    class Loader(list):
        visits = 0

        def __iter__(self):
            self.visits += 1
            return super().__iter__()

    class OnDemand(list):
        """States made when asked for."""

        def __getitem__(self, number):
            return state_of(_model("batch", super().__getitem__(number)))

    loader = Loader(_batches())
    together = Objective(_model("batch", 9), loader, batch_norm="recalibrate").recalibrated(OnDemand([1, 2]))
    assert loader.visits == 1
    expected = [_statistics_by_torch(_model("batch", seed), _batches()) for seed in (1, 2)]
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-12)


def test_recalibration_refuses_an_iterator():
    objective = Objective(_model("batch"), iter(_batches()), batch_norm="recalibrate")
    with pytest.raises(LoaderError, match="'recalibrate' visits the loader twice, and an iterator.*pass a list"):
        objective.loss()
    assert len(list(objective.loader)) == 3, "nothing was taken from it"


def test_networks_without_statistics_recalibrate_to_themselves():
    case = CASES["LayerNorm and GELU"]
    model = case.model()
    objective = Objective(model, case.batches(), batch_norm="recalibrate")
    assert objective.recalibrated([{}]) == [{}]
    assert objective.loss() == pytest.approx(plain_loss(model, joined(case.batches())).item())


class _FixedNorm(nn.Module):
    """Calls the functional form with constants of its own, without being a normalisation module of torch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, -0.5, 1.0]))
        self.register_buffer("variance", torch.tensor([0.5, 2.0, 1.5]))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.variance)


@pytest.mark.parametrize("policy", ["interpolate", "batch", "recalibrate"])
@pytest.mark.parametrize(
    "norm", [lambda: nn.BatchNorm2d(3, track_running_stats=False), lambda: nn.InstanceNorm2d(3), _FixedNorm]
)
def test_norms_without_running_statistics_are_left_alone(norm, policy):
    model, batches = nn.Sequential(nn.Conv2d(2, 3, 3), norm(), nn.Flatten(), nn.Linear(27, 3)).double(), _batches()
    objective = Objective(model, batches, batch_norm=policy)
    assert objective.state().keys() == dict(model.named_parameters()).keys()
    assert objective.loss() == pytest.approx(_torch_gradient(model, batches, training=False)[0], rel=1e-12)


def test_a_network_that_is_itself_a_norm():
    model, x = randomized(nn.BatchNorm1d(4).double()), torch.randn(5, 4, dtype=torch.float64)
    y = torch.arange(5) % 4
    for policy, training in (("interpolate", False), ("batch", True)):
        loss, _ = _torch_gradient(model, [(x, y)], training=training)
        assert Objective(model, [(x, y)], batch_norm=policy).loss() == pytest.approx(loss, rel=1e-12)
    assert Objective(model, [(x, y)]).state().keys() == {"weight", "bias", "running_mean", "running_var"}


def test_tracked_modules_are_those_with_running_statistics():
    model = nn.Sequential(
        nn.BatchNorm1d(2),
        nn.Sequential(nn.BatchNorm3d(2, track_running_stats=False), nn.InstanceNorm1d(2, track_running_stats=True)),
        nn.LayerNorm(2),
        nn.GroupNorm(1, 2),
    )
    assert [name for name, _ in tracked_modules(model)] == ["0", "1.1"]
    assert statistic_names("1.1") == ("1.1.running_mean", "1.1.running_var")
    assert statistic_names("") == ("running_mean", "running_var")


@pytest.mark.parametrize("policy", ["batch", "recalibrate"])
def test_a_batch_too_small_for_its_statistics_names_the_module(policy):
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    batches = [(torch.ones(4, 2), torch.zeros(4, dtype=torch.long)), (torch.ones(1, 2), torch.zeros(1).long())]
    with pytest.raises(LoaderError, match=r"Module '1' has one value a channel \(input of shape \(1, 3\)\).*drop_last"):
        Objective(network, batches, batch_norm=policy).loss()


_CORNERS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


def _classifier_of_four():
    """A network that knows four classes by the signs of two inputs, and their mean and variance."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 4))
    model.load_state_dict(
        {
            "0.running_mean": torch.zeros(2),
            "0.running_var": torch.ones(2),
            "1.weight": 9 * _CORNERS,
            "1.bias": torch.zeros(4),
        },
        strict=False,
    )
    return model.eval()


def test_batch_statistics_of_one_class_are_warned_of():
    # Centred by themselves, examples of one class have logits of zero.
    batch = (_CORNERS[:1].repeat(20, 1), torch.zeros(20, dtype=torch.int64))
    with pytest.warns(UserWarning, match=f"By batch statistics the loss .* {math.log(4):.3g}, by .* running") as caught:
        objective = Objective(_classifier_of_four(), [batch, batch], batch_norm="batch")
        assert objective.loss() == pytest.approx(math.log(4))
        objective.loss()
    assert len(caught) == 1


@pytest.mark.parametrize("of", ["mixed classes", "running statistics", "an untracked module", "a worse state"])
def test_of_healthy_batch_statistics_nothing_is_said(of):
    labels = torch.arange(4).repeat(5) if of == "mixed classes" else torch.zeros(20, dtype=torch.int64)
    batch = (_CORNERS[labels], labels)
    model = _classifier_of_four()
    if of == "an untracked module":
        model[0] = nn.BatchNorm1d(2, track_running_stats=False)
    if of == "a worse state":
        model[0].running_mean.fill_(9.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Objective(model, [batch], batch_norm="interpolate" if of == "running statistics" else "batch").loss()


class _OwnArithmetic(nn.BatchNorm1d):
    def forward(self, x):
        return (x - self.running_mean) / torch.sqrt(self.running_var + self.eps) * self.weight + self.bias


@pytest.mark.parametrize("policy", ["batch", "recalibrate"])
def test_a_normalisation_that_cannot_be_told_its_statistics_is_refused(policy):
    network = nn.Sequential(nn.Linear(4, 8), _OwnArithmetic(8), nn.Tanh(), nn.Linear(8, 3))
    batches = [(torch.randn(9, 4), torch.arange(9) % 3)]
    with pytest.raises(UnsupportedModelError, match="batch statistics cannot be put into it"):
        Objective(network, batches, batch_norm=policy).loss()
    assert Objective(network, batches).loss() > 0


class _OfTheBatch(nn.BatchNorm2d):
    """Normalises by the batch in evaluation mode, too, as networks for few examples do."""

    def forward(self, input):
        affine = self.weight, self.bias
        return F.batch_norm(input, self.running_mean, self.running_var, *affine, training=True, momentum=0.0)


class _OfTheExample(nn.InstanceNorm2d):
    def forward(self, input):
        return F.instance_norm(input, self.running_mean, self.running_var, self.weight, self.bias, True, 0.0, self.eps)


@pytest.mark.parametrize("policy", ["interpolate", "batch"])
@pytest.mark.parametrize(
    "make", [lambda: _OfTheBatch(3), lambda: _OfTheExample(3, affine=True, track_running_stats=True)]
)
def test_a_module_that_asks_for_the_batch_in_evaluation_gets_it(make, policy):
    torch.manual_seed(0)
    norm = make()
    model = nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)).double().eval()
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.fill_(3.0)
    batches = _batches((6,))
    loss, expected = _torch_gradient(model, batches, training=False)
    objective = Objective(model, batches, batch_norm=policy)
    assert objective.loss() == pytest.approx(loss, rel=1e-10)
    gradient = objective.gradient()
    for name, tensor in expected.items():
        torch.testing.assert_close(gradient[name], tensor, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("policy", ["interpolate", "batch"])
def test_copies_of_an_operator_have_its_matrix(duplicate, policy):
    case = CASES["conv, interpolate"]
    operator = HessianOperator(Objective(case.model(), case.batches(), batch_norm=policy))
    copied = duplicate(operator)
    vector = torch.randn(operator.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = operator @ vector
    del operator
    assert torch.equal(copied @ vector, expected)


class _Folded(nn.Module):
    """Folds its normalisation into the layer before."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn, self.head = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        scale = self.bn.weight * torch.rsqrt(self.bn.running_var + self.bn.eps)
        return self.head(torch.tanh((self.linear(x) - self.bn.running_mean) * scale + self.bn.bias))


class _OwnNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x):
        return (x - self.running_mean) * torch.rsqrt(self.running_var + 1e-5)


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (_Folded(), "bn"),
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), _OwnNorm(4), nn.Linear(4, 3)), "3"),
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)), None),
    ],
)
@pytest.mark.parametrize("policy", ["interpolate", "batch", "recalibrate"])
def test_running_statistics_that_a_policy_does_not_reach_are_named(network, name, policy, recwarn):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 5, generator=generator), torch.arange(8) % 3) for _ in range(2)]
    objective = Objective(randomized(copy.deepcopy(network)), batches, batch_norm=policy)
    objective.loss()
    expected = (f"normalised by running statistics in spite of batch_norm={policy!r}: {name}",)
    warned = [str(each.message) for each in recwarn if "in spite of" in str(each.message)]
    if name is None or policy == "interpolate":
        assert (objective.notes, warned) == ((), [])
    else:
        assert objective.notes == expected
        assert len(warned) == 1


class _ByFunction(nn.Module):
    """Calls torch's function with the statistics of a module."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        norm = self.norm
        h = F.batch_norm(self.first(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, False)
        return self.last(torch.tanh(h))


@pytest.mark.filterwarnings("error")
def test_a_network_may_call_the_function_itself():
    model = randomized(_ByFunction().double())
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(7, 5, generator=generator, dtype=torch.float64), torch.arange(7) % 3)]
    objective, state = Objective(model, batches), dict(model.state_dict())
    along = {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in state.items()
        if tensor.is_floating_point()
    }
    found = project_hessian(objective, state, {"all": along})
    step = 1e-3
    before, at, after = (
        objective.loss({name: state[name] + times * step * along[name] for name in along}) for times in (-1, 0, 1)
    )
    assert found.slopes[0] == pytest.approx((after - before) / (2 * step), rel=1e-4)
    assert found.curvature[0, 0] == pytest.approx((after - 2 * at + before) / step**2, rel=1e-4)
