"""Builds, installs and imports the package the ways its users do. Nothing is downloaded, and the tree that
these tests run from is never built in: they work on a copy of its sources."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    *("bertops", "kernels", "csrc", "bench", "tests"),
    *("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", ".clang-format"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
)
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]

# Imports every module of the package that is there, and runs one op.
USE = """
import importlib, importlib.metadata, pkgutil, torch
import bertops
from bertops import _C, _backend, _host, kernels
names = [name for _, name, _ in pkgutil.iter_modules(kernels.__path__)]
assert "attention" in names, names
if _backend.HAS_TRITON:
    for name in names:
        importlib.import_module(f"bertops.kernels.{name}")
q = torch.randn(1, 2, 9, 16)
torch.testing.assert_close(bertops.attention(q, q, q), bertops.attention(q, q, q, impl="reference"))
print(importlib.metadata.version("bertops"), bertops.__file__)
"""


def run(*command: object, cwd: Path, fails: bool = False, **environment: object) -> str:
    """stdout and stderr of a command that succeeds, or with ``fails`` of one that does not."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | {"BERTOPS_CUDA": "0"} | {k: str(v) for k, v in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (result.returncode != 0) == fails, result.stdout
    return result.stdout


def pip(python: Path, *arguments: object, cwd: Path, **options: object) -> str:
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    verb, *rest = arguments
    return run(sys.executable, "-m", "pip", "--python", python, verb, *offline, *rest, cwd=cwd, **options)


def make_environment(path: Path) -> Path:
    """The Python of an environment that sees every package of this one except an editable bertops."""
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path.parent)
    (site_packages,) = path.glob("lib/python*/site-packages")
    outer = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (site_packages / "outer.pth").write_text("\n".join(outer))
    return path / "bin" / "python"


def hiding(modules: str, path: Path) -> Path:
    """A PYTHONPATH entry under which these modules look as if they were not installed."""
    path.mkdir()
    hidden = "".join(f"sys.modules[{name!r}] = None\n" for name in modules.split())
    (path / "sitecustomize.py").write_text(f"import sys\n{hidden}")
    return path


def files_below(folder: Path, *suffixes: str) -> set[str]:
    """Paths below ``folder``, through the link bertops/kernels too."""
    found = [Path(base, name) for base, _, names in os.walk(folder, followlinks=True) for name in names]
    return {path.relative_to(folder).as_posix() for path in found if path.suffix in suffixes}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "out")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    """The Python of all builds in ``checkout``: its paths being the same, only the first of them compiles."""
    return make_environment(tmp_path_factory.mktemp("builder") / "environment")


@pytest.fixture(scope="module")
def wheel(builder, checkout, tmp_path_factory):
    """Built as ``pip install .`` builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip(builder, "wheel", "--wheel-dir", folder, checkout, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    """Made without PyTorch: an sdist compiles nothing."""
    folder = tmp_path_factory.mktemp("sdist")
    hidden = hiding("torch", folder / "hidden")
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=checkout, PYTHONPATH=hidden)
    return folder / f"bertops-{VERSION}.tar.gz"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel in an environment of its own: (Python, folder of the installed package)."""
    folder = tmp_path_factory.mktemp("installed")
    python = make_environment(folder / "environment")
    pip(python, "install", wheel, cwd=folder)
    (package,) = folder.glob("environment/lib/python*/site-packages/bertops")
    return python, package


def test_wheel_works_where_the_source_is_not(installed, tmp_path):
    python, package = installed
    assert run(python, "-c", USE, cwd=tmp_path).split() == [VERSION, str(package / "__init__.py")]


def test_wheel_holds_the_package_and_nothing_else(wheel, checkout):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        kernels = [name for name in names if name.startswith("bertops/kernels/")]
        for name in kernels:
            assert archive.read(name) == (checkout / name).read_bytes()
    assert {name.split("/")[0] for name in names} == {"bertops", f"bertops-{VERSION}.dist-info"}
    package = {name.removeprefix("bertops/") for name in names if name.startswith("bertops/")}
    modules = {name for name in package if name.endswith(".so")}
    assert package - modules == files_below(checkout / "bertops", ".py", ".pyi", ".typed")
    assert len(kernels) == len(list((checkout / "kernels").glob("*.py"))) > 0
    assert len(modules) == 2
    assert "_C.abi3.so" in modules
    assert any(re.fullmatch(r"_host\..*\.so", name) for name in modules)


