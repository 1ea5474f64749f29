"""The bench's own machinery: pairing, the check that withholds numbers, files that are written whole."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

pytest.importorskip("matplotlib")

from bench import correctness, paired, real, report, shapes, work  # noqa: E402
from bench.limits import Limits, Work  # noqa: E402
from bench.measure import Comparison, Op  # noqa: E402
from bench.memory import peak_extra_bytes  # noqa: E402
from bench.providers import Provider, eager_attention, eager_attention_with_scores, sdpa, sdpa_with_scores  # noqa: E402
from bertops import reference  # noqa: E402

CPU = torch.device("cpu")
LIMITS = Limits(
    "cpu", 1e10, {"fp32": 1e11, "bf16": 1e11}, 1e10, 1e-6, {"copy": "", "fp32": "", "exp": "", "call": ""}
)


class FakeClock:
    """Takes the time that a contestant claims, times a drift that grows with every sample."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def sample(self, contestant, calls):
        self.order.append(contestant.name)
        return contestant.run(None) * (1 + 0.01 * len(self.order))


def contestants():
    return [paired.Contestant("a", lambda _: 1.0), paired.Contestant("b", lambda _: 2.0)]


def test_rounds_interleave_and_rotate():
    clock = FakeClock()
    seconds = paired.run_rounds(contestants(), clock, budget_s=0, min_rounds=4)
    assert clock.order[4:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(times) for times in seconds.values()] == [4, 4]


def test_paired_ratio_sees_through_a_drift():
    seconds = paired.run_rounds(contestants(), FakeClock(), budget_s=0, min_rounds=20)
    assert max(seconds["a"]) > 1.3 * min(seconds["a"])
    assert paired.paired_ratio(seconds, "b", "a").median == pytest.approx(2.0, rel=0.01)
    assert paired.paired_ratio(seconds, "a", "a") == paired.Spread(1.0, 1.0, 1.0)


def test_wall_clock_times_run_and_not_prepare(monkeypatch):
    now = paired.ReplayClock()
    monkeypatch.setattr(paired.time, "perf_counter", now)

    def advance(seconds):
        now.now += seconds
        return 2.0

    contestant = paired.Contestant("x", advance, prepare=lambda: advance(100.0))
    assert paired.WallClock(CPU).sample(contestant, 20) == 2.0


def test_short_calls_are_repeated_within_a_sample():
    assert [paired.calls_per_sample(s) for s in (1.0, 5e-4, 1e-4, 0.0)] == [1, 1, 5, paired.MAX_CALLS]


def attention_op(*providers):
    return Op(
        "attention",
        list(providers),
        lambda q, k, v, mask: reference.attention(q, k, v, mask)[:1],
        lambda q: [tuple(q.shape)],
        work.attention,
    )


def compare(op, mode, padding=0.5):
    case = shapes.Case(24, batch=2, heads=2, head_dim=8, padding=padding)
    return Comparison(op, case, shapes.random_inputs(case, CPU)).run(mode, budget_s=0)


def right(name="bertops"):
    return Provider(name, lambda inputs: eager_attention(inputs.mask))


def scaled_by(factor):
    def make(inputs):
        call = eager_attention(inputs.mask)
        return lambda q, k, v: (call(q, k, v)[0] * factor,)

    return Provider("SDPA", make)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def wrong_gradient():
    def make(inputs):
        call = eager_attention(inputs.mask)
        return lambda q, k, v: call(WrongGradient.apply(q), k, v)

    return Provider("SDPA", make)


def raises():
    def make(inputs):
        raise RuntimeError("cannot\nand a long trace")

    return Provider("FlexAttention", make)


def test_a_wrong_result_gets_no_number():
    mine, wrong = compare(attention_op(right(), scaled_by(1.001)), "forward")
    assert mine.status == "ok" and mine.ratio.median == 1.0 and len(mine.seconds) >= 5
    assert wrong.status == "wrong" and "error norm" in wrong.reason
    assert (wrong.seconds, wrong.ratio, wrong.work, wrong.extra_bytes) == ([], None, None, None)
    row = report.cells(wrong.as_dict(LIMITS))
    assert set(row[1:-1]) == {"-"} and row[-1].startswith("wrong")


