"""The configuration of a forking experiment: a schedule, the epochs to fork at, and what to trace of the siblings.

Configurations are frozen and strict about keys; their errors name the key.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, field_validator

from lmc_curvature.errors import ConfigurationError, counted, suggest
from lmc_curvature.objective.normalization import BatchNormPolicy

When = Literal["all", "last", "never"]
Precision = Literal["float32", "tf32", "bfloat16"]


class Configuration(BaseModel):
    """A frozen set of named options.

    Raises:
        ConfigurationError: A key is unknown, missing, or has a bad value. The message has a line for each.
    """

    # pydantic before 2.10 reserves every name that begins with "model_".
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigurationError(_describe_problems(error, type(self).model_fields)) from error


def _no_truth_value(value: Any) -> Any:
    # To pydantic they are zero and one; in YAML, yes, no, on and off are truth values, too.
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {str(value).lower()}.")
    return value


Integer = Annotated[int, BeforeValidator(_no_truth_value)]
Real = Annotated[float, BeforeValidator(_no_truth_value)]
_Kind = TypeVar("_Kind", bound=Configuration)


class TrainingConfig(Configuration):
    """A schedule of stochastic gradient descent.

    Attributes:
        epochs: Passes over the data.
        learning_rate: The learning rate before any milestone.
        milestones: Epochs after which the learning rate is multiplied by `gamma`, increasing.
        gamma: The factor of the learning rate at each milestone.
        momentum: The momentum of SGD, in [0, 1).
        weight_decay: Coefficient of the L2 penalty, added to the gradient.
        batch_size: Examples a step; the last batch of an epoch may be short.
        warmup_epochs: The learning rate rises linearly, step by step, over this many epochs.
        augmentation: `"crop-flip"`: random crops after padding by 4 pixels, and random mirror images; or `"none"`.
        precision: `"float32"`; `"tf32"`, which lets a CUDA device round to ten bits what convolutions and matrix
            products take, and is float32 elsewhere; or `"bfloat16"`, by autocast: parameters, momentum, running
            statistics and the loss stay in float32.

    Raises:
        ConfigurationError: A key is unknown, missing, or has a bad value.
    """

    epochs: Integer = Field(ge=1, le=1_000_000)
    learning_rate: Real = Field(gt=0, allow_inf_nan=False)
    milestones: tuple[Integer, ...] = ()
    gamma: Real = Field(default=0.1, gt=0, le=1)
    momentum: Real = Field(default=0.9, ge=0, lt=1)
    weight_decay: Real = Field(default=0.0, ge=0, allow_inf_nan=False)
    batch_size: Integer = Field(default=128, ge=1)
    warmup_epochs: Integer = Field(default=0, ge=0)
    augmentation: Literal["none", "crop-flip"] = "none"
    precision: Precision = "float32"

    @field_validator("milestones")
    @classmethod
    def _milestones_within_schedule(cls, milestones: tuple[int, ...], info: Any) -> tuple[int, ...]:
        return _check_epochs(milestones, info.data.get("epochs"), first=1)


class TraceConfig(Configuration):
    """The choice of what is computed between siblings, at every epoch that was stored.

    Attributes:
        examples: How many examples are taken, a fixed random sample; null for all.
        batch_size: Examples a batch.
        batch_norm: What batch normalisation does between siblings; see `measure_barrier`.
        anchors: How many points of the segment predictions are made from, evenly spaced; see `predict_barrier`. With
            the two ends alone, 2, they are of second order.
        partition: The partition into layers; see `measure_barrier`.
        alphas: Positions on the segment, for the whole network.
        layer_alphas: Positions on the segment, for sets of layers, which cost two evaluations a position.
        test: Measure on the test split, too.
        layers: At which epochs each layer's barrier is measured. It is predicted at all of them.
        cumulative: At which epochs the barriers of the first and of the last k layers are measured.

    Raises:
        ConfigurationError: A key is unknown, missing, or has a bad value.
    """

    examples: Integer | None = Field(default=None, ge=1)
    batch_size: Integer = Field(default=256, ge=1)
    batch_norm: BatchNormPolicy = "interpolate"
    anchors: Integer = Field(default=3, ge=2)
    partition: str = "fused"
    alphas: Integer = Field(default=11, ge=3)
    layer_alphas: Integer = Field(default=5, ge=3)
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
    fork_epochs: tuple[Integer, ...] = Field(min_length=1)
    snapshot_epochs: tuple[Integer, ...] = ()
    data: str = "digits"
    limit: Integer | None = Field(default=None, ge=1)
    model: str = "digits-resnet"
    model_options: dict[str, JsonValue] = Field(default_factory=dict)
    init_seed: Integer = Field(default=0, ge=0, lt=2**63)
    order_seed: Integer = Field(default=0, ge=0, lt=2**63)
    children: Integer = Field(default=2, ge=2, le=10_000)
    threads: Integer | None = Field(default=None, ge=1, le=4096)
    trace: TraceConfig = Field(default_factory=TraceConfig)

    @field_validator("snapshot_epochs", mode="before")
    @classmethod
    def _every_so_many(cls, value: Any, info: Any) -> Any:
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if value < 1:
            raise ValueError(f"{value}: expected a list of epochs, or at least 1 for every so many.")
        training = info.data.get("training")
        return () if training is None else tuple(range(value, training.epochs, value))

    @field_validator("fork_epochs", "snapshot_epochs")
    @classmethod
    def _within_schedule(cls, epochs: tuple[int, ...], info: Any) -> tuple[int, ...]:
        training = info.data.get("training")
        first = 0 if info.field_name == "fork_epochs" else 1
        return _check_epochs(epochs, None if training is None else training.epochs, first=first)

    def child_epochs(self, fork_epoch: int) -> tuple[int, ...]:
        """The epochs at which the children of a fork are stored."""
        return (*(epoch for epoch in self.snapshot_epochs if epoch > fork_epoch), self.training.epochs)


def parse_config(kind: type[_Kind], values: dict[str, Any], *, source: str) -> _Kind:
    """Return the configuration that some values make.

    Args:
        kind: Its class.
        values: Its keys and their values.
        source: The beginning of error messages: where the values are from.

    Raises:
        ConfigurationError: A key is unknown, missing, or has a bad value.
    """
    try:
        return kind(**values)
    except ConfigurationError as error:
        raise ConfigurationError(f"{source}:\n{error}") from error


def stored_trace(values: dict[str, Any]) -> dict[str, Any]:
    """What a file says is traced, of whichever release: earlier ones knew no anchors but the two ends."""
    return {"anchors": 2, **values}


def load_config(path: str | os.PathLike[str], **changes: Any) -> ForkConfig:
    """Read the configuration of an experiment from a YAML file.

    Args:
        path: The file; its keys are the attributes of `ForkConfig`.
        **changes: Values that replace those of the file.

    Raises:
        ConfigurationError: The file is missing, is not YAML, has aliases, which stand for other parts of it, or holds
            an unknown key or a bad value. The message has a line for each.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses aliases, of which a few of each other stand for more than any memory holds."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ConfigurationError(f"{path} has the alias *{self.peek_event().anchor}: write out what it is.")
            return super().compose_node(parent, index)

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        repeated = _repeated_key(yaml.compose(text, Loader))
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror}); expected a YAML file.") from error
    except ConfigurationError:
        raise
    # Dates and numbers that there are not, tags without a value, and nesting without end have errors of their own.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        # Of several lines, with a picture of the place.
        raise ConfigurationError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if repeated is not None:
        raise ConfigurationError(f"{path}: {repeated}; expected each key once.")
    if not isinstance(values, dict):
        raise ConfigurationError(
            f"{path} holds {type(values).__name__}; expected keys such as training and fork_epochs."
        )
    mappings = [each for each in (values, *values.values()) if isinstance(each, dict)]
    strange = [key for each in mappings for key in each if not isinstance(key, str)]
    if strange:
        raise ConfigurationError(f"{path}: {strange[0]!r} is not a name; expected keys such as training.")
    return parse_config(ForkConfig, {**values, **changes}, source=str(path))


