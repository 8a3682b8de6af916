"""A residual bottleneck with squeeze-and-excitation, as a tutorial has it, and a ResNet-50 of them."""

from collections.abc import Sequence

import torch
from torch import nn

from attnk.models.common import check_compat, check_images
from attnk.modules._checks import check_shape, check_sizes, check_tensor
from attnk.modules.channel import reduced_channels
from attnk.modules.feature_map import AttentionPool2d
from attnk.ops.channel_gate import channel_gate

STAGES = 4


class BottleneckWithAttention(nn.Module):
    """A bottleneck of a ResNet (He et al., 2015, https://arxiv.org/abs/1512.03385) whose branch has a channel gate.

    ``relu(gated + shortcut(x))`` where ``gated`` is squeeze-and-excitation (Hu et al., 2018,
    https://arxiv.org/abs/1709.01507) of ``conv3(relu(conv2(relu(conv1(x)))))``. From a widely copied tutorial, where it
    fails with fewer channels than ``reduction_ratio``, or than 4; here a hidden layer has at least one channel. The
    published one has no batch norm on its branch, only on its shortcut, and many of them in a row do not train:
    ``norm=True`` puts one behind each convolution, which then has no bias, as in every ResNet.

    Keys, as published: ``conv{1,2,3}.*``, ``attention.{1,3}.*`` (1 x 1 convolutions) and, unless x passes as it is,
    ``shortcut.{0,1}.*``; besides, with ``norm``, ``bn{1,2,3}.*``. Without it, initial weights are those of the
    published code from the same seed.

    Args:
        in_channels: channels of x.
        out_channels: channels of the output; between the convolutions there are a quarter of them.
        stride: of the 3 x 3 convolution and of the shortcut.
        reduction_ratio: the gate's hidden layer has ``out_channels // reduction_ratio`` channels.
        compat: None or "original", as the other networks have it; "original" refuses ``norm``, which was not published.
        norm: whether the branch has batch norms.

    Raises:
        ValueError: a size that is no positive integer, an unknown ``compat``, ``norm`` with ``compat="original"``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        reduction_ratio: int = 16,
        compat: str | None = None,
        *,
        norm: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(
            in_channels=in_channels, out_channels=out_channels, stride=stride, reduction_ratio=reduction_ratio
        )  # fmt: skip
        check_compat(compat)
        if norm and compat == "original":
            raise ValueError("compat='original' has no batch norm on its branch, got norm=True")
        self.in_channels = in_channels
        self.compat = compat
        inner, bias = max(1, out_channels // 4), not norm
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=bias)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=bias)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=bias)
        self.bn1, self.bn2, self.bn3 = (
            nn.BatchNorm2d(channels) if norm else nn.Identity() for channels in (inner, inner, out_channels)
        )
        self.attention = _Gate(out_channels, reduced_channels(out_channels, reduction_ratio, None))
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=bias))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block.

        Args:
            x: (B, in_channels, H, W), in the dtype of the weights (under autocast, any float dtype).

        Returns:
            (B, out_channels, H', W') with H' = ceil(H / stride), W' alike, in x's memory format.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_tensor("x", x, self.conv1.weight)
        check_shape("x", x, "(B, in_channels, H, W)", 1, self.in_channels)
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.attention(self.bn3(self.conv3(out)))
        return torch.relu(out + self.shortcut(x))

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"compat={self.compat!r}"


class _Gate(nn.Sequential):
    """``x * sigmoid(conv(relu(conv(mean over pixels))))``, fused; the layers hold weights and are not called."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate (B, C, H, W)."""
        names = ("1.weight", "1.bias", "3.weight", "3.bias")
        return channel_gate(x, [self.get_parameter(name) for name in names])


class ResNetWithAttention(nn.Module):
    """A ResNet of ``BottleneckWithAttention``, with attention in place of the average pooling at its end.

    The stem and the four stages are ResNet-50's, with batch norms and a channel gate on each branch and the stride in
    the 3 x 3 convolution. At the end the mean of the map attends to its pixels (``attnk.AttentionPool2d``, from CLIP,
    https://arxiv.org/abs/2103.00020), and a linear layer classifies. A widely copied tutorial describes it, without
    code. Keys: ``conv1.*``, ``bn1.*``, ``layer{1,2,3,4}.{i}.*``, ``attnpool.*``, ``fc.*``.

    Args:
        num_classes: how many logits.
        layers: blocks of the four stages, (3, 4, 6, 3) in ResNet-50.
        width: channels of the stem, 64 in ResNet-50; the stages have 4, 8, 16 and 32 times as many.
        num_heads: heads of the attention at the end; a divisor of ``32 * width``. By default one for 64 channels.
        reduction_ratio: of the channel gates.
        image_size: height and width that the positions at the end are made for; for others they are resized.

    Raises:
        ValueError: a size that is no positive integer, other than four stages, channels that the heads do not divide.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        layers: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        num_heads: int | None = None,
        reduction_ratio: int = 16,
        image_size: int = 224,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, width=width, image_size=image_size)
        if len(layers) != STAGES:
            raise ValueError(f"layers must be the numbers of blocks of {STAGES} stages, got {tuple(layers)}")
        check_sizes(**{f"layers[{stage}]": blocks for stage, blocks in enumerate(layers)})
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        for stage, blocks in enumerate(layers):
            outputs = width * 4 * 2**stage
            stack = nn.Sequential()
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                stack.append(BottleneckWithAttention(channels, outputs, stride, reduction_ratio, norm=True))
                channels = outputs
            self.add_module(f"layer{stage + 1}", stack)
        heads = max(1, channels // 64) if num_heads is None else num_heads
        self.attnpool = AttentionPool2d(-(-image_size // 32), channels, heads)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify.

        Args:
            x: images (B, 3, H, W), in the dtype of the weights (under autocast, any float dtype).

        Returns:
            Logits (B, num_classes).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_images(x, self.conv1.weight)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(STAGES):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(self.attnpool(x))


def resnet50_with_attention(num_classes: int = 1000, **options: object) -> ResNetWithAttention:
    """``ResNetWithAttention`` with ResNet-50's four stages; the options are its arguments."""
    return ResNetWithAttention(num_classes, **options)  # type: ignore[arg-type]
