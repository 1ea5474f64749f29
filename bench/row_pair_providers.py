"""The peers of the losses between paired rows, each as users write it today: means over all rows."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import row_shapes
from bench.limits import Work
from bench.measure import Op
from bench.providers import Call, Provider, compiled, is_compiled
from bench.shapes import Inputs, Mode, Takes
from bertops import reference


def row_pair_op(
    name: str,
    takes: Takes,
    own: Callable[..., Tensor | Sequence[Tensor]],
    eager: Call,
    least: Callable[[Inputs, Mode], Work],
    *others: Provider,
    outputs: tuple[str, ...] = ("mean",),
) -> Op:
    """``own`` is bertops' function; ``others`` are peers that this loss alone has."""

    def bertops_call(*pair: Tensor) -> tuple[Tensor, ...]:
        losses = own(*pair)
        return (losses,) if isinstance(losses, Tensor) else tuple(losses)

    def means(*pair: Tensor) -> list[Tensor]:
        rows = getattr(reference, name)(*pair)
        return list(rows.view(len(outputs), -1).mean(-1))

    return Op(
        name,
        takes,
        partial(row_shapes.cases, name),
        [
            Provider("bertops", lambda inputs: bertops_call),
            Provider("eager", lambda inputs: eager),
            Provider("compiled eager", lambda inputs: compiled(eager), is_compiled, compiles=True),
            *others,
        ],
        means,
        outputs,
        lambda inputs: [torch.ones((), device=inputs.leaves[0].device) for _ in outputs],
        least,
    )


def cosine_embedding(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
    """DistilBERT's call."""
    target = torch.ones(len(student), device=student.device)
    return (F.cosine_embedding_loss(student.float(), teacher.float(), target),)


def cosine_similarity(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
    return ((1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean(),)


def normalized_mse(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
    """Times the width, which the mean over all elements divides by."""
    units = (F.normalize(x.float(), dim=-1) for x in (student, teacher))
    return (F.mse_loss(*units) * student.shape[-1],)


def feature_map_transfer(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    pair = student.float(), teacher.float()
    normed = (F.layer_norm(x, x.shape[-1:], eps=1e-12) for x in pair)
    means = (x.mean(-1) for x in pair)
    variances = (x.var(-1, correction=0) for x in pair)
    return F.mse_loss(*normed), F.mse_loss(*means), F.l1_loss(*variances)


def kl_div(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
    log_probs = student.log_softmax(-1, dtype=torch.float32)
    return (F.kl_div(log_probs, teacher.softmax(-1, dtype=torch.float32), reduction="batchmean"),)