def test_ops_use_the_stable_abi_only(installed, tmp_path):
    _, package = installed
    undefined = run("nm", "-D", "--undefined-only", package / "_C.abi3.so", cwd=tmp_path)
    assert "torch_" in undefined  # the C shims that the stable ABI consists of
    assert re.findall(r"\b_ZNK?(?:2at|3c10|5torch)\S*", undefined) == []


def test_sdist_holds_the_tree_as_real_files(sdist, checkout):
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
        assert all(member.isreg() for member in members)
        held = {member.name.split("/", 1)[1]: archive.extractfile(member).read() for member in members}
    expected = files_below(checkout, ".py", ".sh", ".cpp", ".cu", ".cuh", ".h", ".toml", ".md")
    expected = {name for name in expected if not name.startswith("build/")}
    assert {"bertops/kernels/attention.py", "kernels/attention.py", "csrc/registration.cpp"} <= expected
    assert expected - set(held) == set()
    assert [name for name in expected if (checkout / name).read_bytes() != held[name]] == []


def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"bertops-{VERSION}"
    for kernel in source.glob("csrc/cpu/*.cpp"):  # equal to the checkout's, and slow to compile once more
        kernel.unlink()
    pip(Path(sys.executable), "wheel", "--wheel-dir", tmp_path, source, cwd=tmp_path)
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(tmp_path / wheel.name) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())


@pytest.mark.parametrize("mode", ["default", "strict", "compat"])
def test_editable_install_works_from_anywhere(mode, builder, checkout, tmp_path):
    settings = () if mode == "default" else ("--config-settings", f"editable_mode={mode}")
    pip(builder, "install", *settings, "--editable", checkout, cwd=tmp_path)
    for folder in (tmp_path, checkout):
        version, path = run(builder, "-c", USE, cwd=folder).split()
        assert version == VERSION
        assert Path(path).is_relative_to(checkout)


def test_imports_without_triton(installed, tmp_path):
    script = """
import torch, bertops
q = torch.randn(1, 2, 9, 16)
bertops.attention(q, q, q)
bertops.attention(q, q, q, impl="triton")
"""
    hidden = hiding("triton", tmp_path / "hidden")
    output = run(installed[0], "-c", script, cwd=tmp_path, PYTHONPATH=hidden, fails=True)
    assert "RuntimeError: attention: impl='triton' is not available here: Triton is not installed" in output


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "cannot import name '_C'"), (b"\x7fELF", "_C.abi3.so")]
)
def test_without_its_extension_it_imports_and_a_call_says_why(content, reason, installed, tmp_path):
    shutil.copytree(installed[1], tmp_path / "bertops")
    (tmp_path / "bertops/_C.abi3.so").unlink()
    if content is not None:
        (tmp_path / "bertops/_C.abi3.so").write_bytes(content)
    script = """
import torch, bertops
print(bertops.__file__)
q = torch.randn(1, 2, 9, 16)
bertops.attention(q, q, q, impl="reference")
bertops.attention(q, q, q)
"""
    output = run(installed[0], "-c", script, cwd=tmp_path, fails=True)
    assert output.startswith(str(tmp_path))
    last = output.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: attention has no kernel for device 'cpu'")
    assert reason in last
    assert "pip install --no-build-isolation -e ." in last


def test_metadata_does_not_need_torch(checkout, tmp_path):
    script = "from setuptools.build_meta import *; prepare_metadata_for_build_wheel({!r})"
    hidden = hiding("torch numpy pybind11", tmp_path / "hidden")
    run(sys.executable, "-c", script.format(str(tmp_path)), cwd=checkout, PYTHONPATH=hidden)
    metadata = (tmp_path / f"bertops-{VERSION}.dist-info/METADATA").read_text()
    assert "Requires-Dist: torch>=2.10\n" in metadata
    assert re.search(r"Requires-Dist: triton; sys_platform == .linux.\n", metadata)


@pytest.mark.parametrize("module", ["torch", "pybind11"])
def test_building_without_what_it_needs_names_it(module, checkout, tmp_path):
    hidden = hiding(module, tmp_path / "hidden")
    output = pip(
        Path(sys.executable), "wheel", "-w", tmp_path, checkout, cwd=tmp_path, PYTHONPATH=hidden, fails=True
    )
    assert f"already installed, and {module} could not be found" in output
    assert "pip install --no-build-isolation ." in output


