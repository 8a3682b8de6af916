"""``attnk.axial_attention``, ``attnk.window_attention``: values, gradients, layouts, edges, behaviour in PyTorch."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from group_inputs import (
    BOTH,
    HEADS,
    KERNELS,
    LAYOUTS,
    ORDERS,
    SEED,
    arranged,
    check,
    definition,
    draw,
    fused,
    run,
    runs_of_groups,
    tokens_of,
)
from helpers import assert_same_bits, needs_interpreter, one_by_one, pairwise
from torch.utils import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import attnk
from attnk import dispatch
from attnk.groups import group_places
from attnk.ops import group_attention as operation
from attnk.reference.group_attention import group_attention_reference
from attnk.reference.softmax_attention import softmax_attention_reference
from attnk.testing import Meter, assert_matches_reference

DTYPES = (torch.float64, torch.float32, torch.float16)

CASES = {
    "row": ("row", {}),
    "column": ("column", {}),
    "row with span": ("row", {"span": 2}),
    "column with span": ("column", {"span": 1}),
    "sum": ("sum", {}),
    "criss_cross": ("criss_cross", {}),
    "criss_cross with span": ("criss_cross", {"span": 2}),
    "window": ("window", {"window": (3, 2)}),
    "shifted": ("window", {"window": (3, 3), "shift": (1, 2)}),
    "shifted by one axis": ("window", {"window": (2, 4), "shift": (0, 2), "mask_value": -100.0}),
    "as published": ("window", {"window": (3, 3), "shift": (1, 1), "mask_value": -100.0}),
    "dilated": ("window", {"window": (2, 3), "dilation": (3, 2)}),
    "dilated and shifted": ("window", {"window": (2, 2), "dilation": (2, 3), "shift": (3, 1)}),
}
with_case = pytest.mark.parametrize("case", CASES)
SHORT = ("row", "column with span", "sum", "criss_cross", "shifted")
with_short_case = pytest.mark.parametrize("case", SHORT)


# Values and gradients


@pytest.mark.parametrize(
    "case",
    pairwise(
        case=tuple(CASES),
        size=((5, 7), (6, 6), (13, 17), (1, 1), (9, 2)),
        dims=((8, None), (24, None), (40, 9), (3, 16)),
        dtype=DTYPES,
        extra=("", "table", "bias"),
        scale=(None, 0.3, -0.2),
        programs=(1, 10**6),
    ),
)
def test_matches_reference(backend, device, case):
    layout, options = CASES[case["case"]]
    if case["extra"] == "bias" and layout in BOTH:
        pytest.skip("a bias is for one axis")
    inputs = draw(layout, case["size"], *case["dims"], case["dtype"], device, extra=case["extra"], **options)
    # of one key alone, what q and k get is nothing but rounding
    seen = min(math.prod(window) for window in tokens_of(layout, case["size"], options).values())
    lonely = case["size"] == (1, 1) or seen == 1
    with runs_of_groups(case["programs"]) if backend == "triton" else contextlib.nullcontext():
        check(backend, layout, inputs, grads=("v",) if lonely else None, **options, scale=case["scale"])


@pytest.mark.parametrize("kept_tokens", [0, 64])
@pytest.mark.parametrize("case", ["row", "column with span", "window", "as published", "dilated and shifted"])
def test_short_groups_in_blocks(device, case, kept_tokens, monkeypatch):
    """Several blocks of groups, which cross from one kind of windows to the next; weights kept or not."""
    monkeypatch.setattr("attnk.fallback.softmax_attention.SHORT_BLOCK_ELEMENTS", 300)
    monkeypatch.setattr("attnk.fallback.group_attention.KEPT_TOKENS", kept_tokens)
    layout, options = CASES[case]
    inputs = draw(layout, (7, 9), 8, 6, torch.float64, device, batch=3, extra="table", order="packed", **options)
    check("torch", layout, inputs, **options)


def test_short_groups_with_hidden_keys(device):
    """A bias of -inf: rows of the map of which a query sees some keys, or none, whose output is 0."""
    inputs = draw("row", (3, 6), dtype=torch.float64, device=device, extra="bias")
    inputs["bias"][0, :, 2] = -math.inf
    inputs["bias"][1, 4] = -math.inf
    out = fused("torch", "row")(**inputs)
    assert (out[:, :, 4, 1] == 0).all()
    assert (out != 0).sum() == out.numel() - out[:, :, 4, 1].numel()
    check("torch", "row", inputs, grads=("q", "k", "v"))


@pytest.mark.parametrize("size", [(7, 7), (56, 56), (14, 200)], ids=str)
@pytest.mark.parametrize("layout", ["row", "column"])
def test_sizes_of_networks(device, layout, size):
    check("torch", layout, draw(layout, size, 8, device=device, batch=1, heads=1))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33, 64, 65, 127, 128])
@pytest.mark.parametrize("layout", ["row", "column"])
def test_token_counts(device, layout, tokens):
    pytest.importorskip(KERNELS)
    size = (2, tokens) if layout == "row" else (tokens, 2)
    inputs = draw(layout, size, 8, device=device, batch=1)
    check("triton", layout, inputs, grads=("v",) if tokens == 1 else None)


@pytest.mark.parametrize("dim", [8, 32, 59, 64, 72, 80, 96, 128])
def test_head_dimensions(backend, device, dim):
    check(backend, "row", draw("row", (2, 9), dim, device=device, batch=1))


@pytest.mark.parametrize(("layout", "size"), [("row", (2, 130)), ("column", (200, 2)), ("sum", (2, 130))])
def test_long_groups_are_streamed(backend, device, layout, size):
    check(backend, layout, draw(layout, size, 8, device=device, batch=1, extra="table" if backend == "torch" else ""))
    inputs = draw(layout, size, 8, device=device, batch=1)
    assert attnk.explain("group_attention", **inputs, layout=layout, backend="torch").backend == "torch"


@with_case
def test_streamed_is_resident(device, case, monkeypatch):
    """Every layout by the path of long groups."""
    pytest.importorskip(KERNELS)
    monkeypatch.setattr(operation, "_config", lambda *args: None)
    layout, options = CASES[case]
    extra = "table" if case in SHORT else ""
    inputs = draw(layout, (4, 5), dtype=torch.float64, device=device, batch=1, heads=1, extra=extra, **options)
    explanation = attnk.explain(
        "group_attention", *(inputs[name] for name in "qkv"), layout, **options, backend="triton"
    )
    assert explanation.backend == "triton"
    assert explanation.reason.endswith("go to softmax attention's kernels")
    with mock.patch(f"{KERNELS}.group_attention_forward", side_effect=AssertionError):
        check("triton", layout, inputs, **options)


def test_wide_heads_are_streamed(backend, device):
    check(backend, "window", draw("window", (4, 6), 130, device=device, batch=1, window=(2, 3)), window=(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@with_short_case
def test_half_precision_in_pytorch(device, case, dtype):
    layout, options = CASES[case]
    check("torch", layout, draw(layout, dtype=dtype, device=device, extra="table", **options), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [(14, 14), (56, 56), (28, 112)], ids=str)
@pytest.mark.parametrize("extra", ["", "table"])
@with_case
def test_on_a_gpu(case, extra, size, dtype):
    layout, options = CASES[case]
    inputs = draw(layout, size, 32, dtype=dtype, device="cuda", extra=extra, order="packed", **options)
    # weights by way of lse differ by more roundings than the definition's, which float32's sum of all groups shows
    by_lse = layout == "criss_cross" and dtype == torch.float32
    check("triton", layout, inputs, grads=("q", "k", "v") if by_lse else None, **options)


@pytest.mark.parametrize("window", [(1, 1), (1, 4), (4, 1)])
def test_windows_of_one_token(backend, device, window):
    inputs = draw("window", (4, 4), device=device, window=window)
    check(backend, "window", inputs, grads=("v",) if window == (1, 1) else None, window=window)


# The definition itself, against other words for it


def test_rows_of_the_transposed_map_are_columns():
    q, k, v = draw("row", dtype=torch.float64).values()
    rows = group_attention_reference(*(x.transpose(1, 2) for x in (q, k, v)), layout="row")
    torch.testing.assert_close(rows.transpose(1, 2), group_attention_reference(q, k, v, layout="column"))


def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None, **options: Any) -> torch.Tensor:
    """Attention of all pixels, by the definition of softmax attention."""
    flat = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    out, _ = softmax_attention_reference(*flat, None, mask, **options)
    return out.transpose(1, 2).unflatten(1, q.shape[1:3])


def test_a_window_of_the_whole_map_is_full_attention():
    inputs = draw("window", (4, 5), dtype=torch.float64, extra="table", window=(4, 5))
    out = definition("window", window=(4, 5))(**inputs)
    table = inputs.pop("table")
    torch.testing.assert_close(out, full_attention(**inputs, bias_table=table, grid=(4, 5)))


@pytest.mark.parametrize(
    ("layout", "seen"),
    [
        ("row", lambda y, x, down, right: down == 0),
        ("column", lambda y, x, down, right: right == 0),
        ("criss_cross", lambda y, x, down, right: (down == 0) | (right == 0)),
    ],
)
@pytest.mark.parametrize("span", [None, 0, 2])
def test_axes_are_masks(layout, seen, span):
    height, width = 5, 7
    inputs = draw(layout, (height, width), dtype=torch.float64)
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    down, right = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    mask = seen(y, x, down, right)
    mask = mask if span is None else mask & (down <= span) & (right <= span)
    out = definition(layout, span=span)(**inputs)
    torch.testing.assert_close(out, full_attention(**inputs, mask=mask))


def swin_attention(q, k, v, table, window, shift, mask_value=-100.0):
    """Pad, roll, partition, attend with the mask of regions, and back: torchvision's shifted_window_attention."""
    batch, height, width, heads, dim = q.shape
    rows, columns = window
    padded = [-(-height // rows) * rows, -(-width // columns) * columns]
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padded[1] - width, 0, padded[0] - height)) for x in (q, k, v))
    q, k, v = (x.roll((-shift[0], -shift[1]), (1, 2)) for x in (q, k, v))

    def partition(x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, padded[0] // rows, rows, padded[1] // columns, columns, *x.shape[3:]).transpose(2, 3)
        return x.flatten(0, 2).flatten(1, 2)

    q, k, v = (partition(x).transpose(1, 2) for x in (q, k, v))
    coordinates = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")).flatten(1)
    relative = (coordinates[:, :, None] - coordinates[:, None, :]).permute(1, 2, 0)
    index = (relative[..., 0] + rows - 1) * (2 * columns - 1) + relative[..., 1] + columns - 1
    logits = q * dim**-0.5 @ k.mT + table[index].permute(2, 0, 1)
    regions = torch.zeros(1, *padded, 1, dtype=q.dtype)
    count = 0
    for one in (slice(0, -rows), slice(-rows, -shift[0]), slice(-shift[0], None)):
        for other in (slice(0, -columns), slice(-columns, -shift[1]), slice(-shift[1], None)):
            regions[:, one, other] = count
            count += 1
    regions = partition(regions).squeeze(-1)
    apart = (regions[:, None] != regions[:, :, None])[:, None]
    logits = (logits.unflatten(0, (batch, -1)) + apart * mask_value).flatten(0, 1)
    out = logits.softmax(-1) @ v
    out = out.transpose(1, 2).view(batch, padded[0] // rows, padded[1] // columns, rows, columns, heads, -1)
    out = out.transpose(2, 3).reshape(batch, *padded, heads, -1).roll(tuple(shift), (1, 2))
    return out[:, :height, :width]


@pytest.mark.parametrize("size", [(8, 8), (12, 16)])
def test_windows_are_torchvisions(size):
    options = {"window": (4, 4), "shift": (2, 1), "mask_value": -100.0}
    inputs = draw("window", size, dtype=torch.float64, extra="table", **options)
    expected = swin_attention(**inputs, window=(4, 4), shift=(2, 1))
    torch.testing.assert_close(definition("window", **options)(**inputs), expected)


def test_windows_over_the_edge_are_masks():
    """In a padded, shifted map only neighbours that exist are seen."""
    inputs = draw("window", (7, 10), dtype=torch.float64, window=(4, 4))
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(7), torch.arange(10), indexing="ij"))
    row, column = (y - 2) % 8 // 4, (x - 1) % 12 // 4
    wrapped = ((y - 2) % 8 >= 6) * 2 + ((x - 1) % 12 >= 11)
    mask = (row[:, None] == row) & (column[:, None] == column) & (wrapped[:, None] == wrapped)
    out = definition("window", window=(4, 4), shift=(2, 1))(**inputs)
    torch.testing.assert_close(out, full_attention(**inputs, mask=mask))


