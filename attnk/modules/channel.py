"""Channel attention: squeeze-and-excitation, CBAM's channel half, effective SE, ECA, and their many copies."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from attnk import dispatch
from attnk.modules._checks import backend_repr, check_kernel_size, check_positive, check_sizes, check_tensor
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
from attnk.ops._checks import check_choice
from attnk.ops._watch import tell, watchers
from attnk.ops.channel_gate import GATE_POOLS, TIES, channel_pool, gate_of, scale

OUTPUTS = ("gated", "map", "residual")
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "hard_swish": nn.Hardswish}
GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid}
PADDINGS = ("zeros", "circular")

# Under which names the families keep the two layers.
LAYER_NAMES = (
    ("fc1", "fc2"),  # timm, torchvision
    ("conv_reduce", "conv_expand"),  # timm's EfficientNet
    ("reduce", "expand"),  # transformers' EfficientNet
    ("attention.0", "attention.2"),  # transformers' RegNet
    ("conv1.conv", "conv2.conv"),  # mmpretrain
    ("se.0", "se.2"),  # External-Attention's CBAM
    ("mlp.1", "mlp.3"),  # the published CBAM's ChannelGate
    ("1", "3"),  # a bare Sequential: pool, convolution, ReLU, convolution, sigmoid
)
# Keys that tell which pools they were trained with.
POOL_OF_KEY = {"mlp.1.weight": "avg_max"}


class _Gate(nn.Module):
    """What channel gates share: pools, gates, what is returned, and the checks of x."""

    def __init__(
        self, channels: int, pool: str, gate: str, output: str, ties: str, backend: str | None
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("pool", pool, GATE_POOLS)
        check_choice("gate", gate, tuple(GATES))
        check_choice("output", output, OUTPUTS)
        check_choice("ties", ties, TIES)
        if backend is not None:
            dispatch.check_backend(backend)
        self.channels = channels
        self.pool = pool
        self.gate = gate
        self.output = output
        self.ties = ties
        self.backend = backend

    def mlp(self, pooled: torch.Tensor) -> torch.Tensor:
        """From pooled vectors (B, C) to the logits of the gate (B, C)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, C, H, W), (C, H, W) or (B, C, D, H, W), in the dtype of the weights (under autocast, any float
                dtype), any strides.

        Returns:
            What ``output`` says: of x's shape, dtype and memory format, or for "map" the gate, with one pixel.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        x = checked(x, next(self.parameters(), None), self.channels)
        pool = "avg_max" if self.pool == "half_sum" else self.pool
        pooled = channel_pool(x, pool, ties=self.ties, backend=self.backend)
        gate = gate_of(pooled.avg, pooled.max, self.mlp, self.pool, self.gate)
        if self.output == "map":
            if watchers:
                tell("channel_gate", gate=gate)
            return as_pixel(gate, x)
        if self.output == "residual":
            gate = gate + 1  # x * (gate + 1) is x * gate + x
        return scale(pooled, gate, backend=self.backend)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        backend = backend_repr(self.backend)
        return f"pool={self.pool!r}, gate={self.gate!r}, output={self.output!r}, ties={self.ties!r}{backend}"


def checked(x: torch.Tensor, weight: torch.Tensor | None, channels: int) -> torch.Tensor:
    """x itself, where it is a map of so many channels and fits a weight."""
    if weight is not None:
        check_tensor("x", x, weight)
    if x.dim() not in (3, 4, 5) or x.shape[0 if x.dim() == 3 else 1] != channels:
        raise ValueError(
            f"x must be (B, C, H, W), (C, H, W) or (B, C, D, H, W) with C = {channels}, got {tuple(x.shape)}"
        )
    return x


