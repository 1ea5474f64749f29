"""``python -m bertops``: what it says, and how it refuses."""

import subprocess
import sys

import pytest

from bertops import _backend, cli


def test_info_names_every_op_and_implementation(capsys):
    assert cli.main(["info"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert blocks[0].startswith("bertops") and "torch" in blocks[0] and "isa" in blocks[0]
    assert [block.splitlines()[0] for block in blocks[1:]] == list(_backend.IMPLEMENTATIONS)
    for block, implementations in zip(blocks[1:], _backend.IMPLEMENTATIONS.values(), strict=True):
        assert {line.split()[0] for line in block.splitlines()[1:]} == set(implementations)


def test_info_gives_the_reason_where_a_kernel_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(_backend, "extension_error", "bertops._C could not be loaded (test)")
    cli.main(["info"])
    out = capsys.readouterr().out
    assert out.count("cpu       on cpu   no: bertops._C could not be loaded (test)") == len(
        _backend.IMPLEMENTATIONS
    )
    assert "reference on cpu   yes" in out


def test_import_asks_no_device():
    code = "import torch, bertops.cli; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], [], ["bench", "--threads", "0"], ["bench", "--impl", "gpu"]]
)
def test_bad_arguments_exit_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m bertops" in capsys.readouterr().err


def test_bench_outside_a_clone_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "BENCH", tmp_path / "bench")
    assert cli.main(["bench", "--quick"]) == 2
    assert "not in the wheel" in capsys.readouterr().err


def test_bench_names_missing_packages(capsys, monkeypatch):
    monkeypatch.setattr(cli, "BENCH_NEEDS", {"no_such_module": "no-such-package"})
    assert cli.main(["bench"]) == 2
    assert "pip install no-such-package" in capsys.readouterr().err
