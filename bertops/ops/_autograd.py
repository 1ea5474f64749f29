"""What the autograd.Functions of the ops share."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """For a ``backward`` without a gradient of its own: differentiating its results is an error, never a 0.

    PyTorch's decorator of this name returns gradients without a graph where the upstream gradient has none,
    although they depend on the saved inputs.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> tuple:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        name = type(ctx).__name__.removeprefix("_").removesuffix("Backward")
        anchors = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
        return tuple(
            _Refusal.apply(name, result, *anchors) if isinstance(result, Tensor) else result
            for result in results
        )

    return wrapper


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, result: Tensor, *anchors: Tensor) -> Tensor:
        ctx.name = name
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise RuntimeError(f"bertops {ctx.name}: double backward is not supported")
