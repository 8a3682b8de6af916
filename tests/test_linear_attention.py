"""``attnk.linear_attention``: values, gradients, layouts, edges, errors, its behaviour inside PyTorch, bytes."""

import contextlib
import functools
import math
import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from attention_inputs import LAYOUTS, ORDERS_OF_RESULTS, Inputs, arranged, draw
from helpers import assert_same_bits, needs_interpreter, one_by_one, pairwise
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import attnk
from attnk import dispatch
from attnk.fallback import linear_attention as fallback
from attnk.ops import linear_attention as operation
from attnk.reference.linear_attention import linear_attention_reference
from attnk.testing import Meter, assert_matches_reference

KERNELS = "attnk.kernels.linear_attention"
DTYPES = (torch.float64, torch.float32, torch.float16)
EPS = {"relu": 1e-15, "elu": 1e-6, "softmax": 0.0}  # the published ones
NAMES = ("q", "k", "v")
MAPS = pytest.mark.parametrize("feature_map", list(EPS))


@pytest.fixture
def kernels():
    return pytest.importorskip(KERNELS)


@contextlib.contextmanager
def cut(backend: str, block_n: int = 16, block_v: int = 16, slab: int = 32) -> Iterator[None]:
    """Every call inside is cut up small: the kernels' tiles and slabs, and the heads at once in PyTorch."""
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            from attnk.kernels.tuning import LinearAttentionConfig, LinearTile

            tile = LinearTile(block_n, block_v, num_warps=4, num_stages=1)
            config = LinearAttentionConfig(tile, tile, tile, tile)
            stack.enter_context(mock.patch(f"{KERNELS}.linear_attention_config", return_value=config))
            stack.enter_context(mock.patch(f"{KERNELS}.LINEAR_ATTENTION_SLAB", slab))
        for name in ("CPU_BLOCK_ELEMENTS", "BLOCK_ELEMENTS"):
            stack.enter_context(mock.patch.object(fallback, name, 100))
        yield


def fused(backend: str, **options: Any) -> Callable[..., torch.Tensor]:
    """The operation, called with tensors by name."""
    return functools.partial(attnk.linear_attention, **options, backend=backend)


def definition(feature_map: str = "relu", eps: float | None = None) -> Callable[..., torch.Tensor]:
    """The definition, called alike."""
    eps = EPS[feature_map] if eps is None else eps
    return functools.partial(linear_attention_reference, feature_map=feature_map, eps=eps)


def check(backend: str, inputs: Inputs, *, grads: Any = None, dout: Any = None, **options: Any) -> None:
    """Values and gradients against the definition."""
    assert_matches_reference(fused(backend, **options), definition(**options), inputs, grads=grads, dout=dout)


def run(backend: str, inputs: Inputs, **options: Any) -> list[torch.Tensor]:
    """The output and all gradients, for comparing bits."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out = fused(backend, **options)(**leaves)
    dout = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout)]


# Values and gradients


@pytest.mark.parametrize(
    "case",
    pairwise(
        feature_map=EPS,
        dim=(8, 16, 24, 40),
        v_dim=(None, 24, 59),
        tokens=((17, 17), (2, 40), (40, 3)),
        dtype=DTYPES,
        block_v=(16, 64),
    ),
)
def test_matches_reference(backend, device, case):
    inputs = draw(case["tokens"], case["dim"], case["v_dim"], case["dtype"], device, batch=1)
    with cut(backend, 32, case["block_v"]):
        check(backend, inputs, feature_map=case["feature_map"])


@MAPS
@pytest.mark.parametrize("n_queries", [1, 20])
def test_one_key(backend, device, feature_map, n_queries):
    """Every query gets its value, and of softmax the weights are 1 and their gradients nothing but rounding."""
    inputs = draw((n_queries, 1), 8, None, torch.float32, device, batch=1)
    inputs |= {name: inputs[name].abs() for name in "qk"}
    out, dq, dk, dv = run(backend, inputs, feature_map=feature_map)
    torch.testing.assert_close(out, inputs["v"].expand(out.shape))
    torch.testing.assert_close(dv, torch.linspace(-1, 1, out.numel()).view(out.shape).sum(2, keepdim=True).to(dv))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("dims", "feature_map"),
    [((128, 128), "relu"), ((256, 8), "elu"), ((5, 256), "softmax"), ((72, 96), "elu"), ((256, 8), "softmax")],
    ids=str,
)
def test_wide_heads(backend, device, dims, feature_map):
    check(backend, draw((5, 7), *dims, torch.float16, device, batch=1, heads=1), feature_map=feature_map)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "dim"), [(1024, 32), (3000, 64), (784, 96), (784, 128), (300, 192), (300, 256)])
@pytest.mark.parametrize("layout", ["packed", "packed_map"])
@MAPS
def test_on_a_gpu(feature_map, layout, tokens, dim, dtype):
    """The table's own configurations, in every precision."""
    inputs = draw((tokens, tokens), dim, None, dtype, "cuda", heads=4, layouts=layout)
    check("triton", inputs, feature_map=feature_map)


@MAPS
@pytest.mark.parametrize(("slab", "block_v", "dtype"), [(16, 64, torch.float64), (64, 16, torch.float32)])
def test_slabs(kernels, device, slab, block_v, feature_map, dtype):
    """Partial states of some tokens, the last slab shorter; of several columns of values and of one."""
    inputs = draw((65, 83), 16, 24, dtype, device, batch=1, heads=1)
    inputs["k"][:, :, :40] -= 5  # the maxima of the slabs differ
    with cut("triton", 16, block_v, slab):
        check("triton", inputs, feature_map=feature_map)


