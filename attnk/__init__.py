"""Fused attention modules for vision models: exact, with backward, on GPU and CPU."""

from attnk.dispatch import Explanation, Unsupported, explain, use_backend
from attnk.modules.spatial import SpatialAttention
from attnk.ops.spatial_gate import spatial_gate

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "SpatialAttention",
    "Unsupported",
    "__version__",
    "explain",
    "spatial_gate",
    "use_backend",
]
