"""Compile what a sweep tries next in many processes at once; the sweep then finds it in Triton's cache."""

import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import harness

Values = dict[str, Any]


class Compiler:
    """Processes that compile an operation's configurations and run none of them.

    Use as a context manager. Each process holds the inputs of one case on the device.
    """

    def __init__(self, processes: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")  # a fork could not use the device
        workers = processes or max(1, (os.cpu_count() or 2) - 1)
        self._pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, case: harness.Case, configurations: list[Values]) -> None:
        """Compile all kernels of a case with each of the configurations."""
        list(self._pool.map(compile_one, itertools.repeat(case), configurations))


def compile_one(case: harness.Case, values: Values) -> None:
    """Compile the kernels of a case with a configuration, unless Triton has done so before."""
    from triton.runtime.errors import OutOfResources, PTXASError

    with without_launches(), contextlib.suppress(OutOfResources, PTXASError):  # the sweep meets them, too
        _tuning(case).results(values)


@functools.lru_cache(maxsize=1)
def _tuning(case: harness.Case) -> Any:
    return harness.cases_of(case.op).Tuning(case)


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Kernels inside the block are compiled, but not run: what they would write is not written."""
    from triton.runtime.jit import JITFunction

    original = JITFunction.run

    def warm_up(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return original(kernel, *args, grid=grid, warmup=True, **kwargs)

    with mock.patch.object(JITFunction, "run", warm_up):
        yield
