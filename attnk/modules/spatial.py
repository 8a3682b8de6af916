"""Spatial attention: the module of the tutorials, of CBAM's spatial half, and of their many copies."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from attnk import dispatch
from attnk.modules._checks import backend_repr, check_kernel_size
from attnk.modules._probe import (
    copy_layer,
    parts_of,
    plain_batch_norm,
    probe_map,
    recognise,
    refusal,
    rename,
    strangers,
)
from attnk.ops._batch_norm import fold_batch_norm
from attnk.ops._checks import check_choice
from attnk.ops._watch import tell, watchers
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
        check_kernel_size(kernel_size)
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
        if watchers:
            tell("spatial_gate", gate=gate)
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
        rename(state_dict, prefix, CONV_NAMES, "conv1")
        if self.bn is not None:
            rename(state_dict, prefix, NORM_NAMES, "bn")
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

        what = "spatial attention"
        found = parts_of(module, nn.Conv2d, _BatchNorm)
        conv, norm, counts = _conv_and_norm(module)
        if conv is None or counts not in ((1, 0), (1, 1)):
            raise refusal(
                module,
                what,
                "it must hold one convolution and at most one batch norm, "
                f"it has {counts[0]} convolutions and {counts[1]} batch norms",
            )
        kernel_size = conv.kernel_size[0]
        if conv.weight.shape != (1, 2, kernel_size, kernel_size) or kernel_size % 2 == 0:
            path = next(path for path, part in found.items() if part is conv)
            raise refusal(
                module, what, f"{path}.weight must be (1, 2, k, k) with k odd, got {tuple(conv.weight.shape)}"
            )
        if norm is not None and norm.num_features != 1:
            raise refusal(module, what, f"the batch norm must have one channel, it has {norm.num_features}")
        if unknown := strangers(module, found):
            raise refusal(module, what, f"unknown keys {unknown}")

        def build(options: dict[str, Any], source: nn.Module, backend: str | None = None) -> "SpatialAttention":
            conv, norm, _ = _conv_and_norm(source)
            assert conv is not None
            built = cls(kernel_size, bias=conv.bias is not None, norm=norm is not None, backend=backend, **options)
            built._copy_from(conv, norm)
            return built

        side = min(kernel_size, 9) + 2
        options = recognise(
            module,
            what,
            probe_map(3, 5, side, side + 1),
            lambda options, probe: build(options, probe, "reference"),
            {"order": ORDERS, "output": OUTPUTS, "ties": TIES},
            "order, output and tie policy of attnk.SpatialAttention",
        )
        with torch.random.fork_rng(devices=[]):  # what is drawn is written over
            built = build(options, module).train(module.training)
        if norm is not None:
            built.bn.train(norm.training)  # type: ignore[union-attr]
        return built

    def _copy_from(self, conv: nn.Conv2d, norm: _BatchNorm | None) -> None:
        self.to(conv.weight.device, conv.weight.dtype)
        copy_layer(self.conv1, conv)
        if norm is not None:
            self.bn = plain_batch_norm(norm)


def _conv_and_norm(module: nn.Module) -> tuple[nn.Conv2d | None, _BatchNorm | None, tuple[int, int]]:
    """The first convolution and batch norm in a module, and how many it has of each."""
    convs = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    return convs[0] if convs else None, norms[0] if norms else None, (len(convs), len(norms))
