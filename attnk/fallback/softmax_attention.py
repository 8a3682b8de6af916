"""Softmax attention in plain PyTorch: its own fused attention where that fits, blocks of logits elsewhere.

PyTorch's fused attention on the CPU has no gradient for a bias, no bias table, no dropout, and wants values as wide as
keys; with few keys it is slower than products and a softmax. For those, logits are formed in blocks of queries by all
keys that stay in the cache, softmax and all, and once more in the backward, unless the caller kept the weights.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from attnk.groups import table_gradient
from attnk.memory import empty_in_order, in_order

# logits at once: on the CPU as many as a core's cache holds, elsewhere as many as make 32 MiB
CPU_BLOCK_ELEMENTS = 2**19
BLOCK_ELEMENTS = 2**23
SHORT = 100  # up to so many queries and keys, products and a softmax are faster than PyTorch's fused attention
SHORT_BLOCK_ELEMENTS = 2**18  # logits at once there: measured best of 2**15 ... 2**20
DENSE_TABLE_ELEMENTS = 2**22  # a bias table for no more pairs than these becomes a bias
NEVER_A_LOGIT = -1e30  # below it, lse has lost the logarithm of the sum

Slices = tuple[slice, slice, slice]
Parts = Sequence[tuple[slice, torch.Tensor]]


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, is_causal: bool
) -> torch.Tensor:
    """Attention without bias, dropout and lse, by PyTorch's own operation and with its autograd.

    Args:
        q, k, v: (B, heads, Nq, D), (B, key heads, Nk, D), (B, key heads, Nk, Dv).
        mask: bool, broadcasts to (B, heads, Nq, Nk); True = attend.
        scale: of the logits.
        is_causal: whether query i sees the keys up to i alone.

    Returns:
        (B, heads, Nq, Dv), its axes in memory in q's order.
    """
    like = q
    if q.device.type == "cpu":  # it leaves its fused path for other strides
        q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    if mask is not None and is_causal:
        mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        is_causal = False
    grouped = bool(q.shape[1] != k.shape[1])  # a tensor while tracing
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return in_order(out, like)


def fused_fits(
    q: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    table: torch.Tensor | None,
    is_causal: bool,
    dropout_p: float,
) -> bool:
    """Whether PyTorch's fused attention on the CPU can compute this forward."""
    extras = (bias is not None) + (mask is not None) + (table is not None) + is_causal
    if table is not None and not _is_small(table, q):
        return False
    return q.device.type == "cpu" and dropout_p == 0 and q.shape[-1] == v.shape[-1] and extras <= 1


def is_short(q: torch.Tensor, tokens: int) -> bool:
    """Whether products and a softmax are faster than PyTorch's fused attention, which is good at 16 bits."""
    return q.device.type == "cpu" and tokens <= SHORT and q.dtype in (torch.float32, torch.float64)


def _is_small(table: torch.Tensor, q: torch.Tensor) -> bool:
    return q.shape[1] * q.shape[2] ** 2 <= DENSE_TABLE_ELEMENTS


