"""What `python -m attnk demo` runs: accuracy, a picture and a stopwatch, all on real images and without a download.

1. A small network on real handwritten digits, with and without `attnk.SpatialAttention`, several seeds.
2. A VGG-like network with a gate after each block, taught on two photographs to tell which way is up; what its gates
   let through is drawn over the photographs.
3. The tutorials' spatial attention against `attnk.SpatialAttention`: the same weights, the same result, two times.
"""

import contextlib
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnk import SpatialAttention

CROP = 64  # pixels, the side of what the photograph network sees while it learns
MARGIN = 32  # pixels reflected around a photograph when it is looked at: keeps zero padding out of the picture
VIEW_SCALE = 0.4  # the photographs are looked at in the middle of the sizes the network learnt at
LEARN_SCALES = (0.18, 0.42)
GATE_KERNEL = 7


def main(quick: bool = False, out: pathlib.Path = pathlib.Path("out")) -> dict:
    """Run the three parts of the demo, print their results and write one picture.

    Args:
        quick: Fewer seeds, steps and shapes: seconds in place of a minute or two, and results to match.
        out: Folder for `attention.png`; made if absent.

    Returns:
        The numbers printed: `digits` (for `without`, `gated` and `residual`: `accuracy`, a percentage for each seed,
        and with gates `gain` and `within_spread`), `photographs` (`png`, `accuracy`, `gate_ranges`), `timing` (for each
        shape the seconds, ratios and largest differences), `device` and `threads`.

    Raises:
        SystemExit: If scikit-learn, matplotlib or tqdm is missing.
    """
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        raise SystemExit(f'The demo needs {error.name}, which is missing; run: pip install "attnk[demo]"') from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"attnk demo on {name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    with torch.random.fork_rng():  # the caller's random state stays as it was
        return {
            "device": name,
            "threads": torch.get_num_threads(),
            "digits": _digits(quick, device),
            "photographs": _photographs(quick, device, out),
            "timing": _timing(quick, device),
        }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread: work this small only loses by sharing, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# 1. Digits


class _DigitNet(nn.Module):
    """Three convolutions, each of the first two followed by a gate or, with `output` None, by nothing."""

    def __init__(self, output: str | None):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 16), (16, 32), (32, 64)))
        self.head = nn.Linear(64 * 4 * 4, 10)
        # Made last, so that with one seed both networks start from the same convolutions.
        self.gates = nn.ModuleList(
            nn.Identity() if output is None else SpatialAttention(kernel_size=3, output=output) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.gates[0](F.relu(self.convs[0](x)))  # (B, 16, 8, 8)
        x = self.gates[1](F.relu(self.convs[1](x)))  # (B, 32, 8, 8)
        x = F.relu(self.convs[2](F.max_pool2d(x, 2)))  # (B, 64, 4, 4)
        return self.head(x.flatten(1))


@_one_thread()
def _digits(quick: bool, device: torch.device) -> dict:
    """Train the digit network without gates and with both kinds, and compare test accuracies seed by seed."""
    from scipy.stats import t as student
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm

    seeds, epochs, batch = (2, 4, 64) if quick else (5, 20, 64)
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images.reshape(-1, 1, 8, 8) / 16.0, labels, test_size=0.5, random_state=0, stratify=labels)
    x, x_test = (torch.tensor(a, dtype=torch.float32, device=device) for a in split[:2])
    y, y_test = (torch.tensor(a, device=device) for a in split[2:])
    print(f"\n1. Handwritten digits: {len(x)} to learn from, {len(x_test)} to test on, {epochs} epochs, {seeds} seeds")

    variants = {"without": None, "gated": "gated", "residual": "residual"}
    accuracy: dict[str, list[float]] = {name: [] for name in variants}
    with tqdm(total=len(variants) * seeds * epochs, desc="   digits", unit="epoch", leave=False) as bar:
        for seed in range(seeds):
            for name, output in variants.items():
                torch.manual_seed(seed)
                model = _DigitNet(output).to(device)
                optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
                order = torch.Generator().manual_seed(seed)
                for _ in range(epochs):
                    for rows in torch.randperm(len(x), generator=order).to(device).split(batch):
                        optimizer.zero_grad()
                        F.cross_entropy(model(x[rows]), y[rows]).backward()
                        optimizer.step()
                    bar.update()
                with torch.no_grad():
                    accuracy[name].append(100 * (model(x_test).argmax(1) == y_test).float().mean().item())

    print(f"   {'':28s}{'accuracy, %':^16s}{'gain, points':>14s}{'95 % interval of the gain':>28s}")
    results: dict[str, dict] = {}
    for name, output in variants.items():
        label = "no gates" if output is None else f'SpatialAttention, "{output}"'
        line = f"   {label:28s}{statistics.mean(accuracy[name]):7.2f} +- {statistics.stdev(accuracy[name]):.2f} "
        results[name] = {"accuracy": accuracy[name]}
        if output is not None:
            gains = [b - a for a, b in zip(accuracy["without"], accuracy[name], strict=True)]  # seed by seed
            gain = statistics.mean(gains)
            half = float(student.ppf(0.975, seeds - 1)) * statistics.stdev(gains) / seeds**0.5
            results[name] |= {"gain": gain, "within_spread": abs(gain) <= half}
            verdict = "within the spread" if abs(gain) <= half else "beyond the spread"
            line += f"{gain:+13.2f}{f'{gain - half:+.2f} to {gain + half:+.2f}':>20s}, {verdict}"
        print(line.rstrip())
    print("   Within the spread: so few runs cannot tell the gain from nothing. Network and digits are small and easy:")
    print("   a gate scales features down at first, a residual one does not; neither says what a large network gains.")
    return results


