"""attnk.SpatialAttention against the classes it stands in for, re-written here from what they compute."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnk
from attnk.modules.spatial import fold_batch_norm

# The families. Pools, convolution, sigmoid: they differ in names, order, bias, norm, ties and what they return.


def avg_max(x):
    return torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)


def max_avg(x):
    return torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)


class TutorialMap(nn.Module):
    """Returns the map: conv1, no bias."""

    def __init__(self, kernel_size=7):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return self.sigmoid(self.conv1(avg_max(x)))


class TutorialGated(nn.Module):
    """Returns the gated input: conv with bias, maximum first."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return x * self.sigmoid(self.conv(max_avg(x)))


class Ultralytics(nn.Module):
    def __init__(self, kernel_size=7):
        super().__init__()
        self.cv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.act = nn.Sigmoid()

    def forward(self, x):
        return x * self.act(self.cv1(avg_max(x)))


class ConvNorm(nn.Module):
    def __init__(self, kernel_size, **options):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(1, **options)

    def forward(self, x):
        return self.bn(self.conv(x))


class Timm(nn.Module):
    """amax, so that ties share the gradient; batch norm with PyTorch's momentum."""

    def __init__(self, kernel_size=7):
        super().__init__()
        self.conv = ConvNorm(kernel_size)
        self.gate = nn.Sigmoid()

    def forward(self, x):
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.gate(self.conv(pooled))


class Published(nn.Module):
    """CBAM's own: maximum first, batch norm with momentum 0.01."""

    def __init__(self):
        super().__init__()
        self.spatial = ConvNorm(7, eps=1e-5, momentum=0.01, affine=True)

    def forward(self, x):
        return x * torch.sigmoid(self.spatial(max_avg(x)))


class ExternalAttention(nn.Module):
    def __init__(self, kernel_size=7):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=kernel_size, padding=kernel_size // 2)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return self.sigmoid(self.conv(max_avg(x)))


class Changzy(nn.Module):
    def __init__(self, kernel_size=7):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=(kernel_size - 1) // 2, bias=False)

    def forward(self, x):
        return torch.sigmoid(self.conv(avg_max(x)))


class Residual(nn.Module):
    def __init__(self, kernel_size=3):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)

    def forward(self, x):
        return x * torch.sigmoid(self.conv(avg_max(x))) + x


FAMILIES = {
    TutorialMap: {},
    TutorialGated: {"bias": True, "order": "max_avg", "output": "gated"},
    Ultralytics: {"output": "gated"},
    Timm: {"output": "gated", "norm": True, "ties": "even"},
    Published: {"order": "max_avg", "output": "gated", "norm": True},
    ExternalAttention: {"bias": True, "order": "max_avg"},
    Changzy: {},
    Residual: {"kernel_size": 3, "bias": True, "output": "residual"},
}
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
normed = pytest.mark.parametrize("family", [Timm, Published], ids=lambda family: family.__name__)


def build(family, dtype=torch.float64):
    """A module of a family as training might leave it."""
    module = family().to(dtype)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            with torch.no_grad():
                part.weight.fill_(1.7)
                part.bias.fill_(-0.3)
            part.running_mean.fill_(0.2)
            part.running_var.fill_(0.6)
    return module


def feature_map(*shape, dtype=torch.float64):
    """Numbers as a ReLU leaves them: zeros, and maxima that several channels attain."""
    return torch.randint(-3, 4, shape or (3, 6, 9, 8)).relu().to(dtype) / 2


def outcome(module, x):
    """Output, gradients of x and of all parameters in order, buffers in order."""
    x = x.detach().clone().requires_grad_()
    out = module(x)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    grads = torch.autograd.grad(out, [x, *module.parameters()], dout)
    return [out.detach(), *grads, *(buffer.clone() for buffer in module.buffers())]


def assert_same(module, other, x=None, **tolerances):
    tolerances = tolerances or {"rtol": 1e-9, "atol": 1e-11}
    x = feature_map() if x is None else x
    for got, expected in zip(outcome(module, x), outcome(other, x), strict=True):
        torch.testing.assert_close(got, expected, **tolerances)


def load(family, theirs, **options):
    ours = attnk.SpatialAttention(**{**FAMILIES[family], **options}).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    if family is Timm:
        ours.bn.momentum = 0.1  # no checkpoint says so
    return ours


