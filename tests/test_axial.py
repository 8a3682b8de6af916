"""The axial modules against plain formulas: lucidrains' axial attention, CCNet's block, dense masks of all pairs."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

import attnk
from attnk.modules import axial
from attnk.modules.axial import AxialAttention, AxialTransformerBlock, CrissCrossAttention, SeparableSelfAttention
from attnk.testing import layouts

aten = torch.ops.aten
DIM, HEADS = 12, 3
MODES = ["sum", "sequential", "criss_cross"]
SIZES = [(1, 1), (7, 5), (13, 17)]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LAYOUT_NAMES = [name for name, _ in layouts(torch.zeros(2, 2, 2, 2))]
modes = pytest.mark.parametrize("mode", MODES)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
formats = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)


# What the modules must compute.


class LucidSelfAttention(nn.Module):
    def __init__(self, dim, heads, dim_heads=None):
        super().__init__()
        self.heads, self.dim_heads = heads, dim_heads or dim // heads
        hidden = self.dim_heads * heads
        self.to_q = nn.Linear(dim, hidden, bias=False)
        self.to_kv = nn.Linear(dim, 2 * hidden, bias=False)
        self.to_out = nn.Linear(hidden, dim)

    def forward(self, x):
        q, k, v = self.to_q(x), *self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (each.unflatten(-1, (self.heads, self.dim_heads)).transpose(-3, -2) for each in (q, k, v))
        weights = (q @ k.mT * self.dim_heads**-0.5).softmax(-1)
        return self.to_out((weights @ v).transpose(-3, -2).flatten(-2))


class LucidPermuted(nn.Module):
    def __init__(self, fn, axis):
        super().__init__()
        self.fn, self.axis = fn, axis

    def forward(self, x):
        order = (0, 3, 2, 1) if self.axis == 2 else (0, 2, 3, 1)
        inverse = (0, 3, 2, 1) if self.axis == 2 else (0, 3, 1, 2)
        return self.fn(x.permute(order)).permute(inverse)


class LucidAxial(nn.Module):
    """Of maps with channels first, ``dim_index=1``."""

    def __init__(self, dim, heads, dim_heads=None, sum_axial_out=True):
        super().__init__()
        self.sum_axial_out = sum_axial_out
        self.axial_attentions = nn.ModuleList(
            LucidPermuted(LucidSelfAttention(dim, heads, dim_heads), axis) for axis in (2, 3)
        )

    def forward(self, x):
        if self.sum_axial_out:
            return sum(attention(x) for attention in self.axial_attentions)
        for attention in self.axial_attentions:
            x = attention(x)
        return x


def dense_attention(q, k, v, height, width, tables, span, joint):
    """[of columns, of rows] or [of both at once], among all pairs (B, heads, N, D); tables of columns and rows."""
    rows, columns = (
        each.flatten() for each in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    bias, seen = [], []
    for table, here, other, side in ((tables[0], rows, columns, height), (tables[1], columns, rows, width)):
        step = here[:, None] - here
        bias.append(0.0 if table is None else table[step + side - 1].permute(2, 0, 1))
        seen.append((other[:, None] == other) & (step.abs() <= (max(height, width) if span is None else span)))
    if joint:
        bias = [torch.where(seen[1], torch.as_tensor(bias[1], dtype=q.dtype), torch.as_tensor(bias[0], dtype=q.dtype))]
        seen = [seen[0] | seen[1]]
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return [
        (logits + added).masked_fill(~mask, -torch.inf).softmax(-1) @ v for added, mask in zip(bias, seen, strict=True)
    ]


class Dense(nn.Module):
    """An AxialAttention's parameters in attention between all pairs of tokens, most of which are masked."""

    def __init__(self, module):
        super().__init__()
        self.module = copy.deepcopy(module)

    def forward(self, x):
        module, (height, width) = self.module, x.shape[2:]
        tables = (module.column_bias_table, module.row_bias_table)
        if module.size is not None:
            tables = [resized(table, 2 * side - 1) for table, side in zip(tables, (height, width), strict=True)]
        both = module.mode == "criss_cross"
        branches = [module.criss_cross] if both else [axis["fn"] for axis in module.axial_attentions]
        outs, tokens = [], x.flatten(2).mT
        for number, branch in enumerate(branches):
            q, k, v = branch.to_q(tokens), *branch.to_kv(tokens).chunk(2, -1)
            q, k, v = (each.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for each in (q, k, v))
            out = dense_attention(q, k, v, height, width, tables, module.span, both)[number]
            outs.append(branch.to_out(out.transpose(1, 2).flatten(2)))
            tokens = outs[-1] if module.mode == "sequential" else tokens
        return (sum(outs) if module.mode == "sum" else outs[-1]).mT.reshape(x.shape)


def resized(table, length):
    if len(table) == length:
        return table
    return F.interpolate(table.T[None, :, :, None], size=(length, 1), mode="bicubic")[0, :, :, 0].T


