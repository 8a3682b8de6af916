"""``attnk.cbam``: values, gradients, layouts, edges, errors, and how it behaves inside PyTorch."""

import contextlib
import copy
import functools
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from helpers import assert_same_bits, needs_interpreter, one_by_one, pairwise
from torch import nn
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import attnk
from attnk import dispatch
from attnk.reference.cbam import cbam_reference
from attnk.testing import Meter, assert_matches_reference, layouts

OUTPUTS = ("gated", "residual", "map", "logit")
TIES = ("first", "even")
POOLS = ("avg_max", "avg", "max", "half_sum")
NORMS = (None, "train", "eval")
DTYPES = (torch.float64, torch.float32, torch.float16)
LAYOUTS = [name for name, _ in layouts(torch.zeros(1, 1, 1, 1))]
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def draw(
    shape: tuple[int, ...],
    kernel_size: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    bias: bool = True,
    ties: bool = False,
    layout: str = "contiguous",
    norm: str | None = None,
) -> dict[str, torch.Tensor | None]:
    """Random arguments; with ``ties`` most pixels have several equal maxima, and most channels."""
    channels = shape[-3]
    hidden = max(1, channels // 2)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.float64)

    x = normal(*shape).round() if ties else normal(*shape)
    x = x.to(device, dtype)
    tensors = {
        "x": x if layout == "contiguous" else dict(layouts(x))[layout],
        "w1": normal(hidden, channels) / channels**0.5,
        "b1": normal(hidden) / 2,
        "w2": normal(channels, hidden) / hidden**0.5,
        "b2": normal(channels) / 2,
        "weight": normal(1, 2, kernel_size, kernel_size) / kernel_size,
        "bias": normal(1) if bias else None,
    }
    if norm is not None:
        tensors |= {"norm_weight": normal(1) + 1, "norm_bias": normal(1)}
    if norm == "train":
        del tensors["bias"]  # a batch norm takes it away again, and its gradient is nothing but rounding errors
    if ties:  # equal numbers are still equal behind their gates
        tensors["w2"].zero_()
        tensors["b2"].fill_(0.3)
    return {name: None if tensor is None else tensor.to(device, dtype) for name, tensor in tensors.items()}


def batch_norm(weight: torch.Tensor, bias: torch.Tensor, mode: str) -> nn.BatchNorm2d:
    """A batch norm of one channel whose parameters are these tensors."""
    norm = nn.BatchNorm2d(1, momentum=0.3, device=weight.device, dtype=weight.dtype).train(mode == "train")
    norm.running_mean.fill_(0.25)
    norm.running_var.fill_(0.75)
    del norm.weight, norm.bias
    norm.weight, norm.bias = weight, bias
    return norm


def with_weights(function: Any, **options: Any) -> Any:
    """A function of the tensors that ``draw`` gives, by name."""
    mode = options.pop("norm", None)

    def call(x, w1, b1, w2, b2, weight, bias=None, norm_weight=None, norm_bias=None):
        norm = {} if mode is None else {"norm": batch_norm(norm_weight, norm_bias, mode)}
        return function(x, (w1, b1, w2, b2), weight, bias, **norm, **options)

    return call


def fused(backend: str, **options: Any) -> Any:
    return with_weights(functools.partial(attnk.cbam, backend=backend), **options)


def definition(**options: Any) -> Any:
    return with_weights(cbam_reference, **options)


def check(backend: str, inputs: dict[str, torch.Tensor | None], *, grads: Any = None, dout: Any = None, **options: Any):
    """Values and gradients against the definition."""
    assert_matches_reference(fused(backend, **options), definition(**options), inputs, grads=grads, dout=dout)


def run(backend: str, inputs: dict[str, torch.Tensor | None], **options: Any) -> list[torch.Tensor]:
    """The output and all gradients, for comparing bits."""
    leaves = {name: None if one is None else one.detach().requires_grad_() for name, one in inputs.items()}
    out = fused(backend, **options)(**leaves)
    dout = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves.values() if leaf is not None], dout)]


@pytest.fixture
def kernels():
    return pytest.importorskip("attnk.kernels.cbam")


@contextlib.contextmanager
def configured(kernels: Any, **config: int):
    """Every launch inside uses these block sizes."""
    config = {"block_p": 8, "block_c": 4, "num_warps": 4, "num_stages": 1} | config
    with mock.patch.object(kernels.common, "cbam_config", return_value=kernels.common.SpatialGateConfig(**config)):
        yield


@pytest.mark.parametrize(
    "case",
    pairwise(
        kernel_size=(1, 3, 5, 7),
        output=OUTPUTS,
        norm=NORMS,
        dtype=DTYPES,
        ties=TIES,
        pool=POOLS,
        gate=("sigmoid", "hard_sigmoid", torch.tanh),
        order=("avg_max", "max_avg"),
        bias=(True, False),
        rounded=(True, False),
        layout=("contiguous", "channels_last"),
    ),
)
def test_matches_reference(backend, device, case):
    inputs = draw(
        (2, 7, 5, 6), case["kernel_size"], case["dtype"], device,
        bias=case["bias"], ties=case["rounded"], layout=case["layout"], norm=case["norm"],
    )  # fmt: skip
    check(backend, inputs, **{name: case[name] for name in ("output", "norm", "ties", "pool", "gate", "order")})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("output", ["residual", "map"])
def test_equal_maxima(backend, device, output, ties, layout):
    inputs = draw((1, 9, 4, 5), dtype=torch.float64, device=device, ties=True, layout=layout)
    inputs["x"][..., 0, :] = 1.0  # all channels tie
    inputs["x"][..., 1, :].clamp_(max=0.0)  # the maximum is what masked lanes may read
    check(backend, inputs, output=output, ties=ties)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ties", TIES)