@pytest.mark.parametrize("tokens", [(15, 16), (16, 15), (17, 32), (33, 31), (31, 33), (32, 17)], ids=str)
def test_sizes_around_the_blocks(kernels, device, tokens):
    with cut("triton", slab=16):
        feature_map = list(EPS)[tokens[0] % 3]
        check("triton", draw(tokens, 16, None, torch.float64, device, batch=1, heads=1), feature_map=feature_map)


def test_programs_are_bounded(kernels, device, monkeypatch):
    """Heads enough for every multiprocessor leave tokens in one slab, which takes several steps."""
    monkeypatch.setattr(f"{KERNELS}.LINEAR_ATTENTION_PROGRAMS", 1)
    for feature_map in EPS:
        with cut("triton", slab=1):
            inputs = draw((50, 40), 16, None, torch.float64, device, batch=1, heads=1)
            check("triton", inputs, feature_map=feature_map)


@pytest.mark.parametrize("elements", [1, 16 * 20, 16 * 20 * 3, 16 * 20 * 7, 10**6])
@MAPS
def test_parts_in_pytorch(device, elements, feature_map, monkeypatch):
    monkeypatch.setattr(fallback, "CPU_BLOCK_ELEMENTS", elements)
    for layout in ("contiguous", "tokens_outside"):
        inputs = draw((20, 13), 16, 8, torch.float64, device, batch=4, heads=3, layouts=layout)
        check("torch", inputs, feature_map=feature_map)


@MAPS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_pytorch(device, feature_map, dtype):
    check("torch", draw((33, 400), 24, None, dtype, device), feature_map=feature_map)


def lite_mla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-15) -> torch.Tensor:
    """As EfficientViT and SANA write it, channels before tokens, values padded with ones."""
    q, k, v = (F.relu(q).mT, F.relu(k), F.pad(v.mT, (0, 0, 0, 1), value=1))
    out = (v @ k) @ q
    return (out[:, :, :-1] / (out[:, :, -1:] + eps)).mT


def katharopoulos(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """As fast-transformers write it, tokens before heads."""
    q, k, v = (F.elu(q).transpose(1, 2) + 1, F.elu(k).transpose(1, 2) + 1, v.transpose(1, 2))
    state = torch.einsum("nshd,nshm->nhmd", k, v)
    normalizer = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + eps)
    return torch.einsum("nlhd,nhmd,nlh->nlhm", q, state, normalizer).transpose(1, 2)


