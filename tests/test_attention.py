import pytest
import torch
import torch._dynamo.testing
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import bertops
from attention_cases import Case, check, compare, padding_mask, run
from bertops import _backend, reference

HALF = (torch.bfloat16, torch.float16)

CASES = [
    Case(),
    Case(length=1),
    Case(batch=1, heads=3, length=70, head_dim=32),
    Case(length=129, heads=1, head_dim=64),
    *(Case(length=33, heads=1, head_dim=d) for d in (1, 6, 7, 8, 12, 26, 48, 80, 128, 256)),
    *(Case(length=40, padding=kind) for kind in ("right", "left", "holes", "nothing", "integer")),
    Case(length=150, padding="one row empty", head_dim=32),
    Case(batch=1, length=64, lengths=(20, 1, 0, 43)),
    Case(batch=1, length=140, lengths=(140,)),
    *(Case(length=45, options={"window": w}) for w in (0, 3, 44)),
    Case(length=150, padding="holes", options={"window": 20}),
    Case(batch=1, length=150, lengths=(20, 100, 30), options={"window": 9}),
    Case(length=37, options={"scale": 0.5}),
    Case(length=37, options={"scale": -0.3}),
    Case(length=37, options={"dropout_p": 0.3}),
    Case(length=37, padding="holes", options={"dropout_p": 0.3, "window": 9}),
    Case(batch=1, length=64, lengths=(20, 1, 0, 43), options={"dropout_p": 0.3}),
    Case(length=50, packed_projection=True, padding="right"),
    *(Case(length=65, head_dim=32, dtype=dtype, padding="right") for dtype in HALF),
    Case(length=70, dtype=torch.float16, padding="holes", options={"window": 20}),
    Case(length=70, dtype=torch.float16, padding="left", options={"dropout_p": 0.3}),
    Case(batch=1, length=90, dtype=torch.float16, lengths=(20, 1, 0, 69), options={"window": 30}),
]


def usable(case: Case, kernel: tuple[str, str]) -> bool:
    """Triton's interpreter multiplies the bit patterns of bf16; the real compiler does not."""
    return not (kernel == ("triton", "cpu") and case.dtype == torch.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(case, kernel):
    if usable(case, kernel):
        check("attention", case, kernel)
    else:
        pytest.skip("bf16 products are wrong in Triton's interpreter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, "right", "holes"])
def test_matches_oracle_over_many_blocks(dtype, padding):
    """Long enough that every loop over tiles turns more than once, on the CPU kernel's speed."""
    case = Case(batch=2, heads=1, length=327, head_dim=64, dtype=dtype, padding=padding)
    check("attention", case, ("cpu", "cpu"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_mask_and_stride(data):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    length, head_dim = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 70))
    # the rule compares two rounding errors, and with a handful of rows either may vanish by luck
    assume(batch * heads * length >= 32)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, *HALF]))
    options = {}
    if data.draw(st.booleans()):
        options["window"] = data.draw(st.integers(0, 30))
    if data.draw(st.booleans()):
        options["dropout_p"] = 0.25
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    case = Case(
        batch, heads, length, head_dim, dtype, options=options, packed_projection=data.draw(st.booleans())
    )
    qkv, options = case.inputs("cpu")
    options["mask"] = mask.view(batch, length)
    compare("attention", str(case), qkv, options, "cpu", "cpu")


