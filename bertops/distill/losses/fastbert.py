"""FastBERT's second stage: every student classifier learns from the teacher of the same model."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bertops.models.fastbert import FastBertOutput

DIRECTIONS = ("teacher_student", "student_teacher")


def self_distillation_loss(output: FastBertOutput, *, direction: str = "teacher_student") -> Tensor:
    r"""Sum over the students of the mean KL divergence between their answer and the teacher's; no labels.

    .. math::
        L = \sum_{i<L} \frac{1}{B} \sum_b \mathrm{KL}(p^t_b \,\|\, p^{s_i}_b), \qquad
        dz^{s_i} = (p^{s_i} - p^t) / B

    or, for ``student_teacher``, the reverse :math:`\mathrm{KL}(p^{s_i} \| p^t)`, whose gradient is
    :math:`p^{s_i} (\ln p^{s_i} - \ln p^t - \mathrm{KL}) / B`.

    Args:
        output: of a :class:`bertops.models.FastBert` after ``freeze()``; the teacher's logits are a constant.
        direction: ``teacher_student`` is what FastBERT's code does, ``student_teacher`` its paper's equation.

    Returns:
        A scalar in fp32 (fp64 for fp64 logits), in nats; 0 for an empty batch.

    Raises:
        ValueError: ``direction`` is none of the two, the teacher's logits require grad, or there is no
            student.

    Source: Liu et al. 2020 (FastBERT), section 3.2, equations 4 and 5, and its code, ``run_fastbert.py``.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if output.logits.requires_grad:
        raise ValueError("output.logits requires grad: call model.freeze() before the second stage")
    if not output.student_logits:
        raise ValueError("output.student_logits is empty: a model of one layer has no student")
    logits = torch.stack(output.student_logits)  # (students, B, C)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    student = logits.to(dtype).log_softmax(-1)
    teacher = output.logits.to(dtype).log_softmax(-1).expand_as(student)
    first, second = (teacher, student) if direction == "teacher_student" else (student, teacher)
    return F.kl_div(second, first, reduction="sum", log_target=True) / max(1, logits.shape[1])
