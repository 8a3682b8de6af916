"""The command line, and the quick form of the demo."""

import platform
import statistics
import subprocess
import sys

import pytest
import torch

import attnk
from attnk import dispatch
from attnk.__main__ import main


def output(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def error(capsys, *arguments):
    """What is said on the way out, without a traceback."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_info(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    text = output(capsys, "info")
    for words in (attnk.__version__, torch.__version__, platform.python_version(), "CPU, ", "spatial_gate"):
        assert words in text
    assert "does not run here: x lies on the CPU, and Triton kernels need a GPU" in text
    assert "The torch backend runs instead" in text


def test_info_where_kernels_run(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    text = output(capsys, "info")
    assert "runs here" in text
    assert "instead" not in text


def test_info_without_triton(capsys, monkeypatch):
    from importlib import metadata

    real = metadata.version

    def version(name):
        if name == "triton":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    text = output(capsys, "info")
    assert "triton   not installed" in text
    assert "pip install attnk[triton]" in text


@pytest.mark.parametrize("shape", ["8x64x56x56", "8X64X56X56", "64x56x56"])
def test_explain_on_a_cpu(capsys, shape):
    assert output(capsys, "explain", "spatial_gate", shape, "--device", "cpu") == (
        "spatial_gate: torch\n  reason: x lies on the CPU\n"
    )


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "fp64"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_explain_on_a_gpu_that_may_be_absent(capsys, dtype, channels_last):
    from attnk.kernels.tuning import architecture, spatial_gate_config

    options = ["--channels-last"] if channels_last else []
    text = output(capsys, "explain", "spatial_gate", "8x64x56x56", "--dtype", dtype, "--device", "cuda", *options)
    itemsize = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}[dtype]
    arch = architecture(torch.device("cuda"))
    config = spatial_gate_config(arch, itemsize=itemsize, pixels=56**2, channels_last=channels_last)
    assert text == f"spatial_gate: triton\n  reason: the kernels support this call\n  configuration: {config}\n"


def test_explain_with_a_backend(capsys):
    text = output(capsys, "explain", "spatial_gate", "1x2x3x3", "--device", "cpu", "--backend", "reference")
    assert text == "spatial_gate: reference\n  reason: asked for\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["spatial_gate", "8x64x56xfoo"], "shape must be sizes joined by x, such as 8x64x56x56, got '8x64x56xfoo'"),
        (["spatial_gate", ""], "shape must be sizes joined by x"),
        (["spatial_gate", "8,64,56,56"], "shape must be sizes joined by x"),
        (["spatial_gate", "8x64"], "x must be (B, C, H, W) or (C, H, W), got 2 dimensions: (8, 64)"),
        (["spatial_gate", "8x0x56x56"], "x must have at least one channel"),
        (["spatial_gate", "8x-64x56x56"], "shape must have sizes of 0 or more, got '8x-64x56x56'"),
        (["spatial_gate", "64x56x56", "--channels-last"], "--channels-last needs a shape of 4 sizes, got"),
        (["spatial_gate", "8x64x56x56", "--device", "gpu"], "gpu"),
        (["spatial_gat", "8x64x56x56"], "invalid choice: 'spatial_gat'"),
        (["spatial_gate", "8x64x56x56", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["spatial_gate", "8x64x56x56", "--backend", "cuda"], "invalid choice: 'cuda'"),
        (["spatial_gate"], "required: shape"),
    ],
)
def test_explain_says_what_is_wrong(capsys, arguments, words):
    assert words in error(capsys, "explain", *arguments)


def test_explain_of_what_cannot_run(capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    text = error(capsys, "explain", "spatial_gate", "8x64x56x56", "--device", "cpu", "--backend", "triton")
    assert "spatial_gate: x lies on the CPU, and Triton kernels need a GPU" in text


def test_no_or_another_command(capsys):
    assert "required: command" in error(capsys)
    assert "invalid choice: 'train'" in error(capsys, "train")


def test_as_a_process():
    command = [sys.executable, "-m", "attnk", "explain", "spatial_gate", "2x8x14x14", "--device", "cpu"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "spatial_gate: torch\n  reason: x lies on the CPU\n")
    process = subprocess.run([*command, "--dtype", "int8"], capture_output=True, text=True)
    assert process.returncode == 2
    assert "Traceback" not in process.stderr


def test_demo_is_reached(monkeypatch, tmp_path):
    demo = pytest.importorskip("attnk.demo")
    calls = []
    monkeypatch.setattr(demo, "main", lambda **options: calls.append(options))
    main(["demo", "--quick", "--out", str(tmp_path)])
    main(["demo"])
    assert calls[0] == {"quick": True, "out": tmp_path}
    assert (calls[1]["quick"], str(calls[1]["out"])) == (False, "out")


DIGIT_VARIANTS = ["without", "se", "cbam", "spatial", "spatial_residual", "coordinate", "axial", "self"]


def test_quick_demo(tmp_path, capsys):
    """All three parts of the demo on little: numbers in, a picture out."""
    for name in ("sklearn", "scipy", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    from scipy.stats import sem
    from scipy.stats import t as student

    from attnk import demo

    state = torch.get_rng_state()
    torch.use_deterministic_algorithms(False)  # the poison of empty tensors costs more than the demo
    result = demo.main(quick=True, out=tmp_path / "new" / "folder")
    assert torch.equal(torch.get_rng_state(), state)

    printed = capsys.readouterr().out
    digits = result["digits"]
    assert list(digits) == DIGIT_VARIANTS
    baseline = digits["without"]
    assert "gain" not in baseline
    assert baseline["parameters"] == 0
    for name, row in digits.items():
        assert len(row["accuracy"]) >= 2
        assert all(30 < accuracy <= 100 for accuracy in row["accuracy"])  # 10 by chance
        assert row["mean"] == pytest.approx(statistics.mean(row["accuracy"]))
        assert row["spread"] == pytest.approx(statistics.stdev(row["accuracy"]))
        assert row["seconds"] > 0
        (line,) = [line for line in printed.splitlines() if line.startswith(f"   {row['label']}  ")]
        assert f"{row['mean']:.2f} +- {row['spread']:.2f}" in " ".join(line.split())
        assert line.split()[-2:] == [f"{row['parameters']:+d}", f"{1e3 * row['seconds']:.2f}"]
        if name == "without":
            continue
        assert row["parameters"] > 0
        gains = [b - a for a, b in zip(baseline["accuracy"], row["accuracy"], strict=True)]
        assert row["gain"] == pytest.approx(statistics.mean(gains))
        low, high = row["gain"] - row["half_width"], row["gain"] + row["half_width"]
        assert row["half_width"] == pytest.approx(student.ppf(0.975, len(gains) - 1) * sem(gains))
        assert row["within_spread"] == (low <= 0 <= high)
        assert f"{row['gain']:+.2f}  {low:+.2f} to {high:+.2f}" in line
        assert ("within the spread" in line) == row["within_spread"]

    photographs = result["photographs"]
    assert photographs["png"].is_relative_to(tmp_path)
    assert list(photographs["accuracy"]) == ["se", "cbam", "spatial", "coordinate", "axial", "self"]
    assert all(0 <= accuracy <= 100 for accuracy in photographs["accuracy"].values())
    for ranges in photographs["ranges"]:
        gates, attention = ranges[:4], ranges[4:]
        assert len(attention) == 4
        assert all(0 <= low < high <= 1 for low, high in gates)
        assert all(low == 1 < high for low, high in attention)

    assert len(result["timing"]) >= 2
    for row in result["timing"]:
        assert row["out_diff"] < 1e-4
        assert row["dx_diff"] < 1e-4
        for kind in ("inference", "training"):
            assert row[kind]["tutorial"] > 0
            assert row[f"{kind}_ratio"] == pytest.approx(row[kind]["tutorial"] / row[kind]["attnk"])

    from matplotlib.image import imread

    picture = imread(photographs["png"])
    assert min(picture.shape[:2]) >= 400
    assert picture[..., :3].std() > 0.1
    assert str(photographs["png"]) in printed
    for words in ("by chance", "SpatialAttention", "2x64x56x56", "x as fast"):
        assert words in printed


@pytest.mark.parametrize("name", DIGIT_VARIANTS)
def test_demo_digit_networks_start_alike(name):
    """One seed, the same convolutions; what is added to x changes nothing at first, gates do."""
    digits = pytest.importorskip("attnk.demo.digits")
    x = torch.rand(2, 1, 8, 8)
    torch.manual_seed(3)
    plain = digits._network(None)
    torch.manual_seed(3)
    model = digits._network(digits.VARIANTS[name][1])
    own, theirs = model.state_dict(), plain.state_dict()
    assert all(torch.equal(own[key], value) for key, value in theirs.items())
    assert len(own) == len(theirs) or name != "without"
    assert torch.equal(model(x), plain(x)) == (name in ("without", "axial", "self"))


def test_demo_panels():
    """What is drawn, against the modules by themselves and the attention written out."""
    photographs = pytest.importorskip("attnk.demo.photographs")
    model = photographs._SixLooks().eval()
    photos = torch.rand(2, 3, 100, 140)  # drawn as seen in 40 x 56: maps of 10 x 14
    gates, looks = photographs._look(model, photos, torch.device("cpu"))
    assert gates.shape == (2, 64)

    small = torch.nn.functional.interpolate(photos, size=(40, 56), mode="bilinear", antialias=True)
    features = model.trunk(torch.nn.functional.pad(4 * (small - 0.5), [32] * 4, mode="reflect"))  # (2, 64, 26, 30)
    viewer = attnk.SpatialAttention(7, output="map")
    viewer.load_state_dict(model.attention["spatial"].state_dict())
    layer = model.attention["self"].layer
    q, k, _ = (each.unflatten(2, (4, 16)) for each in layer.qkv_proj(features.flatten(2).mT).chunk(3, -1))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 4).softmax(-1).mean(1).unflatten(2, features.shape[2:])
    column = model.attention["axial"].axial_attentions[0]["fn"]
    pixels = features.permute(0, 2, 3, 1)
    for index, (panels, (down, right)) in enumerate(zip(looks, photographs.QUERIES, strict=True)):
        assert len(panels) == 8
        assert all(panel.heat.shape == (10, 14) for panel in panels)
        share = model.attention["se"](features).sum(1) / features.sum(1)
        torch.testing.assert_close(panels[0].heat, share[index, 8:-8, 8:-8])
        torch.testing.assert_close(panels[2].heat, viewer(features)[index, 0, 8:-8, 8:-8])
        row, place = 8 + int(10 * down), 8 + int(14 * right)
        query = row * features.shape[3] + place
        torch.testing.assert_close(panels[6].heat, weights[index, query, 8:-8, 8:-8] * weights.shape[1])
        torch.testing.assert_close(panels[7].heat, weights[index].mean(0)[8:-8, 8:-8] * weights.shape[1])

        q = column.to_q(pixels[index, row, place]).unflatten(0, (4, 16))
        k = column.to_kv(pixels[index, :, place])[:, :64].unflatten(1, (4, 16))
        alone = (torch.einsum("hd,nhd->hn", q, k) / 4).softmax(-1).mean(0) * weights.shape[1] / 2
        others = torch.arange(10) != row - 8  # where the query's row does not add its own
        torch.testing.assert_close(panels[4].heat[others, place - 8], alone[8:-8][others])


def test_demo_says_what_is_missing(monkeypatch, tmp_path):
    demo = pytest.importorskip("attnk.demo")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match=r"sklearn.*pip install .*attnk\[demo\]"):
        demo.main(quick=True, out=tmp_path)
    assert not list(tmp_path.iterdir())
