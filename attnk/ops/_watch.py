"""Who looks on: ``attnk.capture`` is told of gates and of what attention is computed from.

Operations ask ``if watchers:`` before they tell, so that nothing is spent while nobody looks.
"""

from collections.abc import Callable
from typing import Any

watchers: list[Callable[[str, dict[str, Any]], None]] = []


def tell(kind: str, **what: Any) -> None:
    """Tell everyone who looks on.

    Args:
        kind: "spatial_gate", "channel_gate" and "coordinate_gate", with their gates; "softmax_attention", with its
            arguments; "group_attention" and "linear_attention", with ``attend``, which takes q, k and other values.
        what: tensors, still part of the graph, or functions that compute them.
    """
    for watcher in list(watchers):
        watcher(kind, what)
