import math

import pytest
import torch
import torch.nn.functional as F

import bertops
from row_pair_cases import Case, call, check, run, truth

INF = math.inf
OP = "kl_div_logits"


@pytest.mark.long
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_temperature(temperature, dtype, kernel):
    impl, device = kernel
    for width in (64, 333):
        case = Case(4, 25, width, dtype, options={"temperature": temperature})
        check(OP, str(case), *case.inputs(device), impl)


@pytest.mark.long
@pytest.mark.parametrize(
    ("width", "rows"), [(2, 400), (2048, 8), (2050, 8), pytest.param(30522, 4, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_few_and_many_classes(width, rows, spread, kernel):
    impl, device = kernel
    case = Case(1, rows, width, reduction="none", spread=spread)
    check(OP, str(case), *case.inputs(device), impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_262144(dtype):
    case = Case(1, 3, 262144, dtype, reduction="none", spread=3.0, options={"temperature": 2.0})
    check(OP, str(case), *case.inputs("cpu"), "cpu")


def test_is_torch_kl_div_times_the_temperature_squared(kernel):
    impl, device = kernel
    (student, teacher), _ = Case(width=100).inputs(device)
    leaves = [student.clone().requires_grad_() for _ in range(2)]
    log_probs = (leaves[0] / 3).log_softmax(-1).flatten(0, 1)
    expected = 9 * F.kl_div(log_probs, (teacher / 3).softmax(-1).flatten(0, 1), reduction="batchmean")
    actual = bertops.kl_div_logits(leaves[1], teacher, temperature=3.0, impl=impl)
    torch.testing.assert_close(actual, expected)
    for loss in (actual, expected):
        loss.backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


@pytest.mark.parametrize(
    "place", [pytest.param(3, marks=pytest.mark.long), 2999, pytest.param(2100, marks=pytest.mark.long)]
)
def test_the_largest_logit_of_a_later_block(place, kernel):
    """Far above all that came before it, in one model or in both."""
    impl, device = kernel
    for rises in ((100.0, 0.0), (0.0, 100.0), (100.0, 90.0), (1e4, 1e4), (30.0, 35.0)):
        inputs, options = Case(1, 6, 3000, reduction="none").inputs(device)
        for x, rise in zip(inputs, rises, strict=True):
            x[..., place] += rise
        actual, exact = run(OP, inputs, options, impl), truth(OP, inputs, options)
        eager = run(OP, inputs, options, "reference")
        for name, x in exact.items():
            assert actual[name].isfinite().all()
            error, allowed = (actual[name].cpu() - x).norm(), (eager[name].cpu() - x).norm()
            assert error <= 2 * allowed + 2e-7 * x.norm() + 1e-30, (name, rises)


@pytest.mark.long
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_logits_of_ten_thousand(offset, temperature, kernel):
    impl, device = kernel
    inputs, _ = Case(2, 20, 200, spread=30.0).inputs(device)
    inputs = [x.round() for x in inputs]
    for offsets in ((offset, 0.0), (0.0, offset), (offset, offset), (offset, -offset)):
        moved = [x + y for x, y in zip(inputs, offsets, strict=True)]  # exact in fp32
        options = {"reduction": "none", "temperature": temperature}
        plain, actual = run(OP, inputs, options, impl), run(OP, moved, options, impl)
        assert all(torch.equal(actual[name], plain[name]) for name in plain)
        check(OP, f"{offsets}", inputs, options, impl)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 50, 2500])
def test_impossible_classes_are_as_if_absent(width, dtype, kernel):
    impl, device = kernel
    inputs, options = Case(2, 12, width, dtype, reduction="none").inputs(device)
    holes = (torch.rand(width) < 0.5).index_fill(0, torch.tensor([1]), False).to(device)
    holes[: width // 2 : 2] = True
    holed = [x.masked_fill(holes, -INF) for x in inputs]
    check(OP, "-inf", holed, options, impl)
    actual = run(OP, holed, options, impl)
    expected = run(OP, [x[..., ~holes] for x in inputs], options, "reference")
    assert not actual["grad"][..., holes].any()
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(actual["loss 0"], expected["loss 0"], rtol=1e-5, atol=1e-6)
    grad = actual["grad"][..., ~holes]
    torch.testing.assert_close(grad, expected["grad"], rtol=tolerance, atol=tolerance / 10)


def test_a_first_block_of_impossible_classes(kernel):
    impl, device = kernel
    inputs, options = Case(1, 8, 2600, reduction="none").inputs(device)
    for x in inputs:
        x[..., :2500] = -INF
    check(OP, "first block", inputs, options, impl)


def test_classes_that_one_model_rules_out(kernel):
    impl, device = kernel
    (student, teacher), options = Case(1, 4, 40, reduction="none").inputs(device)
    cut = student.clone()
    cut[..., 5] = -INF
    results = run(OP, [cut, teacher], options, impl)
    assert (results["loss 0"] == INF).all()
    exact = truth(OP, [cut, teacher], options)
    torch.testing.assert_close(results["grad"].cpu().double(), exact["grad"], rtol=1e-5, atol=1e-7)
    assert (results["grad"][..., 5] < 0).all()
    cut = teacher.clone()
    cut[..., 5] = -INF
    check(OP, "teacher", [student, cut], options, impl)
    assert (run(OP, [student, cut], options, impl)["grad"][..., 5] > 0).all()


def test_rows_of_nothing_but_impossible_classes(kernel):
    impl, device = kernel
    for which in range(2):
        inputs, options = Case(1, 4, 40, reduction="none").inputs(device)
        inputs[which][0, 2] = -INF
        results = run(OP, inputs, options, impl)
        assert results["loss 0"].isnan().tolist() == [[False, False, True, False]]
        assert results["grad"][0, 2].isnan().all() and results["grad"][0, :2].isfinite().all()


def test_one_hot_teacher(kernel):
    """What is left is the student's cross-entropy of that class."""
    impl, device = kernel
    student = torch.randn(30, 20, device=device)
    labels = torch.arange(30, device=device) % 20
    teacher = 300.0 * F.one_hot(labels, 20).float()
    for impossible in (False, True):
        if impossible:
            teacher = teacher.masked_fill(teacher == 0, -INF)
        leaf = student.clone().requires_grad_()
        loss = bertops.kl_div_logits(leaf, teacher, impl=impl)
        torch.testing.assert_close(loss, F.cross_entropy(student, labels))
        loss.backward()
        expected = (student.softmax(-1) - F.one_hot(labels, 20)) / 30
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-8)


def test_confident_models_that_disagree(kernel):
    impl, device = kernel
    student, teacher = torch.zeros(2, 1, 1, 10, device=device)
    student[..., 3], teacher[..., 7] = 80.0, 90.0
    rows = call(OP, [student, teacher], {"reduction": "none"}, impl)[0]
    exact = truth(OP, [student, teacher], {"reduction": "none"})["loss 0"]
    torch.testing.assert_close(rows.double().cpu(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "noise", [1e-6, *(pytest.param(x, marks=pytest.mark.long) for x in (0.0, 1e-5, 1e-3, 0.1, 1.0))]
)
def test_rows_are_never_negative(noise, kernel):
    impl, device = kernel
    for temperature in (0.5, 4.0):
        case = Case(4, 40, 100, noise=noise, reduction="none", options={"temperature": temperature})
        inputs, options = case.inputs(device)
        assert call(OP, inputs, options, impl)[0].min() >= 0
        shifted = [inputs[0] + 0.3, inputs[1]]  # the same distributions, up to rounding
        assert call(OP, shifted, options, impl)[0].min() >= 0


def test_gradients_of_a_row_sum_to_zero(kernel):
    impl, device = kernel
    grad = run(OP, *Case(4, 20, 500, reduction="none").inputs(device), impl)["grad"]
    assert grad.double().sum(-1).abs().max() <= 1e-6


def test_gradcheck_with_a_temperature():
    (student, teacher), _ = Case(1, 3, 6, torch.float64).inputs("cpu")
    student[..., 2] = teacher[..., 2] = -INF
    kept = torch.tensor([0, 1, 3, 4, 5])

    def loss(x):
        return bertops.kl_div_logits(student.index_copy(-1, kept, x), teacher, temperature=2.5, impl="cpu")

    assert torch.autograd.gradcheck(loss, student[..., kept].requires_grad_())