def test_dilated_windows_are_maxvits_grid():
    inputs = draw("window", (6, 9), dtype=torch.float64)
    q, k, v = (
        x.unflatten(2, (3, 3)).unflatten(1, (2, 3)).permute(0, 2, 4, 5, 1, 3, 6).flatten(4, 5).flatten(0, 2)
        for x in inputs.values()
    )
    out = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
    out = out.unflatten(2, (2, 3)).unflatten(0, (2, 3, 3)).permute(0, 4, 1, 5, 2, 3, 6)
    expected = out.reshape(2, 6, 9, HEADS, -1)
    torch.testing.assert_close(definition("window", window=(2, 3), dilation=(3, 3))(**inputs), expected)


# The public functions


def test_axial_and_window_attention_are_group_attention(backend, device):
    inputs = draw("row", device=device)
    for axis, combine, layout in (("row", "sum", "row"), ("column", "sum", "column"), ("both", "sum", "sum"),
                                  ("both", "criss_cross", "criss_cross")):  # fmt: skip
        out = attnk.axial_attention(**inputs, axis=axis, combine=combine, span=3, backend=backend)
        assert torch.equal(out, fused(backend, layout, span=3)(**inputs))
    options = {"shift": (1, 1), "dilation": (2, 1), "mask_value": -100, "scale": 0.2}
    out = attnk.window_attention(**inputs, window=(2, 3), **options, backend=backend)
    assert torch.equal(out, fused(backend, "window", window=(2, 3), **options)(**inputs))


