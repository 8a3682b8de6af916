"""The forward of CBAM's spatial half."""

import torch
import triton
import triton.language as tl

from ..spatial_gate.common import NO_INDEX, framed_empty, framed_position, sigmoid, zero_frame
from ..spatial_gate.forward import logit_at, pool_step
from ..tiles import (
    addressable,
    is_whole,
    load_tile,
    load_tile_once,
    map_sizes,
    max_keep_nan,
    over_channels,
    store_tile,
    tile_mask,
    tile_offsets,
    tile_stride,
)
from ..tuning import FRAME_BLOCK, SpatialGateConfig
from .common import cbam_plan, gated, load_channels


@triton.jit
def pool_gated_channels(
    x_ptr, gate_ptr, offs_p, mask_p, channels, stride_outer,
    KEEP: tl.constexpr, EVEN_TIES: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums and maxima of y over every BLOCK_C-th channel, and their first indices (EVEN_TIES: how many there are)."""
    shape: tl.constexpr = (BLOCK_P, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_P)
    total = tl.zeros(shape, ACC)
    largest = tl.full(shape, float("-inf"), ACC)
    index = tl.full(shape, 0 if EVEN_TIES else NO_INDEX, tl.int32)
    offs_c = tl.arange(0, BLOCK_C)
    offs = tile_offsets(offs_c, offs_p, stride_outer, ALIGN, CHANNELS_LAST)
    for _ in tl.range(0, channels, BLOCK_C):
        x = load_tile(x_ptr + offs, offs_c, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST)
        y = gated(x, load_channels(gate_ptr, offs_c, channels, WHOLE, CHANNELS_LAST), ACC)
        if not WHOLE:
            y = tl.where(tile_mask(offs_c, mask_p, channels, CHANNELS_LAST), y, float("-inf"))
        if EVEN_TIES:
            equal = y == largest
            if not WHOLE:
                equal &= tile_mask(offs_c, mask_p, channels, CHANNELS_LAST)
            index = tl.where(y > largest, 1, index + equal.to(tl.int32))
        total, largest, index = pool_step(
            y, offs_c, mask_p, channels, total, largest, index, KEEP and not EVEN_TIES, WHOLE, CHANNELS_LAST
        )
        x_ptr += tile_stride(stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
        offs_c += BLOCK_C
    return total, largest, index


@triton.jit
def gated_tile(
    x_ptr, gate_ptr, out_ptr,
    spatial, offs_p, mask_p, channels, stride_outer, out_stride_outer,
    OUTPUT: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = x * gate * spatial (+ x) for the pixels of one image."""
    spatials = over_channels(spatial, CHANNELS_LAST)
    offs_c = tl.arange(0, BLOCK_C)
    offs = tile_offsets(offs_c, offs_p, stride_outer, ALIGN, CHANNELS_LAST)
    out_offs = tile_offsets(offs_c, offs_p, out_stride_outer, ALIGN, CHANNELS_LAST)
    for _ in tl.range(0, channels, BLOCK_C):
        x = load_tile_once(x_ptr + offs, offs_c, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST).to(spatial.dtype)
        gates = load_channels(gate_ptr, offs_c, channels, WHOLE, CHANNELS_LAST).to(spatial.dtype)
        out = x * gates * spatials
        if OUTPUT == "residual":
            out += x
        store_tile(out_ptr + out_offs, out, offs_c, mask_p, channels, WHOLE, CHANNELS_LAST)
        x_ptr += tile_stride(stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
        out_ptr += tile_stride(out_stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
        offs_c += BLOCK_C


@triton.jit
def _cbam_fwd_pool_kernel(
    x_ptr, gate_ptr, maps_ptr, index_ptr,
    outer, inner, height, width, n_tiles,
    stride_xb, stride_xo,
    RADIUS: tl.constexpr, KEEP: tl.constexpr, EVEN_TIES: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FRAME_BLOCK: tl.constexpr,
):  # fmt: skip
    # an image has n_tiles programs, and before them one that zeroes the frame of its maps
    axis: tl.constexpr = 1 if CHANNELS_LAST else 0
    acc_dtype: tl.constexpr = maps_ptr.dtype.element_ty
    pid = tl.program_id(0)
    image = (pid // (n_tiles + 1)).to(tl.int64)
    tile = pid % (n_tiles + 1) - 1
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    maps_ptr += image * (height + 2 * RADIUS) * (width + 2 * RADIUS) * 2
    if tile < 0:
        zero_frame(maps_ptr, height, width, RADIUS, 2, FRAME_BLOCK)
    else:
        offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = offs_p < pixels
        x_ptr += image * stride_xb * ALIGN
        gate_ptr += image * channels
        if is_whole(tile, pixels, channels, BLOCK_P, BLOCK_C):
            total, largest, index = pool_gated_channels(
                x_ptr, gate_ptr, offs_p, mask_p, channels, stride_xo,
                KEEP, EVEN_TIES, True, acc_dtype, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C,
            )  # fmt: skip
        else:
            total, largest, index = pool_gated_channels(
                x_ptr, gate_ptr, offs_p, mask_p, channels, stride_xo,
                KEEP, EVEN_TIES, False, acc_dtype, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C,
            )  # fmt: skip
        peak = max_keep_nan(largest, axis)
        position = 2 * framed_position(offs_p, width, RADIUS)
        tl.store(maps_ptr + position, tl.sum(total, axis) / channels, mask=mask_p)
        tl.store(maps_ptr + position + 1, peak, mask=mask_p)
        if KEEP:
            peaks = over_channels(peak, CHANNELS_LAST)
            if EVEN_TIES:
                index = tl.sum(tl.where(largest == peaks, index, 0), axis)
            else:
                is_peak = (largest == peaks) | ((largest != largest) & (peaks != peaks))
                index = tl.min(tl.where(is_peak, index, NO_INDEX), axis)
            tl.store(index_ptr + image * pixels + offs_p, index.to(acc_dtype), mask=mask_p)


@triton.jit
def _cbam_fwd_kernel(
    x_ptr, gate_ptr, maps_ptr, weight_ptr, bias_ptr, spatial_ptr, out_ptr,
    outer, inner, height, width, n_tiles,
    stride_xb, stride_xo, stride_wm, stride_wh, stride_ww,
    KERNEL: tl.constexpr, LANES: tl.constexpr, AVG_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr,
    OUTPUT: tl.constexpr, KEEP: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    RADIUS: tl.constexpr = KERNEL // 2
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # last pooled, first scaled: that x is still in L2
    image = (pid // n_tiles).to(tl.int64)
    tile = pid % n_tiles
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < pixels
    logit = logit_at(
        maps_ptr + image * (height + 2 * RADIUS) * (width + 2 * RADIUS) * 2, weight_ptr, bias_ptr,
        offs_p, mask_p, width, stride_wm, stride_wh, stride_ww,
        KERNEL, LANES, AVG_FIRST, HAS_BIAS, BLOCK_P,
    )  # fmt: skip
    spatial = sigmoid(logit)
    if KEEP:
        tl.store(spatial_ptr + image * pixels + offs_p, spatial, mask=mask_p)
    if OUTPUT == "map":
        tl.store(out_ptr + image * pixels + offs_p, spatial.to(out_ptr.dtype.element_ty), mask=mask_p)
    elif OUTPUT == "logit":
        tl.store(out_ptr + image * pixels + offs_p, logit.to(out_ptr.dtype.element_ty), mask=mask_p)
    else:
        x_ptr += image * stride_xb * ALIGN
        gate_ptr += image * channels
        out_ptr += image * channels * pixels
        if is_whole(tile, pixels, channels, BLOCK_P, BLOCK_C):
            gated_tile(
                x_ptr, gate_ptr, out_ptr, spatial, offs_p, mask_p, channels, stride_xo, inner,
                OUTPUT, True, ALIGN, CHANNELS_LAST, BLOCK_C,
            )  # fmt: skip
        else:
            gated_tile(
                x_ptr, gate_ptr, out_ptr, spatial, offs_p, mask_p, channels, stride_xo, inner,
                OUTPUT, False, ALIGN, CHANNELS_LAST, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _cbam_fwd_scale_kernel(
    x_ptr, gate_ptr, spatial_ptr, out_ptr,
    outer, inner, height, width, n_tiles,
    stride_xb, stride_xo,
    OUTPUT: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    image = (pid // n_tiles).to(tl.int64)
    tile = pid % n_tiles
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < pixels
    spatial = tl.load(spatial_ptr + image * pixels + offs_p, mask=mask_p, other=0.0).to(ACC)
    x_ptr += image * stride_xb * ALIGN
    gate_ptr += image * channels
    out_ptr += image * channels * pixels
    if is_whole(tile, pixels, channels, BLOCK_P, BLOCK_C):
        gated_tile(
            x_ptr, gate_ptr, out_ptr, spatial, offs_p, mask_p, channels, stride_xo, inner,
            OUTPUT, True, ALIGN, CHANNELS_LAST, BLOCK_C,
        )  # fmt: skip
    else:
        gated_tile(
            x_ptr, gate_ptr, out_ptr, spatial, offs_p, mask_p, channels, stride_xo, inner,
            OUTPUT, False, ALIGN, CHANNELS_LAST, BLOCK_C,
        )  # fmt: skip


def cbam_infer(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, order: str, output: str
) -> torch.Tensor:
    """Launch the forward for its output alone; arguments as in ``cbam_forward``."""
    return cbam_forward(x, gate, weight, bias, order, output, "first", keep=False)[0]


def cbam_forward(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    order: str,
    output: str,
    ties: str,
    keep: bool = True,
    config: SpatialGateConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward of the spatial half.

    Args:
        x: (B, C, H, W), not empty; read in place as contiguous or channels_last, also a slice of such a tensor.
        gate: (B, C), the channel gate, in x's dtype.
        weight: (1, 2, k, k), any strides.
        bias: (1,) or None.
        order: "avg_max" where weight[:, 0] meets the mean, "max_avg" where it meets the maximum.
        output: "gated", "residual", "map" or "logit".
        ties: "first" or "even".
        keep: whether a backward will follow.
        config: block sizes and so on; chosen from the table when None.

    Returns:
        out; spatial (B, 1, H, W); maps (B, H + k - 1, W + k - 1, 2); index (B, 1, H, W) in their dtype, of the first
        maximum or, for ties "even", how many there are. What is not kept is empty, (0,).
    """
    batch, channels, height, width = x.shape
    kernel = weight.shape[-1]
    channels_last = x.stride(1) < x.stride(3)
    x, strides = addressable(x, channels_last)
    gate = gate.contiguous()
    sizes, strides, options = cbam_plan(x, channels, height, width, strides, channels_last, config)
    n_tiles = sizes[-1]
    scaled = output in ("gated", "residual")

    maps = framed_empty(x, batch, height, width, kernel, 2)
    plane = (batch, 1, height, width)
    spatial, index = (torch.empty(plane if keep else (0,), dtype=maps.dtype, device=x.device) for _ in range(2))
    out = _empty_like(x, channels_last) if scaled else torch.empty(plane, dtype=x.dtype, device=x.device)
    _cbam_fwd_pool_kernel[(batch * (n_tiles + 1),)](
        x, gate, maps, index,
        *sizes,
        *strides,
        RADIUS=kernel // 2, KEEP=keep, EVEN_TIES=keep and ties == "even", FRAME_BLOCK=FRAME_BLOCK, **options,
    )  # fmt: skip
    _cbam_fwd_kernel[(batch * n_tiles,)](
        x, gate, maps, weight, weight if bias is None else bias, spatial, out,
        *sizes,
        *strides, *weight.stride()[1:],
        KERNEL=kernel, LANES=triton.next_power_of_2(2 * kernel + 1), AVG_FIRST=order == "avg_max",
        HAS_BIAS=bias is not None, OUTPUT=output, KEEP=keep, **options,
    )  # fmt: skip
    return out, spatial, maps, index


def cbam_scale(
    x: torch.Tensor, gate: torch.Tensor, spatial: torch.Tensor, output: str, config: SpatialGateConfig | None = None
) -> torch.Tensor:
    """Launch the scaling by both gates, x * gate * spatial (+ x for "residual"), in x's dtype.

    Args:
        x, gate, config: as in ``cbam_forward``.
        spatial: (B, 1, H, W), any float dtype.
        output: "gated" or "residual".
    """
    batch, channels, height, width = x.shape
    channels_last = x.stride(1) < x.stride(3)
    x, strides = addressable(x, channels_last)
    sizes, strides, options = cbam_plan(x, channels, height, width, strides, channels_last, config)
    out = _empty_like(x, channels_last)
    _cbam_fwd_scale_kernel[(batch * sizes[-1],)](
        x, gate.contiguous(), spatial.contiguous(), out,
        *sizes,
        *strides,
        OUTPUT=output, ACC=tl.float64 if x.dtype == torch.float64 else tl.float32, **options,
    )  # fmt: skip
    return out


def _empty_like(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
