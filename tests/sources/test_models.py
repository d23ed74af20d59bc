"""Claim: networks are built by name, wherever they come from, and a wrong name or option is named."""

import json
import types

import pytest
import torch
from torch import nn

from lmc_curvature.checkpoints import load_checkpoint
from lmc_curvature.errors import ConfigurationError
from lmc_curvature.sources import make_model, model_names
from lmc_curvature.sources.libraries import is_of_text


@pytest.mark.parametrize("spec", model_names())
def test_every_name_builds_a_network_with_the_classes_asked_for(spec):
    (*_, last) = (module for module in make_model(spec, num_classes=3).modules() if isinstance(module, nn.Linear))
    assert last.out_features == 3


def test_torchvision_and_imported_factories():
    assert make_model("torchvision:resnet18", num_classes=7).fc.out_features == 7
    assert isinstance(make_model("torch.nn:Linear", in_features=2, out_features=3), nn.Linear)


def test_networks_of_timm():
    timm = pytest.importorskip("timm")
    model = make_model("timm:test_resnet", num_classes=7)
    torch.manual_seed(0)
    expected = timm.create_model("test_resnet", num_classes=7).state_dict()
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForSequenceClassification", "ViTForImageClassification"])
def test_networks_of_a_directory_that_hugging_face_wrote(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    sizes |= {"vocab_size": 16, "image_size": 8, "patch_size": 4, "num_labels": 3, "max_position_embeddings": 16}
    sizes = {"vocab_size": 16, "n_embd": 8, "n_layer": 1, "n_head": 2} if name.startswith("GPT2") else sizes
    model = kind(kind.config_class(**sizes)).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path
    if name.startswith("ViT"):
        # transformers 5 writes these under the names that its version 4 had.
        torch.save(model.state_dict(), file := tmp_path / "weights.pt")
    found = load_checkpoint(make_model(f"transformers:{tmp_path}"), file).eval()
    assert type(found) is kind
    inputs = torch.rand(2, 3, 8, 8) if name.startswith("ViT") else torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        # Called as a network that takes inputs alone, and as its own library calls it, with labels.
        torch.testing.assert_close(found(inputs), model(inputs).logits)
        labels = {"labels": inputs if name.startswith("GPT2") else torch.tensor([0, 2])}
        batch = {model.main_input_name: inputs, **labels}
        torch.testing.assert_close(found(**batch).loss, model(**batch).loss)
    assert is_of_text(f"transformers:{tmp_path}") == (not name.startswith("ViT"))
    if not name.startswith("GPT2"):
        assert make_model(f"transformers:{tmp_path}", num_labels=5).config.num_labels == 5
    with pytest.raises(ConfigurationError, match="has no option 'initializer_rnge': did you mean 'initializer_range'"):
        make_model(f"transformers:{tmp_path}", initializer_rnge=5)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "config.json cannot be read .No such file or directory.; expected a directory that save_pretrained"),
        ("not JSON", "does not name one class under 'architectures'"),
        ({"model_type": "gpt2"}, "does not name one class under 'architectures'"),
        ({"architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM; expected a network for CausalLM"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_head": 3}, "transformers:.*divisible"),
        ({"architectures": ["MyForCausalLM"], "model_type": "gpt2"}, "knows a GPT2LMHeadModel in its place"),
        (
            {"architectures": ["MyForCausalLM"], "model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}},
            "transformers:.*(custom code|trust_remote_code)",
        ),
    ],
)
def test_directories_that_describe_no_network(contents, message, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "code.py").write_text("raise SystemExit('code of a directory was run')")
    if contents is not None:
        text = (
            contents if isinstance(contents, str) else json.dumps({"n_embd": 8, "n_layer": 1, "n_head": 1, **contents})
        )
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        make_model(f"transformers:{tmp_path}")


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_libraries_that_are_missing_are_named_with_their_extra(package, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ConfigurationError, match=rf"pip install lmc-curvature\[{package}\]"):
        make_model(f"{package}:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("digit-resnet", {}, "model 'digit-resnet' is unknown: did you mean 'digits-resnet'"),
        ("torchvision:resnet19", {}, "no classification network 'resnet19': did you mean 'resnet1"),
        ("torchvision:resnet18", {"num_klasses": 3}, "torchvision:resnet18.*num_klasses"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "leave out 'weights', the weights come from checkpoints"),
        ("timm:test_resnt", {}, "timm has no network 'test_resnt': did you mean 'test_res"),
        ("timm:hf-hub:timm/resnet18", {}, "timm has no network 'hf-hub:timm/resnet18'"),
        ("timm:test_resnet", {"num_klasses": 3}, "timm:test_resnet.*num_klasses"),
        ("timm:test_resnet", {"pretrained": True}, "leave out 'pretrained'"),
        ("resnet20", {"num_class": 3}, "'resnet20' has no option 'num_class': did you mean 'num_classes'"),
        ("resnet", {"depth": 21}, r"'resnet'.*depth=21 is not 6n \+ 2"),
        ("resnet", {"width": 0}, "width=0 must be at least 1"),
        ("no_such_package:f", {}, "module 'no_such_package' cannot be imported"),
        (":f", {}, "module '' cannot be imported"),
        ("torch.nn:Linea", {}, "'torch.nn' has no function 'Linea': did you mean 'Linear'"),
        ("torch.nn:Linear", {"in_features": 3}, "out_features"),
        ("builtins:dict", {}, "returned dict; expected a torch.nn.Module"),
    ],
)
def test_errors_name_the_entry_and_what_would_be_right(spec, options, message):
    with pytest.raises(ConfigurationError, match=message):
        make_model(spec, **options)


def test_an_error_inside_a_factory_is_not_disguised(monkeypatch):
    module = types.ModuleType("broken_factory")

    def factory():
        raise KeyError("inside")

    module.factory = factory
    monkeypatch.setitem(__import__("sys").modules, "broken_factory", module)
    with pytest.raises(KeyError, match="inside"):
        make_model("broken_factory:factory")
