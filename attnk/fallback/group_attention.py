"""Group attention in plain PyTorch: views of rows and columns, copies of windows, attention over all groups at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from attnk.groups import far_pairs, group_count, group_places, group_window, table_gradient
from attnk.memory import empty_in_order, in_order

from . import softmax_attention as streaming

KEPT_TOKENS = 64  # groups of no more keep their weights for the backward, fewer numbers than half of what they read


@dataclass(frozen=True)
class Kind:
    """Groups whose queries see the same keys.

    Attributes:
        number: of those of a call, for dropout.
        groups: which of those that are taken from a map together.
        hidden: bool (tokens, tokens), or None where every query sees every key.
        added: float (tokens, tokens), added to the logits, or None.
    """

    number: int
    groups: slice
    hidden: torch.Tensor | None
    added: torch.Tensor | None = None


class Lines:
    """Rows or columns of some images, as views of the map."""

    def __init__(self, number: int, images: slice, axis: str, groups: int, hidden: torch.Tensor | None) -> None:
        self.kinds = [Kind(number, slice(0, groups), hidden)]
        self.images = images
        self.order = (0, 1, 3, 2, 4) if axis == "row" else (0, 2, 3, 1, 4)
        self.back = (0, 1, 3, 2, 4) if axis == "row" else (0, 3, 1, 2, 4)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """(groups, heads, tokens, D) of a map (B, height, width, heads, D)."""
        return x[self.images].permute(self.order).flatten(0, 1)

    def weights(self, kept: torch.Tensor) -> torch.Tensor:
        """(groups, heads, tokens, tokens) of what ``weights_empty`` returned."""
        return kept[self.images].flatten(0, 1)

    def put(self, x: torch.Tensor | None, values: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Write what each kind has into a map, or into a new one whose axes lie in the order of another's."""
        (lines,) = values
        if x is None and self.images.stop == like.shape[0] and self.images.start == 0:
            # all there is: as it lies, if it lies so already
            return in_order(lines.unflatten(0, (like.shape[0], -1)).permute(self.back), like)
        if x is None:
            x = empty_in_order(like, (*like.shape[:4], lines.shape[-1]), lines.dtype)
        part = x[self.images].permute(self.order)
        part.copy_(lines.unflatten(0, part.shape[:2]))
        return x


