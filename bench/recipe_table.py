"""What :mod:`bench.recipes` measured as rows over seeds, as a Markdown table and as a figure."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt

from bench import plots

BASE = "no teacher"  # the row that the others are compared with
TIMES = ("latency_ms", "texts_per_second")
COLUMNS = (
    "method",
    "starts from",
    "accuracy, %",
    f"beside {BASE}",
    "parameters",
    "latency, ms",
    "texts/s",
    "updates",
    "training, s",
)


def titles(name: str, speeds: Sequence[float | None]) -> list[tuple[str, float | None]]:
    """A row's name for every speed."""
    return [(name if speed is None else f"{name}, speed {speed:g}", speed) for speed in speeds]


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and the standard deviation of a sample where there is more than one."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def paired(values: Mapping[Any, float], base: Mapping[Any, float]) -> dict[str, float | None]:
    """Of the differences seed by seed: the mean and its standard error, std / sqrt(n)."""
    found = spread([values[seed] - base[seed] for seed in base])
    std = found["std"]
    return {"mean": found["mean"], "standard_error": None if std is None else std / len(base) ** 0.5}


def rows(
    methods: Sequence[Any], runs: Mapping[str, Mapping[int, Any]], times: Mapping[str, Any]
) -> list[Any]:
    """A row a method and speed, accuracies in per cent.

    Args:
        methods: with ``name``, ``start`` and ``speeds``.
        runs: what each method's run came to, by method and seed.
        times: ``latency_ms`` and ``texts_per_second`` by the row's name.
    """
    base = accuracies(runs[BASE], 0)
    made = []
    for method in methods:
        found = runs[method.name]
        for i, (title, _) in enumerate(titles(method.name, method.speeds)):
            by_seed = accuracies(found, i)
            comparable = by_seed.keys() == base.keys() and method.name != BASE
            made.append(
                {
                    "name": title,
                    "start": method.start,
                    "accuracy": by_seed,
                    **spread(list(by_seed.values())),
                    "paired": paired(by_seed, base) if comparable else None,
                    "parameters": next(iter(found.values()))["evaluations"][i]["parameters"],
                    "updates": next(iter(found.values()))["updates"],
                    "seconds": statistics.fmean(run["seconds"] for run in found.values()),
                    **times[title],
                }
            )
    return made


def accuracies(runs: Mapping[int, Any], evaluation: int) -> dict[int, float]:
    return {seed: 100 * run["evaluations"][evaluation]["accuracy"] for seed, run in runs.items()}


def with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.1f}" + ("" if error is None else f" \N{PLUS-MINUS SIGN} {error:.1f}")


def markdown(table: dict[str, Any]) -> str:
    """A table a task."""
    lines = []
    for name, task in table["tasks"].items():
        data, seeds = task["data"], len(table["settings"]["seeds"])
        lines += [
            f"{name}: {data['train']:,} texts to train on, {data['dev']:,} that measure, {seeds} seeds",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|---|---|{'---:|' * (len(COLUMNS) - 2)}",
        ]
        for row in task["rows"]:
            difference = row["paired"]
            cells = (
                row["name"],
                row["start"],
                with_error(row["mean"], row["std"]),
                "" if difference is None else with_error(*difference.values(), sign="+"),
                f"{row['parameters'] / 1e6:.1f} M",
                f"{row['latency_ms']:.2f}",
                f"{row['texts_per_second']:,.0f}",
                f"{row['updates']:,}",
                f"{row['seconds']:.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [f"{recipe} is not in it: {reason}." for recipe, reason in table["left_out"].items()]
    return "\n".join(lines)


def comparison(tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The largest relative difference of a loss between both implementations."""
    lines = []
    for name, recipes in tasks.items():
        lines += [
            f"{name}: relative difference of the losses, bertops against plain PyTorch, fp32",
            "",
            "| recipe | steps | first step | all steps |",
            "|---|---:|---:|---:|",
        ]
        for row in recipes:
            steps = " + ".join(map(str, row["steps"]))
            numbers = " | ".join(f"{row[key]:.1e}" for key in ("first_step", "all_steps"))
            lines.append(f"| {row['recipe']} | {steps} | {numbers} |")
        lines.append("")
    return "\n".join(lines)


def draw(table: dict[str, Any]) -> bytes:
    """Accuracy over the latency of one text, a panel a task; bars: the standard deviation over seeds."""
    tasks = table["tasks"]
    with plt.rc_context(plots.STYLE):
        figure, panels = plt.subplots(
            1, len(tasks), figsize=(5.5 * len(tasks), 4.2), squeeze=False, layout="constrained"
        )
        for axes, (name, task) in zip(panels[0], tasks.items(), strict=True):
            for row in task["rows"]:
                known = row["name"] in ("teacher", BASE)
                color = plots.COLORS["eager"] if known else plots.COLORS["bertops"]
                axes.errorbar(
                    row["latency_ms"],
                    row["mean"],
                    yerr=row["std"],
                    fmt="o",
                    color=color,
                    capsize=2,
                    markersize=4,
                )
            label(axes, task["rows"])
            axes.set_title(name, loc="left")
            axes.set_xlabel("latency of one text, ms (median)")
            axes.set_ylabel("accuracy on dev, %")
            axes.margins(x=0.3, y=0.15)
        return plots.png(figure)


def label(axes: Any, found: Sequence[Mapping[str, Any]]) -> None:
    """Names beside the points; those of a like latency are moved apart, each with a line to its point."""
    low, high = min(row["mean"] for row in found), max(row["mean"] for row in found)
    width = max(row["latency_ms"] for row in found)
    apart, placed = (high - low or 1) / 18, []
    for row in sorted(found, key=lambda row: row["mean"]):
        x, y = row["latency_ms"], row["mean"]
        near = [top for at, top in placed if abs(at - x) < 0.3 * width]
        y = max([y, *(top + apart for top in near)])
        placed.append((x, y))
        left = x > 0.6 * width  # no room on the right
        axes.annotate(
            row["name"],
            (x, row["mean"]),
            (x - 0.04 * width, y) if left else (x + 0.04 * width, y),
            ha="right" if left else "left",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": plots.QUIET, "linewidth": 0.4},
        )
