"""The spatial gate's cases, and who computes them: the tutorials' code, eager and compiled, and attnk."""

import contextlib
import dataclasses
import functools
import itertools
from typing import Any, ClassVar

import gate_cases
import harness
import torch
from gate_cases import NUM_WARPS, GateCase, GateTuning
from harness import Provider
from torch import Tensor, nn

import attnk
from attnk.reference.spatial_gate import spatial_gate_reference
from attnk.testing import published

TITLE = "Spatial gate, 7 x 7 convolution"
KERNEL_SIZE = 7
LAGS = (264, 396, 528, 792)
PROVIDERS = {
    "cpu": ("tutorial", "torch.compile", "attnk"),
    "cuda": ("tutorial", "torch.compile", "attnk, two launches", "attnk, one launch"),
}


@dataclasses.dataclass(frozen=True)
class SpatialGateCase(GateCase):
    """A feature map and what is made of it.

    Attributes:
        kind: "map" (average first, no bias) or "gated" (maximum first, with bias), as the two tutorials have it.
        others: as in GateCase.
    """

    op: ClassVar[str] = "spatial_gate"
    kinds: ClassVar[tuple[str, ...]] = ("gated", "map")
    titles: ClassVar[dict[str, str]] = {"gated": "returns x * gate", "map": "returns the gate"}
    column: ClassVar[str] = "output"

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        batch, _, height, width = self.shape
        return (batch, 1, height, width) if self.kind == "map" else self.shape

    @property
    def needed_memory(self) -> int:
        return 64 * self.size // self.itemsize  # its oracle goes through x in parts

    def usual(self) -> nn.Module:
        return published.SpatialAttention(KERNEL_SIZE) if self.kind == "map" else published.CBAMSpatialAttention()

    def fused(self) -> nn.Module:
        options = {"order": "max_avg", "bias": True} if self.kind == "gated" else {}
        return attnk.SpatialAttention(KERNEL_SIZE, output=self.kind, **options)

    def own_providers(self) -> list[Provider]:
        if self.device == "cpu":
            return super().own_providers()
        module = self.attnk()
        return [
            Provider(name, module, tuple(module.parameters()), functools.partial(forced, config))
            for name, config in self.launch_configs().items()
        ]

    def launch_configs(self) -> dict[str, Any]:
        """The tuning table's configuration for two launches, and for one where that can run, by provider."""
        _, _, height, width = self.shape
        config = self.table_config()
        tiles = -(-height * width // config.block_p)
        lag = next((lag for lag in (config.lag, *LAGS) if lag >= tiles), None)
        found = {"attnk, two launches": dataclasses.replace(config, lag=0)}
        if self.kind == "gated" and lag is not None:
            found["attnk, one launch"] = dataclasses.replace(config, lag=lag)
        return found

    def oracle(
        self, provider: Provider, inputs: tuple[Tensor, ...], dout: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        order = "max_avg" if self.kind == "gated" else "avg_max"
        wide = [parameter.detach().double().requires_grad_() for parameter in provider.parameters]
        x = inputs[0].detach()
        parts, sums, magnitude = [], [torch.zeros_like(parameter) for parameter in wide], 0.0
        images = max(1, (1 << 25) // x[0].numel())  # at a time: float64 takes room
        for part, dpart in zip(x.split(images), dout.split(images), strict=True):
            part = part.double().requires_grad_()
            logit = spatial_gate_reference(part, *wide, order=order, output="logit")
            gate = torch.sigmoid(logit)
            out = part * gate if self.kind == "gated" else gate
            dx, dlogit, *grads = torch.autograd.grad(out, (part, logit, *wide), dpart.double())
            parts.append((out.detach(), dx))
            sums = [total + grad for total, grad in zip(sums, grads, strict=True)]
            magnitude += (dlogit.abs().sum() * part.abs().max()).item()
        outs, dxs = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        exact = dict(zip(("out", "dx", "dweight", "dbias"), (outs, dxs, *sums), strict=False))
        return exact, dict.fromkeys(("dweight", "dbias"), magnitude)

    def minimal_bytes(self, which: str) -> int:
        if self.kind == "map":
            plane = self.size // self.shape[1]
            return {"forward": 1, "backward": 1, "training": 2}[which] * (self.size + plane)
        return super().minimal_bytes(which)

    def kernel_bytes(self, which: str, provider: str) -> int:
        """The bytes that attnk's kernels move in a pass: the formula in their file.

        Args:
            which: "forward" (nothing kept), "backward" or "training".
            provider: "attnk, one launch" counts x and dout as read once by a launch that reads them twice.
        """
        batch, _, height, width = self.shape
        pixels = batch * height * width
        frame = KERNEL_SIZE - 1
        framed = batch * (height + frame) * (width + frame)
        size, map_size = self.size, pixels * self.itemsize
        if self.kind == "map":
            forward, kept = size + 16 * framed + map_size, 8 * pixels
            backward = map_size + 4 * pixels + 4 * framed + size + 4 * framed + 4 * pixels
        elif provider == "attnk, two launches":
            forward, kept = 3 * size + 16 * framed, 4 * pixels
            backward = 4 * size + 8 * framed + 20 * pixels
        else:
            forward, kept = 2 * size + 16 * framed, 4 * pixels
            backward = 3 * size + 8 * framed + 16 * pixels
        backward += 12 * framed
        return {"forward": forward, "backward": backward, "training": forward + kept + backward}[which]

    def metered(self) -> dict[str, dict[str, int]]:
        found = {}
        for name, config in self.launch_configs().items():
            if config.lag:  # bytes do not depend on the lag, and a short one leaves fewer programs to interpret
                config = dataclasses.replace(config, lag=-(-self.shape[2] * self.shape[3] // config.block_p))
            with forced(config):
                found[name] = self.metered_once()
        return found


def forced(config: Any) -> contextlib.AbstractContextManager:
    """Launch every spatial gate inside the block with one configuration, whatever the table says."""
    from attnk.kernels.spatial_gate import common

    return harness.replaced(common, "spatial_gate_config", lambda *args, **kwargs: config)


# Tuning

BLOCKS = {
    False: tuple(itertools.product((32, 64, 128, 256), (4, 8, 16, 32, 64, 128))),  # block_p, block_c of contiguous maps
    True: tuple(itertools.product((8, 16, 32, 64), (32, 64, 128, 256))),  # of channels_last
}
NUM_STAGES = (1, 2, 3)
MIN_PIXELS = (0, 128, 512, 8192)  # where one row of the table ends and the next begins
LARGE_BYTES = 50 << 20  # one launch is for maps that do not fit the L2 cache
tuned_cases = functools.partial(gate_cases.tuned_cases, SpatialGateCase, "gated")
tuned_case = functools.partial(gate_cases.tuned_case, SpatialGateCase, "gated")


class Tuning(GateTuning):
    """The spatial gate's part of a sweep: one configuration, timed forward (keeping for the backward) and backward."""

    def __init__(self, case: SpatialGateCase) -> None:
        super().__init__(case)
        self.weight, self.bias = (parameter.detach() for parameter in case.attnk().parameters())

    def changes(self) -> list[dict[str, int]]:
        found: list[dict[str, int]] = [{"block_p": p, "block_c": c} for p, c in BLOCKS[self.case.channels_last]]
        found += [{"num_warps": number} for number in NUM_WARPS]
        found += [{"num_stages": number} for number in NUM_STAGES]
        return found + ([{"lag": lag} for lag in (0, *LAGS)] if self.case.size >= LARGE_BYTES else [])

    def sensible(self, config: Any) -> bool:
        _, _, height, width = self.case.shape
        return super().sensible(config) and (config.lag == 0 or config.lag >= -(-height * width // config.block_p))

    def forward(self, config: Any) -> tuple[dict[str, Tensor], Any]:
        from attnk.kernels import spatial_gate as kernels

        out, *kept = kernels.spatial_gate_forward(
            self.x, self.weight, self.bias, "max_avg", "gated", "first", config=config
        )
        return {"out": out}, kept

    def backward(self, config: Any, kept: Any) -> dict[str, Tensor]:
        from attnk.kernels import spatial_gate as kernels

        options = (self.case.shape[1], self.case.channels_last, "max_avg", "gated", "first", True, True)
        grads = kernels.spatial_gate_backward(self.dout, self.x, self.weight, *kept, *options, config=config)
        return dict(zip(("dx", "dweight", "dbias"), grads, strict=True))

    def key(self) -> str:
        return f"{self.case.channels_last}, {self.itemsize()}, {self.min_pixels(MIN_PIXELS)}"


# The picture

CAPTION = (
    "tutorial: mean, max, cat, conv2d, sigmoid in eager PyTorch, and the multiplication where there is one. "
    "Below the bars: batch x channels, height x width."
)
panels = functools.partial(gate_cases.time_panels, case=SpatialGateCase)
