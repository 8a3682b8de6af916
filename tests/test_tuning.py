"""Every row of the tuning tables: some call selects it, and it computes the right thing."""

import dataclasses
import functools
import itertools
import os

import pytest
import torch

pytest.importorskip("triton")

from attnk.kernels import cbam as cbam_kernels
from attnk.kernels import channel_gate as channel_kernels
from attnk.kernels import coordinate_gate as coordinate_kernels
from attnk.kernels import linear_attention as linear
from attnk.kernels import softmax_attention as attention
from attnk.kernels import spatial_gate as kernels
from attnk.kernels.tuning import (
    CBAM_TABLE,
    CHANNEL_GATE_TABLE,
    COORDINATE_GATE_TABLE,
    GROUP_ATTENTION_TABLE,
    LINEAR_ATTENTION_TABLE,
    SOFTMAX_ATTENTION_TABLE,
    SPATIAL_GATE_TABLE,
    ChannelGateConfig,
    CoordinateGateConfig,
    LinearAttentionConfig,
    LinearTile,
    SoftmaxAttentionConfig,
    SpatialGateConfig,
    Tile,
    architecture,
    cbam_config,
    channel_gate_config,
    coordinate_gate_config,
    group_attention_config,
    linear_attention_config,
    softmax_attention_config,
    spatial_gate_config,
)

import attnk
from attnk.reference.cbam import cbam_reference
from attnk.reference.channel_gate import channel_pool_reference, scale_reference
from attnk.reference.coordinate_gate import coordinate_gate_reference, coordinate_pool_reference
from attnk.reference.linear_attention import linear_attention_reference
from attnk.reference.softmax_attention import softmax_attention_reference
from attnk.reference.spatial_gate import spatial_gate_reference
from attnk.testing import ARCHITECTURES, Meter, assert_matches_reference, record_launches

DTYPES = {2: torch.float16, 4: torch.float32, 8: torch.float64}
SIDES = (1, 7, 14, 28, 56, 112, 224, 512, 1024)
ROWS = [(arch, number) for arch, rows in SPATIAL_GATE_TABLE.items() for number in range(len(rows))]

runs_kernels = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available(),
    reason="kernels need a GPU or TRITON_INTERPRET=1",
)


def itemsizes_of(arch: str, number: int) -> list[int]:
    """The item sizes of which some map has this row, which is then not behind another that fits as well."""
    row = SPATIAL_GATE_TABLE[arch][number]
    return [
        itemsize
        for itemsize in DTYPES
        if any(
            spatial_gate_config(arch, itemsize=itemsize, pixels=side**2, channels_last=row.channels_last) is row.config
            for side in SIDES
        )
    ]


class WithConfig(torch.autograd.Function):
    """The launchers with a configuration of one's choice, in autograd."""

    @staticmethod
    def forward(ctx, x, weight, bias, order, output, ties, config):
        out, *kept = kernels.spatial_gate_forward(x, weight, bias, order, output, ties, config=config)
        ctx.save_for_backward(x, weight, *kept)
        ctx.options = order, output, ties
        ctx.config = config
        return out

    @staticmethod
    def backward(ctx, dout):
        x, weight, *kept = ctx.saved_tensors
        channels_last = x.stride(1) < x.stride(3)
        grads = kernels.spatial_gate_backward(
            dout, x, weight, *kept, x.shape[1], channels_last, *ctx.options, True, True, config=ctx.config
        )
        return *grads, None, None, None, None


def check(config, x, output, ties, kernel_size=3):
    weight = torch.randn(1, 2, kernel_size, kernel_size).to(x)
    bias = torch.randn(1).to(x)

    def function(x, weight, bias):
        return WithConfig.apply(x, weight, bias, "avg_max", output, ties, config)

    def reference(x, weight, bias):
        return spatial_gate_reference(x, weight, bias, output=output, ties=ties)

    assert_matches_reference(function, reference, {"x": x, "weight": weight, "bias": bias})


