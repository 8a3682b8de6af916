"""CBAM: attention over the channels and then over the pixels, in the variants that are in use."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from attnk import dispatch
from attnk.modules._checks import as_batch, backend_repr, check_kernel_size, without_batch
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
from attnk.modules.channel import ACTIVATIONS, GATES, ChannelAttention, refuse_layers
from attnk.ops._checks import check_choice
from attnk.ops.cbam import cbam
from attnk.ops.channel_gate import GATE_POOLS, TIES
from attnk.ops.spatial_gate import ORDERS, spatial_gate

OUTPUTS = ("gated", "residual")

# Under which names the families keep the two layers of the channel half, and the spatial half's convolution and norm.
FIRST_NAMES = ("channel.fc1", "ChannelGate.mlp.1", "ca.se.0", "ca.fc.0", "ca.fc1", "channel_attention.fc1")
LAST_NAMES = ("channel.fc2", "ChannelGate.mlp.3", "ca.se.2", "ca.fc.2", "ca.fc2", "channel_attention.fc2")
CONV_NAMES = (
    "spatial_attention.cv1",
    "spatial_attention.conv1",
    "spatial.conv.conv",
    "SpatialGate.spatial.conv",
    "sa.conv",
    "sa.conv1",
)
NORM_NAMES = ("spatial.conv.bn", "SpatialGate.spatial.bn")

# What a key tells of the module it was trained in.
TOLD_BY_KEY = {
    "spatial_attention.cv1.weight": {"pool": "avg", "order": "avg_max", "output": "gated"},  # ultralytics
    "spatial.conv.conv.weight": {"pool": "avg_max", "order": "avg_max", "output": "gated"},  # timm
    "SpatialGate.spatial.conv.weight": {"pool": "avg_max", "order": "max_avg", "output": "gated"},  # the published
    "ca.se.0.weight": {"pool": "avg_max", "order": "max_avg", "output": "residual"},  # External-Attention
}


class _SpatialHalf(nn.Module):
    """Holds the weights of the spatial half; ``CBAM`` runs both halves as one."""

    def __init__(self, kernel_size: int, bias: bool, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=bias)
        self.bn: nn.Module | None = nn.BatchNorm2d(1, momentum=0.01) if norm else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(
            "spatial_attention runs as a part of CBAM and cannot be called; attnk.SpatialAttention can"
        )


class CBAM(nn.Module):
    """The convolutional block attention module (Woo et al., 2018, https://arxiv.org/abs/1807.06521).

    ``y = x * sigmoid(fc(pooled over pixels))``, then ``out = y * sigmoid(conv([mean, max] over the channels of y))``;
    y is never written. With its defaults the module is a drop-in for the tutorials' class of that name: means alone in
    the channel half, [max, mean] and a bias in the spatial half. Others:

    - the published: ``pool="avg_max", order="max_avg", spatial_bias=False, norm=True``
    - timm's ``CbamModule``: ``pool="avg_max", order="avg_max", bias=False, spatial_bias=False, norm=True, divisor=1,
      ties="even"``, and a momentum of 0.1 in the batch norm
    - ultralytics': ``hidden_channels=0, order="avg_max", spatial_bias=False``
    - External-Attention's ``CBAMBlock``: ``pool="avg_max", bias=False, kernel_size=49, output="residual"``
    - changzy00's: ``pool="avg_max", order="avg_max", bias=False, spatial_bias=False``

    Not taken are timm's ``CbamModule`` with a hard gate, which it has in both halves, and its ``LightCbamModule``.

    ``load_state_dict`` takes the keys of each and saves the tutorials' (``channel_attention.fc.{0,2}.*``,
    ``spatial_attention.conv.*``, ``spatial_attention.bn.*``). Where keys tell which variant they belong to, loading
    them into another raises; ``from_module`` always finds out. Both halves are run as one: hooks on either, and on the
    spatial half's parts, never fire, and ``spatial_attention`` cannot be called. ``torch.fx.symbolic_trace``
    alone takes them apart: what it traces writes y.

    Args:
        in_channels: C, channels of x.
        reduction_ratio: the hidden layer has ``in_channels // reduction_ratio`` channels, at least one.
        kernel_size: side of the spatial half's convolution, odd.
        hidden_channels: width of the hidden layer, whatever the ratio; 0 for none, a single linear layer.
        divisor: rounds ``in_channels / reduction_ratio`` to a multiple as timm does; None rounds down.
        pool: what goes into the channel half's layers: "avg", "max", "avg_max" or "half_sum", as in
            ``ChannelAttention``.
        bias: whether these layers have one.
        activation: between them: "relu", "silu" or "hard_swish".
        gate: of the channel half: "sigmoid" or "hard_sigmoid".
        order: which pooled map comes first in the convolution's input: "max_avg" or "avg_max".
        spatial_bias: whether the convolution has a bias.
        norm: whether a batch norm stands between convolution and sigmoid (momentum 0.01, as published).
        output: "gated", or "residual", which adds x.
        ties: which of equal maxima has the gradient: "first" as ``torch.max``, "even" shares it as ``torch.amax``.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive number, an even kernel size, or an unknown option.
    """

    def __init__(
        self,
        in_channels: int,
        reduction_ratio: float = 16,
        kernel_size: int = 7,
        *,
        hidden_channels: int | None = None,
        divisor: int | None = None,
        pool: str = "avg",
        bias: bool = True,
        activation: str = "relu",
        gate: str = "sigmoid",
        order: str = "max_avg",
        spatial_bias: bool = True,
        norm: bool = False,
        output: str = "gated",
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
        self.order = order
        self.output = output
        self.ties = ties
        self.backend = backend
        self.channel_attention = ChannelAttention(
            in_channels,
            reduction_ratio,
            hidden_channels=hidden_channels,
            divisor=divisor,
            pool=pool,
            bias=bias,
            activation=activation,
            gate=gate,
            ties=ties,
            backend=backend,
        )
        self.spatial_attention = _SpatialHalf(kernel_size, spatial_bias, norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, C, H, W) or (C, H, W), in the dtype of the weights (under autocast, any float dtype), any strides.

        Returns:
            A tensor of x's shape, dtype and memory format.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        channel, spatial = self.channel_attention, self.spatial_attention
        batch = as_batch(x, spatial.conv.weight, channel.channels)
        if isinstance(x, torch.fx.Proxy):  # attnk.cbam calls modules, and so is no node
            return self._both_halves(x, batch)
        return cbam(
            x,
            channel.mlp,
            spatial.conv.weight,
            spatial.conv.bias,
            pool=channel.pool,
            gate=channel.gate,
            norm=spatial.bn,
            order=self.order,
            output=self.output,
            ties=self.ties,
            backend=self.backend,
        )

    def _both_halves(self, x: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """The one after the other, in operations that a symbolic trace may hold."""
        spatial, options = self.spatial_attention, {"order": self.order, "ties": self.ties, "backend": self.backend}
        y = self.channel_attention(batch)
        logit = spatial_gate(y, spatial.conv.weight, spatial.conv.bias, output="logit", **options)  # type: ignore[arg-type]
        out = without_batch(y * torch.sigmoid(logit if spatial.bn is None else spatial.bn(logit)), x)
        return out + x if self.output == "residual" else out

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        backend = backend_repr(self.backend)
        return f"order={self.order!r}, output={self.output!r}, ties={self.ties!r}{backend}"

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        mine = {"pool": self.channel_attention.pool, "order": self.order, "output": self.output}
        for key, told in TOLD_BY_KEY.items():
            wrong = {name: value for name, value in told.items() if mine[name] != value}
            if f"{prefix}{key}" in state_dict and wrong:
                needed = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
                has = ", ".join(f"{name}={mine[name]!r}" for name in wrong)
                args[-1].append(
                    f"{prefix}{key} belongs to a module with {needed}, this one has {has}: build CBAM({needed}) or use "
                    "CBAM.from_module"
                )
        if self.channel_attention.hidden_channels:
            rename(state_dict, prefix, FIRST_NAMES, "channel_attention.fc.0")
            rename(state_dict, prefix, LAST_NAMES, "channel_attention.fc.2")
        rename(state_dict, prefix, CONV_NAMES, "spatial_attention.conv")
        if self.spatial_attention.bn is not None:
            rename(state_dict, prefix, NORM_NAMES, "spatial_attention.bn")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def from_module(cls, module: nn.Module) -> "CBAM":
        """Build the variant that computes what another module computes, with its weights.

        The variant is found by running: a copy of the module, with random weights, and every candidate of this class
        must agree on random inputs, in evaluation and in training, ties included. Any module is recognised that holds
        one or two layers of a channel gate, then one convolution of two maps and perhaps its batch norm, and computes
        one of the variants, whatever its names.

        Args:
            module: a CBAM. It is not changed.

        Returns:
            A module with copies of its weights, on their device, in their dtype and in its mode.

        Raises:
            ValueError: it is not a CBAM of these families; the message says what was not recognised.
        """
        if isinstance(module, cls):
            return copy.deepcopy(module)
        what = "a CBAM"
        parts = parts_of(module, nn.Linear, nn.Conv2d, _BatchNorm)
        layers, conv, norm = _halves(module)
        if conv is None:
            raise refusal(module, what, "it must hold a convolution (1, 2, k, k) with k odd, after the channel half")
        if (why := refuse_layers(layers)) is not None:
            raise refusal(module, what, f"in the channel half, {why}")
        norms = sum(isinstance(part, _BatchNorm) for part in parts.values())
        if norms > 1 or (norm is not None and norm.num_features != 1):
            raise refusal(module, what, f"it may hold one batch norm, of one channel, it has {norms}")
        if unknown := strangers(module, parts):
            raise refusal(module, what, f"unknown keys {unknown}")
        hidden, channels = layers[0].weight.shape[0] if len(layers) == 2 else 0, layers[0].weight.shape[1]
        kernel_size = conv.kernel_size[0]

        def build(options: dict[str, Any], source: nn.Module, backend: str | None = None) -> "CBAM":
            layers, conv, norm = _halves(source)
            assert conv is not None
            built = cls(
                channels,
                kernel_size=kernel_size,
                hidden_channels=hidden,
                bias=layers[0].bias is not None,
                spatial_bias=conv.bias is not None,
                norm=norm is not None,
                backend=backend,
                **options,
            )
            built.to(conv.weight.device, conv.weight.dtype)
            built.channel_attention._copy_from(layers, None)
            copy_layer(built.spatial_attention.conv, conv)
            if norm is not None:
                built.spatial_attention.bn = plain_batch_norm(norm)
            return built

        side = min(kernel_size, 9)
        options = recognise(
            module,
            what,
            probe_map(8, channels, side, side + 1),
            lambda options, probe: build(options, probe, "reference"),
            {
                "pool": GATE_POOLS,
                "activation": tuple(ACTIVATIONS) if hidden else ("relu",),
                "gate": tuple(GATES),
                "order": ORDERS,
                "output": OUTPUTS,
                "ties": TIES,
            },
            "pool, activation, gate, order, output and tie policy of attnk.CBAM",
        )
        with torch.random.fork_rng(devices=[]):  # what is drawn is written over
            built = build(options, module).train(module.training)
        if norm is not None:
            built.spatial_attention.bn.train(norm.training)  # type: ignore[union-attr]
        return built


def _halves(module: nn.Module) -> tuple[list[Any], nn.Conv2d | None, _BatchNorm | None]:
    """The layers of a CBAM's channel half, its spatial convolution, which comes last, and its batch norm."""
    layers: list[Any] = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    norm = next((part for part in module.modules() if isinstance(part, _BatchNorm)), None)
    conv = layers.pop() if layers else None
    if not isinstance(conv, nn.Conv2d) or conv.weight.shape[:2] != (1, 2):
        return layers, None, norm
    height, width = conv.kernel_size
    return layers, conv if height == width and height % 2 else None, norm


for _name in ("as_batch", "spatial_gate", "without_batch"):
    torch.fx.wrap(_name)  # one node in a symbolic trace
