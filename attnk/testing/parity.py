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
    oracle has it and infinities where the oracle, rounded to the dtype, has them. Shape and dtype must be those of the
    definition, strides too where the input is dense; no input and no gradient may be written to.

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

    _compare("out", got, expected, oracle, dense=all(_is_dense(tensor) for tensor in tensors.values()))
    for name in names:
        _compare(f"d{name}", got_grads[name], expected_grads[name], oracle_grads[name], dense=_is_dense(tensors[name]))
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


def _compare(name: str, got: torch.Tensor, expected: torch.Tensor, oracle: torch.Tensor, dense: bool) -> None:
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"{name}: dtype {got.dtype}, expected {expected.dtype}"
    if dense:
        assert got.stride() == expected.stride(), f"{name}: strides {got.stride()}, expected {expected.stride()}"
    rounded = oracle.to(got.dtype)
    assert torch.equal(got.isnan(), rounded.isnan()), f"{name}: NaN in other places than the oracle has it"
    infinite = rounded.isinf()
    assert torch.equal(got.isinf(), infinite), f"{name}: infinite in other places than the oracle"
    assert torch.equal(got[infinite], rounded[infinite]), f"{name}: infinities of the wrong sign"
    finite = rounded.isfinite()
    if not finite.any():
        return
    reference = oracle[finite]
    allowed = 2 * (
        (expected[finite].double() - reference).nan_to_num(0, 0, 0).abs().max()
        + torch.finfo(got.dtype).eps * reference.abs().max()
    )
    error = (got[finite].double() - reference).abs().max()
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.dim() != 4 or any(
        tensor.is_contiguous(memory_format=memory_format)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    )


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