@with_short_case
def test_without_a_batch(backend, device, case):
    layout, options = CASES[case]
    inputs = draw(layout, device=device, extra="table", batch=1, **options)
    whole = run(backend, layout, inputs, **options)
    single = {name: tensor[0] if name in "qkv" else tensor for name, tensor in inputs.items()}
    results = run(backend, layout, single, **options)
    assert results[0].shape == whole[0].shape[1:]
    for one, other in zip(results, whole, strict=True):
        torch.testing.assert_close(one, other.view(one.shape))


@pytest.mark.parametrize("shape", [(1, 5, 5), (5, 5), (HEADS, 5, 5)])
def test_bias_of_every_shape(backend, device, shape):
    inputs = draw("column", dtype=torch.float64, device=device)
    inputs["bias"] = torch.randn(shape, dtype=torch.float64, device=device)
    check(backend, "column", inputs)


def test_one_table_of_two(backend, device):
    q, k, v, table, column_table = draw("sum", dtype=torch.float64, device=device, extra="table").values()
    for pair in ((table, None), (None, column_table)):
        ours = lambda q, k, v, t, pair=pair: attnk.axial_attention(  # noqa: E731
            q, k, v, "both", bias_table=tuple(None if one is None else t for one in pair), backend=backend
        )
        theirs = lambda q, k, v, t, pair=pair: group_attention_reference(  # noqa: E731
            q, k, v, None, *(None if one is None else t for one in pair), layout="sum"
        )
        one = table if pair[1] is None else column_table
        assert_matches_reference(ours, theirs, {"q": q, "k": k, "v": v, "t": one})


# Memory layouts


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("case", ["row", "criss_cross", "shifted"])
def test_layouts(backend, device, case, order):
    layout, options = CASES[case]
    inputs = draw(layout, (3, 4), dtype=torch.float64, device=device, order=order, **options)
    check(backend, layout, inputs, **options)
    out, *grads = run(backend, layout, inputs, **options)
    axes = ORDERS.get(order, ORDERS["channels_first"] if order == "packed_map" else ORDERS["contiguous"])
    for result in (out, *grads):
        if order != "expanded":
            assert result.permute(axes).is_contiguous(), result.stride()


@pytest.mark.parametrize("orders", [("contiguous", "channels_first", "packed"), ("step_2", "contiguous", "crop")])
def test_mixed_layouts(backend, device, orders):
    inputs = draw("row", device=device, dtype=torch.float64)
    for name, order in zip("qkv", orders, strict=True):
        inputs[name] = arranged(inputs[name], order)
    check(backend, "row", inputs)
    check(backend, "window", inputs, window=(2, 3), shift=(1, 0))


@pytest.mark.parametrize("order", ["contiguous", "channels_first", "step_2"])
@pytest.mark.parametrize("case", ["criss_cross", "dilated and shifted"])
def test_wide_offsets_are_narrow_ones(device, case, order):
    """What images of more than 2**31 elements take gives the same bits."""
    kernels = pytest.importorskip(KERNELS)
    layout, options = CASES[case]
    inputs = draw(layout, device=device, order=order, **options)
    results = []
    for wide in (False, True):
        with mock.patch.object(kernels.common.Call, "wide", return_value=wide), runs_of_groups():
            results.append(run("triton", layout, inputs, **options))
    assert_same_bits(*results)


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ((2**40, 2**23, 64, 32, 1), False),
        ((2**40, 2**24, 64, 32, 1), True),
        ((2**40, 64, 2**24, 32, 1), True),
        ((2**40, 64, 2**17, 2**17, 2**26), True),
    ],
)
def test_offsets_are_wide_where_one_image_is(strides, expected):
    """A tile may reach over 128 tokens, whatever the size of the map."""
    kernels = pytest.importorskip(KERNELS)
    q = torch.empty((2, 32, 32, 2, 32), device="meta")
    far = q.as_strided(q.shape, strides)
    none = (None,) * 4
    call = kernels.common.Call(q, q, q, *none, "column", (1, 1), (0, 0), (1, 1), -1, "-inf", 1.0, 0.0, None)
    assert not call.wide((q, q, q))
    assert call.wide((q, far, q)) == expected


