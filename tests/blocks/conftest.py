"""Blocks are small."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Blocks of eight channels take less time than threads that wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
