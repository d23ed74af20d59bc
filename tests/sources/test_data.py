import inspect
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn import datasets

from lmc_curvature.errors import DataError, OptionError
from lmc_curvature.sources import load_data, load_digits, load_image_folder


def write_images(directory, count, *, size=(6, 5), seed=0):
    generator = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    for index in range(count):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{index:03d}.png")


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for seed, name in enumerate(("ant", "bee")):
            write_images(tmp_path / split / name, count, seed=seed)
    return tmp_path


def test_digits_are_split_once_and_for_all():
    train, test = load_digits("train"), load_digits("test")
    assert train.images.shape == (1437, 1, 8, 8)
    assert test.images.shape == (360, 1, 8, 8)
    assert torch.equal(train.images, load_digits("train").images)
    both = torch.cat([train.images, test.images]).flatten(1).double()
    bunch = datasets.load_digits()
    assert both.max() == 255
    # The splits are the whole data set: the same multiset of images, told apart by their pixel sums.
    expected = np.rint(bunch["data"] * 255 / 16)
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, expected.tolist()))
    for data in (train, test):
        counts = torch.bincount(data.targets, minlength=10)
        assert counts.max() - counts.min() <= 0.1 * counts.float().mean()


def test_limit_keeps_the_normalisation_of_the_whole_split():
    data = load_data("digits", "test", 50)
    assert len(data) == 50
    assert torch.equal(data.std, load_digits("train").std)
    assert len(load_data("digits", "test", 10**6)) == 360


def test_image_folder_holds_the_pixels(folder):
    data = load_image_folder(folder, progress=False)
    assert data.images.shape == (8, 3, 5, 6)
    assert data.class_names == ("ant", "bee")
    assert data.targets.tolist() == [0] * 4 + [1] * 4
    pixels = np.asarray(Image.open(folder / "train" / "bee" / "001.png"))
    assert torch.equal(data.images[5], torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    scaled = data.images.double() / 255
    assert torch.allclose(data.mean.double(), scaled.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(data.std.double(), scaled.std((0, 2, 3), correction=0), atol=1e-6)


def test_the_test_split_is_normalised_by_the_training_split(folder):
    test = load_data(folder, "test", progress=False)
    assert len(test) == 4
    assert torch.equal(test.mean, load_data(folder, progress=False).mean)


def test_a_root_may_hold_the_classes_itself(folder):
    root = folder / "train"
    assert torch.equal(load_data(root, progress=False).images, load_data(folder, progress=False).images)
    with pytest.raises(DataError, match="has no 'test' split; expected the directory"):
        load_data(root, "test", progress=False)


def test_constant_channels_are_not_divided_by_zero(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4), (7, 7, 7)).save(tmp_path / "a" / "0.png")
    x, _ = next(iter(load_data(tmp_path, progress=False).batches(1)))
    assert x.abs().max() == 0


def test_images_of_another_size_are_named_with_their_size(folder):
    write_images(folder / "train" / "cat", 1, size=(9, 7))
    with pytest.raises(DataError, match=r"cat/000\.png is 9×7 pixels but .*ant/000\.png is 6×5"):
        load_data(folder, progress=False)


def test_splits_with_different_classes_are_refused(folder):
    write_images(folder / "test" / "cat", 1)
    with pytest.raises(DataError, match="different classes: 'cat' is only in the test split"):
        load_data(folder, "test", progress=False)
    write_images(folder / "train" / "cat", 1)
    write_images(folder / "train" / "dog", 1)
    with pytest.raises(DataError, match="'dog' is only in the training split"):
        load_data(folder, "test", progress=False)


def test_files_that_are_not_images_are_named(folder):
    (folder / "train" / "ant" / "001.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"ant/001\.png cannot be read as an image"):
        load_data(folder, progress=False)
    (folder / "train" / "ant" / "001.png").write_bytes((folder / "train" / "ant" / "000.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"ant/001\.png cannot be read as an image"):
        load_data(folder, progress=False)


def test_missing_directories_and_classes_are_explained(tmp_path):
    with pytest.raises(DataError, match="'digit' is neither 'digits' nor 'cifar10' nor a directory"):
        load_data("digit")
    with pytest.raises(DataError, match=r"is not a folder of images .*expected .*/CLASS/\*\.png"):
        load_data(tmp_path)
    (tmp_path / "ant").mkdir()
    with pytest.raises(DataError, match="Found no valid file for the classes ant"):
        load_data(tmp_path)


def test_bad_options_are_refused():
    # The tests' own check of types would catch the choice before the library does.
    for load, source in ((load_digits, ()), (load_image_folder, (".",))):
        with pytest.raises(OptionError, match="split='tset' is not a choice: did you mean 'test'"):
            inspect.unwrap(load)(*source, "tset")
    with pytest.raises(OptionError, match="limit=0 must be at least 1"):
        load_data("digits", limit=0)


@pytest.mark.skipif("LMC_CIFAR10" not in os.environ, reason="LMC_CIFAR10 names no archive cifar10/SPLIT/CLASS/*.jpg")
def test_cifar10_jpeg_files(tmp_path):
    with tarfile.open(os.environ["LMC_CIFAR10"]) as archive:
        endings = tuple(f"00{number:02d}.jpg" for number in range(20))
        archive.extractall(tmp_path, [each for each in archive if each.name.endswith(endings)], filter="data")
    data = load_data(tmp_path / "cifar10", progress=False)
    assert data.images.shape[1:] == (3, 32, 32)
    assert data.class_names[0] == "airplane"
    assert len(data.class_names) == 10
    # The statistics everybody uses for CIFAR-10, within what a few hundred images allow.
    assert torch.allclose(data.mean, torch.tensor([0.491, 0.482, 0.447]), atol=0.05)
    assert torch.allclose(data.std, torch.tensor([0.247, 0.243, 0.262]), atol=0.03)


class FakeCIFAR10:
    """What torchvision's class gives, for a directory that holds the archive."""

    classes = ("plane", "car", "bird")

    def __init__(self, root, train, download):
        assert download
        if root.name != "there":
            raise RuntimeError("Dataset not found or corrupted.")
        generator = np.random.default_rng(int(train))
        self.data = generator.integers(0, 256, (6 if train else 3, 32, 32, 3), dtype=np.uint8)
        self.targets = [0, 1, 2] * (2 if train else 1)


def test_cifar10_comes_through_torchvision(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
    monkeypatch.chdir(tmp_path)
    train, test = load_data("cifar10:there"), load_data("cifar10:there", "test")
    assert (train.images.shape, test.images.shape) == ((6, 3, 32, 32), (3, 3, 32, 32))
    original = FakeCIFAR10(Path("there"), False, True).data
    assert np.array_equal(test.images[1, :, 4, 5].numpy(), original[1, 4, 5])
    assert torch.equal(train.mean, test.mean)
    assert train.mean.numpy() == pytest.approx(
        FakeCIFAR10(Path("there"), True, True).data.mean((0, 1, 2)) / 255, abs=1e-6
    )
    assert test.class_names == FakeCIFAR10.classes
    with pytest.raises(DataError, match=r"CIFAR-10 is not in elsewhere and cannot be downloaded \(Dataset not found"):
        load_data("cifar10:elsewhere")


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_images_of_more_than_eight_bits_are_refused(tmp_path, mode):
    (tmp_path / "train" / "a").mkdir(parents=True)
    path = tmp_path / "train" / "a" / ("0.png" if mode == "I;16" else "0.tiff")
    Image.new(mode, (4, 4), 1000).save(path)
    with pytest.raises(DataError, match="more than eight bits"):
        load_data(tmp_path, progress=False)
