"""What the kernels of the channel gate share: which part of the map a program owns, and what launches take."""

import math

import torch
import triton
import triton.language as tl

from ..tiles import map_sizes
from ..tuning import (
    CHANNEL_GATE_PROGRAMS,
    CHANNEL_GATE_SLAB_PIXELS,
    ChannelGateConfig,
    architecture,
    channel_gate_config,
)

NO_INDEX: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def place(
    pid, outer, inner, n_blocks, n_slabs, slab_steps,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, STEP_P: tl.constexpr,
):  # fmt: skip
    """Of this program: image, its channels, slab, first pixel, end of its whole steps, end; in the order of memory.

    A step is whole where all its channels and pixels exist: then it needs no masks.
    """
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    image = (pid // (n_blocks * n_slabs)).to(tl.int64)
    part = pid % (n_blocks * n_slabs)
    if CHANNELS_LAST:
        slab = part // n_blocks
        block = part % n_blocks
    else:
        block = part // n_slabs
        slab = part % n_slabs
    first = slab * slab_steps
    last = tl.minimum(first + slab_steps, tl.cdiv(pixels, STEP_P))
    whole = tl.where((block + 1) * BLOCK_C <= channels, tl.minimum(last, pixels // STEP_P), first)
    return image, block * BLOCK_C + tl.arange(0, BLOCK_C), slab, first * STEP_P, whole * STEP_P, last * STEP_P


@triton.jit
def pixel_stride(stride_outer, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Elements from a pixel to the next."""
    if CHANNELS_LAST:
        return tl.full([], ALIGN, tl.int64) * stride_outer
    else:
        return tl.full([], 1, tl.int64)


def accumulator(x: torch.Tensor) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def plan(
    like: torch.Tensor, strides: tuple[int, ...], channels_last: bool, config: ChannelGateConfig | None
) -> tuple[int, int, tuple[int, ...], list[int], dict[str, int]]:
    """What every launch takes: programs, slabs, sizes, strides and constexprs."""
    batch, channels, height, width = like.shape
    pixels = height * width
    config = config or channel_gate_config(
        architecture(like.device), itemsize=like.element_size(), pixels=pixels, channels_last=channels_last
    )
    inner, outer = (channels, pixels) if channels_last else (pixels, channels)
    align = math.gcd(16, inner, *strides)
    steps = min(4, triton.next_power_of_2(config.num_stages))
    n_blocks = triton.cdiv(channels, config.block_c)
    step = config.block_p * steps
    n_steps = triton.cdiv(pixels, step)
    slab_steps = max(n_steps * batch * n_blocks // CHANNEL_GATE_PROGRAMS, triton.cdiv(CHANNEL_GATE_SLAB_PIXELS, step))
    n_slabs = triton.cdiv(n_steps, slab_steps)
    options = {
        "ALIGN": align,
        "CHANNELS_LAST": channels_last,
        "BLOCK_P": config.block_p,
        "BLOCK_C": config.block_c,
        "STEPS": steps,
        "num_warps": config.num_warps,
    }
    sizes = (outer, inner // align, n_blocks, n_slabs, slab_steps)
    return batch * n_blocks * n_slabs, n_slabs, sizes, [stride // align for stride in strides], options
