"""attnk.TransformerEncoderLayer against the tutorials' class, re-written from what it computes, and its pre-norm."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import attnk
from attnk.modules.transformer import TransformerEncoderLayer

CHANNELS, HEADS = 12, 3


class TutorialAttention(nn.Module):
    def __init__(self, embed_dim, num_heads, dropout):
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(embed_dim, embed_dim * 3)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, bias=0.0):
        batch, tokens, channels = x.shape
        q, k, v = (
            part.reshape(batch, tokens, self.num_heads, channels // self.num_heads).transpose(1, 2)
            for part in self.qkv_proj(x).chunk(3, dim=-1)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias
        return self.out_proj((self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).reshape(x.shape))


class TutorialLayer(nn.Module):
    activation = nn.ReLU
    norm_first = False

    def __init__(self, embed_dim, num_heads=8, dropout=0.1, expansion_factor=4):
        super().__init__()
        self.self_attn = TutorialAttention(embed_dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.ffn = nn.Sequential(
            nn.Linear(embed_dim, embed_dim * expansion_factor),
            self.activation(),
            nn.Dropout(dropout),
            nn.Linear(embed_dim * expansion_factor, embed_dim),
            nn.Dropout(dropout),
        )

    def forward(self, x, bias=0.0):
        if self.norm_first:
            x = x + self.self_attn(self.norm1(x), bias)
            return x + self.ffn(self.norm2(x))
        x = self.norm1(x + self.self_attn(x, bias))
        return self.norm2(x + self.ffn(x))


class PreNorm(TutorialLayer):
    norm_first = True


class PreNormGelu(PreNorm):
    activation = nn.GELU


FAMILIES = {
    TutorialLayer: {},
    PreNorm: {"norm_first": True},
    PreNormGelu: {"norm_first": True, "activation": "gelu"},
}
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)


def pair(family, dtype=torch.float64, dropout=0.0, **options):
    theirs = family(CHANNELS, HEADS, dropout, 2).to(dtype)
    with torch.no_grad():
        for norm in (theirs.norm1, theirs.norm2):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-1, 1)
    ours = TransformerEncoderLayer(CHANNELS, HEADS, dropout, 2, **FAMILIES[family], **options).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def channel_major(x):
    return x.mT.contiguous().mT


LAYOUTS = {
    "token_major": torch.Tensor.contiguous,
    "channel_major": channel_major,
    "token_slice": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "expanded": lambda x: x[:1].expand(x.shape),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


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
    tolerances = tolerances or {"rtol": 1e-7, "atol": 1e-9}
    for got, expected in zip(outcome(module, x), outcome(other, x), strict=True):
        torch.testing.assert_close(got, expected, **tolerances)


@families
@layouts
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals(family, layout, training):
    theirs, ours = pair(family, dropout=0.0 if training else 0.4)
    x = LAYOUTS[layout](torch.randn(3, 9, CHANNELS, dtype=torch.float64))
    before = x.clone()
    assert_same(ours.train(training), theirs.train(training), x)
    assert torch.equal(x, before)


@families
@layouts
def test_the_output_is_token_major(family, layout):
    _, ours = pair(family)
    seen = []
    ours.self_attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    assert ours(LAYOUTS[layout](torch.randn(3, 9, CHANNELS, dtype=torch.float64))).is_contiguous()
    assert seen == [True]


@families
@pytest.mark.parametrize("implementation", ["triton", "torch", "reference"])
def test_equals_on_every_backend(family, implementation, device):
    skip_without_kernels(implementation, device)
    theirs, ours = pair(family, backend=implementation)
    assert ours.self_attn.backend == implementation
    x = torch.randn(2, 9, CHANNELS, dtype=torch.float64, device=device)
    assert_same(ours.to(device), theirs.to(device), x)


@families
@pytest.mark.parametrize("layout", ["token_major", "channel_major"])
def test_equals_in_float32(family, layout, device):
    theirs, ours = pair(family, torch.float32)
    x = LAYOUTS[layout](torch.randn(2, 50, CHANNELS, device=device))
    assert_same(ours.to(device), theirs.to(device), x, rtol=1e-3, atol=5e-5)


def test_trains_alike():
    theirs, ours = pair(TutorialLayer)
    inputs = [torch.randn(2, 5, CHANNELS, dtype=torch.float64) for _ in range(3)]
    for module in (theirs, ours):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        for x in inputs:
            optimizer.zero_grad()
            module(x).cos().mean().backward()
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


@families
def test_terms_of_the_logits_are_passed_on(family):
    theirs, ours = pair(family)
    x = torch.randn(2, 6, CHANNELS, dtype=torch.float64)
    bias = torch.randn(HEADS, 6, 6, dtype=torch.float64)
    mask = torch.rand(6, 6) > 0.3
    mask[:, 0] = True
    infinite = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    causal = torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1)
    table = torch.randn(3 * 5, HEADS, dtype=torch.float64)
    row = [(i // 3 - j // 3 + 1) * 5 + i % 3 - j % 3 + 2 for i in range(6) for j in range(6)]
    torch.testing.assert_close(ours(x, bias, mask), theirs(x, bias + infinite))
    torch.testing.assert_close(ours(x, is_causal=True), theirs(x, causal))
    torch.testing.assert_close(
        ours(x, bias_table=table, grid=(2, 3)), theirs(x, table[row].view(6, 6, HEADS).permute(2, 0, 1))
    )


# Dropout.


@families
def test_dropout_is_for_training_alone(family):
    _, ours = pair(family, dropout=0.5)
    x = torch.randn(2, 6, CHANNELS, dtype=torch.float64)
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))


@families
def test_everything_dropped(family):
    """Neither branch is left then, but the bias of the attention's projection."""
    _, ours = pair(family, dropout=1.0)
    x = torch.randn(2, 6, CHANNELS, dtype=torch.float64)
    expected = x + ours.self_attn.out_proj.bias
    if not ours.norm_first:
        expected = ours.norm2(ours.norm1(expected))
    torch.testing.assert_close(ours(x), expected)


