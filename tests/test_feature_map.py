"""Attention on feature maps against plain formulas: the tutorials' way onto the map, SAGAN's block, CLIP's pooling."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import attnk
from attnk.modules import feature_map, self_attention
from attnk.modules.feature_map import AttentionPool2d, FeatureMapAttention, SAGANAttention
from attnk.modules.self_attention import MultiHeadSelfAttention, SelfAttention, SingleHeadSelfAttention
from attnk.modules.transformer import TransformerEncoderLayer
from attnk.reference.softmax_attention import softmax_attention_reference
from attnk.testing import layouts

aten = torch.ops.aten
CHANNELS, HEADS = 12, 3


def on_tokens(layer, x, **options):
    """As the tutorials put a layer on a map."""
    return layer(x.flatten(2).transpose(1, 2), **options).transpose(1, 2).reshape(x.shape)


class BigGANAttention(nn.Module):
    def __init__(self, ch, conv=nn.Conv2d):
        super().__init__()
        self.ch = ch
        self.theta = conv(ch, ch // 8, kernel_size=1, padding=0, bias=False)
        self.phi = conv(ch, ch // 8, kernel_size=1, padding=0, bias=False)
        self.g = conv(ch, ch // 2, kernel_size=1, padding=0, bias=False)
        self.o = conv(ch // 2, ch, kernel_size=1, padding=0, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        batch, _, height, width = x.shape
        theta = self.theta(x).reshape(batch, self.ch // 8, height * width)
        phi = F.max_pool2d(self.phi(x), 2).reshape(batch, self.ch // 8, height * width // 4)
        g = F.max_pool2d(self.g(x), 2).reshape(batch, self.ch // 2, height * width // 4)
        weights = (theta.transpose(1, 2) @ phi).softmax(-1)
        out = (g @ weights.transpose(1, 2)).reshape(batch, self.ch // 2, height, width)
        return self.gamma * self.o(out) + x


class CLIPPool(nn.Module):
    def __init__(self, spacial_dim, embed_dim, num_heads, output_dim=None):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(spacial_dim**2 + 1, embed_dim) / embed_dim**0.5)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, output_dim or embed_dim)
        self.num_heads = num_heads

    def forward(self, x):
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x], dim=0)
        x = x + self.positional_embedding[:, None, :].to(x.dtype)
        x, _ = F.multi_head_attention_forward(
            x[:1], x, x, x.shape[-1], self.num_heads,
            None, torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]), None, None, False, 0.0,
            self.c_proj.weight, self.c_proj.bias, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        return x.squeeze(0)


def skip_without_kernels(implementation, device):
    reason = attnk.dispatch.no_kernel_here(torch.empty(0, device=device))
    if implementation == "triton" and reason is not None:
        pytest.skip(reason)


def outcome(module, x, **options):
    """Output, gradients of x and of all parameters in order."""
    x = x.detach().requires_grad_()
    out = module(x, **options)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view(out.shape).to(out)
    grads = torch.autograd.grad(out, [x, *module.parameters()], dout, allow_unused=isinstance(module, nn.Identity))
    return [out.detach(), *grads]


def assert_same(module, other, x, **tolerances):
    tolerances = tolerances or {"rtol": 1e-7, "atol": 1e-9}
    for got, expected in zip(outcome(module, x), outcome(other, x), strict=True):
        torch.testing.assert_close(got, expected, **tolerances)


FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
formats = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
LAYOUT_NAMES = [name for name, _ in layouts(torch.zeros(2, 2, 2, 2))]


def in_format(x, memory_format):
    return x.contiguous(memory_format=memory_format)


@pytest.fixture(params=["where it runs", "as on a GPU"])
def placement(request, monkeypatch):
    """As the device has it, and with channel-major projections on any device."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(self_attention, "attends_channel_major", self_attention.projects_by_image)


# FeatureMapAttention.

