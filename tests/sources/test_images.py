import dataclasses
import types

import pytest
import torch

from lmc_curvature.errors import DataError, OptionError
from lmc_curvature.sources import ImageDataset, load_data, load_digits


def test_batches_are_normalised_by_the_training_split():
    train, test = load_digits("train"), load_digits("test")
    x = torch.cat([x for x, _ in train.batches(100)])
    assert x.dtype == torch.float32
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    y, _ = next(iter(test.batches(len(test), order=torch.arange(len(test)))))
    assert torch.allclose(y, (test.images / 255 - train.mean.item()) / train.std.item(), atol=1e-6)


def test_a_loader_can_be_iterated_again_and_knows_its_length():
    data = load_digits("test")
    loader = data.batches(100)
    sizes = [len(x) for x, _ in loader]
    assert sizes == [100, 100, 100, 60]
    assert len(loader) == 4
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(loader, loader, strict=True))


def sorted_by_class(data):
    order = data.targets.argsort(stable=True)
    return data.subset(order)


def test_all_examples_come_once_in_a_random_order():
    data = sorted_by_class(load_digits())
    x, y = (torch.cat(parts) for parts in zip(*data.batches(256), strict=True))
    everything, labels = next(iter(data.batches(len(data), order=torch.arange(len(data)))))
    assert not torch.equal(y, labels)
    # Every image once, with its own label.
    rows = [torch.cat([y[:, None], x.flatten(1)], 1) for x, y in ((x, y), (everything, labels))]
    assert torch.equal(*(torch.unique(each, dim=0) for each in rows))
    for _, part in data.batches(256):
        assert len(part.unique()) == 10


def test_the_random_order_depends_on_the_number_of_examples_alone():
    data = sorted_by_class(load_digits("test"))
    one, other = data.subset(torch.arange(100)), data.subset(torch.arange(100, 200))
    order = torch.cat(
        [
            y
            for _, y in dataclasses.replace(
                one, targets=torch.arange(100), class_names=(*map(str, range(100)),)
            ).batches(7)
        ]
    )
    assert torch.equal(torch.cat([y for _, y in one.batches(30)]), one.targets[order])
    assert torch.equal(torch.cat([y for _, y in other.batches(30)]), other.targets[order])


def test_a_limit_keeps_the_examples_in_their_order():
    # Training on a limit goes by it: another order here would train other networks.
    data = sorted_by_class(load_digits())
    assert torch.equal(data.subset(300).targets, data.subset(300).targets.sort().values)


def test_order_selects_and_sorts_the_examples():
    data = load_digits("test")
    order = torch.tensor([5, 3, 3, 100])
    loader = data.batches(3, order=order)
    assert len(loader) == 2
    everything, _ = next(iter(data.batches(len(data), order=torch.arange(len(data)))))
    assert torch.equal(torch.cat([x for x, _ in loader]), everything[order])
    assert torch.equal(torch.cat([y for _, y in loader]), data.targets[order])


def test_batches_do_not_change_the_images():
    data = load_digits("test")
    before = data.images.clone()
    for x, _ in data.batches(50):
        x.zero_()
    assert torch.equal(data.images, before)


def test_subsets_are_fixed_nested_and_of_every_class():
    data = load_digits()
    small, large = data.subset(100), data.subset(300)
    assert torch.equal(small.images, data.subset(100).images)
    assert len(small) == 100
    as_set = [{bytes(image.numpy()) for image in subset.images} for subset in (small, large)]
    assert as_set[0] <= as_set[1]
    assert len(small.targets.unique()) == 10
    assert torch.equal(small.mean, data.mean)
    assert torch.equal(data.subset(torch.tensor([2, 0])).targets, data.targets[[2, 0]])
    with pytest.raises(DataError, match="2000 examples was asked for; there are 1437"):
        data.subset(2000)


def test_every_image_needs_a_target():
    # The tests' own check of shapes would catch this before the library does.
    data = types.SimpleNamespace(images=torch.zeros(2, 1, 3, 3), targets=torch.tensor([0]))
    with pytest.raises(DataError, match="2 images have 1 targets"):
        ImageDataset.__post_init__(data)


def test_targets_are_checked():
    images, statistics = torch.zeros(2, 1, 3, 3, dtype=torch.uint8), (torch.zeros(1), torch.ones(1))
    with pytest.raises(DataError, match="range from 0 to 1; with 1 classes"):
        ImageDataset(images, torch.tensor([0, 1]), ("a",), *statistics)


def test_a_fingerprint_is_of_images_labels_and_normalisation():
    data = load_data("digits", limit=20)
    assert data.fingerprint() == load_data("digits", limit=20).fingerprint()
    assert data.fingerprint() != load_data("digits", limit=21).fingerprint()


def test_a_batch_needs_an_example():
    with pytest.raises(OptionError, match="batch_size=0 must be at least 1"):
        load_digits().batches(0)
