"""Claim: what a network or a loss raises is told in a sentence that says what it was given, and what to pass."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, HessianOperator, Objective, measure_barrier, predict_barrier
from lmc_curvature.errors import LMCCurvatureError, LoaderError, LossError, UnsupportedModelError

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CONVOLUTIONS = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class Giving(nn.Module):
    """A network whose output is made by a function of its logits."""

    def __init__(self, make):
        super().__init__()
        self.linear, self.make = nn.Linear(4, 3), make

    def forward(self, x):
        return self.make(self.linear(x))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, z):
        return self.linear(x + z)


def _raise(error):
    raise error


COMPUTATIONS = {
    "loss": lambda model, batches, **options: Objective(model, batches, **options).loss(),
    "gradient": lambda model, batches, **options: Objective(model, batches, **options).gradient(),
    "product": lambda model, batches, **options: HessianOperator(Objective(model, batches, **options)).diagonal(),
    "predict": lambda model, batches, **options: predict_barrier(model, model, batches, progress=False, **options),
    "measure": lambda model, batches, **options: measure_barrier(model, model, batches, progress=False, **options),
}
computations = pytest.mark.parametrize("compute", COMPUTATIONS.values(), ids=COMPUTATIONS)

MISTAKES = {
    "grey images": (
        CONVOLUTIONS,
        (IMAGES[:, :1], Y),
        {},
        LoaderError,
        r"batch 0, whose inputs are a tensor of shape \(6, 1, 8, 8\).*takes 3 channels, and the images have 1",
    ),
    "channels last": (CONVOLUTIONS, (IMAGES.permute(0, 2, 3, 1), Y), {}, LoaderError, r"x.permute\(0, 3, 1, 2\)"),
    "images of bytes": (CONVOLUTIONS, ((255 * IMAGES).byte(), Y), {}, LoaderError, r"x.float\(\) / 255"),
    "bytes in a linear layer": (nn.Linear(4, 3), (X.byte(), Y), {}, LoaderError, r"x.float\(\) / 255"),
    "integers": (nn.Linear(4, 3), (X.long(), Y), {}, LoaderError, r"x.float\(\)"),
    "tokens beyond": (
        nn.Sequential(nn.Embedding(5, 3), nn.Flatten(0, 1)),
        (torch.tensor([[1], [7]]), torch.tensor([0, 1])),
        {},
        LoaderError,
        "index out of range.*run from 1 to 7: is an embedding smaller",
    ),
    "other features": (nn.Linear(9, 3), (X, Y), {}, LoaderError, "inputs are.*RuntimeError: mat1 and mat2 shapes"),
    "NumPy pair": (nn.Linear(4, 3), (X.numpy(), Y.numpy()), {}, LoaderError, "NumPy arrays.*torch.from_numpy"),
    "NumPy targets": (nn.Linear(4, 3), (X, Y.numpy()), {}, LoaderError, "NumPy arrays.*torch.from_numpy"),
    "NumPy array": (
        nn.Linear(4, 3),
        np.zeros((6, 4)),
        {"loss_fn": BatchLoss(lambda model, batch: model(batch).mean())},
        LoaderError,
        "NumPy arrays.*torch.from_numpy",
    ),
    "two inputs": (Two(), ((X, X), Y), {}, LoaderError, r"several inputs.*BatchLoss\(fn\).*model\(\*batch\[0\]\)"),
    "named inputs": (
        Two(),
        ({"x": X, "z": X}, Y),
        {},
        LoaderError,
        r"several inputs.*BatchLoss\(fn\).*model\(\*\*batch\[0\]\)",
    ),
    "three parts": (Two(), (X, X, Y), {}, LoaderError, r"expected an \(x, y\) pair.*BatchLoss\(fn\)"),
    "mapping": (
        Giving(lambda logits: {"hidden": logits, "logits": logits}),
        (X, Y),
        {},
        LossError,
        r"keys 'hidden', 'logits'.*lambda output, target: F.cross_entropy\(output\['logits'\], target\).*BatchLoss",
    ),
    "other mapping": (Giving(lambda z: {"y": z}), (X, Y), {"loss_fn": nn.NLLLoss()}, LossError, r"output\['y'\]"),
    "tuple": (Giving(lambda z: (z, z)), (X, X[:, :3]), {"loss_fn": F.mse_loss}, LossError, r"output\[0\].*BatchLoss"),
    "object": (Giving(lambda z: SimpleNamespace(logits=z)), (X, Y), {}, LossError, r"output\.logits"),
    "column of labels": (nn.Linear(4, 3), (X, Y[:, None]), {}, LossError, "targets a tensor of shape.*class indices"),
    "small labels": (nn.Linear(4, 3), (X, Y.int()), {}, LossError, r"class indices \(n, …\) of type torch.int64"),
    "real labels": (nn.Linear(4, 3), (X, Y.float()), {}, LossError, "real-valued targets pass loss_fn=F.mse_loss"),
    "binary, other shapes": (
        nn.Linear(4, 1),
        (X, Y.clamp(max=1).float()),
        {"loss_fn": F.binary_cross_entropy_with_logits},
        LossError,
        "loss_fn failed on batch 0, whose outputs are .*: ValueError: Target size .* must be the same as input size",
    ),
    "BatchLoss": (
        nn.Linear(4, 3),
        {"x": X},
        {"loss_fn": BatchLoss(lambda model, batch: model(batch["ids"]).mean())},
        LossError,
        "BatchLoss failed on batch 0, a mapping with keys 'x': KeyError: 'ids'",
    ),
    "BatchLoss that differentiates": (
        nn.Linear(4, 3),
        (X, Y),
        {"loss_fn": BatchLoss(lambda model, batch: torch.autograd.grad(model(batch[0]).sum(), model.weight)[0].sum())},
        LossError,
        r"element 0 of tensors does not require grad.*one that takes some itself does so in torch\.enable_grad\(\)",
    ),
    "no forward": (nn.Module(), (X, Y), {}, UnsupportedModelError, "NotImplementedError"),
}


@pytest.mark.parametrize(("model", "batch", "options", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told(model, batch, options, error, message):
    with pytest.raises(error, match=message):
        Objective(model, [batch], **options).loss()


@computations
@pytest.mark.parametrize("name", ["grey images", "tuple", "two inputs", "column of labels"])
def test_they_are_told_whatever_is_computed(compute, name):
    model, batch, options, error, message = MISTAKES[name]
    with pytest.raises(error, match=message) as caught:
        compute(model, [batch], **options)
    assert isinstance(caught.value.__cause__, (RuntimeError, TypeError, AttributeError))


@computations
@pytest.mark.parametrize(
    "error", [KeyError("a"), AttributeError("b"), IndexError("c"), ZeroDivisionError(), OSError("d")]
)
@pytest.mark.parametrize("place", ["network", "loss"])
def test_whatever_is_raised_is_an_error_of_ours(compute, error, place):
    model = Giving(lambda logits: _raise(error)) if place == "network" else nn.Linear(4, 3)
    with pytest.raises(LMCCurvatureError, match=f"failed on batch 0.*: {type(error).__name__}") as caught:
        compute(model, [(X, Y)], loss_fn=lambda output, target: _raise(error))
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, LossError if place == "loss" else LoaderError)


@computations
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), MemoryError(), KeyboardInterrupt(), LossError("ours")]
)
def test_some_errors_pass_as_they_are(compute, error):
    for model, loss_fn in ((Giving(lambda _: _raise(error)), None), (nn.Linear(4, 3), lambda *_: _raise(error))):
        with pytest.raises(type(error)) as caught:
            compute(model, [(X, Y)], loss_fn=loss_fn)
        assert caught.value is error


def test_later_batches_are_named():
    with pytest.raises(LoaderError, match="failed on batch 1, whose inputs"):
        Objective(nn.Linear(4, 3), [(X, Y), (X[:, :2], Y)]).loss()
