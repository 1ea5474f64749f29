"""``python -m bench.early_exit --data DIR``: what early exit saves on real text, and what it costs.

DIR holds ``train.tsv``, ``dev.tsv`` (text, tab, label) and ``labels.txt``. For every seed all-MiniLM-L6-v2 is
fine-tuned as it is, and a copy of that model then learns to exit early. The speed is chosen on rows carved
out of the training file; reported are those of ``dev.tsv``: accuracy against the model without exits, exit
layers, time against the full model in turns at every batch size, and the pool against what the FLOPs promise.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm import tqdm

from bench import paired, plots
from bench.exit_training import Recipe, Rows, Task, new_model, read_task
from bench.real import DEFAULT_MODEL
from bertops._files import write_whole
from bertops.cli import machine, positive
from bertops.early_exit import Calibration, ExitPool, calibrate_speed, exit_flops, full_flops
from bertops.models import FastBert

OUT = Path(__file__).resolve().parent / "out" / "early_exit"
CPU = torch.device("cpu")
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
SERVED = 32  # the batch size of calibration, and of the pool
CURVE = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SAMPLE_ROWS, MAX_SAMPLES = 32, 50  # rows timed at once, at least; how many such samples, at most
POOL_ROWS, POOL_ROUNDS, CURVE_ROWS = 1024, 3, 2000
LOST = 0.5  # points of accuracy on dev that early exit may cost
ACCURACY_NOISE = 0.01  # by which a faster speed may be more accurate


def trained(task: Task, seed: int, recipe: Recipe, limit: int | None, folder: Path) -> dict[str, FastBert]:
    """The model without exits and the one with them; what ``folder`` has of the same recipe is read."""
    title = f"{task.name}, seed {seed}"
    made_by = {**asdict(recipe), "limit": limit, "held_out": len(task.selection)}
    models: dict[str, FastBert] = {}
    for name, learn in (("full", recipe.fine_tune), ("exits", recipe.add_exits)):
        path = folder / f"{task.name}-{seed}-{name}.pt"
        model = copy.deepcopy(models["full"]) if models else new_model(len(task.label_names), seed)
        saved = torch.load(path) if path.exists() else {}
        if saved.get("made_by") == made_by:
            model.load_state_dict(saved["weights"])
        else:
            learn(title, model, task.train, seed)
            torch.save({"made_by": made_by, "weights": model.state_dict()}, path)
        models[name] = model.eval()
    return models


def answers(model: FastBert, rows: Rows, speed: float) -> tuple[Tensor, Tensor]:
    """Prediction and exit layer (rows,) in batches as they are served."""
    outputs = [model.infer(*batch.padded()[:2], speed=speed) for batch in rows.batches(SERVED)]
    return torch.cat([o.prediction for o in outputs]), torch.cat([o.exit_layer for o in outputs])


def accuracy(prediction: Tensor, rows: Rows) -> float:
    return float((prediction == torch.from_numpy(rows.labels)).double().mean())


def promised(model: FastBert, rows: Rows, layers: Tensor) -> float:
    """FLOPs of the full model over those of the layers and classifiers that ran."""
    spent = sum(
        exit_flops(model, layer, len(ids)) for layer, ids in zip(layers.tolist(), rows.ids, strict=True)
    )
    return sum(full_flops(model, len(ids)) for ids in rows.ids) / spent


def run_seed(task: Task, models: dict[str, FastBert], options: argparse.Namespace) -> dict[str, Any]:
    model = models["exits"]
    calibration = calibrate_speed(
        model,
        [batch.padded() for batch in task.selection.batches(SERVED)],
        max_accuracy_drop=options.max_drop / 100,
        budget_s=options.budget,
    )
    speed = calibration.speed
    plain, _ = answers(models["full"], task.dev, 0.0)
    prediction, layers = answers(model, task.dev, speed)
    by_layer = layer_accuracy(model, task.dev)
    curve = calibrate_speed(
        model,
        [batch.padded() for batch in first(task.dev, CURVE_ROWS).batches(SERVED)],
        max_accuracy_drop=1.0,
        speeds=sorted({*CURVE, speed}),
        budget_s=options.budget,
    )
    return {
        "calibration": asdict(calibration),
        "speed": speed,
        "accuracy": {
            "without exits": accuracy(plain, task.dev),
            "speed 0": by_layer[-1],
            "early exit": accuracy(prediction, task.dev),
        },
        "layer_accuracy": by_layer,
        "exit_layers": torch.bincount(layers, minlength=model.num_layers + 1)[1:].tolist(),
        "mean_exit_layer": float(layers.double().mean()),
        "flops_speedup": promised(model, task.dev, layers),
        "curve": asdict(replace(curve, speed=speed)),
        "batches": [
            time_batches(model, task.dev, speed, size, options.budget)
            for size in tqdm(SIZES, desc="batch sizes", leave=False)
        ],
        "pool": time_pool(model, task.dev, speed, options.budget),
        "checks": check(model, task.dev, curve),
    }


def first(rows: Rows, count: int) -> Rows:
    return rows.take(range(min(len(rows), count)))


def layer_accuracy(model: FastBert, rows: Rows) -> list[float]:
    """Of every layer's classifier, were it to answer everybody."""
    right = torch.zeros(model.num_layers, dtype=torch.int64)
    with torch.inference_mode():
        for batch in rows.batches(SERVED):
            input_ids, cu_seqlens, labels = batch.packed()
            output = model(input_ids, cu_seqlens=cu_seqlens)
            logits = torch.stack([*output.student_logits, output.logits])
            right += (logits.argmax(-1) == labels).sum(1)
    return (right / len(rows)).tolist()


