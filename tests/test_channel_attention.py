"""Channel attention against the classes it stands in for, re-written here from what they compute."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from gate_modules import assert_same, assert_untouched, copies, feature_map, outcome, settle
from helpers import pairwise
from torch import nn

import attnk

C = 12


def mean(x):
    return x.mean((2, 3), keepdim=True)


def amax(x):
    return x.amax((2, 3), keepdim=True)


class Tutorial(nn.Module):
    """Adaptive pool, two linear layers with biases."""

    def __init__(self, channel=C, reduction=4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel),
            nn.Sigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)


class ExternalSE(Tutorial):
    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(C, 3, bias=False), nn.ReLU(), nn.Linear(3, C, bias=False), nn.Sigmoid())


class Monai(Tutorial):
    def forward(self, x):
        return x + super().forward(x)


class TwoConvolutions(nn.Module):
    """timm's and torchvision's: two 1 x 1 convolutions by the names of each, with any activation, gate and norm."""

    def __init__(self, first="fc1", last="fc2", *, act=F.relu, gate=torch.sigmoid, norm=False, bias=True, hidden=3):
        super().__init__()
        self.names = first, last
        self.act, self.gate = act, gate
        self.add_module(first, nn.Conv2d(C, hidden, 1, bias=bias))
        self.bn = nn.BatchNorm2d(hidden) if norm else nn.Identity()
        self.add_module(last, nn.Conv2d(hidden, C, 1, bias=bias))

    def logits(self, pooled):
        first, last = (self.get_submodule(name) for name in self.names)
        return last(self.act(self.bn(first(pooled))))

    def forward(self, x):
        return x * self.gate(self.logits(mean(x)))


class HalfSum(TwoConvolutions):
    def forward(self, x):
        return x * self.gate(self.logits(0.5 * mean(x) + 0.5 * amax(x)))


class AvgMax(TwoConvolutions):
    def forward(self, x):
        return x * self.gate(self.logits(mean(x)) + self.logits(amax(x)))


class Published(nn.Module):
    """The published CBAM's channel half: the pools are max_pool2d and avg_pool2d."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(C, 3), nn.ReLU(), nn.Linear(3, C))

    def forward(self, x):
        size = x.shape[2:]
        logit = self.mlp(F.avg_pool2d(x, size, stride=size)) + self.mlp(F.max_pool2d(x, size, stride=size))
        return x * torch.sigmoid(logit)[:, :, None, None].expand_as(x)


class ExternalMap(nn.Module):
    """External-Attention's: returns the gate."""

    def __init__(self):
        super().__init__()
        self.maxpool, self.avgpool = nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d(1)
        self.se = nn.Sequential(nn.Conv2d(C, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, C, 1, bias=False))

    def forward(self, x):
        return torch.sigmoid(self.se(self.maxpool(x)) + self.se(self.avgpool(x)))


class Ultralytics(nn.Module):
    """One full convolution."""

    def __init__(self, gate=torch.sigmoid):
        super().__init__()
        self.pool, self.fc, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1), gate

    def forward(self, x):
        return x * self.gate(self.fc(self.pool(x)))


class EffectiveHalfSum(Ultralytics):
    def forward(self, x):
        return x * self.gate(self.fc(0.5 * mean(x) + 0.5 * amax(x)))


class MaxOnly(TwoConvolutions):
    def forward(self, x):
        return x * self.gate(self.logits(x.flatten(2).max(2, keepdim=True).values[..., None]))


def bare_sequence():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, 3, 1), nn.ReLU(), nn.Conv2d(3, C, 1), nn.Sigmoid())


