"""Claim: a loss is a real, finite mean over examples, and what is none is refused by name."""

import contextlib
import dataclasses
import functools
import warnings
from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, HessianOperator, Objective, measure_barrier, project_hessian
from lmc_curvature.errors import LoaderError, LossError, NonFiniteError
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.losses import check_reduction, finite_loss
from tests.support.cases import CASES, DictNet
from tests.support.networks import NETWORKS, in_float32, joined, plain_loss, randomized, untouched

VECTORS = NETWORKS["LayerNorm and GELU"]
X, Y = torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)
Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_loss_module_with_weights_weighs_batches_by_what_it_divides_by(dtype):
    batches, model = in_float32(VECTORS.batches()), VECTORS.model().float()
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]))
    expected = plain_loss(model, joined(batches), loss_fn).item()
    with untouched(model, loss_fn):
        assert Objective(model, batches, loss_fn=loss_fn, dtype=dtype).loss() == pytest.approx(expected, rel=1e-6)


def test_a_loss_module_is_evaluated_without_its_dropout():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, output, target):
            return F.cross_entropy(self.dropout(output), target)

    model, loss_fn = VECTORS.model(), Wrapped()
    expected = plain_loss(model, joined(VECTORS.batches())).item()
    with untouched(model, loss_fn):
        assert Objective(model, VECTORS.batches(), loss_fn=loss_fn).loss() == pytest.approx(expected, rel=1e-12)


def test_batch_losses_weigh_by_their_size():
    def token_loss(model, batch):
        return F.cross_entropy(model.head(model.embedding(batch["ids"])).flatten(0, 1), batch["labels"].flatten())

    batches = CASES["dict batches"].batches((4, 3))
    batches[0]["labels"][:, 1:] = -100
    model = randomized(DictNet())
    loss_fn = BatchLoss(token_loss, size=lambda batch: (batch["labels"] != -100).sum())
    expected = token_loss(model, joined(batches)).item()
    assert Objective(model, batches, loss_fn=loss_fn).loss() == pytest.approx(expected, rel=1e-6)
    # What is seen within the function need not be said.
    assert Objective(model, batches, loss_fn=BatchLoss(token_loss)).loss() == pytest.approx(expected, rel=1e-6)
    hidden = BatchLoss(lambda model, batch: token_loss(model, batch) + 0)
    assert Objective(model, batches, loss_fn=hidden).loss() != pytest.approx(expected, rel=1e-3)


@pytest.mark.check
@pytest.mark.parametrize("nothing", [0, 0.0, torch.tensor(0)])
def test_batches_of_size_zero_are_left_out(nothing):
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum") / (batch[1] >= 0).sum()

    batches, model = VECTORS.batches(), VECTORS.model()
    nobody = [(batches[0][0], torch.full_like(batches[0][1], -100))]
    loss_fn = BatchLoss(loss, size=lambda batch: (batch[1] >= 0).sum() or nothing)
    expected = plain_loss(model, joined(batches)).item()
    for loader in (nobody + batches, batches + nobody):
        objective = Objective(model, loader, loss_fn=loss_fn)
        assert objective.loss() == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(objective.gradient(), Objective(model, batches).gradient())
        other = randomized(VECTORS.model(), 1)
        found = measure_barrier(model, other, loader, loss_fn=loss_fn, metrics=("loss",), alphas=3, progress=False)
        assert found.ends()[0] == pytest.approx(expected, rel=1e-12)
    with pytest.raises(LoaderError, match="No target of the loader counts.*size of the BatchLoss is 0"):
        Objective(model, nobody, loss_fn=loss_fn).loss()


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, -1.0, 0.5])), "none negative"),
        (functools.partial(F.nll_loss, weight=torch.tensor([1.0, torch.inf, 0.5])), "must be finite"),
        (lambda o, y: F.cross_entropy(o, y, weight=torch.tensor([1.0, -1.0, 1.0]).double()), "none negative"),
        (
            lambda o, y: F.cross_entropy(o, y, weight=torch.tensor([1.0, 0, 1.0]).double(), label_smoothing=0.1),
            "weights of zero with label smoothing",
        ),
    ],
)
def test_what_cannot_be_divided_by_is_refused(loss_fn, message):
    with pytest.raises(LossError, match=message):
        Objective(VECTORS.model(), VECTORS.batches(), loss_fn=loss_fn).loss()


@pytest.mark.parametrize("parts", [{"fn": 3}, {"fn": F.mse_loss, "size": 4}])
def test_batch_losses_are_made_of_functions(untyped, parts):
    message = "size=4.*expected a function of the batch" if "size" in parts else "fn=3.*expected a function of model"
    with pytest.raises(LossError, match=message):
        Objective(VECTORS.model(), VECTORS.batches(), loss_fn=BatchLoss(**parts))


class _Focal(nn.CrossEntropyLoss):
    """Takes the mean itself, of what its own option leaves as it is."""

    def forward(self, input, target):
        loss = super().forward(input, target)
        return ((1 - (-loss).exp()) ** 2 * loss).mean()


