"""What the kernels of softmax attention share: tiles, extras, statistics, and the arguments of a call."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..attention import LOG2E, divided_strides, product_precision
from ..tuning import DENSE_TABLE_BYTES, SoftmaxAttentionConfig, Tile, architecture, softmax_attention_config

MAX_BLOCK = 256  # queries, keys or dimensions of a tile


@triton.jit
def load_tile(
    ptr, offs_n, offs_d, stride_n, stride_d, n, dim,
    CHECK_N: tl.constexpr, CHECK_D: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows offs_n and columns offs_d of one head; what lies outside is 0."""
    tile = tile_offsets(offs_n, offs_d, stride_n, stride_d, UNIT, ALIGN)
    return load_at(ptr, tile, offs_n, offs_d, n, dim, CHECK_N, CHECK_D)


@triton.jit
def load_at(ptr, tile, offs_n, offs_d, n, dim, CHECK_N: tl.constexpr, CHECK_D: tl.constexpr):
    """``load_tile`` with the tile's offsets given, which a loop leaves as they are and moves the pointer instead."""
    ptrs = ptr + tile
    if CHECK_N and CHECK_D:
        return tl.load(ptrs, mask=(offs_n[:, None] < n) & (offs_d[None, :] < dim), other=0.0)
    elif CHECK_N:
        return tl.load(ptrs, mask=offs_n[:, None] < n, other=0.0)
    elif CHECK_D:
        return tl.load(ptrs, mask=offs_d[None, :] < dim, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def token_offset(start, stride_n, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """Elements from a head's first token to this one, 64 bits wide."""
    start = tl.full([], 0, tl.int64) + start
    if UNIT == "n":
        return start
    elif UNIT == "d":
        return start * stride_n * ALIGN
    else:
        return start * stride_n


@triton.jit
def tile_offsets(
    offs_n, offs_d, stride_n, stride_d, UNIT: tl.constexpr, ALIGN: tl.constexpr, OFFSETS: tl.constexpr = tl.int64
):  # fmt: skip
    """Element offsets. UNIT names the axis whose stride is 1; the other's comes divided by ALIGN.

    OFFSETS is their integer type. It may be 32 bits wide only for a tile that starts where its pointer points.
    """
    if UNIT == "d":
        return (offs_n.to(tl.int64) * stride_n * ALIGN).to(OFFSETS)[:, None] + offs_d[None, :]
    elif UNIT == "n":
        return offs_n[:, None] + (offs_d.to(tl.int64) * stride_d * ALIGN).to(OFFSETS)[None, :]
    else:
        rows = (offs_n.to(tl.int64) * stride_n).to(OFFSETS)
        return rows[:, None] + (offs_d.to(tl.int64) * stride_d).to(OFFSETS)[None, :]


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
def pair_offsets(
    offs_m, offs_n, m_axis: tl.constexpr, n_axis: tl.constexpr, stride_m, stride_n,
    ALIGN: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Element offsets of pairs of queries and keys; one row where stride_m is None, for all queries."""
    offsets = tl.expand_dims((offs_n.to(tl.int64) * stride_n).to(OFFSETS), m_axis)
    if stride_m is not None:
        offsets += tl.expand_dims((offs_m.to(tl.int64) * stride_m * ALIGN).to(OFFSETS), n_axis)
    return offsets


@triton.jit
def query_offset(start, stride_m, ALIGN: tl.constexpr):
    """Elements from the first query's pairs to this one's, 64 bits wide."""
    offset = tl.full([], 0, tl.int64)
    if stride_m is not None:
        offset = (offset + start) * stride_m * ALIGN
    return offset


@triton.jit
def key_offset(start, stride_n):
    """Elements from the first key's pairs to this one's, 64 bits wide."""
    return (tl.full([], 0, tl.int64) + start) * stride_n


@triton.jit
def load_pairs(ptr, tile, offs_n, m_axis: tl.constexpr, n_keys, CHECK_N: tl.constexpr, KEYS_ALIGN: tl.constexpr):
    """What one head has for pairs of queries and keys. KEYS_ALIGN divides n_keys, which leaves masked loads wide."""
    if CHECK_N:
        exists = offs_n < n_keys // KEYS_ALIGN * KEYS_ALIGN
        return tl.load(ptr + tile, mask=tl.expand_dims(exists, m_axis), other=0)
    else:
        return tl.load(ptr + tile)


@triton.jit
def load_bias(
    bias_ptr, bias_tile, table_ptr, position_m, position_n, offs_n, n_keys,
    m_axis: tl.constexpr, n_axis: tl.constexpr,
    CHECK_N: tl.constexpr, KEYS_ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One head's bias, the bias table's added to it, for a tile of logits that lies either way; 0 if absent.

    Called before the product that gives the logits: where layouts disagree, the compiler keeps that of what comes
    last, and if that were the gathered bias's, it would compute the softmax in both.
    """
    bias = 0.0
    if HAS_BIAS:
        bias = load_pairs(bias_ptr, bias_tile, offs_n, m_axis, n_keys, CHECK_N, KEYS_ALIGN).to(ACC)
    if HAS_TABLE:
        rows = tl.expand_dims(position_m, n_axis) - tl.expand_dims(position_n, m_axis)
        entries = tl.load(table_ptr + rows).to(ACC)
        bias = bias + entries if HAS_BIAS else entries
    return bias


@triton.jit
def add_extras(logits, bias, allowed, HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_MASK: tl.constexpr):
    """Add the bias to a tile of logits and put -inf where the mask says so."""
    if HAS_BIAS or HAS_TABLE:
        logits += bias
    if HAS_MASK:
        logits = tl.where(allowed != 0, logits, float("-inf"))
    return logits


@triton.jit
def load_row_stats(
    row_max_ptr, log_sum_ptr, offs, mask, CHECK: tl.constexpr, TWO_STATS: tl.constexpr
):  # fmt: skip
    """Maximum and logarithm of the sum of rows. Without a bias the forward kept their sum, which stands for both."""
    row_max = load_rows(row_max_ptr, offs, mask, CHECK)
    log_sum = row_max
    if TWO_STATS:
        log_sum = load_rows(log_sum_ptr, offs, mask, CHECK)
    return row_max, log_sum


@triton.jit
def load_rows(ptr, offs, mask, CHECK: tl.constexpr):
    if CHECK:
        return tl.load(ptr + offs, mask=mask, other=0.0)
    else:
        return tl.load(ptr + offs)


@triton.jit
def probabilities(logits, row_max, log_sum, TWO_STATS: tl.constexpr, LOG2_UNITS: tl.constexpr):
    """The softmax of logits, given what ``load_row_stats`` returned, broadcastable."""
    if TWO_STATS:  # the difference first: it cannot overflow
        return tl.exp2((logits - row_max) * LOG2E - log_sum * LOG2E)
    else:
        return exponential(logits - row_max, LOG2_UNITS)


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
    return {"UNIT": unit, "ALIGN": align, "OFFSETS": _offset_type(tensors)}, steps


def _offset_type(tensors: Sequence[torch.Tensor | None]) -> tl.dtype:
    """The integer type of offsets inside a tile of these tensors, q first, along their last two axes.

    32 bits where they hold them, in the kernels of few instructions a step; in the others 64 took fewer registers.
    """
    q = tensors[0]
    assert q is not None
    widest = max(sum(map(abs, tensor.stride()[2:])) for tensor in tensors if tensor is not None)
    narrow = q.element_size() == 2 and q.shape[-1] <= 128 and widest < 2**31 // MAX_BLOCK
    return tl.int32 if narrow else tl.int64


def _broadcast_strides(tensor: torch.Tensor | None) -> tuple[list[int | None], int]:
    """Strides, 0 along axes of one element, but None for queries, so that kernels are compiled for it; and ALIGN.

    Where keys are contiguous, the others come divided by ALIGN, for the reason given in ``divided_strides``.
    """
    if tensor is None:
        return [0, 0, None, 0], 1
    strides = [0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    align = math.gcd(16, *strides[:3]) if strides[3] == 1 else 1
    steps = [step // align for step in strides[:3]]
    return [*steps[:2], steps[2] if tensor.shape[2] > 1 else None, strides[3]], align


@triton.jit
def _softmax_attention_dense_table_kernel(
    table_ptr, bias_ptr,
    n_tokens, width, table_centre,
    stride_table_h, stride_table_r, stride_bias_h, stride_bias_m,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns one query of one head."""
    h = (tl.program_id(0) // n_tokens).to(tl.int64)
    query = tl.program_id(0) % n_tokens
    centre = table_position(query, n_tokens, width, True) + table_centre
    table_ptr += h * stride_table_h
    bias_ptr += h * stride_bias_h + query.to(tl.int64) * stride_bias_m
    for start in tl.range(0, n_tokens, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        rows = (centre - table_position(keys, n_tokens, width, True)).to(tl.int64)
        exists = keys < n_tokens
        tl.store(bias_ptr + keys, tl.load(table_ptr + rows * stride_table_r, mask=exists), mask=exists)


def dense_table(table: torch.Tensor, n_tokens: int, width: int) -> torch.Tensor:
    """A bias table spread out to (1, heads, n_tokens, n_tokens), its rows in memory a multiple of 16 bytes apart."""
    heads, row = table.shape[1], 16 // table.element_size()
    bias = table.new_empty((1, heads, n_tokens, triton.cdiv(n_tokens, row) * row))[..., :n_tokens]
    _softmax_attention_dense_table_kernel[(heads * n_tokens,)](
        table, bias,
        n_tokens, width, table.shape[0] // 2,
        table.stride(1), table.stride(0), bias.stride(1), bias.stride(2),
        BLOCK_N=min(1024, max(32, triton.next_power_of_2(n_tokens))), num_warps=4,
    )  # fmt: skip
    return bias


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
        arch = architecture(q.device)
        self.config = config or softmax_attention_config(
            arch,
            itemsize=q.element_size(),
            head_dim=max(qk_dim, v_dim),
            extras=sum(tensor is not None for tensor in (bias, mask, table, rng)),
        )
        has_bias = bias is not None or table is not None
        if table is not None and bias is None:
            size = self.heads * self.n_queries * self.n_keys * table.element_size()
            if size <= DENSE_TABLE_BYTES:  # rows of it are read at once, and all batches find it in the cache
                bias, table = dense_table(table, self.n_keys, width), None
        double = q.dtype == torch.float64
        self.dq_scale = 1.0 if double else scale
        if double:  # a float argument has 32 bits, so the scale is in q
            q, scale = q * scale, 1.0
        elif scale <= 0:  # the forward takes maxima before it scales
            q, scale = (-q, -scale) if scale else (q * 0, 1.0)
        self.dk_scale = scale
        self.logit_scale = scale * (1.0 if has_bias or double else LOG2E.value)
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
        (bias_strides, bias_align), (mask_strides, mask_align) = _broadcast_strides(bias), _broadcast_strides(mask)
        self.extra_strides = (*bias_strides, *mask_strides, 0 if table is None else table.shape[1])
        (qk_main, qk_tail), (v_main, v_tail) = split_dim(qk_dim), split_dim(v_dim)
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
            "PRECISION": product_precision(q.dtype, arch, max(qk_dim, v_dim)),
            "EXTRA_OFFSETS": _offset_type((q, bias, mask)),
            "KEYS_ALIGN": math.gcd(16, self.n_keys),
            "BIAS_ALIGN": bias_align,
            "MASK_ALIGN": mask_align,
            "ACC": tl.float64 if double else tl.float32,
        }

    def rest(self, size: int, block: int) -> int:
        """The block for what is left of keys or queries beyond whole blocks, which a causal mask has checked, too."""
        return block if self.options["CAUSAL"] else min(block, max(16, 1 << (size % block - 1).bit_length()))

    def cut(self, tile: Tile) -> dict[str, object]:
        """The constexprs and compile options of a kernel cut up so."""
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        return self.options | blocks | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
