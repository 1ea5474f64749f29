"""finetune, distill and eval on a small task: every recipe from end to end, resumed, and refused."""

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
from safetensors import safe_open

import small_task
from bertops import models
from bertops.distill.data import ClassificationStream
from bertops.models import MobileBertForSequenceClassification
from bertops.models.checkpoint import read_tensors
from bertops.training import loop
from small_task import (
    CONFIG,
    IB_BERT,
    OFTEN,
    SHORT,
    assert_same_metrics,
    metrics,
    run,
    same_model,
    write_model,
    write_teacher,
)

transformers = pytest.importorskip("transformers")

STEPS = ["--steps", "4"]
RECIPES = {
    "tinybert": ["--layers", "2", "--intermediate-steps", "4", "--augment", "2"],
    "minilm": ["--layers", "2", "--relation-steps", "4"],
    "pkd": ["--layers", "2"],
    "distilbert": ["--layers", "2"],
    "bilstm": ["--hidden-size", "8", "--dense-size", "6", "--augment", "2"],
    "fastbert": ["--finetune-steps", "4", "--head-size", "8"],
    "mobilebert": ["--layer-steps", "3", "--bottleneck", "12", "--feed-forward", "16", "--stacked", "2"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """data, teacher (BERT), ib (an IB-BERT) and pretrained (a masked language model), made once."""
    folder = tmp_path_factory.mktemp("task")
    torch.manual_seed(0)
    return {
        "data": small_task.write_task(folder / "data"),
        "teacher": write_teacher(folder / "teacher"),
        "ib": write_model(folder / "ib", MobileBertForSequenceClassification(IB_BERT)),
        "pretrained": small_task.write_pretrained(folder / "pretrained"),
    }


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than the small runs."""
    monkeypatch.setattr("bertops.training.curves.draw", lambda *anything: b"")


def distill(places, system, out, *options):
    teacher = places["ib" if system == "mobilebert" else "teacher"]
    given = ["--teacher", teacher, "--data", places["data"], "--out", out]
    return run("distill", system, *given, *SHORT, *OFTEN, *STEPS, *RECIPES[system], *options)


def finetune(places, out, *options, model="pretrained"):
    given = ["--model", places[model], "--data", places["data"], "--out", out]
    return run("finetune", *given, *SHORT, *OFTEN, *STEPS, *options)


def tensors(out):
    return read_tensors(out / "model")


# From end to end


def test_finetuned_model_is_for_transformers_and_for_eval(places, tmp_path, capsys):
    assert finetune(places, tmp_path / "out", "--layers", "2", "--start", "1,4") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "curves.png", "checkpoints", "model", "README.md"}
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out/model")
    assert theirs.config.id2label == {0: "negative", 1: "positive"}
    assert theirs.config.num_hidden_layers == 2
    encoded = tokenizer(["a good film"], return_tensors="pt")
    ours = models.BertForSequenceClassification.from_pretrained(tmp_path / "out/model")
    expected = ours(encoded["input_ids"]).logits
    torch.testing.assert_close(theirs(**encoded).logits, expected, rtol=1e-4, atol=1e-5)

    options = ["--model", tmp_path / "out/model", "--data", places["data"], "--max-length", "16"]
    assert run("eval", *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    held_out = metrics(tmp_path / "out")[-1]["evaluation"]
    assert found["accuracy"] == held_out["accuracy"] and found["texts"] == 16
    assert found["latency_ms"] > 0 and found["texts_per_second"] > 0
    assert [row["texts"] for row in found["classes"].values()] == [8, 8]
    right = sum(row["recall"] * row["texts"] for row in found["classes"].values())
    assert right / 16 == pytest.approx(found["accuracy"])


@pytest.mark.parametrize("system", RECIPES)
def test_recipe_with_kernels_and_with_plain_pytorch(places, tmp_path, system, capsys):
    assert distill(places, system, tmp_path / "out") == 0
    assert distill(places, system, tmp_path / "plain", "--impl", "reference") == 0
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3, 3, 4, 4]
    assert_same_metrics(tmp_path / "plain", tmp_path / "out", rel=1e-3, abs=1e-5)
    stages = tmp_path / "out/stages"
    for stage in stages.iterdir() if stages.exists() else ():
        assert metrics(stage)[-1]["step"] == len({line["step"] for line in metrics(stage)})
    options = ["--model", tmp_path / "out/model", "--data", places["data"], "--max-length", "16"]
    if system == "fastbert":
        options += ["--speed", "0.5"]
    assert run("eval", *options) == 0
    assert "accuracy" in capsys.readouterr().out


def test_fastbert_classifier_learns_at_a_rate_of_its_own(places, tmp_path):
    """Its hidden layers stay as they were drawn at a factor of 0, and change at another."""
    drawn = {}
    for factor in ("0", "1", "1000"):
        assert distill(places, "fastbert", tmp_path / factor, "--classifier-factor", factor) == 0
        with safe_open(tmp_path / factor / "model/exits.safetensors", "pt") as file:
            drawn[factor] = file.get_tensor("teacher.dense.weight")
    moved = {factor: (x - drawn["0"]).abs().max() for factor, x in drawn.items()}
    assert 0 < moved["1"] < 1e-2 < moved["1000"]


def test_students_of_transformers_architectures_load_there(places, tmp_path):
    for system in ("pkd", "mobilebert"):
        assert distill(places, system, tmp_path / system) == 0
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / system / "model")
        batch = {"input_ids": torch.tensor([[2, 5, 17, 3]]), "attention_mask": torch.ones(1, 4).long()}
        ours = {
            "pkd": models.BertForSequenceClassification,
            "mobilebert": MobileBertForSequenceClassification,
        }
        expected = ours[system].from_pretrained(tmp_path / system / "model")(batch["input_ids"]).logits
        torch.testing.assert_close(theirs.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_minilm_two_with_an_assistant_for_a_narrow_student(places, tmp_path):
    student = write_model(
        tmp_path / "student",
        models.BertForSequenceClassification(
            replace(CONFIG, hidden_size=12, intermediate_size=16, num_hidden_layers=1)
        ),
    )
    options = ["--version", "2", "--relation-heads", "6", "--assistant-layers", "2", "--student", student]
    assert distill(places, "minilm", tmp_path / "out", *options) == 0
    assert {path.name for path in (tmp_path / "out/stages").iterdir()} == {"assistant", "relations"}
    assert {"q", "k", "v"} <= metrics(tmp_path / "out/stages/assistant")[-1]["evaluation"].keys()


def test_tinybert_learns_its_teacher_with_words_of_a_masked_language_model(places, tmp_path):
    options = [
        "--masked-lm",
        places["pretrained"],
        "--intermediate-steps",
        "60",
        "--intermediate-rate",
        "1e-2",
    ]
    often = ["--evaluate-every", "60", "--checkpoint-every", "60"]
    assert distill(places, "tinybert", tmp_path / "out", *options, *often) == 0
    lines = metrics(tmp_path / "out/stages/intermediate")
    for name in ("embedding", "hidden", "attention"):
        assert lines[-2][name] < 0.8 * lines[0][name]


def test_bilstm_reads_pairs_and_all_teachers_of_a_pair_too(places, tmp_path, monkeypatch):
    from bertops.data import Task, TaskTexts

    part = TaskTexts(["good film", "a film"] * 4, [1, 0] * 4, ["bad", "the plot"] * 4)
    task = Task("pairs", ["negative", "positive"], part, part)
    monkeypatch.setattr("bertops.distill.work.read_task", lambda data: task)
    for system in ("bilstm", "pkd"):
        assert distill(places, system, tmp_path / system) == 0


# Resumed


@pytest.mark.parametrize("stopped_in", ["stages/intermediate", "."])
def test_stopped_by_a_signal_and_resumed_equals_straight(places, tmp_path, monkeypatch, capsys, stopped_in):
    draw = ClassificationStream.__next__

    def act(stream):
        if stream.drawn == 16 and (tmp_path / "halves" / stopped_in / "config.json").exists() and waiting:
            last = (tmp_path / "halves/stages/intermediate/model").exists()
            if last == (stopped_in == "."):
                waiting.clear()
                os.kill(os.getpid(), signal.SIGTERM)
        return draw(stream)

    assert distill(places, "tinybert", tmp_path / "straight") == 0
    waiting = ["signal"]
    monkeypatch.setattr(ClassificationStream, "__next__", act)
    assert distill(places, "tinybert", tmp_path / "halves") == 1
    assert "stopped after step 3 when a signal came: the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "halves/model").exists()
    assert distill(places, "tinybert", tmp_path / "halves") == 0
    for part in ("stages/intermediate", "."):
        assert metrics(tmp_path / "halves" / part) == metrics(tmp_path / "straight" / part)
        assert same_model(tmp_path / "halves" / part, tmp_path / "straight" / part)


def test_signal_in_the_last_step_of_a_stage_keeps_the_next_from_beginning(
    places, tmp_path, monkeypatch, capsys
):
    evaluation = loop.run_evaluation
    steps = []

    def act(*arguments):
        steps.append("evaluation")
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluation(*arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_evaluation", act)
        assert distill(places, "minilm", out, "--evaluate-every", "1000") == 1
    assert "was complete when a signal came: the same command goes on" in capsys.readouterr().err
    assert len(steps) == 1
    assert not (out / "metrics.jsonl").exists()
    assert distill(places, "minilm", out, "--evaluate-every", "1000") == 0
    assert (out / "model").exists()


def test_finished_stage_is_not_run_again(places, tmp_path, monkeypatch):
    assert distill(places, "minilm", tmp_path / "out") == 0
    before = tensors(tmp_path / "out")

    def draw(stream):
        raise AssertionError("a finished stage draws no batch")

    monkeypatch.setattr(ClassificationStream, "__next__", draw)
    assert distill(places, "minilm", tmp_path / "out") == 0
    assert all(torch.equal(x, before[name]) for name, x in tensors(tmp_path / "out").items())


def test_two_processes_of_either_launcher_equal_one(places, tmp_path):
    """Replicas under torchrun; shards of the student under accelerate launch."""
    teacher = write_teacher(
        tmp_path / "teacher",
        hidden_dropout_p=0.0,
        attention_dropout_p=0.0,
        attention_output_dropout_p=0.0,
        classifier_dropout_p=0.0,
    )
    options = ["distill", "tinybert", "--teacher", teacher, "--data", places["data"], *SHORT, *OFTEN, *STEPS]
    options += [*RECIPES["tinybert"], "--evaluate-every", "4"]  # drawing takes longer than training
    sharded = ["--use_fsdp", "--fsdp_version", "2", "--num_machines", "1", "--mixed_precision", "no"]
    sharded += ["--dynamo_backend", "no"]
    launchers = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"],
        "accelerate": ["accelerate.commands.launch", "--num_processes", "2", *sharded, "--main_process_port"],
    }
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path]),
        "HF_HOME": str(tmp_path),  # no configuration of accelerate's from before
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    unsaid = ["--quiet"] if torch.accelerator.is_available() else ["--quiet", "--cpu"]
    half = [argument for argument in options if argument not in unsaid] + ["--batch-size", "4"]
    started = {}
    for name, launcher in launchers.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-m", *launcher, port, "-m", "bertops", *half, "--out", tmp_path / name]
        command = [str(word) for word in command]
        started[name] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert run(*options, "--out", tmp_path / "one") == 0
    for name, process in started.items():
        shown = process.communicate(timeout=600)[1]
        assert process.returncode == 0, shown
        assert shown.count("step 4 of 4: ") == 4, "both stages' training and evaluation, of one process"
        for part in ("stages/intermediate", "."):
            both = metrics(tmp_path / "one" / part), metrics(tmp_path / name / part)
            for one, two in zip(*both, strict=True):
                for number, value in (one.get("evaluation") or one).items():
                    found = (two.get("evaluation") or two)[number]
                    assert found == pytest.approx(value, rel=1e-5, abs=1e-7), (name, number)
        ours, theirs = tensors(tmp_path / name), tensors(tmp_path / "one")
        assert {n: x.shape for n, x in ours.items()} == {n: x.shape for n, x in theirs.items()}


# Refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "3"], "teacher_layers must be a multiple of student_layers, got 4 and 3"),
        (["--layers", "2", "--start", "1,x"], "start must be layers such as 2,4,6, got '1,x'"),
        (["--layers", "2", "--start", "1,9"], "layers must be from 1 to 4 or from -4 to -1, got 9"),
        (["--size", "TINY"], "size must be one of BERT_BASE"),
        (["--max-length", "33"], "max_length must be at most the model's 32 positions, got 33"),
        (["--impl", "fast"], "impl must be one of auto"),
        (["--temperature", "-1"], "temperature must be at least 0, got -1"),
        (["--data", "/no/such"], "no folder /no/such"),
        (["--teacher", "/no/such"], "no folder /no/such"),
    ],
)
def test_bad_option_is_named(places, tmp_path, capsys, options, message):
    assert distill(places, "tinybert", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_teacher_without_a_head(places, tmp_path, capsys):
    folder = tmp_path / "teacher"
    write_model(folder, models.BertModel(CONFIG))
    assert distill(places, "pkd", tmp_path / "out", "--teacher", folder) == 2
    assert "has no classifier, only an encoder: fine-tune it first" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_damaged_teacher(places, tmp_path, capsys, file):
    folder = write_teacher(tmp_path / "teacher")
    (folder / file).write_bytes((folder / file).read_bytes()[:-9])
    assert distill(places, "pkd", tmp_path / "out", "--teacher", folder) == 2
    assert f"{folder / file} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("labels", ["a\nb\nc\n", "positive\nnegative\n"])
def test_labels_of_teacher_and_task_differ(places, tmp_path, capsys, labels):
    assert finetune(places, tmp_path / "teacher") == 0
    data = small_task.write_task(tmp_path / "data")
    (data / "labels.txt").write_text(labels)
    options = ["--teacher", tmp_path / "teacher/model", "--data", data]
    assert distill(places, "pkd", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert "knows the 2 classes negative, positive, and the task has the" in error
    assert not (tmp_path / "out").exists()


def test_student_of_another_vocabulary(places, tmp_path, capsys):
    student = write_teacher(tmp_path / "student")
    small_task.write_tokenizer(student, sorted(small_task.VOCABULARY))
    assert distill(places, "pkd", tmp_path / "out", "--student", student) == 2
    assert "the vocabularies of" in capsys.readouterr().err


def test_mobilebert_refuses_a_teacher_of_another_architecture(places, tmp_path, capsys):
    assert distill(places, "mobilebert", tmp_path / "out", "--teacher", places["teacher"]) == 2
    assert "mobilebert needs a teacher with a MobileBERT's" in capsys.readouterr().err


def test_damaged_checkpoint_is_named_and_nothing_is_lost(places, tmp_path, capsys):
    out = tmp_path / "out"
    assert distill(places, "pkd", out) == 0
    (file,) = out.glob("checkpoints/step-4/model.pt")
    file.write_bytes(file.read_bytes()[:-1])
    before = (out / "metrics.jsonl").read_bytes()
    assert distill(places, "pkd", out) == 2
    assert f"{file} is not as it was written" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before and (out / "model/model.safetensors").exists()


def test_folder_of_another_run_is_left_alone(places, tmp_path, capsys):
    assert distill(places, "pkd", tmp_path / "out") == 0
    assert distill(places, "pkd", tmp_path / "out", "--beta", "1") == 2
    assert "beta is 100.0 there, 1.0 here" in capsys.readouterr().err


# Options from a file


def test_options_from_a_file_and_flags_win(places, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(
        f"model: {places['pretrained']}\ndata: {places['data']}\nout: {tmp_path / 'no'}\n"
        "max-length: 16\nbatch_size: 4\nsteps: 2\nlearning_rate: 0.001\ncpu: true\nquiet: true\n"
    )
    assert (
        run("finetune", "--config", file, "--out", tmp_path / "out", "--steps", "3", "--cpu", "--quiet") == 0
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["batch_size"] == 4 and config["plan"]["steps"] == 3 and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batchsize: 4\n", "unknown option batchsize"),
        ("warmup: much\n", "warmup must be of type float, got 'much'"),
        ("- 1\n", "must hold options by name"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_bad_file_of_options(places, tmp_path, capsys, content, message):
    (tmp_path / "options.yaml").write_text(content)
    assert finetune(places, tmp_path / "out", "--config", tmp_path / "options.yaml") == 2
    assert message in capsys.readouterr().err


def test_what_must_be_given(places, capsys):
    assert run("distill", "pkd", "--data", places["data"]) == 2
    assert "--teacher must be given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("distill", "pkd", "--help")
    assert "--beta" in capsys.readouterr().out


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr("bertops.distill.command.NEEDS", ("no_such_package",))
    assert run("distill", "pkd") == 2
    assert "needs no_such_package: pip install bertops[train]" in capsys.readouterr().err