def _bias_and_table(
    bias: torch.Tensor | None, table: torch.Tensor | None, q: torch.Tensor, width: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A small table as a bias, or both as they are."""
    if table is None or not _is_small(table, q):
        return bias, table
    dense = dense_table(table, q.shape[2] // width, width, slice(0, q.shape[2])).unsqueeze(0)
    return (dense if bias is None else bias.to(torch.promote_types(q.dtype, torch.float32)) + dense), None


def softmax_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    table: torch.Tensor | None,
    rng: torch.Tensor | None,
    width: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    keep: bool = True,
    wants_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The forward, with the arguments of the kernels' launcher.

    Returns:
        out; lse; and, where a backward will follow PyTorch's fused forward, its lse in place of row_max. All else is
        empty, (0,).
    """
    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    nothing = q.new_empty(0, dtype=acc_dtype)
    fused = fused_fits(q, v, bias, mask, table, is_causal, dropout_p)
    bias, table = _bias_and_table(bias, table, q, width)
    plain = rng is None and mask is None and table is None and not is_causal and not wants_lse
    if plain and is_short(q, max(q.shape[2], k.shape[2])):
        out = short_forward(q, *_repeated(q, k, v), bias, scale)
        unread = q.new_zeros(q.shape[:3] if fused and keep else 0, dtype=acc_dtype)  # sizes do not tell short from long
        return in_order(out, q), nothing, unread, nothing.clone()
    if fused:
        q_unit, k, v = _fused_inputs(q, k, v)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_unit, k, v, 0.0, is_causal, attn_mask=_additive(bias, mask, q.dtype), scale=scale
        )
        out = in_order(out, q)
        kept = lse.clone(memory_format=torch.contiguous_format) if keep else nothing.clone()
        if wants_lse and (bias is not None or mask is not None):  # of a query that sees no key it says otherwise
            unseeing = ~mask.any(-1) if mask is not None else (bias == -torch.inf).all(-1)  # type: ignore[union-attr]
            lse = lse.masked_fill(unseeing, -torch.inf)
        return out, lse.clone(memory_format=torch.contiguous_format) if wants_lse else nothing, kept, nothing.clone()

    k, v = _repeated(q, k, v)
    hides = _hides(bias, mask, table)
    out = empty_in_order(q, (*q.shape[:3], v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=acc_dtype) if wants_lse else nothing
    keys, values = k.to(acc_dtype), v.to(acc_dtype)
    for number, (bs, hs, ms) in enumerate(_blocks(q, k, width if table is not None else 1)):
        logits = _logits(_as_batch(q[bs, hs, ms].to(acc_dtype)), _as_batch(keys[bs, hs]), scale)
        unseeing = _add_extras(logits, bias, mask, table, width, is_causal, (bs, hs, ms), hides)
        if wants_lse:
            torch.logsumexp(logits, -1, out=lse[bs, hs, ms])
        weights = _softmax(logits, unseeing)
        if wants_lse and unseeing is not None:
            lse[bs, hs, ms].masked_fill_(unseeing.squeeze(-1), -torch.inf)
        if rng is not None:
            weights.mul_(_kept(weights, rng, number, dropout_p))
        result = weights @ values[bs, hs]
        out[bs, hs, ms] = result.mul_(_keep_scale(dropout_p)) if rng is not None else result
    return out, lse, nothing.clone(), nothing.clone()


def softmax_attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    table: torch.Tensor | None,
    rng: torch.Tensor | None,
    out: torch.Tensor,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    width: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    needs_dq: bool,
    needs_dkv: bool,
    needs_dbias: bool,
    needs_dtable: bool,
    is_joint: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward, with the arguments and results of the kernels' launcher; ``is_joint``: out is of more keys, too."""
    key_heads = k.shape[1]
    like_k, like_v = k, v
    nothing = q.new_empty(0), k.new_empty(0), v.new_empty(0), q.new_empty(0), q.new_empty(0)
    given_bias, given_table = bias, table
    fused = fused_fits(q, v, bias, mask, table, is_causal, dropout_p)
    bias, table = _bias_and_table(bias, table, q, width)
    plain = rng is None and mask is None and table is None and not is_causal and dlse is None and not is_joint
    if plain and is_short(q, max(q.shape[2], k.shape[2])):
        found, pairs = short_backward(
            dout, q, *_repeated(q, k, v), bias, scale, needs_dq, needs_dkv, needs_dbias or needs_dtable
        )
        heads = (q.shape[1], key_heads, key_heads)
        dq, dk, dv = (
            in_order(_ungrouped(grad, number), like) if grad.numel() else like.new_empty(0)
            for grad, number, like in zip(found, heads, (q, k, v), strict=True)
        )
        wanted = (given_bias if needs_dbias else None, given_table if needs_dtable else None)
        return dq, dk, dv, *_bias_gradients(pairs, *wanted, q, width)
    if (
        fused
        and row_max.numel()
        and not needs_dbias
        and not needs_dtable
        and dlse is None
        and (bias is None or not (row_max < NEVER_A_LOGIT).logical_and(row_max > -torch.inf).any())
    ):
        q_unit, k, v = _fused_inputs(q, k, v)
        dout, out = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (dout, out))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q_unit, k, v, out, row_max, 0.0, is_causal, attn_mask=_additive(bias, mask, q.dtype), scale=scale
        )
        dq = in_order(dq, q) if needs_dq else nothing[0]
        if not needs_dkv:
            return dq, nothing[1], nothing[2], nothing[3], nothing[4]
        dk, dv = (in_order(_ungrouped(grad, key_heads), like) for grad, like in ((dk, like_k), (dv, like_v)))
        return dq, dk, dv, nothing[3], nothing[4]

    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = _repeated(q, k, v)
    keys, values = k.to(acc_dtype), v.to(acc_dtype)
    dq = empty_in_order(q, q.shape) if needs_dq else nothing[0]
    dkeys, dvalues = (torch.empty_like(keys), torch.empty_like(values)) if needs_dkv else nothing[1:3]
    hides = _hides(bias, mask, table)
    pairs = None  # the gradient of what is added to the logits, by broadcasting, but not from a large table
    if bias is not None and (needs_dbias or (needs_dtable and table is None)):
        pairs = torch.zeros_like(bias, dtype=acc_dtype)
    height = q.shape[2] // width if width else 0
    if needs_dtable and table is not None:
        dtable = q.new_zeros((q.shape[1], 2 * height - 1, 2 * width - 1), dtype=acc_dtype)
    for number, (bs, hs, ms) in enumerate(_blocks(q, k, width if table is not None else 1)):
        queries, block_keys, block_values, gradient = (
            _as_batch(x.to(acc_dtype)) for x in (q[bs, hs, ms], keys[bs, hs], values[bs, hs], dout[bs, hs, ms])
        )
        logits = _logits(queries, block_keys, scale)
        unseeing = _add_extras(logits, bias, mask, table, width, is_causal, (bs, hs, ms), hides)
        weights = _softmax(logits, unseeing)
        delta = (out[bs, hs, ms] * gradient).sum(-1, keepdim=True) if is_joint else None
        kept = None
        if rng is not None:
            gradient = gradient * _keep_scale(dropout_p)
            kept = _kept(weights, rng, number, dropout_p)
        if needs_dkv:
            dropped = weights if kept is None else weights * kept
            _gather(dvalues[bs, hs], dropped.transpose(-2, -1) @ gradient, ms)
            del dropped
        dlogits = gradient @ block_values.transpose(-2, -1)
        if kept is not None:
            dlogits.mul_(kept)
        if delta is None:
            torch.ops.aten._softmax_backward_data.out(dlogits, weights, -1, acc_dtype, grad_input=dlogits)
        else:
            dlogits.sub_(delta).mul_(weights)
        if dlse is not None:
            dlogits.addcmul_(weights, dlse[bs, hs, ms].unsqueeze(-1))
        if needs_dq:
            dq[bs, hs, ms] = (dlogits @ block_keys).mul_(scale)
        if needs_dkv:
            _gather(dkeys[bs, hs], (dlogits.transpose(-2, -1) @ queries).mul_(scale), ms)
        if pairs is not None:
            part = pairs[_broadcast_slices(pairs, bs, hs, ms)]
            part += dlogits.sum_to_size(part.shape)
        if needs_dtable and table is not None:
            # a query adds its keys' gradients to a window of the table, one place further for each step on the grid
            first_row, n_rows = ms.start // width, (ms.stop - ms.start) // width
            folded = F.fold(
                dlogits.sum(0).flip(1).transpose(1, 2), (height + n_rows - 1, 2 * width - 1), (height, width)
            )
            begin = height - first_row - n_rows
            dtable[hs, begin : begin + height + n_rows - 1] += folded.squeeze(1)
    if needs_dkv:
        dkeys, dvalues = (
            in_order(_ungrouped(grad, key_heads).to(q.dtype), like)
            for grad, like in ((dkeys, like_k), (dvalues, like_v))
        )
    dbias, dtable_given = _bias_gradients(
        pairs, given_bias if needs_dbias else None, given_table if needs_dtable and table is None else None, q, width
    )
    if needs_dtable and table is not None:  # windows were counted from key to query
        dtable_given = dtable.flip(1, 2).flatten(1).t().to(table.dtype).contiguous()
    return dq, dkeys, dvalues, dbias, dtable_given


