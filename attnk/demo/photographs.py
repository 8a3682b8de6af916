"""Part 2: six kinds of attention on two photographs, recorded by `attnk.capture` and drawn."""

import pathlib
import textwrap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnk

CROP = 64  # pixels, the side of what the network sees while it learns
STRIDE = 4  # pixels of what the network sees to one pixel of its maps
MARGIN = 32  # pixels reflected around a photograph when it is looked at: keeps zero padding out of the picture
VIEW_SCALE = 0.4  # the photographs are drawn as seen at one of the sizes the network learnt at
LEARN_SCALES = (0.18, 0.42)
WIDTHS = (16, 32, 64)
HEADS = 4
QUERIES = ((0.55, 0.32), (0.45, 0.55))  # of each photograph, the pixel whose attention is drawn: down, right
COLUMNS = 5
CAPTION_WIDTH = 160  # characters
PERCENTILES = (0.01, 0.99)  # of a gate, where its colours begin and end


class _SixLooks(nn.Module):
    """A VGG-like trunk whose features six heads look at, each through an attention of its own, then mean and linear.

    Gates multiply the features. Axial and self-attention have no residual here: their heads see what they fetch alone.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in WIDTHS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for channels in (before, width):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.trunk = nn.Sequential(*layers)
        self.attention = nn.ModuleDict({
            "se": attnk.SELayer(before),
            "cbam": attnk.CBAM(before),
            "spatial": attnk.SpatialAttention(7, output="gated"),
            "coordinate": attnk.CoordinateAttention(before),
            "axial": attnk.AxialAttention(before, HEADS),
            "self": attnk.FeatureMapAttention(attnk.SelfAttention(before, HEADS, dropout=0.0)),
        })  # fmt: skip
        self.classifiers = nn.ModuleDict({name: nn.Linear(before, 4) for name in self.attention})

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the logits of every head (heads, B, 4)."""
        features = self.trunk(x)
        return torch.stack([
            self.classifiers[name](attention(features).mean((2, 3))) for name, attention in self.attention.items()
        ])  # fmt: skip


