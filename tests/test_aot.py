"""Every row of the tuning tables, compiled for architectures that need not be present. Run with TRITON_INTERPRET=0."""

import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from attnk.kernels import cbam as cbam_kernels
from attnk.kernels import channel_gate as channel_kernels
from attnk.kernels import coordinate_gate as coordinate_kernels
from attnk.kernels import group_attention as groups
from attnk.kernels import linear_attention as linear
from attnk.kernels import softmax_attention as attention
from attnk.kernels import spatial_gate as kernels
from attnk.kernels.tuning import (
    CBAM_TABLE,
    CHANNEL_GATE_TABLE,
    COORDINATE_GATE_TABLE,
    GROUP_ATTENTION_TABLE,
    LINEAR_ATTENTION_TABLE,
    SOFTMAX_ATTENTION_TABLE,
    SPATIAL_GATE_TABLE,
    GroupAttentionConfig,
    LinearAttentionConfig,
    SoftmaxAttentionConfig,
    cbam_config,
    channel_gate_config,
    coordinate_gate_config,
    group_attention_config,
    linear_attention_config,
    softmax_attention_config,
    spatial_gate_config,
)

from attnk.ops import linear_attention as linear_operation
from attnk.ops.softmax_attention import MAX_FLOAT64_HEAD_DIM
from attnk.testing import ARCHITECTURES, Compiled, Launch, compile_launch, record_launches

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler: run with TRITON_INTERPRET=0"
)

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {2: (torch.float16, torch.bfloat16), 4: (torch.float32,), 8: (torch.float64,)}
SIDES = (8, 16, 28, 56, 112, 224, 448)  # height and width, the contiguous sizes divisible by 8
CHANNELS = 64
MEASURED_STACK = {"sm_90": 704}  # bytes a thread, where rows of attention were chosen by the clock of a device
OCCUPANCY_STACK = 16  # a few registers that ptxas gives up, far below the 255 there are, so that more programs fit
GATE_REGISTERS = 128  # a thread of the channel gate, the coordinate gate and CBAM: 16 warps fit a multiprocessor


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


def check_registers(compiled: Compiled, itemsize: int) -> None:
    """Enough warps fit to hide the time that memory takes; float64 is no main case."""
    if compiled.architecture == "sm_90" and itemsize < 8:
        assert compiled.registers <= GATE_REGISTERS, f"{compiled.kernel}: {compiled.registers} registers a thread"


def check_loads(launch: Launch, compiled: Compiled, itemsize: int) -> None:
    """A tile of x is loaded by 16 bytes a thread, or in one load a thread where it is smaller than that."""
    threads = launch.options["num_warps"] * (64 if compiled.architecture.startswith("gfx") else 32)
    share = launch.arguments["BLOCK_P"] * launch.arguments["BLOCK_C"] * itemsize // threads
    size = min(16, share)
    expected = maps_read(launch) * share // size
    found = wide_loads(compiled.assembly, size)
    assert found >= expected, f"{compiled.kernel}: {found} loads of {size} bytes, expected {expected}"


def check_offsets(compiled: Compiled, quotients: bool = True) -> None:
    """Neither a stride nor the number of an image is multiplied in 32 bits, in Triton's own representation.

    Without ``quotients``, only strides: quotients need not be numbers of images.
    """
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
        if quotients and operation == "arith.divsi" and kind == "i32":  # the number of an image, or of a slab
            narrow.add(name)


@pytest.mark.parametrize(("arch", "number", "dtype", "side", "target"), CASES)
def test_row_compiles(arch, number, dtype, side, target):
    recorded = launches(arch, number, dtype, side, lag=0)
    lagged = launches(arch, number, dtype, side, lag=10**6)
    names = {launch.name for launch in recorded + lagged}
    assert len(names) == 8, sorted(names)
    for launch in recorded + [launch for launch in lagged if "lagged" in launch.name]:
        compiled = compile_launch(launch, target)
        check_resources(compiled, OCCUPANCY_STACK)
        if "dweight" not in launch.name:
            check_loads(launch, compiled, dtype.itemsize)


@pytest.mark.parametrize(("arch", "number"), ROWS)
@pytest.mark.parametrize(("output", "ties"), [("map", "first"), ("map", "even"), ("residual", "even")])
def test_other_outputs_compile(arch, number, output, ties):
    itemsize, side = next(iter(chosen_for(arch, number).items()))
    target = "sm_90" if arch == "default" else arch
    for launch in launches(arch, number, DTYPES[itemsize][0], side, output=output, ties=ties):
        compiled = compile_launch(launch, target)
        check_resources(compiled, OCCUPANCY_STACK)
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
            check_resources(compile_launch(launch, target), OCCUPANCY_STACK)


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


# Softmax attention. A row's calls are more than can be compiled here: each row is compiled with every extra it is for
# at its largest head dimension, and once more at one in two parts, channel-major and causal.

