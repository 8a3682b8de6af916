"""attnk.MultiheadAttention against torch.nn.MultiheadAttention, over its arguments."""

import copy
import inspect
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn

from attnk import use_backend
from attnk.modules import multihead
from attnk.modules.multihead import MultiheadAttention

BATCH, QUERIES, KEYS, EMBED, HEADS = 2, 4, 5, 8, 2
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
LAYOUTS = ("batch_first", "sequence_first", "unbatched")

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched (src_)?key_padding_mask")


def pair(*args, dtype=torch.float64, **options):
    """Their module and ours with its weights, biases drawn."""
    theirs = nn.MultiheadAttention(EMBED, HEADS, *args, dtype=dtype, **options)
    ours = MultiheadAttention(EMBED, HEADS, *args, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tensors(layout, share="none", kdim=EMBED, vdim=EMBED, queries=QUERIES, keys=KEYS, batch=BATCH):
    """Leaves: one where query, key and value are the same, two where key and value are, else three."""

    def leaf(length, channels):
        shape = {"batch_first": (batch, length), "sequence_first": (length, batch), "unbatched": (length,)}[layout]
        return torch.randn(*shape, channels, dtype=torch.float64, requires_grad=True)

    if share == "all":
        return [leaf(queries, EMBED)]
    if share == "key_value":
        return [leaf(queries, EMBED), leaf(keys, kdim)]
    return [leaf(queries, EMBED), leaf(keys, kdim), leaf(keys, vdim)]


def outcome(module, leaves, masks=None, **options):
    """Output, weights, and the gradients of inputs, float masks and parameters through both."""
    masks = masks or {}
    query, key, value = (*leaves, *[leaves[-1]] * (3 - len(leaves)))
    out, weights = module(query, key, value, **masks, **options)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    if weights is not None:
        loss = loss + (weights * torch.linspace(-1, 2, weights.numel()).to(out).view(weights.shape)).sum()
    floats = [mask for mask in masks.values() if isinstance(mask, torch.Tensor) and mask.requires_grad]
    wanted = [*leaves, *floats, *module.parameters()]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [out, weights, *grads]


def assert_same(got, expected, case="", **tolerances):
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine is None) == (theirs is None), case
        if mine is not None:
            torch.testing.assert_close(mine, theirs, **(tolerances or CLOSE), msg=lambda words: f"{case}: {words}")


