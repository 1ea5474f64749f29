"""FSDP: two processes that share out what is trained do what one process does, and go on after a kill."""

import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")

import sharded_run
from bertops import _backend
from bertops.distill.recipes.bilstm import Logits
from bertops.models import BiLSTMClassifier, BiLSTMConfig
from bertops.training import curves
from bertops.training.checkpoint import checkpoint_steps, read_checkpoint
from bertops.training.sharding import _units, shard
from sharded_run import BF16, CLIPPED, GRADIENTS, LONG, OBJECTIVES, albert, bert, masked_words, run
from training_run import assert_same, metrics

pytestmark = pytest.mark.skipif(_backend.extension_error is not None, reason="bertops._C is not built")

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(curves, "draw", lambda *arguments: b"")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Path:
    """The runs of sharded_run.py, each shared by two processes."""
    out = tmp_path_factory.mktemp("sharded")
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, sharded_run.__file__, str(out), *ports]
    statuses = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    assert json.loads(statuses) == [[-signal.SIGKILL] * 2, [0, 0]]
    return out


def end(out: Path) -> dict:
    """The last checkpoint, without what a clock says."""
    parts = read_checkpoint(out / "checkpoints" / f"step-{checkpoint_steps(out / 'checkpoints')[-1]}")
    for clock in ("seconds", "total_seconds"):
        parts["loop"]["window"].pop(clock)
    return parts


def assert_close(found: Path, expected: Path) -> None:
    """Losses, held-out losses, parameters, and the optimizer's state: what it saw of the gradients."""
    for one, other in zip(metrics(found), metrics(expected), strict=True):
        assert one.pop("evaluation", {}) == pytest.approx(other.pop("evaluation", {}), rel=TOLERANCE)
        assert one == pytest.approx(other, rel=TOLERANCE)
    ours, theirs = end(found), end(expected)
    assert ours["model"].keys() == theirs["model"].keys()
    for name, parameter in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], parameter, atol=TOLERANCE, rtol=0)
    states = ours["optimizer"]["state"], theirs["optimizer"]["state"]
    assert states[0].keys() == states[1].keys()
    for number, state in states[1].items():
        gradient = state["exp_avg"]
        error = (states[0][number]["exp_avg"] - gradient).norm()
        assert gradient.norm() > 0 and error <= TOLERANCE * gradient.norm(), number


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_are_one(processes, tmp_path, name):
    run(tmp_path, OBJECTIVES[name])
    assert_close(processes / name, tmp_path)
    ours, theirs = (torch.load(folder / "model" / "objective.pt") for folder in (processes / name, tmp_path))
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert type(ours[name]) is torch.Tensor
        torch.testing.assert_close(ours[name], parameter, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["bf16", "bf16 sharded"])
def test_two_processes_are_one_in_bf16_with_accumulation(processes, tmp_path, name):
    run(tmp_path, masked_words, BF16)
    assert_close(processes / name, tmp_path)


def test_gradients_are_clipped_by_the_norm_of_all_shares(processes, tmp_path):
    run(tmp_path, masked_words, CLIPPED)
    assert_close(processes / "clipped", tmp_path)
    moments = [state["exp_avg"] for state in end(processes / "clipped")["optimizer"]["state"].values()]
    norm = torch.cat([moment.flatten() for moment in moments]).norm()
    assert norm == pytest.approx(CLIPPED.max_grad_norm, rel=1e-3)


def test_a_killed_run_goes_on_to_the_same_result(processes):
    assert_same(end(processes / "killed"), end(processes / "straight"))
    assert metrics(processes / "killed") == metrics(processes / "straight")
    for name in ("killed", "straight"):
        assert checkpoint_steps(processes / name / "checkpoints") == [4, LONG.steps]
