"""Coordinate gate: height[h] = mean_w x, width[w] = mean_h x, and out = x * gate_w * gate_h, in every channel.

Backward, with t = x * dout: dgate_h[h] = sum_w t * gate_w, dgate_w[w] = sum_h t * gate_h, and
dx = dout * gate_w * gate_h + dheight / width + dwidth / height, where dheight and dwidth are gradients of the means.

Nothing is kept but x and both gates. Bytes, with S = bytes of x, V = batch x channels x (height + width) numbers in the
dtype of x, G = as many in that of the gates (fp32, or fp64, where they come by way of the pooling's backward):

forward    pool S + V                gate 2 S + G
backward   dgates 2 S + 2 G          dx 2 S + V + G
Where few programs would read a tall map, it is cut into slabs, and where it is wider than a block, into chunks: a slab
leaves a partial sum of every column, a chunk of every row, in fp32 (fp64 for fp64 x), which are then summed in order:
pool and dgates write so many instead of V or G, and as many are read again.
"""

import math

import torch
import triton
import triton.language as tl

from .tuning import (
    COORDINATE_GATE_PROGRAMS,
    COORDINATE_GATE_SHARE,
    COORDINATE_GATE_SUM_BLOCK,
    CoordinateGateConfig,
    architecture,
    coordinate_gate_config,
)


