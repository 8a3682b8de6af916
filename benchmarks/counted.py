"""What is counted rather than measured: bytes moved by kernels and operators, and the peak of allocated memory.

Every count takes caches as perfect inside one kernel or operator: an address it reads counts once, one it writes once
more. Run as a script it counts the project's kernels in the Triton interpreter, which a process must ask for before it
imports Triton; ``meter`` starts that process.
"""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from typing import Any
from unittest import mock

import torch
from harness import Case, Provider
from torch.utils._python_dispatch import TorchDispatchMode

Bytes = dict[str, int]  # by pass: "forward", "backward"


def meter(case: Case) -> dict[str, Bytes]:
    """Bytes of attnk's kernels for a case, by variant: what ``case.metered()`` says in the interpreter."""
    what = [type(case).__module__, type(case).__name__, json.dumps(dataclasses.asdict(case))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, *what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the meter failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _metered(module: str, name: str, fields: str) -> dict[str, Bytes]:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(fields).items()}
    return getattr(importlib.import_module(module), name)(**values).metered()


class Trace(TorchDispatchMode):
    """Sums the bytes that eager operators read and write.

    A tensor counts with the addresses it has (an expanded one with those of its source), views and allocations count
    nothing, and a scatter touches the places that its index names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name in ("detach", "_unsafe_view") or name.startswith(("empty", "new_empty")):
            return out
        if name in ("scatter", "scatter_"):  # autograd's into zeros, in place unless a dispatch mode watches
            index, source = args[2:4]
            self.bytes += _addresses(index) + _addresses(source) + index.numel() * args[0].element_size()
            return out
        written = {argument.name for argument in func._schema.arguments if argument.is_out}
        if name in ("copy_", "fill_", "zero_", "new_zeros", "zeros_like", "ones_like"):
            written.add("self")  # or not touched at all
        self.bytes += _addresses(out)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.name not in written:
                self.bytes += _addresses(value)
        self.bytes += sum(_addresses(value) for key, value in kwargs.items() if key not in written)
        return out


def _addresses(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        sizes = [size for size, stride in zip(value.shape, value.stride(), strict=True) if stride]
        return value.element_size() * math.prod(sizes) if value.numel() else 0
    if isinstance(value, list | tuple):
        return sum(_addresses(part) for part in value)
    return 0


def traced(provider: Provider, inputs: tuple[torch.Tensor, ...], dout: torch.Tensor) -> Bytes:
    """Bytes of the operators that a provider runs in eager mode."""
    with Trace() as forward:
        provider.infer(inputs)
    out = provider.forward(inputs)
    with Trace() as backward:
        provider.backward(out, inputs, dout)
    return {"forward": forward.bytes, "backward": backward.bytes}


def compiled(case: Case) -> Bytes:
    """Bytes of the code that torch.compile generates for a case, as Inductor counts them for its own metrics.

    The forward is that of inference. On the CPU the generated code is C++, whose fusions differ here and there from
    those of the Triton code that a GPU gets.

    Raises:
        AttributeError: a torch whose Inductor does not count so.
    """
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    graphs: list[int] = []
    compile_to_module = GraphLowering.compile_to_module

    def counting(graph: Any) -> Any:
        module = compile_to_module(graph)
        graphs.append(graph.count_bytes()[0])
        return module

    inputs, dout = case.inputs()
    with mock.patch.object(GraphLowering, "compile_to_module", counting), config.patch(force_disable_caches=True):
        provider = case.providers()["torch.compile"]
        provider.infer(inputs)
        inference = graphs.copy()
        provider.backward(provider.forward(inputs), inputs, dout)
    torch._dynamo.reset()
    if len(inference) != 1 or len(graphs) != 3:
        raise AttributeError(f"Inductor compiled {len(graphs)} graphs where one for each pass was expected")
    return {"forward": inference[0], "backward": graphs[-1]}


def peak_memory(timed: Any, device: str) -> int:
    """Bytes allocated at once during a call, above those allocated before it; what it returns is among them."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = timed()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def kept_memory(provider: Provider, inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes that a forward keeps for the backward, but for the inputs, the parameters and the output."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.detach())  # a reference would be freed and its address used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = provider.forward(inputs)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    for tensor in (*inputs, *provider.parameters, out):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


if __name__ == "__main__":
    print(json.dumps(_metered(*sys.argv[1:])))
