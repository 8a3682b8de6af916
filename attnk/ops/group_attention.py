"""Group attention as an operation: rows, columns, windows; ``attnk.axial_attention``, ``attnk.window_attention``."""

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from attnk import dispatch
from attnk.fallback import group_attention as fallback
from attnk.groups import far_pairs, group_places, group_window
from attnk.memory import empty_in_order
from attnk.reference.group_attention import group_attention_reference

from ._calls import autocast_is_on, implementation_scope, is_plain
from ._checks import FLOAT_DTYPES, check_choice
from ._flops import announce_flops, declare_flops
from ._vmap import each_example, fold_examples
from ._watch import tell, watchers
from .softmax_attention import softmax_attention

LAYOUTS = ("row", "column", "window", "sum", "criss_cross")
Pair = tuple[int, int]
Tables = tuple[torch.Tensor | None, torch.Tensor | None]


def axial_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    axis: str = "row",
    *,
    combine: str = "sum",
    bias: torch.Tensor | None = None,
    bias_table: torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
    scale: float | None = None,
    span: int | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention along rows, columns or both of a feature map (Ho et al., 2019, https://arxiv.org/abs/1912.12180).

    ``dropout(softmax(scale q k^T + bias)) v`` inside each row or column, read and written where the map lies.

    Args:
        q: queries (B, height, width, heads, D) or (height, width, heads, D), float16, bfloat16, float32 or float64, any
            strides: views of one packed projection are read where they lie. Empty maps are fine.
        k: keys, of the shape, dtype and device of q (under autocast all three are cast).
        v: values (B, height, width, heads, Dv).
        axis: "row" (tokens of equal height), "column" or "both".
        combine: for both axes, "sum" of what each gives, or "criss_cross", one softmax over row and column in which the
            token itself counts once (CCNet, https://arxiv.org/abs/1811.11721).
        bias: float (heads or 1, N, N) or (N, N), N the tokens of a row or column; for one axis. It has a gradient.
        bias_table: (2 N - 1, heads), the bias by query's position less key's, plus N - 1, with gradient; for both axes
            a pair, for rows and for columns.
        scale: of the logits; D ** -0.5 when None.
        span: the largest distance along the axis at which a token is seen; None for any.
        dropout_p: share of the weights to drop; pass 0 in evaluation.
        seed: int64 (2,), seed and offset of the dropout; drawn from PyTorch's generator when None.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Returns:
        (B, height, width, heads, Dv) in q's dtype, its axes in memory in q's order (from the definition: contiguous).

    Rows and columns too long for one program (over 128 tokens; fewer in float32 or with wide heads: ``attnk.explain``
    tells) go to softmax attention, which streams them. Gradients are bit-equal from run to run. Differentiating them
    once more raises and names the backend that can, "reference".

    Raises:
        ValueError: a shape, device or option that does not fit.
        TypeError: a dtype or type that does not fit.
        attnk.Unsupported: backend="triton" where the kernels cannot run.
    """
    check_choice("axis", axis, ("row", "column", "both"))
    check_choice("combine", combine, ("sum", "criss_cross"))
    if axis != "both" and combine != "sum":
        raise ValueError(f"combine={combine!r} needs axis='both', got axis={axis!r}")
    return group_attention(
        q, k, v, combine if axis == "both" else axis, bias=bias, bias_table=bias_table, scale=scale, span=span,
        dropout_p=dropout_p, seed=seed, backend=backend,
    )  # fmt: skip


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: Pair,
    shift: Pair = (0, 0),
    *,
    dilation: Pair = (1, 1),
    bias: torch.Tensor | None = None,
    bias_table: torch.Tensor | None = None,
    mask_value: float = -math.inf,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention inside windows of a feature map, shifted or dilated (Swin, https://arxiv.org/abs/2103.14030).

    Windows are neither cut out nor rolled nor padded in memory: the map is read and written where it lies.

    Args:
        q: queries (B, height, width, heads, D) or (height, width, heads, D), float16, bfloat16, float32 or float64, any
            strides. Empty maps are fine.
        k: keys, of the shape, dtype and device of q (under autocast all three are cast).
        v: values (B, height, width, heads, Dv).
        window: (height, width) of a window. Where windows reach over the map's lower or right edge, there is nothing.
        shift: by how much windows lie further down and right, less than their reach, window x dilation. They go around
            the edge, but tokens that do not lie side by side do not see each other.
        dilation: steps between neighbouring tokens of a window: (height // window[0], width // window[1]) is the grid
            attention of MaxViT (https://arxiv.org/abs/2204.01697).
        bias: float (heads or 1, N, N) or (N, N), N the tokens of a window. It has a gradient.
        bias_table: ((2 window[0] - 1) (2 window[1] - 1), heads), the bias by relative position, in Swin's order, with
            gradient.
        mask_value: of the logits of tokens carried around the edge: -inf, or -100, to be added, as published.
        scale: of the logits; D ** -0.5 when None.
        dropout_p: share of the weights to drop; pass 0 in evaluation.
        seed: int64 (2,), seed and offset of the dropout; drawn from PyTorch's generator when None.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Returns:
        (B, height, width, heads, Dv) in q's dtype, its axes in memory in q's order (from the definition: contiguous).

    Windows too large for one program (over 128 tokens; fewer in float32 or with wide heads: ``attnk.explain`` tells)
    are cut out and go to softmax attention, which streams them.

    Raises:
        ValueError: a shape, device or option that does not fit.
        TypeError: a dtype or type that does not fit.
        attnk.Unsupported: backend="triton" where the kernels cannot run.
    """
    return group_attention(
        q, k, v, "window", window=window, shift=shift, dilation=dilation, bias=bias, bias_table=bias_table,
        mask_value=mask_value, scale=scale, dropout_p=dropout_p, seed=seed, backend=backend,
    )  # fmt: skip


def group_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: str,
    *,
    window: Pair | None = None,
    shift: Pair = (0, 0),
    dilation: Pair = (1, 1),
    span: int | None = None,
    mask_value: float = -math.inf,
    bias: torch.Tensor | None = None,
    bias_table: torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """What ``attnk.axial_attention`` and ``attnk.window_attention`` call, whose arguments it takes.

    Args:
        layout: "row", "column", "window", or, for rows and columns, "sum" or "criss_cross".
    """
    _check(q, k, v, layout, window, shift, dilation, span, mask_value, scale, dropout_p, seed)
    bias, tables = _check_bias(q, layout, window, bias, bias_table)
    geometry = (window or (1, 1), shift, dilation, span, mask_value)
    extras = (bias is not None or any(table is not None for table in tables)) + (dropout_p > 0)
    q, k, v = _cast(q, k, v)
    chosen, _ = _choose(backend, q, k, v, layout, window, extras)
    if q.dim() == 4:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        return group_attention(
            q, k, v, layout, window=window, shift=shift, dilation=dilation, span=span, mask_value=mask_value, bias=bias,
            bias_table=tables if layout in ("sum", "criss_cross") else tables[0], scale=scale, dropout_p=dropout_p,
            seed=seed, backend=backend,
        ).squeeze(0)  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if watchers:
        attend = functools.partial(
            group_attention, layout=layout, window=window, shift=shift, dilation=dilation, span=span,
            mask_value=mask_value, scale=scale,
        )  # fmt: skip
        table = tables if layout in ("sum", "criss_cross") else tables[0]
        tell("group_attention", q=q, k=k, attend=attend, bias=bias, bias_table=table)
    if 0 in (*q.shape, *v.shape):
        return _empty(q, k, v, bias, *tables)
    if dropout_p > 0 and seed is None:
        seed = torch.randint(2**62, (2,), device=q.device)
    rng = None if dropout_p == 0 or seed is None else seed.to(q.device)
    if chosen == "reference" or torch.jit.is_tracing():
        return _reference(q, k, v, bias, tables, rng, layout, geometry, scale, dropout_p)
    if chosen == "streaming":
        return _streamed(q, k, v, bias, tables, rng, layout, geometry, scale, dropout_p, backend)
    if chosen == "torch" and layout == "sum":
        axes = zip(("row", "column"), tables, strict=True)
        row, column = (
            _run(q, k, v, None, (table, None), rng, axis, geometry, scale, dropout_p, chosen) for axis, table in axes
        )
        return row + column
    return _run(q, k, v, bias, tables, rng, layout, geometry, scale, dropout_p, chosen)


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> str | None:
    """Why the Triton kernels cannot run this call, or None when they can."""
    return dispatch.no_kernel_here(q)


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: str,
    *,
    window: Pair | None = None,
    shift: Pair = (0, 0),
    dilation: Pair = (1, 1),
    span: int | None = None,
    mask_value: float = -math.inf,
    bias: torch.Tensor | None = None,
    bias_table: torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    backend: str | None = None,
) -> dispatch.Explanation:
    """What ``attnk.explain("group_attention", ...)`` returns."""
    _check(q, k, v, layout, window, shift, dilation, span, mask_value, scale, dropout_p, seed)
    bias, tables = _check_bias(q, layout, window, bias, bias_table)
    extras = (bias is not None or any(table is not None for table in tables)) + (dropout_p > 0)
    q, k, v = _cast(q, k, v)
    chosen, reason = _choose(backend, q, k, v, layout, window, extras, warn=False)
    config = _config(q, v, layout, window, extras) if chosen == "triton" else None
    if chosen == "streaming":
        chosen = dispatch.choose("group_attention", backend, q, unsupported, k, v, warn=False)[0]
    return dispatch.Explanation("group_attention", chosen, reason, config)


def example(
    shape: list[int], dtype: torch.dtype, device: torch.device, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """Arguments that ``explain`` takes, for a map of this shape, channels last or channels first in memory, by rows."""
    q = torch.empty(shape, dtype=dtype, device=device)
    if not channels_last:
        q = q.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    return q, q, q, "row"


def _cast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, in the autocast dtype where autocast is on."""
    x = tensors[0]
    if not autocast_is_on(x) or x.dtype == torch.float64:
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in tensors)


def _longest(q: torch.Tensor, layout: str, window: Pair | None) -> int:
    """Tokens of the longest group."""
    height, width = q.shape[-4:-2]
    if layout in ("sum", "criss_cross"):
        return max(height, width)
    return math.prod(group_window(layout, height, width, window or (1, 1)))


def _choose(
    backend: str | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: str,
    window: Pair | None,
    extras: int,
    warn: bool = True,
) -> tuple[str, str]:
    """The backend and why; "streaming" where softmax attention does it better, in the backend that it chooses."""
    chosen, reason = dispatch.choose("group_attention", backend, q, unsupported, k, v, warn=warn)
    if chosen == "triton" and _config(q, v, layout, window, extras) is None:
        tokens, head_dim = _longest(q, layout, window), max(q.shape[-1], v.shape[-1])
        return "streaming", f"groups of {tokens} tokens with heads of {head_dim} go to softmax attention's kernels"
    if chosen == "torch" and q.device.type != "cpu":
        return "streaming", reason
    return chosen, reason


def _config(q: torch.Tensor, v: torch.Tensor, layout: str, window: Pair | None, extras: int) -> Any:
    """The kernels' configuration for the longest groups, or None where a program does not hold them."""
    from attnk.kernels.tuning import architecture, group_attention_config

    return group_attention_config(
        architecture(q.device),
        itemsize=q.element_size(),
        tokens=_longest(q, layout, window),
        head_dim=max(q.shape[-1], v.shape[-1]),
        extras=extras,
    )


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: str,
    window: Pair | None,
    shift: Pair,
    dilation: Pair,
    span: int | None,
    mask_value: float,
    scale: float | None,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> None:
    check_choice("layout", layout, LAYOUTS)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() not in (4, 5):
            raise ValueError(
                f"{name} must be (B, height, width, heads, D) or (height, width, heads, D), "
                f"got {tensor.dim()} dimensions: {tuple(tensor.shape)}"
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
        if tensor.dtype != q.dtype and not autocast_is_on(q):
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    if q.shape[-1] == 0:
        raise ValueError(f"q must have a head dimension of at least 1, got {tuple(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"v must have the map and heads of q, {tuple(q.shape)}, got {tuple(v.shape)}")
    if layout == "window":
        for name, pair, least in (("window", window, 1), ("shift", shift, 0), ("dilation", dilation, 1)):
            sizes = pair if isinstance(pair, Sequence) and len(pair) == 2 else (None, None)
            if not all(isinstance(size, int | torch.SymInt) and size >= least for size in sizes):
                raise ValueError(f"{name} must be two integers of at least {least}, got {pair!r}")
        for moved, part, step in zip(shift, window or (1, 1), dilation, strict=True):
            if moved >= part * step:
                raise ValueError(f"shift must be less than window x dilation, {window} x {dilation}, got {shift}")
    elif window is not None or tuple(shift) != (0, 0) or tuple(dilation) != (1, 1):
        raise ValueError(f"window, shift and dilation are for layout='window', got layout={layout!r}")
    whole = isinstance(span, int | torch.SymInt) and not isinstance(span, bool)
    if span is not None and (not whole or span < 0 or layout == "window"):
        raise ValueError(f"span must be an integer of at least 0, for rows and columns, got {span!r}")
    if mask_value not in (-math.inf, -100):
        raise ValueError(f"mask_value must be -inf or -100, got {mask_value!r}")
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}; multiply q by a tensor instead")
    if not isinstance(dropout_p, int | float) or not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be a number from 0 to 1, got {dropout_p!r}")
    if seed is not None and not isinstance(seed, torch.Tensor):
        raise TypeError(f"seed must be a tensor, got {type(seed).__name__}")
    if seed is not None and (seed.shape != (2,) or seed.dtype != torch.int64):
        raise ValueError(f"seed must be int64 of shape (2,), got {seed.dtype} of shape {tuple(seed.shape)}")


def _check_bias(
    q: torch.Tensor, layout: str, window: Pair | None, bias: torch.Tensor | None, bias_table: Any
) -> tuple[torch.Tensor | None, Tables]:
    """Raise where bias or table does not fit; return the bias with a head's for every head, and two tables."""
    height, width, heads = q.shape[-4:-1]
    both = layout in ("sum", "criss_cross")
    tables: Tables = (bias_table, None)
    if both:
        tables = (None, None) if bias_table is None else bias_table
        if not isinstance(tables, tuple | list) or len(tables) != 2:
            raise ValueError("bias_table must be a pair for both axes, for rows and for columns")
        if bias is not None:
            raise ValueError("bias is for one axis or for windows; for both axes use bias_table")
    elif isinstance(bias_table, tuple | list):
        raise TypeError("bias_table must be a tensor; a pair of them is for both axes")
    axes = ("row", "column") if both else (layout,)
    for axis, table in zip(axes, tables, strict=False):
        rows, columns = group_window(axis, height, width, window or (1, 1))
        if table is not None:
            _check_extra("bias_table", table, q)
            expected = ((2 * rows - 1) * (2 * columns - 1), heads)
            if q.numel() and table.shape != expected:
                raise ValueError(
                    f"bias_table must be {expected} for groups of {rows} x {columns}, got {tuple(table.shape)}"
                )
    if bias is None:
        return None, tables
    if tables[0] is not None:
        raise ValueError("bias and bias_table exclude each other: add the one's pairs to the other")
    _check_extra("bias", bias, q)
    tokens = _longest(q, layout, window)
    sizes = (1,) * (3 - bias.dim()) + tuple(bias.shape)
    if len(sizes) != 3 or sizes[0] not in (1, heads) or sizes[1:] != (tokens, tokens):
        raise ValueError(
            f"bias must be (heads or 1, N, N) or (N, N) = {(heads, tokens, tokens)}, got {tuple(bias.shape)}"
        )
    return bias.view(sizes).expand(heads, -1, -1), tables


def _check_extra(name: str, extra: torch.Tensor, q: torch.Tensor) -> None:
    if not isinstance(extra, torch.Tensor) or extra.dtype not in FLOAT_DTYPES:
        got = extra.dtype if isinstance(extra, torch.Tensor) else type(extra).__name__
        raise TypeError(f"{name} must be a float16, bfloat16, float32 or float64 tensor, got {got}")
    if extra.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {extra.device}")


def _empty(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extras: torch.Tensor | None) -> torch.Tensor:
    """The output of an empty map or empty values, with gradients of 0."""
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    return out + sum(x.flatten()[:0].sum().to(out.dtype) for x in (q, k, v, *extras) if x is not None)


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, tables: Tables,
    rng: torch.Tensor | None, layout: str, geometry: tuple, scale: float, dropout_p: float,
) -> torch.Tensor:  # fmt: skip
    window, shift, dilation, span, mask_value = geometry
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "span": span}
    if rng is not None:
        generator = torch.Generator(q.device).manual_seed(sum(rng.tolist()) % 2**63)
        height, width, heads = q.shape[1:4]
        axes = ("row", "column") if layout in ("sum", "criss_cross") else (layout,)
        keeps = []
        for axis in axes:
            sizes = group_places(height, width, group_window(axis, height, width, window), shift, dilation)[0].shape
            drawn = torch.rand(q.shape[0], sizes[0], heads, sizes[1], sizes[1], device=q.device, generator=generator)
            keeps.append(drawn >= dropout_p)
        options["keep"] = keeps if len(keeps) == 2 else keeps[0]
    if layout == "window":
        options |= {"window": window, "shift": shift, "dilation": dilation, "mask_value": mask_value}
    return group_attention_reference(q, k, v, bias, *tables, layout=layout, **options)


# Longer groups: softmax attention, on views of rows and columns, and on windows cut out.


def _streamed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, tables: Tables,
    rng: torch.Tensor | None, layout: str, geometry: tuple, scale: float, dropout_p: float, backend: str | None,
) -> torch.Tensor:  # fmt: skip
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "backend": backend}
    if layout not in ("sum", "criss_cross"):
        return _streamed_axis(q, k, v, bias, tables[0], layout, geometry, seed=rng, **options)[0]
    joint = layout == "criss_cross"
    other = None if rng is None else rng + rng.new_tensor([0, 1])
    row, row_lse = _streamed_axis(q, k, v, None, tables[0], "row", geometry, seed=rng, return_lse=joint, **options)
    column, column_lse = _streamed_axis(
        q, k, v, None, tables[1], "column", geometry, seed=other, return_lse=joint, no_centre=joint, **options
    )
    if not joint:
        return row + column
    shares = torch.stack([row_lse, column_lse]).softmax(0).to(q.dtype)
    return shares[0] * row + shares[1] * column