class CCNet(nn.Module):
    def __init__(self, in_dim):
        super().__init__()
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        query, key, value = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        height = x.shape[2]
        infinite = torch.diag(torch.full((height,), -torch.inf, dtype=x.dtype, device=x.device))
        energy_h = (torch.einsum("bchw,bciw->bwhi", query, key) + infinite).transpose(1, 2)
        energy_w = torch.einsum("bchw,bchj->bhwj", query, key)
        weights = torch.cat([energy_h, energy_w], 3).softmax(3)
        out_h = torch.einsum("bciw,bhwi->bchw", value, weights[..., :height])
        out_w = torch.einsum("bchj,bhwj->bchw", value, weights[..., height:])
        return self.gamma * (out_h + out_w) + x


class Separable(nn.Module):
    """Its groups of channels one by one."""

    def __init__(self, module):
        super().__init__()
        self.module = copy.deepcopy(module)

    def forward(self, x):
        module, groups = self.module, self.module.channel_groups
        heads, head_dim = module.num_heads // groups, module.dim // module.num_heads
        weights, biases = module.qkv_proj.weight.chunk(groups), module.qkv_proj.bias.chunk(groups)
        rows, columns = [], []
        for part, weight, bias in zip(x.chunk(groups, 1), weights, biases, strict=True):
            qkv = torch.einsum("bchw,oc->bhwo", part, weight[:, :, 0, 0]) + bias
            q, k, v = (qkv.unflatten(-1, (heads, 3, head_dim))[..., i, :].movedim(3, 1) for i in range(3))
            rows.append((q @ k.mT / math.sqrt(head_dim)).softmax(-1) @ v)  # (B, heads, H, W, D)
            q, k, v = (each.transpose(2, 3) for each in (q, k, v))
            columns.append(((q @ k.mT / math.sqrt(head_dim)).softmax(-1) @ v).transpose(2, 3))
        row, column = (torch.cat(parts, 1).movedim(1, 3).flatten(3) for parts in (rows, columns))
        if module.merge == "concat":
            merged = torch.cat([row, column], -1)
        else:
            merged = (row + column) / (2 if module.merge == "mean" else 1)
        return module.out_proj(merged).permute(0, 3, 1, 2)


class Block(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = copy.deepcopy(module)
        self.attention = Dense(module.attn)
        self.module.attn = nn.Identity()

    def _norm(self, norm, x):
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _ffn(self, x):
        return self.module.ffn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x):
        norm1, norm2 = self.module.norm1, self.module.norm2
        if self.module.norm_first:
            x = x + self.attention(self._norm(norm1, x))
            return x + self._ffn(self._norm(norm2, x))
        x = self._norm(norm1, x + self.attention(x))
        return self._norm(norm2, x + self._ffn(x))


def axial_pair(mode="sum", position="none", size=(7, 5), dtype=torch.float64, **options):
    ours = AxialAttention(DIM, HEADS, mode, position, size=size if position == "relative" else None, **options)
    with torch.no_grad():
        for table in (ours.row_bias_table, ours.column_bias_table):
            if table is not None:
                table.normal_()
    ours = ours.to(dtype)
    return Dense(ours), ours


def lucid_pair(mode="sum", dtype=torch.float64, dim_head=None, **options):
    theirs = LucidAxial(DIM, HEADS, dim_head, mode == "sum").to(dtype)
    ours = AxialAttention(DIM, HEADS, mode, dim_head=dim_head, **options).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


class Recurrent(nn.Module):
    def __init__(self, block, recurrence):
        super().__init__()
        self.block, self.recurrence = block, recurrence

    def forward(self, x):
        for _ in range(self.recurrence):
            x = self.block(x)
        return x


def ccnet_pair(recurrence=1, dtype=torch.float64, in_dim=16, **options):
    theirs = CCNet(in_dim).to(dtype)
    nn.init.constant_(theirs.gamma, 0.7)
    ours = CrissCrossAttention(in_dim, recurrence, **options).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return Recurrent(theirs, recurrence), ours


def separable_pair(merge="sum", channel_groups=1, dtype=torch.float64, **options):
    ours = SeparableSelfAttention(24, 4, merge, channel_groups, **options).to(dtype)
    return Separable(ours), ours


def block_pair(dtype=torch.float64, **options):
    ours = AxialTransformerBlock(DIM, HEADS, 2, **options).to(dtype)
    with torch.no_grad():
        for norm in (ours.norm1, ours.norm2):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-1, 1)
    return Block(ours), ours


FAMILIES = {
    "sum": lambda **options: lucid_pair("sum", **options),
    "sequential": lambda **options: lucid_pair("sequential", **options),
    "criss_cross": lambda **options: axial_pair("criss_cross", **options),
    "relative": lambda **options: axial_pair("sum", "relative", **options),
    "CCNet": lambda **options: ccnet_pair(2, **options),
    "separable": lambda **options: separable_pair("sum", **options),
    "groups": lambda **options: separable_pair("concat", 2, **options),
    "block": lambda **options: block_pair(**options),
    "post-norm": lambda **options: block_pair(norm_first=False, mode="sequential", activation="relu", **options),
}
families = pytest.mark.parametrize("family", FAMILIES)


