"""Softmax attention's forward."""

import torch
import triton
import triton.language as tl

from attnk.memory import empty_in_order

from ..attention import LN2, LOG2E, kept_weights
from ..tuning import SoftmaxAttentionConfig
from .common import (
    Call,
    add_extras,
    addressed,
    dot_rows,
    exponential,
    key_offset,
    load_at,
    load_bias,
    load_pairs,
    load_tile,
    pair_offsets,
    query_offset,
    store_tile,
    table_position,
    tile_offsets,
    token_offset,
)


@triton.jit
def _softmax_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, table_ptr, rng_ptr,
    out_ptr, lse_ptr, row_max_ptr, log_sum_ptr,
    scale,
    heads, group, n_queries, n_keys, qk_dim, v_dim, width, table_centre,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_on, stride_od,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_table_h,
    HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    QK_MAIN: tl.constexpr, QK_TAIL: tl.constexpr, CHECK_QK: tl.constexpr,
    V_MAIN: tl.constexpr, V_TAIL: tl.constexpr, CHECK_V: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, OFFSETS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BIAS_ALIGN: tl.constexpr, MASK_ALIGN: tl.constexpr, KEYS_ALIGN: tl.constexpr, EXTRA_OFFSETS: tl.constexpr,
    KEEP: tl.constexpr, WRITE_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M queries of one head. The keys beyond the last whole block make a block of REST."""
    TWO_STATS: tl.constexpr = HAS_BIAS or HAS_TABLE
    LOG2_UNITS: tl.constexpr = not (HAS_BIAS or HAS_TABLE or tl.float64 == ACC)
    CHECK_QK_MAIN: tl.constexpr = CHECK_QK and QK_TAIL == 0
    CHECK_V_MAIN: tl.constexpr = CHECK_V and V_TAIL == 0
    n_blocks = tl.cdiv(n_queries, BLOCK_M)
    head = tl.program_id(0) // n_blocks  # of all batches
    block = tl.program_id(0) % n_blocks
    if CAUSAL:
        block = n_blocks - 1 - block  # the longest first
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)

    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, QK_MAIN)
    offs_v = tl.arange(0, V_MAIN)
    q_ptr += (b * stride_qb + h * stride_qh) * ALIGN
    k_ptr += (b * stride_kb + h // group * stride_kh) * ALIGN
    v_ptr += (b * stride_vb + h // group * stride_vh) * ALIGN
    start_m = block * BLOCK_M
    bias_ptr += (b * stride_bias_b + h * stride_bias_h) * BIAS_ALIGN + query_offset(start_m, stride_bias_m, BIAS_ALIGN)
    mask_ptr += (b * stride_mask_b + h * stride_mask_h) * MASK_ALIGN + query_offset(start_m, stride_mask_m, MASK_ALIGN)
    table_ptr += h * stride_table_h + table_centre
    q = load_tile(q_ptr, offs_m, offs_d, stride_qn, stride_qd, n_queries, qk_dim, True, CHECK_QK_MAIN, UNIT, ALIGN)
    q_tail = q
    if QK_TAIL > 0:
        offs_dt = QK_MAIN + tl.arange(0, QK_TAIL)
        q_tail = load_tile(q_ptr, offs_m, offs_dt, stride_qn, stride_qd, n_queries, qk_dim, True, CHECK_QK, UNIT, ALIGN)

    queries = tl.minimum(tl.arange(0, BLOCK_M), n_queries - 1 - start_m)  # what those beyond the last get is not used
    position_m = table_position(offs_m, n_queries, width, HAS_TABLE)
    row_max = tl.full([BLOCK_M], float("-inf"), ACC)
    row_sum = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, V_MAIN], ACC)
    acc_tail = acc
    if V_TAIL > 0:
        offs_vt = V_MAIN + tl.arange(0, V_TAIL)
        acc_tail = tl.zeros([BLOCK_M, V_TAIL], ACC)
    end = n_keys
    n_whole = n_keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(n_keys, (block + 1) * BLOCK_M)
        n_whole = tl.minimum(n_whole, (block * BLOCK_M + 1) // BLOCK_N * BLOCK_N)
    for CHECK in tl.static_range(2):  # the blocks that every query sees whole, then the others
        begin = n_whole if CHECK else 0
        stop = end if CHECK else n_whole
        # what moves along in the loop are scalars: these offsets stay
        keys = tl.arange(0, REST if CHECK else BLOCK_N)
        k_tile = tile_offsets(keys, offs_d, stride_kn, stride_kd, UNIT, ALIGN, OFFSETS)
        v_tile = tile_offsets(keys, offs_v, stride_vn, stride_vd, UNIT, ALIGN, OFFSETS)
        bias_tile = pair_offsets(queries, keys, 0, 1, stride_bias_m, stride_bias_n, BIAS_ALIGN, EXTRA_OFFSETS)
        mask_tile = pair_offsets(queries, keys, 0, 1, stride_mask_m, stride_mask_n, MASK_ALIGN, EXTRA_OFFSETS)
        if begin < stop:  # a loop that may have no step has ptxas serialize the products on sm_90
            for start in tl.range(begin, stop, BLOCK_N):
                offs_n = start + keys
                k_base = k_ptr + token_offset(start, stride_kn, UNIT, ALIGN)
                v_base = v_ptr + token_offset(start, stride_vn, UNIT, ALIGN)
                k = load_at(k_base, k_tile, offs_n, offs_d, n_keys, qk_dim, CHECK, CHECK_QK_MAIN)
                k_tail = k
                if QK_TAIL > 0:
                    kt_tile = tile_offsets(keys, offs_dt, stride_kn, stride_kd, UNIT, ALIGN, OFFSETS)
                    k_tail = load_at(k_base, kt_tile, offs_n, offs_dt, n_keys, qk_dim, CHECK, CHECK_QK)
                position_n = table_position(offs_n, n_keys, width, HAS_TABLE)
                bias = load_bias(
                    bias_ptr + key_offset(start, stride_bias_n), bias_tile, table_ptr, position_m, position_n,
                    offs_n, n_keys, 0, 1, CHECK, KEYS_ALIGN, HAS_BIAS, HAS_TABLE, ACC,
                )  # fmt: skip
                allowed = 0
                if HAS_MASK:
                    mask_base = mask_ptr + key_offset(start, stride_mask_n)
                    allowed = load_pairs(mask_base, mask_tile, offs_n, 0, n_keys, CHECK, KEYS_ALIGN)
                logits = dot_rows(q, q_tail, k, k_tail, QK_TAIL > 0, PRECISION, ACC)  # [BLOCK_M, BLOCK_N]
                if TWO_STATS:
                    logits *= scale
                logits = add_extras(logits, bias, allowed, HAS_BIAS, HAS_TABLE, HAS_MASK)
                if CHECK:
                    seen = offs_n[None, :] < n_keys
                    if CAUSAL:
                        seen &= offs_m[:, None] >= offs_n[None, :]
                    logits = tl.where(seen, logits, float("-inf"))

                block_max = tl.max(logits, 1)
                if not TWO_STATS:  # scale > 0: the maximum before scaling, which is left to a multiply-add
                    block_max *= scale
                new_max = tl.maximum(row_max, block_max)
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
                if TWO_STATS:
                    weights = tl.exp2((logits - shift[:, None]) * LOG2E)
                else:
                    weights = exponential(logits * scale - shift[:, None], LOG2_UNITS)
                correction = exponential(row_max - shift, LOG2_UNITS)
                row_sum = row_sum * correction + tl.sum(weights, 1)
                row_max = new_max
                if THRESHOLD > 0:
                    keep = kept_weights(rng_ptr, head, block * BLOCK_M, start, THRESHOLD, BLOCK_M, keys.shape[0])
                    weights = tl.where(keep, weights, 0.0)
                weights = weights.to(v_ptr.dtype.element_ty)
                v = load_at(v_base, v_tile, offs_n, offs_v, n_keys, v_dim, CHECK, CHECK_V_MAIN)
                acc = tl.dot(weights, v, acc * correction[:, None], input_precision=PRECISION, out_dtype=ACC)
                if V_TAIL > 0:
                    vt_tile = tile_offsets(keys, offs_vt, stride_vn, stride_vd, UNIT, ALIGN, OFFSETS)
                    v = load_at(v_base, vt_tile, offs_n, offs_vt, n_keys, v_dim, CHECK, CHECK_V)
                    acc_tail = tl.dot(
                        weights, v, acc_tail * correction[:, None], input_precision=PRECISION, out_dtype=ACC
                    )

    unseeing = row_sum == 0.0
    row_sum = tl.where(unseeing, 1.0, row_sum)
    factor = ((KEEP_SCALE if THRESHOLD > 0 else 1.0) / row_sum)[:, None]
    out_ptr += (b * stride_ob + h * stride_oh) * ALIGN
    store_tile(out_ptr, acc * factor, offs_m, offs_v, stride_on, stride_od, n_queries, v_dim, UNIT, ALIGN)
    if V_TAIL > 0:
        store_tile(out_ptr, acc_tail * factor, offs_m, offs_vt, stride_on, stride_od, n_queries, v_dim, UNIT, ALIGN)
    log_sum = tl.log2(row_sum) if LOG2_UNITS else tl.log(row_sum)
    offs_r = head.to(tl.int64) * n_queries + offs_m
    if WRITE_LSE:
        lse = (row_max + log_sum) * LN2 if LOG2_UNITS else row_max + log_sum
        tl.store(lse_ptr + offs_r, lse, mask=offs_m < n_queries)
    if KEEP:
        row_max = tl.where(unseeing, float("inf"), row_max)  # which makes all weights 0
        if not TWO_STATS:
            row_max += log_sum
        else:
            tl.store(log_sum_ptr + offs_r, log_sum, mask=offs_m < n_queries)
        tl.store(row_max_ptr + offs_r, row_max, mask=offs_m < n_queries)


def softmax_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    table: torch.Tensor | None,
    rng: torch.Tensor | None,
    width: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    keep: bool = True,
    wants_lse: bool = False,
    config: SoftmaxAttentionConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward.

    Args:
        q, k, v: (B, heads, Nq, D), (B, key heads, Nk, D), (B, key heads, Nk, Dv), not empty, any strides.
        bias: (B or 1, heads or 1, Nq or 1, Nk), any float dtype, or None.
        mask: bool, each axis of (B, heads, Nq, Nk) or 1, or None.
        table: ((2 height - 1) (2 width - 1), heads) or None.
        rng: int64 (2,): seed and offset of the dropout, or None.
        width: of the grid that the table is for.
        scale: of the logits.
        is_causal: whether query i sees the keys up to i alone.
        dropout_p: share of the weights to drop.
        keep: whether a backward will follow.
        wants_lse: whether to write lse.
        config: block sizes and so on; chosen from the table when None.

    Returns:
        out (B, heads, Nq, Dv), its axes in memory in q's order; lse, row_max, log_sum (B, heads, Nq), the last two in
        the kernels' units: without bias and table, row_max is the sum of both. What is not wanted is empty, (0,).
    """
    call = Call(q, k, v, bias, mask, table, rng, width, scale, is_causal, dropout_p, config)
    rows = q.shape[:3]
    out = empty_in_order(q, (*rows, v.shape[-1]))
    lse = q.new_empty(rows if wants_lse else (0,), dtype=call.acc_dtype)
    row_max = q.new_empty(rows if keep else (0,), dtype=call.acc_dtype)
    log_sum = q.new_empty(rows if keep and (bias is not None or table is not None) else (0,), dtype=call.acc_dtype)
    address, strides = addressed(call.q, k, v, out)
    tile = call.config.forward
    _softmax_attention_fwd_kernel[(triton.cdiv(call.n_queries, tile.block_m) * call.all_heads,)](
        *call.inputs,
        out, lse, row_max, log_sum,
        call.logit_scale,
        *call.sizes,
        *strides, *call.extra_strides,
        KEEP=keep, WRITE_LSE=wants_lse, REST=call.rest(call.n_keys, tile.block_n), **address, **call.cut(tile),
    )  # fmt: skip
    return out, lse, row_max, log_sum
