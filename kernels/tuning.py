"""Every block size, warp and stage count, as data.

A table maps an architecture to rows; the first row that fits a call is used, and where none of the architecture's own
does, the first of ``default``. ``benchmarks/tune.py`` sweeps a device and prints rows to paste. The comment behind a
row says on which device and when it was measured and what it gained over the row it replaced, or "untuned".
"""

from dataclasses import dataclass
from functools import cache

import torch

# The spatial gate's small passes, over numbers a pixel instead of channels x pixels.
FRAME_BLOCK = 1024  # untuned; numbers zeroed a step
DWEIGHT_BLOCK = 128  # untuned; pixels a step, of one row
DWEIGHT_SLAB_BLOCKS = 8  # untuned; steps a program, until there are
DWEIGHT_MAX_SLABS = 512  # untuned; programs a kernel row


@cache
def architecture(device: torch.device) -> str:
    """The key of a device in the tables: "sm_90", "gfx942", "interpreter" on the CPU, "default" if there is no GPU."""
    if device.type == "cpu":
        return "interpreter"
    if device.type != "cuda" or not torch.cuda.is_available():
        return "default"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@dataclass(frozen=True)
class SpatialGateConfig:
    """How the spatial gate's kernels are cut up.

    Attributes:
        block_p: pixels a program.
        block_c: channels a step.
        num_warps: warps a program.
        num_stages: steps whose loads are in flight at once.
        lag: 0 runs two launches a pass. Otherwise one launch finishes each tile this many tiles after pooling it,
            provided an image has no more tiles than that.
    """

    block_p: int
    block_c: int
    num_warps: int
    num_stages: int
    lag: int = 0


@dataclass(frozen=True)
class SpatialGateRow:
    """One row: the calls it fits, and their configuration.

    Attributes:
        channels_last: the layout it is for.
        itemsize: bytes an element, at most.
        min_pixels: height x width, at least.
        config: the configuration.
    """

    channels_last: bool
    itemsize: int
    min_pixels: int
    config: SpatialGateConfig


SPATIAL_GATE_TABLE: dict[str, tuple[SpatialGateRow, ...]] = {
    "sm_90": (  # NVIDIA H200, 2026-11-20; gains over the rows below, forward and backward
        SpatialGateRow(False, 2, 512, SpatialGateConfig(block_p=64, block_c=8, num_warps=4, num_stages=4)),  # 1.14x
        SpatialGateRow(False, 2, 128, SpatialGateConfig(block_p=256, block_c=16, num_warps=8, num_stages=2)),  # 1.47x
        SpatialGateRow(False, 4, 512, SpatialGateConfig(block_p=64, block_c=16, num_warps=4, num_stages=2)),  # 1.08x
        SpatialGateRow(True, 2, 512, SpatialGateConfig(block_p=16, block_c=64, num_warps=4, num_stages=2)),  # 1.07x
    ),
    "default": (
        SpatialGateRow(False, 2, 512, SpatialGateConfig(block_p=128, block_c=16, num_warps=4, num_stages=1)),  # untuned
        SpatialGateRow(False, 2, 128, SpatialGateConfig(block_p=32, block_c=32, num_warps=4, num_stages=1)),  # untuned
        SpatialGateRow(False, 2, 0, SpatialGateConfig(block_p=32, block_c=128, num_warps=8, num_stages=1)),  # untuned
        SpatialGateRow(False, 8, 512, SpatialGateConfig(block_p=128, block_c=8, num_warps=4, num_stages=1)),  # untuned
        SpatialGateRow(False, 8, 0, SpatialGateConfig(block_p=32, block_c=16, num_warps=4, num_stages=1)),  # untuned
        SpatialGateRow(True, 2, 128, SpatialGateConfig(block_p=32, block_c=64, num_warps=4, num_stages=1)),  # untuned
        SpatialGateRow(True, 2, 0, SpatialGateConfig(block_p=8, block_c=256, num_warps=4, num_stages=1)),  # untuned
        SpatialGateRow(True, 8, 0, SpatialGateConfig(block_p=32, block_c=32, num_warps=4, num_stages=1)),  # untuned
    ),
}


def spatial_gate_config(arch: str, *, itemsize: int, pixels: int, channels_last: bool) -> SpatialGateConfig:
    """The configuration of one call: the first row that fits, of the architecture's and then of the default ones."""
    for row in (*SPATIAL_GATE_TABLE.get(arch, ()), *SPATIAL_GATE_TABLE["default"]):
        if row.channels_last == channels_last and itemsize <= row.itemsize and pixels >= row.min_pixels:
            return row.config
    raise LookupError(f"no row of SPATIAL_GATE_TABLE[{arch!r}] fits: {itemsize=} {pixels=} {channels_last=}")


