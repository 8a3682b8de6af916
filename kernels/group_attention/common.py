"""What the kernels of group attention share: where tokens lie, masks, and the arguments of a call."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..attention import LOG2E, product_precision
from ..tuning import (
    DBIAS_GROUP_PROGRAMS,
    GROUP_PROGRAMS,
    GroupAttentionConfig,
    GroupTile,
    architecture,
    group_attention_config,
)

UNITS = (("d", 4), ("x", 2))
MAX_TOKENS = 128  # of a group


@triton.jit
def group_start(
    group, n_groups, window_h, window_w, dilation_h, dilation_w, padded_w, LAYOUT: tl.constexpr
):  # fmt: skip
    """Where a group begins: image, row and column of its first token, and the last two's places in a dilation.

    Groups are counted over all images; rows and columns are those of the map before it is shifted.
    """
    b = group // n_groups
    group = group % n_groups
    if LAYOUT == "row":
        return b, group, group * 0, group * 0, group * 0
    elif LAYOUT == "column":
        return b, group * 0, group, group * 0, group * 0
    else:
        groups_w = padded_w // window_w
        group_h = group // groups_w
        group_w = group % groups_w
        step_h = group_h % dilation_h
        step_w = group_w % dilation_w
        y = group_h // dilation_h * window_h * dilation_h + step_h
        x = group_w // dilation_w * window_w * dilation_w + step_w
        return b, y, x, step_h, step_w


@triton.jit
def next_start(
    b, y, x, step_h, step_w, height, width,
    window_h, window_w, dilation_h, dilation_w, padded_h, padded_w, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Where the next group begins, without a division."""
    if LAYOUT == "row":
        y += 1
        b += (y == height).to(tl.int32)
        y = tl.where(y == height, 0, y)
    elif LAYOUT == "column":
        x += 1
        b += (x == width).to(tl.int32)
        x = tl.where(x == width, 0, x)
    else:
        x, step_w = next_window(x, step_w, window_w, dilation_w)
        new_row = x == padded_w
        x = tl.where(new_row, 0, x)
        next_y, next_step_h = next_window(y, step_h, window_h, dilation_h)
        y = tl.where(new_row, next_y, y)
        step_h = tl.where(new_row, next_step_h, step_h)
        b += (y == padded_h).to(tl.int32)
        y = tl.where(y == padded_h, 0, y)
    return b, y, x, step_h, step_w


@triton.jit
def next_window(start, step, window, dilation):
    """The next window's first place along one axis: all steps of a dilation, then the window beyond."""
    start += 1
    step += 1
    last = step == dilation
    return tl.where(last, start + (window - 1) * dilation, start), tl.where(last, 0, step)


@triton.jit
def group_tokens(offs_t, window_w, dilation_h, dilation_w, LAYOUT: tl.constexpr):
    """How far a group's tokens lie below and to the right of its first."""
    if LAYOUT == "row":
        return offs_t * 0, offs_t
    elif LAYOUT == "column":
        return offs_t, offs_t * 0
    else:
        row = offs_t // window_w
        return row * dilation_h, (offs_t - row * window_w) * dilation_w


@triton.jit
def tile_offsets(down, right, offs_d, stride_y, stride_x, stride_d, UNIT: tl.constexpr, ALIGN: tl.constexpr, OFFSET):
    """Offsets [tokens, features] from a group's first token, the same for all groups.

    UNIT names the axis of stride 1; the others come divided by ALIGN.
    """
    offs = down.to(tl.int64) * stride_y * ALIGN
    if UNIT == "d":
        offs += right.to(tl.int64) * stride_x * ALIGN
        return offs.to(OFFSET)[:, None] + offs_d[None, :]
    elif UNIT == "x":
        offs += right
        return offs.to(OFFSET)[:, None] + (offs_d.to(tl.int64) * stride_d * ALIGN).to(OFFSET)[None, :]
    else:
        offs += right.to(tl.int64) * stride_x
        return offs.to(OFFSET)[:, None] + (offs_d.to(tl.int64) * stride_d).to(OFFSET)[None, :]


@triton.jit
def tile_pointers(
    ptr, offs, b, y, x, below, beyond, padded_h, padded_w, stride_b, stride_y, stride_x,
    WRAP: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr, OFFSET,
):  # fmt: skip
    """Pointers [tokens, features]: a group's first token, 64 bits wide, and offsets from there.

    WRAP: tokens that the shift carried beyond the map's lower or right edge lie at the other.
    """
    if UNIT == "x":
        ptr += (b.to(tl.int64) * stride_b + y.to(tl.int64) * stride_y) * ALIGN + x
    else:
        ptr += (b.to(tl.int64) * stride_b + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x) * ALIGN
    if WRAP:
        back_y = tl.full([], padded_h, tl.int64) * stride_y * ALIGN
        back_x = tl.full([], padded_w, tl.int64)
        if UNIT != "x":
            back_x = back_x * stride_x * ALIGN
        back = tl.where(below, back_y.to(OFFSET), 0) + tl.where(beyond, back_x.to(OFFSET), 0)
        offs -= back[:, None]
    return ptr + offs


