"""Every row of the tuning tables, compiled for architectures that need not be present. Run with TRITON_INTERPRET=0."""

import dataclasses
import os
import re

import pytest
import torch

pytest.importorskip("triton")

from attnk.kernels import spatial_gate as kernels
from attnk.kernels.tuning import SPATIAL_GATE_TABLE, spatial_gate_config

from attnk.testing import ARCHITECTURES, Compiled, Launch, compile_launch, record_launches

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler: run with TRITON_INTERPRET=0"
)

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {2: (torch.float16, torch.bfloat16), 4: (torch.float32,), 8: (torch.float64,)}
SIDES = (8, 16, 28, 56, 112, 224, 448)  # height and width, the contiguous sizes divisible by 8
CHANNELS = 64
FLOAT64_STACK = 8  # one register: ptxas gives it up for occupancy, with every block size tried


def chosen_for(arch: str, number: int) -> dict[int, int]:
    """A side for every item size with which the table chooses this row."""
    row = SPATIAL_GATE_TABLE[arch][number]
    found = {}
    for itemsize in DTYPES:
        for side in SIDES:
            config = spatial_gate_config(arch, itemsize=itemsize, pixels=side**2, channels_last=row.channels_last)
            if config is row.config:
                found.setdefault(itemsize, side)
    return found


ROWS = [(arch, number) for arch, rows in SPATIAL_GATE_TABLE.items() for number in range(len(rows))]
CASES = [
    pytest.param(arch, number, dtype, side, target, id=f"{arch}-row{number}-{str(dtype)[len('torch.') :]}-{target}")
    for arch, number in ROWS
    for itemsize, side in chosen_for(arch, number).items()
    for dtype in DTYPES[itemsize]
    for target in (TARGETS if arch == "default" else (arch,))
]  # fmt: skip


def launches(
    arch: str,
    number: int,
    dtype: torch.dtype,
    side: int,
    *,
    kernel_size: int = 7,
    output: str = "gated",
    ties: str = "first",
    lag: int | None = None,
) -> list[Launch]:
    """What a forward and a backward launch with the configuration of this row."""
    row = SPATIAL_GATE_TABLE[arch][number]
    config = row.config if lag is None else dataclasses.replace(row.config, lag=lag)
    x = torch.empty(2, CHANNELS, side, side, dtype=dtype)
    if row.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.empty(1, 2, kernel_size, kernel_size, dtype=dtype), torch.empty(1, dtype=dtype)
    with record_launches() as recorded:
        out, *kept = kernels.spatial_gate_forward(x, weight, bias, "avg_max", output, ties, config=config)
        kernels.spatial_gate_backward(
            out, x, weight, *kept, CHANNELS, row.channels_last, "avg_max", output, ties, True, True, config=config
        )
    return recorded