@families
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_equals_after_loading_their_weights(family, training, implementation):
    theirs = build(family).train(training)
    ours = load(family, theirs, backend=implementation).train(training)
    for _ in range(2):  # the second time with running statistics of the first
        assert_same(ours, theirs)


@families
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals_after_from_module(family, training):
    theirs = build(family).train(training)
    ours = attnk.SpatialAttention.from_module(theirs)
    assert ours.training is training
    assert all(part.training is training for part in ours.modules())
    assert repr(ours) == repr(load(family, theirs))
    for _ in range(2):
        assert_same(ours, theirs)


@families
def test_equals_with_kernels(family, backend, device):
    theirs = build(family).to(device)
    ours = load(family, theirs, backend=backend).to(device)
    x = feature_map(1, 5, 4, 6).to(device)
    assert_same(ours, theirs, x)
    assert_same(ours.eval(), theirs.eval(), x)


@families
def test_equals_on_noise_in_float32(family):
    theirs = build(family, torch.float32)
    ours = attnk.SpatialAttention.from_module(theirs)
    x = torch.randn(4, 16, 20, 12)
    assert_same(ours, theirs, x, rtol=1e-4, atol=2e-5)


@families
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_trains_alike(family, mode):
    theirs = build(family).train(mode == "train")
    ours = attnk.SpatialAttention.from_module(theirs)
    before = copy.deepcopy(ours.state_dict())
    inputs = [torch.randn(2, 3, 5, 5, dtype=torch.float64) for _ in range(3)]
    for module in (ours, theirs):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for x in inputs:
            optimizer.zero_grad()
            (module(x) ** 2).mean().backward()
            optimizer.step()
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)
        assert not torch.equal(mine, before[name]) or (name.startswith("bn.") and mode == "eval")


# Checkpoints.


class Parent(nn.Module):
    """Something with one in it, under a name that two families use inside themselves."""

    def __init__(self, attention):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.stages = nn.ModuleList([nn.Sequential(attention), nn.ModuleDict({"spatial": copy.deepcopy(attention)})])

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.stages[1]["spatial"](x * self.stages[0](x))


@families
def test_loads_nested(family):
    theirs = Parent(build(family)).double()
    ours = Parent(attnk.SpatialAttention(**FAMILIES[family])).double()
    checkpoint = theirs.state_dict()
    names = list(checkpoint)
    assert ours.load_state_dict(checkpoint, strict=True).missing_keys == []
    assert list(checkpoint) == names
    x = feature_map(2, 3, 5, 6)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    ("family", "prefix"), [(Timm, "spatial."), (Published, "SpatialGate.")], ids=lambda value: str(value)[-12:]
)
def test_loads_the_spatial_half_of_a_cbam(family, prefix):
    theirs = build(family).eval()
    ours = attnk.SpatialAttention(**FAMILIES[family]).double().eval()
    ours.load_state_dict({prefix + name: tensor for name, tensor in theirs.state_dict().items()}, strict=True)
    assert_same(ours, theirs)


def test_loads_a_published_checkpoint_without_batch_counts():
    theirs = build(Published).eval()
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    ours = attnk.SpatialAttention(**FAMILIES[Published]).double().eval()
    ours.load_state_dict(state, strict=True)
    x = feature_map()
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.bn.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("family", "key"),
    [
        (Published, "spatial.conv.weight"),
        (Timm, "conv.conv.weight"),
        (Ultralytics, "cv1.weight"),
    ],
    ids=["Published", "Timm", "Ultralytics"],
)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("prefix", ["", "stages.0.0."])
def test_refuses_weights_of_the_other_order(family, key, strict, prefix):
    options = dict(FAMILIES[family])
    right = options.pop("order", "avg_max")
    wrong = {"avg_max": "max_avg", "max_avg": "avg_max"}[right]
    ours = attnk.SpatialAttention(order=wrong, **options)
    state = build(family, torch.float32).state_dict()
    if prefix:
        ours = Parent(ours)
        state = {prefix + name: tensor for name, tensor in state.items()}
    with pytest.raises(RuntimeError) as caught:
        ours.load_state_dict(state, strict=strict)
    message = str(caught.value)
    assert f"{prefix}{key} belongs to a module with order={right!r}, this one has {wrong!r}" in message
    assert f"build SpatialAttention(order={right!r}) or use SpatialAttention.from_module" in message


