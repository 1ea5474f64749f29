"""The peers of the losses behind a linear layer, each as users write it today: the mean over rows."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bertops
from bench.linear_shapes import TEMPERATURE, LinearCase
from bench.providers import Call, Provider, compiled, is_compiled
from bench.shapes import Inputs
from bertops import reference

CHUNK = {"cpu": 256, "cuda": 1024}  # rows whose logits live at a time


def is_chunked(case: LinearCase) -> bool:
    return case.chunked


def linear_kl_div_providers(impl: str) -> list[Provider]:
    own = partial(bertops.linear_kl_div, temperature=TEMPERATURE, impl=impl)
    providers = [
        Provider("bertops", lambda inputs: lambda *tensors: (own(*tensors),)),
        Provider("eager", lambda inputs: mean(kl_sum)),
        Provider("compiled eager", lambda inputs: compiled(mean(kl_sum)), is_compiled, compiles=True),
        Provider("chunked eager", chunked_kl, is_chunked),
    ]
    if importlib.util.find_spec("liger_kernel") is not None:
        providers.append(Provider("Liger", liger_kl, cpu_lacks="kernel"))
    return providers


def kl_sum(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor) -> Tensor:
    """Over all rows."""
    wide = torch.promote_types(hidden_s.dtype, torch.float32)
    log_probs = (F.linear(hidden_s, weight_s) / TEMPERATURE).log_softmax(-1, dtype=wide)
    target = (F.linear(hidden_t, weight_t) / TEMPERATURE).softmax(-1, dtype=wide)
    return F.kl_div(log_probs, target, reduction="sum") * TEMPERATURE**2


def mean(loss: Callable[..., Tensor]) -> Call:
    return lambda hidden_s, *others: (loss(hidden_s, *others) / hidden_s.shape[0],)


def chunked_kl(inputs: Inputs) -> Call:
    """The logits of one chunk live at a time, also in the backward, which computes them again."""
    chunk = CHUNK[inputs.leaves[0].device.type]

    def in_chunks(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor) -> Tensor:
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.stack(
            [
                checkpoint(kl_sum, part_s, weight_s, part_t, weight_t, **options)
                for part_s, part_t in zip(hidden_s.split(chunk), hidden_t.split(chunk), strict=True)
            ]
        ).sum()

    return mean(in_chunks)


def liger_kl(inputs: Inputs) -> Call:
    """Its Jensen-Shannon divergence with beta 0 is KL(teacher ‖ student), without the factor T²."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
    return lambda *tensors: (loss(*tensors) * TEMPERATURE**2,)


def kl_rows(*tensors: Tensor) -> list[Tensor]:
    hidden_s, weight_s, hidden_t, weight_t = tensors
    return [reference.linear_kl_div(hidden_s, weight_s, None, hidden_t, weight_t, None, None, TEMPERATURE)]


def projected_mse_providers(impl: str) -> list[Provider]:
    def own(hidden_s: Tensor, weight: Tensor, hidden_t: Tensor) -> tuple[Tensor]:
        return (bertops.projected_mse(hidden_s, hidden_t, weight, impl=impl),)

    return [
        Provider("bertops", lambda inputs: own),
        Provider("eager", lambda inputs: eager_mse),
        Provider("compiled eager", lambda inputs: compiled(eager_mse), is_compiled, compiles=True),
    ]


def eager_mse(hidden_s: Tensor, weight: Tensor, hidden_t: Tensor) -> tuple[Tensor]:
    wide = torch.promote_types(hidden_s.dtype, torch.float32)
    return (F.mse_loss(F.linear(hidden_s, weight).to(wide), hidden_t.to(wide)),)


def mse_rows(hidden_s: Tensor, weight: Tensor, hidden_t: Tensor) -> list[Tensor]:
    return [reference.projected_mse(hidden_s, weight, None, hidden_t)]


def share_of_rows(inputs: Inputs, elements: int = 1) -> list[Tensor]:
    """For the rows (M,) of a loss that is their sum over M times ``elements``."""
    like = inputs.leaves[0]
    share = 1 / (like.shape[0] * elements)
    return [torch.full(like.shape[:1], share, dtype=torch.float64, device=like.device)]
