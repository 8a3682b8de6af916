"""Fused attention modules for vision models: exact, with backward, on GPU and CPU."""

from attnk.dispatch import Explanation, Unsupported, explain, use_backend
from attnk.modules.cross_attention import CrossAttention, CrossScaleAttention
from attnk.modules.feature_map import AttentionPool2d, FeatureMapAttention, SAGANAttention
from attnk.modules.multihead import MultiheadAttention
from attnk.modules.position import LearnedPosition2d, RelativePositionBias, SinusoidalPosition2d, resize_bias_table
from attnk.modules.self_attention import MultiHeadSelfAttention, SelfAttention, SingleHeadSelfAttention
from attnk.modules.spatial import SpatialAttention
from attnk.modules.transformer import TransformerEncoderLayer
from attnk.ops.softmax_attention import softmax_attention
from attnk.ops.spatial_gate import spatial_gate

__version__ = "0.1.0"

__all__ = [
    "AttentionPool2d", "CrossAttention", "CrossScaleAttention", "Explanation", "FeatureMapAttention",
    "LearnedPosition2d", "MultiHeadSelfAttention", "MultiheadAttention", "RelativePositionBias", "SAGANAttention",
    "SelfAttention", "SingleHeadSelfAttention", "SinusoidalPosition2d", "SpatialAttention", "TransformerEncoderLayer",
    "Unsupported", "__version__", "explain", "resize_bias_table", "softmax_attention", "spatial_gate", "use_backend",
]  # fmt: skip
