"""Sweep an operation's configurations on the present GPU, and print rows for ``kernels/tuning.py``.

    python benchmarks/tune.py --dtype fp16 --shape 32x256x56x56 --channels-last --seconds 60
    python benchmarks/tune.py softmax_attention --dtype bf16 --shape 16x12x1370x64 --extra bias

The sweep starts from the configuration that the table has and changes one thing at a time, keeping what is faster,
until nothing is or the time is spent. What counts stands in the operation's ``Tuning``: for the spatial gate forward
(keeping for the backward) plus backward, for attention each kernel by itself.
"""

import argparse
import dataclasses
import datetime
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from compiling import Compiler

TRIALS, FINAL_ROUNDS = 7, 25
EXTRAS = (
    "bias, table or dropout of softmax attention; relu, elu or softmax of linear attention; row, column, sum or "
    "criss_cross of axial attention; shift, table or 'shift, table' of window attention"
)
WORTH = 0.98  # times the best so far: what is not 2 % faster is noise


@dataclasses.dataclass
class Outcome:
    """What a sweep of one case found.

    Attributes:
        case: what was swept.
        before, after: seconds of what was timed, by name, measured interleaved, of the table's row and of the best.
        values: the best of every part of the configuration.
        tried: how many were.
        complete: whether the time sufficed.
        row: lines to paste into the table.
    """

    case: harness.Case
    before: dict[str, float]
    after: dict[str, float]
    values: dict[str, Any]
    tried: int
    complete: bool
    row: str = ""

    @property
    def gain(self) -> float:
        return sum(self.before.values()) / sum(self.after.values())

    def fields(self) -> dict[str, Any]:
        """The outcome as columns of a results file."""
        return {
            **self.case.fields(),
            "config": {part: dataclasses.asdict(value) for part, value in self.values.items()},
            "gain": round(self.gain, 3),
            "before_us": {name: round(1e6 * value, 1) for name, value in self.before.items()},
            "after_us": {name: round(1e6 * value, 1) for name, value in self.after.items()},
            "tried": self.tried,
            "complete": self.complete,
            "row": self.row,
        }


def sweep(
    case: harness.Case, seconds: float, clock: Callable | None = None, compiler: Callable | None = None
) -> Outcome:
    """Sweep one case: of every part of its configuration what is one step from the best, until nothing is faster.

    Args:
        case: its device must run kernels.
        seconds: when to stop trying; the last measurements come on top.
        clock: measures; by default a CudaClock.
        compiler: is called with the case and all configurations that are tried next.

    Raises:
        harness.WrongResult: a configuration computes something else.
    """
    clock = clock or harness.CudaClock()
    deadline = time.monotonic() + seconds
    tuning = harness.cases_of(case.op).Tuning(case)
    tuning.check()
    expected = tuning.results(tuning.start)
    outcome = Outcome(case, {}, {}, dict(tuning.start), 0, True)
    fastest = {part: _seconds(tuning, part, outcome.values, clock) for part in tuning.start}
    tried = {part: {value} for part, value in tuning.start.items()}
    todo = _untried(tuning, list(tuning.start), outcome.values, tried)
    while todo:
        if compiler:
            compiler(case, [outcome.values | {part: value} for part, value in todo])
        improved = []
        for part, value in todo:
            if time.monotonic() > deadline:
                outcome.complete = False
                break
            tried[part].add(value)
            values = outcome.values | {part: value}
            found = _seconds(tuning, part, values, clock) if _fits(tuning, values, expected) else math.inf
            if found < WORTH * fastest[part]:
                outcome.values, fastest[part] = values, found
                improved.append(part)
        todo = _untried(tuning, improved, outcome.values, tried) if outcome.complete else []
    outcome.tried = sum(map(len, tried.values()))
    for part, start in tuning.start.items():
        best = outcome.values[part]
        both = _measure(tuning, part, outcome.values, list(dict.fromkeys((start, best))), FINAL_ROUNDS, clock)
        if sum(both[best].values()) > sum(both[start].values()):  # it was noise
            best = start
        outcome.before |= both[start]
        outcome.after |= both[best]
        outcome.values[part] = best
    measured = f"{harness.device_name()}, {datetime.datetime.now(datetime.timezone.utc).date()}"
    row = tuning.row(outcome.values)
    outcome.row = f"{row}  # {measured}, {outcome.gain:.2f}x the row above at {case}"
    return outcome


def _untried(
    tuning: Any, parts: list[str], values: dict[str, Any], tried: dict[str, set[Any]]
) -> list[tuple[str, Any]]:
    """What is one step from the best of these parts and was not tried."""
    steps = ((part, value) for part in dict.fromkeys(parts) for value in tuning.candidates(part, values[part]))
    return [(part, value) for part, value in dict.fromkeys(steps) if value not in tried[part]]


def _seconds(tuning: Any, part: str, values: dict[str, Any], clock: Callable) -> float:
    """What a part of a configuration takes."""
    return sum(_measure(tuning, part, values, [values[part]], TRIALS, clock)[values[part]].values())


def _fits(tuning: Any, values: dict[str, Any], expected: dict[str, torch.Tensor]) -> bool:
    """Whether the device has the resources; what a configuration computes must be right."""
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        got = tuning.results(values)
    except (OutOfResources, PTXASError):
        return False
    for name, want in expected.items():
        scale = want.abs().max().float()
        allowed = 8 * torch.finfo(want.dtype).eps * scale  # sums in another order, rounded once
        error = (got[name].float() - want.float()).abs().max()
        if not error <= allowed:
            raise harness.WrongResult(f"{values}: {name} is off by {error:.2e}, allowed {allowed:.2e}")
    return True


def _measure(
    tuning: Any, part: str, values: dict[str, Any], candidates: list[Any], rounds: int, clock: Callable
) -> dict[Any, dict[str, float]]:
    """Median seconds of what is timed of each candidate for a part, by name, taken in turn."""
    works = {
        (candidate, name): work
        for candidate in candidates
        for name, work in tuning.works(part, values | {part: candidate}).items()
    }
    seconds = harness.interleaved(works, clock, rounds, warmup=2)
    found: dict[Any, dict[str, float]] = {candidate: {} for candidate in candidates}
    for (candidate, name), taken in seconds.items():
        found[candidate][name] = statistics.median(taken)
    return found


def main() -> None:
    """Sweep the case that the command line names."""
    ops = harness.operations()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="?", choices=ops, default=harness.FIRST_OP, help="default: %(default)s")
    parser.add_argument(
        "--shape", help="BxCxHxW of a map; BxHEADSxTOKENSxD of attention, BxHEIGHTxWIDTHxHEADSxD in groups"
    )
    parser.add_argument("--dtype", choices=harness.DTYPES, default="fp16")
    parser.add_argument("--channels-last", action="store_true", help="of a map")
    parser.add_argument("--extra", default="", help=f"what there is besides: {EXTRAS}")
    parser.add_argument("--seconds", type=float, default=60, help="when to stop trying (default: %(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("Tuning needs a GPU, and torch sees none.")
    case = harness.cases_of(options.op).tuned_case(options)
    with Compiler() as compiler:
        outcome = sweep(case, options.seconds, compiler=compiler)
    print(f"{case}: {outcome.tried} configurations tried" + ("" if outcome.complete else ", then the time was spent"))
    for name, before in outcome.before.items():
        after = outcome.after[name]
        print(f"  {name:8s} {1e6 * before:9.1f} us, best {1e6 * after:9.1f} us, {before / after:.2f}x")
    print(outcome.row)


if __name__ == "__main__":
    main()