@pytest.mark.parametrize("mode, status", [("forward", "ok"), ("backward", "wrong"), ("both", "wrong")])
def test_a_wrong_gradient_gets_no_number(mode, status):
    assert [r.status for r in compare(attention_op(right(), wrong_gradient()), mode)] == ["ok", status]


def test_a_failing_or_unavailable_peer_does_not_stop_the_others():
    no_backward = Provider("SDPA", lambda inputs: sdpa(inputs.mask), cpu_backward=False)
    results = compare(attention_op(raises(), no_backward, right()), "both")
    assert [(r.status, r.reason) for r in results[:2]] == [
        ("failed", "cannot"),
        ("unavailable", "has no backward on a CPU"),
    ]
    assert results[2].status == "ok"


@pytest.mark.parametrize("padding", [0.0, 0.5])
@pytest.mark.parametrize("make", [eager_attention_with_scores, sdpa_with_scores])
def test_peers_with_scores_are_right(make, padding):
    op = Op(
        "attention_with_scores",
        [Provider("bertops", lambda inputs: make(inputs.mask))],
        lambda q, k, v, mask: reference.attention_with_scores(q, k, v, mask)[::2],
        lambda q: [tuple(q.shape), (*q.shape[:3], q.shape[2])],
        work.attention_with_scores,
    )
    (result,) = compare(op, "both", padding)
    assert (result.status, result.reason) == ("ok", None)


