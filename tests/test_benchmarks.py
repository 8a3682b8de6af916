"""The benchmarks run, count what is plausible, and refuse to time what is wrong."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
OPS = (
    "spatial_gate",
    "axial_attention",
    "cbam",
    "channel_gate",
    "coordinate_gate",
    "linear_attention",
    "softmax_attention",
    "window_attention",
)
GATES = {"channel_gate": "ChannelGateCase", "cbam": "CbamCase", "coordinate_gate": "CoordinateGateCase"}


@pytest.fixture(autouse=True)
def poison():
    """Without poison: it makes operators slower and other ones."""


@pytest.fixture
def harness(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("harness")


@pytest.fixture
def gate(harness):
    return importlib.import_module("spatial_gate_cases")


@pytest.fixture
def attention(harness):
    return importlib.import_module("softmax_attention_cases")


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
    chosen = "test_io or test_memory or test_overhead or test_cpu"
    done = subprocess.run(
        [*command, "-k", chosen, "--results", str(path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path, done.stdout


def records_of(harness, path, op, group):
    records = harness.by_operation(harness.read_results(path)["records"])[op]
    return [record for record in records if record["group"] == group]


def test_io_table_of_the_spatial_gate_is_plausible(quick_run, harness):
    path, output = quick_run
    assert "spatial_gate: io, counted" in output
    records = records_of(harness, path, "spatial_gate", "io")
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


@pytest.mark.parametrize(
    ("op", "kind", "eager", "kernels"),
    [
        ("channel_gate", "SE", (3, 10), None),
        ("channel_gate", "avg + max", (4, 15), (3, 4)),
        ("cbam", "CBAM", (8, 29), (4, 5)),
        ("coordinate_gate", "coordinate", (6, 22), (3, 4)),
    ],
)
def test_io_tables_of_gates_are_plausible(quick_run, harness, op, kind, eager, kernels):
    path, output = quick_run
    assert f"{op}: io, counted" in output
    records = [record for record in records_of(harness, path, op, "io") if record["case"] == kind]
    found = {record["provider"]: (record["forward_S"], record["backward_S"]) for record in records}
    assert found.keys() == ({"tutorial", "attnk"} if kernels else {"tutorial"})
    for provider, expected in (("tutorial", eager), ("attnk", kernels)):
        for number, least in zip(found.get(provider, ()), expected or (), strict=True):
            most = (
                4 if op == "coordinate_gate" and provider == "tutorial" else 2
            )  # a side of 8: a plane has 8 x 8 pixels
            assert least <= number < least + most, (provider, found)


@pytest.mark.parametrize(("op", "eager"), [("channel_gate", 0), ("cbam", 1), ("coordinate_gate", 1)])
def test_gates_keep_no_map(quick_run, harness, op, eager):
    """Besides x; the usual code of two gates keeps x times one of them."""
    records = records_of(harness, quick_run[0], op, "memory")
    kept = [record for record in records if record["pass"] == "kept for backward"]
    assert {record["provider"] for record in kept} == {"tutorial", "attnk"}
    for record in kept:
        least = eager if record["provider"] == "tutorial" else 0
        assert least <= record["peak_S"] < least + 0.25, record


def test_the_gates_share_of_a_network_is_told(quick_run, harness):
    path, output = quick_run
    assert "resnet50: cpu, measured" in output
    records = records_of(harness, path, "resnet50", "cpu")
    assert {record["provider"] for record in records} == {"tutorial", "attnk", "without gates"}
    for record in records:
        assert record["median_us"] > 0
        assert ("gates_percent" in record) == (record["provider"] != "without gates")


def test_memory_and_time_of_vgg16_are_told(quick_run, harness):
    path, output = quick_run
    assert "vgg16: cpu, measured" in output
    for group, column in (("cpu", "median_us"), ("memory", "peak_mib")):
        records = records_of(harness, path, "vgg16", group)
        found = {(record["case"], record["pass"], record["provider"]): record[column] for record in records}
        assert len(found) == 8
        assert all(number > 0 for number in found.values())
        if group == "memory":
            for kind in ("spatial attention", "attention at 3, 4, 5"):
                assert found[kind, "forward", "attnk"] < 0.8 * found[kind, "forward", "tutorial"]


def test_io_table_of_softmax_attention_is_plausible(quick_run, harness):
    path, output = quick_run
    assert "softmax_attention: io, counted" in output
    records = records_of(harness, path, "softmax_attention", "io")
    found = {(record.get("extra", ""), record["provider"]): record["forward_S"] for record in records}
    weights = 25 / 16  # keys a number of q
    # q, k and v copied for the matrix products, those, the division and the softmax; a sum with the bias besides
    assert found["", "tutorial"] == pytest.approx(10 + 6 * weights, abs=1e-3)
    assert found["bias", "tutorial"] == pytest.approx(10 + 6 * weights + 2.5 * weights, abs=1e-3)
    assert found["", "attnk"] == 4
    assert found["bias", "attnk"] == pytest.approx(4 + weights / 2, abs=1e-3)


def test_io_table_of_linear_attention_is_plausible(quick_run, harness):
    path, output = quick_run
    assert "linear_attention: io, counted" in output
    records = records_of(harness, path, "linear_attention", "io")
    found = {(record["extra"], record["provider"]): (record["forward_S"], record["backward_S"]) for record in records}
    state = 16 / 25  # a number of q, its sums not counted
    assert found["relu", "attnk"] == pytest.approx((4 + 2 * state, 7 + 3 * state), abs=0.15)
    assert found["softmax", "attnk"] == pytest.approx((4 + 2 * state, 7 + 6 * state), abs=0.3)
    for feature_map in ("relu", "softmax"):
        pairs = zip(found[feature_map, "attnk"], found[feature_map, "tutorial"], strict=True)
        assert all(ours < theirs for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("op", "extra", "expected"),
    [
        ("axial_attention", "column", (4, 7)),
        ("axial_attention", "sum", (9, 17)),
        ("window_attention", "shift, table", (4, 7)),
    ],
)
def test_io_tables_of_group_attention_are_plausible(quick_run, harness, op, extra, expected):
    path, output = quick_run
    assert f"{op}: io, counted" in output
    records = [record for record in records_of(harness, path, op, "io") if record.get("extra", "") == extra]
    found = {record["provider"]: (record["forward_S"], record["backward_S"]) for record in records}
    more = 25 * 2 * 4 / (36 * 2 * 16 * 4) if "table" in extra else 0  # of the table, in S
    pairs = 9 / 16 if "table" in extra else 0  # of the logits' gradients that each program leaves
    assert found["attnk"] == pytest.approx((expected[0] + more, expected[1] + more + pairs), abs=2e-3)
    eager = zip(found["attnk"], found["tutorial"], strict=True)
    assert all(theirs > 1.4 * ours for ours, theirs in eager)


@pytest.mark.parametrize("op", OPS)
def test_every_group_reports(quick_run, harness, op):
    path, output = quick_run
    results = harness.read_results(path)
    records = harness.by_operation(results["records"])[op]
    assert {record["group"] for record in records} >= {"io", "memory", "overhead", "cpu"}
    assert results["conditions"]["torch"] == torch.__version__
    cpu = [record for record in records if record["group"] == "cpu"]
    assert all(record["median_us"] > 0 and record["times_tutorial"] > 0 for record in cpu)
    assert {record["times_tutorial"] for record in cpu if record["provider"] == "tutorial"} == {1}
    assert {"tutorial", "attnk"} <= {record["provider"] for record in cpu}
    for group in ("io", "memory"):
        assert f"'{group}/" in output, "a counted group must not share pytest-benchmark's table with a measured one"


def test_every_kind_of_attention_is_timed(quick_run, harness):
    records = records_of(harness, quick_run[0], "softmax_attention", "cpu")
    found = {(record["case"], record.get("extra", ""), record["pass"]) for record in records}
    for name, dropout in (("quick", "dropout"), ("SelfAttention", "dropout 0.1")):
        assert {(name, "", "forward"), (name, "", "training"), (name, dropout, "training")} <= found
        assert (name, dropout, "forward") not in found, "dropout is of training"
    assert {("quick", "bias", "training"), ("quick", "table", "training")} <= found


def test_growth_of_axial_attention_is_timed_and_counted(quick_run, harness):
    axial = importlib.import_module("axial_attention_cases")
    for group, column in (("cpu", "median_us"), ("memory", "peak_mib")):
        records = records_of(harness, quick_run[0], "axial_attention", group)
        grown = [record for record in records if record["case"] == axial.GROWTH]
        assert {record["provider"] for record in grown} == {"tutorial", "attnk"}
        assert all(record[column] > 0 and record["pass"] == "training" for record in grown)
        panels = axial.panels(records)
        assert grown in [panel["records"] for row in panels for panel in row]


def test_exponent(harness):
    points = [(float(n), 7 * n**1.5) for n in (784, 3136, 50176)]
    assert harness.exponent(points) == pytest.approx(1.5)


def test_pictures(quick_run, harness, tmp_path):
    pytest.importorskip("matplotlib")
    plot = importlib.import_module("plot")

    drawn = plot.draw(quick_run[0], tmp_path / "results.png")
    assert {png.name for png in drawn} == {f"results_{op}.png" for op in (*OPS, *harness.NETWORKS)}
    for png in drawn:
        assert png.read_bytes().startswith(b"\x89PNG")


def test_memory_alone_is_drawn(harness, attention, tmp_path):
    pytest.importorskip("matplotlib")
    plot = importlib.import_module("plot")
    records = [
        {"group": "memory", **case.fields(), "pass": "training", "provider": name, "peak_S": 1.0, "peak_mib": 1.5}
        for tokens in (16, 32)
        for extra in ("", "dropout")
        for name in ("tutorial", "attnk")
        for case in [attention.AttentionCase(attention.GROWTH, 1, 1, tokens, tokens, 64, extra)]
    ]
    path = tmp_path / "memory.json"
    harness.write_results(path, records)
    assert plot.draw(path, tmp_path / "memory.png") == [tmp_path / "memory.png"]


def test_results_that_name_no_operation_are_still_drawn(harness, tmp_path):
    pytest.importorskip("matplotlib")
    plot = importlib.import_module("plot")
    columns = ["output", "shape", "dtype", "layout", "pass", "provider", "median_us", "rounds", "times_tutorial"]
    rows = [
        [output, "8x64x9x9", "fp32", "contiguous", which, provider, 1.5, 25, 1.0]
        for output in ("gated", "map")
        for which in ("forward", "training")
        for provider in ("tutorial", "attnk")
    ]
    conditions = {"device": "a CPU", "torch": "2.13", "date": "2026-11-20"}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"conditions": conditions, "cpu": {"columns": columns, "rows": rows}}))
    assert len(harness.read_results(path)["records"]) == 8
    assert plot.draw(path, tmp_path / "one.png") == [tmp_path / "one.png"]


# Correctness


@pytest.mark.parametrize("output", ["map", "gated"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_right_gates_pass(harness, gate, output, channels_last):
    case = gate.SpatialGateCase((2, 8, 9, 7), output, channels_last=channels_last)
    harness.check(case, case.providers(compiled=False), *case.inputs())


def network_gates(harness):
    """A small case of every kind of gate that has a network inside, by operation and kind."""
    found = {}
    for op, name in GATES.items():
        case = getattr(harness.cases_of(op), name)
        found |= {(op, kind): case((2, 32, 9, 7), kind) for kind in case.kinds}
    return found


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("number", range(5))
def test_right_gates_with_a_network_pass(harness, number, channels_last):
    case = dataclasses.replace(list(network_gates(harness).values())[number], channels_last=channels_last)
    found = case.providers(compiled=False)
    assert list(found) == ["tutorial", "attnk"]
    harness.check(case, found, *case.inputs())


def with_another_gradient(module, x):
    """That of one weight is off by 1 %."""
    if torch.is_grad_enabled():
        module.fc[0].weight.register_hook(lambda grad: 1.01 * grad)
    return module(x)


@pytest.mark.parametrize(
    ("op", "name", "spoil"),
    [
        ("channel_gate", "out", lambda call, x: call(x) * (1 + 1e-4)),
        ("channel_gate", "dx", lambda call, x: call(x) + 1e-3 * (x - x.detach())),
        ("channel_gate", "dmlp.1.weight", with_another_gradient),
        ("cbam", "out", lambda call, x: call(x.flip(1))),
        ("cbam", "dx", lambda call, x: call(x.detach()) + 0 * x),
        ("coordinate_gate", "out without grad", lambda call, x: call(x) + (0 if torch.is_grad_enabled() else 1e-3)),
        ("coordinate_gate", "dx", lambda call, x: call(x) + 1e-3 * (x - x.detach())),
    ],
)
def test_a_wrong_gate_with_a_network_is_refused(harness, op, name, spoil):
    case = next(case for (stem, _), case in network_gates(harness).items() if stem == op)
    found = spoiled(case.providers(compiled=False), spoil)
    with pytest.raises(harness.WrongResult, match=f"attnk: .*{name}"):
        harness.check(case, found, *case.inputs())


def test_a_wrong_network_is_refused(harness):
    cases = importlib.import_module("resnet50_cases")
    steps = cases.Resnet50Case("SE", 2, 64).steps(compiled=False)
    cases.check(steps)
    with torch.no_grad():
        steps["attnk"].network.blocks[3].gate.fc[2].bias += 0.1
    with pytest.raises(harness.WrongResult, match="attnk in float64: logits"):
        cases.check(steps)


@pytest.mark.parametrize("kind", ["spatial attention", "attention at 3, 4, 5"])
def test_a_wrong_vgg16_is_refused(harness, kind):
    cases, networks = (importlib.import_module(f"{name}_cases") for name in ("vgg16", "resnet50"))
    steps = cases.VGG16Case(kind, 2, 32, width=8).steps(compiled=False)
    networks.check(steps)
    with torch.no_grad():
        steps["attnk"].network.features[2].bias += 0.1
    with pytest.raises(harness.WrongResult, match="attnk in float64: logits"):
        networks.check(steps)


def attention_cases(attention):
    sizes = {"": (16, 16), "bias": (9, 5), "table": (16, 16), "dropout": (20, 150)}
    return {
        **{extra: attention.AttentionCase("test", 2, 2, *sizes[extra], 8, extra) for extra in sizes},
        "module": attention.SelfAttentionCase((2, 20, 32)),
        "module, dropout": attention.SelfAttentionCase((2, 20, 32), 0.1),
    }


@pytest.mark.parametrize("kind", ["", "bias", "table", "dropout", "module", "module, dropout"])
def test_right_attentions_pass(harness, attention, kind):
    case = attention_cases(attention)[kind]
    harness.check(case, case.providers(compiled=False), *case.inputs())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_right_attention_passes_in_16_bits(harness, attention, dtype):
    for extra in ("bias", "dropout"):
        case = attention.AttentionCase("test", 2, 2, 20, 33, 8, extra, dtype)
        found = case.providers(compiled=False)
        harness.check(case, {name: found[name] for name in ("tutorial", "sdpa")}, *case.inputs())


def spoiled(found, spoil):
    """The providers with one of attnk that computes something else."""
    call = found["attnk"].call
    found["attnk"] = dataclasses.replace(found["attnk"], call=lambda *inputs: spoil(call, *inputs))
    return found


def group_cases(harness):
    axial, window = (importlib.import_module(f"{op}_attention_cases") for op in ("axial", "window"))
    return [
        *(axial.AxialCase("test", 2, 5, 6, 2, 8, layout=layout) for layout in ("row", "column", "sum", "criss_cross")),
        axial.AxialCase("test", 1, 6, 5, 2, 8, memory="map", layout="sum"),
        window.WindowCase("test", 2, 6, 12, 2, 8, window=3),
        window.WindowCase("test", 2, 6, 12, 2, 8, window=3, shift=1),
        window.WindowCase("test", 2, 6, 12, 2, 8, window=3, shift=2, table=False),
        window.WindowCase("test", 2, 6, 12, 2, 8, window=3, dilation=2),
    ]


@pytest.mark.parametrize("number", range(9))
def test_right_group_attentions_pass(harness, number, monkeypatch):
    case = group_cases(harness)[number]
    found = case.providers(compiled=False)
    assert found.keys() == {"tutorial", "attnk"} | (set() if case.layout == "criss_cross" else {"sdpa"})
    inputs, dout = case.inputs()
    harness.check(case, found, inputs, dout)
    whole, _ = case.oracle(found["attnk"], inputs, dout)
    monkeypatch.setattr(importlib.import_module("group_attention_cases"), "CHUNK", 70)
    parts, _ = case.oracle(found["attnk"], inputs, dout)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, msg=lambda text, name=name: f"{name} in parts: {text}")


@pytest.mark.parametrize("number", [2, 6])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_computes_groups(harness, number):
    case = group_cases(harness)[number]
    inputs = tuple(tensor.detach() for tensor in case.inputs()[0])  # on the CPU it has no backward
    torch.testing.assert_close(case.flex()(*inputs), case.attnk(*inputs))


@pytest.mark.parametrize(
    ("number", "name", "spoil"),
    [
        (1, "out", lambda call, q, k, v: call(q, k.flip(1), v)),
        (2, "dv", lambda call, q, k, v: call(q, k, v) + 1e-3 * (v - v.detach())),
        (6, "dtable", lambda call, q, k, v, table: call(q, k, v, table.detach()) + 0 * table.sum()),
    ],
)
def test_a_wrong_group_attention_is_refused(harness, number, name, spoil):
    case = group_cases(harness)[number]
    found = spoiled(case.providers(compiled=False), spoil)
    with pytest.raises(harness.WrongResult, match=f"attnk: .*{name}"):
        harness.check(case, found, *case.inputs())


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
def test_a_wrong_gate_is_refused(harness, gate, name, spoil):
    case = gate.SpatialGateCase((2, 8, 9, 7), "gated")
    found = spoiled(case.providers(compiled=False), spoil)
    with pytest.raises(harness.WrongResult, match=f"attnk: .*{name}"):
        harness.check(case, found, *case.inputs())


def other_mask_in_backward(call, *inputs):
    """Values of one draw, gradients of another."""
    out, other = call(*inputs), call(*inputs)
    return out.detach() + other - other.detach()


@pytest.mark.parametrize(
    ("kind", "name", "spoil"),
    [
        ("", "out", lambda call, q, k, v: call(q * (1 + 1e-3), k, v)),
        ("", "dk", lambda call, q, k, v: call(q, k.detach(), v) + 0 * k.sum()),
        ("bias", "dbias", lambda call, q, k, v, bias: call(q, k, v, bias + 1e-3 * (bias - bias.detach()))),
        ("table", "dtable", lambda call, q, k, v, table: call(q, k, v, table.detach()) + 0 * table.sum()),
        ("dropout", "output", lambda call, q, k, v: call(q, k, 2 * v)),
        ("dropout", "keeps", lambda call, q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, 0.9 * v)),
        ("dropout", "d[qkv]", other_mask_in_backward),
        ("module", "dx", lambda call, x: call(x) + 1e-3 * (x - x.detach())),
        ("module, dropout", "d", other_mask_in_backward),
    ],
)
def test_a_wrong_attention_is_refused(harness, attention, kind, name, spoil):
    case = attention_cases(attention)[kind]
    found = spoiled(case.providers(compiled=False), spoil)
    with pytest.raises(harness.WrongResult, match=f"attnk: .*{name}"):
        harness.check(case, found, *case.inputs())


def test_a_wrong_provider_leaves_the_others(harness, attention):
    case = attention_cases(attention)[""]
    found = spoiled(case.providers(compiled=False), lambda call, q, k, v: call(q, k, v) + 1e-3 * (q - q.detach()))
    verdicts = harness.verdicts(case, found, *case.inputs())
    assert {name: set(failures) for name, failures in verdicts.items()} == {
        "tutorial": set(),
        "sdpa": set(),
        "attnk": {"backward", "training"},
    }


def test_without_a_right_tutorial_nobody_is_timed(harness, attention):
    case = attention_cases(attention)[""]
    found = case.providers(compiled=False)
    found["tutorial"] = dataclasses.replace(found["tutorial"], call=lambda q, k, v: 2 * case.tutorial(q, k, v))
    verdicts = harness.verdicts(case, found, *case.inputs())
    assert all(set(failures) == set(harness.PASSES) for failures in verdicts.values())


def test_a_peer_may_refuse(harness, attention):
    case = attention_cases(attention)["bias"]
    found = case.providers(compiled=False)

    def refuse(q, k, v, bias):
        if torch.is_grad_enabled():
            warnings.warn("kernels for a bias not used because:", stacklevel=1)
            warnings.warn("no gradient for a bias (Triggered internally at attention.cpp:7.)", stacklevel=1)
            raise RuntimeError("No available kernel")
        return case.tutorial(q, k, v, bias)

    found["sdpa"] = dataclasses.replace(found["sdpa"], call=refuse)
    verdicts = harness.verdicts(case, found, *case.inputs())
    assert set(verdicts["sdpa"]) == {"backward", "training"}
    assert str(verdicts["sdpa"]["training"]) == "sdpa: no gradient for a bias; RuntimeError: No available kernel"
    assert not verdicts["attnk"]
    found["attnk"] = dataclasses.replace(found["attnk"], call=refuse)
    with pytest.raises(RuntimeError, match="No available kernel") as raised, pytest.warns(UserWarning, match="bias"):
        harness.verdicts(case, found, *case.inputs())
    assert not isinstance(raised.value, harness.Refused), "attnk may not refuse"


def test_a_refusal_is_reported(harness, attention, monkeypatch):
    reporting = importlib.import_module("reporting")
    case = attention_cases(attention)[""]

    def no(*inputs):
        raise NotImplementedError("not on Fridays")

    def providers(self, compiled):
        return {
            "tutorial": harness.Provider("tutorial", self.tutorial),
            "sdpa": harness.Provider("sdpa", no, peer=True),
        }

    class Benchmark:
        def __init__(self):
            self.extra_info = {}

        def pedantic(self, step, rounds):
            self.rounds = rounds

    monkeypatch.setattr(attention.AttentionCase, "providers", providers)
    monkeypatch.setattr(harness, "RECORDS", [])
    reporting.time_one(Benchmark(), case, "training", "tutorial", False, 0.01)
    with pytest.raises(pytest.skip.Exception, match="not on Fridays"):
        reporting.time_one(Benchmark(), case, "training", "sdpa", False, 0.01)
    timed, refused = harness.RECORDS
    assert timed["median_us"] > 0
    assert "median_us" not in refused
    assert refused["refused"] == "sdpa: NotImplementedError: not on Fridays"
    lines = importlib.import_module("tables").all_tables(harness.RECORDS)
    assert any("refused" in line.split() for line in lines)
    assert "  refused 1 times: sdpa: NotImplementedError: not on Fridays" in lines


@pytest.mark.parametrize("backend", ["cudnn", "math"])
def test_one_backend_of_sdpa_is_forced(harness, attention, backend):
    if torch.cuda.is_available():
        pytest.skip("cuDNN may be there")
    case = attention_cases(attention)[""]
    with attention.forced_sdpa(backend):
        if backend == "math":
            assert case.sdpa(*case.inputs()[0]).shape == (2, 2, 16, 8)
        else:
            with pytest.raises(RuntimeError, match="No viable backend"):
                case.sdpa(*case.inputs()[0])


def test_rates_of_attention(attention):
    case = attention.AttentionCase.named("ViT-B 224", "bias", "bf16", device="cuda")
    assert case.shape == "256x12x197x64"
    assert case.flops("forward") == 4 * 256 * 12 * 197 * 197 * 64
    assert case.flops("backward") == 2.5 * case.flops("forward")
    tokens, bias = 2 * 256 * 12 * 197 * 64, 2 * 12 * 197 * 197
    assert case.minimal_bytes("forward") == 4 * tokens + bias
    assert case.minimal_bytes("training") == 12 * tokens + 3 * bias
    rates = case.rates("forward", "attnk", 1e-3, 4e12)
    assert rates["tflops"] == round(case.flops("forward") / 1e9, 1)
    assert rates["percent_of_copy"] == round((4 * tokens + bias) / 4e7, 1)


# Clocks and results


def test_providers_take_turns(harness):
    order = []
    works = {name: (lambda: None, lambda _, name=name: order.append(name)) for name in "abc"}
    seconds = harness.interleaved(works, harness.CpuClock(), rounds=4, warmup=2)
    assert [len(values) for values in seconds.values()] == [4, 4, 4]
    rounds = ["".join(order[start : start + 3]) for start in range(0, 18, 3)]
    assert rounds == ["bca", "cab", "abc", "bca", "cab", "abc"]


def test_results_file_round_trip(harness, tmp_path):
    records = [
        {"group": "a", "x": 1},
        {"group": "b", "y": [1.5, None]},
        {"group": "a", "z": "text"},
        {"group": "a", "op": "spatial_gate", "x": 2},
        {"group": "a", "op": "softmax_attention", "x": 3},
    ]
    path = tmp_path / "results.json"
    harness.write_results(path, records, complete=True)
    found = harness.read_results(path)
    assert sorted(found["records"], key=str) == sorted([dict(sorted(record.items())) for record in records], key=str)
    assert found["conditions"]["complete"] is True
    assert {op: len(members) for op, members in harness.by_operation(found["records"]).items()} == {
        "spatial_gate": 4,
        "softmax_attention": 1,
    }


# The GPU's commands


def test_every_operation_has_cases(harness):
    assert harness.operations() == list(OPS)
    assert harness.NETWORKS == ("resnet50", "vgg16")
    for op in OPS:
        cases = harness.cases_of(op)
        assert cases.tuned_cases()
        assert {case.op for case in cases.tuned_cases()} == {op}
        assert len({str(case) for case in cases.tuned_cases()}) == len(cases.tuned_cases())


def test_gpu_command_says_what_it_needs():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "benchmarks/gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "This needs a GPU, and torch sees none. Without one: make test, make bench.\n"


def test_gpu_steps_share_the_time(harness):
    gpu = importlib.import_module("gpu")
    ops = [*OPS, *harness.NETWORKS]
    everything = gpu.steps([], ops)
    assert everything == [("tests", ""), *(("tune", op) for op in OPS), *(("bench", op) for op in ops)]
    assert gpu.steps(["resnet50"], ops) == [("tests", ""), ("bench", "resnet50")]
    assert gpu.steps(["bench", "softmax_attention"], ops) == [("bench", "softmax_attention")]
    steps = [("tests", ""), ("tune", "softmax_attention"), ("bench", "softmax_attention")]
    assert gpu.steps(["softmax_attention"], ops) == steps
    assert gpu.share(steps[2:], 500) == 500
    left, total = 480.0, 0.0
    for position in range(len(everything)):
        seconds = gpu.share(everything[position:], left - total)
        assert seconds > 15
        total += seconds
    assert total == pytest.approx(480)
    assert gpu.share(everything, -1) == 0
    names = [gpu.path_of(Path("results"), step).name for step in everything]
    assert names[0] == "tests.json"
    assert names[-2:] == ["resnet50_bench.json", "vgg16_bench.json"]


# Tuning


@dataclasses.dataclass(frozen=True)
class Knob:
    """What a stand-in for an operation's tuning varies."""

    size: int


