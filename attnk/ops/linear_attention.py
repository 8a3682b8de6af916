"""Linear attention as an operation: checks, dispatch, torch.library, autograd, ``attnk.linear_attention``."""

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from attnk import dispatch
from attnk.fallback import linear_attention as fallback
from attnk.memory import empty_in_order
from attnk.reference.linear_attention import linear_attention_reference

from ._calls import autocast_is_on, implementation_scope, is_plain
from ._checks import FLOAT_DTYPES, check_choice
from ._flops import announce_flops, declare_flops
from ._vmap import fold_examples
from ._watch import tell, watchers

FEATURE_MAPS = ("relu", "elu", "softmax")
PUBLISHED_EPS = {"relu": 1e-15, "elu": 1e-6, "softmax": 0.0}
MAX_HEAD_DIM = 256  # the widest head that the kernels hold in registers
MAX_FLOAT64_HEAD_DIM = 64  # of float64, on a GPU: wider ones do not fit its registers

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str = "relu",
    eps: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention ``phi(q) (phi(k)^T v) / (phi(q) sum(phi(k)) + eps)``, in time and memory linear in tokens.

    Every query sees every key. Feature maps are those of three publications:

    - "relu": that of EfficientViT (Cai et al., 2023, https://arxiv.org/abs/2205.14756) and SANA
      (https://arxiv.org/abs/2410.10629), whose ``LiteMLA`` adds 1e-15 to the denominators. A query or keys without a
      positive feature give 0.
    - "elu": elu + 1, that of Katharopoulos et al. (2020, https://arxiv.org/abs/2006.16236), whose code adds 1e-6.
    - "softmax": efficient attention (Shen et al., 2018, https://arxiv.org/abs/1812.01243), ``softmax(q) (softmax(k)^T
      v)``, of queries over features and of keys over tokens; there is no denominator.

    State and denominators are kept in float32 (float64 of float64).

    Args:
        q: queries (B, heads, Nq, D) or (heads, Nq, D), float16, bfloat16, float32 or float64, any strides: views of one
            packed projection and of feature maps are read where they lie. Empty tensors are fine, D is at least 1.
        k: keys (B, heads, Nk, D), in the dtype and on the device of q (under autocast all three are cast).
        v: values (B, heads, Nk, Dv).
        feature_map: "relu", "elu" or "softmax".
        eps: added to the denominators; None for the published one. Not for "softmax".
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Returns:
        (B, heads, Nq, Dv) in q's dtype, its axes in memory in q's order (from the definition: contiguous).

    Gradients are bit-equal from run to run. A second differentiation raises and names the backend that has it,
    "reference".

    Raises:
        ValueError: a shape, device or option that does not fit.
        TypeError: a dtype or type that does not fit.
        attnk.Unsupported: backend="triton" where the kernels cannot run.
    """
    eps = _check(q, k, v, feature_map, eps)
    chosen, _ = dispatch.choose("linear_attention", backend, q, unsupported, v)
    if autocast_is_on(q) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    without_batch = q.dim() == 3
    if without_batch:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    if watchers:
        attend_eps = None if feature_map == "softmax" else eps
        attend = functools.partial(linear_attention, feature_map=feature_map, eps=attend_eps)
        tell("linear_attention", q=q, k=k, attend=attend)
    if 0 in (*q.shape, *v.shape):  # of empty tensors the definition is as fast
        chosen = "reference"
    out = _run(q, k, v, feature_map, eps, chosen)
    return out.squeeze(0) if without_batch else out


def unsupported(q: torch.Tensor, v: torch.Tensor) -> str | None:
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
    *,
    feature_map: str = "relu",
    eps: float | None = None,
    backend: str | None = None,
) -> dispatch.Explanation:
    """What ``attnk.explain("linear_attention", ...)`` returns."""
    _check(q, k, v, feature_map, eps)
    chosen, reason = dispatch.choose("linear_attention", backend, q, unsupported, v, warn=False)
    config = None
    if chosen == "triton":
        from attnk.kernels.tuning import architecture, linear_attention_config

        head_dim = max(q.shape[-1], v.shape[-1])
        config = linear_attention_config(architecture(q.device), itemsize=q.element_size(), head_dim=head_dim)
    return dispatch.Explanation("linear_attention", chosen, reason, config)


def example(shape: list[int], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Three:
    """Tensors that ``explain`` takes, for q of this shape: q, k and v, heads inside tokens where channels are last."""
    q = torch.empty(shape, dtype=dtype, device=device)
    if channels_last:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    return q, q, q


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str, eps: float | None) -> float:
    """Raise where an argument does not fit; return eps, the published one for None."""
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
        if tensor.dim() != q.dim() or tensor.shape[:-2] != q.shape[:-2]:
            raise ValueError(f"{name} must have the batch and heads of q, {tuple(q.shape)}, got {tuple(tensor.shape)}")
    if q.shape[-1] == 0:
        raise ValueError(f"q must have a head dimension of at least 1, got {tuple(q.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have the head dimension of q, {q.shape[-1]}, got {tuple(k.shape)}")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v must have the tokens of k, {k.shape[-2]}, got {tuple(v.shape)}")
    return check_eps(feature_map, eps)


def check_eps(feature_map: str, eps: float | None) -> float:
    """Raise unless there is such a feature map and it takes such an eps; return eps, the published one for None."""
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    if eps is None:
        return PUBLISHED_EPS[feature_map]
    if feature_map == "softmax":
        raise ValueError(f"eps must be None with feature_map='softmax', which has no denominator, got {eps!r}")
    if not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number of at least 0, got {eps!r}")
    return float(eps)


def _run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str, eps: float, backend: str) -> torch.Tensor:
    if backend == "reference" or torch.jit.is_tracing():  # a trace would freeze sizes and buffers
        return linear_attention_reference(q, k, v, feature_map=feature_map, eps=eps)
    compiling = torch.compiler.is_compiling()
    if not compiling and not is_plain(q):
        announce_flops()
    transformed = not compiling and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if transformed or needs_grad:
        # one tensor in two places may lose a gradient
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
    if transformed or (compiling and needs_grad):
        return LinearAttentionTransformFunction.apply(q, k, v, feature_map, eps, backend)[0]
    if needs_grad:
        return LinearAttentionFunction.apply(q, k, v, feature_map, eps, backend)[0]
    forward = _forward if is_plain(q) else _forward_op
    return forward(q, k, v, feature_map, eps, backend)[0]


# Registration. The implementations receive real tensors and a settled backend.

_library = torch.library.Library("attnk", "FRAGMENT")
_library.define(
    "linear_attention_forward(Tensor q, Tensor k, Tensor v, str feature_map, float eps, str backend)"
    " -> (Tensor out, Tensor state, Tensor norm)"
)
_library.define(
    "linear_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor state, Tensor norm,"
    " str feature_map, float eps, bool needs_dq, bool needs_dkv, str backend) -> (Tensor dq, Tensor dk, Tensor dv)"
)


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return fallback
    from attnk.kernels import linear_attention as kernels

    return kernels


def _forward(q: torch.Tensor, *args: Any) -> Three:
    with torch.no_grad(), implementation_scope(q):
        return _implementation(args[-1]).linear_attention_forward(q, *args[:-1])


def _forward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str, eps: float, backend: str
) -> Three:
    batch, heads, n_queries, dim = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    norm = (batch, heads, 2 if feature_map == "softmax" else 1, dim)
    return (
        empty_in_order(q, (batch, heads, n_queries, v.shape[-1])),
        q.new_empty((batch, heads, dim, v.shape[-1]), dtype=dtype),
        q.new_empty((0,) if backend == "torch" and feature_map == "softmax" else norm, dtype=dtype),
    )


def _backward(dout: torch.Tensor, *args: Any) -> Three:
    with torch.no_grad(), implementation_scope(dout):
        return _implementation(args[-1]).linear_attention_backward(dout, *args[:-1])


def _backward_fake(
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
    backend: str,
) -> Three:
    return (
        empty_in_order(q, q.shape) if needs_dq else q.new_empty(0),
        empty_in_order(k, k.shape) if needs_dkv else k.new_empty(0),
        empty_in_order(v, v.shape) if needs_dkv else v.new_empty(0),
    )


for _name, _real, _fake in (
    ("linear_attention_forward", _forward, _forward_fake),
    ("linear_attention_backward", _backward, _backward_fake),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnk::{_name}", _fake, lib=_library)


_forward_op = torch.ops.attnk.linear_attention_forward.default
_backward_op = torch.ops.attnk.linear_attention_backward.default


def _forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of phi(k)^T v and of phi(q) by the state."""
    batch, heads, n_queries, dim = q_shape
    return 2 * batch * heads * (n_queries + k_shape[2]) * dim * v_shape[3]


def _backward_flops(*args: Any, **kwargs: Any) -> int:
    """FLOPs of dout by the state, and where keys and values have gradients, of the state's and of their own."""
    (batch, heads, n_queries, dim), (_, _, n_keys, v_dim) = args[1], args[3]
    needs_dkv = args[9]
    return 2 * batch * heads * dim * v_dim * (n_queries + needs_dkv * (n_queries + 2 * n_keys))


declare_flops(torch.ops.attnk.linear_attention_forward, _forward_flops)
declare_flops(torch.ops.attnk.linear_attention_backward, _backward_flops)


# Autograd. Two flavours of one Function: the plain one costs the least a call; torch.compile and torch.func need the
# other, whose context is set up apart from its forward.


def _save(ctx: Any, inputs: Sequence[Any], token: torch.Tensor, kept: Sequence[torch.Tensor]) -> None:
    q, k, v, *options = inputs
    ctx.save_for_backward(token, q, k, v, *kept)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    nothing = (None,) * 6
    if dout is None:
        return nothing
    needs_dq, needs_dk, needs_dv = needs = ctx.needs_input_grad[:3]
    token, *saved = ctx.saved_tensors
    *options, backend = ctx.options
    args = (dout, *saved, *options, needs_dq, needs_dk or needs_dv, backend)
    if is_plain(dout) and not torch.is_grad_enabled():
        grads = _backward(*args)
    elif torch.compiler.is_compiling():
        grads = _backward_op(*args)
    else:  # create_graph=True, torch.func, or somebody watching
        grads = LinearAttentionBackwardFunction.apply(*args, token)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *nothing[3:]


class LinearAttentionFunction(torch.autograd.Function):
    """The attention in plain eager mode.

    Besides the output there is a token without elements. A second derivative goes through it, and so fails in words.
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        forward = _forward if is_plain(q) else _forward_op
        out, *kept = forward(q, k, v, *options)
        token = q.new_empty(0)
        _save(ctx, (q, k, v, *options), token, kept)
        return out, token

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, *unused: Any) -> Any:
        return _gradients(ctx, dout)


class LinearAttentionTransformFunction(torch.autograd.Function):
    """The attention under torch.compile, torch.export and torch.func; what is kept are outputs there, and the token."""

    @staticmethod
    def forward(q: Any, k: Any, v: Any, *options: Any) -> tuple[torch.Tensor, ...]:
        return *_forward_op(q, k, v, *options), q.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        _, *kept, token = output
        ctx.mark_non_differentiable(*kept)
        _save(ctx, inputs, token, kept)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, *unused: Any) -> Any:
        return _gradients(ctx, dout)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        return fold_examples(LinearAttentionTransformFunction, info.batch_size, in_dims, args, range(3))


class LinearAttentionBackwardFunction(torch.autograd.Function):
    """The backward, itself a Function so that torch.func can map over it and a second backward fails in words.

    Behind the arguments of the backward it takes the token that links it to all inputs of the forward.
    """

    @staticmethod
    def forward(*args: Any) -> Three:
        return _backward_op(*args[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> Any:
        raise NotImplementedError(
            "attnk.linear_attention: the fused backward cannot be differentiated again; "
            "backend='reference' (or attnk.use_backend('reference')) can"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        return fold_examples(LinearAttentionBackwardFunction, info.batch_size, in_dims, args, range(6))


# Programs that were exported call the operation by itself, without the Functions above, and may be trained.


def _setup_raw(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward_raw(ctx: Any, dout: torch.Tensor, *unused: Any) -> Any:
    """Gradients of an operation called by itself, as exported programs call it; the forward runs once more."""
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in ctx.saved_tensors]
        out, _ = LinearAttentionFunction.apply(*leaves, *ctx.options)
    return *torch.autograd.grad(out, leaves, dout), *(None for _ in ctx.options)


torch.library.register_autograd(
    "attnk::linear_attention_forward", _backward_raw, setup_context=_setup_raw, lib=_library
)
