"""What the tests of the benchmark files share: measure or count, tell pytest-benchmark, keep a record.

A group's name says what its numbers are. Where they are not times (``io``, ``memory``), pytest-benchmark's table shows
how long counting took and the tables at the end show the numbers.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import counted
import harness
import pytest
import torch
from harness import Case

from attnk import dispatch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")  # that kernels are compiled for
compiled_cases: set[Case] = set()  # of the group gpu, in which compilers take part
KEPT = "kept for backward"  # a pass of the group memory
CALLS = 100  # of one function between two looks at the clock, where a call takes microseconds


class Replay:
    """A clock for pytest-benchmark that replays seconds measured before, interleaved with other providers'.

    Pass ``now`` as its timer and ``step`` as what it times.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._seconds: list[float] = []

    def load(self, seconds: list[float]) -> None:
        self._seconds = list(seconds)

    def now(self) -> float:
        return self._now

    def step(self) -> None:
        if self._seconds:
            self._now += self._seconds.pop(0)


clock = Replay()
replayed = pytest.mark.benchmark(timer=clock.now)
copy_bandwidth = functools.lru_cache(harness.copy_bandwidth)


def replay(benchmark: Any, seconds: list[float]) -> None:
    """Hand pytest-benchmark what was measured interleaved with the other providers."""
    clock.load(seconds)
    benchmark.pedantic(clock.step, rounds=len(seconds))


def note(benchmark: Any, group: str, **fields: Any) -> None:
    """Keep numbers in both places: pytest-benchmark's JSON and the tables of this run."""
    benchmark.extra_info.update(fields)
    harness.record(group, **fields)


def timed_cases(metafunc: pytest.Metafunc, cases: Iterable[Case], passes: Iterable[str], names: Iterable[str]) -> None:
    """Lay out timed cases; providers vary fastest, so that those measured together are reported together.

    Random cases, which are of training, have no forward without grad.
    """
    quick = metafunc.config.getoption("--quick")
    metafunc.parametrize(
        ("case", "which", "provider"),
        [
            pytest.param(case, which, name, id=f"{case}-{which}-{name}".replace(" ", "-"))
            for case in cases
            for which in passes
            if not (case.random and which == "forward")
            for name in names
            if not (quick and name == "torch.compile")
        ],
    )


@functools.lru_cache(maxsize=1)
def ready(case: Case, compiled: bool) -> tuple[dict[str, harness.Provider], tuple, torch.Tensor, harness.Verdicts]:
    """The providers of a case, its inputs, and what checking the providers found."""
    found = case.providers(compiled)
    inputs, dout = case.inputs()
    return found, inputs, dout, harness.verdicts(case, found, inputs, dout)


@functools.lru_cache(maxsize=1)
def measured(case: Case, which: str, compiled: bool, budget: float) -> dict[str, list[float] | RuntimeError]:
    """Seconds of every provider, or why it is not timed."""
    if case.device == "cuda" and harness.time_box.is_spent():
        pytest.skip("the time box is spent")
    found, inputs, dout, verdicts = ready(case, compiled)
    result: dict[str, Any] = {name: verdicts[name].get(which) for name in found}
    works = {
        name: harness.work(provider, inputs, dout, which) for name, provider in found.items() if result[name] is None
    }
    if works:
        clock = clock_of(case.device)
        result |= harness.interleaved(works, clock, harness.rounds_within(works, clock, budget), warmup=0)
    return result


@functools.lru_cache
def clock_of(device: str) -> Any:
    return harness.CudaClock() if device == "cuda" else harness.CpuClock()


def time_one(benchmark: Any, case: Case, which: str, provider: str, compiled: bool, budget: float) -> None:
    """Time all providers of a case, unless that was done, and report one of them.

    A peer's refusal is reported, too; a wrong provider fails the test.
    """
    group = "gpu" if case.device == "cuda" else "cpu"
    benchmark.group = f"{group}/{which}, {case}"
    fields = {**case.fields(), "pass": which, "provider": provider}
    if group == "gpu":
        if harness.only_compiles:
            compile_one(case, which, provider, compiled)
            return
        skip_known(group, fields)
        if torch.cuda.get_device_properties(0).total_memory < case.needed_memory:
            pytest.skip(f"needs {case.needed_memory >> 30} GiB of memory")
    results = measured(case, which, compiled, budget)
    if provider not in results:
        pytest.skip("there is no such provider for this case")
    seconds = results[provider]
    if isinstance(seconds, harness.Refused):
        note(benchmark, group, **fields, refused=str(seconds))
        pytest.skip(str(seconds))
    if isinstance(seconds, RuntimeError):
        raise seconds
    fields |= timed_fields(benchmark, results, provider)
    if group == "gpu":
        fields |= case.rates(which, provider, fields["median_us"] / 1e6, copy_bandwidth())
    note(benchmark, group, **fields)


def skip_known(group: str, fields: dict[str, Any]) -> None:
    """Skip what an earlier run measured, with --resume."""
    if any((fields | {"group": group}).items() <= known.items() for known in harness.RECORDS):
        pytest.skip("measured already, and --resume")


def timed_fields(benchmark: Any, results: dict[str, Any], provider: str) -> dict[str, Any]:
    """Replay a provider's seconds, and what they are as columns: beside those of the first provider there is."""
    replay(benchmark, results[provider])
    numbers = harness.summary(results[provider])
    first = harness.summary(next(iter(results.values())))["median_us"]
    return {**numbers, "rounds": len(results[provider]), "times_tutorial": round(first / numbers["median_us"], 3)}


