"""A batch norm in evaluation mode folded into the convolution before it."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm


def fold_batch_norm(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: _BatchNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the one convolution that equals a convolution and a batch norm in evaluation mode.

    Args:
        weight: (1, 2, k, k).
        bias: (1,) or None.
        norm: a batch norm of one channel with running statistics.

    Returns:
        The folded weight (1, 2, k, k) and bias (1,), differentiable.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = (-norm.running_mean if bias is None else bias - norm.running_mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return (weight * scale).to(weight.dtype), shift.to(weight.dtype)
