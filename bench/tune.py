"""Times candidate block sizes of every tiled Triton kernel on this GPU, for the table in kernels/launch.py.

    python -m bench.tune [--kernel attention_fwd ...] [--head-dim 64] [--dtype bf16] [--out FILE]

A kernel's candidates run in place of its entry in the table while all other kernels keep theirs, and the
whole forward or backward of an op that launches it is timed, at B * N = 16384 over three lengths. Processes
compile all candidates first, as many at once as there are cores. Prints the best beside the table's entry.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm

import bertops
from bertops._files import write_whole
from bertops.kernels import launch
from bertops.kernels.launch import BlockConfig

TOKENS, HEADS = 16384, 12
LENGTHS = (128, 512, 2048)
SHOWN = 4
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# kernel: the op that launches it, in which direction
KERNELS = {
    "attention_fwd": ("attention", "forward"),
    "attention_with_scores_fwd": ("attention_with_scores", "forward"),
    "attention_bwd_dq": ("attention", "backward"),
    "attention_bwd_dkv": ("attention", "backward"),
    "attention_bwd_dq_scores": ("attention_with_scores", "backward"),
    "attention_bwd_dkv_scores": ("attention_with_scores", "backward"),
    "pair_fwd_kl": ("attention_kl", "forward"),
    "pair_bwd_dq": ("attention_kl", "backward"),
    "pair_bwd_dk": ("attention_kl", "backward"),
    "relation_kl_bwd": ("relation_kl", "backward"),
    "gram_chunks": ("attention_score_mse", "forward"),
    "gram_bwd": ("attention_score_mse", "backward"),
    "embedding_fwd": ("factorized_embedding", "forward"),
}
TENSORS = {  # of the student, of the teacher
    "attention": (3, 0),
    "attention_with_scores": (3, 0),
    "attention_kl": (2, 2),
    "relation_kl": (1, 1),
    "attention_score_mse": (2, 2),
}

Shape = tuple[int, int, str]  # length, head dim, dtype


def candidates(kernel: str) -> list[BlockConfig]:
    rows, columns = ((64, 128), (32, 64, 128))
    if kernel.startswith("gram"):
        columns = (64, 128)
    return [BlockConfig(*sizes) for sizes in product(rows, columns, (4, 8), (2, 3))]


@cache
def timed_call(op: str, direction: str, shape: Shape, device: str) -> Callable[[], Any]:
    length, head_dim, dtype = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(device, DTYPES[dtype])

    if op == "factorized_embedding":
        ids = torch.randint(30000, (TOKENS // length, length), generator=generator).to(device)
        word, projection = draw(30000, 2 * head_dim), draw(768, 2 * head_dim)
        return lambda: bertops.factorized_embedding(ids, word, projection, impl="triton")
    student, teacher = TENSORS[op]
    tensors = [draw(TOKENS // length, HEADS, length, head_dim) for _ in range(student + teacher)]
    leaves = tensors[:student]
    call = lambda: getattr(bertops, op)(*tensors, impl="triton")  # noqa: E731
    if direction == "forward":
        return call
    for x in leaves:
        x.requires_grad_()
    outputs = call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.ones_like(x) for x in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def with_config(kernel: str, config: BlockConfig, call: Callable[[], Any]) -> Any:
    """What ``call()`` returns while ``kernel`` takes these block sizes."""
    table = launch._SM90
    known = table[kernel]
    table[kernel] = (config,) * 3
    try:
        return call()
    finally:
        table[kernel] = known


def compile_candidate(task: tuple[str, BlockConfig, Shape, str]) -> str | None:
    kernel, config, shape, device = task
    try:
        with_config(kernel, config, timed_call(*KERNELS[kernel], shape, device))
    except Exception as error:  # such as a tile that does not fit into shared memory
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def measure(kernel: str, config: BlockConfig, head_dim: int, dtype: str) -> list[float] | None:
    """Milliseconds at each of ``LENGTHS``."""
    from triton.testing import do_bench

    calls = [timed_call(*KERNELS[kernel], (length, head_dim, dtype), "cuda") for length in LENGTHS]

    def times() -> list[float]:
        return [do_bench(call, warmup=3, rep=15, return_mode="median") for call in calls]

    try:
        return with_config(kernel, config, times)
    except triton.runtime.errors.OutOfResources:
        return None


def mean(times: list[float]) -> float:
    """Geometric: every length counts alike."""
    return math.exp(sum(map(math.log, times)) / len(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kernel", nargs="*", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("bench.tune looks for entries of the table for compute capability 9.0")

    shape = LENGTHS[0], options.head_dim, options.dtype
    tasks = [(kernel, config, shape, "cuda") for kernel in options.kernel for config in candidates(kernel)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        failures = list(tqdm(pool.map(compile_candidate, tasks), "compiling", len(tasks), file=sys.stderr))
    results: dict[str, list[dict[str, Any]]] = {}
    column = 0 if options.head_dim <= 64 else 1 if options.head_dim <= 128 else 2
    for kernel in tqdm(options.kernel, "timing", file=sys.stderr):
        known = BlockConfig(*launch._SM90[kernel][column])
        tried = [known] + [task[1] for task, failure in zip(tasks, failures, strict=True)
                           if task[0] == kernel and failure is None and task[1] != known]  # fmt: skip
        times = [(config, measure(kernel, config, options.head_dim, options.dtype)) for config in tried]
        rows = [{"config": list(c), "ms": t, "mean": mean(t)} for c, t in times if t is not None]
        results[kernel] = rows
        print(f"{kernel} {options.dtype} D{options.head_dim}: ms at N = {', '.join(map(str, LENGTHS))}")
        best = sorted(rows, key=lambda row: row["mean"])[:SHOWN]
        for row in [rows[0], *(row for row in best if row is not rows[0])]:
            note = " (table)" if row is rows[0] else ""
            print(
                f"  {tuple(row['config'])!s:18} {' '.join(f'{t:8.4f}' for t in row['ms'])}{note}", flush=True
            )
    if options.out:
        about = {"gpu": torch.cuda.get_device_name(), "head_dim": options.head_dim, "dtype": options.dtype}
        write_whole(options.out, json.dumps({**about, "kernels": results}, indent=1).encode())


if __name__ == "__main__":
    main()
