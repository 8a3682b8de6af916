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
    order = _order(like)
    places = sorted(range(like.dim()), key=order.__getitem__)
    return like.new_empty([size[axis] for axis in order], dtype=dtype or like.dtype).permute(places)


def in_order(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it has the strides that ``empty_in_order`` would give it, else a copy that has them."""
    step, strides = 1, list(tensor.shape)
    for axis in reversed(_order(like)):
        strides[axis] = step
        step *= max(tensor.shape[axis], 1)
    if list(tensor.stride()) == strides:
        return tensor
    return empty_in_order(like, tensor.shape, tensor.dtype).copy_(tensor)


def _order(like: torch.Tensor) -> list[int]:
    """A tensor's axes from the outermost in memory to the innermost."""
    strides = like.stride()
    return sorted(range(like.dim()), key=lambda axis: -strides[axis] if strides[axis] else -torch.inf)
