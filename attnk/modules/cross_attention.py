"""Attention from one sequence or map to another."""

import torch
from torch import nn

from attnk import dispatch
from attnk.modules._checks import backend_repr, check_shape, check_share, check_sizes, check_tensor
from attnk.ops.softmax_attention import softmax_attention


class _CrossAttention(nn.Module):
    """What cross-attention on tokens and on maps share: sizes, options, four projections."""

    def __init__(
        self,
        dim: int,
        context_dim: int | None,
        num_heads: int,
        key_dim: int | None,
        value_dim: int | None,
        dropout: float,
        bias: bool,
        backend: str | None,
    ) -> None:
        super().__init__()
        context_dim = dim if context_dim is None else context_dim
        check_sizes(dim=dim, context_dim=context_dim, num_heads=num_heads)
        for name, size in (("key_dim", key_dim), ("value_dim", value_dim)):
            if size is None and dim % num_heads:
                raise ValueError(f"dim must be divisible by num_heads without {name}, got {dim} and {num_heads}")
        key_dim = dim // num_heads if key_dim is None else key_dim
        value_dim = dim // num_heads if value_dim is None else value_dim
        check_sizes(key_dim=key_dim, value_dim=value_dim)
        check_share("dropout", dropout)
        if backend is not None:
            dispatch.check_backend(backend)
        self.dim, self.context_dim = dim, context_dim
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.dropout = dropout
        self.backend = backend
        self.q_proj = self._projection(dim, num_heads * key_dim, bias)
        self.k_proj = self._projection(context_dim, num_heads * key_dim, bias)
        self.v_proj = self._projection(context_dim, num_heads * value_dim, bias)
        self.out_proj = self._projection(num_heads * value_dim, dim, bias)

    def _projection(self, inputs: int, outputs: int, bias: bool) -> nn.Linear | nn.Conv2d:
        raise NotImplementedError

    def _check(self, x: torch.Tensor, context: torch.Tensor, needed: tuple[str, str], axis: int) -> None:
        names, channels, layers = ("x", "context"), (self.dim, self.context_dim), (self.q_proj, self.k_proj)
        for name, tensor, size, layer, shape in zip(names, (x, context), channels, layers, needed, strict=True):
            if isinstance(layer, nn.Linear | nn.Conv2d):  # it may have been replaced
                check_tensor(name, tensor, layer.weight)
            check_shape(name, tensor, shape, axis, size)
            if axis == 1 and tensor.shape[2] * tensor.shape[3] == 0:
                raise ValueError(f"{name} must have at least one pixel, got {tuple(tensor.shape)}")
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"context must have the batch size of x, {x.shape[0]}, got {tuple(context.shape)}")

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        dropout_p = self.dropout if self.training else 0.0
        return softmax_attention(q, k, v, bias, mask, dropout_p=dropout_p, backend=self.backend)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        backend = backend_repr(self.backend)
        heads = f"num_heads={self.num_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}"
        return f"{heads}, dropout={self.dropout}{backend}"