def channels_of(module):
    return next(p for p in (getattr(module, "dim", None), getattr(module, "in_dim", None), DIM) if p)


def draw(module, *size, memory_format=torch.contiguous_format, device="cpu", batch=2):
    dtype = next(module.parameters()).dtype
    x = torch.randn(batch, channels_of(module), *size, dtype=torch.float64).to(device, dtype)
    return x.contiguous(memory_format=memory_format)


def key(name):
    """Ours of a parameter's name in a formula."""
    return name.replace("attention.module.", "attn.").removeprefix("module.").removeprefix("block.")


def outcome(module, x):
    """Output, and gradients of x and of all parameters by name."""
    x = x.detach().requires_grad_()
    out = module(x)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view(out.shape).to(out)
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, [x, *parameters], dout)
    return {"out": out.detach(), "x": grads[0], **dict(zip(map(key, names), grads[1:], strict=True))}


def assert_same(module, other, x, **tolerances):
    tolerances = tolerances or {"rtol": 1e-8, "atol": 1e-10}
    got, expected = outcome(module, x), outcome(other, x)
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(
            got[name], expected[name], **tolerances, msg=lambda text, name=name: f"{name}: {text}"
        )


def skip_without_kernels(implementation, device):
    reason = attnk.dispatch.no_kernel_here(torch.empty(0, device=device))
    if implementation == "triton" and reason is not None:
        pytest.skip(reason)


@families
@formats
@sizes
def test_equals(family, memory_format, size):
    theirs, ours = FAMILIES[family]()
    x = draw(ours, *size, memory_format=memory_format)
    before = x.clone()
    assert_same(ours.train(), theirs.train(), x)
    assert_same(ours.eval(), theirs.eval(), x)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    assert torch.equal(x, before)


@families
@pytest.mark.parametrize("layout", range(len(LAYOUT_NAMES)), ids=LAYOUT_NAMES)
def test_equals_in_every_layout(family, layout):
    theirs, ours = FAMILIES[family]()
    x = list(layouts(draw(ours, 4, 5)))[layout][1]
    assert_same(ours, theirs, x)
    channels_last = LAYOUT_NAMES[layout] in ("channels_last", "channels_last_slice")
    assert ours(x).is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize(
    ("family", "lies"),
    [
        ("sum", "contiguous"),
        ("sequential", "channels_last"),
        ("criss_cross", "contiguous"),
        ("relative", "channels_last"),
        ("CCNet", "channels_last"),
        ("separable", "contiguous"),
        ("groups", "contiguous"),
        ("block", "contiguous"),
    ],
)
@pytest.mark.parametrize("implementation", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_on_every_backend(family, lies, implementation, dtype, device):
    skip_without_kernels(implementation, device)
    theirs, ours = FAMILIES[family](backend=implementation, dtype=dtype)
    x = draw(ours, 2, 3, memory_format=FORMATS[lies], device=device, batch=1)
    tolerances = {"rtol": 1e-3, "atol": 5e-5} if dtype == torch.float32 else {}
    assert_same(ours.to(device), theirs.to(device), x, **tolerances)


@families
@formats
def test_equals_in_float32(family, memory_format, device):
    theirs, ours = FAMILIES[family](dtype=torch.float32)
    x = draw(ours, 13, 9, memory_format=memory_format, device=device)
    assert_same(ours.to(device), theirs.to(device), x, rtol=1e-3, atol=5e-5)


@families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(family, dtype):
    theirs, ours = FAMILIES[family](dtype=torch.float32)
    x = draw(ours, 5, 6)
    for memory_format in FORMATS.values():
        out = copy.deepcopy(ours).to(dtype)(x.to(dtype).contiguous(memory_format=memory_format))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), theirs(x), rtol=6e-2, atol=6e-2)


@modes
@pytest.mark.parametrize("position", ["none", "relative"])
@pytest.mark.parametrize("options", [{}, {"span": 0}, {"span": 2}, {"dim_head": 5}, {"qkv_bias": True}], ids=str)
def test_options_of_axial_attention(mode, position, options):
    theirs, ours = axial_pair(mode, position, **options)
    biases = [name for name in ours.state_dict() if name.endswith(("to_q.bias", "to_kv.bias"))]
    assert len(biases) == (0 if "qkv_bias" not in options else 2 if mode == "criss_cross" else 4)
    assert_same(ours, theirs, draw(ours, 7, 5))


