"""What a forking experiment is: a parent, the epochs its children are forked at, and what is traced along the way."""

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, JsonValue, field_validator

from lmc_curvature.errors import ConfigurationError
from lmc_curvature.forking.configuration import Configuration
from lmc_curvature.forking.training import TrainingConfig
from lmc_curvature.objective.normalization import BatchNormPolicy

When = Literal["all", "last", "never"]


class TraceConfig(Configuration):
    """What is computed between siblings, at every epoch that was stored.

    Attributes:
        examples: Of the data, a fixed random sample; null for all.
        batch_size: Examples a batch.
        batch_norm: What batch normalisation does between siblings; see `measure_barrier`.
        partition: The partition into layers; see `measure_barrier`.
        alphas: Positions on the segment, for the whole network.
        layer_alphas: Positions on the segment, for sets of layers, which cost two evaluations a position.
        test: Measure on the test split, too.
        layers: At which epochs each layer's barrier is measured. It is predicted at all of them.
        cumulative: At which epochs the barriers of the first and of the last k layers are measured.

    Raises:
        ConfigurationError: A key is unknown, missing, or has a bad value.
    """

    examples: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=256, ge=1)
    batch_norm: BatchNormPolicy = "interpolate"
    partition: str = "fused"
    alphas: int = Field(default=11, ge=3)
    layer_alphas: int = Field(default=5, ge=3)
    test: bool = True
    layers: When = "all"
    cumulative: When = "all"


class ForkConfig(Configuration):
    """A parent, and children forked from it at some epochs.

    Attributes:
        training: The schedule, common to the parent and all children.
        fork_epochs: Epochs of the parent to fork at, increasing; 0 is the initialisation.
        snapshot_epochs: Epochs of the schedule, besides the last, at which children are stored for tracing; or a
            number, for every so many.
        data: What `load_data` takes.
        limit: Train on at most this many examples, a fixed random sample.
        model: What `make_model` takes.
        model_options: Options of the network.
        init_seed: Decides the parent's initialisation.
        order_seed: Decides the order and augmentation of the parent's examples. Child c has the order seed
            `order_seed + 1 + c` at every fork, so forks differ by their epoch alone.
        children: Children of each fork, at least 2; the first two are traced.
        threads: CPU threads that a process trains with; by default as many as torch uses. The last bits of a network
            depend on the number. Small networks train fastest with one thread in each of several processes.
        trace: What `trace_forks` computes. Training does not depend on it.

    Raises:
        ConfigurationError: A key is unknown, missing, or has a bad value.
    """

    training: TrainingConfig
    fork_epochs: tuple[int, ...] = Field(min_length=1)
    snapshot_epochs: tuple[int, ...] = ()
    data: str = "digits"
    limit: int | None = Field(default=None, ge=1)
    model: str = "digits-resnet"
    model_options: dict[str, JsonValue] = Field(default_factory=dict)
    init_seed: int = Field(default=0, ge=0, lt=2**63)
    order_seed: int = Field(default=0, ge=0, lt=2**63)
    children: int = Field(default=2, ge=2)
    threads: int | None = Field(default=None, ge=1)
    trace: TraceConfig = Field(default_factory=TraceConfig)

    @field_validator("fork_epochs")
    @classmethod
    def _forks_within_schedule(cls, fork_epochs: tuple[int, ...], info: Any) -> tuple[int, ...]:
        return _check_epochs(fork_epochs, info.data.get("training"), first=0)

    @field_validator("snapshot_epochs", mode="before")
    @classmethod
    def _every_so_many(cls, value: Any, info: Any) -> Any:
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if value < 1:
            raise ValueError(f"{value}: expected a list of epochs, or at least 1 for every so many.")
        training = info.data.get("training")
        return () if training is None else tuple(range(value, training.epochs, value))

    @field_validator("snapshot_epochs")
    @classmethod
    def _snapshots_within_schedule(cls, epochs: tuple[int, ...], info: Any) -> tuple[int, ...]:
        return _check_epochs(epochs, info.data.get("training"), first=1)

    @property
    def parent_epochs(self) -> tuple[int, ...]:
        """The epochs at which the parent is stored: the fork epochs and the last."""
        return (*self.fork_epochs, self.training.epochs)

    def child_epochs(self, fork_epoch: int) -> tuple[int, ...]:
        """The epochs at which the children of a fork are stored."""
        return (*(epoch for epoch in self.snapshot_epochs if epoch > fork_epoch), self.training.epochs)


def _check_epochs(epochs: tuple[int, ...], training: TrainingConfig | None, *, first: int) -> tuple[int, ...]:
    if list(epochs) != sorted(set(epochs)):
        raise ValueError(f"{epochs} must increase.")
    # A bad schedule is reported by itself.
    if training is not None:
        outside = [epoch for epoch in epochs if not first <= epoch < training.epochs]
        if outside:
            raise ValueError(
                f"{outside[0]} is outside the schedule of {training.epochs} epochs; choose from {first} to "
                f"{training.epochs - 1}."
            )
    return epochs


def load_config(path: str | os.PathLike[str], **changes: Any) -> ForkConfig:
    """Read the configuration of an experiment from a YAML file.

    Args:
        path: The file; its keys are the attributes of `ForkConfig`.
        **changes: Values that replace those of the file.

    Raises:
        ConfigurationError: The file is missing, is not YAML, or holds an unknown key or a bad value. The message has a
            line for each.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror}); expected a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(
            f"{path} holds {type(values).__name__}; expected keys such as training and fork_epochs."
        )
    strange = [key for key in values if not isinstance(key, str)]
    if strange:
        raise ConfigurationError(f"{path}: {strange[0]!r} is not a name; expected keys such as training.")
    try:
        return ForkConfig(**{**values, **changes})
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}:\n{error}") from error