def test_a_mean_of_what_a_loss_of_torch_does_not_reduce_is_a_function(recwarn):
    batches, model, loss_fn = VECTORS.batches(), VECTORS.model(), _Focal(reduction="none")
    expected = plain_loss(model, joined(batches), loss_fn).item()
    assert Objective(model, batches, loss_fn=loss_fn).loss() == pytest.approx(expected, rel=1e-12)
    assert not recwarn


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda output, target: output.sum(1), r"loss has shape \(6,\); expected a scalar.*reduction='mean'"),
        (lambda output, target: output.mean().item(), "loss is an object of type float; expected a scalar tensor"),
        (lambda output, target: (output.mean(), 1), "loss is a tuple of length 2; expected a scalar tensor"),
        (lambda output, target: output.argmax(), "loss has type torch.int64; expected a real floating-point scalar"),
        (lambda output, target: output.mean() + 0j, "loss has type torch.complex128; expected a real floating-point"),
        (BatchLoss(lambda model, batch: {"loss": 1}), "loss is a mapping with keys 'loss'; expected a scalar"),
    ],
)
def test_bad_losses_are_described(untyped, loss_fn, message):
    with pytest.raises(LossError, match=message):
        Objective(VECTORS.model(), VECTORS.batches(), loss_fn=loss_fn).loss()


def test_a_loss_that_is_not_finite_is_placed():
    assert finite_loss(torch.tensor(0.5), Batch(3, 7, None)) == 0.5
    with pytest.raises(NonFiniteError, match=r"The loss is inf at batch 3 \(7 examples\), at alpha=0.5\. Check"):
        finite_loss(torch.tensor(torch.inf), Batch(3, 7, None), ", at alpha=0.5")


@pytest.mark.parametrize("use", ["gradient", "project", "product"])
def test_a_loss_cut_off_from_the_network_is_refused(use):
    objective = Objective(VECTORS.model(), VECTORS.batches(), loss_fn=lambda out, y: F.cross_entropy(out.detach(), y))
    direction = {name: torch.ones_like(tensor) for name, tensor in objective.state().items()}
    with pytest.raises(LossError, match=r"does not depend on any entry.*\.detach\(\)"):
        {
            "gradient": objective.gradient,
            "project": lambda: project_hessian(objective, {}, [direction]),
            "product": lambda: HessianOperator(objective) @ direction,
        }[use]()


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), r"CrossEntropyLoss\(reduction='sum'\).*use reduction='mean'"),
        (nn.MSELoss(reduction="none"), r"MSELoss\(reduction='none'\).*use reduction='mean'"),
        (functools.partial(F.cross_entropy, reduction="sum"), "reduction='sum'.*use reduction"),
        (nn.CrossEntropyLoss, r"pass an instance such as torch.nn.CrossEntropyLoss\(\)"),
        (3, "loss_fn=3 is not a function of output and target"),
    ],
)
def test_what_is_no_mean_is_refused(loss_fn, message):
    with pytest.raises(LossError, match=message):
        check_reduction(loss_fn)


@pytest.mark.parametrize("loss_fn", [None, F.mse_loss, nn.MSELoss(), BatchLoss(lambda model, batch: None)])
def test_means_are_no_faults(loss_fn):
    check_reduction(loss_fn)


# Losses whose value depends on how the data are cut into batches

OUTPUTS = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
UNEVEN = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 1])
BINARY = (torch.arange(27).view(9, 3) % 2).float()
WEIGHTS = torch.tensor([0.2, 1.0, 5.0])


