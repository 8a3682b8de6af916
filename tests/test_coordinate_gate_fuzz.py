"""The coordinate gate on whatever hypothesis draws: dtype, shape, layout, block sizes, wanted gradients."""

import contextlib
import functools
from typing import Any
from unittest import mock

import pytest
import torch

import attnk
from attnk import dispatch
from attnk.reference.coordinate_gate import coordinate_gate_reference, coordinate_pool_reference
from attnk.testing import Meter, assert_matches_reference, layouts

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

LAYOUTS = [name for name, _ in layouts(torch.zeros(1, 1, 1, 1))]
SIZES = st.sampled_from((0, 1, 1, 2, 3, 4, 5, 7, 11))
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}

CASES = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(0, 2), st.sampled_from((1, 2, 3, 4, 5, 8)), SIZES, SIZES),
        "dtype": st.sampled_from(sorted(DTYPES)),
        "layout": st.sampled_from(LAYOUTS),
        "dout_layout": st.sampled_from(LAYOUTS),
        "grads": st.sets(st.sampled_from(("x", "gate_h", "gate_w"))).map(sorted),
        "pooled": st.booleans(),
        "blocks": st.fixed_dictionaries(
            {
                "tile": st.sampled_from((8, 16, 64, 256)),
                "block_c": st.sampled_from((1, 2, 8)),
                "slab": st.sampled_from((1, 3, 64)),
            }
        ),
        "elements": st.sampled_from((7, 50, 2**18)),
        "seed": st.integers(0, 99),
    }
)


def attend(pool: Any, gate: Any, x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor) -> torch.Tensor:
    pooled, height, width = pool(x)
    return gate(pooled, gate_h * torch.sigmoid(height), gate_w * torch.sigmoid(width))


def try_case(case: dict[str, Any], backend: str, device: str) -> None:
    """Draw the tensors of a case and compare with the definition."""
    hypothesis.note(f"try_case({case!r}, {backend!r}, {device!r})")
    torch.manual_seed(case["seed"])
    dtype, shape = DTYPES[case["dtype"]], case["shape"]
    x = dict(layouts(torch.randn(shape, dtype=torch.float64).to(device, dtype)))[case["layout"]]
    dout = dict(layouts(torch.randn(shape).to(device, dtype)))[case["dout_layout"]]
    memory_format = torch.channels_last if x.stride(1) < x.stride(3) else torch.contiguous_format
    gate_h, gate_w = (
        torch.randn(part.shape, dtype=torch.float64).to(device, dtype).contiguous(memory_format=memory_format)
        for part in (x.new_empty(*shape[:3], 1), x.new_empty(*shape[:2], 1, shape[3]))
    )

    def pool(x: torch.Tensor) -> tuple:
        pooled = attnk.coordinate_pool(x, backend=backend)
        return pooled, pooled.height, pooled.width

    function: Any = functools.partial(attnk.coordinate_gate, backend=backend)
    reference: Any = coordinate_gate_reference
    if case["pooled"]:
        function = functools.partial(attend, pool, function)
        reference = functools.partial(attend, lambda x: (x, *coordinate_pool_reference(x)), reference)
    with contextlib.ExitStack() as stack:
        for name in ("SMALL_ELEMENTS", "TILE_ELEMENTS"):
            stack.enter_context(mock.patch(f"attnk.fallback.coordinate_gate.{name}", case["elements"]))
        if backend == "triton":
            from attnk.kernels import coordinate_gate as kernels

            config = kernels.CoordinateGateConfig(**case["blocks"], num_warps=4)
            stack.enter_context(mock.patch.object(kernels, "coordinate_gate_config", return_value=config))
            if dispatch.INTERPRETED:
                stack.enter_context(Meter())
        assert_matches_reference(
            function, reference, {"x": x, "gate_h": gate_h, "gate_w": gate_w}, grads=case["grads"], dout=dout
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
