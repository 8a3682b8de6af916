"""A small network with squeeze-and-excitation, as a tutorial has it."""

import torch
from torch import nn

from attnk.models.common import check_compat, check_images
from attnk.modules._checks import check_sizes
from attnk.modules.channel import SELayer

CHANNELS = 64


class SENet(nn.Module):
    """Convolution, batch norm, ReLU, squeeze-and-excitation and a linear classifier.

    A toy under the name of the networks of Hu et al. (2018, https://arxiv.org/abs/1709.01507), from a widely copied
    tutorial. As published it flattens the map and gives it to a linear map from 64 numbers, so that every image above
    2 x 2 pixels fails. Here the map is averaged over its pixels before; up to 2 x 2, where the map is one pixel, that
    is what was published.

    Keys, as published: ``conv1.weight``, ``bn1.*``, ``se.fc.{0,2}.*``, ``fc.*``. Initial weights are those of the
    published code from the same seed.

    Args:
        num_classes: how many logits.
        reduction: the gate's hidden layer has ``64 // reduction`` channels, at least one.
        compat: None; or "original", which flattens and so takes images up to 2 x 2 pixels alone.

    Raises:
        ValueError: a size that is no positive number, an unknown ``compat``.
    """

    def __init__(self, num_classes: int = 1000, reduction: float = 16, compat: str | None = None) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes)
        check_compat(compat)
        self.compat = compat
        self.conv1 = nn.Conv2d(3, CHANNELS, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.se = SELayer(CHANNELS, reduction)
        self.fc = nn.Linear(CHANNELS, num_classes)

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
        if self.compat == "original" and (x.shape[2] > 2 or x.shape[3] > 2):
            raise ValueError(
                f"compat='original' flattens the map before a linear layer from {CHANNELS} numbers and takes images up "
                f"to 2 x 2 pixels alone, got {tuple(x.shape)}: build SENet without compat"
            )
        x = self.se(self.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"compat={self.compat!r}"