FAMILIES = {
    "tutorial": (Tutorial, {}),
    "external": (ExternalSE, {"bias": False}),
    "monai": (Monai, {"output": "residual"}),
    "timm": (TwoConvolutions, {}),
    "timm norm": (lambda: TwoConvolutions(norm=True), {"norm": True}),
    "timm half sum": (HalfSum, {"pool": "half_sum", "ties": "even"}),
    "efficientnet": (
        lambda: TwoConvolutions("conv_reduce", "conv_expand", act=F.silu),
        {"activation": "silu"},
    ),
    "torchvision": (lambda: TwoConvolutions(gate=F.hardsigmoid), {"gate": "hard_sigmoid"}),
    "hard swish": (lambda: TwoConvolutions("reduce", "expand", act=F.hardswish), {"activation": "hard_swish"}),
    "timm avg max": (
        lambda: AvgMax(bias=False),
        {"pool": "avg_max", "ties": "even", "bias": False},
    ),
    "avg max norm": (lambda: AvgMax(norm=True), {"pool": "avg_max", "ties": "even", "norm": True}),
    "published": (Published, {"pool": "avg_max"}),
    "external map": (ExternalMap, {"pool": "avg_max", "bias": False, "output": "map"}),
    "max": (MaxOnly, {"pool": "max"}),
    "ultralytics": (Ultralytics, {"hidden_channels": 0}),
    "effective": (lambda: Ultralytics(F.hardsigmoid), {"hidden_channels": 0, "gate": "hard_sigmoid"}),
    "effective half sum": (EffectiveHalfSum, {"hidden_channels": 0, "pool": "half_sum", "ties": "even"}),
    "sequence": (bare_sequence, {"output": "map"}),
    "same width": (lambda: TwoConvolutions(hidden=C), {"hidden_channels": C}),
}
families = pytest.mark.parametrize("family", FAMILIES)


def build(family, dtype=torch.float64):
    return settle(FAMILIES[family][0](), dtype)


def ours_of(family, **options):
    return attnk.ChannelAttention(C, 4, **{**FAMILIES[family][1], **options}).double()


@families
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_equals_after_loading_their_weights(family, training, implementation):
    theirs = build(family).train(training)
    ours = ours_of(family, backend=implementation).train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for _ in range(2):  # the second time with running statistics of the first
        assert_same(ours, theirs, feature_map(3, C, 5, 4))


@families
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals_after_from_module(family, training):
    theirs = build(family).train(training)
    ours = attnk.ChannelAttention.from_module(theirs)
    assert all(part.training is training for part in ours.modules())
    assert repr(ours) == repr(ours_of(family))
    for _ in range(2):
        assert_same(ours, theirs, feature_map(3, C, 5, 4))


@families
def test_equals_with_kernels(family, backend, device):
    theirs = build(family).to(device)
    ours = ours_of(family, backend=backend).to(device)
    ours.load_state_dict(theirs.state_dict())
    x = feature_map(2, C, 4, 4).to(device)
    assert_same(ours, theirs, x)
    assert_same(ours.eval(), theirs.eval(), x)


@families
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_from_module_copies_all_and_shares_nothing(family, dtype):
    theirs = build(family, dtype).eval()
    parameters = list(theirs.parameters())
    parameters[0].requires_grad_(False)
    before = copy.deepcopy(theirs.state_dict())
    state = torch.get_rng_state()
    ours = attnk.ChannelAttention.from_module(theirs)
    assert torch.equal(torch.get_rng_state(), state)
    assert_untouched(theirs, before)
    assert not theirs.training
    assert not ours.training
    assert [parameter.requires_grad for parameter in ours.parameters()] == [p.requires_grad for p in parameters]
    shared = {tensor.data_ptr() for tensor in theirs.state_dict().values()}
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine.flatten(), other.flatten())
        assert mine.data_ptr() not in shared


def test_from_module_keeps_a_frozen_norm_as_it_is():
    theirs = build("timm norm")
    theirs.bn.eval()
    theirs.bn.eps, theirs.bn.momentum = 0.5, None
    ours = attnk.ChannelAttention.from_module(theirs)
    assert (ours.training, ours.fc.bn.training, ours.fc.bn.eps, ours.fc.bn.momentum) == (True, False, 0.5, None)
    assert_same(ours, theirs, feature_map(3, C, 5, 4))


