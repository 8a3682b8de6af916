"""The spatial gate: bytes and memory counted, compilation, host overhead, and time on the CPU and on a GPU.

A group's name says what its numbers are. Where they are not times (``io``, ``memory``), pytest-benchmark's table shows
how long counting took and the tables at the end show the numbers.
"""

import functools
from collections.abc import Iterator
from typing import Any

import counted
import harness
import pytest
import shapes
import torch
from harness import Case

import attnk
from attnk import dispatch
from attnk.fallback import spatial_gate as operators

clock = harness.Replay()
replayed = pytest.mark.benchmark(timer=clock.now)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads PyTorch has during a test."""
    before, wanted = torch.get_num_threads(), getattr(request, "param", shapes.CPU_THREADS)
    torch.set_num_threads(wanted)
    yield wanted
    torch.set_num_threads(before)


def replay(benchmark: Any, seconds: list[float]) -> None:
    """Hand pytest-benchmark what was measured interleaved with the other providers."""
    clock.load(seconds)
    benchmark.pedantic(clock.step, rounds=len(seconds))


def note(benchmark: Any, group: str, **fields: Any) -> None:
    """Keep numbers in both places: pytest-benchmark's JSON and the tables of this run."""
    benchmark.extra_info.update(fields)
    harness.record(group, **fields)


# overhead: the host's part of one call. Timing comes first, before a profiler or compiler has changed the process.


OVERHEAD_PASSES = ("forward", "forward, keeping for backward", "forward and backward")