LAYERS = {
    "SelfAttention": lambda **options: SelfAttention(CHANNELS, HEADS, 0.0, **options),
    "MultiHead": lambda **options: MultiHeadSelfAttention(CHANNELS, HEADS, **options),
    "SingleHead": lambda **options: SingleHeadSelfAttention(CHANNELS, **options),
    "TransformerEncoderLayer": lambda **options: TransformerEncoderLayer(CHANNELS, HEADS, 0.0, 2, **options),
    "pre-norm": lambda **options: TransformerEncoderLayer(CHANNELS, HEADS, 0.0, 2, norm_first=True, **options),
    "Linear": lambda: nn.Linear(CHANNELS, CHANNELS),
    "LayerNorm": lambda: nn.LayerNorm(CHANNELS),
    "torch's": lambda: nn.TransformerEncoderLayer(CHANNELS, HEADS, 16, 0.0, batch_first=True),
}
layers = pytest.mark.parametrize("layer", LAYERS)


class Flat(nn.Module):
    """The tutorials' way, with the parameters of ours."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return on_tokens(self.layer, x)


@layers
@pytest.mark.parametrize("layout", range(len(LAYOUT_NAMES)), ids=LAYOUT_NAMES)
@pytest.mark.usefixtures("placement")
def test_equals_the_tutorials_way(layer, layout):
    ours = FeatureMapAttention(LAYERS[layer]()).double()
    _, x = next(itertools.islice(layouts(torch.randn(2, CHANNELS, 5, 3, dtype=torch.float64)), layout, None))
    before = x.clone()
    for training in (True, False):
        ours.train(training)
        assert_same(ours, Flat(copy.deepcopy(ours.layer)), x)
    assert torch.equal(x, before)


@layers
@formats
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.usefixtures("placement")
def test_memory_format_is_kept(layer, memory_format, training):
    ours = FeatureMapAttention(LAYERS[layer]())
    x = in_format(torch.randn(2, CHANNELS, 7, 6), memory_format)
    with torch.set_grad_enabled(training):
        assert ours(x).is_contiguous(memory_format=memory_format)
        assert ours(x[0]).stride() == x[0].stride()


@formats
@pytest.mark.parametrize("implementation", ["triton", "torch", "reference"])
@pytest.mark.parametrize("layer", ["SelfAttention", "MultiHead", "SingleHead", "TransformerEncoderLayer"])
def test_equals_on_every_backend(layer, memory_format, implementation, device):
    skip_without_kernels(implementation, device)
    ours = FeatureMapAttention(LAYERS[layer](backend=implementation)).double().to(device)
    plain = LAYERS[layer](backend="reference").double().to(device)
    plain.load_state_dict(ours.layer.state_dict())
    x = in_format(torch.randn(2, CHANNELS, 3, 4, dtype=torch.float64, device=device), memory_format)
    assert_same(ours, Flat(plain), x)


@layers
@formats
def test_float32(layer, memory_format, device):
    ours = FeatureMapAttention(LAYERS[layer]()).to(device)
    x = in_format(torch.randn(2, CHANNELS, 6, 7, device=device), memory_format)
    assert_same(ours, Flat(copy.deepcopy(ours.layer)), x, rtol=1e-3, atol=5e-5)


@layers
def test_one_image(layer):
    ours = FeatureMapAttention(LAYERS[layer]()).double()
    x = torch.randn(CHANNELS, 4, 5, dtype=torch.float64)
    single, batch = outcome(ours, x), outcome(ours, x[None])
    assert single[0].shape == x.shape
    for one, many in zip(single, batch, strict=True):
        torch.testing.assert_close(one, many.view(one.shape))


@layers
@formats
@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 1, 1), (0, 1, 1), (2, 0, 3), (2, 1, 5), (2, 5, 1)], ids=str)
@pytest.mark.usefixtures("placement")
def test_empty_and_single_pixels(layer, memory_format, shape):
    if layer == "torch's" and 0 in shape:
        pytest.skip("torch's layer refuses it")
    ours = FeatureMapAttention(LAYERS[layer]()).double()
    batch, height, width = shape
    x = in_format(torch.randn(batch, CHANNELS, height, width, dtype=torch.float64), memory_format)
    assert_same(ours, Flat(copy.deepcopy(ours.layer)), x)
    assert ours(x).is_contiguous(memory_format=memory_format)


@formats
@pytest.mark.usefixtures("placement")
def test_one_channel(memory_format):
    ours = FeatureMapAttention(SelfAttention(1, 1, 0.0)).double()
    x = in_format(torch.randn(2, 1, 4, 5, dtype=torch.float64), memory_format)
    assert_same(ours, Flat(copy.deepcopy(ours.layer)), x)


class Table(nn.Module):
    """A position for each pixel of the largest map."""

    def __init__(self, batched=False, dtype=torch.float64):
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8, CHANNELS, dtype=dtype))
        self.batched = batched

    def forward(self, height, width):
        position = self.table[:height, :width].flatten(0, 1)
        return position[None] if self.batched else position


@formats
@pytest.mark.parametrize("batched", [False, True], ids=["(N, C)", "(1, N, C)"])
@pytest.mark.usefixtures("placement")
def test_position(memory_format, batched):
    ours = FeatureMapAttention(SelfAttention(CHANNELS, HEADS, 0.0), position=Table(batched)).double()
    x = in_format(torch.randn(2, CHANNELS, 5, 3, dtype=torch.float64), memory_format)

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.position = copy.deepcopy(ours.layer), copy.deepcopy(ours.position)

        def forward(self, x):
            return on_tokens(self.layer, x + self.position.table[:5, :3].permute(2, 0, 1))

    assert_same(ours, Shifted(), x)
    with torch.no_grad():
        assert ours(x).is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(ours(x[0]), ours(x)[0])
    assert set(ours.state_dict()) == {"position.table", *(f"layer.{name}" for name in ours.layer.state_dict())}


def test_position_takes_the_dtype_of_the_map():
    ours = FeatureMapAttention(nn.Identity(), position=Table(dtype=torch.float32))
    assert ours(torch.zeros(1, CHANNELS, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


@formats
def test_options_are_passed_on(memory_format):
    ours = FeatureMapAttention(SelfAttention(CHANNELS, HEADS, 0.0)).double()
    x = in_format(torch.randn(2, CHANNELS, 2, 3, dtype=torch.float64), memory_format)
    options = {
        "bias": torch.randn(HEADS, 6, 6, dtype=torch.float64),
        "mask": torch.eye(6, dtype=torch.bool) | (torch.rand(6, 6) > 0.5),
        "bias_table": torch.randn(15, HEADS, dtype=torch.float64),
        "grid": (2, 3),
    }
    torch.testing.assert_close(ours(x, **options), on_tokens(ours.layer, x, **options))
    assert not torch.allclose(ours(x, **options), ours(x))
    with pytest.raises(TypeError, match="unexpected keyword argument 'window'"):
        ours(x, window=3)


class Watch(TorchDispatchMode):
    """Every copy of at least so many numbers."""

    COPYING = (aten.clone, aten.copy_, aten.contiguous, aten._to_copy, aten.cat, aten.permute_copy, aten.index)

    def __init__(self, numel):
        super().__init__()
        self.numel = numel
        self.copies = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in self.COPYING and out.numel() >= self.numel:
            self.copies.append(str(function))
        return out


def attention_by_contract(q, k, v, *args, dropout_p=0.0, backend=None, **options):
    """The definition, whose output lies as the operation's: as q does, dense."""
    out, _ = softmax_attention_reference(q, k, v, *args, **options)
    if q.stride(-1) == 1:
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.mT.contiguous().mT


