"""Pretraining end to end on text that is made here, and what its parts promise."""

import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from bertops import _backend
from bertops.cli import main
from bertops.data import DynamicMasker, PretrainingStream, SentenceBlocks, SpecialTokens, TokenCorpus
from bertops.models import AlbertForPreTraining, BertConfig, BertForMaskedLM
from bertops.pretraining import AlbertSettings, RobertaSettings, command
from bertops.pretraining.albert import Albert
from bertops.pretraining.batches import Batches, held_out_batches
from bertops.pretraining.masked_lm import count_masked, masked_lm_sums
from bertops.pretraining.recipe import pretrain
from bertops.pretraining.roberta import Roberta
from bertops.pretraining.text import Text, fingerprint, prepare, unigram_entropy
from bertops.training import curves

pytestmark = pytest.mark.skipif(_backend.extension_error is not None, reason="bertops._C is not built")

SUBJECTS = ["the miller", "my sister", "an old sailor", "the queen", "their teacher", "a black cat"]
ENDS = ["by the river", "in the garden", "at night", "without a word", "once more", "under the trees"]
VERBS = ["woke", "stood up", "came in", "left", "fell asleep", "went home"]
TINY = {
    "vocab_size": 300,
    "length": 32,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "intermediate_size": 64,
    "batch_size": 16,
    "learning_rate": 5e-3,
    "evaluate_every": 40,
    "checkpoint_every": 40,
    "log_every": 20,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Documents of two sentences about somebody."""
    random = np.random.default_rng(0)
    documents = []
    for _ in range(120):
        who = random.choice(SUBJECTS)
        lines = [f"{who} {random.choice(VERBS)} {random.choice(ENDS)} ." for _ in range(2)]
        documents.append("\n".join(lines))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(documents) + "\n")
    return path


@pytest.fixture(autouse=True)
def no_curves(monkeypatch, request):
    if "command" not in request.node.name:
        monkeypatch.setattr(curves, "draw", lambda *arguments: b"")


def options(**settings) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_roberta_by_the_command(text, tmp_path, capsys):
    arguments = ["pretrain", "roberta", "--text", str(text), "--out", str(tmp_path), "--cpu"]
    arguments += options(**TINY, steps=40, dropout=0.0)
    assert main(arguments) == 0
    assert f"{tmp_path}: mlm " in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    evaluation = lines(tmp_path)[-1]["evaluation"]
    assert evaluation.keys() == {"mlm", "mlm_accuracy"}
    card = (tmp_path / "README.md").read_text()
    assert "| baseline mlm | 3." in card
    losses = [line["mlm"] for line in lines(tmp_path) if "mlm" in line]
    assert losses[-1] < losses[0] - 0.5

    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval()
    ours = BertForMaskedLM.from_pretrained(tmp_path / "model")
    ids = tokenizer("the queen woke at <mask> .", return_tensors="pt").input_ids
    assert [tokenizer.decode(ids[0, place]) for place in (0, -1)] == ["<s>", "</s>"]
    assert (ids == tokenizer.mask_token_id).sum() == 1
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)

    assert main(arguments) == 0, "a finished run is left alone"


def test_albert(text, tmp_path):
    settings = AlbertSettings(**TINY, steps=20, embedding_size=16)
    outcome = pretrain(Albert(settings), text, tmp_path, cpu=True, quiet=True)
    assert outcome.finished
    assert outcome.evaluation.keys() == {"mlm", "mlm_accuracy", "sop", "sop_accuracy"}
    model = AlbertForPreTraining.from_pretrained(tmp_path / "model")
    assert model.config.embedding_size == 16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_sentence_order_is_that_of_the_model(text, tmp_path):
    settings = AlbertSettings(**TINY)
    corpus = prepare(text, tmp_path / "data", fingerprint(text), "unigram", settings)
    recipe = Albert(settings)
    [batch, *_] = held_out_batches(recipe.examples(corpus, corpus.train), recipe.masker(corpus), 16)
    model = recipe.model(corpus).eval()
    objective = recipe.objective(model)
    found, counts = objective(batch), objective.counts(batch)
    output = model(batch["input_ids"], None, batch["token_type_ids"], cu_seqlens=batch["cu_seqlens"])
    swapped, labels = batch["sentence_order_label"], batch["labels"].flatten()
    assert 0 < swapped.sum() < 16
    assert counts["sop"] == counts["sop_accuracy"] == 16
    assert counts["mlm"] == counts["mlm_accuracy"] == (labels != -100).sum()
    torch.testing.assert_close(found["sop"], F.cross_entropy(output.sop_logits, swapped, reduction="sum"))
    assert found["sop_accuracy"] == (output.sop_logits.argmax(1) == swapped).sum()
    expected = F.cross_entropy(output.logits.flatten(0, 1), labels, reduction="sum")
    torch.testing.assert_close(found["mlm"], expected)


def test_masks_of_later_epochs(text, tmp_path):
    """Static masking is dynamic masking that keeps the masks of the first epoch."""
    losses = []
    for masking in ("dynamic", "static"):
        settings = RobertaSettings(**{**TINY, "log_every": 1}, steps=30, dropout=0.0, masking=masking)
        pretrain(Roberta(settings), text, tmp_path / masking, data=tmp_path / "data", cpu=True, quiet=True)
        losses.append([line["mlm"] for line in lines(tmp_path / masking) if "mlm" in line])
    corpus = prepare(text, tmp_path / "data", fingerprint(text), "bpe", settings)
    epoch = len(PretrainingStream(Roberta(settings).examples(corpus, corpus.train), None, 16))
    assert 2 <= epoch < 15
    assert losses[0][:epoch] == losses[1][:epoch]
    assert all(a != b for a, b in zip(losses[0][epoch:], losses[1][epoch:], strict=True))


def test_split(text, tmp_path):
    settings = RobertaSettings(**TINY, held_out=0.25, seed=3)
    source = fingerprint(text)
    corpus = prepare(text, tmp_path / "data", source, "bpe", settings)
    again = prepare(text, tmp_path / "again", source, "bpe", settings)
    parts = [
        (tmp_path / "data" / f"{part}.txt").read_text().split("\n\n")[:-1] for part in ("train", "held-out")
    ]
    assert [len(part) for part in parts] == [90, 30]
    assert sorted(parts[0] + parts[1]) == sorted(text.read_text().strip().split("\n\n"))
    assert (tmp_path / "again" / "held-out.txt").read_text() == (
        tmp_path / "data" / "held-out.txt"
    ).read_text()
    assert corpus.held_out.num_documents == again.held_out.num_documents == 30
    with pytest.raises(ValueError, match=r"made of other data: seed 3 there, 4 here"):
        prepare(text, tmp_path / "data", source, "bpe", replace(settings, seed=4))
    other = prepare(text, tmp_path / "other", source, "bpe", replace(settings, seed=4))
    assert other.held_out.num_documents == 30
    assert (tmp_path / "other" / "held-out.txt").read_text() != (
        tmp_path / "data" / "held-out.txt"
    ).read_text()


def tokens(*documents: list[list[int]]) -> TokenCorpus:
    rows = [line for document in documents for line in document]
    return TokenCorpus(
        np.concatenate(rows).astype(np.int32),
        np.cumsum([0, *map(len, rows)]),
        np.cumsum([0, *map(len, documents)]),
    )


def test_unigram_entropy():
    """Three tokens of four kinds, plus one each: p = 3/7, 2/7, 1/7, 1/7."""
    special = SpecialTokens(0, 0, 0, 0, 0)
    kinds = SimpleNamespace(get_vocab_size=lambda: 4)
    entropy = unigram_entropy(Text(kinds, special, tokens([[0, 0, 1]]), tokens([[0, 1], [3]])))
    assert entropy == pytest.approx(-(math.log(3 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3)


def test_the_loss_is_that_of_all_rows():
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = BertForMaskedLM(config).eval()
    ids, labels = torch.randint(1, 20, (3, 7)), torch.full((3, 7), -100)
    labels[0, 2], labels[2, 5], labels[2, 6] = 4, 9, 1
    output = model(ids)
    found = masked_lm_sums(model, output.last_hidden_state, labels)
    expected = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(found["mlm"], expected)
    assert found["mlm_accuracy"] == (output.logits.argmax(-1) == labels).sum()
    assert count_masked(labels) == 3
    nothing = masked_lm_sums(model, output.last_hidden_state, torch.full((3, 7), -100))
    assert nothing["mlm"] == 0


def test_batches_go_on_over_epochs():
    special = SpecialTokens(0, 1, 2, 3, 4)
    corpus = tokens(*[[[5 + i, 6 + i, 7 + i]] for i in range(12)])

    def batches() -> Batches:
        masker = DynamicMasker(20, 3, special, 0.3)
        return Batches(PretrainingStream(SentenceBlocks(corpus, 8, special), masker, 2, packed=True))

    def take(stream: Batches, count: int) -> list:
        return [batch["input_ids"].tolist() for batch in islice(iter(stream.__next__, None), count)]

    straight, stopped, resumed = batches(), batches(), batches()
    expected = take(straight, 20)
    assert straight.stream.epoch >= 2
    assert next(batches())["input_ids"].shape[0] == 1
    for seen in (3, len(stopped.stream)):  # within an epoch and at its end
        stopped = batches()
        take(stopped, seen)
        resumed.load_state_dict(stopped.state_dict())
        assert take(resumed, 20 - seen) == expected[seen:]


@pytest.mark.parametrize("recipe", ["roberta", "albert"])
def test_errors_of_the_command(text, tmp_path, capsys, recipe):
    def error(text: Path, out: Path, *more: str) -> str:
        assert main(["pretrain", recipe, "--text", str(text), "--out", str(out), "--cpu", *more]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "missing.txt does not exist" in error(tmp_path / "missing.txt", out)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    assert "empty.txt holds no text" in error(empty, out)
    empty.write_text("one document\nof two lines\n")
    assert "one document, expected two or more" in error(empty, out)
    assert "masking must be dynamic or static, got 'sometimes'" in error(text, out, "--masking", "sometimes")
    assert "warmup must be from 0 to below 1, got 1.5" in error(text, out, "--warmup", "1.5")
    assert not out.exists()
    out.mkdir()
    (out / "letter").write_text("mine")
    assert "holds letter but no config.json" in error(text, out)
    (out / "letter").unlink()
    (out / "config.json").write_text('{"recipe": "other"}')
    assert "recipe is 'other' there" in error(text, out)


def test_the_command_names_missing_packages(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "accelerate" else name)
    assert main(["pretrain", "roberta", "--text", str(text), "--out", str(tmp_path / "out")]) == 2
    assert "pretrain needs accelerate: pip install bertops[train]" in capsys.readouterr().err
