"""Claim: the command line takes the losses, metrics and images that networks were trained with."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2

from lmc_curvature import BatchLoss, measure_barrier
from lmc_curvature.sources import load_data
from tests.sources.test_data import write_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUMBERS = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
HERE = __name__


def make(outputs=2):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 5 * 5, 4), nn.Tanh(), nn.Linear(4, outputs))


_BACKBONE = nn.Sequential(nn.Flatten(), nn.Linear(75, 4))


def shared():
    return nn.Sequential(_BACKBONE, nn.Tanh(), nn.Linear(4, 2))


def regression():
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(6, 75, generator=generator), torch.randn(6, 2, generator=generator)) for _ in range(2)]


def decisions():
    return [(x, (y[:, :1] > 0).float()) for x, y in regression()]


def smooth(output, target):
    return nn.functional.smooth_l1_loss(output, target)


of_batches = BatchLoss(lambda model, batch: ((model(batch[0]) - batch[1]) ** 2).mean())
transform = v2.Compose(
    [v2.Resize(5), v2.CenterCrop(5), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
)


def _networks(folder, **options):
    torch.manual_seed(1)
    networks = [make(**options) for _ in range(2)]
    paths = [folder / name for name in ("a.safetensors", "b.safetensors")]
    for path, network in zip(paths, networks, strict=True):
        save_file(network.state_dict(), path)
    return networks, [*paths, "--model", f"{HERE}:make", *(f"--model-option={k}={v}" for k, v in options.items())]


@pytest.fixture
def images(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for seed, name in enumerate(("ant", "bee")):
            write_images(tmp_path / "images" / split / name, count, seed=seed, size=(7 + seed, 9))
    return tmp_path / "images"


def _curve(out, metric="loss"):
    return json.loads(out)["metrics"][metric]["curve"]


@pytest.mark.check
@pytest.mark.parametrize(
    ("loss", "loss_fn"),
    [
        ("mse", nn.functional.mse_loss),
        (f"{HERE}:smooth", smooth),
        ("torch.nn:L1Loss", nn.L1Loss()),
    ],
)
def test_losses_of_regressions(run, tmp_path, loss, loss_fn):
    networks, common = _networks(tmp_path)
    expected = measure_barrier(*networks, regression(), loss_fn=loss_fn, metrics=("loss",), alphas=3, progress=False)
    options = ["--data", f"{HERE}:regression", "--loss", loss, "--alphas", 3, "--json", "--no-progress"]
    status, out, _ = run("measure", *common, *options, *([] if loss == "mse" else ["--metrics", "loss"]))
    assert status == 0
    assert _curve(out) == pytest.approx(expected.curve().tolist(), abs=1e-6)
    assert list(json.loads(out)["metrics"]) == ["loss"]
    status, out, _ = run("predict", *common, *options[:4], "--json", "--no-progress", "--no-witness")
    assert json.loads(out)["losses"] == pytest.approx(list(expected.ends()), rel=1e-5)


@pytest.mark.parametrize("command", ["measure", "predict"])
def test_a_factory_that_shares_a_module_between_networks_is_refused(run, tmp_path, command):
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path in paths:
        nn.init.normal_(_BACKBONE[1].weight)
        save_file(shared().state_dict(), path)
    options = ["--data", f"{HERE}:regression", "--loss", "mse", "--metrics", "loss"][: 6 if command == "measure" else 4]
    status, out, err = run(command, *paths, "--model", f"{HERE}:shared", *options)
    assert (status, out) == (2, "")
    assert f"--model {HERE}:shared made two networks that share '0.1.weight'" in " ".join(err.split())


def test_a_loss_of_whole_batches(run, tmp_path):
    networks, common = _networks(tmp_path)
    expected = measure_barrier(*networks, regression(), loss_fn=nn.MSELoss(), metrics=("loss",), alphas=3)
    options = ["--data", f"{HERE}:regression", "--loss", f"{HERE}:of_batches", "--alphas", 3, "--json"]
    _, out, _ = run("measure", *common, *options, "--no-progress")
    assert _curve(out) == pytest.approx(expected.curve().tolist(), abs=1e-6)


def test_binary_decisions_have_an_error(run, tmp_path):
    networks, common = _networks(tmp_path, outputs=1)
    loss_fn = nn.functional.binary_cross_entropy_with_logits
    expected = measure_barrier(*networks, decisions(), loss_fn=loss_fn, alphas=3, progress=False)
    options = ["--data", f"{HERE}:decisions", "--loss", "bce", "--alphas", 3, "--no-progress", "--json"]
    _, out, _ = run("measure", *common, *options)
    for metric in ("loss", "error"):
        assert _curve(out, metric) == pytest.approx(expected.curve(metric).tolist(), abs=1e-6)
    _, out, _ = run("measure", *common, *options, "--metrics", "error")
    assert list(json.loads(out)["metrics"]) == ["error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # Names are the library's to check, and the tests' own check of types would catch them before.
        (["--metrics", "eror"], "metrics='eror' is not a choice: did you mean 'error'"),
        (["--loss", "mse", "--metrics", "loss,error"], "--metrics loss on the command line"),
        (["--loss", f"{HERE}:of_batches", "--metrics", "error"], "A BatchLoss yields a loss only"),
        (["--loss", "mes"], "loss 'mes' is unknown: did you mean 'mse'"),
        (["--mean", "0.5", "--std", "0.2"], f"--mean is for images known by name; {HERE}:regression makes its own"),
        (["--transform", f"{HERE}:transform"], "--transform is for images known by name"),
        (["--batch-size", "3"], "--batch-size is for images known by name"),
        (["--limit", "5"], "--limit is for images known by name"),
        (["--split", "test"], "--split is for images known by name"),
    ],
)
def test_mistakes_in_losses_and_metrics(run, tmp_path, untyped, options, message):
    _, common = _networks(tmp_path)
    status, out, err = run("measure", *common, "--data", f"{HERE}:regression", "--no-progress", *options)
    assert (status, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("how", [[*NUMBERS, "--resize", "5"], ["--transform", f"{HERE}:transform"]])
@pytest.mark.parametrize("split", ["train", "test"])
def test_images_come_as_in_training(run, tmp_path, images, how, split):
    networks, common = _networks(tmp_path)
    loader = load_data(images, split, mean=MEAN, std=STD, resize=5, progress=False).batches(3)
    expected = measure_barrier(*networks, loader, alphas=3, progress=False)
    options = ["--split", split, "--batch-size", 3, "--alphas", 3, "--no-progress", "--json"]
    status, out, err = run("measure", *common, "--data", images, *options, *how)
    assert (status, err) == (0, "")
    assert _curve(out) == pytest.approx(expected.curve().tolist(), abs=1e-5)


def test_a_folders_own_statistics_are_said(run, tmp_path, images):
    networks, common = _networks(tmp_path)
    data = load_data(images, resize=(6, 5), progress=False)
    expected = measure_barrier(*networks, data.batches(256), alphas=3, progress=False)
    with pytest.warns(UserWarning, match="trained with others need --mean and --std, or --transform") as warned:
        _, out, _ = run(
            "measure", *common, "--data", images, "--resize", "6,5", "--alphas", 3, "--no-progress", "--json"
        )
    assert f"mean {data.mean[0]:.3f}," in str(warned[0].message)
    assert _curve(out) == pytest.approx(expected.curve().tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mean", "0.5"], "--mean is given alone: images are normalised by --mean and --std"),
        (["--mean", "0.5", "--std", "x"], "--std 'x': expected a number a channel"),
        (["--mean", "123", "--std", "58"], "mean=(123.0,): 123.0 is not the mean of pixels scaled to [0, 1]"),
        (["--mean", "0.5,0.5", "--std", "0.2"], "has 2 numbers, and the images 3 channels"),
        (["--resize", "5,4,3"], "--resize '5,4,3': expected SIZE or SIZE,CROP"),
        (["--resize", "4,5"], "resize=(4, 5): expected the pixels of the shorter side"),
        (["--resize", "5", "--transform", f"{HERE}:transform"], "--resize is part of what --transform does"),
        (["--transform", f"{HERE}:transfrm"], "did you mean 'transform'"),
        (["--transform", "torch:zeros"], "transform cannot be called with an image"),
        (["--data", "digits", "--transform", f"{HERE}:transform"], "--transform is for folders of images; digits"),
        (["--data", "digits", "--resize", "5"], "resize=5 is for folders of images"),
    ],
)
def test_mistakes_in_the_preparation_of_images(run, tmp_path, images, options, message):
    _, common = _networks(tmp_path)
    status, out, err = run("measure", *common, "--data", images, "--no-progress", *options)
    assert (status, out) == (2, "")
    assert message in err


@pytest.mark.check
def test_threads_are_those_asked_for_and_no_more_afterwards(run, tmp_path):
    _, common = _networks(tmp_path)
    before = torch.get_num_threads()
    asked = before + 1
    options = ["--data", f"{HERE}:regression", "--loss", "mse", "--alphas", 3, "--no-progress", "--json"]
    _, out, _ = run("measure", *common, *options, "--threads", asked)
    assert json.loads(out)["provenance"]["options"]["threads"] == asked
    assert torch.get_num_threads() == before
    assert run("measure", *common, *options, "--threads", 0)[0] == 2


SIGNATURES = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.mark.check
@pytest.mark.parametrize("command", ["predict", "measure"])
def test_results_are_drawn(run, tmp_path, command):
    _, common = _networks(tmp_path)
    for kind, signature in SIGNATURES.items():
        file = tmp_path / "new" / f"figure.{kind}"
        options = ["--data", f"{HERE}:regression", "--loss", "mse", "--no-progress", "--plot", file]
        status, out, _ = run(command, *common, *options)
        assert status == 0
        assert out
        assert file.read_bytes().startswith(signature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "figure.xyz"], "--plot figure.xyz: expected a file name that ends in"),
        (["--plot", "figure"], "expected a file name that ends in .eps"),
        (["--plot", "x.png", "--save", "x.png"], "--save and --plot would write one file, x.png"),
        (["--plot", "a.safetensors"], "--plot a.safetensors would replace a network"),
    ],
)
def test_figures_that_cannot_be_written_are_refused_at_once(run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    _, common = _networks(tmp_path)
    status, out, err = run("measure", *common, "--data", "no.such:data", *options)
    assert (status, out) == (2, "")
    assert message in err