class _Identity(nn.Module):
    """The data themselves, scaled by a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


def _in_place(output, target):
    output.sub_(output.amax(1, keepdim=True))
    target.sub_(1)
    return F.cross_entropy(output, target + 1)


class _MaskedSquares(nn.Module):
    def forward(self, output, target):
        known = ~target.isnan()
        return F.mse_loss(output[known, 0], target[known])


MEANS = {
    "squares": (F.mse_loss, OUTPUTS.flip(1)),
    "squares, module": (nn.MSELoss(), OUTPUTS.flip(1)),
    "squares, one column": (lambda output, target: F.mse_loss(output[:, 0], target), OUTPUTS[:, 1]),
    "absolute values": (nn.SmoothL1Loss(), OUTPUTS.flip(1)),
    "cross-entropy": (lambda output, target: F.cross_entropy(output, target), UNEVEN),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), UNEVEN),
    "weighed rightly": (nn.CrossEntropyLoss(weight=WEIGHTS), UNEVEN),
    "ignored rightly": (nn.CrossEntropyLoss(ignore_index=2), UNEVEN),
    "binary": (F.binary_cross_entropy_with_logits, BINARY),
    "binary, weighed": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), BINARY),
    "probabilities": (lambda output, target: F.binary_cross_entropy(output.sigmoid(), target), BINARY),
    "distillation": (
        lambda output, target: F.kl_div(output.log_softmax(1), target, reduction="batchmean"),
        OUTPUTS.flip(1).softmax(1),
    ),
    "margin": (nn.MultiMarginLoss(), UNEVEN),
    "in place": (_in_place, UNEVEN),
    "in float32": (lambda output, target: F.cross_entropy(output.float(), target), UNEVEN),
    "in half precision": (lambda output, target: F.mse_loss(output.bfloat16(), target.bfloat16()), OUTPUTS.flip(1)),
    "of squares in half precision": (
        lambda output, target: F.mse_loss(output.bfloat16(), target.bfloat16()).float(),
        OUTPUTS.flip(1),
    ),
    "of classes in half precision": (lambda o, t: F.cross_entropy(3 * o.bfloat16(), t).to(o), UNEVEN),
    "partly in half precision": (lambda o, t: F.cross_entropy((2 * o).half().to(o), t).half().to(o), UNEVEN),
    "masked": (lambda output, target: F.cross_entropy(output - 1e9 * torch.tensor([0, 1, 0]), target), UNEVEN),
    "weights, within a function": (lambda output, target: F.cross_entropy(output, target, weight=WEIGHTS), UNEVEN),
    "ignored, within a function": (lambda output, target: F.cross_entropy(output, target, ignore_index=2), UNEVEN),
    "a constant added": (lambda output, target: F.cross_entropy(output, target) + 3, UNEVEN),
    "of no batch": (lambda output, target: output.square().mean(), UNEVEN),
    "not for halves": (lambda output, target: (output.square() * torch.arange(9.0)[:, None]).mean(), UNEVEN),
}
NO_MEANS = {
    "weights": (lambda output, target: 0.5 * F.cross_entropy(output, target, weight=WEIGHTS), UNEVEN),
    "ignored": (lambda output, target: F.cross_entropy(output, target, ignore_index=0) + 0, UNEVEN),
    "a sum": (lambda output, target: F.cross_entropy(output, target, reduction="sum"), UNEVEN),
    "a sum in half precision": (lambda o, t: F.cross_entropy(o.bfloat16(), t, reduction="sum").float(), UNEVEN),
    "weights in half precision": (lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS).half().float() + 0, UNEVEN),
    "a constant divisor": (lambda output, target: F.mse_loss(output, target, reduction="sum") / 27, OUTPUTS.flip(1)),
    "a root": (lambda output, target: F.mse_loss(output, target).sqrt(), OUTPUTS.flip(1) * torch.arange(9.0)[:, None]),
    "broadcast": (lambda output, target: (output[:, :1] - target).square().mean(), OUTPUTS[:, 1]),
    "overlap": (lambda output, target: 1 - 2 * (output.sigmoid() * target).sum() / (output + target).sum(), BINARY),
    "weights, masked outputs": (
        lambda output, target: F.cross_entropy(output, target.where(target != 1, 0), weight=WEIGHTS),
        UNEVEN,
    ),
    "contrast": (lambda output, _: F.cross_entropy(output @ output.T, torch.arange(len(output))), UNEVEN),
}


@pytest.mark.check(after=52)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [9, 8, 5, 2, 1])
@pytest.mark.parametrize(("loss_fn", "target"), MEANS.values(), ids=MEANS)
def test_means_are_not_warned_of(loss_fn, target, size, dtype, recwarn):
    objective = Objective(_Identity(), [(OUTPUTS[:size], target[:size].clone())], loss_fn=loss_fn, dtype=dtype)
    with contextlib.suppress(LossError):
        # One of them insists on nine examples.
        objective.loss()
    assert not [str(warning.message) for warning in recwarn if "cut into batches" in str(warning.message)]


@pytest.mark.parametrize("compute", [Objective.loss, Objective.gradient])
@pytest.mark.parametrize(("loss_fn", "target"), NO_MEANS.values(), ids=NO_MEANS)
def test_what_is_no_mean_is_warned_of_once(loss_fn, target, compute):
    outputs = OUTPUTS.clone()
    if loss_fn is NO_MEANS["weights, masked outputs"][0]:
        outputs[:, 1] = -1e9
    objective = Objective(_Identity(), [(outputs, target)] * 2, loss_fn=loss_fn, witness=False)
    with pytest.warns(UserWarning, match=r"cut into batches.*BatchLoss\(fn, size=\.\.\.\).*weight=") as caught:
        compute(objective)
        compute(objective)
    assert len(caught) == 1
    sums = [NO_MEANS[name][0] for name in ("a sum", "a sum in half precision", "a constant divisor")]
    assert ("a mean is expected: reduction='mean'" in str(caught[0].message)) == (loss_fn in sums)


BALANCED = torch.arange(9) % 3


@pytest.mark.parametrize("place", [1, 2, 5])
@pytest.mark.parametrize(
    ("loss_fn", "usual", "late"),
    [
        (lambda o, t: 1.0 * F.cross_entropy(o, t, ignore_index=-100), BALANCED, BALANCED.where(BALANCED != 2, -100)),
        (lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS) * 2, torch.zeros_like(BALANCED), UNEVEN),
        (lambda o, t: F.cross_entropy(o, t.where(t != 2, -100)), BALANCED.clamp(max=1), BALANCED),
        (_MaskedSquares(), OUTPUTS[:, 0], OUTPUTS[:, 0].where(BALANCED != 2, torch.nan)),
    ],
    ids=["ignored", "weights", "ignored by the function", "missing values"],
)
def test_later_batches_are_looked_at_too(loss_fn, usual, late, place):
    batches = [(OUTPUTS, usual)] * 6
    batches[place] = (OUTPUTS, late)
    with pytest.warns(UserWarning, match=f"The loss of batch {place} is .*cut into batches.*BatchLoss") as caught:
        objective = Objective(_Identity(), batches, loss_fn=loss_fn)
        objective.loss()
        objective.loss()
    assert len(caught) == 1


@pytest.mark.check(after=8)
@pytest.mark.parametrize(("loss_fn", "target"), MEANS.values(), ids=MEANS)
def test_means_are_not_warned_of_on_later_batches(loss_fn, target, recwarn):
    batches = [
        (OUTPUTS.roll(shift, 0)[:size], target.roll(shift, 0)[:size]) for shift, size in enumerate((9, 9, 4, 1, 9))
    ]
    with contextlib.suppress(LossError):
        # One of them insists on nine examples.
        Objective(_Identity(), batches, loss_fn=loss_fn).loss()
    assert not [str(warning.message) for warning in recwarn if "cut into batches" in str(warning.message)]


class _Lines(nn.Module):
    """Two numbers of every token."""

    def __init__(self):
        super().__init__()
        self.linear = randomized(nn.Linear(1, 3))

    def forward(self, x):
        return self.linear(x.unsqueeze(-1))


def _tokens(lengths):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, length, generator=generator), torch.randint(3, (4, length), generator=generator))
        for length in lengths
    ]


VARYING = {
    "squares": lambda o, t: F.mse_loss(o[..., 0], t.float()),
    "squares, module": lambda o, t: nn.MSELoss()(o[..., 0], t.float()),
    "next token": lambda o, t: F.cross_entropy(o[:, :-1].flatten(0, 1), t[:, 1:].flatten()),
}


@pytest.mark.parametrize("loss_fn", VARYING.values(), ids=VARYING)
def test_targets_of_varying_length_are_warned_of(loss_fn, recwarn):
    Objective(_Lines(), _tokens((5, 5, 5)), loss_fn=loss_fn).loss()
    assert not recwarn
    with pytest.warns(UserWarning, match=r"batch 2 has \[9\] targets, and of the first batch \[5\].*size=") as caught:
        Objective(_Lines(), _tokens((5, 5, 9, 3)), loss_fn=loss_fn).loss()
    assert len(caught) == 1


def test_tokens_of_varying_length_are_weighed_within_functions(recwarn):
    batches, model = _tokens((5, 9, 2)), _Lines()
    batches[1][1][:, 3:] = -100
    x, y = (torch.cat([part.flatten() for part in parts]) for parts in zip(*batches, strict=True))
    expected = F.cross_entropy(model(x), y).item()
    for loss_fn in (
        lambda o, t: F.cross_entropy(o.transpose(1, 2), t),
        lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()),
        lambda o, t: F.cross_entropy(o.reshape(-1, 3), t.view(-1).long()),
        lambda o, t: F.nll_loss(o.log_softmax(-1).flatten(0, 1), t.reshape(-1)),
        lambda o, t: nn.CrossEntropyLoss()(o.flatten(0, 1), t.flatten()),
        BatchLoss(lambda net, batch: F.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())),
    ):
        assert Objective(model, batches, loss_fn=loss_fn).loss() == pytest.approx(expected, rel=1e-6)
    assert not recwarn


def _shifted(net, batch):
    """As language models take it from within."""
    logits, labels = net(batch["x"]), F.pad(batch["y"], (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def _named(batches):
    return [{"x": x, "y": y} for x, y in batches]


@pytest.mark.parametrize("size", [None, lambda batch: len(batch["x"]), lambda batch: batch["y"].numel()])
@pytest.mark.parametrize("lengths", [(5, 9), (5, 5, 5, 5, 7)])
def test_batch_losses_that_divide_by_more_or_less_are_warned_of(size, lengths):
    loader = _named(_tokens(lengths))
    with pytest.warns(UserWarning, match=rf"batch {len(lengths) - 1} divides by .*cut into batches.*size=") as caught:
        objective = Objective(_Lines(), loader, loss_fn=BatchLoss(_shifted, size=size))
        objective.loss()
        objective.loss()
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ((5, 9, 2, 4, 4), lambda batch: batch["y"][:, 1:].numel()),
        ((5, 9, 2, 4, 4), lambda batch: 0.5 * batch["y"][:, 1:].numel()),
        ((5, 5, 5), None),
        ((5, 5, 5), lambda batch: len(batch["x"])),
    ],
)
def test_batch_losses_that_divide_by_their_size_are_not_warned_of(lengths, size, recwarn):
    loader, model = _named(_tokens(lengths)), _Lines()
    found = Objective(model, loader, loss_fn=BatchLoss(_shifted, size=size)).loss()
    logits = torch.cat([model(batch["x"])[:, :-1].flatten(0, 1) for batch in loader])
    labels = torch.cat([batch["y"][:, 1:].flatten() for batch in loader])
    assert found == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert not recwarn


def test_a_target_that_is_written_into_is_not_what_the_loader_yields():
    def loss_fn(output, target):
        target = target.view(-1)
        target[target == 2] = -100
        return F.cross_entropy(output, target)

    with pytest.warns(UserWarning, match="cut into batches"):
        Objective(_Identity(), [(OUTPUTS, UNEVEN.clone())], loss_fn=loss_fn).loss()


def test_labels_beyond_the_classes_are_named_within_functions():
    batches = [(OUTPUTS, UNEVEN), (OUTPUTS, UNEVEN + 1)]
    with pytest.raises(LossError, match="Batch 1 has the label 3, which is none of the 3 classes"):
        Objective(_Identity(), batches, loss_fn=lambda o, t: F.cross_entropy(o, t)).loss()


def test_batches_of_which_a_function_counts_nothing_are_left_out(recwarn):
    batches = [(OUTPUTS, torch.full((9,), 7)), (OUTPUTS, UNEVEN), (OUTPUTS, torch.full((9,), 7))]
    found = Objective(_Identity(), batches, loss_fn=lambda o, t: F.cross_entropy(o, t, ignore_index=7)).loss()
    assert found == pytest.approx(F.cross_entropy(OUTPUTS, UNEVEN).item(), rel=1e-6)
    assert not recwarn


def test_means_over_many_examples_are_not_warned_of(recwarn):
    """Rounding of long sums, of large outputs and of saturated classes is no cut."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(3, (4097,), generator=generator)
    for scale in (1e-4, 1.0, 1e3):
        x = scale * torch.randn(4097, 3, generator=generator)
        for data in ((x, target), (x + 50 * scale * F.one_hot(target, 3), target)):
            Objective(_Identity(), [data], loss_fn=lambda output, y: F.cross_entropy(output, y)).loss()
        Objective(_Identity(), [(x, x + 1)], loss_fn=nn.MSELoss()).loss()
        Objective(_Identity(), [(x, x)], loss_fn=lambda output, y: (output - output.roll(1, 1)).mean()).loss()
    assert not recwarn


