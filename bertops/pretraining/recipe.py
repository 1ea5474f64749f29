"""What a pretraining recipe consists of, and how one is run."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch

from bertops.data import DynamicMasker, PretrainingStream, TokenCorpus
from bertops.data.examples import Examples
from bertops.data.text import Kind
from bertops.models.heads import MaskedLM
from bertops.pretraining.batches import Batches, held_out_batches
from bertops.pretraining.settings import Settings
from bertops.pretraining.text import Text, describe, fingerprint, prepare, save_tokenizer, unigram_entropy
from bertops.training import Objective, Outcome, Run, measure, train

Chosen = TypeVar("Chosen", bound=Settings)


class Recipe(Generic[Chosen]):
    """The choices of one paper: :mod:`bertops.pretraining.roberta` and :mod:`bertops.pretraining.albert`."""

    title: ClassVar[str]
    tokenizer: ClassVar[Kind]
    templates: ClassVar[tuple[str, str]]  # special tokens around one text and around two
    baselines: ClassVar[dict[str, float]] = {}  # of metrics other than ``mlm``

    def __init__(self, settings: Chosen) -> None:
        self.settings = settings

    def masker(self, corpus: Text) -> DynamicMasker:
        raise NotImplementedError

    def examples(self, corpus: Text, part: TokenCorpus) -> Examples:
        """Sequences of ``corpus.train`` or ``corpus.held_out``."""
        raise NotImplementedError

    def model(self, corpus: Text) -> MaskedLM:
        raise NotImplementedError

    def objective(self, model: MaskedLM) -> Objective:
        raise NotImplementedError


def pretrain(
    recipe: Recipe,
    text: str | os.PathLike[str],
    out: str | Path,
    *,
    data: str | Path | None = None,
    cpu: bool = False,
    fsdp: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Trains a model from scratch on ``text``, or goes on with the run in ``out``.

    A share of the documents is held out. The tokenizer is trained on the others, and so is the model, which
    is measured on what was held out, beside the unigram entropy.

    Args:
        recipe: with its settings.
        text: a file, or a folder of ``*.txt``: one sentence a line, an empty line between documents.
        out: the run's folder, see :func:`bertops.training.train`.
        data: folder of the split, the tokenizer and the token ids, ``out/data`` by default; runs of the same
            recipe may share one.
        cpu, fsdp, quiet: as in :class:`bertops.training.Run` and :func:`bertops.training.train`.

    Raises:
        FileNotFoundError, ValueError: there is no text, or fewer than two documents.
        FileExistsError, BlockingIOError, ValueError: ``out`` or ``data`` is another run's, or in use.
    """
    settings, source = recipe.settings, fingerprint(text)
    config = {"recipe": recipe.title, "text": source, **asdict(settings)}
    with Run(out, settings.plan(), config, cpu=cpu, fsdp=fsdp) as run:
        with run.accelerator.main_process_first():
            corpus = prepare(text, Path(data or run.folder.path / "data"), source, recipe.tokenizer, settings)
        masker = recipe.masker(corpus)
        stream = PretrainingStream(
            recipe.examples(corpus, corpus.train),
            masker,
            settings.batch_size,
            seed=settings.seed,
            packed=True,
            static=settings.masking == "static",
        )
        held_out = held_out_batches(recipe.examples(corpus, corpus.held_out), masker, settings.batch_size)
        torch.manual_seed(settings.seed)
        model = recipe.model(corpus)
        entropy = unigram_entropy(corpus)

        def save(folder: Path) -> None:
            model.save_pretrained(folder)
            save_tokenizer(corpus, folder, *recipe.templates)

        return train(
            run,
            recipe.objective(model),
            Batches(stream),
            evaluate=lambda accelerator, module: measure(accelerator, module, held_out),
            save_model=save,
            baselines={"mlm": entropy, **recipe.baselines},
            card=(recipe.title, describe(text, corpus, settings, model, entropy)),
            quiet=quiet,
        )
