"""Reads labelled text: a header, then a line for every text, no quoting."""

import os
from pathlib import Path
from typing import NamedTuple

HEADER = "text\tlabel"


class LabelledTexts(NamedTuple):
    """Texts and their labels, in the order of the file."""

    texts: list[str]
    labels: list[int]


def read_tsv(path: str | os.PathLike[str]) -> LabelledTexts:
    """Reads a UTF-8 file of the header ``text<TAB>label`` and one text with its label a line.

    Nothing is quoted or escaped: quotation marks and backslashes are text. Lines end in LF or CRLF, the last
    one with or without it. Other characters that Unicode counts as line ends stay in the text.

    Args:
        path: the file; its labels are integers from 0 on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, has another header, or a line is not a text, a tab and a label; names the
            file, the line, counted from 1, and what stands there.
    """
    path = Path(path)
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    header, *rows = content.removeprefix("\ufeff").removesuffix("\n").split("\n")
    if header.removesuffix("\r") != HEADER:
        raise ValueError(f"{path} must begin with the header {HEADER!r}, got {header[:80]!r}")
    found = LabelledTexts([], [])
    for number, row in enumerate(rows, start=2):
        cells = row.removesuffix("\r").split("\t")
        if len(cells) != 2:
            raise ValueError(f"{path}, line {number}: expected a text, a tab and a label, got {row[:80]!r}")
        text, label = cells
        if not (label.isascii() and label.isdigit()):
            raise ValueError(f"{path}, line {number}: the label must be an integer from 0 on, got {label!r}")
        found.texts.append(text)
        found.labels.append(int(label))
    return found
