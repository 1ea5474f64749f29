"""The table of the recipes on a small task: runs, stops and goes on, and the arithmetic over seeds."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

for package in ("matplotlib", "tqdm", "tokenizers", "safetensors", "accelerate"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

import small_task  # noqa: E402
from bench import recipe_table, recipes  # noqa: E402
from bertops.distill.stopped import Stopped  # noqa: E402

SMALL = {
    "DistilBERT": {"layers": 2},
    "TinyBERT": {"layers": 2, "augment": 2},
    "FastBERT": {"head_size": 8},
    "BiLSTM": {"hidden_size": 8, "dense_size": 6, "augment": 2},
}


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Of a small run: a few methods, four steps of each."""
    torch.manual_seed(0)
    small_task.write_task(tmp_path / "films")
    small_task.write_pretrained(tmp_path / "encoder")
    monkeypatch.setattr("bertops.training.curves.draw", lambda *anything: b"")
    small = {method.name: method for method in recipes.METHODS}
    small = [
        replace(small[recipe_table.BASE], options={"layers": 2}),
        *(replace(small[name], options=given) for name, given in SMALL.items()),
    ]
    monkeypatch.setattr(recipes, "METHODS", tuple(small))
    monkeypatch.setattr(recipes, "ROUNDS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield [
        *("--data", str(tmp_path / "films"), "--out", str(tmp_path / "out"), "--fp32"),
        *("--model", str(tmp_path / "encoder"), "--seeds", "3", "5", "--dev-texts", "12"),
        *("--steps", "4", "--teacher-steps", "4", "--batch-size", "8", "--max-length", "16"),
    ]
    torch.set_num_threads(threads)


