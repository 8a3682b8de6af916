"""The coordinate gate as an operation: ``attnk.coordinate_pool`` and ``attnk.coordinate_gate``, and one gradient."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from attnk import dispatch
from attnk.fallback import coordinate_gate as fallback
from attnk.reference.coordinate_gate import coordinate_gate_reference, coordinate_pool_reference

from ._calls import implementation_scope, is_plain
from ._checks import check_feature_map, check_parameter
from ._deferred import Deferred, may_defer, placeholder, version
from ._vmap import fold_examples
from ._watch import tell, watchers

Pair = tuple[torch.Tensor, torch.Tensor]
Maybe = torch.Tensor | None


@dataclass(eq=False, kw_only=True, frozen=True)
class CoordinatePooled(Deferred):
    """What ``attnk.coordinate_pool`` returns, for ``attnk.coordinate_gate`` to take.

    Attributes:
        x: the map as given, (B, C, H, W) or (C, H, W).
        height: (B, C, H, 1) in the dtype of x, the mean over the width; (C, H, 1) without a batch.
        width: (B, C, 1, W) in the dtype of x, the mean over the height; (C, 1, W) without a batch.
    """

    height: torch.Tensor
    width: torch.Tensor


def coordinate_pool(x: torch.Tensor, *, backend: str | None = None) -> CoordinatePooled:
    """Average a feature map over its width and over its height, both in one pass over it.

    The first half of coordinate attention (Hou et al., 2021, https://arxiv.org/abs/2103.02907). What it returns is to
    be given to ``attnk.coordinate_gate``: the two then write the gradient of x once, together.

    Args:
        x: feature map (B, C, H, W) or (C, H, W), float16, bfloat16, float32 or float64, any strides. Empty maps are
            fine, C is at least 1.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Returns:
        A ``CoordinatePooled``: ``height`` (B, C, H, 1), the mean over the width, and ``width`` (B, C, 1, W), the mean
        over the height, in x's dtype and memory format; and ``x``.

    Gradients reach x, bit-equal from run to run. A second differentiation raises and names the backend that has it,
    "reference".

    Raises:
        ValueError: a shape or option that does not fit.
        TypeError: a dtype that does not fit.
        attnk.Unsupported: backend="triton" where the kernels cannot run.
    """
    check_feature_map("x", x)
    chosen, _ = dispatch.choose("coordinate_gate", backend, x, unsupported)
    if x.dim() == 4:
        height, width, *handles = _pool_and_handles(x, chosen)
    else:
        height, width, *handles = _pool_and_handles(x.unsqueeze(0), chosen)
        height, width = height.squeeze(0), width.squeeze(0)
    return CoordinatePooled(
        x=x, height=height, width=width, _handles=[tuple(handles)] if handles else [], _version=version(x)
    )


def coordinate_gate(
    x: torch.Tensor | CoordinatePooled,
    gate_h: torch.Tensor,
    gate_w: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Weigh every pixel by a gate of its row and one of its column, in every channel: ``x * gate_w * gate_h``.

    The second half of coordinate attention (Hou et al., 2021, https://arxiv.org/abs/2103.02907).

    Args:
        x: feature map (B, C, H, W) or (C, H, W), float16, bfloat16, float32 or float64, any strides; or what
            ``attnk.coordinate_pool`` returned, with which the gradient of the map is written once instead of twice.
            That holds for the first call it is given to; others are as right and write it again.
        gate_h: (B, C, H, 1), without a batch (C, H, 1), on the device and in the dtype of x (under autocast, in any
            float dtype).
        gate_w: (B, C, 1, W) or (C, 1, W), like gate_h.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Returns:
        A tensor of x's shape, dtype and memory format.

    Gradients reach x and both gates, bit-equal from run to run. A second differentiation raises and names the backend
    that has it, "reference".

    Raises:
        ValueError: a shape, device or option that does not fit.
        TypeError: a dtype that does not fit.
        attnk.Unsupported: backend="triton" where the kernels cannot run.
    """
    pooled = x if isinstance(x, CoordinatePooled) else None
    x = x.x if isinstance(x, CoordinatePooled) else x
    _check(x, gate_h, gate_w)
    chosen, _ = dispatch.choose("coordinate_gate", backend, x, unsupported)
    if watchers:
        tell("coordinate_gate", gate_h=gate_h, gate_w=gate_w)
    if x.dim() == 4:
        return _gate(x, gate_h, gate_w, pooled, chosen)
    return _gate(x.unsqueeze(0), gate_h.unsqueeze(0), gate_w.unsqueeze(0), pooled, chosen).squeeze(0)


def unsupported(x: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot run this call, or None when they can."""
    return dispatch.no_kernel_here(x)


def explain(
    x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor, *, backend: str | None = None
) -> dispatch.Explanation:
    """What ``attnk.explain("coordinate_gate", ...)`` returns."""
    _check(x, gate_h, gate_w)
    chosen, reason = dispatch.choose("coordinate_gate", backend, x, unsupported, warn=False)
    config = None
    if chosen == "triton":
        from attnk.kernels.tuning import architecture, coordinate_gate_config

        config = coordinate_gate_config(
            architecture(x.device), itemsize=x.element_size(), channels_last=_channels_last(x)
        )
    return dispatch.Explanation("coordinate_gate", chosen, reason, config)


def example(
    shape: list[int], dtype: torch.dtype, device: torch.device, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tensors that ``explain`` takes, for an input of this shape: x and both gates."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return x, torch.empty_like(x[..., :1]), torch.empty_like(x[..., :1, :])


def _check(x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor) -> None:
    check_feature_map("x", x)
    for name, gate, shape, words in (
        ("gate_h", gate_h, (*x.shape[:-1], 1), "(B, C, H, 1)"),
        ("gate_w", gate_w, (*x.shape[:-2], 1, x.shape[-1]), "(B, C, 1, W)"),
    ):
        check_parameter(name, gate, x)
        if gate.shape != shape:
            raise ValueError(f"{name} must be {words[:1] + words[4:] if x.dim() == 3 else words} of x, "
                             f"{tuple(shape)}, got {tuple(gate.shape)}")  # fmt: skip


def _channels_last(x: torch.Tensor) -> bool:
    return x.stride(-3) < x.stride(-1)


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _pool_and_handles(x: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
    """Both means, and the handles where the gradient of x may be deferred."""
    if backend == "reference" or torch.jit.is_tracing():  # a trace would freeze sizes and buffers
        return coordinate_pool_reference(x)
    needs_grad = may_defer() and x.requires_grad
    if _transformed() or (torch.compiler.is_compiling() and needs_grad):
        return CoordinatePoolTransformFunction.apply(x, backend)
    if needs_grad:
        return CoordinatePoolFunction.apply(x, backend)
    pool = _pool if is_plain(x) else _pool_op
    return pool(x, backend)


def _gate(
    x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor, pooled: CoordinatePooled | None, backend: str
) -> torch.Tensor:
    if backend == "reference" or torch.jit.is_tracing():
        return coordinate_gate_reference(x, gate_h, gate_w)
    transformed, compiling = _transformed(), torch.compiler.is_compiling()
    tensors = (x, gate_h, gate_w)
    needs_grad = may_defer() and any(tensor.requires_grad for tensor in tensors)
    if transformed or needs_grad:
        handles = None if pooled is None else pooled.take_handles(gate_h, gate_w)
        args: tuple = (*tensors, None, None, None, None, backend)
        if handles is not None:
            args = (x.detach(), gate_h, gate_w, *handles, backend)
        if transformed or compiling:
            return CoordinateGateTransformFunction.apply(*args)[0]
        return CoordinateGateFunction.apply(*args)
    forward = _forward if is_plain(x) else _forward_op
    return forward(*tensors, backend)


# Registration. The implementations receive real tensors and a settled backend.

_library = torch.library.Library("attnk", "FRAGMENT")
_library.define("coordinate_gate_pool(Tensor x, str backend) -> (Tensor height, Tensor width)")
_library.define("coordinate_gate_forward(Tensor x, Tensor gate_h, Tensor gate_w, str backend) -> Tensor")
_library.define(
    "coordinate_gate_backward(Tensor dout, Tensor x, Tensor gate_h, Tensor gate_w, str backend)"
    " -> (Tensor dgate_h, Tensor dgate_w)"
)
_library.define(
    "coordinate_gate_dx(Tensor? dout, Tensor? gate_h, Tensor? gate_w, Tensor? dheight, Tensor? dwidth,"
    " SymInt height, SymInt width, bool channels_last, str backend) -> Tensor"
)


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return fallback
    from attnk.kernels import coordinate_gate as kernels

    return kernels


def _empty(like: torch.Tensor, shape: tuple[int, ...], channels_last: bool) -> torch.Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _pool(x: torch.Tensor, backend: str) -> Pair:
    if x.numel() == 0:
        height, width = _pool_fake(x, backend)
        return height.zero_(), width.zero_()
    with torch.no_grad(), implementation_scope(x):
        return _implementation(backend).coordinate_gate_pool(x)


def _pool_fake(x: torch.Tensor, backend: str) -> Pair:
    batch, channels, height, width = x.shape
    last = _channels_last(x)
    return _empty(x, (batch, channels, height, 1), last), _empty(x, (batch, channels, 1, width), last)


def _forward(x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor, backend: str) -> torch.Tensor:
    if x.numel() == 0:
        return _forward_fake(x, gate_h, gate_w, backend)
    with torch.no_grad(), implementation_scope(x):
        return _implementation(backend).coordinate_gate_forward(x, gate_h, gate_w)


def _forward_fake(x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor, backend: str) -> torch.Tensor:
    return _empty(x, x.shape, _channels_last(x))


def _backward(dout: torch.Tensor, x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor, backend: str) -> Pair:
    if x.numel() == 0:
        return torch.zeros_like(gate_h), torch.zeros_like(gate_w)
    with torch.no_grad(), implementation_scope(x):
        return _implementation(backend).coordinate_gate_backward(dout, x, gate_h, gate_w)


def _backward_fake(
    dout: torch.Tensor, x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor, backend: str
) -> Pair:
    return torch.empty_like(gate_h), torch.empty_like(gate_w)


def _dx(
    dout: Maybe, gate_h: Maybe, gate_w: Maybe, dheight: Maybe, dwidth: Maybe,
    height: int, width: int, channels_last: bool, backend: str,
) -> torch.Tensor:  # fmt: skip
    args = (dout, gate_h, gate_w, dheight, dwidth, height, width, channels_last)
    like = _given(dout, dheight, dwidth)
    if like.shape[0] * height * width == 0:
        return _dx_fake(*args, backend)
    with torch.no_grad(), implementation_scope(like):
        return _implementation(backend).coordinate_gate_dx(*args)


def _dx_fake(
    dout: Maybe, gate_h: Maybe, gate_w: Maybe, dheight: Maybe, dwidth: Maybe,
    height: int, width: int, channels_last: bool, backend: str,
) -> torch.Tensor:  # fmt: skip
    like = _given(dout, dheight, dwidth)
    return _empty(like, (like.shape[0], like.shape[1], height, width), channels_last)


def _given(*tensors: Maybe) -> torch.Tensor:
    """The first that is there."""
    return next(tensor for tensor in tensors if tensor is not None)


for _name, _real, _fake in (
    ("coordinate_gate_pool", _pool, _pool_fake),
    ("coordinate_gate_forward", _forward, _forward_fake),
    ("coordinate_gate_backward", _backward, _backward_fake),
    ("coordinate_gate_dx", _dx, _dx_fake),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnk::{_name}", _fake, lib=_library)

_pool_op = torch.ops.attnk.coordinate_gate_pool.default
_forward_op = torch.ops.attnk.coordinate_gate_forward.default
_backward_op = torch.ops.attnk.coordinate_gate_backward.default
_dx_op = torch.ops.attnk.coordinate_gate_dx.default


# Autograd. Two flavours of each Function: the plain one costs the least a call; torch.compile and torch.func need the
# other, whose context is set up apart from its forward. The pooling's handles are placeholders of x, of gate_h and of
# gate_w; a token without elements comes along, through which a second derivative knows of x and so fails in words.


def _dgates_of(dout: torch.Tensor, x: Any, gate_h: Any, gate_w: Any, backend: str, token: Maybe) -> Pair:
    args = (dout, x, gate_h, gate_w, backend)
    if is_plain(dout) and not torch.is_grad_enabled():
        return _backward(*args)
    if torch.compiler.is_compiling():
        return _backward_op(*args)
    return CoordinateGateBackwardFunction.apply(*args, token)  # create_graph=True, torch.func, or somebody watching


def _dx_of(dout: Maybe, gate_h: Maybe, gate_w: Maybe, dheight: Maybe, dwidth: Maybe, *options: Any) -> torch.Tensor:
    args = (dout, gate_h, gate_w, dheight, dwidth, *options)
    if is_plain(_given(dout, dheight, dwidth)) and not torch.is_grad_enabled():
        return _dx(*args)
    if torch.compiler.is_compiling():
        return _dx_op(*args)
    return CoordinateGateDxFunction.apply(*args)[0]


def _pooled_and_handles(x: torch.Tensor, pooled: Pair) -> tuple[torch.Tensor, ...]:
    height, width = pooled
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (
        height, width,
        placeholder(x, x.shape), placeholder(x, height.shape, dtype), placeholder(x, width.shape, dtype),
        x.new_empty(0),
    )  # fmt: skip


def _remember_map(ctx: Any, x: torch.Tensor, backend: str) -> None:
    ctx.options = (x.shape[2], x.shape[3], _channels_last(x), backend)
    ctx.set_materialize_grads(False)


def _pool_gradient(ctx: Any, dheight: Maybe, dwidth: Maybe, dout: Maybe, gate_h: Maybe, gate_w: Maybe) -> Maybe:
    if not ctx.needs_input_grad[0] or (dheight is None and dwidth is None and dout is None):
        return None
    return _dx_of(dout, gate_h, gate_w, dheight, dwidth, *ctx.options)


class CoordinatePoolFunction(torch.autograd.Function):
    """The pooling in plain eager mode, and the handles."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, backend: str) -> Any:
        _remember_map(ctx, x, backend)
        return _pooled_and_handles(x, (_pool if is_plain(x) else _pool_op)(x, backend))

    @staticmethod
    def backward(ctx: Any, dheight: Maybe, dwidth: Maybe, dout: Maybe, gate_h: Maybe, gate_w: Maybe, _: Any) -> Any:
        return _pool_gradient(ctx, dheight, dwidth, dout, gate_h, gate_w), None


class CoordinatePoolTransformFunction(torch.autograd.Function):
    """The pooling under torch.compile and torch.func."""

    @staticmethod
    def forward(x: torch.Tensor, backend: str) -> Any:
        return _pooled_and_handles(x, _pool_op(x, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        _remember_map(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, dheight: Maybe, dwidth: Maybe, dout: Maybe, gate_h: Maybe, gate_w: Maybe, _: Any) -> Any:
        return _pool_gradient(ctx, dheight, dwidth, dout, gate_h, gate_w), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        return fold_examples(CoordinatePoolTransformFunction, info.batch_size, in_dims, args, (0,))


def _remember_gate(ctx: Any, x: Any, gate_h: Any, gate_w: Any, handle: Any, token: Any, backend: str) -> None:
    # as many with the handles as without them, which a recomputation under checkpointing may have lost
    ctx.save_for_backward(x, gate_h, gate_w, x.new_empty(0) if token is None else token)
    ctx.deferred = handle is not None
    ctx.channels_last, ctx.backend = _channels_last(x), backend
    ctx.set_materialize_grads(False)


def _gate_gradients(ctx: Any, dout: Maybe) -> tuple:
    """Gradients of x, both gates and the handles: raw ones for the pooling to work with, where it has its handles."""
    if dout is None:
        return (None,) * 8
    x, gate_h, gate_w, token = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dgate_h = dgate_w = dx = None
    if needs[1] or needs[2]:
        dgates = _dgates_of(dout, x, gate_h, gate_w, ctx.backend, token)
        dgate_h, dgate_w = (dgate if needed else None for dgate, needed in zip(dgates, needs[1:3], strict=True))
    if ctx.deferred:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return None, dgate_h, dgate_w, dout, gate_h.to(dtype), gate_w.to(dtype), None, None
    if needs[0]:
        dx = _dx_of(dout, gate_h, gate_w, None, None, x.shape[2], x.shape[3], ctx.channels_last, ctx.backend)
    return dx, dgate_h, dgate_w, None, None, None, None, None


class CoordinateGateFunction(torch.autograd.Function):
    """The gate in plain eager mode: x, the gates, the handles and the token or None for each, the backend.

    With the handles x comes detached.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, gate_h: Any, gate_w: Any, handle: Any, handle_h: Any, handle_w: Any, token: Any,
                backend: str) -> torch.Tensor:  # fmt: skip
        _remember_gate(ctx, x, gate_h, gate_w, handle, token, backend)
        return (_forward if is_plain(x) else _forward_op)(x, gate_h, gate_w, backend)

    @staticmethod
    def backward(ctx: Any, dout: Maybe) -> Any:
        return _gate_gradients(ctx, dout)


class CoordinateGateTransformFunction(torch.autograd.Function):
    """The gate under torch.compile, torch.export and torch.func."""

    @staticmethod
    def forward(x: Any, gate_h: Any, gate_w: Any, handle: Any, handle_h: Any, handle_w: Any, token: Any,
                backend: str) -> tuple[torch.Tensor]:  # fmt: skip
        return (_forward_op(x, gate_h, gate_w, backend),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        x, gate_h, gate_w, handle, _, _, token, backend = inputs
        _remember_gate(ctx, x, gate_h, gate_w, handle, token, backend)

    @staticmethod
    def backward(ctx: Any, dout: Maybe) -> Any:
        return _gate_gradients(ctx, dout)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        return fold_examples(CoordinateGateTransformFunction, info.batch_size, in_dims, args, range(6))


def _no_second_derivative() -> NotImplementedError:
    return NotImplementedError(
        "attnk.coordinate_gate: the fused backward cannot be differentiated again; "
        "backend='reference' (or attnk.use_backend('reference')) can"
    )


class CoordinateGateBackwardFunction(torch.autograd.Function):
    """The gradients of the gates, themselves a Function so that torch.func can map over it and a second backward fails.

    Behind the arguments of the backward it takes the token that links it to the map.
    """

    @staticmethod
    def forward(*args: Any) -> Pair:
        return _backward_op(*args[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> Any:
        raise _no_second_derivative()

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        return fold_examples(CoordinateGateBackwardFunction, info.batch_size, in_dims, args, range(4))


class CoordinateGateDxFunction(torch.autograd.Function):
    """The gradient of the map, likewise."""

    @staticmethod
    def forward(*args: Any) -> tuple[torch.Tensor]:
        return (_dx_op(*args),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> Any:
        raise _no_second_derivative()

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        return fold_examples(CoordinateGateDxFunction, info.batch_size, in_dims, args, range(5))


# Programs that were exported call the operations by themselves, without the Functions above, and may be trained.


def _setup_raw_pool(ctx: Any, inputs: tuple, output: Any) -> None:
    _remember_map(ctx, *inputs)


def _backward_raw_pool(ctx: Any, dheight: Maybe, dwidth: Maybe) -> Any:
    if dheight is None and dwidth is None:
        return None, None
    return _dx_op(None, None, None, dheight, dwidth, *ctx.options), None


def _setup_raw_forward(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward_raw_forward(ctx: Any, dout: torch.Tensor) -> Any:
    x, gate_h, gate_w = ctx.saved_tensors
    dx = _dx_op(dout, gate_h, gate_w, None, None, x.shape[2], x.shape[3], _channels_last(x), ctx.backend)
    return dx, *_backward_op(dout, x, gate_h, gate_w, ctx.backend), None


torch.library.register_autograd(
    "attnk::coordinate_gate_pool", _backward_raw_pool, setup_context=_setup_raw_pool, lib=_library
)
torch.library.register_autograd(
    "attnk::coordinate_gate_forward", _backward_raw_forward, setup_context=_setup_raw_forward, lib=_library
)
