"""Compiles every Triton kernel for sm_80, sm_90 and sm_100 without a GPU and looks at what came out.

    python tests/offline_triton.py [--arch 90] [--kernel attention_fwd] [--head-dim 64]

For each kernel, architecture, dtype, head dim and combination of options, with the block sizes that a launch
would take: registers, bytes of stack (spilled registers), spilling instructions inside the loops over tiles
and shared memory. Exits with 1 where shared memory exceeds the chip's, where a half-precision kernel that
multiplies has no tensor-core instruction, or where its loops spill at a head dim up to 128; those of the
embedding may not spill at any width, which stands in for the head dim. A few addresses parked on the stack
before a loop cost nothing, and how many there are changes with every version of ptxas.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bertops.kernels import (
    attention,
    attention_bwd,
    attention_score_mse_gram,
    embedding_rows,
    factorized_embedding,
    factorized_embedding_bwd,
    kl_div_logits,
    linear_kl_div,
    pairs,
    pairs_bwd,
    projected_mse,
    relation_kl,
    row_pair_losses,
)
from bertops.kernels.launch import BlockConfig, block_config, padded_head_dim
from bertops.kernels.pairs_bwd import FP16_BOOST
from bertops.kernels.rows import row_blocks

KERNELS = {
    "attention_fwd": attention._kernel,
    "attention_with_scores_fwd": attention._kernel,
    "attention_bwd_dq": attention_bwd._dq_kernel,
    "attention_bwd_dkv": attention_bwd._dkv_kernel,
    "attention_bwd_dq_scores": attention_bwd._dq_kernel,
    "attention_bwd_dkv_scores": attention_bwd._dkv_kernel,
    "pair_fwd_kl": pairs._fwd_kernel,
    "pair_fwd_kl_given": pairs._fwd_kernel,
    "pair_fwd_mse": pairs._fwd_kernel,
    "pair_bwd_dq": pairs_bwd._dq_kernel,
    "pair_bwd_dk": pairs_bwd._dk_kernel,
    "relation_kl_bwd": relation_kl._kernel,
    "gram_chunks": attention_score_mse_gram._chunk_kernel,
    "gram_bwd": attention_score_mse_gram._bwd_kernel,
    "linear_kl_div": linear_kl_div._kernel,
    "projected_mse": projected_mse._kernel,
}
# These stand between products of cuBLAS: no tile, no head dim, a BLOCK of a row at a time.
LINEAR_KERNELS = {
    "linear_kl_div": (linear_kl_div.BLOCK, linear_kl_div.NUM_WARPS),
    "projected_mse": (projected_mse.BLOCK, projected_mse.NUM_WARPS),
}
EMBEDDING_KERNELS = {
    "embedding_fwd": factorized_embedding._kernel,
    "embedding_fwd_rows": factorized_embedding._kernel,  # without a projection
    "embedding_bwd": factorized_embedding_bwd._kernel,
    "embedding_bwd_rows": factorized_embedding_bwd._kernel,
}
# Losses between paired rows: their head dim is the width of a row. Without products, and without spills.
ROW_KERNELS = {
    "direction_fwd": row_pair_losses._direction_fwd,
    "direction_bwd": row_pair_losses._direction_bwd,
    "feature_fwd": row_pair_losses._feature_fwd,
    "feature_bwd": row_pair_losses._feature_bwd,
    "kl_div_logits_fwd": kl_div_logits._fwd_kernel,
    "kl_div_logits_bwd": kl_div_logits._bwd_kernel,
}
LOSS_WIDTHS = (20, 768, 30522)
ARCHS = (80, 90, 100)
HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
WIDTHS = {"embedding_fwd": (64, 128, 256, 1024), "embedding_bwd": (64, 128, 256)}
ROW_WIDTHS = (312, 768, 1024, 4096)
OPTIONS = ("plain", "mask", "mask+dropout", "packed+window", "mask+lse")
SHARED_KB = {80: 163, 90: 227, 100: 227}
TENSOR_CORE = {80: r"\bHMMA\.", 90: r"\bH(G|)MMA\.", 100: r"\bUTC[A-Z]*MMA\b"}
SPILL_FREE_HEAD_DIM = 128


class Task(NamedTuple):
    kernel: str
    arch: int
    dtype: torch.dtype
    head_dim: int
    options: str


class Result(NamedTuple):
    task: Task
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: bool
    seconds: float

    def violations(self) -> list[str]:
        half = self.task.dtype != torch.float32
        if self.task.kernel in ROW_KERNELS:
            return [f"{self.stack} bytes of stack"] if self.stack else []
        embedding = self.task.kernel in EMBEDDING_KERNELS
        found = []
        if self.shared > SHARED_KB[self.task.arch] * 1024:
            found.append(f"shared memory {self.shared} above {SHARED_KB[self.task.arch]} KB")
        if half and multiplies(self.task) and not self.tensor_core:
            found.append("no tensor-core instruction")
        if half and self.spills and (embedding or self.task.head_dim <= SPILL_FREE_HEAD_DIM):
            found.append(f"{self.spills} spills in a loop")
        return found


def tasks(every: bool) -> list[Task]:
    """All combinations, or those that differ: every option on sm_90, what takes most registers elsewhere."""
    combinations = itertools.product(KERNELS, ARCHS, DTYPES, HEAD_DIMS, OPTIONS)
    losses = itertools.product(ROW_KERNELS, ARCHS, (torch.bfloat16, torch.float32), LOSS_WIDTHS, ("mask",))
    chosen = [task for task in map(Task._make, combinations) if exists(task)] + embedding_tasks()
    chosen = chosen if every else [task for task in chosen if is_default(task)]
    return chosen + [Task._make(task) for task in losses]


def embedding_tasks() -> list[Task]:
    options = ("plain", "packed+dropout")
    return [
        Task(kernel, arch, dtype, width, option)
        for kernel, arch, dtype, option in itertools.product(EMBEDDING_KERNELS, ARCHS, DTYPES, options)
        for width in WIDTHS.get(kernel, ROW_WIDTHS)
    ]


def multiplies(task: Task) -> bool:
    """The kernel has products of its own, for tensor cores."""
    without = {*EMBEDDING_KERNELS, *LINEAR_KERNELS, *ROW_KERNELS} - {"embedding_fwd"}
    return task.kernel not in without


def exists(task: Task) -> bool:
    """In fp32 a given lse is not used."""
    if task.kernel in LINEAR_KERNELS:
        return task.head_dim == HEAD_DIMS[0] and task.options in ("plain", "mask")
    return task.kernel != "pair_fwd_kl_given" or task.dtype != torch.float32


def is_default(task: Task) -> bool:
    if task.kernel in EMBEDDING_KERNELS:
        usual = task.arch == 90 and task.head_dim in (128, 768)
        return usual or (task.dtype == torch.bfloat16 and task.options != "plain")
    if not task.kernel.startswith("attention"):
        return is_default_pair(task)
    if task.dtype != torch.bfloat16:
        head_dims = (64,) if task.dtype == torch.float16 else (64, 128)
        return task.arch == 90 and task.options == "mask" and task.head_dim in head_dims
    if task.options == "mask":
        return task.arch == 90 or task.head_dim >= 64
    if task.options == "mask+dropout":
        return task.head_dim in (64, 128)
    return task.head_dim == 64 and (task.arch == 90 or task.options == "packed+window")


def is_default_pair(task: Task) -> bool:
    """Masks everywhere; "mask+dropout" and "mask+lse" are nothing that the pair kernels know."""
    if task.kernel in LINEAR_KERNELS:
        return task.options == "mask" and (task.arch == 90 or task.dtype == torch.bfloat16)
    if task.dtype != torch.bfloat16:
        return task.arch == 90 and task.options == "mask" and task.head_dim == 64
    if task.options == "mask":
        return task.head_dim in (64, 128) or (task.arch == 90 and task.head_dim == 256)
    return task.head_dim == 64 and task.arch == 90 and task.options == "packed+window"


def embedding_flags(task: Task) -> dict[str, Any]:
    """Block sizes and the number of warps that a launch would take."""
    width = task.head_dim
    if task.kernel == "embedding_fwd":
        return factorized_embedding.projection_blocks(task.arch, task.dtype, width, "dropout" in task.options)
    elements = (
        factorized_embedding_bwd if "bwd" in task.kernel else factorized_embedding
    )._ROW_ELEMENTS  # of a block
    return {"num_stages": 3, "BLOCK_N": 16, **embedding_rows.row_blocks(task.arch, width, elements)}


def task_blocks(task: Task) -> BlockConfig:
    if task.kernel in ROW_KERNELS:
        return row_blocks(task.head_dim)
    if task.kernel in EMBEDDING_KERNELS:
        flags = embedding_flags(task)
        blocks = flags["BLOCK_M"], flags["BLOCK_N" if multiplies(task) else "BLOCK_E"]
        return BlockConfig(*blocks, flags["num_warps"], flags["num_stages"])
    if task.kernel in LINEAR_KERNELS:
        block, num_warps = LINEAR_KERNELS[task.kernel]
        return BlockConfig(1, block, num_warps, 3)
    config = block_config(task.kernel, task.arch, task.dtype, task.head_dim, "dropout" in task.options)
    if task.kernel.startswith("gram"):
        return config._replace(block_n=min(config.block_n, padded_head_dim(task.head_dim)))
    return config


def source(task: Task) -> ASTSource:
    """The kernel as a launch on contiguous, 16-byte aligned tensors specializes it."""
    if task.kernel in ROW_KERNELS:
        return row_source(task)
    if task.kernel in EMBEDDING_KERNELS:
        return embedding_source(task)
    options = task.options.split("+")
    kernel = KERNELS[task.kernel]
    config = task_blocks(task)
    constants = {
        "HEAD_DIM": task.head_dim,
        "BLOCK_D": padded_head_dim(task.head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "HAS_WINDOW": "window" in options,
        "HAS_DROPOUT": "dropout" in options,
        "HEAD_DIM_S": task.head_dim,
        "HEAD_DIM_T": task.head_dim,
        "BLOCK_D_S": padded_head_dim(task.head_dim),
        "BLOCK_D_T": padded_head_dim(task.head_dim),
        "BLOCK_K": config.block_n,
        "BLOCK": config.block_n,
        "CHUNK": 512,
        "LOSS": task.kernel.removeprefix("pair_fwd_") if "pair_fwd" in task.kernel else "kl",
        "EXACT": task.dtype == torch.float32,
        "SYMMETRIC": True,
        "BOOST": FP16_BOOST if task.dtype == torch.float16 else 0,
    }
    element = "*" + DTYPES[task.dtype]
    types = dict.fromkeys(("q", "k", "v", "out", "grad_out", "dq", "dk", "dv"), element)
    types |= dict.fromkeys(("lse", "delta"), "*fp32")
    types |= dict.fromkeys(("N", "H", "num_sequences", "window", "threshold", "scores_stride"), "i32")
    types |= dict.fromkeys(("scale", "kept_scale"), "fp32")
    types |= dict.fromkeys(("q_strides", "k_strides", "v_strides", "grad_out_strides"), ("i32",) * 3)
    types |= pair_types(task, element)
    if task.kernel in LINEAR_KERNELS:
        types |= dict.fromkeys(("logits_s", "logits_t", "projected"), "*fp32")
        types |= dict.fromkeys(("bias", "bias_s", "bias_t", "hidden_t", "grads"), element)
        types |= dict.fromkeys(("first", "V", "width", "projected_stride", "hidden_t_stride"), "i32")
        types |= dict.fromkeys(("inverse", "temperature"), "fp32")
    optional = {
        "scores": (element, "scores" in task.kernel),
        "grad_scores": (element, "scores" in task.kernel),
        "grad_lse": ("*fp32", "lse" in options),
        "mask": ("*i1", "mask" in options),
        "cu_seqlens": ("*i32", "packed" in options),
        "seed": ("*i64", "dropout" in options),
    }
    types |= {name: type for name, (type, present) in optional.items() if present}
    constants |= {name: None for name, (_, present) in optional.items() if not present}
    types["grad_scores_strides"] = ()
    if optional["grad_scores"][1]:
        types["grad_scores_strides"] = ("i64", "i32", "i32", "constexpr")
    types["grad_rows_strides"] = ("i32", "i32", "constexpr")
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = types.get(name, "constexpr")
        if name in constants or name not in types:
            constexprs[(index,)] = constants.get(name)
        elif name.endswith("_strides"):
            for axis, type in enumerate(types[name]):
                if type == "constexpr":
                    constexprs[(index, axis)] = 1
                else:
                    attributes[(index, axis)] = [["tt.divisibility", 16]]
        elif types[name].startswith("*") or name == "scores_stride":
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def embedding_source(task: Task) -> ASTSource:
    """A model of height 768 with positions, token types, LayerNorm and biases."""
    kernel, width = EMBEDDING_KERNELS[task.kernel], task.head_dim
    packed, dropout = "packed" in task.options, "dropout" in task.options
    element = "*" + DTYPES[task.dtype]
    projects = not task.kernel.endswith("_rows")
    height = 768 if projects and task.kernel.startswith("embedding_fwd") else width
    constants = {
        **embedding_flags(task),
        "STRIDES": (width, width, width),
        "PROJECTION_STRIDE": width,
        "WIDTH": width,
        "HEIGHT": height,
        "HAS_DROPOUT": dropout,
    }
    names = ("out", "grad", "dx", "norm_weight", "norm_bias")
    types: dict[str, Any] = dict.fromkeys(names, element)
    types |= dict.fromkeys(("mean", "rstd", "parts"), "*fp32")
    types |= dict.fromkeys(("part_blocks", "tokens", "N", "num_sequences", "search", "threshold"), "i32")
    types |= {"eps": "fp32", "kept_scale": "fp32", "table_rows": ("i32",) * 3, "tables": (element,) * 3}
    types |= {"ids": ("*i64", None, "*i64"), "id_strides": ("i32", 1, 0, 0, "i32", 1)}
    types |= dict.fromkeys(("projection", "projection_bias", "y"), element if projects else None)
    types |= {"cu_seqlens": "*i32" if packed else None, "seed": "*i64" if dropout else None}
    signature: dict[str, Any] = {}
    constexprs, attributes = {}, {}

    def specialize(place: tuple[int, ...], type: Any) -> Any:
        if isinstance(type, tuple):
            return tuple(specialize((*place, i), part) for i, part in enumerate(type))
        if not isinstance(type, str):
            constexprs[place] = type
            return "constexpr"
        if type.startswith("*"):
            attributes[place] = [["tt.divisibility", 16]]
        return type

    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(index,)] = "constexpr", constants[name]
        else:
            signature[name] = specialize((index,), types[name])
    return ASTSource(kernel, signature, constexprs, attributes)


def row_source(task: Task) -> ASTSource:
    kernel, config = ROW_KERNELS[task.kernel], task_blocks(task)
    constants = {"WIDTH": task.head_dim, "BLOCK": config.block_n, "ROWS": config.block_m, "COSINE": True}
    element = "*" + DTYPES[task.dtype]
    types: dict[str, str | tuple[str, ...]] = dict.fromkeys(("x_s", "x_t", "grad"), element)
    types |= dict.fromkeys(("rows", "stats", "grad_rows"), "*fp32")
    types |= {"mask": "*i1", "count": "i32", "N": "i32", "option": "fp32"}
    types |= {"s_strides": ("i32",) * 2, "t_strides": ("i32",) * 2, "grad_strides": ("i32",) * 3}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constexprs = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name not in types}
    pointers = [i for i, name in enumerate(kernel.arg_names) if str(types.get(name)).startswith("*")]
    return ASTSource(kernel, signature, constexprs, {(i,): [["tt.divisibility", 16]] for i in pointers})


def pair_types(task: Task, element: str) -> dict[str, str | tuple[str, ...]]:
    """Types of what the kernels of two models take; what a variant leaves out is a constexpr None."""
    models = ("q_s", "k_s", "q_t", "k_t", "x_s", "x_t")
    types: dict[str, str | tuple[str, ...]] = dict.fromkeys((*models, "dq_s", "dk_s", "dx_s"), element)
    types |= dict.fromkeys((f"{model}_strides" for model in models), ("i32",) * 3)
    types |= dict.fromkeys(("grad_rows", "grad", "rows", "lse_s", "lse_t", "parts", "grams"), "*fp32")
    types |= dict.fromkeys(("slope_s", "slope_t", "gain", "weight_s", "weight_t", "weight_k"), "fp32")
    if task.kernel == "pair_fwd_kl_given":
        types |= dict.fromkeys(("given_s", "given_t"), "*fp32")
    if task.dtype == torch.float32:
        types |= dict.fromkeys(("near", "far"), "*fp32")
    if task.kernel == "pair_fwd_mse":
        del types["lse_s"], types["lse_t"]
    return types


def compile_task(task: Task) -> Result:
    start = time.perf_counter()
    config = task_blocks(task)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if task.kernel.startswith("embedding_fwd"):
        options |= factorized_embedding.STOPS
    compiled = triton.compile(source(task), target=GPUTarget("cuda", task.arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = cuobjdump("-res-usage", file.name)
        sass = cuobjdump("-sass", file.name)
    tensor_core = bool(re.search(TENSOR_CORE[task.arch], sass))
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    seconds = time.perf_counter() - start
    return Result(
        task, registers, stack, loop_spills(sass, task), compiled.metadata.shared, tensor_core, seconds
    )


def loop_spills(sass: str, task: Task) -> int:
    """Loads from and stores to the stack between a loop's end and its start, in loops with products.

    In kernels without products: in any loop. A loop ends in a conditional branch backwards; the unconditional
    ones return from a barrier's waiting.
    """
    code = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    spills = set()
    for end, line in code:
        branch = re.search(r"(?:@.*\bBRA\b|\bBRA\.U !?UP).*?0x([0-9a-f]+)", line)
        start = int(branch[1], 16) if branch else end
        body = [(at, line) for at, line in code if start <= at <= end]
        counts = not multiplies(task) or any(re.search(TENSOR_CORE[task.arch], line) for _, line in body)
        if start < end and counts:
            spills |= {at for at, line in body if re.search(r"\b(LDL|STL)\b", line)}
    return len(spills)


def cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=ARCHS)
    parser.add_argument("--kernel", choices=[*KERNELS, *EMBEDDING_KERNELS, *ROW_KERNELS])
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--all", action="store_true", help="every dtype, head dim and option on every chip")
    parser.add_argument("--jobs", type=int, default=2)
    wanted = parser.parse_args()
    chosen = [
        task
        for task in tasks(wanted.all)
        if wanted.arch in (None, task.arch)
        and wanted.kernel in (None, task.kernel)
        and wanted.head_dim in (None, task.head_dim)
    ]
    print(f"{'kernel':26} {'arch':5} {'dtype':5} {'D':>3} {'options':14} {'blocks':>12} w s "
          f"{'regs':>4} {'stack':>5} {'loop':>4} {'shared':>7} {'s':>5}")  # fmt: skip
    failed, start = 0, time.perf_counter()
    with ProcessPoolExecutor(wanted.jobs) as pool:
        for done, result in enumerate(pool.map(compile_task, chosen), 1):
            task, found = result.task, result.violations()
            config = task_blocks(task)
            failed += bool(found)
            print(
                f"{task.kernel:26} sm_{task.arch:<3}{DTYPES[task.dtype]:>5} {task.head_dim:3} "
                f"{task.options:14} "
                f"{config.block_m:4} x {config.block_n:<4} {config.num_warps} {config.num_stages} "
                f"{result.registers:4} {result.stack:5} {result.spills:4} "
                f"{result.shared:7} {result.seconds:5.1f} {'; '.join(found)}",
                flush=True,
            )
            print(f"\r{done}/{len(chosen)}", end="\r", file=sys.stderr)
    seconds = time.perf_counter() - start
    print(f"triton {triton.__version__}: {len(chosen)} compiled in {seconds:.0f} s, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
