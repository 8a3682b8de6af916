"""The bottleneck with attention against what the tutorial computes, and the ResNet of them."""

import pytest
import torch
import torch.nn.functional as F
from networks import assert_drop_in, assert_runs_everywhere, assert_same_start, settled
from torch import nn

import attnk
from attnk.models import BottleneckWithAttention, ResNetWithAttention, resnet50_with_attention

SMALL = {"layers": (1, 2, 1, 1), "width": 4, "num_heads": 2, "image_size": 64}


class Published(nn.Module):
    def __init__(self, in_channels, out_channels, stride=1, reduction_ratio=16):
        super().__init__()
        inner, hidden = max(1, out_channels // 4), max(1, out_channels // reduction_ratio)
        self.conv1 = nn.Conv2d(in_channels, inner, kernel_size=1)
        self.conv2 = nn.Conv2d(inner, inner, kernel_size=3, stride=stride, padding=1)
        self.conv3 = nn.Conv2d(inner, out_channels, kernel_size=1)
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(out_channels, hidden, kernel_size=1),
            nn.ReLU(),
            nn.Conv2d(hidden, out_channels, kernel_size=1),
            nn.Sigmoid(),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x):
        out = torch.relu(self.conv1(x))
        out = torch.relu(self.conv2(out))
        out = self.conv3(out)
        return torch.relu(out * self.attention(out) + self.shortcut(x))


class Normed(nn.Module):
    """With a batch norm behind each convolution, which has no bias."""

    def __init__(self, in_channels, out_channels, stride=1, reduction_ratio=16):
        super().__init__()
        inner, hidden = out_channels // 4, max(1, out_channels // reduction_ratio)
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(inner), nn.BatchNorm2d(inner), nn.BatchNorm2d(out_channels)
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(out_channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, out_channels, 1),
            nn.Sigmoid(),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return torch.relu(out * self.attention(out) + self.shortcut(x))


class Pool(nn.Module):
    """The mean attends to itself and the pixels."""

    def __init__(self, side, channels, heads):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, channels) / channels**0.5)
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, channels)
        self.heads = heads

    def forward(self, x):
        x = x.flatten(2).mT
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        q, k, v = (
            linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = (q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.c_proj((weights @ v).transpose(1, 2).flatten(2).squeeze(1))


class Network(nn.Module):
    def __init__(self, num_classes, layers, width, num_heads, image_size):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, blocks in enumerate(layers, 1):
            outputs = 2 * width * 2**stage
            stack = [
                Normed(channels if i == 0 else outputs, outputs, 2 if stage > 1 and i == 0 else 1)
                for i in range(blocks)
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*stack))
            channels = outputs
        self.attnpool = Pool(image_size // 32, channels, num_heads)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.attnpool(x))


@pytest.mark.parametrize("compat", [None, "original"])
@pytest.mark.parametrize(
    "arguments", [(8, 16, 1, 4), (16, 16, 1, 4), (16, 16, 2, 16), (6, 32, 2), (8, 8, 1, 16), (3, 2), (5, 1, 3)], ids=str
)
def test_bottleneck_as_published(arguments, compat):
    x = torch.randn(3, arguments[0], 7, 6, dtype=torch.float64)
    assert_drop_in(Published(*arguments), BottleneckWithAttention(*arguments, compat=compat), x)


@pytest.mark.parametrize("arguments", [(8, 16, 1, 4), (16, 16), (16, 16, 2, 2)], ids=str)
def test_bottleneck_with_norm(arguments):
    x = torch.randn(3, arguments[0], 7, 6, dtype=torch.float64)
    assert_drop_in(Normed(*arguments), BottleneckWithAttention(*arguments, norm=True), x)


def test_bottleneck_starts_as_published():
    for arguments in ((8, 16, 2, 4), (16, 16, 1, 4)):
        assert_same_start(lambda a=arguments: Published(*a), lambda a=arguments: BottleneckWithAttention(*a))


def test_bottleneck_keys():
    keys = {key.rpartition(".")[0] for key in BottleneckWithAttention(8, 16).state_dict()}
    assert keys == {"conv1", "conv2", "conv3", "attention.1", "attention.3", "shortcut.0", "shortcut.1"}
    assert not any("shortcut" in key for key in BottleneckWithAttention(16, 16).state_dict())


@pytest.mark.parametrize("training", [False, True])
def test_network_equals_its_formula(training):
    options = {**SMALL, "num_classes": 3}
    theirs, ours = Network(**options), ResNetWithAttention(**options)
    assert_drop_in(theirs, ours, torch.randn(4, 3, 64, 64, dtype=torch.float64))


def test_network_at_other_sizes():
    model = settled(resnet50_with_attention(3, **SMALL))
    for size in ((64, 64), (32, 96), (70, 45), (8, 8)):
        assert model(torch.randn(2, 3, *size, dtype=torch.float64)).shape == (2, 3)


def test_resnet50():
    with torch.device("meta"):
        model = resnet50_with_attention()
        assert [len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3, 4)] == [3, 4, 6, 3]
        assert attnk.count_parameters(model) == 44_975_832
        assert model.attnpool.num_heads == 32
        assert model.attnpool.positional_embedding.shape == (50, 2048)
        plain = [key for key in model.state_dict() if not key.startswith("attnpool") and ".attention." not in key]
    assert sum(model.get_parameter(key).numel() for key in plain if key.endswith(("weight", "bias"))) == 25_557_032


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda: BottleneckWithAttention(8, 16, 2, 4), torch.bfloat16),
        (lambda: BottleneckWithAttention(8, 8, norm=True), torch.float32),  # x is added as it is
    ],
)
def test_bottleneck_runs_everywhere(make, dtype):
    assert_runs_everywhere(make(), torch.randn(2, 8, 6, 7), autocast_dtype=dtype)


