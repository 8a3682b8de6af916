"""Attention inside windows of a feature map: Swin's, versions 1 and 2, its block, and MaxViT's grid."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attnk import dispatch
from attnk.modules._checks import backend_repr, check_shape, check_share, check_sizes, check_tensor
from attnk.modules.position import STD
from attnk.modules.self_attention import is_channel_major, laid_out, project
from attnk.ops._checks import check_choice
from attnk.ops.group_attention import window_attention

Pair = tuple[int, int]

PADDINGS = ("zeros", "mask")
MAX_LOGIT_SCALE = math.log(100)
EPS = 1e-12  # of F.normalize
CPB_HIDDEN = 512  # channels inside version 2's network for the bias


class _GroupedAttention(nn.Module):
    """What windows and grids share: checks, one projection of queries, keys and values, checkpoints."""

    def __init__(
        self, dim: int, num_heads: int, channels_first: bool, head_first: bool, backend: str | None
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(dim=dim, num_heads=num_heads)
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got dim={dim}, num_heads={num_heads}")
        if backend is not None:
            dispatch.check_backend(backend)
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.channels_first = channels_first
        self.head_first = head_first
        self.backend = backend

    def _build(self, qkv_bias: bool, proj_bias: bool, attn_drop: float, proj_drop: float) -> None:
        """The children that all versions have, in the order of timm's, and so of an optimizer's state."""
        check_share("attn_drop", attn_drop)
        check_share("proj_drop", proj_drop)
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(self.dim, self.dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def _maps(self, x: torch.Tensor) -> torch.Tensor:
        """x as (B, H, W, dim), a view."""
        if isinstance(self.proj, nn.Linear):
            check_tensor("x", x, self.proj.weight)
        if self.channels_first:
            check_shape("x", x, "(B, dim, H, W)", 1, self.dim)
            return x.permute(0, 2, 3, 1)
        check_shape("x", x, "(B, H, W, dim)", 3, self.dim)
        return x

    def _project(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.qkv(tokens)

    def _qkv(self, maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values (B, H, W, heads, head_dim), views of one product."""
        qkv = self._project(laid_out(maps.flatten(1, 2), channel_major=False)).unflatten(1, maps.shape[1:3])
        if self.head_first:
            return qkv.unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(-2)
        return qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)

    def _dropout_p(self) -> float:
        return self.attn_drop.p if self.attn_drop.training else 0.0

    def _merge(self, out: torch.Tensor, channel_major: bool) -> torch.Tensor:
        """What the module returns for heads (B, H, W, heads, head_dim)."""
        out = project(self.proj, out.flatten(3).flatten(1, 2), channel_major).unflatten(1, out.shape[1:3])
        out = self.proj_drop(out)
        return out.permute(0, 3, 1, 2) if self.channels_first else out

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}relative_position_index", None)
        theirs, ours = f"{prefix}rel_pos.relative_position_bias_table", f"{prefix}relative_position_bias_table"
        if theirs in state_dict and ours not in state_dict:
            table = state_dict.pop(theirs)
            # the Tensorflow models' is (heads, rows, columns), by the key's position less the query's
            state_dict[ours] = table.flip(1, 2).flatten(1).t() if table.dim() == 3 else table
        for key in (f"{prefix}qkv.weight", f"{prefix}proj.weight"):
            if key in state_dict and state_dict[key].dim() == 4:  # of 1 x 1 convolutions
                state_dict[key] = state_dict[key].flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class WindowAttention(_GroupedAttention):
    """Attention inside the windows of a map, shifted or not: Swin's, version 1 or 2, on whole maps.

    Version 1 (Liu et al., 2021, https://arxiv.org/abs/2103.14030), in each head and window:
    ``proj(softmax(q k^T / sqrt(head_dim) + table[relative position]) v)``.

    Version 2 (Liu et al., 2022, https://arxiv.org/abs/2111.09883):
    ``proj(softmax(exp(min(logit_scale, log 100)) cos(q, k) + 16 sigmoid(cpb_mlp(coordinates))) v)``; a key has no bias.
    Where a query or key is 0, so is its gradient; elsewhere it is that of ``F.normalize``.

    With shift (s, t) windows lie s further down and t further right and go around the edge; on an axis where one window
    covers the map nothing is shifted. Tokens that are brought together by going around the edge get ``mask_value``
    added to their logits.

    Where windows do not divide the map, ``padding="zeros"`` is what is published: the input is padded with zeros below
    and on the right, before the projection, so that tokens that do not exist have the projection's bias as key and
    value, are attended to, and cost two copies. ``padding="mask"`` hides them inside the kernel, without a copy. Where
    windows divide the map, nothing is padded, rolled or cut out, and q, k and v are views of one product.

    Strict loading takes the state dicts of timm's ``WindowAttention`` (``swin_transformer``: ``qkv.*``, ``proj.*``,
    ``relative_position_bias_table``, in the order of ``attnk.window_attention``; ``swin_transformer_v2``:
    ``logit_scale``, ``q_bias``, ``v_bias``, ``cpb_mlp.{0,2}.*``, ``qkv.weight``, ``proj.*``) and of torchvision's
    ``ShiftedWindowAttention`` and ``ShiftedWindowAttentionV2``, whose ``relative_position_index`` and
    ``relative_coords_table`` are left aside and whose joint ``qkv.bias`` gives ``q_bias`` and ``v_bias``. MaxViT's
    attention in blocks, timm's ``maxxvit.AttentionCl`` and ``Attention2d``, loads as in ``GridAttention``. What is
    saved has timm's keys.

    timm's Swin rolls before it pads: where a shift meets a map that windows do not divide, its windows lie otherwise,
    and the mask does not fit them. There, results are torchvision's.

    Args:
        dim: channels of x and of the output.
        num_heads: heads; a divisor of ``dim``.
        window_size: side of a window, or (height, width).
        shift_size: by how much windows are shifted, at least 0 and less than ``window_size``; or (down, right).
        qkv_bias: whether the projection of queries, keys and values has a bias; in version 2 keys have none.
        proj_bias: whether the projection of the output has one.
        attn_drop: share of the attention weights to drop in training.
        proj_drop: share of the output to drop in training.
        version: 1 or 2.
        padding: "zeros" or "mask".
        mask_value: -100, as published, or -inf.
        pretrained_window_size: of version 2, the window whose size coordinates are measured by; None for
            ``window_size``.
        input_resolution: (height, width) of maps to come. Windows are no larger than that, nor is the table, as timm
            builds its blocks; maps of other sizes are taken too.
        channels_first: whether maps are (B, dim, H, W) rather than (B, H, W, dim).
        head_first: whether the rows of ``qkv`` are, for every head, queries, keys, values (timm's maxxvit with its
            ``head_first=True``), rather than queries, keys, values, for every head. Version 1 only.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, ``dim`` that the heads do not divide, a shift that is not less
            than the window, an unknown option.
    """

    relative_coords_table: torch.Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Pair = 7,
        shift_size: int | Pair = 0,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        version: int = 1,
        padding: str = "zeros",
        mask_value: float = -100.0,
        pretrained_window_size: int | Pair | None = None,
        input_resolution: int | Pair | None = None,
        channels_first: bool = False,
        head_first: bool = False,
        backend: str | None = None,
    ) -> None:
        window, shift = _check_pair("window_size", window_size, 1), _check_pair("shift_size", shift_size, 0)
        if shift[0] >= window[0] or shift[1] >= window[1]:
            raise ValueError(f"shift_size must be less than window_size, {window}, got {shift}")
        if input_resolution is not None:
            resolution = _check_pair("input_resolution", input_resolution, 1)
            shift = _uncovered(shift, resolution, window)
            window = (min(resolution[0], window[0]), min(resolution[1], window[1]))
        if version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {version!r}")
        check_choice("padding", padding, PADDINGS)
        if mask_value not in (-math.inf, -100):
            raise ValueError(f"mask_value must be -inf or -100, got {mask_value!r}")
        if version == 2 and head_first:
            raise ValueError("head_first must be False with version=2, got True")
        if version == 1 and pretrained_window_size is not None:
            raise ValueError(f"pretrained_window_size must be None with version=1, got {pretrained_window_size!r}")
        super().__init__(dim, num_heads, channels_first, head_first, backend)
        self.window_size = window
        self.shift_size = shift
        self.version = version
        self.padding = padding
        self.mask_value = mask_value
        self.pretrained_window_size: Pair | None = None
        rows, columns = 2 * window[0] - 1, 2 * window[1] - 1
        if version == 1:
            self.relative_position_bias_table = nn.Parameter(torch.empty(rows * columns, num_heads))
        else:
            if pretrained_window_size is not None:
                self.pretrained_window_size = _check_pair("pretrained_window_size", pretrained_window_size, 1)
            self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
            self.q_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
            self.v_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
            self.cpb_mlp = nn.Sequential(
                nn.Linear(2, CPB_HIDDEN), nn.ReLU(inplace=True), nn.Linear(CPB_HIDDEN, num_heads, bias=False)
            )
            self.register_buffer("relative_coords_table", torch.empty(1, rows, columns, 2), persistent=False)
        self._build(qkv_bias and version == 1, proj_bias, attn_drop, proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what this module holds outside of its linear maps, version 2's coordinates among it."""
        if self.version == 1:
            nn.init.trunc_normal_(self.relative_position_bias_table, std=STD)
            return
        nn.init.constant_(self.logit_scale, math.log(10))
        for bias in (self.q_bias, self.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        with torch.no_grad():
            measure = self.pretrained_window_size or self.window_size
            self.relative_coords_table.copy_(_coordinates(self.window_size, measure))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, H, W, dim), or (B, dim, H, W) with ``channels_first``, in the dtype of the weights (under autocast,
                any float dtype), any strides. Maps whose neighbours in memory are pixels are copied once.

        Returns:
            A map of x's shape and memory format, in x's dtype (under autocast, the autocast dtype).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        maps = self._maps(x)
        channel_major = is_channel_major(maps)
        height, width = maps.shape[1:3]
        below, right = -height % self.window_size[0], -width % self.window_size[1]
        if self.padding == "zeros" and (below or right):
            maps = F.pad(maps, (0, 0, 0, right, 0, below))
        q, k, v = self._qkv(maps)
        scale: float | None = None
        table: torch.Tensor
        if self.version == 1:
            table = self.relative_position_bias_table
        else:
            logit_scale = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp().squeeze(-1)
            q, k = _normalize(q, logit_scale), _normalize(k)
            scale, table = 1.0, 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table).flatten(0, 2))
        out = window_attention(
            q, k, v, self.window_size, _uncovered(self.shift_size, (height, width), self.window_size),
            bias_table=table, mask_value=self.mask_value, scale=scale, dropout_p=self._dropout_p(),
            backend=self.backend,
        )  # fmt: skip
        return self._merge(out[:, :height, :width], channel_major)

    def _project(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.version == 1 or self.q_bias is None or self.v_bias is None:
            return self.qkv(tokens)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        if type(self.qkv) is not nn.Linear or self.qkv._forward_hooks or self.qkv._forward_pre_hooks:
            return self.qkv(tokens) + bias
        return F.linear(tokens, self.qkv.weight, bias)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        pretrained = self.pretrained_window_size
        return (
            f"num_heads={self.num_heads}, window_size={self.window_size}, shift_size={self.shift_size}"
            f", version={self.version}, padding={self.padding!r}, mask_value={self.mask_value}"
            + (f", pretrained_window_size={pretrained}" if pretrained is not None else "")
            + _layout_repr(self)
        )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if self.version == 2:
            coordinates = state_dict.pop(f"{prefix}relative_coords_table", None)
            rows, columns = self.pretrained_window_size or self.window_size
            if coordinates is not None and coordinates.shape != (1, 2 * rows - 1, 2 * columns - 1, 2):
                trained = tuple((size + 1) // 2 for size in coordinates.shape[1:3])
                args[-1].append(
                    f"{prefix}relative_coords_table belongs to windows of {trained}, here they are {(rows, columns)}: "
                    f"build WindowAttention(pretrained_window_size={trained})"
                )
            if self.q_bias is not None and f"{prefix}qkv.bias" in state_dict:
                state_dict[f"{prefix}q_bias"], _, state_dict[f"{prefix}v_bias"] = (
                    state_dict.pop(f"{prefix}qkv.bias").chunk(3)
                )  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, *args)


class GridAttention(_GroupedAttention):
    """Attention between tokens that lie a grid's step apart, MaxViT's (Tu et al., 2022, https://arxiv.org/abs/2204.01697).

    A map H x W falls into (H / g) (W / g) grids of g x g tokens, H / g and W / g pixels apart; in each head and grid:
    ``proj(softmax(q k^T / sqrt(head_dim) + table[relative position]) v)``. Grids are windows that are dilated: nothing
    is permuted, and q, k and v are views of one product. MaxViT's attention in blocks is ``WindowAttention``.

    Keys: ``qkv.*``, ``proj.*`` and ``relative_position_bias_table``, in Swin's order. Strict loading takes the state
    dicts of timm's ``maxxvit.AttentionCl`` and ``Attention2d`` too, whose table is ``rel_pos.*``, with
    ``rel_pos_type`` "bias" or "bias_tf"; of their options, ``dim_head`` and ``head_first`` are to be given here.

    Args:
        dim: channels of x and of the output.
        num_heads: heads; a divisor of ``dim``. None for ``dim / dim_head``.
        grid_size: tokens of a grid on each side, or (height, width).
        dim_head: channels of a head where ``num_heads`` is None.
        qkv_bias: whether the projection of queries, keys and values has a bias.
        proj_bias: whether the projection of the output has one.
        attn_drop: share of the attention weights to drop in training.
        proj_drop: share of the output to drop in training.
        channels_first: whether maps are (B, dim, H, W) rather than (B, H, W, dim).
        head_first: whether the rows of ``qkv`` are, for every head, queries, keys, values, rather than queries, keys,
            values, for every head.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, ``dim`` that the heads do not divide, an unknown option.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        grid_size: int | Pair = 7,
        *,
        dim_head: int = 32,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        channels_first: bool = False,
        head_first: bool = False,
        backend: str | None = None,
    ) -> None:
        grid = _check_pair("grid_size", grid_size, 1)
        if num_heads is None:
            check_sizes(dim=dim, dim_head=dim_head)
            if dim % dim_head:
                raise ValueError(f"dim must be divisible by dim_head, got dim={dim}, dim_head={dim_head}")
            num_heads = dim // dim_head
        super().__init__(dim, num_heads, channels_first, head_first, backend)
        self.grid_size = grid
        entries = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(entries, num_heads))
        self._build(qkv_bias, proj_bias, attn_drop, proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what this module holds outside of its linear maps."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=STD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, H, W, dim), or (B, dim, H, W) with ``channels_first``, H and W divisible by the grid's sides, in the
                dtype of the weights (under autocast, any float dtype), any strides. Maps whose neighbours in memory
                are pixels are copied once.

        Returns:
            A map of x's shape and memory format, in x's dtype (under autocast, the autocast dtype).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        maps = self._maps(x)
        height, width = maps.shape[1:3]
        rows, columns = self.grid_size
        if height % rows or width % columns:
            raise ValueError(f"x must have sides divisible by grid_size={self.grid_size}, got H, W = {height}, {width}")
        q, k, v = self._qkv(maps)
        out = window_attention(
            q, k, v, self.grid_size, dilation=(max(1, height // rows), max(1, width // columns)),
            bias_table=self.relative_position_bias_table, dropout_p=self._dropout_p(), backend=self.backend,
        )  # fmt: skip
        return self._merge(out, is_channel_major(maps))

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"num_heads={self.num_heads}, grid_size={self.grid_size}" + _layout_repr(self)


class SwinBlock(nn.Module):
    """A block of Swin: attention in windows and a feed-forward network, each with a layer norm and a residual.

    In version 1 (https://arxiv.org/abs/2103.14030) the norm precedes the branch: ``x = x + attn(norm1(x));
    x = x + mlp(norm2(x))``, with ``mlp(x) = fc2(gelu(fc1(x)))``. In version 2 (https://arxiv.org/abs/2111.09883) it
    follows it, inside the residual: ``x = x + norm1(attn(x)); x = x + norm2(mlp(x))``.

    Keys are timm's, ``norm1.*``, ``attn.*``, ``norm2.*``, ``mlp.fc1.*``, ``mlp.fc2.*``; torchvision's ``mlp.0.*`` and
    ``mlp.3.*`` are taken too, and an ``attn_mask`` of either is left aside.

    Args:
        dim: channels of x and of the output.
        num_heads: heads; a divisor of ``dim``.
        window_size: side of a window, or (height, width).
        shift_size: by how much windows are shifted, or (down, right); half a window in every other block.
        mlp_ratio: hidden channels of the feed-forward network by ``dim``.
        dropout: share to drop in training, of the attention's output and twice in the feed-forward network.
        attention_dropout: share of the attention weights to drop in training.
        drop_path: share of the images that a branch leaves as they are in training; it is scaled up for the others
            (stochastic depth, https://arxiv.org/abs/1603.09382).
        version: 1 or 2.
        attention_options: keyword arguments of ``WindowAttention`` by their names there, such as ``padding``,
            ``mask_value``, ``input_resolution`` and ``backend``.

    Raises:
        ValueError: what ``WindowAttention`` raises, a share that is none, a ratio that leaves no hidden channel.
        TypeError: an option that ``WindowAttention`` does not have.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Pair = 7,
        shift_size: int | Pair = 0,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        *,
        version: int = 1,
        **attention_options: Any,
    ) -> None:
        super().__init__()
        for name, share in (
            ("dropout", dropout),
            ("attention_dropout", attention_dropout),
            ("drop_path", drop_path),
        ):
            check_share(name, share)
        for name, owner in (("proj_drop", "dropout"), ("attn_drop", "attention_dropout"), ("channels_first", "")):
            if name in attention_options:
                raise TypeError(f"SwinBlock takes no {name}" + (f", its name here is {owner}" if owner else ""))
        check_sizes(dim=dim)
        if not isinstance(mlp_ratio, int | float) or not 1 <= dim * mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio must be a number that leaves at least one hidden channel, got {mlp_ratio!r}")
        hidden_dim = int(dim * mlp_ratio)
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(
            dim, num_heads, window_size, shift_size, version=version, attn_drop=attention_dropout, proj_drop=dropout,
            **attention_options,
        )  # fmt: skip
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(dim, hidden_dim),
                act=nn.GELU(),
                drop1=nn.Dropout(dropout),
                fc2=nn.Linear(hidden_dim, dim),
                drop2=nn.Dropout(dropout),
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block.

        Args:
            x: (B, H, W, dim), in the dtype of the weights (under autocast, any float dtype), any strides.

        Returns:
            (B, H, W, dim), in the dtype of x (under autocast, what the sum with x gives).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        self.attn._maps(x)
        if self.attn.version == 1:
            x = x + self._drop_path(self.attn(self.norm1(x)))
            return x + self._drop_path(self.mlp(self.norm2(x)))
        x = x + self._drop_path(self.norm1(self.attn(x)))
        return x + self._drop_path(self.norm2(self.mlp(x)))

    def _drop_path(self, branch: torch.Tensor) -> torch.Tensor:
        if self.drop_path == 0 or not self.training:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, 1, device=branch.device) >= self.drop_path
        return branch * (keep / (1 - self.drop_path) if self.drop_path < 1 else keep).to(branch.dtype)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"drop_path={self.drop_path}" if self.drop_path else ""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}attn_mask", None)
        for theirs, ours in (("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2")):
            for leaf in ("weight", "bias"):
                if f"{prefix}{theirs}.{leaf}" in state_dict:
                    state_dict[f"{prefix}{ours}.{leaf}"] = state_dict.pop(f"{prefix}{theirs}.{leaf}")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_pair(name: str, value: Any, least: int) -> Pair:
    """Two integers out of one or two, or ValueError."""
    pair = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(pair, Sequence)
        or len(pair) != 2
        or any(not isinstance(size, int) or isinstance(size, bool) or size < least for size in pair)
    ):
        raise ValueError(f"{name} must be an integer of at least {least}, or two of them, got {value!r}")
    return pair[0], pair[1]


