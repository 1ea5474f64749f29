import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bertops
from bertops import reference
from errors import assert_close_to_oracle
from logit_cases import (
    BAD_ROWS,
    BATCHES,
    CERTAIN,
    CLASSES,
    DTYPES,
    HALF,
    VIEWS,
    close_relatively,
    draw,
    exact_entropy,
    rows_of,
    skip_fp64_off_the_cpu,
)


def decide(logits, threshold, impl, normalize=True):
    """The decision, after a check of what follows from its uncertainties."""
    decision = bertops.exit_decision(logits, threshold, normalize=normalize, impl=impl)
    u = decision.uncertainty
    assert u.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert torch.equal(decision.exited, u <= torch.tensor(threshold, dtype=u.dtype, device=u.device))
    assert torch.equal(decision.prediction.cpu(), logits.detach().cpu().argmax(-1))
    rows = torch.arange(len(u), device=u.device)
    assert torch.equal(decision.order, torch.cat([rows[~decision.exited], rows[decision.exited]]))
    assert decision.num_kept.shape == () and decision.num_kept.dtype == torch.int64
    assert int(decision.num_kept) == int((~decision.exited).sum())
    largest = 1.0 if normalize else math.log(logits.shape[1])
    assert ((u >= 0) & (u <= largest) | u.isnan()).all()
    return decision


def check(label, logits, threshold, impl, normalize=True):
    decision = decide(logits, threshold, impl, normalize)
    eagers = [reference.exit_decision(x, threshold, normalize)[1].cpu() for x in (logits, logits.flip(1))]
    exact = reference.exit_decision(logits.cpu().double(), threshold, normalize)[1]
    assert_close_to_oracle(label, decision.uncertainty.cpu(), eagers, exact)
    return decision


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_match_the_oracle(dtype, classes, normalize, row_kernel):
    impl, device = row_kernel
    skip_fp64_off_the_cpu(dtype, device)
    logits = draw(rows_of(classes), classes, dtype, device)
    middle = float(reference.entropy(logits, normalize).median())
    decision = check(f"C{classes}", logits, middle, impl, normalize)
    assert 0 < int(decision.num_kept) < len(logits) or classes == 1


@pytest.mark.parametrize(
    ("batch", "classes"),
    [*product((0, *BATCHES), (1, 2, 4, 20, 65)), (65536, 2), (65537, 2), (65537, 20), (200_000, 3)],
)
def test_order_is_a_stable_partition_of_any_batch(batch, classes, row_kernel):
    impl, device = row_kernel
    logits = draw(batch, classes, torch.float32, device)
    for threshold in (0.0, 0.3, 0.7, 1.0):
        decision = decide(logits, threshold, impl)
        assert decision.prediction.shape == decision.exited.shape == (batch,)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("classes", [2, 20, 65])
