"""Which tokens of a feature map make a group, and the gradient of a bias table from that of all pairs of them."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F


def group_window(layout: str, height: int, width: int, window: Sequence[int]) -> tuple[int, int]:
    """(height, width) of a group: rows and columns are windows as wide or as high as the map."""
    if layout == "row":
        return 1, width
    if layout == "column":
        return height, 1
    return window[0], window[1]


def group_places(
    height: int,
    width: int,
    window: Sequence[int],
    shift: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of every group, and which part of the shifted map each comes from.

    Args:
        height, width: of the map.
        window: (height, width) of a group, in tokens.
        shift: by how much the windows lie further down and right; they go around the edge.
        dilation: steps between neighbouring tokens of a group.
        device: of the results.

    Returns:
        places (groups, tokens), int64, counted row by row, -1 where a window reaches over the edge; parts, alike.
        Groups count row by row too, tokens row by row in a group.
    """
    places, parts = [], []
    for size, part, moved, step in zip((height, width), window, shift, dilation, strict=True):
        padded = -(-size // (part * step)) * part * step
        tokens = torch.arange(padded, device=device).view(-1, part, step).transpose(1, 2).reshape(-1, part)
        parts.append((tokens >= padded - moved).long())
        tokens = (tokens + moved) % padded
        places.append(torch.where(tokens < size, tokens, -1))
    (rows, columns), (row_parts, column_parts) = places, parts
    y, x = rows[:, None, :, None], columns[None, :, None, :]
    place = torch.where((y < 0) | (x < 0), -1, y * width + x)
    both = row_parts[:, None, :, None] * 2 + column_parts[None, :, None, :]
    return place.flatten(2).flatten(0, 1), both.flatten(2).flatten(0, 1)


def group_count(height: int, width: int, window: Sequence[int], dilation: Sequence[int]) -> int:
    """How many groups ``group_places`` finds."""
    rows, columns = (
        -(-size // (part * step)) * step for size, part, step in zip((height, width), window, dilation, strict=True)
    )
    return rows * columns


def table_gradient(pairs: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """The gradient of a bias table (entries, heads), from that of the bias of all pairs (heads, queries, keys)."""
    rows, columns = window
    # a query adds its keys' gradients to a window of the table, one place further for each step of the query
    folded = F.fold(pairs.flip(1).transpose(1, 2), (2 * rows - 1, 2 * columns - 1), window)
    return folded.flip(2, 3).flatten(1).t().contiguous()


@lru_cache(maxsize=64)
def far_pairs(n_tokens: int, span: int, no_centre: bool, device: torch.device) -> torch.Tensor | None:
    """Which keys are too far from a query, or itself; None where no key is."""
    if span < 0 and not no_centre:
        return None
    offsets = torch.arange(n_tokens, device=device)
    distance = (offsets[:, None] - offsets).abs()
    hidden = distance > span if span >= 0 else torch.zeros_like(distance, dtype=torch.bool)
    return hidden | (distance == 0) if no_centre else hidden
