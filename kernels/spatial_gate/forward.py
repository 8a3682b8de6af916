"""The spatial gate's forward."""

import torch
import triton
import triton.language as tl

from ..tiles import (
    addressable,
    is_whole,
    load_tile,
    load_tile_once,
    map_sizes,
    max_keep_nan,
    over_channels,
    over_pixels,
    store_tile,
    tile_mask,
    tile_offsets,
    tile_stride,
)
from ..tuning import FRAME_BLOCK, SpatialGateConfig
from .common import NO_INDEX, framed_empty, framed_position, plan, sigmoid, zero_frame


@triton.jit
def pool_tile(
    x_ptr, maps_ptr, index_ptr,
    tile, pixels, channels, width, stride_outer,
    RADIUS: tl.constexpr, INDEX: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Mean and maximum over the channels of one image's pixels, and the first index of the maximum where wanted."""
    axis: tl.constexpr = 1 if CHANNELS_LAST else 0
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < pixels
    if is_whole(tile, pixels, channels, BLOCK_P, BLOCK_C * STEPS):
        total, largest, first = pool_channels(
            x_ptr, offs_p, mask_p, channels, stride_outer,
            INDEX, True, maps_ptr.dtype.element_ty, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C, STEPS,
        )  # fmt: skip
    else:
        total, largest, first = pool_channels(
            x_ptr, offs_p, mask_p, channels, stride_outer,
            INDEX, False, maps_ptr.dtype.element_ty, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C, STEPS,
        )  # fmt: skip
    peak = max_keep_nan(largest, axis)
    position = 2 * framed_position(offs_p, width, RADIUS)
    tl.store(maps_ptr + position, tl.sum(total, axis) / channels, mask=mask_p)
    tl.store(maps_ptr + position + 1, peak, mask=mask_p)
    if INDEX:
        peaks = over_channels(peak, CHANNELS_LAST)
        is_peak = (largest == peaks) | ((largest != largest) & (peaks != peaks))
        tl.store(index_ptr + offs_p, tl.min(tl.where(is_peak, first, NO_INDEX), axis), mask=mask_p)


@triton.jit
def pool_channels(
    x_ptr, offs_p, mask_p, channels, stride_outer,
    INDEX: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Sums, maxima and their first indices over every BLOCK_C-th channel, one tile of each."""
    shape: tl.constexpr = (BLOCK_P, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_P)
    total = tl.zeros(shape, ACC)
    largest = tl.full(shape, float("-inf"), ACC)
    first = tl.full(shape, NO_INDEX, tl.int32)
    offs_c = tl.arange(0, BLOCK_C)
    offs = tile_offsets(offs_c, offs_p, stride_outer, ALIGN, CHANNELS_LAST)
    stride = tile_stride(stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
    for start in tl.range(0, channels, BLOCK_C * STEPS):  # all loads come before the first use
        c0 = start + offs_c
        x0 = load_tile(x_ptr + offs, c0, mask_p, channels, float("-inf"), WHOLE, CHANNELS_LAST)
        if STEPS >= 2:
            c1 = start + offs_c + 1 * BLOCK_C
            x1 = load_tile(x_ptr + 1 * stride + offs, c1, mask_p, channels, float("-inf"), WHOLE, CHANNELS_LAST)
        if STEPS == 4:
            c2 = start + offs_c + 2 * BLOCK_C
            x2 = load_tile(x_ptr + 2 * stride + offs, c2, mask_p, channels, float("-inf"), WHOLE, CHANNELS_LAST)
            c3 = start + offs_c + 3 * BLOCK_C
            x3 = load_tile(x_ptr + 3 * stride + offs, c3, mask_p, channels, float("-inf"), WHOLE, CHANNELS_LAST)
        total, largest, first = pool_step(x0, c0, mask_p, channels, total, largest, first, INDEX, WHOLE, CHANNELS_LAST)
        if STEPS >= 2:
            total, largest, first = pool_step(
                x1, c1, mask_p, channels, total, largest, first, INDEX, WHOLE, CHANNELS_LAST
            )
        if STEPS == 4:
            total, largest, first = pool_step(
                x2, c2, mask_p, channels, total, largest, first, INDEX, WHOLE, CHANNELS_LAST
            )
            total, largest, first = pool_step(
                x3, c3, mask_p, channels, total, largest, first, INDEX, WHOLE, CHANNELS_LAST
            )
        x_ptr += STEPS * stride
    return total, largest, first


@triton.jit
def pool_step(
    x, offs_c, mask_p, channels, total, largest, first,
    INDEX: tl.constexpr, WHOLE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    x = x.to(total.dtype)
    mask = tile_mask(offs_c, mask_p, channels, CHANNELS_LAST)
    if INDEX:
        # strictly larger, or the first NaN: then later equals never win
        wins = (x > largest) | ((x != x) & (largest == largest)) | ((first == NO_INDEX) & mask)
        first = tl.where(wins, over_pixels(offs_c, CHANNELS_LAST), first)
    largest = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
    if not WHOLE:
        x = tl.where(mask, x, 0.0)
    return total + x, largest, first


@triton.jit
def logit_at(
    maps_ptr, weight_ptr, bias_ptr,
    offs_p, mask_p, width, stride_wm, stride_wh, stride_ww,
    KERNEL: tl.constexpr, LANES: tl.constexpr, AVG_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The convolution of both maps at pixels of one image; a row of taps is a row of LANES >= 2 * KERNEL lanes."""
    acc_dtype: tl.constexpr = maps_ptr.dtype.element_ty
    lane = tl.arange(0, LANES)
    in_row = lane < 2 * KERNEL
    is_max = lane % 2
    framed_width = width + 2 * (KERNEL // 2)
    row = offs_p // width
    top_left = tl.where(mask_p, row * framed_width + offs_p - row * width, 0)  # in bounds also behind the last pixel
    ptrs = maps_ptr + 2 * top_left[:, None] + lane[None, :]  # [BLOCK_P, LANES]
    weight_ptrs = weight_ptr + (is_max if AVG_FIRST else 1 - is_max) * stride_wm + lane // 2 * stride_ww
    acc = tl.zeros([BLOCK_P, LANES], acc_dtype)
    for dh in tl.range(KERNEL):
        taps = tl.load(weight_ptrs + dh * stride_wh, mask=in_row, other=0.0).to(acc_dtype)
        acc += tl.load(ptrs, mask=in_row[None, :], other=0.0) * taps[None, :]
        ptrs += 2 * framed_width
    logit = tl.sum(acc, 1)
    if HAS_BIAS:
        logit += tl.load(bias_ptr).to(acc_dtype)
    return logit


@triton.jit
def scale_tile(
    x_ptr, out_ptr,
    gate, offs_p, mask_p, channels, stride_outer, out_stride_outer,
    OUTPUT: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = x * gate (+ x) for the pixels of one image."""
    gates = over_channels(gate, CHANNELS_LAST)
    offs_c = tl.arange(0, BLOCK_C)
    offs = tile_offsets(offs_c, offs_p, stride_outer, ALIGN, CHANNELS_LAST)
    out_offs = tile_offsets(offs_c, offs_p, out_stride_outer, ALIGN, CHANNELS_LAST)
    for _ in tl.range(0, channels, BLOCK_C):
        x = load_tile_once(x_ptr + offs, offs_c, mask_p, channels, 0.0, WHOLE, CHANNELS_LAST).to(gate.dtype)
        out = x * gates
        if OUTPUT == "residual":
            out += x
        store_tile(out_ptr + out_offs, out, offs_c, mask_p, channels, WHOLE, CHANNELS_LAST)
        x_ptr += tile_stride(stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
        out_ptr += tile_stride(out_stride_outer, ALIGN, CHANNELS_LAST, BLOCK_C)
        offs_c += BLOCK_C


@triton.jit
def _spatial_gate_fwd_pool_kernel(
    x_ptr, maps_ptr, index_ptr,
    outer, inner, height, width, n_tiles,
    stride_xb, stride_xo,
    RADIUS: tl.constexpr, INDEX: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr, FRAME_BLOCK: tl.constexpr,
):  # fmt: skip
    # an image has n_tiles programs, and before them one that zeroes the frame of its maps
    pid = tl.program_id(0)
    image = (pid // (n_tiles + 1)).to(tl.int64)
    tile = pid % (n_tiles + 1) - 1
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    maps_ptr += image * (height + 2 * RADIUS) * (width + 2 * RADIUS) * 2
    if tile < 0:
        zero_frame(maps_ptr, height, width, RADIUS, 2, FRAME_BLOCK)
    else:
        pool_tile(
            x_ptr + image * stride_xb * ALIGN, maps_ptr, index_ptr + image * pixels,
            tile, pixels, channels, width, stride_xo,
            RADIUS, INDEX, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C, STEPS,
        )  # fmt: skip


@triton.jit
def _spatial_gate_fwd_kernel(
    x_ptr, maps_ptr, weight_ptr, bias_ptr, gate_ptr, out_ptr,
    outer, inner, height, width, n_tiles,
    stride_xb, stride_xo, stride_wm, stride_wh, stride_ww,
    KERNEL: tl.constexpr, LANES: tl.constexpr, AVG_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr,
    OUTPUT: tl.constexpr, KEEP: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    RADIUS: tl.constexpr = KERNEL // 2
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # last pooled, first scaled: that x is still in L2
    image = (pid // n_tiles).to(tl.int64)
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    tile = pid % n_tiles
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < pixels
    logit = logit_at(
        maps_ptr + image * (height + 2 * RADIUS) * (width + 2 * RADIUS) * 2, weight_ptr, bias_ptr,
        offs_p, mask_p, width, stride_wm, stride_wh, stride_ww,
        KERNEL, LANES, AVG_FIRST, HAS_BIAS, BLOCK_P,
    )  # fmt: skip
    gate = sigmoid(logit)
    if KEEP:
        tl.store(gate_ptr + image * pixels + offs_p, gate, mask=mask_p)
    if OUTPUT == "map":
        tl.store(out_ptr + image * pixels + offs_p, gate.to(out_ptr.dtype.element_ty), mask=mask_p)
    elif OUTPUT == "logit":
        tl.store(out_ptr + image * pixels + offs_p, logit.to(out_ptr.dtype.element_ty), mask=mask_p)
    else:
        if is_whole(tile, pixels, channels, BLOCK_P, BLOCK_C * STEPS):
            scale_tile(
                x_ptr + image * stride_xb * ALIGN, out_ptr + image * channels * pixels,
                gate, offs_p, mask_p, channels, stride_xo, inner,
                OUTPUT, True, ALIGN, CHANNELS_LAST, BLOCK_C * STEPS,
            )  # fmt: skip
        else:
            scale_tile(
                x_ptr + image * stride_xb * ALIGN, out_ptr + image * channels * pixels,
                gate, offs_p, mask_p, channels, stride_xo, inner,
                OUTPUT, False, ALIGN, CHANNELS_LAST, BLOCK_C * STEPS,
            )  # fmt: skip


@triton.jit
def _spatial_gate_fwd_lagged_kernel(
    x_ptr, maps_ptr, weight_ptr, bias_ptr, gate_ptr, out_ptr, counters_ptr,
    outer, inner, height, width, n_tiles, n_tickets, lag,
    stride_xb, stride_xo, stride_wm, stride_wh, stride_ww,
    KERNEL: tl.constexpr, LANES: tl.constexpr, AVG_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr,
    OUTPUT: tl.constexpr, KEEP: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr, FRAME_BLOCK: tl.constexpr,
):  # fmt: skip
    # Ticket t pools tile t, then finishes tile t - lag, whose x is still in L2. counters: [ticket, pooled tiles of
    # each image], zero at launch. A program waits for smaller tickets only, which running programs hold: no deadlock.
    RADIUS: tl.constexpr = KERNEL // 2
    channels, pixels = map_sizes(outer, inner, ALIGN, CHANNELS_LAST)
    framed = (height + 2 * RADIUS) * (width + 2 * RADIUS)
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    if ticket < n_tickets:
        image = (ticket // (n_tiles + 1)).to(tl.int64)
        tile = ticket % (n_tiles + 1) - 1
        if tile < 0:
            zero_frame(maps_ptr + image * framed * 2, height, width, RADIUS, 2, FRAME_BLOCK)
        else:
            pool_tile(
                x_ptr + image * stride_xb * ALIGN, maps_ptr + image * framed * 2, gate_ptr,
                tile, pixels, channels, width, stride_xo,
                RADIUS, False, ALIGN, CHANNELS_LAST, BLOCK_P, BLOCK_C, STEPS,
            )  # fmt: skip
        tl.debug_barrier()  # every thread's stores come before the one release
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
            gate = sigmoid(
                logit_at(
                    maps_ptr + image * framed * 2, weight_ptr, bias_ptr,
                    offs_p, mask_p, width, stride_wm, stride_wh, stride_ww,
                    KERNEL, LANES, AVG_FIRST, HAS_BIAS, BLOCK_P,
                )
            )  # fmt: skip
            if KEEP:
                tl.store(gate_ptr + image * pixels + offs_p, gate, mask=mask_p)
            if is_whole(tile, pixels, channels, BLOCK_P, BLOCK_C * STEPS):
                scale_tile(
                    x_ptr + image * stride_xb * ALIGN, out_ptr + image * channels * pixels,
                    gate, offs_p, mask_p, channels, stride_xo, inner,
                    OUTPUT, True, ALIGN, CHANNELS_LAST, BLOCK_C * STEPS,
                )  # fmt: skip
            else:
                scale_tile(
                    x_ptr + image * stride_xb * ALIGN, out_ptr + image * channels * pixels,
                    gate, offs_p, mask_p, channels, stride_xo, inner,
                    OUTPUT, False, ALIGN, CHANNELS_LAST, BLOCK_C * STEPS,
                )  # fmt: skip


def spatial_gate_infer(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, order: str, output: str
) -> torch.Tensor:
    """Launch the forward for its output alone; arguments as in ``spatial_gate_forward``."""
    return spatial_gate_forward(x, weight, bias, order, output, "first", keep=False)[0]


def spatial_gate_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    order: str,
    output: str,
    ties: str,
    keep: bool = True,
    config: SpatialGateConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward.

    Args:
        x: (B, C, H, W), not empty; read in place as contiguous or channels_last, also a slice of such a tensor.
        weight: (1, 2, k, k), any strides.
        bias: (1,) or None.
        order: "avg_max" where weight[:, 0] meets the mean, "max_avg" where it meets the maximum.
        output: "gated", "residual", "map" or "logit".
        ties: "first" or "even".
        keep: whether a backward will follow.
        config: block sizes and so on; chosen from the table when None.

    Returns:
        out; gate (B, 1, H, W); maps (B, H + k - 1, W + k - 1, 2); index (B, 1, H, W) int32 of the maximum where the
        backward of "map" and "logit" needs it. What is not kept is empty, (0,).
    """
    batch, channels, height, width = x.shape
    kernel = weight.shape[-1]
    channels_last = x.stride(1) < x.stride(3)
    x, strides = addressable(x, channels_last)
    config, sizes, strides, options = plan(x, channels, height, width, strides, channels_last, config)
    n_tiles = sizes[-1]
    scaled = output in ("gated", "residual")

    maps = framed_empty(x, batch, height, width, kernel, 2)
    save_index = keep and not scaled and ties == "first"
    plane = (batch, 1, height, width)
    gate = torch.empty(plane if keep else (0,), dtype=maps.dtype, device=x.device)
    index = torch.empty(plane if save_index else (0,), dtype=torch.int32, device=x.device)
    if scaled:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    else:
        out = torch.empty(plane, dtype=x.dtype, device=x.device)

    gate_options = {
        "KERNEL": kernel,
        "LANES": triton.next_power_of_2(2 * kernel + 1),
        "AVG_FIRST": order == "avg_max",
        "HAS_BIAS": bias is not None,
        "OUTPUT": output,
        "KEEP": keep,
    }
    bias = weight if bias is None else bias  # never read without HAS_BIAS
    if scaled and n_tiles <= config.lag:
        n_tickets = batch * (n_tiles + 1)
        counters = torch.zeros(1 + batch, dtype=torch.int32, device=x.device)
        _spatial_gate_fwd_lagged_kernel[(n_tickets + config.lag,)](
            x, maps, weight, bias, gate, out, counters,
            *sizes, n_tickets, config.lag,
            *strides, *weight.stride()[1:],
            FRAME_BLOCK=FRAME_BLOCK, **gate_options, **options,
        )  # fmt: skip
        return out, gate, maps, index
    _spatial_gate_fwd_pool_kernel[(batch * (n_tiles + 1),)](
        x, maps, index,
        *sizes,
        *strides,
        RADIUS=kernel // 2, INDEX=save_index, FRAME_BLOCK=FRAME_BLOCK, **options,
    )  # fmt: skip
    _spatial_gate_fwd_kernel[(batch * n_tiles,)](
        x, maps, weight, bias, gate, out,
        *sizes,
        *strides, *weight.stride()[1:],
        **gate_options, **options,
    )  # fmt: skip
    return out, gate, maps, index
