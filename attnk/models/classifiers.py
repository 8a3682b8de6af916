"""Two small classifiers of sequences: self-attention, a mean over the tokens, two linear layers."""

import torch
from torch import nn

from attnk.models.common import check_compat
from attnk.modules._checks import check_sizes
from attnk.modules.self_attention import MultiHeadSelfAttention, SingleHeadSelfAttention


class _TokenClassifier(nn.Module):
    """Attention, which a subclass brings, the mean over the tokens, linear, ReLU, linear."""

    def __init__(
        self, attention: nn.Module, embed_dim: int, hidden_dim: int, num_classes: int, compat: str | None
    ) -> None:
        super().__init__()
        check_sizes(hidden_dim=hidden_dim, num_classes=num_classes)
        check_compat(compat)
        self.compat = compat
        self.attention = attention
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify.

        Args:
            x: tokens (B, N, embed_dim), in the dtype of the weights (under autocast, any float dtype).

        Returns:
            Logits (B, num_classes).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        return self.fc2(torch.relu(self.fc1(self.attention(x).mean(1))))

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"compat={self.compat!r}"


class SelfAttentionClassifier(_TokenClassifier):
    """Self-attention with one head, a mean over the tokens, linear, ReLU, linear.

    From a widely copied tutorial, which does not scale the logits of its attention, so that the softmax saturates as
    soon as there are many channels. Here they are divided by ``sqrt(embed_dim)``; ``compat="original"`` leaves them.

    Keys, as published: ``attention.{query,key,value}.*``, ``fc1.*``, ``fc2.*``. Initial weights are those of the
    published code from the same seed.

    Args:
        embed_dim: channels of the tokens.
        hidden_dim: channels between the linear layers.
        num_classes: how many logits.
        compat: None, or "original" for logits of the attention that are not scaled.

    Raises:
        ValueError: a size that is no positive integer, an unknown ``compat``.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, num_classes: int, compat: str | None = None) -> None:
        attention = SingleHeadSelfAttention(embed_dim, compat=compat)
        super().__init__(attention, embed_dim, hidden_dim, num_classes, compat)


class MultiHeadSelfAttentionClassifier(_TokenClassifier):
    """Multi-head self-attention with its residual, a mean over the tokens, linear, ReLU, linear.

    From a widely copied tutorial. There heads that do not divide the channels are found out in the forward; here by the
    constructor.

    Keys, as published: ``attention.{query,key,value,fc}.*``, ``fc1.*``, ``fc2.*``. Initial weights are those of the
    published code from the same seed.

    Args:
        embed_dim: channels of the tokens.
        num_heads: heads; a divisor of ``embed_dim``.
        hidden_dim: channels between the linear layers.
        num_classes: how many logits.
        compat: None or "original", as the other networks have it; both compute the same.

    Raises:
        ValueError: a size that is no positive integer, ``embed_dim`` that the heads do not divide, an unknown
            ``compat``.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, hidden_dim: int, num_classes: int, compat: str | None = None
    ) -> None:
        attention = MultiHeadSelfAttention(embed_dim, num_heads)
        super().__init__(attention, embed_dim, hidden_dim, num_classes, compat)
