"""A training step of a ResNet-50 with each gate, and without: the usual modules, eager and compiled, and attnk's."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import harness
import torch
import torch.nn.functional as F
from cbam_cases import NORM, CbamCase
from channel_gate_cases import SE, ChannelGateCase
from coordinate_gate_cases import CoordinateGateCase
from gate_cases import GateCase
from harness import DTYPES
from resnet50 import ResNet50
from spatial_gate_cases import SpatialGateCase
from torch import Tensor, nn

TITLE = "ResNet-50 with a gate in every bottleneck, a training step"
GATES: dict[str, tuple[type[GateCase], str]] = {
    "CBAM": (CbamCase, NORM),
    "coordinate": (CoordinateGateCase, "coordinate"),
    "SE": (ChannelGateCase, SE),
    "spatial": (SpatialGateCase, "gated"),
}
COMPILED = "torch.compile"
WITHOUT = "without gates"
PROVIDERS = {  # the usual modules come first, then what they are compared with
    "cpu": ("tutorial", COMPILED, "attnk", WITHOUT, f"{WITHOUT}, {COMPILED}"),
    "cuda": ("tutorial", COMPILED, "attnk", f"attnk, {COMPILED}", WITHOUT, f"{WITHOUT}, {COMPILED}"),
}
WHAT = ("logits", "gradients")
MOST = {"logits": 0.5, "gradients": 1.5}  # relative errors of the usual network itself
EXACT, CHOICE = 1e-6, 5e-2  # relative errors; nearly equal maxima and zeros of ReLUs choose by rounding
LEARNING_RATE = 1e-4  # so small that the weights stay about as they are


class NetworkCase:
    """What the cases of whole networks share: float32 on a CPU, bfloat16 by autocast and channels_last on a GPU."""

    op: ClassVar[str]

    batch: int
    side: int
    device: str

    @property
    def case(self) -> str:
        """What is told apart of a network."""
        raise NotImplementedError

    @property
    def dtype(self) -> str:
        return "bf16" if self.device == "cuda" else "fp32"

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.device == "cuda" else torch.contiguous_format

    def __str__(self) -> str:
        return " ".join(str(value) for key, value in self.fields().items() if key != "op")

    def fields(self) -> dict[str, Any]:
        """The case as columns of a results file."""
        layout = "channels_last" if self.device == "cuda" else "contiguous"
        shape = f"{self.batch}x3x{self.side}x{self.side}"
        return {"op": self.op, "case": self.case, "shape": shape, "dtype": self.dtype, "layout": layout}

    def network(self, provider: str) -> nn.Module:
        """What a provider runs."""
        raise NotImplementedError

    def data(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.side, self.side, generator=generator)
        labels = torch.randint(1000, (self.batch,), generator=generator)
        return images.to(self.device, memory_format=self.memory_format), labels.to(self.device)


@dataclasses.dataclass(frozen=True)
class Resnet50Case(NetworkCase):
    """A network and its batch.

    Attributes:
        gate: a key of GATES.
        batch, side: of the images.
        device: "cpu" or "cuda".
    """

    op: ClassVar[str] = "resnet50"

    gate: str
    batch: int
    side: int
    device: str = "cpu"

    @property
    def case(self) -> str:
        return self.gate

    def network(self, provider: str) -> nn.Module:
        """What a provider trains; all that have gates have the same weights, and so have the others."""
        case, kind = GATES[self.gate]

        def usual(channels: int) -> nn.Module:
            return case((1, channels, 1, 1), kind).usual()

        def fused(channels: int) -> nn.Module:
            return case((1, channels, 1, 1), kind).fused()

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = ResNet50(None if provider.startswith(WITHOUT) else usual)
            if provider.startswith("attnk"):
                state = network.state_dict()
                network = ResNet50(fused)
                network.load_state_dict(state)
        return network.to(self.device, memory_format=self.memory_format)

    def steps(self, compiled: bool) -> dict[str, "Step"]:
        """A training step of every provider."""
        torch._dynamo.reset()
        return {name: Step(self, name) for name in PROVIDERS[self.device] if compiled or COMPILED not in name}


class Step:
    """Forward, loss, backward and the optimizer of one provider."""

    def __init__(self, case: NetworkCase, provider: str) -> None:
        self.provider, self.device, self.dtype = provider, case.device, DTYPES[case.dtype]
        self.network = case.network(provider)
        self.call = torch.compile(self.network, fullgraph=True) if COMPILED in provider else self.network
        self.images, self.labels = case.data()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.call, self.images)[0].backward()
        self.optimizer.step()

    def loss(self, network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the logits."""
        autocast = images.dtype == torch.float32 and self.dtype != torch.float32
        with torch.autocast(self.device, self.dtype, enabled=autocast):
            logits = network(images)
            return F.cross_entropy(logits, self.labels), logits

    def values(self, exact: bool = False) -> tuple[Tensor, Tensor]:
        """Logits and all gradients, one behind the other, of weights that stay as they are; exact: in float64."""
        network, call, images = self.network, self.call, self.images
        if exact:
            network = call = copy.deepcopy(network).double()
            images = images.double()
        loss, logits = self.loss(call, images)
        grads = torch.autograd.grad(loss, list(network.parameters()))
        return logits.detach().double(), torch.cat([grad.double().flatten() for grad in grads])


def check(steps: Mapping[str, Step]) -> None:
    """Raise unless every provider computes its network, by the 2-norms of the logits and of all gradients.

    In float64 attnk's must be the usual network's, up to rounding. As timed, what each is off from that may be twice
    what the usual network is, and some more: where two maxima are nearly equal, rounding chooses. In bfloat16 that says
    little of the gradients, half of which is noise in a network whose weights are random.

    Raises:
        harness.WrongResult: the provider and by how much it is off.
    """
    exact = {name: steps[name].values(exact=True) for name in ("tutorial", "attnk", WITHOUT) if name in steps}
    _check("attnk in float64", exact["attnk"], exact["tutorial"], dict.fromkeys(WHAT, EXACT))
    for first in [name for name in exact if name != "attnk"]:
        allowed = MOST
        for name, step in steps.items():
            if name.startswith(WITHOUT) == (first == WITHOUT):
                errors = _check(name, step.values(), exact[first], allowed)
                if name == first:
                    allowed = {what: 2 * error + CHOICE for what, error in errors.items()}


def _check(name: str, values: Any, wanted: Any, allowed: dict[str, float]) -> dict[str, float]:
    found = {}
    for what, got, want in zip(WHAT, values, wanted, strict=True):
        found[what] = error = ((got - want).norm() / want.norm()).item()
        if not error <= allowed[what]:  # also catches NaN
            raise harness.WrongResult(f"{name}: {what} are off by {error:.2e}, allowed {allowed[what]:.2e}")
    return found


# The picture

CAPTION = (
    "The gates' share: how much less a step takes without gates, eager or compiled alike, in percent. "
    "One gate behind the last batch norm of each of the 16 bottlenecks."
)
SHARE = "gates_percent"


def panels(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """One row: the gates' share of the step, and times as fast as the usual modules."""
    gated = [record for record in records if SHARE in record]
    label = {"label": lambda record: record["case"], "section": lambda record: ""}
    return [
        [
            {"title": "the gates' share of the step", "records": gated, **label, "value": SHARE, "ylabel": "percent",
             "scale": SHARE},
            {"title": "the whole step", "records": gated, **label, "ylabel": "times as fast as\nthe usual modules"},
        ]
    ]  # fmt: skip
