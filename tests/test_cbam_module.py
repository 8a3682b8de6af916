"""attnk.CBAM against the classes it stands in for, re-written here from what they compute."""

import copy

import pytest
import torch
import torch.nn.functional as F
from gate_modules import assert_same, assert_untouched, copies, feature_map, outcome, settle
from helpers import pairwise
from torch import nn

import attnk

C, K = 12, 3
SHAPE = (3, C, 5, 6)


def avg(x):
    return x.mean((2, 3), keepdim=True)


def amax(x):
    return x.amax((2, 3), keepdim=True)


def first_max(x):
    return F.adaptive_max_pool2d(x, 1)


def avg_max(x):
    return torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)


def max_avg(x):
    return avg_max(x).flip(1)


def avg_amax(x):
    return torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)


class Holder(nn.Module):
    """Nothing but named children."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def conv(channels=2, out=1, kernel_size=K, bias=True):
    return nn.Conv2d(channels, out, kernel_size, padding=kernel_size // 2, bias=bias)


class Tutorial(nn.Module):
    def __init__(self):
        super().__init__()
        self.channel_attention = Holder(fc=nn.Sequential(nn.Linear(C, 3), nn.ReLU(), nn.Linear(3, C)))
        self.spatial_attention = Holder(conv=conv())

    def forward(self, x):
        y = self.channel_attention.fc(x.mean((2, 3)))
        x = x * torch.sigmoid(y)[:, :, None, None]
        return x * torch.sigmoid(self.spatial_attention.conv(max_avg(x)))


class Ultralytics(nn.Module):
    def __init__(self):
        super().__init__()
        self.channel_attention = Holder(fc=nn.Conv2d(C, C, 1))
        self.spatial_attention = Holder(cv1=conv(bias=False))

    def forward(self, x):
        x = x * torch.sigmoid(self.channel_attention.fc(avg(x)))
        return x * torch.sigmoid(self.spatial_attention.cv1(avg_max(x)))


class Timm(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.channel = Holder(fc1=nn.Conv2d(C, 3, 1, bias=bias), fc2=nn.Conv2d(3, C, 1, bias=bias))
        self.spatial = Holder(conv=Holder(conv=conv(bias=False), bn=nn.BatchNorm2d(1)))

    def forward(self, x):
        c, s = self.channel, self.spatial.conv
        logit = c.fc2(F.relu(c.fc1(avg(x)))) + c.fc2(F.relu(c.fc1(amax(x))))
        x = x * torch.sigmoid(logit)
        return x * torch.sigmoid(s.bn(s.conv(avg_amax(x))))


class Published(nn.Module):
    def __init__(self):
        super().__init__()
        self.ChannelGate = Holder(mlp=nn.Sequential(nn.Flatten(), nn.Linear(C, 3), nn.ReLU(), nn.Linear(3, C)))
        norm = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)
        self.SpatialGate = Holder(spatial=Holder(conv=conv(bias=False), bn=norm))

    def forward(self, x):
        mlp, s = self.ChannelGate.mlp, self.SpatialGate.spatial
        size = x.shape[2:]
        logit = mlp(F.avg_pool2d(x, size, stride=size)) + mlp(F.max_pool2d(x, size, stride=size))
        x = x * torch.sigmoid(logit)[:, :, None, None]
        return x * torch.sigmoid(s.bn(s.conv(max_avg(x))))


class External(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(C, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, C, 1, bias=False)
        self.ca, self.sa = Holder(se=nn.Sequential(*layers)), Holder(conv=conv())

    def forward(self, x):
        out = x * torch.sigmoid(self.ca.se(first_max(x)) + self.ca.se(avg(x)))
        return out * torch.sigmoid(self.sa.conv(max_avg(out))) + x


class Changzy(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(C, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, C, 1, bias=False)
        self.ca, self.sa = Holder(fc=nn.Sequential(*layers)), Holder(conv=conv(bias=False))

    def forward(self, x):
        out = x * torch.sigmoid(self.ca.fc(avg(x)) + self.ca.fc(first_max(x)))
        return out * torch.sigmoid(self.sa.conv(avg_max(out)))


FAMILIES = {
    Tutorial: {},
    Ultralytics: {"hidden_channels": 0, "order": "avg_max", "spatial_bias": False},
    Timm: {
        "pool": "avg_max",
        "order": "avg_max",
        "bias": False,
        "spatial_bias": False,
        "norm": True,
        "ties": "even",
    },
    Published: {"pool": "avg_max", "spatial_bias": False, "norm": True},
    External: {"pool": "avg_max", "bias": False, "output": "residual"},
    Changzy: {"pool": "avg_max", "order": "avg_max", "bias": False, "spatial_bias": False},
}
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)


def build(family, dtype=torch.float64):
    return settle(family(), dtype)


def load(family, theirs, **options):
    ours = attnk.CBAM(C, 4, K, **{**FAMILIES[family], **options}).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    if family is Timm:
        ours.spatial_attention.bn.momentum = 0.1  # no checkpoint says so
    return ours


@families
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_equals_after_loading_their_weights(family, training, implementation):
    theirs = build(family).train(training)
    ours = load(family, theirs, backend=implementation).train(training)
    for _ in range(2):  # the second time with running statistics of the first
        assert_same(ours, theirs, feature_map(*SHAPE))


@families
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals_after_from_module(family, training):
    theirs = build(family).train(training)
    ours = attnk.CBAM.from_module(theirs)
    assert all(part.training is training for part in ours.modules())
    assert repr(ours) == repr(load(family, theirs))
    for _ in range(2):
        assert_same(ours, theirs, feature_map(*SHAPE))


@families
def test_equals_with_kernels(family, backend, device):
    theirs = build(family).to(device)
    ours = load(family, theirs, backend=backend).to(device)
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
    ours = attnk.CBAM.from_module(theirs)
    assert torch.equal(torch.get_rng_state(), state)
    assert_untouched(theirs, before)
    assert (theirs.training, ours.training) == (False, False)
    assert [parameter.requires_grad for parameter in ours.parameters()] == [p.requires_grad for p in parameters]
    shared = {tensor.data_ptr() for tensor in theirs.state_dict().values()}
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine.flatten(), other.flatten())
        assert mine.data_ptr() not in shared


def test_from_module_with_other_widths_and_a_frozen_norm():
    theirs = settle(Timm(bias=True))
    theirs.spatial.conv.bn.eval()
    theirs.spatial.conv.bn.momentum = None
    ours = attnk.CBAM.from_module(theirs)
    assert (ours.training, ours.spatial_attention.bn.training) == (True, False)
    assert ours.spatial_attention.bn.momentum is None
    assert_same(ours, theirs, feature_map(*SHAPE))
    module = attnk.CBAM(2, 2, 1, norm=True, activation="silu", gate="hard_sigmoid", pool="half_sum").double()
    assert repr(attnk.CBAM.from_module(module)) == repr(module)


@families
def test_trains_alike(family):
    theirs = build(family)
    ours = attnk.CBAM.from_module(theirs)
    inputs = [torch.randn(3, C, 4, 4, dtype=torch.float64) for _ in range(2)]
    for module in (ours, theirs):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for x in inputs:
            optimizer.zero_grad()
            (module(x) ** 2).mean().backward()
            optimizer.step()
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine.flatten(), other.flatten(), rtol=1e-7, atol=1e-9)


def test_nested_checkpoint():
    theirs = nn.Sequential(*(build(family) for family in FAMILIES)).double()
    ours = nn.Sequential(*(load(family, build(family)) for family in FAMILIES))
    checkpoint = theirs.state_dict()
    names = list(checkpoint)
    ours.load_state_dict(checkpoint, strict=True)
    assert list(checkpoint) == names
    x = feature_map(*SHAPE)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_saves_the_tutorials_keys():
    state = attnk.CBAM(C, 4).state_dict()
    names = [f"channel_attention.fc.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")]
    assert list(state) == [*names, "spatial_attention.conv.weight", "spatial_attention.conv.bias"]
    assert state["spatial_attention.conv.weight"].shape == (1, 2, 7, 7)
    normed = attnk.CBAM(C, 4, norm=True)
    again = attnk.CBAM(C, 4, norm=True)
    again.load_state_dict(normed.state_dict())
    assert "spatial_attention.bn.running_mean" in normed.state_dict()


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        (
            Published, {"order": "avg_max"},
            r"SpatialGate.spatial.conv.weight belongs to a module with order='max_avg', this one has order='avg_max': "
            r"build CBAM\(order='max_avg'\) or use CBAM.from_module",
        ),
        (
            Timm, {"order": "max_avg", "pool": "avg"},
            r"spatial.conv.conv.weight belongs to a module with pool='avg_max', order='avg_max', this one has "
            r"pool='avg', order='max_avg': build CBAM\(pool='avg_max', order='avg_max'\)",
        ),
        (Published, {"pool": "avg"}, "SpatialGate.spatial.conv.weight belongs to a module with pool='avg_max'"),
        (Ultralytics, {"order": "max_avg"}, "spatial_attention.cv1.weight belongs to a module with order='avg_max'"),
        (External, {"output": "gated"}, "ca.se.0.weight belongs to a module with output='residual'"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("strict", [True, False])
def test_refuses_weights_of_another_variant(family, options, words, strict):
    ours = attnk.CBAM(C, 4, K, **{**FAMILIES[family], **options})
    with pytest.raises(RuntimeError, match=words):
        ours.load_state_dict(build(family, torch.float32).state_dict(), strict=strict)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        (Tutorial, {"bias": False}, "Unexpected key.*channel_attention.fc.0.bias"),
        (Tutorial, {"spatial_bias": False}, "Unexpected key.*spatial_attention.conv.bias"),
        (Tutorial, {"norm": True}, "Missing key.*spatial_attention.bn.weight"),
        (Published, {"norm": False}, "Unexpected key.*SpatialGate.spatial.bn.weight"),
        (Tutorial, {"hidden_channels": 4}, "size mismatch for channel_attention.fc.0.weight"),
    ],
)
def test_strict_loading_misses_nothing(family, options, words):
    ours = attnk.CBAM(C, 4, K, **{**FAMILIES[family], **options})
    with pytest.raises(RuntimeError, match=words):
        ours.load_state_dict(build(family, torch.float32).state_dict())


class SpatialFirst(Tutorial):
    def forward(self, x):
        x = x * torch.sigmoid(self.spatial_attention.conv(max_avg(x)))
        return x * torch.sigmoid(self.channel_attention.fc(x.mean((2, 3))))[:, :, None, None]


class Parallel(Tutorial):
    def forward(self, x):
        gate = torch.sigmoid(self.channel_attention.fc(x.mean((2, 3))))[:, :, None, None]
        return x * gate * torch.sigmoid(self.spatial_attention.conv(max_avg(x)))


class ExtraParameter(Tutorial):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))


class MapOut(Tutorial):
    def forward(self, x):
        return super().forward(x) / x


COMPUTES = "no pool, activation, gate, order, output and tie policy of attnk.CBAM gives its values and gradients"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (SpatialFirst, COMPUTES),
        (Parallel, COMPUTES),
        (MapOut, COMPUTES),
        (ExtraParameter, r"unknown keys \['gamma'\]"),
        (nn.ReLU, r"it must hold a convolution \(1, 2, k, k\) with k odd, after the channel half"),
        (lambda: Holder(a=conv(), b=nn.Linear(4, 2), c=nn.Linear(2, 4)), "it must hold a convolution"),
        (lambda: Holder(a=nn.Linear(4, 4), b=conv(kernel_size=4)), "it must hold a convolution"),
        (conv, "in the channel half, it must hold one layer .*; its weights are none"),
        (lambda: Holder(a=nn.Linear(4, 3), b=conv()), r"in the channel half, .* its weights are \(3, 4\)"),
        (
            lambda: Holder(a=nn.Linear(4, 4), b=nn.BatchNorm2d(4), c=conv()),
            "it may hold one batch norm, of one channel, it has 1",
        ),
        (lambda: Holder(a=nn.Linear(4, 4), c=conv()), "it failed on a 4-channel map"),
    ],
)
def test_from_module_refuses_what_looks_alike(make, words):
    module = make()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=words) as caught:
        attnk.CBAM.from_module(module)
    assert str(caught.value).startswith(f"{type(module).__name__} was not recognised as a CBAM: ")
    assert_untouched(module, before)


# The module as such.


def test_initialisation_draws_what_the_tutorials_draw():
    torch.manual_seed(3)
    theirs = nn.Sequential(Tutorial(), nn.Linear(2, 2))
    torch.manual_seed(3)
    ours = nn.Sequential(attnk.CBAM(C, 4, K), nn.Linear(2, 2))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(("channels", "count"), [(64, 679), (256, 8563), (512, 33411)])
def test_number_of_parameters(channels, count):
    assert sum(parameter.numel() for parameter in attnk.CBAM(channels).parameters()) == count


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm", [False, True])
def test_one_image(norm, training):
    module = settle(attnk.CBAM(4, 2, 3, norm=norm)).train(training)
    x = feature_map(4, 5, 6)
    single, batch = outcome(copy.deepcopy(module), x), outcome(copy.deepcopy(module), x[None])
    assert single[0].shape == (4, 5, 6)
    for one, many in zip(single, batch, strict=True):
        torch.testing.assert_close(one, many.view(one.shape))


@pytest.mark.parametrize("options", [{}, {"norm": True}, {"output": "residual", "pool": "avg_max"}], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_memory_format_is_kept(options, training):
    module = attnk.CBAM(4, 2, 3, **options).train(training)
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
        output=["gated", "residual"],
        order=["avg_max", "max_avg"],
        gate=["sigmoid", "hard_sigmoid"],
        activation=["relu", "silu", "hard_swish"],
        ties=["first", "even"],
        layout=[torch.contiguous_format, torch.channels_last],
    ),
)
def test_every_option_beside_every_other(case):
    layout = case.pop("layout")
    module = settle(attnk.CBAM(5, 2, 3, **case))
    theirs = copy.deepcopy(module)
    theirs.backend = "reference"
    x = feature_map(3, 5, 4, 6).contiguous(memory_format=layout)
    assert_same(module, theirs, x)
    assert_same(module.eval(), theirs.eval(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_half_precision(dtype, norm):
    wide = attnk.CBAM(8, 2, norm=norm)
    narrow = copy.deepcopy(wide).to(dtype)
    x = torch.randn(2, 8, 9, 7).to(dtype)
    out = narrow(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wide(x.float()), rtol=3e-2, atol=3e-2)
    out.sum().backward()
    assert narrow.spatial_attention.conv.weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_autocast(dtype, norm):
    module = attnk.CBAM(8, 2, norm=norm)
    x = torch.randn(2, 8, 9, 7).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), module(x.float()), rtol=3e-2, atol=3e-2)
    out.sum().backward()
    assert x.grad.dtype == dtype
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


def test_synchronised_norm_in_evaluation():
    module = settle(attnk.CBAM(4, 2, norm=True)).eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module)).eval()
    assert isinstance(converted.spatial_attention.bn, nn.SyncBatchNorm)
    assert_same(converted, module, feature_map(2, 4, 5, 5))


@pytest.mark.parametrize("options", [{}, {"norm": True, "ties": "even", "pool": "avg_max", "output": "residual"}])
def test_copies(options, backend):
    module = settle(attnk.CBAM(4, 2, 3, backend=backend, **options))
    x = feature_map(2, 4, 4, 4)
    module(x)  # what a kernel leaves behind must not get into the copy
    for other in copies(module):
        assert (repr(other), list(other.state_dict())) == (repr(module), list(module.state_dict()))
        assert_same(other, copy.deepcopy(module), x)


@pytest.mark.parametrize(
    ("options", "training"),
    [({}, True), ({"norm": True, "pool": "avg_max"}, True), ({"norm": True, "output": "residual"}, False)],
    ids=str,
)
def test_compiles_to_one_graph(options, training, fresh_dynamo):
    module = settle(attnk.CBAM(4, 2, 3, **options)).train(training)
    other = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = feature_map(3, 4, 5, 3)
    for got, expected in zip(outcome(compiled, x), outcome(other, x), strict=True):
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), other(x))


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": True, "pool": "avg_max", "order": "avg_max", "ties": "even"}, {"norm": True, "output": "residual"}],
    ids=str,
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_symbolic_trace(options, training):
    module = settle(nn.Sequential(nn.Conv2d(3, 4, 1), attnk.CBAM(4, 2, 3, **options))).train(training)
    traced = torch.fx.symbolic_trace(module)
    for shape in ((2, 3, 5, 4), (3, 4, 6)):
        x = feature_map(*shape).requires_grad_()
        outs = module(x), traced(x)  # which share their parameters
        torch.testing.assert_close(*outs)
        grads = (torch.autograd.grad(out.square().sum(), [x, *module.parameters()]) for out in outs)
        torch.testing.assert_close(*grads)
    alone = torch.fx.symbolic_trace(module[1])
    x = feature_map(2, 4, 5, 6)
    torch.testing.assert_close(alone(x), module[1](x))
    with pytest.raises(ValueError, match="x must be"):
        alone(torch.ones(1, 5, 2, 2).double())


def test_trains_deterministically():
    """PyTorch's adaptive maximum pooling has no deterministic backward on CUDA; this has."""
    module = attnk.CBAM(4, 2, pool="avg_max", norm=True)
    x = torch.randn(2, 4, 8, 8)
    torch.use_deterministic_algorithms(True)
    some, others = (outcome(copy.deepcopy(module), x) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"in_channels": 0}, "in_channels must be a positive integer, got 0"),
        ({"kernel_size": 4}, "kernel_size must be an odd positive integer, got 4"),
        ({"kernel_size": "7"}, "kernel_size must be an odd positive integer, got '7'"),
        ({"kernel_size": True}, "kernel_size must be an odd positive integer, got True"),
        ({"reduction_ratio": 0}, "reduction_ratio must be a positive number, got 0"),
        ({"order": "max"}, "order must be one of 'avg_max', 'max_avg', got 'max'"),
        ({"output": "map"}, "output must be one of 'gated', 'residual', got 'map'"),
        ({"pool": "mean"}, "pool must be one of .*, got 'mean'"),
        ({"ties": "last"}, "ties must be one of 'first', 'even', got 'last'"),
        ({"backend": "cuda"}, "backend must be one of .*, got 'cuda'"),
    ],
    ids=str,
)
def test_refuses_at_construction(options, words):
    with pytest.raises(ValueError, match=words):
        attnk.CBAM(**{"in_channels": 4, **options})


def test_the_spatial_half_is_not_called():
    with pytest.raises(NotImplementedError, match="spatial_attention runs as a part of CBAM and cannot be called"):
        attnk.CBAM(4).spatial_attention(torch.ones(1, 4, 2, 2))


def test_wrong_input_is_told():
    module = attnk.CBAM(4)
    with pytest.raises(TypeError, match=r"x must have the dtype of the module, .*float32, got .*float64"):
        module(feature_map(1, 4, 2, 2))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        module([1.0])
    words = r"x must be \(B, C, H, W\) or \(C, H, W\) with C = 4, got "
    for shape in ((1, 5, 2, 2), (5, 4, 4), (4, 4), (1, 4, 2, 2, 2)):
        with pytest.raises(ValueError, match=words):
            module(torch.ones(shape))
