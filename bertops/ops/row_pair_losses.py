"""Losses between the hidden states of a student and of a teacher, row by row: one pass over both."""

from torch import Tensor

from bertops._library import ROW_PAIR_LOSSES
from bertops.ops._row_pairs import register_triton, row_pair_loss

SHORTEST = 1e-12  # a vector below counts as zero; the eps of torch.nn.functional.normalize


def cosine_loss(
    hidden_s: Tensor,
    hidden_t: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    r"""1 - cos between the hidden states of a student and of a teacher: DistilBERT's cosine loss.

    With :math:`\hat s = s / \|s\|` and :math:`\hat t = t / \|t\|`, for every real row

    .. math:: L = 1 - \hat s \cdot \hat t = \tfrac12 \|\hat s - \hat t\|^2, \qquad
        ds = \frac{g}{\|s\|} \left(\hat s - \hat t - L\, \hat s\right)

    for the upstream gradient g. It is computed from the difference: equal rows have loss and gradient 0, and
    nearly equal ones keep their digits. A vector shorter than 1e-12 counts as zero: its row has loss 1 and
    gradient 0.

    Args:
        hidden_s: the student's (B, N, H), or (..., H); fp32, bf16 or fp16 (fp64 on CPU); any strides, read in
            place where the last one is 1.
        hidden_t: the teacher's, of the same shape and a dtype of its own; a constant.
        mask: (B, N), bool or integer, true for a real token, in any pattern. Other rows have loss 0 and
            gradient 0, whatever stands there.
        reduction: ``mean`` over the real rows, ``sum``, or ``none`` for (B, N).
        impl: ``auto``, ``triton``, ``cpu`` or ``reference``; anything but ``auto`` never falls back.

    Returns:
        The loss in fp32 (fp64 for fp64 students): a scalar, or (B, N). Without a real row it is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. A teacher tensor that requires
            grad does not.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.

    The value is that of ``torch.nn.CosineEmbeddingLoss`` with target 1 on the real rows, as the official code
    calls it. Its gradient of a zero vector is of the size of 1e6; here it is 0.

    Source: Sanh et al. 2019 (DistilBERT), section 3.
    """
    pair = {"hidden_s": hidden_s, "hidden_t": hidden_t}
    return row_pair_loss("cosine_loss", pair, mask, SHORTEST, reduction, impl)[0]


def normalized_mse(
    hidden_s: Tensor,
    hidden_t: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    r"""Squared distance between the normalised hidden states of a student and of a teacher: patient KD.

    With :math:`\hat s = s / \|s\|` and :math:`\hat t = t / \|t\|`, for every real row

    .. math:: L = \sum_h (\hat s_h - \hat t_h)^2 = 2 - 2 \cos, \qquad
        ds = \frac{2g}{\|s\|} \left(\hat s - \hat t - \tfrac12 L\, \hat s\right)

    for the upstream gradient g; computed from the difference, as :func:`bertops.cosine_loss` is, and twice
    its value. A vector shorter than 1e-12 is normalised to 0 and gets the gradient 0; beside a zero vector
    the loss is 1, between two it is 0.

    Args:
        hidden_s: the student's (B, N, H), or (..., H); fp32, bf16 or fp16 (fp64 on CPU); any strides, read in
            place where the last one is 1. Patient KD takes the first token of M layers: (B, M, H).
        hidden_t: the teacher's, of the same shape and a dtype of its own; a constant.
        mask: (B, N), bool or integer, true for a real token, in any pattern. Other rows have loss 0 and
            gradient 0, whatever stands there.
        reduction: ``mean`` over the real rows, ``sum``, or ``none`` for (B, N).
        impl: ``auto``, ``triton``, ``cpu`` or ``reference``; anything but ``auto`` never falls back.

    Returns:
        The loss in fp32 (fp64 for fp64 students): a scalar, or (B, N). Without a real row it is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. A teacher tensor that requires
            grad does not.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.

    The paper sums over samples and layers: ``sum``. The official code takes the mean over B * M * H elements:
    ``mean`` divided by H.

    Source: Sun et al. 2019 (Patient Knowledge Distillation), section 3.2, equation 7.
    """
    pair = {"hidden_s": hidden_s, "hidden_t": hidden_t}
    return row_pair_loss("normalized_mse", pair, mask, SHORTEST, reduction, impl)[0]


def feature_map_transfer(
    hidden_s: Tensor,
    hidden_t: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-12,
    reduction: str = "mean",
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""MobileBERT's three losses between feature maps: normalised rows, means and variances.

    With :math:`\mu`, :math:`\sigma^2` the mean and the variance (over H, uncorrected) of a row and
    :math:`\hat x = (x - \mu) / \sqrt{\sigma^2 + \text{eps}}`, for every real row

    .. math::
        L_f = \frac1H \sum_h (\hat s_h - \hat t_h)^2, \quad L_m = (\mu_s - \mu_t)^2, \quad
        L_v = |\sigma_s^2 - \sigma_t^2|

    and for their upstream gradients :math:`g_f, g_m, g_v`, with :math:`c` the mean of
    :math:`(\hat s - \hat t)\, \hat s` over the row,

    .. math::
        ds = \frac2H \left(\frac{g_f}{\sqrt{\sigma_s^2 + \text{eps}}} (\hat s - \hat t - c\, \hat s)
        + g_m (\mu_s - \mu_t) + g_v\, \mathrm{sign}(\sigma_s^2 - \sigma_t^2)\, (s - \mu_s)\right).

    All differences are taken element by element: equal rows have losses and gradient 0, and nearly equal ones
    keep their digits.

    Args:
        hidden_s: the student's (B, N, H), or (..., H); fp32, bf16 or fp16 (fp64 on CPU); any strides, read in
            place where the last one is 1.
        hidden_t: the teacher's, of the same shape and a dtype of its own; a constant.
        mask: (B, N), bool or integer, true for a real token, in any pattern. Other rows have loss 0 and
            gradient 0, whatever stands there.
        eps: of the LayerNorm without weight and bias, > 0; 1e-12 in the official code.
        reduction: ``mean`` over the real rows, ``sum``, or ``none`` for (B, N).
        impl: ``auto``, ``triton``, ``cpu`` or ``reference``; anything but ``auto`` never falls back.

    Returns:
        The three losses in fp32 (fp64 for fp64 students): scalars, or (B, N). Without a real row they are 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. A teacher tensor that requires
            grad does not.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.

    The official code averages over all B * N rows, padding included, and over the layers, and weights the
    three; without padding ``mean`` is its value of one layer with the weights left out. It compares every
    student layer's mean and variance with those of all teacher layers at once; here each has its own teacher.
    The paper's equation 1 is the plain MSE of the feature maps.

    Source: Sun et al. 2020 (MobileBERT), section 3.4, and its official code.
    """
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps!r}")
    pair = {"hidden_s": hidden_s, "hidden_t": hidden_t}
    fmt, mean, variance = row_pair_loss("feature_map_transfer", pair, mask, eps, reduction, impl).unbind(0)
    return fmt, mean, variance


for _name in ROW_PAIR_LOSSES:
    register_triton(_name)
