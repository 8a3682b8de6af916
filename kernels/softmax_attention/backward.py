"""Softmax attention's backward: delta and dq, then dk and dv, then the gradients of a bias and of a bias table."""

import math

import torch
import triton
import triton.language as tl

from attnk.memory import empty_in_order

from ..attention import kept_weights
from ..tuning import DBIAS_PROGRAMS, DBIAS_SCRATCH_BYTES, SoftmaxAttentionConfig
from .common import (
    Call,
    add_extras,
    addressed,
    dot_rows,
    key_offset,
    load_at,
    load_bias,
    load_pairs,
    load_row_stats,
    load_rows,
    load_tile,
    pair_offsets,
    probabilities,
    query_offset,
    store_tile,
    table_position,
    tile_offsets,
    token_offset,
)


@triton.jit
def _softmax_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, table_ptr, rng_ptr,
    out_ptr, dout_ptr, dlse_ptr, row_max_ptr, log_sum_ptr,
    delta_ptr, dq_ptr,
    scale, dq_scale,
    heads, group, n_queries, n_keys, qk_dim, v_dim, width, table_centre,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_on, stride_od,
    stride_gb, stride_gh, stride_gn, stride_gd,
    stride_dqb, stride_dqh, stride_dqn, stride_dqd,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_table_h,
    HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    QK_MAIN: tl.constexpr, QK_TAIL: tl.constexpr, CHECK_QK: tl.constexpr,
    V_MAIN: tl.constexpr, V_TAIL: tl.constexpr, CHECK_V: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, OFFSETS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BIAS_ALIGN: tl.constexpr, MASK_ALIGN: tl.constexpr, KEYS_ALIGN: tl.constexpr, EXTRA_OFFSETS: tl.constexpr,
    HAS_DLSE: tl.constexpr, NEEDS_DQ: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M queries of one head: their delta, which the other kernels read, and their dq.

    The keys beyond the last whole block make a block of REST.
    """
    TWO_STATS: tl.constexpr = HAS_BIAS or HAS_TABLE
    LOG2_UNITS: tl.constexpr = not (HAS_BIAS or HAS_TABLE or tl.float64 == ACC)
    CHECK_QK_MAIN: tl.constexpr = CHECK_QK and QK_TAIL == 0
    CHECK_V_MAIN: tl.constexpr = CHECK_V and V_TAIL == 0
    n_blocks = tl.cdiv(n_queries, BLOCK_M)
    head = tl.program_id(0) // n_blocks
    block = tl.program_id(0) % n_blocks
    if CAUSAL:
        block = n_blocks - 1 - block
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)

    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tl.arange(0, V_MAIN)
    out_ptr += (b * stride_ob + h * stride_oh) * ALIGN
    dout_ptr += (b * stride_gb + h * stride_gh) * ALIGN
    out = load_tile(out_ptr, offs_m, offs_v, stride_on, stride_od, n_queries, v_dim, True, CHECK_V_MAIN, UNIT, ALIGN)
    dout = load_tile(dout_ptr, offs_m, offs_v, stride_gn, stride_gd, n_queries, v_dim, True, CHECK_V_MAIN, UNIT, ALIGN)
    delta = tl.sum(out.to(ACC) * dout.to(ACC), 1)
    dout_tail = dout
    if V_TAIL > 0:
        offs_vt = V_MAIN + tl.arange(0, V_TAIL)
        out = load_tile(out_ptr, offs_m, offs_vt, stride_on, stride_od, n_queries, v_dim, True, CHECK_V, UNIT, ALIGN)
        dout_tail = load_tile(
            dout_ptr, offs_m, offs_vt, stride_gn, stride_gd, n_queries, v_dim, True, CHECK_V, UNIT, ALIGN
        )
        delta += tl.sum(out.to(ACC) * dout_tail.to(ACC), 1)
    offs_r = head.to(tl.int64) * n_queries + offs_m
    mask_m = offs_m < n_queries
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + offs_r, mask=mask_m, other=0.0)
    tl.store(delta_ptr + offs_r, delta, mask=mask_m)

    if NEEDS_DQ:
        q_ptr += (b * stride_qb + h * stride_qh) * ALIGN
        k_ptr += (b * stride_kb + h // group * stride_kh) * ALIGN
        v_ptr += (b * stride_vb + h // group * stride_vh) * ALIGN
        start_m = block * BLOCK_M
        bias_ptr += (b * stride_bias_b + h * stride_bias_h) * BIAS_ALIGN
        bias_ptr += query_offset(start_m, stride_bias_m, BIAS_ALIGN)
        mask_ptr += (b * stride_mask_b + h * stride_mask_h) * MASK_ALIGN
        mask_ptr += query_offset(start_m, stride_mask_m, MASK_ALIGN)
        table_ptr += h * stride_table_h + table_centre
        position_m = table_position(offs_m, n_queries, width, HAS_TABLE)
        offs_d = tl.arange(0, QK_MAIN)
        q = load_tile(q_ptr, offs_m, offs_d, stride_qn, stride_qd, n_queries, qk_dim, True, CHECK_QK_MAIN, UNIT, ALIGN)
        q_tail = q
        dq = tl.zeros([BLOCK_M, QK_MAIN], ACC)
        dq_tail = dq
        if QK_TAIL > 0:
            offs_dt = QK_MAIN + tl.arange(0, QK_TAIL)
            q_tail = load_tile(
                q_ptr, offs_m, offs_dt, stride_qn, stride_qd, n_queries, qk_dim, True, CHECK_QK, UNIT, ALIGN
            )
            dq_tail = tl.zeros([BLOCK_M, QK_TAIL], ACC)
        row_max, log_sum = load_row_stats(row_max_ptr, log_sum_ptr, offs_r, mask_m, True, TWO_STATS)
        queries = tl.minimum(tl.arange(0, BLOCK_M), n_queries - 1 - start_m)
        end = n_keys
        n_whole = n_keys // BLOCK_N * BLOCK_N
        if CAUSAL:
            end = tl.minimum(n_keys, (block + 1) * BLOCK_M)
            n_whole = tl.minimum(n_whole, (block * BLOCK_M + 1) // BLOCK_N * BLOCK_N)
        for CHECK in tl.static_range(2):
            begin = n_whole if CHECK else 0
            stop = end if CHECK else n_whole
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
                    v = load_at(v_base, v_tile, offs_n, offs_v, n_keys, v_dim, CHECK, CHECK_V_MAIN)
                    k_tail = k
                    v_tail = v
                    if QK_TAIL > 0:
                        kt_tile = tile_offsets(keys, offs_dt, stride_kn, stride_kd, UNIT, ALIGN, OFFSETS)
                        k_tail = load_at(k_base, kt_tile, offs_n, offs_dt, n_keys, qk_dim, CHECK, CHECK_QK)
                    if V_TAIL > 0:
                        vt_tile = tile_offsets(keys, offs_vt, stride_vn, stride_vd, UNIT, ALIGN, OFFSETS)
                        v_tail = load_at(v_base, vt_tile, offs_n, offs_vt, n_keys, v_dim, CHECK, CHECK_V)
                    position_n = table_position(offs_n, n_keys, width, HAS_TABLE)
                    bias = load_bias(
                        bias_ptr + key_offset(start, stride_bias_n), bias_tile, table_ptr, position_m, position_n,
                        offs_n, n_keys, 0, 1, CHECK, KEYS_ALIGN, HAS_BIAS, HAS_TABLE, ACC,
                    )  # fmt: skip
                    allowed = 0
                    if HAS_MASK:
                        mask_base = mask_ptr + key_offset(start, stride_mask_n)
                        allowed = load_pairs(mask_base, mask_tile, offs_n, 0, n_keys, CHECK, KEYS_ALIGN)
                    logits = dot_rows(q, q_tail, k, k_tail, QK_TAIL > 0, PRECISION, ACC) * scale  # [BLOCK_M, BLOCK_N]
                    logits = add_extras(logits, bias, allowed, HAS_BIAS, HAS_TABLE, HAS_MASK)
                    weights = probabilities(logits, row_max[:, None], log_sum[:, None], TWO_STATS, LOG2_UNITS)
                    if CHECK:
                        seen = offs_n[None, :] < n_keys
                        if CAUSAL:
                            seen &= offs_m[:, None] >= offs_n[None, :]
                        weights = tl.where(seen, weights, 0.0)
                    dweights = dot_rows(dout, dout_tail, v, v_tail, V_TAIL > 0, PRECISION, ACC)
                    if THRESHOLD > 0:
                        keep = kept_weights(rng_ptr, head, block * BLOCK_M, start, THRESHOLD, BLOCK_M, keys.shape[0])
                        dweights = tl.where(keep, dweights, 0.0) * KEEP_SCALE
                    dlogits = (weights * (dweights - delta[:, None])).to(k.dtype)
                    dq = tl.dot(dlogits, k, dq, input_precision=PRECISION, out_dtype=ACC)
                    if QK_TAIL > 0:
                        dq_tail = tl.dot(dlogits, k_tail, dq_tail, input_precision=PRECISION, out_dtype=ACC)
        dq_ptr += (b * stride_dqb + h * stride_dqh) * ALIGN
        store_tile(dq_ptr, dq * dq_scale, offs_m, offs_d, stride_dqn, stride_dqd, n_queries, qk_dim, UNIT, ALIGN)
        if QK_TAIL > 0:
            store_tile(
                dq_ptr, dq_tail * dq_scale, offs_m, offs_dt, stride_dqn, stride_dqd, n_queries, qk_dim, UNIT, ALIGN
            )


@triton.jit
def _softmax_attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, table_ptr, rng_ptr,
    dout_ptr, row_max_ptr, log_sum_ptr, delta_ptr,
    dk_ptr, dv_ptr,
    scale, dk_scale,
    heads, group, n_queries, n_keys, qk_dim, v_dim, width, table_centre,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_gb, stride_gh, stride_gn, stride_gd,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd,
    stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_table_h,
    HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    QK_MAIN: tl.constexpr, QK_TAIL: tl.constexpr, CHECK_QK: tl.constexpr,
    V_MAIN: tl.constexpr, V_TAIL: tl.constexpr, CHECK_V: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, OFFSETS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BIAS_ALIGN: tl.constexpr, MASK_ALIGN: tl.constexpr, KEYS_ALIGN: tl.constexpr, EXTRA_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_N keys of one key head and visits all queries of its group of heads.

    The queries beyond the last whole block make a block of REST.
    Tiles of logits lie [keys, queries] here, so that they are left operands of both sums as they stand.
    """
    TWO_STATS: tl.constexpr = HAS_BIAS or HAS_TABLE
    LOG2_UNITS: tl.constexpr = not (HAS_BIAS or HAS_TABLE or tl.float64 == ACC)
    CHECK_QK_MAIN: tl.constexpr = CHECK_QK and QK_TAIL == 0
    CHECK_V_MAIN: tl.constexpr = CHECK_V and V_TAIL == 0
    n_blocks = tl.cdiv(n_keys, BLOCK_N)
    key_heads = heads // group
    key_head = tl.program_id(0) // n_blocks
    start_n = tl.program_id(0) % n_blocks * BLOCK_N
    b = (key_head // key_heads).to(tl.int64)
    h_k = (key_head % key_heads).to(tl.int64)

    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, QK_MAIN)
    offs_v = tl.arange(0, V_MAIN)
    k_ptr += (b * stride_kb + h_k * stride_kh) * ALIGN
    v_ptr += (b * stride_vb + h_k * stride_vh) * ALIGN
    k = load_tile(k_ptr, offs_n, offs_d, stride_kn, stride_kd, n_keys, qk_dim, True, CHECK_QK_MAIN, UNIT, ALIGN)
    v = load_tile(v_ptr, offs_n, offs_v, stride_vn, stride_vd, n_keys, v_dim, True, CHECK_V_MAIN, UNIT, ALIGN)
    dk = tl.zeros([BLOCK_N, QK_MAIN], ACC)
    dv = tl.zeros([BLOCK_N, V_MAIN], ACC)
    k_tail = k
    v_tail = v
    dk_tail = dk
    dv_tail = dv
    if QK_TAIL > 0:
        offs_dt = QK_MAIN + tl.arange(0, QK_TAIL)
        k_tail = load_tile(k_ptr, offs_n, offs_dt, stride_kn, stride_kd, n_keys, qk_dim, True, CHECK_QK, UNIT, ALIGN)
        dk_tail = tl.zeros([BLOCK_N, QK_TAIL], ACC)
    if V_TAIL > 0:
        offs_vt = V_MAIN + tl.arange(0, V_TAIL)
        v_tail = load_tile(v_ptr, offs_n, offs_vt, stride_vn, stride_vd, n_keys, v_dim, True, CHECK_V, UNIT, ALIGN)
        dv_tail = tl.zeros([BLOCK_N, V_TAIL], ACC)

    position_n = table_position(offs_n, n_keys, width, HAS_TABLE)
    # queries that all exist and see all these keys, in whole blocks, and the blocks to check: diagonal and last
    m_whole = n_queries // BLOCK_M * BLOCK_M
    first = 0
    begin = 0
    n_diagonal = 0
    if CAUSAL:
        first = start_n // BLOCK_M * BLOCK_M
        begin = tl.minimum(tl.cdiv(start_n + BLOCK_N - 1, BLOCK_M) * BLOCK_M, m_whole)
        n_diagonal = tl.maximum(begin - first, 0) // BLOCK_M
    n_whole = (m_whole - begin) // BLOCK_M
    n_checked = n_diagonal + (n_queries > m_whole)
    keys = tl.arange(0, BLOCK_N)
    for member in tl.range(group):
        h = h_k * group + member
        head = (b * heads + h).to(tl.int32)
        q_head = q_ptr + (b * stride_qb + h * stride_qh) * ALIGN
        dout_head = dout_ptr + (b * stride_gb + h * stride_gh) * ALIGN
        bias_head = bias_ptr + (b * stride_bias_b + h * stride_bias_h) * BIAS_ALIGN + key_offset(start_n, stride_bias_n)
        mask_head = mask_ptr + (b * stride_mask_b + h * stride_mask_h) * MASK_ALIGN + key_offset(start_n, stride_mask_n)
        table_head = table_ptr + h * stride_table_h + table_centre
        rows = (b * heads + h) * n_queries
        for CHECK in tl.static_range(2):
            queries = tl.arange(0, REST if CHECK else BLOCK_M)
            q_tile = tile_offsets(queries, offs_d, stride_qn, stride_qd, UNIT, ALIGN, OFFSETS)
            dout_tile = tile_offsets(queries, offs_v, stride_gn, stride_gd, UNIT, ALIGN, OFFSETS)
            bias_tile = pair_offsets(queries, keys, 1, 0, stride_bias_m, stride_bias_n, BIAS_ALIGN, EXTRA_OFFSETS)
            mask_tile = pair_offsets(queries, keys, 1, 0, stride_mask_m, stride_mask_n, MASK_ALIGN, EXTRA_OFFSETS)
            for step in tl.range(n_checked if CHECK else n_whole):
                start = begin + step * BLOCK_M
                if CHECK:
                    start = tl.where(step < n_diagonal, first + step * BLOCK_M, tl.maximum(m_whole, first))
                offs_m = start + queries
                q_base = q_head + token_offset(start, stride_qn, UNIT, ALIGN)
                dout_base = dout_head + token_offset(start, stride_gn, UNIT, ALIGN)
                q = load_at(q_base, q_tile, offs_m, offs_d, n_queries, qk_dim, CHECK, CHECK_QK_MAIN)
                dout = load_at(dout_base, dout_tile, offs_m, offs_v, n_queries, v_dim, CHECK, CHECK_V_MAIN)
                q_tail = q
                dout_tail = dout
                if QK_TAIL > 0:
                    qt_tile = tile_offsets(queries, offs_dt, stride_qn, stride_qd, UNIT, ALIGN, OFFSETS)
                    q_tail = load_at(q_base, qt_tile, offs_m, offs_dt, n_queries, qk_dim, CHECK, CHECK_QK)
                if V_TAIL > 0:
                    doutt_tile = tile_offsets(queries, offs_vt, stride_gn, stride_gd, UNIT, ALIGN, OFFSETS)
                    dout_tail = load_at(dout_base, doutt_tile, offs_m, offs_vt, n_queries, v_dim, CHECK, CHECK_V)
                position_m = table_position(offs_m, n_queries, width, HAS_TABLE)
                bias_rows = bias_tile
                mask_rows = mask_tile
                if CHECK:
                    some = tl.minimum(queries, n_queries - 1 - start)
                    bias_rows = pair_offsets(
                        some, keys, 1, 0, stride_bias_m, stride_bias_n, BIAS_ALIGN, EXTRA_OFFSETS
                    )  # fmt: skip
                    mask_rows = pair_offsets(
                        some, keys, 1, 0, stride_mask_m, stride_mask_n, MASK_ALIGN, EXTRA_OFFSETS
                    )  # fmt: skip
                bias = load_bias(
                    bias_head + query_offset(start, stride_bias_m, BIAS_ALIGN), bias_rows,
                    table_head, position_m, position_n,
                    offs_n, n_keys, 1, 0, True, KEYS_ALIGN, HAS_BIAS, HAS_TABLE, ACC,
                )  # fmt: skip
                allowed = 0
                if HAS_MASK:
                    mask_base = mask_head + query_offset(start, stride_mask_m, MASK_ALIGN)
                    allowed = load_pairs(mask_base, mask_rows, offs_n, 1, n_keys, True, KEYS_ALIGN)
                logits = dot_rows(k, k_tail, q, q_tail, QK_TAIL > 0, PRECISION, ACC) * scale  # [BLOCK_N, BLOCK_M]
                logits = add_extras(logits, bias, allowed, HAS_BIAS, HAS_TABLE, HAS_MASK)
                mask_m = offs_m < n_queries
                row_max, log_sum = load_row_stats(
                    row_max_ptr + rows, log_sum_ptr + rows, offs_m, mask_m, CHECK, TWO_STATS
                )
                delta = load_rows(delta_ptr + rows, offs_m, mask_m, CHECK)
                weights = probabilities(logits, row_max[None, :], log_sum[None, :], TWO_STATS, LOG2_UNITS)
                if CHECK:
                    seen = mask_m[None, :]
                    if CAUSAL:
                        seen &= offs_m[None, :] >= offs_n[:, None]
                    weights = tl.where(seen, weights, 0.0)
                dweights = dot_rows(v, v_tail, dout, dout_tail, V_TAIL > 0, PRECISION, ACC)
                dropped = weights
                if THRESHOLD > 0:
                    keep = tl.trans(kept_weights(rng_ptr, head, start, start_n, THRESHOLD, queries.shape[0], BLOCK_N))
                    dropped = tl.where(keep, weights, 0.0)
                    dweights = tl.where(keep, dweights, 0.0) * KEEP_SCALE
                dropped = dropped.to(dout.dtype)
                dv = tl.dot(dropped, dout, dv, input_precision=PRECISION, out_dtype=ACC)
                dlogits = (weights * (dweights - delta[None, :])).to(q.dtype)
                dk = tl.dot(dlogits, q, dk, input_precision=PRECISION, out_dtype=ACC)
                if V_TAIL > 0:
                    dv_tail = tl.dot(dropped, dout_tail, dv_tail, input_precision=PRECISION, out_dtype=ACC)
                if QK_TAIL > 0:
                    dk_tail = tl.dot(dlogits, q_tail, dk_tail, input_precision=PRECISION, out_dtype=ACC)

    dk_ptr += (b * stride_dkb + h_k * stride_dkh) * ALIGN
    dv_ptr += (b * stride_dvb + h_k * stride_dvh) * ALIGN
    store_tile(dk_ptr, dk * dk_scale, offs_n, offs_d, stride_dkn, stride_dkd, n_keys, qk_dim, UNIT, ALIGN)
    if THRESHOLD > 0:
        dv *= KEEP_SCALE
        dv_tail *= KEEP_SCALE
    store_tile(dv_ptr, dv, offs_n, offs_v, stride_dvn, stride_dvd, n_keys, v_dim, UNIT, ALIGN)
    if QK_TAIL > 0:
        store_tile(dk_ptr, dk_tail * dk_scale, offs_n, offs_dt, stride_dkn, stride_dkd, n_keys, qk_dim, UNIT, ALIGN)
    if V_TAIL > 0:
        store_tile(dv_ptr, dv_tail, offs_n, offs_vt, stride_dvn, stride_dvd, n_keys, v_dim, UNIT, ALIGN)


