"""Networks by name for experiments that take seconds, and what their directories hold."""

from collections import OrderedDict

import torch
from torch import nn

from lmc_curvature.sources import digits_resnet


def contents(path):
    """Every file below a directory with its bytes, locks apart."""
    files = (file for file in path.rglob("*") if file.is_file() and "locks" not in file.parts)
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def tiny(num_classes=10, in_channels=1):
    """A network of four layers with everything that tracing must tell apart, for 8×8 images."""
    layers = OrderedDict(
        first=nn.Conv2d(in_channels, 2, 3, bias=False),
        first_norm=nn.BatchNorm2d(2),
        relu=nn.ReLU(),
        second=nn.Conv2d(2, 2, 3, bias=False),
        second_norm=nn.BatchNorm2d(2),
        flatten=nn.Flatten(),
        hidden=nn.Linear(32, 8),
        tanh=nn.Tanh(),
        linear=nn.Linear(8, num_classes),
    )
    return nn.Sequential(layers)


class Watch:
    """Counts the steps of training that watched networks make in this process, and calls `on_step` at each.

    `on_step` is given the number of the step, from 1, and returns the logits to go on with.
    """

    def __init__(self):
        self.reset()

    def reset(self):
        self.steps = 0
        self.on_step = lambda step, logits: logits

    def __call__(self, module, inputs, logits):
        if not (module.training and torch.is_grad_enabled()):
            return logits
        self.steps += 1
        return self.on_step(self.steps, logits)

    def diverge(self, *steps):
        """Let the loss of some steps be no number."""
        self.on_step = lambda step, logits: logits * float("nan") if step in steps else logits


WATCH = Watch()


def watched(num_classes=10):
    """A narrow network for the digits, its training watched by `WATCH`."""
    model = digits_resnet(width=2, num_classes=num_classes)
    model.register_forward_hook(WATCH)
    return model


class Unsteady(nn.Module):
    """A network that is another in training, as some of torchvision's are, and draws random numbers."""

    def __init__(self, training="", num_classes=10):
        super().__init__()
        self.in_training = training
        self.linear = nn.Linear(64, num_classes)
        self.norm = nn.BatchNorm1d(num_classes)

    def forward(self, x):
        logits = self.norm(self.linear(x.flatten(1)))
        if self.training and self.in_training == "an assertion":
            raise AssertionError("Wrong image height!")
        if self.training and self.in_training == "a pair":
            return logits, logits
        return nn.functional.dropout(logits, training=self.training)