ATTENTION_ROWS = [(arch, number) for arch, rows in SOFTMAX_ATTENTION_TABLE.items() for number in range(len(rows))]
EXTRAS = {0: (), 1: ("table",), 4: ("bias", "table", "mask", "dropout")}
IN_TWO_PARTS = {64: 48, 128: 72, 256: 160}
# By item size and turn. fp32 and fp64 are compiled alike for all of NVIDIA's, so few targets do for the default rows.
DEFAULT_TARGETS = {
    2: (("sm_80",), ("sm_120",)),
    4: (("sm_90",), ("sm_80",)),
    8: (("sm_80",), ("sm_80", "gfx942")),
}
# Bytes of stack a thread where no tile of float64 does without, as measured: by target, turn and kernel
ALLOWED_STACK = {
    ("sm_80", 0, "_softmax_attention_bwd_dq_kernel"): 160,
    ("sm_80", 0, "_softmax_attention_bwd_dkv_kernel"): 48,
    ("sm_80", 0, "_softmax_attention_bwd_dbias_kernel"): 1112,
    ("sm_80", 1, "_softmax_attention_bwd_dq_kernel"): 344,
    ("sm_80", 1, "_softmax_attention_bwd_dkv_kernel"): 696,
}
# and of the 16-bit rows with most extras or the widest heads: by table, row, turn and kernel
ROW_ALLOWED_STACK = {
    ("sm_100", 2, 1, "_softmax_attention_bwd_dq_kernel"): 56,
    ("sm_100", 6, 0, "_softmax_attention_fwd_kernel"): 8,
}
ATTENTION_CASES = [
    pytest.param(arch, number, turn, target, id=f"{arch}-row{number}-{('largest', 'parts')[turn]}-{target}")
    for arch, number in ATTENTION_ROWS
    for turn in range(2)
    for target in (
        DEFAULT_TARGETS[SOFTMAX_ATTENTION_TABLE[arch][number].itemsize][turn] if arch == "default" else (arch,)
    )
]  # fmt: skip
PTXAS_SERIALIZES = "wgmma.mma_async instructions are serialized"


@contextlib.contextmanager
def on(target: str) -> Iterator[None]:
    """Attention inside is launched as on that architecture, whose matrix units decide how float32 is multiplied."""
    with contextlib.ExitStack() as stack:
        for module in (attention.common, groups.common, linear):
            stack.enter_context(mock.patch.object(module, "architecture", return_value=target))
        yield


def attention_launches(
    config: SoftmaxAttentionConfig,
    dtype: torch.dtype,
    dim: int,
    extras: Sequence[str] = (),
    *,
    is_causal: bool = False,
    channel_major: bool = False,
    rows_of_extras: bool = True,
    tokens: int = 256,
) -> list[Launch]:
    """What a forward and a backward launch: q, k and v are views of one tensor, as a projection to all three gives."""
    heads, width = 4, 16
    shape = (2, 3, heads, dim, tokens) if channel_major else (2, tokens, 3, heads, dim)
    qkv = torch.empty(shape, dtype=dtype)
    q, k, v = (qkv[:, i].transpose(2, 3) if channel_major else qkv[:, :, i].transpose(1, 2) for i in range(3))
    of_rows = tokens if rows_of_extras else 1
    bias = torch.empty(1, heads, of_rows, tokens, dtype=dtype) if "bias" in extras else None
    mask = torch.empty(2, 1, of_rows, tokens, dtype=torch.bool) if "mask" in extras else None
    table = torch.empty((2 * width - 1) ** 2, heads, dtype=dtype) if "table" in extras else None
    rng = torch.empty(2, dtype=torch.int64) if "dropout" in extras else None
    inputs = (q, k, v, bias, mask, table, rng)
    options = (width if table is not None else 0, 0.3, is_causal, 0.1 if rng is not None else 0.0)
    with record_launches() as recorded:
        out, _, *stats = attention.softmax_attention_forward(*inputs, *options, True, True, config=config)
        attention.softmax_attention_backward(
            torch.empty_like(out), None, *inputs, out, *stats, *options,
            True, True, bias is not None, table is not None, config=config,
        )  # fmt: skip
    names = [launch.name for launch in recorded]
    return [launch for number, launch in enumerate(recorded) if launch.name not in names[:number]]


COMPILED: dict[tuple, Compiled] = {}


def compile_once(launch: Launch, target: str) -> Compiled:
    """What compile_launch returns, which reads nothing of a tensor but its dtype and alignment."""
    arguments = {
        name: (value.dtype, value.data_ptr() % 16) if isinstance(value, torch.Tensor) else value
        for name, value in launch.arguments.items()
    }
    key = (launch.name, target, *arguments.items(), *launch.options.items())
    if key not in COMPILED:
        COMPILED[key] = compile_launch(launch, target)
    return COMPILED[key]


def tile_of(launch: Launch) -> tuple[int, int]:
    """Rows of the logits as they lie, and warps."""
    return launch.arguments["BLOCK_N" if "dkv" in launch.name else "BLOCK_M"], launch.options["num_warps"]


