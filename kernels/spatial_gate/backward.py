"""The spatial gate's backward."""

import torch
import triton
import triton.language as tl

from ..tiles import (
    addressable,
    is_whole,
    load_tile,
    load_tile_once,
    map_sizes,
    over_channels,
    over_pixels,
    store_tile,
    tile_mask,
    tile_offsets,
    tile_stride,
)
from ..tuning import DWEIGHT_BLOCK, DWEIGHT_MAX_SLABS, DWEIGHT_SLAB_BLOCKS, FRAME_BLOCK, SpatialGateConfig
from .common import NO_INDEX, framed_empty, framed_position, plan, zero_frame


@triton.jit
def dgate_tile(
    x_ptr, dout_ptr, maps_ptr, gate_ptr, dz_ptr, index_ptr,
    tile, pixels, channels, width, stride_outer, dout_stride_outer,
    RADIUS: tl.constexpr, OUTPUT: tl.constexpr, EVEN_TIES: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The gradient of the logit, and from the same read of x the first index of the maximum (how many, EVEN_TIES)."""
    axis: tl.constexpr = 1 if CHANNELS_LAST else 0
    acc_dtype: tl.constexpr = maps_ptr.dtype.element_ty
    scaled: tl.constexpr = OUTPUT == "gated" or OUTPUT == "residual"
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < pixels
    position = framed_position(offs_p, width, RADIUS)
    if scaled or EVEN_TIES:
        peak = tl.load(maps_ptr + 2 * position + 1, mask=mask_p, other=0.0)
        if is_whole(tile, pixels, channels, BLOCK_P, BLOCK_C * STEPS):
            acc, index = dgate_channels(
                x_ptr, dout_ptr, peak, offs_p, mask_p, channels, stride_outer, dout_stride_outer,
                scaled, EVEN_TIES, True, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C, STEPS,
            )  # fmt: skip
        else:
            acc, index = dgate_channels(
                x_ptr, dout_ptr, peak, offs_p, mask_p, channels, stride_outer, dout_stride_outer,
                scaled, EVEN_TIES, False, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C, STEPS,
            )  # fmt: skip
        if EVEN_TIES:
            tl.store(index_ptr + offs_p, tl.sum(index, axis).to(tl.int32), mask=mask_p)
        else:
            tl.store(index_ptr + offs_p, tl.min(index, axis), mask=mask_p)
    if scaled:
        dgate = tl.sum(acc, axis)
    else:
        dgate = tl.load(dout_ptr + offs_p, mask=mask_p, other=0.0).to(acc_dtype)
    if OUTPUT == "logit":
        dz = dgate
    else:
        gate = tl.load(gate_ptr + offs_p, mask=mask_p, other=0.0)
        dz = dgate * gate * (1.0 - gate)
    tl.store(dz_ptr + position, dz, mask=mask_p)


@triton.jit
def dgate_channels(
    x_ptr, dout_ptr, peak, offs_p, mask_p, channels, stride_outer, dout_stride_outer,
    SCALED: tl.constexpr, EVEN_TIES: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Sums of x * dout, and indices or numbers of maxima, over every BLOCK_C-th channel, one tile of each."""
    shape: tl.constexpr = (BLOCK_P, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_P)
    peaks = over_channels(peak, CHANNELS_LAST)
    acc = tl.zeros(shape, peak.dtype)
    if EVEN_TIES:
        index = tl.zeros(shape, peak.dtype)
    else:
        index = tl.full(shape, NO_INDEX, tl.int32)
    offs_c = tl.arange(0, BLOCK_C)
    offs = tile_offsets(offs_c, offs_p, stride_outer, ALIGN, CHANNELS_LAST)
    stride = tile_stride(stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
    dout_offs = tile_offsets(offs_c, offs_p, dout_stride_outer, ALIGN, CHANNELS_LAST)
    dout_stride = tile_stride(dout_stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
    for start in tl.range(0, channels, BLOCK_C * STEPS):  # all loads come before the first use
        c0 = start + offs_c
        x0 = load_tile_once(x_ptr + offs, c0, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST)
        dout0 = x0
        if SCALED:
            dout0 = load_tile(dout_ptr + dout_offs, c0, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST)
        if STEPS >= 2:
            c1 = start + offs_c + 1 * BLOCK_C
            x1 = load_tile_once(x_ptr + 1 * stride + offs, c1, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST)
            dout1 = x1
            if SCALED:
                dout1 = load_tile(
                    dout_ptr + 1 * dout_stride + dout_offs, c1, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST
                )
        if STEPS == 4:
            c2 = start + offs_c + 2 * BLOCK_C
            x2 = load_tile_once(x_ptr + 2 * stride + offs, c2, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST)
            dout2 = x2
            if SCALED:
                dout2 = load_tile(
                    dout_ptr + 2 * dout_stride + dout_offs, c2, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST
                )
            c3 = start + offs_c + 3 * BLOCK_C
            x3 = load_tile_once(x_ptr + 3 * stride + offs, c3, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST)
            dout3 = x3
            if SCALED:
                dout3 = load_tile(
                    dout_ptr + 3 * dout_stride + dout_offs, c3, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST
                )
        acc, index = dgate_step(
            x0, dout0, peaks, c0, mask_p, channels, acc, index, SCALED, EVEN_TIES, WHOLE, CHANNELS_LAST
        )
        if STEPS >= 2:
            acc, index = dgate_step(
                x1, dout1, peaks, c1, mask_p, channels, acc, index, SCALED, EVEN_TIES, WHOLE, CHANNELS_LAST
            )
        if STEPS == 4:
            acc, index = dgate_step(
                x2, dout2, peaks, c2, mask_p, channels, acc, index, SCALED, EVEN_TIES, WHOLE, CHANNELS_LAST
            )
            acc, index = dgate_step(
                x3, dout3, peaks, c3, mask_p, channels, acc, index, SCALED, EVEN_TIES, WHOLE, CHANNELS_LAST
            )
        x_ptr += STEPS * stride
        if SCALED:
            dout_ptr += STEPS * dout_stride
    return acc, index


@triton.jit
def dgate_step(
    x, dout, peaks, offs_c, mask_p, channels, acc, index,
    SCALED: tl.constexpr, EVEN_TIES: tl.constexpr, WHOLE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    x = x.to(acc.dtype)
    if SCALED:
        acc += x * dout.to(acc.dtype)
    is_peak = x == peaks
    if not WHOLE:
        is_peak &= tile_mask(offs_c, mask_p, channels, CHANNELS_LAST)
    if EVEN_TIES:
        index += is_peak.to(acc.dtype)
    else:
        index = tl.minimum(index, tl.where(is_peak, over_pixels(offs_c, CHANNELS_LAST), NO_INDEX))
    return acc, index


@triton.jit
def dmaps_at(
    dz_ptr, weight_ptr,
    offs_p, mask_p, width, stride_wm, stride_wh, stride_ww,
    KERNEL: tl.constexpr, LANES: tl.constexpr, AVG_FIRST: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradients of both maps at pixels of one image: dz convolved with the flipped weight."""
    acc_dtype: tl.constexpr = dz_ptr.dtype.element_ty
    lane = tl.arange(0, LANES)
    in_row = lane < KERNEL
    framed_width = width + 2 * (KERNEL // 2)
    row = offs_p // width
    top_left = tl.where(mask_p, row * framed_width + offs_p - row * width, 0)
    ptrs = dz_ptr + top_left[:, None] + lane[None, :]  # [BLOCK_P, LANES]
    avg_ptrs = weight_ptr + (0 if AVG_FIRST else stride_wm) + (KERNEL - 1 - lane) * stride_ww
    max_ptrs = weight_ptr + (stride_wm if AVG_FIRST else 0) + (KERNEL - 1 - lane) * stride_ww
    davg = tl.zeros([BLOCK_P, LANES], acc_dtype)
    dmax = tl.zeros([BLOCK_P, LANES], acc_dtype)
    for dh in tl.range(KERNEL):
        dz = tl.load(ptrs, mask=in_row[None, :], other=0.0)
        ptrs += framed_width
        flipped = (KERNEL - 1 - dh) * stride_wh
        davg += dz * tl.load(avg_ptrs + flipped, mask=in_row, other=0.0).to(acc_dtype)[None, :]
        dmax += dz * tl.load(max_ptrs + flipped, mask=in_row, other=0.0).to(acc_dtype)[None, :]
    return tl.sum(davg, 1), tl.sum(dmax, 1)


@triton.jit
def dx_tile(
    x_ptr, dout_ptr, maps_ptr, gate_ptr, index_ptr, dx_ptr,
    davg, dmax, offs_p, mask_p, channels, width, stride_outer, dout_stride_outer, dx_stride_outer,
    RADIUS: tl.constexpr, OUTPUT: tl.constexpr, EVEN_TIES: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = dout * gate (+ dout) + davg / channels, and dmax where the maximum was."""
    shape: tl.constexpr = (BLOCK_P, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_P)
    acc_dtype: tl.constexpr = gate_ptr.dtype.element_ty
    scaled: tl.constexpr = OUTPUT == "gated" or OUTPUT == "residual"
    index = tl.load(index_ptr + offs_p, mask=mask_p, other=-1)
    if EVEN_TIES:
        peaks = over_channels(
            tl.load(maps_ptr + 2 * framed_position(offs_p, width, RADIUS) + 1, mask=mask_p, other=0.0), CHANNELS_LAST
        )
        dmax = dmax / index.to(acc_dtype)
        davg = tl.where(index == 0, float("nan"), davg)  # nothing equals a NaN maximum: 0 parts are NaN everywhere
    davgs = over_channels(davg / channels, CHANNELS_LAST)
    dmaxes = over_channels(dmax, CHANNELS_LAST)
    indices = over_channels(index, CHANNELS_LAST)
    if scaled:
        gates = over_channels(tl.load(gate_ptr + offs_p, mask=mask_p, other=0.0), CHANNELS_LAST)
    offs_c = tl.arange(0, BLOCK_C)
    offs = tile_offsets(offs_c, offs_p, stride_outer, ALIGN, CHANNELS_LAST)
    dout_offs = tile_offsets(offs_c, offs_p, dout_stride_outer, ALIGN, CHANNELS_LAST)
    dx_offs = tile_offsets(offs_c, offs_p, dx_stride_outer, ALIGN, CHANNELS_LAST)
    for _ in tl.range(0, channels, BLOCK_C):
        dx = tl.zeros(shape, acc_dtype) + davgs
        if scaled:
            dout_ptrs = dout_ptr + dout_offs
            dout = load_tile_once(dout_ptrs, offs_c, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST).to(acc_dtype)
            dout_ptr += tile_stride(dout_stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
            dx += dout * gates
            if OUTPUT == "residual":
                dx += dout
        if EVEN_TIES:
            x = load_tile_once(x_ptr + offs, offs_c, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST)
            x_ptr += tile_stride(stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
            is_peak = x.to(acc_dtype) == peaks
        else:
            is_peak = over_pixels(offs_c, CHANNELS_LAST) == indices
        # not dx + where(is_peak, dmax, 0): that form converts layouts inside the loop
        dx = tl.where(is_peak, dx + dmaxes, dx)
        store_tile(dx_ptr + dx_offs, dx, offs_c, mask_p, channels, WHOLE, CHANNELS_LAST)
        dx_ptr += tile_stride(dx_stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
        offs_c += BLOCK_C


@triton.jit
def _spatial_gate_bwd_dgate_kernel(
    x_ptr, dout_ptr, maps_ptr, gate_ptr, dz_ptr, index_ptr,
    outer, inner, height, width, n_tiles,
    stride_xb, stride_xo, stride_dob, stride_doo,
    RADIUS: tl.constexpr, OUTPUT: tl.constexpr, EVEN_TIES: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr, FRAME_BLOCK: tl.constexpr,
):  # fmt: skip
    # an image has n_tiles programs, and before them one that zeroes the frame of dz
    pid = tl.program_id(0)
    image = (pid // (n_tiles + 1)).to(tl.int64)
    tile = pid % (n_tiles + 1) - 1
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    framed = (height + 2 * RADIUS) * (width + 2 * RADIUS)
    scaled: tl.constexpr = OUTPUT == "gated" or OUTPUT == "residual"
    if scaled:
        dout_ptr += image * stride_dob * ALIGN
    else:
        dout_ptr += image * pixels
    if tile < 0:
        zero_frame(dz_ptr + image * framed, height, width, RADIUS, 1, FRAME_BLOCK)
    else:
        dgate_tile(
            x_ptr + image * stride_xb * ALIGN, dout_ptr, maps_ptr + image * framed * 2,
            gate_ptr + image * pixels, dz_ptr + image * framed, index_ptr + image * pixels,
            tile, pixels, channels, width, stride_xo, stride_doo,
            RADIUS, OUTPUT, EVEN_TIES, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C, STEPS,
        )  # fmt: skip


@triton.jit
def _spatial_gate_bwd_dx_kernel(
    x_ptr, dout_ptr, maps_ptr, gate_ptr, weight_ptr, dz_ptr, index_ptr, dx_ptr,
    outer, inner, height, width, n_tiles,
    stride_xb, stride_xo, stride_dob, stride_doo, stride_wm, stride_wh, stride_ww,
    KERNEL: tl.constexpr, LANES: tl.constexpr, AVG_FIRST: tl.constexpr, OUTPUT: tl.constexpr, EVEN_TIES: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    RADIUS: tl.constexpr = KERNEL // 2
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # dout read last by dgate is still in L2
    image = (pid // n_tiles).to(tl.int64)
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    framed = (height + 2 * RADIUS) * (width + 2 * RADIUS)
    tile = pid % n_tiles
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < pixels
    davg, dmax = dmaps_at(
        dz_ptr + image * framed, weight_ptr,
        offs_p, mask_p, width, stride_wm, stride_wh, stride_ww,
        KERNEL, LANES // 2, AVG_FIRST, BLOCK_P,
    )  # fmt: skip
    if is_whole(tile, pixels, channels, BLOCK_P, BLOCK_C * STEPS):
        dx_tile(
            x_ptr + image * stride_xb * ALIGN, dout_ptr + image * stride_dob * ALIGN,
            maps_ptr + image * framed * 2, gate_ptr + image * pixels, index_ptr + image * pixels,
            dx_ptr + image * channels * pixels,
            davg, dmax, offs_p, mask_p, channels, width, stride_xo, stride_doo, inner,
            RADIUS, OUTPUT, EVEN_TIES, True, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C * STEPS,
        )  # fmt: skip
    else:
        dx_tile(
            x_ptr + image * stride_xb * ALIGN, dout_ptr + image * stride_dob * ALIGN,
            maps_ptr + image * framed * 2, gate_ptr + image * pixels, index_ptr + image * pixels,
            dx_ptr + image * channels * pixels,
            davg, dmax, offs_p, mask_p, channels, width, stride_xo, stride_doo, inner,
            RADIUS, OUTPUT, EVEN_TIES, False, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C * STEPS,
        )  # fmt: skip


@triton.jit
def _spatial_gate_bwd_lagged_kernel(
    x_ptr, dout_ptr, maps_ptr, gate_ptr, weight_ptr, dz_ptr, index_ptr, dx_ptr, counters_ptr,
    outer, inner, height, width, n_tiles, n_tickets, lag,
    stride_xb, stride_xo, stride_dob, stride_doo, stride_wm, stride_wh, stride_ww,
    KERNEL: tl.constexpr, LANES: tl.constexpr, AVG_FIRST: tl.constexpr, OUTPUT: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr, FRAME_BLOCK: tl.constexpr,
):  # fmt: skip
    # tickets as in the forward: dgate of tile t, then dx of tile t - lag, whose dout is still in L2
    RADIUS: tl.constexpr = KERNEL // 2
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    framed = (height + 2 * RADIUS) * (width + 2 * RADIUS)
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    if ticket < n_tickets:
        image = (ticket // (n_tiles + 1)).to(tl.int64)
        tile = ticket % (n_tiles + 1) - 1
        if tile < 0:
            zero_frame(dz_ptr + image * framed, height, width, RADIUS, 1, FRAME_BLOCK)
        else:
            dgate_tile(
                x_ptr + image * stride_xb * ALIGN, dout_ptr + image * stride_dob * ALIGN,
                maps_ptr + image * framed * 2, gate_ptr + image * pixels,
                dz_ptr + image * framed, index_ptr + image * pixels,
                tile, pixels, channels, width, stride_xo, stride_doo,
                RADIUS, OUTPUT, False, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C, STEPS,
            )  # fmt: skip
        tl.debug_barrier()
        tl.atomic_add(counters_ptr + 1 + image, 1, sem="release")
    late = ticket - lag
    if late >= 0:
        image = (late // (n_tiles + 1)).to(tl.int64)
        tile = late % (n_tiles + 1) - 1
        if tile >= 0:
            offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
            mask_p = offs_p < pixels
            while tl.atomic_add(counters_ptr + 1 + image, 0, sem="acquire") <= n_tiles:
                pass
            davg, dmax = dmaps_at(
                dz_ptr + image * framed, weight_ptr,
                offs_p, mask_p, width, stride_wm, stride_wh, stride_ww,
                KERNEL, LANES // 2, AVG_FIRST, BLOCK_P,
            )  # fmt: skip
            if is_whole(tile, pixels, channels, BLOCK_P, BLOCK_C * STEPS):
                dx_tile(
                    x_ptr, dout_ptr + image * stride_dob * ALIGN,
                    maps_ptr, gate_ptr + image * pixels, index_ptr + image * pixels, dx_ptr + image * channels * pixels,
                    davg, dmax, offs_p, mask_p, channels, width, stride_xo, stride_doo, inner,
                    RADIUS, OUTPUT, False, True, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C * STEPS,
                )  # fmt: skip
            else:
                dx_tile(
                    x_ptr, dout_ptr + image * stride_dob * ALIGN,
                    maps_ptr, gate_ptr + image * pixels, index_ptr + image * pixels, dx_ptr + image * channels * pixels,
                    davg, dmax, offs_p, mask_p, channels, width, stride_xo, stride_doo, inner,
                    RADIUS, OUTPUT, False, False, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C * STEPS,
                )  # fmt: skip


@triton.jit
def _spatial_gate_bwd_dweight_kernel(
    dz_ptr, maps_ptr, partials_ptr,
    n_blocks, n_row_blocks, height, width, n_slabs,
    KERNEL: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program a slab of all blocks of pixel rows and a kernel row; slabs are fixed, so the sum is deterministic
    RADIUS: tl.constexpr = KERNEL // 2
    pid = tl.program_id(0)
    dh = pid % KERNEL
    framed_width = width + 2 * RADIUS
    lane = tl.arange(0, LANES)
    acc = tl.zeros([BLOCK, LANES], dz_ptr.dtype.element_ty)
    for block in tl.range(pid // KERNEL, n_blocks, n_slabs):
        row = block // n_row_blocks
        column = (block - row * n_row_blocks) * BLOCK + tl.arange(0, BLOCK)
        framed_row = row + (row // height).to(tl.int64) * (2 * RADIUS)  # the frames of the images before lie between
        is_pixel = column < width
        dz_row = dz_ptr + (framed_row + RADIUS) * framed_width + RADIUS
        dz = tl.load(dz_row + column, mask=is_pixel, other=0.0)
        # lanes behind the row read 1: the first of them sums dz, which is the gradient of the bias
        maps_row = maps_ptr + 2 * (framed_row + dh) * framed_width
        mask = is_pixel[:, None] & (lane < 2 * KERNEL)[None, :]
        maps = tl.load(maps_row + 2 * column[:, None] + lane[None, :], mask=mask, other=1.0)
        acc += dz[:, None] * maps  # [BLOCK, LANES]
    tl.store(partials_ptr + pid * LANES + lane, tl.sum(acc, 0))


@triton.jit
def _spatial_gate_bwd_dweight_sum_kernel(
    partials_ptr, dweight_ptr, dbias_ptr,
    stride_wm, stride_wh, stride_ww,
    KERNEL: tl.constexpr, LANES: tl.constexpr, AVG_FIRST: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    dh = tl.program_id(0)
    lane = tl.arange(0, LANES)
    slab = tl.arange(0, SLABS)
    total = tl.sum(tl.load(partials_ptr + (slab[:, None] * KERNEL + dh) * LANES + lane[None, :]), 0)
    is_max = lane % 2
    offs = (is_max if AVG_FIRST else 1 - is_max) * stride_wm + dh * stride_wh + lane // 2 * stride_ww
    tl.store(dweight_ptr + offs, total.to(dweight_ptr.dtype.element_ty), mask=lane < 2 * KERNEL)
    if dh == 0:
        tl.store(dbias_ptr + lane * 0, total.to(dbias_ptr.dtype.element_ty), mask=lane == 2 * KERNEL)


def weight_gradient(
    dz: torch.Tensor, maps: torch.Tensor, weight: torch.Tensor, order: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the sums over pixels that are dweight, with the strides of weight, and dbias (1,).

    Args:
        dz: (B, H + k - 1, W + k - 1, 1), framed.
        maps: (B, H + k - 1, W + k - 1, 2), framed.
        weight, order: as in the forward.
    """
    kernel = weight.shape[-1]
    lanes = triton.next_power_of_2(2 * kernel + 1)
    batch, height, width = (size - frame for size, frame in zip(dz.shape, (0, kernel - 1, kernel - 1), strict=False))
    block = min(DWEIGHT_BLOCK, triton.next_power_of_2(width))
    n_row_blocks = triton.cdiv(width, block)
    n_blocks = batch * height * n_row_blocks
    slabs = min(DWEIGHT_MAX_SLABS, triton.next_power_of_2(triton.cdiv(n_blocks, DWEIGHT_SLAB_BLOCKS)))
    partials = torch.empty((slabs, kernel, lanes), dtype=dz.dtype, device=dz.device)
    dweight = torch.empty_like(weight)
    dbias = torch.empty(1, dtype=weight.dtype, device=weight.device)
    _spatial_gate_bwd_dweight_kernel[(slabs * kernel,)](
        dz, maps, partials,
        n_blocks, n_row_blocks, height, width, slabs,
        KERNEL=kernel, LANES=lanes, BLOCK=block, num_warps=4 if block > 16 else 1,
    )  # fmt: skip
    _spatial_gate_bwd_dweight_sum_kernel[(kernel,)](
        partials, dweight, dbias,
        *dweight.stride()[1:],
        KERNEL=kernel, LANES=lanes, AVG_FIRST=order == "avg_max", SLABS=slabs,
    )  # fmt: skip
    return dweight, dbias


def spatial_gate_backward(
    dout: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    gate: torch.Tensor,
    maps: torch.Tensor,
    index: torch.Tensor,
    channels: int,
    channels_last: bool,
    order: str,
    output: str,
    ties: str,
    needs_dx: bool,
    needs_dweight: bool,
    config: SpatialGateConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the backward.

    Args:
        dout: gradient of out, any strides.
        x: the input; None for "map" and "logit" with ties="first", which do not read it.
        weight, order, output, ties, config: as in the forward.
        gate, maps, index: what the forward kept.
        channels: C.
        channels_last: the layout of dx.
        needs_dx, needs_dweight: which gradients to compute.

    Returns:
        dx (B, C, H, W), dweight with the strides of weight, dbias (1,); what is not needed is empty, (0,).
    """
    batch, _, height, width = gate.shape
    kernel = weight.shape[-1]
    gate, maps, index = gate.contiguous(), maps.contiguous(), index.contiguous()  # vmap may have expanded them
    scaled = output in ("gated", "residual")
    even_ties = ties == "even"
    reads_x = scaled or even_ties
    x_strides = dout_strides = (0, 0)
    if reads_x:
        x, x_strides = addressable(x, channels_last)
    if scaled:
        dout, dout_strides = addressable(dout, channels_last)
    else:
        dout = dout.contiguous()
    strides = x_strides + dout_strides
    config, sizes, strides, options = plan(dout, channels, height, width, strides, channels_last, config)
    n_tiles = sizes[-1]
    x = dout if x is None else x  # never read then
    if reads_x:
        index = torch.empty(gate.shape, dtype=torch.int32, device=dout.device)
    dz = framed_empty(dout, batch, height, width, kernel, 1)
    dx, dweight, dbias = (torch.empty(0, dtype=like.dtype, device=dout.device) for like in (dout, weight, weight))
    if needs_dx:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        shape = (batch, channels, height, width)
        dx = torch.empty(shape, dtype=dout.dtype, device=dout.device, memory_format=memory_format)

    gate_options = {
        "KERNEL": kernel,
        "LANES": triton.next_power_of_2(2 * kernel + 1),
        "AVG_FIRST": order == "avg_max",
    }
    if needs_dx and scaled and not even_ties and n_tiles <= config.lag:
        n_tickets = batch * (n_tiles + 1)
        counters = torch.zeros(1 + batch, dtype=torch.int32, device=dout.device)
        _spatial_gate_bwd_lagged_kernel[(n_tickets + config.lag,)](
            x, dout, maps, gate, weight, dz, index, dx, counters,
            *sizes, n_tickets, config.lag,
            *strides, *weight.stride()[1:],
            **gate_options, OUTPUT=output, FRAME_BLOCK=FRAME_BLOCK, **options,
        )  # fmt: skip
    else:
        ties_options = {"OUTPUT": output, "EVEN_TIES": even_ties}
        _spatial_gate_bwd_dgate_kernel[(batch * (n_tiles + 1),)](
            x, dout, maps, gate, dz, index,
            *sizes,
            *strides,
            RADIUS=kernel // 2, FRAME_BLOCK=FRAME_BLOCK, **ties_options, **options,
        )  # fmt: skip
        if needs_dx:
            _spatial_gate_bwd_dx_kernel[(batch * n_tiles,)](
                x, dout, maps, gate, weight, dz, index, dx,
                *sizes,
                *strides, *weight.stride()[1:],
                **gate_options, **ties_options, **options,
            )  # fmt: skip
    if needs_dweight:
        dweight, dbias = weight_gradient(dz, maps, weight, order)
    return dx, dweight, dbias
