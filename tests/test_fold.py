"""attnk.fold: what is linear becomes one convolution, and nothing else changes."""

import copy

import pytest
import torch
from gate_modules import assert_untouched, copies, feature_map, settle
from torch import nn

import attnk
from attnk.rewrite.fold import ConvGate


class C2fModule(nn.Module):
    """A pasted copy of the published class."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.attention = nn.Conv2d(out_channels, 1, kernel_size=1)

    def forward(self, x):
        return x * torch.sigmoid(self.attention(self.conv1(x) + self.conv2(x)))


class WithActivation(C2fModule):
    def forward(self, x):
        return x * torch.sigmoid(self.attention(torch.relu(self.conv1(x) + self.conv2(x))))


class Difference(C2fModule):
    def forward(self, x):
        return x * torch.sigmoid(self.attention(self.conv1(x) - self.conv2(x)))


class MapOut(C2fModule):
    def forward(self, x):
        return torch.sigmoid(self.attention(self.conv1(x) + self.conv2(x)))


class Fails(C2fModule):
    def forward(self, x):
        raise RuntimeError("made for something else")


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def assert_folded(module, x, kinds):
    """The copy computes the same, and the module is what it was."""
    before, words = copy.deepcopy(module.state_dict()), repr(module)
    folded = attnk.fold(module)
    assert repr(module) == words
    assert_untouched(module, before)
    assert [part.training for part in (module, folded)] == [module.training] * 2
    assert {type(part) for part in folded.modules()} & {nn.BatchNorm2d, C2fModule, ConvGate} == kinds
    expected, out = module(x), folded(x)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not {t.data_ptr() for t in module.state_dict().values()} & {
        t.data_ptr() for t in folded.state_dict().values()
    }
    return folded


@pytest.mark.parametrize("make", [C2fModule, lambda *sizes: attnk.C2fModule(*sizes, compat="original")])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_three_convolutions_are_one(make, training):
    module = make(64, 128).train(training)
    folded = assert_folded(module, torch.randn(2, 64, 14, 15), {ConvGate})
    assert (size(module), size(folded)) == (147_841, 577)
    assert [tuple(tensor.shape) for tensor in folded.state_dict().values()] == [(1, 64, 3, 3), (1,)]


def test_three_convolutions_are_one_exactly_in_double():
    module = settle(C2fModule(5, 7))
    x = feature_map(2, 5, 4, 6).requires_grad_()
    folded = attnk.fold(module)
    torch.testing.assert_close(folded(x), module(x), rtol=1e-12, atol=1e-12)
    for some, other in zip(*(torch.autograd.grad(one(x).sum(), x) for one in (folded, module)), strict=True):
        torch.testing.assert_close(some, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(folded(x[0]), module(x[0]))


@pytest.mark.parametrize("make", [WithActivation, Difference, MapOut, Fails, lambda *sizes: attnk.C2fModule(*sizes)])
def test_what_only_looks_alike_is_left(make):
    module = make(4, 6)
    folded = attnk.fold(module)
    assert type(folded) is type(module)
    assert folded is not module
    assert list(folded.state_dict()) == list(module.state_dict())


def test_other_keys_and_shapes_are_left():
    for change in (
        lambda module: setattr(module, "extra", nn.Parameter(torch.ones(1))),
        lambda module: setattr(module, "conv2", nn.Conv2d(4, 6, 1)),
        lambda module: setattr(module, "attention", nn.Conv2d(6, 1, 1, bias=False)),
        lambda module: setattr(module, "conv1", nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
        lambda module: setattr(module, "conv1", nn.Conv2d(4, 6, 3, padding=2, dilation=2)),
        lambda module: module.conv1.register_forward_hook(lambda *args: None),
        lambda module: module.register_forward_pre_hook(lambda *args: None),
        lambda module: nn.utils.parametrizations.weight_norm(module.conv1),
    ):
        module = C2fModule(4, 6)
        change(module)
        assert isinstance(attnk.fold(module), C2fModule)


@pytest.mark.parametrize("options", [{}, {"bias": True, "output": "gated", "order": "max_avg"}, {"output": "residual"}])
def test_norm_of_a_spatial_attention(options):
    module = settle(attnk.SpatialAttention(norm=True, **options), torch.float32).eval()
    folded = assert_folded(module, torch.randn(2, 5, 9, 10), set())
    assert (folded.bn, size(folded)) == (None, 99)
    assert [getattr(folded, name) for name in ("order", "output", "ties")] == [
        getattr(module, name) for name in ("order", "output", "ties")
    ]
    plain = attnk.SpatialAttention(**{**options, "bias": True})
    plain.load_state_dict(folded.state_dict(), strict=True)


@pytest.mark.parametrize("options", [{"affine": False}, {"affine": True}])
def test_norm_without_weights(options):
    module = settle(attnk.SpatialAttention(3, norm=True), torch.float32)
    module.bn = nn.BatchNorm2d(1, **options)
    assert_folded(module.eval(), torch.randn(2, 5, 9, 10), set())


def test_norm_of_a_cbam():
    module = settle(attnk.CBAM(6, 2, 3, pool="avg_max", norm=True), torch.float32).eval()
    folded = assert_folded(module, torch.randn(2, 6, 5, 5), set())
    assert folded.spatial_attention.bn is None
    plain = attnk.CBAM(6, 2, 3, pool="avg_max")
    plain.load_state_dict(folded.state_dict(), strict=True)


def test_norms_that_follow_the_batch_are_left():
    for make in (lambda: attnk.SpatialAttention(norm=True), lambda: attnk.CBAM(4, norm=True)):
        assert size(attnk.fold(make())) == size(make())
    without = attnk.SpatialAttention(norm=True).eval()
    without.bn = nn.BatchNorm2d(1, track_running_stats=False).eval()
    assert attnk.fold(without).bn is not None


class Model(nn.Module):
    """Gates at several depths, one of them in two places."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.gates = nn.ModuleDict({"first": C2fModule(8, 6), "second": attnk.CBAM(8, 4, norm=True)})
        self.again = self.gates["first"]
        self.triplet = attnk.TripletAttention(3)
        self.nothing = None
        self.register_module("none", None)

    def forward(self, x):
        x = self.gates["second"](self.gates["first"](self.stem(x)))
        return self.triplet(self.again(x))


