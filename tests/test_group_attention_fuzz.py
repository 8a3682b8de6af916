"""Group attention on whatever hypothesis draws: maps, dtype, layouts in memory, windows, extras, wanted gradients."""

import contextlib
import math
from typing import Any

import pytest
import torch
from group_inputs import BOTH, LAYOUTS, arranged, definition, draw, fused, runs_of_groups, tokens_of

from attnk import dispatch
from attnk.testing import Meter, assert_matches_reference

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
PAIR = st.tuples(st.integers(1, 4), st.integers(1, 4))

CASES = st.fixed_dictionaries(
    {
        "layout": st.sampled_from(("row", "column", "window", "window", "sum", "criss_cross")),
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 2),
        "size": st.tuples(st.sampled_from((1, 2, 3, 5, 7)), st.sampled_from((1, 2, 4, 6))),
        "dims": st.tuples(st.sampled_from((3, 8, 16, 17)), st.sampled_from((3, 8, 16, 24))),
        "dtype": st.sampled_from(sorted(DTYPES)),
        "order": st.sampled_from([order for order in LAYOUTS if order != "expanded"]),
        "dout_order": st.sampled_from(LAYOUTS),
        "window": PAIR,
        "dilation": PAIR,
        "shift": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
        "mask_value": st.sampled_from((-math.inf, -100)),
        "span": st.none() | st.integers(0, 4),
        "extra": st.sampled_from(("", "table", "bias")),
        "scale": st.sampled_from((None, 0.3, -0.2)),
        "grads": st.sets(st.sampled_from(("q", "k", "v", "bias", "table", "column_table"))).map(sorted),
        "programs": st.sampled_from((1, 10**6)),
        "seed": st.integers(0, 99),
    }
)


def try_case(case: dict[str, Any], backend: str, device: str) -> None:
    """Draw the tensors of a case and compare with the definition."""
    hypothesis.note(f"try_case({case!r}, {backend!r}, {device!r})")
    torch.manual_seed(case["seed"])
    layout, options = case["layout"], {"scale": case["scale"]}
    if layout == "window":
        reach = [part * step for part, step in zip(case["window"], case["dilation"], strict=True)]
        shift = tuple(int(share * part) for share, part in zip(case["shift"], reach, strict=True))
        options |= {name: case[name] for name in ("window", "dilation", "mask_value")} | {"shift": shift}
    else:
        options["span"] = case["span"]
    extra = "" if case["extra"] == "bias" and layout in BOTH else case["extra"]
    inputs = draw(
        layout, case["size"], *case["dims"], DTYPES[case["dtype"]], device, batch=case["batch"], heads=case["heads"],
        extra=extra, order=case["order"], window=case["window"],
    )  # fmt: skip
    # of one key alone, what all but v get is nothing but rounding
    tokens = min(math.prod(window) for window in tokens_of(layout, case["size"], options).values())
    lonely = tokens == 1 or min(case["size"]) == 1 or options.get("span") == 0 or layout == "window"
    grads = [name for name in case["grads"] if name in inputs and (name == "v" or not lonely)]
    if layout == "window" and case["dtype"] == "float64":
        grads = [name for name in case["grads"] if name in inputs]
    dout = arranged(torch.randn_like(inputs["v"]), case["dout_order"])
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            stack.enter_context(runs_of_groups(case["programs"]))
        if backend == "triton" and dispatch.INTERPRETED:
            stack.enter_context(Meter())
        assert_matches_reference(
            fused(backend, layout, **options), definition(layout, **options), inputs, grads=grads, dout=dout
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


@profile(12)
@given(case=CASES)
def test_fuzz_triton(device, case):
    pytest.importorskip("triton")
    try_case(case, "triton", device)


@profile(60)
@given(case=CASES)
def test_fuzz_torch(device, case):
    try_case(case, "torch", device)
