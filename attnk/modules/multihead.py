"""A drop-in for torch.nn.MultiheadAttention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attnk import dispatch
from attnk.modules._checks import backend_repr, check_share, check_sizes, check_tensor
from attnk.ops.softmax_attention import softmax_attention


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with fused attention: same arguments, keys, initial weights, masks and results.

    In a bool mask True means "must not attend", as there, and unlike in ``attnk.softmax_attention``. Queries, keys and
    values that are one tensor are projected at once and read where the product lies, in either order of batch and
    sequence. Weights are computed where they are asked for, beside the output and in plain PyTorch; with dropout in
    training they are those that were dropped, as in PyTorch, and then the output is computed from them.

    It differs from PyTorch's in this:

    - A query that may attend to nothing gets zeros from the attention (then ``out_proj.bias``), and its weights are
      0; PyTorch gives NaN with weights and in inference, and so do its gradients.
    - ``is_causal=True`` needs no ``attn_mask``. One that comes along is not read, whether weights are asked for or not:
      it must be the causal mask, as PyTorch says. With ``add_bias_kv`` or ``add_zero_attn`` it is read, if there is
      one, and all queries see the added keys (PyTorch hides them from most without weights).
    - Dropout without weights draws other elements from the same seed.
    - What does not fit raises ValueError or TypeError. TorchScript does not take the module.
    - Inside ``torch.nn.TransformerEncoderLayer`` it is what runs in inference too: a hook that does nothing keeps out
      the layer's own fused path, which would read its weights and leave it aside. Nested tensors do take PyTorch's.

    Args:
        embed_dim: channels of the queries and of the output.
        num_heads: heads; must divide ``embed_dim``.
        dropout: share of the attention weights to drop in training.
        bias: whether the projections have one.
        add_bias_kv: whether a learned key and value are appended to each sequence.
        add_zero_attn: whether a key and value of zeros are appended.
        kdim: channels of the keys; ``embed_dim`` by default.
        vdim: channels of the values; ``embed_dim`` by default.
        batch_first: whether batched inputs and outputs are (B, N, C), not (N, B, C).
        device: of the weights.
        dtype: of the weights.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, heads that do not divide ``embed_dim``, an unknown backend.
    """

    backend: str | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        check_sizes(embed_dim=embed_dim, num_heads=num_heads)
        check_sizes(**{name: size for name, size in (("kdim", kdim), ("vdim", vdim)) if size is not None})
        check_share("dropout", dropout)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}")
        if backend is not None:
            dispatch.check_backend(backend)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.backend = backend
        self.register_forward_pre_hook(_do_not_pass_by)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            query: (L, B, embed_dim), with ``batch_first`` (B, L, embed_dim), or (L, embed_dim).
            key: (S, B, kdim), (B, S, kdim) or (S, kdim), like the query.
            value: (S, B, vdim), (B, S, vdim) or (S, vdim), like the query.
            key_padding_mask: (B, S) or (S,); bool, True = no query attends there, or float, added to the logits.
            need_weights: whether to return the attention weights; they cost (B, num_heads, L, S) elements.
            attn_mask: (L, S) or (B num_heads, L, S); bool, True = must not attend, or float, added to the logits.
            average_attn_weights: whether the weights are averaged over the heads.
            is_causal: whether query i attends to the keys up to i alone, whatever ``attn_mask`` says.

        Returns:
            The output, shaped as the query, and the weights (B, L, S) or by head (B, num_heads, L, S), without B for
            inputs without a batch, or None.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        if getattr(query, "is_nested", False):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        self._check(query, key, value, key_padding_mask, attn_mask)
        batched, added = query.dim() == 3, (self.bias_k is not None) + self.add_zero_attn
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        if is_causal and not added:
            attn_mask = None
        elif is_causal and attn_mask is None:
            attn_mask = _later(q.shape[1], k.shape[1], q.device)
        mask, bias = self._merge(q, key_padding_mask, attn_mask, added)
        k, v = self._append(k, self.bias_k), self._append(v, self.bias_v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

        causal, dropout_p = is_causal and not added, self.dropout if self.training else 0.0
        weights = self._weights(q, k, mask, bias, causal) if need_weights else None
        if weights is not None and dropout_p > 0:
            weights = F.dropout(weights, dropout_p)
            out = weights @ v
        else:
            out = softmax_attention(q, k, v, bias, mask, is_causal=causal, dropout_p=dropout_p, backend=self.backend)

        out = out.transpose(1, 2)
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return self.out_proj(out.flatten(-2)), weights

    def _project(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """q, k and v, (..., num_heads, head_dim): views of as few products as there are different inputs."""
        inputs: tuple[torch.Tensor, ...] = (query, key, value)
        if self._qkv_same_embed_dim:
            if key is value:
                inputs = (query,) if query is key else (query, key)
            parts = {1: [3], 2: [1, 2], 3: [1, 1, 1]}[len(inputs)]
            weights = self.in_proj_weight.split([part * self.embed_dim for part in parts])
        else:
            parts, weights = [1, 1, 1], (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * len(parts)
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.split([part * self.embed_dim for part in parts])
        views: list[torch.Tensor] = []
        for x, weight, bias, part in zip(inputs, weights, biases, parts, strict=True):
            product = F.linear(x, weight, bias).unflatten(-1, (part, self.num_heads, self.head_dim))
            views += product.unbind(-3)
        return views

    def _append(self, x: torch.Tensor, learned: torch.Tensor | None) -> torch.Tensor:
        """Keys or values (B, S, num_heads, head_dim), and behind them the learned one and the one of zeros."""
        parts = [x]
        if learned is not None:
            parts.append(learned.to(x.dtype).view(1, 1, *x.shape[2:]).expand(x.shape[0], -1, -1, -1))
        if self.add_zero_attn:
            parts.append(x.new_zeros(x.shape[0], 1, *x.shape[2:]))
        return torch.cat(parts, 1) if len(parts) > 1 else x

    def _merge(
        self, q: torch.Tensor, key_padding_mask: torch.Tensor | None, attn_mask: torch.Tensor | None, added: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """A bool mask, True = attend, and a float bias, out of two masks of either kind; added keys are seen by all."""
        mask = bias = None
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.view(q.shape[0], 1, 1, key_padding_mask.shape[-1])
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (q.shape[0], self.num_heads))
        for given in (key_padding_mask, attn_mask):
            if given is not None and given.dtype == torch.bool:
                mask = ~given if mask is None else mask & ~given
            elif given is not None:
                bias = given if bias is None else bias + given
        if added:
            mask = None if mask is None else F.pad(mask, (0, added), value=True)
            bias = None if bias is None else F.pad(bias, (0, added))
        return mask, bias

    def _weights(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        mask: torch.Tensor | None,
        bias: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        """The attention weights (B, num_heads, L, S)."""
        logits = q * self.head_dim**-0.5 @ k.transpose(2, 3)
        if bias is not None:
            logits = logits + bias.to(logits.dtype)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        if causal:
            logits = logits.masked_fill(_later(logits.shape[2], logits.shape[3], logits.device), -torch.inf)
        if mask is None and bias is None:
            return logits.softmax(-1)
        unseeing = (logits == -torch.inf).all(-1, keepdim=True)
        return logits.masked_fill(unseeing, 0).softmax(-1).masked_fill(unseeing, 0)

    def _check(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
    ) -> None:
        weight = self.in_proj_weight if self._qkv_same_embed_dim else self.q_proj_weight
        tensors = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (x, channels) in tensors.items():
            check_tensor(name, x, weight)
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != channels:
                shapes = f"(B, N, {channels})" if self.batch_first else f"(N, B, {channels})"
                rank = "" if name == "query" else f", and have as many dimensions as query, {query.dim()}"
                raise ValueError(f"{name} must be {shapes} or (N, {channels}){rank}, got {tuple(x.shape)}")
        (batch, queries), (key_batch, keys) = self._batch_and_length(query), self._batch_and_length(key)
        if key_batch != batch:
            raise ValueError(f"key must have the batch size of query, {batch}, got {tuple(key.shape)}")
        if value.shape[:-1] != key.shape[:-1]:
            needed = (*key.shape[:-1], self.vdim)
            raise ValueError(f"value must have a row for each key, {needed}, got {tuple(value.shape)}")
        padding = (batch, keys) if query.dim() == 3 else (keys,)
        _check_mask("key_padding_mask", key_padding_mask, query, padding)
        _check_mask("attn_mask", attn_mask, query, (queries, keys), (batch * self.num_heads, queries, keys))

    def _batch_and_length(self, x: torch.Tensor) -> tuple[int, int]:
        if x.dim() == 2:
            return 1, x.shape[0]
        return (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        backend = backend_repr(self.backend)
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}{backend}"


def _check_mask(name: str, mask: torch.Tensor | None, query: torch.Tensor, *shapes: tuple[int, ...]) -> None:
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool or float tensor, got {kind}")
    if mask.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {mask.device}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")


def _later(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Where key j comes after query i: (queries, keys), bool."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)


def _do_not_pass_by(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing: torch.nn.TransformerEncoderLayer calls modules that have one."""
