"""The text of a pretraining run: a split into documents to learn from and to measure on, and a tokenizer."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn

from bertops._files import whole_folder
from bertops.data import (
    SpecialTokens,
    TokenCorpus,
    encode_corpus,
    load_corpus,
    read_documents,
    special_tokens,
    train_tokenizer,
)
from bertops.data.text import Kind
from bertops.pretraining.settings import Settings

PathLike = str | os.PathLike[str]
TRAIN, HELD_OUT, TOKENIZER, MADE_OF = "train", "held-out", "tokenizer.json", "made-of.json"


class Text(NamedTuple):
    tokenizer: Tokenizer
    special: SpecialTokens
    train: TokenCorpus
    held_out: TokenCorpus

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()


def fingerprint(text: PathLike) -> dict[str, Any]:
    """Number of documents and a hash of them: what decides whether a run may go on.

    Raises:
        FileNotFoundError: there is no such text.
        ValueError: it has fewer than two documents: one is held out.
    """
    digest, documents = hashlib.sha256(), 0
    for document in read_documents(text):
        documents += 1
        digest.update("\n".join(document).encode() + b"\n\n")
    if documents == 0:
        raise ValueError(f"{text} holds no text")
    if documents == 1:
        raise ValueError(
            f"{text} holds one document, expected two or more with empty lines between: one is held out"
        )
    return {"documents": documents, "sha256": digest.hexdigest()}


def prepare(text: PathLike, folder: Path, source: dict[str, Any], kind: Kind, settings: Settings) -> Text:
    """Splits, trains the tokenizer on the training documents and encodes both parts, once: into ``folder``.

    Args:
        text: as :func:`bertops.data.read_documents` takes it.
        folder: written whole, or of an earlier call.
        source: what :func:`fingerprint` says of ``text``.
        kind: of the tokenizer.
        settings: size of the vocabulary, share of the documents to hold out (at least one), and the seed that
            decides which.

    Raises:
        ValueError: ``folder`` was made from another text or with other settings; says which.
    """
    made_of = {
        "text": source["sha256"],
        "tokenizer": kind,
        **{name: getattr(settings, name) for name in ("vocab_size", "held_out", "seed")},
    }

    def trained(train: Path) -> Tokenizer:
        return train_tokenizer(train, settings.vocab_size, kind)

    return _prepare(text, folder, source["documents"], made_of, trained)


def prepare_for(
    tokenizer: Tokenizer,
    text: PathLike,
    folder: Path,
    source: dict[str, Any],
    *,
    held_out: float,
    seed: int,
) -> Text:
    """The same with a tokenizer that exists, such as a teacher's."""
    digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    made_of = {"text": source["sha256"], "tokenizer": digest, "held_out": held_out, "seed": seed}
    return _prepare(text, folder, source["documents"], made_of, lambda train: tokenizer)


def _prepare(
    text: PathLike,
    folder: Path,
    documents: int,
    made_of: dict[str, Any],
    tokenizer_of: Callable[[Path], Tokenizer],
) -> Text:
    """``tokenizer_of`` makes a tokenizer of the file of the training documents."""
    if not folder.exists():
        count = min(documents - 1, max(1, round(made_of["held_out"] * documents)))
        held_out = set(np.random.default_rng(made_of["seed"]).permutation(documents)[:count].tolist())
        with whole_folder(folder) as temporary:
            for part, chosen in ((TRAIN, False), (HELD_OUT, True)):
                with (temporary / f"{part}.txt").open("w", encoding="utf-8") as file:
                    for number, document in enumerate(read_documents(text)):
                        if (number in held_out) == chosen:
                            file.write("\n".join(document) + "\n\n")
            tokenizer = tokenizer_of(temporary / f"{TRAIN}.txt")
            tokenizer.save(str(temporary / TOKENIZER))
            (temporary / MADE_OF).write_text(json.dumps(made_of, indent=1) + "\n")
            for part in (TRAIN, HELD_OUT):
                encode_corpus(tokenizer, read_documents(temporary / f"{part}.txt"), cache=temporary / part)
    found = json.loads((folder / MADE_OF).read_text(encoding="utf-8"))
    if found != made_of:
        differing = "; ".join(
            f"{k} {found.get(k)!r} there, {v!r} here" for k, v in made_of.items() if found.get(k) != v
        )
        raise ValueError(f"{folder} was made of other data: {differing}")
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    return Text(
        tokenizer, special_tokens(tokenizer), load_corpus(folder / TRAIN), load_corpus(folder / HELD_OUT)
    )


def unigram_entropy(corpus: Text) -> float:
    """Mean of -ln p over the held-out tokens, in nats, p their frequency in the training text plus one.

    What a model reaches that knows how frequent tokens are and nothing of their neighbours.
    """
    counts = np.bincount(corpus.train.tokens, minlength=corpus.vocab_size) + 1.0
    return float(math.log(counts.sum()) - np.log(counts[corpus.held_out.tokens]).mean())


def save_tokenizer(corpus: Text, folder: Path, single: str, pair: str) -> None:
    """For transformers, with the special tokens around one text and around two.

    Args:
        single, pair: as :class:`tokenizers.processors.TemplateProcessing` takes them.
    """
    tokenizer, special = Tokenizer.from_str(corpus.tokenizer.to_str()), corpus.special
    names = {field: tokenizer.id_to_token(getattr(special, field)) for field in special._fields}
    ends = [(names[field], getattr(special, field)) for field in ("cls_token_id", "sep_token_id")]
    tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    tokenizer.save(str(folder / TOKENIZER))
    tokens = {field.removesuffix("_id"): token for field, token in names.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def describe(text: PathLike, corpus: Text, settings: Settings, model: nn.Module, entropy: float) -> str:
    """For the model card."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{parameters:,} parameters, {settings.steps:,} steps with {settings.masking} masking on "
        f"{describe_text(text, corpus)}. A model that knows only how "
        f"frequent tokens are has a held-out loss of {entropy:.3f} nats, the unigram entropy."
    )


def describe_text(text: PathLike, corpus: Text) -> str:
    train, held_out = corpus.train, corpus.held_out
    return (
        f"`{Path(text).name}`: {train.num_documents:,} documents of {train.num_tokens:,} tokens, beside "
        f"{held_out.num_documents:,} held out of {held_out.num_tokens:,}"
    )
