"""The tutorials' VGG16 with attention and with spatial attention, whole: as published, compiled, and attnk's.

attnk's are those of ``compat="original"``: the same function of the same weights.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import counted
import resnet50_cases
import torch
from resnet50_cases import COMPILED
from torch import Tensor, nn

from attnk import models
from attnk.testing import published

TITLE = "VGG16 with attention as two tutorials have it"
SPATIAL, ATTENTION = "spatial attention", "attention at 3, 4, 5"
KINDS = (SPATIAL, ATTENTION)
POSITIONS = (3, 4, 5)
PASSES = ("forward", "training step")
PROVIDERS = {
    "cpu": ("tutorial", COMPILED, "attnk"),
    "cuda": ("tutorial", COMPILED, "attnk", f"attnk, {COMPILED}"),
}


@dataclasses.dataclass(frozen=True)
class VGG16Case(resnet50_cases.NetworkCase):
    """A network and its batch.

    Attributes:
        kind: one of KINDS.
        batch, side: of the images.
        device: "cpu" or "cuda".
        width: channels of the first block, 64 in VGG16.
    """

    op: ClassVar[str] = "vgg16"

    kind: str
    batch: int
    side: int
    device: str = "cpu"
    width: int = 64

    @property
    def case(self) -> str:
        return self.kind

    @property
    def size(self) -> int:
        """Bytes of the images in float32."""
        return 4 * self.batch * 3 * self.side**2

    def network(self, provider: str) -> nn.Module:
        """What a provider trains; all start from the same weights, under which the images reach the logits."""
        fused = provider.startswith("attnk")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.kind == SPATIAL:
                network: nn.Module = (
                    models.VGG16WithSpatialAttention(compat="original", width=self.width)
                    if fused
                    else published.VGG16WithSpatialAttention(width=self.width)
                )
            else:
                network = (
                    models.VGG16WithAttention(attention_positions=POSITIONS, compat="original", width=self.width)
                    if fused
                    else published.VGG16WithAttention(attention_positions=POSITIONS, width=self.width)
                )
            for layer in network.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        return network.to(self.device, memory_format=self.memory_format)

    def steps(self, compiled: bool) -> dict[str, "Step"]:
        """What every provider runs, without those that compile or with them."""
        torch._dynamo.reset()
        return {name: Step(self, name) for name in PROVIDERS[self.device] if compiled or COMPILED not in name}


class Step(resnet50_cases.Step):
    """A training step, or inference; values are compared without dropout, whose masks differ."""

    def run(self, which: str) -> Any:
        """Run a pass, one of PASSES."""
        self.network.train(which != "forward")
        if which != "forward":
            return self()
        with torch.no_grad():
            return self.loss(self.call, self.images)[1]

    def peak_memory(self, which: str) -> int:
        """The most bytes that a pass allocates; a training step with its gradients, without what SGD keeps."""
        if which != "forward":
            self.run(which)
            self.optimizer.zero_grad(set_to_none=True)
        return counted.peak_memory(functools.partial(self.run, which), self.device)

    def values(self, exact: bool = False) -> tuple[Tensor, Tensor]:
        """As in ``resnet50_cases.Step``, in evaluation mode."""
        self.network.eval()
        return super().values(exact)


# The picture

CAPTION = (
    'Whole networks; attnk\'s with compat="original", the same function of the same weights. A training step:\n'
    "forward, loss, backward, SGD with momentum. Memory: the most that inference allocates besides images and weights."
)


def panels(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """One row: both passes, and the memory of inference."""
    label = {"label": lambda record: record["case"], "section": lambda record: ""}
    timed = [record for record in records if record["group"] != "memory"]
    rows = [
        {"title": which, "records": [r for r in timed if r["pass"] == which], **label, "scale": "times"}
        for which in PASSES
    ]
    memory = [r for r in records if r["group"] == "memory" and r["pass"] == "forward"]
    rows.append(
        {"title": "memory of inference", "records": memory, **label, "value": "peak_mib", "ylabel": "peak, MiB"}
    )
    return [[panel for panel in rows if panel["records"]]]
