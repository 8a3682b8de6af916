"""The whole backend policy: which implementation of an operation runs, and the words that say why."""

import contextlib
import importlib.util
import os
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

BACKENDS = ("auto", "triton", "torch", "reference")


class Unsupported(RuntimeError):
    """The Triton backend was asked for by name and cannot run this call; the message says why."""


@dataclass(frozen=True)
class Explanation:
    """What ``attnk.explain`` found.

    Attributes:
        op: the operation.
        backend: the backend that would run: "triton", "torch" or "reference".
        reason: why that one.
        config: the kernel configuration, or None where no kernel of attnk runs.
    """

    op: str
    backend: str
    reason: str
    config: Any = None

    def __str__(self) -> str:
        config = "" if self.config is None else f"\n  configuration: {self.config}"
        return f"{self.op}: {self.backend}\n  reason: {self.reason}{config}"


def check_backend(backend: str) -> str:
    """The backend itself, or a ValueError that names the choices."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


_ambient = os.environ.get("ATTNK_BACKEND") or "auto"
if _ambient not in BACKENDS:
    raise ValueError(f"ATTNK_BACKEND must be one of {', '.join(BACKENDS)}, got {_ambient!r}")
_warned: set[tuple[str, str]] = set()

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Choose the backend of every call inside that does not name one itself.

    The choice holds for the whole process, not for one thread: torch.compile can then guard on it. Threads that want
    different backends name them in the call. Outside any such block the environment variable ``ATTNK_BACKEND``, read
    at import, decides.

    Args:
        backend: "auto", "triton" (raises ``attnk.Unsupported`` where it cannot run), "torch" or "reference".

    Raises:
        ValueError: an unknown backend.
    """
    global _ambient
    outer, _ambient = _ambient, check_backend(backend)
    try:
        yield
    finally:
        _ambient = outer


_capability = cache(torch.cuda.get_device_capability)


def no_kernel_here(x: torch.Tensor) -> str | None:
    """Why no kernel of attnk can run on the device of x, or None where they can."""
    if not HAS_TRITON:
        return "triton is not installed (pip install attnk[triton])"
    if x.device.type == "cpu":
        return None if INTERPRETED else "x lies on the CPU, and Triton kernels need a GPU"
    if x.device.type != "cuda":
        return f"no kernel for devices of type {x.device.type!r}"
    if torch.version.hip is None and torch.cuda.is_available():
        # Dynamo warns of caches
        capability = torch.cuda.get_device_capability if torch.compiler.is_compiling() else _capability
        if capability(x.device) < (8, 0):
            return "the kernels need compute capability 8.0 (Ampere) or later"
    return None


def choose(
    op: str,
    backend: str | None,
    x: torch.Tensor,
    unsupported: Callable[..., str | None],
    *args: Any,
    warn: bool = True,
) -> tuple[str, str]:
    """Settle on a backend.

    Args:
        op: name of the operation.
        backend: what the call asked for; None for the ambient choice.
        x: the tensor whose device counts. On the CPU "auto" means "torch" even while the interpreter is on.
        unsupported: the operation's predicate: why Triton cannot run ``(x, *args)``, or None when it can.
        args: what the predicate takes besides x.
        warn: whether to say, once for each reason, that a call on a GPU runs in plain PyTorch; to the caller's caller.

    Returns:
        "triton", "torch" or "reference", and why.

    Raises:
        Unsupported: "triton" was asked for and cannot run.
        ValueError: an unknown backend.
    """
    wanted = _ambient if backend is None else check_backend(backend)
    if wanted in ("torch", "reference"):
        return wanted, "asked for"
    if wanted == "auto" and x.device.type in ("cpu", "meta"):
        return "torch", "x lies on the CPU" if x.device.type == "cpu" else "x lies on the meta device"
    reason = unsupported(x, *args)
    if reason is None:
        return "triton", "asked for" if wanted == "triton" else "the kernels support this call"
    if wanted == "triton":
        raise Unsupported(f"{op}: {reason}")
    if warn and not torch.compiler.is_compiling() and (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(f"attnk.{op} runs in plain PyTorch: {reason}", stacklevel=3)
    return "torch", reason


def operations() -> list[str]:
    """The names ``explain`` takes: one module of ``attnk.ops`` each."""
    from attnk import ops

    return sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if not module.name.startswith("_"))


def explain(op: str, *tensors: torch.Tensor, **options: Any) -> Explanation:
    """Say which backend a call would use, with which configuration, and why. Nothing is computed.

    Args:
        op: name of the operation, as in ``attnk.<op>``.
        tensors, options: what one would call it with.

    Returns:
        An ``Explanation``; printed, it reads as three lines.

    Raises:
        ValueError: an unknown operation, or whatever the call itself would raise.
    """
    if op not in operations():
        raise ValueError(f"op must be one of {', '.join(map(repr, operations()))}, got {op!r}")
    return importlib.import_module(f"attnk.ops.{op}").explain(*tensors, **options)