@families
def test_trains_alike(family):
    theirs = build(family)
    ours = attnk.ChannelAttention.from_module(theirs)
    inputs = [torch.randn(3, C, 4, 4, dtype=torch.float64) for _ in range(2)]
    for module in (ours, theirs):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for x in inputs:
            optimizer.zero_grad()
            (module(x) ** 2).mean().backward()
            optimizer.step()
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine.flatten(), other.flatten(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("make", [lambda **kw: attnk.SELayer(C, 4, **kw), lambda **kw: attnk.EffectiveSE(C, **kw)])
def test_the_other_names_take_modules_too(make):
    for options in ({}, {"pool": "half_sum"}, {"output": "map"}):
        module = settle(make(**options))
        again = type(module).from_module(module)
        assert type(again) is type(module)
        assert_same(again, module, feature_map(2, C, 4, 3))
        plain = attnk.ChannelAttention.from_module(module)
        assert isinstance(plain, attnk.ChannelAttention)
        assert_same(plain, module, feature_map(2, C, 4, 3))


def test_effective_se_from_module():
    for family in ("effective", "effective half sum", "ultralytics"):
        theirs = build(family)
        ours = attnk.EffectiveSE.from_module(theirs)
        assert type(ours) is attnk.EffectiveSE
        assert_same(ours, theirs, feature_map(2, C, 4, 3))
    with pytest.raises(ValueError, match=r"TwoConvolutions was not recognised as effective .*: it has two layers, not"):
        attnk.EffectiveSE.from_module(build("timm"))


def test_nested_checkpoint():
    theirs = nn.Sequential(build("timm norm"), nn.Sequential(build("published")))
    ours = nn.Sequential(ours_of("timm norm"), nn.Sequential(ours_of("published")))
    checkpoint = theirs.state_dict()
    names = list(checkpoint)
    ours.load_state_dict(checkpoint, strict=True)
    assert list(checkpoint) == names
    assert_same(ours, theirs, feature_map(3, C, 4, 4))
    mine = [name for name in ours.state_dict() if name.startswith("0.") and name.endswith("weight")]
    assert mine == ["0.fc.0.weight", "0.fc.bn.weight", "0.fc.2.weight"]


def test_a_key_that_tells_the_pool():
    state = build("published", torch.float32).state_dict()
    words = (
        r"mlp.1.weight belongs to a module with pool='avg_max', this one has 'avg': build SELayer\(pool='avg_max'\) or "
        r"use SELayer.from_module"
    )
    with pytest.raises(RuntimeError, match=words):
        attnk.SELayer(C, 4).load_state_dict(state, strict=False)


@pytest.mark.parametrize(
    ("options", "family", "words"),
    [
        ({}, "external", "Missing key.*fc.0.bias"),
        ({"bias": False}, "tutorial", "Unexpected key.*fc.0.bias"),
        ({"norm": True}, "tutorial", "Missing key.*fc.bn.weight"),
        ({}, "timm norm", "Unexpected key.*bn.weight"),
        ({"hidden_channels": 0}, "tutorial", "Missing key.*fc.weight"),
        ({}, "ultralytics", "Missing key.*fc.0.weight"),
        ({"hidden_channels": 5}, "tutorial", "size mismatch for fc.0.weight"),
    ],
)
def test_strict_loading_misses_nothing(options, family, words):
    with pytest.raises(RuntimeError, match=words):
        attnk.ChannelAttention(C, 4, **options).load_state_dict(build(family, torch.float32).state_dict())


class LookAlike(TwoConvolutions):
    def __init__(self, pool=mean, **options):
        super().__init__(**options)
        self.pool = pool

    def forward(self, x):
        return x * self.gate(self.logits(self.pool(x)))


class ExtraParameter(Tutorial):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))


class Swapped(TwoConvolutions):
    def logits(self, pooled):
        return self.fc1(self.fc2(pooled)) if self.fc1.weight.shape == self.fc2.weight.shape else pooled


COMPUTES = "no pool, activation, gate, output and tie policy of attnk.ChannelAttention gives its values and gradients"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LookAlike(act=torch.tanh), COMPUTES),
        (lambda: LookAlike(act=F.gelu), COMPUTES),
        (lambda: LookAlike(gate=lambda z: 2 * torch.sigmoid(z)), COMPUTES),
        (lambda: LookAlike(pool=lambda x: x.amin((2, 3), True)), COMPUTES),
        (lambda: LookAlike(pool=lambda x: x.std((2, 3), keepdim=True)), COMPUTES),
        (lambda: LookAlike(pool=lambda x: mean(x.relu())), COMPUTES),
        (lambda: LookAlike(pool=lambda x: mean(x).detach()), COMPUTES),
        (lambda: Swapped(hidden=C), COMPUTES),
        (lambda: LookAlike(pool=lambda x: x.flatten(1)), "it failed on a 12-channel map"),
        (lambda: nn.Sequential(nn.Conv2d(C, 3, 1), nn.Conv2d(3, C, 1)), COMPUTES),
        (ExtraParameter, r"unknown keys \['gamma'\]"),
        (lambda: nn.Linear(3, 3), "it is a layer alone, no channel gate"),
        (lambda: nn.ReLU(), r"two, \(hidden, C\) and \(C, hidden\), .*; its weights are none"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)), r"its weights are \(3, 4\), \(5, 3\)"),
        (lambda: nn.Sequential(nn.Linear(4, 3)), r"its weights are \(3, 4\)"),
        (lambda: nn.Sequential(nn.Conv2d(4, 2, 3), nn.Conv2d(2, 4, 1)), r"its weights are \(2, 4, 3, 3\)"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4, bias=False)), "must have a bias or none"),
        (lambda: nn.Sequential(Tutorial(), nn.BatchNorm2d(C)), "one batch norm of 3 channels between two layers"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), "it may hold one batch norm of 0 channels"),
    ],
)
def test_from_module_refuses_what_looks_alike(make, words):
    module = make()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=words) as caught:
        attnk.ChannelAttention.from_module(module)
    assert str(caught.value).startswith(f"{type(module).__name__} was not recognised as channel attention: ")
    assert_untouched(module, before)


