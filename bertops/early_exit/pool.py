"""Early exit for requests that come one by one: full batches at every depth."""

import atexit
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import accumulate
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bertops.early_exit.criteria import Criterion, criterion_of
from bertops.early_exit.pool_stats import PoolStats, Tally
from bertops.early_exit.queues import Chunk, LayerQueues, Sample
from bertops.ops import _checks
from bertops.ops.compact import compact_packed
from bertops.ops.exit_decision import ExitDecision

if TYPE_CHECKING:
    from bertops.models.fastbert import FastBert


class PoolAnswer(NamedTuple):
    """What a request gets."""

    prediction: int
    logits: Tensor  # (C,), on the CPU; shares storage with those of the samples that left together with it
    exit_layer: int  # from 1
    uncertainty: float
    latency_s: float  # from the moment the pool took the request


Outcome = tuple[Sample, PoolAnswer | BaseException | None]  # None: the caller cancelled


class ExitPool:
    """Runs requests through an early-exit model, each until it is certain, in batches that stay full.

    Where some samples of a batch leave after a layer, those that stay wait in the queue of the next layer for
    more from later batches. One thread runs the layers; ``submit`` may be called from any number of threads::

        with ExitPool(model, speed=0.5) as pool:
            futures = [pool.submit(ids) for ids in requests]
            predictions = [future.result().prediction for future in futures]

    Which layer runs next: the deepest at which ``max_batch`` samples wait, or whose first sample has stood
    there for ``max_stall_s``. If there is none, the layer of the oldest sample once that one has waited for
    ``max_wait_s`` since it was taken; while nobody new can enter (the pool is full, or closed), the
    shallowest at once. So a sample is never stuck: past the first queue it stands at each layer for at most
    ``max_stall_s`` and the batches of the deeper layers, however many requests follow.

    Memory: whatever ``max_pending`` is, the hidden states of fewer than 2 * max_batch * num_layers sequences
    are kept besides the batch that runs. Requests before layer 1 are kept as ids.

    Answers are those of ``model.infer``, up to rounding where batch mates differ. A sample whose logits are
    NaN never exits early and gets the last layer's answer. Where a batch raises, its samples run that layer
    again one by one, and only those that raise once more fail, with that exception in their future.

    Until its answer is there a request can be cancelled by ``future.cancel()``; it is dropped before layer 1,
    or after the layer at which it stands has run. A callback of a future runs on the pool's thread and holds
    up the layers while it does.

    The model stays as it is while the pool is open: in eval mode, on its device. ``torch.autocast`` and other
    settings of the calling thread do not reach the pool's. A thread that computes in pure Python keeps the
    interpreter for up to ``sys.getswitchinterval()`` each time that the pool's thread comes back from an
    op; lower that interval if such threads run beside the pool.

    Args:
        model: a :class:`bertops.models.FastBert` in eval mode.
        speed: in [0, 1], the normalized entropy up to which a sample exits. Either this or ``criterion``.
        criterion: when a sample exits, of :mod:`bertops.early_exit.criteria`.
        max_batch: samples that run a layer together at most.
        max_wait_s: seconds that a sample waits for batch mates, all layers together, before layers run with
            fewer than ``max_batch``. More gives fuller batches where requests are few, 0 runs at once.
        max_stall_s: seconds that a sample stands at one layer before that layer runs ahead of full ones. At
            most num_layers batches in this time are not full under load.
        max_pending: requests inside the pool at most, the answered ones not counted. For full batches at
            every depth at least max_batch * num_layers.

    Raises:
        ValueError, TypeError: an argument does not fit, or the model is in training mode; names it.

    Source: the pool that users of FastBERT (Liu et al. 2020) ask for, where one hard sample slows down its
    whole batch.
    """

    def __init__(
        self,
        model: "FastBert",
        *,
        speed: float | None = None,
        criterion: Criterion | None = None,
        max_batch: int = 32,
        max_wait_s: float = 0.01,
        max_stall_s: float = 1.0,
        max_pending: int = 1024,
    ) -> None:
        self._criterion = criterion_of(speed, criterion)
        _check_limits(max_batch, max_wait_s, max_stall_s, max_pending)
        training = [name or type(model).__name__ for name, m in model.named_modules() if m.training]
        if training:
            raise ValueError(f"model must be in eval mode, in training mode are: {', '.join(training[:4])}")
        self._model = model
        self._device = next(model.parameters()).device
        self._max_pending = max_pending

        self._lock = threading.Lock()  # guards all below
        self._work = threading.Condition(self._lock)  # the worker waits for something to run
        self._room = threading.Condition(self._lock)  # submit waits for max_pending
        self._queues = LayerQueues(model.num_layers, max_batch, max_wait_s, max_stall_s)
        self._inside: set[Sample] = set()  # taken, and neither answered nor failed nor dropped
        self._tally = Tally(model.num_layers, max_batch)
        self._closing = False
        self._cancelling = False
        self._error: BaseException | None = None

        self._worker = threading.Thread(target=self._run_all, name="bertops.ExitPool", daemon=True)
        self._worker.start()
        atexit.register(self.close, drain=False)  # a thread inside an op must not outlive the interpreter

    def submit(
        self,
        input_ids: Sequence[int] | Tensor | NDArray,
        token_type_ids: Sequence[int] | Tensor | NDArray | None = None,
        *,
        timeout: float | None = None,
    ) -> "Future[PoolAnswer]":
        """Takes one request; returns the future of its :class:`PoolAnswer`.

        Blocks while ``max_pending`` requests are inside.

        Args:
            input_ids: (N,) integers, from 1 to ``model.max_length`` of them.
            token_type_ids: (N,) integers, 0 by default.
            timeout: seconds to wait for room, None for as long as it takes.

        Raises:
            ValueError, TypeError: the request does not fit the model; names the argument. Nothing was taken.
            TimeoutError: no room within ``timeout``.
            RuntimeError: the pool is closed, or has failed, which is then the cause; or it is full and the
                call comes from a callback on the pool's own thread, which alone could make room.
        """
        ids, token_types = self._read_request(input_ids, token_type_ids)
        with self._lock:
            if len(self._inside) >= self._max_pending and threading.current_thread() is self._worker:
                raise RuntimeError("submit in a callback of a future cannot wait for room in the full pool")
            if not self._room.wait_for(self._admits_or_closed, timeout):
                raise TimeoutError(f"max_pending = {self._max_pending} requests are inside after {timeout} s")
            if self._error is not None:
                raise RuntimeError(f"the pool has failed: {self._error!r}") from self._error
            if self._closing:
                raise RuntimeError("the pool is closed")
            now = time.monotonic()
            sample = Sample(ids, token_types, now, Future())
            self._inside.add(sample)
            self._tally.submitted += 1
            self._queues.put(1, Chunk([sample], now))
            # The worker sleeps until the oldest sample is due: these are the only other reasons to wake it.
            first, filled = len(self._inside) == 1, self._queues.waiting[1] == self._queues.max_batch
            if first or filled or len(self._inside) == self._max_pending:
                self._work.notify()
        return sample.future

    def stats(self) -> PoolStats:
        """Counts so far, and latency and throughput of the last answers."""
        with self._lock:
            return self._tally.stats()

    def close(self, drain: bool = True) -> None:
        """Takes no more requests, ends the work that is inside, and waits for that.

        Leaving the ``with`` block closes with ``drain``, leaving it by an exception without. Closing again is
        fine; without ``drain`` it cancels what another close still drains. From a callback of a future it
        does not wait.

        Args:
            drain: answer everything that is inside. False: only the batch that runs is finished, and every
                future without an answer is cancelled.
        """
        with self._lock:
            self._closing = True
            self._cancelling |= not drain
            self._work.notify()
            self._room.notify_all()
        if threading.current_thread() is not self._worker:
            self._worker.join()
            atexit.unregister(self.close)

    def __enter__(self) -> "ExitPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def _admits_or_closed(self) -> bool:
        return self._closing or len(self._inside) < self._max_pending

    def _read_request(
        self, input_ids: object, token_type_ids: object
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        config = self._model.encoder.config
        ids = _read_ids("input_ids", input_ids, config.vocab_size, "vocab_size")
        if len(ids) > self._model.max_length:
            raise ValueError(
                f"input_ids must have at most the model's {self._model.max_length} tokens, got {len(ids)}"
            )
        if token_type_ids is None:
            return ids, None
        if config.type_vocab_size == 0:
            raise ValueError("token_type_ids must be None: the model has no token types")
        token_types = _read_ids("token_type_ids", token_type_ids, config.type_vocab_size, "type_vocab_size")
        if len(token_types) != len(ids):
            raise ValueError(
                f"token_type_ids must be as long as input_ids, {len(ids)}, got {len(token_types)}"
            )
        return ids, token_types

    def _run_all(self) -> None:
        """The worker thread."""
        try:
            with torch.no_grad():
                while (batch := self._next_batch()) is not None:
                    self._run(*batch)
        except BaseException as error:  # a fault of the pool itself: nobody may wait for it forever
            with self._lock:
                self._error = error
                self._closing = True
                self._room.notify_all()
            self._settle([(sample, error) for sample in list(self._inside)])
            return
        for sample in self._inside:
            sample.future.cancel()
        self._settle([(sample, None) for sample in self._inside])

    def _next_batch(self) -> tuple[int, list[Chunk]] | None:
        """Waits for a layer to run; None when the pool is closed and nothing is left to do."""
        with self._lock:
            while not self._cancelling:
                now = time.monotonic()
                hurry = self._closing or len(self._inside) >= self._max_pending
                layer = self._queues.next_layer(now, hurry)
                if layer is not None:
                    return layer, self._queues.take(layer)
                if self._closing:
                    return None
                due = self._queues.due()
                self._work.wait(None if due is None else due - now)
        return None

    def _run(self, layer: int, chunks: list[Chunk]) -> None:
        """Runs ``layer``; its samples are answered, fail, or go on to the next."""
        if layer == 1 and (dropped := [c for c in chunks if c.samples[0].future.cancelled()]):
            self._settle([(chunk.samples[0], None) for chunk in dropped])
            chunks = [chunk for chunk in chunks if chunk not in dropped]
        samples = [sample for chunk in chunks for sample in chunk.samples]
        if not samples:
            return
        try:
            outcomes, staying = self._advance(layer, chunks, samples)
        except Exception as error:  # the model's: it goes to the sample that causes it
            if len(samples) == 1:
                self._settle([(samples[0], error)])
                return
            outcomes = None
        if outcomes is None:
            for chunk in chunks:
                for single in chunk.singles():
                    self._run(layer, [single])
            return
        with self._lock:
            self._tally.ran(layer, len(samples))
            if staying is not None:
                self._queues.put(layer + 1, staying)
        self._settle(outcomes)

    def _advance(
        self, layer: int, chunks: list[Chunk], samples: list[Sample]
    ) -> tuple[list[Outcome], Chunk | None]:
        """Runs the model and changes nothing in the pool: what came of the samples, and those that go on."""
        lengths = [len(sample.input_ids) for sample in samples]
        offsets = [0, *accumulate(lengths)]
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=self._device)
        hidden, state = self._embed(samples, cu_seqlens) if layer == 1 else _join(chunks)
        hidden = self._model.run_layer(layer, hidden, cu_seqlens=cu_seqlens)

        answers: list[PoolAnswer | None] = [None] * len(samples)
        if layer == self._model.num_layers or not self._criterion.never:
            logits = self._model.classify(layer, hidden, cu_seqlens=cu_seqlens, longest=max(lengths))
            decision, state = self._criterion.decide(logits, state)
            answers = self._read_answers(layer, logits, decision, samples)

        outcomes: list[Outcome] = []
        kept = []
        for row, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
            if answer is not None or sample.future.cancelled():
                outcomes.append((sample, answer))
            else:
                kept.append(row)
        if not kept:
            return outcomes, None
        if outcomes:
            order = torch.tensor(kept, device=self._device)
            num_tokens = sum(lengths[row] for row in kept)
            hidden, _ = compact_packed(hidden, cu_seqlens, order, len(kept), num_tokens=num_tokens)
            state = state.index_select(0, order)
        return outcomes, Chunk([samples[row] for row in kept], time.monotonic(), hidden, state)

    def _embed(self, samples: list[Sample], cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (1, T, H) and the criterion's first state."""

        def packed(rows: list[NDArray[np.int64]]) -> Tensor:
            return torch.from_numpy(np.concatenate(rows)).to(self._device)[None]

        input_ids = packed([sample.input_ids for sample in samples])
        token_types = None
        if any(sample.token_type_ids is not None for sample in samples):
            token_types = packed(
                [
                    np.zeros_like(sample.input_ids)
                    if sample.token_type_ids is None
                    else sample.token_type_ids
                    for sample in samples
                ]
            )
        hidden = self._model.embed(input_ids, token_type_ids=token_types, cu_seqlens=cu_seqlens)
        return hidden, self._criterion.start(len(samples), self._device)

    def _read_answers(
        self, layer: int, logits: Tensor, decision: ExitDecision, samples: list[Sample]
    ) -> list[PoolAnswer | None]:
        """Of every sample that leaves, None for those that stay."""
        answers: list[PoolAnswer | None] = [None] * len(samples)
        if layer == self._model.num_layers:
            leaving = list(range(len(samples)))
        else:
            leaving = [row for row, exited in enumerate(decision.exited.tolist()) if exited]
        if not leaving:
            return answers
        prediction, uncertainty = decision.prediction.tolist(), decision.uncertainty.tolist()
        rows = logits.cpu()[leaving].unbind()
        now = time.monotonic()
        for row, row_logits in zip(leaving, rows, strict=True):
            latency = now - samples[row].submitted
            answers[row] = PoolAnswer(prediction[row], row_logits, layer, uncertainty[row], latency)
        return answers

    def _settle(self, outcomes: list[Outcome]) -> None:
        """The samples leave the pool, then their futures get what came of them."""
        if not outcomes:
            return
        futures = [sample.future for sample, _ in outcomes]
        # Running already: a fault of the pool came while it was being answered.
        live = [future.running() or future.set_running_or_notify_cancel() for future in futures]
        with self._lock:
            for (sample, outcome), alive in zip(outcomes, live, strict=True):
                if not alive:
                    self._tally.cancelled += 1
                elif isinstance(outcome, PoolAnswer):
                    self._tally.answer(outcome.exit_layer, sample.submitted, outcome.latency_s)
                else:
                    self._tally.failed += 1
            self._inside.difference_update([sample for sample, _ in outcomes])
            self._room.notify(len(outcomes))
        for future, (_, outcome), alive in zip(futures, outcomes, live, strict=True):
            if not alive:
                continue
            if isinstance(outcome, PoolAnswer):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)


