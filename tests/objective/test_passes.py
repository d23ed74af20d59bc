"""Claim: passes over the data that differ are warned of, and the same data in another order are not."""

import contextlib
import warnings
from collections import UserDict
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lmc_curvature import BatchLoss, HessianOperator, Objective, lanczos, measure_barrier
from lmc_curvature.errors import OperatorError
from lmc_curvature.objective import passes
from lmc_curvature.objective.batches import Batch
from lmc_curvature.objective.passes import Fingerprint

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 4, generator=GENERATOR)
Y = torch.randint(3, (40,), generator=GENERATOR)
DATA = TensorDataset(X, Y)
MESSAGE = "Pass 2 over the loader has yielded other data than pass 1"


class Augmenting:
    """Batches whose inputs change with every visit."""

    def __init__(self, change):
        self.change, self.visits = change, 0

    def __iter__(self):
        self.visits += 1
        for x, y in DataLoader(DATA, 10):
            yield self.change(x, y, self.visits)


def _flip(x, y, visit):
    return (x.flip(1) * (-1) ** visit, y)


def _relabel(x, y, visit):
    return (x, y.roll(1) if visit == 1 else (y + 1) % 3)


def _jitter(x, y, visit):
    return (x + 1e-4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(visit)), y)


def _mirror(x, y, visit):
    return (x.flip(1) if visit % 2 else x, y)


def _permute(x, y, visit):
    return (x[:, torch.randperm(4, generator=torch.Generator().manual_seed(visit))], y)


def _pair_otherwise(x, y, visit):
    return (x, y.roll(visit))


def _own_generator():
    return torch.Generator().manual_seed(0)


OTHER = {
    "augmentation": lambda: Augmenting(_flip),
    "a little noise": lambda: Augmenting(_jitter),
    "labels": lambda: Augmenting(_relabel),
    "mirrored": lambda: Augmenting(_mirror),
    "columns permuted": lambda: Augmenting(_permute),
    "labels of other examples": lambda: Augmenting(_pair_otherwise),
    "replacement": lambda: DataLoader(DATA, 10, sampler=RandomSampler(DATA, True, generator=_own_generator())),
    "a part": lambda: DataLoader(DATA, 10, sampler=RandomSampler(DATA, num_samples=30, generator=_own_generator())),
    "dropped": lambda: DataLoader(DATA, 12, shuffle=True, drop_last=True, generator=_own_generator()),
    "cut short": lambda: Cut(DataLoader(DATA, 10, shuffle=True, generator=_own_generator())),
}
SAME = {
    "a list": lambda: list(DataLoader(DATA, 12)),
    "in order": lambda: DataLoader(DATA, 12),
    "shuffled": lambda: DataLoader(DATA, 12, shuffle=True, generator=_own_generator()),
    "shuffled by the global generator": lambda: DataLoader(DATA, 12, shuffle=True),
    "dropped in order": lambda: DataLoader(DATA, 12, drop_last=True),
    "nothing dropped": lambda: DataLoader(DATA, 10, shuffle=True, drop_last=True, generator=_own_generator()),
    "fixed replacement": lambda: DataLoader(DATA, 10, sampler=RandomSampler(DATA, True)),
}