def check(model: FastBert, rows: Rows, curve: Calibration) -> dict[str, bool]:
    input_ids, mask, _ = first(rows, 256).padded()
    full = model.infer(input_ids, mask, speed=0.0)
    with torch.inference_mode():
        expected = model(input_ids, mask).logits
    layers = [point.mean_exit_layer for point in curve.points]
    accuracies = [point.accuracy for point in curve.points]
    return {
        "speed 0 answers as the full model": bool(
            torch.equal(full.prediction, expected.argmax(1))
            and torch.allclose(full.logits, expected, rtol=1e-4, atol=1e-4)
            and (full.exit_layer == model.num_layers).all()
        ),
        "speed 1 exits at layer 1": bool((model.infer(input_ids, mask, speed=1.0).exit_layer == 1).all()),
        "exit layer falls with speed": layers == sorted(layers, reverse=True),
        "accuracy falls with speed, within noise": all(
            later <= max(accuracies[: i + 1]) + ACCURACY_NOISE for i, later in enumerate(accuracies)
        ),
    }


def time_batches(model: FastBert, rows: Rows, speed: float, size: int, budget_s: float) -> dict[str, Any]:
    """Seconds of the same padded batches through the full model and with exits; every round takes others."""
    count = max(size, SAMPLE_ROWS)
    whole = [part for part in rows.batches(count) if len(part) == count]
    samples = [[batch.padded()[:2] for batch in part.batches(size)] for part in whole[:MAX_SAMPLES]]

    def run(speed: float, batches: list[tuple[Tensor, Tensor]]) -> None:
        for input_ids, mask in batches:
            model.infer(input_ids, mask, speed=speed)

    contestants = [
        paired.Contestant(name, partial(run, at), partial(next, cycle(samples)))
        for name, at in (("full", 0.0), ("early", speed))
    ]
    clock = paired.WallClock(CPU)
    seconds = paired.run_rounds(contestants, clock, budget_s=budget_s / 4, min_rounds=10)
    return {"size": size, "rows": count, "seconds": seconds}


def time_pool(model: FastBert, rows: Rows, speed: float, budget_s: float) -> dict[str, Any]:
    """The full model in batches against a pool that gets the same rows one by one."""
    some = first(rows, POOL_ROWS)
    batches = [batch.padded()[:2] for batch in some.batches(SERVED)]
    layers = answers(model, some, speed)[1]

    def run_full(_: Any) -> None:
        for input_ids, mask in batches:
            model.infer(input_ids, mask, speed=0.0)

    def run_early(_: Any) -> None:
        for input_ids, mask in batches:
            model.infer(input_ids, mask, speed=speed)

    def run_pool(_: Any) -> None:
        with ExitPool(model, speed=speed, max_batch=SERVED, max_wait_s=30.0, max_stall_s=30.0) as pool:
            futures = [pool.submit(ids) for ids in some.ids]
        for future in futures:  # closing has answered them
            future.result()

    runs: Iterable[tuple[str, Callable[[Any], None]]] = (
        ("full", run_full),
        ("early", run_early),
        ("pool", run_pool),
    )
    contestants = [paired.Contestant(name, run) for name, run in runs]
    seconds = paired.run_rounds(contestants, paired.WallClock(CPU), budget_s=budget_s, min_rounds=POOL_ROUNDS)
    return {"rows": len(some), "flops_speedup": promised(model, some, layers), "seconds": seconds}


def ratio(seconds: dict[str, list[float]], name: str, base: str = "full") -> float:
    """How many times faster than ``base``: the median over rounds."""
    return paired.paired_ratio(seconds, base, name).median


