"""The vision transformer (Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929), as a tutorial has it."""

import torch
import torch.nn.functional as F
from torch import nn

from attnk.models.common import check_compat, check_images, check_patch
from attnk.modules._checks import check_heads, check_shape, check_sizes, check_tensor
from attnk.modules.multihead import MultiheadAttention
from attnk.modules.position import STD, resize_grid


class ViTBlock(nn.Module):
    """Self-attention and a feed-forward network of tokens, each with a layer norm and a residual.

    ``x = x + mha(norm1(x)); x = x + ffn(norm2(x))``, as in ViT. A widely copied tutorial has this class with the norms
    after the residuals and, which is worse, with an ``nn.MultiheadAttention`` that takes its first axis for the
    sequence: given (B, N, dim), each token attends to the tokens of the same number in the other images of the batch,
    and never to another one of its own image. ``compat="original"`` does just that.

    Keys, as published: ``mha.in_proj_{weight,bias}``, ``mha.out_proj.*``, ``ffn.{0,2}.*``, ``norm{1,2}.*``.

    Args:
        dim: channels of the tokens.
        num_heads: heads; a divisor of ``dim``.
        compat: None, or "original".

    Raises:
        ValueError: a size that is no positive integer, ``dim`` that the heads do not divide, an unknown ``compat``.
    """

    def __init__(self, dim: int, num_heads: int, compat: str | None = None) -> None:
        super().__init__()
        check_compat(compat)
        self.dim = dim
        self.compat = compat
        self.mha = MultiheadAttention(dim, num_heads, batch_first=compat is None)
        self.ffn = nn.Sequential(nn.Linear(dim, dim * 4), nn.ReLU(), nn.Linear(dim * 4, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block.

        Args:
            x: (B, N, dim), in the dtype of the weights (under autocast, any float dtype).

        Returns:
            (B, N, dim).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_tensor("x", x, self.norm1.weight)
        check_shape("x", x, "(B, N, dim)", 2, self.dim)
        if self.compat == "original":
            x = self.norm1(x + self._attend(x))
            return self.norm2(x + self.ffn(x))
        x = x + self._attend(self.norm1(x))
        return x + self.ffn(self.norm2(x))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.mha(x, x, x, need_weights=False)[0]

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"compat={self.compat!r}"


class ViT(nn.Module):
    """A vision transformer: patches, a class token, blocks, and a linear classifier of the class token.

    A widely copied tutorial has this class. What is wrong there, and what is done about it:

    - Its blocks attend over the batch (see ``ViTBlock``). The class token never meets a patch: the logits are the same
      for every image, and the gradient of the image is zero. Here the tokens of an image attend to each other.
    - Positions fit one size of images. Here they are resized bicubically to any other, in ``compat="original"`` too.
    - Norms follow the residuals, and there is none at the end. Here they precede the branches, and one without weights
      stands before the classifier, whose linear map has its weights already.
    - Positions and class token start as large as a normalised token (standard deviation 1). Here it is 0.02, truncated.

    ``compat="original"`` is the published function, and its initial weights from the same seed.

    Keys, as published: ``patch_embed.*``, ``pos_embed`` (1, N + 1, dim) with the class token's first, ``cls_token``,
    ``blocks.{i}.*``, ``head.*``; they load strictly in either.

    Args:
        image_size: height and width that the positions are made for.
        patch_size: height and width of a patch.
        dim: channels of the tokens.
        depth: how many blocks.
        num_heads: heads; a divisor of ``dim``.
        num_classes: how many logits.
        compat: None, or "original".

    Raises:
        ValueError: a size that is no positive integer, images smaller than a patch, ``dim`` that the heads do not
            divide, an unknown ``compat``.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int = 1000,
        compat: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, num_classes=num_classes)
        check_heads(dim, num_heads)
        check_compat(compat)
        if image_size < patch_size:
            raise ValueError(f"image_size must be at least patch_size = {patch_size}, got {image_size}")
        self.grid_size = image_size // patch_size
        self.patch_size = patch_size
        self.compat = compat
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(torch.randn(1, self.grid_size**2 + 1, dim))
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads, compat) for _ in range(depth))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.head = nn.Linear(dim, num_classes)
        if compat is None:
            nn.init.trunc_normal_(self.pos_embed, std=STD)
            nn.init.trunc_normal_(self.cls_token, std=STD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify.

        Args:
            x: images (B, 3, H, W) of at least one patch, in the dtype of the weights (under autocast, any float
                dtype). What is left of the last patch of a row or column is not seen.

        Returns:
            Logits (B, num_classes).

        Raises:
            ValueError, TypeError: a shape, dtype or device that does not fit; the message names it.
        """
        check_images(x, self.patch_embed.weight)
        check_patch(x, self.patch_size)
        patches = self.patch_embed(x)
        position = self._position(*patches.shape[2:])
        tokens = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], 1) + position
        for block in self.blocks:
            x = block(x)
        x = x[:, 0]
        return self.head(x if self.compat == "original" else F.layer_norm(x, x.shape[-1:]))

    def _position(self, height: int, width: int) -> torch.Tensor:
        if (height, width) == (self.grid_size, self.grid_size):
            return self.pos_embed
        grid = self.pos_embed[0, 1:].unflatten(0, (self.grid_size, self.grid_size))
        return torch.cat([self.pos_embed[:, :1], resize_grid(grid, height, width).flatten(0, 1).unsqueeze(0)], 1)

    def extra_repr(self) -> str:
        """The options that the children do not show."""
        return f"grid_size={self.grid_size}, compat={self.compat!r}"