def masks(batched, queries=QUERIES, keys=KEYS):
    """Masks of every kind and shape by name; each query may attend to key 0."""

    def hide(*shape):
        mask = torch.rand(shape) < 0.4
        mask[..., 0] = False
        return mask

    def add(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def infinite(*shape):
        return torch.zeros(shape, dtype=torch.float64).masked_fill(hide(*shape), -torch.inf)

    pad = (BATCH, keys) if batched else (keys,)
    plane, cube = (queries, keys), ((BATCH if batched else 1) * HEADS, queries, keys)
    later = torch.ones(plane, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "padding bool": {"key_padding_mask": hide(*pad)},
        "padding float": {"key_padding_mask": add(*pad)},
        "plane bool": {"attn_mask": hide(*plane)},
        "plane float": {"attn_mask": add(*plane)},
        "plane infinite": {"attn_mask": infinite(*plane)},
        "cube bool": {"attn_mask": hide(*cube)},
        "cube float": {"attn_mask": add(*cube)},
        "both bool": {"key_padding_mask": hide(*pad), "attn_mask": hide(*plane)},
        "both bool, cube": {"key_padding_mask": hide(*pad), "attn_mask": hide(*cube)},
        "both float": {"key_padding_mask": add(*pad), "attn_mask": add(*plane)},
        "both float, cube": {"key_padding_mask": infinite(*pad), "attn_mask": add(*cube)},
        "bool and float": {"key_padding_mask": hide(*pad), "attn_mask": add(*cube)},
        "float and bool": {"key_padding_mask": add(*pad), "attn_mask": hide(*plane)},
        "causal": {"attn_mask": later, "is_causal": True},
        "causal and padding": {"attn_mask": later, "key_padding_mask": hide(*pad), "is_causal": True},
    }


OUTPUTS = ({}, {"average_attn_weights": False}, {"need_weights": False})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("added", list(itertools.product([False, True], [False, True])), ids=str)
@pytest.mark.parametrize("dims", [{}, {"kdim": 6}, {"kdim": 6, "vdim": 3}, {"kdim": 6, "vdim": 6}], ids=str)
def test_equals_torch(layout, bias, added, dims):
    theirs, ours = pair(0.0, bias, *added, batch_first=layout == "batch_first", **dims)
    kdim, vdim = dims.get("kdim", EMBED), dims.get("vdim", EMBED)
    shares = ["none", *(["key_value"] if kdim == vdim else []), *([] if dims else ["all"])]
    for share in shares:
        leaves = tensors(layout, share, kdim, vdim)
        keys = QUERIES if share == "all" else KEYS
        for (name, given), options in itertools.product(masks(layout != "unbatched", keys=keys).items(), OUTPUTS):
            if any(added) and name == "causal" and "need_weights" in options:
                continue  # see test_all_see_added_keys
            case = f"{share}, {name}, {options}"
            assert_same(outcome(ours, leaves, given, **options), outcome(theirs, leaves, given, **options), case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OUTPUTS, ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_equals_torch_in_evaluation(layout, options, inference):
    theirs, ours = (module.eval() for module in pair(0.3, batch_first=layout == "batch_first"))
    (x,) = tensors(layout, "all")
    for name in ("none", "padding bool", "plane bool", "plane float", "both bool"):
        given = masks(layout != "unbatched", keys=QUERIES)[name]
        if not inference:
            assert_same(outcome(ours, [x], given, **options), outcome(theirs, [x], given, **options), name)
            continue
        with torch.inference_mode():  # PyTorch's own fast path
            got, expected = ours(x, x, x, **given, **options), theirs(x, x, x, **given, **options)
        assert_same(got, expected, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_torch_with_every_backend(layout, backend, device):
    theirs, ours = (module.to(device) for module in pair(batch_first=layout == "batch_first"))
    for implementation in (backend, "reference"):
        ours.backend = implementation
        for name in ("none", "bool and float", "causal"):
            leaves = [leaf.detach().to(device).requires_grad_() for leaf in tensors(layout)]
            given = {
                key: mask.to(device) if key != "is_causal" else mask
                for key, mask in masks(layout != "unbatched")[name].items()
            }
            given = {key: mask.detach() if key != "is_causal" else mask for key, mask in given.items()}
            got = outcome(ours, leaves, given, need_weights=False)
            assert_same(got, outcome(theirs, leaves, given, need_weights=False), f"{implementation}, {name}")


def test_calls_with_its_backend(monkeypatch):
    seen = []

    def spy(*args, **options):
        seen.append(options["backend"])
        return torch.zeros_like(args[0])

    monkeypatch.setattr(multihead, "softmax_attention", spy)
    x = torch.randn(3, 2, EMBED)
    for backend in (None, "torch", "reference"):
        MultiheadAttention(EMBED, HEADS, backend=backend)(x, x, x)
    assert seen == [None, "torch", "reference"]


# Where it differs from PyTorch.


@pytest.mark.parametrize("options", OUTPUTS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "padding"])
def test_what_sees_nothing_gets_zeros(kind, options):
    theirs, ours = pair(batch_first=True)
    leaves = tensors("batch_first")
    if kind == "padding":
        blind = (1, slice(None))
        given = {"key_padding_mask": torch.tensor([[False] * KEYS, [True] * KEYS])}
    else:
        blind = (slice(None), 2)
        hidden = torch.zeros(QUERIES, KEYS, dtype=torch.bool)
        hidden[2] = True
        given = {
            "attn_mask": hidden
            if kind == "bool"
            else torch.zeros(QUERIES, KEYS).double().masked_fill(hidden, -torch.inf)
        }
    got = outcome(ours, leaves, given, **options)
    assert torch.equal(got[0][blind], ours.out_proj.bias.expand_as(got[0][blind]))
    assert all(tensor.isfinite().all() for tensor in got if tensor is not None)
    if got[1] is not None:
        weights = got[1] if got[1].dim() == 3 else got[1].transpose(1, 2)
        assert weights[blind].eq(0).all()
        assert theirs(*leaves, **given, **options)[0][blind].isnan().all()
    seeing = torch.ones(2, QUERIES, dtype=torch.bool)
    seeing[blind] = False
    torch.testing.assert_close(got[0][seeing], theirs(*leaves, **given, **options)[0][seeing])


@pytest.mark.parametrize("options", OUTPUTS, ids=str)
def test_causal_without_a_mask(options):
    theirs, ours = pair()
    leaves = tensors("sequence_first")
    later = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
    expected = outcome(theirs, leaves, {"attn_mask": later}, **options)
    assert_same(outcome(ours, leaves, {"is_causal": True}, **options), expected)
    padding = {"key_padding_mask": torch.tensor([[False] * KEYS, [False] * 2 + [True] * 3])}
    expected = outcome(theirs, leaves, {"attn_mask": later, **padding}, **options)
    assert_same(outcome(ours, leaves, {"is_causal": True, **padding}, **options), expected)


@pytest.mark.parametrize("added", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("mask", ["bool", "none"])
def test_all_see_added_keys(added, mask):
    theirs, ours = pair(**added)
    leaves = tensors("sequence_first")
    later = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
    given = {"is_causal": True, **({"attn_mask": later} if mask == "bool" else {})}
    for options in OUTPUTS:
        got = outcome(ours, leaves, given, **options)
        assert_same(got, outcome(theirs, leaves, {"attn_mask": later}, **options), str(options))
    hidden = theirs(*leaves, is_causal=True, attn_mask=later, need_weights=False)[0]
    assert not torch.allclose(got[0], hidden)


def test_a_causal_mask_is_not_read():
    _, ours = pair()
    leaves = tensors("sequence_first")
    wrong = torch.ones(QUERIES, KEYS, dtype=torch.bool)
    for options in OUTPUTS:
        got = outcome(ours, leaves, {"is_causal": True, "attn_mask": wrong}, **options)
        assert_same(got, outcome(ours, leaves, {"is_causal": True}, **options))


# Dropout.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("dropout", [0.4, 1.0])
def test_returns_the_weights_that_were_dropped(layout, average, dropout):
    theirs, ours = pair(dropout, batch_first=layout == "batch_first")
    leaves, got = tensors(layout), []
    for module in (ours, theirs):
        torch.manual_seed(1)
        got.append(outcome(module, leaves, average_attn_weights=average))
    assert_same(*got)
    if not average:
        assert got[0][1].eq(0).double().mean() > 0.2


def test_dropout_without_weights_in_training_alone():
    _, ours = pair(0.5)
    leaves = tensors("sequence_first", queries=30, keys=40)
    calm = copy.deepcopy(ours).eval()
    expected = calm(*leaves, need_weights=False)[0].detach()
    assert not torch.allclose(ours(*leaves, need_weights=False)[0], expected)
    draws = torch.stack([ours(*leaves, need_weights=False)[0] for _ in range(200)])
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() < 5 * standard_error + 1e-6).all()
    ours.eval()
    assert_same(ours(*leaves, need_weights=False), (expected, None))


# The module as such.


def test_has_the_signatures_of_torch():
    for name in ("__init__", "forward"):
        mine, theirs = (
            inspect.signature(getattr(cls, name)).parameters for cls in (MultiheadAttention, nn.MultiheadAttention)
        )
        extra = {"backend"} if name == "__init__" else set()
        assert [key for key in mine if key not in extra] == list(theirs)
        for key, parameter in theirs.items():
            assert (mine[key].default, mine[key].kind) == (parameter.default, parameter.kind)
        assert all(mine[key].kind is inspect.Parameter.KEYWORD_ONLY for key in extra)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 3},
        {"vdim": 5, "dtype": torch.float64},
    ],
    ids=str,
)
def test_starts_as_torch_does(options):
    states = []
    for cls in (MultiheadAttention, nn.MultiheadAttention):
        torch.manual_seed(5)
        module = cls(EMBED, HEADS, **options)
        assert isinstance(module, nn.MultiheadAttention)
        states.append(({**module.state_dict(), "next": torch.rand(3)}, module.state_dict()._metadata))
    (mine, my_versions), (theirs, their_versions) = states
    assert list(mine) == list(theirs)
    assert my_versions == their_versions
    assert all(mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in theirs)