@pytest.mark.parametrize(("arch", "number"), ROWS)
def test_some_call_selects_the_row(arch, number):
    row = SPATIAL_GATE_TABLE[arch][number]
    assert isinstance(row.config, SpatialGateConfig)
    assert itemsizes_of(arch, number), "a row above it fits every call that it fits"


@runs_kernels
@pytest.mark.parametrize("lag", ["lag of the row", "two launches", "one launch"])
@pytest.mark.parametrize(("arch", "number"), ROWS)
def test_row_matches_reference(arch, number, lag, device):
    row = SPATIAL_GATE_TABLE[arch][number]
    config = row.config
    if lag != "lag of the row":
        config = dataclasses.replace(config, lag=0 if lag == "two launches" else 64)
        if config == row.config:
            pytest.skip("the row itself")
    # whole blocks of channels and pixels, then neither
    for channels, height, width in ((config.block_c, 4, config.block_p // 4), (config.block_c + 1, 3, 5)):
        for itemsize in itemsizes_of(arch, number):
            x = torch.randn(2, channels, height, width, device=device).to(DTYPES[itemsize])
            if row.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            check(config, x, "gated", "first")


@runs_kernels
@pytest.mark.parametrize(("arch", "number"), ROWS)
@pytest.mark.parametrize(("output", "ties"), [("map", "first"), ("residual", "even")])
def test_row_matches_reference_for_other_outputs(arch, number, output, ties, device):
    row = SPATIAL_GATE_TABLE[arch][number]
    x = torch.randint(-2, 3, (1, row.config.block_c + 1, 3, 5), device=device)
    x = x.to(DTYPES[itemsizes_of(arch, number)[-1]])
    if row.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    check(row.config, x, output, ties)


@pytest.mark.parametrize("lag", [0, 3, 4])
def test_lag_decides_the_launches(lag):
    """One launch a pass for images of up to lag tiles: here there are four."""
    x, weight = torch.ones(1, 4, 8, 16), torch.ones(1, 2, 3, 3)
    config = SpatialGateConfig(block_p=32, block_c=4, num_warps=4, num_stages=1, lag=lag)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    with Meter() if interpreted else record_launches() as watch:
        out, *kept = kernels.spatial_gate_forward(x, weight, None, "avg_max", "gated", "first", config=config)
        kernels.spatial_gate_backward(
            out, x, weight, *kept, 4, False, "avg_max", "gated", "first", True, False, config=config
        )
    names = [launch.kernel for launch in watch.launches] if interpreted else [launch.name for launch in watch]
    if lag >= 4:
        assert names == ["_spatial_gate_fwd_lagged_kernel", "_spatial_gate_bwd_lagged_kernel"]
    else:
        assert len(names) == 4
        assert not any("lagged" in name for name in names)


@pytest.mark.parametrize("arch", SPATIAL_GATE_TABLE)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("itemsize", DTYPES)
def test_every_call_has_a_row(arch, channels_last, itemsize):
    for side in SIDES:
        config = spatial_gate_config(arch, itemsize=itemsize, pixels=side**2, channels_last=channels_last)
        assert isinstance(config, SpatialGateConfig)


@pytest.mark.parametrize(("arch", "number"), ROWS)
def test_sizes_are_powers_of_two(arch, number):
    config = SPATIAL_GATE_TABLE[arch][number].config
    for value in (config.block_p, config.block_c, config.num_warps):
        assert value & (value - 1) == 0 < value
    assert config.num_warps <= 16
    assert config.num_stages >= 1
    assert config.lag >= 0


def test_keys_are_architectures():
    assert "default" in SPATIAL_GATE_TABLE
    assert set(SPATIAL_GATE_TABLE) <= {"default", *ARCHITECTURES}


def test_unknown_architecture_has_the_default():
    for channels_last in (False, True):
        for itemsize in DTYPES:
            call = {"itemsize": itemsize, "pixels": 56 * 56, "channels_last": channels_last}
            assert spatial_gate_config("sm_75", **call) is spatial_gate_config("default", **call)


def test_a_hole_in_an_architecture_is_filled_by_default(monkeypatch):
    row = dataclasses.replace(SPATIAL_GATE_TABLE["default"][0], config=SpatialGateConfig(64, 4, 2, 1))
    monkeypatch.setitem(SPATIAL_GATE_TABLE, "sm_90", (row,))
    options = {"itemsize": row.itemsize, "channels_last": row.channels_last}
    assert spatial_gate_config("sm_90", pixels=row.min_pixels, **options) == row.config
    for arch in ("sm_90", "sm_80"):
        config = spatial_gate_config(arch, pixels=row.min_pixels - 1, **options)
        assert config == spatial_gate_config("default", pixels=row.min_pixels - 1, **options)


def test_a_hole_in_the_default_is_told(monkeypatch):
    rows = tuple(row for row in SPATIAL_GATE_TABLE["default"] if not row.channels_last)
    monkeypatch.setitem(SPATIAL_GATE_TABLE, "default", rows)
    words = r"SPATIAL_GATE_TABLE\['sm_90'\] fits: itemsize=2 pixels=9 channels_last=True"
    with pytest.raises(LookupError, match=words):
        spatial_gate_config("sm_90", itemsize=2, pixels=9, channels_last=True)


def test_architecture_of_a_cpu():
    assert architecture(torch.device("cpu")) == "interpreter"
    assert architecture(torch.device("meta")) == "default"


@pytest.mark.gpu
def test_architecture_of_a_gpu():
    name = architecture(torch.device("cuda"))
    if torch.version.hip:
        assert name.startswith("gfx")
    else:
        major, minor = torch.cuda.get_device_capability()
        assert name == f"sm_{major}{minor}"


# Softmax attention

ATTENTION_ROWS = [(arch, number) for arch, rows in SOFTMAX_ATTENTION_TABLE.items() for number in range(len(rows))]
ATTENTION_CALLS = list(itertools.product(DTYPES, range(1, 257), range(5)))  # bytes an element, head dimension, extras
KERNELS = tuple(field.name for field in dataclasses.fields(SoftmaxAttentionConfig))


def distinct_blocks() -> list[SoftmaxAttentionConfig]:
    """Few configurations in which every block size of every kernel of the table occurs; warps are a GPU's."""
    rows = [row for rows in SOFTMAX_ATTENTION_TABLE.values() for row in rows]
    blocks = {
        name: sorted({(tile.block_m, tile.block_n) for row in rows for tile in [getattr(row.config, name)]})
        for name in KERNELS
    }
    return [
        SoftmaxAttentionConfig(**{name: Tile(*sizes[i % len(sizes)], 4, 1) for name, sizes in blocks.items()})
        for i in range(max(map(len, blocks.values())))
    ]


@pytest.mark.parametrize(("arch", "number"), ATTENTION_ROWS)
def test_some_call_selects_the_attention_row(arch, number):
    config = SOFTMAX_ATTENTION_TABLE[arch][number].config
    assert any(
        softmax_attention_config(arch, itemsize=itemsize, head_dim=dim, extras=extras) is config
        for itemsize, dim, extras in ATTENTION_CALLS
    ), "a row above it fits every call that it fits"


@pytest.mark.parametrize("arch", [*SOFTMAX_ATTENTION_TABLE, "sm_75"])
def test_every_attention_call_has_a_row(arch):
    for itemsize, dim, extras in ATTENTION_CALLS:
        config = softmax_attention_config(arch, itemsize=itemsize, head_dim=dim, extras=extras)
        assert isinstance(config, SoftmaxAttentionConfig)


def test_a_hole_in_the_attention_table_is_told(monkeypatch):
    monkeypatch.setitem(SOFTMAX_ATTENTION_TABLE, "default", ())
    words = r"SOFTMAX_ATTENTION_TABLE\['sm_75'\] fits: itemsize=2 head_dim=64 extras=1"
    with pytest.raises(LookupError, match=words):
        softmax_attention_config("sm_75", itemsize=2, head_dim=64, extras=1)


@pytest.mark.parametrize(("arch", "number"), ATTENTION_ROWS)
def test_attention_tiles_are_powers_of_two(arch, number):
    config = SOFTMAX_ATTENTION_TABLE[arch][number].config
    for name in KERNELS:
        tile = getattr(config, name)
        for value in (tile.block_m, tile.block_n, tile.num_warps):
            assert value & (value - 1) == 0 < value
        assert min(tile.block_m, tile.block_n) >= 16  # of matrix products, and of dropout's counts
        assert tile.num_warps <= 16
        assert tile.num_stages >= 1


def test_attention_keys_are_architectures():
    assert "default" in SOFTMAX_ATTENTION_TABLE
    assert set(SOFTMAX_ATTENTION_TABLE) <= {"default", *ARCHITECTURES}


@runs_kernels
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("config", distinct_blocks(), ids=lambda config: f"forward{config.forward.block_m}")
def test_attention_blocks_match_reference(config, is_causal, device):
    """Whole blocks and a rest of each kernel's, with a bias and its gradient."""
    n_queries, n_keys = (
        max(getattr(getattr(config, name), size) for name in KERNELS) + 3 for size in ("block_m", "block_n")
    )
    shapes = dict.fromkeys("qkv", (1, 1, n_keys, 16))
    shapes |= {"q": (1, 1, n_queries, 16), "bias": (1, 1, n_queries, n_keys)}
    inputs = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes.values()]
    dout = torch.randn(1, 1, n_queries, 16, dtype=torch.float64, device=device)
    call = (*inputs, None, None, None)
    options = (0, 0.3, is_causal, 0.0)
    out, _, *stats = attention.softmax_attention_forward(*call, *options, config=config)
    wanted = (True, True, True, False)
    gradients = attention.softmax_attention_backward(dout, None, *call, out, *stats, *options, *wanted, config=config)

    leaves = [tensor.requires_grad_() for tensor in inputs]
    expected, _ = softmax_attention_reference(*leaves, scale=0.3, is_causal=is_causal)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for name, got, correct in zip(shapes, gradients, torch.autograd.grad(expected, leaves, dout), strict=False):
        torch.testing.assert_close(got, correct, rtol=0, atol=1e-12, msg=lambda words, name=name: f"{name}: {words}")


# Linear attention

LINEAR_ROWS = [(arch, number) for arch, rows in LINEAR_ATTENTION_TABLE.items() for number in range(len(rows))]
LINEAR_CALLS = list(itertools.product(DTYPES, range(1, 257)))  # bytes an element, head dimension
LINEAR_KERNELS = tuple(field.name for field in dataclasses.fields(LinearAttentionConfig))


def distinct_linear_blocks() -> list[LinearAttentionConfig]:
    """Few configurations in which every block size of every kernel of the table occurs; warps are a GPU's."""
    rows = [row for rows in LINEAR_ATTENTION_TABLE.values() for row in rows]
    blocks = {
        name: sorted({(tile.block_n, tile.block_v) for row in rows for tile in [getattr(row.config, name)]})
        for name in LINEAR_KERNELS
    }
    return [
        LinearAttentionConfig(**{name: LinearTile(*sizes[i % len(sizes)], 4, 1) for name, sizes in blocks.items()})
        for i in range(max(map(len, blocks.values())))
    ]


@pytest.mark.parametrize(("arch", "number"), LINEAR_ROWS)
def test_some_call_selects_the_linear_row(arch, number):
    config = LINEAR_ATTENTION_TABLE[arch][number].config
    assert any(
        linear_attention_config(arch, itemsize=itemsize, head_dim=dim) is config for itemsize, dim in LINEAR_CALLS
    ), "a row above it fits every call that it fits"


@pytest.mark.parametrize("arch", [*LINEAR_ATTENTION_TABLE, "sm_75"])
def test_every_linear_call_has_a_row(arch):
    for itemsize, dim in LINEAR_CALLS:
        assert isinstance(linear_attention_config(arch, itemsize=itemsize, head_dim=dim), LinearAttentionConfig)


def test_a_hole_in_the_linear_table_is_told(monkeypatch):
    monkeypatch.setitem(LINEAR_ATTENTION_TABLE, "default", ())
    words = r"LINEAR_ATTENTION_TABLE\['sm_75'\] fits: itemsize=2 head_dim=64"
    with pytest.raises(LookupError, match=words):
        linear_attention_config("sm_75", itemsize=2, head_dim=64)


@pytest.mark.parametrize(("arch", "number"), LINEAR_ROWS)
def test_linear_tiles_are_powers_of_two(arch, number):
    for name in LINEAR_KERNELS:
        tile = getattr(LINEAR_ATTENTION_TABLE[arch][number].config, name)
        for value in (tile.block_n, tile.block_v, tile.num_warps):
            assert value & (value - 1) == 0 < value
        assert min(tile.block_n, tile.block_v) >= 16  # of matrix products
        assert tile.num_warps <= 16
        assert tile.num_stages >= 1


def test_linear_keys_are_architectures():
    assert "default" in LINEAR_ATTENTION_TABLE
    assert set(LINEAR_ATTENTION_TABLE) <= {"default", *ARCHITECTURES}


@runs_kernels
@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
@pytest.mark.parametrize("config", distinct_linear_blocks(), ids=lambda config: f"state{config.state.block_n}")
def test_linear_blocks_match_reference(config, feature_map, device):
    """Whole blocks of tokens and of values, and a rest of each kernel's."""
    n_tokens, v_dim = (
        max(getattr(getattr(config, name), size) for name in LINEAR_KERNELS) + 3 for size in ("block_n", "block_v")
    )
    shapes = dict.fromkeys("qk", (1, 1, n_tokens, 16)) | {"v": (1, 1, n_tokens, v_dim)}
    inputs = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes.values()]
    dout = torch.randn(1, 1, n_tokens, v_dim, dtype=torch.float64, device=device)
    options = (feature_map, 0.0 if feature_map == "softmax" else 1.0)
    out, *kept = linear.linear_attention_forward(*inputs, *options, config=config)
    gradients = linear.linear_attention_backward(dout, *inputs, *kept, *options, True, True, config=config)

    leaves = [tensor.requires_grad_() for tensor in inputs]
    expected = linear_attention_reference(*leaves, feature_map=options[0], eps=options[1])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for name, got, correct in zip(shapes, gradients, torch.autograd.grad(expected, leaves, dout), strict=True):
        torch.testing.assert_close(got, correct, rtol=0, atol=1e-12, msg=lambda words, name=name: f"{name}: {words}")


