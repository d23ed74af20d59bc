"""Networks that other libraries build by name, with fresh weights: torchvision's, timm's and Hugging Face's.

The weights of both networks come from checkpoints, so nothing is downloaded, and no code of a directory is run.
"""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lmc_curvature.errors import ConfigurationError, suggest
from lmc_curvature.storage import parse_json

_ENDINGS = {
    "CausalLM": ("ForCausalLM", "LMHeadModel"),
    "SequenceClassification": ("ForSequenceClassification",),
    "ImageClassification": ("ForImageClassification", "ForImageClassificationWithTeacher"),
}
"""What networks of Hugging Face do, and how the names of their classes end."""


def torchvision_factory(name: str) -> Callable[..., nn.Module]:
    """The factory of a classification network of torchvision.

    Raises:
        ConfigurationError: There is no such network.
    """
    from torchvision import models

    # Detection and segmentation networks are left out: their outputs are not logits of one label per image.
    names = models.list_models(module=models)
    if name not in names:
        raise ConfigurationError(f"torchvision has no classification network {name!r}: {suggest(name, names)}")
    return _fresh(functools.partial(models.get_model, name), f"torchvision:{name}", weights=None)


def timm_factory(name: str) -> Callable[..., nn.Module]:
    """The factory of a network of timm, whose options are those of `timm.create_model`.

    Raises:
        ConfigurationError: There is no such network, or timm is not installed.
    """
    try:
        # By name: a type checker that follows it reads for half a minute.
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigurationError(
            f"model 'timm:{name}' needs the package timm ({error}): pip install lmc-curvature[timm]."
        ) from error
    # Names of other places, such as hf-hub:…, would be downloaded from there.
    if not timm.is_model(name):
        raise ConfigurationError(f"timm has no network {name!r}: {suggest(name, timm.list_models())}")
    return _fresh(functools.partial(timm.create_model, name), f"timm:{name}", pretrained=False, checkpoint_path="")


def transformers_factory(directory: str) -> Callable[..., nn.Module]:
    """The factory of the network that a directory's `config.json` describes, as Hugging Face's library writes it.

    Its options replace entries of the configuration. Called with inputs alone, the network returns its logits.

    Raises:
        ConfigurationError: The directory describes no network of a known kind, or transformers is not installed.
    """
    name, kind = _class_of(directory)
    what = f"model 'transformers:{directory}'"
    try:
        # By name, as timm.
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigurationError(
            f"{what} needs the package transformers ({error}): pip install lmc-curvature[transformers]."
        ) from error
    local = {"trust_remote_code": False, "local_files_only": True}

    def make(**options: Any) -> nn.Module:
        try:
            config = transformers.AutoConfig.from_pretrained(directory, **local)
            for option in options:
                if not hasattr(config, option):
                    raise ConfigurationError(f"{what} has no option {option!r}: {suggest(option, config.to_dict())}")
            config = transformers.AutoConfig.from_pretrained(directory, **local, **options)
            # Other implementations of attention need kernels from elsewhere, or have no second derivative.
            auto = getattr(transformers, f"AutoModelFor{kind}")
            model = auto.from_config(config, trust_remote_code=False, attn_implementation="eager")
        except ConfigurationError:
            raise
        # Values of a configuration are looked at by nobody before they are computed with.
        except Exception as error:
            raise ConfigurationError(f"{what} cannot be built: {error}") from error
        if type(model).__name__ != name:
            raise ConfigurationError(
                f"{what} is a {name}, and transformers knows a {type(model).__name__} in its place."
            )
        model.register_forward_hook(_logits)
        return model

    return make


def is_of_text(spec: str) -> bool:
    """Whether a model's name is that of a network of Hugging Face that reads text.

    Raises:
        ConfigurationError: It is one of Hugging Face, whose directory names no network of a known kind.
    """
    source, _, directory = spec.partition(":")
    return source == "transformers" and _class_of(directory)[1] != "ImageClassification"


def _class_of(directory: str) -> tuple[str, str]:
    """The class that a directory's `config.json` names, and what its networks do."""
    path = Path(directory) / "config.json"
    what = f"model 'transformers:{directory}'"
    try:
        (name,) = parse_json(path.read_text(encoding="utf-8"))["architectures"]
    except OSError as error:
        raise ConfigurationError(
            f"{what}: {path} cannot be read ({error.strerror}); expected a directory that save_pretrained wrote."
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigurationError(
            f"{what}: {path} does not name one class under 'architectures', as save_pretrained writes it."
        ) from error
    kind = kind_of(str(name))
    if kind is None:
        raise ConfigurationError(
            f"{what} is a {name}; expected a network for {', '.join(_ENDINGS)}. Another is named by "
            "package.module:factory."
        )
    return str(name), kind


def kind_of(name: str) -> str | None:
    """What a network of Hugging Face does, by the name of its class: `"CausalLM"`, …; None for any other class."""
    return next((kind for kind, endings in _ENDINGS.items() if name.endswith(endings)), None)


def _logits(_model: nn.Module, _inputs: Any, output: Any) -> Any:
    """The logits alone where no labels were given, as a loss of output and target takes them."""
    return output if getattr(output, "loss", None) is not None else output.logits


def _fresh(factory: Callable[..., nn.Module], what: str, **without: Any) -> Callable[..., nn.Module]:
    """The factory with options that keep it from loading weights, which may not be given."""

    def make(**options: Any) -> nn.Module:
        for name in without:
            if name in options:
                raise ConfigurationError(f"model {what!r}: leave out {name!r}, the weights come from checkpoints.")
        return factory(**options, **without)

    return make
