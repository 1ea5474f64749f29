"""What the three losses between a teacher's and a student's attention have in common."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import bertops
from pair_cases import LOSSES, Case, call, check, compare, reference_rows, run

HALF = (torch.bfloat16, torch.float16)
OPS = sorted(LOSSES)
LONG = pytest.mark.long

CASES = [
    Case(),
    Case(length=1),
    Case(batch=1, heads=3, length=70, head_dim=32),
    Case(length=129, heads=1, head_dim=64),
    *(Case(length=33, heads=1, head_dim=d) for d in (1, 6, 7, 8, 12, 26, 48, 80, 256)),
    Case(length=40, head_dim=32, head_dim_t=64),
    Case(length=40, head_dim=26, head_dim_t=7, padding="holes"),
    *(Case(length=40, padding=kind) for kind in ("right", "left", "holes", "nothing", "integer")),
    Case(length=150, padding="one row empty", head_dim=32),
    Case(batch=1, length=64, lengths=(20, 1, 0, 43)),
    pytest.param(Case(batch=1, length=140, lengths=(140,)), marks=LONG),
    Case(length=37, options={"scale_s": 0.5, "scale_t": -0.3}),
    Case(length=50, packed_projection=True, padding="right"),
    *(Case(length=40, reduction="none", padding=kind) for kind in (None, "holes")),
    Case(batch=1, length=64, lengths=(20, 1, 0, 43), reduction="none"),
    Case(length=40, reduction="sum", padding="right"),
    *(Case(length=65, head_dim=32, dtype=dtype, padding="right") for dtype in HALF),
    Case(length=70, dtype=torch.float16, head_dim_t=32, padding="holes", reduction="none"),
    Case(batch=1, length=90, dtype=torch.float16, lengths=(20, 1, 0, 69)),
    Case(length=40, dtype=torch.float16, dtype_t=torch.float32),
    Case(length=40, dtype=torch.float32, dtype_t=torch.float16, padding="right"),
]


def usable(case: Case, kernel: tuple[str, str]) -> bool:
    """Triton's interpreter multiplies the bit patterns of bf16; the real compiler does not."""
    return not (kernel == ("triton", "cpu") and torch.bfloat16 in (case.dtype, case.dtype_t))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_matches_oracle(op, case, kernel):
    if usable(case, kernel):
        check(op, case, kernel)
    else:
        pytest.skip("bf16 products are wrong in Triton's interpreter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, "holes"])
@pytest.mark.parametrize("op", OPS)
def test_matches_oracle_over_many_blocks(op, dtype, padding):
    """Long enough that every loop over tiles turns more than once, on the CPU kernel's speed."""
    case = Case(heads=1, length=327, head_dim=64, head_dim_t=32, dtype=dtype, padding=padding)
    check(op, case, ("cpu", "cpu"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("op", OPS)
def test_any_shape_mask_and_stride(op, data):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    length = data.draw(st.integers(1, 80))
    # the rule compares two rounding errors, and with a handful of rows either may vanish by luck
    assume(batch * heads * length >= 32)
    dtypes = st.sampled_from([torch.float32, *HALF])
    case = Case(
        batch,
        heads,
        length,
        data.draw(st.integers(1, 70)),
        data.draw(st.integers(1, 70)),
        data.draw(dtypes),
        data.draw(dtypes),
        reduction=data.draw(st.sampled_from(["mean", "sum", "none"])),
        packed_projection=data.draw(st.booleans()),
    )
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)))
    assume(mask.sum() * heads >= 32)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    inputs, options = case.inputs("cpu")
    options["mask"] = mask.view(batch, length)
    compare(op, str(case), inputs, options, "cpu")


