"""The definition of the channel gate (https://arxiv.org/abs/1709.01507, https://arxiv.org/abs/1807.06521)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

Mlp = Callable[[torch.Tensor], torch.Tensor] | Sequence[torch.Tensor | None]


def channel_gate_reference(
    x: torch.Tensor,
    mlp: Mlp,
    *,
    pool: str = "avg",
    gate: str | Callable[[torch.Tensor], torch.Tensor] = "sigmoid",
    ties: str = "first",
) -> torch.Tensor:
    """``attnk.channel_gate`` as a formula: differentiable any number of times, slow, and the oracle of the tests.

    Args:
        x: (B, C, ...).
        mlp: a callable on (B, C), or (w1, b1, w2, b2).
        pool: "avg", "max", "avg_max" or "half_sum".
        gate: "sigmoid", "hard_sigmoid" or a callable.
        ties: who has the gradient of equal maxima: the "first" pixel, or all, in "even" parts.

    Returns:
        x * gate, of x's shape and dtype.
    """
    avg, peak = channel_pool_reference(x, ties=ties)
    return scale_reference(x, gate_of(avg, peak, mlp, pool, gate))


def channel_pool_reference(x: torch.Tensor, *, ties: str = "first") -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and maximum (B, C) over the pixels of x (B, C, ...); both 0 where there are none."""
    pixels = x.flatten(2)
    if pixels.shape[2] == 0:
        return pixels.sum(2), pixels.sum(2)
    return pixels.mean(2), pixels.max(2).values if ties == "first" else pixels.amax(2)


def scale_reference(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x (B, C, ...) times its gate (B, C), in x's dtype."""
    return x * gate.to(x.dtype).reshape(*x.shape[:2], *(1 for _ in x.shape[2:]))


def gate_of(
    avg: torch.Tensor | None,
    peak: torch.Tensor | None,
    mlp: Mlp,
    pool: str,
    gate: str | Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The gate from what was pooled; what the pool does not name is not read."""

    def network(pooled: torch.Tensor | None) -> torch.Tensor:
        assert pooled is not None
        return mlp(pooled) if callable(mlp) else two_layers(pooled, *mlp)  # type: ignore[arg-type]

    if pool == "avg_max":
        logit = network(avg) + network(peak)
    elif pool == "half_sum":
        assert avg is not None
        assert peak is not None
        logit = network((avg + peak) / 2)
    else:
        logit = network(avg if pool == "avg" else peak)
    if callable(gate):
        return gate(logit)
    return torch.sigmoid(logit) if gate == "sigmoid" else F.hardsigmoid(logit)


def two_layers(
    pooled: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None
) -> torch.Tensor:
    """w2 relu(w1 pooled + b1) + b2, with weights of linear layers or of convolutions of size 1."""
    return F.linear(F.relu(F.linear(pooled, w1.flatten(1), b1)), w2.flatten(1), b2)
