"""The definition of the spatial gate (the spatial half of CBAM, https://arxiv.org/abs/1807.06521)."""

import torch
import torch.nn.functional as F


def spatial_gate_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    order: str = "avg_max",
    output: str = "gated",
    ties: str = "first",
) -> torch.Tensor:
    """``attnk.spatial_gate`` as a formula: differentiable any number of times, slow, and the oracle of the tests.

    Args:
        x: (B, C, H, W).
        weight: (1, 2, k, k).
        bias: (1,) or None.
        order: which pooled map meets weight[:, 0]: "avg_max" or "max_avg".
        output: "map", "gated", "residual" or "logit".
        ties: who has the gradient of equal maxima: the "first" channel, or all, in "even" parts.

    Returns:
        (B, C, H, W), or (B, 1, H, W) for "map" and "logit".
    """
    avg = x.mean(1, keepdim=True)
    peak = x.max(1, keepdim=True).values if ties == "first" else x.amax(1, keepdim=True)
    pooled = torch.cat([avg, peak] if order == "avg_max" else [peak, avg], 1)
    if x.numel():
        logit = F.conv2d(pooled, weight.to(pooled.dtype), None if bias is None else bias.to(pooled.dtype),
                         padding=int(weight.shape[-1]) // 2)  # fmt: skip
    else:  # conv2d refuses an empty plane; zero gradients still reach the weight
        logit = avg + weight.sum() * 0 + (0 if bias is None else bias.sum() * 0)
    if output == "logit":
        return logit
    gate = torch.sigmoid(logit)
    if output == "map":
        return gate
    return x * gate + x if output == "residual" else x * gate
