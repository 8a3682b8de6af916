"""Swin against its formula, re-written with one softmax over the whole map, and under the keys of three libraries."""

import re

import pytest
import torch
import torch.nn.functional as F
from networks import assert_drop_in, assert_runs_everywhere, settled
from torch import nn

import attnk
from attnk.models.swin import SwinTransformer, swin_tiny

SMALL = {"num_classes": 5, "embed_dim": 6, "depths": (2, 3), "num_heads": (1, 3), "window_size": 3, "patch_size": 2}


class Attention(nn.Module):
    """All tokens of a padded map in one softmax; those that share no window, or only around the edge, are hidden."""

    def __init__(self, dim, heads, window, shift):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def places(self, size):
        """Of the tokens on an axis: the window, the place in it, and whether it lies around the edge."""
        shift = self.shift if size > self.window else 0
        rolled = (torch.arange(size) - shift) % size
        return rolled // self.window, rolled % self.window, torch.arange(size) < shift

    def forward(self, x):
        rows, columns = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -columns % self.window, 0, -rows % self.window))
        height, width = x.shape[1:3]
        down = [each.repeat_interleave(width) for each in self.places(height)]
        right = [each.repeat(height) for each in self.places(width)]
        together = torch.ones(height * width, height * width, dtype=torch.bool)
        for each in (down[0], down[2], right[0], right[2]):
            together &= each[:, None] == each
        steps = [each[:, None] - each + self.window - 1 for each in (down[1], right[1])]
        bias = self.relative_position_bias_table[steps[0] * (2 * self.window - 1) + steps[1]]
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / q.shape[-1] ** 0.5 + bias.permute(2, 0, 1)
        out = logits.masked_fill(~together, -torch.inf).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2)).unflatten(1, (height, width))[:, :rows, :columns]


