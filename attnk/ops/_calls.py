"""How an operation calls its implementation: past the dispatcher where that is safe, on the right device."""

import contextlib

import torch


def is_plain(x: torch.Tensor) -> bool:
    """Whether nothing watches or replaces operators, so that an implementation may be called without the dispatcher.

    The dispatcher costs some 10 us a call from Python and back.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return type(x) is torch.Tensor and torch._C._len_torch_dispatch_stack() == 0


_NOTHING = contextlib.nullcontext()


def implementation_scope(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Where an implementation runs: on the device of x, and with autocast off, since it settles dtypes itself."""
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and not x.is_cuda:
        return _NOTHING
    stack = contextlib.ExitStack()
    if autocast:
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
    if x.is_cuda:
        stack.enter_context(torch.cuda.device(x.device))
    return stack
