"""Spatial gate in plain PyTorch: the fast path where no Triton kernel runs, and what users without a GPU get.

    avg[p] = mean_c x,  max[p] = max_c x,  z = conv2d([avg, max], weight) + bias,  gate = sigmoid(z)
    D = sum_c x * dout  (map: dout),  dz = D * gate * (1 - gate)  (logit: dout)
    dmap = conv2d(dz, flipped weight),  dweight = correlation of dz with the maps,  dbias = sum dz
    dx = dout * gate (+ dout if residual) + davg / channels + [c is the first maximum] * dmax

Saved between forward and backward: the gate, the two maps and the index of the maximum, each one channel wide; x only
where D or ties="even" reads it. Maps, gate and convolutions are float32 for half precision inputs. Large x is reduced
tile by tile on CPU, so that a tile stays in cache between two operations and no temporary has the size of x.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from attnk.fallback._precision import multiplies_exactly

# Elements of x that each CPU thread handles at a time, 2 MiB of float32: measured best of 2**18 ... 2**21.
TILE_ELEMENTS = 2**19
# Up to this size the calls cost more than the work, so one call for the whole of x is best.
SMALL_ELEMENTS = 2**18


def spatial_gate_infer(x: Tensor, weight: Tensor, bias: Tensor | None, order: str, output: str) -> Tensor:
    """Computes the gate without keeping anything for a backward pass.

    Args:
        x: (batch, channels, height, width), any strides.
        weight: (1, 2, kernel, kernel), odd kernel.
        bias: (1,) or None.
        order: "avg_max" or "max_avg", the order of the convolution's input maps.
        output: "gated", "residual", "map" or "logit".

    Returns:
        The output in x's dtype: x's shape and layout, or (batch, 1, height, width) for "map" and "logit".
    """
    dtype = work_dtype(x)
    z = convolve(stack(_mean_channels(x, dtype), torch.amax(x, 1, True), order), weight, bias)
    if output == "logit":
        return z.to(x.dtype)
    gate = z.sigmoid_().to(x.dtype)
    return gate if output == "map" else _apply_gate(x, gate, output)


def spatial_gate_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: str, output: str, ties: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the gate and what `spatial_gate_backward` needs.

    Args:
        x, weight, bias, order, output: as for `spatial_gate_infer`.
        ties: "first" or "even", who receives the gradient of a maximum that several channels attain.

    Returns:
        out, gate (batch, 1, height, width), maps (batch, 2, height, width) in the convolution's order, and index
        (batch, 1, height, width) int64, the first channel that attains the maximum; empty for ties="even". None of
        them share memory. For output "logit" the gate is zeros that nothing reads.
    """
    dtype = work_dtype(x)
    if ties == "even":
        maximum, index = torch.amax(x, 1, True), x.new_empty(0, dtype=torch.int64)
    else:
        maximum, index = max_channels(x, dtype)
    maps = stack(_mean_channels(x, dtype), maximum, order)
    z = convolve(maps, weight, bias)
    if output == "logit":
        return z.to(x.dtype), torch.zeros_like(z), maps, index
    gate = z.sigmoid_()
    if output == "map":
        return gate.to(x.dtype, copy=True), gate, maps, index
    return _apply_gate(x, gate.to(x.dtype), output), gate, maps, index


