"""The deferred gradient: a gate pools a map and scales it, and one backward writes the map's gradient once.

The pooling returns, besides what it pooled, *handles*: placeholders without numbers. The scaling reads the map detached
and takes the handles along, and its backward hands out, as their "gradients", what the pooling's backward lacks: the
gradient of the output, the gates. A handle serves once; whoever has none gives the map its ordinary gradient.
"""

from dataclasses import dataclass, field

import torch


def placeholder(
    like: torch.Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A tensor of this shape that is one NaN in memory; whoever read it would see."""
    return like.new_full((), float("nan"), dtype=dtype).expand(shape)


def may_defer() -> bool:
    """Whether handles may be made: not in a program under export, whose operations are differentiated one by one."""
    if not torch.is_grad_enabled():
        return False
    return not (torch.compiler.is_compiling() and _is_exporting())


def version(x: torch.Tensor) -> int:
    """How often x was changed in place; 0 while compiling, where nobody can know."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def _mapped_levels(tensor: torch.Tensor) -> set[int]:
    """Which of the transforms of torch.func around us map over this tensor."""
    levels: set[int] = set()
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return levels
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            levels.add(functorch.maybe_get_level(tensor))
        tensor = functorch.get_unwrapped(tensor)
    return levels


def _is_exporting() -> bool:
    is_exporting = getattr(torch.compiler, "is_exporting", None)  # PyTorch 2.6 has none
    return is_exporting is not None and is_exporting()


@dataclass(eq=False, kw_only=True, frozen=True)
class Deferred:
    """A map, and what its pooling left for the scaling.

    Attributes:
        x: the map as given.
    """

    x: torch.Tensor = field(repr=False)
    _handles: list[tuple[torch.Tensor, ...]] = field(default_factory=list, repr=False)  # one or none; copies share it
    _version: int = field(default=0, repr=False)

    def take_handles(self, *gates: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """The handles, for the first who asks while gradients are recorded.

        None if x has been changed since, or if ``torch.vmap`` maps a gate and not x: every example would use them.
        """
        if not self._handles or not may_defer():
            return None
        handles = self._handles.pop()
        mapped = set().union(*map(_mapped_levels, gates))
        return handles if version(self.x) == self._version and mapped <= _mapped_levels(handles[0]) else None


@dataclass(eq=False, kw_only=True, frozen=True)
class Pooled(Deferred):
    """What ``attnk.channel_pool`` returns, for ``attnk.scale`` to take.

    Attributes:
        x: the map as given, (B, C, ...) or (C, H, W).
        avg: (B, C) in the dtype of x, the mean over the pixels; None where it was not asked for.
        max: (B, C) in the dtype of x, the maximum over the pixels; None where it was not asked for.
    """

    avg: torch.Tensor | None = None
    max: torch.Tensor | None = None
