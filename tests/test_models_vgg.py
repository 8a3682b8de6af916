"""VGG16 with attention and with spatial attention, against what the tutorials compute and torchvision's numbers."""

import weakref

import pytest
import torch
from networks import assert_drop_in, assert_runs_everywhere, assert_same_start, settled
from torch import nn

import attnk
from attnk import models
from attnk.models import VGG16WithAttention, VGG16WithSpatialAttention, remap_state_dict
from attnk.testing import published

WIDTH, CLASSES, SIDE = 8, 3, 32
VGG16_PARAMETERS = 138_357_544


def vgg16(num_classes=CLASSES, width=WIDTH):
    """The plain network: torchvision's keys, and no attention."""
    return published.VGG16WithAttention(num_classes, (), width=width)


def published_attention(positions=(3, 4)):
    return published.VGG16WithAttention(CLASSES, positions, width=WIDTH)


def published_spatial():
    return published.VGG16WithSpatialAttention(CLASSES, width=WIDTH)


@pytest.fixture
def images():
    return torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)


# As published.


@pytest.mark.parametrize("positions", [(3, 4), (3, 4, 5), (1, 2, 5), ()], ids=str)
def test_attention_as_published(positions, images):
    theirs = published_attention(positions)
    ours = models.vgg16_with_attention(CLASSES, list(positions), compat="original", width=WIDTH)
    assert_drop_in(theirs, ours, images)


def test_spatial_as_published(images):
    ours = models.vgg16_with_spatial_attention(CLASSES, compat="original", width=WIDTH)
    assert_drop_in(published_spatial(), ours, images)


@pytest.mark.parametrize("side", [33, 47])
def test_as_published_at_other_sizes(side):
    x = torch.randn(1, 3, side, side + 3, dtype=torch.float64)
    assert_drop_in(published_attention(), VGG16WithAttention(CLASSES, compat="original", width=WIDTH), x)
    assert_drop_in(published_spatial(), VGG16WithSpatialAttention(CLASSES, compat="original", width=WIDTH), x)


def test_starts_as_published():
    assert_same_start(
        lambda: published_attention((3, 5)), lambda: VGG16WithAttention(CLASSES, (3, 5), None, "original", width=WIDTH)
    )
    assert_same_start(published_spatial, lambda: VGG16WithSpatialAttention(CLASSES, "original", width=WIDTH))


def test_published_keys_load_in_the_repaired_ones_too():
    settled(VGG16WithAttention(CLASSES, width=WIDTH)).load_state_dict(published_attention().state_dict(), strict=True)
    repaired = settled(VGG16WithSpatialAttention(CLASSES, width=WIDTH))
    theirs = settled(published_spatial())
    repaired.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(repaired.features[5].conv1.weight, theirs.features[5].conv1.weight)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: models.vgg16_with_spatial_attention(), VGG16_PARAMETERS + 490),
        (lambda: models.vgg16_with_spatial_attention(compat="original"), VGG16_PARAMETERS + 490),
        (lambda: models.vgg16_with_attention(attention_positions=()), VGG16_PARAMETERS),
        (lambda: models.vgg16_with_attention(), VGG16_PARAMETERS + 789_760 + 3_152_384),
        (lambda: models.vgg16_with_attention(attention_positions=[3, 4, 5]), 145_452_072),
        (lambda: models.vgg16_with_attention(attention_positions=(1, 2), compat="original"), VGG16_PARAMETERS),
        (lambda: models.vgg16_with_attention(attention_positions=(1,)), VGG16_PARAMETERS + 49_984),
    ],
)
def test_counts(make, expected):
    with torch.device("meta"):
        assert attnk.count_parameters(make()) == expected


def test_count_is_of_what_is_trained():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert attnk.count_parameters(model) == 16 + 8
    model[0].weight.requires_grad_(False)
    model.append(model[1])
    assert attnk.count_parameters(model) == 4 + 8


# Attention behind the pooling.


def test_attention_follows_the_pooling(images):
    model = settled(VGG16WithAttention(CLASSES, (1, 2, 3, 4, 5), width=WIDTH))
    tokens = {}
    for name, layer in model.attention_layers.items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: tokens.update({name: inputs[0].shape}))
    model(images)
    assert tokens == {
        f"block{block}": (2, (SIDE >> block) ** 2, channels)
        for block, channels in ((1, 8), (2, 16), (3, 32), (4, 64), (5, 64))
    }


