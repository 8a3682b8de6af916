"""Axial attention on feature maps: along rows and columns, one after the other, added, or in one softmax."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attnk import dispatch
from attnk.modules._checks import backend_repr, check_shape, check_share, check_sizes, check_tensor
from attnk.modules.position import STD, resize_bias_table
from attnk.modules.self_attention import is_channel_major, laid_out, project
from attnk.ops._calls import autocast_is_on
from attnk.ops._checks import check_choice
from attnk.ops.group_attention import axial_attention

MODES = ("sum", "sequential", "criss_cross")
POSITIONS = ("none", "relative")
MERGES = ("sum", "mean", "concat")
ACTIVATIONS = ("relu", "gelu")


class AxialAttention(nn.Module):
    """Multi-head attention along the columns and rows of a map (Ho et al., 2019, https://arxiv.org/abs/1912.12180).

    An attention along one axis is ``to_out(softmax(q k^T dim_head ** -0.5 + bias) v)`` among the tokens of a column or
    row, with ``q = to_q(x)`` and ``k, v = to_kv(x)``.

    - "sum": columns and rows, each with its own projections, added.
    - "sequential": rows after columns, each with its own projections: ``rows(columns(x))``.
    - "criss_cross": one set of projections and one softmax over the tokens of column and row, in which the token itself
      counts once (CCNet, https://arxiv.org/abs/1811.11721).

    "sum" and "sequential" are drop-ins for lucidrains' axial_attention (``sum_axial_out`` True and False) with its keys
    ``axial_attentions.{i}.fn.{to_q.weight,to_kv.weight,to_out.weight,to_out.bias}``, columns first; the default there,
    ``dim_index=-1``, is ``channels_first=False`` here. The keys of "criss_cross" are
    ``criss_cross.{to_q.weight,to_kv.weight,to_out.weight,to_out.bias}``.

    The tables of a relative position are ``column_bias_table`` (2 height - 1, num_heads) and ``row_bias_table``
    (2 width - 1, num_heads), by query's position less key's. On maps of another size they are resized, as
    ``attnk.resize_bias_table`` does it. In "criss_cross" the token itself has the bias of its row.

    All plain linear maps that read x are one product, in which queries, keys and values are views. Neither x nor they
    are permuted in memory.

    Args:
        dim: channels of x and of the output.
        num_heads: heads; a divisor of ``dim`` unless ``dim_head`` is given.
        mode: "sum", "sequential" or "criss_cross".
        position: "none", or "relative" for a learned bias by head and by the distance along the axis.
        size: (height, width) of the maps the tables of a relative position are for.
        dim_head: channels of a head; ``dim // num_heads`` by default.
        qkv_bias: whether ``to_q`` and ``to_kv`` have a bias.
        dropout: share of the attention weights to drop in training.
        span: the largest distance along the axis at which a token is seen; None for any.
        channels_first: whether maps are (B, dim, H, W) rather than (B, H, W, dim).
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, ``dim`` that the heads do not divide, an unknown option.
    """

    row_bias_table: nn.Parameter | None
    column_bias_table: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mode: str = "sum",
        position: str = "none",
        *,
        size: tuple[int, int] | None = None,
        dim_head: int | None = None,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        span: int | None = None,
        channels_first: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, num_heads=num_heads)
        if dim_head is None:
            _check_heads(dim, num_heads)
            dim_head = dim // num_heads
        check_sizes(dim_head=dim_head)
        check_choice("mode", mode, MODES)
        check_choice("position", position, POSITIONS)
        check_share("dropout", dropout)
        if span is not None and (not isinstance(span, int) or isinstance(span, bool) or span < 0):
            raise ValueError(f"span must be an integer of at least 0 or None, got {span!r}")
        if backend is not None:
            dispatch.check_backend(backend)
        self.dim, self.num_heads, self.dim_head = dim, num_heads, dim_head
        self.mode, self.position = mode, position
        self.size = _checked_size(position, size)
        self.span = span
        self.channels_first = channels_first
        self.backend = backend
        if mode == "criss_cross":
            self.criss_cross = _Projections(dim, dim_head * num_heads, qkv_bias)
        else:
            axes = (_Projections(dim, dim_head * num_heads, qkv_bias) for _ in range(2))
            self.axial_attentions = nn.ModuleList(nn.ModuleDict({"fn": axis}) for axis in axes)
        sides = zip(("column", "row"), self.size or (None, None), strict=True)
        for axis, side in sides:
            table = None if side is None else nn.Parameter(torch.empty(2 * side - 1, num_heads))
            self.register_parameter(f"{axis}_bias_table", table)
            if table is not None:
                nn.init.trunc_normal_(table, std=STD)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, dim, H, W), or with ``channels_first=False`` (B, H, W, dim), in the dtype of the weights (under
                autocast, any float dtype). Maps that are neither contiguous nor channels_last may be copied.

        Returns:
            A map of x's shape and memory format, in its dtype (under autocast, the autocast dtype).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        axes = self._axes()
        check_map(x, self.dim, axes[0].to_q, self.channels_first)
        x = x if self.channels_first else x.permute(0, 3, 1, 2)
        channels_last = is_channels_last(x)
        column_table, row_table = self._tables(*x.shape[2:])
        if self.mode == "criss_cross":
            tables = None if row_table is None else (row_table, column_table)
            out = project_map(axes[0].to_out, self._attend(self._project(x, axes), "both", tables), channels_last)
        elif self.mode == "sequential":
            out = self._attend(self._project(x, axes[:1]), "column", column_table)
            out = project_map(axes[0].to_out, out, channels_last=True)
            out = self._attend(self._project(out, axes[1:]), "row", row_table)
            out = project_map(axes[1].to_out, out, channels_last)
        else:
            parts = self._project(x, axes)
            out = project_map(axes[0].to_out, self._attend(parts[:3], "column", column_table), channels_last)
            out = out + project_map(axes[1].to_out, self._attend(parts[3:], "row", row_table), channels_last)
        return out if self.channels_first else out.permute(0, 2, 3, 1)

    def _axes(self) -> "list[_Projections]":
        """The projections of columns and of rows, or those of both."""
        if self.mode == "criss_cross":
            return [self.criss_cross]
        return [axis["fn"] for axis in self.axial_attentions]  # type: ignore[index]

    def _project(self, x: torch.Tensor, axes: "Sequence[_Projections]") -> list[torch.Tensor]:
        """q, k and v of each axis, (B, H, W, num_heads, dim_head)."""
        products = project_together([linear for axis in axes for linear in (axis.to_q, axis.to_kv)], x)
        return [
            part
            for product in products
            for part in product.unflatten(-1, (-1, self.num_heads, self.dim_head)).unbind(-3)
        ]

    def _attend(self, qkv: Sequence[torch.Tensor], axis: str, table: Any) -> torch.Tensor:
        q, k, v = qkv
        return axial_attention(
            q, k, v, axis, combine="criss_cross" if axis == "both" else "sum", bias_table=table, span=self.span,
            dropout_p=self.dropout.p if self.dropout.training else 0.0, backend=self.backend,
        )  # fmt: skip

    def _tables(self, height: int, width: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Those of columns and of rows, for a map of this size."""
        if self.size is None:
            return None, None
        assert self.column_bias_table is not None
        assert self.row_bias_table is not None
        return (
            resize_bias_table(self.column_bias_table, (self.size[0], 1), (max(1, height), 1)),
            resize_bias_table(self.row_bias_table, (1, self.size[1]), (1, max(1, width))),
        )

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        size = "" if self.size is None else f", size={self.size}"
        span = "" if self.span is None else f", span={self.span}"
        order = "" if self.channels_first else ", channels_first=False"
        options = f"{self.dim}, num_heads={self.num_heads}, mode={self.mode!r}, position={self.position!r}"
        return options + size + span + order + backend_repr(self.backend)


class _Projections(nn.Module):
    """What lucidrains' SelfAttention holds; called by those who hold it."""

    def __init__(self, dim: int, dim_hidden: int, qkv_bias: bool) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, dim_hidden, bias=qkv_bias)
        self.to_kv = nn.Linear(dim, 2 * dim_hidden, bias=qkv_bias)
        self.to_out = nn.Linear(dim_hidden, dim)


class SeparableSelfAttention(nn.Module):
    """Self-attention taken apart into rows and columns, and its channels into groups: the tutorials' description.

    ``out_proj(merge(row, column))`` with ``softmax(Q K^T / sqrt(d_k)) V`` inside each row and each column, by head.
    With ``channel_groups`` the channels of x are split, and each group of channels has its own queries, keys and
    values, in ``num_heads / channel_groups`` heads; ``out_proj`` fuses the groups.

    The tutorials leave open how rows and columns are merged, whether they share Q, K and V, what the subspaces are, and
    how results are fused. Here rows and columns share one projection, are added by default, subspaces belong to groups
    of channels, and a linear map over all channels fuses. The cost of attention on n tokens of a square map is
    O(n^1.5 d), not O(n d + n^2) as the tutorials have it. There is no residual.

    The projection is a 1 x 1 convolution, ``qkv_proj.{weight,bias}``, whose rows are queries, keys and values of one
    head after the other; they are read as views of its output. A contiguous map is copied once for a convolution in
    groups.

    Args:
        dim: channels of x and of the output.
        num_heads: heads; a divisor of ``dim``.
        merge: of rows and columns: "sum", "mean", or "concat" side by side before ``out_proj``, which is then 2 dim
            wide.
        channel_groups: groups of channels; a divisor of ``num_heads``.
        dropout: share of the attention weights to drop in training.
        qkv_bias: whether the projection of queries, keys and values has a bias.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer or that does not divide, an unknown option.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        merge: str = "sum",
        channel_groups: int = 1,
        *,
        dropout: float = 0.0,
        qkv_bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, num_heads=num_heads, channel_groups=channel_groups)
        _check_heads(dim, num_heads)
        if num_heads % channel_groups:
            raise ValueError(
                "num_heads must be divisible by channel_groups, "
                f"got num_heads={num_heads}, channel_groups={channel_groups}"
            )
        check_choice("merge", merge, MERGES)
        check_share("dropout", dropout)
        if backend is not None:
            dispatch.check_backend(backend)
        self.dim, self.num_heads, self.channel_groups = dim, num_heads, channel_groups
        self.merge = merge
        self.backend = backend
        self.qkv_proj = nn.Conv2d(dim, 3 * dim, 1, groups=channel_groups, bias=qkv_bias)
        self.out_proj = nn.Linear(2 * dim if merge == "concat" else dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, dim, H, W), in the dtype of the weights (under autocast, any float dtype), with at least one pixel
                where there are groups of channels. Maps that are neither contiguous nor channels_last may be copied.

        Returns:
            (B, dim, H, W), in the memory format of x and its dtype (under autocast, the autocast dtype).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_map(x, self.dim, self.qkv_proj)
        if self.channel_groups > 1 and 0 in x.shape[2:]:  # PyTorch's convolution takes no empty maps
            raise ValueError(
                f"x must have at least one pixel with channel_groups={self.channel_groups}, got {tuple(x.shape)}"
            )
        (qkv,) = project_together([self.qkv_proj], x)
        q, k, v = qkv.unflatten(-1, (self.num_heads, 3, -1)).unbind(-2)
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        axes = ("row", "column") if self.merge == "concat" else ("both",)
        outs = [axial_attention(q, k, v, axis, dropout_p=dropout_p, backend=self.backend) for axis in axes]
        out = torch.cat(outs, -2) if self.merge == "concat" else outs[0]
        return project_map(self.out_proj, out * 0.5 if self.merge == "mean" else out, is_channels_last(x))

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"num_heads={self.num_heads}, merge={self.merge!r}" + backend_repr(self.backend)


class CrissCrossAttention(nn.Module):
    """CCNet's block (Huang et al., 2019, https://arxiv.org/abs/1811.11721): ``gamma * attention + x``.

    Each token attends to its row and its column, in one softmax in which it counts once itself; there is one head, and
    the logits are not scaled. gamma starts at 0, so that a new block is the identity. A drop-in for CCNet's class of
    that name and mmcv's, with CCNet's keys ``{query,key,value}_conv.{weight,bias}`` and ``gamma`` (1,);
    ``load_state_dict`` also takes mmcv's ``gamma.scale``.

    The three 1 x 1 convolutions are one product where they are plain, in which queries, keys and values are views.

    Args:
        in_dim: channels of x and of the output; queries and keys have an eighth of them, at least 1.
        recurrence: how often the block runs, with the same weights; after 2 each token has seen every other.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, an unknown backend.
    """

    def __init__(self, in_dim: int, recurrence: int = 1, *, backend: str | None = None) -> None:
        super().__init__()
        check_sizes(in_dim=in_dim, recurrence=recurrence)
        if backend is not None:
            dispatch.check_backend(backend)
        self.in_dim, self.recurrence = in_dim, recurrence
        self.backend = backend
        inner = max(1, in_dim // 8)
        self.query_conv = nn.Conv2d(in_dim, inner, 1)
        self.key_conv = nn.Conv2d(in_dim, inner, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, in_dim, H, W), in the dtype of the weights (under autocast, any float dtype).

        Returns:
            A map of x's shape, memory format and dtype (under autocast, of gamma's where that is wider).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_map(x, self.in_dim, self.query_conv)
        memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        for _ in range(self.recurrence):
            products = project_together([self.query_conv, self.key_conv, self.value_conv], x)
            if len(products) == 1:
                inner = (products[0].shape[-1] - self.in_dim) // 2
                products = list(products[0].split([inner, inner, self.in_dim], -1))
            q, k, v = (product.unsqueeze(3) for product in products)
            out = axial_attention(q, k, v, "both", combine="criss_cross", scale=1.0, backend=self.backend)
            x = torch.addcmul(x, self.gamma, out.squeeze(3).permute(0, 3, 1, 2)).contiguous(memory_format=memory_format)
        return x

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"{self.in_dim}, recurrence={self.recurrence}" + backend_repr(self.backend)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        scale = state_dict.pop(f"{prefix}gamma.scale", None)
        if scale is not None:
            state_dict[f"{prefix}gamma"] = scale.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class AxialTransformerBlock(nn.Module):
    """Axial attention and a feed-forward network on a map, each with a residual and a layer norm over the channels.

    With ``norm_first`` as in ViT (https://arxiv.org/abs/2010.11929), ``x = x + attn(norm1(x)); x = x +
    ffn(norm2(x))``, else ``x = norm1(x + attn(x)); x = norm2(x + ffn(x))``. Keys: ``attn.*`` as ``AxialAttention`` has
    them, ``norm1.*``, ``norm2.*``, ``ffn.0.*`` and ``ffn.3.*``.

    Inside, tokens lie with their channels side by side, as layer norms read them: a contiguous map is copied once on
    its way in and once on its way out, a channels_last one never.

    Args:
        dim: channels of x and of the output.
        num_heads: heads; a divisor of ``dim``.
        expansion_factor: hidden channels of the feed-forward network by ``dim``.
        dropout: share to drop in training, of the attention weights and twice in the feed-forward network.
        mode: "sum", "sequential" or "criss_cross"; see ``AxialAttention``.
        position: "none" or "relative"; see ``AxialAttention``.
        norm_first: whether the norms precede the branches.
        size: (height, width) of the maps the tables of a relative position are for.
        activation: of the feed-forward network, "relu" or "gelu".
        span: the largest distance along the axis at which a token is seen; None for any.
        backend: "auto", "triton", "torch" or "reference"; None for the ambient choice (``attnk.use_backend``).

    Raises:
        ValueError: a size that is no positive integer, ``dim`` that the heads do not divide, an unknown option.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        expansion_factor: float = 4,
        dropout: float = 0.0,
        mode: str = "sum",
        position: str = "none",
        norm_first: bool = True,
        *,
        size: tuple[int, int] | None = None,
        activation: str = "gelu",
        span: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        self.attn = AxialAttention(
            dim, num_heads, mode, position, size=size, dropout=dropout, span=span, backend=backend
        )  # fmt: skip
        if not isinstance(expansion_factor, int | float) or not 1 <= dim * expansion_factor < math.inf:
            raise ValueError(
                f"expansion_factor must be a number that leaves at least one hidden channel, got {expansion_factor!r}"
            )
        hidden_dim = int(dim * expansion_factor)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.ReLU(inplace=True) if activation == "relu" else nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block.

        Args:
            x: (B, dim, H, W), in the dtype of the weights (under autocast, any float dtype), any strides.

        Returns:
            (B, dim, H, W), in the memory format of x and its dtype (under autocast and after a norm, float32).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_map(x, self.attn.dim, self.ffn[0])
        channels_last = is_channels_last(x)
        x = x.permute(0, 2, 3, 1).contiguous()
        if self.norm_first:
            x = x + self._attend(self.norm1(x))
            x = x + self.ffn(self.norm2(x))
        else:
            x = self.norm1(x + self._attend(x))
            x = self.norm2(x + self.ffn(x))
        x = x.permute(0, 3, 1, 2)
        return x if channels_last else x.contiguous()

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"norm_first={self.norm_first}"


def check_map(x: torch.Tensor, dim: int, linear: nn.Module, channels_first: bool = True) -> None:
    """Raise unless x is (B, dim, H, W) or (B, H, W, dim) and fits the module that is about to read it."""
    if isinstance(linear, nn.Linear | nn.Conv2d):
        check_tensor("x", x, linear.weight)
    check_shape("x", x, *(("(B, C, H, W)", 1) if channels_first else ("(B, H, W, C)", 3)), dim)


def _check_heads(dim: int, num_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(f"dim must be divisible by num_heads, got dim={dim}, num_heads={num_heads}")


def _checked_size(position: str, size: tuple[int, int] | None) -> tuple[int, int] | None:
    if position == "none":
        if size is not None:
            raise ValueError(f"size must be None without position='relative', got {size!r}")
        return None
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"size must be (height, width) for position='relative', got {size!r}")
    height, width = size
    check_sizes(**{"size[0]": height, "size[1]": width})
    return height, width


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether the channels of a map (B, C, H, W) lie closer together than the pixels of a row."""
    return x.stride(1) < x.stride(3)


def project_together(linears: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """What linear maps or 1 x 1 convolutions make of one map: (B, H, W, their outputs), token-major.

    Those that are plain are one product, their outputs side by side, and one result; it is made without a copy of the
    map, contiguous or channels_last, unless the weight had a gradient for every image that is larger than the copy.
    Others, for what else they do must not be passed over, are called by themselves and give a result each.
    """
    height, width = x.shape[2:]
    plain = all(map(_is_plain, linears)) and len({linear.bias is None for linear in linears}) == 1
    if not plain:
        tokens = x.permute(0, 2, 3, 1).contiguous()
        last = tokens.permute(0, 3, 1, 2)
        return [
            linear(last).permute(0, 2, 3, 1) if isinstance(linear, nn.Conv2d) else linear(tokens) for linear in linears
        ]
    weights: Any = [linear.weight for linear in linears]
    weight = torch.cat([each.flatten(1) for each in weights])
    biases: Any = [linear.bias for linear in linears]
    bias = None if biases[0] is None else torch.cat(biases)
    tokens = x.flatten(2).mT
    trains = torch.is_grad_enabled() and weight.requires_grad
    by_image = not trains or tokens.shape[0] == 1 or tokens.shape[1] >= weight.shape[0]
    if not is_channel_major(tokens) or not by_image:
        return [F.linear(laid_out(tokens, False), weight, bias).unflatten(1, (height, width))]
    if autocast_is_on(x) and x.dtype != torch.float64:  # autocast itself would copy the weight once an image
        dtype = torch.get_autocast_dtype(x.device.type)
        tokens, weight, bias = tokens.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    weight = weight.mT.expand(tokens.shape[0], -1, -1)
    out = torch.bmm(tokens, weight) if bias is None else torch.baddbmm(bias, tokens, weight)
    return [out.unflatten(1, (height, width))]


def _is_plain(linear: nn.Module) -> bool:
    if linear._forward_hooks or linear._forward_pre_hooks:
        return False
    if type(linear) is not nn.Conv2d:
        return type(linear) is nn.Linear
    geometry = (linear.kernel_size, linear.stride, linear.padding, linear.groups)
    return geometry == ((1, 1), (1, 1), (0, 0), 1)


def project_map(linear: nn.Module, x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """A linear map of what attention gives, (B, H, W, heads, D), as a map (B, C, H, W) in the format asked for."""
    tokens = x.flatten(3).flatten(1, 2)
    return project(linear, tokens, not channels_last).mT.unflatten(2, x.shape[1:3])
