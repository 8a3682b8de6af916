"""Swin (Liu et al., 2021, https://arxiv.org/abs/2103.14030): a transformer in windows, on maps of four sizes."""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attnk.models.common import check_images, check_patch
from attnk.modules._checks import check_share, check_sizes
from attnk.modules.position import STD
from attnk.modules.window import SwinBlock


class SwinTransformer(nn.Module):
    """Patches, stages of ``attnk.SwinBlock`` whose every other block shifts its windows, a linear classifier.

    Between stages ``reduction(norm([2 x 2 tokens]))`` halves the map and doubles the channels. At the end
    ``head(mean(norm(tokens)))``. Defaults are Swin-T's.

    Keys are timm's: ``patch_embed.{proj,norm}.*``, ``layers.{i}.downsample.{norm,reduction}.*``,
    ``layers.{i}.blocks.{j}.*`` as ``SwinBlock`` has them, ``norm.*``, ``head.fc.*``. Strict loading also takes
    torchvision's weights (``swin_t``) and those of the authors' code, where ``downsample`` belongs to the stage before.

    Maps that windows do not divide are padded on the right and below, as in torchvision, and so are those of odd sides
    before they are halved. timm's own networks give other numbers there, for they roll before they pad, and those built
    for small images have smaller windows, with tables that do not fit these.

    Args:
        num_classes: how many logits.
        embed_dim: channels of the first stage.
        depths: blocks of the stages.
        num_heads: heads of the stages; divisors of their channels.
        window_size: side of a window.
        patch_size: height and width of a patch.
        mlp_ratio: hidden channels of a block's feed-forward network by its channels.
        drop_path: share of the images that a branch leaves as they are in training, in the last block; it grows evenly
            from 0 in the first. Swin-T was trained with 0.2.

    Raises:
        ValueError: a size that is no positive integer, a share that is none, other numbers of heads than of stages,
            channels that the heads do not divide.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        patch_size: int = 4,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, embed_dim=embed_dim, window_size=window_size, patch_size=patch_size)
        check_share("drop_path", drop_path)
        if not depths or len(depths) != len(num_heads):
            raise ValueError(
                f"depths and num_heads must have a number for each stage, got {tuple(depths)} and {tuple(num_heads)}"
            )
        check_sizes(**{f"depths[{stage}]": blocks for stage, blocks in enumerate(depths)})
        self.patch_size = patch_size
        self.patch_embed = _PatchEmbed(embed_dim, patch_size)
        self.layers = nn.Sequential()
        dim = embed_dim
        for stage, (blocks, heads) in enumerate(zip(depths, num_heads, strict=True)):
            downsample: nn.Module = nn.Identity()
            if stage:
                downsample, dim = _PatchMerging(dim), 2 * dim
            stack = nn.Sequential()
            for block in range(blocks):
                shift = window_size // 2 if block % 2 else 0
                drop = drop_path * (sum(depths[:stage]) + block) / max(1, sum(depths) - 1)
                stack.append(SwinBlock(dim, heads, window_size, shift, mlp_ratio, drop_path=drop))
            self.layers.append(nn.Sequential(OrderedDict(downsample=downsample, blocks=stack)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(dim, num_classes)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify.

        Args:
            x: images (B, 3, H, W) of at least one patch, in the dtype of the weights (under autocast, any float
                dtype). What is left of the last patch of a row or column is not seen.

        Returns:
            Logits (B, num_classes).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_images(x, self.patch_embed.proj.weight)
        check_patch(x, self.patch_size)
        x = self.norm(self.layers(self.patch_embed(x)))
        return self.head(x.mean((1, 2)))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        merges_last = f"{prefix}layers.0.downsample.norm.weight" in state_dict
        renamed = {
            prefix + _timm_key(key.removeprefix(prefix), merges_last): tensor for key, tensor in state_dict.items()
        }
        state_dict.clear()
        state_dict.update(renamed)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _PatchEmbed(nn.Module):
    """Images (B, 3, H, W) to tokens (B, H', W', dim)."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class _PatchMerging(nn.Module):
    """Tokens (B, H, W, dim) to (B, ceil(H / 2), ceil(W / 2), 2 dim); the channels of 2 x 2 go column by column."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] % 2 or x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


def swin_tiny(num_classes: int = 1000, **options: Any) -> SwinTransformer:
    """``SwinTransformer`` with Swin-T's sizes, 28,288,354 parameters; the options are its arguments."""
    return SwinTransformer(num_classes, **options)


def _timm_key(key: str, merges_last: bool) -> str:
    """A key of torchvision's or, with ``merges_last``, of the authors' code as timm has it."""

    def of_features(match: re.Match[str]) -> str:
        stage, blocks = divmod(int(match[1]), 2)
        return f"layers.{stage}.{'blocks' if blocks else 'downsample'}."

    key = re.sub(r"^features\.0\.0\.", "patch_embed.proj.", key)
    key = re.sub(r"^features\.0\.2\.", "patch_embed.norm.", key)
    key = re.sub(r"^features\.(\d+)\.", of_features, key)
    if merges_last:
        key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) + 1}.downsample.", key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
