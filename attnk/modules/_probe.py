"""What ``from_module`` and ``load_state_dict`` of the gates share: renaming, copying, and finding out by running.

Keys and shapes do not tell what a module computes. So copies of it, with random weights in float64, run on random maps
beside every candidate, in evaluation and in training, and only what agrees in all is taken for the same.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# What a module that is not what it looks like may raise when it runs on a map.
PROBE_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

SEEDS = (0, 1, 2)  # one draw of weights may silence what tells two candidates apart
LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def parts_of(module: nn.Module, *kinds: type[nn.Module]) -> dict[str, nn.Module]:
    """The parts of these kinds in a module, by path, in their order."""
    return {path: part for path, part in module.named_modules() if isinstance(part, kinds)}


def strangers(module: nn.Module, parts: Mapping[str, nn.Module]) -> list[str]:
    """The keys of a module's state that are no plain weight or statistic of these parts."""
    known = {f"{path}.{name}" for path in parts for name in LEAVES}
    return [key for key in module.state_dict() if key not in known]


def refusal(module: nn.Module, what: str, why: str) -> ValueError:
    """The error of a ``from_module`` that does not take a module."""
    return ValueError(f"{type(module).__qualname__} was not recognised as {what}: {why}")


def recognise(
    module: nn.Module,
    what: str,
    x: torch.Tensor,
    build: Callable[[dict[str, Any], nn.Module], nn.Module],
    choices: Mapping[str, Sequence[Any]],
    described: str,
) -> dict[str, Any]:
    """The options with which a candidate computes what a module computes.

    Args:
        module: it is not changed.
        what: what it is hoped to be, for the error.
        x: a map from ``probe_map``.
        build: from options and a probe, a copy of the module with random weights in float64, makes the candidate, with
            the probe's weights.
        choices: every option's values, the likeliest first.
        described: what the options are, for the error.

    Raises:
        ValueError: the module cannot run, or no candidate agrees with it.
    """
    try:
        probes = [probe_copy(module, seed) for seed in SEEDS]
        expected = [fingerprint(copy.deepcopy(probe), x) for probe in probes]
    except PROBE_ERRORS as error:
        raise refusal(module, what, f"it failed on a {x.shape[1]}-channel map ({error!r})") from error

    def agrees(options: dict[str, Any], probe: nn.Module, prints: list[torch.Tensor]) -> bool:
        candidate = build(options, probe)
        out = candidate.eval()(x).detach()
        # most are told apart by their values alone
        return agree([out], prints[:1]) and agree(fingerprint(candidate, x), prints)

    with torch.random.fork_rng(devices=[]):  # the candidates draw weights nobody keeps
        for values in itertools.product(*choices.values()):
            options = dict(zip(choices, values, strict=True))
            if all(agrees(options, probe, prints) for probe, prints in zip(probes, expected, strict=True)):
                return options
    raise refusal(module, what, f"with its weights no {described} gives its values and gradients")


def probe_copy(module: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a module in float64 on the CPU, with random weights and running statistics, to be run and dropped."""
    probe = copy.deepcopy(module).to("cpu", torch.float64).requires_grad_()
    randomise(probe, seed)
    return probe


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Fill every parameter and every running statistic with numbers that depend on their order alone.

    Weights are small enough for their layer that no gate is only open or shut.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 9
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan_in**0.5)
    for part in module.modules():
        if isinstance(part, _BatchNorm) and part.running_mean is not None and part.running_var is not None:
            part.running_mean.copy_(torch.rand(part.running_mean.shape, generator=generator, dtype=torch.float64))
            part.running_var.copy_(torch.rand(part.running_var.shape, generator=generator, dtype=torch.float64) + 0.2)


def probe_map(*shape: int) -> torch.Tensor:
    """A float64 map full of ties, whose channels differ in their means; gradients are wanted on it."""
    generator = torch.Generator().manual_seed(1)
    level = torch.randint(-8, 9, (*shape[:2], 1, 1), generator=generator)
    return (torch.randint(-4, 5, shape, generator=generator) + level).double().requires_grad_()


def fingerprint(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Values, gradients of x and buffers of a float64 module, in evaluation and in training."""
    prints = []
    for training in (False, True):
        out = module.train(training)(x)
        dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        prints += [out.detach(), *torch.autograd.grad(out, x, dout)]
    return prints + [buffer.double() for buffer in module.buffers()]


def agree(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether two fingerprints are the same but for rounding."""
    return len(some) == len(others) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-9)
        for one, other in zip(some, others, strict=True)
    )


def copy_layer(mine: nn.Module, theirs: nn.Module) -> None:
    """Copy a layer's weights and which of them are trained; weights of 1 x 1 convolutions fit linear layers too."""
    state = dict(theirs.state_dict())
    if isinstance(mine, nn.Linear):
        state["weight"] = state["weight"].flatten(1)
    mine.load_state_dict(state)
    for parameter, original in zip(mine.parameters(), theirs.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)


def plain_batch_norm(norm: _BatchNorm, kind: type[_BatchNorm] = nn.BatchNorm2d) -> nn.Module:
    """A copy of a batch norm in PyTorch's own class, so that nothing of another library is taken along."""
    plain: nn.Module = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    if isinstance(norm, nn.SyncBatchNorm):
        plain = nn.SyncBatchNorm.convert_sync_batchnorm(plain, norm.process_group)
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            plain.to(tensor.device, tensor.dtype)
    copy_layer(plain, norm)
    return plain.train(norm.training)


def rename(state_dict: dict, prefix: str, names: Iterable[str], wanted: str) -> None:
    """Give the tensors directly under ``prefix + name`` the name ``prefix + wanted``, unless that is taken."""
    for name in names:
        start = f"{prefix}{name}."
        for key in [key for key in state_dict if key.startswith(start)]:
            leaf = key.removeprefix(start)
            if "." not in leaf and f"{prefix}{wanted}.{leaf}" not in state_dict:
                state_dict[f"{prefix}{wanted}.{leaf}"] = state_dict.pop(key)
