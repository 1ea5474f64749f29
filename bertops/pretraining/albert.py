"""ALBERT's pretraining (Lan et al. 2020): n-gram masked language model and sentence order."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bertops.data import DynamicMasker, PretrainingStream, SentenceOrderPairs, word_starts
from bertops.models import AlbertConfig, AlbertForPreTraining
from bertops.models.rows import first_tokens
from bertops.pretraining.batches import Batches, held_out_batches
from bertops.pretraining.masked_lm import count_masked, masked_lm_sums
from bertops.pretraining.settings import AlbertSettings
from bertops.pretraining.text import (
    PathLike,
    describe,
    fingerprint,
    prepare,
    save_tokenizer,
    unigram_entropy,
)
from bertops.training import Objective, Outcome, Run, measure, train

SINGLE, PAIR = ("[CLS]", "$A", "[SEP]"), ("[CLS]", "$A", "[SEP]", "$B:1", "[SEP]:1")
MAX_PREDICTIONS = 20  # masked tokens of a sequence, as in the official code


class MaskedLanguageModelingAndSentenceOrder(Objective):
    """Minimises the mean of -ln p over the masked tokens plus that over the pairs' orders."""

    def __init__(self, model: AlbertForPreTraining) -> None:
        super().__init__()
        self.model, self.weights = model, {"mlm": 1.0, "sop": 1.0}

    def counts(self, batch: dict[str, Tensor]) -> dict[str, int]:
        masked, pairs = count_masked(batch["labels"]), len(batch["sentence_order_label"])
        return {
            "mlm": masked,
            "mlm_accuracy": masked,
            "sop": pairs,
            "sop_accuracy": pairs,
            "tokens": batch["input_ids"].numel(),
        }

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        model, cu_seqlens, swapped = self.model, batch["cu_seqlens"], batch["sentence_order_label"]
        encoded = model.encoder(
            batch["input_ids"], token_type_ids=batch["token_type_ids"], cu_seqlens=cu_seqlens
        )
        hidden = encoded.last_hidden_state
        pooled = torch.tanh(model.dense(first_tokens(hidden, cu_seqlens=cu_seqlens)))
        order = model.sentence_order(model.dropout(pooled)).float()
        return {
            **masked_lm_sums(model, hidden, batch["labels"]),
            "sop": F.cross_entropy(order, swapped, reduction="sum"),
            "sop_accuracy": (order.detach().argmax(1) == swapped).sum(),
        }


def pretrain_albert(
    text: PathLike,
    out: str | Path,
    settings: AlbertSettings,
    *,
    cpu: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Trains an ALBERT from scratch on ``text``, or goes on with the run in ``out``.

    Unigram tokenizer, lower case; pairs of consecutive segments of a document, half of them swapped (sentence
    order, section 3.1); n-grams of whole words masked with p(n) proportional to 1/n (section 4.1); tables of
    ``embedding_size`` and shared layers. The official code trains with LAMB on 4,096 sequences a step; this
    recipe's small batches use AdamW. A share of the documents is held out and measured.

    Args, Raises: as :func:`bertops.pretraining.roberta.pretrain_roberta`, with :class:`AlbertSettings`.
    """
    source = fingerprint(text)
    config = {"recipe": "albert", "text": source, **asdict(settings)}
    with Run(out, settings.plan(), config, cpu=cpu) as run:
        with run.accelerator.main_process_first():
            corpus = prepare(text, run.folder.path / "data", source, "unigram", settings)
        tokens = corpus.tokenizer.get_vocab_size()
        entropy = unigram_entropy(corpus.train, corpus.held_out, tokens)

        masker = DynamicMasker(
            tokens,
            corpus.special.mask_token_id,
            corpus.special,
            settings.mask_prob,
            settings.seed,
            ngram=settings.ngram,
            word_starts=word_starts(corpus.tokenizer),
            max_predictions=MAX_PREDICTIONS,
        )
        pairs, held_out_pairs = (
            SentenceOrderPairs(part, settings.length, corpus.special, seed=settings.seed)
            for part in (corpus.train, corpus.held_out)
        )
        stream = PretrainingStream(
            pairs,
            masker,
            settings.batch_size,
            seed=settings.seed,
            packed=True,
            static=settings.masking == "static",
        )
        held_out = held_out_batches(held_out_pairs, masker, settings.batch_size)

        torch.manual_seed(settings.seed)
        model = AlbertForPreTraining(albert_config(settings, tokens, corpus.special.pad_token_id))

        def save(folder: Path) -> None:
            model.save_pretrained(folder)
            save_tokenizer(corpus, folder, SINGLE, PAIR)

        return train(
            run,
            MaskedLanguageModelingAndSentenceOrder(model),
            Batches(stream),
            evaluate=lambda accelerator, module: measure(accelerator, module, held_out),
            save_model=save,
            baselines={"mlm": entropy, "sop_accuracy": 0.5},
            card=("ALBERT, pretrained from scratch", describe(text, corpus, settings, model, entropy)),
            quiet=quiet,
        )


def albert_config(settings: AlbertSettings, vocab_size: int, pad: int) -> AlbertConfig:
    return AlbertConfig(
        vocab_size=vocab_size,
        embedding_size=settings.embedding_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=settings.length,
        pad_token_id=pad,
        share=settings.share,
        hidden_dropout_p=settings.dropout,
        attention_dropout_p=settings.dropout,
        attention_output_dropout_p=settings.dropout,
        pooler=False,
    )
