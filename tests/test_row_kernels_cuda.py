"""What only a GPU shows of the row ops: CUDA graphs, streams, the number of launches, traps."""

import subprocess
import sys

import pytest
import torch

import bertops
from bertops import _backend, reference

pytestmark = pytest.mark.skipif(
    not (_backend.extension_has_cuda and torch.cuda.is_available()), reason="needs a GPU and a CUDA build"
)

THRESHOLD = 0.5
# One block; a few rounds of it; several blocks that wait for each other; a warp a row; a block a row.
SHAPES = [
    (1, 2),
    (37, 3),
    (4096, 2),
    (4097, 2),
    (65536, 20),
    (300_001, 2),
    (900, 1000),
    (70, 4099),
    (3, 131072),
]


def draw(batch, classes, dtype=torch.float32):
    """Rows of which some are certain; some cannot be decided."""
    logits = torch.randn(batch, classes, device="cuda") * torch.rand(batch, 1, device="cuda") * 20
    logits[::13, 0] = float("nan")
    return logits.to(dtype)


def assert_decides(decision, logits):
    prediction, uncertainty, *_ = reference.exit_decision(logits.double(), THRESHOLD)
    assert torch.equal(decision.prediction, prediction)
    torch.testing.assert_close(
        decision.uncertainty.double(), uncertainty, rtol=1e-5, atol=1e-6, equal_nan=True
    )
    assert torch.equal(decision.exited, decision.uncertainty <= THRESHOLD)
    assert torch.equal(decision.order, decision.exited.to(torch.uint8).argsort(stable=True))
    assert decision.num_kept.item() == (~decision.exited).sum().item()


def decide_and_compact(logits, hidden):
    decision = bertops.exit_decision(logits, THRESHOLD, impl="cuda")
    return decision, bertops.compact(hidden, decision.order, decision.num_kept, impl="cuda")


def assert_compacts(rows, hidden, decision):
    assert torch.equal(rows, reference.compact(hidden, decision.order, decision.num_kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "classes"), SHAPES)
def test_every_kind_of_grid(batch, classes, dtype):
    logits = draw(batch, classes, dtype)
    first = bertops.exit_decision(logits, THRESHOLD, impl="cuda")
    assert_decides(first, logits)
    for _ in range(5):
        again = bertops.exit_decision(logits, THRESHOLD, impl="cuda")
        torch.testing.assert_close(again, first, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("batch", "classes"), SHAPES)
def test_a_graph_follows_new_inputs(batch, classes):
    logits, hidden = draw(batch, classes), torch.randn(batch, 5, device="cuda")
    decide_and_compact(logits, hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decision, rows = decide_and_compact(logits, hidden)
    for _ in range(3):
        logits.copy_(draw(batch, classes))
        hidden.normal_()
        graph.replay()
        assert_decides(decision, logits)
        assert_compacts(rows, hidden, decision)


def test_a_graph_of_the_gradient_and_of_packed_rows():
    logits, grad = draw(50, 20).nan_to_num(), torch.randn(50, device="cuda")
    hidden, order = torch.randn(1, 90, 6, device="cuda"), torch.tensor([2, 0], device="cuda")
    cu_seqlens = torch.tensor([0, 30, 50, 90], device="cuda", dtype=torch.int32)
    logits.requires_grad_()

    def step():
        (gradient,) = torch.autograd.grad(bertops.entropy(logits, impl="cuda"), logits, grad)
        return gradient, *bertops.compact_packed(hidden, cu_seqlens, order, 2, num_tokens=70, impl="cuda")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient, rows, offsets = step()
    with torch.no_grad():
        logits.normal_()
    hidden.normal_()
    order.copy_(torch.tensor([0, 2]))
    graph.replay()
    leaf = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.entropy(leaf), leaf, grad.double())
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(rows, torch.cat([hidden[:, :30], hidden[:, 50:]], 1))
    assert offsets.tolist() == [0, 30, 70]


@pytest.mark.parametrize(("batch", "classes"), SHAPES)
def test_follows_the_current_stream(batch, classes):
    """The inputs are written late, on a stream that is not the default one."""
    late, hidden = draw(batch, classes), torch.randn(batch, 3, device="cuda")
    logits = torch.zeros_like(late)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        logits.copy_(late)
        decision, rows = decide_and_compact(logits, hidden)
    torch.cuda.synchronize()
    assert_decides(decision, late)
    assert_compacts(rows, hidden, decision)


