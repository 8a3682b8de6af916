"""The self-attention modules against the tutorials' classes, re-written here from what they compute."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import attnk
from attnk.modules import self_attention
from attnk.modules.self_attention import MultiHeadSelfAttention, SelfAttention, SingleHeadSelfAttention, project
from attnk.reference.softmax_attention import softmax_attention_reference

aten = torch.ops.aten


def heads_of(x, num_heads):
    batch, tokens, channels = x.shape
    return x.reshape(batch, tokens, num_heads, channels // num_heads).transpose(1, 2)


class TutorialSelfAttention(nn.Module):
    def __init__(self, embed_dim, num_heads=8, dropout=0.1):
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(embed_dim, embed_dim * 3)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, bias=0.0):
        q, k, v = (heads_of(part, self.num_heads) for part in self.qkv_proj(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias
        out = self.dropout(scores.softmax(-1)) @ v
        return self.out_proj(out.transpose(1, 2).reshape(x.shape))


class TutorialMultiHead(nn.Module):
    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.fc = (nn.Linear(embed_dim, embed_dim) for _ in range(4))

    def forward(self, x, bias=0.0):
        q, k, v = (heads_of(linear(x), self.num_heads) for linear in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        return self.fc((weights @ v).transpose(1, 2).reshape(x.shape)) + x


class TutorialSingleHead(nn.Module):
    def __init__(self, embed_dim):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(embed_dim, embed_dim) for _ in range(3))

    def forward(self, x, bias=0.0):
        logits = self.query(x) @ self.key(x).transpose(1, 2)
        bias = bias if isinstance(bias, float) else bias.squeeze(1)
        return (logits + bias).softmax(-1) @ self.value(x)


class ScaledSingleHead(TutorialSingleHead):
    def forward(self, x, bias=0.0):
        logits = self.query(x) @ self.key(x).transpose(1, 2) / x.shape[-1] ** 0.5
        bias = bias if isinstance(bias, float) else bias.squeeze(1)
        return (logits + bias).softmax(-1) @ self.value(x)


CHANNELS, HEADS = 12, 3
FAMILIES = {
    "SelfAttention": (
        lambda: TutorialSelfAttention(CHANNELS, HEADS),
        lambda **options: SelfAttention(CHANNELS, HEADS, **options),
    ),
    "MultiHead": (
        lambda: TutorialMultiHead(CHANNELS, HEADS),
        lambda **options: MultiHeadSelfAttention(CHANNELS, HEADS, **options),
    ),
    "SingleHead": (
        lambda: TutorialSingleHead(CHANNELS),
        lambda **options: SingleHeadSelfAttention(CHANNELS, compat="original", **options),
    ),
    "SingleHead scaled": (
        lambda: ScaledSingleHead(CHANNELS),
        lambda **options: SingleHeadSelfAttention(CHANNELS, **options),
    ),
}
families = pytest.mark.parametrize("family", FAMILIES)


def pair(family, dtype=torch.float64, **options):
    """A tutorial's module and ours with its weights, loaded strictly; no dropout in training."""
    theirs, ours = FAMILIES[family]
    theirs, ours = theirs().to(dtype), ours(**options).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for module in (theirs, ours):
        if hasattr(module, "dropout"):
            module.dropout.p = 0.0
    return theirs, ours


def channel_major(x):
    return x.mT.contiguous().mT


def is_channel_major(x):
    return x.mT.is_contiguous()


def step_2(x):
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS = {
    "token_major": torch.Tensor.contiguous,
    "channel_major": channel_major,
    "token_slice": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "step_2": step_2,
    "batch_inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand(x.shape),
}


def skip_without_kernels(implementation, device):
    reason = attnk.dispatch.no_kernel_here(torch.empty(0, device=device))
    if implementation == "triton" and reason is not None:
        pytest.skip(reason)


def outcome(module, x, *args, **options):
    """Output, gradients of x and of all parameters in order."""
    x = x.detach().requires_grad_()
    out = module(x, *args, **options)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], dout)]


