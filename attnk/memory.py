"""How results lie in memory: one rule for kernels, PyTorch paths and fake tensors."""

from collections.abc import Sequence

import torch


def empty_in_order(like: torch.Tensor, size: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """An empty dense tensor whose axes lie in memory in the order that those of another do.

    Args:
        like: a tensor of as many axes; its device is taken over, and its dtype unless one is given.
        size: the size.
        dtype: the dtype.

    Returns:
        The tensor. Axes along which ``like`` was expanded (stride 0) go outermost.
    """
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda axis: -strides[axis] if strides[axis] else -torch.inf)
    places = sorted(range(like.dim()), key=order.__getitem__)
    return like.new_empty([size[axis] for axis in order], dtype=dtype or like.dtype).permute(places)
