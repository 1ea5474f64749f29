"""What the losses between paired rows of a student and of a teacher have in common."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import bertops
from row_pair_cases import LOSSES, OPS, Case, call, check, run, truth

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF, torch.float64)
LONG = pytest.mark.long

CASES = [
    Case(width=17, padding="holes"),
    Case(2, 9, 768, reduction="none"),
    Case(width=77, dtype=torch.float16, padding="holes"),
    Case(dtype=torch.float32, dtype_t=torch.bfloat16, padding="right"),
    *(
        pytest.param(case, marks=LONG)
        for case in (
            Case(),
            *(Case(width=width) for width in (2, 3, 15, 33, 312)),
            Case(1, 3, 2049, reduction="sum"),
            *(Case(padding=kind) for kind in ("right", "one row empty", "nothing", "integer")),
            *(Case(padding=kind, reduction="none") for kind in ("left", "holes")),
            *(Case(width=width, dtype=torch.bfloat16, padding="holes") for width in (64, 77)),
            Case(width=64, dtype=torch.float16, padding="holes"),
            Case(dtype=torch.float16, dtype_t=torch.float32, reduction="none"),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_matches_the_oracle(op, case, kernel):
    impl, device = kernel
    check(op, str(case), *case.inputs(device), impl)


@pytest.mark.parametrize("op", OPS)
def test_matches_the_oracle_in_fp64_and_mixed_with_it(op):
    for dtype, dtype_t in (
        (torch.float64, None),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ):
        case = Case(width=50, dtype=dtype, dtype_t=dtype_t, padding="holes", reduction="none")
        check(op, str(case), *case.inputs("cpu"), "cpu")


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_mask_and_stride(op, data):
    batch, length = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    # the rule compares two rounding errors, and with a handful of rows either may vanish by luck
    assume(batch * length >= 32)
    dtypes = st.sampled_from([torch.float32, *HALF])
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    # of few elements what is normalised is nearly fixed, and its gradient nothing but rounding
    width = data.draw(st.integers(8 if op == "feature_map_transfer" else 2, 150))
    spread = data.draw(st.floats(0.1, 4.0))
    case = Case(
        batch, length, width, data.draw(dtypes), data.draw(dtypes), reduction=reduction, spread=spread
    )
    inputs, options = case.inputs("cpu")
    options["mask"] = torch.rand(batch, length) < data.draw(st.floats(0.5, 1.0))
    assume(options["mask"].sum() >= 16)
    views = [data.draw(st.sampled_from(list(VIEWS))) for _ in inputs]
    inputs = [VIEWS[view](x) for view, x in zip(views, inputs, strict=True)]
    check(op, str(case), inputs, options, "cpu")


# The values of (B, N, H), at other strides.
VIEWS = {
    "plain": lambda x: x,
    "without the first token": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "part of a wider row": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every other element": lambda x: torch.stack([x, x], -1)[..., 0],
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one element in": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.long
@pytest.mark.parametrize("op", OPS)
def test_strides_are_read_or_copied(op, kernel):
    impl, device = kernel
    for width in (32, 21):
        inputs, options = Case(width=width, padding="holes").inputs(device)
        expected = run(op, inputs, options, impl)
        for change in VIEWS.values():
            actual = run(op, [change(x) for x in inputs], options, impl)
            assert all(torch.equal(actual[name], expected[name]) for name in expected)
        (once,) = {*inputs[0].shape[:1]}
        rows = [x[:1].expand(once, -1, -1) for x in inputs]
        expanded, dense = (run(op, list(x), options, impl) for x in (rows, [x.contiguous() for x in rows]))
        assert all(torch.equal(expanded[name], dense[name]) for name in dense)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("op", OPS)
def test_any_leading_sizes(op, shape, kernel):
    impl, device = kernel
    student, teacher = (torch.randn(shape, device=device) for _ in range(2))
    mask = torch.rand(shape[:-1], device=device) < 0.7
    flat = [x.reshape(1, -1, 5) for x in (student, teacher)]
    for reduction in ("mean", "none"):
        actual = run(op, [student, teacher], {"mask": mask, "reduction": reduction}, impl)
        expected = run(op, flat, {"mask": mask.reshape(1, -1), "reduction": reduction}, impl)
        for name, x in actual.items():
            assert x.shape == (shape if name == "grad" else shape[:-1] if reduction == "none" else ())
            assert torch.equal(x.flatten(), expected[name].flatten())


@pytest.mark.parametrize("padding", ["holes", "nothing"])
@pytest.mark.parametrize("poison", [float("nan"), pytest.param(float("inf"), marks=LONG)])
@pytest.mark.parametrize("op", OPS)
def test_masked_values_reach_nothing(op, kernel, padding, poison):
    impl, device = kernel
    for reduction in ("mean", "none"):
        inputs, options = Case(width=40, padding=padding, reduction=reduction).inputs(device)
        masked = ~options["mask"]
        clean = run(op, inputs, options, impl)
        dirty = run(op, [x.masked_fill(masked[..., None], poison) for x in inputs], options, impl)
        for name, x in clean.items():
            assert torch.equal(x, dirty[name]) and x.isfinite().all()
            if name == "grad" or reduction == "none":
                assert not x[masked].any()
            assert padding != "nothing" or not x.any()


@pytest.mark.parametrize("op", OPS)
def test_masked_upstream_gradients_reach_nothing(op, kernel):
    impl, device = kernel
    (student, teacher), options = Case(padding="holes", reduction="none").inputs(device)
    losses = call(op, [student.requires_grad_(), teacher], options, impl)
    upstream = torch.ones_like(losses[0]).masked_fill(~options["mask"], float("nan"))
    (grad,) = torch.autograd.grad(losses, student, [upstream] * len(losses))
    assert grad.isfinite().all() and grad.any()


@pytest.mark.long
@pytest.mark.parametrize("op", OPS)
def test_a_bad_row_is_nan_and_alone(op, kernel):
    """Not 0, whatever place of the row it is in."""
    impl, device = kernel
    inputs, options = Case(width=70, reduction="none").inputs(device)
    clean = run(op, inputs, options, impl)
    for model in range(2):
        for place in (0, 40, 69):
            for bad in (float("nan"), float("inf")):
                spoilt = [x.clone() for x in inputs]
                spoilt[model][1, 4, place] = bad
                dirty = run(op, spoilt, options, impl)
                assert dirty["loss 0"][1, 4].isnan() and dirty["grad"][1, 4].isnan().any()
                for name, x in clean.items():
                    others = torch.ones_like(x, dtype=torch.bool)
                    others[1, 4] = False
                    assert torch.equal(dirty[name][others], x[others])


@pytest.mark.parametrize("op", OPS)
def test_identical_models(op, kernel):
    impl, device = kernel
    for width in (64, 77, 3000):
        for dtype, dtype_t in ((torch.float32, None), (torch.float16, None), (torch.float32, torch.float16)):
            case = Case(2, 9, width, dtype, dtype_t, noise=0.0, reduction="none", spread=5.0)
            results = run(op, *case.inputs(device), impl)
            assert not any(x.any() for x in results.values())


@pytest.mark.parametrize("noise", [pytest.param(1e-2, marks=LONG), 1e-3, pytest.param(1e-4, marks=LONG)])
@pytest.mark.parametrize("op", OPS)
def test_near_convergence(op, noise, kernel):
    """The kernel's digits, which plain PyTorch loses; inputs are the same numbers for the oracle."""
    impl, device = kernel
    inputs, options = Case(4, 30, 300, noise=noise, reduction="none").inputs(device)
    actual, exact = run(op, inputs, options, impl), truth(op, inputs, options)
    eager = run(op, inputs, options, "reference")
    for name, x in exact.items():
        error, scale = (actual[name].cpu() - x).norm(), x.norm()
        assert error <= 2 * (eager[name].cpu() - x).norm() + 1e-7 * scale, name
        # fp32 input differences have 1e-7 / noise of their own size as their unit
        assert error <= 1e-6 * scale / noise**0.75, (name, float(error / scale))
    assert all((x >= 0).all() for name, x in actual.items() if name != "grad")


