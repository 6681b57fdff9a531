import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    # thousands of tiny operations: sharing each of them costs more than it saves, and on busy
    # cores a hundred times more
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
