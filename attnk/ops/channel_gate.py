"""The channel gate as an operation: checks, dispatch, torch.library, autograd, and its public functions.

``channel_gate`` is ``channel_pool``, a small network in PyTorch, and ``scale``; the gradient of x is deferred from the
scaling to the pooling (``attnk.ops._deferred``), which writes it once.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from attnk import dispatch
from attnk.fallback import channel_gate as fallback
from attnk.reference.channel_gate import channel_gate_reference, channel_pool_reference, gate_of, scale_reference

from ._calls import implementation_scope, is_plain
from ._checks import FLOAT_DTYPES, check_choice, check_parameter
from ._deferred import Pooled, may_defer, placeholder, version
from ._vmap import fold_examples
from ._watch import tell, watchers

POOLS = ("avg", "max", "avg_max")
GATE_POOLS = (*POOLS, "half_sum")
GATES = ("sigmoid", "hard_sigmoid")
TIES = ("first", "even")
MAX_PIXELS = 2**30  # positions are 32 bits wide in the kernels, and go a few steps beyond the last

Mlp = Callable[[torch.Tensor], torch.Tensor] | Sequence[torch.Tensor | None]
Gate = str | Callable[[torch.Tensor], torch.Tensor]
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def channel_gate(
    x: torch.Tensor,
    mlp: Mlp,
    *,
    pool: str = "avg",
    gate: Gate = "sigmoid",
    ties: str = "first",
    backend: str | None = None,
) -> torch.Tensor:
    """Weigh every channel by a gate that a small network computes from what is pooled over the pixels.

    ``gate = sigmoid(mlp(x.mean((2, 3))))``: squeeze and excitation (Hu et al., 2018, https://arxiv.org/abs/1709.01507);
    with ``pool="avg_max"`` the channel half of CBAM (Woo et al., 2018, https://arxiv.org/abs/1807.06521).

    Args:
        x: feature map (B, C, H, W), (C, H, W) or (B, C, D, H, W), float16, bfloat16, float32 or float64, any strides.
            Empty maps are fine, C is at least 1.
        mlp: a callable that takes (B, C), B being 1 for (C, H, W), and returns as many; or the weights (w1, b1, w2, b2)
            of two linear layers, or convolutions of size 1, with a ReLU between: w1 (hidden, C), w2 (C, hidden), biases
            may be None.
        pool: "avg" gives ``mlp(avg)``, "max" ``mlp(max)``, "avg_max" ``mlp(avg) + mlp(max)``, "half_sum"
            ``mlp((avg + max) / 2)`` (timm's light channel attention).
        gate: what makes a gate of that: "sigmoid", "hard_sigmoid" (``relu6(z + 3) / 6``), or a callable.
        ties: which of equal maxima has the gradient: "first" as ``torch.max``, "even" shares it as ``torch.amax``.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Returns:
        ``x * gate``, of the shape, dtype and memory format of x.

    Gradients reach x and whatever the network has, bit-equal from run to run. A second differentiation raises and
    names the backend that has it, "reference".

    Raises:
        ValueError: a shape, device or option that does not fit.
        TypeError: a dtype that does not fit.
        attnk.Unsupported: backend="triton" where the kernels cannot run.
    """
    check_channel_gate(x, mlp, pool, gate, ties)
    chosen, _ = dispatch.choose("channel_gate", backend, x, unsupported)
    if _is_reference(chosen) and not watchers:
        return _without_batch(x, lambda x: channel_gate_reference(x, mlp, pool=pool, gate=gate, ties=ties))
    pooled = _pool(x, {"half_sum": "avg_max"}.get(pool, pool), ties, chosen)
    return _scale(pooled, gate_of(pooled.avg, pooled.max, mlp, pool, gate), chosen)


def channel_pool(x: torch.Tensor, pool: str = "avg_max", *, ties: str = "first", backend: str | None = None) -> Pooled:
    """The mean, the maximum or both of every channel over its pixels, for ``attnk.scale`` to take.

    Between the two stands any network: ``attnk.scale(pooled, network(pooled.avg, pooled.max))`` is ``x * gate``, and in
    the backward the gradient of x is written once, at the end, instead of once by the scaling and once by the pooling.

    Args:
        x, ties, backend: as in ``attnk.channel_gate``.
        pool: "avg", "max" or "avg_max".

    Returns:
        ``Pooled``, with ``x`` as given, and ``avg`` and ``max`` (B, C) in its dtype (B is 1 for a map without batch),
        or None where not asked for. An empty map has zeros.

    Raises:
        ValueError, TypeError, attnk.Unsupported: as ``attnk.channel_gate``.
    """
    check_choice("pool", pool, POOLS)
    check_choice("ties", ties, TIES)
    _check_map(x)
    chosen, _ = dispatch.choose("channel_gate", backend, x, unsupported)
    return _pool(x, pool, ties, chosen)


def scale(x: torch.Tensor | Pooled, gate: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """``x * gate``, one number a channel.

    Args:
        x: a map, or what ``attnk.channel_pool`` made of one: then the first call that takes it leaves the gradient of x
            to the pooling. A second one, or a map that was changed in place since, has the ordinary gradient; under
            torch.compile nobody sees such a change, and it must not happen.
        gate: (B, C), or (B, C, 1, 1) with any number of ones, on the device and in the dtype of x (under autocast, in
            any float dtype). B is 1 or missing for a map without batch.
        backend: as in ``attnk.channel_gate``.

    Returns:
        A tensor of x's shape, dtype and memory format.

    Raises:
        ValueError, TypeError, attnk.Unsupported: as ``attnk.channel_gate``.
    """
    given = x.x if isinstance(x, Pooled) else x
    _check_map(given)
    chosen, _ = dispatch.choose("channel_gate", backend, given, unsupported)
    return _scale(x, gate, chosen)


def unsupported(x: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot run this call, or None when they can."""
    reason = dispatch.no_kernel_here(x)
    # while compiling, sizes may be symbols, and asking would settle them
    if reason is None and not torch.compiler.is_compiling() and _pixels(x) >= MAX_PIXELS:
        reason = f"the kernels take less than {MAX_PIXELS} pixels"
    return reason


def explain(
    x: torch.Tensor,
    mlp: Mlp | None = None,
    *,
    pool: str = "avg",
    gate: Gate = "sigmoid",
    ties: str = "first",
    backend: str | None = None,
) -> dispatch.Explanation:
    """What ``attnk.explain("channel_gate", x, ...)`` returns; the network does not matter and may be left out."""
    check_channel_gate(x, torch.nn.Identity() if mlp is None else mlp, pool, gate, ties)
    chosen, reason = dispatch.choose("channel_gate", backend, x, unsupported, warn=False)
    config = None
    if chosen == "triton":
        from attnk.kernels.tuning import architecture, channel_gate_config

        shaped = _as_map(x)
        config = channel_gate_config(
            architecture(x.device),
            itemsize=x.element_size(),
            pixels=_pixels(x),
            channels_last=_channels_last(shaped),
        )
    return dispatch.Explanation("channel_gate", chosen, reason, config)


def example(shape: list[int], dtype: torch.dtype, device: torch.device, channels_last: bool) -> tuple[torch.Tensor]:
    """Tensors that ``explain`` takes, for an input of this shape."""
    x = torch.empty(shape, dtype=dtype, device=device)
    return (x.to(memory_format=torch.channels_last) if channels_last else x,)


def check_channel_gate(x: torch.Tensor, mlp: Mlp, pool: str, gate: Gate, ties: str) -> None:
    """Raise unless these are arguments of ``attnk.channel_gate``."""
    check_choice("pool", pool, GATE_POOLS)
    check_choice("ties", ties, TIES)
    if not callable(gate):
        check_choice("gate", gate, GATES)
    _check_map(x)
    if callable(mlp):
        return
    if not isinstance(mlp, Sequence):
        raise TypeError(f"mlp must be a callable or (w1, b1, w2, b2), got {type(mlp).__name__}")
    if len(mlp) != 4:
        raise ValueError(f"mlp must be a callable or (w1, b1, w2, b2), got a sequence of {len(mlp)}")
    channels = x.shape[-3 if x.dim() == 3 else 1]
    hidden = mlp[0].shape[0] if isinstance(mlp[0], torch.Tensor) and mlp[0].dim() else 0
    shapes = {"w1": (hidden, channels), "b1": (hidden,), "w2": (channels, hidden), "b2": (channels,)}
    for (name, shape), parameter in zip(shapes.items(), mlp, strict=True):
        if parameter is None and name.startswith("b"):
            continue
        check_parameter(name, parameter, x)  # type: ignore[arg-type]
        if not _is_shape(parameter, shape):  # type: ignore[arg-type]
            raise ValueError(f"{name} must be {shape} or that with trailing ones, got {tuple(parameter.shape)}")  # type: ignore[union-attr]


def _check_map(x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() not in (3, 4, 5):
        raise ValueError(
            f"x must be (B, C, H, W), (C, H, W) or (B, C, D, H, W), got {x.dim()} dimensions: {tuple(x.shape)}"
        )
    if x.shape[0 if x.dim() == 3 else 1] == 0:
        raise ValueError(f"x must have at least one channel, got {tuple(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")


def _is_shape(tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has a shape, but for ones behind it."""
    return tensor.shape[: len(shape)] == shape and all(size == 1 for size in tensor.shape[len(shape) :])


def _pixels(x: torch.Tensor) -> int:
    return x.shape[1 if x.dim() == 3 else 2 :].numel()


def _as_map(x: torch.Tensor) -> torch.Tensor:
    """A (B, C, height, width) view; only the set of pixels matters here, so depth is more height."""
    return x.unsqueeze(0) if x.dim() == 3 else x.flatten(2, 3) if x.dim() == 5 else x


def _like(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Undoes ``_as_map``."""
    return out.squeeze(0) if x.dim() == 3 else out.view(x.shape) if x.dim() == 5 else out


def _as_vectors(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gate as (B, C), checked."""
    check_parameter("gate", gate, x)
    shape = (1, x.shape[0]) if x.dim() == 3 else tuple(x.shape[:2])
    if not _is_shape(gate, shape) and not (x.dim() == 3 and _is_shape(gate, shape[1:])):
        raise ValueError(f"gate must be {shape} or that with trailing ones, got {tuple(gate.shape)}")
    return gate if gate.shape == shape else gate.reshape(shape)


def _channels_last(x: torch.Tensor) -> bool:
    return x.stride(1) < x.stride(3)


def _is_reference(backend: str) -> bool:
    return backend == "reference" or torch.jit.is_tracing()  # a trace would freeze sizes and buffers


def _without_batch(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return function(x.unsqueeze(0)).squeeze(0) if x.dim() == 3 else function(x)


def _is_transformed() -> bool:
    compiling = torch.compiler.is_compiling()
    return not compiling and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def _pool(x: torch.Tensor, pool: str, ties: str, backend: str) -> Pooled:
    needs_max, handles = pool != "avg", None
    if _is_reference(backend):
        avg, peak = channel_pool_reference(x.unsqueeze(0) if x.dim() == 3 else x, ties=ties)
    else:
        shaped, transformed = _as_map(x), _is_transformed()
        if (transformed or x.requires_grad) and may_defer():
            plain = not (transformed or torch.compiler.is_compiling())
            function = ChannelPoolFunction if plain else ChannelPoolTransformFunction
            avg, peak, _, *handles, _ = function.apply(shaped, needs_max, ties, backend)
        else:
            avg, peak, _ = (_pool_real if is_plain(x) else _pool_op)(shaped, needs_max, ties, False, backend)
    return Pooled(
        x=x,
        avg=None if pool == "max" else avg,
        max=peak if needs_max else None,
        _handles=[] if handles is None else [tuple(handles)],
        _version=0 if handles is None else version(x),
    )


def _scale(pooled: torch.Tensor | Pooled, gate: torch.Tensor, backend: str) -> torch.Tensor:
    x, handles = pooled, None
    if isinstance(pooled, Pooled):
        x = pooled.x
    assert isinstance(x, torch.Tensor)
    gate = _as_vectors(gate, x)
    if watchers:
        tell("channel_gate", gate=gate)
    if _is_reference(backend):
        return _without_batch(x, lambda x: scale_reference(x, gate))
    if isinstance(pooled, Pooled):
        handles = pooled.take_handles(gate)
    shaped, transformed = _as_map(x), _is_transformed()
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad)
    if (transformed or needs_grad) and may_defer():
        plain = not (transformed or torch.compiler.is_compiling())
        function = ChannelScaleFunction if plain else ChannelScaleTransformFunction
        if handles is None:
            out, _ = function.apply(shaped, gate, None, None, backend)
        else:
            out, _ = function.apply(shaped.detach(), gate, *handles, backend)
    else:
        out = (_scale_real if is_plain(x) else _scale_op)(shaped, gate, backend)
    return _like(out, x)


# Registration. The implementations receive real tensors and a settled backend.

_library = torch.library.Library("attnk", "FRAGMENT")
_library.define(
    "channel_gate_pool(Tensor x, bool needs_max, str ties, bool keep, str backend)"
    " -> (Tensor avg, Tensor max, Tensor index)"
)
_library.define("channel_gate_scale(Tensor x, Tensor gate, str backend) -> Tensor")
_library.define("channel_gate_dgate(Tensor dout, Tensor x, str backend) -> Tensor")
_library.define(
    "channel_gate_dx(Tensor? dout, Tensor? gate, Tensor? davg, Tensor? dmax, Tensor? x, Tensor? max, Tensor index,"
    " SymInt height, SymInt width, bool channels_last, str ties, str backend) -> Tensor"
)


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return fallback
    from attnk.kernels import channel_gate as kernels

    return kernels


def _work_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pool_real(x: torch.Tensor, needs_max: bool, ties: str, keep: bool, backend: str) -> Three:
    """Means and maxima over the pixels, and whatever tells the backward where the maxima are."""
    if x.numel() == 0:
        avg, peak, index = _pool_fake(x, needs_max, ties, keep, backend)
        return avg.zero_(), peak.zero_(), index.zero_()
    with torch.no_grad(), implementation_scope(x):
        return _implementation(backend).channel_gate_pool(x, needs_max, ties, keep)


def _pool_fake(x: torch.Tensor, needs_max: bool, ties: str, keep: bool, backend: str) -> Three:
    shape = x.shape[:2]
    index_dtype = torch.int32 if backend == "triton" else torch.int64
    index = x.new_empty(shape if needs_max and keep else (0,), dtype=index_dtype)
    return x.new_empty(shape), x.new_empty(shape if needs_max else (0,)), index


def _scale_real(x: torch.Tensor, gate: torch.Tensor, backend: str) -> torch.Tensor:
    """x * gate in the dtype of x."""
    if x.numel() == 0:
        return _scale_fake(x, gate, backend)
    with torch.no_grad(), implementation_scope(x):
        return _implementation(backend).channel_gate_forward(x, gate)


def _scale_fake(x: torch.Tensor, gate: torch.Tensor, backend: str) -> torch.Tensor:
    memory_format = torch.channels_last if _channels_last(x) else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _dgate_real(dout: torch.Tensor, x: torch.Tensor, backend: str) -> torch.Tensor:
    """The gradient of the gate, float32, or float64 for float64 input."""
    if x.numel() == 0:
        return _dgate_fake(dout, x, backend).zero_()
    with torch.no_grad(), implementation_scope(x):
        return _implementation(backend).channel_gate_backward(dout, x)


def _dgate_fake(dout: torch.Tensor, x: torch.Tensor, backend: str) -> torch.Tensor:
    return x.new_empty(x.shape[:2], dtype=_work_dtype(x))


def _dx_real(
    dout: torch.Tensor | None,
    gate: torch.Tensor | None,
    davg: torch.Tensor | None,
    dmax: torch.Tensor | None,
    x: torch.Tensor | None,
    peak: torch.Tensor | None,
    index: torch.Tensor,
    height: int,
    width: int,
    channels_last: bool,
    ties: str,
    backend: str,
) -> torch.Tensor:
    """The gradient of x."""
    args = (dout, gate, davg, dmax, x, peak, index, height, width, channels_last, ties)
    like = next(grad for grad in (dout, davg, dmax) if grad is not None)
    if like.numel() * height * width == 0:
        return _dx_fake(*args, backend)
    with torch.no_grad(), implementation_scope(like):
        return _implementation(backend).channel_gate_dx(*args)


def _dx_fake(
    dout: torch.Tensor | None,
    gate: torch.Tensor | None,
    davg: torch.Tensor | None,
    dmax: torch.Tensor | None,
    x: torch.Tensor | None,
    peak: torch.Tensor | None,
    index: torch.Tensor,
    height: int,
    width: int,
    channels_last: bool,
    ties: str,
    backend: str,
) -> torch.Tensor:
    like = next(grad for grad in (dout, davg, dmax) if grad is not None)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (*like.shape[:2], height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


for _name, _real, _fake in (
    ("channel_gate_pool", _pool_real, _pool_fake),
    ("channel_gate_scale", _scale_real, _scale_fake),
    ("channel_gate_dgate", _dgate_real, _dgate_fake),
    ("channel_gate_dx", _dx_real, _dx_fake),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnk::{_name}", _fake, lib=_library)


_pool_op = torch.ops.attnk.channel_gate_pool.default
_scale_op = torch.ops.attnk.channel_gate_scale.default
_dgate_op = torch.ops.attnk.channel_gate_dgate.default
_dx_op = torch.ops.attnk.channel_gate_dx.default


# Autograd. Two flavours of each Function: the plain one costs the least a call; torch.compile and torch.func need the
# other, whose context is set up apart from its forward. Every one has a token without elements among its outputs; a
# second derivative goes through it, whatever the backward reads, and so fails in words instead of coming out zero.


def _runs_plainly(tensor: torch.Tensor) -> bool:
    return is_plain(tensor) and not torch.is_grad_enabled()


def _pool_outputs(forward: Callable[..., Three], x: torch.Tensor, needs_max: bool, ties: str, backend: str) -> tuple:
    handles = placeholder(x, x.shape), placeholder(x, x.shape[:2], _work_dtype(x))
    return *forward(x, needs_max, ties, True, backend), *handles, x.new_empty(0)


def _keep_pool(ctx: Any, x: torch.Tensor, output: tuple, needs_max: bool, ties: str, backend: str) -> None:
    _, peak, index, *_, token = output
    rereads = needs_max and ties == "even"
    ctx.mark_non_differentiable(index)
    ctx.needs_max = needs_max
    ctx.save_for_backward(token, x if rereads else None, peak if rereads else None, index)
    ctx.options = (x.shape[2], x.shape[3], _channels_last(x), ties, backend)
    ctx.set_materialize_grads(False)


def _pool_gradients(ctx: Any, davg: Any, dmax: Any, dout: Any, gate: Any) -> tuple[torch.Tensor | None, ...]:
    if not ctx.needs_max:
        dmax = None  # torch.compile hands an empty one
    grads = [grad for grad in (dout, davg, dmax) if grad is not None]
    if not grads:
        return (None,) * 4
    token, *kept = ctx.saved_tensors
    args = (dout, gate, davg, dmax, *kept, *ctx.options)
    if _runs_plainly(grads[0]):
        dx = _dx_real(*args)
    elif torch.compiler.is_compiling():
        dx = _dx_op(*args)
    else:  # create_graph=True, torch.func, or somebody watching
        (dx,) = ChannelDxFunction.apply(*args, token)
    return dx, None, None, None


class ChannelPoolFunction(torch.autograd.Function):
    """The pooling in plain eager mode. Returns avg, max, index, the handles (of x, of its gate) and the token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *options: Any) -> tuple[torch.Tensor, ...]:
        output = _pool_outputs(_pool_real if is_plain(x) else _pool_op, x, *options)
        _keep_pool(ctx, x, output, *options)
        return output

    @staticmethod
    def backward(ctx: Any, davg: Any, dmax: Any, _: Any, dout: Any, gate: Any, *unused: Any) -> Any:
        return _pool_gradients(ctx, davg, dmax, dout, gate)


class ChannelPoolTransformFunction(torch.autograd.Function):
    """The pooling under torch.compile and torch.func."""

    @staticmethod
    def forward(x: torch.Tensor, *options: Any) -> tuple[torch.Tensor, ...]:
        return _pool_outputs(_pool_op, x, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        _keep_pool(ctx, inputs[0], output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, davg: Any, dmax: Any, _: Any, dout: Any, gate: Any, *unused: Any) -> Any:
        return _pool_gradients(ctx, davg, dmax, dout, gate)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        return fold_examples(ChannelPoolTransformFunction, info.batch_size, in_dims, args, (0,))


def _scale_gradients(ctx: Any, dout: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    needs_dx, needs_dgate, needs_handle, *_ = ctx.needs_input_grad
    token, x, gate = ctx.saved_tensors
    plain, compiling = _runs_plainly(dout), torch.compiler.is_compiling()
    dx = dgate = None
    if needs_dgate:
        if plain:
            dgate = _dgate_real(dout, x, ctx.backend)
        elif compiling:
            dgate = _dgate_op(dout, x, ctx.backend)
        else:
            (dgate,) = ChannelDgateFunction.apply(dout, x, ctx.backend, token)
        dgate = dgate.to(gate.dtype)
    if needs_dx:
        args = (dout, gate, None, None, None, None, token, *ctx.sizes, "first", ctx.backend)
        if plain:
            dx = _dx_real(*args)
        elif compiling:
            dx = _dx_op(*args)
        else:
            (dx,) = ChannelDxFunction.apply(*args, token)
    if needs_handle:
        return dx, dgate, dout, gate.to(_work_dtype(x)), None
    return dx, dgate, None, None, None


def _keep_scale(ctx: Any, x: torch.Tensor, gate: torch.Tensor, token: torch.Tensor, backend: str) -> None:
    ctx.save_for_backward(token, x, gate)
    ctx.sizes, ctx.backend = (x.shape[2], x.shape[3], _channels_last(x)), backend
    ctx.set_materialize_grads(False)


class ChannelScaleFunction(torch.autograd.Function):
    """The scaling in plain eager mode: of x, or of x detached and with the handles of its pooling."""

    @staticmethod
    def forward(ctx: Any, x: Any, gate: Any, x_handle: Any, gate_handle: Any, backend: str) -> Any:
        out, token = (_scale_real if is_plain(x) else _scale_op)(x, gate, backend), x.new_empty(0)
        _keep_scale(ctx, x, gate, token, backend)
        return out, token

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, *unused: Any) -> Any:
        return _scale_gradients(ctx, dout)


class ChannelScaleTransformFunction(torch.autograd.Function):
    """The scaling under torch.compile and torch.func."""

    @staticmethod
    def forward(x: Any, gate: Any, x_handle: Any, gate_handle: Any, backend: str) -> Any:
        return _scale_op(x, gate, backend), x.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        _keep_scale(ctx, inputs[0], inputs[1], output[1], inputs[4])

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, *unused: Any) -> Any:
        return _scale_gradients(ctx, dout)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        return fold_examples(ChannelScaleTransformFunction, info.batch_size, in_dims, args, (0, 1, 2, 3))


class _BackwardFunction(torch.autograd.Function):
    """A backward, itself a Function so that torch.func can map over it and a second backward fails in words.

    Behind the arguments of the operation it takes the token that links it to all inputs of the forward.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> Any:
        raise NotImplementedError(
            "attnk.channel_gate: the fused backward cannot be differentiated again; "
            "backend='reference' (or attnk.use_backend('reference')) can"
        )


class ChannelDgateFunction(_BackwardFunction):
    """The gradient of the gate."""

    @staticmethod
    def forward(*args: Any) -> tuple[torch.Tensor]:
        return (_dgate_op(*args[:-1]),)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        return fold_examples(ChannelDgateFunction, info.batch_size, in_dims, args, (0, 1))


class ChannelDxFunction(_BackwardFunction):
    """The gradient of x."""

    @staticmethod
    def forward(*args: Any) -> tuple[torch.Tensor]:
        return (_dx_op(*args[:-1]),)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        return fold_examples(ChannelDxFunction, info.batch_size, in_dims, args, range(7))


# Programs that were exported call the operations by themselves, without the Functions above, and may be trained.


def _setup_raw_pool(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.options = inputs[1:]


def _backward_raw_pool(ctx: Any, davg: torch.Tensor, dmax: torch.Tensor, _: Any) -> Any:
    (x,) = ctx.saved_tensors
    needs_max, ties, _, backend = ctx.options
    _, peak, index = _pool_op(x, needs_max, ties, True, backend)
    sizes = (x.shape[2], x.shape[3], _channels_last(x))
    dx = _dx_op(None, None, davg, dmax if needs_max else None, x, peak, index, *sizes, ties, backend)
    return dx, None, None, None, None


def _setup_raw_scale(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.backend = inputs[2]


def _backward_raw_scale(ctx: Any, dout: torch.Tensor) -> Any:
    x, gate = ctx.saved_tensors
    sizes = (x.shape[2], x.shape[3], _channels_last(x))
    dx = _dx_op(dout, gate, None, None, None, None, gate.new_empty(0), *sizes, "first", ctx.backend)
    return dx, _dgate_op(dout, x, ctx.backend).to(gate.dtype), None


torch.library.register_autograd(
    "attnk::channel_gate_pool", _backward_raw_pool, setup_context=_setup_raw_pool, lib=_library
)
torch.library.register_autograd(
    "attnk::channel_gate_scale", _backward_raw_scale, setup_context=_setup_raw_scale, lib=_library
)
