"""The channel gate's forward: pooling, and scaling."""

import torch
import triton
import triton.language as tl

from ..tiles import (
    addressable,
    load_tile,
    load_tile_once,
    map_sizes,
    max_keep_nan,
    over_channels,
    over_pixels,
    store_tile,
    tile_mask,
    tile_offsets,
)
from ..tuning import CHANNEL_GATE_SUM_BLOCK, ChannelGateConfig
from .common import NO_INDEX, accumulator, pixel_stride, place, plan


@triton.jit
def pool_pixels(
    x_ptr, total, largest, index, offs_c, begin, end, channels, pixels, stride_outer,
    MAX: tl.constexpr, INDEX: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Sums, maxima and their first indices, or numbers, over every BLOCK_P-th pixel, one tile of each."""
    lane = tl.arange(0, BLOCK_P)
    stride = pixel_stride(stride_outer, ALIGN, CHANNELS_LAST) * BLOCK_P
    offs = tile_offsets(offs_c, lane, stride_outer, ALIGN, CHANNELS_LAST)
    x_ptr += begin // BLOCK_P * stride
    for start in tl.range(begin, end, BLOCK_P * STEPS):  # all loads come before the first use
        p0 = start + lane
        x0 = load_tile(x_ptr + offs, offs_c, p0 < pixels, channels, float("-inf"), WHOLE, CHANNELS_LAST)
        if STEPS >= 2:
            p1 = start + lane + 1 * BLOCK_P
            x1 = load_tile(
                x_ptr + 1 * stride + offs, offs_c, p1 < pixels, channels, float("-inf"), WHOLE, CHANNELS_LAST
            )
        if STEPS == 4:
            p2 = start + lane + 2 * BLOCK_P
            x2 = load_tile(
                x_ptr + 2 * stride + offs, offs_c, p2 < pixels, channels, float("-inf"), WHOLE, CHANNELS_LAST
            )
            p3 = start + lane + 3 * BLOCK_P
            x3 = load_tile(
                x_ptr + 3 * stride + offs, offs_c, p3 < pixels, channels, float("-inf"), WHOLE, CHANNELS_LAST
            )
        total, largest, index = pool_step(
            x0, p0, offs_c, channels, pixels, total, largest, index, MAX, INDEX, WHOLE, CHANNELS_LAST
        )
        if STEPS >= 2:
            total, largest, index = pool_step(
                x1, p1, offs_c, channels, pixels, total, largest, index, MAX, INDEX, WHOLE, CHANNELS_LAST
            )
        if STEPS == 4:
            total, largest, index = pool_step(
                x2, p2, offs_c, channels, pixels, total, largest, index, MAX, INDEX, WHOLE, CHANNELS_LAST
            )
            total, largest, index = pool_step(
                x3, p3, offs_c, channels, pixels, total, largest, index, MAX, INDEX, WHOLE, CHANNELS_LAST
            )
        x_ptr += STEPS * stride
    return total, largest, index


@triton.jit
def pool_step(
    x, offs_p, offs_c, channels, pixels, total, largest, index,
    MAX: tl.constexpr, INDEX: tl.constexpr, WHOLE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    x = x.to(total.dtype)
    mask = tile_mask(offs_c, offs_p < pixels, channels, CHANNELS_LAST)
    if MAX:
        if INDEX == "first":
            # strictly larger, or the first NaN: then later equals never win
            wins = (x > largest) | ((x != x) & (largest == largest)) | ((index == NO_INDEX) & mask)
            index = tl.where(wins, over_channels(offs_p, CHANNELS_LAST), index)
        if INDEX == "even":
            equal = index + ((x == largest) & mask).to(tl.int32)
            index = tl.where(x > largest, 1, equal)
        largest = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
    if not WHOLE:
        x = tl.where(mask, x, 0.0)
    return total + x, largest, index


@triton.jit
def _channel_gate_fwd_pool_kernel(
    x_ptr, avg_ptr, max_ptr, index_ptr,
    outer, inner, n_blocks, n_slabs, slab_steps, rows,
    stride_xb, stride_xo,
    MAX: tl.constexpr, INDEX: tl.constexpr, FINAL: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    # one program a slab of the pixels of BLOCK_C channels; not FINAL, its results are partial, [slab, image x channel]
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    shape: tl.constexpr = (BLOCK_P, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_P)
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    image, offs_c, slab, begin, whole, end = place(
        tl.program_id(0), outer, inner, n_blocks, n_slabs, slab_steps, ALIGN, CHANNELS_LAST, BLOCK_C, BLOCK_P * STEPS
    )
    x_ptr += image * stride_xb * ALIGN
    total = tl.zeros(shape, acc_dtype)
    largest = tl.full(shape, float("-inf"), acc_dtype)
    index = tl.full(shape, NO_INDEX if INDEX == "first" else 0, tl.int32)
    total, largest, index = pool_pixels(
        x_ptr, total, largest, index, offs_c, begin, whole, channels, pixels, stride_xo,
        MAX, INDEX, True, ALIGN, CHANNELS_LAST, BLOCK_P, STEPS,
    )  # fmt: skip
    total, largest, index = pool_pixels(
        x_ptr, total, largest, index, offs_c, whole, end, channels, pixels, stride_xo,
        MAX, INDEX, False, ALIGN, CHANNELS_LAST, BLOCK_P, STEPS,
    )  # fmt: skip
    row = slab.to(tl.int64) * rows + image * channels + offs_c
    mask = offs_c < channels
    avg = tl.sum(total, axis)
    if FINAL:
        avg = avg / pixels
    tl.store(avg_ptr + row, avg.to(avg_ptr.dtype.element_ty), mask=mask)
    if MAX:
        peak = max_keep_nan(largest, axis)
        tl.store(max_ptr + row, peak.to(max_ptr.dtype.element_ty), mask=mask)
        peaks = over_pixels(peak, CHANNELS_LAST)
        if INDEX == "first":
            is_peak = (largest == peaks) | ((largest != largest) & (peaks != peaks))
            tl.store(index_ptr + row, tl.min(tl.where(is_peak, index, NO_INDEX), axis), mask=mask)
        if INDEX == "even":
            tl.store(index_ptr + row, tl.sum(tl.where(largest == peaks, index, 0), axis), mask=mask)


@triton.jit
def _channel_gate_fwd_pool_sum_kernel(
    totals_ptr, maxima_ptr, indices_ptr, avg_ptr, max_ptr, index_ptr,
    rows, n_slabs, pixels,
    MAX: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # the partial results of all slabs, in their order
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    total = tl.zeros([BLOCK], totals_ptr.dtype.element_ty)
    largest = tl.full([BLOCK], float("-inf"), totals_ptr.dtype.element_ty)
    index = tl.full([BLOCK], NO_INDEX if INDEX == "first" else 0, tl.int32)
    offs = row
    for _ in tl.range(n_slabs):
        total += tl.load(totals_ptr + offs, mask=mask, other=0.0)
        if MAX:
            peak = tl.load(maxima_ptr + offs, mask=mask, other=0.0)
            wins = (peak > largest) | ((peak != peak) & (largest == largest))
            if INDEX == "first":
                first = tl.load(indices_ptr + offs, mask=mask, other=0)
                index = tl.where(wins | (index == NO_INDEX), first, index)
            if INDEX == "even":
                count = tl.load(indices_ptr + offs, mask=mask, other=0)
                index = tl.where(wins, count, tl.where(peak == largest, index + count, index))
            largest = tl.maximum(largest, peak, propagate_nan=tl.PropagateNan.ALL)
        offs += rows
    tl.store(avg_ptr + row, (total / pixels).to(avg_ptr.dtype.element_ty), mask=mask)
    if MAX:
        tl.store(max_ptr + row, largest.to(max_ptr.dtype.element_ty), mask=mask)
        if INDEX != "":
            tl.store(index_ptr + row, index, mask=mask)


@triton.jit
def scale_pixels(
    x_ptr, out_ptr, gate, offs_c, begin, end, channels, pixels, stride_outer, out_stride_outer,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out = x * gate."""
    gates = over_pixels(gate, CHANNELS_LAST)
    lane = tl.arange(0, BLOCK_P)
    offs = tile_offsets(offs_c, lane, stride_outer, ALIGN, CHANNELS_LAST)
    out_offs = tile_offsets(offs_c, lane, out_stride_outer, ALIGN, CHANNELS_LAST)
    stride = pixel_stride(stride_outer, ALIGN, CHANNELS_LAST) * BLOCK_P
    out_stride = pixel_stride(out_stride_outer, ALIGN, CHANNELS_LAST) * BLOCK_P
    x_ptr += begin // BLOCK_P * stride
    out_ptr += begin // BLOCK_P * out_stride
    for start in tl.range(begin, end, BLOCK_P):
        mask_p = start + lane < pixels
        x = load_tile_once(x_ptr + offs, offs_c, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST).to(gate.dtype)
        store_tile(out_ptr + out_offs, x * gates, offs_c, mask_p, channels, WHOLE, CHANNELS_LAST)
        x_ptr += stride
        out_ptr += out_stride


@triton.jit
def _channel_gate_fwd_kernel(
    x_ptr, gate_ptr, out_ptr,
    outer, inner, n_blocks, n_slabs, slab_steps,
    stride_xb, stride_xo,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # last pooled, first scaled: that x is still in L2
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    image, offs_c, _, begin, whole, end = place(
        pid, outer, inner, n_blocks, n_slabs, slab_steps, ALIGN, CHANNELS_LAST, BLOCK_C, BLOCK_P * STEPS
    )
    gate = tl.load(gate_ptr + image * channels + offs_c, mask=offs_c < channels, other=0.0).to(acc_dtype)
    x_ptr += image * stride_xb * ALIGN
    out_ptr += image * channels * pixels
    scale_pixels(
        x_ptr, out_ptr, gate, offs_c, begin, whole, channels, pixels, stride_xo, inner,
        True, ALIGN, CHANNELS_LAST, BLOCK_P * STEPS,
    )  # fmt: skip
    scale_pixels(
        x_ptr, out_ptr, gate, offs_c, whole, end, channels, pixels, stride_xo, inner,
        False, ALIGN, CHANNELS_LAST, BLOCK_P * STEPS,
    )  # fmt: skip


def channel_gate_pool(
    x: torch.Tensor, needs_max: bool, ties: str, keep: bool, config: ChannelGateConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the pooling.

    Args:
        x: (B, C, H, W), not empty; read in place as contiguous or channels_last, also a slice of such a tensor.
        needs_max: whether the maximum is wanted.
        ties: "first" or "even".
        keep: whether a backward will follow.
        config: block sizes and so on; chosen from the table when None.

    Returns:
        avg and max (B, C) in x's dtype; index (B, C) int32, the first pixel of the maximum, or for "even" how many
        there are. What is not wanted is empty, (0,).
    """
    batch, channels, height, width = x.shape
    channels_last = x.stride(1) < x.stride(3)
    x, strides = addressable(x, channels_last)
    programs, n_slabs, sizes, strides, options = plan(x, strides, channels_last, config)
    rows = batch * channels
    none = (0,)
    index_shape = (batch, channels) if needs_max and keep else none
    avg = torch.empty((batch, channels), dtype=x.dtype, device=x.device)
    peak = torch.empty((batch, channels) if needs_max else none, dtype=x.dtype, device=x.device)
    index = torch.empty(index_shape, dtype=torch.int32, device=x.device)
    targets = avg, peak, index
    if n_slabs > 1:
        totals = torch.empty((n_slabs, rows), dtype=accumulator(x), device=x.device)
        maxima = torch.empty((n_slabs, rows) if needs_max else none, dtype=accumulator(x), device=x.device)
        indices = torch.empty((n_slabs, rows) if index.numel() else none, dtype=torch.int32, device=x.device)
        targets = totals, maxima, indices
    what = {"MAX": needs_max, "INDEX": ties if needs_max and keep else ""}
    _channel_gate_fwd_pool_kernel[(programs,)](
        x, *targets,
        *sizes, rows,
        *strides,
        **what, FINAL=n_slabs == 1, **options,
    )  # fmt: skip
    if n_slabs > 1:
        _channel_gate_fwd_pool_sum_kernel[(triton.cdiv(rows, CHANNEL_GATE_SUM_BLOCK),)](
            *targets, avg, peak, index,
            rows, n_slabs, height * width,
            **what, BLOCK=CHANNEL_GATE_SUM_BLOCK,
        )  # fmt: skip
    return avg, peak, index


def channel_gate_forward(x: torch.Tensor, gate: torch.Tensor, config: ChannelGateConfig | None = None) -> torch.Tensor:
    """Launch the scaling.

    Args:
        x, config: as for ``channel_gate_pool``.
        gate: (B, C), any float dtype.

    Returns:
        x * gate, of x's shape, dtype and memory format.
    """
    channels_last = x.stride(1) < x.stride(3)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    x, strides = addressable(x, channels_last)
    programs, _, sizes, strides, options = plan(x, strides, channels_last, config)
    _channel_gate_fwd_kernel[(programs,)](
        x, gate.contiguous(), out,
        *sizes,
        *strides,
        **options,
    )  # fmt: skip
    return out
