"""Linear attention: out = phi(q) S / (phi(q) z + eps) with S = phi(k)^T v and z the sum of phi(k) over tokens.

phi is relu or elu + 1. "softmax" has phi(q) = softmax over features, phi(k) = softmax over tokens, and no division: its
S is gathered with exponentials less each feature's maximum so far, and divided by their sum at the end.

Two passes each way: one gathers the state, over slabs of tokens whose partial sums a small kernel adds in a fixed
order; one multiplies tokens by it. Backward, with d = phi(q) z + eps, y = phi(q), g = dout S^T, delta = rowsum(g * y):
    over queries   dy = (g - delta / d z) / d,  dS = y^T (dout / d),  dz = -sum(y delta / d^2)
    over keys      dphi(k) = v dS^T + dz,  dv = phi(k) dS
of softmax     over queries   dq = y * (g - delta),  dS = y^T dout;  dz = -rowsum(S * dS), by feature
               over keys      dk = phi(k) * (v dS^T + dz),  dv = phi(k) dS
where dS and dz come divided by the sums of exponentials, so that phi(k) is an exponential there as well.

Bytes, with Q, K, V, O those of q, k, v, out, S and z those of state and sums in fp32 (fp64 in fp64), N = z (in softmax
2z, with the maxima), n = z (in softmax 0), and c and c' slabs of keys and of queries:
forward    state K + V + c (S + N)    sum, if c > 1: (c + 1)(S + N)    out Q + O + S + n
backward   dq 2Q + O + S + n + c' (S + n)    sum, if c' > 1 or in softmax: c' (S + n) + S + z (in softmax S + z more)
           dkv 2K + 2V + S + N
Where dq is not wanted there is one Q less, and without dk and dv nothing from c' on.

State and sums stay in fp32. Of 16-bit inputs, products with them are TF32, whose mantissa is as long as fp16's and its
range that of fp32; those of keys by values are in the inputs' dtype. No atomics.
"""

import ctypes

import torch
import triton
import triton.language as tl

from attnk.memory import empty_in_order

from .attention import divided_strides
from .tuning import (
    LINEAR_ATTENTION_PROGRAMS,
    LINEAR_ATTENTION_SLAB,
    LinearAttentionConfig,
    LinearTile,
    architecture,
    linear_attention_config,
)


