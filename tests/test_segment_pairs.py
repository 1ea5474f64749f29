"""Pairs of segments: consecutive ones in order or swapped, or with a random second one."""

from itertools import pairwise

import numpy as np
import pytest

from bertops.data import NextSentencePairs, SentenceOrderPairs
from token_oracles import (
    SPECIAL,
    corpus_of,
    documents_of,
    drawn_corpus,
    next_sentence_pairs,
    sentence_pairs,
)

CLS, SEP, PAD = SPECIAL.cls_token_id, SPECIAL.sep_token_id, SPECIAL.pad_token_id


def numbered_corpus(documents, lines, tokens):
    """Every token is its own position plus 5."""
    count = iter(range(5, 10**7))
    return corpus_of([[[next(count) for _ in range(tokens)] for _ in range(lines)] for _ in range(documents)])


def segments(examples, epoch=0):
    """(A, B, label) of every pair as spans of the corpus."""
    spans, labels = examples.pairs(epoch)
    return [(range(*row[:2]), range(*row[2:]), label) for row, label in zip(spans, labels, strict=True)]


@pytest.mark.parametrize(
    ("kind", "oracle", "more"),
    [
        (SentenceOrderPairs, sentence_pairs, {"random_segments": False}),
        (SentenceOrderPairs, sentence_pairs, {"random_segments": True}),
        (NextSentencePairs, next_sentence_pairs, {}),
    ],
    ids=["order", "order, random segments", "next"],
)
@pytest.mark.parametrize("length", [5, 8, 20, 64])
def test_equals_plain_python(length, kind, oracle, more):
    for seed, epoch, short_prob in ((0, 0, 0.1), (2**64 - 1, 3, 0.7), (5, 2**32 - 1, 0.0)):
        corpus = drawn_corpus(seed % 97, documents=30)
        options = {"seed": seed, "short_prob": short_prob, **more}
        examples = kind(corpus, length, SPECIAL, **options)
        expected = oracle(documents_of(corpus), length, epoch=epoch, **options)
        found = [
            (corpus.tokens[a].tolist(), corpus.tokens[b].tolist(), label)
            for a, b, label in segments(examples, epoch)
        ]
        assert found == expected
        assert examples.count(epoch) == len(expected)


def test_gathered_rows():
    corpus = drawn_corpus(1, documents=20)
    examples = SentenceOrderPairs(corpus, 24, SPECIAL, seed=3)
    order = np.random.default_rng(0).permutation(examples.count(2))
    padded, packed = examples.gather(order, 2), examples.gather(order, 2, packed=True)
    pairs = segments(examples, 2)
    starts = packed.cu_seqlens
    for i, (number, (start, end)) in enumerate(zip(order, pairwise(starts), strict=True)):
        a, b, label = pairs[number]
        row = [CLS, *corpus.tokens[a], SEP, *corpus.tokens[b], SEP]
        types = [0] * (len(a) + 2) + [1] * (len(b) + 1)
        spare = 24 - len(row)
        assert spare >= 0
        assert packed.input_ids[start:end].tolist() == row
        assert packed.token_type_ids[start:end].tolist() == types
        assert padded.input_ids[i].tolist() == row + [PAD] * spare
        assert padded.token_type_ids[i].tolist() == types + [0] * spare
        assert padded.mask[i].tolist() == [True] * len(row) + [False] * spare
        assert padded.sentence_order_label[i] == packed.sentence_order_label[i] == label
    assert padded.sentence_order_label.dtype == padded.token_type_ids.dtype == np.int64


def test_labels_tell_the_order():
    examples = SentenceOrderPairs(numbered_corpus(400, 12, 7), 64, SPECIAL)
    pairs = segments(examples)
    for a, b, label in pairs:
        assert len(a) > 0 and len(b) > 0 and len(a) + len(b) <= 61
        assert (a.start >= b.stop) if label else (a.stop <= b.start)
    swapped = np.mean([label for *_, label in pairs])
    assert abs(swapped - 0.5) < 4 * np.sqrt(0.25 / len(pairs))


def test_segments_are_of_one_document_and_follow_each_other():
    corpus = drawn_corpus(2, documents=300)
    ends = corpus.line_offsets[corpus.document_offsets]
    long_enough = SentenceOrderPairs(corpus, 500, SPECIAL, short_prob=0)  # nothing is cut off
    for examples in (long_enough, SentenceOrderPairs(corpus, 20, SPECIAL)):
        for a, b, label in segments(examples):
            first, second = (b, a) if label else (a, b)
            inside = np.searchsorted(ends, [first.start, second.stop - 1], side="right")
            assert inside[0] == inside[1]
            if examples is long_enough:
                assert first.stop == second.start and first.stop in corpus.line_offsets
    covered = sorted(token for a, b, _ in segments(long_enough) for token in (*a, *b))
    alone = np.flatnonzero(np.diff(corpus.document_offsets) == 1)
    left_out = [token for d in alone for token in range(ends[d], ends[d + 1])]
    assert len(alone) > 0
    assert sorted(covered + left_out) == list(range(corpus.num_tokens))


