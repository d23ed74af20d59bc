"""Claim: Hugging Face's Trainer trains the same network with the callback, and logs what measuring by hand gives."""

import sys

import pytest
import torch

from lmc_curvature import integrations, measure_barrier
from lmc_curvature.errors import OptionError
from lmc_curvature.sources import find_loss
from tests.support.texts import make_gpt2, texts

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

BATCHES = texts(batches=2)


def train(folder, make_callback=None, **options):
    data = [{name: tensor[row] for name, tensor in batch.items()} for batch in texts(batches=3) for row in range(6)]
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=6,
        learning_rate=0.01,
        logging_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        **({"num_train_epochs": 2} | options),
    )
    model = make_gpt2()
    transformers.set_seed(1)
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    if make_callback is not None:
        trainer.add_callback(make_callback(trainer))
    trainer.train()
    return trainer


def logged(trainer, name):
    """Step to the number that was logged under a name."""
    return {record["step"]: record[name] for record in trainer.state.log_history if name in record}


@pytest.mark.check
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "mixed"])
def test_what_is_logged_is_measured_and_training_is_the_same(precision, tmp_path):
    without = train(tmp_path, **precision)
    trainer = train(
        tmp_path,
        lambda trainer: integrations.TransformersCallback(
            trainer, BATCHES, every_n_epochs=1, record=["barrier", "eigenvalues"], on_error="raise"
        ),
        **precision,
    )
    states = [each.model.state_dict() for each in (trainer, without)]
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    assert logged(trainer, "loss") == logged(without, "loss")
    second = make_gpt2()
    second.load_state_dict(states[0])
    loss_fn = find_loss("next-token")
    expected = measure_barrier(
        second, make_gpt2(), BATCHES, loss_fn=loss_fn, metrics=("loss",), alphas=[0.5], progress=False
    )
    found = logged(trainer, "lmc/barrier")
    assert list(found) == list(logged(trainer, "lmc/eigenvalue_1")) == [3, 6]
    # Without the rounding of mixed precision, whatever training uses.
    assert found[6] == pytest.approx(expected.barrier(), rel=1e-4, abs=1e-6)


@pytest.mark.check
def test_steps_are_counted_and_only_the_first_process_computes(tmp_path, monkeypatch):
    def make(trainer):
        return integrations.TransformersCallback(trainer, BATCHES, reference=1, every_n_steps=2, on_error="raise")

    found = logged(train(tmp_path, make, max_steps=4, gradient_accumulation_steps=2), "lmc/barrier")
    assert list(found) == [2, 4]
    kind = transformers.TrainerState
    monkeypatch.setattr(kind, "is_world_process_zero", property(lambda state: False, lambda state, value: None), False)
    assert logged(train(tmp_path, make, max_steps=2), "lmc/barrier") == {}


def test_without_transformers_the_extra_is_named(monkeypatch):
    for name in ("transformers", "transformers.trainer"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "lmc_curvature.integrations.transformers", raising=False)
    with pytest.raises(OptionError, match=r"pip install lmc-curvature\[transformers\]"):
        integrations.__getattr__("TransformersCallback")