def unwatched(operation):
    """What copies an operation makes inside is for its own tests."""

    def call(*args, **options):
        with _disable_current_modes():
            return operation(*args, **options)

    return call


@formats
@pytest.mark.parametrize("layer", ["SelfAttention", "MultiHead"])
@pytest.mark.parametrize("operation", ["by contract", "real"])
@pytest.mark.usefixtures("placement")
def test_the_map_is_not_copied(memory_format, layer, operation, device, monkeypatch):
    """But on the CPU, a contiguous one, into the token-major heads that attention needs there."""
    as_on_gpu = self_attention.attends_channel_major is self_attention.projects_by_image or device != "cpu"
    skip_without_kernels("triton" if as_on_gpu and operation == "real" else None, device)
    function = attention_by_contract if operation == "by contract" else self_attention.softmax_attention
    monkeypatch.setattr(self_attention, "softmax_attention", unwatched(function))
    ours = FeatureMapAttention(LAYERS[layer](backend="triton" if as_on_gpu else None)).to(device).eval()
    x = in_format(torch.randn(2, CHANNELS, 5, 8, device=device), memory_format)
    with torch.no_grad(), Watch(x.numel()) as watch:
        out = ours(x)
    copied = memory_format == torch.contiguous_format and not as_on_gpu
    assert watch.copies == (["aten.clone.default"] if copied else [])
    assert out.is_contiguous(memory_format=memory_format)


