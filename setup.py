"""Builds the two compiled modules; everything else about the package is in pyproject.toml.

``bertops._C``     CPU and CUDA ops on the LibTorch stable ABI: one binary for every torch >= 2.10.
``bertops._host``  pybind11 + numpy helpers for token streams; does not link torch.

BERTOPS_CUDA=auto|1|0   auto (default): build csrc/cuda where torch has CUDA and a fitting nvcc is there;
                        1: an error where either is missing; 0: never.
MAX_JOBS, TORCH_CUDA_ARCH_LIST, CUDA_HOME   as in PyTorch.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH_MINIMUM = (2, 10)
TORCH_TARGET_VERSION = "0x020a000000000000"  # the stable ABI of torch 2.10
GIB_PER_JOB = 3

CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))

MISSING = """
bertops builds its kernels against the PyTorch that is already installed, and {modules} could not be found.
Install what is missing, then build without isolation, which would hide it:

    pip install "torch>=2.10" "setuptools>=77" wheel ninja "pybind11>=2.13"
    pip install --no-build-isolation .
"""


def find_nvcc():
    """(nvcc, release, root of its toolkit), or None. The compiler on PATH may be a wrapper: ask it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.path.exists(nvcc):
        return None

    def answer(pattern, *options):
        result = subprocess.run([nvcc, *options], capture_output=True, text=True)
        found = re.search(pattern, result.stdout + result.stderr)
        if result.returncode or not found:
            raise SystemExit(
                f"bertops: '{nvcc} {' '.join(options)}' failed:\n{result.stderr or result.stdout}"
            )
        return found.group(1)

    release = tuple(map(int, answer(r"release (\d+\.\d+)", "--version").split(".")))
    root = home or os.path.realpath(answer(r"TOP=(\S+)", "--dryrun", "-c", "-x", "cu", os.devnull))
    return nvcc, release, root


def use_cuda():
    """Whether to build csrc/cuda; points PyTorch's build at the toolkit where it does."""
    import torch

    choice = os.environ.get("BERTOPS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"bertops: BERTOPS_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "0":
        print("bertops: building without CUDA: BERTOPS_CUDA=0")
        return False
    found = None
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} has no CUDA: install a CUDA build of torch (https://pytorch.org)"
    elif (found := find_nvcc()) is None:
        reason = (
            f"nvcc was not found: install the CUDA {torch.version.cuda} toolkit "
            "and put nvcc on PATH or set CUDA_HOME"
        )
    elif found[1][0] != int(torch.version.cuda.split(".")[0]):
        nvcc, release, _ = found
        found = None
        reason = (
            f"{nvcc} is CUDA {release[0]}.{release[1]} and torch {torch.__version__} is CUDA "
            f"{torch.version.cuda}: install the CUDA {torch.version.cuda} toolkit and set CUDA_HOME to it"
        )
    if found is None:
        if choice == "1":
            raise SystemExit(f"bertops: BERTOPS_CUDA=1, but {reason}")
        print(f"bertops: building without CUDA: {reason}")
        return False
    nvcc, release, root = found
    os.environ["CUDA_HOME"] = root
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not archs:
        archs = "8.0;9.0;10.0+PTX" if release >= (12, 8) else "8.0;9.0+PTX"
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    print(f"bertops: building with CUDA: {nvcc}, {archs}")
    return True


def default_jobs():
    """Compilers at once: one a core, and never more than memory (of the container) holds."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, available // (GIB_PER_JOB * 2**30)))


def ops_extension():
    cuda = use_cuda()
    from torch.utils.cpp_extension import CppExtension, CUDAExtension  # reads CUDA_HOME when imported

    sources = sorted(["csrc/registration.cpp", *glob("csrc/cpu/*.cpp")])
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    options = {"include_dirs": [os.path.abspath("csrc")], "depends": HEADERS, "py_limited_api": True}
    if not cuda:
        return CppExtension(
            "bertops._C", sources, define_macros=macros, extra_compile_args=CXX_FLAGS, **options
        )
    return CUDAExtension(
        "bertops._C",
        sources + sorted(glob("csrc/cuda/*.cu")),
        define_macros=[*macros, ("BERTOPS_WITH_CUDA", None), ("USE_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3"]},
        **options,
    )


def host_extension():
    import pybind11

    return Extension(
        "bertops._host",
        sorted(glob("csrc/host/*.cpp")),
        include_dirs=[pybind11.get_include(), os.path.abspath("csrc")],
        depends=HEADERS,
        extra_compile_args=["-O3", "-g0", "-fvisibility=hidden"],
        language="c++",
    )


def build_command():
    from torch.utils.cpp_extension import BuildExtension

    class BuildKernels(BuildExtension):
        """Keeps the objects of an editable install too, so that building again compiles what changed."""

        def finalize_options(self):
            super().finalize_options()
            if self.editable_mode:
                self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

    return BuildKernels


def settings():
    """PyTorch is needed to build, not to make an sdist or to read the metadata."""
    missing = [name for name in ("torch", "pybind11") if importlib.util.find_spec(name) is None]
    if missing:

        class MissingModules(build_ext):
            def run(self):
                raise SystemExit(MISSING.format(modules=" and ".join(missing)))

        placeholder = Extension("bertops._C", ["csrc/registration.cpp"])
        return {"ext_modules": [placeholder], "cmdclass": {"build_ext": MissingModules}}

    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH_MINIMUM:
        raise SystemExit(f"bertops: needs torch >= 2.10 for its stable ABI, found torch {torch.__version__}")
    os.environ.setdefault("MAX_JOBS", str(default_jobs()))
    return {
        "ext_modules": [ops_extension(), host_extension()],
        "cmdclass": {"build_ext": build_command()},
    }


setup(**settings())
