"""Helpers that several kernel files use unchanged: addressing a feature map in tiles, and NaN-keeping maxima.

A feature map is read in tiles of one layout: ``[channels, pixels]`` when whole planes lie together (NCHW) and
``[pixels, channels]`` in channels_last (NHWC). The *inner* axis is the contiguous one. Inner size and strides come
divided by ALIGN, the largest power of two up to 16 that divides them all: multiplied back here, they let the compiler
prove alignment, which it otherwise does for multiples of 16 only (14 x 14 pixels would fall to 2-byte loads).
"""

import torch
import triton
import triton.language as tl


def addressable(x: torch.Tensor, channels_last: bool) -> tuple[torch.Tensor, tuple[int, int]]:
    """A (B, C, H, W) tensor and its (batch, outer) strides; a copy where the pixels of a plane do not lie in a row."""
    _, channels, height, width = x.shape
    stride_b, stride_c, stride_h, stride_w = x.stride()
    if channels_last:
        if (stride_c == 1 or channels == 1) and (stride_h == width * stride_w or height == 1):
            return x, (stride_b, stride_h if width == 1 else stride_w)
        x = x.contiguous(memory_format=torch.channels_last)
        return x, (channels * height * width, channels)
    if (stride_w == 1 or width == 1) and (stride_h == width or height == 1):
        return x, (stride_b, stride_c)
    return x.contiguous(), (channels * height * width, height * width)


@triton.jit
def map_sizes(outer, inner, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(channels, pixels) of a map whose inner size came divided by ALIGN."""
    if CHANNELS_LAST:
        return inner * ALIGN, outer
    else:
        return outer, inner * ALIGN


@triton.jit
def over_channels(pixel_values, CHANNELS_LAST: tl.constexpr):
    """A vector of one value a pixel, ready to broadcast over the channels of a tile."""
    if CHANNELS_LAST:
        return pixel_values[:, None]
    else:
        return pixel_values[None, :]


@triton.jit
def over_pixels(channel_values, CHANNELS_LAST: tl.constexpr):
    """A vector of one value a channel, ready to broadcast over the pixels of a tile."""
    if CHANNELS_LAST:
        return channel_values[None, :]
    else:
        return channel_values[:, None]


@triton.jit
def tile_offsets(offs_c, offs_p, stride_outer, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Element offsets of a tile inside one image, 64 bits wide: one image may exceed 2^31 elements."""
    if CHANNELS_LAST:
        outer = offs_p.to(tl.int64) * stride_outer * ALIGN
        return over_channels(outer, CHANNELS_LAST) + over_pixels(offs_c, CHANNELS_LAST)
    else:
        outer = offs_c.to(tl.int64) * stride_outer * ALIGN
        return over_pixels(outer, CHANNELS_LAST) + over_channels(offs_p, CHANNELS_LAST)


@triton.jit
def tile_mask(offs_c, mask_p, channels, CHANNELS_LAST: tl.constexpr):
    """Which elements of a tile exist."""
    return over_channels(mask_p, CHANNELS_LAST) & over_pixels(offs_c < channels, CHANNELS_LAST)


@triton.jit
def is_whole(tile, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Whether all of a program's pixels exist and the channels fill every block: then it needs no masks."""
    return ((tile + 1) * BLOCK_P <= pixels) & (channels % BLOCK_C == 0)


@triton.jit
def tile_stride(stride_outer, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Elements from a tile to that of the next BLOCK_C channels."""
    if CHANNELS_LAST:
        return tl.full([], BLOCK_C, tl.int64)
    else:
        return tl.full([], BLOCK_C, tl.int64) * stride_outer * ALIGN


@triton.jit
def load_tile(ptrs, offs_c, mask_p, channels, other, WHOLE: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """A tile. Of a WHOLE one without a mask: with it, a thread's loads wait for each other's registers."""
    if WHOLE:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=tile_mask(offs_c, mask_p, channels, CHANNELS_LAST), other=other)


@triton.jit
def load_tile_once(ptrs, offs_c, mask_p, channels, other, WHOLE: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """A tile that is not read again, so that others stay in L2."""
    if WHOLE:
        return tl.load(ptrs, eviction_policy="evict_first")
    else:
        mask = tile_mask(offs_c, mask_p, channels, CHANNELS_LAST)
        return tl.load(ptrs, mask=mask, other=other, eviction_policy="evict_first")


@triton.jit
def store_tile(ptrs, values, offs_c, mask_p, channels, WHOLE: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Store a tile in its pointers' dtype."""
    values = values.to(ptrs.dtype.element_ty)
    if WHOLE:
        tl.store(ptrs, values)
    else:
        tl.store(ptrs, values, mask=tile_mask(offs_c, mask_p, channels, CHANNELS_LAST))


@triton.jit
def max_keep_nan(values, axis: tl.constexpr):
    """Maximum along an axis; NaN wherever one stands, as torch.max has it (tl.max drops NaN)."""
    is_nan = values != values
    largest = tl.max(tl.where(is_nan, float("-inf"), values), axis)
    return tl.where(tl.max(is_nan.to(tl.int32), axis) > 0, float("nan"), largest)
