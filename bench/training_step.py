"""``python -m bench.training_step``: a whole step of distillation in four ways, in turns.

A step is the teacher's forward, the student's, the loss, backward and AdamW. The teacher is the real
all-MiniLM-L6-v2, the student its layers 2, 4 and 6. Contestants are bertops' models and losses, the same
losses with ``attn_implementation="bertops"`` in transformers, and transformers' eager and SDPA attention with
losses in plain PyTorch. Who does not come to the same loss and gradients gets no figure.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from bench import paired, plots
from bench.early_exit import met
from bench.memory import METHODS as MEMORY_METHODS
from bench.memory import peak_extra_bytes
from bench.real import RealModel, texts
from bench.report import aligned
from bench.step_contestants import METHODS, Contestant, Pair, contestants
from bertops._files import write_whole
from bertops.cli import machine
from bertops.distill.data import Batch
from bertops.models import BertForSequenceClassification
from bertops.training.optimizer import AdamW

OUT = Path(__file__).resolve().parent / "out" / "training_step.json"
STUDENT_LAYERS = (2, 4, 6)
LEARNING_RATE = 1e-5
SAME = 1e-4  # relative, of the loss and of every gradient in norm
NEGLIGIBLE = 1e-3  # of all gradients' norm: that of the keys' biases is 0 but for rounding
WARM_TOKENS = 16
PEERS = ("transformers eager", "transformers SDPA")
COLORS = {
    "bertops": plots.COLORS["bertops"],
    "bertops in transformers": plots.COLORS["bertops, no mask"],
    "transformers eager": plots.COLORS["eager"],
    "transformers SDPA": plots.COLORS["SDPA"],
}


@dataclass(frozen=True)
class Case:
    """``padded``: rows that are filled to half at least; else no padding."""

    method: str
    batch: int
    length: int
    padded: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}-B{self.batch}-N{self.length}{'-padded' if self.padded else ''}"

    def fits(self, text: str) -> bool:
        """A whole name means one case, a part of it all that have it."""
        return text == self.name or (text in self.name and all(text != case.name for case in CASES))


SHAPES = ((8, 512, False), (1, 2048, False), (16, 128, False), (8, 512, True))
CASES = [Case(method, *shape) for method in METHODS for shape in SHAPES]
# By (B, N) without padding: how many times bertops' time eager and SDPA should take, and of memory eager.
REQUIRED = {(8, 512): (2.5, 1.5), (1, 2048): (5.0, 2.8), (16, 128): (1.15, 1.15)}
REQUIRED_MEMORY, REQUIRED_MEMORY_FROM = 2.0, 512


def draw_batch(model: RealModel, case: Case) -> Batch:
    """Real text; without padding the texts of modules laid end to end and cut."""
    if case.padded:
        padded = model.batch(case.batch, case.length, whole_modules=True)
        return {"input_ids": padded.input_ids, "mask": padded.mask.bool()}
    model.tokenizer.no_truncation()
    model.tokenizer.no_padding()
    encoded = (model.tokenizer.encode(text).ids for text in texts(model.text, whole_modules=True))
    count = case.batch * case.length
    ids = torch.tensor(list(islice((i for row in encoded for i in row), count)), device=model.device)
    if len(ids) < count:
        raise ValueError(f"{model.text_name}: {len(ids)} tokens, expected {count}")
    ids = ids.unflatten(0, (case.batch, case.length))
    return {"input_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}


Found = tuple[Tensor, dict[str, Tensor]]  # the loss and its gradients, by name


class Step:
    """A contestant with its optimizer and the batch that it trains on, again and again."""

    def __init__(self, contestant: Contestant, batch: Batch) -> None:
        self.contestant, self.batch = contestant, batch
        self.optimizer = AdamW(learning_rate=LEARNING_RATE).build(contestant)

    def __call__(self, _: object = None) -> None:
        self.differentiate(self.batch)
        self.update()

    def differentiate(self, batch: Batch) -> Tensor:
        loss = self.contestant(batch)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def warm_up(self) -> None:
        """A small step at rate 0: what a first one keeps for good is there, the parameters stay."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.differentiate({name: x[:1, :WARM_TOKENS] for name, x in self.batch.items()})
        self.update()
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE

    def first(self) -> tuple[Found, int | None]:
        """Loss and gradients of a step, and its peak extra memory in bytes."""
        self.warm_up()
        found = []

        def step() -> None:
            loss = self.differentiate(self.batch)
            found.append((loss, {name: x.clone() for name, x in self.contestant.gradients().items()}))
            self.update()

        peak = peak_extra_bytes(self.batch["mask"].device, step)
        return found[0], peak