@pytest.mark.parametrize("size", [-1, -0.5, float("nan"), float("inf"), torch.tensor(-2.0)])
def test_sizes_that_are_negative_or_not_finite_are_refused(size):
    loss_fn = BatchLoss(lambda model, batch: model(batch[0]).mean(), size=lambda batch: size)
    with pytest.raises(LoaderError, match="Batch 0 .*expected a number of examples, or the sum of their weights"):
        Objective(VECTORS.model(), VECTORS.batches(), loss_fn=loss_fn).loss()


def test_sizes_that_are_no_numbers_are_described():
    loss_fn = BatchLoss(lambda model, batch: model(batch[0]).mean(), size=lambda batch: batch[1])
    with pytest.raises(LoaderError, match=r"size of batch 0 .* a tensor of shape \(6,\).*expected a number, 0 or more"):
        Objective(VECTORS.model(), VECTORS.batches(), loss_fn=loss_fn).loss()


GRAPHS = [(5, 6, 4), (9, 12, 15), (3, 3, 3, 4)]


def _graphs(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    place = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x, y = torch.randn(sum(sizes), 3, generator=generator), torch.randn(len(sizes), 1, generator=generator)
    return {"x": x, "place": place, "y": y}


def _per_graph(model, batch):
    found = torch.zeros(len(batch["y"]), 1).to(batch["y"]).index_add(0, batch["place"], model(batch["x"]))
    return F.l1_loss(found, batch["y"])


def test_batches_whose_first_axes_differ_need_a_size(recwarn):
    batches, model = [_graphs(sizes, seed) for seed, sizes in enumerate(GRAPHS)], nn.Linear(3, 1)
    with pytest.raises(LoaderError, match=r"Batch 0 .*\(15, 3\), \(15,\), \(3, 1\).*BatchLoss\(fn, size="):
        Objective(model, batches, loss_fn=BatchLoss(_per_graph)).loss()
    joined_graphs = {name: torch.cat([batch[name] for batch in batches]) for name in ("x", "y")}
    shifts = [0, 3, 6]
    joined_graphs["place"] = torch.cat([batch["place"] + by for batch, by in zip(batches, shifts, strict=True)])
    found = Objective(model, batches, loss_fn=BatchLoss(_per_graph, size=lambda batch: len(batch["y"]))).loss()
    assert found == pytest.approx(_per_graph(model, joined_graphs).item(), rel=1e-6)
    assert not recwarn


def test_first_axes_may_differ_where_the_loss_says_what_counts(recwarn):
    """Of nodes, whose edges come first: cross-entropy is seen to be a mean over them."""
    nodes = [(torch.zeros(2, 12, dtype=torch.int64), torch.randn(n, 3), torch.arange(n) % 3) for n in (7, 4)]
    model = nn.Linear(3, 3)
    loss_fn = BatchLoss(lambda net, batch: F.cross_entropy(net(batch[1]), batch[2]))
    x, y = (torch.cat([batch[place] for batch in nodes]) for place in (1, 2))
    found = Objective(model, nodes, loss_fn=loss_fn).loss()
    assert found == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)
    assert not recwarn


