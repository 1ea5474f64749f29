"""``python -m bertops``: what runs here and why not, the bench, and the commands that train and evaluate."""

import argparse
import importlib.util
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

import bertops
from bertops import _backend
from bertops.distill.command import add_distill, add_eval, add_finetune
from bertops.pretraining.command import add_pretrain

BENCH = Path(__file__).resolve().parent.parent / "bench"
DEVICES_OF = {"cpu": ("cpu",), "cuda": ("cuda",)}  # Triton also runs on a CPU, in its interpreter
BENCH_NEEDS = {
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bertops", description=bertops.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser("info", help="versions, and which kernels run here or why not")
    info_parser.set_defaults(run=info)
    add_bench(commands)
    add_pretrain(commands)
    add_finetune(commands)
    add_distill(commands)
    add_eval(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


def add_bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench", help="every op beside its peers, on random and on real Q, K, V: table, plots, HTML, JSON"
    )
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--quick", action="store_true", help="a few shapes, four to five minutes on two cores")
    scope.add_argument(
        "--lengths",
        action="store_true",
        help="time and peak memory of the losses over N = 128 to 16384, some ten minutes on two cores",
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/out)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--impl", choices=_backend.CHOICES, default="auto", help="implementation of bertops")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--model",
        help="folder or hub id of a BERT checkpoint (default: the all-MiniLM-L6-v2 that is installed)",
    )
    parser.add_argument(
        "--text", help="folder of .txt files (default: docstrings of the Python standard library)"
    )
    parser.add_argument(
        "--only", metavar="EXPRESSION", help="as pytest's -k, such as 'with_scores and forward'"
    )
    parser.set_defaults(run=bench)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def info(options: argparse.Namespace) -> int:
    for name, value in {"bertops": bertops.__version__, **build(), **machine(None)}.items():
        print(f"{name:9} {value}")
    for op, implementations in _backend.IMPLEMENTATIONS.items():
        print(f"\n{op}")
        for implementation in implementations:
            for device in DEVICES_OF.get(implementation, ("cpu", "cuda")):
                reason = unavailable(op, implementation, device)
                print(f"  {implementation:9} on {device:4}  {'yes' if reason is None else 'no: ' + reason}")
    return 0


def unavailable(op: str, implementation: str, device: str) -> str | None:
    """As the op itself would say it, had it a tensor on ``device``."""
    if device == "cuda" and not torch.cuda.is_available():
        return f"GPU: {gpu_name()}"
    return _backend.unavailable(op, implementation, device)


def build() -> dict[str, str]:
    """What was built and installed."""
    cuda = "built" if _backend.extension_has_cuda else "not built into bertops._C"
    return {
        "_C": _backend.extension_path or f"not loaded: {_backend.extension_error}",
        "CUDA C++": cuda if _backend.extension_error is None else "not loaded",
        "triton": metadata.version("triton") if _backend.HAS_TRITON else "not installed",
    }


def machine(device: torch.device | None) -> dict[str, str]:
    """The hardware and PyTorch; asks the driver for a GPU unless ``device`` is the CPU."""
    described = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "isa": cpu_isa(),
    }
    if device is None or device.type == "cuda":
        described["gpu"] = gpu_name()
    return described


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_isa() -> str:
    """The instruction set that the C++ kernels chose."""
    if _backend.extension_error is not None:
        return "bertops._C is not loaded"
    from bertops import _C

    return _C.cpu_isa


def gpu_name() -> str:
    if torch.version.cuda is None:
        return f"none, torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "none that PyTorch can use"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def bench(options: argparse.Namespace) -> int:
    if not (BENCH / "conftest.py").exists():
        print(
            f"The benchmarks are not in the wheel, and {BENCH} does not exist: run this from a clone, "
            "installed with 'pip install --no-build-isolation -e .'",
            file=sys.stderr,
        )
        return 2
    missing = [package for module, package in BENCH_NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"The bench needs {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(BENCH.parent))
    from bench.command import run

    return run(options)