@modes
@formats
def test_channels_behind(mode, memory_format):
    theirs, ours = axial_pair(mode, "relative")
    behind = axial_pair(mode, "relative", channels_first=False)[1]
    behind.load_state_dict(ours.state_dict())
    x = draw(ours, 7, 5, memory_format=memory_format).permute(0, 2, 3, 1)
    out = behind(x)
    torch.testing.assert_close(out, theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    assert out.stride() == x.stride()
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, C\) with C = 12, got \(2, 12, 7, 5\)"):
        behind(x.permute(0, 3, 1, 2))


@pytest.mark.parametrize("dim_head", [5, 8])
@pytest.mark.parametrize("mode", ["sum", "sequential"])
def test_heads_of_another_width(mode, dim_head):
    theirs, ours = lucid_pair(mode, dim_head=dim_head)
    assert_same(ours, theirs, draw(ours, 4, 3))


def test_columns_come_first():
    """With one token in each column only the rows are left to mix tokens, and the other way round."""
    _, ours = lucid_pair("sequential")
    columns = ours.axial_attentions[0]["fn"]
    x = draw(ours, 1, 6)
    alone = columns.to_out(columns.to_kv(x.movedim(1, 3))[..., DIM:]).movedim(3, 1)
    ours.axial_attentions[1]["fn"] = columns
    expected = LucidPermuted(LucidSelfAttention(DIM, HEADS), 3).double()
    expected.fn.load_state_dict(columns.state_dict())
    torch.testing.assert_close(ours(x), expected(alone))


@modes
@formats
@pytest.mark.parametrize("size", [(7, 9), (3, 5), (1, 1), (14, 10)], ids=str)
def test_tables_for_other_sizes(mode, memory_format, size):
    theirs, ours = axial_pair(mode, "relative", (7, 5))
    assert ours.column_bias_table.shape == (13, HEADS)
    assert ours.row_bias_table.shape == (9, HEADS)
    assert_same(ours, theirs, draw(ours, *size, memory_format=memory_format), rtol=1e-6, atol=1e-8)
    out = ours(draw(ours, 7, 5))
    assert all(table.grad is None for table in (ours.row_bias_table, ours.column_bias_table))
    out.square().sum().backward()
    column_grad, row_grad = ours.column_bias_table.grad.clone(), ours.row_bias_table.grad
    assert (column_grad[6] == 0).all() == (mode == "criss_cross")  # where the token is its row's
    column_grad[6] = 1
    assert column_grad.abs().min() > 0
    assert row_grad.abs().min() > 0


