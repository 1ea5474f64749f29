"""ALBERT's embedding, and BERT's: rows of three tables, LayerNorm, projection."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bertops import _backend, reference
from bertops.ops import _checks
from bertops.ops._autograd import once_differentiable
from bertops.ops.attention import AUTOCAST_DEVICES

PARAMETERS = (
    "word",
    "position",
    "token_type",
    "norm_weight",
    "norm_bias",
    "projection",
    "projection_bias",
)

_factorized_embedding_fwd = torch.ops.bertops.factorized_embedding_fwd.default
_factorized_embedding_bwd = torch.ops.bertops.factorized_embedding_bwd.default


def factorized_embedding(
    input_ids: Tensor,
    word: Tensor,
    projection: Tensor | None = None,
    *,
    position: Tensor | None = None,
    token_type: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    projection_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    sparse: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Word + position + token type rows, LayerNorm at width E, projection to width H, in one pass.

    For the token at (b, i) with word w, position p and type t

    .. math::
        x = W_w + P_p + T_t, \quad \hat x = (x - \mathrm{mean}\,x) \, r, \quad
        r = (\mathrm{var}\,x + \epsilon)^{-1/2}, \quad
        y = Z \circ (\gamma \circ \hat x + \beta), \quad o = y A^\top + c

    with the projection A, its bias c and the dropout factor :math:`Z \in \{0, 1/(1-p)\}`; without a
    projection o is y. For the upstream gradient do, summed over tokens,

    .. math::
        dA = \sum do\, y^\top, \quad dc = \sum do, \quad dy = Z \circ do\, A, \quad
        d\gamma = \sum dy \circ \hat x, \quad d\beta = \sum dy, \quad
        g = \gamma \circ dy, \quad dx = r\,(g - \mathrm{mean}\,g - \hat x\, \mathrm{mean}(g \circ \hat x)),

    and a row of a table gets the sum of dx over the tokens that took it, in the order of the tokens: the same
    bits from run to run.

    Args:
        input_ids: (B, N), int64 or int32.
        word: (V, E), fp32, bf16 or fp16 (fp64 on CPU).
        projection: (H, E), as ``nn.Linear`` holds it; None gives BERT's embedding block.
        position, token_type: (P, E) and (T, E), each may be missing (DistilBERT has no types).
        norm_weight, norm_bias: (E,), γ and β; 1 and 0 without them.
        projection_bias: (H,), 0 without it; goes with ``projection``.
        position_ids: (B, N) or (1, N); by default columns, counted from the start of every packed sequence.
        token_type_ids: (B, N) or (1, N), 0 by default.
        cu_seqlens: int32 (number of sequences + 1): the rows of B = 1 are sequences laid end to end.
        padding_idx, position_padding_idx: row of ``word`` and of ``position`` whose gradient is 0, as
            ``nn.Embedding`` has it; RoBERTa pads both.
        eps: added to the variance.
        dropout_p: probability in [0, 1) of dropping an element of y. What drops is a function of a seed drawn
            from PyTorch's generator and of (sequence, i, e) alone: padded and packed rows drop alike.
        sparse: the gradient of ``word`` is an uncoalesced sparse tensor with a row for every token, 0 for
            padding, as of ``nn.Embedding(sparse=True)``; the others stay dense.
        impl: ``auto``, ``triton``, ``cpu`` or ``reference``; anything but ``auto`` never falls back.

    Returns:
        (B, N, H) in the dtype of ``projection``, or (B, N, E) in that of ``word``. Nothing of width E is
        written for a projection. Under autocast tables and LayerNorm keep their dtype and the projection runs
        in the autocast dtype, as in PyTorch.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. On a CPU an id outside its
            table is a ValueError that names the first one and its place (from the kernel, and so under
            torch.compile, a RuntimeError that says the same); on a GPU it stops the kernel with a message.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.

    Source: Lan et al. 2020 (ALBERT), section 3.1; its code puts LayerNorm and dropout at width E. Devlin
    et al. 2019 (BERT), section 3, without the projection.
    """
    ids = input_ids, position_ids, token_type_ids, cu_seqlens
    tables = word, position, token_type, norm_weight, norm_bias
    parameters: tuple[Any, ...] = (*tables, projection, projection_bias)
    _check_parameters(parameters)
    _check_ids(ids, parameters)
    padding_idx = _check_padding("padding_idx", padding_idx, "word", word)
    position_padding_idx = _check_padding("position_padding_idx", position_padding_idx, "position", position)
    if dropout_p != 0:
        _checks.check_dropout(dropout_p)
    parameters = _autocast(parameters)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=word.device)
    arguments: tuple[Any, ...] = (*ids, *parameters, float(eps), float(dropout_p), seed)
    backend = _backend.resolve("factorized_embedding", impl, word.device)
    if backend == "reference":
        return reference.factorized_embedding(*(*arguments, padding_idx, position_padding_idx))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in parameters):
        options = backend, padding_idx, position_padding_idx, sparse
        return _FactorizedEmbedding.apply(options, *arguments)
    return _forward_kernel(backend)(*arguments)[0]


