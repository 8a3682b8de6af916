"""Attention on feature maps: layers for tokens put on maps, SAGAN's block, attention in place of pooling."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attnk import dispatch
from attnk.modules._checks import backend_repr, check_heads, check_sizes, check_tensor
from attnk.modules.position import SinusoidalPosition2d, resize_grid
from attnk.ops._checks import check_feature_map
from attnk.ops._watch import tell, watchers
from attnk.ops.softmax_attention import softmax_attention


class FeatureMapAttention(nn.Module):
    """A layer for tokens, put on a feature map: every pixel is a token.

    The layer sees a view of the map, (B, H W, C), whose dense axis is the channels' where the map is channels_last and
    the tokens' where it is contiguous; what it returns is viewed as a map again. Only a layer whose result lies
    otherwise than its input (``SelfAttention`` does not, whatever ends in a layer norm may) costs a copy at the end.

    Args:
        layer: takes tokens (B, N, C) and returns as many; ``SelfAttention``, ``TransformerEncoderLayer``, any other.
        position: called as ``position(height, width)``, returns (N, C) or (1, N, C), which is added to the tokens in
            their dtype.

    Raises:
        TypeError: a layer or position that is no module.
    """

    def __init__(self, layer: nn.Module, *, position: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layer must be a module, got {type(layer).__name__}")
        if position is not None and not isinstance(position, nn.Module):
            raise TypeError(f"position must be a module or None, got {type(position).__name__}")
        self.layer = layer
        self.position = position

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """Run the layer on the pixels.

        Args:
            x: (B, C, H, W) or (C, H, W), any strides. Maps that are neither contiguous nor channels_last, or a crop of
                either in height alone, are copied.
            options: passed on to the layer.

        Returns:
            A map of x's shape and memory format, in the dtype that the layer gives.

        Raises:
            ValueError, TypeError: a shape that does not fit, or what the layer raises; the message names it.
        """
        return attend_pixels(self.layer, x, self.position, **options)


def attend_pixels(layer: nn.Module, x: torch.Tensor, position: nn.Module | None = None, **options: Any) -> torch.Tensor:
    """What ``FeatureMapAttention(layer, position=position)`` makes of x, for those who hold the layer themselves."""
    check_feature_map("x", x)
    maps = x if x.dim() == 4 else x.unsqueeze(0)
    height, width = maps.shape[2:]
    tokens = maps.flatten(2).transpose(1, 2)
    if position is not None:
        options_of = {"like": tokens} if isinstance(position, SinusoidalPosition2d) else {}
        encoding = position(height, width, **options_of)
        if encoding.shape not in (tokens.shape[1:], (1, *tokens.shape[1:])):
            needed = f"(N, C) or (1, N, C) with N = {height * width}, C = {tokens.shape[2]}"
            raise ValueError(f"position must return {needed}, got {tuple(encoding.shape)}")
        tokens = tokens + encoding.to(tokens.dtype)
    out = layer(tokens, **options)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"layer must return a tensor, got {type(out).__name__}")
    if out.shape != tokens.shape:
        raise ValueError(f"layer must return tokens of shape {tuple(tokens.shape)}, got {tuple(out.shape)}")
    out = out.transpose(1, 2).unflatten(2, (height, width)).contiguous(memory_format=_memory_format(maps))
    return out if x.dim() == 4 else out.squeeze(0)


class SAGANAttention(nn.Module):
    """SAGAN's block (Zhang et al., 2019, https://arxiv.org/abs/1805.08318): ``gamma * o(attention) + x``.

    Queries are ``theta(x)``, keys and values ``phi(x)`` and ``g(x)`` with the maximum taken over 2 x 2 pixels; all are
    1 x 1 convolutions, and the logits are not scaled. gamma starts at 0, so that a new block is the identity. The keys
    of checkpoints are BigGAN-PyTorch's: ``theta.weight``, ``phi.weight``, ``g.weight``, ``o.weight`` and ``gamma``.
    Where height or width are odd, the last row or column is pooled by itself.

    Args:
        channels: channels of x and of the output; theta and phi have an eighth of them, g half, at least 1.
        conv: builds a convolution, called as ``conv(inputs, outputs, kernel_size=1, padding=0, bias=False)``; for the
            published training one that puts ``torch.nn.utils.parametrizations.spectral_norm`` on an ``nn.Conv2d``.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a number of channels that is no positive integer, an unknown backend.
    """

    def __init__(
        self, channels: int, *, conv: Callable[..., nn.Module] = nn.Conv2d, backend: str | None = None
    ) -> None:
        super().__init__()
        check_sizes(channels=channels)
        if backend is not None:
            dispatch.check_backend(backend)
        self.channels = channels
        self.backend = backend
        inner, half = max(1, channels // 8), max(1, channels // 2)
        self.theta = conv(channels, inner, kernel_size=1, padding=0, bias=False)
        self.phi = conv(channels, inner, kernel_size=1, padding=0, bias=False)
        self.g = conv(channels, half, kernel_size=1, padding=0, bias=False)
        self.o = conv(half, channels, kernel_size=1, padding=0, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, channels, H, W) or (channels, H, W), in the dtype of the weights (under autocast, any float dtype),
                with at least one pixel.

        Returns:
            A map of x's shape, memory format and dtype.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_pixels(x, self.channels, self.gamma)
        maps = x if x.dim() == 4 else x.unsqueeze(0)
        keys = F.max_pool2d(self.phi(maps), 2, ceil_mode=True)
        values = F.max_pool2d(self.g(maps), 2, ceil_mode=True)
        q, k, v = (each.flatten(2).mT.unsqueeze(1) for each in (self.theta(maps), keys, values))
        out = softmax_attention(q, k, v, scale=1.0, backend=self.backend)
        out = self.o(out.squeeze(1).mT.unflatten(2, maps.shape[2:]))
        out = torch.addcmul(maps, self.gamma, out)
        return out if x.dim() == 4 else out.squeeze(0)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"channels={self.channels}" + backend_repr(self.backend)


class AttentionPool2d(nn.Module):
    """Attention in place of global average pooling at a network's end (CLIP, https://arxiv.org/abs/2103.00020).

    The mean over the pixels is the query, the mean and the pixels are keys and values, all with a learned position. A
    drop-in for CLIP's class of that name, with its keys: ``positional_embedding``, ``{q,k,v,c}_proj.{weight,bias}``.

    As there is one query, the projections of keys and values change places with the attention: in each head,
    ``q^T (W_k x) = (W_k^T q)^T x`` and ``sum w (W_v x + b_v) = W_v (sum w x) + b_v``. A pixel then takes
    ``embed_dim / num_heads`` times fewer operations, and the map is read where it lies. This is plain PyTorch on every
    backend; ``k_proj`` and ``v_proj`` hold weights and are not called: hooks on them never fire.

    Args:
        spacial_dim: height and width of the maps the positions are for, as CLIP spells it.
        embed_dim: channels of the maps.
        num_heads: heads; a divisor of ``embed_dim``.
        output_dim: channels of the output; ``embed_dim`` by default.

    Raises:
        ValueError: a size that is no positive integer, ``embed_dim`` that the heads do not divide.
    """

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads: int, output_dim: int | None = None) -> None:
        super().__init__()
        check_sizes(spacial_dim=spacial_dim)
        check_heads(embed_dim, num_heads)
        output_dim = embed_dim if output_dim is None else output_dim
        check_sizes(output_dim=output_dim)
        self.spacial_dim = spacial_dim
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(spacial_dim**2 + 1, embed_dim) / embed_dim**0.5)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, output_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool.

        Args:
            x: (B, embed_dim, H, W) or (embed_dim, H, W), in the dtype of the projections (under autocast, any float
                dtype), with at least one pixel. To a height and width other than ``spacial_dim`` the positions are
                resized bicubically, as ``LearnedPosition2d`` does it.

        Returns:
            (B, output_dim) or (output_dim,), in the dtype of x (under autocast, the autocast dtype).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_pixels(x, self.embed_dim, self.q_proj.weight)
        maps = x if x.dim() == 4 else x.unsqueeze(0)
        position = self._position(*maps.shape[2:]).to(x.dtype)  # (N + 1, C)
        pixels = maps.flatten(2)  # (B, C, N)
        mean = pixels.mean(2)
        q = self.q_proj(mean + position[0]) * (self.embed_dim // self.num_heads) ** -0.5
        q, key_weight, key_bias, value_weight, value_bias = (
            each.unflatten(axis, (self.num_heads, -1))
            for each, axis in (
                (q, 1), (self.k_proj.weight, 0), (self.k_proj.bias, 0), (self.v_proj.weight, 0), (self.v_proj.bias, 0),
            )
        )  # fmt: skip
        asked = torch.einsum("bhd,hdc->bhc", q, key_weight)
        logits = torch.cat([asked @ mean.unsqueeze(2), asked @ pixels], 2) + asked @ position.mT  # (B, heads, N + 1)
        logits = logits + (q * key_bias).sum(2, keepdim=True)  # moves no weight, but has a gradient, of zeros
        weights = logits.softmax(2)
        if watchers:
            tell("attention_weights", weights=weights.unsqueeze(2))
        answer = weights[..., :1] * mean.unsqueeze(1) + weights[..., 1:] @ pixels.mT + weights @ position
        answer = torch.einsum("bhc,hdc->bhd", answer, value_weight) + value_bias
        out = self.c_proj(answer.flatten(1))
        return out if x.dim() == 4 else out.squeeze(0)

    def _position(self, height: int, width: int) -> torch.Tensor:
        position = self.positional_embedding
        if (height, width) == (self.spacial_dim, self.spacial_dim):
            return position
        grid = resize_grid(position[1:].unflatten(0, (self.spacial_dim, self.spacial_dim)), height, width)
        return torch.cat([position[:1], grid.flatten(0, 1)])

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"spacial_dim={self.spacial_dim}, num_heads={self.num_heads}"


def _memory_format(maps: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if maps.stride(1) < maps.stride(3) else torch.contiguous_format


def check_pixels(x: torch.Tensor, channels: int, parameter: torch.Tensor) -> None:
    """Raise unless x is a map of so many channels and at least one pixel that fits a module's parameters."""
    check_feature_map("x", x)
    check_tensor("x", x, parameter)
    if x.shape[-3] != channels or x.shape[-2] * x.shape[-1] == 0:
        needed = f"(B, C, H, W) or (C, H, W) with C = {channels} and at least one pixel"
        raise ValueError(f"x must be {needed}, got {tuple(x.shape)}")
