"""What FLOPs are counted, what a speed is calibrated to, and what is refused."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bertops.early_exit import (
    Calibration,
    CalibrationPoint,
    Entropy,
    Patience,
    calibrate_speed,
    calibration,
    classifier_flops,
    exit_flops,
    full_flops,
    layer_flops,
    plot_calibration,
)
from bertops.models import BertConfig, BertModel, FastBert

LAYERS, LABELS = 4, 3
SPEEDS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)


@pytest.fixture
def model():
    """Random weights, large enough for certain answers."""
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    model = FastBert(BertModel(config), LABELS, head_size=16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for classifier in (*model.students, model.teacher):
            classifier.classifier.weight.mul_(5)
    return model


@pytest.fixture
def dev(model):
    """Labels that the full model mostly gives."""
    batches = []
    for rows in (7, 5, 0, 12):
        ids = torch.randint(4, 40, (rows, 9))
        mask = torch.arange(9) < torch.randint(1, 10, (rows, 1))
        labels = model(ids, mask).logits.argmax(1)
        wrong = torch.rand(rows) < 0.2
        batches.append((ids, mask, torch.where(wrong, (labels + 1) % LABELS, labels)))
    return batches


def run(model, dev, **criterion):
    """Accuracy and mean exit layer that ``infer`` has on ``dev``, FLOPs counted row by row."""
    right, layers, spent, full = [], [], 0, 0
    for ids, mask, labels in dev:
        output = model.infer(ids, mask, **criterion)
        right.append(output.prediction == labels)
        layers.append(output.exit_layer)
        for layer, length in zip(output.exit_layer.tolist(), mask.sum(1).tolist(), strict=True):
            spent += exit_flops(model, layer, length)
            full += full_flops(model, length)
    return torch.cat(right).double().mean(), torch.cat(layers).double().mean(), full / spent


@pytest.fixture
def measured(monkeypatch):
    """In place of the clock: what the FLOPs promise, less a fifth of the gain."""

    def one_round(stopwatch, criteria, turn):
        speedups = [run(stopwatch.model, stopwatch.batches, criterion=c)[2] for c in criteria]
        return [1.0, *(1 / (1 + 0.8 * (s - 1)) for s in speedups[1:])]

    monkeypatch.setattr(calibration.Stopwatch, "one_round", one_round)


def test_flops_of_bert_base():
    with torch.device("meta"):
        base = FastBert(BertModel(BertConfig(pooler=False)), 2)
    assert layer_flops(base, 1, 128) == 2 * 128 * (4 * 768**2 + 2 * 768 * 3072) + 4 * 128**2 * 768
    assert sum(layer_flops(base, layer, 128) for layer in range(1, 13)) == pytest.approx(22.35e9, rel=1e-3)
    assert classifier_flops(base, 128) == pytest.approx(25.5e6, rel=2e-3)
    assert full_flops(base, 128) == 12 * layer_flops(base, 1, 128) + classifier_flops(base, 128)
    assert exit_flops(base, 3, 128) == 3 * (layer_flops(base, 1, 128) + classifier_flops(base, 128))


def test_classifier_flops_are_those_that_run(model):
    counter = FlopCounterMode(display=False)
    with counter:
        model.teacher(torch.randn(1, 9, 32))
    assert classifier_flops(model, 9) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("criterion", "values"),
    [
        (None, SPEEDS),
        (Entropy, (0.0, 0.1, 0.3, 0.6, 1.0)),
        (Patience, (1, 2, 3)),
    ],
)
def test_points_are_what_infer_does(model, dev, criterion, values):
    chosen = {} if criterion is None else {"criterion": criterion}
    found = calibrate_speed(model, dev, max_accuracy_drop=1, speeds=values, budget_s=0, **chosen)
    assert [p.speed for p in found.points] == list(values)
    assert len({p.mean_exit_layer for p in found.points}) >= 2
    for point in found.points:
        rule = {"speed": point.speed} if criterion is None else {"criterion": criterion(point.speed)}
        accuracy, layer, flops = run(model, dev, **rule)
        assert point.accuracy == pytest.approx(float(accuracy))
        assert point.mean_exit_layer == pytest.approx(float(layer))
        if point.speed > 0:
            assert point.flops_speedup == pytest.approx(flops)
    assert found.full_accuracy == pytest.approx(float(run(model, dev, speed=0.0)[0]))


def test_the_full_model_has_no_students_to_pay_for(model, dev):
    first, *_ = calibrate_speed(model, dev, max_accuracy_drop=0, speeds=SPEEDS, budget_s=0).points
    assert (first.flops_speedup, first.mean_exit_layer) == (1.0, LAYERS)


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.25, 1.0])
def test_by_accuracy(model, dev, measured, drop):
    found = calibrate_speed(model, dev, max_accuracy_drop=drop, speeds=SPEEDS)
    assert found.chosen.accuracy >= found.full_accuracy - drop - 1e-12
    faster = [p for p in found.points if p.flops_speedup > found.chosen.flops_speedup]
    assert all(p.accuracy < found.full_accuracy - drop for p in faster)
    assert found.chosen.measured_speedup is not None
    if drop == 1:
        assert found.speed == 1.0


def test_a_drop_of_whole_rows_is_not_lost_in_rounding(model, dev, measured):
    points = calibrate_speed(model, dev, max_accuracy_drop=1, speeds=SPEEDS).points
    full = points[0].accuracy
    drop = full - points[-1].accuracy
    assert calibrate_speed(model, dev, max_accuracy_drop=drop, speeds=SPEEDS).speed == 1.0


@pytest.mark.parametrize("target", [1.1, 1.2, 1.5, 2.0])
def test_by_speedup(model, dev, measured, target):
    found = calibrate_speed(model, dev, target_speedup=target)
    assert found.chosen.measured_speedup >= target
    reached = [p for p in found.points if 1 + 0.8 * (p.flops_speedup - 1) >= target]
    slowest = min(p.flops_speedup for p in reached)
    assert found.chosen.flops_speedup <= slowest * 1.1


def test_a_speedup_out_of_reach_says_what_was(model, dev, measured):
    with pytest.raises(
        ValueError, match=r"target_speedup 50 is out of reach: .* 1, was measured at [23]\.\d\d"
    ):
        calibrate_speed(model, dev, target_speedup=50, speeds=SPEEDS)


def test_an_accuracy_out_of_reach_says_what_was(model, dev):
    with pytest.raises(ValueError, match=r"an accuracy of 0\.\d+ is out of reach: .* 1, has 0\.\d+"):
        calibrate_speed(model, dev, max_accuracy_drop=0, speeds=[1.0], budget_s=0)


def test_times_are_those_of_infer(model, dev):
    """Real clock: both ends are timed, and the budget only thins out what is timed."""
    found = calibrate_speed(model, dev, max_accuracy_drop=1, speeds=SPEEDS, budget_s=0.2)
    timed = [p for p in found.points if p.measured_speedup is not None]
    assert min(found.points, key=lambda p: p.flops_speedup) in timed and found.points[-1] in timed
    assert all(0.01 < p.measured_speedup < 100 for p in timed)


def test_batches_from_a_generator_without_masks(model, dev):
    batches = ((ids, None, labels) for ids, _, labels in dev)
    assert calibrate_speed(model, batches, max_accuracy_drop=1, speeds=SPEEDS, budget_s=0).speed == 1.0


def test_nan_logits_are_wrong_answers_of_the_last_layer(model, dev):
    with torch.no_grad():
        for student in model.students:
            student.classifier.bias.fill_(float("nan"))
    found = calibrate_speed(model, dev, max_accuracy_drop=1, speeds=SPEEDS, budget_s=0)
    assert {p.mean_exit_layer for p in found.points} == {float(LAYERS)}
    assert {p.accuracy for p in found.points} == {found.full_accuracy}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of max_accuracy_drop and target_speedup, got None and None"),
        ({"max_accuracy_drop": 0.1, "target_speedup": 2}, "exactly one .* got 0.1 and 2"),
        ({"max_accuracy_drop": -0.1}, r"max_accuracy_drop must be in \[0, 1\], got -0.1"),
        ({"max_accuracy_drop": float("nan")}, "max_accuracy_drop .* got nan"),
        ({"target_speedup": 0.5}, "target_speedup must be at least 1 and finite, got 0.5"),
        ({"target_speedup": float("nan")}, "target_speedup .* got nan"),
        ({"target_speedup": 2, "speeds": []}, "speeds must hold at least one candidate"),
        ({"target_speedup": 2, "speeds": [0, 2]}, r"speed must be in \[0, 1\], got 2"),
    ],
)
def test_arguments_that_do_not_fit(model, dev, arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate_speed(model, dev, **arguments)


def test_data_that_does_not_fit(model, dev):
    ids, mask, labels = dev[0]
    with pytest.raises(ValueError, match="dev must hold at least one row, got none"):
        calibrate_speed(model, [], max_accuracy_drop=0)
    with pytest.raises(ValueError, match=r"dev\[1\]: labels must have shape \(7,\), got \(6,\)"):
        calibrate_speed(model, [dev[0], (ids, mask, labels[:6])], max_accuracy_drop=0)
    with pytest.raises(ValueError, match=r"dev\[0\]: labels must be in \[0, 3\), got \d to 3"):
        calibrate_speed(
            model, [(ids, mask, labels.clamp_max(2).index_fill(0, torch.tensor(2), 3))], target_speedup=2
        )
    with pytest.raises(TypeError, match=r"dev\[0\] must be \(input_ids, mask, labels\), got tuple"):
        calibrate_speed(model, [(ids, labels)], max_accuracy_drop=0)
    with pytest.raises(ValueError, match="evaluation mode"):
        calibrate_speed(model.train(), dev, max_accuracy_drop=0)


SOME = Calibration(
    0.5,
    0.9,
    (
        CalibrationPoint(0.0, 0.9, 4.0, 1.0, 1.0),
        CalibrationPoint(0.3, 0.89, 3.0, 1.3),
        CalibrationPoint(0.5, 0.88, 2.0, 2.0, 1.8),
    ),
)


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plot(tmp_path, suffix, begins):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"curve.{suffix}"
    path.write_text("old")
    plot_calibration(SOME, path)
    assert path.read_bytes().startswith(begins)
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_plot_leaves_the_old_one(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "curve.png"
    path.write_text("old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plot_calibration(SOME, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_calibration(SOME, tmp_path / "curve.png")


def test_chosen_is_the_point_of_the_speed():
    assert SOME.chosen is SOME.points[2]
    assert replace(SOME, speed=0.3).chosen.measured_speedup is None
