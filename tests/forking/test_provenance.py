"""Claim: an experiment goes on with the data it was begun with, wherever they lie now, and with no others."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lmc_curvature.errors import CheckpointError, ConfigurationError, DataError, NewerVersionError
from lmc_curvature.forking import ForkConfig, load_fork_data, open_directory, run_forks
from lmc_curvature.forking.directory import create_directory
from lmc_curvature.forking.provenance import begin
from lmc_curvature.sources import load_data


@pytest.fixture
def images(tmp_path):
    """A folder of images, sixteen for training and eight for testing."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name in ("ant", "bee"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def config(images):
    return ForkConfig(
        training={"epochs": 2, "learning_rate": 0.1, "batch_size": 8},
        fork_epochs=[0],
        data=str(images),
        model="tests.support.experiments:tiny",
        model_options={"num_classes": 2, "in_channels": 3},
        trace={"batch_size": 8, "alphas": 3, "layer_alphas": 3},
    )


@pytest.fixture
def out(config, tmp_path):
    """An experiment of which a child is still to be trained."""
    run_forks(config, tmp_path / "out", progress=False)
    (tmp_path / "out" / "fork-0000" / "child-1" / "epoch-0002.safetensors").unlink()
    return tmp_path / "out"


def change_one_pixel(images, split):
    path = images / split / "bee" / "2.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def moved(config, images):
    images.rename(images.with_name("elsewhere"))
    return config.model_copy(update={"data": str(images.with_name("elsewhere"))})


@pytest.mark.parametrize("change", ["a pixel", "a label"])
def test_data_that_changed_are_refused(config, images, out, change):
    if change == "a pixel":
        change_one_pixel(images, "train")
    else:
        (images / "train" / "bee" / "0.png").rename(images / "train" / "ant" / "8.png")
    for proceed in (lambda: run_forks(config, out, progress=False), lambda: load_fork_data(out, progress=False)):
        with pytest.raises(DataError, match=r"images' has other images or labels in its train split .*begun with"):
            proceed()


def test_data_that_moved_are_taken_where_they_are(config, images, out):
    now = moved(config, images)
    run_forks(now, out, progress=False)
    # Whoever comes next need not be told again.
    assert open_directory(out).config == now


def test_other_data_in_another_place_are_refused_and_not_remembered(config, images, out):
    now = moved(config, images)
    change_one_pixel(images.with_name("elsewhere"), "train")
    with pytest.raises(DataError, match=r"elsewhere' has other images"):
        run_forks(now, out, progress=False)
    assert open_directory(out).config == config


def test_a_directory_without_a_record_knows_its_data_by_their_place(config, images, out):
    # As releases left it that recorded nothing.
    (out / "provenance.json").unlink()
    with pytest.raises(ConfigurationError, match=r"another configuration:\ndata: .*images.* there, .*elsewhere.* now"):
        run_forks(moved(config, images), out, progress=False)
    images.with_name("elsewhere").rename(images)
    trace = config.trace.model_copy(update={"alphas": 5})
    run_forks(config.model_copy(update={"trace": trace}), out, progress=False)
    assert json.loads((out / "provenance.json").read_text())["data"].keys() == {"train", "test"}


def test_a_place_without_data_can_be_corrected(config, images, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        run_forks(config.model_copy(update={"data": "nowhere"}), tmp_path / "out", progress=False)
    run_forks(config, tmp_path / "out", progress=False)
    assert open_directory(tmp_path / "out").config.data == str(images)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda test: shutil.rmtree(test), "has no 'test' split"),
        (lambda test: shutil.rmtree(test / "bee"), "'bee' is only in the training split"),
        (lambda test: [path.unlink() for path in test.glob("*/*.png")], "test is not a folder of images"),
    ],
)
def test_a_test_split_that_traces_will_need_is_checked_before_training(config, images, tmp_path, damage, message):
    damage(images / "test")
    with pytest.raises(DataError, match=f"{message}.*set trace.test to false"):
        run_forks(config, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "parent").exists()
    trace = config.trace.model_copy(update={"test": False})
    run_forks(config.model_copy(update={"trace": trace}), tmp_path / "out", progress=False)


@pytest.mark.parametrize("recorded", [True, False])
def test_going_on_with_another_release_is_told(config, out, recorded):
    path = out / "provenance.json" if recorded else out / "parent" / "manifest.json"
    contents = json.loads(path.read_text())
    contents["made_with"] |= {"torch": "1.0", "device": "abacus"}
    path.write_text(json.dumps(contents))
    if not recorded:
        (out / "provenance.json").unlink()
    with pytest.warns(
        UserWarning, match=rf"out was begun otherwise.*\ntorch: 1\.0 then, {re.escape(torch.__version__)} now\ndevice"
    ):
        run_forks(config, out, progress=False)
    assert json.loads((out / "provenance.json").read_text())["made_with"]["torch"] == "1.0"


def test_going_on_with_the_same_is_not_worth_a_word(config, out, recwarn):
    run_forks(config, out, progress=False)
    assert not recwarn.list


def test_a_record_that_cannot_be_read_is_named(config, out):
    path = out / "provenance.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": "9"}))
    with pytest.raises(NewerVersionError, match=r"provenance\.json has format version '9', of a newer release"):
        run_forks(config, out, progress=False)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"provenance\.json is damaged .* Delete it if the data"):
        run_forks(config, out, progress=False)


def test_what_a_finished_experiment_is_told_is_checked_as_well(config, images, tmp_path):
    out = tmp_path / "out"
    run_forks(config, out, progress=False)
    with pytest.raises(DataError, match="nowhere"):
        run_forks(config.model_copy(update={"data": "nowhere"}), out, progress=False)
    trace = config.trace.model_copy(update={"examples": 1000})
    with pytest.raises(DataError, match="trace.examples"):
        run_forks(config.model_copy(update={"trace": trace}), out, progress=False)
    assert open_directory(out).config == config
    now = moved(config, images)
    run_forks(now, out, progress=False)
    assert open_directory(out).config == now


def test_a_finished_experiment_needs_no_data(config, images, tmp_path):
    run_forks(config, tmp_path / "out", progress=False)
    shutil.rmtree(images)
    run_forks(config, tmp_path / "out", progress=False)


def test_what_was_refused_can_be_corrected(config, tmp_path):
    wrong = config.model_copy(update={"model_options": {"num_classes": 3, "in_channels": 3}})
    with pytest.raises(ConfigurationError, match="Set num_classes to 2"):
        run_forks(wrong, tmp_path / "out", progress=False)
    run_forks(config, tmp_path / "out", progress=False)
    assert open_directory(tmp_path / "out").config == config
    with pytest.raises(ConfigurationError, match=r"another configuration:\nmodel_options"):
        run_forks(wrong, tmp_path / "out", progress=False)


@pytest.mark.parametrize("other", ["data", "configuration"])
def test_of_two_that_begin_at_once_one_does(config, images, tmp_path, other):
    data = load_data(str(images), progress=False)
    first = create_directory(tmp_path / "out", config)
    # Both have been checked before either begins.
    changed = config if other == "data" else config.model_copy(update={"order_seed": 7})
    second = create_directory(tmp_path / "out", changed)
    begin(first, {"train": data}, {})
    error, message = (
        (DataError, "has other images")
        if other == "data"
        else (ConfigurationError, r"another configuration:\norder_seed")
    )
    with pytest.raises(error, match=message):
        begin(second, {"train": data.subset(9) if other == "data" else data}, {})
    assert open_directory(tmp_path / "out").config == config
