"""The spatial gate on whatever hypothesis draws: dtype, shape, layout, options, block sizes, wanted gradients."""

import contextlib
import functools
from typing import Any
from unittest import mock

import pytest
import torch

import attnk
from attnk import dispatch
from attnk.reference.spatial_gate import spatial_gate_reference
from attnk.testing import Meter, assert_matches_reference, layouts

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

LAYOUTS = [name for name, _ in layouts(torch.zeros(1, 1, 1, 1))]
SIZES = st.sampled_from((0, 1, 1, 2, 3, 4, 5, 7, 11))
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}

CASES = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(0, 3), st.sampled_from((1, 2, 3, 4, 5, 7, 8, 13)), SIZES, SIZES),
        "kernel_size": st.sampled_from((1, 3, 5, 7)),
        "dtype": st.sampled_from(sorted(DTYPES)),
        "layout": st.sampled_from(LAYOUTS),
        "dout_layout": st.sampled_from(LAYOUTS),
        "rounded": st.booleans(),
        "bias": st.booleans(),
        "grads": st.sets(st.sampled_from(("x", "weight", "bias"))).map(sorted),
        "options": st.fixed_dictionaries(
            {
                "order": st.sampled_from(("avg_max", "max_avg")),
                "output": st.sampled_from(("gated", "residual", "map", "logit")),
                "ties": st.sampled_from(("first", "even")),
            }
        ),
        "blocks": st.fixed_dictionaries(
            {
                "block_p": st.sampled_from((1, 2, 8, 32)),
                "block_c": st.sampled_from((1, 4, 8)),
                "num_stages": st.sampled_from((1, 2, 4)),
                "lag": st.sampled_from((0, 0, 2, 20)),
            }
        ),
        "seed": st.integers(0, 99),
    }
)


def try_case(case: dict[str, Any], backend: str, device: str) -> None:
    """Draw the tensors of a case and compare with the definition."""
    hypothesis.note(f"try_case({case!r}, {backend!r}, {device!r})")
    torch.manual_seed(case["seed"])
    dtype = DTYPES[case["dtype"]]
    x = torch.randn(case["shape"], dtype=torch.float64)
    x = (x.round() if case["rounded"] else x).to(device, dtype)
    kernel_size, options = case["kernel_size"], case["options"]
    weight = torch.randn(1, 2, kernel_size, kernel_size, dtype=torch.float64) / kernel_size
    inputs = {
        "x": dict(layouts(x))[case["layout"]],
        "weight": weight.to(device, dtype),
        "bias": torch.randn(1, dtype=torch.float64).to(device, dtype) if case["bias"] else None,
    }
    channels = case["shape"][1] if options["output"] in ("gated", "residual") else 1
    batch, _, height, width = case["shape"]
    dout = dict(layouts(torch.randn(batch, channels, height, width).to(device, dtype)))[case["dout_layout"]]
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            from attnk.kernels.spatial_gate import common as kernels

            config = kernels.SpatialGateConfig(**case["blocks"], num_warps=4)
            stack.enter_context(mock.patch.object(kernels, "spatial_gate_config", return_value=config))
            if dispatch.INTERPRETED:
                stack.enter_context(Meter())
        assert_matches_reference(
            functools.partial(attnk.spatial_gate, backend=backend, **options),
            functools.partial(spatial_gate_reference, **options),
            inputs,
            grads=[name for name in case["grads"] if inputs[name] is not None],
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


@profile(60)
@given(case=CASES)
def test_fuzz_torch(device, case):
    try_case(case, "torch", device)
