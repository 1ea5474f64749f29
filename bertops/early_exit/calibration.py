"""Chooses the speed of an early-exit model on labelled data: by accuracy, or by measured time."""

import io
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bertops._files import write_whole
from bertops.early_exit.criteria import Criterion, NormalizedEntropy
from bertops.early_exit.flops import exit_flops, full_flops
from bertops.ops.exit_decision import exit_decision

if TYPE_CHECKING:
    from bertops.models.fastbert import FastBert

SPEEDS = tuple(round((i / 100) ** 2, 4) for i in range(101))  # dense near 0: trained models are certain
TIMED, ROUNDS = 8, 5
REFINEMENTS = 4  # candidates timed after the first ones until one reaches the target
ROUNDING = 1e-9  # of a mean of counts
FULL = NormalizedEntropy(0.0)

Batch = tuple[Tensor, Tensor | None, Tensor]  # input_ids (B, N), mask (B, N), labels (B,)


@dataclass(frozen=True)
class CalibrationPoint:
    """One candidate speed on the calibration data."""

    speed: float
    accuracy: float  # in [0, 1]
    mean_exit_layer: float  # from 1
    flops_speedup: float  # FLOPs of the full model over those of the layers and classifiers that run
    measured_speedup: float | None = None  # time of the full model over time at this speed; None: not timed


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate_speed` found."""

    speed: float  # the chosen one
    full_accuracy: float  # of the last layer, in [0, 1]
    points: tuple[CalibrationPoint, ...]  # every candidate, in the order given

    @property
    def chosen(self) -> CalibrationPoint:
        return next(point for point in self.points if point.speed == self.speed)


def calibrate_speed(
    model: "FastBert",
    dev: Iterable[Batch],
    *,
    max_accuracy_drop: float | None = None,
    target_speedup: float | None = None,
    criterion: Callable[[float], Criterion] = NormalizedEntropy,
    speeds: Sequence[float] = SPEEDS,
    budget_s: float = 30.0,
) -> Calibration:
    """Finds the speed that accuracy affords, or the one that a speed-up needs.

    The logits of every exit are recorded once. What a candidate would answer, at which layer and for how many
    FLOPs then follows without running it. Time is measured: ``model.infer`` at some of the candidates and at
    the full model, in turns on the same batches.

    Args:
        model: in evaluation mode. It is timed where it stands, with the threads that are set.
        dev: batches of the size and lengths that will be served: ``input_ids`` (B, N), ``mask`` (B, N) or
            None, ``labels`` (B,) int64. Not the data on which the accuracy is reported afterwards.
        max_accuracy_drop: how far accuracy, in [0, 1], may lie below the full model's. Chosen is the
            candidate of the fewest FLOPs that stays above.
        target_speedup: from 1 on, time of the full model over time with exits. Chosen is a candidate that was
            measured to reach it, the first one by FLOPs as far as the timing tells.
        criterion: makes the criterion of a candidate, as :class:`bertops.early_exit.Entropy` does; its
            ``speeds`` then are nats.
        speeds: the candidates, arguments of ``criterion``.
        budget_s: about how long the timing may take, in seconds.

    Raises:
        TypeError, ValueError: an argument does not fit, or both or none of ``max_accuracy_drop`` and
            ``target_speedup`` are given; the message names it.
        ValueError: no candidate meets the demand; says what the most accurate or the fastest one reached.
    """
    if (max_accuracy_drop is None) == (target_speedup is None):
        raise ValueError(
            "give exactly one of max_accuracy_drop and target_speedup, "
            f"got {max_accuracy_drop!r} and {target_speedup!r}"
        )
    if max_accuracy_drop is not None and not 0 <= max_accuracy_drop <= 1:
        raise ValueError(f"max_accuracy_drop must be in [0, 1], got {max_accuracy_drop!r}")
    if target_speedup is not None and not 1 <= target_speedup < math.inf:
        raise ValueError(f"target_speedup must be at least 1 and finite, got {target_speedup!r}")
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval()")
    if not speeds:
        raise ValueError("speeds must hold at least one candidate, got none")
    batches = [check_batch(i, batch, model.num_labels) for i, batch in enumerate(dev)]
    if not any(len(labels) for _, _, labels in batches):
        raise ValueError("dev must hold at least one row, got none")

    recording = Recording(model, batches)
    full_accuracy = recording.point(0.0, FULL).accuracy
    points = [recording.point(speed, criterion(speed)) for speed in speeds]
    stopwatch = Stopwatch(model, batches, criterion, recording.seconds, budget_s)
    stopwatch.measure(spread(points))
    if max_accuracy_drop is not None:
        chosen = fastest_that_keeps(full_accuracy - max_accuracy_drop, points)
        stopwatch.measure([chosen])
    else:
        assert target_speedup is not None
        chosen = first_that_reaches(target_speedup, points, stopwatch)
    measured = stopwatch.speedups
    points = [replace(p, measured_speedup=measured.get(p.speed)) for p in points]
    return Calibration(chosen, full_accuracy, tuple(points))


def check_batch(index: int, batch: Batch, num_labels: int) -> Batch:
    if not isinstance(batch, tuple | list) or len(batch) != 3:
        raise TypeError(f"dev[{index}] must be (input_ids, mask, labels), got {type(batch).__name__}")
    input_ids, mask, labels = batch
    if labels.shape != input_ids.shape[:1]:
        raise ValueError(
            f"dev[{index}]: labels must have shape {tuple(input_ids.shape[:1])}, got {tuple(labels.shape)}"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
        raise ValueError(
            f"dev[{index}]: labels must be in [0, {num_labels}), "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    return input_ids, mask, labels


class Recording:
    """The logits of every layer on all batches, and what a criterion makes of them."""

    def __init__(self, model: "FastBert", batches: Sequence[Batch]) -> None:
        start = time.perf_counter()
        outputs = []
        with torch.inference_mode():
            for input_ids, mask, _ in batches:
                output = model(input_ids, mask)
                outputs.append([*output.student_logits, output.logits])
        self.seconds = time.perf_counter() - start
        self.logits = [torch.cat(layer) for layer in zip(*outputs, strict=True)]  # L of (rows, C)
        self.labels = torch.cat([labels for _, _, labels in batches]).to(self.logits[0].device)
        lengths = torch.cat([count_tokens(input_ids, mask) for input_ids, mask, _ in batches])
        found, self.length_of_row = lengths.cpu().unique(return_inverse=True)
        layers = range(1, model.num_layers + 1)
        costs = [[exit_flops(model, layer, n) for layer in layers] for n in found.tolist()]
        self.exit_flops = torch.tensor(costs, dtype=torch.float64).reshape(-1, model.num_layers)
        self.full_flops = torch.tensor([full_flops(model, n) for n in found.tolist()], dtype=torch.float64)

    def point(self, speed: float, criterion: Criterion) -> CalibrationPoint:
        prediction, layer = self.replay(criterion)
        full = self.full_flops[self.length_of_row].sum()
        spent = full if criterion.never else self.exit_flops[self.length_of_row, layer.cpu() - 1].sum()
        return CalibrationPoint(
            speed=speed,
            accuracy=float((prediction == self.labels).double().mean()),
            mean_exit_layer=float(layer.double().mean()),
            flops_speedup=float(full / spent) if full else 1.0,
        )

    def replay(self, criterion: Criterion) -> tuple[Tensor, Tensor]:
        """Prediction and exit layer (rows,) as ``infer`` finds them."""
        last = self.logits[-1]
        prediction = exit_decision(last, 1.0).prediction
        layer = torch.full_like(prediction, len(self.logits))
        if criterion.never:
            return prediction, layer
        inside = torch.ones_like(prediction, dtype=torch.bool)
        state = criterion.start(len(last), last.device)
        for number, logits in enumerate(self.logits[:-1], start=1):
            decision, state = criterion.decide(logits, state)
            leaves = inside & decision.exited
            prediction = torch.where(leaves, decision.prediction, prediction)
            layer[leaves] = number
            inside &= ~leaves
        return prediction, layer


def count_tokens(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """(B,): real tokens of every row."""
    real = torch.ones_like(input_ids) if mask is None else mask != 0
    return real.sum(1)


class Stopwatch:
    """Times ``infer`` at some speeds and at the full model, in turns: a slow moment hits both."""

    def __init__(
        self,
        model: "FastBert",
        batches: Sequence[Batch],
        criterion: Callable[[float], Criterion],
        seconds: float,
        budget_s: float,
    ) -> None:
        self.model, self.criterion = model, criterion
        runs = (ROUNDS + 1) * (TIMED + 2 * REFINEMENTS + 1)
        count = max(1, min(len(batches), int(budget_s / runs * len(batches) / max(seconds, 1e-9))))
        self.batches = [batches[i * len(batches) // count] for i in range(count)]
        self.speedups: dict[float, float] = {}

    def measure(self, speeds: Iterable[float]) -> None:
        """Adds to ``speedups`` what is not in it: the median over rounds, after one that warms up."""
        missing = [speed for speed in dict.fromkeys(speeds) if speed not in self.speedups]
        criteria = [FULL, *map(self.criterion, missing)]
        rounds = [self.one_round(criteria, turn) for turn in range(ROUNDS + 1 if missing else 0)]
        for number, speed in enumerate(missing, start=1):
            self.speedups[speed] = statistics.median(r[0] / r[number] for r in rounds[1:])

    def one_round(self, criteria: Sequence[Criterion], turn: int) -> list[float]:
        """Seconds of each over all batches; on every batch all of them, another one first each time."""
        seconds = [0.0] * len(criteria)
        for i, (input_ids, mask, _) in enumerate(self.batches):
            for place in range(len(criteria)):
                number = (place + turn + i) % len(criteria)
                synchronize(input_ids.device)
                start = time.perf_counter()
                self.model.infer(input_ids, mask, criterion=criteria[number])
                synchronize(input_ids.device)
                seconds[number] += time.perf_counter() - start
        return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(points: Sequence[CalibrationPoint]) -> list[float]:
    """``TIMED`` speeds whose FLOPs lie as evenly as they can, both ends among them."""
    speedups = [p.flops_speedup for p in points]
    slow, fast = min(speedups), max(speedups)
    wanted = [slow + (fast - slow) * i / (TIMED - 1) for i in range(TIMED)]
    nearest = [min(range(len(points)), key=[abs(x - w) for x in speedups].__getitem__) for w in wanted]
    return [points[i].speed for i in nearest]


def fastest_that_keeps(accuracy: float, points: Sequence[CalibrationPoint]) -> float:
    kept = [p for p in points if p.accuracy >= accuracy - ROUNDING]
    if not kept:
        best = max(points, key=lambda p: p.accuracy)
        raise ValueError(
            f"an accuracy of {accuracy:.4f} is out of reach: the most accurate candidate, {best.speed:g}, "
            f"has {best.accuracy:.4f} with a mean exit layer of {best.mean_exit_layer:.2f}"
        )
    return max(kept, key=lambda p: p.flops_speedup).speed


def first_that_reaches(target: float, points: Sequence[CalibrationPoint], stopwatch: Stopwatch) -> float:
    """Narrowed down from what is timed, between two of which time is taken to follow FLOPs."""
    point_of = {p.speed: p for p in points}
    for _ in range(REFINEMENTS):
        timed = sorted((point_of[s].flops_speedup, measured, s) for s, measured in stopwatch.speedups.items())
        reached = next((i for i, (_, measured, _) in enumerate(timed) if measured >= target), None)
        if reached is None:
            _, measured, fastest = max(timed, key=lambda t: t[1])
            raise ValueError(
                f"target_speedup {target:g} is out of reach: the fastest candidate, {fastest:g}, was "
                f"measured at {measured:.2f}, with accuracy {point_of[fastest].accuracy:.4f} and a mean "
                f"exit layer of {point_of[fastest].mean_exit_layer:.2f}"
            )
        high_flops, high, _ = timed[reached]
        if reached == 0:
            break
        low_flops, low, _ = timed[reached - 1]
        wanted = low_flops + (high_flops - low_flops) * (target - low) / (high - low)
        between = [
            p for p in points if wanted <= p.flops_speedup < high_flops and p.speed not in stopwatch.speedups
        ]
        if not between:
            break
        stopwatch.measure([min(between, key=lambda p: p.flops_speedup).speed])
    reached_speeds = [s for s, measured in stopwatch.speedups.items() if measured >= target]
    return min(reached_speeds, key=lambda s: point_of[s].flops_speedup)


def plot_calibration(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Draws accuracy against the measured speed-up, and beside it against what the FLOPs promise.

    A write that is interrupted leaves an older file whole.

    Args:
        calibration: what :func:`calibrate_speed` returned.
        path: of the figure, its suffix a format that matplotlib writes, such as ``.png`` or ``.svg``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting a calibration needs matplotlib: pip install matplotlib") from error
    path = Path(path)
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    points = sorted((p.flops_speedup, 100 * p.accuracy) for p in calibration.points)
    timed = sorted(
        (p.measured_speedup, 100 * p.accuracy) for p in calibration.points if p.measured_speedup is not None
    )
    axes.plot(*zip(*points, strict=True), color="#9aa5b1", label="FLOPs")
    if timed:
        axes.plot(*zip(*timed, strict=True), "o-", color="#0b6e4f", markersize=4, label="measured")
    chosen = calibration.chosen
    axes.plot(
        [chosen.measured_speedup or chosen.flops_speedup],
        [100 * chosen.accuracy],
        "o",
        color="#0b6e4f",
        markersize=10,
        fillstyle="none",
        label=f"speed {chosen.speed:g}",
    )
    axes.axhline(100 * calibration.full_accuracy, color="#66727f", linewidth=0.8, linestyle="dashed")
    axes.set_xlabel("speed-up over the full model")
    axes.set_ylabel("accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix(".") or "png")
    write_whole(path, content.getvalue())