GROUP_ROWS = [(arch, number) for arch, rows in GROUP_ATTENTION_TABLE.items() for number in range(len(rows))]


@pytest.mark.parametrize(("arch", "number"), GROUP_ROWS)
def test_group_row_is_chosen(arch, number):
    """At its largest sizes with all its extras, and no row but the last of its architecture's takes them further."""
    row = GROUP_ATTENTION_TABLE[arch][number]
    sizes = {"itemsize": row.itemsize, "tokens": row.tokens, "head_dim": row.head_dim, "extras": row.extras}
    assert group_attention_config(arch, **sizes) is row.config
    for tile in (row.config.forward, row.config.backward):
        assert tile.num_warps & (tile.num_warps - 1) == 0 < tile.num_warps <= 16
        assert tile.num_stages >= 1
        assert tile.groups >= 1
    assert row.tokens & (row.tokens - 1) == 0
    assert row.head_dim & (row.head_dim - 1) == 0
    assert row.tokens <= 128


def test_group_keys_are_architectures():
    assert set(GROUP_ATTENTION_TABLE) <= {"default", "interpreter", *ARCHITECTURES}
    sizes = {"itemsize": 2, "tokens": 49, "head_dim": 32, "extras": 1}
    assert group_attention_config("sm_75", **sizes) is group_attention_config("default", **sizes)


