"""Axial attention: bytes and memory counted, compilation, host overhead, and time on the CPU and on a GPU."""

import functools
from typing import Any

import group_attention_cases
import harness
import pytest
import reporting
import torch
from axial_attention_cases import GROWTH, PROVIDERS, AxialCase
from reporting import replayed

OP = AxialCase.op

CPU_CASES = (  # name, layout, dtype, memory
    ("map 56, 4 heads", "sum"),
    ("map 112, 4 heads", "sum"),
    ("map 56, 4 heads", "criss_cross"),
    ("map 112, 4 heads", "criss_cross"),
    ("map 56", "row"),
    ("map 56", "column"),
    ("Axial-DeepLab 56", "row", "fp32", "map"),
    ("Axial-DeepLab 112", "column", "fp32", "map"),
)
QUICK_CPU_CASES = (
    *(AxialCase("quick", 1, 4, 6, 2, 8, layout=layout) for layout in ("row", "column", "sum", "criss_cross")),
    AxialCase("quick", 1, 4, 6, 2, 8, layout="column", memory="map"),
)

GPU_COMPILED = 2  # cases that torch.compile and FlexAttention take part in
GPU_CASES = (  # the most telling first: a time box cuts off the last
    ("map 56", "row", "bf16"),
    ("map 56", "column", "bf16"),
    ("map 112", "row", "bf16"),
    ("map 112", "column", "bf16"),
    ("map 56", "sum", "bf16"),
    ("rows of 1024", "row", "bf16"),
    ("map 56", "column", "fp32"),
    ("map 56", "criss_cross", "bf16"),
    ("Axial-DeepLab 56", "column", "bf16", "map"),
    ("Axial-DeepLab 112", "column", "bf16", "map"),
    ("map 112", "sum", "bf16"),
    ("map 112", "criss_cross", "bf16"),
    ("Axial-DeepLab 56", "row", "bf16", "map"),
    ("Axial-DeepLab 112", "row", "bf16", "map"),
    ("map 56", "row", "fp32"),
    ("map 28", "column", "bf16"),
    ("map 14", "column", "bf16"),
    ("map 56", "row", "fp16"),
)

GROWTH_SIDES = (28, 40, 56, 80, 112, 160, 224)
QUICK_GROWTH_SIDES = (4, 8)

IO_CASES = tuple(AxialCase("maps", 1, 20, 28, 2, 32, layout=name) for name in ("row", "column", "sum", "criss_cross"))
QUICK_IO_CASES = tuple(AxialCase("quick", 1, 4, 6, 2, 16, layout=name) for name in ("column", "sum"))
MARGIN = 1.05  # times the fewest bytes, of a forward of one axis

AOT_KINDS = ((64, 32, "bf16"), (64, 64, "bf16"), (128, 32, "bf16"), (128, 64, "bf16"), (64, 32, "fp32"))


# overhead: the host's part of one call. Timing comes first, before a profiler or compiler has changed the process.


