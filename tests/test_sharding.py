"""FSDP: two processes that share out what is trained do what one process does, and go on after a kill."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")

import sharded_run
from bertops import _backend
from bertops.training import Objective, Run, curves
from bertops.training.checkpoint import checkpoint_steps, read_checkpoint
from bertops.training.run import check_accelerate, check_fsdp
from bertops.training.sharding import shard, units
from sharded_run import BF16, CLIPPED, GRADIENTS, LONG, OBJECTIVES, masked_words, run
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


def test_a_run_goes_on_without_fsdp(processes, tmp_path):
    """A signal stops both processes after the same step; the rest is done by replicas."""
    assert checkpoint_steps(processes / "changed" / "checkpoints") == [4, LONG.steps]
    run(tmp_path, masked_words, LONG)
    for one, other in zip(metrics(processes / "changed"), metrics(tmp_path), strict=True):
        assert one.pop("evaluation", {}) == pytest.approx(other.pop("evaluation", {}), rel=TOLERANCE)
        assert one == pytest.approx(other, rel=TOLERANCE)


def test_a_shared_parameter_is_one_tensor_in_a_checkpoint(processes):
    model = end(processes / "all shared")["model"]
    names = [f"model.encoder.layers.{i}.up.weight" for i in range(3)]
    assert len({model[name].data_ptr() for name in names}) == 1


def test_another_number_of_processes_is_refused(processes):
    with pytest.raises(ValueError, match="processes is 2 there, 1 here"):
        run(processes / "straight", masked_words, LONG)


def test_units():
    """Layers of the student that learn and share nothing."""
    found = {}
    for name, make in OBJECTIVES.items():
        objective = make()
        names = {module: path for path, module in objective.named_modules()}
        found[name] = [names[layer] for layer in units(objective)]
    student = [f"student.encoder.layers.{i}" for i in range(2)]
    assert found == {
        "relations": student,
        "intermediate": student,
        "transfer": student[:1],
        "masked words": ["model.encoder.layers.0", "model.encoder.layers.1"],
        "all shared": [],
        "attention shared": [],
    }


class Recurrent(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.reader = nn.LSTM(2, 3)


def test_recurrent_layers_are_refused():
    with pytest.raises(ValueError, match="FSDP does not go with LSTM at reader"):
        shard(Recurrent(), torch.device("cpu"))


@pytest.mark.parametrize("asked_by", ["bertops", "accelerate"])
def test_one_process_cannot_share(tmp_path, monkeypatch, asked_by):
    if asked_by == "accelerate":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="fsdp shards over processes, and there is one"):
        Run(tmp_path / "out", GRADIENTS, {}, cpu=True, fsdp=asked_by == "bertops")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP version 1, expected 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "CPU offload: there is neither"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "activation checkpointing or"),
    ],
)
def test_other_kinds_of_fsdp_are_refused(monkeypatch, settings, message):
    monkeypatch.setattr("bertops.training.run.is_initialized", lambda: True)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **settings}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_fsdp()


def test_layers_stay_gathered_where_accelerate_says_so(monkeypatch):
    monkeypatch.setattr("bertops.training.run.is_initialized", lambda: True)
    assert check_fsdp()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert check_fsdp()
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert not check_fsdp()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distributed_type": DistributedType.DEEPSPEED}, "several CPUs or GPUs, or FSDP, got DEEPSPEED"),
        ({"mixed_precision": "fp16"}, "mixed precision fp16, expected no: .* with bf16"),
        ({"gradient_accumulation_steps": 4}, "4 gradient accumulation steps, expected 1: .* accumulation"),
        ({}, "accelerate launch --cpu starts one process"),
    ],
)
def test_what_accelerate_is_set_to(monkeypatch, settings, message):
    plain = {
        "distributed_type": DistributedType.NO,
        "mixed_precision": "no",
        "gradient_accumulation_steps": 1,
        "num_processes": 1,
    }
    check_accelerate(SimpleNamespace(**plain))
    if not settings:  # what accelerate launch --cpu --num_processes 2 leaves behind
        monkeypatch.setenv("MASTER_PORT", "29500")
        monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=message):
        check_accelerate(SimpleNamespace(**(plain | settings)))