class FakeTorch:
    """setup.py before a torch and an nvcc of any kind; nothing is compiled."""

    def __init__(self, folder: Path, checkout: Path) -> None:
        self.folder, self.checkout = folder, checkout

    def torch(self, version: str, cuda: str | None) -> None:
        utils = self.folder / "torch/utils"
        utils.mkdir(parents=True)
        (utils.parent / "__init__.py").write_text(
            f"__version__ = {version!r}\nclass version: cuda = {cuda!r}\n"
        )
        (utils / "__init__.py").write_text("")
        (utils / "cpp_extension.py").write_text(
            "import os\n"
            "from setuptools import Extension\n"
            "from setuptools.command.build_ext import build_ext as BuildExtension\n"
            "def CppExtension(name, sources, **options): return Extension(name, sources)\n"
            "def CUDAExtension(name, sources, **options):\n"
            "    print('toolkit:', os.environ['CUDA_HOME'], os.environ['TORCH_CUDA_ARCH_LIST'])\n"
            "    return Extension(name, sources)\n"
        )

    def nvcc(self, release: str, toolkit: str) -> Path:
        script = self.folder / "bin/nvcc"
        script.parent.mkdir(exist_ok=True)
        script.write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n"
            f"echo '#$ TOP={toolkit}' >&2\n"
        )
        script.chmod(0o755)
        return script

    def setup(self, fails: bool = False, **environment: object) -> str:
        environment = {"PYTHONPATH": self.folder, "TORCH_CUDA_ARCH_LIST": "", "CUDA_PATH": ""} | environment
        return run(sys.executable, "setup.py", "--name", cwd=self.checkout, fails=fails, **environment)


@pytest.fixture
def fake(tmp_path, checkout):
    return FakeTorch(tmp_path, checkout)


def test_cuda_on_request_without_a_cuda_torch(fake):
    fake.torch("2.13.0+cpu", None)
    output = fake.setup(fails=True, BERTOPS_CUDA="1")
    assert "BERTOPS_CUDA=1, but torch 2.13.0+cpu has no CUDA: install a CUDA build of torch" in output
    assert "building without CUDA: torch 2.13.0+cpu has no CUDA" in fake.setup(BERTOPS_CUDA="auto")


def test_cuda_on_request_without_nvcc(fake):
    fake.torch("2.11.0+cu130", "13.0")
    empty = fake.folder / "empty"
    output = fake.setup(fails=True, BERTOPS_CUDA="1", CUDA_HOME=empty)
    assert "BERTOPS_CUDA=1, but nvcc was not found: install the CUDA 13.0 toolkit" in output
    assert "building without CUDA: nvcc was not found" in fake.setup(BERTOPS_CUDA="auto", CUDA_HOME=empty)


def test_cuda_of_another_major_version(fake):
    fake.torch("2.11.0+cu130", "13.0")
    fake.nvcc("12.8", toolkit="")
    output = fake.setup(fails=True, BERTOPS_CUDA="1", CUDA_HOME=fake.folder)
    assert "is CUDA 12.8 and torch 2.11.0+cu130 is CUDA 13.0: install the CUDA 13.0 toolkit" in output
    output = fake.setup(BERTOPS_CUDA="auto", CUDA_HOME=fake.folder)
    assert "building without CUDA" in output
    assert "is CUDA 12.8" in output


@pytest.mark.parametrize(
    ("release", "cuda", "archs"), [("13.0", "13.0", "8.0;9.0;10.0+PTX"), ("12.6", "12.6", "8.0;9.0+PTX")]
)
def test_cuda_where_torch_and_nvcc_agree(release, cuda, archs, fake):
    """The nvcc on PATH may be a script that calls another: the toolkit is where that one says."""
    fake.torch("2.11.0", cuda)
    nvcc = fake.nvcc(release, toolkit="/opt/toolkit")
    output = fake.setup(BERTOPS_CUDA="auto", CUDA_HOME="", PATH=f"{nvcc.parent}:{os.environ['PATH']}")
    assert f"building with CUDA: {nvcc}" in output
    assert f"toolkit: /opt/toolkit {archs}" in output
    assert "toolkit:" not in fake.setup(BERTOPS_CUDA="0", CUDA_HOME=fake.folder)


def test_cuda_choice_is_one_of_three(fake):
    fake.torch("2.11.0", "13.0")
    assert "BERTOPS_CUDA must be auto, 0 or 1, got 'yes'" in fake.setup(fails=True, BERTOPS_CUDA="yes")


def test_an_old_torch_is_refused(fake):
    fake.torch("2.9.1", None)
    assert "needs torch >= 2.10 for its stable ABI, found torch 2.9.1" in fake.setup(fails=True)
