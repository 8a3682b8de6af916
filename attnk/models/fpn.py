"""Feature pyramids (Lin et al., 2017, https://arxiv.org/abs/1612.03144) whose levels attend to coarser ones."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attnk.modules._checks import check_shape, check_sizes, check_tensor
from attnk.modules.cross_attention import CrossScaleAttention
from attnk.modules.position import SinusoidalPosition2d
from attnk.ops._checks import check_choice

MERGES = ("both", "attention", "add")


class FeaturePyramid(nn.Module):
    """A feature pyramid network in which the pixels of a level attend to all pixels of the next coarser one.

    From coarse to fine, ``merged = lateral + up(coarser) + attention(lateral, coarser)`` and ``out = conv(merged)``:
    lateral is a 1 x 1 convolution of the level's map, up repeats the nearest pixel, conv is 3 x 3, and the attention is
    ``attnk.CrossScaleAttention``, queries from the lateral map, keys and values from the merged map of the coarser
    level (as in Feature Pyramid Transformer, Zhang et al., 2020, https://arxiv.org/abs/2007.09451). The sinusoidal
    encoding of a pixel's place in the picture is added to queries and keys, so that the levels know of each other where
    they are. Levels may have any size; one need not be half of the other.

    With ``merge="both"`` the attention starts at 0, so that a new network is the plain pyramid. N pixels that attend to
    M take ``4 N M out_channels`` operations, and no memory for the N x M logits: with the side of the picture, time
    grows as its fourth power. By default the two coarsest merges attend, in a ResNet the maps of strides 8 and 16.

    Keys: torchvision's of its ``FeaturePyramidNetwork``, ``inner_blocks.{i}.0.*`` and ``layer_blocks.{i}.0.*``, which
    load strictly with ``merge="add"`` (also with the same initial weights from the same seed), and
    ``attention.{i}.{q,k,v,out}_proj.*``.

    Args:
        in_channels: channels of the maps, from fine to coarse; by default those of a ResNet-50's stages.
        out_channels: channels of the pyramid; a multiple of 4 where levels attend.
        num_heads: heads; a divisor of ``out_channels``.
        merge: "both"; "attention", which has no ``up(coarser)`` where a level attends; or "add", where none does.
        attention_levels: indices of the levels that attend; by default the last two that have a coarser one.

    Raises:
        ValueError: a size that is no positive integer, no level, a level without a coarser one among
            ``attention_levels``, an unknown ``merge``, channels that 4 or the heads do not divide.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (256, 512, 1024, 2048),
        out_channels: int = 256,
        num_heads: int = 8,
        *,
        merge: str = "both",
        attention_levels: Iterable[int] | None = None,
    ) -> None:
        super().__init__()
        in_channels = tuple(in_channels)
        if not in_channels:
            raise ValueError("in_channels must have at least one level, got ()")
        check_sizes(**{f"in_channels[{level}]": channels for level, channels in enumerate(in_channels)})
        check_sizes(out_channels=out_channels, num_heads=num_heads)
        check_choice("merge", merge, MERGES)
        finer = range(len(in_channels) - 1)
        if attention_levels is None:
            attention_levels = () if merge == "add" else finer[-2:]
        levels = sorted(set(attention_levels))
        if not set(levels) <= set(finer):
            raise ValueError(f"attention_levels must be levels from 0 to {len(finer) - 1}, got {levels}")
        if levels and merge == "add":
            raise ValueError(f"merge='add' has no attention, got attention_levels={levels}")
        if levels and (out_channels % 4 or out_channels % num_heads):
            raise ValueError(
                f"out_channels must be a multiple of 4 and of num_heads = {num_heads} where levels attend, "
                f"got {out_channels}"
            )
        self.in_channels = in_channels
        self.merge = merge
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(size, out_channels, 1)) for size in in_channels)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(out_channels, out_channels, 3, padding=1)) for _ in in_channels
        )
        for conv in [*self.inner_blocks.modules(), *self.layer_blocks.modules()]:
            if isinstance(conv, nn.Conv2d):
                assert conv.bias is not None
                nn.init.kaiming_uniform_(conv.weight, a=1)
                nn.init.zeros_(conv.bias)
        self.attention = nn.ModuleDict()
        for level in levels:
            attention = CrossScaleAttention(out_channels, num_heads=num_heads)
            if merge == "both":
                nn.init.zeros_(attention.out_proj.weight)
                nn.init.zeros_(attention.out_proj.bias)  # type: ignore[arg-type]
            self.attention[str(level)] = attention
        self.position = SinusoidalPosition2d(out_channels, normalize=True) if levels else None

    def forward(self, maps: Sequence[torch.Tensor] | Mapping[str, torch.Tensor]) -> Any:
        """Make the pyramid.

        Args:
            maps: one (B, in_channels[i], H_i, W_i) for each level, from fine to coarse, in the dtype of the weights
                (under autocast, any float dtype), of at least one pixel; in a list or tuple, or as the values of a
                dict, as torchvision has it.

        Returns:
            (B, out_channels, H_i, W_i) for each level: a list, or a dict with the keys of the maps.

        Raises:
            ValueError, TypeError: a number of maps, a shape, dtype or device that does not fit; the message names it.
        """
        if isinstance(maps, Mapping):
            return dict(zip(maps, self(list(maps.values())), strict=True))
        self._check(maps)
        merged = self.inner_blocks[-1](maps[-1])
        pyramid = [self.layer_blocks[-1](merged)]
        for level in reversed(range(len(maps) - 1)):
            merged = self._merge(level, self.inner_blocks[level](maps[level]), merged)
            pyramid.append(self.layer_blocks[level](merged))
        return pyramid[::-1]

    def _merge(self, level: int, lateral: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
        attends = str(level) in self.attention
        merged = lateral
        if attends:
            assert self.position is not None
            query_pos, key_pos = (self.position.as_map(*each.shape[2:], like=each) for each in (lateral, coarser))
            merged = self.attention[str(level)](lateral, coarser, query_pos=query_pos, key_pos=key_pos)
        if self.merge == "both" or not attends:
            merged = merged + F.interpolate(coarser, size=lateral.shape[2:], mode="nearest")
        return merged

    def _check(self, maps: Sequence[torch.Tensor]) -> None:
        if not isinstance(maps, list | tuple):
            raise TypeError(f"maps must be a list, tuple or dict, got {type(maps).__name__}")
        if len(maps) != len(self.in_channels):
            raise ValueError(f"maps must be {len(self.in_channels)}, one for each level, got {len(maps)}")
        for level, each in enumerate(maps):
            name = f"maps[{level}]"
            check_tensor(name, each, self.inner_blocks[level][0].weight)  # type: ignore[index]
            check_shape(name, each, "(B, C, H, W)", 1, self.in_channels[level])
            if each.shape[2] * each.shape[3] == 0:
                raise ValueError(f"{name} must have at least one pixel, got {tuple(each.shape)}")
            if each.shape[0] != maps[0].shape[0]:
                raise ValueError(f"{name} must have the batch size of maps[0], {maps[0].shape[0]}, got {each.shape[0]}")

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"merge={self.merge!r}"