def spatial_gate_backward(
    dout: Tensor,
    x: Tensor | None,
    weight: Tensor,
    gate: Tensor,
    maps: Tensor,
    index: Tensor,
    channels: int,
    channels_last: bool,
    order: str,
    output: str,
    ties: str,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of `spatial_gate_forward`.

    Args:
        dout: gradient of the output, any strides.
        x: the input, or None where it is not read: output "map" or "logit" with ties="first".
        weight, gate, maps, index: inputs and results of the forward pass.
        channels: x's number of channels.
        channels_last: whether dx is laid out channels last.
        order, output, ties: as in the forward pass.
        needs_dx, needs_dweight: False returns an empty tensor in that place and skips its work.

    Returns:
        dx in dout's dtype, dweight and dbias (1,) in weight's dtype.
    """
    gated = output in ("gated", "residual")
    if gated:
        assert x is not None
        dz = _dot_channels(x, dout, gate.dtype)
    else:
        dz = dout.to(gate.dtype)
    if output != "logit":
        dz = torch.ops.aten.sigmoid_backward(dz, gate)

    dx, dweight, dbias = dout.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if needs_dweight:
        dweight, dbias = weight_gradient(dz, maps, weight)
    if not needs_dx:
        return dx, dweight, dbias

    # convolution_backward would take several times as long for dmap as this convolution, which is the same sum.
    dmap = convolve(dz, weight.flip(2, 3).transpose(0, 1), None)
    davg, dmaximum = unstack(dmap, order)
    davg = davg.div(channels).to(dout.dtype)
    batch, _, height, width = dout.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dx = torch.empty((batch, channels, height, width), dtype=dout.dtype, device=dout.device, memory_format=layout)
    if gated:
        scale = gate + 1 if output == "residual" else gate
        torch.addcmul(davg, dout, scale.to(dout.dtype), out=dx)
    else:
        dx.copy_(davg)
    if ties == "even":
        assert x is not None
        _add_to_ties(dx, x, unstack(maps, order)[1], dmaximum)
    else:
        dx.scatter_add_(1, index, dmaximum.to(dx.dtype))
    return dx, dweight, dbias


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums and maps are in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def stack(avg: Tensor, maximum: Tensor, order: str) -> Tensor:
    """The two maps side by side; a maximum of half precision is promoted to avg's dtype."""
    return torch.cat((avg, maximum) if order == "avg_max" else (maximum, avg), 1)


def unstack(maps: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """The mean's and the maximum's map, or gradient, out of both."""
    avg, maximum = (0, 1) if order == "avg_max" else (1, 0)
    return maps[:, avg : avg + 1], maps[:, maximum : maximum + 1]


def convolve(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d in the dtype of maps that keeps height and width; an empty batch or image skips the convolution."""
    if maps.numel() == 0:
        return maps.new_empty(maps.shape[0], weight.shape[0], *maps.shape[2:])
    if weight.dtype != maps.dtype:
        weight, bias = weight.to(maps.dtype), bias if bias is None else bias.to(maps.dtype)
    return F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2)


def weight_gradient(dz: Tensor, maps: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dweight and dbias of the convolution, in weight's dtype."""
    if dz.numel() == 0:
        return torch.zeros_like(weight), weight.new_zeros(1)
    padding = [weight.shape[-1] // 2] * 2
    _, dweight, dbias = torch.ops.aten.convolution_backward(
        dz, maps, weight.to(maps.dtype), [1], [1, 1], padding, [1, 1], False, [0, 0], 1, [False, True, True]
    )
    return dweight.to(weight.dtype), dbias.to(weight.dtype)


def _apply_gate(x: Tensor, gate: Tensor, output: str) -> Tensor:
    layout = torch.channels_last if x.stride(1) < x.stride(3) else torch.contiguous_format
    out = torch.empty_like(x, memory_format=layout)
    return torch.mul(x, gate, out=out) if output == "gated" else torch.addcmul(x, x, gate, out=out)


def tiles(x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Slices (samples, all channels, rows) of TILE_ELEMENTS a thread or so: several samples, or some rows of one."""
    batch, channels, height, width = x.shape
    tile_elements = TILE_ELEMENTS * torch.get_num_threads()
    sample_elements = max(1, channels * height * width)
    samples = max(1, tile_elements // sample_elements)
    rows = max(1, -(-height // -(-sample_elements // tile_elements)))
    for i in range(0, batch, samples):
        for j in range(0, height, rows):
            yield slice(i, i + samples), slice(None), slice(j, j + rows)


def _tiles_with_scratch(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[tuple[slice, ...], Tensor, Tensor]]:
    """Yields (tile, x[tile] as dtype, scratch): one buffer of a tile's size serves all tiles."""
    scratch = None
    for tile in tiles(x):
        part = x[tile]
        if scratch is None:
            scratch = torch.empty_like(part, dtype=dtype)
        buffer = scratch[: part.shape[0], :, : part.shape[2]]
        yield tile, part if part.dtype == dtype else buffer.copy_(part), buffer


def _use_torch(x: Tensor) -> bool:
    return x.device.type != "cpu" or x.numel() <= SMALL_ELEMENTS


def _mean_channels(x: Tensor, dtype: torch.dtype) -> Tensor:
    if _use_torch(x):
        return torch.mean(x, 1, True, dtype=dtype)
    if x.dtype == dtype:
        return _sum_channels(x).div_(x.shape[1])
    total = torch.empty((x.shape[0], 1, *x.shape[2:]), dtype=dtype, device=x.device)
    for tile, part, _ in _tiles_with_scratch(x, dtype):
        total[tile] = _sum_channels(part)
    return total.div_(x.shape[1])


def _sum_channels(x: Tensor) -> Tensor:
    """Sum over channels: a matrix product reads contiguous x in order, about twice as fast as `torch.sum` on CPU."""
    if not x.is_contiguous() or not multiplies_exactly():
        return torch.sum(x, 1, True)
    batch, channels, height, width = x.shape
    return torch.bmm(x.new_ones(batch, 1, channels), x.flatten(2)).view(batch, 1, height, width)


def max_channels(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`torch.max` over channels with the first index; faster on CPU, where that kernel is scalar.

    Many channels in planes go in two steps: the maximum of each group, then the first in the first group that has it.
    """
    batch, channels, height, width = x.shape
    if _use_torch(x):
        return torch.max(x, 1, True)
    size = 16 if channels >= 256 else 8
    if channels < 64 or channels % size or not x.is_contiguous():
        return _max_tiled(x, dtype)
    groups = x.view(batch, channels // size, size, height * width)
    maximum, group = max_channels(groups.amax(2).view(batch, -1, height, width), dtype)
    members = groups.gather(1, group.view(batch, 1, 1, -1).expand(-1, -1, size, -1)).view(batch, size, height, width)
    return maximum, group * size + max_channels(members, dtype)[1]


def _max_tiled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first maximum is the largest of `channels - c` over the channels c that equal the maximum."""
    batch, channels, height, width = x.shape
    maximum = torch.empty((batch, 1, height, width), dtype=dtype, device=x.device)
    first = torch.empty_like(maximum)
    ramp = torch.arange(channels, 0, -1, dtype=dtype, device=x.device).view(1, -1, 1, 1)
    for tile, part, scratch in _tiles_with_scratch(x, dtype):
        torch.amax(part, 1, True, out=maximum[tile])
        torch.eq(part, maximum[tile], out=scratch).mul_(ramp)
        torch.amax(scratch, 1, True, out=first[tile])
    # NaN equals nothing, not even itself: there 0 is left, and only torch.max finds the first NaN.
    if first.amin() == 0:
        return torch.max(x, 1, True)
    return maximum, (channels - first).long()


def _dot_channels(x: Tensor, dout: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_c x * dout, large x without a temporary of its size."""
    if _use_torch(x):
        return torch.sum(x.to(dtype) * dout, 1, True)
    dot = torch.empty((x.shape[0], 1, *x.shape[2:]), dtype=dtype, device=x.device)
    for tile, part, scratch in _tiles_with_scratch(x, dtype):
        dot[tile] = _sum_channels(torch.mul(part, dout[tile], out=scratch))
    return dot


def _add_to_ties(dx: Tensor, x: Tensor, maximum: Tensor, dmaximum: Tensor) -> None:
    """Adds dmaximum to dx, split evenly among the channels that attain the maximum."""
    for tile, part, scratch in _tiles_with_scratch(x, maximum.dtype):
        torch.eq(part, maximum[tile], out=scratch)
        share = dmaximum[tile] / scratch.sum(1, True)
        dx[tile].add_(scratch.mul_(share))
