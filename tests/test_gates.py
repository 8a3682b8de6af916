"""GlobalContext, SimAM, SCSE, TripletAttention, BAM and SKConv against their formulas, written here from the papers."""

import copy
from collections import OrderedDict

import pytest
import torch
from gate_modules import assert_same, copies, feature_map, outcome, settle
from torch import nn

import attnk

C = 8
SHAPE = (3, C, 5, 6)


def mean(x):
    return x.mean((2, 3), keepdim=True)


class PublishedContext(nn.Module):
    """GCNet's block: softmax over pixels, Sequentials of convolutions, layer norm over (planes, 1, 1)."""

    def __init__(self, fusion="add", hidden=2, attend=True):
        super().__init__()
        self.conv_mask = nn.Conv2d(C, 1, 1) if attend else None

        def transform():
            return nn.Sequential(
                nn.Conv2d(C, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(), nn.Conv2d(hidden, C, 1)
            )

        self.channel_add_conv = transform() if "add" in fusion else None
        self.channel_mul_conv = transform() if "scale" in fusion else None

    def forward(self, x):
        b, c, h, w = x.shape
        if self.conv_mask is None:
            context = mean(x)
        else:
            mask = torch.softmax(self.conv_mask(x).view(b, 1, h * w), 2)
            context = torch.matmul(x.reshape(b, 1, c, h * w), mask.unsqueeze(-1)).view(b, c, 1, 1)
        if self.channel_mul_conv is not None:
            x = x * torch.sigmoid(self.channel_mul_conv(context))
        return x if self.channel_add_conv is None else x + self.channel_add_conv(context)


class Simam(nn.Module):
    def forward(self, x):
        n = x.shape[2] * x.shape[3] - 1
        square = (x - mean(x)).pow(2)
        return x * torch.sigmoid(square / (4 * (square.sum((2, 3), keepdim=True) / n + 1e-4)) + 0.5)


class Scse(nn.Module):
    def __init__(self, hidden=2):
        super().__init__()
        self.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, C, 1), nn.Sigmoid()
        )
        self.sSE = nn.Sequential(nn.Conv2d(C, 1, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.cSE(x) + x * self.sSE(x)


class ZGate(nn.Module):
    def __init__(self, kernel_size):
        super().__init__()
        self.conv = nn.Module()
        self.conv.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.conv.bn = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)

    def forward(self, x):
        pooled = torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv.bn(self.conv.conv(pooled)))


class Triplet(nn.Module):
    def __init__(self, kernel_size=3, spatial=True):
        super().__init__()
        self.cw, self.hc = ZGate(kernel_size), ZGate(kernel_size)
        self.hw = ZGate(kernel_size) if spatial else None

    def forward(self, x):
        first = self.cw(x.permute(0, 2, 1, 3).contiguous()).permute(0, 2, 1, 3)
        second = self.hc(x.permute(0, 3, 2, 1).contiguous()).permute(0, 3, 2, 1)
        return (first + second) / 2 if self.hw is None else (self.hw(x) + first + second) / 3


class Bam(nn.Module):
    def __init__(self, combine="sum", hidden=2, dilated=2, dilation=4):
        super().__init__()
        channel = OrderedDict(
            flatten=nn.Flatten(),
            gate_c_fc_0=nn.Linear(C, hidden),
            gate_c_bn_1=nn.BatchNorm1d(hidden),
            gate_c_relu_1=nn.ReLU(),
            gate_c_fc_final=nn.Linear(hidden, C),
        )
        spatial = OrderedDict(
            gate_s_conv_reduce0=nn.Conv2d(C, hidden, 1),
            gate_s_bn_reduce0=nn.BatchNorm2d(hidden),
            gate_s_relu_reduce0=nn.ReLU(),
        )
        for i in range(dilated):
            spatial[f"gate_s_conv_di_{i}"] = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)
            spatial[f"gate_s_bn_di_{i}"] = nn.BatchNorm2d(hidden)
            spatial[f"gate_s_relu_di_{i}"] = nn.ReLU()
        spatial["gate_s_conv_final"] = nn.Conv2d(hidden, 1, 1)
        self.channel_att, self.spatial_att = nn.Module(), nn.Module()
        self.channel_att.gate_c = nn.Sequential(channel)
        self.spatial_att.gate_s = nn.Sequential(spatial)
        self.combine = combine

    def forward(self, x):
        channel = self.channel_att.gate_c(mean(x))[:, :, None, None].expand_as(x)
        spatial = self.spatial_att.gate_s(x).expand_as(x)
        return x + x * torch.sigmoid(channel + spatial if self.combine == "sum" else channel * spatial)