class Block(nn.Module):
    def __init__(self, dim, heads, window, shift, ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, window, shift)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, int(ratio * dim)), "fc2": nn.Linear(int(ratio * dim), dim)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Merging(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Published(nn.Module):
    """Swin under timm's keys."""

    def __init__(self, num_classes, embed_dim, depths, num_heads, window_size, patch_size, mlp_ratio=4):
        super().__init__()
        proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.ModuleDict({"proj": proj, "norm": nn.LayerNorm(embed_dim)})
        self.layers = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim = embed_dim * 2**stage
            shifts = [0 if block % 2 == 0 else window_size // 2 for block in range(depth)]
            blocks = nn.Sequential(*(Block(dim, heads, window_size, shift, mlp_ratio) for shift in shifts))
            downsample = Merging(dim // 2) if stage else nn.Identity()
            self.layers.append(nn.ModuleDict({"downsample": downsample, "blocks": blocks}))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.ModuleDict({"fc": nn.Linear(dim, num_classes)})

    def forward(self, x):
        x = self.patch_embed["norm"](self.patch_embed["proj"](x).permute(0, 2, 3, 1))
        for layer in self.layers:
            x = layer["blocks"](layer["downsample"](x))
        return self.head["fc"](self.norm(x).flatten(1, 2).mean(1))


def with_indices(state, window):
    """A state with the buffer that timm once had, and torchvision has, beside every table."""
    index = torch.zeros(window**4, dtype=torch.int64)
    tables = [key for key in state if key.endswith("_bias_table")]
    return {**state, **{key.replace("bias_table", "index"): index for key in tables}}


def as_torchvision(network):
    """The state of a Published under torchvision's keys."""
    patches = nn.Sequential(network.patch_embed["proj"], nn.Identity(), network.patch_embed["norm"])
    features = nn.Sequential(patches)
    for stage, layer in enumerate(network.layers):
        if stage:
            features.append(layer["downsample"])
        features.append(layer["blocks"])
    state = nn.ModuleDict({"features": features, "norm": network.norm, "head": network.head["fc"]}).state_dict()
    state = with_indices(state, network.layers[0]["blocks"][0].attn.window)
    return {key.replace("mlp.fc1.", "mlp.0.").replace("mlp.fc2.", "mlp.3."): state[key] for key in state}


def as_authors(network):
    """The state of a Published under the keys of the code that was published with the paper."""
    state = with_indices(network.state_dict(), network.layers[0]["blocks"][0].attn.window)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 9, 9)
    earlier = re.compile(r"layers\.(\d)\.downsample")
    return {
        earlier.sub(lambda match: f"layers.{int(match[1]) - 1}.downsample", key).replace("head.fc.", "head."): state[
            key
        ]
        for key in state
    }


@pytest.mark.parametrize("size", [(24, 12), (26, 22), (14, 10), (11, 17), (2, 2)], ids=str)
def test_equals_its_formula(size):
    """Windows that divide the map, padded, shifted on one axis, odd sides before merging, a single token."""
    assert_drop_in(Published(**SMALL), SwinTransformer(**SMALL), torch.randn(2, 3, *size, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {"depths": (1,), "num_heads": (2,)},
        {"depths": (1, 2, 2), "num_heads": (3, 3, 6), "window_size": 2},
        {"patch_size": 3, "mlp_ratio": 1.5},
        {"window_size": 4},
    ],
    ids=str,
)
def test_options(options):
    options = {**SMALL, **options}
    assert_drop_in(Published(**options), SwinTransformer(**options), torch.randn(2, 3, 22, 14, dtype=torch.float64))


@pytest.mark.parametrize("renamed", [as_torchvision, as_authors])
def test_published_weights_load(renamed):
    options = {**SMALL, "depths": (2, 1, 2), "num_heads": (1, 2, 3)}
    theirs, ours = settled(Published(**options)), SwinTransformer(**options).double()
    x = torch.randn(2, 3, 20, 12, dtype=torch.float64)
    state = renamed(theirs)
    before = dict(state)
    ours.load_state_dict(state, strict=True)
    assert list(state) == list(before)
    torch.testing.assert_close(ours(x), theirs(x))
    inside = nn.Sequential(SwinTransformer(**options).double(), nn.Identity())
    inside.load_state_dict({f"0.{key}": tensor for key, tensor in state.items()}, strict=True)
    torch.testing.assert_close(inside(x), theirs(x))
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*more"):
        ours.load_state_dict({**state, "more.weight": x})
    state.pop("norm.weight")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*norm.weight"):
        ours.load_state_dict(state)


def test_swin_t():
    sizes = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "window_size": 7, "patch_size": 4}
    with torch.device("meta"):
        model, theirs = swin_tiny(), Published(1000, **sizes)
        assert attnk.count_parameters(model) == 28_288_354
        assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {
            key: tensor.shape for key, tensor in theirs.state_dict().items()
        }
        shifts = [block.attn.shift_size[0] for layer in model.layers for block in layer.blocks]
        assert shifts == [0, 3] * 6
    # some of torchvision's and of the authors' keys, by hand
    assert {"features.0.2.weight", "features.2.reduction.weight", "features.7.1.mlp.3.bias"} < set(
        as_torchvision(theirs)
    )
    assert {"layers.0.downsample.norm.bias", "layers.3.blocks.0.attn.qkv.bias", "head.bias"} < set(as_authors(theirs))


def test_starts_small():
    model = SwinTransformer(**{**SMALL, "embed_dim": 24})
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert 0.01 < module.weight.std() < 0.03
            assert module.bias is None or not module.bias.any()
        elif hasattr(module, "relative_position_bias_table"):
            assert 0.01 < module.relative_position_bias_table.std() < 0.03


def test_stochastic_depth():
    model = SwinTransformer(**SMALL, drop_path=0.4)
    shares = [block.drop_path for layer in model.layers for block in layer.blocks]
    assert shares == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert (
        SwinTransformer(**{**SMALL, "depths": (1,), "num_heads": (1,)}, drop_path=0.4).layers[0].blocks[0].drop_path
        == 0
    )
    x = torch.randn(8, 3, 8, 8)
    settled(model, torch.float32)
    assert not torch.equal(model(x), model(x))
    plain = settled(SwinTransformer(**SMALL), torch.float32)
    assert torch.equal(model.eval()(x), plain(x))


def test_runs_everywhere():
    model = SwinTransformer(**{**SMALL, "depths": (2, 1)})
    assert_runs_everywhere(model, torch.randn(2, 3, 14, 8))


def test_learns():
    torch.manual_seed(0)
    model = SwinTransformer(**{**SMALL, "num_classes": 4, "embed_dim": 12}, drop_path=0.1)
    x, labels = torch.randn(8, 3, 12, 12), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert F.cross_entropy(model.eval()(x), labels) < 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 0}, "num_classes must be a positive integer, got 0"),
        ({"patch_size": 2.0}, "patch_size must be a positive integer, got 2.0"),
        ({"depths": ()}, r"a number for each stage, got \(\) and \(1, 3\)"),
        ({"depths": (1, 1, 1)}, r"a number for each stage, got \(1, 1, 1\) and \(1, 3\)"),
        ({"depths": (1, 0)}, r"depths\[1\] must be a positive integer, got 0"),
        ({"num_heads": (1, 5)}, "dim must be divisible by num_heads, got dim=12, num_heads=5"),
        ({"drop_path": 2}, "drop_path must be a number from 0 to 1, got 2"),
        ({"mlp_ratio": 0}, "mlp_ratio must be a number that leaves at least one hidden channel"),
    ],
)
def test_refuses_at_construction(options, words):
    with pytest.raises(ValueError, match=words):
        SwinTransformer(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(3, 8, 8), ValueError, r"x must be \(B, C, H, W\) with C = 3"),
        (torch.zeros(1, 1, 8, 8), ValueError, r"x must be \(B, C, H, W\) with C = 3"),
        (torch.zeros(1, 3, 8, 1), ValueError, "at least one patch of 2 pixels"),
        (torch.zeros(1, 3, 8, 8).half(), TypeError, "x must have the dtype of the module"),
    ],
)
def test_refuses_at_call(x, error, words):
    with pytest.raises(error, match=words):
        SwinTransformer(**SMALL)(x)
