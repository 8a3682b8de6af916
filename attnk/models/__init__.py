"""The networks that widely copied tutorials show or describe.

Those they show are repaired by default, and as published with ``compat="original"``.
"""

from attnk.models.axial_resnet import AxialBottleneck, AxialResNet, axial_resnet26, axial_resnet50
from attnk.models.classifiers import MultiHeadSelfAttentionClassifier, SelfAttentionClassifier
from attnk.models.common import count_parameters
from attnk.models.detr import DETR, DETRLoss, generalized_box_iou, hungarian_match
from attnk.models.fpn import FeaturePyramid
from attnk.models.resnet import BottleneckWithAttention, ResNetWithAttention, resnet50_with_attention
from attnk.models.sagan import (
    SAGANDiscriminator,
    SAGANDiscriminatorBlock,
    SAGANGenerator,
    SAGANGeneratorBlock,
    sagan_discriminator_loss,
    sagan_generator_loss,
)
from attnk.models.senet import SENet
from attnk.models.swin import SwinTransformer, swin_tiny
from attnk.models.vgg import (
    VGG16WithAttention,
    VGG16WithSpatialAttention,
    remap_state_dict,
    vgg16_with_attention,
    vgg16_with_spatial_attention,
)
from attnk.models.vit import ViT, ViTBlock

__all__ = [
    "DETR",
    "AxialBottleneck",
    "AxialResNet",
    "BottleneckWithAttention",
    "DETRLoss",
    "FeaturePyramid",
    "MultiHeadSelfAttentionClassifier",
    "ResNetWithAttention",
    "SAGANDiscriminator",
    "SAGANDiscriminatorBlock",
    "SAGANGenerator",
    "SAGANGeneratorBlock",
    "SENet",
    "SelfAttentionClassifier",
    "SwinTransformer",
    "VGG16WithAttention",
    "VGG16WithSpatialAttention",
    "ViT",
    "ViTBlock",
    "axial_resnet26",
    "axial_resnet50",
    "count_parameters",
    "generalized_box_iou",
    "hungarian_match",
    "remap_state_dict",
    "resnet50_with_attention",
    "sagan_discriminator_loss",
    "sagan_generator_loss",
    "swin_tiny",
    "vgg16_with_attention",
    "vgg16_with_spatial_attention",
]