class SelectiveKernel(nn.Module):
    def __init__(self, out=C, branches=2, groups=2, hidden=4, stride=1):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(C, out, 3, stride, padding=1 + i, dilation=1 + i, groups=groups, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            )
            for i in range(branches)
        )
        self.fc = nn.Sequential(nn.Linear(out, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU())
        self.fcs = nn.ModuleList(nn.Linear(hidden, out) for _ in range(branches))

    def forward(self, x):
        features = torch.stack([conv(x) for conv in self.convs], 1)
        z = self.fc(features.sum(1).mean((2, 3)))
        weights = torch.softmax(torch.stack([fc(z) for fc in self.fcs], 1), 1)
        return (features * weights[:, :, :, None, None]).sum(1)


PAIRS = {
    "context add": (PublishedContext, lambda **kw: attnk.GlobalContext(C, 4, **kw)),
    "context scale": (
        lambda: PublishedContext("scale"),
        lambda **kw: attnk.GlobalContext(C, 4, fusion="scale", **kw),
    ),
    "context both": (
        lambda: PublishedContext("scale_add"),
        lambda **kw: attnk.GlobalContext(C, 4, fusion="scale_add", **kw),
    ),
    "context of the mean": (
        lambda: PublishedContext("scale", attend=False),
        lambda **kw: attnk.GlobalContext(C, 4, fusion="scale", attend=False, **kw),
    ),
    "scse": (Scse, lambda **kw: attnk.SCSE(C, 4, **kw)),
    "triplet": (Triplet, lambda **kw: attnk.TripletAttention(3, **kw)),
    "triplet without the third": (
        lambda: Triplet(5, spatial=False),
        lambda **kw: attnk.TripletAttention(5, spatial=False, **kw),
    ),
    "bam": (Bam, lambda **kw: attnk.BAM(C, 4, **kw)),
    "bam product": (
        lambda: Bam("product", dilated=1, dilation=2),
        lambda **kw: attnk.BAM(C, 4, combine="product", dilated=1, dilation=2, **kw),
    ),
    "sk": (SelectiveKernel, lambda **kw: attnk.SKConv(C, groups=2, min_hidden=4, **kw)),
    "sk wide": (
        lambda: SelectiveKernel(16, 3, 4, 8, 2),
        lambda **kw: attnk.SKConv(C, 16, 3, 4, reduction=2, stride=2, min_hidden=2, **kw),
    ),
}
pairs = pytest.mark.parametrize("pair", PAIRS)


def build(pair, **options):
    theirs, ours = settle(PAIRS[pair][0]()), PAIRS[pair][1](**options).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pairs
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_equals_its_formula(pair, training, implementation, layout):
    ours, theirs = build(pair, backend=implementation)
    x = feature_map(*SHAPE).contiguous(memory_format=layout)
    for _ in range(2):  # the second time with running statistics of the first
        assert_same(ours.train(training), theirs.train(training), x)


@pairs
def test_equals_with_kernels(pair, backend, device):
    ours, theirs = build(pair, backend=backend)
    assert_same(ours.to(device), theirs.to(device), feature_map(2, C, 4, 4).to(device))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_simam(layout):
    x = feature_map(*SHAPE).contiguous(memory_format=layout)
    assert_same(attnk.SimAM(), Simam(), x)
    torch.testing.assert_close(attnk.SimAM()(x[1]), Simam()(x)[1])
    one = torch.full((1, 2, 1, 1), 3.0)
    torch.testing.assert_close(attnk.SimAM()(one), one * torch.sigmoid(torch.tensor(0.5)))


def test_simam_in_half_precision():
    """The squares of a channel add up to more than float16 holds."""
    x = (torch.randn(1, 2, 256, 256) * 2).half()
    assert (x.double() ** 2).sum((2, 3)).min() > 65504
    out = attnk.SimAM()(x)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), Simam()(x.double()), rtol=2e-3, atol=1e-4)


