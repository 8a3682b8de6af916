"""A ResNet with axial attention in place of its 3 x 3 convolutions."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from attnk.models.common import check_images
from attnk.modules._checks import check_shape, check_sizes, check_tensor
from attnk.modules.axial import AxialAttention

STAGES = 4


class _Bottleneck(nn.Module):
    """A bottleneck of a ResNet around any ``conv2``, which has to bring the stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, conv2: nn.Module) -> None:
        super().__init__()
        inner = _inner_channels(out_channels)
        self.in_channels = in_channels
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv2
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.downsample.append(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(out_channels))

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
        return torch.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class AxialBottleneck(_Bottleneck):
    """A bottleneck of a ResNet (He et al., 2015, https://arxiv.org/abs/1512.03385) that attends along columns and rows.

    ``relu(bn3(conv3(relu(bn2(pool(attend(relu(bn1(conv1(x))))))))) + downsample(x))``: 1 x 1 convolutions around
    ``attnk.AxialAttention``, rows after columns, where a ResNet has its 3 x 3 convolution, and the mean of
    stride x stride pixels behind it, as in Axial-DeepLab (Wang et al., 2020, https://arxiv.org/abs/2003.07853). At the
    edge of maps that the stride does not divide, the mean is that of the pixels there are.

    Keys: a ResNet's ``conv{1,3}.weight``, ``bn{1,2,3}.*``, ``downsample.{0,1}.*``, and ``conv2.attention.*`` as
    ``AxialAttention`` has them.

    Args:
        in_channels: channels of x.
        out_channels: channels of the output; inside there are a quarter of them.
        stride: of the mean and of the shortcut.
        num_heads: heads; a divisor of the channels inside.
        size: (height, width) of x that relative positions are made for; for others they are resized. None for none.

    Raises:
        ValueError: a size that is no positive integer, channels inside that the heads do not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        num_heads: int = 8,
        *,
        size: tuple[int, int] | None = None,
    ) -> None:
        check_sizes(in_channels=in_channels, out_channels=out_channels, stride=stride)
        position = "none" if size is None else "relative"
        attention = AxialAttention(_inner_channels(out_channels), num_heads, "sequential", position, size=size)
        pool = nn.Identity() if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True)
        conv2 = nn.Sequential(OrderedDict(attention=attention, pool=pool))
        super().__init__(in_channels, out_channels, stride, conv2)


class AxialResNet(nn.Module):
    """A ResNet of ``AxialBottleneck``, as stand-alone axial attention networks have them.

    After Axial-DeepLab (Wang et al., 2020, https://arxiv.org/abs/2003.07853): ResNet's stem, four stages whose
    bottlenecks attend along columns and then rows (axial attention: Ho et al., 2019, https://arxiv.org/abs/1912.12180),
    strides by means behind the attention, the mean over the pixels and a linear classifier. It is not that network, and
    its weights do not load:

    - There a relative position is a term of its own with the query and one with the key, and adds to the values, and
      batch norms stand behind the projection, on the logits and behind the attention. Here it is a bias on the logits,
      by head (``attnk.AxialAttention``), logits are divided by ``sqrt(dim_head)``, and there is no norm between
      columns and rows.
    - There attention has half of a block's channels, and queries and keys half of that. Here they all have a quarter,
      ResNet's.
    - There is a linear map behind each attention here, and none there.

    Keys: ResNet's ``conv1.*``, ``bn1.*``, ``layer{1,2,3,4}.{i}.*`` as ``AxialBottleneck`` has them, ``fc.*``. Stages
    without attention have 3 x 3 convolutions, ``conv2.weight``; with ``attention_stages=()`` it is torchvision's
    ResNet-50, whose weights load strictly.

    Args:
        num_classes: how many logits.
        depths: blocks of the four stages, (3, 4, 6, 3) in ResNet-50.
        width: channels of the stem, 64 in ResNet-50; the stages have 4, 8, 16 and 32 times as many.
        num_heads: heads; a divisor of ``width``, if the first stage has attention, or of 2, 4, 8 times as many.
        attention_stages: which of the stages 1 to 4 have attention.
        image_size: height and width that the relative positions are made for; for others they are resized.

    Raises:
        ValueError: a size that is no positive integer, other than four stages, a stage that is none, channels that the
            heads do not divide.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        num_heads: int = 8,
        attention_stages: Iterable[int] = (1, 2, 3, 4),
        image_size: int = 224,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, width=width, num_heads=num_heads, image_size=image_size)
        if len(depths) != STAGES:
            raise ValueError(f"depths must be the numbers of blocks of {STAGES} stages, got {tuple(depths)}")
        check_sizes(**{f"depths[{stage}]": blocks for stage, blocks in enumerate(depths)})
        self.attention_stages = tuple(attention_stages)
        if not set(self.attention_stages) <= set(range(1, STAGES + 1)):
            raise ValueError(f"attention_stages must be stages from 1 to {STAGES}, got {self.attention_stages}")
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, side = width, -(-image_size // 4)
        for stage, blocks in enumerate(depths, 1):
            outputs = 2 * width * 2**stage
            stack = nn.Sequential()
            for block in range(blocks):
                stride = 2 if stage > 1 and not block else 1
                if stage in self.attention_stages:
                    stack.append(AxialBottleneck(channels, outputs, stride, num_heads, size=(side, side)))
                else:
                    stack.append(_convolving(channels, outputs, stride))
                channels, side = outputs, -(-side // stride)
            self.add_module(f"layer{stage}", stack)
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
        for stage in range(1, STAGES + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"attention_stages={self.attention_stages}"


def axial_resnet26(num_classes: int = 1000, **options: Any) -> AxialResNet:
    """``AxialResNet`` with 1, 2, 4 and 1 blocks, 26 layers; the options are its other arguments."""
    return AxialResNet(num_classes, depths=(1, 2, 4, 1), **options)


def axial_resnet50(num_classes: int = 1000, **options: Any) -> AxialResNet:
    """``AxialResNet`` with ResNet-50's 3, 4, 6 and 3 blocks; the options are its other arguments."""
    return AxialResNet(num_classes, depths=(3, 4, 6, 3), **options)


def _convolving(in_channels: int, out_channels: int, stride: int) -> _Bottleneck:
    """ResNet's own bottleneck, with the stride in its 3 x 3 convolution."""
    inner = _inner_channels(out_channels)
    conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
    return _Bottleneck(in_channels, out_channels, stride, conv2)


def _inner_channels(out_channels: int) -> int:
    return max(1, out_channels // 4)
