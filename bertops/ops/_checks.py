"""Argument checks that ops share. Each names the argument, what came and what was expected."""

from itertools import pairwise

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ID_DTYPES = (torch.int64, torch.int32)


def describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{x.dtype} tensor of shape {tuple(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k, v are (B, H, N, D) of one shape, dtype and device, with a supported dtype and head dim."""
    check_heads("q", q)
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)


def check_heads(name: str, x: Tensor) -> None:
    """``x`` is (B, H, N, D), with a supported dtype and head dim."""
    check_four_dims(name, x)
    check_dtype(name, x)
    head_dim = x.shape[3]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name} must have a head dim from 1 to {MAX_HEAD_DIM}, got {describe(x)}")


def check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES or (x.dtype == torch.float64 and x.device.type != "cpu"):
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16 (float64 on CPU only), got {describe(x)}"
        )


def check_four_dims(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(x)}")
    if x.dim() != 4:
        raise ValueError(f"{name} must have shape (B, H, N, D), got {describe(x)}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """``x`` has the shape, dtype and device of ``other``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(x)}")
    if x.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape {tuple(other.shape)} of {other_name}, got {describe(x)}"
        )
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype {other.dtype} of {other_name}, got {describe(x)}")
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device {other.device} of {other_name}, got {describe(x)}")


def check_rows(mask: Tensor | None, cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    """Checks which rows of ``x`` (B, H, N, D) are real; returns ``mask`` as a bool tensor."""
    if mask is not None and cu_seqlens is not None:
        raise ValueError("mask and cu_seqlens exclude each other: packed rows have no padding to mask")
    if mask is not None:
        return check_mask(mask, (x.shape[0], x.shape[2]), x.device)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)
    return None


def check_mask(mask: Tensor, expected: tuple[int, ...], device: torch.device) -> Tensor:
    """Checks which rows are real; returns ``mask`` as a bool tensor."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor of shape {expected}, got {describe(mask)}")
    if tuple(mask.shape) != expected:
        raise ValueError(f"mask must have shape (B, N) = {expected}, got {describe(mask)}")
    if mask.device != device:
        raise ValueError(f"mask must be on {device}, got {describe(mask)}")
    if mask.dtype == torch.bool:
        return mask
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"mask must be bool or integer, true for a real token, got {describe(mask)}")
    return mask != 0


def check_cu_seqlens(cu_seqlens: Tensor, x: Tensor, dim: int = 2) -> None:
    """Offsets of sequences laid end to end along ``dim`` of ``x``, whose first size is 1."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be an int32 tensor, got {describe(cu_seqlens)}")
    if x.shape[0] != 1:
        raise ValueError(f"with cu_seqlens the rows are packed into B = 1, got {describe(x)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens must be int32 of shape (number of sequences + 1,), got {describe(cu_seqlens)}"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on {x.device}, got {describe(cu_seqlens)}")
    # The values are on the host already on a CPU; elsewhere reading them would synchronise.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != x.shape[dim]:
            raise ValueError(
                f"cu_seqlens must start with 0 and end with the token count {x.shape[dim]}, "
                f"got {offsets[0]} to {offsets[-1]} in shape {tuple(cu_seqlens.shape)}"
            )
        if any(b < a for a, b in pairwise(offsets)):
            raise ValueError(f"cu_seqlens must not decrease, got {describe(cu_seqlens)} with {offsets[:16]}")


def check_ids(input_ids: Tensor, **others: Tensor | None) -> None:
    """``input_ids`` is (B, N), the others the same or (1, N), all of an integer dtype."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in ID_DTYPES or input_ids.dim() != 2:
        raise ValueError(f"input_ids must be int64 or int32 of shape (B, N), got {describe(input_ids)}")
    batch, length = input_ids.shape
    for name, ids in others.items():
        if ids is None:
            continue
        fits = isinstance(ids, Tensor) and ids.dtype in ID_DTYPES and ids.dim() == 2
        if not fits or ids.shape not in ((batch, length), (1, length)):
            raise ValueError(
                f"{name} must be int64 or int32 of shape {(batch, length)} or {(1, length)}, "
                f"got {describe(ids)}"
            )


def check_in_table(name: str, ids: Tensor, table_name: str, table: Tensor) -> None:
    """``ids`` are rows of ``table``; looks at the values on a CPU, elsewhere that would synchronise."""
    if ids.numel() == 0 or ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    rows = table.shape[0]
    low, high = ids.aminmax()
    if int(low) >= 0 and int(high) < rows:
        return
    batch, column = ((ids < 0) | (ids >= rows)).nonzero()[0].tolist()
    raise ValueError(
        f"{name} must be from 0 to {rows - 1}, the rows of {table_name}, "
        f"got {int(ids[batch, column])} at [{batch}, {column}]"
    )


def check_dropout(dropout_p: float) -> None:
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}")


def check_window(window: int) -> int:
    if isinstance(window, bool) or not isinstance(window, int | torch.SymInt) or window < 0:
        raise ValueError(f"window must be None or an integer >= 0, got {window!r}")
    return window
