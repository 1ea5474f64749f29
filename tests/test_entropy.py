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
    VIEWS,
    close_relatively,
    draw,
    exact_entropy,
    exact_entropy_grad,
    rows_of,
    skip_fp64_off_the_cpu,
)


def run(logits, normalize, impl, dtype=None):
    """The entropy and the gradient of the logits."""
    leaf = logits.detach().to(dtype or logits.dtype).requires_grad_()
    out = bertops.entropy(leaf, normalize=normalize, impl=impl)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad(out, leaf, upstream.to(out))
    return {"entropy": out.detach(), "grad": grad}


def check(label, logits, normalize, impl):
    actual = run(logits, normalize, impl)
    forwards = run(logits, normalize, "reference")
    backwards = run(logits.flip(1), normalize, "reference")
    backwards["grad"] = backwards["grad"].flip(1)
    oracle = run(logits.cpu(), normalize, "reference", torch.float64)
    assert actual["entropy"].dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert actual["grad"].dtype == logits.dtype
    for name, exact in oracle.items():
        eagers = [forwards[name].cpu(), backwards[name].cpu()]
        assert_close_to_oracle(f"{label} {name}", actual[name].cpu(), eagers, exact)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_match_the_oracle(dtype, classes, normalize, row_kernel):
    impl, device = row_kernel
    skip_fp64_off_the_cpu(dtype, device)
    check(f"C{classes}", draw(rows_of(classes), classes, dtype, device), normalize, impl)


@pytest.mark.parametrize("spread", [1e-3, 0.3, 30.0])
@pytest.mark.parametrize("classes", [2, 20, 1000])
def test_flat_and_steep_rows_match_the_oracle(classes, spread, row_kernel):
    impl, device = row_kernel
    check(f"spread {spread}", draw(200, classes, torch.float32, device, spread), False, impl)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("classes", [2, 20, 65])
def test_a_batch_of_any_size_has_the_rows_of_a_large_one(classes, batch, row_kernel):
    impl, device = row_kernel
    logits = draw(4096, classes, torch.float32, device)[-8 * batch :]
    whole = run(logits, True, impl)
    parts = [bertops.entropy(part, normalize=True, impl=impl) for part in logits.split(batch)]
    assert torch.equal(torch.cat(parts), whole["entropy"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides_match_the_oracle(view, dtype, row_kernel):
    impl, device = row_kernel
    skip_fp64_off_the_cpu(dtype, device)
    for batch, classes in ((100, 2), (37, 20), (5, 130), (70, 1)):
        logits = draw(batch, classes, dtype, device)
        check(f"{view} C{classes}", VIEWS[view](logits), True, impl)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_stride(data):
    # the rule compares two rounding errors, and with a handful of rows either may vanish by luck
    batch, classes = data.draw(st.integers(32, 90)), data.draw(st.integers(1, 200))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    spread = data.draw(st.floats(0.1, 20.0))
    logits = draw(batch, classes, data.draw(st.sampled_from(DTYPES)), spread=spread)
    kept = torch.rand(logits.shape) < data.draw(st.floats(0.0, 1.0))
    kept[:, 0] = True
    logits = logits.masked_fill(~kept, -math.inf)
    views = st.sampled_from([name for name in VIEWS if name != "one row expanded"])
    logits = VIEWS[data.draw(views)](logits)
    check(f"B{batch} C{classes}", logits, data.draw(st.booleans()), "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", CERTAIN, ids=str)
def test_nearly_certain_rows_keep_their_digits(row, dtype, row_kernel):
    """Also in a wide row, in any place of it, where another loop runs; padded with -inf."""
    impl, device = row_kernel
    skip_fp64_off_the_cpu(dtype, device)
    for places in ((0, 1, 2), (0, 5, 9), (2, 16, 63), (64, 3, 129), (999, 1, 500)):
        logits = torch.full((1, max(3, places[-1] + 1, places[0] + 1)), -math.inf, dtype=dtype)
        logits[0, list(places)] = torch.tensor(row, dtype=dtype)
        leaf = logits.to(device).requires_grad_()
        out = bertops.entropy(leaf, impl=impl)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        exact = logits[0, list(places)].tolist()
        close_relatively(out, [exact_entropy(exact)], digits=4)
        close_relatively(grad[0, list(places)], exact_entropy_grad(exact), digits=6)


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("classes", [2, 20, 300])
def test_an_offset_changes_nothing(classes, offset, row_kernel):
    impl, device = row_kernel
    plain = draw(64, classes, torch.float32, device).mul(256).round().div(256)  # so that the sum is exact
    near, far = run(plain, False, impl), run(plain + offset, False, impl)
    assert all(torch.equal(far[name], near[name]) for name in near)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 20, 300])