def assert_same(module, other, x, **tolerances):
    tolerances = tolerances or {"rtol": 1e-8, "atol": 1e-10}
    for got, expected in zip(outcome(module, x), outcome(other, x), strict=True):
        torch.testing.assert_close(got, expected, **tolerances)


@pytest.fixture(params=["where it runs", "as on a GPU"])
def placement(request, monkeypatch):
    """As the device has it, and with channel-major projections on any device."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(self_attention, "attends_channel_major", self_attention.projects_by_image)


class Watch(TorchDispatchMode):
    """Which operators ran, and what they returned."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function.overloadpacket, out))
        return out

    def copies(self, numel=1):
        copying = (aten.clone, aten.copy_, aten.contiguous, aten._to_copy, aten.cat)
        return [packet for packet, out in self.calls if packet in copying and out.numel() >= numel]

    def largest(self):
        return max(out.untyped_storage().nbytes() for _, out in self.calls if isinstance(out, torch.Tensor))


@families
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [7, 40], ids=["few tokens", "many tokens"])
@pytest.mark.usefixtures("placement")
def test_equals(family, layout, tokens):
    theirs, ours = pair(family)
    x = LAYOUTS[layout](torch.randn(3, tokens, CHANNELS, dtype=torch.float64))
    assert_same(ours.train(), theirs.train(), x)
    assert_same(ours.eval(), theirs.eval(), x)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@families
@pytest.mark.parametrize("layout", ["token_major", "channel_major"])
@pytest.mark.parametrize("implementation", ["triton", "torch", "reference"])
def test_equals_on_every_backend(family, layout, implementation, device):
    skip_without_kernels(implementation, device)
    theirs, ours = pair(family, backend=implementation)
    x = LAYOUTS[layout](torch.randn(2, 9, CHANNELS, dtype=torch.float64, device=device))
    assert_same(ours.to(device), theirs.to(device), x)
    ambient = FAMILIES[family][1]().double().to(device).eval()
    ambient.load_state_dict(theirs.state_dict())
    with attnk.use_backend(implementation):
        torch.testing.assert_close(ambient(x), theirs.eval()(x))


@families
@pytest.mark.parametrize("layout", ["token_major", "channel_major"])
@pytest.mark.usefixtures("placement")
def test_equals_in_float32(family, layout, device):
    theirs, ours = pair(family, torch.float32)
    x = LAYOUTS[layout](torch.randn(2, 50, CHANNELS, device=device))
    assert_same(ours.to(device), theirs.to(device), x, rtol=1e-3, atol=2e-5)


