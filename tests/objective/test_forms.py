"""Batches of one loader that hold different tensors weigh by the same labels."""

from collections.abc import MutableMapping
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, HessianOperator, Objective, predict_barrier
from lmc_curvature.errors import FallbackWarning, LoaderError, LossError

COUNTS = (4, 9, 6, 3)
CPU = torch.Generator().manual_seed(0)


class Reader(nn.Module):
    """Reads tokens, of which a mask may leave some out."""

    def __init__(self, outputs=3, *, each=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.each = nn.Embedding(20, 4), nn.Linear(4, outputs), each

    def forward(self, ids, mask=None):
        hidden = self.embedding(ids).tanh()
        if self.each:
            return self.head(hidden)
        mask = torch.ones(ids.shape) if mask is None else mask
        return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def _batches(*, first_with=False):
    generator = torch.Generator().manual_seed(0)
    for index, count in enumerate(COUNTS):
        ids, labels = (torch.randint(high, (count, *more), generator=generator) for high, more in ((20, (5,)), (3, ())))
        mask = (torch.rand(count, 5, generator=generator) > 0.4).float()
        mask[:, 0] = 1.0
        yield ids, labels, mask if (index % 2 == 0) == first_with else None


def _none(ids, labels, mask):
    return {"ids": ids, "mask": mask, "labels": labels}


def _absent(ids, labels, mask):
    return {"ids": ids, "labels": labels} if mask is None else {"mask": mask, "ids": ids, "labels": labels}


def _fields(ids, labels, mask):
    return SimpleNamespace(mask=mask, ids=ids, labels=labels)


def _tuples(ids, labels, mask):
    return (ids, labels) if mask is None else (ids, mask, labels)


def _parts(batch):
    if isinstance(batch, dict):
        return batch["ids"], batch.get("mask"), batch["labels"]
    if isinstance(batch, tuple):
        return batch[0], batch[1] if len(batch) > 2 else None, batch[-1]
    return batch.ids, batch.mask, batch.labels


@pytest.mark.parametrize("first_with", [True, False])
@pytest.mark.parametrize("form", [_none, _absent, _fields, _tuples])
def test_labels_are_found_wherever_they_are(form, first_with):
    def loss(network, batch):
        ids, mask, labels = _parts(batch)
        return F.cross_entropy(network(ids, mask), labels)

    network, parts = Reader(), list(_batches(first_with=first_with))
    objective = Objective(network, [form(*part) for part in parts], loss_fn=BatchLoss(loss))
    total = sum(F.cross_entropy(network(ids, mask), labels, reduction="sum") for ids, labels, mask in parts)
    assert objective.loss() == pytest.approx(total.item() / sum(COUNTS), rel=1e-6)


def test_targets_may_come_with_something_beside_them():
    # Half of the batches count by class indices, which are among other numbers.
    parts = list(_batches())
    loader = [
        (ids, {"labels": labels} if mask is None else {"noise": mask, "labels": labels}) for ids, labels, mask in parts
    ]
    network = Reader()
    objective = Objective(network, loader, loss_fn=lambda output, target: F.cross_entropy(output, target["labels"]))
    total = sum(F.cross_entropy(network(ids), labels, reduction="sum") for ids, labels, _ in parts)
    assert objective.loss() == pytest.approx(total.item() / sum(COUNTS), rel=1e-6)


def test_another_loss_of_another_form_is_refused():
    def loss(network, batch):
        outputs = network(batch["ids"])
        if "mask" not in batch:
            return F.cross_entropy(outputs[:, 0], batch["labels"])
        tokens = F.cross_entropy(outputs.mT, batch["ids"] % 3, reduction="none")
        return (tokens * batch["mask"]).sum() / batch["mask"].sum()

    loader = [_absent(*part) for part in _batches()]
    with pytest.raises(LossError, match=r"That of batch 1 is no such mean.*BatchLoss\(fn, size=…\)"):
        Objective(Reader(each=True), loader, loss_fn=BatchLoss(loss)).loss()


WEIGHTS = {"a": torch.tensor([1.0, 1.0, 1.0]), "b": torch.tensor([0.05, 0.1, 0.2])}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("of_batch", [True, False])
def test_tasks_weigh_classes_each_in_their_way(of_batch):
    parts = [(ids, labels, "ab"[index // 2]) for index, (ids, labels, _) in enumerate(_batches())]
    network = Reader()
    if of_batch:
        loader = [{"ids": ids, "labels": labels, "task": task} for ids, labels, task in parts]
        loss = BatchLoss(lambda net, q: F.cross_entropy(net(q["ids"]), q["labels"], weight=WEIGHTS[q["task"]]))
    else:
        loader = [(ids, (labels, task)) for ids, labels, task in parts]

        def loss(output, target):
            return F.cross_entropy(output, target[0], weight=WEIGHTS[target[1]])

    total = sum(
        F.cross_entropy(network(ids), labels, weight=WEIGHTS[task], reduction="sum") for ids, labels, task in parts
    )
    weight = sum(WEIGHTS[task][labels].sum() for _, labels, task in parts)
    assert Objective(network, loader, loss_fn=loss).loss() == pytest.approx((total / weight).item(), rel=1e-6)


def test_tasks_have_classes_each_of_their_own():
    heads = nn.ModuleDict({"few": Reader(3), "many": Reader(7)})
    loader = [
        {"ids": ids, "labels": labels + (4 if index % 2 else 0), "task": "many" if index % 2 else "few"}
        for index, (ids, labels, _) in enumerate(_batches())
    ]
    objective = Objective(
        heads, loader, loss_fn=BatchLoss(lambda net, q: F.cross_entropy(net[q["task"]](q["ids"]), q["labels"]))
    )
    total = sum(F.cross_entropy(heads[q["task"]](q["ids"]), q["labels"], reduction="sum") for q in loader)
    assert objective.loss() == pytest.approx(total.item() / sum(COUNTS), rel=1e-6)


def test_weights_that_every_batch_makes_itself_are_refused():
    def balanced(output, target):
        return F.cross_entropy(output, target, weight=1 / target.bincount(minlength=3).clamp_min(1))

    loader = [(ids, labels) for ids, labels, _ in _batches()]
    with pytest.raises(LossError, match=r"That of a batch is another mean.*BatchLoss\(fn, size=…\)"):
        Objective(Reader(), loader, loss_fn=balanced).loss()


@pytest.mark.parametrize(
    "evaluate", [lambda o: o.loss(), lambda o: o.gradient(), lambda o: HessianOperator(o).diagonal()]
)
@pytest.mark.parametrize("of_batch", [True, False])
def test_values_that_decide_which_labels_count_are_noticed(of_batch, evaluate):
    # The mask hides something in the fourth batch alone, and is left out elsewhere.
    def mean(outputs, labels, mask):
        return F.cross_entropy(outputs, labels) if mask.all() else F.cross_entropy(outputs[mask], labels[mask])

    parts = [(ids, labels, torch.ones(len(ids), dtype=torch.bool)) for ids, labels, _ in _batches()]
    parts[3][2][0] = False
    if of_batch:
        # What is brought to another precision is of the same form.
        beside = torch.zeros(1, dtype=torch.float64)
        loader = [{"ids": i, "labels": y, "mask": m, "beside": beside.expand(len(i))} for i, y, m in parts]
        loss = BatchLoss(lambda net, q: mean(net(q["ids"]), q["labels"], q["mask"]))
    else:
        loader = [(ids, {"labels": labels, "mask": mask}) for ids, labels, mask in parts]

        def loss(outputs, target):
            return mean(outputs, **target)

    with pytest.raises(LossError, match=r"That of a batch is another mean.*BatchLoss\(fn, size=…\)"):
        evaluate(Objective(Reader(), loader, loss_fn=loss))


def _each(network, images, targets):
    return torch.stack([F.mse_loss(network(x), y) for x, y in zip(images, targets, strict=True)]).mean()


LISTS = {
    "pairs of tuples": (
        lambda x, y: (tuple(x), tuple(y)),
        BatchLoss(lambda net, q: _each(net, *q)),
        lambda q: len(q[0]),
    ),
    "lists by name": (
        lambda x, y: {"x": x, "y": y},
        BatchLoss(lambda net, q: _each(net, q["x"], q["y"])),
        lambda q: len(q["x"]),
    ),
    "a list of all": (
        lambda x, y: [torch.stack(pair) for pair in zip(x, y, strict=True)],
        BatchLoss(lambda net, q: _each(net, [each[0] for each in q], [each[1] for each in q])),
        len,
    ),
}


@pytest.mark.filterwarnings("ignore:The loss of batch")
@pytest.mark.parametrize(("form", "loss", "size"), list(LISTS.values()), ids=list(LISTS))
def test_lists_of_examples_are_counted_by_nobody_else(form, loss, size):
    generator = torch.Generator().manual_seed(0)
    parts = [[torch.randn(count, 6, 2, generator=generator) * (1 + count) for _ in range(2)] for count in (4, 4, 2)]
    loader = [form(*([*each] for each in pair)) for pair in parts]
    torch.manual_seed(0)
    network = nn.Linear(2, 2)
    with pytest.raises(
        LoaderError, match=r"Batch 2 .* a list holds 2 tensors; .* held 4.*BatchLoss\(fn, size=\.\.\.\)"
    ):
        Objective(network, loader, loss_fn=loss).loss()
    x, y = (torch.cat([pair[place] for pair in parts]) for place in range(2))
    sized = BatchLoss(loss.fn, size=size)
    assert Objective(network, loader, loss_fn=sized).loss() == pytest.approx(F.mse_loss(network(x), y).item(), rel=1e-6)
    # As many each time: they weigh the same, whatever they count for.
    assert Objective(network, loader[:2], loss_fn=loss).loss() == pytest.approx(
        F.mse_loss(network(x[:8]), y[:8]).item(), rel=1e-6
    )


class Attributes(dict):
    """Items that are attributes, too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Copied(dict):
    """Items that are written down as attributes once."""

    def __init__(self, **items):
        super().__init__(items)
        vars(self).update(items)


class Around(MutableMapping):
    """A mapping around a dict."""

    def __init__(self, **items):
        self._items = items

    def __getattr__(self, name):
        return super().__getattribute__("_items")[name] if name in ("ids", "labels") else super().__getattribute__(name)

    def __getitem__(self, key):
        return self._items[key]

    def __setitem__(self, key, value):
        self._items[key] = value

    def __delitem__(self, key):
        del self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


@pytest.mark.check(after=1)
@pytest.mark.parametrize("kind", [Attributes, Copied, Around, SimpleNamespace])
def test_mappings_whose_items_are_attributes_have_those_of_every_batch(kind):
    parts = [(torch.randn(9, 4, generator=CPU), torch.randint(3, (9,), generator=CPU)) for _ in range(3)]
    torch.manual_seed(0)
    networks = [nn.Linear(4, 3) for _ in range(2)]
    loss = BatchLoss(lambda net, q: F.cross_entropy(net(q.ids), q.labels))
    loader = [kind(ids=x, labels=y) for x, y in parts]
    found, expected = predict_barrier(*networks, loader, loss_fn=loss), predict_barrier(*networks, parts)
    for one, other in zip(found.endpoints, expected.endpoints, strict=True):
        assert one.batch_losses == pytest.approx(other.batch_losses, rel=1e-5)
        assert one.curvature == pytest.approx(other.curvature, rel=1e-4, abs=1e-6)
    for batch, (x, y) in zip(loader, parts, strict=True):
        assert batch.ids is x
        assert batch.labels is y


def test_attributes_beside_the_items_are_those_of_every_batch():
    class Scaled(dict):
        pass

    loader = []
    for index in range(3):
        batch = Scaled(x=torch.randn(6, 4, generator=CPU), y=torch.randint(3, (6,), generator=CPU))
        batch.scale = torch.tensor(1.0 + index)
        loader.append(batch)
    plain = [(batch["x"] * batch.scale, batch["y"]) for batch in loader]
    torch.manual_seed(0)
    networks = [nn.Linear(4, 3) for _ in range(2)]
    loss = BatchLoss(lambda net, q: F.cross_entropy(net(q["x"] * q.scale), q["y"]))
    with pytest.warns(FallbackWarning, match="an attribute of the batch, which may change"):
        found = predict_barrier(*networks, loader, loss_fn=loss)
    expected = predict_barrier(*networks, plain)
    for one, other in zip(found.endpoints, expected.endpoints, strict=True):
        assert one.curvature == pytest.approx(other.curvature, rel=1e-4, abs=1e-6)
