"""Options, one item per (case, mode, provider), and the results that all benchmarks of a run share."""

from collections.abc import Callable
from typing import Any

import pytest

from bench.measure import Result
from bench.paired import replay_clock
from bench.run import RUN, Run
from bertops._backend import IMPLEMENTATIONS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bertops bench")
    group.addoption("--quick", action="store_true", help="a few shapes, four to five minutes on two cores")
    group.addoption("--lengths", action="store_true", help="the losses alone, over N = 128 to 16384")
    group.addoption("--device", help="cpu or cuda; default: cuda where there is a GPU")
    group.addoption(
        "--impl", default="auto", help="implementation of bertops: auto, cpu, triton, cuda, reference"
    )
    group.addoption(
        "--model", help="folder or hub id of a BERT checkpoint; default: the installed all-MiniLM-L6-v2"
    )
    group.addoption("--text", help="folder of .txt files; default: docstrings of the Python standard library")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RUN] = Run(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "result" not in metafunc.fixturenames:
        return
    run = metafunc.config.stash[RUN]
    op = metafunc.module.op(run.impl)
    known = run.impl == "auto" or run.impl in IMPLEMENTATIONS[op.name]
    items = [
        pytest.param((op, case, mode, provider.name), id=f"{case.id}-{mode}-{provider.name}")
        for case in (op.cases(run.scope, run.device.type) if known else ())
        for mode in case.modes
        for provider in op.providers
        if provider.applies(case)
    ]
    metafunc.parametrize("result", items, indirect=True)


@pytest.fixture
def result(request: pytest.FixtureRequest) -> Result:
    return request.config.stash[RUN].result(*request.param)


@pytest.fixture
def show(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Result], None]:
    """Hands a result to pytest-benchmark; one without figures is skipped, or fails where it is our own."""
    run = request.config.stash[RUN]

    def show_result(result: Result) -> None:
        if result.status != "ok":
            reason = f"{result.provider}: {result.status}: {result.reason}"
            if result.provider.startswith("bertops"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
        benchmark.group = request.node.name.rpartition("-")[0]
        benchmark.extra_info.update(result.as_dict(run.limits), machine=run.machine)
        del benchmark.extra_info["seconds"]
        replay_clock.record(benchmark, result.seconds)

    return show_result


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["bertops"] = config.stash[RUN].machine


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    output_json["bertops"] = config.stash[RUN].as_dict()