@pytest.mark.parametrize("block", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("position", ["sinusoidal", "learned", None])
def test_equals_its_formula(block, position, images):
    model = settled(VGG16WithAttention(CLASSES, [block], position, width=WIDTH, image_size=SIDE))
    plain = vgg16().double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "attention" not in k and "pos" not in k})
    layer = published.TransformerEncoderLayer(WIDTH * (1, 2, 4, 8, 8)[block - 1]).double().eval()
    name = f"block{block}"
    layer.load_state_dict(model.attention_layers[name].state_dict(), strict=True)
    x = images
    for index, part in enumerate(plain.features):
        x = part(x)
        if index == (4, 9, 16, 23, 30)[block - 1]:
            tokens = x.flatten(2).transpose(1, 2)
            if position == "sinusoidal":
                encoding = attnk.SinusoidalPosition2d(tokens.shape[2]).double()(*x.shape[2:])
                tokens = tokens + encoding / tokens.shape[2] ** 0.5
            elif position == "learned":
                tokens = tokens + model.positions[name].pos_embed
            x = layer(tokens).transpose(1, 2).reshape(x.shape)
    expected = plain.eval().classifier(torch.flatten(plain.avgpool(x), 1))
    torch.testing.assert_close(model(images), expected)


def test_relative_position(images):
    model = settled(VGG16WithAttention(CLASSES, [3], "relative", width=WIDTH, image_size=SIDE))
    layer = model.attention_layers["block3"]
    table = model.positions["block3"]
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    expected = layer(x.flatten(2).mT, bias=table.dense()).mT.reshape(x.shape)
    torch.testing.assert_close(model._apply_attention(x, "block3"), expected)
    model(images).square().sum().backward()
    assert table.relative_position_bias_table.grad.abs().sum() > 0


@pytest.mark.parametrize("position", ["sinusoidal", "learned", "relative", None])
def test_position_tells_pixels_apart(position):
    model = settled(VGG16WithAttention(CLASSES, [4], position, width=WIDTH, image_size=48))
    x = torch.randn(1, 64, 3, 3, dtype=torch.float64)
    order = torch.randperm(9)
    shuffled = x.flatten(2)[..., order].view(x.shape)
    got = model._apply_attention(shuffled, "block4").flatten(2)
    expected = model._apply_attention(x, "block4").flatten(2)[..., order]
    assert torch.allclose(got, expected) == (position is None)


@pytest.mark.parametrize("position", ["sinusoidal", "learned", "relative"])
def test_positions_fit_other_sizes(position):
    model = settled(VGG16WithAttention(CLASSES, (3, 4, 5), position, width=WIDTH, image_size=64))
    for size in ((64, 64), (32, 32), (50, 96)):
        assert model(torch.randn(1, 3, *size, dtype=torch.float64)).shape == (1, CLASSES)


# Gates.


def test_the_gated_network_starts_as_the_plain_one(images):
    plain = settled(vgg16())
    model = settled(VGG16WithSpatialAttention(CLASSES, width=WIDTH))
    for index in (5, 11, 19, 27, 35):
        nn.init.zeros_(model.features[index].conv1.weight)  # as they start
    assert not any(gate.conv1.weight.any() for gate in VGG16WithSpatialAttention(CLASSES, width=WIDTH).features[5::30])
    model.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(model(images), plain(images))
    model(images).square().sum().backward()
    assert all(model.features[index].conv1.weight.grad.abs().sum() > 0 for index in (5, 11, 19, 27, 35))


