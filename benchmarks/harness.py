"""What every benchmark shares: cases, providers, the correctness check, interleaved clocks, and the results file.

A *provider* is one way to compute the spatial gate. All providers of a case are timed in turn, round by round, in one
process: what the machine does meanwhile hits all of them alike, and ratios are ratios of medians of one such run.
"""

import contextlib
import dataclasses
import datetime
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attnk
from attnk.reference.spatial_gate import spatial_gate_reference

KERNEL_SIZE = 7
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LAGS = (264, 396, 528, 792)
FLUSH_BYTES = 1 << 30  # written between two measurements: more than any L2
SLEEP_CYCLES = 4_000_000  # about 2 ms, longer than the host takes to launch any pass
COPY_BYTES = 2 << 30


class TutorialMap(nn.Module):
    """Spatial attention as tutorials write it that return the map."""

    def __init__(self, kernel_size: int = KERNEL_SIZE) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        avg_out = torch.mean(x, dim=1, keepdim=True)
        max_out, _ = torch.max(x, dim=1, keepdim=True)
        return self.sigmoid(self.conv1(torch.cat([avg_out, max_out], dim=1)))


class TutorialGated(nn.Module):
    """Spatial attention as tutorials write it that return the gated input."""

    def __init__(self, kernel_size: int = KERNEL_SIZE) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        max_pool = torch.max(x, dim=1, keepdim=True)[0]
        avg_pool = torch.mean(x, dim=1, keepdim=True)
        return x * self.sigmoid(self.conv(torch.cat([max_pool, avg_pool], dim=1)))


@dataclasses.dataclass(frozen=True)
class Case:
    """One input and one output: what all providers of a comparison compute.

    Attributes:
        shape: (B, C, H, W).
        output: "map" (average first, no bias) or "gated" (maximum first, with bias), as the two tutorials have it.
        dtype: a key of DTYPES.
        channels_last: the layout of x.
        device: "cpu" or "cuda".
    """

    shape: tuple[int, int, int, int]
    output: str
    dtype: str = "fp32"
    channels_last: bool = False
    device: str = "cpu"

    @property
    def size(self) -> int:
        """S, the bytes of x."""
        batch, channels, height, width = self.shape
        return batch * channels * height * width * DTYPES[self.dtype].itemsize

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"

    def __str__(self) -> str:
        return f"{self.output} {'x'.join(map(str, self.shape))} {self.dtype} {self.layout}"

    def fields(self) -> dict[str, Any]:
        """The case as columns of a results file."""
        names = ("output", "shape", "dtype", "layout")
        return dict(zip(names, (self.output, "x".join(map(str, self.shape)), self.dtype, self.layout), strict=True))

    def inputs(self) -> tuple[Tensor, Tensor]:
        """x, requiring grad, and the gradient of the output.

        Every pixel's maximum is unique, so that providers may differ on whom equal maxima give their gradient.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        batch, channels, height, width = self.shape
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        options = {"dtype": DTYPES[self.dtype], "device": self.device}
        x = torch.empty(self.shape, memory_format=layout, **options).normal_(generator=generator).clamp_(-4, 4)
        plane = (batch, 1, height, width)
        winner = torch.randint(channels, plane, device=self.device, generator=generator)
        x.scatter_(1, winner, torch.empty(plane, **options).uniform_(5, 6, generator=generator))
        shape = plane if self.output == "map" else self.shape
        dout = torch.empty(shape, memory_format=layout, **options).normal_(generator=generator)
        dout *= min(1, 1000 / dout.numel() ** 0.5)  # so that its sums do not overflow in float16
        return x.requires_grad_(), dout

    def tutorial(self) -> nn.Module:
        """The tutorials' module with the weights that every provider of the case has."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = TutorialMap() if self.output == "map" else TutorialGated()
        return module.to(self.device, DTYPES[self.dtype])

    def attnk(self) -> nn.Module:
        """The module of attnk that computes the same, with the same weights."""
        options = {"order": "max_avg", "bias": True} if self.output == "gated" else {}
        module = attnk.SpatialAttention(KERNEL_SIZE, output=self.output, **options)
        module.load_state_dict(self.tutorial().state_dict())
        return module.to(self.device, DTYPES[self.dtype])


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: what tables call it.
        module: takes x.
        parameters: what is differentiated for, besides x.
        config: the kernel configuration it is forced to; None for what the library chooses.
    """

    name: str
    module: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    config: Any = None

    def forward(self, x: Tensor) -> Tensor:
        with forced_config(self.config):
            return self.module(x)

    def backward(self, out: Tensor, x: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        with forced_config(self.config):
            return torch.autograd.grad(out, (x, *self.parameters), dout)


def providers(case: Case, compiled: bool = True) -> dict[str, Provider]:
    """The providers of a case, by name; the tutorials' code, which ratios refer to, comes first."""
    tutorial, ours = case.tutorial(), case.attnk()
    parameters, our_parameters = tuple(tutorial.parameters()), tuple(ours.parameters())
    found = [Provider("tutorial", tutorial, parameters)]
    if compiled:
        torch._dynamo.reset()  # a second shape would otherwise be compiled for any shape
        found.append(Provider("torch.compile", torch.compile(tutorial, fullgraph=True), parameters))
    if case.device == "cpu":
        found.append(Provider("attnk", ours, our_parameters))
    else:
        two, one = launch_configs(case)
        found.append(Provider("attnk, two launches", ours, our_parameters, two))
        if one is not None:
            found.append(Provider("attnk, one launch", ours, our_parameters, one))
    return {provider.name: provider for provider in found}


