"""One distillation loss in four ways: bertops' models, bertops inside transformers, and transformers' models
with losses in plain PyTorch.

All see the same teacher and student, and all return the same number: every loss is a mean over real tokens,
or pairs of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, BertForSequenceClassification
from transformers.masking_utils import eager_mask
from transformers.utils import logging

import bertops.integrations.transformers as integration
from bench.demo import map_kl, score_map
from bertops import capture, models
from bertops.distill import layer_map
from bertops.distill.data import Batch, inputs
from bertops.distill.initialize import init_student_from_teacher
from bertops.distill.losses import MiniLMLoss, MiniLMv2Loss, TinyBertLoss, TinyBertPredictionLoss, combine
from bertops.distill.recipes.minilm import Options, Relations
from bertops.models.checkpoint import plain_name, source_names

METHODS = ("minilm", "minilmv2", "tinybert")
VERSIONS = {"minilm": 1, "minilmv2": 2}
EAGER_SCORES = "eager with scores"  # the name of an attention function, as transformers knows it
SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Pair:
    """Where every contestant starts: models of bertops with a classifier, both in evaluation mode."""

    teacher: models.BertForSequenceClassification
    student: models.BertForSequenceClassification

    @classmethod
    def of(cls, teacher: models.BertForSequenceClassification, layers: Sequence[int], length: int) -> "Pair":
        """A student of ``layers`` of the teacher, counted from 1; both take ``length`` tokens.

        Where the teacher has fewer positions, its table is repeated.
        """
        teacher = with_positions(teacher, length)
        config = replace(teacher.config, num_hidden_layers=len(layers))
        student = models.BertForSequenceClassification(config)
        init_student_from_teacher(student, teacher, layers, heads=True)
        return cls(teacher.eval(), student.eval())

    def save(self, folder: Path) -> None:
        """Where transformers reads both."""
        self.teacher.save_pretrained(folder / "teacher")
        self.student.save_pretrained(folder / "student")


def with_positions(
    model: models.BertForSequenceClassification, length: int
) -> models.BertForSequenceClassification:
    rows = model.config.max_position_embeddings
    if length <= rows:
        return model
    longer = models.BertForSequenceClassification(replace(model.config, max_position_embeddings=length))
    state = model.state_dict()
    name = "encoder.embeddings.position.weight"
    state[name] = state[name].repeat(-(-length // rows), 1)[:length]
    longer.load_state_dict(state)
    return longer


class Contestant(nn.Module, ABC):
    """A student, its teacher and TinyBERT's projections, which start as the identity.

    Args:
        method: one of ``METHODS``.
        student, teacher: models with a classifier.
        relation_heads: of MiniLMv2.
    """

    def __init__(self, method: str, student: Any, teacher: Any, relation_heads: int) -> None:
        super().__init__()
        self.method, self.relation_heads = method, relation_heads
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        counts = student.config.num_hidden_layers, teacher.config.num_hidden_layers
        self.student_layers, self.teacher_layers = range(1, counts[0] + 1), layer_map.uniform(*counts)
        width = student.config.hidden_size
        self.tinybert_loss = None
        if method == "tinybert":
            self.tinybert_loss = TinyBertLoss(width, width).to(next(student.parameters()).device)
            for projection in (self.tinybert_loss.embedding, self.tinybert_loss.hidden):
                nn.init.eye_(projection.weight)

    def forward(self, batch: Batch) -> Tensor:
        """The loss of ``input_ids`` (B, N) and ``mask`` (B, N), true for a real token."""
        losses: dict[str, Callable[[Batch], Tensor]] = {
            "minilm": self.minilm,
            "minilmv2": self.minilmv2,
            "tinybert": self.tinybert,
        }
        return losses[self.method](batch)

    @abstractmethod
    def minilm(self, batch: Batch) -> Tensor: ...

    @abstractmethod
    def minilmv2(self, batch: Batch) -> Tensor: ...

    @abstractmethod
    def tinybert(self, batch: Batch) -> Tensor:
        """Embeddings, hidden states, attention scores and answers, all in one."""

    @abstractmethod
    def sources(self, name: str) -> list[str]:
        """What a parameter of the student is called in a checkpoint."""

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter that the loss depends on, by the checkpoint's names."""
        found = {}
        for name, parameter in self.student.named_parameters():
            if parameter.grad is not None:
                sources = self.sources(name)
                found.update(zip(sources, parameter.grad.chunk(len(sources)), strict=True))
        if self.tinybert_loss is not None:
            for name, parameter in self.tinybert_loss.named_parameters():
                assert parameter.grad is not None
                found[f"projection.{name}"] = parameter.grad
        return found


