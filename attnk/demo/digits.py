"""Part 1: what kinds of attention do to the accuracy of a small network on handwritten digits."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnk
from attnk.demo.stopwatch import seconds

PLACES = {"1": 16, "3": 32}  # the parts of the network that attention is inserted behind, and their channels
HEADS = 2
REDUCTION = 4  # of the channel gates' hidden layers: the published 16 would leave them one or two channels
BATCH = 64


class _Residual(nn.Module):
    """``x + gamma * attention(x)``, gamma from 0, so that it changes nothing at first, as in SAGAN's and CCNet's."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.gamma, self.attention(x))


def _self_attention(channels: int) -> nn.Module:
    return attnk.FeatureMapAttention(attnk.SelfAttention(channels, HEADS, dropout=0.0))


# name in the results: label in the table, and what builds the module for so many channels
VARIANTS: dict[str, tuple[str, Callable[[int], nn.Module] | None]] = {
    "without": ("no attention", None),
    "se": ("SELayer", lambda channels: attnk.SELayer(channels, REDUCTION)),
    "cbam": ("CBAM", lambda channels: attnk.CBAM(channels, REDUCTION, kernel_size=3)),
    "spatial": ("SpatialAttention, gated", lambda _: attnk.SpatialAttention(3, output="gated")),
    "spatial_residual": ("SpatialAttention, residual", lambda _: attnk.SpatialAttention(3, output="residual")),
    "coordinate": ("CoordinateAttention", attnk.CoordinateAttention),
    "axial": ("AxialAttention", lambda channels: _Residual(attnk.AxialAttention(channels, HEADS))),
    "self": ("SelfAttention, pixels", lambda channels: _Residual(_self_attention(channels))),
}


def _network(attention: Callable[[int], nn.Module] | None) -> nn.Sequential:
    """Three convolutions and a linear layer; attention, if any, behind the ReLUs of the first two."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )  # fmt: skip
    if attention is not None:  # made last: with one seed all networks start from the same convolutions
        for place, channels in PLACES.items():
            attnk.insert(model, after=place, module=attention(channels))
    return model


def _epoch(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, order: Tensor) -> None:
    for rows in order.split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def compare_on_digits(quick: bool, device: torch.device) -> dict[str, dict]:
    """Train the network without attention and with each kind, and print test accuracies and gains seed by seed.

    Args:
        quick: Fewer seeds and epochs.
        device: Where to train.

    Returns:
        For each name in `VARIANTS`: `label`, `accuracy` (a percentage for each seed), `mean`, `spread` (the standard
        deviation over the seeds), `parameters` (how many the attention adds), `seconds` (of a training step, the
        median over epochs); with attention also `gain` (the mean over the seeds of the difference to the network
        without, in points), `half_width` (of its 95 % interval, by Student's t) and `within_spread` (whether that
        interval holds 0).
    """
    from scipy.stats import t as student
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm

    seeds, epochs = (3, 3) if quick else (5, 20)
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images.reshape(-1, 1, 8, 8) / 16.0, labels, test_size=0.5, random_state=0, stratify=labels)
    x, x_test = (torch.tensor(a, dtype=torch.float32, device=device) for a in split[:2])
    y, y_test = (torch.tensor(a, device=device) for a in split[2:])
    print(f"\n1. Handwritten digits: {len(x)} to learn from, {len(x_test)} to test on, {epochs} epochs, {seeds} seeds")

    accuracy: dict[str, list[float]] = {name: [] for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    parameters: dict[str, int] = {}
    with tqdm(total=len(VARIANTS) * seeds * epochs, desc="   digits", unit="epoch", leave=False) as bar:
        for seed in range(seeds):
            for name, (_, attention) in VARIANTS.items():
                torch.manual_seed(seed)
                model = _network(attention).to(device)
                parameters[name] = attnk.count_parameters(model)
                optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
                shuffle = torch.Generator().manual_seed(seed)
                for _ in range(epochs):
                    order = torch.randperm(len(x), generator=shuffle).to(device)
                    took = seconds(partial(_epoch, model, optimizer, x, y, order), device)
                    times[name].append(took / len(order.split(BATCH)))
                    bar.update()
                with torch.no_grad():
                    right = model.eval()(x_test).argmax(1) == y_test
                accuracy[name].append(100 * right.float().mean().item())

    results: dict[str, dict] = {}
    for name, (label, _) in VARIANTS.items():
        results[name] = {
            "label": label,
            "accuracy": accuracy[name],
            "mean": statistics.mean(accuracy[name]),
            "spread": statistics.stdev(accuracy[name]),
            "parameters": parameters[name] - parameters["without"],
            "seconds": statistics.median(times[name]),
        }
        if name != "without":
            gains = [b - a for a, b in zip(accuracy["without"], accuracy[name], strict=True)]  # seed by seed
            gain = statistics.mean(gains)
            half_width = float(student.ppf(0.975, seeds - 1)) * statistics.stdev(gains) / seeds**0.5
            results[name] |= {"gain": gain, "half_width": half_width, "within_spread": abs(gain) <= half_width}
    _print(results)
    return results


def _print(results: dict[str, dict]) -> None:
    """The table, and how to read it."""
    print(f"   {'':27s}{'accuracy, %':>15s}{'gain, points':>14s}  {'its 95 % interval':37s}", end="")
    print(f"{'parameters':>11s}{'ms a step':>11s}")
    for row in results.values():
        line = f"   {row['label']:27s}{row['mean']:7.2f} +- {row['spread']:4.2f}"
        if "gain" in row:
            gain, half_width = row["gain"], row["half_width"]
            verdict = "within the spread" if row["within_spread"] else "beyond the spread"
            interval = f"{gain - half_width:+.2f} to {gain + half_width:+.2f}, {verdict}"
            line += f"{gain:+14.2f}  {interval:37s}"
        else:
            line += " " * (14 + 2 + 37)
        print(f"{line}{row['parameters']:+11d}{1e3 * row['seconds']:11.2f}")
    print(f"""\
   Within the spread: so few runs cannot tell the gain from nothing. Of twenty comparisons with nothing to find, one is
   beyond it by chance; here are {len(results) - 1}, all with the same network. Axial and self-attention are
   x + gamma * attention(x), gamma from 0; gates scale features down from the start, a residual one does not. Digits of
   8 x 8 pixels are easy and the network is small: this shows that all of them train, not what a large network gains.
   While other programs keep the cores busy, the times are worth little.""")
