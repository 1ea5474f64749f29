"""``python -m bertops bench``: the benchmarks under pytest with a progress bar, then the report."""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TextIO

import pytest
import torch
from tqdm import tqdm

from bench import report
from bench.run import RUN

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "out"


def run(options: argparse.Namespace) -> int:
    """Returns pytest's exit status: not 0 where a figure of bertops is missing."""
    if options.threads:
        torch.set_num_threads(options.threads)
    out = (options.out or OUT).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, os.fdopen(os.dup(2), "w") as terminal:
        measured = Path(scratch) / "bench.json"
        progress = Progress(terminal)
        status = pytest.main(pytest_arguments(options, measured), plugins=[progress])
        progress.close()
        if not measured.exists():
            print("\n".join(progress.problems) or f"pytest ended with {status}", file=sys.stderr)
            return int(status) or 1
        data = json.loads(measured.read_text())
    print(report.table(data["bertops"]))
    for path in report.write(data, out):
        print(f"wrote {path}")
    print("\n".join(progress.problems), file=sys.stderr, end="")
    return int(status)


def pytest_arguments(options: argparse.Namespace, measured: Path) -> list[str]:
    arguments = [str(path) for path in sorted((ROOT / "bench").glob("bench_*.py"))]
    arguments += [f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-qq"]
    arguments += [
        "--no-summary",
        "--benchmark-quiet",
        f"--benchmark-json={measured}",
        f"--impl={options.impl}",
    ]
    for scope in ("quick", "lengths"):
        if getattr(options, scope):
            arguments.append(f"--{scope}")
    for name, value in (("device", options.device), ("model", options.model), ("text", options.text)):
        if value is not None:
            arguments.append(f"--{name}={value}")
    if options.only:
        arguments += ["-k", options.only]
    return arguments


class Progress:
    """A pytest plugin: a bar over all items in place of pytest's lines, on a stream it does not capture."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.bar: tqdm | None = None
        self.problems: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        layout = "{percentage:3.0f}% {bar:24} {n_fmt}/{total_fmt} {elapsed} {desc}"
        self.bar = tqdm(total=len(session.items), file=self.stream, bar_format=layout, dynamic_ncols=True)
        session.config.stash[RUN].step = self.step

    def step(self, text: str) -> None:
        if self.bar is not None:
            self.bar.set_description_str(text)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.problems.append(f"{report.nodeid}: {report.longreprtext}")
        if report.when == "teardown" and self.bar is not None:
            self.bar.update()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.problems.append(f"{report.nodeid}: {report.longreprtext}")

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str]:
        return report.outcome, "", ""

    def close(self) -> None:
        if self.bar is not None:
            self.bar.set_description_str("")
            self.bar.close()
