"""``attnk.coordinate_pool`` and ``attnk.coordinate_gate``: values, gradients, layouts, edges, errors, PyTorch."""

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

import attnk
from attnk import dispatch
from attnk.reference.coordinate_gate import coordinate_gate_reference, coordinate_pool_reference
from attnk.testing import Meter, assert_matches_reference, layouts

DTYPES = (torch.float64, torch.float32, torch.float16)
LAYOUTS = [name for name, _ in layouts(torch.zeros(1, 1, 1, 1))]
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NAMES = ("x", "gate_h", "gate_w")
SHAPES = (
    (2, 3, 1, 1),
    (2, 3, 1, 7),
    (2, 3, 7, 1),
    (1, 9, 7, 7),
    (1, 2, 13, 17),
    (1, 1, 1, 1),
    (5, 2, 3, 3),
    (1, 1, 4, 6),
)


def is_channels_last(x: torch.Tensor) -> bool:
    return x.stride(1) < x.stride(3)


def draw(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu", *, layout: str = "contiguous"
) -> dict[str, torch.Tensor]:
    """Random arguments of the gate; the gates lie as x does where that is channels_last, else contiguous."""
    x = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    x = dict(layouts(x))[layout] if layout != "contiguous" else x
    batch, channels, height, width = shape
    gates = (torch.rand(batch, channels, *rest, dtype=torch.float64) * 2 - 0.5 for rest in ((height, 1), (1, width)))
    memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    gate_h, gate_w = (gate.to(device, dtype).contiguous(memory_format=memory_format) for gate in gates)
    return {"x": x, "gate_h": gate_h, "gate_w": gate_w}


