"""Parity with a float64 oracle, and the memory layouts to try it in."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

Inputs = Mapping[str, torch.Tensor | None]


def assert_matches_reference(
    function: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    inputs: Inputs,
    *,
    grads: Iterable[str] | None = None,
    dout: torch.Tensor | None = None,
) -> None:
    """Check a function's output and every gradient against its definition.

    The oracle is the definition in float64. With ``err`` the largest deviation from it, output and gradients pass when
    ``err <= 2 * (err of the definition in the inputs' dtype + eps * max |oracle|)``, and NaN stands exactly where the
    oracle has it and infinities where the oracle, rounded to the dtype, has them. The definition is judged on several
    gradients of the output, the given one and others with random signs, for a sum may come out small or exact by luck;
    in float64, where it is its own oracle, by its error in float32, scaled. Shape and dtype must be those of the
    definition; where an input is contiguous or channels_last, its gradient is too, and where all are, the output has
    the definition's strides. No input and no gradient may be written to.

    Args:
        function: what is tested; called with the inputs by name.
        reference: its definition, called alike; differentiable in any float dtype.
        inputs: tensors by argument name; None is passed on.
        grads: the names to differentiate for; all tensors by default, empty to check the output alone.
        dout: gradient of the output; drawn from a fixed seed by default.

    Raises:
        AssertionError: names the tensor that deviates, by how much and what was allowed.
    """
    tensors = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    names = list(tensors if grads is None else grads)
    before = {name: tensor.clone() for name, tensor in tensors.items()}

    expected, expected_grads, dout = _differentiate(reference, inputs, names, dout)
    got, got_grads, _ = _differentiate(function, inputs, names, dout)
    wide = {name: None if tensor is None else tensor.detach().double() for name, tensor in inputs.items()}
    oracle, oracle_grads, _ = _differentiate(reference, wide, names, dout.double())

    allowed = dict.fromkeys(("out", *names), 0.0)
    double = got.dtype == torch.float64
    narrow = {name: None if tensor is None else tensor.float() for name, tensor in inputs.items()} if double else inputs
    wide = {name: None if tensor is None else tensor.detach().double() for name, tensor in narrow.items()}
    douts = [dout * signs for signs in _signs(dout, draws=8 if names else 1)]
    rough = _differentiate_often(reference, narrow, names, [one.float() if double else one for one in douts])
    exact = _differentiate_often(reference, wide, names, [one.double() for one in douts])
    for name in allowed:
        pairs = zip(rough[name], exact[name], strict=True)
        allowed[name] = max(_tolerance(one, other) for one, other in pairs) * (2**-29 if double else 1)

    _compare("out", got, expected, oracle, allowed["out"])
    if got.numel() and all(tensor.dim() < 3 or _formats(tensor) for tensor in tensors.values()):
        assert got.stride() == expected.stride(), f"out: strides {got.stride()}, expected {expected.stride()}"
    for name in names:
        grad = got_grads[name]
        _compare(f"d{name}", grad, expected_grads[name], oracle_grads[name], allowed[name])
        for memory_format in _formats(tensors[name]):
            assert grad.is_contiguous(memory_format=memory_format), f"d{name}: strides {grad.stride()}"
    for name, tensor in tensors.items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), f"{name} was written to"


def _differentiate(
    function: Callable[..., torch.Tensor], inputs: Inputs, names: list[str], dout: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_(name in names)
        for name, tensor in inputs.items()
    }
    with torch.set_grad_enabled(bool(names)):
        out = function(**leaves)
    if dout is None:
        generator = torch.Generator(out.device).manual_seed(0)
        dout = torch.randn(out.shape, dtype=torch.float32, device=out.device, generator=generator).to(out.dtype)
    if not names:
        return out, {}, dout
    before = dout.clone()
    wanted = [leaves[name] for name in names]
    grads = torch.autograd.grad(out, wanted, dout)  # type: ignore[arg-type]
    assert torch.equal(dout, before), "the gradient of the output was written to"
    return out.detach(), dict(zip(names, grads, strict=True)), dout


def _differentiate_often(
    function: Callable[..., torch.Tensor], inputs: Inputs, names: list[str], douts: list[torch.Tensor]
) -> dict[str, list[torch.Tensor]]:
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_(name in names)
        for name, tensor in inputs.items()
    }
    out = function(**leaves)
    wanted = [leaves[name] for name in names]
    grads = [torch.autograd.grad(out, wanted, dout, retain_graph=True) for dout in douts if names]  # type: ignore[arg-type]
    return {"out": [out.detach()], **{name: [grad[i] for grad in grads] for i, name in enumerate(names)}}


def _signs(dout: torch.Tensor, draws: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator(dout.device).manual_seed(1)
    yield dout.new_ones(())
    for _ in range(draws - 1):
        random = torch.rand(dout.shape, device=dout.device, generator=generator)
        yield torch.where(random < 0.5, -1, 1).to(dout.dtype)


def _tolerance(rough: torch.Tensor, exact: torch.Tensor) -> float:
    finite = exact.to(rough.dtype).isfinite()
    if not finite.any():
        return 0.0
    exact = exact[finite]
    error = (rough[finite].double() - exact).nan_to_num(0, 0, 0).abs().max()
    return float(2 * (error + torch.finfo(rough.dtype).eps * exact.abs().max()))


def _compare(name: str, got: torch.Tensor, expected: torch.Tensor, oracle: torch.Tensor, allowed: float) -> None:
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"{name}: dtype {got.dtype}, expected {expected.dtype}"
    rounded = oracle.to(got.dtype)
    assert torch.equal(got.isnan(), rounded.isnan()), f"{name}: NaN in other places than the oracle has it"
    infinite = rounded.isinf()
    assert torch.equal(got.isinf(), infinite), f"{name}: infinite in other places than the oracle"
    assert torch.equal(got[infinite], rounded[infinite]), f"{name}: infinities of the wrong sign"
    finite = rounded.isfinite()
    if finite.any():
        error = (got[finite].double() - oracle[finite]).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def _formats(tensor: torch.Tensor) -> tuple[torch.memory_format, ...]:
    """The memory formats in which a tensor is dense."""
    candidates = {3: (torch.contiguous_format,), 4: (torch.contiguous_format, torch.channels_last)}
    formats = candidates.get(tensor.dim(), ())
    return tuple(memory_format for memory_format in formats if tensor.is_contiguous(memory_format=memory_format))


def layouts(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a (B, C, H, W) tensor's values in every memory layout, with the layout's name.

    All hold the values of x but "expanded", whose images all are x's first.
    """
    batch, channels, height, width = x.shape
    yield "contiguous", x.contiguous()
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "batch_innermost", x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)

    wide = x.new_zeros(batch, channels + 3, height, width)
    wide[:, 2 : channels + 2] = x
    yield "channel_slice", wide[:, 2 : channels + 2]
    yield "channels_last_slice", wide.contiguous(memory_format=torch.channels_last)[:, 2 : channels + 2]

    larger = x.new_zeros(batch, channels, height + 2, width + 3)
    larger[:, :, 1 : height + 1, 2 : width + 2] = x
    yield "crop", larger[:, :, 1 : height + 1, 2 : width + 2]

    step = x.new_zeros(batch, channels, height, 2 * width)
    step[..., ::2] = x
    yield "step_2", step[..., ::2]

    offset = x.new_zeros(x.numel() + 1)
    offset[1:] = x.flatten()
    yield "offset_1", offset[1:].view(x.shape)
    yield "expanded", x[:1].expand(x.shape)
