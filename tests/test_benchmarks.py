"""The benchmarks run, count what is plausible, and refuse to time what is wrong."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def poison():
    """Without poison: it makes operators slower and other ones."""


@pytest.fixture
def harness(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import harness

    return harness


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path_factory.mktemp("benchmarks") / "results.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-only",
        "--quick",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")
    }
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    chosen = "io or memory or overhead or cpu"
    done = subprocess.run(
        [*command, "-k", chosen, "--results", str(path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path, done.stdout


def test_io_table_is_plausible(quick_run, harness):
    pytest.importorskip("triton")
    path, output = quick_run
    assert "io, counted" in output
    records = [record for record in harness.read_results(path)["records"] if record["group"] == "io"]
    found = {(record["output"], record["provider"]): (record["forward_S"], record["backward_S"]) for record in records}
    # beside whole multiples of S there is what pixels and frame cost: under 1 S at this tiny shape
    whole = {
        ("gated", "tutorial"): (4, 14),
        ("gated", "attnk, two launches"): (3, 4),
        ("gated", "attnk, one launch"): (2, 3),
        ("map", "tutorial"): (2, 5),
        ("map", "attnk, two launches"): (1, 1),
    }
    assert found.keys() == whole.keys()
    for key, expected in whole.items():
        for number, least in zip(found[key], expected, strict=True):
            assert least < number < least + 1, (key, found[key])


def test_every_group_reports(quick_run, harness):
    path, output = quick_run
    results = harness.read_results(path)
    groups = {record["group"] for record in results["records"]}
    assert groups >= {"io", "memory", "overhead", "cpu"}
    assert results["conditions"]["torch"] == torch.__version__
    cpu = [record for record in results["records"] if record["group"] == "cpu"]
    assert all(record["median_us"] > 0 and record["times_tutorial"] > 0 for record in cpu)
    assert {record["times_tutorial"] for record in cpu if record["provider"] == "tutorial"} == {1}
    for group in ("io", "memory"):
        assert f"'{group}/" in output, "a counted group must not share pytest-benchmark's table with a measured one"


def test_picture(quick_run, harness, tmp_path):
    pytest.importorskip("matplotlib")
    import plot

    png = plot.draw(quick_run[0], tmp_path / "results.png")
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("output", ["map", "gated"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_right_providers_pass(harness, output, channels_last):
    case = harness.Case((2, 8, 9, 7), output, channels_last=channels_last)
    harness.check(harness.providers(case, compiled=False), *case.inputs())


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("out", lambda module, x: module(x) * (1 + 1e-4)),
        ("out", lambda module, x: module(x).where(torch.arange(x[0, 0].numel()).view(x.shape[2:]) > 0, torch.nan)),
        ("out", lambda module, x: module(x).double()),
        ("dx", lambda module, x: module(x.detach()) + 0 * x),
        ("dx", lambda module, x: module(x) + 1e-3 * (x - x.detach())),
    ],
)
def test_a_wrong_provider_is_refused(harness, name, spoil):
    case = harness.Case((2, 8, 9, 7), "gated")
    found = harness.providers(case, compiled=False)
    module = found["attnk"].module
    found["attnk"] = dataclasses.replace(found["attnk"], module=lambda x: spoil(module, x))
    with pytest.raises(harness.WrongResult, match=f"attnk: .*{name}"):
        harness.check(found, *case.inputs())


def test_providers_take_turns(harness):
    order = []
    works = {name: (lambda: None, lambda _, name=name: order.append(name)) for name in "abc"}
    seconds = harness.interleaved(works, harness.CpuClock(), rounds=4, warmup=2)
    assert [len(values) for values in seconds.values()] == [4, 4, 4]
    rounds = ["".join(order[start : start + 3]) for start in range(0, 18, 3)]
    assert rounds == ["bca", "cab", "abc", "bca", "cab", "abc"]


def test_results_file_round_trip(harness, tmp_path):
    records = [{"group": "a", "x": 1}, {"group": "b", "y": [1.5, None]}, {"group": "a", "z": "text"}]
    path = tmp_path / "results.json"
    harness.write_results(path, records, complete=True)
    found = harness.read_results(path)
    assert sorted(found["records"], key=str) == sorted(records, key=str)
    assert found["conditions"]["complete"] is True


def test_gpu_command_says_what_it_needs():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "benchmarks/gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "This needs a GPU, and torch sees none. Without one: make test, make bench.\n"
