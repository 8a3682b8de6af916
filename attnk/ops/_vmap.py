"""How ``torch.vmap`` maps an operation's Functions: folded into the batch, or one example after another."""

from collections.abc import Collection
from typing import Any

import torch

Mapped = tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]


def each_example(function: Any, size: int, in_dims: tuple, args: tuple) -> Mapped:
    """Apply a Function to one example after another and stack what it returns."""
    in_dims = tuple(dim if isinstance(dim, int) else None for dim in in_dims)  # of a list it is a list
    moved = [arg if dim is None else arg.movedim(dim, 0) for arg, dim in zip(args, in_dims, strict=True)]
    calls = [
        function.apply(*(arg if dim is None else arg[i] for arg, dim in zip(moved, in_dims, strict=True)))
        for i in range(size)
    ]
    return tuple(torch.stack(outs) for outs in zip(*calls, strict=True)), (0,) * len(calls[0])


def fold_examples(function: Any, size: int, in_dims: tuple, args: tuple, batched: Collection[int]) -> Mapped:
    """Apply a Function once, with the mapped dimension folded into the batch of the arguments at these positions.

    All other arguments must not be mapped. Tensors of one dimension are placeholders and have no batch.
    """
    folded = list(args)
    for i in batched:
        arg, dim = args[i], in_dims[i]
        if arg is not None and (dim is not None or arg.dim() > 1):
            folded[i] = (arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)).flatten(0, 1)
    outs = function.apply(*folded)
    dims = tuple(0 if out.dim() > 1 else None for out in outs)
    return tuple(
        out if dim is None else out.unflatten(0, (size, -1)) for out, dim in zip(outs, dims, strict=True)
    ), dims
