"""Attention inside groups of at most 128 tokens of a feature map: rows, columns, windows, dilated windows.

S = scale q k^T + bias, P = softmax(S), out = dropout(P) v, for each group and head, with q, k, v (B, height, width,
heads, D) read and out written where they lie. A program holds whole groups, so the softmax is plain, and the backward,
one kernel, needs neither out nor statistics: with dP = dropout(dout v^T), delta = rowsum(P * dP) and
dS = P * (dP - delta), dq = scale dS k, dk = scale dS^T q, dv = dropout(P)^T dout. A program visits several groups of
one head, so that the bias is read once for them, and leaves one partial sum of dS for it.

Both axes take one launch each. "sum" adds what columns give to what rows left. "criss_cross" is one softmax over row
and column (https://arxiv.org/abs/1811.11721), the centre counted in the row: the second launch merges by way of lse.

Groups are not packed side by side into one tile, which would carry a NaN from one to another; few warps fill the GPU.

Bytes, with Q, K, V, O those of q, k, v, out, R = 4 B height width heads (8 in fp64), E what programs read of bias or
table, once each, and G what they leave of dS:
one axis     forward Q + K + V + O + E    backward 2 (Q + K + V) + O + E + G
sum          twice that, and what the first launch left is read once more: O, and Q + K + V
criss_cross  as sum, and forward 3R, backward 2 O + 2R
Nothing is summed by atomics.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from attnk.groups import table_gradient
from attnk.memory import empty_in_order

from .attention import LOG2E, divided_strides, kept_weights
from .tuning import (
    DBIAS_GROUP_PROGRAMS,
    GROUP_PROGRAMS,
    GroupAttentionConfig,
    GroupTile,
    architecture,
    group_attention_config,
)

UNITS = (("d", 4), ("x", 2))


@triton.jit
def token_places(
    group, offs_t, height, width, n_groups,
    window_h, window_w, shift_h, shift_w, dilation_h, dilation_w, padded_h, padded_w,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Image, row and column of a group's tokens, and which part of the unshifted map they come from.

    Groups are counted over all images. Tokens that do not exist lie beyond the map.
    """
    b = group // n_groups
    group = group % n_groups
    part = offs_t * 0
    if LAYOUT == "row":
        y = offs_t * 0 + group
        x = offs_t
    elif LAYOUT == "column":
        y = offs_t
        x = offs_t * 0 + group
    else:
        groups_w = padded_w // window_w
        group_h = group // groups_w
        group_w = group % groups_w
        row = offs_t // window_w
        y = (group_h // dilation_h * window_h + row) * dilation_h + group_h % dilation_h
        x = (group_w // dilation_w * window_w + offs_t - row * window_w) * dilation_w + group_w % dilation_w
        exists = row < window_h
        # what the shift carried around the edge is no neighbour
        part = (y >= padded_h - shift_h).to(tl.int32) * 2 + (x >= padded_w - shift_w).to(tl.int32)
        y += shift_h
        x += shift_w
        y = tl.where(exists, tl.where(y >= padded_h, y - padded_h, y), height)
        x = tl.where(x >= padded_w, x - padded_w, x)
    return b, y, x, part


@triton.jit
def tile_pointers(
    ptr, b, h, y, x, offs_d, stride_b, stride_y, stride_x, stride_h, stride_d,
    UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Pointers [tokens, features], 64 bits wide. UNIT names the axis of stride 1; the others come divided by ALIGN."""
    base = ptr + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h) * ALIGN
    offs_y = y.to(tl.int64) * stride_y * ALIGN
    if UNIT == "d":
        return base + (offs_y + x.to(tl.int64) * stride_x * ALIGN)[:, None] + offs_d[None, :]
    elif UNIT == "x":
        return base + (offs_y + x)[:, None] + (offs_d.to(tl.int64) * stride_d * ALIGN)[None, :]
    else:
        return base + (offs_y + x.to(tl.int64) * stride_x)[:, None] + (offs_d.to(tl.int64) * stride_d)[None, :]


@triton.jit
def pair_bias(
    bias_ptr, table_ptr, h, n_tokens, window_h, window_w, heads, stride_bias_h, stride_bias_m, stride_bias_n,
    LAYOUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One head's bias for all pairs of tokens of a group [queries, keys]; 0 if there is none."""
    bias = 0.0
    if HAS_BIAS or HAS_TABLE:
        offs_m = tl.arange(0, BLOCK)[:, None]
        offs_n = tl.arange(0, BLOCK)[None, :]
        mask = (offs_m < n_tokens) & (offs_n < n_tokens)
        if HAS_BIAS:
            offs = h.to(tl.int64) * stride_bias_h + offs_m.to(tl.int64) * stride_bias_m
            offs += offs_n.to(tl.int64) * stride_bias_n
            bias = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(ACC)
        else:
            if LAYOUT == "window":
                down = offs_m // window_w - offs_n // window_w
                entry = (down + window_h - 1) * (2 * window_w - 1)
                entry += offs_m % window_w - offs_n % window_w + window_w - 1
            else:
                entry = offs_m - offs_n + n_tokens - 1
            bias = tl.load(table_ptr + entry * heads + h, mask=mask, other=0.0).to(ACC)
    return bias


@triton.jit
def masked_logits(
    logits, part, n_tokens, span, MASK: tl.constexpr, SPAN: tl.constexpr, NO_CENTRE: tl.constexpr,
    exists, BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Logits with -inf where a query does not see a key; keys of another part get MASK, "-inf" or "-100"."""
    offs_m = tl.arange(0, BLOCK)[:, None]
    offs_n = tl.arange(0, BLOCK)[None, :]
    seen = offs_n < n_tokens
    if PADDED:
        seen = exists[None, :] & (offs_m >= 0)
    if SPAN:
        seen &= (offs_m - offs_n <= span) & (offs_n - offs_m <= span)
    if NO_CENTRE:
        seen &= offs_m != offs_n
    if MASK == "-inf":
        seen &= part[:, None] == part[None, :]
    elif MASK == "-100":
        logits = tl.where(part[:, None] == part[None, :], logits, logits - 100.0)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _group_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, table_ptr, rng_ptr, out_ptr, lse_ptr,
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
    BLOCK: tl.constexpr, QK_DIM: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """One program owns a run of groups of one head. JOIN: "" alone, or how to join what the first launch left."""
    h = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * groups_per_program
    offs_t = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, QK_DIM)
    offs_v = tl.arange(0, V_DIM)
    bias = pair_bias(
        bias_ptr, table_ptr, h, n_tokens, window_h, window_w, heads, stride_bias_h, stride_bias_m, stride_bias_n,
        LAYOUT, HAS_BIAS, HAS_TABLE, BLOCK, ACC,
    )  # fmt: skip
    for group in tl.range(first, tl.minimum(first + groups_per_program, all_groups)):
        b, y, x, part = token_places(
            group, offs_t, height, width, n_groups,
            window_h, window_w, shift_h, shift_w, dilation_h, dilation_w, padded_h, padded_w, LAYOUT,
        )  # fmt: skip
        exists = (y < height) & (x < width)
        mask_d = exists[:, None] & (offs_d < qk_dim)[None, :]
        mask_v = exists[:, None] & (offs_v < v_dim)[None, :]
        ptrs = tile_pointers(
            q_ptr, b, h, y, x, offs_d, stride_qb, stride_qy, stride_qx, stride_qh, stride_qd, UNIT, ALIGN
        )
        q = tl.load(ptrs, mask=mask_d, other=0.0)
        ptrs = tile_pointers(
            k_ptr, b, h, y, x, offs_d, stride_kb, stride_ky, stride_kx, stride_kh, stride_kd, UNIT, ALIGN
        )
        k = tl.load(ptrs, mask=mask_d, other=0.0)
        ptrs = tile_pointers(
            v_ptr, b, h, y, x, offs_v, stride_vb, stride_vy, stride_vx, stride_vh, stride_vd, UNIT, ALIGN
        )
        v = tl.load(ptrs, mask=mask_v, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale
        if HAS_BIAS or HAS_TABLE:
            logits += bias
        logits = masked_logits(logits, part, n_tokens, span, MASK, SPAN, JOIN == "softmax", exists, BLOCK, PADDED)
        row_max = tl.max(logits, 1)
        row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        weights = tl.exp2((logits - row_max[:, None]) * LOG2E)
        row_sum = tl.sum(weights, 1)
        factor = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
        if WRITE_LSE or JOIN == "softmax":
            offs_r = ((b.to(tl.int64) * height + y) * width + x) * heads + h
            lse = row_max + tl.log(row_sum)
            if JOIN == "softmax":
                other = tl.load(lse_ptr + offs_r, mask=exists, other=0.0)
                tl.debug_barrier()  # warps that hold the same rows read before one of them writes
                largest = tl.maximum(lse, other)
                both = largest + tl.log(tl.exp(lse - largest) + tl.exp(other - largest))
                factor *= tl.exp(lse - both)
                lse = both
            tl.store(lse_ptr + offs_r, lse, mask=exists)
        if THRESHOLD > 0:
            draw = (group * heads + h) * 2 + (1 if LAYOUT == "column" else 0)
            keep = kept_weights(rng_ptr, draw, 0, 0, THRESHOLD, BLOCK, BLOCK)
            weights = tl.where(keep, weights, 0.0)
            factor *= KEEP_SCALE
        out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION, out_dtype=ACC) * factor[:, None]
        ptrs = tile_pointers(
            out_ptr, b, h, y, x, offs_v, stride_ob, stride_oy, stride_ox, stride_oh, stride_od, UNIT, ALIGN
        )
        if JOIN == "add":
            out += tl.load(ptrs, mask=mask_v, other=0.0)
        elif JOIN == "softmax":
            out += tl.load(ptrs, mask=mask_v, other=0.0) * tl.exp(other - lse)[:, None]
        tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_v)


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
    BLOCK: tl.constexpr, QK_DIM: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """One program owns a run of groups of one head.

    JOINT: the softmax went over more than the group, by lse. ADD: to the gradients that the first launch left.
    """
    h = tl.program_id(0) % heads
    run = tl.program_id(0) // heads
    first = run * groups_per_program
    offs_t = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, QK_DIM)
    offs_v = tl.arange(0, V_DIM)
    bias = pair_bias(
        bias_ptr, table_ptr, h, n_tokens, window_h, window_w, heads, stride_bias_h, stride_bias_m, stride_bias_n,
        LAYOUT, HAS_BIAS, HAS_TABLE, BLOCK, ACC,
    )  # fmt: skip
    if NEEDS_DBIAS:
        dbias = tl.zeros([BLOCK, BLOCK], ACC)
    for group in tl.range(first, tl.minimum(first + groups_per_program, all_groups)):
        b, y, x, part = token_places(
            group, offs_t, height, width, n_groups,
            window_h, window_w, shift_h, shift_w, dilation_h, dilation_w, padded_h, padded_w, LAYOUT,
        )  # fmt: skip
        exists = (y < height) & (x < width)
        mask_d = exists[:, None] & (offs_d < qk_dim)[None, :]
        mask_v = exists[:, None] & (offs_v < v_dim)[None, :]
        ptrs = tile_pointers(
            q_ptr, b, h, y, x, offs_d, stride_qb, stride_qy, stride_qx, stride_qh, stride_qd, UNIT, ALIGN
        )
        q = tl.load(ptrs, mask=mask_d, other=0.0)
        ptrs = tile_pointers(
            k_ptr, b, h, y, x, offs_d, stride_kb, stride_ky, stride_kx, stride_kh, stride_kd, UNIT, ALIGN
        )
        k = tl.load(ptrs, mask=mask_d, other=0.0)
        ptrs = tile_pointers(
            v_ptr, b, h, y, x, offs_v, stride_vb, stride_vy, stride_vx, stride_vh, stride_vd, UNIT, ALIGN
        )
        v = tl.load(ptrs, mask=mask_v, other=0.0)
        ptrs = tile_pointers(
            dout_ptr, b, h, y, x, offs_v, stride_gb, stride_gy, stride_gx, stride_gh, stride_gd, UNIT, ALIGN
        )
        dout = tl.load(ptrs, mask=mask_v, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale
        if HAS_BIAS or HAS_TABLE:
            logits += bias
        logits = masked_logits(logits, part, n_tokens, span, MASK, SPAN, NO_CENTRE, exists, BLOCK, PADDED)
        if JOINT:
            offs_r = ((b.to(tl.int64) * height + y) * width + x) * heads + h
            lse = tl.load(lse_ptr + offs_r, mask=exists, other=float("inf"))
            lse = tl.where(lse == float("-inf"), 0.0, lse)
            weights = tl.exp2((logits - lse[:, None]) * LOG2E)
        else:
            row_max = tl.max(logits, 1)
            row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
            weights = tl.exp2((logits - row_max[:, None]) * LOG2E)
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
                dv_ptr, b, h, y, x, offs_v, stride_dvb, stride_dvy, stride_dvx, stride_dvh, stride_dvd, UNIT, ALIGN
            )
            if ADD:
                dv += tl.load(ptrs, mask=mask_v, other=0.0)
            tl.store(ptrs, dv.to(v.dtype), mask=mask_v)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        if THRESHOLD > 0:
            dweights = tl.where(keep, dweights * KEEP_SCALE, 0.0)
        if JOINT:
            ptrs = tile_pointers(
                out_ptr, b, h, y, x, offs_v, stride_ob, stride_oy, stride_ox, stride_oh, stride_od, UNIT, ALIGN
            )
            delta = tl.sum(tl.load(ptrs, mask=mask_v, other=0.0).to(ACC) * dout.to(ACC), 1)
        else:
            delta = tl.sum(weights * dweights, 1)
        dlogits = weights * (dweights - delta[:, None])
        if NEEDS_DBIAS:
            dbias += dlogits
        dlogits = dlogits.to(q.dtype)
        if NEEDS_DKV:
            dk = tl.dot(tl.trans(dlogits), q, input_precision=PRECISION, out_dtype=ACC) * dk_scale
            ptrs = tile_pointers(
                dk_ptr, b, h, y, x, offs_d, stride_dkb, stride_dky, stride_dkx, stride_dkh, stride_dkd, UNIT, ALIGN
            )
            if ADD:
                dk += tl.load(ptrs, mask=mask_d, other=0.0)
            tl.store(ptrs, dk.to(q.dtype), mask=mask_d)
        if NEEDS_DQ:
            dq = tl.dot(dlogits, k, input_precision=PRECISION, out_dtype=ACC) * dq_scale
            ptrs = tile_pointers(
                dq_ptr, b, h, y, x, offs_d, stride_dqb, stride_dqy, stride_dqx, stride_dqh, stride_dqd, UNIT, ALIGN
            )
            if ADD:
                dq += tl.load(ptrs, mask=mask_d, other=0.0)
            tl.store(ptrs, dq.to(q.dtype), mask=mask_d)
    if NEEDS_DBIAS:
        base = partial_ptr + (run * heads + h).to(tl.int64) * n_tokens * n_tokens
        mask = (offs_t < n_tokens)[:, None] & (offs_t < n_tokens)[None, :]
        tl.store(base + offs_t[:, None] * n_tokens + offs_t[None, :], dbias, mask=mask)


def padded_side(size: int) -> int:
    """The side of the tile that holds a size: a power of two, as matrix products want it."""
    return max(16, 1 << (size - 1).bit_length())


class Call:
    """What the launches of one call take: sizes, extras and constexprs, by axis."""

    def __init__(
        self,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        bias: torch.Tensor | None, table: torch.Tensor | None, column_table: torch.Tensor | None,
        rng: torch.Tensor | None,
        layout: str, window: Sequence[int], shift: Sequence[int], dilation: Sequence[int], span: int, mask: str,
        scale: float, dropout_p: float,
        config: GroupAttentionConfig | None,
    ) -> None:  # fmt: skip
        batch, height, width, self.heads, qk_dim = q.shape
        v_dim = v.shape[4]
        double = q.dtype == torch.float64
        self.dq_scale = 1.0 if double else scale
        if double:  # a float argument has 32 bits, so the scale is in q
            q, scale = q * scale, 1.0
        self.scale = scale
        self.acc_dtype = torch.float64 if double else torch.float32
        self.q, self.k, self.v = q, k, v
        self.layout, self.axes = layout, ("row", "column") if layout in ("sum", "criss_cross") else (layout,)
        self.bias, self.rng = bias, rng
        self.tables = {axis: column_table if axis == "column" and len(self.axes) == 2 else table for axis in self.axes}
        sizes = {"row": (1, width), "column": (height, 1), "window": tuple(window)}
        self.windows = {axis: sizes[axis] for axis in self.axes}
        self.tokens = {axis: rows * columns for axis, (rows, columns) in self.windows.items()}
        padded = [
            -(-size // (part * step)) * part * step
            for size, part, step in zip((height, width), window, dilation, strict=True)
        ]
        self.geometry = (*shift, *dilation, *padded)
        groups = {"row": height, "column": width, "window": padded[0] * padded[1] // (window[0] * window[1])}
        self.groups = {axis: groups[axis] for axis in self.axes}
        self.batch, self.map_size, self.dims, self.span = batch, (height, width), (qk_dim, v_dim), span
        self.config = config
        tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        self.options = {
            "HAS_BIAS": bias is not None,
            "MASK": mask if layout == "window" and any(shift) else "",
            "SPAN": span >= 0,
            "PADDED": layout == "window" and tuple(padded) != (height, width),
            "THRESHOLD": min(round(dropout_p * 2**32), 2**32 - 1),
            "KEEP_SCALE": 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
            "PRECISION": "tf32" if tf32 else "ieee",
            "ACC": tl.float64 if double else tl.float32,
            "QK_DIM": padded_side(qk_dim),
            "V_DIM": padded_side(v_dim),
        }

    def tile(self, axis: str) -> GroupAttentionConfig:
        """How the kernels are cut up along an axis."""
        if self.config is not None:
            return self.config
        sizes = {"itemsize": self.q.element_size(), "tokens": self.tokens[axis], "head_dim": max(self.dims)}
        extras = (self.bias is not None or self.tables[axis] is not None) + (self.rng is not None)
        config = group_attention_config(architecture(self.q.device), **sizes, extras=extras)
        if config is None:
            raise LookupError(f"no row of GROUP_ATTENTION_TABLE fits: {sizes}, {extras=}")
        return config

    def run(self, axis: str, tile: GroupTile, leaves_pairs: bool = False) -> tuple[int, int]:
        """Groups a program, and programs a head: groups are gathered while enough programs remain."""
        programs, most = GROUP_PROGRAMS, tile.groups
        if leaves_pairs:
            programs, most = DBIAS_GROUP_PROGRAMS, 4 * most
        all_groups = self.batch * self.groups[axis]
        each = max(1, min(most, all_groups * self.heads // programs))
        return each, -(-all_groups // each)

    def extras(self, axis: str) -> tuple[torch.Tensor, ...]:
        """Bias, table and seed; q where there is none."""
        return tuple(self.q if extra is None else extra for extra in (self.bias, self.tables[axis], self.rng))

    def sizes(self, axis: str, each: int) -> tuple[int, ...]:
        """The integers that both kernels take, before the strides of tensors."""
        groups = self.groups[axis]
        return (
            self.heads, *self.map_size, self.tokens[axis], groups, self.batch * groups, each, *self.dims, self.span,
            *(self.windows[axis] if axis == "window" else (1, 1)), *self.geometry,
            *((0, 0, 0) if self.bias is None else self.bias.stride()),
        )  # fmt: skip

    def constexprs(self, axis: str, tile: GroupTile) -> dict[str, object]:
        """The constexprs that both kernels take, and compile options."""
        block = padded_side(self.tokens[axis])
        own = {"LAYOUT": axis, "BLOCK": block, "HAS_TABLE": self.tables[axis] is not None}
        return self.options | own | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


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
        out (B, height, width, heads, Dv), its axes in memory in q's order; lse (B, height, width, heads) for
        "criss_cross", else empty, (0,).
    """
    call = Call(
        q, k, v, bias, table, column_table, rng, layout, window, shift, dilation, span, mask, scale, dropout_p, config
    )
    out = empty_in_order(q, (*q.shape[:4], v.shape[4]))
    joint = layout == "criss_cross"
    lse = q.new_empty(q.shape[:4] if joint else (0,), dtype=call.acc_dtype)
    unit, align, strides = divided_strides(UNITS, (call.q, k, v, out))
    for number, axis in enumerate(call.axes):
        tile = call.tile(axis).forward
        each, programs = call.run(axis, tile)
        _group_attention_fwd_kernel[(programs * call.heads,)](
            call.q, k, v, *call.extras(axis), out, lse,
            call.scale,
            *call.sizes(axis, each), *strides,
            JOIN=("" if number == 0 else "softmax" if joint else "add"), WRITE_LSE=joint,
            UNIT=unit, ALIGN=align, **call.constexprs(axis, tile),
        )  # fmt: skip
    return out, lse


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
        unit, align, strides = divided_strides(UNITS, (*tensors[:3], dout, *tensors[4:]))
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
            UNIT=unit, ALIGN=align, **call.constexprs(axis, tile),
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
