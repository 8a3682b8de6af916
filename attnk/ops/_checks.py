"""Checks that operations make of their arguments; a message names the argument, what it got and what it needs."""

import torch

from ._calls import autocast_is_on

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_feature_map(name: str, x: torch.Tensor) -> None:
    """Raise unless x is a float (B, C, H, W) or (C, H, W) with at least one channel."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() not in (3, 4):
        raise ValueError(f"{name} must be (B, C, H, W) or (C, H, W), got {x.dim()} dimensions: {tuple(x.shape)}")
    if x.shape[-3] == 0:
        raise ValueError(f"{name} must have at least one channel, got {tuple(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def check_parameter(name: str, parameter: torch.Tensor, x: torch.Tensor) -> None:
    """Raise unless a parameter lies on the device of x and has its dtype (under autocast: any float dtype)."""
    if not isinstance(parameter, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(parameter).__name__}")
    if parameter.device != x.device:
        raise ValueError(
            f"{name} must be on the device of x, {x.device}, got {parameter.device} (module.to(x.device) moves it)"
        )
    if parameter.dtype != x.dtype:
        if not autocast_is_on(x):
            raise TypeError(
                f"{name} must have the dtype of x, {x.dtype}, got {parameter.dtype} (module.to(x.dtype), or autocast)"
            )
        if parameter.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {parameter.dtype}")
