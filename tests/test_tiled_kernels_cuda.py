"""What only a GPU shows of attention and of the losses between two models' attention: CUDA graphs, streams,
the same bits again and again, and sizes past 32 bits and past a grid's axes."""

from functools import partial

import pytest
import torch

import attention_cases
import bertops
import pair_cases
from bertops import reference
from errors import assert_close_to_oracle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ATTENTION = {
    "plain": {},
    "mask": {"padding": "holes"},
    "window": {"options": {"window": 70}},
    "dropout": {"options": {"dropout_p": 0.2}},
    "packed": {"batch": 1, "lengths": (100, 1, 179, 20)},
}
LOSS = {"plain": {}, "mask": {"padding": "right"}, "packed": {"batch": 1, "lengths": (100, 1, 179, 20)}}
CALLS = [
    *((op, options) for op in attention_cases.OPS for options in ATTENTION),
    *((op, options) for op in pair_cases.LOSSES for options in LOSS),
]
DTYPES = [torch.bfloat16, torch.float32]


class Step:
    """Forward and backward of one op; every call returns outputs and gradients, in new memory."""

    def __init__(self, op: str, options: str, dtype: torch.dtype, length: int = 300, head_dim: int = 64):
        self.op = op
        self.is_loss = op in pair_cases.LOSSES
        cases, kinds = (pair_cases, LOSS) if self.is_loss else (attention_cases, ATTENTION)
        case = cases.Case(length=length, head_dim=head_dim, dtype=dtype, **kinds[options])
        self.inputs, self.options = case.inputs("cuda")
        if op == "relation_kl":
            self.inputs = self.inputs[::2]
        self.leaves = [x for x in self.inputs if x.requires_grad]
        self.call = partial((pair_cases.LOSSES if self.is_loss else attention_cases.OPS)[op], **self.options)

    def __call__(self) -> list[torch.Tensor]:
        if "dropout_p" in self.options:
            torch.manual_seed(1)
        outputs = self.call(*self.inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad(outputs, self.leaves, [torch.ones_like(x) for x in outputs])
        return [*(x.detach() for x in outputs), *grads]

    def draw(self) -> list[torch.Tensor]:
        return [torch.randn_like(x) for x in self.inputs]

    @torch.no_grad()
    def fill(self, values: list[torch.Tensor]) -> None:
        for x, value in zip(self.inputs, values, strict=True):
            x.copy_(value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "options"), CALLS)
def test_the_same_bits_every_time(op, options, dtype):
    step = Step(op, options, dtype)
    first = step()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


