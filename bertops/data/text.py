"""From text files to documents, tokenizers and the special tokens and words of a vocabulary."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Kind = Literal["wordpiece", "bpe", "unigram"]
PathLike = str | os.PathLike[str]

BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
ALBERT_TOKENS = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
SPECIAL_TOKENS: dict[Kind, tuple[str, ...]] = {
    "wordpiece": BERT_TOKENS,
    "bpe": ROBERTA_TOKENS,
    "unigram": ALBERT_TOKENS,
}


class SpecialTokens(NamedTuple):
    """Ids of the special tokens of BERT, RoBERTa or ALBERT in a vocabulary."""

    cls_token_id: int  # [CLS] or <s>
    sep_token_id: int  # [SEP] or </s>
    pad_token_id: int
    mask_token_id: int
    unk_token_id: int


def read_documents(paths: PathLike | Sequence[PathLike]) -> Iterator[list[str]]:
    """Reads UTF-8 text: one sentence a line, an empty line between documents.

    A text without empty lines is one document. Documents end with their file; lines lose the white space
    around them, and a byte order mark at the start of a file is dropped. Files are read line by line.

    Args:
        paths: a file, or a folder whose ``*.txt`` are read in order of their paths, subfolders included; or
            several of them.

    Yields:
        Every document's lines, none of them empty.

    Raises:
        FileNotFoundError: there is no such file, or no ``*.txt`` in a folder.
        ValueError: a file is not UTF-8; names the file and the line, counted from 1.
    """
    for path in text_files(paths):
        document: list[str] = []
        for line in _lines(path):
            if line:
                document.append(line)
            elif document:
                yield document
                document = []
        if document:
            yield document


def text_files(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """The files that ``read_documents`` reads, in order."""
    files = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        path = Path(path)
        if path.is_dir():
            found = sorted(path.rglob("*.txt"))
            if not found:
                raise FileNotFoundError(f"{path} holds no *.txt")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist")
    return files


def _lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, data in enumerate(file, start=1):
            try:
                line = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8: {error.reason} at byte {error.start} of the line"
                ) from None
            yield (line.removeprefix("\ufeff") if number == 1 else line).strip()


def train_tokenizer(
    paths: PathLike | Sequence[PathLike],
    vocab_size: int,
    kind: Kind = "wordpiece",
    *,
    special_tokens: Sequence[str] | None = None,
    lowercase: bool | None = None,
    min_frequency: int = 2,
) -> "Tokenizer":
    """Trains a tokenizer on the lines of text files.

    ``wordpiece`` is BERT's: lower case, accents stripped, words and punctuation apart, ``##`` continues a
    word.
    ``bpe`` is RoBERTa's: byte-level, ``Ġ`` before a word, also before the first of a line; case is kept.
    ``unigram`` is ALBERT's: SentencePiece's unigram model, lower case, ``▁`` before a word.
    Text is encoded without special tokens: ``SentenceBlocks`` and ``SentenceOrderPairs`` add them.
    Train once and keep the result (``save``, ``Tokenizer.from_file``): the library may choose and number the
    pieces of wordpiece and unigram differently in another process.

    Args:
        paths: as ``read_documents`` takes them.
        vocab_size: with the special tokens; a small text may give fewer.
        kind: the model.
        special_tokens: default those of BERT, RoBERTa or ALBERT, whose ids are then 0, 1, ... in this order.
        lowercase: default by ``kind``.
        min_frequency: of a pair to merge (wordpiece, bpe).

    Raises:
        ImportError: the package ``tokenizers`` is missing.
        ValueError: another ``kind``, or a file as in ``read_documents``.
    """
    if kind not in SPECIAL_TOKENS:
        raise ValueError(f"kind must be one of {', '.join(SPECIAL_TOKENS)}, got {kind!r}")
    tk = _tokenizers()
    specials = list(SPECIAL_TOKENS[kind] if special_tokens is None else special_tokens)
    unknown = next((token for token in ("[UNK]", "<unk>") if token in specials), None)
    lowercase = kind != "bpe" if lowercase is None else lowercase
    common = {"vocab_size": vocab_size, "special_tokens": specials, "show_progress": False}
    if kind == "wordpiece":
        tokenizer = tk.Tokenizer(tk.models.WordPiece(unk_token=unknown))
        tokenizer.normalizer = tk.normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = tk.decoders.WordPiece()
        trainer = tk.trainers.WordPieceTrainer(min_frequency=min_frequency, **common)
    elif kind == "bpe":
        tokenizer = tk.Tokenizer(tk.models.BPE(unk_token=unknown))
        tokenizer.normalizer = tk.normalizers.Lowercase() if lowercase else None
        tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = tk.decoders.ByteLevel()
        alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
        trainer = tk.trainers.BpeTrainer(min_frequency=min_frequency, initial_alphabet=alphabet, **common)
    else:
        tokenizer = tk.Tokenizer(tk.models.Unigram())
        steps = [tk.normalizers.NFKC(), *([tk.normalizers.Lowercase()] if lowercase else [])]
        tokenizer.normalizer = tk.normalizers.Sequence(steps)
        tokenizer.pre_tokenizer = tk.pre_tokenizers.Metaspace()
        tokenizer.decoder = tk.decoders.Metaspace()
        trainer = tk.trainers.UnigramTrainer(unk_token=unknown, **common)
    tokenizer.train_from_iterator(_all_lines(paths), trainer)
    return tokenizer


def _all_lines(paths: PathLike | Sequence[PathLike]) -> Iterator[str]:
    for document in read_documents(paths):
        yield from document


def special_tokens(tokenizer: "Tokenizer") -> SpecialTokens:
    """Finds the special tokens of BERT, RoBERTa or ALBERT in a vocabulary.

    Raises:
        ValueError: one of them is missing; names what was looked for.
    """
    return SpecialTokens(
        *(
            _id_of(tokenizer, name, spellings)
            for name, spellings in (
                ("classifier", ("[CLS]", "<s>")),
                ("separator", ("[SEP]", "</s>")),
                ("padding", ("[PAD]", "<pad>")),
                ("mask", ("[MASK]", "<mask>")),
                ("unknown", ("[UNK]", "<unk>")),
            )
        )
    )


def _id_of(tokenizer: "Tokenizer", name: str, spellings: Iterable[str]) -> int:
    for spelling in spellings:
        token_id = tokenizer.token_to_id(spelling)
        if token_id is not None:
            return token_id
    raise ValueError(f"tokenizer has no {name} token: none of {', '.join(spellings)} is in its vocabulary")


def word_starts(tokenizer: "Tokenizer") -> NDArray[np.bool_]:
    """Which tokens of a vocabulary start a word: (vocab_size,), for whole-word and n-gram masking.

    WordPiece: what does not carry the prefix of a continuation (``##``). Byte-level BPE: what starts with
    ``Ġ``, a space. Other models: what starts with SentencePiece's ``▁``. Added tokens, special ones among
    them, start a word. In the latter two, punctuation without a space before it belongs to the word before,
    as in fairseq; ALBERT's own code lets it start a word.

    Raises:
        ValueError: no token of the vocabulary starts a word, or all do: the tokenizer marks no words.
    """
    model = tokenizer.model
    prefix: Any = getattr(model, "continuing_subword_prefix", None)
    tokens = tokenizer.get_vocab(with_added_tokens=True)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    starts = np.ones(max(tokens.values()) + 1, bool)
    if type(model).__name__ != "WordPiece":
        prefix = None
    for token, token_id in tokens.items():
        if token not in added:
            starts[token_id] = not token.startswith(prefix) if prefix else token.startswith(("Ġ", "▁"))
    plain = [token_id for token, token_id in tokens.items() if token not in added]
    if not starts[plain].any() or starts[plain].all():
        raise ValueError("tokenizer marks no words: neither '##' nor 'Ġ' nor '▁' tells its tokens apart")
    return starts


def _tokenizers() -> Any:
    try:
        import tokenizers
        from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"training a tokenizer needs the package tokenizers ({error}): pip install tokenizers"
        ) from error
    return tokenizers
