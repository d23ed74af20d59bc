"""Claim: cross-entropy and its like are known in every form, weigh by what torch divides by, and get classes alone."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, HessianOperator, Objective, measure_barrier, predict_barrier
from lmc_curvature.errors import LoaderError, LossError
from lmc_curvature.objective.classification import ClassLoss, torch_function

WEIGHTS = torch.tensor([0.5, 3.0, 1.0, 0.0], dtype=torch.float64)


def _output_and_target(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(shape[0], 4, *shape[1:], generator=generator, dtype=torch.float64)
    return output, torch.randint(4, shape, generator=generator)


@pytest.mark.parametrize("shape", [(9,), (9, 5), (9, 2, 3)])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("ignored", [-100, 2, 255])
@pytest.mark.parametrize("smoothing", [0, 0.3])
def test_the_weight_is_what_torch_divides_by(shape, weights, ignored, smoothing):
    output, target = _output_and_target(shape)
    target.flatten()[::4] = ignored
    options = {"weight": weights, "ignore_index": ignored}
    for loss, own in (
        (nn.CrossEntropyLoss(**options, label_smoothing=smoothing), {"label_smoothing": smoothing}),
        (functools.partial(F.cross_entropy, **options, label_smoothing=smoothing), {"label_smoothing": smoothing}),
        (nn.NLLLoss(**options), {}),
        (functools.partial(F.nll_loss, **options), {}),
    ):
        function, _ = torch_function(loss)
        total = function(output, target, **options, **own, reduction="sum")
        expected = (total / loss(output, target)).item()
        assert ClassLoss.of(loss).weight_of(target) == pytest.approx(expected, rel=1e-12)
        # No index is ignored of probabilities.
        if function is F.cross_entropy and ignored < 0:
            soft = output.softmax(1)
            total = function(output, soft, **options, **own, reduction="sum")
            expected = (total / loss(output, soft)).item()
            assert ClassLoss.of(loss).weight_of(soft) == pytest.approx(expected, rel=1e-12)


class _Focal(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return super().forward(input, target) ** 2


class _Calling(nn.CrossEntropyLoss):
    def __call__(self, input, target):
        return super().__call__(input, target.where(target != 2, -100))


def _hooked(register):
    loss = nn.CrossEntropyLoss()
    getattr(loss, register)(lambda *_: None)
    return loss


@pytest.mark.parametrize(
    "loss_fn",
    [
        _Calling(),
        _hooked("register_forward_pre_hook"),
        _hooked("register_forward_hook"),
        F.mse_loss,
        nn.BCEWithLogitsLoss(),
        _Focal(),
        lambda output, target: F.cross_entropy(output, target),
        functools.partial(F.cross_entropy, size_average=False),
        BatchLoss(lambda model, batch: model(batch)),
    ],
)
def test_other_losses_are_none_of_these(loss_fn):
    assert ClassLoss.of(loss_fn) is None


def test_a_scripted_loss_is_none_of_these():
    assert ClassLoss.of(torch.jit.script(nn.CrossEntropyLoss())) is None


def test_a_subclass_that_computes_the_same_is_one():
    assert ClassLoss.of(type("Named", (nn.CrossEntropyLoss,), {})(ignore_index=3)).ignore_index == 3


def test_labels_of_a_small_type_are_not_taken_for_the_ignored_one():
    target = torch.tensor([156, 0, 1], dtype=torch.uint8)
    assert ClassLoss.of(F.cross_entropy).weight_of(target) == 3


def test_bound_weights_come_to_the_type_that_is_computed_in():
    x, y = torch.randn(9, 5), torch.arange(9) % 4
    model, loss_fn = nn.Linear(5, 4), functools.partial(F.cross_entropy, weight=WEIGHTS.float())
    expected = F.cross_entropy(model.double()(x.double()), y, weight=WEIGHTS).item()
    assert Objective(model.float(), [(x, y)], loss_fn=loss_fn, dtype=torch.float64).loss() == pytest.approx(expected)


X = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
GOOD = torch.arange(9) % 4
COMPUTATIONS = {
    "loss": lambda model, loader, loss_fn: Objective(model, loader, loss_fn=loss_fn).loss(),
    "gradient": lambda model, loader, loss_fn: Objective(model, loader, loss_fn=loss_fn).gradient(),
    "product": lambda model, loader, loss_fn: HessianOperator(Objective(model, loader, loss_fn=loss_fn)).diagonal(),
    "predict": lambda model, loader, loss_fn: predict_barrier(model, model, loader, loss_fn=loss_fn, progress=False),
    "measure": lambda model, loader, loss_fn: measure_barrier(model, model, loader, loss_fn=loss_fn, progress=False),
}
computations = pytest.mark.parametrize("compute", COMPUTATIONS.values(), ids=COMPUTATIONS)


@pytest.mark.check(after=9)
@computations
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize(
    ("label", "loss_fn"), [(4, None), (-1, nn.CrossEntropyLoss()), (9, nn.NLLLoss(WEIGHTS.float()))]
)
def test_labels_that_are_no_classes_are_named(compute, batch, label, loss_fn):
    batches = [(X, GOOD.clone()) for _ in range(3)]
    batches[batch][1][5] = label
    with pytest.raises(
        LossError, match=f"Batch {batch} has the label {label}, .* none of the 4 classes of the .*0 to 3"
    ):
        compute(nn.Linear(5, 4), batches, loss_fn)


def test_fewer_weights_than_classes_are_said():
    with pytest.raises(LossError, match=r"label 3, which is none of the 3 classes of the loss's weights"):
        Objective(nn.Linear(5, 4), [(X, GOOD)], loss_fn=nn.CrossEntropyLoss(torch.ones(3))).loss()


def test_classes_along_another_axis_are_no_wrong_labels():
    x, y = X.view(3, 3, 5), GOOD.view(3, 3)
    with pytest.raises(LossError, match=r"loss_fn failed.*Expected target size.*outputs \(n, classes, …\)"):
        Objective(nn.Linear(5, 4), [(x, y)]).loss()


def test_later_labels_are_looked_at_before_they_come_to_the_device():
    batches = [(X, GOOD), (X, GOOD + 1)]
    objective = Objective(nn.Linear(5, 4), batches)
    with objective.one_pass() as visited:
        objective.batch_loss({}, next(visited))
        with pytest.raises(LossError, match="Batch 1 has the label 4"):
            next(visited)


def test_examples_may_be_the_classes():
    """Contrastive losses tell each example from the others of its batch."""

    class Similarities(nn.Linear):
        def forward(self, input):
            z = super().forward(input)
            return z @ z.T

    batches = [(X[:n], torch.arange(n)) for n in (4, 9)]
    model = Similarities(5, 2)
    expected = sum(len(y) * F.cross_entropy(model(x), y).item() for x, y in batches) / 13
    assert Objective(model, batches).loss() == pytest.approx(expected, rel=1e-6)


@computations
@pytest.mark.parametrize(
    ("model", "target"),
    [
        (nn.Linear(5, 1), torch.randn(9, 1)),
        (nn.Linear(5, 1), torch.zeros(9, dtype=torch.long)),
        (nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), torch.randn(9)),
        (nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (1, 2, 3))), torch.zeros(9, 2, 3, dtype=torch.long)),
    ],
)
def test_cross_entropy_of_one_column_is_refused(compute, model, target):
    with pytest.raises(LossError, match="one column is always 0.*F.mse_loss.*binary_cross_entropy_with_logits"):
        compute(model, [(X, target)], None)


def test_regression_by_cross_entropy_is_refused_or_warned_of():
    model, targets = nn.Linear(5, 3), torch.rand(9, 3)
    with pytest.raises(LossError, match="no class probabilities.*negative.*loss_fn=F.mse_loss"):
        Objective(model, [(X, targets - 0.5)]).loss()
    with pytest.warns(UserWarning, match="no class probabilities.*do not sum to 1.*F.mse_loss"):
        Objective(model, [(X, targets)]).loss()


def test_class_probabilities_are_welcome(recwarn):
    targets = torch.rand(9, 3).softmax(1)
    for dtype in (torch.float32, torch.bfloat16):
        Objective(nn.Linear(5, 3), [(X, targets.to(dtype))]).loss()
    assert not recwarn


def test_nothing_that_counts_in_all_the_data_is_said():
    ignored = torch.full((9,), -100)
    for compute in COMPUTATIONS.values():
        with pytest.raises(LoaderError, match="No target of the loader counts"):
            compute(nn.Linear(5, 4), [(X, ignored), (X, ignored)], None)


@pytest.mark.parametrize("loss_fn", [F.mse_loss, nn.L1Loss(), functools.partial(F.huber_loss, delta=0.5)])
def test_elements_are_compared_with_as_many(loss_fn):
    network, x = nn.Linear(3, 1), torch.randn(6, 3)
    with pytest.raises(LossError, match=r"shape \(6, 1\).*targets a tensor of shape \(6,\).*squeeze"):
        Objective(network, [(x, torch.randn(6))], loss_fn=loss_fn).loss()
    y = torch.randn(6, 1)
    assert Objective(network, [(x, y)], loss_fn=loss_fn).loss() == pytest.approx(loss_fn(network(x), y).item())


def test_smoothed_labels_of_classes_without_weight_are_refused():
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 2.0]), label_smoothing=0.1)
    with pytest.raises(LossError, match="weights of zero with label smoothing"):
        Objective(nn.Linear(3, 3), [(torch.randn(6, 3), torch.arange(6) % 3)], loss_fn=loss_fn)