def shen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As efficient attention is written, channels before tokens."""
    context = F.softmax(k.mT, dim=3) @ v
    return (context.mT @ F.softmax(q.mT, dim=2)).mT


@pytest.mark.parametrize(
    ("feature_map", "published"), [("relu", lite_mla), ("elu", katharopoulos), ("softmax", shen)], ids=list(EPS)
)
@pytest.mark.parametrize("eps", [None, 0.5])
def test_equals_published_code(backend, device, feature_map, published, eps):
    if eps is not None and feature_map == "softmax":
        pytest.skip("it has no eps")
    inputs = draw((17, 20), 8, 12, torch.float64, device)
    theirs = published if eps is None else functools.partial(published, eps=eps)
    ours = fused(backend, feature_map=feature_map, eps=eps)
    assert_matches_reference(
        lambda **each: ours(**each).contiguous(), lambda **each: theirs(**each).contiguous(), inputs
    )


@pytest.mark.parametrize("eps", [0, 0.1, 1e-300])
@pytest.mark.parametrize("feature_map", ["relu", "elu"])
def test_eps(backend, device, feature_map, eps):
    """In float64 all its digits count; an argument of a kernel has 32 bits."""
    inputs = draw((17, 20), 8, None, torch.float64, device, batch=1, heads=1)
    inputs["k"] = inputs["k"] * 0.1 - 2 * (feature_map == "elu")  # the denominators are not far from eps
    check(backend, inputs, feature_map=feature_map, eps=eps)


def test_weights_sum_to_one(backend, device):
    """Of values that are 1 everywhere, whatever the feature map, the result is 1."""
    inputs = draw((17, 100), 8, device=device, batch=1) | {"v": torch.ones(1, 2, 100, 5, device=device)}
    for feature_map in EPS:
        out = attnk.linear_attention(**inputs, feature_map=feature_map, backend=backend)
        seen = inputs["q"].amax(-1) > 0 if feature_map == "relu" else torch.ones(1, 2, 17, dtype=torch.bool)
        torch.testing.assert_close(out[seen], torch.ones_like(out[seen]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_tokens", [2**16, 100_000])
def test_long_sequences_in_pytorch(n_tokens, device):
    """N x N numbers would be tens of gigabytes."""
    inputs = draw((n_tokens, n_tokens), 4, device=device, batch=1, heads=1)
    results = run("torch", inputs)
    assert all(result.isfinite().all() for result in results)
    torch.testing.assert_close(results[0], definition()(**inputs))


# Edges: zero rows, empty, wrong, infinite, not a number


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("where", ["a query", "all queries", "a key", "all keys"])
def test_nothing_positive(backend, device, where, dtype):
    """relu leaves nothing of some tokens: 0, and gradients of 0 rather than of 1e15."""
    inputs = draw((17, 20), 8, None, dtype, device, batch=1)
    name, rows = ("q" if "quer" in where else "k"), (slice(3, 5) if "a " in where else slice(None))
    inputs[name][:, :, rows] = -inputs[name][:, :, rows].abs()
    check(backend, inputs)
    out, *grads = run(backend, inputs)
    assert all(tensor.isfinite().all() for tensor in (out, *grads))
    if where == "a query":
        assert not out[:, :, 3:5].any()
        assert not grads[0][:, :, 3:5].any()
    elif where != "a key":
        assert not out.any()


def test_zeros_have_the_gradient_of_relu(backend, device):
    inputs = draw((17, 20), 8, None, torch.float64, device, batch=1)
    inputs["q"][:, :, ::3, ::2] = 0
    inputs["k"][:, :, ::2, ::3] = 0
    inputs["k"][:, :, 1, 1] = -0.0
    check(backend, inputs)


@pytest.mark.parametrize(
    "sizes",
    [(0, 2, 5, 7, 8, 8), (2, 0, 5, 7, 8, 8), (2, 2, 0, 7, 8, 8), (2, 2, 5, 0, 8, 8), (2, 2, 0, 0, 8, 8),
     (2, 2, 5, 7, 8, 0), (0, 0, 0, 0, 8, 0)],
    ids=str,
)  # fmt: skip
@MAPS
def test_empty(backend, device, sizes, feature_map):
    batch, heads, n_queries, n_keys, dim, v_dim = sizes
    leaves = [
        torch.randn(shape, device=device, requires_grad=True)
        for shape in ((batch, heads, n_queries, dim), (batch, heads, n_keys, dim), (batch, heads, n_keys, v_dim))
    ]
    out = attnk.linear_attention(*leaves, feature_map=feature_map, backend=backend)
    assert out.shape == (batch, heads, n_queries, v_dim)
    assert not out.any()
    out.sum().backward()
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.isfinite().all()


@MAPS
def test_without_a_batch(backend, device, feature_map):
    inputs = {name: tensor[0] for name, tensor in draw(dtype=torch.float64, device=device, batch=1).items()}

    def expected(**tensors: torch.Tensor) -> torch.Tensor:
        return definition(feature_map)(**{name: tensor[None] for name, tensor in tensors.items()})[0]

    assert_matches_reference(fused(backend, feature_map=feature_map), expected, inputs)


@pytest.mark.parametrize("what", ["nan_query", "nan_key", "nan_value", "inf_key", "minus_inf_key", "inf_value"])
@MAPS
def test_nan_and_infinities(backend, device, feature_map, what):
    inputs = draw((17, 20), 8, None, torch.float16 if "key" in what else torch.float32, device, batch=1)
    value = math.nan if "nan" in what else -math.inf if "minus" in what else math.inf
    inputs[{"query": "q", "key": "k", "value": "v"}[what.split("_")[-1]]][0, 1, 4, 3] = value
    with cut(backend, slab=16):
        check(backend, inputs, feature_map=feature_map)


def test_keys_of_minus_infinity(backend, device):
    """In some slabs, then in all, a feature of the keys has no weight at all."""
    inputs = draw((17, 40), 8, None, torch.float64, device, batch=1, heads=1)
    inputs["k"][:, :, :20, 2] = -math.inf
    inputs["k"][:, :, 30:, 5] = -math.inf
    with cut(backend, slab=16):
        check(backend, inputs, feature_map="softmax")
        inputs["k"][..., 2] = -math.inf
        check(backend, inputs, feature_map="softmax")


@MAPS
def test_large_and_small_numbers(backend, device, feature_map):
    """Exponentials do not overflow, nor does a state of half precision's sums."""
    inputs = draw((17, 40), 8, None, torch.float16, device, batch=1)
    for factor in (1e-3, 300.0):
        scaled = {name: tensor * factor for name, tensor in inputs.items()}
        if feature_map != "softmax" or factor < 1:  # what saturates has gradients of rounding alone
            check(backend, scaled, feature_map=feature_map, **({} if feature_map == "softmax" else {"eps": 1e-6}))
        results = run(backend, scaled, feature_map=feature_map)
        assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize(
    ("layout", "dim", "feature_map"),
    [("contiguous", 7, "elu"), ("channel_major", 24, "softmax"), ("step_2", 7, "softmax"), ("contiguous", 24, "relu")],
)
def test_nan_beside_the_tensors_does_not_leak(backend, device, layout, dim, feature_map):
    inputs = {}
    for name, tensor in draw((17, 20), dim, device=device, batch=1).items():
        larger = torch.full((1, 2, 60, dim + 30), math.nan, device=device)
        inner = arranged(larger, layout)[:, :, 5 : 5 + tensor.shape[2], 3 : 3 + dim]
        inputs[name] = inner.copy_(tensor)
    dout = torch.full((1, 2, 40, 90), math.nan, device=device)[..., 3:20, 5 : 5 + dim]
    ours = fused(backend, feature_map=feature_map)
    assert_matches_reference(
        lambda **each: ours(**each).contiguous(),
        definition(feature_map),
        inputs,
        dout=dout.copy_(torch.randn(1, 2, 17, dim)),
    )


