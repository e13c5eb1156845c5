import pytest
import torch


@pytest.fixture
def single_thread():
    """Tiny models lose more by handing work to threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
