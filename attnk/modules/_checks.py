"""Checks that modules make of their arguments; a message names the argument, what it got and what it needs."""

import math

import torch
from torch import nn

from attnk.ops._calls import autocast_is_on


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless all are positive integers."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def check_positive(**numbers: float) -> None:
    """Raise ValueError unless all are positive finite numbers."""
    for name, number in numbers.items():
        if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < math.inf:
            raise ValueError(f"{name} must be a positive number, got {number!r}")


def check_kernel_size(kernel_size: int, otherwise: str = "") -> None:
    """Raise ValueError unless it is an odd positive integer; ``otherwise`` says what else it might have been."""
    if not isinstance(kernel_size, int) or isinstance(kernel_size, bool) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be an odd positive integer{otherwise}, got {kernel_size!r}")


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless value lies between 0 and 1."""
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")


def check_heads(embed_dim: int, num_heads: int) -> None:
    """Raise ValueError unless both are positive integers and the one is divisible by the other."""
    check_sizes(embed_dim=embed_dim, num_heads=num_heads)
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim must be divisible by num_heads, got embed_dim={embed_dim}, num_heads={num_heads}")


def check_tensor(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise unless x is a tensor on the device of a module's weight, in its dtype (under autocast, any float dtype)."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.device != weight.device:
        raise ValueError(f"{name} must be on the device of the module, {weight.device}, got {x.device}")
    if x.dtype != weight.dtype and not (autocast_is_on(x) and x.is_floating_point()):
        raise TypeError(f"{name} must have the dtype of the module, {weight.dtype}, got {x.dtype} (or autocast)")


def check_shape(name: str, x: torch.Tensor, needed: str, axis: int, channels: int) -> None:
    """Raise ValueError unless x has as many axes as a shape in words, and on one of them so many channels."""
    names = needed.strip("()").split(", ")
    if x.dim() != len(names) or x.shape[axis] != channels:
        raise ValueError(f"{name} must be {needed} with {names[axis]} = {channels}, got {tuple(x.shape)}")


def as_batch(x: torch.Tensor, weight: torch.Tensor, channels: int) -> torch.Tensor:
    """x (B, C, H, W), or (1, C, H, W) of one without a batch, checked against a module's weight and channels."""
    check_tensor("x", x, weight)
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(f"x must be (B, C, H, W) or (C, H, W) with C = {channels}, got {tuple(x.shape)}")
    return x if x.dim() == 4 else x.unsqueeze(0)


def without_batch(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What was made of ``as_batch(x)``, without a batch where x has none."""
    return out if x.dim() == 4 else out.squeeze(0)


def check_tokens(x: torch.Tensor, embed_dim: int, linear: nn.Module) -> None:
    """Raise unless x is (B, N, embed_dim) and fits the linear map that is about to read it."""
    if isinstance(linear, nn.Linear):
        check_tensor("x", x, linear.weight)
    check_shape("x", x, "(B, N, embed_dim)", 2, embed_dim)


def backend_repr(backend: str | None) -> str:
    """What a module says of a backend of its own."""
    return "" if backend is None else f", backend={backend!r}"
