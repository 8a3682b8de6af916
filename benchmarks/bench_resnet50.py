"""End to end, so of no operation alone: a training step of a ResNet-50 with each gate, on the CPU and on a GPU."""

import functools
from typing import Any

import harness
import pytest
import reporting
from reporting import replayed
from resnet50_cases import COMPILED, GATES, PROVIDERS, SHARE, WITHOUT, Resnet50Case, Step, check

WHICH = "training step"
CPU_SIZE, QUICK_SIZE, GPU_SIZE = (2, 96), (2, 64), (64, 224)  # batch, side
GPU_COMPILED = 2  # cases that torch.compile takes part in


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    device = "cuda" if metafunc.function is test_gpu else "cpu"
    size = QUICK_SIZE if quick else GPU_SIZE if device == "cuda" else CPU_SIZE
    cases = [Resnet50Case(gate, *size, device) for gate in list(GATES)[: 1 if quick else None]]
    if device == "cuda":
        reporting.compiled_cases.update(cases[:GPU_COMPILED])
    metafunc.parametrize(
        ("case", "provider"),
        [
            pytest.param(case, name, id=f"{case}-{name}".replace(" ", "-"))
            for case in cases
            for name in PROVIDERS[device]
            if not (quick and COMPILED in name)
        ],
    )


@functools.lru_cache(maxsize=1)
def measured(case: Resnet50Case, compiled: bool, budget: float) -> dict[str, list[float]]:
    """Seconds of every provider's step, taken in turn."""
    steps = case.steps(compiled)
    check(steps)

    def work(step: Step) -> harness.Work:
        return lambda: None, lambda _: step()

    works, clock = {name: work(step) for name, step in steps.items()}, reporting.clock_of(case.device)
    return harness.interleaved(works, clock, harness.rounds_within(works, clock, budget), warmup=0)


def report(benchmark: Any, case: Resnet50Case, provider: str, compiled: bool, budget: float) -> None:
    """Report one provider: its time, and what the gates are of it."""
    group = "gpu" if case.device == "cuda" else "cpu"
    benchmark.group = f"{group}/{WHICH}, {case}"
    fields = {**case.fields(), "pass": WHICH, "provider": provider}
    if COMPILED in provider and not compiled:
        pytest.skip("compiled in other cases")
    if group == "gpu":
        if harness.only_compiles:
            if COMPILED in provider:
                Step(case, provider).values()
            pytest.skip("nothing is timed")
        reporting.skip_known(group, fields)
        if harness.time_box.is_spent():
            pytest.skip("the time box is spent")
    results = measured(case, compiled, budget)
    fields |= reporting.timed_fields(benchmark, results, provider)
    if not provider.startswith(WITHOUT):
        without = results[f"{WITHOUT}, {COMPILED}" if COMPILED in provider else WITHOUT]
        fields[SHARE] = round(100 * (1 - harness.summary(without)["median_us"] / fields["median_us"]), 1)
    reporting.note(benchmark, group, **fields)


@replayed
@pytest.mark.usefixtures("threads")
def test_cpu(benchmark: Any, quick: bool, case: Resnet50Case, provider: str) -> None:
    report(benchmark, case, provider, not quick, budget=0.5 if quick else 30)


@pytest.mark.gpu
@replayed
def test_gpu(benchmark: Any, quick: bool, case: Resnet50Case, provider: str) -> None:
    report(benchmark, case, provider, not quick and case in reporting.compiled_cases, budget=5)