# The channel gate's programs: how many share the pixels of a plane is what it takes to have this many.
CHANNEL_GATE_PROGRAMS = 1024  # untuned
CHANNEL_GATE_SLAB_PIXELS = 256  # untuned; of a plane, that a program has at least if others share it
CHANNEL_GATE_SUM_BLOCK = 256  # untuned; planes a program, where partial results are added


@dataclass(frozen=True)
class ChannelGateConfig:
    """How the channel gate's kernels are cut up.

    Attributes:
        block_p: pixels a step.
        block_c: channels a program.
        num_warps: warps a program.
        num_stages: steps whose loads are in flight at once.
    """

    block_p: int
    block_c: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ChannelGateRow:
    """One row: the calls it fits, and their configuration.

    Attributes:
        channels_last: the layout it is for.
        itemsize: bytes an element, at most.
        min_pixels: height x width, at least.
        config: the configuration.
    """

    channels_last: bool
    itemsize: int
    min_pixels: int
    config: ChannelGateConfig


CHANNEL_GATE_TABLE: dict[str, tuple[ChannelGateRow, ...]] = {
    "default": (
        ChannelGateRow(False, 2, 1024, ChannelGateConfig(block_p=256, block_c=2, num_warps=2, num_stages=2)),  # untuned
        ChannelGateRow(False, 2, 128, ChannelGateConfig(block_p=256, block_c=4, num_warps=4, num_stages=1)),  # untuned
        ChannelGateRow(False, 2, 0, ChannelGateConfig(block_p=64, block_c=16, num_warps=4, num_stages=1)),  # untuned
        ChannelGateRow(False, 8, 1024, ChannelGateConfig(block_p=512, block_c=1, num_warps=4, num_stages=2)),  # untuned
        ChannelGateRow(False, 8, 128, ChannelGateConfig(block_p=256, block_c=2, num_warps=4, num_stages=1)),  # untuned
        ChannelGateRow(False, 8, 0, ChannelGateConfig(block_p=64, block_c=8, num_warps=4, num_stages=1)),  # untuned
        ChannelGateRow(True, 2, 0, ChannelGateConfig(block_p=16, block_c=64, num_warps=4, num_stages=2)),  # untuned
        ChannelGateRow(True, 8, 0, ChannelGateConfig(block_p=16, block_c=32, num_warps=4, num_stages=2)),  # untuned
    ),
}


def channel_gate_config(arch: str, *, itemsize: int, pixels: int, channels_last: bool) -> ChannelGateConfig:
    """The configuration of one call: the first row that fits, of the architecture's and then of the default ones."""
    for row in (*CHANNEL_GATE_TABLE.get(arch, ()), *CHANNEL_GATE_TABLE["default"]):
        if row.channels_last == channels_last and itemsize <= row.itemsize and pixels >= row.min_pixels:
            return row.config
    raise LookupError(f"no row of CHANNEL_GATE_TABLE[{arch!r}] fits: {itemsize=} {pixels=} {channels_last=}")


# The coordinate gate's programs: a map is cut into slabs of rows until there are this many.
COORDINATE_GATE_PROGRAMS = 1024  # untuned
COORDINATE_GATE_SUM_BLOCK = 1024  # untuned; numbers a program, where parts are added
COORDINATE_GATE_SHARE = 32  # untuned; numbers a thread, at most; half as many with sums, and where rows are not aligned


@dataclass(frozen=True)
class CoordinateGateConfig:
    """How the coordinate gate's kernels are cut up.

    Attributes:
        tile: numbers of the map a step, or as many as the threads can hold: whole rows or at least as much of them as
            that, then rows, then channels.
        block_c: in channels_last, channels a program; fewer where a thread cannot hold its share of the tile.
        slab: rows a program that sums columns, at least.
        num_warps: warps a program.
    """

    tile: int
    block_c: int
    slab: int
    num_warps: int


@dataclass(frozen=True)
class CoordinateGateRow:
    """One row: the calls it fits, and their configuration.

    Attributes:
        channels_last: the layout it is for.
        itemsize: bytes an element, at most.
        config: the configuration.
    """

    channels_last: bool
    itemsize: int
    config: CoordinateGateConfig


