"""``python -m bench.demo``: a student of all-MiniLM-L6-v2 learns from its teacher's attention on real text.

The student starts as some of the teacher's layers and is trained with MiniLM's loss (attention and value
relation of the last layer, whose rest stays the teacher's) plus TinyBERT's attention loss (scores of every
layer). A second student, of the same weights and on the same batches, takes the same losses in plain PyTorch
from the same captured q, k and v: it multiplies out every score map, once for all losses that need it. Both
models run bertops' attention, so only the losses differ. The two take turns step by step: a slow moment of
the machine hits both.
"""

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from tokenizers import Encoding, Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import bertops
from bench import paired, plots
from bench.memory import METHODS, peak_extra_bytes
from bench.real import DEFAULT_MODEL, model_folder, texts
from bertops._files import write_whole
from bertops.cli import machine, positive
from bertops.distill import layer_map
from bertops.distill.capture import Tap
from bertops.models import BertModel

OUT = Path(__file__).resolve().parent / "out" / "demo"
CPU = torch.device("cpu")
LEARNING_RATE = 6e-4
SAME_CURVE, COMPARED_STEPS = 1e-4, 50  # relative, at every one of the first steps
JOINED = 8  # paragraphs that are cut into rows together: the last row of them has padding
HELD_OUT, MAX_SENTENCES, MIN_SENTENCES = 10, 500, 10  # every tenth paragraph gives a sentence
LOSS_BUDGET_S = 4.0

Pairs = Sequence[tuple[Tap, Tap]]  # of student and teacher, in the order of the student's layers


def loss_of_bertops(pairs: Pairs) -> Tensor:
    tinybert = sum(bertops.attention_score_mse(s.q, s.k, t.q, t.k, s.mask) for s, t in pairs)
    s, t = pairs[-1]
    attention = bertops.attention_kl(s.q, s.k, t.q, t.k, s.mask, lse_s=s.lse, lse_t=t.lse)
    return tinybert + attention + bertops.relation_kl(s.v, t.v, s.mask)


def loss_of_eager(pairs: Pairs) -> Tensor:
    mask = pairs[0][0].mask  # (B, N), true = a real token
    maps = [(score_map(s.q, s.k), score_map(t.q, t.k)) for s, t in pairs]
    tinybert = sum(map_mse(*both, mask) for both in maps)
    s, t = pairs[-1]
    relations = score_map(s.v, s.v), score_map(t.v, t.v)
    return tinybert + map_kl(*maps[-1], mask) + map_kl(*relations, mask)


