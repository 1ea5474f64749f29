"""The training loop: it loses nothing, and what it computes is one big batch."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

import training_run
from bertops.training import AdamW, Plan, checkpoint, curves
from bertops.training.checkpoint import checkpoint_steps, read_checkpoint
from bertops.training.optimizer import linear
from bertops.training.run_folder import RunFolder
from training_run import DROPOUT, PLAIN, PLAN, Toy, assert_same, held_out, metrics, run


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch, request):
    """Drawing takes most of the time of so small a run."""
    if request.node.name != "test_final_files":
        monkeypatch.setattr(curves, "draw", lambda *arguments: b"")


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("straight")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    run(out, dropout=DROPOUT)
    return out


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Path:
    """Two runs in processes of their own: ``killed`` after its checkpoint, and ``two``, shared by two."""
    out = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, training_run.__file__, str(out), port]
    statuses = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    assert json.loads(statuses) == [-signal.SIGKILL, 0, 0]
    return out


def assert_same_run(out: Path, expected: Path) -> None:
    ends = []
    for folder in (out, expected):
        parts = read_checkpoint(folder / "checkpoints" / f"step-{PLAN.steps}")
        for clock in ("seconds", "total_seconds"):
            parts["loop"]["window"].pop(clock)
        ends.append(parts)
    assert_same(*ends)
    assert metrics(out) == metrics(expected)


def trained(out: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out / "checkpoints" / f"step-{checkpoint_steps(out / 'checkpoints')[-1]}")["model"]


def test_a_killed_run_goes_on_to_the_same_result(straight, processes):
    out = processes / "killed"
    assert checkpoint_steps(out / "checkpoints") == [5]
    assert metrics(out)[-1]["step"] == 6, "written after the checkpoint, to be replaced"
    assert run(out, dropout=DROPOUT).finished
    assert_same_run(out, straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_makes_a_checkpoint_and_stops(straight, tmp_path, number):
    handlers = signal.getsignal(number)
    outcome = run(tmp_path, dropout=DROPOUT, act=lambda i: os.kill(os.getpid(), number) if i == 6 else None)
    assert (outcome.step, outcome.finished, outcome.stopped) == (7, False, True)
    assert checkpoint_steps(tmp_path / "checkpoints") == [5, 7]
    assert signal.getsignal(number) == handlers
    assert not (tmp_path / "README.md").exists()
    assert run(tmp_path, dropout=DROPOUT).step == PLAN.steps
    assert_same_run(tmp_path, straight)


def test_a_signal_in_the_last_evaluation_is_told(tmp_path):
    def evaluate(accelerator, module):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"accuracy": 1.0}

    outcome = run(tmp_path, replace(PLAN, evaluate_every=PLAN.steps), evaluate=evaluate)
    assert (outcome.step, outcome.finished, outcome.stopped) == (PLAN.steps, True, True)
    assert (tmp_path / "README.md").exists()
    again = run(tmp_path, replace(PLAN, evaluate_every=PLAN.steps))
    assert (again.finished, again.stopped) == (True, False)


def test_a_second_signal_stops_at_once(tmp_path):
    def act(drawn: int) -> None:
        if drawn == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, act=act)
    assert checkpoint_steps(tmp_path / "checkpoints") == [5]


@pytest.mark.parametrize("broken", ["save", "rename"])
def test_an_interrupted_write_leaves_the_last_checkpoint(straight, tmp_path, monkeypatch, broken):
    module, name = {"save": (torch, "save"), "rename": (os, "rename")}[broken]
    intact, calls = getattr(module, name), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) > (4 if broken == "save" else 1):  # in the second checkpoint
            raise OSError("no space left")
        intact(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(getattr(checkpoint, module.__name__), name, failing)
        with pytest.raises(OSError, match="no space"):
            run(tmp_path, dropout=DROPOUT)
    assert checkpoint_steps(tmp_path / "checkpoints") == [5]
    run(tmp_path, dropout=DROPOUT)
    assert_same_run(tmp_path, straight)
    assert not list((tmp_path / "checkpoints").glob(".*")), "leftovers"


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "loop.pt", "manifest.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
def test_a_damaged_checkpoint_is_refused(tmp_path, name, how):
    run(tmp_path, replace(PLAN, steps=5), evaluate=None)
    file = tmp_path / "checkpoints" / "step-5" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 64
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content if how == "changed" else content[: len(content) // 2])
    with pytest.raises(ValueError, match="step-5") as error:
        run(tmp_path, replace(PLAN, steps=5), evaluate=None)
    # a digest that was changed in the manifest reads as a damaged file
    assert name in str(error.value) or (name, how) == ("manifest.json", "changed")


def test_the_last_checkpoints_stay(tmp_path):
    run(tmp_path, replace(PLAN, checkpoint_every=2, keep=3))
    assert checkpoint_steps(tmp_path / "checkpoints") == [8, 10, 12]


def test_frozen_modules_stay_out_of_checkpoints(straight):
    names = trained(straight).keys()
    assert names == {n for n, p in Toy().named_parameters() if p.requires_grad}
    assert "teacher.weight" not in names


def test_metrics_have_every_step_once(straight):
    lines = metrics(straight)
    assert [line["step"] for line in lines if "evaluation" not in line] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if "evaluation" in line] == [6, 12]
    assert lines[0].keys() == {"step", "token", "parity", "right", "learning_rate"}
    assert lines[0]["learning_rate"] == pytest.approx(0.02)
    assert lines[-1]["evaluation"]["token"] < lines[2]["evaluation"]["token"]


def test_metrics_that_the_checkpoint_counts_must_be_there(tmp_path):
    plan = replace(PLAN, steps=6, checkpoint_every=3)
    run(tmp_path, plan)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text().replace('"step": 6', '"step: 6', 1))
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is missing or damaged"):
        run(tmp_path, plan)


def test_a_finished_run_is_left_alone(straight):
    before = (straight / "metrics.jsonl").read_bytes()

    def refuse(drawn: int) -> None:
        raise AssertionError("trains again")

    outcome = run(straight, dropout=DROPOUT, act=refuse)
    assert outcome.finished
    assert outcome.evaluation == json.loads(before.splitlines()[-1])["evaluation"]
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_final_files(tmp_path):
    run(
        tmp_path,
        save_model=lambda folder: (folder / "config.json").write_text("{}"),
        card=("A toy", "Predicts numbers."),
    )
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
    card = (tmp_path / "README.md").read_text()
    for part in ("# A toy", "Predicts numbers.", "held-out parity", "torch 2", '"learning_rate": 0.02'):
        assert part in card
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        ".lock", "README.md", "checkpoints", "config.json", "curves.png", "metrics.jsonl", "model"
    }  # fmt: skip


def test_another_configuration_is_refused(straight):
    message = r"another configuration: dropout is 0.3 there, 0.1 here; plan.steps is 12 there, 9 here$"
    with pytest.raises(ValueError, match=message):
        run(straight, replace(PLAN, steps=9), dropout=0.1)


def test_other_folders_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        run(file)
    with pytest.raises(FileExistsError, match=r"holds file but no config\.json"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_serves_one_process_at_a_time(straight):
    config = json.loads((straight / "config.json").read_text())
    with RunFolder(straight, config), pytest.raises(BlockingIOError, match="another process"):
        run(straight, dropout=DROPOUT)
    assert run(straight, dropout=DROPOUT).finished


def test_a_folder_that_another_machine_does_not_see(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json, which the main process has written"):
        RunFolder(tmp_path / "elsewhere", {}, writes=False)


def test_accumulation_is_one_big_batch(tmp_path):
    small = replace(PLAN, accumulation=4)
    run(tmp_path / "big", rows=8)
    run(tmp_path / "small", small, rows=2)
    assert_close(tmp_path / "small", tmp_path / "big", 1e-5)


def test_two_processes_are_one(processes, tmp_path):
    run(tmp_path, PLAIN)
    assert_close(processes / "two", tmp_path, 1e-5)


def assert_close(found: Path, expected: Path, tolerance: float) -> None:
    for one, other in zip(metrics(found), metrics(expected), strict=True):
        assert one.pop("evaluation", {}) == pytest.approx(other.pop("evaluation", {}), abs=tolerance)
        assert one == pytest.approx(other, abs=tolerance)
    ours, theirs = trained(found), trained(expected)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], atol=tolerance, rtol=0)


def test_gradients_are_clipped(tmp_path):
    """With eps far above the gradients and no betas a step is learning rate · gradient / eps."""
    optimizer = AdamW(learning_rate=1e6, eps=1e6, betas=(0.0, 0.0), weight_decay=0.0)
    norms = {}
    for limit in (None, 0.01, 100.0):
        plan = Plan(steps=1, optimizer=optimizer, max_grad_norm=limit)
        run(tmp_path / str(limit), plan)
        start, end = Toy().state_dict(), trained(tmp_path / str(limit))
        norms[limit] = torch.cat([(end[name] - start[name]).flatten() for name in end]).norm()
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)
    assert norms[None] == norms[100.0] > 0.1


def test_losses_of_no_weight_are_only_measured(tmp_path):
    parity_free = Toy()
    parity_free.weights = {"token": 1.0}
    run(tmp_path, objective=parity_free)
    assert torch.equal(trained(tmp_path)["parity.weight"], Toy().parity.weight)
    assert metrics(tmp_path)[0]["parity"] > 0


class Late(Toy):
    """A parameter that has no gradient before step 8."""

    calls = 0

    def forward(self, batch):
        found = super().forward(batch)
        self.calls += self.training
        return found if self.calls >= 8 else {**found, "parity": found["parity"].detach()}


def test_a_parameter_without_gradients_so_far_resumes(tmp_path):
    plan = replace(PLAN, optimizer=AdamW(learning_rate=0.02, weight_decay=0.0))
    run(tmp_path / "straight", plan, objective=Late())
    (tmp_path / "resumed").mkdir()
    stopped = run(
        tmp_path / "resumed",
        plan,
        objective=Late(),
        act=lambda i: os.kill(os.getpid(), signal.SIGTERM) if i == 5 else None,
    )
    rest = Late()
    rest.calls = stopped.step
    run(tmp_path / "resumed", plan, objective=rest)
    assert_same(trained(tmp_path / "resumed"), trained(tmp_path / "straight"))


def test_evaluation(tmp_path):
    """In evaluation mode, without gradients; the mean over the batches' counts."""
    seen = []

    def evaluate(accelerator, module):
        seen.append((module.training, torch.is_grad_enabled()))
        return training_run.evaluate(accelerator, module)

    objective = Toy(dropout=0.9)
    run(tmp_path, objective=objective, evaluate=evaluate)
    assert seen == [(False, False)] * 2
    assert objective.training
    objective.eval()
    batches = held_out()
    sums = [objective(batch)["token"] for batch in batches]
    count = sum(objective.counts(batch)["token"] for batch in batches)
    assert metrics(tmp_path)[-1]["evaluation"]["token"] == pytest.approx(
        float(sum(sums).detach()) / count, rel=1e-6
    )


