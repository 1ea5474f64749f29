"""The peers of the losses between two models' attention, each as users write it today.

All divide by the number of real rows or pairs, as bertops does, so that they return the same number.
FlexAttention can express KL because the mean of the student's scores under the teacher's attention is itself
an attention, with the student's keys for values. Score MSE takes no softmax, so it cannot express that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bench import shapes, work
from bench.limits import Work
from bench.measure import Op, share_of_rows
from bench.providers import Call, Provider, compiled, compiled_flex, is_compiled
from bench.shapes import HeadCase, HeadInputs, Mode, Takes

CHUNK = {"cpu": 128, "cuda": 1024}  # query rows whose maps live at a time
LONGEST_MAP = 1024  # the reference holds whole maps up to this length
CHUNK_PAIRS = 2**21  # and beyond, elements of a map: 16 MB in fp64

# q_s, k_s, q_t, k_t, and keys (B, 1, 1, N) or None, to the loss of every row of q (B, H, rows of q).
Rows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Loss:
    """The sum of ``rows`` over the ``count`` of what is real; ``maps``: a Provider's, eager and compiled."""

    rows: Rows
    count: Callable[[HeadInputs], int]
    maps: tuple[int, int]

    def mean(self, inputs: HeadInputs, all_rows: Callable[..., Tensor]) -> Call:
        """``all_rows`` takes the two models' q and k and the keys; rows of padding are left out."""
        mask, count = inputs.mask, self.count(inputs)
        keys = None if mask is None else mask[:, None, None, :]

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            rows = all_rows(*pair(tensors), keys)
            if mask is not None:
                rows = rows.masked_fill(~mask[:, None, :], 0.0)
            return (rows.sum() / count,)

        return call

    def eager(self, inputs: HeadInputs) -> Call:
        return self.mean(inputs, self.rows)

    def chunked(self, inputs: HeadInputs) -> Call:
        chunk = CHUNK[inputs.leaves[0].device.type]
        return self.mean(inputs, lambda *arguments: in_chunks(self.rows, chunk, *arguments))

    def reference(self, whole: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        """The rows by ``whole``, of bertops.reference, or in chunks where its maps would be large."""

        def call(*arguments: Tensor) -> list[Tensor]:
            *tensors, mask = arguments
            if tensors[0].shape[2] <= LONGEST_MAP:
                return [whole(*tensors, mask)]
            keys = None if mask is None else mask[:, None, None, :]
            chunk = max(1, CHUNK_PAIRS // (tensors[0].shape[:3].numel()))
            rows = in_chunks(self.rows, chunk, *pair(tensors), keys)
            return [rows if mask is None else rows.masked_fill(~mask[:, None, :], 0.0)]

        return call

    def op(
        self,
        name: str,
        takes: Takes,
        own: Callable[..., Tensor],
        whole: Callable[..., Tensor],
        least: Callable[[HeadInputs, Mode], Work],
        *others: Provider,
    ) -> Op:
        """``own`` is bertops' function of tensors and mask; ``others`` are peers that this loss alone has."""
        eager_maps, compiled_maps = self.maps
        providers = [
            Provider("bertops", lambda inputs: lambda *tensors: (own(*tensors, inputs.mask),)),
            Provider("eager", self.eager, maps=eager_maps),
            Provider(
                "compiled eager",
                lambda inputs: compiled(self.eager(inputs)),
                is_compiled,
                compiles=True,
                maps=compiled_maps,
            ),
            Provider("chunked eager", self.chunked, is_chunked),
            *others,
        ]
        return Op(
            name,
            takes,
            partial(shapes.cases, name),
            providers,
            self.reference(whole),
            ("loss",),
            self.upstream,
            least,
        )

    def upstream(self, inputs: HeadInputs) -> list[Tensor]:
        return share_of_rows(inputs, self.count(inputs))


def is_chunked(case: HeadCase) -> bool:
    return case.chunked


def pair(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """q_s, k_s, q_t, k_t; a relation compares x_s and x_t with themselves."""
    if len(tensors) == 4:
        return tensors
    x_s, x_t = tensors
    return x_s, x_s, x_t, x_t


def in_chunks(
    rows: Rows, chunk: int, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, keys: Tensor | None
) -> Tensor:
    """The maps of one chunk of queries live at a time, also in the backward, which computes them again."""
    parts = [
        checkpoint(rows, part_s, k_s, part_t, k_t, keys, use_reentrant=False, preserve_rng_state=False)
        for part_s, part_t in zip(q_s.split(chunk, 2), q_t.split(chunk, 2), strict=True)
    ]
    return torch.cat(parts, 2)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


def score_mse_rows(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, keys: Tensor | None) -> Tensor:
    """Both maps are 0 at masked keys, as in TinyBERT."""
    s, t = scores(q_s, k_s), scores(q_t, k_t)
    if keys is not None:
        s, t = s.masked_fill(~keys, 0.0), t.masked_fill(~keys, 0.0)
    wide = torch.promote_types(s.dtype, torch.float32)
    return F.mse_loss(s.to(wide), t.to(wide), reduction="none").sum(-1)


def kl_rows(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, keys: Tensor | None) -> Tensor:
    s, t = scores(q_s, k_s), scores(q_t, k_t)
    if keys is not None:
        s, t = (x.masked_fill(~keys, torch.finfo(x.dtype).min) for x in (s, t))
    wide = torch.promote_types(s.dtype, torch.float32)
    log_probs, target = s.log_softmax(-1, dtype=wide), t.softmax(-1, dtype=wide)
    return F.kl_div(log_probs, target, reduction="none").sum(-1)


def eager_gram(inputs: HeadInputs) -> Call:
    """Score MSE by the formula of ``bertops.attention_score_mse``, in a few lines of PyTorch."""
    mask = inputs.mask
    count = SCORE_MSE.count(inputs)

    def call(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> tuple[Tensor, ...]:
        tensors = (q_s * q_s.shape[-1] ** -0.5, k_s, q_t * q_t.shape[-1] ** -0.5, k_t)
        if mask is not None:
            tensors = tuple(x.masked_fill(~mask[:, None, :, None], 0.0) for x in tensors)
        q_s, k_s, q_t, k_t = tensors
        student = (gram(q_s, q_s) * gram(k_s, k_s)).sum()
        cross = (gram(q_s, q_t) * gram(k_s, k_t)).sum()
        teacher = (gram(q_t, q_t) * gram(k_t, k_t)).sum()
        return ((student - 2 * cross + teacher) / count,)

    return call


def gram(a: Tensor, b: Tensor) -> Tensor:
    return (a.transpose(-1, -2) @ b).float()


def kl_by_attention(attend: Call, inputs: HeadInputs) -> Call:
    """``attend`` is a differentiable attention with its lse; KL = sum p_t (t - s) - lse_t + lse_s of a row.

    The expectations of t and s under the teacher are products of the query with an average of keys.
    """

    def all_rows(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, keys: Tensor | None) -> Tensor:
        mean_k_t, lse_t = attend(q_t, k_t, k_t)
        mean_k_s, _ = attend(q_t, k_t, k_s)
        _, lse_s = attend(q_s, k_s, k_s)
        expected_t = (q_t * mean_k_t).sum(-1, dtype=lse_t.dtype) * q_t.shape[-1] ** -0.5
        expected_s = (q_s * mean_k_s).sum(-1, dtype=lse_s.dtype) * q_s.shape[-1] ** -0.5
        return expected_t - expected_s - lse_t + lse_s

    return KL.mean(inputs, all_rows)


def flex_kl(inputs: HeadInputs) -> Call:
    from torch.nn.attention.flex_attention import AuxRequest

    flex = compiled_flex(inputs.mask)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, aux = flex(q, k, v, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    return kl_by_attention(attend, inputs)


SCORE_MSE = Loss(score_mse_rows, work.real_pairs, maps=(3, 3))
KL = Loss(kl_rows, work.real_rows, maps=(7, 3))
FLEX_KL = Provider("FlexAttention", flex_kl, is_compiled, cpu_lacks="lse", compiles=True)
EAGER_GRAM = Provider("eager Gram", eager_gram)
