"""Softmax attention as an operation: checks, dispatch, torch.library, autograd, ``attnk.softmax_attention``."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch.autograd import forward_ad

from attnk import dispatch
from attnk.fallback import softmax_attention as fallback
from attnk.memory import empty_in_order
from attnk.reference.softmax_attention import softmax_attention_reference

from ._calls import autocast_is_on, implementation_scope, is_plain
from ._checks import FLOAT_DTYPES
from ._flops import announce_flops, declare_flops
from ._vmap import each_example, fold_examples
from ._watch import tell, watchers

MAX_HEAD_DIM = 256  # the widest head that the kernels hold in registers
MAX_FLOAT64_HEAD_DIM = 128  # of float64, on a GPU

Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@overload
def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    bias_table: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
    seed: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...


@overload
def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    bias_table: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
    seed: torch.Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    bias_table: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
    seed: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention ``dropout(softmax(scale q k^T + bias)) v`` (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762).

    The semantics are those of ``torch.nn.functional.scaled_dot_product_attention``, plus a bias whose gradient does not
    cost the fast path, relative position from a table, values of another width, and lse. The N x N logits never exist
    as a whole.

    Args:
        q: queries (B, heads, Nq, D) or (heads, Nq, D), float16, bfloat16, float32 or float64, any strides: views of one
            packed projection and of feature maps are read where they lie. Empty tensors are fine, D is at least 1.
        k: keys (B, heads, Nk, D), in the dtype and on the device of q (under autocast all three are cast).
        v: values (B, heads, Nk, Dv).
        bias: added to the logits; any float dtype, broadcasts to (B, heads, Nq, Nk). It has a gradient.
        mask: broadcasts alike; bool, True = attend; a float mask is a bias. A query that sees no key gets 0.
        scale: of the logits; D ** -0.5 when None. May be 0 or negative.
        is_causal: whether query i sees the keys up to i alone, counted from the first, also where Nq != Nk.
        dropout_p: share of the weights to drop, in training and out of it: pass 0 in evaluation. Which ones are dropped
            follows from the seed: in the kernels from it, batch, head, query and key alone.
        enable_gqa: whether k and v may have fewer heads, each serving as many neighbouring heads of q.
        bias_table: ((2 height - 1) (2 width - 1), heads), the bias by relative position, in Swin's order
            (https://arxiv.org/abs/2103.14030), for Nq = Nk = height x width tokens. It has a gradient.
        grid: (height, width), with ``bias_table``.
        seed: int64 (2,), seed and offset of the dropout; drawn from PyTorch's generator when None.
        return_lse: whether to return lse as well.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Returns:
        out (B, heads, Nq, Dv) in q's dtype, its axes in memory in q's order (from the definition: contiguous). With
        ``return_lse`` also lse (B, heads, Nq), float32 (float64 for float64): the logarithm of the sum of the
        exponentials of a query's logits, differentiable, -inf where it sees no key.

    Gradients are bit-equal from run to run. A second differentiation raises and names the backend that has it,
    "reference".

    Raises:
        ValueError: a shape, device or option that does not fit.
        TypeError: a dtype or type that does not fit.
        attnk.Unsupported: backend="triton" where the kernels cannot run.
    """
    bias, mask = _check(q, k, v, bias, mask, scale, dropout_p, enable_gqa, bias_table, grid, seed)
    plain = bias is None and bias_table is None and dropout_p == 0 and not return_lse
    chosen, _ = _choose(backend, q, k, v, plain=plain and mask is None)
    if autocast_is_on(q) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    without_batch = q.dim() == 3
    if without_batch:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if watchers:
        terms = {"bias": bias, "mask": mask, "bias_table": bias_table, "grid": grid, "is_causal": is_causal}
        tell("softmax_attention", q=q, k=k, scale=scale, **terms)
    if chosen == "reference" or 0 in (*q.shape, *v.shape):  # of empty tensors the definition is as fast
        keep = _reference_keep(q, k, dropout_p, seed)
        out, lse = softmax_attention_reference(
            q, k, v, bias, mask, scale=scale, is_causal=is_causal, dropout_p=dropout_p, keep=keep,
            bias_table=bias_table, grid=grid,
        )  # fmt: skip
    elif chosen == "torch" and plain and _is_for_sdpa(q, k, v, mask, is_causal):
        out = lse = fallback.sdpa(q, k, v, mask, scale, is_causal)
    else:
        rng = None
        if dropout_p > 0:
            rng = torch.randint(2**62, (2,), device=q.device) if seed is None else seed.to(q.device)
        width = grid[1] if grid is not None and bias_table is not None else 0
        options = (width, scale, is_causal, float(dropout_p), return_lse, chosen)
        out, lse = _run(q, k, v, bias, bias_table, mask, rng, *options)
    if without_batch:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (out, lse) if return_lse else out


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot run this call, or None when they can."""
    reason = dispatch.no_kernel_here(q)
    head_dim = max(q.shape[-1], v.shape[-1])
    if reason is None and head_dim > MAX_HEAD_DIM:
        reason = f"the kernels take a head dimension up to {MAX_HEAD_DIM}, got {head_dim}"
    elif reason is None and q.dtype == torch.float64 and q.is_cuda and head_dim > MAX_FLOAT64_HEAD_DIM:
        reason = f"the kernels take a head dimension up to {MAX_FLOAT64_HEAD_DIM} in float64, got {head_dim}"
    return reason


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    bias_table: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
    seed: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> dispatch.Explanation:
    """What ``attnk.explain("softmax_attention", ...)`` returns."""
    bias, mask = _check(q, k, v, bias, mask, scale, dropout_p, enable_gqa, bias_table, grid, seed)
    extras = sum(tensor is not None for tensor in (bias, mask, bias_table)) + (dropout_p > 0)
    chosen, reason = _choose(backend, q, k, v, plain=extras == 0 and not return_lse, warn=False)
    config = None
    if chosen == "triton":
        from attnk.kernels.tuning import architecture, softmax_attention_config

        config = softmax_attention_config(
            architecture(q.device),
            itemsize=q.element_size(),
            head_dim=max(q.shape[-1], v.shape[-1]),
            extras=extras,
        )
    return dispatch.Explanation("softmax_attention", chosen, reason, config)


def example(
    shape: list[int], dtype: torch.dtype, device: torch.device, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tensors that ``explain`` takes, for q of this shape: q, k and v, heads inside tokens where channels are last."""
    q = torch.empty(shape, dtype=dtype, device=device)
    if channels_last:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    return q, q, q


