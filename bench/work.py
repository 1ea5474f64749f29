"""What every op must do at least, counted over the real tokens alone."""

from dataclasses import replace

from torch import Tensor

from bench.limits import Work
from bench.row_shapes import HiddenInputs
from bench.shapes import HeadInputs, Inputs, Mode


def attention(inputs: HeadInputs, mode: Mode, map_bytes: int = 0) -> Work:
    """Forward: QKᵀ and PV, an exp a pair; reads q, k, v, writes out. Backward: QKᵀ once more, dO Vᵀ, dV, dQ
    and dK, an exp a pair; reads q, k, v, out, dO, writes dQ, dK, dV. Both move lse (fp32) once.

    ``map_bytes``: a score map that forward writes and whose gradient backward reads.
    """
    pairs, rows, head_dim = real_pairs(inputs), real_rows(inputs), inputs.leaves[0].shape[3]
    row_bytes = head_dim * inputs.leaves[0].element_size()
    forward = Work(4.0 * head_dim * pairs, pairs, rows * (4 * row_bytes + 4) + map_bytes)
    backward = Work(10.0 * head_dim * pairs, pairs, rows * (8 * row_bytes + 4) + map_bytes)
    if mode == "forward":
        return forward
    if mode == "backward":
        return backward
    return Work(forward.flops + backward.flops, forward.exps + backward.exps, forward.bytes + backward.bytes)


def attention_with_scores(inputs: HeadInputs, mode: Mode) -> Work:
    batch, heads, length, _ = inputs.leaves[0].shape
    return attention(inputs, mode, batch * heads * length**2 * inputs.leaves[0].element_size())


def attention_kl(inputs: HeadInputs, mode: Mode) -> Work:
    """Forward: both score products and an exp of each. With the backward: dQ and dK more, and the same exps,
    as gradients can form while the tiles of the forward are there. Reads all inputs, writes the gradients.
    """
    d_s, d_t = head_dims(inputs)
    products = 2 * (d_s + d_t) + (0 if mode == "forward" else 4 * d_s)
    pairs = real_pairs(inputs)
    return Work(products * pairs, 2 * pairs, loss_bytes(inputs, mode))


def relation_kl(inputs: HeadInputs, mode: Mode) -> Work:
    """As ``attention_kl``, but scores are symmetric: their products and exps are counted once for (i, j) and
    (j, i), and the gradient is one product, of D + its transpose.
    """
    d_s, d_t = head_dims(inputs)
    products = d_s + d_t + (0 if mode == "forward" else 2 * d_s)
    pairs = real_pairs(inputs)
    return Work(products * pairs, pairs, loss_bytes(inputs, mode))


def attention_score_mse(inputs: HeadInputs, mode: Mode) -> Work:
    """The cheaper of two forms. Gram: six products of (D, N) by (N, D), of which the four of a tensor with
    itself are symmetric and count half; the backward multiplies rows by (D, D) four times. Direct: the score
    products, dQ and dK. No exps; reads all inputs, writes the gradients.
    """
    d_s, d_t = head_dims(inputs)
    rows, pairs = real_rows(inputs), real_pairs(inputs)
    gram = (2 * d_s**2 + 2 * d_t**2 + 4 * d_s * d_t) * rows
    direct = 2 * (d_s + d_t) * pairs
    if mode != "forward":
        gram += 4 * d_s * (d_s + d_t) * rows
        direct += 4 * d_s * pairs
    return Work(min(gram, direct), 0, loss_bytes(inputs, mode))


def head_dims(inputs: HeadInputs) -> tuple[int, int]:
    """Of the student and of the teacher."""
    return inputs.leaves[0].shape[3], inputs.constants[0].shape[3]


def loss_bytes(inputs: HeadInputs, mode: Mode) -> int:
    """Every input read and, unless ``mode`` is forward, a gradient written for every leaf."""
    moved = inputs.tensors if mode == "forward" else (*inputs.tensors, *inputs.leaves)
    return real_rows(inputs) * sum(x.shape[3] * x.element_size() for x in moved)