def test_where_dropout_stands():
    layer = TransformerEncoderLayer(8, 2, 0.3)
    where = {name: part.p for name, part in layer.named_modules() if isinstance(part, nn.Dropout)}
    assert where == {"self_attn.dropout": 0.3, "ffn.2": 0.3, "ffn.4": 0.3}


def test_dropout_leaves_the_expectation():
    """Of the last dropout, the one that a sum alone follows."""
    _, ours = pair(PreNorm)
    ours.ffn[4].p = 0.3
    draws = 4000
    x = torch.randn(1, 4, CHANNELS, dtype=torch.float64)
    outs = ours(x.expand(draws, -1, -1))
    error = (outs.mean(0) - ours.eval()(x)[0]).abs()
    assert (error < 5 * outs.std(0) / draws**0.5).all()
    assert (outs.std(0) > 1e-4).all()


# The module as such.


def test_defaults_and_keys_are_the_tutorials():
    torch.manual_seed(3)
    theirs = TutorialLayer(64)
    torch.manual_seed(3)
    ours = TransformerEncoderLayer(64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert ours.self_attn.num_heads == 8
    assert ours.self_attn.dropout.p == ours.ffn[2].p == ours.ffn[4].p == 0.1
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="norm2"):
        ours.load_state_dict({name: tensor for name, tensor in theirs.state_dict().items() if "norm2" not in name})


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((64, 7), {}, "embed_dim must be divisible by num_heads, got embed_dim=64, num_heads=7"),
        ((0,), {}, "embed_dim must be a positive integer, got 0"),
        (("64",), {}, "embed_dim must be a positive integer, got '64'"),
        ((64, 0), {}, "num_heads must be a positive integer, got 0"),
        ((64, 8, 2.0), {}, r"dropout must be a number from 0 to 1, got 2\.0"),
        ((64,), {"expansion_factor": 0}, "expansion_factor must be a number .* one hidden channel, got 0"),
        ((64,), {"expansion_factor": -1}, "expansion_factor must be .*, got -1"),
        ((64,), {"expansion_factor": "4"}, "expansion_factor must be .*, got '4'"),
        ((64,), {"expansion_factor": math.inf}, "expansion_factor must be .*, got inf"),
        ((64,), {"expansion_factor": math.nan}, "expansion_factor must be .*, got nan"),
        ((64,), {"activation": "tanh"}, "activation must be one of 'relu', 'gelu', got 'tanh'"),
        ((64,), {"backend": "cuda"}, "backend must be one of .*, got 'cuda'"),
    ],
    ids=str,
)
def test_refuses_at_construction(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        TransformerEncoderLayer(*arguments, **options)


@families
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: torch.randn(2, 3, 8), ValueError, r"x must be \(B, N, embed_dim\) with .* = 12, got \(2, 3, 8\)"),
        (lambda: torch.randn(3, 12), ValueError, r"x must be \(B, N, embed_dim\) .*, got \(3, 12\)"),
        (lambda: torch.randn(2, 3, 12).double(), TypeError, "x must have the dtype .*float32, got .*float64"),
        (lambda: None, TypeError, "x must be a tensor, got NoneType"),
    ],
)
def test_refuses_at_call(family, make, error, words):
    with pytest.raises(error, match=words):
        TransformerEncoderLayer(CHANNELS, HEADS, **FAMILIES[family])(make())


