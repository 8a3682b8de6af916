"""The definition of the coordinate gate (Hou et al., 2021, https://arxiv.org/abs/2103.02907)."""

import torch


def coordinate_gate_reference(x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor) -> torch.Tensor:
    """``attnk.coordinate_gate`` as a formula: differentiable any number of times, slow, and the oracle of the tests.

    Args:
        x: (B, C, H, W).
        gate_h: (B, C, H, 1), a gate for every row.
        gate_w: (B, C, 1, W), a gate for every column.

    Returns:
        (B, C, H, W) in x's dtype.
    """
    return (x * gate_w * gate_h).to(x.dtype)


def coordinate_pool_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of x (B, C, H, W) over the width, (B, C, H, 1), and the height, (B, C, 1, W); 0 where there is nothing."""
    height = x.mean(3, keepdim=True) if x.shape[3] else x.sum(3, keepdim=True)
    width = x.mean(2, keepdim=True) if x.shape[2] else x.sum(2, keepdim=True)
    return height, width
