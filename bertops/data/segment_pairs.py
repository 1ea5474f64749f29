"""Sequences of two segments: in order or swapped (ALBERT), or the second perhaps a random one (BERT)."""

from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bertops.data._host import MAX_TOKENS, check_epoch, check_range, check_seed, host, rate
from bertops.data.corpus import TokenCorpus
from bertops.data.examples import Sequences, checked_indices
from bertops.data.text import SpecialTokens

NUM_SPECIAL = 3  # [CLS] A [SEP] B [SEP]


class SentencePairs(NamedTuple):
    """The pairs of an epoch, as spans of the corpus."""

    spans: NDArray[
        np.int64
    ]  # (P, 4): A is tokens[spans[:, 0]:spans[:, 1]], B is tokens[spans[:, 2]:spans[:, 3]]
    labels: NDArray[np.int64]  # (P,), 1 = swapped, or a random second segment


class SegmentPairs:
    """What both kinds of pairs have in common: sequences ``[CLS] A [SEP] B [SEP]`` of spans of a corpus."""

    next_sentence: ClassVar[bool]

    def __init__(
        self,
        corpus: TokenCorpus,
        length: int,
        special: SpecialTokens,
        seed: int,
        short_prob: float,
        random_segments: bool,
    ) -> None:
        self.corpus, self.special, self.seed = corpus, special, check_seed(seed)
        self.length = check_range("length", length, NUM_SPECIAL + 2, MAX_TOKENS)
        self.short_rate, self.random_segments = rate("short_prob", short_prob), random_segments
        self._made: tuple[int, SentencePairs] | None = None

    def pairs(self, epoch: int = 0) -> SentencePairs:
        """All pairs of an epoch; those of the last one asked for are kept."""
        made = self._made  # one look: another thread may put another epoch there
        if made is None or made[0] != epoch:
            arrays = host().segment_pairs(
                self.corpus.line_offsets,
                self.corpus.document_offsets,
                most=self.length - NUM_SPECIAL,
                short_rate=self.short_rate,
                next_sentence=self.next_sentence,
                random_segments=self.random_segments,
                seed=self.seed,
                epoch=check_epoch(epoch),
            )
            made = self._made = (epoch, SentencePairs(*arrays))
        return made[1]

    def count(self, epoch: int = 0) -> int:
        """How many pairs the epoch has: it differs from epoch to epoch."""
        return len(self.pairs(epoch).labels)

    def gather(self, indices: ArrayLike, epoch: int = 0, *, packed: bool = False) -> Sequences:
        """The pairs of these numbers, padded to ``length``, or end to end.

        Raises:
            ValueError: more tokens than int32 offsets count.
            IndexError: a number outside [0, count(epoch)).
        """
        spans, labels = self.pairs(epoch)
        index = checked_indices(indices, len(labels), self.length)
        ids, types, cu_seqlens = host().gather_pairs(
            self.corpus.tokens,
            spans[index],
            cls=self.special.cls_token_id,
            sep=self.special.sep_token_id,
            pad=self.special.pad_token_id,
            padded_length=0 if packed else self.length,
        )
        shape = (-1,) if packed else (len(index), self.length)
        label = "next_sentence_label" if self.next_sentence else "sentence_order_label"
        return Sequences(ids.reshape(shape), cu_seqlens, types.reshape(shape), **{label: labels[index]})


class SentenceOrderPairs(SegmentPairs):
    """Sequences ``[CLS] A [SEP] B [SEP]`` with the label of sentence-order prediction, anew in every epoch.

    Lines of a document are collected until they have ``length - 3`` tokens, or, with probability
    ``short_prob``, a number drawn from 2 to ``length - 3``. They are cut between two lines drawn at random;
    the halves are A and B, with probability 1/2 swapped (label 1). What is too long loses tokens one by one,
    the longer segment first, at its front or its back with probability 1/2 each.

    At least two lines make a pair: a line that reaches the wanted number alone takes one more, and a line
    left alone at the end of its document, or in a document of one line, is left out. With
    ``random_segments`` such a line is a pair with lines of another document, labelled 1, as in the official
    code: topics then give the answer away.

    The pairs are a function of (seed, epoch, document) and of the corpus.

    Sources: Devlin et al. 2019 (BERT), and Lan et al. 2020 (ALBERT), section 3.1. Their code makes the pairs
    once and not every epoch, and draws whether sequences are short once for a whole document, whose short
    ones then outnumber the 10 % that the paper gives.

    Args:
        corpus: documents of sentences.
        length: most tokens of a sequence, special ones included; 5 or more.
        special: ids of ``[CLS]``, ``[SEP]`` and the padding.
        seed: 64 bits.
        short_prob: probability that a sequence is made shorter.
        random_segments: one line alone is paired with another document.

    Raises:
        ValueError: an argument out of range; no document has two lines; or ``random_segments`` with one
            document.
        ImportError: the compiled module is missing; says how to build it.
    """

    next_sentence = False

    def __init__(
        self,
        corpus: TokenCorpus,
        length: int,
        special: SpecialTokens,
        *,
        seed: int = 0,
        short_prob: float = 0.1,
        random_segments: bool = False,
    ) -> None:
        super().__init__(corpus, length, special, seed, short_prob, random_segments)
        if random_segments and corpus.num_documents == 1:
            raise ValueError("random_segments needs two documents or more, got a corpus of 1")
        if not random_segments and corpus.num_lines == corpus.num_documents:
            raise ValueError(
                "corpus must have a document of two lines or more, got one line in every document"
            )


class NextSentencePairs(SegmentPairs):
    """The same sequences with the label of next-sentence prediction, anew in every epoch.

    Lines are collected and cut as for :class:`SentenceOrderPairs`. With probability 1/2 B is not the rest of
    them but lines of another document (label 1), from one drawn at random on until the pair has the wanted
    number of tokens; the rest then begins the next pair. A line that is alone always has such a B.

    The pairs are a function of (seed, epoch, document) and of the corpus.

    Source: Devlin et al. 2019 (BERT), section 3.1 and appendix A.2; its code makes the pairs once.

    Args:
        corpus: two or more documents of sentences.
        length: most tokens of a sequence, special ones included; 5 or more.
        special: ids of ``[CLS]``, ``[SEP]`` and the padding.
        seed: 64 bits.
        short_prob: probability that a sequence is made shorter.

    Raises:
        ValueError: an argument out of range, or a corpus of one document.
        ImportError: the compiled module is missing; says how to build it.
    """

    next_sentence = True

    def __init__(
        self,
        corpus: TokenCorpus,
        length: int,
        special: SpecialTokens,
        *,
        seed: int = 0,
        short_prob: float = 0.1,
    ) -> None:
        super().__init__(corpus, length, special, seed, short_prob, random_segments=True)
        if corpus.num_documents == 1:
            raise ValueError("corpus must have two documents or more: half of the pairs need another one")
