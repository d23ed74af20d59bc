"""The options of the commands, and what they stand for: two networks and their batches.

Nothing of the library is imported before an option is used, so that help and mistyped commands answer at once.
"""

import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Literal

import typer

from lmc_curvature.errors import CheckpointError, DataError, OptionError

if TYPE_CHECKING:
    from torch import nn

Checkpoint = Annotated[
    Path, typer.Argument(help="A safetensors file or a torch.save file that holds tensors only, or a folder of shards.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
ForkDir = Annotated[Path, typer.Argument(help="A directory that lmc-curvature fork wrote.")]
OtherData = Annotated[str | None, typer.Option("--data", help="Instead of the configured data, for moved folders.")]
Workers = Annotated[int, typer.Option(help="Processes that share the work; more may be started from elsewhere.")]
Progress = Annotated[
    bool | None, typer.Option("--progress/--no-progress", help="Progress on standard error; by default on a terminal.")
]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two networks, their data, and how to compute: what `predict` and `measure` both ask for."""

    a: Checkpoint
    b: Checkpoint
    model: Annotated[str, typer.Option(help="digits-resnet, resnet20, …; torchvision:NAME; or package.module:factory.")]
    data: Annotated[
        str, typer.Option(help="digits; a folder (ROOT/train/CLASS/*.png); or package.module:factory giving a loader.")
    ]
    model_option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for the network's factory, such as num_classes=10. Repeatable.")
    ] = None
    key: Annotated[
        str | None, typer.Option(help="Where the state dict lies in both checkpoints, such as state_dict or ema.")
    ] = None
    strip_prefix: Annotated[
        str | None, typer.Option(help="What the names of entries begin with in both checkpoints, such as net.")
    ] = None
    layers: Annotated[str, typer.Option(help="The partition: fused, module, tensor, block or block:DEPTH.")] = "fused"
    set_: Annotated[list[str] | None, typer.Option("--set", help="Layers to move together: A,B. Repeatable.")] = None
    frozen: Annotated[
        list[str] | None, typer.Option(help="A layer that stays, or a pattern of its entries' names. Repeatable.")
    ] = None
    base: Annotated[Literal["a", "b"], typer.Option(help="The network in which --frozen layers stay.")] = "a"
    batch_norm: Annotated[
        Literal["interpolate", "batch", "recalibrate"], typer.Option(help="Batch normalisation between the networks.")
    ] = "interpolate"
    recalibration: Annotated[
        str | None, typer.Option(help="Under recalibrate: data as for --data, of training; by default those of --data.")
    ] = None
    augmentation: Annotated[
        Literal["none", "crop-flip"] | None,
        typer.Option(help="Under recalibrate: how training augments images; by default crop-flip, none for digits."),
    ] = None
    split: Annotated[Literal["train", "test"], typer.Option(help="Of digits and folders.")] = "train"
    limit: Annotated[int | None, typer.Option(help="Use a fixed random sample of this many examples.")] = None
    batch_size: Annotated[int, typer.Option(help="Examples a batch.")] = 256
    max_batches: Annotated[int | None, typer.Option(help="Use only this many batches.")] = None
    device: Device = "cpu"
    dtype: Annotated[Literal["float32", "float64"], typer.Option(help="Type to compute in.")] = "float32"
    save: Annotated[Path | None, typer.Option(dir_okay=False, help="Also save the result here, for Python.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False
    progress: Progress = None

    def check(self) -> None:
        """Refuse sets without layers, and a file that cannot be written, before anything is read or computed."""
        from lmc_curvature.storage import check_writable

        for named, members in zip(self.set_ or (), self.sets(), strict=True):
            if not members:
                raise OptionError(f"--set {named!r} names no layer; expected names with commas between them: A,B.")
        if self.save is None:
            return
        if self.save.exists() and not self.save.is_file():
            raise OptionError(f"--save {self.save} is not a file; expected the name of a file to write.")
        if self.save.resolve() in (self.a.resolve(), self.b.resolve()):
            raise OptionError(f"--save {self.save} would replace a network; expected the name of another file.")
        check_writable(self.save.parent, what=f"--save {self.save}")

    def networks(self) -> "tuple[nn.Module, nn.Module]":
        """The two networks, with the weights of their checkpoints."""
        from lmc_curvature.checkpoints import load_checkpoint

        first, second = (self._load(load_checkpoint, self.make_network, path) for path in (self.a, self.b))
        return first, second

    def make_network(self) -> "nn.Module":
        """The network as its factory makes it, with fresh weights."""
        from lmc_curvature.sources import make_model

        return make_model(self.model, **dict(_key_and_value(option) for option in self.model_option or ()))

    def _load(self, load: "Callable[..., nn.Module]", make: "Callable[[], nn.Module]", path: Path) -> "nn.Module":
        if self.key is None and self.strip_prefix is None:
            return load(make(), path)
        try:
            return load(make(), path, key=self.key, strip_prefix=self.strip_prefix)
        except CheckpointError as error:
            # The other file may need these options, and this one may hold a single state dict that fits as it is.
            try:
                model = load(make(), path)
            except CheckpointError:
                raise error from None
            warnings.warn(f"{path} was read without --key and --strip-prefix, which do not fit it.", stacklevel=2)
            return model

    def batches(self) -> Iterable[Any]:
        """The loader: of a data set known by name, or what a factory returns."""
        from lmc_curvature.sources.data import load_data

        if not _is_named(self.data):
            return _made_loader("--data", self.data)
        return load_data(self.data, self.split, self.limit, progress=self.progress).batches(self.batch_size)

    def recalibration_batches(self) -> Iterable[Any] | None:
        """Under `"recalibrate"`, the loader to re-estimate statistics on; None for that of `batches`.

        Of a data set known by name it is the training split, with images augmented as in training.
        """
        import torch

        from lmc_curvature.sources.augmentation import Crops
        from lmc_curvature.sources.data import load_data

        spec = self.recalibration or self.data
        if self.batch_norm != "recalibrate":
            if self.recalibration or self.augmentation:
                raise OptionError("--recalibration and --augmentation are for --batch-norm recalibrate.")
            return None
        if not _is_named(spec):
            return None if self.recalibration is None else _made_loader("--recalibration", spec)
        data = load_data(spec, "train", self.limit, progress=self.progress)
        augmentation = self.augmentation or ("none" if spec == "digits" else "crop-flip")
        crops = None if augmentation == "none" else Crops.draw(len(data), torch.Generator().manual_seed(0))
        return data.batches(self.batch_size, crops=crops)

    def sets(self) -> list[list[str]]:
        """The sets of layers that were named."""
        return [[name.strip() for name in members.split(",") if name.strip()] for members in self.set_ or ()]

    def computation(self) -> dict[str, Any]:
        """Options of the computation, as `predict_barrier` and `measure_barrier` both take them."""
        import torch

        names = ("base", "batch_norm", "max_batches", "device", "progress")
        options = {name: getattr(self, name) for name in names}
        options |= {"frozen": tuple(self.frozen or ()), "dtype": getattr(torch, self.dtype)}
        return options | {"recalibration": self.recalibration_batches()}


def with_comparison(command: Callable[Concatenate[Comparison, ...], None]) -> Callable[..., None]:
    """The command with the fields of `Comparison` for options, in place of its first argument, before its own."""
    shared = inspect.signature(Comparison).parameters
    _, *own = inspect.signature(command).parameters.values()

    def run(**options: Any) -> None:
        comparison = Comparison(**{name: options.pop(name) for name in shared})
        comparison.check()
        command(comparison, **options)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    # typer reads a command's options from its signature.
    run.__signature__ = inspect.Signature([*shared.values(), *own])  # pyright: ignore[reportFunctionMemberAccess]
    return run


def _is_named(data: str) -> bool:
    """Whether data are a data set known by name, and not a function that makes a loader."""
    module, colon, _ = data.partition(":")
    # A path may hold a colon, too; an existing folder is meant as such, and cifar10:ROOT is a data set.
    return not colon or module == "cifar10" or Path(data).exists()


def _made_loader(option: str, spec: str) -> Iterable[Any]:
    from lmc_curvature.sources.models import import_function

    make_loader = import_function(spec, what=f"{option} {spec}")
    try:
        return make_loader()
    except TypeError as error:
        raise DataError(
            f"{option} {spec}: {error}. Expected a function without arguments that returns a loader."
        ) from error


def _key_and_value(option: str) -> tuple[str, Any]:
    key, equals, value = option.partition("=")
    if not equals or not key:
        raise OptionError(f"--model-option {option!r}: expected KEY=VALUE, such as num_classes=10.")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
