"""What the tests of attnk.models share: networks without dropout, with weights that matter, and where they must run."""

import copy

import torch
from gate_modules import assert_same, copies
from torch import nn

import attnk


def settled(network, dtype=torch.float64):
    """A network without dropout, with weights under which every part of it moves its output."""
    network = network.to(dtype)
    generator = torch.Generator().manual_seed(5)

    def draw(parameter, scale):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)

    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            draw(parameter, (2 / parameter[0].numel()) ** 0.5)
        else:
            draw(parameter, 0.2)
            if "norm" in name or "bn" in name or "shortcut.1" in name:
                with torch.no_grad():
                    parameter.add_(name.endswith("weight"))
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) - 0.5)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    for part in network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return network


def assert_drop_in(theirs, ours, x):
    """Same keys in the same order, strict loading both ways, same values and gradients in both modes."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs, ours = settled(theirs), settled(ours)
    for parameter in ours.parameters():
        nn.init.zeros_(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for training in (False, True):
        assert_same(ours.train(training), theirs.train(training), x, rtol=1e-8, atol=1e-10)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def assert_same_start(make_theirs, make_ours):
    """The same seed makes the same weights."""
    states = []
    for make in (make_theirs, make_ours):
        torch.manual_seed(3)
        states.append(make().state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(mine, other) for mine, other in zip(states[0].values(), states[1].values(), strict=True))


def results(network, x):
    """Output and gradients of the parameters, in float32."""
    out = network(x)
    out.float().square().mean().backward()
    grads = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    return [out.detach().float(), *(torch.zeros(()) if grad is None else grad.float() for grad in grads)]


def assert_runs_everywhere(network, x, *, kernels=True, compiled=True, autocast_dtype=torch.bfloat16):
    """In float32 on every backend, channels_last, under bfloat16 autocast, in one graph, and as copies."""
    network, x = settled(network, torch.float32).eval(), x.float()
    expected = results(network, x)
    largest = max(tensor.abs().max().item() for tensor in expected)

    def close(got, tolerance):
        for one, other in zip(got, expected, strict=True):
            assert torch.isfinite(one).all()
            torch.testing.assert_close(
                one, other, rtol=0, atol=tolerance * max(other.abs().max().item(), 1e-3 * largest)
            )

    for backend in ("torch", "reference", *(["triton"] if kernels and attnk.dispatch.INTERPRETED else [])):
        with attnk.use_backend(backend):
            close(results(network, x), 1e-3)
    if x.dim() == 4:
        last = copy.deepcopy(network).to(memory_format=torch.channels_last)
        close(results(last, x.contiguous(memory_format=torch.channels_last)), 1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(x)
        results(network, x)
    assert out.dtype == autocast_dtype
    scale = expected[0].abs().max()
    torch.testing.assert_close(out.float() / scale, expected[0] / scale, rtol=0, atol=0.15)
    if compiled:
        torch._dynamo.reset()
        close(results(torch.compile(network, backend="aot_eager", fullgraph=True), x), 1e-3)
        torch._dynamo.reset()
    with torch.no_grad():
        expected = [network(x)]
        for other in copies(network):
            assert repr(other) == repr(network)
            torch.testing.assert_close(other(x), expected[0])
        torch.testing.assert_close(network(x[:0]), expected[0][:0])
