"""The options of the commands, and what they stand for: networks and their batches.

Nothing of the library is imported before an option is used, so that help and mistyped commands answer at once.
"""

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Literal

import typer

from lmc_curvature.cli.arguments import A, B, Device, Others, Progress
from lmc_curvature.cli.help import COMPUTATION, DATA, LAYERS, NETWORKS, OUTPUT
from lmc_curvature.cli.parsing import image_options, key_and_value
from lmc_curvature.cli.ranks import is_rank, one_answer
from lmc_curvature.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from torch import nn


def _option(section: str, metavar: str | None, text: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=section, metavar=metavar, help=text, **options)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Networks, their data, and how to compute: what `predict` and `measure` both ask for."""

    a: A
    b: B
    model: Annotated[
        str,
        _option(
            NETWORKS,
            "MODEL",
            "digits-resnet, resnet20, …; torchvision:NAME; timm:NAME; transformers:DIRECTORY, with the config.json of "
            "the networks; or package.module:factory.",
        ),
    ]
    data: Annotated[
        str,
        _option(DATA, "DATA", "digits; a folder (ROOT/train/CLASS/*.png); or package.module:factory giving a loader."),
    ]
    loss: Annotated[
        str,
        _option(
            DATA,
            "LOSS",
            "cross-entropy, mse, bce (of logits); own or next-token, of networks that return their loss, the latter "
            "for causal language models; or package.module:name.",
        ),
    ] = "cross-entropy"
    others: Others = None
    model_option: Annotated[
        list[str] | None,
        _option(NETWORKS, "KEY=VALUE", "For the network's factory, such as num_classes=10. Repeatable."),
    ] = None
    key: Annotated[
        str | None,
        _option(NETWORKS, "KEY", "Where the state dict lies in both checkpoints, such as state_dict or ema."),
    ] = None
    strip_prefix: Annotated[
        str | None,
        _option(NETWORKS, "PREFIX", "What the names of entries begin with in both checkpoints, such as net."),
    ] = None
    layers: Annotated[
        str, _option(LAYERS, "RULE", "How layers are cut: fused, module, tensor, block or block:DEPTH.")
    ] = "fused"
    set_: Annotated[list[str] | None, _option(LAYERS, "A,B", "Layers to move together. Repeatable.", "--set")] = None
    frozen: Annotated[
        list[str] | None,
        _option(LAYERS, "PATTERN", "A layer that stays, or a pattern of its entries' names. Repeatable."),
    ] = None
    base: Annotated[Literal["a", "b"], _option(LAYERS, "a|b", "The network in which --frozen layers stay.")] = "a"
    batch_norm: Annotated[
        Literal["interpolate", "batch", "recalibrate"],
        _option(LAYERS, "interpolate|batch|recalibrate", "Batch normalisation between the networks."),
    ] = "interpolate"
    recalibration: Annotated[
        str | None,
        _option(DATA, "DATA", "Under recalibrate: data as for --data, of training; by default those of --data."),
    ] = None
    augmentation: Annotated[
        Literal["none", "crop-flip"] | None,
        _option(
            DATA,
            "none|crop-flip",
            "Under recalibrate: how training augments images; by default crop-flip, none for digits.",
        ),
    ] = None
    split: Annotated[Literal["train", "test"], _option(DATA, "train|test", "Of digits and folders.")] = "train"
    limit: Annotated[int | None, _option(DATA, "N", "Use a fixed random sample of this many examples.")] = None
    mean: Annotated[
        str | None, _option(DATA, "NUMBERS", "Of pixels from 0 to 1: 0.485,0.456,0.406; by default the data's own.")
    ] = None
    std: Annotated[str | None, _option(DATA, "NUMBERS", "Standard deviation, likewise.")] = None
    resize: Annotated[
        str | None,
        _option(DATA, "SIZE[,CROP]", "Scale images of a folder to SIZE pixels and cut out the middle CROP of them."),
    ] = None
    transform: Annotated[
        str | None,
        _option(DATA, "NAME", "Instead: package.module:name of a function from a PIL image to a tensor."),
    ] = None
    batch_size: Annotated[int, _option(DATA, "N", "Examples a batch.")] = 256
    max_batches: Annotated[int | None, _option(DATA, "N", "Use only this many batches.")] = None
    tolerance: Annotated[
        float | None,
        _option(DATA, "NUMBER", "Use only as many batches as give the barrier at α = 1/2 this standard error."),
    ] = None
    device: Device = "cpu"
    dtype: Annotated[Literal["float32", "float64"], _option(COMPUTATION, "float32|float64", "Type to compute in.")] = (
        "float32"
    )
    threads: Annotated[
        int | None, _option(COMPUTATION, "N", "CPU threads; by default as many as torch takes.", min=1)
    ] = None
    save: Annotated[
        Path | None,
        _option(
            OUTPUT,
            "FILE",
            "Also save the prediction (measure: the measurement) here, for Python and, of two networks, for report.",
            dir_okay=False,
        ),
    ] = None
    plot: Annotated[Path | None, _option(OUTPUT, "FILE", "Also draw it: FILE.png, .pdf, .svg, …", dir_okay=False)] = (
        None
    )
    as_json: Annotated[
        bool, _option(OUTPUT, None, "Print JSON instead of tables, with what it was computed from.", "--json")
    ] = False
    progress: Progress = None

    def check(self) -> None:
        """Refuse what can be seen to be wrong before anything is read or computed."""
        for named, members in zip(self.set_ or (), self.sets(), strict=True):
            if not members:
                raise OptionError(f"--set {named!r} names no layer; expected names with commas between them: A,B.")
        image_options(self.mean, self.std, self.resize, self.transform)
        for option in ("save", "plot"):
            if getattr(self, option) is not None:
                self._check_output(f"--{option}", getattr(self, option))
        if self.plot is not None:
            from lmc_curvature.figures.files import figure_suffixes

            if self.plot.suffix.lower() not in figure_suffixes():
                raise OptionError(
                    f"--plot {self.plot}: expected a file name that ends in {', '.join(figure_suffixes())}."
                )
            if self.save is not None and self.save.resolve() == self.plot.resolve():
                raise OptionError(f"--save and --plot would write one file, {self.plot}.")

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where the networks are."""
        return (self.a, self.b, *(self.others or ()))

    def is_of_network(self, path: Path) -> bool:
        """Whether a file is that of one of the networks, or lies in its folder."""
        networks = [network.resolve() for network in self.paths]
        return path.resolve() in networks or path.resolve().parent in networks

    def are_folders(self) -> bool:
        """Whether all networks are folders as transformers writes them."""
        return all((path / "config.json").is_file() for path in self.paths)

    def _check_output(self, option: str, path: Path) -> None:
        from lmc_curvature.storage import check_writable

        if path.exists() and not path.is_file():
            raise OptionError(f"{option} {path} is not a file; expected the name of a file to write.")
        if self.is_of_network(path):
            raise OptionError(f"{option} {path} would replace a network; expected the name of another file.")
        check_writable(path.parent, what=f"{option} {path}")

    def networks(self) -> "tuple[nn.Module, ...]":
        """The networks, with the weights of their checkpoints."""
        from lmc_curvature.checkpoints import load_checkpoint

        try:
            first, *others = (self._load(load_checkpoint, partial(self.make_network, of=p), p) for p in self.paths)
        except CheckpointError as error:
            if not self.model.startswith("transformers:"):
                raise
            raise CheckpointError(
                f"{error} (transformers writes networks of some kinds under other names than it computes with; "
                "torch.save(model.state_dict(), FILE) keeps these, of model = ….from_pretrained(DIRECTORY).)"
            ) from error
        of_first = {id(tensor) for tensor in (*first.parameters(), *first.buffers())}
        for other in others:
            shared = [n for n, t in (*other.named_parameters(), *other.named_buffers()) if id(t) in of_first]
            if shared:
                raise OptionError(
                    f"--model {self.model} made two networks that share {shared[0]!r}, so one file was loaded over the "
                    "other: make every module anew in each call, or return a copy.deepcopy."
                )
        return first, *others

    def pair(self) -> "tuple[nn.Module, nn.Module]":
        """The same of two."""
        first, second = self.networks()
        return first, second

    def check_sets(self, network: "nn.Module") -> None:
        """Refuse sets that name a layer which the network does not have."""
        from lmc_curvature.segment import LayerPartition, layer_indices

        partition = LayerPartition.of(network, self.layers, batch_norm=self.batch_norm, frozen=tuple(self.frozen or ()))
        for members in self.sets():
            layer_indices(partition.groups, members)

    def make_network(self, of: Path | None = None) -> "nn.Module":
        """The network as its factory makes it, with fresh weights; by the config.json beside a file, if any."""
        from lmc_curvature.merging.descriptions import folder_of
        from lmc_curvature.sources import make_model

        folder = None if of is None else folder_of(of)
        has_own = folder and self.model.startswith("transformers:") and (folder / "config.json").is_file()
        return make_model(f"transformers:{folder}" if has_own else self.model, **self.model_options())

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

    def model_options(self) -> dict[str, Any]:
        """The options of the network's factory."""
        return dict(key_and_value(option) for option in self.model_option or ())

    def batches(self) -> Iterable[Any]:
        """The loader: of a data set known by name, or what a factory returns."""
        from lmc_curvature.cli.batches import make_batches

        return make_batches(self)

    def recalibration_batches(self) -> Iterable[Any] | None:
        """Under `"recalibrate"`, the loader to re-estimate statistics on; None for that of `batches`.

        Of a data set known by name it is the training split, with images augmented as in training.
        """
        from lmc_curvature.cli.batches import make_recalibration_batches

        if self.batch_norm != "recalibrate":
            if self.recalibration or self.augmentation:
                raise OptionError("--recalibration and --augmentation are for --batch-norm recalibrate.")
            return None
        return make_recalibration_batches(self)

    def sets(self) -> list[list[str]]:
        """The sets of layers that were named."""
        return [[name.strip() for name in members.split(",") if name.strip()] for members in self.set_ or ()]

    def computation(self) -> dict[str, Any]:
        """Options of the computation, as `predict_barrier` and `measure_barrier` both take them."""
        import torch

        from lmc_curvature.sources import find_loss

        names = ("layers", "base", "batch_norm", "max_batches", "tolerance", "device", "progress")
        options = {name: getattr(self, name) for name in names}
        options["group"] = "world" if is_rank() else None
        options |= {"recalibration": self.recalibration_batches(), "frozen": tuple(self.frozen or ())}
        return options | {"loss_fn": find_loss(self.loss), "dtype": getattr(torch, self.dtype)}

    def provenance(self, loader: Iterable[Any], **own: Any) -> dict[str, Any]:
        """What belongs beside an answer in JSON: what it was computed from. Empty where tables are printed.

        Args:
            loader: The batches that came of the options.
            **own: Further options, of the command itself.
        """
        if not self.as_json:
            return {}
        from lmc_curvature.cli.provenance import provenance

        record = provenance(self, loader)
        record["options"] |= own
        return {"provenance": record}

    @contextlib.contextmanager
    def with_threads(self) -> Iterator[None]:
        """Within the block, let torch use as many CPU threads as were asked for."""
        if self.threads is None:
            yield
            return
        from lmc_curvature.forking import cpu_threads

        with cpu_threads(self.threads):
            yield


def with_comparison(command: Callable[Concatenate[Comparison, ...], None], *left_out: str) -> Callable[..., None]:
    """The command with the fields of `Comparison` for options, in place of its first argument, before its own.

    Fields that are left out keep their defaults.
    """
    every = inspect.signature(Comparison).parameters
    shared = {name: parameter for name, parameter in every.items() if name not in left_out}
    _, *own = inspect.signature(command).parameters.values()

    def run(**options: Any) -> None:
        comparison = Comparison(**{name: options.pop(name) for name in shared})
        comparison.check()
        with comparison.with_threads(), one_answer(comparison, options) as (comparison, options):
            command(comparison, **options)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    # typer reads a command's options from its signature.
    run.__signature__ = inspect.Signature([*shared.values(), *own])  # pyright: ignore[reportFunctionMemberAccess]
    return run
