"""One run of a model, with every module's call noted: what ``attnk.lint`` looks at."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from attnk.modules._probe import PROBE_ERRORS
from attnk.ops import _watch

SAME, OTHER = 1e-5, 1e-3  # of the largest value: what rounding may do, and what is a difference
SATURATED = 1.5  # standard deviation of a query's logits; scaled ones of a new network have about 0.3
CUT = 0.3  # share of an attention's output that a ReLU sets to 0

PRODUCTS = ("matmul", "bmm", "__matmul__", "einsum", "baddbmm")
ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention")


class Saturated(NamedTuple):
    """A softmax whose logits come straight from a product of so many channels.

    Their standard deviation along the keys, and the largest weight, are means over the queries.
    """

    name: str
    channels: int
    keys: int
    spread: float
    largest: float


class Cut(NamedTuple):
    """An attention module whose result goes straight into a ReLU, and the share of it that this sets to 0."""

    name: str
    relu: str
    share: float


@dataclass
class Call:
    """One call of a module: copies of what it was given and what it gave, as far as that is tensors."""

    name: str
    module: nn.Module
    inputs: list[torch.Tensor]
    attends: bool = False
    outputs: list[torch.Tensor] = field(default_factory=list)


class Run(TorchFunctionMode):
    """Runs a model once and notes every module's call, in the order in which they end."""

    def __init__(self, model: nn.Module, replace: Callable[[str, Any, Any], Any] | None = None) -> None:
        super().__init__()
        self.names = {part: name for name, part in model.named_modules()}
        self.replace = replace
        self.running: list[Call] = []
        self.started: list[Call] = []
        self.calls: list[Call] = []
        self.saturated: list[Saturated] = []
        self.cut: list[Cut] = []
        self.last: Call | None = None  # that ended, with nothing between
        self.product: Any = None
        self.error: BaseException | None = None
        self.failed = ""
        self.out: list[torch.Tensor] = []

    # hooks of all modules

    def enter(self, module: nn.Module, args: tuple) -> None:
        if module in self.names:
            self.running.append(Call(self.names[module], module, copies_of(args)))
            self.started.append(self.running[-1])

    def leave(self, module: nn.Module, args: tuple, out: Any) -> Any:
        if module not in self.names:
            return None
        call = self.running.pop()
        while call.module is not module:  # calls that raised, and whose errors the model caught
            call = self.running.pop()
        if self.replace is not None:
            replaced = self.replace(call.name, args, out)
            out = out if replaced is None else replaced
        call.outputs = copies_of(out)
        self.calls.append(call)
        self.last = call
        return out

    # what attnk's operations tell, and what PyTorch's functions are called with

    def attend(self) -> None:
        """Whatever is running has attention in it."""
        for call in self.running:
            call.attends = True

    def told(self, kind: str, what: dict[str, Any]) -> None:
        if not kind.endswith("attention") or not self.running:
            return
        self.attend()
        if kind == "softmax_attention" and what["q"].numel() and what["k"].numel():
            q, k = what["q"].detach()[:1, :, :64].float(), what["k"].detach()[:1].float()
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            if abs(what["scale"]) > 1.5 * q.shape[-1] ** -0.5:
                self.saturation(q @ k.mT * what["scale"], q.shape[-1])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ATTENTION:
            self.attend()
        elif name == "softmax":
            self.see_softmax(*args, **(kwargs or {}))
        elif name in ("relu", "relu_"):
            self.see_relu(args[0])
        out = func(*args, **(kwargs or {}))
        if name in PRODUCTS:
            operand = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
            self.product = None if operand is None else (out, operand.shape[-1], out._version)
        return out

    def see_softmax(self, logits: torch.Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> None:
        if dim is None or logits.dim() < 3 or dim % logits.dim() != logits.dim() - 1 or logits.shape[-1] < 2:
            return
        self.attend()
        product, width, version = self.product or (None, 0, 0)
        if logits is product and logits._version == version:  # nothing scaled or masked them in place
            self.saturation(logits.detach().float(), width)

    def saturation(self, logits: torch.Tensor, width: int) -> None:
        """Look at logits (..., Nq, Nk) that come from a product of so many channels."""
        spread, largest = logits.std(-1).mean().item(), logits.softmax(-1).amax(-1).mean().item()
        name = self.running[-1].name if self.running else ""
        if spread > SATURATED and all(name != each.name for each in self.saturated):
            self.saturated.append(Saturated(name, width, logits.shape[-1], spread, largest))

    def see_relu(self, x: torch.Tensor) -> None:
        last = self.last
        if last is None or not last.attends or not last.outputs or last.outputs[0].numel() != x.numel():
            return
        # the same numbers, perhaps in another shape or order
        if not torch.allclose(checksum(last.outputs[0]), checksum(x.detach()), rtol=1e-4, atol=1e-4):
            return
        share = (x.detach() <= 0).float().mean().item()
        if share >= CUT:
            self.cut.append(Cut(last.name, self.running[-1].name if self.running else "", share))


@contextlib.contextmanager
def hooked(enter: Callable[..., Any], leave: Callable[..., Any]) -> Iterator[None]:
    """Inside, every module of the process calls these before and after its forward."""
    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_once(model: nn.Module, x: torch.Tensor, replace: Callable[[str, Any, Any], Any] | None = None) -> Run:
    """Run a model without gradients, with the same random numbers every time."""
    run = Run(model, replace)
    torch.manual_seed(0)
    _watch.watchers.append(run.told)
    try:
        with torch.no_grad(), hooked(run.enter, run.leave), run:
            run.out = copies_of(model(x))
    except PROBE_ERRORS as error:
        run.error, run.failed = error, run.running[-1].name if run.running else ""
    finally:
        _watch.watchers.remove(run.told)
    return run


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors in a tensor, or in nested lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for each in value for tensor in tensors_in(each)] if isinstance(value, list | tuple) else []


def copies_of(value: Any) -> list[torch.Tensor]:
    """Copies of these, which nothing changes in place."""
    return [tensor.detach().clone() for tensor in tensors_in(value)]


def checksum(x: torch.Tensor) -> torch.Tensor:
    """Three numbers that do not depend on the order of x's."""
    x = x.double()
    return torch.stack([x.mean(), x.abs().mean(), x.square().mean().sqrt()])


def differ(some: list[torch.Tensor], others: list[torch.Tensor], limit: float) -> bool:
    """Whether shapes or numbers differ, by more than a share of the largest number (``OTHER``: or than rounding)."""
    if [one.shape for one in some] != [other.shape for other in others]:
        return True
    for one, other in zip(some, others, strict=True):
        limit = max(limit, 100 * torch.finfo(one.dtype).eps if limit == OTHER else 0)
        if one.numel() and not (one - other).abs().max() <= limit * other.abs().max():
            return True
    return False