COORDINATE_GATE_TABLE: dict[str, tuple[CoordinateGateRow, ...]] = {
    "default": (
        CoordinateGateRow(False, 2, CoordinateGateConfig(tile=4096, block_c=1, slab=64, num_warps=4)),  # untuned
        CoordinateGateRow(False, 4, CoordinateGateConfig(tile=2048, block_c=1, slab=64, num_warps=4)),  # untuned
        CoordinateGateRow(False, 8, CoordinateGateConfig(tile=1024, block_c=1, slab=64, num_warps=4)),  # untuned
        CoordinateGateRow(True, 2, CoordinateGateConfig(tile=4096, block_c=64, slab=32, num_warps=4)),  # untuned
        CoordinateGateRow(True, 4, CoordinateGateConfig(tile=2048, block_c=32, slab=32, num_warps=4)),  # untuned
        CoordinateGateRow(True, 8, CoordinateGateConfig(tile=1024, block_c=16, slab=32, num_warps=4)),  # untuned
    ),
}


def coordinate_gate_config(arch: str, *, itemsize: int, channels_last: bool) -> CoordinateGateConfig:
    """The configuration of one call: the first row that fits, of the architecture's and then of the default ones."""
    for row in (*COORDINATE_GATE_TABLE.get(arch, ()), *COORDINATE_GATE_TABLE["default"]):
        if row.channels_last == channels_last and itemsize <= row.itemsize:
            return row.config
    raise LookupError(f"no row of COORDINATE_GATE_TABLE[{arch!r}] fits: {itemsize=} {channels_last=}")


# CBAM's sum of partial results for the channel gate: of so many channels a program, and so many parts a step.
CBAM_SUM_BLOCK = 64  # untuned
CBAM_SUM_ROWS = 8  # untuned

# Every program leaves one number a channel, so that its pixels must be many beside the bytes of an element.
CBAM_TABLE: dict[str, tuple[SpatialGateRow, ...]] = {
    "default": (
        SpatialGateRow(False, 2, 512, SpatialGateConfig(block_p=128, block_c=32, num_warps=8, num_stages=1)),  # untuned
        SpatialGateRow(False, 2, 0, SpatialGateConfig(block_p=64, block_c=32, num_warps=4, num_stages=1)),  # untuned
        SpatialGateRow(False, 8, 512, SpatialGateConfig(block_p=128, block_c=16, num_warps=8, num_stages=1)),  # untuned
        SpatialGateRow(False, 8, 0, SpatialGateConfig(block_p=64, block_c=16, num_warps=4, num_stages=1)),  # untuned
        SpatialGateRow(True, 2, 512, SpatialGateConfig(block_p=128, block_c=32, num_warps=8, num_stages=1)),  # untuned
        SpatialGateRow(True, 2, 0, SpatialGateConfig(block_p=32, block_c=128, num_warps=8, num_stages=1)),  # untuned
        SpatialGateRow(True, 8, 512, SpatialGateConfig(block_p=128, block_c=32, num_warps=8, num_stages=1)),  # untuned
        SpatialGateRow(True, 8, 0, SpatialGateConfig(block_p=32, block_c=32, num_warps=4, num_stages=1)),  # untuned
    ),
}


def cbam_config(arch: str, *, itemsize: int, pixels: int, channels_last: bool) -> SpatialGateConfig:
    """The configuration of one call: the first row that fits, of the architecture's and then of the default ones."""
    for row in (*CBAM_TABLE.get(arch, ()), *CBAM_TABLE["default"]):
        if row.channels_last == channels_last and itemsize <= row.itemsize and pixels >= row.min_pixels:
            return row.config
    raise LookupError(f"no row of CBAM_TABLE[{arch!r}] fits: {itemsize=} {pixels=} {channels_last=}")


# Softmax attention's bias gradient: programs that share the sum over batch and heads, until there are this many.
DBIAS_PROGRAMS = 1024  # untuned
DBIAS_SCRATCH_BYTES = 64 * 2**20  # of logit gradients at once, on their way into a bias table
DENSE_TABLE_BYTES = 16 * 2**20  # untuned; up to here a bias table is spread out to all pairs of tokens


