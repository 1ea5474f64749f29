"""FULL-SENTENCES and DOC-SENTENCES: whole lines packed into blocks."""

from itertools import pairwise

import numpy as np
import pytest

from bertops.data import SentenceBlocks
from token_oracles import SPECIAL, corpus_of, documents_of, drawn_corpus, pack_blocks

CLS, SEP, PAD = SPECIAL.cls_token_id, SPECIAL.sep_token_id, SPECIAL.pad_token_id
MODES = [(separate, within) for separate in (True, False) for within in (True, False)]


def rows_of(blocks, **options):
    """Every block as a list of ids, without padding."""
    found = blocks.gather(np.arange(blocks.count()), **options)
    if options.get("packed"):
        return [found.input_ids[a:b].tolist() for a, b in pairwise(found.cu_seqlens)]
    return [row[:size].tolist() for row, size in zip(found.input_ids, found.lengths, strict=True)]


@pytest.mark.parametrize(("separate_lines", "within_documents"), MODES)
@pytest.mark.parametrize("length", [4, 5, 7, 16, 64, 1000])
def test_equals_plain_python(length, separate_lines, within_documents):
    for seed in range(5):
        corpus = drawn_corpus(seed, documents=1 + 3 * seed)
        options = {"separate_lines": separate_lines, "within_documents": within_documents}
        blocks = SentenceBlocks(corpus, length, SPECIAL, **options)
        expected = pack_blocks(documents_of(corpus), length, **options)
        assert blocks.count() == blocks.count(7) == len(expected)
        assert rows_of(blocks) == rows_of(blocks, packed=True) == expected


def test_by_hand():
    corpus = corpus_of([[[10, 11], [12], [13, 14, 15]], [[16]], [[17, 18], [19]]])

    def rows(length, **options):
        return rows_of(SentenceBlocks(corpus, length, SPECIAL, **options))

    assert rows(8) == [
        [CLS, 10, 11, SEP, 12, SEP],
        [CLS, 13, 14, 15, SEP, SEP, 16, SEP],
        [CLS, 17, 18, SEP, 19, SEP],
    ]
    assert rows(8, within_documents=True) == [
        [CLS, 10, 11, SEP, 12, SEP],
        [CLS, 13, 14, 15, SEP],
        [CLS, 16, SEP],
        [CLS, 17, 18, SEP, 19, SEP],
    ]
    assert rows(8, separate_lines=False) == [
        [CLS, 10, 11, 12, 13, 14, 15, SEP],
        [CLS, 16, SEP, 17, 18, 19, SEP],
    ]
    assert rows(4) == [
        [CLS, 10, 11, SEP],
        [CLS, 12, SEP],
        [CLS, 13, 14, SEP],
        [CLS, 15, SEP],
        [CLS, 16, SEP],
        [CLS, 17, 18, SEP],
        [CLS, 19, SEP],
    ]


@pytest.mark.parametrize(("separate_lines", "within_documents"), MODES)
def test_every_token_once_and_no_block_too_long(separate_lines, within_documents):
    corpus = drawn_corpus(3, documents=200)
    blocks = SentenceBlocks(
        corpus, 24, SPECIAL, separate_lines=separate_lines, within_documents=within_documents
    )
    rows = rows_of(blocks)
    assert max(map(len, rows)) <= 24
    assert all(row[0] == CLS and row[-1] == SEP for row in rows)
    assert [token for row in rows for token in row if token >= 5] == corpus.tokens.tolist()
    assert blocks.offsets[0] == 0 and blocks.offsets[-1] == corpus.num_tokens
    assert (np.diff(blocks.offsets) > 0).all()
    if within_documents:
        document_ends = corpus.line_offsets[corpus.document_offsets]
        first, last = (
            np.searchsorted(document_ends, tokens, side="right")
            for tokens in (blocks.offsets[:-1], blocks.offsets[1:] - 1)
        )
        assert (first == last).all()


def test_full_sentences_are_full():
    """The first line of the next block would not have fitted."""
    corpus = drawn_corpus(4, documents=50)
    blocks, length = SentenceBlocks(corpus, 32, SPECIAL), 32
    sizes = [len(row) for row in rows_of(blocks)]
    ends = corpus.line_offsets[corpus.document_offsets].tolist()
    for size, start in zip(sizes, blocks.offsets[1:-1].tolist(), strict=False):
        line = np.searchsorted(corpus.line_offsets, start)
        next_line = corpus.line_offsets[line + 1] - start + 1 + (start in ends)
        assert size + next_line > length


def test_padding_and_order():
    corpus = drawn_corpus(0, documents=20)
    blocks = SentenceBlocks(corpus, 16, SPECIAL)
    order = np.array([5, 0, 5, 3])
    padded, packed = blocks.gather(order), blocks.gather(order, packed=True)
    rows = rows_of(blocks)
    assert padded.input_ids.shape == padded.mask.shape == (4, 16)
    for i, number in enumerate(order):
        size = len(rows[number])
        assert padded.input_ids[i].tolist() == rows[number] + [PAD] * (16 - size)
        assert padded.mask[i].tolist() == [True] * size + [False] * (16 - size)
    assert packed.input_ids.tolist() == [token for number in order for token in rows[number]]
    assert packed.mask is None
    assert packed.position_ids.tolist() == [i for number in order for i in range(len(rows[number]))]
    assert packed.cu_seqlens.tolist() == np.cumsum([0, *packed.lengths]).tolist()
    assert [x.dtype for x in (packed.input_ids, packed.position_ids, packed.cu_seqlens)] == [
        np.int64,
        np.int64,
        np.int32,
    ]
    nothing = blocks.gather([])
    assert nothing.input_ids.shape == (0, 16) and nothing.cu_seqlens.tolist() == [0]
    assert blocks.gather([], packed=True).input_ids.shape == (0,)


def test_refuses():
    corpus = drawn_corpus(0, documents=2)
    with pytest.raises(ValueError, match=r"length must lie in \[4, .*got 3"):
        SentenceBlocks(corpus, 3, SPECIAL)
    with pytest.raises(TypeError, match=r"length must be an integer, got 16\.5"):
        SentenceBlocks(corpus, 16.5, SPECIAL)
    with pytest.raises(ValueError, match=r"int32 offsets count no further: got 3 sequences of length 10{9}"):
        SentenceBlocks(corpus, 10**9, SPECIAL).gather([0, 0, 0])
    blocks = SentenceBlocks(corpus, 16, SPECIAL)
    with pytest.raises(IndexError, match=r"indices must lie in \[0, \d+\), got 0 to 999"):
        blocks.gather([0, 999])
    with pytest.raises(IndexError, match="got -1 to -1"):
        blocks.gather([-1])
    with pytest.raises(TypeError, match="indices must hold integers"):
        blocks.gather([0.0])
