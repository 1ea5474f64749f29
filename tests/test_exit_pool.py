"""ExitPool: everybody gets their own answer once, whatever order threads, layers and failures come in."""

import random
import threading
import time
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertops.early_exit import ExitPool, Patience, PoolAnswer
from bertops.early_exit.pool_stats import WINDOW, Tally
from bertops.early_exit.queues import Chunk, LayerQueues, Sample
from exit_models import IDS, TOKEN_TYPES, Fault, TracingCriterion, TracingModel, check_answer
from test_fastbert import make_batch, make_model, middle_speed

LONG = 20.0  # seconds; what takes longer hangs
NEVER = 1e6
LAYERS = 4


def open_pool(model=None, *, never=False, max_batch=4, max_wait_s=NEVER, max_stall_s=NEVER, max_pending=4096):
    limits = {"max_batch": max_batch, "max_wait_s": max_wait_s, "max_stall_s": max_stall_s}
    criterion = TracingCriterion(never)
    return ExitPool(model or TracingModel(LAYERS), criterion=criterion, max_pending=max_pending, **limits)


def requests(count, seed=0, exits=tuple(range(1, LAYERS + 1))):
    """[exit layer, 0, *payload] of 2 to 8 ids."""
    rng = random.Random(seed)
    return [[rng.choice(exits), 0, *rng.choices(range(IDS), k=rng.randint(0, 6))] for _ in range(count)]


def together(count, target):
    """Runs ``target(i)`` in ``count`` threads to their end; the first error of any."""
    errors = []

    def run(i):
        try:
            target(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]


# The queues, on a clock of the test


def sample(submitted):
    return Sample(np.zeros(2, np.int64), None, submitted, None)


def chunk_of(samples, entered):
    rows = torch.zeros(1, sum(len(s.input_ids) for s in samples), 1)
    return Chunk(list(samples), entered, rows, torch.zeros(len(samples), 0, dtype=torch.int64))


def filled(counts, times, **limits):
    """Queues with ``counts[i]`` samples at layer i + 1, submitted and entered at ``times[i]``."""
    queues = LayerQueues(len(counts), **{"max_batch": 4, "max_wait_s": 10.0, "max_stall_s": 100.0, **limits})
    for layer, (count, at) in enumerate(zip(counts, times, strict=True), start=1):
        if count:
            queues.put(layer, chunk_of([sample(at) for _ in range(count)], at))
    return queues


def test_the_deepest_full_layer_runs():
    queues = filled([9, 4, 5, 3], [0, 0, 0, 0])
    assert queues.next_layer(0.0, hurry=False) == queues.next_layer(99.0, hurry=True) == 3


def test_a_stalled_layer_runs_before_shallower_full_ones_and_after_deeper_ones():
    queues = filled([9, 1, 4, 1], [50, 0, 50, 50])
    assert queues.next_layer(100.0, hurry=False) == 3
    queues.take(3)
    assert queues.next_layer(99.9, hurry=False) == 1
    assert queues.next_layer(100.0, hurry=False) == 2


def test_the_oldest_samples_layer_runs_when_it_is_due():
    queues = filled([3, 2, 0, 1], [3, 1, 0, 2])
    assert queues.next_layer(10.9, hurry=False) is None
    assert queues.due() == 11
    assert queues.next_layer(11.0, hurry=False) == 2
    queues.take(2)
    assert queues.due() == 12
    assert queues.next_layer(12.0, hurry=False) == 4


def test_in_a_hurry_the_shallowest_runs_so_that_deeper_ones_fill_up():
    queues = filled([0, 2, 0, 3], [0, 1, 0, 0])
    assert queues.next_layer(99.0, hurry=True) == 2


def test_empty_queues_wait_for_nothing():
    queues = filled([0, 0], [0, 0])
    assert queues.next_layer(1e9, hurry=True) is None and queues.due() is None


