"""The networks of widely copied tutorials: repaired by default, as published with ``compat="original"``."""

from attnk.models.classifiers import MultiHeadSelfAttentionClassifier, SelfAttentionClassifier
from attnk.models.common import count_parameters
from attnk.models.resnet import BottleneckWithAttention, ResNetWithAttention, resnet50_with_attention
from attnk.models.senet import SENet
from attnk.models.vgg import (
    VGG16WithAttention,
    VGG16WithSpatialAttention,
    remap_state_dict,
    vgg16_with_attention,
    vgg16_with_spatial_attention,
)
from attnk.models.vit import ViT, ViTBlock

__all__ = [
    "BottleneckWithAttention",
    "MultiHeadSelfAttentionClassifier",
    "ResNetWithAttention",
    "SENet",
    "SelfAttentionClassifier",
    "VGG16WithAttention",
    "VGG16WithSpatialAttention",
    "ViT",
    "ViTBlock",
    "count_parameters",
    "remap_state_dict",
    "resnet50_with_attention",
    "vgg16_with_attention",
    "vgg16_with_spatial_attention",
]
