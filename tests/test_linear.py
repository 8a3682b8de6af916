"""``LinearAttention`` and ``EfficientAttention`` against published classes, re-written here from what they compute."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnk
from attnk.modules.linear import EfficientAttention, LinearAttention
from attnk.reference.linear_attention import linear_attention_reference
from attnk.testing import assert_matches_reference, layouts

EPS = {"relu": 1e-15, "elu": 1e-6, "softmax": 0.0}


class LiteLA(nn.Module):
    """SANA's, without normalization of q and k."""

    def __init__(self, dim, num_heads, bias=False):
        super().__init__()
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, channels = x.shape
        q, k, v = (each.mT.reshape(batch, -1, self.head_dim, tokens) for each in self.qkv(x).chunk(3, -1))
        q, k, v = F.relu(q), F.relu(k).mT, F.pad(v, (0, 0, 0, 1), value=1)
        out = v @ k @ q
        out = out[:, :, :-1] / (out[:, :, -1:] + 1e-15)
        return self.proj(out.reshape(batch, channels, tokens).mT)


class PublishedEfficientAttention(nn.Module):
    """Shen et al.'s."""

    def __init__(self, in_channels, key_channels, head_count, value_channels):
        super().__init__()
        self.head_count = head_count
        self.keys = nn.Conv2d(in_channels, key_channels, 1)
        self.queries = nn.Conv2d(in_channels, key_channels, 1)
        self.values = nn.Conv2d(in_channels, value_channels, 1)
        self.reprojection = nn.Conv2d(value_channels, in_channels, 1)

    def forward(self, x):
        attended = []
        maps = (conv(x).flatten(2).chunk(self.head_count, 1) for conv in (self.queries, self.keys, self.values))
        for query, key, value in zip(*maps, strict=True):
            context = F.softmax(key, 2) @ value.transpose(1, 2)
            attended.append(context.transpose(1, 2) @ F.softmax(query, 1))
        return self.reprojection(torch.cat(attended, 1).unflatten(2, x.shape[2:])) + x


def with_parameters(module):
    """The module as a function of its input and its parameters."""
    return lambda x, **parameters: torch.func.functional_call(
        module, {name.replace("_", ".", 1): value for name, value in parameters.items()}, (x,)
    )


def parameters_of(module):
    return {name.replace(".", "_", 1): parameter.detach() for name, parameter in module.named_parameters()}


def check(ours, theirs, x, memory_format=torch.contiguous_format, **to):
    """The same keys, outputs and gradients of the input and of every parameter."""
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.to(**to), theirs.to(**to)
    assert_matches_reference(
        lambda **each: with_parameters(ours)(**each).contiguous(memory_format=memory_format),
        lambda **each: with_parameters(theirs)(**each).contiguous(memory_format=memory_format),
        {"x": x.to(**to), **parameters_of(ours)},
        dout=torch.randn_like(x).to(**to),
    )


class Defined(nn.Module):
    """LinearAttention by the definition."""

    def __init__(self, ours):
        super().__init__()
        self.qkv, self.proj = copy.deepcopy(ours.qkv), copy.deepcopy(ours.proj)
        self.num_heads, self.options = ours.num_heads, {"feature_map": ours.feature_map}
        self.eps = EPS[ours.feature_map] if ours.eps is None else ours.eps

    def forward(self, x):
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        out = linear_attention_reference(q, k, v, **self.options, eps=self.eps)
        return self.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [False, True])