class Tiles:
    """Windows of all images that divide the map and are not shifted: views of it, copied as they are read."""

    def __init__(self, batch: int, height: int, width: int, window: tuple, dilation: tuple, span: int, device: Any):
        self.sides = [(-1, part, step) for part, step in zip(window, dilation, strict=True)]
        groups = batch * group_count(height, width, window, dilation)
        self.kinds = [Kind(0, slice(0, groups), far_pairs(window[0] * window[1], span, False, device))]

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """(block rows, steps, block columns, steps, B, heads, rows, columns, D) of (B, height, width, heads, D)."""
        rows, columns = self.sides
        return x.unflatten(2, columns).unflatten(1, rows).permute(1, 3, 4, 6, 0, 7, 2, 5, 8)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """(windows x B, heads, tokens, D) of a map (B, height, width, heads, D)."""
        return self.view(x).flatten(6, 7).flatten(0, 4)

    def weights(self, kept: torch.Tensor) -> torch.Tensor:
        """(windows x B, heads, tokens, tokens) of what ``weights_empty`` returned."""
        return kept.transpose(0, 1).flatten(0, 1)

    def put(self, x: torch.Tensor | None, values: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """A new map of what the windows have, whose axes lie in the order of another's."""
        (windows,) = values
        x = empty_in_order(like, (*like.shape[:4], windows.shape[-1]), windows.dtype)
        part = self.view(x)
        part.copy_(windows.view(part.shape))
        return x


class Windows:
    """Windows of all images, copied once, by rows of D numbers.

    Args:
        places: (windows, tokens) in the map, counted row by row, -1 where there is no token.
        batch, width: images, and of a map.
        kinds: of windows, which lie together; groups count the images of a window one after another.
    """

    def __init__(self, places: torch.Tensor, batch: int, width: int, kinds: list[Kind]) -> None:
        self.kinds = kinds
        self.places, self.batch, self.width = places, batch, width
        self.missing = (places < 0).nonzero(as_tuple=True)
        self.sources: dict[tuple[int, ...], torch.Tensor] = {}
        self.targets: dict[int, torch.Tensor] = {}

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """(windows x B, heads, tokens, D) of a map (B, height, width, heads, D)."""
        heads, dim = x.shape[3:]
        if x.stride(4) != 1 or any(stride % dim for stride in x.stride()[:4]):
            x = x.contiguous()
        strides = tuple(stride // dim for stride in x.stride()[:4])
        n_rows = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=False))
        key = (heads, *strides)
        if key not in self.sources:
            self.sources[key] = self._source(heads, *strides)
        rows = x.as_strided((n_rows, dim), (dim, 1)).index_select(0, self.sources[key])
        if len(self.missing[0]):
            windows, tokens = self.missing
            rows.view(len(self.places), self.batch * heads, -1, dim).transpose(1, 2)[windows, tokens] = 0
        return rows.view(-1, heads, self.places.shape[1], dim)

    def _source(self, heads: int, *strides: int) -> torch.Tensor:
        """Which row each of the windows' is; of a token that is not there, any."""
        image, line, column, head = strides
        places = self.places.clamp(min=0)
        places = (places // self.width) * line + places % self.width * column
        images = image * torch.arange(self.batch, device=places.device).view(-1, 1, 1)
        return (places[:, None, None] + images + head * torch.arange(heads, device=places.device)[:, None]).flatten()

    def weights(self, kept: torch.Tensor) -> torch.Tensor:
        """(windows x B, heads, tokens, tokens) of what ``weights_empty`` returned, whose last windows may be empty."""
        return kept.transpose(0, 1).flatten(0, 1)

    def put(self, x: torch.Tensor | None, values: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """A new map of what each kind has, whose axes lie in the order of another's."""
        windows = values[0] if len(values) == 1 else torch.cat(values)
        heads = windows.shape[1]
        if heads not in self.targets:
            self.targets[heads] = self._target(heads)
        rows = windows.flatten(0, 2).index_select(0, self.targets[heads])
        return in_order(rows.view(*like.shape[:4], -1), like)

    def _target(self, heads: int) -> torch.Tensor:
        """Which of the windows' rows each of the map's is."""
        windows, tokens = (self.places >= 0).nonzero(as_tuple=True)
        order = self.places[windows, tokens].argsort()
        windows, tokens = windows[order].unsqueeze(1), tokens[order].unsqueeze(1)
        images = torch.arange(self.batch, device=order.device).view(-1, 1, 1)
        groups = windows * self.batch + images
        return ((groups * heads + torch.arange(heads, device=order.device)) * self.places.shape[1] + tokens).flatten()


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward, with the arguments of the kernels' launcher.

    Returns:
        out; and what the backward reads: for "criss_cross" lse (2, B, height, width, heads), that of rows and that of
        both; else the weights (B, groups, heads, tokens, tokens) of short groups, or lse (B, height, width, heads)
        where PyTorch's fused attention did the forward; else nothing, (0,).
    """
    geometry = (window, shift, dilation, span, mask)
    options = (scale, dropout_p)
    if layout == "criss_cross":
        row, row_lse = _forward(q, k, v, None, table, rng, "row", geometry, *options, True)
        column, column_lse = _forward(
            q, k, v, None, column_table, rng, "column", geometry, *options, True, no_centre=True
        )
        lse = torch.logaddexp(row_lse, column_lse)
        row.mul_((row_lse - lse).exp_().unsqueeze(-1).to(row.dtype))
        row.addcmul_(column, (column_lse - lse).exp_().unsqueeze(-1).to(column.dtype))
        return row, torch.stack([row_lse, lse])
    if _is_short(q, layout, window, dropout_p):
        weights = None
        if keep and keeps_weights(q, layout, window, dropout_p):
            weights = weights_empty(q, layout, window, dilation)
        out = _short_forward(q, k, v, _pair_bias(bias, table, layout, q, window), layout, geometry, scale, weights)
        return out, q.new_empty(0) if weights is None else weights
    wants_lse = keep and keeps_lse(q, v, layout, window, dropout_p)
    return _forward(q, k, v, bias, table, rng, layout, geometry, *options, wants_lse)


def _is_short(q: torch.Tensor, layout: str, window: Sequence[int], dropout_p: float) -> bool:
    return dropout_p == 0 and streaming.is_short(q, _tokens(q, layout, window))


def keeps_weights(q: torch.Tensor, layout: str, window: Sequence[int], dropout_p: float) -> bool:
    """Whether the forward keeps the weights for the backward."""
    return _tokens(q, layout, window) <= KEPT_TOKENS and _is_short(q, layout, window, dropout_p)


def keeps_lse(q: torch.Tensor, v: torch.Tensor, layout: str, window: Sequence[int], dropout_p: float) -> bool:
    """Whether PyTorch's fused attention does the forward, whose backward wants lse."""
    fits = streaming.fused_fits(q, v, None, None, None, False, dropout_p)
    return fits and not streaming.is_short(q, _tokens(q, layout, window))


def weights_empty(q: torch.Tensor, layout: str, window: Sequence[int], dilation: Sequence[int]) -> torch.Tensor:
    """Room for the weights (B, groups, heads, tokens, tokens), in memory as they are computed."""
    batch, height, width, heads, _ = q.shape
    tokens = _tokens(q, layout, window)
    if layout == "window":
        groups = group_count(height, width, window, dilation)
        return q.new_empty(groups, batch, heads, tokens, tokens).transpose(0, 1)
    return q.new_empty(batch, height if layout == "row" else width, heads, tokens, tokens)


def _tokens(q: torch.Tensor, layout: str, window: Sequence[int]) -> int:
    height, width = group_window(layout, q.shape[1], q.shape[2], window)
    return height * width


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor | None,
    rng: torch.Tensor | None, layout: str, geometry: tuple, scale: float, dropout_p: float, wants_lse: bool,
    no_centre: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out = lse = None
    dense = _pair_bias(bias, table, layout, q, geometry[0])
    for groups in _groups((q, k, v), layout, geometry, no_centre):
        taken = [groups.take(x) for x in (q, k, v)]
        results = []
        for kind in groups.kinds:
            q_part, k_part, v_part = (x[kind.groups] for x in taken)
            results.append(
                streaming.softmax_attention_forward(
                    q_part, k_part, v_part, _added(kind, dense, q.dtype), None, None, _kind_rng(rng, layout, kind),
                    0, scale, False, dropout_p, False, wants_lse,
                )
            )  # fmt: skip
        out = groups.put(out, [result for result, *_ in results], q)
        if wants_lse:
            lse = groups.put(lse, [part.unsqueeze(-1) for _, part, *_ in results], q)
    assert out is not None
    if lse is None:
        return out, q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
    return out, lse.squeeze(-1).contiguous()


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
    kept: torch.Tensor | None,
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
) -> tuple[torch.Tensor, ...]:
    """The backward, with the arguments and results of the kernels' launcher."""
    geometry = (window, shift, dilation, span, mask)
    options = (scale, dropout_p, needs_dq, needs_dkv)
    if layout != "criss_cross":
        pairs_wanted = (bias is not None and needs_dbias) or (table is not None and needs_dtables)
        if _is_short(q, layout, window, dropout_p):
            dense = _pair_bias(bias, table, layout, q, window)
            dq, dk, dv, pairs = _short_backward(
                dout, q, k, v, dense, kept, layout, geometry, scale, needs_dq, needs_dkv, pairs_wanted
            )
        else:
            assert out is not None
            dq, dk, dv, pairs = _backward(
                dout, q, k, v, bias, table, rng, out, kept, layout, geometry, *options, pairs_wanted
            )
        dtable = _table_gradient(pairs, table if needs_dtables else None, layout, q, window)
        dbias = pairs.to(bias.dtype) if bias is not None and needs_dbias else q.new_empty(0)
        return dq, dk, dv, dbias, dtable, q.new_empty(0)
    assert out is not None
    assert kept is not None
    fused = streaming.fused_fits(q, v, None, None, None, False, dropout_p)
    row_lse, both = kept
    share = (row_lse - both).exp_().unsqueeze(-1).to(dout.dtype)
    grads, dtables = [], []
    for axis, axis_table, part in (("row", table, share), ("column", column_table, 1 - share)):
        pairs_wanted = axis_table is not None and needs_dtables
        # by way of the lse of both, or the softmax of one axis once more, of which the other leaves a share
        by_lse = fused and not pairs_wanted
        *axis_grads, pairs = _backward(
            dout if by_lse else dout * part, q, k, v, None, axis_table, rng, out, both if by_lse else None, axis,
            geometry, *options, pairs_wanted, no_centre=axis == "column", is_joint=True,
        )  # fmt: skip
        grads.append(axis_grads)
        dtables.append(_table_gradient(pairs, axis_table, axis, q, window))
    summed = [row.add_(column) for row, column in zip(*grads, strict=True)]
    return *summed, q.new_empty(0), *dtables


def _backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
    table: torch.Tensor | None, rng: torch.Tensor | None, out: torch.Tensor, kept: torch.Tensor | None,
    layout: str, geometry: tuple, scale: float, dropout_p: float, needs_dq: bool, needs_dkv: bool, pairs_wanted: bool,
    no_centre: bool = False, is_joint: bool = False,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dq, dk, dv, and the gradient of the bias of all pairs (heads, tokens, tokens); empty where not wanted."""
    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    nothing = q.new_empty(0, dtype=acc_dtype)
    maps: list[torch.Tensor | None] = [None, None, None]
    needs = (needs_dq, needs_dkv, needs_dkv)
    dense = _pair_bias(bias, table, layout, q, geometry[0])
    pairs = nothing if dense is None or not pairs_wanted else torch.zeros_like(dense, dtype=acc_dtype)
    by_lse = kept is not None and kept.dim() == 4
    also_read = [out] if by_lse or is_joint else []
    if by_lse and kept is not None:
        also_read.append(kept.unsqueeze(-1))
    for groups in _groups((q, k, v), layout, geometry, no_centre):  # as in the forward, for dropout's sake
        taken = [groups.take(x) for x in (dout, q, k, v, *also_read)]
        results = []
        for kind in groups.kinds:
            dout_part, q_part, k_part, v_part, *also_parts = (x[kind.groups] for x in taken)
            out_part, lse_part = (*also_parts, nothing, nothing)[:2]
            *grads, dpairs, _ = streaming.softmax_attention_backward(
                dout_part, None, q_part, k_part, v_part, _added(kind, dense, acc_dtype), None, None,
                _kind_rng(rng, layout, kind), out_part, lse_part.squeeze(-1).contiguous() if by_lse else nothing,
                nothing, 0, scale, False, dropout_p, needs_dq, needs_dkv, pairs_wanted, False, is_joint,
            )  # fmt: skip
            results.append(grads)
            if pairs_wanted:
                pairs += dpairs.squeeze(0)
        maps = [
            groups.put(x, list(grads), like) if needed else None
            for x, grads, like, needed in zip(maps, zip(*results, strict=True), (q, k, v), needs, strict=True)
        ]
    return *(like.new_empty(0) if x is None else x for x, like in zip(maps, (q, k, v), strict=True)), pairs


def _short_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dense: torch.Tensor | None, layout: str, geometry: tuple,
    scale: float, weights: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The forward of short groups, all kinds at once; ``weights`` is what ``weights_empty`` returned, or None."""
    (groups,) = _groups((q, k, v), layout, geometry)
    kept = None if weights is None else groups.weights(weights)
    q_groups, k_groups, v_groups = (groups.take(x) for x in (q, k, v))
    out = streaming.short_forward(q_groups, k_groups, v_groups, _as_bias(dense, q), scale, _parts(groups, q), kept)
    return groups.put(None, [out], q)


def _short_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dense: torch.Tensor | None,
    kept: torch.Tensor | None, layout: str, geometry: tuple, scale: float, needs_dq: bool, needs_dkv: bool,
    pairs_wanted: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What ``_backward`` returns, of short groups."""
    (groups,) = _groups((q, k, v), layout, geometry)
    weights = None if kept is None or kept.dim() != 5 else groups.weights(kept)
    dout_groups, q_groups, k_groups, v_groups = (groups.take(x) for x in (dout, q, k, v))
    grads, pairs = streaming.short_backward(
        dout_groups, q_groups, k_groups, v_groups, _as_bias(dense, q), scale, needs_dq, needs_dkv, pairs_wanted,
        _parts(groups, q), weights,
    )  # fmt: skip
    needs = (needs_dq, needs_dkv, needs_dkv)
    maps = (
        groups.put(None, [grad], like) if needed else like.new_empty(0)
        for grad, like, needed in zip(grads, (q, k, v), needs, strict=True)
    )
    return *maps, q.new_empty(0) if pairs is None else pairs.squeeze(0)


def _pair_bias(
    bias: torch.Tensor | None, table: torch.Tensor | None, layout: str, q: torch.Tensor, window: Sequence[int]
) -> torch.Tensor | None:
    """The bias of all pairs of tokens of a group, (heads, tokens, tokens), or None."""
    if table is None:
        return bias
    height, width = group_window(layout, q.shape[1], q.shape[2], window)
    return streaming.dense_table(table, height, width, slice(0, height * width))


def _as_bias(dense: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    return None if dense is None else dense.to(q.dtype).unsqueeze(0)


def _parts(groups: Lines | Tiles | Windows, q: torch.Tensor) -> streaming.Parts:
    """What is added to the logits of some kinds of groups, besides a bias of all."""
    added = ((kind.groups, _added(kind, None, q.dtype)) for kind in groups.kinds)
    return [(part, extra) for part, extra in added if extra is not None]


def _added(kind: Kind, dense: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the logits of a kind's groups, (1, heads or 1, tokens, tokens), -inf where a key is hidden."""
    added = None if dense is None else dense.to(dtype)
    if kind.added is not None:
        added = kind.added.to(dtype) if added is None else added + kind.added.to(dtype)
    if kind.hidden is not None:
        added = kind.hidden.new_zeros((), dtype=dtype) if added is None else added
        added = torch.where(kind.hidden, -torch.inf, added)
    return None if added is None else added.view(1, -1, *added.shape[-2:])


def _table_gradient(
    pairs: torch.Tensor, table: torch.Tensor | None, layout: str, q: torch.Tensor, window: Sequence[int]
) -> torch.Tensor:
    if table is None or not pairs.numel():
        return q.new_empty(0)
    return table_gradient(pairs, group_window(layout, q.shape[1], q.shape[2], window)).to(table.dtype)


def _kind_rng(rng: torch.Tensor | None, layout: str, kind: Kind) -> torch.Tensor | None:
    """Seed and offset of a kind: each draws for itself."""
    return None if rng is None else rng + rng.new_tensor([0, ((layout == "column") << 40) + (kind.number << 20)])


def _groups(
    tensors: Sequence[torch.Tensor], layout: str, geometry: tuple, no_centre: bool = False
) -> Sequence[Lines | Tiles | Windows]:
    """All groups of a map, in a fixed order."""
    batch, height, width = tensors[0].shape[:3]
    window, shift, dilation, span, mask = geometry
    device = tensors[0].device
    if layout == "window":
        sizes = [part * step for part, step in zip(window, dilation, strict=True)]
        if not any(shift) and height % sizes[0] == 0 and width % sizes[1] == 0:
            return [Tiles(batch, height, width, tuple(window), tuple(dilation), span, device)]
        return [_windows(batch, height, width, tuple(window), tuple(shift), tuple(dilation), span, mask, device)]
    hidden = far_pairs((width if layout == "row" else height), span, no_centre, device)
    axis = 1 if layout == "row" else 2
    merges = all(x.stride(0) == x.stride(axis) * x.shape[axis] for x in tensors)
    short = streaming.is_short(tensors[0], _tokens(tensors[0], layout, window))  # those are copied anyway
    images = [slice(0, batch)] if merges or short or batch == 1 else [slice(b, b + 1) for b in range(batch)]
    lines = height if layout == "row" else width
    return [Lines(number, one, layout, (one.stop - one.start) * lines, hidden) for number, one in enumerate(images)]


@lru_cache(maxsize=16)
def _windows(
    batch: int, height: int, width: int, window: tuple[int, int], shift: tuple[int, int], dilation: tuple[int, int],
    span: int, mask: str, device: torch.device,
) -> Windows:  # fmt: skip
    places, parts = group_places(height, width, window, shift, dilation, device)
    exists = places >= 0
    some = exists.any(1)
    places, parts, exists = places[some], parts[some], exists[some]
    far = far_pairs(places.shape[1], span, False, device)
    patterns, kind_of = torch.cat([exists, parts], 1).unique(dim=0, return_inverse=True)
    kinds, start = [], 0
    for number, (pattern, count) in enumerate(zip(patterns, kind_of.bincount().tolist(), strict=True)):
        there, part = pattern.bool()[: places.shape[1]], pattern[places.shape[1] :]
        apart = part[:, None] != part
        hidden = ~there.expand(len(part), -1)
        hidden = hidden | apart if mask == "-inf" else hidden
        hidden = hidden if far is None else hidden | far
        hidden = hidden & there[:, None]  # queries that do not exist see all, so that no row is without keys
        added = -100.0 * apart.float() if mask != "-inf" and apart.any() else None
        groups = slice(start, start + count * batch)
        kinds.append(Kind(number, groups, hidden if hidden.any() else None, added))
        start = groups.stop
    return Windows(places[kind_of.argsort(stable=True)], batch, width, kinds)
