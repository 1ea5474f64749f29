"""How right is right: a kernel may err twice as much as plain PyTorch does in the same dtype."""

import torch
from torch import Tensor

FP32_RELATIVE_NORM = 1e-5


def assert_close_to_oracle(name: str, actual: Tensor, eager: Tensor, oracle: Tensor) -> None:
    """``actual`` from the kernel and ``eager`` from the reference, of one dtype; ``oracle`` the same in fp64.

    In norm and at the worst element the error of ``actual`` is at most twice that of ``eager``, plus what
    rounding the oracle itself to that dtype costs; in fp32 the relative norm also stays below 1e-5.
    """
    assert actual.shape == oracle.shape, (name, actual.shape, oracle.shape)
    eps = torch.finfo(actual.dtype).eps
    is_fp32 = actual.dtype == torch.float32
    finite = oracle.isfinite()
    assert torch.equal(actual.double()[~finite], oracle[~finite]), f"{name}: infinities differ"
    assert actual[finite].isfinite().all(), f"{name}: not finite where the oracle is"
    actual, eager, oracle = (x.detach().double()[finite] for x in (actual, eager, oracle))
    if oracle.numel() == 0:
        return
    error, eager_error = actual - oracle, eager - oracle
    norm, bound = error.norm(), 2 * eager_error.norm() + eps * oracle.norm()
    assert norm <= bound, f"{name}: error norm {norm:.3e} > {bound:.3e}"
    worst, bound = error.abs().max(), 2 * eager_error.abs().max() + 2 * eps * oracle.abs().max()
    assert worst <= bound, f"{name}: worst error {worst:.3e} > {bound:.3e}"
    if is_fp32:
        relative = norm / oracle.norm().clamp_min(torch.finfo(torch.float32).tiny)
        assert relative <= FP32_RELATIVE_NORM, f"{name}: relative error norm {relative:.3e}"
