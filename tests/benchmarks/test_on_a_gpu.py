import pytest
import torch

from tests.support.benchmarking import check_on_a_gpu


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("script", ["projection", "hvp", "blocks", "hvp_vs_exact", "spectrum", "scaling", "training"])
def test_scripts(script, tmp_path):
    check_on_a_gpu(script, tmp_path)
