"""Sweep the spatial gate's configurations on the present GPU, and print rows for ``kernels/tuning.py``.

    python benchmarks/tune.py --dtype fp16 --shape 32x256x56x56 --channels-last --seconds 60

The sweep starts from the configuration that the table has and changes one thing at a time, keeping what is faster,
until nothing is or the time is spent. What counts is forward (keeping for the backward) plus backward.
"""

import argparse
import dataclasses
import datetime
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch
from harness import Case

BLOCKS = {
    False: tuple(itertools.product((32, 64, 128, 256), (4, 8, 16, 32, 64, 128))),  # block_p, block_c of contiguous maps
    True: tuple(itertools.product((8, 16, 32, 64), (32, 64, 128, 256))),  # of channels_last
}
NUM_WARPS = (2, 4, 8)
NUM_STAGES = (1, 2, 3)
MIN_PIXELS = (0, 128, 512, 8192)  # where one row of the table ends and the next begins
LARGE_BYTES = 50 << 20  # one launch is for maps that do not fit the L2 cache
TRIALS, FINAL_ROUNDS = 7, 25
WORTH = 0.98  # times the best so far: what is not 2 % faster is noise


@dataclasses.dataclass
class Outcome:
    """What a sweep of one case found.

    Attributes:
        case: what was swept.
        before, after: seconds of (forward, backward), measured interleaved, of the table's row and of the best.
        config: the best.
        tried: how many configurations were.
        complete: whether the time sufficed.
    """

    case: Case
    before: tuple[float, float]
    after: tuple[float, float]
    config: Any
    tried: int
    complete: bool

    @property
    def gain(self) -> float:
        return sum(self.before) / sum(self.after)

    def row(self) -> str:
        """A line to paste into the table."""
        names = [field.name for field in dataclasses.fields(self.config) if field.name != "lag" or self.config.lag]
        config = ", ".join(f"{name}={getattr(self.config, name)}" for name in names)
        pixels = self.case.shape[2] * self.case.shape[3]
        min_pixels = max(bound for bound in MIN_PIXELS if bound <= pixels)
        itemsize = 2 if self.case.dtype != "fp32" else 8  # an architecture's rows must have one for float64, too
        measured = f"{harness.device_name()}, {datetime.datetime.now(datetime.timezone.utc).date()}"
        return (
            f"SpatialGateRow({self.case.channels_last}, {itemsize}, {min_pixels}, SpatialGateConfig({config})),"
            f"  # {measured}, {self.gain:.2f}x the row above at {'x'.join(map(str, self.case.shape))}"
        )

    def fields(self) -> dict[str, Any]:
        """The outcome as columns of a results file."""
        names = ("forward_us", "backward_us")
        return {
            **self.case.fields(),
            "config": dataclasses.asdict(self.config),
            "gain": round(self.gain, 3),
            "before": dict(zip(names, (round(1e6 * value, 1) for value in self.before), strict=True)),
            "after": dict(zip(names, (round(1e6 * value, 1) for value in self.after), strict=True)),
            "tried": self.tried,
            "complete": self.complete,
            "row": self.row(),
        }


def sweep(case: Case, seconds: float, clock: Callable | None = None) -> Outcome:
    """Sweep one case.

    Args:
        case: of output "gated"; its device must run kernels.
        seconds: when to stop trying; the last measurement comes on top.
        clock: measures; by default a CudaClock.

    Raises:
        harness.WrongResult: a configuration computes something else.
    """
    from attnk.kernels import tuning

    clock = clock or harness.CudaClock()
    deadline = time.monotonic() + seconds
    start = tuning.spatial_gate_config(
        tuning.architecture(torch.device(case.device)),
        itemsize=harness.DTYPES[case.dtype].itemsize,
        pixels=case.shape[2] * case.shape[3],
        channels_last=case.channels_last,
    )
    runner = _Runner(case, clock)
    best, best_seconds = start, sum(runner.measure([start], TRIALS)[start])
    tried, improved, complete = {start}, True, True
    while improved and complete:
        improved = False
        for change in changes(case):
            config = dataclasses.replace(best, **change)
            if config in tried or not _sensible(config, case):
                continue
            if time.monotonic() > deadline:
                complete = False
                break
            tried.add(config)
            if not runner.fits(config):
                continue
            total = sum(runner.measure([config], TRIALS)[config])
            if total < WORTH * best_seconds:
                best, best_seconds, improved = config, total, True
    both = runner.measure([start, best], FINAL_ROUNDS)
    return Outcome(case, both[start], both[best], best, len(tried), complete)


