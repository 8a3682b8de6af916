"""SAGAN (Zhang et al., 2018, https://arxiv.org/abs/1805.08318): a residual GAN with attention in both networks."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from attnk.modules._checks import check_shape, check_sizes, check_tensor
from attnk.modules.feature_map import SAGANAttention

SMALLEST = 4  # side of the map that the generator begins with and the discriminator ends with
WIDEST = 16  # no map has more than so many times ``width`` channels


class SAGANGeneratorBlock(nn.Module):
    """A residual block that doubles height and width.

    ``conv2(relu(bn2(conv1(up(relu(bn1(x))))))) + conv_sc(up(x))``, where up repeats each pixel 2 x 2 times; ``conv_sc``
    is 1 x 1 and runs before it, which is the same for a quarter of the operations. With ``num_classes`` each class has
    a scale and a shift of its own behind a batch norm (Dumoulin et al., 2017, https://arxiv.org/abs/1610.07629).
    Spectral norm is on all convolutions.

    Keys: ``conv{1,2}.*`` and ``conv_sc.*``, each with ``bias``, ``parametrizations.weight.original`` and the two
    vectors of the power iteration; ``bn{1,2}.*``, with ``scale.weight`` and ``shift.weight`` for classes.

    Args:
        in_channels: channels of x.
        out_channels: channels of the output.
        num_classes: how many classes; None for a block without them.

    Raises:
        ValueError: a size that is no positive integer.
    """

    def __init__(self, in_channels: int, out_channels: int, num_classes: int | None = None) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels)
        _check_classes(num_classes)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.bn1 = _batch_norm(in_channels, num_classes)
        self.conv1 = _conv(in_channels, out_channels, 3, padding=1)
        self.bn2 = _batch_norm(out_channels, num_classes)
        self.conv2 = _conv(out_channels, out_channels, 3, padding=1)
        self.conv_sc = _conv(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Run the block.

        Args:
            x: (B, in_channels, H, W), in the dtype of the weights (under autocast, any float dtype).
            labels: (B,), int64 or int32, from 0 to ``num_classes - 1``; None without classes.

        Returns:
            (B, out_channels, 2 H, 2 W).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_tensor("x", x, self.conv1.bias)  # type: ignore[arg-type]
        check_shape("x", x, "(B, in_channels, H, W)", 1, self.in_channels)
        _check_labels(labels, self.num_classes, x)
        given = () if labels is None else (labels,)
        out = self.conv1(_upsample(torch.relu(self.bn1(x, *given))))
        out = self.conv2(torch.relu(self.bn2(out, *given)))
        return out + _upsample(self.conv_sc(x))


class SAGANDiscriminatorBlock(nn.Module):
    """A residual block that halves height and width, or leaves them.

    ``pool(conv2(relu(conv1(relu(x))))) + conv_sc(pool(x))``, where pool is the average of 2 x 2 pixels. Without
    ``downsample`` there is no pool, and no ``conv_sc`` either as long as the channels stay. Spectral norm is on all
    convolutions.

    Keys: as those of ``SAGANGeneratorBlock``, without ``bn{1,2}.*``.

    Args:
        in_channels: channels of x.
        out_channels: channels of the output.
        downsample: whether to halve height and width; an odd last row or column is then not seen by the shortcut.
        first: whether x is images, from which the first ReLU would cut half: there is none then.

    Raises:
        ValueError: a size that is no positive integer.
    """

    def __init__(self, in_channels: int, out_channels: int, downsample: bool = True, *, first: bool = False) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels)
        self.in_channels = in_channels
        self.downsample = downsample
        self.first = first
        self.conv1 = _conv(in_channels, out_channels, 3, padding=1)
        self.conv2 = _conv(out_channels, out_channels, 3, padding=1)
        changes = downsample or in_channels != out_channels
        self.conv_sc = _conv(in_channels, out_channels, 1) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block.

        Args:
            x: (B, in_channels, H, W), in the dtype of the weights (under autocast, any float dtype).

        Returns:
            (B, out_channels, H // 2, W // 2), or (B, out_channels, H, W) without ``downsample``.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_tensor("x", x, self.conv1.bias)  # type: ignore[arg-type]
        check_shape("x", x, "(B, in_channels, H, W)", 1, self.in_channels)
        out = self.conv2(torch.relu(self.conv1(x if self.first else torch.relu(x))))
        if self.downsample:
            out, x = F.avg_pool2d(out, 2), F.avg_pool2d(x, 2)
        return out + self.conv_sc(x)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"downsample={self.downsample}, first={self.first}"


class SAGANGenerator(nn.Module):
    """SAGAN's generator: a linear map to 4 x 4 pixels, blocks that double them, attention on one of the maps, tanh.

    With ``image_size=128, attention_size=32`` it is the published one: 16, 16, 8, 4, 2 and 1 times ``width`` channels,
    attention (``attnk.SAGANAttention``) on the map of 32 x 32. As its gamma starts at 0, the network starts as the one
    without. Spectral norm is on everything but the batch norms.

    PyTorch refuses to pickle modules with its spectral norm: save ``state_dict()``, not the network. ``copy.deepcopy``
    works. The attention's gamma is a number without axes, which FSDP does not shard. The paper trains with
    ``torch.optim.Adam(betas=(0.0, 0.9))``, the generator at a rate of 1e-4, the discriminator at 4e-4.

    Keys: ``linear.*``, ``blocks.{i}.*``, ``attention.*``, ``bn.*``, ``conv.*``.

    Args:
        latent_dim: channels of the noise.
        image_size: height and width of the images: a power of 2 from 16.
        channels: channels of the images.
        width: channels of the last map before the images.
        num_classes: how many classes; None for images without them.
        attention_size: height and width of the map that attends to itself: a power of 2 from 8 to half of
            ``image_size``; None for no attention.

    Raises:
        ValueError: a size that is no positive integer, or no such power of 2.
    """

    def __init__(
        self,
        latent_dim: int = 128,
        image_size: int = 32,
        channels: int = 3,
        width: int = 64,
        num_classes: int | None = None,
        attention_size: int | None = 16,
    ) -> None:
        super().__init__()
        check_sizes(latent_dim=latent_dim, channels=channels, width=width)
        _check_classes(num_classes)
        _check_sides(image_size, attention_size)
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.attention_size = attention_size
        widths = _widths(image_size, width)[::-1]
        self.linear = spectral_norm(nn.Linear(latent_dim, widths[0] * SMALLEST**2))
        self.blocks = nn.ModuleList()
        inputs, side = widths[0], SMALLEST
        for outputs in widths:
            self.blocks.append(SAGANGeneratorBlock(inputs, outputs, num_classes))
            inputs, side = outputs, side * 2
            if side == attention_size:
                self.attention = SAGANAttention(outputs, conv=_conv)
        self.bn = nn.BatchNorm2d(width)
        self.conv = _conv(width, channels, 3, padding=1)

    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Make images.

        Args:
            z: normal noise (B, latent_dim), in the dtype of the weights (under autocast, any float dtype).
            labels: (B,), int64 or int32, from 0 to ``num_classes - 1``; None without classes.

        Returns:
            Images (B, channels, image_size, image_size), from -1 to 1.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_tensor("z", z, self.linear.bias)  # type: ignore[arg-type]
        check_shape("z", z, "(B, latent_dim)", 1, self.latent_dim)
        _check_labels(labels, self.num_classes, z)
        x = self.linear(z).unflatten(1, (self.blocks[0].in_channels, SMALLEST, SMALLEST))
        for block in self.blocks:
            x = block(x, labels)
            if x.shape[2] == self.attention_size:
                x = self.attention(x)
        return torch.tanh(self.conv(torch.relu(self.bn(x))))

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"num_classes={self.num_classes}, attention_size={self.attention_size}"


class SAGANDiscriminator(nn.Module):
    """SAGAN's discriminator: blocks down to 4 x 4 pixels, attention on one of the maps, a sum over them, linear.

    With ``image_size=128, attention_size=32`` it is the published one: 1, 2, 4, 8, 16 and 16 times ``width`` channels,
    attention (``attnk.SAGANAttention``) on the map of 32 x 32. Given classes it is a projection discriminator (Miyato
    and Koyama, 2018, https://arxiv.org/abs/1802.05637): ``linear(h) + embed(label) . h``. Spectral norm is on
    everything, the embedding too. In training each call moves its vectors by a step of the power iteration.

    Pickling and training are as ``SAGANGenerator`` has them. A gradient penalty differentiates a gradient: call the
    network under ``attnk.use_backend("reference")`` for it.

    Keys: ``blocks.{i}.*``, ``attention.*``, ``linear.*`` and, for classes, ``embed.*``.

    Args:
        image_size: height and width of the images: a power of 2 from 16.
        channels: channels of the images.
        width: channels of the first map.
        num_classes: how many classes; None for images without them.
        attention_size: height and width of the map that attends to itself: a power of 2 from 8 to half of
            ``image_size``; None for no attention.

    Raises:
        ValueError: a size that is no positive integer, or no such power of 2.
    """

    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        width: int = 64,
        num_classes: int | None = None,
        attention_size: int | None = 16,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, width=width)
        _check_classes(num_classes)
        _check_sides(image_size, attention_size)
        self.image_size = image_size
        self.channels = channels
        self.num_classes = num_classes
        self.attention_size = attention_size
        self.blocks = nn.ModuleList()
        inputs, side = channels, image_size
        for outputs in _widths(image_size, width):
            self.blocks.append(SAGANDiscriminatorBlock(inputs, outputs, first=not self.blocks))
            inputs, side = outputs, side // 2
            if side == attention_size:
                self.attention = SAGANAttention(outputs, conv=_conv)
        self.blocks.append(SAGANDiscriminatorBlock(inputs, inputs, downsample=False))
        self.linear = spectral_norm(nn.Linear(inputs, 1))
        if num_classes is not None:
            self.embed = spectral_norm(nn.Embedding(num_classes, inputs))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Judge images.

        Args:
            x: images (B, channels, image_size, image_size), from -1 to 1, in the dtype of the weights (under autocast,
                any float dtype).
            labels: (B,), int64 or int32, from 0 to ``num_classes - 1``; None without classes.

        Returns:
            Logits (B,), high for what looks real.

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_tensor("x", x, self.linear.bias)  # type: ignore[arg-type]
        check_shape("x", x, "(B, channels, H, W)", 1, self.channels)
        if x.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"x must have height and width {self.image_size}, got {tuple(x.shape)}")
        _check_labels(labels, self.num_classes, x)
        for block in self.blocks:
            x = block(x)
            if x.shape[2] == self.attention_size:
                x = self.attention(x)
        features = torch.relu(x).sum((2, 3))
        logits = self.linear(features).squeeze(1)
        return logits if labels is None else logits + (self.embed(labels) * features).sum(1)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"image_size={self.image_size}, num_classes={self.num_classes}, attention_size={self.attention_size}"


def sagan_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """The discriminator's hinge loss, ``mean(relu(1 - real)) + mean(relu(1 + fake))``, of logits of any shape."""
    return torch.relu(1 - real_logits).mean() + torch.relu(1 + fake_logits).mean()


def sagan_generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """The generator's hinge loss, ``-mean(fake)``, of the logits that its images get."""
    return -fake_logits.mean()


class _ConditionalBatchNorm2d(nn.BatchNorm2d):
    """``scale[label] * norm(x) + shift[label]``."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, affine=False)
        self.scale = nn.Embedding(num_classes, channels)
        self.shift = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Normalise (B, C, H, W) with labels (B,)."""
        scale, shift = (table(labels).to(x.dtype)[:, :, None, None] for table in (self.scale, self.shift))
        return super().forward(x) * scale + shift


def _batch_norm(channels: int, num_classes: int | None) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels) if num_classes is None else _ConditionalBatchNorm2d(channels, num_classes)


def _conv(*sizes: int, **options: int) -> nn.Module:
    return spectral_norm(nn.Conv2d(*sizes, **options))  # type: ignore[arg-type]


def _upsample(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2)


def _widths(image_size: int, width: int) -> list[int]:
    """Channels of the maps, from half of the images' height and width to 4 x 4; the generator's are twice as high."""
    halvings = (image_size // SMALLEST).bit_length() - 1
    return [width * min(2**halving, WIDEST) for halving in range(halvings)]


def _check_classes(num_classes: int | None) -> None:
    if num_classes is not None:
        check_sizes(num_classes=num_classes)


def _check_sides(image_size: int, attention_size: int | None) -> None:
    check_sizes(image_size=image_size)
    if image_size < 4 * SMALLEST or image_size.bit_count() != 1:
        raise ValueError(f"image_size must be a power of 2 from {4 * SMALLEST}, got {image_size}")
    if attention_size is not None:
        check_sizes(attention_size=attention_size)
        if not 2 * SMALLEST <= attention_size <= image_size // 2 or attention_size.bit_count() != 1:
            raise ValueError(
                f"attention_size must be a power of 2 from {2 * SMALLEST} to image_size // 2 = {image_size // 2}, or "
                f"None, got {attention_size}"
            )


def _check_labels(labels: torch.Tensor | None, num_classes: int | None, x: torch.Tensor) -> None:
    """Raise unless labels are there exactly if there are classes, and are one for each of x."""
    if num_classes is None:
        if labels is not None:
            raise ValueError("labels must be None without num_classes")
        return
    if not isinstance(labels, torch.Tensor) or labels.dtype not in (torch.int64, torch.int32):
        got = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int64 or int32 tensor (B,) with num_classes = {num_classes}, got {got}")
    if labels.shape != x.shape[:1] or labels.device != x.device:
        raise ValueError(
            f"labels must be ({x.shape[0]},) on {x.device}, got {tuple(labels.shape)} on {labels.device}"
        )  # fmt: skip
