"""Linear attention in plain PyTorch: matrix products between tokens and a small state, a few heads at a time.

Heads are taken as many at a time as leave their features in a cache, and are read where they lie, tokens as rows or as
columns. The formulas stand in the kernels' file; of softmax no statistics are kept.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from attnk.memory import empty_in_order

# features at once: on the CPU as many as a cache holds, elsewhere as many as make 128 MiB
CPU_BLOCK_ELEMENTS = 2**20
BLOCK_ELEMENTS = 2**25
COPIED_ELEMENTS = 2**18  # of several images on the CPU whose heads do not lie together: a copy costs less than calls

Slices = tuple[slice, slice]


def linear_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The forward, with the arguments of the kernels' launcher.

    Returns:
        out; state; norm, which is empty, (0,), for softmax.
    """
    batch, heads, _, dim = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    softmax = feature_map == "softmax"
    state = q.new_empty((batch, heads, dim, v.shape[-1]), dtype=dtype)
    norm = q.new_empty((0,) if softmax else (batch, heads, 1, dim), dtype=dtype)
    out = empty_in_order(q, (*q.shape[:3], v.shape[-1]))
    for part in _parts(q, k, v):
        keys = _features(_flat(k[part], dtype), feature_map, 1)
        part_state = torch.bmm(keys.mT, _flat(v[part], dtype), out=_place(state[part], dtype))
        part_norm = None if softmax else torch.sum(keys, 1, keepdim=True, out=_place(norm[part], dtype))
        del keys
        queries = _features(_flat(q[part], dtype), feature_map, 2)
        result = _multiply(queries, part_state, _place(out[part], dtype))
        if part_norm is not None:
            result.div_(_denominators(queries, part_norm, eps))
        _put(out[part], result)
    return out, state, norm


def linear_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    norm: torch.Tensor,
    feature_map: str,
    eps: float,
    needs_dq: bool,
    needs_dkv: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward, with the arguments and results of the kernels' launcher."""
    dtype = state.dtype
    softmax = feature_map == "softmax"
    dq = empty_in_order(q, q.shape) if needs_dq else q.new_empty(0)
    dk, dv = (empty_in_order(each, each.shape) if needs_dkv else each.new_empty(0) for each in (k, v))
    for part in _parts(q, k, v):
        raw, gradient = _flat(q[part], dtype), _flat(dout[part], dtype)
        part_state = _flat(state[part], dtype)
        queries = _features(raw, feature_map, 2)
        if needs_dq or not softmax:
            dqueries = _multiply(gradient, part_state.mT)
        if not softmax:
            part_norm = _flat(norm[part], dtype)
            scale = _denominators(queries, part_norm, eps).reciprocal_()
            delta = (dqueries * queries).sum(2, keepdim=True).mul_(scale)
        if needs_dkv and softmax:
            dstate = torch.bmm(queries.mT, gradient)
        elif needs_dkv:
            dstate = torch.bmm(queries.mT, gradient * scale)
            dnorm = torch.bmm((delta * scale).mT, queries).neg_()
        if needs_dq:
            if not softmax:
                dqueries.baddbmm_(delta, part_norm, alpha=-1).mul_(scale)
            _put(dq[part], _through_features(dqueries, raw, queries, feature_map, 2, _place(dq[part], dtype)))
        if not needs_dkv:
            continue
        del raw, gradient, queries
        raw, values = _flat(k[part], dtype), _flat(v[part], dtype)
        keys = _features(raw, feature_map, 1)
        _put(dv[part], _multiply(keys, dstate, _place(dv[part], dtype)))
        dkeys = _multiply(values, dstate.mT)
        if not softmax:
            dkeys.add_(dnorm)
        _put(dk[part], _through_features(dkeys, raw, keys, feature_map, 1, _place(dk[part], dtype)))
    return dq, dk, dv


def _parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Slices]:
    """Slices of (batch, heads), in a fixed order."""
    batch, heads, _, dim = q.shape
    on_cpu = q.device.type == "cpu"
    elements = max(q.shape[2], k.shape[2]) * max(dim, v.shape[-1])
    in_limit = max(1, (CPU_BLOCK_ELEMENTS if on_cpu else BLOCK_ELEMENTS) // elements)
    n_heads, n_images = min(heads, in_limit), max(1, in_limit // heads)
    if on_cpu and any(heads > 1 and each.stride(0) != heads * each.stride(1) for each in (q, k, v)):
        n_images = min(n_images, max(1, COPIED_ELEMENTS // (heads * elements)))
    for b in range(0, batch, n_images):
        for h in range(0, heads, n_heads):
            yield slice(b, b + n_images), slice(h, h + n_heads)


def _flat(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(batch, heads, N, D) as (batch heads, N, D) in this dtype; a copy of what does not lie so."""
    return x.flatten(0, 1).to(dtype)


def _place(target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where to compute a part of a result: in it, or apart where its dtype or memory do not allow that."""
    flat = target.flatten(0, 1)
    return flat if flat.data_ptr() == target.data_ptr() and flat.dtype == dtype else torch.empty_like(flat, dtype=dtype)


def _put(target: torch.Tensor, computed: torch.Tensor) -> None:
    if computed.data_ptr() != target.data_ptr():
        target.copy_(computed.unflatten(0, target.shape[:2]))


def _in_columns(x: torch.Tensor) -> bool:
    """Whether tokens (heads, N, D) are the dense axis."""
    return x.stride(2) != 1 and x.stride(1) == 1


def _multiply(tokens: torch.Tensor, matrix: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens (heads, N, D) by matrices (heads, D, E), laid out as they, and there if place is given."""
    if _in_columns(tokens if place is None else place):
        return torch.bmm(matrix.mT, tokens.mT, out=None if place is None else place.mT).mT
    return torch.bmm(tokens, matrix, out=place)


def _denominators(queries: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
    """phi(q) z + eps, (heads, N, 1)."""
    return torch.bmm(norm, queries.mT).add_(eps).mT  # tokens last, as BLAS takes products with one column slowly


def _features(x: torch.Tensor, feature_map: str, axis: int) -> torch.Tensor:
    """phi of (heads, N, D); softmax along an axis."""
    if feature_map != "softmax":
        return torch.relu(x) if feature_map == "relu" else F.elu(x).add_(1)
    return x.mT.softmax(3 - axis).mT if _in_columns(x) else x.softmax(axis)


def _through_features(
    gradient: torch.Tensor, x: torch.Tensor, features: torch.Tensor, feature_map: str, axis: int, place: torch.Tensor
) -> torch.Tensor:
    """The gradient of x from that of its features; these are lost."""
    if feature_map == "relu":
        return torch.ops.aten.threshold_backward.grad_input(gradient, x, 0, grad_input=place)
    if feature_map == "elu":
        return torch.mul(gradient, features.clamp_(max=1), out=place)
    if _in_columns(features):
        return torch._softmax_backward_data(gradient.mT, features.mT, 3 - axis, x.dtype).mT
    return torch._softmax_backward_data(gradient, features, axis, x.dtype)
