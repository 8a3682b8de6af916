"""Softmax attention on whatever hypothesis draws: sizes, dtype, layouts, extras, block sizes, wanted gradients."""

import contextlib
import math
from typing import Any

import pytest
import torch
from attention_inputs import LAYOUTS, SEED, arranged, cut, definition, draw, fused, kept

from attnk import dispatch
from attnk.testing import Meter, assert_matches_reference

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
TOKENS = st.sampled_from((0, 1, 3, 5, 7, 8, 13, 16, 17, 23, 33))
DIMS = st.sampled_from((3, 5, 8, 13, 16, 17, 24, 40))
KEPT_AXES = st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans())
BLOCKS = st.sampled_from((16, 32))

CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(0, 2),
        "key_heads": st.integers(1, 2),
        "group": st.integers(1, 2),
        "tokens": st.tuples(TOKENS, TOKENS),
        "grid": st.none() | st.tuples(st.integers(1, 4), st.integers(1, 5)),
        "dims": st.tuples(DIMS, DIMS),
        "dtype": st.sampled_from(sorted(DTYPES)),
        "layouts": st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
        "bias": st.none() | KEPT_AXES,
        "mask": st.none() | KEPT_AXES,
        "is_causal": st.booleans(),
        "dropout_p": st.sampled_from((0.0, 0.0, 0.3, 1.0)),
        "scale": st.sampled_from((None, None, 0.0, 0.3, -0.2)),
        "grads": st.sets(st.sampled_from(("q", "k", "v", "bias", "bias_table"))).map(sorted),
        "blocks": st.tuples(BLOCKS, BLOCKS, st.sampled_from((1, 100, 10**4))),
        "seed": st.integers(0, 99),
    }
)


def try_case(case: dict[str, Any], backend: str, device: str) -> None:
    """Draw the tensors of a case and compare with the definition."""
    hypothesis.note(f"try_case({case!r}, {backend!r}, {device!r})")
    torch.manual_seed(case["seed"])
    grid, heads = case["grid"], case["key_heads"] * case["group"]
    n_queries, n_keys = case["tokens"] if grid is None else (math.prod(grid),) * 2
    sizes = (case["batch"], heads, n_queries, n_keys)
    bias, mask = (
        extra and tuple(size if kept else 1 for size, kept in zip(sizes, extra, strict=True))
        for extra in (case["bias"], case["mask"])
    )
    *layouts, dout_layout = case["layouts"]
    inputs = draw(
        (n_queries, n_keys), *case["dims"], DTYPES[case["dtype"]], device,
        batch=case["batch"], heads=heads, key_heads=case["key_heads"], bias=bias, grid=grid, layouts=tuple(layouts),
    )  # fmt: skip
    options = {name: case[name] for name in ("is_causal", "scale", "dropout_p")}
    options |= {"grid": grid, "seed": SEED, "enable_gqa": True, "returns": "both"}
    options["mask"] = None if mask is None else (torch.rand(mask) < 0.7).to(device)
    dtype = torch.promote_types(DTYPES[case["dtype"]], torch.float32)
    dout = arranged(torch.randn(*sizes[:3], case["dims"][1] + 1, dtype=dtype, device=device), dout_layout)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cut(backend, *case["blocks"]))
        if backend == "triton" and dispatch.INTERPRETED:
            stack.enter_context(Meter())
        keep = kept(backend, inputs, **options)
        assert_matches_reference(
            fused(backend, **options),
            definition(keep=keep, **options),
            inputs,
            grads=[name for name in case["grads"] if name in inputs and 0 not in sizes],
            dout=dout,
        )


def profile(examples: int) -> Any:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@profile(30)
@given(case=CASES)
def test_fuzz_triton(device, case):
    pytest.importorskip("triton")
    try_case(case, "triton", device)


@profile(100)
@given(case=CASES)
def test_fuzz_torch(device, case):
    try_case(case, "torch", device)