def _bias_gradients(
    pairs: torch.Tensor | None, bias: torch.Tensor | None, table: torch.Tensor | None, q: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of a bias and of a bias table from that of what both add to the logits; empty for None."""
    if pairs is None:
        return q.new_empty(0), q.new_empty(0)
    dbias = q.new_empty(0) if bias is None else pairs.sum_to_size(bias.shape).to(bias.dtype)
    if table is None:
        return dbias, q.new_empty(0)
    dense = pairs.sum(0).expand(q.shape[1], q.shape[2], q.shape[2])
    return dbias, table_gradient(dense, (q.shape[2] // width, width)).to(table.dtype).contiguous()


def short_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float,
    parts: Parts = (), weights: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of few queries and keys: two products and a softmax for each block of the batch.

    Args:
        q, k, v: (B, heads, Nq, D), (B, heads, Nk, D), (B, heads, Nk, Dv), float32 or float64.
        bias: broadcasts to (B, heads, Nq, Nk), or None.
        scale: of the logits.
        parts: what is added to the logits of parts of the batch alone, (1, 1 or heads, Nq, Nk) each.
        weights: contiguous (B, heads, Nq, Nk), where to leave the weights; None to forget them.

    Returns:
        (B, heads, Nq, Dv), contiguous.
    """
    out = q.new_empty(*q.shape[:3], v.shape[3])
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    extras = (bias, parts, _has_minus_infinity(bias))
    for block in _short_blocks(q, k):
        found = _short_weights(q, k, scale, block, *extras, None if weights is None else weights[block])
        torch.bmm(found.flatten(0, 1), v[block].flatten(0, 1), out=out[block].flatten(0, 1))
    return out


def short_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float,
    needs_dq: bool, needs_dkv: bool, needs_dbias: bool, parts: Parts = (), weights: torch.Tensor | None = None,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]:  # fmt: skip
    """The gradients of ``short_forward``; where no weights were left, they are computed once more.

    Returns:
        dq, dk and dv, contiguous, empty where not wanted; and that of the bias, in its shape, or None.
    """
    dout, q, k, v = (x.contiguous() for x in (dout, q, k, v))
    needs = (needs_dq, needs_dkv, needs_dkv)
    dq, dk, dv = (torch.empty_like(x) if needed else x.new_empty(0) for x, needed in zip((q, k, v), needs, strict=True))
    dbias = torch.zeros_like(bias, dtype=q.dtype) if bias is not None and needs_dbias else None
    nothing = q.new_empty(1, 1, 1)
    extras = (bias, parts, weights is None and _has_minus_infinity(bias))
    for block in _short_blocks(q, k):
        found = _short_weights(q, k, scale, block, *extras) if weights is None else weights[block]
        flat, gradient = found.flatten(0, 1), dout[block].flatten(0, 1)
        if needs_dkv:
            torch.bmm(flat.mT, gradient, out=dv[block].flatten(0, 1))
        dlogits = torch.bmm(gradient, v[block].flatten(0, 1).mT)
        torch.ops.aten._softmax_backward_data.out(dlogits, flat, -1, q.dtype, grad_input=dlogits)
        if dbias is not None:
            part = _of_batch(dbias, block)
            part += dlogits.view(found.shape).sum_to_size(part.shape)
        if needs_dq:
            keys = k[block].flatten(0, 1)
            torch.baddbmm(nothing, dlogits, keys, beta=0, alpha=scale, out=dq[block].flatten(0, 1))
        if needs_dkv:
            queries = q[block].flatten(0, 1)
            torch.baddbmm(nothing, dlogits.mT, queries, beta=0, alpha=scale, out=dk[block].flatten(0, 1))
    return (dq, dk, dv), dbias


