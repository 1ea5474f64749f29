"""One command for a machine with an NVIDIA GPU and no network: build, tests, compute-sanitizer, bench.

Usage: python3 tests/gpu_check.py OUT

Runs in the source tree with the Python that runs it and what is installed there (torch with CUDA, Triton,
ninja, pybind11, pytest, hypothesis, the bench's needs): no environment, no pip. A failing step does not stop
the later ones; all of them end within ten minutes, the bench taking what is left of them. Writes to OUT:
tests.xml, the bench's files and summary.json.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL_S = 580

DESCRIBE_GPU = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
"""


def steps(out: Path) -> list[tuple[str, list[str], dict[str, str], int]]:
    """(name, command, environment, limit in seconds) in the order they run."""
    python = sys.executable
    workers = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    # what touches the GPU: the rest runs anywhere
    tests = [python, "-m", "pytest", "-k", "cuda and not packaging", f"--junitxml={out / 'tests.xml'}"]
    subset = [python, "tests/sanitizer_subset.py"]
    sanitizer = [shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"]
    # one cudaMalloc a tensor: what lies outside is an error
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    bench = [python, "-m", "bertops", "bench", "--quick", "--device", "cuda", "--out", str(out)]
    return [
        ("build", [python, "setup.py", "build_ext", "--inplace"], {"BERTOPS_CUDA": "1"}, 120),
        ("tests", [*tests, *workers], {}, 170),
        ("warm-up", subset, {}, 40),
        *(
            (tool, [*sanitizer, "--tool", tool, "--error-exitcode", "1", *subset], uncached, 45)
            for tool in ("memcheck", "racecheck", "initcheck")
        ),
        ("bench", bench, {}, TOTAL_S),
    ]


def run(command: list[str], environment: dict[str, str], limit: int) -> str:
    """'ok', or what went wrong. Past its limit a step is stopped with everything it started."""
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True
        )
    except FileNotFoundError:
        return f"{command[0]} was not found"
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "ok" if code == 0 else f"exit {code}"


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    gpu = subprocess.run([sys.executable, "-c", DESCRIBE_GPU], capture_output=True, text=True)
    if gpu.returncode:
        reason = gpu.stderr.strip().splitlines()[-1]
        raise SystemExit(f"gpu-check needs an NVIDIA GPU and a CUDA build of torch: {reason}")
    print(gpu.stdout.strip(), flush=True)
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)

    results = []
    end = time.monotonic() + TOTAL_S
    for name, command, environment, limit in steps(out):
        print(f"\n== {name}: {' '.join(command)}", flush=True)
        start = time.monotonic()
        result = run(command, environment, min(limit, round(end - start)))
        results.append({"step": name, "result": result, "seconds": round(time.monotonic() - start, 1)})

    summary = {"gpu": gpu.stdout.strip(), "steps": results}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("\n== summary:", gpu.stdout.strip())
    for row in results:
        print(f"{row['step']:>10} {row['seconds']:6.1f} s  {row['result']}")
    if any(row["result"] != "ok" for row in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
