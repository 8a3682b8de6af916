"""attnk.CrossAttention and attnk.CrossScaleAttention against the formula, re-written here in plain PyTorch."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnk.modules import cross_attention
from attnk.modules.cross_attention import CrossAttention, CrossScaleAttention

DIM, CONTEXT, HEADS = 8, 6, 2
OPTIONS = [
    {},
    {"bias": False},
    {"key_dim": 3, "value_dim": 5},
    {"key_dim": 1},
    {"value_dim": 7, "context_dim": CONTEXT},
    {"num_heads": 3, "key_dim": 2, "value_dim": 2},
]
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def build(cls, dtype=torch.float64, **options):
    """A module whose biases are not small."""
    module = cls(**{"dim": DIM, "num_heads": HEADS, **options}).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 2)
    return module


def formula(module, x, context, mask=None, bias=None, query_pos=0, key_pos=0):
    """Attention head by head."""
    state = dict(module.named_parameters())

    def project(name, x):
        return F.linear(x, state[f"{name}.weight"].flatten(1), state.get(f"{name}.bias"))

    q, k, v = project("q_proj", x + query_pos), project("k_proj", context + key_pos), project("v_proj", context)
    heads = []
    for head in range(module.num_heads):
        keys = slice(head * module.key_dim, (head + 1) * module.key_dim)
        values = slice(head * module.value_dim, (head + 1) * module.value_dim)
        logits = torch.einsum("bid,bjd->bij", q[..., keys], k[..., keys]) / module.key_dim**0.5
        if bias is not None:
            logits = logits + bias[:, min(head, bias.shape[1] - 1)]
        if mask is not None:
            logits = logits.masked_fill(~mask[:, min(head, mask.shape[1] - 1)], -torch.inf)
        heads.append(logits.softmax(-1) @ v[..., values])
    return project("out_proj", torch.cat(heads, -1))


def map_formula(module, x, context, query_pos=None, key_pos=None, **options):
    def tokens(maps):
        return maps.flatten(2).transpose(1, 2)

    positions = {
        name: tokens(position.expand_as(maps))
        for name, position, maps in (("query_pos", query_pos, x), ("key_pos", key_pos, context))
        if position is not None
    }
    out = formula(module, tokens(x), tokens(context), **positions, **options).transpose(1, 2).unflatten(2, x.shape[2:])
    return x + out if module.residual else out


FORMULAS = {CrossAttention: formula, CrossScaleAttention: map_formula}
both = pytest.mark.parametrize("cls", FORMULAS, ids=lambda cls: cls.__name__)


def inputs(module, batch=2, dtype=torch.float64, device="cpu", x=None, context=None):
    """x and context: 4 queries and 6 keys, as tokens or as maps."""
    if isinstance(module, CrossAttention):
        shapes = (batch, x or 4, module.dim), (batch, context or 6, module.context_dim)
    else:
        shapes = (batch, module.dim, *(x or (2, 2))), (batch, module.context_dim, *(context or (3, 2)))
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


def outcome(function, leaves, parameters, options):
    """Output and the gradients of inputs, of what else needs one and of the parameters."""
    out = function(*leaves, **options)
    dout = torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)
    wanted = [*leaves, *(value for value in options.values() if value.requires_grad), *parameters]
    return [out.detach(), *torch.autograd.grad(out, wanted, dout)]


def assert_equals_formula(module, leaves, options, **tolerances):
    parameters = list(module.parameters())
    got = outcome(module, leaves, parameters, options)
    expected = outcome(
        lambda *args, **given: FORMULAS[type(module)](module, *args, **given), leaves, parameters, options
    )
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **(tolerances or CLOSE))


def terms(module, leaves):
    """What a call takes besides x and context, kind by kind."""
    x, context = leaves
    rows, columns = (4, 6)

    def visible(*shape):
        mask = torch.rand(shape) < 0.6
        mask[..., 0] = True
        return mask

    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    return [
        {},
        {"mask": visible(1, 1, 1, columns)},
        {"mask": visible(len(x), module.num_heads, rows, columns)},
        {"bias": leaf(1, module.num_heads, rows, columns)},
        {"mask": visible(len(x), 1, 1, columns), "bias": leaf(1, 1, rows, columns)},
        {"query_pos": leaf(*x.shape)},
        {"key_pos": leaf(*context.shape[1:])},
        {"query_pos": leaf(1, *x.shape[1:]), "key_pos": leaf(1, *context.shape[1:])},
    ]


@both
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals_formula(cls, options, training):
    module = build(cls, **options).train(training)
    leaves = inputs(module)
    for given in terms(module, leaves):
        assert_equals_formula(module, leaves, given)


@pytest.mark.parametrize("residual", [False, True])
def test_residual(residual):
    module = build(CrossScaleAttention, residual=residual, context_dim=CONTEXT)
    leaves = inputs(module, x=(3, 5), context=(2, 4))
    assert_equals_formula(module, leaves, {})
    assert CrossScaleAttention(DIM).residual


@both
def test_every_backend(cls, backend, device):
    module = build(cls, context_dim=CONTEXT, key_dim=3, value_dim=5).to(device)
    leaves = inputs(module, device=device)
    for implementation in (backend, "reference"):
        module.backend = implementation
        for given in terms(module, leaves)[2:6]:
            given = {name: value.detach().to(device) for name, value in given.items()}
            assert_equals_formula(module, leaves, given)


@both
def test_calls_with_its_backend(cls, monkeypatch):
    seen = []
    attention = cross_attention.softmax_attention

    def spy(*args, backend, **options):
        seen.append(backend)
        return attention(*args, **options)

    monkeypatch.setattr(cross_attention, "softmax_attention", spy)
    for name in (None, "torch", "reference"):
        module = build(cls, backend=name)
        module(*inputs(module))
    assert seen == [None, "torch", "reference"]


@both
def test_dropout_in_training_alone(cls):
    module = build(cls, dropout=0.5)
    leaves = inputs(module)
    expected = module.eval()(*leaves).detach()
    assert torch.equal(module(*leaves), expected)
    module.train()
    draws = torch.stack([module(*leaves).detach() for _ in range(400)])
    assert not torch.equal(draws[0], expected)
    error = (draws.mean(0) - expected).abs()
    assert (error <= 5 * draws.std(0) / 20 + 1e-9).all()
    module.dropout = 1.0
    x = leaves[0] if cls is CrossScaleAttention else 0
    bias = module.out_proj.bias.view(-1, 1, 1) if cls is CrossScaleAttention else module.out_proj.bias
    torch.testing.assert_close(module(*leaves), (x + bias).expand_as(leaves[0]))


@both
def test_what_sees_nothing(cls):
    module = build(cls)
    leaves = inputs(module)
    mask = torch.ones(2, 1, 4, 6, dtype=torch.bool)
    mask[1] = False
    got = outcome(module, leaves, list(module.parameters()), {"mask": mask})
    assert all(tensor.isfinite().all() for tensor in got)
    x = leaves[0][1] if cls is CrossScaleAttention else torch.zeros_like(leaves[0][1])
    bias = module.out_proj.bias.view(-1, 1, 1) if cls is CrossScaleAttention else module.out_proj.bias
    assert torch.equal(got[0][1], x + bias)
    torch.testing.assert_close(got[0][0], module(*leaves)[0])


@both
def test_empty_batch(cls):
    module = build(cls)
    leaves = inputs(module, batch=0)
    out, *grads = outcome(module, leaves, list(module.parameters()), {})
    assert out.shape == leaves[0].shape
    assert all(grad.eq(0).all() for grad in grads)


def test_empty_sequences():
    module = build(CrossAttention)
    x, context = torch.randn(2, 4, DIM).double(), torch.randn(2, 6, DIM).double()
    assert module(x[:, :0], context).shape == (2, 0, DIM)
    assert torch.equal(module(x, context[:, :0]), module.out_proj.bias.expand(2, 4, -1))


# Detection transformers.


def test_is_the_attention_of_a_detection_decoder():
    class Theirs(nn.Module):
        """As transformers' DETR: positions into queries and keys, values without."""

        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(DIM, DIM) for _ in range(4))

        def forward(self, x, memory, query_pos, memory_pos):
            shape = (2, -1, HEADS, DIM // HEADS)
            q = self.q_proj(x + query_pos).view(shape).transpose(1, 2) * (DIM // HEADS) ** -0.5
            k = self.k_proj(memory + memory_pos).view(shape).transpose(1, 2)
            v = self.v_proj(memory).view(shape).transpose(1, 2)
            out = F.softmax(q @ k.transpose(2, 3), -1) @ v
            return self.out_proj(out.transpose(1, 2).reshape(2, -1, DIM))

    theirs, ours = Theirs().double(), CrossAttention(DIM, num_heads=HEADS).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, memory = (leaf.detach() for leaf in inputs(ours))
    queries, positions = torch.randn(4, DIM).double(), torch.randn(1, 6, DIM).double()
    got = ours(x, memory, query_pos=queries, key_pos=positions)
    torch.testing.assert_close(got, theirs(x, memory, queries, positions), **CLOSE)


def test_positions_in_another_dtype():
    module = build(CrossAttention, torch.bfloat16)
    x, context = inputs(module, dtype=torch.bfloat16)
    position = torch.randn(4, DIM)
    assert torch.equal(module(x, context, query_pos=position), module(x, context, query_pos=position.bfloat16()))


# Memory.


def spied(monkeypatch):
    """The arguments attention is called with, and its result, laid out as the queries are."""
    seen = {}

    def spy(q, k, v, *args, **options):
        seen.update(q=q, k=k, v=v)
        axes = sorted(range(4), key=lambda axis: -q.stride(axis))
        shape = (*q.shape[:3], v.shape[3])
        out = torch.zeros([shape[axis] for axis in axes], dtype=q.dtype)
        seen["out"] = out.permute([axes.index(axis) for axis in range(4)])
        return seen["out"]

    monkeypatch.setattr(cross_attention, "softmax_attention", spy)
    return seen


def recorded(module):
    """What each projection took and gave."""
    calls = {}
    for name, layer in module.named_children():
        layer.register_forward_hook(lambda layer, args, out, name=name: calls.update({name: (args[0], out)}))
    return calls


@pytest.mark.parametrize("context_last", [False, True])
@pytest.mark.parametrize("x_last", [False, True])
def test_copies_no_map_but_by_projecting(x_last, context_last, monkeypatch):
    module = build(CrossScaleAttention, context_dim=CONTEXT, key_dim=3, value_dim=5)
    formats = {False: torch.contiguous_format, True: torch.channels_last}
    x, context = (leaf.detach() for leaf in inputs(module, x=(3, 4), context=(2, 5)))
    x, context = x.to(memory_format=formats[x_last]), context.to(memory_format=formats[context_last])
    seen, calls = spied(monkeypatch), recorded(module)
    out = module(x, context)
    assert out.is_contiguous(memory_format=formats[x_last])
    for name, maps, projection in (("q", x, "q_proj"), ("k", context, "k_proj"), ("v", context, "v_proj")):
        assert calls[projection][0].data_ptr() == maps.data_ptr()
        assert seen[name].data_ptr() == calls[projection][1].data_ptr()
    assert calls["out_proj"][0].data_ptr() == seen["out"].data_ptr()
    assert calls["out_proj"][0].is_contiguous(memory_format=formats[x_last])


def test_copies_no_tokens_but_by_projecting(monkeypatch):
    module = build(CrossAttention, key_dim=3, value_dim=5)
    seen, calls = spied(monkeypatch), recorded(module)
    x, context = inputs(module)
    module(x, context)
    for name, tokens, projection in (("q", x, "q_proj"), ("k", context, "k_proj"), ("v", context, "v_proj")):
        assert calls[projection][0] is tokens
        assert seen[name].data_ptr() == calls[projection][1].data_ptr()
    assert calls["out_proj"][0].data_ptr() == seen["out"].data_ptr()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("weights_last", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (1, 4)])
def test_keeps_the_memory_format(residual, weights_last, size):
    module = build(CrossScaleAttention, context_dim=CONTEXT, residual=residual)
    if weights_last:
        module.to(memory_format=torch.channels_last)
    x, context = inputs(module, x=size)
    expected = module(x, context)
    assert expected.is_contiguous()
    last = x.detach().to(memory_format=torch.channels_last)
    wide = torch.cat([last, last], 1).to(memory_format=torch.channels_last)
    for maps in (last, wide[:, :DIM]):
        out = module(maps, context.to(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, expected, **CLOSE)
    transposed = x.detach().transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(module(transposed, context), expected, **CLOSE)


# The module as such.


def copies(module):
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)
    other = type(module)(DIM, CONTEXT, HEADS, key_dim=3, backend="torch", dropout=0.1).double()
    other.load_state_dict(module.state_dict(), strict=True)
    yield other


@both
def test_projections_without_bias(cls):
    assert list(cls(DIM, bias=False).state_dict()) == [f"{layer}_proj.weight" for layer in ("q", "k", "v", "out")]


@both
def test_copies(cls):
    module = build(cls, context_dim=CONTEXT, key_dim=3, backend="torch", dropout=0.1)
    names = [f"{layer}_proj.{name}" for layer in ("q", "k", "v", "out") for name in ("weight", "bias")]
    assert list(module.state_dict()) == names
    leaves = inputs(module)
    module.eval()
    for other in copies(module):
        assert repr(other) == repr(module)
        assert other.q_proj.weight.data_ptr() != module.q_proj.weight.data_ptr()
        assert torch.equal(other.eval()(*leaves), module(*leaves))


@both
@pytest.mark.parametrize("residual", [False, True])
def test_autocast(cls, residual):
    module = build(cls, torch.float32, context_dim=CONTEXT)
    if cls is CrossScaleAttention:
        module.residual = residual
    leaves = inputs(module, dtype=torch.float32)
    expected = module(*leaves)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            out = module(*(leaf.to(dtype) for leaf in leaves))
            out.float().sum().backward()
        wide = cls is CrossScaleAttention and residual and dtype == torch.float32
        assert out.dtype == (torch.float32 if wide else torch.bfloat16)
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.1)
        assert {leaf.grad.dtype for leaf in leaves} == {torch.float32}