def test_take_splits_a_chunk_and_keeps_the_order():
    queues = LayerQueues(2, 4, 1.0, 1.0)
    samples = [sample(float(i)) for i in range(7)]
    for i, part in enumerate((samples[:3], samples[3:6], samples[6:])):
        rows = chunk_of(part, float(i))
        rows.hidden += torch.arange(rows.hidden.shape[1])[:, None] + 100 * i
        queues.put(2, rows)
    first, rest = queues.take(2), queues.take(2)
    assert [s for chunk in first for s in chunk.samples] == samples[:4]
    assert [chunk.hidden[0, :, 0].tolist() for chunk in first] == [[0, 1, 2, 3, 4, 5], [100, 101]]
    assert [s for chunk in rest for s in chunk.samples] == samples[4:]
    assert [chunk.hidden[0, :, 0].tolist() for chunk in rest] == [[102, 103, 104, 105], [200, 201]]
    assert [chunk.entered for chunk in rest] == [1, 2]
    assert queues.waiting == [0, 0, 0] and queues.take(2) == []


@settings(deadline=None, max_examples=60)
@given(
    num_layers=st.integers(1, 5),
    max_batch=st.integers(1, 6),
    steps=st.lists(st.tuples(st.integers(0, 9), st.floats(0, 3)), max_size=40),
    stay=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_queues_lose_nobody_keep_order_and_stay_bounded(num_layers, max_batch, steps, stay, seed):
    queues = LayerQueues(num_layers, max_batch, max_wait_s=2.0, max_stall_s=5.0)
    rng = random.Random(seed)
    now, submitted, left = 0.0, [], []
    ran = [[] for _ in range(num_layers + 1)]

    def run_one(hurry):
        layer = queues.next_layer(now, hurry)
        if layer is None:
            return False
        assert all(n < max_batch for n in queues.waiting[layer + 1 :]), "a deeper layer is full"
        batch = [s for chunk in queues.take(layer) for s in chunk.samples]
        assert 1 <= len(batch) <= max_batch
        ran[layer] += [submitted.index(s) for s in batch]
        assert ran[layer] == sorted(ran[layer]), "somebody was overtaken"
        staying = [s for s in batch if layer < num_layers and rng.random() < stay]
        left.extend(s for s in batch if s not in staying)
        if staying:
            queues.put(layer + 1, chunk_of(staying, now))
        behind = queues.waiting[2:]
        assert all(n < 2 * max_batch for n in behind)
        assert sum(behind) <= (num_layers - 1) * (max_batch - 1) + max_batch
        return True

    for arrivals, seconds in steps:
        now += seconds
        for _ in range(arrivals):
            submitted.append(sample(now))
            queues.put(1, Chunk([submitted[-1]], now))
        for _ in range(rng.randint(0, 3)):
            run_one(hurry=False)
    while run_one(hurry=True):
        pass
    assert len(left) == len(submitted) and set(left) == set(submitted)
    assert sum(queues.waiting) == 0


# Answers


@pytest.mark.parametrize("max_batch", [1, 3, 32])
@pytest.mark.parametrize("max_wait_s", [0.0, 0.002])
def test_every_request_of_every_thread_gets_its_own_answer_once(max_batch, max_wait_s):
    work = [requests(40, seed, exits=(0, 1, 2, 3, 4)) for seed in range(4)]
    answered = []

    with open_pool(max_batch=max_batch, max_wait_s=max_wait_s, max_pending=max(max_batch, 48)) as pool:

        def client(i):
            futures = [(ids, pool.submit(ids)) for ids in work[i]]
            for ids, future in futures:
                future.add_done_callback(answered.append)
                check_answer(future.result(LONG), ids)

        together(4, client)
    assert len(answered) == len(set(answered)) == 160
    stats = pool.stats()
    assert (stats.submitted, stats.answered, stats.pending) == (160, 160, 0)


@settings(deadline=None, max_examples=25)
@given(
    work=st.lists(st.tuples(st.integers(0, LAYERS), st.integers(0, LAYERS), st.booleans()), max_size=40),
    max_batch=st.integers(1, 8),
    max_wait_s=st.sampled_from([0.0, 0.0005, NEVER]),
    max_stall_s=st.sampled_from([0.0, 0.0005, NEVER]),
    room=st.integers(0, 20),
)
def test_random_schedules_with_failures_and_cancellations(work, max_batch, max_wait_s, max_stall_s, room):
    """Each request ends in the one way that it asks for."""
    limits = {"max_batch": max_batch, "max_wait_s": max_wait_s, "max_stall_s": max_stall_s}
    futures = []
    with open_pool(**limits, max_pending=max_batch + room) as pool:
        for i, (exit_layer, fault, cancel) in enumerate(work):
            ids = [exit_layer, fault, i % IDS]
            futures.append((ids, pool.submit(ids), cancel))
            if cancel:
                futures[-1][1].cancel()
    for ids, future, cancel in futures:
        exit_layer, fault, _ = ids
        if cancel and future.cancelled():
            continue
        if 1 <= fault <= (exit_layer or LAYERS):
            with pytest.raises(Fault, match=f"layer {fault}"):
                future.result(0)
        else:
            check_answer(future.result(0), ids)
    stats = pool.stats()
    assert stats.pending == 0
    assert stats.cancelled == sum(future.cancelled() for _, future, _ in futures)
    assert stats.submitted == len(work) == stats.answered + stats.failed + stats.cancelled


def test_token_types_go_with_their_request():
    with open_pool() as pool:
        with_types = [([2, 0, 5, i], [0, 1, 2, i % TOKEN_TYPES]) for i in range(6)]
        futures = [pool.submit(ids, types) for ids, types in with_types]
        plain = pool.submit([3, 0, 7])
    for (ids, types), future in zip(with_types, futures, strict=True):
        check_answer(future.result(0), ids, types)
    check_answer(plain.result(0), [3, 0, 7])


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor, np.uint8, torch.int32])
def test_forms_of_a_request(form):
    ids = [2, 0, 9, 4]
    if form is np.uint8:
        given_ids = np.array(ids, np.uint8)
    elif form is torch.int32:
        given_ids = torch.tensor(ids, dtype=torch.int32)
    else:
        given_ids = form(ids)
    with open_pool() as pool:
        future = pool.submit(given_ids)
        if isinstance(given_ids, np.ndarray):
            given_ids[:] = 1  # the pool has its own copy
    check_answer(future.result(0), ids)


