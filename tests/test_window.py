"""Attention in windows and grids against what torchvision and timm compute, re-written here: pad, roll, cut out."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import pairwise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnk
from attnk.modules import window as window_module
from attnk.modules.window import GridAttention, SwinBlock, WindowAttention

aten = torch.ops.aten
DIM, HEADS = 12, 3


# What is published.


def position_index(height, width):
    """Rows of a table for all pairs of tokens of a window, by Swin's words."""
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).flatten(1)
    steps = places[:, :, None] - places[:, None, :]
    return (steps[0] + height - 1) * (2 * width - 1) + steps[1] + width - 1


def cut(x, window):
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window[0], window[0], width // window[1], window[1], channels)
    return x.transpose(2, 3).reshape(-1, window[0] * window[1], channels)


def put_back(x, window, batch, height, width):
    x = x.reshape(batch, height // window[0], width // window[1], *window, -1)
    return x.transpose(2, 3).reshape(batch, height, width, -1)


def regions(height, width, window, shift):
    """Which of the nine parts of a rolled map each of its tokens is in."""
    marks = torch.zeros(1, height, width, 1)
    number = 0
    for rows in (slice(0, -window[0]), slice(-window[0], -shift[0] or None), slice(height - shift[0], None)):
        for columns in (slice(0, -window[1]), slice(-window[1], -shift[1] or None), slice(width - shift[1], None)):
            marks[:, rows, columns] = number
            number += 1
    return marks


class Published(nn.Module):
    """Swin's attention with the parameters and buffers of torchvision or timm, on maps."""

    def __init__(
        self, library, version, window=(7, 7), shift=(0, 0), dim=DIM, heads=HEADS, measure=None, hide=False, mask=-100.0
    ):
        super().__init__()
        self.library, self.version, self.window, self.shift, self.heads = library, version, window, shift, heads
        self.hide, self.mask, self.dropout = hide, mask, lambda weights: weights
        rows, columns = 2 * window[0] - 1, 2 * window[1] - 1
        of_torchvision = library == "torchvision"
        self.qkv = nn.Linear(dim, 3 * dim, bias=version == 1 or of_torchvision)
        self.proj = nn.Linear(dim, dim)
        index = position_index(*window)
        self.register_buffer("relative_position_index", index.flatten(), persistent=of_torchvision)
        if version == 1:
            self.relative_position_bias_table = nn.Parameter(torch.randn(rows * columns, heads))
            return
        self.logit_scale = nn.Parameter(torch.tensor([1.0, 3.0, 5.0])[:heads].view(heads, 1, 1))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
        if not of_torchvision:
            self.q_bias, self.v_bias = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        measure = measure or window
        y = torch.arange(rows, dtype=torch.float32) - (window[0] - 1)
        x = torch.arange(columns, dtype=torch.float32) - (window[1] - 1)
        steps = torch.stack(torch.meshgrid(y / max(measure[0] - 1, 1), x / max(measure[1] - 1, 1), indexing="ij"), -1)
        steps = steps * 8
        steps = torch.sign(steps) * torch.log2(torch.abs(steps) + 1.0) / math.log2(8)
        self.register_buffer("relative_coords_table", steps.unsqueeze(0), persistent=of_torchvision)

    def bias(self):
        table = self.relative_position_bias_table if self.version == 1 else self.cpb_mlp(self.relative_coords_table)
        tokens = self.window[0] * self.window[1]
        bias = table.view(-1, self.heads)[self.relative_position_index.flatten()].view(tokens, tokens, -1)
        return bias.permute(2, 0, 1) if self.version == 1 else 16 * torch.sigmoid(bias.permute(2, 0, 1))

    def project(self, x):
        if self.version == 1:
            return self.qkv(x)
        if self.library == "timm":
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        else:
            bias = self.qkv.bias.clone()
            third = bias.numel() // 3
            bias[third : 2 * third].zero_()
        return F.linear(x, self.qkv.weight, bias)

    def forward(self, x):
        batch, height, width, dim = x.shape
        x = F.pad(x, (0, 0, 0, -width % self.window[1], 0, -height % self.window[0]))
        sizes = x.shape[1:3]
        shift = tuple(0 if w >= size else s for w, s, size in zip(self.window, self.shift, sizes, strict=True))
        x = cut(x.roll((-shift[0], -shift[1]), (1, 2)), self.window)
        qkv = self.project(x).reshape(*x.shape[:2], 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.version == 1:
            logits = (q / math.sqrt(dim // self.heads)) @ k.mT
        else:
            logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
            logits = logits * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        logits = logits + self.bias()
        if any(shift):
            parts = cut(regions(*sizes, self.window, shift), self.window).squeeze(-1)
            apart = parts[:, None, :] != parts[:, :, None]
            added = torch.zeros(apart.shape).masked_fill(apart, self.mask).to(logits)
            logits = logits + added.repeat(batch, 1, 1).unsqueeze(1)
        if self.hide:
            exists = F.pad(torch.ones(1, height, width, 1), (0, 0, 0, sizes[1] - width, 0, sizes[0] - height))
            exists = cut(exists.roll((-shift[0], -shift[1]), (1, 2)), self.window).mT.bool()
            logits = logits.masked_fill(~exists.repeat(batch, 1, 1).unsqueeze(1), -1e30)
        x = self.dropout(logits.softmax(-1)) @ v
        x = put_back(self.proj(x.transpose(1, 2).flatten(2)), self.window, batch, *sizes)
        return x.roll(shift, (1, 2))[:, :height, :width]


class PublishedBlock(nn.Module):
    """Swin's block with torchvision's or timm's keys."""

    def __init__(self, library, version, shift, hidden=4 * DIM):
        super().__init__()
        self.version = version
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = Published(library, version, (3, 3), (shift, shift))
        first, second = nn.Linear(DIM, hidden), nn.Linear(hidden, DIM)
        if library == "torchvision":
            self.mlp = nn.Sequential(first, nn.GELU(), nn.Dropout(0.0), second, nn.Dropout(0.0))
        else:
            self.mlp = nn.ModuleDict({"fc1": first, "fc2": second})
            self.mlp.forward = lambda x: second(F.gelu(first(x)))

    def forward(self, x):
        if self.version == 1:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp.forward(self.norm2(x))
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp.forward(x))


class PublishedGrid(nn.Module):
    """MaxViT's attention in grids or blocks, as timm has it; its table is of Swin's or of Tensorflow's kind."""

    def __init__(self, kind, size, head_first, of_tensorflow=False, convolutions=False):
        super().__init__()
        self.kind, self.size, self.head_first = kind, size, head_first
        linear = (lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1)) if convolutions else nn.Linear
        self.qkv, self.proj = linear(DIM, 3 * DIM), linear(DIM, DIM)
        sizes = (2 * size[0] - 1, 2 * size[1] - 1)
        self.rel_pos = nn.Module()
        table = torch.randn(HEADS, *sizes) if of_tensorflow else torch.randn(sizes[0] * sizes[1], HEADS)
        self.rel_pos.relative_position_bias_table = nn.Parameter(table)

    def bias(self):
        table, (height, width) = self.rel_pos.relative_position_bias_table, self.size
        if table.dim() == 2:
            return table[position_index(height, width)].permute(2, 0, 1)
        places = [(y, x) for y in range(height) for x in range(width)]
        rows = [[table[:, m - y + height - 1, n - x + width - 1] for m, n in places] for y, x in places]
        return torch.stack([torch.stack(row, -1) for row in rows], -2)

    def forward(self, x):
        batch, height, width, dim = x.shape
        steps = (height // self.size[0], width // self.size[1])
        if self.kind == "grid":
            x = x.view(batch, self.size[0], steps[0], self.size[1], steps[1], dim)
            x = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.size[0] * self.size[1], dim)
        else:
            x = cut(x, self.size)
        qkv = F.linear(x, self.qkv.weight.view(3 * dim, dim), self.qkv.bias)
        if self.head_first:
            q, k, v = qkv.view(*x.shape[:2], HEADS, -1).transpose(1, 2).chunk(3, dim=3)
        else:
            q, k, v = qkv.reshape(*x.shape[:2], 3, HEADS, -1).transpose(1, 3).unbind(2)
        weights = (q @ k.mT * (dim // HEADS) ** -0.5 + self.bias()).softmax(-1)
        x = F.linear((weights @ v).transpose(1, 2).flatten(2), self.proj.weight.view(dim, dim), self.proj.bias)
        if self.kind == "block":
            return put_back(x, self.size, batch, height, width)
        x = x.view(batch, *steps, *self.size, dim)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, height, width, dim)


# How they are compared.


def ours_of(theirs, **options):
    """Our module with the weights of a published one, loaded strictly."""
    ours = WindowAttention(
        theirs.qkv.in_features, theirs.heads, theirs.window, theirs.shift, version=theirs.version, **options
    )
    ours.to(theirs.proj.weight.device, theirs.proj.weight.dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours


def published_of(ours):
    theirs = Published("timm", ours.version, ours.window_size, ours.shift_size)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def renamed(gradients):
    """Gradients by our keys, of one kind of checkpoint or the other."""
    result = {}
    for key, gradient in gradients.items():
        parent, _, leaf = key.rpartition("qkv.")
        key = key.replace("rel_pos.", "").replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")
        key = key.replace("cpb_mlp.fc1", "cpb_mlp.0")
        if leaf == "bias" and f"{parent}logit_scale" in gradients:
            result[f"{parent}q_bias"], zeros, result[f"{parent}v_bias"] = gradient.chunk(3)
            assert not zeros.any()
        elif gradient.dim() == 4:
            result[key] = gradient.flatten(1)
        elif gradient.dim() == 3 and "table" in key:
            result[key] = gradient.flip(1, 2).flatten(1).t()
        else:
            result[key] = gradient
    return result


def outcome(module, x):
    """Output, and the gradients of x and of all parameters by our names."""
    x = x.detach().requires_grad_()
    out = module(x)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).sin().view(out.shape).to(out)
    names, parameters = zip(*module.named_parameters(), strict=True)
    dx, *gradients = torch.autograd.grad(out, [x, *parameters], dout)
    return {"out": out.detach(), "x": dx, **renamed(dict(zip(names, gradients, strict=True)))}


def assert_same(ours, theirs, x, tolerance=1e-9):
    got, expected = outcome(ours, x), outcome(theirs, x)
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item()) if gradient.numel() else 1.0
        error = (got[name] - gradient).abs().max().item() / scale if gradient.numel() else 0.0
        assert got[name].shape == gradient.shape
        assert error <= tolerance, name


def maps(*sizes, dtype=torch.float64, device="cpu"):
    return torch.randn(*sizes, DIM, dtype=dtype, device=device)


class Watch(TorchDispatchMode):
    """Which operators ran, and what they returned."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function.overloadpacket, out))
        return out

    def of(self, packets, numel=1):
        return [packet for packet, out in self.calls if packet in packets and out.numel() >= numel]


COPYING = (aten.clone, aten.copy_, aten.contiguous, aten._to_copy, aten.cat)
REARRANGING = (aten.roll, aten.constant_pad_nd, aten.index, aten.stack, aten.gather, aten.index_select)

versions = pytest.mark.parametrize("version", [1, 2])
libraries = pytest.mark.parametrize("library", ["torchvision", "timm"])


# Windows.


@versions
@libraries
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("size", [(13, 17), (14, 21), (7, 7), (5, 4), (14, 5), (1, 1)], ids=str)
def test_equals_what_is_published(library, version, shift, size):
    theirs = Published(library, version, shift=(shift, shift)).double()
    ours, x = ours_of(theirs), maps(2, *size)
    for training in (True, False):
        assert_same(ours.train(training), theirs.train(training), x)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "case",
    pairwise(
        version=[1, 2],
        dtype=[torch.float64, torch.float32],
        size=[(5, 4), (4, 3), (2, 3), (1, 1)],
        shift=[(0, 0), (1, 2), (1, 0)],
        padding=["zeros", "mask"],
        mask=[-100.0, -math.inf],
    ),
)
def test_equals_on_every_backend(case, backend, device):
    hide, dtype = case["padding"] == "mask", case["dtype"]
    theirs = Published("timm", case["version"], (2, 3), case["shift"], hide=hide, mask=case["mask"])
    theirs.to(device, dtype)
    ours = ours_of(theirs, padding=case["padding"], mask_value=case["mask"], backend=backend)
    x = maps(1, *case["size"], dtype=dtype, device=device)
    assert_same(ours, theirs, x, 1e-9 if dtype == torch.float64 else 3e-5)


@versions
def test_windows_of_7_on_every_backend(version, backend, device):
    theirs = Published("torchvision", version, shift=(3, 3), dim=4, heads=1).to(device)
    ours = ours_of(theirs, backend=backend)
    assert_same(ours, theirs, torch.randn(1, 13, 8, 4, device=device), 3e-5)


@versions
def test_from_the_definition(version):
    theirs = Published("timm", version, (3, 2), (1, 1)).double()
    assert_same(ours_of(theirs, backend="reference"), theirs, maps(2, 4, 5))
    ours = ours_of(theirs)
    with attnk.use_backend("reference"):
        assert_same(ours, theirs, maps(2, 4, 5))


@versions
@pytest.mark.parametrize("size", [(13, 17), (7, 14), (2, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("mask", [-100.0, -math.inf])
def test_what_does_not_exist_can_be_hidden(version, size, shift, mask):
    theirs = Published("timm", version, shift=(shift, shift), hide=True, mask=mask).double()
    assert_same(ours_of(theirs, padding="mask", mask_value=mask), theirs, maps(2, *size))


@versions
def test_mask_values_differ(version):
    theirs = Published("timm", version, (4, 4), (2, 2)).double()
    with torch.no_grad():  # -100 is little beside such a bias, and no token is hidden by it
        if version == 1:
            theirs.relative_position_bias_table.mul_(60)
        else:
            theirs.logit_scale.fill_(math.log(100))
    infinite = Published("timm", version, (4, 4), (2, 2), mask=-math.inf).double()
    infinite.load_state_dict(theirs.state_dict())
    x = maps(2, 8, 8)
    assert_same(ours_of(theirs), theirs, x, 1e-8)
    assert_same(ours_of(infinite, mask_value=-math.inf), infinite, x, 1e-8)
    assert (theirs(x) - infinite(x)).abs().max() > 1e-3


def test_large_windows():
    theirs = Published("timm", 2, (12, 12), (5, 6)).double()
    assert_same(ours_of(theirs), theirs, maps(1, 13, 25))


def test_logit_scale_is_clamped():
    theirs = Published("timm", 2, (3, 3)).double()
    with torch.no_grad():
        theirs.logit_scale.copy_(torch.tensor([4.0, 5.0, 9.0]).view(3, 1, 1))
    assert_same(ours_of(theirs), theirs, maps(2, 6, 6))
    assert outcome(ours_of(theirs), maps(1, 3, 3))["logit_scale"].flatten()[1:].eq(0).all()


@pytest.mark.parametrize("measure", [(4, 4), (1, 6)], ids=str)
def test_pretrained_window_size(measure):
    theirs = Published("timm", 2, (3, 5), (1, 2), measure=measure).double()
    ours = ours_of(theirs, pretrained_window_size=measure)
    x = maps(2, 6, 5)
    assert_same(ours, theirs, x)
    assert (ours(x) - ours_of(theirs)(x)).abs().max() > 1e-4


@pytest.mark.parametrize("options", [{}, {"version": 2}])
def test_without_biases(options):
    ours = WindowAttention(DIM, HEADS, 2, 1, qkv_bias=False, proj_bias=False, **options).double()
    assert not [key for key in ours.state_dict() if key in ("qkv.bias", "q_bias", "v_bias", "proj.bias")]
    theirs = Published("timm", options.get("version", 1), (2, 2), (1, 1)).double()
    state = {key: torch.zeros_like(value) if "bias" in key else value for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    if not options:
        ours.relative_position_bias_table.data.copy_(theirs.relative_position_bias_table.data.zero_())
    ours.load_state_dict({key: state[key] for key in ours.state_dict()}, strict=True)
    x = maps(2, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("resolution", "window", "shift"),
    [((14, 14), (7, 7), (3, 3)), ((7, 14), (7, 7), (0, 3)), ((5, 20), (5, 7), (0, 3)), ((1, 1), (1, 1), (0, 0))],
)
@versions
def test_windows_no_larger_than_the_map(version, resolution, window, shift):
    ours = WindowAttention(DIM, HEADS, 7, 3, input_resolution=resolution, version=version).double()
    assert (ours.window_size, ours.shift_size) == (window, shift)
    theirs = Published("timm", version, window, shift).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(ours, theirs, maps(1, *resolution))


# Layout and memory.


LAYOUTS = {
    "channels last": lambda x: x,
    "channels first": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "crop": lambda x: F.pad(x, (0, 0, 1, 1, 1, 1))[:, 1:-1, 1:-1],
    "step 2": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def module_of(kind, **options):
    if kind == "grid":
        return GridAttention(DIM, HEADS, (2, 3), **options)
    return WindowAttention(DIM, HEADS, (2, 3), (1, 1), version=kind, **options)


kinds = pytest.mark.parametrize("kind", [1, 2, "grid"])


@kinds
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_layouts(kind, layout, size, training):
    if kind == "grid" and size == (5, 7):
        pytest.skip("grids must divide the map")
    x = LAYOUTS[layout](maps(2, *size))
    ours = module_of(kind).double()
    first = module_of(kind, channels_first=True).double()
    first.load_state_dict(ours.state_dict())
    with torch.set_grad_enabled(training):
        expected = ours(x.contiguous())
        out, out_first = ours(x), first(x.permute(0, 3, 1, 2))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out_first, expected.permute(0, 3, 1, 2))
    dense = out.permute(0, 3, 1, 2) if layout == "channels first" else out
    assert dense.is_contiguous()
    in_order = torch.contiguous_format if layout == "channels first" else torch.channels_last
    assert out_first.is_contiguous(memory_format=in_order)
    if training:
        for got, wanted in zip(outcome(ours, x).values(), outcome(ours, x.contiguous()).values(), strict=True):
            torch.testing.assert_close(got, wanted)


@kinds
@pytest.mark.parametrize("options", [{}, {"head_first": True}, {"padding": "mask"}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_no_copies_where_windows_divide(kind, options, training, monkeypatch):
    if (kind == 2 and "head_first" in options) or (kind == "grid" and "padding" in options):
        pytest.skip("no such option")
    seen = []

    def operation(q, k, v, *args, **options):
        seen.extend([q, k, v])
        return torch.empty(q.shape, dtype=q.dtype).copy_(v)

    monkeypatch.setattr(window_module, "window_attention", operation)
    ours, x = module_of(kind, **options), maps(4, 20, 30, dtype=torch.float32)
    with torch.set_grad_enabled(training), Watch() as watch:
        out = ours(x)
    assert out.is_contiguous()
    assert len(watch.of(COPYING, x.numel())) == 1, "by the operation above alone"
    assert not watch.of(REARRANGING, x.numel())
    q, k, v = seen
    (product,) = [out for packet, out in watch.calls if packet is aten.addmm and out.numel() == 3 * x.numel()]
    same = [part.untyped_storage().data_ptr() == product.untyped_storage().data_ptr() for part in (q, k, v)]
    assert same == ([False, False, True] if kind == 2 else [True] * 3), "cosines take new queries and keys"
    step = DIM // HEADS if options.get("head_first") else DIM
    if kind != 2:
        assert v.storage_offset() - k.storage_offset() == k.storage_offset() - q.storage_offset() == step


@versions
def test_padding_with_a_mask_copies_nothing(version, monkeypatch):
    monkeypatch.setattr(window_module, "window_attention", lambda q, k, v, *args, **options: v)
    x = maps(4, 19, 29, dtype=torch.float32)
    for padding, pads in (("mask", 0), ("zeros", 1)):
        with Watch() as watch:
            module_of(version, padding=padding)(x)
        assert len(watch.of((aten.constant_pad_nd,), x.numel())) == pads


@kinds
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_map_with_pixels_together_is_copied_once(kind, qkv_bias, monkeypatch):
    monkeypatch.setattr(window_module, "window_attention", lambda q, *args, **options: torch.ones(q.shape))
    ours = module_of(kind, channels_first=True, qkv_bias=qkv_bias)
    x = torch.randn(4, DIM, 20, 30)
    with torch.no_grad(), Watch() as watch:
        out = ours(x)
    dense = []
    ours.qkv.register_forward_pre_hook(lambda module, inputs: dense.append(inputs[0].is_contiguous()))
    ours(x)
    assert dense == [True], "or a product without bias is one for every image, with copies of the weight"
    assert out.is_contiguous()
    assert len(watch.of(COPYING, x.numel())) == 1


@kinds
@pytest.mark.parametrize("implementation", [None, "torch", "reference"])
def test_the_operation_gets_the_backend(kind, implementation, monkeypatch):
    seen = []

    def operation(q, k, v, *args, **options):
        seen.append(options["backend"])
        return v

    monkeypatch.setattr(window_module, "window_attention", operation)
    module_of(kind, backend=implementation)(maps(1, 4, 6, dtype=torch.float32))
    assert seen == [implementation]


@kinds
@pytest.mark.parametrize("sizes", [(0, 4, 6), (2, 0, 6), (2, 4, 0)], ids=str)
def test_empty_maps(kind, sizes):
    ours = module_of(kind).double()
    got = outcome(ours, maps(*sizes))
    assert got["out"].shape == (*sizes, DIM)
    assert not any(gradient.any() for name, gradient in got.items() if name != "out")


# Grids.


@pytest.mark.parametrize("kind", ["grid", "block"])
@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("of_tensorflow", [False, True])
@pytest.mark.parametrize("convolutions", [False, True])
def test_maxvit(kind, head_first, of_tensorflow, convolutions):
    theirs = PublishedGrid(kind, (2, 3), head_first, of_tensorflow, convolutions).double()
    options = {"head_first": head_first}
    ours = GridAttention(DIM, HEADS, (2, 3), **options)
    if kind == "block":
        ours = WindowAttention(DIM, HEADS, (2, 3), **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(ours.double(), theirs, maps(2, 4, 9))


@pytest.mark.parametrize(("size", "dtype"), [((4, 6), torch.float64), ((2, 9), torch.float32)])
def test_grids_on_every_backend(size, dtype, backend, device):
    theirs = PublishedGrid("grid", (2, 3), False).to(device, dtype)
    ours = GridAttention(DIM, HEADS, (2, 3), backend=backend)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = maps(1, *size, dtype=dtype, device=device)
    assert_same(ours.to(device, dtype), theirs, x, 1e-9 if dtype == torch.float64 else 3e-5)


def test_a_grid_of_the_whole_map_is_a_window():
    grid, window = GridAttention(DIM, HEADS, 7), WindowAttention(DIM, HEADS, 7)
    window.load_state_dict(grid.state_dict())
    x = maps(2, 7, 7, dtype=torch.float32)
    torch.testing.assert_close(grid(x), window(x))
    x = maps(2, 14, 14, dtype=torch.float32)
    assert (grid(x) - window(x)).abs().max() > 1e-4


def test_heads_of_a_grid():
    assert GridAttention(64).num_heads == 2
    assert GridAttention(64, dim_head=16).num_heads == 4
    assert GridAttention(64, 8).num_heads == 8


# Blocks.


@versions
@libraries
@pytest.mark.parametrize("shift", [0, 1])
def test_block(library, version, shift):
    theirs = PublishedBlock(library, version, shift).double()
    with torch.no_grad():
        for norm in (theirs.norm1, theirs.norm2):
            norm.weight.normal_()
            norm.bias.normal_()
    ours = SwinBlock(DIM, HEADS, 3, shift, version=version).double()
    extra = {"attn_mask": torch.zeros(4, 9, 9)} if shift else {}
    ours.load_state_dict({**theirs.state_dict(), **extra}, strict=True)
    for sizes in ((2, 6, 9), (1, 5, 4)):
        assert_same(ours, theirs, maps(*sizes))


def test_block_passes_options_on():
    block = SwinBlock(DIM, HEADS, 3, 1, 2.5, 0.1, 0.2, padding="mask", mask_value=-math.inf, backend="torch")
    assert (block.attn.padding, block.attn.mask_value, block.attn.backend) == ("mask", -math.inf, "torch")
    assert [m.p for m in block.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.1, 0.1, 0.1]
    assert block.mlp.fc1.out_features == 30


@versions
def test_drop_path(version):
    block = SwinBlock(DIM, HEADS, 3, drop_path=0.4, version=version).double()
    x = maps(1, 3, 3).expand(600, -1, -1, -1)
    full = block.eval()(x[:1]) - x[:1]
    assert torch.equal(block(x[:1]), block(x[:1]))
    changes = block.train()(x) - x
    untouched = changes.flatten(1).eq(0).all(1).double().mean().item()
    assert abs(untouched - 0.4**2) < 5 * math.sqrt(0.16 * 0.84 / 600)
    assert full.abs().max() > 1e-3
    x = maps(1, 3, 3)
    block.drop_path = 1.0
    assert torch.equal(block(x), x)
    block.drop_path = 0.5
    attention = block.attn(block.norm1(x)) if version == 1 else block.norm1(block.attn(x))
    seen = {"both": False, "first": False}
    for _ in range(40):
        out = block(x)
        middle = x + 2 * attention
        mlp = block.mlp(block.norm2(middle)) if version == 1 else block.norm2(block.mlp(middle))
        seen["first"] |= torch.allclose(out, middle)
        seen["both"] |= torch.allclose(out, middle + 2 * mlp)
    assert all(seen.values())


# Dropout.


@kinds
def test_dropout_is_for_training_alone(kind):
    for share in ("attn_drop", "proj_drop"):
        ours = module_of(kind, **{share: 0.5})
        x = maps(2, 4, 6, dtype=torch.float32)
        assert not torch.equal(ours(x), ours(x))
        torch.manual_seed(3)
        first = ours(x)
        torch.manual_seed(3)
        assert torch.equal(ours(x), first)
        assert torch.equal(ours.eval()(x), ours(x))
        getattr(ours, share).train()
        assert not torch.equal(ours(x), ours(x))
    everything = module_of(kind, attn_drop=1.0)
    torch.testing.assert_close(everything(x), everything.proj.bias.expand(x.shape))
    assert not module_of(kind, proj_drop=1.0)(x).any()


@kinds
def test_dropout_leaves_the_expectation(kind):
    ours, x = module_of(kind, attn_drop=0.3).double(), maps(1, 2, 3)
    outs = ours(x.expand(3000, -1, -1, -1))
    error = (outs.mean(0) - ours.eval()(x)[0]).abs()
    assert (error < 5 * outs.std(0) / 3000**0.5 + 1e-12).all()
    assert (outs.std(0) > 1e-4).any()


# Numbers of half precision.


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(4, 6), (6, 9)], ids=str)
def test_autocast(kind, dtype, size):
    ours = module_of(kind)
    x = maps(2, *size, dtype=torch.float32)
    expected = outcome(ours, x)
    with torch.autocast("cpu", dtype=dtype):
        got = outcome(ours, x)
    assert got["out"].dtype == dtype
    for name, wanted in expected.items():
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(got[name].float() / scale, wanted / scale, rtol=0, atol=6e-2)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype, backend, device):
    ours = module_of(kind, backend=backend).to(device)
    x = maps(1, 2, 6, dtype=torch.float32, device=device)
    expected = ours(x)
    out = ours.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    if dtype != torch.bfloat16 or backend != "triton" or device != "cpu":  # the interpreter's products of bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_padded_tokens_have_finite_gradients(dtype):
    """Their keys are 0, where F.normalize has a gradient of 1e12."""
    ours = WindowAttention(DIM, HEADS, 4, version=2)
    nn.init.normal_(ours.q_bias)
    x = maps(2, 5, 5, dtype=torch.float32)
    expected = outcome(published_of(ours), x)
    if dtype == torch.float16:
        ours, x = ours.half(), x.half()
    got = outcome(ours, x)
    for name, wanted in expected.items():
        scale = max(1.0, wanted.abs().max().item())
        assert got[name].isfinite().all(), name
        torch.testing.assert_close(got[name].float() / scale, wanted / scale, rtol=0, atol=2e-2)


# Checkpoints and copies.


@versions
def test_keys_are_timms(version):
    ours = WindowAttention(DIM, HEADS, version=version)
    first = ["relative_position_bias_table", "qkv.weight", "qkv.bias"]
    if version == 2:
        first = ["logit_scale", "q_bias", "v_bias", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"]
        first += ["qkv.weight"]
    assert list(ours.state_dict()) == [*first, "proj.weight", "proj.bias"]
    block = SwinBlock(DIM, HEADS, version=version).state_dict()
    assert {key for key in block if not key.startswith("attn.")} == {
        f"{part}.{leaf}" for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2") for leaf in ("weight", "bias")
    }


def test_initial_values():
    first = WindowAttention(DIM, HEADS, 7)
    assert 0.017 < first.relative_position_bias_table.std() < 0.023
    second = WindowAttention(DIM, HEADS, 7, version=2)
    assert torch.equal(second.logit_scale, torch.full((HEADS, 1, 1), math.log(10)))
    assert not second.q_bias.any()
    assert not second.v_bias.any()


@kinds
@pytest.mark.parametrize("key", ["proj.weight", "relative_position_bias_table", "logit_scale", "q_bias", "stranger"])
def test_loading_is_strict(kind, key):
    state = module_of(kind).state_dict()
    if key not in state and key != "stranger":
        pytest.skip("no such key")
    if key == "stranger":
        state[key] = torch.zeros(1)
    else:
        del state[key]
    with pytest.raises(RuntimeError, match=key):
        module_of(kind).load_state_dict(state)


def test_loading_says_what_does_not_fit():
    theirs = Published("torchvision", 2, (4, 6))
    with pytest.raises(RuntimeError, match=r"belongs to windows of \(4, 6\), here .* \(8, 8\): build .*=\(4, 6\)\)"):
        WindowAttention(DIM, HEADS, 8, version=2).load_state_dict(theirs.state_dict())
    ours = WindowAttention(DIM, HEADS, 8, version=2, pretrained_window_size=(4, 6))
    ours.load_state_dict(theirs.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected .* \"qkv.bias\""):
        WindowAttention(DIM, HEADS, (4, 6), version=2, qkv_bias=False).load_state_dict(theirs.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for relative_position_bias_table"):
        WindowAttention(DIM, HEADS, 8).load_state_dict(Published("torchvision", 1).state_dict())


def test_loading_leaves_the_state_as_it_is():
    for theirs, ours in (
        (Published("torchvision", 2), WindowAttention(DIM, HEADS, version=2)),
        (PublishedBlock("torchvision", 1, 1), SwinBlock(DIM, HEADS, 3, 1)),
        (PublishedGrid("grid", (2, 3), False, True), GridAttention(DIM, HEADS, (2, 3))),
    ):
        state = theirs.state_dict()
        before = list(state)
        nn.Sequential(nn.Identity(), ours).load_state_dict({f"1.{key}": value for key, value in state.items()})
        ours.load_state_dict(state)
        assert list(state) == before


def copies(module):
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("kind", [1, 2, "grid", "block 1", "block 2"])
def test_copies(kind, backend, device):
    def make():
        if isinstance(kind, str) and kind.startswith("block"):
            return SwinBlock(DIM, HEADS, (2, 3), (1, 1), version=int(kind[-1]), backend=backend)
        return module_of(kind, backend=backend)

    ours = make().to(device).eval()
    x = maps(1, 2, 6, dtype=torch.float32, device=device)
    expected = ours(x)
    for other in copies(ours):
        assert repr(other) == repr(ours)
        assert torch.equal(other(x), expected)
    again = make().to(device).eval()
    assert not torch.equal(again(x), expected)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), expected)


@kinds
def test_made_without_memory(kind):
    torch.manual_seed(0)
    ours = module_of(kind)
    with torch.device("meta"):
        empty = module_of(kind)
    empty = empty.to_empty(device="cpu")
    empty.reset_parameters()
    empty.load_state_dict(ours.state_dict())
    x = maps(1, 4, 6, dtype=torch.float32)
    assert torch.equal(empty(x), ours(x))


def test_options_are_shown():
    assert (
        "num_heads=3, window_size=(7, 7), shift_size=(3, 3), version=1, padding='zeros', mask_value=-100.0, "
        "backend='torch'"
    ) in repr(WindowAttention(DIM, HEADS, 7, 3, backend="torch"))
    assert "pretrained_window_size=(6, 6), channels_first=True" in repr(
        WindowAttention(DIM, HEADS, 7, version=2, pretrained_window_size=6, channels_first=True)
    )
    assert "num_heads=3, grid_size=(7, 7), head_first=True" in repr(GridAttention(DIM, HEADS, head_first=True))
    assert "drop_path=0.1" in repr(SwinBlock(DIM, HEADS, drop_path=0.1))
    assert "backend" not in repr(SwinBlock(DIM, HEADS))


class LowRank(nn.Linear):
    """As libraries for fine-tuning replace a linear map."""

    def forward(self, x):
        return super().forward(x) + x.flip(-1)[..., :1]


@kinds
def test_replaced_projections_and_hooks(kind):
    ours, x = module_of(kind).double(), maps(2, 4, 6)
    if kind == 2:
        nn.init.normal_(ours.q_bias)
    expected = ours(x)
    watch = ours.qkv.register_forward_hook(lambda module, inputs, out: None)
    torch.testing.assert_close(ours(x), expected)
    watch.remove()
    other = copy.deepcopy(ours)
    other.qkv = LowRank(DIM, 3 * DIM, bias=kind != 2).double()
    other.qkv.load_state_dict(ours.qkv.state_dict())
    ours.qkv.register_forward_hook(lambda module, inputs, out: out + inputs[0].flip(-1)[..., :1])
    torch.testing.assert_close(other(x), ours(x))
    assert (other(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "sizes"), [(2, [(1, 4, 6), (2, 5, 7)]), ("grid", [(1, 4, 6), (2, 8, 9)])])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_to_one_graph(kind, sizes):
    ours = module_of(kind).double()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for size in sizes:
        x = maps(*size)
        for got, expected in zip(outcome(compiled, x).values(), outcome(ours, x).values(), strict=True):
            torch.testing.assert_close(got, expected)


# Errors.


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: WindowAttention(64, 7), ValueError, "dim must be divisible by num_heads, got dim=64, num_heads=7"),
        (lambda: WindowAttention(0, 1), ValueError, "dim must be a positive integer, got 0"),
        (lambda: WindowAttention(64, 8.0), ValueError, r"num_heads must be a positive integer, got 8\.0"),
        (lambda: WindowAttention(64, 8, 0), ValueError, "window_size must be an integer of at least 1, .* got 0"),
        (lambda: WindowAttention(64, 8, (7, 7, 7)), ValueError, r"window_size must be .* got \(7, 7, 7\)"),
        (lambda: WindowAttention(64, 8, (7, 0)), ValueError, r"window_size must be .* got \(7, 0\)"),
        (lambda: WindowAttention(64, 8, 7.0), ValueError, r"window_size must be .* got 7\.0"),
        (lambda: WindowAttention(64, 8, True), ValueError, "window_size must be .* got True"),
        (lambda: WindowAttention(64, 8, "77"), ValueError, "window_size must be .* got '77'"),
        (lambda: WindowAttention(64, 8, 7, -1), ValueError, "shift_size must be an integer of at least 0, .* got -1"),
        (lambda: WindowAttention(64, 8, 7, 7), ValueError, r"shift_size must be less than .*\(7, 7\), got \(7, 7\)"),
        (lambda: WindowAttention(64, 8, (7, 4), (3, 5)), ValueError, r"shift_size must be less .* got \(3, 5\)"),
        (lambda: WindowAttention(64, 8, attn_drop=1.5), ValueError, r"attn_drop must be .* 0 to 1, got 1\.5"),
        (lambda: WindowAttention(64, 8, proj_drop=-1), ValueError, "proj_drop must be .* 0 to 1, got -1"),
        (lambda: WindowAttention(64, 8, version=3), ValueError, "version must be 1 or 2, got 3"),
        (lambda: WindowAttention(64, 8, padding="same"), ValueError, "padding must be one of 'zeros', 'mask', got"),
        (lambda: WindowAttention(64, 8, mask_value=-50), ValueError, "mask_value must be -inf or -100, got -50"),
        (lambda: WindowAttention(64, 8, backend="cuda"), ValueError, "backend must be one of .*, got 'cuda'"),
        (lambda: WindowAttention(64, 8, version=2, head_first=True), ValueError, "head_first must be False"),
        (lambda: WindowAttention(64, 8, pretrained_window_size=7), ValueError, "pretrained_window_size must be None"),
        (
            lambda: WindowAttention(64, 8, version=2, pretrained_window_size=0),
            ValueError,
            "pretrained_window_size must be an integer of at least 1, .* got 0",
        ),
        (lambda: WindowAttention(64, 8, input_resolution=0), ValueError, "input_resolution must be .* got 0"),
        (lambda: WindowAttention(64, 8, 7, 0, True), TypeError, "positional"),
        (lambda: GridAttention(64, 7), ValueError, "dim must be divisible by num_heads, got dim=64, num_heads=7"),
        (lambda: GridAttention(48), ValueError, "dim must be divisible by dim_head, got dim=48, dim_head=32"),
        (lambda: GridAttention(64, dim_head=0), ValueError, "dim_head must be a positive integer, got 0"),
        (lambda: GridAttention(64, grid_size=0), ValueError, "grid_size must be an integer of at least 1, .* got 0"),
        (lambda: GridAttention(64, attn_drop=2), ValueError, "attn_drop must be .* 0 to 1, got 2"),
        (lambda: GridAttention(64, backend="gpu"), ValueError, "backend must be one of .*, got 'gpu'"),
        (lambda: SwinBlock(64, 7), ValueError, "dim must be divisible by num_heads"),
        (lambda: SwinBlock("64", 7), ValueError, "dim must be a positive integer, got '64'"),
        (lambda: SwinBlock(64, 8, mlp_ratio=0), ValueError, "mlp_ratio must be .* at least one hidden .*, got 0"),
        (lambda: SwinBlock(64, 8, drop_path=2), ValueError, "drop_path must be .* 0 to 1, got 2"),
        (lambda: SwinBlock(64, 8, dropout=2), ValueError, "^dropout must be .* 0 to 1, got 2"),
        (lambda: SwinBlock(64, 8, attention_dropout=2), ValueError, "attention_dropout must be .* 0 to 1, got 2"),
        (lambda: SwinBlock(64, 8, backend="gpu"), ValueError, "backend must be one of .*, got 'gpu'"),
        (lambda: SwinBlock(64, 8, attn_drop=0.1), TypeError, "takes no attn_drop, its name here is attention_dropout"),
        (lambda: SwinBlock(64, 8, channels_first=True), TypeError, "takes no channels_first"),
        (lambda: SwinBlock(64, 8, stranger=1), TypeError, "stranger"),
    ],
)  # fmt: skip
def test_refuses_at_construction(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("kind", [1, 2, "grid", "block"])
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: torch.randn(2, 4, 6, 8), ValueError, r"x must be \(B, H, W, dim\) with dim = 12, got \(2, 4, 6, 8\)"),
        (lambda: torch.randn(4, 6, 12), ValueError, r"x must be \(B, H, W, dim\) .*, got \(4, 6, 12\)"),
        (lambda: torch.randn(2, 4, 6, 12).double(), TypeError, "x must have the dtype .*float32, got .*float64"),
        (lambda: torch.ones(2, 4, 6, 12, dtype=torch.int64), TypeError, "x must have the dtype .*, got .*int64"),
        (lambda: [[1.0]], TypeError, "x must be a tensor, got list"),
        (lambda: torch.randn(2, 4, 6, 12, device="meta"), ValueError, "x must be on the device .*cpu, got meta"),
    ],
)
def test_refuses_at_call(kind, make, error, words):
    with pytest.raises(error, match=words):
        (SwinBlock(DIM, HEADS, 2) if kind == "block" else module_of(kind))(make())


def test_refuses_maps_by_layout_and_size():
    with pytest.raises(ValueError, match=r"x must be \(B, dim, H, W\) with dim = 12, got \(2, 4, 6, 12\)"):
        module_of(1, channels_first=True)(torch.randn(2, 4, 6, 12))
    with pytest.raises(ValueError, match=r"x must have sides divisible by grid_size=\(2, 3\), got H, W = 4, 5"):
        module_of("grid")(torch.randn(2, 4, 5, 12))
    with pytest.raises(ValueError, match=r"x must have sides divisible by grid_size=\(2, 3\), got H, W = 3, 6"):
        module_of("grid", channels_first=True)(torch.randn(2, 12, 3, 6))


# The libraries themselves, where they are installed.


def randomise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    return module.double()


@versions
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("size", [(14, 21), (13, 17), (5, 14)], ids=str)
def test_torchvision(version, shift, size):
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    theirs = (swin.SwinTransformerBlock, swin.SwinTransformerBlockV2)[version - 1](DIM, HEADS, [7, 7], [shift, shift])
    ours = SwinBlock(DIM, HEADS, 7, shift, version=version).double()
    ours.load_state_dict(randomise(theirs).state_dict(), strict=True)
    assert_same(ours, theirs, maps(2, *size))


@versions
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("size", [(14, 21), (7, 14), (5, 14), (13, 17)], ids=str)
def test_timm(version, shift, size):
    if shift and size == (13, 17):
        pytest.skip("timm rolls before it pads")
    name = ("swin_transformer", "swin_transformer_v2")[version - 1]
    swin = pytest.importorskip(f"timm.models.{name}")
    options = {"window_size": 7, "shift_size": shift}
    more = {} if version == 1 else {"pretrained_window_size": 6}
    block = (getattr(swin, "SwinTransformerBlock", None), getattr(swin, "SwinTransformerV2Block", None))[version - 1]
    theirs = randomise(block(DIM, size, HEADS, **options, **more))
    ours = SwinBlock(DIM, HEADS, 7, shift, version=version, input_resolution=size, **more).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(ours, theirs, maps(2, *size))


@pytest.mark.parametrize("kind", ["grid", "block"])
@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("rel_pos_type", ["bias", "bias_tf"])
@pytest.mark.parametrize("layer", ["PartitionAttentionCl", "PartitionAttention2d"])
def test_timm_maxxvit(kind, head_first, rel_pos_type, layer):
    maxxvit = pytest.importorskip("timm.models.maxxvit")
    config = maxxvit.MaxxVitTransformerCfg(
        dim_head=4, head_first=head_first, rel_pos_type=rel_pos_type, window_size=(7, 7), grid_size=(7, 7)
    )
    theirs = randomise(getattr(maxxvit, layer)(DIM, kind, config))
    options = {"head_first": head_first, "channels_first": layer.endswith("2d")}
    ours = GridAttention(DIM, dim_head=4, **options) if kind == "grid" else WindowAttention(DIM, 3, **options)
    ours.double().load_state_dict(theirs.attn.state_dict(), strict=True)
    x = maps(2, 14, 21)
    x = x.permute(0, 3, 1, 2) if options["channels_first"] else x
    torch.testing.assert_close(ours(x), theirs._partition_attn(x))