@triton.jit
def pair_bias(
    bias_ptr, table_ptr, h, n_tokens, window_h, window_w, heads, stride_bias_h, stride_bias_m, stride_bias_n,
    LAYOUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One head's bias for all pairs of tokens of a group [queries, keys], to base 2; 0 if there is none."""
    bias = 0.0
    if HAS_BIAS or HAS_TABLE:
        # clamped, not masked: predicates for every pair would be held in registers
        place = tl.minimum(tl.arange(0, BLOCK), n_tokens - 1)
        if HAS_BIAS:
            place = place.to(tl.int64)
            bias_ptr += h.to(tl.int64) * stride_bias_h
            bias = tl.load(bias_ptr + (place * stride_bias_m)[:, None] + (place * stride_bias_n)[None, :])
        else:
            if LAYOUT == "window":
                place += place // window_w * (window_w - 1)
                centre = (window_h - 1) * (2 * window_w - 1) + window_w - 1
            else:
                centre = n_tokens - 1
            place *= heads
            bias = tl.load(table_ptr + place[:, None] - place[None, :] + centre * heads + h)
        bias = bias.to(ACC) * LOG2E
    return bias


@triton.jit
def masked_logits(
    logits, group, limit_y, limit_x, exists, span, window_h, window_w, dilation_h, dilation_w,
    MASK: tl.constexpr, SPAN: tl.constexpr, NO_CENTRE: tl.constexpr, BLOCK: tl.constexpr, CHECK_KEYS: tl.constexpr,
):  # fmt: skip
    """Logits to base 2 with -inf where a query does not see a key; keys of another part get MASK, "-inf" or "-100"."""
    offs_m = tl.arange(0, BLOCK)[:, None]
    offs_n = tl.arange(0, BLOCK)[None, :]
    if MASK != "":
        # what the shift carried around the edge is no neighbour
        over_edge = ((window_h - 1) * dilation_h >= limit_y) | ((window_w - 1) * dilation_w >= limit_x)
        if over_edge:
            # plus a zero that only a run shows: else the quotients would be held in registers from group to group
            offs_t = tl.arange(0, BLOCK) + tl.minimum(group, 0)
            down, right = group_tokens(offs_t, window_w, dilation_h, dilation_w, "window")
            part = (down >= limit_y).to(tl.int32) * 2 + (right >= limit_x).to(tl.int32)
            hidden = part[:, None] != part[None, :]
            if MASK == "-inf":
                logits = tl.where(hidden, float("-inf"), logits)
            else:
                logits = tl.where(hidden, logits - 100.0 * LOG2E, logits)
    if SPAN:
        logits = tl.where((offs_m - offs_n <= span) & (offs_n - offs_m <= span), logits, float("-inf"))
    if NO_CENTRE:
        logits = tl.where(offs_m != offs_n, logits, float("-inf"))
    if CHECK_KEYS:
        logits = tl.where(exists[None, :], logits, float("-inf"))
    return logits


@triton.jit
def exponentials(logits, largest, log2_scale, SCALED: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr):
    """2 to the logits less their row's largest; unless they are SCALED, the scale is left to a multiply-add."""
    if not SCALED:
        logits *= log2_scale
    return reached(tl.exp2(logits - largest[:, None]), REACH, BLOCK)


@triton.jit
def reached(pairs, REACH: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros from key REACH on, which the compiler then leaves out."""
    if REACH < BLOCK:
        return tl.where(tl.arange(0, BLOCK)[None, :] < REACH, pairs, 0.0)
    else:
        return pairs


def padded_side(size: int) -> int:
    """The side of the tile that holds a size: a power of two, as matrix products want it."""
    return max(16, 1 << (size - 1).bit_length())


def alike(strides: Sequence[int]) -> int:
    """Which tensors have the same strides, five each in a flat list.

    Returns:
        3 if all have; 2 if the first three have and all others have; 1 if the first three have; else 0.
    """
    each = [tuple(strides[start : start + 5]) for start in range(0, len(strides), 5)]
    if len(set(each[:3])) > 1:
        return 0
    return 1 if len(set(each[3:])) > 1 else 2 if each[3] != each[0] else 3


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
        self.options = {
            "HAS_BIAS": bias is not None,
            "MASK": mask if layout == "window" and any(shift) else "",
            "SPAN": span >= 0,
            "PADDED": layout == "window" and tuple(padded) != (height, width),
            "THRESHOLD": min(round(dropout_p * 2**32), 2**32 - 1),
            "KEEP_SCALE": 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
            "PRECISION": product_precision(q.dtype, architecture(q.device), max(qk_dim, v_dim)),
            "ACC": tl.float64 if double else tl.float32,
            "SCALE_FIRST": scale <= 0,  # otherwise maxima are taken before it
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

    def wide(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether offsets inside one image of some tensor need more than 32 bits, what is beyond the map included."""
        padded, dilation = self.geometry[4:], self.geometry[2:4]
        height, width = (max(size, MAX_TOKENS * step) for size, step in zip(padded, dilation, strict=True))
        return any(
            height * x.stride(1) + width * x.stride(2) + padded_side(x.shape[4]) * x.stride(4) >= 2**31 for x in tensors
        )

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
        tokens = self.tokens[axis]
        # that tokens below one number exist and from the other on none do is known when this is compiled
        bounds = {"WHOLE": tokens // 8 * 8, "REACH": -(-tokens // 8) * 8}
        own = bounds | {"LAYOUT": axis, "BLOCK": block, "HAS_TABLE": self.tables[axis] is not None}
        return self.options | own | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