@formats
def test_the_wrapper_itself_only_views(memory_format):
    x = in_format(torch.randn(2, CHANNELS, 5, 8), memory_format)
    seen = []

    class Layer(nn.Module):
        def forward(self, tokens):
            seen.append(tokens)
            return tokens

    with Watch(1) as watch:
        out = FeatureMapAttention(Layer())(x)
    assert not watch.copies
    assert out.data_ptr() == seen[0].data_ptr() == x.data_ptr()
    assert out.stride() == x.stride()
    assert torch.equal(seen[0], x.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FeatureMapAttention(SelfAttention), "layer must be a module, got type"),
        (lambda: FeatureMapAttention(None), "layer must be a module, got NoneType"),
        (
            lambda: FeatureMapAttention(nn.Identity(), position=torch.zeros(3)),
            "position must be a module or None, got T",
        ),
        (lambda: FeatureMapAttention(nn.Identity(), nn.Identity()), "positional"),
    ],
)
def test_feature_map_attention_refuses_at_construction(make, words):
    with pytest.raises(TypeError, match=words):
        make()


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.parametrize(
    ("layer", "position", "x", "error", "words"),
    [
        (nn.Identity(), None, torch.zeros(3, 4), ValueError, r"x must be \(B, C, H, W\) or .*, got 2 dimensions"),
        (nn.Identity(), None, torch.zeros(1, 2, 3, 4, 5), ValueError, "got 5 dimensions"),
        (nn.Identity(), None, torch.zeros(2, 0, 3, 3), ValueError, "at least one channel"),
        (nn.Identity(), None, torch.zeros(2, 3, 3, dtype=torch.int32), TypeError, "x must be float.*, got torch.int32"),
        (nn.Identity(), None, [1.0], TypeError, "x must be a tensor, got list"),
        (SelfAttention(8), None, torch.zeros(2, 6, 3, 3), ValueError, r"embed_dim = 8, got \(2, 9, 6\)"),
        (Returns(lambda x: (x, None)), None, torch.zeros(2, 6, 3, 3), TypeError, "layer must return a .*, got tuple"),
        (
            Returns(lambda x: x[:, 1:]), None, torch.zeros(2, 6, 3, 3), ValueError,
            r"layer must return tokens of shape \(2, 9, 6\), got \(2, 8, 6\)",
        ),
        (
            nn.Identity(), Returns(lambda height, width: torch.zeros(height, width, 6)), torch.zeros(2, 6, 3, 2),
            ValueError, r"position must return \(N, C\) or \(1, N, C\) with N = 6, C = 6, got \(3, 2, 6\)",
        ),
        (
            nn.Identity(), Returns(lambda height, width: torch.zeros(2, 6, 6)), torch.zeros(2, 6, 3, 2),
            ValueError, r"position must return .*, got \(2, 6, 6\)",
        ),
    ],
)  # fmt: skip
def test_feature_map_attention_refuses_at_call(layer, position, x, error, words):
    with pytest.raises(error, match=words):
        FeatureMapAttention(layer, position=position)(x)


