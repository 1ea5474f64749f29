"""What attention must do at least, counted over the real tokens alone."""

from bench.limits import Work
from bench.shapes import Inputs, Mode


def attention(inputs: Inputs, mode: Mode, map_bytes: int = 0) -> Work:
    """Forward: QKᵀ and PV, an exp a pair; reads q, k, v, writes out. Backward: QKᵀ once more, dO Vᵀ, dV, dQ
    and dK, an exp a pair; reads q, k, v, out, dO, writes dQ, dK, dV. Both move lse (fp32) once.

    ``map_bytes``: a score map that forward writes and whose gradient backward reads.
    """
    pairs, rows, head_dim = real_pairs(inputs), real_rows(inputs), inputs.q.shape[3]
    row_bytes = head_dim * inputs.q.element_size()
    forward = Work(4.0 * head_dim * pairs, pairs, rows * (4 * row_bytes + 4) + map_bytes)
    backward = Work(10.0 * head_dim * pairs, pairs, rows * (8 * row_bytes + 4) + map_bytes)
    if mode == "forward":
        return forward
    if mode == "backward":
        return backward
    return Work(forward.flops + backward.flops, forward.exps + backward.exps, forward.bytes + backward.bytes)


def attention_with_scores(inputs: Inputs, mode: Mode) -> Work:
    batch, heads, length, _ = inputs.q.shape
    return attention(inputs, mode, batch * heads * length**2 * inputs.q.element_size())


def real_pairs(inputs: Inputs) -> int:
    """Query-key pairs of real tokens, over all heads."""
    batch, heads, length, _ = inputs.q.shape
    if inputs.mask is None:
        return heads * batch * length**2
    return heads * int(inputs.mask.sum(1).double().square().sum())


def real_rows(inputs: Inputs) -> int:
    batch, heads, length, _ = inputs.q.shape
    return heads * (batch * length if inputs.mask is None else int(inputs.mask.sum()))