def network(height: torch.Tensor, width: torch.Tensor, gate_h: Any, gate_w: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates that depend on both means; stands for the convolutions of coordinate attention."""
    return (
        gate_h * torch.sigmoid(height + width.mean(-1, keepdim=True)),
        gate_w * torch.sigmoid(width - height.mean(-2, keepdim=True)),
    )


def attend(x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """Pool, gates, scale: the gradient of x is written once."""
    pooled = attnk.coordinate_pool(x, backend=backend)
    return attnk.coordinate_gate(pooled, *network(pooled.height, pooled.width, gate_h, gate_w), backend=backend)


def attend_reference(x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor) -> torch.Tensor:
    return coordinate_gate_reference(x, *network(*coordinate_pool_reference(x), gate_h, gate_w))


def functions(backend: str) -> dict[str, tuple[Any, Any]]:
    """What is tested, with its definition: the pair, and the gate by itself."""
    return {
        "attend": (functools.partial(attend, backend=backend), attend_reference),
        "gate": (functools.partial(attnk.coordinate_gate, backend=backend), coordinate_gate_reference),
    }


def check(backend: str, inputs: dict[str, torch.Tensor], *, grads: Any = None, dout: Any = None, only: str = ""):
    """Values and gradients against the definition."""
    for name, (function, reference) in functions(backend).items():
        if only in ("", name):
            assert_matches_reference(function, reference, inputs, grads=grads, dout=dout)


def run(backend: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The output and all gradients, for comparing bits."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.values()]
    out = attend(*leaves, backend=backend)
    dout = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.fixture
def kernels():
    return pytest.importorskip("attnk.kernels.coordinate_gate")


@contextlib.contextmanager
def configured(kernels: Any, **config: int):
    """Every launch inside uses these block sizes."""
    chosen = kernels.CoordinateGateConfig(**{"tile": 32, "block_c": 4, "slab": 2, "num_warps": 4} | config)
    with mock.patch.object(kernels, "coordinate_gate_config", return_value=chosen):
        yield


@pytest.mark.parametrize(
    "case", pairwise(shape=(*SHAPES, (2, 7, 5, 6)), dtype=DTYPES, layout=("contiguous", "channels_last"))
)
def test_matches_reference(backend, device, case):
    check(backend, draw(case["shape"], case["dtype"], device, layout=case["layout"]))


@pytest.mark.parametrize(
    "case",
    pairwise(shape=((2, 7, 5, 6), (2, 3, 1, 7), (0, 3, 4, 5)), dtype=DTYPES, layout=("contiguous", "channels_last")),
)
def test_pool_matches_reference(backend, device, case):
    x = draw(case["shape"], case["dtype"], device, layout=case["layout"])["x"]
    for number, name in enumerate(("height", "width")):
        assert_matches_reference(
            lambda x, name=name: getattr(attnk.coordinate_pool(x, backend=backend), name).flatten(),
            lambda x, number=number: coordinate_pool_reference(x)[number].flatten(),
            {"x": x},
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_half_precision_in_pytorch(device, layout, dtype):
    check("torch", draw((2, 24, 9, 11), dtype, device, layout=layout))


def test_half_precision_sums_do_not_overflow(backend, device):
    x = torch.full((1, 2, 4, 64), 3e4, dtype=torch.float16, device=device)
    for memory_format in MEMORY_FORMATS.values():
        pooled = attnk.coordinate_pool(x.contiguous(memory_format=memory_format), backend=backend)
        assert torch.equal(pooled.height, x[..., :1])
        assert torch.equal(pooled.width, x[..., :1, :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "channel_slice"])
@pytest.mark.parametrize("elements", [40, 150, 500])  # parts of an image, one, several
def test_pytorch_path_in_tiles(device, layout, dtype, elements, monkeypatch):
    monkeypatch.setattr("attnk.fallback.coordinate_gate.SMALL_ELEMENTS", 0)
    monkeypatch.setattr("attnk.fallback.coordinate_gate.TILE_ELEMENTS", elements)
    check("torch", draw((3, 5, 7, 6), dtype=dtype, device=device, layout=layout))


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_no_low_precision_products_in_pytorch(device, precision, monkeypatch):
    torch.set_float32_matmul_precision(precision)
    try:
        check("torch", draw((2, 5, 30, 31), device=device))
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "case",
    pairwise(
        channels=(1, 2, 3, 5),
        plane=((7, 1), (2, 4), (3, 3), (1, 8), (4, 4), (1, 9), (5, 2)),
        tile=(1, 4, 16, 64),
        block_c=(1, 2, 4),
        slab=(1, 4, 64),
        layout=("contiguous", "channels_last"),
    ),
)
def test_sizes_around_the_blocks(kernels, device, case):
    inputs = draw((1, case["channels"], *case["plane"]), torch.float64, device, layout=case["layout"])
    block_c = min(case["block_c"], case["tile"])
    meter = Meter() if dispatch.INTERPRETED else contextlib.nullcontext()  # fails on races and stray pointers
    with configured(kernels, tile=case["tile"], block_c=block_c, slab=case["slab"]), meter:
        check("triton", inputs, only="attend")


def test_without_a_batch(backend, device):
    for layout in ("contiguous", "channels_last", "transposed"):
        inputs = {name: tensor.squeeze(0) for name, tensor in draw((1, 5, 4, 6), device=device, layout=layout).items()}
        for function, reference in functions(backend).values():
            assert_matches_reference(
                function, lambda reference=reference, **t: reference(*(v[None] for v in t.values()))[0], inputs
            )
        pooled = attnk.coordinate_pool(inputs["x"], backend=backend)
        assert (pooled.height.shape, pooled.width.shape) == ((5, 4, 1), (5, 1, 6))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x(backend, device, layout):
    check(backend, draw((3, 5, 4, 6), device=device, layout=layout))


@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_gradient(backend, device, layout, x_layout):
    inputs = draw((3, 5, 4, 6), device=device, layout=x_layout)
    check(backend, inputs, dout=dict(layouts(torch.randn(3, 5, 4, 6, device=device)))[layout])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kept", [(1, 1, 1, 1), (3, 1, 4, 6), (3, 5, 1, 1), (1, 5, 4, 6)])
def test_expanded_gradients(backend, device, kept, layout):
    inputs = draw((3, 5, 4, 6), device=device, layout=layout)
    check(backend, inputs, dout=torch.randn(kept, device=device).expand(3, 5, 4, 6))


@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
def test_layouts_of_the_gates(backend, device, x_layout):
    inputs = draw((2, 5, 4, 6), device=device, layout=x_layout)
    gate_h, gate_w = inputs["gate_h"], inputs["gate_w"]
    lines = torch.randn(2, 5, 10, 1, device=device)  # of rows and of columns, as one convolution leaves them
    for some in (
        {"gate_h": gate_h.contiguous(), "gate_w": gate_w.contiguous()},
        {"gate_h": gate_h.contiguous(memory_format=torch.channels_last)},
        {"gate_h": lines[:, :, :4], "gate_w": lines[:, :, 4:].transpose(2, 3)},
        {"gate_h": gate_h[:1, :, :1].expand(2, 5, 4, 1), "gate_w": gate_w[:, :1].expand(2, 5, 1, 6)},
    ):
        check(backend, {**inputs, **some}, only="gate")


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
def test_output_keeps_the_memory_format(backend, device, memory_format):
    inputs = draw((2, 5, 4, 6), device=device)
    inputs["x"] = inputs["x"].contiguous(memory_format=memory_format)
    for grad in (False, True):
        inputs["x"].requires_grad_(grad)
        pooled = attnk.coordinate_pool(inputs["x"], backend=backend)
        for tensor in (attend(**inputs, backend=backend), pooled.height, pooled.width):
            assert tensor.is_contiguous(memory_format=memory_format)


@needs_interpreter
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "channel_slice", "channels_last_slice", "crop", "expanded", "offset_1"]
)
def test_no_hidden_copy(kernels, layout):
    x = draw((3, 5, 4, 6), layout=layout)["x"]
    read, _ = kernels.addressable(x, is_channels_last(x))
    assert read is x


def test_gradcheck(backend, device):
    leaves = [tensor.requires_grad_() for tensor in draw((1, 2, 2, 3), torch.float64, device).values()]
    for function, _ in functions(backend).values():
        torch.autograd.gradcheck(function, leaves, fast_mode=backend == "triton" and dispatch.INTERPRETED)


def test_gradcheck_of_the_definition():
    leaves = [tensor.requires_grad_() for tensor in draw((1, 2, 2, 2), torch.float64).values()]
    for function, _ in functions("reference").values():
        torch.autograd.gradcheck(function, leaves)
        torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


# The deferred gradient: a pooled map may be used once, several times, beside the map itself, or not at all.


def uses(pool: Any, gate: Any) -> dict[str, Any]:
    """Functions of x and two gates, over a pooling (its map, and both means) and a gate."""

    def once(x, gate_h, gate_w):
        pooled, *means = pool(x)
        return gate(pooled, *network(*means, gate_h, gate_w))

    def twice(x, gate_h, gate_w):
        pooled, *means = pool(x)
        gates = network(*means, gate_h, gate_w)
        return gate(pooled, *gates) + gate(pooled, gates[0] * 2, gates[1] - 1).square()

    def in_a_row(x, gate_h, gate_w):
        pooled, *means = pool(x)
        return gate(gate(pooled, *network(*means, gate_h, gate_w)), gate_h, gate_w)

    def residual(x, gate_h, gate_w):
        pooled, *means = pool(x)
        return gate(pooled, *network(*means, gate_h, gate_w)) + x

    def means_alone(x, gate_h, gate_w):
        _, *means = pool(x)
        gates = network(*means, gate_h, gate_w)
        return gates[0] * gates[1]

    def one_mean(x, gate_h, gate_w):
        pooled, height, _ = pool(x)
        return gate(pooled, torch.sigmoid(height) * gate_h, gate_w)

    def other_mean(x, gate_h, gate_w):
        _, _, width = pool(x)
        return torch.sigmoid(width) * gate_w + gate_h

    def gate_of_constants(x, gate_h, gate_w):
        pooled, *_ = pool(x)
        return gate(pooled, gate_h, gate_w)

    def pooled_again(x, gate_h, gate_w):
        pooled, *means = pool(x)
        again, *others = pool(x)
        return gate(pooled, *network(*means, gate_h, gate_w)) * gate(again, *network(*others, gate_w.mT, gate_h.mT))

    def of_an_intermediate(x, gate_h, gate_w):
        return once(torch.sin(x) * 2, gate_h, gate_w).cos()

    return {function.__name__: function for function in (
        once, twice, in_a_row, residual, means_alone, one_mean, other_mean, gate_of_constants, pooled_again,
        of_an_intermediate,
    )}  # fmt: skip


def pool_with(backend: str) -> Any:
    def pool(x: torch.Tensor) -> tuple:
        pooled = attnk.coordinate_pool(x, backend=backend)
        return pooled, pooled.height, pooled.width

    return pool


@pytest.mark.parametrize("use", uses(None, None))
def test_uses_of_what_was_pooled(backend, device, use, fresh_dynamo):
    inputs = draw((2, 3, 5, 5), device=device)
    fused = uses(pool_with(backend), functools.partial(attnk.coordinate_gate, backend=backend))[use]
    plain = uses(lambda x: (x, *coordinate_pool_reference(x)), coordinate_gate_reference)[use]
    assert_matches_reference(fused, plain, inputs)
    if backend == "torch":
        assert_matches_reference(torch.compile(fused, backend="aot_eager", fullgraph=True), plain, inputs)
    if use in ("once", "twice", "one_mean"):
        assert_matches_reference(fused, plain, draw((2, 3, 5, 5), device=device, layout="channels_last"), grads=["x"])


def test_one_gradient_is_written(backend, device):
    """With what was pooled, the gradient of x is made by one call; without, by two."""
    written = []
    real = attnk.ops.coordinate_gate._dx
    with mock.patch("attnk.ops.coordinate_gate._dx", lambda *args: written.append(args) or real(*args)):
        for times, pooled_is_given in ((1, True), (2, False)):
            x, *gates = (tensor.requires_grad_() for tensor in draw((2, 3, 4, 5), device=device).values())
            pooled = attnk.coordinate_pool(x, backend=backend)
            gates = network(pooled.height, pooled.width, *gates)
            attnk.coordinate_gate(pooled if pooled_is_given else x, *gates, backend=backend).sum().backward()
            assert len(written) == times
            written.clear()


def test_backends_mix(device):
    inputs = draw((2, 3, 4, 5), torch.float64, device)
    for one, other in itertools.permutations(("torch", "reference"), 2):

        def mixed(x, gate_h, gate_w, one=one, other=other):
            pooled = attnk.coordinate_pool(x, backend=one)
            return attnk.coordinate_gate(pooled, *network(pooled.height, pooled.width, gate_h, gate_w), backend=other)

        assert_matches_reference(mixed, attend_reference, inputs)


def test_pooled_without_gradients(backend, device):
    inputs = draw((2, 3, 4, 5), device=device)

    def late(x, gate_h, gate_w):
        with torch.no_grad():
            pooled = attnk.coordinate_pool(x, backend=backend)
        return attnk.coordinate_gate(pooled, gate_h, gate_w, backend=backend)

    assert_matches_reference(late, coordinate_gate_reference, inputs)
    leaf = inputs["x"].requires_grad_()
    pooled = attnk.coordinate_pool(leaf, backend=backend)
    with torch.no_grad():
        attnk.coordinate_gate(pooled, inputs["gate_h"], inputs["gate_w"], backend=backend)
    out = attnk.coordinate_gate(pooled, inputs["gate_h"], inputs["gate_w"], backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), leaf)  # gradients were deferred for this call, not the one before
    torch.testing.assert_close(grad, (inputs["gate_h"] * inputs["gate_w"]).expand_as(grad))


def test_changed_between_pooling_and_gate(backend, device):
    x, gate_h, gate_w = (tensor.requires_grad_() for tensor in draw((2, 3, 4, 5), torch.float64, device).values())
    results = []
    for fused in (True, False):
        middle = x * 1
        if fused:
            pooled = attnk.coordinate_pool(middle, backend=backend)
            means = pooled.height, pooled.width
        else:
            pooled, means = middle, coordinate_pool_reference(middle)
        gates = network(*means, gate_h, gate_w)
        middle.mul_(3)
        function = functools.partial(attnk.coordinate_gate, backend=backend) if fused else coordinate_gate_reference
        out = function(pooled, *gates)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), (x, gate_h, gate_w))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["attend", "gate"])
def test_second_differentiation_raises(backend, device, name, which):
    inputs = draw((1, 3, 3, 4), device=device)
    function = functions(backend)[which][0]
    leaf = inputs[name].requires_grad_()
    (grad,) = torch.autograd.grad(function(**inputs).sum(), leaf, create_graph=True)
    if which == "gate" and name == "x":  # linear in x
        assert not grad.requires_grad
        (grad,) = torch.autograd.grad(function(**inputs).square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(grad.square().sum(), leaf)

    def once(tensor: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda tensor: function(**{**inputs, name: tensor}).square().sum())(tensor).sum()

    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.func.grad(once)(leaf.detach())


def test_second_derivative_across_inputs_raises(backend, device):
    """The gradient of a gate depends on x, though x is read detached."""
    x, gate_h, gate_w = (tensor.requires_grad_() for tensor in draw((1, 3, 3, 4), device=device).values())
    (dgate,) = torch.autograd.grad(attend(x, gate_h, gate_w, backend).sum(), gate_h, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(dgate.sum(), x)


def test_second_derivative_of_the_definition_is_as_told(device):
    inputs = draw((1, 2, 3, 3), torch.float64, device)
    leaf = inputs["x"].requires_grad_()
    with attnk.use_backend("reference"):
        (grad,) = torch.autograd.grad(attend(**inputs).square().sum(), leaf, create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), leaf)[0].isfinite().all()


def test_create_graph_of_a_first_derivative(backend, device):
    leaves = [tensor.requires_grad_() for tensor in draw((1, 3, 3, 4), device=device).values()]
    plain = torch.autograd.grad(attend(*leaves, backend).sum(), leaves)
    created = torch.autograd.grad(attend(*leaves, backend).sum(), leaves, create_graph=True)
    assert_same_bits([grad.detach() for grad in created], list(plain))


@pytest.mark.parametrize("what", ["nan", "nan_channel", "inf", "both_infs", "nan_gate", "zero_gate"])
def test_nan_and_infinities(backend, device, what):
    for layout in ("contiguous", "channels_last"):
        inputs = draw((2, 4, 7, 3), device=device, layout=layout)
        x, nan, inf = inputs["x"], float("nan"), float("inf")
        if what == "nan":
            x[0, 1, 2, 1] = nan
        elif what == "nan_channel":
            x[0, 2] = nan
        elif what == "inf":
            x[0, 1, 2, 1] = inf
        elif what == "both_infs":
            x[0, 1, 2, 0], x[0, 1, 2, 1] = -inf, inf
        elif what == "nan_gate":
            inputs["gate_h"][0, 1, 2] = nan
        else:
            inputs["gate_w"][0, 1] = 0
        check(backend, inputs)


def test_nan_behind_the_channels_does_not_leak(backend, device):
    values, dout = torch.randn(2, 2, 3, 4, 5, device=device)
    for memory_format in MEMORY_FORMATS.values():
        padded = torch.full((2, 2, 8, 6, 9), float("nan"), device=device)
        x, gradient = (part.contiguous(memory_format=memory_format)[:, 2:5, 1:5, 2:7] for part in padded)
        x.copy_(values)
        gradient.copy_(dout)
        inputs = draw((2, 3, 4, 5), device=device)
        check(backend, inputs | {"x": x}, dout=gradient, only="gate")


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 0, 0)])
def test_empty(backend, device, shape):
    for layout in ("contiguous", "channels_last"):
        inputs = draw(shape, device=device, layout=layout)
        check(backend, inputs, only="gate")
        leaves = [tensor.requires_grad_() for tensor in inputs.values()]
        pooled = attnk.coordinate_pool(leaves[0], backend=backend)
        out = attnk.coordinate_gate(pooled, leaves[1] + pooled.height, leaves[2] * pooled.width, backend=backend)
        assert out.shape == shape
        out.sum().backward()
        for leaf in leaves:
            assert torch.equal(leaf.grad, torch.zeros_like(leaf))
        pooled = attnk.coordinate_pool(inputs["x"].detach(), backend=backend)
        for mean, expected in zip((pooled.height, pooled.width), coordinate_pool_reference(inputs["x"]), strict=True):
            assert torch.equal(mean, expected)


X = torch.zeros(1, 3, 4, 5)
H = torch.zeros(1, 3, 4, 1)
W = torch.zeros(1, 3, 1, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([1.0], H, W), TypeError, "x must be a tensor, got list"),
        (lambda f: f(X, [1.0], W), TypeError, "gate_h must be a tensor, got list"),
        (lambda f: f(X, H, None), TypeError, "gate_w must be a tensor, got NoneType"),
        (lambda f: f(X[0, 0], H, W), ValueError, r"x must be \(B, C, H, W\) or \(C, H, W\), got 2 dimensions"),
        (lambda f: f(X[None], H, W), ValueError, "x must be .* got 5 dimensions"),
        (lambda f: f(X[:, :0], H, W), ValueError, r"x must have at least one channel, got \(1, 0, 4, 5\)"),
        (lambda f: f(X.int(), H, W), TypeError, "x must be float16, .* got torch.int32"),
        (lambda f: f(X.bool(), H, W), TypeError, "x must be float16, .* got torch.bool"),
        (lambda f: f(X.cfloat(), H, W), TypeError, "x must be float16, .* got torch.complex64"),
        (lambda f: f(X.to(torch.float8_e4m3fn), H, W), TypeError, "x must be float16, .* got torch.float8_e4m3fn"),
        (lambda f: f(X, H.double(), W), TypeError, "gate_h must have the dtype of x, torch.float32, got torch.float64"),
        (lambda f: f(X.half(), H.half(), W), TypeError, "gate_w must have the dtype of x, torch.float16, got .*32"),
        (lambda f: f(X, H.to("meta"), W), ValueError, "gate_h must be on the device of x, .* got meta"),
        (lambda f: f(X, W, H), ValueError, r"gate_h must be \(B, C, H, 1\) of x, \(1, 3, 4, 1\), got \(1, 3, 1, 5\)"),
        (lambda f: f(X, H, W[:, :2]), ValueError, r"gate_w must be \(B, C, 1, W\) of x, .* got \(1, 2, 1, 5\)"),
        (lambda f: f(X, H, W[..., :1]), ValueError, r"gate_w must be .* got \(1, 3, 1, 1\)"),
        (lambda f: f(X, H[0], W), ValueError, r"gate_h must be .* got \(3, 4, 1\)"),
        (lambda f: f(X[0], H, W), ValueError, r"gate_h must be \(C, H, 1\) of x, \(3, 4, 1\), got \(1, 3, 4, 1\)"),
        (lambda f: f(X, H, W, backend="cuda"), ValueError, "backend must be one of 'auto', 'triton', .* got 'cuda'"),
        (lambda f: attnk.coordinate_pool(X.int()), TypeError, "x must be float16, .* got torch.int32"),
        (lambda f: attnk.coordinate_pool(X[0, 0]), ValueError, "x must be .* got 2 dimensions"),
        (lambda f: attnk.coordinate_pool(X, backend="gpu"), ValueError, "backend must be one of"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(attnk.coordinate_gate)


def test_explain():
    x, gate_h, gate_w = (tensor.half() for tensor in (X, H, W))
    assert attnk.explain("coordinate_gate", x, gate_h, gate_w).backend == "torch"
    with pytest.raises(ValueError, match="gate_h must be"):
        attnk.explain("coordinate_gate", x, gate_w, gate_h)


@needs_interpreter
def test_explain_names_the_configuration(kernels):
    for x in (X, X.contiguous(memory_format=torch.channels_last)):
        found = attnk.explain("coordinate_gate", x, H, W, backend="triton")
        assert (found.backend, found.reason) == ("triton", "asked for")
        assert found.config == kernels.coordinate_gate_config(
            "interpreter", itemsize=4, channels_last=is_channels_last(x)
        )


@pytest.mark.parametrize("names", [names for size in (1, 2) for names in itertools.combinations(NAMES, size)], ids=str)
def test_subsets_of_gradients(backend, device, names):
    inputs = draw((2, 5, 3, 4), device=device)
    check(backend, inputs, grads=names)
    leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in inputs.items()}
    attend(**leaves, backend=backend).sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in names)


def test_no_graph_where_none_is_wanted(backend, device):
    inputs = draw((2, 5, 3, 4), device=device)
    expected = attend(**inputs, backend=backend)
    assert expected.grad_fn is None
    assert attnk.coordinate_pool(inputs["x"], backend=backend)._handles == []
    wanting = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    with torch.no_grad():
        out = attend(**wanting, backend=backend)
    assert not out.requires_grad
    assert torch.equal(out, expected)
    with torch.inference_mode():
        out = attend(**wanting, backend=backend)
        assert out.is_inference()
    assert torch.equal(out, expected)
    check(backend, inputs, grads=())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_for_backward(backend, device, dtype, layout):
    """x, without a copy, and vectors of a number a row or a column."""
    x, gate_h, gate_w = draw((1, 16, 16, 16), dtype, device, layout=layout).values()
    x.requires_grad_()
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pooled = attnk.coordinate_pool(x, backend=backend)
        attnk.coordinate_gate(pooled, gate_h * pooled.height, gate_w * pooled.width, backend=backend)
    others = [tensor for tensor in saved if tensor.data_ptr() != x.data_ptr()]
    assert len(others) < len(saved)
    assert all(tensor.numel() <= 16 * 16 for tensor in others)


def test_checkpoint_behind_the_pooling(backend, device):
    """The gate is computed once more, when what was pooled has given its handles away."""
    inputs = {name: tensor.requires_grad_() for name, tensor in draw((2, 3, 4, 5), device=device).items()}

    def network(run, x, gate_h, gate_w):
        pooled = attnk.coordinate_pool(x, backend=backend)
        return run(
            lambda *gates: attnk.coordinate_gate(pooled, *gates, backend=backend), gate_h + pooled.height, gate_w
        )

    outs = [network(run, **inputs) for run in (
        lambda function, *gates: function(*gates), functools.partial(checkpoint.checkpoint, use_reentrant=False)
    )]  # fmt: skip
    grads = [torch.autograd.grad(out.square().sum(), list(inputs.values())) for out in outs]
    torch.testing.assert_close(*grads)


def test_handles_take_no_memory(backend, device):
    pooled = attnk.coordinate_pool(draw((2, 3, 4, 5), device=device)["x"].requires_grad_(), backend=backend)
    (handles,) = pooled._handles
    assert all(handle.untyped_storage().nbytes() <= 8 for handle in handles)
    assert all(handle.isnan().all() for handle in handles[:3])
    assert "_handles" not in repr(pooled)


@pytest.mark.parametrize("which", ["attend", "gate"])
def test_input_changed_in_place(backend, device, which):
    for name in NAMES:
        inputs = draw((2, 5, 3, 4), device=device)
        leaves = {key: tensor.clone().requires_grad_() * 1 for key, tensor in inputs.items()}
        out = functions(backend)[which][0](**leaves)
        leaves[name].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_output_changed_in_place(backend, device):
    assert_matches_reference(
        lambda **tensors: attend(**tensors, backend=backend).mul_(2).add_(1),
        lambda **tensors: attend_reference(**tensors) * 2 + 1,
        draw((2, 5, 3, 4), torch.float64, device),
    )


def test_retain_graph(backend, device):
    leaves = [tensor.requires_grad_() for tensor in draw((2, 5, 3, 4), device=device).values()]
    out = attend(*leaves, backend)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dout)
    assert_same_bits(list(first), list(second))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeats(backend, device, layout):
    inputs = draw((2, 6, 9, 7), device=device, layout=layout)
    expected = run(backend, inputs)
    for _ in range(3 if backend == "triton" and dispatch.INTERPRETED else 20):
        assert_same_bits(run(backend, inputs), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeats_in_tiles(device, layout):
    inputs = draw((4, 64, 40, 40), device=device, layout=layout)
    expected = run("torch", inputs)
    for _ in range(5):
        assert_same_bits(run("torch", inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", ["nothing", "x", "gates"])
def test_autocast(backend, device, dtype, half):
    if half == "x" and dtype == torch.bfloat16 and backend == "triton" and dispatch.INTERPRETED:
        pytest.skip("the interpreter truncates to bfloat16")
    inputs = draw((2, 5, 6, 4), device=device)
    for name in {"nothing": (), "x": ("x",), "gates": ("gate_h", "gate_w")}[half]:
        inputs[name] = inputs[name].to(dtype)

    def under_autocast(gate: Any, **tensors: Any) -> torch.Tensor:
        with torch.autocast(device, dtype):
            return gate(**tensors)

    function, reference = functions(backend)["gate"]
    assert_matches_reference(
        functools.partial(under_autocast, function), functools.partial(under_autocast, reference), inputs
    )
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out = under_autocast(functools.partial(attend, backend=backend), **leaves)
    assert out.dtype == inputs["x"].dtype
    out.float().square().mean().backward()
    for leaf in leaves.values():
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("which", ["attend", "gate"])
def test_compile(backend, device, which, fresh_dynamo):
    function, reference = functions(backend)[which]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for layout in ("contiguous", "channels_last"):
        inputs = draw((2, 5, 3, 4), device=device, layout=layout)
        assert_matches_reference(compiled, reference, inputs)
        assert_matches_reference(compiled, reference, inputs, grads=())
    assert_matches_reference(compiled, reference, inputs, grads=("gate_w",))


def test_compile_in_a_network(backend, device, fresh_dynamo):
    def around(gate: Any, x: torch.Tensor, **gates: torch.Tensor) -> torch.Tensor:
        return gate(torch.sin(x) * 2, **gates).cos() + x

    function, reference = functions(backend)["attend"]
    compiled = torch.compile(functools.partial(around, function), fullgraph=True, backend="inductor")
    assert_matches_reference(compiled, functools.partial(around, reference), draw((2, 5, 4, 6), device=device))


def test_compile_dynamic_shapes(backend, device, fresh_dynamo):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(functools.partial(attend, backend=backend), fullgraph=True, backend=counter)
    for shape in ((2, 5, 4, 6), (3, 7, 5, 8), (4, 6, 9, 3)):
        assert_matches_reference(compiled, attend_reference, draw(shape, device=device))
    assert counter.frame_count <= 2


class Network(torch.nn.Module):
    def __init__(self, channels: int, backend: str) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, channels, 1)
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = attnk.coordinate_pool(x, backend=self.backend)
        gate_h, gate_w = torch.sigmoid(self.conv(pooled.height)), torch.sigmoid(self.conv(pooled.width))
        return attnk.coordinate_gate(pooled, gate_h, gate_w, backend=self.backend)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("exported_with_grad", [False, True])
def test_exported_programs_train(backend, device, strict, exported_with_grad, fresh_dynamo):
    """An exported program calls the operations by themselves: any size, and for their gradients."""
    module = Network(5, backend).to(device)
    x = torch.randn(2, 5, 6, 4, device=device)
    size = torch.export.Dim
    shapes = {"x": {0: size("b"), 2: size("h"), 3: size("w")}}
    with torch.set_grad_enabled(exported_with_grad):
        exported = torch.export.export(module, (x,), strict=strict, dynamic_shapes=shapes)
    assert "attnk.coordinate_gate_pool" in str(exported)
    assert "attnk.coordinate_gate_forward" in str(exported)
    program, results = exported.module(), []
    x = torch.randn(3, 5, 7, 5, device=device, requires_grad=True)
    for network in (module, program):
        out = network(x)
        results.append([out.detach(), *torch.autograd.grad((out**2).sum(), (x, *network.parameters()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", ["channels_last", "batch_innermost", "crop"])
def test_opcheck(backend, device, layout, fresh_dynamo):
    x, gate_h, gate_w = draw((3, 5, 4, 6), torch.float64, device, layout=layout).values()
    ops = torch.ops.attnk
    torch.library.opcheck(ops.coordinate_gate_pool.default, (x.requires_grad_(), backend))
    gates = (gate_h.requires_grad_(), gate_w.requires_grad_())
    torch.library.opcheck(ops.coordinate_gate_forward.default, (x, *gates, backend))
    plain = {"test_utils": ("test_schema", "test_faketensor")}
    x, gate_h, gate_w = (tensor.detach() for tensor in (x, gate_h, gate_w))
    dout = dict(layouts(torch.randn(3, 5, 4, 6, dtype=torch.float64, device=device)))[layout]
    torch.library.opcheck(ops.coordinate_gate_backward.default, (dout, x, gate_h, gate_w, backend), **plain)
    sizes = (4, 6, is_channels_last(x), backend)
    for tensors in (
        (dout, gate_h, gate_w, gate_h, gate_w), (dout, gate_h, gate_w, None, None), (dout, None, None, gate_h, None),
        (None, None, None, None, gate_w), (None, None, None, gate_h, gate_w),
    ):  # fmt: skip
        torch.library.opcheck(ops.coordinate_gate_dx.default, (*tensors, *sizes), **plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_strides_are_real_strides(backend, device, layout):
    leaves = [tensor.requires_grad_() for tensor in draw((3, 5, 4, 6), device=device, layout=layout).values()]
    for function, _ in functions(backend).values():
        real = function(*leaves)
        grads = torch.autograd.grad(real.sum(), leaves)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = [mode.from_tensor(leaf).detach().requires_grad_() for leaf in leaves]
            fake = function(*fakes)
            fake_grads = torch.autograd.grad(fake.sum(), fakes)
        for one, other in zip((real, *grads), (fake, *fake_grads), strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("which", ["attend", "gate"])
def test_func_grad(backend, device, which):
    inputs = draw((2, 5, 3, 4), device=device)

    def gradient(gate: Any, position: int, x: Any, gate_h: Any, gate_w: Any) -> torch.Tensor:
        return torch.func.grad(lambda *tensors: gate(*tensors).square().sum(), position)(x, gate_h, gate_w)

    function, reference = functions(backend)[which]
    for position in range(3):
        assert_matches_reference(
            functools.partial(gradient, function, position), functools.partial(gradient, reference, position), inputs,
            grads=(),
        )  # fmt: skip


@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (2, None, None), (None, 0, None), (0, 0, 0), (None, None, 1), (1, 0, None)], ids=str
)
@pytest.mark.parametrize("which", ["attend", "gate"])
def test_vmap(backend, device, in_dims, which):
    inputs = draw((2, 3, 2, 4), device=device)
    for name, dim in zip(NAMES, in_dims, strict=True):
        if dim is not None:
            inputs[name] = torch.stack([inputs[name], inputs[name] * 2 - 0.5, inputs[name].flip(0)], dim)
    function, reference = functions(backend)[which]
    assert_matches_reference(
        lambda **tensors: torch.vmap(function, in_dims)(*tensors.values()),
        lambda **tensors: one_by_one(in_dims, reference, *tensors.values()),
        inputs,
    )


def test_vmap_over_gates_of_one_pooled_map(backend, device):
    """The examples share the map, whose handles would add up: each has the ordinary gradient with its own gate."""
    inputs = draw((2, 3, 2, 4), torch.float64, device)
    inputs["gate_h"] = torch.stack([inputs["gate_h"], inputs["gate_h"] * 2 - 0.5])

    def mapped(x, gate_h, gate_w):
        pooled = attnk.coordinate_pool(x, backend=backend)
        gates = gate_w * torch.sigmoid(pooled.width)
        return torch.vmap(lambda gate: attnk.coordinate_gate(pooled, gate, gates, backend=backend))(gate_h)

    def looped(x, gate_h, gate_w):
        gates = gate_w * torch.sigmoid(coordinate_pool_reference(x)[1])
        return torch.stack([coordinate_gate_reference(x, gate, gates) for gate in gate_h])

    assert_matches_reference(mapped, looped, inputs)


@pytest.mark.parametrize("which", ["attend", "gate"])
def test_vmap_of_grad(backend, device, which):
    inputs = draw((2, 3, 2, 4), device=device)
    function, reference = functions(backend)[which]

    def gradient(gate: Any, position: int, *tensors: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda *tensors: gate(*tensors).square().sum(), position)(*tensors)

    for position, in_dims in itertools.product(range(3), ((0, 0, 0), (0, None, None))):
        some = {name: tensor[0] if dim is None else tensor for (name, tensor), dim in zip(inputs.items(), in_dims)}  # noqa: B905
        assert_matches_reference(
            lambda position=position, in_dims=in_dims, **tensors: torch.vmap(
                functools.partial(gradient, function, position), in_dims
            )(*tensors.values()),
            lambda position=position, in_dims=in_dims, **tensors: one_by_one(
                in_dims,
                functools.partial(gradient, lambda *t: reference(*(tensor[None] for tensor in t))[0], position),
                *tensors.values(),
            ),
            some,
            grads=(),
        )


@pytest.mark.parametrize("which", ["attend", "gate"])
def test_jacrev(backend, device, which):
    inputs = draw((1, 2, 2, 2), device=device)
    function, reference = functions(backend)[which]
    for position in range(3):
        assert_matches_reference(
            lambda position=position, **tensors: torch.func.jacrev(function, position)(*tensors.values()),
            lambda position=position, **tensors: torch.func.jacrev(reference, position)(*tensors.values()),
            inputs,
            grads=(),
        )


@pytest.mark.parametrize("which", ["attend", "gate"])
def test_forward_mode_raises(backend, device, which):
    x, gate_h, gate_w = draw((1, 2, 2, 3), device=device).values()
    function = functools.partial(functions(backend)[which][0], gate_h=gate_h, gate_w=gate_w)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        function(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(backend, device, reentrant):
    leaves = [tensor.requires_grad_() for tensor in draw((2, 5, 3, 4), device=device).values()]
    function = functools.partial(attend, backend=backend)
    function(*leaves).square().sum().backward()
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    checkpoint.checkpoint(function, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert_same_bits([leaf.grad for leaf in leaves], expected)


def test_selective_checkpoint(backend, device):
    inputs = draw((2, 5, 3, 4), device=device)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    expected = run(backend, inputs)[1:]
    seen, kept = [], (torch.ops.attnk.coordinate_gate_pool.default, torch.ops.attnk.coordinate_gate_forward.default)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
        seen.append((op, context.is_recompute))
        return checkpoint.CheckpointPolicy.MUST_SAVE if op in kept else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    out = checkpoint.checkpoint(
        functools.partial(attend, backend=backend), *leaves, use_reentrant=False,
        context_fn=functools.partial(checkpoint.create_selective_checkpoint_contexts, policy),
    )  # fmt: skip
    dout = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
    assert_same_bits(list(torch.autograd.grad(out, leaves, dout)), expected)
    assert {(op, False) for op in kept} <= set(seen)


def test_threads(backend, device):
    if backend == "triton" and dispatch.INTERPRETED:
        pytest.skip("the interpreter runs one kernel at a time")
    inputs = [draw((2, 5 + i, 20, 30), device=device) for i in range(8)]
    expected = [run(backend, one) for one in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for result, wanted in zip(pool.map(functools.partial(run, backend), inputs), expected, strict=True):
                assert_same_bits(result, wanted)


def test_traces_take_other_sizes():
    module = Network(4, "torch").eval()
    for x in (torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6, requires_grad=True)):
        traced = torch.jit.trace(module, x)
        other = torch.randn(5, 4, 30, 40)
        torch.testing.assert_close(traced(other), module(other))


def test_meta_tensors():
    x, gate_h, gate_w = (tensor.to("meta").requires_grad_() for tensor in (X, H, W))
    out = attend(x, gate_h, gate_w)
    out.sum().backward()
    assert out.shape == x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 3, 2, 3), (2**31 + 40, 6, 3, 1)),
        ((1, 3, 2, 3), (2**31, 2**30 + 40, 3, 1)),
        ((1, 2, 3, 2), (2**33, 2**32, 2**30 + 40, 1)),
        ((1, 2, 2, 2), (2**33, 1, 2**31 + 80, 2**30 + 40)),
        ((2, 3, 1, 1), (2**31 + 40, 1, 2**40, 2**40)),
    ],
    ids=["batch", "channel", "row", "pixel", "one_pixel"],
)
def test_offsets_beyond_32_bits(kernels, shape, strides):
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
    read, _ = kernels.addressable(inputs["x"], is_channels_last(inputs["x"]))
    assert read is inputs["x"]
    with Meter():  # fails on a 32-bit overflow
        check("triton", inputs, dout=dout, only="gate")


def bytes_of_launches(x: torch.Tensor, slabs: int, chunks: int) -> list[tuple[str, int]]:
    """The closed formula in the docstring of ``attnk.kernels.coordinate_gate``, loaded and stored together."""
    size = x.element_size()
    acc = 8 if x.dtype == torch.float64 else 4
    batch, channels, height, width = x.shape
    rows, columns = batch * channels * height, batch * channels * width

    def sums(of_rows: int, of_columns: int) -> tuple[int, list[tuple[str, int]]]:
        stored = (rows * size if chunks == 1 else chunks * rows * acc) + (
            columns * size if slabs == 1 else slabs * columns * acc
        )
        second = [("fwd_sum", parts * count * acc + count * size) for parts, count in ((chunks, rows), (slabs, columns))
                  if parts > 1]  # fmt: skip
        return stored, second

    stored, second = sums(rows, columns)
    vectors = (rows + columns) * size
    return [
        ("fwd_pool", x.numel() * size + stored), *second,
        ("fwd", 2 * x.numel() * size + vectors),
        ("bwd_dgate", 2 * x.numel() * size + vectors + stored), *second,
        ("bwd_dx", 2 * x.numel() * size + vectors + (rows + columns) * acc),
    ]  # fmt: skip


@needs_interpreter
@pytest.mark.parametrize(
    ("dtype", "layout", "config", "slabs", "chunks"),
    [
        (torch.float32, "contiguous", {"tile": 64, "slab": 64}, 1, 1),
        (torch.float16, "contiguous", {"tile": 64, "slab": 64}, 1, 1),
        (torch.float16, "contiguous", {"tile": 16, "slab": 2}, 3, 1),
        (torch.float64, "contiguous", {"tile": 4, "slab": 3}, 2, 2),
        (torch.float64, "channels_last", {"tile": 64, "block_c": 4, "slab": 64}, 1, 1),
        (torch.float16, "channels_last", {"tile": 32, "block_c": 4, "slab": 2}, 3, 1),
        (torch.float32, "channels_last", {"tile": 16, "block_c": 8, "slab": 3}, 2, 4),
    ],
)
def test_bytes_are_the_formula(kernels, dtype, layout, config, slabs, chunks):
    inputs = draw((1, 5, 6, 7), dtype, layout=layout)
    x, gate_h, gate_w = (tensor.requires_grad_() for tensor in inputs.values())
    with configured(kernels, **config), Meter() as meter:
        pooled = attnk.coordinate_pool(x, backend="triton")
        out = attnk.coordinate_gate(pooled, gate_h * pooled.height, gate_w * pooled.width, backend="triton")
        out.backward(torch.ones_like(out))
    found = [
        (launch.kernel.removeprefix("_coordinate_gate_").removesuffix("_kernel"), launch.loaded + launch.stored)
        for launch in meter.launches
    ]
    assert found == bytes_of_launches(x, slabs, chunks)
    for launch in meter.launches:
        assert launch.atomics == 0
        assert launch.store_lanes == launch.stored


@needs_interpreter
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
def test_bytes_at_64_channels(memory_format):
    inputs = draw((1, 64, 56, 56))
    x = inputs["x"] = inputs["x"].contiguous(memory_format=memory_format)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    with Meter() as forward:
        pooled = attnk.coordinate_pool(x, backend="triton")
        gates = leaves[1] * pooled.height, leaves[2] * pooled.width
        out = attnk.coordinate_gate(pooled, *gates, backend="triton")
    with Meter() as backward:
        out.backward(torch.ones_like(out))
    assert forward.bytes <= 3.2 * x.nbytes
    assert backward.bytes <= 4.3 * x.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    pairwise(
        shape=((4, 64, 112, 112), (8, 64, 56, 56), (8, 256, 28, 28), (16, 512, 14, 14), (16, 2048, 7, 7),
               (1, 3, 700, 1300)),
        dtype=(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        layout=("contiguous", "channels_last"),
    ),
)  # fmt: skip
def test_network_shapes(backend, case):
    check(backend, draw(case["shape"], case["dtype"], "cuda", layout=case["layout"]))


@pytest.mark.gpu
def test_repeats_on_network_shapes(backend):
    inputs = draw((16, 256, 56, 56), torch.bfloat16, "cuda")
    expected = run(backend, inputs)
    for _ in range(20):
        assert_same_bits(run(backend, inputs), expected)


@pytest.mark.gpu
def test_other_stream(backend):
    inputs = draw((8, 256, 56, 56), torch.float32, "cuda")
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
def test_graph_capture():
    first, second = (draw((4, 64, 56, 56), torch.float32, "cuda") for _ in range(2))
    static = {name: tensor.clone() for name, tensor in first.items()}
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
        check(backend, draw((4, 64, 28, 28), device="cuda:1"))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_images(layout):
    check("triton", draw((65_537, 4, 1, 1), torch.float32, "cuda", layout=layout))
    check("triton", draw((65_537, 3, 2, 2), torch.float32, "cuda", layout=layout))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_beyond_32_bits(layout):
    if torch.cuda.mem_get_info()[1] < 40 * 2**30:
        pytest.skip("needs a device with 40 GiB")
    shape = (33, 64, 1024, 1024)
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=MEMORY_FORMATS[layout])
    for image in x:
        image.normal_()
    gates = [torch.rand(33, 64, *rest, dtype=torch.float16, device="cuda") for rest in ((1024, 1), (1, 1024))]
    results = []
    for part, *few in ((x, *gates), (x[-1:].clone(), *(gate[-1:] for gate in gates))):
        leaf = part.requires_grad_()
        out = attnk.coordinate_gate(leaf, *few, backend="triton")
        results.append([out.detach()[-1:], torch.autograd.grad(out, leaf, out.detach())[0][-1:]])
        pooled = attnk.coordinate_pool(part.detach(), backend="triton")
        results[-1] += [pooled.height[-1:], pooled.width[-1:]]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