# ECA.


class Eca(nn.Module):
    def __init__(self, kernel_size=3, bias=False, circular=False):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel_size, bias=bias)
        self.mode = "circular" if circular else "constant"

    def forward(self, x):
        side = self.conv.kernel_size[0] // 2
        pooled = F.pad(x.mean((2, 3)).unsqueeze(1), (side, side), mode=self.mode)
        return x * torch.sigmoid(self.conv(pooled)).view(*x.shape[:2], 1, 1)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("circular", [False, True])
def test_eca(kernel_size, bias, circular, backend, device):
    theirs = settle(Eca(kernel_size, bias, circular)).to(device)
    padding = "circular" if circular else "zeros"
    ours = attnk.ECA(7, kernel_size, bias=bias, padding=padding, backend=backend).double().to(device)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(ours, theirs, feature_map(2, 7, 3, 4).to(device))


@pytest.mark.parametrize(("channels", "kernel_size"), [(1, 3), (16, 3), (64, 3), (128, 5), (256, 5), (2048, 7)])
def test_eca_kernel_size(channels, kernel_size):
    near = int(abs(math.log(channels, 2) + 1) / 2)
    assert max(near if near % 2 else near + 1, 3) == kernel_size
    assert attnk.ECA(channels).conv.kernel_size == (kernel_size,)


# The modules as such.


def test_initialisation_draws_what_the_tutorials_draw():
    torch.manual_seed(3)
    theirs = nn.Sequential(Tutorial(), Ultralytics(), Eca(), nn.Linear(2, 2))
    torch.manual_seed(3)
    ours = nn.Sequential(attnk.SELayer(C, 4), attnk.EffectiveSE(C), attnk.ECA(C), nn.Linear(2, 2))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.flatten(), other.flatten())


@pytest.mark.parametrize(("channels", "count"), [(64, 580), (256, 8464), (512, 33312)])
def test_number_of_parameters(channels, count):
    for module in (attnk.SELayer(channels), attnk.ChannelAttention(channels)):
        assert sum(parameter.numel() for parameter in module.parameters()) == count


@pytest.mark.parametrize(
    ("channels", "ratio", "divisor", "hidden"),
    [
        (64, 16, None, 4),
        (8, 16, None, 1),
        (24, 16, None, 1),
        (24, 16, 1, 2),
        (64, 16, 8, 8),
        (240, 16, 8, 16),
        (200, 4, 8, 48),
        (72, 4, None, 18),
    ],
)
def test_width_of_the_hidden_layer(channels, ratio, divisor, hidden):
    assert attnk.ChannelAttention(channels, ratio, divisor=divisor).hidden_channels == hidden
    assert attnk.SELayer(channels, ratio, divisor=divisor)(torch.ones(1, channels, 2, 2)).shape == (1, channels, 2, 2)


