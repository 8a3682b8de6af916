"""The spatial gate's cases, and who computes them: the tutorials' code, eager and compiled, and attnk."""

import argparse
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import harness
import torch
from harness import DTYPES, Provider
from torch import Tensor, nn

import attnk
from attnk.reference.spatial_gate import spatial_gate_reference

TITLE = "Spatial gate, 7 x 7 convolution"
KERNEL_SIZE = 7
LAGS = (264, 396, 528, 792)
PROVIDERS = {
    "cpu": ("tutorial", "torch.compile", "attnk"),
    "cuda": ("tutorial", "torch.compile", "attnk, two launches", "attnk, one launch"),
}


class TutorialMap(nn.Module):
    """Spatial attention as tutorials write it that return the map."""

    def __init__(self, kernel_size: int = KERNEL_SIZE) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        avg_out = torch.mean(x, dim=1, keepdim=True)
        max_out, _ = torch.max(x, dim=1, keepdim=True)
        return self.sigmoid(self.conv1(torch.cat([avg_out, max_out], dim=1)))


class TutorialGated(nn.Module):
    """Spatial attention as tutorials write it that return the gated input."""

    def __init__(self, kernel_size: int = KERNEL_SIZE) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        max_pool = torch.max(x, dim=1, keepdim=True)[0]
        avg_pool = torch.mean(x, dim=1, keepdim=True)
        return x * self.sigmoid(self.conv(torch.cat([max_pool, avg_pool], dim=1)))


