"""From the results of a run to a table, plots and one HTML page with both; every file is written whole."""

import base64
import html
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bench import plots
from bench.measure import BASE
from bertops._files import write_whole

COLUMNS = ("provider", "time", "± IQR", "vs bertops", "rate", "of limit", "extra MB", "status")


def write(data: dict[str, Any], out: Path) -> list[Path]:
    """``data``: pytest-benchmark's JSON with ours under "bertops". Returns the files written into ``out``."""
    figures = plots.draw(data["bertops"])
    files = {f"{name}.png": png for name, png in figures.items()}
    files["bench.html"] = page(data, figures).encode()
    files["bench.json"] = json.dumps(data, indent=1).encode()
    for name, content in files.items():
        write_whole(out / name, content)
    return [out / name for name in files]


def table(run: dict[str, Any]) -> str:
    """For a terminal: what was measured on, the limits, a block for every comparison, then the overview."""
    lines = [*header(run), ""]
    for comparison in run["comparisons"]:
        lines.append(f"{comparison['op']} {comparison['mode']} · {comparison['title']}")
        *rest, status = zip(COLUMNS, *(cells(result) for result in comparison["results"]), strict=True)
        lines += [
            f"{line}  {last}" for line, last in zip(aligned(zip(*rest, strict=True)), status, strict=True)
        ]
        lines.append("")
    for title, rows in overview(run).items():
        lines += [title, *aligned(rows), ""]
    return "\n".join(lines)


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def overview(run: dict[str, Any]) -> dict[str, list[tuple[str, ...]]]:
    """A table for every op and mode, a row a case: bertops' figures, then the ratio of every peer."""
    tables = {}
    for op, mode in dict.fromkeys((c["op"], c["mode"]) for c in run["comparisons"]):
        comparisons = [c for c in run["comparisons"] if (c["op"], c["mode"]) == (op, mode)]
        by_name = [{result["provider"]: result for result in c["results"]} for c in comparisons]
        seen = {name for results in by_name for name in results if results[name]["status"] != "unavailable"}
        peers = [name for name in plots.COLORS if name in seen and name != BASE]
        rows = [("", BASE, "of limit", "extra MB", *peers)]
        for comparison, results in zip(comparisons, by_name, strict=True):
            _, time, _, _, _, share, extra, _ = cells(results[BASE])
            ratios = [overview_cell(results.get(name)) for name in peers]
            rows.append((comparison["title"], time, share, extra, *ratios))
        tables[f"{op}, {plots.MODE_NAMES[mode]}: times as long as {BASE}"] = rows
    return tables


def overview_cell(result: dict[str, Any] | None) -> str:
    if result is None or result["status"] != "ok":
        return "" if result is None else result["status"]
    return cells(result)[COLUMNS.index("vs bertops")]


def header(run: dict[str, Any]) -> Iterator[str]:
    for name, value in run["machine"].items():
        yield f"{name:7} {value}"
    for name, (value, how) in limit_rows(run["limits"]).items():
        yield f"limit   {name}: {value} ({how})"
    yield f"memory  peak beyond what was there before: {run['memory_method']}"
    if run["model"] is not None:
        yield f"model   {run['model']['name']} on {run['model']['text']}: {verdict(run['model'])}"


def verdict(model: dict[str, Any]) -> str:
    if model["right"] is None:
        return f"hidden states not compared: {model['reason']}"
    equal = "equal" if model["right"] else "DIFFER FROM"
    return (
        f"{model['states']} hidden states {equal} transformers', relative error {model['relative_error']:.1e}"
    )


def limit_rows(limits: dict[str, Any]) -> dict[str, tuple[str, str]]:
    how = limits["how"]
    rows = {"copy": (f"{limits['copy_bytes_per_s'] / 1e9:.0f} GB/s", how["copy"])}
    for dtype, rate in limits["flops_per_s"].items():
        rows[dtype] = (f"{rate / 1e9:,.0f} GFLOP/s", how[dtype])
    if limits["exps_per_s"] is not None:
        rows["exp"] = (f"{limits['exps_per_s'] / 1e9:,.1f} G/s", how["exp"])
    if limits["call_s"] is not None:
        rows["call"] = (f"{limits['call_s'] * 1e6:.1f} µs", how["call"])
    return rows


def cells(result: dict[str, Any]) -> tuple[str, ...]:
    """One row under COLUMNS; a result that is not ok has no figures."""
    if result["status"] != "ok":
        return (result["provider"], *("-",) * (len(COLUMNS) - 2), f"{result['status']}: {result['reason']}")
    time, ratio, extra = result["time"], result["ratio"], result["extra_bytes"]
    return (
        result["provider"],
        duration(time["median"]),
        f"{(time['high'] - time['low']) / time['median']:.0%}",
        f"{ratio['median']:.2f}{plots.TIMES}" if ratio else "-",
        rate(result),
        f"{result['share_of_limit']:.0%}",
        "-" if extra is None else f"{extra / 1e6:,.1f}",
        "ok",
    )


