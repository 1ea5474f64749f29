"""The bench of early exit against its promise: who exits when, and what that promises."""

import json
import sys

import pytest
import torch

from bench import exit_speed
from bertops.early_exit import exit_flops, full_flops
from bertops.models import BertConfig, BertModel, FastBert

ROWS, LENGTH = 8, 10
CPU = torch.device("cpu")


@pytest.fixture
def model():
    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=64
    )
    return FastBert(BertModel(config), 2, head_size=8).eval()


def test_half_of_the_samples_leave_in_the_first_third_of_the_layers():
    layers = exit_speed.Scripted(12).layers(64)
    assert (layers <= 4).sum() == 32 and layers.min() == 1 and layers.max() == 12


def test_samples_leave_where_they_should(model):
    criterion = exit_speed.Scripted(model.num_layers)
    ids = torch.randint(5, 30, (ROWS, LENGTH))
    expected = criterion.layers(ROWS)
    for capacities in (None, ROWS):
        answer = model.infer(ids, criterion=criterion, capacities=capacities)
        assert torch.equal(answer.exit_layer, expected)


def test_the_promise_is_that_of_the_layers_that_run(model):
    criterion = exit_speed.Scripted(model.num_layers)
    spent = sum(exit_flops(model, layer, LENGTH) for layer in criterion.layers(ROWS).tolist())
    promise = exit_speed.promised(model, criterion, ROWS, LENGTH)
    assert promise == pytest.approx(ROWS * full_flops(model, LENGTH) / spent) and promise > 1


def test_the_command_writes_its_figures(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exit_speed, "bert_base", lambda *arguments: model)
    monkeypatch.setattr(exit_speed, "WORDS", (5, 30))
    out = tmp_path / "exit.json"
    arguments = ["--device", "cpu", "--length", str(LENGTH), "--batches", "8", "32", "--budget", "0.01"]
    monkeypatch.setattr(sys, "argv", ["exit_speed", *arguments, "--out", str(out)])
    exit_speed.main()
    data = json.loads(out.read_text())
    assert [row["batch"] for row in data["batches"]] == [8, 32]
    assert all(row["speedup"]["infer"] > 0 and row["promised"] > 1 for row in data["batches"])
    assert [row["batch"] for row in data["pool"]] == [32] and data["pool"][0]["per_s"] > 0
    assert "% of what is promised" in capsys.readouterr().out
