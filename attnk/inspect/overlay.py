"""Drawing maps over pictures, with matplotlib, which is imported when something is drawn."""

import math
from typing import Any

import torch
import torch.nn.functional as F

PANEL = 2.6  # inches
HEAT = "inferno"
INK, CURVE = "0.2", "#4269d0"
LEAST_SPAN = 0.02  # between the ends of the colours, so that what is all but even looks so


def as_picture(image: Any, index: int) -> torch.Tensor:
    """A picture (H, W, 3) in grey from 0 to 1, whatever it is given as.

    Args:
        image: a tensor or array (B, 1 or 3, H, W), (1 or 3, H, W), (H, W, 3) or (H, W), of any range of values.
        index: which image of a batch.

    Raises:
        ValueError: another shape, or no such image.
    """
    picture = torch.as_tensor(image).detach().to("cpu", torch.float32)
    if picture.dim() == 4:
        if not -len(picture) <= index < len(picture):
            raise ValueError(f"index must be that of one of {len(picture)} images, got {index}")
        picture = picture[index]
    if picture.dim() == 3 and picture.shape[0] in (1, 3):
        picture = picture.mean(0)
    elif picture.dim() == 3 and picture.shape[2] == 3:
        picture = picture.mean(2)
    if picture.dim() != 2 or picture.numel() == 0:
        shapes = "(3, H, W), (1, H, W), (H, W, 3), (H, W) or a batch (B, 3, H, W)"
        raise ValueError(f"image must be {shapes}, got {tuple(torch.as_tensor(image).shape)}")
    low, high = picture.min(), picture.max()
    picture = (picture - low) / (high - low).clamp_min(1e-12)
    return picture.unsqueeze(2).expand(-1, -1, 3)


def draw_overlay(
    picture: torch.Tensor, heat: torch.Tensor, caption: str, alpha: float, pixel: tuple[int, int] | None = None
) -> Any:
    """A figure of a picture and, beside it, the same with a map over it, a scale, and a ring around a map's pixel."""
    from matplotlib.figure import Figure

    height, width = picture.shape[:2]
    figure = Figure(figsize=(2 * PANEL * width / height + 1.2, PANEL + 0.5), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    plain, covered = axes
    _show(plain, picture, "picture")
    shown = _show(covered, picture, caption, heat, alpha)
    if pixel is not None:
        down, right = (
            (place + 0.5) * full / size - 0.5
            for place, full, size in zip(pixel, picture.shape[:2], heat.shape, strict=True)
        )
        for ring, line in (("white", 3.5), ("black", 1.5)):
            covered.plot(right, down, "o", markersize=9, markerfacecolor="none", color=ring, markeredgewidth=line)
    bar: Any = figure.colorbar(shown, ax=covered, shrink=0.85)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, colors=INK)
    return figure


def draw_grid(picture: torch.Tensor, panels: list[tuple[str, torch.Tensor]], alpha: float) -> Any:
    """A figure of a picture and one panel a layer: maps (H, W) over the picture, vectors (C,) as curves."""
    from matplotlib.figure import Figure

    count = len(panels) + 1
    columns = min(count, max(2, math.ceil(math.sqrt(1.6 * count))))
    rows = math.ceil(count / columns)
    height, width = picture.shape[:2]
    figure = Figure(figsize=(columns * PANEL * width / height, rows * (PANEL + 0.45)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    _show(axes[0], picture, "picture")
    for axis, (caption, values) in zip(axes[1:], panels, strict=False):
        if values.dim() == 2:
            _show(axis, picture, f"{caption}\n{_range(values)}", values, alpha)
        else:
            _curve(axis, values, f"{caption}\n{_range(values)}")
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure


def _show(axis: Any, picture: torch.Tensor, caption: str, heat: torch.Tensor | None = None, alpha: float = 0.0) -> Any:
    axis.set_axis_off()
    axis.set_title(caption, fontsize=8, color=INK)
    shown = axis.imshow(picture.numpy(), interpolation="nearest")
    if heat is None:
        return shown
    size = (int(picture.shape[0]), int(picture.shape[1]))
    heat = F.interpolate(heat.detach().cpu().float()[None, None], size, mode="bilinear", align_corners=False)
    low, high = heat.min().item(), heat.max().item()
    spare = max(0.0, LEAST_SPAN - (high - low)) / 2
    return axis.imshow(heat[0, 0].numpy(), cmap=HEAT, alpha=alpha, vmin=low - spare, vmax=high + spare)


def _curve(axis: Any, values: torch.Tensor, caption: str) -> None:
    """The gates of all channels, from the least to the most open."""
    axis.set_title(caption, fontsize=8, color=INK)
    axis.plot(values.detach().cpu().float().sort().values.numpy(), color=CURVE, linewidth=2)
    axis.set_ylim(0, max(1.0, values.max().item()) * 1.02)
    axis.set_xlabel("channels, by gate", fontsize=7, color=INK)
    axis.tick_params(labelsize=7, colors=INK)
    axis.spines[["top", "right"]].set_visible(False)


def _range(values: torch.Tensor) -> str:
    return f"{values.min().item():.3g} to {values.max().item():.3g}"
