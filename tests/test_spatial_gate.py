"""``attnk.spatial_gate``: values, gradients, layouts, edges, errors, and how it behaves inside PyTorch."""

import contextlib
import functools
import itertools
import mmap
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from helpers import assert_same_bits, needs_interpreter, one_by_one, pairwise
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import attnk
from attnk import dispatch
from attnk.reference.spatial_gate import spatial_gate_reference
from attnk.testing import Meter, assert_matches_reference, layouts

OUTPUTS = ("gated", "residual", "map", "logit")
TIES = ("first", "even")
DTYPES = (torch.float64, torch.float32, torch.float16)
LAYOUTS = [name for name, _ in layouts(torch.zeros(1, 1, 1, 1))]
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NAMES = ("x", "weight", "bias")


def draw(
    shape: tuple[int, ...],
    kernel_size: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    bias: bool = True,
    ties: bool = False,
    layout: str = "contiguous",
) -> dict[str, torch.Tensor | None]:
    """Random arguments of the gate; with ``ties`` most pixels have several equal maxima."""
    x = torch.randn(shape, dtype=torch.float64)
    if ties:
        x = x.round()
    x = x.to(device, dtype)
    if layout != "contiguous":
        x = dict(layouts(x))[layout]
    weight = torch.randn(1, 2, kernel_size, kernel_size, dtype=torch.float64) / kernel_size
    return {
        "x": x,
        "weight": weight.to(device, dtype),
        "bias": torch.randn(1, dtype=torch.float64).to(device, dtype) if bias else None,
    }


def check(backend: str, inputs: dict[str, torch.Tensor | None], *, grads: Any = None, dout: Any = None, **options: str):
    """Values and gradients against the definition."""
    assert_matches_reference(
        functools.partial(attnk.spatial_gate, backend=backend, **options),
        functools.partial(spatial_gate_reference, **options),
        inputs,
        grads=grads,
        dout=dout,
    )