def _halving(output, target):
    if (target > 1).any():
        target /= 2
    return F.mse_loss(output, target)


def _masking(model, batch):
    batch["y"][batch["y"] == 0] = -100
    return F.cross_entropy(model(batch["x"]), batch["y"])


def test_losses_may_write_into_their_targets():
    model, generator = nn.Linear(3, 2), torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, generator=generator), 40 * torch.rand(4, 2, generator=generator)) for _ in range(2)]
    kept = [target.clone() for _, target in batches]
    expected = sum(_halving(model(x), y.clone()).item() for x, y in batches) / 2
    objective = Objective(model, batches, loss_fn=_halving)
    assert [objective.loss() for _ in range(3)] == pytest.approx([expected] * 3, rel=1e-6)
    with objective.one_pass() as visited:
        batch = next(visited)
        output = objective.output(objective.state(), batch)
        values = [objective.output_loss(output, batch).item() for _ in range(2)]
    assert values == pytest.approx([_halving(model(batches[0][0]), kept[0].clone()).item()] * 2, rel=1e-6)
    assert all(torch.equal(target, before) for (_, target), before in zip(batches, kept, strict=True))


def test_a_batch_that_is_written_into_is_not_what_the_loader_yields():
    batches = [{"x": OUTPUTS, "y": UNEVEN.clone()}, {"x": OUTPUTS, "y": torch.ones_like(UNEVEN)}]
    with pytest.warns(UserWarning, match="cut into batches"):
        Objective(_Identity(), batches, loss_fn=BatchLoss(_masking)).loss()