@pytest.mark.parametrize(
    ("options", "state", "words"),
    [
        ({}, TutorialGated, "conv1.bias"),
        ({"bias": True}, TutorialMap, "conv1.bias"),
        ({"norm": True}, TutorialMap, "bn.weight"),
        ({"order": "max_avg"}, Published, "spatial.bn.weight"),
        ({"kernel_size": 3}, TutorialMap, "size mismatch for conv1.weight"),
    ],
    ids=["a bias too many", "a bias too few", "no norm", "a norm too many", "another size"],
)
def test_strict_loading_misses_nothing(options, state, words):
    with pytest.raises(RuntimeError, match=words):
        attnk.SpatialAttention(**options).load_state_dict(build(state, torch.float32).state_dict())


def test_refuses_two_convolutions_in_one_checkpoint():
    state = {"conv1.weight": torch.zeros(1, 2, 7, 7), "conv.weight": torch.ones(1, 2, 7, 7)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*\"conv.weight\""):
        attnk.SpatialAttention().load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_saves_under_its_own_names(assign):
    plain = attnk.SpatialAttention()
    assert list(plain.state_dict()) == ["conv1.weight"]
    full = attnk.SpatialAttention(bias=True, norm=True)
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(full.state_dict()) == ["conv1.weight", "conv1.bias", *(f"bn.{name}" for name in names)]
    theirs = build(Published, torch.float32)
    full = attnk.SpatialAttention.from_module(theirs)
    again = attnk.SpatialAttention(order="max_avg", output="gated", norm=True)
    again.load_state_dict(full.state_dict(), assign=assign)
    assert_same(copy.deepcopy(again), copy.deepcopy(full), feature_map(dtype=torch.float32))
    loaded = attnk.SpatialAttention(order="max_avg", output="gated", norm=True)
    loaded.load_state_dict(theirs.state_dict(), assign=assign)
    assert list(loaded.state_dict()) == list(full.state_dict())


def copies(module):
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("options", [{}, {"output": "residual", "bias": True, "norm": True, "ties": "even"}])
def test_copies(options, backend):
    module = attnk.SpatialAttention(3, backend=backend, **options).double()
    x = feature_map(1, 4, 4, 5)
    module(x)  # what a kernel leaves behind must not get into the copy
    for other in copies(module):
        assert other is not module
        assert (repr(other), list(other.state_dict())) == (repr(module), list(module.state_dict()))
        assert other.conv1.weight.data_ptr() != module.conv1.weight.data_ptr()
        assert_same(other, copy.deepcopy(module), x)


# from_module.


@families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_from_module_copies_all_and_shares_nothing(family, dtype):
    theirs = build(family, dtype).eval()
    parameters = list(theirs.parameters())
    parameters[0].requires_grad_(False)
    parameters[-1].grad = torch.ones_like(parameters[-1])
    before = copy.deepcopy(theirs.state_dict())
    ours = attnk.SpatialAttention.from_module(theirs)

    assert not theirs.training
    assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * (len(parameters) - 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in theirs.state_dict().items())
    assert parameters[-1].grad.eq(1).all()

    assert not ours.training
    assert [parameter.requires_grad for parameter in ours.parameters()] == [p.requires_grad for p in parameters]
    shared = {tensor.data_ptr() for tensor in theirs.state_dict().values()}
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert (mine.dtype, mine.device) == (other.dtype, other.device)
        assert torch.equal(mine, other)
        assert mine.data_ptr() not in shared


def test_from_module_draws_no_random_numbers():
    theirs = TutorialMap()
    state = torch.get_rng_state()
    attnk.SpatialAttention.from_module(theirs)
    assert torch.equal(torch.get_rng_state(), state)


@normed
def test_from_module_copies_the_norm(family):
    theirs = build(family)
    norm = next(part for part in theirs.modules() if isinstance(part, nn.BatchNorm2d))
    norm.eps, norm.momentum = 0.5, None
    ours = attnk.SpatialAttention.from_module(theirs)
    assert (ours.bn.eps, ours.bn.momentum) == (0.5, None)
    assert_same(ours, theirs)
    assert_same(ours.eval(), theirs.eval())


