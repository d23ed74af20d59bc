"""The commands on checkpoint files: `merge` writes an average, `check` compares two before all computation.

As in `app`, the library is imported inside the commands.
"""

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lmc_curvature.cli.failures import one_message
from lmc_curvature.cli.help import PlainCommand
from lmc_curvature.cli.many import network_weights_in
from lmc_curvature.cli.options import Comparison
from lmc_curvature.cli.parsing import names_in
from lmc_curvature.errors import OptionError

if TYPE_CHECKING:
    from torch import nn

    from lmc_curvature.merging.files import MergePlan

Partition = Annotated[
    str | None,
    typer.Option(
        metavar="RULE",
        help="How layers are cut: fused, module, tensor, block[:DEPTH]; by default fused, or module without --model.",
    ),
]


_OPTIONAL = ("model", "data")
# Configurations, vocabularies and tokenizers, templates of chats, and networks' own code.
_DESCRIPTIONS = (".json", ".txt", ".model", ".jinja", ".py")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    left_out = ("layers", "set_", "save", "plot")
    for command, more in ((merge, ("base", "frozen", "dtype", "batch_norm")), (check, ("others",))):
        app.command(name=command.__name__, cls=PlainCommand)(one_message()(_with_files(command, *left_out, *more)))


def merge(
    files: Comparison,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="The safetensors file to write; of folders of transformers a folder, unless it ends in .safetensors.",
        ),
    ],
    layers: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="The layers that are averaged. By default all, or those of --alpha."),
    ] = None,
    alpha: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[LAYER=]NUMBER",
            help="Where between A (0) and B (1): a number, by default 0.5, or LAYER=NUMBER. Repeatable.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS",
            help="Instead: what each network counts for, such as 0.5,0.3,0.2; of three or more by default all alike.",
        ),
    ] = None,
    partition: Partition = None,
    base: Annotated[
        Literal["a", "b"], typer.Option(metavar="a|b", help="The network whose entries all other layers keep.")
    ] = "a",
    batch_norm: Annotated[
        Literal["interpolate", "recalibrate"],
        typer.Option(metavar="interpolate|recalibrate", help="What becomes of running statistics."),
    ] = "interpolate",
    mergekit: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            metavar="FILE",
            help="Also write the same for mergekit, to run by: mergekit-yaml FILE DIRECTORY.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Write the average of networks A and B, of all their layers or of some, to a safetensors file.

    Further networks are averaged with them, all alike or by --weights. Folders with a config.json become such a
    folder again, which transformers loads.
    """
    for option, path in (("--out", out), ("--mergekit", mergekit)):
        check_new_file(option, path, files, force=force)
    several = bool(files.others) or weights is not None
    for option, value in (("--alpha", alpha), ("--mergekit", mergekit)):
        if several and value:
            raise OptionError(f"{option} is for two networks without --weights: leave it out.")
    coordinate = None if several else _coordinates(alpha or [])
    shares = network_weights_in(weights)
    members = names_in("--layers", layers)
    if (members or isinstance(coordinate, dict)) and not (files.model or partition):
        raise OptionError(
            "--layers and --alpha LAYER=NUMBER name layers, which without the network are not those of predict and "
            "select: give --model, or --partition module for modules without the normalisations beside them."
        )
    if batch_norm == "recalibrate" and not (files.model and files.data):
        raise OptionError("--batch-norm recalibrate evaluates the networks: give --model and --data.")
    if batch_norm == "recalibrate" and mergekit is not None:
        raise OptionError(
            "--mergekit writes a mean of two checkpoints, running statistics included, and --batch-norm recalibrate "
            "estimates those anew: leave one of the two out."
        )
    files = dataclasses.replace(files, batch_norm=batch_norm)
    recalibration, model = files.recalibration_batches(), _model(files)
    options: dict[str, Any] = {"alpha": coordinate, "layers": members, "base": base}
    options |= {"weights": shares}
    options |= {"partition": _partition(partition, model)}
    plan, record = write_merge(files, model, out, recalibration, options, mergekit=mergekit)
    if files.as_json:
        print(json.dumps({"out": str(out), **record}, indent=2))
        return
    print(f"merged: {out}; moved from {base.upper()}: {plan.moved}")
    if losses := record.get("losses"):
        print(f"loss {losses['before']:.4g} by averaged statistics, {losses['after']:.4g} by re-estimated ones")
    if mergekit is not None:
        print(f"for mergekit: mergekit-yaml {mergekit} OUTPUT_DIRECTORY")


def check(
    files: Comparison,
    partition: Partition = None,
    distances: Annotated[bool, typer.Option("--distances", help="Also read the numbers: distances by layer.")] = False,
) -> None:
    """Compare networks A and B by the headers of their files; with --model and --data, say what a prediction costs."""
    from lmc_curvature.merging.checking import check_checkpoints

    model = _model(files)
    layers = _partition(partition, model)
    names = {"key": files.key, "strip_prefix": files.strip_prefix}
    found = check_checkpoints(files.a, files.b, model, partition=layers, distances=distances, **names)
    cost = None
    if files.model and files.data:
        from lmc_curvature.merging.cost import estimate_prediction

        options = files.computation()
        options["layers"] = layers
        del options["recalibration"], options["progress"], options["group"], options["tolerance"]
        cost = estimate_prediction(*files.pair(), files.batches(), **options)
    if files.as_json:
        record = None if cost is None else {**dataclasses.asdict(cost), "seconds": cost.seconds}
        print(json.dumps({**dataclasses.asdict(found), "distance": found.distance, "cost": record}, indent=2))
        return
    print(found)
    for layer, distance in zip(found.layers, found.distances or (), strict=False):
        print(f"  {distance:>10.4g}  {layer}")
    if cost is not None:
        print(cost)


def write_merge(
    files: Comparison,
    model: "nn.Module | None",
    out: Path,
    recalibration: Iterable[Any] | None,
    options: dict[str, Any],
    *,
    mergekit: Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> "tuple[MergePlan, dict[str, Any]]":
    """Write the merged network; `options` are those of `plan_merge`. Returns the plan and the file's provenance."""
    from lmc_curvature.merging.files import merge_checkpoints, plan_merge
    from lmc_curvature.merging.recipes import check_plain

    names = {"key": files.key, "strip_prefix": files.strip_prefix}
    plan = plan_merge(files.a, files.b, model, others=files.others or (), **names, **options)
    if mergekit is not None:
        check_plain(*plan.checkpoints)
    network, said = None, {"model": files.model or None, "partition": options["partition"]}
    said |= {"batch_norm": files.batch_norm, **(facts or {})}
    if files.batch_norm == "recalibrate":
        network, said["losses"] = _recalibrated(files, recalibration, options)
    if not _is_folder(out, files):
        return plan, merge_checkpoints(plan, out, mergekit=mergekit, recalibrated=network, facts=said)
    try:
        # The weights come last: without them a folder holds no network.
        _copy_descriptions(plan.kept.path, out)
        record = merge_checkpoints(plan, out / "model.safetensors", mergekit=mergekit, recalibrated=network, facts=said)
    except BaseException:
        # It was new, or empty.
        shutil.rmtree(out, ignore_errors=True)
        raise
    return plan, record


