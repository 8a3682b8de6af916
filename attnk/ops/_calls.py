"""How an operation calls its implementation: past the dispatcher where that is safe, on the right device."""

import contextlib

import torch


def autocast_is_on(x: torch.Tensor) -> bool:
    """Whether autocast is on for the device of x; the meta device knows none, and asking for it raises."""
    device_type = x.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


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
    autocast = autocast_is_on(x)
    if not autocast and (not x.is_cuda or x.device.index == torch.cuda.current_device()):
        return _NOTHING
    stack = contextlib.ExitStack()
    if autocast:
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
    if x.is_cuda:
        stack.enter_context(torch.cuda.device(x.device))
    return stack