@both
def test_compiles(cls):
    module = build(cls, torch.float32, context_dim=CONTEXT, key_dim=3)
    leaves = inputs(module, dtype=torch.float32)
    given = {"query_pos": torch.randn(leaves[0].shape[1:]), "mask": torch.rand(2, 1, 4, 6) < 0.8}
    parameters = list(module.parameters())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got, expected = (outcome(each, leaves, parameters, given) for each in (compiled, module))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_takes_replaced_projections():
    module = build(CrossAttention)
    leaves = inputs(module)
    expected = module(*leaves)
    for name, layer in list(module.named_children()):
        setattr(module, name, nn.Sequential(layer))
    assert torch.equal(module(*leaves), expected)


@both
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 0}, "dim must be a positive integer, got 0"),
        ({"context_dim": -1}, "context_dim must be a positive integer, got -1"),
        ({"num_heads": 2.0}, "num_heads must be a positive integer, got 2.0"),
        ({"num_heads": True}, "num_heads must be a positive integer, got True"),
        ({"num_heads": 3}, "dim must be divisible by num_heads without key_dim, got 8 and 3"),
        ({"num_heads": 3, "key_dim": 4}, "dim must be divisible by num_heads without value_dim, got 8 and 3"),
        ({"key_dim": 0}, "key_dim must be a positive integer, got 0"),
        ({"value_dim": "4"}, "value_dim must be a positive integer, got '4'"),
        ({"dropout": -0.1}, "dropout must be a number from 0 to 1, got -0.1"),
        ({"backend": "gpu"}, "backend must be one of 'auto', 'triton', 'torch', 'reference', got 'gpu'"),
    ],
    ids=str,
)
def test_refuses_at_construction(cls, options, words):
    with pytest.raises(ValueError, match=words):
        cls(**{"dim": DIM, "num_heads": HEADS, **options})


