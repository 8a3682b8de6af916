"""What the cases of all gates share: the map, the providers, the check, rates, the sweep, the picture."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import harness
import torch
from harness import DTYPES, Provider
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

PROVIDERS = ("tutorial", "torch.compile", "attnk")
ORACLE_BYTES = 192  # an element of x, with all that a float64 run keeps


@dataclasses.dataclass(frozen=True)
class GateCase:
    """A feature map and the gate it passes. A class of its own for each operation says which kinds of it there are.

    Attributes:
        op: the operation.
        kinds: the kinds of gate, in the order of tables.
        titles: what pictures call them, where that is not their name.
        column: what tables call the kind.
        shape: (B, C, H, W).
        kind: one of ``kinds``.
        dtype: a key of DTYPES.
        channels_last: the layout of x.
        device: "cpu" or "cuda".
    """

    op: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    titles: ClassVar[dict[str, str]] = {}
    column: ClassVar[str] = "case"
    random: ClassVar[bool] = False

    shape: tuple[int, int, int, int]
    kind: str
    dtype: str = "fp32"
    channels_last: bool = False
    device: str = "cpu"

    # What each class has of its own

    def usual(self) -> nn.Module:
        """The tutorials' or the published module."""
        raise NotImplementedError

    def fused(self) -> nn.Module:
        """The module of attnk that computes the same and takes its weights."""
        raise NotImplementedError

    def kernel_bytes(self, which: str, provider: str) -> int:
        """The bytes that attnk's kernels move in a pass: "forward" (nothing kept), "backward" or "training"."""
        raise NotImplementedError

    def most(self, which: str) -> float:
        """The bytes that attnk's kernels may move at 64 channels, in S."""
        raise NotImplementedError

    def run_operators(self, which: str, module: Any, x: Tensor, dout: Tensor) -> None:
        """The operators that a module of attnk runs on the CPU, called directly; the network between by autograd."""
        raise NotImplementedError

    # What they share

    def table_config(self, op: str = "") -> Any:
        """The tuning table's configuration, of its own operation or of another that it runs."""
        from attnk.kernels import tuning

        return getattr(tuning, f"{op or self.op}_config")(
            tuning.architecture(torch.device(self.device)),
            itemsize=self.itemsize,
            pixels=self.shape[2] * self.shape[3],
            channels_last=self.channels_last,
        )

    @property
    def size(self) -> int:
        """S, the bytes of x."""
        batch, channels, height, width = self.shape
        return batch * channels * height * width * self.itemsize

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def needed_memory(self) -> int:
        return ORACLE_BYTES * self.size // self.itemsize

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.shape

    def __str__(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.shape))} {self.dtype} {self.layout}"

    def fields(self) -> dict[str, Any]:
        """The case as columns of a results file."""
        shape = "x".join(map(str, self.shape))
        return {"op": self.op, self.column: self.kind, "shape": shape, "dtype": self.dtype, "layout": self.layout}

    def inputs(self) -> tuple[tuple[Tensor], Tensor]:
        """x, requiring grad, and the gradient of the output.

        One channel is the largest of a pixel by a margin, before a channel gate and behind it, and one pixel the
        largest of a channel, so that providers may round and may differ on whom equal maxima give their gradient.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        batch, channels, height, width = self.shape
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        options = {"dtype": DTYPES[self.dtype], "device": self.device}
        x = torch.empty(self.shape, memory_format=layout, **options)
        x.normal_(std=0.1, generator=generator).clamp_(-0.2, 0.2)
        plane = (batch, 1, height, width)
        winner = torch.randint(channels, plane, device=self.device, generator=generator)
        x.scatter_(1, winner, torch.empty(plane, **options).uniform_(1, 1.2, generator=generator))
        largest, pixel = x.flatten(2).max(2)
        b, c = torch.meshgrid(*(torch.arange(size, device=self.device) for size in (batch, channels)), indexing="ij")
        x[b, c, pixel // width, pixel % width] = 1.25 * largest + 0.05
        dout = torch.empty(self.out_shape, memory_format=layout, **options).normal_(generator=generator)
        dout *= min(1, 1000 / dout.numel() ** 0.5)  # so that its sums do not overflow in float16
        return (x.requires_grad_(),), dout

    def tutorial(self) -> nn.Module:
        """The usual module with the weights, and statistics, that every provider of the case has."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.usual()
            for part in module.modules():
                if isinstance(part, _BatchNorm):
                    part.running_mean.normal_(std=0.1)
                    part.running_var.uniform_(0.5, 1.5)
        return module.to(self.device, DTYPES[self.dtype])

    def attnk(self) -> nn.Module:
        """The module of attnk, with the same weights."""
        module = self.fused()
        module.load_state_dict(self.tutorial().state_dict())
        return module.to(self.device, DTYPES[self.dtype])

    def providers(self, compiled: bool = True) -> dict[str, Provider]:
        usual = self.tutorial()
        found = [Provider("tutorial", by_mode(usual), tuple(usual.parameters()))]
        if compiled:
            torch._dynamo.reset()  # a second shape would otherwise be compiled for any shape
            usual = self.tutorial()
            call = by_mode(usual, torch.compile(usual, fullgraph=True))
            found.append(Provider("torch.compile", call, tuple(usual.parameters())))
        return {provider.name: provider for provider in (*found, *self.own_providers())}

    def own_providers(self) -> list[Provider]:
        """Those of attnk."""
        module = self.attnk()
        return [Provider("attnk", by_mode(module), tuple(module.parameters()))]

    def oracle(
        self, provider: Provider, inputs: tuple[Tensor, ...], dout: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The usual module in float64; what attnk defines, its own tests compare with it."""
        module, terms = self.tutorial().double(), dict[str, float]()
        of_channels = (inputs[0].detach() * dout).abs().double().sum((2, 3))  # what gradients of gates are sums of
        rounded = of_channels.norm().item() / 4  # of a sigmoid's logits, as far as they round each for itself
        for name, part in module.named_modules():
            if list(part.parameters(recurse=False)):
                part.register_forward_hook(_adds_terms(terms, name, rounded))
        call, x = by_mode(module), inputs[0].detach().double().requires_grad_()
        with torch.no_grad():
            inferred = call(x)
        out = call(x)
        names = ("x", *(name for name, _ in module.named_parameters()))
        grads = torch.autograd.grad(out, (x, *module.parameters()), dout.double())
        exact = {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(names, grads, strict=True)}}
        return exact | {"out without grad": inferred}, terms

    def minimal_bytes(self, which: str) -> int:
        """The fewest bytes a pass must move through memory: x, dout, out and dx once each."""
        return {"forward": 2, "backward": 3, "training": 5}[which] * self.size

    def rates(self, which: str, provider: str, seconds: float, copy: float) -> dict[str, float]:
        rate = self.minimal_bytes(which) / seconds
        found = {"gbps": round(rate / 1e9, 1), "percent_of_copy": round(100 * rate / copy, 1)}
        found["copy_gbps"] = round(copy / 1e9, 1)
        if provider.startswith("attnk"):
            moved = self.kernel_bytes(which, provider) / seconds
            found |= {"gbps_moved": round(moved / 1e9, 1), "percent_of_copy_moved": round(100 * moved / copy, 1)}
        return found

    def metered(self) -> dict[str, dict[str, int]]:
        return {"attnk": self.metered_once()}

    def metered_once(self) -> dict[str, int]:
        """Bytes by pass, as the kernels are configured now."""
        from attnk.testing import Meter

        (x,), dout = self.inputs()
        module = self.attnk()
        module.backend = "triton"
        call = by_mode(module)
        with torch.no_grad(), Meter() as forward:
            call(x)
        out = call(x)
        with Meter() as backward:
            torch.autograd.grad(out, (x, *module.parameters()), dout)
        return {"forward": forward.bytes, "backward": backward.bytes}


def by_mode(module: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """A module, or what was compiled from it, with its batch norms in evaluation where there are no gradients."""
    call = module if call is None else call
    if not any(isinstance(part, _BatchNorm) for part in module.modules()):
        return call

    def run(x: Tensor) -> Tensor:
        module.train(torch.is_grad_enabled())
        return call(x)

    return run


def _adds_terms(terms: dict[str, float], name: str, rounded: float) -> Callable[..., None]:
    """A hook that adds up a bound of the absolute terms that a layer's gradients are sums of, and of what rounds."""

    def hook(part: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        if not out.requires_grad:
            return
        largest = {"weight": max(tensor.abs().max().item() for tensor in (args[0], out)), "bias": 1.0}

        def add(grad: Tensor) -> None:
            for parameter, _ in part.named_parameters(recurse=False):
                key = f"d{name}.{parameter}"
                terms[key] = terms.get(key, 0.0) + largest[parameter] * (grad.abs().sum().item() + rounded)

        out.register_hook(add)

    return hook


# Tuning

NUM_WARPS = (2, 4, 8)
NUM_STAGES = (1, 2, 4)
ELEMENTS = (4, 64)  # a thread, at least and at most
TUNED_SHAPES = ((32, 64, 112, 112), (32, 256, 56, 56), (256, 512, 14, 14), (32, 2048, 7, 7))


def tuned_cases(case: type[GateCase], kind: str, dtypes: tuple[str, ...] = ("fp16", "fp32")) -> list[Any]:
    """What a sweep of a whole table goes through."""
    return [
        case(shape, kind, dtype, channels_last, device="cuda")
        for dtype in dtypes
        for channels_last in (False, True)
        for shape in TUNED_SHAPES
    ]


def tuned_case(case: type[GateCase], kind: str, options: argparse.Namespace) -> Any:
    """The case that the command line of ``tune.py`` names."""
    shape = tuple(int(size) for size in (options.shape or "32x256x56x56").split("x"))
    return case(shape, kind, options.dtype, options.channels_last, device="cuda")


def vectors(tensor: Tensor, shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> Tensor:
    """Random numbers in place of what a network makes; on a tensor's device, in its dtype unless it is said."""
    generator = torch.Generator(tensor.device).manual_seed(1)
    found = torch.empty(shape, device=tensor.device, dtype=dtype or tensor.dtype)
    return found.uniform_(0.3, 0.7, generator=generator)


class GateTuning:
    """A gate's part of a sweep: one configuration, timed forward (keeping for the backward) and backward.

    Only kernels run; the network between pooling and gate is left out.
    """

    def __init__(self, case: Any) -> None:
        self.case = case
        (x,), self.dout = case.inputs()
        self.x = x.detach()
        self.start = {"config": case.table_config()}

    # What each class has of its own

    def changes(self) -> list[dict[str, int]]:
        """What may be other than in the best configuration so far; one at a time is tried."""
        raise NotImplementedError

    def elements(self, config: Any) -> int:
        """Of a tile."""
        return config.block_p * config.block_c

    def forward(self, config: Any) -> tuple[dict[str, Tensor], Any]:
        """Outputs, by name, and what the backward takes of them and besides."""
        raise NotImplementedError

    def backward(self, config: Any, kept: Any) -> dict[str, Tensor]:
        """Gradients, by name."""
        raise NotImplementedError

    def key(self) -> str:
        """Of the table's row, as it is written."""
        raise NotImplementedError

    # What they share

    def check(self) -> None:
        """Raise a WrongResult where what the table's configuration computes is wrong."""
        harness.check(self.case, self.case.providers(compiled=False), *self.case.inputs())

    def candidates(self, part: str, best: Any) -> Iterator[Any]:
        """Configurations that differ from the best so far in one thing."""
        for change in self.changes():
            config = dataclasses.replace(best, **change)
            if ELEMENTS[0] <= self.elements(config) / (32 * config.num_warps) <= ELEMENTS[1] and self.sensible(config):
                yield config

    def sensible(self, config: Any) -> bool:
        return config.block_c <= 2 * self.case.shape[1]

    def results(self, values: dict[str, Any]) -> dict[str, Tensor]:
        """What is computed with a configuration."""
        outs, kept = self.forward(values["config"])
        return outs | self.backward(values["config"], kept)

    def works(self, part: str, values: dict[str, Any]) -> dict[str, harness.Work]:
        """What is timed of it."""
        config = values["config"]
        return {
            "forward": (lambda: None, lambda _: self.forward(config)),
            "backward": (lambda: self.forward(config)[1], lambda kept: self.backward(config, kept)),
        }

    def row(self, values: dict[str, Any]) -> str:
        """The line of the table that says it."""
        config = values["config"]
        shown = [field for field in dataclasses.fields(config) if getattr(config, field.name) != field.default]
        arguments = ", ".join(f"{field.name}={getattr(config, field.name)}" for field in shown)
        return f"{self.row_class()}({self.key()}, {type(config).__name__}({arguments})),"

    def row_class(self) -> str:
        """The name of the class of the table's rows."""
        return type(self.start["config"]).__name__.replace("Config", "Row")

    def itemsize(self) -> int:
        """Of the table's row; an architecture's rows must have one for float64, too."""
        return 2 if self.case.dtype != "fp32" else 8

    def min_pixels(self, bounds: tuple[int, ...]) -> int:
        """Where the row of the table begins, given where each of them does."""
        return max(bound for bound in bounds if bound <= self.case.shape[2] * self.case.shape[3])


# The picture

PASS_TITLES = {"forward": "inference", "training": "forward + backward"}


def time_panels(records: list[dict[str, Any]], case: type[GateCase]) -> list[list[dict[str, Any]]]:
    """Rows of panels: on the CPU a kind each, with a panel a pass; on a GPU one for a layout and pass."""
    if any(record["group"] == "gpu" for record in records):
        records = [record for record in records if record["group"] == "gpu"]
        first = {case.column: case.kinds[0], "dtype": records[0]["dtype"]}
        layouts = ("contiguous", "channels_last")
        wanted = [[{**first, "pass": which, "layout": layout}] for layout in layouts for which in PASS_TITLES]
    else:
        records = [record for record in records if record["group"] == "cpu"]
        wanted = [[{case.column: kind, "pass": which} for which in PASS_TITLES] for kind in case.kinds]
    return [
        [
            {
                "title": ", ".join([PASS_TITLES[keys["pass"]], _title(case, keys), *_layout(keys)]),
                "records": [record for record in records if keys.items() <= record.items()],
                "label": _label,
                "section": lambda record: record["layout"],
            }
            for keys in row
        ]
        for row in wanted
    ]


def _title(case: type[GateCase], keys: dict[str, str]) -> str:
    kind = keys[case.column]
    return case.titles.get(kind, kind)


def _layout(keys: dict[str, str]) -> list[str]:
    return [keys["layout"]] if "layout" in keys else []


def _label(record: dict[str, Any]) -> str:
    batch, channels, height, width = record["shape"].split("x")
    return f"{batch} x {channels}\n{height} x {width}"
