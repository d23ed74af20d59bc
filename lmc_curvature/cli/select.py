"""The command `select`: the most that can be averaged within a budget is predicted, measured, and written.

As in `app`, the library is imported inside the command.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lmc_curvature.cli.arguments import Anchors, Witness
from lmc_curvature.cli.failures import end_if_partial, one_message, saving
from lmc_curvature.cli.files import check_new_file, write_merge
from lmc_curvature.cli.help import LAYERS, PlainCommand
from lmc_curvature.cli.options import Comparison, with_comparison
from lmc_curvature.cli.parsing import anchor_positions, names_in
from lmc_curvature.cli.printing import show
from lmc_curvature.errors import OptionError, PartitionError

if TYPE_CHECKING:
    from torch import nn

    from lmc_curvature import BarrierPrediction
    from lmc_curvature.merging import Selection, Verification
    from lmc_curvature.sources import Split

_LEFT_OUT = ("others", "set_", "frozen", "base", "batch_norm", "plot")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(cls=PlainCommand)(one_message()(with_comparison(select, *_LEFT_OUT)))


def select(
    comparison: Comparison,
    budget: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="The most that the loss may be above the mean loss of A and B."),
    ] = None,
    relative_budget: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="Instead: as a part of that mean, such as 0.1.")
    ] = None,
    base: Annotated[
        Literal["a", "b", "mean"] | None,
        typer.Option(
            metavar="a|b|mean",
            help="Whose the other layers are, by default of the one that lets more be averaged; "
            "mean: bound the mean of both merges.",
        ),
    ] = None,
    weight: Annotated[
        Literal["parameters", "distance"],
        typer.Option(metavar="parameters|distance", help="What the averaged layers should have most of."),
    ] = "parameters",
    required: Annotated[str | None, typer.Option(metavar="A,B", help="Layers that are averaged in any case.")] = None,
    excluded: Annotated[str | None, typer.Option(metavar="A,B", help="Layers that are not averaged.")] = None,
    batch_norm: Annotated[
        Literal["interpolate", "recalibrate"],
        typer.Option(
            metavar="interpolate|recalibrate", rich_help_panel=LAYERS, help="What becomes of running statistics."
        ),
    ] = "interpolate",
    measurements: Annotated[
        int, typer.Option(min=0, metavar="N", help="Measure so many sets at most; 0: select by the prediction alone.")
    ] = 10,
    caution: Annotated[
        float,
        typer.Option(
            min=0, metavar="NUMBER", help="How many standard errors a measured rise has to stay below the budget."
        ),
    ] = 2.0,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Other data, as for --data, on which the selected set is measured in the end."
        ),
    ] = None,
    held_out_split: Annotated[
        Literal["train", "test"], typer.Option(metavar="train|test", help="Of --held-out, if it is digits or a folder.")
    ] = "test",
    anchors: Anchors = "3",
    witness: Witness = True,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write the merged network to this safetensors file, or folder; see merge."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --out if it exists.")] = False,
) -> None:
    """Select the most that can be averaged of networks A and B within a budget, and measure its loss."""
    comparison = dataclasses.replace(comparison, batch_norm=batch_norm)
    question: dict[str, Any] = {"budget": budget, "relative_budget": relative_budget, "base": base, "weight": weight}
    question |= {"required": names_in("--required", required) or []}
    question |= {"excluded": names_in("--excluded", excluded) or []}
    _check_question(question)
    _check_out(comparison, out, base, force=force)
    _check_verification(comparison, measurements, caution, held_out, held_out_split)
    from lmc_curvature import predict_barrier, select_layers

    positions, options = anchor_positions(anchors), comparison.computation()
    networks = comparison.pair()
    _check_layers(comparison, networks[0], question)
    loader = comparison.batches()
    if batch_norm == "recalibrate" and options["recalibration"] is None:
        # On held-out data, too, the merged network has the statistics of these.
        options["recalibration"] = loader
    if measurements:
        _check_visits(measurements, loader, options["recalibration"])
    provenance, others = comparison.provenance(loader, **question, measurements=measurements, caution=caution), None
    if held_out is not None:
        others = _held_out(comparison, held_out, held_out_split, loader, provenance)
    prediction = predict_barrier(*networks, loader, anchors=positions, witness=witness, **options)
    with _saved(prediction, comparison.save):
        if not comparison.as_json:
            show(str(prediction))
        end_if_partial(prediction.interruption)
        selection, verification = select_layers(prediction, **question), None
        if measurements:
            options |= {"measurements": measurements, "held_out": others, "caution": caution}
            verification = selection.verify(*networks, loader, **options)
        _answer(comparison, selection, verification, out, provenance)
        if out is not None:
            with saving():
                final = verification.selection if verification else selection
                _write(comparison, networks[0], final, verification, out, options["recalibration"])


def _check_question(question: dict[str, Any]) -> None:
    from lmc_curvature.merging.budgets import check_not_negative

    given = [name for name in ("budget", "relative_budget") if question[name] is not None]
    if len(given) != 1:
        raise OptionError(
            "Give one of --budget, in units of the loss, and --relative-budget, a part of the mean loss of the two; "
            f"{'both were' if given else 'neither was'} given."
        )
    check_not_negative(f"--{given[0].replace('_', '-')}", question[given[0]])
    both = set(question["required"]) & set(question["excluded"])
    if both:
        raise OptionError(f"--required and --excluded name {min(both)!r}: leave it out of one of them.")


def _check_out(comparison: Comparison, out: Path | None, base: str | None, *, force: bool) -> None:
    if out is None:
        if force:
            raise OptionError("--force is for the file of --out: give that, too, or leave it out.")
        return
    if base == "mean":
        raise OptionError("--base mean is the mean of two merges, and --out writes one: choose --base a or b, or none.")
    check_new_file("--out", out, comparison, force=force)
    if comparison.save is not None and comparison.save.resolve() == out.resolve():
        raise OptionError(f"--save and --out would write one file, {out}.")


def _check_verification(
    comparison: Comparison, measurements: int, caution: float, held_out: str | None, split: "Split"
) -> None:
    from lmc_curvature.merging.budgets import check_not_negative

    check_not_negative("--caution", caution)
    if held_out is None:
        return
    if not measurements:
        raise OptionError("--held-out is for what is measured: give --measurements 1 or more.")
    from lmc_curvature.cli.batches import is_known_by_name

    if held_out == comparison.data and (split == comparison.split or not is_known_by_name(held_out)):
        raise OptionError(
            f"--held-out {held_out} are the data of --data, on which the layers are chosen: give others, or the other "
            "split by --held-out-split."
        )


def _check_layers(comparison: Comparison, network: "nn.Module", question: dict[str, Any]) -> None:
    from lmc_curvature.segment import LayerPartition, layer_indices

    try:
        groups = LayerPartition.of(network, comparison.layers, batch_norm=comparison.batch_norm).groups
    except PartitionError as error:
        hint = "Here --layers is the rule that cuts the network into layers: name some by --required and --excluded."
        raise PartitionError(f"{error} {hint}") from None
    for members in (question["required"], question["excluded"]):
        layer_indices(groups, members)


def _check_visits(measurements: int, *loaders: Iterable[Any] | None) -> None:
    from lmc_curvature.merging.trials import check_trials

    for loader in loaders:
        check_trials(measurements, loader, {})


def _held_out(
    comparison: Comparison, data: str, split: "Split", loader: Iterable[Any], provenance: dict[str, Any]
) -> Iterable[Any]:
    """The loader of the held-out data, which are entered in the provenance."""
    from lmc_curvature.cli.batches import with_other_data
    from lmc_curvature.cli.provenance import data_record

    other = with_other_data(comparison, data, split, loader)
    others = other.batches()
    for record in provenance.values():
        record["held_out"] = data_record(other, others)
    return others


@contextlib.contextmanager
def _saved(prediction: "BarrierPrediction", path: Path | None) -> Iterator[None]:
    """Save a prediction after the block, however that ends: other budgets need no new one."""
    try:
        yield
    finally:
        if path is not None and not prediction.partial:
            with saving():
                prediction.save(path)


def _answer(
    comparison: Comparison,
    selection: "Selection",
    verification: "Verification | None",
    out: Path | None,
    provenance: dict[str, Any],
) -> None:
    """Print the selection, every measurement of it, and what it comes to."""
    from lmc_curvature.cli.conclusion import conclusion, merge_command
    from lmc_curvature.cli.tables import selection_record, trial_table

    final = verification.selection if verification else selection
    sentences, command = conclusion(final, verification), merge_command(comparison, final)
    if comparison.as_json:
        record = selection_record(selection, verification)
        record |= {"conclusion": sentences, "merge": command, "out": None if out is None else str(out)}
        print(json.dumps(record | provenance, indent=2), flush=True)
        return
    show(*([trial_table(verification)] if verification else []), "Selection: " + " ".join(sentences))
    if out is None and command is not None:
        # A line that is to be copied is not wrapped.
        other = " (with --base b the other of the two)" if final.base == "mean" else ""
        print(f"To write it{other}: {command}", flush=True)


def _write(
    comparison: Comparison,
    network: "nn.Module",
    selection: "Selection",
    verification: "Verification | None",
    out: Path,
    recalibration: Iterable[Any] | None,
) -> None:
    """Write the merged network of a selection, and what was predicted and measured of it."""
    facts: dict[str, Any] = {"budget": selection.budget, "predicted_rise": selection.rise}
    if verification is not None:
        held_out = verification.held_out
        facts |= {"measured_rise": verification.chosen.rise, "held_out_rise": held_out and held_out.rise}
    options = {"layers": selection.members, "base": selection.base, "partition": comparison.layers}
    write_merge(comparison, network, out, recalibration, options, facts={"selection": facts})
    if comparison.as_json:
        return
    if selection.members:
        print(f"merged: {out}")
    else:
        statistics = ", but for re-estimated statistics" if comparison.batch_norm == "recalibrate" else ""
        print(f"{out} is a copy of {'B' if selection.base == 'b' else 'A'}{statistics}")