@pytest.mark.parametrize(
    "padding",
    ["holes", *(pytest.param(x, marks=LONG) for x in ("right", "left", "one row empty", "nothing"))],
)
@pytest.mark.parametrize("poison", [float("nan"), pytest.param(float("inf"), marks=LONG)])
@pytest.mark.parametrize("op", OPS)
def test_masked_values_reach_nothing(op, kernel, padding, poison):
    impl, device = kernel
    for reduction in ("mean", "none"):
        inputs, options = Case(length=50, padding=padding, reduction=reduction).inputs(device)
        masked = ~options["mask"][:, None, :, None].expand_as(inputs[0])
        clean = run(op, inputs, options, impl)
        poisoned = [x.detach().masked_fill(masked, poison) for x in inputs]
        dirty = run(op, poisoned, options, impl)
        assert all(torch.equal(clean[name], dirty[name]) for name in clean)
        for name in clean:
            rows = masked[..., 0] if name == "loss" else masked
            assert clean[name].isfinite().all()
            assert (reduction == "mean" and name == "loss") or not clean[name][rows].any()
        if padding == "nothing":
            assert not any(x.any() for x in clean.values())


@pytest.mark.parametrize("op", OPS)
def test_masked_upstream_gradients_reach_nothing(op, kernel):
    impl, device = kernel
    inputs, options = Case(length=30, padding="holes", reduction="none").inputs(device)
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    leaves = leaves[::2] if op == "relation_kl" else leaves
    rows = call(op, leaves, options, impl)
    real = options["mask"][:, None, :].expand_as(rows)
    rows.backward(torch.ones_like(rows).masked_fill(~real, float("nan")))
    assert all(x.grad.isfinite().all() for x in leaves if x.requires_grad)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("lengths", [(9, 30, 1), (30, 0, 14)])
def test_packed_rows_equal_padded_rows(op, kernel, lengths):
    impl, device = kernel
    inputs, _ = Case(batch=3, length=30).inputs(device)
    real = torch.arange(30, device=device) < torch.tensor(lengths, device=device)[:, None]
    packed = [x.detach().transpose(1, 2)[real].transpose(0, 1)[None] for x in inputs]
    packed = [x.requires_grad_(i < 2) for i, x in enumerate(packed)]
    cu_seqlens = torch.tensor((0, *lengths), device=device).cumsum(0).to(torch.int32)
    padded = run(op, inputs, {"mask": real}, impl)
    together = run(op, packed, {"cu_seqlens": cu_seqlens}, impl)
    for name, x in together.items():
        expected = (
            padded[name] if name == "loss" else padded[name].transpose(1, 2)[real].transpose(0, 1)[None]
        )
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("op", OPS)
def test_mean_is_over_real_rows_or_pairs(op, kernel):
    impl, device = kernel
    for layout in ({"padding": "holes"}, {"batch": 1, "length": 40, "lengths": (7, 0, 33)}, {}):
        inputs, options = Case(**{"length": 25, **layout}).inputs(device)
        rows = reference_rows(op, inputs[::2] if op == "relation_kl" else inputs, options)
        if "mask" in options:
            real = options["mask"].sum(1)
        elif "cu_seqlens" in options:
            real = options["cu_seqlens"].diff()
        else:
            real = torch.full((2,), 25)
        count = (real * real).sum() if op == "attention_score_mse" else real.sum()
        expected = rows.sum() / (2 * count)
        actual = run(op, inputs, options, impl)["loss"]
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.long
@pytest.mark.parametrize(
    "case", [Case(length=70, padding="holes"), Case(batch=1, length=600, heads=1, head_dim=32)], ids=str
)
@pytest.mark.parametrize("op", OPS)
def test_bit_identical_from_run_to_run(op, case, kernel):
    impl, device = kernel
    for reduction in ("mean", "none"):
        inputs, options = case.inputs(device)
        options["reduction"] = reduction
        first = run(op, inputs, options, impl)
        for _ in range(3):
            again = run(op, inputs, options, impl)
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("shape", [(0, 2, 8, 16), (2, 0, 8, 16), (2, 2, 0, 16)])
@pytest.mark.parametrize("op", OPS)
def test_nothing_to_compare(op, shape, kernel):
    impl, device = kernel
    student = torch.randn(shape, device=device, requires_grad=True)
    teacher = torch.randn(shape, device=device)
    inputs = (student, teacher) if op == "relation_kl" else (student, student, teacher, teacher)
    for reduction in ("mean", "sum", "none"):
        loss = LOSSES[op](*inputs, reduction=reduction, impl=impl)
        loss.sum().backward()
        assert loss.shape == (shape[:3] if reduction == "none" else ())
        assert not loss.any() and student.grad.shape == shape


