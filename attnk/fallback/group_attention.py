"""Group attention in plain PyTorch: views of rows and columns, copies of windows, attention over all groups at once."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from attnk.groups import far_pairs, group_places, group_window, table_gradient
from attnk.memory import empty_in_order, in_order

from . import softmax_attention as streaming


class Part:
    """Groups that are attended to in one call: how their tokens are found in a map, and what hides keys from queries.

    Attributes:
        hidden: bool (tokens, tokens), or None where every query sees every key.
        added: float (tokens, tokens), added to the logits, or None.
    """

    hidden: torch.Tensor | None = None
    added: torch.Tensor | None = None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """(groups, heads, tokens, D) of a map (B, height, width, heads, D)."""
        raise NotImplementedError

    def put(self, x: torch.Tensor | None, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Write what ``take`` would read into a map, if there is none into a new one in the order of another's axes."""
        raise NotImplementedError


class Lines(Part):
    """Rows or columns of some images, as views of the map."""

    def __init__(self, images: slice, axis: str, hidden: torch.Tensor | None) -> None:
        self.images, self.hidden = images, hidden
        self.order = (0, 1, 3, 2, 4) if axis == "row" else (0, 2, 3, 1, 4)
        self.back = (0, 1, 3, 2, 4) if axis == "row" else (0, 3, 1, 2, 4)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.images].permute(self.order).flatten(0, 1)

    def put(self, x: torch.Tensor | None, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if x is None and self.images.stop == like.shape[0] and self.images.start == 0:
            # all there is: as it lies, if it lies so already
            return in_order(values.unflatten(0, (like.shape[0], -1)).permute(self.back), like)
        x = _new_map(like, values) if x is None else x
        lines = x[self.images].permute(self.order)
        lines.copy_(values.unflatten(0, lines.shape[:2]))
        return x


class Windows(Part):
    """Windows of all images that hide the same keys, copied token by token."""

    def __init__(self, places: torch.Tensor, hidden: torch.Tensor | None, added: torch.Tensor | None) -> None:
        self.hidden, self.added = hidden, added
        self.n_tokens = places.shape[1]
        flat = places.flatten()
        self.source = flat.clamp(min=0)
        self.missing = (flat < 0).nonzero().squeeze(1)
        self.existing = (flat >= 0).nonzero().squeeze(1) if len(self.missing) else None
        self.target = flat if self.existing is None else flat[self.existing]

    def take(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(1, 2).index_select(1, self.source)
        if len(self.missing):
            tokens.index_fill_(1, self.missing, 0)
        return tokens.unflatten(1, (-1, self.n_tokens)).flatten(0, 1).transpose(1, 2)

    def put(self, x: torch.Tensor | None, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        x = _new_map(like, values) if x is None else x
        tokens = values.transpose(1, 2).unflatten(0, (x.shape[0], -1)).flatten(1, 2)
        tokens = tokens if self.existing is None else tokens.index_select(1, self.existing)
        x[:, self.target // x.shape[2], self.target % x.shape[2]] = tokens
        return x


def _new_map(like: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return empty_in_order(like, (*like.shape[:4], values.shape[-1]), values.dtype)


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
    out = None
    lse = q.new_empty(q.shape[:4] if wants_lse else (0,), dtype=torch.promote_types(q.dtype, torch.float32))
    for number, part in enumerate(_parts((q, k, v), layout, geometry, no_centre)):
        q_part, k_part, v_part = (part.take(x) for x in (q, k, v))
        added = _added(part, _pair_bias(bias, table, layout, q, geometry[0]), q.dtype)
        result, part_lse, *_ = streaming.softmax_attention_forward(
            q_part,
            k_part,
            v_part,
            added,
            None,
            None,
            _part_rng(rng, layout, number),
            0,
            scale,
            False,
            dropout_p,
            False,
            wants_lse,
        )
        out = part.put(out, result, q)
        if wants_lse:
            part.put(lse.unsqueeze(-1), part_lse.unsqueeze(-1), q)
    assert out is not None
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
            geometry, *options, pairs_wanted, no_centre=axis == "column",
        )  # fmt: skip
        grads.append(axis_grads)
        dtables.append(_table_gradient(pairs, axis_table, axis, q, window))
    summed = [row.add_(column) for row, column in zip(*grads, strict=True)]
    return *summed, q.new_empty(0), *dtables


def _backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
    table: torch.Tensor | None, rng: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor | None,
    layout: str, geometry: tuple, scale: float, dropout_p: float, needs_dq: bool, needs_dkv: bool, pairs_wanted: bool,
    no_centre: bool = False,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dq, dk, dv, and the gradient of the bias of all pairs (heads, tokens, tokens); empty where not wanted."""
    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    nothing = q.new_empty(0, dtype=acc_dtype)
    maps: list[torch.Tensor | None] = [None, None, None]
    needs = (needs_dq, needs_dkv, needs_dkv)
    dense = _pair_bias(bias, table, layout, q, geometry[0])
    pairs = nothing if dense is None or not pairs_wanted else torch.zeros_like(dense, dtype=acc_dtype)
    for number, part in enumerate(_parts((q, k, v, dout, out), layout, geometry, no_centre)):
        dout_part, out_part, q_part, k_part, v_part = (part.take(x) for x in (dout, out, q, k, v))
        part_lse = nothing
        if lse is not None and lse.numel():
            part_lse = part.take(lse.unsqueeze(-1)).squeeze(-1).contiguous()
        *grads, dpairs, _ = streaming.softmax_attention_backward(
            dout_part, None, q_part, k_part, v_part, _added(part, dense, acc_dtype), None, None,
            _part_rng(rng, layout, number), out_part, part_lse, nothing, 0, scale, False, dropout_p,
            needs_dq, needs_dkv, pairs_wanted, False,
        )  # fmt: skip
        maps = [
            part.put(x, grad, like) if needed else None
            for x, grad, like, needed in zip(maps, grads, (q, k, v), needs, strict=True)
        ]
        if pairs_wanted:
            pairs += dpairs.squeeze(0)
    return *(like.new_empty(0) if x is None else x for x, like in zip(maps, (q, k, v), strict=True)), pairs


def _pair_bias(
    bias: torch.Tensor | None, table: torch.Tensor | None, layout: str, q: torch.Tensor, window: Sequence[int]
) -> torch.Tensor | None:
    """The bias of all pairs of tokens of a group, (heads, tokens, tokens), or None."""
    if table is None:
        return bias
    height, width = group_window(layout, q.shape[1], q.shape[2], window)
    return streaming.dense_table(table, height, width, slice(0, height * width))


def _added(part: Part, dense: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the logits of a part's groups, (1, heads or 1, tokens, tokens), -inf where a key is hidden."""
    added = None if dense is None else dense.to(dtype)
    if part.added is not None:
        added = part.added.to(dtype) if added is None else added + part.added.to(dtype)
    if part.hidden is not None:
        added = part.hidden.new_zeros((), dtype=dtype) if added is None else added
        added = torch.where(part.hidden, -torch.inf, added)
    return None if added is None else added.view(1, -1, *added.shape[-2:])


def _table_gradient(
    pairs: torch.Tensor, table: torch.Tensor | None, layout: str, q: torch.Tensor, window: Sequence[int]
) -> torch.Tensor:
    if table is None or not pairs.numel():
        return q.new_empty(0)
    return table_gradient(pairs, group_window(layout, q.shape[1], q.shape[2], window)).to(table.dtype)


def _part_rng(rng: torch.Tensor | None, layout: str, number: int) -> torch.Tensor | None:
    """Seed and offset of a part: each draws for itself."""
    return None if rng is None else rng + rng.new_tensor([0, ((layout == "column") << 40) + (number << 20)])


def _parts(
    tensors: Sequence[torch.Tensor | None], layout: str, geometry: tuple, no_centre: bool = False
) -> list[Lines] | list[Windows]:
    """All groups of a map, in a fixed order."""
    q = tensors[0]
    assert q is not None
    batch, height, width = q.shape[:3]
    window, shift, dilation, span, mask = geometry
    if layout == "window":
        return _windows(height, width, tuple(window), tuple(shift), tuple(dilation), span, mask, q.device)
    hidden = far_pairs((width if layout == "row" else height), span, no_centre, q.device)
    axis = 1 if layout == "row" else 2
    merges = all(x is None or x.stride(0) == x.stride(axis) * x.shape[axis] for x in tensors)
    images = [slice(0, batch)] if merges or batch == 1 else [slice(b, b + 1) for b in range(batch)]
    return [Lines(one, layout, hidden) for one in images]


@lru_cache(maxsize=64)
def _windows(
    height: int, width: int, window: tuple[int, int], shift: tuple[int, int], dilation: tuple[int, int], span: int,
    mask: str, device: torch.device,
) -> list[Windows]:  # fmt: skip
    places, parts = group_places(height, width, window, shift, dilation, device)
    exists = places >= 0
    some = exists.any(1)
    places, parts, exists = places[some], parts[some], exists[some]
    far = far_pairs(places.shape[1], span, False, device)
    patterns, kinds = torch.cat([exists, parts], 1).unique(dim=0, return_inverse=True)
    windows = []
    for kind, pattern in enumerate(patterns):
        there, part = pattern.bool()[: places.shape[1]], pattern[places.shape[1] :]
        apart = part[:, None] != part
        hidden = ~there.expand(len(part), -1)
        hidden = hidden | apart if mask == "-inf" else hidden
        hidden = hidden if far is None else hidden | far
        hidden = hidden & there[:, None]  # queries that do not exist see all, so that no row is without keys
        added = -100.0 * apart.float() if mask != "-inf" and apart.any() else None
        windows.append(Windows(places[kinds == kind], hidden if hidden.any() else None, added))
    return windows