def _turned_crops(photos: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Random crops of both photographs, faded and re-lit at random, each turned by y quarter turns."""
    low, high = LEARN_SCALES
    small = F.interpolate(photos, scale_factor=low + (high - low) * torch.rand(()).item(), mode="bilinear",
                          antialias=True)  # fmt: skip
    y = torch.randint(4, (count,))
    crops = []
    for i in range(count):
        top, left = (int(torch.randint(side - CROP + 1, ())) for side in small.shape[2:])
        crop = small[i % len(small), :, top : top + CROP, left : left + CROP]
        crops.append(torch.rot90(crop, int(y[i]), (1, 2)))
    x = torch.stack(crops)
    grey = x.mean(1, keepdim=True)
    fade, contrast, light = (torch.rand(count, 1, 1, 1) for _ in range(3))
    x = grey + (x - grey) * 1.2 * fade
    return _normalized((x - 0.5) * (0.6 + 0.8 * contrast) + 0.3 + 0.4 * light), y


def _normalized(x: Tensor) -> Tensor:
    return 4 * (x - 0.5)


class _Panel(NamedTuple):
    """A map (height, width) to draw over a photograph: of attention or of factors, with a ring where a query is."""

    title: str
    heat: Tensor
    is_attention: bool = False
    has_ring: bool = False


@torch.no_grad()
def _look(model: _SixLooks, photos: Tensor, device: torch.device) -> tuple[Tensor, list[list[_Panel]]]:
    """The channel gates of both photographs (2, C), and for each photograph what every head looks at."""
    height, width = (int(side * VIEW_SCALE) // 8 * 8 for side in photos.shape[2:])
    small = F.interpolate(photos, size=(height, width), mode="bilinear", antialias=True)
    x = F.pad(_normalized(small), [MARGIN] * 4, mode="reflect").to(device)
    with attnk.capture(model.eval()) as maps:
        model(x)
    channel_gates = maps["attention.se"].gate
    features = model.trunk(x)
    share = (features * channel_gates).sum(1) / features.sum(1)  # NaN where there are no features
    axial = maps["attention.axial"], maps["attention.axial#2"]  # along columns and along rows
    pixels = (maps["attention.self.layer"],)
    edge = MARGIN // STRIDE
    looks = []
    for index, (down, right) in enumerate(QUERIES):
        query = edge + int(down * height / STRIDE), edge + int(right * width / STRIDE)
        panels = [
            _Panel("SELayer: share let through", share[index]),
            _Panel("CBAM, its spatial half", maps["attention.cbam.spatial_attention"].heat()[index]),
            _Panel("SpatialAttention", maps["attention.spatial"].heat()[index]),
            _Panel("CoordinateAttention, mean", maps["attention.coordinate"].heat()[index]),
        ]
        for title, records in (("AxialAttention", axial), ("SelfAttention", pixels)):
            for whose, at in (("of the ring", query), ("of all pixels", None)):
                heat = sum(record.heat(at)[index] * record.keys for record in records) / len(records)
                panels.append(_Panel(f"{title} {whose}", heat, is_attention=True, has_ring=at is not None))
        looks.append([panel._replace(heat=panel.heat[edge:-edge, edge:-edge].cpu()) for panel in panels])
    return channel_gates.flatten(1).cpu(), looks


def draw_attention(quick: bool, device: torch.device, out: pathlib.Path) -> dict:
    """Teach the network which way is up on two photographs, then draw what its heads look at.

    Args:
        quick: Fewer steps and smaller batches.
        device: Where to train.
        out: Folder for `attention.png`; made if absent.

    Returns:
        `png`, its path; `accuracy`, a percentage for each head; `ranges`, what the colours of each panel reach from and
        to, for each photograph.
    """
    from sklearn.datasets import load_sample_images
    from tqdm import trange

    steps, batch = (12, 16) if quick else (200, 32)
    print(f"\n2. Two photographs: a small VGG learns how far a crop was turned ({steps} steps of {batch} crops),")
    print("   with six heads, each of which looks through an attention of its own")
    photos = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    photos = photos.permute(0, 3, 1, 2).float() / 255  # (2, 3, 427, 640)
    torch.manual_seed(0)
    model = _SixLooks().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in trange(steps, desc="   photographs", unit="step", leave=False):
        x, y = _turned_crops(photos, batch)
        optimizer.zero_grad()
        logits = model(x.to(device))
        F.cross_entropy(logits.flatten(0, 1), y.to(device).repeat(len(logits))).backward()
        optimizer.step()
        schedule.step()
    x, y = _turned_crops(photos, 64 if quick else 512)
    with torch.no_grad():
        right = (model.eval()(x.to(device)).argmax(2).cpu() == y).float().mean(1)
    accuracy = dict(zip(model.attention, (100 * right).tolist(), strict=True))

    png = pathlib.Path(out) / "attention.png"
    png.parent.mkdir(parents=True, exist_ok=True)
    ranges = _draw(photos, *_look(model, photos, device), png, steps, accuracy)
    listed = ", ".join(f"{name} {percent:.1f} %" for name, percent in accuracy.items())
    print(f"   right on fresh crops of the same photographs (chance is 25 %): {listed}")
    print(f"   wrote {png}")
    return {"png": png, "accuracy": accuracy, "ranges": ranges}


def _draw(
    photos: Tensor, gates: Tensor, looks: list[list[_Panel]], png: pathlib.Path, steps: int, accuracy: dict[str, float]
) -> list[list[tuple[float, float]]]:
    """Draw two rows for each photograph: itself, its channel gates and every panel. Returns the panels' ranges."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 11.2), facecolor="white")
    FigureCanvasAgg(figure)  # no pyplot: the caller's windows and backend stay as they were
    grid = figure.add_gridspec(2 * len(photos), COLUMNS, left=0.01, right=0.935, top=0.885, bottom=0.105,
                               wspace=0.04, hspace=0.3)  # fmt: skip
    order = gates.mean(0).argsort()
    ranges = []
    for index, (photo, panels) in enumerate(zip(photos, looks, strict=True)):
        axes = [figure.add_subplot(grid[2 * index + n // COLUMNS, n % COLUMNS]) for n in range(2 + len(panels))]
        axes[0].imshow(photo.permute(1, 2, 0).numpy())
        axes[0].set_title("photograph", fontsize=11)
        _ring(axes[0], photo, QUERIES[index])
        axes[0].set_axis_off()
        _draw_gates(axes[1], gates[index, order], photo.shape[1] / photo.shape[2])
        ranges.append([_draw_panel(axis, photo, panel) for axis, panel in zip(axes[2:], panels, strict=True)])
        for axis, panel in zip(axes[2:], panels, strict=True):
            if panel.has_ring:
                _ring(axis, photo, QUERIES[index])
    bar = figure.colorbar(ScalarMappable(cmap="inferno"), cax=figure.add_axes((0.95, 0.105, 0.012, 0.78)))
    bar.set_ticks([0, 1], labels=["least", "most"])
    bar.set_label("within each panel's own range", labelpad=-18)
    figure.suptitle("Six kinds of attention on the same features, recorded by attnk.capture", fontsize=17, y=0.965)
    low, high = min(accuracy.values()), max(accuracy.values())
    right = f"{low:.1f} to {high:.1f} % right on fresh crops"
    caption = (
        f"A small VGG with six heads, each behind an attention of its own, taught from scratch for {steps} steps, on "
        "crops of these two photographs only, to tell by how many quarter turns a crop was turned "
        f"({right}, chance 25 %). Nobody told it where to look. Above each panel, what its colours span: of gates, the "
        "factor on features; of attention, on a logarithmic scale, how many times what it were if pixels looked "
        "everywhere alike. SELayer has one gate a channel, none a pixel: drawn is the share of each pixel's features "
        "that passes, and nothing where a pixel has none."
    )
    caption = textwrap.fill(caption, CAPTION_WIDTH)
    figure.text(0.47, 0.045, caption, ha="center", va="center", fontsize=11, color="0.25")
    figure.savefig(png, dpi=110)
    return ranges


def _draw_gates(axis: Any, gates: Tensor, shape: float) -> None:
    """Bars of the channel gates, in a box of a photograph's shape."""
    axis.bar(range(len(gates)), gates.numpy(), width=1.0, color="#d8576b")
    axis.set_title(f"SELayer: {len(gates)} channel gates\n{gates.min():.2f} to {gates.max():.2f}", fontsize=11)
    axis.set_xlim(-0.5, len(gates) - 0.5)
    axis.set_ylim(0, 1)
    axis.set_box_aspect(shape)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[["top", "right"]].set_visible(False)


def _draw_panel(axis: Any, photo: Tensor, panel: _Panel) -> tuple[float, float]:
    """Draw a map over a photograph in grey. Returns what its colours reach from and to."""
    from matplotlib.colors import LogNorm, Normalize

    size = photo.shape[1:]
    heat = F.interpolate(panel.heat[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    if panel.is_attention:  # may lie in a few pixels, far above the rest
        low, high = 1.0, max(2.0, panel.heat.max().item())
        norm: Normalize = LogNorm(low, high, clip=True)
        span = f"1 to {high:.0f} times even"
    else:
        low, high = torch.nanquantile(panel.heat.flatten(), torch.tensor(PERCENTILES)).tolist()
        norm = Normalize(low, high)
        span = f"{low:.2f} to {high:.2f}"
    axis.imshow(photo.mean(0).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.imshow(heat.numpy(), cmap="inferno", norm=norm, alpha=0.72)
    axis.set_title(f"{panel.title}\n{span}", fontsize=11)
    axis.set_axis_off()
    return low, high


def _ring(axis: Any, photo: Tensor, place: tuple[float, float]) -> None:
    """The pixel whose attention is drawn."""
    height, width = photo.shape[1:]
    for colour, line in (("black", 4.0), ("white", 2.0)):
        axis.plot(place[1] * width, place[0] * height, "o", markersize=11, markerfacecolor="none", color=colour,
                  markeredgewidth=line)  # fmt: skip
