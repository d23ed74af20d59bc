import pytest
import torch
from torch import nn

from lmc_curvature.forking.numerics import fastest_layout, training_kernels
from lmc_curvature.forking.sharing import cpu_threads


@pytest.fixture
def kernels():
    """What chooses kernels on a CUDA device, as it is now; restored after the test."""
    cudnn, before = torch.backends.cudnn, torch.get_float32_matmul_precision()
    yield lambda: (
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
    )
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize(("precision", "rounds"), [("float32", False), ("tf32", True), ("bfloat16", False)])
def test_kernels_are_those_of_the_precision_and_put_back(kernels, before, precision, rounds):
    torch.set_float32_matmul_precision(before)
    now = kernels()
    with pytest.raises(KeyError), training_kernels(torch.device("cuda"), precision):
        assert kernels() == (True, False, True, rounds, "high" if rounds else "highest")
        raise KeyError
    assert kernels() == now
    with training_kernels(torch.device("cpu"), precision):
        assert kernels() == now


@pytest.mark.parametrize(
    ("device", "threads", "precision", "channels_last"),
    [
        ("meta", 1, "float32", False),
        ("meta", 1, "tf32", True),
        ("meta", 2, "bfloat16", True),
        ("cpu", 1, "float32", True),
        ("cpu", 2, "tf32", False),
    ],
)
def test_images_are_laid_out_as_a_device_is_fastest(device, threads, precision, channels_last):
    # What is true of a GPU is told by a network that is on none.
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).to(device)
    expected = torch.channels_last if channels_last else torch.contiguous_format
    with cpu_threads(threads):
        assert fastest_layout(model, precision) == expected