class Numbers:
    """A tuning of two parts; the time of one is 1 + |size - 8|, of the other 1."""

    wrong = None

    def __init__(self, case):
        self.start = {"one": Knob(1), "two": Knob(1)}

    def check(self):
        pass

    def candidates(self, part, best):
        yield from (Knob(best.size * 2), Knob(best.size // 2))

    def results(self, values):
        return {"out": torch.ones(3) + (1 if values["one"] == self.wrong else 0)}

    def works(self, part, values):
        seconds = 1.0 + abs(values["one"].size - 8) if part == "one" else 1.0
        return {part: (lambda: None, lambda _: seconds)}

    def row(self, values):
        return f"Row({values['one'].size}, {values['two'].size}),"


@pytest.fixture
def tune(harness, gate, monkeypatch):
    monkeypatch.setattr(gate, "Tuning", Numbers)
    return importlib.import_module("tune")


def told(prepare, timed):
    """A clock that believes what it is told."""
    return timed(prepare())


def test_a_sweep_keeps_what_is_faster(tune, gate):
    outcome = tune.sweep(gate.SpatialGateCase((1, 4, 8, 8), "gated"), 60, told)
    assert outcome.complete
    assert outcome.values == {"one": Knob(8), "two": Knob(1)}
    assert (outcome.before, outcome.after) == ({"one": 8.0, "two": 1.0}, {"one": 1.0, "two": 1.0})
    assert outcome.gain == 4.5
    assert outcome.row.startswith("Row(8, 1),  # ")
    assert "4.50x the row above at gated 1x4x8x8" in outcome.row
    json.dumps(outcome.fields())


def test_a_sweep_compiles_ahead_what_it_tries(tune, gate):
    compiled = []
    case = gate.SpatialGateCase((1, 4, 8, 8), "gated")
    tune.sweep(case, 60, told, lambda what, values: compiled.append((what, values)))
    assert {what for what, _ in compiled} == {case}
    sizes = [[(values["one"].size, values["two"].size) for values in each] for _, each in compiled]
    assert sizes == [[(2, 1), (0, 1), (1, 2), (1, 0)], [(4, 1)], [(8, 1)], [(16, 1)]]


def test_a_sweep_ends_in_time(tune, gate):
    outcome = tune.sweep(gate.SpatialGateCase((1, 4, 8, 8), "gated"), -1, told)
    assert not outcome.complete
    assert outcome.values == {"one": Knob(1), "two": Knob(1)}


def test_a_sweep_refuses_a_wrong_configuration(tune, gate, monkeypatch):
    monkeypatch.setattr(Numbers, "wrong", Knob(4))
    with pytest.raises(tune.harness.WrongResult, match="out is off"):
        tune.sweep(gate.SpatialGateCase((1, 4, 8, 8), "gated"), 60, told)


def test_tuning_on_a_gpu_goes_on_where_it_stopped(tune, gate, harness, monkeypatch, tmp_path):
    pytest.importorskip("tqdm")
    gpu = importlib.import_module("gpu")
    cases = [gate.SpatialGateCase((1, 4, 8, side), "gated") for side in (8, 9)]
    swept = []
    sweep = tune.sweep
    monkeypatch.setattr(harness, "CudaClock", lambda: told)
    monkeypatch.setattr(gate, "tuned_cases", lambda: cases)
    monkeypatch.setattr(tune, "sweep", lambda case, seconds, **_: (swept.append(case), sweep(case, seconds))[1])
    path = tmp_path / "tune.json"
    for seconds, expected, complete in ((0, [], None), (60, cases, True), (60, cases, True)):
        assert not gpu.run_tune(path, "spatial_gate", seconds)
        assert swept == expected
        assert complete is None or harness.read_results(path)["conditions"]["complete"] == complete
    records = harness.read_results(path)["records"]
    assert [record["name"] for record in records] == [str(case) for case in cases]
    assert {record["gain"] for record in records} == {4.5}


@pytest.mark.gpu
def test_a_sweep_on_a_gpu(harness):
    """What other processes compiled is what this one runs, and is right."""
    tune = importlib.import_module("tune")
    case = harness.cases_of("axial_attention").AxialCase("test", 2, 14, 14, 2, 32, "bf16", "cuda", layout="row")
    with tune.Compiler(2) as compiler:
        outcome = tune.sweep(case, 20, compiler=compiler)
    assert outcome.tried > 2
    assert outcome.row.startswith("GroupAttentionRow(2, 16, 32, 0, ")


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels in the interpreter")


@interpreted
def test_the_gate_is_swept(harness, gate):
    from attnk.kernels.tuning import SpatialGateConfig, SpatialGateRow

    tuning = gate.Tuning(gate.SpatialGateCase((1, 8, 8, 16), "gated"))
    start = tuning.start["config"]
    others = [config for config in tuning.candidates("config", start) if config != start]
    assert others
    got, expected = tuning.results({"config": others[0]}), tuning.results(tuning.start)
    for name in ("out", "dx", "dweight", "dbias"):
        torch.testing.assert_close(got[name], expected[name])
    names = {"SpatialGateConfig": SpatialGateConfig, "SpatialGateRow": SpatialGateRow}
    row = eval(tuning.row({"config": others[0]}).rstrip(","), names)
    assert row == SpatialGateRow(False, 8, 128, others[0])


@interpreted
@pytest.mark.parametrize("op", GATES)
def test_gates_with_a_network_are_swept(harness, op):
    from attnk.kernels import tuning as tables

    cases = harness.cases_of(op)
    kind = next(kind for stem, kind in network_gates(harness) if stem == op)
    case = getattr(cases, GATES[op])((2, 16, 8, 16), kind, channels_last=True)
    tuning = cases.Tuning(case)
    start = tuning.start["config"]
    others = [config for config in tuning.candidates("config", start) if config != start]
    assert len(others) >= 5
    expected = tuning.results(tuning.start)
    assert {"out", "dx"} < expected.keys()
    for config in (others[0], others[-1]):
        got = tuning.results({"config": config})
        for name, want in expected.items():
            torch.testing.assert_close(got[name], want, msg=lambda text, name=name: f"{name}: {text}")
    for part, (prepare, timed) in tuning.works("config", {"config": others[0]}).items():
        with harness.captured_launches() as launches:
            timed(prepare())
        assert any(name.startswith(f"_{op}_{part[:1]}") for name, _ in launches)
    row = eval(tuning.row({"config": others[0]}).rstrip(","), vars(tables))
    assert row.config == others[0]
    assert row.channels_last
    assert row.itemsize >= 4


@interpreted
def test_attention_is_swept_by_the_kernel(harness, attention):
    from attnk.kernels.tuning import SoftmaxAttentionConfig, SoftmaxAttentionRow, Tile

    tuning = attention.Tuning(attention.AttentionCase("test", 2, 1, 20, 33, 16, "bias"))
    assert list(tuning.start) == ["forward", "dq", "dkv", "dbias"]
    expected = tuning.results(tuning.start)
    for part, tile in tuning.start.items():
        other = next(iter(tuning.candidates(part, tile)))
        assert other != tile
        got = tuning.results(tuning.start | {part: other})
        for name in ("out", "dq", "dk", "dv", "dbias"):
            torch.testing.assert_close(got[name], expected[name])
        ((_, timed),) = tuning.works(part, tuning.start | {part: other}).values()
        with harness.captured_launches() as launches:
            timed(None)
        assert [name for name, _ in launches] == [f"_softmax_attention{attention.TILE_KERNELS[part]}"]
    values = tuning.start | {"dq": Tile(64, 128, 8, 2)}
    names = {kind.__name__: kind for kind in (SoftmaxAttentionConfig, SoftmaxAttentionRow, Tile)}
    row = eval(tuning.row(values).rstrip(","), names)
    assert row == SoftmaxAttentionRow(4, 16, True, SoftmaxAttentionConfig(**values))
    plain = attention.Tuning(attention.AttentionCase("test", 1, 1, 20, 33, 16))
    assert list(plain.start) == ["forward", "dq", "dkv"]


@interpreted
def test_linear_attention_is_swept_by_the_kernel(harness):
    from attnk.kernels.tuning import LinearAttentionConfig, LinearAttentionRow, LinearTile

    cases = importlib.import_module("linear_attention_cases")
    tuning = cases.Tuning(cases.LinearCase("test", 1, 2, 40, 16, "elu"))
    expected = tuning.results(tuning.start)
    for part, tile in tuning.start.items():
        other = next(other for other in tuning.candidates(part, tile) if other.block_n != tile.block_n)
        got = tuning.results(tuning.start | {part: other})
        for name in ("out", "dq", "dk", "dv"):
            torch.testing.assert_close(got[name], expected[name])
        ((_, timed),) = tuning.works(part, tuning.start | {part: other}).values()
        with harness.captured_launches() as launches:
            timed(None)
        ((launched, _),) = launches
        assert launched.endswith(cases.TILE_KERNELS[part])
    values = tuning.start | {"dq": LinearTile(64, 128, 8, 2)}
    names = {kind.__name__: kind for kind in (LinearAttentionConfig, LinearAttentionRow, LinearTile)}
    row = eval(tuning.row(values).rstrip(","), names)
    assert row == LinearAttentionRow(4, 16, LinearAttentionConfig(**values))


@interpreted
@pytest.mark.parametrize("number", [2, 6])
def test_group_attention_is_swept_by_the_kernel(harness, number):
    from attnk.kernels.tuning import GroupAttentionConfig, GroupAttentionRow, GroupTile

    case = group_cases(harness)[number]
    cases = harness.cases_of(case.op)
    tuning = cases.Tuning(case)
    expected = tuning.results(tuning.start)
    for part, tile in tuning.start.items():
        other = next(other for other in tuning.candidates(part, tile) if other.groups != tile.groups)
        got = tuning.results(tuning.start | {part: other})
        for name, want in expected.items():
            torch.testing.assert_close(got[name], want)
        ((_, timed),) = tuning.works(part, tuning.start | {part: other}).values()
        with harness.captured_launches() as launches:
            timed(None)
        own = "_group_attention_fwd_kernel" if part == "forward" else "_group_attention_bwd_kernel"
        assert [name for name, _ in launches] == [own] * len(case.axes)
    values = tuning.start | {"forward": GroupTile(2, 3, 4)}
    names = {kind.__name__: kind for kind in (GroupAttentionConfig, GroupAttentionRow, GroupTile)}
    row = eval(tuning.row(values).rstrip(","), names)
    tokens = 9 if case.op == "window_attention" else 16
    assert row == GroupAttentionRow(4, tokens, 8, int(bool(case.entries)), GroupAttentionConfig(**values))
