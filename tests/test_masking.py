"""Masking of tokens: against plain Python with the same random words, and by its counts."""

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bertops import _host
from bertops.data import DynamicMasker
from token_oracles import MASKING, PERMUTATION, Draws, mask_tokens, permutation, philox, words_of

VOCAB, MASK, SPECIAL = 60, 4, (0, 1, 2, 3, 4)
STARTS = np.random.default_rng(5).random(VOCAB) < 0.6
BIG = 2**40 + 17


def batch(seed=0, rows=9, length=40, share_special=0.1):
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, VOCAB, (rows, length))
    special = rng.random((rows, length)) < share_special
    ids[special] = rng.integers(0, 5, special.sum())
    return ids


@pytest.mark.parametrize(
    ("seed", "counter", "expected"),
    [  # Random123's known answers for philox4x32-10
        (0, [0, 0, 0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, [2**32 - 1] * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0_A4093822,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(seed, counter, expected):
    assert " ".join(f"{word:08x}" for word in philox(seed, counter)) == expected


def test_words_of_the_compiled_module():
    zeros = _host.draws(seed=0, purpose=0, epoch=0, index=0, count=4)
    assert [f"{word:08x}" for word in zeros] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    for purpose, seed, epoch, index in ((MASKING, 2**64 - 3, 2**32 - 1, 2**56 - 1), (PERMUTATION, 7, 3, BIG)):
        draws = Draws(seed, purpose, epoch, index)
        words = _host.draws(seed=seed, purpose=purpose, epoch=epoch, index=index, count=11)
        assert words.tolist() == [draws.next() for _ in range(11)]


@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_permutation(count):
    order = _host.permutation(count, 11, 3)
    assert order.tolist() == permutation(count, 11, 3)
    assert sorted(order) == list(range(count))


OPTIONS = {
    "tokens": {},
    "words": {"starts": STARTS},
    "n-grams of tokens": {"ngram": 3},
    "n-grams of words": {"ngram": 3, "starts": STARTS},
    "longest n-grams": {"ngram": 10, "starts": STARTS, "mask_prob": 0.6},
    "capped": {"ngram": 2, "starts": STARTS, "mask_prob": 0.5, "max_predictions": 3},
    "special too": {"mask_special": True},
    "special too, words": {"mask_special": True, "starts": STARTS, "ngram": 3, "mask_prob": 0.4},
    "everything": {"mask_prob": 1.0, "starts": STARTS},
    "other rates": {"replace": (0.25, 0.5), "mask_prob": 0.5},
    "other seed": {"seed": 2**63 + 5},
}


def masker_of(starts=None, replace=(0.8, 0.1), **options):
    return DynamicMasker(
        VOCAB,
        MASK,
        SPECIAL,
        word_starts=starts,
        mask_replace_prob=replace[0],
        random_replace_prob=replace[1],
        **options,
    )


@pytest.mark.parametrize("layout", ["padded", "masked", "packed"])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_plain_python(name, layout):
    options, ids = OPTIONS[name], batch()
    indices, epoch = np.array([3, 0, 7, BIG, 4, 11, 12, 2**56 - 1, 1]), 5
    rows, real, kwargs = [list(row) for row in ids], [None] * len(ids), {}
    given = ids
    if layout == "masked":
        mask = np.random.default_rng(1).random(ids.shape) < 0.8
        real, kwargs = [list(row) for row in mask], {"mask": mask}
    elif layout == "packed":
        rows = [row[:size] for row, size in zip(rows, [0, 1, 2, 40, 3, 17, 5, 40, 9], strict=True)]
        given = np.array([token for row in rows for token in row])
        kwargs = {"cu_seqlens": np.cumsum([0, *map(len, rows)])}
    result = masker_of(**options)(given, indices, epoch, **kwargs)
    expected = [
        mask_tokens(
            row, index, epoch, vocab_size=VOCAB, mask_token_id=MASK, special=SPECIAL, real=r, **options
        )
        for row, index, r in zip(rows, indices.tolist(), real, strict=True)
    ]
    assert result.input_ids.ravel().tolist() == [token for row, _ in expected for token in row]
    assert result.labels.ravel().tolist() == [label for _, row in expected for label in row]
    assert result.input_ids.shape == result.labels.shape == given.shape
    assert result.input_ids.dtype == result.labels.dtype == np.int64


def test_counts_are_rounded_without_bias():
    ids = np.full((4000, 37), 9)
    counts = (masker_of(mask_prob=0.15)(ids, range(4000)).labels != -100).sum(1)
    assert set(counts) == {5, 6}  # 5.55 wanted
    assert abs(counts.mean() - 5.55) < 4 * np.sqrt(0.55 * 0.45 / 4000)


@pytest.mark.parametrize(("mask_prob", "count"), [(0, 0), (1, 20), (0.5, 10), (0.25, 5)])
def test_whole_counts_are_exact(mask_prob, count):
    labels = masker_of(mask_prob=mask_prob)(np.full((50, 20), 9), range(50)).labels
    assert ((labels != -100).sum(1) == count).all()


def test_every_position_is_as_likely():
    labels = masker_of()(np.full((6000, 20), 9), range(6000)).labels
    masked = (labels != -100).sum(0)  # 3 of 20 in every row
    assert masked.sum() == 3 * 6000
    assert (abs(masked - 900) < 4.5 * np.sqrt(6000 * 0.15 * 0.85)).all()


def test_rates_of_replacement():
    ids = batch(rows=2000, share_special=0)
    result = masker_of(mask_prob=0.5)(ids, range(2000))
    drawn = result.labels != -100
    total = drawn.sum()
    became_mask = (result.input_ids == MASK)[drawn].sum()
    stayed = (result.input_ids == ids)[drawn].sum()
    random = total - became_mask - stayed
    kinds = VOCAB - len(SPECIAL)
    for count, share in ((became_mask, 0.8), (stayed, 0.1 + 0.1 / kinds), (random, 0.1 - 0.1 / kinds)):
        assert abs(count - share * total) < 4 * np.sqrt(share * (1 - share) * total)
    changed = result.input_ids[drawn & (result.input_ids != MASK) & (result.input_ids != ids)]
    each = np.bincount(changed, minlength=VOCAB)
    assert (each[:5] == 0).all() and (each[5:] > 0).all()
    expected = len(changed) / kinds
    assert ((each[5:] - expected) ** 2 / expected).sum() < kinds + 5 * np.sqrt(2 * kinds)  # chi-square


def test_ngram_lengths():
    """p(n) is 6/11, 3/11, 2/11 where nothing is in the way: one n-gram in a long row."""
    labels = masker_of(ngram=3, mask_prob=0.5, max_predictions=3)(np.full((9000, 64), 9), range(9000)).labels
    drawn = labels != -100
    first = drawn.argmax(1)
    alone = [row[i : i + 4].tolist() for row, i in zip(drawn, first, strict=True)]
    three = np.mean([run[:3] == [True, True, True] for run in alone])
    # 3 first (2/11), or pieces that happen to touch, at most a few in 64 places
    assert 2 / 11 - 0.015 < three < 2 / 11 + 0.05
    assert (drawn.sum(1) == 3).all()
    capped = masker_of(ngram=3, mask_prob=0.5, max_predictions=20)(np.full((50, 512), 9), range(50)).labels
    assert ((capped != -100).sum(1) == 20).all()


def test_labels_and_special_tokens():
    ids = batch(rows=200)
    for options in OPTIONS.values():
        result = masker_of(**options)(ids, range(200))
        drawn = result.labels != -100
        assert (result.labels[drawn] == ids[drawn]).all()
        assert (result.input_ids[~drawn] == ids[~drawn]).all()
        if not options.get("mask_special"):
            assert not drawn[ids < 5].any()
        replaced = result.input_ids[drawn & (result.input_ids != ids)]
        assert ((replaced == MASK) | (replaced >= 5)).all()
    assert (masker_of(mask_special=True, mask_prob=1)(ids, range(200)).labels == ids).all()


def test_padding_is_never_masked():
    ids = batch(share_special=0)
    mask = np.arange(40) < np.arange(1, 10)[:, None]
    labels = masker_of(mask_prob=1, mask_special=True)(ids, range(9), mask=mask.astype(np.int32)).labels
    assert ((labels != -100) == mask).all()


@pytest.mark.parametrize("ngram", [1, 3])
def test_words_are_never_split(ngram):
    ids = batch(rows=300)
    labels = masker_of(starts=STARTS, ngram=ngram, mask_prob=0.3, seed=1)(ids, range(300)).labels
    for row, marked in zip(ids.tolist(), (labels != -100).tolist(), strict=True):
        for word in words_of(row, SPECIAL, STARTS, [True] * len(row), False)[0]:
            assert len({marked[position] for position in word}) == 1
    share = (labels != -100).sum() / (ids >= 5).sum()
    assert 0.27 < share <= 0.301  # a word too long for the rest is left out


def test_function_of_seed_epoch_and_index_alone():
    ids, masker = batch(rows=32), masker_of(starts=STARTS, ngram=3)
    whole = masker(ids, range(32), 4)
    order = np.random.default_rng(0).permutation(32)
    shuffled = masker(ids[order], order, 4)
    one_by_one = [masker(ids[i : i + 1], [i], 4) for i in range(32)]
    copy = pickle.loads(pickle.dumps(masker))
    with ThreadPoolExecutor(4) as pool:
        threads = list(pool.map(lambda i: copy(ids[i : i + 4], range(i, i + 4), 4), range(0, 32, 4)))
    for part in range(2):
        assert np.array_equal(shuffled[part], whole[part][order])
        assert np.array_equal(np.concatenate([x[part] for x in one_by_one]), whole[part])
        assert np.array_equal(np.concatenate([x[part] for x in threads]), whole[part])
    assert np.array_equal(masker(ids, range(32), 4).labels, whole.labels)
    others = [masker(ids, range(32), 5), masker(ids, range(1, 33), 4)]
    others.append(masker_of(starts=STARTS, ngram=3, seed=1)(ids, range(32), 4))
    for other in others:
        assert (np.any(other.labels != whole.labels, axis=1)).mean() > 0.9


def test_input_is_left_as_it_is():
    ids = batch(rows=3).astype(np.int32)
    before = ids.copy()
    view = np.asfortranarray(ids)
    view.flags.writeable = False
    assert np.array_equal(masker_of()(view, range(3)).labels, masker_of()(ids, range(3)).labels)
    assert np.array_equal(ids, before)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batches(shape):
    result = masker_of()(np.zeros(shape, int), range(shape[0]))
    assert result.input_ids.shape == result.labels.shape == shape
    assert masker_of()(np.zeros(0, int), [], cu_seqlens=[0]).labels.shape == (0,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_prob": -0.1}, ValueError, r"mask_prob must lie in \[0, 1\], got -0.1"),
        ({"mask_prob": 1.5}, ValueError, "mask_prob"),
        ({"mask_prob": float("nan")}, ValueError, "mask_prob"),
        ({"ngram": 0}, ValueError, r"ngram must lie in \[1, 10\], got 0"),
        ({"ngram": 11}, ValueError, "ngram"),
        ({"seed": -1}, ValueError, "seed"),
        ({"max_predictions": -1}, ValueError, "max_predictions"),
        ({"replace": (0.8, 0.3)}, ValueError, "must add up to at most 1, got 0.8 and 0.3"),
        ({"starts": np.ones(3, bool)}, ValueError, r"word_starts must be bool of shape \(60,\)"),
        ({"starts": np.ones(60)}, ValueError, "word_starts must be bool .* got float64"),
    ],
)
def test_refuses_settings(options, error, message):
    with pytest.raises(error, match=message):
        masker_of(**options)


def test_refuses_vocabularies():
    with pytest.raises(ValueError, match=r"mask_token_id must lie in \[0, 9\], got 10"):
        DynamicMasker(10, 10, [0])
    with pytest.raises(ValueError, match=r"special_ids must lie in \[0, 9\], got -1"):
        DynamicMasker(10, 1, [-1])
    with pytest.raises(ValueError, match="special_ids must leave some of the vocabulary"):
        DynamicMasker(2, 1, [0, 1])


@pytest.mark.parametrize(
    ("ids", "indices", "options", "error", "message"),
    [
        ([[5, 60]], [0], {}, ValueError, r"must lie in \[0, 60\), got 60 in sequence 0, token 1"),
        ([[5, 6], [7, -1]], [0, 1], {}, ValueError, "got -1 in sequence 1, token 1"),
        ([[5.0]], [0], {}, TypeError, "input_ids must hold integers, got float64"),
        ([5, 6], [0], {}, ValueError, r"shape \(B, N\), or \(T,\) with cu_seqlens, got \(2,\)"),
        ([[5, 6]], [0], {"cu_seqlens": [0, 2]}, ValueError, "with cu_seqlens"),
        ([5, 6], [0], {"cu_seqlens": [0, 3]}, ValueError, "rise from 0 to the 2 tokens"),
        ([5, 6], [0, 1], {"cu_seqlens": [0, 3, 2]}, ValueError, "rise from 0"),
        ([[5, 6]], [0, 1], {}, ValueError, "indices must number the 1 sequences of input_ids, got 2"),
        ([[5, 6]], [-1], {}, ValueError, "indices must lie in"),
        ([[5, 6]], [2**56], {}, ValueError, "indices must lie in"),
        ([[5, 6]], [0.5], {}, TypeError, "indices must hold integers"),
        ([[5, 6]], [0], {"epoch": 2**32}, ValueError, "epoch must lie in"),
        ([[5, 6]], [0], {"epoch": -1}, ValueError, "epoch must lie in"),
        ([[5, 6]], [0], {"mask": [[1]]}, ValueError, r"mask must have the shape \(1, 2\)"),
    ],
)
def test_refuses_batches(ids, indices, options, error, message):
    with pytest.raises(error, match=message):
        masker_of()(ids, indices, **options)


def test_ids_at_padding_may_be_anything():
    labels = masker_of(mask_prob=1)([[5, -7]], [0], mask=[[True, False]]).labels
    assert labels.tolist() == [[5, -100]]


def test_says_that_the_module_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bertops._host", None)
    with pytest.raises(ImportError, match=r"bertops\._host could not be loaded .*pip install"):
        masker_of()