def rate(result: dict[str, Any]) -> str:
    """Of arithmetic; of exponentials where they are all that is counted, of bytes where there are none."""
    units = {"flops": "GFLOP/s", "exps": "Gexp/s", "bytes": "GB/s"}
    work = next(name for name in units if result["work"][name] or name == "bytes")
    billions = result[f"{work}_per_s"] / 1e9
    return f"{billions:,.1f} {units[work]}" if billions >= 1 else f"{billions:.2g} {units[work]}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def page(data: dict[str, Any], figures: dict[str, bytes]) -> str:
    run = data["bertops"]
    facts = [*run["machine"].items(), ("time", data["datetime"])]
    if run["model"] is not None:
        facts.append(("model", f"{run['model']['name']} on {run['model']['text']}: {verdict(run['model'])}"))
    facts.append(("memory", f"peak beyond what was there before: {run['memory_method']}"))
    images = "\n".join(
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in figures.items()
    )
    return PAGE.format(
        facts="".join(f"<dt>{html.escape(name)}<dd>{html.escape(str(value))}" for name, value in facts),
        limits="".join(
            f"<tr><td>{html.escape(name)}<td class=n>{html.escape(value)}<td>{html.escape(how)}"
            for name, (value, how) in limit_rows(run["limits"]).items()
        ),
        overview="\n".join(html_table(title, rows) for title, rows in overview(run).items()),
        images=images,
        tables="\n".join(comparison_table(comparison) for comparison in run["comparisons"]),
    )


def comparison_table(comparison: dict[str, Any]) -> str:
    title = (
        f"{comparison['op']} {comparison['mode']} · {comparison['title']} · checked: {comparison['checked']}"
    )
    kinds = [
        f"{'own' if result['provider'].startswith(BASE) else 'peer'} {result['status']}"
        for result in comparison["results"]
    ]
    return html_table(title, [COLUMNS, *(cells(result) for result in comparison["results"])], kinds)


def html_table(title: str, rows: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """``kinds``: the class of every row but the first, which is the head."""
    escaped = [[html.escape(cell) for cell in row] for row in rows]
    head, body = escaped[0], escaped[1:]
    lines = [f"<table><caption>{html.escape(title)}</caption><tr>{''.join(f'<th>{cell}' for cell in head)}"]
    for row, kind in zip_longest(body, kinds, fillvalue=""):
        figures = "".join(f"<td class=n>{cell}" for cell in row[1:])
        lines.append(f'<tr class="{kind}"><td>{row[0]}{figures}')
    return "".join(lines) + "</table>"


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>bertops bench</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1d2733 }}
body {{ max-width: 62rem; margin: 2.5rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.7rem; margin: 0 0 1rem }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .6rem }}
dl {{ display: grid; grid-template-columns: 6rem 1fr; gap: .15rem 1rem }}
dt {{ color: #66727f }} dd {{ margin: 0 }}
img {{ width: 100%; height: auto; margin: .5rem 0 1.5rem }}
table {{ border-collapse: collapse; width: 100%; margin: 0 0 1.8rem; font-size: 14px }}
caption {{ text-align: left; font-weight: 600; padding: .3rem 0 }}
th {{ text-align: right; font-weight: 500; color: #66727f }}
th {{ border-bottom: 1px solid #cdd4da; padding: .2rem .6rem }}
th:first-child, th:last-child, td:last-child {{ text-align: left }}
th:first-child, td:first-child {{ padding-left: 0 }}
td {{ padding: .2rem .6rem; border-bottom: 1px solid #eef0f2 }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
tr.own td {{ font-weight: 600 }} tr.wrong td, tr.failed td {{ color: #b3261e }}
tr.unavailable td {{ color: #8a949e }}
p {{ color: #46525e }}
</style>
<h1>bertops bench</h1>
<dl>{facts}</dl>
<h2>Limits of this machine, measured in this run</h2>
<table><tr><th>what<th>rate<th style="text-align:left">how{limits}</table>
<h2>Overview</h2>
{overview}
<h2>Plots</h2>
{images}
<h2>Every figure</h2>
<p>Times are medians over interleaved rounds. “vs bertops” is the median of the ratios within each round:
above 1&times; is slower than bertops. The rate (of arithmetic, exponentials or bytes, the first that the op
has) and the share of the limit count the least work that the call needs over real tokens, the same for every
provider. A provider whose result fails the check against the fp64 reference shows no number.</p>
{tables}
</html>
"""
