"""What the tests of gate modules share: maps, outcomes, comparisons, copies."""

import copy
import io
import pickle

import torch


def feature_map(*shape, dtype=torch.float64):
    """Numbers as a ReLU leaves them: zeros, and maxima that several pixels and channels attain."""
    return torch.randint(-3, 4, shape).relu().to(dtype) / 2


def settle(module, dtype=torch.float64):
    """A module as training might leave it: no weight and no statistic at its initial value."""
    module = module.to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) / 3)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) - 0.5)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.4)
    return module


def outcome(module, x):
    """Output, gradients of x and of all parameters in order, buffers in order."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    grads = torch.autograd.grad(out, [x, *module.parameters()], dout)
    return [out.detach(), *grads, *(buffer.clone() for buffer in module.buffers())]


def assert_same(module, other, x, **tolerances):
    """Two modules do the same; gradients of weights may differ in trailing ones of their shape."""
    tolerances = tolerances or {"rtol": 1e-9, "atol": 1e-11}
    for got, expected in zip(outcome(module, x), outcome(other, x), strict=True):
        assert got.numel() == expected.numel()
        torch.testing.assert_close(got.view(expected.shape), expected, **tolerances)


def assert_untouched(module, before):
    """A module's state is what it was."""
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def copies(module):
    """By deepcopy, by pickle, by torch.save, and by loading a new module's state."""
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)
