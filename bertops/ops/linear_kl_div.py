"""KL divergence between a teacher's and a student's vocabulary, without either matrix of logits."""

from typing import Any

import torch
from torch import Tensor

from bertops import _backend, reference
from bertops.ops import _linear_losses, _pairs
from bertops.ops._autograd import once_differentiable

_linear_kl_div_fwd = torch.ops.bertops.linear_kl_div_fwd.default
_linear_kl_div_with_grads = torch.ops.bertops.linear_kl_div_with_grads.default


def linear_kl_div(
    hidden_s: Tensor,
    weight_s: Tensor,
    hidden_t: Tensor,
    weight_t: Tensor,
    *,
    bias_s: Tensor | None = None,
    bias_t: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    r"""T² KL(teacher ‖ student) between two models' soft predictions of a vocabulary of V words.

    With the logits :math:`z_s = h_s W_s^\top + b_s` and :math:`z_t = h_t W_t^\top + b_t` of a row and
    :math:`p = \mathrm{softmax}(z / T)`

    .. math:: \mathrm{KL} = T^2 \sum_v p^t_v \left(\ln p^t_v - \ln p^s_v\right)

    in nats, and for the upstream gradient g of the row, summed over rows where a parameter is shared,

    .. math:: dz_s = g\, T \left(p^s - p^t\right), \quad
        dh_s = dz_s W_s, \quad dW_s = dz_s^\top h_s, \quad db_s = dz_s.

    Neither (M, V) matrix of logits is stored: rows go through in chunks, and where a loss is reduced the
    gradients form in the forward, while the logits of their chunk are there.

    Args:
        hidden_s: the student's (B, N, H_s) or (M, H_s), fp32, bf16 or fp16 (fp64 on CPU); any strides, read
            in place where rows are contiguous and evenly spaced.
        weight_s: (V, H_s), as ``nn.Linear`` holds it, in the dtype of ``hidden_s``; or an embedding table.
        hidden_t, weight_t: the teacher's, of the same rows and V, of a width and dtype of their own;
            constants. A table that both models share is ``weight_t=weight_s.detach()``.
        bias_s, bias_t: (V,), 0 without.
        temperature: T > 0.
        mask: (B, N) or (M,), bool or integer, true for a real token, in any pattern. Other rows have loss 0
            and gradient 0, whatever stands there.
        reduction: ``mean`` over real rows, ``sum``, or ``none`` for (B, N) or (M,).
        impl: ``auto``, ``triton``, ``cpu`` or ``reference``; anything but ``auto`` never falls back.

    Returns:
        The loss in fp32 (fp64 for fp64 students): a scalar, or a number a row. Without a real row it is 0.
        Under autocast hidden states and parameters are taken in the autocast dtype, as by ``nn.Linear``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. A teacher tensor that requires
            grad does not.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.

    ``mean`` is the soft-target loss of the official DistilBERT code, ``nn.KLDivLoss("batchmean")`` over the
    real tokens times T².

    Source: Hinton et al. 2015, section 2; Sanh et al. 2019 (DistilBERT), section 2.
    """
    student, teacher = ("hidden_s", "weight_s", "bias_s"), ("hidden_t", "weight_t", "bias_t")
    _linear_losses.check_hidden(hidden_s, hidden_t)
    for name, x in zip(teacher[1:], (weight_t, bias_t), strict=True):
        if isinstance(x, Tensor):
            _pairs.check_teacher(name, x)
    inputs = hidden_s, weight_s, bias_s, hidden_t, weight_t, bias_t
    hidden_s, weight_s, bias_s, hidden_t, weight_t, bias_t = _linear_losses.autocast(*inputs)
    _linear_losses.check_linear(student, hidden_s, weight_s, bias_s)
    _linear_losses.check_linear(teacher, hidden_t, weight_t, bias_t)
    if weight_t.shape[0] != weight_s.shape[0]:
        raise ValueError(
            f"weight_t must have the {weight_s.shape[0]} rows of weight_s, got {tuple(weight_t.shape)}"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a number > 0, got {temperature!r}")
    _linear_losses.check_reduction(reduction)
    flat = _linear_losses.flat_mask(mask, hidden_s)
    shape = hidden_s.shape[:-1]
    hidden_s, hidden_t = _linear_losses.flat_rows(hidden_s), _linear_losses.flat_rows(hidden_t)
    students, constants = (hidden_s, weight_s, bias_s), (hidden_t, weight_t, bias_t, flat, float(temperature))
    backend = _backend.resolve("linear_kl_div", impl, hidden_s.device)
    share = _linear_losses.row_share(reduction, hidden_s, flat)
    if backend == "reference":
        rows = reference.linear_kl_div(*students, *constants)
    elif _pairs.needs_grad(*(x for x in students if x is not None)):
        loss = _LinearKLDiv.apply(backend, share, *constants, *students)
        return loss.view(shape) if share is None else loss
    else:
        rows = _kernel(backend, "linear_kl_div_fwd")(*students, *constants)
    return rows.view(shape) if share is None else rows.sum() * share


class _LinearKLDiv(torch.autograd.Function):
    """The sum of the rows times ``share``, or the rows without one.

    Gradients of a sum form in the forward. Those of rows wait for the upstream gradient of each, and the
    logits are computed again.
    """

    @staticmethod
    def forward(ctx: Any, backend: str, share: Tensor | None, *inputs: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        *constants, temperature, hidden_s, weight_s, bias_s = inputs
        ctx.backend, ctx.reduced, ctx.temperature = backend, share is not None, temperature
        tensors = hidden_s, weight_s, bias_s, *constants
        if share is not None:
            kernel = _kernel(backend, "linear_kl_div_with_grads")
            return _linear_losses.sum_with_grads(ctx, kernel, share, tensors, (temperature,))
        ctx.save_for_backward(*tensors)
        return _kernel(backend, "linear_kl_div_fwd")(*tensors, temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return (None,) * 10
        if ctx.reduced:
            grads = _linear_losses.saved_grads(ctx, grad)
        else:
            kernel = _kernel(ctx.backend, "linear_kl_div_with_grads")
            grads = _linear_losses.grads_of_rows(ctx, kernel, grad, (ctx.temperature,))
        return *(None,) * 7, *grads


def _kernel(backend: str, name: str) -> Any:
    if backend == "interpreter":
        return getattr(_triton_kernels(), name)
    return {
        "linear_kl_div_fwd": _linear_kl_div_fwd,
        "linear_kl_div_with_grads": _linear_kl_div_with_grads,
    }[name]


def _triton_kernels() -> Any:
    import bertops.kernels.linear_kl_div as kernels

    return kernels


@torch.library.impl("bertops::linear_kl_div_fwd", "CUDA")
def _(*arguments: Any) -> Tensor:
    return _triton_kernels().linear_kl_div_fwd(*arguments)


@torch.library.impl("bertops::linear_kl_div_with_grads", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _triton_kernels().linear_kl_div_with_grads(*arguments)
