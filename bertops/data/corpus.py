"""A tokenized corpus: one array of ids with the offsets of its lines and documents, and its cache on disk."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bertops._files import whole_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 1
LINES_AT_ONCE = 4096
META = "corpus.json"
ARRAYS = {"tokens": np.int32, "line_offsets": np.int64, "document_offsets": np.int64}


@dataclass(frozen=True)
class TokenCorpus:
    """Documents of lines (sentences) of token ids, without special tokens.

    Line l is ``tokens[line_offsets[l]:line_offsets[l + 1]]`` and document d is lines
    ``document_offsets[d]`` to ``document_offsets[d + 1]``, the end left out. No line and no document is
    empty, nor is the corpus.

    Raises:
        ValueError: no tokens, or offsets that do not start at 0, do not rise, or do not end at the number of
            what they cut.
        TypeError: an array of another dtype.
    """

    tokens: NDArray[np.int32]  # (T,), an array or a memory map
    line_offsets: NDArray[np.int64]  # (number of lines + 1,), into tokens
    document_offsets: NDArray[np.int64]  # (number of documents + 1,), into lines

    def __post_init__(self) -> None:
        for name, dtype in ARRAYS.items():
            array = getattr(self, name)
            if array.ndim != 1:
                raise ValueError(f"{name} must be 1-D, got shape {array.shape}")
            if array.dtype != dtype:
                raise TypeError(f"{name} must be {np.dtype(dtype)}, got {array.dtype}")
        if not len(self.tokens):
            raise ValueError("tokens must hold at least one token, got none: there is no text in the corpus")
        _check_offsets("line_offsets", self.line_offsets, "tokens", len(self.tokens))
        _check_offsets("document_offsets", self.document_offsets, "lines", len(self.line_offsets) - 1)

    @property
    def num_documents(self) -> int:
        return len(self.document_offsets) - 1

    @property
    def num_lines(self) -> int:
        return len(self.line_offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


def encode_corpus(
    tokenizer: "Tokenizer",
    documents: Iterable[Iterable[str]],
    cache: str | os.PathLike[str] | None = None,
) -> TokenCorpus:
    """Tokenizes documents, a few thousand lines at a time: their text is never in memory as a whole.

    No special tokens are added, and truncation or padding that the tokenizer has set does not apply. Lines
    and documents without tokens are left out.

    With ``cache`` the arrays are written to that folder, whole or not at all, and come back as memory maps. A
    folder that is there already is read instead, after a comparison of hashes: for it the text is read once
    more, but not tokenized.

    Args:
        tokenizer: a ``tokenizers.Tokenizer`` (``backend_tokenizer`` of a fast tokenizer of ``transformers``).
        documents: documents of lines, as ``read_documents`` yields them; read once.
        cache: a folder, to be written or of an earlier call.

    Raises:
        ValueError: no line has a token; or ``cache`` is of another text or tokenizer, or holds no corpus.
    """
    digest = _Digest(tokenizer)
    if cache is None:
        chunks: list[NDArray[np.int32]] = []
        offsets = _encode(tokenizer, digest.reading(documents), chunks.append)
        return TokenCorpus(np.concatenate([np.empty(0, np.int32), *chunks]), *offsets)
    folder = Path(cache)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as temporary:
            _write(temporary, tokenizer, digest, documents)
        return load_corpus(folder)
    cached = _read_digest(folder)
    for document in digest.reading(documents):
        for _ in document:
            pass
    if cached != digest.value():
        raise ValueError(
            f"cache {folder} was made from another text or with another tokenizer: delete the folder, "
            "or name another"
        )
    return load_corpus(folder)


def load_corpus(cache: str | os.PathLike[str]) -> TokenCorpus:
    """Memory-maps what ``encode_corpus`` wrote to ``cache``, without a look at text or tokenizer.

    Raises:
        ValueError: the folder holds no corpus, or one of another format.
    """
    folder = Path(cache)
    _read_digest(folder)
    return TokenCorpus(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS))


class _Digest:
    """A hash of a tokenizer and of the text that was read through it."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.hash = hashlib.blake2b(_plain(tokenizer).to_str().encode(), digest_size=20)

    def reading(self, documents: Iterable[Iterable[str]]) -> Iterable[Iterable[str]]:
        for document in documents:
            yield self.lines(document)
            self.hash.update(b"d")

    def lines(self, document: Iterable[str]) -> Iterable[str]:
        for line in document:
            data = line.encode()
            self.hash.update(b"l%d:" % len(data))  # no two texts look alike
            self.hash.update(data)
            yield line

    def value(self) -> str:
        return self.hash.hexdigest()


def _plain(tokenizer: "Tokenizer") -> "Tokenizer":
    """A copy that neither cuts nor pads."""
    plain = type(tokenizer).from_str(tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain


def _encode(
    tokenizer: "Tokenizer",
    documents: Iterable[Iterable[str]],
    write: Callable[[NDArray[np.int32]], Any],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Line and document offsets; the ids go to ``write`` in order."""
    plain = _plain(tokenizer)
    lengths, owners = [np.empty(0, np.int64)], [np.empty(0, np.int64)]  # of every line; owner: its document
    waiting: list[str] = []
    waiting_for: list[int] = []

    def flush() -> None:
        ids = [encoding.ids for encoding in plain.encode_batch(waiting, add_special_tokens=False)]
        counts = np.array([len(line) for line in ids], np.int64)
        write(np.fromiter(chain.from_iterable(ids), np.int32, int(counts.sum())))
        lengths.append(counts[counts > 0])
        owners.append(np.array(waiting_for, np.int64)[counts > 0])
        waiting.clear()
        waiting_for.clear()

    for number, document in enumerate(documents):
        for line in document:
            waiting.append(line)
            waiting_for.append(number)
            if len(waiting) == LINES_AT_ONCE:
                flush()
    if waiting:
        flush()
    _, lines = np.unique(np.concatenate(owners), return_counts=True)
    return _offsets(np.concatenate(lengths)), _offsets(lines)


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _write(folder: Path, tokenizer: "Tokenizer", digest: _Digest, documents: Iterable[Iterable[str]]) -> None:
    with open(folder / "tokens.raw", "wb") as raw:
        offsets = _encode(tokenizer, digest.reading(documents), lambda ids: raw.write(ids.tobytes()))
    size = (folder / "tokens.raw").stat().st_size // np.dtype(np.int32).itemsize
    ids = np.memmap(folder / "tokens.raw", np.int32, "r") if size else np.empty(0, np.int32)
    for name, array in zip(ARRAYS, (ids, *offsets), strict=True):
        np.save(folder / f"{name}.npy", array)
    (folder / "tokens.raw").unlink()
    TokenCorpus(ids, *offsets)  # refuses what must not be cached
    (folder / META).write_text(json.dumps({"format": FORMAT, "digest": digest.value()}))


def _read_digest(folder: Path) -> str:
    try:
        meta = json.loads((folder / META).read_text())
        if meta["format"] == FORMAT:
            return meta["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"cache {folder} holds no corpus of format {FORMAT} (its {META} is missing or another)")


def _check_offsets(name: str, offsets: NDArray[np.int64], of: str, count: int) -> None:
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != count:
        ends = offsets[[0, -1]].tolist() if len(offsets) else []
        raise ValueError(f"{name} must go from 0 to the {count} {of}, got ends {ends}")
    flat = np.flatnonzero(np.diff(offsets) <= 0)
    if len(flat):
        raise ValueError(
            f"{name} must rise from entry to entry, got {offsets[flat[0] : flat[0] + 2].tolist()}"
        )