def real_pairs(inputs: HeadInputs) -> int:
    """Query-key pairs of real tokens, over all heads."""
    batch, heads, length, _ = inputs.leaves[0].shape
    if inputs.mask is None:
        return heads * batch * length**2
    return heads * int(inputs.mask.sum(1).double().square().sum())


def real_rows(inputs: HeadInputs) -> int:
    batch, heads, length, _ = inputs.leaves[0].shape
    return heads * (batch * length if inputs.mask is None else int(inputs.mask.sum()))


def entropy(inputs: Inputs, mode: Mode) -> Work:
    """An exp an element, in the backward once more; reads the logits each time, writes their gradient."""
    (logits,) = inputs.leaves
    elements, rows = logits.numel(), logits.shape[0]
    forward = Work(0.0, elements, bytes_of(logits) + 4 * rows)
    if mode == "forward":
        return forward
    return Work(0.0, 2 * elements, forward.bytes + 2 * bytes_of(logits) + 4 * rows)


def exit_decision(inputs: Inputs, mode: Mode) -> Work:
    """An exp an element; reads the logits, writes prediction, uncertainty, exited and order of a row."""
    (logits,) = inputs.leaves
    return Work(0.0, logits.numel(), bytes_of(logits) + (8 + 4 + 1 + 8) * logits.shape[0])


def compact(inputs: HiddenInputs, mode: Mode) -> Work:
    """Reads and writes every element of the samples that stay."""
    (hidden,) = inputs.leaves
    stay, cu_seqlens = inputs.stay, inputs.cu_seqlens
    if cu_seqlens is None:
        return Work(0.0, 0.0, 2 * bytes_of(hidden[0]) * int(stay.sum()))
    return Work(0.0, 0.0, 2 * bytes_of(hidden[0, 0]) * int(cu_seqlens.diff()[stay].sum()))


def row_pair_loss(inputs: Inputs, mode: Mode) -> Work:
    """Reads student and teacher, in the backward once more; writes the gradient."""
    moved = inputs.tensors if mode == "forward" else (*inputs.tensors, *inputs.tensors, *inputs.leaves)
    return Work(0.0, 0.0, sum(map(bytes_of, moved)))


def kl_div_logits(inputs: Inputs, mode: Mode) -> Work:
    """As ``row_pair_loss``, with an exp an element of both models, in the backward once more."""
    exps = sum(x.numel() for x in inputs.tensors) * (1 if mode == "forward" else 2)
    return replace(row_pair_loss(inputs, mode), exps=float(exps))


def linear_kl_div(inputs: Inputs, mode: Mode) -> Work:
    """Forward: the logits of both models and an exp of each. With the backward dh and dW more, as gradients
    can form while the logits are there. Reads all inputs, writes the gradients.
    """
    (rows, width), words = inputs.leaves[0].shape, inputs.leaves[1].shape[0]
    products = 2 * (width + inputs.constants[0].shape[1]) + (0 if mode == "forward" else 4 * width)
    return Work(products * rows * words, 2 * rows * words, linear_bytes(inputs, mode))


def projected_mse(inputs: Inputs, mode: Mode) -> Work:
    """Forward: the projection. With the backward dh and dW more. Reads all inputs, writes the gradients."""
    (rows, width), outputs = inputs.leaves[0].shape, inputs.leaves[1].shape[0]
    products = 2 if mode == "forward" else 6
    return Work(products * rows * width * outputs, 0, linear_bytes(inputs, mode))


def linear_bytes(inputs: Inputs, mode: Mode) -> int:
    moved = inputs.tensors if mode == "forward" else (*inputs.tensors, *inputs.leaves)
    return sum(bytes_of(x) for x in moved)


def bytes_of(x: Tensor) -> int:
    return x.numel() * x.element_size()
