"""Channel gate in plain PyTorch: the fast path where no Triton kernel runs, and what users without a GPU get.

    avg[c] = mean_p x,  max[c] = max_p x,  out = x * gate
    dgate[c] = sum_p x * dout,  dx = dout * gate + davg / pixels + [p is the first maximum] * dmax

Kept between forward and backward: the index of the maximum, one number a channel; x where dgate or ties="even" reads
it. Sums are float32 for half precision inputs (float64 for float64). Large x is worked through tile by tile on CPU, so
that a tile stays in cache between two operations and no temporary has the size of x.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of x that each CPU thread handles at a time, 1 MiB of float32.
TILE_ELEMENTS = 2**18
# Up to this size the calls cost more than the work, so one call for the whole of x is best.
SMALL_ELEMENTS = 2**18
# The first maximum of contiguous planes from so many pixels on is found in groups of at most so many.
LARGE_PLANE, GROUP_PIXELS = 2048, 256


def channel_gate_pool(x: Tensor, needs_max: bool, ties: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Pools over the pixels.

    Args:
        x: (batch, channels, height, width), not empty, any strides.
        needs_max: whether the maximum is wanted.
        ties: "first" or "even", who receives the gradient of a maximum that several pixels attain.
        keep: whether a backward will follow.

    Returns:
        avg and max (batch, channels) in x's dtype, and index (batch, channels) int64, of the first pixel that attains
        the maximum, or for ties="even" how many do. What is not wanted is empty, (0,).
    """
    pixels = x.permute(0, 2, 3, 1)
    # half precision accumulates in float32; the mean of channels_last over its middle is faster as that of a matrix
    avg = pixels.flatten(1, 2).mean(1) if pixels.is_contiguous() else x.mean((2, 3))
    index = x.new_empty(0, dtype=torch.int64)
    if not needs_max:
        return avg, x.new_empty(0), index
    if not keep:
        return avg, torch.amax(x, (2, 3)), index
    if ties == "first":
        return avg, *_max_first(x)
    maximum = torch.amax(x, (2, 3))
    return avg, maximum, _count_equal(x, maximum)


def channel_gate_forward(x: Tensor, gate: Tensor) -> Tensor:
    """x * gate.

    Args:
        x: (batch, channels, height, width), any strides.
        gate: (batch, channels), any float dtype.

    Returns:
        x's shape, dtype and memory format.
    """
    return torch.mul(x, _over_pixels(gate, x.dtype), out=_empty_like(x, _channels_last(x)))