@families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(family, dtype, device):
    theirs, ours = pair(family, torch.float32)
    x = torch.randn(2, 17, CHANNELS, device=device)
    for lay in LAYOUTS["token_major"], LAYOUTS["channel_major"]:
        out = ours.to(device, dtype)(lay(x).to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), theirs.to(device)(x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.usefixtures("placement")
def test_without_bias(qkv_bias):
    theirs, _ = pair("SelfAttention")
    ours = SelfAttention(CHANNELS, HEADS, 0.0, qkv_bias=qkv_bias).double()
    keys = ["qkv_proj.weight", *(["qkv_proj.bias"] if qkv_bias else []), "out_proj.weight", "out_proj.bias"]
    assert list(ours.state_dict()) == keys
    ours.load_state_dict({key: theirs.state_dict()[key] for key in keys})
    nn.init.zeros_(theirs.qkv_proj.bias)
    nn.init.zeros_(ours.qkv_proj.bias) if qkv_bias else None
    for lay in LAYOUTS["token_major"], LAYOUTS["channel_major"]:
        x = lay(torch.randn(2, 40, CHANNELS, dtype=torch.float64))
        torch.testing.assert_close(ours(x), theirs(x))


# Where things lie.


@families
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("tokens", [7, 40], ids=["few tokens", "many tokens"])
@pytest.mark.usefixtures("placement")
def test_the_output_lies_as_the_input(family, training, tokens):
    _, ours = pair(family)
    x = torch.randn(3, tokens, CHANNELS, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        assert ours(x).is_contiguous()
        assert is_channel_major(ours(channel_major(x)))


@families
@pytest.mark.parametrize("layout", ["token_major", "channel_major"])
@pytest.mark.usefixtures("placement")
def test_the_operation_gets_views_and_gives_a_view(family, layout, monkeypatch):
    seen = []

    def operation(q, k, v, *args, **options):
        dense = q.transpose(1, 2) if q.stride(-1) == 1 else q.mT
        out = torch.empty_like(dense, memory_format=torch.contiguous_format).copy_(dense)
        out = out.transpose(1, 2) if q.stride(-1) == 1 else out.mT
        seen.extend([q, k, v, out])
        return out

    monkeypatch.setattr(self_attention, "softmax_attention", operation)
    _, ours = pair(family)
    x = LAYOUTS[layout](torch.randn(2, 40, CHANNELS, dtype=torch.float64))
    with torch.no_grad(), Watch() as watch:
        ours(x)
    q, k, v, _ = seen
    projections = [result for packet, result in watch.calls if packet in (aten.addmm, aten.baddbmm)]
    storages = {result.untyped_storage().data_ptr() for result in projections}
    assert {part.untyped_storage().data_ptr() for part in (q, k, v)} <= storages
    if family == "SelfAttention":
        assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        step = CHANNELS * (40 if q.stride(-1) != 1 else 1)
        assert v.storage_offset() - k.storage_offset() == k.storage_offset() - q.storage_offset() == step
    expected = self_attention.attends_channel_major(nn.Linear(1, 1), x) and layout == "channel_major"
    assert (q.stride(-2) == 1) == expected
    copies = 1 if layout == "channel_major" and not expected else 0  # into token-major heads
    outs = 1 if copies and family.startswith("SingleHead") else 0  # and back, where no projection does it
    assert len(watch.copies(x.numel())) == copies + outs + 1  # one more by the operation above


def test_attention_on_the_cpu_is_token_major():
    linear, x = linear_and_tokens(3, 40)
    assert self_attention.projects_by_image(linear, x)
    assert not self_attention.attends_channel_major(linear, x)


@families
@pytest.mark.parametrize("implementation", [None, "torch", "reference"])
def test_the_operation_gets_the_backend(family, implementation, monkeypatch):
    seen = []

    def operation(q, k, v, *args, **options):
        seen.append(options["backend"])
        return v

    monkeypatch.setattr(self_attention, "softmax_attention", operation)
    FAMILIES[family][1](backend=implementation)(torch.randn(1, 4, CHANNELS))
    assert seen == [implementation]


def linear_and_tokens(batch, tokens, inputs=8, outputs=24, bias=True):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias).double(), torch.randn(batch, tokens, inputs, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 40), (3, 5), (1, 5), (0, 5), (3, 0), (3, 1)], ids=str)
@pytest.mark.parametrize("lay_in", ["token_major", "channel_major", "step_2"])
@pytest.mark.parametrize("lay_out", [False, True])
def test_project(bias, shape, lay_in, lay_out):
    linear, x = linear_and_tokens(*shape, bias=bias)
    x = LAYOUTS[lay_in](x)
    out = project(linear, x, lay_out)
    assert is_channel_major(out) if lay_out else out.is_contiguous()
    leaves = [x.detach().requires_grad_(), *linear.parameters()]
    results = []
    for function in (lambda x: project(linear, x, lay_out), linear):
        out = function(leaves[0])
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(1))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_project_copies_nothing_by_image():
    linear, x = linear_and_tokens(3, 40)
    for lay in LAYOUTS["token_major"], LAYOUTS["channel_major"]:
        for grad in (False, True):
            with torch.set_grad_enabled(grad), Watch() as watch:
                project(linear, lay(x), True)
            extra = 1 if lay is channel_major else 0  # laying the input out is the test's
            assert len(watch.copies()) == extra
            assert watch.largest() == 3 * 40 * 24 * 8