@triton.jit
def load_tile(
    ptr, offs_n, offs_d, stride_n, stride_d, n, dim,
    CHECK_D: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Tokens offs_n and columns offs_d of one head; what lies outside is 0."""
    ptrs = ptr + tile_offsets(offs_n, offs_d, stride_n, stride_d, UNIT, ALIGN)
    if CHECK_D:
        return tl.load(ptrs, mask=(offs_n[:, None] < n) & (offs_d[None, :] < dim), other=0.0)
    else:
        return tl.load(ptrs, mask=offs_n[:, None] < n, other=0.0)


@triton.jit
def store_tile(
    ptr, values, offs_n, offs_d, stride_n, stride_d, n, dim,
    CHECK_D: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    ptrs = ptr + tile_offsets(offs_n, offs_d, stride_n, stride_d, UNIT, ALIGN)
    mask = offs_n[:, None] < n
    if CHECK_D:
        mask &= offs_d[None, :] < dim
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def tile_offsets(offs_n, offs_d, stride_n, stride_d, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """Element offsets, 64 bits wide. UNIT names the axis whose stride is 1; the other's comes divided by ALIGN."""
    if UNIT == "d":
        return (offs_n.to(tl.int64) * stride_n * ALIGN)[:, None] + offs_d[None, :]
    elif UNIT == "n":
        return offs_n[:, None] + (offs_d.to(tl.int64) * stride_d * ALIGN)[None, :]
    else:
        return (offs_n.to(tl.int64) * stride_n)[:, None] + (offs_d.to(tl.int64) * stride_d)[None, :]


@triton.jit
def load_state(ptr, offs_d, offs_v, qk_dim, v_dim):
    """Rows offs_d and columns offs_v of one head's state; what lies outside is 0."""
    mask = (offs_d[:, None] < qk_dim) & (offs_v[None, :] < v_dim)
    return tl.load(ptr + offs_d[:, None] * v_dim + offs_v[None, :], mask=mask, other=0.0)


@triton.jit
def features(x, FEATURE_MAP: tl.constexpr):
    """relu or elu + 1; both keep NaN."""
    if FEATURE_MAP == "relu":
        return tl.where(x < 0.0, 0.0, x)
    else:
        return tl.where(x > 0.0, x + 1.0, tl.exp(x))


@triton.jit
def over(values, divisors, NARROW: tl.constexpr):
    """Rows divided by one number each, of NARROW inputs by its reciprocal: a division takes five instructions."""
    if NARROW:
        return values * (1.0 / divisors)[:, None]
    else:
        return values / divisors[:, None]


@triton.jit
def query_features(q, offs_d, qk_dim, FEATURE_MAP: tl.constexpr, CHECK_D: tl.constexpr, ACC: tl.constexpr):
    """phi of a tile of queries, in the accumulator's dtype."""
    narrow: tl.constexpr = q.dtype.primitive_bitwidth == 16
    q = q.to(ACC)
    if FEATURE_MAP == "softmax":
        if CHECK_D:
            q = tl.where(offs_d[None, :] < qk_dim, q, float("-inf"))
        y = tl.exp(q - tl.max(q, 1)[:, None])
        return over(y, tl.sum(y, 1), narrow)
    else:
        return features(q, FEATURE_MAP)


@triton.jit
def through_features(gradient, x, phi, FEATURE_MAP: tl.constexpr):
    """The gradient of x from that of phi(x); for softmax, of exponentials."""
    if FEATURE_MAP == "relu":
        return tl.where(x <= 0.0, 0.0, gradient)
    elif FEATURE_MAP == "elu":
        return gradient * tl.where(x > 0.0, 1.0, phi)
    else:
        return gradient * phi


@triton.jit
def load_norm(ptr, offs_d, qk_dim, NARROW: tl.constexpr):
    """z of one head as ``denominators`` take it: of NARROW inputs two of 16 columns, TF32's bits of it and the rest."""
    norm = tl.load(ptr + offs_d, mask=offs_d < qk_dim, other=0.0)
    if NARROW:
        leading = (norm.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        column = tl.arange(0, 16)[None, :]
        rest = tl.where(column == 1, (norm - leading)[:, None], 0.0)
        return tl.where(column == 0, leading[:, None], rest)
    else:
        return norm


@triton.jit
def denominators(y, norm, eps, eps_rest, NARROW: tl.constexpr):
    """phi(q) z + eps; a float argument has 32 bits, what it misses of eps comes apart.

    Of NARROW inputs by a matrix product: phi(q) is at hand as its operand, and would be formed twice otherwise.
    """
    if NARROW:
        total = tl.sum(tl.dot(y, norm, input_precision="tf32"), 1) + eps
    else:
        total = tl.sum(y * norm[None, :], 1) + eps
    if y.dtype == tl.float64:
        total += eps_rest
    return total


@triton.jit
def place(all_heads, n_blocks, slab, n_tokens):
    """Of this program: head (of all images), slab, its first token and end, block of values.

    Those who read the same tokens are neighbours: blocks, then heads.
    """
    pid = tl.program_id(0)
    head = pid // n_blocks % all_heads
    number = pid // n_blocks // all_heads
    begin = number * slab
    return head, number, begin, tl.minimum(begin + slab, n_tokens), pid % n_blocks


@triton.jit
def _linear_attention_fwd_state_kernel(
    k_ptr, v_ptr, state_ptr, norm_ptr,
    all_heads, heads, n_keys, slab, n_slabs,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    FEATURE_MAP: tl.constexpr, ONE_SLAB: tl.constexpr,
    QK_DIM: tl.constexpr, V_DIM: tl.constexpr, CHECK_D: tl.constexpr, CHECK_V: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_V columns of the state of one slab of keys."""
    head, number, begin, end, block = place(all_heads, tl.cdiv(V_DIM, BLOCK_V), slab, n_keys)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    k_ptr += (b * stride_kb + h * stride_kh) * ALIGN
    v_ptr += (b * stride_vb + h * stride_vh) * ALIGN
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    state = tl.zeros([BLOCK_D, BLOCK_V], ACC)
    total = tl.zeros([BLOCK_D], ACC)
    peak = tl.full([BLOCK_D], float("-inf"), ACC)
    for start in tl.range(begin, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, offs_n, offs_d, stride_kn, stride_kd, end, QK_DIM, CHECK_D, UNIT, ALIGN).to(ACC)
        v = load_tile(v_ptr, offs_n, offs_v, stride_vn, stride_vd, end, V_DIM, CHECK_V, UNIT, ALIGN)
        is_token = offs_n[:, None] < end
        if FEATURE_MAP == "softmax":
            k = tl.where(is_token, k, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(k, 0))
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            phi = tl.exp(k - shift[None, :])
            correction = tl.exp(peak - shift)
            total *= correction
            state *= correction[:, None]
            peak = new_peak
        else:
            phi = tl.where(is_token, features(k, FEATURE_MAP), 0.0)
        total += tl.sum(phi, 0)
        phi = tl.trans(phi.to(v.dtype))
        state = tl.dot(phi, v, state, input_precision=PRECISION, out_dtype=ACC)

    of_slab = head.to(tl.int64) * n_slabs + number
    if FEATURE_MAP == "softmax":
        norm_ptr += of_slab * 2 * QK_DIM + offs_d
        if ONE_SLAB:
            state = state / total[:, None]
    else:
        norm_ptr += of_slab * QK_DIM + offs_d
    state_ptr += of_slab * QK_DIM * V_DIM + offs_d[:, None] * V_DIM + offs_v[None, :]
    tl.store(state_ptr, state, mask=(offs_d[:, None] < QK_DIM) & (offs_v[None, :] < V_DIM))
    if block == 0:
        is_feature = offs_d < QK_DIM
        if FEATURE_MAP == "softmax":
            tl.store(norm_ptr, peak, mask=is_feature)
            tl.store(norm_ptr + QK_DIM, total, mask=is_feature)
        else:
            tl.store(norm_ptr, total, mask=is_feature)


@triton.jit
def _linear_attention_fwd_sum_kernel(
    partial_state_ptr, partial_norm_ptr, state_ptr, norm_ptr,
    n_slabs,
    QK_DIM: tl.constexpr, V_DIM: tl.constexpr,
    SOFTMAX: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_D rows of one head's state over all slabs, in their order."""
    n_blocks = tl.cdiv(QK_DIM, BLOCK_D)
    head = (tl.program_id(0) // n_blocks).to(tl.int64)
    offs_d = tl.program_id(0) % n_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    is_feature = offs_d < QK_DIM
    partial_state_ptr += head * n_slabs * QK_DIM * V_DIM
    state = tl.zeros([BLOCK_D, BLOCK_V], ACC)
    total = tl.zeros([BLOCK_D], ACC)
    if SOFTMAX:
        partial_norm_ptr += head * n_slabs * 2 * QK_DIM + offs_d
        norm_ptr += head * 2 * QK_DIM + offs_d
        peak = tl.full([BLOCK_D], float("-inf"), ACC)
        for number in tl.range(0, n_slabs):
            peak = tl.maximum(peak, tl.load(partial_norm_ptr + number * 2 * QK_DIM, mask=is_feature, other=0.0))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        for number in tl.range(0, n_slabs):
            its_norm_ptr = partial_norm_ptr + number * 2 * QK_DIM
            correction = tl.exp(tl.load(its_norm_ptr, mask=is_feature, other=0.0) - shift)
            total += correction * tl.load(its_norm_ptr + QK_DIM, mask=is_feature, other=0.0)
            state += correction[:, None] * load_state(partial_state_ptr, offs_d, offs_v, QK_DIM, V_DIM)
            partial_state_ptr += QK_DIM * V_DIM
        state = state / total[:, None]
        tl.store(norm_ptr, peak, mask=is_feature)
        tl.store(norm_ptr + QK_DIM, total, mask=is_feature)
    else:
        partial_norm_ptr += head * n_slabs * QK_DIM + offs_d
        for _ in tl.range(0, n_slabs):
            total += tl.load(partial_norm_ptr, mask=is_feature, other=0.0)
            state += load_state(partial_state_ptr, offs_d, offs_v, QK_DIM, V_DIM)
            partial_norm_ptr += QK_DIM
            partial_state_ptr += QK_DIM * V_DIM
        tl.store(norm_ptr + head * QK_DIM + offs_d, total, mask=is_feature)
    state_ptr += head * QK_DIM * V_DIM + offs_d[:, None] * V_DIM + offs_v[None, :]
    tl.store(state_ptr, state, mask=is_feature[:, None] & (offs_v[None, :] < V_DIM))


@triton.jit
def _linear_attention_fwd_kernel(
    q_ptr, state_ptr, norm_ptr, out_ptr,
    eps, eps_rest, all_heads, heads, n_queries, slab,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_ob, stride_oh, stride_on, stride_od,
    FEATURE_MAP: tl.constexpr,
    QK_DIM: tl.constexpr, V_DIM: tl.constexpr, CHECK_D: tl.constexpr, CHECK_V: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_V columns of one slab of queries."""
    head, _, begin, end, block = place(all_heads, tl.cdiv(V_DIM, BLOCK_V), slab, n_queries)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    q_ptr += (b * stride_qb + h * stride_qh) * ALIGN
    out_ptr += (b * stride_ob + h * stride_oh) * ALIGN
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    state = load_state(state_ptr + head.to(tl.int64) * QK_DIM * V_DIM, offs_d, offs_v, QK_DIM, V_DIM)
    if FEATURE_MAP != "softmax":
        # the columns of larger heads leave no room for the rest
        narrow: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16 and BLOCK_D <= 128
        norm = load_norm(norm_ptr + head.to(tl.int64) * QK_DIM, offs_d, QK_DIM, narrow)
    for start in tl.range(begin, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        q = load_tile(q_ptr, offs_n, offs_d, stride_qn, stride_qd, end, QK_DIM, CHECK_D, UNIT, ALIGN)
        y = query_features(q, offs_d, QK_DIM, FEATURE_MAP, CHECK_D, ACC)
        out = tl.dot(y, state, input_precision=WIDE, out_dtype=ACC)
        if FEATURE_MAP != "softmax":
            out = over(out, denominators(y, norm, eps, eps_rest, narrow), narrow)
        store_tile(out_ptr, out, offs_n, offs_v, stride_on, stride_od, end, V_DIM, CHECK_V, UNIT, ALIGN)


@triton.jit
def _linear_attention_bwd_dq_kernel(
    dout_ptr, q_ptr, state_ptr, norm_ptr, dq_ptr, dstate_ptr, dnorm_ptr,
    eps, eps_rest, all_heads, heads, n_queries, slab, n_slabs,
    stride_dob, stride_doh, stride_don, stride_dod,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_dqb, stride_dqh, stride_dqn, stride_dqd,
    FEATURE_MAP: tl.constexpr, NEEDS_DQ: tl.constexpr, NEEDS_DKV: tl.constexpr, V_BLOCKS: tl.constexpr,
    QK_DIM: tl.constexpr, V_DIM: tl.constexpr, CHECK_D: tl.constexpr, CHECK_V: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_V columns of the state's gradient, of one slab of queries; the first of them owns dq."""
    head, number, begin, end, block = place(all_heads, V_BLOCKS if NEEDS_DKV else 1, slab, n_queries)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    dout_ptr += (b * stride_dob + h * stride_doh) * ALIGN
    q_ptr += (b * stride_qb + h * stride_qh) * ALIGN
    dq_ptr += (b * stride_dqb + h * stride_dqh) * ALIGN
    state_ptr += head.to(tl.int64) * QK_DIM * V_DIM
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    if V_BLOCKS == 1:
        state = load_state(state_ptr, offs_d, offs_v, QK_DIM, V_DIM)
    if FEATURE_MAP != "softmax":
        norm = tl.load(norm_ptr + head.to(tl.int64) * QK_DIM + offs_d, mask=offs_d < QK_DIM, other=0.0)
    dstate = tl.zeros([BLOCK_D, BLOCK_V], ACC)
    dnorm = tl.zeros([BLOCK_D], ACC)
    for start in tl.range(begin, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        q = load_tile(q_ptr, offs_n, offs_d, stride_qn, stride_qd, end, QK_DIM, CHECK_D, UNIT, ALIGN)
        y = query_features(q, offs_d, QK_DIM, FEATURE_MAP, CHECK_D, ACC)
        dout = load_tile(dout_ptr, offs_n, offs_v, stride_don, stride_dod, end, V_DIM, CHECK_V, UNIT, ALIGN).to(ACC)
        if V_BLOCKS == 1:
            dy = tl.dot(dout, tl.trans(state), input_precision=WIDE, out_dtype=ACC)
        else:
            dy = tl.zeros([BLOCK_N, BLOCK_D], ACC)
            for other in tl.range(0, V_BLOCKS):
                offs_w = other * BLOCK_V + tl.arange(0, BLOCK_V)
                its_state = load_state(state_ptr, offs_d, offs_w, QK_DIM, V_DIM)
                its_dout = load_tile(
                    dout_ptr, offs_n, offs_w, stride_don, stride_dod, end, V_DIM, CHECK_V, UNIT, ALIGN
                ).to(ACC)
                dy = tl.dot(its_dout, tl.trans(its_state), dy, input_precision=WIDE, out_dtype=ACC)
        delta = tl.sum(dy * y, 1)
        if FEATURE_MAP == "softmax":
            dy = dy - delta[:, None]
        else:
            # 0 beyond the last token, where eps = 0 would give 0 / 0
            scale = tl.where(offs_n < end, 1.0 / denominators(y, norm, eps, eps_rest, False), 0.0)
            delta *= scale
            dy = (dy - delta[:, None] * norm[None, :]) * scale[:, None]
            dout *= scale[:, None]
        if NEEDS_DQ and block == 0:
            dq = through_features(dy, q, y, FEATURE_MAP)
            store_tile(dq_ptr, dq, offs_n, offs_d, stride_dqn, stride_dqd, end, QK_DIM, CHECK_D, UNIT, ALIGN)
        if NEEDS_DKV:
            if FEATURE_MAP != "softmax":
                dnorm -= tl.sum(y * (delta * scale)[:, None], 0)
            dstate = tl.dot(tl.trans(y), dout, dstate, input_precision=WIDE, out_dtype=ACC)
    if NEEDS_DKV:
        of_slab = head.to(tl.int64) * n_slabs + number
        dstate_ptr += of_slab * QK_DIM * V_DIM + offs_d[:, None] * V_DIM + offs_v[None, :]
        tl.store(dstate_ptr, dstate, mask=(offs_d[:, None] < QK_DIM) & (offs_v[None, :] < V_DIM))
        if FEATURE_MAP != "softmax" and block == 0:
            tl.store(dnorm_ptr + of_slab * QK_DIM + offs_d, dnorm, mask=offs_d < QK_DIM)


@triton.jit
def _linear_attention_bwd_sum_kernel(
    partial_dstate_ptr, partial_dnorm_ptr, state_ptr, norm_ptr, dstate_ptr, dnorm_ptr,
    n_slabs,
    QK_DIM: tl.constexpr, V_DIM: tl.constexpr,
    SOFTMAX: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_D rows of the gradient of one head's state over all slabs, in their order."""
    n_blocks = tl.cdiv(QK_DIM, BLOCK_D)
    head = (tl.program_id(0) // n_blocks).to(tl.int64)
    offs_d = tl.program_id(0) % n_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    is_feature = offs_d < QK_DIM
    partial_dstate_ptr += head * n_slabs * QK_DIM * V_DIM
    dstate = tl.zeros([BLOCK_D, BLOCK_V], ACC)
    for _ in tl.range(0, n_slabs):
        dstate += load_state(partial_dstate_ptr, offs_d, offs_v, QK_DIM, V_DIM)
        partial_dstate_ptr += QK_DIM * V_DIM
    if SOFTMAX:
        state = load_state(state_ptr + head * QK_DIM * V_DIM, offs_d, offs_v, QK_DIM, V_DIM)
        total = tl.load(norm_ptr + (head * 2 + 1) * QK_DIM + offs_d, mask=is_feature, other=1.0)
        dstate = dstate / total[:, None]
        dnorm = -tl.sum(state * dstate, 1)
    else:
        partial_dnorm_ptr += head * n_slabs * QK_DIM + offs_d
        dnorm = tl.zeros([BLOCK_D], ACC)
        for _ in tl.range(0, n_slabs):
            dnorm += tl.load(partial_dnorm_ptr, mask=is_feature, other=0.0)
            partial_dnorm_ptr += QK_DIM
    tl.store(dnorm_ptr + head * QK_DIM + offs_d, dnorm, mask=is_feature)
    dstate_ptr += head * QK_DIM * V_DIM + offs_d[:, None] * V_DIM + offs_v[None, :]
    tl.store(dstate_ptr, dstate, mask=is_feature[:, None] & (offs_v[None, :] < V_DIM))


@triton.jit
def _linear_attention_bwd_dkv_kernel(
    k_ptr, v_ptr, norm_ptr, dstate_ptr, dnorm_ptr, dk_ptr, dv_ptr,
    all_heads, heads, n_keys, slab,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd,
    stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    FEATURE_MAP: tl.constexpr, V_BLOCKS: tl.constexpr,
    QK_DIM: tl.constexpr, V_DIM: tl.constexpr, CHECK_D: tl.constexpr, CHECK_V: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program owns one slab of keys."""
    head, _, begin, end, _ = place(all_heads, 1, slab, n_keys)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    k_ptr += (b * stride_kb + h * stride_kh) * ALIGN
    v_ptr += (b * stride_vb + h * stride_vh) * ALIGN
    dk_ptr += (b * stride_dkb + h * stride_dkh) * ALIGN
    dv_ptr += (b * stride_dvb + h * stride_dvh) * ALIGN
    dstate_ptr += head.to(tl.int64) * QK_DIM * V_DIM
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    is_feature = offs_d < QK_DIM
    if V_BLOCKS == 1:
        dstate = load_state(dstate_ptr, offs_d, offs_v, QK_DIM, V_DIM)
    dnorm = tl.load(dnorm_ptr + head.to(tl.int64) * QK_DIM + offs_d, mask=is_feature, other=0.0)
    if FEATURE_MAP == "softmax":
        peak = tl.load(norm_ptr + head.to(tl.int64) * 2 * QK_DIM + offs_d, mask=is_feature, other=0.0)
    for start in tl.range(begin, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, offs_n, offs_d, stride_kn, stride_kd, end, QK_DIM, CHECK_D, UNIT, ALIGN).to(ACC)
        if FEATURE_MAP == "softmax":
            phi = tl.exp(k - peak[None, :])
        else:
            phi = features(k, FEATURE_MAP)
        if V_BLOCKS == 1:
            v = load_tile(v_ptr, offs_n, offs_v, stride_vn, stride_vd, end, V_DIM, CHECK_V, UNIT, ALIGN).to(ACC)
            dv = tl.dot(phi, dstate, input_precision=WIDE, out_dtype=ACC)
            store_tile(dv_ptr, dv, offs_n, offs_v, stride_dvn, stride_dvd, end, V_DIM, CHECK_V, UNIT, ALIGN)
            dphi = tl.dot(v, tl.trans(dstate), input_precision=WIDE, out_dtype=ACC)
        else:
            dphi = tl.zeros([BLOCK_N, BLOCK_D], ACC)
            for block in tl.range(0, V_BLOCKS):
                offs_w = block * BLOCK_V + offs_v
                its_dstate = load_state(dstate_ptr, offs_d, offs_w, QK_DIM, V_DIM)
                v = load_tile(v_ptr, offs_n, offs_w, stride_vn, stride_vd, end, V_DIM, CHECK_V, UNIT, ALIGN).to(ACC)
                dv = tl.dot(phi, its_dstate, input_precision=WIDE, out_dtype=ACC)
                store_tile(dv_ptr, dv, offs_n, offs_w, stride_dvn, stride_dvd, end, V_DIM, CHECK_V, UNIT, ALIGN)
                dphi = tl.dot(v, tl.trans(its_dstate), dphi, input_precision=WIDE, out_dtype=ACC)
        dk = through_features(dphi + dnorm[None, :], k, phi, FEATURE_MAP)
        store_tile(dk_ptr, dk, offs_n, offs_d, stride_dkn, stride_dkd, end, QK_DIM, CHECK_D, UNIT, ALIGN)


def slabs(tokens: int, all_heads: int, block_n: int, least: int = 1) -> tuple[int, int]:
    """How many slabs tokens come in, and their size: enough for every multiprocessor, none below ``least`` tokens."""
    wanted = triton.cdiv(LINEAR_ATTENTION_PROGRAMS, all_heads)
    size = max(triton.cdiv(tokens, wanted), min(least, tokens))
    size = triton.cdiv(size, block_n) * block_n
    return triton.cdiv(tokens, size), size


class _Call:
    """What all launches of one call take: sizes and constexprs, by the names the kernels give them.

    Head dimensions are constexprs, so that masks of their tails are known to leave wide loads whole.
    """

    def __init__(
        self, q: torch.Tensor, v: torch.Tensor, feature_map: str, eps: float, config: LinearAttentionConfig | None
    ) -> None:
        batch, self.heads, self.n_queries, self.qk_dim = q.shape
        self.n_keys, self.v_dim = v.shape[2:]
        self.all_heads = batch * self.heads
        self.config = config or linear_attention_config(
            architecture(q.device), itemsize=q.element_size(), head_dim=max(self.qk_dim, self.v_dim)
        )
        self.softmax = feature_map == "softmax"
        self.norm_rows = 2 if self.softmax else 1
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.acc = tl.float64 if q.dtype == torch.float64 else tl.float32
        self.feature_map = feature_map
        rounded = ctypes.c_float(eps).value
        self.eps = (rounded, eps - rounded)
        self.precision = "tf32" if q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
        self.wide = "tf32" if q.element_size() == 2 else self.precision
        self.block_d = max(16, triton.next_power_of_2(self.qk_dim))

    def cut(self, tile: LinearTile, *tensors: torch.Tensor) -> tuple[list[int], dict[str, object]]:
        """Strides of the tensors, and the constexprs and compile options of a kernel that reads them cut up so."""
        unit, align, strides = divided_strides((("d", 3), ("n", 2)), tensors)
        block_v = self.block_v(tile)
        return strides, {
            "FEATURE_MAP": self.feature_map,
            "QK_DIM": self.qk_dim,
            "V_DIM": self.v_dim,
            "CHECK_D": self.block_d != self.qk_dim,
            "CHECK_V": self.v_dim % block_v != 0,
            "UNIT": unit,
            "ALIGN": align,
            "ACC": self.acc,
            "BLOCK_N": tile.block_n,
            "BLOCK_D": self.block_d,
            "BLOCK_V": block_v,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def block_v(self, tile: LinearTile) -> int:
        return min(tile.block_v, max(16, triton.next_power_of_2(self.v_dim)))

    def blocks(self, tile: LinearTile) -> int:
        return triton.cdiv(self.v_dim, self.block_v(tile))

    def sums(self) -> tuple[tuple[int], dict[str, object]]:
        """Grid and constexprs of the kernels that sum partial states."""
        block_v = triton.next_power_of_2(self.v_dim)
        block_d = max(1, min(2048 // block_v, triton.next_power_of_2(self.qk_dim)))
        options = {
            "QK_DIM": self.qk_dim,
            "V_DIM": self.v_dim,
            "SOFTMAX": self.softmax,
            "ACC": self.acc,
            "BLOCK_D": block_d,
            "BLOCK_V": block_v,
        }
        return (self.all_heads * triton.cdiv(self.qk_dim, block_d),), options


def linear_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str,
    eps: float,
    config: LinearAttentionConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward.

    Args:
        q, k, v: (B, heads, Nq, D), (B, heads, Nk, D), (B, heads, Nk, Dv), not empty, any strides.
        feature_map: "relu", "elu" or "softmax".
        eps: added to the denominators.
        config: block sizes and so on; chosen from the table when None.

    Returns:
        out (B, heads, Nq, Dv), its axes in memory in q's order; state (B, heads, D, Dv); norm (B, heads, 1, D), sums of
        phi(k), or of softmax (B, heads, 2, D), the maxima of k and the sums of exponentials less them. The last two in
        float32, or float64.
    """
    call = _Call(q, v, feature_map, eps, config)
    heads = q.shape[:2]
    out = empty_in_order(q, (*q.shape[:3], call.v_dim))
    state = q.new_empty((*heads, call.qk_dim, call.v_dim), dtype=call.dtype)
    norm = q.new_empty((*heads, call.norm_rows, call.qk_dim), dtype=call.dtype)

    tile = call.config.state
    n_slabs, slab = slabs(call.n_keys, call.all_heads, tile.block_n, LINEAR_ATTENTION_SLAB)
    partials = (state, norm)
    if n_slabs > 1:
        partials = tuple(each.new_empty((*heads, n_slabs, *each.shape[2:])) for each in partials)
    strides, options = call.cut(tile, k, v)
    _linear_attention_fwd_state_kernel[(call.all_heads * n_slabs * call.blocks(tile),)](
        k, v, *partials,
        call.all_heads, call.heads, call.n_keys, slab, n_slabs,
        *strides,
        ONE_SLAB=n_slabs == 1, PRECISION=call.precision, **options,
    )  # fmt: skip
    if n_slabs > 1:
        grid, options = call.sums()
        _linear_attention_fwd_sum_kernel[grid](
            *partials, state, norm, n_slabs, **options
        )  # fmt: skip
    tile = call.config.forward
    n_slabs, slab = slabs(call.n_queries, call.all_heads, tile.block_n)
    strides, options = call.cut(tile, q, out)
    _linear_attention_fwd_kernel[(call.all_heads * n_slabs * call.blocks(tile),)](
        q, state, norm, out,
        *call.eps, call.all_heads, call.heads, call.n_queries, slab,
        *strides,
        WIDE=call.wide, **options,
    )  # fmt: skip
    return out, state, norm


def linear_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    norm: torch.Tensor,
    feature_map: str,
    eps: float,
    needs_dq: bool,
    needs_dkv: bool,
    config: LinearAttentionConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the backward.

    Args:
        dout: gradient of out, any strides.
        q, k, v, feature_map, eps, config: as in the forward.
        state, norm: what the forward returned.
        needs_dq, needs_dkv: which gradients to compute.

    Returns:
        dq, dk, dv, the axes of each in memory in the order of what it is the gradient of; what is not needed is
        empty, (0,).
    """
    call = _Call(q, v, feature_map, eps, config)
    heads = q.shape[:2]
    state, norm = state.contiguous(), norm.contiguous()  # vmap may have expanded them
    dq = empty_in_order(q, q.shape) if needs_dq else q.new_empty(0)
    dk, dv = (empty_in_order(each, each.shape) if needs_dkv else each.new_empty(0) for each in (k, v))

    tile = call.config.dq
    n_slabs, slab = slabs(call.n_queries, call.all_heads, tile.block_n, LINEAR_ATTENTION_SLAB if needs_dkv else 1)
    dstate, dnorm = state.new_empty(state.shape), state.new_empty((*heads, call.qk_dim))
    summed = needs_dkv and (n_slabs > 1 or call.softmax)
    partials = (dstate, dnorm)
    if summed:
        partials = tuple(each.new_empty((*heads, n_slabs, *each.shape[2:])) for each in partials)
    blocks = call.blocks(tile)
    strides, options = call.cut(tile, dout, q, dq if needs_dq else q)
    _linear_attention_bwd_dq_kernel[(call.all_heads * n_slabs * (blocks if needs_dkv else 1),)](
        dout, q, state, norm, dq, *partials,
        *call.eps, call.all_heads, call.heads, call.n_queries, slab, n_slabs,
        *strides,
        NEEDS_DQ=needs_dq, NEEDS_DKV=needs_dkv, V_BLOCKS=blocks, WIDE=call.wide, **options,
    )  # fmt: skip
    if not needs_dkv:
        return dq, dk, dv
    if summed:
        grid, options = call.sums()
        _linear_attention_bwd_sum_kernel[grid](
            *partials, state, norm, dstate, dnorm, n_slabs, **options
        )  # fmt: skip
    tile = call.config.dkv
    n_slabs, slab = slabs(call.n_keys, call.all_heads, tile.block_n)
    strides, options = call.cut(tile, k, v, dk, dv)
    _linear_attention_bwd_dkv_kernel[(call.all_heads * n_slabs,)](
        k, v, norm, dstate, dnorm, dk, dv,
        call.all_heads, call.heads, call.n_keys, slab,
        *strides,
        V_BLOCKS=call.blocks(tile), WIDE=call.wide, **options,
    )  # fmt: skip
    return dq, dk, dv