def test_builds_on_a_device():
    module = MultiheadAttention(EMBED, HEADS, device="meta")
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    x = torch.empty(3, 2, EMBED, device="meta")
    out, weights = module(x, x, x, need_weights=False)
    assert (out.shape, weights) == ((3, 2, EMBED), None)


def test_takes_over_a_module_of_torch():
    theirs, _ = pair(batch_first=True)
    leaves = tensors("batch_first")
    expected = outcome(theirs, leaves)
    theirs.__class__ = MultiheadAttention
    assert_same(outcome(theirs, leaves), expected)


@pytest.mark.parametrize("share", ["all", "key_value", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_neither_queries_nor_keys_nor_values(share, layout, monkeypatch):
    _, ours = pair(batch_first=layout == "batch_first")
    batch, dim = 1 if layout == "unbatched" else BATCH, EMBED // HEADS
    seen, products, outs = [], [], []
    linear = torch.nn.functional.linear

    def count(x, weight, bias=None):
        products.append((x.data_ptr(), tuple(weight.shape)))
        return linear(x, weight, bias)

    def spy(q, k, v, *args, **options):
        seen.extend([q, k, v])
        out = torch.zeros(QUERIES, batch, HEADS, dim).double().permute(1, 2, 0, 3)
        if layout != "sequence_first":
            out = torch.zeros(batch, QUERIES, HEADS, dim).double().transpose(1, 2)
        outs.append(out)
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", count)
    monkeypatch.setattr(multihead, "softmax_attention", spy)
    leaves = tensors(layout, share)
    ours(leaves[0], leaves[-1] if share != "none" else leaves[1], leaves[-1], need_weights=False)
    parts = {"all": [3], "key_value": [1, 2], "none": [1, 1, 1]}[share]
    expected = [(leaf.data_ptr(), (part * EMBED, EMBED)) for leaf, part in zip(leaves, parts, strict=True)]
    assert products == [*expected, (outs[0].data_ptr(), (EMBED, EMBED))]
    assert len({x.untyped_storage().data_ptr() for x in seen}) == len(parts)
    for x, part in zip(seen, (parts[0], *[parts[-1]] * 2), strict=True):
        assert (x.shape[:2], x.shape[3]) == ((batch, HEADS), dim)
        assert (x.stride(1), x.stride(3)) == (dim, 1)
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size() * part


def test_computes_weights_only_when_asked(monkeypatch):
    _, ours = pair()
    leaves = tensors("sequence_first")
    monkeypatch.setattr(ours, "_weights", lambda *args: pytest.fail("weights"))
    assert ours(*leaves, need_weights=False)[1] is None
    with pytest.raises(pytest.fail.Exception, match="weights"):
        ours(*leaves)


def test_returns_contiguous_outputs():
    for layout in LAYOUTS:
        _, ours = pair(batch_first=layout == "batch_first")
        assert ours(*tensors(layout))[0].is_contiguous()


@pytest.mark.parametrize("layout", ["batch_first", "sequence_first"])
def test_empty_batches_and_sequences(layout):
    theirs, ours = pair(batch_first=layout == "batch_first")
    for sizes in ({"batch": 0}, {"queries": 0}):
        leaves = tensors(layout, **sizes)
        assert_same(outcome(ours, leaves, need_weights=False), outcome(theirs, leaves, need_weights=False), str(sizes))
        assert_same(outcome(ours, leaves), outcome(theirs, leaves), str(sizes))
    for options in ({}, {"need_weights": False}):
        out = outcome(ours, tensors(layout, keys=0), **options)[0]
        assert torch.equal(out, ours.out_proj.bias.expand_as(out))


def encoder_layer(attention, **options):
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, dtype=torch.float64, **options)
    layer.self_attn = attention
    return layer


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_inside_an_encoder_layer(norm_first, batch_first):
    theirs, ours = pair(batch_first=batch_first)
    reference = encoder_layer(theirs, batch_first=batch_first, norm_first=norm_first)
    layer = copy.deepcopy(reference)
    layer.self_attn = ours
    x = torch.randn(3, 3, EMBED, dtype=torch.float64)
    padding = torch.tensor([[False, False, True], [False, False, False], [False, True, True]])
    later = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    calls = [{}, {"src_key_padding_mask": padding}, {"src_mask": later, "is_causal": True}]
    calls.append({"src_mask": later, "src_key_padding_mask": padding})
    for call in calls:
        grads = []
        for module in (layer.train(), reference.train()):
            out = module(x, **call)
            grads.append([out, *torch.autograd.grad((out**2 * torch.arange(EMBED)).sum(), module.parameters())])
        assert_same(*grads, str(call))
        with torch.inference_mode():
            assert_same([layer.eval()(x, **call)], [reference.eval()(x, **call)], str(call))


def test_is_not_passed_by_in_inference(monkeypatch):
    calls = []
    forward = MultiheadAttention.forward
    monkeypatch.setattr(
        MultiheadAttention, "forward", lambda self, *args, **options: calls.append(1) or forward(self, *args, **options)
    )
    x = torch.randn(2, 3, EMBED, dtype=torch.float64)
    for ours in (pair(batch_first=True)[1], copy.deepcopy(pair(batch_first=True)[1])):
        with torch.inference_mode():
            encoder_layer(ours, batch_first=True).eval()(x)
    assert len(calls) == 2
    _, ours = pair(add_bias_kv=True, batch_first=True)
    layer = encoder_layer(ours, batch_first=True).eval()
    with torch.no_grad():
        fast = layer(x)
    torch.testing.assert_close(fast, layer(x))


def test_inside_an_encoder_with_nested_tensors():
    theirs, ours = pair(batch_first=True)
    layer = encoder_layer(theirs, batch_first=True)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    x = torch.randn(2, 3, EMBED, dtype=torch.float64)
    outs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for attention in (ours, theirs):
            encoder = nn.TransformerEncoder(layer, 2)
            for each in encoder.layers:
                each.self_attn = attention
            encoder.eval()
            with torch.inference_mode():
                outs.append(encoder(x, src_key_padding_mask=padding))
    assert outs[1][0, 2].eq(0).all()  # padded anew, so it was nested
    assert_same(outs[:1], outs[1:])


def test_inside_a_decoder_layer():
    theirs, ours = pair()
    reference = nn.TransformerDecoderLayer(EMBED, HEADS, 16, dropout=0.0, dtype=torch.float64)
    layer = copy.deepcopy(reference)
    reference.self_attn, reference.multihead_attn = theirs, copy.deepcopy(theirs)
    layer.self_attn, layer.multihead_attn = ours, copy.deepcopy(ours)
    x, memory = torch.randn(2, 4, 3, EMBED, dtype=torch.float64)
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    for training in (True, False):
        got = layer.train(training)(x, memory, tgt_mask=later, tgt_is_causal=True)
        assert_same([got], [reference.train(training)(x, memory, tgt_mask=later, tgt_is_causal=True)])


def copies(module):
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


def test_copies():
    ours = MultiheadAttention(EMBED, HEADS, kdim=3, add_bias_kv=True, backend="torch", dtype=torch.float64)
    leaves = tensors("sequence_first", kdim=3)
    expected = outcome(ours, leaves)
    for other in copies(ours):
        assert repr(other) == repr(ours)
        assert other.k_proj_weight.data_ptr() != ours.k_proj_weight.data_ptr()
        assert_same(outcome(other, leaves), expected)


def assert_as_good(got, expected, exact, eps):
    """Ours errs little more than theirs, against the same in float64."""
    present = [tensors for tensors in zip(got, expected, exact, strict=True) if tensors[0] is not None]
    largest = max(float(oracle.detach().abs().max()) for _, _, oracle in present)
    assert [mine is None for mine in got] == [theirs is None for theirs in expected]
    for mine, theirs, oracle in present:
        assert mine.dtype == theirs.dtype
        errors = [float((one.detach().double() - oracle.detach()).abs().max()) for one in (mine, theirs)]
        assert errors[0] <= 4 * (errors[1] + eps * largest)


@pytest.mark.parametrize("options", OUTPUTS, ids=str)
@pytest.mark.parametrize("added", [False, True])
def test_autocast(options, added):
    theirs, ours = pair(add_bias_kv=added, dtype=torch.float32)
    leaves = [leaf.detach().float().requires_grad_() for leaf in tensors("sequence_first")]
    exact = outcome(copy.deepcopy(theirs).double(), [leaf.double() for leaf in leaves], **options)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = outcome(ours, leaves, **options), outcome(theirs, leaves, **options)
    assert_as_good(got, expected, exact, torch.finfo(torch.bfloat16).eps)
    assert got[0].dtype == torch.bfloat16


def test_autocast_widens_no_keys(monkeypatch):
    seen = []
    attention = multihead.softmax_attention
    spy = lambda q, k, v, *args, **options: seen.extend([q, k, v]) or attention(q, k, v, *args, **options)  # noqa: E731
    monkeypatch.setattr(multihead, "softmax_attention", spy)
    _, ours = pair(add_bias_kv=True, add_zero_attn=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours(*(leaf.float() for leaf in tensors("sequence_first")))
    assert [x.dtype for x in seen] == [torch.bfloat16] * 3


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_weights_have_the_dtype_of_the_module(dropout):
    _, ours = pair(dropout, dtype=torch.bfloat16)
    leaves = [leaf.bfloat16() for leaf in tensors("sequence_first")]
    out, weights = ours(*leaves, attn_mask=torch.randn(QUERIES, KEYS))
    assert (out.dtype, weights.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"need_weights": False}], ids=str)
