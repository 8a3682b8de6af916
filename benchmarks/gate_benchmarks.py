"""The tests of gates with a network inside: a benchmark file names its class of cases, GATE, and imports these."""

import functools
from typing import Any

import harness
import pytest
import reporting
import shapes
import torch
from gate_cases import PROVIDERS, GateCase
from reporting import replayed

GPU_COMPILED = 2  # cases that torch.compile takes part in
OVERHEAD_PASSES = ("forward", "forward, keeping for backward", "forward and backward")
Gate = type[GateCase]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Lay out the cases of the file's class; providers vary fastest."""
    quick, gate = metafunc.config.getoption("--quick"), metafunc.module.GATE
    if metafunc.function is test_cpu:
        cases = [
            gate(shape, kind, channels_last=channels_last)
            for channels_last in (False, True)
            for shape in (shapes.QUICK_CPU_SHAPES if quick else shapes.CPU_SHAPES)
            for kind in gate.kinds
        ]
        reporting.timed_cases(metafunc, cases, ("forward", "training"), PROVIDERS)
    elif metafunc.function is test_gpu:
        cases = [  # every kind at one shape before the next shape: a time box cuts shapes off, not kinds
            gate(shape, kind, dtype, channels_last, device="cuda")
            for shape in shapes.stages()
            for dtype in ("bf16", "fp32")
            for kind in gate.kinds
            for channels_last in (False, True)
        ][: 1 if quick or not torch.cuda.is_available() else None]
        reporting.compiled_cases.update(cases[:GPU_COMPILED])
        reporting.timed_cases(metafunc, cases, harness.PASSES, PROVIDERS)
    else:
        metafunc.parametrize("gate", [gate], ids=[gate.op])
        if "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", gate.kinds)


# overhead: the host's part of one call. Timing comes first, before a profiler or compiler has changed the process.


@functools.lru_cache
def overheads(gate: Gate, which: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a call on a map so small that nothing but calls costs."""
    case = gate(shapes.GATE_OVERHEAD_SHAPE, gate.kinds[0])
    (x,), dout = case.inputs()
    keeps = which != "forward"
    tutorial, module = case.tutorial().train(keeps), case.attnk().train(keeps)

    def with_operators() -> None:
        with torch.no_grad():
            case.run_operators(which, module, x.detach(), dout)

    def with_autograd(module: torch.nn.Module) -> Any:
        parameters = tuple(module.parameters())

        def call() -> None:
            with torch.set_grad_enabled(keeps):
                out = module(x)
            if which == "forward and backward":
                torch.autograd.grad(out, (x, *parameters), dout)

        return call

    calls = {"operators": with_operators, "attnk": with_autograd(module), "tutorial": with_autograd(tutorial)}
    return reporting.time_calls(calls, rounds)


@replayed
@pytest.mark.parametrize("threads", [1], indirect=True)  # waiting for a second thread is no work of the host's
@pytest.mark.parametrize("provider", ["operators", "attnk", "tutorial"])
@pytest.mark.parametrize("which", OVERHEAD_PASSES)
def test_overhead(benchmark: Any, quick: bool, threads: int, gate: Gate, which: str, provider: str) -> None:
    benchmark.group = f"overhead/{which}, {'x'.join(map(str, shapes.GATE_OVERHEAD_SHAPE))} on the CPU, 1 thread"
    reporting.report_overhead(benchmark, gate.op, which, provider, overheads(gate, which, 5 if quick else 40))


# cpu and gpu: time


@replayed
@pytest.mark.usefixtures("threads")
def test_cpu(benchmark: Any, quick: bool, case: GateCase, which: str, provider: str) -> None:
    reporting.time_one(benchmark, case, which, provider, not quick, budget=0.2 if quick else 2.5)


@pytest.mark.gpu
@replayed
def test_gpu(benchmark: Any, quick: bool, case: GateCase, which: str, provider: str) -> None:
    compiled = not quick and case in reporting.compiled_cases  # compiling takes longer than all the rest
    reporting.time_one(benchmark, case, which, provider, compiled, budget=0.3)


# io: bytes


@pytest.mark.parametrize("provider", PROVIDERS)
def test_io(benchmark: Any, quick: bool, gate: Gate, kind: str, provider: str) -> None:
    benchmark.group = f"io/{kind} (counted: bytes stand in the table at the end, this is the time it took to count)"
    if quick and provider == "attnk" and kind != gate.kinds[0]:
        pytest.skip("--quick")
    case = gate(shapes.QUICK_IO_SHAPE if quick else shapes.IO_SHAPE, kind)
    found = reporting.report_io(benchmark, case, provider, quick)
    if provider == "attnk":
        slack = case.size // 100 + 4096  # the formula leaves out the weights and their gradients' partial sums
        for which, moved in found["attnk"].items():
            formula = case.kernel_bytes(which, "attnk")
            assert abs(moved - formula) <= slack, f"{which}: {moved} bytes, by the formula {formula}"
            assert quick or moved <= case.most(which) * case.size, f"{which}: {moved / case.size:.2f} S"


# memory: the peak of what is allocated, and what the forward keeps for the backward


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("which", ["forward", "training", reporting.KEPT])
def test_memory(benchmark: Any, quick: bool, gate: Gate, kind: str, which: str, provider: str) -> None:
    benchmark.group = f"memory/{kind} {which} (counted: see the table at the end, this is the time it took to count)"
    if quick and provider == "torch.compile":
        pytest.skip("--quick")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for shape in shapes.QUICK_CPU_SHAPES if quick else shapes.CPU_SHAPES:
        case = gate(shape, kind, device=device)
        reporting.report_memory(benchmark, case, provider, which, compiled=provider == "torch.compile")


# aot: what compiling shows


@functools.lru_cache
def launches(gate: Gate, channels_last: bool) -> tuple[Any, ...]:
    """Every kernel of the first kind once, recorded."""
    from attnk.testing import record_launches

    tuning = harness.cases_of(gate.op).Tuning(gate(shapes.AOT_SHAPE, gate.kinds[0], "fp16", channels_last))
    with torch.no_grad(), record_launches() as recorded:
        tuning.results(tuning.start)
    return tuple({launch.name: launch for launch in recorded}.values())


@pytest.mark.parametrize("architecture", reporting.ARCHITECTURES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_aot(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, quick: bool, gate: Gate, layout: str, architecture: str
) -> None:
    benchmark.group = f"aot/{layout} fp16 (time to compile all kernels)"
    reporting.needs_compiler()
    if quick and (architecture, layout) != ("sm_90", "contiguous"):
        pytest.skip("--quick")
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    chosen = launches(gate, layout == "channels_last")[: 2 if quick else None]
    reporting.report_aot(benchmark, gate.op, chosen, architecture, layout=layout, dtype="fp16")
