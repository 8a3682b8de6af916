"""The coordinate gate's cases, and who computes them: coordinate attention as its authors wrote it, and attnk."""

import dataclasses
import functools
from typing import Any, ClassVar

import gate_cases
import torch
import torch.nn.functional as F
from gate_cases import NUM_WARPS, PROVIDERS, GateCase, GateTuning, vectors
from torch import Tensor, nn

import attnk
from attnk.fallback import coordinate_gate as operators

__all__ = ["CAPTION", "PROVIDERS", "TITLE", "CoordinateGateCase", "Tuning", "panels", "tuned_case", "tuned_cases"]

TITLE = "Coordinate attention, reduction 32"
REDUCTION = 32


class HSigmoid(nn.Module):
    """As its authors wrote it."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + 3) / 6


class HSwish(nn.Module):
    """As its authors wrote it."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = HSigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x)


class TutorialCoordinate(nn.Module):
    """Coordinate attention as its authors wrote it (https://github.com/houqb/CoordAttention)."""

    def __init__(self, inp: int, reduction: int = REDUCTION) -> None:
        super().__init__()
        self.pool_h = nn.AdaptiveAvgPool2d((None, 1))
        self.pool_w = nn.AdaptiveAvgPool2d((1, None))
        hidden = max(8, inp // reduction)
        self.conv1 = nn.Conv2d(inp, hidden, kernel_size=1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act = HSwish()
        self.conv_h = nn.Conv2d(hidden, inp, kernel_size=1)
        self.conv_w = nn.Conv2d(hidden, inp, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.size()
        y = torch.cat([self.pool_h(x), self.pool_w(x).permute(0, 1, 3, 2)], dim=2)
        x_h, x_w = torch.split(self.act(self.bn1(self.conv1(y))), [h, w], dim=2)
        a_h = self.conv_h(x_h).sigmoid()
        a_w = self.conv_w(x_w.permute(0, 1, 3, 2)).sigmoid()
        return x * a_w * a_h


@dataclasses.dataclass(frozen=True)
class CoordinateGateCase(GateCase):
    """A feature map, and a gate for every row and every column of a channel, with the network that makes them."""

    op: ClassVar[str] = "coordinate_gate"
    kinds: ClassVar[tuple[str, ...]] = ("coordinate",)
    titles: ClassVar[dict[str, str]] = {"coordinate": "with its network"}

    def usual(self) -> nn.Module:
        return TutorialCoordinate(self.shape[1])

    def fused(self) -> nn.Module:
        return attnk.CoordinateAttention(self.shape[1], REDUCTION)

    def table_config(self, op: str = "") -> Any:
        from attnk.kernels import tuning

        arch = tuning.architecture(torch.device(self.device))
        return tuning.coordinate_gate_config(arch, itemsize=self.itemsize, channels_last=self.channels_last)

    def kernel_bytes(self, which: str, provider: str) -> int:
        from attnk.kernels.coordinate_gate import Plan

        batch, channels, height, width = self.shape
        like = torch.empty(self.shape, device="meta")
        _, (_, slabs, chunks, _) = Plan(like, self.channels_last, (0,), self.table_config(), sums=True).slabs()
        lines = {"rows": (chunks, batch * channels * height), "columns": (slabs, batch * channels * width)}
        vectors = self.itemsize * sum(numbers for _, numbers in lines.values())
        sums = vectors + sum(8 * parts * numbers for parts, numbers in lines.values() if parts > 1)
        forward = 3 * self.size + sums + vectors
        backward = 4 * self.size + sums + 2 * vectors + 4 * vectors // self.itemsize
        return {"forward": forward, "backward": backward, "training": forward + backward}[which]

    def most(self, which: str) -> float:
        return {"forward": 3.2, "backward": 4.3}[which]

    def run_operators(self, which: str, module: Any, x: Tensor, dout: Tensor) -> None:
        keep, sizes = which != "forward", (*x.shape[2:], self.channels_last)
        pooled = operators.coordinate_gate_pool(x)
        with torch.set_grad_enabled(keep):
            height, width = (mean.requires_grad_(keep) for mean in pooled)
            lines = F.hardswish(module.bn1(module.conv1(torch.cat([height, width.transpose(2, 3)], 2))))
            of_rows, of_columns = lines.split(list(x.shape[2:]), 2)
            gates = torch.sigmoid(module.conv_h(of_rows)), torch.sigmoid(module.conv_w(of_columns.transpose(2, 3)))
        known = [gate.detach() for gate in gates]
        operators.coordinate_gate_forward(x, *known)
        if which == "forward and backward":
            dgates = operators.coordinate_gate_backward(dout, x, *known)
            dheight, dwidth, *_ = torch.autograd.grad(gates, (*pooled, *module.parameters()), dgates)
            operators.coordinate_gate_dx(dout, *known, dheight, dwidth, *sizes)


# Tuning

TILES = (1024, 2048, 4096, 8192)
BLOCKS_C = (16, 32, 64, 128)
SLABS = (16, 32, 64, 128)
tuned_cases = functools.partial(gate_cases.tuned_cases, CoordinateGateCase, "coordinate")
tuned_case = functools.partial(gate_cases.tuned_case, CoordinateGateCase, "coordinate")


class Tuning(GateTuning):
    """The coordinate gate's part of a sweep."""

    def __init__(self, case: CoordinateGateCase) -> None:
        super().__init__(case)
        batch, channels, height, width = case.shape
        shapes = (batch, channels, height, 1), (batch, channels, 1, width)
        self.gates, self.dmeans = ([vectors(self.x, shape) for shape in shapes] for _ in range(2))

    def changes(self) -> list[dict[str, int]]:
        return [
            *({"tile": number} for number in TILES),
            *({"block_c": number} for number in BLOCKS_C if self.case.channels_last),
            *({"slab": number} for number in SLABS),
            *({"num_warps": number} for number in NUM_WARPS),
        ]

    def elements(self, config: Any) -> int:
        return config.tile

    def forward(self, config: Any) -> tuple[dict[str, Tensor], Any]:
        from attnk.kernels import coordinate_gate as kernels

        height, width = kernels.coordinate_gate_pool(self.x, config)
        out = kernels.coordinate_gate_forward(self.x, *self.gates, config)
        return {"height": height, "width": width, "out": out}, None

    def backward(self, config: Any, kept: Any) -> dict[str, Tensor]:
        from attnk.kernels import coordinate_gate as kernels

        dgate_h, dgate_w = kernels.coordinate_gate_backward(self.dout, self.x, *self.gates, config)
        wide = [gate.float() for gate in self.gates]
        sizes = (*self.x.shape[2:], self.case.channels_last)
        dx = kernels.coordinate_gate_dx(self.dout, *wide, *self.dmeans, *sizes, config)
        return {"dgate_h": dgate_h, "dgate_w": dgate_w, "dx": dx}

    def itemsize(self) -> int:
        return 2 if self.case.dtype != "fp32" else 4

    def key(self) -> str:
        return f"{self.case.channels_last}, {self.itemsize()}"


# The picture

CAPTION = (
    "tutorial: the authors' code in eager PyTorch: adaptive pools, cat, three 1 x 1 convolutions, batch norm, h-swish, "
    "sigmoids and two products.\nBelow the bars: batch x channels, height x width."
)
panels = functools.partial(gate_cases.time_panels, case=CoordinateGateCase)
