"""The definition of CBAM (https://arxiv.org/abs/1807.06521): a channel gate, and a spatial gate on what it leaves."""

from collections.abc import Callable

import torch

from attnk.reference.channel_gate import Mlp, channel_gate_reference
from attnk.reference.spatial_gate import spatial_gate_reference


def cbam_reference(
    x: torch.Tensor,
    mlp: Mlp,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pool: str = "avg_max",
    gate: str | Callable[[torch.Tensor], torch.Tensor] = "sigmoid",
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    order: str = "avg_max",
    output: str = "gated",
    ties: str = "first",
) -> torch.Tensor:
    """``attnk.cbam`` as a formula: differentiable any number of times, slow, and the oracle of the tests.

    Args:
        x: (B, C, H, W).
        mlp: a callable on (B, C), or (w1, b1, w2, b2).
        weight: (1, 2, k, k).
        bias: (1,) or None.
        pool: "avg", "max", "avg_max" or "half_sum", of the channel half.
        gate: "sigmoid", "hard_sigmoid" or a callable, of the channel half.
        norm: a batch norm between the spatial convolution and its sigmoid, called on (B, 1, H, W), or None.
        order: which pooled map meets weight[:, 0]: "avg_max" or "max_avg".
        output: "gated", "residual" (plus x itself, before any gate), "map" or "logit".
        ties: who has the gradient of equal maxima, of pixels and of channels: the "first", or all, in "even" parts.

    Returns:
        (B, C, H, W), or (B, 1, H, W) for "map" and "logit".
    """
    y = channel_gate_reference(x, mlp, pool=pool, gate=gate, ties=ties)
    logit = spatial_gate_reference(y, weight, bias, order=order, output="logit", ties=ties)
    if norm is not None:
        logit = norm(logit)
    if output == "logit":
        return logit
    spatial = torch.sigmoid(logit)
    if output == "map":
        return spatial
    return y * spatial + x if output == "residual" else y * spatial
