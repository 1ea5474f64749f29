"""The figures: time relative to bertops and peak memory for every comparison, and both over length."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

COLORS = {
    "bertops": "#0b6e4f",
    "bertops, no mask": "#8cc9b0",
    "eager": "#9aa5b1",
    "compiled eager": "#c98f3c",
    "chunked eager": "#4a76b8",
    "SDPA": "#4a76b8",
    "SDPA cuDNN": "#4a76b8",
    "SDPA flash": "#4a76b8",
    "SDPA efficient": "#4a76b8",
    "SDPA + scores": "#4a76b8",
    "FlexAttention": "#a65a8c",
    "eager Gram": "#a65a8c",
    "Liger": "#a65a8c",
    "eager + argmax": "#4a76b8",
    "torch.distributions": "#4a76b8",
    "index_select": "#9aa5b1",
    "boolean index": "#4a76b8",
    "cosine_similarity": "#4a76b8",
}
TIMES = "\N{MULTIPLICATION SIGN}"
INK, QUIET = "#1d2733", "#66727f"
LABEL_POINTS = 10.0
MIN_LENGTHS = 4  # a curve over fewer says nothing
MODE_NAMES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
STYLE: Any = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#cdd4da",
    "axes.labelcolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 150,
}
LONGEST_BAR = 8.0  # times bertops; beyond it the bar is cut and only its label tells
BASE_LINE = {"color": COLORS["bertops"], "linewidth": 0.8, "alpha": 0.6}
BAR_IN, BLOCK_IN, MARGIN_IN = 0.21, 0.42, 1.15  # inches


def draw(run: dict[str, Any]) -> dict[str, bytes]:
    """PNG files by name: ``<op>-<mode>``, and ``<op>-<mode>-over-length`` where there are enough lengths."""
    figures = {}
    with plt.rc_context(STYLE):
        for op, mode in dict.fromkeys((c["op"], c["mode"]) for c in run["comparisons"]):
            comparisons = [c for c in run["comparisons"] if (c["op"], c["mode"]) == (op, mode)]
            curves = find_curves(comparisons)
            on_curves = [id(c) for curve in curves.values() for c in curve]
            blocks = [c for c in comparisons if id(c) not in on_curves]
            machine = (
                run["machine"].get("gpu", "") if run["limits"]["device"] == "cuda" else run["machine"]["cpu"]
            )
            title = f"{op}, {MODE_NAMES[mode]}"
            if blocks:
                figures[f"{op}-{mode}"] = png(bars(title, machine, blocks))
            if curves:
                figures[f"{op}-{mode}-over-length"] = png(lines(title, machine, curves))
    return figures


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def bars(title: str, machine: str, comparisons: Sequence[dict[str, Any]]) -> Figure:
    """A block for every comparison: relative time on the left, peak extra memory on the right."""
    count = sum(len(c["results"]) for c in comparisons)
    height = count * BAR_IN + len(comparisons) * BLOCK_IN + MARGIN_IN
    figure, (time_axes, memory_axes) = plt.subplots(
        1, 2, figsize=(10, height), sharey=True, gridspec_kw={"width_ratios": [1.7, 1]}
    )
    figure.subplots_adjust(left=0.13, right=0.93, wspace=0.16, top=1 - 0.62 / height, bottom=0.5 / height)
    figure.text(0.015, 1 - 0.24 / height, title, fontsize=13, fontweight="bold")
    figure.text(0.015, 1 - 0.44 / height, machine, color=QUIET)
    y, places, names = -BLOCK_IN / 3, [], []
    for comparison in comparisons:
        y += BLOCK_IN
        time_axes.text(
            0,
            y - 0.13,
            comparison["title"],
            transform=time_axes.get_yaxis_transform(),
            fontweight="bold",
            va="center",
        )
        for result in comparison["results"]:
            y += BAR_IN
            places.append(y - BAR_IN / 4)
            names.append(result["provider"])
            draw_bar(time_axes, memory_axes, places[-1], result)
        time_axes.vlines(1, y - (len(comparison["results"]) - 0.25) * BAR_IN, y + BAR_IN / 4, **BASE_LINE)
    time_axes.set_ylim(y + BAR_IN, 0)
    time_axes.set_yticks(places, names)
    for axes in (time_axes, memory_axes):
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlim(left=0)
        axes.margins(x=0.2)
    time_axes.set_xlim(0, min(LONGEST_BAR, time_axes.dataLim.x1) * 1.25 or 1)
    time_axes.set_xlabel("time relative to bertops (1 = bertops, shorter is faster)")
    memory_axes.set_xlim(0, memory_axes.dataLim.x1 * 1.3 or 1)
    memory_axes.set_xlabel("peak extra memory, MB")
    return figure


def draw_bar(time_axes: Axes, memory_axes: Axes, y: float, result: dict[str, Any]) -> None:
    color = COLORS[result["provider"]]
    if result["status"] != "ok":
        text = result["status"] if result["status"] == "wrong" else f"{result['status']}: {result['reason']}"
        ink = "#b3261e" if result["status"] in ("wrong", "failed") else QUIET
        time_axes.text(0.04, y, text[:70], color=ink, va="center", style="italic")
        return
    milliseconds = result["time"]["median"] * 1e3
    time = f"{milliseconds:.1f} ms" if milliseconds >= 1 else f"{milliseconds * 1e3:.3g} µs"
    ratio = result["ratio"]
    if ratio is None:
        time_axes.text(0.04, y, time, va="center")
    else:
        length = min(ratio["median"], LONGEST_BAR)
        time_axes.barh(y, length, BAR_IN * 0.78, color=color)
        if ratio["median"] > LONGEST_BAR:
            time_axes.barh(y, 0.08, BAR_IN * 0.8, left=LONGEST_BAR * 0.93, color="white")  # a cut
        else:
            time_axes.hlines(y, ratio["low"], min(ratio["high"], LONGEST_BAR), color=INK, linewidth=0.8)
        label = time if result["provider"] == "bertops" else f"{ratio['median']:.2f}{TIMES}  {time}"
        end = min(max(length, ratio["high"]), LONGEST_BAR)
        time_axes.annotate(label, (end, y), (4, 0), textcoords="offset points", va="center")
    if result["extra_bytes"] is not None:
        megabytes = result["extra_bytes"] / 1e6
        memory_axes.barh(y, megabytes, BAR_IN * 0.78, color=color)
        memory_axes.annotate(
            f"{megabytes:,.1f}", (megabytes, y), (4, 0), textcoords="offset points", va="center"
        )


Curves = dict[str, list[dict[str, Any]]]


def find_curves(comparisons: Sequence[dict[str, Any]]) -> Curves:
    """Comparisons that differ in length and batch alone, by what they have in common."""
    curves: Curves = {}
    for comparison in comparisons:
        if comparison["curve"]:
            curves.setdefault(comparison["curve"], []).append(comparison)
    return {common: curve for common, curve in curves.items() if len(curve) >= MIN_LENGTHS}


def lines(title: str, machine: str, curves: Curves) -> Figure:
    """A row for every curve: time on the left, peak extra memory on the right, both over length."""
    figure, grid = plt.subplots(len(curves), 2, figsize=(10, 3.3 * len(curves) + 0.7), squeeze=False)
    height = figure.get_figheight()
    figure.text(0.015, 1 - 0.1 / height, title, fontsize=13, fontweight="bold", va="top")
    figure.text(0.015, 1 - 0.36 / height, machine, color=QUIET, va="top")
    labels = []
    for (time_axes, memory_axes), (common, comparisons) in zip(grid, curves.items(), strict=True):
        time_axes.set_title(common, loc="left", fontsize=10)
        times = points(comparisons, lambda result: result["time"]["median"] * 1e3)
        megabytes = points(comparisons, lambda result: (result["extra_bytes"] or 0) / 1e6)
        labels.append((time_axes, line_panel(time_axes, comparisons, times, "time, ms")))
        labels.append((memory_axes, line_panel(memory_axes, comparisons, megabytes, "peak extra memory, MB")))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.6 / height))
    for axes, ends in labels:
        label_ends(axes, ends)
    return figure


Points = dict[str, list[tuple[int, float]]]


def points(comparisons: Sequence[dict[str, Any]], figure: Callable[[dict[str, Any]], float]) -> Points:
    """(N, ``figure`` of the result) of every provider that has one above 0."""
    found: Points = {}
    for comparison in sorted(comparisons, key=lambda comparison: comparison["case"]["length"]):
        for result in comparison["results"]:
            if result["status"] == "ok" and figure(result) > 0:
                found.setdefault(result["provider"], []).append(
                    (comparison["case"]["length"], figure(result))
                )
    return found


def line_panel(
    axes: Axes, comparisons: Sequence[dict[str, Any]], found: Points, unit: str
) -> dict[str, tuple[float, float]]:
    """Returns where every line ends."""
    for provider, line in found.items():
        width = 2.2 if provider.startswith("bertops") else 1.3
        axes.plot(*zip(*line, strict=True), color=COLORS[provider], lw=width, marker="o", markersize=3)
    lengths = sorted(comparison["case"]["length"] for comparison in comparisons)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xlim(lengths[0] * 0.9, lengths[-1] * (lengths[-1] / lengths[0]) ** 0.33)
    axes.set_xlabel(length_label(comparisons))
    axes.set_ylabel(unit)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter("")
    return {provider: line[-1] for provider, line in found.items()}


def length_label(comparisons: Sequence[dict[str, Any]]) -> str:
    tokens = [comparison["case"]["batch"] * comparison["case"]["length"] for comparison in comparisons]
    beyond = "" if max(tokens) == min(tokens) else ", then B = 1"
    return f"length N, B·N = {min(tokens):,}{beyond}"


def label_ends(axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Names every curve where it ends; names that would overlap move up."""
    lowest = float("-inf")
    for provider, (x, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        own = axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi  # points
        place = max(own, lowest + LABEL_POINTS)
        lowest = place
        axes.annotate(
            provider,
            (x, y),
            (6, place - own),
            textcoords="offset points",
            va="center",
            color=COLORS[provider],
            fontsize=8,
        )
