"""Attention in time linear in tokens: EfficientViT's and SANA's projections around it, and efficient attention."""

import torch
from torch import nn

from attnk import dispatch
from attnk.modules._checks import backend_repr, check_shape, check_sizes, check_tokens
from attnk.modules.feature_map import check_pixels
from attnk.modules.self_attention import is_channel_major, merge_heads, project, split_heads
from attnk.ops.linear_attention import check_eps, linear_attention


class LinearAttention(nn.Module):
    """Multi-head linear attention, ``proj(phi(q) (phi(k)^T v) / (phi(q) sum(phi(k)) + eps))``, by head.

    q, k and v come from one projection and are read as views of it. Keys are those of SANA's ``LiteLA``
    (https://arxiv.org/abs/2410.10629) without normalization of q and k: ``qkv.weight`` (and ``qkv.bias``), its rows
    queries, keys, values, each head by head, and ``proj.{weight,bias}``. The feature maps are those of
    ``attnk.linear_attention``.

    Args:
        dim: channels of x and of the output.
        num_heads: heads; a divisor of ``dim``.
        feature_map: "relu", "elu" or "softmax".
        qkv_bias: whether the projection of queries, keys and values has a bias.
        eps: added to the denominators; None for the published one. Not for "softmax".
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, ``dim`` that the heads do not divide, an unknown option.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        feature_map: str = "relu",
        *,
        qkv_bias: bool = False,
        eps: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, num_heads=num_heads)
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got dim={dim}, num_heads={num_heads}")
        check_eps(feature_map, eps)
        if backend is not None:
            dispatch.check_backend(backend)
        self.dim = dim
        self.num_heads = num_heads
        self.feature_map = feature_map
        self.eps = eps
        self.backend = backend
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            x: tokens (B, N, dim) or a map (B, dim, H, W), whose pixels are tokens, in the dtype of the weights (under
                autocast, any float dtype), any strides.

        Returns:
            As x, in its memory format and dtype (under autocast, the autocast dtype).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        if isinstance(x, torch.Tensor) and x.dim() == 4:
            check_shape("x", x, "(B, C, H, W)", 1, self.dim)
            out = self.forward(x.flatten(2).mT)
            memory_format = torch.channels_last if x.stride(1) < x.stride(3) else torch.contiguous_format
            return out.mT.unflatten(2, x.shape[2:]).contiguous(memory_format=memory_format)
        check_tokens(x, self.dim, self.qkv)
        channel_major = is_channel_major(x)
        qkv = project(self.qkv, x, channel_major)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        out = linear_attention(q, k, v, feature_map=self.feature_map, eps=self.eps, backend=self.backend)
        return project(self.proj, merge_heads(out), channel_major)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        eps = "" if self.eps is None else f", eps={self.eps}"
        return f"num_heads={self.num_heads}, feature_map={self.feature_map!r}{eps}" + backend_repr(self.backend)


class EfficientAttention(nn.Module):
    """Efficient attention (Shen et al., 2018, https://arxiv.org/abs/1812.01243) with its residual, on feature maps.

    ``reprojection(softmax(queries) (softmax(keys)^T values)) + x``, by head: queries by softmax over a head's channels,
    keys over pixels. A drop-in for the published class of that name, with its keys:
    ``{keys,queries,values,reprojection}.{weight,bias}``, all 1 x 1 convolutions.

    Args:
        in_channels: channels of x and of the output.
        key_channels: channels of keys and queries, of all heads.
        head_count: heads; a divisor of ``key_channels`` and of ``value_channels``.
        value_channels: channels of values, of all heads.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, channels that the heads do not divide, an unknown backend.
    """

    def __init__(
        self, in_channels: int, key_channels: int, head_count: int, value_channels: int, *, backend: str | None = None
    ) -> None:
        super().__init__()
        check_sizes(
            in_channels=in_channels, key_channels=key_channels, head_count=head_count, value_channels=value_channels
        )
        for name, channels in (("key_channels", key_channels), ("value_channels", value_channels)):
            if channels % head_count:
                raise ValueError(
                    f"{name} must be divisible by head_count, got {name}={channels}, head_count={head_count}"
                )
        if backend is not None:
            dispatch.check_backend(backend)
        self.in_channels = in_channels
        self.key_channels = key_channels
        self.head_count = head_count
        self.value_channels = value_channels
        self.backend = backend
        self.keys = nn.Conv2d(in_channels, key_channels, 1)
        self.queries = nn.Conv2d(in_channels, key_channels, 1)
        self.values = nn.Conv2d(in_channels, value_channels, 1)
        self.reprojection = nn.Conv2d(value_channels, in_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, in_channels, H, W) or (in_channels, H, W), in the dtype of the weights (under autocast, any float
                dtype), with at least one pixel.

        Returns:
            A map of x's shape and memory format, in its dtype (under autocast, as ``reprojection(...) + x`` has it).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_pixels(x, self.in_channels, self.keys.weight)
        maps = x if x.dim() == 4 else x.unsqueeze(0)
        q, k, v = (
            conv(maps).unflatten(1, (self.head_count, -1)).flatten(3).mT
            for conv in (self.queries, self.keys, self.values)
        )
        out = linear_attention(q, k, v, feature_map="softmax", backend=self.backend)
        out = self.reprojection(out.mT.flatten(1, 2).unflatten(2, maps.shape[2:])) + maps
        return out if x.dim() == 4 else out.squeeze(0)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"head_count={self.head_count}" + backend_repr(self.backend)
