"""Coordinate gate in plain PyTorch: the fast path where no Triton kernel runs, and what users without a GPU get.

    height[h] = mean_w x,  width[w] = mean_h x,  out = x * gate_w * gate_h
    t = x * dout,  dgate_h[h] = sum_w t * gate_w,  dgate_w[w] = sum_h t * gate_h
    dx = dout * gate_w * gate_h + dheight / width + dwidth / height

Kept between forward and backward: x and both gates. Sums and products are float32 for half precision inputs (float64
for float64). Large x is worked through tile by tile on CPU: a tile is read from memory once and stays in cache between
two operations, and no temporary has the size of x.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnk.fallback._precision import multiplies_exactly

# Elements of x that each CPU thread handles at a time, 2 MiB of float32: measured best of 2**15 ... 2**19.
TILE_ELEMENTS = 2**19
# Up to this size the calls cost more than the work, so one call for the whole of x is best.
SMALL_ELEMENTS = 2**18

Tile = tuple[slice, slice, slice]


def coordinate_gate_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means over width and over height.

    Args:
        x: (batch, channels, height, width), not empty, any strides.

    Returns:
        height (batch, channels, height, 1) and width (batch, channels, 1, width), in x's dtype and memory format.
    """
    channels_last = _channels_last(x)
    if not channels_last:  # accumulates half precision in float32
        return torch.mean(x, 3, True), torch.mean(x, 2, True)
    rows, columns = x.shape[2:]
    dtype = _work_dtype(x)
    if x.dtype == dtype:
        return _sum_over_width(x, True).div_(columns), _sum_over_height(x, True).div_(rows)
    height = _empty(x, (*x.shape[:3], 1), True, dtype)
    width = _empty(x, (*x.shape[:2], 1, columns), True, dtype).zero_()
    for tile, part, _ in _tiles_with_scratch(x, True, dtype):
        height[tile] = _sum_over_width(part, True)
        width[tile[:2]].add_(_sum_over_height(part, True))
    return height.div_(columns).to(x.dtype), width.div_(rows).to(x.dtype)


def coordinate_gate_forward(x: Tensor, gate_h: Tensor, gate_w: Tensor) -> Tensor:
    """x * gate_w * gate_h.

    Args:
        x: (batch, channels, height, width), any strides.
        gate_h: (batch, channels, height, 1), any float dtype.
        gate_w: (batch, channels, 1, width), any float dtype.

    Returns:
        x's shape, dtype and memory format.
    """
    channels_last, dtype = _channels_last(x), _work_dtype(x)
    gate_h, gate_w = gate_h.to(dtype), gate_w.to(dtype)
    out = _empty(x, x.shape, channels_last, x.dtype)
    if x.dtype == dtype:
        return torch.mul(x, gate_w, out=out).mul_(gate_h)
    for tile, part, scratch in _tiles_with_scratch(x, channels_last, dtype):
        out[tile] = torch.mul(part, gate_w[tile[:2]], out=scratch).mul_(gate_h[tile])
    return out