@pytest.mark.parametrize("shape", [(4, 5, 6), (2, 4, 5, 6), (2, 4, 3, 5, 6), (1, 4, 1, 1), (0, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("output", ["gated", "residual", "map"])
@pytest.mark.parametrize("pool", ["avg", "half_sum"])
def test_shapes(shape, output, pool):
    module = settle(attnk.SELayer(4, 2, pool=pool, output=output))
    x = feature_map(*shape).requires_grad_()
    out = module(x)
    axis = 0 if len(shape) == 3 else 1
    rest = tuple(range(axis + 1, len(shape)))
    pooled = x.mean(rest) if pool == "avg" else (x.mean(rest) + x.amax(rest)) / 2
    gate = torch.sigmoid(module.fc(pooled)).view(*shape[: axis + 1], *[1] * len(rest))
    expected = {"map": gate, "gated": x * gate, "residual": x * gate + x}[output]
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("output", ["gated", "residual"])
@pytest.mark.parametrize("pool", ["avg", "avg_max"])
def test_memory_format_is_kept(output, pool):
    module = attnk.ChannelAttention(4, 2, pool=pool, output=output)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 5, 6).contiguous(memory_format=memory_format).requires_grad_()
        out = module(x)
        assert out.is_contiguous(memory_format=memory_format)
        out.backward(torch.ones_like(out))
        assert x.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "case",
    pairwise(
        pool=["avg", "max", "avg_max", "half_sum"],
        norm=[False, True],
        output=["gated", "map", "residual"],
        gate=["sigmoid", "hard_sigmoid"],
        activation=["relu", "silu", "hard_swish"],
        ties=["first", "even"],
        layout=[torch.contiguous_format, torch.channels_last],
    ),
)
def test_every_option_beside_every_other(case):
    layout = case.pop("layout")
    module = settle(attnk.ChannelAttention(5, 2, **case))
    theirs = copy.deepcopy(module)
    theirs.backend = "reference"
    x = feature_map(3, 5, 3, 4).contiguous(memory_format=layout)
    assert_same(module, theirs, x)
    assert_same(module.eval(), theirs.eval(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("output", ["gated", "map"])
@pytest.mark.parametrize("pool", ["avg", "avg_max"])
def test_half_precision(dtype, output, pool):
    wide = attnk.ChannelAttention(8, 2, pool=pool, output=output)
    narrow = copy.deepcopy(wide).to(dtype)
    x = torch.randn(2, 8, 9, 7).to(dtype)
    out = narrow(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wide(x.float()), rtol=3e-2, atol=3e-2)
    out.sum().backward()
    assert narrow.fc[0].weight.grad.dtype == dtype


@pytest.mark.parametrize("make", [attnk.SELayer, attnk.EffectiveSE, attnk.ECA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(make, dtype):
    module = make(8)
    x = torch.randn(2, 8, 9, 7).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), module(x.float()), rtol=3e-2, atol=3e-2)
    out.sum().backward()
    assert x.grad.dtype == dtype
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda backend: attnk.SELayer(4, backend=backend),
        lambda backend: attnk.ChannelAttention(4, 2, norm=True, pool="avg_max", ties="even", backend=backend),
        lambda backend: attnk.EffectiveSE(4, output="residual", backend=backend),
        lambda backend: attnk.ECA(4, padding="circular", backend=backend),
    ],
)
def test_copies(make, backend):
    module = settle(make(backend))
    x = feature_map(2, 4, 3, 3)
    module(x)  # what a kernel leaves behind must not get into the copy
    for other in copies(module):
        assert (repr(other), list(other.state_dict())) == (repr(module), list(module.state_dict()))
        assert_same(other, copy.deepcopy(module), x)
    again = make(backend).double()
    again.load_state_dict(module.state_dict())
    assert_same(again, copy.deepcopy(module), x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: attnk.SELayer(4, 2),
        lambda: attnk.ChannelAttention(4, 2, norm=True, pool="avg_max", output="residual"),
        lambda: attnk.ChannelAttention(4, 2, pool="half_sum", ties="even", output="map"),
        lambda: attnk.EffectiveSE(4),
        lambda: attnk.ECA(4, padding="circular"),
    ],
)
def test_compiles_to_one_graph(make, fresh_dynamo):
    module = settle(make())
    other = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = feature_map(3, 4, 5, 3)
    for got, expected in zip(outcome(compiled, x), outcome(other, x), strict=True):
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), other(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: attnk.SELayer(4, 2),
        lambda: attnk.ChannelAttention(4, 2, norm=True, pool="avg_max", output="residual"),
        lambda: attnk.ChannelAttention(4, 2, pool="half_sum", ties="even", output="map"),
        lambda: attnk.EffectiveSE(4),
        lambda: attnk.ECA(4, padding="circular"),
    ],
)
@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_symbolic_trace(make, implementation):
    module = settle(nn.Sequential(nn.Conv2d(3, 4, 1), make()))
    module[1].backend = implementation
    traced = torch.fx.symbolic_trace(module)
    assert "channel_pool" in traced.code
    for shape in ((2, 3, 5, 4), (3, 4, 6)):
        if len(shape) == 3:  # a single image has no batch statistics
            module.eval()
            traced.eval()
        x = feature_map(*shape).requires_grad_()
        outs = module(x), traced(x)  # which share their parameters
        torch.testing.assert_close(*outs)
        grads = (torch.autograd.grad(out.square().sum(), [x, *module.parameters()]) for out in outs)
        torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match="x must be"):
        torch.fx.symbolic_trace(make())(torch.ones(1, 5, 2, 2))


