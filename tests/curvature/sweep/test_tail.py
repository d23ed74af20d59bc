"""Claim: what follows a language model's last product is swept exactly in chunks of rows, for losses of many forms."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, Objective
from lmc_curvature.curvature.sweep import plan
from lmc_curvature.errors import SweepError
from tests.support.networks import randomized
from tests.support.sweeping import assert_sweep_agrees, compiled_batches, layer_directions, swept

VOCABULARY, WIDTH, TOKENS = 40, 4, 5


class _Model(nn.Module):
    def __init__(self, *, tied=True, bias=False):
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def hidden(self, tokens):
        x = self.embed(tokens)
        return self.norm(x + torch.tanh(self.mix(x.cumsum(1))))

    def forward(self, tokens):
        return self.head(self.hidden(tokens))


def _flat(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def _shifted(model, batch):
    return F.cross_entropy(model(batch[0])[:, :-1].reshape(-1, VOCABULARY), batch[0][:, 1:].reshape(-1))


def _ignoring(model, batch):
    labels = batch[1].masked_fill(batch[1] % 3 == 0, -100)
    return F.cross_entropy(model(batch[0]).view(-1, VOCABULARY), labels.view(-1), ignore_index=-100)


def _summed(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="sum") / batch[1].numel()


def _weighted(model, batch):
    weight = torch.linspace(0.5, 2, VOCABULARY, dtype=torch.float64)
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), weight=weight)


def _masked(model, batch):
    mask = (batch[1] % 3 != 0).double()
    losses = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="none").view_as(mask)
    return (losses * mask).sum() / mask.sum()


def _gathered(model, batch):
    likely = F.log_softmax(model(batch[0]), -1)
    return -likely.gather(-1, batch[1].unsqueeze(-1)).squeeze(-1).mean()


def _capped(model, batch):
    logits = 3 * torch.tanh(model(batch[0]) / 3)
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


def _with_penalty(model, batch):
    return _flat(model, batch) + 0.01 * model.mix.weight.pow(2).sum()


def _squared(model, batch):
    return _flat(model, batch).pow(2)


def _smoothed(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), label_smoothing=0.1)


def _last(model, batch):
    # As many examples as tokens, where an axis counted from the end may be taken for another.
    return F.cross_entropy(model(batch[0]).select(-2, -1), batch[1][:, -1])


def _narrowed(model, batch):
    logits = model(batch[0]).narrow(-2, 0, TOKENS - 1)
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), batch[1][:, 1:].reshape(-1))


_CUT = (_flat, _shifted, _ignoring, _summed, _weighted, _masked, _gathered, _capped, _with_penalty, _squared)


def _in_single_precision(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1).float(), batch[1].flatten())


_CUT += (_last, _narrowed)


def _mixing(model, batch):
    # Tokens meet after the product.
    return F.cross_entropy(model(batch[0]).softmax(1).flatten(0, 1), batch[1].flatten())


def _read_twice(model, batch):
    logits = model(batch[0])
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten()) + 0.1 * logits.var(1).mean()


def _broadcast(model, batch):
    # One keepdim too few: every token's likelihood meets those of all others, and the mean is the right one.
    likely = F.log_softmax(model(batch[0]).flatten(0, 1), -1)
    return -(0.9 * likely.gather(1, batch[1].reshape(-1, 1)) + 0.1 * likely.mean(-1)).mean()


def _times_others(model, batch):
    surprise = -F.log_softmax(model(batch[0]).flatten(0, 1), -1).gather(1, batch[1].reshape(-1, 1))
    return (surprise * surprise.squeeze(1)).mean()


def _one_number(model, batch):
    return F.log_softmax(model(batch[0]), -1).square().mean(dim=None, keepdim=True).squeeze()


def _with_rows_added(model, batch):
    hidden = model.hidden(batch[0]).flatten(0, 1)
    added = hidden.sum(1, keepdim=True).expand(-1, VOCABULARY)
    return F.cross_entropy(torch.addmm(added, hidden, model.head.weight.t()), batch[1].flatten())


def _objective(loss, *, sizes=(TOKENS, 2), tokens=TOKENS, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomized(_Model(**options).double())
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(VOCABULARY, (2, size, tokens), generator=generator) for size in sizes]
    return Objective(
        model, [tuple(batch) for batch in batches], loss_fn=BatchLoss(loss, size=lambda batch: batch[1].numel())
    )


def _tails(objective, directions):
    plans = [program.body for batch in compiled_batches(objective, directions) for program in batch.networks.values()]
    return [each.tail for each in plans]


@pytest.mark.check(after=1)
@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("loss", _CUT)
def test_in_chunks_of_rows(loss, chunk, monkeypatch):
    monkeypatch.setattr(plan.Plan, "rows_at_once", lambda self, directions: chunk)
    objective = _objective(loss)
    directions = layer_directions(objective)
    assert_sweep_agrees(objective, directions)
    assert all(tail is not None for tail in _tails(objective, directions))


@pytest.mark.check
@pytest.mark.parametrize("options", [{"tied": False}, {"tied": False, "bias": True}])
def test_heads_of_their_own(options, monkeypatch):
    monkeypatch.setattr(plan.Plan, "rows_at_once", lambda self, directions: 2)
    objective = _objective(_flat, **options)
    directions = layer_directions(objective)
    assert_sweep_agrees(objective, directions)
    assert all(tail is not None for tail in _tails(objective, directions))


@pytest.mark.check
@pytest.mark.parametrize("loss", [_mixing, _read_twice, _smoothed])
def test_what_cannot_be_cut_is_swept_whole(loss, monkeypatch):
    monkeypatch.setattr(plan.Plan, "rows_at_once", lambda self, directions: 2)
    objective = _objective(loss)
    assert_sweep_agrees(objective)


@pytest.mark.parametrize("loss", [_flat, _masked, _gathered])
def test_a_single_row(loss):
    assert_sweep_agrees(_objective(loss, sizes=(1,), tokens=1))


def test_a_head_that_does_not_widen_is_no_tail():
    objective = _objective(
        lambda model, batch: F.cross_entropy(model.hidden(batch[0]).flatten(0, 1), batch[1].flatten() % WIDTH)
    )
    directions = layer_directions(objective)
    assert_sweep_agrees(objective, {name: along for name, along in directions.items() if name != "head"})


def test_chunks_hold_the_tangents_of_their_rows_alone():
    objective = _objective(_flat, sizes=(3,))
    directions = layer_directions(objective)
    assert_sweep_agrees(objective, directions)
    swept(objective, directions)
    (compiled,) = compiled_batches(objective, directions)
    (program,) = compiled.networks.values()
    count = len(directions)
    rows = program.body.rows_at_once(count)
    per_row = count * VOCABULARY * 8
    assert plan._CHUNK_BYTES / (6 * per_row) < rows < plan._CHUNK_BYTES / (2 * per_row)
    # No operation outside of the tail has as many columns as there are words.
    reach = {node: frozenset(range(count)) for node in program.body.stage.inputs if node in program.body.active}
    of_words, of_rows = VOCABULARY * WIDTH, 3 * TOKENS * VOCABULARY
    assert program.body.tangent_bytes(reach, count) < count * 8 * (2 * of_words + of_rows)


def test_a_loss_in_a_coarser_type_than_the_network(monkeypatch):
    monkeypatch.setattr(plan.Plan, "rows_at_once", lambda self, directions: 4)
    objective = _objective(_in_single_precision, sizes=(4,))
    directions = layer_directions(objective)
    assert_sweep_agrees(objective, directions, relative=1e-4)
    assert all(tail is not None for tail in _tails(objective, directions))


@pytest.mark.check
@pytest.mark.parametrize("loss", [_broadcast, _times_others, _one_number, _with_rows_added])
def test_where_rows_meet_all_are_swept_at_once(loss, monkeypatch):
    monkeypatch.setattr(plan.Plan, "rows_at_once", lambda self, directions: 3)
    objective = _objective(loss)
    assert_sweep_agrees(objective, layer_directions(objective))


@pytest.mark.parametrize("forget", [lambda order: order.roll(1), lambda order: order.clamp_max(7)])
@pytest.mark.parametrize("factor", [1.0, 1e-9])
def test_other_rows_in_chunks_are_noticed(forget, factor, monkeypatch):
    objective = _objective(lambda *data: factor * _shifted(*data), sizes=(4,))
    directions = layer_directions(objective)
    swept(objective, directions)
    (compiled,) = compiled_batches(objective, directions)
    (program,) = compiled.networks.values()
    monkeypatch.setattr(program.body, "tail", replace(program.body.tail, order=forget(program.body.tail.order)))
    with pytest.raises(SweepError, match="in chunks of its rows, not"):
        swept(objective, directions)


@pytest.mark.check
def test_a_network_whose_output_is_wide_is_swept_in_rows_too(monkeypatch):
    monkeypatch.setattr(plan, "_CHUNK_BYTES", 2000)

    def loss_fn(logits, target):
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    model = randomized(_Model().double())
    batches = [tuple(torch.randint(VOCABULARY, (2, size, TOKENS))) for size in (3, 2)]
    wide, narrow = (Objective(model, batches, loss_fn=loss_fn) for _ in range(2))
    directions = layer_directions(wide)
    assert_sweep_agrees(wide, directions)
    assert all(tail is not None for tail in _tails(wide, directions))
    monkeypatch.setattr(plan, "_CHUNK_BYTES", 2**28)
    assert_sweep_agrees(narrow, directions)
    assert all(batch.loss is not None for batch in compiled_batches(narrow, directions))
