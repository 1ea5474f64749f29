"""Peak memory that a call takes beyond what was there before it."""

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

METHODS = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "VmHWM of the process, freed pages returned to the system before, large blocks at once",
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGE = 2**18  # bytes
IS_MMAPPED = 2  # in the word before a block


def peak_extra_bytes(device: torch.device, call: Callable[[], object]) -> int | None:
    """Bytes at the peak of ``call`` minus bytes before it; None where the system cannot tell.

    On a CPU this is resident memory, so scratch outside PyTorch's allocator counts too; Linux counts pages in
    batches, which leaves an error of some 0.3 MB. Blocks that the call frees do not count on: how long the C
    library keeps them for later is not the call's doing. ``call`` must have run before: what a first run
    keeps for good (thread pools, code) is not its working memory.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    if platform.libc_ver()[0] != "glibc":
        return None
    with large_blocks_returned():
        Path("/proc/self/clear_refs").write_text("5")  # 5: VmHWM starts again from VmRSS
        before = resident("VmRSS")
        result = call()
        del result
        return max(0, resident("VmHWM") - before)


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Whatever is freed goes back to the system, now and inside: glibc would keep most of it for later.

    Large blocks are mapped one by one; what its heap has free for such blocks is taken, untouched, meanwhile.
    """
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(M_MMAP_THRESHOLD, LARGE)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    taken, size = [], 2**32
    while size >= LARGE:
        block = libc.malloc(size)
        if not block or ctypes.c_size_t.from_address(block - 8).value & IS_MMAPPED:
            libc.free(block)
            size //= 2
        else:
            taken.append(block)
    try:
        yield
    finally:
        for block in taken:
            libc.free(block)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # where glibc's own adjustment ends
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)


def resident(field: str) -> int:
    """A field of /proc/self/status that is given in kB, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
