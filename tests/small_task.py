"""A small task of generated texts, and a random teacher with a tokenizer that knows their words."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from bertops import cli
from bertops.models import BertConfig, BertForMaskedLM, BertForSequenceClassification, MobileBertConfig
from bertops.models.checkpoint import read_tensors

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD, BAD = ["good", "fine", "bright", "warm"], ["bad", "dull", "cold", "weak"]
OTHERS = ["a", "the", "film", "story", "plot", "cast", "was", "is", "and", "very", "##ly", "##ness"]
VOCABULARY = [*SPECIAL, *GOOD, *BAD, *OTHERS]
CONFIG = BertConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=32,
    max_position_embeddings=32,
)
IB_BERT = MobileBertConfig(
    vocab_size=CONFIG.vocab_size,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=32,
    max_position_embeddings=32,
    embedding_size=16,
    intra_bottleneck_size=36,
    key_query_shared_bottleneck=False,
    num_feedforward_networks=1,
    normalization_type="layer_norm",
    hidden_act="gelu_new",
    pooler=True,
)
SHORT = ["--cpu", "--quiet", "--max-length", "16", "--batch-size", "8", "--train-texts", "32"]
OFTEN = ["--log-every", "1", "--evaluate-every", "3", "--checkpoint-every", "2"]


def write_task(folder: Path, rows: int = 48) -> Path:
    """Texts of 3 to 9 words; the label says which list one of them is from."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, count in (("train", rows), ("dev", 16)):
        lines = ["text\tlabel"]
        for i in range(count):
            words = generator.choice(OTHERS[:10], generator.integers(2, 9)).tolist()
            words.insert(int(generator.integers(len(words))), str(generator.choice((BAD, GOOD)[i % 2])))
            lines.append(f"{' '.join(words)}\t{i % 2}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    (folder / "labels.txt").write_text("negative\npositive\n")
    return folder


def write_tokenizer(folder: Path, vocabulary=VOCABULARY) -> None:
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, ids[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def far_from_zero(model):
    """With every parameter random, so that answers and losses differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def write_model(folder: Path, model) -> Path:
    far_from_zero(model).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_teacher(folder: Path, **changes) -> Path:
    return write_model(folder, BertForSequenceClassification(replace(CONFIG, **changes)))


def write_pretrained(folder: Path) -> Path:
    return write_model(folder, BertForMaskedLM(CONFIG))


def metrics(out: Path) -> list[dict]:
    """Without what a clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def run(*arguments) -> int:
    """The exit status of ``python -m bertops``."""
    return cli.main([str(argument) for argument in arguments])


def run_on_two_processes(*arguments) -> None:
    """The same in two gloo processes; see two_processes.py."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("two_processes.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parent.parent)}
    subprocess.run([sys.executable, script, port, *arguments], check=True, env=environment)


def assert_same_metrics(out: Path, other: Path, rel: float, abs: float) -> None:
    for one, two in zip(metrics(out), metrics(other), strict=True):
        for name, value in (one.get("evaluation") or one).items():
            assert (two.get("evaluation") or two)[name] == pytest.approx(value, rel=rel, abs=abs), name


def same_model(out: Path, other: Path) -> bool:
    """To the bits."""
    a, b = read_tensors(out / "model"), read_tensors(other / "model")
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())
