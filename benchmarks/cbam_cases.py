"""CBAM's cases, and who computes them: the published code, eager and compiled, and attnk."""

import dataclasses
import functools
import itertools
from typing import Any, ClassVar

import gate_cases
import torch
from channel_gate_cases import REDUCTION, TutorialChannelGate, pool_bytes
from gate_cases import NUM_STAGES, NUM_WARPS, PROVIDERS, GateCase, GateTuning, vectors
from harness import Provider
from torch import Tensor, nn

import attnk
from attnk.fallback import cbam as operators
from attnk.fallback import channel_gate as pools

__all__ = ["CAPTION", "PROVIDERS", "TITLE", "CbamCase", "Tuning", "panels", "tuned_case", "tuned_cases"]

TITLE = "CBAM, reduction 16, 7 x 7 convolution"
KERNEL_SIZE = 7
PLAIN, NORM = "CBAM", "CBAM with batch norm"


class BasicConv(nn.Module):
    """A convolution, and perhaps a batch norm."""

    def __init__(self, kernel_size: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.bn is None else self.bn(x)


class SpatialGate(nn.Module):
    """The spatial half as published."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.spatial = BasicConv(KERNEL_SIZE, norm)

    def forward(self, x: Tensor) -> Tensor:
        compressed = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid(self.spatial(compressed))


class TutorialCBAM(nn.Module):
    """CBAM as published (https://github.com/Jongchan/attention-module), with or without its batch norm."""

    def __init__(self, gate_channels: int, reduction_ratio: int = REDUCTION, norm: bool = False) -> None:
        super().__init__()
        self.ChannelGate = TutorialChannelGate(gate_channels, reduction_ratio)
        self.SpatialGate = SpatialGate(norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.SpatialGate(self.ChannelGate(x))


@dataclasses.dataclass(frozen=True)
class CbamCase(GateCase):
    """A feature map and both gates, without and with a batch norm on the spatial gate's logit."""

    op: ClassVar[str] = "cbam"
    kinds: ClassVar[tuple[str, ...]] = (PLAIN, NORM)
    titles: ClassVar[dict[str, str]] = {PLAIN: "without batch norm", NORM: "with batch norm"}

    def usual(self) -> nn.Module:
        return TutorialCBAM(self.shape[1], norm=self.kind == NORM)

    def fused(self) -> nn.Module:
        return attnk.CBAM(
            self.shape[1],
            REDUCTION,
            KERNEL_SIZE,
            pool="avg_max",
            order="max_avg",
            spatial_bias=False,
            norm=self.kind == NORM,
        )

    def oracle(
        self, provider: Provider, inputs: tuple[Tensor, ...], dout: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        exact, terms = super().oracle(provider, inputs, dout)
        of_pixels = (inputs[0].detach() * dout).abs().double().sum(1)  # what the spatial gate's gradient is a sum of
        weight = next(parameter for parameter in provider.parameters if parameter.dim() == 4)
        return exact, terms | {"dx": of_pixels.max().item() / 4 * weight.norm().item()}

    def kernel_bytes(self, which: str, provider: str) -> int:
        batch, channels, height, width = self.shape
        pixels, frame = batch * height * width, KERNEL_SIZE - 1
        framed = batch * (height + frame) * (width + frame)
        vector = self.itemsize * batch * channels
        partials = 4 * batch * channels * -(-height * width // self.table_config().block_p)
        forward = 3 * self.size + 16 * framed + 2 * vector  # pool, and the gate
        backward = (
            (2 * self.size + 4 * pixels + 4 * framed + partials + vector)  # dgate
            + (self.size + 4 * framed + 16 * pixels + partials)  # dmaps
            + (2 * partials + vector)  # their sum
            + (2 * self.size + 16 * pixels + 3 * vector + 4 * batch * channels)  # dx
            + (8 * framed + 4 * pixels)  # dweight
        )
        kept = 8 * pixels
        if self.kind == NORM:  # in training a logit between two kernels, which is what dgate is of, too
            kept += (2 * self.itemsize - 4) * pixels
            backward += (3 * self.itemsize - 4) * pixels + vector
        pool = {keep: pool_bytes(self, True, keep) for keep in (False, True)}
        return {
            "forward": pool[False] + forward,
            "backward": backward,
            "training": pool[True] + forward + kept + backward,
        }[which]

    def most(self, which: str) -> float:
        return {"forward": 4.2, "backward": 5.35 if self.kind == NORM else 5.3}[which]

    def run_operators(self, which: str, module: Any, x: Tensor, dout: Tensor) -> None:
        keep, sizes = which != "forward", (*x.shape[2:], self.channels_last)
        weight = module.spatial_attention.conv.weight.detach()
        channel = module.channel_attention
        *pooled, pixel = pools.channel_gate_pool(x, True, "first", keep)
        with torch.set_grad_enabled(keep):
            avg, peak = (channel.mlp(vector.requires_grad_(keep)) for vector in pooled)
            gate = torch.sigmoid(avg + peak)
        known = gate.detach()
        if not keep:
            operators.cbam_infer(x, known, weight, None, "max_avg", "gated")
            return
        _, *kept = operators.cbam_forward(x, known, weight, None, "max_avg", "gated", "first")
        if which == "forward and backward":
            options = ("max_avg", "gated", "first", True, True)
            dgate, dmaps, *_ = operators.cbam_backward(dout, x, known, weight, *kept, *options)
            davg, dmax, *_ = torch.autograd.grad(gate, (*pooled, *channel.parameters()), dgate)
            operators.cbam_dx(dout, known, kept[0], dmaps, davg, dmax, pixel, None, None, *sizes, "gated", "first")


# Tuning

BLOCKS = {
    False: tuple(itertools.product((32, 64, 128, 256), (8, 16, 32, 64))),  # block_p, block_c of contiguous maps
    True: tuple(itertools.product((16, 32, 64, 128), (32, 64, 128))),  # of channels_last
}
MIN_PIXELS = (0, 512)  # where one row of the table ends and the next begins
tuned_cases = functools.partial(gate_cases.tuned_cases, CbamCase, PLAIN)
tuned_case = functools.partial(gate_cases.tuned_case, CbamCase, PLAIN)


class Tuning(GateTuning):
    """CBAM's part of a sweep: its own kernels, behind a channel gate that is given."""

    def __init__(self, case: CbamCase) -> None:
        super().__init__(case)
        self.weight = case.attnk().spatial_attention.conv.weight.detach()
        self.gate, self.davg, self.dmax = (vectors(self.x, case.shape[:2]) for _ in range(3))
        self.pixel = torch.zeros(case.shape[:2], dtype=torch.int32, device=self.x.device)

    def changes(self) -> list[dict[str, int]]:
        return [
            *({"block_p": p, "block_c": c} for p, c in BLOCKS[self.case.channels_last]),
            *({"num_warps": number} for number in NUM_WARPS),
            *({"num_stages": number} for number in NUM_STAGES),
        ]

    def elements(self, config: Any) -> int:
        return super().elements(config) * config.num_stages

    def forward(self, config: Any) -> tuple[dict[str, Tensor], Any]:
        from attnk.kernels import cbam as kernels

        out, *kept = kernels.cbam_forward(
            self.x, self.gate, self.weight, None, "max_avg", "gated", "first", config=config
        )
        return {"out": out}, kept

    def backward(self, config: Any, kept: Any) -> dict[str, Tensor]:
        from attnk.kernels import cbam as kernels

        options = ("max_avg", "gated", "first")
        dgate, dmaps, dweight, _ = kernels.cbam_backward(
            self.dout, self.x, self.gate, self.weight, *kept, *options, True, True, config
        )
        sizes = (*self.x.shape[2:], self.case.channels_last)
        dx = kernels.cbam_dx(
            self.dout, self.gate, kept[0], dmaps, self.davg, self.dmax, self.pixel, None, None, *sizes, *options[1:],
            config,
        )  # fmt: skip
        return {"dgate": dgate, "dweight": dweight, "dx": dx}

    def key(self) -> str:
        return f"{self.case.channels_last}, {self.itemsize()}, {self.min_pixels(MIN_PIXELS)}"


# The picture

CAPTION = (
    "tutorial: adaptive pools, two linear layers, mean, max, cat, conv2d, sigmoids and both products in eager PyTorch. "
    "Below the bars: batch x channels, height x width."
)
panels = functools.partial(gate_cases.time_panels, case=CbamCase)