def _is_folder(out: Path, files: Comparison) -> bool:
    """Whether the merged network is written as a folder, as the networks are."""
    return out.suffix != ".safetensors" and files.are_folders()


def _copy_descriptions(source: Path, folder: Path) -> None:
    """Copy what describes a network and its tokens, and none of the weights, nor of the state of its training."""
    from lmc_curvature.storage import write_atomically

    for path in sorted(source.iterdir()):
        is_of_weights = path.name.endswith(".index.json") or path.name == "trainer_state.json"
        if path.is_file() and path.suffix in _DESCRIPTIONS and not is_of_weights:
            with write_atomically(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)


def _with_files(command: Callable[..., None], *left_out: str) -> Callable[..., None]:
    """The command with the options of `Comparison`, none of which but two files is needed, before its own."""
    every = inspect.signature(Comparison).parameters
    shared = {name: parameter for name, parameter in every.items() if name not in left_out}
    for name in _OPTIONAL:
        annotation = shared[name].annotation
        optional = Annotated[annotation.__origin__ | None, *annotation.__metadata__]
        shared[name] = shared[name].replace(default=None, annotation=optional)
    _, *own = inspect.signature(command).parameters.values()

    def run(**options: Any) -> None:
        given: dict[str, Any] = {name: options.pop(name) for name in shared}
        # What is not given has an empty name.
        given |= {name: given[name] or "" for name in _OPTIONAL}
        files = Comparison(**given)
        with files.with_threads():
            command(files, **options)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    # typer reads a command's options from its signature, where those without a default may follow others by keyword.
    parameters = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in (*shared.values(), *own)]
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return run


