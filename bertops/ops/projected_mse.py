"""Mean squared error between a teacher's hidden states and a student's, projected to its width."""

from typing import Any

import torch
from torch import Tensor

from bertops import _backend, reference
from bertops.ops import _checks, _linear_losses, _pairs
from bertops.ops._autograd import once_differentiable

_projected_mse_fwd = torch.ops.bertops.projected_mse_fwd.default
_projected_mse_with_grads = torch.ops.bertops.projected_mse_with_grads.default


def projected_mse(
    hidden_s: Tensor,
    hidden_t: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    r"""Squared differences between projected hidden states and a teacher's; the projection is never stored.

    With :math:`d = h_s W^\top + b - h_t` the loss of a row is :math:`\sum_j d_j^2`, and for its upstream
    gradient g, summed over rows where a parameter is shared,

    .. math:: dh_s = 2 g\, d\, W, \quad dW = 2 g\, d^\top h_s, \quad db = 2 g\, d.

    Args:
        hidden_s: the student's (B, N, H_s) or (M, H_s), fp32, bf16 or fp16 (fp64 on CPU); any strides, read
            in place where rows are contiguous and evenly spaced.
        hidden_t: the teacher's (B, N, H_t) or (M, H_t), of a dtype of its own; a constant.
        weight: (H_t, H_s), as ``nn.Linear`` holds it, in the dtype of ``hidden_s``; None compares the hidden
            states as they are, of one width.
        bias: (H_t,), 0 without; goes with ``weight``. TinyBERT's code has one.
        mask: (B, N) or (M,), bool or integer, true for a real token, in any pattern. Other rows have loss 0
            and gradient 0, whatever stands there.
        reduction: ``mean`` over real rows and the width, ``sum`` over both, or ``none``: the sum over the
            width of every row, (B, N) or (M,).
        impl: ``auto``, ``triton``, ``cpu`` or ``reference``; anything but ``auto`` never falls back.

    Returns:
        The loss in fp32 (fp64 for fp64 students): a scalar, or a number a row. Without a real row it is 0.
        Under autocast ``hidden_s`` and the parameters are taken in the autocast dtype, as by ``nn.Linear``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. A teacher tensor that requires
            grad does not.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.

    Without a mask ``mean`` is ``F.mse_loss(F.linear(hidden_s, weight, bias), hidden_t)``, one term of
    TinyBERT's hidden states loss and of its embedding loss in the official code.

    Source: Jiao et al. 2020 (TinyBERT), section 3.2, equations 8 and 9.
    """
    _linear_losses.check_hidden(hidden_s, hidden_t)
    if weight is None:
        if bias is not None:
            raise ValueError("bias must be None without a weight")
        if hidden_t.shape != hidden_s.shape:
            raise ValueError(
                f"hidden_t must have the shape {tuple(hidden_s.shape)} of hidden_s where there is no weight, "
                f"got {_checks.describe(hidden_t)}"
            )
    else:
        hidden_s, weight, bias = _linear_losses.autocast(hidden_s, weight, bias)
        _linear_losses.check_linear(("hidden_s", "weight", "bias"), hidden_s, weight, bias)
        if hidden_t.shape[-1] != weight.shape[0]:
            raise ValueError(
                f"hidden_t must have the width {weight.shape[0]} that weight projects to, "
                f"got {_checks.describe(hidden_t)}"
            )
    _linear_losses.check_reduction(reduction)
    flat = _linear_losses.flat_mask(mask, hidden_s)
    shape = hidden_s.shape[:-1]
    hidden_s, hidden_t = _linear_losses.flat_rows(hidden_s), _linear_losses.flat_rows(hidden_t)
    students = hidden_s, weight, bias
    backend = _backend.resolve("projected_mse", impl, hidden_s.device)
    share = _linear_losses.row_share(reduction, hidden_s, flat, hidden_t.shape[1])
    if backend == "reference":
        rows = reference.projected_mse(*students, hidden_t, flat)
    elif _pairs.needs_grad(*(x for x in students if x is not None)):
        loss = _ProjectedMSE.apply(backend, share, hidden_t, flat, *students)
        return loss.view(shape) if share is None else loss
    else:
        rows = _kernel(backend, "projected_mse_fwd")(*students, hidden_t, flat)
    return rows.view(shape) if share is None else rows.sum() * share


class _ProjectedMSE(torch.autograd.Function):
    """The sum of the rows times ``share``, or the rows without one; see ``_LinearKLDiv`` for when gradients
    form."""

    @staticmethod
    def forward(ctx: Any, backend: str, share: Tensor | None, *inputs: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.reduced = backend, share is not None
        tensors = *inputs[2:], *inputs[:2]
        if share is not None:
            kernel = _kernel(backend, "projected_mse_with_grads")
            return _linear_losses.sum_with_grads(ctx, kernel, share, tensors, ())
        ctx.save_for_backward(*tensors)
        return _kernel(backend, "projected_mse_fwd")(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return (None,) * 7
        if ctx.reduced:
            grads = _linear_losses.saved_grads(ctx, grad)
        else:
            kernel = _kernel(ctx.backend, "projected_mse_with_grads")
            grads = _linear_losses.grads_of_rows(ctx, kernel, grad, ())
        return *(None,) * 4, *grads


def _kernel(backend: str, name: str) -> Any:
    if backend == "interpreter":
        return getattr(_triton_kernels(), name)
    return {
        "projected_mse_fwd": _projected_mse_fwd,
        "projected_mse_with_grads": _projected_mse_with_grads,
    }[name]


def _triton_kernels() -> Any:
    import bertops.kernels.projected_mse as kernels

    return kernels


@torch.library.impl("bertops::projected_mse_fwd", "CUDA")
def _(*arguments: Any) -> Tensor:
    return _triton_kernels().projected_mse_fwd(*arguments)


@torch.library.impl("bertops::projected_mse_with_grads", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _triton_kernels().projected_mse_with_grads(*arguments)