# 2. Photographs


def _vgg_like(widths: tuple[int, ...] = (16, 32, 64)) -> nn.Sequential:
    """VGG blocks (two 3x3 convolutions, pool), each followed by a spatial gate, then a four-way head."""
    layers, channels = [], 3
    for width in widths:
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers += [nn.MaxPool2d(2), SpatialAttention(kernel_size=GATE_KERNEL, output="gated")]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


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


@torch.no_grad()
def _gate_maps(model: nn.Sequential, photos: Tensor, device: torch.device) -> list[Tensor]:
    """What every gate multiplies by, upsampled to the photographs: one (B, height, width) tensor for each gate."""
    height, width = photos.shape[2:]
    small = F.interpolate(photos, size=(int(height * VIEW_SCALE) // 8 * 8, int(width * VIEW_SCALE) // 8 * 8),
                          mode="bilinear", antialias=True)  # fmt: skip
    x = F.pad(_normalized(small), [MARGIN] * 4, mode="reflect").to(device)
    maps = []
    for layer in model.eval():
        if isinstance(layer, SpatialAttention):
            viewer = SpatialAttention(kernel_size=GATE_KERNEL, output="map").to(device)
            viewer.load_state_dict(layer.state_dict())
            edge = MARGIN * x.shape[2] // (small.shape[2] + 2 * MARGIN)
            gate = viewer(x)[:, :, edge:-edge, edge:-edge]
            maps.append(F.interpolate(gate, size=(height, width), mode="bicubic")[:, 0].clamp(0, 1).cpu())
        x = layer(x)
    return maps


@_one_thread()
def _photographs(quick: bool, device: torch.device, out: pathlib.Path) -> dict:
    """Teach the VGG-like network which way is up on two photographs, then draw its gates over them."""
    from sklearn.datasets import load_sample_images
    from tqdm import trange

    steps, batch = (12, 16) if quick else (250, 32)
    print(f"\n2. Two photographs: a VGG-like network learns how far a crop was turned ({steps} steps of {batch} crops)")
    photos = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    photos = photos.permute(0, 3, 1, 2).float() / 255  # (2, 3, 427, 640)
    torch.manual_seed(0)
    model = _vgg_like().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=steps)
    for _ in trange(steps, desc="   photographs", unit="step", leave=False):
        x, y = _turned_crops(photos, batch)
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(device)), y.to(device)).backward()
        optimizer.step()
        schedule.step()
    x, y = _turned_crops(photos, 64 if quick else 256)
    with torch.no_grad():
        accuracy = 100 * (model.eval()(x.to(device)).argmax(1).cpu() == y).float().mean().item()

    maps = _gate_maps(model, photos, device)
    png = pathlib.Path(out) / "attention.png"
    png.parent.mkdir(parents=True, exist_ok=True)
    ranges = _draw(photos, maps, png, steps, accuracy)
    print(f"   right on {accuracy:.0f} % of fresh crops of the same photographs (chance is 25 %); wrote {png}")
    return {"png": png, "accuracy": accuracy, "gate_ranges": ranges}


