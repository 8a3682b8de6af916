"""What the networks share: checks of arguments and images, and the count of parameters."""

import torch
from torch import nn

from attnk.modules._checks import check_shape, check_tensor


def check_compat(compat: str | None) -> None:
    """Raise ValueError unless compat is None or "original"."""
    if compat not in (None, "original"):
        raise ValueError(f"compat must be None or 'original', got {compat!r}")


def check_images(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise unless x is images (B, 3, H, W) that fit a network's first weight."""
    check_tensor("x", x, weight)
    check_shape("x", x, "(B, C, H, W)", 1, 3)


def check_patch(x: torch.Tensor, patch_size: int) -> None:
    """Raise unless images (B, C, H, W) have at least one patch."""
    if min(x.shape[2:]) < patch_size:
        raise ValueError(f"x must have at least one patch of {patch_size} pixels a side, got {tuple(x.shape)}")


def count_parameters(model: nn.Module) -> int:
    """How many numbers of a model are trained: those of the parameters that require a gradient, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
