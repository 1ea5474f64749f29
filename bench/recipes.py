"""``python -m bench.recipes --data DIR``: every distillation recipe on a task, beside a student without one.

DIR holds ``train.tsv``, ``dev.tsv`` (text, tab, label) and ``labels.txt``. all-MiniLM-L6-v2, fine-tuned once,
is the teacher; its three-layer students learn from it by each recipe, or from the labels alone, for several
seeds. The last stage of each has the same texts, in as many batches of one size; a stage before it has as
many again, and the table says how many updates and seconds that made. Stopped, the same command goes on: a
run goes on from its checkpoint, and one that is measured is not run again.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from bench import recipe_table
from bench.real import DEFAULT_MODEL, model_folder
from bertops._backend import CHOICES
from bertops._files import write_whole
from bertops.cli import machine, positive
from bertops.data.task import DEV, LABELS, TRAIN, read_task
from bertops.distill.evaluate import evaluate
from bertops.distill.finetune import finetune
from bertops.distill.settings import FinetuneSettings, Settings
from bertops.distill.stages import STAGES
from bertops.distill.stopped import Stopped
from bertops.distill.work import Work

OUT = Path(__file__).resolve().parent / "out" / "recipes"
MEASURED, TIMES = "measured.json", "times.json"
LAYERS = 3
TIMED_TEXTS, ROUNDS = 256, 3  # of latency and throughput
FIRST, SEEDS = 0, (0, 1, 2)
COMPARED_STEPS = 20
NEVER = 10**9  # steps between evaluations and checkpoints; the last step has both
NOT_A_LOSS = ("step", "learning_rate", "tokens_per_second", "seconds")
NOT_SETTINGS = ("data", "out", "model", "time", "compare_impl")
LEFT_OUT = {
    "mobilebert": "its teacher has to be an IB-BERT, a MobileBERT's widths throughout, and MiniLM is none"
}


@dataclass(frozen=True)
class Method:
    """A row of the table, or, with several speeds, some.

    Args:
        name: in the table.
        recipe: of ``python -m bertops distill``, or ``finetune``.
        start: what the student starts from.
        rates: learning rates by the name of the option.
        stages: the options that say how many steps a stage before the last one has.
        options: what else differs from the recipe's own.
        speeds: a FastBERT's, at each of which it is measured.
    """

    name: str
    recipe: str
    start: str
    rates: Mapping[str, float]
    stages: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    speeds: tuple[float | None, ...] = (None,)

    @property
    def kind(self) -> type[Settings]:
        return FinetuneSettings if self.recipe == "finetune" else self.module.Options

    @property
    def module(self) -> Any:
        return import_module(f"bertops.distill.recipes.{self.recipe}")

    @property
    def slug(self) -> str:
        return self.name.lower().replace(",", "").replace(" ", "-")

    def settings(self, seed: int, options: argparse.Namespace) -> Any:
        stages = dict.fromkeys(("steps", *self.stages), options.steps)
        common = common_settings(options)
        return self.kind(**{**common, **stages, **self.rates, **self.options, "seed": seed})

    def run(self, settings: Any, model: Path, data: Path, out: Path, quiet: bool = False) -> None:
        """Raises Stopped where a signal ended it."""
        with Work(self.recipe, model, data, out, settings, cpu=True, quiet=quiet) as work:
            (finetune if self.recipe == "finetune" else self.module.distill)(work, settings)


TEACHER = Method("teacher", "finetune", "all of the pretrained encoder", {"learning_rate": 2e-4})
METHODS = (
    Method(
        recipe_table.BASE,
        "finetune",
        "layers 2, 4, 6 of the pretrained encoder",
        {"learning_rate": 3e-4},
        options={"layers": LAYERS},
    ),
    Method(
        "DistilBERT",
        "distilbert",
        "layers 2, 4, 6 of the teacher",
        {"learning_rate": 3e-4},
        options={"layers": LAYERS},
    ),
    Method(
        "PKD",
        "pkd",
        "layers 2, 4, 6 of the teacher",
        {"learning_rate": 3e-4},
        options={"layers": LAYERS, "start": "2,4,6"},
    ),
    Method(
        "TinyBERT",
        "tinybert",
        "layers 2, 4, 6 of the teacher",
        {"learning_rate": 3e-4, "intermediate_rate": 3e-4},
        stages=("intermediate_steps",),
        options={"layers": LAYERS, "augment": 2},
    ),
    Method(
        "MiniLM",
        "minilm",
        "layers 2, 4, 6 of the teacher",
        {"learning_rate": 3e-4, "relation_rate": 3e-4},
        stages=("relation_steps",),
        options={"layers": LAYERS},
    ),
    Method(
        "FastBERT",
        "fastbert",
        "all layers of the teacher",
        {"learning_rate": 5e-4, "finetune_rate": 1e-4},
        stages=("finetune_steps",),
        options={"classifier_factor": 20.0},  # so few updates must teach a new classifier
        speeds=(0.0, 0.5),
    ),
    Method(
        "BiLSTM",
        "bilstm",
        "word vectors of the teacher",
        {"learning_rate": 5e-3},
        options={"augment": 0},  # no text comes twice: a variant would only take the place of another
    ),
    Method(
        "BiLSTM, no teacher",
        "bilstm",
        "word vectors of the teacher",
        {"learning_rate": 5e-3},
        options={"augment": 0, "alpha": 1.0},
    ),
)


def common_settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "bf16": not options.fp32,
        "impl": options.impl,
        "evaluate_every": NEVER,
        "checkpoint_every": NEVER,
    }


@dataclass(frozen=True)
class Bench:
    """A task in the folder of the bench: its texts, the teacher and the runs."""

    name: str
    folder: Path
    options: argparse.Namespace
    fingerprint: dict[str, Any]

    @property
    def data(self) -> Path:
        return self.folder / "texts" / self.name

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    def runs(self) -> Iterator[tuple[Method, int, Path]]:
        """The teacher first; every seed of a method has a folder."""
        yield TEACHER, FIRST, self.teacher
        for seed in self.options.seeds:
            for method in METHODS:
                yield method, seed, self.folder / f"{method.slug}-{seed}"

    def settings(self, method: Method, seed: int) -> Any:
        settings = method.settings(seed, self.options)
        return replace(settings, steps=self.options.teacher_steps) if method is TEACHER else settings

    def measure(self, method: Method, seed: int, out: Path) -> dict[str, Any]:
        """Trains and evaluates, or reads what that came to; the checkpoints go."""
        settings = self.settings(method, seed)
        made_by = {
            "recipe": method.recipe,
            "settings": asdict(settings),
            "speeds": list(method.speeds),
            "data": self.fingerprint,
        }
        if (found := read(out / MEASURED)) and found["made_by"] == made_by:
            return found
        (out / MEASURED).unlink(missing_ok=True)
        model = model_folder(self.options.model) if method.recipe == "finetune" else self.teacher / "model"
        method.run(settings, model, self.data, out)
        measured = {
            "made_by": made_by,
            **effort(out),
            "evaluations": [self.evaluate(out / "model", speed) for speed in method.speeds],
        }
        write(out / MEASURED, measured)
        for folder in (out / STAGES, out / "checkpoints"):
            shutil.rmtree(folder, ignore_errors=True)
        return measured

    def evaluate(self, model: Path, speed: float | None) -> dict[str, Any]:
        sizes = {"batch_size": self.options.batch_size, "max_length": self.options.max_length}
        found = evaluate(model, self.data, latency_texts=1, speed=speed, **sizes)
        return {name: found[name] for name in ("accuracy", "texts", "parameters", "classes")}

    def times(self) -> dict[str, Any]:
        """Of each method's first model, all in turns on the same texts: the median over rounds."""
        if found := read(self.folder / TIMES):
            return found
        some = self.folder / "texts" / "timed"
        write_task(self.data, some, TIMED_TEXTS)
        models = [
            (title, out / "model", speed)
            for method, seed, out in self.runs()
            if seed == self.options.seeds[0] or method is TEACHER
            for title, speed in recipe_table.titles(method.name, method.speeds)
        ]
        rounds: dict[str, list[dict[str, float]]] = {title: [] for title, *_ in models}
        with tqdm(total=ROUNDS * len(models), desc=f"{self.name}: times", unit="model") as bar:
            for turn in range(ROUNDS):
                for title, model, speed in (*models[turn:], *models[:turn]):
                    found = evaluate(
                        model, some, batch_size=32, max_length=self.options.max_length, speed=speed
                    )
                    rounds[title].append({name: found[name] for name in recipe_table.TIMES})
                    bar.update()
        times = {
            title: {name: median(row[name] for row in rows) for name in recipe_table.TIMES}
            for title, rows in rounds.items()
        }
        write(self.folder / TIMES, times)
        return times

    def compare(self, method: Method, steps: int) -> dict[str, Any]:
        """The losses of the same few steps with the ops of bertops and with the formulas in plain PyTorch."""
        some = self.folder / "texts" / "compared"
        write_task(self.data, some, self.options.batch_size)
        curves = {}
        for name, impl in (("bertops", "auto"), ("reference", "reference")):
            out = self.folder / "compared" / f"{method.recipe}-{name}"
            given = argparse.Namespace(**{**vars(self.options), "impl": impl, "fp32": True, "steps": steps})
            settings = replace(
                method.settings(FIRST, given),
                log_every=1,
                train_texts=steps * self.options.batch_size,
            )
            method.run(settings, self.teacher / "model", some, out, quiet=True)
            curves[name] = [losses(run) for run in stages(out)]
        return {
            "recipe": method.recipe,
            "steps": [len(stage) for stage in curves["reference"]],
            "first_step": difference(curves["bertops"], curves["reference"], 1),
            "all_steps": difference(curves["bertops"], curves["reference"]),
            "curves": curves,
        }


