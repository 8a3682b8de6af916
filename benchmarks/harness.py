"""What every benchmark shares: providers, the correctness check, interleaved clocks, and the results file.

A *case* is one input and one output of an operation; the file ``<operation>_cases.py`` has its classes. A *provider* is
one way to compute a case. All providers of a case are timed in turn, round by round, in one process: what the machine
does meanwhile hits all of them alike, and ratios are ratios of medians of one such run.
"""

import contextlib
import dataclasses
import datetime
import gc
import importlib
import itertools
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol
from unittest import mock

import torch
from torch import Tensor

import attnk

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FIRST_OP = "spatial_gate"  # of results files that name no operation; the others follow it
NETWORKS = ("resnet50", "vgg16")  # whose benchmarks are of no operation alone: there is nothing of their own to tune
FLUSH_BYTES = 1 << 30  # written between two measurements: more than any L2
SLEEP_CYCLES = 4_000_000  # about 2 ms, longer than the host takes to launch any pass
COPY_BYTES = 2 << 30
SEED = 7  # before each run of a random case that is checked


def operations() -> list[str]:
    """Every operation that has benchmarks."""
    stems = {path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")}
    return sorted(stems - {*NETWORKS}, key=lambda stem: (stem != FIRST_OP, stem))


def cases_of(op: str) -> ModuleType:
    """The file of an operation's cases."""
    return importlib.import_module(f"{op}_cases")


class Case(Protocol):
    """What the class of an operation's cases has; a frozen dataclass whose fields are numbers, strings or tuples.

    ``needed_memory`` and ``rates`` are for the group gpu, ``kernel_bytes`` and ``metered`` for io.

    Attributes:
        op: the operation.
        dtype: a key of DTYPES.
        device: "cpu" or "cuda".
        random: whether each call draws numbers, so that every provider has its own right values; then it is for
            training alone.
    """

    op: ClassVar[str]
    dtype: str
    device: str

    @property
    def random(self) -> bool: ...

    @property
    def size(self) -> int:
        """S, the bytes of the first input, in which bytes are told."""

    @property
    def needed_memory(self) -> int:
        """Bytes that checking and timing may hold at once."""

    def fields(self) -> dict[str, Any]:
        """The case as columns of a results file."""

    def inputs(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """The inputs, requiring grad, and the gradient of the output."""

    def providers(self, compiled: bool = True) -> dict[str, "Provider"]:
        """The providers, by name; the tutorials' code, which ratios refer to, comes first."""

    def oracle(
        self, provider: "Provider", inputs: tuple[Tensor, ...], dout: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Output ("out") and gradients in float64, inputs first, parameters after them.

        Beside them, by name, the sum of the absolute terms of gradients that are sums which may cancel. Of a random
        case they are those of the numbers that the provider draws after ``torch.manual_seed(SEED)``, with grad.
        """

    def rates(self, which: str, provider: str, seconds: float, copy: float) -> dict[str, float]:
        """What a GPU's records say of a pass besides its time; copy is the bytes a second of a large copy."""

    def kernel_bytes(self, which: str, provider: str) -> int:
        """The bytes that attnk's kernels move in a pass, by the formula in their file; provider names the variant."""

    def metered(self) -> dict[str, dict[str, int]]:
        """Bytes that attnk's kernels move, by variant and pass; needs the Triton interpreter."""


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: what tables call it.
        call: takes the case's inputs.
        parameters: what is differentiated for, besides the inputs.
        scope: entered around every pass: forces a configuration or a backend.
        peer: whether it is code of others, which may refuse a case; what it raises is then its answer.
    """

    name: str
    call: Callable[..., Tensor]
    parameters: tuple[Tensor, ...] = ()
    scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    peer: bool = False

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        with self.scope():
            return self.call(*inputs)

    def backward(self, out: Tensor, inputs: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor, ...]:
        with self.scope():
            return torch.autograd.grad(out, (*inputs, *self.parameters), dout)

    def infer(self, inputs: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            return self.forward(inputs)


@contextlib.contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Another value of a module's name inside the block."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextlib.contextmanager
def captured_launches() -> Iterator[list[tuple[str, Callable[[], Any]]]]:
    """The kernels launched inside the block, by name, each as a function that launches it once more."""
    from attnk import dispatch

    if dispatch.INTERPRETED:
        from triton.runtime.interpreter import GridExecutor as launcher

        method = "__call__"
    else:
        from triton.runtime.jit import JITFunction as launcher

        method = "run"
    launches: list[tuple[str, Callable[[], Any]]] = []
    original = getattr(launcher, method)

    def capture(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append((kernel.fn.__name__, lambda: getattr(launcher, method)(kernel, *args, **kwargs)))
        return original(kernel, *args, **kwargs)

    with mock.patch.object(launcher, method, capture):
        yield launches


# What is timed: a pass is a pair, what comes before the clock starts and what comes after, which takes its result.

PASSES = ("forward", "backward", "training")
Work = tuple[Callable[[], Any], Callable[[Any], Any]]


def work(provider: Provider, inputs: tuple[Tensor, ...], dout: Tensor, which: str) -> Work:
    """One pass of a provider: the forward without grad, the backward alone, or both as in training."""
    if which == "forward":
        return lambda: None, lambda _: provider.infer(inputs)
    if which == "backward":
        return lambda: provider.forward(inputs), lambda out: provider.backward(out, inputs, dout)
    return lambda: None, lambda _: provider.backward(provider.forward(inputs), inputs, dout)


# Correctness


class WrongResult(RuntimeError):
    """A provider that computes something else; it is not timed."""


class Refused(RuntimeError):
    """A peer that does not take a case, and why."""


Verdicts = dict[str, dict[str, RuntimeError]]  # by provider and pass; no entry where it is right


def verdicts(case: Case, found: dict[str, Provider], inputs: tuple[Tensor, ...], dout: Tensor) -> Verdicts:
    """What is wrong with the providers of a case, at the very shape that is timed.

    The oracle is the definition in float64. As in the tests, a provider passes when the largest error of the output
    and of every gradient is at most ``2 * (the tutorial's own error + eps * max |oracle|)``; gradients that are sums
    which may cancel are conceded the rounding of their terms in float32. The tutorial passes when its errors are at
    most 5 % of max |oracle|, and the rounding of those terms in its dtype.

    Returns:
        For every provider, by pass, a WrongResult that names the tensor, its error and what was allowed, or what made
        a peer refuse. Where the tutorial is wrong, so are all: there is no measure for them.
    """
    result: Verdicts = {name: {} for name in found}
    eps = torch.finfo(inputs[0].dtype).eps
    allowed: dict[str, float] = {}
    exact: dict[str, Tensor] = {}
    terms: dict[str, float] = {}
    first = next(iter(found))
    for name, provider in found.items():
        if case.random or not exact:
            try:
                with answers(provider):
                    exact, terms = case.oracle(provider, inputs, dout)
            except (Refused, WrongResult) as error:
                result[name] = dict.fromkeys(PASSES, error)
                continue
        for passes, run in ((("forward",), _inferred), (("backward", "training"), _differentiated)):
            if case.random and run is _inferred:
                continue
            try:
                with answers(provider):
                    got = run(provider, inputs, dout, list(exact))
                for tensor, value in got.items():
                    want = exact[tensor] if tensor in exact else exact["out"]
                    error, scale = _error(name, tensor, value, want, inputs[0].dtype), want.abs().max().item()
                    summed = terms.get(tensor, 0.0)
                    bound = allowed.setdefault(tensor, 0.05 * scale + eps * summed)
                    if not error <= bound:  # also catches NaN
                        raise WrongResult(f"{name}: error of {tensor} is {error:.2e}, allowed {bound:.2e}")
                    if name == first:
                        allowed[tensor] = 2 * (error + eps * scale + torch.finfo(torch.float32).eps * summed)
            except (Refused, WrongResult) as error:
                result[name] |= dict.fromkeys(passes, error)
        if name == first and result[first]:
            return dict.fromkeys(found, dict.fromkeys(PASSES, next(iter(result[first].values()))))
    return result


def check(case: Case, found: dict[str, Provider], inputs: tuple[Tensor, ...], dout: Tensor) -> None:
    """Raise unless every provider computes the case.

    Raises:
        WrongResult, Refused: the first of the ``verdicts``.
    """
    for failures in verdicts(case, found, inputs, dout).values():
        for error in failures.values():
            raise error


def _inferred(provider: Provider, inputs: tuple[Tensor, ...], dout: Tensor, names: list[str]) -> dict[str, Tensor]:
    torch.manual_seed(SEED)
    return {"out without grad": provider.infer(inputs)}


def _differentiated(
    provider: Provider, inputs: tuple[Tensor, ...], dout: Tensor, names: list[str]
) -> dict[str, Tensor]:
    torch.manual_seed(SEED)
    out = provider.forward(inputs)
    grads = provider.backward(out, inputs, dout)
    wanted = [name for name in names if not name.startswith("out")]
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


@contextlib.contextmanager
def answers(provider: Provider) -> Iterator[None]:
    """Turn what a peer raises, and the warnings in which it gives its reasons, into Refused."""
    if not provider.peer:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except WrongResult:
            raise
        except (RuntimeError, ValueError) as error:  # others are mistakes of ours
            root: BaseException = error
            while root.__cause__ is not None:  # torch.compile wraps what it meets
                root = root.__cause__
            said = [str(warning.message).partition(" (Triggered internally")[0].strip() for warning in caught]
            reasons = [text for text in said if not text.endswith(("runtime disabled.", "not used because:"))]
            words = "; ".join([*dict.fromkeys(reasons), f"{type(root).__name__}: {root}"])
            raise Refused(f"{provider.name}: {' '.join(words.split())[:400]}") from error


def _error(provider: str, name: str, value: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    if value.shape != want.shape or value.dtype != dtype:
        raise WrongResult(f"{provider}: {name} is {value.dtype} {tuple(value.shape)}")
    parts = zip(value.split(32), want.split(32), strict=True)
    return max((part.double() - wanted).abs().max().nan_to_num(torch.inf).item() for part, wanted in parts)


# Clocks


class CpuClock:
    """Seconds of one call on the host."""

    def __call__(self, prepare: Callable[[], Any], timed: Callable[[Any], Any]) -> float:
        ready = prepare()
        start = time.perf_counter()
        timed(ready)
        return time.perf_counter() - start


class CudaClock:
    """Seconds between two events around one call, after a write that empties the L2 cache.

    The device then idles for SLEEP_CYCLES while the host prepares the launches, so that gaps between them do not show.
    """

    def __init__(self) -> None:
        memory = torch.cuda.get_device_properties(0).total_memory
        self._scratch = torch.empty(min(FLUSH_BYTES, memory // 16), dtype=torch.int8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, prepare: Callable[[], Any], timed: Callable[[Any], Any]) -> float:
        ready = prepare()
        torch.cuda.synchronize()
        self._scratch.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        self._start.record()
        timed(ready)
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def interleaved(
    works: dict[str, Work], clock: Callable[[Callable, Callable], float], rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of every work, ``rounds`` each, taken in turn; every round starts with another one."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    collects = gc.isenabled()
    gc.disable()
    try:
        for turn in range(-warmup, rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                elapsed = clock(*works[name])
                if turn >= 0:
                    seconds[name].append(elapsed)
    finally:
        if collects:
            gc.enable()
    return seconds


def rounds_within(works: dict[str, Work], clock: Callable[[Callable, Callable], float], budget: float) -> int:
    """How many rounds of all works fit a budget in seconds, 5 to 25; finding out warms everything up."""
    interleaved(works, clock, rounds=1, warmup=0)  # compiles
    start = time.perf_counter()
    interleaved(works, clock, rounds=1, warmup=1)
    return max(5, min(25, int(2 * budget / (time.perf_counter() - start))))


def copy_bandwidth() -> float:
    """Bytes a second that a large copy on the device moves, read and written ones counted."""
    size = min(COPY_BYTES, torch.cuda.get_device_properties(0).total_memory // 8)
    source = torch.empty(size // 4, device="cuda").normal_()
    target = torch.empty_like(source)
    seconds = interleaved({"copy": (lambda: None, lambda _: target.copy_(source))}, CudaClock(), rounds=20, warmup=5)
    return 2 * size / statistics.median(seconds["copy"])


# Results

RECORDS: list[dict[str, Any]] = []
only_compiles = False  # the benchmarks of group gpu, whose times are measured by another run
busy_before: int | None = None  # percent of all cores that others used just before this began


@dataclasses.dataclass
class TimeBox:
    """Seconds for all timing on a GPU, from the first on."""

    seconds: float = 240
    started: float | None = None
    spent: bool = False

    def is_spent(self) -> bool:
        now = time.monotonic()
        self.started = now if self.started is None else self.started
        self.spent = now - self.started > self.seconds
        return self.spent


time_box = TimeBox()


def record(group: str, **fields: Any) -> None:
    """Keep one line for the tables at the end of the run and for the results file."""
    RECORDS.append({"group": group, **fields})


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, in microseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median_us": round(1e6 * middle, 2), "quartiles_us": [round(1e6 * low, 2), round(1e6 * high, 2)]}


def exponent(points: list[tuple[float, float]]) -> float:
    """The power of x that y follows: the slope of the line nearest to the points (x, y) on logarithmic axes."""
    x, y = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope


def device_name() -> str:
    """The GPU, or the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_folder() -> Path:
    """Where results of this device belong: ``results/cpu``, ``results/nvidia-h200`` and so on."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return Path(__file__).parent / "results" / "-".join(name.lower().split())


def percent_busy(seconds: float = 0.5) -> int | None:
    """How much of all cores is in use while this sleeps; None where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    samples = []
    for pause in (0, seconds):
        time.sleep(pause)
        ticks = [int(number) for number in stat.read_text().splitlines()[0].split()[1:9]]
        samples.append((sum(ticks), ticks[3] + ticks[4]))  # all, idle and waiting for a disk
    (all_before, idle_before), (all_after, idle_after) = samples
    return round(100 * (1 - (idle_after - idle_before) / max(1, all_after - all_before)))


def conditions() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    found: dict[str, Any] = {
        "device": device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "attnk": attnk.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return found | ({} if busy_before is None else {"percent_busy_before": busy_before})


def write_results(path: Path, records: list[dict[str, Any]], **more: Any) -> None:
    """Write a results file: the conditions and ``more``, then a table for each operation and group, a row a line."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for fields in records:
        key = f"{fields['op']}/{fields['group']}" if "op" in fields else fields["group"]
        groups.setdefault(key, []).append(fields)
    tables = []
    for key, members in groups.items():
        columns = [name for name in dict.fromkeys(itertools.chain(*members)) if name not in ("op", "group")]
        rows = ",\n".join(f"    {json.dumps([fields.get(name) for name in columns])}" for fields in members)
        tables.append(f'  {json.dumps(key)}: {{"columns": {json.dumps(columns)}, "rows": [\n{rows}\n  ]}}')
    head = json.dumps({"conditions": {**conditions(), **more}}, indent=2).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(",\n".join([head, *tables]) + "\n}\n")


def read_results(path: Path) -> dict[str, Any]:
    """What ``write_results`` wrote: "conditions", and "records" as they were."""
    groups = json.loads(path.read_text())
    found = groups.pop("conditions")
    records = []
    for key, table in groups.items():
        op, _, group = key.rpartition("/")
        head = {"group": group, "op": op} if op else {"group": group}
        for row in table["rows"]:
            values = zip(table["columns"], row, strict=True)
            records.append(head | {name: value for name, value in values if value is not None})
    return {"conditions": found, "records": records}


def by_operation(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records of each operation; those that name none are of the first one there was."""
    found: dict[str, list[dict[str, Any]]] = {}
    for fields in records:
        found.setdefault(fields.get("op", FIRST_OP), []).append(fields)
    return found