@dataclasses.dataclass(frozen=True)
class SpatialGateCase:
    """A feature map and what is made of it.

    Attributes:
        shape: (B, C, H, W).
        output: "map" (average first, no bias) or "gated" (maximum first, with bias), as the two tutorials have it.
        dtype: a key of DTYPES.
        channels_last: the layout of x.
        device: "cpu" or "cuda".
    """

    op: ClassVar[str] = "spatial_gate"
    random: ClassVar[bool] = False

    shape: tuple[int, int, int, int]
    output: str
    dtype: str = "fp32"
    channels_last: bool = False
    device: str = "cpu"

    @property
    def size(self) -> int:
        """S, the bytes of x."""
        batch, channels, height, width = self.shape
        return batch * channels * height * width * DTYPES[self.dtype].itemsize

    @property
    def needed_memory(self) -> int:
        return 64 * self.size // DTYPES[self.dtype].itemsize  # with the float64 oracle

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"

    def __str__(self) -> str:
        return f"{self.output} {'x'.join(map(str, self.shape))} {self.dtype} {self.layout}"

    def fields(self) -> dict[str, Any]:
        """The case as columns of a results file."""
        shape = "x".join(map(str, self.shape))
        return {"op": self.op, "output": self.output, "shape": shape, "dtype": self.dtype, "layout": self.layout}

    def inputs(self) -> tuple[tuple[Tensor], Tensor]:
        """x, requiring grad, and the gradient of the output.

        Every pixel's maximum is unique, so that providers may differ on whom equal maxima give their gradient.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        batch, channels, height, width = self.shape
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        options = {"dtype": DTYPES[self.dtype], "device": self.device}
        x = torch.empty(self.shape, memory_format=layout, **options).normal_(generator=generator).clamp_(-4, 4)
        plane = (batch, 1, height, width)
        winner = torch.randint(channels, plane, device=self.device, generator=generator)
        x.scatter_(1, winner, torch.empty(plane, **options).uniform_(5, 6, generator=generator))
        shape = plane if self.output == "map" else self.shape
        dout = torch.empty(shape, memory_format=layout, **options).normal_(generator=generator)
        dout *= min(1, 1000 / dout.numel() ** 0.5)  # so that its sums do not overflow in float16
        return (x.requires_grad_(),), dout

    def tutorial(self) -> nn.Module:
        """The tutorials' module with the weights that every provider of the case has."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = TutorialMap() if self.output == "map" else TutorialGated()
        return module.to(self.device, DTYPES[self.dtype])

    def attnk(self) -> nn.Module:
        """The module of attnk that computes the same, with the same weights."""
        options = {"order": "max_avg", "bias": True} if self.output == "gated" else {}
        module = attnk.SpatialAttention(KERNEL_SIZE, output=self.output, **options)
        module.load_state_dict(self.tutorial().state_dict())
        return module.to(self.device, DTYPES[self.dtype])

    def providers(self, compiled: bool = True) -> dict[str, Provider]:
        tutorial, ours = self.tutorial(), self.attnk()
        parameters, our_parameters = tuple(tutorial.parameters()), tuple(ours.parameters())
        found = [Provider("tutorial", tutorial, parameters)]
        if compiled:
            torch._dynamo.reset()  # a second shape would otherwise be compiled for any shape
            found.append(Provider("torch.compile", torch.compile(tutorial, fullgraph=True), parameters))
        if self.device == "cpu":
            found.append(Provider("attnk", ours, our_parameters))
        else:
            for name, config in self.launch_configs().items():
                scope = functools.partial(forced, config)
                found.append(Provider(name, ours, our_parameters, scope))
        return {provider.name: provider for provider in found}

    def launch_configs(self) -> dict[str, Any]:
        """The tuning table's configuration for two launches, and for one where that can run, by provider."""
        _, _, height, width = self.shape
        config = self.table_config()
        tiles = -(-height * width // config.block_p)
        lag = next((lag for lag in (config.lag, *LAGS) if lag >= tiles), None)
        found = {"attnk, two launches": dataclasses.replace(config, lag=0)}
        if self.output == "gated" and lag is not None:
            found["attnk, one launch"] = dataclasses.replace(config, lag=lag)
        return found

    def table_config(self) -> Any:
        from attnk.kernels import tuning

        return tuning.spatial_gate_config(
            tuning.architecture(torch.device(self.device)),
            itemsize=DTYPES[self.dtype].itemsize,
            pixels=self.shape[2] * self.shape[3],
            channels_last=self.channels_last,
        )

    def oracle(
        self, provider: Provider, inputs: tuple[Tensor, ...], dout: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        order = "max_avg" if self.output == "gated" else "avg_max"
        wide = [parameter.detach().double().requires_grad_() for parameter in provider.parameters]
        x = inputs[0].detach()
        parts, sums, magnitude = [], [torch.zeros_like(parameter) for parameter in wide], 0.0
        images = max(1, (1 << 25) // x[0].numel())  # at a time: float64 takes room
        for part, dpart in zip(x.split(images), dout.split(images), strict=True):
            part = part.double().requires_grad_()
            logit = spatial_gate_reference(part, *wide, order=order, output="logit")
            gate = torch.sigmoid(logit)
            out = part * gate if self.output == "gated" else gate
            dx, dlogit, *grads = torch.autograd.grad(out, (part, logit, *wide), dpart.double())
            parts.append((out.detach(), dx))
            sums = [total + grad for total, grad in zip(sums, grads, strict=True)]
            magnitude += (dlogit.abs().sum() * part.abs().max()).item()
        outs, dxs = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        exact = dict(zip(("out", "dx", "dweight", "dbias"), (outs, dxs, *sums), strict=False))
        return exact, dict.fromkeys(("dweight", "dbias"), magnitude)

    def minimal_bytes(self, which: str) -> int:
        """The fewest bytes a pass must move through memory: x, dout, out and dx once each."""
        plane = self.size // self.shape[1]
        if self.output == "map":
            return {"forward": 1, "backward": 1, "training": 2}[which] * (self.size + plane)
        return {"forward": 2, "backward": 3, "training": 5}[which] * self.size

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
        size, map_size = self.size, pixels * DTYPES[self.dtype].itemsize
        if self.output == "map":
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

    def rates(self, which: str, provider: str, seconds: float, copy: float) -> dict[str, float]:
        rate = self.minimal_bytes(which) / seconds
        found = {"gbps": round(rate / 1e9, 1), "percent_of_copy": round(100 * rate / copy, 1)}
        found["copy_gbps"] = round(copy / 1e9, 1)
        if provider.startswith("attnk"):
            moved = self.kernel_bytes(which, provider) / seconds
            found |= {"gbps_moved": round(moved / 1e9, 1), "percent_of_copy_moved": round(100 * moved / copy, 1)}
        return found

    def metered(self) -> dict[str, dict[str, int]]:
        from attnk.testing import Meter

        (x,), dout = self.inputs()
        module = self.attnk()
        module.backend = "triton"
        found = {}
        for name, config in self.launch_configs().items():
            if config.lag:  # bytes do not depend on the lag, and a short one leaves fewer programs to interpret
                config = dataclasses.replace(config, lag=-(-self.shape[2] * self.shape[3] // config.block_p))
            with forced(config):
                with torch.no_grad(), Meter() as forward:
                    module(x)
                out = module(x)
                with Meter() as backward:
                    torch.autograd.grad(out, (x, *module.parameters()), dout)
            found[name] = {"forward": forward.bytes, "backward": backward.bytes}
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
NUM_WARPS = (2, 4, 8)
NUM_STAGES = (1, 2, 3)
MIN_PIXELS = (0, 128, 512, 8192)  # where one row of the table ends and the next begins
LARGE_BYTES = 50 << 20  # one launch is for maps that do not fit the L2 cache
TUNED_SHAPES = ((32, 64, 112, 112), (32, 256, 56, 56), (256, 512, 14, 14), (32, 2048, 7, 7))  # for MIN_PIXELS


def tuned_cases() -> list[SpatialGateCase]:
    """What a sweep of the whole table goes through."""
    return [
        SpatialGateCase(shape, "gated", dtype, channels_last, device="cuda")
        for dtype in ("fp16", "fp32")
        for channels_last in (False, True)
        for shape in TUNED_SHAPES
    ]


def tuned_case(options: argparse.Namespace) -> SpatialGateCase:
    """The case that the command line of ``tune.py`` names."""
    shape = tuple(int(size) for size in (options.shape or "32x256x56x56").split("x"))
    return SpatialGateCase(shape, "gated", options.dtype, options.channels_last, device="cuda")


class Tuning:
    """The spatial gate's part of a sweep: one configuration, timed forward (keeping for the backward) and backward."""

    def __init__(self, case: SpatialGateCase) -> None:
        from attnk.kernels import spatial_gate as kernels

        self.case, self.kernels = case, kernels
        inputs, self.dout = case.inputs()
        self.x = inputs[0].detach()
        self.weight, self.bias = (parameter.detach() for parameter in case.attnk().parameters())
        self.options = (case.shape[1], case.channels_last, "max_avg", "gated", "first", True, True)
        self.start = {"config": case.table_config()}

    def check(self) -> None:
        """Raise a WrongResult where what the table's configuration computes is wrong."""
        harness.check(self.case, self.case.providers(compiled=False), *self.case.inputs())

    def candidates(self, part: str, best: Any) -> Iterator[Any]:
        """Configurations that differ from the best so far in one thing."""
        changes: list[dict[str, int]] = [{"block_p": p, "block_c": c} for p, c in BLOCKS[self.case.channels_last]]
        changes += [{"num_warps": number} for number in NUM_WARPS]
        changes += [{"num_stages": number} for number in NUM_STAGES]
        if self.case.size >= LARGE_BYTES:
            changes += [{"lag": lag} for lag in (0, *LAGS)]
        yield from (config for change in changes if self._sensible(config := dataclasses.replace(best, **change)))

    def _sensible(self, config: Any) -> bool:
        _, channels, height, width = self.case.shape
        elements = config.block_p * config.block_c / (32 * config.num_warps)
        lag_works = config.lag == 0 or config.lag >= -(-height * width // config.block_p)
        return 4 <= elements <= 64 and lag_works and config.block_c <= 2 * channels

    def results(self, values: dict[str, Any]) -> dict[str, Tensor]:
        """What is computed with a configuration."""
        kept = self._forward(values["config"])
        grads = self._backward(values["config"], kept)
        return dict(zip(("out", "dx", "dweight", "dbias"), (kept[0], *grads), strict=True))

    def works(self, part: str, values: dict[str, Any]) -> dict[str, harness.Work]:
        """What is timed of it."""
        config = values["config"]
        return {
            "forward": (lambda: None, lambda _: self._forward(config)),
            "backward": (lambda: self._forward(config), lambda kept: self._backward(config, kept)),
        }

    def _forward(self, config: Any) -> Any:
        return self.kernels.spatial_gate_forward(
            self.x, self.weight, self.bias, "max_avg", "gated", "first", config=config
        )

    def _backward(self, config: Any, kept: Any) -> Any:
        return self.kernels.spatial_gate_backward(
            self.dout, self.x, self.weight, *kept[1:], *self.options, config=config
        )

    def row(self, values: dict[str, Any]) -> str:
        """The line of the table that says it."""
        config = values["config"]
        names = [field.name for field in dataclasses.fields(config) if field.name != "lag" or config.lag]
        arguments = ", ".join(f"{name}={getattr(config, name)}" for name in names)
        pixels = self.case.shape[2] * self.case.shape[3]
        min_pixels = max(bound for bound in MIN_PIXELS if bound <= pixels)
        itemsize = 2 if self.case.dtype != "fp32" else 8  # an architecture's rows must have one for float64, too
        return f"SpatialGateRow({self.case.channels_last}, {itemsize}, {min_pixels}, SpatialGateConfig({arguments})),"


# The picture

PASS_TITLES = {"forward": "inference", "training": "forward + backward"}
OUTPUT_TITLES = {"gated": "returns x * gate", "map": "returns the gate"}
CAPTION = (
    "tutorial: mean, max, cat, conv2d, sigmoid in eager PyTorch, and the multiplication where there is one. "
    "Below the bars: batch x channels, height x width."
)


def panels(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of panels: on the CPU an output each, with a panel a pass; on a GPU one panel for a layout and pass."""
    if any(record["group"] == "gpu" for record in records):
        records = [record for record in records if record["group"] == "gpu"]
        gated = {"output": "gated", "dtype": records[0]["dtype"]}
        layouts = ("contiguous", "channels_last")
        wanted = [[{**gated, "pass": which, "layout": layout}] for layout in layouts for which in PASS_TITLES]
    else:
        records = [record for record in records if record["group"] == "cpu"]
        wanted = [[{"output": output, "pass": which} for which in PASS_TITLES] for output in OUTPUT_TITLES]
    return [
        [
            {
                "title": ", ".join([PASS_TITLES[keys["pass"]], OUTPUT_TITLES[keys["output"]], *_layout(keys)]),
                "records": [record for record in records if keys.items() <= record.items()],
                "label": _label,
                "section": lambda record: record["layout"],
            }
            for keys in row
        ]
        for row in wanted
    ]


def _layout(keys: dict[str, str]) -> list[str]:
    return [keys["layout"]] if "layout" in keys else []


def _label(record: dict[str, Any]) -> str:
    batch, channels, height, width = record["shape"].split("x")
    return f"{batch} x {channels}\n{height} x {width}"