@dataclass(frozen=True)
class Tile:
    """How one kernel of softmax attention is cut up.

    Attributes:
        block_m: queries a program or a step.
        block_n: keys a step or a program.
        num_warps: warps a program.
        num_stages: steps whose loads are in flight at once.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SoftmaxAttentionConfig:
    """Softmax attention's kernels: the forward, and the backward's for dq, for dk and dv, and for the bias."""

    forward: Tile
    dq: Tile
    dkv: Tile
    dbias: Tile


@dataclass(frozen=True)
class SoftmaxAttentionRow:
    """One row: the calls it fits, and their configuration.

    Attributes:
        itemsize: bytes an element, at most.
        head_dim: of q and k or of v, whichever is larger, at most.
        extras: how many there are of bias, bias table, mask and dropout, at most; each costs registers.
        config: the configuration.
    """

    itemsize: int
    head_dim: int
    extras: int
    config: SoftmaxAttentionConfig


def _attention_row(
    itemsize: int, head_dim: int, extras: int, *, forward: tuple, dq: tuple, dkv: tuple, dbias: tuple
) -> SoftmaxAttentionRow:
    """A row whose tiles are written as (block_m, block_n, num_warps, num_stages)."""
    config = SoftmaxAttentionConfig(Tile(*forward), Tile(*dq), Tile(*dkv), Tile(*dbias))
    return SoftmaxAttentionRow(itemsize, head_dim, extras, config)


# Hopper's and Blackwell's shared memory and wide matrix instructions take larger tiles in 16 bits.
_LARGE_TILES = (
    _attention_row(2, 64, 0, forward=(128, 128, 8, 2), dq=(128, 64, 8, 2), dkv=(64, 64, 4, 2), dbias=(128, 64, 8, 2)),
    _attention_row(2, 64, 1, forward=(128, 64, 8, 3), dq=(128, 64, 8, 2), dkv=(64, 64, 4, 2), dbias=(128, 64, 8, 2)),
    _attention_row(2, 64, 4, forward=(64, 64, 4, 3), dq=(128, 64, 8, 2), dkv=(32, 128, 8, 2), dbias=(128, 64, 8, 1)),
    _attention_row(2, 128, 0, forward=(128, 128, 8, 2), dq=(128, 64, 8, 2), dkv=(32, 128, 8, 2), dbias=(128, 64, 8, 1)),
    _attention_row(2, 128, 1, forward=(128, 64, 8, 3), dq=(128, 64, 8, 2), dkv=(32, 128, 8, 2), dbias=(128, 64, 8, 1)),
)
_LARGE_TILES_SM90 = (  # NVIDIA H200, 2026-11-20: in 16 bits rows 0, 1 and 3, in 32 the first; 1.2 to 2x _LARGE_TILES
    _attention_row(2, 64, 0, forward=(64, 64, 4, 3), dq=(64, 64, 4, 3), dkv=(64, 64, 4, 3), dbias=(64, 64, 4, 2)),
    _attention_row(2, 64, 1, forward=(64, 64, 4, 3), dq=(64, 64, 4, 3), dkv=(64, 64, 4, 2), dbias=(64, 64, 4, 3)),
    _attention_row(2, 64, 4, forward=(64, 64, 4, 3), dq=(128, 64, 8, 2), dkv=(32, 128, 8, 2), dbias=(128, 64, 8, 1)),
    _attention_row(2, 128, 0, forward=(64, 64, 4, 3), dq=(128, 64, 8, 3), dkv=(64, 64, 4, 2), dbias=(128, 64, 8, 1)),
    _attention_row(2, 128, 1, forward=(128, 64, 8, 3), dq=(64, 64, 4, 2), dkv=(32, 128, 8, 2), dbias=(128, 64, 8, 1)),
    _attention_row(2, 128, 4, forward=(128, 64, 8, 2), dq=(128, 32, 8, 2), dkv=(16, 64, 8, 2), dbias=(128, 64, 8, 1)),
    _attention_row(2, 256, 0, forward=(128, 64, 8, 2), dq=(128, 32, 8, 2), dkv=(16, 64, 8, 2), dbias=(128, 64, 8, 1)),
    _attention_row(4, 64, 0, forward=(128, 64, 8, 1), dq=(128, 64, 8, 1), dkv=(32, 32, 4, 1), dbias=(64, 64, 4, 1)),
    _attention_row(4, 64, 4, forward=(64, 32, 4, 1), dq=(64, 32, 4, 1), dkv=(32, 32, 4, 1), dbias=(32, 32, 4, 1)),
)
_LARGE_TILES_SM100 = (
    *_LARGE_TILES,
    _attention_row(2, 128, 4, forward=(128, 64, 8, 2), dq=(128, 32, 8, 2), dkv=(16, 64, 4, 2), dbias=(128, 64, 8, 1)),
    _attention_row(2, 256, 0, forward=(128, 32, 8, 2), dq=(128, 64, 8, 1), dkv=(64, 64, 8, 1), dbias=(128, 64, 8, 1)),
)

SOFTMAX_ATTENTION_TABLE: dict[str, tuple[SoftmaxAttentionRow, ...]] = {
    # but for those of _LARGE_TILES_SM90 all rows are untuned: the largest tiles of those tried that compile without
    # spills, or float64's least
    "sm_90": _LARGE_TILES_SM90,
    "sm_100": _LARGE_TILES_SM100,
    "gfx942": (
        _attention_row(2, 64, 0, forward=(128, 64, 8, 2), dq=(64, 64, 4, 2), dkv=(32, 64, 4, 1), dbias=(64, 64, 4, 1)),
        _attention_row(2, 64, 4, forward=(64, 64, 4, 2), dq=(64, 32, 4, 2), dkv=(32, 32, 4, 1), dbias=(64, 64, 4, 1)),
        _attention_row(2, 128, 0, forward=(128, 64, 8, 1), dq=(64, 64, 4, 2), dkv=(32, 64, 4, 1), dbias=(32, 32, 4, 1)),
        _attention_row(2, 128, 4, forward=(64, 32, 8, 1), dq=(64, 32, 4, 1), dkv=(32, 32, 4, 1), dbias=(32, 32, 4, 1)),
        _attention_row(2, 256, 4, forward=(32, 32, 4, 1), dq=(16, 32, 4, 1), dkv=(16, 16, 4, 1), dbias=(16, 32, 4, 1)),
        _attention_row(4, 128, 4, forward=(16, 32, 4, 1), dq=(16, 16, 4, 1), dkv=(16, 32, 4, 1), dbias=(16, 32, 4, 1)),
        _attention_row(4, 256, 4, forward=(16, 32, 4, 1), dq=(16, 16, 4, 1), dkv=(16, 16, 4, 1), dbias=(16, 32, 4, 1)),
    ),
    "default": (
        _attention_row(2, 64, 0, forward=(128, 64, 8, 2), dq=(64, 32, 8, 1), dkv=(32, 64, 4, 1), dbias=(64, 64, 4, 1)),
        _attention_row(2, 64, 4, forward=(64, 64, 4, 2), dq=(64, 32, 4, 2), dkv=(32, 32, 4, 1), dbias=(64, 64, 4, 1)),
        _attention_row(2, 128, 0, forward=(128, 64, 8, 2), dq=(64, 32, 8, 2), dkv=(32, 64, 8, 1), dbias=(32, 32, 4, 1)),
        _attention_row(2, 128, 4, forward=(64, 32, 8, 1), dq=(32, 32, 8, 1), dkv=(16, 32, 4, 1), dbias=(32, 32, 4, 1)),
        _attention_row(2, 256, 4, forward=(16, 32, 4, 1), dq=(16, 32, 4, 1), dkv=(16, 16, 4, 1), dbias=(16, 32, 4, 1)),
        _attention_row(4, 64, 4, forward=(64, 16, 8, 1), dq=(32, 32, 8, 1), dkv=(32, 32, 4, 1), dbias=(32, 32, 4, 1)),
        _attention_row(4, 128, 4, forward=(16, 32, 8, 1), dq=(16, 32, 8, 1), dkv=(32, 16, 8, 2), dbias=(16, 32, 4, 1)),
        _attention_row(4, 256, 4, forward=(16, 32, 8, 1), dq=(16, 16, 4, 2), dkv=(16, 16, 16, 1), dbias=(16, 32, 4, 1)),
        _attention_row(8, 256, 4, forward=(16, 16, 4, 1), dq=(16, 16, 4, 1), dkv=(16, 16, 4, 1), dbias=(16, 16, 4, 1)),
    ),
}


def softmax_attention_config(arch: str, *, itemsize: int, head_dim: int, extras: int) -> SoftmaxAttentionConfig:
    """The configuration of one call: the first row that fits, of the architecture's and then of the default ones."""
    for row in (*SOFTMAX_ATTENTION_TABLE.get(arch, ()), *SOFTMAX_ATTENTION_TABLE["default"]):
        if itemsize <= row.itemsize and head_dim <= row.head_dim and extras <= row.extras:
            return row.config
    raise LookupError(f"no row of SOFTMAX_ATTENTION_TABLE[{arch!r}] fits: {itemsize=} {head_dim=} {extras=}")