def test_distances_that_overflow(classes, dtype, row_kernel):
    impl, device = row_kernel
    skip_fp64_off_the_cpu(dtype, device)
    largest = torch.finfo(dtype).max
    logits = torch.full((20, classes), -largest, dtype=dtype, device=device)
    logits[:, 1] = largest
    results = run(logits, False, impl)
    assert not results["entropy"].any() and not results["grad"].any()
    logits[:, 0] = largest
    torch.testing.assert_close(
        bertops.entropy(logits, impl=impl).double().cpu(),
        torch.full((20,), math.log(2.0), dtype=torch.float64),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 7, 20, 64, 200])
def test_impossible_classes_are_as_if_absent(classes, dtype, row_kernel):
    impl, device = row_kernel
    skip_fp64_off_the_cpu(dtype, device)
    logits = draw(64, classes, dtype, device)
    holes = torch.rand(64, classes) < 0.5
    holes[:, 0] = False
    holes[0, 1:] = True
    logits = logits.masked_fill(holes.to(device), -math.inf)
    check("-inf", logits, False, impl)
    results = run(logits, False, impl)
    assert results["entropy"][0] == 0 and not results["grad"][0].any()
    assert not results["grad"][holes.to(device)].any()


@pytest.mark.parametrize("classes", [1, 2, 3, 20, 64, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_softmax_is_nan_and_alone(dtype, classes, row_kernel):
    impl, device = row_kernel
    skip_fp64_off_the_cpu(dtype, device)
    for bad, (batch, place) in product(BAD_ROWS, ((1, 0), (37, 0), (37, 17), (37, 36))):
        logits = draw(batch, classes, dtype, device)
        clean = run(logits, True, impl)
        logits[place] = BAD_ROWS[bad](logits[place])
        dirty = run(logits, True, impl)
        others = torch.arange(batch, device=device) != place
        for name, x in dirty.items():
            assert x[place].isnan().all(), (bad, name)
            assert torch.equal(x[others], clean[name][others]), (bad, name)


def test_uniform_rows_and_a_single_class(row_kernel):
    impl, device = row_kernel
    for dtype in (torch.float32, *DTYPES[1:3]):
        for classes in (2, 3, 20, 63, 1000, 131072):
            logits = torch.tensor([[-1.7], [0.0], [300.0]], dtype=dtype, device=device).expand(3, classes)
            out = run(logits, True, impl)
            torch.testing.assert_close(out["entropy"], torch.ones(3, device=device), rtol=1e-6, atol=0)
            nats = bertops.entropy(logits, impl=impl)
            torch.testing.assert_close(nats, torch.full_like(nats, math.log(classes)), rtol=1e-6, atol=0)
            assert not out["grad"].any()
        for normalize in (False, True):
            out = run(draw(17, 1, dtype, device), normalize, impl)
            assert not out["entropy"].any() and not out["grad"].any()


def test_no_rows(row_kernel):
    impl, device = row_kernel
    for classes in (1, 2, 1000):
        logits = torch.zeros(0, classes, device=device, requires_grad=True)
        out = bertops.entropy(logits, impl=impl)
        out.sum().backward()
        assert out.shape == (0,) and logits.grad.shape == logits.shape


def test_is_the_entropy_of_torch_distributions(row_kernel):
    impl, device = row_kernel
    logits = draw(50, 9, torch.float32, device)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(bertops.entropy(logits, impl=impl), expected)
    torch.testing.assert_close(bertops.entropy(logits, impl="reference"), expected)
    share = bertops.entropy(logits, normalize=True, impl=impl)
    torch.testing.assert_close(share, expected / math.log(9))


@pytest.mark.parametrize("classes", [2, 20, 1000, 131072])
def test_bit_identical_from_run_to_run_and_for_any_threads(classes):
    logits = draw(rows_of(classes), classes, torch.float32)
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        runs.append(run(logits, True, "cpu"))
    torch.set_num_threads(threads)
    assert all(torch.equal(again[name], runs[0][name]) for again in runs for name in again)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 5, 20, 70])
