"""Positions of the pixels of a map: learned, sinusoidal, and relative as a bias, each for any height and width."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attnk.modules._checks import check_positive, check_sizes
from attnk.ops._calls import autocast_is_on, is_plain

STD = 0.02  # of the truncated normal distribution that learned positions start from, as in ViT and Swin


class _Position2d(nn.Module):
    def as_map(self, height: int, width: int, **options: Any) -> torch.Tensor:
        """The encoding as a map (1, dim, height, width), a channels_last view; to be added to one in any format."""
        return self(height, width, **options).T.unflatten(1, (height, width)).unsqueeze(0)


class LearnedPosition2d(_Position2d):
    """A learned vector for each pixel of a grid (Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929).

    On another grid the table is resized bicubically, as ViTs do it (``F.interpolate`` without antialiasing), with a
    gradient that is the same in every run. The parameter ``pos_embed`` is (1, height width, dim), as in ViTs without a
    class token.

    Args:
        height: of the grid the table is for.
        width: of it.
        dim: channels.

    Raises:
        ValueError: a size that is no positive integer.
    """

    def __init__(self, height: int, width: int, dim: int) -> None:
        super().__init__()
        check_sizes(height=height, width=width, dim=dim)
        self.height, self.width, self.dim = height, width, dim
        self.pos_embed = nn.Parameter(torch.empty(1, height * width, dim))
        nn.init.trunc_normal_(self.pos_embed, std=STD)

    def forward(self, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """The encoding of a grid, by default of the table's own: (height width, dim), row by row."""
        height, width = _grid(self, height, width)
        table = self.pos_embed[0].unflatten(0, (self.height, self.width))
        return resize_grid(table, height, width).flatten(0, 1)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.height}, {self.width}, dim={self.dim}"