@pytest.mark.parametrize("padding", ["right", "left", "holes", "one row empty", "nothing"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_values_reach_nothing(kernel, padding, poison):
    impl, device = kernel
    qkv, options = Case(length=50, padding=padding).inputs(device)
    masked = ~options["mask"][:, None, :, None].expand_as(qkv[0])
    clean = run("attention", qkv, options, impl)
    poisoned = [x.detach().masked_fill(masked, poison).requires_grad_() for x in qkv]
    out, lse = bertops.attention(*poisoned, return_lse=True, impl=impl, **options)
    assert torch.equal(out, clean["out"]) and torch.equal(lse, clean["lse"])
    grad = torch.randn_like(out).masked_fill(masked, poison)
    out.backward(grad)
    for x in poisoned:
        assert x.grad.isfinite().all()
        assert not x.grad[masked].any()


def test_packed_rows_equal_padded_rows_with_dropout(kernel):
    impl, device = kernel
    lengths = (9, 30, 1)
    qkv, _ = Case(batch=3, length=30).inputs(device)
    real = torch.arange(30, device=device) < torch.tensor(lengths, device=device)[:, None]
    torch.manual_seed(3)
    padded = bertops.attention(*qkv, real, dropout_p=0.2, impl=impl)
    packed = [x.transpose(1, 2)[real].transpose(0, 1)[None] for x in qkv]
    cu_seqlens = torch.tensor((0, 9, 39, 40), dtype=torch.int32, device=device)
    torch.manual_seed(3)
    out = bertops.attention(*packed, cu_seqlens=cu_seqlens, dropout_p=0.2, impl=impl)
    torch.testing.assert_close(out[0].transpose(0, 1), padded.transpose(1, 2)[real], rtol=1e-5, atol=1e-6)


def test_dropout_follows_the_generator(kernel):
    impl, device = kernel
    (q, k, _), _ = Case(batch=2, heads=4, length=64).inputs(device)
    ones = torch.ones_like(q)
    calls = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        calls.append(bertops.attention(q, k, ones, dropout_p=0.4, impl=impl))
    assert torch.equal(calls[0], calls[1]) and not torch.equal(calls[0], calls[2])
    # rows of P o Z sum to 1 on average: 512 rows of 64 keys, standard error about 0.005
    assert abs(calls[0][..., 0].mean().item() - 1) < 0.03


def test_philox_known_answers():
    """The vectors published with the generator (Random123's kat_vectors)."""
    ones = 0xFFFFFFFF
    zeros = reference.philox((torch.tensor([0]),) * 4, torch.tensor([0]))
    assert [int(x) for x in zeros] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    full = reference.philox((torch.tensor([ones]),) * 4, torch.tensor([-1]))
    assert [int(x) for x in full] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(
    "case", [Case(length=70, padding="holes"), Case(batch=1, length=300, heads=1)], ids=str
)
def test_bit_identical_from_run_to_run(case, kernel):
    impl, device = kernel
    qkv, options = case.inputs(device)
    first = run("attention", qkv, options, impl)
    for _ in range(3):
        again = run("attention", qkv, options, impl)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("shape", [(0, 2, 8, 16), (2, 0, 8, 16), (2, 2, 0, 16)])
def test_nothing_to_attend(shape, kernel):
    impl, device = kernel
    q = torch.randn(shape, device=device, requires_grad=True)
    out, lse = bertops.attention(q, q, q, return_lse=True, impl=impl)
    out.sum().backward()
    assert out.shape == q.grad.shape == shape and lse.shape == shape[:3]


def test_no_packed_sequences(kernel):
    impl, device = kernel
    q = torch.randn(1, 2, 0, 16, device=device)
    cu_seqlens = torch.zeros(1, dtype=torch.int32, device=device)
    assert bertops.attention(q, q, q, cu_seqlens=cu_seqlens, impl=impl).shape == q.shape


def test_strides_are_read_or_copied(kernel):
    impl, device = kernel
    plain = [torch.randn(2, 2, 20, 24, device=device) for _ in range(3)]
    expected = bertops.attention(*plain, impl=impl)
    views = [
        [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in plain],
        [torch.cat([x, x], -1)[..., :24] for x in plain],
        [torch.stack([x, x], -1)[..., 0] for x in plain],
        [x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for x in plain],
        [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in plain],
    ]
    for qkv in views:
        assert torch.equal(bertops.attention(*qkv, impl=impl), expected)
    shared = plain[0][:, :1].expand(2, 2, 20, 24)
    torch.testing.assert_close(
        bertops.attention(shared, shared, shared, impl=impl),
        bertops.attention(*(shared.contiguous(),) * 3, impl=impl),
    )


def test_expanded_upstream_gradient(kernel):
    impl, device = kernel
    qkv, _ = Case().inputs(device)
    bertops.attention(*qkv, impl=impl).sum().backward()
    expanded = [x.grad for x in qkv]
    dense = [x.detach().requires_grad_() for x in qkv]
    out = bertops.attention(*dense, impl=impl)
    out.backward(torch.ones_like(out))
    assert all(torch.equal(a, b.grad) for a, b in zip(expanded, dense, strict=True))


def test_some_inputs_without_gradient(kernel):
    impl, device = kernel
    qkv, _ = Case().inputs(device)
    full = run("attention", qkv, {}, impl)
    for chosen in range(3):
        inputs = [x.detach().requires_grad_(i == chosen) for i, x in enumerate(qkv)]
        out, lse = bertops.attention(*inputs, return_lse=True, impl=impl)
        generator = torch.Generator().manual_seed(2)
        upstream = [torch.randn(x.shape, generator=generator).to(x) for x in (out, lse)]
        torch.autograd.backward([out, lse], upstream)
        assert torch.equal(inputs[chosen].grad, full["d" + "qkv"[chosen]])
        assert all(x.grad is None for i, x in enumerate(inputs) if i != chosen)


def test_second_backward_on_a_retained_graph(kernel):
    impl, device = kernel
    qkv, _ = Case().inputs(device)
    out = bertops.attention(*qkv, impl=impl)
    out.sum().backward(retain_graph=True)
    once = [x.grad.clone() for x in qkv]
    out.sum().backward()
    assert all(torch.equal(x.grad, 2 * g) for x, g in zip(qkv, once, strict=True))


def test_double_backward_is_refused(kernel):
    impl, device = kernel
    qkv, _ = Case().inputs(device)
    out = bertops.attention(*qkv, impl=impl)
    (grad,) = torch.autograd.grad(out.sum(), qkv[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"Attention.*double backward"):
        grad.sum().backward()


def test_gradcheck_of_the_cpu_kernel():
    qkv, options = Case(length=7, heads=1, head_dim=5, dtype=torch.float64, padding="holes").inputs("cpu")

    def call(q, k, v):
        out, lse = bertops.attention(q, k, v, return_lse=True, impl="cpu", **options)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(call, qkv)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_opcheck(layout, dropout_p):
    q, k, v = (x.detach() for x in Case(batch=1, length=12).inputs("cpu")[0])
    mask = padding_mask("right", 1, 12) if layout == "padded" else None
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32) if layout == "packed" else None
    seed = torch.tensor([7]) if dropout_p else None
    arguments = (mask, cu_seqlens, -1, 0.25, dropout_p, seed)
    # NaN-filled allocations compare unequal to themselves where opcheck runs an op on its mutated copy
    torch.library.opcheck(torch.ops.bertops.attention_fwd.default, (q, k, v, *arguments))
    out, lse = torch.ops.bertops.attention_fwd(q, k, v, *arguments)
    torch.library.opcheck(
        torch.ops.bertops.attention_bwd.default, (q, lse, None, q, k, v, out, lse, *arguments)
    )


def test_compiles_whole_with_dynamic_shapes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(q, k, v, mask):
        return bertops.attention(q, k, v, mask, dropout_p=0.1) * 2

    for length in (12, 20, 33):
        qkv, options = Case(length=length, padding="right").inputs("cpu")
        torch.manual_seed(4)
        compiled = step(*qkv, options["mask"])
        torch.manual_seed(4)
        eager = bertops.attention(*qkv, options["mask"], dropout_p=0.1) * 2
        torch.testing.assert_close(compiled, eager)
        grads = torch.autograd.grad(compiled.sum(), qkv)
        for a, b in zip(grads, torch.autograd.grad(eager.sum(), qkv), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def test_autocast_runs_in_its_dtype():
    qkv, _ = Case().inputs("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = bertops.attention(*qkv)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert qkv[0].grad.dtype == torch.float32


def test_checkpointing_redraws_the_same_dropout(kernel):
    impl, device = kernel
    qkv, _ = Case().inputs(device)

    def call(q, k, v):
        return bertops.attention(q, k, v, dropout_p=0.5, impl=impl)

    torch.manual_seed(8)
    call(*qkv).sum().backward()
    plain = [x.grad.clone() for x in qkv]
    for x in qkv:
        x.grad = None
    torch.manual_seed(8)
    torch.utils.checkpoint.checkpoint(call, *qkv, use_reentrant=False).sum().backward()
    assert all(torch.equal(x.grad, g) for x, g in zip(qkv, plain, strict=True))


def test_threads_do_not_change_the_forward():
    qkv, _ = Case(batch=1, heads=1, length=400, head_dim=32).inputs("cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = bertops.attention(*qkv)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(bertops.attention(*qkv), single)


def q_of(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


GOOD = q_of(2, 3, 8, 16)
PACKED = q_of(1, 3, 8, 16)


@pytest.mark.parametrize(
    ("error", "words", "arguments", "options"),
    [
        (ValueError, ("q ", "(2, 8, 16)"), (q_of(2, 8, 16), GOOD, GOOD), {}),
        (TypeError, ("q ", "int64"), (GOOD.long(), GOOD, GOOD), {}),
        (TypeError, ("q ", "list"), ([1.0], GOOD, GOOD), {}),
        (ValueError, ("q ", "256", "257"), (q_of(1, 1, 4, 257),) * 3, {}),
        (ValueError, ("q ", "256", "(1, 1, 4, 0)"), (q_of(1, 1, 4, 0),) * 3, {}),
        (ValueError, ("k ", "(2, 4, 8, 16)"), (GOOD, q_of(2, 4, 8, 16), GOOD), {}),
        (ValueError, ("v ", "(2, 3, 9, 16)"), (GOOD, GOOD, q_of(2, 3, 9, 16)), {}),
        (TypeError, ("k ", "bfloat16"), (GOOD, GOOD.bfloat16(), GOOD), {}),
        (ValueError, ("v ", "meta"), (GOOD, GOOD, GOOD.to("meta")), {}),
        (ValueError, ("mask", "(2, 9)"), (GOOD,) * 3, {"mask": torch.ones(2, 9, dtype=torch.bool)}),
        (TypeError, ("mask", "float32"), (GOOD,) * 3, {"mask": torch.ones(2, 8)}),
        (ValueError, ("mask", "meta"), (GOOD,) * 3, {"mask": torch.ones(2, 8, device="meta").bool()}),
        (
            ValueError,
            ("mask", "cu_seqlens"),
            (PACKED,) * 3,
            {"mask": torch.ones(1, 8).bool(), "cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)},
        ),
        (
            ValueError,
            ("B = 1", "(2, 3"),
            (GOOD,) * 3,
            {"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)},
        ),
        (ValueError, ("cu_seqlens", "int64"), (PACKED,) * 3, {"cu_seqlens": torch.tensor([0, 8])}),
        (
            ValueError,
            ("cu_seqlens", "decrease"),
            (PACKED,) * 3,
            {"cu_seqlens": torch.tensor([0, 6, 4, 8], dtype=torch.int32)},
        ),
        (
            ValueError,
            ("cu_seqlens", "0 to 9"),
            (PACKED,) * 3,
            {"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)},
        ),
        (ValueError, ("window", "-1"), (GOOD,) * 3, {"window": -1}),
        (ValueError, ("window", "1.5"), (GOOD,) * 3, {"window": 1.5}),
        (ValueError, ("dropout_p", "1.0"), (GOOD,) * 3, {"dropout_p": 1.0}),
        (ValueError, ("dropout_p", "-0.1"), (GOOD,) * 3, {"dropout_p": -0.1}),
        (ValueError, ("impl", "fast"), (GOOD,) * 3, {"impl": "fast"}),
        (RuntimeError, ("attention", "cuda"), (GOOD,) * 3, {"impl": "cuda"}),
        (RuntimeError, ("meta", "reference"), (GOOD.to("meta"),) * 3, {}),
    ],
)
def test_bad_input_is_named(error, words, arguments, options):
    with pytest.raises(error) as caught:
        bertops.attention(*arguments, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_malformed_cu_seqlens_below_the_checks():
    """A compiled graph cannot look at the values; the kernel does before it reads."""
    q = PACKED
    bad = torch.tensor([0, 6, 4, 8], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        torch.ops.bertops.attention_fwd(q, q, q, None, bad, -1, 1.0, 0.0, None)


def test_use_impl_reaches_every_call_inside():
    with bertops.use_impl("reference"):
        assert _backend.resolve("attention", "auto", torch.device("cpu")) == "reference"
        assert _backend.resolve("attention", "cpu", torch.device("cpu")) == "cpu"
    assert _backend.resolve("attention", "auto", torch.device("cpu")) == "cpu"
