"""The ResNet with axial attention against its formula in plain PyTorch, and without attention against ResNet's."""

import pytest
import torch
import torch.nn.functional as F
from networks import assert_drop_in, assert_runs_everywhere, settled
from torch import nn

import attnk
from attnk.models.axial_resnet import AxialBottleneck, AxialResNet, axial_resnet26, axial_resnet50

SMALL = {"depths": (1, 2, 1, 1), "width": 4, "num_heads": 2, "image_size": 64}


class Attention(nn.Module):
    """Along columns, then along rows, with a bias by the distance."""

    def __init__(self, dim, heads, size):
        super().__init__()
        self.heads = heads
        for axis, side in zip(("column", "row"), size or (None, None), strict=True):
            table = None if side is None else nn.Parameter(torch.randn(2 * side - 1, heads))
            self.register_parameter(f"{axis}_bias_table", table)
        axes = [{"to_q": (dim, False), "to_kv": (2 * dim, False), "to_out": (dim, True)}] * 2
        self.axial_attentions = nn.ModuleList(
            nn.ModuleDict(
                {"fn": nn.ModuleDict({name: nn.Linear(dim, out, bias=bias) for name, (out, bias) in axis.items()})}
            )
            for axis in axes
        )

    def along_rows(self, x, fn, table):
        """x (B, rows, tokens, dim)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(2, 3)
            for part in (fn["to_q"](x), *fn["to_kv"](x).chunk(2, -1))
        )
        logits = q @ k.mT / q.shape[-1] ** 0.5
        if table is not None:
            place = torch.arange(x.shape[2])
            logits = logits + table[place[:, None] - place + len(place) - 1].permute(2, 0, 1)
        return fn["to_out"]((logits.softmax(-1) @ v).transpose(2, 3).flatten(3))

    def forward(self, x):
        columns, rows = (axis["fn"] for axis in self.axial_attentions)
        x = self.along_rows(x.permute(0, 3, 2, 1), columns, self.column_bias_table).transpose(1, 2)
        return self.along_rows(x, rows, self.row_bias_table).permute(0, 3, 1, 2)


def pooled(x, stride):
    """Means of stride x stride pixels; of fewer at the edge."""
    count = F.pad(torch.ones_like(x[:1, :1]), (0, -x.shape[3] % stride, 0, -x.shape[2] % stride))
    x = F.pad(x, (0, -x.shape[3] % stride, 0, -x.shape[2] % stride))
    return F.avg_pool2d(x, stride) / F.avg_pool2d(count, stride)


class Bottleneck(nn.Module):
    def __init__(self, in_channels, out_channels, stride=1, num_heads=None, size=None):
        super().__init__()
        inner = out_channels // 4
        self.stride = stride
        self.conv1, self.bn1 = nn.Conv2d(in_channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        if num_heads is None:
            self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        else:
            self.conv2 = nn.ModuleDict({"attention": Attention(inner, num_heads, size)})
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        self.downsample = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        if isinstance(self.conv2, nn.Conv2d):
            out = self.conv2(out)
        else:
            out = pooled(self.conv2["attention"](out), self.stride)
        out = self.bn3(self.conv3(torch.relu(self.bn2(out))))
        return torch.relu(out + self.downsample(x))


class Network(nn.Module):
    def __init__(self, num_classes, depths, width, num_heads, image_size, attention_stages=(1, 2, 3, 4)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, depth in enumerate(depths, 1):
            heads = num_heads if stage in attention_stages else None
            outputs, side = 2 * width * 2**stage, image_size // 2 ** (stage + 1)
            stack = [
                Bottleneck(
                    channels if i == 0 else outputs,
                    outputs,
                    stride := 2 if stage > 1 and i == 0 else 1,
                    heads,
                    (side * stride, side * stride),
                )
                for i in range(depth)
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*stack))
            channels = outputs
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.flatten(2).mean(2))


@pytest.mark.parametrize("size", [None, (7, 6)], ids=str)
@pytest.mark.parametrize(
    "arguments", [(8, 16, 1, 2), (16, 16, 1, 4), (16, 16, 2, 1), (6, 32, 2, 8), (8, 16, 3, 2)], ids=str
)
def test_bottleneck_equals_its_formula(arguments, size):
    x = torch.randn(3, arguments[0], 7, 6, dtype=torch.float64)
    assert_drop_in(Bottleneck(*arguments, size), AxialBottleneck(*arguments, size=size), x)


@pytest.mark.parametrize("stages", [(1, 2, 3, 4), (3, 4), (2,), ()], ids=str)
def test_network_equals_its_formula(stages):
    options = {**SMALL, "num_classes": 3, "attention_stages": stages}
    assert_drop_in(Network(**options), AxialResNet(**options), torch.randn(4, 3, 64, 64, dtype=torch.float64))


@pytest.mark.parametrize("size", [(96, 32), (70, 45), (8, 8), (1, 1)], ids=str)
def test_positions_are_resized(size):
    """Bicubically, in each block by itself; sides that strides do not divide are rounded up."""
    ours = settled(AxialResNet(3, **SMALL)).eval()
    theirs = settled(Network(3, **SMALL)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    rows, columns = (-(-side // 4) for side in size)
    for stage in (1, 2, 3, 4):
        for block in getattr(theirs, f"layer{stage}"):
            attention = block.conv2["attention"]
            for name, side in (("column_bias_table", rows), ("row_bias_table", columns)):
                table = getattr(attention, name).mT[None, :, :, None]
                table = F.interpolate(table, size=(2 * side - 1, 1), mode="bicubic")[0, :, :, 0].mT
                setattr(attention, name, nn.Parameter(table))
            rows, columns = -(-rows // block.stride), -(-columns // block.stride)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_image_size_that_strides_do_not_divide():
    """Tables are made for the maps as they come."""
    model = AxialResNet(3, **{**SMALL, "image_size": 37})
    seen = []
    for block in model.modules():
        if isinstance(block, AxialBottleneck):
            block.register_forward_pre_hook(lambda block, args: seen.append((block, tuple(args[0].shape[2:]))))
    model(torch.randn(2, 3, 37, 37))
    assert [size for _, size in seen] == [(10, 10), (10, 10), (5, 5), (5, 5), (3, 3)]
    assert all(block.conv2.attention.size == size for block, size in seen)


def test_knows_where_a_pixel_is():
    """Without a position attention along the axes commutes with a permutation of the columns; with one it does not."""
    order = torch.tensor([3, 1, 4, 0, 5, 2])
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    for size in (None, (7, 6)):
        block = settled(AxialBottleneck(8, 16, 1, 2, size=size)).eval()
        assert torch.allclose(block(x[..., order]), block(x)[..., order]) == (size is None)


def test_counts():
    def changed(depths, stages):
        """Parameters of attention in place of 3 x 3 convolutions, less those of the convolutions."""
        total = 0
        for stage in stages:
            inner, side = 32 * 2**stage, 112 // 2**stage
            sides = [min(56, 2 * side)] + [side] * (depths[stage - 1] - 1)
            total += sum(2 * (4 * inner**2 + inner) + 2 * 8 * (2 * side - 1) - 9 * inner**2 for side in sides)
        return total

    with torch.device("meta"):
        plain = axial_resnet50(attention_stages=())
        assert attnk.count_parameters(plain) == 25_557_032
        some = {"layer1.0.conv2.weight", "layer1.0.downsample.0.weight", "layer4.2.bn3.running_var", "fc.bias"}
        assert some < set(plain.state_dict())
        for stages in ((1, 2, 3, 4), (3, 4)):
            model = axial_resnet50(attention_stages=stages)
            assert attnk.count_parameters(model) == 25_557_032 + changed((3, 4, 6, 3), stages)
        assert attnk.count_parameters(axial_resnet50()) == 24_320_744
        model = axial_resnet26()
        plain = axial_resnet26(attention_stages=())
        assert attnk.count_parameters(model) - attnk.count_parameters(plain) == changed((1, 2, 4, 1), (1, 2, 3, 4))
        assert attnk.count_parameters(model) == 13_146_152
        assert [len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3, 4)] == [1, 2, 4, 1]
        assert [len(getattr(axial_resnet50(), f"layer{stage}")) for stage in (1, 2, 3, 4)] == [3, 4, 6, 3]


def test_bottleneck_runs_everywhere():
    assert_runs_everywhere(
        AxialBottleneck(8, 16, 2, 2, size=(5, 7)), torch.randn(2, 8, 5, 7), autocast_dtype=torch.bfloat16
    )


def test_network_runs_everywhere():
    model = AxialResNet(3, **{**SMALL, "depths": (1, 1, 1, 1), "attention_stages": (3,)})
    assert_runs_everywhere(model, torch.randn(2, 3, 24, 40))


def test_keeps_the_memory_format():
    block = AxialBottleneck(8, 16, 2, 2).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 7).contiguous(memory_format=torch.channels_last)
    assert block(x).is_contiguous(memory_format=torch.channels_last)


def test_learns():
    torch.manual_seed(0)
    model = AxialResNet(4, **{**SMALL, "width": 8, "image_size": 32})
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[-1] < 0.3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AxialBottleneck(0, 8), "in_channels must be a positive integer, got 0"),
        (lambda: AxialBottleneck(8, 8, 0), "stride must be a positive integer, got 0"),
        (lambda: AxialBottleneck(8, 16, 1, 3), "dim must be divisible by num_heads, got dim=4, num_heads=3"),
        (lambda: AxialBottleneck(8, 16, 1, 2, size=7), r"size must be \(height, width\)"),
        (lambda: AxialResNet(0), "num_classes must be a positive integer, got 0"),
        (lambda: AxialResNet(3, num_heads=0, attention_stages=()), "num_heads must be a positive integer, got 0"),
        (lambda: AxialResNet(3, depths=(1, 1)), r"depths must be .* of 4 stages, got \(1, 1\)"),
        (lambda: AxialResNet(3, depths=(1, 1, 0, 1)), r"depths\[2\] must be a positive integer, got 0"),
        (lambda: AxialResNet(3, attention_stages=(0, 5)), r"must be stages from 1 to 4, got \(0, 5\)"),
        (lambda: AxialResNet(3, width=12), "dim must be divisible by num_heads, got dim=12, num_heads=8"),
    ],
)
def test_refuses_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "x", "error", "words"),
    [
        (lambda: AxialBottleneck(8, 8, 1, 2), torch.zeros(8, 4, 4), ValueError, r"x must be \(B, in_channels, H, W\)"),
        (lambda: AxialBottleneck(8, 8, 1, 2), torch.zeros(1, 8, 4, 4).half(), TypeError, "x must have the dtype"),
        (lambda: AxialResNet(3, **SMALL), torch.zeros(1, 4, 64, 64), ValueError, "with C = 3, got"),
        (lambda: AxialResNet(3, **SMALL), torch.zeros(3, 64, 64), ValueError, "with C = 3, got"),
    ],
)
def test_refuses_at_call(make, x, error, words):
    with pytest.raises(error, match=words):
        make()(x)