def _uncovered(shift: Pair, size: Pair, window: Pair) -> Pair:
    """The shift, 0 on an axis that one window covers."""
    return (0 if size[0] <= window[0] else shift[0], 0 if size[1] <= window[1] else shift[1])


def _normalize(x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """``scale * F.normalize(x, dim=-1)``, computed in float32 or wider, in x's dtype."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    factor = norm.clamp(min=EPS).reciprocal()
    # keys of padded tokens are 0: a gradient of 1e12 overflows float16, and times 0 is NaN in that of the weight
    factor = torch.where(norm > 0, factor, 0.0)
    return (x * (factor if scale is None else factor * scale)).to(x.dtype)


def _coordinates(window: Pair, measure: Pair) -> torch.Tensor:
    """Relative positions in a window as version 2's network takes them, (1, 2 height - 1, 2 width - 1, 2), float32."""
    sides = []
    for size, unit in zip(window, measure, strict=True):
        steps = torch.arange(1 - size, size, dtype=torch.float32) / max(unit - 1, 1) * 8
        sides.append(steps.sign() * torch.log2(steps.abs() + 1) / 3)
    return torch.stack(torch.meshgrid(sides, indexing="ij"), dim=-1).unsqueeze(0)


def _layout_repr(module: _GroupedAttention) -> str:
    options = "".join(f", {name}=True" for name in ("channels_first", "head_first") if getattr(module, name))
    return options + backend_repr(module.backend)