@dataclasses.dataclass(frozen=True)
class _Said:
    scores: torch.Tensor


FORMS = {
    "output of transformers": (
        lambda z: pytest.importorskip("transformers").modeling_outputs.ImageClassifierOutput(logits=z),
        lambda o: o.logits,
    ),
    "dataclass": (_Said, lambda o: o.scores),
    "namespace": (lambda z: SimpleNamespace(scores=z, name="text"), lambda o: o.scores),
    "mapping": (lambda z: UserDict(scores=z), lambda o: o["scores"]),
    "sums come first": (lambda z: (z.sum(0), z), lambda o: o[1]),
    "a number beside it": (lambda z: (z, z.square().mean()), lambda o: o[0]),
    "transposed": (lambda z: z.T, lambda o: o.T),
    "of a class of its own": (lambda z: type("Own", (), {"scores": z})(), lambda o: o.scores),
}


class _Giving(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.linear, self.form = nn.Linear(3, 3), form

    def forward(self, x):
        return self.form(self.linear(x))


forms = pytest.mark.parametrize(("form", "read"), FORMS.values(), ids=FORMS)
CUT = [(OUTPUTS[a:b], UNEVEN[a:b]) for a, b in ((0, 4), (4, 7), (7, 9))]


@forms
@pytest.mark.parametrize("loss_fn", [NO_MEANS["weights"][0], NO_MEANS["a sum"][0], NO_MEANS["contrast"][0]])
def test_outputs_of_any_form_are_compared_with_their_halves(form, read, loss_fn):
    model = randomized(_Giving(form))
    with pytest.warns(UserWarning, match="cut into batches") as caught:
        found = Objective(model, CUT, loss_fn=lambda o, t: loss_fn(read(o), t)).loss()
    assert len(caught) == 1
    assert found != pytest.approx(loss_fn(model.linear(OUTPUTS), UNEVEN.clone()).item(), rel=1e-3)


@pytest.mark.check(after=9)
@forms
@pytest.mark.parametrize("name", ["in place", "masked", "margin", "ignored, within a function", "of no batch"])
def test_means_of_outputs_of_any_form_are_not_warned_of(form, read, name, recwarn):
    loss_fn, model = MEANS[name][0], randomized(_Giving(form))
    found = Objective(model, CUT, loss_fn=lambda o, t: loss_fn(read(o), t)).loss()
    assert found == pytest.approx(loss_fn(model.linear(OUTPUTS), UNEVEN.clone()).item(), rel=1e-5)
    assert not recwarn


def test_a_number_of_the_whole_batch_in_an_output_is_seen_to_be_none_of_examples():
    model = randomized(_Giving(lambda z: (z, z.mean(0).square().sum())))
    with pytest.warns(UserWarning, match="The loss of batch 0 is .*cut into batches"):
        Objective(model, CUT, loss_fn=lambda o, t: F.mse_loss(o[0], F.one_hot(t, 3).float()) + o[1]).loss()


@pytest.mark.parametrize("size", [len, lambda batch: 16])
def test_a_size_that_half_of_a_batch_has_as_well_is_warned_of(size):
    def mean_of_squares(network, batch):
        return network(batch["x"]).square().mean()

    torch.manual_seed(0)
    batches = [{"x": torch.randn(count, 4), "y": torch.zeros(count)} for count in (16, 16, 5)]
    network = randomized(nn.Linear(4, 3))
    with pytest.warns(UserWarning, match="The loss of batch 0 is the mean over its 16 rows, and its size"):
        Objective(network, batches, loss_fn=BatchLoss(mean_of_squares, size=size)).loss()
    # Two nodes are a graph, whatever part of them there is.
    sums = BatchLoss(lambda network, batch: network(batch["x"]).square().sum() / 2, size=size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Objective(network, batches, loss_fn=sums).loss()


@pytest.mark.parametrize("action", ["always", "error"])
def test_what_cannot_be_compared_with_its_halves_is_said_once(action):
    def loss_fn(output, target):
        return (output * torch.arange(9.0)[:, None]).square().mean()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        objective = Objective(_Identity(), [(OUTPUTS, UNEVEN)] * 3, loss_fn=loss_fn)
        if action == "error":
            with pytest.raises(UserWarning, match="could not be compared with its halves"):
                objective.loss()
        else:
            assert [objective.loss(), objective.loss()] == [loss_fn(OUTPUTS, UNEVEN).item()] * 2
            (warning,) = caught
            assert "loss of batch 0 could not be compared with its halves: RuntimeError" in str(warning.message)


def _masked_squares(output, target, mask):
    return ((output - target).square() * mask).sum() / mask.sum()


@pytest.mark.parametrize("of_batch", [True, False])
@pytest.mark.parametrize("place", [1, 2])
def test_batches_with_other_masks_than_the_first_are_warned_of(place, of_batch):
    """All rows of a batch have the same mask, so that its own halves agree."""
    generator, model = torch.Generator().manual_seed(0), randomized(nn.Linear(3, 5))
    data = [torch.randn(3, 4, size, generator=generator).unbind() for size in (3, 5)]
    batches = [(x, torch.stack([y, torch.ones(4, 5)], 1)) for x, y in zip(*data, strict=True)]
    batches[place][1][:, 1, 1:] = 0
    loss_fn = BatchLoss(lambda net, b: _masked_squares(net(b[0]), b[1][:, 0], b[1][:, 1]))
    if not of_batch:
        loss_fn = lambda o, t: _masked_squares(o, t[:, 0], t[:, 1])  # noqa: E731
    message = f"The loss of batch {place} with examples of the first is .*cut into batches"
    with pytest.warns(UserWarning, match=message) as caught:
        found = Objective(model, batches, loss_fn=loss_fn).loss()
    assert len(caught) == 1
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = _masked_squares(model(x), y[:, 0], y[:, 1]).item()
    assert found != pytest.approx(expected, rel=1e-3)
    # By what it divides by, nothing is wrong.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sized = BatchLoss(lambda net, b: _masked_squares(net(b[0]), b[1][:, 0], b[1][:, 1]), lambda b: b[1][:, 1].sum())
        assert Objective(model, batches, loss_fn=sized).loss() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("lengths", [(5, 5, 5, 9), (5, 5, 5, 5, 5, 5, 3)])
def test_batch_losses_of_new_lengths_are_looked_at_wherever_they_are(lengths):
    place = len(lengths) - 1
    with pytest.warns(UserWarning, match=rf"batch {place} divides by .*cut into batches.*size=") as caught:
        Objective(_Lines(), _named(_tokens(lengths)), loss_fn=BatchLoss(_shifted)).loss()
    assert len(caught) == 1


class _Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = randomized(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)))

    def forward(self, x):
        return self.net(x)