def check_products(launch: Launch, compiled: Compiled, dtype: torch.dtype) -> None:
    """Products of 16 bits run on the architecture's newest matrix units, where the tile has rows enough."""
    if dtype.itemsize > 2:
        return
    rows, warps = tile_of(launch)
    instruction = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma_f32"}.get(
        compiled.architecture, "mma.sync"
    )
    if compiled.architecture in ("sm_90", "sm_100") and (rows < 64 or warps < 4):
        instruction = "mma.sync"
    assert instruction in compiled.assembly, f"{compiled.kernel}: no {instruction}"


@functools.cache
def ptxas() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")


def remarks(compiled: Compiled) -> str:
    """What NVIDIA's assembler says about a kernel for sm_90."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.assembly)
        command = [ptxas(), "-v", "--gpu-name", "sm_90a", str(path), "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def attention_row(arch: str, number: int, turn: int, target: str) -> tuple[torch.dtype, list[Launch]]:
    """The launches of one case of a row."""
    row = SOFTMAX_ATTENTION_TABLE[arch][number]
    dtype = DTYPES[row.itemsize][turn % len(DTYPES[row.itemsize])]
    largest = min(row.head_dim, MAX_FLOAT64_HEAD_DIM) if dtype == torch.float64 else row.head_dim
    extras = EXTRAS[row.extras]
    if dtype == torch.float64 and target.startswith("sm_"):
        # which costs more stack, and is compiled below
        extras = [extra for extra in extras if extra != "mask"]
    dense_bytes = 0 if turn else attention.common.DENSE_TABLE_BYTES  # a table is read entry by entry, or spread first
    with on(target), mock.patch.object(attention.common, "DENSE_TABLE_BYTES", dense_bytes):
        launched = attention_launches(
            row.config, dtype, IN_TWO_PARTS[largest] if turn else largest, extras,
            is_causal=bool(turn), channel_major=bool(turn),
        )  # fmt: skip
    n_kernels = 3 + bool({"bias", "table"} & set(extras)) + ("table" in extras)
    assert sum("dense_table" not in launch.name for launch in launched) == n_kernels
    more = [
        other
        for other in SOFTMAX_ATTENTION_TABLE[arch]
        if (other.itemsize, other.head_dim) == (row.itemsize, row.head_dim) and other.extras > row.extras
    ]
    if any(other.config.dbias == row.config.dbias for other in more):  # which that row compiles with more extras
        launched = [launch for launch in launched if "dbias" not in launch.name]
    return dtype, launched


@pytest.mark.parametrize(("arch", "number", "turn", "target"), ATTENTION_CASES)
def test_attention_row_compiles(arch, number, turn, target):
    dtype, launched = attention_row(arch, number, turn, target)
    for launch in launched:
        compiled = compile_once(launch, target)
        stack = MEASURED_STACK.get(target, ROW_ALLOWED_STACK.get((arch, number, turn, launch.name), 0))
        if dtype == torch.float64:
            stack = ALLOWED_STACK.get((target, turn, launch.name), OCCUPANCY_STACK)
        check_resources(compiled, stack)
        check_offsets(compiled, quotients=False)
        if "table" not in launch.name:
            check_products(launch, compiled, dtype)


def test_float64_compiles_with_a_mask():
    """Beside an 8-bit load that decides on a factor, Triton has no product of 64 bits on NVIDIA."""
    config = softmax_attention_config("sm_80", itemsize=8, head_dim=64, extras=1)
    for launch in attention_launches(config, torch.float64, 64, ("mask",)):
        assert compile_once(launch, "sm_80").registers > 0


HOPPER_ROWS = [number for number, row in enumerate(SOFTMAX_ATTENTION_TABLE.get("sm_90", ())) if row.extras <= 1]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("number", HOPPER_ROWS)
def test_products_overlap_on_hopper(number, is_causal):
    """The assembler leaves the asynchronous products asynchronous."""
    row = SOFTMAX_ATTENTION_TABLE["sm_90"][number]
    extras = () if not row.extras else ("bias",) if is_causal else ("table",)
    for launch in attention_launches(row.config, torch.float16, row.head_dim, extras, is_causal=is_causal):
        compiled = compile_once(launch, "sm_90")
        if "wgmma" in compiled.assembly:
            assert PTXAS_SERIALIZES not in remarks(compiled), f"{launch.name}: {tile_of(launch)}"


def test_remarks_tell_of_serialized_products():
    """The check above sees what it looks for: an accumulator written to before its product is waited for."""
    row = next(row for row in SOFTMAX_ATTENTION_TABLE["sm_90"] if row.head_dim == 64)
    compiled = compile_once(attention_launches(row.config, torch.float16, 64)[0], "sm_90")
    before, commit, after = compiled.assembly.partition("wgmma.commit_group.sync.aligned;")
    accumulator = re.findall(r"wgmma\.mma_async\S+ \{(%\w+),", before)[-1]
    assembly = f"{before}mov.b32 {accumulator}, 0;\n{commit}{after}"
    assert PTXAS_SERIALIZES not in remarks(compiled)
    assert PTXAS_SERIALIZES in remarks(dataclasses.replace(compiled, assembly=assembly))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dim", [64, 72])
def test_attention_loads_are_128_bits_wide(dim, target):
    """Tiles of q, k and v are loaded by 16 bytes a thread, also where 72 is the largest divisor of the strides."""
    config = softmax_attention_config(target, itemsize=2, head_dim=dim, extras=0)
    for launch in attention_launches(config, torch.float16, dim):
        compiled = compile_once(launch, target)
        threads = launch.options["num_warps"] * (64 if target.startswith("gfx") else 32)
        share = min(launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"]) * 64 * 2 // threads
        expected = 3 * max(1, share // 16)  # three tensors, each read by one thread at least this often
        found = wide_loads(compiled.assembly)
        assert found >= expected, f"{launch.name}: {found} loads of 16 bytes, expected {expected}"


def test_strides_of_72_need_the_alignment():
    """The check above sees what it looks for: undivided strides, of which nothing is known, leave narrow loads."""
    config = softmax_attention_config("sm_90", itemsize=2, head_dim=72, extras=0)
    forward = attention_launches(config, torch.float16, 72)[0]
    align = forward.arguments["ALIGN"]
    assert align == 8
    strides = {name: value * align for name, value in forward.arguments.items() if name.startswith("stride_") and value}
    narrow = dataclasses.replace(forward, arguments=forward.arguments | strides | {"ALIGN": 1})
    assert wide_loads(compile_once(narrow, "sm_90").assembly) < wide_loads(compile_once(forward, "sm_90").assembly)


@pytest.fixture
def allow_tf32():
    """Sets whether products may use TF32, which monkeypatch cannot undo."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    yield lambda allowed: setattr(matmul, "allow_tf32", allowed)
    matmul.allow_tf32 = before


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_tf32_only_where_allowed(target, allow_tf32):
    """A product of float32 is one of TF32 where that is allowed, else three on sm_90 and none elsewhere."""
    config = softmax_attention_config(target, itemsize=4, head_dim=64, extras=0)
    products = []
    for allowed in (False, True):
        allow_tf32(allowed)
        with on(target):
            launch = attention_launches(config, torch.float32, 64)[0]
        compiled = compile_launch(launch, target)
        products.append(len(re.findall(r"mma\S*tf32", compiled.assembly)))
    assert products[0] == (3 * products[1] if target == "sm_90" else 0)
    assert (products[1] > 0) == target.startswith("sm_")


