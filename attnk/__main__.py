"""``python -m attnk info | explain | demo``: what runs here, why, and what it is good for."""

import argparse
import importlib
import pathlib
import platform

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnk
from attnk import dispatch

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run what it asks for."""
    parser = argparse.ArgumentParser(prog="python -m attnk", description=attnk.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("info", help="versions, device, and which kernels can run here")

    explain = commands.add_parser("explain", help="which backend a call would use, and why")
    explain.add_argument("op", choices=dispatch.operations())
    explain.add_argument("shape", help="shape of the input, such as 8x64x56x56")
    explain.add_argument("--dtype", choices=DTYPES, default="fp32")
    explain.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    explain.add_argument("--channels-last", action="store_true")
    explain.add_argument("--backend", choices=dispatch.BACKENDS)

    demo = commands.add_parser("demo", help="accuracy, a picture and a stopwatch, on real images")
    demo.add_argument("--quick", action="store_true", help="a few seconds, for a look")
    demo.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the picture")

    options = parser.parse_args(arguments)
    if options.command == "info":
        print(info())
    elif options.command == "explain":
        print(explain_shape(parser, options))
    else:
        importlib.import_module("attnk.demo").main(quick=options.quick, out=options.out)


def info() -> str:
    """Versions, the device, and which kernels can run here and why not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    else:
        name = f"CPU, {torch.get_num_threads()} threads"
    triton = importlib.import_module("triton").__version__ if dispatch.HAS_TRITON else "not installed"
    reason = dispatch.no_kernel_here(torch.empty(0, device=device))
    lines = [
        f"attnk    {attnk.__version__}",
        f"torch    {torch.__version__}",
        f"triton   {triton}",
        f"python   {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"device   {name}",
        "kernels",
    ]
    for op in dispatch.operations():
        lines.append(f"  {op:<20} {'runs here' if reason is None else f'does not run here: {reason}'}")
    if reason is not None:
        lines.append("  The torch backend runs instead: the same results, in plain PyTorch.")
    return "\n".join(lines)


def explain_shape(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The explanation of a call with an input of this shape, on a device that may be absent."""
    try:
        shape = [int(size) for size in options.shape.lower().split("x")]
    except ValueError:
        parser.error(f"shape must be sizes joined by x, such as 8x64x56x56, got {options.shape!r}")
    if min(shape) < 0:
        parser.error(f"shape must have sizes of 0 or more, got {options.shape!r}")
    if options.channels_last and len(shape) != 4:
        parser.error(f"--channels-last needs a shape of 4 sizes, got {options.shape!r}")
    example = importlib.import_module(f"attnk.ops.{options.op}").example
    with FakeTensorMode():
        try:
            device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            tensors = example(shape, DTYPES[options.dtype], device, options.channels_last)
            return str(attnk.explain(options.op, *tensors, backend=options.backend))
        except (ValueError, TypeError, RuntimeError) as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