X, MEMORY = torch.zeros(2, 4, DIM), torch.zeros(2, 6, CONTEXT)
MAP, LARGE = torch.zeros(2, DIM, 2, 2), torch.zeros(2, CONTEXT, 3, 2)


@pytest.mark.parametrize(
    ("cls", "change", "error", "words"),
    [
        (CrossAttention, {"x": 3}, TypeError, "x must be a tensor, got int"),
        (CrossAttention, {"x": X[0]}, ValueError, r"x must be \(B, Nq, dim\) with dim = 8, got \(4, 8\)"),
        (CrossAttention, {"x": X[..., :7]}, ValueError, r"x must be \(B, Nq, dim\) with dim = 8, got \(2, 4, 7\)"),
        (CrossAttention, {"context": X}, ValueError, r"context must be .* with context_dim = 6, got \(2, 4, 8\)"),
        (
            CrossAttention,
            {"context": MEMORY[:1]},
            ValueError,
            r"context must have the batch size of x, 2, got \(1, 6, 6\)",
        ),
        (
            CrossAttention,
            {"x": X.half()},
            TypeError,
            "x must have the dtype of the module, torch.float32, got torch.float16",
        ),
        (
            CrossAttention,
            {"context": MEMORY.long()},
            TypeError,
            "context must have the dtype of the module, .* torch.int64",
        ),
        (CrossAttention, {"x": X.to("meta")}, ValueError, "x must be on the device of the module, cpu, got meta"),
        (
            CrossAttention,
            {"query_pos": X[:, :3]},
            ValueError,
            r"query_pos must broadcast to \(2, 4, 8\), got \(2, 3, 8\)",
        ),
        (
            CrossAttention,
            {"key_pos": X[None]},
            ValueError,
            r"key_pos must broadcast to \(2, 6, 6\), got \(1, 2, 4, 8\)",
        ),
        (CrossAttention, {"key_pos": MEMORY[None]}, ValueError, r"key_pos must broadcast to .* got \(1, 2, 6, 6\)"),
        (CrossScaleAttention, {"x": X}, ValueError, r"x must be \(B, dim, H, W\) with dim = 8, got \(2, 4, 8\)"),
        (CrossScaleAttention, {"x": LARGE}, ValueError, r"x must be \(B, dim, H, W\) with dim = 8, got \(2, 6, 3, 2\)"),
        (
            CrossScaleAttention,
            {"context": MAP},
            ValueError,
            r"context must be .* with context_dim = 6, got \(2, 8, 2, 2\)",
        ),
        (
            CrossScaleAttention,
            {"context": LARGE[..., :0]},
            ValueError,
            r"context must have at least one pixel, got \(2, 6, 3, 0\)",
        ),
        (
            CrossScaleAttention,
            {"context": LARGE[:1]},
            ValueError,
            r"context must have the batch size of x, 2, got \(1, 6, 3, 2\)",
        ),
        (CrossScaleAttention, {"query_pos": MAP[0, 0]}, None, ""),
        (
            CrossScaleAttention,
            {"key_pos": MAP},
            ValueError,
            r"key_pos must broadcast to \(2, 6, 3, 2\), got \(2, 8, 2, 2\)",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (next(iter(value)) if isinstance(value, dict) else ""),
)
def test_refuses_at_call(cls, change, error, words):
    module = cls(DIM, CONTEXT, HEADS)
    given = {"x": X, "context": MEMORY} if cls is CrossAttention else {"x": MAP, "context": LARGE}
    if error is None:
        assert module(**{**given, **change}).shape == given["x"].shape
        return
    with pytest.raises(error, match=words):
        module(**{**given, **change})


@both
def test_under_autocast_any_float_dtype_but_no_integers(cls):
    module = cls(DIM, num_heads=HEADS)
    x, context = inputs(module, dtype=torch.float32)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="context must have the dtype of the module"),
    ):
        module(x, context.long())


def test_shows_its_options():
    text = repr(CrossScaleAttention(DIM, CONTEXT, HEADS, key_dim=3, dropout=0.2, backend="torch", residual=False))
    assert "num_heads=2, key_dim=3, value_dim=4, dropout=0.2, backend='torch', residual=False" in text
    assert "backend" not in repr(CrossAttention(DIM, num_heads=HEADS))