def score_map(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.transpose(-1, -2) / math.sqrt(x.shape[-1])  # (B, H, N, N)


def map_mse(scores_s: Tensor, scores_t: Tensor, mask: Tensor) -> Tensor:
    real = mask[:, None, :, None] & mask[:, None, None, :]
    return ((scores_s - scores_t).square() * real).sum() / (real.sum() * scores_s.shape[1])


def map_kl(scores_s: Tensor, scores_t: Tensor, mask: Tensor) -> Tensor:
    hidden = ~mask[:, None, None, :]
    lowest = torch.finfo(scores_s.dtype).min  # not -inf, whose difference is NaN
    log_p_s, log_p_t = (x.masked_fill(hidden, lowest).log_softmax(-1) for x in (scores_s, scores_t))
    rows = F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(-1)  # (B, H, N)
    return rows.transpose(1, 2)[mask].mean()


LOSSES: dict[str, Callable[[Pairs], Tensor]] = {"bertops": loss_of_bertops, "eager": loss_of_eager}


class Distillation:
    """A student of the teacher's layers ``layers``, and the loss that it learns by."""

    def __init__(self, teacher: BertModel, layers: Sequence[int], loss_of: Callable[[Pairs], Tensor]) -> None:
        self.teacher, self.teacher_layers, self.loss_of = teacher, layers, loss_of
        self.student_layers = range(1, len(layers) + 1)
        # in evaluation mode: without dropout two students on the same batches stay comparable
        self.student = BertModel(replace(teacher.config, num_hidden_layers=len(layers), pooler=False)).eval()
        self.student.embeddings.load_state_dict(teacher.embeddings.state_dict())
        for layer, number in zip(self.student.layers, layers, strict=True):
            layer.load_state_dict(teacher.layers[number - 1].state_dict())
        self.student.embeddings.requires_grad_(False)  # most of the weights, and the teacher's own
        self.optimizer = torch.optim.AdamW(self.student.layers.parameters(), lr=LEARNING_RATE)

    def forward(self, ids: Tensor, mask: Tensor) -> Pairs:
        with bertops.capture(self.teacher, self.teacher_layers) as teachers, torch.no_grad():
            self.teacher(ids, mask)
        with bertops.capture(self.student, self.student_layers) as students:
            self.student(ids, mask)
        return list(zip(students, teachers, strict=True))

    def step(self, ids: Tensor, mask: Tensor) -> float:
        loss = self.loss_of(self.forward(ids, mask))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


@dataclass
class Text:
    """Rows to train on, ids and mask (rows, N), and sentences that do not occur in them."""

    name: str
    ids: Tensor
    mask: Tensor
    sentences: list[str]

    def batches(self, steps: int, size: int) -> list[tuple[Tensor, Tensor]]:
        chosen = torch.randint(len(self.ids), (steps, size), generator=torch.Generator().manual_seed(0))
        return [(self.ids[rows], self.mask[rows]) for rows in chosen]


def read_text(folder: Path | None, tokenizer: Tokenizer, length: int) -> Text:
    name = "docstrings of the Python standard library" if folder is None else f"text files of {folder}"
    paragraphs = list(dict.fromkeys(texts(folder, whole_modules=False)))
    training = [text for i, text in enumerate(paragraphs) if i % HELD_OUT]
    first_sentences = dict.fromkeys(re.split(r"(?<=[.!?])\s", text)[0] for text in paragraphs[::HELD_OUT])
    everything = "\n".join(training)
    sentences = [s for s in first_sentences if s not in everything][:MAX_SENTENCES]
    if len(sentences) < MIN_SENTENCES:
        raise SystemExit(
            f"{name}: {len(paragraphs)} different paragraphs give {len(sentences)} sentences to rank, "
            f"expected at least {MIN_SENTENCES}"
        )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    starts = range(0, len(training), JOINED)
    encoded = tokenizer.encode_batch(["\n\n".join(training[i : i + JOINED]) for i in starts])
    return Text(
        name, *to_tensors([row for first in encoded for row in (first, *first.overflowing)]), sentences
    )


def to_tensors(rows: Sequence[Encoding]) -> tuple[Tensor, Tensor]:
    """ids (rows, N) and mask, true for a real token."""
    ids, mask = torch.tensor([row.ids for row in rows]), torch.tensor([row.attention_mask for row in rows])
    return ids, mask.bool()


@torch.no_grad()
def similarities(model: BertModel, tokenizer: Tokenizer, sentences: Sequence[str]) -> Tensor:
    """Cosine of the embeddings of every pair of sentences."""
    tokenizer.enable_padding()
    embeddings = []
    for start in range(0, len(sentences), 32):
        ids, mask = to_tensors(tokenizer.encode_batch(sentences[start : start + 32]))
        hidden = model(ids, mask, unpad=True).last_hidden_state  # 0 at padding
        embeddings.append(F.normalize(hidden.sum(1), dim=-1))  # the mean's direction is the sum's
    e = torch.cat(embeddings)
    first, second = torch.triu_indices(len(e), len(e), offset=1)
    return (e @ e.T)[first, second]


def spearman(x: Tensor, y: Tensor) -> float:
    ranks = [values.argsort().argsort().double() for values in (x, y)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def train(students: dict[str, Distillation], batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[dict, dict]:
    """Loss and seconds of every step, by name."""
    losses: dict[str, list[float]] = {name: [] for name in students}
    seconds: dict[str, list[float]] = {name: [] for name in students}
    bar = tqdm(batches, desc="training both", unit="step", dynamic_ncols=True)
    for turn, batch in enumerate(bar):
        for name in list(students)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            losses[name].append(students[name].step(*batch))
            seconds[name].append(time.perf_counter() - start)
        bar.set_postfix({name: f"{values[-1]:.5f}" for name, values in losses.items()})
    return losses, seconds


def loss_part(loss_of: Callable[[Pairs], Tensor], pairs: Pairs) -> Callable[[], object]:
    """The loss and its gradient with respect to what was captured, on its own."""
    leaves = [
        (replace(s, **{name: getattr(s, name).detach().requires_grad_() for name in ("q", "k", "v")}), t)
        for s, t in pairs
    ]
    inputs = [x for s, _ in leaves for x in (s.q, s.k)] + [leaves[-1][0].v]
    return lambda: torch.autograd.grad(loss_of(leaves), inputs)


def measure(students: dict[str, Distillation], batch: tuple[Tensor, Tensor]) -> tuple[dict, dict]:
    """Seconds of the loss part by name, and peak bytes of the loss part and of a whole step."""
    pairs = students["bertops"].forward(*batch)
    parts = {name: loss_part(student.loss_of, pairs) for name, student in students.items()}
    contestants = [paired.Contestant(name, lambda _, part=part: part()) for name, part in parts.items()]
    seconds = paired.run_rounds(contestants, paired.WallClock(CPU), budget_s=LOSS_BUDGET_S)
    memory = {
        name: {
            "loss": peak_extra_bytes(CPU, parts[name]),
            "step": peak_extra_bytes(CPU, partial(student.step, *batch)),
        }
        for name, student in students.items()
    }
    return seconds, memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: not 0 where the curves differ."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder of .txt files (default: Python's docstrings)")
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--layers", type=int, default=3, choices=(1, 2, 3, 6), help="of the student")
    parser.add_argument("--length", type=positive, default=256, help="tokens a row")
    parser.add_argument("--batch", type=positive, default=4, help="rows a step")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of demo.json and curves.png")
    options = parser.parse_args(arguments)

    folder = model_folder(None)
    teacher = BertModel.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if options.length > teacher.config.max_position_embeddings:
        parser.error(f"--length must be at most {teacher.config.max_position_embeddings}")
    text = read_text(options.data, tokenizer, options.length)
    batches = text.batches(options.steps, options.batch)
    layers = layer_map.uniform(options.layers, len(teacher.layers))
    students = {name: Distillation(teacher, layers, loss_of) for name, loss_of in LOSSES.items()}
    padding = 1 - float(torch.cat([mask for _, mask in batches]).double().mean())
    print(
        f"teacher   {DEFAULT_MODEL}, {len(teacher.layers)} layers\n"
        f"student   its layers {', '.join(map(str, layers))}\n"
        f"text      {text.name}: {len(text.ids)} rows of {options.length} tokens\n"
        f"training  {options.steps} steps of {options.batch} rows, {padding:.0%} padding, "
        f"AdamW at {LEARNING_RATE:g}, {torch.get_num_threads()} threads\n"
    )

    rank = partial(similarities, tokenizer=tokenizer, sentences=text.sentences)
    truth = rank(teacher)
    before = spearman(truth, rank(students["bertops"].student))
    losses, seconds = train(students, batches)
    after = {name: spearman(truth, rank(s.student)) for name, s in students.items()}
    loss_seconds, memory = measure(students, batches[0])

    differences = [abs(a - b) / abs(b) for a, b in zip(losses["bertops"], losses["eager"], strict=True)]
    run = {
        "machine": machine(CPU),
        "options": {name: str(value) for name, value in vars(options).items()},
        "padding": padding,
        "losses": losses,
        "relative_differences": differences,
        "step_seconds": seconds,
        "loss_seconds": loss_seconds,
        "peak_extra_bytes": memory,
        "memory_method": METHODS["cpu"],
        "spearman": {"sentences": len(text.sentences), "before": before, "after": after},
    }
    print(report(run))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, content in (("demo.json", json.dumps(run, indent=1).encode()), ("curves.png", draw(run))):
        write_whole(options.out / name, content)
        print(f"wrote {options.out / name}")
    worst = max(differences[:COMPARED_STEPS])
    if worst > SAME_CURVE:
        print(f"The curves differ by {worst:.1e}, expected at most {SAME_CURVE:.0e}", file=sys.stderr)
    return int(worst > SAME_CURVE)


def report(run: dict[str, Any]) -> str:
    losses, differences = run["losses"], run["relative_differences"]
    steps = len(differences)
    lines = ["loss at step     bertops       eager  relative difference"]
    for step in sorted({1, 2, 5, 10, 20, 50, *range(100, steps, 50), steps}):
        if step <= steps:
            both = "".join(f"{losses[name][step - 1]:12.6f}" for name in LOSSES)
            lines.append(f"{step:12}{both}  {differences[step - 1]:19.1e}")
    compared = min(COMPARED_STEPS, steps)
    lines.append(
        f"largest in the first {compared} steps: {max(differences[:compared]):.1e}, in all {steps}: "
        f"{max(differences):.1e}"
    )
    step_seconds, loss_seconds = run["step_seconds"], run["loss_seconds"]
    table = [("", f"{steps} steps", "a step", "its loss", "loss/step", "memory of step", "of loss")]
    for name in LOSSES:
        step, loss = (statistics.median(s[name]) for s in (step_seconds, loss_seconds))
        times = f"{sum(step_seconds[name]):.1f} s", f"{step * 1e3:.0f} ms", f"{loss * 1e3:.1f} ms"
        peak = run["peak_extra_bytes"][name]
        table.append((name, *times, f"{loss / step:.0%}", megabytes(peak["step"]), megabytes(peak["loss"])))
    lines += ["", *("".join(f"{cell:>15}" for cell in row) for row in table)]
    ratios = [paired.paired_ratio(s, "eager", "bertops").median for s in (step_seconds, loss_seconds)]
    lines.append(f"eager takes {ratios[0]:.2f} times as long for a step, {ratios[1]:.2f} times for the loss")
    ranked = run["spearman"]
    after = ", ".join(f"{value:.4f} ({name})" for name, value in ranked["after"].items())
    lines += [
        f"\nSpearman correlation with the teacher over pairs of {ranked['sentences']} held-out sentences:",
        f"{ranked['before']:.4f} before training, {after} after",
    ]
    return "\n".join(lines)


def megabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:.1f} MB"


def draw(run: dict[str, Any]) -> bytes:
    """Both curves, and how far they are apart."""
    steps = range(1, len(run["relative_differences"]) + 1)
    with plt.rc_context(plots.STYLE):
        figure, (above, below) = plt.subplots(
            2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1), layout="constrained"
        )
        for name, width in (("eager", 4.0), ("bertops", 1.2)):
            above.plot(steps, run["losses"][name], color=plots.COLORS[name], linewidth=width, label=name)
        above.set_title("MiniLM's and TinyBERT's losses, all-MiniLM-L6-v2 as the teacher", loc="left")
        above.set_ylabel("loss")
        above.set_ylim(bottom=0)
        above.legend(frameon=False)
        below.plot(steps, run["relative_differences"], ".", color=plots.INK, markersize=3)
        below.hlines(SAME_CURVE, 1, min(COMPARED_STEPS, len(steps)), color=plots.QUIET, linestyle="dashed")
        below.set_yscale("log")
        below.set_ylabel("relative difference")
        below.set_xlabel("step")
        return plots.png(figure)


if __name__ == "__main__":
    sys.exit(main())
