"""SENet and the two classifiers of sequences, against what the tutorial computes."""

import math

import pytest
import torch
from gate_modules import assert_same
from networks import assert_drop_in, assert_runs_everywhere, assert_same_start, settled
from torch import nn

import attnk
from attnk.models import MultiHeadSelfAttentionClassifier, SelfAttentionClassifier, SENet

CHANNELS, HEADS, HIDDEN, CLASSES = 12, 3, 10, 4


class Gate(nn.Module):
    def __init__(self, channel, reduction):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction), nn.ReLU(), nn.Linear(channel // reduction, channel), nn.Sigmoid()
        )

    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class PublishedSENet(nn.Module):
    def __init__(self, num_classes=1000, reduction=16, pooled=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.se = Gate(64, reduction)
        self.fc = nn.Linear(64, num_classes)
        self.pooled = pooled

    def forward(self, x):
        x = self.se(torch.relu(self.bn1(self.conv1(x))))
        if self.pooled:
            x = nn.functional.adaptive_avg_pool2d(x, 1)
        return self.fc(x.reshape(len(x), -1))


class SingleHead(nn.Module):
    def __init__(self, embed_dim, scale=1.0):
        super().__init__()
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.scale = scale

    def forward(self, x):
        weights = (self.scale * self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1)
        return weights @ self.value(x)


class MultiHead(nn.Module):
    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.fc = nn.Linear(embed_dim, embed_dim)

    def forward(self, x):
        q, k, v = (
            linear(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.fc((weights @ v).transpose(1, 2).reshape(x.shape)) + x


class PublishedClassifier(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.fc1 = nn.Linear(CHANNELS, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(self.attention(x).mean(dim=1))))


@pytest.fixture
def tokens():
    return torch.randn(3, 7, CHANNELS, dtype=torch.float64)


# SENet.


@pytest.mark.parametrize("compat", [None, "original"])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 2)])
def test_senet_as_published(compat, size):
    """Where the published network runs at all."""
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    assert_drop_in(PublishedSENet(CLASSES, 8), SENet(CLASSES, 8, compat), x)


def test_senet_at_sizes_where_the_published_one_fails():
    x = torch.randn(2, 3, 17, 12, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        PublishedSENet(CLASSES).double()(x)
    assert_drop_in(PublishedSENet(CLASSES, pooled=True), SENet(CLASSES), x)
    with pytest.raises(ValueError, match=r"takes images up to 2 x 2 pixels alone, got \(2, 3, 17, 12\)"):
        SENet(CLASSES, compat="original").double()(x)


def test_senet_starts_as_published():
    assert_same_start(PublishedSENet, SENet)
    assert attnk.count_parameters(SENet()) == attnk.count_parameters(PublishedSENet())


def test_senet_runs_everywhere():
    assert_runs_everywhere(SENet(CLASSES), torch.randn(2, 3, 20, 16))


# Classifiers of sequences.


def test_self_attention_classifier_as_published(tokens):
    ours = SelfAttentionClassifier(CHANNELS, HIDDEN, CLASSES, compat="original")
    assert_drop_in(PublishedClassifier(SingleHead(CHANNELS)), ours, tokens)


def test_self_attention_classifier_scales_its_logits(tokens):
    theirs = PublishedClassifier(SingleHead(CHANNELS, CHANNELS**-0.5))
    assert_drop_in(theirs, SelfAttentionClassifier(CHANNELS, HIDDEN, CLASSES), tokens)


@pytest.mark.parametrize("compat", [None, "original"])
def test_multi_head_classifier_as_published(compat, tokens):
    ours = MultiHeadSelfAttentionClassifier(CHANNELS, HEADS, HIDDEN, CLASSES, compat)
    assert_drop_in(PublishedClassifier(MultiHead(CHANNELS, HEADS)), ours, tokens)


def test_classifiers_start_as_published():
    assert_same_start(
        lambda: PublishedClassifier(SingleHead(CHANNELS)), lambda: SelfAttentionClassifier(CHANNELS, HIDDEN, CLASSES)
    )
    assert_same_start(
        lambda: PublishedClassifier(MultiHead(CHANNELS, HEADS)),
        lambda: MultiHeadSelfAttentionClassifier(CHANNELS, HEADS, HIDDEN, CLASSES),
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: SelfAttentionClassifier(CHANNELS, HIDDEN, CLASSES),
        lambda: SelfAttentionClassifier(CHANNELS, HIDDEN, CLASSES, "original"),
        lambda: MultiHeadSelfAttentionClassifier(CHANNELS, HEADS, HIDDEN, CLASSES),
    ],
)
def test_classifiers_run_everywhere(make):
    assert_runs_everywhere(make(), torch.randn(2, 6, CHANNELS))


def test_transposed_tokens(tokens):
    ours = settled(MultiHeadSelfAttentionClassifier(CHANNELS, HEADS, HIDDEN, CLASSES))
    theirs = settled(PublishedClassifier(MultiHead(CHANNELS, HEADS)))
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours, theirs, tokens.mT.contiguous().mT)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SENet(0), "num_classes must be a positive integer, got 0"),
        (lambda: SENet(3, -1), "must be a positive number, got -1"),
        (lambda: SENet(3, compat="old"), "compat must be None or 'original', got 'old'"),
        (lambda: SelfAttentionClassifier(0, 2, 3), "embed_dim must be a positive integer, got 0"),
        (lambda: SelfAttentionClassifier(4, 0, 3), "hidden_dim must be a positive integer, got 0"),
        (lambda: SelfAttentionClassifier(4, 2, 3, "old"), "compat must be None or 'original', got 'old'"),
        (lambda: MultiHeadSelfAttentionClassifier(64, 7, 2, 3), "embed_dim must be divisible by num_heads"),
        (lambda: MultiHeadSelfAttentionClassifier(64, 8, 2, 3, "old"), "compat must be None or 'original', got 'old'"),
        (lambda: MultiHeadSelfAttentionClassifier(64, 8, 2, 0), "num_classes must be a positive integer, got 0"),
    ],
)
def test_refuses_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("model", "x", "error", "words"),
    [
        (SENet(3), torch.zeros(3, 8, 8), ValueError, r"x must be \(B, C, H, W\) with C = 3"),
        (SENet(3), torch.zeros(1, 3, 8, 8).half(), TypeError, "x must have the dtype of the module"),
        (SelfAttentionClassifier(4, 2, 3), torch.zeros(2, 3, 5), ValueError, r"with embed_dim = 4, got \(2, 3, 5\)"),
    ],
)
def test_refuses_at_call(model, x, error, words):
    with pytest.raises(error, match=words):
        model(x)


def test_reduction_above_the_channels():
    assert SENet(3, reduction=100)(torch.randn(1, 3, 8, 8)).shape == (1, 3)