@triton.jit
def map_sizes(channels, width, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(channels, width) of a map, the contiguous one of which came divided by ALIGN."""
    if CHANNELS_LAST:
        return channels * ALIGN, width
    else:
        return channels, width * ALIGN


@triton.jit
def map_offsets(offs_c, offs_h, offs_w, stride_outer, stride_middle, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Element offsets of a block [channels, rows, columns] inside one image, 64 bits wide."""
    if CHANNELS_LAST:
        rows = offs_h.to(tl.int64) * stride_outer * ALIGN
        columns = offs_w.to(tl.int64) * stride_middle * ALIGN
        return offs_c[:, None, None] + rows[None, :, None] + columns[None, None, :]
    else:
        planes = offs_c.to(tl.int64) * stride_outer * ALIGN
        rows = offs_h.to(tl.int64) * stride_middle * ALIGN
        return planes[:, None, None] + rows[None, :, None] + offs_w[None, None, :]


@triton.jit
def rows_stride(stride_outer, stride_middle, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_H: tl.constexpr):
    """Elements from a block to that BLOCK_H rows below."""
    if CHANNELS_LAST:
        return tl.full([], BLOCK_H * ALIGN, tl.int64) * stride_outer
    else:
        return tl.full([], BLOCK_H * ALIGN, tl.int64) * stride_middle


@triton.jit
def load_block(ptrs, mask, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_block(ptrs, values, mask, WHOLE: tl.constexpr):
    values = values.to(ptrs.dtype.element_ty)
    if WHOLE:
        tl.store(ptrs, values)
    else:
        tl.store(ptrs, values, mask=mask)


@triton.jit
def line_offsets(offs_c, offs, stride_c, stride):
    """Offsets of a value for every channel and every row, or every column."""
    return (offs_c.to(tl.int64) * stride_c)[:, None] + (offs.to(tl.int64) * stride)[None, :]


@triton.jit
def load_lines(ptr, offs_c, offs, channels, size, stride_c, stride):
    """A value for every channel and every row (or column); 0 where there is none."""
    mask = (offs_c < channels)[:, None] & (offs < size)[None, :]
    return tl.load(ptr + line_offsets(offs_c, offs, stride_c, stride), mask=mask, other=0.0)


@triton.jit
def store_lines(ptr, values, offs_c, offs, channels, size, stride_c, stride):
    mask = (offs_c < channels)[:, None] & (offs < size)[None, :]
    tl.store(ptr + line_offsets(offs_c, offs, stride_c, stride), values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def place(pid, n_blocks, n_slabs, n_chunks):
    """(image, block of channels, slab of rows, chunk of columns) of a program."""
    chunk = pid % n_chunks
    pid = pid // n_chunks
    slab = pid % n_slabs
    pid = pid // n_slabs
    return (pid // n_blocks).to(tl.int64), pid % n_blocks, slab, chunk


@triton.jit
def _coordinate_gate_fwd_pool_kernel(
    x_ptr, rows_ptr, columns_ptr,
    channels, height, width, n_blocks, n_slabs, n_chunks, slab_rows, rows_divisor, columns_divisor,
    stride_xb, stride_xo, stride_xm,
    stride_rp, stride_rb, stride_rc, stride_rh, stride_kp, stride_kb, stride_kc, stride_kw,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # means of a chunk of rows, and sums of a slab of columns; rows and columns are the means, or parts of them
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, block, slab, chunk = place(tl.program_id(0), n_blocks, n_slabs, n_chunks)
    channels, width = map_sizes(channels, width, ALIGN, CHANNELS_LAST)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_h = slab * slab_rows + tl.arange(0, BLOCK_H)
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_cw = (offs_c < channels)[:, None, None] & (offs_w < width)[None, None, :]
    x_ptr += image * stride_xb * ALIGN
    rows_ptr += image * stride_rb + chunk.to(tl.int64) * stride_rp
    columns_ptr += image * stride_kb + slab.to(tl.int64) * stride_kp

    offs = map_offsets(offs_c, offs_h, offs_w, stride_xo, stride_xm, ALIGN, CHANNELS_LAST)
    columns = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], acc_dtype)
    for _ in tl.range(0, tl.minimum(slab_rows, height - slab * slab_rows), BLOCK_H):
        x = load_block(x_ptr + offs, mask_cw & (offs_h < height)[None, :, None], WHOLE).to(acc_dtype)
        columns += x
        rows = tl.sum(x, 2) / rows_divisor  # [BLOCK_C, BLOCK_H]
        store_lines(rows_ptr, rows, offs_c, offs_h, channels, height, stride_rc, stride_rh)
        x_ptr += rows_stride(stride_xo, stride_xm, ALIGN, CHANNELS_LAST, BLOCK_H)
        offs_h += BLOCK_H
    sums = tl.sum(columns, 1) / columns_divisor  # [BLOCK_C, BLOCK_W]
    store_lines(columns_ptr, sums, offs_c, offs_w, channels, width, stride_kc, stride_kw)


@triton.jit
def _coordinate_gate_fwd_sum_kernel(
    parts_ptr, out_ptr,
    size, n_parts, divisor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # parts [n_parts, size], summed in their order
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = tl.zeros([BLOCK], parts_ptr.dtype.element_ty)
    for _ in tl.range(n_parts):
        total += tl.load(parts_ptr + offs, mask=mask, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + offs, (total / divisor).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _coordinate_gate_fwd_kernel(
    x_ptr, gate_h_ptr, gate_w_ptr, out_ptr,
    channels, height, width, n_blocks, n_slabs, n_chunks,
    stride_xb, stride_xo, stride_xm, stride_ob, stride_oo, stride_om,
    stride_hb, stride_hc, stride_hh, stride_gb, stride_gc, stride_gw,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # last pooled, first scaled: that x is still in L2
    image, block, slab, chunk = place(pid, n_blocks, n_slabs, n_chunks)
    channels, width = map_sizes(channels, width, ALIGN, CHANNELS_LAST)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_h = slab * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (offs_c < channels)[:, None, None] & (offs_h < height)[None, :, None] & (offs_w < width)[None, None, :]

    x_offs = map_offsets(offs_c, offs_h, offs_w, stride_xo, stride_xm, ALIGN, CHANNELS_LAST)
    x = load_block(x_ptr + image * stride_xb * ALIGN + x_offs, mask, WHOLE).to(acc_dtype)
    gate_h = load_lines(gate_h_ptr + image * stride_hb, offs_c, offs_h, channels, height, stride_hc, stride_hh)
    gate_w = load_lines(gate_w_ptr + image * stride_gb, offs_c, offs_w, channels, width, stride_gc, stride_gw)
    out = x * gate_w.to(acc_dtype)[:, None, :] * gate_h.to(acc_dtype)[:, :, None]
    offs = map_offsets(offs_c, offs_h, offs_w, stride_oo, stride_om, ALIGN, CHANNELS_LAST)
    store_block(out_ptr + image * stride_ob * ALIGN + offs, out, mask, WHOLE)


def coordinate_gate_pool(
    x: torch.Tensor, config: CoordinateGateConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the pooling.

    Args:
        x: (B, C, H, W), not empty; read in place where its planes' rows or its pixels' channels are contiguous.
        config: block sizes and so on; chosen from the table when None.

    Returns:
        The means over the width, (B, C, H, 1), and over the height, (B, C, 1, W), in x's dtype and memory format.
    """
    batch, channels, height, width = x.shape
    channels_last = x.stride(1) < x.stride(3)
    x, strides = addressable(x, channels_last)
    plan = Plan(x, channels_last, strides, config, sums=True)
    rows = empty(x, (batch, channels, height, 1), channels_last)
    columns = empty(x, (batch, channels, 1, width), channels_last)
    grid, slabs = plan.slabs()
    row_parts, column_parts = plan.parts(rows, plan.n_chunks), plan.parts(columns, slabs[1])
    _coordinate_gate_fwd_pool_kernel[grid](
        x, row_parts, column_parts,
        *plan.sizes, *slabs, width if plan.n_chunks == 1 else 1, height if slabs[1] == 1 else 1,
        *plan.aligned(strides), *lines(row_parts, 3), *lines(column_parts, 4),
        **plan.options,
    )  # fmt: skip
    sum_parts(row_parts, rows, width)
    sum_parts(column_parts, columns, height)
    return rows, columns


def coordinate_gate_forward(
    x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor, config: CoordinateGateConfig | None = None
) -> torch.Tensor:
    """Launch the gate.

    Args:
        x, config: as for ``coordinate_gate_pool``.
        gate_h: (B, C, H, 1), any float dtype and strides.
        gate_w: (B, C, 1, W), likewise.

    Returns:
        out (B, C, H, W), in x's dtype and memory format.
    """
    channels_last = x.stride(1) < x.stride(3)
    x, strides = addressable(x, channels_last)
    out = empty(x, x.shape, channels_last)
    out_strides = addressable(out, channels_last)[1]
    plan = Plan(x, channels_last, strides + out_strides, config)
    _coordinate_gate_fwd_kernel[plan.grid()](
        x, gate_h, gate_w, out,
        *plan.sizes, *plan.counts,
        *plan.aligned(strides), *plan.aligned(out_strides), *lines(gate_h, 2), *lines(gate_w, 3),
        **plan.options,
    )  # fmt: skip
    return out


@triton.jit
def _coordinate_gate_bwd_dgate_kernel(
    x_ptr, dout_ptr, gate_h_ptr, gate_w_ptr, rows_ptr, columns_ptr,
    channels, height, width, n_blocks, n_slabs, n_chunks, slab_rows,
    stride_xb, stride_xo, stride_xm, stride_dob, stride_doo, stride_dom,
    stride_hb, stride_hc, stride_hh, stride_gb, stride_gc, stride_gw,
    stride_rp, stride_rb, stride_rc, stride_rh, stride_kp, stride_kb, stride_kc, stride_kw,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # rows and columns are the gradients of gate_h and gate_w, or parts of them
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, block, slab, chunk = place(tl.program_id(0), n_blocks, n_slabs, n_chunks)
    channels, width = map_sizes(channels, width, ALIGN, CHANNELS_LAST)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_h = slab * slab_rows + tl.arange(0, BLOCK_H)
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_cw = (offs_c < channels)[:, None, None] & (offs_w < width)[None, None, :]
    x_ptr += image * stride_xb * ALIGN
    dout_ptr += image * stride_dob * ALIGN
    gate_h_ptr += image * stride_hb
    rows_ptr += image * stride_rb + chunk.to(tl.int64) * stride_rp
    columns_ptr += image * stride_kb + slab.to(tl.int64) * stride_kp

    x_offs = map_offsets(offs_c, offs_h, offs_w, stride_xo, stride_xm, ALIGN, CHANNELS_LAST)
    dout_offs = map_offsets(offs_c, offs_h, offs_w, stride_doo, stride_dom, ALIGN, CHANNELS_LAST)
    gate_w = load_lines(gate_w_ptr + image * stride_gb, offs_c, offs_w, channels, width, stride_gc, stride_gw)
    gate_w = gate_w.to(acc_dtype)[:, None, :]
    columns = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], acc_dtype)
    for _ in tl.range(0, tl.minimum(slab_rows, height - slab * slab_rows), BLOCK_H):
        mask = mask_cw & (offs_h < height)[None, :, None]
        x = load_block(x_ptr + x_offs, mask, WHOLE)
        dout = load_block(dout_ptr + dout_offs, mask, WHOLE)
        gate_h = load_lines(gate_h_ptr, offs_c, offs_h, channels, height, stride_hc, stride_hh)
        t = x.to(acc_dtype) * dout.to(acc_dtype)
        columns += t * gate_h.to(acc_dtype)[:, :, None]
        rows = tl.sum(t * gate_w, 2)  # [BLOCK_C, BLOCK_H]
        store_lines(rows_ptr, rows, offs_c, offs_h, channels, height, stride_rc, stride_rh)
        x_ptr += rows_stride(stride_xo, stride_xm, ALIGN, CHANNELS_LAST, BLOCK_H)
        dout_ptr += rows_stride(stride_doo, stride_dom, ALIGN, CHANNELS_LAST, BLOCK_H)
        offs_h += BLOCK_H
    store_lines(columns_ptr, tl.sum(columns, 1), offs_c, offs_w, channels, width, stride_kc, stride_kw)


@triton.jit
def _coordinate_gate_bwd_dx_kernel(
    dout_ptr, gate_h_ptr, gate_w_ptr, dheight_ptr, dwidth_ptr, dx_ptr,
    channels, height, width, n_blocks, n_slabs, n_chunks,
    stride_dob, stride_doo, stride_dom, stride_dxb, stride_dxo, stride_dxm,
    stride_hb, stride_hc, stride_hh, stride_gb, stride_gc, stride_gw,
    stride_rb, stride_rc, stride_rh, stride_kb, stride_kc, stride_kw,
    HAS_DOUT: tl.constexpr, HAS_GATES: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    acc_dtype: tl.constexpr = tl.float64 if dx_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # dout read last for the gates is still in L2
    image, block, slab, chunk = place(pid, n_blocks, n_slabs, n_chunks)
    channels, width = map_sizes(channels, width, ALIGN, CHANNELS_LAST)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_h = slab * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (offs_c < channels)[:, None, None] & (offs_h < height)[None, :, None] & (offs_w < width)[None, None, :]

    if HAS_DOUT:
        dout_offs = map_offsets(offs_c, offs_h, offs_w, stride_doo, stride_dom, ALIGN, CHANNELS_LAST)
        dx = load_block(dout_ptr + image * stride_dob * ALIGN + dout_offs, mask, WHOLE).to(acc_dtype)
        if HAS_GATES:
            gate_h = load_lines(gate_h_ptr + image * stride_hb, offs_c, offs_h, channels, height, stride_hc, stride_hh)
            gate_w = load_lines(gate_w_ptr + image * stride_gb, offs_c, offs_w, channels, width, stride_gc, stride_gw)
            dx = dx * gate_w.to(acc_dtype)[:, None, :] * gate_h.to(acc_dtype)[:, :, None]
    else:
        dx = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], acc_dtype)
    if HAS_ROWS:
        rows = load_lines(dheight_ptr + image * stride_rb, offs_c, offs_h, channels, height, stride_rc, stride_rh)
        dx += (rows.to(acc_dtype) / width)[:, :, None]
    if HAS_COLUMNS:
        columns = load_lines(dwidth_ptr + image * stride_kb, offs_c, offs_w, channels, width, stride_kc, stride_kw)
        dx += (columns.to(acc_dtype) / height)[:, None, :]
    offs = map_offsets(offs_c, offs_h, offs_w, stride_dxo, stride_dxm, ALIGN, CHANNELS_LAST)
    store_block(dx_ptr + image * stride_dxb * ALIGN + offs, dx, mask, WHOLE)


def coordinate_gate_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    gate_h: torch.Tensor,
    gate_w: torch.Tensor,
    config: CoordinateGateConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the gradients of both gates.

    Args:
        dout: gradient of out, any strides.
        x, gate_h, gate_w, config: as in the forward.

    Returns:
        dgate_h and dgate_w, each of its gate's shape and dtype and dense in its order.
    """
    channels_last = x.stride(1) < x.stride(3)
    x, strides = addressable(x, channels_last)
    dout, dout_strides = addressable(dout, channels_last)
    plan = Plan(x, channels_last, strides + dout_strides, config, sums=True)
    dgate_h, dgate_w = torch.empty_like(gate_h), torch.empty_like(gate_w)
    grid, slabs = plan.slabs()
    row_parts, column_parts = plan.parts(dgate_h, plan.n_chunks), plan.parts(dgate_w, slabs[1])
    _coordinate_gate_bwd_dgate_kernel[grid](
        x, dout, gate_h, gate_w, row_parts, column_parts,
        *plan.sizes, *slabs,
        *plan.aligned(strides), *plan.aligned(dout_strides), *lines(gate_h, 2), *lines(gate_w, 3),
        *lines(row_parts, 3), *lines(column_parts, 4),
        **plan.options,
    )  # fmt: skip
    sum_parts(row_parts, dgate_h, 1)
    sum_parts(column_parts, dgate_w, 1)
    return dgate_h, dgate_w


def coordinate_gate_dx(
    dout: torch.Tensor | None,
    gate_h: torch.Tensor | None,
    gate_w: torch.Tensor | None,
    dheight: torch.Tensor | None,
    dwidth: torch.Tensor | None,
    height: int,
    width: int,
    channels_last: bool,
    config: CoordinateGateConfig | None = None,
) -> torch.Tensor:
    """Launch the gradient of the map, through the gate and through both means.

    Args:
        dout: gradient of out, any strides, or None.
        gate_h, gate_w, config: as in the forward; no gates where dout is to be taken as it is.
        dheight, dwidth: gradients of the means (B, C, H, 1) and (B, C, 1, W), or None; one of them and dout is given.
        height, width: of the map.
        channels_last: the layout of dx.

    Returns:
        dx (B, C, H, W) in the dtype of dout, or else of the means' gradients.
    """
    like = next(given for given in (dout, dheight, dwidth) if given is not None)
    dx = empty(like, (*like.shape[:2], height, width), channels_last)
    strides = dout_strides = addressable(dx, channels_last)[1]
    has_dout, has_gates = dout is not None, gate_h is not None
    if dout is not None:
        dout, dout_strides = addressable(dout, channels_last)
    plan = Plan(dx, channels_last, dout_strides + strides, config)
    # what is not there is never read
    dout, gate_h, gate_w, rows, columns = (
        dx if given is None else given for given in (dout, gate_h, gate_w, dheight, dwidth)
    )
    _coordinate_gate_bwd_dx_kernel[plan.grid()](
        dout, gate_h, gate_w, rows, columns, dx,
        *plan.sizes, *plan.counts,
        *plan.aligned(dout_strides), *plan.aligned(strides), *lines(gate_h, 2), *lines(gate_w, 3),
        *lines(rows, 2), *lines(columns, 3),
        HAS_DOUT=has_dout, HAS_GATES=has_gates, HAS_ROWS=dheight is not None, HAS_COLUMNS=dwidth is not None,
        **plan.options,
    )  # fmt: skip
    return dx


class Plan:
    """How a map is cut into blocks, and what every launch takes: sizes, numbers of blocks, constexprs.

    Sums want whole rows in a block. What sums nothing takes square blocks of pixels in channels_last, which read the
    fewest gates; elsewhere rows stay whole, for their contiguity.
    """

    def __init__(
        self,
        like: torch.Tensor,
        channels_last: bool,
        strides: tuple[int, ...],
        config: CoordinateGateConfig | None,
        sums: bool = False,
    ) -> None:
        batch, channels, height, width = like.shape
        config = config or coordinate_gate_config(
            architecture(like.device), itemsize=like.element_size(), channels_last=channels_last
        )
        most_c, most_h, most_w = (triton.next_power_of_2(size) for size in (channels, height, width))
        self.align = math.gcd(16, channels if channels_last else width, *strides)
        share = COORDINATE_GATE_SHARE // (2 if sums else 1) // (2 if self.align == 1 else 1)
        tile = min(config.tile, share * 32 * config.num_warps)
        if channels_last:
            block_c = min(max(config.block_c * tile // config.tile, 1), most_c)  # as many pixels as in the whole tile
            pixels = tile // block_c
            block_w = min(pixels if sums else triton.next_power_of_2(math.isqrt(pixels)), most_w)
            block_h = min(pixels // block_w, most_h)
        else:
            block_w = min(tile, most_w)
            block_h = min(tile // block_w, most_h)
            block_c = min(tile // (block_h * block_w), most_c)
        self.batch, self.height, self.slab = batch, height, config.slab
        divisor_c, divisor_w = (self.align, 1) if channels_last else (1, self.align)
        self.sizes = (channels // divisor_c, height, width // divisor_w)
        self.n_chunks = triton.cdiv(width, block_w)
        self.counts = (triton.cdiv(channels, block_c), triton.cdiv(height, block_h), self.n_chunks)
        self.options = {
            "ALIGN": self.align,
            "CHANNELS_LAST": channels_last,
            "WHOLE": channels % block_c == height % block_h == width % block_w == 0,
            "BLOCK_C": block_c,
            "BLOCK_H": block_h,
            "BLOCK_W": block_w,
            "num_warps": config.num_warps,
        }

    def grid(self) -> tuple[int]:
        """One program a block."""
        return (self.batch * math.prod(self.counts),)

    def slabs(self) -> tuple[tuple[int], tuple[int, ...]]:
        """One program a slab of rows: the grid, and (blocks of channels, slabs, chunks, rows a slab)."""
        n_blocks, _, n_chunks = self.counts
        block_h = self.options["BLOCK_H"]
        wanted = triton.cdiv(COORDINATE_GATE_PROGRAMS, self.batch * n_blocks * n_chunks)
        n_slabs = min(wanted, triton.cdiv(self.height, self.slab))
        slab_rows = triton.cdiv(triton.cdiv(self.height, n_slabs), block_h) * block_h
        n_slabs = triton.cdiv(self.height, slab_rows)
        return (self.batch * n_blocks * n_slabs * n_chunks,), (n_blocks, n_slabs, n_chunks, slab_rows)

    def aligned(self, strides: tuple[int, ...]) -> list[int]:
        """Strides as kernels take them."""
        return [stride // self.align for stride in strides]

    def parts(self, result: torch.Tensor, n_parts: int) -> torch.Tensor:
        """Room for parts of a dense result: itself, with an axis in front, where there is one part."""
        if n_parts == 1:
            return result.unsqueeze(0)
        dtype = torch.float64 if result.dtype == torch.float64 else torch.float32
        strides = (result.numel(), *result.stride())
        return torch.empty_strided((n_parts, *result.shape), strides, dtype=dtype, device=result.device)


def sum_parts(parts: torch.Tensor, result: torch.Tensor, divisor: int) -> None:
    """Launch the sum of several parts into their result, in order."""
    if parts.shape[0] > 1:
        _coordinate_gate_fwd_sum_kernel[(triton.cdiv(result.numel(), COORDINATE_GATE_SUM_BLOCK),)](
            parts, result,
            result.numel(), parts.shape[0], divisor,
            BLOCK=COORDINATE_GATE_SUM_BLOCK,
        )  # fmt: skip


def empty(like: torch.Tensor, shape: tuple[int, ...], channels_last: bool) -> torch.Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def addressable(x: torch.Tensor, channels_last: bool) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """A (B, C, H, W) tensor and its strides but the contiguous axis's: a copy where that is not contiguous."""
    inner = 1 if channels_last else 3
    if x.stride(inner) != 1 and x.shape[inner] != 1:
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    # an axis of one has no step, whatever its stride
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    del strides[inner]
    return x, (strides[0], strides[1], strides[2])


def lines(tensor: torch.Tensor, axis: int) -> tuple[int, ...]:
    """Strides of what has one number a row, or a column, which lie along this axis; parts in front included."""
    return (*tensor.stride()[: tensor.dim() - 2], tensor.stride(axis))
