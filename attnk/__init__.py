"""Fused attention modules for vision models: exact, with backward, on GPU and CPU."""

from attnk.dispatch import Explanation, Unsupported, explain, use_backend
from attnk.lazy import LAZY, __getattr__  # noqa: F401 (PEP 562)
from attnk.modules.axial import AxialAttention, AxialTransformerBlock, CrissCrossAttention, SeparableSelfAttention
from attnk.modules.c2f import C2f, C2fModule
from attnk.modules.cbam import CBAM
from attnk.modules.channel import ECA, ChannelAttention, EffectiveSE, SELayer
from attnk.modules.coordinate import CoordinateAttention
from attnk.modules.cross_attention import CrossAttention, CrossScaleAttention
from attnk.modules.feature_map import AttentionPool2d, FeatureMapAttention, SAGANAttention
from attnk.modules.gates import BAM, SCSE, GlobalContext, SimAM, SKConv, TripletAttention
from attnk.modules.linear import EfficientAttention, LinearAttention
from attnk.modules.multihead import MultiheadAttention
from attnk.modules.position import LearnedPosition2d, RelativePositionBias, SinusoidalPosition2d, resize_bias_table
from attnk.modules.self_attention import MultiHeadSelfAttention, SelfAttention, SingleHeadSelfAttention
from attnk.modules.spatial import SpatialAttention
from attnk.modules.transformer import TransformerEncoderLayer
from attnk.modules.window import GridAttention, SwinBlock, WindowAttention
from attnk.ops.cbam import cbam
from attnk.ops.channel_gate import channel_gate, channel_pool, scale
from attnk.ops.coordinate_gate import coordinate_gate, coordinate_pool
from attnk.ops.group_attention import axial_attention, group_attention, window_attention
from attnk.ops.linear_attention import linear_attention
from attnk.ops.softmax_attention import softmax_attention
from attnk.ops.spatial_gate import spatial_gate

__version__ = "0.1.0"
__all__ = [
    "BAM", "CBAM", "ECA", "SCSE", "AttentionPool2d", "AxialAttention", "AxialTransformerBlock", "C2f", "C2fModule",
    "ChannelAttention", "CoordinateAttention", "CrissCrossAttention", "CrossAttention", "CrossScaleAttention",
    "EffectiveSE", "EfficientAttention", "Explanation", "FeatureMapAttention", "GlobalContext", "GridAttention",
    "LearnedPosition2d", "LinearAttention", "MultiHeadSelfAttention", "MultiheadAttention", "RelativePositionBias",
    "SAGANAttention", "SELayer", "SKConv", "SelfAttention", "SeparableSelfAttention", "SimAM",
    "SingleHeadSelfAttention", "SinusoidalPosition2d", "SpatialAttention", "SwinBlock", "TransformerEncoderLayer",
    "TripletAttention", "Unsupported", "WindowAttention", "__version__", "axial_attention", "cbam", "channel_gate",
    "channel_pool", "coordinate_gate", "coordinate_pool", "explain", "group_attention", "linear_attention",
    "resize_bias_table", "scale", "softmax_attention", "spatial_gate", "use_backend", "window_attention", *LAZY,
]  # fmt: skip
