"""How right is right: a kernel may err twice as much as plain PyTorch does in the same dtype."""

import torch
from torch import Tensor

FP32_RELATIVE_NORM = 1e-5
FP64_RELATIVE_NORM = 1e-13


def assert_close_to_oracle(name: str, actual: Tensor, eagers: list[Tensor], oracle: Tensor) -> None:
    """``actual`` from the kernel, ``eagers`` from the reference in the same dtype, ``oracle`` in fp64.

    ``eagers`` differ in the order of their sums: a single one may be right by luck. In norm and at the worst
    element the error of ``actual`` is at most twice the largest of theirs, plus what rounding the oracle
    itself to that dtype costs; in fp32 the relative norm also stays below 1e-5. For fp64 the oracle is no
    better than the kernel, and the relative norm stays below 1e-13.
    """
    assert actual.shape == oracle.shape, (name, actual.shape, oracle.shape)
    eps = torch.finfo(actual.dtype).eps
    finite = oracle.isfinite()
    assert torch.equal(actual.double()[~finite], oracle[~finite]), f"{name}: infinities differ"
    assert actual[finite].isfinite().all(), f"{name}: not finite where the oracle is"
    if not finite.any():
        return
    exact = oracle[finite]
    error = actual.detach().double()[finite] - exact
    relative = error.norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny)
    if actual.dtype == torch.float64:
        assert relative <= FP64_RELATIVE_NORM, f"{name}: relative error norm {relative:.3e}"
        return
    if actual.dtype == torch.float32:
        assert relative <= FP32_RELATIVE_NORM, f"{name}: relative error norm {relative:.3e}"
    eager_errors = [eager.detach().double()[finite] - exact for eager in eagers]
    norm, bound = error.norm(), 2 * max(e.norm() for e in eager_errors) + eps * exact.norm()
    assert norm <= bound, f"{name}: error norm {norm:.3e} > {bound:.3e}"
    worst = error.abs().max()
    bound = 2 * max(e.abs().max() for e in eager_errors) + 2 * eps * exact.abs().max()
    assert worst <= bound, f"{name}: worst error {worst:.3e} > {bound:.3e}"
