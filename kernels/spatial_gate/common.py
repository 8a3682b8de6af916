"""What the kernels of the spatial gate share: the frame of the maps, and what launches take."""

import math

import torch
import triton
import triton.language as tl

from ..tuning import SpatialGateConfig, architecture, spatial_gate_config

NO_INDEX: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def sigmoid(logit):
    return 1.0 / (1.0 + tl.exp(-logit))


@triton.jit
def framed_position(offs_p, width, RADIUS: tl.constexpr):
    """Where pixels lie in a map with a frame RADIUS wide."""
    row = offs_p // width
    return (row + RADIUS) * (width + 2 * RADIUS) + offs_p - row * width + RADIUS


@triton.jit
def zero_frame(ptr, height, width, RADIUS: tl.constexpr, VALUES: tl.constexpr, FRAME_BLOCK: tl.constexpr):
    """Zero the frame of one map of VALUES interleaved numbers a pixel: top, the gaps between its rows, bottom."""
    if RADIUS > 0:
        GAP: tl.constexpr = 2 * RADIUS * VALUES  # from one row's last pixel to the next row's first
        row_length = width * VALUES
        edge = RADIUS * (row_length + GAP) + RADIUS * VALUES  # top rows and the first row's left side; bottom alike
        gaps = (height - 1) * GAP
        for start in tl.range(0, 2 * edge + gaps, FRAME_BLOCK):
            offs = start + tl.arange(0, FRAME_BLOCK)
            in_gap = offs - edge
            row = in_gap // GAP
            gap_position = edge + row_length + row * (row_length + GAP) + in_gap - row * GAP
            position = tl.where(in_gap < gaps, gap_position, offs + height * row_length)
            position = tl.where(in_gap < 0, offs, position)
            zeros = tl.zeros([FRAME_BLOCK], ptr.dtype.element_ty)
            tl.store(ptr + position, zeros, mask=offs < 2 * edge + gaps)


def plan(
    like: torch.Tensor, channels: int, height: int, width: int, strides: tuple[int, ...], channels_last: bool,
    config: SpatialGateConfig | None,
):  # fmt: skip
    """What every launch over tiles takes: the configuration, sizes, strides and constexprs."""
    pixels = height * width
    config = config or spatial_gate_config(
        architecture(like.device), itemsize=like.element_size(), pixels=pixels, channels_last=channels_last
    )
    inner, outer = (channels, pixels) if channels_last else (pixels, channels)
    align = math.gcd(16, inner, *strides)
    sizes = (outer, inner // align, height, width, triton.cdiv(pixels, config.block_p))
    options = {
        "ALIGN": align,
        "CHANNELS_LAST": channels_last,
        "BLOCK_P": config.block_p,
        "BLOCK_C": config.block_c,
        "STEPS": min(4, triton.next_power_of_2(config.num_stages)),
        "num_warps": config.num_warps,
    }
    return config, sizes, [stride // align for stride in strides], options


def framed_empty(x: torch.Tensor, batch: int, height: int, width: int, kernel: int, values: int) -> torch.Tensor:
    """Room for so many values a pixel of a framed map, in the accumulators' dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (batch, height + kernel - 1, width + kernel - 1, values)
    return torch.empty(shape, dtype=dtype, device=x.device)