class WithBertops(Contestant):
    """Bertops' losses of what :func:`bertops.capture` records."""

    @abstractmethod
    def run(self, model: Any, batch: Batch, **outputs: bool) -> Any: ...

    def minilm(self, batch: Batch) -> Tensor:
        return self.relations(MiniLMLoss(), batch)

    def minilmv2(self, batch: Batch) -> Tensor:
        return self.relations(MiniLMv2Loss(self.relation_heads), batch)

    def relations(self, loss: MiniLMLoss | MiniLMv2Loss, batch: Batch) -> Tensor:
        with capture(self.student, stop=True) as taps_s:
            self.run(self.student, batch)
        with capture(self.teacher, stop=True) as taps_t, torch.no_grad():
            self.run(self.teacher, batch)
        return combine(loss(taps_s[-1], taps_t[-1]))

    def tinybert(self, batch: Batch) -> Tensor:
        assert self.tinybert_loss is not None
        with (
            capture(self.student, self.student_layers) as taps_s,
            capture(self.teacher, self.teacher_layers) as taps_t,
        ):
            out_s = self.run(self.student, batch, output_hidden_states=True)
            with torch.no_grad():
                out_t = self.run(self.teacher, batch, output_hidden_states=True)
        hidden_t = [out_t.hidden_states[layer] for layer in (0, *self.teacher_layers)]
        terms = self.tinybert_loss(out_s.hidden_states, hidden_t, taps_s, taps_t, batch["mask"])
        return combine({**terms, **TinyBertPredictionLoss()(out_s.logits, out_t.logits)})


class Bertops(WithBertops):
    """Bertops' models; MiniLM by its recipe."""

    def run(self, model: Any, batch: Batch, **outputs: bool) -> Any:
        return model(**inputs(model, batch), **outputs)

    def relations(self, loss: MiniLMLoss | MiniLMv2Loss, batch: Batch) -> Tensor:
        options = Options(version=VERSIONS[self.method], relation_heads=self.relation_heads)
        return combine(Relations(self.student, self.teacher, options).terms(batch))

    def sources(self, name: str) -> list[str]:
        return source_names(name, self.student.config)


class OfTransformers(Contestant):
    """Transformers' models."""

    def run(self, model: Any, batch: Batch, **outputs: bool) -> Any:
        return model(input_ids=batch["input_ids"], attention_mask=batch["mask"], **outputs)

    def sources(self, name: str) -> list[str]:
        return [plain_name(name, "bert")]


class BertopsInTransformers(OfTransformers, WithBertops):
    """``attn_implementation="bertops"``."""


class Plain(OfTransformers):
    """Losses in plain PyTorch, each map written out."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        letters = {"minilm": self.minilm_letters, "minilmv2": "qkv", "tinybert": self.tinybert_letters}
        last_only = self.method != "tinybert"
        layers = [-1] if last_only else self.student_layers, [-1] if last_only else self.teacher_layers
        self.heads_s = Heads(self.student, letters[self.method], layers[0])
        self.heads_t = Heads(self.teacher, letters[self.method], layers[1])

    minilm_letters = "qkv"
    tinybert_letters = "qk"
    outputs: ClassVar[dict[str, bool]] = {}  # what the models are asked for, of attention

    def both(self, batch: Batch, **outputs: bool) -> tuple[Any, Any]:
        with torch.no_grad():
            out_t = self.run(self.teacher, batch, **outputs)
        return self.run(self.student, batch, **outputs), out_t

    def minilmv2(self, batch: Batch) -> Tensor:
        self.both(batch)
        (heads_s,), (heads_t,) = self.heads_s.take(), self.heads_t.take()
        return torch.stack([self.relation(heads_s[x], heads_t[x], batch["mask"]) for x in "qkv"]).sum()

    def relation(self, x_s: Tensor, x_t: Tensor, mask: Tensor) -> Tensor:
        """Of relation heads, split anew from the heads (B, H, N, D)."""
        x_s, x_t = (
            x.transpose(1, 2).flatten(2).unflatten(2, (self.relation_heads, -1)).transpose(1, 2)
            for x in (x_s, x_t)
        )
        return map_kl(score_map(x_s, x_s), score_map(x_t, x_t), mask)

    def tinybert(self, batch: Batch) -> Tensor:
        assert self.tinybert_loss is not None
        out_s, out_t = self.both(batch, output_hidden_states=True, **self.outputs)
        mask = batch["mask"]
        hidden_t = [out_t.hidden_states[layer] for layer in (0, *self.teacher_layers)]
        projections = [self.tinybert_loss.embedding, *[self.tinybert_loss.hidden] * len(self.student_layers)]
        hidden = [
            masked_mse(project(s), t, mask[:, :, None])
            for s, t, project in zip(out_s.hidden_states, hidden_t, projections, strict=True)
        ]
        pairs = mask[:, None, :, None] & mask[:, None, None, :]
        maps = zip(*self.score_maps(out_s, out_t), strict=True)
        attention = [masked_mse(scores_s, scores_t, pairs) for scores_s, scores_t in maps]
        log_p_s, p_t = out_s.logits.log_softmax(-1), out_t.logits.softmax(-1)
        answers = F.kl_div(log_p_s, p_t, reduction="batchmean")
        return torch.stack([*hidden, *attention, answers]).sum()

    def score_maps(self, out_s: Any, out_t: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Of the student's layers and of the teacher's, multiplied out again."""
        maps_s, maps_t = (
            [score_map(layer["q"], layer["k"]) for layer in heads.take()]
            for heads in (self.heads_s, self.heads_t)
        )
        return maps_s, maps_t


