"""Claim: an objective is the plain mean loss over all examples, and computing it changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lmc_curvature import BatchLoss, Objective, project_hessian
from lmc_curvature.errors import (
    DirectionError,
    LoaderError,
    LossError,
    NonFiniteError,
    OptionError,
    UnsupportedModelError,
)
from lmc_curvature.objective.batches import Batch
from tests.support.networks import (
    NETWORKS,
    augmenting_loader,
    in_float32,
    joined,
    plain_loss,
    randomized,
    rng_states,
    state_of,
    untouched,
)

networks = pytest.mark.parametrize("case", NETWORKS.values(), ids=NETWORKS)
IMAGES = NETWORKS["conv, interpolate"]
VECTORS = NETWORKS["LayerNorm and GELU"]


def _examples(batches):
    data = joined(batches)
    if isinstance(data, dict):
        return [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]
    return list(zip(*data, strict=True))


LOADERS = {
    "list, last batch short": lambda batches: batches,
    "generator": lambda batches: (batch for batch in batches),
    "one batch": lambda batches: [joined(batches)],
    "shuffled": lambda batches: DataLoader(_examples(batches), batch_size=4, shuffle=True),
}


@pytest.mark.check(after=15)
@networks
@pytest.mark.parametrize("make_loader", LOADERS.values(), ids=LOADERS)
def test_the_loss_is_the_mean_over_all_examples(case, make_loader):
    model, batches = case.model(), case.batches()
    objective = Objective(model, make_loader(batches), **case.options)
    model.eval()
    expected = plain_loss(model, joined(batches), case.options.get("loss_fn")).item()
    assert objective.loss() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("make_loader", LOADERS.values(), ids=LOADERS)
def test_the_lossin_float32_is_that_of_any_loader(make_loader):
    model, batches = IMAGES.model(), IMAGES.batches()
    expected = plain_loss(copy.deepcopy(model).eval(), joined(batches)).item()
    assert Objective(model.float(), make_loader(in_float32(batches))).loss() == pytest.approx(expected, rel=1e-6)


@pytest.mark.check(after=3)
@networks
def test_the_gradient_is_autograds(case):
    model, batches = case.model(), case.batches()
    objective = Objective(model, batches, **case.options)
    parameters = dict(model.eval().named_parameters())
    loss = torch.func.functional_call(
        _Whole(model, case.options.get("loss_fn")),
        {f"model.{name}": tensor for name, tensor in parameters.items()},
        (joined(batches),),
    )
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    gradient = objective.gradient()
    torch.testing.assert_close({name: gradient[name] for name in expected}, expected, rtol=1e-8, atol=1e-11)


class _Whole(nn.Module):
    def __init__(self, model, loss_fn):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, data):
        if isinstance(self.loss_fn, BatchLoss):
            return self.loss_fn.fn(self.model, data)
        return (self.loss_fn or F.cross_entropy)(self.model(data[0]), data[1])


@pytest.mark.check(after=4)
@networks
def test_another_state_is_another_network(case):
    model, other, batches = case.model(), randomized(case.model(), 7), case.batches()
    objective = Objective(model, batches, **case.options)
    expected = plain_loss(other.eval(), joined(batches), case.options.get("loss_fn")).item()
    assert objective.loss(state_of(other)) == pytest.approx(expected, rel=1e-10)
    assert objective.loss() != pytest.approx(expected, rel=1e-3)
    for name, tensor in state_of(other).items():
        # Each entry matters by itself: none is cached in the module that holds it.
        model_with_it = copy.deepcopy(model).eval()
        dict([*model_with_it.named_parameters(), *model_with_it.named_buffers()])[name].data.copy_(tensor)
        expected = plain_loss(model_with_it, joined(batches), case.options.get("loss_fn")).item()
        assert objective.loss({name: tensor}) == pytest.approx(expected, rel=1e-10), name


@pytest.mark.check(after=4)
@networks
def test_the_state_is_a_snapshot_of_what_can_move(case):
    model = case.model()
    expected = state_of(model)
    objective = Objective(model, case.batches(), **case.options)
    before = objective.loss()
    randomized(model, 3)
    torch.testing.assert_close(objective.state(), expected, rtol=0, atol=0)
    assert objective.loss() == pytest.approx(before, rel=1e-12)


def test_the_mode_of_the_network_does_not_matter():
    model = NETWORKS["dropout"].model()
    losses = {Objective(model.train(mode), NETWORKS["dropout"].batches()).loss() for mode in (True, False)}
    assert len(losses) == 1


def test_the_loss_is_computed_in_the_type_asked_for():
    model, batches = IMAGES.model().float(), in_float32(IMAGES.batches())
    in_float64 = joined([(x.double(), y) for x, y in batches])
    exact = plain_loss(copy.deepcopy(model).double().eval(), in_float64).item()
    assert Objective(model, batches, dtype=torch.float64).loss() == pytest.approx(exact, rel=1e-13)
    assert Objective(model, batches).loss() != pytest.approx(exact, rel=1e-13)
    rough = Objective(model, batches, dtype=torch.bfloat16).loss()
    assert rough == pytest.approx(exact, rel=0.05)
    assert rough != pytest.approx(exact, rel=1e-6)


def test_entries_and_batches_have_the_objectives_type():
    x, y = torch.ones(2, 5, dtype=torch.float16), torch.tensor([0.5, 1.0])
    model = nn.Linear(5, 1)
    loader = [(x, {"value": y, "id": torch.arange(2)})]
    for dtype, expected in ((None, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16)):
        objective = Objective(
            model, loader, dtype=dtype, loss_fn=lambda output, target: F.mse_loss(output[:, 0], target["value"])
        )
        assert {tensor.dtype for tensor in objective.state().values()} == {expected}
        assert {tensor.dtype for tensor in objective.gradient().values()} == {expected}
        assert objective.place({"weight": torch.ones(1, 5)})["weight"].dtype == expected
        with objective.one_pass() as batches:
            data = next(batches).data
        assert (data[0].dtype, data[1]["value"].dtype, data[1]["id"].dtype) == (expected, expected, torch.int64)


def test_sums_over_batches_are_kept_in_float64():
    # 2²⁴ + 1 is no float32: a sum kept in float32 loses the small batches.
    model = nn.Linear(1, 1, bias=False)
    batches = [(torch.full((1, 1), value), torch.zeros(1)) for value in (2.0**24, *[1.0] * 16)]
    objective = Objective(model, batches, loss_fn=lambda output, _: output.mean())
    state = {"weight": torch.ones(1, 1)}
    assert objective.loss(state) == pytest.approx((2.0**24 + 16) / 17, rel=1e-12)
    assert objective.gradient(state)["weight"].item() == (2.0**24 + 16) / 17


@pytest.mark.parametrize("most", [1, 2])
def test_max_batches_takes_no_more_than_it_says(most):
    model, batches = VECTORS.model(), VECTORS.batches((4, 4, 4, 4))
    loader = iter(batches)
    expected = plain_loss(model, joined(batches[:most])).item()
    assert Objective(model, loader, max_batches=most).loss() == pytest.approx(expected, rel=1e-12)
    assert len(list(loader)) == 4 - most


def test_entries_that_are_not_used_have_zero_gradient():
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "unused": nn.Linear(5, 3)})
    loss_fn = BatchLoss(lambda model, batch: F.cross_entropy(model["used"](batch[0]), batch[1]))
    gradient = Objective(model, VECTORS.batches(), loss_fn=loss_fn).gradient()
    assert (gradient["unused.weight"] == torch.zeros(3, 5)).all()
    assert gradient["used.weight"].norm() > 0


def test_gradients_need_neither_requires_grad_nor_grad_mode():
    model, batches = VECTORS.model(), VECTORS.batches()
    expected = Objective(model, batches).gradient()
    with torch.no_grad():
        frozen = Objective(model.requires_grad_(False), batches).gradient()
    torch.testing.assert_close(frozen, expected, rtol=0, atol=0)


def test_a_batch_is_evaluated_with_its_output():
    model, batches = VECTORS.model(), VECTORS.batches()
    batch = Batch(0, 6, batches[0])
    loss, output, target = Objective(model, batches).batch_evaluation({}, batch)
    torch.testing.assert_close(output, model(batches[0][0]))
    assert target is batches[0][1]
    torch.testing.assert_close(loss, F.cross_entropy(output, target))
    whole = Objective(model, batches, loss_fn=BatchLoss(lambda model, batch: model(batch[0]).mean()))
    assert whole.batch_evaluation({}, batch)[1:] == (None, None)


def test_a_pass_shows_its_progress_only_when_asked(capsys):
    objective = Objective(VECTORS.model(), VECTORS.batches(), batch_norm="recalibrate")
    with objective.one_pass() as batches:
        assert [(batch.index, batch.size) for batch in batches] == [(0, 6), (1, 6), (2, 3)]
    objective.loss()
    assert capsys.readouterr().err == ""
    with objective.one_pass(progress=True, description="looking") as batches:
        assert len(list(batches)) == 3
    objective.recalibrated([{}], progress=True)
    objective.loss(progress=True)
    objective.gradient(progress=True)
    shown = capsys.readouterr().err
    assert "looking" in shown
    assert "recalibrating" in shown
    assert "loss" in shown
    assert "gradient" in shown
    assert "0/3" in shown


# What must not change


def _used_network():
    """A network in the middle of its life: in training mode but for one module, with gradients, partly frozen."""
    model = IMAGES.model()
    model.bn1.eval()
    model.conv2.requires_grad_(False)
    x, y = IMAGES.batches()[0]
    F.cross_entropy(model(x), y).backward()
    return model


class Flawed:
    """Two good batches of a loader that draws random numbers, and then a flaw; good again at its later visits."""

    def __init__(self, flaw):
        self.flaw = flaw

    def __iter__(self):
        for index, batch in enumerate(augmenting_loader(*joined(IMAGES.batches()))):
            if index == 2 and self.flaw is not None:
                flaw, self.flaw = self.flaw, None
                yield flaw()
            yield batch


def _raise():
    raise OSError("the disk is gone")


FLAWS = {
    "no flaw": (None, None, ""),
    "not a pair": (lambda: 3, LoaderError, "Batch 2 of the loader is an object of type int"),
    "empty batch": (lambda: (torch.ones(0, 2, 5, 5), torch.ones(0)), LoaderError, "Batch 2 .* holds 0 examples"),
    "not finite": (
        lambda: (torch.full((1, 2, 5, 5), torch.nan), torch.tensor([0])),
        NonFiniteError,
        r"loss is nan at batch 2 \(1 example\)(\.|, while statistics are re-estimated\.) Check the data of that batch",
    ),
    "wrong shape": (lambda: (torch.ones(2, 9, 5, 5), torch.tensor([0, 1])), LoaderError, "images have 9"),
    "loader fails": (_raise, OSError, "the disk is gone"),
}


@pytest.mark.check(after=1)
@pytest.mark.parametrize("policy", ["interpolate", "batch", "recalibrate"])
@pytest.mark.parametrize(("flaw", "error", "message"), FLAWS.values(), ids=FLAWS)
def test_nothing_changes_also_after_an_error(flaw, error, message, policy):
    model = _used_network()
    for compute in (Objective.loss, Objective.gradient):
        objective = Objective(model, Flawed(flaw), batch_norm=policy)
        with untouched(model):
            if error is None:
                compute(objective)
            else:
                # `caught` holds the exception, and with it all frames of the pass, until the end.
                with pytest.raises(error, match=message) as caught:
                    compute(objective)
                assert caught.value.__traceback__ is not None
            # The objective is as before, too.
            for again in (Objective.gradient, Objective.loss):
                fresh = Objective(model, Flawed(None), batch_norm=policy)
                torch.testing.assert_close(again(objective), again(fresh), rtol=1e-12, atol=1e-12)


def test_generators_are_restored_although_a_pass_is_left_halfway(untyped):
    objective = Objective(_used_network(), Flawed(None))
    before = rng_states()
    with objective.one_pass() as batches:
        next(batches)
        assert rng_states() != before
    assert rng_states() == before
    assert batches is not None


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_norm": "interpolat"}, OptionError, "batch_norm='interpolat'.*did you mean 'interpolate'"),
        ({"batch_norm": 3}, OptionError, "batch_norm=3.*choose from 'interpolate', 'batch', 'recalibrate'"),
        ({"max_batches": 0}, OptionError, r"max_batches=0: expected a whole number, at least 1"),
        ({"max_batches": 1.5}, OptionError, "max_batches=1.5: expected a whole number"),
        ({"allow_tf32": "yes"}, OptionError, "allow_tf32='yes': expected True or False"),
        ({"dtype": "float64"}, OptionError, "dtype='float64' is not a floating-point type: expected torch.float32"),
        ({"dtype": torch.int32}, OptionError, "dtype=torch.int32 is not a floating-point type"),
        ({"device": "gpu"}, OptionError, "device='gpu' is not a device: expected 'cpu', 'cuda'"),
        ({"loader": None}, LoaderError, "loader is an object of type NoneType; expected an iterable"),
        ({"loss_fn": "ce"}, LossError, "loss_fn='ce' is not a function.*an instance such as"),
    ],
)
def test_bad_options_are_refused_at_once(untyped, options, error, message):
    with pytest.raises(error, match=message):
        Objective(VECTORS.model(), **{"loader": [], **options})


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "yielded no batch; expected at least one"),
        (iter([]), "yielded no batch: it may have been used up by an earlier pass.*pass a list or a DataLoader"),
        ([torch.ones(3, 5)], r"Batch 0 of the loader is a tensor of shape \(3, 5\).*expected an \(x, y\) pair"),
        (["text"], "Batch 0 of the loader is an object of type str"),
    ],
)
@pytest.mark.parametrize("compute", [Objective.loss, Objective.gradient])
def test_bad_loaders_are_described(loader, message, compute):
    with pytest.raises(LoaderError, match=message):
        compute(Objective(VECTORS.model(), loader))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"0.wait": torch.ones(6, 5)}, "no entry '0.wait': did you mean '0.weight'"),
        ({"0.weight": torch.ones(5, 6)}, r"'0.weight' has shape \(5, 6\); expected \(6, 5\)"),
        ({"0.bias": torch.ones(6, dtype=torch.int64)}, "'0.bias' has type torch.int64; expected real floating-point"),
        ({"0.bias": torch.ones(6, dtype=torch.complex64)}, "'0.bias' has type torch.complex64; expected real"),
    ],
)
@pytest.mark.parametrize("compute", [Objective.loss, Objective.gradient, Objective.place])
def test_bad_states_are_named(state, message, compute):
    with pytest.raises(DirectionError, match=message):
        compute(Objective(VECTORS.model(), []), state)


def test_a_state_dict_is_a_state():
    case = IMAGES
    other = case.model(5)
    expected = Objective(other, case.batches()).loss()
    assert Objective(case.model(), case.batches()).loss(other.state_dict()) == pytest.approx(expected, rel=1e-12)
    tied = NETWORKS["tied weights"]
    objective = Objective(tied.model(), tied.batches(), **tied.options)
    moved = Objective(tied.model(5), tied.batches(), **tied.options)
    assert objective.loss(tied.model(5).state_dict()) == pytest.approx(moved.loss(), rel=1e-12)


def test_names_of_one_parameter_must_have_the_same_numbers():
    tied = NETWORKS["tied weights"]
    objective = Objective(tied.model(), tied.batches(), **tied.options)
    weight, nan = tied.model(5).encoder.weight.detach(), torch.full((6, 6), torch.nan)
    for other in (weight, weight.double(), weight.clone()):
        found = objective.place({"decoder.weight": other, "encoder.weight": weight})
        assert list(found) == ["encoder.weight"]
        assert torch.equal(found["encoder.weight"], weight.to(objective.dtype))
    assert list(objective.place({"decoder.weight": nan, "encoder.weight": nan.clone()})) == ["encoder.weight"]
    one_off = weight.clone()
    one_off[2, 3] += 1e-3
    for other in (one_off, weight.T, weight[:3], nan):
        for pair in ((weight, other), (other, weight)):
            state = dict(zip(("encoder.weight", "decoder.weight"), pair, strict=True))
            for compute in (objective.loss, objective.gradient, objective.place, objective.complete):
                with pytest.raises(DirectionError, match="'decoder.weight' and 'encoder.weight' are one parameter"):
                    compute(state)
            with pytest.raises(DirectionError, match="Direction 0: Entries 'decoder.weight' and"):
                project_hessian(objective, {}, [state])


def test_values_that_are_not_finite_name_their_entry():
    model = VECTORS.model()
    with torch.no_grad():
        model[0].bias[2] = torch.nan
    for compute in (Objective.loss, Objective.gradient):
        with pytest.raises(NonFiniteError, match=r"Entry '0.bias' of the (network|state) has 1 of 6 values"):
            compute(Objective(model, VECTORS.batches()))


@pytest.mark.parametrize("function", [lambda h: h.abs().sqrt(), lambda h: (h * h).sum(1, keepdim=True).sqrt() + h])
def test_a_gradient_that_is_not_finite_names_its_entry(function):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 3))
    torch.nn.init.zeros_(network[0].weight)
    network.register_forward_hook(lambda net, args, _: net[1](function(net[0](*args))))
    objective = Objective(network, [(torch.ones(6, 4), torch.arange(6) % 3)])
    assert objective.loss() > 0
    with pytest.raises(NonFiniteError, match=r"Entry '0.weight' of the gradient has 12 of 12 values.*a square root at"):
        objective.gradient()


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("this kernel has no backward pass.")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda h: torch.special.zeta(h.abs() + 2, h.abs() + 1), "the derivative for 'zeta' is not implemented"),
        (lambda h: torch.igamma(h.abs() + 1, h.abs() + 1), "the derivative for 'igamma: input' is not implemented"),
        (lambda h: h * torch.heaviside(h, torch.ones(())), "derivative for aten::heaviside is not implemented"),
        (_Refusing.apply, "this kernel has no backward pass"),
    ],
)
def test_an_operation_without_a_derivative_is_named(function, reason):
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    network.register_forward_hook(lambda net, args, _: net[1](function(net[0](*args))))
    objective = Objective(network, [(torch.ones(6, 4), torch.arange(6) % 3)])
    assert objective.loss() > 0
    with pytest.raises(UnsupportedModelError, match=f"The loss cannot be differentiated: .*{reason}.* Replace that"):
        objective.gradient()
