"""Part 3: the tutorials' spatial attention against attnk's, the same weights and results, two times."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from attnk import SpatialAttention

KERNEL_SIZE = 7


class _TutorialGate(nn.Module):
    """Spatial attention as tutorials write it: mean, max, cat, conv, sigmoid, multiply."""

    def __init__(self, kernel_size: int = KERNEL_SIZE):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        avg_out = torch.mean(x, dim=1, keepdim=True)
        max_out, _ = torch.max(x, dim=1, keepdim=True)
        return x * torch.sigmoid(self.conv1(torch.cat([avg_out, max_out], dim=1)))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long some work takes, on a GPU from when it is idle to when it is idle again."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_both(quick: bool, device: torch.device) -> list[dict]:
    """Time both formulations in turn, inference and training step, and print medians, ratios and differences.

    Args:
        quick: Fewer and smaller shapes, fewer rounds.
        device: Where to run.

    Returns:
        For each shape: `shape`, `out_diff` and `dx_diff` (the largest differences), for `inference` and `training` the
        seconds of `tutorial` and of `attnk`, and their ratios, `inference_ratio` and `training_ratio`.
    """
    from tqdm import tqdm

    shapes = [(2, 64, 56, 56), (2, 128, 28, 28)] if quick else [(8, 64, 112, 112), (8, 256, 56, 56), (8, 512, 28, 28)]
    rounds, warm_up = (5, 1) if quick else (25, 3)
    print(
        f"\n3. The tutorials' formulation against attnk.SpatialAttention({KERNEL_SIZE}), float32, medians of {rounds}"
    )
    torch.manual_seed(0)
    tutorial = _TutorialGate().to(device)
    fused = SpatialAttention(KERNEL_SIZE, output="gated").to(device)
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
                    took = seconds(partial(work, modules[name]), device)
                    if turn >= warm_up:
                        times[name].append(took)
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
