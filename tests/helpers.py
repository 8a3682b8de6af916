"""What several test files need: few cases out of many combinations, equality of bits, vmap as a loop, a mark."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from attnk import dispatch

needs_interpreter = pytest.mark.skipif(not dispatch.INTERPRETED, reason="the meter needs TRITON_INTERPRET=1")


def pairwise(**axes: Any) -> list[Any]:
    """Few cases in which any two values of any two axes meet."""
    names = list(axes)
    values = [list(axis) for axis in axes.values()]
    missing = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(names)), 2)
        for a in range(len(values[i]))
        for b in range(len(values[j]))
    }
    chance = random.Random(0)
    cases = []
    while missing:
        anchor = min(missing)
        candidates = []
        for _ in range(60):
            case = [chance.randrange(len(axis)) for axis in values]
            for axis, value in anchor:
                case[axis] = value
            covered = missing & set(itertools.combinations(enumerate(case), 2))
            candidates.append((len(covered), case, covered))
        _, case, covered = max(candidates, key=lambda candidate: candidate[0])
        missing -= covered
        chosen = {name: axis[i] for name, axis, i in zip(names, values, case, strict=True)}
        cases.append(pytest.param(chosen, id="-".join(_word(value) for value in chosen.values())))
    return cases


def _word(value: Any) -> str:
    """A value in the name of a test, the same in every process."""
    return str(getattr(value, "__name__", value)).removeprefix("torch.")


def assert_same_bits(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


def one_by_one(in_dims: tuple[int | None, ...], function: Callable[..., torch.Tensor], *tensors: Any) -> torch.Tensor:
    """``torch.vmap`` as a loop."""
    size = next(tensor.shape[dim] for tensor, dim in zip(tensors, in_dims, strict=True) if dim is not None)
    return torch.stack(
        [
            function(*(t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)))
            for i in range(size)
        ]
    )