@triton.jit
def _softmax_attention_bwd_dbias_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, table_ptr, rng_ptr,
    dout_ptr, row_max_ptr, log_sum_ptr, delta_ptr,
    partial_ptr,
    scale,
    heads, group, n_queries, n_keys, qk_dim, v_dim, width, table_centre,
    first_query, partial_rows, bias_batch, bias_heads, shared_heads, n_shared, slab_size,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_gb, stride_gh, stride_gn, stride_gd,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_table_h,
    HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    QK_MAIN: tl.constexpr, QK_TAIL: tl.constexpr, CHECK_QK: tl.constexpr,
    V_MAIN: tl.constexpr, V_TAIL: tl.constexpr, CHECK_V: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, OFFSETS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BIAS_ALIGN: tl.constexpr, MASK_ALIGN: tl.constexpr, KEYS_ALIGN: tl.constexpr, EXTRA_OFFSETS: tl.constexpr,
    SUM_QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns a tile of the bias and adds up, in its slab of them, the (batch, head) pairs that share it.

    Partial sums lie [slab, bias's batch, bias's heads, queries from the first one on, keys]; with SUM_QUERIES there is
    one for each block of queries.
    """
    HOIST: tl.constexpr = HAS_BIAS != HAS_TABLE  # all that share a tile have the same one
    CHECK_QK_MAIN: tl.constexpr = CHECK_QK and QK_TAIL == 0
    CHECK_V_MAIN: tl.constexpr = CHECK_V and V_TAIL == 0
    n_blocks = tl.cdiv(n_keys, BLOCK_N)
    m_blocks = tl.cdiv(first_query % 16 + partial_rows, BLOCK_M)
    if SUM_QUERIES:
        m_blocks = partial_rows
    tile = tl.program_id(0)
    start_n = tile % n_blocks * BLOCK_N
    tile = tile // n_blocks
    block_m = tile % m_blocks
    plane = tile // m_blocks  # slab, bias's batch, bias's head
    bias_h = plane % bias_heads
    bias_b = plane // bias_heads % bias_batch
    slab = plane // bias_heads // bias_batch

    start_m = first_query // 16 * 16 + block_m * BLOCK_M  # dropout wants multiples of 16
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_m = offs_m < n_queries
    seen = mask_m[:, None] & (offs_n < n_keys)[None, :]
    if CAUSAL:
        seen &= offs_m[:, None] >= offs_n[None, :]
    offs_d = tl.arange(0, QK_MAIN)
    offs_v = tl.arange(0, V_MAIN)
    if QK_TAIL > 0:
        offs_dt = QK_MAIN + tl.arange(0, QK_TAIL)
    if V_TAIL > 0:
        offs_vt = V_MAIN + tl.arange(0, V_TAIL)
    position_m = table_position(offs_m, n_queries, width, HAS_TABLE)
    position_n = table_position(offs_n, n_keys, width, HAS_TABLE)
    queries = tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    existing = tl.minimum(queries, n_queries - 1 - start_m)
    bias_tile = pair_offsets(existing, keys, 0, 1, stride_bias_m, stride_bias_n, BIAS_ALIGN, EXTRA_OFFSETS)
    mask_tile = pair_offsets(existing, keys, 0, 1, stride_mask_m, stride_mask_n, MASK_ALIGN, EXTRA_OFFSETS)
    q_tile = tile_offsets(queries, offs_d, stride_qn, stride_qd, UNIT, ALIGN, OFFSETS)
    k_tile = tile_offsets(keys, offs_d, stride_kn, stride_kd, UNIT, ALIGN, OFFSETS)
    v_tile = tile_offsets(keys, offs_v, stride_vn, stride_vd, UNIT, ALIGN, OFFSETS)
    dout_tile = tile_offsets(queries, offs_v, stride_gn, stride_gd, UNIT, ALIGN, OFFSETS)
    q_ptr += token_offset(start_m, stride_qn, UNIT, ALIGN)
    k_ptr += token_offset(start_n, stride_kn, UNIT, ALIGN)
    v_ptr += token_offset(start_n, stride_vn, UNIT, ALIGN)
    dout_ptr += token_offset(start_m, stride_gn, UNIT, ALIGN)
    bias_ptr += query_offset(start_m, stride_bias_m, BIAS_ALIGN) + key_offset(start_n, stride_bias_n)
    mask_ptr += query_offset(start_m, stride_mask_m, MASK_ALIGN) + key_offset(start_n, stride_mask_n)
    table_ptr += table_centre
    bias = 0.0
    if HOIST:
        b = bias_b.to(tl.int64)
        h = bias_h.to(tl.int64)
        bias = load_bias(
            bias_ptr + (b * stride_bias_b + h * stride_bias_h) * BIAS_ALIGN, bias_tile,
            table_ptr + h * stride_table_h, position_m, position_n,
            offs_n, n_keys, 0, 1, True, KEYS_ALIGN, HAS_BIAS, HAS_TABLE, ACC,
        )  # fmt: skip
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for shared in tl.range(slab * slab_size, tl.minimum((slab + 1) * slab_size, n_shared)):
        b = (bias_b + shared // shared_heads).to(tl.int64)
        h = (bias_h + shared % shared_heads).to(tl.int64)
        head = (b * heads + h).to(tl.int32)
        q_base = q_ptr + (b * stride_qb + h * stride_qh) * ALIGN
        k_base = k_ptr + (b * stride_kb + h // group * stride_kh) * ALIGN
        v_base = v_ptr + (b * stride_vb + h // group * stride_vh) * ALIGN
        dout_base = dout_ptr + (b * stride_gb + h * stride_gh) * ALIGN
        q = load_at(q_base, q_tile, offs_m, offs_d, n_queries, qk_dim, True, CHECK_QK_MAIN)
        k = load_at(k_base, k_tile, offs_n, offs_d, n_keys, qk_dim, True, CHECK_QK_MAIN)
        v = load_at(v_base, v_tile, offs_n, offs_v, n_keys, v_dim, True, CHECK_V_MAIN)
        dout = load_at(dout_base, dout_tile, offs_m, offs_v, n_queries, v_dim, True, CHECK_V_MAIN)
        q_tail = q
        k_tail = k
        v_tail = v
        dout_tail = dout
        if QK_TAIL > 0:
            qt_tile = tile_offsets(queries, offs_dt, stride_qn, stride_qd, UNIT, ALIGN, OFFSETS)
            kt_tile = tile_offsets(keys, offs_dt, stride_kn, stride_kd, UNIT, ALIGN, OFFSETS)
            q_tail = load_at(q_base, qt_tile, offs_m, offs_dt, n_queries, qk_dim, True, CHECK_QK)
            k_tail = load_at(k_base, kt_tile, offs_n, offs_dt, n_keys, qk_dim, True, CHECK_QK)
        if V_TAIL > 0:
            vt_tile = tile_offsets(keys, offs_vt, stride_vn, stride_vd, UNIT, ALIGN, OFFSETS)
            doutt_tile = tile_offsets(queries, offs_vt, stride_gn, stride_gd, UNIT, ALIGN, OFFSETS)
            v_tail = load_at(v_base, vt_tile, offs_n, offs_vt, n_keys, v_dim, True, CHECK_V)
            dout_tail = load_at(dout_base, doutt_tile, offs_m, offs_vt, n_queries, v_dim, True, CHECK_V)
        added = bias
        if not HOIST:
            added = load_bias(
                bias_ptr + (b * stride_bias_b + h * stride_bias_h) * BIAS_ALIGN, bias_tile,
                table_ptr + h * stride_table_h, position_m, position_n,
                offs_n, n_keys, 0, 1, True, KEYS_ALIGN, HAS_BIAS, HAS_TABLE, ACC,
            )  # fmt: skip
        allowed = 0
        if HAS_MASK:
            mask_base = mask_ptr + (b * stride_mask_b + h * stride_mask_h) * MASK_ALIGN
            allowed = load_pairs(mask_base, mask_tile, offs_n, 0, n_keys, True, KEYS_ALIGN)
        rows = (b * heads + h) * n_queries
        row_max, log_sum = load_row_stats(row_max_ptr + rows, log_sum_ptr + rows, offs_m, mask_m, True, True)
        delta = load_rows(delta_ptr + rows, offs_m, mask_m, True)
        logits = dot_rows(q, q_tail, k, k_tail, QK_TAIL > 0, PRECISION, ACC) * scale  # [BLOCK_M, BLOCK_N]
        logits = add_extras(logits, added, allowed, HAS_BIAS, HAS_TABLE, HAS_MASK)
        weights = probabilities(logits, row_max[:, None], log_sum[:, None], True, False)
        dweights = dot_rows(dout, dout_tail, v, v_tail, V_TAIL > 0, PRECISION, ACC)
        if THRESHOLD > 0:
            keep = kept_weights(rng_ptr, head, start_m, start_n, THRESHOLD, BLOCK_M, BLOCK_N)
            dweights = tl.where(keep, dweights, 0.0) * KEEP_SCALE
        total += weights * (dweights - delta[:, None])
    total = tl.where(seen, total, 0.0)
    partial_ptr += plane.to(tl.int64) * partial_rows * n_keys
    if SUM_QUERIES:
        tl.store(partial_ptr + block_m.to(tl.int64) * n_keys + offs_n, tl.sum(total, 0), mask=offs_n < n_keys)
    else:
        rows = offs_m - first_query
        ptrs = partial_ptr + (rows.to(tl.int64) * n_keys)[:, None] + offs_n[None, :]
        total = total.to(partial_ptr.dtype.element_ty)
        tl.store(ptrs, total, mask=((rows >= 0) & (rows < partial_rows))[:, None] & (offs_n < n_keys)[None, :])


@triton.jit
def _softmax_attention_bwd_dtable_kernel(
    partial_ptr, dtable_ptr,
    heads, height, width, first_row, n_rows, slabs,
    FIRST: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program owns the entries of the table, [heads, 2 height - 1, 2 width - 1], of one head and one step down.

    It adds up the logit gradients [slabs, heads, queries, keys] of the queries in n_rows rows of the grid.
    """
    steps_down = 2 * height - 1
    steps_right = 2 * width - 1
    h = (tl.program_id(0) // steps_down).to(tl.int64)
    down = tl.program_id(0) % steps_down
    n_tokens = height * width
    lane = tl.arange(0, LANES)
    in_row = lane < steps_right
    total = tl.zeros([BLOCK_C, LANES], partial_ptr.dtype.element_ty)
    for slab in tl.range(slabs):
        base = partial_ptr + (slab * heads + h) * n_rows * width * n_tokens
        for row in tl.range(first_row, first_row + n_rows):
            key_row = row - down + height - 1
            if (key_row >= 0) & (key_row < height):
                for start in tl.range(0, width, BLOCK_C):
                    column = start + tl.arange(0, BLOCK_C)
                    key_column = column[:, None] - lane[None, :] + width - 1
                    exists = (column < width)[:, None] & in_row[None, :] & (key_column >= 0) & (key_column < width)
                    query = ((row - first_row) * width + column).to(tl.int64)[:, None]
                    ptrs = base + query * n_tokens + key_row * width + key_column
                    total += tl.load(ptrs, mask=exists, other=0.0)
    ptrs = dtable_ptr + (h * steps_down + down) * steps_right + lane
    entries = tl.sum(total, 0)
    if not FIRST:
        entries += tl.load(ptrs, mask=in_row, other=0.0)
    tl.store(ptrs, entries, mask=in_row)


def softmax_attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    table: torch.Tensor | None,
    rng: torch.Tensor | None,
    out: torch.Tensor,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    width: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    needs_dq: bool,
    needs_dkv: bool,
    needs_dbias: bool,
    needs_dtable: bool,
    config: SoftmaxAttentionConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the backward.

    Args:
        dout: gradient of out, any strides.
        dlse: gradient of lse (B, heads, Nq), or None.
        out, row_max, log_sum: what the forward returned.
        needs_dq, needs_dkv, needs_dbias, needs_dtable: which gradients to compute.
        config, and all others: as in the forward.

    Returns:
        dq, dk, dv, dbias, dtable, shaped like what they are gradients of, their axes in the same order in memory; what
        is not needed is empty, (0,).
    """
    call = Call(q, k, v, bias, mask, table, rng, width, scale, is_causal, dropout_p, config)
    if dout.stride() != out.stride():  # one layout for all, rather than a kernel for each mixture
        dout = torch.empty_like(out).copy_(dout)
    row_max, log_sum = row_max.contiguous(), log_sum.contiguous()  # vmap may have expanded them
    delta = torch.empty_like(row_max)
    double = q.dtype == torch.float64
    dq = empty_in_order(q, q.shape) if needs_dq else q.new_empty(0)
    tile = call.config.dq
    address, strides = addressed(call.q, k, v, out, dout, *((dq,) if needs_dq else ()))
    _softmax_attention_bwd_dq_kernel[(triton.cdiv(call.n_queries, tile.block_m) * call.all_heads,)](
        *call.inputs,
        out, dout, row_max if dlse is None else dlse.contiguous(), row_max, log_sum,
        delta, dq,
        call.logit_scale, call.dq_scale,
        *call.sizes,
        *strides, *(() if needs_dq else (0, 0, 0, 0)), *call.extra_strides,
        HAS_DLSE=dlse is not None, NEEDS_DQ=needs_dq, REST=call.rest(call.n_keys, tile.block_n),
        **address, **call.cut(tile),
    )  # fmt: skip
    if needs_dq and double:
        dq *= scale

    dk, dv = k.new_empty(0), v.new_empty(0)
    if needs_dkv:
        dk, dv = empty_in_order(k, k.shape), empty_in_order(v, v.shape)
        tile = call.config.dkv
        address, strides = addressed(call.q, k, v, dout, dk, dv)
        _softmax_attention_bwd_dkv_kernel[(triton.cdiv(call.n_keys, tile.block_n) * call.all_key_heads,)](
            *call.inputs,
            dout, row_max, log_sum, delta,
            dk, dv,
            call.logit_scale, call.dk_scale,
            *call.sizes,
            *strides, *call.extra_strides,
            REST=call.rest(call.n_queries, tile.block_m), **address, **call.cut(tile),
        )  # fmt: skip

    stats = (dout, row_max, log_sum, delta)
    dbias, dtable = q.new_empty(0), q.new_empty(0)
    if needs_dbias:
        sum_queries = bias.shape[2] == 1 < call.n_queries
        dbias = _launch_dbias(call, stats, bias.shape[:2], 0, call.n_queries, bias.dtype, sum_queries)
    if needs_dtable:
        height = call.n_queries // width
        entries = q.new_empty((call.heads, 2 * height - 1, 2 * width - 1), dtype=call.acc_dtype)
        row_bytes = call.heads * width * call.n_keys * entries.element_size()
        step = max(1, DBIAS_SCRATCH_BYTES // row_bytes)
        for first_row in range(0, height, step):
            n_rows = min(step, height - first_row)
            partial = _launch_dbias(
                call, stats, (1, call.heads), first_row * width, n_rows * width, call.acc_dtype, False, add_up=False
            )
            _softmax_attention_bwd_dtable_kernel[(call.heads * (2 * height - 1),)](
                partial, entries,
                call.heads, height, width, first_row, n_rows, partial.shape[0],
                FIRST=first_row == 0, BLOCK_C=16, LANES=triton.next_power_of_2(2 * width - 1),
            )  # fmt: skip
        dtable = entries.flatten(1).t().to(table.dtype).contiguous()
    return dq, dk, dv, dbias, dtable


def _launch_dbias(
    call: Call,
    stats: tuple[torch.Tensor, ...],
    planes: tuple[int, ...],
    first_query: int,
    n_rows: int,
    dtype: torch.dtype,
    sum_queries: bool,
    add_up: bool = True,
) -> torch.Tensor:
    """Logit gradients of n_rows queries, summed over what shares a plane of the bias.

    Args:
        call: the call.
        stats: dout, row_max, log_sum, delta.
        planes: the bias's sizes along batch and heads.
        first_query, n_rows: which queries.
        dtype: of the result.
        sum_queries: whether to sum over the queries.
        add_up: whether to sum over the slabs, which otherwise are the first axis.

    Returns:
        (*planes, n_rows or 1, Nk), with the slabs before it if they are not summed.
    """
    tile = call.config.dbias
    m_blocks = triton.cdiv(first_query % 16 + n_rows, tile.block_m)
    programs = m_blocks * triton.cdiv(call.n_keys, tile.block_n) * math.prod(planes)
    n_shared = call.all_heads // math.prod(planes)
    slab_size = triton.cdiv(n_shared, min(n_shared, triton.cdiv(DBIAS_PROGRAMS, programs)))
    slabs = triton.cdiv(n_shared, slab_size)
    partial_rows = m_blocks if sum_queries else n_rows
    direct = add_up and slabs == 1 and not sum_queries
    shape = (slabs, *planes, partial_rows, call.n_keys)
    partial = torch.empty(shape, dtype=dtype if direct else call.acc_dtype, device=call.q.device)
    k, v = call.inputs[1:3]
    address, strides = addressed(call.q, k, v, stats[0])
    _softmax_attention_bwd_dbias_kernel[(slabs * programs,)](
        *call.inputs,
        *stats,
        partial,
        call.logit_scale,
        *call.sizes,
        first_query, partial_rows, *planes, call.heads // planes[1], n_shared, slab_size,
        *strides, *call.extra_strides,
        SUM_QUERIES=sum_queries, **address, **call.cut(tile),
    )  # fmt: skip
    if direct:
        return partial[0]
    if not add_up:
        return partial
    total = partial.sum((0, 3)).unsqueeze(2) if sum_queries else partial.sum(0)
    return total.to(dtype)
