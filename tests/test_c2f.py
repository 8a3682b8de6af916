"""attnk.C2f against the CSP bottleneck with two convolutions, and attnk.C2fModule against what was published."""

import copy

import pytest
import torch
from gate_modules import assert_same, copies, feature_map, outcome, settle
from torch import nn

import attnk


class Conv(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.03)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return x * torch.sigmoid(x)


class CspBottleneck(nn.Module):
    """y0, y1 = cv1(x); y(i+1) = m(i)(y(i)); cv2 of all."""

    def __init__(self, in_channels, out_channels, n, shortcut, half):
        super().__init__()
        self.cv1 = Conv(in_channels, 2 * half, 1)
        self.cv2 = Conv((2 + n) * half, out_channels, 1)
        self.m = nn.ModuleList()
        for _ in range(n):
            bottleneck = nn.Module()
            bottleneck.cv1, bottleneck.cv2 = Conv(half, half, 3), Conv(half, half, 3)
            self.m.append(bottleneck)
        self.half, self.shortcut = half, shortcut

    def forward(self, x):
        y = self.cv1(x)
        parts = [y[:, : self.half], y[:, self.half :]]
        for bottleneck in self.m:
            z = bottleneck.cv2(bottleneck.cv1(parts[-1]))
            parts.append(z + parts[-1] if self.shortcut else z)
        return self.cv2(torch.cat(parts, 1))