def test_logits_hold_no_more_than_those_of_the_samples_that_left_together():
    with open_pool(max_batch=8) as pool:
        futures = [pool.submit([1 + (i > 4), 0, i]) for i in range(8)]
    for i, future in enumerate(futures):
        answer = future.result(0)
        assert isinstance(answer, PoolAnswer)
        assert answer.logits.untyped_storage().nbytes() == (3 if i > 4 else 5) * 3 * 4
        assert not answer.logits.requires_grad and not answer.logits.is_inference()


def test_never_runs_no_student():
    model = TracingModel(LAYERS)
    with open_pool(model, never=True) as pool:
        futures = [pool.submit(ids) for ids in requests(12)]
    assert {future.result(0).exit_layer for future in futures} == {LAYERS}
    assert set(model.classified) == {LAYERS}
    assert [layer for layer, _ in model.log] == [1, 2, 3, 4] * 3


# A real model


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("rule", ["never", "middle", "always", "patience"])
def test_answers_are_those_of_infer(family, rule):
    model = make_model(family)
    lengths = [9, 4, 1, 12, 6, 12, 2, 7, 3, 5, 11]
    ids, mask = make_batch(lengths)
    speeds = {"never": 0.0, "middle": middle_speed(model, ids, mask), "always": 1.0}
    choice = {"criterion": Patience(1)} if rule == "patience" else {"speed": speeds[rule]}
    types = torch.randint(0, 2, ids.shape) if family == "bert" else None
    with ExitPool(model, **choice, max_batch=3) as pool:
        futures = [
            pool.submit(ids[i, :n], None if types is None or i % 3 == 0 else types[i, :n])
            for i, n in enumerate(lengths)
        ]
    for i, (n, future) in enumerate(zip(lengths, futures, strict=True)):
        own_types = None if types is None or i % 3 == 0 else types[i : i + 1, :n]
        expected = model.infer(ids[i : i + 1, :n], token_type_ids=own_types, **choice)
        answer = future.result(0)
        assert answer.exit_layer == expected.exit_layer.item()
        assert answer.prediction == expected.prediction.item()
        torch.testing.assert_close(answer.logits, expected.logits[0], rtol=1e-4, atol=1e-5)
        assert answer.uncertainty == pytest.approx(expected.uncertainty.item(), rel=1e-3, abs=1e-5)
    layers = {future.result(0).exit_layer for future in futures}
    assert layers == {"never": {model.num_layers}, "always": {1}}.get(rule, layers)
    assert rule != "middle" or len(layers) > 1


