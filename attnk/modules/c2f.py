"""C2f: the CSP bottleneck with two convolutions, with attention; and what a tutorial published under that name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attnk.modules._checks import check_shape, check_sizes, check_tensor
from attnk.modules.coordinate import CoordinateAttention
from attnk.ops._checks import check_choice

Factory = Callable[[int], nn.Module]

NORM_EPS, NORM_MOMENTUM = 1e-3, 0.03  # ultralytics sets these in every batch norm of a model
COMPATS = ("original",)
ORIGINAL_KEYS = ("conv1.weight", "conv2.weight", "attention.weight")


class _Conv(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=NORM_EPS, momentum=NORM_MOMENTUM)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))


class _Bottleneck(nn.Module):
    """Two 3 x 3 convolutions, with or without x added."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1 = _Conv(channels, channels, 3)
        self.cv2 = _Conv(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.cv2(self.cv1(x))
        return x + out if self.shortcut else out


class C2f(nn.Module):
    """The CSP bottleneck with two convolutions of YOLOv8 (Jocher et al., 2023), with or without attention.

    A 1 x 1 convolution makes two halves; n bottlenecks of two 3 x 3 convolutions follow the second, each on what the
    one before returned; another 1 x 1 convolution takes the two halves and all n results. Every convolution has a batch
    norm and SiLU. With ``attention="coordinate"`` coordinate attention (Hou et al., 2021,
    https://arxiv.org/abs/2103.02907) weighs the output: "CA-C2f".

    Keys are ultralytics': ``cv1.conv.weight``, ``cv1.bn.*``, ``m.{i}.cv1.*``, ``m.{i}.cv2.*``, ``cv2.*``; besides, the
    attention's under ``attention.*``.

    Args:
        in_channels: channels of x.
        out_channels: channels of the output.
        n: how many bottlenecks.
        shortcut: whether each adds its input.
        expansion: a half has ``int(out_channels * expansion)`` channels.
        attention: what weighs the output: None, "coordinate", or a function that makes a module for so many channels,
            such as ``attnk.CBAM``.

    A map without a batch, (in_channels, H, W), is refused.

    Raises:
        ValueError: a size that is no positive integer, halves without a channel, an unknown attention.
        TypeError: an attention that is a module, not what makes one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n: int = 1,
        shortcut: bool = False,
        *,
        expansion: float = 0.5,
        attention: str | Factory | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels)
        if not isinstance(n, int) or isinstance(n, bool) or n < 0:
            raise ValueError(f"n must be an integer of at least 0, got {n!r}")
        if isinstance(attention, nn.Module):
            raise TypeError(
                "attention must be a function or class that makes a module, such as attnk.CBAM, "
                f"got an instance of {type(attention).__name__}"
            )
        half = int(out_channels * expansion)
        if half < 1:
            raise ValueError(
                f"a half must have at least one channel, but int(out_channels * expansion) is {half} with "
                f"out_channels={out_channels}, expansion={expansion}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.cv1 = _Conv(in_channels, 2 * half, 1)
        self.cv2 = _Conv((2 + n) * half, out_channels, 1)
        self.m = nn.ModuleList(_Bottleneck(half, shortcut) for _ in range(n))
        self.attention: nn.Module | None = None
        if callable(attention):
            self.attention = attention(out_channels)
            if not isinstance(self.attention, nn.Module):
                raise ValueError(
                    f"attention must return a module for {out_channels} channels, it returned {self.attention!r}"
                )
        elif attention is not None:
            check_choice("attention", attention, ("coordinate",))
            self.attention = CoordinateAttention(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W), in the dtype of the weights.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_tensor("x", x, self.cv1.conv.weight)
        check_shape("x", x, "(B, in_channels, H, W)", 1, self.in_channels)
        parts = list(self.cv1(x).chunk(2, 1))
        for bottleneck in self.m:
            parts.append(bottleneck(parts[-1]))
        out = self.cv2(torch.cat(parts, 1))
        return out if self.attention is None else self.attention(out)


class C2fModule(C2f):
    """The tutorials' "C2f module with coordinate attention", repaired, or as it was published.

    As published it has neither a bottleneck, a concatenation nor a coordinate, it returns ``in_channels``, and its
    three convolutions, with nothing between them, are one: ``x * sigmoid(attention(conv1(x) + conv2(x)))``, with
    ``conv1.*``, ``conv2.*`` (out_channels, in_channels, 3, 3) and ``attention.*`` (1, out_channels, 1, 1). That is
    ``compat="original"``; it takes the published weights strictly, and ``attnk.fold`` makes one convolution of it.

    By default it is what its text describes: ``C2f(in_channels, out_channels, attention="coordinate")``, which returns
    ``out_channels``, with the weights and keys of that. The published weights have no place in it, since all they ever
    made is one gate of ``9 * in_channels + 1`` numbers: loading them raises and names ``compat="original"``.

    Args:
        in_channels: channels of x.
        out_channels: channels of the output; with ``compat="original"``, of the three convolutions' results.
        compat: None, or "original".

    Raises:
        ValueError: a size that is no positive integer, or an unknown ``compat``.
    """

    def __init__(self, in_channels: int, out_channels: int, compat: str | None = None) -> None:
        check_sizes(in_channels=in_channels, out_channels=out_channels)
        if compat is None:
            super().__init__(in_channels, out_channels, attention="coordinate")
        else:
            check_choice("compat", compat, COMPATS)
            nn.Module.__init__(self)
            self.in_channels = in_channels
            self.out_channels = out_channels
            self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
            self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
            self.attention = nn.Conv2d(out_channels, 1, 1)
        self.compat = compat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W); with ``compat="original"`` to x's own shape."""
        if self.compat is None:
            return super().forward(x)
        assert self.attention is not None
        return x * torch.sigmoid(self.attention(self.conv1(x) + self.conv2(x)))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        found = [key for key in ORIGINAL_KEYS if f"{prefix}{key}" in state_dict]
        if self.compat is None and found:
            args[-1].append(
                f"{prefix}{found[0]} belongs to the module as it was published, whose weights have no place in the "
                'repaired one: build C2fModule(in_channels, out_channels, compat="original")'
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