def _streamed_axis(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor | None,
    axis: str, geometry: tuple, *, return_lse: bool = False, no_centre: bool = False, **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Out (B, height, width, heads, Dv), and with return_lse lse (B, height, width, heads, 1), else anything."""
    batch, height, width = q.shape[:3]
    window, shift, dilation, span, mask_value = geometry
    bias = None if bias is None else bias.unsqueeze(0)
    if axis == "window":
        seen = None
        padded = [
            -(-size // (part * step)) * part * step
            for size, part, step in zip((height, width), window, dilation, strict=True)
        ]
        if any(shift) or padded != [height, width]:
            places, parts = group_places(height, width, window, shift, dilation, q.device)
            apart = parts[:, None, :, None] != parts[:, None, None, :]
            exists = (places >= 0)[:, None, None, :]
            if mask_value == -math.inf:
                seen = (exists & ~apart).repeat(batch, 1, 1, 1)
            else:
                seen = exists.repeat(batch, 1, 1, 1)
                added = apart.repeat(batch, 1, 1, 1) * -100.0
                bias = added if bias is None else bias + added
        q, k, v = (_cut_out(x, padded, window, shift, dilation) for x in (q, k, v))
    else:
        order = (0, 1, 3, 2, 4) if axis == "row" else (0, 2, 3, 1, 4)
        q, k, v = (x.permute(order).flatten(0, 1) for x in (q, k, v))
        window = group_window(axis, height, width, window)
        far = far_pairs(math.prod(window), -1 if span is None else span, no_centre, q.device)
        seen = None if far is None else ~far
    grid = None if table is None else tuple(window)
    if axis == "window":
        out = softmax_attention(q, k, v, bias, seen, bias_table=table, grid=grid, **options)
        return _put_back(out, batch, (height, width), padded, window, shift, dilation), out
    order = (0, 1, 3, 2, 4) if axis == "row" else (0, 3, 1, 2, 4)
    if not return_lse:
        out = softmax_attention(q, k, v, bias, seen, bias_table=table, grid=grid, **options)
        return out.unflatten(0, (batch, -1)).permute(order), out
    out, lse = softmax_attention(q, k, v, bias, seen, bias_table=table, grid=grid, return_lse=True, **options)
    out, lse = (x.unflatten(0, (batch, -1)).permute(order) for x in (out, lse.unsqueeze(-1)))
    return out, lse


def _cut_out(x: torch.Tensor, padded: Sequence[int], window: Pair, shift: Pair, dilation: Pair) -> torch.Tensor:
    """Windows (B x windows, heads, tokens, D) of a map."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, 0, 0, padded[1] - width, 0, padded[0] - height))
    x = x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x
    x = x.unflatten(2, (-1, window[1], dilation[1])).unflatten(1, (-1, window[0], dilation[0]))
    return x.permute(0, 1, 3, 4, 6, 7, 2, 5, 8).flatten(6, 7).flatten(0, 4)


def _put_back(
    x: torch.Tensor, batch: int, size: Pair, padded: Sequence[int], window: Pair, shift: Pair, dilation: Pair
) -> torch.Tensor:
    """The map that windows were cut out of."""
    sizes = (batch, -1, dilation[0], padded[1] // (window[1] * dilation[1]), dilation[1])
    x = x.unflatten(0, sizes).unflatten(6, tuple(window))
    x = x.permute(0, 1, 6, 2, 3, 7, 4, 5, 8).flatten(4, 6).flatten(1, 3)
    x = x.roll(tuple(shift), (1, 2)) if any(shift) else x
    return x[:, : size[0], : size[1]]


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, tables: Tables,
    rng: torch.Tensor | None, layout: str, geometry: tuple, scale: float, dropout_p: float, backend: str,
) -> torch.Tensor:  # fmt: skip
    window, shift, dilation, span, mask_value = geometry
    table, column_table = (None if one is None else one.contiguous() for one in tables)
    options = (
        layout, list(window), list(shift), list(dilation), -1 if span is None else span,
        "-inf" if mask_value == -math.inf else "-100", scale, float(dropout_p),
    )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    if not compiling and not is_plain(q):
        announce_flops()
    transformed = not compiling and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
    needs_grad = _needs_grad(q, k, v, bias, table, column_table)
    if transformed or needs_grad:
        # one tensor in two places may lose a gradient
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
        column_table = None if column_table is None else column_table.view_as(column_table)
    args = (q, k, v, bias, table, column_table, rng, *options)
    if transformed or (compiling and needs_grad):
        return GroupAttentionTransformFunction.apply(*args, backend)[0]
    if needs_grad:
        return GroupAttentionFunction.apply(*args, backend)[0]
    forward = _forward if is_plain(q) else _forward_op
    return forward(*args, False, backend)[0]


# Registration. The implementations receive real tensors and a settled backend.

_library = torch.library.Library("attnk", "FRAGMENT")
_OPTIONS = (
    "str layout, SymInt[] window, SymInt[] shift, SymInt[] dilation, SymInt span, str mask, float scale,"
    " float dropout_p"
)
_library.define(
    "group_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? table, Tensor? column_table,"
    f" Tensor? rng, {_OPTIONS}, bool keep, str backend) -> (Tensor out, Tensor kept)"
)
_library.define(
    "group_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? table,"
    f" Tensor? column_table, Tensor? rng, Tensor? out, Tensor? kept, {_OPTIONS}, bool needs_dq, bool needs_dkv,"
    " bool needs_dbias, bool needs_dtables, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dtable, Tensor dcolumn_table)"
)


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return fallback
    from attnk.kernels import group_attention as kernels

    return kernels


def _forward(q: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad(), implementation_scope(q):
        return _implementation(args[-1]).group_attention_forward(q, *args[:-1])


def _forward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, table: Any, column_table: Any, rng: Any, layout: str,
    window: Any, shift: Any, dilation: Any, span: Any, mask: str, scale: float, dropout_p: float, keep: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out = empty_in_order(q, (*q.shape[:4], v.shape[4]))
    if backend == "torch" and layout != "criss_cross" and keep and fallback.keeps_weights(q, layout, window, dropout_p):
        return out, fallback.weights_empty(q, layout, window, dilation)
    sizes = [*q.shape[:4]]
    if layout == "criss_cross":
        sizes = [2, *sizes] if backend == "torch" else sizes
    elif backend != "torch" or not keep or not fallback.keeps_lse(q, v, layout, window, dropout_p):
        sizes = [0]
    return out, q.new_empty(sizes, dtype=torch.promote_types(q.dtype, torch.float32))


def _backward(dout: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    with torch.no_grad(), implementation_scope(dout):
        return _implementation(args[-1]).group_attention_backward(dout, *args[:-1])


def _backward_fake(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
    table: torch.Tensor | None, column_table: torch.Tensor | None, *args: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    needs_dq, needs_dkv, needs_dbias, needs_dtables = args[-5:-1]
    extras = ((bias, needs_dbias), (table, needs_dtables), (column_table, needs_dtables))
    return (
        *(
            empty_in_order(x, x.shape) if needed else x.new_empty(0)
            for x, needed in ((q, needs_dq), (k, needs_dkv), (v, needs_dkv))
        ),
        *(q.new_empty(0) if x is None or not needed else x.new_empty(x.shape) for x, needed in extras),
    )


for _name, _real, _fake in (
    ("group_attention_forward", _forward, _forward_fake),
    ("group_attention_backward", _backward, _backward_fake),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnk::{_name}", _fake, lib=_library)


_forward_op = torch.ops.attnk.group_attention_forward.default
_backward_op = torch.ops.attnk.group_attention_backward.default


def _pairs(q_shape: Any, layout: str, window: Any) -> int:
    """Pairs of tokens that attend to each other, in a head of a batch."""
    batch, height, width, heads, _ = q_shape
    each = {"row": width, "column": height, "window": window[0] * window[1]}.get(layout, height + width)
    return batch * height * width * heads * each


def _forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of q k^T and of the weights by v."""
    return 2 * _pairs(q_shape, *args[4:6]) * (q_shape[4] + v_shape[4])


def _backward_flops(*args: Any, **kwargs: Any) -> int:
    """FLOPs of q k^T and dout v^T, once, and of the gradients that are wanted."""
    dim, v_dim = args[1][4], args[3][4]
    needs_dq, needs_dkv = args[18:20]
    return 2 * _pairs(args[1], *args[10:12]) * (dim + v_dim + needs_dq * dim + needs_dkv * (dim + v_dim))


declare_flops(torch.ops.attnk.group_attention_forward, _forward_flops)
declare_flops(torch.ops.attnk.group_attention_backward, _backward_flops)


# Autograd. Two flavours of one Function: the plain one costs the least a call; torch.compile and torch.func need the
# other, whose context is set up apart from its forward.

N_TENSORS, N_OPTIONS = 7, 8


def _save(ctx: Any, inputs: Sequence[Any], token: torch.Tensor, kept: Sequence[torch.Tensor]) -> None:
    out, read = kept
    layout, backend = inputs[N_TENSORS], inputs[-1]
    reads = layout == "criss_cross" or backend == "torch"
    has_weights = layout != "criss_cross" and read.dim() == 5  # instead of lse
    ctx.save_for_backward(
        token, *inputs[:N_TENSORS], out if reads and not has_weights else None, read if reads else None
    )
    ctx.options = inputs[N_TENSORS:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    nothing = (None,) * (N_TENSORS + N_OPTIONS + 1)
    if dout is None:
        return nothing
    needs = ctx.needs_input_grad[:6]
    token, *saved = ctx.saved_tensors
    *options, backend = ctx.options
    wanted = (needs[0], needs[1] or needs[2], needs[3], needs[4] or needs[5])
    args = (dout, *saved, *options, *wanted, backend)
    if is_plain(dout) and not torch.is_grad_enabled():
        grads = _backward(*args)
    elif torch.compiler.is_compiling():
        grads = _backward_op(*args)
    else:  # create_graph=True, torch.func, or somebody watching
        grads = GroupAttentionBackwardFunction.apply(*args, token)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *nothing[6:]


class GroupAttentionFunction(torch.autograd.Function):
    """The attention in plain eager mode.

    Besides the output there is a token without elements. A second derivative goes through it, and so fails in words.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, *args: Any) -> Any:
        forward = _forward if is_plain(q) else _forward_op
        kept = forward(q, *args[:-1], True, args[-1])
        token = q.new_empty(0)
        _save(ctx, (q, *args), token, kept)
        return kept[0], token

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, *unused: Any) -> Any:
        return _gradients(ctx, dout)


class GroupAttentionTransformFunction(torch.autograd.Function):
    """The attention under torch.compile, torch.export and torch.func; what is kept are outputs there, and the token."""

    @staticmethod
    def forward(q: torch.Tensor, *args: Any) -> Any:
        return *_forward_op(q, *args[:-1], True, args[-1]), q.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        out, kept, token = output
        ctx.mark_non_differentiable(kept)
        _save(ctx, inputs, token, (out, kept))

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, *unused: Any) -> Any:
        return _gradients(ctx, dout)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        function = GroupAttentionTransformFunction
        # the second image's lse would lie in the first's batch: criss_cross keeps two of them in front
        if in_dims[3:N_TENSORS] == (None,) * 4 and args[6] is None and args[7] != "criss_cross":
            return fold_examples(function, info.batch_size, in_dims, args, (0, 1, 2))
        return each_example(function, info.batch_size, in_dims, args)


class GroupAttentionBackwardFunction(torch.autograd.Function):
    """The backward, itself a Function so that torch.func can map over it and a second backward fails in words.

    Behind the arguments of the backward it takes the token that links it to all inputs of the forward.
    """

    @staticmethod
    def forward(*args: Any) -> Any:
        return _backward_op(*args[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> Any:
        raise NotImplementedError(
            "attnk.group_attention: the fused backward cannot be differentiated again; "
            "backend='reference' (or attnk.use_backend('reference')) can"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        return each_example(GroupAttentionBackwardFunction, info.batch_size, in_dims, args)


# Programs that were exported call the operations by themselves, without the Functions above, and may be trained.


def _setup_raw(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs[:N_TENSORS])
    ctx.options = inputs[N_TENSORS:]


def _backward_raw(ctx: Any, dout: torch.Tensor | None, *unused: Any) -> Any:
    """Gradients of an operation called by itself, as exported programs call it; the forward runs once more."""
    *tensors, rng = ctx.saved_tensors
    *options, _, backend = ctx.options
    with torch.enable_grad():
        leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in tensors]
        out = GroupAttentionFunction.apply(*leaves, rng, *options, backend)[0]
    grads = iter(torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], dout))
    return *(None if leaf is None else next(grads) for leaf in leaves), *(None,) * (3 + N_OPTIONS)


torch.library.register_autograd("attnk::group_attention_forward", _backward_raw, setup_context=_setup_raw, lib=_library)
