"""A meter for kernels run by the Triton interpreter: bytes, stray pointers, races, 32-bit overflow.

It wraps private methods of the interpreter, seen working on triton 3.2 and 3.7; ``tests/test_meter.py`` tells when a
release breaks it.
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from attnk import dispatch


@dataclasses.dataclass
class KernelBytes:
    """What one launch moved.

    Attributes:
        kernel: the kernel's name.
        loaded, stored: bytes that must move if caches are perfect inside a launch: every address once.
        load_lanes, store_lanes: bytes as issued, every lane of every load and store.
        atomics: bytes touched by atomic operations, as issued.
    """

    kernel: str
    loaded: int = 0
    stored: int = 0
    load_lanes: int = 0
    store_lanes: int = 0
    atomics: int = 0


class Meter:
    """Count and check every kernel launched inside the block; needs ``TRITON_INTERPRET=1`` before triton is imported.

    A launch fails with IndexError when a lane that is not masked points outside the tensors the kernel was given, with
    RuntimeError when two programs store to one address, and with an AssertionError when 32-bit integer arithmetic
    overflows. (Triton wraps the first and the last in its InterpreterError.)

    Example:
        >>> with Meter() as meter:
        ...     attnk.spatial_gate(x, weight, backend="triton")
        >>> meter.bytes, [launch.kernel for launch in meter.launches]
    """

    def __init__(self) -> None:
        self.launches: list[KernelBytes] = []
        self._ranges: list[tuple[int, int]] = []
        self._loads: dict[int, list[np.ndarray]] = {}  # by item size
        self._stores: dict[int, list[np.ndarray]] = {}
        self._program_stores: dict[int, list[np.ndarray]] = {}

    @property
    def bytes(self) -> int:
        """Bytes loaded and stored by all launches, every address once a launch."""
        return sum(launch.loaded + launch.stored for launch in self.launches)

    def __enter__(self) -> "Meter":
        if not dispatch.INTERPRETED:
            raise RuntimeError("Meter needs Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported")
        from triton.runtime import interpreter

        builder = interpreter.InterpreterBuilder
        executor = interpreter.GridExecutor
        self._originals = {
            (builder, "create_masked_load"): builder.create_masked_load,
            (builder, "create_masked_store"): builder.create_masked_store,
            (builder, "create_atomic_rmw"): builder.create_atomic_rmw,
            (builder, "set_grid_idx"): builder.set_grid_idx,
            (executor, "__call__"): executor.__call__,
        }
        load, store, atomic, set_grid_idx, call = self._originals.values()
        item_size = lambda ptrs: interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize  # noqa: E731

        def metered_load(self_: Any, ptrs: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            self._count(ptrs, mask, item_size(ptrs), "load")
            return load(self_, ptrs, mask, *args, **kwargs)

        def metered_store(self_: Any, ptrs: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            self._count(ptrs, mask, item_size(ptrs), "store")
            return store(self_, ptrs, value, mask, *args, **kwargs)

        def metered_atomic(self_: Any, op: Any, ptr: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            self._count(ptr, mask, item_size(ptr), "atomic")
            return atomic(self_, op, ptr, value, mask, *args, **kwargs)

        def next_program(self_: Any, *index: int) -> None:
            self._end_program()
            set_grid_idx(self_, *index)

        def metered_call(self_: Any, *args: Any, **kwargs: Any) -> Any:
            storages = [arg.untyped_storage() for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)]
            self._ranges = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
            self.launches.append(KernelBytes(self_.fn.__name__))
            options = interpreter.interpreter_builder.options
            interpreter.interpreter_builder.options = dataclasses.replace(options, debug=True)  # checks overflow
            try:
                result = call(self_, *args, **kwargs)
                self._end_launch()
                return result
            finally:
                interpreter.interpreter_builder.options = options
                for addresses in (self._loads, self._stores, self._program_stores):
                    addresses.clear()

        wrappers = (metered_load, metered_store, metered_atomic, next_program, metered_call)
        for (owner, name), wrapper in zip(self._originals, wrappers, strict=True):
            setattr(owner, name, wrapper)
        return self

    def __exit__(self, *exception: object) -> None:
        for (owner, name), original in self._originals.items():
            setattr(owner, name, original)

    def _count(self, ptrs: Any, mask: Any, size: int, kind: str) -> None:
        addresses = ptrs.data.astype(np.int64).ravel()[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool).ravel()]
        launch = self.launches[-1]
        inside = np.zeros(addresses.shape, bool)
        for start, end in self._ranges:
            inside |= (addresses >= start) & (addresses + size <= end)
        if not inside.all():
            raise IndexError(f"{launch.kernel}: {kind} of {(~inside).sum()} lanes outside the tensors it was given")
        if kind == "load":
            launch.load_lanes += addresses.size * size
            self._loads.setdefault(size, []).append(np.unique(addresses))
        elif kind == "store":
            launch.store_lanes += addresses.size * size
            self._program_stores.setdefault(size, []).append(addresses)
        else:
            launch.atomics += addresses.size * size

    def _end_program(self) -> None:
        for size, parts in self._program_stores.items():
            self._stores.setdefault(size, []).append(np.unique(np.concatenate(parts)))
        self._program_stores.clear()

    def _end_launch(self) -> None:
        self._end_program()
        launch = self.launches[-1]
        launch.loaded = sum(size * np.unique(np.concatenate(parts)).size for size, parts in self._loads.items())
        for size, parts in self._stores.items():
            addresses, programs = np.unique(np.concatenate(parts), return_counts=True)
            launch.stored += size * addresses.size
            if (programs > 1).any():
                raise RuntimeError(f"{launch.kernel}: {(programs > 1).sum()} addresses stored to by two programs")
