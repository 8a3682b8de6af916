"""Group attention in plain PyTorch: views of rows and columns, copies of windows, attention over all groups at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from attnk.groups import far_pairs, group_places, group_window, table_gradient
from attnk.memory import empty_in_order, in_order

from . import softmax_attention as streaming


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

    def __init__(self, number: int, images: slice, axis: str, hidden: torch.Tensor | None) -> None:
        self.kinds = [Kind(number, slice(None), hidden)]
        self.images = images
        self.order = (0, 1, 3, 2, 4) if axis == "row" else (0, 2, 3, 1, 4)
        self.back = (0, 1, 3, 2, 4) if axis == "row" else (0, 3, 1, 2, 4)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """(groups, heads, tokens, D) of a map (B, height, width, heads, D)."""
        return x[self.images].permute(self.order).flatten(0, 1)

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


class Windows:
    """Windows of all images, copied token by token.

    Args:
        places: (windows, tokens) in the map, counted row by row, -1 where there is no token.
        batch, pixels: images, and tokens of a map.
        kinds: of windows, which lie together; groups count the images of a window one after another.
    """

    def __init__(self, places: torch.Tensor, batch: int, pixels: int, kinds: list[Kind]) -> None:
        self.kinds = kinds
        self.n_tokens = places.shape[1]
        first = pixels * torch.arange(batch, device=places.device).view(-1, 1)
        places = torch.where(places.unsqueeze(1) < 0, -1, places.unsqueeze(1) + first).flatten()
        self.source = places.clamp(min=0)
        self.missing = (places < 0).nonzero().squeeze(1)
        existing = (places >= 0).nonzero().squeeze(1)
        self.target = existing[places[existing].argsort()]

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """(windows x B, heads, tokens, D) of a map (B, height, width, heads, D)."""
        tokens = x.flatten(0, 2).index_select(0, self.source)
        if len(self.missing):
            tokens.index_fill_(0, self.missing, 0)
        return tokens.unflatten(0, (-1, self.n_tokens)).transpose(1, 2)

    def put(self, x: torch.Tensor | None, values: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """A new map of what each kind has, whose axes lie in the order of another's."""
        windows = (
            values[0] if len(values) == 1 else torch.cat([part.transpose(1, 2) for part in values]).transpose(1, 2)
        )
        tokens = windows.transpose(1, 2).flatten(0, 1).index_select(0, self.target)
        return in_order(tokens.unflatten(0, like.shape[:3]), like)


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
        out; and lse (B, height, width, heads) where a backward will follow PyTorch's fused forward, or for
        "criss_cross" (2, B, height, width, heads), that of rows and that of both; else empty, (0,).
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
    wants_lse = keep and keeps_lse(q, v, dropout_p)
    return _forward(q, k, v, bias, table, rng, layout, geometry, *options, wants_lse)


def keeps_lse(q: torch.Tensor, v: torch.Tensor, dropout_p: float) -> bool:
    """Whether PyTorch's fused attention does the forward, whose backward wants lse."""
    return streaming.fused_fits(q, v, None, None, None, False, dropout_p)


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
) -> tuple[torch.Tensor, ...]:
    """The backward, with the arguments and results of the kernels' launcher."""
    geometry = (window, shift, dilation, span, mask)
    options = (scale, dropout_p, needs_dq, needs_dkv)
    assert out is not None
    if layout != "criss_cross":
        pairs_wanted = (bias is not None and needs_dbias) or (table is not None and needs_dtables)
        dq, dk, dv, pairs = _backward(
            dout, q, k, v, bias, table, rng, out, lse, layout, geometry, *options, pairs_wanted
        )
        dtable = _table_gradient(pairs, table if needs_dtables else None, layout, q, window)
        dbias = pairs.to(bias.dtype) if bias is not None and needs_dbias else q.new_empty(0)
        return dq, dk, dv, dbias, dtable, q.new_empty(0)
    assert lse is not None
    fused = keeps_lse(q, v, dropout_p)
    row_lse, both = lse
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
    table: torch.Tensor | None, rng: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor | None,
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
    by_lse = lse is not None and lse.numel() > 0
    kept = [out] if by_lse or is_joint else []
    if by_lse and lse is not None:
        kept.append(lse.unsqueeze(-1))
    for groups in _groups((q, k, v, dout, out), layout, geometry, no_centre):
        taken = [groups.take(x) for x in (dout, q, k, v, *kept)]
        results = []
        for kind in groups.kinds:
            dout_part, q_part, k_part, v_part, *kept_parts = (x[kind.groups] for x in taken)
            out_part, lse_part = (*kept_parts, nothing, nothing)[:2]
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


def _pair_bias(
    bias: torch.Tensor | None, table: torch.Tensor | None, layout: str, q: torch.Tensor, window: Sequence[int]
) -> torch.Tensor | None:
    """The bias of all pairs of tokens of a group, (heads, tokens, tokens), or None."""
    if table is None:
        return bias
    height, width = group_window(layout, q.shape[1], q.shape[2], window)
    return streaming.dense_table(table, height, width, slice(0, height * width))


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
) -> Sequence[Lines | Windows]:
    """All groups of a map, in a fixed order."""
    batch, height, width = tensors[0].shape[:3]
    window, shift, dilation, span, mask = geometry
    device = tensors[0].device
    if layout == "window":
        return [_windows(batch, height, width, tuple(window), tuple(shift), tuple(dilation), span, mask, device)]
    hidden = far_pairs((width if layout == "row" else height), span, no_centre, device)
    axis = 1 if layout == "row" else 2
    merges = all(x.stride(0) == x.stride(axis) * x.shape[axis] for x in tensors)
    images = [slice(0, batch)] if merges or batch == 1 else [slice(b, b + 1) for b in range(batch)]
    return [Lines(number, one, layout, hidden) for number, one in enumerate(images)]


@lru_cache(maxsize=64)
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
    return Windows(places[kind_of.argsort(stable=True)], batch, height * width, kinds)
