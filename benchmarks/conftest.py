"""Options, and the tables at the end: pytest-benchmark's own show nothing but time."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for harness, shapes and so on: the folder is not a package

import harness
import shapes
import tables


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attnk benchmarks")
    group.addoption("--quick", action="store_true", help="one small shape, no torch.compile: does everything run?")
    group.addoption("--results", type=Path, help="write the results to this JSON file")
    group.addoption("--resume", action="store_true", help="keep what that file has from a GPU, and measure the rest")
    group.addoption("--compile", action="store_true", help="time nothing on a GPU: fill the compilers' caches, with -n")
    group.addoption("--time-box", type=float, metavar="SECONDS", help="for timing on a GPU; 240 by default")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA or ROCm device; skipped without one")
    harness.busy_before = harness.percent_busy()
    option = config.option
    harness.only_compiles = option.compile
    if option.time_box is not None:
        harness.time_box.seconds = option.time_box
    if option.resume and option.results is not None and option.results.exists():
        known = harness.read_results(option.results)["records"]
        harness.RECORDS.extend(record for record in known if record["group"] == "gpu")
    if not any(argument.startswith("--benchmark-columns") for argument in config.invocation_params.args):
        option.benchmark_columns = ["median", "iqr", "rounds"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU, torch sees none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def threads(request: pytest.FixtureRequest, quick: bool) -> Iterator[int]:
    """How many threads PyTorch has during a test; with --quick one, which never waits for another."""
    before, wanted = torch.get_num_threads(), getattr(request, "param", 1 if quick else shapes.CPU_THREADS)
    torch.set_num_threads(wanted)
    yield wanted
    torch.set_num_threads(before)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not harness.RECORDS:
        return
    terminalreporter.section("attnk: what was counted and measured")
    for line in tables.all_tables(harness.RECORDS):
        terminalreporter.write_line(line)
    busy = harness.busy_before or 0
    if busy > 10 and any(record["group"] in ("cpu", "overhead") for record in harness.RECORDS):
        terminalreporter.write_line(
            f"Others kept {busy} % of the processor busy before this began: distrust its times."
        )


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A run that goes on where another stopped may be stopped itself: keep what there is."""
    option = item.config.option
    if option.resume and option.results is not None and harness.RECORDS:
        harness.write_results(option.results, harness.RECORDS, complete=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--results")
    if path is not None and harness.RECORDS:
        harness.write_results(path, harness.RECORDS, complete=not harness.time_box.spent and not session.testsfailed)
