"""What is measured of ``factorized_embedding``: models' shapes, its peers, and what it must do at least."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import bertops
from bench.limits import Work
from bench.providers import Call, Provider, compiled, is_compiled
from bench.shapes import Case, Inputs, Mode, Scope, Takes
from bench.work import bytes_of
from bertops import reference

PARAMETERS = Takes(
    ("word", "position", "token_type", "norm_weight", "norm_bias", "projection", "projection_bias")
)
EPS = 1e-12
SPREAD = 0.02  # of the weights, as BERT starts them


@dataclass(frozen=True)
class EmbeddingInputs(Inputs):
    """Parameters in the order of ``PARAMETERS``, the last two missing without a projection; ids (B, N)."""

    input_ids: Tensor
    token_type_ids: Tensor

    @property
    def extra(self) -> tuple[Tensor, Tensor]:
        return self.input_ids, self.token_type_ids

    @property
    def reversible(self) -> bool:
        return False


@dataclass(frozen=True)
class EmbeddingCase(Case):
    batch: int
    length: int
    vocabulary: int
    width: int
    height: int = 0  # 0: no projection
    skewed: bool = False  # half of all ids are equal

    @property
    def sizes(self) -> str:
        height = f"-H{self.height}" if self.height else ""
        skewed = "-skewed" if self.skewed else ""
        return f"B{self.batch}-N{self.length}-V{self.vocabulary}-E{self.width}{height}{skewed}"

    def draw(self, takes: Takes, device: torch.device) -> EmbeddingInputs:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return SPREAD * torch.randn(shape, generator=generator)

        tables = [draw(rows, self.width) for rows in (self.vocabulary, 512, 2)]
        norm = [1 + draw(self.width), draw(self.width)]
        projection = [draw(self.height, self.width), draw(self.height)] if self.height else []
        shape = (self.batch, self.length)
        input_ids = torch.randint(self.vocabulary, shape, generator=generator)
        if self.skewed:
            input_ids[torch.rand(shape, generator=generator) < 0.5] = self.vocabulary // 2
        types = torch.randint(2, shape, generator=generator)
        leaves = tuple(x.to(device, self.dtype) for x in (*tables, *norm, *projection))
        return EmbeddingInputs(leaves, (), self.title, input_ids.to(device), types.to(device))


BOTH: tuple[Mode, ...] = ("forward", "both")

# without compiled eager: each of its graphs takes longer to compile than everything else here
QUICK = [
    EmbeddingCase(8, 512, 30000, 128, 768, modes=BOTH),
    EmbeddingCase(8, 512, 30000, 128, 768, skewed=True, modes=("both",)),
    EmbeddingCase(8, 512, 30522, 768, modes=BOTH),
    EmbeddingCase(1, 16, 30000, 128, 768, overhead=True),
]
FULL = [
    EmbeddingCase(
        batch, length, vocabulary, width, height, skewed=skewed, dtype=dtype, modes=BOTH, compiled=True
    )
    for dtype in (torch.float32, torch.bfloat16)
    for batch, length in ((8, 128), (32, 512))
    for skewed in (False, True)
    for vocabulary, width, height in (
        (30000, 128, 768),
        (30000, 128, 4096),
        (30522, 768, 0),
        (250002, 768, 0),
    )
] + [EmbeddingCase(1, 16, 30000, 128, 768, overhead=True), EmbeddingCase(1, 16, 30522, 768, overhead=True)]

QUICK_ON_GPU = [
    EmbeddingCase(32, 512, 30000, 128, 768, dtype=torch.bfloat16, modes=BOTH, compiled=True),
    EmbeddingCase(32, 512, 30000, 128, 768, dtype=torch.bfloat16, modes=("both",), skewed=True),
    EmbeddingCase(32, 512, 30522, 768, dtype=torch.bfloat16, modes=BOTH),
]

CASES: dict[Scope, list[Case]] = {"quick": [*QUICK], "full": [*FULL]}


def cases(scope: Scope, device: str) -> list[Case]:
    """None over lengths."""
    if (scope, device) == ("quick", "cuda"):
        return [*QUICK_ON_GPU]
    return CASES.get(scope, [])


def providers(impl: str) -> list[Provider]:
    return [
        Provider("bertops", lambda inputs: fused(inputs, impl)),
        Provider("eager", eager),
        Provider("compiled eager", lambda inputs: compiled(eager(inputs)), is_compiled, compiles=True),
    ]


def fused(inputs: EmbeddingInputs, impl: str) -> Call:
    input_ids, token_type_ids = inputs.extra

    def call(*parameters: Tensor) -> tuple[Tensor]:
        named = dict(zip(PARAMETERS.leaf_names, parameters, strict=False))
        ids = {"token_type_ids": token_type_ids}
        return (bertops.factorized_embedding(input_ids, **named, **ids, eps=EPS, impl=impl),)

    return call


def eager(inputs: EmbeddingInputs) -> Call:
    """As in transformers: three look-ups, LayerNorm, a linear layer."""
    input_ids, token_type_ids = inputs.extra
    position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]

    def call(
        word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor, *projection: Tensor
    ) -> tuple[Tensor]:
        hidden = F.embedding(input_ids, word) + F.embedding(token_type_ids, token_type)
        hidden = hidden + F.embedding(position_ids, position)
        hidden = F.layer_norm(hidden, hidden.shape[-1:], weight, bias, EPS)
        return (F.linear(hidden, *projection) if projection else hidden,)

    return call


def embedding_reference(*arguments: Tensor) -> list[Tensor]:
    *parameters, input_ids, token_type_ids = arguments
    named = dict(zip(PARAMETERS.leaf_names, parameters, strict=False))
    tables = [named.get(name) for name in PARAMETERS.leaf_names]
    return [reference.factorized_embedding(input_ids, None, token_type_ids, None, *tables, EPS)]


def upstream(inputs: EmbeddingInputs) -> list[Tensor]:
    word, last = inputs.leaves[0], inputs.leaves[-1]
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*inputs.input_ids.shape, last.shape[0], generator=generator).to(word)]


def work(inputs: EmbeddingInputs, mode: Mode) -> Work:
    """Forward: the product; reads the ids and, once, every row that a token takes, writes the output.
    Backward: two products; reads the same and the output's gradient, writes a gradient for every parameter.
    """
    word, *others = inputs.leaves
    tokens, height = inputs.input_ids.numel(), inputs.leaves[-1].shape[0]
    product = 2.0 * tokens * word.shape[1] * height if len(inputs.leaves) == 7 else 0.0
    used = int(inputs.input_ids.unique().numel()) * bytes_of(word[0])
    read = used + sum(bytes_of(x) for x in others) + sum(bytes_of(x) for x in inputs.extra)
    out = tokens * height * word.element_size()
    forward = Work(product, 0.0, read + out)
    if mode == "forward":
        return forward
    grads = sum(bytes_of(x) for x in inputs.leaves)
    return Work(3 * product, 0.0, 2 * forward.bytes + grads)