@pytest.mark.long
@pytest.mark.parametrize("op", OPS)
def test_rows_are_reduced_over_the_real_ones(op, kernel):
    impl, device = kernel
    for padding in (None, "holes", "integer"):
        inputs, options = Case(padding=padding).inputs(device)
        mask = options.pop("mask", None)
        rows = call(op, inputs, {"mask": mask, "reduction": "none"}, impl)
        count = rows[0].numel() if mask is None else int((mask != 0).sum())
        for reduction, share in (("mean", 1 / count), ("sum", 1.0)):
            losses = call(op, inputs, {"mask": mask, "reduction": reduction}, impl)
            for loss, row in zip(losses, rows, strict=True):
                torch.testing.assert_close(loss.double(), row.double().sum() * share, rtol=1e-6, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (0, 5)])
@pytest.mark.parametrize("op", OPS)
def test_nothing_to_compare(op, shape, kernel):
    impl, device = kernel
    student = torch.randn(shape, device=device, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        losses = call(op, [student, torch.randn(shape, device=device)], {"reduction": reduction}, impl)
        (grad,) = torch.autograd.grad([x.sum() for x in losses], student)
        assert grad.shape == shape
        assert all(x.shape == (shape[:-1] if reduction == "none" else ()) and not x.any() for x in losses)


@pytest.mark.parametrize("op", OPS)
def test_second_backward_on_a_retained_graph(op, kernel):
    impl, device = kernel
    for reduction in ("mean", "none"):
        (student, teacher), options = Case(padding="holes", reduction=reduction).inputs(device)
        total = sum(3 * x.sum() for x in call(op, [student.requires_grad_(), teacher], options, impl))
        total.backward(retain_graph=True)
        once = student.grad.clone()
        total.backward()
        assert torch.equal(student.grad, 2 * once) and once.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("op", OPS)
def test_double_backward_is_refused(op, reduction, kernel):
    impl, device = kernel
    (student, teacher), options = Case(reduction=reduction).inputs(device)
    losses = call(op, [student.requires_grad_(), teacher], options, impl)
    (grad,) = torch.autograd.grad(sum(x.sum() for x in losses), student, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_without_a_gradient_there_is_no_graph(op, kernel):
    impl, device = kernel
    (student, teacher), options = Case().inputs(device)
    assert not any(x.requires_grad for x in call(op, [student, teacher], options, impl))
    with torch.no_grad():
        assert not any(x.requires_grad for x in call(op, [student.requires_grad_(), teacher], options, impl))


@pytest.mark.parametrize("op", OPS)
def test_bit_identical_from_run_to_run_and_for_any_threads(op):
    inputs, options = Case(40, 50, 300, reduction="none").inputs("cpu")
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        runs.append(run(op, inputs, options, "cpu"))
    torch.set_num_threads(threads)
    assert all(torch.equal(again[name], runs[0][name]) for again in runs for name in again)


@pytest.mark.long
@pytest.mark.parametrize("op", OPS)
def test_bit_identical_on_any_kernel(op, kernel):
    impl, device = kernel
    inputs, options = Case(padding="holes").inputs(device)
    first, again = (run(op, inputs, options, impl) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("width", [2, 5, 16])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck_of_the_cpu_kernel(op, width, reduction):
    case = Case(2, 3, width, torch.float64, padding="holes", reduction=reduction, spread=1.0)
    (student, teacher), options = case.inputs("cpu")
    assert torch.autograd.gradcheck(
        lambda x: tuple(call(op, [x, teacher], options, "cpu")), student.requires_grad_()
    )


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    for dtype, mask in ((torch.float32, None), (torch.float16, torch.rand(2, 5) < 0.5)):
        pair = [torch.randn(2, 5, 18).to(dtype), torch.randn(2, 18, 5).transpose(1, 2)]
        arguments = (*pair, mask, 1.0)
        forward = getattr(torch.ops.bertops, f"{op}_fwd").default
        torch.library.opcheck(forward, arguments)
        rows, stats = forward(*arguments)
        backward = getattr(torch.ops.bertops, f"{op}_bwd").default
        torch.library.opcheck(backward, (torch.ones_like(rows), *arguments, stats))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("op", OPS)
def test_compiles_whole_with_dynamic_shapes(op, reduction):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(student, teacher, mask):
        options = {"mask": mask, "reduction": reduction}
        return sum(x.sum() for x in call(op, [student, teacher], options, "auto"))

    for length in (12, 50, 90):
        (student, teacher), options = Case(length=length, padding="right").inputs("cpu")
        student.requires_grad_()
        loss = step(student, teacher, options["mask"])
        options["reduction"] = reduction
        expected = sum(x.sum() for x in call(op, [student, teacher], options, "auto"))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)))