def _model(files: Comparison) -> "nn.Module | None":
    return files.make_network() if files.model else None


def _partition(partition: str | None, model: "nn.Module | None") -> str:
    return partition or ("module" if model is None else "fused")


def _coordinates(alphas: list[str]) -> float | dict[str, float]:
    """The number, or the numbers by layer, that --alpha gives."""
    found: dict[str, float] = {}
    for text in alphas or ["0.5"]:
        layer, _, number = text.rpartition("=")
        if layer and layer in found:
            raise OptionError(f"--alpha {text!r}: layer {layer!r} has a number already.")
        try:
            found[layer] = float(number)
        except ValueError:
            raise OptionError(f"--alpha {text!r}: expected a number in [0, 1], or LAYER=NUMBER.") from None
    if "" in found and len(alphas) > 1:
        raise OptionError(f"--alpha {' --alpha '.join(alphas)}: give one number, or LAYER=NUMBER for each layer.")
    return found.get("", found)


def check_new_file(option: str, path: Path | None, files: Comparison, *, force: bool) -> None:
    """Refuse a file, or a folder, that exists, that would replace a network, or that cannot be written."""
    from lmc_curvature.storage import check_writable

    if path is None:
        return
    if files.is_of_network(path):
        raise OptionError(f"{option} {path} would replace a network; expected the name of another file.")
    if option == "--out" and _is_folder(path, files):
        if path.exists() and (path.is_file() or any(path.iterdir())):
            raise OptionError(f"--out {path} exists already: expected a new folder, or an empty one.")
        check_writable(path, what=f"--out {path}")
        return
    if path.exists() and not (path.is_file() and force):
        remedy = "pass --force to replace it, or name another" if path.is_file() else "it is no file; name another"
        raise OptionError(f"{option} {path} exists already: {remedy}.")
    if option == "--out" and path.suffix.lower() not in ("", ".safetensors"):
        raise OptionError(
            f"--out {path}: the merged network is written as safetensors; expected a name in .safetensors."
        )
    check_writable(path.parent, what=f"{option} {path}")


def _recalibrated(
    files: Comparison, recalibration: Iterable[Any] | None, options: dict[str, Any]
) -> "tuple[nn.Module, dict[str, float]]":
    """The merged network with re-estimated statistics, and its losses before and after."""
    from lmc_curvature.merging import merge as merge_networks
    from lmc_curvature.sources import find_loss

    network = merge_networks(
        *(network.to(files.device) for network in files.networks()),
        batch_norm="recalibrate",
        loader=files.batches(),
        recalibration=recalibration,
        loss_fn=find_loss(files.loss),
        max_batches=files.max_batches,
        progress=files.progress,
        **options,
    )
    losses = vars(network)["recalibration"]
    return network, {"before": losses.before, "after": losses.after}
