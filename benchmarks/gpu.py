"""Everything that needs a GPU: the tests marked so, the tuning sweep, the benchmarks. Under ten minutes in all.

    python benchmarks/gpu.py [tests] [tune] [bench] [spatial_gate] [linear_attention] ... [--again] [--seconds 480]

Each part writes its file into ``benchmarks/results/<device>/``, tuning and benchmarks one for each operation, and is
skipped once it is complete. They share the seconds, and go on where they stopped when the command is repeated.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import torch

ROOT = Path(__file__).parents[1]
SHARES = {"tests": 300, "tune": 120, "bench": 200}  # of the time, by part; every operation's tuning has one, and so on
SECONDS = 480  # ten minutes, less what starting takes and the cases that are begun in time and end later

Step = tuple[str, str]  # part, operation; the tests are of all operations


def main() -> None:
    """Run the parts and operations that the command line names, or all."""
    ops = [*harness.operations(), *harness.NETWORKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"of {', '.join((*SHARES, *ops))}; all by default")
    parser.add_argument("--again", action="store_true", help="also parts that are complete, from their start")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="in all (default: %(default)s)")
    options = parser.parse_args()
    unknown = sorted(set(options.what) - {*SHARES, *ops})
    if unknown:
        parser.error(f"unknown part or operation {', '.join(unknown)}: choose from {', '.join((*SHARES, *ops))}")
    if not torch.cuda.is_available():
        raise SystemExit("This needs a GPU, and torch sees none. Without one: make test, make bench.")
    folder = harness.device_folder()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{harness.device_name()}: results go to {folder.relative_to(ROOT)}")
    deadline = time.monotonic() + options.seconds
    todo = []
    for step in steps(options.what, ops):
        path = path_of(folder, step)
        if options.again:
            path.unlink(missing_ok=True)
        if path.exists() and json.loads(path.read_text())["conditions"].get("complete"):
            print(f"{' '.join(step)}: complete, in {path.name}; --again repeats it")
            continue
        todo.append(step)
    failed = False
    for position, step in enumerate(todo):
        part, op = step
        start = time.monotonic()
        seconds = share(todo[position:], deadline - start)
        path = path_of(folder, step)
        if part == "tests":
            failed |= run_tests(path, seconds)
        else:
            failed |= {"tune": run_tune, "bench": run_bench}[part](path, op, seconds)
        print(f"{' '.join(step)}: {time.monotonic() - start:.0f} s of {seconds:.0f} s")
    raise SystemExit(failed)


def steps(what: list[str], ops: list[str]) -> list[Step]:
    """What to run, in order: the parts named, or all, of the operations and networks named, or all."""
    parts = [part for part in SHARES if part in what] or list(SHARES)
    chosen = [op for op in ops if op in what] or ops
    of_part = {"tests": [""], "tune": [op for op in chosen if op not in harness.NETWORKS], "bench": chosen}
    return [(part, op) for part in parts for op in of_part[part]]


def share(left: list[Step], seconds: float) -> float:
    """The part of the seconds left that is the first step's."""
    return max(0.0, seconds) * SHARES[left[0][0]] / sum(SHARES[part] for part, _ in left)


def path_of(folder: Path, step: Step) -> Path:
    """The results file of a step."""
    return folder / f"{'_'.join(filter(None, reversed(step)))}.json"


def run_tests(path: Path, seconds: float) -> bool:
    """The tests marked ``gpu``. True where one failed or the time ran out."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "-rf",
        *in_parallel(),
    ]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=seconds, capture_output=True, text=True, check=False)
        output, passed = code.stdout, code.returncode == 0
    except subprocess.TimeoutExpired as error:
        output, passed = f"{(error.stdout or b'').decode()}\ntimed out after {seconds:.0f} s", False
    lines = output.strip().splitlines()
    print("\n".join(lines[-20:]))
    failures = [line for line in lines if line.startswith("FAILED")]
    harness.write_results(path, [{"group": "tests", "summary": lines[-1], "failures": failures}], complete=passed)
    return not passed


def in_parallel() -> list[str]:
    """Options of pytest for as many processes as there are cores: compiling takes most of the time."""
    return ["-n", str(os.cpu_count())] if importlib.util.find_spec("xdist") else []


def run_tune(path: Path, op: str, seconds: float) -> bool:
    """An operation's sweep, one case after another until the time is spent. True where a configuration was wrong."""
    import tune
    from compiling import Compiler
    from tqdm import tqdm

    cases = harness.cases_of(op).tuned_cases()
    records: list[dict[str, Any]] = harness.read_results(path)["records"] if path.exists() else []
    swept = {record["name"] for record in records if record["complete"]}
    todo = [case for case in cases if str(case) not in swept]
    deadline, failed = time.monotonic() + seconds, False
    with Compiler() as compiler, tqdm(todo, desc=f"tuning {op}", unit="case") as bar:
        for position, case in enumerate(bar):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            bar.set_postfix_str(str(case))
            try:
                outcome = tune.sweep(case, left / (len(todo) - position), compiler=compiler)
            except harness.WrongResult as error:
                print(f"{case}: not tuned, {error}")
                failed = True
                continue
            records = [record for record in records if record["name"] != str(case)]
            records.append({"group": "tune", "name": str(case), **outcome.fields()})
            swept = {record["name"] for record in records if record["complete"]}
            harness.write_results(path, records, complete={str(case) for case in cases} <= swept)
    print("Rows for kernels/tuning.py:")
    for record in records:
        print(f"{record['row']}{'' if record['complete'] else '  (sweep not complete)'}")
    return failed


def run_bench(path: Path, op: str, seconds: float) -> bool:
    """An operation's benchmarks of group ``gpu``, and their picture. True where a provider was wrong or failed.

    Everything is first compiled in parallel, which is quicker than one after another by the number of cores.
    """
    import plot

    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", f"benchmarks/bench_{op}.py", "-q", "-k", "test_gpu"]
    if parallel := in_parallel():
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # in each of the processes
        subprocess.run([*command, "--compile", *parallel], cwd=ROOT, env=environment, check=False)
    left = seconds - (time.monotonic() - start)
    command += ["--benchmark-only", "--results", str(path), "--resume", "--time-box", str(left)]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if path.exists():
        for png in plot.draw(path, path.with_suffix(".png")):
            print(f"drew {png.relative_to(ROOT)}")
    return code != 0


if __name__ == "__main__":
    main()
