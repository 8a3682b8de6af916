"""``attnk.channel_gate``, ``channel_pool`` and ``scale``: values, gradients, layouts, edges, errors, inside PyTorch."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import mmap
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from helpers import assert_same_bits, needs_interpreter, one_by_one, pairwise
from torch import nn
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import attnk
from attnk import dispatch
from attnk.reference.channel_gate import channel_gate_reference, channel_pool_reference, scale_reference
from attnk.testing import Meter, assert_matches_reference, layouts

POOLS = ("avg", "max", "avg_max", "half_sum")
TIES = ("first", "even")
DTYPES = (torch.float64, torch.float32, torch.float16)
LAYOUTS = [name for name, _ in layouts(torch.zeros(1, 1, 1, 1))]
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NAMES = ("x", "w1", "b1", "w2", "b2")
CASES = [("avg", "first"), ("avg_max", "first"), ("avg_max", "even")]


def draw(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    hidden: int = 3,
    bias: bool = True,
    ties: bool = False,
    layout: str = "contiguous",
) -> dict[str, torch.Tensor | None]:
    """Random arguments of the gate; with ``ties`` most channels have several equal maxima."""
    x = torch.randn(shape, dtype=torch.float64)
    x = (x.round() if ties else x).to(device, dtype)
    if layout != "contiguous":
        x = dict(layouts(x))[layout]
    channels = shape[0 if len(shape) == 3 else 1]

    def parameter(*sizes: int) -> torch.Tensor:
        return (torch.randn(sizes, dtype=torch.float64) / sizes[-1] ** 0.5).to(device, dtype)

    return {
        "x": x,
        "w1": parameter(hidden, channels),
        "b1": parameter(hidden) if bias else None,
        "w2": parameter(channels, hidden),
        "b2": parameter(channels) if bias else None,
    }


def gate_of(x: torch.Tensor, *weights: torch.Tensor | None, **options: Any) -> torch.Tensor:
    return attnk.channel_gate(x, weights, **options)


def fused(backend: str, **options: Any) -> Callable[..., torch.Tensor]:
    return lambda x, w1, b1, w2, b2: gate_of(x, w1, b1, w2, b2, backend=backend, **options)


def definition(**options: Any) -> Callable[..., torch.Tensor]:
    return lambda x, w1, b1, w2, b2: channel_gate_reference(x, (w1, b1, w2, b2), **options)


def check(backend: str, inputs: dict[str, torch.Tensor | None], *, grads: Any = None, dout: Any = None, **options: Any):
    """Values and gradients against the definition."""
    assert_matches_reference(fused(backend, **options), definition(**options), inputs, grads=grads, dout=dout)


def run(backend: str, inputs: dict[str, torch.Tensor | None], **options: Any) -> list[torch.Tensor]:
    """The output and all gradients, for comparing bits."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs.values()]
    out = gate_of(*leaves, backend=backend, **options)
    dout = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], dout)]


@pytest.fixture
def kernels():
    return pytest.importorskip("attnk.kernels.channel_gate")


@contextlib.contextmanager
def configured(kernels: Any, programs: int = 8, **config: int):
    """Every launch inside uses these block sizes, and has slabs until there are so many programs."""
    config = {"block_p": 8, "block_c": 4, "num_warps": 4, "num_stages": 1} | config
    chosen = kernels.common.ChannelGateConfig(**config)
    with (
        mock.patch.object(kernels.common, "channel_gate_config", return_value=chosen),
        mock.patch.object(kernels.common, "CHANNEL_GATE_PROGRAMS", programs),
        mock.patch.object(kernels.common, "CHANNEL_GATE_SLAB_PIXELS", 1),
    ):
        yield


@pytest.mark.parametrize(
    "case",
    pairwise(
        pool=POOLS,
        gate=("sigmoid", "hard_sigmoid", torch.tanh),
        dtype=DTYPES,
        ties=TIES,
        bias=(True, False),
        hidden=(1, 3),
        rounded=(True, False),
        layout=("contiguous", "channels_last"),
    ),
)
def test_matches_reference(backend, device, case):
    inputs = draw(
        (2, 7, 5, 6), case["dtype"], device,
        hidden=case["hidden"], bias=case["bias"], ties=case["rounded"], layout=case["layout"],
    )  # fmt: skip
    check(backend, inputs, pool=case["pool"], gate=case["gate"], ties=case["ties"])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ties", TIES)
def test_equal_maxima(backend, device, ties, layout):
    inputs = draw((1, 5, 4, 5), torch.float64, device, ties=True, layout=layout)
    inputs["x"][:, 0] = 1.0  # all pixels tie
    inputs["x"][:, 1].clamp_(max=0.0)  # the maximum is what masked lanes may read
    check(backend, inputs, pool="avg_max", ties=ties)