class SinusoidalPosition2d(_Position2d):
    """The fixed encoding of DETR (Carion et al., 2020, https://arxiv.org/abs/2005.12872), for maps without padding.

    The first half of the channels encodes the row, the second the column, counted from 1: sines in the even ones,
    cosines in the odd ones, with wavelengths in a geometric row from 2 pi to ``temperature`` 2 pi. It lies on the
    device and in the dtype the module was moved to (computed in float32 or wider), holds nothing in its state dict, and
    keeps the last grid's encoding.

    Args:
        dim: channels, a multiple of 4.
        temperature: the largest wavelength by the smallest.
        normalize: whether positions are divided by the height and width and multiplied by ``scale``.
        scale: what a side of the map then measures; 2 pi by default.
        amplitude: of the sines and cosines.

    Raises:
        ValueError: ``dim`` that is no positive multiple of 4, a temperature or amplitude that is not positive, a scale
            without ``normalize``.
    """

    anchor: torch.Tensor

    def __init__(
        self,
        dim: int,
        temperature: float = 10000,
        normalize: bool = False,
        scale: float | None = None,
        *,
        amplitude: float = 1.0,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim)
        check_positive(amplitude=amplitude)
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4, got {dim}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}")
        if scale is not None and not normalize:
            raise ValueError(f"scale must be None without normalize=True, got {scale!r}")
        self.dim, self.temperature, self.normalize = dim, temperature, normalize
        self.scale = 2 * math.pi if scale is None else scale
        self.amplitude = amplitude
        self.register_buffer("anchor", torch.empty(0), persistent=False)  # lies where the module was moved to
        self._last: tuple[tuple, torch.Tensor] | None = None

    def forward(self, height: int, width: int, like: torch.Tensor | None = None) -> torch.Tensor:
        """The encoding of a grid: (height width, dim), row by row; shared by all calls, not to be written to.

        ``like`` is a tensor on whose device and in whose dtype it shall be, in place of the module's own: for networks
        whose weights moved without it, as ``load_state_dict(assign=True)`` and FSDP's mixed precision do.
        """
        _check_positive(height=height, width=width)
        like = self.anchor if like is None else like
        if not is_plain(self.anchor) or not is_plain(like):
            return self._encode(height, width, like.device, like.dtype)
        key = (height, width, like.device, like.dtype)
        if self._last is None or self._last[0] != key:
            with torch.inference_mode(False):
                self._last = (key, self._encode(height, width, like.device, like.dtype))
        return self._last[1]

    def _encode(self, height: int, width: int, device: torch.device, to: torch.dtype) -> torch.Tensor:
        dtype = torch.promote_types(to, torch.float32)
        exponents = torch.arange(self.dim // 4, device=device, dtype=dtype) / (self.dim // 4)
        sides = []
        for size in (height, width):
            position = torch.arange(1, size + 1, device=device, dtype=dtype)
            if self.normalize:
                position = position / (size + 1e-6) * self.scale
            angle = position[:, None] / self.temperature**exponents
            sides.append(torch.stack((angle.sin(), angle.cos()), 2).flatten(1))
        rows = sides[0][:, None].expand(-1, width, -1)
        columns = sides[1][None].expand(height, -1, -1)
        return (torch.cat((rows, columns), 2).flatten(0, 1) * self.amplitude).to(to)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def extra_repr(self) -> str:
        """Options."""
        scale = f", scale={self.scale:.6g}" if self.normalize else ""
        amplitude = "" if self.amplitude == 1 else f", amplitude={self.amplitude:.6g}"
        return f"{self.dim}, temperature={self.temperature}, normalize={self.normalize}{scale}{amplitude}"


class RelativePositionBias(nn.Module):
    """A learned bias by head and by where a key lies from a query (Liu et al., Swin, https://arxiv.org/abs/2103.14030).

    The parameter ``relative_position_bias_table``, ((2 height - 1) (2 width - 1), num_heads), has Swin's name and
    order, so that its checkpoints load. Pass it on as a table, which attention reads without making the bias:
    ``attnk.softmax_attention(q, k, v, bias_table=position(height, width), grid=(height, width))``.

    Args:
        height: of the grid the table is for.
        width: of it.
        num_heads: heads.

    Raises:
        ValueError: a size that is no positive integer.
    """

    def __init__(self, height: int, width: int, num_heads: int) -> None:
        super().__init__()
        check_sizes(height=height, width=width, num_heads=num_heads)
        self.height, self.width, self.num_heads = height, width, num_heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * height - 1) * (2 * width - 1), num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=STD)

    def forward(self, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """The table of a grid, by default of its own; see ``resize_bias_table``."""
        new_grid = _grid(self, height, width)
        return resize_bias_table(self.relative_position_bias_table, (self.height, self.width), new_grid)

    def dense(self, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """The bias of a grid as attention takes it, (num_heads, N, N) with N = height width, queries by keys."""
        height, width = _grid(self, height, width)
        table = self(height, width).unflatten(0, (2 * height - 1, 2 * width - 1))
        # the row of query i and key j is i - j + height - 1: windows that slide over the table, read backwards
        windows = table.unfold(0, height, 1).unfold(1, width, 1).flip(3, 4)
        return windows.permute(2, 0, 1, 3, 4).flatten(3).flatten(1, 2).contiguous()

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.height}, {self.width}, num_heads={self.num_heads}"


def resize_bias_table(table: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Resize a relative position bias table to another grid, bicubically in each head, as timm does.

    Args:
        table: ((2 height - 1) (2 width - 1), heads).
        grid: (height, width) it is for.
        new_grid: (height, width) it shall be for.

    Returns:
        The table of the new grid, in the old one's dtype, with a gradient; the table itself where the grids are equal.

    Raises:
        ValueError: a table of another grid, or a side that is not positive.
    """
    (height, width), (new_height, new_width) = grid, new_grid
    rows = (2 * height - 1) * (2 * width - 1)
    if table.dim() != 2 or table.shape[0] != rows or height < 1 or width < 1:
        raise ValueError(f"table must be ({rows}, heads) for grid={tuple(grid)}, got {tuple(table.shape)}")
    if new_height < 1 or new_width < 1:
        raise ValueError(f"new_grid must be positive, got {tuple(new_grid)}")
    square = table.unflatten(0, (2 * height - 1, 2 * width - 1))
    return resize_grid(square, 2 * new_height - 1, 2 * new_width - 1).flatten(0, 1)


def _grid(module: LearnedPosition2d | RelativePositionBias, height: int | None, width: int | None) -> tuple[int, int]:
    height = module.height if height is None else height
    width = module.width if width is None else width
    _check_positive(height=height, width=width)
    return height, width


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:  # may be symbolic, so its type is not asked
            raise ValueError(f"{name} must be positive, got {size!r}")


def resize_grid(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A (h, w, n) table as (height, width, n).

    Bicubic interpolation is a matrix on each axis. The products have a deterministic gradient on a GPU, which
    F.interpolate has not.
    """
    if table.shape[:2] == (height, width):
        return table
    if autocast_is_on(table):
        with torch.autocast(table.device.type, enabled=False):
            return resize_grid(table, height, width)
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    rows, columns = (_bicubic(old, new, wide) for old, new in zip(table.shape, (height, width), strict=False))
    wide = (rows @ wide.flatten(1)).unflatten(1, table.shape[1:])
    return (columns @ wide).to(table.dtype)


def _bicubic(old: int, new: int, like: torch.Tensor) -> torch.Tensor:
    """The matrix (new, old) that resizes an axis."""
    eye = torch.eye(old, dtype=like.dtype, device=like.device)
    return F.interpolate(eye[None, None], size=(new, old), mode="bicubic")[0, 0]
