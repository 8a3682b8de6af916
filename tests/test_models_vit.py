"""The vision transformer against what the tutorial computes, which never sees the image, and against ViT."""

import pytest
import torch
import torch.nn.functional as F
from networks import assert_drop_in, assert_runs_everywhere, assert_same_start, settled
from torch import nn

import attnk
from attnk.models import ViT, ViTBlock
from attnk.testing import published

DIM, HEADS = 12, 3
SIZES = {"image_size": 16, "patch_size": 4, "dim": DIM, "depth": 2, "num_heads": HEADS, "num_classes": 5}


class PlainBlock(published.ViTBlock):
    """Norms first, attention between the tokens."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.mha.batch_first = True

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.mha(y, y, y)[0]
        return x + self.ffn(self.norm2(x))


class PlainViT(published.ViT):
    """Of such blocks, with a norm at the end."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.blocks = nn.ModuleList(PlainBlock(sizes["dim"], sizes["num_heads"]) for _ in range(sizes["depth"]))

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(F.layer_norm(x[:, 0], x.shape[-1:]))


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, dtype=torch.float64)


def test_block_as_published():
    x = torch.randn(4, 6, DIM, dtype=torch.float64)
    assert_drop_in(published.ViTBlock(DIM, HEADS), ViTBlock(DIM, HEADS, compat="original"), x)
    assert_same_start(lambda: published.ViTBlock(DIM, HEADS), lambda: ViTBlock(DIM, HEADS))


def test_block_attends_between_tokens():
    x = torch.randn(4, 6, DIM, dtype=torch.float64)
    assert_drop_in(PlainBlock(DIM, HEADS), ViTBlock(DIM, HEADS), x)


def test_vit_as_published(images):
    assert_drop_in(published.ViT(**SIZES), ViT(**SIZES, compat="original"), images)
    assert_drop_in(published.ViT(**SIZES), ViT(**SIZES, compat="original"), images[:1])
    assert_same_start(lambda: published.ViT(**SIZES), lambda: ViT(**SIZES, compat="original"))


def test_vit_equals_its_formula(images):
    assert_drop_in(PlainViT(**SIZES), ViT(**SIZES), images)


def test_published_weights_load_in_the_repaired_one(images):
    theirs, ours = settled(published.ViT(**SIZES)), settled(ViT(**SIZES))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours(images).shape == (3, 5)
    assert not torch.allclose(ours(images), theirs(images))


# What the published network does not see.


@pytest.mark.parametrize("compat", [None, "original"])
def test_sees_the_image(compat, images):
    model = settled(ViT(**SIZES, compat=compat))
    images.requires_grad_()
    logits = model(images)
    (grad,) = torch.autograd.grad(logits.square().sum(), images)
    seen = compat is None
    assert bool(grad.abs().min() > 0) == seen
    assert bool(grad.any()) == seen
    assert torch.allclose(logits[0], logits[1]) == (not seen)
    other = images.detach().clone()
    other[1] = torch.randn_like(other[1])
    assert torch.equal(model(other)[1], logits[1]) == (not seen)


@pytest.mark.parametrize("compat", [None, "original"])
def test_who_attends_to_whom(compat):
    """A change of one token reaches the other tokens of its image; as published, its like in other images."""
    block = settled(ViTBlock(DIM, HEADS, compat))
    x = torch.randn(3, 6, DIM, dtype=torch.float64)
    changed = x.clone()
    changed[1, 4] += 1
    reached = (block(changed) != block(x)).any(-1)
    expected = torch.zeros(3, 6, dtype=torch.bool)
    if compat is None:
        expected[1] = True
    else:
        expected[:, 4] = True
    assert torch.equal(reached, expected)


@pytest.mark.parametrize("compat", [None, "original"])
def test_depends_on_the_batch(compat):
    block = settled(ViTBlock(DIM, HEADS, compat))
    x = torch.randn(3, 6, DIM, dtype=torch.float64)
    assert torch.allclose(block(x)[:1], block(x[:1])) == (compat is None)