def test_a_real_model_with_nan_weights_in_one_word():
    model = make_model()
    with torch.no_grad():
        model.encoder.embeddings.word.weight[7] = float("nan")
    with ExitPool(model, speed=1.0, max_batch=4) as pool:
        futures = [pool.submit([5, 7 if i == 2 else 6, 8]) for i in range(4)]
    for i, future in enumerate(futures):
        answer = future.result(0)
        assert answer.logits.isnan().all() if i == 2 else answer.logits.isfinite().all()
        assert answer.exit_layer == (model.num_layers if i == 2 else 1)


# Batches, memory, deadlines


def test_batches_are_full_at_every_depth_under_load():
    model = TracingModel(LAYERS)
    model.gate.clear()
    with open_pool(model, max_batch=8, max_pending=96) as pool:
        work = [requests(300, seed) for seed in range(3)]

        def client(i):
            if i == 3:
                model.entered.wait(LONG)
                model.gate.set()
                return
            for ids in work[i]:
                pool.submit(ids, timeout=LONG)

        together(4, client)
    layers = pool.stats().layers
    assert layers[0].samples == 900
    assert all(layer.mean_fill >= 0.9 for layer in layers), layers
    assert sum(layer.answered for layer in layers) == 900


def test_waiting_hidden_states_are_bounded_whatever_is_pending():
    model = TracingModel(LAYERS)
    max_batch, tokens = 4, 4
    peak = 0

    def measure(layer):
        nonlocal peak
        queues = list(pool._queues._queues[2:])
        storages = {
            chunk.hidden.untyped_storage().data_ptr(): chunk.hidden.untyped_storage().nbytes()
            for queue in queues
            for chunk in queue
        }
        peak = max(peak, sum(storages.values()))

    model.at_layer = measure
    rng = random.Random(0)
    with open_pool(model, max_batch=max_batch, max_wait_s=0.0) as pool:
        for _ in range(600):
            pool.submit([rng.choice((2, 4, 4, 4)), 0, *rng.choices(range(IDS), k=tokens - 2)])
    assert peak > 0
    assert peak <= 2 * max_batch * LAYERS * tokens * 3 * 4


def test_a_batch_that_is_not_full_waits_for_max_wait():
    model = TracingModel(LAYERS)
    with open_pool(model, max_wait_s=0.3) as pool:
        futures = [pool.submit([4, 0, 1]), pool.submit([1, 0, 2])]
        assert futures[0].result(LONG).latency_s >= 0.3
        assert model.log == [(1, 2), (2, 1), (3, 1), (4, 1)]


def test_a_full_batch_does_not_wait():
    model = TracingModel(LAYERS)
    with open_pool(model, max_batch=2) as pool:
        pool.submit([2, 0])
        time.sleep(0.02)  # the pool's thread sleeps until the first is due, and has to be woken
        pool.submit([2, 0]).result(LONG / 2)
        assert model.log == [(1, 2), (2, 2)]


def test_a_full_pool_does_not_wait_for_a_full_batch():
    model = TracingModel(LAYERS)
    with open_pool(model, max_batch=4, max_pending=4) as pool:
        for ids in requests(3):
            pool.submit(ids)
        time.sleep(0.02)
        for ids in requests(40):
            pool.submit(ids, timeout=LONG / 2)


def test_a_stalled_sample_runs_ahead_of_full_batches():
    model = TracingModel(LAYERS)
    model.gate.clear()
    with open_pool(model, max_batch=4, max_stall_s=0.0) as pool:
        pool.submit([1, 0])
        assert model.entered.wait(LONG)
        for i in range(40):
            pool.submit([4 if i == 0 else 1, 0, i])
        model.gate.set()
    # Without max_stall_s nine full batches of layer 1 come before layer 2.
    assert model.log[:5] == [(1, 1), (1, 4), (2, 1), (3, 1), (4, 1)]


# Backpressure


