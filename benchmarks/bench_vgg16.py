"""Whole networks, so of no operation alone: the tutorials' VGG16 with attention, its time and its memory."""

import functools
from typing import Any

import harness
import pytest
import reporting
import resnet50_cases
from reporting import replayed
from vgg16_cases import COMPILED, KINDS, PASSES, PROVIDERS, Step, VGG16Case

CPU_SIZE, QUICK_SIZE, GPU_SIZE = (2, 224), (2, 32), (32, 224)  # batch, side
QUICK_WIDTH = 8


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    device = "cuda" if metafunc.function is test_gpu else "cpu"
    size = QUICK_SIZE if quick else GPU_SIZE if device == "cuda" else CPU_SIZE
    cases = [VGG16Case(kind, *size, device, QUICK_WIDTH if quick else 64) for kind in KINDS]
    if device == "cuda":
        reporting.compiled_cases.update(cases)
    metafunc.parametrize(
        ("case", "which", "provider"),
        [
            pytest.param(case, which, name, id=f"{case}-{which}-{name}".replace(" ", "-"))
            for case in cases
            for which in PASSES
            for name in PROVIDERS[device]
            if not (COMPILED in name and (quick or metafunc.function is test_memory))
        ],
    )


@functools.lru_cache(maxsize=1)
def ready(case: VGG16Case, compiled: bool) -> dict[str, Step]:
    """What the providers run, after a check that they compute the same."""
    steps = case.steps(compiled)
    resnet50_cases.check(steps)
    return steps


@functools.lru_cache(maxsize=1)
def measured(case: VGG16Case, which: str, compiled: bool, budget: float) -> dict[str, list[float]]:
    """Seconds of every provider's pass, taken in turn."""

    def work(step: Step) -> harness.Work:
        return lambda: None, lambda _: step.run(which)

    works = {name: work(step) for name, step in ready(case, compiled).items()}
    clock = reporting.clock_of(case.device)
    return harness.interleaved(works, clock, harness.rounds_within(works, clock, budget), warmup=0)


def report(benchmark: Any, case: VGG16Case, which: str, provider: str, compiled: bool, budget: float) -> None:
    """Report one provider's time."""
    group = "gpu" if case.device == "cuda" else "cpu"
    benchmark.group = f"{group}/{which}, {case}"
    fields = {**case.fields(), "pass": which, "provider": provider}
    if group == "gpu":
        if harness.only_compiles:
            if COMPILED in provider and which != "forward":
                Step(case, provider).values()
            pytest.skip("nothing is timed")
        reporting.skip_known(group, fields)
        if harness.time_box.is_spent():
            pytest.skip("the time box is spent")
    fields |= reporting.timed_fields(benchmark, measured(case, which, compiled, budget), provider)
    reporting.note(benchmark, group, **fields)


@replayed
@pytest.mark.usefixtures("threads")
def test_cpu(benchmark: Any, quick: bool, case: VGG16Case, which: str, provider: str) -> None:
    report(benchmark, case, which, provider, not quick, budget=0.5 if quick else 60)


def test_memory(benchmark: Any, quick: bool, case: VGG16Case, which: str, provider: str) -> None:
    benchmark.group = f"memory/{which}, {case}"
    peak = benchmark.pedantic(ready(case, False)[provider].peak_memory, args=(which,), rounds=1)
    peaks = {"peak_S": round(peak / case.size, 3), "peak_mib": round(peak / 2**20, 2)}
    reporting.note(benchmark, "memory", **case.fields(), **{"pass": which, "provider": provider}, **peaks)


@pytest.mark.gpu
@replayed
def test_gpu(benchmark: Any, quick: bool, case: VGG16Case, which: str, provider: str) -> None:
    report(benchmark, case, which, provider, not quick, budget=5)
