"""VGG16 (Simonyan and Zisserman, 2014, https://arxiv.org/abs/1409.1556) with attention, as two tutorials have it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attnk.models.common import check_compat, check_images
from attnk.modules._checks import check_sizes
from attnk.modules.feature_map import attend_pixels
from attnk.modules.position import LearnedPosition2d, RelativePositionBias, SinusoidalPosition2d
from attnk.modules.spatial import SpatialAttention
from attnk.modules.transformer import TransformerEncoderLayer
from attnk.ops._checks import check_choice

WIDTHS = (1, 2, 4, 8, 8)  # channels of the five blocks, by those of the first
CONVS = (2, 2, 3, 3, 3)  # and their convolutions
POSITIONS = ("sinusoidal", "learned", "relative")
HEADS = 8

# Where the blocks end in torchvision's features: at their pooling. The tutorial's attention comes earlier.
ENDS = {1: 4, 2: 9, 3: 16, 4: 23, 5: 30}
ORIGINAL_ENDS = {3: 14, 4: 21, 5: 28}

# The numbers of the convolutions in torchvision's features, and in those with a gate behind every pooling.
PLAIN = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
GATED = (0, 2, 6, 8, 12, 14, 16, 20, 22, 24, 28, 30, 32)
GATES = (5, 11, 19, 27, 35)


class VGG16WithAttention(nn.Module):
    """VGG16 with a transformer's encoder layer behind some of its blocks; each pixel there is a token.

    A widely copied tutorial has this class. What is wrong there, and what is done about it:

    - Its attention follows the last convolution of a block, before the ReLU and the pooling, not the end of the block:
      on four times as many tokens, with 16 times the logits, half of the result cut off by the ReLU. Here it follows
      the pooling.
    - Positions 1 and 2 are promised and ignored. Here all five work.
    - Pixels are tokens without a position, so that a shuffled map gives the shuffled result. Here they have one.
    - Convolutions start as a linear layer does, and a network without batch norm fades away from its input. Here they
      start as in torchvision's VGG16 (He et al., 2015, https://arxiv.org/abs/1502.01852).

    ``compat="original"`` is the published network, with its initial weights from the same seed: attention after the
    third convolution of blocks 3, 4 and 5, without position, and nothing at 1 and 2.

    Keys: torchvision's ``features.*`` and ``classifier.*``, and ``attention_layers.block{i}.*``; published weights load
    strictly, in either, as long as the position has no weights. ``attnk.models.remap_state_dict`` makes torchvision's
    VGG16 weights complete. ``model.features(x)`` is the plain VGG16's.

    Args:
        num_classes: how many logits.
        attention_positions: behind which of the blocks 1 to 5 there is attention.
        position: what tells the pixels apart: "sinusoidal", added to the tokens, divided by the root of their channels,
            for as large as features it drowns them; "learned", added too, with weights
            ``positions.block{i}.pos_embed``; "relative", a bias on the logits, with weights
            ``positions.block{i}.relative_position_bias_table``; or None. ``compat="original"`` has none.
        compat: None, or "original".
        width: channels of the first block, 64 in VGG16; the others and the classifier follow.
        image_size: height and width that positions with weights are made for; for others they are resized.

    Raises:
        ValueError: a size that is no positive integer, a block that is none, an unknown option, channels that 8 heads
            do not divide.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        attention_positions: Iterable[int] = (3, 4),
        position: str | None = "sinusoidal",
        compat: str | None = None,
        *,
        width: int = 64,
        image_size: int = 224,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, width=width, image_size=image_size)
        check_compat(compat)
        blocks = tuple(attention_positions)
        if not set(blocks) <= set(ENDS):
            raise ValueError(f"attention_positions must be blocks from 1 to 5, got {blocks}")
        if position is not None:
            check_choice("position", position, POSITIONS)
        if compat == "original":
            if position not in (None, "sinusoidal"):
                raise ValueError(f"compat='original' has no position, got position={position!r}")
            position = None
        self.attention_positions = blocks
        self.position = position
        self.compat = compat
        self.features = nn.Sequential(*_features(width))
        self.attention_layers = nn.ModuleDict()
        self.positions = nn.ModuleDict()
        ends = ENDS if compat is None else ORIGINAL_ENDS
        self._attended = {ends[block]: f"block{block}" for block in sorted(set(blocks) & set(ends))}
        for block in sorted(set(blocks) & set(ends)):
            channels, side = width * WIDTHS[block - 1], max(1, image_size // 2**block)
            self.attention_layers[f"block{block}"] = TransformerEncoderLayer(channels, HEADS)
            if position == "sinusoidal":
                self.positions[f"block{block}"] = SinusoidalPosition2d(channels, amplitude=channels**-0.5)
            elif position == "learned":
                self.positions[f"block{block}"] = LearnedPosition2d(side, side, channels)
            elif position == "relative":
                self.positions[f"block{block}"] = RelativePositionBias(side, side, HEADS)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = _classifier(width, num_classes)
        if compat is None:
            _reset_convolutions(self.features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify.

        Args:
            x: images (B, 3, H, W) of at least 32 x 32 pixels, in the dtype of the weights (under autocast, any float
                dtype).

        Returns:
            Logits (B, num_classes).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_images(x, self.features[0].weight)  # type: ignore[arg-type]
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self._attended:
                x = self._apply_attention(x, self._attended[index])
        return self.classifier(torch.flatten(self.avgpool(x), 1))

    def _apply_attention(self, x: torch.Tensor, block_name: str) -> torch.Tensor:
        """Attend between the pixels of a map (B, C, H, W); the result has its shape and memory format."""
        layer = self.attention_layers[block_name]
        position = None if self.position is None else self.positions[block_name]
        if isinstance(position, RelativePositionBias):
            height, width = x.shape[2:]
            return attend_pixels(layer, x, bias_table=position(height, width), grid=(height, width))
        return attend_pixels(layer, x, position)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"attention_positions={self.attention_positions}, position={self.position!r}, compat={self.compat!r}"


class VGG16WithSpatialAttention(nn.Module):
    """VGG16 with a spatial attention gate behind the pooling of each of its five blocks.

    A widely copied tutorial has this class. The gates, 490 parameters in all, stand among ``features``, which shifts
    the numbers of the layers behind them. What is wrong there, and what is done about it:

    - Its gates return a map, which the forward multiplies with the layer before: it keeps a list of all 36 activations
      alive (63 MiB an image of 224 x 224), and ``model.features(x)`` fails. Here the gates return ``x * map``, and no
      list is kept.
    - Five gates that start at about 0.5 shrink the last features to a fortieth. Here a gate is ``x * 2 sigmoid(...)``
      with weights that start at 0: the identity, so that a pretrained VGG16 is at first what it was.
    - torchvision's VGG16 weights do not load. Here they do, also strictly: the convolutions find their new numbers and
      the gates keep what they have.
    - Convolutions start as a linear layer does; here as in torchvision's VGG16.

    ``compat="original"`` is the published network, with its initial weights from the same seed; only ``features(x)``
    and torchvision's weights work in it too.

    Keys: as published, ``features.{0,2,6,8,...,32}.*`` of the convolutions, ``features.{5,11,19,27,35}.conv1.weight``
    of the gates, and ``classifier.{0,3,6}.*``. They load strictly in either; but weights that were trained with gates
    from 0 to 1 want ``compat="original"``, for by default gates go from 0 to 2.

    Args:
        num_classes: how many logits.
        compat: None, or "original".
        width: channels of the first block, 64 in VGG16; the others and the classifier follow.

    Raises:
        ValueError: a size that is no positive integer, an unknown ``compat``.
    """

    def __init__(self, num_classes: int = 1000, compat: str | None = None, *, width: int = 64) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, width=width)
        check_compat(compat)
        self.compat = compat
        gate = _DoubleGate if compat is None else _published_gate
        self.features = nn.Sequential(*_features(width, gate))
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = _classifier(width, num_classes)
        if compat is None:
            _reset_convolutions(self.features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify; arguments, result and errors are those of ``VGG16WithAttention.forward``."""
        check_images(x, self.features[0].weight)  # type: ignore[arg-type]
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"compat={self.compat!r}"

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if _convolutions(state_dict, f"{prefix}features.") == PLAIN:
            renumbered = _renumber(state_dict, f"{prefix}features.", PLAIN, GATED)
            state_dict.clear()
            state_dict.update(renumbered)
            for index in GATES:
                key = f"features.{index}.conv1.weight"
                state_dict[prefix + key] = self.get_parameter(key).detach()
        super()._load_from_state_dict(state_dict, prefix, *args)


class _DoubleGate(SpatialAttention):
    """``x * 2 sigmoid(conv([mean, max]))``, which is x as long as the convolution's weights are 0."""

    def __init__(self) -> None:
        super().__init__(output="gated")
        nn.init.zeros_(self.conv1.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend; arguments, result and errors are those of ``SpatialAttention.forward``."""
        return super().forward(x) * 2


def _published_gate() -> SpatialAttention:
    return SpatialAttention(output="gated")


def vgg16_with_attention(
    num_classes: int = 1000,
    attention_positions: Iterable[int] = (3, 4),
    position: str | None = "sinusoidal",
    compat: str | None = None,
    **options: Any,
) -> VGG16WithAttention:
    """``VGG16WithAttention``, whose arguments these are."""
    return VGG16WithAttention(num_classes, attention_positions, position, compat, **options)


def vgg16_with_spatial_attention(
    num_classes: int = 1000, compat: str | None = None, **options: Any
) -> VGG16WithSpatialAttention:
    """``VGG16WithSpatialAttention``, whose arguments these are."""
    return VGG16WithSpatialAttention(num_classes, compat, **options)


def remap_state_dict(state: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A VGG16's weights under the keys of another VGG16, so that ``model.load_state_dict`` takes them strictly.

    Args:
        state: the weights of torchvision's VGG16, or of one with gates among its ``features``, whose numbers are
            shifted (published copies of ``VGG16WithSpatialAttention``), or of one with ``attention_layers``.
        model: the network they are for: one of this module's, or torchvision's VGG16. It is not changed.

    Returns:
        A new dict, of the same tensors. What the model has beyond a plain VGG16, gates, attention layers and positions,
        is in it as the model has it, unless state has it too; what of these state has and the model has not is left
        out, with what it did.

    Raises:
        ValueError: convolutions that are numbered as in neither, in state or in the model.
    """
    own = model.state_dict()
    source, target = (_convolutions(keys, "features.") for keys in (state, own))
    for name, found in (("state", source), ("model", target)):
        if found not in (PLAIN, GATED):
            raise ValueError(f"{name} must be a VGG16, with convolutions features.{PLAIN} or {GATED}, got {found}")
    extra = {key: tensor for key, tensor in own.items() if _is_extra(key)}
    mapped = _renumber(state, "features.", source, target)
    return {**extra, **{key: tensor for key, tensor in mapped.items() if key in extra or not _is_extra(key)}}


def _features(width: int, gate: Callable[[], nn.Module] | None = None) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for multiple, convs in zip(WIDTHS, CONVS, strict=True):
        for _ in range(convs):
            layers += [nn.Conv2d(channels, width * multiple, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width * multiple
        layers += [nn.MaxPool2d(2, 2), *([] if gate is None else [gate()])]
    return layers


def _classifier(width: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTHS[-1] * width * 7 * 7, 64 * width),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(64 * width, 64 * width),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(64 * width, num_classes),
    )


def _reset_convolutions(features: nn.Sequential) -> None:
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)


def _convolutions(keys: Iterable[str], prefix: str) -> tuple[int, ...]:
    """The numbers of the layers among features that have a weight of their own."""
    names = [key.removeprefix(prefix).split(".") for key in keys if key.startswith(prefix)]
    return tuple(sorted(int(name[0]) for name in names if len(name) == 2 and name[1] == "weight" and name[0].isdigit()))


def _renumber(
    state: Mapping[str, torch.Tensor], prefix: str, source: Sequence[int], target: Sequence[int]
) -> dict[str, torch.Tensor]:
    """A state whose convolutions have other numbers."""
    numbers = dict(zip(source, target, strict=True))

    def renamed(key: str) -> str:
        number, _, leaf = key.removeprefix(prefix).partition(".")
        known = key.startswith(prefix) and leaf in ("weight", "bias") and number.isdigit() and int(number) in numbers
        return f"{prefix}{numbers[int(number)]}.{leaf}" if known else key

    return {renamed(key): tensor for key, tensor in state.items()}


def _is_extra(key: str) -> bool:
    """Whether a plain VGG16 has no such key."""
    return key.startswith(("attention_layers.", "positions.")) or (key.startswith("features.") and ".conv1." in key)