def test_channels_that_are_equal_once_rounded(backend, device, ties, layout):
    """Gates of float16 make ties that exact products would not have; the first of them has the gradient."""
    inputs = draw((2, 16, 6, 5), dtype=torch.float16, device=device, layout=layout)
    inputs["x"].copy_(1 + torch.arange(16, device=device).view(1, -1, 1, 1) / 1024)
    inputs["w2"].zero_()
    inputs["b2"].copy_(torch.logit(0.75 / (1 + torch.arange(16) / 1024)) / 2)
    y = (inputs["x"] * torch.sigmoid(2 * inputs["b2"]).view(1, -1, 1, 1))[0, :, 0, 0]
    assert y.unique().numel() < 16
    check(backend, inputs, ties=ties)
    # and with the very gradient, not only within what the tolerance allows
    weight = torch.zeros(1, 2, 1, 1, device=device, dtype=torch.float16)
    weight[0, 1] = 1
    grads = []
    for function in (functools.partial(attnk.cbam, backend=backend), cbam_reference):
        x = torch.tensor([1, 1 + 2**-10, 1 + 2**-9, 0.5], device=device, dtype=torch.float16).view(1, 4, 1, 1)
        x = x.contiguous(memory_format=MEMORY_FORMATS[layout]).requires_grad_()
        gate = torch.tensor([[1, 1 - 2**-11, 1 - 2**-9, 1]], device=device, dtype=torch.float16)
        out = function(
            x, lambda pooled, gate=gate: gate, weight, gate=lambda z: z, pool="avg", output="logit", ties=ties
        )
        grads.append(torch.autograd.grad(out.sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=2e-3, atol=0)  # zero in the same places
    assert grads[0].count_nonzero() == (1 if ties == "first" else 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_in_pytorch(device, norm, dtype):
    for output in OUTPUTS:
        check("torch", draw((2, 40, 5, 6), 7, dtype, device, norm=norm), output=output, norm=norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "channel_slice"])
@pytest.mark.parametrize(("output", "ties", "norm"), [("gated", "first", "train"), ("residual", "even", None)])
def test_pytorch_path_in_tiles(device, output, ties, norm, layout, dtype, monkeypatch):
    monkeypatch.setattr("attnk.fallback.spatial_gate.SMALL_ELEMENTS", 0)
    inputs = draw((3, 5, 7, 6), dtype=dtype, device=device, ties=True, layout=layout, norm=norm)
    for elements in (100, 500):  # a few rows of an image at a time; two images at a time
        monkeypatch.setattr("attnk.fallback.spatial_gate.TILE_ELEMENTS", elements)
        check("torch", inputs, output=output, ties=ties, norm=norm)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pytorch_path_of_many_channels(device, layout):
    inputs = draw((1, 256, 40, 42), 7, device=device, layout=layout)  # maxima in two levels
    check("torch", inputs)


def test_pytorch_path_with_less_precise_products(device):
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        check("torch", draw((2, 6, 5, 4), 3, device=device))
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(
    "case",
    pairwise(
        shape=(
            (3, 1, 4, 5), (1, 1, 1, 1), (2, 6, 1, 1), (2, 3, 1, 7), (2, 3, 7, 1), (1, 64, 7, 7), (1, 17, 13, 5),
            (5, 2, 3, 3),
        ),
        output=("residual", "map"),
        ties=TIES,
        norm=(None, "eval"),
        kernel_size=(3, 7),
        layout=("contiguous", "channels_last"),
    ),
)  # fmt: skip
def test_odd_shapes(backend, device, case):
    norm = case["norm"]
    inputs = draw(case["shape"], case["kernel_size"], torch.float64, device, layout=case["layout"], norm=norm)
    check(backend, inputs, output=case["output"], ties=case["ties"], norm=norm)


@pytest.mark.parametrize(
    "case",
    pairwise(
        channels=(3, 4, 5, 8, 17),  # block_c = 4
        plane=((7, 1), (2, 4), (3, 3), (4, 4), (1, 17)),  # block_p = 8
        num_stages=(1, 2),
        rounded=(True, False),
        output=("gated", "logit"),
        norm=(None, "train"),
        ties=TIES,
        layout=("contiguous", "channels_last"),
    ),
)
def test_sizes_around_the_blocks(kernels, device, case):
    norm = case["norm"]
    inputs = draw(
        (2, case["channels"], *case["plane"]), dtype=torch.float64, device=device,
        layout=case["layout"], ties=case["rounded"], norm=norm,
    )  # fmt: skip
    with configured(kernels, num_stages=case["num_stages"]):
        check("triton", inputs, output=case["output"], ties=case["ties"], norm=norm)


@needs_interpreter
def test_parts_of_many_tiles_are_added(kernels):
    with configured(kernels, block_p=4), mock.patch.object(kernels.backward, "CBAM_SUM_ROWS", 2):
        check("triton", draw((2, 5, 5, 5), dtype=torch.float64))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ties", TIES)
def test_sums_over_many_pixels_are_exact(layout, ties):
    """Positive terms added one after the other would be ten times as far off as the definition's sums."""
    inputs = draw((1, 8, 210, 200), layout=layout, dtype=torch.float32)
    inputs["x"] = inputs["x"].abs().requires_grad_()
    dout = torch.rand(inputs["x"].shape)
    check("torch", inputs, grads=["x", "w1", "b1", "w2", "b2"], dout=dout, ties=ties)


@pytest.mark.parametrize("output", ["gated", "map"])
def test_without_a_batch(backend, device, output):
    for layout, norm in (("contiguous", None), ("channels_last", "train"), ("transposed", "eval")):
        inputs = draw((1, 5, 4, 6), device=device, layout=layout, norm=norm)
        inputs["x"] = inputs["x"].squeeze(0)
        assert_matches_reference(
            fused(backend, output=output, norm=norm),
            lambda x, norm=norm, **rest: definition(output=output, norm=norm)(x[None], **rest)[0],
            inputs,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x(backend, device, layout):
    variants = [("gated", "first", None), ("map", "even", None), ("residual", "even", "train")]
    for output, ties, norm in variants if backend == "torch" else [variants[LAYOUTS.index(layout) % 3]]:
        inputs = draw((3, 5, 4, 6), device=device, layout=layout, norm=norm)
        check(backend, inputs, output=output, ties=ties, norm=norm)


@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_gradient(backend, device, layout, x_layout):
    dout = dict(layouts(torch.randn(3, 5, 4, 6, device=device)))[layout]
    check(backend, draw((3, 5, 4, 6), device=device, layout=x_layout), dout=dout)
    if backend == "torch" or layout in ("channels_last", "transposed"):
        inputs = draw((3, 5, 4, 6), device=device, layout=x_layout, norm="train")
        check(backend, inputs, dout=dout, norm="train")
    if x_layout == "contiguous":
        check(backend, draw((3, 5, 4, 6), device=device), output="map", dout=dout[:, 1:2])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kept", [(1, 1, 1, 1), (3, 1, 4, 6), (3, 5, 1, 1), (1, 5, 4, 6)])
def test_expanded_gradients(backend, device, kept, layout):
    # the gradients of sum(), mean(1), mean((2, 3)) and sum(0)
    inputs = draw((3, 5, 4, 6), device=device, layout=layout)
    check(backend, inputs, dout=torch.randn(kept, device=device).expand(3, 5, 4, 6))


def test_inside_a_network(backend, device):
    """x comes from elsewhere and is used once more beside the gate."""
    inputs = draw((2, 6, 3, 4), dtype=torch.float64, device=device, norm="train")

    def around(gate: Any, x: torch.Tensor, **rest: Any) -> torch.Tensor:
        x = x.sin()
        one, other = gate(x, **rest).split(3, 1)
        return torch.cat([other.mul(2), x, one.transpose(2, 3).flip(2).transpose(2, 3)], 1)

    assert_matches_reference(
        functools.partial(around, fused(backend, norm="train")),
        functools.partial(around, definition(norm="train")),
        inputs,
    )


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_mlp_is_a_module(backend, device, layer):
    if layer == "linear":
        mlp = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 6))
    else:
        mlp = nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 3, 1), nn.SiLU(), nn.Conv2d(3, 6, 1), nn.Flatten())
    mlp = mlp.to(device, torch.float64)
    x, weight = torch.randn(2, 6, 4, 5, dtype=torch.float64), torch.randn(1, 2, 3, 3, dtype=torch.float64)
    results = []
    for name in (backend, "reference"):
        leaves = [tensor.to(device).requires_grad_() for tensor in (x.clone(), weight.clone())]
        out = attnk.cbam(leaves[0], mlp, leaves[1], backend=name)
        results.append([out.detach(), *torch.autograd.grad(out.cos().sum(), (*leaves, *mlp.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_convolution_weights(backend, device):
    inputs = draw((2, 6, 4, 5), dtype=torch.float64, device=device)
    as_linear = fused(backend)(**inputs)
    inputs["w1"], inputs["w2"] = inputs["w1"][..., None, None], inputs["w2"][..., None, None]
    assert torch.equal(fused(backend)(**inputs), as_linear)
    check(backend, inputs)


def test_something_else_of_the_pooled_vectors(backend, device):
    """A loss on what the mlp saw, which no gate has a part in, and one beside the output's."""
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(1, 2, 3, 3, dtype=torch.float64, device=device)
    for alone in (True, False):
        results = []
        for name in (backend, "reference"):
            seen: list[torch.Tensor] = []

            def mlp(pooled: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
                seen.append(pooled)
                return pooled * 2

            out = attnk.cbam(x, mlp, weight, backend=name)
            loss = seen[0].sin().sum() + seen[1].exp().sum() + (0 if alone else out.cos().sum())
            results.append(torch.autograd.grad(loss, x)[0])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_gate_without_a_gradient(backend, device):
    """An mlp that detaches: then x alone has a gradient through the gates."""
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(1, 2, 3, 3, dtype=torch.float64, device=device)
    grads = [
        torch.autograd.grad(attnk.cbam(x, torch.detach, weight, backend=name).cos().sum(), x)[0]
        for name in (backend, "reference")
    ]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics(backend, device, training, affine):
    inputs = draw((3, 5, 4, 6), dtype=torch.float64, device=device)
    norms = [nn.BatchNorm2d(1, momentum=0.01, affine=affine).to(device, torch.float64).train(training)]
    norms[0].running_mean.fill_(0.25)
    norms.append(copy.deepcopy(norms[0]))
    outs = [
        with_weights(attnk.cbam, backend=name)(**inputs)
        if norm is None
        else attnk.cbam(inputs["x"], list(inputs.values())[1:5], *list(inputs.values())[5:], norm=norm, backend=name)
        for norm, name in zip(norms, (backend, "reference"), strict=True)
    ]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(norms[0].state_dict(), norms[1].state_dict())
    assert (int(norms[0].num_batches_tracked) == 1) == training


def test_norms_that_are_no_plain_batch_norm(backend, device):
    inputs = draw((3, 5, 4, 6), dtype=torch.float64, device=device)
    x, mlp, rest = inputs["x"], list(inputs.values())[1:5], list(inputs.values())[5:]
    without_statistics = nn.BatchNorm2d(1, track_running_stats=False).to(device, torch.float64).eval()
    for norm in (without_statistics, nn.GroupNorm(1, 1).to(device, torch.float64), lambda z: z * 2 - 1):
        for output in OUTPUTS:
            outs = [
                attnk.cbam(x, mlp, *rest, norm=norm, output=output, backend=name) for name in (backend, "reference")
            ]
            torch.testing.assert_close(*outs)


def test_a_norm_that_forgets_the_logit(backend, device):
    """Then the maps have no gradient, and x still has those through both gates as they are."""
    inputs = draw((2, 4, 3, 5), dtype=torch.float64, device=device)
    mlp, rest = list(inputs.values())[1:5], list(inputs.values())[5:]
    grads = []
    for name in (backend, "reference"):
        leaf = inputs["x"].clone().requires_grad_()
        out = attnk.cbam(leaf, mlp, *rest, norm=lambda z: z.detach(), backend=name)
        grads.append(torch.autograd.grad(out.cos().sum(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_output_keeps_the_memory_format(backend, device, output, memory_format):
    for norm in NORMS:
        inputs = draw((2, 5, 4, 6), device=device, norm=norm)
        inputs["x"] = inputs["x"].contiguous(memory_format=memory_format)
        for grad in (False, True):
            inputs["x"].requires_grad_(grad)
            out = fused(backend, output=output, norm=norm)(**inputs)
            assert out.is_contiguous(memory_format=memory_format)
            assert out.shape == ((2, 5, 4, 6) if output in ("gated", "residual") else (2, 1, 4, 6))


@pytest.mark.parametrize(("output", "norm"), [*itertools.product(OUTPUTS, (None,)), ("gated", "train")])
def test_gradcheck(backend, device, output, norm):
    inputs = draw((1, 3, 2, 3), dtype=torch.float64, device=device, norm=norm)
    names = list(inputs)
    function = fused(backend, output=output, norm=norm)
    torch.autograd.gradcheck(
        lambda *leaves: function(**dict(zip(names, leaves, strict=True))),
        [tensor.requires_grad_() for tensor in inputs.values()],
        fast_mode=backend == "triton" and dispatch.INTERPRETED,
    )


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize(("output", "norm"), [("gated", "train"), ("residual", None), ("map", "eval")])
def test_gradcheck_of_the_definition(output, norm, ties):
    inputs = draw((1, 2, 2, 2), dtype=torch.float64, norm=norm)
    names = list(inputs)
    function = fused("reference", output=output, norm=norm, ties=ties)
    call = lambda *leaves: function(**dict(zip(names, leaves, strict=True)))  # noqa: E731
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    torch.autograd.gradcheck(call, leaves)
    torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("norm", [None, "train"])
@pytest.mark.parametrize("name", ["x", "w1", "b2", "weight"])
def test_second_differentiation_raises(backend, device, name, norm):
    inputs = draw((1, 3, 3, 4), device=device, norm=norm)
    function = fused(backend, norm=norm)
    leaf = inputs[name].requires_grad_()
    (grad,) = torch.autograd.grad(function(**inputs).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(grad.square().sum(), leaf)

    def once(tensor: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda tensor: fused(backend)(**{**plain, name: tensor}).sum())(tensor).sum()

    plain = draw((1, 3, 3, 4), device=device)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.func.grad(once)(leaf.detach())


@pytest.mark.parametrize("output", OUTPUTS)
def test_second_derivative_of_a_sum_raises(backend, device, output):
    """A constant gradient of the output must not hide that the first derivative depends on x."""
    inputs = draw((1, 2, 3, 3), device=device)
    x = inputs.pop("x")

    def gate(x):
        return fused(backend, output=output)(x, **inputs).sum()

    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.functional.vhp(gate, x, torch.ones_like(x))
    with pytest.raises(NotImplementedError, match="reference"):
        torch.func.grad(lambda x: torch.func.grad(gate)(x).sum())(x)


def test_create_graph_of_a_first_derivative(backend, device):
    inputs = draw((1, 3, 3, 4), device=device, norm="train")
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    function = fused(backend, norm="train")
    plain = torch.autograd.grad(function(**inputs).sum(), leaves)
    created = torch.autograd.grad(function(**inputs).sum(), leaves, create_graph=True)
    assert_same_bits([grad.detach() for grad in created], list(plain))


def spoil(inputs: dict[str, torch.Tensor | None], what: str) -> None:
    x = inputs["x"]
    nan, inf = float("nan"), float("inf")
    if what == "nan":
        x[0, 1, 2, 1] = nan
    elif what == "nan_channel":
        x[0, 2] = nan
    elif what == "minus_inf":
        x[0, 1, 2, 1] = -inf
    elif what == "inf_beside_nan":
        x[0, 0, 2, 1], x[0, 1, 2, 1] = inf, nan
    elif what == "nan_gate":
        inputs["b2"][1] = nan
    elif what == "large_logits":
        inputs["bias"].fill_(1e4)
        inputs["b2"].fill_(-1e4)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("what", ["nan", "nan_channel", "minus_inf", "inf_beside_nan", "nan_gate", "large_logits"])
def test_nan_and_infinities(backend, device, what, output):
    variants = list(itertools.product(TIES, ("contiguous", "channels_last")))
    for ties, layout in variants if backend == "torch" else variants[OUTPUTS.index(output) % 2 :: 2]:
        inputs = draw((2, 4, 7, 3), device=device, layout=layout)
        spoil(inputs, what)
        check(backend, inputs, output=output, ties=ties)


@pytest.mark.parametrize("output", ["gated", "map"])
def test_nan_behind_the_channels_does_not_leak(backend, device, output):
    values = torch.randn(2, 3, 4, 5, device=device)
    channels = 3 if output == "gated" else 1
    for ties, memory_format in zip(TIES, MEMORY_FORMATS.values(), strict=True):
        padded, douts = (
            torch.full((2, 8, 4, 5), float("nan"), device=device).contiguous(memory_format=memory_format)
            for _ in range(2)
        )
        inputs = draw((2, 3, 4, 5), device=device)
        inputs["x"] = padded[:, 2:5].copy_(values)
        dout = douts[:, 2 : 2 + channels].copy_(torch.randn(2, channels, 4, 5))
        check(backend, inputs, output=output, ties=ties, dout=dout)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (0, 3, 0, 0)])
def test_empty(backend, device, shape, output):
    for ties, memory_format in zip(TIES, MEMORY_FORMATS.values(), strict=True):
        inputs = draw(shape, device=device)
        inputs["x"] = inputs["x"].contiguous(memory_format=memory_format)
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        out = fused(backend, output=output, ties=ties)(**leaves)
        assert out.shape == (shape if output in ("gated", "residual") else (shape[0], 1, *shape[2:]))
        out.sum().backward()
        for leaf in leaves.values():
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    assert fused(backend)(**draw((3, 0, 5), device=device)).shape == (3, 0, 5)


X = torch.zeros(1, 3, 4, 4)
M = (torch.zeros(2, 3), None, torch.zeros(3, 2), None)
W = torch.zeros(1, 2, 3, 3)
B = torch.zeros(1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([1.0], M, W), TypeError, "x must be a tensor, got list"),
        (lambda f: f(X, M, [1.0]), TypeError, "weight must be a tensor, got list"),
        (lambda f: f(X, M, W, 0.5), TypeError, "bias must be a tensor, got float"),
        (lambda f: f(X, 3, W), TypeError, "mlp must be a callable or"),
        (lambda f: f(X, M[:2], W), ValueError, "mlp must be a callable or .* got a sequence of 2"),
        (lambda f: f(X, None, W), TypeError, "mlp must be a callable or .* got NoneType"),
        (lambda f: f(X, M, W, norm=torch.nn.BatchNorm2d(3)), ValueError, "norm must have one channel, .* got 3"),
        (lambda f: f(X, (M[0][:, :2], *M[1:]), W), ValueError, "w1 must be"),
        (lambda f: f(X, (M[0].double(), *M[1:]), W), TypeError, "w1 must have the dtype of x"),
        (lambda f: f(X[0, 0], M, W), ValueError, r"x must be \(B, C, H, W\) or \(C, H, W\), got 2 dimensions"),
        (lambda f: f(X[None], M, W), ValueError, "x must be .* got 5 dimensions"),
        (lambda f: f(X[:, :0], M, W), ValueError, r"x must have at least one channel, got \(1, 0, 4, 4\)"),
        (lambda f: f(X.int(), M, W), TypeError, "x must be float16, .* got torch.int32"),
        (lambda f: f(X, M, W.double()), TypeError, "weight must have the dtype of x, torch.float32, got torch.float64"),
        (lambda f: f(X, M, W.to("meta")), ValueError, "weight must be on the device of x, .* got meta"),
        (lambda f: f(X, M, W[:, :1]), ValueError, r"weight must be \(1, 2, k, k\) with k odd, got \(1, 1, 3, 3\)"),
        (lambda f: f(X, M, W[..., :2, :2]), ValueError, r"weight must be .* k odd, got \(1, 2, 2, 2\)"),
        (lambda f: f(X, M, W, B.expand(2)), ValueError, r"bias must be \(1,\), got \(2,\)"),
        (lambda f: f(X, lambda p: p[:, :2], W), ValueError, r"mlp .* \(1, 3\), got \(1, 2\)"),
        (lambda f: f(X, M, W, norm=3), TypeError, "norm must be a module, a callable or None, got int"),
        (lambda f: f(X, M, W, pool="min"), ValueError, "pool must be one of .* got 'min'"),
        (lambda f: f(X, M, W, gate="relu"), ValueError, "gate must be one of .* got 'relu'"),
        (lambda f: f(X, M, W, order="max"), ValueError, "order must be one of 'avg_max', 'max_avg', got 'max'"),
        (lambda f: f(X, M, W, output="x"), ValueError, "output must be one of 'gated', 'map', .* got 'x'"),
        (lambda f: f(X, M, W, ties="last"), ValueError, "ties must be one of 'first', 'even', got 'last'"),
        (lambda f: f(X, M, W, backend="cuda"), ValueError, "backend must be one of 'auto', 'triton', .* got 'cuda'"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(attnk.cbam)


@pytest.mark.filterwarnings("ignore:attnk.cbam runs in plain PyTorch")
def test_kernel_size_beyond_the_kernels(device):
    inputs = draw((1, 3, 4, 5), 17, device=device)
    with pytest.raises(attnk.Unsupported, match="kernel size up to 15, got 17"):
        fused("triton")(**inputs)
    check("auto", inputs)


def test_explain(device):
    explanation = attnk.explain("cbam", X, M, W)
    assert explanation.backend == "torch"
    if dispatch.INTERPRETED:
        pytest.importorskip("triton")
        assert attnk.explain("cbam", X, M, W, backend="triton").config.block_p > 0
    for channels_last in (False, True):
        from attnk.ops.cbam import example

        attnk.explain("cbam", *example([2, 64, 56, 56], torch.float32, torch.device("cpu"), channels_last))


SUBSETS = [("x",), ("w1",), ("b2",), ("weight",), ("bias",), ("x", "bias"), ("w2", "weight"), ("weight", "bias")]


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_subsets_of_gradients(backend, device, names):
    variants = [("gated", None), ("map", None), ("residual", "train")]
    for output, norm in variants if backend == "torch" else variants[:: 1 + SUBSETS.index(names) % 2]:
        if norm == "train" and "bias" in names:
            continue
        inputs = draw((2, 5, 3, 4), device=device, norm=norm)
        check(backend, inputs, grads=names, output=output, norm=norm)
        leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in inputs.items()}
        fused(backend, output=output, norm=norm)(**leaves).sum().backward()
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in names)


def test_only_the_norm_is_trained(backend, device):
    inputs = draw((2, 5, 3, 4), device=device, norm="train")
    check(backend, inputs, grads=("norm_weight", "norm_bias"), norm="train")
    check(backend, inputs, grads=("norm_weight", "norm_bias"), norm="eval")


def test_no_graph_where_none_is_wanted(backend, device):
    inputs = draw((2, 5, 3, 4), device=device)
    expected = fused(backend)(**inputs)
    assert expected.grad_fn is None
    wanting = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    with torch.no_grad():
        out = fused(backend)(**wanting)
    assert out.grad_fn is None
    assert torch.equal(out, expected)
    with torch.inference_mode():
        out = fused(backend)(**wanting)
        assert out.is_inference()
    assert torch.equal(out, expected)
    check(backend, inputs, grads=())


@pytest.mark.parametrize("norm", [None, "train"])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_for_backward(backend, device, ties, norm, dtype):
    inputs = draw((1, 32, 16, 16), 3, dtype, device, norm=norm)
    x = inputs["x"].requires_grad_()
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused(backend, ties=ties, norm=norm)(**inputs)
    others = {tensor.data_ptr(): tensor for tensor in saved if tensor.data_ptr() != x.data_ptr()}
    assert len(others) < len(saved)
    # some maps one channel wide (two are framed) and vectors; far below x's 32 channels
    assert sum(tensor.untyped_storage().nbytes() for tensor in others.values()) <= 4 * 18 * 18 * 7 + 40 * 32 * 16


def test_placeholders_take_no_memory(backend, device):
    x = draw((2, 5, 4, 6), device=device)["x"].requires_grad_()
    from attnk.ops.cbam import CbamPoolFunction

    *_, whole, vectors, plane, planes, _ = CbamPoolFunction.apply(x, True, "gated", "first", backend)
    for handle, shape in ((whole, x.shape), (vectors, (2, 5)), (plane, (2, 1, 4, 6)), (planes, (2, 3, 4, 6))):
        assert handle.shape == shape
        assert handle.untyped_storage().nbytes() == x.element_size()
        assert handle.isnan().all()


@pytest.mark.parametrize("norm", [None, "train"])
def test_input_changed_in_place(backend, device, norm):
    inputs = draw((2, 5, 3, 4), device=device, norm=norm)
    leaf = inputs["x"].requires_grad_()
    inputs["x"] = leaf * 1
    out = fused(backend, norm=norm)(**inputs)
    inputs["x"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_output_changed_in_place(backend, device):
    inputs = draw((2, 5, 3, 4), dtype=torch.float64, device=device)
    assert_matches_reference(
        lambda **tensors: fused(backend)(**tensors).mul_(2).add_(1),
        lambda **tensors: definition()(**tensors) * 2 + 1,
        inputs,
    )


@pytest.mark.parametrize(("output", "norm"), [("gated", None), ("map", None), ("residual", "train")])
def test_retain_graph(backend, device, output, norm):
    inputs = draw((2, 5, 3, 4), device=device, norm=norm)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    out = fused(backend, output=output, norm=norm)(**inputs)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dout)
    assert_same_bits(list(first), list(second))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("output", "ties"), [("gated", "first"), ("map", "even")])
def test_repeats(backend, device, output, ties, layout):
    inputs = draw((2, 6, 9, 7), 7, device=device, ties=True, layout=layout)
    expected = run(backend, inputs, output=output, ties=ties)
    for _ in range(2 if backend == "triton" and dispatch.INTERPRETED else 20):
        assert_same_bits(run(backend, inputs, output=output, ties=ties), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_deterministic_algorithms_are_enough(backend, device, norm):
    """Training CBAM in PyTorch fails there on a GPU: its adaptive maximum pooling has no deterministic backward."""
    inputs = draw((2, 6, 9, 7), 3, device=device, norm=norm)
    expected = run(backend, inputs, norm=norm)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(run(backend, inputs, norm=norm), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_x", [False, True])
def test_autocast(backend, device, dtype, half_x, norm):
    if half_x and dtype == torch.bfloat16 and backend == "triton" and dispatch.INTERPRETED:
        pytest.skip("the interpreter truncates to bfloat16")
    for output in ("gated", "map"):
        inputs = draw((2, 5, 6, 4), device=device, norm=norm)
        if half_x:
            inputs["x"] = inputs["x"].to(dtype)

        def under_autocast(function: Any, **tensors: Any) -> torch.Tensor:
            with torch.autocast(device, dtype):
                return function(**tensors)

        assert_matches_reference(
            functools.partial(under_autocast, fused(backend, output=output, norm=norm)),
            functools.partial(under_autocast, definition(output=output, norm=norm)),
            inputs,
        )
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        out = under_autocast(fused(backend, output=output, norm=norm), **leaves)
        assert out.dtype == (dtype if half_x or output == "map" else torch.float32)
        out.float().square().mean().backward()
        for leaf in leaves.values():
            assert leaf.grad.dtype == leaf.dtype
            assert leaf.grad.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{"output": "gated"}, {"output": "map", "pool": "avg"}, {"output": "residual", "ties": "even"},
     {"output": "gated", "norm": "train", "pool": "half_sum"}],
    ids=lambda options: "-".join(options.values()),
)  # fmt: skip
def test_compile(backend, device, options, fresh_dynamo):
    options = dict(options)
    norm = options.pop("norm", None)
    module = nn.BatchNorm2d(1).to(device) if norm else None

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def compiled(x, w1, b1, w2, b2, weight, bias):
        return attnk.cbam(x, (w1, b1, w2, b2), weight, bias, norm=module, backend=backend, **options)

    def wanted(x, w1, b1, w2, b2, weight, bias):
        wide = None if module is None else nn.BatchNorm2d(1).to(device, x.dtype)
        return cbam_reference(x, (w1, b1, w2, b2), weight, bias, norm=wide, **options)

    inputs = draw((2, 5, 3, 4), device=device)
    assert_matches_reference(compiled, wanted, inputs)
    inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    assert_matches_reference(compiled, wanted, inputs)
    assert_matches_reference(compiled, wanted, inputs, grads=())


def test_compile_in_a_network(backend, device, fresh_dynamo):
    inputs = draw((2, 5, 4, 6), device=device)

    def network(gate: Any, x: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
        return gate(torch.sin(x) * 2, **rest).cos() + x

    compiled = torch.compile(functools.partial(network, fused(backend)), fullgraph=True, backend="inductor")
    assert_matches_reference(compiled, functools.partial(network, definition()), inputs)


def test_compile_dynamic_shapes(backend, device, fresh_dynamo):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused(backend), fullgraph=True, backend=counter)
    for shape in ((2, 5, 4, 6), (3, 7, 5, 8), (4, 6, 9, 3)):
        assert_matches_reference(compiled, definition(), draw(shape, device=device))
    assert counter.frame_count <= 2


class Network(nn.Module):
    """CBAM with parameters of its own, and a batch norm in its spatial half if wanted."""

    def __init__(self, norm: str | None = None, **options: Any) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 5))
        self.conv = nn.Conv2d(2, 1, 3, padding=1)
        self.norm = None if norm is None else nn.BatchNorm2d(1).train(norm == "train")
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return attnk.cbam(x, self.mlp, self.conv.weight, self.conv.bias, norm=self.norm, **self.options)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("output", ["gated", "map"])
def test_export(backend, device, output, strict, fresh_dynamo):
    network = Network(output=output, backend=backend).to(device)
    size = torch.export.Dim
    exported = torch.export.export(
        network, (torch.randn(2, 5, 4, 6, device=device),), strict=strict,
        dynamic_shapes={"x": {0: size("b"), 2: size("h"), 3: size("w")}},
    )  # fmt: skip
    assert "attnk.cbam_" in str(exported)
    x = torch.randn(3, 5, 7, 5, device=device)
    torch.testing.assert_close(exported.module()(x), network(x))


@pytest.mark.parametrize("norm", [None, "train"])
@pytest.mark.parametrize(("output", "ties"), [("residual", "first"), ("map", "even")])
@pytest.mark.parametrize("exported_with_grad", [False, True])
def test_exported_programs_train(backend, device, output, ties, norm, exported_with_grad):
    """An exported program calls the operations by themselves: with grad mode on, and for their gradients."""
    module = Network(norm=norm, output=output, ties=ties, backend=backend).to(device)
    x = torch.randn(2, 5, 6, 4, device=device, requires_grad=True)
    with torch.set_grad_enabled(exported_with_grad):
        program = torch.export.export(copy.deepcopy(module), (x.detach(),)).module()
    results = []
    for network in (module, program):
        out = network(x)
        results.append([out.detach(), *torch.autograd.grad((out**2).sum(), (x, *network.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_traces_take_other_sizes():
    module = Network(norm="eval").eval()
    for x in (torch.randn(2, 5, 5, 6), torch.randn(2, 5, 5, 6, requires_grad=True)):
        traced = torch.jit.trace(module, x)
        other = torch.randn(3, 5, 30, 40)
        torch.testing.assert_close(traced(other), module(other))


def test_meta_tensors():
    network = Network(norm="train").to("meta")
    x = torch.empty(2, 5, 5, 7, device="meta", requires_grad=True)
    out = network(x)
    out.sum().backward()
    assert out.shape == x.grad.shape == x.shape


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("output", "ties", "layout"),
    [("gated", "first", "crop"), ("gated", "even", "channels_last"), ("map", "first", "transposed")],
)
def test_opcheck(backend, device, output, ties, layout, fresh_dynamo):
    inputs = draw((3, 5, 4, 6), dtype=torch.float64, device=device, layout=layout)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    channels_last = x.stride(1) < x.stride(3)
    gate = torch.rand(3, 5, dtype=torch.float64, device=device)
    ops = torch.ops.attnk
    options = ("avg_max", output, ties, backend)
    leaves = [tensor.clone(memory_format=torch.preserve_format).requires_grad_() for tensor in (x, gate, weight, bias)]
    torch.library.opcheck(ops.cbam_infer.default, (*leaves, *options))
    torch.library.opcheck(ops.cbam_forward.default, (*leaves, *options))
    out, spatial, maps, index = ops.cbam_forward(x, gate, weight, bias, *options)
    dout = dict(layouts(torch.randn(out.shape, dtype=out.dtype, device=device)))[layout]
    once = {"test_utils": ("test_schema", "test_faketensor")}
    for needs in ((True, True), (True, False), (False, True)):
        arguments = (dout, x, gate, weight, spatial, maps, index, "avg_max", output, ties, *needs, backend)
        torch.library.opcheck(ops.cbam_backward.default, arguments, **once)
    _, dmaps, _, _ = ops.cbam_backward(*arguments[:-3], True, False, backend)
    peak, pool_index = ops.channel_gate_pool(x, True, ties, True, backend)[1:]
    whole = x if ties == "even" else None
    tail = (pool_index, peak, whole, 4, 6, channels_last, output, ties, backend)
    scaled = output == "gated"
    for optional in itertools.product((gate, None), (gate, None)):
        arguments = (dout if scaled else None, gate, spatial if scaled else None, dmaps, *optional, *tail)
        torch.library.opcheck(ops.cbam_dx.default, arguments, **once)
    if scaled:
        half = spatial.float()
        torch.library.opcheck(ops.cbam_scale.default, (*leaves[:2], half, output, backend))
        torch.library.opcheck(ops.cbam_scale_backward.default, (dout, x, gate, half, backend), **once)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_strides_are_real_strides(backend, device, layout):
    for output in ("gated", "map"):
        inputs = draw((3, 5, 4, 6), device=device, layout=layout)
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        real = fused(backend, output=output)(**leaves)
        grads = torch.autograd.grad(real.sum(), list(leaves.values()))
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = {name: mode.from_tensor(leaf).detach().requires_grad_() for name, leaf in leaves.items()}
            fake = fused(backend, output=output)(**fakes)
            fake_grads = torch.autograd.grad(fake.sum(), list(fakes.values()))
        for one, other in zip((real, *grads), (fake, *fake_grads), strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize(("output", "norm"), [("gated", None), ("map", None), ("residual", "eval")])
def test_func_grad(backend, device, output, norm):
    inputs = draw((2, 5, 3, 4), device=device, norm=norm)
    names = list(inputs)

    def gradient(function: Any, name: str, **tensors: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda leaf: function(**{**tensors, name: leaf}).square().sum())(tensors[name])

    for name in names:
        assert_matches_reference(
            functools.partial(gradient, fused(backend, output=output, norm=norm), name),
            functools.partial(gradient, definition(output=output, norm=norm), name),
            inputs,
            grads=(),
        )


ALL = ("x", "w1", "b1", "w2", "b2", "weight", "bias")


@pytest.mark.parametrize(("output", "ties"), [("gated", "even"), ("logit", "first")])
@pytest.mark.parametrize("mapped", [("x",), ("weight",), ("x", "w1", "bias"), ("b2",)], ids="+".join)
def test_vmap(backend, device, mapped, output, ties):
    inputs = draw((2, 3, 2, 4), device=device)
    for name in mapped:
        inputs[name] = torch.stack([inputs[name], inputs[name] * 2 - 0.5, inputs[name].flip(0)])
    in_dims = tuple(0 if name in mapped else None for name in ALL)

    def positional(function: Any) -> Any:
        return lambda *tensors: function(**dict(zip(ALL, tensors, strict=True)))

    options = {"output": output, "ties": ties}
    assert_matches_reference(
        lambda **tensors: torch.vmap(positional(fused(backend, **options)), in_dims)(*tensors.values()),
        lambda **tensors: one_by_one(in_dims, positional(definition(**options)), *tensors.values()),
        inputs,
    )


@pytest.mark.parametrize("output", ["gated", "map"])
def test_vmap_of_grad(backend, device, output):
    # gradients an example, as differentially private training wants them
    inputs = draw((2, 1, 3, 2, 4), device=device)
    in_dims = tuple(0 if name == "x" else None for name in ALL)

    def gradient(function: Any, name: str, *tensors: torch.Tensor) -> torch.Tensor:
        inputs = dict(zip(ALL, tensors, strict=True))
        return torch.func.grad(lambda leaf: function(**{**inputs, name: leaf}).square().sum())(inputs[name])

    for name in ("x", "w1", "weight"):
        mapped = torch.vmap(functools.partial(gradient, fused(backend, output=output), name), in_dims)
        looped = functools.partial(one_by_one, in_dims, functools.partial(gradient, definition(output=output), name))
        assert_matches_reference(
            lambda mapped=mapped, **tensors: mapped(*tensors.values()),
            lambda looped=looped, **tensors: looped(*tensors.values()),
            inputs,
            grads=(),
        )


def test_vmap_over_a_trained_norm(backend, device):
    x = torch.randn(3, 2, 4, 3, 5, dtype=torch.float64, device=device)
    weight = torch.randn(1, 2, 3, 3, dtype=torch.float64, device=device)
    norm = nn.BatchNorm2d(1, track_running_stats=False).to(device, torch.float64)

    def loss(x: torch.Tensor, name: str) -> torch.Tensor:
        return attnk.cbam(x, torch.tanh, weight, norm=norm, backend=name).cos().sum()

    mapped = torch.vmap(torch.func.grad(functools.partial(loss, name=backend)))(x)
    looped = torch.stack([torch.func.grad(functools.partial(loss, name="reference"))(one) for one in x])
    torch.testing.assert_close(mapped, looped)


def test_forward_mode_raises(backend, device):
    inputs = draw((1, 2, 2, 3), device=device)
    x = inputs.pop("x")
    gate = functools.partial(fused(backend), **inputs)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(gate, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        gate(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(backend, device, reentrant):
    inputs = draw((2, 5, 3, 4), device=device)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    gate = lambda *leaves: fused(backend)(**dict(zip(ALL, leaves, strict=True)))  # noqa: E731
    expected = torch.autograd.grad(gate(*leaves).square().sum(), leaves)
    checkpoint.checkpoint(gate, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert_same_bits([leaf.grad for leaf in leaves], list(expected))


def test_selective_checkpoint(backend, device):
    inputs = draw((2, 5, 3, 4), device=device)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    expected = run(backend, inputs)[1:]
    seen, forward = [], torch.ops.attnk.cbam_forward.default

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
        seen.append((op, context.is_recompute))
        return checkpoint.CheckpointPolicy.MUST_SAVE if op == forward else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    out = checkpoint.checkpoint(
        lambda *leaves: fused(backend)(**dict(zip(ALL, leaves, strict=True))), *leaves, use_reentrant=False,
        context_fn=functools.partial(checkpoint.create_selective_checkpoint_contexts, policy),
    )  # fmt: skip
    dout = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
    assert_same_bits(list(torch.autograd.grad(out, leaves, dout)), expected)
    assert (forward, False) in seen


@pytest.mark.parametrize("names", [(), ("x",), ("weight",), ("bias",), ALL], ids="+".join)
def test_flops(backend, device, names):
    counts = []
    for function in (fused(backend), definition()):
        inputs = draw((2, 5, 6, 4), 5, device=device)
        leaves = {name: tensor.requires_grad_(name in names) for name, tensor in inputs.items()}
        with FlopCounterMode(display=False) as forward:
            out = function(**leaves)
        with FlopCounterMode(display=False) as backward:
            if names:
                out.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    # the bias's gradient comes with the weight's, of which the definition has none where only the bias asks
    assert counts[0] == counts[1] or names == ("bias",)


def bytes_of_launches(x: torch.Tensor, weight: torch.Tensor, output: str, ties: str, n_tiles: int) -> dict[str, Any]:
    """The formula in the docstring of ``attnk.kernels.cbam`` and the vectors and weights that come on top."""
    batch, channels, height, width = x.shape
    kernel, size = weight.shape[-1], x.element_size()
    acc = 8 if x.dtype == torch.float64 else 4
    moved, pixels, vectors = x.numel() * size, batch * height * width, batch * channels
    framed = batch * (height + kernel - 1) * (width + kernel - 1)
    scaled, first = output in ("gated", "residual"), ties == "first"
    weights = weight.numel() * size
    parts = acc * vectors * n_tiles
    index = 4 * vectors
    counts = {
        "fwd_pool": {"loaded": moved + size * vectors, "stored": 2 * acc * framed + acc * pixels},
        "fwd": {"loaded": 2 * acc * framed + weights + size, "stored": acc * pixels},
        "bwd_dgate": {"loaded": acc * pixels, "stored": acc * framed},
        "bwd_dmaps": {"loaded": moved + acc * (framed + pixels) + weights, "stored": 3 * acc * pixels + parts},
        "bwd_sum": {"loaded": parts, "stored": size * vectors},
        "bwd_dx": {"loaded": 3 * acc * pixels + (3 * size + 4) * vectors, "stored": moved},
    }
    if scaled:
        counts["fwd"]["loaded"] += moved + size * vectors
        counts["fwd"]["stored"] += moved
        counts["bwd_dgate"]["loaded"] += 2 * moved + size * vectors
        counts["bwd_dgate"]["stored"] += parts
        counts["bwd_sum"]["loaded"] += parts
        counts["bwd_dx"]["loaded"] += moved + acc * pixels
    else:
        counts["fwd"]["stored"] += pixels * size
        counts["bwd_dgate"]["loaded"] += pixels * size - (acc * pixels if output == "logit" else 0)
    if not first:
        counts["bwd_dmaps"]["loaded"] += acc * pixels + size * vectors
        counts["bwd_dx"]["loaded"] += moved + (size + 4) * vectors - index
    return counts


@needs_interpreter
@pytest.mark.parametrize(
    "case",
    pairwise(
        output=OUTPUTS,
        ties=TIES,
        dtype=DTYPES,
        kernel_size=(3, 7),
        memory_format=list(MEMORY_FORMATS.values()),
        shape=((2, 5, 6, 7), (1, 8, 16, 2), (3, 1, 5, 1)),
    ),
)
def test_bytes_are_the_formula(kernels, case):
    inputs = draw(case["shape"], case["kernel_size"], case["dtype"])
    x = inputs["x"] = inputs["x"].contiguous(memory_format=case["memory_format"])
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    with configured(kernels), Meter() as meter:
        out = fused("triton", output=case["output"], ties=case["ties"])(**inputs)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    launches = {
        launch.kernel.removeprefix("_cbam_").removesuffix("_kernel"): launch
        for launch in meter.launches
        if launch.kernel.startswith("_cbam_")
    }
    n_tiles = -(-x.shape[2] * x.shape[3] // 8)
    expected = bytes_of_launches(x, inputs["weight"], case["output"], case["ties"], n_tiles)
    assert list(launches) == list(expected)
    for name, counts in expected.items():
        for what, count in counts.items():
            assert getattr(launches[name], what) == count, f"{name} {what}"
        assert launches[name].atomics == 0
        assert launches[name].store_lanes == launches[name].stored, name


@needs_interpreter
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
def test_bytes_at_64_channels(memory_format):
    inputs = draw((1, 64, 56, 56), 7)
    x = inputs["x"] = inputs["x"].contiguous(memory_format=memory_format)
    for tensor in inputs.values():
        tensor.requires_grad_()
    with Meter() as forward:
        out = fused("triton")(**inputs)
    with Meter() as backward:
        out.backward(torch.ones_like(out))
    assert forward.bytes <= 4.2 * x.nbytes
    assert backward.bytes <= 5.3 * x.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    pairwise(
        shape=((4, 64, 112, 112), (8, 64, 56, 56), (8, 256, 28, 28), (16, 512, 14, 14), (16, 2048, 7, 7)),
        dtype=(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        output=OUTPUTS,
        norm=NORMS,
        ties=TIES,
        layout=("contiguous", "channels_last"),
    ),
)
def test_network_shapes(backend, case):
    norm = case["norm"]
    inputs = draw(case["shape"], 7, case["dtype"], "cuda", layout=case["layout"], norm=norm)
    check(backend, inputs, output=case["output"], ties=case["ties"], norm=norm)


@pytest.mark.gpu
def test_repeats_on_network_shapes(backend):
    inputs = draw((16, 256, 56, 56), 7, torch.bfloat16, "cuda")
    expected = run(backend, inputs)
    for _ in range(20):
        assert_same_bits(run(backend, inputs), expected)
