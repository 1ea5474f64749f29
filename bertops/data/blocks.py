"""RoBERTa's input: whole sentences packed into blocks."""

from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bertops.data._host import MAX_TOKENS, check_range, host
from bertops.data.corpus import TokenCorpus
from bertops.data.examples import Sequences, checked_indices
from bertops.data.text import SpecialTokens

LEAST_LENGTH = 4  # <s>, a token and its </s>, and one more to make a block


class SentenceBlocks:
    """FULL-SENTENCES, or with ``within_documents`` DOC-SENTENCES: blocks of as many whole lines as fit.

    A block is ``<s>``, its lines, each followed by ``</s>``, and one more ``</s>`` where a document ends
    inside it. With ``separate_lines=False`` only one ``</s>`` stands at the end of the block, and one
    between documents. Lines are appended until the next would make the block longer than ``length``;
    DOC-SENTENCES ends the block with the document too, so that blocks may be much shorter (pack the
    batches). A line that is too long even for a block of its own starts one and is cut where blocks are
    full (the official code lets it exceed the length). Every token of the corpus stands in exactly one
    block. Blocks do not depend on the epoch.

    Sources: Liu et al. 2019 (RoBERTa), section 4.2, and fairseq's ``complete`` and ``complete_doc`` modes.

    Args:
        corpus: the lines.
        length: most tokens of a block, special ones included; 4 or more.
        special: ids of ``<s>`` or ``[CLS]``, of ``</s>`` or ``[SEP]``, and of the padding.
        within_documents: no block holds lines of two documents.
        separate_lines: ``</s>`` after every line.

    Raises:
        ValueError: ``length`` is out of range.
        ImportError: the compiled module is missing; says how to build it.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        length: int,
        special: SpecialTokens,
        *,
        within_documents: bool = False,
        separate_lines: bool = True,
    ) -> None:
        self.corpus, self.special = corpus, special
        self.length = check_range("length", length, LEAST_LENGTH, MAX_TOKENS)
        self.within_documents, self.separate_lines = within_documents, separate_lines

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(number of blocks + 1,): block b holds ``corpus.tokens[offsets[b]:offsets[b + 1]]``."""
        return host().block_offsets(
            self.corpus.line_offsets,
            self.corpus.document_offsets,
            length=self.length,
            separate_lines=self.separate_lines,
            within_documents=self.within_documents,
        )

    def count(self, epoch: int = 0) -> int:
        """How many blocks there are, in any epoch."""
        return len(self.offsets) - 1

    def gather(self, indices: ArrayLike, epoch: int = 0, *, packed: bool = False) -> Sequences:
        """The blocks of these numbers, padded to ``length``, or end to end.

        Raises:
            ValueError: more tokens than int32 offsets count.
            IndexError: a number outside [0, count).
        """
        index = checked_indices(indices, self.count(), self.length)
        ids, cu_seqlens = host().gather_blocks(
            self.corpus.tokens,
            self.corpus.line_offsets,
            self.corpus.document_offsets,
            self.offsets,
            index,
            separate_lines=self.separate_lines,
            bos=self.special.cls_token_id,
            sep=self.special.sep_token_id,
            pad=self.special.pad_token_id,
            padded_length=0 if packed else self.length,
        )
        return Sequences(ids if packed else ids.reshape(len(index), self.length), cu_seqlens)
