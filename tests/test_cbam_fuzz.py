"""CBAM on whatever hypothesis draws: dtype, shape, layout, options, block sizes, wanted gradients."""

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
from test_cbam import definition, draw, fused

from attnk import dispatch
from attnk.testing import Meter, assert_matches_reference, layouts

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

LAYOUTS = [name for name, _ in layouts(torch.zeros(1, 1, 1, 1))]
SIZES = st.sampled_from((0, 1, 2, 3, 5, 7))
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
NAMES = ("x", "w1", "b1", "w2", "b2", "weight", "bias", "norm_weight", "norm_bias")

CASES = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(0, 3), st.sampled_from((1, 2, 3, 5, 8, 13)), SIZES, SIZES),
        "kernel_size": st.sampled_from((1, 3, 5)),
        "dtype": st.sampled_from(sorted(DTYPES)),
        "layout": st.sampled_from(LAYOUTS),
        "dout_layout": st.sampled_from(LAYOUTS),
        "rounded": st.booleans(),
        "bias": st.booleans(),
        "grads": st.sets(st.sampled_from(NAMES)).map(sorted),
        "options": st.fixed_dictionaries(
            {
                "order": st.sampled_from(("avg_max", "max_avg")),
                "output": st.sampled_from(("gated", "map", "residual", "logit")),
                "pool": st.sampled_from(("avg_max", "avg", "max", "half_sum")),
                "ties": st.sampled_from(("first", "even")),
                "norm": st.sampled_from((None, "train")),
            }
        ),
        "blocks": st.fixed_dictionaries(
            {
                "block_p": st.sampled_from((2, 8, 32)),
                "block_c": st.sampled_from((1, 4, 8)),
                "num_stages": st.sampled_from((1, 2)),
            }
        ),
        "seed": st.integers(0, 99),
    }
)


def try_case(case: dict[str, Any], backend: str, device: str) -> None:
    """Draw the tensors of a case and compare with the definition."""
    hypothesis.note(f"try_case({case!r}, {backend!r}, {device!r})")
    torch.manual_seed(case["seed"])
    dtype, shape, options = DTYPES[case["dtype"]], case["shape"], case["options"]
    batch, channels, height, width = shape
    if options["norm"] == "train" and batch * height * width < 4:
        options = {**options, "norm": None}  # statistics of nothing, or of nearly equal numbers
    inputs = draw(
        shape, case["kernel_size"], dtype, device,
        bias=case["bias"], ties=case["rounded"], layout=case["layout"], norm=options["norm"],
    )  # fmt: skip
    channels = channels if options["output"] in ("gated", "residual") else 1
    dout = dict(layouts(torch.randn(batch, channels, height, width).to(device, dtype)))[case["dout_layout"]]
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            from attnk.kernels.cbam import common as kernels

            config = kernels.SpatialGateConfig(**case["blocks"], num_warps=4)
            stack.enter_context(mock.patch.object(kernels, "cbam_config", return_value=config))
            if dispatch.INTERPRETED:
                stack.enter_context(Meter())
        assert_matches_reference(
            fused(backend, **options),
            definition(**options),
            inputs,
            grads=[name for name in case["grads"] if inputs.get(name) is not None],
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


@profile(20)
@given(case=CASES)
def test_fuzz_triton(device, case):
    pytest.importorskip("triton")
    try_case(case, "triton", device)


@profile(80)
@given(case=CASES)
def test_fuzz_torch(device, case):
    try_case(case, "torch", device)
