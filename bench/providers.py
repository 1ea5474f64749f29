"""The peers of attention, each as users write it today.

``make`` turns inputs into a function of their tensors; what depends on the mask alone is made there, untimed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import bertops
from bench.shapes import Case, HeadCase, HeadInputs, Inputs, Mode

Call = Callable[..., tuple[Tensor, ...]]
MAP_BYTES = {"cpu": 6e9, "cuda": 60e9}  # what a provider may fill with maps


@dataclass(frozen=True)
class Provider:
    """``applies`` picks the cases it takes part in; ``ignores_mask`` runs on all rows, padding included.

    ``maps``: fp32 maps of all heads that forward and backward hold at a time. ``compared``: from what it
    returns to the outputs of the reference, untimed.
    """

    name: str
    make: Callable[[Any], Call]
    applies: Callable[[Any], bool] = lambda case: True
    ignores_mask: bool = False
    cpu_lacks: str = ""  # backward, or what it needs in the forward as well
    compiles: bool = False  # in its first call
    maps: int = 0
    compared: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda outputs: outputs

    def unavailable(self, inputs: Inputs, mode: Mode) -> str | None:
        like = inputs.leaves[0]
        if like.device.type == "cpu" and self.cpu_lacks and (mode, self.cpu_lacks) != ("forward", "backward"):
            return f"has no {self.cpu_lacks} on a CPU"
        map_bytes = 4 * inputs.map_elements * self.maps
        if map_bytes > MAP_BYTES[like.device.type]:
            return f"its maps would take {map_bytes / 1e9:.0f} GB"
        return None


def is_compiled(case: Case) -> bool:
    return case.compiled


def is_padded(case: HeadCase) -> bool:
    return case.padding > 0 or case.source != "random"


def attention_providers(impl: str) -> list[Provider]:
    return [
        Provider("bertops", lambda inputs: bertops_attention(inputs.mask, impl)),
        Provider(
            "bertops, no mask", lambda inputs: bertops_attention(None, impl), is_padded, ignores_mask=True
        ),
        Provider("eager", lambda inputs: eager_attention(inputs.mask)),
        Provider(
            "compiled eager",
            lambda inputs: compiled(eager_attention(inputs.mask)),
            is_compiled,
            compiles=True,
        ),
        Provider("SDPA", lambda inputs: sdpa(inputs.mask)),
        *sdpa_backends(),
        Provider("FlexAttention", flex, is_compiled, cpu_lacks="backward", compiles=True),
    ]


def attention_with_scores_providers(impl: str) -> list[Provider]:
    return [
        Provider("bertops", lambda inputs: bertops_attention_with_scores(inputs.mask, impl)),
        Provider("eager", lambda inputs: eager_attention_with_scores(inputs.mask)),
        Provider(
            "compiled eager",
            lambda inputs: compiled(eager_attention_with_scores(inputs.mask)),
            is_compiled,
            compiles=True,
        ),
        Provider("SDPA + scores", lambda inputs: sdpa_with_scores(inputs.mask)),
    ]


def bertops_attention(mask: Tensor | None, impl: str) -> Call:
    return lambda q, k, v: (bertops.attention(q, k, v, mask, impl=impl),)


def bertops_attention_with_scores(mask: Tensor | None, impl: str) -> Call:
    return lambda q, k, v: bertops.attention_with_scores(q, k, v, mask, impl=impl)


def eager_attention(mask: Tensor | None) -> Call:
    """As in transformers: an additive mask, softmax in fp32."""
    call = eager_attention_with_scores(None)
    if mask is None:
        return lambda q, k, v: call(q, k, v)[:1]

    def masked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        bias = torch.where(mask, 0.0, torch.finfo(q.dtype).min).to(q.dtype)[:, None, None, :]
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
        return (logits.softmax(-1, dtype=torch.float32).to(q.dtype) @ v,)

    return masked


def eager_attention_with_scores(mask: Tensor | None) -> Call:
    """The map is 0 at masked pairs, as the loss between two maps wants it."""
    if mask is None:

        def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v, scores

        return call
    keys, hidden_pairs = mask[:, None, None, :], ~real_pairs(mask)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        bias = torch.where(keys, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
        out = (scores + bias).softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        return out, scores.masked_fill(hidden_pairs, 0.0)

    return masked


def sdpa(mask: Tensor | None) -> Call:
    keys = None if mask is None else mask[:, None, None, :]
    return lambda q, k, v: (F.scaled_dot_product_attention(q, k, v, attn_mask=keys),)


def sdpa_backends() -> list[Provider]:
    """One by one where there is a GPU; on a CPU there is nothing to choose from."""
    if not torch.cuda.is_available():
        return []
    backends = {
        "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
        "SDPA flash": SDPBackend.FLASH_ATTENTION,
        "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return [
        Provider(name, partial(sdpa_on, backend=backend), cpu_lacks="kernel")
        for name, backend in backends.items()
    ]


def sdpa_on(inputs: HeadInputs, backend: SDPBackend) -> Call:
    attend = sdpa(inputs.mask)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        with sdpa_kernel(backend):
            return attend(q, k, v)

    return call


def sdpa_with_scores(mask: Tensor | None) -> Call:
    """SDPA keeps its scores to itself: they are computed a second time."""
    attend = sdpa(mask)
    hidden_pairs = None if mask is None else ~real_pairs(mask)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if hidden_pairs is not None:
            scores = scores.masked_fill(hidden_pairs, 0.0)
        return attend(q, k, v)[0], scores

    return call


def real_pairs(mask: Tensor) -> Tensor:
    """(B, 1, N, N): both tokens are real."""
    return mask[:, None, :, None] & mask[:, None, None, :]


def compiled(call: Call) -> Call:
    return torch.compile(call, dynamic=False)


def flex(inputs: HeadInputs) -> Call:
    attend = compiled_flex(inputs.mask)
    return lambda q, k, v: (attend(q, k, v),)


def compiled_flex(mask: Tensor | None) -> Callable[..., Any]:
    """``flex_attention`` over the real keys."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if mask is not None:
        length = mask.shape[1]
        block_mask = create_block_mask(
            lambda b, h, i, j: mask[b, j], mask.shape[0], None, length, length, device=mask.device
        )
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=block_mask)
