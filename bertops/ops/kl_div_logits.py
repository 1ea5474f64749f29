"""KL divergence between a teacher's and a student's softened predictions."""

from torch import Tensor

from bertops.ops._row_pairs import register_triton, row_pair_loss


def kl_div_logits(
    logits_s: Tensor,
    logits_t: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    r"""T² KL(teacher ‖ student) between the softmax of two models' logits: the soft-target loss.

    With :math:`p^s = \mathrm{softmax}(s / T)` and :math:`p^t = \mathrm{softmax}(t / T)`, for every real row

    .. math::
        L = T^2 \sum_c p^t_c \left(\ln p^t_c - \ln p^s_c\right), \qquad
        ds_c = T g \left(p^s_c - p^t_c\right)

    in nats, for the upstream gradient g. Both come from the ratios :math:`p^s_c / p^t_c` and what they differ
    from 1: the loss is never negative, equal logits have loss and gradient 0, and nearly equal ones keep
    their digits. Memory holds one (..., V) tensor more, the gradient.

    Args:
        logits_s: the student's (B, N, V), or (..., V); fp32, bf16 or fp16 (fp64 on CPU); any strides, read in
            place where the last one is 1. -inf for a class that cannot be.
        logits_t: the teacher's, of the same shape and a dtype of its own; a constant.
        temperature: T > 0.
        mask: (B, N), or the leading sizes of the logits, bool or integer, true for a real token, in any
            pattern. Other rows have loss 0 and gradient 0, whatever stands there.
        reduction: ``mean`` over the real rows, ``sum``, or ``none`` for (B, N).
        impl: ``auto``, ``triton``, ``cpu`` or ``reference``; anything but ``auto`` never falls back.

    Returns:
        The loss in fp32 (fp64 for fp64 students): a scalar, or (B, N). Without a real row it is 0. A class
        that only the student rules out makes it inf, with the gradient above; a row of either model that has
        no softmax (NaN or +inf in it, or nothing but -inf) makes loss and gradient of its row NaN.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. A teacher tensor that requires
            grad does not.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.

    ``mean`` over the rows that are not padding is DistilBERT's loss in its official code. That of patient KD
    and others that call ``kl_div`` with the reduction ``mean`` is V times smaller.

    Source: Hinton et al. 2015, section 2; Sanh et al. 2019 (DistilBERT), section 2.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be > 0 and finite, got {temperature!r}")
    pair = {"logits_s": logits_s, "logits_t": logits_t}
    return row_pair_loss("kl_div_logits", pair, mask, float(temperature), reduction, impl)[0]


register_triton("kl_div_logits")
