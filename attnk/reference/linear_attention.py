"""The definition of linear attention (https://arxiv.org/abs/2006.16236, https://arxiv.org/abs/1812.01243)."""

import torch
import torch.nn.functional as F


def linear_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, feature_map: str = "relu", eps: float = 1e-15
) -> torch.Tensor:
    """``attnk.linear_attention`` as a formula: differentiable any number of times, slow, and the oracle of the tests.

    Args:
        q: (B, heads, Nq, D).
        k: (B, heads, Nk, D).
        v: (B, heads, Nk, Dv).
        feature_map: "relu", "elu" (plus 1) or "softmax" (of queries over features, of keys over tokens).
        eps: added to the denominators; "softmax" has none.

    Returns:
        (B, heads, Nq, Dv). Of half precision, the division is done in float32, as published code does it.
    """
    if feature_map == "softmax":
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)
    queries, keys = (torch.relu(each) if feature_map == "relu" else F.elu(each) + 1 for each in (q, k))
    values = queries @ (keys.mT @ v)
    total = queries @ keys.sum(-2).unsqueeze(-1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (values.to(dtype) / (total.to(dtype) + eps)).to(q.dtype)