def _choose(
    backend: str | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plain: bool, warn: bool = True
) -> tuple[str, str]:
    """The backend and why. On a GPU, plain calls go to PyTorch's own attention where that was measured to be faster."""
    chosen, reason = dispatch.choose("softmax_attention", backend, q, unsupported, k, v, warn=warn)
    if chosen == "triton" and reason != "asked for" and plain and q.shape[-1] == v.shape[-1]:
        from attnk.kernels.tuning import architecture, sdpa_is_faster

        source = sdpa_is_faster(
            architecture(q.device),
            itemsize=q.element_size(),
            head_dim=q.shape[-1],
            tokens=min(q.shape[-2], k.shape[-2]),
        )
        if source is not None:
            return "torch", f"PyTorch's own attention is faster here ({source})"
    return chosen, reason


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float | None,
    dropout_p: float,
    enable_gqa: bool,
    bias_table: torch.Tensor | None,
    grid: tuple[int, int] | None,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Raise where an argument does not fit; return bias and mask with four dimensions, a float mask as the bias."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() not in (3, 4):
            raise ValueError(
                f"{name} must be (B, heads, N, D) or (heads, N, D), got {tensor.dim()} dimensions: "
                f"{tuple(tensor.shape)}"
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
        if tensor.dtype != q.dtype and not autocast_is_on(q):
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.dim() != q.dim() or tensor.shape[:-3] != q.shape[:-3]:
            raise ValueError(f"{name} must have the batch of q, {tuple(q.shape)}, got {tuple(tensor.shape)}")
    if q.shape[-1] == 0:
        raise ValueError(f"q must have a head dimension of at least 1, got {tuple(q.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have the head dimension of q, {q.shape[-1]}, got {tuple(k.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must have the heads and tokens of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    heads, key_heads = q.shape[-3], k.shape[-3]
    if heads != key_heads and not (enable_gqa and key_heads and heads % key_heads == 0):
        needed = "a divisor of q's heads" if enable_gqa else "the heads of q (enable_gqa=True admits fewer)"
        raise ValueError(f"k must have {needed}, {heads}, got {key_heads}")
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}; multiply q by a tensor instead")
    if not isinstance(dropout_p, int | float) or not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be a number from 0 to 1, got {dropout_p!r}")
    if seed is not None and (seed.shape != (2,) or seed.dtype != torch.int64):
        raise ValueError(f"seed must be int64 of shape (2,), got {seed.dtype} of shape {tuple(seed.shape)}")
    if mask is not None:
        if not isinstance(mask, torch.Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        if mask.is_floating_point():
            if bias is not None:
                raise ValueError("mask must be bool where there is a bias; a float mask is a bias: add the two")
            bias, mask = mask, None
        elif mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True = attend) or float, got {mask.dtype}")
    if bias is not None and (not isinstance(bias, torch.Tensor) or bias.dtype not in FLOAT_DTYPES):
        got = bias.dtype if isinstance(bias, torch.Tensor) else type(bias).__name__
        raise TypeError(f"bias must be a float16, bfloat16, float32 or float64 tensor, got {got}")
    batch = q.shape[0] if q.dim() == 4 else 1
    _check_table(q, k, bias_table, grid)
    sizes = (batch, heads, q.shape[-2], k.shape[-2])
    return _broadcastable("bias", bias, sizes, q), _broadcastable("mask", mask, sizes, q)


def _check_table(
    q: torch.Tensor, k: torch.Tensor, bias_table: torch.Tensor | None, grid: tuple[int, int] | None
) -> None:
    if bias_table is None:
        if grid is not None:
            raise ValueError(f"grid is for a bias_table, which is None; got grid={grid}")
        return
    if grid is None or len(grid) != 2:
        raise ValueError(f"bias_table needs grid=(height, width), got {grid!r}")
    height, width = grid
    if not isinstance(bias_table, torch.Tensor) or bias_table.dtype not in FLOAT_DTYPES:
        got = bias_table.dtype if isinstance(bias_table, torch.Tensor) else type(bias_table).__name__
        raise TypeError(f"bias_table must be a float16, bfloat16, float32 or float64 tensor, got {got}")
    if q.shape[-2] != height * width or k.shape[-2] != height * width:
        raise ValueError(
            f"grid must have as many places as q and k have tokens, {q.shape[-2]} and {k.shape[-2]}, got {grid}"
        )
    expected = ((2 * height - 1) * (2 * width - 1), q.shape[-3])
    if height * width and bias_table.shape != expected:
        raise ValueError(
            f"bias_table must be ((2 height - 1) (2 width - 1), heads) = {expected} for grid={grid}, "
            f"got {tuple(bias_table.shape)}"
        )
    if bias_table.device != q.device:
        raise ValueError(f"bias_table must be on the device of q, {q.device}, got {bias_table.device}")


def _broadcastable(
    name: str, tensor: torch.Tensor | None, sizes: tuple[int, ...], q: torch.Tensor
) -> torch.Tensor | None:
    """A bias or mask with four dimensions, its keys' axis not broadcast."""
    if tensor is None:
        return None
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
    shape = tensor.shape
    padded = (1,) * (4 - len(shape)) + tuple(shape)
    if len(padded) != 4 or any(size not in (1, full) for size, full in zip(padded, sizes, strict=True)):
        raise ValueError(f"{name} must broadcast to (B, heads, Nq, Nk) = {sizes}, got {tuple(shape)}")
    tensor = tensor.view(padded) if len(shape) != 4 else tensor
    return tensor if padded[3] == sizes[3] else tensor.expand(-1, -1, -1, sizes[3])


def _reference_keep(
    q: torch.Tensor, k: torch.Tensor, dropout_p: float, seed: torch.Tensor | None
) -> torch.Tensor | None:
    if dropout_p == 0 or seed is None:
        return None
    generator = torch.Generator(q.device).manual_seed(sum(seed.tolist()) % 2**63)
    return torch.rand((*q.shape[:3], k.shape[2]), device=q.device, generator=generator) >= dropout_p


def _is_for_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> bool:
    """Whether PyTorch's own operation does a plain call well: on the CPU where it is fused, and without a gradient."""
    if q.device.type != "cpu" or torch.jit.is_tracing():
        return True
    if _needs_grad(q, k, v) or not fallback.fused_fits(q, v, None, mask, None, is_causal, 0.0):
        return False
    # a program compiled or exported for any number of tokens is not to ask how many there are
    return torch.compiler.is_compiling() or not fallback.is_short(q, max(q.shape[2], k.shape[2]))


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    mask: torch.Tensor | None,
    rng: torch.Tensor | None,
    width: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    wants_lse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    options = (width, scale, is_causal, dropout_p)
    if torch.jit.is_tracing():  # a trace would freeze sizes and buffers
        grid = (q.shape[2] // width, width) if width else None
        return softmax_attention_reference(
            q, k, v, bias, mask, scale=scale, is_causal=is_causal, dropout_p=dropout_p, bias_table=table, grid=grid
        )
    compiling = torch.compiler.is_compiling()
    if not compiling and not is_plain(q):
        announce_flops()
    transformed = not compiling and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
    needs_grad = _needs_grad(q, k, v, bias, table)
    if transformed or needs_grad:
        # one tensor in two places may lose a gradient
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
    if transformed or (compiling and needs_grad):
        return SoftmaxAttentionTransformFunction.apply(
            q, k, v, bias, table, mask, rng, *options, wants_lse, backend
        )[:2]  # fmt: skip
    if needs_grad:
        return SoftmaxAttentionFunction.apply(q, k, v, bias, table, mask, rng, *options, wants_lse, backend)[:2]
    forward = _forward if is_plain(q) else _forward_op
    return forward(q, k, v, bias, mask, table, rng, *options, False, wants_lse, backend)[:2]


# Registration. The implementations receive real tensors and a settled backend.

_library = torch.library.Library("attnk", "FRAGMENT")
_library.define(
    "softmax_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? table, Tensor? rng,"
    " SymInt width, float scale, bool is_causal, float dropout_p, bool keep, bool wants_lse, str backend)"
    " -> (Tensor out, Tensor lse, Tensor row_max, Tensor log_sum)"
)
_library.define(
    "softmax_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask,"
    " Tensor? table, Tensor? rng, Tensor out, Tensor row_max, Tensor log_sum, SymInt width, float scale,"
    " bool is_causal, float dropout_p, bool needs_dq, bool needs_dkv, bool needs_dbias, bool needs_dtable, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dtable)"
)


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return fallback
    from attnk.kernels import softmax_attention as kernels

    return kernels


def _forward(q: torch.Tensor, *args: Any) -> Kept:
    with torch.no_grad(), implementation_scope(q):
        return _implementation(args[-1]).softmax_attention_forward(q, *args[:-1])


def _forward_fake(
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
    keep: bool,
    wants_lse: bool,
    backend: str,
) -> Kept:
    rows = q.shape[:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    has_stats = (keep, keep and (bias is not None or table is not None))
    if backend == "torch":
        has_stats = (keep and fallback.fused_fits(q, v, bias, mask, table, is_causal, dropout_p), False)
    return (
        empty_in_order(q, (*rows, v.shape[-1])),
        q.new_empty(rows if wants_lse else (0,), dtype=dtype),
        *(q.new_empty(rows if has else (0,), dtype=dtype) for has in has_stats),
    )  # type: ignore[return-value]


def _backward(dout: torch.Tensor, *args: Any) -> Gradients:
    with torch.no_grad(), implementation_scope(dout):
        return _implementation(args[-1]).softmax_attention_backward(dout, *args[:-1])


def _backward_fake(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    table: torch.Tensor | None,
    *args: Any,
) -> Gradients:
    needs_dq, needs_dkv, needs_dbias, needs_dtable = args[-5:-1]
    return (
        empty_in_order(q, q.shape) if needs_dq else q.new_empty(0),
        empty_in_order(k, k.shape) if needs_dkv else k.new_empty(0),
        empty_in_order(v, v.shape) if needs_dkv else v.new_empty(0),
        q.new_empty(0) if bias is None or not needs_dbias else bias.new_empty(bias.shape),
        q.new_empty(0) if table is None or not needs_dtable else table.new_empty(table.shape),
    )


for _name, _real, _fake in (
    ("softmax_attention_forward", _forward, _forward_fake),
    ("softmax_attention_backward", _backward, _backward_fake),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnk::{_name}", _fake, lib=_library)


_forward_op = torch.ops.attnk.softmax_attention_forward.default
_backward_op = torch.ops.attnk.softmax_attention_backward.default


def _forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of q k^T and of the weights by v."""
    batch, heads, n_queries, dim = q_shape
    return 2 * batch * heads * n_queries * k_shape[2] * (dim + v_shape[3])


def _backward_flops(*args: Any, **kwargs: Any) -> int:
    """FLOPs of q k^T and dout v^T, once, and of the gradients that are wanted."""
    (batch, heads, n_queries, dim), (_, _, n_keys, v_dim) = args[2], args[4]
    needs_dq, needs_dkv = args[16:18]
    return 2 * batch * heads * n_queries * n_keys * (dim + v_dim + needs_dq * dim + needs_dkv * (dim + v_dim))


declare_flops(torch.ops.attnk.softmax_attention_forward, _forward_flops)
declare_flops(torch.ops.attnk.softmax_attention_backward, _backward_flops)


# Autograd. Two flavours of one Function: the plain one costs the least a call; torch.compile and torch.func need the
# other, whose context is set up apart from its forward.


def _save(ctx: Any, inputs: Sequence[Any], token: torch.Tensor, kept: Sequence[torch.Tensor]) -> None:
    q, k, v, bias, table, mask, rng, *options = inputs
    out, _, row_max, log_sum = kept
    ctx.save_for_backward(token, q, k, v, bias, mask, table, rng, out, row_max, log_sum)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    nothing = (None,) * 13
    if dout is None and dlse is None:
        return nothing
    needs_dq, needs_dk, needs_dv, needs_dbias, needs_dtable = needs = ctx.needs_input_grad[:5]
    token, *saved = ctx.saved_tensors
    *options, wants_lse, backend = ctx.options
    dout = torch.zeros_like(saved[7]) if dout is None else dout
    dlse = dlse if wants_lse else None
    args = (dout, dlse, *saved, *options, needs_dq, needs_dk or needs_dv, needs_dbias, needs_dtable, backend)
    if is_plain(dout) and not torch.is_grad_enabled():
        grads = _backward(*args)
    elif torch.compiler.is_compiling():
        grads = _backward_op(*args)
    else:  # create_graph=True, torch.func, or somebody watching
        grads = SoftmaxAttentionBackwardFunction.apply(*args, token)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *nothing[5:]


class SoftmaxAttentionFunction(torch.autograd.Function):
    """The attention in plain eager mode.

    Besides the outputs there is a token without elements. A second derivative goes through it, and so fails in words.
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, bias: Any, table: Any, mask: Any, rng: Any, *options: Any) -> Any:
        forward = _forward if is_plain(q) else _forward_op
        kept = forward(q, k, v, bias, mask, table, rng, *options[:-2], True, *options[-2:])
        token = q.new_empty(0)
        _save(ctx, (q, k, v, bias, table, mask, rng, *options), token, kept)
        return *kept[:2], token

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, *unused: Any) -> Any:
        return _gradients(ctx, dout, dlse)


class SoftmaxAttentionTransformFunction(torch.autograd.Function):
    """The attention under torch.compile, torch.export and torch.func; what is kept are outputs there, and the token."""

    @staticmethod
    def forward(q: Any, k: Any, v: Any, bias: Any, table: Any, mask: Any, rng: Any, *options: Any) -> Any:
        kept = _forward_op(q, k, v, bias, mask, table, rng, *options[:-2], True, *options[-2:])
        return *kept, q.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        *kept, token = output
        ctx.mark_non_differentiable(*kept[2:])
        _save(ctx, inputs, token, kept)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, *unused: Any) -> Any:
        return _gradients(ctx, dout, dlse)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        function = SoftmaxAttentionTransformFunction
        shared = all(extra is None or (extra.dim() == 4 and extra.shape[0] == 1) for extra in (args[3], args[5]))
        if shared and args[6] is None and in_dims[3:7] == (None,) * 4:
            return fold_examples(function, info.batch_size, in_dims, args, (0, 1, 2))
        return each_example(function, info.batch_size, in_dims, args)


class SoftmaxAttentionBackwardFunction(torch.autograd.Function):
    """The backward, itself a Function so that torch.func can map over it and a second backward fails in words.

    Behind the arguments of the backward it takes the token that links it to all inputs of the forward.
    """

    @staticmethod
    def forward(*args: Any) -> Gradients:
        return _backward_op(*args[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> Any:
        raise NotImplementedError(
            "attnk.softmax_attention: the fused backward cannot be differentiated again; "
            "backend='reference' (or attnk.use_backend('reference')) can"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        return each_example(SoftmaxAttentionBackwardFunction, info.batch_size, in_dims, args)


# Programs that were exported call the operations by themselves, without the Functions above, and may be trained.


def _setup_raw(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward_raw(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, *unused: Any) -> Any:
    """Gradients of an operation called by itself, as exported programs call it; the forward runs once more."""
    q, k, v, bias, mask, table, rng = ctx.saved_tensors
    *options, _, wants_lse, backend = ctx.options
    with torch.enable_grad():
        leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in (q, k, v, bias, table)]
        outs = SoftmaxAttentionFunction.apply(*leaves, mask, rng, *options, wants_lse, backend)[:2]
    pairs = [
        (out, grad) for out, grad in zip(outs, (dout, dlse if wants_lse else None), strict=True) if grad is not None
    ]
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs]))
    dq, dk, dv, dbias, dtable = (None if leaf is None else next(grads) for leaf in leaves)
    return dq, dk, dv, dbias, None, dtable, *(None for _ in range(1 + len(ctx.options)))


torch.library.register_autograd(
    "attnk::softmax_attention_forward", _backward_raw, setup_context=_setup_raw, lib=_library
)