def test_tensors_that_lie_alike():
    kernels = pytest.importorskip(KERNELS)
    one, other = [1, 2, 3, 4, 0], [1, 2, 3, 5, 0]
    assert kernels.common.alike(one * 4) == 3
    assert kernels.common.alike(one * 3 + other * 2) == 2
    assert kernels.common.alike(one * 4 + other) == 1
    assert kernels.common.alike(one + other + one * 2) == 0


@pytest.mark.parametrize("order", LAYOUTS)
def test_layouts_of_the_gradient(backend, device, order):
    inputs = draw("column", device=device, dtype=torch.float64)
    dout = arranged(torch.randn_like(inputs["v"]), order)
    check(backend, "column", inputs, dout=dout)


def test_packed_views_are_not_copied(backend, device):
    """Rows and columns of one projection's output, read where they lie: nothing of the size of q is allocated."""
    side = 112 if backend == "torch" else 48  # of short groups a copy is faster there
    qkv = torch.randn(1, side, side, 3, 4, 16, device=device)
    q, k, v = qkv.unbind(3)
    expected = 2 if backend == "torch" else 1  # PyTorch's attention gives rows and columns a tensor of their own
    for axis in ("row", "column"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            attnk.axial_attention(q, k, v, axis, backend=backend)
        sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert sum(size >= q.nbytes // 3 for size in sizes) <= expected


# Edges: empty, wrong, infinite, not a number


@pytest.mark.parametrize(
    "shape", [(0, 5, 7, 2, 8), (2, 0, 7, 2, 8), (2, 5, 0, 2, 8), (2, 5, 7, 0, 8), (0, 0, 0, 0, 8)], ids=str
)
@with_short_case
def test_empty(backend, device, case, shape):
    layout, options = CASES[case]
    leaves = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    out = attnk.group_attention(*leaves, layout, **options, backend=backend)
    assert out.shape == shape
    out.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


def test_empty_values(backend, device):
    q, k, v = (tensor.requires_grad_() for tensor in draw("row", device=device).values())
    out = attnk.axial_attention(q, k, v[..., :0], backend=backend)
    assert out.shape == (2, 5, 7, HEADS, 0)
    out.sum().backward()
    assert not q.grad.any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(5, 7, 8)}, ValueError, "q must be (B, height, width, heads, D) or (height, width, heads, D"),
        ({"q": 3}, TypeError, "q must be a tensor, got int"),
        ({"q": torch.zeros(2, 5, 7, 2, 8, dtype=torch.int32)}, TypeError, "q must be float16"),
        ({"k": torch.zeros(2, 5, 7, 2, 8, dtype=torch.float64)}, TypeError, "k must have the dtype of q"),
        ({"k": torch.zeros(2, 5, 7, 2, 9)}, ValueError, "k must have the shape of q, (2, 5, 7, 2, 8)"),
        ({"v": torch.zeros(2, 5, 8, 2, 8)}, ValueError, "v must have the map and heads of q"),
        ({"v": torch.zeros(2, 5, 7, 2, 8, device="meta")}, ValueError, "v must be on the device of q, cpu, got meta"),
        ({"layout": "rows"}, ValueError, "layout must be one of 'row', 'column', 'window', 'sum', 'criss_cross'"),
        ({"layout": "window"}, ValueError, "window must be two integers of at least 1, got None"),
        ({"layout": "window", "window": (3, 0)}, ValueError, "window must be two integers of at least 1, got (3,"),
        ({"layout": "window", "window": (3, 3), "shift": (3, 0)}, ValueError, "shift must be less than window x dila"),
        ({"layout": "window", "window": (3, 3), "shift": (-1, 0)}, ValueError, "shift must be two integers of at leas"),
        ({"layout": "window", "window": (3, 3), "span": 2}, ValueError, "span must be an integer of at least 0, for"),
        ({"window": (3, 3)}, ValueError, "window, shift and dilation are for layout='window', got layout='row'"),
        ({"span": -1}, ValueError, "span must be an integer of at least 0"),
        ({"mask_value": 0.0}, ValueError, "mask_value must be -inf or -100, got 0.0"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"dropout_p": 2}, ValueError, "dropout_p must be a number from 0 to 1, got 2"),
        ({"layout": "window", "window": (4.0, 4)}, ValueError, "window must be two integers of at least 1, got (4"),
        ({"layout": "window", "window": "44"}, ValueError, "window must be two integers of at least 1, got '44'"),
        ({"span": True}, ValueError, "span must be an integer of at least 0"),
        ({"seed": 3}, TypeError, "seed must be a tensor, got int"),
        ({"bias_table": (None, None)}, TypeError, "bias_table must be a tensor; a pair of them is for both axes"),
        ({"layout": "sum", "bias_table": 3}, ValueError, "bias_table must be a pair for both axes"),
        ({"seed": torch.zeros(2)}, ValueError, "seed must be int64 of shape (2,)"),
        ({"bias": torch.zeros(2, 5, 5)}, ValueError, "bias must be (heads or 1, N, N) or (N, N) = (2, 7, 7)"),
        ({"bias": torch.zeros(7, 7).long()}, TypeError, "bias must be a float16"),
        ({"bias_table": torch.zeros(12, 2)}, ValueError, "bias_table must be (13, 2) for groups of 1 x 7, got (12, 2)"),
        ({"bias": torch.zeros(7, 7), "bias_table": torch.zeros(13, 2)}, ValueError, "exclude each other"),
        ({"layout": "sum", "bias": torch.zeros(7, 7)}, ValueError, "bias is for one axis or for windows"),
        ({"layout": "sum", "bias_table": torch.zeros(13, 2)}, ValueError, "bias_table must be a pair for both axes"),
        ({"layout": "sum", "bias_table": (None, torch.zeros(13, 2))}, ValueError, "bias_table must be (9, 2)"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)  # fmt: skip
