"""Objectives with encoders, in one process or sharded over two; also run by test_sharding.py's processes."""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bertops.distill.objective import Distillation
from bertops.distill.recipes import minilm, mobilebert, tinybert
from bertops.models import (
    AlbertConfig,
    AlbertForPreTraining,
    BertForMaskedLM,
    BertForSequenceClassification,
    MobileBertForSequenceClassification,
)
from bertops.pretraining.albert import MaskedLanguageModelingAndSentenceOrder
from bertops.pretraining.roberta import MaskedLanguageModeling
from bertops.training import AdamW, Objective, Outcome, Plan, Run, curves, measure, train
from small_task import CONFIG, IB_BERT, far_from_zero
from two_processes import in_two_processes

TOKENS, ROWS, LENGTH = CONFIG.vocab_size, 3, 7
NO_DROPOUT = {
    name: 0.0
    for name in (
        "hidden_dropout_p",
        "attention_dropout_p",
        "attention_output_dropout_p",
        "classifier_dropout_p",
    )
}
DROPOUT = dict.fromkeys(NO_DROPOUT, 0.1)
SMALL = replace(CONFIG, num_hidden_layers=2, **NO_DROPOUT)
# with eps far above the gradients and no betas a step is learning rate times gradient
GRADIENTS = Plan(
    steps=2,
    optimizer=AdamW(learning_rate=2e4, eps=1e6, betas=(0.0, 0.0), weight_decay=0.0),
    max_grad_norm=None,
    accumulation=2,
    log_every=1,
    evaluate_every=1,
    checkpoint_every=2,
)
BF16 = replace(GRADIENTS, bf16=True, accumulation=4)
CLIPPED = replace(GRADIENTS, max_grad_norm=1e-3)
LONG = Plan(
    steps=6,
    optimizer=AdamW(learning_rate=1e-3),
    accumulation=2,
    log_every=1,
    evaluate_every=3,
    checkpoint_every=2,
)


class Batches:
    """Padded texts or, ``packed``, masked ones end to end; batch i is the same whoever draws it."""

    def __init__(self, packed: bool, act: Callable[[int], None] = lambda i: None) -> None:
        self.packed, self.act, self.drawn = packed, act, 0

    def __next__(self) -> dict[str, Tensor]:
        self.act(self.drawn)
        self.drawn += 1
        generator = torch.Generator().manual_seed(self.drawn)
        lengths = torch.randint(2, LENGTH + 1, (ROWS,), generator=generator)
        mask = torch.arange(LENGTH) < lengths[:, None]
        ids = torch.randint(5, TOKENS, mask.shape, generator=generator).masked_fill(~mask, 0)
        labels = torch.randint(0, 2, (ROWS,), generator=generator)
        if not self.packed:
            return {"input_ids": ids, "mask": mask, "labels": labels}
        predicted = (torch.rand(mask.shape, generator=generator) < 0.4)[mask]
        packed = ids[mask]
        return {
            "input_ids": packed.masked_fill(predicted, 4)[None],
            "token_type_ids": (torch.arange(LENGTH) * 2 > lengths[:, None])[mask].long()[None],
            "labels": packed.masked_fill(~predicted, -100)[None],
            "cu_seqlens": torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
            "sentence_order_label": labels,
        }

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def bert(**changes) -> BertForSequenceClassification:
    return far_from_zero(BertForSequenceClassification(replace(SMALL, **changes)))


def relations() -> Distillation:
    """A loss on q, k and v of the last layer alone: no gradient comes to its output."""
    return minilm.Relations(bert(), bert(num_hidden_layers=3, hidden_size=36), minilm.Options())


def intermediate() -> Distillation:
    """Losses on hidden states and on q and k of every layer; the projections learn too."""
    return tinybert.Intermediate(bert(), bert(num_hidden_layers=4, hidden_size=36))


def transfer() -> Distillation:
    """Frozen embeddings, a layer that learns and a frozen one behind it."""
    teacher = far_from_zero(MobileBertForSequenceClassification(replace(IB_BERT, **NO_DROPOUT)))
    narrow = mobilebert.Options(bottleneck=12, feed_forward=16, stacked=2)
    return mobilebert.LayerTransfer(mobilebert.narrow_student(teacher, narrow), teacher, 1)


def masked_words(**changes) -> Objective:
    """The decoder is the word table."""
    return MaskedLanguageModeling(far_from_zero(BertForMaskedLM(replace(SMALL, **changes))))


def albert(share: str) -> Objective:
    """Layers that share parameters, and a decoder that is the word table."""
    config = AlbertConfig(
        vocab_size=TOKENS,
        embedding_size=16,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=32,
        max_position_embeddings=32,
        share=share,
        pooler=False,
        **NO_DROPOUT,
    )
    return MaskedLanguageModelingAndSentenceOrder(far_from_zero(AlbertForPreTraining(config)))


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "relations": relations,
    "intermediate": intermediate,
    "transfer": transfer,
    "masked words": masked_words,
    "all shared": partial(albert, "all"),
    "attention shared": partial(albert, "attention"),
}


def run(
    out: Path,
    make: Callable[[], Objective],
    plan: Plan = GRADIENTS,
    *,
    fsdp: bool = False,
    act: Callable[[int], None] = lambda i: None,
) -> Outcome:
    """The processes share the micro-batches of ``plan.accumulation``; the first one's start counts."""
    torch.manual_seed(3 + int(os.environ.get("RANK", 0)))
    objective = make()
    packed = not isinstance(objective, Distillation)
    held_out = [next(Batches(packed)) for _ in range(3)]
    plan = replace(plan, accumulation=plan.accumulation // int(os.environ.get("WORLD_SIZE", 1)))
    with Run(out, plan, {}, cpu=True, fsdp=fsdp) as opened:
        return train(
            opened,
            objective.train(),
            Batches(packed, act),
            evaluate=lambda accelerator, module: measure(accelerator, module, held_out),
            save_model=lambda folder: torch.save(objective.state_dict(), folder / "objective.pt"),
            quiet=True,
        )


def long(out: Path, act: Callable[[int], None] = lambda i: None) -> None:
    run(out, partial(masked_words, **DROPOUT), LONG, fsdp=True, act=act)


def killed(out: Path) -> None:
    """In step 5, after the checkpoint of step 4."""
    long(out / "killed", lambda drawn: os.kill(os.getpid(), signal.SIGKILL) if drawn == 9 else None)


def all_runs(out: Path) -> None:
    for name, make in OBJECTIVES.items():
        run(out / name, make, fsdp=True)
    run(out / "bf16", masked_words, BF16)
    run(out / "bf16 sharded", masked_words, BF16, fsdp=True)
    run(out / "clipped", masked_words, CLIPPED, fsdp=True)
    change = partial(run, out / "changed", masked_words, LONG)
    change(fsdp=True, act=lambda drawn: os.kill(os.getpid(), signal.SIGTERM) if drawn == 5 else None)
    change(fsdp=False)
    long(out / "straight")
    long(out / "killed")


def main(folder: str, *ports: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as under test
    curves.draw = lambda *arguments: b""
    works = (killed, all_runs)
    print(
        json.dumps(
            [
                in_two_processes(partial(work, Path(folder)), port)
                for work, port in zip(works, ports, strict=True)
            ]
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