def test_submit_blocks_at_max_pending_and_goes_on_when_there_is_room():
    model = TracingModel(LAYERS)
    model.gate.clear()
    with open_pool(model, max_batch=2, max_pending=4) as pool:
        futures = [pool.submit([1, 0, i]) for i in range(4)]
        with pytest.raises(TimeoutError, match="max_pending = 4"):
            pool.submit([1, 0], timeout=0.01)
        with pytest.raises(TimeoutError):
            pool.submit([1, 0], timeout=0)
        assert pool.stats().submitted == pool.stats().pending == 4

        def client(i):
            if i == 8:
                model.gate.set()
            else:
                futures.append(pool.submit([1, 0, i]))

        together(9, client)
    assert pool.stats().answered == len(futures) == 12
    assert all(future.done() for future in futures)


def test_a_callback_cannot_wait_for_room_that_only_its_thread_makes():
    model = TracingModel(LAYERS)
    model.gate.clear()
    caught = []
    called = threading.Event()

    def again(future):
        for _ in range(2):
            try:
                caught.append(pool.submit([1, 0]))
            except RuntimeError as error:
                caught.append(error)
        called.set()

    with open_pool(model, max_batch=1, max_pending=2) as pool:
        pool.submit([1, 0]).add_done_callback(again)
        pool.submit([2, 0])
        model.gate.set()
        assert called.wait(LONG)
    assert caught[0].result(0).exit_layer == 1
    assert isinstance(caught[1], RuntimeError) and "callback" in str(caught[1])


# Cancelling and closing


def test_a_request_cancelled_before_layer_1_never_runs():
    model = TracingModel(LAYERS)
    with open_pool(model) as pool:
        gone, stays = pool.submit([3, 0, 1]), pool.submit([3, 0, 2])
        assert gone.cancel()
    assert wait([gone], 0).done  # waiters have been told
    check_answer(stays.result(0), [3, 0, 2])
    assert model.log == [(1, 1), (2, 1), (3, 1)]
    stats = pool.stats()
    assert (stats.answered, stats.cancelled, stats.pending) == (1, 1, 0)


def test_a_request_cancelled_on_its_way_goes_no_further():
    model = TracingModel(LAYERS)

    def cancel_at_layer_2(layer):
        if layer == 2:
            assert gone.cancel()

    model.at_layer = cancel_at_layer_2
    with open_pool(model, max_batch=3) as pool:
        gone, *others = [pool.submit([4, 0, i]) for i in range(3)]
    assert model.log == [(1, 3), (2, 3), (3, 2), (4, 2)]
    assert wait([gone], 0).done
    for i, future in enumerate(others, start=1):
        check_answer(future.result(0), [4, 0, i])


def test_all_of_a_batch_cancelled():
    model = TracingModel(LAYERS)
    with open_pool(model) as pool:
        for future in [pool.submit([3, 0, i]) for i in range(3)]:
            future.cancel()
    assert model.log == [] and pool.stats().cancelled == 3


def test_close_answers_what_is_inside():
    with open_pool() as pool:
        work = requests(30)
        futures = [pool.submit(ids) for ids in work]
        pool.close()
        assert all(future.done() for future in futures)
        pool.close()
        pool.close(drain=False)
    for ids, future in zip(work, futures, strict=True):
        check_answer(future.result(0), ids)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit([1, 0])


def test_close_without_drain_finishes_the_batch_that_runs_and_cancels_the_rest():
    model = TracingModel(LAYERS)
    model.gate.clear()
    pool = open_pool(model, max_batch=2, max_pending=6)
    futures = [pool.submit([1 + i % 2, 0, i]) for i in range(6)]
    model.entered.wait(LONG)
    waiters = []

    def act(i):
        if i == 0:
            pool.close(drain=False)
        elif i == 1:
            while not pool._closing:
                time.sleep(0.001)
            model.gate.set()
        else:
            with pytest.raises(RuntimeError, match="closed"):
                pool.submit([1, 0], timeout=LONG)
            waiters.append(i)

    together(4, act)
    assert sorted(waiters) == [2, 3]
    check_answer(futures[0].result(0), [1, 0, 0])
    for future in futures[1:]:
        with pytest.raises(CancelledError):
            future.result(0)
    assert not wait(futures, 0).not_done
    stats = pool.stats()
    assert (stats.answered, stats.cancelled, stats.pending) == (1, 5, 0)