@functools.lru_cache
def overheads(which: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a call on a map so small that nothing but calls costs."""
    case = AxialCase("tiny", 1, 1, 8, 2, 16)
    return reporting.time_calls(group_attention_cases.overhead_calls(case, which), rounds)


@replayed
@pytest.mark.parametrize("threads", [1], indirect=True)  # waiting for a second thread is no work of the host's
@pytest.mark.parametrize("provider", ["operators", "attnk", "tutorial", "sdpa"])
@pytest.mark.parametrize("which", group_attention_cases.OVERHEAD_PASSES)
def test_overhead(benchmark: Any, quick: bool, threads: int, which: str, provider: str) -> None:
    benchmark.group = f"overhead/{which}, attention along a row of 8 tokens on the CPU, 1 thread"
    reporting.report_overhead(benchmark, OP, which, provider, overheads(which, 5 if quick else 40))


# cpu and gpu: time


def cpu_cases(quick: bool) -> list[AxialCase]:
    return list(QUICK_CPU_CASES) if quick else [AxialCase.named(*kind) for kind in CPU_CASES]


def growth_cases(quick: bool) -> list[AxialCase]:
    sides = QUICK_GROWTH_SIDES if quick else GROWTH_SIDES
    return [AxialCase(GROWTH, 1, side, side, 4, 32, layout="sum") for side in sides]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    if metafunc.function is test_cpu:
        reporting.timed_cases(metafunc, cpu_cases(quick), ("forward", "training"), PROVIDERS["cpu"])
    elif metafunc.function is test_cpu_growth:
        reporting.timed_cases(metafunc, growth_cases(quick), ("training",), ("tutorial", "attnk"))
    elif metafunc.function is test_gpu:
        cases = [AxialCase.named(*kind, device="cuda") for kind in GPU_CASES]
        cases = cases[: 1 if quick or not torch.cuda.is_available() else None]
        reporting.compiled_cases.update(cases[:GPU_COMPILED])
        reporting.timed_cases(metafunc, cases, harness.PASSES, PROVIDERS["cuda"])


@replayed
@pytest.mark.usefixtures("threads")
def test_cpu(benchmark: Any, quick: bool, case: AxialCase, which: str, provider: str) -> None:
    reporting.time_one(benchmark, case, which, provider, not quick, budget=0.2 if quick else 2.5)


@replayed
@pytest.mark.usefixtures("threads")
def test_cpu_growth(benchmark: Any, quick: bool, case: AxialCase, which: str, provider: str) -> None:
    """Time over the pixels n of the map, which is to follow n^1.5."""
    reporting.time_one(benchmark, case, which, provider, compiled=False, budget=0.2 if quick else 1.5)


@pytest.mark.gpu
@replayed
def test_gpu(benchmark: Any, quick: bool, case: AxialCase, which: str, provider: str) -> None:
    compiled = not quick and case in reporting.compiled_cases  # compiling takes longer than all the rest
    reporting.time_one(benchmark, case, which, provider, compiled, budget=0.3)


# io: bytes


@pytest.mark.parametrize("provider", ["tutorial", "torch.compile", "attnk"])
@pytest.mark.parametrize("number", range(len(IO_CASES)))
def test_io(benchmark: Any, quick: bool, number: int, provider: str) -> None:
    if quick and number >= len(QUICK_IO_CASES):
        pytest.skip("--quick")
    case = (QUICK_IO_CASES if quick else IO_CASES)[number]
    benchmark.group = f"io/{case} (counted: bytes stand in the table at the end, this is the time it took to count)"
    found = reporting.report_io(benchmark, case, provider, quick)
    if provider == "attnk":
        for which, moved in found["attnk"].items():
            formula = case.kernel_bytes(which, "attnk")
            assert moved == formula, f"{which}: {moved} bytes, by the formula {formula}"
        if len(case.axes) == 1:
            assert found["attnk"]["forward"] <= MARGIN * case.minimal_bytes("forward")


# memory: the peak of what is allocated


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("provider", ["tutorial", "sdpa", "attnk"])
@pytest.mark.parametrize("which", ["forward", "training"])
def test_memory(benchmark: Any, quick: bool, which: str, provider: str) -> None:
    benchmark.group = f"memory/axial attention {which} (counted: see the table at the end, this is the time it took)"
    for case in cpu_cases(quick):
        if not case.lacks(provider):
            reporting.report_memory(benchmark, case, provider, which)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("provider", ["tutorial", "attnk"])
def test_memory_growth(benchmark: Any, quick: bool, provider: str) -> None:
    """What forward and backward hold over the pixels n of the map: that of attnk grows with n."""
    benchmark.group = f"memory/{GROWTH} (counted: see the table at the end, this is the time it took)"
    cases = growth_cases(quick)
    peaks = [reporting.report_memory(benchmark, case, provider, "training") for case in cases]
    if provider == "attnk" and not quick:
        power = harness.exponent([(case.height * case.width, peak) for case, peak in zip(cases, peaks, strict=True)])
        assert power < 1.1, f"memory grows as n^{power:.2f}"


# aot: what compiling shows


@pytest.mark.parametrize("architecture", reporting.ARCHITECTURES)
@pytest.mark.parametrize(("tokens", "head_dim", "dtype"), AOT_KINDS)
def test_aot(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, quick: bool, tokens: int, head_dim: int, dtype: str,
    architecture: str,
) -> None:  # fmt: skip
    benchmark.group = f"aot/{tokens} tokens, D {head_dim} {dtype} (time to compile all kernels)"
    reporting.needs_compiler()
    if quick and (architecture, tokens, head_dim, dtype) != ("sm_90", *AOT_KINDS[0]):
        pytest.skip("--quick")
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    case = AxialCase("aot", 2, 8, tokens, 4, head_dim, dtype)
    chosen = group_attention_cases.launches(case, architecture)[: 1 if quick else None]
    if not chosen:
        pytest.skip("goes to softmax attention's kernels")
    fields = {"case": f"{tokens} tokens, D {head_dim}", "dtype": dtype, "extra": case.extra}
    reporting.report_aot(benchmark, OP, chosen, architecture, kernels="group_attention", **fields)