def coordinate_gate_backward(dout: Tensor, x: Tensor, gate_h: Tensor, gate_w: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both gates.

    Args:
        dout: gradient of the output, any strides.
        x, gate_h, gate_w: as in the forward pass.

    Returns:
        dgate_h and dgate_w, each of its gate's shape and dtype and dense in its order.
    """
    channels_last, dtype = _channels_last(x), _work_dtype(x)
    dgate_h = torch.empty_like(gate_h, dtype=dtype)
    dgate_w = torch.empty_like(gate_w, dtype=dtype).zero_()
    rows_of, columns_of = gate_h.to(dtype), gate_w.to(dtype)
    for tile, part, product in _tiles_with_scratch(x, channels_last, dtype):
        if part is product:  # holds x already
            product.mul_(dout[tile])
        else:
            torch.mul(part, dout[tile], out=product)
        sums_h, sums_w = _weighted_sums(product, rows_of[tile], columns_of[tile[:2]], channels_last)
        dgate_h[tile] = sums_h
        dgate_w[tile[:2]].add_(sums_w)
    return dgate_h.to(gate_h.dtype), dgate_w.to(gate_w.dtype)


def coordinate_gate_dx(
    dout: Tensor | None,
    gate_h: Tensor | None,
    gate_w: Tensor | None,
    dheight: Tensor | None,
    dwidth: Tensor | None,
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    """The gradient of the map, through the gate and through both means.

    Args:
        dout: gradient of the output, any strides, or None.
        gate_h, gate_w: as in the forward pass; None where dout is to be taken as it is.
        dheight, dwidth: gradients of the means, or None; one of them and dout is given.
        height, width: of the map.
        channels_last: whether dx is laid out channels last.

    Returns:
        dx (batch, channels, height, width) in the dtype of dout, or else of the means' gradients.
    """
    like = next(given for given in (dout, dheight, dwidth) if given is not None)
    dtype = _work_dtype(like)
    shape = (*like.shape[:2], height, width)
    dx = _empty(like, shape, channels_last, like.dtype)
    gate_h, gate_w = _to(gate_h, dtype), _to(gate_w, dtype)
    rows = None if dheight is None else dheight.to(dtype) / width
    columns = None if dwidth is None else dwidth.to(dtype) / height
    scratch = None
    for tile in _tiles(dx, channels_last):
        grad = dx[tile]
        if dx.dtype != dtype:
            scratch = torch.empty_like(grad, dtype=dtype) if scratch is None else scratch
            grad = scratch[tuple(map(slice, grad.shape))]
        added = None if columns is None else columns[tile[:2]]
        if dout is None:
            grad.zero_() if added is None else grad.copy_(added)
        elif gate_h is None or gate_w is None:
            grad.copy_(dout[tile]) if added is None else torch.add(dout[tile], added, out=grad)
        else:
            if dout.dtype == dtype:
                torch.mul(dout[tile], gate_w[tile[:2]], out=grad)
            else:
                grad.copy_(dout[tile]).mul_(gate_w[tile[:2]])
            if added is None:
                grad.mul_(gate_h[tile])
            else:  # addcmul with what changes along a row: it is slow with what does not
                torch.addcmul(added, grad, gate_h[tile], out=grad)
        if rows is not None:
            grad.add_(rows[tile])
        if dx.dtype != dtype:
            dx[tile] = grad
    return dx


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _to(gate: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gate is None else gate.to(dtype)


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) < x.stride(3)


def _empty(like: Tensor, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def _tiles(x: Tensor, channels_last: bool) -> Iterator[Tile]:
    """Slices (samples, channels, rows) of TILE_ELEMENTS a thread or so: several samples, or a part of one in a row.

    A part is some planes, or where channels lie last, some rows.
    """
    batch, channels, height, width = x.shape
    if x.device.type != "cpu" or x.numel() <= SMALL_ELEMENTS:
        yield slice(None), slice(None), slice(None)
        return
    tile_elements = TILE_ELEMENTS * torch.get_num_threads()
    sample_elements = channels * height * width
    samples = max(1, tile_elements // sample_elements)
    parts = -(-sample_elements // tile_elements)
    length = height if channels_last else channels
    step = max(1, -(-length // parts))
    for i in range(0, batch, samples):
        for j in range(0, length, step):
            part = slice(j, j + step)
            yield (slice(i, i + samples), slice(None), part) if channels_last else (
                slice(i, i + samples), part, slice(None)
            )  # fmt: skip


def _tiles_with_scratch(x: Tensor, channels_last: bool, dtype: torch.dtype) -> Iterator[tuple[Tile, Tensor, Tensor]]:
    """Yields (tile, x[tile] as dtype, scratch): one buffer of a tile's size serves all tiles.

    Where x has another dtype, its numbers are in the scratch, which is then the second and the third.
    """
    scratch = None
    for tile in _tiles(x, channels_last):
        part = x[tile]
        if scratch is None:
            scratch = _empty(x, part.shape, channels_last, dtype)
        buffer = scratch if part.shape == scratch.shape else scratch[tuple(map(slice, part.shape))]
        if part.dtype != dtype:
            part = buffer.copy_(part)
        yield tile, part, buffer


def _weighted_sums(t: Tensor, gate_h: Tensor, gate_w: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    """(sum_w t * gate_w, sum_h t * gate_h); t may be written over.

    A matrix product reads a contiguous t once for each, without another temporary.
    """
    if _sums_by_product(t):
        batch, channels, height, width = t.shape
        planes = t.flatten(0, 1)
        sums_h = torch.bmm(planes, gate_w.reshape(-1, width, 1))
        sums_w = torch.bmm(gate_h.reshape(-1, 1, height), planes)
        return sums_h.view(batch, channels, height, 1), sums_w.view(batch, channels, 1, width)
    sums_h = _sum_over_width(t * gate_w, channels_last)
    return sums_h, _sum_over_height(t.mul_(gate_h), channels_last)


def _sum_over_width(t: Tensor, channels_last: bool) -> Tensor:
    """(batch, channels, height, 1)."""
    if not channels_last:
        return torch.sum(t, 3, True)
    lines = t.permute(0, 2, 3, 1)
    if not _sums_by_product(lines):
        return torch.sum(lines, 2, True).permute(0, 3, 1, 2)
    batch, height, width, channels = lines.shape
    ones = lines.new_ones(1, 1, width).expand(batch * height, 1, width)
    return torch.bmm(ones, lines.reshape(-1, width, channels)).view(batch, height, 1, channels).permute(0, 3, 1, 2)


def _sum_over_height(t: Tensor, channels_last: bool) -> Tensor:
    """(batch, channels, 1, width)."""
    if not channels_last:
        return torch.sum(t, 2, True)
    lines = t.permute(0, 2, 3, 1)
    if not _sums_by_product(lines):
        return torch.sum(lines, 1, True).permute(0, 3, 1, 2)
    batch, height, width, channels = lines.shape
    ones = lines.new_ones(1, 1, height).expand(batch, 1, height)
    return torch.bmm(ones, lines.reshape(batch, height, -1)).view(batch, 1, width, channels).permute(0, 3, 1, 2)


def _sums_by_product(x: Tensor) -> bool:
    """Whether a product with ones sums x, in the order in which it lies, about twice as fast as `torch.sum` on CPU."""
    return x.device.type == "cpu" and x.is_contiguous() and multiplies_exactly()
