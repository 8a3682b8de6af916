"""SAGAN against the published networks in plain PyTorch, its losses against formulas, and a step of training."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from gate_modules import assert_same
from networks import results
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import attnk
from attnk.models.common import count_parameters
from attnk.models.sagan import (
    SAGANDiscriminator,
    SAGANDiscriminatorBlock,
    SAGANGenerator,
    SAGANGeneratorBlock,
    sagan_discriminator_loss,
    sagan_generator_loss,
)

LATENT, CLASSES = 6, 5
SMALL = {"image_size": 16, "width": 4, "attention_size": 8}
LABELS = torch.tensor([4, 0, 3])


def conv(*args, **options):
    return spectral_norm(nn.Conv2d(*args, **options))


class Norm(nn.Module):
    """Batch norm with a scale and a shift for each class."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.scale, self.shift = nn.Embedding(num_classes, channels), nn.Embedding(num_classes, channels)

    def forward(self, x, labels):
        self.num_batches_tracked += self.training
        out = F.batch_norm(x, self.running_mean, self.running_var, training=self.training)
        return out * self.scale.weight[labels][:, :, None, None] + self.shift.weight[labels][:, :, None, None]


class GeneratorBlock(nn.Module):
    def __init__(self, inputs, outputs, num_classes=None):
        super().__init__()
        norm = nn.BatchNorm2d if num_classes is None else lambda channels: Norm(channels, num_classes)
        self.bn1, self.conv1 = norm(inputs), conv(inputs, outputs, 3, padding=1)
        self.bn2, self.conv2 = norm(outputs), conv(outputs, outputs, 3, padding=1)
        self.conv_sc = conv(inputs, outputs, 1)

    def forward(self, x, *labels):
        out = self.bn1(x, *labels).relu().repeat_interleave(2, 2).repeat_interleave(2, 3)
        out = self.conv2(self.bn2(self.conv1(out), *labels).relu())
        return out + self.conv_sc(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class DiscriminatorBlock(nn.Module):
    def __init__(self, inputs, outputs, downsample=True, first=False):
        super().__init__()
        self.downsample, self.first = downsample, first
        self.conv1, self.conv2 = conv(inputs, outputs, 3, padding=1), conv(outputs, outputs, 3, padding=1)
        self.conv_sc = conv(inputs, outputs, 1) if downsample or inputs != outputs else nn.Identity()

    def forward(self, x):
        out = self.conv2(self.conv1(x if self.first else x.relu()).relu())
        shortcut = self.conv_sc(x)
        return F.avg_pool2d(out, 2) + F.avg_pool2d(shortcut, 2) if self.downsample else out + shortcut


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        inner = max(1, channels // 8)
        self.gamma = nn.Parameter(torch.tensor(0.0))
        self.theta, self.phi = conv(channels, inner, 1, bias=False), conv(channels, inner, 1, bias=False)
        self.g, self.o = conv(channels, channels // 2, 1, bias=False), conv(channels // 2, channels, 1, bias=False)

    def forward(self, x):
        k, v = (F.max_pool2d(part(x), 2).flatten(2) for part in (self.phi, self.g))
        weights = (self.theta(x).flatten(2).mT @ k).softmax(2)
        return self.gamma * self.o((v @ weights.mT).unflatten(2, x.shape[2:])) + x


class Generator(nn.Module):
    """Of images of 16 x 16 with attention on 8 x 8."""

    def __init__(self, width, num_classes=None):
        super().__init__()
        self.linear = spectral_norm(nn.Linear(LATENT, 2 * width * 16))
        self.blocks = nn.ModuleList(
            [GeneratorBlock(2 * width, 2 * width, num_classes), GeneratorBlock(2 * width, width, num_classes)]
        )
        self.attention = Attention(2 * width)
        self.bn, self.conv = nn.BatchNorm2d(width), conv(width, 3, 3, padding=1)

    def forward(self, z, *labels):
        x = self.linear(z).reshape(len(z), -1, 4, 4)
        x = self.blocks[1](self.attention(self.blocks[0](x, *labels)), *labels)
        return self.conv(self.bn(x).relu()).tanh()


class Discriminator(nn.Module):
    def __init__(self, width, num_classes=None):
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                DiscriminatorBlock(3, width, first=True),
                DiscriminatorBlock(width, 2 * width),
                DiscriminatorBlock(2 * width, 2 * width, downsample=False),
            ]
        )
        self.attention = Attention(width)
        self.linear = spectral_norm(nn.Linear(2 * width, 1))
        if num_classes is not None:
            self.embed = spectral_norm(nn.Embedding(num_classes, 2 * width))

    def forward(self, x, *labels):
        x = self.blocks[2](self.blocks[1](self.attention(self.blocks[0](x))))
        h = x.relu().sum((2, 3))
        out = self.linear(h)[:, 0]
        return out + torch.einsum("bc,bc->b", self.embed(*labels), h) if labels else out


class Labelled(nn.Module):
    """A network with the labels of its batch."""

    def __init__(self, network, labels):
        super().__init__()
        self.network = network
        self.labels = labels

    def forward(self, x):
        return self.network(x) if self.labels is None else self.network(x, self.labels[: len(x)])


def pair(kind, num_classes=None, **options):
    """One of the networks, its input, and its labels."""
    if kind == "generator":
        network = SAGANGenerator(LATENT, num_classes=num_classes, **{**SMALL, **options})
        x = torch.randn(3, LATENT)
    else:
        network = SAGANDiscriminator(num_classes=num_classes, **{**SMALL, **options})
        x = torch.rand(3, 3, 16, 16) * 2 - 1
    return network, x, None if num_classes is None else LABELS


def trained(network, x):
    """As training might leave it: vectors that fit the weights, statistics, no part that does nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() < 2 or ".scale." in name or ".shift." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) / 3)
        for _ in range(10):
            network.train()(x)
    return network


kinds = pytest.mark.parametrize("kind", ["generator", "discriminator"])
classes = pytest.mark.parametrize("num_classes", [None, CLASSES])


# Values.


@kinds
@classes
def test_equals_the_published_network(kind, num_classes):
    ours, x, labels = pair(kind, num_classes)
    theirs = (Generator if kind == "generator" else Discriminator)(4, num_classes)
    ours, theirs, x = ours.double(), theirs.double(), x.double()
    trained(Labelled(ours, labels), x)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for training in (False, True):
        both = (Labelled(each, labels).train(training) for each in (ours, theirs))
        assert_same(*both, x, rtol=1e-7, atol=1e-9)


@classes
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)])
def test_generator_block_equals(num_classes, size):
    ours, theirs = (kind(6, 4, num_classes).double() for kind in (SAGANGeneratorBlock, GeneratorBlock))
    x = torch.randn(3, 6, *size, dtype=torch.float64)
    labels = None if num_classes is None else LABELS
    trained(Labelled(ours, labels), x)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for training in (False, True):
        both = (Labelled(each, labels).train(training) for each in (ours, theirs))
        assert_same(*both, x, rtol=1e-7, atol=1e-9)
    assert ours(x, labels).shape == (3, 4, 2 * size[0], 2 * size[1])


@pytest.mark.parametrize(
    ("inputs", "outputs", "downsample", "first"),
    [(6, 4, True, False), (6, 6, True, False), (6, 4, False, False), (6, 6, False, False), (3, 4, True, True)],
)
@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
def test_discriminator_block_equals(inputs, outputs, downsample, first, size):
    options = {"downsample": downsample, "first": first}
    ours, theirs = (kind(inputs, outputs, **options).double() for kind in (SAGANDiscriminatorBlock, DiscriminatorBlock))
    x = torch.randn(3, inputs, *size, dtype=torch.float64)
    trained(ours, x)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for training in (False, True):
        assert_same(ours.train(training), theirs.train(training), x, rtol=1e-7, atol=1e-9)
    assert ours(x).shape == (3, outputs, *((side // 2 for side in size) if downsample else size))
    assert isinstance(ours.conv_sc, nn.Identity) == (not downsample and inputs == outputs)


def test_losses_equal_their_formulas():
    real = torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64, requires_grad=True)
    fake = torch.tensor([-3.0, 0.25], dtype=torch.float64, requires_grad=True)
    loss = sagan_discriminator_loss(real, fake)
    torch.testing.assert_close(loss.item(), (0 + 0.5 + 2) / 3 + (0 + 1.25) / 2)
    loss.backward()
    assert real.grad.tolist() == [0, -1 / 3, -1 / 3]
    assert fake.grad.tolist() == [0, 0.5]
    loss = sagan_generator_loss(fake)
    assert loss.item() == (3 - 0.25) / 2
    assert torch.autograd.grad(loss, fake)[0].tolist() == [-0.5, -0.5]


# What they are made of.


@pytest.mark.parametrize(
    ("image_size", "attention_size", "widths"),
    [
        (16, 8, [2, 1]),
        (32, 16, [4, 2, 1]),
        (32, 8, [4, 2, 1]),
        (128, 32, [16, 8, 4, 2, 1]),
        (256, 64, [16, 16, 8, 4, 2, 1]),
    ],
)
def test_shapes(image_size, attention_size, widths):
    sizes = {"image_size": image_size, "channels": 2, "width": 2, "attention_size": attention_size}
    generator, discriminator = SAGANGenerator(LATENT, **sizes).eval(), SAGANDiscriminator(**sizes).eval()
    seen = []
    for network in (generator, discriminator):
        network.attention.register_forward_hook(lambda module, args, out: seen.append(out.shape[1:]))
    with torch.no_grad():
        images = generator(torch.randn(2, LATENT))
        assert images.shape == (2, 2, image_size, image_size)
        assert images.abs().max() <= 1
        assert discriminator(images).shape == (2,)
    above = image_size // attention_size
    channels = [2 * min(16, above), 2 * min(16, above // 2)]
    assert seen == [(size, attention_size, attention_size) for size in channels]
    assert [block.conv1.weight.shape[0] for block in generator.blocks] == [2 * width for width in widths]
    down = [2 * width for width in (*widths[::-1], widths[0])]
    assert [block.conv1.weight.shape[0] for block in discriminator.blocks] == down
    assert [block.downsample for block in discriminator.blocks] == [True] * len(widths) + [False]
    assert [block.first for block in discriminator.blocks] == [True] + [False] * len(widths)


def test_count():
    """With 128 x 128 images and 1000 classes: 81.5 million, as BigGAN's authors count SAGAN (arXiv:1809.11096)."""
    sizes = {"image_size": 128, "num_classes": 1000, "attention_size": 32}
    with torch.device("meta"):
        counts = count_parameters(SAGANGenerator(**sizes)), count_parameters(SAGANDiscriminator(**sizes))
    assert counts == (42_078_852, 39_463_618)
    assert round(sum(counts) / 1e6, 1) == 81.5


@kinds
@classes
def test_spectral_norm_is_everywhere(kind, num_classes):
    network, x, labels = pair(kind, num_classes)
    trained(Labelled(network, labels), x)
    with torch.no_grad():
        for _ in range(200):
            Labelled(network, labels)(x)
    network.eval()
    for name, part in network.named_modules():
        if isinstance(part, nn.Conv2d | nn.Linear) or name == "embed":
            assert parametrize.is_parametrized(part, "weight"), name
            largest = torch.linalg.matrix_norm(part.weight.detach().flatten(1), ord=2)
            torch.testing.assert_close(largest, torch.tensor(1.0), rtol=1e-3, atol=0)


@kinds
@classes
def test_starts_as_the_network_without_attention(kind, num_classes):
    network, x, labels = pair(kind, num_classes)
    plain = pair(kind, num_classes, attention_size=None)[0]
    assert plain.load_state_dict(network.state_dict(), strict=False).missing_keys == []
    assert not hasattr(plain, "attention")
    network, plain = Labelled(network, labels).eval(), Labelled(plain, labels).eval()
    out = network(x)
    assert network.network.attention.gamma == 0
    assert torch.equal(out, plain(x))
    out.square().sum().backward()
    assert network.network.attention.gamma.grad != 0
    nn.init.ones_(network.network.attention.gamma)
    assert not torch.allclose(network(x), out)


@kinds
@classes
@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_every_parameter(kind, num_classes, training):
    network, x, labels = pair(kind, num_classes)
    network = trained(Labelled(network.double(), labels), x.double()).train(training)
    x = x.double().requires_grad_()
    # an uneven loss: the sum over what a batch norm normalises has no gradient
    network(x).mul(torch.linspace(-1, 2, network(x).numel()).view_as(network(x))).sum().backward()
    assert x.grad.abs().amax(tuple(range(1, x.dim()))).min() > 0
    for name, parameter in network.named_parameters():
        assert parameter.grad.any(), name


def test_classes_differ():
    generator, z, _ = pair("generator", CLASSES)
    discriminator, x, _ = pair("discriminator", CLASSES)
    generator, discriminator = (
        trained(Labelled(generator, LABELS), z).eval(),
        trained(Labelled(discriminator, LABELS), x),
    )
    discriminator.eval()
    for network, given in ((generator.network, z), (discriminator.network, x)):
        out, other = network(given, LABELS), network(given, torch.tensor([4, 0, 1]))
        assert torch.allclose(out[:2], other[:2])
        assert not torch.allclose(out[2], other[2])
        torch.testing.assert_close(network(given, LABELS.int()), out)


def test_classes_start_alike():
    """Scales of 1 and shifts of 0: the generator starts as the one without classes."""
    generator, z, _ = pair("generator", CLASSES)
    plain = pair("generator")[0]
    missing = plain.load_state_dict(generator.state_dict(), strict=False).missing_keys
    assert all(".bn" in name for name in missing)
    torch.testing.assert_close(generator(z, LABELS), plain(z))


# Training.


@classes
def test_a_step_lowers_the_loss(num_classes):
    """The paper's optimisers, on fixed data."""
    generator, z, labels = pair("generator", num_classes, width=8)
    discriminator, images, _ = pair("discriminator", num_classes, width=8)
    given = () if labels is None else (labels,)
    optimizers = {
        generator: torch.optim.Adam(generator.parameters(), lr=1e-4, betas=(0.0, 0.9)),
        discriminator: torch.optim.Adam(discriminator.parameters(), lr=4e-4, betas=(0.0, 0.9)),
    }

    def judged(network):
        if network is generator:
            return sagan_generator_loss(discriminator(generator(z, *given), *given))
        with torch.no_grad():
            fakes = generator(z, *given)
        return sagan_discriminator_loss(discriminator(images, *given), discriminator(fakes, *given))

    for network in (discriminator, generator):
        before = judged(network)
        optimizers[network].zero_grad()
        before.backward()
        optimizers[network].step()
        assert judged(network) < before


def test_learns():
    """The generator learns the colours of two classes, and the attention takes part."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "width": 8, "num_classes": 2, "attention_size": 8}
    generator, discriminator = SAGANGenerator(8, **sizes), SAGANDiscriminator(**sizes)
    colours = torch.tensor([[0.6, -0.6, 0.0], [-0.6, 0.6, 0.3]])
    labels = torch.arange(16) % 2
    slow = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.0, 0.9))
    fast = torch.optim.Adam(discriminator.parameters(), lr=4e-3, betas=(0.0, 0.9))
    for _ in range(150):
        real = colours[labels][:, :, None, None] + torch.randn(16, 3, 16, 16) / 10
        with torch.no_grad():
            fakes = generator(torch.randn(16, 8), labels)
        fast.zero_grad()
        sagan_discriminator_loss(discriminator(real, labels), discriminator(fakes, labels)).backward()
        fast.step()
        slow.zero_grad()
        sagan_generator_loss(discriminator(generator(torch.randn(16, 8), labels), labels)).backward()
        slow.step()
    made = generator(torch.randn(16, 8), labels).detach().mean((2, 3))
    error = (made - colours[labels]).abs().mean()
    assert error < 0.15
    assert generator.attention.gamma != 0


# Where it runs.


@kinds
@classes
def test_runs_everywhere(kind, num_classes):
    network, x, labels = pair(kind, num_classes)
    network = trained(Labelled(network, labels), x).eval()
    expected = results(network, x)
    largest = max(tensor.abs().max().item() for tensor in expected)

    def close(got, tolerance=1e-3):
        for one, other in zip(got, expected, strict=True):
            scale = max(other.abs().max().item(), 1e-3 * largest)
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)

    for backend in ("torch", "reference", *(["triton"] if attnk.dispatch.INTERPRETED else [])):
        with attnk.use_backend(backend):
            close(results(network, x))
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    close(results(last, x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(x)
        results(network, x)
    scale = expected[0].abs().max()
    torch.testing.assert_close(out.float() / scale, expected[0] / scale, rtol=0, atol=0.15)
    torch._dynamo.reset()
    close(results(torch.compile(network, backend="aot_eager", fullgraph=True), x))
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(network(x[:0]), expected[0][:0])


def test_norm_of_classes_keeps_the_dtype():
    """Under autocast scales and shifts in float32 do not widen the map."""
    block, dtypes = SAGANGeneratorBlock(4, 4, CLASSES), []
    block.bn1.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(torch.randn(3, 4, 2, 2, dtype=torch.bfloat16), LABELS)
    assert dtypes == [torch.bfloat16]


@kinds
def test_compiles_in_training(kind, fresh_dynamo):
    """The power iteration is in the graph, and moves the vectors as it does without."""
    network, x, _ = pair(kind)
    other = copy.deepcopy(trained(network, x))
    torch.testing.assert_close(torch.compile(other, backend="aot_eager", fullgraph=True)(x), network(x))
    torch.testing.assert_close(other.state_dict(), network.state_dict())


@kinds
def test_copies(kind):
    """By deepcopy and by state; PyTorch does not pickle its spectral norm."""
    network, x, _ = pair(kind)
    trained(network, x).eval()
    other = pair(kind)[0].eval()
    other.load_state_dict(network.state_dict(), strict=True)
    for each in (copy.deepcopy(network), other):
        assert repr(each) == repr(network)
        assert torch.equal(each(x), network(x))
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(network)


# Errors.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SAGANGenerator(0), "latent_dim must be a positive integer, got 0"),
        (lambda: SAGANGenerator(image_size=8), "image_size must be a power of 2 from 16, got 8"),
        (lambda: SAGANDiscriminator(24), "image_size must be a power of 2 from 16, got 24"),
        (lambda: SAGANDiscriminator(32.0), r"image_size must be a positive integer, got 32\.0"),
        (lambda: SAGANGenerator(attention_size=32), "attention_size must be .* from 8 to image_size // 2 = 16, .* 32"),
        (lambda: SAGANDiscriminator(attention_size=4), "attention_size must be .* got 4"),
        (lambda: SAGANDiscriminator(attention_size=12), "attention_size must be .* got 12"),
        (lambda: SAGANDiscriminator(num_classes=0), "num_classes must be a positive integer, got 0"),
        (lambda: SAGANGeneratorBlock(4, 4, 0), "num_classes must be a positive integer, got 0"),
        (lambda: SAGANGeneratorBlock(4, 0), "out_channels must be a positive integer, got 0"),
        (lambda: SAGANDiscriminatorBlock(0, 4), "in_channels must be a positive integer, got 0"),
    ],
)
def test_refuses_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()


GENERATOR, CLASSED = SAGANGenerator(LATENT, **SMALL), SAGANGenerator(LATENT, num_classes=CLASSES, **SMALL)
DISCRIMINATOR, JUDGE = SAGANDiscriminator(**SMALL), SAGANDiscriminator(num_classes=CLASSES, **SMALL)
Z, IMAGES = torch.zeros(3, LATENT), torch.zeros(3, 3, 16, 16)


@pytest.mark.parametrize(
    ("network", "given", "error", "words"),
    [
        (GENERATOR, (torch.zeros(3, 5),), ValueError, r"z must be \(B, latent_dim\) with latent_dim = 6"),
        (GENERATOR, (Z.double(),), TypeError, "z must have the dtype of the module"),
        (GENERATOR, (Z, LABELS), ValueError, "labels must be None without num_classes"),
        (
            CLASSED,
            (Z,),
            TypeError,
            r"labels must be an int64 or int32 tensor \(B,\) with num_classes = 5, got NoneType",
        ),
        (CLASSED, (Z, LABELS.float()), TypeError, "labels must be an int64 or int32 tensor .* got torch.float32"),
        (CLASSED, (Z, LABELS[:2]), ValueError, r"labels must be \(3,\) on cpu, got \(2,\) on cpu"),
        (DISCRIMINATOR, (IMAGES[:, :2],), ValueError, r"x must be \(B, channels, H, W\) with channels = 3"),
        (DISCRIMINATOR, (IMAGES[..., :8],), ValueError, r"x must have height and width 16, got \(3, 3, 16, 8\)"),
        (DISCRIMINATOR, (IMAGES.half(),), TypeError, "x must have the dtype of the module"),
        (DISCRIMINATOR, (IMAGES, LABELS), ValueError, "labels must be None without num_classes"),
        (JUDGE, (IMAGES,), TypeError, "labels must be an int64 or int32 tensor"),
        (GENERATOR.blocks[0], (IMAGES,), ValueError, r"x must be \(B, in_channels, H, W\) with in_channels = 8"),
        (CLASSED.blocks[0], (torch.zeros(3, 8, 4, 4),), TypeError, "labels must be an int64 or int32 tensor"),
        (DISCRIMINATOR.blocks[1], (IMAGES,), ValueError, r"x must be \(B, in_channels, H, W\) with in_channels = 4"),
    ],
)
def test_refuses_at_call(network, given, error, words):
    with pytest.raises(error, match=words):
        network(*given)