def targets(seeds: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was to be reached: the worst seed, except for accuracy, whose mean over the seeds counts."""
    runs = list(seeds.values())
    drops = [r["accuracy"]["without exits"] - r["accuracy"]["early exit"] for r in runs]
    speedups = [ratio(b["seconds"], "early") for r in runs for b in r["batches"] if b["size"] == SERVED]
    slowest = min(ratio(b["seconds"], "early") for r in runs for b in r["batches"])
    kept = min(ratio(r["pool"]["seconds"], "pool") / r["pool"]["flops_speedup"] for r in runs)
    return {
        "points of accuracy lost, mean of seeds": met(100 * statistics.fmean(drops), "<=", LOST),
        f"speed-up at batch {SERVED}, slowest seed": met(min(speedups), ">=", 2.0),
        "speed-up at the worst batch size of any seed": met(slowest, ">=", 0.95),
        "speed-up of the pool over that of the FLOPs, worst seed": met(kept, ">=", 0.9),
        "checks that hold in every seed": met(
            min(sum(r["checks"].values()) / len(r["checks"]) for r in runs), ">=", 1.0
        ),
    }


def met(value: float, relation: str, bound: float) -> dict[str, Any]:
    reached = value <= bound if relation == "<=" else value >= bound
    return {"value": value, "asked": f"{relation} {bound:g}", "met": reached}


def report(run: dict[str, Any]) -> str:
    seeds = run["seeds"]
    lines = [
        "seed  speed   accuracy on dev, %                     exit  speed-up",
        "              no exits   speed 0  early exit   lost  layer  FLOPs  batch 32  pool",
    ]
    for seed, r in seeds.items():
        a = {name: 100 * value for name, value in r["accuracy"].items()}
        lost = a["without exits"] - a["early exit"]
        served = next(b for b in r["batches"] if b["size"] == SERVED)
        lines.append(
            f"{seed:>4}  {r['speed']:<6g}  {a['without exits']:8.2f}  {a['speed 0']:8.2f}  "
            f"{a['early exit']:10.2f}  {lost:5.2f}  {r['mean_exit_layer']:5.2f}  {r['flops_speedup']:5.2f}  "
            f"{ratio(served['seconds'], 'early'):8.2f}  {ratio(r['pool']['seconds'], 'pool'):4.2f}"
        )
    lines += ["", "seed  accuracy of each layer's classifier on dev, %    answers by layer, %"]
    for seed, r in seeds.items():
        total = sum(r["exit_layers"])
        lines.append(
            f"{seed:>4}  "
            + "".join(f"{100 * value:7.2f}" for value in r["layer_accuracy"])
            + "      "
            + "".join(f"{100 * count / total:6.1f}" for count in r["exit_layers"])
        )
    lines += ["", "texts a second, median over rounds; in brackets how many times the full model's", ""]
    lines.append(f"{'batch':>8}  {'full':>8}" + "".join(f"{'seed ' + seed:>18}" for seed in seeds))
    for i, size in enumerate(SIZES):
        measured = [r["batches"][i] for r in seeds.values()]
        full = statistics.median(b["rows"] / statistics.median(b["seconds"]["full"]) for b in measured)
        cells = (rate(b, "early") for b in measured)
        lines.append(f"{size:>8}  {full:8.0f}" + "".join(f"{cell:>18}" for cell in cells))
    pools = [r["pool"] for r in seeds.values()]
    full = statistics.median(p["rows"] / statistics.median(p["seconds"]["full"]) for p in pools)
    lines.append(f"{'pool':>8}  {full:8.0f}" + "".join(f"{rate(p, 'pool'):>18}" for p in pools))
    lines += [
        "",
        f"dev at other speeds (its first {CURVE_ROWS} rows), mean over seeds:",
        "speed  accuracy, %  exit layer  FLOPs  batch 32",
    ]
    for speed in CURVE:
        points = [p for r in seeds.values() for p in r["curve"]["points"] if p["speed"] == speed]
        mean = {
            key: statistics.fmean(p[key] for p in points)
            for key in ("accuracy", "mean_exit_layer", "flops_speedup")
        }
        timed = [p["measured_speedup"] for p in points if p["measured_speedup"] is not None]
        lines.append(
            f"{speed:5g}  {100 * mean['accuracy']:11.2f}  {mean['mean_exit_layer']:10.2f}  "
            f"{mean['flops_speedup']:5.2f}  {f'{statistics.fmean(timed):.2f}' if timed else '':>8}"
        )
    lines.append("")
    for name, target in run["targets"].items():
        verdict = "reached" if target["met"] else "MISSED"
        lines.append(f"{verdict:8} {name}: {target['value']:.3g}, asked {target['asked']}")
    return "\n".join(lines)


def rate(measured: dict[str, Any], name: str) -> str:
    rows = measured["rows"] / statistics.median(measured["seconds"][name])
    return f"{rows:.0f} ({ratio(measured['seconds'], name):.2f})"


def draw(run: dict[str, Any]) -> bytes:
    """Accuracy against speed-up, measured and promised; speed-up at every batch size."""
    green, gray = plots.COLORS["bertops"], plots.COLORS["eager"]
    with plt.rc_context(plots.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for number, r in enumerate(run["seeds"].values()):
            new = number == 0
            points = sorted(r["curve"]["points"], key=lambda p: p["flops_speedup"])
            timed = sorted(
                (p["measured_speedup"], 100 * p["accuracy"])
                for p in points
                if p["measured_speedup"] is not None
            )
            left.plot(
                [p["flops_speedup"] for p in points],
                [100 * p["accuracy"] for p in points],
                color=gray,
                linewidth=1,
                label="FLOPs" if new else None,
            )
            left.plot(
                *zip(*timed, strict=True),
                "o-",
                color=green,
                markersize=3,
                linewidth=1,
                label="measured" if new else None,
            )
            served = next(b for b in r["batches"] if b["size"] == SERVED)
            left.plot(
                [ratio(served["seconds"], "early")],
                [100 * r["accuracy"]["early exit"]],
                "o",
                color=green,
                markersize=9,
                fillstyle="none",
                label="chosen on other rows" if new else None,
            )
            left.axhline(
                100 * r["accuracy"]["without exits"],
                color=plots.QUIET,
                linewidth=0.8,
                linestyle="dashed",
                label="model without exits" if new else None,
            )
            speedups = [ratio(b["seconds"], "early") for b in r["batches"]]
            right.plot(
                SIZES,
                speedups,
                "o-",
                color=green,
                markersize=3,
                linewidth=1,
                label="batches" if new else None,
            )
            right.axhline(r["flops_speedup"], color=gray, linewidth=1, label="FLOPs" if new else None)
            right.axhline(
                ratio(r["pool"]["seconds"], "pool"),
                color=plots.COLORS["FlexAttention"],
                linewidth=1,
                linestyle="dashed",
                label="pool" if new else None,
            )
        left.set_title(f"{run['task']}, {len(run['seeds'])} seeds", loc="left")
        left.set_xlabel("speed-up over the full model, batch 32")
        left.set_ylabel("accuracy on dev, %")
        right.set_xscale("log", base=2)
        right.set_xticks(SIZES, [str(size) for size in SIZES])
        right.set_ylim(bottom=0)
        right.set_xlabel("batch size")
        right.set_ylabel("speed-up over the full model")
        for axes in (left, right):
            axes.legend(frameon=False)
        return plots.png(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where something that was to be reached is missed."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(prog="python -m bench.early_exit", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of train.tsv, dev.tsv and labels.txt"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=recipe.epochs, help="of each stage")
    parser.add_argument("--limit", type=positive, help="training rows (default: all)")
    parser.add_argument(
        "--held-out", type=positive, default=1000, help="training rows to choose the speed on"
    )
    parser.add_argument("--max-drop", type=float, default=0.0, help="points of accuracy that these may cost")
    parser.add_argument("--fp32", action="store_true", help="train without bfloat16")
    parser.add_argument(
        "--budget", type=float, default=20.0, help="seconds for each kind of timing, of a seed"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the models, the JSON and the figure")
    options = parser.parse_args(arguments)
    if options.epochs <= 0:
        parser.error(f"--epochs must be above 0, got {options.epochs:g}")

    recipe = replace(recipe, epochs=options.epochs, bfloat16=not options.fp32)
    task = read_task(options.data, options.held_out, options.limit)
    options.out.mkdir(parents=True, exist_ok=True)
    described = {
        name: {"rows": len(rows), "tokens": rows.tokens}
        for name, rows in (("train", task.train), ("selection", task.selection), ("dev", task.dev))
    }
    sizes = ", ".join(
        f"{name} {d['rows']} rows of {d['tokens'] / d['rows']:.1f} tokens" for name, d in described.items()
    )
    print(f"model  {DEFAULT_MODEL}, {torch.get_num_threads()} threads\ntext   {task.name}: {sizes}\n")
    seeds = {}
    for seed in dict.fromkeys(options.seeds):
        models = trained(task, seed, recipe, options.limit, options.out)
        seeds[str(seed)] = run_seed(task, models, options)
    run = {
        "task": task.name,
        "labels": task.label_names,
        "model": DEFAULT_MODEL,
        "machine": machine(CPU),
        "recipe": asdict(recipe),
        "limit": options.limit,
        "max_drop": options.max_drop,
        "text": described,
        "seeds": seeds,
        "targets": targets(seeds),
    }
    print(report(run))
    name = f"early-exit-{task.name}"
    for suffix, content in (("json", json.dumps(run, indent=1).encode()), ("png", draw(run))):
        path = options.out / f"{name}.{suffix}"
        write_whole(path, content)
        print(f"wrote {path}")
    missed = [name for name, target in run["targets"].items() if not target["met"]]
    if missed:
        print(f"missed: {'; '.join(missed)}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
