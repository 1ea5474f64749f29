"""``factorized_embedding``: word + position + type rows, LayerNorm, projection."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bertops
from bertops import reference
from bertops.ops.factorized_embedding import PARAMETERS
from embedding_cases import Case, call, check, run, upstream_of

HALVES = (torch.bfloat16, torch.float16)
FP64 = torch.float64

CASES = [
    Case(),
    Case(batch=3, length=70, width=128, height=96, rows=(50, 80, 2)),
    Case(batch=2, length=40, width=96, height=0, rows=(300, 40, 2)),
    Case(batch=1, length=90, width=300, height=33, rows=(30, 90, 3)),
    Case(batch=1, length=130, width=7, height=1, rows=(30, 130, 3), ids="skewed"),
    Case(width=3, height=0, rows=(1, 9, 1)),
    Case(batch=1, length=1, width=5, height=5, rows=(1, 1, 1)),
    Case(rows=(30, 16, 0)),
    Case(rows=(30, 0, 3), token_type_ids=2),
    Case(rows=(30, 0, 0), height=0),
    Case(norm=False),
    Case(bias=False),
    Case(norm=False, bias=False, rows=(30, 0, 0)),
    Case(batch=3, position_ids=3, token_type_ids=1, id_dtype=torch.int32),
    Case(batch=3, position_ids=1, token_type_ids=3),
    Case(strided=True, position_ids=2, token_type_ids=2),
    Case(strided=True, width=33, height=0, id_dtype=torch.int32),
    Case(batch=1, length=21, lengths=(6, 1, 0, 14)),
    Case(batch=4, length=160, width=17, height=10, ids="skewed", rows=(40, 160, 2), token_type_ids=1),
    Case(batch=3, length=200, width=5, height=0, ids="one", rows=(9, 200, 2)),
    Case(options={"padding_idx": 4, "position_padding_idx": 0}, ids="skewed", rows=(9, 16, 3)),
    Case(options={"padding_idx": -5, "position_padding_idx": -16}, ids="skewed", rows=(9, 16, 3)),
    Case(options={"eps": 0.5}),
    Case(options={"dropout_p": 0.3}, width=29),
    Case(options={"dropout_p": 0.3}, width=300, height=0),
    Case(options={"dropout_p": 0.3}, batch=1, length=21, lengths=(6, 1, 0, 14)),
    Case(options={"sparse": True}),
    Case(options={"sparse": True, "padding_idx": 15}, ids="skewed"),
]
MIXED = [
    Case(dtype=torch.float32, projection_dtype=torch.bfloat16),
    Case(dtype=torch.float16, projection_dtype=torch.float32, width=40),
    Case(dtype=torch.bfloat16, projection_dtype=torch.float16, width=40, height=33),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(case, kernel):
    check(case, kernel)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 2, 15, 16, 18, 21, 23, 27)], ids=str)
def test_matches_oracle_in_half_precision(case, dtype, kernel):
    check(Case(**{**vars(case), "dtype": dtype}), kernel)


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_matches_oracle_in_two_dtypes(case, kernel):
    check(case, kernel)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle_in_double(case):
    check(Case(**{**vars(case), "dtype": FP64}), ("cpu", "cpu"))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_matches_oracle_in_any_shape(data):
    draw = data.draw
    length, batch = draw(st.integers(1, 70)), draw(st.integers(1, 3))
    lengths = None
    if batch == 1 and draw(st.booleans()):
        first = draw(st.integers(0, length))
        lengths = (first, length - first)
    case = Case(
        batch=batch,
        length=length,
        width=draw(st.integers(2, 70)),
        height=draw(st.sampled_from((0, 1, 31, 64, 100))),
        rows=(draw(st.integers(1, 40)), draw(st.sampled_from((0, 70))), draw(st.integers(0, 2))),
        dtype=draw(st.sampled_from((torch.float32, torch.float64, *HALVES))),
        norm=draw(st.booleans()),
        bias=draw(st.booleans()),
        ids=draw(st.sampled_from(("uniform", "skewed", "one"))),
        id_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        lengths=lengths,
        strided=draw(st.booleans()),
        # without it a row of two nearly equal elements has no digits to compare
        options={"dropout_p": draw(st.sampled_from((0.0, 0.4))), "eps": 0.1},
    )
    check(case, ("cpu", "cpu"))


def test_width_one(kernel):
    """A row of one element is its own mean: β goes through, and no table has a gradient."""
    impl, device = kernel
    case = Case(width=1, height=1)
    input_ids, parameters, options = case.inputs(device)
    results = run(input_ids, parameters, options, impl)
    expected = parameters["norm_bias"] * parameters["projection"] + parameters["projection_bias"]
    torch.testing.assert_close(results["out"], expected.expand_as(results["out"]))
    assert not any(results[name].any() for name in ("word", "position", "token_type", "norm_weight"))


@pytest.mark.parametrize("height", [0, 20])
@pytest.mark.parametrize(("batch", "length"), [(0, 7), (3, 0)])
def test_no_tokens(batch, length, height, kernel):
    impl, device = kernel
    case = Case(batch=batch, length=length, height=height)
    results = run(*case.inputs(device), impl)
    assert results.pop("out").shape == (batch, length, height or 12)
    assert not any(x.any() for x in results.values())


def test_padded_and_packed_rows_drop_alike(kernel):
    impl, device = kernel
    lengths, options = (6, 9, 1), {"dropout_p": 0.5}
    input_ids, parameters, _ = Case(batch=3, length=9).inputs(device)
    padded = call(input_ids, parameters, options, impl)
    packed_ids = torch.cat([row[:n] for row, n in zip(input_ids, lengths, strict=True)])[None]
    offsets = torch.tensor([0, 6, 15, 16], dtype=torch.int32, device=device)
    packed = call(packed_ids, parameters, {**options, "cu_seqlens": offsets}, impl)
    real = torch.cat([row[:n] for row, n in zip(padded, lengths, strict=True)])
    assert torch.equal(packed[0], real)


def test_what_drops_is_zero_whatever_it_was(kernel):
    impl, device = kernel
    input_ids, parameters, _ = Case(height=0, width=40).inputs(device)
    parameters["norm_bias"] = torch.full_like(parameters["norm_bias"], float("inf"))
    out = call(input_ids, parameters, {"dropout_p": 0.5}, impl)
    dropped = out == 0
    assert 0.3 < dropped.float().mean() < 0.7 and out[~dropped].isinf().all()
    leaves = {name: x.requires_grad_() for name, x in parameters.items()}
    out = call(input_ids, leaves, {"dropout_p": 0.5}, impl)
    upstream = torch.ones_like(out).masked_fill(dropped, float("nan"))
    assert torch.autograd.grad(out, leaves["word"], upstream)[0].isfinite().all()


def test_dropout_follows_the_seed(kernel):
    impl, device = kernel
    input_ids, parameters, _ = Case(height=0, width=64).inputs(device)

    def embed(seed):
        torch.manual_seed(seed)
        return bertops.factorized_embedding(input_ids, **parameters, dropout_p=0.5, impl=impl)

    assert torch.equal(embed(1), embed(1))
    assert not torch.equal(embed(1), embed(2))


@pytest.mark.parametrize("height", [0, 20])
def test_gradients_of_what_asks_for_one(height, kernel):
    impl, device = kernel
    input_ids, parameters, options = Case(height=height).inputs(device)
    every = run(input_ids, parameters, options, impl)
    for name in parameters:
        leaves = {other: x.detach().requires_grad_(other == name) for other, x in parameters.items()}
        out = call(input_ids, leaves, options, impl)
        out.backward(upstream_of(out))
        assert torch.equal(leaves[name].grad, every[name]), name
        assert all(x.grad is None for other, x in leaves.items() if other != name)


def test_no_gradient_no_graph(kernel):
    impl, device = kernel
    input_ids, parameters, options = Case().inputs(device)
    out = call(input_ids, parameters, options, impl)
    leaves = {name: x.requires_grad_() for name, x in parameters.items()}
    with torch.no_grad():
        assert not call(input_ids, leaves, options, impl).requires_grad
    assert torch.equal(out, call(input_ids, leaves, options, impl))


def test_second_backward_under_retain_graph(kernel):
    impl, device = kernel
    input_ids, parameters, options = Case(options={"dropout_p": 0.2}).inputs(device)
    leaves = [x.requires_grad_() for x in parameters.values()]
    out = call(input_ids, parameters, options, impl)
    first = torch.autograd.grad(out, leaves, upstream_of(out), retain_graph=True)
    second = torch.autograd.grad(out, leaves, upstream_of(out))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    out = call(input_ids, parameters, options, impl)
    (grad,) = torch.autograd.grad(out, leaves[0], upstream_of(out), create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_upstream_of_any_strides(kernel):
    impl, device = kernel
    input_ids, parameters, options = Case(height=20).inputs(device)
    leaves = [x.requires_grad_() for x in parameters.values()]
    out = call(input_ids, parameters, options, impl)
    upstream = upstream_of(out)
    dense = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    other = upstream.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    strided = torch.autograd.grad(out, leaves, other, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))
    expanded = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(expanded, ones, strict=True))


@pytest.mark.parametrize("padding_idx", [None, 3, -1])
def test_sparse_gradient_has_a_row_for_every_token(padding_idx, kernel):
    impl, device = kernel
    input_ids, parameters, _ = Case(rows=(6, 16, 3)).inputs(device)
    options = {"padding_idx": padding_idx}
    dense = run(input_ids, parameters, options, impl)
    word = parameters["word"].requires_grad_()
    out = call(input_ids, parameters, {**options, "sparse": True}, impl)
    out.backward(upstream_of(out))
    assert word.grad.is_sparse and not word.grad.is_coalesced()
    assert torch.equal(word.grad._indices()[0], input_ids.flatten())
    values = word.grad._values()
    if padding_idx is not None:
        assert not values[input_ids.flatten() == padding_idx % 6].any()
    torch.testing.assert_close(word.grad.to_dense(), dense["word"])
    torch.optim.SparseAdam([word]).step()


@pytest.mark.parametrize("height", [0, 40])
def test_same_bits_every_time(height, kernel):
    impl, device = kernel
    length = 40 if kernel == ("triton", "cpu") else 300  # interpreted
    case = Case(batch=8, length=length, width=24, height=height, rows=(40, 300, 2), ids="skewed")
    inputs = case.inputs(device)
    first = run(*inputs, impl)
    threads = torch.get_num_threads()
    # the matrix product of PyTorch, which the interpreted kernel calls, depends on the number of threads
    for count in (1, 2, 3) if impl == "cpu" else (threads, threads):
        torch.set_num_threads(count)
        again = run(*inputs, impl)
        assert all(torch.equal(first[name], x) for name, x in again.items())
    torch.set_num_threads(threads)


def test_autocast_projects_in_its_dtype(kernel):
    impl, device = kernel
    input_ids, parameters, options = Case(width=40).inputs(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = call(input_ids, parameters, options, impl)
    assert out.dtype == torch.bfloat16
    cast = {name: x.bfloat16() if name.startswith("projection") else x for name, x in parameters.items()}
    assert torch.equal(out, call(input_ids, cast, options, impl))
    without = {name: x for name, x in parameters.items() if not name.startswith("projection")}
    with torch.autocast(device, dtype=torch.bfloat16):
        assert call(input_ids, without, options, impl).dtype == torch.float32


def test_equals_the_modules_of_torch(kernel):
    """BERT's block, line by line as its code has it."""
    impl, device = kernel
    input_ids, p, options = Case(height=0, token_type_ids=1).inputs(device)
    types = options["token_type_ids"].expand_as(input_ids)
    position_ids = torch.arange(input_ids.shape[1], device=device)
    rows = p["word"][input_ids] + p["token_type"][types] + p["position"][position_ids]
    expected = F.layer_norm(rows, (12,), p["norm_weight"], p["norm_bias"], 1e-12)
    torch.testing.assert_close(call(input_ids, p, options, impl), expected)