def test_simam_means_what_its_paper_says():
    """The gate of a pixel is the reciprocal of its least energy, as it is defined."""
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    mu, var, lam = x.mean(), x.var(), 1e-4
    energy = 4 * (var + lam) / ((x - mu) ** 2 + 2 * var + 2 * lam)
    torch.testing.assert_close(attnk.SimAM(e_lambda=lam)(x), x * torch.sigmoid(1 / energy))


def test_context_of_timm():
    """Its keys, and its layer norm's eps."""
    ours = settle(attnk.GlobalContext(C, 4, fusion="scale", eps=1e-6)).float()
    state = ours.state_dict()
    for name in ("mlp_scale.fc1.weight", "mlp_scale.fc2.weight"):
        state[name] = state[name][:, :, None, None]
    assert {name.partition(".")[0] for name in state} == {"conv_attn", "mlp_scale"}
    again = attnk.GlobalContext(C, 4, fusion="scale", eps=1e-6)
    again.load_state_dict(state, strict=True)
    assert_same(again, ours, torch.randn(SHAPE))


def test_triplet_shares_ties_where_told():
    """Two equal channels: the first takes all of the maximum's gradient, or each takes half."""
    x = torch.ones(1, 2, 3, 3, dtype=torch.float64)
    first, even = (settle(attnk.TripletAttention(3, ties=ties)).eval() for ties in ("first", "even"))
    even.load_state_dict(first.state_dict())
    uneven, fair = outcome(first, x)[1], outcome(even, x)[1]
    assert not torch.allclose(uneven, fair)
    theirs = settle(Triplet(3)).eval()
    theirs.load_state_dict(
        {k.replace(".conv1.", ".conv.conv.").replace(".bn.", ".conv.bn."): v for k, v in first.state_dict().items()}
    )
    torch.testing.assert_close(uneven, outcome(theirs, x)[1])


@pytest.mark.parametrize("fusion", ["add", "scale", "scale_add"])
def test_context_starts_where_the_published_does(fusion):
    x = torch.randn(SHAPE)
    out = attnk.GlobalContext(C, fusion=fusion)(x)
    torch.testing.assert_close(out, x if fusion == "add" else x / 2)


@pairs
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_one_image(pair, layout):
    ours, _ = build(pair)
    ours.eval()
    batch = feature_map(1, *SHAPE[1:]).contiguous(memory_format=layout)
    single, many = outcome(ours, batch[0]), outcome(ours, batch)
    assert single[0].dim() == 3
    for one, expected in zip(single, many, strict=True):
        torch.testing.assert_close(one, expected.view(one.shape))


@pytest.mark.parametrize(
    ("make", "hidden"),
    [
        (lambda reduction: attnk.GlobalContext(C, reduction).mlp_add.fc1.out_features, 3),
        (lambda reduction: attnk.SCSE(C, reduction).cSE[1].out_channels, 3),
        (lambda reduction: attnk.BAM(C, reduction).channel_att.gate_c[0].out_features, 3),
        (lambda reduction: attnk.SKConv(C, groups=2, reduction=reduction, min_hidden=1).fc[0].out_features, 3),
    ],
)
def test_reduction_need_not_be_whole(make, hidden):
    assert make(2.5) == hidden


@pairs
def test_memory_format_is_kept(pair):
    ours, _ = build(pair)
    ours = ours.float()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(SHAPE).contiguous(memory_format=memory_format).requires_grad_()
        out = ours(x)
        assert out.is_contiguous(memory_format=memory_format)
        out.sum().backward()
        assert x.grad.shape == x.shape


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(pair, dtype):
    ours, _ = build(pair)
    ours = ours.float()
    x = torch.randn(SHAPE).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x)
    wide = copy.deepcopy(ours)(x.float())
    assert out.dtype == (torch.bfloat16 if pair.startswith("sk") else dtype)  # as a convolution's
    torch.testing.assert_close(out.float(), wide, rtol=0.1, atol=0.1)
    out.sum().backward()
    assert x.grad.dtype == dtype
    assert all(parameter.grad.dtype == torch.float32 for parameter in ours.parameters())


