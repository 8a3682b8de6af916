"""Coordinate attention: a gate for every row and one for every column, in every channel."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from attnk import dispatch
from attnk.modules._checks import as_batch, backend_repr, check_positive, check_sizes
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
from attnk.ops.coordinate_gate import coordinate_gate, coordinate_pool

OUTPUTS = ("gated", "residual")
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "hard_swish": F.hardswish,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
}
GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid}
MIN_HIDDEN = 8  # the paper's code never has fewer hidden channels


class CoordinateAttention(nn.Module):
    """Coordinate attention (Hou et al., 2021, https://arxiv.org/abs/2103.02907).

    The means of rows and of columns pass, one behind the other, through ``conv1``, ``bn1`` and an activation; then
    ``gate_h = sigmoid(conv_h(rows))``, ``gate_w = sigmoid(conv_w(columns))``, all convolutions 1 x 1, and
    ``out = x * gate_w * gate_h``. With its defaults the module is the authors' ``CoordAtt``.

    ``load_state_dict`` takes the keys of the authors' two files (``conv_h``, ``conv_w``, and ``conv2``, ``conv3``) and
    timm's; it saves the former. Keys tell neither activation nor gate: other classes' checkpoints load and compute
    another thing. ``from_module`` finds out.

    Args:
        channels: C, channels of x.
        reduction: the hidden layer has ``channels // reduction`` channels, at least 8.
        hidden_channels: how many it has, whatever the reduction.
        divisor: rounds ``channels / reduction * se_factor`` to a multiple as timm does. None rounds down, without
            ``se_factor``. timm's defaults are ``reduction=16, divisor=8, se_factor=2 / 3, bias=False``.
        se_factor: see divisor.
        bias: whether the convolutions have one.
        norm: whether a batch norm ``bn1`` follows the first of them.
        activation: "hard_swish", "relu", "relu6" or "silu".
        gate: "sigmoid" or "hard_sigmoid".
        output: "gated" ``x * gate_w * gate_h``, or "residual", that and x.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive number, or an unknown option.
    """

    def __init__(
        self,
        channels: int,
        reduction: float = 32,
        *,
        hidden_channels: int | None = None,
        divisor: int | None = None,
        se_factor: float = 1.0,
        bias: bool = True,
        norm: bool = True,
        activation: str = "hard_swish",
        gate: str = "sigmoid",
        output: str = "gated",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels)
        check_positive(reduction=reduction, se_factor=se_factor)
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_choice("gate", gate, tuple(GATES))
        check_choice("output", output, OUTPUTS)
        if backend is not None:
            dispatch.check_backend(backend)
        if hidden_channels is None:
            if divisor is None:
                hidden_channels = max(MIN_HIDDEN, int(channels // reduction))
            else:
                check_sizes(divisor=divisor)
                wanted = channels * (1.0 / reduction) * se_factor
                hidden_channels = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
        check_sizes(hidden_channels=hidden_channels)
        self.channels = channels
        self.activation = activation
        self.gate = gate
        self.output = output
        self.backend = backend
        self.conv1 = nn.Conv2d(channels, hidden_channels, 1, bias=bias)
        self.bn1: nn.Module = nn.BatchNorm2d(hidden_channels) if norm else nn.Identity()
        self.conv_h = nn.Conv2d(hidden_channels, channels, 1, bias=bias)
        self.conv_w = nn.Conv2d(hidden_channels, channels, 1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, C, H, W) or (C, H, W), in the dtype of the weights (under autocast, any float dtype), any strides.
                Without a pixel nothing is computed, and no statistics change.

        Returns:
            A tensor of x's shape, dtype and memory format.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        batch = as_batch(x, self.conv1.weight, self.channels)
        if not isinstance(x, torch.fx.Proxy) and x.numel() == 0:  # a convolution takes no map without pixels
            nothing = torch.cat([parameter.flatten() for parameter in self.parameters()])[:0].sum()
            return x + nothing.to(x.dtype)  # the parameters have gradients of 0
        pooled = coordinate_pool(batch, backend=self.backend)
        rows, columns = pooled.height.shape[2], pooled.width.shape[3]
        lines = torch.cat([pooled.height, pooled.width.transpose(2, 3)], 2)  # (B, C, H + W, 1)
        lines = ACTIVATIONS[self.activation](self.bn1(self.conv1(lines)))
        of_rows, of_columns = lines.split([rows, columns], 2)
        gate = GATES[self.gate]
        gate_h, gate_w = gate(self.conv_h(of_rows)), gate(self.conv_w(of_columns.transpose(2, 3)))
        out = coordinate_gate(pooled, gate_h, gate_w, backend=self.backend).view_as(x)
        return out + x if self.output == "residual" else out

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        options = f"activation={self.activation!r}, gate={self.gate!r}, output={self.output!r}"
        return f"{options}{backend_repr(self.backend)}"

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        rename(state_dict, prefix, ["conv2"], "conv_h")
        rename(state_dict, prefix, ["conv3"], "conv_w")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def from_module(cls, module: nn.Module) -> "CoordinateAttention":
        """Build the variant that computes what another module computes, with its weights.

        The variant is found by running: a copy of the module, with random weights, and every candidate of this class
        must agree on random inputs, in evaluation and in training. Any module is recognised that holds three 1 x 1
        convolutions, and perhaps a batch norm behind the first, and computes one of the variants, whatever its names:
        the authors' two, External-Attention's, timm's ``CoordAttn``. Others have the same keys and compute another
        thing; they are refused.

        Args:
            module: a coordinate attention module. It is not changed.

        Returns:
            A module with copies of its weights, on their device, in their dtype and in its mode.

        Raises:
            ValueError: it is not a coordinate attention of these families; the message says what was not recognised.
        """
        if isinstance(module, cls):
            return copy.deepcopy(module)
        what = "coordinate attention"
        parts = parts_of(module, nn.Conv2d, _BatchNorm)
        convs, norms = _convs_and_norms(module)
        shapes = [tuple(conv.weight.shape) for conv in convs]
        hidden, channels = shapes[0][:2] if shapes else (0, 0)
        if shapes != [(hidden, channels, 1, 1), *[(channels, hidden, 1, 1)] * 2]:
            needed = "it must hold three 1 x 1 convolutions, (hidden, C) and twice (C, hidden)"
            raise refusal(module, what, f"{needed}; its weights are {', '.join(map(str, shapes)) or 'none'}")
        if len({conv.bias is not None for conv in convs}) != 1:
            raise refusal(module, what, "either all convolutions must have a bias or none")
        if len(norms) > 1 or (norms and norms[0].num_features != hidden):
            raise refusal(module, what, f"it may hold one batch norm, of {hidden} channels, it has {len(norms)}")
        if unknown := strangers(module, parts):
            raise refusal(module, what, f"unknown keys {unknown}")

        def build(options: dict[str, Any], source: nn.Module, backend: str | None = None) -> "CoordinateAttention":
            (first, *others), norms = _convs_and_norms(source)
            options = {"hidden_channels": hidden, "bias": first.bias is not None, "norm": bool(norms), **options}
            if options.pop("columns_first"):
                others.reverse()
            built = cls(channels, backend=backend, **options)
            built.to(first.weight.device, first.weight.dtype)
            for mine, theirs in zip((built.conv1, built.conv_h, built.conv_w), (first, *others), strict=True):
                copy_layer(mine, theirs)
            if norms:
                built.bn1 = plain_batch_norm(norms[0])
            return built

        options = recognise(
            module,
            what,
            probe_map(3, channels, 4, 5),
            lambda options, probe: build(options, probe, "reference"),
            {
                "columns_first": (False, True),
                "activation": tuple(ACTIVATIONS),
                "gate": tuple(GATES),
                "output": OUTPUTS,
            },
            f"activation, gate and output of attnk.{cls.__name__}",
        )
        with torch.random.fork_rng(devices=[]):  # what is drawn is written over
            built = build(options, module).train(module.training)
        if norms:
            built.bn1.train(norms[0].training)
        return built


def _convs_and_norms(module: nn.Module) -> tuple[list[nn.Conv2d], list[_BatchNorm]]:
    """The convolutions and the batch norms in a module, in their order."""
    convs = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    return convs, [part for part in module.modules() if isinstance(part, _BatchNorm)]


for _name in ("as_batch", "coordinate_gate", "coordinate_pool"):
    torch.fx.wrap(_name)  # one node in a symbolic trace