def test_first_of_equal_maxima_has_the_gradient(backend, device):
    x = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0, 0.0], device=device).view(1, 1, 2, 3)
    for ties, expected in (("first", [0, 1, 0, 0, 0, 0]), ("even", [0, 1 / 3, 1 / 3, 0, 1 / 3, 0])):
        leaf = x.clone().requires_grad_()
        attnk.channel_pool(leaf, "max", ties=ties, backend=backend).max.backward(torch.ones(1, 1, device=device))
        assert torch.equal(leaf.grad.flatten(), torch.tensor(expected, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pool", POOLS)
def test_half_precision_in_pytorch(device, pool, dtype):
    check("torch", draw((2, 40, 5, 6), dtype, device), pool=pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "channel_slice"])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("elements", [30, 100, 500])  # some channels or rows of an image, and two images, at a time
def test_pytorch_path_in_tiles(device, ties, layout, dtype, elements, monkeypatch):
    monkeypatch.setattr("attnk.fallback.channel_gate.SMALL_ELEMENTS", 0)
    monkeypatch.setattr("attnk.fallback.channel_gate.TILE_ELEMENTS", elements)
    check("torch", draw((3, 5, 7, 6), dtype, device, ties=True, layout=layout), pool="avg_max", ties=ties)


@pytest.mark.parametrize(
    "case",
    pairwise(
        shape=(
            (2, 1, 4, 5), (1, 1, 1, 1), (2, 6, 1, 1), (2, 3, 1, 7), (2, 3, 7, 1), (1, 13, 2, 3), (5, 2, 3, 3),
            (1, 70, 3, 2), (1, 2, 11, 13),
        ),
        pool=("avg", "avg_max"),
        ties=TIES,
        layout=("contiguous", "channels_last"),
    ),
)  # fmt: skip
def test_odd_shapes(backend, device, case):
    inputs = draw(case["shape"], torch.float64, device, layout=case["layout"])
    check(backend, inputs, pool=case["pool"], ties=case["ties"])


@pytest.mark.parametrize(
    "case",
    pairwise(
        channels=(3, 4, 5, 8, 9),  # block_c = 4
        plane=((7, 1), (2, 4), (3, 3), (1, 17), (6, 11)),  # block_p = 8
        num_stages=(1, 2, 3, 4),
        programs=(1, 100),
        rounded=(True, False),
        pool=("avg", "avg_max"),
        ties=TIES,
        layout=("contiguous", "channels_last"),
    ),
)
def test_sizes_around_the_blocks(kernels, device, case):
    shape = (2, case["channels"], *case["plane"])
    inputs = draw(shape, torch.float64, device, layout=case["layout"], ties=case["rounded"])
    with configured(kernels, case["programs"], num_stages=case["num_stages"]):
        check("triton", inputs, pool=case["pool"], ties=case["ties"])


@pytest.mark.parametrize(("pool", "ties"), CASES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_without_a_batch(backend, device, layout, pool, ties):
    inputs = draw((1, 5, 4, 6), device=device, layout=layout)
    inputs["x"] = inputs["x"].squeeze(0)
    assert_matches_reference(
        fused(backend, pool=pool, ties=ties),
        lambda x, **rest: definition(pool=pool, ties=ties)(x[None], **rest)[0],
        inputs,
    )
    pooled = attnk.channel_pool(inputs["x"], backend=backend)
    assert pooled.avg.shape == pooled.max.shape == (1, 5)
    for gate in (pooled.avg, pooled.avg[0], pooled.avg[0, :, None, None], pooled.avg[..., None, None]):
        torch.testing.assert_close(
            attnk.scale(pooled, gate, backend=backend), inputs["x"] * pooled.avg[0, :, None, None]
        )


@pytest.mark.parametrize(("pool", "ties"), CASES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "crop"])
def test_volumes(backend, device, layout, pool, ties):
    inputs = draw((2, 4, 3, 4, 5), device=device)
    memory_format = torch.channels_last_3d if layout == "channels_last" else torch.contiguous_format
    x = inputs["x"].contiguous(memory_format=memory_format)
    inputs["x"] = F.pad(x, (0, 0, 1, 2))[..., 1:-2, :] if layout == "crop" else x
    check(backend, inputs, pool=pool, ties=ties)
    leaf = inputs["x"].requires_grad_()
    out = gate_of(*inputs.values(), pool=pool, backend=backend)
    assert out.is_contiguous(memory_format=memory_format)
    (dx,) = torch.autograd.grad(out, leaf, torch.randn_like(out))
    assert layout == "crop" or dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(("pool", "ties"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x(backend, device, layout, pool, ties):
    check(backend, draw((3, 5, 4, 6), device=device, layout=layout), pool=pool, ties=ties)


@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_gradient(backend, device, layout, x_layout):
    inputs = draw((3, 5, 4, 6), device=device, layout=x_layout)
    dout = dict(layouts(torch.randn(3, 5, 4, 6, device=device)))[layout]
    check(backend, inputs, pool="avg_max", dout=dout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kept", [(1, 1, 1, 1), (3, 1, 4, 6), (3, 5, 1, 1), (1, 5, 4, 6)])
def test_expanded_gradients(backend, device, kept, layout):
    # the gradients of sum(), mean(1), mean((2, 3)) and sum(0)
    inputs = draw((3, 5, 4, 6), device=device, layout=layout)
    check(backend, inputs, pool="avg_max", dout=torch.randn(kept, device=device).expand(3, 5, 4, 6))


def test_gradients_from_cat_and_split(backend, device):
    def around(gate: Any, x: torch.Tensor, **rest: Any) -> torch.Tensor:
        one, other = gate(x, **rest).split(3, 1)
        return torch.cat([other.mul(2), x, one.transpose(2, 3).flip(2).transpose(2, 3)], 1)

    assert_matches_reference(
        functools.partial(around, fused(backend, pool="avg_max")),
        functools.partial(around, definition(pool="avg_max")),
        draw((2, 6, 3, 4), torch.float64, device),
    )


@pytest.mark.parametrize("trailing", [1, 2])
def test_weights_of_convolutions(backend, device, trailing):
    inputs = draw((2, 6, 3, 4), torch.float64, device)
    for name in ("w1", "w2"):
        inputs[name] = inputs[name].reshape(*inputs[name].shape, *(1,) * trailing)
    check(backend, inputs, pool="avg_max")


def test_any_network(backend, device):
    """Networks that are no two layers: one layer (ESE), a convolution over channels (ECA), norm in between, dropout."""
    networks = {
        "ese": nn.Linear(6, 6),
        "eca": lambda pooled: F.conv1d(pooled[:, None], torch.ones(1, 1, 3).to(pooled), padding=1)[:, 0],
        "norm": nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.Dropout(0.0), nn.Linear(4, 6)),
        "convolutions": lambda pooled: pooled[..., None, None] * 2,
    }
    for name, network in networks.items():
        module = network.to(device) if isinstance(network, nn.Module) else None
        parameters = dict(module.named_parameters()) if module is not None else {}
        inputs = {"x": draw((4, 6, 3, 4), device=device)["x"], **{k: p.detach() for k, p in parameters.items()}}

        def call(gate: Any, x: torch.Tensor, *, network: Any = network, module: Any = module, **rest: Any) -> Any:
            if module is None:
                return gate(x, network)
            functional = functools.partial(torch.func.functional_call, module, rest)
            fresh = {
                key: value.to(x.dtype).clone() for key, value in module.named_buffers() if value.is_floating_point()
            }
            return gate(x, lambda pooled: functional((pooled,)) if not fresh else torch.func.functional_call(
                module, {**rest, **fresh}, (pooled,)
            ))  # fmt: skip

        if name == "convolutions":
            reference = lambda x, mlp: channel_gate_reference(x, lambda v: mlp(v)[..., 0, 0], pool="avg_max")  # noqa: E731
        else:
            reference = functools.partial(channel_gate_reference, pool="avg_max")
        assert_matches_reference(
            functools.partial(call, functools.partial(attnk.channel_gate, pool="avg_max", backend=backend)),
            functools.partial(call, reference),
            inputs,
        )


def test_formulas_people_use(backend, device):
    """Squeeze and excitation, the channel half of CBAM, and timm's light one, written as their sources have them."""
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64, device=device)
    w1, w2 = (torch.randn(shape, dtype=torch.float64, device=device) for shape in ((2, 8), (8, 2)))

    def mlp(pooled: torch.Tensor) -> torch.Tensor:
        return F.relu(pooled @ w1.T) @ w2.T

    avg, peak = F.adaptive_avg_pool2d(x, 1).flatten(1), F.adaptive_max_pool2d(x, 1).flatten(1)
    for pool, logit in {
        "avg": mlp(avg), "avg_max": mlp(avg) + mlp(peak), "half_sum": mlp(0.5 * avg + 0.5 * peak)
    }.items():  # fmt: skip
        gate = attnk.channel_gate(x, (w1, None, w2, None), pool=pool, backend=backend)
        torch.testing.assert_close(gate, x * torch.sigmoid(logit)[..., None, None])
        hard = attnk.channel_gate(x, mlp, pool=pool, gate="hard_sigmoid", backend=backend)
        torch.testing.assert_close(hard, x * (F.relu6(logit + 3) / 6)[..., None, None])


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
def test_output_keeps_the_memory_format(backend, device, memory_format):
    inputs = draw((2, 5, 4, 6), device=device)
    inputs["x"] = inputs["x"].contiguous(memory_format=memory_format)
    for grad in (False, True):
        inputs["x"].requires_grad_(grad)
        assert gate_of(*inputs.values(), backend=backend).is_contiguous(memory_format=memory_format)


# The pair around a network.


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("pool", ["avg", "max", "avg_max"])
def test_pool(backend, device, pool, ties, layout):
    x = draw((2, 5, 4, 6), device=device, ties=True, layout=layout)["x"]

    def stacked(function: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([one for one in function(x) if one is not None])

    def pooled(x: torch.Tensor) -> tuple:
        result = attnk.channel_pool(x, pool, ties=ties, backend=backend)
        assert result.x is x
        assert (result.avg is None, result.max is None) == (pool == "max", pool == "avg")
        return result.avg, result.max

    def reference(x: torch.Tensor) -> tuple:
        avg, peak = channel_pool_reference(x, ties=ties)
        return None if pool == "max" else avg, None if pool == "avg" else peak

    # without a scaling after it, its gradient is that of a mean and a maximum
    assert_matches_reference(functools.partial(stacked, pooled), functools.partial(stacked, reference), {"x": x})
    assert_matches_reference(
        functools.partial(stacked, pooled), functools.partial(stacked, reference), {"x": x}, grads=()
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale(backend, device, layout):
    x = draw((3, 5, 4, 6), device=device, layout=layout)["x"]
    gate = torch.randn(3, 5, device=device)
    for grads in (("x", "gate"), ("x",), ("gate",), ()):
        assert_matches_reference(
            functools.partial(attnk.scale, backend=backend), scale_reference, {"x": x, "gate": gate}, grads=grads
        )


@pytest.mark.parametrize("trailing", [0, 1, 2, 3])
def test_shapes_of_the_gate(backend, device, trailing):
    x, gate = torch.randn(2, 3, 4, 5, device=device), torch.randn(2, 3, device=device)
    shaped = gate.view(2, 3, *(1,) * trailing).requires_grad_()
    out = attnk.scale(x, shaped, backend=backend)
    torch.testing.assert_close(out, x * gate[..., None, None])
    (dgate,) = torch.autograd.grad(out.sum(), shaped)
    torch.testing.assert_close(dgate, x.sum((2, 3)).view(shaped.shape))


def around(pool: Any, scale: Any, what: str, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A use of the pair that is not the plain one."""
    pooled = pool(x)
    gate = torch.sigmoid(pooled.avg @ w + pooled.max)
    if what == "twice":
        return scale(pooled, gate) + scale(pooled, gate.square()) * 3
    if what == "copied":
        return scale(copy.copy(pooled), gate) + scale(pooled, gate.square()) * 3
    if what == "residual":
        return scale(pooled, gate) + x * 2 + pooled.x
    if what == "tensor":
        return scale(x, gate)
    if what == "both":
        return scale(x, gate) - scale(pooled, gate * 2)
    if what == "pools too":
        return scale(pooled, gate) + (pooled.max * pooled.avg)[..., None, None]
    if what == "constant gate":
        return scale(pooled, gate.detach())
    if what == "gate from elsewhere":
        return scale(pooled, w[:2, :].sigmoid())
    if what == "unused":
        scale(pooled, gate)
        return scale(pooled, gate)
    if what == "another's":
        return scale(pool(x * 2), gate) + scale(pooled, gate)
    assert what == "changed"
    changed = x * 1
    pooled = pool(changed)
    changed.mul_(pooled.avg[..., None, None])
    return scale(pooled, gate)


USES = ("twice", "copied", "residual", "tensor", "both", "pools too", "constant gate", "gate from elsewhere", "unused",
        "another's", "changed")  # fmt: skip


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("what", USES)
def test_uses_of_the_pair(backend, device, what, ties):
    if what == "changed" and ties == "even":
        pytest.skip("the pooling's backward reads x, and says that it was changed")
    inputs = {"x": draw((2, 5, 4, 6), device=device, ties=True)["x"], "w": torch.randn(5, 5, device=device)}
    pool = functools.partial(attnk.channel_pool, ties=ties)
    for pool_backend, scale_backend in ((backend, backend), (backend, "reference"), ("reference", backend)):
        assert_matches_reference(
            functools.partial(
                around,
                functools.partial(pool, backend=pool_backend),
                functools.partial(attnk.scale, backend=scale_backend),
                what,
            ),
            functools.partial(
                around,
                functools.partial(pool, backend="reference"),
                functools.partial(attnk.scale, backend="reference"),
                what,
            ),
            inputs,
            grads=("x",) if what == "constant gate" else None,
        )


@pytest.mark.parametrize("what", [what for what in USES if what != "changed"])
def test_uses_of_the_pair_compiled(backend, device, what, fresh_dynamo):
    inputs = {"x": draw((2, 5, 4, 6), device=device)["x"], "w": torch.randn(5, 5, device=device)}
    pair = (functools.partial(attnk.channel_pool, backend=backend), functools.partial(attnk.scale, backend=backend))
    plain = [functools.partial(function, backend="reference") for function in (attnk.channel_pool, attnk.scale)]
    assert_matches_reference(
        torch.compile(functools.partial(around, *pair, what), fullgraph=True, backend="aot_eager"),
        functools.partial(around, *plain, what),
        inputs,
        grads=("x",) if what == "constant gate" else None,
    )


def test_a_pooling_may_cross_modes(backend, device):
    """Pooled where gradients are recorded and scaled where they are not, and the other way round."""
    x = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    pooled = attnk.channel_pool(x, backend=backend)
    with torch.no_grad():
        assert attnk.scale(pooled, pooled.avg, backend=backend).grad_fn is None
    out = attnk.scale(pooled, pooled.avg, backend=backend)  # still has its handles
    (dx,) = torch.autograd.grad(out.sum(), x)
    with torch.no_grad():
        pooled = attnk.channel_pool(x, backend=backend)
    (constant,) = torch.autograd.grad(attnk.scale(pooled, pooled.avg, backend=backend).sum(), x)
    expected = x.mean((2, 3), keepdim=True).detach().expand_as(x)
    torch.testing.assert_close(dx, 2 * expected)  # x.sum() / pixels is the mean
    torch.testing.assert_close(constant, expected)


def test_pooled_cannot_be_given_another_map():
    pooled = attnk.channel_pool(torch.randn(2, 3, 4, 5, requires_grad=True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pooled.x = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize("shape", [(1, 2, 512, 512), (1, 2, 300, 301)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_of_the_gate_on_large_planes(layout, shape):
    """Of positive numbers, whose sum a single chain of additions gets wrong by far more than a rounding."""
    x, dout = (dict(layouts(torch.rand(shape)))[layout] for _ in range(2))
    gate = torch.ones(shape[:2], requires_grad=True)
    (dgate,) = torch.autograd.grad(attnk.scale(x, gate), gate, dout)
    expected = (x.double() * dout.double()).sum((2, 3))
    assert ((dgate - expected).abs() / expected).max() < 1e-6


@pytest.mark.parametrize("setting", ["torch.backends.cuda.matmul.fp32_precision = 'tf32'",
                                     "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'"])  # fmt: skip
def test_newer_settings_of_precision(setting):
    """PyTorch's older question after precision raises once its newer settings were used."""
    code = f"""
import torch, attnk
if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    raise SystemExit  # PyTorch 2.6
{setting}
x = torch.randn(2, 64, 56, 56, requires_grad=True)
network = torch.nn.Sequential(
    attnk.SELayer(64), attnk.CBAM(64), attnk.CoordinateAttention(64), attnk.SpatialAttention(output="gated")
)
network(x).sum().backward()
network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)).sum().backward()
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_handles_have_no_memory(backend, device):
    x = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    pooled = attnk.channel_pool(x, backend=backend)
    (handles,) = pooled._handles
    for handle in handles:
        assert handle.untyped_storage().nbytes() == handle.element_size()
        assert handle.isnan().all()
    assert "handles" not in repr(pooled)
    attnk.scale(pooled, pooled.avg, backend=backend)
    assert pooled._handles == []
    for frozen in (attnk.channel_pool(x.detach(), backend=backend), attnk.channel_pool(x, backend="reference")):
        assert frozen._handles == []
    with torch.no_grad():
        assert attnk.channel_pool(x, backend=backend)._handles == []


def test_gradient_of_x_is_written_once(backend, device):
    """Of the operations that read or write maps, the backward has one for the gate and one for x."""
    inputs = {name: tensor.requires_grad_() for name, tensor in draw((2, 5, 4, 6), device=device).items()}
    out = gate_of(*inputs.values(), pool="avg_max", backend=backend)
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        out.backward(torch.ones_like(out))
    assert [call for call in calls if "attnk" in call] == [
        "attnk.channel_gate_dgate.default", "attnk.channel_gate_dx.default"
    ]  # fmt: skip


# Gradients.


@pytest.mark.parametrize(("pool", "ties"), CASES)
def test_gradcheck(backend, device, pool, ties):
    leaves = [tensor.requires_grad_() for tensor in draw((1, 3, 2, 3), torch.float64, device).values()]
    fast = backend == "triton" and dispatch.INTERPRETED
    torch.autograd.gradcheck(fused(backend, pool=pool, ties=ties), leaves, fast_mode=fast)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("pool", POOLS)
def test_gradcheck_of_the_definition(pool, ties):
    leaves = [tensor.requires_grad_() for tensor in draw((1, 2, 2, 2), torch.float64).values()]
    torch.autograd.gradcheck(fused("reference", pool=pool, ties=ties), leaves)
    torch.autograd.gradgradcheck(fused("reference", pool=pool, ties=ties), leaves, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_second_differentiation_raises(backend, device, name):
    inputs = draw((1, 3, 3, 4), device=device)
    leaf = inputs[name].requires_grad_()
    gate = fused(backend, pool="avg_max")
    (grad,) = torch.autograd.grad(gate(**inputs).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(grad.square().sum(), leaf)

    def once(tensor: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda tensor: gate(**{**inputs, name: tensor}).sum())(tensor).sum()

    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.func.grad(once)(leaf.detach())


@pytest.mark.parametrize(("of", "by"), itertools.product(("x", "gate"), repeat=2))
def test_second_differentiation_of_each_function_raises(backend, device, of, by):
    """Also where the first derivative is linear, and where it is a mixed one."""
    leaves = {"x": torch.randn(2, 3, 4, 5), "gate": torch.randn(2, 3)}
    leaves = {name: tensor.to(device).requires_grad_() for name, tensor in leaves.items()}
    for first in (leaves["x"], attnk.channel_pool(leaves["x"], backend=backend)):
        out = attnk.scale(first, leaves["gate"], backend=backend)
        (grad,) = torch.autograd.grad(out.sum(), leaves[of], create_graph=True)
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            torch.autograd.grad(grad.sum(), leaves[by])
    pooled = attnk.channel_pool(leaves["x"], backend=backend)
    (grad,) = torch.autograd.grad(pooled.max.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(grad.sum(), leaves["x"])


@pytest.mark.parametrize("pool", POOLS)
def test_second_derivative_of_a_sum_raises(backend, device, pool):
    """A constant gradient of the output must not hide that the first derivative depends on x."""
    x, *weights = draw((1, 2, 3, 3), device=device).values()

    def gate(x):
        return gate_of(x, *weights, pool=pool, backend=backend).sum()

    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.functional.vhp(gate, x, torch.ones_like(x))
    with pytest.raises(NotImplementedError, match="reference"):
        torch.func.grad(lambda x: torch.func.grad(gate)(x).sum())(x)


def test_create_graph_of_a_first_derivative(backend, device):
    inputs = draw((1, 3, 3, 4), device=device)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    plain = torch.autograd.grad(fused(backend, pool="avg_max")(*leaves).sum(), leaves)
    created = torch.autograd.grad(fused(backend, pool="avg_max")(*leaves).sum(), leaves, create_graph=True)
    assert_same_bits([grad.detach() for grad in created], list(plain))


def spoil(x: torch.Tensor, what: str) -> None:
    nan, inf = float("nan"), float("inf")
    if what == "nan":
        x[0, 1, 2, 1] = nan
    elif what == "nan_twice":
        x[0, 1, 2:4, 1] = nan
    elif what == "nan_channel":
        x[0, 2] = nan
    elif what == "inf":
        x[0, 1, 2, 1] = inf
    elif what == "minus_inf":
        x[0, 1, 2, 1] = -inf
    elif what == "minus_inf_channel":
        x[0, 1] = -inf
    elif what == "both_infs":
        x[0, 1, 0, 1], x[0, 1, 1, 1] = -inf, inf
    elif what == "inf_beside_nan":
        x[0, 1, 0, 1], x[0, 1, 1, 1] = inf, nan
    elif what == "huge":
        x.mul_(1e4)


@pytest.mark.parametrize(
    "what",
    ["nan", "nan_twice", "nan_channel", "inf", "minus_inf", "minus_inf_channel", "both_infs", "inf_beside_nan", "huge"],
)
def test_nan_and_infinities(backend, device, what):
    for (pool, ties), layout in zip(CASES, ("contiguous", "channels_last", "contiguous"), strict=True):
        inputs = draw((2, 4, 7, 3), device=device, layout=layout)
        spoil(inputs["x"], what)
        # one network an image and channel, so that a channel's NaN stays where it is
        gate = torch.randn(2, 4, device=device)

        def shared(pool_: Any, scale: Any, x: torch.Tensor, gate: torch.Tensor, both: bool = pool != "avg") -> Any:
            pooled = pool_(x)
            return scale(pooled, gate * 2) + (pooled.avg + (pooled.max if both else 0))[..., None, None]

        pools = functools.partial(attnk.channel_pool, pool=pool, ties=ties)
        functions = [
            functools.partial(
                shared, functools.partial(pools, backend=one), functools.partial(attnk.scale, backend=one)
            )
            for one in (backend, "reference")
        ]
        assert_matches_reference(*functions, {"x": inputs["x"], "gate": gate})


@pytest.mark.parametrize("programs", [1, 100])
def test_nan_across_slabs(kernels, device, programs):
    for what, ties in itertools.product(("nan_twice", "inf_beside_nan", "minus_inf_channel"), TIES):
        x = draw((2, 4, 7, 3), device=device, ties=True)["x"]
        spoil(x, what)
        with configured(kernels, programs, block_p=4):
            assert_matches_reference(
                lambda x, ties=ties: attnk.channel_pool(x, ties=ties, backend="triton").max,
                lambda x, ties=ties: channel_pool_reference(x, ties=ties)[1],
                {"x": x},
            )


@pytest.mark.parametrize("ties", TIES)
def test_nan_behind_the_channels_does_not_leak(backend, device, ties):
    values, gradient = torch.randn(2, 3, 4, 5, device=device), torch.randn(2, 3, 4, 5, device=device)
    for memory_format in MEMORY_FORMATS.values():
        inputs = draw((2, 3, 4, 5), device=device)
        padded, douts = (
            torch.full((2, 8, 4, 5), float("nan"), device=device).contiguous(memory_format=memory_format)
            for _ in range(2)
        )
        inputs["x"] = padded[:, 2:5]
        inputs["x"].copy_(values)
        douts[:, 2:5] = gradient
        check(backend, inputs, pool="avg_max", ties=ties, dout=douts[:, 2:5])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 0, 0), (0, 3, 2, 4, 5)])
@pytest.mark.parametrize(("pool", "ties"), CASES)
def test_empty(backend, device, shape, pool, ties):
    inputs = draw(shape, device=device)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    out = gate_of(*leaves, pool=pool, ties=ties, backend=backend)
    assert out.shape == shape
    for grad, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))
    check(backend, {name: leaf.detach() for name, leaf in inputs.items()}, pool=pool, ties=ties)
    pooled = attnk.channel_pool(leaves[0], backend=backend)
    assert torch.equal(pooled.avg, torch.zeros(shape[:2], device=device))
    assert torch.equal(pooled.max, torch.zeros(shape[:2], device=device))


def test_empty_without_a_batch(backend, device):
    x, *weights = draw((3, 0, 5), device=device).values()
    assert gate_of(x, *weights, backend=backend).shape == (3, 0, 5)


X = torch.zeros(2, 3, 4, 4)
W = (torch.zeros(2, 3), torch.zeros(2), torch.zeros(3, 2), None)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attnk.channel_gate([1.0], W), TypeError, "x must be a tensor, got list"),
        (lambda: attnk.channel_pool(None), TypeError, "x must be a tensor, got NoneType"),
        (lambda: attnk.scale(1.0, X), TypeError, "x must be a tensor, got float"),
        (lambda: attnk.channel_gate(X[0, 0], W), ValueError, r"x must be \(B, C, H, W\), .* 2 dimensions: \(4, 4\)"),
        (lambda: attnk.scale(X[None, None], X), ValueError, "x must be .* got 6 dimensions"),
        (lambda: attnk.channel_pool(X[:, :0]), ValueError, r"x must have at least one channel, got \(2, 0, 4, 4\)"),
        (lambda: attnk.channel_pool(X[0, :0]), ValueError, r"x must have at least one channel, got \(0, 4, 4\)"),
        (lambda: attnk.channel_gate(X.int(), W), TypeError, "x must be float16, .* got torch.int32"),
        (lambda: attnk.channel_pool(X.cfloat()), TypeError, "x must be float16, .* got torch.complex64"),
        (lambda: attnk.channel_pool(X.to(torch.float8_e4m3fn)), TypeError, "x must be .* got torch.float8_e4m3fn"),
        (lambda: attnk.channel_gate(X, 3.0), TypeError, r"mlp must be a callable or \(w1, b1, w2, b2\), got float"),
        (lambda: attnk.channel_gate(X, None), TypeError, r"mlp must be a callable or \(w1, b1, w2, b2\), got NoneType"),
        (lambda: attnk.channel_gate(X, W[:2]), ValueError, "mlp must be a callable or .* got a sequence of 2"),
        (lambda: attnk.channel_gate(X, (None, *W[1:])), TypeError, "w1 must be a tensor, got NoneType"),
        (lambda: attnk.channel_gate(X, (W[0].T, *W[1:])), ValueError, r"w1 must be \(3, 3\) .* got \(3, 2\)"),
        (lambda: attnk.channel_gate(X, (W[0], W[2], *W[2:])), ValueError, r"b1 must be \(2,\) .* got \(3, 2\)"),
        (lambda: attnk.channel_gate(X, (*W[:2], W[0], None)), ValueError, r"w2 must be \(3, 2\) .* got \(2, 3\)"),
        (lambda: attnk.channel_gate(X, (*W[:3], W[1])), ValueError, r"b2 must be \(3,\) .* got \(2,\)"),
        (lambda: attnk.channel_gate(X, (W[0].half(), *W[1:])), TypeError, "w1 must have the dtype of x"),
        (lambda: attnk.channel_gate(X, (*W[:2], W[2].to("meta"), None)), ValueError, "w2 must be on the device of x"),
        (lambda: attnk.channel_gate(X, lambda v: v[:1]), ValueError, r"gate must be \(2, 3\) .* got \(1, 3\)"),
        (lambda: attnk.channel_gate(X, lambda v: v.double()), TypeError, "gate must have the dtype of x"),
        (lambda: attnk.channel_gate(X, lambda v: 1.0, gate=float), TypeError, "gate must be a tensor, got float"),
        (lambda: attnk.scale(X, torch.zeros(3, 2)), ValueError, r"gate must be \(2, 3\) or that .* got \(3, 2\)"),
        (lambda: attnk.scale(X, torch.zeros(2, 3, 4, 4)), ValueError, r"gate must be .* got \(2, 3, 4, 4\)"),
        (lambda: attnk.scale(X[0], torch.zeros(2)), ValueError, r"gate must be \(1, 3\) .* got \(2,\)"),
        (lambda: attnk.scale(X, torch.zeros(2, 3).half()), TypeError, "gate must have the dtype of x"),
        (lambda: attnk.scale(X, torch.zeros(2, 3, device="meta")), ValueError, "gate must be on the device of x"),
        (lambda: attnk.channel_gate(X, W, pool="sum"), ValueError, "pool must be one of 'avg', .* got 'sum'"),
        (lambda: attnk.channel_pool(X, "half_sum"), ValueError, "pool must be one of 'avg', .* got 'half_sum'"),
        (lambda: attnk.channel_gate(X, W, gate="relu"), ValueError, "gate must be one of 'sigmoid', .* got 'relu'"),
        (lambda: attnk.channel_gate(X, W, ties="last"), ValueError, "ties must be one of 'first', 'even', got 'last'"),
        (lambda: attnk.channel_pool(X, ties="last"), ValueError, "ties must be one of 'first', 'even', got 'last'"),
        (lambda: attnk.channel_gate(X, W, backend="cuda"), ValueError, "backend must be one of .* got 'cuda'"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("names", [names for size in (1, 2) for names in itertools.combinations(NAMES, size)], ids=str)
def test_subsets_of_gradients(backend, device, names):
    inputs = draw((2, 5, 3, 4), device=device)
    check(backend, inputs, grads=names, pool="avg_max")
    leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in inputs.items()}
    gate_of(*leaves.values(), pool="avg_max", backend=backend).sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in names)


def test_no_graph_where_none_is_wanted(backend, device):
    inputs = draw((2, 5, 3, 4), device=device)
    expected = fused(backend, pool="avg_max")(**inputs)
    assert expected.grad_fn is None
    wanting = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    with torch.no_grad():
        out = fused(backend, pool="avg_max")(**wanting)
    assert out.grad_fn is None
    assert torch.equal(out, expected)
    with torch.inference_mode():
        out = fused(backend, pool="avg_max")(**wanting)
        assert out.is_inference()
        inside = attnk.channel_pool(wanting["x"] * 1, backend=backend)
        attnk.scale(inside, inside.avg, backend=backend)
    assert torch.equal(out, expected)
    check(backend, inputs, grads=(), pool="avg_max")


@pytest.mark.parametrize(("pool", "ties"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_for_backward(backend, device, pool, ties, dtype):
    """x, and vectors: nothing else with pixels."""
    x, *weights = draw((2, 8, 16, 16), dtype, device).values()
    x.requires_grad_()
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gate_of(x, *(weight.requires_grad_() for weight in weights), pool=pool, ties=ties, backend=backend)
    others = [tensor for tensor in saved if tensor.data_ptr() != x.data_ptr() or not tensor.numel()]
    assert len(others) < len(saved)
    assert max(tensor.numel() for tensor in others) <= 2 * 8 * 3


@pytest.mark.parametrize(("pool", "ties"), CASES)
def test_input_changed_in_place(backend, device, pool, ties):
    x, *weights = (tensor.clone().requires_grad_() for tensor in draw((2, 5, 3, 4), device=device).values())
    x = x * 1
    out = gate_of(x, *weights, pool=pool, ties=ties, backend=backend)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_output_changed_in_place(backend, device):
    inputs = draw((2, 5, 3, 4), torch.float64, device)
    assert_matches_reference(
        lambda **tensors: fused(backend, pool="avg_max")(**tensors).mul_(2).add_(1),
        lambda **tensors: definition(pool="avg_max")(**tensors) * 2 + 1,
        inputs,
    )


@pytest.mark.parametrize(("pool", "ties"), CASES)
def test_retain_graph(backend, device, pool, ties):
    leaves = [tensor.requires_grad_() for tensor in draw((2, 5, 3, 4), device=device).values()]
    out = gate_of(*leaves, pool=pool, ties=ties, backend=backend)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dout)
    assert_same_bits(list(first), list(second))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ties", TIES)
def test_repeats(backend, device, ties, layout):
    inputs = draw((2, 6, 9, 7), device=device, ties=True, layout=layout)
    expected = run(backend, inputs, pool="avg_max", ties=ties)
    for _ in range(3 if backend == "triton" and dispatch.INTERPRETED else 20):
        assert_same_bits(run(backend, inputs, pool="avg_max", ties=ties), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeats_in_tiles(device, layout):
    inputs = draw((4, 64, 40, 40), device=device, layout=layout)
    for ties in TIES:
        expected = run("torch", inputs, pool="avg_max", ties=ties)
        for _ in range(5):
            assert_same_bits(run("torch", inputs, pool="avg_max", ties=ties), expected)


@pytest.mark.parametrize("ties", TIES)
def test_deterministic_algorithms(backend, device, ties):
    """It runs where PyTorch is told to refuse what differs from run to run."""
    torch.use_deterministic_algorithms(True)  # not warn_only; a fixture of all tests undoes it
    run(backend, draw((2, 4, 5, 6), device=device), pool="avg_max", ties=ties)


@pytest.mark.gpu
def test_deterministic_algorithms_refuse_the_usual_code():
    x = torch.randn(2, 4, 5, 6, device="cuda", requires_grad=True)
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError, match="adaptive_max_pool2d_backward_cuda does not have a deterministic"):
        F.adaptive_max_pool2d(x, 1).sum().backward()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_x", [False, True])
def test_autocast(backend, device, dtype, half_x, pool):
    if half_x and dtype == torch.bfloat16 and backend == "triton" and dispatch.INTERPRETED:
        pytest.skip("the interpreter truncates to bfloat16")
    inputs = draw((2, 5, 6, 4), device=device)
    if half_x:
        inputs["x"] = inputs["x"].to(dtype)

    def under_autocast(gate: Any, **tensors: Any) -> torch.Tensor:
        with torch.autocast(device, dtype):
            return gate(**tensors)

    assert_matches_reference(
        functools.partial(under_autocast, fused(backend, pool=pool)),
        functools.partial(under_autocast, definition(pool=pool)),
        inputs,
    )
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out = under_autocast(fused(backend, pool=pool), **leaves)
    assert out.dtype == inputs["x"].dtype
    out.float().square().mean().backward()
    for leaf in leaves.values():
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.isfinite().all()


# Inside PyTorch.


@pytest.mark.parametrize(("pool", "ties"), [CASES[0], CASES[2]])
def test_compile(backend, device, pool, ties, fresh_dynamo):
    compiled = torch.compile(fused(backend, pool=pool, ties=ties), fullgraph=True, backend="aot_eager")
    inputs = draw((2, 5, 3, 4), device=device)
    reference = definition(pool=pool, ties=ties)
    assert_matches_reference(compiled, reference, inputs)
    inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    assert_matches_reference(compiled, reference, inputs)
    assert_matches_reference(compiled, reference, inputs, grads=())
    assert_matches_reference(compiled, reference, inputs, grads=("w1", "b2"))


def test_compile_in_a_network(backend, device, fresh_dynamo):
    def network(gate: Any, x: torch.Tensor, **weights: torch.Tensor) -> torch.Tensor:
        return gate(torch.sin(x) * 2, **weights).cos() + x

    compiled = torch.compile(
        functools.partial(network, fused(backend, pool="avg_max")), fullgraph=True, backend="inductor"
    )
    reference = functools.partial(network, definition(pool="avg_max"))
    assert_matches_reference(compiled, reference, draw((2, 5, 4, 6), device=device))


def test_compile_dynamic_shapes(backend, device, fresh_dynamo):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused(backend, pool="avg_max"), fullgraph=True, backend=counter)
    for shape in ((2, 5, 4, 6), (3, 7, 5, 8), (4, 6, 9, 3)):
        assert_matches_reference(compiled, definition(pool="avg_max"), draw(shape, device=device))
    assert counter.frame_count <= 2


class Network(nn.Module):
    """A gate behind a layer whose output has a gradient, as in a real network."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        self.before = nn.Conv2d(channels, channels, 1)
        self.mlp = nn.Sequential(nn.Linear(channels, 3), nn.ReLU(), nn.Linear(3, channels))
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return attnk.channel_gate(self.before(x), self.mlp, **self.options)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("pool", "ties"), [CASES[0], CASES[2]])
def test_export(backend, device, pool, ties, strict, fresh_dynamo):
    """An exported program has other sizes, and the gradients of the module it was made of."""
    module = Network(5, pool=pool, ties=ties, backend=backend).to(device)
    size = torch.export.Dim
    exported = torch.export.export(
        module, (torch.randn(2, 5, 4, 6, device=device),), strict=strict,
        dynamic_shapes={"x": {0: size("b"), 2: size("h"), 3: size("w")}},
    )  # fmt: skip
    assert "attnk.channel_gate_pool" in str(exported)
    assert "attnk.channel_gate_scale" in str(exported)
    program, x = exported.module(), torch.randn(3, 5, 7, 5, device=device, requires_grad=True)
    results = []
    for function in (module, program):
        out = function(x)
        leaves = (x, *function.parameters())
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


PERMUTED = ["contiguous", "channels_last", "transposed", "batch_innermost", "crop"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("layout", "pool", "ties"),
    [(layout, "avg_max", "first") for layout in PERMUTED]
    + [("contiguous", *case) for case in CASES if case != CASES[1]],
)
def test_opcheck(backend, device, pool, ties, layout, fresh_dynamo):
    x = draw((3, 5, 4, 6), torch.float64, device, layout=layout)["x"]
    dout = dict(layouts(torch.randn(x.shape, dtype=x.dtype, device=device)))[layout]
    gate, needs_max, ops = torch.randn(3, 5, dtype=x.dtype, device=device), pool != "avg", torch.ops.attnk
    torch.library.opcheck(ops.channel_gate_pool.default, (x, needs_max, ties, False, backend))
    torch.library.opcheck(ops.channel_gate_pool.default, (x.clone().requires_grad_(), needs_max, ties, True, backend))
    torch.library.opcheck(ops.channel_gate_scale.default, (x.clone().requires_grad_(), gate, backend))
    _, peak, index = ops.channel_gate_pool(x, needs_max, ties, True, backend)
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(ops.channel_gate_dgate.default, (dout, x, backend), **tests)
    sizes = (4, 6, x.stride(1) < x.stride(3), ties, backend)
    for given in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        dmax = gate if given[2] and needs_max else None
        grads = (dout if given[0] else None, gate if given[0] else None, gate if given[1] else None, dmax)
        if any(grad is not None for grad in grads):
            torch.library.opcheck(ops.channel_gate_dx.default, (*grads, x, peak, index, *sizes), **tests)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_strides_are_real_strides(backend, device, layout):
    leaves = [tensor.requires_grad_() for tensor in draw((3, 5, 4, 6), device=device, layout=layout).values()]
    real = gate_of(*leaves, pool="avg_max", backend=backend)
    grads = torch.autograd.grad(real.sum(), leaves)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = [mode.from_tensor(leaf).detach().requires_grad_() for leaf in leaves]
        fake = gate_of(*fakes, pool="avg_max", backend=backend)
        fake_grads = torch.autograd.grad(fake.sum(), fakes)
    for one, other in zip((real, *grads), (fake, *fake_grads), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_meta_tensors():
    inputs = {name: tensor.to("meta").requires_grad_() for name, tensor in draw((2, 3, 5, 7)).items()}
    out = gate_of(*inputs.values(), pool="avg_max")
    out.sum().backward()
    assert out.shape == inputs["x"].grad.shape == (2, 3, 5, 7)
    assert attnk.explain("channel_gate", inputs["x"]).reason == "x lies on the meta device"


def test_traces_take_other_sizes():
    module = Network(4, pool="avg_max").eval()
    for x in (torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6, requires_grad=True)):
        traced = torch.jit.trace(module, x)
        other = torch.randn(5, 4, 30, 40)
        torch.testing.assert_close(traced(other), module(other))


@pytest.mark.parametrize(("pool", "ties"), CASES)
def test_func_grad(backend, device, pool, ties):
    def gradient(gate: Any, position: int, **tensors: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda *tensors: gate(*tensors).square().sum(), position)(*tensors.values())

    inputs = draw((2, 5, 3, 4), device=device)
    for position in range(5):
        assert_matches_reference(
            functools.partial(gradient, fused(backend, pool=pool, ties=ties), position),
            functools.partial(gradient, definition(pool=pool, ties=ties), position),
            inputs,
            grads=(),
        )


@pytest.mark.parametrize(("pool", "ties"), CASES)
@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None, None, None), (2, None, None, None, None), (None, None, None, None, 0), (1, None, 0, None, 0)],
    ids=str,
)  # fmt: skip
def test_vmap(backend, device, in_dims, pool, ties):
    inputs = draw((2, 3, 2, 4), device=device)
    for name, dim in zip(NAMES, in_dims, strict=True):
        if dim is not None:
            inputs[name] = torch.stack([inputs[name], inputs[name] * 2 - 0.5, inputs[name].flip(0)], dim)
    assert_matches_reference(
        lambda **tensors: torch.vmap(fused(backend, pool=pool, ties=ties), in_dims)(*tensors.values()),
        lambda **tensors: one_by_one(in_dims, definition(pool=pool, ties=ties), *tensors.values()),
        inputs,
    )


def test_vmap_without_a_batch(backend, device):
    inputs = draw((3, 4, 2, 4), device=device)
    in_dims = (0, None, None, None, None)
    assert_matches_reference(
        lambda **tensors: torch.vmap(fused(backend, pool="avg_max"), in_dims)(*tensors.values()),
        definition(pool="avg_max"),
        inputs,
    )


@pytest.mark.parametrize(("pool", "ties"), CASES)
def test_vmap_of_grad(backend, device, pool, ties):
    # gradients an example, as differentially private training wants them
    inputs = draw((2, 4, 3, 2, 4), device=device)
    inputs |= {name: tensor for name, tensor in draw((1, 3, 2, 4), device=device).items() if name != "x"}
    inputs["x"] = inputs["x"][:, :1, :]
    in_dims = (0, None, None, None, None)

    def gradient(gate: Any, position: int, *tensors: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda *tensors: gate(*tensors).square().sum(), position)(*tensors)

    for position in range(5):
        mapped = torch.vmap(functools.partial(gradient, fused(backend, pool=pool, ties=ties), position), in_dims)
        reference = functools.partial(gradient, definition(pool=pool, ties=ties), position)
        assert_matches_reference(
            lambda mapped=mapped, **tensors: mapped(*tensors.values()),
            lambda reference=reference, **tensors: one_by_one(in_dims, reference, *tensors.values()),
            inputs,
            grads=(),
        )


def test_jacrev(backend, device):
    inputs = draw((1, 2, 2, 2), device=device)
    for position in range(5):
        assert_matches_reference(
            lambda position=position, **tensors: torch.func.jacrev(fused(backend, pool="avg_max"), position)(
                *tensors.values()
            ),
            lambda position=position, **tensors: torch.func.jacrev(definition(pool="avg_max"), position)(
                *tensors.values()
            ),
            inputs,
            grads=(),
        )


def test_forward_mode_raises(backend, device):
    x, *weights = draw((1, 2, 2, 3), device=device).values()
    gate = lambda x: gate_of(x, *weights, backend=backend)  # noqa: E731
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(gate, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        gate(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(backend, device, reentrant):
    leaves = [tensor.requires_grad_() for tensor in draw((2, 5, 3, 4), device=device).values()]
    gate = fused(backend, pool="avg_max")
    expected = torch.autograd.grad(gate(*leaves).square().sum(), leaves)
    checkpoint.checkpoint(gate, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert_same_bits([leaf.grad for leaf in leaves], list(expected))


def test_selective_checkpoint(backend, device):
    inputs = draw((2, 5, 3, 4), device=device)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    expected = run(backend, inputs, pool="avg_max")[1:]
    seen, pool = [], torch.ops.attnk.channel_gate_pool.default

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
        seen.append((op, context.is_recompute))
        return checkpoint.CheckpointPolicy.MUST_SAVE if op == pool else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    out = checkpoint.checkpoint(
        fused(backend, pool="avg_max"), *leaves, use_reentrant=False,
        context_fn=functools.partial(checkpoint.create_selective_checkpoint_contexts, policy),
    )  # fmt: skip
    dout = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
    assert_same_bits(list(torch.autograd.grad(out, leaves, dout)), expected)
    assert (pool, False) in seen


def test_flops(backend, device):
    """The network's, which the definition has as well; pooling and scaling have no products of matrices."""
    counts = []
    for gate in (fused(backend, pool="avg_max"), definition(pool="avg_max")):
        leaves = {name: tensor.requires_grad_() for name, tensor in draw((2, 5, 6, 4), device=device).items()}
        with FlopCounterMode(display=False) as forward:
            out = gate(**leaves)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert counts[0][0] == 2 * 2 * 2 * 2 * 5 * 3


def test_threads(backend, device):
    if backend == "triton" and dispatch.INTERPRETED:
        pytest.skip("the interpreter runs one kernel at a time")
    inputs = [draw((2, 5 + i, 20, 30), device=device) for i in range(8)]
    expected = [run(backend, one, pool="avg_max") for one in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            results = pool.map(functools.partial(run, backend, pool="avg_max"), inputs)
            for result, wanted in zip(results, expected, strict=True):
                assert_same_bits(result, wanted)


# The kernels' reads and writes.


@needs_interpreter
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice", "channels_last_slice", "expanded"])
def test_no_hidden_copy(kernels, layout):
    x = draw((3, 5, 4, 6), layout=layout)["x"]
    read, _ = kernels.forward.addressable(x, x.stride(1) < x.stride(3))
    assert read is x


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 3, 2, 3), (2**31 + 40, 6, 3, 1)),
        ((1, 3, 2, 3), (2**31, 2**30 + 40, 3, 1)),
        ((1, 2, 2, 2), (2**33, 1, 2**31 + 80, 2**30 + 40)),
        ((2, 3, 1, 1), (2**31 + 40, 1, 2**40, 2**40)),
    ],
    ids=["batch", "channel", "pixel", "one_pixel"],
)
@pytest.mark.parametrize("ties", TIES)
def test_offsets_beyond_32_bits(kernels, ties, shape, strides):
    if not dispatch.INTERPRETED:
        pytest.skip("lies in CPU memory")
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert last > 2**31 - 1
    inputs = draw(shape, torch.float16)
    spread = []
    for values in (inputs["x"], torch.randn(shape).half()):
        sparse = mmap.mmap(-1, 2 * (last + 1))  # pages that nothing touches take no memory
        spread.append(torch.frombuffer(sparse, dtype=torch.float16).as_strided(shape, strides).copy_(values))
    inputs["x"], dout = spread
    read, _ = kernels.forward.addressable(inputs["x"], inputs["x"].stride(1) < inputs["x"].stride(3))
    assert read is inputs["x"]
    with Meter(), configured(kernels, 100, block_p=2):  # fails on a 32-bit overflow
        check("triton", inputs, pool="avg_max", ties=ties, dout=dout)


def bytes_of_launches(x: torch.Tensor, gate: torch.Tensor, needs_max: bool, ties: str, keep: bool, slabs: int) -> dict:
    """The closed formula in the docstring of ``attnk.kernels.channel_gate``."""
    size, acc = x.element_size(), 8 if x.dtype == torch.float64 else 4
    moved, planes = x.numel() * size, x.shape[0] * x.shape[1]
    index = 4 * keep
    wide = (acc + needs_max * (acc + index)) * planes
    narrow = (size + needs_max * (size + index)) * planes
    counts = {"fwd_pool": (moved, narrow if slabs == 1 else slabs * wide)}
    if slabs > 1:
        counts["fwd_pool_sum"] = (slabs * wide, narrow)
    counts["fwd"] = (moved + gate.element_size() * planes, moved)
    if keep:
        counts["bwd_dgate"] = (2 * moved, slabs * acc * planes)
        if slabs > 1:
            counts["bwd_dgate_sum"] = (slabs * acc * planes, acc * planes)
        rereads = (moved + size * planes) * (needs_max and ties == "even")
        vectors = (acc + size + needs_max * (size + 4)) * planes  # the gate comes in the accumulators' dtype
        counts["bwd_dx"] = (moved + vectors + rereads, moved)
    return counts


@needs_interpreter
@pytest.mark.parametrize(
    "case",
    pairwise(
        pool=("avg", "avg_max"),
        ties=TIES,
        keep=(True, False),
        dtype=DTYPES,
        memory_format=list(MEMORY_FORMATS.values()),
        shape=((2, 5, 6, 7), (1, 8, 16, 2), (3, 1, 5, 1)),
        num_stages=(1, 2, 4),
        programs=(1, 100),
    ),
)
def test_bytes_are_the_formula(kernels, case):
    inputs = draw(case["shape"], case["dtype"])
    x = inputs["x"] = inputs["x"].contiguous(memory_format=case["memory_format"]).requires_grad_(case["keep"])
    needs_max, ties = case["pool"] != "avg", case["ties"]
    with configured(kernels, case["programs"], num_stages=case["num_stages"]), Meter() as meter:
        pooled = attnk.channel_pool(x, case["pool"], ties=ties, backend="triton")
        gate = pooled.avg * 2 + (pooled.max * 3 if needs_max else 0)
        out = attnk.scale(pooled, gate, backend="triton")
        if case["keep"]:
            torch.autograd.grad(out, x, torch.ones_like(out))
    launches = {
        launch.kernel.removeprefix("_channel_gate_").removesuffix("_kernel"): launch for launch in meter.launches
    }
    assert len(launches) == len(meter.launches)
    slabs = -(-x.shape[2] * x.shape[3] // (8 * case["num_stages"])) if case["programs"] > 1 else 1
    expected = bytes_of_launches(x, gate, needs_max, ties, case["keep"], slabs)
    assert list(launches) == list(expected)
    for name, launch in launches.items():
        assert (launch.loaded, launch.stored) == expected[name], name
        assert launch.atomics == 0
        assert launch.store_lanes == launch.stored, name
        if name not in ("fwd", "bwd_dx"):  # whose slabs all read the vectors
            assert launch.load_lanes == launch.loaded, name


@needs_interpreter
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
@pytest.mark.parametrize("pool", ["avg", "avg_max"])
def test_bytes_at_64_channels(pool, memory_format):
    inputs = draw((1, 64, 32, 32))
    x = inputs["x"] = inputs["x"].contiguous(memory_format=memory_format)
    for tensor in inputs.values():
        tensor.requires_grad_()
    with Meter() as forward:
        out = gate_of(*inputs.values(), pool=pool, backend="triton")
    with Meter() as backward:
        out.backward(torch.ones_like(out))
    assert forward.bytes <= 3.1 * x.nbytes
    assert backward.bytes <= 4.2 * x.nbytes


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
@pytest.mark.parametrize("ties", TIES)
def test_slabs_do_not_change_what_is_exact(kernels, device, ties, memory_format):
    """The maximum and its index or number are the same however many programs share a plane."""
    x = draw((2, 5, 9, 7), device=device, ties=True)["x"].contiguous(memory_format=memory_format)
    results = []
    for programs in (1, 20, 1000):
        with configured(kernels, programs):
            avg, peak, index = kernels.channel_gate_pool(x, True, ties, True)
        torch.testing.assert_close(avg, x.mean((2, 3)))
        results.append([peak, index])
    for result in results[1:]:
        assert_same_bits(result, results[0])
    expected = x.flatten(2).max(2)
    assert torch.equal(results[0][0], expected.values)
    count = (x == expected.values[..., None, None]).sum((2, 3))
    assert torch.equal(results[0][1].long(), expected.indices if ties == "first" else count)


def test_explain(device):
    x = torch.zeros(2, 8, 5, 6, device=device)
    explanation = attnk.explain("channel_gate", x, pool="avg_max", backend="torch")
    assert (explanation.backend, explanation.reason, explanation.config) == ("torch", "asked for", None)
    if dispatch.no_kernel_here(x) is None:
        from attnk.kernels.tuning import architecture, channel_gate_config

        for shaped in (x, x[0], x[:, :, None]):
            explanation = attnk.explain("channel_gate", shaped, backend="triton")
            assert explanation.config == channel_gate_config(
                architecture(x.device), itemsize=4, pixels=30, channels_last=False
            )
    with pytest.raises(ValueError, match="pool must be one of"):
        attnk.explain("channel_gate", x, pool="sum")


def test_planes_beyond_the_kernels(device):
    if dispatch.no_kernel_here(torch.empty(0, device=device)) is not None:
        pytest.skip("no kernels here")
    x = torch.zeros(1, 1, 1, 1, device=device).expand(1, 1, 2**15, 2**15)
    with pytest.raises(attnk.Unsupported, match="less than 1073741824 pixels"):
        attnk.channel_pool(x, backend="triton")


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    pairwise(
        shape=((4, 64, 112, 112), (8, 64, 56, 56), (8, 256, 28, 28), (16, 512, 14, 14), (16, 2048, 7, 7)),
        dtype=(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        pool=("avg", "avg_max"),
        ties=TIES,
        layout=("contiguous", "channels_last"),
    ),
)
def test_network_shapes(backend, case):
    inputs = draw(case["shape"], case["dtype"], "cuda", hidden=16, layout=case["layout"])
    check(backend, inputs, pool=case["pool"], ties=case["ties"])


@pytest.mark.gpu
@pytest.mark.parametrize("pool", POOLS)
def test_bfloat16_kernels(pool):
    check("triton", draw((3, 40, 13, 17), torch.bfloat16, "cuda", ties=True), pool=pool)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeats_on_network_shapes(backend, layout):
    inputs = draw((16, 256, 56, 56), torch.bfloat16, "cuda", layout=layout)
    expected = run(backend, inputs, pool="avg_max")
    for _ in range(20):
        assert_same_bits(run(backend, inputs, pool="avg_max"), expected)


@pytest.mark.gpu
def test_other_stream(backend):
    inputs = draw((8, 256, 56, 56), torch.float32, "cuda")
    expected = run(backend, inputs, pool="avg_max")
    stream = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # what wrongly runs on the default stream would overtake it
            late = {name: torch.empty_like(tensor).copy_(tensor) for name, tensor in inputs.items()}
            result = run(backend, late, pool="avg_max")
        stream.synchronize()
        assert_same_bits(result, expected)


@pytest.mark.gpu
def test_graph_capture():
    first, second = (draw((4, 64, 56, 56), torch.float32, "cuda") for _ in range(2))
    static = {name: tensor.clone() for name, tensor in first.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run("triton", static, pool="avg_max")  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run("triton", static, pool="avg_max")
    for inputs in (first, second, first):
        for name, tensor in inputs.items():
            static[name].copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(results, run("triton", inputs, pool="avg_max"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_second_device(backend):
    with torch.cuda.device(0):
        check(backend, draw((4, 64, 28, 28), device="cuda:1"), pool="avg_max")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_beyond_32_bits(layout):
    if torch.cuda.mem_get_info()[1] < 40 * 2**30:
        pytest.skip("needs a device with 40 GiB")
    shape = (33, 64, 1024, 1024)
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=MEMORY_FORMATS[layout])
    dout = torch.empty_like(x)
    for image, gradient in zip(x, dout, strict=True):
        image.normal_()
        gradient.normal_()
    results = []
    for part, gradient in ((x, dout), (x[-1:].clone(), dout[-1:].clone())):
        leaf = part.requires_grad_()
        out = attnk.channel_gate(leaf, lambda pooled: pooled * 3, pool="max", backend="triton")
        results.append([out.detach()[-1:], torch.autograd.grad(out, leaf, gradient)[0][-1:]])
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])  # sums over slabs that are cut otherwise


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_images(layout):
    check("triton", draw((65_537, 4, 1, 1), torch.float32, "cuda", layout=layout), pool="avg_max")
    check("triton", draw((65_537, 3, 2, 2), torch.float32, "cuda", layout=layout), pool="avg_max", ties="even")
