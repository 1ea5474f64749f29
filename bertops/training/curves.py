"""Draws losses and held-out metrics over the steps."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

NOT_CURVES = ("step", "tokens_per_second", "seconds")


def draw(lines: Sequence[dict[str, Any]], baselines: Mapping[str, float]) -> bytes:
    """A PNG with a panel for every number in the lines of ``metrics.jsonl``.

    What training and evaluation both have, such as a loss, shares a panel; a baseline is a dashed line there.
    """
    trained: dict[str, list[tuple[int, float]]] = {}
    held_out: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        curves, numbers = (held_out, line["evaluation"]) if "evaluation" in line else (trained, line)
        for name, value in numbers.items():
            if name not in NOT_CURVES:
                curves.setdefault(name, []).append((line["step"], value))
    names = [*trained, *(name for name in held_out if name not in trained)]
    rows = max(1, -(-len(names) // 2))
    figure = Figure(figsize=(9, 2.8 * rows), dpi=110)
    figure.subplots_adjust(0.08, 0.18 / rows, 0.98, 1 - 0.12 / rows, hspace=0.45)
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, 2, place)
        if name in trained:
            axes.plot(*zip(*trained[name], strict=True), color="#9aa5b1", linewidth=1, label="training")
        if name in held_out:
            points = zip(*held_out[name], strict=True)
            axes.plot(*points, color="#0b6e4f", linewidth=2, marker="o", markersize=3, label="held out")
        if name in baselines:
            axes.axhline(baselines[name], color="#c98f3c", linestyle="--", linewidth=1, label="baseline")
        if name in held_out or name in baselines:
            axes.legend(frameon=False)
        axes.set_title(name.replace("_", " "), loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
