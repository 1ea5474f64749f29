import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bertops
from pair_cases import Case, check, run

HALF = (torch.bfloat16, torch.float16)

CASES = [
    Case(),
    Case(length=1),
    Case(length=300, heads=1, head_dim=64),
    *(Case(length=33, heads=1, head_dim=d) for d in (1, 6, 7, 12, 26, 80, 256)),
    Case(length=70, head_dim=32, head_dim_t=64),
    Case(length=70, head_dim=26, head_dim_t=7, padding="holes"),
    *(Case(length=40, padding=kind) for kind in ("right", "left", "nothing", "one row empty")),
    Case(batch=1, length=64, lengths=(20, 1, 0, 43)),
    pytest.param(Case(batch=1, heads=1, length=600, lengths=(290, 0, 300, 10)), marks=pytest.mark.long),
    Case(length=50, packed_projection=True, padding="right", reduction="sum"),
    Case(length=37, options={"scale_s": 0.5, "scale_t": -0.3}),
    *(Case(length=65, head_dim=32, dtype=dtype, padding="right") for dtype in HALF),
    Case(length=65, dtype=torch.float16, dtype_t=torch.float32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("form", ["gram", "direct"])
def test_matches_oracle_in_both_forms(form, case, kernel):
    if kernel == ("triton", "cpu") and torch.bfloat16 in (case.dtype, case.dtype_t):
        pytest.skip("bf16 products are wrong in Triton's interpreter")
    case = Case(**{**vars(case), "options": {**case.options, "form": form}})
    check("attention_score_mse", case, kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grams_of_many_parts_match_the_oracle(dtype):
    """More than one task a head, and every sum in all its steps."""
    case = Case(batch=1, heads=2, length=2200, head_dim=32, dtype=dtype, options={"form": "gram"})
    check("attention_score_mse", case, ("cpu", "cpu"))


def energies(inputs, options):
    """|A|^2 + |B|^2 in fp64, over the pairs that count."""
    total = 0.0
    for q, k in (inputs[:2], inputs[2:]):
        scores = q.detach().double() @ k.detach().double().transpose(-1, -2) / q.shape[-1] ** 0.5
        if "mask" in options:
            real = options["mask"] != 0
            scores = scores * (real[:, None, :, None] & real[:, None, None, :])
        total += scores.square().sum()
    return total


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    head_dim=st.integers(1, 70),
    length=st.integers(1, 300),
    noise=st.sampled_from([None, 0.0, 1e-6, 1e-3, 0.1]),
    offset=st.sampled_from([0.0, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, *HALF]),
    form=st.sampled_from(["gram", "direct"]),
)
def test_error_is_within_the_bound(head_dim, length, noise, offset, dtype, form):
    """1e-6 of |A|^2 + |B|^2 in fp32 and 1e-12 in fp64, however close the models are."""
    inputs, options = Case(batch=1, length=length, head_dim=head_dim, noise=noise).inputs("cpu")
    inputs = [(x.detach() + offset * (i % 2)).to(dtype) for i, x in enumerate(inputs)]
    inputs = [x.requires_grad_(i < 2) for i, x in enumerate(inputs)]
    options |= {"reduction": "sum", "form": form}
    loss = bertops.attention_score_mse(*inputs, **options)
    exact = run(
        "attention_score_mse", [x.detach().double() for x in inputs], {"reduction": "sum"}, "reference"
    )
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    assert (loss - exact["loss"]).abs() <= bound * energies(inputs, {}) + 1e-30


@pytest.mark.parametrize("form", ["gram", "direct"])
def test_student_close_to_its_teacher_loses_nothing(form):
    """Loss 1e-6 of the scores' energy, and still seven digits of loss and gradient."""
    inputs, _ = Case(length=300, head_dim=64, noise=1e-3).inputs("cpu")
    actual = run("attention_score_mse", inputs, {"form": form}, "cpu")
    oracle = run("attention_score_mse", [x.detach().double() for x in inputs], {}, "reference")
    for name, exact in oracle.items():
        assert (actual[name] - exact).norm() <= 1e-6 * exact.norm(), name


@pytest.mark.parametrize("form", ["gram", "direct"])
def test_identical_models(form, kernel):
    impl, device = kernel
    inputs, options = Case(length=100, head_dim=32, noise=0.0, padding="right").inputs(device)
    results = run("attention_score_mse", inputs, {**options, "form": form}, impl)
    scores = energies([x.detach().cpu() for x in inputs], {"mask": options["mask"].cpu()})
    pairs = 2 * options["mask"].sum(1).square().sum()
    assert results["loss"].cpu().abs() <= 1e-6 * scores / pairs.cpu()
    if impl == "cpu":
        assert not any(x.any() for x in results.values())


@pytest.mark.parametrize("form", ["gram", "direct"])
def test_scores_of_ten_thousand(form, kernel):
    impl, device = kernel
    inputs, options = Case(length=50, head_dim=16, padding="holes").inputs(device)
    options |= {"scale_s": 2000.0, "form": form}
    actual = run("attention_score_mse", inputs, options, impl)
    on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    oracle = run("attention_score_mse", [x.detach().double().cpu() for x in inputs], on_cpu, "reference")
    for name, exact in oracle.items():
        assert (actual[name].cpu() - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("padding", [None, "right"])
def test_is_mse_loss_between_two_maps(padding, kernel):
    """mse_loss over attention_with_scores divides by all pairs, padding included, as TinyBERT's code does."""
    impl, device = kernel
    inputs, options = Case(length=60, padding=padding).inputs(device)
    q_s, k_s, q_t, k_t = inputs
    _, scores_s = bertops.attention_with_scores(q_s, k_s, k_s, options.get("mask"), impl=impl)
    _, scores_t = bertops.attention_with_scores(q_t, k_t, k_t, options.get("mask"), impl=impl)
    share = 1.0 if padding is None else options["mask"].sum(1).square().sum() / (2 * 60 * 60)
    loss = bertops.attention_score_mse(*inputs, impl=impl, **options) * share
    torch.testing.assert_close(loss, F.mse_loss(scores_s, scores_t), rtol=1e-5, atol=0)


def test_auto_takes_the_form_for_the_length():
    def calls(length, batch=1, **options):
        inputs, _ = Case(batch=batch, length=length, head_dim=8).inputs("cpu")
        with torch.profiler.profile() as profile:
            bertops.attention_score_mse(*inputs, **options)
        return {event.key for event in profile.key_averages() if event.key.startswith("bertops::")}

    cu_seqlens = torch.arange(0, 401, 10, dtype=torch.int32)
    along = {"bertops::attention_score_mse_gram_with_grads"}
    assert calls(400) == calls(10, form="gram") == calls(1024) == along
    assert calls(1025) == {"bertops::attention_score_mse_gram_fwd"}
    pair = torch.tensor([0, 1000, 2000], dtype=torch.int32)
    assert calls(2000, cu_seqlens=pair) == along
    direct = {"bertops::attention_score_mse_with_grads"}
    assert calls(10) == calls(400, form="direct") == calls(400, cu_seqlens=cu_seqlens) == direct
    assert calls(400, reduction="none") == {"bertops::attention_score_mse_fwd"}


@pytest.mark.parametrize("length", [700, 2500])
def test_threads_do_not_change_the_gram_form(length):
    inputs, options = Case(batch=1, heads=1, length=length, head_dim=32, options={"form": "gram"}).inputs(
        "cpu"
    )
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(run("attention_score_mse", inputs, options, "cpu"))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("head_dims", [(32, 32), (8, 24)])
def test_gradients_formed_along_are_those_of_the_backward(head_dims):
    """One after the other and in one task the sums join in the same order, past the rows of a part too."""
    torch.manual_seed(0)
    ops = torch.ops.bertops
    offsets = torch.tensor([0, 0, 1500, 1530, 3900], dtype=torch.int32)
    pair = [torch.randn(1, 2, 3900, dim) for dim in (head_dims[0],) * 2 + (head_dims[1],) * 2]
    arguments = (*pair, None, offsets, 0.25, 0.3)
    sums, grams = ops.attention_score_mse_gram_fwd(*arguments)
    expected = sums, *ops.attention_score_mse_gram_bwd(torch.ones(()), *arguments, grams)
    along = ops.attention_score_mse_gram_with_grads(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(along, expected, strict=True))


def test_opcheck():
    pair = [x.detach() for x in Case(batch=1, length=12).inputs("cpu")[0]]
    arguments = (*pair, None, torch.tensor([0, 5, 12], dtype=torch.int32), 0.25, 0.3)
    ops = torch.ops.bertops
    torch.library.opcheck(ops.attention_score_mse_fwd.default, arguments)
    torch.library.opcheck(ops.attention_score_mse_with_grads.default, arguments)
    rows = ops.attention_score_mse_fwd(*arguments)
    torch.library.opcheck(ops.attention_score_mse_bwd.default, (rows, *arguments))
    torch.library.opcheck(ops.attention_score_mse_gram_fwd.default, arguments)
    sums, grams = ops.attention_score_mse_gram_fwd(*arguments)
    assert sums.shape == (2, 2) and grams.shape == (2, 2, 2, 32, 32)
    torch.testing.assert_close(sums.sum(), rows.sum())
    torch.library.opcheck(ops.attention_score_mse_gram_bwd.default, (torch.ones(()), *arguments, grams))
    torch.library.opcheck(ops.attention_score_mse_gram_with_grads.default, arguments)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (("form", "fast"), {"form": "fast"}),
        (("form", "none", "direct"), {"form": "gram", "reduction": "none"}),
    ],
)
def test_bad_form_is_named(words, options):
    inputs = [x.detach() for x in Case().inputs("cpu")[0]]
    with pytest.raises(ValueError) as caught:
        bertops.attention_score_mse(*inputs, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
