"""ResNet-50 (He et al., 2015, https://arxiv.org/abs/1512.03385) with a gate in every bottleneck, or none."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # channels inside, bottlenecks, stride of the first
EXPANSION = 4
Gate = Callable[[int], nn.Module]  # from channels to a module


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution; the gate comes behind the last batch norm, before the residual is added."""

    def __init__(self, channels: int, width: int, stride: int, gate: Gate | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * EXPANSION, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * EXPANSION)
        self.gate = nn.Identity() if gate is None else gate(width * EXPANSION)
        self.downsample = nn.Identity()
        if stride != 1 or channels != width * EXPANSION:
            shortcut = nn.Conv2d(channels, width * EXPANSION, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(width * EXPANSION))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.gate(self.bn3(self.conv3(out)))
        return torch.relu(out + self.downsample(x))


class ResNet50(nn.Module):
    """Images (B, 3, H, W) to logits (B, 1000)."""

    def __init__(self, gate: Gate | None = None, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels, blocks = 64, []
        for width, depth, stride in STAGES:
            for position in range(depth):
                blocks.append(Bottleneck(channels, width, 1 if position else stride, gate))
                channels = width * EXPANSION
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.maxpool(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))
