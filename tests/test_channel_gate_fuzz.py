"""The channel gate on whatever hypothesis draws: dtype, shape, layout, options, block sizes, wanted gradients."""

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch

import attnk
from attnk import dispatch
from attnk.reference.channel_gate import channel_gate_reference
from attnk.testing import Meter, assert_matches_reference, layouts

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

LAYOUTS = [name for name, _ in layouts(torch.zeros(1, 1, 1, 1))]
SIZES = st.sampled_from((0, 1, 1, 2, 3, 4, 5, 7, 11))
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
NAMES = ("x", "w1", "b1", "w2", "b2")

CASES = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(0, 3), st.sampled_from((1, 2, 3, 4, 5, 7, 8, 13)), SIZES, SIZES),
        "hidden": st.sampled_from((1, 2, 5)),
        "dtype": st.sampled_from(sorted(DTYPES)),
        "layout": st.sampled_from(LAYOUTS),
        "dout_layout": st.sampled_from(LAYOUTS),
        "rounded": st.booleans(),
        "bias": st.booleans(),
        "grads": st.sets(st.sampled_from(NAMES)).map(sorted),
        "options": st.fixed_dictionaries(
            {
                "pool": st.sampled_from(("avg", "max", "avg_max", "half_sum")),
                "gate": st.sampled_from(("sigmoid", "hard_sigmoid")),
                "ties": st.sampled_from(("first", "even")),
            }
        ),
        "blocks": st.fixed_dictionaries(
            {
                "block_p": st.sampled_from((1, 2, 8, 32)),
                "block_c": st.sampled_from((1, 4, 8)),
                "num_stages": st.sampled_from((1, 2, 4)),
            }
        ),
        "programs": st.sampled_from((1, 4, 100)),
        "tile": st.sampled_from((1, 20, 2**18)),
        "seed": st.integers(0, 99),
    }
)


def try_case(case: dict[str, Any], backend: str, device: str) -> None:
    """Draw the tensors of a case and compare with the definition."""
    hypothesis.note(f"try_case({case!r}, {backend!r}, {device!r})")
    torch.manual_seed(case["seed"])
    dtype, hidden, options = DTYPES[case["dtype"]], case["hidden"], case["options"]
    channels = case["shape"][1]
    x = torch.randn(case["shape"], dtype=torch.float64)
    inputs = {
        "x": dict(layouts((x.round() if case["rounded"] else x).to(device, dtype)))[case["layout"]],
        "w1": torch.randn(hidden, channels).to(device, dtype),
        "b1": torch.randn(hidden).to(device, dtype) if case["bias"] else None,
        "w2": torch.randn(channels, hidden).to(device, dtype),
        "b2": torch.randn(channels).to(device, dtype) if case["bias"] else None,
    }
    dout = dict(layouts(torch.randn(case["shape"]).to(device, dtype)))[case["dout_layout"]]
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            from attnk.kernels.channel_gate import common as kernels

            config = kernels.ChannelGateConfig(**case["blocks"], num_warps=4)
            stack.enter_context(mock.patch.object(kernels, "channel_gate_config", return_value=config))
            stack.enter_context(mock.patch.object(kernels, "CHANNEL_GATE_PROGRAMS", case["programs"]))
            stack.enter_context(mock.patch.object(kernels, "CHANNEL_GATE_SLAB_PIXELS", 1))
            if dispatch.INTERPRETED:
                stack.enter_context(Meter())
        elif case["tile"] < 2**18:
            stack.enter_context(mock.patch("attnk.fallback.channel_gate.SMALL_ELEMENTS", 0))
            stack.enter_context(mock.patch("attnk.fallback.channel_gate.TILE_ELEMENTS", case["tile"]))
        assert_matches_reference(
            lambda x, **named: attnk.channel_gate(x, (*named.values(),), backend=backend, **options),
            lambda x, **named: channel_gate_reference(x, (*named.values(),), **options),
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
