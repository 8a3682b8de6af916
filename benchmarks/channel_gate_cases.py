"""The channel gate's cases, and who computes them: SE and CBAM's channel half as they are copied, and attnk."""

import dataclasses
import functools
import itertools
from typing import Any, ClassVar

import gate_cases
import torch
from gate_cases import NUM_STAGES, NUM_WARPS, PROVIDERS, GateCase, GateTuning, vectors
from torch import Tensor, nn

import attnk
from attnk.fallback import channel_gate as operators
from attnk.testing import published

__all__ = ["CAPTION", "PROVIDERS", "TITLE", "ChannelGateCase", "Tuning", "panels", "tuned_case", "tuned_cases"]

TITLE = "Channel gate, reduction 16"
REDUCTION = 16
SE, BOTH = "SE", "avg + max"


class TutorialChannelGate(nn.Module):
    """The channel half of CBAM under the published keys: one network for mean and maximum."""

    def __init__(self, gate_channels: int, reduction: int = REDUCTION) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.max_pool = nn.AdaptiveMaxPool2d(1)
        self.mlp = nn.Sequential(
            nn.Flatten(),
            nn.Linear(gate_channels, gate_channels // reduction),
            nn.ReLU(),
            nn.Linear(gate_channels // reduction, gate_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        logit = self.mlp(self.avg_pool(x)) + self.mlp(self.max_pool(x))
        scale = torch.sigmoid(logit).unsqueeze(2).unsqueeze(3).expand_as(x)
        return x * scale


@dataclasses.dataclass(frozen=True)
class ChannelGateCase(GateCase):
    """A feature map and a gate for every channel: from the mean (SE), or from mean and maximum (CBAM's half)."""

    op: ClassVar[str] = "channel_gate"
    kinds: ClassVar[tuple[str, ...]] = (BOTH, SE)
    titles: ClassVar[dict[str, str]] = {SE: "mean (SE)", BOTH: "mean and maximum"}

    def usual(self) -> nn.Module:
        return (published.SELayer if self.kind == SE else TutorialChannelGate)(self.shape[1], REDUCTION)

    def fused(self) -> nn.Module:
        if self.kind == SE:
            return attnk.SELayer(self.shape[1], REDUCTION)
        return attnk.ChannelAttention(self.shape[1], REDUCTION, pool="avg_max")

    def kernel_bytes(self, which: str, provider: str) -> int:
        needs_max, planes = self.kind == BOTH, self.shape[0] * self.shape[1]
        slabs = pool_slabs(self)
        partials = 8 * slabs * planes if slabs > 1 else 0
        pool = {keep: pool_bytes(self, needs_max, keep) for keep in (False, True)}
        scale = 2 * self.size + self.itemsize * planes
        dx = 2 * self.size + (4 + self.itemsize + needs_max * (self.itemsize + 4)) * planes
        backward = 2 * self.size + 4 * planes + partials + dx
        return {
            "forward": pool[False] + scale,
            "backward": backward,
            "training": pool[True] + scale + backward,
        }[which]

    def most(self, which: str) -> float:
        return {"forward": 3.1, "backward": 4.2}[which]

    def run_operators(self, which: str, module: Any, x: Tensor, dout: Tensor) -> None:
        keep, needs_max = which != "forward", self.kind == BOTH
        avg, peak, index = operators.channel_gate_pool(x, needs_max, "first", keep)
        pooled = [avg, peak][: 1 + needs_max]
        with torch.set_grad_enabled(keep):
            logits = [module.mlp(vector.requires_grad_(keep)) for vector in pooled]
            gate = torch.sigmoid(logits[0] + logits[1] if needs_max else logits[0])
        operators.channel_gate_forward(x, gate)
        if which == "forward and backward":
            dgate = operators.channel_gate_backward(dout, x)
            davg, *rest = torch.autograd.grad(gate, (*pooled, *module.parameters()), dgate)
            dmax = rest[0] if needs_max else None
            sizes = (*x.shape[2:], self.channels_last)
            operators.channel_gate_dx(dout, gate.detach(), davg, dmax, None, None, index, *sizes, "first")


def pool_slabs(case: GateCase) -> int:
    """How many programs share the pixels of a plane."""
    from attnk.kernels.channel_gate.common import plan

    like = torch.empty(case.shape, device="meta")
    return plan(like, (0, 0), case.channels_last, case.table_config("channel_gate"))[1]


def pool_bytes(case: GateCase, needs_max: bool, keep: bool) -> int:
    """The bytes that pooling moves: the formula in the kernels' file."""
    planes, slabs = case.shape[0] * case.shape[1], pool_slabs(case)
    index = 4 * keep
    partials = 2 * slabs * (4 + needs_max * (4 + index)) if slabs > 1 else 0
    return case.size + (case.itemsize + needs_max * (case.itemsize + index) + partials) * planes


# Tuning

BLOCKS = {
    False: ((256, 1), (512, 1), (1024, 1), (2048, 1), (128, 4), (256, 4), (64, 8), (64, 16), (32, 16), (32, 32)),
    True: tuple(itertools.product((8, 16, 32, 64), (32, 64, 128, 256))),
}  # block_p, block_c by channels_last
MIN_PIXELS = (0, 128, 1024)  # where one row of the table ends and the next begins
tuned_cases = functools.partial(gate_cases.tuned_cases, ChannelGateCase, BOTH)
tuned_case = functools.partial(gate_cases.tuned_case, ChannelGateCase, BOTH)


class Tuning(GateTuning):
    """The channel gate's part of a sweep, with mean and maximum."""

    def __init__(self, case: ChannelGateCase) -> None:
        super().__init__(case)
        self.gate, self.davg, self.dmax = (vectors(self.x, case.shape[:2]) for _ in range(3))

    def changes(self) -> list[dict[str, int]]:
        return [
            *({"block_p": p, "block_c": c} for p, c in BLOCKS[self.case.channels_last]),
            *({"num_warps": number} for number in NUM_WARPS),
            *({"num_stages": number} for number in NUM_STAGES),
        ]

    def forward(self, config: Any) -> tuple[dict[str, Tensor], Any]:
        from attnk.kernels import channel_gate as kernels

        avg, peak, index = kernels.channel_gate_pool(self.x, True, "first", True, config)
        out = kernels.channel_gate_forward(self.x, self.gate, config)
        return {"avg": avg, "max": peak, "out": out}, index

    def backward(self, config: Any, kept: Any) -> dict[str, Tensor]:
        from attnk.kernels import channel_gate as kernels

        dgate = kernels.channel_gate_backward(self.dout, self.x, config)
        sizes = (*self.x.shape[2:], self.case.channels_last)
        dx = kernels.channel_gate_dx(
            self.dout, self.gate.float(), self.davg, self.dmax, None, None, kept, *sizes, "first", config
        )
        return {"dgate": dgate, "dx": dx}

    def key(self) -> str:
        return f"{self.case.channels_last}, {self.itemsize()}, {self.min_pixels(MIN_PIXELS)}"


# The picture

CAPTION = (
    "tutorial: adaptive pools, two linear layers, sigmoid and x * gate in eager PyTorch. "
    "Below the bars: batch x channels, height x width."
)
panels = functools.partial(gate_cases.time_panels, case=ChannelGateCase)
