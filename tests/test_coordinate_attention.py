"""attnk.CoordinateAttention against the classes it stands in for, re-written here from what they compute."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnk

# The families: three 1 x 1 convolutions and a batch norm; names, widths, activation, biases and residual differ.


class HSwish(nn.Module):
    def forward(self, x):
        return x * F.relu6(x + 3) / 6


class Houqb(nn.Module):
    """The authors' coordatt.py, and External-Attention's copy of it."""

    def __init__(self, channels=24, reduction=32):
        super().__init__()
        hidden = max(8, channels // reduction)
        self.conv1 = nn.Conv2d(channels, hidden, kernel_size=1, stride=1, padding=0)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act = HSwish()
        self.conv_h = nn.Conv2d(hidden, channels, kernel_size=1, stride=1, padding=0)
        self.conv_w = nn.Conv2d(hidden, channels, kernel_size=1, stride=1, padding=0)

    def forward(self, x):
        height, width = x.shape[2:]
        of_rows = F.adaptive_avg_pool2d(x, (None, 1))
        of_columns = F.adaptive_avg_pool2d(x, (1, None)).permute(0, 1, 3, 2)
        lines = self.act(self.bn1(self.conv1(torch.cat([of_rows, of_columns], dim=2))))
        of_rows, of_columns = torch.split(lines, [height, width], dim=2)
        gate_h = self.conv_h(of_rows).sigmoid()
        gate_w = self.conv_w(of_columns.permute(0, 1, 3, 2)).sigmoid()
        return x * gate_w * gate_h


class HouqbMobile(nn.Module):
    """The authors' mbv2_ca.py: conv2 is of the rows, conv3 of the columns."""

    def __init__(self, channels=24, groups=32):
        super().__init__()
        hidden = max(8, channels // groups)
        self.conv1 = nn.Conv2d(channels, hidden, kernel_size=1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, channels, kernel_size=1)
        self.conv3 = nn.Conv2d(hidden, channels, kernel_size=1)
        self.relu = HSwish()

    def forward(self, x):
        height, width = x.shape[2:]
        of_columns = x.mean(2, keepdim=True).transpose(2, 3)
        lines = self.relu(self.bn1(self.conv1(torch.cat([x.mean(3, keepdim=True), of_columns], 2))))
        of_rows, of_columns = lines.split([height, width], 2)
        gate_h, gate_w = self.conv2(of_rows).sigmoid(), self.conv3(of_columns.transpose(2, 3)).sigmoid()
        return x * gate_h.expand_as(x) * gate_w.expand_as(x)


class Timm(nn.Module):
    """No biases, a hidden width that is a multiple of 8, perhaps another gate, no norm, a residual."""

    def __init__(self, channels=24, hidden=8, norm=True, activation=None, gate=None, skip=False):
        super().__init__()
        self.skip = skip
        self.conv1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden) if norm else nn.Identity()
        self.act = activation or nn.Hardswish()
        self.conv_h = nn.Conv2d(hidden, channels, 1, bias=False)
        self.conv_w = nn.Conv2d(hidden, channels, 1, bias=False)
        self.gate = gate or nn.Sigmoid()

    def forward(self, x):
        lines = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(-1, -2)], 2)
        lines = self.act(self.bn1(self.conv1(lines)))
        of_rows, of_columns = lines.split(list(x.shape[2:]), 2)
        out = x * self.gate(self.conv_w(of_columns.transpose(-1, -2))) * self.gate(self.conv_h(of_rows))
        return out + x if self.skip else out


class ColumnsFirst(nn.Module):
    """Other names, another order."""

    def __init__(self):
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv2d(24, 10, 1), nn.BatchNorm2d(10), nn.SiLU())
        self.to_columns = nn.Conv2d(10, 24, 1)
        self.to_rows = nn.Conv2d(10, 24, 1)

    def forward(self, x):
        lines = self.squeeze(torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).mT], 2))
        rows, columns = lines.split(list(x.shape[2:]), 2)
        return x * self.to_rows(rows).sigmoid() * self.to_columns(columns.mT).sigmoid()


class Changzy(Houqb):
    """Keys and shapes of the authors', another function: ReLU, and no sigmoid."""

    def forward(self, x):
        height, width = x.shape[2:]
        lines = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], 2)
        lines = F.relu(self.bn1(self.conv1(lines)))
        of_rows, of_columns = lines.split([height, width], 2)
        return x * self.conv_h(of_rows) * self.conv_w(of_columns.transpose(2, 3))


def timm(**options):
    return lambda: Timm(**options)


