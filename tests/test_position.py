"""Positions against the formulas of DETR, timm and Swin, re-written here."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from attnk.modules.feature_map import FeatureMapAttention
from attnk.modules.position import LearnedPosition2d, RelativePositionBias, SinusoidalPosition2d, resize_bias_table
from attnk.modules.self_attention import SelfAttention
from attnk.ops.softmax_attention import softmax_attention
from attnk.reference.softmax_attention import relative_position_index

GRIDS = [(1, 1), (1, 5), (4, 4), (3, 6), (7, 2)]
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
grids = pytest.mark.parametrize("grid", GRIDS, ids=str)


def detr(height, width, dim, temperature=10000, normalize=False, scale=None):
    """DETR's PositionEmbeddingSine on a map without padding, in float64."""
    not_mask = torch.ones(1, height, width, dtype=torch.bool)
    y_embed = not_mask.cumsum(1, dtype=torch.float64)
    x_embed = not_mask.cumsum(2, dtype=torch.float64)
    if normalize:
        scale = 2 * math.pi if scale is None else scale
        y_embed = y_embed / (y_embed[:, -1:, :] + 1e-6) * scale
        x_embed = x_embed / (x_embed[:, :, -1:] + 1e-6) * scale
    dim_t = torch.arange(dim // 2, dtype=torch.float64)
    dim_t = temperature ** (2 * torch.div(dim_t, 2, rounding_mode="floor") / (dim // 2))
    pos_x, pos_y = x_embed[:, :, :, None] / dim_t, y_embed[:, :, :, None] / dim_t
    pos_x = torch.stack((pos_x[:, :, :, 0::2].sin(), pos_x[:, :, :, 1::2].cos()), dim=4).flatten(3)
    pos_y = torch.stack((pos_y[:, :, :, 0::2].sin(), pos_y[:, :, :, 1::2].cos()), dim=4).flatten(3)
    return torch.cat((pos_y, pos_x), dim=3).permute(0, 3, 1, 2)


def interpolated(table, old, new):
    """Rows of a table on one grid, for another."""
    maps = table.T.unflatten(1, old).unsqueeze(0)
    return F.interpolate(maps, size=new, mode="bicubic", align_corners=False)[0].flatten(1).T


def sides(height, width):
    return 2 * height - 1, 2 * width - 1


def assert_same_gradients(got, expected, parameter):
    torch.testing.assert_close(got, expected, **CLOSE)
    dout = torch.randn(got.shape, dtype=got.dtype)
    grads = [torch.autograd.grad(out, parameter, dout)[0] for out in (got, expected)]
    torch.testing.assert_close(*grads, **CLOSE)
    assert grads[0].abs().max() > 0


# Sinusoidal.


@grids
@pytest.mark.parametrize(
    ("dim", "options"),
    [
        (4, {}),
        (16, {}),
        (20, {"temperature": 20}),
        (16, {"normalize": True}),
        (8, {"normalize": True, "scale": 1.5, "temperature": 100.0}),
    ],
    ids=str,
)
def test_sinusoidal_is_that_of_detr(grid, dim, options):
    expected = detr(*grid, dim, **options)
    module = SinusoidalPosition2d(dim, **options)
    tokens = expected.flatten(2)[0].T
    torch.testing.assert_close(module(*grid), tokens.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.double()(*grid), tokens, **CLOSE)
    torch.testing.assert_close(module.as_map(*grid), expected, **CLOSE)


def test_sinusoidal_forgets_a_dtype():
    module = SinusoidalPosition2d(16).half()
    assert torch.equal(module(40, 300), SinusoidalPosition2d(16)(40, 300).half())
    torch.testing.assert_close(module.double()(40, 300), detr(40, 300, 16).flatten(2)[0].T, **CLOSE)


def test_sinusoidal_keeps_the_last_grid(monkeypatch):
    module = SinusoidalPosition2d(8)
    calls, encode = [], module._encode
    monkeypatch.setattr(module, "_encode", lambda *given: calls.append(given[:2]) or encode(*given))
    first = module(3, 4)
    assert module(3, 4) is first
    assert calls == [(3, 4)]
    assert module(4, 3).shape == (12, 8)
    assert not torch.equal(module(4, 3), first)
    assert torch.equal(module(3, 4), first)
    assert module.double()(3, 4).dtype == torch.float64
    assert module.to("meta")(3, 4).device.type == "meta"
    assert calls == [(3, 4), (4, 3), (3, 4), (3, 4), (3, 4)]


def test_sinusoidal_of_inference_serves_training():
    module = SinusoidalPosition2d(8)
    with torch.inference_mode():
        module(3, 4)
    x = torch.randn(12, 8, requires_grad=True)
    (x * module(3, 4)).sum().backward()
    assert torch.equal(x.grad, module(3, 4))


def test_sinusoidal_keeps_nothing_that_is_traced():
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = SinusoidalPosition2d(8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert module(3, 4).shape == (12, 8)
    assert type(module(3, 4)) is torch.Tensor
    torch.testing.assert_close(module(3, 4), detr(3, 4, 8).flatten(2)[0].T.float())


def test_sinusoidal_saves_nothing():
    module = SinusoidalPosition2d(8)
    module(3, 4)
    assert module.state_dict() == {}
    assert not list(module.parameters())
    assert len(pickle.dumps(module)) == len(pickle.dumps(SinusoidalPosition2d(8)))
    module.load_state_dict({}, strict=True)


# Learned.


@grids
@pytest.mark.parametrize("table", [(4, 4), (1, 3), (5, 2)], ids=str)
def test_learned_is_resized_bicubically(table, grid):
    module = LearnedPosition2d(*table, 6).double()
    assert module.pos_embed.shape == (1, table[0] * table[1], 6)
    expected = interpolated(module.pos_embed[0], table, grid)
    assert_same_gradients(module(*grid), expected, module.pos_embed)
    torch.testing.assert_close(module.as_map(*grid)[0].flatten(1).T, expected, **CLOSE)


def test_learned_as_it_is():
    module = LearnedPosition2d(3, 5, 6)
    for tokens in (module(), module(3, 5), module(height=3), module(width=5)):
        assert tokens.data_ptr() == module.pos_embed.data_ptr()
        assert torch.equal(tokens, module.pos_embed[0])
    assert module(width=4).shape == (12, 6)
    assert torch.equal(module.as_map(3, 5)[0, :, 1, 2], module.pos_embed[0, 7])


# Relative.


@grids
@pytest.mark.parametrize("table", [(4, 4), (1, 3), (5, 2)], ids=str)
def test_relative_is_resized_as_timm_does(table, grid):
    module = RelativePositionBias(*table, 3).double()
    parameter = module.relative_position_bias_table
    assert parameter.shape == (math.prod(sides(*table)), 3)
    expected = interpolated(parameter, sides(*table), sides(*grid))
    assert_same_gradients(module(*grid), expected, parameter)
    assert_same_gradients(resize_bias_table(parameter, table, grid), expected, parameter)


@grids
def test_dense_is_what_swin_gathers(grid):
    module = RelativePositionBias(*grid, 3).double()
    table, tokens = module.relative_position_bias_table, grid[0] * grid[1]
    coords = torch.stack(torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")).flatten(1)
    relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0)
    relative[:, :, 0] += grid[0] - 1
    relative[:, :, 1] += grid[1] - 1
    relative[:, :, 0] *= 2 * grid[1] - 1
    index = relative.sum(-1)
    assert torch.equal(index.flatten(), relative_position_index(*grid))
    expected = table[index.view(-1)].view(tokens, tokens, 3).permute(2, 0, 1)
    assert module.dense().is_contiguous()
    assert_same_gradients(module.dense(), expected, table)


def test_dense_of_another_grid():
    module, new = RelativePositionBias(3, 4, 2).double(), (5, 2)
    resized = interpolated(module.relative_position_bias_table, sides(3, 4), sides(*new))
    expected = resized[relative_position_index(*new)].view(10, 10, 2).permute(2, 0, 1)
    assert_same_gradients(module.dense(*new), expected, module.relative_position_bias_table)


@pytest.mark.parametrize("grid", [(3, 4), (4, 5)], ids=str)
def test_relative_in_attention(grid, backend, device):
    module = RelativePositionBias(3, 4, 2).double().to(device)
    q, k, v = torch.randn(3, 2, 2, grid[0] * grid[1], 4, dtype=torch.float64, device=device)
    outs = [
        softmax_attention(q, k, v, bias_table=module(*grid), grid=grid, backend=backend),
        softmax_attention(q, k, v, module.dense(*grid), backend="reference"),
    ]
    torch.testing.assert_close(*outs, **CLOSE)
    grads = [torch.autograd.grad((out**2).sum(), module.relative_position_bias_table)[0] for out in outs]
    torch.testing.assert_close(*grads, **CLOSE)


def test_relative_as_it_is():
    module = RelativePositionBias(3, 4, 2)
    table = module.relative_position_bias_table
    for same in (module(), module(3, 4), resize_bias_table(table, (3, 4), (3, 4))):
        assert same.data_ptr() == table.data_ptr()
        assert torch.equal(same, table)
    assert module(width=2).shape == (5 * 3, 2)


# All of them.

MODULES = {
    "learned": lambda: LearnedPosition2d(3, 4, 8),
    "sinusoidal": lambda: SinusoidalPosition2d(8, normalize=True),
    "relative": lambda: RelativePositionBias(3, 4, 2),
}
modules = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


@pytest.mark.parametrize("make", [MODULES["learned"], MODULES["sinusoidal"]], ids=["learned", "sinusoidal"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_adds_to_a_map(make, memory_format):
    module = make()
    x = torch.randn(2, 8, 3, 5).to(memory_format=memory_format)
    out = x + module.as_map(3, 5)
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(out.flatten(2).transpose(1, 2), x.flatten(2).transpose(1, 2) + module(3, 5))


def copies(module, make):
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)
    other = make()
    other.load_state_dict(module.state_dict(), strict=True)
    yield other


@modules
def test_copies(make):
    module = make()
    expected = module(5, 3)
    for other in copies(module, make):
        assert repr(other) == repr(module)
        assert torch.equal(other(5, 3), expected)
        assert other(5, 3).data_ptr() != expected.data_ptr()


@modules
@pytest.mark.parametrize("grid", [(3, 4), (5, 6)], ids=str)
def test_autocast_leaves_it_alone(make, grid):
    module = make()
    expected = module(*grid)
    other = copy.deepcopy(module)
    with torch.autocast("cpu", torch.bfloat16):
        got = other(*grid)
        assert torch.is_autocast_enabled("cpu")
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@modules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once(make, dtype):
    module = make()
    expected = module.to(dtype).float()(5, 6)
    assert torch.equal(module.to(dtype)(5, 6), expected.to(dtype))


@modules
def test_compiles(make):
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for grid in ((3, 4), (5, 6)):
        out, expected = compiled(*grid), module(*grid)
        torch.testing.assert_close(out, expected)
        for parameter in module.parameters():
            grads = [torch.autograd.grad(tensor.square().sum(), parameter)[0] for tensor in (out, expected)]
            torch.testing.assert_close(*grads)


def test_dense_compiles():
    module = RelativePositionBias(3, 4, 2)
    compiled = torch.compile(module.dense, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(2, 5), module.dense(2, 5))


@pytest.mark.parametrize("make", [MODULES["learned"], MODULES["relative"]], ids=["learned", "relative"])
def test_starts_small(make):
    torch.manual_seed(0)
    large = LearnedPosition2d(40, 40, 8) if isinstance(make(), LearnedPosition2d) else RelativePositionBias(40, 40, 4)
    (parameter,) = large.parameters()
    assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert parameter.abs().max() < 2


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LearnedPosition2d(0, 4, 8), "height must be a positive integer, got 0"),
        (lambda: LearnedPosition2d(4, 2.5, 8), "width must be a positive integer, got 2.5"),
        (lambda: LearnedPosition2d(4, 4, -8), "dim must be a positive integer, got -8"),
        (lambda: RelativePositionBias(4, "4", 2), "width must be a positive integer, got '4'"),
        (lambda: RelativePositionBias(4, 4, 0), "num_heads must be a positive integer, got 0"),
        (lambda: SinusoidalPosition2d(6), "dim must be a multiple of 4, got 6"),
        (lambda: SinusoidalPosition2d(0), "dim must be a positive integer, got 0"),
        (lambda: SinusoidalPosition2d(8, 0), "temperature must be positive, got 0"),
        (lambda: SinusoidalPosition2d(8, scale=1.0), r"scale must be None without normalize=True, got 1\.0"),
        (lambda: LearnedPosition2d(4, 4, 8)(0, 3), "height must be positive, got 0"),
        (lambda: RelativePositionBias(4, 4, 2)(3, -1), "width must be positive, got -1"),
        (lambda: RelativePositionBias(4, 4, 2).dense(3, 0), "width must be positive, got 0"),
        (lambda: SinusoidalPosition2d(8)(3, 0), "width must be positive, got 0"),
        (lambda: resize_bias_table(torch.zeros(9, 2), (3, 3), (2, 2)), r"table must be \(25, heads\) .*, got \(9, 2\)"),
        (lambda: resize_bias_table(torch.zeros(9), (2, 2), (3, 3)), r"table must be \(9, heads\) .*, got \(9,\)"),
        (lambda: resize_bias_table(torch.zeros(9, 2), (2, 2), (0, 3)), r"new_grid must be positive, got \(0, 3\)"),
    ],
)
def test_refuses(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_shows_sizes():
    assert repr(LearnedPosition2d(3, 4, 8)) == "LearnedPosition2d(3, 4, dim=8)"
    assert repr(RelativePositionBias(3, 4, 2)) == "RelativePositionBias(3, 4, num_heads=2)"
    assert repr(SinusoidalPosition2d(8)) == "SinusoidalPosition2d(8, temperature=10000, normalize=False)"
    text = repr(SinusoidalPosition2d(8, 20, normalize=True, scale=1.0))
    assert text == "SinusoidalPosition2d(8, temperature=20, normalize=True, scale=1)"


def test_sinusoidal_like_another_tensor():
    position = SinusoidalPosition2d(8)
    like = torch.empty(0, dtype=torch.float64)
    assert torch.equal(position(3, 4, like=like), position.double()(3, 4))
    with torch.device("meta"):
        position = SinusoidalPosition2d(8)
    layer = FeatureMapAttention(SelfAttention(8, 2), position=position)
    assert layer(torch.randn(1, 8, 3, 4)).isfinite().all()


def test_sinusoidal_of_another_amplitude():
    torch.testing.assert_close(SinusoidalPosition2d(8, amplitude=0.25)(3, 4), SinusoidalPosition2d(8)(3, 4) / 4)
    assert repr(SinusoidalPosition2d(8, amplitude=0.25)).endswith("amplitude=0.25)")
    assert "amplitude" not in repr(SinusoidalPosition2d(8))
    with pytest.raises(ValueError, match="amplitude must be a positive number, got 0"):
        SinusoidalPosition2d(8, amplitude=0)