@pytest.mark.parametrize("merge", ["sum", "mean", "concat"])
@pytest.mark.parametrize("channel_groups", [1, 2, 4])
def test_merges_and_groups(merge, channel_groups):
    theirs, ours = separable_pair(merge, channel_groups)
    assert ours.qkv_proj.weight.shape == (72, 24 // channel_groups, 1, 1)
    for memory_format in FORMATS.values():
        assert_same(ours, theirs, draw(ours, 4, 3, memory_format=memory_format, batch=1))


def test_groups_are_apart():
    ours = SeparableSelfAttention(24, 4, channel_groups=4).double()
    nn.init.eye_(ours.out_proj.weight)
    x = draw(ours, 4, 3).requires_grad_()
    (grad,) = torch.autograd.grad(ours(x)[:, 6:12].square().sum(), x)
    assert grad[:, 6:12].abs().min() > 0
    assert grad[:, :6].abs().max() == grad[:, 12:].abs().max() == 0


@pytest.mark.parametrize("recurrence", [1, 2, 3])
@formats
def test_recurrence(recurrence, memory_format):
    theirs, ours = ccnet_pair(recurrence)
    assert_same(ours, theirs, draw(ours, 5, 4, memory_format=memory_format))


@pytest.mark.parametrize("in_dim", [1, 8, 20, 136])
def test_criss_cross_of_other_widths(in_dim):
    ours = CrissCrossAttention(in_dim).double()
    assert ours.query_conv.weight.shape == (max(1, in_dim // 8), in_dim, 1, 1)
    x = draw(ours, 3, 4)
    assert torch.equal(ours(x), x)
    if in_dim >= 8:
        theirs, ours = ccnet_pair(in_dim=in_dim)
        assert_same(ours, theirs, x)


def test_two_rounds_see_everything():
    def reach(recurrence):
        _, ours = ccnet_pair(recurrence)
        x = draw(ours, 4, 5, batch=1).requires_grad_()
        (grad,) = torch.autograd.grad(ours(x)[0, :, 1, 2].sum(), x)
        return (grad[0].abs().sum(0) > 0).double()

    once = torch.zeros(4, 5, dtype=torch.float64)
    once[1], once[:, 2] = 1, 1
    torch.testing.assert_close(reach(1), once)
    assert reach(2).all()


@modes
@pytest.mark.parametrize("options", [{}, {"span": 1}, {"norm_first": False}, {"activation": "relu"}], ids=str)
def test_options_of_the_block(mode, options):
    theirs, ours = block_pair(mode=mode, position="relative", size=(4, 3), **options)
    assert (ours.attn.mode, ours.attn.size, ours.attn.span) == (mode, (4, 3), options.get("span"))
    assert isinstance(ours.ffn[1], nn.ReLU if "activation" in options else nn.GELU)
    assert ours.ffn[0].out_features == 2 * DIM
    assert_same(ours, theirs, draw(ours.attn, 4, 3), rtol=1e-7, atol=1e-9)


# Where things lie.


class Watch(TorchDispatchMode):
    """Which operators ran, and what they returned."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function.overloadpacket, out))
        return out

    def copies(self, numel):
        copying = (aten.clone, aten.copy_, aten.contiguous, aten._to_copy, aten.cat, aten.constant_pad_nd)
        return [packet for packet, out in self.calls if packet in copying and out.numel() >= numel]

    def products(self):
        packets = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)
        return [out for packet, out in self.calls if packet in packets]


def watched_attention(seen):
    """In place of the operation: what it got, and an output that lies as the operation's would."""

    def attention(q, k, v, axis="row", **options):
        seen.append((q, k, v, axis, options))
        return v.new_ones(*q.shape[:4], v.shape[4])

    return attention


@families
@formats
@sizes
def test_the_output_has_the_memory_format(family, memory_format, size):
    _, ours = FAMILIES[family]()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = ours(draw(ours, *size, memory_format=memory_format))
        assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("family", ["sum", "sequential", "criss_cross", "relative", "CCNet", "separable", "groups"])
@formats
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_queries_keys_and_values_are_views(family, memory_format, grad, monkeypatch):
    seen = []
    monkeypatch.setattr(axial, "axial_attention", watched_attention(seen))
    _, ours = FAMILIES[family]()
    x = draw(ours, 12, 10, memory_format=memory_format)
    with torch.set_grad_enabled(grad), Watch() as watch:
        ours(x)
    storages = {out.untyped_storage().data_ptr() for out in watch.products()}
    for q, k, v, *_ in seen:
        assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        assert q.untyped_storage().data_ptr() in storages
        assert q.stride(-1) == 1
        assert q.stride(1) == q.stride(2) * q.shape[2]
    expected = 0
    if family == "groups":  # x for the convolution where it is contiguous, and the two results side by side
        expected = 1 + (memory_format == torch.contiguous_format)
    assert len(watch.copies(x.numel())) == expected


@formats
def test_one_product_for_all_that_reads_x(memory_format, monkeypatch):
    seen = []
    monkeypatch.setattr(axial, "axial_attention", watched_attention(seen))
    for family, inputs in {"sum": 1, "sequential": 2, "criss_cross": 1, "CCNet": 2}.items():
        seen.clear()
        _, ours = FAMILIES[family]()
        with torch.no_grad(), Watch() as watch:
            ours(draw(ours, 12, 10, memory_format=memory_format))
        outputs = {"sum": 2, "sequential": 2, "criss_cross": 1, "CCNet": 0}[family]
        assert len(watch.products()) == inputs + outputs


def test_no_gradient_for_every_image_of_few_tokens():
    """The copy of a small map is smaller than one more weight for every image."""
    _, ours = lucid_pair("sum")
    x = draw(ours, 2, 2, batch=50).requires_grad_()
    out = ours(x)
    with Watch() as watch:
        out.sum().backward()
    assert max(out.numel() for _, out in watch.calls if isinstance(out, torch.Tensor)) < 50 * 6 * DIM * DIM


@families
def test_the_operation_gets_the_options(family, monkeypatch):
    seen = []
    monkeypatch.setattr(axial, "axial_attention", watched_attention(seen))
    for implementation in (None, "torch", "reference"):
        _, ours = FAMILIES[family](backend=implementation)
        ours(draw(ours, 3, 4))
        assert {options["backend"] for *_, options in seen} == {implementation}
        seen.clear()


# Replaced, watched and frozen parts.


def doubled(module):
    module.register_forward_hook(lambda module, inputs, out: out * 2)


def shifted(module):
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


class Opaque(nn.Module):
    """A linear map whose weight is no tensor, as quantised ones are."""

    def __init__(self, linear):
        super().__init__()
        self.inner = linear

    def forward(self, x):
        return self.inner(x) * 3


@pytest.mark.parametrize("hook", [doubled, shifted])
@pytest.mark.parametrize("part", ["to_q", "to_kv", "to_out"])
@pytest.mark.parametrize("mode", ["sum", "sequential"])
@formats
def test_hooks_of_projections(hook, part, mode, memory_format):
    theirs, ours = lucid_pair(mode)
    hook(getattr(theirs.axial_attentions[1].fn, part))
    hook(getattr(ours.axial_attentions[1]["fn"], part))
    x = draw(ours, 7, 5, memory_format=memory_format)
    assert_same(ours, theirs, x)
    assert ours(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("part", ["query_conv", "key_conv", "value_conv"])
@formats
def test_replaced_convolutions(part, memory_format):
    theirs, ours = ccnet_pair()
    x = draw(ours, 7, 5, memory_format=memory_format)
    for module in (theirs.block, ours):
        setattr(module, part, spectral_norm(getattr(module, part)))
    ours.load_state_dict(theirs.block.state_dict())
    assert_same(ours.eval(), theirs.eval(), x)
    wide = nn.Conv2d(16, getattr(ours, part).weight.shape[0], 3, padding=1).double()
    for module in (theirs.block, ours):
        setattr(module, part, copy.deepcopy(wide))
    assert_same(ours, theirs, x)
    assert ours(x).is_contiguous(memory_format=memory_format)


def test_replaced_linear_maps():
    theirs, ours = lucid_pair("sum")
    for module in (theirs.axial_attentions[0].fn, ours.axial_attentions[0]["fn"]):
        module.to_q, module.to_out = Opaque(module.to_q), Opaque(module.to_out)
    x = draw(ours, 4, 5)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("part", ["to_q", "to_kv"])
def test_one_linear_map_has_a_bias(part):
    theirs, ours = lucid_pair("sum")
    biased = nn.Linear(DIM, {"to_q": 1, "to_kv": 2}[part] * DIM).double()
    for module in (theirs.axial_attentions[0].fn, ours.axial_attentions[0]["fn"]):
        setattr(module, part, copy.deepcopy(biased))
    assert_same(ours, theirs, draw(ours, 4, 5))


@families
def test_frozen(family):
    theirs, ours = FAMILIES[family]()
    x = draw(ours, 4, 5)
    for number, parameter in enumerate(ours.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    expected = outcome(theirs, x)
    ours(x).backward(torch.linspace(-1, 1, x.numel(), dtype=torch.float64).sin().view(x.shape))
    for number, (name, parameter) in enumerate(ours.named_parameters()):
        assert (parameter.grad is None) == (number % 2 == 1)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[key(name)])


# Dropout.


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        ("criss_cross", "triton"),
        ("criss_cross", "reference"),
        *((family, "torch") for family in ("sum", "sequential", "relative", "groups", "block")),
    ],
)
def test_dropout(family, implementation, device):
    skip_without_kernels(implementation, device)
    _, ours = FAMILIES[family](dropout=0.4, backend=implementation)
    plain = FAMILIES[family](backend=implementation)[1]
    plain.load_state_dict(ours.state_dict())
    ours, plain = ours.to(device), plain.to(device)
    x = draw(ours, 2, 2, batch=1, device=device)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(outcome(ours, x))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not torch.equal(ours(x), ours(x))
    torch.testing.assert_close(ours.eval()(x), plain(x))
    assert torch.equal(ours(x), ours(x))


@pytest.mark.parametrize("mode", ["sum", "criss_cross"])
def test_dropout_leaves_the_expectation(mode):
    _, ours = axial_pair(mode, dropout=0.3)
    draws = 2000
    x = draw(ours, 3, 2, batch=1)
    outs = ours(x.expand(draws, -1, -1, -1))
    error = (outs.mean(0) - ours.eval()(x)[0]).abs()
    assert (error < 5 * outs.std(0) / draws**0.5).all()
    assert (outs.std(0) > 1e-4).all()


def test_everything_dropped():
    _, ours = lucid_pair("sum", dropout=1.0)
    bias = sum(axis["fn"].to_out.bias for axis in ours.axial_attentions)
    x = draw(ours, 4, 3)
    torch.testing.assert_close(ours(x), bias[:, None, None].expand(x.shape))


def test_where_dropout_stands():
    block = AxialTransformerBlock(8, 2, dropout=0.3)
    where = {name: part.p for name, part in block.named_modules() if isinstance(part, nn.Dropout)}
    assert where == {"attn.dropout": 0.3, "ffn.2": 0.3, "ffn.4": 0.3}
    assert AxialAttention(8, 2).dropout.p == SeparableSelfAttention(8, 2).dropout.p == 0


# The modules as such.


def test_published_keys():
    keys = [
        f"axial_attentions.{i}.fn.{name}"
        for i in (0, 1)
        for name in ("to_q.weight", "to_kv.weight", "to_out.weight", "to_out.bias")
    ]
    for mode in ("sum", "sequential"):
        assert list(AxialAttention(DIM, HEADS, mode).state_dict()) == keys
    assert list(CrissCrossAttention(16).state_dict()) == list(CCNet(16).state_dict())
    assert set(AxialAttention(DIM, HEADS, "criss_cross", "relative", size=(2, 3)).state_dict()) == {
        "criss_cross.to_q.weight", "criss_cross.to_kv.weight", "criss_cross.to_out.weight", "criss_cross.to_out.bias",
        "column_bias_table", "row_bias_table",
    }  # fmt: skip
    assert list(SeparableSelfAttention(8, 2).state_dict()) == [
        "qkv_proj.weight", "qkv_proj.bias", "out_proj.weight", "out_proj.bias",
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match=r"axial_attentions\.1\.fn\.to_kv\.weight"):
        AxialAttention(8, 2).load_state_dict(
            {name: tensor for name, tensor in AxialAttention(8, 2).state_dict().items() if "1.fn.to_kv" not in name}
        )


@pytest.mark.parametrize("prefix", ["", "head.cca."])
def test_keys_of_mmcv(prefix):
    theirs, ours = ccnet_pair()
    state = {f"{prefix}{name}": tensor for name, tensor in ours.state_dict().items() if name != "gamma"}
    state[f"{prefix}gamma.scale"] = torch.tensor(0.7, dtype=torch.float64)
    again = CrissCrossAttention(16).double()
    holder = again
    for name in reversed(prefix.split(".")[:-1]):
        outer = nn.Module()
        outer.add_module(name, holder)
        holder = outer
    names = list(state)
    holder.load_state_dict(state, strict=True)
    assert list(state) == names
    x = draw(ours, 3, 4)
    torch.testing.assert_close(again(x), theirs(x))
    with pytest.raises(RuntimeError, match="gamma"):
        holder.load_state_dict({name: tensor for name, tensor in state.items() if "gamma" not in name})


def test_initialisation_draws_what_the_published_draw():
    for build, published in (
        (lambda: AxialAttention(DIM, HEADS), lambda: LucidAxial(DIM, HEADS)),
        (lambda: CrissCrossAttention(16), lambda: CCNet(16)),
    ):
        torch.manual_seed(3)
        ours = build()
        torch.manual_seed(3)
        theirs = published()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other)
    tables = AxialAttention(8, 4, position="relative", size=(100, 100)).row_bias_table
    assert 0.018 < tables.std() < 0.022


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AxialAttention(0), "dim must be a positive integer, got 0"),
        (lambda: AxialAttention(12, 5), "dim must be divisible by num_heads, got dim=12, num_heads=5"),
        (lambda: AxialAttention(12, -1), "num_heads must be a positive integer, got -1"),
        (lambda: AxialAttention(12, 5, dim_head=0), "dim_head must be a positive integer, got 0"),
        (lambda: AxialAttention(12, 3, "mean"), "mode must be one of 'sum', 'sequential', 'criss_cross', got 'mean'"),
        (lambda: AxialAttention(12, 3, position="rel"), "position must be one of 'none', 'relative', got 'rel'"),
        (lambda: AxialAttention(12, 3, position="relative"), r"size must be \(height, width\) for .*, got None"),
        (lambda: AxialAttention(12, 3, position="relative", size=(1, 2, 3)), r"size must be .*, got \(1, 2, 3\)"),
        (lambda: AxialAttention(12, 3, position="relative", size=7), "size must be .*, got 7"),
        (lambda: AxialAttention(12, 3, position="relative", size=(0, 7)), r"size\[0\] must be a positive .*, got 0"),
        (lambda: AxialAttention(12, 3, size=(7, 7)), r"size must be None without position='relative', got \(7, 7\)"),
        (lambda: AxialAttention(12, 3, dropout=1.5), r"dropout must be a number from 0 to 1, got 1\.5"),
        (lambda: AxialAttention(12, 3, span=-1), "span must be an integer of at least 0 or None, got -1"),
        (lambda: AxialAttention(12, 3, span=1.0), r"span must be .*, got 1\.0"),
        (lambda: AxialAttention(12, 3, backend="cuda"), "backend must be one of .*, got 'cuda'"),
        (lambda: SeparableSelfAttention(12, 5), "dim must be divisible by num_heads, got dim=12, num_heads=5"),
        (lambda: SeparableSelfAttention(12, 3, "max"), "merge must be one of 'sum', 'mean', 'concat', got 'max'"),
        (lambda: SeparableSelfAttention(12, 3, channel_groups=2), "num_heads must be divisible by channel_groups, got"),
        (lambda: SeparableSelfAttention(12, 3, channel_groups=0), "channel_groups must be a positive integer, got 0"),
        (lambda: SeparableSelfAttention(12, 3, dropout=-1), "dropout must be .*, got -1"),
        (lambda: SeparableSelfAttention(12, 3, backend="gpu"), "backend must be one of .*, got 'gpu'"),
        (lambda: CrissCrossAttention("64"), "in_dim must be a positive integer, got '64'"),
        (lambda: CrissCrossAttention(16, 0), "recurrence must be a positive integer, got 0"),
        (lambda: CrissCrossAttention(16, backend=""), "backend must be one of .*, got ''"),
        (lambda: AxialTransformerBlock(12, 5), "dim must be divisible by num_heads"),
        (lambda: AxialTransformerBlock(12, 3, 0), "expansion_factor must be .*, got 0"),
        (lambda: AxialTransformerBlock(12, 3, math.inf), "expansion_factor must be .*, got inf"),
        (lambda: AxialTransformerBlock(12, 3, activation="tanh"), "activation must be one of 'relu', 'gelu', got"),
        (lambda: AxialTransformerBlock(12, 3, dropout=2), "dropout must be a number from 0 to 1, got 2"),
        (lambda: AxialTransformerBlock(12, 3, mode="both"), "mode must be one of"),
    ],
)
def test_refuses_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "module",
    [
        AxialAttention(12, 3),
        AxialAttention(12, 3, "criss_cross"),
        SeparableSelfAttention(12, 3),
        CrissCrossAttention(12),
        AxialTransformerBlock(12, 3),
    ],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: torch.randn(2, 8, 3, 4), ValueError, r"x must be \(B, C, H, W\) with C = 12, got \(2, 8, 3, 4\)"),
        (lambda: torch.randn(12, 3, 4), ValueError, r"x must be \(B, C, H, W\) .*, got \(12, 3, 4\)"),
        (lambda: torch.randn(2, 12, 3, 4).double(), TypeError, "x must have the dtype .*float32, got .*float64"),
        (lambda: torch.ones(2, 12, 3, 4, dtype=torch.int64), TypeError, "x must have the dtype .*, got .*int64"),
        (lambda: None, TypeError, "x must be a tensor, got NoneType"),
        (lambda: torch.randn(2, 12, 3, 4, device="meta"), ValueError, "x must be on the device .*cpu, got meta"),
    ],
)
def test_refuses_at_call(module, make, error, words):
    with pytest.raises(error, match=words):
        module(make())