def test_project_makes_no_gradient_for_every_image_of_few_tokens():
    linear, x = linear_and_tokens(50, 5)
    x = channel_major(x).requires_grad_()
    out = project(linear, x, True)
    with Watch() as watch:
        out.sum().backward()
    assert watch.largest() <= 50 * 5 * 24 * 8 < 50 * 8 * 24 * 8
    with torch.no_grad(), Watch() as watch:
        project(linear, x, True)
    assert not watch.copies()
    linear.requires_grad_(False)
    with Watch() as watch:
        project(linear, x, True)
    assert not watch.copies()


def test_project_under_autocast():
    linear, x = linear_and_tokens(3, 40)
    linear, x = linear.float(), channel_major(x.float())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with Watch() as watch:
            out = project(linear, x, True)
            expected = linear(x)
        assert project(linear.double(), x.double(), True).dtype == torch.float64
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    casts = [result.numel() for packet, result in watch.calls if packet is aten._to_copy]
    assert sorted(casts) == sorted([x.numel(), 24 * 8, 24] * 2), "the weight is not to be cast once an image"


class LowRank(nn.Linear):
    """As libraries for fine-tuning replace a linear map."""

    def forward(self, x):
        return super().forward(x) + x.flip(-1)[..., :1]


class Opaque(nn.Module):
    """A linear map whose weight is no tensor, as quantised ones are."""

    def __init__(self, linear):
        super().__init__()
        self.inner = linear

    def weight(self):
        raise AssertionError

    def forward(self, x):
        return self.inner(x)


def after(linear):
    linear.register_forward_hook(lambda module, inputs, out: out * 2)


def before(linear):
    linear.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


@pytest.mark.parametrize("hook", [after, before])
@pytest.mark.usefixtures("placement")
def test_hooks_of_projections(hook):
    theirs, ours = pair("SelfAttention")
    for module in (theirs, ours):
        hook(module.qkv_proj)
        hook(module.out_proj)
    x = channel_major(torch.randn(2, 40, CHANNELS, dtype=torch.float64))
    assert_same(ours, theirs, x)
    with torch.no_grad():
        assert is_channel_major(ours(x))


@pytest.mark.usefixtures("placement")
def test_replaced_projections():
    theirs, ours = pair("SelfAttention")
    x = channel_major(torch.randn(2, 40, CHANNELS, dtype=torch.float64))
    for module in (theirs, ours):
        low = LowRank(CHANNELS, 3 * CHANNELS).double()
        low.load_state_dict(module.qkv_proj.state_dict())
        module.qkv_proj = low
    assert_same(ours, theirs, x)
    for module in (theirs, ours):
        module.qkv_proj, module.out_proj = Opaque(module.qkv_proj), Opaque(module.out_proj)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.usefixtures("placement")
def test_a_pruned_projection():
    theirs, ours = pair("SelfAttention")
    x = channel_major(torch.randn(2, 40, CHANNELS, dtype=torch.float64))
    for module in (theirs, ours):
        for linear in (module.qkv_proj, module.out_proj):
            prune.l1_unstructured(linear, "weight", 0.4)
    assert_same(ours, theirs, x)


# Terms of the logits.


@families
@pytest.mark.parametrize("layout", ["token_major", "channel_major"])
@pytest.mark.usefixtures("placement")
def test_bias_mask_and_order(family, layout):
    theirs, ours = pair(family)
    heads = getattr(ours, "num_heads", 1)
    x = LAYOUTS[layout](torch.randn(2, 6, CHANNELS, dtype=torch.float64))
    mask = torch.rand(2, 1, 6, 6) > 0.3
    mask[..., 0] = True
    infinite = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    causal = torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    biases = [torch.randn(1, heads, 6, 6, dtype=torch.float64).requires_grad_() for _ in range(2)]
    biases[1].data.copy_(biases[0].data)
    outs = [ours(x, biases[0], mask, True), theirs(x, biases[1] + infinite + causal)]
    torch.testing.assert_close(*outs)
    for out in outs:
        out.cos().sum().backward()
    torch.testing.assert_close(biases[0].grad, biases[1].grad)
    torch.testing.assert_close(ours(x, mask=mask), theirs(x, infinite))
    torch.testing.assert_close(ours(x, is_causal=True), theirs(x, causal))


