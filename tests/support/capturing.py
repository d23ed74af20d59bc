"""Capture of small functions, run on other values than those that they were captured with."""

import collections

import torch

from lmc_curvature.curvature.sweep.capture import capture
from lmc_curvature.curvature.sweep.plan import Plan


def numbers(*shape, seed=0):
    """Random numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(stages, state, data):
    """The value that the two stages compute, one after the other."""
    first, second = (Plan(stage, []) for stage in stages)
    values = first.run(state)
    operands = [values[node] for node in first.stage.outputs]
    return second.run([*operands, *data])[second.stage.outputs[0]]


def counts(stage):
    """Names of a stage's operations, with the number of times that each is there."""
    return collections.Counter(str(node.target) for node in stage.operations)


def captured_right(function, state, data, seed=9):
    """The stages of a captured function, after a check that they compute it at other values."""
    stages = capture(function, state, data)
    others = [
        [
            numbers(*tensor.shape, seed=seed + place) if tensor.is_floating_point() else tensor
            for place, tensor in enumerate(some)
        ]
        for some in (state, data)
    ]
    with torch.no_grad():
        torch.testing.assert_close(run(stages, *others), function(*others[0], *others[1]))
    return stages
