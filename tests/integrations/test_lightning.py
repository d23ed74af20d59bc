"""Claim: Lightning's Trainer trains the same network with the callback, and logs what measuring by hand gives."""

import csv
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmc_curvature import BatchLoss, integrations, measure_barrier
from lmc_curvature.errors import OptionError
from lmc_curvature.sources import digits_resnet, load_digits

lightning = pytest.importorskip("lightning.pytorch")

pytestmark = [
    # Lightning's own, of loaders without workers and the like.
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
]
LOADER = load_digits().subset(96).batches(48)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model, self.dropout = digits_resnet(width=2), nn.Dropout(0.1)

    def forward(self, images):
        return self.dropout(self.model(images))

    def training_step(self, batch, index):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def make_module():
    torch.manual_seed(0)
    return Module()


def fit(module, folder, *callbacks, epochs=2, **options):
    data = load_digits().subset(64)
    pixels, labels = next(iter(data.batches(64)))
    dataset = torch.utils.data.TensorDataset(pixels, labels)
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)
    lightning.seed_everything(1, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=lightning.loggers.CSVLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, loader)
    return trainer


def logged(trainer, name):
    """Step to the number that was logged under a name."""
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.check
def test_what_is_logged_is_measured_and_training_is_the_same(tmp_path):
    plain, module = make_module(), make_module()
    without = fit(plain, tmp_path / "without")
    epochs = integrations.LightningCallback(
        LOADER, every_n_epochs=1, record=["barrier", "eigenvalues"], metrics=("loss", "error"), on_error="raise"
    )
    steps = integrations.LightningCallback(LOADER, every_n_steps=3, network="model", prefix="part/", on_error="raise")
    trainer = fit(module, tmp_path / "with", epochs, steps)
    assert same(module, plain)
    moments = [[each["momentum_buffer"] for each in t.optimizers[0].state.values()] for t in (trainer, without)]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    assert module.trainer.callbacks == trainer.callbacks
    # By hand, of two networks that are no part of a training any more.
    first, second = make_module(), make_module()
    second.load_state_dict(module.state_dict())
    measured = measure_barrier(second, first, LOADER, alphas=[0.5], progress=False)
    found = logged(trainer, "lmc/barrier")
    assert list(found) == [4, 8]
    assert found[8] == pytest.approx(measured.barrier(), rel=1e-4)
    assert logged(trainer, "lmc/error_barrier")[8] == pytest.approx(measured.barrier("error"), rel=1e-4)
    assert list(logged(trainer, "lmc/eigenvalue_1")) == [4, 8]
    assert trainer.callback_metrics["lmc/barrier"] == pytest.approx(found[8], rel=1e-5)
    assert list(logged(trainer, "part/barrier")) == [3, 6]
    # Lightning's own numbers are logged as before.
    assert trainer.callback_metrics["loss"] == without.callback_metrics["loss"]


@pytest.mark.check
def test_a_checkpoint_of_lightning_is_a_reference_and_a_loss_may_be_the_module_s_own(tmp_path):
    earlier = make_module()
    fit(earlier, tmp_path / "a", epochs=1).save_checkpoint(tmp_path / "reference.ckpt")
    loss_fn = BatchLoss(lambda module, batch: module.training_step(batch, 0))
    module = make_module()
    callback = integrations.LightningCallback(
        LOADER, reference=tmp_path / "reference.ckpt", every_n_epochs=2, loss_fn=loss_fn, on_error="raise"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(module, tmp_path / "b", callback)
    expected = measure_barrier(module.model, earlier.model, LOADER, alphas=[0.5], progress=False).barrier()
    assert logged(trainer, "lmc/barrier") == {8: pytest.approx(expected, rel=1e-4)}


class WithoutForward(Module):
    """As many people write them: the training step calls a part of the module."""

    forward = lightning.LightningModule.forward

    def training_step(self, batch, index):
        return F.cross_entropy(self.model(batch[0]), batch[1])


@pytest.mark.check
def test_a_module_without_forward_is_refused_before_the_first_step(tmp_path):
    stepped = []

    class Counting(WithoutForward):
        def training_step(self, batch, index):
            stepped.append(index)
            return super().training_step(batch, index)

    with pytest.raises(OptionError, match=r"Counting has no forward.*pass network= .*\(there are 'model', 'dropout'\)"):
        fit(Counting(), tmp_path / "a", integrations.LightningCallback(LOADER, every_n_epochs=1), epochs=1)
    assert not stepped
    loss_fn = BatchLoss(lambda module, batch: F.cross_entropy(module.model(batch[0]), batch[1]))
    for number, options in enumerate(({"network": "model"}, {"loss_fn": loss_fn})):
        callback = integrations.LightningCallback(LOADER, every_n_epochs=1, on_error="raise", **options)
        torch.manual_seed(0)
        trainer = fit(WithoutForward(), tmp_path / str(number), callback, epochs=1)
        assert list(logged(trainer, "lmc/barrier")) == [4]


def test_accumulated_gradients_make_one_record_a_step(tmp_path):
    callback = integrations.LightningCallback(LOADER, every_n_steps=1, on_error="raise")
    trainer = fit(make_module(), tmp_path, callback, epochs=1, accumulate_grad_batches=2)
    assert list(logged(trainer, "lmc/barrier")) == [1, 2]


def test_other_processes_compute_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(lightning.Trainer, "is_global_zero", property(lambda trainer: False))
    callback = integrations.LightningCallback(LOADER, every_n_steps=1, reference="no such file")
    trainer = lightning.Trainer(barebones=True)
    callback.on_train_start(trainer, make_module())
    callback.on_train_batch_end(trainer, make_module(), None, None, 0)
    callback.on_train_epoch_end(trainer, make_module())
    assert not trainer.callback_metrics


def test_without_lightning_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "lmc_curvature.integrations.lightning")
    with pytest.raises(OptionError, match=r"pip install lmc-curvature\[lightning\]"):
        integrations.__getattr__("LightningCallback")