def compile_one(case: Case, which: str, provider: str, compiled: bool) -> None:
    """Run a provider without timing it, so that compilers keep what they made; once for all passes."""
    found = case.providers(compiled)
    if which != "training" or provider not in found:
        pytest.skip("compiled with the other passes, or nothing to compile")
    inputs, dout = case.inputs()
    with contextlib.suppress(harness.Refused), harness.answers(found[provider]):
        if not case.random:
            found[provider].infer(inputs)
        found[provider].backward(found[provider].forward(inputs), inputs, dout)


def time_calls(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds a call of functions that take microseconds, interleaved."""

    def repeated(call: Callable[[], Any]) -> harness.Work:
        def timed(_: Any) -> None:
            for _ in range(CALLS):
                call()

        return lambda: None, timed

    works = {name: repeated(call) for name, call in calls.items()}
    seconds = harness.interleaved(works, harness.CpuClock(), rounds, warmup=3)
    return {name: [value / CALLS for value in values] for name, values in seconds.items()}


def report_overhead(benchmark: Any, op: str, which: str, provider: str, seconds: dict[str, list[float]]) -> None:
    """Report one provider's seconds a call, and how much they are above those of the provider "operators"."""
    replay(benchmark, seconds[provider])
    numbers = harness.summary(seconds[provider])
    above = numbers["median_us"] - harness.summary(seconds["operators"])["median_us"]
    fields = {"op": op, "pass": which, "provider": provider, **numbers, "above_operators_us": round(above, 2)}
    note(benchmark, "overhead", **fields)


def report_io(benchmark: Any, case: Case, provider: str, quick: bool) -> dict[str, counted.Bytes]:
    """Count and report the bytes of a provider's passes; those of attnk by variant, with what the formula says.

    Returns:
        The bytes, by variant and pass.
    """
    once = functools.partial(benchmark.pedantic, rounds=1)
    if provider == "attnk":
        if not dispatch.HAS_TRITON:
            pytest.skip("triton is not installed")
        found = once(counted.meter, args=(case,))
    elif provider == "torch.compile":
        if quick:
            pytest.skip("--quick")
        try:
            found = {provider: once(counted.compiled, args=(case,))}
        except AttributeError as error:
            pytest.skip(f"Inductor of torch {torch.__version__} does not count its bytes: {error}")
    else:
        chosen = case.providers(compiled=False)[provider]
        found = {provider: once(counted.traced, args=(chosen, *case.inputs()))}
    for name, moved in found.items():
        fields = {f"{which}_S": round(number / case.size, 3) for which, number in moved.items()}
        if provider == "attnk":
            for which in moved:
                fields[f"{which}_formula_S"] = round(case.kernel_bytes(which, name) / case.size, 3)
        note(benchmark, "io", **case.fields(), provider=name, **fields)
    return found


def report_memory(benchmark: Any, case: Case, provider: str, which: str, compiled: bool = False) -> int:
    """Count and report the peak of what a pass of a provider allocates; a provider is named by how its name begins.

    The pass KEPT is what its forward leaves for its backward, inputs, parameters and output not counted.

    Returns:
        The bytes.
    """
    found = case.providers(compiled)
    inputs, dout = case.inputs()
    chosen = next(value for name, value in found.items() if name.startswith(provider))
    if which == KEPT:
        call = functools.partial(counted.kept_memory, chosen, inputs)
    else:
        _, timed = harness.work(chosen, inputs, dout, which)
        if compiled or case.device == "cuda":  # what only a first call allocates
            timed(None)
        call = functools.partial(counted.peak_memory, functools.partial(timed, None), case.device)
    peak = benchmark.pedantic(call, rounds=1) if benchmark.stats is None else call()
    fields = {**case.fields(), "pass": which, "provider": provider}
    fields |= {"peak_S": round(peak / case.size, 3), "peak_mib": round(peak / 2**20, 2)}
    benchmark.extra_info[f"peak MiB of {case}"] = fields["peak_mib"]
    harness.record("memory", **fields)
    return peak


def report_aot(
    benchmark: Any, op: str, launches: Iterable[Any], architecture: str, *, kernels: str = "", **fields: str
) -> None:
    """Compile recorded launches for an architecture and report what they need.

    Args:
        kernels: what the kernels' names begin with, where it is not the operation's name.
        fields: name the case.
    """
    from attnk.testing import compile_launch

    def compile_all() -> list[Any]:
        return [compile_launch(launch, architecture) for launch in launches]

    for found in benchmark.pedantic(compile_all, rounds=1):
        name = found.kernel.removeprefix(f"_{kernels or op}_").removesuffix("_kernel")
        resources = {"registers": found.registers, "spilled": found.spilled, "shared": found.shared}
        benchmark.extra_info[name] = resources
        harness.record("aot", op=op, **fields, architecture=architecture, kernel=name, **resources)
    seconds = round(benchmark.stats.stats.min, 2)
    harness.record("aot_time", op=op, **fields, architecture=architecture, seconds=seconds)


def needs_compiler() -> None:
    """Skip where Triton cannot compile."""
    if not dispatch.HAS_TRITON or dispatch.INTERPRETED:
        pytest.skip("needs triton's compiler: triton installed, and no TRITON_INTERPRET=1")
