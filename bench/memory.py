"""Peak memory that a call takes beyond what was there before it."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch

METHODS = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "VmHWM of the process, freed pages returned to the system before",
}


def peak_extra_bytes(device: torch.device, call: Callable[[], object]) -> int | None:
    """Bytes at the peak of ``call`` minus bytes before it; None where the system cannot tell.

    On a CPU this is resident memory, so scratch outside PyTorch's allocator counts too; Linux counts pages in
    batches, which leaves an error of some 0.3 MB. ``call`` must have run before: what a first run keeps for
    good (thread pools, code) is not its working memory.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # 5: VmHWM starts again from VmRSS
    before = resident("VmRSS")
    result = call()
    del result
    return max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    """A field of /proc/self/status that is given in kB, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