@pytest.mark.long
@pytest.mark.parametrize("op", OPS)
def test_accepts_what_autocast_produced(op, kernel):
    impl, device = kernel
    for dtype in HALF:
        inputs, options = Case(dtype=dtype, dtype_t=torch.float32).inputs(device)
        outside = run(op, inputs, options, impl)
        with torch.autocast(device, torch.bfloat16):
            inside = run(op, inputs, options, impl)
        assert inside["loss 0"].dtype == torch.float32 and inside["grad"].dtype == dtype
        assert all(torch.equal(inside[name], outside[name]) for name in inside)


GOOD = torch.zeros(2, 8, 16)


@pytest.mark.parametrize(
    ("error", "words", "changes", "options"),
    [
        (TypeError, ("_s", "NoneType"), {0: None}, {}),
        (TypeError, ("_t", "NoneType"), {1: None}, {}),
        (ValueError, ("_s", "(..., H)", "()"), {0: torch.zeros(())}, {}),
        (ValueError, ("_s", "H >= 1", "(2, 8, 0)"), {0: GOOD[..., :0], 1: GOOD[..., :0]}, {}),
        (TypeError, ("_s", "int64"), {0: GOOD.long()}, {}),
        (TypeError, ("_t", "int64"), {1: GOOD.long()}, {}),
        (ValueError, ("_t", "(2, 8, 16)", "(2, 8, 15)"), {1: GOOD[..., :15]}, {}),
        (ValueError, ("_t", "detach"), {1: GOOD.clone().requires_grad_()}, {}),
        (ValueError, ("_t", "meta"), {1: GOOD.to("meta")}, {}),
        (ValueError, ("reduction", "batchmean"), {}, {"reduction": "batchmean"}),
        (ValueError, ("mask", "(2, 8)", "(2, 7)"), {}, {"mask": torch.ones(2, 7).bool()}),
        (ValueError, ("mask", "meta"), {}, {"mask": torch.ones(2, 8, device="meta").bool()}),
        (TypeError, ("mask", "float32"), {}, {"mask": torch.ones(2, 8)}),
        (TypeError, ("mask", "list"), {}, {"mask": [1]}),
        (ValueError, ("impl", "fast"), {}, {"impl": "fast"}),
        (RuntimeError, ("no cuda kernel",), {}, {"impl": "cuda"}),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_bad_input_is_named(op, error, words, changes, options):
    inputs = [changes.get(i, GOOD) for i in range(2)]
    with pytest.raises(error) as caught:
        LOSSES[op](*inputs, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        ("feature_map_transfer", "eps", 0.0),
        ("feature_map_transfer", "eps", float("nan")),
        ("kl_div_logits", "temperature", 0.0),
        ("kl_div_logits", "temperature", float("inf")),
    ],
)
def test_bad_options_are_named(op, name, value):
    with pytest.raises(ValueError, match=name):
        LOSSES[op](GOOD, GOOD, **{name: value})


def test_use_impl_chooses():
    inputs, options = Case(2, 5, 2000).inputs("cpu")
    for op in OPS:
        plain = call(op, inputs, options, "reference")
        with bertops.use_impl("reference"):
            assert all(map(torch.equal, call(op, inputs, options, "auto"), plain))


def test_modules_are_the_functions():
    (student, teacher), options = Case(padding="holes", reduction="sum").inputs("cpu")
    mask, reduction = options["mask"], options["reduction"]
    for module, op, fixed in (
        (bertops.nn.CosineLoss, "cosine_loss", {}),
        (bertops.nn.NormalizedMSE, "normalized_mse", {}),
        (bertops.nn.FeatureMapTransfer, "feature_map_transfer", {"eps": 0.1}),
        (bertops.nn.KLDivLogits, "kl_div_logits", {"temperature": 3.0}),
    ):
        losses = module(**fixed, reduction=reduction)(student, teacher, mask)
        expected = call(op, [student, teacher], {**options, **fixed}, "auto")
        assert all(map(torch.equal, [losses] if op != "feature_map_transfer" else losses, expected))
