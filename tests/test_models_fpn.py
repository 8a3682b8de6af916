"""The feature pyramid against torchvision's and against its formula in plain PyTorch, and a step of training."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from networks import assert_drop_in, assert_runs_everywhere, assert_same_start, settled
from torch import nn

from attnk.models.common import count_parameters
from attnk.models.fpn import FeaturePyramid

CHANNELS, OUT, HEADS = (3, 5, 6, 7), 8, 2
SIZES = {
    "halves": ((16, 12), (8, 6), (4, 3), (2, 2)),
    "odd": ((13, 9), (7, 5), (3, 2), (2, 1)),
    "any": ((5, 6), (6, 3), (4, 4), (1, 1)),
    "equal": ((3, 3),) * 4,
}


class Torchvision(nn.Module):
    """torchvision's pyramid."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.inner_blocks, self.layer_blocks = nn.ModuleList(), nn.ModuleList()
        for channels in in_channels:
            self.inner_blocks.append(nn.Sequential(nn.Conv2d(channels, out_channels, 1)))
            self.layer_blocks.append(nn.Sequential(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.constant_(module.bias, 0)

    def merge(self, level, lateral, coarser):
        return lateral + F.interpolate(coarser, size=lateral.shape[2:], mode="nearest")

    def forward(self, maps):
        merged = self.inner_blocks[-1](maps[-1])
        out = [self.layer_blocks[-1](merged)]
        for level in (2, 1, 0):
            merged = self.merge(level, self.inner_blocks[level](maps[level]), merged)
            out.insert(0, self.layer_blocks[level](merged))
        return out


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Conv2d(OUT, OUT, 1) for _ in range(4))


def places(height, width):
    """DETR's encoding, scaled to a picture of 2 pi a side."""
    out = torch.zeros(OUT, height, width, dtype=torch.float64)
    for first, size, axis in ((0, height, 0), (OUT // 2, width, 1)):
        position = torch.arange(1, size + 1, dtype=torch.float64) / (size + 1e-6) * 2 * torch.pi
        for channel in range(OUT // 2):
            angle = position / 10000 ** (channel // 2 * 4 / OUT)
            wave = angle.cos() if channel % 2 else angle.sin()
            out[first + channel] = wave[:, None] if axis == 0 else wave
    return out


class Attending(Torchvision):
    def __init__(self, merge, levels):
        super().__init__(CHANNELS, OUT)
        self.attention = nn.ModuleDict({str(level): Projections() for level in levels})
        self.adds = merge == "both"
        if levels:
            self.register_buffer("anchor", torch.empty(0), persistent=False)  # as the library's encoding has it

    def merge(self, level, lateral, coarser):
        if str(level) not in self.attention:
            return super().merge(level, lateral, coarser)
        projections = self.attention[str(level)]
        query = projections.q_proj(lateral + places(*lateral.shape[2:]))
        key = projections.k_proj(coarser + places(*coarser.shape[2:]))
        q, k, v = (
            each.flatten(2).unflatten(1, (HEADS, OUT // HEADS)) for each in (query, key, projections.v_proj(coarser))
        )
        weights = (q.mT @ k / (OUT // HEADS) ** 0.5).softmax(3)
        out = projections.out_proj((v @ weights.mT).flatten(1, 2).unflatten(2, lateral.shape[2:]))
        return out + (super().merge(level, lateral, coarser) if self.adds else lateral)


class Flat(nn.Module):
    """A pyramid of maps that are cut out of one vector an image, its levels in one vector."""

    def __init__(self, pyramid, sizes):
        super().__init__()
        self.pyramid = pyramid
        self.shapes = [(channels, *size) for channels, size in zip(CHANNELS, sizes, strict=True)]

    def forward(self, x):
        pieces = x.split([channels * height * width for channels, height, width in self.shapes], 1)
        maps = [piece.unflatten(1, shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
        return torch.cat([level.flatten(1) for level in self.pyramid(maps)], 1)


class Segmenter(nn.Module):
    """A small backbone, its pyramid, and logits for each pixel of the finest level, summed over the levels."""

    def __init__(self, **options):
        super().__init__()
        channels = (4, 8, 12)
        self.backbone = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU())
            for inputs, outputs in zip((3, *channels[:-1]), channels, strict=True)
        )
        self.pyramid = FeaturePyramid(channels, OUT, HEADS, **options)
        self.head = nn.Conv2d(OUT, 3, 1)

    def forward(self, x):
        maps = []
        for stage in self.backbone:
            x = stage(x)
            maps.append(x)
        finest, *coarser = self.pyramid(maps)
        for level in coarser:
            finest = finest + F.interpolate(level, size=finest.shape[2:])
        return self.head(torch.relu(finest))


def random_maps(sizes, batch=2, dtype=torch.float64):
    return [torch.randn(batch, channels, *size, dtype=dtype) for channels, size in zip(CHANNELS, sizes, strict=True)]


def flat(sizes, batch=2):
    return torch.cat([each.flatten(1) for each in random_maps(sizes, batch)], 1)


merges = pytest.mark.parametrize("merge", ["both", "attention", "add"])
all_sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


# Values.


@all_sizes
def test_add_is_torchvisions(sizes):
    ours, theirs = FeaturePyramid(CHANNELS, OUT, merge="add"), Torchvision(CHANNELS, OUT)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_drop_in(Flat(theirs, sizes), Flat(ours, sizes), flat(sizes))


def test_add_starts_as_torchvisions():
    assert_same_start(lambda: Torchvision(CHANNELS, OUT), lambda: FeaturePyramid(CHANNELS, OUT, merge="add"))


@all_sizes
@pytest.mark.parametrize("merge", ["both", "attention"])
@pytest.mark.parametrize("levels", [(0, 1, 2), (2,), (0, 2), ()], ids=str)
def test_attention_equals_its_formula(merge, levels, sizes):
    ours = FeaturePyramid(CHANNELS, OUT, HEADS, merge=merge, attention_levels=levels)
    assert_drop_in(Flat(Attending(merge, levels), sizes), Flat(ours, sizes), flat(sizes))


def test_attends_at_the_two_coarsest_merges():
    sizes = SIZES["odd"]
    for merge in ("both", "attention"):
        ours = FeaturePyramid(CHANNELS, OUT, HEADS, merge=merge)
        assert_drop_in(Flat(Attending(merge, (1, 2)), sizes), Flat(ours, sizes), flat(sizes))
    assert list(FeaturePyramid((4, 4), OUT).attention) == ["0"]
    assert list(FeaturePyramid((4,), OUT).attention) == []
    assert FeaturePyramid().merge == "both"


def test_both_starts_as_the_plain_pyramid():
    """Weights of the plain one load but for the attention's, and at first it computes the same; then it learns."""
    plain, ours = FeaturePyramid(CHANNELS, OUT, merge="add").double(), FeaturePyramid(CHANNELS, OUT, HEADS).double()
    keys = ours.load_state_dict(plain.state_dict(), strict=False)
    assert all(key.startswith("attention.") for key in keys.missing_keys)
    assert not keys.unexpected_keys
    maps = random_maps(SIZES["odd"])
    out = ours(maps)
    for level, other in zip(out, plain(maps), strict=True):
        assert torch.equal(level, other)
    sum(level.square().sum() for level in out).backward()
    for attention in ours.attention.values():
        assert attention.out_proj.weight.grad.any()


@merges
def test_gradients_reach_everything(merge):
    maps = [each.requires_grad_() for each in random_maps(SIZES["odd"])]
    pyramid = settled(FeaturePyramid(CHANNELS, OUT, HEADS, merge=merge))
    sum(level.square().sum() for level in pyramid(maps)).backward()
    assert all(each.grad.abs().min() > 0 for each in maps)
    for name, parameter in pyramid.named_parameters():
        if not name.endswith("k_proj.bias"):  # which moves all logits of a query alike
            assert parameter.grad.any(), name


def test_attention_reaches_all_pixels():
    """One pixel of the coarsest map moves every pixel of the level that attends to it, but few of the plain one's."""
    maps = random_maps(SIZES["halves"])
    changed = [*maps[:3], maps[3].clone()]
    changed[3][:, :, 0, 0] += 1
    for merge in ("both", "attention", "add"):
        pyramid = settled(FeaturePyramid(CHANNELS, OUT, HEADS, merge=merge))
        moved = (pyramid(changed)[2] != pyramid(maps)[2]).any(1)
        assert bool(moved.all()) == (merge != "add"), merge
        assert moved.any()


def test_attention_knows_places():
    """Maps of one value each have the same value everywhere in lateral and merged maps, not so in the attention."""
    pyramid = settled(FeaturePyramid((3, 3), OUT, HEADS, merge="attention"))
    coarse = torch.randn(1, 3, 1, 4, dtype=torch.float64).expand(-1, -1, 4, -1)
    merged = []
    pyramid.layer_blocks[0].register_forward_hook(lambda module, args, out: merged.append(args[0]))
    pyramid([torch.ones(1, 3, 6, 6, dtype=torch.float64), coarse])
    assert not torch.allclose(merged[0][..., 0], merged[0][..., 3])


@merges
@pytest.mark.parametrize("kind", [list, tuple, dict, OrderedDict])
def test_containers(merge, kind):
    pyramid = settled(FeaturePyramid(CHANNELS, OUT, HEADS, merge=merge))
    maps = random_maps(SIZES["odd"])
    expected = pyramid(maps)
    assert isinstance(expected, list)
    assert [level.shape for level in expected] == [(2, OUT, *size) for size in SIZES["odd"]]
    if kind in (list, tuple):
        got = pyramid(kind(maps))
    else:
        named = pyramid(kind(zip("abcd", maps, strict=True)))
        assert list(named) == list("abcd")
        got = list(named.values())
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@merges
def test_channels_last(merge):
    pyramid = settled(FeaturePyramid(CHANNELS, OUT, HEADS, merge=merge))
    maps = random_maps(SIZES["odd"])
    expected = pyramid(maps)
    pyramid = pyramid.to(memory_format=torch.channels_last)
    with torch.no_grad():
        out = pyramid([each.contiguous(memory_format=torch.channels_last) for each in maps])
    for level, other in zip(out, expected, strict=True):
        torch.testing.assert_close(level, other)
        assert level.is_contiguous(memory_format=torch.channels_last)


def test_count():
    """Of the plain one on a ResNet-50: 4 x 256 x (channels + 1) lateral, and 3 x 3 convolutions; attention besides."""
    with torch.device("meta"):
        plain = count_parameters(FeaturePyramid(merge="add"))
        both = count_parameters(FeaturePyramid())
    assert plain == 256 * (256 + 512 + 1024 + 2048 + 4) + 4 * 256 * (9 * 256 + 1) == 3_344_384
    assert both - plain == 2 * 4 * 256 * 257


# In a network.


@merges
def test_runs_everywhere(merge):
    assert_runs_everywhere(Segmenter(merge=merge), torch.randn(2, 3, 13, 18))


@merges
def test_a_step_lowers_the_loss(merge):
    model = Segmenter(merge=merge)
    x, labels = torch.randn(2, 3, 16, 16), torch.randint(3, (2, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = F.cross_entropy(model(x), labels)
    before.backward()
    optimizer.step()
    assert F.cross_entropy(model(x), labels) < before


@pytest.mark.parametrize("merge", ["both", "attention"])
def test_learns_what_is_far_away(merge):
    """Every pixel tells which of three corners of the picture is bright, 3 pixels wide: only attention sees it."""
    torch.manual_seed(0)
    losses = {}
    x, labels = torch.zeros(3, 3, 64, 64), torch.arange(3)
    for index, (row, column) in enumerate(((0, 0), (0, 61), (61, 0))):
        x[index, :, row : row + 3, column : column + 3] = 1
    target = labels[:, None, None].expand(-1, 32, 32)
    for each in (merge, "add"):
        model = Segmenter(merge=each)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(80):
            loss = F.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[each] = loss.item()
    assert losses[merge] < 0.1
    assert losses["add"] > 0.5


# Errors.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FeaturePyramid(()), r"in_channels must have at least one level, got \(\)"),
        (lambda: FeaturePyramid((4, 0)), r"in_channels\[1\] must be a positive integer, got 0"),
        (lambda: FeaturePyramid((4, 4), 0), "out_channels must be a positive integer, got 0"),
        (lambda: FeaturePyramid((4, 4), 8, 0), "num_heads must be a positive integer, got 0"),
        (lambda: FeaturePyramid((4, 4), 6, 2), "out_channels must be a multiple of 4 and of num_heads = 2 .*, got 6"),
        (lambda: FeaturePyramid((4, 4), 8, 3), "out_channels must be a multiple of 4 and of num_heads = 3 .*, got 8"),
        (lambda: FeaturePyramid((4, 4), merge="sum"), "merge must be one of 'both', 'attention', 'add', got 'sum'"),
        (lambda: FeaturePyramid((4, 4), attention_levels=(1,)), r"attention_levels must be .* from 0 to 0, got \[1\]"),
        (lambda: FeaturePyramid((4, 4), attention_levels=(-1,)), r"attention_levels must be .* got \[-1\]"),
        (
            lambda: FeaturePyramid((4, 4), merge="add", attention_levels=(0,)),
            r"merge='add' has no attention, got attention_levels=\[0\]",
        ),
    ],
)
def test_refuses_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_add_takes_any_channels():
    maps = random_maps(SIZES["odd"], dtype=torch.float32)
    assert [level.shape[1] for level in FeaturePyramid(CHANNELS, 5, merge="add")(maps)] == [5] * 4
    assert [level.shape[1] for level in FeaturePyramid(CHANNELS, 5, attention_levels=())(maps)] == [5] * 4


PYRAMID = FeaturePyramid((3, 4), OUT, HEADS)
FINE, COARSE = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 2, 2)


@pytest.mark.parametrize(
    ("maps", "error", "words"),
    [
        (FINE, TypeError, "maps must be a list, tuple or dict, got Tensor"),
        ([FINE], ValueError, "maps must be 2, one for each level, got 1"),
        ({"a": FINE}, ValueError, "maps must be 2, one for each level, got 1"),
        ([COARSE, FINE], ValueError, r"maps\[0\] must be \(B, C, H, W\) with C = 3"),
        ([FINE, COARSE[0]], ValueError, r"maps\[1\] must be \(B, C, H, W\) with C = 4"),
        ([FINE, COARSE.double()], TypeError, r"maps\[1\] must have the dtype of the module"),
        ([FINE, None], TypeError, r"maps\[1\] must be a tensor, got NoneType"),
        ([FINE, COARSE[:1]], ValueError, r"maps\[1\] must have the batch size of maps\[0\], 2, got 1"),
        ([FINE, COARSE[..., :0]], ValueError, r"maps\[1\] must have at least one pixel, got \(2, 4, 2, 0\)"),
    ],
)
def test_refuses_at_call(maps, error, words):
    with pytest.raises(error, match=words):
        PYRAMID(maps)


def test_weights_that_are_assigned():
    maps = [torch.randn(1, 4, 8, 8), torch.randn(1, 8, 4, 4)]
    expected = FeaturePyramid((4, 8), 8, 2).eval()
    with torch.device("meta"):
        model = FeaturePyramid((4, 8), 8, 2).eval()
    model.load_state_dict(expected.state_dict(), assign=True)
    for got, wanted in zip(model(maps), expected(maps), strict=True):
        assert torch.equal(got, wanted)


def test_exports_for_any_batch():
    batch = torch.export.Dim("batch")
    maps = [torch.randn(3, 4, 8, 8), torch.randn(3, 8, 4, 4)]
    model = FeaturePyramid((4, 8), 8, 2).eval()
    program = torch.export.export(model, ([each[:2] for each in maps],), dynamic_shapes=([{0: batch}, {0: batch}],))
    for got, wanted in zip(program.module()(maps), model(maps), strict=True):
        torch.testing.assert_close(got, wanted)
