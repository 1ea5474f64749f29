import pytest
import torch
import torch.nn.functional as F

import bertops
from attention_cases import Case, check, run

HALF = (torch.bfloat16, torch.float16)

CASES = [
    Case(),
    Case(length=1),
    Case(length=129, heads=1, head_dim=64),
    *(Case(length=33, heads=1, head_dim=d) for d in (1, 7, 26, 80, 256)),
    *(Case(length=40, padding=kind) for kind in ("right", "left", "holes", "nothing")),
    Case(length=150, padding="one row empty", head_dim=32),
    Case(batch=1, length=64, lengths=(20, 1, 0, 43)),
    Case(length=150, padding="holes", options={"window": 20}),
    Case(batch=1, length=150, lengths=(20, 100, 30), options={"window": 9}),
    Case(length=37, padding="right", options={"dropout_p": 0.3}),
    Case(length=50, packed_projection=True, padding="right"),
    *(Case(length=65, head_dim=32, dtype=dtype, padding="right") for dtype in HALF),
    Case(length=70, dtype=torch.float16, padding="holes", options={"window": 20}),
    Case(batch=1, length=90, dtype=torch.float16, lengths=(20, 1, 0, 69), options={"dropout_p": 0.3}),
    *(
        Case(length=65, head_dim=32, dtype=dtype, padding="holes", options={"scores_dtype": torch.float32})
        for dtype in HALF
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(case, kernel):
    if kernel == ("triton", "cpu") and case.dtype == torch.bfloat16:
        pytest.skip("bf16 products are wrong in Triton's interpreter")
    check("attention_with_scores", case, kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, "right", "holes"])
def test_matches_oracle_over_many_blocks(dtype, padding):
    case = Case(batch=2, heads=1, length=327, head_dim=64, dtype=dtype, padding=padding)
    check("attention_with_scores", case, ("cpu", "cpu"))


def test_map_is_tinybert_loss_as_it_stands(kernel):
    """mse_loss of two maps: masked entries are 0 in both, as TinyBERT zeroes them."""
    impl, device = kernel
    qkv, options = Case(length=30, padding="right").inputs(device)
    teacher = [torch.randn_like(x) for x in qkv]
    _, scores_s = bertops.attention_with_scores(*qkv, impl=impl, **options)
    with torch.no_grad():
        _, scores_t = bertops.attention_with_scores(*teacher, impl=impl, **options)
    loss = F.mse_loss(scores_s, scores_t)
    loss.backward()
    pairs = (options["mask"][:, :, None] & options["mask"][:, None, :])[:, None]
    q, k, _ = (x.detach().double().requires_grad_() for x in qkv)
    difference = (q @ k.transpose(-1, -2) - teacher[0].double() @ teacher[1].double().transpose(-1, -2)) / 4
    expected = torch.where(pairs, difference, 0.0).square().mean()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(qkv[0].grad.double(), q.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(qkv[1].grad.double(), k.grad, rtol=1e-4, atol=1e-6)
    assert not qkv[2].grad.any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_values_reach_nothing(kernel, poison):
    impl, device = kernel
    qkv, options = Case(length=50, padding="holes").inputs(device)
    rows = options["mask"][:, None, :, None]
    pairs = rows & options["mask"][:, None, None, :]
    poisoned = [x.detach().masked_fill(~rows, poison).requires_grad_() for x in qkv]
    out, scores = bertops.attention_with_scores(*poisoned, impl=impl, **options)
    clean = run("attention_with_scores", qkv, options, impl)
    assert torch.equal(out, clean["out"]) and torch.equal(scores, clean["scores"])
    grad_out = torch.randn_like(out).masked_fill(~rows, poison)
    grad_scores = torch.randn_like(scores).masked_fill(~pairs, poison)
    torch.autograd.backward([out, scores], [grad_out, grad_scores])
    for x in poisoned:
        assert x.grad.isfinite().all()
        assert not torch.where(rows, 0.0, x.grad).any()


def test_gradient_of_one_output_alone(kernel):
    impl, device = kernel
    qkv, options = Case(length=30, padding="right").inputs(device)
    for chosen in (0, 1):
        outputs = bertops.attention_with_scores(*qkv, impl=impl, **options)
        expected = bertops.attention_with_scores(*qkv, impl="reference", **options)
        grad = torch.randn_like(outputs[chosen])
        got = torch.autograd.grad(outputs[chosen], qkv, grad)
        want = torch.autograd.grad(expected[chosen], qkv, grad, allow_unused=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-5)


def test_transposed_and_expanded_score_gradients(kernel):
    impl, device = kernel
    qkv, _ = Case(length=20).inputs(device)
    _, scores = bertops.attention_with_scores(*qkv, impl=impl)
    grad = torch.randn(2, 2, 20, 20, device=device)
    got = torch.autograd.grad(scores, qkv[:2], grad.mT, retain_graph=True)
    want = torch.autograd.grad(scores, qkv[:2], grad.mT.contiguous(), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    got = torch.autograd.grad(scores.sum(), qkv[:2], retain_graph=True)
    want = torch.autograd.grad(scores, qkv[:2], torch.ones_like(scores))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradcheck_of_the_cpu_kernel():
    qkv, options = Case(length=7, heads=1, head_dim=5, dtype=torch.float64, padding="holes").inputs("cpu")
    assert torch.autograd.gradcheck(
        lambda *qkv: bertops.attention_with_scores(*qkv, impl="cpu", window=3, **options), qkv
    )


def test_opcheck():
    q, k, v = (x.detach() for x in Case(length=12).inputs("cpu")[0])
    op = torch.ops.bertops.attention_with_scores_fwd.default
    torch.library.opcheck(op, (q, k, v, None, None, 5, 0.25, 0.0, None, torch.bfloat16))
    out, lse, scores = op(q, k, v, None, None, 5, 0.25, 0.0, None, torch.float32)
    torch.library.opcheck(
        torch.ops.bertops.attention_bwd.default,
        (q, None, scores, q, k, v, out, lse, None, None, 5, 0.25, 0.0, None),
    )


def test_compiles_whole_with_dynamic_shapes():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(q, k, v):
        out, scores = bertops.attention_with_scores(q, k, v)
        return out.sum() + scores.square().mean()

    for length in (12, 20):
        qkv, _ = Case(length=length).inputs("cpu")
        compiled = torch.autograd.grad(step(*qkv), qkv)
        out, scores = bertops.attention_with_scores(*qkv)
        eager = torch.autograd.grad(out.sum() + scores.square().mean(), qkv)
        for a, b in zip(compiled, eager, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 2, 8, 16), (2, 2, 0, 16)])
def test_nothing_to_attend(shape, kernel):
    impl, device = kernel
    q = torch.randn(shape, device=device, requires_grad=True)
    out, scores, lse = bertops.attention_with_scores(q, q, q, return_lse=True, impl=impl)
    (out.sum() + scores.sum()).backward()
    assert scores.shape == (*shape[:3], shape[2]) and lse.shape == shape[:3]


def test_bad_scores_dtype_is_named():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(TypeError, match=r"scores_dtype.*int32"):
        bertops.attention_with_scores(q, q, q, scores_dtype=torch.int32)
