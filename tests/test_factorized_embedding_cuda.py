"""What only a GPU shows of factorized_embedding: sums over chunks, graphs, streams, traps, big tables."""

import subprocess
import sys

import pytest
import torch

import bertops
from bertops import _backend
from embedding_cases import Case, call, run, upstream_of

pytestmark = pytest.mark.skipif(
    not (_backend.extension_has_cuda and torch.cuda.is_available()), reason="needs a GPU and a CUDA build"
)

HALVES = (torch.bfloat16, torch.float16)
STEP = Case(
    batch=8,
    length=70,
    width=64,
    height=96,
    rows=(300, 80, 2),
    dtype=torch.bfloat16,
    token_type_ids=8,
    options={"padding_idx": 3, "dropout_p": 0.1},
)


def step(input_ids, parameters, options, upstream):
    out = bertops.factorized_embedding(input_ids, **parameters, **options, impl="triton")
    return out, *torch.autograd.grad(out, list(parameters.values()), upstream)


def leaves_of(parameters):
    return {name: x.requires_grad_() for name, x in parameters.items()}


def assert_same_sums(sums, rows, ids, count, padding_idx):
    """Against fp64; the error of a sum is a share of what it sums."""
    kept = (ids >= 0) & (ids < count)
    if padding_idx is not None:
        kept &= ids != padding_idx
    exact = torch.zeros(count, rows.shape[1], dtype=torch.float64, device="cuda")
    mass = torch.zeros_like(exact)
    places, values = ids[kept], rows[kept].double()
    exact.index_add_(0, places, values)
    mass.index_add_(0, places, values.abs())
    bound = 2e-6 * mass + torch.finfo(sums.dtype).eps * (exact.abs() + 1e-4)
    assert ((sums.double() - exact).abs() <= bound).all()


def table_grad(rows, ids, count, padding_idx, dtype):
    order = torch.sort(ids, stable=True).indices
    return torch.ops.bertops._embedding_table_grad(rows, ids, order, count, padding_idx, dtype)


@pytest.mark.parametrize("width", [1, 5, 128, 312, 1028])
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 2048, 2049, 70_001])
@pytest.mark.parametrize("kind", ["uniform", "one", "hot", "outside"])
def test_sums_over_chunks(kind, tokens, width):
    ids = torch.randint(0, 500, (tokens,), device="cuda")
    if kind == "one":
        ids.fill_(7)
    elif kind == "hot":
        ids[torch.rand(tokens, device="cuda") < 0.9] = 3
    elif kind == "outside":
        ids -= 40
    for dtype, table_dtype in ((torch.float32, torch.bfloat16), *((x, x) for x in (torch.float32, *HALVES))):
        rows = torch.randn(tokens, width, device="cuda").to(dtype)
        for padding_idx in (None, 3):
            sums = table_grad(rows, ids, 450, padding_idx, table_dtype)
            assert_same_sums(sums, rows, ids, 450, padding_idx)
            again = table_grad(rows, ids.int(), 450, padding_idx, table_dtype)
            assert torch.equal(sums, again)


def test_padding_is_not_read():
    ids = torch.randint(0, 9, (5000,), device="cuda")
    rows = torch.randn(5000, 20, device="cuda").masked_fill((ids == 4)[:, None], float("nan"))
    sums = table_grad(rows, ids, 9, 4, torch.float32)
    assert sums.isfinite().all() and not sums[4].any()


def test_same_bits_with_a_million_hot_tokens():
    case = Case(batch=256, length=4096, width=32, height=0, rows=(1000, 4096, 2), ids="skewed")
    inputs = case.inputs("cuda")
    first = run(*inputs, "triton")
    for _ in range(3):
        again = run(*inputs, "triton")
        assert all(torch.equal(first[name], x) for name, x in again.items())


