"""Group attention's backward."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from attnk.groups import table_gradient
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
    reached,
    tile_offsets,
    tile_pointers,
)


@triton.jit
def _group_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, table_ptr, rng_ptr, out_ptr, lse_ptr, dout_ptr,
    dq_ptr, dk_ptr, dv_ptr, partial_ptr,
    scale, dq_scale, dk_scale,
    heads, height, width, n_tokens, n_groups, all_groups, groups_per_program,
    qk_dim: tl.constexpr, v_dim: tl.constexpr, span,
    window_h: tl.constexpr, window_w: tl.constexpr, shift_h, shift_w, dilation_h, dilation_w, padded_h, padded_w,
    stride_bias_h, stride_bias_m, stride_bias_n,
    stride_qb, stride_qy, stride_qx, stride_qh, stride_qd,
    stride_kb, stride_ky, stride_kx, stride_kh, stride_kd,
    stride_vb, stride_vy, stride_vx, stride_vh, stride_vd,
    stride_gb, stride_gy, stride_gx, stride_gh, stride_gd,
    stride_dqb, stride_dqy, stride_dqx, stride_dqh, stride_dqd,
    stride_dkb, stride_dky, stride_dkx, stride_dkh, stride_dkd,
    stride_dvb, stride_dvy, stride_dvx, stride_dvh, stride_dvd,
    stride_ob, stride_oy, stride_ox, stride_oh, stride_od,
    LAYOUT: tl.constexpr, JOINT: tl.constexpr, NO_CENTRE: tl.constexpr, ADD: tl.constexpr,
    NEEDS_DQ: tl.constexpr, NEEDS_DKV: tl.constexpr, NEEDS_DBIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, MASK: tl.constexpr, SPAN: tl.constexpr, PADDED: tl.constexpr,
    THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    SCALE_FIRST: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr,
    WHOLE: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr, QK_DIM: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """One program owns a run of groups of one head.

    JOINT: the softmax went over more than the group, by lse. ADD: to the gradients that the first launch left.
    """
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
        stride_gb, stride_gy, stride_gx, stride_gh, stride_gd = \
            stride_qb, stride_qy, stride_qx, stride_qh, stride_qd
    if ALIKE >= 2:
        stride_dqb, stride_dqy, stride_dqx, stride_dqh, stride_dqd = \
            stride_gb, stride_gy, stride_gx, stride_gh, stride_gd
        stride_dkb, stride_dky, stride_dkx, stride_dkh, stride_dkd = \
            stride_gb, stride_gy, stride_gx, stride_gh, stride_gd
        stride_dvb, stride_dvy, stride_dvx, stride_dvh, stride_dvd = \
            stride_gb, stride_gy, stride_gx, stride_gh, stride_gd
        stride_ob, stride_oy, stride_ox, stride_oh, stride_od = \
            stride_gb, stride_gy, stride_gx, stride_gh, stride_gd
    # fmt: on
    h = tl.program_id(0) % heads
    run = tl.program_id(0) // heads
    first = run * groups_per_program
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
    dout_ptr += h.to(tl.int64) * stride_gh * ALIGN
    dq_ptr += h.to(tl.int64) * stride_dqh * ALIGN
    dk_ptr += h.to(tl.int64) * stride_dkh * ALIGN
    dv_ptr += h.to(tl.int64) * stride_dvh * ALIGN
    out_ptr += h.to(tl.int64) * stride_oh * ALIGN
    q_offs = tile_offsets(down, right, offs_d, stride_qy, stride_qx, stride_qd, UNIT, ALIGN, OFFSET)
    k_offs = tile_offsets(down, right, offs_d, stride_ky, stride_kx, stride_kd, UNIT, ALIGN, OFFSET)
    v_offs = tile_offsets(down, right, offs_v, stride_vy, stride_vx, stride_vd, UNIT, ALIGN, OFFSET)
    g_offs = tile_offsets(down, right, offs_v, stride_gy, stride_gx, stride_gd, UNIT, ALIGN, OFFSET)
    dq_offs = tile_offsets(down, right, offs_d, stride_dqy, stride_dqx, stride_dqd, UNIT, ALIGN, OFFSET)
    dk_offs = tile_offsets(down, right, offs_d, stride_dky, stride_dkx, stride_dkd, UNIT, ALIGN, OFFSET)
    dv_offs = tile_offsets(down, right, offs_v, stride_dvy, stride_dvx, stride_dvd, UNIT, ALIGN, OFFSET)
    o_offs = tile_offsets(down, right, offs_v, stride_oy, stride_ox, stride_od, UNIT, ALIGN, OFFSET)
    if NEEDS_DBIAS:
        dbias = tl.zeros([BLOCK, BLOCK], ACC)
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
        ptrs = tile_pointers(
            dout_ptr, g_offs, b, top, left, below, beyond, padded_h, padded_w,
            stride_gb, stride_gy, stride_gx, WRAP, UNIT, ALIGN, OFFSET,
        )  # fmt: skip
        dout = tl.load(ptrs, mask=mask_v, other=0.0)
        if ADD and NEEDS_DKV:  # what the first launch left, loaded well before it is used
            ptrs = tile_pointers(
                dv_ptr, dv_offs, b, top, left, below, beyond, padded_h, padded_w,
                stride_dvb, stride_dvy, stride_dvx, WRAP, UNIT, ALIGN, OFFSET,
            )  # fmt: skip
            left_dv = tl.load(ptrs, mask=mask_v, other=0.0)
            ptrs = tile_pointers(
                dk_ptr, dk_offs, b, top, left, below, beyond, padded_h, padded_w,
                stride_dkb, stride_dky, stride_dkx, WRAP, UNIT, ALIGN, OFFSET,
            )  # fmt: skip
            left_dk = tl.load(ptrs, mask=mask_d, other=0.0)
        if ADD and NEEDS_DQ:
            ptrs = tile_pointers(
                dq_ptr, dq_offs, b, top, left, below, beyond, padded_h, padded_w,
                stride_dqb, stride_dqy, stride_dqx, WRAP, UNIT, ALIGN, OFFSET,
            )  # fmt: skip
            left_dq = tl.load(ptrs, mask=mask_d, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        if SCALED:
            logits *= log2_scale
        if HAS_BIAS or HAS_TABLE:
            logits += bias
        logits = masked_logits(
            logits, group, limit_y, limit_x, exists, span, window_h, window_w, dilation_h, dilation_w,
            MASK, SPAN, NO_CENTRE, BLOCK, CHECK_KEYS,
        )  # fmt: skip
        if JOINT:
            offs_r = ((b.to(tl.int64) * height + y + down) * width + x + right) * heads + h
            lse = tl.load(lse_ptr + offs_r, mask=exists, other=float("inf"))
            lse = tl.where(lse == float("-inf"), 0.0, lse)
            weights = exponentials(logits, lse, log2_scale, SCALED, REACH, BLOCK)
        else:
            row_max = tl.max(logits, 1)
            row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
            if not SCALED:
                row_max *= log2_scale
            weights = exponentials(logits, row_max, log2_scale, SCALED, REACH, BLOCK)
            row_sum = tl.sum(weights, 1)
            weights *= (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
            weights = tl.where(exists[:, None], weights, 0.0)
        dropped = weights
        if THRESHOLD > 0:
            draw = (group * heads + h) * 2 + (1 if LAYOUT == "column" else 0)
            keep = kept_weights(rng_ptr, draw, 0, 0, THRESHOLD, BLOCK, BLOCK)
            dropped = tl.where(keep, weights, 0.0)
        if NEEDS_DKV:
            dv = tl.dot(tl.trans(dropped.to(dout.dtype)), dout, input_precision=PRECISION, out_dtype=ACC)
            if THRESHOLD > 0:
                dv *= KEEP_SCALE
            ptrs = tile_pointers(
                dv_ptr, dv_offs, b, top, left, below, beyond, padded_h, padded_w,
                stride_dvb, stride_dvy, stride_dvx, WRAP, UNIT, ALIGN, OFFSET,
            )  # fmt: skip
            if ADD:
                dv += left_dv
            tl.store(ptrs, dv.to(v.dtype), mask=mask_v)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        if THRESHOLD > 0:
            dweights = tl.where(keep, dweights * KEEP_SCALE, 0.0)
        if JOINT:
            ptrs = tile_pointers(
                out_ptr, o_offs, b, top, left, below, beyond, padded_h, padded_w,
                stride_ob, stride_oy, stride_ox, WRAP, UNIT, ALIGN, OFFSET,
            )  # fmt: skip
            delta = tl.sum(tl.load(ptrs, mask=mask_v, other=0.0).to(ACC) * dout.to(ACC), 1)
        else:
            delta = tl.sum(weights * dweights, 1)
        dlogits = reached(weights * (dweights - delta[:, None]), REACH, BLOCK)
        if NEEDS_DBIAS:
            dbias += dlogits
        dlogits = dlogits.to(q.dtype)
        if NEEDS_DKV:
            dk = tl.dot(tl.trans(dlogits), q, input_precision=PRECISION, out_dtype=ACC) * dk_scale
            ptrs = tile_pointers(
                dk_ptr, dk_offs, b, top, left, below, beyond, padded_h, padded_w,
                stride_dkb, stride_dky, stride_dkx, WRAP, UNIT, ALIGN, OFFSET,
            )  # fmt: skip
            if ADD:
                dk += left_dk
            tl.store(ptrs, dk.to(q.dtype), mask=mask_d)
        if NEEDS_DQ:
            dq = tl.dot(dlogits, k, input_precision=PRECISION, out_dtype=ACC) * dq_scale
            ptrs = tile_pointers(
                dq_ptr, dq_offs, b, top, left, below, beyond, padded_h, padded_w,
                stride_dqb, stride_dqy, stride_dqx, WRAP, UNIT, ALIGN, OFFSET,
            )  # fmt: skip
            if ADD:
                dq += left_dq
            tl.store(ptrs, dq.to(q.dtype), mask=mask_d)
        b, y, x, step_h, step_w = next_start(
            b, y, x, step_h, step_w, height, width,
            window_h, window_w, dilation_h, dilation_w, padded_h, padded_w, LAYOUT,
        )  # fmt: skip
    if NEEDS_DBIAS:
        base = partial_ptr + (run * heads + h).to(tl.int64) * n_tokens * n_tokens
        mask = (offs_t < n_tokens)[:, None] & (offs_t < n_tokens)[None, :]
        tl.store(base + offs_t[:, None] * n_tokens + offs_t[None, :], dbias, mask=mask)


def group_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    column_table: torch.Tensor | None,
    rng: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    layout: str,
    window: Sequence[int],
    shift: Sequence[int],
    dilation: Sequence[int],
    span: int,
    mask: str,
    scale: float,
    dropout_p: float,
    needs_dq: bool,
    needs_dkv: bool,
    needs_dbias: bool,
    needs_dtables: bool,
    config: GroupAttentionConfig | None = None,
) -> tuple[torch.Tensor, ...]:
    """Launch the backward.

    Args:
        dout: gradient of out, any strides.
        out, lse: what the forward returned, for "criss_cross".
        needs_dq, needs_dkv, needs_dbias, needs_dtables: which gradients to compute.
        config, and all others: as in the forward.

    Returns:
        dq, dk, dv, dbias, dtable, dcolumn_table, shaped like what they are gradients of, the first three with their
        axes in the same order in memory; what is not needed is empty, (0,).
    """
    call = Call(
        q, k, v, bias, table, column_table, rng, layout, window, shift, dilation, span, mask, scale, dropout_p, config
    )
    joint = layout == "criss_cross"
    dq = empty_in_order(q, q.shape) if needs_dq else q.new_empty(0)
    dk = empty_in_order(k, k.shape) if needs_dkv else k.new_empty(0)
    dv = empty_in_order(v, v.shape) if needs_dkv else v.new_empty(0)
    dbias, dtables = q.new_empty(0), {axis: q.new_empty(0) for axis in ("row", "column")}
    grads = tuple(like if grad.dim() == 1 else grad for grad, like in ((dq, q), (dk, k), (dv, v)))
    tensors = (call.q, k, v, dout, *grads, *((out,) if joint else ()))
    unit, align, strides = divided_strides(UNITS, tensors)
    if unit == "any" and divided_strides(UNITS, (call.q, k, v))[0] != "any":  # rather one copy than narrow loads
        dout = empty_in_order(q, dout.shape).copy_(dout)
        tensors = (*tensors[:3], dout, *tensors[4:])
        unit, align, strides = divided_strides(UNITS, tensors)
    for number, axis in enumerate(call.axes):
        tile = call.tile(axis).backward
        n_tokens, axis_table = call.tokens[axis], call.tables[axis]
        wants_pairs = (bias is not None and needs_dbias) or (axis_table is not None and needs_dtables)
        each, programs = call.run(axis, tile, wants_pairs)
        partial = q.new_empty((programs, call.heads, n_tokens, n_tokens) if wants_pairs else (0,), dtype=call.acc_dtype)
        _group_attention_bwd_kernel[(programs * call.heads,)](
            call.q, k, v, *call.extras(axis), out if joint else q, lse if joint else q, dout,
            dq, dk, dv, partial,
            call.scale, call.dq_scale, call.scale,
            *call.sizes(axis, each), *strides, *(() if joint else (0, 0, 0, 0, 0)),
            JOINT=joint, NO_CENTRE=joint and number == 1, ADD=number == 1,
            NEEDS_DQ=needs_dq, NEEDS_DKV=needs_dkv, NEEDS_DBIAS=wants_pairs,
            UNIT=unit, ALIGN=align, WIDE=call.wide(tensors), ALIKE=alike(strides), **call.constexprs(axis, tile),
        )  # fmt: skip
        if wants_pairs:
            pairs = partial.sum(0)
            if bias is not None and needs_dbias:
                dbias = pairs.to(bias.dtype)
            if axis_table is not None and needs_dtables:
                dtable = table_gradient(pairs, call.windows[axis]).to(axis_table.dtype)
                dtables["column" if number else "row"] = dtable
    if needs_dq and q.dtype == torch.float64:
        dq *= scale
    return dq, dk, dv, dbias, dtables["row"], dtables["column"]
