"""The spatial gate as an operation: checks, dispatch, torch.library, autograd, ``attnk.spatial_gate``."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from attnk import dispatch
from attnk.fallback import spatial_gate as fallback
from attnk.reference.spatial_gate import spatial_gate_reference

from ._calls import autocast_is_on, implementation_scope, is_plain
from ._checks import check_choice, check_feature_map, check_parameter
from ._flops import announce_flops, declare_flops
from ._vmap import each_example, fold_examples
from ._watch import tell, watchers

ORDERS = ("avg_max", "max_avg")
OUTPUTS = ("gated", "map", "residual", "logit")
TIES = ("first", "even")
MAX_KERNEL_SIZE = 15  # the widest convolution row the kernels hold in registers

Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def spatial_gate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    order: str = "avg_max",
    output: str = "gated",
    ties: str = "first",
    backend: str | None = None,
) -> torch.Tensor:
    """Weigh every pixel by a gate computed from the mean and the maximum over its channels.

    ``gate = sigmoid(conv2d(cat([x.mean(1), x.amax(1)]), weight, bias, padding=k // 2))``: the spatial half of CBAM
    (Woo et al., 2018, https://arxiv.org/abs/1807.06521).

    Args:
        x: feature map (B, C, H, W) or (C, H, W), float16, bfloat16, float32 or float64, any strides. Empty maps are
            fine, C is at least 1.
        weight: (1, 2, k, k) with k odd, on the device and in the dtype of x (under autocast, in any float dtype).
        bias: (1,) or None, like weight.
        order: which pooled map meets ``weight[:, 0]``: "avg_max" (the default) or "max_avg".
        output: "gated" gives ``x * gate``, "residual" ``x * gate + x``, "map" the gate, "logit" the gate before its
            sigmoid.
        ties: which of equal maxima has the gradient: "first" as ``torch.max``, "even" shares it as ``torch.amax``.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Returns:
        A tensor of x's dtype: of x's shape and memory format, or with one channel for "map" and "logit" (which under
        autocast have the autocast dtype, as a convolution's output has).

    Gradients reach x, weight and bias, bit-equal from run to run. A second differentiation raises and names the
    backend that has it, "reference".

    Raises:
        ValueError: a shape, device or option that does not fit.
        TypeError: a dtype that does not fit.
        attnk.Unsupported: backend="triton" where the kernels cannot run.
    """
    _check(x, weight, bias, order, output, ties)
    chosen, _ = dispatch.choose("spatial_gate", backend, x, unsupported, weight)
    if watchers and output != "logit":
        tell("spatial_gate", gate=lambda: spatial_gate(x, weight, bias, order=order, output="map", backend=backend))
    if x.dim() == 3:
        return _run(x.unsqueeze(0), weight, bias, order, output, ties, chosen).squeeze(0)
    return _run(x, weight, bias, order, output, ties, chosen)


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot run this call, or None when they can."""
    reason = dispatch.no_kernel_here(x)
    if reason is None and weight.shape[-1] > MAX_KERNEL_SIZE:
        reason = f"the kernels take a kernel size up to {MAX_KERNEL_SIZE}, got {weight.shape[-1]}"
    return reason


def explain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    order: str = "avg_max",
    output: str = "gated",
    ties: str = "first",
    backend: str | None = None,
) -> dispatch.Explanation:
    """What ``attnk.explain("spatial_gate", ...)`` returns."""
    _check(x, weight, bias, order, output, ties)
    chosen, reason = dispatch.choose("spatial_gate", backend, x, unsupported, weight, warn=False)
    config = None
    if chosen == "triton":
        from attnk.kernels.tuning import architecture, spatial_gate_config

        config = spatial_gate_config(
            architecture(x.device),
            itemsize=x.element_size(),
            pixels=x.shape[-2] * x.shape[-1],
            channels_last=_channels_last(x),
        )
    return dispatch.Explanation("spatial_gate", chosen, reason, config)


def example(
    shape: list[int], dtype: torch.dtype, device: torch.device, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors that ``explain`` takes, for an input of this shape: x and a 7 x 7 weight."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return x, torch.empty(1, 2, 7, 7, dtype=dtype, device=device)


def _check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, order: str, output: str, ties: str
) -> None:
    check_choice("order", order, ORDERS)
    check_choice("output", output, OUTPUTS)
    check_choice("ties", ties, TIES)
    check_feature_map("x", x)
    check_convolution(x, weight, bias)


def check_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise unless weight and bias are those of a spatial gate's convolution."""
    check_parameter("weight", weight, x)
    shape = weight.shape
    if len(shape) != 4 or shape[:2] != (1, 2) or shape[2] != shape[3] or shape[2] % 2 == 0:
        raise ValueError(f"weight must be (1, 2, k, k) with k odd, got {tuple(shape)}")
    if bias is not None:
        check_parameter("bias", bias, x)
        if bias.shape != (1,):
            raise ValueError(f"bias must be (1,), got {tuple(bias.shape)}")


def _channels_last(x: torch.Tensor) -> bool:
    return x.stride(-3) < x.stride(-1)


def _run(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, order: str, output: str, ties: str, backend: str
) -> torch.Tensor:
    if backend == "reference" or torch.jit.is_tracing():  # a trace would freeze sizes and buffers
        return spatial_gate_reference(x, weight, bias, order=order, output=output, ties=ties)
    compiling = torch.compiler.is_compiling()
    if not compiling and not is_plain(x):
        announce_flops()
    transformed = not compiling and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if transformed or (compiling and needs_grad):
        out = SpatialGateTransformFunction.apply(x, weight, bias, order, output, ties, backend)[0]
    elif needs_grad:
        out, _ = SpatialGateFunction.apply(x, weight, bias, order, output, ties, backend)
    else:
        infer = _infer if is_plain(x) else _infer_op
        out = infer(x, weight, bias, order, output, ties, backend)
    if output in ("map", "logit") and x.dtype == torch.float32 and autocast_is_on(x):
        out = out.to(torch.get_autocast_dtype(x.device.type))
    return out


# Registration. The implementations receive real tensors and a settled backend.

_library = torch.library.Library("attnk", "FRAGMENT")
_library.define(
    "spatial_gate_infer(Tensor x, Tensor weight, Tensor? bias, str order, str output, str ties, str backend) -> Tensor"
)
_library.define(
    "spatial_gate_forward(Tensor x, Tensor weight, Tensor? bias, str order, str output, str ties, str backend)"
    " -> (Tensor out, Tensor gate, Tensor maps, Tensor index)"
)
_library.define(
    "spatial_gate_backward(Tensor dout, Tensor? x, Tensor weight, Tensor gate, Tensor maps, Tensor index,"
    " SymInt channels, bool channels_last, str order, str output, str ties, bool needs_dx, bool needs_dweight,"
    " str backend) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return fallback
    from attnk.kernels import spatial_gate as kernels

    return kernels


def _infer(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, order: str, output: str, ties: str, backend: str
) -> torch.Tensor:
    """The output alone; ``ties`` is for the backward of exported programs."""
    if x.numel() == 0:
        return _infer_fake(x, weight, bias, order, output, ties, backend)
    with torch.no_grad(), implementation_scope(x):
        return _implementation(backend).spatial_gate_infer(x, weight, bias, order, output)


def _infer_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, order: str, output: str, ties: str, backend: str
) -> torch.Tensor:
    if output in ("map", "logit"):
        return x.new_empty((x.shape[0], 1, x.shape[2], x.shape[3]))
    memory_format = torch.channels_last if _channels_last(x) else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    order: str,
    output: str,
    ties: str,
    backend: str,
) -> Kept:
    if x.numel() == 0:
        return _forward_fake(x, weight, bias, order, output, ties, backend)
    with torch.no_grad(), implementation_scope(x):
        return _implementation(backend).spatial_gate_forward(x, weight, bias, order, output, ties)


def _forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    order: str,
    output: str,
    ties: str,
    backend: str,
) -> Kept:
    batch, _, height, width = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gate = x.new_empty((batch, 1, height, width), dtype=dtype)
    if backend == "triton":
        frame = weight.shape[-1] - 1
        maps = x.new_empty((batch, height + frame, width + frame, 2), dtype=dtype)
        has_index = output in ("map", "logit") and ties == "first"
        index = x.new_empty(gate.shape if has_index else (0,), dtype=torch.int32)
    else:
        maps = x.new_empty((batch, 2, height, width), dtype=dtype)
        index = x.new_empty(gate.shape if ties == "first" else (0,), dtype=torch.int64)
    return _infer_fake(x, weight, bias, order, output, ties, backend), gate, maps, index


def _backward(
    dout: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    gate: torch.Tensor,
    maps: torch.Tensor,
    index: torch.Tensor,
    channels: int,
    channels_last: bool,
    order: str,
    output: str,
    ties: str,
    needs_dx: bool,
    needs_dweight: bool,
    backend: str,
) -> Gradients:
    options = (channels, channels_last, order, output, ties, needs_dx, needs_dweight)
    if gate.numel() == 0:
        dx, dweight, dbias = _backward_fake(dout, x, weight, gate, maps, index, *options, backend)
        return dx, dweight.zero_(), dbias.zero_()
    with torch.no_grad(), implementation_scope(dout):
        return _implementation(backend).spatial_gate_backward(dout, x, weight, gate, maps, index, *options)


def _backward_fake(
    dout: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    gate: torch.Tensor,
    maps: torch.Tensor,
    index: torch.Tensor,
    channels: int,
    channels_last: bool,
    order: str,
    output: str,
    ties: str,
    needs_dx: bool,
    needs_dweight: bool,
    backend: str,
) -> Gradients:
    dx = dout.new_empty(0)
    if needs_dx:
        batch, _, height, width = gate.shape
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        shape = (batch, channels, height, width)
        dx = torch.empty(shape, dtype=dout.dtype, device=dout.device, memory_format=memory_format)
    if needs_dweight:
        return dx, torch.empty_like(weight), weight.new_empty(1)
    return dx, weight.new_empty(0), weight.new_empty(0)


for _name, _real, _fake in (
    ("spatial_gate_infer", _infer, _infer_fake),
    ("spatial_gate_forward", _forward, _forward_fake),
    ("spatial_gate_backward", _backward, _backward_fake),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnk::{_name}", _fake, lib=_library)


_infer_op = torch.ops.attnk.spatial_gate_infer.default
_forward_op = torch.ops.attnk.spatial_gate_forward.default
_backward_op = torch.ops.attnk.spatial_gate_backward.default


def _forward_flops(x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the convolution, the one part that torch's counter counts in the definition."""
    batch, _, height, width = x_shape
    return 4 * weight_shape[-1] ** 2 * batch * height * width


def _backward_flops(*args: Any, **kwargs: Any) -> int:
    """As many for the gradients of the maps, and as many for that of the weight."""
    weight_shape, gate_shape, (needs_dx, needs_dweight) = args[2], args[3], args[11:13]
    return (needs_dx + needs_dweight) * _forward_flops(gate_shape, weight_shape)


declare_flops(torch.ops.attnk.spatial_gate_infer, _forward_flops)
declare_flops(torch.ops.attnk.spatial_gate_forward, _forward_flops)
declare_flops(torch.ops.attnk.spatial_gate_backward, _backward_flops)


# Autograd. Two flavours of one Function: the plain one costs the least a call; torch.compile and torch.func need the
# other, whose context is set up apart from its forward.


def _save(ctx: Any, inputs: Sequence[Any], token: torch.Tensor, kept: Sequence[torch.Tensor], options: tuple) -> None:
    x, weight, _ = inputs
    _, output, ties, _ = options
    reads_x = output in ("gated", "residual") or ties == "even"
    ctx.save_for_backward(token, x if reads_x else None, weight, *kept)
    ctx.channels, ctx.channels_last, ctx.options = x.shape[1], _channels_last(x), options
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    nothing = (None,) * 7
    if dout is None:
        return nothing
    needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
    token, *saved = ctx.saved_tensors
    *options, backend = ctx.options
    args = (
        dout, *saved, ctx.channels, ctx.channels_last, *options,
        needs_dx, needs_dweight or needs_dbias, backend,
    )  # fmt: skip
    if is_plain(dout) and not torch.is_grad_enabled():
        dx, dweight, dbias = _backward(*args)
    elif torch.compiler.is_compiling():
        dx, dweight, dbias = _backward_op(*args)
    else:  # create_graph=True, torch.func, or somebody watching
        dx, dweight, dbias = SpatialGateBackwardFunction.apply(*args, token)
    return dx if needs_dx else None, dweight if needs_dweight else None, dbias if needs_dbias else None, *nothing[3:]


class SpatialGateFunction(torch.autograd.Function):
    """The gate in plain eager mode.

    Besides the output there is a token without elements. A second derivative goes through it, whatever the backward
    reads, and so fails in words instead of coming out zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, *options: str) -> tuple[torch.Tensor, torch.Tensor]:
        forward = _forward if is_plain(x) else _forward_op
        out, *kept = forward(x, weight, bias, *options)
        token = x.new_empty(0)
        _save(ctx, (x, weight, bias), token, kept, options)
        return out, token

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, *unused: Any) -> Any:
        return _gradients(ctx, dout)


class SpatialGateTransformFunction(torch.autograd.Function):
    """The gate under torch.compile, torch.export and torch.func; what is kept are outputs there, and the token."""

    @staticmethod
    def forward(x: Any, weight: Any, bias: Any, *options: str) -> tuple[torch.Tensor, ...]:
        return *_forward_op(x, weight, bias, *options), x.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        *kept, token = output[1:]
        ctx.mark_non_differentiable(*kept)
        _save(ctx, inputs[:3], token, kept, inputs[3:])

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, *unused: Any) -> Any:
        return _gradients(ctx, dout)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Any, weight: Any, bias: Any, *options: str) -> Any:
        args = (x, weight, bias, *options)
        if in_dims[1] is not None or in_dims[2] is not None:
            return each_example(SpatialGateTransformFunction, info.batch_size, in_dims, args)
        return fold_examples(SpatialGateTransformFunction, info.batch_size, in_dims, args, (0,))


class SpatialGateBackwardFunction(torch.autograd.Function):
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
            "attnk.spatial_gate: the fused backward cannot be differentiated again; "
            "backend='reference' (or attnk.use_backend('reference')) can"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        needs_dweight = args[12]  # a sum over the batch: one for each mapped example
        if in_dims[2] is not None or needs_dweight:
            return each_example(SpatialGateBackwardFunction, info.batch_size, in_dims, args)
        return fold_examples(SpatialGateBackwardFunction, info.batch_size, in_dims, args, (0, 1, 3, 4, 5))


# Programs that were exported call the operations by themselves, without the Functions above, and may be trained.


def _setup_raw(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward_raw(ctx: Any, dout: torch.Tensor, *unused: Any) -> Any:
    """Gradients of an operation called by itself, as exported programs call it; the forward runs once more."""
    x, weight, bias = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
        out, _ = SpatialGateFunction.apply(*leaves, *ctx.options)
    grads = iter(torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], dout))
    return *(None if leaf is None else next(grads) for leaf in leaves), *(None for _ in ctx.options)


for _name in ("spatial_gate_infer", "spatial_gate_forward"):
    torch.library.register_autograd(f"attnk::{_name}", _backward_raw, setup_context=_setup_raw, lib=_library)
