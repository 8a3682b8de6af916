"""The encoder layer of a transformer."""

import math

import torch
from torch import nn

from attnk.modules._checks import check_tokens
from attnk.modules.self_attention import SelfAttention, laid_out
from attnk.ops._checks import check_choice

ACTIVATIONS = ("relu", "gelu")


class TransformerEncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual and a layer norm.

    By default the norm follows the residual, as in "Attention Is All You Need" (Vaswani et al., 2017,
    https://arxiv.org/abs/1706.03762): ``x = norm1(x + self_attn(x)); x = norm2(x + ffn(x))``. With ``norm_first`` it
    precedes the branch, as in ViT (https://arxiv.org/abs/2010.11929): ``x = x + self_attn(norm1(x));
    x = x + ffn(norm2(x))``. With its defaults the layer is a drop-in for the tutorials' class of that name; its keys
    are ``self_attn.*``, ``norm1.*``, ``norm2.*``, ``ffn.0.*`` and ``ffn.3.*``.

    The output is token-major. Tokens of a contiguous feature map are copied once on their way in, for a layer norm
    reads them whole.

    Args:
        embed_dim: channels of x and of the output.
        num_heads: heads; a divisor of ``embed_dim``.
        dropout: share to drop in training, of the attention weights and twice in the feed-forward network.
        expansion_factor: hidden channels of the feed-forward network by ``embed_dim``.
        norm_first: whether the norms precede the branches.
        activation: of the feed-forward network, "relu" or "gelu".
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, ``embed_dim`` that the heads do not divide, an unknown option.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        dropout: float = 0.1,
        expansion_factor: float = 4,
        norm_first: bool = False,
        *,
        activation: str = "relu",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        self.self_attn = SelfAttention(embed_dim, num_heads, dropout, backend=backend)
        if not isinstance(expansion_factor, int | float) or not 1 <= embed_dim * expansion_factor < math.inf:
            raise ValueError(
                f"expansion_factor must be a number that leaves at least one hidden channel, got {expansion_factor!r}"
            )
        hidden_dim = int(embed_dim * expansion_factor)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.ffn = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.ReLU(inplace=True) if activation == "relu" else nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, embed_dim),
            nn.Dropout(dropout),
        )

    def forward(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        is_causal: bool = False,
        bias_table: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Run the layer.

        Args:
            x: (B, N, embed_dim), in the dtype of the weights (under autocast, any float dtype), any strides.
            bias, mask, is_causal, bias_table, grid: as ``SelfAttention.forward`` takes them.

        Returns:
            (B, N, embed_dim), in the dtype of x (under autocast and after a norm, float32).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_tokens(x, self.self_attn.embed_dim, self.self_attn.qkv_proj)
        x = laid_out(x, channel_major=False)
        terms = (bias, mask, is_causal, bias_table, grid)
        if self.norm_first:
            x = x + self.self_attn(self.norm1(x), *terms)
            return x + self.ffn(self.norm2(x))
        x = self.norm1(x + self.self_attn(x, *terms))
        return self.norm2(x + self.ffn(x))

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"norm_first={self.norm_first}"