def as_pixel(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A gate (B, C) as a map of one pixel, without a batch where x has none."""
    return gate.view(-1, 1, 1) if x.dim() == 3 else gate.view(*gate.shape, *[1] * (x.dim() - 2))


def reduced_channels(channels: int, reduction: float, divisor: int | None) -> int:
    """Width of a hidden layer: ``channels // reduction``, at least 1; or timm's, the nearest multiple of a divisor."""
    if divisor is None:
        return max(1, int(channels // reduction))
    return max(divisor, int(channels * (1.0 / reduction) + divisor / 2) // divisor * divisor)


class ChannelAttention(_Gate):
    """Attention over the channels of a feature map: a gate for every channel, from its mean and maximum.

    ``gate = sigmoid(fc(mean over pixels))``, where ``fc`` is linear, ReLU, linear, and ``out = x * gate``:
    squeeze-and-excitation (Hu et al., 2018, https://arxiv.org/abs/1709.01507). With ``pool="avg_max"`` it is the
    channel half of CBAM (Woo et al., 2018, https://arxiv.org/abs/1807.06521): ``sigmoid(fc(mean) + fc(maximum))``. With
    its defaults the module is a drop-in for the tutorials' class of that name, which has no maximum.

    ``load_state_dict`` takes layers that are linear or 1 x 1 convolutions, under the keys of the tutorials
    (``fc.0.*``, ``fc.2.*``), timm and torchvision (``fc1.*``, ``bn.*``, ``fc2.*``; ``conv_reduce.*``,
    ``conv_expand.*``), ultralytics (``fc.*`` with ``hidden_channels=0``), the published CBAM (``mlp.{1,3}.*``),
    transformers, mmpretrain and External-Attention; it saves the tutorials', and the norm as ``fc.bn.*``. Keys tell
    neither pools, activation nor gate: ``from_module`` finds out.

    Args:
        in_channels: C, channels of x.
        reduction_ratio: the hidden layer has ``in_channels // reduction_ratio`` channels, at least one.
        hidden_channels: how many it has, whatever the ratio; 0 for no hidden layer, a single linear one.
        divisor: rounds ``in_channels / reduction_ratio`` to a multiple as timm does: 8 as its ``SEModule``, 1 as its
            ``CbamModule``. None rounds down.
        pool: what goes into ``fc``: "avg"; "max"; "avg_max", ``fc(avg) + fc(max)``; or "half_sum",
            ``fc((avg + max) / 2)``.
        bias: whether the layers have one.
        activation: between the layers: "relu", "silu" or "hard_swish".
        gate: "sigmoid" or "hard_sigmoid".
        norm: whether a batch norm follows the first layer.
        output: "gated" ``x * gate``, "map" the gate (B, C, 1, 1), or "residual" ``x * gate + x``.
        ties: which of equal maxima has the gradient: "first" as ``torch.max``, "even" shares it as ``torch.amax``.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive number, or an unknown option.
    """

    def __init__(
        self,
        in_channels: int,
        reduction_ratio: float = 16,
        *,
        hidden_channels: int | None = None,
        divisor: int | None = None,
        pool: str = "avg",
        bias: bool = True,
        activation: str = "relu",
        gate: str = "sigmoid",
        norm: bool = False,
        output: str = "gated",
        ties: str = "first",
        backend: str | None = None,
    ) -> None:
        super().__init__(in_channels, pool, gate, output, ties, backend)
        check_sizes(in_channels=in_channels)
        check_choice("activation", activation, tuple(ACTIVATIONS))
        if divisor is not None:
            check_sizes(divisor=divisor)
        check_positive(reduction_ratio=reduction_ratio)
        if hidden_channels is None:
            hidden_channels = reduced_channels(in_channels, reduction_ratio, divisor)
        elif not isinstance(hidden_channels, int) or isinstance(hidden_channels, bool) or hidden_channels < 0:
            raise ValueError(
                f"hidden_channels must be a positive integer, or 0 for no hidden layer, got {hidden_channels!r}"
            )
        if norm and hidden_channels == 0:
            raise ValueError("norm=True needs a hidden layer to follow, but hidden_channels is 0")
        self.hidden_channels = hidden_channels
        self.activation = activation
        self.fc: nn.Module
        if hidden_channels == 0:
            self.fc = nn.Linear(in_channels, in_channels, bias=bias)
        else:
            self.fc = nn.Sequential()
            self.fc.add_module("0", nn.Linear(in_channels, hidden_channels, bias=bias))
            if norm:
                self.fc.add_module("bn", nn.BatchNorm1d(hidden_channels))
            self.fc.add_module("1", ACTIVATIONS[activation]())
            self.fc.add_module("2", nn.Linear(hidden_channels, in_channels, bias=bias))

    def mlp(self, pooled: torch.Tensor) -> torch.Tensor:
        """From pooled vectors (B, C) to the logits of the gate (B, C)."""
        return self.fc(pooled)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for key, pool in POOL_OF_KEY.items():
            if f"{prefix}{key}" in state_dict and pool != self.pool:
                args[-1].append(
                    f"{prefix}{key} belongs to a module with pool={pool!r}, this one has {self.pool!r}: build "
                    f"{type(self).__name__}(pool={pool!r}) or use {type(self).__name__}.from_module"
                )
        if self.hidden_channels:
            for first, last in LAYER_NAMES:
                rename(state_dict, prefix, [first], "fc.0")
                rename(state_dict, prefix, [last], "fc.2")
            rename(state_dict, prefix, ["bn"], "fc.bn")
        for key in (f"{prefix}fc.weight", f"{prefix}fc.0.weight", f"{prefix}fc.2.weight"):
            if key in state_dict and state_dict[key].shape[2:] == (1, 1):  # of 1 x 1 convolutions
                state_dict[key] = state_dict[key].flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def from_module(cls, module: nn.Module) -> "ChannelAttention":
        """Build the variant that computes what another module computes, with its weights.

        The variant is found by running: a copy of the module, with random weights, and every candidate of this class
        must agree on random inputs, in evaluation and in training, ties included. Any module is recognised that holds
        one or two linear layers or 1 x 1 convolutions, and perhaps a batch norm between, and computes one of the
        variants, whatever its names: timm's and torchvision's, ultralytics', the published CBAM's and others.

        Args:
            module: a channel attention module. It is not changed.

        Returns:
            A module with copies of its weights, on their device, in their dtype and in its mode.

        Raises:
            ValueError: it is not a channel attention of these families; the message says what was not recognised.
        """
        if isinstance(module, cls):
            return copy.deepcopy(module)
        what = "channel attention"
        if isinstance(module, nn.Linear | nn.Conv2d):
            raise refusal(module, what, "it is a layer alone, no channel gate")
        parts = parts_of(module, nn.Linear, nn.Conv2d, _BatchNorm)
        layers, norm = _layers_and_norm(module)
        if (why := refuse_layers(layers)) is not None:
            raise refusal(module, what, why)
        hidden, channels = layers[0].weight.shape[0] if len(layers) == 2 else 0, layers[0].weight.shape[1]
        norms = sum(isinstance(part, _BatchNorm) for part in parts.values())
        if norms > 1 or (norm is not None and (hidden == 0 or norm.num_features != hidden)):
            raise refusal(
                module, what, f"it may hold one batch norm of {hidden} channels between two layers, it has {norms}"
            )
        if unknown := strangers(module, parts):
            raise refusal(module, what, f"unknown keys {unknown}")

        def build(options: dict[str, Any], source: nn.Module, backend: str | None = None) -> "ChannelAttention":
            layers, norm = _layers_and_norm(source)
            bias, has_norm = layers[0].bias is not None, norm is not None
            built = cls._of(channels, hidden_channels=hidden, bias=bias, norm=has_norm, backend=backend, **options)
            built._copy_from(layers, norm)
            return built

        options = recognise(
            module,
            what,
            probe_map(8, channels, 4, 5),
            lambda options, probe: build(options, probe, "reference"),
            {
                "pool": GATE_POOLS,
                "activation": tuple(ACTIVATIONS) if hidden else ("relu",),
                "gate": tuple(GATES),
                "output": OUTPUTS,
                "ties": TIES,
            },
            f"pool, activation, gate, output and tie policy of attnk.{cls.__name__}",
        )
        with torch.random.fork_rng(devices=[]):  # what is drawn is written over
            built = build(options, module).train(module.training)
        if norm is not None:
            built.fc.get_submodule("bn").train(norm.training)
        return built

    @classmethod
    def _of(cls, channels: int, **options: Any) -> "ChannelAttention":
        """Build with options of ``ChannelAttention``."""
        return cls(channels, **options)

    def _copy_from(self, layers: list[Any], norm: _BatchNorm | None) -> None:
        self.to(layers[0].weight.device, layers[0].weight.dtype)
        mine = [part for part in self.fc.modules() if isinstance(part, nn.Linear)]
        for layer, theirs in zip(mine, layers, strict=True):
            copy_layer(layer, theirs)
        if norm is not None:
            self.fc._modules["bn"] = plain_batch_norm(norm, nn.BatchNorm1d)


def _layers_and_norm(module: nn.Module) -> tuple[list[Any], _BatchNorm | None]:
    """The linear layers and convolutions in a module, in order, and its first batch norm."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    return layers, next((part for part in module.modules() if isinstance(part, _BatchNorm)), None)


def refuse_layers(layers: list[Any]) -> str | None:
    """Why these are not the layers of a channel gate, or None when they are."""
    shapes = [tuple(layer.weight.shape) for layer in layers]
    needed = "it must hold one layer (C, C) or two, (hidden, C) and (C, hidden), linear or 1 x 1 convolutions"
    flat = [shape[:2] for shape in shapes if len(shape) == 2 or shape[2:] == (1, 1)]
    fits = len(flat) == len(shapes) and (
        (len(flat) == 1 and flat[0][0] == flat[0][1]) or (len(flat) == 2 and flat[0] == flat[1][::-1])
    )
    if not fits:
        return f"{needed}; its weights are {', '.join(map(str, shapes)) or 'none'}"
    biases = [layer.bias is not None for layer in layers]
    return "either all layers must have a bias or none" if any(biases) and not all(biases) else None


class SELayer(ChannelAttention):
    """Squeeze-and-excitation (Hu et al., 2018, https://arxiv.org/abs/1709.01507), as the tutorials call it.

    ``x * sigmoid(fc(mean over pixels))``. The same as ``ChannelAttention``, whose options, checkpoints and
    ``from_module`` it has; also for volumes (B, C, D, H, W).

    Args:
        channel: C, channels of x.
        reduction: the hidden layer has ``channel // reduction`` channels, at least one.
        hidden_channels, divisor, pool, bias, activation, gate, norm, output, ties, backend: as in ``ChannelAttention``.

    Raises:
        ValueError: a size that is no positive number, or an unknown option.
    """

    def __init__(
        self,
        channel: int,
        reduction: float = 16,
        *,
        hidden_channels: int | None = None,
        divisor: int | None = None,
        pool: str = "avg",
        bias: bool = True,
        activation: str = "relu",
        gate: str = "sigmoid",
        norm: bool = False,
        output: str = "gated",
        ties: str = "first",
        backend: str | None = None,
    ) -> None:
        check_sizes(channel=channel)
        check_positive(reduction=reduction)
        super().__init__(
            channel,
            reduction,
            hidden_channels=hidden_channels,
            divisor=divisor,
            pool=pool,
            bias=bias,
            activation=activation,
            gate=gate,
            norm=norm,
            output=output,
            ties=ties,
            backend=backend,
        )


class EffectiveSE(ChannelAttention):
    """Effective squeeze-and-excitation (Lee and Park, CenterMask, 2020, https://arxiv.org/abs/1911.06667).

    ``x * hard_sigmoid(fc(mean over pixels))``, where ``fc`` is one linear layer. Keys ``fc.*``, timm's.
    ``from_module`` takes what ``ChannelAttention.from_module`` takes and has one layer.

    Args:
        channels: C, channels of x.
        pool: as in ``ChannelAttention``; "half_sum" is timm's ``add_maxpool``.
        bias, gate, output, ties, backend: as in ``ChannelAttention``.

    Raises:
        ValueError: a size that is no positive integer, or an unknown option.
    """

    def __init__(
        self,
        channels: int,
        *,
        pool: str = "avg",
        bias: bool = True,
        gate: str = "hard_sigmoid",
        output: str = "gated",
        ties: str = "first",
        backend: str | None = None,
    ) -> None:
        check_sizes(channels=channels)
        super().__init__(
            channels, hidden_channels=0, pool=pool, bias=bias, gate=gate, output=output, ties=ties, backend=backend
        )

    @classmethod
    def from_module(cls, module: nn.Module) -> "ChannelAttention":
        """As ``ChannelAttention.from_module``, for modules with one layer."""
        if len(_layers_and_norm(module)[0]) == 2:
            raise refusal(module, "effective squeeze-and-excitation", "it has two layers, not one")
        return super().from_module(module)

    @classmethod
    def _of(cls, channels: int, **options: Any) -> "ChannelAttention":
        for option in ("hidden_channels", "norm", "activation"):  # without a hidden layer there is none of these
            del options[option]
        return cls(channels, **options)


class ECA(_Gate):
    """Efficient channel attention (Wang et al., 2020, https://arxiv.org/abs/1910.03151).

    ``x * sigmoid(conv1d(mean over pixels))``: a convolution of k weights along the channels. Key ``conv.weight``
    (1, 1, k), timm's and the published; External-Attention's has a bias.

    Args:
        channels: C, channels of x.
        kernel_size: k, odd; None for the paper's, the odd number next to ``(log2(channels) + beta) / gamma``, at
            least 3.
        gamma: see ``kernel_size``.
        beta: see ``kernel_size``.
        bias: whether the convolution has one.
        padding: what lies beyond the first and last channel: "zeros", or "circular", the channels of the other end
            (timm's ``CecaModule``).
        pool: "avg", "max", "avg_max" or "half_sum", as in ``ChannelAttention``.
        gate: "sigmoid" or "hard_sigmoid".
        output: "gated" ``x * gate``, "map" the gate (B, C, 1, 1), or "residual" ``x * gate + x``.
        ties: which of equal maxima has the gradient: "first" or "even".
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: an even kernel size, one that is wider than the channels go around, a gamma that is no positive
            number, or an unknown option.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | None = None,
        *,
        gamma: float = 2,
        beta: float = 1,
        bias: bool = False,
        padding: str = "zeros",
        pool: str = "avg",
        gate: str = "sigmoid",
        output: str = "gated",
        ties: str = "first",
        backend: str | None = None,
    ) -> None:
        super().__init__(channels, pool, gate, output, ties, backend)
        check_sizes(channels=channels)
        check_choice("padding", padding, PADDINGS)
        check_positive(gamma=gamma)
        if kernel_size is None:
            near = int(abs(math.log2(channels) + beta) / gamma)
            kernel_size = max(near if near % 2 else near + 1, 3)
        check_kernel_size(kernel_size, " or None")
        if padding == "circular" and kernel_size // 2 > channels:
            raise ValueError(
                f"padding='circular' goes around once at most: kernel_size // 2 must be at most channels = {channels}, "
                f"got kernel_size={kernel_size}"
            )
        around: Any = padding
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, padding_mode=around, bias=bias)

    def mlp(self, pooled: torch.Tensor) -> torch.Tensor:
        """From pooled vectors (B, C) to the logits of the gate (B, C)."""
        return self.conv(pooled.unsqueeze(1)).squeeze(1)


for _name in ("as_pixel", "channel_pool", "checked", "scale"):
    torch.fx.wrap(_name)  # one node in a symbolic trace
