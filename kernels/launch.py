"""How the Triton kernels are launched: block sizes, arguments, grid.

Block sizes come from the static table in :func:`block_config`. With BERTOPS_AUTOTUNE=1 in the environment the
first call of every kernel, head dim, dtype and combination of options instead times a list of candidates on
its own inputs; results may then differ from process to process in the last bits, and the first call may not
be inside a CUDA-graph capture.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bertops.reference import dropout_threshold

AUTOTUNE = os.environ.get("BERTOPS_AUTOTUNE") == "1"
INTERPRETER = 0  # the architecture of tensors on the CPU
MAX_TILE_STRIDE = 2**23  # a tile has up to 128 rows


class BlockConfig(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int

    def meta(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# By kernel, for head dims up to 64, 128 and 256; tests/offline_triton.py shows what they compile to.
_SM80 = {
    "attention_fwd": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    "attention_with_scores_fwd": ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    "attention_bwd_dq": ((128, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    "attention_bwd_dkv": ((32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    "attention_bwd_dq_scores": ((64, 32, 8, 2), (32, 32, 4, 1), (32, 32, 8, 1)),
    "attention_bwd_dkv_scores": ((32, 32, 4, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    "pair_fwd_kl": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    "pair_fwd_kl_given": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    "pair_fwd_mse": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    "pair_bwd_dq": ((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    "pair_bwd_dk": ((32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    "relation_kl_bwd": ((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    "gram_chunks": ((64, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
    "gram_bwd": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    "embedding_fwd": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
}
_SM90 = {
    "attention_fwd": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "attention_with_scores_fwd": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
    "attention_bwd_dq": ((128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 8, 1)),
    "attention_bwd_dkv": ((32, 128, 8, 2), (32, 128, 8, 2), (32, 32, 8, 1)),
    "attention_bwd_dq_scores": ((64, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
    "attention_bwd_dkv_scores": ((32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    "pair_fwd_kl": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2)),
    "pair_fwd_kl_given": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2)),
    "pair_fwd_mse": ((128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 8, 2)),
    "pair_bwd_dq": ((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 8, 1)),
    "pair_bwd_dk": ((64, 64, 4, 2), (32, 64, 4, 2), (32, 32, 8, 1)),
    "relation_kl_bwd": ((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 8, 1)),
    "gram_chunks": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    "gram_bwd": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    "embedding_fwd": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
}
# Blackwell's tensor cores take no fewer than 64 rows.
_SM100 = {
    "attention_fwd": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "attention_with_scores_fwd": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
    "attention_bwd_dq": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
    "attention_bwd_dkv": ((64, 128, 8, 2), (32, 64, 8, 2), (32, 64, 8, 1)),
    "attention_bwd_dq_scores": ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
    "attention_bwd_dkv_scores": ((64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 1)),
    "pair_fwd_kl": ((64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
    "pair_fwd_kl_given": ((64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
    "pair_fwd_mse": ((128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
    "pair_bwd_dq": ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
    "pair_bwd_dk": ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 1)),
    "relation_kl_bwd": ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
    "gram_chunks": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    "gram_bwd": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    "embedding_fwd": ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
}
# Dropout's random words take registers too: what replaces the entries above for head dims up to 128.
_DROPOUT = {
    80: {
        "attention_with_scores_fwd": ((128, 32, 8, 2), (32, 32, 4, 2)),
    },
    90: {
        "attention_fwd": ((128, 64, 8, 3), (128, 64, 8, 2)),
        "attention_bwd_dkv": ((32, 64, 4, 2), (32, 64, 8, 2)),
        "attention_bwd_dq_scores": ((64, 32, 8, 2), (64, 32, 8, 2)),
        "attention_bwd_dkv_scores": ((32, 64, 8, 2), (32, 32, 8, 1)),
    },
    100: {
        "attention_with_scores_fwd": ((128, 64, 8, 2), (64, 64, 8, 2)),
        "attention_bwd_dkv": ((32, 64, 4, 2), (32, 64, 8, 2)),
        "attention_bwd_dq_scores": ((64, 32, 8, 2), (64, 32, 8, 2)),
        "attention_bwd_dkv_scores": ((32, 64, 8, 2), (32, 64, 8, 2)),
    },
}
# fp32 products stay on the FMA units and hold whole rows in registers.
_FP32 = {
    "attention_fwd": ((64, 64, 8, 1), (32, 16, 8, 1), (16, 16, 4, 1)),
    "attention_with_scores_fwd": ((64, 64, 8, 1), (32, 16, 8, 1), (16, 16, 4, 1)),
    "attention_bwd_dq": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "attention_bwd_dkv": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    "attention_bwd_dq_scores": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "attention_bwd_dkv_scores": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    "pair_fwd_kl": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "pair_fwd_kl_rest": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "pair_fwd_mse": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "pair_bwd_dq": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "pair_bwd_dk": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "relation_kl_bwd": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "gram_chunks": ((32, 64, 8, 1), (32, 64, 8, 1), (32, 64, 8, 1)),
    "gram_bwd": ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
    "embedding_fwd": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
}


def block_config(kernel: str, arch: int, dtype: torch.dtype, head_dim: int, dropout: bool) -> BlockConfig:
    """Block sizes of ``kernel`` on an architecture: 10 * major + minor, or 0 for the interpreter."""
    if arch == INTERPRETER:
        # in fp32 square, so that the BLAS under the interpreter sums Q K^T and dO V^T in one order everywhere
        if dtype == torch.float32:
            side = 16 if kernel.startswith("attention") else 32
            return BlockConfig(side, side, 4, 1)
        return BlockConfig(16, 32, 4, 1)
    column = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    if dtype == torch.float32:
        return BlockConfig(*_FP32[kernel][column])
    family = (
        90 if arch == 90 else 100 if 100 <= arch < 120 else 80
    )  # 120 has neither's tensor cores nor memory
    if dropout and column < 2 and kernel in _DROPOUT[family]:
        return BlockConfig(*_DROPOUT[family][kernel][column])
    return BlockConfig(*{80: _SM80, 90: _SM90, 100: _SM100}[family][kernel][column])


@cache
def architecture(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def ceil_div(a: int, b: int) -> int:
    """triton.cdiv, which costs a launch 2 µs a call on the host."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def padded_head_dim(head_dim: int) -> int:
    return max(16, power_of_two(head_dim))