@families
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
@formats
def test_empty(family, shape, memory_format):
    _, ours = FAMILIES[family]()
    batch, *size = shape
    if family == "groups" and batch:
        with pytest.raises(ValueError, match="x must have at least one pixel with channel_groups=2, got"):
            ours(draw(ours, *size))
        return
    results = outcome(ours, draw(ours, *size, batch=batch, memory_format=memory_format))
    assert results["out"].shape == (batch, channels_of(ours), *size)
    for name, grad in results.items():
        assert name in ("out", "x") or not grad.any()


@families
@formats
def test_autocast(family, memory_format):
    theirs, ours = FAMILIES[family](dtype=torch.float32)
    x = draw(ours, 6, 7, memory_format=memory_format)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = outcome(ours, x), outcome(theirs, x)
    for name in got:
        assert got[name].dtype == expected[name].dtype
        scale = max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(got[name] / scale, expected[name] / scale, rtol=6e-2, atol=6e-2)


def test_autocast_casts_a_weight_once():
    _, ours = lucid_pair("sum", dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), Watch() as watch:
        ours(draw(ours, 12, 10, batch=7))
    casts = [out.numel() for packet, out in watch.calls if packet is aten._to_copy and out.dtype == torch.bfloat16]
    assert max(size for size in casts if size != 7 * DIM * 120) == 6 * DIM * DIM


