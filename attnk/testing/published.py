"""The networks and modules of widely copied tutorials as they compute them, bugs included: what attnk is compared with.

Written anew from the tutorials: the same operators in the same order under the same keys, and the same tensors kept
alive, so that values, gradients, times and memory are those of the code people paste. ``width`` alone is added, for
tests. What is wrong with each stands in the docstring of attnk's module of the same name.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

CONVS = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # VGG16's blocks: channels by those of the first, and convolutions


class SelfAttention(nn.Module):
    """Scaled softmax attention between tokens (B, N, embed_dim), with dropout of the weights."""

    def __init__(self, embed_dim: int, num_heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.qkv_proj = nn.Linear(embed_dim, embed_dim * 3)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        q, k, v = (
            part.view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
            for part in self.qkv_proj(x).chunk(3, dim=-1)
        )
        attended = self.attend(q, k, v).transpose(1, 2).contiguous().view(batch, tokens, channels)
        return self.out_proj(attended)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.head_dim)
        return torch.matmul(self.dropout(torch.softmax(scores, dim=-1)), v)


class TransformerEncoderLayer(nn.Module):
    """Self-attention and a feed-forward network of tokens, a layer norm behind each residual."""

    def __init__(self, embed_dim: int, num_heads: int = 8, dropout: float = 0.1, expansion_factor: int = 4) -> None:
        super().__init__()
        self.self_attn = SelfAttention(embed_dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.ffn = nn.Sequential(
            nn.Linear(embed_dim, embed_dim * expansion_factor),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(embed_dim * expansion_factor, embed_dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x))
        return self.norm2(x + self.ffn(x))


class SpatialAttention(nn.Module):
    """Returns the map (B, 1, H, W): a convolution of the channels' [mean, max], and a sigmoid."""

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.mean(x, dim=1, keepdim=True)
        largest, _ = torch.max(x, dim=1, keepdim=True)
        return self.sigmoid(self.conv1(torch.cat([mean, largest], dim=1)))


class _VGG16(nn.Module):
    """What both networks share: torchvision's keys, or those shifted by a gate behind every block."""

    features: nn.Sequential

    def __init__(self, num_classes: int, width: int, gated: bool, attended: Sequence[int] = ()) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for multiple, convs in CONVS:
            for _ in range(convs):
                layers += [nn.Conv2d(channels, width * multiple, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
                channels = width * multiple
            layers += [nn.MaxPool2d(kernel_size=2, stride=2), *([SpatialAttention()] if gated else [])]
        self.features = nn.Sequential(*layers)
        if not gated:
            self.attention_layers = nn.ModuleDict()
            for block in (3, 4, 5):
                if block in attended:
                    self.attention_layers[f"block{block}"] = TransformerEncoderLayer(width * CONVS[block - 1][0])
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 7 * 7, 64 * width),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(64 * width, 64 * width),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(64 * width, num_classes),
        )

    def extract(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.extract(x)), 1))


class VGG16WithAttention(_VGG16):
    """VGG16 with an encoder layer behind the third convolution of blocks 3, 4 and 5, where they are asked for."""

    def __init__(
        self, num_classes: int = 1000, attention_positions: Sequence[int] = (3, 4), *, width: int = 64
    ) -> None:
        super().__init__(num_classes, width, gated=False, attended=attention_positions)
        self.attention_positions = attention_positions

    def _apply_attention(self, x: Tensor, block_name: str) -> Tensor:
        batch, channels, height, width = x.shape
        attended = self.attention_layers[block_name](x.view(batch, channels, -1).transpose(1, 2))
        return attended.transpose(1, 2).view(batch, channels, height, width)

    def extract(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index == 14 and 3 in self.attention_positions:
                x = self._apply_attention(x, "block3")
            elif index == 21 and 4 in self.attention_positions:
                x = self._apply_attention(x, "block4")
            elif index == 28 and 5 in self.attention_positions:
                x = self._apply_attention(x, "block5")
        return x


class VGG16WithSpatialAttention(_VGG16):
    """VGG16 with a gate behind every block; all activations are kept until the end."""

    def __init__(self, num_classes: int = 1000, *, width: int = 64) -> None:
        super().__init__(num_classes, width, gated=True)

    def extract(self, x: Tensor) -> Tensor:
        features: list[Tensor] = []
        current = x
        for layer in self.features:
            current = layer(current)
            if isinstance(layer, SpatialAttention):
                current = features[-1] * current
            features.append(current)
        return features[-1]


class ViTBlock(nn.Module):
    """Attention over the batch axis of (B, N, dim), and a feed-forward network, with norms behind the residuals."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(dim, num_heads)
        self.ffn = nn.Sequential(nn.Linear(dim, dim * 4), nn.ReLU(), nn.Linear(dim * 4, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.mha(x, x, x)[0])
        return self.norm2(x + self.ffn(x))


class ViT(nn.Module):
    """A vision transformer of ``ViTBlock``, for one size of images."""

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2 + 1, dim))
        self.blocks = nn.ModuleList([ViTBlock(dim, num_heads) for _ in range(depth)])
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class SELayer(nn.Module):
    """Squeeze and excitation of (B, C, H, W)."""

    def __init__(self, channel: int, reduction: int = 16) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _, _ = x.shape
        gate = self.fc(self.avg_pool(x).view(batch, channels)).view(batch, channels, 1, 1)
        return x * gate


class ChannelAttention(nn.Module):
    """``SELayer`` under other keys."""

    def __init__(self, in_channels: int, reduction_ratio: int = 16) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(in_channels, in_channels // reduction_ratio),
            nn.ReLU(inplace=True),
            nn.Linear(in_channels // reduction_ratio, in_channels),
        )
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _, _ = x.shape
        logit = self.fc(self.avg_pool(x).view(batch, channels)).view(batch, channels, 1, 1)
        return x * self.sigmoid(logit)


class CBAMSpatialAttention(nn.Module):
    """Gates x by a convolution, with a bias, of the channels' [max, mean]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        largest = torch.max(x, dim=1, keepdim=True)[0]
        mean = torch.mean(x, dim=1, keepdim=True)
        return x * self.sigmoid(self.conv(torch.cat([largest, mean], dim=1)))


class CBAM(nn.Module):
    """A channel gate and a spatial gate, one behind the other."""

    def __init__(self, in_channels: int, reduction_ratio: int = 16) -> None:
        super().__init__()
        self.channel_attention = ChannelAttention(in_channels, reduction_ratio)
        self.spatial_attention = CBAMSpatialAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial_attention(self.channel_attention(x))
