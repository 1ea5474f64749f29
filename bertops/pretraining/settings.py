"""What a pretraining run can be told; the defaults fit a text of a million words, two CPU cores, minutes."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bertops.training import Plan


def setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def plan_of(settings: Any, steps: int, learning_rate: float, **optimizer: Any) -> "Plan":
    """Of ``steps`` with AdamW; ``optimizer`` is for it, the rest is in the fields of ``settings``."""
    from bertops.training import AdamW, Plan  # needs accelerate, which the command line may lack

    return Plan(
        steps=steps,
        optimizer=AdamW(learning_rate=learning_rate, weight_decay=settings.weight_decay, **optimizer),
        warmup=int(settings.warmup * steps),
        accumulation=settings.accumulation,
        bf16=settings.bf16,
        log_every=settings.log_every,
        evaluate_every=settings.evaluate_every,
        checkpoint_every=settings.checkpoint_every,
        seed=settings.seed,
    )


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """What is masked of a text, and held out of it, in pretraining and in distillation.

    Raises:
        ValueError: ``masking`` is unknown, or ``held_out`` is no share.
    """

    masking: str = setting("dynamic", "dynamic: new masks every epoch; static: those of the first one")
    mask_prob: float = setting(0.15, "share of the tokens to predict")
    held_out: float = setting(0.05, "share of the documents that only the evaluation sees")

    def __post_init__(self) -> None:
        if self.masking not in ("dynamic", "static"):
            raise ValueError(f"masking must be dynamic or static, got {self.masking!r}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be from 0 to below 1, got {self.held_out}")


@dataclass(frozen=True, kw_only=True)
class Settings(TextSettings):
    """Sizes and rates that RoBERTa and ALBERT have in common; each field says what it is in its ``help``.

    Raises:
        ValueError: as :class:`TextSettings`, or ``warmup`` is no share.
    """

    vocab_size: int = setting(4000, "of the tokenizer that is trained on the text")
    length: int = setting(64, "most tokens of a sequence, special ones included")
    hidden_size: int = setting(128, "width of the layers")
    layers: int = setting(2, "number of layers")
    heads: int = setting(2, "attention heads")
    intermediate_size: int = setting(512, "width of the feed-forward")
    dropout: float = setting(
        0.0, "of embeddings, attention and feed-forward; the papers' is 0.1, of ALBERT v2 0"
    )
    steps: int = setting(7000, "updates of the parameters")
    batch_size: int = setting(16, "sequences of a micro-batch in each process")
    accumulation: int = setting(1, "micro-batches of a step")
    learning_rate: float = setting(2e-3, "peak, after the warm-up")
    warmup: float = setting(0.1, "share of the steps over which the rate rises")
    weight_decay: float = setting(0.01, "of matrices")
    bf16: bool = setting(False, "run in bfloat16 where that is safe (autocast)")
    evaluate_every: int = setting(500, "steps between evaluations")
    checkpoint_every: int = setting(500, "steps between checkpoints")
    log_every: int = setting(50, "steps between lines of metrics.jsonl")
    seed: int = setting(0, "of the split, the order, the masks, the start and dropout")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be from 0 to below 1, got {self.warmup}")

    def plan(self) -> "Plan":
        """RoBERTa's optimizer and schedule: Adam with beta2 = 0.98, linear warm-up and decay (appendix B)."""
        return plan_of(self, self.steps, self.learning_rate, betas=(0.9, 0.98), eps=1e-6)


@dataclass(frozen=True, kw_only=True)
class RobertaSettings(Settings):
    """RoBERTa's."""


@dataclass(frozen=True, kw_only=True)
class AlbertSettings(Settings):
    """ALBERT's."""

    embedding_size: int = setting(128, "width of the tables")
    share: str = setting("all", "what the layers have in common: all, attention, ffn or none")
    ngram: int = setting(3, "longest run of words masked together")