def test_network_runs_everywhere():
    model = ResNetWithAttention(3, **{**SMALL, "layers": (1, 1, 1, 1), "image_size": 32})
    assert_runs_everywhere(model, torch.randn(2, 3, 32, 32))


def test_keeps_the_memory_format():
    block = BottleneckWithAttention(8, 16).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 7).contiguous(memory_format=torch.channels_last)
    assert block(x).is_contiguous(memory_format=torch.channels_last)


def test_learns():
    torch.manual_seed(0)
    model = ResNetWithAttention(4, **SMALL)
    x, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BottleneckWithAttention(0, 8), "in_channels must be a positive integer, got 0"),
        (lambda: BottleneckWithAttention(8, 8, 0), "stride must be a positive integer, got 0"),
        (lambda: BottleneckWithAttention(8, 8, compat="old"), "compat must be None or 'original', got 'old'"),
        (lambda: BottleneckWithAttention(8, 8, compat="original", norm=True), "compat='original' has no batch norm"),
        (lambda: ResNetWithAttention(3, layers=(1, 1)), r"layers must be .* of 4 stages, got \(1, 1\)"),
        (lambda: ResNetWithAttention(3, layers=(1, 1, 0, 1)), r"layers\[2\] must be a positive integer, got 0"),
        (lambda: ResNetWithAttention(3, **{**SMALL, "num_heads": 7}), "embed_dim must be divisible by num_heads"),
    ],
)
def test_refuses_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("model", "x", "error", "words"),
    [
        (BottleneckWithAttention(8, 8), torch.zeros(8, 4, 4), ValueError, r"x must be \(B, in_channels, H, W\)"),
        (BottleneckWithAttention(8, 8), torch.zeros(1, 8, 4, 4).half(), TypeError, "x must have the dtype"),
        (ResNetWithAttention(3, **SMALL), torch.zeros(1, 4, 64, 64), ValueError, "with C = 3, got"),
    ],
)
def test_refuses_at_call(model, x, error, words):
    with pytest.raises(error, match=words):
        model(x)
