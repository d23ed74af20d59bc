"""Networks by name: the project's own, those of other libraries, or what any importable function returns."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from lmc_curvature.errors import ConfigurationError, suggest
from lmc_curvature.sources.libraries import timm_factory, torchvision_factory, transformers_factory
from lmc_curvature.sources.resnets import cifar_resnet18, digits_resnet, resnet, resnet20

_FACTORIES: dict[str, Callable[..., nn.Module]] = {
    "digits-resnet": digits_resnet,
    "resnet20": resnet20,
    "cifar-resnet18": cifar_resnet18,
    "resnet": resnet,
}
_LIBRARIES = {"torchvision": torchvision_factory, "timm": timm_factory, "transformers": transformers_factory}


def make_model(spec: str, /, **options: Any) -> nn.Module:
    """Build a network from its name.

    Args:
        spec: One of `model_names()`; `torchvision:NAME` for a classification network of torchvision, or `timm:NAME`
            for one of timm, with fresh weights; `transformers:DIRECTORY` for the network that a directory's
            `config.json` describes, a causal language model or a classifier of texts or images; or
            `package.module:factory` for any importable function or class that returns a module.
        **options: Passed to the factory, e.g. `num_classes=10`; for `transformers:DIRECTORY`, entries of the
            configuration, e.g. `num_labels=10`.

    Returns:
        The network, initialised from torch's global random state.

    Raises:
        ConfigurationError: The name is unknown, the factory does not take an option or its value, or what it
            returns is not a module.
    """
    factory = _find_factory(spec)
    _check_option_names(spec, factory, options)
    try:
        model = factory(**options)
    except ConfigurationError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"model {spec!r} refuses its options {options}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model {spec!r} returned {type(model).__name__}; expected a torch.nn.Module.")
    return model


def model_names() -> list[str]:
    """Return the names of the project's own networks, which `make_model` builds."""
    return list(_FACTORIES)


def _find_factory(spec: str) -> Callable[..., nn.Module]:
    source, colon, name = spec.partition(":")
    if colon and source in _LIBRARIES:
        return _LIBRARIES[source](name)
    if colon:
        return import_function(spec, what=f"model {spec!r}")
    if spec not in _FACTORIES:
        raise ConfigurationError(
            f"model {spec!r} is unknown: {suggest(spec, _FACTORIES)} Networks from elsewhere are written "
            "'torchvision:NAME', 'timm:NAME', 'transformers:DIRECTORY' or 'package.module:factory'."
        )
    return _FACTORIES[spec]


def import_function(spec: str, *, what: str, also: tuple[type, ...] = ()) -> Any:
    """Import a function or class.

    Args:
        spec: Its name, `package.module:factory`.
        what: The beginning of messages: the place where the name was given.
        also: Types of what may be imported, too, though it cannot be called.

    Raises:
        ConfigurationError: The module cannot be imported, or has no such function.
    """
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(
            f"{what}: the module {module_name!r} cannot be imported ({error}). Expected package.module:factory."
        ) from error
    function = getattr(module, name, None)
    if not callable(function) and not isinstance(function, also):
        public = [entry for entry, value in vars(module).items() if callable(value) and not entry.startswith("_")]
        hint = suggest(name, public) if public else "the module defines no functions."
        raise ConfigurationError(f"{what}: the module {module_name!r} has no function {name!r}: {hint}")
    return function


def _check_option_names(spec: str, factory: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:
        # Some callables written in C have no signature; the call itself then says what is wrong.
        return
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in options:
        if name not in parameters:
            hint = suggest(name, parameters) if parameters else "it takes none."
            raise ConfigurationError(f"model {spec!r} has no option {name!r}: {hint}")