class _FactorizedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: tuple, *arguments: Any) -> Tensor:
        ctx.options = options
        out, mean, rstd = _forward_kernel(options[0])(*arguments)
        *tensors, ctx.eps, ctx.dropout_p, seed = arguments
        ctx.save_for_backward(*tensors, seed, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple:
        backend, padding_idx, position_padding_idx, sparse = ctx.options
        *tensors, seed, mean, rstd = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[5:12])  # after options and four tensors of ids
        kernel = (
            _triton_kernels().factorized_embedding_bwd
            if backend == "interpreter"
            else _factorized_embedding_bwd
        )
        grads = kernel(
            grad_out,
            *tensors,
            ctx.eps,
            ctx.dropout_p,
            seed,
            mean,
            rstd,
            padding_idx,
            position_padding_idx,
            sparse,
            wanted,
        )
        grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        if sparse and wanted[0]:
            input_ids, word = tensors[0], tensors[4]
            grads[0] = torch.sparse_coo_tensor(
                input_ids.reshape(1, -1), grads[0], word.shape, check_invariants=False
            )
        return *(None,) * 5, *grads, *(None,) * 3


def _check_parameters(parameters: tuple[Any, ...]) -> None:
    """Widths, dtypes and devices fit those of ``word`` and of ``projection``."""
    named = dict(zip(PARAMETERS, parameters, strict=True))
    word, projection = named["word"], named["projection"]
    if not isinstance(word, Tensor):
        raise TypeError(f"word must be a tensor, got {_checks.describe(word)}")
    if word.dim() != 2 or word.shape[0] < 1 or word.shape[1] < 1:
        raise ValueError(f"word must have shape (V, E) with V, E >= 1, got {_checks.describe(word)}")
    width = word.shape[1]
    if projection is None and named["projection_bias"] is not None:
        raise ValueError("projection_bias must be None without a projection")
    height = projection.shape[0] if isinstance(projection, Tensor) and projection.dim() else 0
    expected = {
        "position": (None, width),
        "token_type": (None, width),
        "norm_weight": (width,),
        "norm_bias": (width,),
        "projection": (None, width),
        "projection_bias": (height,),
    }
    _checks.check_dtype("word", word)
    for name, shape in expected.items():
        x = named[name]
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_checks.describe(x)}")
        fits = x.dim() == len(shape) and all(
            s >= 1 if want is None else s == want for s, want in zip(x.shape, shape, strict=True)
        )
        if not fits:
            letters = ", ".join("rows" if want is None else str(want) for want in shape)
            raise ValueError(f"{name} must have shape ({letters}), got {_checks.describe(x)}")
        if x.device != word.device:
            raise ValueError(f"{name} must be on the device {word.device} of word, got {_checks.describe(x)}")
        like = "projection" if name == "projection_bias" else "word"
        if name == "projection":
            _checks.check_dtype(name, x)
        elif x.dtype != named[like].dtype:
            raise TypeError(
                f"{name} must have the dtype {named[like].dtype} of {like}, got {_checks.describe(x)}"
            )


