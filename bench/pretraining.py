"""Dynamic beside static masking: one RoBERTa each on the same few documents, over many epochs.

    python -m bench.pretraining --text TEXT --out FOLDER [--documents 16] [--steps 1500]

Both runs have the split, the tokenizer, the start and the order of the sequences in common, and in the first
epoch also the masks. Stopped, the same command goes on. Writes ``pretraining.json`` and ``pretraining.png``
to ``--results`` with the curves of both, and of finished runs of ``python -m bertops pretrain`` that
``--runs`` names.
"""

import argparse
import io
import itertools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bertops._files import write_whole
from bertops.cli import machine
from bertops.data import read_documents
from bertops.pretraining import RobertaSettings
from bertops.pretraining.recipe import pretrain
from bertops.pretraining.roberta import Roberta
from bertops.pretraining.text import fingerprint, prepare, unigram_entropy
from bertops.training import Outcome

COLORS = {"dynamic": "#0b6e4f", "static": "#c98f3c"}
RESULTS = Path(__file__).parent / "results" / "cpu"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=16, help="documents of the text that are used")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="folders of finished runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = RobertaSettings(steps=options.steps, held_out=0.25, log_every=20, evaluate_every=100)
    options.out.mkdir(parents=True, exist_ok=True)
    text = options.out / "text.txt"
    if not text.exists():
        documents = itertools.islice(read_documents(options.text), options.documents)
        write_whole(text, "".join("\n".join(document) + "\n\n" for document in documents).encode())
    outcomes = {}
    for masking in COLORS:
        outcomes[masking] = compare(text, options.out, replace(settings, masking=masking))
        if outcomes[masking].stopped:
            return 1
    corpus = prepare(text, options.out / "data", fingerprint(text), Roberta.tokenizer, settings)
    blocks = Roberta(settings).examples(corpus, corpus.train).count()
    result = {
        "machine": machine(torch.device("cpu")),
        "settings": asdict(settings),
        "documents": options.documents,
        "tokens": corpus.train.num_tokens,
        "epochs": settings.steps * settings.batch_size / blocks,
        "unigram_entropy": unigram_entropy(corpus),
        "masking": {name: summary(options.out / name) for name in outcomes},
        "runs": {run.name: summary(run) for run in options.runs},
    }
    options.results.mkdir(parents=True, exist_ok=True)
    write_whole(options.results / "pretraining.json", (json.dumps(result, indent=1) + "\n").encode())
    write_whole(options.results / "pretraining.png", draw(result))
    for name, run in {**result["masking"], **result["runs"]}.items():
        print(f"{name}: held out {numbers(run['evaluations'][-1])}; training {numbers(run['trained'][-1])}")
    return 0


def compare(text: Path, out: Path, settings: RobertaSettings) -> Outcome:
    """The run of one kind of masking; the second takes the first one's split and tokenizer."""
    return pretrain(Roberta(settings), text, out / settings.masking, data=out / "data", cpu=True)


def summary(run: Path) -> dict[str, Any]:
    """Of ``metrics.jsonl``: the evaluations and the last line of training."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "evaluation" not in line]
    evaluations = [{"step": line["step"], **line["evaluation"]} for line in lines if "evaluation" in line]
    return {
        "config": json.loads((run / "config.json").read_text()),
        "trained": trained,
        "evaluations": evaluations,
    }


def numbers(line: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in line.items())


def draw(result: dict[str, Any]) -> bytes:
    """Held-out loss of both maskings, with their training loss, thin."""
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for masking, run in result["masking"].items():
        for name, width in (("trained", 0.6), ("evaluations", 2.2)):
            steps, losses = zip(*((line["step"], line["mlm"]) for line in run[name]), strict=True)
            label = f"{masking}, {'held out' if name == 'evaluations' else 'training'}"
            axes.plot(steps, losses, color=COLORS[masking], linewidth=width, label=label)
    axes.axhline(
        result["unigram_entropy"], color="#9aa5b1", linestyle="--", label="unigram entropy, held out"
    )
    axes.set_xlabel(f"step ({result['epochs']:.0f} epochs)")
    axes.set_ylabel("loss of the masked tokens, nats")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


if __name__ == "__main__":
    sys.exit(main())