@pytest.mark.parametrize(
    ("family", "lies"),
    [
        ("relative", "contiguous"),
        ("criss_cross", "channels_last"),
        ("CCNet", "contiguous"),
        ("groups", "contiguous"),
        ("post-norm", "contiguous"),
    ],
)
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_to_one_graph(family, lies):
    _, ours = FAMILIES[family]()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = draw(ours, 4, 6, memory_format=FORMATS[lies])
    got, expected = outcome(compiled, x), outcome(ours, x)
    for one, other in zip(got.values(), expected.values(), strict=True):
        torch.testing.assert_close(one, other)
    assert got["out"].stride() == expected["out"].stride()
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), ours.eval()(x))


def copies(module):
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


@families
def test_copies(family):
    _, ours = FAMILIES[family]()
    x = draw(ours, 3, 4)
    expected = ours.eval()(x)
    for other in copies(ours):
        assert repr(other) == repr(ours)
        assert torch.equal(other(x), expected)
    again = FAMILIES[family]()[1].eval()
    assert not torch.equal(again(x), expected)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), expected)


def test_options_are_shown():
    text = repr(
        AxialAttention(8, 2, "sequential", "relative", size=(3, 4), span=2, channels_first=False, backend="torch")
    )
    for words in (
        "8, num_heads=2, mode='sequential', position='relative', size=(3, 4), span=2, channels_first=False, "
        "backend='torch'",
        "Dropout(p=0.0",
    ):
        assert words in text
    assert "backend" not in repr(AxialAttention(8, 2))
    text = repr(SeparableSelfAttention(8, 4, "mean", 2, backend="torch"))
    assert "num_heads=4, merge='mean', backend='torch'" in text
    assert "groups=2" in text
    assert "16, recurrence=2, backend='torch'" in repr(CrissCrossAttention(16, 2, backend="torch"))
    text = repr(AxialTransformerBlock(8, 2, norm_first=False, mode="criss_cross", backend="torch"))
    for words in ("norm_first=False", "mode='criss_cross'", "GELU", "backend='torch'"):
        assert words in text
