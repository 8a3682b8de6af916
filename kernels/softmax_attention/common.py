"""What the kernels of softmax attention share: tiles, extras, statistics, and the arguments of a call."""

import torch
import triton
import triton.language as tl

from ..attention import LOG2E, divided_strides
from ..tuning import SoftmaxAttentionConfig, Tile, architecture, softmax_attention_config


@triton.jit
def load_tile(
    ptr, offs_n, offs_d, stride_n, stride_d, n, dim,
    CHECK_N: tl.constexpr, CHECK_D: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows offs_n and columns offs_d of one head; what lies outside is 0."""
    ptrs = ptr + tile_offsets(offs_n, offs_d, stride_n, stride_d, UNIT, ALIGN)
    if CHECK_N and CHECK_D:
        return tl.load(ptrs, mask=(offs_n[:, None] < n) & (offs_d[None, :] < dim), other=0.0)
    elif CHECK_N:
        return tl.load(ptrs, mask=offs_n[:, None] < n, other=0.0)
    elif CHECK_D:
        return tl.load(ptrs, mask=offs_d[None, :] < dim, other=0.0)
    else:
        return tl.load(ptrs)


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
def store_tile(
    ptr, values, offs_n, offs_d, stride_n, stride_d, n, dim,
    UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    ptrs = ptr + tile_offsets(offs_n, offs_d, stride_n, stride_d, UNIT, ALIGN)
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=(offs_n[:, None] < n) & (offs_d[None, :] < dim))


@triton.jit
def exponential(x, LOG2_UNITS: tl.constexpr):
    if LOG2_UNITS:
        return tl.exp2(x)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def table_position(offs, n, width, HAS_TABLE: tl.constexpr):
    """A token's share of the row of the bias table, which is the query's less the key's plus the centre."""
    if HAS_TABLE:
        offs = tl.minimum(offs, n - 1)  # clamped rather than masked: a gather has no vectors to lose
        row = offs // width
        return row * (2 * width - 1) + offs - row * width
    else:
        return offs


@triton.jit
def load_pairs(
    ptr, offs_m, offs_n, m_axis: tl.constexpr, n_axis: tl.constexpr, stride_m, stride_n, n_queries, n_keys,
    CHECK_M: tl.constexpr, CHECK_N: tl.constexpr,
):  # fmt: skip
    """What one head has for pairs of queries and keys; a single row where stride_m is None, one for all queries."""
    ptrs = ptr + tl.expand_dims(offs_n.to(tl.int64) * stride_n, m_axis)
    if stride_m is not None:
        if CHECK_M:  # clamped: what queries beyond the last get is not used, and whole blocks of keys need no mask
            offs_m = tl.minimum(offs_m, n_queries - 1)
        ptrs += tl.expand_dims(offs_m.to(tl.int64) * stride_m, n_axis)
    if CHECK_N:
        return tl.load(ptrs, mask=tl.expand_dims(offs_n < n_keys, m_axis), other=0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_extras(
    offs_m, offs_n, position_m, position_n, m_axis: tl.constexpr, n_axis: tl.constexpr,
    bias_ptr, mask_ptr, table_ptr,
    n_queries, n_keys,
    stride_bias_m, stride_bias_n, stride_mask_m, stride_mask_n,
    CHECK_M: tl.constexpr, CHECK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_MASK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One head's bias, the bias table's added to it, and mask for a tile of logits that lies either way; 0 if absent.

    Called before the product that gives the logits: where layouts disagree, the compiler keeps that of what comes
    last, and if that were the gathered bias's, it would compute the softmax in both.
    """
    bias = 0.0
    allowed = 0
    if HAS_BIAS:
        bias = load_pairs(
            bias_ptr, offs_m, offs_n, m_axis, n_axis, stride_bias_m, stride_bias_n, n_queries, n_keys, CHECK_M, CHECK_N
        ).to(ACC)
    if HAS_TABLE:
        rows = tl.expand_dims(position_m, n_axis) - tl.expand_dims(position_n, m_axis)
        entries = tl.load(table_ptr + rows).to(ACC)
        bias = bias + entries if HAS_BIAS else entries
    if HAS_MASK:
        allowed = load_pairs(
            mask_ptr, offs_m, offs_n, m_axis, n_axis, stride_mask_m, stride_mask_n, n_queries, n_keys, CHECK_M, CHECK_N
        )
    return bias, allowed


@triton.jit
def add_extras(logits, bias, allowed, HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_MASK: tl.constexpr):
    """Add the bias to a tile of logits and put -inf where the mask says so."""
    if HAS_BIAS or HAS_TABLE:
        logits += bias
    if HAS_MASK:
        logits = tl.where(allowed != 0, logits, float("-inf"))
    return logits


@triton.jit
def load_row_stats(row_max_ptr, log_sum_ptr, offs, mask, LOG2_UNITS: tl.constexpr):
    """Maximum and logarithm of the sum of rows. In units of log 2 the forward kept their sum, which stands for both."""
    row_max = tl.load(row_max_ptr + offs, mask=mask, other=0.0)
    log_sum = row_max
    if not LOG2_UNITS:
        log_sum = tl.load(log_sum_ptr + offs, mask=mask, other=0.0)
    return row_max, log_sum


@triton.jit
def probabilities(logits, row_max, log_sum, LOG2_UNITS: tl.constexpr):
    """The softmax of logits, given what ``load_row_stats`` returned, broadcastable."""
    if LOG2_UNITS:
        return tl.exp2(logits - row_max)
    else:
        return tl.exp2(((logits - row_max) - log_sum) * LOG2E)


@triton.jit
def dot_rows(a, a_tail, b, b_tail, HAS_TAIL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a b^T over a head's dimensions, which come as a main part and a tail."""
    product = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=ACC)
    if HAS_TAIL:
        product = tl.dot(a_tail, tl.trans(b_tail), product, input_precision=PRECISION, out_dtype=ACC)
    return product


def split_dim(dim: int) -> tuple[int, int]:
    """A head dimension as a main part and a tail: 72 is 64 + 16, 96 is 64 + 32, 40 is 32 + 16, 64 is 64 + 0."""
    main = max(16, 1 << (dim.bit_length() - 1))
    tail = max(16, triton.next_power_of_2(dim - main)) if dim > main else 0
    return (main, tail) if tail < main else (2 * main, 0)


def addressed(*tensors: torch.Tensor) -> tuple[dict[str, object], list[int]]:
    """The constexprs and the flat list of strides for these tensors."""
    unit, align, steps = divided_strides((("d", 3), ("n", 2)), tensors)
    return {"UNIT": unit, "ALIGN": align}, steps


def _broadcast_strides(tensor: torch.Tensor | None) -> list[int | None]:
    """Strides, 0 along axes of one element, but None for queries, so that kernels are compiled for it."""
    if tensor is None:
        return [0, 0, None, 0]
    strides = [0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    return [*strides[:2], strides[2] if tensor.shape[2] > 1 else None, strides[3]]


class Call:
    """What all launches of one call take: sizes, extras and constexprs, by the names the kernels give them."""

    def __init__(
        self,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        bias: torch.Tensor | None, mask: torch.Tensor | None, table: torch.Tensor | None, rng: torch.Tensor | None,
        width: int, scale: float, is_causal: bool, dropout_p: float,
        config: SoftmaxAttentionConfig | None,
    ) -> None:  # fmt: skip
        batch, self.heads, self.n_queries, qk_dim = q.shape
        key_heads, self.n_keys, v_dim = v.shape[1:]
        self.all_heads, self.all_key_heads = batch * self.heads, batch * key_heads
        self.config = config or softmax_attention_config(
            architecture(q.device),
            itemsize=q.element_size(),
            head_dim=max(qk_dim, v_dim),
            extras=sum(tensor is not None for tensor in (bias, mask, table, rng)),
        )
        has_bias = bias is not None or table is not None
        double = q.dtype == torch.float64
        self.dq_scale = 1.0 if double else scale
        if double:  # a float argument has 32 bits, so the scale is in q
            q, scale = q * scale, 1.0
        elif scale <= 0:  # the forward takes maxima before it scales
            q, scale = (-q, -scale) if scale else (q * 0, 1.0)
        self.dk_scale = scale
        self.logit_scale = scale * (1.0 if has_bias else LOG2E.value)
        self.acc_dtype = torch.float64 if double else torch.float32
        if mask is not None:
            # beside a tensor of 8 bits the compiler finds no product of float64 on NVIDIA
            mask = mask.to(torch.int32) if double else mask.view(torch.uint8)
        if table is not None:
            table = table.t().contiguous()  # a query's keys on one row of the grid read neighbouring entries
        self.q = q
        self.inputs = (q, k, v, *(q if extra is None else extra for extra in (bias, mask, table, rng)))
        centre = 0 if table is None else table.shape[1] // 2
        self.sizes = (
            self.heads, self.heads // key_heads, self.n_queries, self.n_keys, qk_dim, v_dim, width, centre
        )  # fmt: skip
        self.extra_strides = (
            *_broadcast_strides(bias), *_broadcast_strides(mask), 0 if table is None else table.shape[1]
        )  # fmt: skip
        (qk_main, qk_tail), (v_main, v_tail) = split_dim(qk_dim), split_dim(v_dim)
        tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        self.options = {
            "HAS_BIAS": bias is not None,
            "HAS_TABLE": table is not None,
            "HAS_MASK": mask is not None,
            "CAUSAL": is_causal,
            "THRESHOLD": min(round(dropout_p * 2**32), 2**32 - 1),
            "KEEP_SCALE": 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
            "QK_MAIN": qk_main,
            "QK_TAIL": qk_tail,
            "CHECK_QK": qk_main + qk_tail != qk_dim,
            "V_MAIN": v_main,
            "V_TAIL": v_tail,
            "CHECK_V": v_main + v_tail != v_dim,
            "PRECISION": "tf32" if tf32 else "ieee",
            "ACC": tl.float64 if double else tl.float32,
        }

    def cut(self, tile: Tile) -> dict[str, object]:
        """The constexprs and compile options of a kernel cut up so."""
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        return self.options | blocks | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
