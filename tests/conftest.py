"""Runs every test with NaN-filled allocations, on the devices and kernels that this machine has."""

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_filled_allocations():
    """An element that a kernel should have written and did not is NaN, also inside C++."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