def changes(case: Case) -> Iterator[dict[str, int]]:
    """What is tried, one at a time."""
    for block_p, block_c in BLOCKS[case.channels_last]:
        yield {"block_p": block_p, "block_c": block_c}
    yield from ({"num_warps": number} for number in NUM_WARPS)
    yield from ({"num_stages": number} for number in NUM_STAGES)
    if case.size >= LARGE_BYTES:
        yield from ({"lag": lag} for lag in (0, *harness.LAGS))


def _sensible(config: Any, case: Case) -> bool:
    elements = config.block_p * config.block_c / (32 * config.num_warps)
    lag_works = config.lag == 0 or config.lag >= -(-case.shape[2] * case.shape[3] // config.block_p)
    return 4 <= elements <= 64 and lag_works and config.block_c <= 2 * case.shape[1]


class _Runner:
    """Launches one case with any configuration, and compares with the first one's results, checked on their part."""

    def __init__(self, case: Case, clock: Callable) -> None:
        from attnk.kernels import spatial_gate as kernels

        self.kernels, self.clock = kernels, clock
        x, self.dout = case.inputs()
        harness.check(harness.providers(case, compiled=False), x, self.dout)
        self.x = x.detach()
        self.weight, self.bias = (parameter.detach() for parameter in case.attnk().parameters())
        self.options = (case.shape[1], case.channels_last, "max_avg", "gated", "first", True, True)
        self.expected: list[torch.Tensor] | None = None

    def forward(self, config: Any) -> Any:
        return self.kernels.spatial_gate_forward(
            self.x, self.weight, self.bias, "max_avg", "gated", "first", config=config
        )

    def backward(self, config: Any, kept: Any) -> Any:
        return self.kernels.spatial_gate_backward(
            self.dout, self.x, self.weight, *kept[1:], *self.options, config=config
        )

    def fits(self, config: Any) -> bool:
        """Whether the device has the resources; what it computes must be right."""
        from triton.runtime.errors import OutOfResources

        try:
            kept = self.forward(config)
            got = [kept[0], *self.backward(config, kept)]
        except OutOfResources:
            return False
        if self.expected is None:
            self.expected = got
            return True
        for name, value, expected in zip(("out", "dx", "dweight", "dbias"), got, self.expected, strict=True):
            scale = expected.abs().max().float()
            allowed = 8 * torch.finfo(value.dtype).eps * scale  # sums in another order, rounded once
            error = (value.float() - expected.float()).abs().max()
            if not error <= allowed:
                raise harness.WrongResult(f"{config}: {name} is off by {error:.2e}, allowed {allowed:.2e}")
        return True

    def measure(self, configs: list[Any], rounds: int) -> dict[Any, tuple[float, float]]:
        """Median seconds of (forward, backward) of each configuration, taken in turn."""
        works: dict[tuple[Any, str], harness.Work] = {}
        for config in configs:
            if self.expected is None:
                self.fits(config)
            works[config, "forward"] = (lambda: None, lambda _, config=config: self.forward(config))
            works[config, "backward"] = (
                lambda config=config: self.forward(config),
                lambda kept, config=config: self.backward(config, kept),
            )
        seconds = harness.interleaved(works, self.clock, rounds, warmup=2)
        middle = {key: statistics.median(values) for key, values in seconds.items()}
        return {config: (middle[config, "forward"], middle[config, "backward"]) for config in configs}


def main() -> None:
    """Sweep the case that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="32x256x56x56")
    parser.add_argument("--dtype", choices=harness.DTYPES, default="fp16")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--seconds", type=float, default=60, help="when to stop trying (default: %(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("Tuning needs a GPU, and torch sees none.")
    shape = tuple(int(size) for size in options.shape.split("x"))
    case = Case(shape, "gated", options.dtype, options.channels_last, device="cuda")
    outcome = sweep(case, options.seconds)
    print(f"{case}: {outcome.tried} configurations tried" + ("" if outcome.complete else ", then the time was spent"))
    for name, before, after in zip(("forward", "backward"), outcome.before, outcome.after, strict=True):
        print(f"  {name:8s} {1e6 * before:9.1f} us, best {1e6 * after:9.1f} us, {before / after:.2f}x")
    print(outcome.row())


if __name__ == "__main__":
    main()