FAMILIES = {
    "houqb": (Houqb, {}),
    "houqb_mobile": (HouqbMobile, {}),
    "timm": (Timm, {"bias": False}),
    "timm_skip": (timm(skip=True, hidden=16), {"bias": False, "hidden_channels": 16, "output": "residual"}),
    "timm_bare": (
        timm(norm=False, activation=nn.ReLU(), gate=nn.Hardsigmoid()),
        {"bias": False, "norm": False, "activation": "relu", "gate": "hard_sigmoid"},
    ),
    "columns_first": (ColumnsFirst, {"hidden_channels": 10, "activation": "silu"}),
}
families = pytest.mark.parametrize("family", FAMILIES)
loadable = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "columns_first"])


def build(family, dtype=torch.float64):
    """A module of a family as training might leave it."""
    module = FAMILIES[family][0]().to(dtype) if isinstance(family, str) else family().to(dtype)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            with torch.no_grad():
                part.weight.uniform_(0.5, 2)
                part.bias.uniform_(-1, 1)
            part.running_mean.uniform_(-0.3, 0.3)
            part.running_var.uniform_(0.3, 1)
    return module


def feature_map(*shape, dtype=torch.float64):
    return torch.randn(shape or (3, 24, 9, 8), dtype=dtype) * 2


def outcome(module, x):
    """Output, gradients of x and of all parameters by shape and size, buffers in order."""
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
    ours = attnk.CoordinateAttention(24, **{**FAMILIES[family][1], **options}).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours


@loadable
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
    ours = attnk.CoordinateAttention.from_module(theirs)
    assert all(part.training is training for part in ours.modules())
    options = {"hidden_channels": ours.conv1.out_channels, **FAMILIES[family][1]}
    assert repr(ours) == repr(attnk.CoordinateAttention(24, **options))
    if family == "columns_first":  # the parameters come in another order
        torch.testing.assert_close(ours(x := feature_map()), theirs(x))
        return
    for _ in range(2):
        assert_same(ours, theirs)


@loadable
def test_equals_with_kernels(family, backend, device):
    theirs = build(family).to(device)
    ours = load(family, theirs, backend=backend).to(device)
    x = feature_map(2, 24, 4, 6).to(device)
    assert_same(ours, theirs, x)
    assert_same(ours.eval(), theirs.eval(), x.contiguous(memory_format=torch.channels_last))


def test_equals_on_noise_in_float32():
    theirs = build("houqb", torch.float32)
    assert_same(attnk.CoordinateAttention.from_module(theirs), theirs, feature_map(4, 24, 20, 12, dtype=torch.float32),
                rtol=1e-3, atol=1e-4)  # fmt: skip


@families
def test_trains_alike(family):
    theirs = build(family)
    ours = attnk.CoordinateAttention.from_module(theirs)
    inputs = [feature_map(2, 24, 5, 5) for _ in range(3)]
    for module in (ours, theirs):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for x in inputs:
            optimizer.zero_grad()
            (module(x) ** 2).mean().backward()
            optimizer.step()
    # what the norm takes away has a gradient of noise, which this optimizer makes steps of: not the first bias
    torch.testing.assert_close(ours.eval().conv_h.bias, dict(theirs.named_parameters()).get(
        {"houqb_mobile": "conv2.bias", "columns_first": "to_rows.bias"}.get(family, "conv_h.bias")))  # fmt: skip


def test_from_module_refuses_the_class_with_their_keys():
    """It loads strictly and computes another thing: only running it tells."""
    theirs = build(Changzy)
    attnk.CoordinateAttention(24).double().load_state_dict(theirs.state_dict(), strict=True)
    before = copy.deepcopy(theirs.state_dict())
    with pytest.raises(ValueError, match="Changzy was not recognised as coordinate attention: with its weights no act"):
        attnk.CoordinateAttention.from_module(theirs)
    assert theirs.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in theirs.state_dict().items())


def changed(change):
    module = Houqb()
    change(module)
    return module


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Conv2d(3, 4, 1), r"it must hold three 1 x 1 convolutions, .*; its weights are \(4, 3, 1, 1\)"),
        (lambda: nn.ReLU(), "its weights are none"),
        (lambda: changed(lambda m: setattr(m, "conv_h", nn.Conv2d(8, 24, 3, padding=1))), r"\(24, 8, 3, 3\)"),
        (lambda: changed(lambda m: setattr(m, "conv_h", nn.Conv2d(8, 24, 1, bias=False))), "a bias or none"),
        (lambda: changed(lambda m: setattr(m, "bn2", nn.BatchNorm2d(8))), "one batch norm, of 8 channels, it has 2"),
        (lambda: changed(lambda m: setattr(m, "bn1", nn.BatchNorm2d(24))), "one batch norm, of 8 channels, it has 1"),
        (lambda: changed(lambda m: setattr(m, "gamma", nn.Parameter(torch.ones(1)))), r"unknown keys \['gamma'\]"),
        (lambda: changed(lambda m: setattr(m, "act", nn.GELU())), "no activation, gate and output"),
        (lambda: changed(lambda m: setattr(m, "act", nn.Linear(3, 3))), "unknown keys"),
        (lambda: changed(lambda m: setattr(m, "act", nn.PixelShuffle(3))), "it failed on a 24-channel map"),
    ],
)
def test_from_module_refuses_what_looks_alike(make, words):
    with pytest.raises(ValueError, match=words):
        attnk.CoordinateAttention.from_module(make())