def _check_ids(ids: tuple[Any, ...], parameters: tuple[Any, ...]) -> None:
    """Shapes and dtypes of the ids, and that every one of them has its row."""
    input_ids, position_ids, token_type_ids, cu_seqlens = ids
    word, position, token_type, *_ = parameters
    _checks.check_ids(input_ids, position_ids=position_ids, token_type_ids=token_type_ids)
    for name, x, table in (
        ("position_ids", position_ids, position),
        ("token_type_ids", token_type_ids, token_type),
    ):
        if x is not None and table is None:
            raise ValueError(f"{name} must be None without {name.removesuffix('_ids')}")
    for name, x in (
        ("input_ids", input_ids),
        ("position_ids", position_ids),
        ("token_type_ids", token_type_ids),
    ):
        if x is not None and x.device != word.device:
            raise ValueError(f"{name} must be on the device {word.device} of word, got {_checks.describe(x)}")
    if cu_seqlens is not None:
        _checks.check_cu_seqlens(cu_seqlens, input_ids, dim=1)
    _checks.check_in_table("input_ids", input_ids, "word", word)
    if position is not None:
        if position_ids is not None:
            _checks.check_in_table("position_ids", position_ids, "position", position)
        else:
            _check_default_positions(input_ids, cu_seqlens, position)
    if token_type is not None and token_type_ids is not None:
        _checks.check_in_table("token_type_ids", token_type_ids, "token_type", token_type)


def _check_default_positions(input_ids: Tensor, cu_seqlens: Tensor | None, position: Tensor) -> None:
    """Every column has its row; of packed sequences that is in the values, which are read on a CPU alone."""
    rows, length = position.shape[0], input_ids.shape[1]
    if cu_seqlens is None and length > rows:
        raise ValueError(
            f"position must have a row for each of the {length} columns of input_ids, "
            f"got {_checks.describe(position)}"
        )
    if cu_seqlens is None or cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for start, end in pairwise(cu_seqlens.tolist()):
        if end - start > rows:
            raise ValueError(
                f"position must have a row for every position, of which it has {rows}, "
                f"got position {rows} at [0, {start + rows}]"
            )


def _check_padding(name: str, index: int | None, table_name: str, table: Tensor | None) -> int | None:
    """The row counted from 0; negative ones count from the end, as in ``nn.Embedding``."""
    if index is None:
        return None
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError(f"{name} must be None or an integer, got {_checks.describe(index)}")
    if table is None:
        raise ValueError(f"{name} must be None without {table_name}")
    rows = table.shape[0]
    if not -rows <= index < rows:
        raise ValueError(f"{name} must be a row of {table_name}, which has {rows}, got {index}")
    return index % rows


def _autocast(parameters: tuple[Any, ...]) -> tuple[Any, ...]:
    """The projection in the autocast dtype, as ``nn.Linear`` would have it."""
    *tables, projection, bias = parameters
    if projection is None or projection.dtype == torch.float64:
        return parameters
    device = projection.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return parameters
    dtype = torch.get_autocast_dtype(device)
    return *tables, projection.to(dtype), None if bias is None else bias.to(dtype)


def _forward_kernel(backend: str) -> Any:
    if backend == "interpreter":
        return _triton_kernels().factorized_embedding_fwd
    return _factorized_embedding_fwd


def _triton_kernels() -> Any:
    import bertops.kernels.factorized_embedding as kernels

    return kernels


@torch.library.impl("bertops::factorized_embedding_fwd", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _triton_kernels().factorized_embedding_fwd(*arguments)


@torch.library.impl("bertops::factorized_embedding_bwd", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _triton_kernels().factorized_embedding_bwd(*arguments)