def test_groups_that_no_row_fits():
    """An architecture's own rows say what its programs hold; the default rows do not fill in."""
    fits = {"itemsize": 2, "tokens": 128, "head_dim": 32, "extras": 1}
    assert group_attention_config("default", **fits) is not None
    assert group_attention_config("gfx942", **fits) is None
    for arch in GROUP_ATTENTION_TABLE:
        for name, size in (("tokens", 129), ("head_dim", 129), ("extras", 3)):
            assert group_attention_config(arch, **fits | {name: size}) is None


# The channel gate

CHANNEL_ROWS = [(arch, number) for arch, rows in CHANNEL_GATE_TABLE.items() for number in range(len(rows))]


def channel_itemsizes_of(arch: str, number: int) -> list[int]:
    """The item sizes of which some map has this row, which is then not behind another that fits as well."""
    row = CHANNEL_GATE_TABLE[arch][number]
    calls = itertools.product(DTYPES, SIDES)
    found = {
        itemsize
        for itemsize, side in calls
        if channel_gate_config(arch, itemsize=itemsize, pixels=side**2, channels_last=row.channels_last) is row.config
    }
    return sorted(found)


class ChannelsWithConfig(torch.autograd.Function):
    """Pooling and scaling with a configuration of one's choice, in autograd; the gate is a constant."""

    @staticmethod
    def forward(ctx, x, gate, ties, config):
        avg, peak, index = channel_kernels.channel_gate_pool(x, True, ties, True, config=config)
        out = channel_kernels.channel_gate_forward(x, gate, config=config)
        ctx.save_for_backward(x, gate, peak, index)
        ctx.options = ties, config
        return avg, peak, out

    @staticmethod
    def backward(ctx, davg, dmax, dout):
        x, gate, peak, index = ctx.saved_tensors
        ties, config = ctx.options
        sizes = (*x.shape[2:], x.stride(1) < x.stride(3), ties)
        dx = channel_kernels.channel_gate_dx(dout, gate, davg, dmax, x, peak, index, *sizes, config=config)
        return dx, channel_kernels.channel_gate_backward(dout, x, config=config).to(gate.dtype), None, None