def _repeated_key(node: Any) -> str | None:
    """A key that a mapping in a YAML document has twice, and where; None if none has."""
    lines: dict[str, int] = {}
    for item in node.value if isinstance(getattr(node, "value", None), list) else ():
        key, value = item if isinstance(item, tuple) else (None, item)
        if key is not None and isinstance(key.value, str):
            line = key.start_mark.line + 1
            if key.value in lines:
                return f"the key {key.value!r} is in line {lines[key.value]} and in line {line}"
            lines[key.value] = line
        if found := _repeated_key(value):
            return found
    return None


def check_same(stored: Configuration, given: Configuration, *, held: str, remedy: str) -> None:
    """Check that a configuration is the one that was stored.

    Args:
        stored: The stored one.
        given: The one to compare it with.
        held: The beginning of the message: where what is stored.
        remedy: What may be done instead of giving the same.

    Raises:
        ConfigurationError: It is another. The message has a line for each key in which they differ.
    """
    changes = _differences(stored.model_dump(mode="json"), given.model_dump(mode="json"))
    if changes:
        lines = (f"{held} another configuration:", *changes, f"{remedy}, or give the same configuration.")
        raise ConfigurationError("\n".join(lines))


def _differences(stored: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted(stored.keys() | given.keys()):
        old, new = stored.get(key), given.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {json.dumps(old)} there, {json.dumps(new)} now")
    return lines


def _describe_problems(error: ValidationError, keys: Collection[str]) -> str:
    """Return one line `key: problem` for each problem, dots leading into nested configurations.

    Args:
        error: What pydantic found.
        keys: The keys that would have been right, to suggest one for a misspelt key.
    """
    lines: list[str] = []
    for item in error.errors(include_url=False):
        location = ".".join(str(part) for part in item["loc"])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ConfigurationError):
            lines += [f"{location}.{line}" for line in str(cause).splitlines()]
        elif item["type"] == "extra_forbidden":
            lines.append(f"{location}: unknown key; {suggest(location, keys)}")
        elif item["type"] == "missing":
            lines.append(f"{location}: missing; a value is required.")
        elif cause is not None:
            lines.append(f"{location}: {cause}")
        else:
            lines.append(f"{location}: {item['msg']}, got {item['input']!r}.")
    return "\n".join(lines)


def _check_epochs(epochs: tuple[int, ...], schedule: int | None, *, first: int) -> tuple[int, ...]:
    if list(epochs) != sorted(set(epochs)):
        raise ValueError(f"{epochs} must increase.")
    # A bad schedule is reported by itself.
    outside = [] if schedule is None else [epoch for epoch in epochs if not first <= epoch < schedule]
    if schedule is not None and outside:
        raise ValueError(
            f"{outside[0]} is outside the schedule of {counted(schedule, 'epoch')}; choose from {first} to "
            f"{schedule - 1}."
        )
    return epochs
