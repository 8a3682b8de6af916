"""Spatial attention: the module of the tutorials, of CBAM's spatial half, and of their many copies."""

import copy
import itertools
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from attnk import dispatch
from attnk.modules._checks import backend_repr
from attnk.ops._checks import check_choice
from attnk.ops.spatial_gate import ORDERS, TIES, spatial_gate

OUTPUTS = ("map", "gated", "residual")
torch.fx.wrap("spatial_gate")  # one node in a symbolic trace

# Under which names the families keep the convolution and its batch norm, and the order they are known to have.
CONV_NAMES = {
    "conv1": None,  # this class, and the map-returning tutorials
    "conv": None,  # tutorials, External-Attention (max, avg), changzy00 (avg, max)
    "cv1": "avg_max",  # ultralytics
    "conv.conv": "avg_max",  # timm's SpatialAttn
    "spatial.conv.conv": "avg_max",  # the same inside timm's CbamModule
    "spatial.conv": "max_avg",  # the published CBAM's SpatialGate
    "SpatialGate.spatial.conv": "max_avg",  # the same inside the published CBAM
}
CONV_KEYS = ("weight", "bias")
NORM_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
NORM_NAMES = ("bn", "conv.bn", "spatial.conv.bn", "spatial.bn", "SpatialGate.spatial.bn")