@normed
def test_from_module_keeps_a_frozen_norm(family):
    theirs = build(family)
    next(part for part in theirs.modules() if isinstance(part, nn.BatchNorm2d)).eval()
    ours = attnk.SpatialAttention.from_module(theirs)
    assert (ours.training, ours.bn.training) == (True, False)
    assert_same(ours, theirs)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}], ids=str)
def test_from_module_with_another_norm(options):
    theirs = Published().double()
    theirs.spatial.bn = nn.BatchNorm2d(1, **options).double()
    ours = attnk.SpatialAttention.from_module(theirs)
    assert_same(ours, theirs)
    assert_same(ours.eval(), theirs.eval())


def test_from_module_of_its_own():
    module = attnk.SpatialAttention(5, ties="even", backend="torch", norm=True).eval()
    other = attnk.SpatialAttention.from_module(module)
    assert repr(other) == repr(module)
    assert not other.training
    assert other.conv1.weight.data_ptr() != module.conv1.weight.data_ptr()


def test_from_module_finds_other_names():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = nn.Sequential(nn.Identity(), nn.Conv2d(2, 1, 5, padding=2))

        def forward(self, x):
            return x + torch.sigmoid(self.deep(max_avg(x))) * x

    theirs = Mine().double()
    ours = attnk.SpatialAttention.from_module(theirs)
    assert (ours.kernel_size, ours.order, ours.output) == (5, "max_avg", "residual")
    assert_same(ours, theirs)


class LookAlike(nn.Module):
    def __init__(self, kernel_size=7, *, gate=torch.sigmoid, pool=avg_max, channels=2, norm=None, **options):
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, kernel_size, **{"padding": 3, "bias": False, **options})
        self.norm = norm or nn.Identity()
        self.gate, self.pool = gate, pool

    def forward(self, x):
        return self.gate(self.norm(self.conv(self.pool(x))))


class ExtraParameter(TutorialMap):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.gamma * super().forward(x)


class SigmoidFirst(TutorialMap):
    def forward(self, x):
        return self.conv1(torch.sigmoid(avg_max(x)))


class NormFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        return torch.sigmoid(self.conv(self.bn(avg_max(x))))


class Particular(TutorialMap):
    def forward(self, x):
        assert x.shape[1] == 64, "made for 64 channels"
        return super().forward(x)


class TwoConvolutions(TutorialMap):
    def __init__(self):
        super().__init__()
        self.conv2 = nn.Conv2d(1, 1, 1)


def weight_normed():
    module = TutorialMap()
    nn.utils.parametrizations.weight_norm(module.conv1)
    return module


COMPUTES = "no order, output and tie policy of attnk.SpatialAttention gives its values and gradients"
FAILS = "it failed on a 5-channel map"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LookAlike(gate=F.hardsigmoid), COMPUTES),
        (lambda: LookAlike(gate=lambda logit: 2 * torch.sigmoid(logit)), COMPUTES),
        (lambda: LookAlike(gate=torch.tanh), COMPUTES),
        (lambda: LookAlike(padding=1), COMPUTES),
        (lambda: LookAlike(padding_mode="reflect"), COMPUTES),
        (lambda: LookAlike(padding_mode="circular"), COMPUTES),
        (lambda: LookAlike(3, padding=2, dilation=2), COMPUTES),
        (lambda: LookAlike(stride=2), COMPUTES),
        (lambda: LookAlike(pool=lambda x: torch.cat([x.mean(1, True), x.amin(1, True)], 1)), COMPUTES),
        (lambda: LookAlike(pool=lambda x: avg_max(x.relu())), COMPUTES),
        (lambda: LookAlike(pool=lambda x: avg_max(x.detach())), FAILS),
        (SigmoidFirst, COMPUTES),
        (lambda: LookAlike(norm=nn.Dropout(0.5)), COMPUTES),
        (NormFirst, "not recognised"),
        (Particular, "not recognised"),
        (weight_normed, "not recognised"),
        (lambda: LookAlike(pool=lambda x: x), FAILS),
        (lambda: LookAlike(gate=lambda logit: (logit,)), FAILS),
        (ExtraParameter, r"unknown keys \['gamma'\]"),
        (lambda: LookAlike(norm=nn.GroupNorm(1, 1)), r"unknown keys \['norm.weight', 'norm.bias'\]"),
        (lambda: nn.Linear(2, 1), "it has 0 convolutions and 0 batch norms"),
        (TwoConvolutions, "it has 2 convolutions and 0 batch norms"),
        (lambda: nn.Sequential(Published(), nn.BatchNorm2d(6)), "it has 1 convolutions and 2 batch norms"),
        (lambda: LookAlike(4, padding=2), r"conv.weight must be \(1, 2, k, k\) with k odd, got \(1, 2, 4, 4\)"),
        (lambda: LookAlike((3, 5), padding=(1, 2)), r"with k odd, got \(1, 2, 3, 5\)"),
        (lambda: LookAlike(channels=1, pool=lambda x: x.mean(1, True)), r"with k odd, got \(1, 1, 7, 7\)"),
        (lambda: nn.Conv2d(2, 1, 7), "unknown keys"),
    ],
)
def test_from_module_refuses_what_looks_alike(make, words):
    module = make()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=words) as caught:
        attnk.SpatialAttention.from_module(module)
    assert str(caught.value).startswith(f"{type(module).__name__} was not recognised as spatial attention: ")
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.gpu
@families
def test_from_module_on_a_gpu(family):
    theirs = build(family, torch.float32).cuda()
    ours = attnk.SpatialAttention.from_module(theirs)
    assert {tensor.device for tensor in ours.state_dict().values()} == {next(theirs.parameters()).device}
    assert_same(ours, theirs, torch.randn(2, 32, 28, 28, device="cuda"), rtol=1e-3, atol=1e-4)