def launch_configs(case: Case) -> tuple[Any, Any]:
    """The tuning table's configuration of a case for two launches, and for one, or None where that cannot run."""
    from attnk.kernels import tuning

    _, _, height, width = case.shape
    config = tuning.spatial_gate_config(
        tuning.architecture(torch.device(case.device)),
        itemsize=DTYPES[case.dtype].itemsize,
        pixels=height * width,
        channels_last=case.channels_last,
    )
    tiles = -(-height * width // config.block_p)
    lag = next((lag for lag in (config.lag, *LAGS) if lag >= tiles), None)
    two = dataclasses.replace(config, lag=0)
    return two, None if case.output == "map" or lag is None else dataclasses.replace(config, lag=lag)


@contextlib.contextmanager
def forced_config(config: Any) -> Iterator[None]:
    """Launch every spatial gate inside the block with one configuration, whatever the table says; None: as it says."""
    if config is None:
        yield
        return
    from attnk.kernels import spatial_gate as kernels

    original = kernels.spatial_gate_config
    kernels.spatial_gate_config = lambda *args, **kwargs: config
    try:
        yield
    finally:
        kernels.spatial_gate_config = original


# What is timed: a pass is a pair, what comes before the clock starts and what comes after, which takes its result.

PASSES = ("forward", "backward", "training")
Work = tuple[Callable[[], Any], Callable[[Any], Any]]


def work(provider: Provider, x: Tensor, dout: Tensor, which: str) -> Work:
    """One pass of a provider: the forward without grad, the backward alone, or both as in training."""
    if which == "forward":
        return lambda: None, lambda _: _without_grad(provider, x)
    if which == "backward":
        return lambda: provider.forward(x), lambda out: provider.backward(out, x, dout)
    return lambda: None, lambda _: provider.backward(provider.forward(x), x, dout)


def _without_grad(provider: Provider, x: Tensor) -> Tensor:
    with torch.no_grad():
        return provider.forward(x)


# Correctness


class WrongResult(RuntimeError):
    """A provider that computes something else; it is not timed."""


def check(found: dict[str, Provider], x: Tensor, dout: Tensor) -> None:
    """Raise unless every provider computes the case, at the very shape that is timed.

    The oracle is the definition in float64. As in the tests, a provider passes when the largest error of the output
    and of every gradient is at most ``2 * (the tutorial's own error + eps * max |oracle|)``; the gradients of the
    parameters, sums over all pixels that may cancel, are conceded the rounding of their terms in float32. The tutorial
    passes when its errors are at most 5 % of max |oracle|, and the rounding of those terms in its dtype.

    Raises:
        WrongResult: names the provider, the tensor, its error and what was allowed.
    """
    tutorial = next(iter(found.values()))
    oracle, terms = _oracle(x.detach(), dout, tutorial.parameters)
    eps = torch.finfo(x.dtype).eps
    allowed: dict[str, float] = {}
    for provider in found.values():
        out = provider.forward(x)
        got = dict(zip(oracle, (out.detach(), *provider.backward(out, x, dout)), strict=True))
        got["out without grad"] = _without_grad(provider, x)
        for name, value in got.items():
            want = oracle["out" if name.startswith("out") else name]
            summed = terms if name in ("dweight", "dbias") else 0
            if value.shape != want.shape or value.dtype != x.dtype:
                raise WrongResult(f"{provider.name}: {name} is {value.dtype} {tuple(value.shape)}")
            error, scale = _deviation(value, want), want.abs().max().item()
            bound = allowed.setdefault(name, 0.05 * scale + eps * summed)
            if not error <= bound:  # also catches NaN
                raise WrongResult(f"{provider.name}: error of {name} is {error:.2e}, allowed {bound:.2e}")
            if provider is tutorial:
                allowed[name] = 2 * (error + eps * scale + torch.finfo(torch.float32).eps * summed)


def _oracle(x: Tensor, dout: Tensor, parameters: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], float]:
    """Output and gradients in float64, and the sum of the absolute terms of the parameters' gradients."""
    gated = dout.shape == x.shape and len(parameters) == 2
    order = "max_avg" if gated else "avg_max"
    wide = [parameter.detach().double().requires_grad_() for parameter in parameters]
    parts, sums, magnitude = [], [torch.zeros_like(parameter) for parameter in wide], 0.0
    images = max(1, (1 << 25) // x[0].numel())  # at a time: float64 takes room
    for part, dpart in zip(x.split(images), dout.split(images), strict=True):
        part = part.double().requires_grad_()
        logit = spatial_gate_reference(part, *wide, order=order, output="logit")
        gate = torch.sigmoid(logit)
        out = part * gate if gated else gate
        dx, dlogit, *grads = torch.autograd.grad(out, (part, logit, *wide), dpart.double())
        parts.append((out.detach(), dx))
        sums = [total + grad for total, grad in zip(sums, grads, strict=True)]
        magnitude += (dlogit.abs().sum() * part.abs().max()).item()
    outs, dxs = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    names = ("out", "dx", "dweight", "dbias")
    oracle = dict(zip(names, (outs, dxs, *sums), strict=False))
    return oracle, magnitude


def _deviation(value: Tensor, want: Tensor) -> float:
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


def copy_bandwidth() -> float:
    """Bytes a second that a large copy on the device moves, read and written ones counted."""
    size = min(COPY_BYTES, torch.cuda.get_device_properties(0).total_memory // 8)
    source = torch.empty(size // 4, device="cuda").normal_()
    target = torch.empty_like(source)
    seconds = interleaved({"copy": (lambda: None, lambda _: target.copy_(source))}, CudaClock(), rounds=20, warmup=5)
    return 2 * size / statistics.median(seconds["copy"])


def minimal_bytes(case: Case, which: str) -> int:
    """The fewest bytes a pass must move through memory: x, dout, out and dx once each."""
    plane = case.size // case.shape[1]
    if case.output == "map":
        return {"forward": 1, "backward": 1, "training": 2}[which] * (case.size + plane)
    return {"forward": 2, "backward": 3, "training": 5}[which] * case.size


def kernel_bytes(case: Case, which: str, launches: int = 2) -> int:
    """The bytes that attnk's kernels move in a pass: the formula in their file.

    Args:
        case: the input.
        which: "forward" (nothing kept), "backward" or "training".
        launches: 1 counts x and dout as read once by a launch that reads them twice.
    """
    batch, _, height, width = case.shape
    pixels = batch * height * width
    frame = KERNEL_SIZE - 1
    framed = batch * (height + frame) * (width + frame)
    size, map_size = case.size, pixels * DTYPES[case.dtype].itemsize
    if case.output == "map":
        forward, kept = size + 16 * framed + map_size, 8 * pixels
        backward = map_size + 4 * pixels + 4 * framed + size + 4 * framed + 4 * pixels
    elif launches == 2:
        forward, kept = 3 * size + 16 * framed, 4 * pixels
        backward = 4 * size + 8 * framed + 20 * pixels
    else:
        forward, kept = 2 * size + 16 * framed, 4 * pixels
        backward = 3 * size + 8 * framed + 16 * pixels
    backward += 12 * framed
    return {"forward": forward, "backward": backward, "training": forward + kept + backward}[which]


# Results

RECORDS: list[dict[str, Any]] = []
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
    """Write a results file: the conditions and ``more``, then a table for each group of records, a row a line."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for fields in records:
        groups.setdefault(fields["group"], []).append(fields)
    tables = []
    for group, members in groups.items():
        columns = list(dict.fromkeys(name for fields in members for name in fields if name != "group"))
        rows = ",\n".join(f"    {json.dumps([fields.get(name) for name in columns])}" for fields in members)
        tables.append(f'  {json.dumps(group)}: {{"columns": {json.dumps(columns)}, "rows": [\n{rows}\n  ]}}')
    head = json.dumps({"conditions": {**conditions(), **more}}, indent=2).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(",\n".join([head, *tables]) + "\n}\n")


def read_results(path: Path) -> dict[str, Any]:
    """What ``write_results`` wrote: "conditions", and "records" as they were."""
    groups = json.loads(path.read_text())
    found = groups.pop("conditions")
    records = [
        {
            "group": group,
            **{name: value for name, value in zip(table["columns"], row, strict=True) if value is not None},
        }
        for group, table in groups.items()
        for row in table["rows"]
    ]
    return {"conditions": found, "records": records}