def test_a_graph_follows_new_ids():
    input_ids, parameters, options = STEP.inputs("cuda")
    del options["dropout_p"]  # its seed is drawn anew in every call
    upstream = upstream_of(call(input_ids, parameters, options, "triton"))
    leaves = leaves_of(parameters)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(input_ids, leaves, options, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(input_ids, leaves, options, upstream)
    for share in (0.0, 0.5, 1.0):
        input_ids.random_(0, 300)
        input_ids[torch.rand(input_ids.shape, device="cuda") < share] = 3
        options["token_type_ids"].random_(0, 2)
        graph.replay()
        expected = step(input_ids, leaves, options, upstream)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_replay_draws_new_dropout():
    input_ids, parameters, options = STEP.inputs("cuda")
    bertops.factorized_embedding(input_ids, **parameters, **options, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bertops.factorized_embedding(input_ids, **parameters, **options, impl="triton")
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


def test_follows_the_current_stream():
    """The ids are written late, on a stream that is not the default one."""
    late, parameters, options = STEP.inputs("cuda")
    input_ids = torch.zeros_like(late)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        input_ids.copy_(late)
        results = run(input_ids, parameters, options, "triton")
    torch.cuda.synchronize()
    expected = run(late, parameters, options, "triton")
    assert all(torch.equal(results[name], x) for name, x in expected.items())


def test_nothing_is_read_back():
    for case in (STEP, Case(batch=1, length=70, lengths=(30, 0, 40), rows=(30, 70, 2))):
        input_ids, parameters, options = case.inputs("cuda")
        leaves = leaves_of(parameters)
        upstream = torch.ones_like(call(input_ids, parameters, options, "triton"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = bertops.factorized_embedding(input_ids, **leaves, **options, impl="triton")
            out.backward(upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_device_need_not_be_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    input_ids, parameters, options = STEP.inputs("cuda:1")
    del options["dropout_p"]
    there = run(input_ids, parameters, options, "triton")
    here = {name: x.to("cuda:0") for name, x in parameters.items()}
    options["token_type_ids"] = options["token_type_ids"].to("cuda:0")
    expected = run(input_ids.to("cuda:0"), here, options, "triton")
    assert all(torch.equal(there[name].to("cuda:0"), x) for name, x in expected.items())


def test_offsets_past_32_bits():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    rows, width = 2**25 + 3, 128  # 2^32 elements and a few
    word = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([[rows - 1, 0, 2**24, rows - 1]], device="cuda")
    word[ids[0]] = torch.randn(4, width, device="cuda").bfloat16()
    word.requires_grad_()
    small = word.detach()[ids[0]].requires_grad_()
    out = bertops.factorized_embedding(ids, word, impl="triton")
    expected = bertops.factorized_embedding(torch.arange(4, device="cuda")[None], small, impl="triton")
    assert torch.equal(out, expected)
    upstream = upstream_of(out)
    (grad,) = torch.autograd.grad(out, word, upstream)
    (parts,) = torch.autograd.grad(expected, small, upstream)
    assert torch.equal(grad[0], parts[1]) and torch.equal(grad[2**24], parts[2])
    assert torch.equal(grad[rows - 1], (parts[0].float() + parts[3].float()).bfloat16())


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize(
    ("name", "table", "value"),
    [
        ("input_ids", "word", 30),
        ("input_ids", "word", -1),
        ("position_ids", "position", 2**40),
        ("token_type_ids", "token_type", -2),
    ],
)
def test_a_bad_id_stops_the_kernel(name, table, value, projected):
    """It ends the use of CUDA in its process."""
    code = f"""
import sys, torch, bertops
sys.path.insert(0, "tests")
from embedding_cases import Case
case = Case(position_ids=1, token_type_ids=2, height={20 if projected else 0})
input_ids, parameters, options = case.inputs("cuda")
ids = {{"input_ids": input_ids, **options}}
ids[{name!r}][0, 3] = {value}
bertops.factorized_embedding(**ids, **parameters, impl="triton")
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    words = f"bertops: every one of {name} must be a row of {table}"
    assert words in result.stdout + result.stderr, result.stdout + result.stderr


def test_packed_positions_past_the_table_stop_the_kernel():
    code = """
import torch, bertops
word, position = torch.zeros(9, 8, device="cuda"), torch.zeros(4, 8, device="cuda")
offsets = torch.tensor([0, 5, 7], device="cuda", dtype=torch.int32)
ids = torch.zeros(1, 7, device="cuda", dtype=torch.int64)
bertops.factorized_embedding(ids, word, position=position, cu_seqlens=offsets, impl="triton")
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "position_ids must be a row of position" in result.stdout + result.stderr