def test_from_module_copies_its_own_kind():
    ours = attnk.CoordinateAttention(24, activation="silu", backend="torch")
    twin = attnk.CoordinateAttention.from_module(ours)
    assert twin is not ours
    assert repr(twin) == repr(ours)
    assert_same(twin.double(), ours.double())


def test_from_module_takes_over_what_no_key_holds():
    theirs = Houqb().half()
    theirs.bn1 = nn.BatchNorm2d(8, eps=1e-3, momentum=0.2).half()
    theirs.conv_w.weight.requires_grad_(False)
    theirs.bn1.eval()
    ours = attnk.CoordinateAttention.from_module(theirs)
    assert (ours.bn1.eps, ours.bn1.momentum, ours.bn1.weight.dtype) == (1e-3, 0.2, torch.float16)
    assert not ours.conv_w.weight.requires_grad
    assert ours.conv_h.weight.requires_grad
    assert ours.training
    assert not ours.bn1.training


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        ({}, 8),
        ({"reduction": 16}, 16),
        ({"reduction": 100}, 8),
        ({"hidden_channels": 3}, 3),
        ({"reduction": 16, "divisor": 8}, 16),
        ({"reduction": 16, "divisor": 8, "se_factor": 2 / 3}, 8),  # timm's: 256 / 16 * 2 / 3 = 10.7
        ({"reduction": 8, "divisor": 8, "se_factor": 2 / 3}, 24),
        ({"reduction": 1000, "divisor": 4}, 4),
        ({"reduction": 20, "divisor": 1}, 13),
    ],
    ids=str,
)
def test_hidden_width(options, hidden):
    module = attnk.CoordinateAttention(256, **options)
    assert module.conv1.weight.shape == (hidden, 256, 1, 1)
    assert module.conv_h.weight.shape == module.conv_w.weight.shape == (256, hidden, 1, 1)


def test_keys():
    module = attnk.CoordinateAttention(24)
    assert list(module.state_dict()) == list(Houqb().state_dict())
    assert not any("bias" in key for key in attnk.CoordinateAttention(24, bias=False, norm=False).state_dict())
    nested = nn.Sequential(nn.Identity(), attnk.CoordinateAttention(24))
    nested.load_state_dict(nn.Sequential(nn.Identity(), HouqbMobile()).state_dict(), strict=True)


def test_initialisation_draws_what_the_authors_draw():
    torch.manual_seed(3)
    theirs = Houqb()
    torch.manual_seed(3)
    ours = attnk.CoordinateAttention(24)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 0}, "channels must be a positive integer, got 0"),
        ({"channels": 8.0}, r"channels must be a positive integer, got 8\.0"),
        ({"reduction": 0}, "reduction must be a positive number, got 0"),
        ({"reduction": "4"}, "reduction must be a positive number, got '4'"),
        ({"hidden_channels": 0}, "hidden_channels must be a positive integer, got 0"),
        ({"divisor": 0}, "divisor must be a positive integer, got 0"),
        ({"se_factor": -1}, "se_factor must be a positive number, got -1"),
        ({"activation": "tanh"}, "activation must be one of 'hard_swish', 'relu', 'relu6', 'silu', got 'tanh'"),
        ({"gate": "tanh"}, "gate must be one of 'sigmoid', 'hard_sigmoid', got 'tanh'"),
        ({"output": "map"}, "output must be one of 'gated', 'residual', got 'map'"),
        ({"backend": "cuda"}, "backend must be one of .* got 'cuda'"),
    ],
    ids=str,
)
def test_refuses_at_construction(options, words):
    with pytest.raises(ValueError, match=words):
        attnk.CoordinateAttention(**{"channels": 24, **options})