def arguments_of(case: Case, dropout: bool = False) -> tuple:
    """Of the schema, up to the seed."""
    input_ids, parameters, options = case.inputs()
    seed = torch.tensor([7]) if dropout else None
    ids = [options.get(name) for name in ("position_ids", "token_type_ids", "cu_seqlens")]
    tables = [parameters.get(name) for name in PARAMETERS]
    return input_ids, *ids, *tables, 1e-12, 0.25 if dropout else 0.0, seed


@pytest.mark.parametrize(
    ("case", "dropout", "sparse"),
    [
        (Case(), False, False),
        (Case(height=0, rows=(5, 16, 0)), True, True),
        (Case(batch=1, lengths=(2, 7), bias=False, dtype=torch.bfloat16), True, False),
    ],
    ids=["projection", "sparse", "packed"],
)
def test_opcheck(case, dropout, sparse):
    arguments = arguments_of(case, dropout)
    torch.library.opcheck(torch.ops.bertops.factorized_embedding_fwd.default, arguments)
    out, mean, rstd = torch.ops.bertops.factorized_embedding_fwd(*arguments)
    for wanted in ([True] * 7, [False, True, False, True, False, False, True], [False] * 7):
        torch.library.opcheck(
            torch.ops.bertops.factorized_embedding_bwd.default,
            (torch.randn_like(out), *arguments, mean, rstd, 1, 2, sparse, wanted),
        )


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=2, length=5, width=4, height=3, rows=(6, 7, 2), dtype=FP64),
        Case(batch=2, length=5, width=4, height=0, rows=(6, 7, 2), dtype=FP64, options={"dropout_p": 0.3}),
        Case(batch=1, length=5, width=5, height=2, rows=(3, 5, 0), dtype=FP64, lengths=(2, 3)),
    ],
    ids=str,
)
def test_gradcheck(case):
    input_ids, parameters, options = case.inputs()
    names = list(parameters)

    def embed(*tensors):
        return call(input_ids, dict(zip(names, tensors, strict=True)), options, "cpu")

    assert torch.autograd.gradcheck(embed, [x.requires_grad_() for x in parameters.values()])