def differences(actual: Found, expected: Found) -> tuple[float, float]:
    """Relative difference of the loss, and the largest of a gradient that is not negligible."""
    (loss, mine), (expected_loss, theirs) = actual, expected
    total = torch.stack([x.norm() for x in theirs.values()]).norm()
    worst = 0.0
    for name in {*mine, *theirs}:
        zero = torch.zeros(())
        difference = float((mine.get(name, zero) - theirs.get(name, zero)).norm())
        size = float(theirs.get(name, zero).norm())
        worst = max(worst, difference / max(size, NEGLIGIBLE * float(total)))
    return abs(float(loss) - float(expected_loss)) / abs(float(expected_loss)), worst


def measure(
    case: Case, teacher: BertForSequenceClassification, batch: Batch, budget_s: float
) -> dict[str, Any]:
    """The first step of every contestant checked against eager's, then all timed in turns."""
    device = batch["mask"].device
    relation_heads = teacher.config.num_attention_heads
    pair = Pair.of(teacher, STUDENT_LAYERS, case.length)
    with tempfile.TemporaryDirectory() as folder:
        pair.save(Path(folder))
        named = contestants(pair, Path(folder), case.method, device, relation_heads)
    steps = {name: Step(contestant, batch) for name, contestant in named.items()}
    firsts = {name: step.first() for name, step in steps.items()}
    results: dict[str, dict[str, Any]] = {}
    for name, (found, peak) in firsts.items():
        loss, gradient = differences(found, firsts["transformers eager"][0])
        right = loss <= SAME and gradient <= SAME
        results[name] = {"right": right, "loss_difference": loss, "gradient_difference": gradient}
        results[name]["peak_extra_bytes"] = peak
    del firsts
    right = {name: step for name, step in steps.items() if results[name]["right"]}
    # as in training a step comes after one of its own: what another gave back to the system costs page faults
    timed = [paired.Contestant(name, step, prepare=step, known_s=1.0) for name, step in right.items()]
    clock = paired.WallClock(device)
    for name, seconds in paired.run_rounds(timed, clock, budget_s=budget_s, min_rounds=3).items():
        results[name]["seconds"] = seconds
    return {
        "method": case.method,
        "batch": case.batch,
        "length": case.length,
        "padding": 1 - float(batch["mask"].double().mean()),
        "contestants": results,
        "targets": targets(case, results),
    }


def ratio(results: dict[str, dict[str, Any]], name: str) -> paired.Spread:
    """How many times longer than bertops ``name`` takes."""
    seconds = {key: result["seconds"] for key, result in results.items() if "seconds" in result}
    return paired.paired_ratio(seconds, name, "bertops")


