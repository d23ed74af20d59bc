import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small train several times faster so when the cores are shared with other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
