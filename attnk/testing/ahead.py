"""Ahead-of-time compilation: what a call would launch, compiled for an architecture that need not be present.

Needs Triton's compiler, so a process without ``TRITON_INTERPRET=1``.
"""

import contextlib
import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# shared memory a program may use, in bytes
ARCHITECTURES = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}

_DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments by name, and compile options such as num_warps."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling a launch showed.

    Attributes:
        kernel, architecture: what was compiled, for what.
        registers: a thread, or None where the tool that tells is absent.
        spilled: bytes of local memory a thread (stack and spills), or None likewise.
        shared: bytes of shared memory a program.
        assembly: PTX or AMDGCN text.
        ttir: Triton's own intermediate representation.
    """

    kernel: str
    architecture: str
    registers: int | None
    spilled: int | None
    shared: int
    assembly: str
    ttir: str


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Record the kernels launched inside the block instead of running them; what they would write is not written.

    Raises:
        RuntimeError: under the interpreter, which keeps no kernel to compile.
    """
    from triton.runtime.jit import JITFunction

    from attnk import dispatch

    if dispatch.INTERPRETED:
        raise RuntimeError("record_launches needs Triton's compiler: set TRITON_INTERPRET=0")
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        names = kernel.arg_names
        arguments = dict(zip(names, args, strict=False))
        arguments |= {name: value for name, value in kwargs.items() if name in names}
        options = {name: value for name, value in kwargs.items() if name not in names}
        launches.append(Launch(kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def compile_launch(launch: Launch, architecture: str) -> Compiled:
    """Compile a recorded launch as Triton would at its first call on that architecture.

    Args:
        launch: from ``record_launches``.
        architecture: a key of ``ARCHITECTURES``.

    Returns:
        Resources and code.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_DTYPES[value.dtype]}"
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, bool):
            signature[parameter.name], aligned = "i1", False
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[parameter.name], aligned = "fp32", False
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]

    source = ASTSource(launch.kernel, signature, constants, attributes)
    if architecture.startswith("gfx"):
        target = GPUTarget("hip", architecture, 64)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    if architecture.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        registers: int | None = _amd_number("vgpr_count", assembly)
        spilled: int | None = _amd_number("private_segment_fixed_size", assembly)
    else:
        assembly = compiled.asm["ptx"]
        registers, spilled = _nvidia_resources(compiled.asm["cubin"])
    return Compiled(
        launch.name, architecture, registers, spilled, compiled.metadata.shared, assembly, compiled.asm["ttir"]
    )


def _amd_number(name: str, assembly: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", assembly)
    assert found is not None, f"no .{name} in the assembly"
    return int(found.group(1))


def _nvidia_resources(cubin: bytes) -> tuple[int | None, int | None]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", path]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", report).group(1))  # type: ignore[union-attr]
        for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local
