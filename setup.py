"""Builds the two compiled modules; everything else about the package is in pyproject.toml.

``bertops._C``     CPU and CUDA ops on the LibTorch stable ABI: one binary for every torch >= 2.10.
``bertops._host``  pybind11 + numpy helpers for token streams; does not link torch.

BERTOPS_CUDA=auto|1|0   auto (default): build csrc/cuda where torch has CUDA and nvcc is there;
                        1: an error where either is missing; 0: never.
MAX_JOBS, TORCH_CUDA_ARCH_LIST   as in PyTorch.
"""

import os
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH_TARGET_VERSION = "0x020a000000000000"  # the stable ABI of torch 2.10
CUDA_ARCHS = "8.0;9.0;10.0+PTX"
GIB_PER_JOB = 3

MISSING_TORCH = """
bertops builds its kernels against the PyTorch that is already installed, and none was found.
Install one first, then build without isolation:

    pip install torch setuptools wheel ninja pybind11
    pip install --no-build-isolation .
"""


def cuda_state():
    """(build csrc/cuda?, why not)."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} has no CUDA: install a CUDA build of torch"
    nvcc = CUDA_HOME and os.path.join(CUDA_HOME, "bin", "nvcc")
    if not nvcc or not os.path.exists(nvcc):
        return False, (
            f"nvcc was not found: install the CUDA {torch.version.cuda} toolkit "
            "and put nvcc on PATH or set CUDA_HOME"
        )
    return True, f"nvcc {nvcc}"


def use_cuda():
    choice = os.environ.get("BERTOPS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"BERTOPS_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "0":
        print("bertops: building without CUDA: BERTOPS_CUDA=0")
        return False
    available, reason = cuda_state()
    if choice == "1" and not available:
        raise SystemExit(f"bertops: BERTOPS_CUDA=1, but {reason}")
    print(f"bertops: building {'with' if available else 'without'} CUDA: {reason}")
    return available


def default_jobs():
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(gib // GIB_PER_JOB)))


def torch_extensions():
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = sorted(["csrc/registration.cpp", *glob("csrc/cpu/*.cpp")])
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    options = {"include_dirs": [os.path.abspath("csrc")], "py_limited_api": True}
    if use_cuda():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        ops = CUDAExtension(
            "bertops._C",
            sources + sorted(glob("csrc/cuda/*.cu")),
            define_macros=[*macros, ("BERTOPS_WITH_CUDA", None), ("USE_CUDA", None)],
            extra_compile_args={"cxx": flags, "nvcc": ["-O3"]},
            **options,
        )
    else:
        ops = CppExtension("bertops._C", sources, define_macros=macros, extra_compile_args=flags, **options)
    return [ops, host_extension()]


def host_extension():
    import pybind11

    return Extension(
        "bertops._host",
        sorted(glob("csrc/host/*.cpp")),
        include_dirs=[pybind11.get_include(), os.path.abspath("csrc")],
        extra_compile_args=["-O3", "-fvisibility=hidden"],
        language="c++",
    )


class MissingTorch(build_ext):
    def run(self):
        raise SystemExit(MISSING_TORCH)


def build_settings():
    """torch is needed to build, not to make an sdist or read the metadata."""
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        placeholder = Extension("bertops._C", ["csrc/registration.cpp"])
        return {"ext_modules": [placeholder], "cmdclass": {"build_ext": MissingTorch}}
    os.environ.setdefault("MAX_JOBS", str(default_jobs()))
    return {"ext_modules": torch_extensions(), "cmdclass": {"build_ext": BuildExtension}}


setup(**build_settings())
