"""CBAM as an operation: checks, dispatch, torch.library, autograd with a deferred gradient, ``attnk.cbam``."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from attnk import dispatch
from attnk.fallback import cbam as fallback
from attnk.reference.cbam import cbam_reference
from attnk.reference.channel_gate import Mlp, gate_of

from ._batch_norm import fold_batch_norm
from ._calls import autocast_is_on, implementation_scope, is_plain
from ._checks import check_choice, check_feature_map
from ._deferred import placeholder
from ._flops import announce_flops, declare_flops
from ._vmap import each_example, fold_examples
from ._watch import tell, watchers
from .channel_gate import check_channel_gate
from .channel_gate import unsupported as channel_gate_unsupported
from .spatial_gate import MAX_KERNEL_SIZE, ORDERS, OUTPUTS, check_convolution

Tensors = tuple[torch.Tensor, ...]
Gate = str | Callable[[torch.Tensor], torch.Tensor]
Norm = Callable[[torch.Tensor], torch.Tensor]


def cbam(
    x: torch.Tensor,
    mlp: Mlp,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pool: str = "avg_max",
    gate: Gate = "sigmoid",
    norm: Norm | None = None,
    order: str = "avg_max",
    output: str = "gated",
    ties: str = "first",
    backend: str | None = None,
) -> torch.Tensor:
    """Weigh every channel by a gate computed from its pixels, then every pixel by one computed from what is left.

    ``y = x * gate(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))`` and then
    ``y * sigmoid(norm(conv2d(cat([y.mean(1), y.amax(1)]), weight, bias, padding=k // 2)))``: CBAM (Woo et al., 2018,
    https://arxiv.org/abs/1807.06521). y is never written, and nothing of x's size is kept for the backward but x.

    Args:
        x: feature map (B, C, H, W) or (C, H, W), float16, bfloat16, float32 or float64, any strides. Empty maps are
            fine, C is at least 1.
        mlp: a callable from (B, C) to (B, C), such as a module, or the weights (w1, b1, w2, b2) of two linear layers or
            1 x 1 convolutions with a ReLU between them, biases being tensors or None.
        weight: (1, 2, k, k) with k odd, on the device and in the dtype of x (under autocast, in any float dtype).
        bias: (1,) or None, like weight.
        pool: what the channel gate is computed from: "avg" ``mlp(avg)``, "max" ``mlp(max)``, "avg_max"
            ``mlp(avg) + mlp(max)`` (the default, as published), or "half_sum" ``mlp((avg + max) / 2)``.
        gate: what follows the mlp: "sigmoid", "hard_sigmoid" or a callable on (B, C).
        norm: a batch norm module between the spatial convolution and its sigmoid, or None. In evaluation mode it is
            folded into weight and bias. Any other callable on (B, 1, H, W) will do.
        order: which pooled map meets ``weight[:, 0]``: "avg_max" (the default) or "max_avg".
        output: "gated" gives x times both gates, "residual" that plus x itself, "map" the spatial gate, "logit" the
            spatial gate before its sigmoid.
        ties: which of equal maxima, of pixels and of channels, has the gradient: "first" as ``torch.max``, "even"
            shares it as ``torch.amax``. Channels are compared after their gate, rounded to x's dtype.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Returns:
        A tensor of x's dtype: of x's shape and memory format, or with one channel for "map" and "logit" (which under
        autocast have the autocast dtype, as a convolution's output has).

    Gradients reach x, weight, bias and everything that mlp, gate and norm hold, bit-equal from run to run. A second
    differentiation raises and names the backend that has it, "reference".

    Raises:
        ValueError: a shape, device or option that does not fit.
        TypeError: a dtype that does not fit.
        attnk.Unsupported: backend="triton" where the kernels cannot run.
    """
    _check(x, mlp, weight, bias, pool, gate, norm, order, output, ties)
    chosen, _ = dispatch.choose("cbam", backend, x, unsupported, weight)
    if x.dim() == 3:
        return _run(x.unsqueeze(0), mlp, weight, bias, pool, gate, norm, order, output, ties, chosen).squeeze(0)
    return _run(x, mlp, weight, bias, pool, gate, norm, order, output, ties, chosen)


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot run this call, or None when they can."""
    reason = channel_gate_unsupported(x)
    if reason is None and weight.shape[-1] > MAX_KERNEL_SIZE:
        reason = f"the kernels take a kernel size up to {MAX_KERNEL_SIZE}, got {weight.shape[-1]}"
    return reason


def explain(
    x: torch.Tensor,
    mlp: Mlp,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pool: str = "avg_max",
    gate: Gate = "sigmoid",
    norm: Norm | None = None,
    order: str = "avg_max",
    output: str = "gated",
    ties: str = "first",
    backend: str | None = None,
) -> dispatch.Explanation:
    """What ``attnk.explain("cbam", ...)`` returns."""
    _check(x, mlp, weight, bias, pool, gate, norm, order, output, ties)
    chosen, reason = dispatch.choose("cbam", backend, x, unsupported, weight, warn=False)
    config = None
    if chosen == "triton":
        from attnk.kernels.tuning import architecture, cbam_config

        config = cbam_config(
            architecture(x.device),
            itemsize=x.element_size(),
            pixels=x.shape[-2] * x.shape[-1],
            channels_last=_channels_last(x),
        )
    return dispatch.Explanation("cbam", chosen, reason, config)


def example(shape: list[int], dtype: torch.dtype, device: torch.device, channels_last: bool) -> tuple[Any, ...]:
    """What ``explain`` takes, for an input of this shape: x, a bottleneck's weights and a 7 x 7 weight."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    hidden = max(1, shape[-3] // 16)
    mlp = (x.new_empty(hidden, shape[-3]), None, x.new_empty(shape[-3], hidden), None)
    return x, mlp, x.new_empty(1, 2, 7, 7)


def _check(
    x: torch.Tensor,
    mlp: Mlp,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pool: str,
    gate: Gate,
    norm: Norm | None,
    order: str,
    output: str,
    ties: str,
) -> None:
    check_choice("order", order, ORDERS)
    check_choice("output", output, OUTPUTS)
    if norm is not None and not callable(norm):
        raise TypeError(f"norm must be a module, a callable or None, got {type(norm).__name__}")
    if isinstance(norm, _BatchNorm) and norm.num_features != 1:
        raise ValueError(f"norm must have one channel, that of the spatial logit, got {norm.num_features}")
    check_feature_map("x", x)
    check_channel_gate(x, mlp, pool, gate, ties)
    check_convolution(x, weight, bias)


def _channels_last(x: torch.Tensor) -> bool:
    return x.stride(-3) < x.stride(-1)


def _work_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _run(
    x: torch.Tensor,
    mlp: Mlp,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pool: str,
    gate: Gate,
    norm: Norm | None,
    order: str,
    output: str,
    ties: str,
    backend: str,
) -> torch.Tensor:
    if backend == "reference" or torch.jit.is_tracing():  # a trace would freeze sizes and buffers
        if watchers:
            gate, norm = _telling(gate, norm)
        return cbam_reference(
            x, mlp, weight, bias, pool=pool, gate=gate, norm=norm, order=order, output=output, ties=ties
        )
    compiling = torch.compiler.is_compiling()
    if not compiling and not is_plain(x):
        announce_flops()
    transformed = not compiling and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
    recording = torch.is_grad_enabled()
    if isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None:
        weight, bias = fold_batch_norm(weight, bias, norm)
        norm = None

    def call(eager: Any, transform: Any, *args: Any) -> torch.Tensor:
        """A Function in the flavour that the moment needs: its first output."""
        out: torch.Tensor = (transform if compiling or transformed else eager).apply(*args)[0]
        return out

    needs_max = pool != "avg"
    handles: tuple[torch.Tensor | None, ...] = (None,) * 4
    if transformed or (recording and x.requires_grad):
        pooling = CbamPoolTransformFunction if compiling or transformed else CbamPoolFunction
        avg, peak, _, *rest = pooling.apply(x, needs_max, output, ties, backend)
        handles = tuple(rest[:4])
    else:
        avg, peak, _ = _pool_op(x, needs_max, ties, False, backend)
    channel = gate_of(avg, peak if needs_max else None, mlp, pool, gate).to(x.dtype)
    if channel.shape != x.shape[:2]:
        raise ValueError(f"mlp must give a gate (B, C) = {tuple(x.shape[:2])}, got {tuple(channel.shape)}")

    tensors = [x, channel, weight, *([] if bias is None else [bias])]
    recorded = transformed or (recording and any(tensor.requires_grad for tensor in tensors))
    scaled = output in ("gated", "residual")
    dout_handle, gate_handle, spatial_handle, dmaps_handle = handles
    stage, stage_handles = output, handles
    if watchers:
        tell("channel_gate", gate=channel, part="channel_attention")
        if norm is None:
            infer_map = (x, channel, weight, bias, order, "map", ties, backend)
            tell("spatial_gate", gate=lambda: _infer_op(*infer_map), part="spatial_attention")
    if norm is not None:  # its batch statistics stand between the convolution and its sigmoid
        stage = "logit"
        stage_handles = (None, None if scaled else gate_handle, None, dmaps_handle)
    if recorded:
        options = (order, stage, ties, backend)
        out = call(CbamFunction, CbamTransformFunction, x, channel, weight, bias, *stage_handles, *options)
    else:
        infer = _infer if is_plain(x) else _infer_op
        out = infer(x, channel, weight, bias, order, stage, ties, backend)
    if norm is not None:
        out = norm(out)
        if output != "logit":
            out = torch.sigmoid(out)
        out = out.to(x.dtype)
        if watchers and output != "logit":
            tell("spatial_gate", gate=out, part="spatial_attention")
        if scaled:
            if recorded or (recording and out.requires_grad):
                scale_handles = (dout_handle, gate_handle, spatial_handle)
                return call(
                    CbamScaleFunction, CbamScaleTransformFunction, x, channel, out, *scale_handles, output, backend
                )
            scale = _scale if is_plain(x) else _scale_op
            return scale(x, channel, out, output, backend)
    if not scaled and x.dtype == torch.float32 and autocast_is_on(x):
        out = out.to(torch.get_autocast_dtype(x.device.type))
    return out


def _telling(gate: Gate, norm: Norm | None) -> tuple[Gate, Norm]:
    """Gate and norm for the definition, which tell of what they give."""

    def telling_gate(logit: torch.Tensor) -> torch.Tensor:
        out = gate_of(logit, None, lambda logit: logit, "avg", gate)
        tell("channel_gate", gate=out, part="channel_attention")
        return out

    def telling_norm(logit: torch.Tensor) -> torch.Tensor:
        logit = logit if norm is None else norm(logit)
        tell("spatial_gate", gate=torch.sigmoid(logit), part="spatial_attention")
        return logit

    return telling_gate, telling_norm


# Registration. The implementations receive real tensors and a settled backend.

_library = torch.library.Library("attnk", "FRAGMENT")
_library.define(
    "cbam_infer(Tensor x, Tensor gate, Tensor weight, Tensor? bias, str order, str output, str ties, str backend)"
    " -> Tensor"
)
_library.define(
    "cbam_forward(Tensor x, Tensor gate, Tensor weight, Tensor? bias, str order, str output, str ties, str backend)"
    " -> (Tensor out, Tensor spatial, Tensor maps, Tensor index)"
)
_library.define("cbam_scale(Tensor x, Tensor gate, Tensor spatial, str output, str backend) -> Tensor")
_library.define(
    "cbam_scale_backward(Tensor dout, Tensor x, Tensor gate, Tensor spatial, str backend)"
    " -> (Tensor dgate, Tensor dspatial)"
)
_library.define(
    "cbam_backward(Tensor dout, Tensor x, Tensor gate, Tensor weight, Tensor spatial, Tensor maps, Tensor index,"
    " str order, str output, str ties, bool needs_gates, bool needs_dweight, str backend)"
    " -> (Tensor dgate, Tensor dmaps, Tensor dweight, Tensor dbias)"
)
_library.define(
    "cbam_dx(Tensor? dout, Tensor gate, Tensor? spatial, Tensor? dmaps, Tensor? dpool_avg, Tensor? dpool_max,"
    " Tensor pool_index, Tensor? pool_max, Tensor? x, SymInt height, SymInt width, bool channels_last, str output,"
    " str ties, str backend) -> Tensor"
)


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return fallback
    from attnk.kernels import cbam as kernels

    return kernels


def _infer(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    order: str, output: str, ties: str, backend: str,
) -> torch.Tensor:  # fmt: skip
    """The output alone; ``ties`` is for the backward of exported programs."""
    if x.numel() == 0:
        return _infer_fake(x, gate, weight, bias, order, output, ties, backend)
    with torch.no_grad(), implementation_scope(x):
        return _implementation(backend).cbam_infer(x, gate, weight, bias, order, output)


def _infer_fake(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    order: str, output: str, ties: str, backend: str,
) -> torch.Tensor:  # fmt: skip
    if output in ("map", "logit"):
        return x.new_empty((x.shape[0], 1, x.shape[2], x.shape[3]))
    return _empty(x, x.shape, _channels_last(x))


def _empty(like: torch.Tensor, size: Any, channels_last: bool) -> torch.Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _forward(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    order: str, output: str, ties: str, backend: str,
) -> Tensors:  # fmt: skip
    if x.numel() == 0:
        return _forward_fake(x, gate, weight, bias, order, output, ties, backend)
    with torch.no_grad(), implementation_scope(x):
        return _implementation(backend).cbam_forward(x, gate, weight, bias, order, output, ties)


def _forward_fake(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    order: str, output: str, ties: str, backend: str,
) -> Tensors:  # fmt: skip
    batch, _, height, width = x.shape
    spatial, index = (x.new_empty((batch, 1, height, width), dtype=_work_dtype(x)) for _ in range(2))
    frame = weight.shape[-1] - 1
    shape = (batch, height + frame, width + frame, 2) if backend == "triton" else (batch, 2, height, width)
    maps = x.new_empty(shape, dtype=_work_dtype(x))
    return _infer_fake(x, gate, weight, bias, order, output, ties, backend), spatial, maps, index


def _scale(x: torch.Tensor, gate: torch.Tensor, spatial: torch.Tensor, output: str, backend: str) -> torch.Tensor:
    if x.numel() == 0:
        return _scale_fake(x, gate, spatial, output, backend)
    with torch.no_grad(), implementation_scope(x):
        return _implementation(backend).cbam_scale(x, gate, spatial, output)


def _scale_fake(x: torch.Tensor, gate: torch.Tensor, spatial: torch.Tensor, output: str, backend: str) -> torch.Tensor:
    return _empty(x, x.shape, _channels_last(x))


def _scale_backward(
    dout: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, spatial: torch.Tensor, backend: str
) -> Tensors:
    if x.numel() == 0:
        return torch.zeros_like(gate), torch.empty_like(spatial)
    with torch.no_grad(), implementation_scope(dout):
        return _implementation(backend).cbam_scale_backward(dout, x, gate, spatial)


def _scale_backward_fake(
    dout: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, spatial: torch.Tensor, backend: str
) -> Tensors:
    return gate.new_empty(gate.shape), spatial.new_empty(spatial.shape)


def _backward(
    dout: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor,
    spatial: torch.Tensor, maps: torch.Tensor, index: torch.Tensor,
    order: str, output: str, ties: str, needs_gates: bool, needs_dweight: bool, backend: str,
) -> Tensors:  # fmt: skip
    args = (dout, x, gate, weight, spatial, maps, index, order, output, ties, needs_gates, needs_dweight)
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in _backward_fake(*args, backend))
    with torch.no_grad(), implementation_scope(dout):
        return _implementation(backend).cbam_backward(*args)


def _backward_fake(
    dout: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor,
    spatial: torch.Tensor, maps: torch.Tensor, index: torch.Tensor,
    order: str, output: str, ties: str, needs_gates: bool, needs_dweight: bool, backend: str,
) -> Tensors:  # fmt: skip
    dgate, dmaps, dweight, dbias = gate.new_empty(0), spatial.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if needs_gates:
        batch, _, height, width = spatial.shape
        dgate, dmaps = gate.new_empty(gate.shape), spatial.new_empty((batch, 3, height, width))
    if needs_dweight:
        dweight, dbias = torch.empty_like(weight), weight.new_empty(1)
    return dgate, dmaps, dweight, dbias


def _dx(
    dout: torch.Tensor | None, gate: torch.Tensor, spatial: torch.Tensor | None, dmaps: torch.Tensor | None,
    dpool_avg: torch.Tensor | None, dpool_max: torch.Tensor | None,
    pool_index: torch.Tensor, pool_max: torch.Tensor | None, x: torch.Tensor | None,
    height: int, width: int, channels_last: bool, output: str, ties: str, backend: str,
) -> torch.Tensor:  # fmt: skip
    args = (
        dout, gate, spatial, dmaps, dpool_avg, dpool_max, pool_index, pool_max, x,
        height, width, channels_last, output, ties,
    )  # fmt: skip
    if gate.numel() * height * width == 0:
        return _dx_fake(*args, backend)
    with torch.no_grad(), implementation_scope(gate):
        return _implementation(backend).cbam_dx(*args)


def _dx_fake(
    dout: torch.Tensor | None, gate: torch.Tensor, spatial: torch.Tensor | None, dmaps: torch.Tensor | None,
    dpool_avg: torch.Tensor | None, dpool_max: torch.Tensor | None,
    pool_index: torch.Tensor, pool_max: torch.Tensor | None, x: torch.Tensor | None,
    height: int, width: int, channels_last: bool, output: str, ties: str, backend: str,
) -> torch.Tensor:  # fmt: skip
    return _empty(gate, (*gate.shape, height, width), channels_last)


for _name, _real, _fake in (
    ("cbam_infer", _infer, _infer_fake),
    ("cbam_forward", _forward, _forward_fake),
    ("cbam_scale", _scale, _scale_fake),
    ("cbam_scale_backward", _scale_backward, _scale_backward_fake),
    ("cbam_backward", _backward, _backward_fake),
    ("cbam_dx", _dx, _dx_fake),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnk::{_name}", _fake, lib=_library)


_pool_op = torch.ops.attnk.channel_gate_pool.default
_infer_op = torch.ops.attnk.cbam_infer.default
_forward_op = torch.ops.attnk.cbam_forward.default
_scale_op = torch.ops.attnk.cbam_scale.default
_scale_backward_op = torch.ops.attnk.cbam_scale_backward.default
_backward_op = torch.ops.attnk.cbam_backward.default
_dx_op = torch.ops.attnk.cbam_dx.default


def _forward_flops(x_shape: Any, gate_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the convolution, the one part that torch's counter counts in the definition."""
    batch, _, height, width = x_shape
    return 4 * weight_shape[-1] ** 2 * batch * height * width


def _backward_flops(*args: Any, **kwargs: Any) -> int:
    """As many for the gradients of the maps, and as many for that of the weight."""
    x_shape, gate_shape, weight_shape, (needs_gates, needs_dweight) = args[1], args[2], args[3], args[10:12]
    return (needs_gates + needs_dweight) * _forward_flops(x_shape, gate_shape, weight_shape)


declare_flops(torch.ops.attnk.cbam_infer, _forward_flops)
declare_flops(torch.ops.attnk.cbam_forward, _forward_flops)
declare_flops(torch.ops.attnk.cbam_backward, _backward_flops)


# Autograd. The channel pool's Function writes dx; the Functions behind it read x but return no gradient for it: they
# hand what dx is made of to the pool's, as the gradients of placeholders that it gave out. (They take x itself, not x
# detached: an exported program, where only the operations are left, then has x's ordinary gradient.) Without such
# handles they return the ordinary gradient, so where torch.vmap maps a gate or the weight but not x, and many examples
# would hand their parts to one x, of which each has a gradient of its own.


def _is_direct(tensor: torch.Tensor) -> bool:
    return is_plain(tensor) and not torch.is_grad_enabled()


def _once(
    op: Any, batched: tuple[int, ...], is_sum: Callable[[tuple, tuple], bool] = lambda in_dims, args: False
) -> Any:
    """A gradient as a Function, so that torch.func can map over it and differentiating it again fails in words.

    Args:
        op: the operation. The Function takes one more argument, a token that links it to the forward's inputs.
        batched: which arguments have a batch to fold the mapped dimension into.
        is_sum: whether the result is a sum over the batch, or folding impossible: then one example after another.
    """

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Tensors:
            outs = op(*args[:-1])
            return (outs,) if isinstance(outs, torch.Tensor) else outs

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *unused: Any) -> Any:
            raise NotImplementedError(
                "attnk.cbam: the fused backward cannot be differentiated again; "
                "backend='reference' (or attnk.use_backend('reference')) can"
            )

        @staticmethod
        def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
            if is_sum(in_dims, args):
                return each_example(Once, info.batch_size, in_dims, args)
            return fold_examples(Once, info.batch_size, in_dims, args, batched)

    return Once


CbamBackwardFunction = _once(_backward_op, (0, 1, 2, 4, 5, 6), lambda dims, args: dims[3] is not None or args[11])
CbamScaleBackwardFunction = _once(_scale_backward_op, (0, 1, 2, 3))
CbamDxFunction = _once(_dx_op, tuple(range(9)))


def _differentiate(direct: Any, op: Any, function: Any, like: torch.Tensor, args: tuple, token: torch.Tensor) -> Any:
    """A gradient, by the shortest way that the moment allows."""
    if _is_direct(like):
        return direct(*args)
    if torch.compiler.is_compiling():
        return op(*args)
    outs = function.apply(*args, token)  # create_graph=True, torch.func, or somebody watching
    return outs[0] if len(outs) == 1 else outs


def _own_dx(
    token: torch.Tensor, dout: torch.Tensor | None, x: torch.Tensor, gate: torch.Tensor, spatial: torch.Tensor,
    dmaps: torch.Tensor | None, output: str, ties: str, backend: str,
) -> torch.Tensor:  # fmt: skip
    """The gradient of x through one Function alone."""
    args = _dx_arguments(dout, x, gate, spatial, dmaps, output, ties, backend)
    dx: torch.Tensor = _differentiate(_dx, _dx_op, CbamDxFunction, gate, args, token)
    return dx


def _dx_arguments(
    dout: torch.Tensor | None, x: torch.Tensor, gate: torch.Tensor, spatial: torch.Tensor,
    dmaps: torch.Tensor | None, output: str, ties: str, backend: str,
) -> tuple:  # fmt: skip
    """What ``cbam_dx`` takes, but for the pools."""
    scaled = output in ("gated", "residual")
    return (
        dout if scaled else None, gate, spatial if scaled else None, dmaps, None, None, gate.new_empty(0), None,
        x if ties == "even" else None, x.shape[2], x.shape[3], _channels_last(x), output, ties, backend,
    )  # fmt: skip


def _unless_shared(in_dims: tuple, args: tuple, handles: slice) -> tuple[tuple, tuple]:
    """Arguments without their handles where those are not mapped."""
    if any(dim is not None for dim in in_dims[handles]):
        return in_dims, args
    kept = list(args)
    kept[handles] = [None] * len(args[handles])
    return in_dims, tuple(kept)


def _eager(transform: Any) -> Any:
    """The flavour of a Function that costs the least a call, for plain eager mode."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = transform.forward(*inputs)
            transform.setup_context(ctx, inputs, output)
            return output

        backward = transform.backward

    return Eager


class CbamPoolTransformFunction(torch.autograd.Function):
    """The channel gate's pool, and the whole of dx.

    Returns the mean, the maximum, its index, four handles (for dout, the channel gate, the spatial gate and dmaps) and
    a token without elements. A second derivative goes through the token, whatever the backward reads, and so fails in
    words instead of coming out zero.
    """

    @staticmethod
    def forward(x: Any, needs_max: bool, output: str, ties: str, backend: str) -> Tensors:
        batch, channels, height, width = x.shape
        dtype = _work_dtype(x)
        return (
            *_pool_op(x, needs_max, ties, True, backend),
            placeholder(x, x.shape),
            placeholder(x, (batch, channels)),
            placeholder(x, (batch, 1, height, width), dtype),
            placeholder(x, (batch, 3, height, width), dtype),
            x.new_empty(0),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        x, ctx.needs_max, *ctx.options = inputs
        peak, index, token = output[1], output[2], output[-1]
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        even = ctx.options[1] == "even"
        has_peak = even and ctx.needs_max
        ctx.save_for_backward(token, index, peak if has_peak else None, x if even else None)
        ctx.size, ctx.channels_last = x.shape, _channels_last(x)

    @staticmethod
    def backward(ctx: Any, davg: Any, dmax: Any, dindex: Any, dout: Any, gate: Any, spatial: Any, dmaps: Any,
                 *unused: Any) -> Any:  # fmt: skip
        given = next((grad for grad in (dout, gate, davg, dmax) if grad is not None), None)
        if given is None:
            return (None,) * 5
        token, index, peak, x = ctx.saved_tensors
        if gate is None:  # something else was made of the pooled vectors, and nothing of the gates
            gate = torch.zeros_like(given) if given.dim() == 2 else given.new_zeros(ctx.size[:2])
        output, ties, backend = ctx.options
        args = (
            dout, gate, spatial, dmaps, davg, dmax if ctx.needs_max else None, index, peak, x,
            ctx.size[2], ctx.size[3], ctx.channels_last, output, ties, backend,
        )  # fmt: skip
        return _differentiate(_dx, _dx_op, CbamDxFunction, gate, args, token), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        return fold_examples(CbamPoolTransformFunction, info.batch_size, in_dims, args, (0,))


class CbamTransformFunction(torch.autograd.Function):
    """The spatial half on x * gate, with the four handles behind its tensors; what is kept are outputs, and a token."""

    @staticmethod
    def forward(x: Any, gate: Any, weight: Any, bias: Any, *rest: Any) -> Tensors:
        forward = _forward if is_plain(x) else _forward_op
        return *forward(x, gate, weight, bias, *rest[4:]), x.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        x, gate, weight = inputs[:3]
        *kept, token = output[1:]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(token, x, gate, weight, *kept)
        ctx.defers = any(handle is not None for handle in inputs[4:8])
        ctx.options = inputs[8:]

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, *unused: Any) -> Any:
        if dout is None:
            return (None,) * 12
        token, x, gate, weight, spatial, maps, index = ctx.saved_tensors
        needs_dx, needs_dgate, needs_dweight, needs_dbias, *needs_handles = ctx.needs_input_grad[:8]
        needs_gates = needs_dx or needs_dgate
        order, output, ties, backend = ctx.options
        args = (
            dout, x, gate, weight, spatial, maps, index,
            order, output, ties, needs_gates, needs_dweight or needs_dbias, backend,
        )  # fmt: skip
        grads = _differentiate(_backward, _backward_op, CbamBackwardFunction, dout, args, token)
        scaled = output in ("gated", "residual")
        handed = (dout if scaled else None, gate, spatial if scaled else None, grads[1])
        dx = None
        if needs_dx and not ctx.defers:
            dx = _own_dx(token, dout, x, gate, spatial, grads[1], output, ties, backend)
        return (
            dx, grads[0] if needs_dgate else None, grads[2] if needs_dweight else None,
            grads[3] if needs_dbias else None,
            *(grad if needed else None for grad, needed in zip(handed, needs_handles, strict=True)), *(None,) * 4,
        )  # fmt: skip

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        in_dims, args = _unless_shared(in_dims, args, slice(4, 8))
        if in_dims[2] is not None or in_dims[3] is not None:
            return each_example(CbamTransformFunction, info.batch_size, in_dims, args)
        return fold_examples(CbamTransformFunction, info.batch_size, in_dims, args, (0, 1, 4, 5, 6, 7))


class CbamScaleTransformFunction(torch.autograd.Function):
    """x times both gates, where a norm stood before the spatial one; takes the handles for dout and both gates."""

    @staticmethod
    def forward(x: Any, gate: Any, spatial: Any, *rest: Any) -> Tensors:
        scale = _scale if is_plain(x) else _scale_op
        return scale(x, gate, spatial, *rest[3:]), x.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(output[1], *inputs[:3])
        ctx.set_materialize_grads(False)
        ctx.defers = any(handle is not None for handle in inputs[3:6])
        ctx.options = inputs[6:]

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, *unused: Any) -> Any:
        if dout is None:
            return (None,) * 8
        token, x, gate, spatial = ctx.saved_tensors
        output, backend = ctx.options
        args = (dout, x, gate, spatial, backend)
        dgate, dspatial = _differentiate(
            _scale_backward, _scale_backward_op, CbamScaleBackwardFunction, dout, args, token
        )
        needs_dx, needs_dgate, needs_dspatial, *needs_handles = ctx.needs_input_grad[:6]
        spatial = spatial.to(_work_dtype(x))
        handed = (dout, gate, spatial)
        dx = None
        if needs_dx and not ctx.defers:
            dx = _own_dx(token, dout, x, gate, spatial, None, output, "first", backend)
        return (
            dx, dgate if needs_dgate else None, dspatial if needs_dspatial else None,
            *(grad if needed else None for grad, needed in zip(handed, needs_handles, strict=True)), None, None,
        )  # fmt: skip

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        in_dims, args = _unless_shared(in_dims, args, slice(3, 6))
        return fold_examples(CbamScaleTransformFunction, info.batch_size, in_dims, args, tuple(range(6)))


CbamPoolFunction = _eager(CbamPoolTransformFunction)
CbamFunction = _eager(CbamTransformFunction)
CbamScaleFunction = _eager(CbamScaleTransformFunction)


# Programs that were exported call the operations by themselves, without the Functions above, and may be trained.


def _setup_raw(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _backward_raw(ctx: Any, dout: torch.Tensor, *unused: Any) -> Any:
    """Gradients of an operation called by itself; the forward runs once more."""
    x, gate, weight, bias = ctx.saved_tensors
    order, output, ties, backend = ctx.options
    _, *kept = _forward_op(x, gate, weight, bias, *ctx.options)
    args = (dout, x, gate, weight, *kept, order, output, ties, True, True, backend)
    dgate, dmaps, dweight, dbias = _backward_op(*args)
    dx = _dx_op(*_dx_arguments(dout, x, gate, kept[0], dmaps, output, ties, backend))
    return dx, dgate, dweight, None if bias is None else dbias, None, None, None, None


def _setup_scale_raw(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _scale_backward_raw(ctx: Any, dout: torch.Tensor) -> Any:
    x, gate, spatial = ctx.saved_tensors
    output, backend = ctx.options
    dgate, dspatial = _scale_backward_op(dout, x, gate, spatial, backend)
    dx = _dx_op(*_dx_arguments(dout, x, gate, spatial.to(_work_dtype(x)), None, output, "first", backend))
    return dx, dgate, dspatial, None, None


for _name in ("cbam_infer", "cbam_forward"):
    torch.library.register_autograd(f"attnk::{_name}", _backward_raw, setup_context=_setup_raw, lib=_library)
torch.library.register_autograd("attnk::cbam_scale", _scale_backward_raw, setup_context=_setup_scale_raw, lib=_library)