# SAGANAttention.


def sagan_pair(channels=16, dtype=torch.float64, **options):
    theirs = BigGANAttention(channels).to(dtype)
    nn.init.constant_(theirs.gamma, 0.7)
    ours = SAGANAttention(channels, **options).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@formats
@pytest.mark.parametrize("shape", [(2, 6, 8), (1, 2, 2), (0, 4, 4)], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_sagan_equals(memory_format, shape, training):
    theirs, ours = sagan_pair()
    batch, height, width = shape
    x = in_format(torch.randn(batch, 16, height, width, dtype=torch.float64), memory_format)
    assert_same(ours.train(training), theirs.train(training), x)
    with torch.no_grad():
        assert ours(x).is_contiguous(memory_format=memory_format)


@formats
@pytest.mark.parametrize("implementation", ["triton", "torch", "reference"])
def test_sagan_equals_on_every_backend(memory_format, implementation, device):
    skip_without_kernels(implementation, device)
    theirs, ours = sagan_pair(backend=implementation)
    x = in_format(torch.randn(2, 16, 4, 6, dtype=torch.float64, device=device), memory_format)
    assert_same(ours.to(device), theirs.to(device), x)


@formats
def test_sagan_equals_in_float32(memory_format, device):
    theirs, ours = sagan_pair(32, torch.float32)
    x = in_format(torch.randn(2, 32, 10, 8, device=device), memory_format)
    assert_same(ours.to(device), theirs.to(device), x, rtol=1e-3, atol=5e-5)


def test_sagan_starts_as_the_identity():
    module = SAGANAttention(8)
    assert list(module.state_dict()) == ["gamma", "theta.weight", "phi.weight", "g.weight", "o.weight"]
    assert module.gamma.shape == ()
    x = torch.randn(2, 8, 5, 4)
    out = module(x)
    assert torch.equal(out, x)
    out.square().sum().backward()
    assert module.gamma.grad != 0
    with pytest.raises(RuntimeError, match="gamma"):
        module.load_state_dict({name: tensor for name, tensor in module.state_dict().items() if name != "gamma"})


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 9, 15])
def test_sagan_with_few_channels(channels):
    module = SAGANAttention(channels)
    assert module.theta.weight.shape == module.phi.weight.shape == (max(1, channels // 8), channels, 1, 1)
    assert module.g.weight.shape == (max(1, channels // 2), channels, 1, 1)
    nn.init.ones_(module.gamma)
    x = torch.randn(2, channels, 4, 4)
    out = module(x)
    assert out.shape == x.shape
    assert not torch.allclose(out, x)


@pytest.mark.parametrize(("height", "width"), [(5, 4), (4, 5), (5, 7), (1, 1), (1, 6), (3, 1)])
def test_sagan_with_odd_sizes(height, width):
    """As on a map with a last row and column of -inf, which a maximum passes over."""
    _, module = sagan_pair()
    x = torch.randn(2, 16, height, width, dtype=torch.float64)
    q = module.theta(x).flatten(2).mT
    even = (0, width % 2, 0, height % 2)
    k, v = (F.max_pool2d(F.pad(conv(x), even, value=-1e9), 2).flatten(2) for conv in (module.phi, module.g))
    assert k.shape[2] == ((height + 1) // 2) * ((width + 1) // 2)
    expected = module.gamma * module.o((v @ (q @ k).softmax(-1).mT).unflatten(2, (height, width))) + x
    torch.testing.assert_close(module(x), expected)


def test_sagan_with_spectral_norm():
    def conv(*args, **options):
        return spectral_norm(nn.Conv2d(*args, **options))

    theirs, ours = BigGANAttention(16, conv).double(), SAGANAttention(16, conv=conv).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for module in (theirs, ours):
        nn.init.constant_(module.gamma, 0.7)
    x = torch.randn(2, 16, 4, 6, dtype=torch.float64)
    assert_same(ours, theirs, x)
    assert_same(ours.eval(), theirs.eval(), x)


def test_sagan_logits_are_not_scaled(monkeypatch):
    scales = []

    def operation(q, k, v, **options):
        scales.append(options.pop("scale"))
        return attention_by_contract(q, k, v, scale=scales[-1])

    monkeypatch.setattr(feature_map, "softmax_attention", operation)
    SAGANAttention(32)(torch.randn(1, 32, 4, 4))
    assert scales == [1.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SAGANAttention(0), "channels must be a positive integer, got 0"),
        (lambda: SAGANAttention(2.5), r"channels must be a positive integer, got 2\.5"),
        (lambda: SAGANAttention(8, backend="cuda"), "backend must be one of"),
        (lambda: AttentionPool2d(7, 64, 7), "embed_dim must be divisible by num_heads, got embed_dim=64, num_heads=7"),
        (lambda: AttentionPool2d(0, 64, 8), "spacial_dim must be a positive integer, got 0"),
        (lambda: AttentionPool2d((7, 7), 64, 8), r"spacial_dim must be a positive integer, got \(7, 7\)"),
        (lambda: AttentionPool2d(7, "64", 8), "embed_dim must be a positive integer, got '64'"),
        (lambda: AttentionPool2d(7, 64, 8, 0), "output_dim must be a positive integer, got 0"),
        (lambda: AttentionPool2d(7, 64, -8), "num_heads must be a positive integer, got -8"),
    ],
)
def test_refuses_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("module", [SAGANAttention(8), AttentionPool2d(3, 8, 2)], ids=["SAGAN", "pool"])
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: torch.zeros(2, 6, 3, 3), ValueError, r"x must be \(B, C, H, W\) .* with C = 8 .*, got \(2, 6, 3, 3\)"),
        (lambda: torch.zeros(2, 8, 0, 3), ValueError, r"at least one pixel, got \(2, 8, 0, 3\)"),
        (lambda: torch.zeros(2, 8), ValueError, r"x must be \(B, C, H, W\) or \(C, H, W\), got 2 dimensions"),
        (lambda: torch.zeros(2, 8, 3, 3).double(), TypeError, "x must have the dtype .*float32, got .*float64"),
        (lambda: torch.zeros(2, 8, 3, 3, dtype=torch.int64), TypeError, "x must be float.*, got torch.int64"),
        (lambda: torch.zeros(2, 8, 3, 3, device="meta"), ValueError, "x must be on the device .*cpu, got meta"),
        (lambda: None, TypeError, "x must be a tensor, got NoneType"),
    ],
)
def test_refuses_at_call(module, make, error, words):
    with pytest.raises(error, match=words):
        module(make())


