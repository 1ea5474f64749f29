import math

import pytest
import torch
import torch.nn.functional as F

import bertops
from row_pair_cases import Case, check, run

DIRECTIONS = ["cosine_loss", "normalized_mse"]


def grad_of(loss, leaf):
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def test_cosine_loss_is_torch_cosine_embedding_loss(kernel):
    impl, device = kernel
    (student, teacher), options = Case(padding="holes").inputs(device)
    student.requires_grad_()
    mask = options["mask"]
    expected = F.cosine_embedding_loss(
        student[mask], teacher[mask], torch.ones(int(mask.sum()), device=device)
    )
    actual = bertops.cosine_loss(student, teacher, mask, impl=impl)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grad_of(actual, student), grad_of(expected, student))


def test_normalized_mse_is_the_official_value_times_the_width(kernel):
    impl, device = kernel
    (student, teacher), _ = Case(width=40).inputs(device)
    student.requires_grad_()
    expected = F.mse_loss(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1))
    actual = bertops.normalized_mse(student, teacher, impl=impl)
    torch.testing.assert_close(actual / 40, expected)
    torch.testing.assert_close(grad_of(actual, student) / 40, grad_of(expected, student))


def test_feature_map_transfer_is_the_official_value(kernel):
    impl, device = kernel
    (student, teacher), _ = Case(width=128).inputs(device)
    student.requires_grad_()
    normed = [F.layer_norm(x, (128,), eps=1e-12) for x in (student, teacher)]
    means = [x.mean(-1) for x in (student, teacher)]
    variances = [x.var(-1, correction=0) for x in (student, teacher)]
    expected = F.mse_loss(*normed), F.mse_loss(*means), F.l1_loss(*variances)
    actual = bertops.feature_map_transfer(student, teacher, impl=impl)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(grad_of(a, student), grad_of(b, student), rtol=1e-5, atol=1e-9)
    weighted = [100 * x + 5000 * y + 5 * z for x, y, z in (actual, expected)]
    torch.testing.assert_close(*(grad_of(x, student) for x in weighted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_some_of_the_three_losses_alone(reduction, kernel):
    impl, device = kernel
    (student, teacher), options = Case(padding="holes", reduction=reduction).inputs(device)
    student.requires_grad_()
    losses = bertops.feature_map_transfer(student, teacher, impl=impl, **options)
    parts = [grad_of(x.sum(), student) for x in losses]
    assert all(x.any() for x in parts)
    whole = grad_of(losses[0].sum() + losses[2].sum(), student)
    torch.testing.assert_close(whole, parts[0] + parts[2])


@pytest.mark.parametrize("width", [16, 21])
@pytest.mark.parametrize("op", DIRECTIONS)
def test_zero_vectors(op, width, kernel):
    impl, device = kernel
    for length in (0.0, 1e-14):  # of every element: shorter than 1e-12 together
        (student, teacher), options = Case(1, 4, width, reduction="none").inputs(device)
        student[0, 0] = student[0, 2] = length
        teacher[0, 1] = teacher[0, 2] = length
        for which in (impl, "reference"):
            results = run(op, [student, teacher], options, which)
            both = 1.0 if op == "cosine_loss" else 0.0
            torch.testing.assert_close(results["loss 0"][0, :3].cpu(), torch.tensor([1.0, 1.0, both]))
            zeros = results["grad"][0, [0, 2]]
            assert not zeros.any()
            torch.testing.assert_close(results["grad"][0, 1], torch.zeros_like(zeros[0]), rtol=0, atol=1e-6)
            assert results["grad"][0, 3].any()


@pytest.mark.parametrize(
    "scale", [1e-9, *(pytest.param(x, marks=pytest.mark.long) for x in (1e-4, 1e6, 1e15))]
)
@pytest.mark.parametrize("op", DIRECTIONS)
def test_lengths_do_not_matter(op, scale, kernel):
    impl, device = kernel
    inputs, options = Case(4, 30, 70).inputs(device)
    for scales in ((scale, 1.0), (1.0, scale), (scale, scale)):
        check(op, f"{scales}", [x * s for x, s in zip(inputs, scales, strict=True)], options, impl)


@pytest.mark.parametrize("op", DIRECTIONS)
def test_parallel_and_opposite_vectors(op, kernel):
    impl, device = kernel
    (_, teacher), options = Case(reduction="none").inputs(device)
    unit = 1 if op == "cosine_loss" else 2
    for factor, expected in ((2.0, 0.0), (0.5, 0.0), (3.0, 0.0), (-1.0, 2.0)):
        rows = run(op, [factor * teacher, teacher], options, impl)["loss 0"]
        torch.testing.assert_close(rows, torch.full_like(rows, expected * unit), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("eps", [1e-12, *(pytest.param(x, marks=pytest.mark.long) for x in (1e-5, 0.1))])
def test_feature_maps_with_any_eps_and_offset(eps, offset, kernel):
    impl, device = kernel
    inputs, options = Case(4, 30, 70, options={"eps": eps}).inputs(device)
    check("feature_map_transfer", f"{eps}", [x + offset for x in inputs], options, impl)


def test_constant_feature_maps(kernel):
    """Their deviation is the root of eps, and what is normalised is 0."""
    impl, device = kernel
    (_, teacher), options = Case(2, 3, 64, reduction="none", options={"eps": 1e-4}).inputs(device)
    student = torch.full_like(teacher, 0.25)
    results = run("feature_map_transfer", [student, teacher], options, impl)
    variance = teacher.double().var(-1, correction=0)
    torch.testing.assert_close(results["loss 0"].double(), variance / (variance + 1e-4))
    torch.testing.assert_close(results["loss 2"].double(), variance, rtol=1e-6, atol=0)
    oracle = run("feature_map_transfer", [student, teacher], options, "reference")
    torch.testing.assert_close(results["grad"], oracle["grad"])


def test_means_and_variances_keep_the_digits_of_their_differences(kernel):
    impl, device = kernel
    teacher = torch.randint(-64, 65, (2, 5, 64), device=device) / 32
    student = teacher + 2.0**-12  # exact in fp32
    _, mean, variance = bertops.feature_map_transfer(student, teacher, reduction="none", impl=impl)
    torch.testing.assert_close(mean, torch.full_like(mean, 2.0**-24), rtol=1e-6, atol=0)
    assert variance.max() <= 1e-10
    assert math.isclose(float(mean.sum()), 10 * 2.0**-24, rel_tol=1e-6)