class Eager(Plain):
    """``attn_implementation="eager"``: the maps that the models return."""

    minilm_letters, tinybert_letters = "v", ""
    outputs: ClassVar = {"output_attentions": True}

    def minilm(self, batch: Batch) -> Tensor:
        out_s, out_t = self.both(batch, output_attentions=True)
        (heads_s,), (heads_t,), mask = self.heads_s.take(), self.heads_t.take(), batch["mask"]
        log_p_s, p_t = out_s.attentions[-1].clamp_min(SMALLEST).log(), out_t.attentions[-1]
        rows = F.kl_div(log_p_s, p_t, reduction="none").sum(-1)  # (B, H, N)
        values = map_kl(*(score_map(heads["v"], heads["v"]) for heads in (heads_s, heads_t)), mask)
        return rows.transpose(1, 2)[mask].mean() + values

    def score_maps(self, out_s: Any, out_t: Any) -> tuple[list[Tensor], list[Tensor]]:
        return list(out_s.attentions), [out_t.attentions[layer - 1] for layer in self.teacher_layers]


class Sdpa(Plain):
    """``attn_implementation="sdpa"``, which has no map: multiplied out again for the loss."""

    def minilm(self, batch: Batch) -> Tensor:
        self.both(batch)
        (heads_s,), (heads_t,), mask = self.heads_s.take(), self.heads_t.take(), batch["mask"]
        attention = map_kl(*(score_map(heads["q"], heads["k"]) for heads in (heads_s, heads_t)), mask)
        return attention + map_kl(*(score_map(heads["v"], heads["v"]) for heads in (heads_s, heads_t)), mask)


class Heads:
    """q, k and v (B, H, N, D) of chosen layers of transformers' BERT in its last forward, by hooks."""

    def __init__(self, model: Any, letters: str, layers: Iterable[int]) -> None:
        """``layers``: counted from 1, or -1."""
        self.found: list[dict[str, Tensor]] = []
        for place, number in enumerate(layers):
            attention = model.bert.encoder.layer[number - 1 if number > 0 else number].attention.self
            self.found.append({})
            linears = {"q": attention.query, "k": attention.key, "v": attention.value}
            for letter in letters:
                keep = partial(self.keep, place, letter, attention.num_attention_heads)
                linears[letter].register_forward_hook(keep)

    def keep(self, place: int, letter: str, heads: int, module: nn.Module, args: Any, output: Tensor) -> None:
        self.found[place][letter] = output.unflatten(-1, (heads, -1)).transpose(1, 2)

    def take(self) -> list[dict[str, Tensor]]:
        """A dict for every layer; nothing is kept."""
        taken = [dict(layer) for layer in self.found]
        for layer in self.found:
            layer.clear()
        return taken


def masked_mse(x_s: Tensor, x_t: Tensor, real: Tensor) -> Tensor:
    """A mean over what is ``real``; as in TinyBERT's code both are 0 elsewhere, and ``real`` broadcasts."""
    kept_s, kept_t = torch.where(real, x_s, 0.0), torch.where(real, x_t, 0.0)
    count = real.sum() * (x_s.numel() // real.numel())
    return F.mse_loss(kept_s, kept_t, reduction="sum") / count


def eager_with_scores(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention whose map is that of the scores, as TinyBERT's code changes BERT; no dropout."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    out = scores.softmax(-1) @ value
    return out.transpose(1, 2).contiguous(), scores


AttentionInterface.register(EAGER_SCORES, eager_with_scores)
AttentionMaskInterface.register(EAGER_SCORES, eager_mask)


def contestants(
    pair: Pair, folder: Path, method: str, device: torch.device, relation_heads: int
) -> dict[str, Contestant]:
    """All four, each with models of its own; ``folder`` is where :meth:`Pair.save` wrote."""
    logging.disable_progress_bar()

    def load(name: str, attention: str) -> Any:
        cls = BertForSequenceClassification
        return cls.from_pretrained(folder / name, attn_implementation=attention).to(device).eval()

    def of_transformers(cls: type[Contestant], attention: str) -> Contestant:
        return cls(method, load("student", attention), load("teacher", attention), relation_heads)

    own = Bertops(method, pair.student.to(device), pair.teacher.to(device), relation_heads)
    eager = EAGER_SCORES if method == "tinybert" else "eager"
    return {
        "bertops": own,
        "bertops in transformers": of_transformers(BertopsInTransformers, integration.NAME),
        "transformers eager": of_transformers(Eager, eager),
        "transformers SDPA": of_transformers(Sdpa, "sdpa"),
    }