# The module as such.


def test_initialisation_draws_what_the_tutorials_draw():
    torch.manual_seed(3)
    theirs = nn.Sequential(TutorialMap(), TutorialGated(), Published(), nn.Linear(2, 2))
    torch.manual_seed(3)
    ours = nn.Sequential(
        *(attnk.SpatialAttention(**FAMILIES[family]) for family in (TutorialMap, TutorialGated, Published)),
        nn.Linear(2, 2),
    )
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel_size": 4}, "kernel_size must be an odd positive integer, got 4"),
        ({"kernel_size": 0}, "kernel_size must be an odd positive integer, got 0"),
        ({"kernel_size": -3}, "got -3"),
        ({"kernel_size": "7"}, "kernel_size must be an odd positive integer, got '7'"),
        ({"kernel_size": True}, "kernel_size must be an odd positive integer, got True"),
        ({"kernel_size": 7.0}, "got 7.0"),
        ({"kernel_size": (7, 7)}, r"got \(7, 7\)"),
        ({"kernel_size": None}, "got None"),
        ({"order": "max"}, "order must be one of 'avg_max', 'max_avg', got 'max'"),
        ({"output": "logit"}, "output must be one of 'map', 'gated', 'residual', got 'logit'"),
        ({"output": None}, "output must be one of .*, got None"),
        ({"ties": "last"}, "ties must be one of 'first', 'even', got 'last'"),
        ({"backend": "cuda"}, "backend must be one of 'auto', 'triton', 'torch', 'reference', got 'cuda'"),
    ],
    ids=str,
)
def test_refuses_at_construction(options, words):
    with pytest.raises(ValueError, match=words):
        attnk.SpatialAttention(**options)


def test_options_are_named():
    with pytest.raises(TypeError):
        attnk.SpatialAttention(7, True)
    text = repr(attnk.SpatialAttention(5, order="max_avg", output="gated", ties="even", backend="torch"))
    for words in ("order='max_avg'", "output='gated'", "ties='even'", "backend='torch'", "kernel_size=(5, 5)"):
        assert words in text
    assert "backend" not in repr(attnk.SpatialAttention())


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 9, 13, 49])
@pytest.mark.parametrize("norm", [False, True])
def test_any_odd_kernel_size(kernel_size, norm):
    module = attnk.SpatialAttention(kernel_size, norm=norm).double()
    theirs = TutorialMap(kernel_size).double()
    theirs.load_state_dict({"conv1.weight": module.conv1.weight.detach()})
    if norm:
        theirs.conv1 = nn.Sequential(theirs.conv1, copy.deepcopy(module.bn))
    assert_same(module, theirs)