@families
def test_bias_table(family):
    theirs, ours = pair(family)
    heads = getattr(ours, "num_heads", 1)
    height, width = 2, 3
    x = torch.randn(2, 6, CHANNELS, dtype=torch.float64)
    table = torch.randn(3 * 5, heads, dtype=torch.float64, requires_grad=True)
    row = [(i // width - j // width + 1) * 5 + i % width - j % width + 2 for i in range(6) for j in range(6)]
    outs = [
        ours(x, bias_table=table, grid=(height, width)),
        theirs(x, table[row].view(6, 6, heads).permute(2, 0, 1).unsqueeze(0)),
    ]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.cos().sum(), table)[0] for out in outs))


def test_a_token_that_sees_nothing():
    ours = SelfAttention(CHANNELS, HEADS).eval()
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    out = ours(torch.randn(2, 5, CHANNELS), mask=mask)
    torch.testing.assert_close(out[:, 2], ours.out_proj.bias.expand(2, -1))
    assert not torch.allclose(out[:, 1], ours.out_proj.bias.expand(2, -1))


# Dropout.


def bare(p, heads=1, tokens=32, **options):
    """A module that returns its attention weights, all equal, when the tokens are unit vectors."""
    module = SelfAttention(tokens * heads, heads, p, **options)
    with torch.no_grad():
        nn.init.zeros_(module.qkv_proj.weight)
        nn.init.zeros_(module.qkv_proj.bias)
        nn.init.eye_(module.qkv_proj.weight[-tokens * heads :])
        nn.init.eye_(module.out_proj.weight)
        nn.init.zeros_(module.out_proj.bias)
    return module


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("implementation", ["triton", "torch", "reference"])
def test_dropout_drops_its_share(p, implementation, device):
    skip_without_kernels(implementation, device)
    tokens, heads, batch = 32, 2, 16
    module = bare(p, heads, tokens, backend=implementation).to(device)
    x = torch.eye(tokens, device=device).repeat(1, heads).expand(batch, -1, -1)
    weights = module(x).view(batch, tokens, heads, tokens)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / (tokens * (1 - p))))
    share, deviation = 1 - kept.double().mean().item(), math.sqrt(p * (1 - p) / kept.numel())
    assert abs(share - p) < 5 * deviation
    for axis in range(3):
        first, second = kept.unbind(axis)[:2]
        assert not torch.equal(first, second), f"the same weights are dropped along axis {axis}"
    assert (kept[:, 1:].float().mean((1, 2, 3)) - (1 - p)).abs().max() < 5 * deviation * batch**0.5 + 0.01
    torch.testing.assert_close(module.eval()(x), torch.full_like(weights, 1 / tokens).view(x.shape))


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_dropout_leaves_the_expectation(implementation):
    draws, tokens = 4000, 6
    module = SelfAttention(8, 2, 0.3, backend=implementation).double()
    x = torch.randn(1, tokens, 8, dtype=torch.float64)
    outs = module(x.expand(draws, -1, -1))
    error = (outs.mean(0) - module.eval()(x)[0]).abs()
    assert (error < 5 * outs.std(0) / draws**0.5).all()
    assert (outs.std(0) > 1e-3).all()


def test_dropout_is_for_training_alone():
    module = SelfAttention(8, 2, 0.5)
    x = torch.randn(2, 6, 8)
    assert not torch.equal(module(x), module(x))
    torch.manual_seed(5)
    first = module(x)
    torch.manual_seed(5)
    assert torch.equal(module(x), first)
    module.eval()
    assert torch.equal(module(x), module(x))
    module.dropout.train()  # as Monte Carlo dropout has it
    assert not torch.equal(module(x), module(x))
    module.dropout.p = 0.0
    assert torch.equal(module(x), module.eval()(x))


