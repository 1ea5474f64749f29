import pytest
import torch
import torch.nn.functional as F

import bertops
from pair_cases import Case, run

LSE_CASES = [
    Case(length=70, head_dim=32, head_dim_t=64),
    pytest.param(Case(length=150, padding="holes"), marks=pytest.mark.long),
    Case(length=40, padding="one row empty", reduction="none"),
    Case(batch=1, length=64, lengths=(20, 1, 0, 43)),
    Case(length=40, dtype=torch.float16, padding="right"),
]


def with_lse(inputs, options, impl):
    """The lse of both models as their own attention gives them."""
    rows = {name: options[name] for name in ("mask", "cu_seqlens") if name in options}
    q_s, k_s, q_t, k_t = (x.detach() for x in inputs)
    lse_s = bertops.attention(q_s, k_s, k_s, return_lse=True, impl=impl, **rows)[1]
    lse_t = bertops.attention(q_t, k_t, k_t, return_lse=True, impl=impl, **rows)[1]
    return {**options, "lse_s": lse_s, "lse_t": lse_t}


@pytest.mark.parametrize("case", LSE_CASES, ids=str)
def test_known_lse_changes_nothing(case, kernel):
    impl, device = kernel
    inputs, options = case.inputs(device)
    given = run("attention_kl", inputs, with_lse(inputs, options, impl), impl)
    found = run("attention_kl", inputs, options, impl)
    for name in found:
        tolerance = 1e-3 if case.dtype == torch.float16 and name != "loss" else 1e-5
        torch.testing.assert_close(given[name], found[name], rtol=tolerance, atol=2e-6)


def test_lse_is_a_constant_even_with_a_graph(kernel):
    """The gradient counts the student's lse as the function of q and k that it is; once, not twice."""
    impl, device = kernel
    inputs, options = Case(length=30).inputs(device)
    q_s, k_s, q_t, k_t = inputs
    _, lse_s = bertops.attention(q_s, k_s, k_s, return_lse=True, impl=impl)
    lse_t = with_lse(inputs, options, impl)["lse_t"]
    loss = bertops.attention_kl(q_s, k_s, q_t, k_t, lse_s=lse_s, lse_t=lse_t, impl=impl)
    got = torch.autograd.grad(loss, (q_s, k_s))
    want = torch.autograd.grad(bertops.attention_kl(q_s, k_s, q_t, k_t, impl=impl), (q_s, k_s))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("op", ["attention_kl", "relation_kl"])
def test_identical_models(op, reduction, kernel):
    impl, device = kernel
    for dtype in (torch.float32, torch.float16):
        case = Case(length=130, head_dim=64, dtype=dtype, noise=0.0, padding="right", reduction=reduction)
        results = run(op, *case.inputs(device), impl)
        assert results["loss"].abs().max() <= 1e-6
        assert not any(x.any() for name, x in results.items() if name != "loss")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("op", ["attention_kl", "relation_kl"])
def test_near_convergence(op, reduction, kernel):
    """Twice eager's error again; the fixed bound of fp32 cannot hold where S - T is its last digits."""
    impl, device = kernel
    inputs, options = Case(length=130, head_dim=64, noise=1e-3, reduction=reduction).inputs(device)
    actual, eager = run(op, inputs, options, impl), run(op, inputs, options, "reference")
    oracle = run(op, [x.detach().cpu() for x in inputs], options, "reference", torch.float64)
    for name, exact in oracle.items():
        error = (actual[name].cpu() - exact).norm()
        assert error <= 2 * (eager[name].cpu() - exact).norm() + 1e-7 * exact.norm(), name
    if impl == "cpu":
        assert (actual["loss"].cpu() - oracle["loss"]).abs().max() <= 1e-8
        assert (actual["loss"] >= 0).all()


@pytest.mark.long
def test_rows_are_never_negative_beyond_rounding(kernel):
    impl, device = kernel
    for noise in (0.0, 1e-6, 1e-4, 1e-2, 1.0):
        inputs, _ = Case(length=200, head_dim=32, noise=noise).inputs(device)
        assert bertops.attention_kl(*inputs, reduction="none", impl=impl).min() >= -1e-6


def test_one_hot_teacher(kernel):
    """A teacher that looks at one key leaves the student's cross-entropy of that key."""
    impl, device = kernel
    q_s, k_s, _, _ = Case(length=16, head_dim=16).inputs(device)[0]
    q_t = 200 * torch.eye(16, device=device).expand(2, 2, 16, 16).contiguous()
    k_t = torch.eye(16, device=device).roll(1, 0).expand(2, 2, 16, 16).contiguous()
    rows = bertops.attention_kl(q_s, k_s, q_t, k_t, scale_t=1.0, reduction="none", impl=impl)
    log_probs = (q_s @ k_s.transpose(-1, -2) / 4).log_softmax(-1)
    expected = -log_probs.diagonal(1, -2, -1)[..., :15]
    torch.testing.assert_close(rows[..., :15], expected, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(rows.sum(), q_s)[0]
    targets = torch.eye(16, device=device).roll(1, 1)
    scores = q_s @ k_s.transpose(-1, -2) / 4
    want = torch.autograd.grad(-(scores.log_softmax(-1) * targets).sum(), q_s)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["attention_kl", "relation_kl"])
