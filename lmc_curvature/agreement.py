"""One comparison of two results that should be equal, and one table of the checks that the library makes of itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """The relative difference up to which two results count as equal; it follows the precision.

        tolerance(ε) = min(ε^power, most),    ε the relative rounding error of one operation

    Attributes:
        power: Exponent of ε.
        most: The largest tolerance, however coarse the precision is.
    """

    power: float
    most: float = 1.0

    def at(self, rounding: float) -> float:
        """The tolerance for a relative rounding error of one operation."""
        return min(rounding**self.power, self.most)

    def __str__(self) -> str:
        limit = f", at most {self.most:g}" if self.most < 1 else ""
        return f"ε^{self.power:g}{limit}"


@dataclass(frozen=True)
class Check:
    """A question that the library asks itself before it gives a number away.

    Attributes:
        catches: What it finds, in particular what no other check would.
        runs: When, and on which examples.
        cost: Forward passes of a whole batch (F) that it takes at most: operations counted on a ResNet-20, 128 images
            of 32 × 32 pixels, 22 layers, under `"interpolate"`.
        tolerance: The difference that it allows; None if it compares no numbers.
    """

    catches: str
    runs: str
    cost: float
    tolerance: Tolerance | None = None


CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "random numbers": Check(
            catches="A module that draws random numbers in evaluation mode.",
            runs="First batch of an objective.",
            cost=1.0,
        ),
        "constants": Check(
            catches="A network that changes its own entries, or uses parameters that are not those of the state.",
            runs="First batch of an objective; for what changes, also on what `copies` and `two networks` evaluate.",
            cost=1.0,
        ),
        "two evaluations": Check(
            catches="A network with a generator or a memory of its own: its two losses differ.",
            runs="First batch of an objective, on what the two checks above have computed.",
            cost=0.0,
            tolerance=Tolerance(0.4, most=1e-3),
        ),
        "copies": Check(
            catches="A network or a loss that reaches past copies of it: by a closure, a hook, a weak reference, or a "
            "loss that holds the network or reads what it has kept.",
            runs="First batch of an objective, at a state nearby, on an eighth of the examples (16 at least), with the "
            "network itself and with its copy.",
            cost=0.5,
            tolerance=Tolerance(0.55),
        ),
        "caches": Check(
            catches="A network that keeps what it computed from its entries, and uses it where they are others.",
            runs="First batch of an objective, at a state nearby and at the first again, on an eighth of the examples "
            "(16 at least); eight times where modules hold tensors besides their entries, and on the whole batch.",
            cost=0.5,
            tolerance=Tolerance(0.7),
        ),
        "two networks": Check(
            catches="A model_b with a setting, a buffer or a module that makes it another function than model_a; "
            "settings that differ although nothing is seen of them are named in a warning and a note.",
            runs="First batch of a prediction or measurement, with the entries of model_b, and with those of model_a "
            "on an eighth of the examples (16 at least); of many networks, with each but the first as model_b.",
            cost=2.4,
            tolerance=Tolerance(0.55, most=0.03),
        ),
        "halves of a batch": Check(
            catches="A loss whose mean over the data depends on how they are cut into batches, or a size that half of "
            "the rows have as well.",
            runs="Every batch of an objective's first pass, on outputs of its first batch, of which that is looked at "
            "nearer to zero, too; of a `BatchLoss`, "
            "and of outputs without a row for each example, with the network: every batch, if the loss is a mean "
            "cross-entropy, whatever its labels are made of, by what that divides by; else the first batch, the "
            "batches 1, 2, 4, 8, … and those of new shapes, with examples of the first; not for torch's cross-entropy "
            "itself.",
            cost=4.0,
            tolerance=Tolerance(0.5),
        ),
        "divisors": Check(
            catches="A function that returns a mean cross-entropy over labels of a batch, by which that weighs, and "
            "in some batch another mean: over masked labels, or with other weights of classes.",
            runs="First batch of every form (which tensors and plain values it holds, and where), and batches 1, 2, 4, "
            "8, …, on eight examples; on a CPU also wherever the function itself is evaluated.",
            cost=0.0,
            tolerance=Tolerance(0.7),
        ),
        "passes": Check(
            catches="A loader that yields other data in every pass: augmentation, sampling with replacement, shuffling "
            "with `drop_last`.",
            runs="Every complete pass but the first of an objective, on sums of its inputs and targets, of their "
            "squares, and of products of weighted sums of each example's numbers, which tell their positions and "
            "pairs.",
            cost=0.0,
            tolerance=Tolerance(0.5),
        ),
        "batches of passes": Check(
            catches="A loader that cuts the same data into other batches in every pass, where batch normalisation or "
            "the loss makes batches matter.",
            runs="Every complete pass but the first of such an objective, on squares of the sums, plain and weighted, "
            "of every batch's numbers.",
            cost=0.0,
            tolerance=Tolerance(0.7),
        ),
        "batches of ranks": Check(
            catches="Ranks whose loaders yield different batches, of which each would take its share.",
            runs="The end of every pass that processes share, on some numbers of every batch.",
            cost=0.0,
        ),
        "sorted labels": Check(
            catches="Data in the order of their classes.",
            runs="Every pass, after 2, 4, 8, … batches and at its end, on their labels.",
            cost=0.0,
        ),
        "running statistics": Check(
            catches="A network that normalises by running statistics whatever the policy says: it folds them into "
            "weights, calls torch's function itself, or has a class of its own for it.",
            runs='First batch of an objective under `"batch"` or `"recalibrate"`, with other `running_…` buffers.',
            cost=2.0,
            tolerance=Tolerance(0.55),
        ),
        "batch statistics": Check(
            catches="Batch statistics that are not those that the network was trained with.",
            runs='First batch of an objective under `"batch"`.',
            cost=2.0,
        ),
        "witness": Check(
            catches="Derivatives that are not those of the loss, whichever way through autograd they are computed: a "
            "backward pass that is wrong or hidden from autograd, detached parts, straight-through estimators.",
            runs="Before derivatives at a state, along the entries that move, on four examples of the first batch "
            "(more of small networks, fewer where kinks spoil differences), in float64 up to 50 M parameters, a little "
            "off the state, nearer where entries would lose their part in the loss; and at it where a length is "
            "exactly zero, which is looked for on the whole batch; on the batch as it is where that calls functions "
            "with backward passes of their own that the few examples do not, and on the whole batch, too, where "
            "its graph has more operations than theirs, fewer or others, and slopes where it calls such functions. "
            "`witness=False` leaves it out.",
            cost=3.0,
            tolerance=Tolerance(0.4),
        ),
        "layout": Check(
            catches="A network that computes something else of images whose channels come last.",
            runs="First product of an operator with a convolutional network in float32 on a CPU.",
            cost=2.0,
            tolerance=Tolerance(0.4, most=1e-3),
        ),
        "captured values": Check(
            catches="A captured graph, tiles or halves of a batch, or chunks of rows, whose values are not those of "
            "the whole.",
            runs="First batch of every shape; halves and chunks in every batch, and of the first batch that is halved "
            "the outputs, or (by the sweep's tolerance) derivatives of a few examples, near the state.",
            cost=1.0,
            tolerance=Tolerance(0.5),
        ),
        "sweep": Check(
            catches="Slopes or curvature of the sweep that are not those of a Hessian-vector product.",
            runs="First batch of every shape, on an eighth of its examples, 8 at most; on all where there are fewer "
            "than 16, or where the eighth has no loss of its own, consists of other operations or disagrees.",
            cost=2.0,
            tolerance=Tolerance(0.4),
        ),
        "mixing": Check(
            catches="A network in which an example has a part in another's output, near the state and for examples "
            "that are alike, too: its batches must not be cut.",
            runs="First batch of every shape that is cut into tiles, among copies of its first examples; at further "
            "states among a quarter of it.",
            cost=1.2,
            tolerance=Tolerance(0.5),
        ),
        "captured graphs": Check(
            catches="A network or a loss that has changed since its graph was captured.",
            runs="Every pass, on the examples that the sweep is compared on.",
            cost=0.2,
            tolerance=Tolerance(0.5),
        ),
        "captured shapes": Check(
            catches="An operation whose result has another shape than when it was captured, because values say which: "
            "numbers that were read off that shape are in the graph.",
            runs="Wherever a graph is evaluated.",
            cost=0.0,
        ),
        "products at once": Check(
            catches="An operation that `torch.func.vmap` maps wrongly.",
            runs="First products that an operator makes several of at once.",
            cost=0.0,
            tolerance=Tolerance(0.5),
        ),
        "structured block": Check(
            catches="A dense block made of a layer's inputs, although the layer's weight has another part in the loss.",
            runs="First batch with a part in the block; that the layer's entries are used once, by their module, in "
            "every batch.",
            cost=9.0,
            tolerance=Tolerance(0.5),
        ),
        "backend": Check(
            catches="A product of another library that is not the Hessian's.",
            runs="First product with every selection of entries.",
            cost=9.0,
            tolerance=Tolerance(0.25),
        ),
        "replays": Check(
            catches="A step of training, a sweep or a product that does something else when it is replayed: of a "
            "network that counts its calls, or keeps what it has computed.",
            runs="When it is recorded on a CUDA device, for every shape of batch.",
            cost=3.0,
            tolerance=Tolerance(0.3),
        ),
        "replayed derivatives": Check(
            catches="A network or a loss that has changed since the graph of its derivatives was recorded.",
            runs="Every product on a CUDA device that is replayed, on the first batch.",
            cost=1.0,
            tolerance=Tolerance(0.5),
        ),
    }
)
"""The checks by name; docs/trust.md shows them."""


def near(check: str, found: Any, expected: Any, *, rounding: float, scale: Any, floor: Any = 0.0) -> Any:
    """Where two results are equal up to a check's tolerance.

        |found − expected| ≤ tolerance(ε) · scale + floor

    Infinities of one sign are equal, and so are values that are both not-a-number.

    Args:
        check: Name of the check.
        found: Numbers: a float, a NumPy array or a tensor.
        expected: Numbers of the same kind and shape.
        rounding: ε, the relative rounding error of one operation.
        scale: The size of what was added up to get these numbers.
        floor: A difference that is always allowed: rounding of what cancels.

    Returns:
        True or False for every number, in the form of the results.

    Raises:
        LookupError: There is no such check, or it compares no numbers.
    """
    tolerance = CHECKS[check].tolerance
    if tolerance is None:
        raise LookupError(f"The check {check!r} compares no numbers.")
    both_nan = (found != found) & (expected != expected)
    # Infinities of one sign differ by not-a-number.
    with np.errstate(invalid="ignore"):
        within = abs(found - expected) <= tolerance.at(rounding) * scale + floor
    return (found == expected) | both_nan | within


def all_near(check: str, found: Tensor, expected: Any, *, rounding: float) -> bool:
    """Whether two tensors are equal up to a check's tolerance, relative to the largest finite number expected.

    Args:
        check: Name of the check.
        found: A tensor of floating-point numbers.
        expected: What it should be; anything but a tensor of its shape and type is something else.
        rounding: ε, the relative rounding error of one operation, if it is coarser than that of the tensors' type.
    """
    if not isinstance(expected, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    rounding = max(rounding, torch.finfo(found.dtype).eps)
    # Without a wait for the device to say how many are finite.
    scale = expected.nan_to_num(0.0, 0.0, 0.0).abs().max() if expected.numel() else 0.0
    return bool(near(check, found, expected, rounding=rounding, scale=scale).all())