def test_compiles_with_dynamic_shapes():
    torch._dynamo.reset()

    def embed(input_ids, parameters, options):
        return bertops.factorized_embedding(input_ids, **parameters, **options, impl="cpu")

    compiled = torch.compile(embed, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 9), (3, 14), (5, 6)):
        case = Case(batch=batch, length=length, token_type_ids=1, options={"padding_idx": 3})
        input_ids, parameters, options = case.inputs()
        leaves = [x.requires_grad_() for x in parameters.values()]
        out = compiled(input_ids, parameters, options)
        expected = embed(input_ids, parameters, options)
        assert torch.equal(out, expected)
        got = torch.autograd.grad(out, leaves, upstream_of(out))
        want = torch.autograd.grad(expected, leaves, upstream_of(out))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


BAD_IDS = [
    ("input_ids", "word", 30, [1, 4]),
    ("input_ids", "word", -1, [0, 8]),
    ("position_ids", "position", 16, [0, 3]),
    ("token_type_ids", "token_type", -2, [1, 0]),
]


@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("name", "table", "value", "place"), BAD_IDS)
def test_bad_ids_are_named_with_their_place(name, table, value, place, id_dtype):
    case = Case(position_ids=1, token_type_ids=2, id_dtype=id_dtype)
    input_ids, parameters, options = case.inputs()
    ids = {"input_ids": input_ids, **options}
    ids[name][place[0], place[1]] = value
    rows = parameters[table].shape[0]
    words = f"{name} must be from 0 to {rows - 1}, the rows of {table}, got {value} at {place}"
    with pytest.raises(ValueError) as caught:
        bertops.factorized_embedding(ids.pop("input_ids"), **parameters, **ids)
    assert str(caught.value) == words
    # the kernel looks for itself: under torch.compile nobody did before
    kernel_ids = [input_ids, options["position_ids"], options["token_type_ids"], None]
    arguments = (*kernel_ids, *(parameters[name] for name in PARAMETERS), 1e-12, 0.0, None)
    with pytest.raises(RuntimeError) as caught:
        torch.ops.bertops.factorized_embedding_fwd(*arguments)
    assert words in str(caught.value)


