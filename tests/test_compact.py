"""``compact`` and ``compact_packed``: they move rows, so every comparison is for equality."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bertops
from bertops import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
SHAPES = [(5,), (1,), (9, 3), (40, 7, 24), (3, 2, 4, 5), (64, 16, 768), (2, 1), (300, 1, 1)]

# The argument, or a part of it, at other strides; all keep the number of rows.
VIEWS = {
    "contiguous": lambda x: x,
    "rows apart": lambda x: torch.stack([x, x], 1)[:, 1],
    "rows backwards in columns": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "inner dims swapped": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1) if x.dim() > 2 else x,
    "last dim strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "last dim sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]] if x.dim() > 1 else x,
    "one row expanded": lambda x: x[:1].expand(x.shape),
    "one element in": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


def draw(shape, dtype=torch.float32, device="cpu"):
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape).to(dtype).to(device)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype).to(device)


def draw_order(rows, device="cpu"):
    return torch.randperm(rows).to(device)


def kept_rows(hidden, order, num_kept):
    """As many rows as ``order``, 0 from ``num_kept`` on."""
    rows = hidden[order].clone()
    rows[num_kept:] = 0
    return rows


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", (*FLOATS, *INTEGERS, torch.complex64, torch.complex128))
def test_moves_rows_of_any_dtype(dtype, shape, row_kernel):
    impl, device = row_kernel
    hidden, order = draw(shape, dtype, device), draw_order(shape[0], device)
    for count in {0, 1, shape[0] // 2, shape[0]}:
        expected = hidden[order[:count]]
        assert torch.equal(bertops.compact(hidden, order, count, impl=impl), expected)
        for num_kept in (torch.tensor(count, device=device), torch.tensor([count], device=device)):
            filled = bertops.compact(hidden, order, num_kept, impl=impl)
            assert filled.dtype == dtype and torch.equal(filled, kept_rows(hidden, order, count))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(9,), (9, 33), (9, 7, 24), (4, 3, 5, 16)], ids=str)
def test_any_strides(shape, view, row_kernel):
    impl, device = row_kernel
    for dtype in (torch.float32, torch.bool, torch.bfloat16, torch.int64):
        hidden = VIEWS[view](draw(shape, dtype, device))
        order = draw_order(2 * shape[0], device) // 2
        order = torch.stack([order.unique(), order.unique()], 1)[:, 0].flip(0)
        strided = torch.stack([order, order], 1)[:, 0]
        for count in (shape[0] - 2, torch.tensor(2, device=device)):
            out = bertops.compact(hidden, strided, count, impl=impl)
            expected = kept_rows(hidden, order, 2)
            assert torch.equal(out, hidden[order[:count]] if isinstance(count, int) else expected)
            assert out.is_contiguous()


def test_order_shorter_than_the_batch(row_kernel):
    impl, device = row_kernel
    hidden = draw((10, 4), device=device)
    order = torch.tensor([7, 2, 9], device=device)
    assert torch.equal(bertops.compact(hidden, order, 3, impl=impl), hidden[[7, 2, 9]])
    assert torch.equal(bertops.compact(hidden, order, 2, impl=impl), hidden[[7, 2]])
    filled = bertops.compact(hidden, order, torch.tensor(2, device=device), impl=impl)
    assert torch.equal(filled, kept_rows(hidden, order, 2))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0), (4, 3, 0)], ids=str)
def test_nothing_to_move(shape, row_kernel):
    impl, device = row_kernel
    hidden = torch.zeros(shape, device=device, requires_grad=True)
    order = torch.arange(shape[0], device=device)
    for num_kept in (shape[0], 0, torch.tensor(0, device=device)):
        out = bertops.compact(hidden, order, num_kept, impl=impl)
        out.sum().backward()
        rows = num_kept if isinstance(num_kept, int) else shape[0]
        assert out.shape == (rows, *shape[1:]) and hidden.grad.shape == shape


def test_rows_left_behind_are_not_read(row_kernel):
    impl, device = row_kernel
    hidden = draw((8, 5), device=device)
    hidden[[1, 3]] = float("nan")
    order = torch.tensor([0, 2, 4, 1, 3], device=device)
    for num_kept in (3, torch.tensor(3, device=device)):
        assert bertops.compact(hidden, order, num_kept, impl=impl).isfinite().all()


def test_follows_the_exit_decision(row_kernel):
    impl, device = row_kernel
    hidden, mask = draw((50, 6, 8), device=device), draw((50, 6), torch.bool, device)
    decision = bertops.exit_decision(draw((50, 4), device=device), 0.7, impl=impl)
    stay = ~decision.exited
    assert 0 < int(decision.num_kept) < 50
    for x in (hidden, mask):
        kept = int(decision.num_kept)
        assert torch.equal(bertops.compact(x, decision.order, kept, impl=impl), x[stay])
        filled = bertops.compact(x, decision.order, decision.num_kept, impl=impl)
        assert torch.equal(filled[:kept], x[stay]) and not filled[kept:].any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_stride_and_dtype(data):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    shape[0] = data.draw(st.integers(1, 40))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    hidden = VIEWS[data.draw(st.sampled_from(sorted(VIEWS)))](
        draw(tuple(shape), data.draw(st.sampled_from((*FLOATS, *INTEGERS))))
    )
    order = draw_order(shape[0])[: data.draw(st.integers(0, shape[0]))]
    count = data.draw(st.integers(0, len(order)))
    assert torch.equal(bertops.compact(hidden, order, count), hidden[order[:count]])
    filled = bertops.compact(hidden, order, torch.tensor(count))
    assert torch.equal(filled, kept_rows(hidden, order, count))
    assert torch.equal(filled, bertops.compact(hidden, order, torch.tensor(count), impl="reference"))


@pytest.mark.parametrize("num_kept", [3, 0, 5, torch.tensor(3), torch.tensor(0), torch.tensor([5])])
@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_gradient_goes_back_to_its_row(dtype, num_kept, row_kernel):
    impl, device = row_kernel
    leaf = draw((7, 2, 5), dtype, device).requires_grad_()
    order = torch.tensor([6, 0, 3, 5, 2], device=device)
    count = int(num_kept)
    if isinstance(num_kept, torch.Tensor):
        num_kept = num_kept.to(device)
    out = bertops.compact(leaf, order, num_kept, impl=impl)
    upstream = draw(out.shape, dtype, device)
    (grad,) = torch.autograd.grad(out, leaf, upstream, retain_graph=True)
    expected = torch.zeros_like(leaf)
    expected[order[:count]] = upstream[:count]
    assert torch.equal(grad, expected)
    strided = torch.stack([upstream, upstream], -1)[..., 0]
    assert torch.equal(torch.autograd.grad(out, leaf, strided, retain_graph=True)[0], expected)
    poisoned = upstream.clone()
    poisoned[count:] = float("nan")  # a row that is 0 whatever comes in has no gradient
    assert torch.equal(torch.autograd.grad(out, leaf, poisoned)[0], expected)


@pytest.mark.parametrize("num_kept", [2, torch.tensor(2)])
def test_gradcheck_of_the_cpu_kernel(num_kept):
    leaf = draw((4, 2, 3), torch.float64).requires_grad_()
    order = torch.tensor([3, 0, 1])
    assert torch.autograd.gradcheck(lambda x: bertops.compact(x, order, num_kept, impl="cpu"), leaf)
    columns = draw((3, 2, 4), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: bertops.compact(x.transpose(0, 2), order, num_kept, impl="cpu"), columns
    )


def test_double_backward_is_refused(row_kernel):
    impl, device = row_kernel
    leaf = draw((4, 3), device=device).requires_grad_()
    order = torch.tensor([2, 1], device=device)
    cu_seqlens = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
    for out in (
        bertops.compact(leaf.square(), order, 2, impl=impl),
        bertops.compact_packed(leaf[None, :3].square(), cu_seqlens, order - 1, 2, impl=impl)[0],
    ):
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()


def test_bad_rows_are_an_error_on_the_cpu():
    hidden = draw((4, 3))
    for bad in (4, -1, 2**40, -(2**62)):
        order = torch.tensor([0, bad, 1])
        for num_kept in (2, 3, torch.tensor(3)):
            with pytest.raises(RuntimeError, match="order"):
                bertops.compact(hidden, order, num_kept, impl="cpu")
        assert torch.equal(bertops.compact(hidden, order, 1, impl="cpu"), hidden[:1])


def packed(lengths, width=(5,), dtype=torch.float32, device="cpu"):
    hidden = draw((1, sum(lengths), *width), dtype, device)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return hidden, offsets.to(device)


def joined(hidden, cu_seqlens, order):
    """The sequences of ``order`` end to end, one by one, and their offsets."""
    starts = cu_seqlens.tolist()
    parts = [hidden[:, starts[s] : starts[s + 1]] for s in order.tolist()]
    offsets = torch.tensor([0, *(part.shape[1] for part in parts)]).cumsum(0)
    return torch.cat([hidden[:, :0], *parts], 1), offsets.to(torch.int32).to(hidden.device)


LENGTHS = [(3, 1, 4, 2), (0, 5, 0, 0, 2, 0), (0, 0, 0), (7,), (0,), (), (1,) * 40, (130, 1, 0, 64, 63, 200)]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: "-".join(map(str, lengths[:8])))
def test_packed_sequences_end_to_end(lengths, known, row_kernel):
    impl, device = row_kernel
    for dtype, width in (
        (torch.float32, (24,)),
        (torch.bfloat16, (3, 5)),
        (torch.bool, ()),
        (torch.int64, (1,)),
    ):
        hidden, cu_seqlens = packed(lengths, width, dtype, device)
        order = draw_order(len(lengths), device)
        for count in {0, len(lengths) // 2, len(lengths)}:
            rows, offsets = joined(hidden, cu_seqlens, order[:count])
            tokens = rows.shape[1] if known else None
            out = bertops.compact_packed(hidden, cu_seqlens, order, count, num_tokens=tokens, impl=impl)
            assert torch.equal(out[0], rows) and out[0].dtype == dtype
            assert torch.equal(out[1], offsets) and out[1].dtype == torch.int32


def test_packed_strides(row_kernel):
    impl, device = row_kernel
    hidden, cu_seqlens = packed((3, 0, 6, 2), (4, 6), device=device)
    order = torch.tensor([3, 9, 0, 9, 2, 9], device=device)[::2]
    views = [
        hidden.transpose(2, 3),
        torch.cat([hidden, hidden], 1)[:, : hidden.shape[1]],
        torch.cat([hidden, hidden], 3)[..., 2:8],
        torch.stack([hidden, hidden], 2)[:, :, 1],
        hidden[:, :1].expand(hidden.shape),
        hidden.transpose(1, 3).contiguous().transpose(1, 3),
    ]
    for view in views:
        out = bertops.compact_packed(view, cu_seqlens, order, 3, impl=impl)
        assert all(map(torch.equal, out, joined(view, cu_seqlens, order)))
    strided = torch.stack([cu_seqlens, cu_seqlens], 1)[:, 0]
    out = bertops.compact_packed(hidden, strided, order, 3, impl=impl)
    assert all(map(torch.equal, out, joined(hidden, cu_seqlens, order)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_packed_is_compact_of_every_sequence(data):
    lengths = data.draw(st.lists(st.integers(0, 20), max_size=12))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    width = data.draw(st.lists(st.integers(1, 9), max_size=2))
    hidden, cu_seqlens = packed(lengths, width, data.draw(st.sampled_from((*FLOATS, *INTEGERS))))
    order = draw_order(len(lengths))[: data.draw(st.integers(0, len(lengths)))]
    out = bertops.compact_packed(hidden, cu_seqlens, order, len(order))
    assert all(map(torch.equal, out, joined(hidden, cu_seqlens, order)))
    plain = bertops.compact_packed(hidden, cu_seqlens, order, len(order), impl="reference")
    assert all(map(torch.equal, out, plain))


def test_packed_gradient_goes_back_to_its_row(row_kernel):
    impl, device = row_kernel
    for dtype in FLOATS[:3]:
        hidden, cu_seqlens = packed((3, 0, 4, 2), (5,), dtype, device)
        leaf = hidden.requires_grad_()
        for order in ([3, 1, 0], [2], [1], []):
            order = torch.tensor(order, dtype=torch.int64, device=device)
            out, offsets = bertops.compact_packed(leaf, cu_seqlens, order, len(order), impl=impl)
            upstream = draw(out.shape, dtype, device)
            (grad,) = torch.autograd.grad(out, leaf, upstream)
            (expected,) = torch.autograd.grad(joined(leaf, cu_seqlens, order)[0], leaf, upstream)
            assert torch.equal(grad, expected) and not offsets.requires_grad


def test_packed_gradcheck_of_the_cpu_kernel():
    hidden, cu_seqlens = packed((2, 0, 3, 1), (2,), torch.float64)
    order = torch.tensor([3, 1, 0])

    def rows(x):
        return bertops.compact_packed(x, cu_seqlens, order, 3, impl="cpu")[0]

    assert torch.autograd.gradcheck(rows, hidden.requires_grad_())


def test_bad_sequences_are_an_error_on_the_cpu():
    hidden, cu_seqlens = packed((3, 2, 4))
    for bad in (3, -1, 2**40):
        with pytest.raises(RuntimeError, match="order"):
            bertops.compact_packed(hidden, cu_seqlens, torch.tensor([0, bad]), 2, num_tokens=5, impl="cpu")
    for tokens in (4, 6, 0):
        with pytest.raises(RuntimeError, match=f"num_tokens.*{tokens}"):
            bertops.compact_packed(hidden, cu_seqlens, torch.tensor([0, 1]), 2, num_tokens=tokens, impl="cpu")


def test_opcheck():
    order = torch.tensor([3, 0, 2])
    for hidden in (draw((5, 3)), draw((4, 7, 2), torch.bool).transpose(1, 2), draw((9,), torch.float16)):
        torch.library.opcheck(torch.ops.bertops.compact.default, (hidden, order, None))
        torch.library.opcheck(torch.ops.bertops.compact.default, (hidden, order, torch.tensor(2)))
    hidden, cu_seqlens = packed((3, 0, 4, 2))
    torch.library.opcheck(torch.ops.bertops.compact_packed.default, (hidden, cu_seqlens, order, 9))


def test_compiles_whole_with_dynamic_shapes():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(hidden, order, num_kept, cu_seqlens, num_tokens):
        filled = bertops.compact(hidden, order, num_kept)
        rows, offsets = bertops.compact_packed(
            hidden.flatten(0, 1)[None], cu_seqlens, order, order.shape[0], num_tokens=num_tokens
        )
        return filled, rows, offsets

    for batch, length in ((4, 3), (9, 5), (20, 7)):
        leaf = draw((batch, length, 6)).requires_grad_()
        order = draw_order(batch)[: batch // 2]
        cu_seqlens = (torch.arange(batch + 1) * length).to(torch.int32)
        arguments = leaf, order, torch.tensor(1), cu_seqlens, len(order) * length
        filled, rows, offsets = step(*arguments)
        assert torch.equal(filled, kept_rows(leaf.detach(), order, 1))
        assert torch.equal(rows, leaf.detach()[order].flatten(0, 1)[None])
        assert torch.equal(offsets, cu_seqlens[: len(order) + 1])
        (got,) = torch.autograd.grad(filled.sum() + rows.square().sum(), leaf)
        expected = torch.zeros_like(leaf)
        expected[order] = 2 * leaf.detach()[order]
        expected[order[:1]] += 1
        torch.testing.assert_close(got, expected)


def test_bit_identical_for_any_threads():
    hidden, order = draw((500, 16, 64)), draw_order(500)
    flat, cu_seqlens = hidden.flatten(0, 1)[None], torch.arange(0, 501 * 16, 16, dtype=torch.int32)
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.equal(bertops.compact(hidden, order, 400), hidden[order[:400]])
        assert torch.equal(bertops.compact(hidden, order, torch.tensor(400))[:400], hidden[order[:400]])
        rows, _ = bertops.compact_packed(flat, cu_seqlens, order, 400)
        assert torch.equal(rows[0], hidden[order[:400]].flatten(0, 1))
    torch.set_num_threads(threads)


HIDDEN, ORDER = torch.zeros(4, 3), torch.arange(4)


@pytest.mark.parametrize(
    ("error", "words", "hidden", "order", "num_kept", "options"),
    [
        (TypeError, ("hidden", "list"), [1.0], ORDER, 2, {}),
        (ValueError, ("hidden", "(B, ...)", "()"), torch.zeros(()), ORDER, 2, {}),
        (TypeError, ("order", "list"), HIDDEN, [0, 1], 2, {}),
        (ValueError, ("order", "int64", "int32"), HIDDEN, ORDER.int(), 2, {}),
        (ValueError, ("order", "int64", "bool"), HIDDEN, ORDER > 1, 2, {}),
        (ValueError, ("order", "(B,)", "(2, 2)"), HIDDEN, ORDER.view(2, 2), 2, {}),
        (ValueError, ("order", "cpu", "meta"), HIDDEN, ORDER.to("meta"), 2, {}),
        (ValueError, ("num_kept", "4 rows", "5"), HIDDEN, ORDER, 5, {}),
        (ValueError, ("num_kept", "-1"), HIDDEN, ORDER, -1, {}),
        (TypeError, ("num_kept", "2.0"), HIDDEN, ORDER, 2.0, {}),
        (TypeError, ("num_kept", "True"), HIDDEN, ORDER, True, {}),
        (TypeError, ("num_kept", "None"), HIDDEN, ORDER, None, {}),
        (ValueError, ("num_kept", "(2,)"), HIDDEN, ORDER, torch.tensor([1, 2]), {}),
        (ValueError, ("num_kept", "int32"), HIDDEN, ORDER, torch.tensor(2, dtype=torch.int32), {}),
        (ValueError, ("num_kept", "cpu", "meta"), HIDDEN, ORDER, torch.tensor(2, device="meta"), {}),
        (ValueError, ("impl", "fast"), HIDDEN, ORDER, 2, {"impl": "fast"}),
        (RuntimeError, ("compact", "cuda", "cpu"), HIDDEN, ORDER, 2, {"impl": "cuda"}),
        (RuntimeError, ("compact", "no triton kernel"), HIDDEN, ORDER, 2, {"impl": "triton"}),
    ],
)
def test_bad_input_is_named(error, words, hidden, order, num_kept, options):
    with pytest.raises(error) as caught:
        bertops.compact(hidden, order, num_kept, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


FLAT, OFFSETS = torch.zeros(1, 6, 2), torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, ("hidden", "NoneType"), {"hidden": None}),
        (ValueError, ("hidden", "(1, T, ...)", "(6,)"), {"hidden": torch.zeros(6)}),
        (ValueError, ("B = 1", "(2, 6)"), {"hidden": torch.zeros(2, 6)}),
        (TypeError, ("cu_seqlens", "list"), {"cu_seqlens": [0, 2, 6]}),
        (ValueError, ("cu_seqlens", "int64"), {"cu_seqlens": OFFSETS.long()}),
        (ValueError, ("cu_seqlens", "6", "5"), {"cu_seqlens": OFFSETS.clamp_max(5)}),
        (ValueError, ("cu_seqlens", "decrease"), {"cu_seqlens": OFFSETS[[0, 2, 1, 2]]}),
        (ValueError, ("order", "int32"), {"order": torch.tensor([0], dtype=torch.int32)}),
        (ValueError, ("num_kept", "2 rows", "3"), {"num_kept": 3}),
        (TypeError, ("num_kept", "tensor"), {"num_kept": torch.tensor(1)}),
        (ValueError, ("impl", "fast"), {"impl": "fast"}),
        (RuntimeError, ("compact_packed", "cuda", "cpu"), {"impl": "cuda"}),
    ],
)
def test_bad_packed_input_is_named(error, words, changes):
    arguments = {"hidden": FLAT, "cu_seqlens": OFFSETS, "order": torch.arange(2), "num_kept": 1}
    with pytest.raises(error) as caught:
        bertops.compact_packed(**(arguments | changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("op", ["compact", "compact_packed"])
def test_use_impl_chooses(op, monkeypatch):
    calls = []
    plain = getattr(reference, op)
    monkeypatch.setattr(reference, op, lambda *x: calls.append(1) or plain(*x))
    arguments = (HIDDEN, ORDER, 2) if op == "compact" else (FLAT, OFFSETS, torch.arange(2), 1)
    with bertops.use_impl("cpu"):
        getattr(bertops, op)(*arguments)
    assert not calls
    with bertops.use_impl("reference"):
        getattr(bertops, op)(*arguments)
    assert len(calls) == 1
