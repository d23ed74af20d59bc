"""Claim: precision, kernels and derivatives are those that an objective was asked for."""

import pytest
import torch

from lmc_curvature import Objective
from lmc_curvature.objective.numerics import Numerics
from tests.support.networks import NETWORKS

IMAGES = NETWORKS["conv, interpolate"]


@pytest.mark.parametrize("asked", [False, True])
def test_convolutions_on_cuda_round_to_tf32_only_if_asked_to(asked):
    # The flags are there without a device, too.
    numerics = Numerics(torch.device("cuda"), torch.float32, allow_tf32=asked)
    before = torch.backends.cudnn.allow_tf32
    for block in (numerics.differentiating, numerics.differentiating_operations, numerics.exact):
        with block():
            assert torch.backends.cudnn.allow_tf32 is asked
            assert torch.backends.cudnn.deterministic
            assert torch.backends.cudnn.enabled
        assert torch.backends.cudnn.allow_tf32 == before


def test_cudnn_does_not_differentiate_recurrent_networks():
    numerics = Numerics(torch.device("cuda"), torch.float32, recurrent=True)
    with numerics.differentiating():
        assert not torch.backends.cudnn.enabled
    with numerics.exact():
        assert torch.backends.cudnn.enabled


def test_rounding_is_that_of_what_computes():
    objective = Objective(IMAGES.model().float(), IMAGES.batches(), allow_tf32=True)
    assert objective.rounding == 2.0**-23, "TF32 is nothing that a CPU has"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert objective.rounding == 2.0**-7
    assert Objective(IMAGES.model().double(), IMAGES.batches()).rounding == 2.0**-52
    cuda = torch.device("cuda")
    assert Numerics(cuda, torch.float32).rounding == 2.0**-23
    assert Numerics(cuda, torch.float32, allow_tf32=True).rounding == 2.0**-10
    assert Numerics(cuda, torch.float64, allow_tf32=True).rounding == 2.0**-52