@pytest.mark.parametrize(("arch", "number"), CHANNEL_ROWS)
def test_channel_row_is_selected(arch, number):
    config = CHANNEL_GATE_TABLE[arch][number].config
    assert isinstance(config, ChannelGateConfig)
    assert channel_itemsizes_of(arch, number), "a row above it fits every call that it fits"
    for value in (config.block_p, config.block_c, config.num_warps):
        assert value & (value - 1) == 0 < value
    assert config.num_warps <= 16
    assert config.num_stages >= 1


@runs_kernels
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize(("arch", "number"), CHANNEL_ROWS)
def test_channel_row_matches_reference(arch, number, ties, device):
    row = CHANNEL_GATE_TABLE[arch][number]
    config = row.config

    def function(x, gate, pool_and_scale):
        avg, peak, out = pool_and_scale(x, gate)
        return out + (avg * 2 + peak)[..., None, None]

    def reference(x, gate):
        return *channel_pool_reference(x, ties=ties), scale_reference(x, gate)

    # two whole steps of whole blocks of channels, then neither
    for n_channels, width in ((config.block_c, config.block_p * config.num_stages), (config.block_c + 1, 5)):
        for itemsize in channel_itemsizes_of(arch, number):
            x = torch.randn(2, n_channels, 2, width, device=device).to(DTYPES[itemsize])
            if row.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            assert_matches_reference(
                lambda x, gate: function(x, gate, lambda *given: ChannelsWithConfig.apply(*given, ties, config)),
                lambda x, gate: function(x, gate, reference),
                {"x": x, "gate": torch.randn(2, n_channels, device=device).to(x.dtype)},
            )


