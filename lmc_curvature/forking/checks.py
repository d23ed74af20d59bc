"""Checks of an experiment before anything is trained or traced."""

import torch

from lmc_curvature.errors import ConfigurationError, DataError
from lmc_curvature.forking.configuration import ForkConfig, TraceConfig
from lmc_curvature.forking.directory import initial_model
from lmc_curvature.segment.partition import LayerPartition
from lmc_curvature.sources import ImageDataset, Split


def check_fit(config: ForkConfig, data: ImageDataset) -> None:
    """Check that the network takes the images and has an output for each class, in evaluation and in training.

    It is tried on a network of its own, and the global random state is as before.

    Raises:
        ConfigurationError: It does not.
    """
    model = initial_model(config)
    batch_size = config.training.batch_size
    # One image if an epoch ends with one: batch normalisation may then have nothing to average over.
    count = min(2, len(data) % batch_size or batch_size)
    x, _ = next(iter(data.subset(count).to("cpu").batches(count)))
    expected = (count, len(data.class_names))
    for mode in ("evaluation", "training"):
        model.train(mode == "training")
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                logits = model(x)
        except (RuntimeError, AssertionError, ValueError, TypeError, LookupError) as error:
            raise ConfigurationError(
                f"model: in {mode}, {config.model!r} cannot take images of shape {tuple(x.shape[1:])} from "
                f"{config.data!r}, {count} a batch ({error}). Choose another network or batch size, or set its input "
                "channels in model_options."
            ) from error
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if found != expected:
            raise ConfigurationError(
                f"model_options: in {mode}, {config.model!r} gives {found} for {count} of the images of "
                f"{config.data!r}; expected logits alone, a tensor {expected}. Set num_classes to {expected[1]}, "
                "choose another network, or switch off what else it gives (aux_logits: false)."
            )


def check_layers(config: ForkConfig) -> None:
    """Check that the network can be cut into the layers that are to be traced.

    Raises:
        PartitionError: There is no such partition, or it does not fit the network.
    """
    LayerPartition.of(initial_model(config), config.trace.partition, batch_norm=config.trace.batch_norm)


def check_examples(trace: TraceConfig, data: ImageDataset, split: Split) -> None:
    """Check that there are as many examples as are to be traced.

    Raises:
        DataError: There are fewer.
    """
    if trace.examples is not None and trace.examples > len(data):
        raise DataError(f"trace.examples: {trace.examples} were asked for; the {split} split has {len(data)}.")