def test_gradcheck_of_the_cpu_kernel(classes, normalize):
    leaf = draw(3, classes, torch.float64, spread=1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bertops.entropy(x, normalize=normalize, impl="cpu"), leaf)
    strided = leaf.detach().t().contiguous().t().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bertops.entropy(x, normalize=normalize, impl="cpu"), strided)


def test_upstream_of_any_stride_and_of_some_rows(row_kernel):
    impl, device = row_kernel
    for classes in (2, 20, 300):
        leaf = draw(40, classes, torch.float32, device).requires_grad_()
        out = bertops.entropy(leaf, impl=impl)
        some = (torch.arange(40, device=device) % 3 == 0).float()
        (want,) = torch.autograd.grad(out, leaf, some, retain_graph=True)
        assert not want[some == 0].any() and want[some == 1].any(1).all()
        strided = torch.stack([some, some + 1], 1)[:, 0]
        (got,) = torch.autograd.grad(out, leaf, strided, retain_graph=True)
        assert torch.equal(got, want)
        (ones,) = torch.autograd.grad(out.sum(), leaf)  # an expanded upstream
        assert torch.equal(ones[some == 1], want[some == 1])


def test_double_backward_is_refused(row_kernel):
    impl, device = row_kernel
    leaf = draw(4, 3, torch.float32, device).requires_grad_()
    (grad,) = torch.autograd.grad(bertops.entropy(leaf, impl=impl).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_opcheck():
    for logits in (draw(5, 3, torch.float32), draw(70, 20, torch.float16).t()):
        torch.library.opcheck(torch.ops.bertops.entropy_fwd.default, (logits, True))
        grad = torch.randn(logits.shape[0])
        torch.library.opcheck(torch.ops.bertops.entropy_bwd.default, (grad, logits, True))


def test_compiles_whole_with_dynamic_shapes():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(logits):
        return bertops.entropy(logits, normalize=True).sum()

    for batch, classes in ((4, 3), (50, 20), (90, 7)):
        logits = draw(batch, classes, torch.float32).requires_grad_()
        out, expected = step(logits), bertops.entropy(logits, normalize=True).sum()
        torch.testing.assert_close(out, expected)
        got, want = torch.autograd.grad(out, logits), torch.autograd.grad(expected, logits)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("error", "words", "logits", "options"),
    [
        (TypeError, ("logits", "list"), [[0.0]], {}),
        (TypeError, ("logits", "int64"), torch.zeros(2, 3).long(), {}),
        (TypeError, ("logits", "complex64"), torch.zeros(2, 3, dtype=torch.complex64), {}),
        (ValueError, ("logits", "(B, C)", "(3,)"), torch.zeros(3), {}),
        (ValueError, ("logits", "(B, C)", "(2, 3, 4)"), torch.zeros(2, 3, 4), {}),
        (ValueError, ("logits", "C >= 1", "(2, 0)"), torch.zeros(2, 0), {}),
        (ValueError, ("impl", "fast"), torch.zeros(2, 3), {"impl": "fast"}),
        (RuntimeError, ("entropy", "cuda", "cpu"), torch.zeros(2, 3), {"impl": "cuda"}),
        (RuntimeError, ("entropy", "no triton kernel"), torch.zeros(2, 3), {"impl": "triton"}),
        (RuntimeError, ("entropy", "no kernel", "meta"), torch.zeros(2, 3, device="meta"), {}),
    ],
)
def test_bad_input_is_named(error, words, logits, options):
    with pytest.raises(error) as caught:
        bertops.entropy(logits, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_use_impl_chooses(monkeypatch):
    calls = []
    plain = reference.entropy
    monkeypatch.setattr(reference, "entropy", lambda *x: calls.append(1) or plain(*x))
    logits = draw(2, 3, torch.float32)
    bertops.entropy(logits)
    with bertops.use_impl("cpu"):
        bertops.entropy(logits)
    assert not calls
    with bertops.use_impl("reference"):
        bertops.entropy(logits)
        assert len(calls) == 1
        bertops.entropy(logits, impl="cpu")
    assert len(calls) == 1