def _short_blocks(q: torch.Tensor, k: torch.Tensor) -> Iterator[slice]:
    """Slices of the batch."""
    batch, heads, n_queries, _ = q.shape
    size = _even_part(batch, SHORT_BLOCK_ELEMENTS // (heads * n_queries * k.shape[2]))
    for start in range(0, batch, size):
        yield slice(start, min(start + size, batch))


def _of_batch(bias: torch.Tensor, block: slice) -> torch.Tensor:
    return bias if bias.shape[0] == 1 else bias[block]


def _has_minus_infinity(bias: torch.Tensor | None) -> bool:
    return bias is not None and bool(bias.amin() == -torch.inf)


def _short_weights(
    q: torch.Tensor, k: torch.Tensor, scale: float, block: slice, bias: torch.Tensor | None, parts: Parts, hides: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The softmax of a block's logits, into a tensor if one is given; with ``hides``, 0 where a query sees no key."""
    q, k = q[block], k[block]
    if out is None:
        out = q.new_empty(*q.shape[:3], k.shape[2])
    flat = out.flatten(0, 1)
    torch.baddbmm(q.new_empty(1, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=scale, out=flat)
    if bias is not None:
        out.add_(_of_batch(bias, block))
    for part, added in parts:
        first, last = max(part.start, block.start), min(part.stop, block.stop)
        if first < last:
            out[first - block.start : last - block.start].add_(added)
    unseeing = out.amax(-1, keepdim=True) == -torch.inf if hides else None
    torch.softmax(flat, -1, out=flat)
    return out if unseeing is None else out.masked_fill_(unseeing, 0)


def _fused_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k, v = _repeated(q, k, v)
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    return q, k, v


def _additive(bias: torch.Tensor | None, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if mask is not None:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return None if bias is None else bias.to(dtype)


def _repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with a head for each of q's."""
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _ungrouped(grad: torch.Tensor, key_heads: int) -> torch.Tensor:
    return grad if grad.shape[1] == key_heads else grad.unflatten(1, (key_heads, -1)).sum(2)


def _blocks(q: torch.Tensor, k: torch.Tensor, step: int) -> Iterator[Slices]:
    """Slices of (batch, heads, queries), in a fixed order, the queries by multiples of a step."""
    batch, heads, n_queries, _ = q.shape
    n_keys = k.shape[2]
    elements = CPU_BLOCK_ELEMENTS if q.device.type == "cpu" else BLOCK_ELEMENTS
    rows = _even_part(n_queries, elements // (n_keys * step) * step, step)
    n_heads = _even_part(heads, elements // (n_keys * n_queries))
    n_batch = _even_part(batch, elements // (n_keys * n_queries * heads))
    for b in range(0, batch, n_batch):
        for h in range(0, heads, n_heads):
            for m in range(0, n_queries, rows):
                yield (
                    slice(b, min(b + n_batch, batch)),
                    slice(h, min(h + n_heads, heads)),
                    slice(m, min(m + rows, n_queries)),
                )


def _even_part(size: int, most: int, step: int = 1) -> int:
    """A part of a size, at most so large, such that all parts are about as large; a multiple of a step."""
    parts = -(-size // max(most, step))
    return -(-size // (parts * step)) * step


def _as_batch(x: torch.Tensor) -> torch.Tensor:
    """The same as one batch of matrices, as it lies if it can: every product would copy it otherwise."""
    merges = x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.stride(1) * x.shape[1]
    return x if merges and 1 in x.stride()[2:] else x.contiguous()


def _gather(total: torch.Tensor, part: torch.Tensor, queries: slice) -> None:
    """Add a part to a total, which begins with that of the first queries."""
    if queries.start == 0:
        total.copy_(part)
    else:
        total.add_(part)


def _logits(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled products of what ``_as_batch`` returned."""
    sizes = queries.shape[:2]
    queries, keys = queries.flatten(0, 1), keys.flatten(0, 1)
    nothing = queries.new_empty(1, 1, 1)
    return torch.baddbmm(nothing, queries, keys.transpose(-2, -1), beta=0, alpha=scale).unflatten(0, sizes)


def _broadcast_slices(tensor: torch.Tensor, *slices: slice) -> tuple[slice, ...]:
    return tuple(slice(None) if size == 1 else part for size, part in zip(tensor.shape, slices, strict=False))


def _add_extras(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    table: torch.Tensor | None,
    width: int,
    is_causal: bool,
    block: Slices,
    hides: bool,
) -> torch.Tensor | None:
    """Add the bias to a block of logits and put -inf where a key is not seen.

    Returns which queries see no key, or None where all see one, as they do unless something hides keys.
    """
    _, hs, ms = block
    if bias is not None:
        logits += bias[_broadcast_slices(bias, *block)]
    if table is not None:
        logits += dense_table(table[:, hs], logits.shape[-1] // width, width, ms).to(logits.dtype)
    if mask is not None:
        logits.masked_fill_(~mask[_broadcast_slices(mask, *block)], -torch.inf)
    if is_causal:
        queries = torch.arange(ms.start, ms.stop, device=logits.device)
        keys = torch.arange(logits.shape[-1], device=logits.device)
        logits.masked_fill_(queries[:, None] < keys, -torch.inf)
    return logits.amax(-1, keepdim=True) == -torch.inf if hides else None


def _hides(bias: torch.Tensor | None, mask: torch.Tensor | None, table: torch.Tensor | None) -> bool:
    """Whether a query may see no key; on the CPU, where that waits for nothing, a bias is asked for -inf."""
    extras = [extra for extra in (bias, table) if extra is not None]
    return mask is not None or any(extra.device.type != "cpu" or bool(extra.isneginf().any()) for extra in extras)


def dense_table(table: torch.Tensor, height: int, width: int, queries: slice) -> torch.Tensor:
    """The bias (heads, queries, keys) of some rows of the grid's queries."""
    windows = table.t().unflatten(1, (2 * height - 1, 2 * width - 1)).flip(1, 2)
    windows = windows.unfold(1, height, 1).unfold(2, width, 1)  # the query's row and column backwards, the key's
    rows = slice(height - queries.stop // width, height - queries.start // width)
    return windows[:, rows].flip(1, 2).flatten(3).flatten(1, 2)


def _softmax(logits: torch.Tensor, unseeing: torch.Tensor | None) -> torch.Tensor:
    """The softmax, in place of the logits."""
    if unseeing is None:
        return torch.softmax(logits, -1, out=logits)
    logits.masked_fill_(unseeing, 0)
    return torch.softmax(logits, -1, out=logits).masked_fill_(unseeing, 0)


def _keep_scale(dropout_p: float) -> float:
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def _kept(weights: torch.Tensor, rng: torch.Tensor, number: int, dropout_p: float) -> torch.Tensor:
    """Which weights of a block dropout keeps: each has 32 bits of a generator seeded by the block's number."""
    seed, offset = rng.tolist()
    generator = torch.Generator(weights.device).manual_seed(_mixed(seed + 0x9E3779B97F4A7C15 * (offset + number)))
    bits = torch.empty((weights.numel() + 1) // 2, dtype=torch.int64, device=weights.device)
    bits.random_(-(2**63), None, generator=generator)
    drawn = bits.view(torch.int32)[: weights.numel()].view(weights.shape)
    return drawn >= min(round(dropout_p * 2**32), 2**32 - 1) - 2**31


def _mixed(number: int) -> int:
    """A number of 32 bits, all that a generator on the CPU looks at, from all of 64 (SplitMix64's last step)."""
    number %= 2**64
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) % 2**64
    return (number ^ (number >> 31)) % 2**32