_VARYING = ["N", "H", "num_sequences", "scale", "window", "threshold", "kept_scale"]
_VARYING += ["count", "option"]
_VARYING += ["slope_s", "slope_t", "gain", "weight_s", "weight_t", "weight_k"]
_VARYING += ["tokens", "search", "part_blocks", "eps"]
_TUNED_BY = ["HEAD_DIM", "HAS_WINDOW", "HAS_DROPOUT", "HEAD_DIM_S", "HEAD_DIM_T", "LOSS"]


def compiled(function: Callable) -> Any:
    """The kernel of ``function``; a new sequence length or batch size does not compile it again."""
    return triton.jit(function, do_not_specialize=_VARYING)


def tunable(function: Callable) -> Any:
    """The kernel of ``function``, whose block sizes BERTOPS_AUTOTUNE finds."""
    if not AUTOTUNE:
        return compiled(function)
    candidates = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
        for m in (64, 128)
        for n in (32, 64, 128)
        for warps in (4, 8)
        for stages in (2, 3)
    ]
    return triton.autotune(candidates, key=_TUNED_BY)(compiled(function))


def near_strides(x: Tensor) -> Tensor:
    """``x`` itself, or a copy where offsets inside a tile of (B, H, N, ...) would not fit into 32 bits."""
    return x if max(x.stride()[2:]) < MAX_TILE_STRIDE else x.contiguous()


def in_place(x: Tensor) -> Tensor:
    """``x`` (B, H, N, D) itself where the kernels can read it where it lies, a copy otherwise."""
    return near_strides(x) if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Sequences(NamedTuple):
    """Which rows of (B, H, N, D) tensors are real or belong together; num_sequences is 0 unless packed."""

    mask: Tensor | None
    cu_seqlens: Tensor | None
    N: int
    H: int
    num_sequences: int


def prepare_sequences(q: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Sequences:
    _, heads, length, _ = q.shape
    if cu_seqlens is not None and cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must hold the ends of {length} packed rows, got {cu_seqlens.shape[0] - 1}"
        )
    return Sequences(
        None if mask is None else mask.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        length,
        heads,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
    )


def prepare_rows(
    q: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[tuple, dict[str, Any]]:
    """What every attention kernel takes after its tensors: the arguments from ``mask`` on, and its flags."""
    length, head_dim = q.shape[2:]
    mask, cu_seqlens, *sizes = prepare_sequences(q, mask, cu_seqlens)
    threshold = dropout_threshold(dropout_p)
    arguments = (
        mask,
        cu_seqlens,
        seed,
        *sizes,
        float(scale),
        min(window, length),
        threshold - 2**32 if threshold >= 2**31 else threshold,
        1 / (1 - dropout_p),
    )
    flags = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "HAS_WINDOW": window >= 0,
        "HAS_DROPOUT": dropout_p > 0,
    }
    return arguments, flags


def launch(
    kernel: Any, name: str, block: str, q: Tensor, tensors: tuple, rows: tuple, flags: dict[str, Any]
) -> None:
    """Runs the attention ``kernel`` with one program for each ``block`` of rows and each head.

    ``tensors`` are its own tensors and strides, ``rows`` and ``flags`` come from :func:`prepare_rows`.
    """
    config = block_config(name, architecture(q.device), q.dtype, q.shape[3], flags["HAS_DROPOUT"])
    run(kernel, config, block, q, rows[5], (*tensors, *rows), flags)


def run(
    kernel: Any,
    config: BlockConfig,
    block: str,
    q: Tensor,
    num_sequences: int,
    arguments: tuple,
    flags: dict[str, Any],
    programs: int = 1,
) -> None:
    """Runs ``kernel`` with ``programs`` for each ``block``, a block size's name, of rows and each head."""
    batch, heads, length, _ = q.shape

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        if num_sequences:
            return heads * (length // meta[block] + num_sequences), programs
        return batch * heads * ceil_div(length, meta[block]), programs

    meta = {} if AUTOTUNE and isinstance(kernel, triton.runtime.Autotuner) else config.meta()
    with torch.cuda.device_of(q):
        kernel[grid](*arguments, **flags, **meta, enable_fp_fusion=True)