def test_share_of_short_sequences():
    """A document of one chunk each: short ones have fewer lines than it takes to fill the row."""
    corpus = numbered_corpus(2000, 9, 10)
    examples = SentenceOrderPairs(corpus, 93, SPECIAL)
    first_of_document = {}
    for a, b, _ in segments(examples):
        first_of_document.setdefault(min(a.start, b.start) // 90, len(a) + len(b))
    short = np.mean([size < 90 for size in first_of_document.values()])
    expected = 0.1 * 79 / 89  # 2 to 80 of 2 to 90 stop before the last line
    assert len(first_of_document) == 2000
    assert abs(short - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000)
    assert all(
        len(a) + len(b) == 90 for a, b, _ in segments(SentenceOrderPairs(corpus, 93, SPECIAL, short_prob=0))
    )


def test_both_ends_are_cut():
    """Of two lines of 100 tokens 50 stay of each, the cut at the front being binomial."""
    corpus = numbered_corpus(500, 2, 100)
    fronts = []
    for a, b, _ in segments(SentenceOrderPairs(corpus, 103, SPECIAL, short_prob=0)):
        assert len(a) == len(b) == 50
        fronts += [a.start % 100, b.start % 100]
    assert abs(np.mean(fronts) - 25) < 4 * np.sqrt(12.5 / len(fronts))
    assert abs(np.var(fronts) - 12.5) < 2


def test_single_lines():
    documents = [[[10] * 30], [[11], [12]], [[13] * 30, [14]], [[15], [16], [17] * 30]]
    corpus = corpus_of(documents)

    def labels_by_document(**options):
        examples = SentenceOrderPairs(corpus, 8, SPECIAL, short_prob=0, **options)
        found = {}
        for a, b, label in segments(examples):
            tokens = {int(x) for x in (*corpus.tokens[a], *corpus.tokens[b])}
            found.setdefault(frozenset(tokens), []).append(label)
        return found

    alone = labels_by_document()
    assert set(alone) == {frozenset({11, 12}), frozenset({13, 14}), frozenset({15, 16, 17})}
    leaking = labels_by_document(random_segments=True)
    for line in (10, 13, 14):  # lines that are a chunk of their own: long enough, or left over
        mixed = [labels for tokens, labels in leaking.items() if line in tokens and len(tokens) > 1]
        assert mixed and any(1 in labels for labels in mixed)
    assert all(label == 1 for tokens, labels in leaking.items() if 10 in tokens for label in labels)


def test_random_segments_come_from_another_document():
    corpus = numbered_corpus(50, 1, 10)
    examples = SentenceOrderPairs(corpus, 40, SPECIAL, random_segments=True)
    pairs = segments(examples)
    assert len(pairs) == 50
    assert all(label == 1 and a.start // 10 != b.start // 10 for a, b, label in pairs)
    assert len({b.start for _, b, _ in pairs}) > 20


def test_next_sentence_follows_or_is_of_another_document():
    corpus = numbered_corpus(300, 9, 10)
    pairs = segments(NextSentencePairs(corpus, 43, SPECIAL))
    for a, b, label in pairs:
        assert len(a) > 0 and len(b) > 0 and len(a) + len(b) <= 40
        same = a.start // 90 == b.start // 90
        assert not same if label else (same and b.start >= a.stop)
    drawn = [label for a, _, label in pairs if not (label and a.stop % 90 == 0)]  # not a last line, alone
    assert len(drawn) < len(pairs)
    assert abs(np.mean(drawn) - 0.5) < 4 * np.sqrt(0.25 / len(drawn))


def test_next_sentence_leaves_no_line_out():
    """What a random segment displaced begins the next pair."""
    corpus = drawn_corpus(2, documents=300)
    pairs = segments(NextSentencePairs(corpus, 1000, SPECIAL, short_prob=0))  # nothing is cut off
    covered = sorted(token for a, b, label in pairs for token in (*a, *(() if label else b)))
    assert covered == list(range(corpus.num_tokens))


def test_next_sentence_gathers_its_label():
    examples = NextSentencePairs(numbered_corpus(20, 5, 4), 24, SPECIAL)
    rows = examples.gather([0, 1, 2])
    assert rows.pair_labels.keys() == {"next_sentence_label"}
    assert rows.next_sentence_label.tolist() == examples.pairs().labels[:3].tolist()


def test_epochs_and_seeds_differ():
    corpus = drawn_corpus(0, documents=40)
    examples = SentenceOrderPairs(corpus, 24, SPECIAL)
    first = examples.pairs(0)
    assert not np.array_equal(first.labels, examples.pairs(1).labels)
    assert np.array_equal(first.spans, examples.pairs(0).spans)
    other = SentenceOrderPairs(corpus, 24, SPECIAL, seed=1)
    assert not np.array_equal(first.spans, other.pairs(0).spans)


@pytest.mark.parametrize(
    ("corpus", "length", "options", "message"),
    [
        ([[[5]], [[6]]], 16, {}, "must have a document of two lines or more"),
        ([[[5], [6]]], 16, {"random_segments": True}, "needs two documents or more, got a corpus of 1"),
        ([[[5], [6]]], 4, {}, r"length must lie in \[5, .*got 4"),
        ([[[5], [6]]], 16, {"short_prob": 2}, r"short_prob must lie in \[0, 1\], got 2"),
        ([[[5], [6]]], 16, {"seed": 2**64}, "seed must lie in"),
    ],
)
def test_refuses(corpus, length, options, message):
    with pytest.raises(ValueError, match=message):
        SentenceOrderPairs(corpus_of(corpus), length, SPECIAL, **options)


def test_next_sentence_refuses_one_document():
    with pytest.raises(ValueError, match="corpus must have two documents or more"):
        NextSentencePairs(corpus_of([[[5], [6]]]), 16, SPECIAL)


def test_refuses_places():
    examples = SentenceOrderPairs(corpus_of([[[5], [6]]]), 16, SPECIAL)
    with pytest.raises(IndexError, match=r"indices must lie in \[0, 1\), got 1 to 1"):
        examples.gather([1])
    with pytest.raises(ValueError, match="epoch must lie in"):
        examples.pairs(-1)
