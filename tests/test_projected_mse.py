"""What ``projected_mse`` alone does; what it shares with ``linear_kl_div`` is in test_linear_kl_div.py."""

import pytest
import torch
import torch.nn.functional as F

import bertops
from linear_cases import Case, compare


@pytest.mark.parametrize("bias", [False, True])
def test_mean_and_sum_are_torchs(bias, kernel):
    impl, device = kernel
    (hidden, weight, bias), (hidden_t,), _ = Case(bias=bias).inputs("projected_mse", device)
    for reduction in ("mean", "sum"):
        loss = bertops.projected_mse(hidden, hidden_t, weight, bias, reduction=reduction, impl=impl)
        expected = F.mse_loss(F.linear(hidden, weight, bias), hidden_t, reduction=reduction)
        torch.testing.assert_close(loss, expected)


@pytest.mark.long
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_a_projection(dtype, reduction, kernel):
    impl, device = kernel
    hidden, other = (torch.randn(3, 50, 45).to(dtype).to(device) for _ in range(2))
    mask = torch.rand(3, 50, device=device) < 0.5
    for options in ({}, {"mask": mask}):
        options = {**options, "reduction": reduction}
        compare("projected_mse", f"plain {options}", [hidden, None, None], [other], options, impl)
    with torch.no_grad():
        rows = bertops.projected_mse(hidden, other, mask=mask, reduction="none", impl=impl)
    assert not rows[~mask].any() and (rows[mask] > 0).all()


def test_equal_hidden_states_and_a_second_backward_without_a_projection(kernel):
    impl, device = kernel
    hidden = torch.randn(40, 30, device=device, requires_grad=True)
    same = bertops.projected_mse(hidden, hidden.detach(), impl=impl)
    assert not same.any() and not torch.autograd.grad(same, hidden)[0].any()
    loss = bertops.projected_mse(hidden, torch.zeros_like(hidden), impl=impl)
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, hidden)
    torch.testing.assert_close(twice, 2 * once)
    torch.testing.assert_close(once, 2 * hidden.detach() / hidden.numel())


def test_modules_are_the_functions():
    (hidden, weight, bias), (hidden_t, weight_t, bias_t), options = Case(masked=True).inputs("linear_kl_div")
    mask, biases = options["mask"], {"bias_s": bias, "bias_t": bias_t}
    assert torch.equal(
        bertops.nn.LinearKLDiv(temperature=3.0, reduction="sum")(
            hidden, weight, hidden_t, weight_t, mask=mask, **biases
        ),
        bertops.linear_kl_div(
            hidden, weight, hidden_t, weight_t, temperature=3.0, mask=mask, reduction="sum", **biases
        ),
    )
    module = bertops.nn.ProjectedMSE(24, 10, reduction="sum")
    other, proj = torch.randn(2, 17, 10), module.proj
    expected = bertops.projected_mse(hidden, other, proj.weight, proj.bias, mask, reduction="sum")
    assert torch.equal(module(hidden, other, mask), expected)
    assert bertops.nn.ProjectedMSE(24, 10, bias=False).proj.bias is None


GOOD = torch.zeros(2, 8, 16)
TABLE = torch.zeros(30, 16)
TEACHER = torch.zeros(2, 8, 30)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, ("hidden_s", "int32"), {"hidden_s": GOOD.int()}),
        (ValueError, ("hidden_t", "(2, 8)", "(2, 7, 30)"), {"hidden_t": TEACHER[:, :7]}),
        (ValueError, ("hidden_t", "detach"), {"hidden_t": TEACHER.clone().requires_grad_()}),
        (ValueError, ("hidden_t", "30", "29"), {"hidden_t": TEACHER[..., :29]}),
        (ValueError, ("hidden_t", "(2, 8, 16)", "(2, 8, 30)"), {"weight": None, "bias": None}),
        (ValueError, ("bias", "without a weight"), {"weight": None}),
        (ValueError, ("weight", "hidden_s", "(30, 12)"), {"weight": TABLE[:, :12]}),
        (TypeError, ("weight", "float16"), {"weight": TABLE.half()}),
        (ValueError, ("bias", "(30,)", "(16,)"), {"bias": torch.zeros(16)}),
        (ValueError, ("mask", "(2, 8)", "(16,)"), {"mask": torch.ones(16).bool()}),
        (ValueError, ("reduction", "rows"), {"reduction": "rows"}),
        (RuntimeError, ("cuda",), {"impl": "cuda"}),
    ],
)
def test_bad_input_is_named(error, words, changes):
    inputs = {"hidden_s": GOOD, "hidden_t": TEACHER, "weight": TABLE, "bias": torch.zeros(30)}
    with pytest.raises(error) as caught:
        bertops.projected_mse(**{**inputs, **changes})
    assert all(word in str(caught.value) for word in words), str(caught.value)