def test_gates_double_what_was_published(images):
    model = settled(VGG16WithSpatialAttention(CLASSES, width=WIDTH))
    gate, theirs = model.features[5], published.SpatialAttention().double()
    theirs.load_state_dict(gate.state_dict(), strict=True)
    x = torch.randn(2, WIDTH, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(gate(x), 2 * theirs(x) * x)


@pytest.mark.parametrize("compat", [None, "original"])
def test_features_are_what_the_classifier_reads(compat, images):
    model = settled(VGG16WithSpatialAttention(CLASSES, compat, width=WIDTH))
    features = model.features(images)
    assert features.shape == (2, 8 * WIDTH, 1, 1)
    expected = model.classifier(torch.flatten(model.avgpool(features), 1))
    assert torch.equal(model(images), expected)
    if compat:
        theirs = settled(published_spatial())
        theirs.load_state_dict(model.state_dict())
        torch.testing.assert_close(features, theirs.extract(images))


@pytest.mark.parametrize("compat", [None, "original"])
def test_no_activation_is_kept(compat, images):
    model = settled(VGG16WithSpatialAttention(CLASSES, compat, width=WIDTH))
    made, alive = [], []
    for layer in model.features:
        layer.register_forward_hook(lambda _, inputs, out: made.append(weakref.ref(out)))
        layer.register_forward_hook(lambda *_: alive.append(len({id(r()) for r in made if r() is not None})))
    with torch.no_grad():
        model(images)
    assert len(alive) == 36
    assert max(alive) <= 2


# Weights.


def nested(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize("compat", [None, "original"])
def test_plain_weights_load_in_the_gated_network(compat):
    plain = settled(vgg16())
    for wrap, prefix in ((lambda model: model, ""), (nn.Sequential, "0.")):
        model = settled(VGG16WithSpatialAttention(CLASSES, compat, width=WIDTH))
        gates = [model.features[index].conv1.weight.clone() for index in (5, 11, 19, 27, 35)]
        for parameter in model.classifier.parameters():
            nn.init.zeros_(parameter)
        state = nested(plain.state_dict(), prefix)
        before = list(state)
        wrap(model).load_state_dict(state, strict=True)
        assert list(state) == before
        kept = [model.features[index].conv1.weight for index in (5, 11, 19, 27, 35)]
        assert all(torch.equal(*pair) for pair in zip(kept, gates, strict=True))
        mine = [(name, p) for name, p in model.named_parameters() if "conv1" not in name]
        assert all(torch.equal(p, other) for (_, p), other in zip(mine, plain.parameters(), strict=True))


def test_what_is_missing_or_too_much_is_still_said():
    state = vgg16().state_dict()
    del state["classifier.6.bias"]
    state["features.7.other"] = torch.zeros(1)
    model = VGG16WithSpatialAttention(CLASSES, width=WIDTH)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*classifier\.6\.bias.*Unexpected.*features\.7\.other"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for classifier\.6\.weight"):
        model.load_state_dict(vgg16(num_classes=5).state_dict())
    partly = {key: tensor for key, tensor in published_spatial().state_dict().items() if ".11." not in key}
    with pytest.raises(RuntimeError, match=r"Missing key.*features\.11\.conv1\.weight"):
        model.load_state_dict(partly)
    with pytest.raises(RuntimeError, match=r"Missing key.*attention_layers"):
        VGG16WithAttention(CLASSES, width=WIDTH).load_state_dict(vgg16().state_dict())


TARGETS = {
    "spatial": lambda: VGG16WithSpatialAttention(CLASSES, width=WIDTH),
    "spatial, original": lambda: VGG16WithSpatialAttention(CLASSES, "original", width=WIDTH),
    "attention": lambda: VGG16WithAttention(CLASSES, (1, 5), "learned", width=WIDTH, image_size=SIDE),
    "plain": vgg16,
}
SOURCES = {**TARGETS, "shifted": published_spatial, "published attention": lambda: published_attention((3, 5))}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_remap(source, target):
    theirs, model = settled(SOURCES[source]()), TARGETS[target]().double()
    own, given = dict(model.state_dict()), dict(theirs.state_dict())
    state = remap_state_dict(given, model)
    assert list(given) == list(theirs.state_dict())
    shapes = {key: tensor.shape for key, tensor in own.items()}
    assert {key: tensor.shape for key, tensor in state.items()} == shapes
    convs = [[layer.weight for layer in each.features if isinstance(layer, nn.Conv2d)] for each in (theirs, model)]
    model.load_state_dict(state, strict=True)
    assert len(convs[0]) == 13
    assert all(torch.equal(*pair) for pair in zip(*convs, strict=True))
    assert torch.equal(model.classifier[6].bias, theirs.classifier[6].bias)
    for key in set(own) - set(vgg16().state_dict()):
        if "conv1" in key or "attention" in key or "pos" in key:
            assert torch.equal(state[key], given.get(key, own[key]))


def test_remap_makes_the_plain_network(images):
    plain, model = settled(vgg16()), VGG16WithSpatialAttention(CLASSES, width=WIDTH).double().eval()
    model.load_state_dict(remap_state_dict(plain.state_dict(), model))
    torch.testing.assert_close(model(images), plain.eval()(images))


@pytest.mark.parametrize(
    ("state", "model", "words"),
    [
        ({"features.0.weight": 0}, vgg16, r"state must be a VGG16.*got \(0,\)"),
        ({}, vgg16, r"state must be a VGG16.*got \(\)"),
        (None, lambda: nn.Linear(2, 3), r"model must be a VGG16.*got \(\)"),
    ],
)
def test_remap_refuses(state, model, words):
    with pytest.raises(ValueError, match=words):
        remap_state_dict(vgg16().state_dict() if state is None else state, model())


# Where it runs.


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: VGG16WithAttention(CLASSES, (4, 5), width=WIDTH), {}),
        (
            lambda: VGG16WithAttention(CLASSES, (4,), "relative", width=WIDTH, image_size=SIDE),
            {"kernels": False, "compiled": False},
        ),
        (lambda: VGG16WithAttention(CLASSES, (5,), compat="original", width=WIDTH), {"compiled": False}),
        (lambda: VGG16WithSpatialAttention(CLASSES, width=WIDTH), {}),
        (lambda: VGG16WithSpatialAttention(CLASSES, compat="original", width=WIDTH), {"kernels": False}),
    ],
)
def test_runs_everywhere(make, options):
    assert_runs_everywhere(make(), torch.randn(2, 3, SIDE, SIDE), **options)


