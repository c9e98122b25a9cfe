import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The tensors are too small for several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
