"""Group attention's forward."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from attnk.memory import empty_in_order

from ..attention import LOG2E, divided_strides, kept_weights
from ..tuning import GroupAttentionConfig
from .common import (
    UNITS,
    Call,
    alike,
    exponentials,
    group_start,
    group_tokens,
    masked_logits,
    next_start,
    pair_bias,
    tile_offsets,
    tile_pointers,
)


@triton.jit
def _group_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, table_ptr, rng_ptr, out_ptr, lse_ptr, other_ptr,
    scale,
    heads, height, width, n_tokens, n_groups, all_groups, groups_per_program,
    qk_dim: tl.constexpr, v_dim: tl.constexpr, span,
    window_h: tl.constexpr, window_w: tl.constexpr, shift_h, shift_w, dilation_h, dilation_w, padded_h, padded_w,
    stride_bias_h, stride_bias_m, stride_bias_n,
    stride_qb, stride_qy, stride_qx, stride_qh, stride_qd,
    stride_kb, stride_ky, stride_kx, stride_kh, stride_kd,
    stride_vb, stride_vy, stride_vx, stride_vh, stride_vd,
    stride_ob, stride_oy, stride_ox, stride_oh, stride_od,
    LAYOUT: tl.constexpr, JOIN: tl.constexpr, WRITE_LSE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, MASK: tl.constexpr, SPAN: tl.constexpr, PADDED: tl.constexpr,
    THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    SCALE_FIRST: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr,
    WHOLE: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr, QK_DIM: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """One program owns a run of groups of one head. JOIN: "" alone, or how to join what the first launch left."""
    SCALED: tl.constexpr = HAS_BIAS or HAS_TABLE or MASK == "-100" or SCALE_FIRST
    WRAP: tl.constexpr = MASK != ""
    CHECK_KEYS: tl.constexpr = PADDED or WHOLE < BLOCK
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    # fmt: off
    if ALIKE >= 1:  # offsets of tensors that lie alike are computed once
        stride_kb, stride_ky, stride_kx, stride_kh, stride_kd = \
            stride_qb, stride_qy, stride_qx, stride_qh, stride_qd
        stride_vb, stride_vy, stride_vx, stride_vh, stride_vd = \
            stride_qb, stride_qy, stride_qx, stride_qh, stride_qd
    if ALIKE == 3:
        stride_ob, stride_oy, stride_ox, stride_oh, stride_od = \
            stride_qb, stride_qy, stride_qx, stride_qh, stride_qd
    # fmt: on
    h = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * groups_per_program
    offs_t = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, QK_DIM)
    offs_v = tl.arange(0, V_DIM)
    down, right = group_tokens(offs_t, window_w, dilation_h, dilation_w, LAYOUT)
    in_group = (offs_t < WHOLE) | ((offs_t < n_tokens) & (offs_t < REACH))
    exists, below, beyond = in_group, in_group, in_group
    bias = pair_bias(
        bias_ptr, table_ptr, h, n_tokens, window_h, window_w, heads, stride_bias_h, stride_bias_m, stride_bias_n,
        LAYOUT, HAS_BIAS, HAS_TABLE, BLOCK, ACC,
    )  # fmt: skip
    log2_scale = tl.full([], scale, ACC) * LOG2E
    q_ptr += h.to(tl.int64) * stride_qh * ALIGN
    k_ptr += h.to(tl.int64) * stride_kh * ALIGN
    v_ptr += h.to(tl.int64) * stride_vh * ALIGN
    out_ptr += h.to(tl.int64) * stride_oh * ALIGN
    q_offs = tile_offsets(down, right, offs_d, stride_qy, stride_qx, stride_qd, UNIT, ALIGN, OFFSET)
    k_offs = tile_offsets(down, right, offs_d, stride_ky, stride_kx, stride_kd, UNIT, ALIGN, OFFSET)
    v_offs = tile_offsets(down, right, offs_v, stride_vy, stride_vx, stride_vd, UNIT, ALIGN, OFFSET)
    o_offs = tile_offsets(down, right, offs_v, stride_oy, stride_ox, stride_od, UNIT, ALIGN, OFFSET)
    b, y, x, step_h, step_w = group_start(first, n_groups, window_h, window_w, dilation_h, dilation_w, padded_w, LAYOUT)
    for group in tl.range(first, tl.minimum(first + groups_per_program, all_groups)):
        top, left, limit_y, limit_x = y, x, height, width
        if WRAP:
            top, left = y + shift_h, x + shift_w
            limit_y, limit_x = padded_h - shift_h - y, padded_w - shift_w - x
            below, beyond = down >= limit_y, right >= limit_x
        if PADDED:
            token_y = top + down
            token_x = left + right
            if WRAP:
                token_y -= tl.where(below, padded_h, 0)
                token_x -= tl.where(beyond, padded_w, 0)
            exists = in_group & (token_y < height) & (token_x < width)
        mask_d = exists[:, None] & (offs_d < qk_dim)[None, :]
        mask_v = exists[:, None] & (offs_v < v_dim)[None, :]
        ptrs = tile_pointers(
            q_ptr, q_offs, b, top, left, below, beyond, padded_h, padded_w,
            stride_qb, stride_qy, stride_qx, WRAP, UNIT, ALIGN, OFFSET,
        )  # fmt: skip
        q = tl.load(ptrs, mask=mask_d, other=0.0)
        ptrs = tile_pointers(
            k_ptr, k_offs, b, top, left, below, beyond, padded_h, padded_w,
            stride_kb, stride_ky, stride_kx, WRAP, UNIT, ALIGN, OFFSET,
        )  # fmt: skip
        k = tl.load(ptrs, mask=mask_d, other=0.0)
        ptrs = tile_pointers(
            v_ptr, v_offs, b, top, left, below, beyond, padded_h, padded_w,
            stride_vb, stride_vy, stride_vx, WRAP, UNIT, ALIGN, OFFSET,
        )  # fmt: skip
        v = tl.load(ptrs, mask=mask_v, other=0.0)
        if JOIN != "":  # what the first launch left, loaded well before it is used
            out_ptrs = tile_pointers(
                out_ptr, o_offs, b, top, left, below, beyond, padded_h, padded_w,
                stride_ob, stride_oy, stride_ox, WRAP, UNIT, ALIGN, OFFSET,
            )  # fmt: skip
            left_out = tl.load(out_ptrs, mask=mask_v, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        if SCALED:
            logits *= log2_scale
        if HAS_BIAS or HAS_TABLE:
            logits += bias
        logits = masked_logits(
            logits, group, limit_y, limit_x, exists, span, window_h, window_w, dilation_h, dilation_w,
            MASK, SPAN, JOIN == "softmax", BLOCK, CHECK_KEYS,
        )  # fmt: skip
        row_max = tl.max(logits, 1)
        row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        if not SCALED:
            row_max *= log2_scale
        weights = exponentials(logits, row_max, log2_scale, SCALED, REACH, BLOCK)
        row_sum = tl.sum(weights, 1)
        factor = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
        if WRITE_LSE or JOIN == "softmax":
            offs_r = ((b.to(tl.int64) * height + y + down) * width + x + right) * heads + h
            lse = row_max + tl.log2(row_sum)
            if JOIN == "softmax":
                other = tl.load(other_ptr + offs_r, mask=exists, other=0.0)
                largest = tl.maximum(lse, other)
                both = largest + tl.log2(tl.exp2(lse - largest) + tl.exp2(other - largest))
                factor *= tl.exp2(lse - both)
                lse = both
            tl.store(lse_ptr + offs_r, lse, mask=exists)
        if THRESHOLD > 0:
            draw = (group * heads + h) * 2 + (1 if LAYOUT == "column" else 0)
            keep = kept_weights(rng_ptr, draw, 0, 0, THRESHOLD, BLOCK, BLOCK)
            weights = tl.where(keep, weights, 0.0)
            factor *= KEEP_SCALE
        out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION, out_dtype=ACC) * factor[:, None]
        ptrs = tile_pointers(
            out_ptr, o_offs, b, top, left, below, beyond, padded_h, padded_w,
            stride_ob, stride_oy, stride_ox, WRAP, UNIT, ALIGN, OFFSET,
        )  # fmt: skip
        if JOIN == "add":
            out += left_out
        elif JOIN == "softmax":
            out += left_out * tl.exp2(other - lse)[:, None]
        tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_v)
        b, y, x, step_h, step_w = next_start(
            b, y, x, step_h, step_w, height, width,
            window_h, window_w, dilation_h, dilation_w, padded_h, padded_w, LAYOUT,
        )  # fmt: skip


def group_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    column_table: torch.Tensor | None,
    rng: torch.Tensor | None,
    layout: str,
    window: Sequence[int],
    shift: Sequence[int],
    dilation: Sequence[int],
    span: int,
    mask: str,
    scale: float,
    dropout_p: float,
    keep: bool = True,
    config: GroupAttentionConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward.

    Args:
        q, k, v: (B, height, width, heads, D) and (B, height, width, heads, Dv), not empty, any strides.
        bias: (heads, tokens, tokens) of a group, any float dtype, any strides, or None; for one axis or windows.
        table: (entries, heads), contiguous, the bias by relative position in a group, or None.
        column_table: the same of columns, where both axes are asked for.
        rng: int64 (2,): seed and offset of the dropout, or None.
        layout: "row", "column", "window", or for both axes "sum", "criss_cross".
        window: (height, width) of a window, in tokens.
        shift: by how much the windows are shifted down and right.
        dilation: steps between the tokens of a window.
        span: the largest distance at which a query sees a key; -1 for any.
        mask: of keys that the shift carried around the edge: "-inf" or "-100".
        scale: of the logits.
        dropout_p: share of the weights to drop.
        keep: whether a backward will follow.
        config: warps and so on; chosen from the table when None.

    Returns:
        out (B, height, width, heads, Dv), its axes in memory in q's order; lse (B, height, width, heads), to
        base 2, for "criss_cross", else empty, (0,).
    """
    call = Call(
        q, k, v, bias, table, column_table, rng, layout, window, shift, dilation, span, mask, scale, dropout_p, config
    )
    out = empty_in_order(q, (*q.shape[:4], v.shape[4]))
    joint = layout == "criss_cross"
    lse = other = q.new_empty(q.shape[:4] if joint else (0,), dtype=call.acc_dtype)
    tensors = (call.q, k, v, out)
    unit, align, strides = divided_strides(UNITS, tensors)
    for number, axis in enumerate(call.axes):
        if number == 1 and joint:  # apart, lest a warp writes what another that holds the same rows has yet to read
            other, lse = lse, torch.empty_like(lse)
        tile = call.tile(axis).forward
        each, programs = call.run(axis, tile)
        _group_attention_fwd_kernel[(programs * call.heads,)](
            call.q, k, v, *call.extras(axis), out, lse, other,
            call.scale,
            *call.sizes(axis, each), *strides,
            JOIN=("" if number == 0 else "softmax" if joint else "add"), WRITE_LSE=joint,
            UNIT=unit, ALIGN=align, WIDE=call.wide(tensors), ALIKE=alike(strides), **call.constexprs(axis, tile),
        )  # fmt: skip
    return out, lse