def test_backend_of_the_module(backend):
    x = feature_map(1, 4, 3, 3).requires_grad_()
    with attnk.use_backend("reference"):
        out = attnk.SELayer(4, backend=backend).double()(x)
    assert "Channel" in type(out.grad_fn).__name__
    with attnk.use_backend("reference"):
        twice = attnk.SELayer(4).double()(x)
    (grad,) = torch.autograd.grad(twice.sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: attnk.SELayer(0), "channel must be a positive integer, got 0"),
        (lambda: attnk.ChannelAttention(2.5), "in_channels must be a positive integer, got 2.5"),
        (lambda: attnk.SELayer(4, 0), "^reduction must be a positive number, got 0"),
        (lambda: attnk.ChannelAttention(4, math.inf), "reduction_ratio must be a positive number, got inf"),
        (lambda: attnk.ChannelAttention(4, "2"), "reduction_ratio must be a positive number, got '2'"),
        (lambda: attnk.ChannelAttention(4, True), "reduction_ratio must be a positive number, got True"),
        (
            lambda: attnk.SELayer(4, hidden_channels=-1),
            "hidden_channels must be a positive integer, or 0 for no hidden layer, got -1",
        ),
        (lambda: attnk.SELayer(4, hidden_channels=1.5), "got 1.5"),
        (lambda: attnk.SELayer(4, divisor=0), "divisor must be a positive integer, got 0"),
        (
            lambda: attnk.SELayer(4, hidden_channels=0, norm=True),
            "norm=True needs a hidden layer to follow, but hidden_channels is 0",
        ),
        (lambda: attnk.SELayer(4, pool="mean"), "pool must be one of 'avg', 'max', 'avg_max', 'half_sum', got 'mean'"),
        (
            lambda: attnk.SELayer(4, activation="gelu"),
            "activation must be one of 'relu', 'silu', 'hard_swish', got 'gelu'",
        ),
        (lambda: attnk.SELayer(4, gate="tanh"), "gate must be one of 'sigmoid', 'hard_sigmoid', got 'tanh'"),
        (lambda: attnk.SELayer(4, output="logit"), "output must be one of 'gated', 'map', 'residual', got 'logit'"),
        (lambda: attnk.SELayer(4, ties="last"), "ties must be one of 'first', 'even', got 'last'"),
        (lambda: attnk.SELayer(4, backend="cuda"), "backend must be one of .*, got 'cuda'"),
        (lambda: attnk.EffectiveSE(-1), "channels must be a positive integer, got -1"),
        (lambda: attnk.ECA(0), "channels must be a positive integer, got 0"),
        (lambda: attnk.ECA(4, 2), "kernel_size must be an odd positive integer or None, got 2"),
        (lambda: attnk.ECA(4, True), "kernel_size must be an odd positive integer or None, got True"),
        (lambda: attnk.ECA(4, gamma=0), "gamma must be a positive number, got 0"),
        (lambda: attnk.ECA(4, padding="same"), "padding must be one of 'zeros', 'circular', got 'same'"),
        (lambda: attnk.ECA(2, 7, padding="circular"), "must be at most channels = 2, got kernel_size=7"),
    ],
)
def test_refuses_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: attnk.EffectiveSE(64, hidden_channels=4), "EffectiveSE.* argument 'hidden_channels'"),
        (lambda: attnk.EffectiveSE(64, reduction=4), "EffectiveSE.* argument 'reduction'"),
        (lambda: attnk.SELayer(64, reduction_ratio=4), "SELayer.* argument 'reduction_ratio'"),
    ],
)
def test_options_of_another_class(make, words):
    with pytest.raises(TypeError, match=words):
        make()


def test_wrong_input_is_told():
    for module in (attnk.SELayer(4), attnk.ECA(4)):
        with pytest.raises(TypeError, match=r"x must have the dtype of the module, .*float32, got .*float64"):
            module(feature_map(1, 4, 2, 2))
        with pytest.raises(TypeError, match="x must be a tensor, got list"):
            module([1.0])
        words = r"x must be \(B, C, H, W\), \(C, H, W\) or \(B, C, D, H, W\) with C = 4, got "
        for shape in ((1, 5, 2, 2), (5, 4, 4), (4, 4), (1, 4, 1, 1, 1, 1)):
            with pytest.raises(ValueError, match=words):
                module(torch.ones(shape))
