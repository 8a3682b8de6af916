"""The backward of CBAM: of its spatial half, and the gradient of x from all that depends on it."""

import torch
import triton
import triton.language as tl

from ..spatial_gate.backward import dmaps_at, weight_gradient
from ..spatial_gate.common import framed_empty, framed_position, zero_frame
from ..tiles import (
    addressable,
    is_whole,
    load_tile,
    load_tile_once,
    map_sizes,
    over_channels,
    over_pixels,
    store_tile,
    tile_offsets,
    tile_stride,
)
from ..tuning import CBAM_SUM_BLOCK, CBAM_SUM_ROWS, FRAME_BLOCK, SpatialGateConfig
from .common import cbam_plan, gated, load_channels


@triton.jit
def dot_channels(
    x_ptr, dout_ptr, gate_ptr, partials_ptr,
    spatial, offs_p, mask_p, channels, stride_outer, dout_stride_outer,
    NEEDS_GATE: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum_c gate * x * dout a pixel, and into partials sum_p spatial * x * dout of these pixels a channel."""
    shape: tl.constexpr = (BLOCK_P, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_P)
    acc = tl.zeros(shape, spatial.dtype)
    spatials = over_channels(spatial, CHANNELS_LAST)
    offs_c = tl.arange(0, BLOCK_C)
    offs = tile_offsets(offs_c, offs_p, stride_outer, ALIGN, CHANNELS_LAST)
    dout_offs = tile_offsets(offs_c, offs_p, dout_stride_outer, ALIGN, CHANNELS_LAST)
    for _ in tl.range(0, channels, BLOCK_C):
        x = load_tile(x_ptr + offs, offs_c, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST)
        dout = load_tile(dout_ptr + dout_offs, offs_c, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST)
        gates = load_channels(gate_ptr, offs_c, channels, WHOLE, CHANNELS_LAST).to(acc.dtype)
        product = x.to(acc.dtype) * dout.to(acc.dtype)
        acc += product * gates
        if NEEDS_GATE:
            tl.store(partials_ptr + offs_c, tl.sum(product * spatials, 0 if CHANNELS_LAST else 1), offs_c < channels)
        x_ptr += tile_stride(stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
        dout_ptr += tile_stride(dout_stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
        offs_c += BLOCK_C
    return tl.sum(acc, 1 if CHANNELS_LAST else 0)


@triton.jit
def dot_pixels(
    x_ptr, gate_ptr, partials_ptr,
    davg, dmax, mark, offs_p, mask_p, channels, stride_outer,
    EVEN_TIES: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Into partials, sum_p x * (davg + [c has the maximum] * dmax) of these pixels a channel."""
    # beside a peak not 0 but, as in torch.amax, NaN where its part is infinite or that of a NaN nothing equals
    davgs = over_channels(davg + dmax * 0.0 if EVEN_TIES else davg, CHANNELS_LAST)
    peak_davgs = over_channels(davg + dmax, CHANNELS_LAST)
    marks = over_channels(mark, CHANNELS_LAST)
    offs_c = tl.arange(0, BLOCK_C)
    offs = tile_offsets(offs_c, offs_p, stride_outer, ALIGN, CHANNELS_LAST)
    for _ in tl.range(0, channels, BLOCK_C):
        x = load_tile_once(x_ptr + offs, offs_c, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST)
        if EVEN_TIES:
            is_peak = gated(x, load_channels(gate_ptr, offs_c, channels, WHOLE, CHANNELS_LAST), davg.dtype) == marks
        else:
            is_peak = over_pixels(offs_c, CHANNELS_LAST) == marks
        product = x.to(davg.dtype) * tl.where(is_peak, peak_davgs, davgs)
        tl.store(partials_ptr + offs_c, tl.sum(product, 0 if CHANNELS_LAST else 1), offs_c < channels)
        x_ptr += tile_stride(stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
        offs_c += BLOCK_C


@triton.jit
def dx_tile(
    x_ptr, dout_ptr, gate_ptr, dpool_avg_ptr, dpool_max_ptr, pool_max_ptr, pool_index_ptr, dx_ptr,
    spatial, davg, dmax, mark, inverse_pixels,
    offs_p, mask_p, channels, stride_outer, dout_stride_outer, dx_stride_outer,
    OUTPUT: tl.constexpr, HAS_DOUT: tl.constexpr, HAS_DMAPS: tl.constexpr, EVEN_TIES: tl.constexpr,
    POOL_AVG: tl.constexpr, POOL_MAX: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = (dout * spatial + davg, and dmax where the maximum was) * gate (+ dout), and what the pools add."""
    shape: tl.constexpr = (BLOCK_P, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_P)
    acc_dtype: tl.constexpr = spatial.dtype
    spatials = over_channels(spatial, CHANNELS_LAST)
    davgs = over_channels(davg, CHANNELS_LAST)
    dmaxes = over_channels(dmax, CHANNELS_LAST)
    marks = over_channels(mark, CHANNELS_LAST)
    offs_c = tl.arange(0, BLOCK_C)
    offs = tile_offsets(offs_c, offs_p, stride_outer, ALIGN, CHANNELS_LAST)
    dout_offs = tile_offsets(offs_c, offs_p, dout_stride_outer, ALIGN, CHANNELS_LAST)
    dx_offs = tile_offsets(offs_c, offs_p, dx_stride_outer, ALIGN, CHANNELS_LAST)
    for _ in tl.range(0, channels, BLOCK_C):
        gates = load_channels(gate_ptr, offs_c, channels, WHOLE, CHANNELS_LAST)
        if EVEN_TIES:
            x = load_tile_once(x_ptr + offs, offs_c, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST)
            x_ptr += tile_stride(stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
        dx = tl.zeros(shape, acc_dtype) + davgs
        if HAS_DOUT:
            dout_ptrs = dout_ptr + dout_offs
            dout = load_tile_once(dout_ptrs, offs_c, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST).to(acc_dtype)
            dout_ptr += tile_stride(dout_stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
            dx += dout * spatials
        if HAS_DMAPS:
            if EVEN_TIES:
                # not dx beside a peak: as in torch.amax NaN, where its part is infinite or of a NaN nothing equals
                dx = tl.where(gated(x, gates, acc_dtype) == marks, dx + dmaxes, dx + dmaxes * 0.0)
            else:
                # not dx + where(is_peak, dmax, 0): that form converts layouts inside the loop
                dx = tl.where(over_pixels(offs_c, CHANNELS_LAST) == marks, dx + dmaxes, dx)
        dx *= gates.to(acc_dtype)
        if HAS_DOUT and OUTPUT == "residual":
            dx += dout
        if POOL_AVG:
            dmeans = load_channels(dpool_avg_ptr, offs_c, channels, WHOLE, CHANNELS_LAST)
            dx += dmeans.to(acc_dtype) * inverse_pixels
        if POOL_MAX:
            shares = load_channels(dpool_max_ptr, offs_c, channels, WHOLE, CHANNELS_LAST).to(acc_dtype)
            indices = load_channels(pool_index_ptr, offs_c, channels, WHOLE, CHANNELS_LAST)
            if EVEN_TIES:
                peaks = load_channels(pool_max_ptr, offs_c, channels, WHOLE, CHANNELS_LAST)
                shares = shares / indices.to(acc_dtype)
                dx = tl.where(x == peaks, dx + shares, dx + shares * 0.0)
            else:
                dx = tl.where(over_channels(offs_p, CHANNELS_LAST) == indices, dx + shares, dx)
        store_tile(dx_ptr + dx_offs, dx, offs_c, mask_p, channels, WHOLE, CHANNELS_LAST)
        dx_ptr += tile_stride(dx_stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
        offs_c += BLOCK_C


@triton.jit
def _cbam_bwd_dgate_kernel(
    x_ptr, dout_ptr, gate_ptr, spatial_ptr, dz_ptr, partials_ptr,
    outer, inner, height, width, n_tiles, n_parts,
    stride_xb, stride_xo, stride_dob, stride_doo,
    RADIUS: tl.constexpr, OUTPUT: tl.constexpr, NEEDS_GATE: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FRAME_BLOCK: tl.constexpr,
):  # fmt: skip
    # The gradient of the logit, or of the spatial gate itself where OUTPUT is "scale". An image has n_tiles programs,
    # and before them one that zeroes the frame of dz.
    pid = tl.program_id(0)
    image = (pid // (n_tiles + 1)).to(tl.int64)
    tile = pid % (n_tiles + 1) - 1
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    dz_ptr += image * (height + 2 * RADIUS) * (width + 2 * RADIUS)
    if tile < 0:
        zero_frame(dz_ptr, height, width, RADIUS, 1, FRAME_BLOCK)
    else:
        offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = offs_p < pixels
        if OUTPUT != "logit":
            spatial = tl.load(spatial_ptr + image * pixels + offs_p, mask=mask_p, other=0.0).to(ACC)
        if OUTPUT == "map" or OUTPUT == "logit":
            dz = tl.load(dout_ptr + image * pixels + offs_p, mask=mask_p, other=0.0).to(ACC)
        else:
            x_ptr += image * stride_xb * ALIGN
            dout_ptr += image * stride_dob * ALIGN
            gate_ptr += image * channels
            partials_ptr += (image * n_parts + tile) * channels
            if is_whole(tile, pixels, channels, BLOCK_P, BLOCK_C):
                dz = dot_channels(
                    x_ptr, dout_ptr, gate_ptr, partials_ptr,
                    spatial, offs_p, mask_p, channels, stride_xo, stride_doo,
                    NEEDS_GATE, True, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C,
                )  # fmt: skip
            else:
                dz = dot_channels(
                    x_ptr, dout_ptr, gate_ptr, partials_ptr,
                    spatial, offs_p, mask_p, channels, stride_xo, stride_doo,
                    NEEDS_GATE, False, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C,
                )  # fmt: skip
        if OUTPUT != "logit" and OUTPUT != "scale":
            dz *= spatial * (1.0 - spatial)
        tl.store(dz_ptr + framed_position(offs_p, width, RADIUS), dz.to(dz_ptr.dtype.element_ty), mask=mask_p)


@triton.jit
def _cbam_bwd_dmaps_kernel(
    x_ptr, gate_ptr, weight_ptr, dz_ptr, maps_ptr, index_ptr, dmaps_ptr, partials_ptr,
    outer, inner, height, width, n_tiles, n_parts,
    stride_xb, stride_xo, stride_wm, stride_wh, stride_ww,
    KERNEL: tl.constexpr, LANES: tl.constexpr, AVG_FIRST: tl.constexpr, EVEN_TIES: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    RADIUS: tl.constexpr = KERNEL // 2
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # x read last by dgate is still in L2
    image = (pid // n_tiles).to(tl.int64)
    tile = pid % n_tiles
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    framed = (height + 2 * RADIUS) * (width + 2 * RADIUS)
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < pixels
    davg, dmax = dmaps_at(
        dz_ptr + image * framed, weight_ptr,
        offs_p, mask_p, width, stride_wm, stride_wh, stride_ww,
        KERNEL, LANES // 2, AVG_FIRST, BLOCK_P,
    )  # fmt: skip
    davg = davg / channels
    mark = tl.load(index_ptr + image * pixels + offs_p, mask=mask_p, other=1.0)
    if EVEN_TIES:
        dmax = dmax / mark
        position = framed_position(offs_p, width, RADIUS)
        mark = tl.load(maps_ptr + image * framed * 2 + 2 * position + 1, mask=mask_p, other=0.0)
    dmaps_ptrs = dmaps_ptr + image * pixels * 3 + offs_p
    tl.store(dmaps_ptrs, davg, mask=mask_p)
    tl.store(dmaps_ptrs + pixels, dmax, mask=mask_p)
    tl.store(dmaps_ptrs + 2 * pixels, mark, mask=mask_p)
    davg = tl.where(mask_p, davg, 0.0)  # behind the last pixel may be anything, also NaN
    dmax = tl.where(mask_p, dmax, 0.0)
    if not EVEN_TIES:
        mark = mark.to(tl.int32)
    x_ptr += image * stride_xb * ALIGN
    gate_ptr += image * channels
    partials_ptr += (image * n_parts + n_parts - n_tiles + tile) * channels
    if is_whole(tile, pixels, channels, BLOCK_P, BLOCK_C):
        dot_pixels(
            x_ptr, gate_ptr, partials_ptr, davg, dmax, mark, offs_p, mask_p, channels, stride_xo,
            EVEN_TIES, True, ALIGN, CHANNELS_LAST, BLOCK_C,
        )  # fmt: skip
    else:
        dot_pixels(
            x_ptr, gate_ptr, partials_ptr, davg, dmax, mark, offs_p, mask_p, channels, stride_xo,
            EVEN_TIES, False, ALIGN, CHANNELS_LAST, BLOCK_C,
        )  # fmt: skip


@triton.jit
def _cbam_bwd_sum_kernel(
    partials_ptr, dgate_ptr,
    channels, n_parts, n_blocks,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # dgate of BLOCK channels of one image, its parts in their order
    pid = tl.program_id(0)
    image = (pid // n_blocks).to(tl.int64)
    offs_c = pid % n_blocks * BLOCK + tl.arange(0, BLOCK)
    mask_c = offs_c < channels
    row = tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, BLOCK], partials_ptr.dtype.element_ty)
    for start in tl.range(0, n_parts, ROWS):
        part = start + row
        ptrs = partials_ptr + (image * n_parts + part)[:, None] * channels + offs_c[None, :]
        acc += tl.load(ptrs, mask=(part < n_parts)[:, None] & mask_c[None, :], other=0.0)
    tl.store(dgate_ptr + image * channels + offs_c, tl.sum(acc, 0).to(dgate_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _cbam_bwd_dx_kernel(
    x_ptr, dout_ptr, gate_ptr, spatial_ptr, dmaps_ptr,
    dpool_avg_ptr, dpool_max_ptr, pool_max_ptr, pool_index_ptr, dx_ptr,
    outer, inner, height, width, n_tiles,
    stride_xb, stride_xo, stride_dob, stride_doo,
    OUTPUT: tl.constexpr, HAS_DOUT: tl.constexpr, HAS_DMAPS: tl.constexpr, EVEN_TIES: tl.constexpr,
    POOL_AVG: tl.constexpr, POOL_MAX: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)  # dout has been read before x, so that nothing of it is left in L2
    image = (pid // n_tiles).to(tl.int64)
    tile = pid % n_tiles
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < pixels
    spatial = tl.zeros([BLOCK_P], ACC)
    davg = tl.zeros([BLOCK_P], ACC)
    dmax = tl.zeros([BLOCK_P], ACC)
    mark = tl.zeros([BLOCK_P], ACC)
    if HAS_DOUT:
        spatial = tl.load(spatial_ptr + image * pixels + offs_p, mask=mask_p, other=0.0)
    if HAS_DMAPS:
        dmaps_ptrs = dmaps_ptr + image * pixels * 3 + offs_p
        davg = tl.load(dmaps_ptrs, mask=mask_p, other=0.0)
        dmax = tl.load(dmaps_ptrs + pixels, mask=mask_p, other=0.0)
        mark = tl.load(dmaps_ptrs + 2 * pixels, mask=mask_p, other=0.0)
    if not EVEN_TIES:
        mark = mark.to(tl.int32)
    x_ptr += image * stride_xb * ALIGN
    dout_ptr += image * stride_dob * ALIGN
    dx_ptr += image * channels * pixels
    row = image * channels
    inverse_pixels = tl.full([], 1.0, ACC) / pixels  # one division, not one a channel
    if is_whole(tile, pixels, channels, BLOCK_P, BLOCK_C):
        dx_tile(
            x_ptr, dout_ptr, gate_ptr + row, dpool_avg_ptr + row, dpool_max_ptr + row, pool_max_ptr + row,
            pool_index_ptr + row, dx_ptr,
            spatial, davg, dmax, mark, inverse_pixels, offs_p, mask_p, channels, stride_xo, stride_doo, inner,
            OUTPUT, HAS_DOUT, HAS_DMAPS, EVEN_TIES, POOL_AVG, POOL_MAX, True,
            ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C,
        )  # fmt: skip
    else:
        dx_tile(
            x_ptr, dout_ptr, gate_ptr + row, dpool_avg_ptr + row, dpool_max_ptr + row, pool_max_ptr + row,
            pool_index_ptr + row, dx_ptr,
            spatial, davg, dmax, mark, inverse_pixels, offs_p, mask_p, channels, stride_xo, stride_doo, inner,
            OUTPUT, HAS_DOUT, HAS_DMAPS, EVEN_TIES, POOL_AVG, POOL_MAX, False,
            ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C,
        )  # fmt: skip


def cbam_scale_backward(
    dout: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, spatial: torch.Tensor,
    config: SpatialGateConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch the gradients of ``cbam_scale`` for gate (B, C) and spatial (B, 1, H, W), in their dtypes."""
    channels_last = x.stride(1) < x.stride(3)
    dspatial = torch.empty_like(spatial, memory_format=torch.contiguous_format)
    partials = _dgate(dout, x, gate, spatial.contiguous(), dspatial, 0, "scale", True, 1, channels_last, config)
    return _sum(partials, gate), dspatial


def cbam_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    spatial: torch.Tensor,
    maps: torch.Tensor,
    index: torch.Tensor,
    order: str,
    output: str,
    ties: str,
    needs_gates: bool,
    needs_dweight: bool,
    config: SpatialGateConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the backward of the spatial half but for dx, which ``cbam_dx`` finishes.

    Args:
        dout: gradient of out, any strides.
        x, gate, weight, order, output, ties, config: as in the forward.
        spatial, maps, index: what the forward kept.
        needs_gates, needs_dweight: which gradients to compute.

    Returns:
        dgate (B, C) in gate's dtype; dmaps (B, 3, H, W): davg / C, the dmax of each maximum, and who has it, the index
        of the first or for ties "even" the maximum itself; dweight with the strides of weight, dbias (1,). What is not
        needed is empty, (0,).
    """
    batch, channels, height, width = x.shape
    kernel = weight.shape[-1]
    channels_last = x.stride(1) < x.stride(3)
    gate, spatial, maps, index = (tensor.contiguous() for tensor in (gate, spatial, maps, index))  # after vmap
    parts = 2 if output in ("gated", "residual") else 1
    dz = framed_empty(x, batch, height, width, kernel, 1)
    partials = _dgate(dout, x, gate, spatial, dz, kernel // 2, output, needs_gates, parts, channels_last, config)
    dgate, dmaps = gate.new_empty(0), spatial.new_empty(0)
    dweight, dbias = weight.new_empty(0), weight.new_empty(0)
    if needs_gates:
        dmaps = torch.empty((batch, 3, height, width), dtype=dz.dtype, device=x.device)
        x, strides = addressable(x, channels_last)
        sizes, strides, options = cbam_plan(x, channels, height, width, strides, channels_last, config)
        _cbam_bwd_dmaps_kernel[(batch * sizes[-1],)](
            x, gate, weight, dz, maps, index, dmaps, partials,
            *sizes, partials.shape[1],
            *strides, *weight.stride()[1:],
            KERNEL=kernel, LANES=triton.next_power_of_2(2 * kernel + 1), AVG_FIRST=order == "avg_max",
            EVEN_TIES=ties == "even", **options,
        )  # fmt: skip
        dgate = _sum(partials, gate)
    if needs_dweight:
        dweight, dbias = weight_gradient(dz, maps, weight, order)
    return dgate, dmaps, dweight, dbias


def cbam_dx(
    dout: torch.Tensor | None,
    gate: torch.Tensor,
    spatial: torch.Tensor | None,
    dmaps: torch.Tensor | None,
    dpool_avg: torch.Tensor | None,
    dpool_max: torch.Tensor | None,
    pool_index: torch.Tensor,
    pool_max: torch.Tensor | None,
    x: torch.Tensor | None,
    height: int,
    width: int,
    channels_last: bool,
    output: str,
    ties: str,
    config: SpatialGateConfig | None = None,
) -> torch.Tensor:
    """Launch the gradient of x from everything that depends on it, in one pass.

    Args:
        dout: gradient of the gated output, any strides; None where there is none.
        gate: (B, C), the channel gate.
        spatial: (B, 1, H, W); None without dout.
        dmaps: from ``cbam_backward``, or None.
        dpool_avg, dpool_max: (B, C), gradients of the channel gate's pools, or None.
        pool_index: (B, C), the first pixel of each maximum, or for ties "even" how many there are.
        pool_max: (B, C), the maxima themselves, and x: for ties "even" alone.
        height, width: x's.
        channels_last: the layout of dx.
        output, ties, config: as in the forward.

    Returns:
        dx (B, C, H, W) in gate's dtype.
    """
    batch, channels = gate.shape
    acc = torch.float64 if gate.dtype == torch.float64 else torch.float32
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    size = (batch, channels, height, width)
    dx = torch.empty(size, dtype=gate.dtype, device=gate.device, memory_format=memory_format)
    reads_x = ties == "even"
    x_strides = dout_strides = (0, 0)
    if reads_x:
        x, x_strides = addressable(x, channels_last)
    if dout is not None:
        dout, dout_strides = addressable(dout, channels_last)
    strides = x_strides + dout_strides
    sizes, strides, options = cbam_plan(dx, channels, height, width, strides, channels_last, config)
    small = [gate, spatial, dmaps, dpool_avg, dpool_max, pool_max, pool_index]
    small = [dx if tensor is None else tensor.contiguous() for tensor in small]  # dx: never read then
    _cbam_bwd_dx_kernel[(batch * sizes[-1],)](
        x if reads_x else dx, dx if dout is None else dout, *small, dx,
        *sizes,
        *strides,
        OUTPUT=output, HAS_DOUT=dout is not None, HAS_DMAPS=dmaps is not None, EVEN_TIES=reads_x,
        POOL_AVG=dpool_avg is not None, POOL_MAX=dpool_max is not None,
        ACC=tl.float64 if acc == torch.float64 else tl.float32, **options,
    )  # fmt: skip
    return dx


def _dgate(
    dout: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, spatial: torch.Tensor, dz: torch.Tensor,
    radius: int, output: str, needs_gate: bool, parts: int, channels_last: bool, config: SpatialGateConfig | None,
) -> torch.Tensor:  # fmt: skip
    """Fill dz, and return room for parts of dgate (B, parts of every tile, C), of which the first are filled."""
    batch, channels, height, width = x.shape
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_strides = dout_strides = (0, 0)
    if output in ("map", "logit"):
        dout = dout.contiguous()
    else:
        x, x_strides = addressable(x, channels_last)
        dout, dout_strides = addressable(dout, channels_last)
    strides = x_strides + dout_strides
    sizes, strides, options = cbam_plan(x, channels, height, width, strides, channels_last, config)
    n_tiles = sizes[-1]
    shape = (batch, parts * n_tiles, channels)
    partials = torch.empty(shape if needs_gate else (0, 0, 0), dtype=acc, device=x.device)
    _cbam_bwd_dgate_kernel[(batch * (n_tiles + 1),)](
        x, dout, gate.contiguous(), spatial, dz, partials,
        *sizes, parts * n_tiles,
        *strides,
        RADIUS=radius, OUTPUT=output, NEEDS_GATE=needs_gate,
        ACC=tl.float64 if acc == torch.float64 else tl.float32, FRAME_BLOCK=FRAME_BLOCK, **options,
    )  # fmt: skip
    return partials


def _sum(partials: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    batch, n_parts, channels = partials.shape
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    n_blocks = triton.cdiv(channels, CBAM_SUM_BLOCK)
    _cbam_bwd_sum_kernel[(batch * n_blocks,)](
        partials, dgate,
        channels, n_parts, n_blocks,
        ROWS=CBAM_SUM_ROWS, BLOCK=CBAM_SUM_BLOCK,
    )  # fmt: skip
    return dgate