def test_scores_of_ten_thousand(op, kernel):
    impl, device = kernel
    inputs, options = Case(length=50, head_dim=16, head_dim_t=32, padding="holes").inputs(device)
    for scales in ({"scale_s": 2000.0}, {"scale_t": 2000.0}, {"scale_s": 2000.0, "scale_t": -2000.0}):
        both = {**options, **scales}
        actual = run(op, inputs, both, impl)
        oracle = run(op, [x.detach().cpu() for x in inputs], both, "reference", torch.float64)
        for name in actual:
            eager = run(op, inputs, both, "reference")[name].cpu()
            assert actual[name].isfinite().all()
            error, allowed = (actual[name].cpu() - oracle[name]).norm(), (eager - oracle[name]).norm()
            assert error <= 2 * allowed + 1e-5 * oracle[name].norm(), name


@pytest.mark.parametrize("op", ["attention_kl", "relation_kl"])
def test_masked_scores_far_above_the_others(op, kernel):
    """Masked keys come as 0: where every real score is -500, their exponential would be infinite."""
    impl, device = kernel
    inputs, options = Case(length=50, padding="holes").inputs(device)
    offsets = (8.0, -8.0) if op == "attention_kl" else (8.0, 8.0)
    inputs = [x.detach() + offsets[i % 2] for i, x in enumerate(inputs)]
    inputs = [x.requires_grad_(i < 2) for i, x in enumerate(inputs)]
    sign = 2.0 if op == "attention_kl" else -2.0
    options |= {"scale_s": 0.25 * sign, "scale_t": 0.25 * sign}
    actual = run(op, inputs, options, impl)
    on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    oracle = run(op, [x.detach().cpu() for x in inputs], on_cpu, "reference", torch.float64)
    for name, exact in oracle.items():
        assert (actual[name].cpu() - exact).norm() <= 1e-4 * exact.norm(), name


def test_is_torch_kl_div(kernel):
    impl, device = kernel
    q_s, k_s, q_t, k_t = Case(length=20).inputs(device)[0]
    log_s, log_t = (
        (q @ k.transpose(-1, -2) / 4).log_softmax(-1).flatten(0, 2) for q, k in ((q_s, k_s), (q_t, k_t))
    )
    expected = F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    torch.testing.assert_close(bertops.attention_kl(q_s, k_s, q_t, k_t, impl=impl), expected)


def test_threads_do_not_change_the_rows():
    inputs, _ = Case(batch=1, heads=1, length=500, head_dim=32).inputs("cpu")
    threads = torch.get_num_threads()
    rows = []
    for count in (1, 2):
        torch.set_num_threads(count)
        rows.append(bertops.attention_kl(*inputs, reduction="none"))
    torch.set_num_threads(threads)
    assert torch.equal(*rows)


def test_opcheck():
    pair = [x.detach() for x in Case(batch=1, length=12).inputs("cpu")[0]]
    arguments = (*pair, None, torch.tensor([0, 5, 12], dtype=torch.int32), 0.25, 0.3)
    torch.library.opcheck(torch.ops.bertops.attention_kl_fwd.default, (*arguments, None, None))
    torch.library.opcheck(torch.ops.bertops.attention_kl_with_grads.default, (*arguments, None, None))
    rows, lse_s, lse_t = torch.ops.bertops.attention_kl_fwd(*arguments, None, None)
    torch.library.opcheck(torch.ops.bertops.attention_kl_bwd.default, (rows, *arguments, lse_s, lse_t))
    assert all(x.shape == (1, 2, 12) for x in (rows, lse_s, lse_t))


def test_lse_of_the_forward_is_attentions(kernel):
    impl, device = kernel
    if impl == "triton" and device == "cpu":
        pytest.skip("the dispatcher gives CPU tensors to the C++ kernel")
    inputs, options = Case(length=60, padding="holes").inputs(device)
    given = with_lse(inputs, options, impl)
    pair = [x.detach() for x in inputs]
    _, lse_s, lse_t = torch.ops.bertops.attention_kl_fwd(*pair, options["mask"], None, 0.25, 0.25, None, None)
    torch.testing.assert_close(lse_s, given["lse_s"])
    torch.testing.assert_close(lse_t, given["lse_t"])


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, ("lse_s", "lse_t", "both"), {"lse_s": torch.zeros(2, 2, 17)}),
        (ValueError, ("lse_s", "lse_t", "both"), {"lse_t": torch.zeros(2, 2, 17)}),
        (
            ValueError,
            ("lse_t", "(2, 2, 17)", "(2, 17)"),
            {"lse_s": torch.zeros(2, 2, 17), "lse_t": torch.zeros(2, 17)},
        ),
    ],
)
def test_bad_lse_is_named(error, words, options):
    inputs = [x.detach() for x in Case().inputs("cpu")[0]]
    with pytest.raises(error) as caught:
        bertops.attention_kl(*inputs, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
