"""Folding: what is linear inside a model becomes one convolution."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from attnk.modules._probe import PROBE_ERRORS, agree, fingerprint, probe_copy, probe_map
from attnk.modules.c2f import C2fModule
from attnk.modules.cbam import CBAM
from attnk.modules.spatial import SpatialAttention
from attnk.ops._batch_norm import fold_batch_norm

MAX_ERROR = 1e-5  # of the largest value
TRIAL_CHANNELS = 8  # of the random map for a module that takes any number


class ConvGate(nn.Module):
    """``x * sigmoid(conv(x))``, a k x k convolution to one channel: what ``fold`` makes of ``C2fModule``.

    Args:
        in_channels: channels of x.
        kernel_size: k, odd.
    """

    def __init__(self, in_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 1, kernel_size, padding=kernel_size // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate (B, C, H, W), or (C, H, W)."""
        return x * torch.sigmoid(self.conv(x))


def fold(module: nn.Module) -> nn.Module:
    """A copy of a model that computes the same, with what is linear in it folded into one convolution.

    Folded are, anywhere in the model and itself included:

    - ``C2fModule(compat="original")``, and pasted copies of that class, recognised by their keys and shapes and by
      running them: ``conv1``, ``conv2`` and ``attention`` become one 3 x 3 convolution of ``9 * in_channels + 1``
      numbers (577 instead of 147,841 for 64 to 128 channels). The copy holds a ``ConvGate`` in its place.
    - the batch norm of a ``SpatialAttention(norm=True)``, and of a ``CBAM(norm=True)``'s spatial half, that is in
      evaluation mode and has running statistics: it becomes part of the convolution, which then has a bias.

    All else is copied as it is, and so is a module to be folded that has forward hooks on itself or inside. Whatever is
    shared in the model is shared in the copy. Modules in training mode whose batch norm follows the batch are left:
    call ``model.eval()`` first.

    Args:
        module: any module. It is not changed.

    Returns:
        The copy, in the same modes, on the same devices and in the same dtypes.

    Raises:
        TypeError: it is no module.
        ValueError: on a random map a folded part is off by more than 1e-5 of the largest value. That happens with
            float16 or bfloat16 weights, which round what is folded: fold in float32 first. The message names the part.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    return _fold(copy.deepcopy(module), "", {})


def _fold(module: nn.Module, path: str, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:
        return done[module]
    done[module] = module
    folded = None if _is_watched(module) else _folded(module)
    if folded is not None:
        _check_error(module, folded, path)
        done[module] = folded
        return folded
    if not isinstance(module, torch.jit.ScriptModule):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _fold(child, f"{path}.{name}" if path else name, done)
    return module


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks would no longer fire, or fire with other values."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def _folded(module: nn.Module) -> nn.Module | None:
    """The folded module, or None where there is nothing to fold."""
    if isinstance(module, SpatialAttention) and _is_constant(module.bn):
        folded = copy.deepcopy(module)
        folded.conv1, folded.bn = _fold_norm(module.conv1, module.bn), None  # type: ignore[arg-type]
        return folded
    if isinstance(module, CBAM) and _is_constant(module.spatial_attention.bn):
        folded_cbam = copy.deepcopy(module)
        half = folded_cbam.spatial_attention
        half.conv, half.bn = _fold_norm(half.conv, half.bn), None  # type: ignore[arg-type]
        return folded_cbam
    if _is_c2f_module(module):
        return _fold_convolutions(module)
    return None


def _is_constant(norm: nn.Module | None) -> bool:
    return isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None


@torch.no_grad()
def _fold_norm(conv: nn.Conv2d, norm: _BatchNorm) -> nn.Conv2d:
    """One convolution for a convolution and a batch norm in evaluation mode."""
    kernel_size = conv.kernel_size[0]
    folded = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2).to(conv.weight.device, conv.weight.dtype)
    bias = None if conv.bias is None else conv.bias.double()
    weight, bias = fold_batch_norm(conv.weight.double(), bias, norm)
    folded.weight.copy_(weight)
    folded.bias.copy_(bias)  # type: ignore[union-attr]
    return folded.requires_grad_(conv.weight.requires_grad).train(conv.training)


@torch.no_grad()
def _fold_convolutions(module: nn.Module) -> ConvGate:
    """Of ``attention(conv1(x) + conv2(x))`` the one convolution that it is."""
    parts: Any = module
    conv1, conv2, attention = parts.conv1, parts.conv2, parts.attention
    mix = attention.weight.double().flatten(1)  # (1, out_channels)
    weight = torch.tensordot(mix, conv1.weight.double() + conv2.weight.double(), 1)
    bias = mix @ (conv1.bias.double() + conv2.bias.double()) + attention.bias.double()
    folded = ConvGate(weight.shape[1]).to(conv1.weight.device, conv1.weight.dtype)
    folded.conv.weight.copy_(weight)
    folded.conv.bias.copy_(bias)  # type: ignore[union-attr]
    trained = any(parameter.requires_grad for parameter in module.parameters())
    return folded.requires_grad_(trained).train(module.training)


def _is_c2f_module(module: nn.Module) -> bool:
    """Whether a module is ``C2fModule`` as published, or a copy: by keys and shapes, and then by running it."""
    if isinstance(module, C2fModule):
        return module.compat == "original"
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    inner, width = shapes.get("conv1.weight", (0, 0))[:2]
    expected = {
        "conv1.weight": (inner, width, 3, 3),
        "conv1.bias": (inner,),
        "conv2.weight": (inner, width, 3, 3),
        "conv2.bias": (inner,),
        "attention.weight": (1, inner, 1, 1),
        "attention.bias": (1,),
    }
    if shapes != expected or set(dict(module.named_parameters())) != set(expected):
        return False
    try:
        probe = probe_copy(module)
        candidate = _fold_convolutions(probe)
        x = probe_map(2, width, 5, 6)
        return agree(fingerprint(probe, x), fingerprint(candidate, x))
    except PROBE_ERRORS:
        return False


@torch.no_grad()
def _check_error(module: nn.Module, folded: nn.Module, path: str) -> None:
    """Run both on a random map in float64, with the weights they have."""
    weight = next(folded.parameters())
    channels = weight.shape[1] if isinstance(folded, ConvGate) else TRIAL_CHANNELS
    if isinstance(folded, CBAM):
        channels = folded.channel_attention.channels
    side = weight.shape[-1] + 4
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, side, side + 1, generator=generator, dtype=torch.float64)
    expected, out = _run(module, x), _run(folded, x)
    error = ((out - expected).abs().max() / expected.abs().max()).item()
    if not error < MAX_ERROR:
        where = f"{path} ({type(module).__qualname__})" if path else type(module).__qualname__
        raise ValueError(
            f"{where} cannot be folded in {weight.dtype}: on a random map the result is off by {error:.1e} of its "
            f"largest value, and at most {MAX_ERROR:.0e} is allowed; fold the model in a wider dtype, then convert it"
        )


def _run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    module = copy.deepcopy(module).to("cpu", torch.float64)
    if isinstance(module, SpatialAttention | CBAM):
        module.backend = "reference"
    return module(x)
