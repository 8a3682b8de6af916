"""attnk.capture: what modules attend to, on every backend, and the pictures of it."""

import copy
import sys

import pytest
import torch
from torch import nn

import attnk
from attnk import models
from attnk.dispatch import INTERPRETED
from attnk.inspect.overlay import as_picture

BACKENDS = ["auto", "torch", "reference"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def captured(model, *args, **options):
    """What a run of a model records, having checked that the model computes what it does otherwise."""
    expected = copy.deepcopy(model)(*args, **options)
    with attnk.capture(model) as maps:
        out = model(*args, **options)
    first, second = (each[0] if isinstance(each, tuple) else each for each in (out, expected))
    assert torch.equal(first, second)
    return maps


def only(maps):
    assert len(maps) == 1
    return next(iter(maps.values()))


# Gates


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", ["map", "gated", "residual"])
@pytest.mark.parametrize("norm", ["none", "eval", "train"])
def test_spatial_gate(backend, output, norm):
    module = attnk.SpatialAttention(7, output=output, norm=norm != "none", bias=True, order="max_avg")
    module.train(norm == "train")
    x = torch.randn(2, 4, 9, 8)
    expected = copy.deepcopy(module)
    expected.output = "map"
    with attnk.use_backend(backend):
        record = only(captured(module, x))
        assert record.kind == "spatial_gate"
        assert record.name == "SpatialAttention"
        torch.testing.assert_close(record.gate, expected(x))
    torch.testing.assert_close(record.heat(), record.gate[:, 0])
    if norm == "train":
        assert module.bn.num_batches_tracked == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", ["gated", "map"])
@pytest.mark.parametrize(
    "build",
    [
        lambda o: attnk.SELayer(8, 4, output=o),
        lambda o: attnk.ECA(8, output=o),
        lambda o: attnk.ChannelAttention(8, 4, pool="half_sum", output=o),
    ],
)
def test_channel_gate(backend, output, build):
    module, x = build(output), torch.randn(2, 8, 5, 6)
    with attnk.use_backend(backend):
        record = only(captured(module, x))
    assert record.kind == "channel_gate"
    assert record.gate.shape == (2, 8, 1, 1)
    module.output = "gated"
    torch.testing.assert_close(module(x), x * record.gate)
    with pytest.raises(ValueError, match="one number a channel"):
        record.heat()


@pytest.mark.parametrize("backend", BACKENDS)
def test_channel_gate_function(backend):
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

        def forward(self, x):
            return attnk.channel_gate(x, (self.w1, None, self.w2, None), pool="avg_max")

    module, x = Calls(), torch.randn(2, 8, 5, 6)
    with attnk.use_backend(backend):
        record = only(captured(module, x))
    torch.testing.assert_close(module(x), x * record.gate)


@pytest.mark.parametrize("backend", BACKENDS)
def test_coordinate_gate(backend):
    module, x = attnk.CoordinateAttention(8).eval(), torch.randn(2, 8, 5, 6)
    with attnk.use_backend(backend):
        record = only(captured(module, x))
    assert record.kind == "coordinate_gate"
    gate = record.gate * record.gate_w
    torch.testing.assert_close(module(x), x * gate)
    torch.testing.assert_close(record.heat(), gate.mean(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["none", "eval", "train"])
def test_cbam(backend, norm):
    module = attnk.CBAM(8, 4, pool="avg_max", norm=norm != "none").train(norm == "train")
    x = torch.randn(2, 8, 5, 6, requires_grad=True)
    expected = copy.deepcopy(module)(x)
    with attnk.use_backend(backend):
        maps = captured(module, x)
    assert list(maps) == ["channel_attention", "spatial_attention"]
    channel, spatial = maps.values()
    assert (channel.kind, spatial.kind) == ("channel_gate", "spatial_gate")
    torch.testing.assert_close(x * channel.gate * spatial.gate, expected)


@pytest.mark.parametrize(
    "module", [attnk.SCSE(8, 4), attnk.GlobalContext(8, fusion="scale"), attnk.SKConv(8, groups=4)]
)
def test_other_gates(module):
    maps = captured(module.eval(), torch.randn(2, 8, 5, 6))
    assert maps
    assert {record.kind for record in maps.values()} == {"channel_gate"}


def test_maps_without_a_batch():
    for module in (attnk.SpatialAttention(output="gated"), attnk.SELayer(8, 4), attnk.CoordinateAttention(8).eval()):
        assert only(captured(module, torch.randn(8, 5, 6))).gate.shape[0] == 1


# Attention


def softmax_weights(module, *args, **options):
    """The N x N weights (B, heads, Nq, Nk) of a module's one softmax attention, by the definition."""
    from attnk.ops import _watch
    from attnk.reference.softmax_attention import softmax_attention_reference

    told = []
    _watch.watchers.append(lambda kind, what: told.append(what))
    module(*args, **options)
    _watch.watchers.pop()
    (what,) = told
    eye = torch.eye(what["k"].shape[2]).expand(*what["k"].shape[:2], -1, -1)
    return softmax_attention_reference(v=eye, **what)[0].detach()


TOKENS = {
    "self": lambda: attnk.SelfAttention(16, 4),
    "multi": lambda: attnk.MultiHeadSelfAttention(16, 2),
    "single": lambda: attnk.SingleHeadSelfAttention(16, compat="original"),
    "layer": lambda: attnk.TransformerEncoderLayer(16, 2),
}


def check_attention(record, weights):
    """Everything of a record against the weights, which exist here."""
    keys = weights.shape[-1]
    torch.testing.assert_close(record.received(), weights.mean((1, 2)))
    queries = [0, record.queries // 2, -1]
    torch.testing.assert_close(record.rows(queries), weights[:, :, queries])
    share = torch.rand(weights.shape[0], weights.shape[2])
    torch.testing.assert_close(record.weighted(share), torch.einsum("bi,bhij->bhj", share, weights))
    assert (record.batch, record.heads, record.queries, record.keys) == (*weights.shape[:3], keys)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("terms", ["plain", "mask", "causal", "bias", "table"])
def test_attention(backend, name, terms):
    module, x = TOKENS[name]().eval(), torch.randn(2, 12, 16)
    heads = 1 if name == "single" else getattr(module, "num_heads", 2)
    mask = torch.rand(2, 1, 12, 12) > 0.3
    mask[0, :, 6] = False  # a query that sees nothing, one of those that are looked at
    options = {
        "plain": {},
        "mask": {"mask": mask},
        "causal": {"is_causal": True},
        "bias": {"bias": torch.randn(1, heads, 12, 12)},
        "table": {"bias_table": torch.randn(5 * 7, heads), "grid": (3, 4)},
    }[terms]
    weights = softmax_weights(module, x, **options)
    with attnk.use_backend(backend):
        record = only(captured(module, x, **options))
        check_attention(record, weights)
    assert record.name == {"layer": "self_attn"}.get(name, type(module).__name__)
    assert record.grid == ((3, 4) if terms == "table" else None)


@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention(batch_first):
    module = attnk.MultiheadAttention(16, 4, batch_first=batch_first, add_zero_attn=True).eval()
    q, k = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    if not batch_first:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    maps = captured(module, q, k, k, key_padding_mask=padding, need_weights=False)
    expected = module(q, k, k, key_padding_mask=padding, average_attn_weights=False)[1].detach()
    check_attention(only(maps), expected)


def test_feature_maps():
    x = torch.randn(2, 16, 4, 6)
    module = attnk.FeatureMapAttention(attnk.SelfAttention(16, 4)).eval()
    record = captured(module, x)["layer"]
    assert record.grid == (4, 6)
    weights = softmax_weights(module, x)
    check_attention(record, weights)
    torch.testing.assert_close(record.heat(), weights.mean((1, 2)).view(2, 4, 6))
    torch.testing.assert_close(record.heat((2, 3)), weights.mean(1)[:, 2 * 6 + 3].view(2, 4, 6))
    torch.testing.assert_close(record.rows([(0, 1)]), weights[:, :, [1]])
    sagan = attnk.SAGANAttention(16)
    record = only(captured(sagan, x))
    assert (record.queries, record.keys, record.grid) == (24, 6, (2, 3)) or record.grid is None
    check_attention(record, softmax_weights(sagan, x))


def test_attention_pool():
    module, x = attnk.AttentionPool2d(4, 16, 2), torch.randn(2, 16, 4, 4)
    record = only(captured(module, x))
    assert (record.queries, record.keys, record.grid, record.extra) == (1, 17, (4, 4), 1)
    torch.testing.assert_close(record.received().sum(1), torch.ones(2))
    assert torch.equal(record.rows([0])[:, :, 0], record.weighted(torch.ones(2, 1)))
    assert record.heat().shape == (2, 4, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["row", "column", "sum", "criss_cross", "window"])
def test_group_attention(backend, layout):
    """The weights are what the operation makes of values that are a unit matrix."""
    q, k = torch.randn(2, 2, 4, 6, 2, 8).unbind(0)
    options = {"window": (2, 3), "shift": (1, 1), "bias_table": torch.randn(15, 2)} if layout == "window" else {}

    class Attend(nn.Module):
        def forward(self, v):
            return attnk.group_attention(q, k, v, layout, **options)

    eye = torch.eye(24).view(4, 6, 1, 24).expand(2, 4, 6, 2, 24)
    weights = Attend()(eye).flatten(1, 2).transpose(1, 2)  # (B, heads, Nq, Nk)
    with attnk.use_backend(backend):
        record = only(captured(Attend(), eye))
        check_attention(record, weights)
    assert record.grid == (4, 6)
    assert record.rows([(1, 2)]).shape == (2, 2, 1, 24)


@pytest.mark.parametrize("feature_map", ["relu", "elu", "softmax"])
def test_linear_attention(feature_map):
    q, k = torch.randn(2, 2, 3, 10, 8).unbind(0)

    class Attend(nn.Module):
        def forward(self, v):
            return attnk.linear_attention(q, k, v, feature_map=feature_map)

    eye = torch.eye(10).expand(2, 3, 10, 10)
    check_attention(only(captured(Attend(), eye)), Attend()(eye))


def test_grouped_heads():
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)

    class Attend(nn.Module):
        def forward(self, v):
            return attnk.softmax_attention(q, k, v, enable_gqa=True)

    v = torch.eye(5).expand(1, 2, 5, 5)
    check_attention(only(captured(Attend(), v)), Attend()(v))


@pytest.mark.parametrize("mode", ["inference_mode", "bfloat16", "training"])
def test_modes(mode):
    module = (
        attnk.WindowAttention(8, 2, window_size=4, version=2)
        if mode != "bfloat16"
        else attnk.SelfAttention(16, 4).eval()
    )
    x = torch.randn(1, 4, 4, 8) if mode != "bfloat16" else torch.randn(1, 6, 16)
    if mode == "inference_mode":
        with torch.inference_mode(), attnk.capture(module) as maps:
            module(x)
            inside = only(maps).received()
        assert torch.equal(only(maps).received(), inside)
    elif mode == "bfloat16":
        with torch.autocast("cpu", torch.bfloat16), attnk.capture(module) as maps:
            module(x)
            assert only(maps).received().dtype == torch.float32
    else:
        with attnk.capture(module) as maps:
            module(x.requires_grad_()).square().sum().backward()
        plain = copy.deepcopy(module)
        plain.zero_grad()
        plain(x).square().sum().backward()
        for one, other in zip(module.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
    torch.testing.assert_close(only(maps).received().sum(1), torch.ones(1))


def test_memory_is_that_of_the_tokens():
    """Rows, received attention and rollout of 2048 tokens, without anything of 2048 x 2048 numbers."""
    tokens = 2048
    module, x = attnk.SelfAttention(8, 1).eval(), torch.randn(1, tokens, 8)
    with torch.no_grad(), attnk.capture(module) as maps:
        module(x)
    with torch.profiler.profile(profile_memory=True) as profiler:
        maps.rollout(0)
        only(maps).received()
        only(maps).rows([0, 5, 7])
    largest = max(event.self_cpu_memory_usage / max(event.count, 1) for event in profiler.key_averages())
    assert largest < tokens**2 * 4 / 2


KERNELS = {
    "spatial": lambda: attnk.SpatialAttention(3, output="gated"),
    "cbam": lambda: attnk.CBAM(8, 4),
    "softmax": lambda: attnk.FeatureMapAttention(attnk.SelfAttention(8, 2)),
    "group": lambda: attnk.SeparableSelfAttention(8, 2),
}


@pytest.mark.skipif(not INTERPRETED, reason="kernels run on the CPU in Triton's interpreter alone")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name):
    module, x, seen = KERNELS[name]().eval(), torch.randn(1, 8, 4, 6), {}
    for backend in ("torch", "triton"):
        with attnk.use_backend(backend), torch.no_grad(), attnk.capture(module) as maps:
            module(x)
            seen[backend] = [
                [each.gate] if hasattr(each, "gate") else [each.received(), each.rows([0, (1, 2)])]
                for each in maps.values()
            ]
    torch.testing.assert_close(seen["triton"], seen["torch"])


# Models


def test_vit():
    model = models.ViT(image_size=16, patch_size=4, dim=16, depth=3, num_heads=2, num_classes=5).eval()
    x = torch.randn(2, 3, 16, 24)
    maps = captured(model, x)
    assert list(maps) == [f"blocks.{i}.mha" for i in range(3)]
    assert all((record.grid, record.extra) == ((4, 6), 1) for record in maps.values())
    assert maps.image.shape == x.shape
    product = torch.eye(25).expand(2, 25, 25)
    for record in maps.values():
        weights = record.rows(range(25)).mean(1)
        product = (0.3 * torch.eye(25) + 0.7 * weights) @ product
    torch.testing.assert_close(maps.rollout(residual=0.3), product[:, 0])
    torch.testing.assert_close(maps.rollout((1, 2), residual=0.3), product[:, 1 + 6 + 2])
    torch.testing.assert_close(maps.heat("rollout"), maps.rollout()[:, 1:].view(2, 4, 6))
    torch.testing.assert_close(
        maps.heat("blocks.1.mha", 0), maps["blocks.1.mha"].rows([0]).mean(1)[:, 0, 1:].view(2, 4, 6)
    )


def test_vgg():
    model = models.VGG16WithSpatialAttention(3, width=4).eval()
    maps = captured(model, torch.randn(1, 3, 32, 32))
    assert list(maps) == [f"features.{index}" for index in (5, 11, 19, 27, 35)]
    model = models.VGG16WithAttention(3, width=8, attention_positions=(1, 2)).eval()
    maps = captured(model, torch.randn(1, 3, 32, 48))
    assert [record.grid for record in maps.values()] == [(16, 24), (8, 12)]
    with pytest.raises(ValueError, match="as many tokens in every layer"):
        maps.rollout()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = attnk.SpatialAttention(3, output="gated")

    def forward(self, x):
        return self.gate(self.gate(x))


def test_runs_and_forwards():
    model, x = Twice(), torch.randn(1, 2, 4, 4)
    maps = captured(model, x)
    assert list(maps) == ["gate", "gate#2"]
    torch.testing.assert_close(model(x), x * maps["gate"].gate * maps["gate#2"].gate)
    with attnk.capture(model) as maps:
        model(torch.randn(3, 2, 4, 4))
        model(x)
        other = attnk.SpatialAttention(3)
        other(x)  # is not the model's
        attnk.spatial_gate(x, model.gate.conv1.weight)  # nor is this
    assert list(maps) == ["gate", "gate#2"]
    assert maps["gate"].gate.shape[0] == 1
    model(torch.randn(3, 2, 4, 4))  # comes too late
    assert maps["gate"].gate.shape[0] == 1
    with attnk.capture(model) as maps:
        model.gate(x)
        model.gate(x)
    assert list(maps) == ["gate"]


def test_a_forward_that_goes_another_way():
    class Chooses(Twice):
        def forward(self, x, twice):
            return self.gate(self.gate(x)) if twice else self.gate(x)

    model, x = Chooses(), torch.randn(1, 2, 4, 4)
    with attnk.capture(model) as maps:
        model(x, True)
        model(x, False)
    assert list(maps) == ["gate"]


def test_groups_that_softmax_attention_streams(monkeypatch):
    """On a GPU, long rows are folded into a batch for it: that is one attention, and that of the groups."""
    module, x = attnk.SeparableSelfAttention(8, 2).eval(), torch.randn(1, 8, 4, 6)
    expected = captured(module, x)
    monkeypatch.setattr("attnk.ops.group_attention._choose", lambda *args, **options: ("streaming", ""))
    maps = captured(module, x)
    assert list(maps) == list(expected)
    for name in maps:
        assert maps[name].kind == "group_attention"
        torch.testing.assert_close(maps[name].received(), expected[name].received())


def test_nested_captures():
    model, x = Twice(), torch.randn(1, 2, 4, 4)
    with attnk.capture(model) as outer, attnk.capture(model.gate) as inner:
        model(x)
    assert list(outer) == ["gate", "gate#2"]
    assert list(inner) == ["SpatialAttention"]


def test_after_an_error():
    model = nn.Sequential(attnk.SpatialAttention(3, output="gated"), nn.Linear(3, 3))
    with attnk.capture(model) as maps:
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.randn(1, 2, 4, 4))
        model(torch.randn(1, 2, 4, 3))
    assert list(maps) == ["0"]
    assert maps["0"].gate.shape == (1, 1, 4, 3)
    from attnk.ops import _watch

    assert not _watch.watchers
    assert not torch.nn.modules.module._global_forward_hooks


def test_compiled_models_are_recorded():
    model, x = Twice(), torch.randn(1, 2, 4, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = compiled(x)
    for watched in (model, compiled):
        with attnk.capture(watched) as maps:
            torch.testing.assert_close(compiled(x), expected)
        assert list(maps) == ["gate", "gate#2"]
    torch.testing.assert_close(compiled(x), expected)


def test_inserted_modules_are_recorded():
    model = attnk.insert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "0", attnk.CBAM(4))
    maps = captured(model, torch.randn(1, 3, 8, 8))
    assert list(maps) == ["0.inserted.module.channel_attention", "0.inserted.module.spatial_attention"]


def test_errors():
    with pytest.raises(TypeError, match="model must be a module, got str"):
        attnk.capture("model")
    maps = captured(attnk.SelfAttention(16, 4).eval(), torch.randn(1, 5, 16))
    with pytest.raises(KeyError, match="nothing was recorded of 'x'; there is 'SelfAttention'"):
        maps["x"]
    with pytest.raises(IndexError, match="has 5 queries, got 5"):
        only(maps).rows([5])
    with pytest.raises(ValueError, match="are no map that was seen"):
        only(maps).rows([(0, 0)])
    with pytest.raises(ValueError, match="no map that was seen"):
        only(maps).heat()
    with pytest.raises(ValueError, match="no layer has a map to draw"):
        maps.overlay(torch.rand(3, 4, 4))
    with pytest.raises(ValueError, match="give the picture"):
        captured(attnk.SpatialAttention(), torch.randn(1, 2, 4, 4)).overlay()


# Pictures


class Mixed(nn.Module):
    """One of everything."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, 2)
        self.spatial = attnk.SpatialAttention(3, output="gated")
        self.cbam = attnk.CBAM(16, 4)
        self.coordinate = attnk.CoordinateAttention(16)
        self.attention = attnk.FeatureMapAttention(attnk.SelfAttention(16, 2))

    def forward(self, x):
        return self.attention(self.coordinate(self.cbam(self.spatial(self.stem(x)))))


def test_draws(tmp_path):
    maps = captured(Mixed().eval(), torch.randn(2, 3, 16, 24))
    figure = maps.overlay(layer="spatial", index=1)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:2] == ["picture", "spatial"]
    drawn = figure.axes[1].images[1].get_array()
    assert drawn.shape == (16, 24)
    low, high = maps["spatial"].gate[1].min(), maps["spatial"].gate[1].max()
    assert low - 1e-6 <= drawn.min() <= drawn.max() <= high + 1e-6
    maps.save(tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 5000
    assert maps.overlay(query=(1, 2)).axes[1].get_title() == "attention.layer, query (1, 2)"

    figure = maps.grid(torch.rand(32, 48, 3).numpy())
    captions = [axis.get_title().split("\n")[0] for axis in figure.axes if axis.get_title()]
    names = ["spatial", "cbam.channel_attention", "cbam.spatial_attention", "coordinate", "attention.layer"]
    assert captions == ["picture", *names]
    curve = figure.axes[2].lines[0].get_ydata()
    torch.testing.assert_close(torch.tensor(curve), maps["cbam.channel_attention"].gate[0].flatten().sort().values)
    maps.save(tmp_path / "all.pdf", image=torch.rand(1, 16, 24))
    assert (tmp_path / "all.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (3, 4, 5), (1, 4, 5), (4, 5, 3), (4, 5)])
def test_pictures_of_any_kind(shape):
    picture = as_picture(torch.randn(shape) * 50, 0)
    assert picture.shape == (4, 5, 3)
    assert picture.min() == 0
    assert picture.max() == 1


def test_pictures_that_are_none():
    with pytest.raises(ValueError, match=r"image must be \(3, H, W\).*got \(2, 4, 5\)"):
        as_picture(torch.rand(2, 4, 5), 0)
    with pytest.raises(ValueError, match="one of 2 images, got 2"):
        as_picture(torch.rand(2, 3, 4, 5), 2)


def test_matplotlib_is_imported_when_something_is_drawn():
    import subprocess

    code = "import sys, attnk; attnk.capture, attnk.lint, attnk.insert; print('matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