@pairs
def test_half_precision(pair):
    ours, _ = build(pair)
    narrow = copy.deepcopy(ours).bfloat16()
    x = torch.randn(SHAPE).bfloat16()
    out = narrow(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), ours(x.double()), rtol=0.15, atol=0.15)


@pairs
def test_copies(pair):
    ours, _ = build(pair)
    x = feature_map(*SHAPE)
    ours(x)
    for other in copies(ours):
        assert (repr(other), list(other.state_dict())) == (repr(ours), list(ours.state_dict()))
        assert_same(other, copy.deepcopy(ours), x)
    again = PAIRS[pair][1]().double()
    again.load_state_dict(ours.state_dict(), strict=True)
    assert_same(again, copy.deepcopy(ours), x)


@pytest.mark.parametrize("pair", ["context both", "context of the mean", "scse", "triplet", "bam", "sk", "simam"])
def test_compiles_to_one_graph(pair, fresh_dynamo):
    ours = attnk.SimAM() if pair == "simam" else build(pair)[0]
    other = copy.deepcopy(ours)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = feature_map(*SHAPE)
    for got, expected in zip(outcome(compiled, x), outcome(other, x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: attnk.GlobalContext(0), "channels must be a positive integer, got 0"),
        (lambda: attnk.GlobalContext(4, 0), "reduction must be a positive number, got 0"),
        (lambda: attnk.SCSE(4, True), "reduction must be a positive number, got True"),
        (lambda: attnk.GlobalContext(4, fusion="mul"), "fusion must be one of 'add', 'scale', 'scale_add', got 'mul'"),
        (lambda: attnk.GlobalContext(4, backend="cuda"), "backend must be one of .*, got 'cuda'"),
        (lambda: attnk.SimAM(e_lambda=0), "e_lambda must be a positive number, got 0"),
        (lambda: attnk.SimAM(e_lambda="1"), "e_lambda must be a positive number, got '1'"),
        (lambda: attnk.SCSE(-1), "in_channels must be a positive integer, got -1"),
        (lambda: attnk.TripletAttention(4), "kernel_size must be an odd positive integer, got 4"),
        (lambda: attnk.TripletAttention(True), "kernel_size must be an odd positive integer, got True"),
        (lambda: attnk.TripletAttention(ties="last"), "ties must be one of 'first', 'even', got 'last'"),
        (lambda: attnk.BAM(4, dilated=0), "dilated must be a positive integer, got 0"),
        (lambda: attnk.BAM(4, combine="max"), "combine must be one of 'sum', 'product', got 'max'"),
        (lambda: attnk.SKConv(4, branches=0), "branches must be a positive integer, got 0"),
        (
            lambda: attnk.SKConv(48),
            "groups must divide in_channels and out_channels, got groups=32, in_channels=48, out_channels=48",
        ),
    ],
)
def test_refuses_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_simam_takes_no_number_of_channels():
    with pytest.raises(TypeError, match="positional argument"):
        attnk.SimAM(64)


def test_wrong_input_is_told():
    for pair in PAIRS:
        module = build(pair)[0].float()
        if pair.startswith("triplet"):
            with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) or \(C, H, W\), got 2 dimensions"):
                module(torch.ones(4, 4))
            continue
        with pytest.raises(TypeError, match=r"x must have the dtype of the module, .*float32, got .*float64"):
            module(feature_map(*SHAPE))
        for shape in ((1, C + 1, 4, 4), (C + 1, 4, 4), (C, 4)):
            with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) or \(C, H, W\) with C = 8, got "):
                module(torch.ones(shape))
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) or \(C, H, W\), got 2 dimensions"):
        attnk.SimAM()(torch.ones(2, 3))