def _join(chunks: list[Chunk]) -> tuple[Tensor, Tensor]:
    """Hidden states (1, T, H) and state of all chunks."""
    hidden = [chunk.hidden for chunk in chunks if chunk.hidden is not None]
    state = [chunk.state for chunk in chunks if chunk.state is not None]
    if len(chunks) == 1:
        return hidden[0], state[0]
    return torch.cat(hidden, dim=1), torch.cat(state)


def _read_ids(name: str, ids: object, num_rows: int, size: str) -> NDArray[np.int64]:
    """A copy of ``ids``, all of them rows of a table of ``num_rows``, which is the config's ``size``."""
    try:
        array = np.asarray(ids.tolist() if isinstance(ids, Tensor) else ids)
    except ValueError as error:
        raise ValueError(f"{name} must be 1-D, got nested sequences of several lengths") from error
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be 1-D with at least one token, got shape {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    low, high = array.min(), array.max()
    if low < 0 or high >= num_rows:
        raise ValueError(
            f"{name} must be from 0 to {num_rows - 1} ({size} is {num_rows}), got {low} to {high}"
        )
    return array.astype(np.int64)


def _check_limits(max_batch: int, max_wait_s: float, max_stall_s: float, max_pending: int) -> None:
    for name, count, least in (("max_batch", max_batch, 1), ("max_pending", max_pending, max_batch)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"{name} must be an integer from {least} on, got {_checks.describe(count)}")
    for name, seconds in (("max_wait_s", max_wait_s), ("max_stall_s", max_stall_s)):
        if not 0 <= seconds <= threading.TIMEOUT_MAX:
            raise ValueError(f"{name} must be seconds from 0 to {threading.TIMEOUT_MAX:g}, got {seconds!r}")