def test_table_stopped_and_resumed(options, tmp_path, monkeypatch, capsys):
    trained = []
    run = recipes.Method.run

    def counted(method, settings, *rest, **given):
        if len(trained) == 4:
            trained.append("stopped")
            raise Stopped("stopped after step 2")
        trained.append((method.name, settings.seed))
        run(method, settings, *rest, **given)

    monkeypatch.setattr(recipes.Method, "run", counted)
    assert recipes.main(options) == 1
    assert "stopped after step 2" in capsys.readouterr().err
    assert not (tmp_path / "out/recipes.json").exists()
    assert recipes.main(options) == 0
    names = [recipe_table.BASE, *SMALL]
    runs = [("teacher", 0), *((name, seed) for seed in (3, 5) for name in names)]
    assert [entry for entry in trained if entry != "stopped"] == runs

    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "out/recipes.json").read_text())
    assert (tmp_path / "out/recipes.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "films") not in json.dumps(table["tasks"])
    rows = {row["name"]: row for row in table["tasks"]["films"]["rows"]}
    exits = ["FastBERT, speed 0", "FastBERT, speed 0.5"]
    assert list(rows) == ["teacher", recipe_table.BASE, "DistilBERT", "TinyBERT", *exits, "BiLSTM"]
    for name, row in rows.items():
        assert f"| {name} | {row['start']} |" in printed
        assert row["latency_ms"] > 0 and row["texts_per_second"] > 0 and row["parameters"] > 0
        assert row["updates"] == (8 if name.startswith(("TinyBERT", "FastBERT")) else 4)
        assert row["seconds"] > 0
        assert (row["paired"] is None) == (name in ("teacher", recipe_table.BASE))
    assert table["tasks"]["films"]["data"]["dev"] == 12
    measured = json.loads((tmp_path / "out/films/distilbert-5/measured.json").read_text())
    assert rows["DistilBERT"]["accuracy"]["5"] == 100 * measured["evaluations"][0]["accuracy"]
    assert not list((tmp_path / "out").rglob("checkpoints"))

    trained.clear()
    before = (tmp_path / "out/films/times.json").read_bytes()
    assert recipes.main(options) == 0  # nothing runs again
    assert not trained and (tmp_path / "out/films/times.json").read_bytes() == before
    assert recipes.main([*options, "--time"]) == 0
    assert not trained and (tmp_path / "out/films/times.json").read_bytes() != before
    with pytest.raises(ValueError, match=r"holds a run of another configuration: .*steps is 4 there, 5"):
        recipes.main([*options, "--teacher-steps", "5"])


def test_steps_are_for_all_folders_or_one_for_each(options, capsys):
    with pytest.raises(SystemExit):
        recipes.main([*options, "--steps", "4", "5"])
    assert "--steps must be one number or 1, one a folder, got [4, 5]" in capsys.readouterr().err


def test_implementations_compared(options, tmp_path, monkeypatch, capsys):
    other = replace(recipes.METHODS[1], name="another", options={"layers": 1})
    monkeypatch.setattr(recipes, "METHODS", (*recipes.METHODS[1:3], other))
    assert recipes.main([*options, "--compare-impl", "3"]) == 0
    printed = capsys.readouterr().out
    assert "| distilbert | 3 |" in printed and "| tinybert | 3 + 3 |" in printed
    (found,) = json.loads((tmp_path / "out/recipes-impl.json").read_text())["tasks"].values()
    rows = {row["recipe"]: row for row in found}
    assert {name: row["steps"] for name, row in rows.items()} == {"distilbert": [3], "tinybert": [3, 3]}
    config = json.loads((tmp_path / "out/films/compared/distilbert-bertops/config.json").read_text())
    assert config["layers"] == 2  # of two methods by one recipe the first
    assert set(rows["tinybert"]["curves"]["bertops"][0][0]) == {"embedding", "hidden", "attention"}
    for row in found:
        assert 0 < row["first_step"] <= row["all_steps"]
    # the answers of a teacher of four steps differ by so little that their KL is all rounding
    curves = [rows["tinybert"]["curves"][name][:1] for name in ("bertops", "reference")]
    assert recipes.difference(*curves) < 1e-6


def test_relative_difference_of_loss_curves():
    theirs = [[{"a": 2.0, "b": 1.0}, {"a": 4.0, "b": 0.5}], [{"c": 8.0}]]
    ours = [[{"a": 2.0, "b": 1.1}, {"a": 3.0, "b": 0.5}], [{"c": 7.0}]]
    assert recipes.difference(ours, theirs) == pytest.approx(0.25)
    assert recipes.difference(ours, theirs, 1) == pytest.approx(0.125)
    assert recipes.difference(theirs, theirs) == 0


def test_mean_deviation_and_paired_difference():
    base, other = {0: 80.0, 1: 82.0, 2: 84.0}, {0: 83.0, 1: 83.0, 2: 89.0}
    assert recipe_table.spread(list(base.values())) == {"mean": 82.0, "std": 2.0}
    # differences 3, 1, 5: mean 3, deviation 2
    found = recipe_table.paired(other, base)
    assert found["mean"] == 3 and found["standard_error"] == pytest.approx(2 / 3**0.5)
    assert recipe_table.spread([5.0]) == {"mean": 5.0, "std": None}
    assert recipe_table.paired({0: 5.0}, {0: 7.0}) == {"mean": -2, "standard_error": None}


def test_rows():
    def run(accuracy, seconds):
        evaluations = [{"accuracy": a, "parameters": 5} for a in accuracy]
        return {"evaluations": evaluations, "updates": 9, "seconds": seconds}

    methods = [
        recipes.Method("teacher", "finetune", "a", {}),
        recipes.Method(recipe_table.BASE, "finetune", "b", {}),
        recipes.Method("exits", "fastbert", "c", {}, speeds=(0.0, 0.5)),
    ]
    runs = {
        "teacher": {0: run([0.9], 1.0)},
        recipe_table.BASE: {0: run([0.5], 2.0), 1: run([0.75], 4.0)},
        "exits": {0: run([0.75, 0.5], 2.0), 1: run([0.75, 1.0], 2.0)},
    }
    titles = ("teacher", recipe_table.BASE, "exits, speed 0", "exits, speed 0.5")
    times = {name: {"latency_ms": 1.0, "texts_per_second": 2.0} for name in titles}
    teacher, base, full, early = recipe_table.rows(methods, runs, times)
    assert (teacher["mean"], teacher["std"], teacher["paired"], base["paired"]) == (90, None, None, None)
    assert (base["mean"], base["seconds"], base["updates"]) == (62.5, 3.0, 9)
    assert full["paired"]["mean"] == early["paired"]["mean"] == 12.5
    assert full["paired"]["standard_error"] == 12.5 and early["paired"]["standard_error"] == 12.5
    assert (full["name"], early["name"]) == titles[2:]
    assert recipe_table.with_error(1.25, None, "+") == "+1.2"
    assert recipe_table.with_error(-1.25, 0.5, "+") == "-1.2 \N{PLUS-MINUS SIGN} 0.5"
