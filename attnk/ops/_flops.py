"""FLOP formulas for ``torch.utils.flop_counter``, which is not imported on their account: it imports triton."""

import sys
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_formulas: dict[Any, Callable[..., int]] = {}


def declare_flops(op: Any, formula: Callable[..., int]) -> None:
    """Declare how many FLOPs an operation takes.

    Args:
        op: the overload packet, ``torch.ops.attnk.<name>``.
        formula: takes the operation's arguments, a shape for each tensor.
    """
    _formulas[op] = formula
    announce_flops()


def announce_flops() -> None:
    """Tell the flop counter, if anybody has imported it, what was declared; counters already running hear it too."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or all(op in counter.flop_registry for op in _formulas):
        return
    for op, formula in _formulas.items():
        if op not in counter.flop_registry:
            counter.register_flop_formula(op)(formula)
    for mode in _get_current_dispatch_mode_stack():
        running = getattr(mode, "counter", mode)
        if isinstance(running, counter.FlopCounterMode):
            running.flop_registry.update({op: counter.flop_registry[op] for op in _formulas})