def write_task(data: Path, folder: Path, dev_texts: int) -> None:
    """The task of ``data`` with only the first texts of ``dev.tsv``."""
    task = read_task(data)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in ((TRAIN, task.train), (DEV, task.dev.first(dev_texts))):
        rows = (f"{text}\t{label}" for text, label in zip(part.texts, part.labels, strict=True))
        write_whole(folder / name, "\n".join(("text\tlabel", *rows, "")).encode())
    write_whole(folder / LABELS, "\n".join((*task.labels, "")).encode())


def stages(out: Path) -> list[Path]:
    """The folders of a run's stages, the last one at the end."""
    return [*sorted((out / STAGES).glob("*")), out]


def lines_of(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "evaluation" not in line]


def effort(out: Path) -> dict[str, float]:
    """Updates and seconds of training of all stages."""
    last = [lines_of(run)[-1] for run in stages(out)]
    return {"updates": sum(line["step"] for line in last), "seconds": sum(line["seconds"] for line in last)}


def losses(run: Path) -> list[dict[str, float]]:
    return [
        {name: x for name, x in line.items() if name not in NOT_A_LOSS and "accuracy" not in name}
        for line in lines_of(run)
    ]


def difference(
    ours: Sequence[Sequence[Mapping[str, float]]],
    theirs: Sequence[Sequence[Mapping[str, float]]],
    steps: int | None = None,
) -> float:
    """The largest relative one of any loss in the first ``steps`` of any stage, all by default."""
    return max(
        abs(a[name] - b[name]) / max(abs(b[name]), sys.float_info.min)
        for mine, other in zip(ours, theirs, strict=True)
        for a, b in list(zip(mine, other, strict=True))[:steps]
        for name in b
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write(path: Path, content: Any) -> None:
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def prepare(data: Path, options: argparse.Namespace) -> Bench:
    name = data.resolve().name
    texts = options.out / name / "texts" / name
    write_task(data, texts, options.dev_texts)
    return Bench(name, options.out / name, options, read_task(texts).fingerprint())


def run_table(benches: Sequence[Bench], options: argparse.Namespace) -> None:
    runs = [(bench, *run) for bench in benches for run in bench.runs()]
    found: dict[str, dict[str, dict[int, Any]]] = {bench.name: {} for bench in benches}
    with tqdm(runs, unit="run", dynamic_ncols=True) as bar:
        for bench, method, seed, out in bar:
            bar.set_description(f"{bench.name}: {method.name}, seed {seed}")
            found[bench.name].setdefault(method.name, {})[seed] = bench.measure(method, seed, out)
    tasks = {}
    for bench in benches:
        if options.time:
            (bench.folder / TIMES).unlink(missing_ok=True)
        rows = recipe_table.rows((TEACHER, *METHODS), found[bench.name], bench.times())
        tasks[bench.name] = {
            "data": bench.fingerprint,
            "rows": rows,
            "runs": found[bench.name],
        }
    table = {
        "machine": machine(torch.device("cpu")),
        "model": options.model or DEFAULT_MODEL,
        "settings": {name: x for name, x in vars(options).items() if name not in NOT_SETTINGS},
        "left_out": LEFT_OUT,
        "tasks": tasks,
    }
    print(recipe_table.markdown(table))
    for suffix, content in (
        ("json", (json.dumps(table, indent=1) + "\n").encode()),
        ("png", recipe_table.draw(table)),
    ):
        path = options.out / f"recipes.{suffix}"
        write_whole(path, content)
        print(f"wrote {path}")


def run_comparison(benches: Sequence[Bench], options: argparse.Namespace) -> None:
    tasks = {}
    for bench in benches:
        bench.measure(TEACHER, FIRST, bench.teacher)
        first = {method.recipe: method for method in reversed(METHODS) if method.recipe != "finetune"}
        bar = tqdm(reversed(first.values()), total=len(first), unit="recipe", dynamic_ncols=True)
        tasks[bench.name] = [bench.compare(method, options.compare_impl) for method in bar]
    print(recipe_table.comparison(tasks))
    path = options.out / "recipes-impl.json"
    write(path, {"machine": machine(torch.device("cpu")), "tasks": tasks})
    print(f"wrote {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where a signal stopped it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.recipes",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="folders of train.tsv, dev.tsv and labels.txt"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the runs, the JSON and the figure")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--steps",
        type=positive,
        nargs="+",
        default=[100],
        help="of each stage of a student, perhaps by folder",
    )
    parser.add_argument("--teacher-steps", type=positive, default=200)
    parser.add_argument("--batch-size", type=positive, default=32, help="texts of a step")
    parser.add_argument("--max-length", type=positive, default=48, help="longer texts are cut")
    parser.add_argument("--dev-texts", type=positive, default=1000, help="first of dev.tsv that measure")
    parser.add_argument("--model", help="folder or hub id of the encoder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--impl", choices=CHOICES, default="auto", help="of the ops of bertops")
    parser.add_argument("--fp32", action="store_true", help="train without bfloat16")
    parser.add_argument("--time", action="store_true", help="measure latency and throughput again")
    parser.add_argument(
        "--compare-impl",
        type=positive,
        nargs="?",
        const=COMPARED_STEPS,
        metavar="STEPS",
        help="so many steps of every recipe, 20 by default, with and without the ops of bertops, in fp32, in "
        "place of the table",
    )
    options = parser.parse_args(arguments)
    options.seeds = list(dict.fromkeys(options.seeds))
    if len(options.steps) not in (1, len(options.data)):
        parser.error(f"--steps must be one number or {len(options.data)}, one a folder, got {options.steps}")
    steps = options.steps * (len(options.data) if len(options.steps) == 1 else 1)
    benches = [
        prepare(data, argparse.Namespace(**{**vars(options), "steps": count}))
        for data, count in zip(options.data, steps, strict=True)
    ]
    try:
        (run_comparison if options.compare_impl else run_table)(benches, options)
    except (Stopped, KeyboardInterrupt) as stopped:
        print(str(stopped) or "stopped: the same command goes on", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
