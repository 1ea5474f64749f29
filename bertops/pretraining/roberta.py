"""RoBERTa's pretraining (Liu et al. 2019): a masked language model on full sentences, and nothing else."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from bertops.data import DynamicMasker, PretrainingStream, SentenceBlocks
from bertops.models import BertConfig, BertForMaskedLM
from bertops.pretraining.batches import Batches, held_out_batches
from bertops.pretraining.masked_lm import count_masked, masked_lm_sums
from bertops.pretraining.settings import RobertaSettings
from bertops.pretraining.text import (
    PathLike,
    describe,
    fingerprint,
    prepare,
    save_tokenizer,
    unigram_entropy,
)
from bertops.training import Objective, Outcome, Run, measure, train

SINGLE, PAIR = ("<s>", "$A", "</s>"), ("<s>", "$A", "</s>", "</s>", "$B", "</s>")


class MaskedLanguageModeling(Objective):
    """Minimises the mean of -ln p over the masked tokens."""

    def __init__(self, model: BertForMaskedLM) -> None:
        super().__init__()
        self.model, self.weights = model, {"mlm": 1.0}

    def counts(self, batch: dict[str, Tensor]) -> dict[str, int]:
        masked = count_masked(batch["labels"])
        return {"mlm": masked, "mlm_accuracy": masked, "tokens": batch["input_ids"].numel()}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        encoded = self.model.encoder(batch["input_ids"], cu_seqlens=batch["cu_seqlens"])
        return masked_lm_sums(self.model, encoded.last_hidden_state, batch["labels"])


def pretrain_roberta(
    text: PathLike,
    out: str | Path,
    settings: RobertaSettings,
    *,
    cpu: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Trains a RoBERTa from scratch on ``text``, or goes on with the run in ``out``.

    Byte-level BPE; blocks of full sentences that may span documents (section 4.2); masks drawn anew in every
    epoch, or with ``masking="static"`` once (section 4.1); no next-sentence prediction; Adam with
    beta2 = 0.98 and a linear schedule. A share of the documents is held out and measured.

    Args:
        text: a file, or a folder of ``*.txt``: one sentence a line, an empty line between documents.
        out: the run's folder, see :func:`bertops.training.train`; its ``data/`` has the split, the tokenizer
            and the token ids.
        settings: see :class:`RobertaSettings`.
        cpu, quiet: as in :class:`bertops.training.Run` and :func:`bertops.training.train`.

    Raises:
        FileNotFoundError, ValueError: there is no text, or fewer than two documents.
        FileExistsError, BlockingIOError, ValueError: ``out`` is another run's, or in use.
    """
    source = fingerprint(text)
    config = {"recipe": "roberta", "text": source, **asdict(settings)}
    with Run(out, settings.plan(), config, cpu=cpu) as run:
        with run.accelerator.main_process_first():
            corpus = prepare(text, run.folder.path / "data", source, "bpe", settings)
        tokens = corpus.tokenizer.get_vocab_size()
        entropy = unigram_entropy(corpus.train, corpus.held_out, tokens)

        masker = DynamicMasker(
            tokens, corpus.special.mask_token_id, corpus.special, settings.mask_prob, settings.seed
        )
        blocks, held_out_blocks = (
            SentenceBlocks(part, settings.length, corpus.special) for part in (corpus.train, corpus.held_out)
        )
        stream = PretrainingStream(
            blocks,
            masker,
            settings.batch_size,
            seed=settings.seed,
            packed=True,
            static=settings.masking == "static",
        )
        held_out = held_out_batches(held_out_blocks, masker, settings.batch_size)

        torch.manual_seed(settings.seed)
        model = BertForMaskedLM(roberta_config(settings, tokens, corpus.special.pad_token_id))

        def save(folder: Path) -> None:
            model.save_pretrained(folder)
            save_tokenizer(corpus, folder, SINGLE, PAIR)

        return train(
            run,
            MaskedLanguageModeling(model),
            Batches(stream),
            evaluate=lambda accelerator, module: measure(accelerator, module, held_out),
            save_model=save,
            baselines={"mlm": entropy},
            card=("RoBERTa, pretrained from scratch", describe(text, corpus, settings, model, entropy)),
            quiet=quiet,
        )


def roberta_config(settings: RobertaSettings, vocab_size: int, pad: int) -> BertConfig:
    return BertConfig(
        family="roberta",
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.intermediate_size,
        layer_norm_eps=1e-5,
        max_position_embeddings=settings.length + pad + 1,  # positions start behind the padding's id
        type_vocab_size=1,
        pad_token_id=pad,
        position_offset=pad + 1,
        hidden_dropout_p=settings.dropout,
        attention_dropout_p=settings.dropout,
        attention_output_dropout_p=settings.dropout,
        pooler=False,
    )