# AttentionPool2d.


def pool_pair(spacial_dim=4, embed_dim=12, num_heads=3, output_dim=None, dtype=torch.float64):
    theirs = CLIPPool(spacial_dim, embed_dim, num_heads, output_dim).to(dtype)
    for linear in (theirs.q_proj, theirs.k_proj, theirs.v_proj):
        nn.init.normal_(linear.bias)
    ours = AttentionPool2d(spacial_dim, embed_dim, num_heads, output_dim).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("layout", range(len(LAYOUT_NAMES)), ids=LAYOUT_NAMES)
@pytest.mark.parametrize("output_dim", [None, 7])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_pool_equals(layout, output_dim, training):
    theirs, ours = pool_pair(output_dim=output_dim)
    _, x = next(itertools.islice(layouts(torch.randn(2, 12, 4, 4, dtype=torch.float64)), layout, None))
    before = x.clone()
    assert_same(ours.train(training), theirs.train(training), x)
    assert ours(x).shape == (2, output_dim or 12)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("spacial_dim", "num_heads"), [(1, 1), (1, 12), (3, 12), (5, 1), (2, 4)])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_pool_equals_at_other_sizes(spacial_dim, num_heads, batch):
    theirs, ours = pool_pair(spacial_dim, 12, num_heads)
    assert_same(ours, theirs, torch.randn(batch, 12, spacial_dim, spacial_dim, dtype=torch.float64))


