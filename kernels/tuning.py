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
    """The key of a device in the tables: "sm_90", "gfx942", or "default" where there is no GPU."""
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


# Softmax attention's bias gradient: programs that share the sum over batch and heads, until there are this many.
DBIAS_PROGRAMS = 1024  # untuned
DBIAS_SCRATCH_BYTES = 64 * 2**20  # of logit gradients at once, on their way into a bias table


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
    _attention_row(2, 64, 0, forward=(128, 128, 8, 2), dq=(128, 64, 8, 2), dkv=(64, 64, 4, 2), dbias=(128, 64, 8, 1)),
    _attention_row(2, 64, 1, forward=(128, 64, 8, 3), dq=(128, 64, 8, 2), dkv=(64, 64, 4, 2), dbias=(128, 64, 8, 1)),
    _attention_row(2, 64, 4, forward=(64, 64, 4, 3), dq=(128, 64, 8, 2), dkv=(32, 128, 8, 2), dbias=(128, 64, 8, 1)),
    _attention_row(2, 128, 0, forward=(128, 128, 8, 2), dq=(128, 64, 8, 2), dkv=(32, 128, 8, 2), dbias=(128, 64, 8, 1)),
    _attention_row(2, 128, 1, forward=(128, 64, 8, 3), dq=(128, 64, 8, 2), dkv=(32, 128, 8, 2), dbias=(128, 64, 8, 1)),
    _attention_row(2, 128, 4, forward=(128, 64, 8, 2), dq=(128, 32, 8, 2), dkv=(32, 32, 4, 2), dbias=(128, 64, 8, 1)),
    _attention_row(2, 256, 0, forward=(128, 64, 8, 2), dq=(128, 32, 8, 2), dkv=(32, 32, 8, 1), dbias=(128, 64, 8, 1)),
)

SOFTMAX_ATTENTION_TABLE: dict[str, tuple[SoftmaxAttentionRow, ...]] = {
    # all rows are untuned: the largest tiles of those tried that compile without spills
    "sm_90": _LARGE_TILES,
    "sm_100": _LARGE_TILES,
    "gfx942": (
        _attention_row(2, 64, 0, forward=(128, 64, 8, 2), dq=(64, 64, 4, 2), dkv=(32, 64, 4, 1), dbias=(64, 64, 4, 1)),
        _attention_row(2, 64, 4, forward=(64, 64, 4, 2), dq=(64, 32, 4, 2), dkv=(32, 32, 4, 1), dbias=(64, 64, 4, 1)),
        _attention_row(2, 128, 0, forward=(128, 64, 8, 2), dq=(64, 64, 4, 2), dkv=(32, 64, 4, 1), dbias=(32, 32, 4, 1)),
        _attention_row(2, 128, 4, forward=(64, 32, 8, 1), dq=(64, 32, 8, 1), dkv=(32, 32, 4, 1), dbias=(32, 32, 4, 1)),
        _attention_row(2, 256, 4, forward=(32, 32, 8, 1), dq=(16, 32, 4, 1), dkv=(16, 16, 4, 1), dbias=(16, 32, 4, 1)),
        _attention_row(4, 128, 4, forward=(16, 32, 4, 1), dq=(16, 16, 4, 1), dkv=(16, 32, 4, 1), dbias=(16, 32, 4, 1)),
        _attention_row(4, 256, 4, forward=(16, 32, 4, 1), dq=(16, 16, 4, 1), dkv=(16, 16, 4, 1), dbias=(16, 32, 4, 1)),
    ),
    "default": (
        _attention_row(2, 64, 0, forward=(128, 64, 8, 2), dq=(64, 32, 8, 1), dkv=(32, 64, 4, 1), dbias=(64, 64, 4, 1)),
        _attention_row(2, 64, 4, forward=(64, 64, 4, 2), dq=(64, 32, 4, 2), dkv=(32, 32, 4, 1), dbias=(64, 64, 4, 1)),
        _attention_row(2, 128, 0, forward=(128, 64, 8, 2), dq=(64, 32, 8, 2), dkv=(32, 64, 4, 1), dbias=(32, 32, 4, 1)),
        _attention_row(2, 128, 4, forward=(64, 32, 8, 1), dq=(32, 32, 8, 1), dkv=(16, 32, 4, 1), dbias=(32, 32, 4, 1)),
        _attention_row(2, 256, 4, forward=(16, 32, 4, 1), dq=(16, 32, 4, 1), dkv=(16, 16, 4, 1), dbias=(16, 32, 4, 1)),
        _attention_row(4, 64, 4, forward=(64, 32, 8, 1), dq=(32, 32, 8, 1), dkv=(32, 32, 4, 1), dbias=(32, 32, 4, 1)),
        _attention_row(4, 128, 4, forward=(16, 32, 8, 1), dq=(16, 16, 4, 1), dkv=(16, 32, 8, 1), dbias=(16, 32, 4, 1)),
        _attention_row(4, 256, 4, forward=(16, 32, 8, 1), dq=(16, 16, 4, 1), dkv=(16, 16, 8, 1), dbias=(16, 32, 4, 1)),
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


SDPA_TABLE: dict[str, tuple[SdpaRow, ...]] = {}  # a row needs a results file, and no device has been measured yet


def sdpa_is_faster(arch: str, *, itemsize: int, head_dim: int, tokens: int) -> str | None:
    """The results file that shows PyTorch's own attention to be faster for a call without extras, or None."""
    for row in SDPA_TABLE.get(arch, ()):
        if itemsize <= row.itemsize and head_dim >= row.head_dim and tokens >= row.tokens:
            return row.source
    return None