def test_expansion_by_a_fraction():
    assert TransformerEncoderLayer(12, 3, expansion_factor=2.5).ffn[0].weight.shape == (30, 12)


@families
@pytest.mark.parametrize("shape", [(0, 5), (2, 1), (2, 0)], ids=str)
@pytest.mark.parametrize("layout", ["token_major", "channel_major"])
def test_empty_and_single(family, shape, layout):
    theirs, ours = pair(family)
    assert_same(ours, theirs, LAYOUTS[layout](torch.randn(*shape, CHANNELS, dtype=torch.float64)))


@families
@pytest.mark.parametrize("layout", ["token_major", "channel_major"])
def test_autocast(family, layout):
    theirs, ours = pair(family, torch.float32)
    x = LAYOUTS[layout](torch.randn(2, 20, CHANNELS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = outcome(ours, x), outcome(theirs, x)
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got / scale, expected / scale, rtol=5e-2, atol=5e-2)


@families
def test_compiles_to_one_graph(family):
    torch._dynamo.reset()
    _, ours = pair(family)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for layout in ("token_major", "channel_major"):
        x = LAYOUTS[layout](torch.randn(2, 7, CHANNELS, dtype=torch.float64))
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
    _, ours = pair(family, torch.float32, dropout=0.2, backend=backend)
    x = torch.randn(2, 5, CHANNELS, device=device)
    expected = ours.to(device).eval()(x)
    for other in copies(ours):
        assert repr(other) == repr(ours)
        assert torch.equal(other(x), expected)
    again = TransformerEncoderLayer(CHANNELS, HEADS, 0.2, 2, **FAMILIES[family], backend=backend).to(device).eval()
    assert not torch.equal(again(x), expected)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), expected)


def test_options_are_shown():
    text = repr(TransformerEncoderLayer(8, 2, norm_first=True, activation="gelu", backend="torch"))
    for words in ("norm_first=True", "num_heads=2", "GELU", "backend='torch'"):
        assert words in text


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing(use_reentrant, dropout):
    from torch.utils.checkpoint import checkpoint

    _, ours = pair(TutorialLayer, dropout=dropout)
    value = torch.randn(2, 6, CHANNELS, dtype=torch.float64)
    results = []
    for run in (ours, lambda x: checkpoint(ours, x, use_reentrant=use_reentrant)):
        torch.manual_seed(7)
        ours.zero_grad()
        x = value.clone().requires_grad_()
        out = run(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(parameter.grad for parameter in ours.parameters())])
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))