def test_a_batch_of_any_size_has_the_rows_of_a_large_one(classes, batch, row_kernel):
    impl, device = row_kernel
    logits = draw(4096, classes, torch.float32, device)[-8 * batch :]
    whole = bertops.exit_decision(logits, 0.5, impl=impl)
    parts = [bertops.exit_decision(part, 0.5, impl=impl) for part in logits.split(batch)]
    for name in ("prediction", "uncertainty", "exited"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_uncertainty_is_the_entropy(row_kernel):
    impl, device = row_kernel
    for dtype in (torch.float32, *HALF):
        for classes in (2, 20, 64, 300):
            logits = draw(50, classes, dtype, device)
            for normalize in (False, True):
                expected = bertops.entropy(logits, normalize=normalize, impl=impl)
                actual = bertops.exit_decision(logits, 0.5, normalize=normalize, impl=impl).uncertainty
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides_match_the_oracle(view, dtype, row_kernel):
    impl, device = row_kernel
    skip_fp64_off_the_cpu(dtype, device)
    for batch, classes in ((100, 2), (37, 20), (5, 130), (70, 1)):
        check(view, VIEWS[view](draw(batch, classes, dtype, device)), 0.5, impl)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_stride_and_threshold(data):
    batch, classes = data.draw(st.integers(0, 90)), data.draw(st.integers(1, 200))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    logits = draw(batch, classes, data.draw(st.sampled_from(DTYPES)), spread=data.draw(st.floats(0.0, 20.0)))
    for value in (math.nan, math.inf, -math.inf):
        share = data.draw(st.sampled_from([0.0, 0.0, 0.02, 0.5]))
        logits = logits.masked_fill(torch.rand(logits.shape) < share, value)
    logits = VIEWS[data.draw(st.sampled_from(sorted(VIEWS)))](logits)
    normalize = data.draw(st.booleans())
    threshold = data.draw(st.floats(0, 1 if normalize else 6))
    decision = decide(logits, threshold, "cpu", normalize)
    expected = reference.exit_decision(logits, threshold, normalize)
    torch.testing.assert_close(decision.uncertainty, expected[1], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", CERTAIN, ids=str)
def test_nearly_certain_rows_keep_their_digits(row, dtype, row_kernel):
    impl, device = row_kernel
    skip_fp64_off_the_cpu(dtype, device)
    for classes, places in ((3, (0, 1, 2)), (20, (19, 3, 8)), (70, (5, 69, 40)), (1000, (999, 0, 500))):
        logits = torch.full((1, classes), -math.inf, dtype=dtype, device=device)
        logits[0, list(places)] = torch.tensor(row, dtype=dtype, device=device)
        exact = exact_entropy(logits[0, list(places)].tolist())
        nats = decide(logits, exact * (1 + 1e-5), impl, normalize=False)
        close_relatively(nats.uncertainty, [exact], digits=4)
        close_relatively(decide(logits, 0.5, impl).uncertainty, [exact / math.log(classes)], digits=5)
        assert (
            nats.exited.all() and not decide(logits, exact * (1 - 1e-5), impl, normalize=False).exited.any()
        )
        assert not decide(logits, 0.0, impl).exited.any()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("classes", [2, 20, 300])
def test_equal_to_the_threshold_is_out(classes, normalize, row_kernel):
    """Compared in the dtype of the uncertainty, to which the threshold rounds."""
    impl, device = row_kernel
    logits = draw(9, classes, torch.float32, device)
    for row, u in enumerate(bertops.exit_decision(logits, 0.5, normalize=normalize, impl=impl).uncertainty):
        below, above = (float(torch.nextafter(u.cpu(), torch.tensor(end))) for end in (-1.0, 10.0))
        for threshold, out in ((float(u), True), (below, False), (math.nextafter(float(u), 0.0), True)):
            assert bool(decide(logits, threshold, impl, normalize).exited[row]) is out
        assert decide(logits, min(above, 1.0) if normalize else above, impl, normalize).exited[row]


@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_one_lets_everybody_out(dtype, row_kernel):
    """Rounding must not lift the entropy of a uniform row above its largest value."""
    impl, device = row_kernel
    skip_fp64_off_the_cpu(dtype, device)
    for classes in (*range(1, 70), 1000, 131072):
        for value in (0.0, -1.7, 1e4):
            uniform = torch.full((3, classes), value, dtype=dtype, device=device)
            assert decide(uniform, 1.0, impl).exited.all()
            nats = decide(uniform, 20.0, impl, normalize=False).uncertainty
            assert decide(uniform, float(nats[0]), impl, normalize=False).exited.all()
        nearly = draw(3, classes, dtype, device, spread=1e-3)
        assert decide(nearly, 1.0, impl).exited.all()


def test_threshold_zero_lets_out_only_what_is_certain(row_kernel):
    impl, device = row_kernel
    logits = torch.tensor([[0.0, 300.0, 1.0], [0.0, 20.0, 0.0], [5.0, -math.inf, -math.inf], [0.0, 0.0, 0.0]])
    assert decide(logits.to(device), 0.0, impl).exited.tolist() == [True, False, True, False]
    random = draw(500, 20, torch.float32, device)
    assert not decide(random, 0.0, impl).exited.any()
    assert decide(random, 0.0, impl).order.tolist() == list(range(500))


def test_nats(row_kernel):
    impl, device = row_kernel
    logits = draw(300, 7, torch.float32, device)
    share = decide(logits, 0.4, impl)
    nats = decide(logits, 0.4 * math.log(7), impl, normalize=False)
    torch.testing.assert_close(nats.uncertainty, share.uncertainty * math.log(7))
    assert torch.equal(nats.exited, share.exited) and 0 < int(nats.num_kept) < 300
    for threshold in (math.log(7) + 1e-6, 1e30, math.inf):
        assert decide(logits, threshold, impl, normalize=False).exited.all()


@pytest.mark.parametrize("classes", [1, 2, 3, 20, 64, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_softmax_stays_and_harms_nobody(dtype, classes, row_kernel):
    impl, device = row_kernel
    skip_fp64_off_the_cpu(dtype, device)
    for bad, (batch, place) in product(BAD_ROWS, ((1, 0), (37, 0), (37, 17), (37, 36))):
        logits = draw(batch, classes, dtype, device)
        clean = decide(logits, 1.0, impl)
        logits[place] = BAD_ROWS[bad](logits[place])
        dirty = decide(logits, 1.0, impl)
        assert clean.exited.all() and dirty.uncertainty[place].isnan(), bad
        assert dirty.exited.tolist() == [row != place for row in range(batch)]
        assert int(dirty.num_kept) == 1 and int(dirty.order[0]) == place
        others = torch.arange(batch, device=device) != place
        assert torch.equal(dirty.uncertainty[others], clean.uncertainty[others])
        assert torch.equal(dirty.prediction[others], clean.prediction[others])
        assert not decide(logits, math.inf, impl, normalize=False).exited[place]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 3, 16, 20, 63, 65, 200, 1000])
def test_prediction_is_the_first_of_equals(classes, dtype, row_kernel):
    """As ``torch.argmax`` has it, whose answer :func:`decide` compares: also of -inf, of 0 and -0, of NaN."""
    impl, device = row_kernel
    skip_fp64_off_the_cpu(dtype, device)
    few = torch.tensor([-math.inf, -3.0, -0.0, 0.0, 1.0])
    decide(few[torch.randint(len(few), (300, classes))].to(dtype).to(device), 0.5, impl)
    decide(few[torch.randint(4, (300, classes))].to(dtype).to(device), 0.5, impl)
    first, second = torch.randint(classes, (2, 300))
    for value in (99.0, math.inf, math.nan):
        logits = draw(300, classes, dtype)
        logits[torch.arange(300), first] = value
        logits[torch.arange(300), second] = value
        prediction = decide(logits.to(device), 0.5, impl).prediction
        assert torch.equal(prediction.cpu(), torch.minimum(first, second))


def test_a_single_class_is_certain(row_kernel):
    impl, device = row_kernel
    for normalize in (False, True):
        decision = decide(draw(33, 1, torch.float32, device), 0.0, impl, normalize)
        assert decision.exited.all() and not decision.uncertainty.any() and not decision.prediction.any()
        assert int(decision.num_kept) == 0


def test_no_rows(row_kernel):
    impl, device = row_kernel
    for classes in (1, 2, 1000):
        decision = decide(torch.zeros(0, classes, device=device), 0.5, impl)
        assert int(decision.num_kept) == 0 and decision.order.shape == (0,)


def test_no_gradient_flows(row_kernel):
    impl, device = row_kernel
    leaf = draw(5, 3, torch.float32, device).requires_grad_()
    for name in (impl, "reference"):
        assert not any(x.requires_grad for x in bertops.exit_decision(leaf, 0.5, impl=name))


@pytest.mark.parametrize("classes", [2, 20, 1000, 131072])
def test_bit_identical_from_run_to_run_and_for_any_threads(classes):
    logits = draw(rows_of(classes), classes, torch.float32)
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        runs.append(decide(logits, 0.4, "cpu"))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for again in runs for x, y in zip(again, runs[0], strict=True))


def test_opcheck():
    for logits in (draw(5, 3, torch.float32), draw(70, 20, torch.float16).t(), draw(0, 2, torch.float64)):
        torch.library.opcheck(torch.ops.bertops.exit_decision.default, (logits, 0.5, True))


def test_compiles_whole_with_dynamic_shapes():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(logits, threshold):
        return bertops.exit_decision(logits, threshold)

    for batch, classes, threshold in ((4, 3, 0.3), (50, 20, 0.6), (90, 7, 0.9)):
        logits = draw(batch, classes, torch.float32)
        expected = bertops.exit_decision(logits, threshold)
        assert all(map(torch.equal, step(logits, threshold), expected))


@pytest.mark.parametrize(
    ("error", "words", "logits", "threshold", "options"),
    [
        (TypeError, ("logits", "NoneType"), None, 0.5, {}),
        (TypeError, ("logits", "int64"), torch.zeros(2, 3).long(), 0.5, {}),
        (ValueError, ("logits", "(B, C)", "(3,)"), torch.zeros(3), 0.5, {}),
        (ValueError, ("logits", "C >= 1", "(2, 0)"), torch.zeros(2, 0), 0.5, {}),
        (ValueError, ("threshold", "[0, 1]", "1.01"), torch.zeros(2, 3), 1.01, {}),
        (ValueError, ("threshold", "[0, 1]", "-0.1"), torch.zeros(2, 3), -0.1, {}),
        (ValueError, ("threshold", "nan"), torch.zeros(2, 3), math.nan, {}),
        (ValueError, ("threshold", "nats", "-0.1"), torch.zeros(2, 3), -0.1, {"normalize": False}),
        (TypeError, ("threshold", "'0.5'"), torch.zeros(2, 3), "0.5", {}),
        (TypeError, ("threshold", "tensor"), torch.zeros(2, 3), torch.tensor(0.5), {}),
        (ValueError, ("impl", "fast"), torch.zeros(2, 3), 0.5, {"impl": "fast"}),
        (RuntimeError, ("exit_decision", "cuda", "cpu"), torch.zeros(2, 3), 0.5, {"impl": "cuda"}),
        (RuntimeError, ("exit_decision", "no triton"), torch.zeros(2, 3), 0.5, {"impl": "triton"}),
        (RuntimeError, ("exit_decision", "no kernel", "meta"), torch.zeros(2, 3, device="meta"), 0.5, {}),
    ],
)
def test_bad_input_is_named(error, words, logits, threshold, options):
    with pytest.raises(error) as caught:
        bertops.exit_decision(logits, threshold, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_use_impl_chooses(monkeypatch):
    calls = []
    plain = reference.exit_decision
    monkeypatch.setattr(reference, "exit_decision", lambda *x: calls.append(1) or plain(*x))
    logits = draw(2, 3, torch.float32)
    with bertops.use_impl("cpu"):
        bertops.exit_decision(logits, 0.5)
    assert not calls
    with bertops.use_impl("reference"):
        bertops.exit_decision(logits, 0.5)
    assert len(calls) == 1