def test_bf16(tmp_path):
    objective = Toy()
    run(tmp_path, replace(PLAN, bf16=True), objective=objective)
    assert objective.dtypes == {torch.bfloat16}
    assert trained(tmp_path)["decoder.weight"].dtype == torch.float32


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    broken = Toy()
    with torch.no_grad():
        broken.decoder.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"token.* not finite"):
        run(tmp_path, objective=broken)
    assert checkpoint_steps(tmp_path / "checkpoints") == []


def test_progress_in_a_file_is_lines(tmp_path, capfd):
    run(tmp_path, quiet=False)
    lines = capfd.readouterr().err
    assert "\r" not in lines
    assert f"step {PLAN.steps} of {PLAN.steps}: token " in lines


def test_optimizer_groups():
    module = nn.ModuleDict({"a": nn.Linear(2, 3), "ab": nn.LayerNorm(3), "c": nn.Embedding(4, 2)})
    optimizer = AdamW(learning_rate=0.1, weight_decay=0.3, rates={"a": 2.0, "ab.": 5.0}).build(module)
    names = {id(p): name for name, p in module.named_parameters()}
    found = {
        names[id(p)]: (g["peak"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]
    }
    assert found == {
        "a.weight": (0.2, 0.3),
        "a.bias": (0.2, 0.0),
        "ab.weight": (0.5, 0.0),
        "ab.bias": (0.5, 0.0),
        "c.weight": (0.1, 0.3),
    }
    with pytest.raises(ValueError, match=r"rates: no parameter .* from d on"):
        AdamW(learning_rate=0.1, rates={"d": 1.0}).build(module)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        AdamW(learning_rate=0.1).build(module.requires_grad_(False))


def test_schedule():
    rates = [linear(step, 10, 4) for step in range(10)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == pytest.approx([1 - i / 6 for i in range(6)])


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"accumulation": 0}, {"keep": 0}, {"warmup": 12}, {"max_grad_norm": 0.0}]
)
def test_plans_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(PLAN, **wrong)