class SpatialAttention(nn.Module):
    """Attention over the pixels of a feature map (Woo et al., CBAM, 2018, https://arxiv.org/abs/1807.06521).

    ``map = sigmoid(conv([mean over channels, maximum over channels]))``, a k x k convolution from two channels to one.
    With its defaults the module is a drop-in for the tutorials' class of that name that returns the map; their other
    variant, which returns ``x * map``, is ``SpatialAttention(bias=True, order="max_avg", output="gated")``. The number
    of channels need not be known.

    ``load_state_dict`` also takes the keys of the tutorials (``conv.*``), ultralytics (``cv1.weight``), and, with
    ``norm=True``, timm's (``spatial.conv.conv.*``) and the published CBAM's (``SpatialGate.spatial.conv.*``) spatial
    half, each with its batch norm; it saves as ``conv1.*`` and ``bn.*``. Keys hold neither a batch norm's momentum (0.1
    in timm) nor, where families disagree, the order of the two channels: ``from_module`` finds out. ``conv1`` holds the
    weights and is not called: hooks on it never fire, and padding modes of a replacement are not heeded.

    Args:
        kernel_size: side of the convolution, odd.
        bias: whether the convolution has one.
        order: which pooled map comes first in the convolution's input: "avg_max" or "max_avg".
        output: "map" (B, 1, H, W), "gated" ``x * map``, or "residual" ``x * map + x``.
        norm: whether a batch norm stands between convolution and sigmoid (momentum 0.01, as published).
        ties: which of equal maxima has the gradient: "first" as ``torch.max``, "even" shares it as ``torch.amax``.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: an even kernel size or an unknown option.
    """

    def __init__(
        self,
        kernel_size: int = 7,
        *,
        bias: bool = False,
        order: str = "avg_max",
        output: str = "map",
        norm: bool = False,
        ties: str = "first",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd positive integer, got {kernel_size!r}")
        check_choice("order", order, ORDERS)
        check_choice("output", output, OUTPUTS)
        check_choice("ties", ties, TIES)
        if backend is not None:
            dispatch.check_backend(backend)
        self.kernel_size = kernel_size
        self.order = order
        self.output = output
        self.ties = ties
        self.backend = backend
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=bias)
        self.bn: nn.Module | None = nn.BatchNorm2d(1, momentum=0.01) if norm else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, C, H, W) or (C, H, W), in the dtype of the weights (under autocast, any float dtype), any strides.

        Returns:
            What ``output`` says, in x's dtype and memory format (the map under autocast: in the autocast dtype).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        weight, bias = self.conv1.weight, self.conv1.bias
        options = {"order": self.order, "ties": self.ties, "backend": self.backend}
        if isinstance(self.bn, _BatchNorm) and not self.bn.training and self.bn.running_mean is not None:
            weight, bias = fold_batch_norm(weight, bias, self.bn)
        elif self.bn is not None:  # batch statistics stand between convolution and sigmoid
            logit = spatial_gate(x, weight, bias, output="logit", **options)  # type: ignore[arg-type]
            return self._gate(x, logit)
        return spatial_gate(x, weight, bias, output=self.output, **options)  # type: ignore[arg-type]

    def _gate(self, x: torch.Tensor, logit: torch.Tensor) -> torch.Tensor:
        assert self.bn is not None
        gate = torch.sigmoid(self.bn(logit) if x.dim() == 4 else self.bn(logit.unsqueeze(0)).squeeze(0))
        if self.output == "map":
            return gate
        return x * gate + x if self.output == "residual" else x * gate

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        backend = backend_repr(self.backend)
        return f"order={self.order!r}, output={self.output!r}, ties={self.ties!r}{backend}"

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        error_msgs = args[-1]
        for name, order in CONV_NAMES.items():
            if f"{prefix}{name}.weight" in state_dict and order not in (None, self.order):
                error_msgs.append(
                    f"{prefix}{name}.weight belongs to a module with order={order!r}, this one has {self.order!r}: "
                    f"build SpatialAttention(order={order!r}) or use SpatialAttention.from_module"
                )
        _rename(state_dict, prefix, CONV_NAMES, "conv1")
        if self.bn is not None:
            _rename(state_dict, prefix, NORM_NAMES, "bn")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def from_module(cls, module: nn.Module) -> "SpatialAttention":
        """Build the variant that computes what another module computes, with its weights.

        The variant is found by running: a copy of the module, with random weights, and every candidate of this class
        must agree on random inputs, in evaluation and in training, ties included. Modules of the families listed above
        are recognised, and any other that holds one such convolution and computes one of the variants.

        Args:
            module: a spatial attention module. It is not changed.

        Returns:
            A module with copies of its weights, on their device, in their dtype and in its mode.

        Raises:
            ValueError: it is not a spatial attention of these families; the message says what was not recognised.
        """
        if isinstance(module, cls):
            return copy.deepcopy(module)

        def refusal(why: str) -> ValueError:
            return ValueError(f"{type(module).__qualname__} was not recognised as spatial attention: {why}")

        found = {path: part for path, part in module.named_modules() if isinstance(part, nn.Conv2d | _BatchNorm)}
        conv, norm, counts = _conv_and_norm(module)
        if conv is None or counts not in ((1, 0), (1, 1)):
            raise refusal(
                "it must hold one convolution and at most one batch norm, "
                f"it has {counts[0]} convolutions and {counts[1]} batch norms"
            )
        kernel_size = conv.kernel_size[0]
        if conv.weight.shape != (1, 2, kernel_size, kernel_size) or kernel_size % 2 == 0:
            path = next(path for path, part in found.items() if part is conv)
            raise refusal(f"{path}.weight must be (1, 2, k, k) with k odd, got {tuple(conv.weight.shape)}")
        if norm is not None and norm.num_features != 1:
            raise refusal(f"the batch norm must have one channel, it has {norm.num_features}")
        known = {f"{path}.{name}" for path in found for name in (*CONV_KEYS, *NORM_KEYS)}
        strangers = [key for key in module.state_dict() if key not in known]
        if strangers:
            raise refusal(f"unknown keys {strangers}")

        try:
            probe = copy.deepcopy(module).to("cpu", torch.float64).requires_grad_()
            probe_conv, probe_norm, _ = _conv_and_norm(probe)
            assert probe_conv is not None
            _randomise(probe_conv, probe_norm)
            state = copy.deepcopy((probe_conv, probe_norm))
            expected = _fingerprint(probe, kernel_size)
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise refusal(f"it failed on a 5-channel map ({error!r})") from error
        with torch.random.fork_rng(devices=[]):  # the candidates draw weights nobody keeps
            for order, output, ties in itertools.product(ORDERS, OUTPUTS, TIES):
                options: dict[str, Any] = {"order": order, "output": output, "ties": ties}
                built = cls(kernel_size, bias=conv.bias is not None, norm=norm is not None, **options)
                candidate = copy.deepcopy(built)
                candidate.backend = "reference"
                candidate._copy_from(*state)
                if _agree(_fingerprint(candidate, kernel_size), expected):
                    built._copy_from(conv, norm)
                    built.train(module.training)
                    if norm is not None:
                        built.bn.train(norm.training)  # type: ignore[union-attr]
                    return built
        raise refusal(
            "with its weights no order, output and tie policy of attnk.SpatialAttention gives its values and gradients"
        )

    def _copy_from(self, conv: nn.Conv2d, norm: _BatchNorm | None) -> None:
        self.to(conv.weight.device, conv.weight.dtype)
        self.conv1.load_state_dict(conv.state_dict())
        for mine, theirs in zip(self.conv1.parameters(), conv.parameters(), strict=True):
            mine.requires_grad_(theirs.requires_grad)
        if norm is not None:
            self.bn = _plain_batch_norm(norm)