def targets(case: Case, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if any("seconds" not in results[name] for name in ("bertops", *PEERS)):
        return {"contestants that are right": met(0.0, ">=", 1.0)}
    found = {}
    required = REQUIRED.get((case.batch, case.length))
    if required is not None and not case.padded:
        for name, factor in zip(PEERS, required, strict=True):
            found[f"time of {name}"] = met(ratio(results, name).median, ">=", factor)
    peaks = [results[name]["peak_extra_bytes"] for name in ("bertops", PEERS[0])]
    if case.length >= REQUIRED_MEMORY_FROM and None not in peaks:
        found[f"memory of {PEERS[0]}"] = met(peaks[1] / peaks[0], ">=", REQUIRED_MEMORY)
    return found


def report(measured: dict[str, Any]) -> str:
    results = measured["contestants"]
    lines = [
        f"{measured['method']} · B{measured['batch']} N{measured['length']}, "
        f"{measured['padding']:.0%} padding"
    ]
    rows = [("", "a step", "vs bertops", "extra MB", "loss differs", "gradients")]
    for name, result in results.items():
        errors = f"{result['loss_difference']:.1e}", f"{result['gradient_difference']:.1e}"
        if "seconds" not in result:
            rows.append((name, "wrong", "-", "-", *errors))
            continue
        peak = result["peak_extra_bytes"]
        times = "-" if "seconds" not in results["bertops"] else f"{ratio(results, name).median:.2f}"
        rows.append(
            (
                name,
                f"{paired.Spread.of(result['seconds']).median:.3f} s",
                times,
                "-" if peak is None else f"{peak / 1e6:,.0f}",
                *errors,
            )
        )
    lines += aligned(rows)
    for name, target in measured["targets"].items():
        verdict = "reached" if target["met"] else "MISSED"
        lines.append(f"  {verdict:8} {name}: {target['value']:.2f} times bertops', asked {target['asked']}")
    return "\n".join(lines)


def draw(run: dict[str, Any]) -> bytes:
    """Seconds and memory of every contestant relative to bertops, a group of bars for every case."""
    cases = {name: case for name, case in run["cases"].items() if "seconds" in case["contestants"]["bertops"]}
    width = 0.8 / len(COLORS)
    with plt.rc_context(plots.STYLE):
        figure, (times, memory) = plt.subplots(
            2, 1, figsize=(max(5.0, 1.1 * len(cases)), 6), sharex=True, layout="constrained"
        )
        for place, (name, color) in enumerate(COLORS.items()):
            for number, case in enumerate(cases.values()):
                results = case["contestants"]
                if "seconds" not in results[name]:
                    continue
                x = number + (place - (len(COLORS) - 1) / 2) * width
                times.bar(
                    x, ratio(results, name).median, width, color=color, label=name if number == 0 else None
                )
                if results[name]["peak_extra_bytes"] is not None:
                    memory.bar(x, results[name]["peak_extra_bytes"] / 1e6, width, color=color)
        times.axhline(1, color=plots.COLORS["bertops"], linewidth=0.8)
        times.set_title(f"A step of distillation, {run['machine']['cpu']}", loc="left")
        times.set_ylabel("time relative to bertops")
        times.legend(frameon=False)
        memory.set_ylabel("peak extra memory, MB")
        memory.set_xticks(range(len(cases)), [name.replace("-", "\n") for name in cases])
        return plots.png(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where something that was to be reached is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.training_step", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help=f"cases by name, or a part: {CASES[0].name}"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing for every case")
    parser.add_argument(
        "--model", help="folder or hub id of another BERT of 6 layers (default: all-MiniLM-L6-v2)"
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, help="JSON; beside it the figure; other cases in it stay"
    )
    options = parser.parse_args(arguments)
    wanted = [case for case in CASES if not options.only or any(case.fits(part) for part in options.only)]
    if not wanted:
        parser.error(f"--only {' '.join(options.only)}: none of {', '.join(case.name for case in CASES)}")
    real = RealModel(options.model, None, options.device, "auto")
    torch.manual_seed(0)
    teacher = BertForSequenceClassification.from_pretrained(real.folder, new_head=True)
    described = machine(options.device)
    run = {"machine": described, "model": real.name, "student_layers": STUDENT_LAYERS, "cases": {}}
    run |= {"memory_method": MEMORY_METHODS[options.device.type], "text": real.text_name}
    if options.out.exists():
        before = json.loads(options.out.read_text())
        if (before["machine"], before["model"]) != (described, real.name):
            parser.error(f"--out {options.out} is of another machine or model")
        run["cases"] = before["cases"]
    print(f"teacher   {real.name}\nstudent   its layers {', '.join(map(str, STUDENT_LAYERS))}")
    print(f"machine   {described['cpu']}, without dropout, fp32\n")
    missed = []
    for case in wanted:
        measured = measure(case, teacher, draw_batch(real, case), options.budget)
        print(report(measured), flush=True)
        cases = {**run["cases"], case.name: measured}
        run["cases"] = {known.name: cases[known.name] for known in CASES if known.name in cases}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.out, (json.dumps(run, indent=1) + "\n").encode())
        missed += [f"{case.name}: {name}" for name, t in measured["targets"].items() if not t["met"]]
    figure = options.out.with_suffix(".png")
    write_whole(figure, draw(run))
    print(f"wrote {options.out} and {figure}")
    if missed:
        print(f"missed: {'; '.join(missed)}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