def test_extras_of_one_row_are_not_loaded_as_tiles():
    """A mask or bias that is one for all queries is read by key."""
    config = softmax_attention_config("sm_90", itemsize=2, head_dim=64, extras=1)
    for extra in ("mask", "bias"):
        shared = []
        for rows in (True, False):
            launched = attention_launches(config, torch.bfloat16, 64, (extra,), rows_of_extras=rows)
            compiled = compile_launch(launched[0], "sm_90")
            check_resources(compiled)
            shared.append(compiled.shared)
        assert shared[1] < shared[0], extra


# Linear attention. Each row is compiled at its largest head dimension and at three quarters of it, with another feature
# map and channel-major, for slabs enough that they are summed.

LINEAR_ROWS = [(arch, number) for arch, rows in LINEAR_ATTENTION_TABLE.items() for number in range(len(rows))]
LINEAR_TURNS = (("elu", 4, False), ("softmax", 3, True), ("relu", 4, True))  # feature map, quarters, channel-major
LINEAR_TARGETS = {2: ("sm_80", "sm_120", "sm_80"), 4: ("sm_90", "sm_80", "sm_100"), 8: ("sm_80", "sm_90", "sm_80")}
# Bytes of stack a thread where no tile that was tried does without: float32 at 192, channel-major
LINEAR_ALLOWED_STACK = {("default", 6, 1, "_linear_attention_bwd_dkv_kernel"): 344}
LINEAR_CASES = [
    pytest.param(
        arch,
        number,
        turn,
        LINEAR_TARGETS[LINEAR_ATTENTION_TABLE[arch][number].itemsize][turn] if arch == "default" else arch,
        id=f"{arch}-row{number}-{LINEAR_TURNS[turn][0]}",
    )
    for arch, number in LINEAR_ROWS
    for turn in range(len(LINEAR_TURNS))
]


def linear_launches(
    config: LinearAttentionConfig, dtype: torch.dtype, dim: int, feature_map: str, channel_major: bool = False
) -> list[Launch]:
    """What a forward and a backward launch: q, k and v are views of one tensor, as a projection to all three gives."""
    heads, tokens = 4, 4096
    shape = (2, 3, heads, dim, tokens) if channel_major else (2, tokens, 3, heads, dim)
    qkv = torch.empty(shape, dtype=dtype)
    q, k, v = (qkv[:, i].transpose(2, 3) if channel_major else qkv[:, :, i].transpose(1, 2) for i in range(3))
    with record_launches() as recorded:
        out, *kept = linear.linear_attention_forward(q, k, v, feature_map, 1e-6, config=config)
        linear.linear_attention_backward(
            torch.empty_like(out), q, k, v, *kept, feature_map, 1e-6, True, True, config=config
        )
    return recorded