class Published(nn.Module):
    """What a tutorial calls C2f."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.attention = nn.Conv2d(out_channels, 1, kernel_size=1)

    def forward(self, x):
        weights = torch.sigmoid(self.attention(self.conv1(x) + self.conv2(x)))
        return x * weights


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((6, 8, 1, False, 4), {}),
        ((6, 8, 2, True, 4), {"n": 2, "shortcut": True}),
        ((4, 10, 3, False, 2), {"n": 3, "expansion": 0.25}),
        ((4, 6, 0, True, 6), {"n": 0, "shortcut": True, "expansion": 1.0}),
    ],
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals_its_formula(sizes, options, training):
    theirs = settle(CspBottleneck(*sizes)).train(training)
    ours = attnk.C2f(*sizes[:2], **options).double().train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for _ in range(2):  # the second time with running statistics of the first
        assert_same(ours, theirs, feature_map(2, sizes[0], 5, 6))


def test_keys():
    state = attnk.C2f(4, 8, n=2).state_dict()
    norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = [f"cv{i}.{name}" for i in (1, 2) for name in ("conv.weight", *(f"bn.{norm}" for norm in norms))]
    assert list(state) == [*names, *(f"m.{i}.{name}" for i in (0, 1) for name in names)]
    assert attnk.C2f(4, 8).cv1.bn.eps == 1e-3
    assert attnk.C2f(4, 8).cv1.bn.momentum == 0.03


@pytest.mark.parametrize("attention", ["coordinate", attnk.CBAM, lambda channels: attnk.SELayer(channels, 2)])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_attention_weighs_the_output(attention, training):
    ours = settle(attnk.C2f(4, 8, n=1, attention=attention)).train(training)
    plain = CspBottleneck(4, 8, 1, False, 4).double().train(training)
    plain.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("attention.")})
    theirs = nn.Sequential(plain, copy.deepcopy(ours.attention))
    x = feature_map(2, 4, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    if attention == "coordinate":
        assert isinstance(ours.attention, attnk.CoordinateAttention)


def test_repaired_module_is_c2f_with_coordinate_attention():
    ours = settle(attnk.C2fModule(4, 8))
    other = attnk.C2f(4, 8, attention="coordinate").double()
    other.load_state_dict(ours.state_dict(), strict=True)
    x = feature_map(2, 4, 5, 6)
    assert_same(ours, other, x)
    assert ours(x).shape == (2, 8, 5, 6)


def test_original_module_equals_what_was_published():
    torch.manual_seed(3)
    theirs = Published(4, 6).double()
    torch.manual_seed(3)
    ours = attnk.C2fModule(4, 6, compat="original").double()
    for shape in ((2, 4, 5, 6), (4, 5, 6)):
        assert_same(ours, theirs, feature_map(*shape))  # from the same draws
    theirs = settle(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(ours, theirs, feature_map(2, 4, 5, 6))
    assert sum(p.numel() for p in attnk.C2fModule(64, 128, compat="original").parameters()) == 147_841


@pytest.mark.parametrize("strict", [True, False])
def test_published_weights_have_no_place_in_the_repaired(strict):
    words = (
        "conv1.weight belongs to the module as it was published, whose weights have no place in the repaired one: "
        r'build C2fModule\(in_channels, out_channels, compat="original"\)'
    )
    with pytest.raises(RuntimeError, match=words):
        attnk.C2fModule(4, 6).load_state_dict(Published(4, 6).state_dict(), strict=strict)
    nested = nn.Sequential(attnk.C2fModule(4, 6))
    with pytest.raises(RuntimeError, match=r"0\.conv1\.weight belongs to the module as it was published"):
        nested.load_state_dict(nn.Sequential(Published(4, 6)).state_dict(), strict=strict)


MAKERS = {
    "plain": lambda: attnk.C2f(4, 8, n=2, shortcut=True),
    "coordinate": lambda: attnk.C2f(4, 8, attention="coordinate"),
    "cbam": lambda: attnk.C2f(4, 8, attention=attnk.CBAM),
    "original": lambda: attnk.C2fModule(4, 8, compat="original"),
    "repaired": lambda: attnk.C2fModule(4, 8),
}
makers = pytest.mark.parametrize("maker", MAKERS)


@makers
def test_copies(maker):
    module = settle(MAKERS[maker]())
    x = feature_map(2, 4, 5, 6)
    module(x)
    for other in copies(module):
        assert (repr(other), list(other.state_dict())) == (repr(module), list(module.state_dict()))
        assert_same(other, copy.deepcopy(module), x)
    again = MAKERS[maker]().double()
    again.load_state_dict(module.state_dict(), strict=True)
    assert_same(again, copy.deepcopy(module), x)


@makers
def test_memory_format_is_kept(maker):
    module = MAKERS[maker]()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        module = module.to(memory_format=memory_format)
        x = torch.randn(2, 4, 5, 6).contiguous(memory_format=memory_format)
        assert module(x).is_contiguous(memory_format=memory_format)


@makers
def test_autocast(maker):
    module = MAKERS[maker]()
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = copy.deepcopy(module)(x)
    assert out.dtype == (torch.float32 if maker == "original" else torch.bfloat16)
    torch.testing.assert_close(out.float(), module(x), rtol=0.1, atol=0.1)
    out.sum().backward()
    assert x.grad.dtype == torch.float32


@makers
def test_compiles_to_one_graph(maker, fresh_dynamo):
    module = settle(MAKERS[maker]())
    other = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = feature_map(2, 4, 5, 6)
    for got, expected in zip(outcome(compiled, x), outcome(other, x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: attnk.C2f(0, 4), "in_channels must be a positive integer, got 0"),
        (lambda: attnk.C2f(4, 4.0), "out_channels must be a positive integer, got 4.0"),
        (lambda: attnk.C2f(4, 4, n=-1), "n must be an integer of at least 0, got -1"),
        (
            lambda: attnk.C2f(4, 1),
            r"a half must have at least one channel, but int\(out_channels \* expansion\) is 0 with out_channels=1",
        ),
        (lambda: attnk.C2f(4, 4, attention="se"), "attention must be one of 'coordinate', got 'se'"),
        (lambda: attnk.C2f(4, 4, attention=lambda n: n), "must return a module for 4 channels, it returned 4"),
        (lambda: attnk.C2fModule(4, 0), "out_channels must be a positive integer, got 0"),
        (lambda: attnk.C2fModule(4, 4, "published"), "compat must be one of 'original', got 'published'"),
    ],
)
def test_refuses_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_an_attention_that_is_made_already():
    words = "attention must be a function or class that makes a module, such as attnk.CBAM, got an instance of CBAM"
    with pytest.raises(TypeError, match=words):
        attnk.C2f(8, 8, attention=attnk.CBAM(8))


def test_the_fifth_is_named():
    """The class of that name in ultralytics has its groups there."""
    with pytest.raises(TypeError, match="positional arguments"):
        attnk.C2f(4, 8, 1, True, 1)


def test_wrong_input_is_told():
    for maker in ("plain", "repaired"):
        with pytest.raises(ValueError, match=r"x must be \(B, in_channels, H, W\) with .* got \(4, 3, 3\)"):
            MAKERS[maker]()(torch.ones(4, 3, 3))
        with pytest.raises(ValueError, match=r"x must be \(B, in_channels, H, W\) with in_channels = 4, got \(1, 3"):
            MAKERS[maker]()(torch.ones(1, 3, 4, 4))
        with pytest.raises(TypeError, match="x must have the dtype of the module"):
            MAKERS[maker]()(torch.ones(1, 4, 4, 4).double())
