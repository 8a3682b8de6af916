"""The command line, and the quick form of the demo."""

import platform
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


def test_quick_demo(tmp_path, capsys):
    """All three parts of the demo on little: numbers in, a picture out."""
    for name in ("sklearn", "scipy", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    from attnk import demo

    state = torch.get_rng_state()
    torch.use_deterministic_algorithms(False)  # the poison of empty tensors costs more than the demo
    result = demo.main(quick=True, out=tmp_path / "new" / "folder")
    assert torch.equal(torch.get_rng_state(), state)

    digits = result["digits"]
    assert {"without", "gated", "residual"} <= set(digits)
    for numbers in digits.values():
        assert len(numbers["accuracy"]) >= 2
        assert all(50 < accuracy <= 100 for accuracy in numbers["accuracy"])
    for name in ("gated", "residual"):
        pairs = zip(digits["without"]["accuracy"], digits[name]["accuracy"], strict=True)
        gains = [with_gates - without for without, with_gates in pairs]
        assert digits[name]["gain"] == pytest.approx(sum(gains) / len(gains))

    photographs = result["photographs"]
    assert photographs["png"].is_relative_to(tmp_path)
    assert 0 <= photographs["accuracy"] <= 100
    assert all(0 <= low < high <= 1 for low, high in photographs["gate_ranges"])

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
    printed = capsys.readouterr().out
    assert str(photographs["png"]) in printed
    for words in ("no gates", "SpatialAttention", "2x64x56x56", "x as fast"):
        assert words in printed


def test_demo_says_what_is_missing(monkeypatch, tmp_path):
    demo = pytest.importorskip("attnk.demo")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match=r"sklearn.*pip install .*attnk\[demo\]"):
        demo.main(quick=True, out=tmp_path)
    assert not list(tmp_path.iterdir())
