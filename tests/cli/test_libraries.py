"""Claim: networks of timm and of Hugging Face go through the commands by their names, with the data that they take."""

import json
import re
import shutil

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
    assert (tmp_path / "merged" / "config.json").is_file()
    # Without --out the command that writes it is told, of a folder again.
    status, out, err = run("select", first, second, *named, "--budget", 10, "--measurements", 0)
    assert (status, json.loads(out)["merge"].endswith("--out merged")) == (0, True), err
    merged = load_checkpoint(make_gpt2(2), tmp_path / "merged").state_dict()
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(merged[name], (tensor + models[1].state_dict()[name]) / 2)


def test_two_folders_become_a_folder_that_from_pretrained_loads(directories, run, tmp_path):
    models, (first, second) = directories
    folders = [tmp_path / name for name in "ab"]
    for source, folder in zip((first, second), folders, strict=True):
        shutil.copytree(source, folder)
    (folders[1] / "tokenizer.json").write_text('{"of": "b"}')
    for name in ("trainer_state.json", "model.safetensors.index.json", "pytorch_model.pt", "README.md"):
        (folders[0] / name).write_text("{}")
    (folders[0] / "model.safetensors.index.json").unlink()
    (folders[0] / "checkpoint-3").mkdir()
    # A name with a point in it is that of a folder, too.
    status, said, err = run("merge", *folders, "--out", f"{tmp_path / 'merged-1.5'}/", "--base", "b")
    assert status == 0, err
    assert f"merged: {tmp_path / 'merged-1.5'}; moved from B" in said
    written = {path.name for path in (tmp_path / "merged-1.5").iterdir()}
    assert written == {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged-1.5")
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, (models[0].state_dict()[name] + models[1].state_dict()[name]) / 2)
    # What is there is not written into, not even by force.
    status, _, err = run("merge", *folders, "--out", tmp_path / "merged-1.5", "--force")
    assert (status, "exists already: expected a new folder, or an empty one" in err) == (2, True)
    # A file where a file is asked for.
    assert run("merge", *folders, "--out", tmp_path / "m.safetensors")[0] == 0
    assert (tmp_path / "m.safetensors").is_file()


def test_a_merge_that_fails_leaves_no_folder(directories, run, tmp_path):
    _, (first, _) = directories
    broken = make_gpt2(0)
    with torch.no_grad():
        broken.transformer.ln_f.bias[0] = float("nan")
    broken.save_pretrained(tmp_path / "b")
    status, _, err = run("merge", first, tmp_path / "b", "--out", tmp_path / "out")
    assert (status, "not a number" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_images_are_no_texts(directories, run):
    _, (first, second) = directories
    status, out, err = run("predict", first, second, "--model", f"transformers:{first}", "--data", "digits")
    assert (status, out) == (2, "")
    assert "reads text, and --data digits are images. Pass --data package.module:factory" in err
    assert "--loss own or, of causal language models, next-token" in err


@pytest.mark.check
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


def test_each_folder_is_computed_by_its_own_settings(directories, run, tmp_path):
    _, (first, second) = directories
    other = tmp_path / "other"
    shutil.copytree(second, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "layer_norm_epsilon": 0.5}))
    named = ["--model", f"transformers:{first}", "--data", f"{__name__}:texts", "--loss", "next-token"]
    status, _, err = run("measure", first, other, *named, "--alphas", 3)
    assert status == 2
    assert "eps" in err
    difference = "differ in layer_norm_epsilon (1e-05, 0.5): are they one architecture?"
    status, out, err = run("check", first, other)
    assert (status, difference in " ".join(out.split())) == (0, True), err
    with pytest.warns(UserWarning, match=re.escape(difference)):
        status, _, err = run("merge", first, other, "--out", tmp_path / "merged")
    assert status == 0, err