@pytest.mark.parametrize("output", ["map", "gated", "residual"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_one_image(output, norm, training):
    module = attnk.SpatialAttention(3, output=output, norm=norm, bias=True).double().train(training)
    x = feature_map(4, 5, 6)
    other = copy.deepcopy(module)
    single, batch = outcome(module, x), outcome(other, x[None])
    assert single[0].shape == ((1, 5, 6) if output == "map" else (4, 5, 6))
    assert torch.equal(single[0], batch[0][0])
    for one, many in zip(single[1:], batch[1:], strict=True):
        torch.testing.assert_close(one, many.view(one.shape))


@pytest.mark.parametrize("output", ["map", "gated", "residual"])
def test_norm_in_evaluation_is_one_convolution(output):
    module = build(lambda: attnk.SpatialAttention(3, output=output, norm=True, bias=True))
    x = feature_map()
    module.eval()
    weight, bias = fold_batch_norm(module.conv1.weight, module.conv1.bias, module.bn)
    torch.testing.assert_close(module(x), attnk.spatial_gate(x, weight, bias, output=output))
    before = copy.deepcopy(module.state_dict())
    module(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    module.train()
    assert not torch.allclose(module(x), attnk.spatial_gate(x, weight, bias, output=output))
    assert not torch.equal(module.bn.running_mean, before["bn.running_mean"])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (3, 5, 4)], ids=["batch", "image"])
def test_what_is_done_with_the_map(training, shape):
    mapping = build(lambda: attnk.SpatialAttention(3, norm=True, bias=True)).train(training)
    x = feature_map(*shape)
    gate = copy.deepcopy(mapping)(x)
    for output, expected in (("gated", x * gate), ("residual", x * gate + x)):
        module = copy.deepcopy(mapping)
        module.output = output
        torch.testing.assert_close(module(x), expected)


def test_norm_folds_without_bias_and_affine():
    norm = nn.BatchNorm2d(1, affine=False).double()
    norm.running_mean.fill_(0.5)
    norm.running_var.fill_(4.0)
    weight, bias = fold_batch_norm(torch.ones(1, 2, 1, 1, dtype=torch.float64), None, norm)
    torch.testing.assert_close(weight, torch.full_like(weight, 0.5), rtol=1e-5, atol=0)
    torch.testing.assert_close(bias, torch.full_like(bias, -0.25), rtol=1e-5, atol=0)


def test_synchronised_norm_in_evaluation():
    module = build(lambda: attnk.SpatialAttention(norm=True, output="gated")).eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module)).eval()
    assert isinstance(converted.bn, nn.SyncBatchNorm)
    assert list(converted.state_dict()) == list(module.state_dict())
    assert_same(converted, module)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("output", ["map", "gated"])
def test_half_precision(dtype, norm, training, output):
    wide = attnk.SpatialAttention(norm=norm, output=output).train(training)
    narrow = copy.deepcopy(wide).to(dtype)
    x = torch.randn(2, 8, 9, 7).to(dtype)
    out = narrow(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wide(x.float()), rtol=3e-2, atol=3e-2)
    out.sum().backward()
    assert narrow.conv1.weight.grad.dtype == dtype
    assert narrow.conv1.weight.grad.isfinite().all()


@pytest.mark.parametrize("output", ["gated", "residual"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_memory_format_is_kept(output, norm, training):
    module = attnk.SpatialAttention(3, output=output, norm=norm).train(training)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 5, 6).contiguous(memory_format=memory_format).requires_grad_()
        out = module(x)
        assert out.is_contiguous(memory_format=memory_format)
        out.backward(torch.ones_like(out))
        assert x.grad.is_contiguous(memory_format=memory_format)
    other = copy.deepcopy(module).to(memory_format=torch.channels_last).eval()
    assert_same(other, module.eval(), torch.randn(2, 4, 5, 6), rtol=1e-4, atol=1e-5)


def test_wrong_input_is_told():
    module = attnk.SpatialAttention()
    with pytest.raises(TypeError, match=r"weight must have the dtype of x, .*float64, got .*float32"):
        module(feature_map())
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) or \(C, H, W\), got 2 dimensions"):
        module(torch.ones(3, 4))


def test_backend_of_the_module(backend):
    x = feature_map(1, 3, 4, 4)
    with attnk.use_backend("reference"):
        out = attnk.SpatialAttention(3, backend=backend).double()(x.requires_grad_())
    assert type(out.grad_fn).__name__ == "SpatialGateFunctionBackward"
    with pytest.raises(attnk.Unsupported, match=r"kernel size up to 15, got 17|need a GPU"):
        attnk.SpatialAttention(17, backend="triton").double()(x)


