"""One call of a recipe on plain text, before any task: the text, the teacher, and the stages."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from bertops.data import (
    DynamicMasker,
    NextSentencePairs,
    PretrainingStream,
    SentenceBlocks,
    TokenCorpus,
    special_tokens,
)
from bertops.data.examples import Examples
from bertops.distill import classifiers, students
from bertops.distill.data import Batch, inputs
from bertops.distill.losses.distilbert import Decoder
from bertops.distill.losses.terms import IGNORED_LABEL
from bertops.distill.settings import TextSettings, TextStudentSettings
from bertops.distill.stages import Stages
from bertops.models.checkpoint import resolve_folder
from bertops.models.heads import MaskedLM
from bertops.pretraining.batches import Batches, held_out_batches
from bertops.pretraining.text import Text, describe_text, fingerprint, prepare_for, unigram_entropy
from bertops.training import Plan, Stream


class TextWork(Stages):
    """Packs the text into sequences, masks words of them, and runs stages on them; a context manager.

    A share of the documents is held out and measures the student. Sequences are whole lines between the
    tokenizer's special tokens, as :class:`bertops.data.SentenceBlocks` makes them, with a separator after
    every line for a RoBERTa and at the end alone otherwise; or pairs. Text, tokens and split are kept in
    ``out/data``.

    Args:
        text: a file, or a folder of ``*.txt``: one sentence a line, an empty line between documents.
        recipe, model, out, settings, cpu, fsdp, quiet: as :class:`bertops.distill.stages.Stages` takes them.

    Raises:
        FileNotFoundError, ValueError: there is no text, or fewer than two documents; the teacher's tokenizer
            is missing or lacks a special token, or sequences would be longer than its positions.
    """

    settings: TextSettings
    next_sentence = False  # whether sequences are pairs, see bertops.data.NextSentencePairs

    def __init__(
        self,
        recipe: str,
        model: str | Path,
        text: str | os.PathLike[str],
        out: str | Path,
        settings: TextSettings,
        **shown: bool,
    ) -> None:
        super().__init__(recipe, model, out, settings, **shown)
        self.text, self.fingerprint = text, fingerprint(text)
        special_tokens(self.tokenizer)  # raises now and not when the folder is there

    # Models

    def masked_lm(self) -> MaskedLM:
        """The teacher, with its head."""
        return classifiers.load_masked_lm(self.folder)

    def pretrained(self) -> MaskedLM:
        """The same, with a MobileBERT's head for the next sentence where it has one."""
        return classifiers.load_pretrained(self.folder)

    def encoder(self) -> Any:
        """The teacher, without a head."""
        return classifiers.load_bare_encoder(self.folder)

    def student(self, teacher: Any, start: students.LayerMap, build: students.Build | None = None) -> Any:
        """A masked language model where the teacher is one, with its head to start from; else an encoder.

        See :func:`bertops.distill.students.new_student`.

        Raises:
            ValueError: it does not fit the teacher, the text or transformers; says what.
        """
        settings, heads = self.settings, isinstance(teacher, MaskedLM)
        assert isinstance(settings, TextStudentSettings)
        if settings.student:
            classifiers.same_tokens(resolve_folder(settings.student), self.folder)
        read = classifiers.load_masked_lm if heads else classifiers.load_bare_encoder
        build = build or (classifiers.new_masked_lm if heads else classifiers.new_encoder)
        student = students.new_student(
            teacher, settings, build, lambda model: read(resolve_folder(model)), start, heads=heads
        )
        words = student.config.vocab_size, teacher.config.vocab_size
        if words[0] != words[1]:
            raise ValueError(f"the vocabulary of the student has {words[0]} words, the teacher's {words[1]}")
        classifiers.check_length(student.config, settings.max_length)
        student.config.to_hf()  # raises now and not after the training
        return student

    # Data

    @cached_property
    def corpus(self) -> Text:
        """Prepared in the folder of the run, which :meth:`open` has taken."""
        given = self.tokenizer, self.text, self.out / "data", self.fingerprint
        with self.run.accelerator.main_process_first():
            return prepare_for(*given, held_out=self.settings.held_out, seed=self.settings.seed)

    @cached_property
    def masker(self) -> DynamicMasker:
        special, settings = self.corpus.special, self.settings
        return DynamicMasker(
            self.corpus.vocab_size, special.mask_token_id, special, settings.mask_prob, settings.seed
        )

    def examples(self, part: TokenCorpus) -> Examples:
        if self.next_sentence:
            special, settings = self.corpus.special, self.settings
            return NextSentencePairs(part, settings.max_length, special, seed=settings.seed)
        return SentenceBlocks(
            part,
            self.settings.max_length,
            self.corpus.special,
            within_documents=self.settings.packing == "doc",
            separate_lines=classifiers.encoder_config(self.folder).family == "roberta",
        )

    @cached_property
    def held_out_batches(self) -> Sequence[Batch]:
        examples = self.examples(self.corpus.held_out)
        return held_out_batches(examples, self.masker, self.settings.batch_size)

    # Stages

    def plan(self, **stage: Any) -> Plan:
        """Of a stage; see :meth:`Settings.plan`."""
        return self.settings.plan(**stage)

    def source(self) -> dict[str, Any]:
        return {"text": self.fingerprint}

    def stream(self) -> Batches:
        settings = self.settings
        return Batches(
            PretrainingStream(
                self.examples(self.corpus.train),
                self.masker,
                settings.batch_size,
                seed=settings.seed,
                packed=True,
                static=settings.masking == "static",
            )
        )

    def held_out(self) -> Sequence[Batch]:
        return self.held_out_batches

    def baselines(self) -> dict[str, float]:
        return {"mlm": unigram_entropy(self.corpus)}

    def save(self, student: Any, folder: Path) -> None:
        student.save_pretrained(folder)
        classifiers.copy_tokenizer(self.folder, folder)

    def describe(self, stream: Stream) -> tuple[str, str]:
        return Path(self.text).name, f"{describe_text(self.text, self.corpus)}."


def masked_words(model: MaskedLM, batch: Batch) -> tuple[Decoder, Tensor, Tensor]:
    """What goes into the decoder for the M masked words, the words (M,), and all last hidden states."""
    labels = batch["labels"].flatten()
    masked = (labels != IGNORED_LABEL).nonzero().squeeze(1)
    hidden = model.encoder(**inputs(model, batch)).last_hidden_state
    rows = model.head.transform(hidden.flatten(0, 1)[masked])
    return Decoder(rows, model.decoder_weight(), model.head.bias), labels[masked], hidden