@pytest.mark.parametrize("drain", [True, False])
def test_close_wakes_everybody_who_waits_for_room(drain):
    model = TracingModel(LAYERS)
    model.gate.clear()
    pool = open_pool(model, max_batch=1, max_pending=1)
    pool.submit([1, 0])

    def act(i):
        if i == 0:
            time.sleep(0.05)  # the others are waiting
            threading.Timer(0.02, model.gate.set).start()
            pool.close(drain)
        else:
            with pytest.raises(RuntimeError, match="closed"):
                pool.submit([1, 0])

    together(5, act)


def test_an_exception_in_the_with_block_cancels_and_does_not_hang():
    with pytest.raises(KeyError), open_pool() as pool:
        future = pool.submit([4, 0])
        raise KeyError
    assert future.cancelled()


def test_a_callback_may_close_the_pool():
    with open_pool(max_batch=1) as pool:
        future = pool.submit([1, 0])
        future.add_done_callback(lambda _: pool.close())
        future.result(LONG)


# Failures


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
def test_only_the_sample_at_fault_fails(layer):
    model = TracingModel(LAYERS)
    with open_pool(model, max_batch=5) as pool:
        futures = [pool.submit([4, layer * (i == 2), i]) for i in range(5)]
        wait(futures, LONG / 2, FIRST_COMPLETED)
        after = pool.submit([1, 0])
    with pytest.raises(Fault, match=f"layer {layer}"):
        futures[2].result(0)
    for i in (0, 1, 3, 4):
        check_answer(futures[i].result(0), [4, 0, i])
    assert after.result(0).exit_layer == 1
    stats = pool.stats()
    assert (stats.answered, stats.failed, stats.pending) == (5, 1, 0)
    assert stats.layers[layer - 1].samples == 4 + (layer == 1)


@pytest.mark.parametrize("part", ["embed", "classify"])
def test_a_batch_that_fails_once_is_answered_one_by_one(part, monkeypatch):
    model = TracingModel(LAYERS)
    original = getattr(model, part)
    calls = []

    def fails_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("once")
        return original(*args, **kwargs)

    monkeypatch.setattr(model, part, fails_once)
    work = requests(4)
    with open_pool(model) as pool:
        futures = [pool.submit(ids) for ids in work]
    for ids, future in zip(work, futures, strict=True):
        check_answer(future.result(0), ids)


def test_nan_goes_to_the_last_layer_and_harms_nobody():
    with open_pool() as pool:
        futures = [pool.submit([0 if i == 1 else 2, 0, i]) for i in range(4)]
    for i, future in enumerate(futures):
        check_answer(future.result(0), [0 if i == 1 else 2, 0, i])


@pytest.mark.parametrize("place", ["choosing", "answering"])
def test_a_fault_of_the_pool_itself_fails_everybody(place, monkeypatch):
    model = TracingModel(LAYERS)
    model.gate.clear()
    pool = open_pool(model, max_batch=2)
    boom = AssertionError("boom")

    def broken(*args):
        raise boom

    futures = [pool.submit([1, 0]) for _ in range(5)]
    assert model.entered.wait(LONG)
    futures[4].cancel()
    target = (pool._queues, "take") if place == "choosing" else (pool._tally, "answer")
    monkeypatch.setattr(*target, broken)
    model.gate.set()
    assert not wait(futures, LONG).not_done
    answered = 2 if place == "choosing" else 0
    assert [future.exception(0) for future in futures[answered:4]] == [boom] * (4 - answered)
    assert futures[4].cancelled()
    pool._worker.join(LONG)
    with pytest.raises(RuntimeError, match="failed") as caught:
        pool.submit([1, 0])
    assert caught.value.__cause__ is boom
    pool.close()
    stats = pool.stats()
    assert (stats.answered, stats.failed, stats.cancelled) == (answered, 4 - answered, 1)


# Bad input


