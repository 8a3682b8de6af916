"""The spatial gate: bytes and memory counted, compilation, host overhead, and time on the CPU and on a GPU."""

import functools
from typing import Any

import harness
import pytest
import reporting
import shapes
import torch
from reporting import replayed
from spatial_gate_cases import PROVIDERS, SpatialGateCase

import attnk
from attnk.fallback import spatial_gate as operators

OP = SpatialGateCase.op
GPU_COMPILED = 2  # cases that torch.compile takes part in


# overhead: the host's part of one call. Timing comes first, before a profiler or compiler has changed the process.


OVERHEAD_PASSES = ("forward", "forward, keeping for backward", "forward and backward")


@functools.lru_cache
def overheads(which: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a call on a map so small that nothing but calls costs: gated output, plain arguments."""
    case = SpatialGateCase(shapes.OVERHEAD_SHAPE, "gated")
    (x,), dout = case.inputs()
    tutorial, module = case.tutorial(), case.attnk()
    weight, bias = module.conv1.weight, module.conv1.bias
    channels, keeps = x.shape[1], which != "forward"

    def with_operators() -> None:
        with torch.no_grad():
            if not keeps:
                operators.spatial_gate_infer(x, weight, bias, "max_avg", "gated")
                return
            _, gate, maps, index = operators.spatial_gate_forward(x, weight, bias, "max_avg", "gated", "first")
            if which == "forward and backward":
                options = (channels, False, "max_avg", "gated", "first", True, True)
                operators.spatial_gate_backward(dout, x, weight, gate, maps, index, *options)

    def with_autograd(forward: Any, parameters: tuple[torch.Tensor, ...]) -> Any:
        def call() -> None:
            with torch.set_grad_enabled(keeps):
                out = forward(x)
            if which == "forward and backward":
                torch.autograd.grad(out, (x, *parameters), dout)

        return call

    def function(x: torch.Tensor) -> torch.Tensor:
        return attnk.spatial_gate(x, weight, bias, order="max_avg", output="gated")

    calls = {
        "operators": with_operators,
        "attnk.spatial_gate": with_autograd(function, (weight, bias)),
        "attnk.SpatialAttention": with_autograd(module, (weight, bias)),
        "tutorial": with_autograd(tutorial, tuple(tutorial.parameters())),
    }
    return reporting.time_calls(calls, rounds)


@replayed
@pytest.mark.parametrize("threads", [1], indirect=True)  # waiting for a second thread is no work of the host's
@pytest.mark.parametrize("provider", ["operators", "attnk.spatial_gate", "attnk.SpatialAttention", "tutorial"])
@pytest.mark.parametrize("which", OVERHEAD_PASSES)
def test_overhead(benchmark: Any, quick: bool, threads: int, which: str, provider: str) -> None:
    benchmark.group = f"overhead/{which}, {'x'.join(map(str, shapes.OVERHEAD_SHAPE))} on the CPU, 1 thread"
    reporting.report_overhead(benchmark, OP, which, provider, overheads(which, 5 if quick else 40))


# cpu and gpu: time


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    if metafunc.function is test_cpu:
        cases = [
            SpatialGateCase(shape, output, channels_last=channels_last)
            for channels_last in (False, True)
            for shape in (shapes.QUICK_CPU_SHAPES if quick else shapes.CPU_SHAPES)
            for output in ("gated", "map")
        ]
        reporting.timed_cases(metafunc, cases, ("forward", "training"), PROVIDERS["cpu"])
    elif metafunc.function is test_gpu:
        cases = [  # every kind at one shape before the next shape: a time box cuts shapes off, not kinds
            SpatialGateCase(shape, output, dtype, channels_last, device="cuda")
            for shape in shapes.stages()
            for output, dtype in (("gated", "fp16"), ("gated", "fp32"), ("gated", "bf16"), ("map", "fp16"))
            for channels_last in (False, True)
        ][: 1 if quick or not torch.cuda.is_available() else None]
        reporting.compiled_cases.update(cases[:GPU_COMPILED])
        reporting.timed_cases(metafunc, cases, harness.PASSES, PROVIDERS["cuda"])


@replayed
@pytest.mark.usefixtures("threads")
def test_cpu(benchmark: Any, quick: bool, case: SpatialGateCase, which: str, provider: str) -> None:
    reporting.time_one(benchmark, case, which, provider, not quick, budget=0.2 if quick else 2.5)


@pytest.mark.gpu
@replayed
def test_gpu(benchmark: Any, quick: bool, case: SpatialGateCase, which: str, provider: str) -> None:
    compiled = not quick and case in reporting.compiled_cases  # compiling takes longer than all the rest
    reporting.time_one(benchmark, case, which, provider, compiled, budget=0.3)


# io: bytes


@pytest.mark.parametrize("provider", ["tutorial", "torch.compile", "attnk"])
@pytest.mark.parametrize("output", ["gated", "map"])
def test_io(benchmark: Any, quick: bool, output: str, provider: str) -> None:
    benchmark.group = f"io/{output} (counted: bytes stand in the table at the end, this is the time it took to count)"
    case = SpatialGateCase(shapes.QUICK_IO_SHAPE if quick else shapes.IO_SHAPE, output)
    found = reporting.report_io(benchmark, case, provider, quick)
    if provider == "attnk":
        slack = case.size // 200 + 4096  # the formula leaves out the weight and its gradient's partial sums
        for name, moved in found.items():
            for which, number in moved.items():
                formula = case.kernel_bytes(which, name)
                assert abs(number - formula) <= slack, f"{name}, {which}: {number} bytes, by the formula {formula}"


# memory: the peak of what is allocated


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("provider", ["tutorial", "torch.compile", "attnk"])
@pytest.mark.parametrize("which", ["forward", "training"])
@pytest.mark.parametrize("output", ["gated", "map"])
def test_memory(benchmark: Any, quick: bool, output: str, which: str, provider: str) -> None:
    benchmark.group = f"memory/{output} {which} (counted: see the table at the end, this is the time it took to count)"
    if quick and provider == "torch.compile":
        pytest.skip("--quick")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for shape in shapes.QUICK_CPU_SHAPES if quick else shapes.CPU_SHAPES:
        case = SpatialGateCase(shape, output, device=device)
        reporting.report_memory(benchmark, case, provider, which, compiled=provider == "torch.compile")


# aot: what compiling shows


@functools.lru_cache
def launches(channels_last: bool) -> tuple[Any, ...]:
    """Every kernel of the gated output once, recorded from both ways to launch a pass."""
    from attnk.kernels import spatial_gate as kernels

    from attnk.testing import record_launches

    case = SpatialGateCase(shapes.AOT_SHAPE, "gated", "fp16", channels_last)
    (x,), dout = case.inputs()
    weight, bias = (parameter.detach() for parameter in case.attnk().parameters())
    with torch.no_grad(), record_launches() as recorded:
        for config in case.launch_configs().values():
            _, gate, maps, index = kernels.spatial_gate_forward(
                x, weight, bias, "max_avg", "gated", "first", config=config
            )
            options = (shapes.AOT_SHAPE[1], channels_last, "max_avg", "gated", "first", True, True)
            kernels.spatial_gate_backward(dout, x, weight, gate, maps, index, *options, config=config)
    return tuple({launch.name: launch for launch in recorded}.values())


@pytest.mark.parametrize("architecture", reporting.ARCHITECTURES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_aot(benchmark: Any, monkeypatch: pytest.MonkeyPatch, quick: bool, layout: str, architecture: str) -> None:
    benchmark.group = f"aot/{layout} fp16 (time to compile all kernels)"
    reporting.needs_compiler()
    if quick and (architecture, layout) != ("sm_90", "contiguous"):
        pytest.skip("--quick")
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    chosen = launches(layout == "channels_last")[: 2 if quick else None]
    reporting.report_aot(benchmark, OP, chosen, architecture, layout=layout, dtype="fp16")