def test_is_lite_la(backend, device, bias):
    ours = LinearAttention(24, 3, qkv_bias=bias, backend=backend)
    check(ours, LiteLA(24, 3, bias), torch.randn(2, 19, 24), dtype=torch.float64, device=device)
    assert set(ours.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias"} | ({"qkv.bias"} if bias else set())


@pytest.mark.parametrize(
    ("feature_map", "eps"), [("relu", None), ("elu", None), ("softmax", None), ("elu", 0.5)], ids=str
)
def test_feature_maps(backend, device, feature_map, eps):
    ours = LinearAttention(16, 2, feature_map, eps=eps, backend=backend)
    for dtype in (torch.float64, torch.float32):
        check(ours, Defined(ours), torch.randn(2, 19, 16), dtype=dtype, device=device)


@pytest.mark.parametrize("layout", [name for name, _ in layouts(torch.zeros(1, 1, 1, 1))])
def test_maps(device, layout):
    """Pixels are tokens, whatever the memory format, which is kept."""
    module = LinearAttention(16, 2, backend="torch").to(device, torch.float64)
    x = dict(layouts(torch.randn(2, 16, 5, 7, dtype=torch.float64, device=device)))[layout]
    out = module(x)
    expected = module(x.flatten(2).mT.contiguous()).mT.unflatten(2, (5, 7))
    torch.testing.assert_close(out, expected)
    memory_format = torch.channels_last if x.stride(1) < x.stride(3) else torch.contiguous_format
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_maps(backend, device, memory_format):
    ours = LinearAttention(16, 2, "elu", backend=backend).double().to(device)
    tokens = Defined(ours).to(device)
    x = torch.randn(2, 16, 7, 8, dtype=torch.float64, device=device).to(memory_format=memory_format)

    def expected(x, **parameters):
        out = with_parameters(tokens)(x.flatten(2).mT, **parameters).mT.unflatten(2, (7, 8))
        return out.contiguous(memory_format=memory_format)

    assert_matches_reference(with_parameters(ours), expected, {"x": x, **parameters_of(ours)})


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("sizes", [(16, 8, 2, 8), (12, 6, 1, 10), (8, 12, 3, 6)], ids=str)
def test_is_efficient_attention(backend, device, sizes, memory_format):
    ours, theirs = EfficientAttention(*sizes, backend=backend), PublishedEfficientAttention(*sizes)
    x = torch.randn(2, sizes[0], 5, 6).to(memory_format=memory_format)
    # of float64, PyTorch's own convolutions are not channels_last on the CPU
    dtype = torch.float64 if memory_format == torch.contiguous_format else torch.float32
    check(ours, theirs, x, memory_format, dtype=dtype, device=device)
    out = ours(x.to(device, dtype))
    assert out.is_contiguous(memory_format=memory_format)


def test_efficient_attention_without_a_batch(backend, device):
    module = EfficientAttention(8, 8, 2, 4, backend=backend).to(device)
    x = torch.randn(2, 8, 3, 5, device=device)
    torch.testing.assert_close(module(x[0]), module(x)[0])


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the names of operators that copy."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::copy_", "aten::clone", "aten::_to_copy", "aten::contiguous"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "map", "efficient"])
def test_no_copies(device, kind, channels_last, monkeypatch):
    """Views of projections reach the operation as they lie, and its result the next projection."""
    from attnk.fallback import linear_attention as fallback

    seen = []
    monkeypatch.setattr(
        fallback, "linear_attention_forward",
        lambda q, k, v, *options: seen.append((q, k, v)) or (torch.empty_like(q), q.new_empty(0), q.new_empty(0)),
    )  # fmt: skip
    module = EfficientAttention(16, 16, 2, 16) if kind == "efficient" else LinearAttention(16, 2)
    x = torch.randn(2, 16, 4, 5, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    if kind == "tokens":
        x = x.flatten(2).mT
    with torch.no_grad(), Copies() as copies:
        module.to(device)(x)
    assert not copies.names
    if kind != "efficient":
        q, k, v = seen[0]
        assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(device, dtype):
    x = torch.randn(2, 16, 4, 5, device=device)
    for module in (LinearAttention(16, 2), EfficientAttention(16, 8, 2, 8)):
        module.to(device)
        expected = module(x)
        with torch.autocast(device, dtype):
            out = module(x)
            out.float().square().mean().backward()
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
        out = copy.deepcopy(module).to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", [LinearAttention, EfficientAttention])
def test_compile(device, kind, fresh_dynamo):
    module = (kind(8, 2) if kind is LinearAttention else kind(8, 8, 2, 8)).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 3, 5, device=device).to(memory_format=memory_format).requires_grad_()
        results = []
        for each in (module, compiled):
            out = each(x)
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
        torch.testing.assert_close(*results)