def wide_loads(assembly: str, size: int = 16) -> int:
    """How many load instructions move that many bytes or more a thread from global memory."""
    sizes = [4 * int(words or 1) for words in re.findall(r"\b(?:global|buffer)_load_dword(?:x(\d))?\b", assembly)]
    for vector, bits in re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\s", assembly):
        sizes.append(int(vector or 1) * int(bits) // 8)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global\s[^;]*?,\s*(0x\w+|\d+)\b", assembly)
    sizes += [int(copy, 0) for copy in copies]
    return sum(found >= size for found in sizes)


def maps_read(launch: Launch) -> int:
    """How often the text of a kernel reads tensors of the size of x."""
    arguments = launch.arguments
    scaled = arguments.get("OUTPUT") in ("gated", "residual")
    even = bool(arguments.get("EVEN_TIES", False))
    return {
        "_spatial_gate_fwd_pool_kernel": 1,
        "_spatial_gate_fwd_kernel": scaled,
        "_spatial_gate_fwd_lagged_kernel": 2,
        "_spatial_gate_bwd_dgate_kernel": 2 * scaled if scaled else even,
        "_spatial_gate_bwd_dx_kernel": scaled + even,
        "_spatial_gate_bwd_lagged_kernel": 3,
        "_spatial_gate_bwd_dweight_kernel": 0,
        "_spatial_gate_bwd_dweight_sum_kernel": 0,
    }[launch.name]


def check_resources(compiled: Compiled, stack: int = 0) -> None:
    limit = ARCHITECTURES[compiled.architecture]
    assert compiled.spilled <= stack, f"{compiled.kernel}: {compiled.spilled} bytes of stack a thread"
    assert compiled.registers > 0
    assert compiled.shared <= limit, f"{compiled.kernel}: {compiled.shared} bytes of shared memory, limit {limit}"


def check_loads(launch: Launch, compiled: Compiled, itemsize: int) -> None:
    """A tile of x is loaded by 16 bytes a thread, or in one load a thread where it is smaller than that."""
    threads = launch.options["num_warps"] * (64 if compiled.architecture.startswith("gfx") else 32)
    share = launch.arguments["BLOCK_P"] * launch.arguments["BLOCK_C"] * itemsize // threads
    size = min(16, share)
    expected = maps_read(launch) * share // size
    found = wide_loads(compiled.assembly, size)
    assert found >= expected, f"{compiled.kernel}: {found} loads of {size} bytes, expected {expected}"


def check_offsets(compiled: Compiled) -> None:
    """Neither a stride nor the number of an image is multiplied in 32 bits, in Triton's own representation."""
    narrow = {name for name in re.findall(r"%stride_\w+", compiled.ttir) if not name.startswith("%stride_w")}
    for line in compiled.ttir.splitlines():
        match = re.match(r"\s*(%\w+) = (\S+) (.*)", line)
        if match is None:
            continue
        name, operation, rest = match.groups()
        operands = set(re.findall(r"%\w+", rest))
        kind = rest.split(" : ")[-1].split(" loc(")[0]
        if operation == "arith.muli" and not kind.replace(">", "").endswith("i64"):
            assert not operands & narrow, f"{compiled.kernel}: a 32-bit product: {line.strip()}"
        if operation == "tt.splat" and operands & narrow:
            narrow.add(name)
        if operation == "arith.divsi" and kind == "i32":  # the number of an image, or of a slab
            narrow.add(name)


@pytest.mark.parametrize(("arch", "number", "dtype", "side", "target"), CASES)
def test_row_compiles(arch, number, dtype, side, target):
    recorded = launches(arch, number, dtype, side, lag=0)
    lagged = launches(arch, number, dtype, side, lag=10**6)
    names = {launch.name for launch in recorded + lagged}
    assert len(names) == 8, sorted(names)
    for launch in recorded + [launch for launch in lagged if "lagged" in launch.name]:
        compiled = compile_launch(launch, target)
        check_resources(compiled, stack=FLOAT64_STACK if dtype == torch.float64 else 0)
        if "dweight" not in launch.name:
            check_loads(launch, compiled, dtype.itemsize)


@pytest.mark.parametrize(("arch", "number"), ROWS)
@pytest.mark.parametrize(("output", "ties"), [("map", "first"), ("map", "even"), ("residual", "even")])
def test_other_outputs_compile(arch, number, output, ties):
    itemsize, side = next(iter(chosen_for(arch, number).items()))
    target = "sm_90" if arch == "default" else arch
    for launch in launches(arch, number, DTYPES[itemsize][0], side, output=output, ties=ties):
        compiled = compile_launch(launch, target)
        check_resources(compiled)
        check_offsets(compiled)
        if "dweight" not in launch.name:
            check_loads(launch, compiled, itemsize)


@pytest.mark.parametrize("lag", [0, 10**6])
@pytest.mark.parametrize("channels_last", [False, True])
def test_offsets_are_64_bits_wide(channels_last, lag):
    number = [row.channels_last for row in SPATIAL_GATE_TABLE["default"]].index(channels_last)
    for launch in launches("default", number, torch.float16, 28, lag=lag):
        compiled = compile_launch(launch, "sm_90")
        check_offsets(compiled)
        assert "dweight_sum" in launch.name or re.search(r"arith\.muli .* : i64", compiled.ttir), launch.name


@pytest.mark.parametrize("kernel_size", [1, 3, 15])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_other_kernel_sizes_compile(kernel_size, target):
    for lag in (0, 10**6):
        for launch in launches("default", 0, torch.float16, 28, kernel_size=kernel_size, lag=lag):
            check_resources(compile_launch(launch, target))


@pytest.mark.parametrize(("side", "bits"), [(14, 64), (7, 16)])
def test_loads_of_small_maps(side, bits):
    """196 pixels are divisible by 4: 8 bytes of float16 a load, where Triton left alone proves 2."""
    number = next(n for n in range(len(SPATIAL_GATE_TABLE["default"])) if chosen_for("default", n).get(2) == 16)
    pool = next(launch for launch in launches("default", number, torch.float16, side) if "pool" in launch.name)
    found = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\s", compile_launch(pool, "sm_90").assembly)
    assert {int(vector or 1) * int(width) for vector, width in found} == {bits}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1 + 0];", 1),
        ("ld.global.L1::evict_first.L2::cache_hint.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1 + 0], %rd2;", 1),
        ("ld.global.v2.b64 {%rd1, %rd2}, [%rd1 + 0];\nld.global.v8.b32 {%r1}, [%rd1 + 0];", 2),
        ("ld.global.v2.b32 {%r1, %r2}, [%rd1 + 0];\nld.global.b16 %rs1, [%rd1];\nld.shared.v4.b32 {}, [];", 0),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r3;", 1),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x4, %r3;", 0),
        ("global_load_dwordx4 v[2:5], v[2:3], off\nglobal_load_dwordx2 v[2:3], v[2:3], off", 1),
        ("buffer_load_dwordx4 v[2:5], v1, s[0:3], 0 offen\ns_load_dwordx4 s[4:7], s[0:1], 0x8", 1),
    ],
)
def test_wide_loads(text, count):
    assert wide_loads(text) == count


def test_refuses_narrow_offsets():
    """The check above sees what it looks for."""
    compiled = Compiled("kernel", "sm_90", 1, 0, 0, "", "")
    image = "%image = arith.divsi %pid, %n : i32 loc(#1)"
    for line in ("%a = arith.muli %image, %n : i32 loc(#1)", "%a = arith.muli %stride_xb, %c16 : i32 loc(#1)"):
        with pytest.raises(AssertionError, match="32-bit product"):
            check_offsets(dataclasses.replace(compiled, ttir=f"{image}\n{line}"))
    widened = "%w = arith.extsi %image : i32 to i64 loc(#1)\n%a = arith.muli %w, %n : i64 loc(#1)"
    check_offsets(dataclasses.replace(compiled, ttir=f"{image}\n{widened}"))