class Cut:
    """The first two batches of a loader."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        for _, batch in zip(range(2), self.loader, strict=False):
            yield batch


COMPUTATIONS = {
    "losses": lambda objective: [objective.loss() for _ in range(2)],
    "gradient": lambda objective: (objective.gradient(), objective.loss()),
    "Lanczos": lambda objective: lanczos(HessianOperator(objective), 3),
    "dense": lambda objective: (HessianOperator(objective).to_dense(), HessianOperator(objective).diagonal()),
}


@pytest.mark.check(after=15)
@pytest.mark.parametrize("compute", COMPUTATIONS.values(), ids=COMPUTATIONS)
@pytest.mark.parametrize("make", OTHER.values(), ids=OTHER)
def test_other_data_are_warned_of_once(make, compute):
    objective = Objective(nn.Linear(4, 3), make())
    with pytest.warns(UserWarning, match=rf"{MESSAGE}.*list\(loader\)") as caught:
        # Lanczos may find that the products are those of no symmetric matrix.
        with contextlib.suppress(OperatorError):
            compute(objective)
        objective.loss()
    assert len(caught) == 1


@pytest.mark.check(after=5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", SAME.values(), ids=SAME)
def test_the_same_data_are_not(make, dtype):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective = Objective(nn.Linear(4, 3), make(), dtype=dtype)
        for compute in COMPUTATIONS.values():
            compute(objective)


def test_the_two_passes_of_recalibration_are_compared():
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)) for _ in range(2))
    with pytest.warns(UserWarning, match=MESSAGE):
        measure_barrier(a, b, Augmenting(_flip), batch_norm="recalibrate", progress=False)
    for loader, policy in ((Augmenting(_flip), "batch"), (SAME["shuffled"](), "recalibrate")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Untrained networks have no statistics of their own to speak of.
            warnings.filterwarnings("ignore", message="Re-estimated statistics")
            measure_barrier(a, b, loader, batch_norm=policy, progress=False)


CUT = "Pass 2 over the loader has cut the same examples into other batches than pass 1"


class Turning:
    """The same batches in another order with every visit, and so their examples."""

    def __init__(self):
        self.visits = 0

    def __iter__(self):
        self.visits += 1
        generator = torch.Generator().manual_seed(self.visits)
        parts = X.split(12), Y.split(12)
        for batch in torch.randperm(len(parts[0]), generator=generator).tolist():
            rows = torch.randperm(len(parts[0][batch]), generator=generator)
            yield tuple(part[batch][rows] for part in parts)


def _normalized(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, **options), nn.Linear(5, 3))


def _contrastive(model, batch):
    output = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(output @ output.T, torch.arange(len(output)))


def _instances():
    norm = nn.InstanceNorm1d(2, track_running_stats=True)
    return nn.Sequential(nn.Unflatten(1, (2, 2)), norm, nn.Flatten(), nn.Linear(4, 3))


# Of a network, options of its objective, and a loss that mixes examples.
DEPENDS_ON_BATCHES = {
    "batch": lambda loader: Objective(_normalized(), loader, batch_norm="batch"),
    "recalibrate": lambda loader: Objective(_normalized(), loader, batch_norm="recalibrate"),
    "no statistics": lambda loader: Objective(_normalized(track_running_stats=False), loader),
    "a loss of batches": lambda loader: Objective(nn.Linear(4, 3), loader, loss_fn=BatchLoss(_contrastive)),
}
DOES_NOT = {
    "interpolate": lambda loader: Objective(_normalized(), loader),
    "no batch norm": lambda loader: Objective(nn.Linear(4, 3), loader, batch_norm="batch"),
    "instance norm": lambda loader: Objective(_instances(), loader, batch_norm="batch"),
}
# What they say about one batch alone is another matter.
OTHERWISE = "ignore:.*(statistics|depends on how the data are cut|could not be compared)"


@pytest.mark.check(after=3)
@pytest.mark.filterwarnings(OTHERWISE)
@pytest.mark.parametrize("compute", COMPUTATIONS.values(), ids=COMPUTATIONS)
@pytest.mark.parametrize("make", DEPENDS_ON_BATCHES.values(), ids=DEPENDS_ON_BATCHES)
def test_the_same_data_in_other_batches_are_warned_of_where_batches_matter(make, compute):
    said = rf"{CUT.replace('2', '[23]')}.*list\(loader\)"
    with pytest.warns(UserWarning, match=said) as caught, contextlib.suppress(OperatorError):
        compute(make(SAME["shuffled"]()))
    assert sum(str(warning.message).startswith("Pass ") for warning in caught) == 1


@pytest.mark.check(after=2)
@pytest.mark.parametrize("loader", [Turning, SAME["shuffled by the global generator"], SAME["a list"]])
@pytest.mark.parametrize("make", DEPENDS_ON_BATCHES.values(), ids=DEPENDS_ON_BATCHES)
def test_the_same_batches_in_another_order_are_not(make, loader):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", OTHERWISE.removeprefix("ignore:"))
        objective = make(loader())
        for compute in COMPUTATIONS.values():
            compute(objective)


@pytest.mark.check(after=1)
@pytest.mark.parametrize("make", DOES_NOT.values(), ids=DOES_NOT)
def test_other_batches_do_not_matter_to_other_networks(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", OTHERWISE.removeprefix("ignore:"))
        objective = make(SAME["shuffled"]())
        for compute in COMPUTATIONS.values():
            compute(objective)


def test_passes_that_are_not_complete_do_not_count():
    objective = Objective(nn.Linear(4, 3), SAME["shuffled"]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for stop in (1, 4, 2, 4):
            with objective.one_pass() as batches:
                for _ in zip(range(stop), batches, strict=False):
                    pass
        objective.loss()


def test_more_batches_than_are_visited_of_a_shuffled_loader_are_warned_of():
    objective = Objective(nn.Linear(4, 3), SAME["shuffled"](), max_batches=2)
    with pytest.warns(UserWarning, match=f"{MESSAGE}.*max_batches"):
        COMPUTATIONS["losses"](objective)


def test_padding_depends_on_the_order():
    """Sentences padded to the longest of their batch, as collating functions do."""
    sentences = [torch.arange(1, 2 + n % 7) for n in range(40)]

    def collate(chosen):
        ids = nn.utils.rnn.pad_sequence([sentences[n] for n in chosen], batch_first=True)
        labels = nn.utils.rnn.pad_sequence([sentences[n] for n in chosen], batch_first=True, padding_value=-100)
        return {"ids": ids, "labels": labels}

    loader = DataLoader(range(40), 6, shuffle=True, collate_fn=collate, generator=_own_generator())
    model = nn.Embedding(9, 9)
    loss_fn = BatchLoss(lambda net, batch: F.cross_entropy(net(batch["ids"]).transpose(1, 2), batch["labels"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        COMPUTATIONS["losses"](Objective(model, loader, loss_fn=loss_fn))


def _jittered(x):
    return x + 1e-3 * torch.randn(x.shape)


LISTS = {
    "images and boxes": lambda noise: (
        lambda rows: ([noise(X[n : n + 1]) for n in rows], [{"boxes": X[n, :2], "labels": Y[: n % 3]} for n in rows])
    ),
    "several inputs": lambda noise: lambda rows: ((X[rows], noise(X[rows] + 1)), Y[rows]),
    "named, weighed": lambda noise: lambda rows: {"x": noise(X[rows]), "ids": Y[rows][:, None], "one": torch.ones(())},
    "of a class": lambda noise: lambda rows: UserDict({"x": noise(X[rows]), "ids": Y[rows]}),
    "graphs": lambda noise: (
        lambda rows: {
            "nodes": noise(torch.cat([X[:n] for n in rows])),
            "of": torch.arange(len(rows)).repeat_interleave(torch.tensor(rows)),
        }
    ),
}


@pytest.mark.parametrize("collate", LISTS.values(), ids=LISTS)
def test_batches_of_any_form_are_compared(collate):
    def loss(model, batch):
        data = batch["x"] if "x" in batch else batch["nodes"] if "nodes" in batch else batch[0][0]
        return model(data if isinstance(batch, Mapping) else X).square().sum() / 7

    # A whole number that is no number of rows.
    loss_fn = BatchLoss(loss, size=lambda batch: 7)

    def loader(noise):
        rows = range(1, 40)
        return DataLoader(rows, 13, shuffle=True, collate_fn=collate(noise), generator=_own_generator())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        COMPUTATIONS["losses"](Objective(nn.Linear(4, 3), loader(lambda x: x), loss_fn=loss_fn))
    with pytest.warns(UserWarning, match=MESSAGE):
        COMPUTATIONS["losses"](Objective(nn.Linear(4, 3), loader(_jittered), loss_fn=loss_fn))


def _fingerprint(data, sizes):
    """Of a mapping of tensors, cut into batches."""
    found = Fingerprint()
    for index, parts in enumerate(zip(*(tensor.split(sizes) for tensor in data.values()), strict=True)):
        found.add(Batch(index, len(parts[0]), dict(zip(data, parts, strict=True))))
    return found


IMAGES = {
    "float": torch.randn(30, 3, 6, 6, generator=GENERATOR),
    "bytes": torch.randint(256, (30, 3, 6, 6), generator=GENERATOR, dtype=torch.uint8),
    "complex": torch.randn(30, 3, 6, 6, generator=GENERATOR, dtype=torch.complex64),
    "far from zero": torch.randn(30, 3, 6, 6, generator=GENERATOR) + 1000,
}
CHANGES = {
    "mirrored": lambda images: images.flip(-1),
    "upside down": lambda images: images.flip(-2),
    "turned by half": lambda images: images.flip(-1, -2),
    "turned": lambda images: images.rot90(1, (-2, -1)),
    "channels": lambda images: images.flip(1),
    "one moved": lambda images: torch.cat([images[:7], images[7:8].roll(1, -1), images[8:]]),
}


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_places_of_numbers_are_told_where_sums_are_the_same(images, change):
    labels = torch.arange(30) % 4
    first = _fingerprint({"x": images, "y": labels}, 8)
    order = torch.randperm(30, generator=GENERATOR)
    for rows in (torch.arange(30), order):
        data = {"x": images[rows], "y": labels[rows]}
        assert _fingerprint(data, 7).agrees_with(first)
        other = _fingerprint({**data, "x": change(images)[rows]}, 7)
        assert torch.allclose(other.moments["(MappingKey(key='x'),)"], first.moments["(MappingKey(key='x'),)"])
        assert not other.agrees_with(first)


@pytest.mark.parametrize("images", [*IMAGES.values(), torch.eye(30), torch.ones(30, 5)], ids=[*IMAGES, "ones", "same"])
def test_one_example_in_another_batch_is_told(images):
    data = {"x": images, "y": torch.arange(30) % 4}
    first = _fingerprint(data, 10)
    order = torch.cat([10 * batch + torch.randperm(10, generator=GENERATOR) for batch in (2, 0, 1)])
    assert _fingerprint({name: tensor[order] for name, tensor in data.items()}, 10).is_cut_like(first)
    # The labels of both are the same.
    exchanged = torch.arange(30)
    exchanged[[4, 24]] = torch.tensor([24, 4])
    other = _fingerprint({name: tensor[exchanged] for name, tensor in data.items()}, 10)
    assert other.agrees_with(first)
    assert other.is_cut_like(first) == images[4].equal(images[24])
    assert not _fingerprint(data, 15).is_cut_like(first)


@pytest.mark.parametrize("change", [lambda y: y.roll(1, 0), lambda y: y.flip(0)])
def test_pairs_are_told_whatever_stands_before_them(change):
    """Labels, soft labels and second inputs that change places with each other."""
    ones, labels = torch.ones(30, 5), torch.arange(30) % 4
    rows = {"ones": ones, "x": IMAGES["float"], "more": torch.randn(30, 2, generator=GENERATOR), "y": labels}
    first = _fingerprint(rows, 8)
    for name in ("x", "more", "y"):
        assert not _fingerprint({**rows, name: change(rows[name])}, 8).agrees_with(first)
    assert _fingerprint({name: change(tensor) for name, tensor in rows.items()}, 11).agrees_with(first)


def test_padding_of_real_numbers_depends_on_the_order_too():
    series = [torch.randn(2 + n % 5, 3, generator=GENERATOR) for n in range(30)]

    def passed(order, side):
        found = Fingerprint()
        for index, chosen in enumerate(torch.tensor(order).split(4)):
            parts = [series[n] for n in chosen]
            data = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_side=side)
            found.add(Batch(index, len(chosen), (data, chosen)))
        return found

    for side in ("left", "right"):
        assert passed([*range(29, -1, -1)], side).agrees_with(passed([*range(30)], side))


def test_rows_are_summed_in_parts(monkeypatch):
    data = {"x": IMAGES["float"], "y": torch.arange(30)}
    whole = _fingerprint(data, 8)
    monkeypatch.setattr(passes, "_CHUNK", 250)
    found = _fingerprint(data, 8)
    for places, products in found.products.items():
        torch.testing.assert_close(products, whole.products[places], rtol=1e-12, atol=0)


def test_sums_and_squares_that_agree_by_chance_are_no_agreement():
    generator = torch.Generator().manual_seed(316)
    x = 829.0 * (torch.randn(140, 5, generator=generator) + 818.0)
    torch.randperm(140, generator=generator)
    other = x.clone()
    other[0] = 829.0 * (torch.randn(5, generator=generator) + 818.0)
    assert not _fingerprint({"x": other}, 50).agrees_with(_fingerprint({"x": x}, 140))


@pytest.mark.check
@settings(deadline=None, max_examples=100)
@given(st.integers(2, 200), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), st.integers(0, 2**31), st.data())
def test_sums_tell_other_examples_but_not_another_order(examples, scale, shift, seed, data):
    generator = torch.Generator().manual_seed(seed)
    x = scale * (torch.randn(examples, 5, generator=generator) + shift)

    def fingerprint(rows):
        return _fingerprint({"x": rows}, data.draw(st.integers(1, examples)))

    first = fingerprint(x)
    assert fingerprint(x[torch.randperm(examples, generator=generator)]).agrees_with(first)
    other = x.clone()
    other[0] = scale * (torch.randn(5, generator=generator) + shift)
    assert not fingerprint(other).agrees_with(first)
    assert not fingerprint(torch.cat([x, x[:1]])).agrees_with(first)