Q = torch.zeros(2, 4, 6, 8)
K = torch.zeros(2, 4, 5, 8)
MUST_BE_FLOAT = "must be float16, bfloat16, float32 or float64"
MUST_HAVE_AXES = r"must be \(B, heads, N, D\) or \(heads, N, D\)"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([1.0], K, K), TypeError, "q must be a tensor, got list"),
        (lambda f: f(Q, None, K), TypeError, "k must be a tensor, got NoneType"),
        (lambda f: f(Q, K, 1.0), TypeError, "v must be a tensor, got float"),
        (lambda f: f(Q[0, 0], K, K), ValueError, rf"q {MUST_HAVE_AXES}, got 2 dimensions: \(6, 8\)"),
        (lambda f: f(Q, K[None], K), ValueError, rf"k {MUST_HAVE_AXES}, got 5 dimensions: \(1, 2, 4, 5, 8\)"),
        (lambda f: f(Q.int(), K, K), TypeError, f"q {MUST_BE_FLOAT}, got torch.int32"),
        (lambda f: f(Q, K, K.cfloat()), TypeError, f"v {MUST_BE_FLOAT}, got torch.complex64"),
        (lambda f: f(Q, K.double(), K), TypeError, "k must have the dtype of q, torch.float32, got torch.float64"),
        (lambda f: f(Q, K, K.half()), TypeError, "v must have the dtype of q, torch.float32, got torch.float16"),
        (lambda f: f(Q, K.to("meta"), K), ValueError, "k must be on the device of q, cpu, got meta"),
        (lambda f: f(Q, K[0], K), ValueError, r"k must have the batch and heads of q, .*, got \(4, 5, 8\)"),
        (lambda f: f(Q, K[:1], K[:1]), ValueError, r"k must have the batch and heads of q, .*, got \(1, 4, 5, 8\)"),
        (lambda f: f(Q, K, K[:, :2]), ValueError,
         r"v must have the batch and heads of q, \(2, 4, 6, 8\), got \(2, 2, 5, 8\)"),
        (lambda f: f(Q[..., :0], K[..., :0], K), ValueError,
         r"q must have a head dimension of at least 1, got \(2, 4, 6, 0\)"),
        (lambda f: f(Q, K[..., :7], K), ValueError, r"k must have the head dimension of q, 8, got \(2, 4, 5, 7\)"),
        (lambda f: f(Q, K, K[:, :, :4]), ValueError, r"v must have the tokens of k, 5, got \(2, 4, 4, 8\)"),
        (lambda f: f(Q, K, K, feature_map="gelu"), ValueError,
         "feature_map must be one of 'relu', 'elu', 'softmax', got 'gelu'"),
        (lambda f: f(Q, K, K, feature_map="softmax", eps=1e-6), ValueError,
         "eps must be None with feature_map='softmax', which has no denominator, got 1e-06"),
        (lambda f: f(Q, K, K, eps=-1e-6), ValueError, "eps must be a finite number of at least 0, got -1e-06"),
        (lambda f: f(Q, K, K, eps=math.nan), ValueError, "eps must be a finite number of at least 0, got nan"),
        (lambda f: f(Q, K, K, eps="1"), ValueError, "eps must be a finite number of at least 0, got '1'"),
        (lambda f: f(Q, K, K, backend="cuda"), ValueError,
         "backend must be one of 'auto', 'triton', 'torch', 'reference', got 'cuda'"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    for function in (attnk.linear_attention, functools.partial(attnk.explain, "linear_attention")):
        with pytest.raises(error, match=f"^{message}$"):
            call(function)


@pytest.mark.filterwarnings("ignore:attnk.linear_attention runs in plain PyTorch")
def test_heads_too_wide_for_the_kernels(device):
    for dims in ((257, 8), (8, 257)):
        inputs = draw((3, 4), *dims, device=device)
        with pytest.raises(attnk.Unsupported, match="head dimension up to 256, got 257"):
            attnk.linear_attention(**inputs, backend="triton")
        check("auto", inputs)


# Memory: layouts, orders, offsets


@pytest.mark.parametrize("shift", [1, 5])
@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=LAYOUTS)
def test_layouts(backend, device, number, shift):
    """Each layout beside others: of q, k, v and the gradient."""
    q, k, v, dout = (LAYOUTS[(number + i * shift) % len(LAYOUTS)] for i in range(4))
    inputs = draw((5, 7), 6, 10, torch.float64, device, layouts=(q, k, v))
    dout = arranged(torch.randn(2, 2, 5, 10, dtype=torch.float64, device=device), dout)
    feature_map = list(EPS)[(number + shift) % 3]
    one = fused(backend, feature_map=feature_map)
    assert_matches_reference(lambda **each: one(**each).contiguous(), definition(feature_map), inputs, dout=dout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_lie_as_their_inputs(backend, device, layout):
    """Real ones, and fake ones just so."""
    leaves = [tensor.requires_grad_() for tensor in draw((5, 7), 6, 10, device=device, layouts=layout).values()]

    def results(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        out = attnk.linear_attention(*leaves, backend=backend)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    real = results(leaves)
    assert real[0].shape == (2, 2, 5, 10)
    for result in real:
        assert result.permute(ORDERS_OF_RESULTS[layout]).is_contiguous()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = results([mode.from_tensor(leaf).detach().requires_grad_() for leaf in leaves])
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_tokens_of_a_packed_projection(backend, device):
    """Gradients of q, k and v meet in the projection they are views of, and out needs no copy on its way back."""
    packed = torch.randn(2, 9, 3 * 2 * 8, dtype=torch.float64, device=device)

    def around(attention: Any, packed: torch.Tensor) -> torch.Tensor:
        q, k, v = packed.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return attention(q=q, k=k, v=v).transpose(1, 2).flatten(2)

    assert_matches_reference(
        functools.partial(around, fused(backend)), functools.partial(around, definition()), {"packed": packed}
    )
    q, k, v = packed.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    out = attnk.linear_attention(q, k, v, backend=backend)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


class Copies(TorchDispatchMode):
    """Collects the names of operators that copy."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::copy_", "aten::clone", "aten::_to_copy", "aten::contiguous"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@needs_interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_hidden_copy(kernels, layout):
    q, k, v = draw((5, 7), 8, layouts=layout).values()
    launch = mock.patch("triton.runtime.interpreter.GridExecutor.__call__", autospec=True)
    with Copies() as copies, launch:  # the interpreter itself copies
        out, *kept = kernels.linear_attention_forward(q, k, v, "elu", 1e-6)
        dout = torch.empty_like(out).fill_(1.0)
        kernels.linear_attention_backward(dout, q, k, v, *kept, "elu", 1e-6, True, True)
    assert not copies.names


@pytest.mark.parametrize(
    "kept_axes", [(1, 1, 1, 1), (2, 2, 17, 1), (2, 1, 17, 8), (1, 2, 17, 8), (2, 2, 1, 8)], ids=str
)
def test_expanded_gradients(backend, device, kept_axes):
    """The gradients of sum(), mean(3), mean(1), sum(0) and mean(2)."""
    check(backend, draw(device=device), dout=torch.randn(kept_axes, device=device).expand(2, 2, 17, 8))


def spread(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The values, lying so far apart; pages that nothing touches take no memory."""
    last = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    sparse = mmap.mmap(-1, values.element_size() * (last + 1))
    return torch.frombuffer(sparse, dtype=values.dtype).as_strided(values.shape, strides).copy_(values)


FAR = 2**31 + 40


@pytest.mark.parametrize(
    "strides",
    [(FAR, 64, 8, 1), (64, FAR, 8, 1), (128, 64, FAR // 3, 1), (128, 64, 1, FAR // 4), (2**40, 2**39 + 3, 8, 1)],
    ids=["batch", "head", "token", "last", "one_head"],
)
def test_offsets_beyond_32_bits(kernels, device, strides):
    if device != "cpu":
        pytest.skip("lies in CPU memory")
    heads = 1 if strides[0] == 2**40 else 2
    inputs = draw((4, 5), 7, None, torch.float16, batch=heads, heads=heads)
    *tensors, dout = (spread(each, strides) for each in (*inputs.values(), torch.randn(heads, heads, 4, 7).half()))
    with Meter() if dispatch.INTERPRETED else contextlib.nullcontext():  # fails on a 32-bit overflow
        check("triton", dict(zip(inputs, tensors, strict=True)), dout=dout)


# Autograd


@MAPS
def test_gradcheck(backend, device, feature_map):
    inputs = draw((4, 5), 3, 4, torch.float64, device, batch=1)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    fast = backend == "triton" and dispatch.INTERPRETED
    torch.autograd.gradcheck(fused(backend, feature_map=feature_map), leaves, fast_mode=fast)


@MAPS
def test_gradcheck_of_the_definition(feature_map):
    inputs = draw((4, 5), 3, 4, torch.float64, batch=1, heads=1)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    call = fused("reference", feature_map=feature_map)
    torch.autograd.gradcheck(call, leaves)
    torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("name", NAMES)
def test_second_differentiation_raises(backend, device, name):
    inputs = draw((6, 6), device=device, batch=1)
    leaf = inputs[name].requires_grad_()
    (grad,) = torch.autograd.grad(fused(backend)(**inputs).sum(), leaf, create_graph=True)
    message = "^attnk.linear_attention: the fused backward cannot be differentiated again; backend='reference' "
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(grad.square().sum(), leaf)

    def once(tensor: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda tensor: fused(backend)(**{**inputs, name: tensor}).sum())(tensor).sum()

    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(once)(leaf.detach())


def test_create_graph_of_a_first_derivative(backend, device):
    leaves = {name: tensor.requires_grad_() for name, tensor in draw(device=device).items()}
    results = [
        torch.autograd.grad(fused(backend)(**leaves).sum(), list(leaves.values()), create_graph=create)
        for create in (False, True)
    ]
    assert_same_bits([grad.detach() for grad in results[1]], results[0])


@pytest.mark.parametrize(
    ("names", "feature_map"),
    [(("q",), "relu"), (("q",), "softmax"), (("k",), "elu"), (("v",), "softmax"), (("q", "k"), "relu"),
     (("k", "v"), "softmax"), (("k", "v"), "elu")],
    ids=str,
)  # fmt: skip
def test_subsets_of_gradients(backend, device, names, feature_map):
    inputs = draw((12, 12), 8, 24, dtype=torch.float64, device=device, batch=1)
    with cut(backend):
        check(backend, inputs, grads=names, feature_map=feature_map)
    leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in inputs.items()}
    fused(backend, feature_map=feature_map)(**leaves).sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in names)


def test_no_graph_where_none_is_wanted(backend, device):
    inputs = draw(device=device)
    expected = fused(backend)(**inputs)
    assert not expected.requires_grad
    wanting = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    with torch.no_grad():
        out = fused(backend)(**wanting)
    assert not out.requires_grad
    assert torch.equal(out, expected)
    with torch.inference_mode():
        out = fused(backend)(**wanting)
        assert out.is_inference()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@MAPS
def test_saved_for_backward(backend, device, dtype, feature_map):
    """Beside the inputs, the state and up to two numbers a feature: nothing that grows with tokens."""
    sizes = []
    for n_tokens in (16, 64):
        inputs, saved = draw((n_tokens, n_tokens), 8, None, dtype, device), []
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # noqa: B023
            fused(backend, feature_map=feature_map)(**leaves)
        known = {tensor.data_ptr() for tensor in leaves.values()}
        sizes.append(sum(each.nbytes for each in saved if each.data_ptr() not in known))
    per_feature = 1 if feature_map != "softmax" else 2 * (backend == "triton")
    assert sizes[0] == sizes[1] == 2 * 2 * (8 * 8 + 8 * per_feature) * 4


@pytest.mark.parametrize("name", NAMES)
def test_changed_in_place(backend, device, name):
    tensors = {key: tensor.requires_grad_() * 1 for key, tensor in draw((12, 12), device=device).items()}
    out = fused(backend)(**tensors)
    tensors[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@MAPS
def test_retain_graph(backend, device, feature_map):
    leaves = {name: tensor.requires_grad_() for name, tensor in draw(device=device, batch=1).items()}
    out = fused(backend, feature_map=feature_map)(**leaves)
    dout, wanted = torch.randn_like(out), list(leaves.values())
    first = torch.autograd.grad(out, wanted, dout, retain_graph=True)
    assert_same_bits(first, torch.autograd.grad(out, wanted, dout))


@MAPS
def test_repeats(backend, device, feature_map):
    inputs = draw((40, 60), device=device, batch=1)
    with cut(backend, slab=16):
        expected = run(backend, inputs, feature_map=feature_map)
        for _ in range(1 if dispatch.INTERPRETED and backend == "triton" else 20):
            assert_same_bits(run(backend, inputs, feature_map=feature_map), expected)


@pytest.mark.parametrize("alike", ["qkv", "qk", "kv", "qv"])
def test_one_tensor_in_several_places(backend, device, alike):
    x, y = (torch.randn(2, 2, 9, 8, dtype=torch.float64, device=device) for _ in range(2))

    def around(attention: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return attention(**{name: x if name in alike else y for name in "qkv"})

    assert_matches_reference(
        functools.partial(around, fused(backend)),
        functools.partial(around, definition()),
        {"x": x, "y": y},
        grads=("x",) if alike == "qkv" else ("x", "y"),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@MAPS
def test_autocast(backend, device, dtype, feature_map):
    if dtype == torch.bfloat16 and backend == "triton" and dispatch.INTERPRETED:
        pytest.skip("the interpreter multiplies bit patterns of bfloat16")
    inputs = draw(device=device, batch=1)
    inputs["k"] = inputs["k"].to(dtype)

    def under_autocast(**tensors: Any) -> torch.Tensor:
        with torch.autocast(device, dtype):
            return fused(backend, feature_map=feature_map)(**tensors)

    def rounded(**tensors: Any) -> torch.Tensor:
        wide = tensors["q"].dtype == torch.float64
        tensors |= {} if wide else {name: tensors[name].to(dtype) for name in "qkv"}
        return definition(feature_map)(**tensors)

    assert_matches_reference(under_autocast, rounded, inputs)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out = under_autocast(**leaves)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    for leaf in leaves.values():
        assert leaf.grad.dtype == leaf.dtype


def test_autocast_leaves_float64_alone(backend, device):
    with torch.autocast(device, torch.bfloat16):
        check(backend, draw(dtype=torch.float64, device=device))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(backend, device, reentrant):
    inputs = draw(device=device)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    out = checkpoint.checkpoint(fused(backend), *leaves, use_reentrant=reentrant)
    dout = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
    out.backward(dout)
    assert_same_bits([out.detach(), *(leaf.grad for leaf in leaves)], run(backend, inputs))


def test_threads(device):
    inputs = [draw((30 + i, 40), device=device) for i in range(8)]
    expected = [run("torch", one) for one in inputs]
    with ThreadPoolExecutor(8) as pool:
        for result, wanted in zip(pool.map(functools.partial(run, "torch"), inputs), expected, strict=True):
            assert_same_bits(result, wanted)


# torch.compile, torch.export, torch.func


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_compile(backend, device, feature_map, fresh_dynamo):
    compiled = torch.compile(fused(backend, feature_map=feature_map), fullgraph=True, backend="aot_eager")
    inputs = draw((12, 12), device=device, batch=1)
    assert_matches_reference(compiled, definition(feature_map), inputs)
    assert_matches_reference(compiled, definition(feature_map), inputs, grads=())
    inputs = {name: arranged(tensor, "tokens_outside") for name, tensor in inputs.items()}
    assert_matches_reference(compiled, definition(feature_map), inputs)


def test_compile_in_a_network(backend, device, fresh_dynamo):
    def network(attention: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.sin() * 2
        return attention(q=x, k=x, v=x).cos() + x

    compiled = torch.compile(functools.partial(network, fused(backend)), fullgraph=True, backend="inductor")
    inputs = {"x": torch.randn(2, 2, 9, 8, device=device)}
    assert_matches_reference(compiled, functools.partial(network, definition()), inputs)


def test_compile_dynamic_shapes(backend, device, fresh_dynamo):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def around(attention: Any, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).unsqueeze(1).mT
        return attention(q=tokens, k=tokens, v=tokens)

    compiled = torch.compile(functools.partial(around, fused(backend)), fullgraph=True, backend=counter)
    for height, width, batch in ((3, 4, 2), (5, 2, 3), (2, 7, 4)):
        inputs = {"x": torch.randn(batch, 4, height, width, dtype=torch.float64, device=device)}
        assert_matches_reference(
            lambda **tensors: compiled(**tensors).contiguous(), functools.partial(around, definition()), inputs
        )
    assert counter.frame_count <= 2


class Network(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attnk.linear_attention(q, k, v, **self.options)


@pytest.mark.parametrize("strict", [True, False])
def test_export(backend, device, strict, fresh_dynamo):
    inputs = draw((12, 10), dtype=torch.float64, device=device, batch=3)
    network, size = Network(backend=backend), torch.export.Dim
    n_keys = size("n_keys", min=2)
    shapes = {"q": {0: size("batch"), 2: size("n_queries")}, "k": {0: size("batch"), 2: n_keys}}
    exported = torch.export.export(
        network, tuple(inputs.values()), strict=strict, dynamic_shapes=shapes | {"v": shapes["k"]}
    )
    assert "attnk.linear_attention_forward" in str(exported)
    inputs = draw((7, 15), dtype=torch.float64, device=device)
    torch.testing.assert_close(exported.module()(*inputs.values()), network(**inputs))


@pytest.mark.parametrize(("feature_map", "with_grad"), [("elu", True), ("softmax", False)])
def test_exported_programs_train(backend, device, feature_map, with_grad, fresh_dynamo):
    """An exported program calls the operation by itself: with grad mode on, and for its gradients."""
    tokens = [tensor.requires_grad_() for tensor in draw((12, 12), device=device).values()]
    network = Network(feature_map=feature_map, backend=backend)
    with torch.set_grad_enabled(with_grad):
        program = torch.export.export(network, tuple(tensor.detach() for tensor in tokens)).module()
    results = []
    for module in (network, program):
        out = module(*tokens)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), tokens)])
    assert_same_bits(*results)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("feature_map", "layout"), [("elu", "channel_major"), ("softmax", "contiguous")])
def test_opcheck(backend, device, feature_map, layout, fresh_dynamo):
    tensors = list(draw((4, 5), 3, 6, torch.float64, device, batch=1, layouts=layout).values())
    forward, backward = (
        getattr(torch.ops.attnk, f"linear_attention_{name}").default for name in ("forward", "backward")
    )
    options = (feature_map, EPS[feature_map])
    torch.library.opcheck(forward, (*tensors, *options, backend))
    out, state, norm = forward(*tensors, *options, backend)
    dout = arranged(torch.randn(out.shape, dtype=out.dtype, device=device), layout)
    for needs in ((True, True), (False, True), (True, False)):
        arguments = (dout, *tensors, state, norm, *options, *needs, backend)
        torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


@MAPS
def test_func_grad(backend, device, feature_map):
    inputs = draw((12, 12), device=device)

    def gradients(attention: Any, **tensors: torch.Tensor) -> torch.Tensor:
        grads = torch.func.grad(lambda tensors: attention(**tensors).square().sum())(tensors)
        return torch.cat([grad.flatten() for grad in grads.values()])

    assert_matches_reference(
        functools.partial(gradients, fused(backend, feature_map=feature_map)),
        functools.partial(gradients, definition(feature_map)),
        inputs,
        grads=(),
    )


VMAPS = {"q": {"q": 0}, "q and k": {"q": 0, "k": 2}, "all": {"q": 1, "k": 0, "v": 3}, "v": {"v": 0}}


def mapped_inputs(dims: dict[str, int], device: str) -> tuple[Inputs, tuple[int | None, ...]]:
    """Inputs with a mapped dimension where these say, of two different examples."""
    inputs = draw((6, 6), 4, None, torch.float64, device, batch=1)
    for name, dim in dims.items():
        inputs[name] = torch.stack([inputs[name], inputs[name].flip(-1)], dim)
    return inputs, tuple(dims.get(name) for name in inputs)


@pytest.mark.parametrize(("mapped", "feature_map"), zip(VMAPS, (*EPS, "elu"), strict=True))
def test_vmap(backend, device, mapped, feature_map):
    inputs, in_dims = mapped_inputs(VMAPS[mapped], device)
    ours, theirs = fused(backend, feature_map=feature_map), definition(feature_map)
    assert_matches_reference(
        lambda **tensors: torch.vmap(ours, in_dims)(*tensors.values()),
        lambda **tensors: one_by_one(in_dims, theirs, *tensors.values()),
        inputs,
    )


def test_vmap_without_a_batch(backend, device):
    assert_matches_reference(lambda q, k, v: torch.vmap(fused(backend))(q, k, v), definition(), draw(device=device))


@pytest.mark.parametrize("mapped", ["q", "all"])
def test_vmap_of_grad(backend, device, mapped):
    """Gradients an example, as differentially private training wants them."""
    inputs, in_dims = mapped_inputs(VMAPS[mapped], device)

    def gradients(attention: Any, *tensors: torch.Tensor) -> torch.Tensor:
        grads = torch.func.grad(lambda *tensors: attention(*tensors).square().sum(), (0, 1, 2))(*tensors)
        return torch.cat([grad.flatten() for grad in grads])

    ours = functools.partial(gradients, fused(backend, feature_map="elu"))
    theirs = functools.partial(gradients, definition("elu"))
    assert_matches_reference(
        lambda **tensors: torch.vmap(ours, in_dims)(*tensors.values()),
        lambda **tensors: one_by_one(in_dims, theirs, *tensors.values()),
        inputs,
        grads=(),
    )


@pytest.mark.parametrize("position", range(3))
def test_jacrev(backend, device, position):
    inputs = draw((2, 2), 2, None, torch.float64, device, batch=1, heads=1)
    assert_matches_reference(
        lambda **each: torch.func.jacrev(fused(backend), position)(*each.values()).contiguous(),
        lambda **each: torch.func.jacrev(definition(), position)(*each.values()).contiguous(),
        inputs,
        grads=(),
    )


def test_forward_mode_raises(backend, device):
    q, k, v = draw(device=device).values()
    attention = functools.partial(attnk.linear_attention, k=k, v=v, backend=backend)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(attention, (q,), (torch.ones_like(q),))
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        attention(forward_ad.make_dual(q, torch.ones_like(q)))


def test_traces_take_other_sizes():
    for grad in (False, True):
        q, k, v = (tensor.requires_grad_(grad) for tensor in draw().values())
        traced = torch.jit.trace(attnk.linear_attention, (q, k, v))
        other = draw((31, 24), batch=3)
        torch.testing.assert_close(traced(*other.values()), attnk.linear_attention(**other))


def test_meta_tensors():
    leaves = [tensor.to("meta").requires_grad_() for tensor in draw((12, 12)).values()]
    out = attnk.linear_attention(*leaves)
    out.sum().backward()
    assert out.shape == leaves[0].shape
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)
    assert attnk.explain("linear_attention", *leaves).reason == "x lies on the meta device"


@pytest.mark.parametrize("names", [(), ("q",), ("k",), ("v",), ("q", "k"), ("q", "k", "v")], ids="+".join)
def test_flops(device, names):
    inputs = draw((12, 20), 8, 24, device=device)
    leaves = {name: tensor.requires_grad_(name in names) for name, tensor in inputs.items()}
    with FlopCounterMode(display=False) as forward:
        out = fused("torch")(**leaves)
    with FlopCounterMode(display=False) as backward:
        if names:
            out.sum().backward()
    tokens = (12 + (12 + 2 * 20) * bool({"k", "v"} & set(names))) if names else 0
    assert forward.get_total_flops() == 2 * 2 * 2 * 8 * 24 * (12 + 20)
    assert backward.get_total_flops() == 2 * 2 * 2 * 8 * 24 * tokens


# Dispatch


def test_explain(device):
    inputs = draw(device=device)
    explanation = attnk.explain("linear_attention", **inputs, feature_map="elu", backend="torch")
    assert (explanation.backend, explanation.reason, explanation.config) == ("torch", "asked for", None)
    tuning = pytest.importorskip("attnk.kernels.tuning")
    configs = [tuning.LinearAttentionConfig(*[tuning.LinearTile(size, 16, 4, 1)] * 4) for size in (16, 32, 64)]
    rows = [
        tuning.LinearAttentionRow(2, 256, configs[0]),
        tuning.LinearAttentionRow(8, 64, configs[1]),
        tuning.LinearAttentionRow(8, 256, configs[2]),
    ]
    half = {name: tensor.half() for name, tensor in inputs.items()}
    with mock.patch.dict(tuning.LINEAR_ATTENTION_TABLE, default=tuple(rows), clear=True):
        for tensors, expected in (
            (half, configs[0]), (inputs, configs[1]), (draw((17, 20), 8, 65, device=device), configs[2]),
        ):  # fmt: skip
            assert attnk.explain("linear_attention", **tensors, backend="triton").config is expected
            with mock.patch(f"{KERNELS}.linear_attention_config", wraps=tuning.linear_attention_config) as chosen:
                attnk.linear_attention(**tensors, backend="triton")
            assert tuning.linear_attention_config(*chosen.call_args.args, **chosen.call_args.kwargs) is expected


def test_example(device):
    for channels_last in (False, True):
        tensors = operation.example([2, 4, 10, 8], torch.float16, torch.device(device), channels_last)
        for tensor in tensors:
            assert tensor.shape == (2, 4, 10, 8)
            assert tensor.transpose(1, 2).is_contiguous() == channels_last
        assert attnk.explain("linear_attention", *tensors, backend="torch").backend == "torch"


# Bytes


def expected_bytes(inputs: Inputs, softmax: bool, slabs: tuple[int, int], needs: tuple[bool, bool]) -> dict[str, int]:
    """The closed formula in the docstring of ``attnk.kernels.linear_attention``: loaded and stored, by kernel."""
    q, k, v = (tensor.numel() * tensor.element_size() for tensor in inputs.values())
    batch, heads, n_queries, dim = inputs["q"].shape
    v_dim, acc = inputs["v"].shape[3], 8 if inputs["q"].dtype == torch.float64 else 4
    out = batch * heads * n_queries * v_dim * inputs["q"].element_size()
    z = batch * heads * dim * acc
    state, norm = z * v_dim, z * (1 + softmax)
    (key_slabs, query_slabs), (needs_dq, needs_dkv) = slabs, needs
    found = {"fwd_state": k + v + key_slabs * (state + norm), "fwd": q + out + state + (0 if softmax else z)}
    if key_slabs > 1:
        found["fwd_sum"] = (key_slabs + 1) * (state + norm)
    partials = query_slabs * (state + (0 if softmax else z))
    found["bwd_dq"] = q + needs_dq * q + out + state + (0 if softmax else z) + needs_dkv * partials
    if needs_dkv:
        found["bwd_dkv"] = 2 * k + 2 * v + state + norm
        if query_slabs > 1 or softmax:
            found["bwd_sum"] = partials + state + z + (state + z if softmax else 0)
    return found


@needs_interpreter
@pytest.mark.parametrize(
    "case",
    pairwise(
        feature_map=EPS,
        tokens=((17, 40), (40, 16), (33, 33)),
        dims=((8, 8), (24, 40)),
        dtype=(torch.float64, torch.float16),
        slab=(16, 10**6),
        needs=((True, True), (True, False), (False, True)),
        layout=("contiguous", "channel_major", "step_2"),
    ),
)
def test_bytes_are_the_formula(kernels, case):
    """Every tensor is read once and written once, however many columns and slabs there are."""
    inputs = draw(case["tokens"], *case["dims"], case["dtype"], batch=1, layouts=case["layout"])
    needs_dq, needs_dkv = case["needs"]
    leaves = {
        name: tensor.detach().requires_grad_(needs_dq if name == "q" else needs_dkv) for name, tensor in inputs.items()
    }
    with cut("triton", slab=case["slab"]), Meter() as meter:
        out = fused("triton", feature_map=case["feature_map"])(**leaves)
        out.sum().backward()  # whose gradient is expanded from one number
    found = {one.kernel.removeprefix("_linear_attention_").removesuffix("_kernel"): one for one in meter.launches}
    assert len(found) == len(meter.launches)
    slabs = tuple(-(-n // 16) if case["slab"] == 16 else 1 for n in reversed(case["tokens"]))
    expected = expected_bytes(inputs, case["feature_map"] == "softmax", slabs, case["needs"])
    expected["bwd_dq"] -= out.nbytes - out.element_size()
    assert {name: one.loaded + one.stored for name, one in found.items()} == expected
    for one in found.values():
        assert one.atomics == 0
        assert one.store_lanes == one.stored


@needs_interpreter
def test_bytes_of_long_sequences(kernels):
    """Forward q + k + v + out, backward those of q, k, v and dout and of three gradients, and little besides."""
    inputs = draw((2048, 2048), 16, None, torch.float16, batch=1, heads=1)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    with cut("triton", 256, 16, slab=512), Meter() as forward:
        out = fused("triton")(**leaves)
    with cut("triton", 256, 16, slab=512), Meter() as backward:
        out.backward(torch.randn(out.shape).half())
    assert forward.bytes < 1.06 * 4 * out.nbytes
    assert backward.bytes < 1.05 * 7 * out.nbytes
