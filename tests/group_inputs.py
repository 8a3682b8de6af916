"""What the tests of group attention share: maps in every layout, the definition, and long runs of groups."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import attnk
from attnk.groups import group_places, group_window
from attnk.reference.group_attention import group_attention_reference
from attnk.testing import assert_matches_reference

KERNELS = "attnk.kernels.group_attention"
SEED = torch.tensor([2**40 + 5, 7])
BOTH = ("sum", "criss_cross")
HEADS = 2

Inputs = dict[str, torch.Tensor | None]

# q, k and v (B, height, width, heads, D) in memory, from the outermost axis to the innermost
ORDERS = {
    "contiguous": (0, 1, 2, 3, 4),
    "channels_first": (0, 3, 4, 1, 2),
    "columns_first": (0, 2, 1, 3, 4),
    "heads_outside": (0, 3, 1, 2, 4),
}
LAYOUTS = (*ORDERS, "packed", "packed_map", "crop", "step_2", "offset_1", "expanded")


def arranged(x: torch.Tensor, order: str) -> torch.Tensor:
    """The values of a map as they lie in memory elsewhere, NaN around them; expanded repeats the first image."""
    batch, height, width, heads, dim = x.shape
    if order in ORDERS:
        axes = ORDERS[order]
        return x.permute(axes).contiguous().permute([axes.index(axis) for axis in range(5)])
    if order == "packed":  # the second of what one projection gave
        packed = x.new_full((batch, height, width, 3, heads, dim), math.nan)
        packed[:, :, :, 1] = x
        return packed[:, :, :, 1]
    if order == "packed_map":
        packed = x.new_full((batch, 3, heads, dim, height, width), math.nan)
        packed[:, 1] = x.permute(0, 3, 4, 1, 2)
        return packed[:, 1].permute(0, 3, 4, 1, 2)
    if order == "crop":
        larger = x.new_full((batch, height + 2, width + 3, heads, dim + 4), math.nan)
        larger[:, 1 : height + 1, 2 : width + 2, :, 3 : dim + 3] = x
        return larger[:, 1 : height + 1, 2 : width + 2, :, 3 : dim + 3]
    if order == "step_2":
        wide = x.new_full((batch, height, width, heads, 2 * dim), math.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if order == "offset_1":
        longer = x.new_full((x.numel() + 1,), math.nan)
        longer[1:] = x.flatten()
        return longer[1:].view(x.shape)
    return x[:1].expand(x.shape)


def tokens_of(layout: str, size: tuple[int, int], options: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(height, width) of a group, by axis."""
    axes = ("row", "column") if layout in BOTH else (layout,)
    return {axis: group_window(axis, *size, options.get("window", (1, 1))) for axis in axes}


def draw(
    layout: str,
    size: tuple[int, int] = (5, 7),
    dim: int = 8,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    batch: int = 2,
    heads: int = HEADS,
    extra: str = "",
    order: str = "contiguous",
    **options: Any,
) -> Inputs:
    """Random q, k, v, and a bias ("bias") or bias tables ("table") for this layout."""
    sizes = {"q": dim, "k": dim, "v": v_dim or dim}
    inputs: Inputs = {
        name: arranged(torch.randn(batch, *size, heads, one, dtype=torch.float64).to(device, dtype), order)
        for name, one in sizes.items()
    }
    windows = tokens_of(layout, size, options)
    if extra == "bias":
        tokens = math.prod(windows[layout])
        inputs["bias"] = torch.randn(heads, tokens, tokens, dtype=torch.float64).to(device, dtype)
    if extra == "table":
        for name, (rows, columns) in zip(("table", "column_table"), windows.values(), strict=False):
            entries = (2 * rows - 1) * (2 * columns - 1)
            inputs[name] = torch.randn(entries, heads, dtype=torch.float64).to(device, dtype)
    return inputs


def fused(backend: str | None, layout: str, **options: Any) -> Callable[..., torch.Tensor]:
    """The operation, called with tensors by name."""

    def function(*, table: Any = None, column_table: Any = None, **tensors: Any) -> torch.Tensor:
        bias_table = table if column_table is None else (table, column_table)
        return attnk.group_attention(**tensors, layout=layout, bias_table=bias_table, **options, backend=backend)

    return function


def kept(backend: str, layout: str, inputs: Inputs, **options: Any) -> Any:
    """Which weights a call drops, by way of values that show them: (B, groups, heads, tokens, tokens)."""
    if not options.get("dropout_p"):
        return None
    if layout in BOTH:
        # the axes draw apart
        pytest.skip("what one axis drops is not seen in the sum of both")
    q = torch.zeros_like(inputs["q"])
    batch, height, width, heads, _ = q.shape
    window = group_window(layout, height, width, options.get("window", (1, 1)))
    places, _ = group_places(height, width, window, options.get("shift", (0, 0)), options.get("dilation", (1, 1)))
    n_groups, n_tokens = places.shape
    shown = torch.zeros(height * width, n_tokens)
    offsets = torch.arange(n_tokens).expand(n_groups, -1)
    shown[places[places >= 0]] = torch.eye(n_tokens)[offsets[places >= 0]]
    v = shown.view(1, height, width, 1, n_tokens).expand(batch, -1, -1, heads, -1).to(q)
    options = {name: value for name, value in options.items() if name not in ("scale",)}
    out = attnk.group_attention(q, q.clone(), v, layout, **options, backend=backend) != 0
    groups = out.flatten(1, 2)[:, places.clamp(min=0)]  # (B, groups, queries, heads, keys)
    return groups.transpose(2, 3)


def definition(layout: str, keep: Any = None, **options: Any) -> Callable[..., torch.Tensor]:
    options = {name: value for name, value in options.items() if name != "seed"}
    return functools.partial(group_attention_reference, layout=layout, keep=keep, **options)


def check(backend: str, layout: str, inputs: Inputs, *, grads: Any = None, dout: Any = None, **options: Any) -> None:
    keep = kept(backend, layout, inputs, **options)
    assert_matches_reference(
        fused(backend, layout, **options), definition(layout, keep, **options), inputs, grads=grads, dout=dout
    )


def run(backend: str, layout: str, inputs: Inputs, **options: Any) -> list[torch.Tensor]:
    """The output and all gradients, for comparing bits."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out = fused(backend, layout, **options)(**leaves)
    dout = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout)]


@contextlib.contextmanager
def runs_of_groups(programs: int = 1) -> Iterator[None]:
    """Programs of the kernels visit as many groups as they may."""
    with mock.patch.multiple(f"{KERNELS}.common", GROUP_PROGRAMS=programs, DBIAS_GROUP_PROGRAMS=programs):
        yield