NO_MEANS_OF_BATCHES = {
    "a sum": lambda net, batch: F.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"),
    "weighed": lambda net, batch: (
        (F.cross_entropy(net(batch["x"]), batch["y"], reduction="none") * batch["w"]).sum() / batch["w"].sum()
    ),
}


@pytest.mark.parametrize("policy", ["interpolate", "batch", "recalibrate"])
@pytest.mark.parametrize("loss_fn", NO_MEANS_OF_BATCHES.values(), ids=NO_MEANS_OF_BATCHES)
@pytest.mark.parametrize("place", [0, 2])
def test_networks_that_normalize_do_not_hide_that_a_batch_loss_is_no_mean(place, loss_fn, policy):
    """The halves of a batch are compared by the running statistics, which are nobody's in particular."""
    generator = torch.Generator().manual_seed(0)
    loader = [
        {
            "x": torch.randn(12, 5, generator=generator),
            "y": torch.randint(3, (12,), generator=generator),
            "w": torch.rand(12, generator=generator) if index == place else torch.ones(12),
        }
        for index in range(3)
    ]
    found = "0" if loss_fn is NO_MEANS_OF_BATCHES["a sum"] else str(place)
    with pytest.warns(UserWarning, match=rf"loss of batch {found}.*cut into batches.*BatchLoss\(fn, size") as caught:
        Objective(_Normalized(), loader, loss_fn=BatchLoss(loss_fn), batch_norm=policy).loss()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean = BatchLoss(lambda net, batch: F.cross_entropy(net(batch["x"]), batch["y"], reduction="none").mean())
        sized = BatchLoss(NO_MEANS_OF_BATCHES["weighed"], size=lambda batch: batch["w"].sum())
        for right in (mean, sized):
            Objective(_Normalized(), loader, loss_fn=right, batch_norm=policy).loss()