@formats
def test_pool_equals_in_float32(memory_format, device):
    theirs, ours = pool_pair(7, 64, 4, dtype=torch.float32)
    x = in_format(torch.randn(3, 64, 7, 7, device=device), memory_format)
    assert_same(ours.to(device), theirs.to(device), x, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("implementation", ["triton", "torch", "reference"])
def test_pool_is_the_same_on_every_backend(implementation):
    theirs, ours = pool_pair()
    x = torch.randn(2, 12, 4, 4, dtype=torch.float64)
    with attnk.use_backend(implementation):
        assert_same(ours, theirs, x)


@pytest.mark.parametrize("size", [(4, 5), (2, 2), (7, 3), (8, 8), (1, 1)], ids=str)
def test_pool_resizes_its_positions(size):
    theirs, ours = pool_pair()
    other = CLIPPool(4, 12, 3).double()
    other.load_state_dict(theirs.state_dict())
    grid = theirs.positional_embedding[1:].detach().T.reshape(1, 12, 4, 4)
    grid = F.interpolate(grid.float(), size, mode="bicubic")
    resized = torch.cat([theirs.positional_embedding[:1], grid.double().flatten(2)[0].T])
    other.positional_embedding = nn.Parameter(resized.detach())
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), other(x), rtol=1e-6, atol=1e-7)
    ours(x).sum().backward()
    if min(size) >= 4:  # a smaller map leaves some positions out
        assert (ours.positional_embedding.grad.abs().sum(1) > 0).all()


def test_pool_keeps_positions_of_a_map_it_is_for():
    _, ours = pool_pair()
    assert ours._position(4, 4) is ours.positional_embedding
    constant = nn.init.constant_(ours.positional_embedding, 0.3)
    torch.testing.assert_close(ours._position(5, 9), torch.full((46, 12), 0.3, dtype=torch.float64))
    assert constant is ours.positional_embedding


def test_pool_projects_no_pixel():
    """The map is neither copied nor projected: nothing of its size is made."""
    _, ours = pool_pair(8, 12, 3)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            storages = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in storages:
                sizes.append(out.numel())
            return out

    for memory_format in FORMATS.values():
        x = in_format(torch.randn(16, 12, 8, 8, dtype=torch.float64), memory_format)
        with torch.no_grad(), Sizes():
            ours(x)
    assert max(sizes) == 16 * 3 * 65


def test_pool_of_one_image():
    _, ours = pool_pair()
    x = torch.randn(12, 4, 4, dtype=torch.float64)
    assert ours(x).shape == (12,)
    torch.testing.assert_close(ours(x), ours(x[None])[0])


def test_pool_initialisation_draws_what_clip_draws():
    torch.manual_seed(3)
    theirs = nn.Sequential(CLIPPool(3, 8, 2, 5), nn.Linear(2, 2))
    torch.manual_seed(3)
    ours = nn.Sequential(AttentionPool2d(3, 8, 2, 5), nn.Linear(2, 2))
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_pool_in_half_precision_as_clip_keeps_it():
    """CLIP converts the projections and leaves the positions in float32."""
    theirs, ours = pool_pair(4, 64, 4, dtype=torch.float32)
    for module in (ours.q_proj, ours.k_proj, ours.v_proj, ours.c_proj):
        module.half()
    x = torch.randn(2, 64, 4, 4)
    out = ours(x.half())
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), theirs(x), rtol=2e-2, atol=2e-2)


