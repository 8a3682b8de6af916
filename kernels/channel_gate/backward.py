"""The channel gate's backward: the gradient of the gate, and that of x."""

import torch
import triton
import triton.language as tl

from ..tiles import (
    addressable,
    load_tile,
    load_tile_once,
    map_sizes,
    over_channels,
    over_pixels,
    store_tile,
    tile_offsets,
)
from ..tuning import CHANNEL_GATE_SUM_BLOCK, ChannelGateConfig
from .common import accumulator, pixel_stride, place, plan


@triton.jit
def dot_pixels(
    x_ptr, dout_ptr, acc, offs_c, begin, end, channels, pixels, stride_outer, dout_stride_outer,
    WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Sums of x * dout over every BLOCK_P-th pixel, one tile of them."""
    lane = tl.arange(0, BLOCK_P)
    stride = pixel_stride(stride_outer, ALIGN, CHANNELS_LAST) * BLOCK_P
    dout_stride = pixel_stride(dout_stride_outer, ALIGN, CHANNELS_LAST) * BLOCK_P
    x_ptrs = x_ptr + begin // BLOCK_P * stride + tile_offsets(offs_c, lane, stride_outer, ALIGN, CHANNELS_LAST)
    dout_ptrs = dout_ptr + begin // BLOCK_P * dout_stride
    dout_ptrs += tile_offsets(offs_c, lane, dout_stride_outer, ALIGN, CHANNELS_LAST)
    for start in tl.range(begin, end, BLOCK_P * STEPS):  # all loads come before the first use
        m0 = start + lane < pixels
        x0 = load_tile_once(x_ptrs, offs_c, m0, channels, 0.0, WHOLE, CHANNELS_LAST)
        dout0 = load_tile(dout_ptrs, offs_c, m0, channels, 0.0, WHOLE, CHANNELS_LAST)
        if STEPS >= 2:
            m1 = start + lane + 1 * BLOCK_P < pixels
            x1 = load_tile_once(x_ptrs + 1 * stride, offs_c, m1, channels, 0.0, WHOLE, CHANNELS_LAST)
            dout1 = load_tile(dout_ptrs + 1 * dout_stride, offs_c, m1, channels, 0.0, WHOLE, CHANNELS_LAST)
        if STEPS == 4:
            m2 = start + lane + 2 * BLOCK_P < pixels
            x2 = load_tile_once(x_ptrs + 2 * stride, offs_c, m2, channels, 0.0, WHOLE, CHANNELS_LAST)
            dout2 = load_tile(dout_ptrs + 2 * dout_stride, offs_c, m2, channels, 0.0, WHOLE, CHANNELS_LAST)
            m3 = start + lane + 3 * BLOCK_P < pixels
            x3 = load_tile_once(x_ptrs + 3 * stride, offs_c, m3, channels, 0.0, WHOLE, CHANNELS_LAST)
            dout3 = load_tile(dout_ptrs + 3 * dout_stride, offs_c, m3, channels, 0.0, WHOLE, CHANNELS_LAST)
        acc += x0.to(acc.dtype) * dout0.to(acc.dtype)
        if STEPS >= 2:
            acc += x1.to(acc.dtype) * dout1.to(acc.dtype)
        if STEPS == 4:
            acc += x2.to(acc.dtype) * dout2.to(acc.dtype)
            acc += x3.to(acc.dtype) * dout3.to(acc.dtype)
        x_ptrs += STEPS * stride
        dout_ptrs += STEPS * dout_stride
    return acc


@triton.jit
def _channel_gate_bwd_dgate_kernel(
    x_ptr, dout_ptr, dgate_ptr,
    outer, inner, n_blocks, n_slabs, slab_steps, rows,
    stride_xb, stride_xo, stride_dob, stride_doo,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    # one program a slab of the pixels of BLOCK_C channels; of several slabs partial sums, [slab, image x channel]
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    shape: tl.constexpr = (BLOCK_P, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_P)
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    image, offs_c, slab, begin, whole, end = place(
        tl.program_id(0), outer, inner, n_blocks, n_slabs, slab_steps, ALIGN, CHANNELS_LAST, BLOCK_C, BLOCK_P * STEPS
    )
    x_ptr += image * stride_xb * ALIGN
    dout_ptr += image * stride_dob * ALIGN
    acc = tl.zeros(shape, dgate_ptr.dtype.element_ty)
    acc = dot_pixels(
        x_ptr, dout_ptr, acc, offs_c, begin, whole, channels, pixels, stride_xo, stride_doo,
        True, ALIGN, CHANNELS_LAST, BLOCK_P, STEPS,
    )  # fmt: skip
    acc = dot_pixels(
        x_ptr, dout_ptr, acc, offs_c, whole, end, channels, pixels, stride_xo, stride_doo,
        False, ALIGN, CHANNELS_LAST, BLOCK_P, STEPS,
    )  # fmt: skip
    row = slab.to(tl.int64) * rows + image * channels + offs_c
    tl.store(dgate_ptr + row, tl.sum(acc, axis), mask=offs_c < channels)


@triton.jit
def _channel_gate_bwd_dgate_sum_kernel(
    partials_ptr, dgate_ptr,
    rows, n_slabs,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    total = tl.zeros([BLOCK], dgate_ptr.dtype.element_ty)
    offs = row
    for _ in tl.range(n_slabs):
        total += tl.load(partials_ptr + offs, mask=mask, other=0.0)
        offs += rows
    tl.store(dgate_ptr + row, total, mask=mask)


@triton.jit
def dx_pixels(
    x_ptr, dout_ptr, dx_ptr, gate, davg, dmax, peak, index,
    offs_c, begin, end, channels, pixels, stride_outer, dout_stride_outer, dx_stride_outer,
    HAS_DOUT: tl.constexpr, MAX: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = dout * gate + davg, and dmax where the maximum was."""
    shape: tl.constexpr = (BLOCK_P, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_P)
    gates = over_pixels(gate, CHANNELS_LAST)
    davgs = over_pixels(davg, CHANNELS_LAST)
    dmaxes = over_pixels(dmax, CHANNELS_LAST)
    lane = tl.arange(0, BLOCK_P)
    step = begin // BLOCK_P
    stride = pixel_stride(stride_outer, ALIGN, CHANNELS_LAST) * BLOCK_P
    dout_stride = pixel_stride(dout_stride_outer, ALIGN, CHANNELS_LAST) * BLOCK_P
    dx_stride = pixel_stride(dx_stride_outer, ALIGN, CHANNELS_LAST) * BLOCK_P
    x_ptrs = x_ptr + step * stride + tile_offsets(offs_c, lane, stride_outer, ALIGN, CHANNELS_LAST)
    dout_ptrs = dout_ptr + step * dout_stride + tile_offsets(offs_c, lane, dout_stride_outer, ALIGN, CHANNELS_LAST)
    dx_ptrs = dx_ptr + step * dx_stride + tile_offsets(offs_c, lane, dx_stride_outer, ALIGN, CHANNELS_LAST)
    for start in tl.range(begin, end, BLOCK_P):
        offs_p = start + lane
        mask_p = offs_p < pixels
        dx = tl.zeros(shape, davg.dtype) + davgs
        if HAS_DOUT:
            dout = load_tile_once(dout_ptrs, offs_c, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST)
            dx += dout.to(davg.dtype) * gates
            dout_ptrs += dout_stride
        if MAX == "first":
            is_peak = over_channels(offs_p, CHANNELS_LAST) == over_pixels(index, CHANNELS_LAST)
            dx = tl.where(is_peak, dx + dmaxes, dx)
        if MAX == "even":
            x = load_tile_once(x_ptrs, offs_c, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST)
            dx = tl.where(x.to(davg.dtype) == over_pixels(peak, CHANNELS_LAST), dx + dmaxes, dx)
            x_ptrs += stride
        store_tile(dx_ptrs, dx, offs_c, mask_p, channels, WHOLE, CHANNELS_LAST)
        dx_ptrs += dx_stride


@triton.jit
def _channel_gate_bwd_dx_kernel(
    x_ptr, dout_ptr, gate_ptr, davg_ptr, dmax_ptr, max_ptr, index_ptr, dx_ptr,
    outer, inner, n_blocks, n_slabs, slab_steps,
    stride_xb, stride_xo, stride_dob, stride_doo,
    HAS_DOUT: tl.constexpr, AVG: tl.constexpr, MAX: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if dx_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # dout read last by dgate is still in L2
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    image, offs_c, _, begin, whole, end = place(
        pid, outer, inner, n_blocks, n_slabs, slab_steps, ALIGN, CHANNELS_LAST, BLOCK_C, BLOCK_P * STEPS
    )
    row = image * channels + offs_c
    mask = offs_c < channels
    gate = tl.zeros([BLOCK_C], acc_dtype)
    davg = tl.zeros([BLOCK_C], acc_dtype)
    dmax = tl.zeros([BLOCK_C], acc_dtype)
    peak = tl.zeros([BLOCK_C], acc_dtype)
    index = tl.zeros([BLOCK_C], tl.int32)
    if HAS_DOUT:
        gate = tl.load(gate_ptr + row, mask=mask, other=0.0).to(acc_dtype)
    if AVG:
        davg = tl.load(davg_ptr + row, mask=mask, other=0.0).to(acc_dtype) / pixels
    if MAX != "":
        dmax = tl.load(dmax_ptr + row, mask=mask, other=0.0).to(acc_dtype)
        index = tl.load(index_ptr + row, mask=mask, other=-1)
    if MAX == "even":
        peak = tl.load(max_ptr + row, mask=mask, other=0.0).to(acc_dtype)
        dmax = dmax / index.to(acc_dtype)
        davg = tl.where(index == 0, float("nan"), davg)  # nothing equals a NaN maximum: 0 parts are NaN everywhere
    x_ptr += image * stride_xb * ALIGN
    dout_ptr += image * stride_dob * ALIGN
    dx_ptr += image * channels * pixels
    dx_pixels(
        x_ptr, dout_ptr, dx_ptr, gate, davg, dmax, peak, index,
        offs_c, begin, whole, channels, pixels, stride_xo, stride_doo, inner,
        HAS_DOUT, MAX, True, ALIGN, CHANNELS_LAST, BLOCK_P * STEPS, BLOCK_C,
    )  # fmt: skip
    dx_pixels(
        x_ptr, dout_ptr, dx_ptr, gate, davg, dmax, peak, index,
        offs_c, whole, end, channels, pixels, stride_xo, stride_doo, inner,
        HAS_DOUT, MAX, False, ALIGN, CHANNELS_LAST, BLOCK_P * STEPS, BLOCK_C,
    )  # fmt: skip


def channel_gate_backward(dout: torch.Tensor, x: torch.Tensor, config: ChannelGateConfig | None = None) -> torch.Tensor:
    """Launch the gradient of the gate.

    Args:
        dout: gradient of the output, any strides.
        x, config: as in the forward.

    Returns:
        dgate (B, C) in the accumulators' dtype.
    """
    channels_last = x.stride(1) < x.stride(3)
    x, x_strides = addressable(x, channels_last)
    dout, dout_strides = addressable(dout, channels_last)
    programs, n_slabs, sizes, strides, options = plan(x, x_strides + dout_strides, channels_last, config)
    dgate = torch.empty(x.shape[:2], dtype=accumulator(x), device=x.device)
    rows = dgate.numel()
    target = dgate if n_slabs == 1 else torch.empty((n_slabs, rows), dtype=dgate.dtype, device=x.device)
    _channel_gate_bwd_dgate_kernel[(programs,)](
        x, dout, target,
        *sizes, rows,
        *strides,
        **options,
    )  # fmt: skip
    if n_slabs > 1:
        _channel_gate_bwd_dgate_sum_kernel[(triton.cdiv(rows, CHANNEL_GATE_SUM_BLOCK),)](
            target, dgate,
            rows, n_slabs,
            BLOCK=CHANNEL_GATE_SUM_BLOCK,
        )  # fmt: skip
    return dgate


def channel_gate_dx(
    dout: torch.Tensor | None,
    gate: torch.Tensor | None,
    davg: torch.Tensor | None,
    dmax: torch.Tensor | None,
    x: torch.Tensor | None,
    peak: torch.Tensor | None,
    index: torch.Tensor,
    height: int,
    width: int,
    channels_last: bool,
    ties: str,
    config: ChannelGateConfig | None = None,
) -> torch.Tensor:
    """Launch the gradient of x.

    Args:
        dout: gradient of the output, any strides; None where there was none.
        gate: (B, C), with dout.
        davg, dmax: gradients of the pools (B, C), or None; one of the three is given.
        x, peak: the input and its maximum, read where there is dmax and ties is "even".
        index: what ``channel_gate_pool`` returned.
        height, width: H and W.
        channels_last: the layout of dx.
        ties, config: as in the forward.

    Returns:
        dx (B, C, H, W) in the dtype of the gradients.
    """
    like = next(grad for grad in (dout, davg, dmax) if grad is not None)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (*like.shape[:2], height, width)
    dx = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
    x_strides = dout_strides = (0, 0)
    if dout is not None:
        dout, dout_strides = addressable(dout, channels_last)
    what = "" if dmax is None else ties
    if what == "even":
        assert x is not None
        x, x_strides = addressable(x, channels_last)
    programs, _, sizes, strides, options = plan(dx, x_strides + dout_strides, channels_last, config)
    has_avg = davg is not None
    # vmap may have expanded the vectors; what is not given is not read
    gate, davg, dmax, peak, index = (
        index if one is None else one.contiguous() for one in (gate, davg, dmax, peak, index)
    )
    _channel_gate_bwd_dx_kernel[(programs,)](
        dx if x is None else x, dx if dout is None else dout, gate, davg, dmax, peak, index, dx,
        *sizes,
        *strides,
        HAS_DOUT=dout is not None, AVG=has_avg, MAX=what, **options,
    )  # fmt: skip
    return dx
