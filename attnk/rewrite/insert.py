"""Insertion: a module behind any named part of a model, and back."""

from typing import Any, TypeVar

import torch
from torch import nn

INSERTED = "inserted"  # the name, inside the part it follows, of what is inserted

Model = TypeVar("Model", bound=nn.Module)


class Inserted(nn.Module):
    """Holds an inserted module, as the child ``inserted`` of the part that it follows.

    Args:
        module: maps a tensor to one of the same shape.
        identity: whether ``x + alpha * (module(x) - x)`` takes the place of ``module(x)``, with a trained scalar alpha
            that starts at 0.
    """

    def __init__(self, module: nn.Module, identity: bool) -> None:
        super().__init__()
        self.module = module
        self.alpha = nn.Parameter(torch.zeros(())) if identity else None

    def forward(self, x: Any) -> torch.Tensor:
        """Map x to a tensor of its shape and, with ``identity``, of its dtype.

        Raises:
            TypeError: x is no tensor: the part that the module follows returns something else.
            ValueError: the module returned another shape.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"a module can only be inserted behind one that returns a tensor, this one returned {type(x).__name__}"
            )
        out = self.module(x)
        if not isinstance(out, torch.Tensor) or out.shape != x.shape:
            got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(
                f"an inserted module must return a tensor of the shape it is given, {tuple(x.shape)}, and "
                f'{type(self.module).__name__} returned {got} (a gate that returns its map needs output="gated")'
            )
        return out if self.alpha is None else x + self.alpha.to(x.dtype) * (out.to(x.dtype) - x)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):  # weights of the plain model: keep what is there
            state_dict.update(self.state_dict(prefix=prefix, keep_vars=True))
        super()._load_from_state_dict(state_dict, prefix, *args)


def insert(model: Model, after: str, module: nn.Module, identity: bool = False) -> Model:
    """Insert a module behind a named part of a model, in place: what the part returns goes through the module.

    Nothing is replaced, wrapped or renumbered. The module becomes a child of the part it follows, named ``inserted``,
    and a forward hook of the part calls it there. So every key of the plain model stays what it was and those of the
    module come in addition, ``<after>.inserted.module.*`` (and ``.inserted.alpha``); classes, indices and lengths of
    containers stay, slices of a ``Sequential`` take the module along, and copying, pickling, ``state_dict``,
    ``torch.compile`` and ``torch.fx`` know of nothing special.

    - Weights of the plain model load strictly before the insertion and after it; in the latter case the module keeps
      those it has. Weights saved with it load strictly into a model with the same insertion.
    - Behind a ``Sequential``, the module is inserted behind its last part, which is the same.
    - A part that runs several times in a forward, such as a ReLU that a block shares, has the module behind each run.
      One whose weights are read without calling it (``out_proj`` of ``torch.nn.MultiheadAttention``) never runs it.
    - Insert before ``torch.compile``: what is compiled already may not see the hook.

    Args:
        model: it is changed.
        after: the name of a part, as in ``model.named_modules()``, that returns a tensor; "" is the model itself.
        module: maps a tensor to one of the same shape, such as ``attnk.SpatialAttention(output="gated")``. It is moved
            to the device and dtype of the parameters of the part or, if it has none, of the model, and put into the
            part's mode.
        identity: whether the model computes at first what it did: ``x + alpha * (module(x) - x)``, with a trained alpha
            that starts at 0 (as ReZero's, https://arxiv.org/abs/2003.04887). From the first step on alpha is trained,
            and from the second the module.

    Returns:
        The model.

    Raises:
        TypeError: a module that is none, a TorchScript model.
        ValueError: a part that does not exist, that the model has under two names, that has an insertion, or a
            container that has no forward or whose forward walks through its children.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a module, got {type(module).__name__}")
    path, part = _part(model, after)
    if isinstance(part, torch.jit.ScriptModule):
        raise TypeError(f"{after!r} is TorchScript, which takes no hooks: insert before scripting")
    if hasattr(part, INSERTED):
        raise ValueError(f"{path!r} has an insertion: remove it, or insert after {f'{path}.{INSERTED}'.lstrip('.')!r}")
    inserted = Inserted(module, identity)
    parameter = next((p for p in (*part.parameters(), *model.parameters()) if p.is_floating_point()), None)
    if parameter is not None:
        inserted.to(parameter.device, parameter.dtype)
    part.add_module(INSERTED, inserted.train(part.training))
    hooks: dict[Any, Any] = part._forward_hooks
    hooks[INSERTED] = _run_inserted  # numbers start again in every process, and would clash when unpickled
    return model


def remove(model: Model) -> Model:
    """Take out all that ``attnk.insert`` has put into a model, in place; it is then what it was before.

    Args:
        model: it is changed; one without insertions is left as it is.

    Returns:
        The model.
    """
    for part in list(model.modules()):
        if part._forward_hooks.pop(INSERTED, None) is not None:  # type: ignore[call-overload]
            del part._modules[INSERTED]
    return model


def _run_inserted(part: nn.Module, args: tuple, out: Any) -> torch.Tensor:
    """The forward hook of a part that has an insertion; of the module alone, so that copies find their own."""
    return part._modules[INSERTED](out)  # type: ignore[misc]


def _part(model: nn.Module, after: str) -> tuple[str, nn.Module]:
    """The part behind which to insert, and its name."""
    names: dict[nn.Module, list[str]] = {}
    for name, part in model.named_modules(remove_duplicate=False):
        names.setdefault(part, []).append(name)
    found = next((part for part, theirs in names.items() if after in theirs), None)
    if found is None:
        near = [name for theirs in names.values() for name in theirs if name.startswith(after.rpartition(".")[0])]
        raise ValueError(f"model has no part named {after!r}; it has {', '.join(map(repr, near[:20]))}")
    path = after
    while isinstance(found, nn.Sequential) and type(found).forward is nn.Sequential.forward and len(found):
        last = list(found._modules)[-1]
        path, found = f"{path}.{last}".lstrip("."), found.get_submodule(last)
    if isinstance(found, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise ValueError(
            f"{path!r} is a container, {type(found).__name__}, whose children are all called, and a module inserted in "
            "it would be one of them: insert behind one of its parts"
        )
    if len(names[found]) > 1:
        raise ValueError(
            f"{path!r} is the same module as {', '.join(repr(name) for name in names[found] if name != path)}: a "
            "module inserted behind one would run behind all; give each its own"
        )
    return path, found