def run(backend: str, inputs: dict[str, torch.Tensor | None], **options: str) -> list[torch.Tensor]:
    """The output and all gradients, for comparing bits."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs.values()]
    out = attnk.spatial_gate(*leaves, backend=backend, **options)
    dout = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], dout)]


@pytest.fixture
def kernels():
    return pytest.importorskip("attnk.kernels.spatial_gate")


@contextlib.contextmanager
def configured(kernels: Any, **config: int):
    """Every launch inside uses these block sizes."""
    config = {"block_p": 8, "block_c": 4, "num_warps": 4, "num_stages": 1} | config
    with mock.patch.object(
        kernels.common, "spatial_gate_config", return_value=kernels.common.SpatialGateConfig(**config)
    ):
        yield


@pytest.mark.parametrize(
    "case",
    pairwise(
        kernel_size=(1, 3, 5, 7, 9, 15),
        output=OUTPUTS,
        dtype=DTYPES,
        ties=TIES,
        order=("avg_max", "max_avg"),
        bias=(True, False),
        rounded=(True, False),
        layout=("contiguous", "channels_last"),
    ),
)
def test_matches_reference(backend, device, case):
    inputs = draw(
        (2, 7, 5, 6), case["kernel_size"], case["dtype"], device,
        bias=case["bias"], ties=case["rounded"], layout=case["layout"],
    )  # fmt: skip
    check(backend, inputs, output=case["output"], ties=case["ties"], order=case["order"])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_equal_maxima(backend, device, output, ties, layout):
    inputs = draw((1, 9, 4, 5), dtype=torch.float64, device=device, ties=True, layout=layout)
    inputs["x"][..., 0, :] = 1.0  # all channels tie
    inputs["x"][..., 1, :].clamp_(max=0.0)  # the maximum is what masked lanes may read
    check(backend, inputs, output=output, ties=ties)


def test_first_of_equal_maxima_has_the_gradient(backend, device):
    x = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0], device=device).view(1, 5, 1, 1)
    weight = torch.tensor([0.0, 1.0], device=device).view(1, 2, 1, 1)
    for ties, expected in (("first", [0, 1, 0, 0, 0]), ("even", [0, 1 / 3, 1 / 3, 0, 1 / 3])):
        leaf = x.clone().requires_grad_()
        attnk.spatial_gate(leaf, weight, output="logit", ties=ties, backend=backend).backward()
        assert torch.equal(leaf.grad.flatten(), torch.tensor(expected, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output", OUTPUTS)
def test_half_precision_in_pytorch(device, output, dtype):
    check("torch", draw((2, 40, 5, 6), 7, dtype, device), output=output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "channel_slice"])
@pytest.mark.parametrize(("output", "ties"), [("gated", "first"), ("residual", "even"), ("map", "first")])
def test_pytorch_path_in_tiles(device, output, ties, layout, dtype, monkeypatch):
    monkeypatch.setattr("attnk.fallback.spatial_gate.SMALL_ELEMENTS", 0)
    monkeypatch.setattr("attnk.fallback.spatial_gate.TILE_ELEMENTS", 100)  # a few rows of an image at a time
    inputs = draw((3, 5, 7, 6), dtype=dtype, device=device, ties=True, layout=layout)
    check("torch", inputs, output=output, ties=ties)
    monkeypatch.setattr("attnk.fallback.spatial_gate.TILE_ELEMENTS", 500)  # two images at a time
    check("torch", inputs, output=output, ties=ties)


@pytest.mark.parametrize(
    "case",
    pairwise(
        shape=(
            (2, 1, 4, 5), (1, 1, 1, 1), (2, 6, 1, 1), (2, 3, 1, 7), (2, 3, 7, 1), (1, 13, 2, 3), (5, 2, 3, 3),
            (1, 70, 3, 2), (1, 2, 11, 13),
        ),
        output=OUTPUTS,
        ties=TIES,
        kernel_size=(3, 7),
        layout=("contiguous", "channels_last"),
    ),
)  # fmt: skip
def test_odd_shapes(backend, device, case):
    inputs = draw(case["shape"], case["kernel_size"], torch.float64, device, layout=case["layout"])
    check(backend, inputs, output=case["output"], ties=case["ties"])


@pytest.mark.parametrize(
    "case",
    pairwise(
        channels=(3, 4, 5, 8, 16, 17, 32),  # block_c = 4
        plane=((7, 1), (2, 4), (3, 3), (1, 8), (4, 4), (1, 17)),  # block_p = 8
        num_stages=(1, 2, 3, 4, 5),
        rounded=(True, False),
        output=OUTPUTS,
        ties=TIES,
        layout=("contiguous", "channels_last"),
        lag=(0, 3),
    ),
)
def test_sizes_around_the_blocks(kernels, device, case):
    shape = (2, case["channels"], *case["plane"])
    inputs = draw(shape, dtype=torch.float64, device=device, layout=case["layout"], ties=case["rounded"])
    with configured(kernels, block_p=8, block_c=4, num_stages=case["num_stages"], lag=case["lag"]):
        check("triton", inputs, output=case["output"], ties=case["ties"])


@pytest.mark.parametrize("output", ["gated", "map"])
def test_without_a_batch(backend, device, output):
    for layout in ("contiguous", "channels_last", "transposed"):
        inputs = draw((1, 5, 4, 6), device=device, layout=layout)
        inputs["x"] = inputs["x"].squeeze(0)
        assert_matches_reference(
            functools.partial(attnk.spatial_gate, backend=backend, output=output),
            lambda x, **rest: spatial_gate_reference(x[None], **rest, output=output)[0],
            inputs,
        )


@pytest.mark.parametrize("output", ["gated", "map"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x(backend, device, layout, output):
    inputs = draw((3, 5, 4, 6), device=device, layout=layout)
    check(backend, inputs, output=output, ties="even" if output == "map" else "first")


@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_gradient(backend, device, layout, x_layout):
    inputs = draw((3, 5, 4, 6), device=device, layout=x_layout)
    dout = dict(layouts(torch.randn(3, 5, 4, 6, device=device)))[layout]
    check(backend, inputs, dout=dout)
    if x_layout == "contiguous":
        check(backend, inputs, output="map", dout=dout[:, 1:2])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kept", [(1, 1, 1, 1), (3, 1, 4, 6), (3, 5, 1, 1), (1, 5, 4, 6)])
def test_expanded_gradients(backend, device, kept, layout):
    # the gradients of sum(), mean(1), mean((2, 3)) and sum(0)
    inputs = draw((3, 5, 4, 6), device=device, layout=layout)
    check(backend, inputs, dout=torch.randn(kept, device=device).expand(3, 5, 4, 6))


def test_gradients_from_cat_and_split(backend, device):
    inputs = draw((2, 6, 3, 4), dtype=torch.float64, device=device)

    def around(gate: Any, x: torch.Tensor, **rest: Any) -> torch.Tensor:
        one, other = gate(x, **rest).split(3, 1)
        return torch.cat([other.mul(2), x, one.transpose(2, 3).flip(2).transpose(2, 3)], 1)

    assert_matches_reference(
        functools.partial(around, functools.partial(attnk.spatial_gate, backend=backend)),
        functools.partial(around, spatial_gate_reference),
        inputs,
    )


def test_layout_of_the_weight(backend, device):
    inputs = draw((2, 5, 4, 6), 5, device=device)
    inputs["weight"] = inputs["weight"].contiguous(memory_format=torch.channels_last)
    check(backend, inputs, order="max_avg")
    wide = torch.randn(1, 4, 5, 10, device=device)
    inputs["weight"] = wide[:, ::2, :, ::2]
    check(backend, inputs)


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_output_keeps_the_memory_format(backend, device, output, memory_format):
    inputs = draw((2, 5, 4, 6), device=device)
    inputs["x"] = inputs["x"].contiguous(memory_format=memory_format)
    for grad in (False, True):
        out = attnk.spatial_gate(inputs["x"].requires_grad_(grad), *list(inputs.values())[1:], output=output,
                                 backend=backend)  # fmt: skip
        assert out.is_contiguous(memory_format=memory_format)
        assert out.shape == ((2, 5, 4, 6) if output in ("gated", "residual") else (2, 1, 4, 6))


@needs_interpreter
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice", "channels_last_slice", "expanded"])
def test_no_hidden_copy(kernels, layout):
    x = draw((3, 5, 4, 6), layout=layout)["x"]
    read, _ = kernels.forward.addressable(x, x.stride(1) < x.stride(3))
    assert read is x


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
@pytest.mark.parametrize(("output", "order"), [("gated", "avg_max"), ("residual", "max_avg")])
def test_one_launch_equals_two(kernels, device, output, order, memory_format):
    inputs = draw((2, 7, 3, 5), 3, torch.float32, device)
    inputs["x"] = inputs["x"].contiguous(memory_format=memory_format)
    n_tiles = 4  # 15 pixels in blocks of 4
    results, launched = [], []
    for lag in (0, n_tiles - 1, n_tiles, n_tiles + 3):
        config = kernels.common.SpatialGateConfig(block_p=4, block_c=4, num_warps=4, num_stages=1, lag=lag)
        with Meter() if dispatch.INTERPRETED else contextlib.nullcontext() as meter:
            kept = kernels.spatial_gate_forward(*inputs.values(), order, output, "first", config=config)
            alone = kernels.spatial_gate_forward(*inputs.values(), order, output, "first", keep=False, config=config)
            dout = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1)).to(inputs["x"])
            grads = kernels.spatial_gate_backward(
                dout, inputs["x"], inputs["weight"], *kept[1:], 7, memory_format == torch.channels_last,
                order, output, "first", True, True, config=config,
            )  # fmt: skip
        results.append([*kept, alone[0], *grads])
        if meter is not None:
            launched.append([launch.kernel for launch in meter.launches])
    for result in results[1:]:
        assert_same_bits(result, results[0])
    if launched:
        names = [[name.removeprefix("_spatial_gate_").removesuffix("_kernel") for name in names] for names in launched]
        small = ["bwd_dweight", "bwd_dweight_sum"]
        two = ["fwd_pool", "fwd", "fwd_pool", "fwd", "bwd_dgate", "bwd_dx", *small]
        one = ["fwd_lagged", "fwd_lagged", "bwd_lagged", *small]
        assert names == [two, two, one, one]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("output", "ties"), [("gated", "first"), ("residual", "even"), ("map", "first")])
def test_lagged_configuration_matches_reference(kernels, device, output, ties, layout):
    inputs = draw((3, 6, 3, 5), 5, device=device, ties=True, layout=layout)
    with configured(kernels, lag=2):  # 15 pixels in blocks of 8
        check("triton", inputs, output=output, ties=ties)


@pytest.mark.parametrize("output", OUTPUTS)
def test_gradcheck(backend, device, output):
    inputs = draw((1, 3, 2, 3), dtype=torch.float64, device=device)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    gate = functools.partial(attnk.spatial_gate, output=output, backend=backend)
    torch.autograd.gradcheck(gate, leaves, fast_mode=backend == "triton" and dispatch.INTERPRETED)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_gradcheck_of_the_definition(output, ties):
    inputs = draw((1, 2, 2, 2), dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    gate = functools.partial(attnk.spatial_gate, output=output, ties=ties, backend="reference")
    torch.autograd.gradcheck(gate, leaves)
    torch.autograd.gradgradcheck(gate, leaves, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_second_differentiation_raises(backend, device, name):
    inputs = draw((1, 3, 3, 4), device=device)
    gate = functools.partial(attnk.spatial_gate, backend=backend)
    leaf = inputs[name].requires_grad_()
    (grad,) = torch.autograd.grad(gate(**inputs).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(grad.square().sum(), leaf)

    def once(tensor: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda tensor: gate(**{**inputs, name: tensor}).sum())(tensor).sum()

    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.func.grad(once)(leaf.detach())


def test_create_graph_of_a_first_derivative(backend, device):
    x, weight, bias = (tensor.requires_grad_() for tensor in draw((1, 3, 3, 4), device=device).values())
    plain = torch.autograd.grad(attnk.spatial_gate(x, weight, bias, backend=backend).sum(), (x, weight, bias))
    out = attnk.spatial_gate(x, weight, bias, backend=backend)
    created = torch.autograd.grad(out.sum(), (x, weight, bias), create_graph=True)
    assert_same_bits([grad.detach() for grad in created], list(plain))


def spoil(inputs: dict[str, torch.Tensor | None], what: str) -> None:
    x = inputs["x"]
    nan, inf = float("nan"), float("inf")
    if what == "nan":
        x[0, 1, 2, 1] = nan
    elif what == "nan_twice":
        x[0, 1:3, 2, 1] = nan
    elif what == "nan_channel":
        x[0, 2] = nan
    elif what == "inf":
        x[0, 1, 2, 1] = inf
    elif what == "minus_inf":
        x[0, 1, 2, 1] = -inf
    elif what == "minus_inf_row":
        x[0, :, 2, 1] = -inf
    elif what == "both_infs":
        x[0, 0, 2, 1], x[0, 1, 2, 1] = -inf, inf
    elif what == "inf_beside_nan":
        x[0, 0, 2, 1], x[0, 1, 2, 1] = inf, nan
    elif what == "large_logits":
        inputs["bias"].fill_(1e4)
    elif what == "small_logits":
        inputs["bias"].fill_(-1e4)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    "what",
    ["nan", "nan_twice", "nan_channel", "inf", "minus_inf", "minus_inf_row", "both_infs", "inf_beside_nan",
     "large_logits", "small_logits"],
)  # fmt: skip
def test_nan_and_infinities(backend, device, what, output):
    for ties, layout in zip(TIES, ("contiguous", "channels_last"), strict=True):
        inputs = draw((2, 4, 7, 3), device=device, layout=layout)
        spoil(inputs, what)
        check(backend, inputs, output=output, ties=ties)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_nan_behind_the_channels_does_not_leak(backend, device, output, ties):
    values = torch.randn(2, 3, 4, 5, device=device)
    dout = torch.randn(2, 3 if output in ("gated", "residual") else 1, 4, 5, device=device)
    for memory_format in MEMORY_FORMATS.values():
        inputs = draw((2, 3, 4, 5), device=device)
        padded = torch.full((2, 8, 4, 5), float("nan"), device=device).contiguous(memory_format=memory_format)
        inputs["x"] = padded[:, 2:5]
        inputs["x"].copy_(values)
        douts = torch.full((2, 8, 4, 5), float("nan"), device=device).contiguous(memory_format=memory_format)
        douts[:, 2 : 2 + dout.shape[1]] = dout
        check(backend, inputs, output=output, ties=ties, dout=douts[:, 2 : 2 + dout.shape[1]])


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 0, 0)])
def test_empty(backend, device, shape, output):
    for ties, memory_format in zip(TIES, MEMORY_FORMATS.values(), strict=True):
        x, weight, bias = draw(shape, device=device).values()
        x = x.contiguous(memory_format=memory_format)
        leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
        out = attnk.spatial_gate(*leaves, output=output, ties=ties, backend=backend)
        assert out.shape == (shape if output in ("gated", "residual") else (shape[0], 1, *shape[2:]))
        out.sum().backward()
        assert x.grad.shape == shape
        assert torch.equal(weight.grad, torch.zeros_like(weight))
        assert torch.equal(bias.grad, torch.zeros_like(bias))
        check(backend, {"x": x.detach(), "weight": weight.detach(), "bias": bias.detach()}, output=output, ties=ties)


def test_empty_without_a_batch(backend, device):
    x, weight, bias = draw((3, 0, 5), device=device).values()
    assert attnk.spatial_gate(x, weight, bias, backend=backend).shape == (3, 0, 5)


X = torch.zeros(1, 3, 4, 4)
W = torch.zeros(1, 2, 3, 3)
B = torch.zeros(1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([1.0], W), TypeError, "x must be a tensor, got list"),
        (lambda f: f(X, [1.0]), TypeError, "weight must be a tensor, got list"),
        (lambda f: f(X, W, 0.5), TypeError, "bias must be a tensor, got float"),
        (lambda f: f(X[0, 0], W), ValueError, r"x must be \(B, C, H, W\) or \(C, H, W\), got 2 dimensions: \(4, 4\)"),
        (lambda f: f(X[None], W), ValueError, "x must be .* got 5 dimensions"),
        (lambda f: f(X[:, :0], W), ValueError, r"x must have at least one channel, got \(1, 0, 4, 4\)"),
        (lambda f: f(X[0, :0], W), ValueError, r"x must have at least one channel, got \(0, 4, 4\)"),
        (lambda f: f(X.int(), W), TypeError, "x must be float16, .* got torch.int32"),
        (lambda f: f(X.bool(), W), TypeError, "x must be float16, .* got torch.bool"),
        (lambda f: f(X.cfloat(), W), TypeError, "x must be float16, .* got torch.complex64"),
        (lambda f: f(X.to(torch.float8_e4m3fn), W), TypeError, "x must be float16, .* got torch.float8_e4m3fn"),
        (lambda f: f(X, W.double()), TypeError, "weight must have the dtype of x, torch.float32, got torch.float64"),
        (lambda f: f(X.half(), W), TypeError, "weight must have the dtype of x, torch.float16, got torch.float32"),
        (lambda f: f(X, W, B.half()), TypeError, "bias must have the dtype of x, torch.float32, got torch.float16"),
        (lambda f: f(X, W.to("meta")), ValueError, "weight must be on the device of x, .* got meta"),
        (lambda f: f(X, W, B.to("meta")), ValueError, "bias must be on the device of x, .* got meta"),
        (lambda f: f(X, W[:, :1]), ValueError, r"weight must be \(1, 2, k, k\) with k odd, got \(1, 1, 3, 3\)"),
        (lambda f: f(X, W.expand(2, -1, -1, -1)), ValueError, r"weight must be .* got \(2, 2, 3, 3\)"),
        (lambda f: f(X, W[..., :1]), ValueError, r"weight must be .* got \(1, 2, 3, 1\)"),
        (lambda f: f(X, W[..., :2, :2]), ValueError, r"weight must be .* k odd, got \(1, 2, 2, 2\)"),
        (lambda f: f(X, W[..., :0, :0]), ValueError, r"weight must be .* k odd, got \(1, 2, 0, 0\)"),
        (lambda f: f(X, W[0]), ValueError, r"weight must be .* got \(2, 3, 3\)"),
        (lambda f: f(X, W, B.expand(2)), ValueError, r"bias must be \(1,\), got \(2,\)"),
        (lambda f: f(X, W, B[0]), ValueError, r"bias must be \(1,\), got \(\)"),
        (lambda f: f(X, W, order="max"), ValueError, "order must be one of 'avg_max', 'max_avg', got 'max'"),
        (lambda f: f(X, W, output="x"), ValueError, "output must be one of 'gated', 'map', .* got 'x'"),
        (lambda f: f(X, W, ties="last"), ValueError, "ties must be one of 'first', 'even', got 'last'"),
        (lambda f: f(X, W, backend="cuda"), ValueError, "backend must be one of 'auto', 'triton', .* got 'cuda'"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(attnk.spatial_gate)


def test_errors_in_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        attnk.spatial_gate(X, W.double(), B.half())
        with pytest.raises(TypeError, match=r"weight must be float16, .* got torch.int64"):
            attnk.spatial_gate(X, W.long())


@pytest.mark.filterwarnings("ignore:attnk.spatial_gate runs in plain PyTorch")
def test_kernel_size_beyond_the_kernels(device):
    inputs = draw((1, 3, 4, 5), 17, device=device)
    with pytest.raises(attnk.Unsupported, match="kernel size up to 15, got 17"):
        attnk.spatial_gate(**inputs, backend="triton")
    check("auto", inputs)
    check("torch", inputs)


@pytest.mark.parametrize("output", ["gated", "map"])
@pytest.mark.parametrize("names", [names for size in (1, 2) for names in itertools.combinations(NAMES, size)], ids=str)
def test_subsets_of_gradients(backend, device, names, output):
    inputs = draw((2, 5, 3, 4), device=device)
    check(backend, inputs, grads=names, output=output)
    leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in inputs.items()}
    attnk.spatial_gate(**leaves, output=output, backend=backend).sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in names)


def test_no_graph_where_none_is_wanted(backend, device):
    inputs = draw((2, 5, 3, 4), device=device)
    expected = attnk.spatial_gate(**inputs, backend=backend)
    assert expected.grad_fn is None
    wanting = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    with torch.no_grad():
        out = attnk.spatial_gate(**wanting, backend=backend)
    assert out.grad_fn is None
    assert not out.requires_grad
    assert torch.equal(out, expected)
    with torch.inference_mode():
        out = attnk.spatial_gate(**wanting, backend=backend)
        assert out.is_inference()
    assert out.grad_fn is None
    assert torch.equal(out, expected)
    check(backend, inputs, grads=())


def saved_bytes(x: torch.Tensor, rest: list[torch.Tensor], **options: str) -> tuple[bool, int]:
    """Whether the forward saved x for its backward, and how many bytes besides."""
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attnk.spatial_gate(x, *rest, **options)
    others = [tensor for tensor in saved if tensor.data_ptr() != x.data_ptr()]
    return len(others) < len(saved), sum(tensor.numel() * tensor.element_size() for tensor in others)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_for_backward(backend, device, output, ties, dtype):
    x, weight, bias = draw((1, 32, 16, 16), 3, dtype, device).values()
    saves_x, other = saved_bytes(x.requires_grad_(), [weight, bias], output=output, ties=ties, backend=backend)
    assert saves_x == (output in ("gated", "residual") or ties == "even")
    # gate, two maps, the index of the maximum, the weight: nothing with channels
    assert other <= 4 * 256 + 8 * 18 * 18 + 8 * 256 + weight.nbytes


@pytest.mark.parametrize(
    ("output", "ties", "allowed"),
    [("gated", "first", False), ("residual", "even", False), ("map", "even", False), ("map", "first", True),
     ("logit", "first", True)],
)  # fmt: skip
def test_input_changed_in_place(backend, device, output, ties, allowed):
    inputs = draw((2, 5, 3, 4), device=device)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
    x = leaves[0] * 1
    out = attnk.spatial_gate(x, *leaves[1:], output=output, ties=ties, backend=backend)
    x.zero_()
    if not allowed:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        return
    grads = torch.autograd.grad(out, leaves[1:], torch.ones_like(out))
    fresh = [tensor.clone().requires_grad_() for tensor in inputs.values()]
    expected = attnk.spatial_gate(*fresh, output=output, ties=ties, backend=backend)
    assert_same_bits(list(grads), list(torch.autograd.grad(expected, fresh[1:], torch.ones_like(out))))


@pytest.mark.parametrize("output", ["gated", "map"])
def test_output_changed_in_place(backend, device, output):
    inputs = draw((2, 5, 3, 4), dtype=torch.float64, device=device)
    assert_matches_reference(
        lambda **tensors: attnk.spatial_gate(**tensors, output=output, backend=backend).mul_(2).add_(1),
        lambda **tensors: spatial_gate_reference(**tensors, output=output) * 2 + 1,
        inputs,
    )


@pytest.mark.parametrize("output", OUTPUTS)
def test_retain_graph(backend, device, output):
    leaves = [tensor.requires_grad_() for tensor in draw((2, 5, 3, 4), device=device).values()]
    out = attnk.spatial_gate(*leaves, output=output, backend=backend)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dout)
    assert_same_bits(list(first), list(second))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("output", "ties"), [("gated", "first"), ("map", "even")])
def test_repeats(backend, device, output, ties, layout):
    inputs = draw((2, 6, 9, 7), 7, device=device, ties=True, layout=layout)
    expected = run(backend, inputs, output=output, ties=ties)
    for _ in range(3 if backend == "triton" and dispatch.INTERPRETED else 20):
        assert_same_bits(run(backend, inputs, output=output, ties=ties), expected)


def test_repeats_in_tiles(device):
    inputs = draw((4, 64, 40, 40), 7, device=device)
    expected = run("torch", inputs)
    for _ in range(20):
        assert_same_bits(run("torch", inputs), expected)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_x", [False, True])
def test_autocast(backend, device, dtype, half_x, output):
    if half_x and dtype == torch.bfloat16 and backend == "triton" and dispatch.INTERPRETED:
        pytest.skip("the interpreter truncates to bfloat16")
    inputs = draw((2, 5, 6, 4), device=device)
    if half_x:
        inputs["x"] = inputs["x"].to(dtype)

    def under_autocast(gate: Any, **tensors: Any) -> torch.Tensor:
        with torch.autocast(device, dtype):
            return gate(**tensors)

    gate = functools.partial(attnk.spatial_gate, output=output, backend=backend)
    # the definition rounds the logit to the autocast dtype, so its own error is the larger
    assert_matches_reference(
        functools.partial(under_autocast, gate),
        functools.partial(under_autocast, functools.partial(spatial_gate_reference, output=output)),
        inputs,
    )
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out = under_autocast(gate, **leaves)
    assert out.dtype == (dtype if half_x or output in ("map", "logit") else torch.float32)
    out.float().square().mean().backward()
    for leaf in leaves.values():
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.isfinite().all()


def test_autocast_leaves_float64_alone(backend, device):
    inputs = draw((2, 5, 6, 4), dtype=torch.float64, device=device)
    with torch.autocast(device, torch.bfloat16):
        check(backend, inputs, output="map")


def definition(options: dict[str, str]) -> Any:
    return functools.partial(spatial_gate_reference, **options)


@pytest.mark.parametrize(
    "options",
    [{"output": "gated"}, {"output": "map"}, {"output": "residual", "ties": "even"},
     {"output": "logit", "order": "max_avg"}],
    ids=lambda options: options["output"],
)  # fmt: skip
def test_compile(backend, device, options, fresh_dynamo):
    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def compiled(x, weight, bias):
        return attnk.spatial_gate(x, weight, bias, backend=backend, **options)

    inputs = draw((2, 5, 3, 4), device=device)
    assert_matches_reference(compiled, definition(options), inputs)
    inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    assert_matches_reference(compiled, definition(options), inputs)
    assert_matches_reference(compiled, definition(options), inputs, grads=())


def test_compile_in_a_network(backend, device, fresh_dynamo):
    inputs = draw((2, 5, 4, 6), device=device)

    def network(gate: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return gate(torch.sin(x) * 2, weight, bias).cos() + x

    def fused(**tensors: torch.Tensor) -> torch.Tensor:
        return network(functools.partial(attnk.spatial_gate, backend=backend), **tensors)

    compiled = torch.compile(fused, fullgraph=True, backend="inductor")
    assert_matches_reference(compiled, functools.partial(network, spatial_gate_reference), inputs)


def test_compile_dynamic_shapes(backend, device, fresh_dynamo):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @functools.partial(torch.compile, fullgraph=True, backend=counter)
    def compiled(x, weight, bias):
        return attnk.spatial_gate(x, weight, bias, backend=backend)

    for shape in ((2, 5, 4, 6), (3, 7, 5, 8), (4, 6, 9, 3)):
        assert_matches_reference(compiled, spatial_gate_reference, draw(shape, device=device))
    assert counter.frame_count <= 2


class Network(torch.nn.Module):
    def __init__(self, tensors: list[torch.Tensor], **options: str) -> None:
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(tensor) for tensor in tensors)
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return attnk.spatial_gate(x, self.weight, self.bias, **self.options)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("output", ["gated", "map"])
def test_export(backend, device, output, strict, fresh_dynamo):
    x, *rest = draw((2, 5, 4, 6), device=device).values()
    network = Network(rest, output=output, backend=backend)
    size = torch.export.Dim
    exported = torch.export.export(
        network, (x,), strict=strict, dynamic_shapes={"x": {0: size("b"), 2: size("h"), 3: size("w")}}
    )
    assert "attnk.spatial_gate_forward" in str(exported)
    inputs = draw((3, 5, 7, 5), device=device)
    assert_matches_reference(
        lambda x, **_: exported.module()(x),
        lambda x, **_: spatial_gate_reference(x, *(tensor.to(x.dtype) for tensor in rest), output=output),
        {"x": inputs["x"]},
        grads=(),
    )


PERMUTED = ["contiguous", "channels_last", "transposed", "batch_innermost", "crop"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", PERMUTED)
@pytest.mark.parametrize(("output", "ties"), [("gated", "even"), ("map", "first")])
def test_opcheck(backend, device, output, ties, layout, fresh_dynamo):
    inputs = draw((3, 5, 4, 6), dtype=torch.float64, device=device, layout=layout)
    x, weight, _ = inputs.values()
    ops = torch.ops.attnk
    shared = ("avg_max", output)
    torch.library.opcheck(ops.spatial_gate_infer.default, (*inputs.values(), *shared, ties, backend))
    torch.library.opcheck(ops.spatial_gate_forward.default, (*inputs.values(), *shared, ties, backend))
    out, *kept = ops.spatial_gate_forward(*inputs.values(), *shared, ties, backend)
    dout = dict(layouts(torch.randn(out.shape, dtype=out.dtype, device=device)))[layout]
    reads_x = output == "gated" or ties == "even"
    for needs in ((True, True), (True, False), (False, True)):
        arguments = (
            dout, x if reads_x else None, weight, *kept, 5, x.stride(1) < x.stride(3), *shared, ties, *needs, backend,
        )  # fmt: skip
        torch.library.opcheck(
            ops.spatial_gate_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output", ["gated", "map"])
def test_fake_strides_are_real_strides(backend, device, output, layout):
    inputs = draw((3, 5, 4, 6), device=device, layout=layout)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    real = attnk.spatial_gate(*leaves, output=output, backend=backend)
    grads = torch.autograd.grad(real.sum(), leaves)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = [mode.from_tensor(leaf).detach().requires_grad_() for leaf in leaves]
        fake = attnk.spatial_gate(*fakes, output=output, backend=backend)
        fake_grads = torch.autograd.grad(fake.sum(), fakes)
    for one, other in zip((real, *grads), (fake, *fake_grads), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("output", ["gated", "map"])
def test_func_grad(backend, device, output):
    inputs = draw((2, 5, 3, 4), device=device)
    options = {"output": output}

    def gradient(gate: Any, position: int, x: Any, weight: Any, bias: Any) -> torch.Tensor:
        return torch.func.grad(lambda *tensors: gate(*tensors).square().sum(), position)(x, weight, bias)

    for position in range(3):
        assert_matches_reference(
            functools.partial(gradient, functools.partial(attnk.spatial_gate, backend=backend, **options), position),
            functools.partial(gradient, definition(options), position),
            inputs,
            grads=(),
        )


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("output", ["gated", "logit"])
@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None), (2, None, None), (None, 0, None), (0, 0, 0), (None, None, 0), (1, 0, None)],
    ids=str,
)
def test_vmap(backend, device, in_dims, output, ties):
    if (ties == "even") != (in_dims == (0, None, None)):
        pytest.skip("one case of even ties is enough")
    inputs = draw((2, 3, 2, 4), device=device)
    for name, dim in zip(NAMES, in_dims, strict=True):
        if dim is not None:
            inputs[name] = torch.stack([inputs[name], inputs[name] * 2 - 0.5, inputs[name].flip(0)], dim)

    def mapped(**tensors: torch.Tensor) -> torch.Tensor:
        gate = functools.partial(attnk.spatial_gate, output=output, ties=ties, backend=backend)
        return torch.vmap(gate, in_dims)(*tensors.values())

    def looped(**tensors: torch.Tensor) -> torch.Tensor:
        return one_by_one(in_dims, definition({"output": output, "ties": ties}), *tensors.values())

    assert_matches_reference(mapped, looped, inputs)


@pytest.mark.parametrize("output", ["gated", "map"])
def test_vmap_without_a_batch(backend, device, output):
    inputs = draw((3, 4, 2, 4), device=device)
    assert_matches_reference(
        lambda **tensors: torch.vmap(
            functools.partial(attnk.spatial_gate, output=output, backend=backend), (0, None, None)
        )(*tensors.values()),
        definition({"output": output}),
        inputs,
    )


@pytest.mark.parametrize("output", ["gated", "map"])
def test_vmap_of_grad(backend, device, output):
    # gradients an example, as differentially private training wants them
    inputs = draw((2, 1, 3, 2, 4), device=device)
    options = {"output": output}

    def gradient(gate: Any, position: int, *tensors: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda *tensors: gate(*tensors).square().sum(), position)(*tensors)

    gate = functools.partial(attnk.spatial_gate, backend=backend, **options)
    in_dims = (0, None, None)
    for position in range(3):
        mapped = torch.vmap(functools.partial(gradient, gate, position), in_dims)
        looped = functools.partial(one_by_one, in_dims, functools.partial(gradient, definition(options), position))
        assert_matches_reference(
            lambda mapped=mapped, **tensors: mapped(*tensors.values()),
            lambda looped=looped, **tensors: looped(*tensors.values()),
            inputs,
            grads=(),
        )


@pytest.mark.parametrize("output", ["gated", "map"])
def test_jacrev(backend, device, output):
    inputs = draw((1, 2, 2, 2), device=device)
    options = {"output": output}
    for position in range(3):
        gate = functools.partial(attnk.spatial_gate, backend=backend, **options)
        assert_matches_reference(
            lambda gate=gate, position=position, **tensors: torch.func.jacrev(gate, position)(*tensors.values()),
            lambda position=position, **tensors: torch.func.jacrev(definition(options), position)(*tensors.values()),
            inputs,
            grads=(),
        )


def test_forward_mode_raises(backend, device):
    x, weight, bias = draw((1, 2, 2, 3), device=device).values()
    gate = functools.partial(attnk.spatial_gate, weight=weight, bias=bias, backend=backend)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(gate, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        gate(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(backend, device, reentrant):
    inputs = draw((2, 5, 3, 4), device=device)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    gate = functools.partial(attnk.spatial_gate, backend=backend)
    gate(*leaves).square().sum().backward()
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    checkpoint.checkpoint(gate, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert_same_bits([leaf.grad for leaf in leaves], expected)


def test_selective_checkpoint(backend, device):
    inputs = draw((2, 5, 3, 4), device=device)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    expected = run(backend, inputs)[1:]
    seen, forward = [], torch.ops.attnk.spatial_gate_forward.default

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
        seen.append((op, context.is_recompute))
        return checkpoint.CheckpointPolicy.MUST_SAVE if op == forward else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    out = checkpoint.checkpoint(
        functools.partial(attnk.spatial_gate, backend=backend), *leaves, use_reentrant=False,
        context_fn=functools.partial(checkpoint.create_selective_checkpoint_contexts, policy),
    )  # fmt: skip
    dout = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
    assert_same_bits(list(torch.autograd.grad(out, leaves, dout)), expected)
    assert (forward, False) in seen


@pytest.mark.parametrize(
    "names", [(), ("x",), ("weight",), ("bias",), ("x", "bias"), ("x", "weight"), NAMES], ids="+".join
)
@pytest.mark.parametrize("output", ["gated", "map"])
def test_flops(backend, device, output, names):
    counts = []
    for gate in (functools.partial(attnk.spatial_gate, backend=backend), spatial_gate_reference):
        inputs = draw((2, 5, 6, 4), 5, device=device)
        leaves = {name: tensor.requires_grad_(name in names) for name, tensor in inputs.items()}
        with FlopCounterMode(display=False) as forward:
            out = gate(**leaves, output=output)
        with FlopCounterMode(display=False) as backward:
            if names:
                out.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    convolution = 2 * 2 * 25 * 2 * 24
    # the bias's gradient comes with the weight's, of which the definition has none where only the bias asks
    assert counts[0] == (convolution, convolution * (("x" in names) + ("weight" in names or "bias" in names)))
    assert counts[0] == counts[1] or ("bias" in names and "weight" not in names)


def test_threads(backend, device):
    if backend == "triton" and dispatch.INTERPRETED:
        pytest.skip("the interpreter runs one kernel at a time")
    inputs = [draw((2, 5 + i, 20, 30), 7, device=device) for i in range(8)]
    expected = [run(backend, one) for one in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for result, wanted in zip(pool.map(functools.partial(run, backend), inputs), expected, strict=True):
                assert_same_bits(result, wanted)


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
@pytest.mark.parametrize(("output", "ties"), [("gated", "first"), ("map", "even")])
def test_offsets_beyond_32_bits(kernels, output, ties, shape, strides):
    if not dispatch.INTERPRETED:
        pytest.skip("lies in CPU memory")
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert last > 2**31 - 1
    inputs = draw(shape, dtype=torch.float16)
    spread = []
    for values in (inputs["x"], torch.randn(shape).half()):
        sparse = mmap.mmap(-1, 2 * (last + 1))  # pages that nothing touches take no memory
        tensor = torch.frombuffer(sparse, dtype=torch.float16).as_strided(shape, strides)
        spread.append(tensor.copy_(values))
    inputs["x"], dout = spread
    if output == "map":
        dout = dout[:, :1]
    read, _ = kernels.forward.addressable(inputs["x"], inputs["x"].stride(1) < inputs["x"].stride(3))
    assert read is inputs["x"]
    with Meter():  # fails on a 32-bit overflow
        check("triton", inputs, output=output, ties=ties, dout=dout)


def bytes_of_launches(
    x: torch.Tensor, weight: torch.Tensor, output: str, ties: str, keep: bool
) -> dict[str, dict[str, int]]:
    """The closed formula in the docstring of ``attnk.kernels.spatial_gate``, and besides the weight and dweight."""
    batch, _, height, width = x.shape
    kernel = weight.shape[-1]
    size = x.element_size()
    acc = 8 if x.dtype == torch.float64 else 4
    moved, pixels = x.numel() * size, batch * height * width
    framed = batch * (height + kernel - 1) * (width + kernel - 1)
    scaled, first = output in ("gated", "residual"), ties == "first"
    rereads = 0 if first else moved + acc * pixels
    weights = weight.numel() * size

    pool = {"loaded": moved, "stored": 2 * acc * framed + (4 * pixels if keep and first and not scaled else 0)}
    gate = {
        "loaded": 2 * acc * framed + weights + size + (moved if scaled else 0),
        "stored": (acc * pixels if keep else 0) + (moved if scaled else pixels * size),
    }
    counts = {"fwd_pool": pool, "fwd": gate}
    if keep:
        dgate = {"loaded": acc * pixels * (output != "logit"), "stored": acc * framed}
        if scaled:
            dgate["loaded"] += 2 * moved + acc * pixels
        else:
            dgate["loaded"] += pixels * size + rereads
        if scaled or not first:
            dgate["stored"] += 4 * pixels
        dx = {"loaded": acc * framed + 4 * pixels + weights + rereads, "stored": moved}
        if scaled:
            dx["loaded"] += moved + acc * pixels
        counts |= {"bwd_dgate": dgate, "bwd_dx": dx}
        counts["bwd_dweight"] = {"loaded": 2 * acc * framed + acc * pixels}
        counts["bwd_dweight_sum"] = {"stored": weights + size}
    return counts


@needs_interpreter
@pytest.mark.parametrize(
    "case",
    pairwise(
        output=OUTPUTS,
        ties=TIES,
        keep=(True, False),
        dtype=DTYPES,
        kernel_size=(3, 7),
        memory_format=list(MEMORY_FORMATS.values()),
        shape=((2, 5, 6, 7), (1, 8, 16, 2), (3, 1, 5, 1)),
        num_stages=(1, 2, 4),
    ),
)
def test_bytes_are_the_formula(kernels, case):
    inputs = draw(case["shape"], case["kernel_size"], case["dtype"])
    x = inputs["x"] = inputs["x"].contiguous(memory_format=case["memory_format"])
    output, ties, keep = case["output"], case["ties"], case["keep"]
    for tensor in inputs.values():
        tensor.requires_grad_(keep)
    with configured(kernels, block_p=8, block_c=4, num_stages=case["num_stages"]), Meter() as meter:
        out = attnk.spatial_gate(**inputs, output=output, ties=ties, backend="triton")
        if keep:
            torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))
    launches = {
        launch.kernel.removeprefix("_spatial_gate_").removesuffix("_kernel"): launch for launch in meter.launches
    }
    assert len(launches) == len(meter.launches)
    expected = bytes_of_launches(x, inputs["weight"], output, ties, keep)
    assert list(launches) == list(expected)
    for name, counts in expected.items():
        for what, count in counts.items():
            assert getattr(launches[name], what) == count, f"{name} {what}"

    # as issued: nothing twice, but the rows of the convolution
    kernel, size = case["kernel_size"], x.element_size()
    acc = 8 if case["dtype"] == torch.float64 else 4
    blocks = x.shape[0] * -(-x.shape[2] * x.shape[3] // 8)
    row_lanes = blocks * 8 * kernel**2 * acc
    weight_lanes = blocks * 2 * kernel**2 * size
    for name, launch in launches.items():
        assert launch.atomics == 0
        assert launch.store_lanes == launch.stored, name
        if name in ("fwd_pool", "bwd_dgate", "bwd_dweight_sum"):
            assert launch.load_lanes == launch.loaded, name
    framed = x.shape[0] * (x.shape[2] + kernel - 1) * (x.shape[3] + kernel - 1)
    weights = inputs["weight"].numel() * size
    gate = launches["fwd"]
    assert (
        gate.load_lanes - 2 * row_lanes - weight_lanes - blocks * size
        == gate.loaded - 2 * acc * framed - weights - size
    )
    if keep:
        dx = launches["bwd_dx"]
        assert dx.load_lanes - row_lanes - weight_lanes == dx.loaded - acc * framed - weights


@needs_interpreter
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
def test_bytes_of_one_launch(kernels, memory_format):
    inputs = draw((2, 8, 6, 7), 3)
    x = inputs["x"] = inputs["x"].contiguous(memory_format=memory_format)
    for tensor in inputs.values():
        tensor.requires_grad_()
    with configured(kernels, block_p=8, block_c=4, lag=6), Meter() as meter:
        out = attnk.spatial_gate(**inputs, backend="triton")
        out.backward(torch.ones_like(out))
    forward, backward = meter.launches[:2]
    counts = bytes_of_launches(x, inputs["weight"], "gated", "first", True)
    # what two launches read twice has been read once as far as memory is concerned, and written maps come from cache
    assert forward.stored == counts["fwd_pool"]["stored"] + counts["fwd"]["stored"]
    assert forward.loaded == counts["fwd"]["loaded"]
    assert backward.stored == counts["bwd_dgate"]["stored"] + counts["bwd_dx"]["stored"]


@needs_interpreter
def test_bytes_at_64_channels():
    inputs = draw((1, 64, 56, 56), 7)
    x = inputs["x"]
    for tensor in inputs.values():
        tensor.requires_grad_()
    with Meter() as forward:
        out = attnk.spatial_gate(**inputs, backend="triton")
    with Meter() as backward:
        out.backward(torch.ones_like(out))
    with Meter() as attention, torch.no_grad():
        attnk.spatial_gate(**inputs, output="map", backend="triton")
    assert forward.bytes <= 3.1 * x.nbytes
    assert backward.bytes <= 4.2 * x.nbytes
    assert attention.bytes <= 1.1 * x.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    pairwise(
        shape=((4, 64, 112, 112), (8, 64, 56, 56), (8, 256, 28, 28), (16, 512, 14, 14), (16, 2048, 7, 7)),
        dtype=(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        output=OUTPUTS,
        ties=TIES,
        layout=("contiguous", "channels_last"),
    ),
)
def test_network_shapes(backend, case):
    inputs = draw(case["shape"], 7, case["dtype"], "cuda", layout=case["layout"])
    check(backend, inputs, output=case["output"], ties=case["ties"])


@pytest.mark.gpu
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 15])
@pytest.mark.parametrize("output", OUTPUTS)
def test_bfloat16_kernels(output, kernel_size):
    check("triton", draw((3, 40, 13, 17), kernel_size, torch.bfloat16, "cuda", ties=True), output=output)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_launch_equals_two_on_large_maps(kernels, layout):
    inputs = draw((32, 64, 112, 112), 7, torch.float16, "cuda", layout=layout)
    with configured(kernels, block_p=128, block_c=16):
        expected = run("triton", inputs)
    with configured(kernels, block_p=128, block_c=16, lag=264):
        for _ in range(20):
            assert_same_bits(run("triton", inputs), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("output", ["gated", "map"])
def test_repeats_on_network_shapes(backend, output):
    inputs = draw((16, 256, 56, 56), 7, torch.bfloat16, "cuda")
    expected = run(backend, inputs, output=output)
    for _ in range(20):
        assert_same_bits(run(backend, inputs, output=output), expected)


@pytest.mark.gpu
def test_other_stream(backend):
    inputs = draw((8, 256, 56, 56), 7, torch.float32, "cuda")
    expected = run(backend, inputs)
    stream = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # what wrongly runs on the default stream would overtake it
            late = {name: torch.empty_like(tensor).copy_(tensor) for name, tensor in inputs.items()}
            result = run(backend, late)
        stream.synchronize()
        assert_same_bits(result, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("lag", [0, 264])
def test_graph_capture(kernels, lag):
    first, second = (draw((4, 64, 56, 56), 7, torch.float32, "cuda") for _ in range(2))
    static = {name: tensor.clone() for name, tensor in first.items()}
    with configured(kernels, block_p=128, block_c=16, lag=lag):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run("triton", static)  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run("triton", static)
        for inputs in (first, second, first):
            for name, tensor in inputs.items():
                static[name].copy_(tensor)
            graph.replay()
            torch.cuda.synchronize()
            assert_same_bits(results, run("triton", inputs))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_second_device(backend):
    with torch.cuda.device(0):
        check(backend, draw((4, 64, 28, 28), 7, device="cuda:1"))


def needs_memory(gibibytes: int) -> None:
    if torch.cuda.mem_get_info()[1] < gibibytes * 2**30:
        pytest.skip(f"needs a device with {gibibytes} GiB")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_beyond_32_bits(layout):
    needs_memory(40)
    shape = (33, 64, 1024, 1024)
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=MEMORY_FORMATS[layout])
    dout = torch.empty_like(x)
    for image, gradient in zip(x, dout, strict=True):
        image.normal_()
        gradient.normal_()
    weight = torch.randn(1, 2, 7, 7, dtype=torch.float16, device="cuda") / 7
    results = []
    for part, gradient in ((x, dout), (x[-1:].clone(), dout[-1:].clone())):
        leaf = part.requires_grad_()
        out = attnk.spatial_gate(leaf, weight, backend="triton")
        results.append([out.detach()[-1:], torch.autograd.grad(out, leaf, gradient)[0][-1:]])
    assert_same_bits(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_image_beyond_32_bits(layout):
    needs_memory(40)
    shape = (1, 2080, 1024, 1024)
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=MEMORY_FORMATS[layout]).normal_()
    dout = torch.empty_like(x).normal_()
    weight = torch.randn(1, 2, 1, 1, dtype=torch.float16, device="cuda")  # a pixel knows nothing of its neighbours
    results = []
    for rows in (slice(None), slice(-4, None)):
        leaf = x[..., rows, :].detach().requires_grad_()
        out = attnk.spatial_gate(leaf, weight, backend="triton")
        (dx,) = torch.autograd.grad(out, leaf, dout[..., rows, :])
        results.append([out.detach()[..., -4:, :].contiguous(), dx[..., -4:, :].contiguous()])
    assert_same_bits(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_images(layout):
    check("triton", draw((65_537, 4, 1, 1), 3, torch.float32, "cuda", layout=layout))
    check("triton", draw((65_537, 3, 2, 2), 3, torch.float32, "cuda", layout=layout), output="map", ties="even")


@pytest.mark.gpu
def test_gradient_scaler(backend):
    inputs = draw((4, 64, 28, 28), 7, device="cuda")
    weight = torch.nn.Parameter(inputs["weight"])
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler = torch.amp.GradScaler("cuda")
    with torch.autocast("cuda", torch.float16):
        loss = attnk.spatial_gate(inputs["x"], weight, backend=backend).float().square().mean()
    scaler.scale(loss).backward()
    before = weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("output", ["gated", "map"])
@pytest.mark.parametrize("exported_with_grad", [False, True])
def test_exported_programs_train(backend, device, output, exported_with_grad):
    """An exported program calls the operations by themselves: with grad mode on, and for their gradients."""
    ties = "even" if output == "map" else "first"
    module = attnk.SpatialAttention(3, output=output, ties=ties, backend=backend).to(device)
    x = torch.randint(-1, 2, (2, 5, 6, 4), device=device).float().requires_grad_()
    with torch.set_grad_enabled(exported_with_grad):
        program = torch.export.export(module, (x.detach(),)).module()
    results = []
    for gate in (module, program):
        out = gate(x)
        results.append([out.detach(), *torch.autograd.grad((out**2).sum(), (x, *gate.parameters()))])
    assert_same_bits(*results)


@pytest.mark.parametrize("output", OUTPUTS)
def test_second_derivative_of_a_sum_raises(backend, device, output):
    """A constant gradient of the output must not hide that the first derivative depends on x."""
    inputs = draw((1, 2, 3, 3), device=device)
    weight, bias = inputs["weight"], inputs["bias"]

    def gate(x):
        return attnk.spatial_gate(x, weight, bias, output=output, backend=backend).sum()

    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.functional.vhp(gate, inputs["x"], torch.ones_like(inputs["x"]))
    with pytest.raises(NotImplementedError, match="reference"):
        torch.func.grad(lambda x: torch.func.grad(gate)(x).sum())(inputs["x"])


def test_traces_take_other_sizes():
    module = attnk.SpatialAttention(3, output="gated").eval()
    for x in (torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6, requires_grad=True)):
        traced = torch.jit.trace(module, x)
        other = torch.randn(5, 7, 30, 40)
        torch.testing.assert_close(traced(other), module(other))


def test_meta_tensors():
    x, weight = torch.empty(2, 3, 5, 7, device="meta", requires_grad=True), torch.empty(1, 2, 3, 3, device="meta")
    out = attnk.spatial_gate(x, weight)
    out.sum().backward()
    assert out.shape == x.grad.shape == x.shape
    assert attnk.explain("spatial_gate", x, weight).reason == "x lies on the meta device"