def test_errors(change, error, words):
    arguments = {name: torch.zeros(2, 5, 7, HEADS, 8) for name in "qkv"} | {"layout": "row"} | change
    for function in (attnk.group_attention, functools.partial(attnk.explain, "group_attention")):
        tensors = [arguments[name] for name in "qkv"]
        others = {name: value for name, value in arguments.items() if name not in "qkv"}
        with pytest.raises(error) as caught:
            function(*tensors, **others)
        assert words in str(caught.value)


def test_errors_of_axial_attention():
    q = torch.zeros(5, 7, 2, 8)
    with pytest.raises(ValueError, match="axis must be one of 'row', 'column', 'both', got 'rows'"):
        attnk.axial_attention(q, q, q, "rows")
    with pytest.raises(ValueError, match="combine must be one of 'sum', 'criss_cross', got 'mean'"):
        attnk.axial_attention(q, q, q, "both", combine="mean")
    with pytest.raises(ValueError, match="combine='criss_cross' needs axis='both', got axis='row'"):
        attnk.axial_attention(q, q, q, combine="criss_cross")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@with_short_case
def test_what_is_no_number_stays_in_its_group(backend, device, case, name, value):
    layout, options = CASES[case]
    inputs = draw(layout, (6, 6), dtype=torch.float64, device=device, order="crop", **options)
    inputs[name][0, 2, 3, 1, 4] = value
    ours, theirs = fused(backend, layout, **options)(**inputs), definition(layout, **options)(**inputs)
    if backend == "torch":  # whose fused attention hides some NaN of a query and adds -inf to a NaN: in the group alone
        inputs["v"][0, 2, 3, 1] = math.nan
        options = {name: option for name, option in options.items() if name != "span"}
        group = definition(layout, **options)(**inputs).isnan()
        ours, theirs = (x.masked_fill(group, 0) for x in (ours, theirs))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert not ours[1].isnan().any()
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_large_logits(backend, device):
    inputs = draw("row", dtype=torch.float64, device=device)
    inputs["q"] *= 1e4
    check(backend, "row", inputs, grads=())


@pytest.mark.parametrize("scale", [0.0, 0])
def test_scale_of_zero_is_the_mean(backend, device, scale):
    inputs = draw("column", dtype=torch.float64, device=device)
    out = fused(backend, "column", scale=scale)(**inputs)
    torch.testing.assert_close(out, inputs["v"].mean(1, keepdim=True).expand_as(out))


@pytest.mark.parametrize("case", ["window", "row"])
def test_many_groups(device, case):
    """More groups than a grid's second axis holds."""
    if case == "window":
        inputs = draw("window", (2, 2 * 65_537), 2, device=device, batch=1, heads=1)
        check("torch", "window", inputs, grads=("q",), window=(2, 2))
    else:
        check("torch", "row", draw("row", (65_537, 2), 2, device=device, batch=1, heads=1), grads=("k",))


@pytest.mark.gpu
def test_many_groups_on_a_gpu():
    inputs = draw("window", (14, 7 * 65_537), 32, dtype=torch.bfloat16, device="cuda", batch=1, heads=1)
    outs = [fused(backend, "window", window=(7, 7))(**inputs) for backend in ("triton", "torch")]
    torch.testing.assert_close(*outs, atol=2e-2, rtol=2e-2)


# Dropout


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("case", ["row", "column with span", "shifted", "dilated"])
def test_dropout(backend, device, case, p):
    layout, options = CASES[case]
    inputs = draw(layout, (6, 7), dtype=torch.float64, device=device, extra="table", **options)
    check(backend, layout, inputs, **options, dropout_p=p, seed=SEED)


@pytest.mark.parametrize("layout", BOTH)
def test_dropout_of_both_axes_has_its_gradients(backend, device, layout):
    inputs = draw(layout, (2, 3), 2, None, torch.float64, device, batch=1, heads=1)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    function = lambda q, k, v: fused(backend, layout, dropout_p=0.4, seed=SEED)(q=q, k=k, v=v)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("order", ["contiguous", "channels_first", "heads_outside"])
def test_dropout_does_not_depend_on_the_gradients_layout(backend, device, order):
    inputs = draw("row", dtype=torch.float64, device=device, batch=3)
    dout = torch.randn_like(inputs["v"])
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    out = fused(backend, "row", dropout_p=0.4, seed=SEED)(**inputs)
    grads, others = (torch.autograd.grad(out, leaves, one, retain_graph=True) for one in (dout, arranged(dout, order)))
    torch.testing.assert_close(grads, others)


def test_axes_drop_apart(backend, device):
    """On a square map of equal values rows and columns would otherwise drop the same."""
    q = torch.zeros(1, 16, 16, 1, 8, device=device)
    v = torch.eye(16, device=device).view(1, 1, 16, 1, 16).expand(1, 16, -1, -1, -1)
    options = {"dropout_p": 0.5, "seed": SEED, "backend": backend}
    rows = attnk.axial_attention(q, q.clone(), v, "row", **options)
    both = attnk.axial_attention(q, q.clone(), v, "both", **options) - rows
    columns = attnk.axial_attention(q.transpose(1, 2), q.transpose(1, 2).clone(), v, "row", **options)
    assert not torch.equal(both, columns)
    assert 0.4 < (rows != 0).float().mean() < 0.6


