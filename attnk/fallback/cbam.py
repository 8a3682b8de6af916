"""CBAM's spatial half and its whole dx in plain PyTorch: the fast path where no Triton kernel runs.

    y = x * gate rounded to x's dtype,  avg[p] = mean_c y,  max[p] = max_c y,  z = conv2d([avg, max], weight) + bias
    spatial = sigmoid(z),  out = x * gate * spatial (+ x if residual)
    t = x * dout,  dz = (sum_c gate * t) * spatial * (1 - spatial)  (map: dout * ...; logit: dout)
    dmaps = conv2d(dz, flipped weight),  dy = dout * spatial + davg / channels + [c is the first maximum] * dmax
    dgate[c] = sum_p dy * x,  dx = dy * gate (+ dout) + dpool_avg / pixels + [p is the first maximum] * dpool_max

Neither y nor dy exists as a whole: x is worked through in tiles that stay in cache. Sums over channels or pixels are
matrix products, which read a tile in order and need no product of their own. Kept between forward and backward are maps
one channel wide, in float32 for half precision input.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnk.fallback._precision import multiplies_exactly
from attnk.fallback.spatial_gate import convolve, max_channels, stack, tiles, unstack, weight_gradient, work_dtype


def cbam_infer(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, order: str, output: str) -> Tensor:
    """Computes the spatial half without keeping anything for a backward pass.

    Args:
        x: (batch, channels, height, width), any strides.
        gate: (batch, channels), the channel gate, in x's dtype.
        weight: (1, 2, kernel, kernel), odd kernel.
        bias: (1,) or None.
        order: "avg_max" or "max_avg", the order of the convolution's input maps.
        output: "gated", "residual", "map" or "logit".

    Returns:
        The output in x's dtype: x's shape and layout, or (batch, 1, height, width) for "map" and "logit".
    """
    avg, maximum = (_plane(x) for _ in range(2))
    for tile, part, buffer in _tiles(x, x.dtype):
        y = torch.mul(part, _of(gate, tile), out=buffer)
        avg[tile] = _mean_channels(y, part, gate[tile[0]])
        maximum[tile] = torch.amax(y, 1, True)
    z = convolve(stack(avg, maximum, order), weight, bias)
    if output in ("map", "logit"):
        return (z if output == "logit" else z.sigmoid_()).to(x.dtype)
    return cbam_scale(x, gate, z.sigmoid_(), output)


def cbam_forward(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, order: str, output: str, ties: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the spatial half and what `cbam_backward` needs.

    Args:
        x, gate, weight, bias, order, output: as for `cbam_infer`.
        ties: "first" or "even", who receives the gradient of a maximum that several channels attain.

    Returns:
        out, spatial (batch, 1, height, width), maps (batch, 2, height, width) in the convolution's order, and index
        (batch, 1, height, width), the first channel that attains the maximum as a number of the maps' dtype, or for
        ties="even" how many do. For output "logit" spatial is zeros that nothing reads.
    """
    avg, maximum, index = (_plane(x) for _ in range(3))
    for tile, part, buffer in _tiles(x, x.dtype):
        y = torch.mul(part, _of(gate, tile), out=buffer)
        avg[tile] = _mean_channels(y, part, gate[tile[0]])
        if ties == "first":
            maximum[tile], index[tile] = max_channels(y, avg.dtype)
        else:
            peak = torch.amax(y, 1, True)
            maximum[tile] = peak
            index[tile] = torch.eq(y, peak, out=buffer).sum(1, True, dtype=avg.dtype)
    maps = stack(avg, maximum, order)
    z = convolve(maps, weight, bias)
    if output == "logit":
        return z.to(x.dtype), torch.zeros_like(z), maps, index
    spatial = z.sigmoid_()
    out = spatial.to(x.dtype, copy=True) if output == "map" else cbam_scale(x, gate, spatial, output)
    return out, spatial, maps, index


def cbam_scale(x: Tensor, gate: Tensor, spatial: Tensor, output: str) -> Tensor:
    """x * gate * spatial, and x besides for output "residual", in x's dtype and layout, in one pass over x."""
    layout = torch.channels_last if x.stride(1) < x.stride(3) else torch.contiguous_format
    out = torch.empty_like(x, memory_format=layout)
    dtype = work_dtype(x)
    for tile, part, buffer in _tiles(x, dtype):
        result = out[tile] if x.dtype == dtype else buffer
        torch.mul(part, _of(gate, tile), out=result).mul_(spatial[tile])
        if output == "residual":
            result.add_(part)
        if x.dtype != dtype:
            out[tile] = result
    return out