# Positions.


@pytest.mark.parametrize("compat", [None, "original"])
@pytest.mark.parametrize("size", [(24, 24), (8, 20), (19, 33), (4, 4)])
def test_positions_are_resized(compat, size):
    model = settled(ViT(**SIZES, compat=compat))
    kind = PlainViT if compat is None else published.ViT
    rows, columns = size[0] // 4, size[1] // 4
    theirs = settled(kind(**SIZES))
    state = model.state_dict()
    square = state["pos_embed"][:, 1:].mT.reshape(1, DIM, 4, 4)
    resized = F.interpolate(square, size=(rows, columns), mode="bicubic").flatten(2).mT
    theirs.pos_embed = nn.Parameter(torch.cat([state["pos_embed"][:, :1], resized], 1))
    state.pop("pos_embed")
    theirs.load_state_dict(state, strict=False)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(model(x), theirs(x))
    model(x).square().sum().backward()
    assert bool(model.pos_embed.grad[:, 1:].any()) == (compat is None)


def test_published_positions_fit_one_size():
    with pytest.raises(RuntimeError, match="must match"):
        published.ViT(**SIZES)(torch.randn(1, 3, 24, 24))


def test_starts_small():
    torch.manual_seed(0)
    model = ViT(32, 4, 32, 1, 2, 3)
    assert 0.018 < model.pos_embed.std() < 0.022
    assert model.pos_embed.abs().max() > 0.05
    assert model.cls_token.abs().max() < 0.1
    assert 0.9 < ViT(32, 4, 32, 1, 2, 3, compat="original").pos_embed.std() < 1.1


def test_count():
    with torch.device("meta"):
        for compat in (None, "original"):
            model = ViT(compat=compat)
            assert attnk.count_parameters(model) == 86_566_120
            assert model.pos_embed.shape == (1, 197, 768)


# Where it runs.


@pytest.mark.parametrize("compat", [None, "original"])
def test_runs_everywhere(compat):
    assert_runs_everywhere(ViT(**SIZES, compat=compat), torch.randn(2, 3, 8, 8))


def test_block_runs_everywhere():
    assert_runs_everywhere(ViTBlock(DIM, HEADS), torch.randn(2, 5, DIM), autocast_dtype=torch.float32)


@pytest.mark.parametrize("compat", [None, "original"])
def test_learns(compat):
    """Four images, four labels: the published network cannot tell them apart."""
    torch.manual_seed(0)
    model = ViT(16, 4, 24, 2, 3, 4, compat)
    x, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chance = torch.tensor(4.0).log()
    assert loss < 0.05 if compat is None else loss > chance - 1e-3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ViT(8, 16), "image_size must be at least patch_size = 16, got 8"),
        (lambda: ViT(depth=0), "depth must be a positive integer, got 0"),
        (lambda: ViT(dim=10, num_heads=3), "embed_dim must be divisible by num_heads"),
        (lambda: ViT(**SIZES, compat="old"), "compat must be None or 'original', got 'old'"),
        (lambda: ViTBlock(10, 3), "embed_dim must be divisible by num_heads"),
        (lambda: ViTBlock(12, 3, "old"), "compat must be None or 'original', got 'old'"),
    ],
)
def test_refuses_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("model", "x", "error", "words"),
    [
        (ViT(**SIZES), torch.zeros(3, 16, 16), ValueError, r"x must be \(B, C, H, W\) with C = 3"),
        (ViT(**SIZES), torch.zeros(1, 3, 16, 3), ValueError, "at least one patch of 4 pixels"),
        (ViT(**SIZES), torch.zeros(1, 3, 16, 16).half(), TypeError, "x must have the dtype of the module"),
        (ViTBlock(DIM, HEADS), torch.zeros(1, 3, 8), ValueError, r"x must be \(B, N, dim\) with dim = 12"),
    ],
)
def test_refuses_at_call(model, x, error, words):
    with pytest.raises(error, match=words):
        model(x)
