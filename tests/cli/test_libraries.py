"""Claim: networks of timm and of Hugging Face go through the commands by their names, with the data that they take."""

import json

import pytest
import torch

from lmc_curvature import predict_barrier
from lmc_curvature.checkpoints import load_checkpoint
from lmc_curvature.sources import find_loss
from tests.support.texts import make_gpt2, texts

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Two language models as Hugging Face's library writes them, and the models."""
    folder = tmp_path_factory.mktemp("gpt2")
    models = [make_gpt2(seed) for seed in (0, 1)]
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(folder / name)
    return models, [str(folder / name) for name in "ab"]


@pytest.mark.check
def test_a_language_model_is_predicted_and_measured(directories, run, tmp_path):
    models, (first, second) = directories
    named = ["--model", f"transformers:{first}", "--data", f"{__name__}:texts", "--loss", "next-token", "--json"]
    options = {"loss_fn": find_loss("next-token"), "progress": False}
    expected = predict_barrier(*models, texts(), **options)
    status, out, err = run("predict", first, second, *named)
    assert status == 0, err
    record = json.loads(out)
    assert record["barrier"]["anchored"]["value"] == pytest.approx(expected.barrier(), rel=1e-5)
    assert [row["layer"] for row in record["layers"]] == list(expected.layers)
    status, out, err = run("measure", first, second, *named, "--alphas", 3)
    assert status == 0, err
    # An anchor of the prediction lies in the middle.
    assert json.loads(out)["metrics"]["loss"]["curve"][1] == pytest.approx(expected.curve([0.5])[0], rel=1e-4, abs=1e-6)
    status, out, err = run(
        "select", first, second, *named[:-1], "--budget", 10, "--measurements", 1, "--out", tmp_path / "merged"
    )
    assert status == 0, err
    merged = load_checkpoint(make_gpt2(2), tmp_path / "merged").state_dict()
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(merged[name], (tensor + models[1].state_dict()[name]) / 2)


@pytest.mark.slow
def test_images_are_no_texts(directories, run):
    _, (first, second) = directories
    status, out, err = run("predict", first, second, "--model", f"transformers:{first}", "--data", "digits")
    assert (status, out) == (2, "")
    assert "reads text, and --data digits are images. Pass --data package.module:factory" in err
    assert "--loss own or, of causal language models, next-token" in err


@pytest.mark.slow
def test_other_names_in_a_file_of_transformers_are_explained(run, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=10)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "a")
    torch.save({f"{name}x": t for name, t in model.state_dict().items()}, tmp_path / "other.pt")
    named = ["--model", f"transformers:{tmp_path / 'a'}", "--data", "digits", "--limit", 40]
    status, _, err = run("measure", tmp_path / "other.pt", tmp_path / "other.pt", *named)
    assert status == 2
    assert "torch.save(model.state_dict(), FILE) keeps these" in err
    # With the names of its modules it goes through, as a network of images.
    torch.save(model.state_dict(), tmp_path / "a.pt")
    torch.save(transformers.ViTForImageClassification(config).state_dict(), tmp_path / "b.pt")
    status, out, err = run("measure", tmp_path / "a.pt", tmp_path / "b.pt", *named, "--json")
    assert status == 0, err
    assert set(json.loads(out)["metrics"]) == {"loss", "error"}


@pytest.mark.check
def test_a_network_of_timm(run, tmp_path):
    timm = pytest.importorskip("timm")
    for name in "ab":
        torch.save(timm.create_model("test_resnet", in_chans=1, num_classes=10).state_dict(), tmp_path / f"{name}.pt")
    options = ["--model", "timm:test_resnet", "--model-option", "in_chans=1", "--model-option", "num_classes=10"]
    data = ["--data", "digits", "--limit", 40, "--json"]
    status, out, err = run("predict", tmp_path / "a.pt", tmp_path / "b.pt", *options, *data)
    assert status == 0, err
    assert json.loads(out)["examples"] == 40