class CrossAttention(_CrossAttention):
    """Attention of one sequence to another (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762).

    ``out_proj(softmax(q_proj(x + query_pos) k_proj(context + key_pos)^T / sqrt(key_dim)) v_proj(context))``, by head.
    The parameters have the names of transformers' (DETR, CLIP) and SAM's attention, ``q_proj``, ``k_proj``, ``v_proj``
    and ``out_proj``, so that their checkpoints load. Positions go into queries and keys alone, as in DETR's decoder
    (https://arxiv.org/abs/2005.12872). There is no residual.

    Args:
        dim: channels of x and of the output.
        context_dim: channels of the context; ``dim`` by default.
        num_heads: heads.
        key_dim: channels of a query and of a key in one head; ``dim // num_heads`` by default.
        value_dim: channels of a value in one head; ``dim // num_heads`` by default.
        dropout: share of the attention weights to drop in training.
        bias: whether the projections have one.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, ``dim`` that the heads do not divide, an unknown option.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        num_heads: int = 8,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, context_dim, num_heads, key_dim, value_dim, dropout, bias, backend)

    def _projection(self, inputs: int, outputs: int, bias: bool) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        bias: torch.Tensor | None = None,
        query_pos: torch.Tensor | None = None,
        key_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, Nq, dim), in the dtype of the weights (under autocast, any float dtype).
            context: (B, Nk, context_dim).
            mask: bool, broadcasts to (B, num_heads, Nq, Nk); True = attend. What sees nothing gets the bias of
                ``out_proj``.
            bias: float, broadcasts alike; added to the logits, with gradient.
            query_pos: broadcasts to x; added to it for the queries.
            key_pos: broadcasts to the context; added to it for the keys, not for the values.

        Returns:
            (B, Nq, dim), in the dtype of x (under autocast, the autocast dtype).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        self._check(x, context, ("(B, Nq, dim)", "(B, Nk, context_dim)"), 2)
        q = self.q_proj(shifted("query_pos", query_pos, x))
        k = self.k_proj(shifted("key_pos", key_pos, context))
        v = self.v_proj(context)
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (q, k, v))
        return self.out_proj(self._attend(q, k, v, mask, bias).transpose(1, 2).flatten(2))


class CrossScaleAttention(_CrossAttention):
    """Attention from every pixel of one feature map to all pixels of another, of another size and channel count.

    The projections are 1 x 1 convolutions, under the names of ``CrossAttention``. Maps are read where they lie,
    contiguous or channels_last, and never permuted; nothing of a map's size is copied but what is projected.

    Args:
        dim: channels of x and of the output.
        context_dim: channels of the context; ``dim`` by default.
        num_heads: heads.
        key_dim: channels of a query and of a key in one head; ``dim // num_heads`` by default.
        value_dim: channels of a value in one head; ``dim // num_heads`` by default.
        residual: whether x is added to the result; yes by default, as feature pyramids
            (https://arxiv.org/abs/1612.03144) add what comes from another scale to the map they have.
        dropout: share of the attention weights to drop in training.
        bias: whether the projections have one.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, ``dim`` that the heads do not divide, an unknown option.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        num_heads: int = 8,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        residual: bool = True,
        dropout: float = 0.0,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, context_dim, num_heads, key_dim, value_dim, dropout, bias, backend)
        self.residual = residual

    def _projection(self, inputs: int, outputs: int, bias: bool) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, 1, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        bias: torch.Tensor | None = None,
        query_pos: torch.Tensor | None = None,
        key_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, dim, H, W), in the dtype of the weights (under autocast, any float dtype); its pixels are queries.
            context: (B, context_dim, H', W'); its pixels are keys and values.
            mask: bool, broadcasts to (B, num_heads, H W, H' W'); True = attend.
            bias: float, broadcasts alike; added to the logits, with gradient.
            query_pos: broadcasts to x; added to it for the queries.
            key_pos: broadcasts to the context; added to it for the keys, not for the values.

        Returns:
            (B, dim, H, W), in the memory format of x and its dtype (under autocast without residual, the autocast
            dtype).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        self._check(x, context, ("(B, dim, H, W)", "(B, context_dim, H, W)"), 1)
        q = self.q_proj(shifted("query_pos", query_pos, x))
        k = self.k_proj(shifted("key_pos", key_pos, context))
        v = self.v_proj(context)
        q, k, v = (each.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3) for each in (q, k, v))
        out = self._attend(q, k, v, mask, bias).transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        channels_last = x.stride(1) < x.stride(3)
        out = self.out_proj(out)
        out = out.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        return x + out if self.residual else out

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"{super().extra_repr()}, residual={self.residual}"


def shifted(name: str, position: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """x + position in the dtype of x, or x itself where there is none; ValueError unless it broadcasts to x."""
    if position is None:
        return x
    sizes = zip(position.shape[::-1], x.shape[::-1], strict=False)
    if position.dim() > x.dim() or any(mine not in (1, size) for mine, size in sizes):
        raise ValueError(f"{name} must broadcast to {tuple(x.shape)}, got {tuple(position.shape)}")
    return x + position.to(x.dtype)
