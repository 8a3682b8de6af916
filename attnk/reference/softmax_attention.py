"""The definition of softmax attention (https://arxiv.org/abs/1706.03762)."""

import torch


def softmax_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    keep: torch.Tensor | None = None,
    bias_table: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``attnk.softmax_attention`` as a formula: differentiable any number of times, N x N in memory, the tests' oracle.

    Args:
        q: (B, heads, Nq, D).
        k: (B, heads or a divisor of it, Nk, D).
        v: (B, heads of k, Nk, Dv).
        bias: broadcasts to (B, heads, Nq, Nk); added to the logits.
        mask: bool, broadcasts alike; True = attend.
        scale: of the logits; D ** -0.5 when None.
        is_causal: whether query i sees the keys up to i alone.
        dropout_p: share of the weights to drop; the others grow by 1 / (1 - dropout_p).
        keep: bool (B, heads, Nq, Nk), the weights that are not dropped; drawn when None.
        bias_table: ((2 height - 1) (2 width - 1), heads), the bias by relative position; with ``grid``.
        grid: (height, width) of the tokens.

    Returns:
        out (B, heads, Nq, Dv), 0 where a query sees no key; lse (B, heads, Nq), the logarithm of the sum of the
        exponentials of the logits, in float32 or wider, -inf there.
    """
    heads, group = q.shape[1], q.shape[1] // max(k.shape[1], 1)
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if bias_table is not None and grid is not None:
        table = bias_table[relative_position_index(*grid, bias_table.device)]
        logits = logits + table.view(*logits.shape[-2:], heads).permute(2, 0, 1).to(logits.dtype)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if is_causal:
        logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -torch.inf)
    unseeing = (logits == -torch.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(unseeing, 0)
    weights = logits.softmax(-1).masked_fill(unseeing, 0)
    lse = logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1)
    lse = lse.masked_fill(unseeing.squeeze(-1), -torch.inf)
    if dropout_p > 0:
        keep = torch.rand(weights.shape, device=q.device) >= dropout_p if keep is None else keep
        weights = torch.where(keep, weights / (1 - dropout_p), 0) if dropout_p < 1 else weights * 0
    return weights @ v, lse


def relative_position_index(height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """The row of a bias table that each pair of tokens on a grid reads, query by key: (N * N,) int64, N = height width.

    The order is Swin's (https://arxiv.org/abs/2103.14030): query's position less key's, made positive, rows first.
    """
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    down = rows[:, None] - rows[None, :] + height - 1
    right = columns[:, None] - columns[None, :] + width - 1
    return (down * (2 * width - 1) + right).flatten()