def _hidden(net, batch):
    return F.cross_entropy(net(batch["x"]).transpose(1, 2), batch["y"].masked_fill(batch["mask"], -100))


@pytest.mark.parametrize("hide", [_shifted, _hidden])
@pytest.mark.parametrize("size", [None, lambda batch: len(batch["x"])])
@pytest.mark.parametrize("place", [3, 5, 6])
def test_labels_that_a_batch_loss_masks_in_any_one_batch_are_warned_of(place, size, hide):
    loader, model = _named(_tokens((5,) * 7)), _Lines()
    for index, batch in enumerate(loader):
        batch["mask"] = torch.zeros_like(batch["y"], dtype=torch.bool)
        batch["mask"][1:, 2:] = index == place
        if hide is _shifted:
            batch["y"][batch["mask"]] = -100
    counts = [batch["mask"].logical_not()[:, int(hide is _shifted) :].sum() for batch in loader]
    losses = [hide(model, batch) for batch in loader]
    expected = (sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)).item()
    loss_fn, entries = BatchLoss(hide, size=size), {name: torch.ones_like(p) for name, p in model.named_parameters()}
    # The sweep evaluates the function itself in the first batch alone.
    for compute in (Objective.loss, lambda objective: project_hessian(objective, {}, [entries])):
        with pytest.warns(UserWarning, match=rf"batch {place} divides by .*cut into batches.*size=") as caught:
            compute(Objective(model, loader, loss_fn=loss_fn))
        assert len(caught) == 1
    assert Objective(model, loader, loss_fn=loss_fn).loss() != pytest.approx(expected, rel=1e-5)


def _own(net, batch):
    return -net(batch["x"]).log_softmax(-1).gather(2, batch["y"][..., None]).mean()


def test_batch_losses_by_hand_of_new_lengths_are_warned_of(recwarn):
    loader, model = _named(_tokens((5, 5, 5, 9))), _Lines()
    x, y = (torch.cat([batch[name].flatten() for batch in loader]) for name in ("x", "y"))
    sized = BatchLoss(_own, size=lambda batch: batch["y"].numel())
    found = Objective(model, loader, loss_fn=sized).loss()
    assert found == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)
    assert not recwarn
    with pytest.warns(
        UserWarning, match=r"All tensors of batch 3 have other shapes.*\[\(9,\), \(9,\)\].*size="
    ) as caught:
        found = Objective(model, loader, loss_fn=BatchLoss(_own)).loss()
    assert len(caught) == 1
    assert found != pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-4)


def test_padded_inputs_with_a_label_each_are_not_warned_of(recwarn):
    loader, model = [{"x": x, "y": y[:, :1].float()} for x, y in _tokens((5, 9, 5, 2, 7))], _Lines()

    def by_hand(net, batch):
        return (net(batch["x"]).mean(1)[:, :1] - batch["y"]).square().mean()

    expected = sum(by_hand(model, batch).item() for batch in loader) / 5
    assert Objective(model, loader, loss_fn=BatchLoss(by_hand)).loss() == pytest.approx(expected, rel=1e-6)
    assert not recwarn


def _beside(batch):
    """Inputs and targets of varying length, and a number for each example."""
    return {"x": batch[0], "y": batch[1].float(), "id": torch.arange(len(batch[0]))}


@pytest.mark.parametrize(
    ("of_batch", "loss_fn"),
    [
        (_beside, BatchLoss(lambda net, batch: (net(batch["x"])[..., 0] - batch["y"]).square().mean())),
        (lambda batch: batch, lambda output, target: (output[..., 0] - target).transpose(0, 1).square().mean()),
    ],
)
def test_targets_of_new_lengths_beside_others_are_warned_of(of_batch, loss_fn):
    loader = [of_batch(batch) for batch in _tokens((5, 5, 9))]
    with pytest.warns(UserWarning, match=r"of batch 2 ha(s|ve) .*(other shapes|targets)"):
        Objective(_Lines(), loader, loss_fn=loss_fn).loss()


def _of_sure_ones(output, target):
    """The mean over those examples of whose class the network is sure."""
    sure = output.softmax(1).amax(1) > 0.6
    return (F.cross_entropy(output, target, reduction="none") * sure).sum() / sure.sum().clamp(min=1)


def _where_sure(output, target):
    """The mean over all examples of what counts where the network is sure."""
    sure = output.softmax(1).amax(1) > 0.6
    return (F.cross_entropy(output, target, reduction="none") * sure).mean()


@pytest.mark.parametrize(("loss_fn", "warns"), [(_of_sure_ones, True), (_where_sure, False)])
def test_a_divisor_that_hangs_on_the_output_is_noticed_where_all_count_at_first(loss_fn, warns):
    torch.manual_seed(0)
    network = nn.Linear(4, 3)
    with torch.no_grad():
        network.weight.mul_(100)
    x = torch.randn(200, 4)
    x = x[network(x).softmax(1).amax(1) > 0.6][:24]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Objective(network, [(x, torch.arange(24) % 3)], loss_fn=loss_fn).loss()
    assert any("with outputs nearer to zero is" in str(each.message) for each in caught) == warns
    assert len(caught) == warns