@pytest.mark.parametrize("arch", [*CHANNEL_GATE_TABLE, "sm_75"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("itemsize", DTYPES)
def test_every_channel_call_has_a_row(arch, channels_last, itemsize):
    for side in SIDES:
        config = channel_gate_config(arch, itemsize=itemsize, pixels=side**2, channels_last=channels_last)
        assert isinstance(config, ChannelGateConfig)
    assert set(CHANNEL_GATE_TABLE) <= {"default", *ARCHITECTURES}


def test_a_hole_in_the_channel_table_is_told(monkeypatch):
    rows = tuple(row for row in CHANNEL_GATE_TABLE["default"] if not row.channels_last)
    monkeypatch.setitem(CHANNEL_GATE_TABLE, "default", rows)
    with pytest.raises(LookupError, match=r"CHANNEL_GATE_TABLE\['sm_90'\] fits: itemsize=2 pixels=9"):
        channel_gate_config("sm_90", itemsize=2, pixels=9, channels_last=True)


# The coordinate gate

COORDINATE_ROWS = [(arch, number) for arch, rows in COORDINATE_GATE_TABLE.items() for number in range(len(rows))]


def coordinate_itemsizes_of(arch: str, number: int) -> list[int]:
    """The item sizes that have this row."""
    row = COORDINATE_GATE_TABLE[arch][number]
    return [
        itemsize
        for itemsize in DTYPES
        if coordinate_gate_config(arch, itemsize=itemsize, channels_last=row.channels_last) is row.config
    ]


class CoordinatesWithConfig(torch.autograd.Function):
    """Pooling and gate with a configuration of one's choice, in autograd; the gates are constants."""

    @staticmethod
    def forward(ctx, x, gate_h, gate_w, config):
        ctx.save_for_backward(x, gate_h, gate_w)
        ctx.config = config
        pooled = coordinate_kernels.coordinate_gate_pool(x, config=config)
        return *pooled, coordinate_kernels.coordinate_gate_forward(x, gate_h, gate_w, config=config)

    @staticmethod
    def backward(ctx, dheight, dwidth, dout):
        x, *gates = ctx.saved_tensors
        sizes = (*x.shape[2:], x.stride(1) < x.stride(3))
        dx = coordinate_kernels.coordinate_gate_dx(dout, *gates, dheight, dwidth, *sizes, config=ctx.config)
        return dx, *coordinate_kernels.coordinate_gate_backward(dout, x, *gates, config=ctx.config), None


@pytest.mark.parametrize(("arch", "number"), COORDINATE_ROWS)
def test_coordinate_row_is_selected(arch, number):
    config = COORDINATE_GATE_TABLE[arch][number].config
    assert isinstance(config, CoordinateGateConfig)
    assert coordinate_itemsizes_of(arch, number), "a row above it fits every call that it fits"
    for value in (config.tile, config.block_c, config.num_warps):
        assert value & (value - 1) == 0 < value
    assert config.block_c <= config.tile
    assert config.num_warps <= 16
    assert config.slab >= 1


@runs_kernels
@pytest.mark.parametrize(("arch", "number"), COORDINATE_ROWS)
def test_coordinate_row_matches_reference(arch, number, device):
    row = COORDINATE_GATE_TABLE[arch][number]
    config = row.config

    def function(x, gate_h, gate_w, pool_and_gate):
        height, width, out = pool_and_gate(x, gate_h, gate_w)
        return out + height * 2 + width

    def reference(x, *gates):
        return *coordinate_pool_reference(x), coordinate_gate_reference(x, *gates)

    # whole blocks, then rests of channels, of rows and slabs, of columns
    for shape in ((1, config.block_c, 8, 8), (1, config.block_c + 1, config.slab + 1, 5)):
        for itemsize in coordinate_itemsizes_of(arch, number):
            x = torch.randn(shape, device=device).to(DTYPES[itemsize])
            memory_format = torch.channels_last if row.channels_last else torch.contiguous_format
            inputs = {"x": x, "gate_h": torch.randn_like(x[..., :1]), "gate_w": torch.randn_like(x[..., :1, :])}
            assert_matches_reference(
                lambda *_, **given: function(
                    **given, pool_and_gate=lambda *args: CoordinatesWithConfig.apply(*args, config)
                ),
                lambda *_, **given: function(**given, pool_and_gate=reference),
                {name: tensor.contiguous(memory_format=memory_format) for name, tensor in inputs.items()},
            )


@pytest.mark.parametrize("arch", [*COORDINATE_GATE_TABLE, "sm_75"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("itemsize", DTYPES)
def test_every_coordinate_call_has_a_row(arch, channels_last, itemsize):
    config = coordinate_gate_config(arch, itemsize=itemsize, channels_last=channels_last)
    assert isinstance(config, CoordinateGateConfig)
    assert set(COORDINATE_GATE_TABLE) <= {"default", *ARCHITECTURES}


def test_a_hole_in_the_coordinate_table_is_told(monkeypatch):
    monkeypatch.setitem(COORDINATE_GATE_TABLE, "default", ())
    with pytest.raises(LookupError, match=r"COORDINATE_GATE_TABLE\['sm_90'\] fits: itemsize=2 channels_last=True"):
        coordinate_gate_config("sm_90", itemsize=2, channels_last=True)


# CBAM

CBAM_ROWS = [(arch, number) for arch, rows in CBAM_TABLE.items() for number in range(len(rows))]


def cbam_itemsizes_of(arch: str, number: int) -> list[int]:
    """The item sizes of which some map has this row, which is then not behind another that fits as well."""
    row = CBAM_TABLE[arch][number]
    calls = itertools.product(DTYPES, SIDES)
    found = {
        itemsize
        for itemsize, side in calls
        if cbam_config(arch, itemsize=itemsize, pixels=side**2, channels_last=row.channels_last) is row.config
    }
    return sorted(found)


@pytest.mark.parametrize(("arch", "number"), CBAM_ROWS)
def test_cbam_row_is_selected(arch, number):
    config = CBAM_TABLE[arch][number].config
    assert isinstance(config, SpatialGateConfig)
    assert config.lag == 0, "CBAM has no launch that does two passes"
    assert cbam_itemsizes_of(arch, number), "a row above it fits every call that it fits"
    for value in (config.block_p, config.block_c, config.num_warps):
        assert value & (value - 1) == 0 < value


@runs_kernels
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize(("arch", "number"), CBAM_ROWS)
def test_cbam_row_matches_reference(arch, number, ties, device, monkeypatch):
    row = CBAM_TABLE[arch][number]
    monkeypatch.setattr(cbam_kernels.common, "cbam_config", lambda *args, **kwargs: row.config)
    # whole blocks of channels and pixels, then neither
    shapes = ((row.config.block_c, 4, row.config.block_p // 4), (row.config.block_c + 1, 3, 5))
    for shape, itemsize in itertools.product(shapes, cbam_itemsizes_of(arch, number)):
        x = torch.randn(1, *shape, device=device).to(DTYPES[itemsize])
        if row.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)

        def call(function, x, scale, weight, **options):
            return function(x, lambda pooled: pooled * scale, weight, ties=ties, **options)

        assert_matches_reference(
            functools.partial(call, attnk.cbam, backend="triton"),
            functools.partial(call, cbam_reference),
            {"x": x, "scale": torch.randn(shape[0]).to(x), "weight": torch.randn(1, 2, 3, 3).to(x)},
        )


def test_no_row_of_cbam_is_told(monkeypatch):
    monkeypatch.setitem(CBAM_TABLE, "default", ())
    with pytest.raises(LookupError, match=r"no row of CBAM_TABLE\['sm_90'\] fits: itemsize=2"):
        cbam_config("sm_90", itemsize=2, pixels=9, channels_last=False)
