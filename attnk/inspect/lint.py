"""Finding what goes wrong in networks with attention, by running them."""

import copy
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnk.inspect._run import OTHER, SAME, Call, Run, copies_of, differ, hooked, run_once, tensors_in
from attnk.modules._probe import PROBE_ERRORS

IMAGES = 3  # in a probe; no axis of tokens, heads or channels is likely to be as long
SHRUNK = 0.3  # of what the features were without gates
KEPT = 4  # activations that are alive at the end of a network without being looked at


@dataclass(frozen=True)
class Finding:
    """Something ``attnk.lint`` found.

    Attributes:
        rule: a word for what it is, one of those that ``lint`` lists.
        module: the name of the module, "" being the model itself.
        evidence: what was seen.
        fix: what to do about it.
    """

    rule: str
    module: str
    evidence: str
    fix: str

    def __str__(self) -> str:
        return f"{self.module or '(model)'}: {self.evidence} [{self.rule}]\n  fix: {self.fix}"


def lint(model: nn.Module, x: torch.Tensor) -> list[Finding]:
    """Find, by running a model in evaluation mode, what people trip over who put attention into networks.

    - batch: an image's result depends on the other images of the batch
    - gradient: x has no gradient, the network does not see it
    - dead gate: a layer without channels (``C // r`` is 0), so that a gate ignores its input
    - shrinkage: gates in a row that leave little of the features
    - unscaled: logits of a softmax that come straight from a product, and saturate it
    - relu: attention whose result goes into a ReLU, which cuts off a good part of it
    - kept: activations that stay alive, through the forward or after it, though nobody needs them
    - random: two runs differ in evaluation
    - size, layout: another height or width, another order in memory fails
    - walk: a ``Sequential`` that the model walks through itself, and that fails when it is called
    - position: pixels in any order give the same
    - fails: the model does not run on x at all

    Each rule is a probe: what it does not find may still be wrong, and the first module that does something is named
    where it hides what later ones do. A model that was trained to do one of these on purpose is found too.

    Args:
        model: a module that takes one tensor. Copies of it are run; it is not changed.
        x: an example of what it takes, (B, ...) with B at least 1; floating point, for other tensors have no gradient.

    Returns:
        Findings, rule by rule; each prints as two lines. An empty list if there is nothing.

    Raises:
        TypeError: a model that is no module, an x that is no floating-point tensor.
        ValueError: an x without a batch.

    A model that fails is a finding, not an error.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype if isinstance(x, torch.Tensor) else type(x)}")
    if x.dim() < 2 or x.shape[0] == 0:
        raise ValueError(f"x must be (B, ...) with B at least 1, got {tuple(x.shape)}")
    model = getattr(model, "_orig_mod", model)  # a compiled model calls the one it was made of
    attached = [
        (name, attribute)
        for (name, attribute), value in _attributes(model).items()
        if not all(tensor.is_leaf for tensor in tensors_in(value))
    ]
    if attached:  # and nothing else, for such a module cannot be copied
        evidence = "its attribute {!r} holds what a forward computed, with the graph that it came from"
        return [
            Finding("kept", name, evidence.format(attribute), f"store self.{attribute}.detach(), or do not store it")
            for name, attribute in attached
        ]
    model = copy.deepcopy(model).eval().requires_grad_()
    x = x.detach()
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
        return _lint(model, x)


def _lint(model: nn.Module, x: torch.Tensor) -> list[Finding]:
    findings = list(_dead_gates(model))
    first = run_once(model, x)
    if first.error is not None:
        return [*findings, _failure(model, first, x)]
    images, others = (torch.cat([x[:1], _noise(x, seed)]) for seed in (1, 2))
    run = run_once(model, images)
    if run.error is not None:
        evidence = f"a batch of {IMAGES} fails, one of {x.shape[0]} does not: {_said(run.error)}"
        return [*findings, Finding("fails", run.failed, evidence, "take the batch size from the tensor")]
    findings += _randomness(model, images, run)
    other = run_once(model, others)
    findings += _mixing(run, other)
    findings += (unseen := list(_no_gradient(model, images)))
    findings += _unscaled(run)
    findings += _before_relu(run)
    findings += _shrinkage(model, images, run)
    findings += _keeping(model, images, run, other)
    findings += _walks(model, run)
    findings += _locked(model, images)
    findings += [] if unseen else _blindness(model, images, run)
    return findings


def _noise(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Images that are none, in the range of x."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((IMAGES - 1, *x.shape[1:]), generator=generator).to(x)
    spread = x.std() if x.numel() > 1 else x.new_ones(())
    return noise * spread + x.mean()


def _dead_gates(model: nn.Module) -> Iterator[Finding]:
    told = set()
    for name, part in model.named_modules():
        parent = name.rpartition(".")[0]
        empty = [(key, tuple(p.shape)) for key, p in part.named_parameters(recurse=False) if p.numel() == 0]
        if empty and parent not in told:
            told.add(parent)
            key, shape = empty[0]
            evidence = f"{key} is {shape}: the layer has no channels, and what follows does not depend on its input"
            fix = "give the hidden layer max(1, channels // reduction) channels, or use a smaller reduction"
            yield Finding("dead gate", name, evidence, fix)


def _failure(model: nn.Module, run: Run, x: torch.Tensor) -> Finding:
    assert run.error is not None
    evidence = f"it fails on {tuple(x.shape)}: {_said(run.error)}"
    if isinstance(model.get_submodule(run.failed), nn.Linear):
        fix = "pool the pixels before the linear layer (AdaptiveAvgPool2d(1), or x.mean((2, 3)))"
    elif "view" in str(run.error) or "shape" in str(run.error):
        fix = "check, where the module is built, that the sizes divide (embed_dim % num_heads == 0)"
    else:
        fix = "see the error; attnk's modules check sizes where they are built, and say what does not fit"
    return Finding("fails", run.failed, evidence, fix)


def _randomness(model: nn.Module, x: torch.Tensor, run: Run) -> Iterator[Finding]:
    torch.manual_seed(1)
    second = Run(model)
    with torch.no_grad(), hooked(second.enter, second.leave):
        second.out = copies_of(model(x))
    for one, other in zip(run.calls, second.calls, strict=False):
        if not differ(one.inputs, other.inputs, SAME) and differ(one.outputs, other.outputs, OTHER):
            evidence = "two runs in evaluation mode with the same input give different results"
            fix = "draw nothing in evaluation: pass training=self.training to F.dropout, or use nn.Dropout"
            yield Finding("random", one.name, evidence, fix)
            return


def _mixing(run: Run, other: Run) -> Iterator[Finding]:
    for one, two in zip(run.calls, other.calls, strict=False):
        inputs, others, outputs, other_outputs = (
            [tensor[0] for tensor in tensors if tensor.dim() > 1 and tensor.shape[0] == IMAGES]
            for tensors in (one.inputs, two.inputs, one.outputs, two.outputs)
        )
        if not inputs or len(inputs) != len(one.inputs) or not outputs:
            continue
        if differ(inputs, others, SAME) or not differ(outputs, other_outputs, OTHER):
            continue
        scale = outputs[0].abs().max().clamp_min(1e-12)
        change = ((outputs[0] - other_outputs[0]).abs().max() / scale).item()
        evidence = (
            f"what it makes of the first image changes by {change:.2g} of its largest value when the other images of "
            "the batch change, in evaluation mode"
        )
        fix = "keep the images apart: in evaluation nothing may be computed along the batch"
        if isinstance(one.module, nn.MultiheadAttention) and not one.module.batch_first:
            fix = "build the attention with batch_first=True: it takes (N, B, C) and is given (B, N, C)"
        elif isinstance(one.module, nn.modules.batchnorm._BatchNorm):
            fix = "keep running statistics (track_running_stats=True) and use them in evaluation"
        yield Finding("batch", one.name, evidence, fix)
        return


def _no_gradient(model: nn.Module, x: torch.Tensor) -> Iterator[Finding]:
    x = x.clone().requires_grad_()
    names = {part: name for name, part in model.named_modules()}
    largest: dict[int, float] = {}
    ended: list[str] = []

    def leave(module: nn.Module, args: tuple, out: Any) -> None:
        if module not in names:
            return
        number = len(ended)
        ended.append(names[module])
        for tensor in tensors_in(out):
            if tensor.requires_grad and tensor.numel():
                largest.setdefault(number, 0.0)
                tensor.register_hook(
                    lambda gradient: largest.update({number: max(largest[number], gradient.abs().max().item())})
                )

    torch.manual_seed(0)
    try:
        with torch.enable_grad(), hooked(lambda *args: None, leave):
            # a leaf may not be changed in place
            outs = [tensor for tensor in tensors_in(model(x.clone())) if tensor.requires_grad]
            if outs:
                torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])
    except PROBE_ERRORS as error:
        fix = "do not change in place what the backward needs"
        yield Finding("fails", "", f"it runs, and with gradients it fails: {_said(error)}", fix)
        return
    finally:
        model.zero_grad()
    if x.grad is not None and x.grad.any():
        return
    lost = next((name for number, name in enumerate(ended) if not largest.get(number)), "")
    evidence = (
        f"the gradient of x is 0 everywhere, and so is that of what {lost!r} returns: no result depends on the input"
    )
    fix = "follow what this module returns to where it is dropped; tokens that attend over the batch never meet others"
    yield Finding("gradient", lost, evidence, fix)


def _gate_kind(call: Call) -> str | None:
    """Whether a call is that of a gate: "gated" returns x times gates from 0 to 1, "map" returns the gates."""
    if len(call.inputs) != 1 or len(call.outputs) != 1 or type(call.module).__module__.startswith("torch.nn"):
        return None
    (x,), (out,) = call.inputs, call.outputs
    if x.dim() != 4 or out.dim() != 4 or x.shape[0] != out.shape[0] or not x.numel():
        return None
    one_map = out.shape == (x.shape[0], 1, *x.shape[2:]) and x.shape[1] > 1
    one_pixel = out.shape == (*x.shape[:2], 1, 1) and x.shape[2:] != (1, 1)
    if one_map or one_pixel:
        return "map" if out.min() > 0 and out.max() < 1 else None
    if x.shape != out.shape:
        return None
    seen = x.abs() > 1e-3 * x.abs().max()
    gate = torch.where(seen, out / x.where(seen, torch.ones_like(x)), torch.nan)
    shares = gate[seen]
    if not shares.numel() or shares.min() < -1e-3 or shares.max() > 1 + 1e-3 or shares.mean() > 0.99:
        return None
    if type(call.module).__module__.startswith("attnk.modules."):
        return "gated"
    for axes in ((1,), (2, 3)):  # a gate is the same in all channels, or in all pixels
        middle = gate.nanmean(axes, keepdim=True)
        if torch.allclose((gate - middle).nan_to_num(), torch.zeros_like(gate), atol=1e-2):
            return "gated"
    return None


def _unscaled(run: Run) -> Iterator[Finding]:
    for name, channels, keys, spread, largest in run.saturated:
        evidence = (
            f"the logits of {channels} channels go into the softmax as the product gives them: a query's have a "
            f"standard deviation of {spread:.1f}, and the largest of its {keys} weights is {largest:.2f} in the mean"
        )
        fix = f"scale the logits by {channels} ** -0.5, as attnk.SingleHeadSelfAttention({channels}) does"
        yield Finding("unscaled", name, evidence, fix)


def _before_relu(run: Run) -> Iterator[Finding]:
    for name, relu, share in run.cut:
        evidence = f"its result goes straight into the ReLU {relu!r}, which sets {share:.1%} of it to 0"
        fix = "attend behind the ReLU (and the pooling, where there are fewer pixels), or add the result to its input"
        yield Finding("relu", name, evidence, fix)


def _is_inside(name: str, other: str) -> bool:
    return name != other and (other == "" or name.startswith(f"{other}."))


def _shrinkage(model: nn.Module, x: torch.Tensor, run: Run) -> Iterator[Finding]:
    kinds = {call.name: kind for call in run.calls if (kind := _gate_kind(call)) is not None}
    kinds = {name: kind for name, kind in kinds.items() if not any(_is_inside(name, other) for other in kinds)}
    if len(kinds) < 2:
        return

    def open_gate(name: str, args: tuple, out: Any) -> Any:
        kind = kinds.get(name)
        return None if kind is None else args[0].clone() if kind == "gated" else torch.ones_like(out)

    opened = run_once(model, x, open_gate)
    starts = [
        number
        for number, call in enumerate(run.started)
        if call.inputs
        and call.inputs[0].dim() == 4
        and not any(call.name == gate or _is_inside(call.name, gate) for gate in kinds)
    ]
    if opened.error is not None or not starts or len(opened.started) != len(run.started):
        return
    at = run.started[starts[-1]].name
    # what differs between images, for biases are no features
    with_gates, without = (each.started[starts[-1]].inputs[0].float().std(0).mean().item() for each in (run, opened))
    if with_gates < SHRUNK * without:
        gates = list(kinds)
        listed = ", ".join(gates[:6]) + (", ..." if len(gates) > 6 else "")
        evidence = (
            f"{len(gates)} gates ({listed}) leave the features that reach {at!r} with {with_gates / without:.2g} of "
            "the differences between images that they have without gates"
        )
        fix = (
            "start the gates as the identity: attnk.insert(..., identity=True), output='residual', or 2 sigmoid with "
            "weights that start at 0"
        )
        yield Finding("shrinkage", gates[0], evidence, fix)


def _keeping(model: nn.Module, x: torch.Tensor, run: Run, other: Run) -> Iterator[Finding]:
    """Which results of modules are alive when the last leaf starts, and which after the forward."""
    names = {part: name for name, part in model.named_modules()}
    leaves = [number for number, call in enumerate(run.started) if not any(call.module.children())]
    results: list[tuple[str, weakref.ref]] = []
    alive: dict[int, tuple[str, int]] = {}
    needed: set[int] = set()
    starts = 0

    def living() -> dict[int, tuple[str, int]]:
        """By memory: who made it and how many bytes it has."""
        found: dict[int, tuple[str, int]] = {}
        for name, reference in results:
            tensor = reference()
            if tensor is not None:
                found.setdefault(_memory(tensor), (name, tensor.untyped_storage().nbytes()))
        return found

    def enter(module: nn.Module, args: tuple) -> None:
        nonlocal starts
        if module in names:
            if leaves and starts == leaves[-1]:
                alive.update(living())
                needed.update(map(_memory, tensors_in(args)))
            starts += 1

    def leave(module: nn.Module, args: tuple, out: Any) -> None:
        if module in names:
            results.extend((names[module], weakref.ref(tensor)) for tensor in tensors_in(out))

    torch.manual_seed(0)
    with torch.no_grad(), hooked(enter, leave):
        out = model(x)
    needed.update(map(_memory, tensors_in(out)))
    needed.update(map(_memory, [x, *model.parameters(), *model.buffers()]))
    largest = max((tensor.nbytes for call in run.calls for tensor in call.outputs), default=0)
    through = {memory: made for memory, made in alive.items() if memory not in needed}
    if len(through) >= KEPT and sum(size for _, size in through.values()) >= largest:
        made = [name for name, _ in through.values()]
        total = sum(size for _, size in through.values()) / len(x) / 2**20
        evidence = (
            f"{len(made)} results of modules, {total:.1f} MiB an image, are alive when the last module "
            f"{run.started[leaves[-1]].name!r} starts: from {made[0]!r} to {made[-1]!r}"
        )
        fix = "keep what is used later alone, not a list of all results: x = layer(x) lets the last one go"
        yield Finding("kept", _common(made), evidence, fix)

    first = {place: copies_of(value) for place, value in _attributes(model).items()}
    # what does not depend on the input is a cache, and may stay
    pairs = zip(run.calls, other.calls, strict=False)
    constant = {one.name for one, two in pairs if not differ(one.outputs, two.outputs, SAME)}
    after = [name for memory, (name, _) in living().items() if memory not in needed and name not in constant]
    del out
    with torch.no_grad():
        model(x.flip(0) * 0.5)
    held = 0
    for (name, attribute), value in _attributes(model).items():
        if (name, attribute) in first and differ(first[name, attribute], copies_of(value), OTHER):
            held += 1
            size = sum(tensor.untyped_storage().nbytes() for tensor in tensors_in(value)) / len(x) / 2**20
            evidence = (
                f"its attribute {attribute!r} still holds what the last forward computed, {size:.2g} MiB an image"
            )
            fix = f"do not store it in self.{attribute}; with attnk.capture(model) one sees it when one wants to"
            yield Finding("kept", name, evidence, fix)
    if after and not held:
        evidence = (
            f"{len(after)} results of modules ({', '.join(after[:4])}) are alive after the forward and are not part of "
            "what it returned"
        )
        yield Finding("kept", _common(after), evidence, "let go of them before the forward returns")


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """By module and name, attributes that hold tensors and are no parameters or buffers."""
    return {
        (name, attribute): value
        for name, part in model.named_modules()
        for attribute, value in vars(part).items()
        if not attribute.startswith(("_parameters", "_buffers", "_modules")) and tensors_in(value)
    }


def _common(names: list[str]) -> str:
    """The innermost module that contains all of these."""
    paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _walks(model: nn.Module, run: Run) -> Iterator[Finding]:
    called = {call.name for call in run.started}
    for name, part in model.named_modules():
        if not isinstance(part, nn.Sequential) or name in called or len(part) < 2:
            continue
        start = next((call for call in run.started if call.name == f"{name}.0".lstrip(".") and call.inputs), None)
        if start is None:
            continue
        alone = run_once(part, start.inputs[0])
        if alone.error is not None:
            inner = f"{name}.{alone.failed}".rstrip(".")
            evidence = (
                "the model walks through its layers itself and it fails when it is called, as feature extractors and "
                f"Grad-CAM do: {_said(alone.error)} (in {inner!r})"
            )
            fix = "let every layer return what the next one takes: a gate x * map, not the map (output='gated')"
            yield Finding("walk", name, evidence, fix)


def _locked(model: nn.Module, x: torch.Tensor) -> Iterator[Finding]:
    if x.dim() == 4:
        height = x.shape[2]
        larger = nn.functional.pad(x, (0, 0, 0, 32 if height >= 64 else height), mode="replicate")
        crossed = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif x.dim() == 3:
        larger, crossed = torch.cat([x, x[:, :1]], 1), x.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        return
    run = run_once(model, larger)
    if run.error is not None:
        evidence = f"{tuple(x.shape)} runs and {tuple(larger.shape)} fails: {_said(run.error)}"
        part = model.get_submodule(run.failed)
        fix = "resize positions to the size of the input (attnk.LearnedPosition2d does)"
        if isinstance(part, nn.Linear):
            fix = "pool to a fixed size before the linear layer (nn.AdaptiveAvgPool2d)"
        yield Finding("size", run.failed, evidence, fix)
    run = run_once(model, crossed)
    if run.error is not None:
        evidence = f"the same numbers with strides {crossed.stride()} fail: {_said(run.error)}"
        yield Finding("layout", run.failed, evidence, "use reshape or flatten in place of view")


def _blindness(model: nn.Module, x: torch.Tensor, run: Run) -> Iterator[Finding]:
    """Pixels in another order: attention without positions gives the same, in that order."""
    if x.dim() != 4 or not any(call.attends for call in run.calls) or x[0, 0].numel() < 4:
        return
    order = torch.randperm(x[0, 0].numel(), generator=torch.Generator().manual_seed(0)).to(x.device)

    def shuffled(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 4 and tensor.shape[2:] == x.shape[2:]:
            return tensor.flatten(2)[:, :, order].view(tensor.shape)
        return tensor

    other = run_once(model, shuffled(x))
    if other.error is None and not differ(other.out, [shuffled(out) for out in run.out], SAME * 10):
        name = next(call.name for call in run.calls if call.attends)
        evidence = "it attends, and with the pixels in any other order gives the same, in that order"
        fix = (
            "give the pixels positions: attnk.FeatureMapAttention(layer, position=attnk.SinusoidalPosition2d(channels))"
        )
        yield Finding("position", name, evidence, fix)


def _said(error: BaseException) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