def _draw(photos: Tensor, maps: list[Tensor], png: pathlib.Path, steps: int, accuracy: float) -> list:
    """Draw one row for each photograph: itself, then each gate over it. Returns the range of every gate drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7.1), facecolor="white")
    FigureCanvasAgg(figure)  # no pyplot: the caller's windows and backend stay as they were
    grid = figure.add_gridspec(len(photos), 1 + len(maps), left=0.01, right=0.93, top=0.86, bottom=0.105,
                               wspace=0.03, hspace=0.13)  # fmt: skip
    ranges = []
    for row, photo in enumerate(photos):
        axes = [figure.add_subplot(grid[row, column]) for column in range(1 + len(maps))]
        axes[0].imshow(photo.permute(1, 2, 0).numpy())
        axes[0].set_title("photograph", fontsize=11)
        grey = photo.mean(0, keepdim=True).numpy()[0]
        for number, (axis, gate) in enumerate(zip(axes[1:], maps, strict=True), start=1):
            low, high = torch.quantile(gate[row], torch.tensor([0.02, 0.98])).tolist()
            axis.imshow(grey, cmap="gray", vmin=0, vmax=1)
            axis.imshow(gate[row].numpy(), cmap="inferno", vmin=low, vmax=high, alpha=0.72)
            axis.set_title(f"gate after block {number}:  {low:.2f} to {high:.2f}", fontsize=11)
            ranges.append((low, high))
        for axis in axes:
            axis.set_axis_off()
    bar = figure.colorbar(ScalarMappable(cmap="inferno"), cax=figure.add_axes((0.945, 0.105, 0.012, 0.755)))
    bar.set_ticks([0, 1], labels=["least", "most"])
    bar.set_label("let through, within each panel's own range", labelpad=-18)
    figure.suptitle("Where a small VGG looks: its spatial gates (attnk.SpatialAttention)", fontsize=17, y=0.965)
    figure.text(0.47, 0.035, f"Taught from scratch for {steps} steps, on crops of these two photographs only, to tell "
                f"by how many quarter turns a crop was turned ({accuracy:.0f} % right, chance 25 %).\nNobody told it "
                "where to look. Above each panel: the 2nd and 98th percentile of the gate, a factor on features.",
                ha="center", va="center", fontsize=11, color="0.25")  # fmt: skip
    figure.savefig(png, dpi=110)
    return ranges


# 3. Stopwatch


class _TutorialGate(nn.Module):
    """Spatial attention as tutorials write it: mean, max, cat, conv, sigmoid, multiply."""

    def __init__(self, kernel_size: int = GATE_KERNEL):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        avg_out = torch.mean(x, dim=1, keepdim=True)
        max_out, _ = torch.max(x, dim=1, keepdim=True)
        return x * torch.sigmoid(self.conv1(torch.cat([avg_out, max_out], dim=1)))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _timing(quick: bool, device: torch.device) -> list[dict]:
    """Time both formulations in turn, inference and training step, and print medians, ratios and differences."""
    from tqdm import tqdm

    shapes = [(2, 64, 56, 56), (2, 128, 28, 28)] if quick else [(8, 64, 112, 112), (8, 256, 56, 56), (8, 512, 28, 28)]
    rounds, warm_up = (5, 1) if quick else (25, 3)
    print(
        f"\n3. The tutorials' formulation against attnk.SpatialAttention({GATE_KERNEL}), float32, medians of {rounds}"
    )
    torch.manual_seed(0)
    tutorial = _TutorialGate().to(device)
    fused = SpatialAttention(GATE_KERNEL, output="gated").to(device)
    fused.load_state_dict(tutorial.state_dict())
    modules: dict[str, nn.Module] = {"tutorial": tutorial, "attnk": fused}
    results = []
    for shape in tqdm(shapes, desc="   timing", unit="shape", leave=False):
        x = torch.randn(shape, device=device, requires_grad=True)
        dout = torch.randn(shape, device=device)

        def infer(module: nn.Module, x: Tensor = x) -> Tensor:
            with torch.no_grad():
                return module(x)

        def train(module: nn.Module, x: Tensor = x, dout: Tensor = dout) -> tuple[Tensor, ...]:
            return torch.autograd.grad(module(x), (x, *module.parameters()), dout)

        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # compared in full precision, timed as set
            out_diff = (infer(tutorial) - infer(fused)).abs().max().item()
            dx_diff = (train(tutorial)[0] - train(fused)[0]).abs().max().item()
        row = {"shape": shape, "out_diff": out_diff, "dx_diff": dx_diff}
        for kind, work in (("inference", infer), ("training", train)):
            times: dict[str, list[float]] = {name: [] for name in modules}
            for turn in range(warm_up + rounds):
                for name in sorted(modules, reverse=turn % 2 == 1):  # take turns at going first
                    seconds = _seconds(partial(work, modules[name]), device)
                    if turn >= warm_up:
                        times[name].append(seconds)
            row[kind] = {name: statistics.median(values) for name, values in times.items()}
            row[f"{kind}_ratio"] = row[kind]["tutorial"] / row[kind]["attnk"]
        results.append(row)

    print(f"   {'':18s}{'inference, ms':^28s}{'training step, ms':^28s}{'largest difference':^20s}")
    print(f"   {'shape':18s}" + f"{'tutorial':>9s}{'attnk':>9s}{'ratio':>8s}  " * 2 + f"{'output':>10s}{'dx':>10s}")
    for row in results:
        line = f"   {'x'.join(map(str, row['shape'])):18s}"
        for kind in ("inference", "training"):
            line += f"{1e3 * row[kind]['tutorial']:9.3f}{1e3 * row[kind]['attnk']:9.3f}{row[f'{kind}_ratio']:7.2f}x  "
        print(line + f"{row['out_diff']:10.1e}{row['dx_diff']:10.1e}")
    for kind in ("inference", "training"):
        ratios = [row[f"{kind}_ratio"] for row in results]
        slower = ["x".join(map(str, row["shape"])) for row in results if row[f"{kind}_ratio"] < 0.99]
        verdict = f"; slower than the tutorial at {', '.join(slower)}" if slower else ""
        print(f"   {kind}: attnk is {min(ratios):.2f} to {max(ratios):.2f} x as fast{verdict}")
    print("   While other programs keep the cores busy, neither time is worth much.")
    return results