@pytest.mark.parametrize(("arch", "number", "turn", "target"), LINEAR_CASES)
def test_linear_row_compiles(arch, number, turn, target):
    row = LINEAR_ATTENTION_TABLE[arch][number]
    feature_map, quarters, channel_major = LINEAR_TURNS[turn]
    dtype = DTYPES[row.itemsize][turn % len(DTYPES[row.itemsize])]
    dim = min(row.head_dim, linear_operation.MAX_FLOAT64_HEAD_DIM) if dtype == torch.float64 else row.head_dim
    launched = linear_launches(row.config, dtype, dim * quarters // 4, feature_map, channel_major)
    assert len({launch.name for launch in launched}) == len(launched) == 6
    for launch in launched:
        compiled = compile_launch(launch, target)
        spare = OCCUPANCY_STACK if compiled.registers <= 128 else MEASURED_STACK.get(arch, 0)
        check_resources(compiled, LINEAR_ALLOWED_STACK.get((arch, number, turn, launch.name), spare))
        check_offsets(compiled, quotients=False)
        if dtype.itemsize == 2 and "_sum_" not in launch.name:
            assert re.search(r"wgmma|tcgen05\.mma|mma\.sync|v_mfma", compiled.assembly), launch.name


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_products_with_the_state_keep_its_range(target):
    """Of 16-bit inputs they are TF32: float16 would overflow at 65504."""
    config = linear_attention_config(target, itemsize=2, head_dim=64)
    for launch in linear_launches(config, torch.float16, 64, "relu"):
        if "_sum_" not in launch.name:
            assembly = compile_launch(launch, target).assembly
            assert ("tf32" in assembly) == ("state" not in launch.name), launch.name


def test_linear_tf32_only_where_allowed(allow_tf32):
    config = linear_attention_config("sm_80", itemsize=4, head_dim=64)
    for allowed in (False, True):
        allow_tf32(allowed)
        for launch in linear_launches(config, torch.float32, 64, "relu"):
            if "_sum_" not in launch.name:
                assert ("tf32" in compile_launch(launch, "sm_80").assembly) == allowed, launch.name


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dim", [32, 64, 72])
def test_linear_loads_are_128_bits_wide(dim, target):
    """Also where 72 elements are the largest divisor of the strides. The backward over queries reads two tensors."""
    config = linear_attention_config(target, itemsize=2, head_dim=dim)
    for launch in linear_launches(config, torch.bfloat16, dim, "relu"):
        if "_sum_" in launch.name:
            continue
        compiled = compile_launch(launch, target)
        tensors = 1 if "fwd_kernel" in launch.name else 2
        found = wide_loads(compiled.assembly)
        assert found >= tensors, f"{launch.name}: {found} loads of 16 bytes, expected {tensors}"


# Group attention. Rows say what a program holds: each is compiled at its largest sizes, with the extras it is for.

GROUP_ROWS = [
    pytest.param(target, row, id=f"{target}-{row.itemsize}-{row.tokens}x{row.head_dim}-{row.extras}")
    for target in TARGETS
    for row in GROUP_ATTENTION_TABLE.get(target, GROUP_ATTENTION_TABLE["default"])
    if row.itemsize == 2 or target != "sm_100"  # wider ones are compiled as for sm_80
]


def group_launches(
    config: GroupAttentionConfig,
    dtype: torch.dtype,
    tokens: int,
    dim: int,
    extras: int = 0,
    *,
    layout: str = "row",
    order: str = "packed",
) -> list[Launch]:
    """What a forward and a backward launch: q, k and v are views of one projection; extras are a table and dropout."""
    heads = 4
    height, width = {"row": (8, tokens), "column": (tokens, 8), "criss_cross": (tokens, tokens)}.get(layout, (28, 28))
    window = (7, 7) if layout == "window" else (1, 1)
    rows, columns = {"row": (1, width), "column": (height, 1), "criss_cross": (1, width)}.get(layout, window)
    qkv = torch.empty(2, height, width, 3, heads, dim, dtype=dtype)
    q, k, v = qkv.unbind(3)
    table = torch.empty((2 * rows - 1) * (2 * columns - 1), heads, dtype=dtype) if extras else None
    other = torch.empty(2 * height - 1, heads, dtype=dtype) if extras and layout == "criss_cross" else None
    rng = torch.empty(2, dtype=torch.int64) if extras > 1 else None
    shift = (3, 3) if layout == "window" else (0, 0)
    options = (layout, window, shift, (1, 1), -1, "-inf", 0.3, 0.1 if rng is not None else 0.0)
    # programs that have several groups, or there is no loop to hold in registers
    with record_launches() as recorded, mock.patch.multiple(groups.common, GROUP_PROGRAMS=1, DBIAS_GROUP_PROGRAMS=1):
        out, lse = groups.group_attention_forward(q, k, v, None, table, other, rng, *options, config=config)
        groups.group_attention_backward(
            torch.empty_like(out), q, k, v, None, table, other, rng, out, lse, *options,
            True, True, False, table is not None, config=config,
        )  # fmt: skip
    return recorded


# The backward's where a table has a gradient, which is added up in registers over the groups of a program; as measured
GROUP_ALLOWED_STACK = {
    ("sm_80", 2, 64, 64): 80,
    ("sm_80", 2, 128, 32): 288,
    ("sm_80", 8, 32, 32): 64,
    ("sm_100", 2, 64, 64): 200,
    ("sm_100", 2, 64, 128): 80,
    ("sm_100", 2, 128, 64): 632,
}


@pytest.mark.parametrize(("target", "row"), GROUP_ROWS)
def test_group_row_compiles(target, row):
    layout = "window" if row.tokens == 64 and row.extras else "column" if row.tokens == 32 else "row"
    dtype = DTYPES[row.itemsize][0]
    with on(target):
        launched = group_launches(row.config, dtype, row.tokens, row.head_dim, row.extras, layout=layout)
    assert [launch.name for launch in launched] == ["_group_attention_fwd_kernel", "_group_attention_bwd_kernel"]
    for launch in launched:
        compiled = compile_launch(launch, target)
        stack = GROUP_ALLOWED_STACK.get((target, row.itemsize, row.tokens, row.head_dim), 0) if row.extras else 0
        check_resources(compiled, MEASURED_STACK.get(target, stack))
        check_offsets(compiled, quotients=False)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dim", [32, 24])
def test_group_attention_loads_are_128_bits_wide(target, dim):
    """Heads of 24 too, which are padded in registers alone."""
    config = group_attention_config(target, itemsize=2, tokens=56, head_dim=dim, extras=0)
    for launch in group_launches(config, torch.float16, 56, dim):
        compiled = compile_launch(launch, target)
        tensors = 3 if "fwd" in launch.name else 4
        assert wide_loads(compiled.assembly) >= tensors, launch.name
        assert not re.search(r"\bld\.global\S*\.[bu]16\s", compiled.assembly), launch.name


def test_criss_cross_does_not_write_what_it_reads():
    """Warps that hold the same rows all read what the rows left, which therefore must not be overwritten."""
    config = group_attention_config("sm_80", itemsize=2, tokens=14, head_dim=32, extras=0)
    second = group_launches(config, torch.float16, 14, 32, layout="criss_cross")[1].arguments
    assert second["other_ptr"].data_ptr() != second["lse_ptr"].data_ptr()


# The channel gate


def channel_chosen_for(number: int) -> dict[int, int]:
    """A side for every item size with which the default table chooses this row."""
    row = CHANNEL_GATE_TABLE["default"][number]
    found: dict[int, int] = {}
    for itemsize in DTYPES:
        for side in SIDES:
            config = channel_gate_config("default", itemsize=itemsize, pixels=side**2, channels_last=row.channels_last)
            if config is row.config:
                found.setdefault(itemsize, side)
    return found


CHANNEL_CASES = [
    pytest.param(number, dtype, side, target, id=f"row{number}-{str(dtype)[len('torch.') :]}-{target}")
    for number in range(len(CHANNEL_GATE_TABLE["default"]))
    for itemsize, side in channel_chosen_for(number).items()
    for dtype in DTYPES[itemsize]
    for target in (TARGETS if dtype != torch.bfloat16 else ("sm_90",))
]


def channel_launches(
    number: int, dtype: torch.dtype, side: int, ties: str = "first", needs_max: bool = True
) -> list[Launch]:
    """What a forward and a backward launch with the configuration of this row."""
    row = CHANNEL_GATE_TABLE["default"][number]
    x = torch.empty(2, CHANNELS, side, side, dtype=dtype)
    if row.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with record_launches() as recorded:
        avg, peak, index = channel_kernels.channel_gate_pool(x, needs_max, ties, True, config=row.config)
        out = channel_kernels.channel_gate_forward(x, avg, config=row.config)
        dgate = channel_kernels.channel_gate_backward(out, x, config=row.config)
        dmax = peak if needs_max else None
        sizes = (side, side, row.channels_last, ties)
        channel_kernels.channel_gate_dx(out, dgate, avg, dmax, x, peak, index, *sizes, config=row.config)
    return recorded


def check_channel_loads(launch: Launch, compiled: Compiled, itemsize: int) -> None:
    """As ``check_loads``; every tile is in the text twice, without masks and with them."""
    maps = {"fwd_pool": 1, "fwd": 1, "bwd_dgate": 2, "bwd_dx": 1 + (launch.arguments.get("MAX") == "even")}
    name = launch.name.removeprefix("_channel_gate_").removesuffix("_kernel")
    threads = launch.options["num_warps"] * (64 if compiled.architecture.startswith("gfx") else 32)
    share = launch.arguments["BLOCK_P"] * launch.arguments["BLOCK_C"] * itemsize // threads
    steps = launch.arguments["STEPS"]
    size = min(16, share if name in ("fwd_pool", "bwd_dgate") else share * steps)  # the others have one tile a step
    expected = 2 * maps[name] * steps * share // size
    found = wide_loads(compiled.assembly, size)
    assert found >= expected, f"{compiled.kernel}: {found} loads of {size} bytes, expected {expected}"


@pytest.mark.parametrize(("number", "dtype", "side", "target"), CHANNEL_CASES)
def test_channel_row_compiles(number, dtype, side, target):
    for launch in channel_launches(number, dtype, side):
        compiled = compile_launch(launch, target)
        check_resources(compiled, OCCUPANCY_STACK)
        check_registers(compiled, dtype.itemsize)
        check_offsets(compiled, quotients=False)
        if not launch.name.endswith("_sum_kernel"):
            check_channel_loads(launch, compiled, dtype.itemsize)


@pytest.mark.parametrize(("ties", "needs_max"), [("even", True), ("first", False)])
@pytest.mark.parametrize("number", range(len(CHANNEL_GATE_TABLE["default"])))
def test_other_channel_pools_compile(number, ties, needs_max):
    itemsize, side = next(iter(channel_chosen_for(number).items()))
    for launch in channel_launches(number, DTYPES[itemsize][0], side, ties, needs_max):
        compiled = compile_launch(launch, "sm_90")
        check_resources(compiled, OCCUPANCY_STACK)
        if not launch.name.endswith("_sum_kernel"):
            check_channel_loads(launch, compiled, itemsize)


@pytest.mark.parametrize("number", range(len(CHANNEL_GATE_TABLE["default"])))
def test_channel_offsets_are_64_bits_wide(number):
    itemsize, side = next(iter(channel_chosen_for(number).items()))
    for launch in channel_launches(number, DTYPES[itemsize][0], side):
        compiled = compile_launch(launch, "sm_90")
        check_offsets(compiled, quotients=False)
        if not launch.name.endswith("_sum_kernel"):
            assert re.search(r"%image\w* = arith.extsi", compiled.ttir), launch.name


# The coordinate gate

COORDINATE_CASES = [
    pytest.param(number, dtype, side, target, id=f"row{number}-{str(dtype)[len('torch.') :]}-{side}-{target}")
    for number, row in enumerate(COORDINATE_GATE_TABLE["default"])
    for itemsize in DTYPES
    if coordinate_gate_config("default", itemsize=itemsize, channels_last=row.channels_last) is row.config
    for dtype in DTYPES[itemsize]
    for side, targets in ((56, TARGETS), *((side, ("sm_90",)) for side in (7, 14, 28, 112)))
    for target in (targets if dtype != torch.bfloat16 else ("sm_90",))
]


def coordinate_launches(number: int, dtype: torch.dtype, height: int, width: int) -> list[Launch]:
    """What a forward and a backward launch with the configuration of this row."""
    row = COORDINATE_GATE_TABLE["default"][number]
    x = torch.empty(2, CHANNELS, height, width, dtype=dtype)
    if row.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    sizes = (height, width, row.channels_last)
    with record_launches() as recorded:
        means = coordinate_kernels.coordinate_gate_pool(x, config=row.config)
        out = coordinate_kernels.coordinate_gate_forward(x, *means, config=row.config)
        gates = coordinate_kernels.coordinate_gate_backward(out, x, *means, config=row.config)
        coordinate_kernels.coordinate_gate_dx(out, *gates, *means, *sizes, config=row.config)
    return recorded


@pytest.mark.parametrize(("number", "dtype", "side", "target"), COORDINATE_CASES)
def test_coordinate_row_compiles(number, dtype, side, target):
    maps = {"fwd_pool": 1, "fwd": 1, "bwd_dgate": 2, "bwd_dx": 1}
    recorded = coordinate_launches(number, dtype, side, side)
    assert {launch.name for launch in recorded} >= {f"_coordinate_gate_{name}_kernel" for name in maps}
    for launch in recorded:
        compiled = compile_launch(launch, target)
        check_resources(compiled, OCCUPANCY_STACK)
        check_registers(compiled, dtype.itemsize)
        check_offsets(compiled)
        name = launch.name.removeprefix("_coordinate_gate_").removesuffix("_kernel")
        if name not in maps:
            continue
        assert re.search(r"arith\.muli .* : i64", compiled.ttir), launch.name
        threads = launch.options["num_warps"] * (64 if target.startswith("gfx") else 32)
        block = launch.arguments["BLOCK_C"] * launch.arguments["BLOCK_H"] * launch.arguments["BLOCK_W"]
        share = block * dtype.itemsize // threads
        size = min(16, share, launch.arguments["ALIGN"] * dtype.itemsize)
        found, expected = wide_loads(compiled.assembly, size), maps[name] * share // size
        assert found >= expected, f"{compiled.kernel}: {found} loads of {size} bytes, expected {expected}"


@pytest.mark.parametrize("number", range(len(COORDINATE_GATE_TABLE["default"])))
def test_wide_and_tall_maps_compile(number):
    """Several slabs and chunks, whose parts are then summed."""
    dtype = DTYPES[COORDINATE_GATE_TABLE["default"][number].itemsize][0]
    recorded = coordinate_launches(number, dtype, 300, 5000)
    assert [launch.name for launch in recorded].count("_coordinate_gate_fwd_sum_kernel") >= 2
    for launch in recorded:
        compiled = compile_launch(launch, "sm_90")
        check_resources(compiled, OCCUPANCY_STACK)
        check_offsets(compiled)


@pytest.mark.parametrize(("width", "bits"), [(28, 64), (14, 32), (7, 16)])
def test_loads_of_narrow_rows(width, bits):
    """A row is read by the widest loads that its width allows, where Triton left alone proves 2 bytes."""
    pool = coordinate_launches(0, torch.float16, 7, width)[0]
    found = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\s", compile_launch(pool, "sm_90").assembly)
    assert {int(vector or 1) * int(size) for vector, size in found} == {bits}


# CBAM


def cbam_chosen_for(number: int) -> dict[int, int]:
    """A side for every item size with which the default table chooses this row."""
    row = CBAM_TABLE["default"][number]
    found: dict[int, int] = {}
    for itemsize in DTYPES:
        for side in SIDES:
            config = cbam_config("default", itemsize=itemsize, pixels=side**2, channels_last=row.channels_last)
            if config is row.config:
                found.setdefault(itemsize, side)
    return found


CBAM_CASES = [
    pytest.param(number, DTYPES[itemsize][0], side, target, id=f"row{number}-{itemsize}-{target}")
    for number in range(len(CBAM_TABLE["default"]))
    for itemsize, side in cbam_chosen_for(number).items()
    for target in TARGETS
]


def cbam_launches(
    number: int, dtype: torch.dtype, side: int, output: str = "gated", ties: str = "first"
) -> list[Launch]:
    """What a forward and a backward launch with the configuration of this row, and what those with a norm do."""
    row = CBAM_TABLE["default"][number]
    x = torch.empty(2, CHANNELS, side, side, dtype=dtype)
    if row.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias, gate = (torch.empty(size, dtype=dtype) for size in ((1, 2, 7, 7), (1,), (2, CHANNELS)))
    index = torch.empty(2, CHANNELS, dtype=torch.int32)
    scaled, even = output in ("gated", "residual"), ties == "even"
    with record_launches() as recorded:
        out, spatial, *kept = cbam_kernels.cbam_forward(
            x, gate, weight, bias, "avg_max", output, ties, config=row.config
        )
        _, dmaps, _, _ = cbam_kernels.cbam_backward(
            out, x, gate, weight, spatial, *kept, "avg_max", output, ties, True, False, config=row.config
        )
        cbam_kernels.cbam_dx(
            out if scaled else None, gate, spatial if scaled else None, dmaps, gate, gate, index,
            gate if even else None, x if even else None, side, side, row.channels_last, output, ties, config=row.config,
        )  # fmt: skip
        if scaled:
            cbam_kernels.cbam_scale(x, gate, spatial, output, config=row.config)
            cbam_kernels.cbam_scale_backward(out, x, gate, spatial, config=row.config)
    return recorded


def check_cbam(launch: Launch, target: str) -> None:
    compiled = compile_launch(launch, target)
    check_resources(compiled, OCCUPANCY_STACK)
    if not launch.arguments.get("EVEN_TIES"):
        check_registers(compiled, launch.arguments["x_ptr"].itemsize if "x_ptr" in launch.arguments else 4)
    check_offsets(compiled)
    maps = {"fwd_pool": 1, "fwd": 1, "fwd_scale": 1, "bwd_dmaps": 1, "bwd_dx": 1, "bwd_sum": 0}
    name = launch.name.removeprefix("_cbam_").removesuffix("_kernel")
    scaled = launch.arguments.get("OUTPUT") not in ("map", "logit")
    reads = maps[name] if name != "bwd_dgate" else 2
    if name in ("fwd", "bwd_dgate", "bwd_dx") and not scaled:
        reads = 0
    reads += name == "bwd_dx" and launch.arguments["EVEN_TIES"]
    if reads == 0:
        return
    threads = launch.options["num_warps"] * (64 if target.startswith("gfx") else 32)
    share = launch.arguments["BLOCK_P"] * launch.arguments["BLOCK_C"] * launch.arguments["x_ptr"].itemsize // threads
    size = min(16, share)
    found, expected = wide_loads(compiled.assembly, size), reads * share // size
    assert found >= expected, f"{launch.name}: {found} loads of {size} bytes, expected {expected}"


@pytest.mark.parametrize(("number", "dtype", "side", "target"), CBAM_CASES)
def test_cbam_row_compiles(number, dtype, side, target):
    recorded = cbam_launches(number, dtype, side)
    assert len({launch.name for launch in recorded}) == 7
    for launch in recorded:
        check_cbam(launch, target)


@pytest.mark.parametrize(("output", "ties"), [("map", "first"), ("residual", "even")])
@pytest.mark.parametrize("number", range(len(CBAM_TABLE["default"])))
def test_other_outputs_of_cbam_compile(number, output, ties):
    itemsize, side = next(iter(cbam_chosen_for(number).items()))
    for launch in cbam_launches(number, DTYPES[itemsize][0], side, output, ties):
        check_cbam(launch, "sm_90")
