"""Claim: networks are built by name, wherever they come from, and a wrong name or option is named."""

import types

import pytest
from torch import nn

from lmc_curvature.errors import ConfigurationError
from lmc_curvature.sources import make_model, model_names


@pytest.mark.parametrize("spec", model_names())
def test_every_name_builds_a_network_with_the_classes_asked_for(spec):
    (*_, last) = (module for module in make_model(spec, num_classes=3).modules() if isinstance(module, nn.Linear))
    assert last.out_features == 3


def test_torchvision_and_imported_factories():
    assert make_model("torchvision:resnet18", num_classes=7).fc.out_features == 7
    assert isinstance(make_model("torch.nn:Linear", in_features=2, out_features=3), nn.Linear)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("digit-resnet", {}, "model 'digit-resnet' is unknown: did you mean 'digits-resnet'"),
        ("torchvision:resnet19", {}, "no classification network 'resnet19': did you mean 'resnet1"),
        ("torchvision:resnet18", {"num_klasses": 3}, "torchvision:resnet18.*num_klasses"),
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
