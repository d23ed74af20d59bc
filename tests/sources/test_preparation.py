"""Claim: images come to a network as those it was trained on did, by numbers or by a function of one's own."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lmc_curvature.errors import DataError, OptionError
from lmc_curvature.sources import load_data, load_digits, load_image_folder, transformed_folder
from tests.sources.test_data import FakeCIFAR10, write_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for seed, name in enumerate(("ant", "bee")):
            write_images(tmp_path / split / name, count, seed=seed, size=(9 + 3 * seed, 12))
    return tmp_path


def _all(loader):
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


def _by_hand(path, transform):
    with Image.open(path) as image:
        return transform(image.convert("RGB"))


def test_given_statistics_normalise_instead_of_the_folders_own(folder):
    paths = sorted((folder / "test" / "ant").iterdir())
    data = load_data(folder, "test", mean=MEAN, std=STD, resize=8, progress=False)
    x, _ = next(iter(data.batches(4, order=torch.arange(4))))
    for index, path in enumerate(paths):
        pixels = np.asarray(_by_hand(path, v2.Compose([v2.Resize(8), v2.CenterCrop(8)])))
        expected = (pixels / 255 - MEAN) / STD
        assert np.allclose(x[index].permute(1, 2, 0), expected, atol=1e-5)
    assert not torch.allclose(load_data(folder, "test", resize=8, progress=False).mean, data.mean, atol=1e-3)


def test_given_statistics_need_no_training_split(folder):
    (folder / "train").rename(folder / "elsewhere")
    with pytest.raises(DataError, match="has no 'train' split"):
        load_data(folder, "test", resize=8, progress=False)
    assert len(load_data(folder, "test", mean=MEAN, std=STD, resize=8, progress=False)) == 4


@pytest.mark.parametrize(("resize", "side"), [(8, 8), ((8, 5), 5), (9, 9), (20, 20)])
def test_images_of_all_sizes_become_squares(folder, resize, side):
    data = load_image_folder(folder, resize=resize, progress=False)
    assert data.images.shape == (8, 3, side, side)
    size = resize if isinstance(resize, int) else resize[0]
    path = sorted((folder / "train" / "bee").iterdir())[1]
    scaled = _by_hand(path, v2.Compose([v2.Resize(size), v2.CenterCrop(side)]))
    assert np.array_equal(data.images[5].permute(1, 2, 0).numpy(), np.asarray(scaled))


def test_images_of_several_sizes_are_told_what_to_do(folder):
    with pytest.raises(DataError, match=r"so pass resize=SIZE \(--resize"):
        load_data(folder, progress=False)


def test_known_data_sets_take_statistics_too(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = load_data("digits", "test", 20, mean=[0.5], std=[0.25])
    assert load_data("digits", "test", 20, mean=0.5, std=0.25).fingerprint() == data.fingerprint()
    x, _ = next(iter(data.batches(20, order=torch.arange(20))))
    assert torch.allclose(x, (load_data("digits", "test", 20).images / 255 - 0.5) / 0.25, atol=1e-6)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCIFAR10)
    data = load_data("cifar10:there", mean=MEAN, std=[1.0])
    assert data.mean.tolist() == pytest.approx(MEAN)
    assert data.std.tolist() == [1.0, 1.0, 1.0]


def test_a_fingerprint_knows_the_normalisation():
    data = load_digits("test")
    assert data.normalized([0.5], [0.25]).fingerprint() != data.fingerprint()
    assert data.normalized(data.mean.tolist(), data.std.tolist()).fingerprint() == data.fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": MEAN}, "mean is given without std"),
        ({"std": STD}, "std is given without mean"),
        ({"mean": (0.5, 0.5), "std": STD}, r"mean=\(0.5, 0.5\) has 2 numbers, and the images 3 channels"),
        ({"mean": (123.7, 116.3, 103.5), "std": STD}, "123.7 is not the mean of pixels scaled to .* divide .* by 255"),
        ({"mean": MEAN, "std": (58.4,)}, "58.4 is not the std"),
        ({"mean": MEAN, "std": (0.0,)}, "0.0 is not the std"),
        ({"mean": (float("nan"),), "std": STD}, "nan is not the mean"),
        ({"resize": 0}, "resize=0: expected the pixels of the shorter side"),
        ({"resize": (8, 9)}, r"resize=\(8, 9\): expected .*such as \(256, 224\)"),
    ],
)
def test_bad_options_are_explained(folder, options, message):
    with pytest.raises(OptionError, match=message):
        load_data(folder, progress=False, **{"resize": 8, **options})


def test_what_has_one_size_is_not_resized():
    with pytest.raises(OptionError, match="resize=4 is for folders of images; those of 'digits' have one size"):
        load_data("digits", resize=4)


TRANSFORM = v2.Compose(
    [v2.Resize(8), v2.CenterCrop(8), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
)


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_transform_gives_what_the_same_numbers_give(folder, split, limit):
    loader = transformed_folder(folder, TRANSFORM, 3, split=split, limit=limit)
    plain = load_data(folder, split, limit, mean=MEAN, std=STD, resize=8, progress=False).batches(3)
    assert len(loader) == len(plain)
    for (x, y), (expected, targets) in zip(loader, plain, strict=True):
        assert torch.equal(y, targets)
        assert torch.allclose(x, expected, atol=1e-5)
    # Again, the same.
    assert torch.equal(_all(loader)[0], _all(loader)[0])


def test_a_fingerprint_of_files_is_of_their_contents_and_classes(folder, tmp_path_factory):
    loader = transformed_folder(folder, TRANSFORM, 3)
    assert loader.fingerprint() == transformed_folder(folder, lambda image: torch.zeros(1), 2).fingerprint()
    assert loader.fingerprint() != transformed_folder(folder, TRANSFORM, 3, limit=7).fingerprint()
    before, path = loader.fingerprint(), folder / "train" / "ant" / "000.png"
    path.write_bytes((folder / "train" / "bee" / "000.png").read_bytes())
    assert loader.fingerprint() != before


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image: image, "transform makes Image of .*png; expected a tensor of floating-point"),
        (v2.PILToTensor(), "transform makes torch.uint8 of"),
        (lambda: None, "transform cannot be called with an image .*from an image of Pillow to a tensor"),
        (
            v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32)]),
            r"png of shape \(3, 12, \d+\) and .*png of \(3, 12, \d+\); all must have one shape",
        ),
    ],
)
def test_what_a_transform_must_make_is_said(folder, transform, message):
    with pytest.raises(DataError, match=message):
        list(inspect.unwrap(transformed_folder)(folder, transform, 8))


def test_what_is_no_image_and_no_batch_is_said(folder):
    with pytest.raises(OptionError, match="batch_size=0"):
        transformed_folder(folder, TRANSFORM, 0)
    with pytest.raises(OptionError, match="limit=0"):
        transformed_folder(folder, TRANSFORM, 2, limit=0)
    loader = transformed_folder(folder, TRANSFORM, 2)
    (folder / "train" / "bee" / "002.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"bee/002\.png cannot be read as an image"):
        list(loader)