def test_inside_a_model():
    module = settle(Model(), torch.float32).eval()
    folded = assert_folded(module, torch.randn(2, 3, 8, 8), {nn.BatchNorm2d, ConvGate})
    assert [part for part in folded.modules() if isinstance(part, nn.BatchNorm2d)] == [folded.stem[1]]
    assert folded.again is folded.gates["first"]
    for other in copies(folded):
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(other(x), folded(x))
    assert repr(attnk.fold(folded)) == repr(folded)


def test_modes_and_what_is_trained_are_kept():
    gates = [attnk.SpatialAttention(norm=True).eval() for _ in range(2)]
    module = nn.Sequential(C2fModule(4, 6).requires_grad_(False), gates[0], gates[1].requires_grad_(False))
    folded = attnk.fold(module)
    assert [part.training for part in folded] == [True, False, False]
    assert [part.conv1.weight.requires_grad for part in folded[1:]] == [True, False]
    assert [part.conv1.bias.requires_grad for part in folded[1:]] == [True, False]
    assert not folded[0].conv.weight.requires_grad


def test_draws_nothing_that_matters():
    module = attnk.fold(C2fModule(4, 6))
    torch.manual_seed(7)
    assert torch.equal(attnk.fold(module).conv.weight, module.conv.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_error_too_large_is_told(dtype):
    model = nn.Sequential(nn.Identity(), settle(C2fModule(8, 6), dtype))
    words = (
        rf"1 \(C2fModule\) cannot be folded in {dtype}: on a random map the result is off by \d\.\de-0\d of its "
        "largest value, and at most 1e-05 is allowed; fold the model in a wider dtype, then convert it"
    )
    with pytest.raises(ValueError, match=words):
        attnk.fold(model)
    narrow = attnk.fold(model.float()).to(dtype)
    assert narrow(torch.ones(1, 8, 3, 3, dtype=dtype)).dtype == dtype


def test_the_error_of_every_part_is_looked_at(monkeypatch):
    monkeypatch.setattr("attnk.rewrite.fold.MAX_ERROR", 1e-11)  # less than float32 can have
    for make in (lambda: attnk.SpatialAttention(norm=True), lambda: attnk.CBAM(4, norm=True), lambda: C2fModule(4, 6)):
        module = settle(make(), torch.float32).eval()
        with pytest.raises(ValueError, match=rf"^{type(module).__name__} cannot be folded in torch.float32: .* off by"):
            attnk.fold(module)
        assert size(attnk.fold(module.double())) < size(module)


def test_no_module():
    with pytest.raises(TypeError, match=r"module must be an nn.Module, got NoneType"):
        attnk.fold(None)


def test_module_of_kernels_folds_anywhere():
    module = attnk.SpatialAttention(norm=True, backend="triton").eval()
    assert attnk.fold(module).backend == "triton"