@pytest.mark.long
@pytest.mark.parametrize("op", OPS)
def test_strides_are_read_or_copied(op, kernel):
    impl, device = kernel
    plain = [x.detach() for x in Case(length=20, head_dim=24).inputs(device)[0]]
    expected = run(op, plain, {}, impl)
    views = [
        [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in plain],
        [torch.cat([x, x], -1)[..., :24] for x in plain],
        [torch.stack([x, x], -1)[..., 0] for x in plain],
        [x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for x in plain],
        [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in plain],
    ]
    for inputs in views:
        actual = run(op, inputs, {}, impl)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("op", OPS)
def test_second_backward_on_a_retained_graph(op, kernel):
    impl, device = kernel
    inputs = Case().inputs(device)[0]
    leaves = inputs[::2] if op == "relation_kl" else inputs
    loss = call(op, leaves, {}, impl)
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in leaves if x.requires_grad]
    loss.backward()
    assert all(torch.equal(x.grad, 2 * g) for x, g in zip(leaves, once, strict=False))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("op", OPS)
def test_double_backward_is_refused(op, reduction, kernel):
    impl, device = kernel
    inputs = Case().inputs(device)[0]
    loss = call(op, inputs[::2] if op == "relation_kl" else inputs, {"reduction": reduction}, impl)
    (grad,) = torch.autograd.grad(loss.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("op", ["attention_kl", "attention_score_mse"])
def test_one_student_input_without_gradient(op, kernel):
    impl, device = kernel
    inputs = Case().inputs(device)[0]
    full = run(op, inputs, {}, impl)
    for chosen in range(2):
        leaves = [x.detach().requires_grad_(i == chosen) for i, x in enumerate(inputs)]
        generator = torch.Generator().manual_seed(2)
        call(op, leaves, {}, impl).backward(torch.rand((), generator=generator) + 0.5)
        assert torch.equal(leaves[chosen].grad, full[("dq_s", "dk_s")[chosen]])
        assert leaves[1 - chosen].grad is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck_of_the_cpu_kernel(op, reduction):
    """Also what catches a missing transpose in the relation's gradient: its loss is right without it."""
    case = Case(length=7, heads=1, head_dim=5, head_dim_t=3, dtype=torch.float64, padding="holes")
    inputs, options = case.inputs("cpu")
    options["reduction"] = reduction
    leaves = inputs[::2] if op == "relation_kl" else inputs
    students = [x for x in leaves if x.requires_grad]
    teachers = [x for x in leaves if not x.requires_grad]
    assert torch.autograd.gradcheck(lambda *xs: LOSSES[op](*xs, *teachers, impl="cpu", **options), students)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("op", OPS)
def test_compiles_whole_with_dynamic_shapes(op, reduction):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(mask, *leaves):
        return LOSSES[op](*leaves, mask, reduction=reduction).sum()

    for length in (12, 50, 90):
        inputs, options = Case(length=length, padding="right").inputs("cpu")
        leaves = inputs[::2] if op == "relation_kl" else inputs
        students = [x for x in leaves if x.requires_grad]
        loss = step(options["mask"], *leaves)
        compiled = torch.autograd.grad(loss, students)
        expected = LOSSES[op](*leaves, options["mask"], reduction=reduction).sum()
        torch.testing.assert_close(loss, expected)
        for a, b in zip(compiled, torch.autograd.grad(expected, students), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", OPS)
def test_accepts_what_autocast_produced(op, kernel):
    impl, device = kernel
    if impl == "triton" and device == "cpu":
        pytest.skip("bf16 products are wrong in Triton's interpreter")
    inputs = [x.detach() for x in Case(dtype=torch.bfloat16).inputs(device)[0]]
    with torch.autocast(device, torch.bfloat16):
        inside = run(op, inputs, {}, impl)
    outside = run(op, inputs, {}, impl)
    assert inside["loss"].dtype == torch.float32
    assert all(torch.equal(inside[name], outside[name]) for name in inside)


GOOD = torch.zeros(2, 3, 8, 16)


@pytest.mark.parametrize(
    ("error", "words", "changes", "options"),
    [
        (TypeError, ("q_s", "NoneType"), {0: None}, {}),
        (ValueError, ("q_s", "(2, 3, 8)"), {0: GOOD[..., 0]}, {}),
        (TypeError, ("q_s", "int64"), {0: GOOD.long()}, {}),
        (ValueError, ("k_s", "(2, 3, 8, 16)", "(2, 3, 8, 12)"), {1: GOOD[..., :12]}, {}),
        (TypeError, ("k_s", "float32", "float16"), {1: GOOD.half()}, {}),
        (ValueError, ("q_t", "(2, 3, 8)", "(2, 2, 8, 16)"), {2: GOOD[:, :2], 3: GOOD[:, :2]}, {}),
        (ValueError, ("k_t", "q_t", "(2, 3, 8, 12)"), {3: GOOD[..., :12]}, {}),
        (ValueError, ("q_t", "detach"), {2: GOOD.clone().requires_grad_()}, {}),
        (ValueError, ("k_t", "detach"), {3: GOOD.clone().requires_grad_()}, {}),
        (ValueError, ("q_t", "meta"), {2: GOOD.to("meta"), 3: GOOD.to("meta")}, {}),
        (ValueError, ("reduction", "batchmean"), {}, {"reduction": "batchmean"}),
        (ValueError, ("mask", "(2, 8)", "(2, 7)"), {}, {"mask": torch.ones(2, 7).bool()}),
        (TypeError, ("mask", "float32"), {}, {"mask": torch.ones(2, 8)}),
        (ValueError, ("B = 1",), {}, {"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)}),
        (ValueError, ("impl", "fast"), {}, {"impl": "fast"}),
        (RuntimeError, ("cuda",), {}, {"impl": "cuda"}),
    ],
)
@pytest.mark.parametrize("op", ["attention_kl", "attention_score_mse"])
def test_bad_input_is_named(op, error, words, changes, options):
    inputs = [changes.get(i, GOOD) for i in range(4)]
    with pytest.raises(error) as caught:
        LOSSES[op](*inputs, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_modules_are_the_functions():
    inputs, options = Case(length=20, padding="right", reduction="sum").inputs("cpu")
    x_s, _, x_t, _ = inputs
    mask, reduction, scale = options["mask"], "sum", {"scale_s": 0.3, "scale_t": 0.2}
    assert torch.equal(
        bertops.nn.AttentionKL(**scale, reduction=reduction)(*inputs, mask),
        bertops.attention_kl(*inputs, mask, **scale, reduction=reduction),
    )
    assert torch.equal(
        bertops.nn.RelationKL(4, **scale, reduction=reduction)(x_s, x_t, mask),
        bertops.relation_kl(x_s, x_t, mask, num_relation_heads=4, **scale, reduction=reduction),
    )
    assert torch.equal(
        bertops.nn.AttentionScoreMSE(form="gram", **scale, reduction=reduction)(*inputs, mask),
        bertops.attention_score_mse(*inputs, mask, form="gram", **scale, reduction=reduction),
    )


def test_losses_are_scalars_of_the_accumulator_dtype(kernel):
    impl, device = kernel
    for dtype in (torch.float16, torch.float32):
        inputs = [x.detach() for x in Case(dtype=dtype).inputs(device)[0]]
        assert bertops.attention_kl(*inputs, impl=impl).dtype == torch.float32
        assert bertops.attention_score_mse(*inputs, impl=impl).dtype == torch.float32