def test_dropout_is_the_same_in_other_runs(device):
    pytest.importorskip(KERNELS)
    inputs = draw("row", (9, 20), device=device)
    results = []
    for programs in (1, 10**6):
        with runs_of_groups(programs):
            results.append(run("triton", "row", inputs, dropout_p=0.3, seed=SEED))
    assert_same_bits(*results)


def test_seed_of_pytorch(backend, device):
    inputs = draw("row", device=device, batch=1)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append([tensor for _ in range(2) for tensor in run(backend, "row", inputs, dropout_p=0.3)])
    assert_same_bits(results[0], results[1])
    assert not torch.equal(results[0][0], results[2][0])
    assert not torch.equal(results[0][0], results[0][4])


def test_dropout_of_the_reference(device):
    for layout in ("row", "sum"):
        inputs = draw(layout, device=device)
        results = [fused("reference", layout, dropout_p=0.3, seed=SEED)(**inputs) for _ in range(2)]
        assert torch.equal(*results)
        assert not torch.equal(results[0], fused("reference", layout)(**inputs))


# Gradients and autograd


@pytest.mark.parametrize("extra", ["", "table"])
@with_case
def test_gradcheck(backend, device, case, extra):
    layout, options = CASES[case]
    inputs = draw(layout, (3, 4), 2, None, torch.float64, device, batch=1, heads=1, extra=extra, **options)
    names = list(inputs)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return fused(backend, layout, **options)(**dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=backend == "triton")


def test_gradgradcheck_of_the_reference():
    leaves = [
        x.requires_grad_() for x in draw("criss_cross", (2, 3), 2, None, torch.float64, batch=1, heads=1).values()
    ]
    function = lambda q, k, v: fused("reference", "criss_cross")(q=q, k=k, v=v)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize(
    "names", [("q",), ("k",), ("v",), ("q", "v"), ("table",), ("q", "k", "v", "table")], ids="+".join
)
@pytest.mark.parametrize("case", ["row", "criss_cross", "shifted"])
def test_subsets_of_gradients(backend, device, case, names):
    layout, options = CASES[case]
    inputs = draw(layout, device=device, extra="table", **options)
    check(backend, layout, inputs, grads=names, **options)


def test_no_graph_where_none_is_wanted(backend, device):
    inputs = draw("row", device=device)
    assert fused(backend, "row")(**inputs).grad_fn is None
    inputs["q"].requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not fused(backend, "row")(**inputs).requires_grad


@with_short_case
def test_saved_for_backward(backend, device, case):
    """The kernels keep q, k and v alone, for one axis; by way of lse, out too."""
    layout, options = CASES[case]
    inputs = draw(layout, device=device, **options)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fused(backend, layout, **options)(**{name: tensor.requires_grad_() for name, tensor in inputs.items()})
    maps = sum(tensor.shape[:4] == inputs["q"].shape[:4] and tensor.dim() == 5 for tensor in saved)
    expected = {"sum": 6 if backend == "torch" else 3, "criss_cross": 4}.get(layout, 3)
    assert maps == expected  # besides, the PyTorch path keeps short groups' weights


def test_changed_in_place(backend, device):
    q, k, v = (tensor.requires_grad_() for tensor in draw("row", device=device).values())
    k = k * 1
    out = attnk.axial_attention(q, k, v, backend=backend)
    k += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@with_short_case
def test_repeats(backend, device, case):
    layout, options = CASES[case]
    inputs = draw(layout, device=device, extra="table", **options)
    first = run(backend, layout, inputs, **options)
    for _ in range(1 if dispatch.INTERPRETED else 20):
        assert_same_bits(run(backend, layout, inputs, **options), first)


@pytest.mark.parametrize("alike", [("q", "k"), ("k", "v"), ("q", "v"), ("q", "k", "v")], ids="=".join)
def test_one_tensor_in_several_places(backend, device, alike):
    tensors = draw("sum", device=device, dtype=torch.float64)
    shared = tensors.pop(alike[0])
    inputs = {"shared": shared} | {name: x for name, x in tensors.items() if name not in alike}

    def around(attention: Any, shared: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        return attention(**dict.fromkeys(alike, shared), **others)

    assert_matches_reference(
        functools.partial(around, fused(backend, "sum")), functools.partial(around, definition("sum")), inputs
    )


@with_short_case
def test_second_differentiation_raises(backend, device, case):
    layout, options = CASES[case]
    inputs = draw(layout, device=device, **options)
    q = inputs["q"].requires_grad_()
    (grad,) = torch.autograd.grad(fused(backend, layout, **options)(**inputs).sum(), q, create_graph=True)
    message = "^attnk.group_attention: the fused backward cannot be differentiated again; backend='reference' "
    with pytest.raises(NotImplementedError, match=message):
        grad.square().sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_checkpoint(backend, device, reentrant, dropout_p):
    inputs = draw("sum", device=device)
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        leaves = [tensor.detach().requires_grad_() for tensor in inputs.values()]
        attention = functools.partial(attnk.axial_attention, axis="both", dropout_p=dropout_p, backend=backend)
        if recompute:
            attention = functools.partial(checkpoint.checkpoint, attention, use_reentrant=reentrant)
        out = attention(*leaves)
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, dtype):
    inputs = draw("row", device=device)
    with torch.autocast(device, dtype=dtype):
        out = attnk.axial_attention(inputs["q"].requires_grad_(), inputs["k"].to(dtype), inputs["v"], backend="torch")
    assert out.dtype == dtype
    cast = {name: tensor.detach().to(dtype) for name, tensor in inputs.items()}
    assert torch.equal(out, attnk.axial_attention(*cast.values(), backend="torch"))
    out.sum().backward()
    assert inputs["q"].grad.dtype == torch.float32


# Inside PyTorch