def test_wrong_input_is_told():
    module = attnk.CoordinateAttention(24)
    with pytest.raises(TypeError, match=r"x must have the dtype of the module, .*float32, got .*float64"):
        module(feature_map())
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) or \(C, H, W\) with C = 24, got \(2, 3, 4, 5\)"):
        module(torch.ones(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"with C = 24, got \(24, 4\)"):
        module(torch.ones(24, 4))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        module([1.0])


@pytest.mark.parametrize("output", ["gated", "residual"])
def test_one_image(output):
    for training in (False, True):
        module = attnk.CoordinateAttention(6, output=output).double().train(training)
        x = feature_map(6, 5, 4)
        single, batch = outcome(copy.deepcopy(module), x), outcome(module, x[None])
        assert torch.equal(single[0], batch[0][0])
        for one, many in zip(single[1:], batch[1:], strict=True):
            torch.testing.assert_close(one, many.view(one.shape))


def test_empty_batch():
    module = attnk.CoordinateAttention(6).eval()
    x = torch.zeros(0, 6, 5, 4, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_half_precision(dtype, training):
    wide = build(lambda: attnk.CoordinateAttention(24), torch.float32).train(training)
    narrow = copy.deepcopy(wide).to(dtype)
    x = torch.randn(2, 24, 9, 7).to(dtype)
    out = narrow(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wide(x.float()), rtol=5e-2, atol=5e-2)
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in narrow.parameters())


def test_memory_format_is_kept():
    module = attnk.CoordinateAttention(4)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 5, 6).contiguous(memory_format=memory_format).requires_grad_()
        out = module(x)
        assert out.is_contiguous(memory_format=memory_format)
        out.backward(torch.ones_like(out))
        assert x.grad.is_contiguous(memory_format=memory_format)
    other = copy.deepcopy(module).to(memory_format=torch.channels_last).eval()
    assert_same(other, module.eval(), torch.randn(2, 4, 5, 6), rtol=1e-4, atol=1e-5)


def test_autocast():
    module = attnk.CoordinateAttention(24)
    x = torch.randn(2, 24, 8, 8, requires_grad=True)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=5e-2, atol=5e-2)
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert module.conv1.weight.grad.dtype == torch.float32


def test_synchronised_norm():
    module = build(lambda: attnk.CoordinateAttention(24)).eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module)).eval()
    assert isinstance(converted.bn1, nn.SyncBatchNorm)
    assert list(converted.state_dict()) == list(module.state_dict())
    assert_same(converted, module)


def test_the_norm_is_called_in_training_and_may_be_replaced():
    module = attnk.CoordinateAttention(24).double()
    called = []
    module.bn1.register_forward_hook(lambda *args: called.append(args))
    before = module.bn1.running_mean.clone()
    module(feature_map())
    assert len(called) == 1
    assert not torch.equal(before, module.bn1.running_mean)
    module.bn1 = nn.GroupNorm(2, 8).double()
    assert module(feature_map()).isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    module = attnk.CoordinateAttention(3).eval()
    inputs = [torch.linspace(-2, 2, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8).requires_grad_() for _ in range(2)]
    outs = [module(inputs[0]), checkpoint(module, inputs[1], use_reentrant=use_reentrant)]
    grads = []
    for x, out in zip(inputs, outs, strict=True):
        module.zero_grad()
        out.square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    assert torch.equal(*outs)
    assert all(torch.equal(plain, again) for plain, again in zip(*grads, strict=True))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_to_one_graph(training, fresh_dynamo):
    module = build(lambda: attnk.CoordinateAttention(24, output="residual")).train(training)
    other = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = feature_map()
    for got, expected in zip(outcome(compiled, x), outcome(other, x), strict=True):
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), other(x))


@pytest.mark.parametrize("shape", [(2, 24, 0, 5), (2, 24, 5, 0), (0, 24, 3, 5), (24, 0, 5), (2, 24, 0, 0)], ids=str)
@pytest.mark.parametrize("output", ["gated", "residual"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_empty_maps(shape, output, training):
    module = build(lambda: attnk.CoordinateAttention(24, output=output)).train(training)
    before = copy.deepcopy(module.state_dict())
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    out = module(x)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_export(fresh_dynamo):
    module = build(lambda: attnk.CoordinateAttention(24)).eval()
    program = torch.export.export(
        module, (feature_map(),), dynamic_shapes={"x": {0: torch.export.Dim("b"), 2: torch.export.Dim("h")}}
    )
    assert "coordinate_gate_forward" in str(program)
    assert_same(program.module(), module, feature_map(2, 24, 5, 8))


def test_symbolic_trace():
    network = nn.Sequential(nn.Conv2d(3, 24, 1), attnk.CoordinateAttention(24)).eval()
    traced = torch.fx.symbolic_trace(network)
    for side in (4, 7):
        x = torch.randn(2, 3, side, 5)
        assert torch.equal(traced(x), network(x))


def test_copies_and_files():
    module = build(lambda: attnk.CoordinateAttention(24, activation="relu6"))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        assert repr(twin) == repr(module)
        assert_same(twin, copy.deepcopy(module))


def test_says_what_it_is():
    text = repr(attnk.CoordinateAttention(24, activation="silu", gate="hard_sigmoid", backend="torch"))
    for words in ("activation='silu'", "gate='hard_sigmoid'", "output='gated'", "backend='torch'"):
        assert words in text