@functools.lru_cache
def overheads(which: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a call on a map so small that nothing but calls costs: gated output, plain arguments."""
    calls = 100
    case = Case(shapes.OVERHEAD_SHAPE, "gated")
    x, dout = case.inputs()
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

    found = {
        "operators": with_operators,
        "attnk.spatial_gate": with_autograd(function, (weight, bias)),
        "attnk.SpatialAttention": with_autograd(module, (weight, bias)),
        "tutorial": with_autograd(tutorial, tuple(tutorial.parameters())),
    }

    def repeated(call: Any) -> harness.Work:
        def timed(_: Any) -> None:
            for _ in range(calls):
                call()

        return lambda: None, timed

    works = {name: repeated(call) for name, call in found.items()}
    seconds = harness.interleaved(works, harness.CpuClock(), rounds, warmup=3)
    return {name: [value / calls for value in values] for name, values in seconds.items()}


@replayed
@pytest.mark.parametrize("threads", [1], indirect=True)  # waiting for a second thread is no work of the host's
@pytest.mark.parametrize("provider", ["operators", "attnk.spatial_gate", "attnk.SpatialAttention", "tutorial"])
@pytest.mark.parametrize("which", OVERHEAD_PASSES)
def test_overhead(benchmark: Any, quick: bool, threads: int, which: str, provider: str) -> None:
    benchmark.group = f"overhead/{which}, {'x'.join(map(str, shapes.OVERHEAD_SHAPE))} on the CPU, 1 thread"
    found = overheads(which, 5 if quick else 40)
    replay(benchmark, found[provider])
    numbers = harness.summary(found[provider])
    above = numbers["median_us"] - harness.summary(found["operators"])["median_us"]
    note(benchmark, "overhead", **{"pass": which}, provider=provider, **numbers, above_operators_us=round(above, 2))


# cpu and gpu: time


wrong: dict[Case, harness.WrongResult] = {}


@functools.lru_cache(maxsize=1)
def ready(case: Case, compiled: bool) -> tuple[dict[str, harness.Provider], torch.Tensor, torch.Tensor]:
    """The providers of a case, each checked, and its inputs."""
    if case in wrong:  # found out once: compiling and checking again would take minutes
        raise wrong[case]
    found = harness.providers(case, compiled)
    x, dout = case.inputs()
    try:
        harness.check(found, x, dout)
    except harness.WrongResult as error:
        wrong[case] = error
        raise
    return found, x, dout


@functools.lru_cache(maxsize=1)
def measured(case: Case, which: str, compiled: bool, budget: float) -> dict[str, list[float]]:
    if case.device == "cuda" and harness.time_box.is_spent():
        pytest.skip("the time box is spent")
    found, x, dout = ready(case, compiled)
    works = {name: harness.work(provider, x, dout, which) for name, provider in found.items()}
    clock = the_clock(case.device)
    return harness.interleaved(works, clock, harness.rounds_within(works, clock, budget), warmup=0)


@functools.lru_cache
def the_clock(device: str) -> Any:
    return harness.CudaClock() if device == "cuda" else harness.CpuClock()


copy_bandwidth = functools.lru_cache(harness.copy_bandwidth)


def time_one(benchmark: Any, case: Case, which: str, provider: str, compiled: bool, budget: float) -> None:
    """Time all providers of a case, unless that was done, and report one of them."""
    where = "gpu" if case.device == "cuda" else "cpu"
    benchmark.group = f"{where}/{which}, {case}"
    seconds = measured(case, which, compiled, budget)
    if provider not in seconds:
        pytest.skip("there is no such provider for this case")
    replay(benchmark, seconds[provider])
    numbers = harness.summary(seconds[provider])
    fields = {**case.fields(), "pass": which, "provider": provider, **numbers, "rounds": len(seconds[provider])}
    fields["times_tutorial"] = round(harness.summary(seconds["tutorial"])["median_us"] / numbers["median_us"], 3)
    if where == "gpu":
        rate = harness.minimal_bytes(case, which) / numbers["median_us"] / 1e3
        fields["gbps"] = round(rate, 1)
        fields["percent_of_copy"] = round(1e11 * rate / copy_bandwidth(), 1)
        fields["copy_gbps"] = round(copy_bandwidth() / 1e9, 1)
        if provider.startswith("attnk"):
            moved = harness.kernel_bytes(case, which, 1 if provider.endswith("one launch") else 2)
            fields["gbps_moved"] = round(moved / numbers["median_us"] / 1e3, 1)
            fields["percent_of_copy_moved"] = round(1e11 * fields["gbps_moved"] / copy_bandwidth(), 1)
    note(benchmark, where, **fields)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Lay out the timed cases; providers vary fastest, so that those measured together are reported together."""
    quick = metafunc.config.getoption("--quick")
    if metafunc.function is test_cpu:
        cases = [
            Case(shape, output, channels_last=channels_last)
            for channels_last in (False, True)
            for shape in (shapes.QUICK_CPU_SHAPES if quick else shapes.CPU_SHAPES)
            for output in ("gated", "map")
        ]
        passes, names = ("forward", "training"), ["tutorial", "torch.compile", "attnk"]
    elif metafunc.function is test_gpu:
        cases = [  # every kind at one shape before the next shape: a time box cuts shapes off, not kinds
            Case(shape, output, dtype, channels_last, device="cuda")
            for shape in shapes.stages()
            for output, dtype in (("gated", "fp16"), ("gated", "fp32"), ("gated", "bf16"), ("map", "fp16"))
            for channels_last in (False, True)
        ][: 1 if quick or not torch.cuda.is_available() else None]
        passes, names = harness.PASSES, ["tutorial", "torch.compile", "attnk, two launches", "attnk, one launch"]
    else:
        return
    metafunc.parametrize(
        ("case", "which", "provider"),
        [
            pytest.param(case, which, provider, id=f"{case}-{which}-{provider}".replace(" ", "-"))
            for case in cases
            for which in passes
            for provider in names
            if not (quick and provider == "torch.compile")
            if provider != "attnk, one launch" or case.output == "gated"
        ],
    )


@replayed
@pytest.mark.usefixtures("threads")
def test_cpu(benchmark: Any, quick: bool, case: Case, which: str, provider: str) -> None:
    time_one(benchmark, case, which, provider, not quick, budget=0.2 if quick else 2.5)


@pytest.mark.gpu
@replayed
def test_gpu(benchmark: Any, quick: bool, case: Case, which: str, provider: str) -> None:
    wanted = {**case.fields(), "pass": which, "provider": provider, "group": "gpu"}
    if any(wanted.items() <= known.items() for known in harness.RECORDS):
        pytest.skip("measured already, and --resume")
    if torch.cuda.get_device_properties(0).total_memory < 64 * case.size // harness.DTYPES[case.dtype].itemsize:
        pytest.skip("needs 64 bytes of memory an element, with the float64 oracle")
    time_one(benchmark, case, which, provider, not quick, budget=0.4)


# io: bytes


@pytest.mark.parametrize("provider", ["tutorial", "torch.compile", "attnk"])
@pytest.mark.parametrize("output", ["gated", "map"])
def test_io(benchmark: Any, quick: bool, output: str, provider: str) -> None:
    benchmark.group = f"io/{output} (counted: bytes stand in the table at the end, this is the time it took to count)"
    case = Case(shapes.QUICK_IO_SHAPE if quick else shapes.IO_SHAPE, output)
    if provider == "attnk":
        if not dispatch.HAS_TRITON:
            pytest.skip("triton is not installed")
        found = {
            f"attnk, {launches}": bytes_
            for launches, bytes_ in benchmark.pedantic(counted.meter, args=(case,), rounds=1).items()
        }
    elif provider == "torch.compile":
        if quick:
            pytest.skip("--quick")
        try:
            found = {provider: benchmark.pedantic(counted.compiled, args=(case,), rounds=1)}
        except AttributeError as error:
            pytest.skip(f"Inductor of torch {torch.__version__} does not count its bytes: {error}")
    else:
        tutorial = harness.providers(case, compiled=False)["tutorial"]
        found = {provider: benchmark.pedantic(counted.traced, args=(tutorial, *case.inputs()), rounds=1)}
    for name, bytes_ in found.items():
        fields = {f"{which}_S": round(number / case.size, 3) for which, number in bytes_.items()}
        if name.startswith("attnk"):
            for which, number in bytes_.items():
                formula = harness.kernel_bytes(case, which, 1 if name.endswith("one launch") else 2)
                fields[f"{which}_formula_S"] = round(formula / case.size, 3)
                slack = case.size // 200 + 4096  # the formula leaves out the weight and its gradient's partial sums
                assert abs(number - formula) <= slack, f"{name}, {which}: {number} bytes, by the formula {formula}"
        note(benchmark, "io", **case.fields(), provider=name, **fields)


# memory: the peak of what is allocated


@pytest.mark.parametrize("provider", ["tutorial", "torch.compile", "attnk"])
@pytest.mark.parametrize("which", ["forward", "training"])
@pytest.mark.parametrize("output", ["gated", "map"])
def test_memory(benchmark: Any, quick: bool, output: str, which: str, provider: str) -> None:
    benchmark.group = f"memory/{output} {which} (counted: see the table at the end, this is the time it took to count)"
    if quick and provider == "torch.compile":
        pytest.skip("--quick")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for shape in shapes.QUICK_CPU_SHAPES if quick else shapes.CPU_SHAPES:
        case = Case(shape, output, device=device)
        found = harness.providers(case, compiled=provider == "torch.compile")
        x, dout = case.inputs()
        chosen = next(value for name, value in found.items() if name.startswith(provider))
        prepare, timed = harness.work(chosen, x, dout, which)
        timed(prepare())
        call = functools.partial(counted.peak_memory, functools.partial(timed, None), device)
        peak = benchmark.pedantic(call, rounds=1) if benchmark.stats is None else call()
        fields = {**case.fields(), "pass": which, "provider": provider, "peak_S": round(peak / case.size, 3)}
        benchmark.extra_info[f"peak_S at {fields['shape']}"] = fields["peak_S"]
        harness.record("memory", **fields)


# aot: what compiling shows


@functools.lru_cache
def launches(channels_last: bool) -> tuple[Any, ...]:
    """Every kernel of the gated output once, recorded from both ways to launch a pass."""
    from attnk.kernels import spatial_gate as kernels

    from attnk.testing import record_launches

    case = Case(shapes.AOT_SHAPE, "gated", "fp16", channels_last)
    x, dout = case.inputs()
    weight, bias = (parameter.detach() for parameter in case.attnk().parameters())
    with torch.no_grad(), record_launches() as recorded:
        for config in harness.launch_configs(case):
            _, gate, maps, index = kernels.spatial_gate_forward(
                x, weight, bias, "max_avg", "gated", "first", config=config
            )
            options = (shapes.AOT_SHAPE[1], channels_last, "max_avg", "gated", "first", True, True)
            kernels.spatial_gate_backward(dout, x, weight, gate, maps, index, *options, config=config)
    return tuple({launch.name: launch for launch in recorded}.values())


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_aot(benchmark: Any, monkeypatch: pytest.MonkeyPatch, quick: bool, layout: str, architecture: str) -> None:
    benchmark.group = f"aot/{layout} fp16 (time to compile all kernels)"
    if not dispatch.HAS_TRITON or dispatch.INTERPRETED:
        pytest.skip("needs triton's compiler: triton installed, and no TRITON_INTERPRET=1")
    if quick and (architecture, layout) != ("sm_90", "contiguous"):
        pytest.skip("--quick")
    from attnk.testing import compile_launch

    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    chosen = launches(layout == "channels_last")[: 2 if quick else None]

    def compile_all() -> list[Any]:
        return [compile_launch(launch, architecture) for launch in chosen]

    for found in benchmark.pedantic(compile_all, rounds=1):
        name = found.kernel.removeprefix("_spatial_gate_").removesuffix("_kernel")
        resources = {"registers": found.registers, "spilled": found.spilled, "shared": found.shared}
        benchmark.extra_info[name] = resources
        harness.record("aot", layout=layout, dtype="fp16", architecture=architecture, kernel=name, **resources)
    harness.record("aot_time", layout=layout, architecture=architecture, seconds=round(benchmark.stats.stats.min, 2))