@with_case
def test_compile(backend, device, case, fresh_dynamo):
    layout, options = CASES[case]
    inputs = draw(layout, device=device, extra="table", **options)
    compiled = torch.compile(fused(backend, layout, **options), fullgraph=True, backend="aot_eager")
    assert_matches_reference(compiled, definition(layout, **options), inputs)


def test_compile_dynamic_shapes(backend, device, fresh_dynamo):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def both(attention: Any, x: torch.Tensor) -> torch.Tensor:
        return attention(x, x, x, "window", window=(2, 3), shift=(1, 1)) + attention(x, x, x, "sum")

    compiled = torch.compile(
        functools.partial(both, functools.partial(attnk.group_attention, backend=backend)), fullgraph=True,
        backend=counter,
    )  # fmt: skip
    reference = lambda q, k, v, layout, **options: group_attention_reference(  # noqa: E731
        q, k, v, layout=layout, **options
    )
    for batch, height, width in ((2, 4, 6), (3, 5, 7), (4, 9, 8)):
        inputs = {"x": torch.randn(batch, height, width, HEADS, 8, dtype=torch.float64, device=device)}
        assert_matches_reference(compiled, functools.partial(both, reference), inputs)
    assert counter.frame_count <= 2


@with_short_case
def test_export(backend, device, case, fresh_dynamo):
    layout, options = CASES[case]

    class Network(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attnk.group_attention(q, k, v, layout, **options, backend=backend)

    inputs = draw(layout, device=device)
    program = torch.export.export(Network(), tuple(inputs.values()))
    assert "attnk.group_attention_forward" in str(program)
    results = []
    for module in (Network(), program.module()):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs.values()]
        out = module(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("order", ["contiguous", "channels_first", "columns_first"])
@with_short_case
def test_opcheck(backend, device, case, order, fresh_dynamo):
    layout, options = CASES[case]
    if backend == "torch" and layout == "sum":
        pytest.skip("two calls, of rows and of columns")
    inputs = draw(layout, (4, 4), 3, None, torch.float64, device, extra="table", order=order, **options)
    tensors = [*(inputs[name] for name in "qkv"), None, inputs["table"], inputs.get("column_table"), None]
    geometry = [list(options.get(name, default)) for name, default in
                (("window", (1, 1)), ("shift", (0, 0)), ("dilation", (1, 1)))]  # fmt: skip
    arguments = (layout, *geometry, options.get("span", -1), "-inf", 0.3, 0.0)
    forward, backward = (
        getattr(torch.ops.attnk, f"group_attention_{name}").default for name in ("forward", "backward")
    )
    for keep in (True, False):
        torch.library.opcheck(forward, (*tensors, *arguments, keep, backend))
    out, lse = forward(*tensors, *arguments, True, backend)
    for needs in itertools.product((True, False), repeat=2):
        torch.library.opcheck(
            backward,
            (torch.randn_like(out), *tensors, out, lse, *arguments, *needs, False, layout != "criss_cross", backend),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("mapped", [{"q": 0}, {"q": 1, "k": 0, "v": 3}, {"table": 0}, {"q": 1, "table": 0}], ids=str)
@with_short_case
def test_vmap(backend, device, case, mapped):
    layout, options = CASES[case]
    inputs = draw(layout, (3, 4), 4, None, torch.float64, device, extra="table", **options)
    for name, dim in mapped.items():
        inputs[name] = torch.stack([inputs[name], inputs[name].flip(-1)], dim)
    in_dims = tuple(mapped.get(name) for name in inputs)

    def called(attention: Any) -> Callable[..., torch.Tensor]:
        return lambda *tensors: attention(**dict(zip(inputs, tensors, strict=True)))

    ours, theirs = called(fused(backend, layout, **options)), called(definition(layout, **options))
    assert_matches_reference(
        lambda **tensors: torch.vmap(ours, in_dims)(*tensors.values()).contiguous(),
        lambda **tensors: one_by_one(in_dims, theirs, *tensors.values()),
        inputs,
    )


@with_short_case
def test_gradients_an_example(backend, device, case):
    layout, options = CASES[case]
    inputs = draw(layout, (3, 4), 4, None, torch.float64, device, batch=3, **options)

    def gradients(attention: Any, *tensors: torch.Tensor) -> torch.Tensor:
        def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention(q=q[None], k=k[None], v=v[None]).square().sum()

        return torch.cat([grad.flatten() for grad in torch.func.grad(loss, (0, 1, 2))(*tensors)])

    ours = functools.partial(gradients, fused(backend, layout, **options))
    theirs = functools.partial(gradients, definition(layout, **options))
    assert_matches_reference(
        lambda **tensors: torch.vmap(ours)(*tensors.values()),
        lambda **tensors: one_by_one((0, 0, 0), theirs, *tensors.values()),
        inputs,
        grads=(),
    )


def test_traces_take_other_sizes():
    call = lambda q, k, v: attnk.axial_attention(q, k, v, "column")  # noqa: E731
    inputs = tuple(draw("column", (4, 4)).values())
    traced = torch.jit.trace(call, inputs)
    torch.testing.assert_close(traced(*inputs), call(*inputs))


def test_meta_tensors():
    leaves = [tensor.to("meta").requires_grad_() for tensor in draw("sum").values()]
    out = attnk.axial_attention(*leaves, "both")
    out.sum().backward()
    assert out.shape == leaves[0].shape
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize(("case", "each"), [("row", 7), ("column", 5), ("sum", 12), ("criss_cross", 12), ("window", 6)])
def test_flops(device, case, each):
    pytest.importorskip(KERNELS)
    layout, options = CASES[case]
    inputs = draw(layout, (5, 7), 8, 12, device=device)
    with FlopCounterMode(display=False) as forward:
        out = fused("triton", layout, **options)(**{name: x.requires_grad_() for name, x in inputs.items()})
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    unit = 2 * 2 * HEADS * 35 * each
    assert forward.get_total_flops() == unit * 20
    assert backward.get_total_flops() == unit * (20 + 8 + 20)


# Dispatch


def test_explain(device):
    inputs = draw("row", device=device)
    explanation = attnk.explain("group_attention", **inputs, layout="row", backend="torch")
    assert (explanation.backend, explanation.reason, explanation.config) == ("torch", "asked for", None)
    tuning = pytest.importorskip("attnk.kernels.tuning")
    configs = [tuning.GroupAttentionConfig(*[tuning.GroupTile(warps, 1, 4)] * 2) for warps in (1, 2, 4, 8)]
    sizes = ((2, 128, 128, 2), (8, 6, 128, 2), (8, 128, 8, 0), (8, 128, 128, 2))
    rows = tuple(tuning.GroupAttentionRow(*size, config) for size, config in zip(sizes, configs, strict=True))
    half = {name: tensor.half() for name, tensor in inputs.items()}
    wide = {name: tensor.repeat(1, 1, 1, 1, 2) for name, tensor in inputs.items()}
    with mock.patch.dict(tuning.GROUP_ATTENTION_TABLE, default=rows, clear=True):
        dropout = {"dropout_p": 0.1}
        for tensors, layout, options, expected in (
            (half, "row", {}, configs[0]), (inputs, "column", dropout, configs[1]), (inputs, "row", {}, configs[2]),
            (wide, "row", {}, configs[3]), (inputs, "row", dropout, configs[3]),
        ):  # fmt: skip
            explanation = attnk.explain("group_attention", **tensors, layout=layout, **options, backend="triton")
            assert explanation.config is expected
            launched = []

            def noted(*args: Any, launched: list = launched, **kwargs: Any) -> Any:
                launched.append(tuning.group_attention_config(*args, **kwargs))
                return launched[-1]

            with mock.patch(f"{KERNELS}.common.group_attention_config", noted):
                fused("triton", layout, **options)(**tensors)
            assert launched == [expected], "explain and the launch must agree"


def test_example(device):
    for channels_last in (False, True):
        *tensors, layout = operation.example([2, 5, 7, 2, 8], torch.float16, torch.device(device), channels_last)
        for tensor in tensors:
            assert tensor.shape == (2, 5, 7, 2, 8)
            assert tensor.is_contiguous() == channels_last
        assert attnk.explain("group_attention", *tensors, layout, backend="torch").backend == "torch"


# Bytes


@needs_interpreter
@pytest.mark.parametrize(
    "case",
    pairwise(
        case=("row", "column", "window", "shifted", "sum", "criss_cross", "dilated"),
        size=((6, 6), (5, 7), (17, 3)),
        dims=((8, 8), (24, 12)),
        dtype=DTYPES,
        extra=("", "table"),
        order=("contiguous", "packed", "channels_first"),
        dropout_p=(0.0, 0.3),
    ),
)
def test_bytes_are_the_formula(case):
    pytest.importorskip(KERNELS)
    layout, options = CASES[case["case"]]
    inputs = draw(
        layout, case["size"], *case["dims"], case["dtype"], extra=case["extra"], order=case["order"], **options
    )
    options = options | ({"dropout_p": 0.3, "seed": SEED} if case["dropout_p"] else {})
    with runs_of_groups(), Meter() as meter:
        run("triton", layout, inputs, **options)
    q, k, v, *tables = inputs.values()
    out, acc = v.nbytes, 8 if q.dtype == torch.float64 else 4
    stats = q[..., 0].numel() * acc
    qkv, draws = q.nbytes + k.nbytes + v.nbytes, 16 * (case["dropout_p"] > 0)
    axes = list(tokens_of(layout, case["size"], options).values())
    joint, expected = layout == "criss_cross", []
    for number in range(len(axes)):
        extra = draws + (tables[number].nbytes if tables else 0)
        again = number == 1
        expected.append((qkv + extra + again * (out + joint * stats), out + joint * stats))
    for number, window in enumerate(axes):
        extra = draws + (tables[number].nbytes if tables else 0)
        pairs = bool(tables) * HEADS * math.prod(window) ** 2 * acc
        again = number == 1
        loaded = qkv + out + extra + again * qkv + joint * (out + stats)
        tile = 16 * 4 if tables else 16  # groups a program, in the tables
        programs = -(-2 * _groups(layout, case["size"], window, options, number) // tile)
        expected.append((loaded, qkv + pairs * programs))
    assert [(one.loaded, one.stored) for one in meter.launches] == expected
    assert all(one.atomics == 0 and one.store_lanes == one.stored for one in meter.launches)


def _groups(layout: str, size: tuple[int, int], window: tuple[int, int], options: dict, number: int) -> int:
    if layout != "window":
        return size[0] if layout == "row" or (layout in BOTH and number == 0) else size[1]
    return len(group_places(*size, window, options.get("shift", (0, 0)), options.get("dilation", (1, 1)))[0])


@needs_interpreter
@pytest.mark.parametrize(
    ("layout", "options"), [("row", {}), ("column", {}), ("window", {"window": (7, 7), "shift": (3, 3)})]
)
def test_bytes_at_the_size_of_networks(layout, options):
    """q, k, v and out once each, and the bias once a program: within 5 % of the least."""
    pytest.importorskip(KERNELS)
    inputs = draw(layout, (28, 28), 32, dtype=torch.float16, batch=1, extra="table", order="packed", **options)
    with Meter() as meter:
        fused("triton", layout, **options)(**inputs)
    assert meter.bytes <= 1.05 * 4 * inputs["q"].nbytes


def test_memory_of_pytorch():
    """Blocks of logits, never those of the whole map, with a bias that has a gradient."""
    inputs = draw("window", (112, 112), 8, batch=1, heads=4, extra="table", window=(7, 7))
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def call() -> Any:
        q, k, v, table = leaves
        out = attnk.window_attention(q, k, v, (7, 7), bias_table=table, backend="torch")
        return out, torch.autograd.grad(out, leaves, out)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert max(itertools.accumulate(sizes)) < 20 * inputs["q"].nbytes
