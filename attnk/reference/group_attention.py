"""The definition of group attention: rows, columns and windows of a feature map."""

from typing import Any

import torch

from attnk.groups import group_places, group_window

from .softmax_attention import relative_position_index, softmax_attention_reference


def group_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    column_table: torch.Tensor | None = None,
    *,
    layout: str,
    **options: Any,
) -> torch.Tensor:
    """``attnk.group_attention`` as a formula: differentiable any number of times, the tests' oracle.

    Args:
        q, k, v, bias, table, column_table, layout, options: as there, q, k and v with five axes; and ``keep``, bool
            (B, groups, heads, tokens, tokens), the weights that are not dropped, drawn when None; two of them where
            there are two axes.
    """
    if layout not in ("sum", "criss_cross"):
        return _attend(q, k, v, bias, table, layout, **options)[0]
    keeps = options.pop("keep", None) or (None, None)
    row, row_lse = _attend(q, k, v, None, table, "row", keep=keeps[0], **options)
    options["no_centre"] = layout == "criss_cross"
    column, column_lse = _attend(q, k, v, None, column_table, "column", keep=keeps[1], **options)
    if layout == "sum":
        return row + column
    shares = torch.stack([row_lse, column_lse]).softmax(0).to(q.dtype)
    return shares[0] * row + shares[1] * column


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor | None,
    layout: str, window: Any = (1, 1), shift: Any = (0, 0), dilation: Any = (1, 1), span: int | None = None,
    mask_value: float = -torch.inf, scale: float | None = None, dropout_p: float = 0.0,
    keep: torch.Tensor | None = None, no_centre: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Out (B, height, width, heads, Dv) and lse (B, height, width, heads, 1)."""
    batch, height, width, heads, _ = q.shape
    window = group_window(layout, height, width, window)
    places, parts = group_places(height, width, window, shift, dilation, q.device)
    offsets = torch.arange(places.shape[1], device=q.device)
    distance = (offsets[:, None] - offsets).abs()
    q, k, v = (x.flatten(1, 2)[:, places.clamp(min=0)].transpose(2, 3).flatten(0, 1) for x in (q, k, v))
    seen = (places >= 0)[:, None, :] & (distance <= (len(offsets) if span is None else span))
    if no_centre:
        seen = seen & (distance > 0)
    apart = parts[:, :, None] != parts[:, None, :]
    added = torch.zeros_like(apart, dtype=q.dtype)[:, None]
    added = added.masked_fill(apart[:, None], mask_value) if mask_value > -torch.inf else added
    seen = seen if mask_value > -torch.inf else seen & ~apart
    if bias is not None:
        added = added + bias.to(q.dtype)
    if table is not None:
        entries = table[relative_position_index(window[0], window[1], table.device)].view(*distance.shape, heads)
        added = added + entries.permute(2, 0, 1).to(q.dtype)
    out, lse = softmax_attention_reference(
        q, k, v, added.repeat(batch, 1, 1, 1), seen[:, None].repeat(batch, 1, 1, 1), scale=scale, dropout_p=dropout_p,
        keep=None if keep is None else keep.flatten(0, 1),
    )  # fmt: skip
    order = places.flatten().argsort()[-height * width :]  # behind those that do not exist
    out, lse = (x.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)[:, order] for x in (out, lse.unsqueeze(-1)))
    return out.unflatten(1, (height, width)), lse.unflatten(1, (height, width))