@dataclass(frozen=True)
class SdpaRow:
    """Calls without extras that PyTorch's own attention does faster, so that "auto" hands them over.

    Attributes:
        itemsize: bytes an element, at most.
        head_dim: at least.
        tokens: queries and keys, at least.
        source: the results file that shows it.
    """

    itemsize: int
    head_dim: int
    tokens: int
    source: str


SDPA_TABLE: dict[str, tuple[SdpaRow, ...]] = {}  # a row needs a results file; none shows PyTorch well ahead


def sdpa_is_faster(arch: str, *, itemsize: int, head_dim: int, tokens: int) -> str | None:
    """The results file that shows PyTorch's own attention to be faster for a call without extras, or None."""
    for row in SDPA_TABLE.get(arch, ()):
        if itemsize <= row.itemsize and head_dim >= row.head_dim and tokens >= row.tokens:
            return row.source
    return None


# Group attention: programs gather several groups of a head while this many programs remain.
GROUP_PROGRAMS = 2112  # NVIDIA H200, 2026-11-20; 16 for each of its multiprocessors
DBIAS_GROUP_PROGRAMS = 1056  # NVIDIA H200, 2026-11-20; where each leaves a sum of all pairs, which is read once more


@dataclass(frozen=True)
class GroupTile:
    """How one kernel of group attention is cut up.

    Attributes:
        num_warps: warps a program.
        num_stages: groups whose loads are in flight at once.
        groups: groups a program, at most.
    """

    num_warps: int
    num_stages: int
    groups: int