@pytest.mark.parametrize(("op", "options"), [call for call in CALLS if call[1] != "dropout"])
def test_a_graph_follows_new_inputs(op, options):
    step = Step(op, options, torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(3):
        step.fill(step.draw())
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


@pytest.mark.parametrize("op", attention_cases.OPS)
def test_a_graph_draws_new_dropout(op):
    step = Step(op, "dropout", torch.bfloat16)
    run = partial(step.call, *(x.detach() for x in step.inputs))
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    out = out[0] if isinstance(out, tuple) else out
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(out.clone())
    assert not torch.equal(*replays)


@pytest.mark.parametrize(("op", "options"), CALLS)
def test_follows_the_current_stream(op, options):
    """The inputs are written late, on a stream that is not the default one."""
    step = Step(op, options, torch.bfloat16)
    late = step.draw()
    step()
    step.fill([torch.zeros_like(x) for x in late])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        step.fill(late)
        results = step()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


@pytest.mark.parametrize("op", pair_cases.LOSSES)
def test_nothing_is_read_back(op):
    step = Step(op, "mask", torch.bfloat16)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def needs(gib: int) -> None:
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of GPU memory")


def test_score_map_of_more_than_2_to_the_31_elements():
    needs(24)
    torch.use_deterministic_algorithms(False)  # which fills new memory
    heads, length = 9, 16384
    q, k, v = (torch.randn(1, heads, length, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, scores = bertops.attention_with_scores(*leaves)
    assert scores.numel() > 2**31
    grad_out = torch.randn_like(out)
    # all of the map's gradient lies in its last rows and columns, past 2^31
    grad_scores = torch.zeros_like(scores)
    grad_scores[0, -1, -64:, -64:] = 1
    grads = torch.autograd.grad((out, scores), leaves, (grad_out, grad_scores))
    few = slice(-64, None)
    row_q = q.detach()[:, -1:, few].double()
    exact = row_q @ k.detach()[:, -1:].double().transpose(-1, -2) * 0.25
    torch.testing.assert_close(scores[:, -1:, few].double(), exact, rtol=1e-2, atol=1e-2)
    expected = exact.softmax(-1) @ v.detach()[:, -1:].double()
    torch.testing.assert_close(out[:, -1:, few].double(), expected, rtol=2e-2, atol=2e-3)
    p = exact.softmax(-1)
    dp = grad_out[:, -1:, few].double() @ v.detach()[:, -1:].double().transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) + grad_scores[:, -1:, few].double()
    dq = ds @ k.detach()[:, -1:].double() * 0.25
    torch.testing.assert_close(grads[0][:, -1:, few].double(), dq, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("op", [*attention_cases.OPS, *pair_cases.LOSSES])
def test_more_heads_than_a_grid_axis_has(op):
    """B * H = 70,000, past 65,535."""
    torch.use_deterministic_algorithms(False)
    shape = 35_000, 2, 20, 16
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    few = [x[-3:] for x in tensors]
    if op in attention_cases.OPS:
        whole, part = (attention_cases.OPS[op](*x[:3]) for x in (tensors, few))
    else:
        tensors, few = ((x[::2] if op == "relation_kl" else x) for x in (tensors, few))
        whole, part = (pair_cases.LOSSES[op](*x, reduction="none") for x in (tensors, few))
    whole, part = (x[0] if isinstance(x, tuple) else x for x in (whole, part))
    assert torch.equal(whole[-3:], part)


@pytest.mark.parametrize("op", [*attention_cases.OPS, *pair_cases.LOSSES])
def test_strides_past_32_bits(op):
    """The second sample and the second head lie more than 2^31 elements behind the first."""
    needs(12)
    torch.use_deterministic_algorithms(False)
    far = 2**31 + 64
    memory = torch.empty(far + 2**22, device="cuda", dtype=torch.bfloat16)
    dense = [torch.randn(2, 2, 40, 16, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    for strides in ((far, 2**18, 16, 1), (2**18, far, 16, 1)):
        step = 0
        apart = []
        for x in dense:
            view = memory.as_strided(x.shape, strides, step)
            view.copy_(x)
            apart.append(view)
            step += 2**20
        if op in attention_cases.OPS:
            one, other = (attention_cases.OPS[op](*x[:3]) for x in (dense, apart))
        else:
            pairs = [x[::2] if op == "relation_kl" else x for x in (dense, apart)]
            one, other = (pair_cases.LOSSES[op](*x) for x in pairs)
        one, other = (x if isinstance(x, tuple) else (x,) for x in (one, other))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("op", ["attention_kl", "relation_kl", "attention_score_mse"])
def test_131072_tokens_without_a_map(op):
    """Forward and backward in little more memory than the inputs take."""
    needs(8)
    torch.use_deterministic_algorithms(False)
    step = Step(op, "plain", torch.bfloat16, length=256)
    step()  # what the first call allocates for good stays out of the peak
    shape = 1, 2, 131_072, 64
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(len(step.inputs))]
    leaves = [x.requires_grad_(i < len(tensors) // 2) for i, x in enumerate(tensors)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = pair_cases.LOSSES[op](*leaves)
    grads = torch.autograd.grad(loss, leaves[: len(tensors) // 2])
    assert torch.cuda.max_memory_allocated() - before < 4 * sum(x.nbytes for x in tensors)
    assert loss.isfinite() and all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [128, 512, 2048])
def test_close_to_the_oracle_at_the_lengths_of_models(length, dtype):
    """Which the other tests, that also run where kernels are slow, do not reach."""
    torch.use_deterministic_algorithms(False)
    qkv = [torch.randn(1, 2, length, 64, device="cuda").to(dtype) for _ in range(3)]
    upstream = [torch.randn(1, 2, length, width, device="cuda").to(dtype) for width in (64, length)]

    def run(op, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        outputs = op(*leaves)
        return *outputs, *torch.autograd.grad(outputs, leaves, [x.to(dtype) for x in upstream])

    def eager(q, k, v):
        out, _, scores = reference.attention_with_scores(q, k, v)
        return out, scores

    actual, plain = run(bertops.attention_with_scores, dtype), run(eager, dtype)
    exact = run(eager, torch.float64)
    for name, *results in zip(("out", "scores", "dq", "dk", "dv"), actual, plain, exact, strict=True):
        ours, theirs, oracle = (x.detach() for x in results)
        assert_close_to_oracle(f"{name} N{length} {dtype}", ours, [theirs], oracle)