def cbam_scale_backward(dout: Tensor, x: Tensor, gate: Tensor, spatial: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `cbam_scale` for gate (batch, channels) and spatial (batch, 1, height, width), in their dtypes."""
    dspatial, dgate = _gate_gradients(dout, x, gate, spatial)
    return dgate.to(gate.dtype), dspatial.to(spatial.dtype)


def cbam_backward(
    dout: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    spatial: Tensor,
    maps: Tensor,
    index: Tensor,
    order: str,
    output: str,
    ties: str,
    needs_gates: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of `cbam_forward` but that of x, which `cbam_dx` finishes.

    Args:
        dout: gradient of the output, any strides.
        x, gate, weight, spatial, maps, index: inputs and results of the forward pass.
        order, output, ties: as in the forward pass.
        needs_gates, needs_dweight: False returns an empty tensor in that place and skips its work.

    Returns:
        dgate (batch, channels) in gate's dtype; dmaps (batch, 3, height, width) for `cbam_dx`: davg / channels, the
        dmax of each maximum, and who has it: the index of the first, or for ties="even" the maximum itself; dweight
        and dbias (1,) in weight's dtype.
    """
    scaled = output in ("gated", "residual")
    dgate = None
    if scaled:
        dz, dgate = _gate_gradients(dout, x, gate, spatial)
    else:
        dz = dout.to(maps.dtype)
    if output != "logit":
        dz = torch.ops.aten.sigmoid_backward(dz, spatial)
    dweight, dbias = weight.new_empty(0), weight.new_empty(0)
    if needs_dweight:
        dweight, dbias = weight_gradient(dz, maps, weight)
    if not needs_gates:
        return gate.new_empty(0), maps.new_empty(0), dweight, dbias
    # as in the spatial gate, this convolution is several times as fast as convolution_backward
    davg, dmaximum = unstack(convolve(dz, weight.flip(2, 3).transpose(0, 1), None), order)
    davg = davg / x.shape[1]
    if ties == "even":
        dmaximum = dmaximum / index
        index = unstack(maps, order)[1]
    dmaps = torch.cat((davg, dmaximum, index), 1)
    from_maps = _sum_of_maps(x, gate, dmaps, ties)
    return (from_maps if dgate is None else dgate.add_(from_maps)).to(gate.dtype), dmaps, dweight, dbias


def cbam_dx(
    dout: Tensor | None,
    gate: Tensor,
    spatial: Tensor | None,
    dmaps: Tensor | None,
    dpool_avg: Tensor | None,
    dpool_max: Tensor | None,
    pool_index: Tensor,
    pool_max: Tensor | None,
    x: Tensor | None,
    height: int,
    width: int,
    channels_last: bool,
    output: str,
    ties: str,
) -> Tensor:
    """Computes the gradient of x from everything that depends on it, in one pass.

    Args:
        dout: gradient of the gated output, any strides; None where there is none.
        gate: (batch, channels), the channel gate.
        spatial: (batch, 1, height, width), the spatial gate; None without dout.
        dmaps: from `cbam_backward`, or None.
        dpool_avg, dpool_max: (batch, channels), gradients of the channel gate's pools, or None.
        pool_index: of the pool: the first pixel of each maximum, or for ties="even" how many there are.
        pool_max: (batch, channels), the maxima themselves; for ties="even" alone.
        x: the input; for ties="even" alone.
        height, width: x's.
        channels_last: whether dx is laid out channels last.
        output, ties: as in the forward pass.

    Returns:
        dx in gate's dtype.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    size = (*gate.shape, height, width)
    dx = torch.empty(size, dtype=gate.dtype, device=gate.device, memory_format=layout)
    dtype = work_dtype(gate)
    even = ties == "even"
    zero = torch.zeros((), dtype=dtype, device=gate.device)
    if dpool_avg is not None:
        dpool_avg = dpool_avg.to(dtype) / (height * width)
    if dpool_max is not None and even:
        share = dpool_max.to(dtype) / pool_index
    for tile, own, buffer in _tiles(dx, dtype):
        result = own if dx.dtype == dtype else buffer
        davg = zero if dmaps is None else dmaps[tile][:, :1]
        if dout is None:
            result.copy_(davg.expand(result.shape))
        else:
            assert spatial is not None
            torch.addcmul(davg, dout[tile], spatial[tile], out=result)
        scale = _of(gate, tile)
        if even and dmaps is not None:
            assert x is not None
            _, dmaximum, peak = dmaps[tile].split(1, 1)
            # not 0 beside a peak: as in torch.amax NaN, where its part is infinite or that of a NaN nothing equals
            result.add_(torch.where(x[tile] * scale == peak, dmaximum, dmaximum * 0))
        torch.addcmul(zero if dpool_avg is None else _of(dpool_avg, tile), result, scale, out=result)
        if even and dpool_max is not None:
            assert x is not None
            assert pool_max is not None
            result.add_(torch.where(x[tile] == _of(pool_max, tile), _of(share, tile), _of(share, tile) * 0))
        if output == "residual" and dout is not None:
            result.add_(dout[tile])
        if dx.dtype != dtype:
            dx[tile] = result
    if not even and dmaps is not None:
        index = dmaps[:, 2:].long()
        pixel_gate = gate[:, :, None, None].expand(size).gather(1, index)
        dx.scatter_add_(1, index, (dmaps[:, 1:2] * pixel_gate).to(dx.dtype))
    if not even and dpool_max is not None:
        dx.flatten(2).scatter_add_(2, pool_index.long().unsqueeze(2), dpool_max.unsqueeze(2))
    return dx


def _plane(x: Tensor) -> Tensor:
    return torch.empty((x.shape[0], 1, *x.shape[2:]), dtype=work_dtype(x), device=x.device)


def _of(channels: Tensor, tile: tuple[slice, ...]) -> Tensor:
    """A tile's part of (batch, channels), to broadcast over its pixels."""
    return channels[tile[0], :, None, None]


def _tiles(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[tuple[slice, ...], Tensor, Tensor]]:
    """Yields (tile, x[tile], scratch of its size and layout): on CPU tiles that stay in cache, elsewhere x at once."""
    scratch = None
    whole = (slice(None),) * 3
    for tile in tiles(x) if x.device.type == "cpu" else (whole,):
        part = x[tile]
        if scratch is None:
            scratch = torch.empty_like(part, dtype=dtype)
        yield tile, part, scratch[: part.shape[0], :, : part.shape[2]]


def _mean_channels(y: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """The mean of y = x * gate over channels; of exact products as one of a vector and a matrix."""
    if x.dtype != work_dtype(x) or not multiplies_exactly():
        return y.mean(1, True, dtype=work_dtype(x))
    return _weigh_channels(x, gate).div_(x.shape[1])


def _weigh_channels(values: Tensor, weights: Tensor) -> Tensor:
    """sum_c values (batch, channels, height, width) * weights (batch, channels)."""
    if not multiplies_exactly():
        return (values * weights[:, :, None, None]).sum(1, True)
    return torch.bmm(weights.unsqueeze(1), values.flatten(2)).view(-1, 1, *values.shape[2:])


def _weigh_pixels(values: Tensor, weights: Tensor, buffer: Tensor) -> Tensor:
    """sum_p values (batch, channels, height, width) * weights (batch, 1, height, width).

    A matrix product adds one pixel after the other, and of a whole map that is ten times as far off as a sum: with
    channels last it is one of each row, for which that of products would have to go through memory in steps.
    """
    if values.stride(1) == 1 and values.dtype == weights.dtype and multiplies_exactly():
        rows, columns = values.permute(0, 2, 3, 1), weights.permute(0, 2, 1, 3)
        sums = torch.bmm(columns.flatten(0, 1), rows.flatten(0, 1))
        return sums.view(*rows.shape[:2], -1).sum(1)
    return torch.mul(values, weights, out=buffer).sum((2, 3))


def _gate_gradients(dout: Tensor, x: Tensor, gate: Tensor, spatial: Tensor) -> tuple[Tensor, Tensor]:
    """What reaches both gates through out = x * gate * spatial, from one product x * dout."""
    dtype = work_dtype(x)
    spatial, weights = spatial.to(dtype), gate.to(dtype)
    dspatial, dgate = _plane(x), torch.zeros_like(weights)
    for tile, part, buffer in _tiles(x, dtype):
        product = torch.mul(part.to(dtype), dout[tile], out=buffer)
        dspatial[tile] = _weigh_channels(product, weights[tile[0]])
        dgate[tile[0]] += _weigh_pixels(product, spatial[tile], buffer)
    return dspatial, dgate


def _sum_of_maps(x: Tensor, gate: Tensor, dmaps: Tensor, ties: str) -> Tensor:
    """dgate through both pooled maps: sum_p x * (davg / channels + [c has the maximum] * dmax)."""
    davg, dmaximum, mark = dmaps.split(1, 1)
    dgate = torch.zeros(gate.shape, dtype=dmaps.dtype, device=x.device)
    for tile, part, buffer in _tiles(x, dmaps.dtype):
        dgate[tile[0]] += _weigh_pixels(part, davg[tile], buffer)
        if ties == "even":
            peaks = torch.where(part * _of(gate, tile) == mark[tile], part, 0)
            dgate[tile[0]] += _weigh_pixels(peaks, dmaximum[tile], buffer)
    if ties == "first":
        index = mark.long()
        dgate.scatter_add_(1, index.flatten(1), (x.gather(1, index) * dmaximum).flatten(1))
    return dgate