@dataclass(frozen=True)
class GroupAttentionConfig:
    """Group attention's kernels: the forward and the backward."""

    forward: GroupTile
    backward: GroupTile


@dataclass(frozen=True)
class GroupAttentionRow:
    """One row: the calls it fits, and their configuration.

    Attributes:
        itemsize: bytes an element, at most.
        tokens: of a group, at most.
        head_dim: of q and k or of v, whichever is larger, at most.
        extras: how many there are of bias or bias table, and dropout, at most; each costs registers.
        config: the configuration.
    """

    itemsize: int
    tokens: int
    head_dim: int
    extras: int
    config: GroupAttentionConfig


def _group_row(
    itemsize: int, tokens: int, head_dim: int, extras: int, *, forward: tuple, backward: tuple
) -> GroupAttentionRow:
    """A row whose tiles are written as (num_warps, num_stages, groups)."""
    config = GroupAttentionConfig(GroupTile(*forward), GroupTile(*backward))
    return GroupAttentionRow(itemsize, tokens, head_dim, extras, config)


_WIDEST_GROUPS = (
    _group_row(8, 16, 64, 2, forward=(8, 1, 16), backward=(8, 1, 16)),
    _group_row(8, 32, 32, 2, forward=(8, 1, 16), backward=(8, 1, 16)),
)
_WIDE_GROUPS = (
    _group_row(4, 32, 128, 2, forward=(8, 1, 16), backward=(8, 1, 16)),
    _group_row(4, 64, 16, 2, forward=(8, 1, 16), backward=(8, 1, 16)),
    _group_row(4, 64, 32, 1, forward=(8, 1, 16), backward=(8, 1, 16)),
    *_WIDEST_GROUPS,
)

# The groups that a program holds without spills, or nearly so; what no row of an architecture fits is streamed. Rows
# are untuned but for those of sm_90 that say otherwise.
GROUP_ATTENTION_TABLE: dict[str, tuple[GroupAttentionRow, ...]] = {
    "sm_90": (
        # NVIDIA H200, 2026-11-20: in 16 bits with 16 tokens 1.1x the rows of default, with 64 1.1 to 1.4x, with 128 and
        # no extras 1.6x; in 32 bits 4x, most of it by product_precision
        _group_row(2, 16, 128, 2, forward=(1, 2, 16), backward=(1, 2, 16)),
        _group_row(2, 32, 128, 2, forward=(2, 2, 16), backward=(4, 1, 16)),
        _group_row(2, 64, 64, 0, forward=(4, 3, 4), backward=(4, 3, 4)),
        _group_row(2, 64, 64, 2, forward=(4, 3, 16), backward=(4, 3, 16)),
        _group_row(2, 64, 128, 2, forward=(8, 1, 16), backward=(8, 1, 16)),
        _group_row(2, 128, 32, 0, forward=(8, 3, 16), backward=(8, 3, 16)),
        _group_row(2, 128, 32, 1, forward=(8, 1, 16), backward=(8, 2, 16)),
        _group_row(2, 128, 64, 1, forward=(8, 1, 16), backward=(8, 1, 16)),
        _group_row(4, 16, 32, 2, forward=(1, 2, 16), backward=(1, 2, 16)),
        _group_row(4, 64, 32, 1, forward=(4, 2, 16), backward=(4, 1, 16)),
        # not with 8 warps: Triton 3.6 gets products of 64 x 16 by three of TF32 wrong there
        _group_row(4, 64, 16, 2, forward=(4, 1, 16), backward=(4, 1, 16)),
        _group_row(4, 32, 128, 2, forward=(8, 1, 16), backward=(8, 1, 16)),
        *_WIDEST_GROUPS,
    ),
    "sm_100": (
        _group_row(2, 16, 128, 2, forward=(1, 1, 16), backward=(1, 1, 16)),
        _group_row(2, 32, 128, 2, forward=(2, 1, 16), backward=(4, 1, 16)),
        _group_row(2, 64, 64, 2, forward=(4, 1, 16), backward=(4, 1, 16)),
        _group_row(2, 64, 128, 2, forward=(8, 1, 16), backward=(8, 1, 16)),
        _group_row(2, 128, 64, 1, forward=(8, 1, 16), backward=(8, 1, 16)),
        *_WIDE_GROUPS,
    ),
    "gfx942": (
        _group_row(2, 16, 128, 2, forward=(2, 1, 16), backward=(2, 1, 16)),
        _group_row(2, 32, 128, 2, forward=(2, 1, 16), backward=(4, 1, 16)),
        _group_row(2, 64, 64, 2, forward=(4, 1, 16), backward=(4, 1, 16)),
        _group_row(2, 128, 32, 0, forward=(8, 1, 16), backward=(8, 1, 16)),
        _group_row(4, 32, 64, 2, forward=(8, 1, 16), backward=(8, 1, 16)),
        _group_row(8, 16, 64, 1, forward=(8, 1, 16), backward=(8, 1, 16)),
    ),
    "default": (
        _group_row(2, 16, 128, 2, forward=(1, 2, 16), backward=(1, 1, 16)),
        _group_row(2, 32, 128, 2, forward=(2, 2, 16), backward=(4, 1, 16)),
        _group_row(2, 64, 64, 2, forward=(4, 2, 16), backward=(4, 1, 16)),
        _group_row(2, 64, 128, 2, forward=(8, 1, 16), backward=(8, 1, 16)),
        _group_row(2, 128, 32, 1, forward=(8, 1, 16), backward=(8, 1, 16)),
        *_WIDE_GROUPS,
    ),
    "interpreter": (_group_row(8, 128, 128, 2, forward=(4, 1, 16), backward=(4, 1, 16)),),
}


