"""Batches of an epoch: every sequence once, whatever the ranks, workers and restarts."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from bertops.data import DynamicMasker, PretrainingStream, SentenceBlocks, SentenceOrderPairs
from token_oracles import SPECIAL, drawn_corpus, permutation

VOCAB = 50
CORPUS = drawn_corpus(0, documents=120, vocab_size=VOCAB)
STARTS = np.random.default_rng(0).random(VOCAB) < 0.6


def blocks():
    return SentenceBlocks(CORPUS, 24, SPECIAL)


def pairs():
    return SentenceOrderPairs(CORPUS, 24, SPECIAL, seed=9)


def stream_of(examples, batch_size=8, **options):
    masker = DynamicMasker(VOCAB, SPECIAL.mask_token_id, SPECIAL, seed=2, ngram=3, word_starts=STARTS)
    return PretrainingStream(examples, masker, batch_size, **{"seed": 4, **options})


def same(batch, other):
    return batch.keys() == other.keys() and all(np.array_equal(batch[name], other[name]) for name in batch)


def assert_same(batches, others):
    assert len(batches) == len(others)
    assert all(same(a, b) for a, b in zip(batches, others, strict=True))


def originals(batch):
    return np.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


BOTH = pytest.mark.parametrize("examples", [blocks, pairs])
LAYOUTS = pytest.mark.parametrize("packed", [False, True])


@BOTH
@LAYOUTS
def test_batches_are_what_the_parts_make(examples, packed):
    source, stream = examples(), stream_of(examples(), packed=packed)
    for epoch in (0, 2):
        order = permutation(source.count(epoch), 4, epoch)
        assert stream.order(epoch).tolist() == order
        for step in (0, stream.num_steps(epoch) - 1):
            numbers = order[8 * step : 8 * step + 8]
            rows = source.gather(numbers, epoch, packed=packed)
            layout = {"cu_seqlens": rows.cu_seqlens} if packed else {"mask": rows.mask}
            input_ids, labels = stream.masker(rows.input_ids, numbers, epoch, **layout)
            expected = {"input_ids": input_ids, "labels": labels, **layout}
            if packed:
                expected["position_ids"] = rows.position_ids
            if examples is pairs:
                expected["token_type_ids"] = rows.token_type_ids
                expected["sentence_order_label"] = rows.sentence_order_label
            assert same(stream.batch(epoch, step), expected)


def test_every_token_once_an_epoch():
    stream = stream_of(blocks(), drop_last=False)
    for _ in range(2):
        seen = np.concatenate([originals(batch)[batch["mask"]] for batch in stream])
        seen = seen[seen >= 5]
        assert len(seen) == CORPUS.num_tokens
        assert np.array_equal(np.bincount(seen), np.bincount(CORPUS.tokens))
    assert (stream.epoch, stream.step) == (2, 0)


@LAYOUTS
@BOTH
def test_ranks_share_the_global_batch(examples, packed):
    whole = stream_of(examples(), 8, packed=False)
    ranks = [stream_of(examples(), 2, rank=rank, world=4, packed=packed) for rank in range(4)]
    for epoch in (0, 1):
        assert {stream.num_steps(epoch) for stream in ranks} == {whole.num_steps(epoch)}
        for step in range(whole.num_steps(epoch)):
            parts, together = [s.batch(epoch, step) for s in ranks], whole.batch(epoch, step)
            if packed:
                real = together["mask"]
                for name in ("input_ids", "labels"):
                    assert np.array_equal(np.concatenate([p[name] for p in parts]), together[name][real])
            else:
                assert all(
                    np.array_equal(np.concatenate([p[name] for p in parts]), together[name])
                    for name in together
                )


@BOTH
def test_resumes_anywhere(examples):
    uninterrupted = stream_of(examples())
    first, second = list(uninterrupted), list(uninterrupted)
    assert not same(first[0], second[0])
    for stop in (0, 1, len(first) - 1, len(first), len(first) + 3):
        before = stream_of(examples())
        seen = []
        while len(seen) < stop:
            for batch in before:
                seen.append(batch)
                if len(seen) == stop:
                    break
        state = json.loads(json.dumps(before.state_dict()))
        after = stream_of(examples())
        after.load_state_dict(state)
        rest = list(after) + ([] if after.epoch == 2 else list(after))
        assert_same(seen + rest, first + second)


def test_breaking_off_continues():
    stream, whole = stream_of(blocks()), list(stream_of(blocks()))
    part = [batch for _, batch in zip(range(3), stream, strict=False)]
    assert stream.step == 3
    assert_same(part + list(stream), whole)
    assert stream.epoch == 1


def test_resumes_on_other_ranks():
    before = stream_of(blocks(), 8)
    next(iter(before))
    state = before.state_dict()
    after = [stream_of(blocks(), 4, rank=rank, world=2) for rank in range(2)]
    for stream in after:
        stream.load_state_dict(state)
    parts = [next(iter(stream)) for stream in after]
    both = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert same(both, next(iter(before)))


def test_refuses_the_state_of_another_stream():
    state = stream_of(blocks()).state_dict()
    with pytest.raises(ValueError, match=r"seed 4 \(here 5\), global_batch_size 8 \(here 16\)"):
        stream_of(blocks(), 16, seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"tokens"):
        other = SentenceBlocks(drawn_corpus(1, documents=120), 24, SPECIAL)
        stream_of(other).load_state_dict(state)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_workers_of_pytorch(num_workers):
    stream = stream_of(pairs())
    stream.set_epoch(1, 2)
    loader = DataLoader(
        stream, batch_size=None, num_workers=num_workers, sampler=range(stream.step, len(stream))
    )
    loaded = list(loader)
    assert all(isinstance(tensor, torch.Tensor) for tensor in loaded[0].values())
    assert_same([{k: v.numpy() for k, v in batch.items()} for batch in loaded], list(stream))


def test_threads():
    stream, whole = stream_of(pairs()), list(stream_of(pairs()))
    with ThreadPoolExecutor(4) as pool:
        assert_same(list(pool.map(stream.__getitem__, range(len(stream)))), whole)


def test_static_masks_and_order():
    static = stream_of(blocks(), static=True, shuffle=False, drop_last=False)
    first, second = list(static), list(static)
    assert_same(first, second)
    dynamic = stream_of(blocks(), shuffle=False, drop_last=False)
    assert_same(list(dynamic), first)
    assert not any(same(a, b) for a, b in zip(dynamic, first, strict=True))
    shuffled = stream_of(pairs(), static=True, drop_last=False)
    rows = [{row.tobytes() for batch in shuffled for row in batch["labels"]} for _ in range(2)]
    assert shuffled.order(0).tolist() != shuffled.order(1).tolist()
    assert rows[0] == rows[1]


def test_lengths():
    count = blocks().count()
    assert len(stream_of(blocks())) == count // 8
    assert len(stream_of(blocks(), drop_last=False)) == -(-count // 8)
    assert len(list(stream_of(blocks(), drop_last=False))[-1]["mask"]) == (count - 1) % 8 + 1
    assert len(stream_of(blocks(), 2, rank=2, world=3)) == count // 6


@pytest.mark.parametrize(
    ("batch_size", "options", "message"),
    [
        (0, {}, r"batch_size must lie in \[1, .*got 0"),
        (8, {"rank": 2, "world": 2}, r"rank must lie in \[0, 1\], got 2"),
        (8, {"world": 0}, "world must lie in"),
        (8, {"seed": -1}, "seed must lie in"),
        (8, {"world": 2, "drop_last": False}, "drop_last=False needs world=1, got 2"),
    ],
)
def test_refuses(batch_size, options, message):
    with pytest.raises(ValueError, match=message):
        stream_of(blocks(), batch_size, **options)


def test_refuses_places():
    stream = stream_of(blocks())
    with pytest.raises(IndexError, match=r"step must lie in \[0, \d+\), got -1"):
        stream[-1]
    with pytest.raises(IndexError, match="step must lie in"):
        stream[len(stream)]
    with pytest.raises(ValueError, match="step must lie in"):
        stream.set_epoch(0, len(stream) + 1)
    with pytest.raises(ValueError, match="epoch must lie in"):
        stream.set_epoch(-1)
    with pytest.raises(ValueError, match=r"batch_size \* world must be at most the \d+ sequences of epoch 0"):
        len(stream_of(blocks(), 10**6))