def channel_gate_backward(dout: Tensor, x: Tensor) -> Tensor:
    """sum_p x * dout.

    Args:
        dout, x: (batch, channels, height, width), any strides.

    Returns:
        dgate (batch, channels), float32, or float64 for float64 input.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if _use_torch(x):
        return torch.sum(x.to(dtype) * dout, (2, 3))
    dgate = torch.zeros(x.shape[:2], dtype=dtype, device=x.device)
    for tile, part, scratch in _tiles_with_scratch(x, dtype):
        dgate[tile[:2]] += torch.mul(part, dout[tile], out=scratch).sum((2, 3))
    return dgate


def channel_gate_dx(
    dout: Tensor | None,
    gate: Tensor | None,
    davg: Tensor | None,
    dmax: Tensor | None,
    x: Tensor | None,
    maximum: Tensor | None,
    index: Tensor,
    height: int,
    width: int,
    channels_last: bool,
    ties: str,
) -> Tensor:
    """The gradient of x from all it went into: the output, the mean and the maximum.

    Args:
        dout: gradient of the output, any strides; None where there was none.
        gate: (batch, channels), with dout.
        davg, dmax: gradients of the pools (batch, channels) in the dtype of dout, or None; one of the three is given.
        x, maximum: input and its maximum, read where there is dmax and ties is "even".
        index: what ``channel_gate_pool`` returned.
        height, width: of x.
        channels_last: whether dx is laid out channels last.
        ties: as in the forward pass.

    Returns:
        dx (batch, channels, height, width) in the dtype of the gradients.
    """
    like = next(grad for grad in (dout, davg, dmax) if grad is not None)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dx = torch.empty((*like.shape[:2], height, width), dtype=like.dtype, device=like.device, memory_format=layout)
    base = None if davg is None else _over_pixels(davg / (height * width), like.dtype)
    if dout is not None:
        assert gate is not None
        scale = _over_pixels(gate, like.dtype)
        if base is None:
            torch.mul(dout, scale, out=dx)
        else:
            torch.addcmul(base, dout, scale, out=dx)
    elif base is not None:
        dx.copy_(base)
    else:
        dx.zero_()
    if dmax is None:
        return dx
    if ties == "first":
        dx.flatten(2).scatter_add_(2, index.unsqueeze(2), dmax.unsqueeze(2))
    else:
        assert x is not None
        assert maximum is not None
        _add_to_ties(dx, x, maximum, dmax, index)
    return dx


def _over_pixels(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.to(dtype)[:, :, None, None]


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) < x.stride(3)


def _empty_like(x: Tensor, channels_last: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _use_torch(x: Tensor) -> bool:
    return x.device.type != "cpu" or x.numel() <= SMALL_ELEMENTS


def _max_first(x: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.max` over the pixels with the first index, whose kernel is scalar on CPU.

    Pooling is faster, and on large planes two steps are: the maximum of groups of pixels, which is vectorised, then the
    first in the first group that has it.
    """
    batch, channels, height, width = x.shape
    pixels = height * width
    if _use_torch(x):
        return torch.max(x.flatten(2), 2)
    groups = next((n for n in range(-(-pixels // GROUP_PIXELS), pixels // 16) if pixels % n == 0), 1)
    if pixels >= LARGE_PLANE and groups > 1 and x.is_contiguous():
        members = x.view(batch, channels, groups, -1)
        maximum, group = torch.max(torch.amax(members, 3), 2)
        members = members.gather(2, group[:, :, None, None].expand(-1, -1, 1, pixels // groups)).squeeze(2)
        return maximum, group * (pixels // groups) + torch.max(members, 2)[1]
    maximum, index = F.adaptive_max_pool2d(x, 1, return_indices=True)
    if maximum.isnan().any():  # it has the last NaN
        return torch.max(x.flatten(2), 2)
    return maximum.flatten(1), index.flatten(1)


def _count_equal(x: Tensor, maximum: Tensor) -> Tensor:
    peaks = maximum[:, :, None, None]
    if _use_torch(x):
        return (x == peaks).sum((2, 3))
    count = torch.zeros(maximum.shape, dtype=torch.int64, device=x.device)
    for tile in _tiles(x):
        count[tile[:2]] += (x[tile] == peaks[tile[:2]]).sum((2, 3))
    return count


def _add_to_ties(dx: Tensor, x: Tensor, maximum: Tensor, dmax: Tensor, count: Tensor) -> None:
    """Adds dmax to dx, split evenly among the pixels that attain the maximum."""
    share = (dmax.to(torch.promote_types(dmax.dtype, torch.float32)) / count)[:, :, None, None]
    peaks = maximum[:, :, None, None]
    for tile, part, scratch in _tiles_with_scratch(x, share.dtype):
        # nothing equals a maximum that is NaN: its share is 0 / 0 or infinite, and NaN everywhere
        dx[tile].add_(torch.eq(part, peaks[tile[:2]], out=scratch).mul_(share[tile[:2]]))


def _tiles(x: Tensor) -> Iterator[tuple[slice, ...]]:
    """Slices (samples, channels, rows) of TILE_ELEMENTS a thread or so, which lie together in memory."""
    batch, channels, height, width = x.shape
    elements = TILE_ELEMENTS * torch.get_num_threads()
    samples = max(1, elements // max(1, channels * height * width))
    block, rows = channels, height
    if samples == 1 and _channels_last(x):
        rows = max(1, elements // (channels * width))
    elif samples == 1:
        block = max(1, elements // (height * width))
    for i in range(0, batch, samples):
        for c in range(0, channels, block):
            for j in range(0, height, rows):
                yield slice(i, i + samples), slice(c, c + block), slice(j, j + rows)


def _tiles_with_scratch(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[tuple[slice, ...], Tensor, Tensor]]:
    """Yields (tile, x[tile] as dtype, scratch): one buffer of a tile's size serves all tiles."""
    scratch = None
    for tile in _tiles(x):
        part = x[tile]
        if scratch is None:
            scratch = torch.empty_like(part, dtype=dtype)
        buffer = scratch[: part.shape[0], : part.shape[1], : part.shape[2]]
        yield tile, part if part.dtype == dtype else buffer.copy_(part), buffer