@pytest.mark.parametrize(
    ("ids", "token_types", "error", "message"),
    [
        ([], None, ValueError, "input_ids must be 1-D with at least one token"),
        (torch.tensor([], dtype=torch.int64), None, ValueError, "input_ids must be 1-D"),
        ([[1, 2]], None, ValueError, r"input_ids must be 1-D .* shape \(1, 2\)"),
        ([[1, 2], [3]], None, ValueError, "input_ids must be 1-D"),
        (7, None, ValueError, "input_ids must be 1-D"),
        (None, None, ValueError, "input_ids must be 1-D"),
        ([1] * 9, None, ValueError, "input_ids must have at most the model's 8 tokens, got 9"),
        ([1, IDS], None, ValueError, f"input_ids must be from 0 to {IDS - 1} .* got 1 to {IDS}"),
        ([1, -1], None, ValueError, "input_ids must be from 0"),
        ([2**63], None, ValueError, "input_ids must be from 0"),
        ([1, 2**70], None, TypeError, "input_ids must hold integers"),
        ([1.0, 2.0], None, TypeError, "input_ids must hold integers, got float64"),
        ([True, False], None, TypeError, "input_ids must hold integers, got bool"),
        (["a"], None, TypeError, "input_ids must hold integers"),
        (torch.ones(3, dtype=torch.bfloat16), None, TypeError, "input_ids must hold integers"),
        ([1, 0], [0], ValueError, "token_type_ids must be as long as input_ids, 2, got 1"),
        ([1, 0], [0, TOKEN_TYPES], ValueError, "token_type_ids must be from 0 to 2"),
        ([1, 0], [0.5, 0], TypeError, "token_type_ids must hold integers"),
    ],
)
def test_a_bad_request_is_refused_at_once(ids, token_types, error, message):
    with open_pool() as pool:
        good = pool.submit([1, 0])
        with pytest.raises(error, match=message):
            pool.submit(ids, token_types)
        assert pool.stats().submitted == 1
    check_answer(good.result(0), [1, 0])


def test_token_types_of_a_model_without():
    with (
        open_pool(TracingModel(LAYERS, type_vocab_size=0)) as pool,
        pytest.raises(ValueError, match="no token types"),
    ):
        pool.submit([1, 0], [0, 0])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_batch": 0}, "max_batch must be an integer from 1"),
        ({"max_batch": 2.5}, "max_batch must be an integer"),
        ({"max_batch": 8, "max_pending": 7}, "max_pending must be an integer from 8 on, got int 7"),
        ({"max_wait_s": -1}, "max_wait_s must be seconds"),
        ({"max_wait_s": float("nan")}, "max_wait_s must be seconds"),
        ({"max_stall_s": float("inf")}, "max_stall_s must be seconds"),
    ],
)
def test_bad_limits(limits, message):
    with pytest.raises(ValueError, match=message):
        open_pool(**limits)


def test_a_model_in_training_mode_is_refused():
    model = TracingModel(LAYERS)
    model.encoder.train()
    with pytest.raises(ValueError, match="model must be in eval mode, in training mode are: encoder"):
        open_pool(model)


@pytest.mark.parametrize("choice", [{}, {"speed": 0.5, "criterion": TracingCriterion()}])
def test_speed_or_criterion(choice):
    with pytest.raises(ValueError, match="criterion"):
        ExitPool(TracingModel(LAYERS), **choice)


# Statistics


def test_stats_of_a_run():
    model = TracingModel(LAYERS)
    with open_pool(model, max_batch=2) as pool:
        stats = pool.stats()
        assert stats.submitted == 0 and np.isnan(stats.latency_p50_s) and np.isnan(stats.layers[0].mean_fill)
        for ids in ([1, 0], [2, 0], [4, 0]):
            pool.submit(ids)
    stats = pool.stats()
    assert [(s.batches, s.samples, s.answered, s.mean_fill) for s in stats.layers] == [
        (2, 3, 1, 0.75),
        (1, 2, 1, 1.0),
        (1, 1, 0, 0.5),
        (1, 1, 1, 0.5),
    ]
    assert 0 < stats.latency_p50_s <= stats.latency_p95_s <= stats.latency_p99_s < LONG
    assert stats.throughput > 0


def test_percentiles_and_throughput_of_a_bounded_window():
    tally = Tally(num_layers=2, max_batch=4)
    for i in range(WINDOW + 101):
        tally.answer(1, submitted=float(i), latency=1e6 if i < 101 else 0.001 * (i % 101))
    stats = tally.stats()
    assert stats.latency_p50_s == pytest.approx(0.050, abs=0.002)
    assert stats.latency_p95_s == pytest.approx(0.095, abs=0.002)
    assert stats.latency_p99_s == pytest.approx(0.099, abs=0.002)
    assert stats.throughput == pytest.approx(1.0, rel=1e-3)