def test_positions_beyond_the_table():
    input_ids, parameters, _ = Case(batch=1, length=21).inputs()
    with pytest.raises(ValueError, match="position must have a row for each of the 21 columns"):
        bertops.factorized_embedding(input_ids, **parameters)
    for lengths, place in (((2, 19), "got position 16 at [0, 18]"), ((21,), "got position 16 at [0, 16]")):
        offsets = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
        with pytest.raises(ValueError) as caught:
            bertops.factorized_embedding(input_ids, **parameters, cu_seqlens=offsets)
        assert "position must have a row" in str(caught.value) and place in str(caught.value)
    fitting = torch.tensor([0, 5, 21], dtype=torch.int32)
    assert bertops.factorized_embedding(input_ids, **parameters, cu_seqlens=fitting).isfinite().all()


def test_compiled_calls_refuse_bad_ids():
    torch._dynamo.reset()
    input_ids, parameters, _ = Case().inputs()
    compiled = torch.compile(
        lambda ids: bertops.factorized_embedding(ids, **parameters, impl="cpu"), backend="aot_eager"
    )
    compiled(input_ids)
    input_ids[1, 2] = 99
    with pytest.raises(RuntimeError, match=r"input_ids .* got 99 at \[1, 2\]"):
        compiled(input_ids)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, ("word", "int64"), {"word": torch.zeros(4, 12, dtype=torch.int64)}),
        (ValueError, ("word", "(V, E)", "(12,)"), {"word": torch.zeros(12)}),
        (ValueError, ("position", "(16, 13)"), {"position": torch.zeros(16, 13)}),
        (TypeError, ("token_type", "float64"), {"token_type": torch.zeros(3, 12, dtype=FP64)}),
        (ValueError, ("norm_weight", "(12)", "(11,)"), {"norm_weight": torch.zeros(11)}),
        (ValueError, ("projection", "(20, 11)"), {"projection": torch.zeros(20, 11)}),
        (ValueError, ("projection_bias", "(20)", "(21,)"), {"projection_bias": torch.zeros(21)}),
        (ValueError, ("projection_bias", "without a projection"), {"projection": None}),
        (ValueError, ("input_ids", "float32"), {"input_ids": torch.zeros(2, 9)}),
        (ValueError, ("position_ids", "(2, 9)", "(3, 9)"), {"position_ids": torch.zeros(3, 9).long()}),
        (
            ValueError,
            ("position_ids", "without position"),
            {"position": None, "position_ids": torch.zeros(2, 9).long()},
        ),
        (ValueError, ("padding_idx", "30"), {"padding_idx": 30}),
        (TypeError, ("padding_idx", "1.5"), {"padding_idx": 1.5}),
        (ValueError, ("dropout_p", "1.0"), {"dropout_p": 1.0}),
        (ValueError, ("cu_seqlens", "B = 1"), {"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}),
    ],
)
def test_bad_arguments_are_named(error, words, changes):
    input_ids, parameters, options = Case().inputs()
    arguments = {"input_ids": input_ids, **parameters, **options, **changes}
    with pytest.raises(error) as caught:
        bertops.factorized_embedding(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_reference_counts_positions_from_every_sequence():
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    positions = reference.default_positions(torch.zeros(1, 5), offsets)
    assert positions.tolist() == [[0, 1, 0, 1, 2]]
