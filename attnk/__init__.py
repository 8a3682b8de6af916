"""Fused attention modules for vision models: exact, with backward, on GPU and CPU."""

from attnk.dispatch import Explanation, Unsupported, explain, use_backend
from attnk.modules.axial import AxialAttention, AxialTransformerBlock, CrissCrossAttention, SeparableSelfAttention
from attnk.modules.cross_attention import CrossAttention, CrossScaleAttention
from attnk.modules.feature_map import AttentionPool2d, FeatureMapAttention, SAGANAttention
from attnk.modules.linear import EfficientAttention, LinearAttention
from attnk.modules.multihead import MultiheadAttention
from attnk.modules.position import LearnedPosition2d, RelativePositionBias, SinusoidalPosition2d, resize_bias_table
from attnk.modules.self_attention import MultiHeadSelfAttention, SelfAttention, SingleHeadSelfAttention
from attnk.modules.spatial import SpatialAttention
from attnk.modules.transformer import TransformerEncoderLayer
from attnk.modules.window import GridAttention, SwinBlock, WindowAttention
from attnk.ops.group_attention import axial_attention, group_attention, window_attention
from attnk.ops.linear_attention import linear_attention
from attnk.ops.softmax_attention import softmax_attention
from attnk.ops.spatial_gate import spatial_gate

__version__ = "0.1.0"

__all__ = [
    "AttentionPool2d", "AxialAttention", "AxialTransformerBlock", "CrissCrossAttention", "CrossAttention",
    "CrossScaleAttention", "EfficientAttention", "Explanation", "FeatureMapAttention", "GridAttention",
    "LearnedPosition2d", "LinearAttention", "MultiHeadSelfAttention", "MultiheadAttention", "RelativePositionBias",
    "SAGANAttention", "SelfAttention", "SeparableSelfAttention", "SingleHeadSelfAttention", "SinusoidalPosition2d",
    "SpatialAttention", "SwinBlock", "TransformerEncoderLayer", "Unsupported", "WindowAttention", "__version__",
    "axial_attention", "explain", "group_attention", "linear_attention", "resize_bias_table", "softmax_attention",
    "spatial_gate", "use_backend", "window_attention",
]  # fmt: skip