def test_everything_dropped():
    module = SelfAttention(8, 2, 1.0)
    out = module(torch.randn(2, 6, 8))
    torch.testing.assert_close(out, module.out_proj.bias.expand(out.shape))


# The modules as such.


@families
def test_initialisation_draws_what_the_tutorials_draw(family):
    theirs, ours = FAMILIES[family]
    torch.manual_seed(3)
    theirs = nn.Sequential(theirs(), nn.Linear(2, 2))
    torch.manual_seed(3)
    ours = nn.Sequential(ours(), nn.Linear(2, 2))
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("missing", ["qkv_proj.bias", "out_proj.weight"])
def test_loading_is_strict(missing):
    state = SelfAttention(8).state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=missing):
        SelfAttention(8).load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: SelfAttention(64, 7),
            ValueError,
            "embed_dim must be divisible by num_heads, got embed_dim=64, num_he",
        ),
        (lambda: MultiHeadSelfAttention(64, 7), ValueError, "embed_dim must be divisible by num_heads"),
        (lambda: SelfAttention(0), ValueError, "embed_dim must be a positive integer, got 0"),
        (lambda: SelfAttention(64.0), ValueError, r"embed_dim must be a positive integer, got 64\.0"),
        (lambda: SelfAttention(64, -2), ValueError, "num_heads must be a positive integer, got -2"),
        (lambda: MultiHeadSelfAttention("64", 2), ValueError, "embed_dim must be a positive integer, got '64'"),
        (lambda: SingleHeadSelfAttention(-1), ValueError, "embed_dim must be a positive integer, got -1"),
        (lambda: SelfAttention(64, dropout=1.5), ValueError, r"dropout must be a number from 0 to 1, got 1\.5"),
        (lambda: SelfAttention(64, dropout=-0.1), ValueError, r"dropout must be .*, got -0\.1"),
        (lambda: SelfAttention(64, dropout=None), ValueError, "dropout must be .*, got None"),
        (lambda: SelfAttention(64, backend="cuda"), ValueError, "backend must be one of .*, got 'cuda'"),
        (lambda: MultiHeadSelfAttention(64, 8, backend="gpu"), ValueError, "backend must be one of .*, got 'gpu'"),
        (lambda: SingleHeadSelfAttention(64, backend=""), ValueError, "backend must be one of .*, got ''"),
        (
            lambda: SingleHeadSelfAttention(64, compat="seed"),
            ValueError,
            "compat must be None or 'original', got 'seed'",
        ),
        (lambda: SelfAttention(64, 8, 0.1, False), TypeError, "positional"),
    ],
)
def test_refuses_at_construction(make, error, words):
    with pytest.raises(error, match=words):
        make()


@families
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: torch.randn(2, 3, 8), ValueError, r"x must be \(B, N, embed_dim\) with .* = 12, got \(2, 3, 8\)"),
        (lambda: torch.randn(3, 12), ValueError, r"x must be \(B, N, embed_dim\) .*, got \(3, 12\)"),
        (lambda: torch.randn(1, 2, 3, 12), ValueError, r"got \(1, 2, 3, 12\)"),
        (lambda: torch.randn(2, 3, 12).double(), TypeError, "x must have the dtype .*float32, got .*float64"),
        (lambda: torch.ones(2, 3, 12, dtype=torch.int64), TypeError, "x must have the dtype .*, got .*int64"),
        (lambda: [[1.0]], TypeError, "x must be a tensor, got list"),
        (lambda: torch.randn(2, 3, 12, device="meta"), ValueError, "x must be on the device .*cpu, got meta"),
    ],
)
def test_refuses_at_call(family, make, error, words):
    with pytest.raises(error, match=words):
        FAMILIES[family][1]()(make())