def group_attention_config(
    arch: str, *, itemsize: int, tokens: int, head_dim: int, extras: int
) -> GroupAttentionConfig | None:
    """The configuration of one call, by the first row of the architecture's that fits, or None where none does."""
    for row in GROUP_ATTENTION_TABLE.get(arch, GROUP_ATTENTION_TABLE["default"]):
        fits = itemsize <= row.itemsize and tokens <= row.tokens and head_dim <= row.head_dim
        if fits and extras <= row.extras:
            return row.config
    return None


# Linear attention's slabs of tokens, each with a partial state of its own.
LINEAR_ATTENTION_PROGRAMS = 1024  # untuned; programs to have before slabs get longer
LINEAR_ATTENTION_SLAB = 512  # untuned; tokens a slab that is summed, at least: a partial state is worth some 64


@dataclass(frozen=True)
class LinearTile:
    """How one kernel of linear attention is cut up; the heads' features are never.

    Attributes:
        block_n: tokens a step.
        block_v: columns of values at once.
        num_warps: warps a program.
        num_stages: steps whose loads are in flight at once.
    """

    block_n: int
    block_v: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Linear attention's kernels: state and output of the forward, and the backward's over queries and over keys."""

    state: LinearTile
    forward: LinearTile
    dq: LinearTile
    dkv: LinearTile


@dataclass(frozen=True)
class LinearAttentionRow:
    """One row: the calls it fits, and their configuration.

    Attributes:
        itemsize: bytes an element, at most.
        head_dim: of q and k or of v, whichever is larger, at most.
        config: the configuration.
    """

    itemsize: int
    head_dim: int
    config: LinearAttentionConfig


def _linear_row(
    itemsize: int, head_dim: int, *, state: tuple, forward: tuple, dq: tuple, dkv: tuple
) -> LinearAttentionRow:
    """A row whose tiles are written as (block_n, block_v, num_warps, num_stages)."""
    config = LinearAttentionConfig(LinearTile(*state), LinearTile(*forward), LinearTile(*dq), LinearTile(*dkv))
    return LinearAttentionRow(itemsize, head_dim, config)


# Hopper and Blackwell, in 16 bits.
_LINEAR_WIDE_ROW = _linear_row(
    2, 256, state=(32, 128, 8, 2), forward=(32, 64, 4, 2), dq=(16, 16, 8, 1), dkv=(32, 32, 8, 1)
)

LINEAR_ATTENTION_TABLE: dict[str, tuple[LinearAttentionRow, ...]] = {
    # but for sm_90's all rows are untuned: the largest tiles of those tried that compile without spills and leave room
    # for two programs
    "sm_90": (  # NVIDIA H200, 2026-11-20, 1.2 to 1.7x the rows of sm_100 and of default there; the last is untuned
        _linear_row(2, 32, state=(128, 32, 4, 3), forward=(128, 32, 4, 1), dq=(64, 32, 2, 2), dkv=(128, 32, 4, 2)),
        _linear_row(2, 64, state=(128, 64, 2, 1), forward=(64, 64, 4, 1), dq=(32, 64, 2, 3), dkv=(64, 64, 4, 3)),
        _linear_row(2, 128, state=(64, 128, 4, 2), forward=(64, 128, 4, 1), dq=(32, 128, 8, 1), dkv=(64, 128, 8, 1)),
        _linear_row(4, 32, state=(64, 64, 2, 2), forward=(64, 64, 8, 1), dq=(32, 32, 4, 2), dkv=(64, 64, 8, 1)),
        _LINEAR_WIDE_ROW,
    ),
    "sm_100": (
        _linear_row(2, 32, state=(64, 32, 4, 3), forward=(128, 32, 4, 2), dq=(64, 32, 4, 2), dkv=(64, 32, 4, 2)),
        _linear_row(2, 64, state=(64, 64, 4, 2), forward=(128, 64, 4, 2), dq=(64, 64, 8, 2), dkv=(64, 64, 4, 2)),
        _linear_row(2, 128, state=(64, 128, 4, 1), forward=(64, 128, 4, 2), dq=(32, 128, 8, 1), dkv=(64, 64, 8, 1)),
        _LINEAR_WIDE_ROW,
    ),
    "gfx942": (
        _linear_row(2, 32, state=(64, 32, 4, 2), forward=(128, 32, 4, 2), dq=(64, 32, 4, 2), dkv=(64, 32, 4, 2)),
        _linear_row(2, 64, state=(64, 64, 4, 2), forward=(128, 64, 4, 1), dq=(64, 64, 4, 2), dkv=(64, 64, 4, 1)),
        _linear_row(2, 128, state=(64, 128, 4, 2), forward=(64, 64, 4, 2), dq=(64, 64, 4, 1), dkv=(64, 64, 4, 1)),
        _linear_row(2, 256, state=(64, 128, 8, 1), forward=(32, 32, 4, 2), dq=(16, 64, 4, 1), dkv=(16, 32, 4, 1)),
        _linear_row(4, 64, state=(32, 32, 4, 1), forward=(32, 32, 4, 1), dq=(32, 32, 4, 1), dkv=(32, 32, 4, 1)),
        _linear_row(4, 128, state=(32, 32, 4, 1), forward=(32, 32, 4, 1), dq=(16, 32, 4, 1), dkv=(16, 32, 4, 1)),
        _linear_row(8, 256, state=(16, 32, 4, 1), forward=(16, 32, 4, 1), dq=(16, 16, 4, 1), dkv=(16, 16, 4, 1)),
    ),
    "default": (
        _linear_row(2, 32, state=(64, 32, 4, 3), forward=(128, 32, 4, 1), dq=(64, 32, 4, 2), dkv=(64, 32, 4, 2)),
        _linear_row(2, 64, state=(64, 64, 4, 2), forward=(128, 64, 4, 2), dq=(64, 64, 8, 2), dkv=(64, 64, 4, 2)),
        _linear_row(2, 128, state=(64, 64, 8, 1), forward=(32, 128, 8, 1), dq=(32, 32, 8, 2), dkv=(32, 64, 8, 2)),
        _linear_row(2, 256, state=(64, 64, 8, 1), forward=(16, 64, 4, 1), dq=(16, 16, 8, 1), dkv=(32, 32, 8, 2)),
        _linear_row(4, 64, state=(64, 64, 4, 2), forward=(32, 64, 8, 1), dq=(16, 32, 4, 1), dkv=(32, 64, 8, 1)),
        _linear_row(4, 128, state=(32, 64, 8, 1), forward=(16, 64, 8, 1), dq=(16, 32, 8, 1), dkv=(16, 128, 8, 1)),
        _linear_row(4, 256, state=(16, 32, 4, 1), forward=(16, 32, 4, 1), dq=(16, 16, 4, 1), dkv=(16, 16, 8, 1)),
        _linear_row(8, 256, state=(16, 32, 4, 1), forward=(16, 32, 4, 1), dq=(16, 16, 4, 1), dkv=(16, 16, 4, 1)),
    ),
}


def linear_attention_config(arch: str, *, itemsize: int, head_dim: int) -> LinearAttentionConfig:
    """The configuration of one call: the first row that fits, of the architecture's and then of the default ones."""
    for row in (*LINEAR_ATTENTION_TABLE.get(arch, ()), *LINEAR_ATTENTION_TABLE["default"]):
        if itemsize <= row.itemsize and head_dim <= row.head_dim:
            return row.config
    raise LookupError(f"no row of LINEAR_ATTENTION_TABLE[{arch!r}] fits: {itemsize=} {head_dim=}")
