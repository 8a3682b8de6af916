"""Window attention: bytes and memory counted, compilation, host overhead, and time on the CPU and on a GPU."""

import functools
from typing import Any

import group_attention_cases
import harness
import pytest
import reporting
import torch
from reporting import replayed
from window_attention_cases import PROVIDERS, WindowCase

OP = WindowCase.op

CPU_CASES = (  # name, kind
    ("Swin-T, 56", "shift"),
    ("Swin-T, 56", ""),
    ("Swin-T, 28", "shift"),
    ("Swin-T, 14", "shift"),
    ("Swin-T, 7", ""),
    ("Swin-B, 56", "shift"),
    ("MaxViT-T, 56", ""),
    ("MaxViT-T, 56", "grid"),
)
QUICK_CPU_CASES = (
    WindowCase("quick", 2, 6, 6, 2, 8, window=3),
    WindowCase("quick", 2, 6, 6, 2, 8, window=3, shift=1),
    WindowCase("quick", 2, 6, 6, 2, 8, window=3, dilation=2),
    WindowCase("quick", 2, 6, 6, 2, 8, window=3, shift=1, table=False),
)

GPU_COMPILED = 2  # cases that torch.compile and FlexAttention take part in
GPU_CASES = (  # the most telling first: a time box cuts off the last
    ("Swin-T, 56", "shift", "bf16"),  # 8192 windows
    ("Swin-T, 56", "", "bf16"),
    ("MaxViT-T, 56", "grid", "bf16"),
    ("Swin-T, 56", "shift", "fp32"),
    ("Swin-T, 28", "shift", "bf16"),
    ("Swin-T, 14", "shift", "bf16"),
    ("Swin-T, 7", "", "bf16"),
    ("MaxViT-T, 56", "", "bf16"),
    ("Swin-B, 56", "shift", "bf16"),
    ("Swin-B, 28", "shift", "bf16"),
    ("Swin-B, 14", "shift", "bf16"),
    ("Swin-B, 7", "", "bf16"),
    ("MaxViT-T, 28", "grid", "bf16"),
    ("MaxViT-T, 14", "grid", "bf16"),
    ("MaxViT-T, 28", "", "bf16"),
    ("MaxViT-T, 56", "grid", "fp32"),
    ("Swin-T, 56", "shift", "fp16"),
)

IO_CASES = (
    WindowCase("Swin", 1, 28, 28, 2, 32, table=False),
    WindowCase("Swin", 1, 28, 28, 2, 32, shift=3),
    WindowCase("MaxViT", 1, 28, 28, 2, 32, dilation=4),
)
QUICK_IO_CASES = (WindowCase("quick", 1, 6, 6, 2, 16, window=3, shift=1),)
MARGIN = 1.05  # times the fewest bytes of a forward

AOT_KINDS = ((3, True, "bf16"), (0, False, "bf16"), (3, True, "fp32"))


# overhead: the host's part of one call. Timing comes first, before a profiler or compiler has changed the process.


@functools.lru_cache
def overheads(which: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a call on a map so small that nothing but calls costs."""
    case = WindowCase("tiny", 1, 4, 4, 2, 16, window=4)
    return reporting.time_calls(group_attention_cases.overhead_calls(case, which), rounds)


@replayed
@pytest.mark.parametrize("threads", [1], indirect=True)  # waiting for a second thread is no work of the host's
@pytest.mark.parametrize("provider", ["operators", "attnk", "tutorial", "sdpa"])
@pytest.mark.parametrize("which", group_attention_cases.OVERHEAD_PASSES)
def test_overhead(benchmark: Any, quick: bool, threads: int, which: str, provider: str) -> None:
    benchmark.group = f"overhead/{which}, attention in a window of 16 tokens on the CPU, 1 thread"
    reporting.report_overhead(benchmark, OP, which, provider, overheads(which, 5 if quick else 40))


# cpu and gpu: time


def cpu_cases(quick: bool) -> list[WindowCase]:
    return list(QUICK_CPU_CASES) if quick else [WindowCase.named(*kind) for kind in CPU_CASES]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    if metafunc.function is test_cpu:
        reporting.timed_cases(metafunc, cpu_cases(quick), ("forward", "training"), PROVIDERS["cpu"])
    elif metafunc.function is test_gpu:
        cases = [WindowCase.named(*kind, device="cuda") for kind in GPU_CASES]
        cases = cases[: 1 if quick or not torch.cuda.is_available() else None]
        reporting.compiled_cases.update(cases[:GPU_COMPILED])
        reporting.timed_cases(metafunc, cases, harness.PASSES, PROVIDERS["cuda"])


@replayed
@pytest.mark.usefixtures("threads")
def test_cpu(benchmark: Any, quick: bool, case: WindowCase, which: str, provider: str) -> None:
    reporting.time_one(benchmark, case, which, provider, not quick, budget=0.2 if quick else 2.5)


@pytest.mark.gpu
@replayed
def test_gpu(benchmark: Any, quick: bool, case: WindowCase, which: str, provider: str) -> None:
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
        assert found["attnk"]["forward"] <= MARGIN * case.minimal_bytes("forward")


# memory: the peak of what is allocated


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("provider", ["tutorial", "sdpa", "attnk"])
@pytest.mark.parametrize("which", ["forward", "training"])
def test_memory(benchmark: Any, quick: bool, which: str, provider: str) -> None:
    benchmark.group = f"memory/window attention {which} (counted: see the table at the end, this is the time it took)"
    for case in cpu_cases(quick):
        reporting.report_memory(benchmark, case, provider, which)


# aot: what compiling shows


@pytest.mark.parametrize("architecture", reporting.ARCHITECTURES)
@pytest.mark.parametrize(("shift", "table", "dtype"), AOT_KINDS)
def test_aot(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, quick: bool, shift: int, table: bool, dtype: str,
    architecture: str,
) -> None:  # fmt: skip
    case = WindowCase("aot", 2, 56, 56, 4, 32, dtype, shift=shift, table=table)
    benchmark.group = f"aot/windows of 49, D 32 {dtype} {case.extra} (time to compile all kernels)"
    reporting.needs_compiler()
    if quick and (architecture, shift, table, dtype) != ("sm_90", *AOT_KINDS[0]):
        pytest.skip("--quick")
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    chosen = group_attention_cases.launches(case, architecture)[: 1 if quick else None]
    if not chosen:
        pytest.skip("goes to softmax attention's kernels")
    fields = {"case": "windows of 49, D 32", "dtype": dtype, "extra": case.extra}
    reporting.report_aot(benchmark, OP, chosen, architecture, kernels="group_attention", **fields)