def test_truth_in_groups_of_heads_is_the_whole(monkeypatch):
    q, k, v, grad = torch.randn(4, 2, 6, 16, 8).unbind()
    mask = torch.arange(16).expand(2, -1) < torch.tensor([[16], [9]])

    def forward(q, k, v, mask):
        return reference.attention(q, k, v, mask)[:1]

    whole = correctness.truth(forward, q, k, v, mask, [grad], True)
    monkeypatch.setattr(correctness, "SLICE_PAIRS", 4 * 16**2)
    for a, b in zip(
        whole.oracle, correctness.truth(forward, q, k, v, mask, [grad], True).oracle, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_work_counts_real_pairs():
    case = shapes.Case(16, batch=2, heads=3, head_dim=8, padding=0.5)
    inputs = shapes.random_inputs(case, CPU)
    pairs, rows = 2 * 3 * 8 * 8, 2 * 3 * 8
    assert work.attention(inputs, "forward") == Work(4 * 8 * pairs, pairs, rows * (4 * 8 * 4 + 4))
    assert work.attention(inputs, "both").flops == 14 * 8 * pairs
    map_bytes = 2 * 3 * 16 * 16 * 4
    assert work.attention_with_scores(inputs, "forward").bytes == rows * (4 * 8 * 4 + 4) + map_bytes


def test_least_seconds_is_the_tightest_limit():
    assert LIMITS.least_seconds(Work(1e9, 0, 0), "fp32") == pytest.approx(1e-2)
    assert LIMITS.least_seconds(Work(1e9, 1e8, 0), "fp32") == pytest.approx(2e-2)
    assert LIMITS.least_seconds(Work(1e9, 0, 1e9), "fp32") == pytest.approx(1e-1)
    assert LIMITS.least_seconds(Work(0, 0, 0), "fp32") == 1e-6


def test_limits_keep_the_better_measurement():
    kept = Limits("cpu", 1.0, {"fp32": 5.0}, 3.0, 2.0, {"fp32": "first"})
    kept.improve(Limits("cpu", 2.0, {"fp32": 6.0}, 1.0, 1.0, {"fp32": "second"}))
    assert kept == Limits("cpu", 2.0, {"fp32": 6.0}, 3.0, 1.0, {"fp32": "second"})


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM")
def test_peak_memory_counts_what_a_call_frees_again():
    def call():
        torch.ones(8 * 2**20)
        return torch.ones(2**20)

    call()
    extra = peak_extra_bytes(CPU, call)
    assert 31 * 2**20 <= extra < 36 * 2**20  # 32 MiB; the kernel counts resident pages in batches


def run_data():
    (result,) = compare(attention_op(right()), "forward")
    wrong = compare(attention_op(scaled_by(2.0)), "forward")[0]
    case = shapes.Case(24).as_dict()
    return {
        "datetime": "now",
        "bertops": {
            "machine": {"cpu": "<some> CPU"},
            "limits": LIMITS.as_dict() | {"flops_per_s": {"fp32": 1e11}},
            "model": {"name": "m", "text": "t", "right": True, "relative_error": 1e-7, "states": 7},
            "memory_method": "m",
            "comparisons": [
                {
                    "op": "attention",
                    "mode": "forward",
                    "title": "a title",
                    "case": case | {"length": length},
                    "results": [result.as_dict(LIMITS), wrong.as_dict(LIMITS)],
                }
                for length in (8, 16, 24)
            ]
            + [
                {
                    "op": "attention_with_scores",
                    "mode": "both",
                    "title": "another",
                    "case": case,
                    "results": [result.as_dict(LIMITS), wrong.as_dict(LIMITS)],
                }
            ],
        },
    }


def test_report_is_one_page_with_tables_and_images(tmp_path):
    data = run_data()
    names = {path.name for path in report.write(data, tmp_path)}
    assert names == {
        "attention-forward-over-length.png",
        "attention_with_scores-both.png",
        "bench.html",
        "bench.json",
    }
    page = (tmp_path / "bench.html").read_text()
    assert (
        page.count("<caption>") == 4 and "a title" in page and "&lt;some&gt; CPU" in page and "wrong" in page
    )
    for name in names:
        if name.endswith(".png"):
            png = (tmp_path / name).read_bytes()
            assert png.startswith(b"\x89PNG")
            assert base64.b64encode(png).decode() in page
    assert "http" not in page
    assert json.loads((tmp_path / "bench.json").read_text())["bertops"]["comparisons"]
    assert "another" in report.table(data["bertops"])


def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "bench.html"
    path.write_bytes(b"old")

    def interrupted(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.fsync", interrupted)
        report.write_whole(path, b"new and longer")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    report.write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_texts_are_real_and_in_order(tmp_path):
    first = [text for text, _ in zip(real.texts(None, whole_modules=False), range(20), strict=False)]
    assert first == [text for text, _ in zip(real.texts(None, whole_modules=False), range(20), strict=False)]
    assert all(len(text) >= real.MIN_TEXT for text in first)
    (tmp_path / "b.txt").write_text("the second file, one paragraph")
    (tmp_path / "a.txt").write_text("a first long paragraph\n\ntiny\n\nanother long paragraph")
    assert list(real.texts(tmp_path, whole_modules=False)) == [
        "a first long paragraph",
        "another long paragraph",
        "the second file, one paragraph",
    ]
    assert len(list(real.texts(tmp_path, whole_modules=True))) == 2


def test_the_command_end_to_end(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "bertops", "bench", "--quick", "--impl=reference", "--device=cpu"]
    command += ["--only=N16 and forward", f"--out={tmp_path}"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert "attention forward · B1 H1 N16 D16 fp32 (overhead of a call)" in ended.stdout
    data = json.loads((tmp_path / "bench.json").read_text())
    results = data["bertops"]["comparisons"][0]["results"]
    assert [result["provider"] for result in results] == ["bertops", "eager", "SDPA"]
    for result, recorded in zip(results, data["benchmarks"], strict=True):
        assert recorded["stats"]["median"] == pytest.approx(result["time"]["median"])
        assert recorded["extra_info"]["work"]["flops"] == 4 * 16 * 16 * 16
        assert 0 < recorded["extra_info"]["share_of_limit"] < 1