@pytest.mark.parametrize(
    ("options", "training"),
    [
        ({}, True),
        ({"output": "gated", "bias": True}, True),
        ({"output": "residual", "ties": "even", "order": "max_avg"}, True),
        ({"output": "gated", "norm": True}, True),
        ({"output": "gated", "norm": True}, False),
        ({"norm": True}, True),
    ],
    ids=str,
)
def test_compiles_to_one_graph(options, training):
    torch._dynamo.reset()
    module = attnk.SpatialAttention(3, **options).double().train(training)
    other = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = feature_map()
    for got, expected in zip(outcome(compiled, x), outcome(other, x), strict=True):
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), other(x))
    torch._dynamo.reset()


def test_optimizer_step_with_a_scaler():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), attnk.SpatialAttention(output="gated", norm=True), nn.Conv2d(4, 1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.randn(2, 3, 12, 12)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 1024.0
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
        assert not torch.equal(tensor, before[name]), name
    assert model[1].conv1.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("norm", [False, True])
def test_autocast(norm):
    module = attnk.SpatialAttention(norm=norm).train()
    for output, dtype in (("map", torch.bfloat16), ("gated", torch.float32)):
        module.output = output
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(torch.randn(2, 3, 8, 8)).dtype == dtype


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    module = attnk.SpatialAttention(output="gated", bias=True)
    inputs = [torch.linspace(-2, 2, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8).requires_grad_() for _ in range(2)]
    outs = [module(inputs[0]), checkpoint(module, inputs[1], use_reentrant=use_reentrant)]
    grads = []
    for x, out in zip(inputs, outs, strict=True):
        module.zero_grad()
        out.square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    assert torch.equal(*outs)
    assert all(torch.equal(plain, again) for plain, again in zip(*grads, strict=True))


WORKER = """
import os, sys, torch, attnk
from torch import nn
from torch.nn.parallel import DistributedDataParallel

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
torch.manual_seed(rank)  # DDP sends the weights of rank 0
model = nn.Sequential(nn.Conv2d(3, 4, 3), attnk.SpatialAttention(output="gated", bias=True), nn.Conv2d(4, 1, 1))
model = DistributedDataParallel(model.double())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.linspace(-1, 1, 4 * 3 * 8 * 8, dtype=torch.float64).sin().view(4, 3, 8, 8).chunk(size)[rank]
for _ in range(2):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
torch.save([parameter.detach() for parameter in model.parameters()], f"{folder}/{size}-{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_two_processes_equal_one(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(size), str(tmp_path)], stderr=subprocess.PIPE)
        for size in (1, 2)
        for rank in range(size)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in processes:
            process.kill()
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for one, two, three in zip(alone, first, second, strict=True):
        assert torch.equal(two, three)
        torch.testing.assert_close(one, two)


def test_lives_in_a_sequential():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), attnk.SpatialAttention(output="gated"), nn.Conv2d(8, 2, 1))
    assert model(torch.randn(1, 3, 9, 9)).shape == (1, 2, 7, 7)
    seen = []
    model[2].register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    model(torch.randn(1, 3, 9, 9)).sum().backward()
    assert seen == [(1, 8, 7, 7)]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_batch_norm_fused_away():
    module = attnk.SpatialAttention(3, norm=True).eval()
    module.bn = torch.nn.Identity()
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(module(x), attnk.spatial_gate(x, module.conv1.weight, output="map"))


def test_symbolic_trace():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), attnk.SpatialAttention(3, output="gated"))
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(torch.fx.symbolic_trace(network)(x), network(x))


def test_from_module_leaves_foreign_classes_behind():
    class BatchNormAct(torch.nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x)

    theirs = Timm()
    theirs.conv.bn = BatchNormAct(1, eps=1e-3, momentum=0.2)
    theirs.conv.bn.weight.requires_grad_(False)
    ours = attnk.SpatialAttention.from_module(theirs.half())
    assert type(ours.bn) is torch.nn.BatchNorm2d
    assert (ours.bn.eps, ours.bn.momentum, ours.bn.weight.dtype) == (1e-3, 0.2, torch.float16)
    assert not ours.bn.weight.requires_grad
