"""What the tests of softmax attention share: arguments in every layout, the definition, and small blocks."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import attnk
from attnk.fallback import softmax_attention as fallback
from attnk.reference.softmax_attention import relative_position_index, softmax_attention_reference
from attnk.testing import assert_matches_reference

KERNELS = "attnk.kernels.softmax_attention"
SEED = torch.tensor([0x1234_5678_9ABC_DEF0 // 2, 7])

Inputs = dict[str, torch.Tensor | None]


def draw(
    tokens: tuple[int, int] = (17, 20),
    dim: int = 8,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    batch: int = 2,
    heads: int = 2,
    key_heads: int | None = None,
    bias: tuple[int, ...] | None = None,
    grid: tuple[int, int] | None = None,
    layouts: str | tuple[str, str, str] = "contiguous",
) -> Inputs:
    """Random q, k and v, and where asked for a bias of this shape and a bias table for this grid."""
    n_queries, n_keys = tokens
    shapes = {
        "q": (batch, heads, n_queries, dim),
        "k": (batch, key_heads or heads, n_keys, dim),
        "v": (batch, key_heads or heads, n_keys, dim if v_dim is None else v_dim),
    }
    layouts = (layouts,) * 3 if isinstance(layouts, str) else layouts
    inputs: Inputs = {
        name: arranged(torch.randn(shape, dtype=torch.float64).to(device, dtype), layout)
        for (name, shape), layout in zip(shapes.items(), layouts, strict=True)
    }
    if bias is not None:
        inputs["bias"] = torch.randn(bias, dtype=torch.float64).to(device, dtype)
    if grid is not None:
        entries = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        inputs["bias_table"] = torch.randn(entries, heads, dtype=torch.float64).to(device, dtype)
    return inputs


def draw_mask(*shape: int, device: str = "cpu") -> torch.Tensor:
    """A mask that hides some keys, and every key from one query where it has rows."""
    mask = torch.rand(shape) < 0.6
    mask[..., :2] = True  # two keys: of one alone, what q and k get is nothing but rounding
    if len(shape) > 1 and shape[-2] > 2:
        mask[..., 1, :] = False
    return mask.to(device)


def arranged(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of a (B, heads, N, D) tensor as they lie in memory elsewhere, NaN around them.

    All hold the values of x but the expanded ones, which repeat those of the first image or head.
    """
    batch, heads, tokens, dim = x.shape
    if layout in ORDERS_OF_AXES:
        order = ORDERS_OF_AXES[layout]
        return x.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])
    if layout == "packed":  # the second of what one projection gave
        packed = x.new_full((batch, tokens, 3, heads, dim), math.nan)
        packed[:, :, 1] = x.transpose(1, 2)
        return packed[:, :, 1].transpose(1, 2)
    if layout == "packed_map":  # the same of a feature map
        packed = x.new_full((batch, 3, heads, dim, tokens), math.nan)
        packed[:, 1] = x.mT
        return packed[:, 1].mT
    if layout == "crop":
        larger = x.new_full((batch, heads, tokens + 3, dim + 4), math.nan)
        larger[:, :, 1 : tokens + 1, 2 : dim + 2] = x
        return larger[:, :, 1 : tokens + 1, 2 : dim + 2]
    if layout == "step_2":
        wide = x.new_full((batch, heads, tokens, 2 * dim), math.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset_1":
        longer = x.new_full((x.numel() + 1,), math.nan)
        longer[1:] = x.flatten()
        return longer[1:].view(x.shape)
    return x[:1].expand(x.shape) if layout == "expanded" else x[:, :1].expand(x.shape)


# the axes from the outermost in memory to the innermost
ORDERS_OF_AXES = {
    "contiguous": (0, 1, 2, 3),
    "tokens_outside": (0, 2, 1, 3),
    "sequence_first": (2, 0, 1, 3),
    "channel_major": (0, 1, 3, 2),
    "heads_innermost": (0, 2, 3, 1),
}
ORDERS_OF_RESULTS = ORDERS_OF_AXES | {
    "packed": (0, 2, 1, 3),
    "packed_map": (0, 1, 3, 2),
    "crop": (0, 1, 2, 3),
    "step_2": (0, 1, 2, 3),
    "offset_1": (0, 1, 2, 3),
    "expanded": (0, 1, 2, 3),
    "heads_expanded": (1, 0, 2, 3),
}
LAYOUTS = tuple(ORDERS_OF_RESULTS)


@contextlib.contextmanager
def cut(backend: str, block_m: int = 16, block_n: int = 16, elements: int = 100) -> Iterator[None]:
    """Every call inside is cut up small: the kernels' tiles, and the blocks of logits in PyTorch."""
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            from attnk.kernels.tuning import SoftmaxAttentionConfig, Tile

            tile = Tile(block_m, block_n, num_warps=4, num_stages=1)
            config = SoftmaxAttentionConfig(tile, tile, tile, tile)
            stack.enter_context(mock.patch(f"{KERNELS}.common.softmax_attention_config", return_value=config))
        for name in ("CPU_BLOCK_ELEMENTS", "BLOCK_ELEMENTS"):
            stack.enter_context(mock.patch.object(fallback, name, elements))
        yield


def kept(backend: str, inputs: Inputs, **options: Any) -> torch.Tensor | None:
    """Which weights a call drops, by way of values that show them: (B, heads, Nq, Nk), or None without dropout."""
    if not options.get("dropout_p"):
        return None
    q, k = (torch.zeros_like(inputs[name], dtype=torch.float32) for name in ("q", "k"))
    shown = torch.eye(k.shape[2], device=k.device).expand(*k.shape[:3], -1)
    table = inputs.get("bias_table")
    options = {name: options.get(name) for name in ("dropout_p", "seed", "grid")} | {"enable_gqa": True}
    if table is not None:
        options["bias_table"] = torch.zeros_like(table)
    return attnk.softmax_attention(q, k, shown, backend=backend, **options) != 0


def picked(results: Any, returns: str) -> torch.Tensor:
    """Out, lse, or both in one tensor."""
    if returns == "out":
        return results if isinstance(results, torch.Tensor) else results[0]
    out, lse = results
    return lse if returns == "lse" else torch.cat([out.to(lse.dtype), lse.unsqueeze(-1)], -1)


def fused(backend: str, returns: str = "out", **options: Any) -> Callable[..., torch.Tensor]:
    """The operation, called with tensors by name."""
    return lambda **tensors: picked(
        attnk.softmax_attention(**tensors, **options, return_lse=returns != "out", backend=backend), returns
    )


def definition(
    returns: str = "out", keep: torch.Tensor | None = None, lse_rounds: bool = True, **options: Any
) -> Callable[..., torch.Tensor]:
    """The definition, called with tensors by name.

    What it rounds in float32 sets what is allowed: with ``lse_rounds`` that of ``by_way_of_lse``.
    """
    options = {name: value for name, value in options.items() if name not in ("enable_gqa", "seed")}

    def function(**tensors: Any) -> torch.Tensor:
        rounded = lse_rounds and all(tensor is None or tensor.dtype != torch.float64 for tensor in tensors.values())
        attention = by_way_of_lse if rounded else softmax_attention_reference
        return picked(attention(**tensors, **options, keep=keep), returns)

    return function


def by_way_of_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    keep: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition as those who stream must compute it, whose rounding is felt in small tensors.

    Weights come from lse and from logits that are computed once more, their products added up in another order.
    """
    out, lse = softmax_attention_reference(q, k, v, bias, mask, dropout_p=dropout_p, keep=keep, **options)
    if 0 in out.shape or q.dtype != torch.float32:
        return out, lse
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    scale, table = options.get("scale"), options.get("bias_table")
    logits = q.flip(-1) @ k.flip(-1).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias
    if table is not None:
        places = relative_position_index(*options["grid"], table.device)
        logits = logits + table[places].view(*logits.shape[-2:], -1).permute(2, 0, 1)
    seen = torch.ones_like(logits, dtype=torch.bool)
    seen = seen.tril() if options.get("is_causal") else seen
    seen = seen if mask is None else seen & mask
    logits = logits.masked_fill(~seen, -torch.inf)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
    if dropout_p > 0:
        weights = torch.where(keep, weights * (1 / (1 - dropout_p) if dropout_p < 1 else 0), 0)
    return weights @ v, lse


def check(
    backend: str,
    inputs: Inputs,
    *,
    returns: str = "out",
    grads: Any = None,
    dout: Any = None,
    lse_rounds: bool = True,
    **options: Any,
) -> None:
    """Values and gradients against the definition."""
    expected = definition(returns, kept(backend, inputs, **options), lse_rounds, **options)
    assert_matches_reference(fused(backend, returns, **options), expected, inputs, grads=grads, dout=dout)


def run(backend: str, inputs: Inputs, **options: Any) -> list[torch.Tensor]:
    """The output and all gradients, for comparing bits."""
    leaves = {name: None if tensor is None else tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out = fused(backend, **options)(**leaves)
    dout = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves.values() if leaf is not None], dout)]
