"""Self-attention on tokens: the tutorials' classes, under their names and keys."""

import torch
from torch import nn

from attnk import dispatch
from attnk.modules._checks import backend_repr, check_heads, check_share, check_sizes, check_tokens
from attnk.ops._calls import autocast_is_on
from attnk.ops.softmax_attention import softmax_attention


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762).

    ``out_proj(softmax(q k^T / sqrt(head_dim)) v)``, by head, with q, k and v from one projection and no residual. A
    drop-in for the tutorials' class of that name whose keys are ``qkv_proj.{weight,bias}`` and
    ``out_proj.{weight,bias}``; the projection's rows are queries, keys, values, each head by head.

    q, k and v are views of the projection. Tokens of a contiguous feature map, ``x.flatten(2).transpose(1, 2)``, whose
    token axis is the dense one, are read as they lie on a GPU, and the output of such tokens lies alike.

    Args:
        embed_dim: channels of x and of the output.
        num_heads: heads; a divisor of ``embed_dim``.
        dropout: share of the attention weights to drop in training.
        qkv_bias: whether the projection of queries, keys and values has a bias.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, ``embed_dim`` that the heads do not divide, an unknown option.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        dropout: float = 0.1,
        *,
        qkv_bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        check_share("dropout", dropout)
        if backend is not None:
            dispatch.check_backend(backend)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.backend = backend
        self.qkv_proj = nn.Linear(embed_dim, embed_dim * 3, bias=qkv_bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        is_causal: bool = False,
        bias_table: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, N, embed_dim), in the dtype of the weights (under autocast, any float dtype), any strides.
            bias: float, broadcasts to (B, num_heads, N, N); added to the logits, with gradient.
            mask: bool, broadcasts alike; True = attend. A token that sees none gets the bias of ``out_proj``.
            is_causal: whether a token sees itself and the ones before it alone.
            bias_table: ((2 height - 1) (2 width - 1), num_heads), a bias by relative position, in the order of Swin's
                (https://arxiv.org/abs/2103.14030), with gradient; needs ``grid``.
            grid: (height, width) of the tokens.

        Returns:
            (B, N, embed_dim), in the dtype of x (under autocast, the autocast dtype).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_tokens(x, self.embed_dim, self.qkv_proj)
        channel_major = is_channel_major(x)
        qkv = project(self.qkv_proj, x, channel_major and attends_channel_major(self.qkv_proj, x))
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        out = softmax_attention(
            q, k, v, bias, mask,
            is_causal=is_causal, dropout_p=self.dropout.p if self.dropout.training else 0.0,
            bias_table=bias_table, grid=grid, backend=self.backend,
        )  # fmt: skip
        return project(self.out_proj, merge_heads(out), channel_major)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"num_heads={self.num_heads}" + backend_repr(self.backend)


class MultiHeadSelfAttention(nn.Module):
    """Multi-head self-attention with its residual inside, ``fc(softmax(q k^T / sqrt(head_dim)) v) + x``.

    A drop-in for the tutorials' class of that name: keys ``query``, ``key``, ``value`` and ``fc``, each a linear map
    with bias, and no dropout.

    Args:
        embed_dim: channels of x and of the output.
        num_heads: heads; a divisor of ``embed_dim``.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, ``embed_dim`` that the heads do not divide, an unknown option.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, backend: str | None = None) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        if backend is not None:
            dispatch.check_backend(backend)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.backend = backend
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.fc = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        is_causal: bool = False,
        bias_table: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Attend; arguments and errors are those of ``SelfAttention.forward``.

        Returns:
            (B, N, embed_dim), in the dtype of x.
        """
        check_tokens(x, self.embed_dim, self.query)
        channel_major = is_channel_major(x)
        inside = channel_major and attends_channel_major(self.query, x)
        tokens = x if inside else x.contiguous()
        q, k, v = (
            split_heads(project(linear, tokens, inside), self.num_heads)
            for linear in (self.query, self.key, self.value)
        )
        out = softmax_attention(
            q, k, v, bias, mask, is_causal=is_causal, bias_table=bias_table, grid=grid, backend=self.backend
        )  # fmt: skip
        return project(self.fc, merge_heads(out), channel_major) + x

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"num_heads={self.num_heads}" + backend_repr(self.backend)


class SingleHeadSelfAttention(nn.Module):
    """Self-attention with one head and no projection of the output, ``softmax(q k^T / sqrt(embed_dim)) v``.

    The tutorials call it ``SelfAttention`` and do not scale the logits, so that the softmax saturates as soon as there
    are many channels (and float16 overflows): ``compat="original"`` does so too. Keys: ``query``, ``key``, ``value``.

    Args:
        embed_dim: channels of x and of the output.
        compat: "original" for logits that are not scaled.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, an unknown option.
    """

    def __init__(self, embed_dim: int, *, compat: str | None = None, backend: str | None = None) -> None:
        super().__init__()
        check_sizes(embed_dim=embed_dim)
        if compat not in (None, "original"):
            raise ValueError(f"compat must be None or 'original', got {compat!r}")
        if backend is not None:
            dispatch.check_backend(backend)
        self.embed_dim = embed_dim
        self.compat = compat
        self.backend = backend
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        is_causal: bool = False,
        bias_table: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Attend; arguments and errors are those of ``SelfAttention.forward``, with one head.

        Returns:
            (B, N, embed_dim), in the dtype of x (under autocast, the autocast dtype).
        """
        check_tokens(x, self.embed_dim, self.query)
        channel_major = is_channel_major(x)
        inside = channel_major and attends_channel_major(self.query, x)
        tokens = x if inside else x.contiguous()
        q, k, v = (split_heads(project(linear, tokens, inside), 1) for linear in (self.query, self.key, self.value))
        out = softmax_attention(
            q, k, v, bias, mask,
            scale=1.0 if self.compat == "original" else None,
            is_causal=is_causal, bias_table=bias_table, grid=grid, backend=self.backend,
        )  # fmt: skip
        return laid_out(merge_heads(out), channel_major)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"compat={self.compat!r}" + backend_repr(self.backend)


def is_channel_major(x: torch.Tensor) -> bool:
    """Whether tokens (B, N, C) lie as those of a contiguous feature map: neighbours are tokens, not channels."""
    return x.stride(-1) != 1 and x.stride(-2) == 1


def attends_channel_major(linear: nn.Module, x: torch.Tensor) -> bool:
    """Whether attention between channel-major tokens runs on a projection that lies alike: on a GPU."""
    return x.is_cuda and projects_by_image(linear, x)


def projects_by_image(linear: nn.Module, x: torch.Tensor) -> bool:
    """Whether a projection may be a product for every image, ``weight x^T``, and costs less than copying the tokens.

    What else a module does when it is called must not be passed over: only a plain linear map without hooks will do.
    Its weight has one gradient for every image, to be summed, which is larger than the tokens where these are few.
    """
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
        return False
    trains = torch.is_grad_enabled() and linear.weight.requires_grad
    return not trains or x.shape[0] == 1 or x.shape[1] >= linear.out_features


def project(linear: nn.Module, x: torch.Tensor, channel_major: bool) -> torch.Tensor:
    """``linear(x)``, laid out as asked, and with as few copies as that takes.

    Args:
        linear: a linear map from C to D channels.
        x: (B, N, C), token-major or channel-major.
        channel_major: whether the result is to be channel-major, memory (B, D, N), or token-major, memory (B, N, D).

    Returns:
        (B, N, D).
    """
    if not channel_major or not projects_by_image(linear, x):
        return laid_out(linear(laid_out(x, False)), channel_major)
    assert isinstance(linear, nn.Linear)
    weight: torch.Tensor = linear.weight
    bias: torch.Tensor | None = linear.bias
    if autocast_is_on(x) and x.dtype != torch.float64:  # autocast itself would copy the weight once an image
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    weight = weight.expand(x.shape[0], *weight.shape)  # torch.matmul would copy x and its result instead
    if bias is None:
        return torch.bmm(weight, x.mT).mT
    return torch.baddbmm(bias[:, None], weight, x.mT).mT


def laid_out(x: torch.Tensor, channel_major: bool) -> torch.Tensor:
    """Tokens (B, N, C), dense, channel-major or token-major; themselves where they lie so."""
    return x.mT.contiguous().mT if channel_major else x.contiguous()


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, N, C) as (B, heads, N, C / heads), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, D) as (B, N, heads D); a view of what ``softmax_attention`` gives for ``split_heads``."""
    return x.transpose(1, 2).flatten(2)