def test_empty_batches_and_tokens(backend, device):
    module = LinearAttention(8, 2, backend=backend).to(device)
    for shape in ((0, 5, 8), (2, 0, 8), (0, 8, 3, 3), (2, 8, 0, 3)):
        assert module(torch.randn(shape, device=device)).shape == shape


def test_state_and_copies():
    for module in (LinearAttention(8, 2, "elu", qkv_bias=True), EfficientAttention(8, 8, 2, 8)):
        x = torch.randn(1, 8, 3, 3)
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        buffer.seek(0)
        other = copy.deepcopy(module)
        other.load_state_dict(torch.load(buffer))
        for each in (other, pickle.loads(pickle.dumps(module))):
            assert torch.equal(each(x), module(x))


def test_repr():
    words = repr(LinearAttention(8, 2, "elu", eps=0.5, backend="torch"))
    assert "num_heads=2, feature_map='elu', eps=0.5, backend='torch'" in words
    assert "head_count=2" in repr(EfficientAttention(8, 8, 2, 8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LinearAttention(0, 2), ValueError, "dim must be a positive integer, got 0"),
        (lambda: LinearAttention(8, 2.0), ValueError, "num_heads must be a positive integer, got 2.0"),
        (lambda: LinearAttention(8, 3), ValueError, "dim must be divisible by num_heads, got dim=8, num_heads=3"),
        (lambda: LinearAttention(8, 2, "gelu"), ValueError,
         "feature_map must be one of 'relu', 'elu', 'softmax', got 'gelu'"),
        (lambda: LinearAttention(8, 2, "softmax", eps=1e-6), ValueError, "eps must be None with .*, got 1e-06"),
        (lambda: LinearAttention(8, 2, eps=-1), ValueError, "eps must be a finite number of at least 0, got -1"),
        (lambda: LinearAttention(8, 2, backend="cuda"), ValueError, "backend must be one of .*, got 'cuda'"),
        (lambda: LinearAttention(8, 2)([1.0]), TypeError, "x must be a tensor, got list"),
        (lambda: LinearAttention(8, 2)(torch.zeros(2, 5, 7)), ValueError,
         r"x must be \(B, N, embed_dim\) with embed_dim = 8, got \(2, 5, 7\)"),
        (lambda: LinearAttention(8, 2)(torch.zeros(2, 5, 8, 8)), ValueError,
         r"x must be \(B, C, H, W\) with C = 8, got \(2, 5, 8, 8\)"),
        (lambda: LinearAttention(8, 2)(torch.zeros(5, 8)), ValueError, r"x must be .*, got \(5, 8\)"),
        (lambda: LinearAttention(8, 2)(torch.zeros(2, 5, 8).double()), TypeError,
         "x must have the dtype of the module, torch.float32, got torch.float64 .*"),
        (lambda: EfficientAttention(8, 0, 2, 8), ValueError, "key_channels must be a positive integer, got 0"),
        (lambda: EfficientAttention(8, 8, 3, 9), ValueError,
         "key_channels must be divisible by head_count, got key_channels=8, head_count=3"),
        (lambda: EfficientAttention(8, 9, 3, 8), ValueError,
         "value_channels must be divisible by head_count, got value_channels=8, head_count=3"),
        (lambda: EfficientAttention(8, 8, 2, 8, backend="cuda"), ValueError, "backend must be one of .*, got 'cuda'"),
        (lambda: EfficientAttention(8, 8, 2, 8)(torch.zeros(2, 7, 3, 3)), ValueError,
         r"x must be .*, got \(2, 7, 3, 3\)"),
        (lambda: EfficientAttention(8, 8, 2, 8)(None), TypeError, "x must be a tensor, got NoneType"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        call()


def test_exported_names():
    assert attnk.LinearAttention is LinearAttention
    assert attnk.EfficientAttention is EfficientAttention