@families
@pytest.mark.parametrize("shape", [(0, 5), (2, 1), (2, 0)], ids=str)
@pytest.mark.parametrize("layout", ["token_major", "channel_major"])
@pytest.mark.usefixtures("placement")
def test_empty_and_single(family, shape, layout):
    theirs, ours = pair(family)
    x = LAYOUTS[layout](torch.randn(*shape, CHANNELS, dtype=torch.float64))
    assert_same(ours, theirs, x)


@families
@pytest.mark.parametrize("layout", ["token_major", "channel_major"])
@pytest.mark.usefixtures("placement")
def test_autocast(family, layout):
    theirs, ours = pair(family, torch.float32)
    x = LAYOUTS[layout](torch.randn(2, 40, CHANNELS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = outcome(ours, x), outcome(theirs, x)
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got / scale, expected / scale, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("family", ["SelfAttention", "MultiHead", "SingleHead"])
@pytest.mark.parametrize("layout", ["token_major", "channel_major"])
@pytest.mark.usefixtures("placement")
def test_compiles_to_one_graph(family, layout):
    torch._dynamo.reset()
    _, ours = pair(family)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = LAYOUTS[layout](torch.randn(2, 40, CHANNELS, dtype=torch.float64))
    for got, expected in zip(outcome(compiled, x), outcome(ours, x), strict=True):
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), ours.eval()(x))
    torch._dynamo.reset()


def copies(module):
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


@families
def test_copies(family, backend, device):
    ours = FAMILIES[family][1](backend=backend).to(device).eval()
    x = torch.randn(2, 5, CHANNELS, device=device)
    expected = ours(x)  # whatever a call might leave behind
    assert all(not value or isinstance(value, int | float | str) for value in public_state(ours).values())
    for other in copies(ours):
        assert repr(other) == repr(ours)
        assert torch.equal(other(x), expected)
    again = FAMILIES[family][1](backend=backend).to(device).eval()
    assert not torch.equal(again(x), expected)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), expected)


def public_state(module):
    """What a module holds besides what every nn.Module holds."""
    return {name: value for name, value in vars(module).items() if name not in vars(nn.Module())}


def test_options_are_shown():
    assert "num_heads=2, backend='torch'" in repr(SelfAttention(8, 2, backend="torch"))
    assert "Dropout(p=0.1" in repr(SelfAttention(8, 2))
    assert "backend" not in repr(SelfAttention(8, 2))
    assert "num_heads=2" in repr(MultiHeadSelfAttention(8, 2))
    assert "compat='original'" in repr(SingleHeadSelfAttention(8, compat="original"))


@families
def test_gradients_of_frozen_parts(family):
    _, ours = pair(family)
    x = channel_major(torch.randn(2, 40, CHANNELS, dtype=torch.float64))
    full = outcome(ours, x)
    ours.requires_grad_(False)
    x = x.detach().requires_grad_()
    dout = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).sin().view(x.shape)
    (dx,) = torch.autograd.grad(ours(x), x, dout)
    torch.testing.assert_close(dx, full[1])
    assert all(parameter.grad is None for parameter in ours.parameters())


@families
def test_equals_the_definition(family):
    """Against the operation's definition rather than the tutorials' words."""
    _, ours = pair(family)
    x = torch.randn(2, 6, CHANNELS, dtype=torch.float64)
    state = ours.state_dict()
    if family == "SelfAttention":
        parts = F.linear(x, state["qkv_proj.weight"], state["qkv_proj.bias"]).chunk(3, -1)
    else:
        parts = [F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"]) for name in ("query", "key", "value")]
    q, k, v = (heads_of(part, getattr(ours, "num_heads", 1)) for part in parts)
    out, _ = softmax_attention_reference(q, k, v, scale=1.0 if family == "SingleHead" else None)
    out = out.transpose(1, 2).flatten(2)
    if family == "SelfAttention":
        out = F.linear(out, state["out_proj.weight"], state["out_proj.bias"])
    if family == "MultiHead":
        out = F.linear(out, state["fc.weight"], state["fc.bias"]) + x
    torch.testing.assert_close(ours(x), out)
