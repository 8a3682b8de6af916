"""Further gates of feature maps: GC, SimAM, scSE, triplet attention, BAM, selective kernels."""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from attnk import dispatch
from attnk.modules._checks import as_batch, backend_repr, check_kernel_size, check_positive, check_sizes, without_batch
from attnk.modules._probe import rename
from attnk.modules.channel import reduced_channels
from attnk.modules.spatial import SpatialAttention
from attnk.ops._checks import check_choice, check_feature_map
from attnk.ops.channel_gate import channel_pool, scale

FUSIONS = ("add", "scale", "scale_add")
COMBINATIONS = ("sum", "product")


class _Module(nn.Module):
    """What the modules below share: a number of channels, a reduction, a backend."""

    def __init__(self, channels: int, reduction: float, backend: str | None, /, **sizes: int) -> None:
        super().__init__()
        check_sizes(**sizes)
        check_positive(reduction=reduction)
        if backend is not None:
            dispatch.check_backend(backend)
        self.channels = channels
        self.backend = backend

    def _as_batch(self, x: torch.Tensor) -> torch.Tensor:
        return as_batch(x, next(self.parameters()), self.channels)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return backend_repr(self.backend).removeprefix(", ")


class _LayerNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C); weights (C, 1, 1), as the published ones are, load too."""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for key in (f"{prefix}weight", f"{prefix}bias"):
            if key in state_dict:
                state_dict[key] = state_dict[key].flatten()
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Transform(nn.Module):
    """The bottleneck of a global context: linear, layer norm, ReLU, linear; 1 x 1 convolutions load too."""

    def __init__(self, channels: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.norm = _LayerNorm(hidden, eps=eps)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.norm(self.fc1(context))))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for old, new in (("0", "fc1"), ("1", "norm"), ("3", "fc2")):  # the published are Sequentials
            rename(state_dict, prefix, [old], new)
        for key in (f"{prefix}fc1.weight", f"{prefix}fc2.weight"):
            if key in state_dict:
                state_dict[key] = state_dict[key].flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class GlobalContext(_Module):
    """The global context block (Cao et al., GCNet, 2019, https://arxiv.org/abs/1904.11492).

    ``context = sum over pixels of x * softmax(conv_attn(x))``, a vector (B, C); then
    ``fc2(relu(layer_norm(fc1(context))))`` is added to every pixel, or, through a sigmoid, scales it, or both, scaling
    first.

    Keys are timm's: ``conv_attn.*``, ``mlp_add.{fc1,norm,fc2}.*``, ``mlp_scale.*``. The published keys
    (``conv_mask.*``, ``channel_add_conv.{0,1,3}.*``, ``channel_mul_conv.*``) load too. As published, ``fc2`` starts at
    0, so that the block starts as the identity (for "scale", as one half).

    Args:
        channels: C, channels of x.
        reduction: the hidden layer has ``channels // reduction`` channels, at least one.
        fusion: "add" (the paper's), "scale" (timm's default) or "scale_add".
        attend: whether the context is a weighted mean; False for the plain mean.
        eps: of the layer norm; timm's is 1e-6.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, or an unknown option.
    """

    def __init__(
        self,
        channels: int,
        reduction: float = 8,
        *,
        fusion: str = "add",
        attend: bool = True,
        eps: float = 1e-5,
        backend: str | None = None,
    ) -> None:
        super().__init__(channels, reduction, backend, channels=channels)
        check_choice("fusion", fusion, FUSIONS)
        hidden = reduced_channels(channels, reduction, None)
        self.fusion = fusion
        self.conv_attn = nn.Conv2d(channels, 1, 1) if attend else None
        self.mlp_add = _Transform(channels, hidden, eps) if fusion != "scale" else None
        self.mlp_scale = _Transform(channels, hidden, eps) if fusion != "add" else None
        if self.conv_attn is not None:
            nn.init.kaiming_normal_(self.conv_attn.weight, mode="fan_in")
        for transform in (self.mlp_add, self.mlp_scale):
            if transform is not None:
                nn.init.zeros_(transform.fc2.weight)
                nn.init.zeros_(transform.fc2.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) or (C, H, W) to the same shape.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        out = batch = self._as_batch(x)
        target: Any = batch
        if self.conv_attn is None:
            target = channel_pool(batch, "avg", backend=self.backend)
            context = target.avg
        else:
            weights = torch.softmax(self.conv_attn(batch).flatten(2), -1)  # (B, 1, H W)
            pixels = batch.movedim(1, -1).flatten(1, 2)  # (B, H W, C), a view in both memory formats
            context = torch.matmul(weights.to(x.dtype), pixels).squeeze(1)
        if self.mlp_scale is not None:
            out = scale(target, torch.sigmoid(self.mlp_scale(context)), backend=self.backend)
        if self.mlp_add is not None:
            out = out + self.mlp_add(context)[:, :, None, None]
        return without_batch(out, x)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        rename(state_dict, prefix, ["conv_mask"], "conv_attn")
        for old, new in (("channel_add_conv", "mlp_add"), ("channel_mul_conv", "mlp_scale")):
            for index in ("0", "1", "3"):
                rename(state_dict, prefix, [f"{old}.{index}"], f"{new}.{index}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class SimAM(nn.Module):
    """Attention without parameters (Yang et al., SimAM, 2021, http://proceedings.mlr.press/v139/yang21o.html).

    With the mean and the variance of a channel over its n pixels, the variance's divisor being n - 1:
    ``x * sigmoid((x - mean)^2 / (4 (variance + e_lambda)) + 0.5)``. One pixel has no variance: it counts as 0.

    Args:
        e_lambda: keeps the quotient finite.

    Raises:
        ValueError: an ``e_lambda`` that is not positive.
    """

    def __init__(self, *, e_lambda: float = 1e-4) -> None:
        super().__init__()
        check_positive(e_lambda=e_lambda)
        self.e_lambda = e_lambda

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) or (C, H, W) to the same shape.

        Raises:
            ValueError, TypeError: a shape or dtype that does not fit; the message names it.
        """
        check_feature_map("x", x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares and their sum may be beyond float16
        deviation = (wide - wide.mean((-2, -1), keepdim=True)) ** 2
        pixels = x.shape[-2] * x.shape[-1]
        variance = deviation.sum((-2, -1), keepdim=True) / max(pixels - 1, 1)
        return x * torch.sigmoid(deviation / (4 * (variance + self.e_lambda)) + 0.5).to(x.dtype)

    def extra_repr(self) -> str:
        """The option."""
        return f"e_lambda={self.e_lambda}"


class SCSE(_Module):
    """Spatial and channel squeeze-and-excitation (Roy et al., 2018, https://arxiv.org/abs/1803.02579).

    ``x * sigmoid(fc2(relu(fc1(mean over pixels)))) + x * sigmoid(conv(x))``, a gate for every channel and, from a 1 x 1
    convolution, one for every pixel. Keys are segmentation_models_pytorch's: ``cSE.{1,3}.*``, ``sSE.0.*``.

    Args:
        in_channels: C, channels of x.
        reduction: the hidden layer has ``in_channels // reduction`` channels, at least one.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer.
    """

    def __init__(self, in_channels: int, reduction: float = 16, *, backend: str | None = None) -> None:
        super().__init__(in_channels, reduction, backend, in_channels=in_channels)
        hidden = reduced_channels(in_channels, reduction, None)
        self.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, in_channels, 1),
            nn.Sigmoid(),
        )
        self.sSE = nn.Sequential(nn.Conv2d(in_channels, 1, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) or (C, H, W) to the same shape.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        batch = self._as_batch(x)
        pooled = channel_pool(batch, "avg", backend=self.backend)
        assert pooled.avg is not None
        gate = self.cSE[1:](pooled.avg[:, :, None, None])
        return without_batch(scale(pooled, gate, backend=self.backend) + batch * self.sSE(batch).to(batch.dtype), x)


class TripletAttention(nn.Module):
    """Triplet attention (Misra et al., Rotate to Attend, 2021, https://arxiv.org/abs/2010.03045).

    The mean of three spatial gates ``x * sigmoid(bn(conv([max, mean])))``: one pools over the height, one over the
    width and one over the channels; each is ``attnk.SpatialAttention`` on a permuted map. Strict loading takes the
    published keys (``cw.conv.conv.weight``, ``cw.conv.bn.*``, ``hc.*``, ``hw.*``); saved are ``cw.conv1.weight``,
    ``cw.bn.*`` and so on.

    Args:
        kernel_size: side of the three convolutions, odd.
        spatial: whether there is the third gate, over the channels.
        ties: which of equal maxima has the gradient: "first" or "even".
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: an even kernel size or an unknown option.
    """

    def __init__(
        self, kernel_size: int = 7, *, spatial: bool = True, ties: str = "first", backend: str | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        check_kernel_size(kernel_size)
        options: dict[str, Any] = {"order": "max_avg", "output": "gated", "norm": True, "ties": ties}
        self.cw = SpatialAttention(kernel_size, backend=backend, **options)
        self.hc = SpatialAttention(kernel_size, backend=backend, **options)
        self.hw = SpatialAttention(kernel_size, backend=backend, **options) if spatial else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) or (C, H, W) to the same shape, in x's memory format.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_feature_map("x", x)
        batch = x if x.dim() == 4 else x.unsqueeze(0)
        out = self.cw(batch.transpose(1, 2)).transpose(1, 2) + self.hc(batch.transpose(1, 3)).transpose(1, 3)
        out = out / 2 if self.hw is None else (self.hw(batch) + out) / 3
        return without_batch(out, x)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name in ("cw", "hc", "hw"):
            rename(state_dict, prefix, [f"{name}.conv.conv"], f"{name}.conv1")
            rename(state_dict, prefix, [f"{name}.conv.bn"], f"{name}.bn")
        super()._load_from_state_dict(state_dict, prefix, *args)


class BAM(_Module):
    """The bottleneck attention module (Park et al., 2018, https://arxiv.org/abs/1807.06514).

    ``x * (1 + sigmoid(channel + spatial))``. ``channel`` (B, C, 1, 1) is linear, batch norm, ReLU, linear of the mean
    over pixels; ``spatial`` (B, 1, H, W) is a 1 x 1 convolution to ``C // reduction``, dilated 3 x 3 convolutions, each
    with batch norm and ReLU, and a 1 x 1 convolution to one map. Keys are the published
    (``channel_att.gate_c.gate_c_fc_0.*``, ``spatial_att.gate_s.gate_s_conv_reduce0.*`` and so on).

    Args:
        gate_channel: C, channels of x.
        reduction: hidden layers have ``gate_channel // reduction`` channels, at least one.
        dilated: how many dilated convolutions.
        dilation: theirs.
        combine: "sum" as in the paper, or "product" as in its published code.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, or an unknown option.
    """

    def __init__(
        self,
        gate_channel: int,
        reduction: float = 16,
        *,
        dilated: int = 2,
        dilation: int = 4,
        combine: str = "sum",
        backend: str | None = None,
    ) -> None:
        sizes = {"gate_channel": gate_channel, "dilated": dilated, "dilation": dilation}
        super().__init__(gate_channel, reduction, backend, **sizes)
        check_choice("combine", combine, COMBINATIONS)
        self.combine = combine
        hidden = reduced_channels(gate_channel, reduction, None)
        channel: OrderedDict[str, nn.Module] = OrderedDict(
            gate_c_fc_0=nn.Linear(gate_channel, hidden),
            gate_c_bn_1=nn.BatchNorm1d(hidden),
            gate_c_relu_1=nn.ReLU(),
            gate_c_fc_final=nn.Linear(hidden, gate_channel),
        )
        spatial: OrderedDict[str, nn.Module] = OrderedDict(
            gate_s_conv_reduce0=nn.Conv2d(gate_channel, hidden, 1),
            gate_s_bn_reduce0=nn.BatchNorm2d(hidden),
            gate_s_relu_reduce0=nn.ReLU(),
        )
        for i in range(dilated):
            spatial[f"gate_s_conv_di_{i}"] = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)
            spatial[f"gate_s_bn_di_{i}"] = nn.BatchNorm2d(hidden)
            spatial[f"gate_s_relu_di_{i}"] = nn.ReLU()
        spatial["gate_s_conv_final"] = nn.Conv2d(hidden, 1, 1)
        self.channel_att = nn.Sequential(OrderedDict(gate_c=nn.Sequential(channel)))
        self.spatial_att = nn.Sequential(OrderedDict(gate_s=nn.Sequential(spatial)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) or (C, H, W) to the same shape.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        batch = self._as_batch(x)
        avg = channel_pool(batch, "avg", backend=self.backend).avg
        channel, spatial = self.channel_att(avg)[:, :, None, None], self.spatial_att(batch)
        logit = channel + spatial if self.combine == "sum" else channel * spatial
        return without_batch(batch * (1 + torch.sigmoid(logit)).to(batch.dtype), x)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"combine={self.combine!r}{backend_repr(self.backend)}"


class SKConv(_Module):
    """Selective kernel convolution (Li et al., SKNet, 2019, https://arxiv.org/abs/1903.06586).

    Branches of grouped 3 x 3 convolutions with dilation 1, 2, ..., each with batch norm and ReLU, and
    ``out = sum over branches of branch * a[branch]``, where the weights a, one a channel, are a softmax over the
    branches of linear maps of ``relu(batch_norm(linear(mean over pixels of the branches' sum)))``.

    Keys: ``convs.{i}.{0,1}.*``, ``fc.{0,1}.*``, ``fcs.{i}.*``.

    Args:
        in_channels: channels of x.
        out_channels: C, channels of the output; None for as many.
        branches: how many.
        groups: of the convolutions.
        reduction: the hidden layer has ``max(out_channels // reduction, min_hidden)`` channels.
        stride: of the convolutions.
        min_hidden: see ``reduction``.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, or channels that the groups do not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        branches: int = 2,
        groups: int = 32,
        *,
        reduction: float = 16,
        stride: int = 1,
        min_hidden: int = 32,
        backend: str | None = None,
    ) -> None:
        out_channels = in_channels if out_channels is None else out_channels
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "branches": branches, "groups": groups}
        sizes |= {"stride": stride, "min_hidden": min_hidden}
        super().__init__(in_channels, reduction, backend, **sizes)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide in_channels and out_channels, got groups={groups}, in_channels={in_channels}, "
                f"out_channels={out_channels}"
            )
        hidden = max(int(out_channels // reduction), min_hidden)
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 3, stride, padding=i, dilation=i, groups=groups, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            )
            for i in range(1, branches + 1)
        )
        self.fc = nn.Sequential(nn.Linear(out_channels, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU())
        self.fcs = nn.ModuleList(nn.Linear(hidden, out_channels) for _ in range(branches))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride); both may lack B.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        batch = self._as_batch(x)
        branches = [conv(batch) for conv in self.convs]
        total = branches[0]
        for branch in branches[1:]:
            total = total + branch
        hidden = self.fc(channel_pool(total, "avg", backend=self.backend).avg)
        gates = torch.softmax(torch.stack([fc(hidden) for fc in self.fcs]), 0)
        out = scale(branches[0], gates[0], backend=self.backend)
        for branch, gate in zip(branches[1:], gates[1:], strict=True):
            out = out + scale(branch, gate, backend=self.backend)
        return without_batch(out, x)
