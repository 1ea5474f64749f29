"""Runs every test with NaN-filled allocations, on the kernels that this machine can run."""

import pytest
import torch

from bertops import _backend


def kernels_here() -> list[tuple[str, str]]:
    """(impl, device) pairs; Triton runs on the GPU, or interpreted under TRITON_INTERPRET=1."""
    pairs = []
    if _backend.extension_error is None:
        pairs.append(("cpu", "cpu"))
    if torch.cuda.is_available():
        pairs.append(("triton", "cuda"))
    elif _backend.TRITON_INTERPRET:
        pairs.append(("triton", "cpu"))
    return pairs


def row_kernels_here() -> list[tuple[str, str]]:
    """(impl, device) pairs of the ops that have a CUDA C++ kernel instead of a Triton one."""
    pairs = []
    if _backend.extension_error is None:
        pairs.append(("cpu", "cpu"))
    if _backend.extension_has_cuda and torch.cuda.is_available():
        pairs.append(("cuda", "cuda"))
    return pairs


def pytest_generate_tests(metafunc):
    for name, pairs_here in (("kernel", kernels_here), ("row_kernel", row_kernels_here)):
        if name in metafunc.fixturenames:
            pairs = pairs_here()
            metafunc.parametrize(name, pairs, ids=[f"{impl}-on-{device}" for impl, device in pairs])


@pytest.fixture(autouse=True)
def nan_filled_allocations():
    """An element that a kernel should have written and did not is NaN, also inside C++."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
