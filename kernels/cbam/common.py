"""What the kernels of CBAM share: the gated product, loads of one number a channel, and what launches take."""

import torch
import triton
import triton.language as tl

from ..spatial_gate.common import plan
from ..tiles import over_pixels
from ..tuning import SpatialGateConfig, architecture, cbam_config


@triton.jit
def load_channels(ptr, offs_c, channels, WHOLE: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """One number a channel, ready to broadcast over the pixels of a tile."""
    if WHOLE:
        return over_pixels(tl.load(ptr + offs_c), CHANNELS_LAST)
    else:
        return over_pixels(tl.load(ptr + offs_c, mask=offs_c < channels, other=0.0), CHANNELS_LAST)


@triton.jit
def gated(x, gates, ACC: tl.constexpr):
    """y = x * gate, rounded to the dtype of x, in the accumulators'."""
    return (x.to(ACC) * gates.to(ACC)).to(x.dtype).to(ACC)


def cbam_plan(
    like: torch.Tensor, channels: int, height: int, width: int, strides: tuple[int, ...], channels_last: bool,
    config: SpatialGateConfig | None,
):  # fmt: skip
    """Sizes, strides and constexprs of every launch over tiles."""
    config = config or cbam_config(
        architecture(like.device), itemsize=like.element_size(), pixels=height * width, channels_last=channels_last
    )
    _, sizes, strides, options = plan(like, channels, height, width, strides, channels_last, config)
    options["BLOCK_C"] *= options.pop("STEPS")
    return sizes, strides, options