def _plain_batch_norm(norm: _BatchNorm) -> nn.Module:
    """A copy of a batch norm in PyTorch's own class, so that nothing of another library is taken along."""
    plain: nn.Module = nn.BatchNorm2d(1, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    if isinstance(norm, nn.SyncBatchNorm):
        plain = nn.SyncBatchNorm.convert_sync_batchnorm(plain, norm.process_group)
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            plain.to(tensor.device, tensor.dtype)
    plain.load_state_dict(norm.state_dict())
    for mine, theirs in zip(plain.parameters(), norm.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return plain.train(norm.training)


def fold_batch_norm(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: _BatchNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the one convolution that equals a convolution and a batch norm in evaluation mode.

    Args:
        weight: (1, 2, k, k).
        bias: (1,) or None.
        norm: a batch norm of one channel with running statistics.

    Returns:
        The folded weight (1, 2, k, k) and bias (1,), differentiable.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = (-norm.running_mean if bias is None else bias - norm.running_mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return (weight * scale).to(weight.dtype), shift.to(weight.dtype)


def _rename(state_dict: dict, prefix: str, names: Any, wanted: str) -> None:
    for name in names:
        start = f"{prefix}{name}."
        for key in [key for key in state_dict if key.startswith(start)]:
            leaf = key.removeprefix(start)
            if "." not in leaf and f"{prefix}{wanted}.{leaf}" not in state_dict:
                state_dict[f"{prefix}{wanted}.{leaf}"] = state_dict.pop(key)


def _conv_and_norm(module: nn.Module) -> tuple[nn.Conv2d | None, _BatchNorm | None, tuple[int, int]]:
    """The first convolution and batch norm in a module, and how many it has of each."""
    convs = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    return convs[0] if convs else None, norms[0] if norms else None, (len(convs), len(norms))


@torch.no_grad()
def _randomise(conv: nn.Conv2d, norm: _BatchNorm | None) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [*conv.parameters(), *([] if norm is None else norm.parameters())]
    for parameter in parameters:
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    if norm is not None and norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean.fill_(0.3)
        norm.running_var.fill_(0.7)


def _fingerprint(module: nn.Module, kernel_size: int) -> list[torch.Tensor]:
    """Values, gradients and buffers of a float64 module, in evaluation and in training, on a map full of ties."""
    generator = torch.Generator().manual_seed(1)
    side = min(kernel_size, 9) + 2
    shape = (3, 5, side, side + 1)
    x = torch.randint(-4, 5, shape, generator=generator).double().requires_grad_()
    prints = []
    for training in (False, True):
        out = module.train(training)(x)
        dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        prints += [out.detach(), *torch.autograd.grad(out, x, dout)]
    return prints + [buffer.double() for buffer in module.buffers()]


def _agree(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-9)
        for one, other in zip(some, others, strict=True)
    )