# All of them.

MODULES = {
    "FeatureMapAttention": lambda: FeatureMapAttention(SelfAttention(CHANNELS, HEADS, 0.0)),
    "FeatureMapAttention with position": lambda: FeatureMapAttention(
        TransformerEncoderLayer(CHANNELS, HEADS, 0.0, 2), position=Table(dtype=torch.float32)
    ),
    "SAGANAttention": lambda: SAGANAttention(CHANNELS),
    "AttentionPool2d": lambda: AttentionPool2d(5, CHANNELS, HEADS, 9),
}
modules = pytest.mark.parametrize("module", MODULES)


def build(module):
    module = MODULES[module]()
    if isinstance(module, SAGANAttention):
        nn.init.ones_(module.gamma)
    return module


@modules
@formats
@pytest.mark.usefixtures("placement")
def test_autocast(module, memory_format):
    module = build(module)
    x = in_format(torch.randn(2, CHANNELS, 5, 5), memory_format)
    wide = outcome(module, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = outcome(module, x)
    kept = isinstance(module, SAGANAttention) or isinstance(getattr(module, "layer", None), TransformerEncoderLayer)
    assert narrow[0].dtype == (torch.float32 if kept else torch.bfloat16)
    for got, expected in zip(narrow, wide, strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got.float() / scale, expected / scale, rtol=5e-2, atol=5e-2)
    if narrow[0].dim() == 4:
        assert narrow[0].is_contiguous(memory_format=memory_format)


@modules
@formats
def test_bfloat16(module, memory_format):
    module = build(module)
    x = in_format(torch.randn(2, CHANNELS, 5, 5), memory_format)
    expected = module(x)
    out = module.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=8e-2, atol=8e-2)


@pytest.mark.parametrize(("module", "size"), [*((module, (5, 5)) for module in MODULES), ("AttentionPool2d", (4, 6))])
def test_compiles_to_one_graph(module, size):
    torch._dynamo.reset()
    module = build(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for memory_format in FORMATS.values():
        x = in_format(torch.randn(2, CHANNELS, *size), memory_format)
        for got, expected in zip(outcome(compiled, x), outcome(module, x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), module.eval()(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def copies(module):
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


@modules
def test_copies(module, backend, device):
    name, x = module, torch.randn(2, CHANNELS, 5, 5, device=device)
    with attnk.use_backend(backend):
        module = build(name).to(device).eval()
        expected = module(x)
        if name != "FeatureMapAttention with position":  # its class lives in a test that cannot be imported
            for other in copies(module):
                assert repr(other) == repr(module)
                assert torch.equal(other(x), expected)
        again = build(name).to(device).eval()
        assert not torch.equal(again(x), expected)
        again.load_state_dict(module.state_dict())
        assert torch.equal(again(x), expected)


def test_options_are_shown():
    assert repr(SAGANAttention(8, backend="torch")).startswith("SAGANAttention(\n  channels=8, backend='torch'")
    assert "backend" not in repr(SAGANAttention(8))
    assert "spacial_dim=3, num_heads=2" in repr(AttentionPool2d(3, 8, 2))
    assert "(layer): SelfAttention" in repr(FeatureMapAttention(SelfAttention(8)))


def test_live_in_a_network():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), SAGANAttention(16), FeatureMapAttention(TransformerEncoderLayer(16, 4)),
        AttentionPool2d(7, 16, 4, 10),
    )  # fmt: skip
    for memory_format in FORMATS.values():
        out = model(in_format(torch.randn(2, 3, 9, 9), memory_format))
        assert out.shape == (2, 10)
        out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
