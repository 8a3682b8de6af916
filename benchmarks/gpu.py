"""Everything that needs a GPU: the tests marked so, the tuning sweep, the benchmarks. Under ten minutes in all.

    python benchmarks/gpu.py [tests] [tune] [bench] [--again]

Each part writes its file into ``benchmarks/results/<device>/`` and is skipped once it is complete; tuning and the
benchmarks have a time box, and go on where they stopped when the command is repeated.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import torch

ROOT = Path(__file__).parents[1]
PARTS = ("tests", "tune", "bench")
TEST_SECONDS, TUNE_SECONDS, BENCH_SECONDS = 150, 150, 240  # ten minutes, less what starting and finishing takes
TUNED_SHAPES = ((32, 64, 112, 112), (32, 256, 56, 56), (256, 512, 14, 14), (32, 2048, 7, 7))  # for tune.MIN_PIXELS


def main() -> None:
    """Run the parts that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--again", action="store_true", help="also parts that are complete, from their start")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        raise SystemExit("This needs a GPU, and torch sees none. Without one: make test, make bench.")
    folder = harness.device_folder()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{harness.device_name()}: results go to {folder.relative_to(ROOT)}")
    failed = False
    for part in options.parts or PARTS:
        path = folder / f"{part}.json"
        if options.again:
            path.unlink(missing_ok=True)
        if path.exists() and json.loads(path.read_text())["conditions"].get("complete"):
            print(f"{part}: complete, in {path.name}; --again repeats it")
            continue
        start = time.monotonic()
        failed |= {"tests": run_tests, "tune": run_tune, "bench": run_bench}[part](path)
        print(f"{part}: {time.monotonic() - start:.0f} s")
    raise SystemExit(failed)


def run_tests(path: Path) -> bool:
    """The tests marked ``gpu``. True where one failed or the time ran out."""
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-rf"]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=TEST_SECONDS, capture_output=True, text=True, check=False)
        output, passed = code.stdout, code.returncode == 0
    except subprocess.TimeoutExpired as error:
        output, passed = f"{(error.stdout or b'').decode()}\ntimed out after {TEST_SECONDS} s", False
    lines = output.strip().splitlines()
    print("\n".join(lines[-20:]))
    failures = [line for line in lines if line.startswith("FAILED")]
    harness.write_results(path, [{"group": "tests", "summary": lines[-1], "failures": failures}], complete=passed)
    return not passed


def run_tune(path: Path) -> bool:
    """The tuning sweep, one case after another until the time is spent. True where a configuration was wrong."""
    import tune
    from tqdm import tqdm

    cases = [
        harness.Case(shape, "gated", dtype, channels_last, device="cuda")
        for dtype in ("fp16", "fp32")
        for channels_last in (False, True)
        for shape in TUNED_SHAPES
    ]
    records: list[dict[str, Any]] = harness.read_results(path)["records"] if path.exists() else []
    swept = {record["case"] for record in records if record["complete"]}
    todo = [case for case in cases if str(case) not in swept]
    deadline, failed = time.monotonic() + TUNE_SECONDS, False
    with tqdm(todo, desc="tuning", unit="case") as bar:
        for position, case in enumerate(bar):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            bar.set_postfix_str(str(case))
            try:
                outcome = tune.sweep(case, left / (len(todo) - position))
            except harness.WrongResult as error:
                print(f"{case}: not tuned, {error}")
                failed = True
                continue
            records = [record for record in records if record["case"] != str(case)]
            records.append({"group": "tune", "case": str(case), **outcome.fields()})
            swept = {record["case"] for record in records if record["complete"]}
            harness.write_results(path, records, complete={str(case) for case in cases} <= swept)
    print("Rows for kernels/tuning.py, most pixels first:")
    for record in records:
        print(f"  {record['row']}{'' if record['complete'] else '  (sweep not complete)'}")
    return failed


def run_bench(path: Path) -> bool:
    """The benchmarks of group ``gpu``, and their picture. True where a provider was wrong or failed."""
    import plot

    command = [
        sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-k", "test_gpu",
        "--results", str(path), "--resume", "--time-box", str(BENCH_SECONDS),
    ]  # fmt: skip
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if path.exists():
        print(f"drew {plot.draw(path, path.with_suffix('.png')).relative_to(ROOT)}")
    return code != 0


if __name__ == "__main__":
    main()