def test_low_precision(dtype, options):
    theirs, ours = pair(dtype=dtype)
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in tensors("sequence_first")]
    # PyTorch takes float32 masks with weights of any dtype when no weights are asked for
    mask = torch.randn(QUERIES, KEYS).to(torch.float32 if options else dtype)
    exact = outcome(
        copy.deepcopy(theirs).double(), [leaf.double() for leaf in leaves], {"attn_mask": mask.double()}, **options
    )
    got, expected = (outcome(module, leaves, {"attn_mask": mask}, **options) for module in (ours, theirs))
    assert_as_good(got, expected, exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize("options", [{}, {"need_weights": False}], ids=str)
def test_compiles(options):
    _, ours = pair(batch_first=True, dtype=torch.float32)
    ours.eval()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    leaves = [leaf.detach().float().requires_grad_() for leaf in tensors("batch_first", "all")]
    given = {"key_padding_mask": torch.tensor([[False] * QUERIES, [False] * 2 + [True] * 2])}
    expected = outcome(ours, leaves, given, **options)
    query = leaves[0]
    out, weights = compiled(query, query, query, **given, **options)
    assert_same([out, weights], expected[:2], rtol=1e-5, atol=1e-6)
    assert_same(outcome(compiled, leaves, given, **options), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embed_dim": 0}, "embed_dim must be a positive integer, got 0"),
        ({"embed_dim": 8.0}, "embed_dim must be a positive integer, got 8.0"),
        ({"num_heads": -2}, "num_heads must be a positive integer, got -2"),
        ({"num_heads": 3}, "embed_dim must be divisible by num_heads, got 8 and 3"),
        ({"kdim": 0}, "kdim must be a positive integer, got 0"),
        ({"vdim": "3"}, "vdim must be a positive integer, got '3'"),
        ({"dropout": 1.5}, "dropout must be a number from 0 to 1, got 1.5"),
        ({"dropout": None}, "dropout must be a number from 0 to 1, got None"),
        ({"backend": "cuda"}, "backend must be one of 'auto', 'triton', 'torch', 'reference', got 'cuda'"),
    ],
    ids=str,
)
def test_refuses_at_construction(options, words):
    with pytest.raises(ValueError, match=words):
        MultiheadAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **options})


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
        ({"key": None}, TypeError, "key must be a tensor, got NoneType"),
        ({"query": zeros(EMBED)}, ValueError, r"query must be \(B, N, 8\) or \(N, 8\), got \(8,\)"),
        ({"query": zeros(2, 4, 7)}, ValueError, r"query must be \(B, N, 8\) or \(N, 8\), got \(2, 4, 7\)"),
        ({"key": zeros(5, 6)}, ValueError, r"key must be .* as many dimensions as query, 3, got \(5, 6\)"),
        ({"key": zeros(2, 5, 8)}, ValueError, r"key must be \(B, N, 6\) or .*, got \(2, 5, 8\)"),
        ({"value": zeros(2, 5, 8)}, ValueError, r"value must be \(B, N, 3\) or .*, got \(2, 5, 8\)"),
        ({"key": zeros(3, 5, 6)}, ValueError, r"key must have the batch size of query, 2, got \(3, 5, 6\)"),
        ({"value": zeros(2, 4, 3)}, ValueError, r"value must have a row for each key, \(2, 5, 3\), got \(2, 4, 3\)"),
        (
            {"query": zeros(2, 4, 8, dtype=torch.float64)},
            TypeError,
            "query must have the dtype of the module, torch.float32, got torch.float64",
        ),
        (
            {"value": torch.zeros(2, 5, 3, dtype=torch.int64)},
            TypeError,
            "value must have the dtype of the module, .* got torch.int64",
        ),
        (
            {"key": torch.zeros(2, 5, 6, device="meta")},
            ValueError,
            "key must be on the device of the module, cpu, got meta",
        ),
        ({"key_padding_mask": zeros(5)}, ValueError, r"key_padding_mask must be \(2, 5\), got \(5,\)"),
        (
            {"key_padding_mask": zeros(2, 5).int()},
            TypeError,
            "key_padding_mask must be a bool or float tensor, got torch.int32",
        ),
        ({"attn_mask": zeros(5, 4)}, ValueError, r"attn_mask must be \(4, 5\) or \(4, 4, 5\), got \(5, 4\)"),
        ({"attn_mask": zeros(2, 4, 5)}, ValueError, r"attn_mask must be \(4, 5\) or \(4, 4, 5\), got \(2, 4, 5\)"),
        ({"attn_mask": True}, TypeError, "attn_mask must be a bool or float tensor, got bool"),
        (
            {"attn_mask": torch.zeros(4, 5, device="meta")},
            ValueError,
            "attn_mask must be on the device of query, cpu, got meta",
        ),
    ],
    ids=str,
)
def test_refuses_at_call(change, error, words):
    module = MultiheadAttention(EMBED, HEADS, kdim=6, vdim=3, batch_first=True)
    given = {"query": zeros(2, 4, 8), "key": zeros(2, 5, 6), "value": zeros(2, 5, 3), **change}
    with pytest.raises(error, match=words):
        module(**given)


def test_shows_its_options():
    text = repr(MultiheadAttention(EMBED, HEADS, batch_first=True, backend="torch"))
    assert "8, num_heads=2, batch_first=True, backend='torch'" in text
    assert "backend" not in repr(MultiheadAttention(EMBED, HEADS))
    with use_backend("reference"):
        x = zeros(3, 2, EMBED)
        assert MultiheadAttention(EMBED, HEADS)(x, x, x)[0].shape == x.shape