def test_streams_at_once_do_not_disturb_each_other():
    """Blocks that wait for each other, of several launches at the same time."""
    logits = [draw(65536 + 1000 * i, 2 + i) for i in range(4)]
    streams = [torch.cuda.Stream() for _ in logits]
    torch.cuda.synchronize()
    decisions = []
    for _ in range(50):
        for x, stream in zip(logits, streams, strict=True):
            with torch.cuda.stream(stream):
                decisions.append((x, bertops.exit_decision(x, THRESHOLD, impl="cuda")))
    torch.cuda.synchronize()
    for x, decision in decisions:
        assert_decides(decision, x)


def kernels_of(run):
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize(("batch", "classes"), SHAPES)
def test_launches(batch, classes):
    torch.use_deterministic_algorithms(False)  # which fills new memory, a launch each
    logits, hidden = draw(batch, classes), torch.randn(batch, 16, device="cuda")
    decision = bertops.exit_decision(logits, THRESHOLD, impl="cuda")
    grad = torch.ones(batch, device="cuda")
    cu_seqlens = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
    for most, run in (
        (1, lambda: bertops.exit_decision(logits, THRESHOLD, impl="cuda")),
        (1, lambda: bertops.entropy(logits, impl="cuda")),
        (1, lambda: torch.ops.bertops.entropy_bwd(grad, logits, True)),
        (1, lambda: bertops.compact(hidden, decision.order, decision.num_kept, impl="cuda")),
        (2, lambda: torch.ops.bertops.compact_packed(hidden[None], cu_seqlens, decision.order, batch)),
    ):
        names = kernels_of(run)
        assert 1 <= len(names) <= most, names


def test_nothing_is_read_back():
    logits, hidden = draw(5000, 2), torch.randn(5000, 7, device="cuda")
    cu_seqlens = torch.arange(5001, device="cuda", dtype=torch.int32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decision, _ = decide_and_compact(logits, hidden)
        bertops.compact_packed(hidden[None], cu_seqlens, decision.order, 5000, num_tokens=5000, impl="cuda")
        bertops.entropy(logits.requires_grad_(), impl="cuda").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_device_need_not_be_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    logits, hidden = draw(5000, 2).to("cuda:1"), torch.randn(5000, 7, device="cuda:1")
    decision, rows = decide_and_compact(logits, hidden)
    assert_decides(decision, logits)
    assert_compacts(rows, hidden, decision)


def test_offsets_past_32_bits():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    hidden = torch.zeros(3, 2**31 + 16, device="cuda", dtype=torch.uint8)
    hidden[1, -1], hidden[2, -16] = 7, 9
    rows = bertops.compact(hidden, torch.tensor([2, 1, 0], device="cuda"), 2, impl="cuda")
    assert rows[1, -1] == 7 and rows[0, -16] == 9 and torch.count_nonzero(rows) == 2
    del hidden, rows
    logits = torch.zeros(2**15 + 2, 2**16, device="cuda", dtype=torch.float16)
    logits[-2:] = draw(2, 2**16, torch.float16).nan_to_num()
    actual = bertops.entropy(logits, impl="cuda")[-2:]
    expected = reference.entropy(logits[-2:].double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    prediction = bertops.exit_decision(logits, THRESHOLD, impl="cuda").prediction[-2:]
    assert torch.equal(prediction, logits[-2:].argmax(-1))


BAD_CALLS = {
    "order[1] must be from 0 to 5, got 6": "bertops.compact(hidden, tensor([0, 6]), 2)",
    "order[0] must be from 0 to 5, got -1": "bertops.compact(hidden, tensor([-1, 9]), tensor(1))",
    "order[1] must be from 0 to 2, got 3": "compact_packed(lengths, tensor([0, 3]), 4)",
    "num_tokens must be the 3 tokens": "compact_packed(lengths, tensor([0, 1]), 4)",
    "cu_seqlens must not decrease": "compact_packed(-lengths, tensor([0, 1]), 3)",
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_a_bad_index_traps_and_names_itself(message):
    """A trap ends the use of CUDA in its process."""
    code = f"""
import torch, bertops
tensor = lambda x: torch.tensor(x, device="cuda")
hidden, lengths = torch.zeros(6, 5, device="cuda"), tensor([0, 2, 3, 6]).int()
compact_packed = lambda lengths, order, num_tokens: bertops.compact_packed(
    hidden[None], lengths, order, 2, num_tokens=num_tokens
)
{BAD_CALLS[message]}
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert message in result.stdout, result.stdout + result.stderr


def test_rows_left_behind_may_have_any_index():
    hidden, order = torch.randn(4, 5, device="cuda"), torch.tensor([3, 99, -7], device="cuda")
    rows = bertops.compact(hidden, order, torch.tensor(1, device="cuda"), impl="cuda")
    assert torch.equal(rows[0], hidden[3]) and not rows[1:].any()