def test_dropout_is_where_it_was():
    shares = [
        part.p for part in VGG16WithAttention(CLASSES, (3,), width=WIDTH).modules() if isinstance(part, nn.Dropout)
    ]
    assert shares == [0.1, 0.1, 0.1, 0.5, 0.5]


def test_convolutions_start_large_enough():
    """As torchvision's: a map keeps its size on the way through; as published it fades away."""
    x = torch.randn(2, 3, 64, 64)
    deep, faded = (VGG16WithAttention(CLASSES, (), compat=compat, width=WIDTH) for compat in (None, "original"))
    assert deep.features(x).std() > 0.1
    assert faded.features(x).std() < 0.02
    convs = [layer for layer in deep.features if isinstance(layer, nn.Conv2d)]
    assert not any(conv.bias.any() for conv in convs)
    for conv in convs[6:]:
        assert 0.95 < conv.weight.std() / (2 / (9 * conv.out_channels)) ** 0.5 < 1.05


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VGG16WithAttention(0), "num_classes must be a positive integer, got 0"),
        (lambda: VGG16WithAttention(3, (0, 3)), r"attention_positions must be blocks from 1 to 5, got \(0, 3\)"),
        (lambda: VGG16WithAttention(3, (6,)), "attention_positions must be blocks from 1 to 5"),
        (lambda: VGG16WithAttention(3, (3,), "sine"), "position must be one of .*, got 'sine'"),
        (lambda: VGG16WithAttention(3, (3,), "learned", "original"), "compat='original' has no position"),
        (lambda: VGG16WithAttention(3, compat="old"), "compat must be None or 'original', got 'old'"),
        (lambda: VGG16WithAttention(3, (1,), width=4), "embed_dim must be divisible by num_heads"),
        (lambda: VGG16WithAttention(3, width=0), "width must be a positive integer, got 0"),
        (lambda: VGG16WithSpatialAttention(3, "old"), "compat must be None or 'original', got 'old'"),
        (lambda: VGG16WithSpatialAttention(-1), "num_classes must be a positive integer, got -1"),
    ],
)
def test_refuses_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("kind", [VGG16WithAttention, VGG16WithSpatialAttention])
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(3, 32, 32), ValueError, r"x must be \(B, C, H, W\) with C = 3, got \(3, 32, 32\)"),
        (torch.zeros(1, 4, 32, 32), ValueError, r"x must be \(B, C, H, W\) with C = 3"),
        (torch.zeros(1, 3, 32, 32).double(), TypeError, "x must have the dtype of the module"),
        (None, TypeError, "x must be a tensor, got NoneType"),
    ],
)
def test_refuses_at_call(kind, x, error, words):
    with pytest.raises(error, match=words):
        kind(CLASSES, width=WIDTH)(x)


@pytest.mark.parametrize("kind", [VGG16WithAttention, VGG16WithSpatialAttention])
def test_learns(kind):
    model = kind(CLASSES, width=WIDTH).eval()
    images, labels = torch.randn(8, 3, SIDE, SIDE), torch.arange(8) % CLASSES
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(16):
        loss = nn.functional.cross_entropy(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
