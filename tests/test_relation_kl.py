import pytest
import torch

import bertops
from errors import assert_close_to_oracle
from pair_cases import Case, check, run


@pytest.mark.parametrize(
    "case",
    [
        # 48 relation heads of 16 and 8, 64 of 16 and 6: MiniLMv2's from base and large teachers
        Case(heads=2, length=20, head_dim=24, head_dim_t=48, options={"num_relation_heads": 6}),
        Case(heads=3, length=40, head_dim=16, options={"num_relation_heads": 8}, padding="holes"),
        Case(heads=4, length=20, head_dim=6, head_dim_t=12, options={"num_relation_heads": 1}),
        Case(heads=2, length=30, head_dim=24, options={"num_relation_heads": 3}, reduction="none"),
        Case(batch=1, heads=2, length=30, lengths=(9, 21), options={"num_relation_heads": 4}),
        Case(heads=2, length=30, head_dim=24, options={"num_relation_heads": 3}, packed_projection=True),
    ],
    ids=str,
)
def test_heads_split_anew_match_the_oracle(case, kernel):
    check("relation_kl", case, kernel)


@pytest.mark.parametrize(
    ("heads_s", "heads_t", "relation_heads"),
    [pytest.param(12, 16, 48, marks=pytest.mark.long), (6, 12, 24), (12, 12, 12)],
)
def test_models_of_different_heads(heads_s, heads_t, relation_heads, kernel):
    """Heads of a (B, N, width) projection are contiguous columns of it, however many there are."""
    impl, device = kernel
    width_s, width_t = 384, 768
    flat_s = torch.randn(2, 10, width_s, device=device, requires_grad=True)
    flat_t = torch.randn(2, 10, width_t, device=device)
    x_s = flat_s.unflatten(-1, (heads_s, -1)).transpose(1, 2)
    x_t = flat_t.unflatten(-1, (heads_t, -1)).transpose(1, 2)
    loss = bertops.relation_kl(x_s, x_t, num_relation_heads=relation_heads, impl=impl)
    (grad,) = torch.autograd.grad(loss, flat_s)

    def relation(x, width):
        heads = x.double().unflatten(-1, (relation_heads, -1)).transpose(1, 2)
        return (heads @ heads.transpose(-1, -2) * (relation_heads / width) ** 0.5).log_softmax(-1)

    log_s, log_t = relation(flat_s, width_s), relation(flat_t, width_t)
    expected = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    (exact,) = torch.autograd.grad(expected, flat_s)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert (grad - exact).norm() <= 1e-5 * exact.norm()


def test_a_packed_projection_is_split_without_a_copy():
    packed = torch.randn(2, 10, 3, 4, 24)
    value = packed.permute(2, 0, 3, 1, 4)[2]
    for heads in (2, 3, 12, 48):
        from bertops.ops.relation_kl import _split_heads

        split = _split_heads("x_s", value, heads)
        assert split.shape == (2, heads, 10, 96 // heads)
        assert split.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_three_relations_of_a_packed_projection_in_one_call():
    qkv_s, qkv_t = torch.randn(2, 20, 3 * 48, requires_grad=True), torch.randn(2, 20, 3 * 96)
    each = [x.unflatten(-1, (3, 12, -1)).permute(2, 0, 3, 1, 4) for x in (qkv_s, qkv_t)]
    three = sum(bertops.relation_kl(x_s, x_t) for x_s, x_t in zip(*each, strict=True))
    together = [x.unflatten(-1, (36, -1)).transpose(1, 2) for x in (qkv_s, qkv_t)]
    one = 3 * bertops.relation_kl(*together)
    torch.testing.assert_close(one, three)
    got, want = torch.autograd.grad(one, qkv_s), torch.autograd.grad(three, qkv_s)
    torch.testing.assert_close(got, want)


def test_is_attention_kl_of_a_model_with_itself(kernel):
    impl, device = kernel
    inputs, options = Case(length=70, head_dim=32, head_dim_t=16, padding="holes").inputs(device)
    x_s, _, x_t, _ = inputs
    loss = bertops.relation_kl(x_s, x_t, impl=impl, **options)
    expected = bertops.attention_kl(x_s, x_s, x_t, x_t, impl=impl, **options)
    torch.testing.assert_close(loss, expected)
    (grad,), (both,) = torch.autograd.grad(loss, x_s), torch.autograd.grad(expected, x_s)
    torch.testing.assert_close(grad, both, rtol=1e-4, atol=1e-8)


def test_rows_that_find_only_themselves(kernel):
    """Long, orthogonal rows: probabilities of 1 - 1e-14 and a gradient of their last digits."""
    impl, device = kernel
    x_t = torch.randn(1, 1, 33, 256, device=device)
    x_s = torch.randn(1, 1, 33, 256, device=device)
    results = run("relation_kl", [x_s, x_s, x_t, x_t], {}, impl)
    doubles = [x.double().cpu() for x in (x_s, x_s, x_t, x_t)]
    oracle = run("relation_kl", doubles, {}, "reference")
    eager = run("relation_kl", [x_s, x_s, x_t, x_t], {}, "reference")
    for name, exact in oracle.items():
        if impl == "cpu":
            assert_close_to_oracle(name, results[name].cpu(), [eager[name].cpu()], exact)
        error = (results[name].cpu() - exact).norm()
        assert error <= 2 * (eager[name].cpu() - exact).norm() + 1e-7 * exact.norm()


def test_opcheck():
    x_s, _, x_t, _ = (x.detach() for x in Case(batch=1, length=12).inputs("cpu")[0])
    arguments = (x_s, x_t, None, torch.tensor([0, 5, 12], dtype=torch.int32), 0.25, 0.3)
    torch.library.opcheck(torch.ops.bertops.relation_kl_fwd.default, arguments)
    torch.library.opcheck(torch.ops.bertops.relation_kl_with_grads.default, arguments)
    rows, lse_s, lse_t = torch.ops.bertops.relation_kl_fwd(*arguments)
    torch.library.opcheck(torch.ops.bertops.relation_kl_bwd.default, (rows, *arguments, lse_s, lse_t))


GOOD = torch.zeros(2, 3, 8, 16)


@pytest.mark.parametrize(
    ("error", "words", "inputs", "options"),
    [
        (TypeError, ("x_s", "list"), ([], GOOD), {}),
        (ValueError, ("x_t", "(2, 3, 8)", "(2, 4, 8, 16)"), (GOOD, torch.zeros(2, 4, 8, 16)), {}),
        (ValueError, ("x_t", "detach"), (GOOD, GOOD.clone().requires_grad_()), {}),
        (ValueError, ("num_relation_heads", "48", "5"), (GOOD, GOOD), {"num_relation_heads": 5}),
        (ValueError, ("num_relation_heads", "0"), (GOOD, GOOD), {"num_relation_heads": 0}),
        (TypeError, ("num_relation_heads", "2.0"), (GOOD, GOOD), {"num_relation_heads": 2.0}),
        (TypeError, ("x_t", "None"), (GOOD, None), {"num_relation_heads": 2}),
        (
            ValueError,
            ("x_t", "1 to 256"),
            (GOOD, torch.zeros(2, 3, 8, 400)),
            {"num_relation_heads": 3},
        ),
    ],
)
def test_bad_input_is_named(error, words, inputs, options):
    with pytest.raises(error) as caught:
        bertops.relation_kl(*inputs, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
