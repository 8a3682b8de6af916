"""Recording what a model attends to while it runs."""

import contextlib
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from attnk.ops import _watch
from attnk.ops.softmax_attention import softmax_attention

Query = int | tuple[int, int]


class Gate:
    """A gate that multiplied a feature map.

    Attributes:
        name: of the module.
        kind: "spatial_gate", "channel_gate" or "coordinate_gate".
        gate: (B, 1, H, W), (B, C, 1, 1), or for a coordinate gate what multiplied the rows, (B, C, H, 1).
        gate_w: of a coordinate gate, what multiplied the columns, (B, C, 1, W); else None.
    """

    def __init__(self, name: str, kind: str, gate: torch.Tensor, gate_w: torch.Tensor | None = None) -> None:
        self.name = name
        self.kind = kind
        self.gate = gate
        self.gate_w = gate_w

    @property
    def has_heat(self) -> bool:
        """Whether there is something to draw over a picture: not of channels alone."""
        return self.kind != "channel_gate"

    def heat(self, query: Query | None = None) -> torch.Tensor:
        """The gate of every pixel (B, H, W); of a coordinate gate, its mean over the channels.

        Raises:
            ValueError: a channel gate, which has no pixels, or a query.
        """
        if query is not None:
            raise ValueError(f"{self.name!r} is a gate, which has no queries")
        if self.kind == "channel_gate":
            raise ValueError(f"{self.name!r} is a channel gate, one number a channel: see .gate")
        if self.gate_w is None:
            return self.gate.squeeze(1).float()
        rows, columns = self.gate.squeeze(3).float(), self.gate_w.squeeze(2).float()
        return torch.einsum("bch,bcw->bhw", rows, columns) / rows.shape[1]

    def __repr__(self) -> str:
        low, high = self.gate.min().item(), self.gate.max().item()
        return f"<{self.kind} of {self.name!r}: {tuple(self.gate.shape)}, {low:.3g} to {high:.3g}>"


class Attention:
    """Attention from queries to keys, kept as the queries and keys themselves.

    The weights are never kept and never exist as a whole. Attention is linear in its values, so a weighted sum of the
    weights' rows is a gradient with respect to values of width 1: the backward of the operation itself, from lse, in
    the memory of the tokens.

    Attributes:
        name: of the module.
        kind: "softmax_attention", "group_attention" (axial, window), "linear_attention" or "attention_weights" (of
            a module that has a few queries and gave the weights).
        grid: (height, width) of the keys' pixels, or None where the tokens are no map that was seen.
        extra: how many keys stand before the pixels, such as a class token.
    """

    def __init__(self, name: str, kind: str, what: dict[str, Any], grid: tuple[int, int] | None, extra: int) -> None:
        self.name = name
        self.kind = kind
        self.grid = grid
        self.extra = extra
        self._what = what

    @property
    def has_heat(self) -> bool:
        """Whether there is something to draw over a picture: the keys are pixels of a map that was seen."""
        return self.grid is not None

    @property
    def batch(self) -> int:
        """B."""
        return self._first.shape[0]

    @property
    def heads(self) -> int:
        """How many heads."""
        return self._first.shape[-2] if self.kind == "group_attention" else self._first.shape[1]

    @property
    def queries(self) -> int:
        """Nq."""
        return self._count(self._first)

    @property
    def keys(self) -> int:
        """Nk."""
        if self.kind == "attention_weights":
            return self._first.shape[3]
        return self._count(self._what["k"])

    @property
    def _first(self) -> torch.Tensor:
        return self._what["weights" if self.kind == "attention_weights" else "q"]

    def _count(self, tokens: torch.Tensor) -> int:
        return tokens.shape[1] * tokens.shape[2] if self.kind == "group_attention" else tokens.shape[2]

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        """A weighted sum of the queries' attention, ``sum_i weights[b, i] p[b, h, i, j]``, in the memory of the tokens.

        Args:
            weights: (B, Nq).

        Returns:
            (B, heads, Nk), float32 (float64 of float64).
        """
        if self.kind == "attention_weights":
            rows = _wide(self._first)
            return torch.einsum("bhij,bi->bhj", rows, weights.to(rows))
        device = self._first.device.type
        # whatever goes on around: no gradient or inference mode, autocast, a capture
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False), _nobody():
            q, k = self._operands()
            if self.kind == "group_attention":
                dout = weights.to(q).view(*q.shape[:3], 1, 1).expand(*q.shape[:4], 1)
            else:
                dout = weights.to(q)[:, None, :, None].expand(*q.shape[:3], 1)
            values = q.new_zeros(*k.shape[:-1], 1).requires_grad_()
            (received,) = torch.autograd.grad(self._attend(q, k, values), values, dout.clone())
        return received.squeeze(-1).flatten(1, 2).mT if self.kind == "group_attention" else received.squeeze(-1)

    def _operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = _wide(self._what["q"]), _wide(self._what["k"])
        if self.kind == "softmax_attention" and q.shape[1] != k.shape[1]:  # heads of queries that share one of keys
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return q, k

    def _attend(self, q: torch.Tensor, k: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        attend = self._what.get("attend", softmax_attention)
        terms = {name: value for name, value in self._what.items() if name not in ("q", "k", "attend")}
        return attend(q, k, values, **terms)

    def received(self) -> torch.Tensor:
        """The attention that every key receives: the mean over queries and heads of the weights, (B, Nk); sums to 1.

        For axial attention of summed rows and columns, where every query gives its attention twice, it sums to 2.
        """
        ones = torch.ones(self.batch, self.queries, device=self._first.device)
        return self.weighted(ones).mean(1) / self.queries

    def rows(self, queries: Sequence[Query]) -> torch.Tensor:
        """The attention of chosen queries to all keys.

        Args:
            queries: k numbers of tokens (of which an image's class token is 0), or pixels (row, column).

        Returns:
            (B, heads, k, Nk), float32 (float64 of float64); every row sums to 1.

        Raises:
            ValueError: a pixel where the queries are no map that was seen.
            IndexError: a token or pixel that does not exist.
        """
        numbers = [self._number(query) for query in queries]
        if self.kind == "softmax_attention":
            return self._softmax_rows(numbers)
        if self.kind == "attention_weights":
            return _wide(self._first[:, :, numbers])
        rows = []
        for number in numbers:
            weights = torch.zeros(self.batch, self.queries, device=self._first.device)
            weights[:, number] = 1
            rows.append(self.weighted(weights))
        return torch.stack(rows, 2)

    def _number(self, query: Query) -> int:
        if isinstance(query, int):
            if not -self.queries <= query < self.queries:
                raise IndexError(f"{self.name!r} has {self.queries} queries, got {query}")
            return query % self.queries
        if self.grid is None or self.queries != self.keys:
            raise ValueError(f"the queries of {self.name!r} are no map that was seen: give the number of a token")
        (row, column), (height, width) = query, self.grid
        if not (0 <= row < height and 0 <= column < width):
            raise IndexError(f"{self.name!r} has {height} x {width} pixels, got {query}")
        return self.extra + row * width + column

    def _softmax_rows(self, numbers: list[int]) -> torch.Tensor:
        what = self._what
        q, k = self._operands()
        logits = q[:, :, numbers] * what["scale"] @ k.mT  # (B, heads, k, Nk)
        if what["bias"] is not None:
            logits = logits + _of_queries(what["bias"], numbers)
        if what["bias_table"] is not None:
            logits = logits + _table_rows(what["bias_table"], what["grid"], numbers)
        hidden = torch.zeros_like(logits, dtype=torch.bool)
        if what["mask"] is not None:
            hidden = hidden | ~_of_queries(what["mask"], numbers)
        if what["is_causal"]:
            hidden = hidden | (torch.arange(self.keys) > torch.tensor(numbers)[:, None]).to(hidden.device)
        logits = logits.masked_fill(hidden, -torch.inf)
        return logits.softmax(-1).masked_fill(hidden, 0)  # also of queries that see nothing

    def heat(self, query: Query | None = None) -> torch.Tensor:
        """What the pixels receive, (B, H, W): from all queries in the mean, or from one; the mean over the heads.

        Raises:
            ValueError: keys that are no map that was seen; and what ``rows`` raises.
        """
        if self.grid is None:
            raise ValueError(f"the {self.keys} keys of {self.name!r} are no map that was seen: see .received()")
        received = self.received() if query is None else self.rows([query]).mean(1).squeeze(1)
        return received[:, self.extra :].unflatten(1, self.grid)

    def __repr__(self) -> str:
        where = "" if self.grid is None else f", a map of {self.grid[0]} x {self.grid[1]}"
        return f"<{self.kind} of {self.name!r}: {self.heads} heads, {self.queries} queries, {self.keys} keys{where}>"


class Maps(Mapping[str, Gate | Attention]):
    """What ``attnk.capture`` has recorded: modules' names to gates and attention, in the order in which they ran.

    Attributes:
        image: the last images that the model was given, (B, 1 or 3, H, W), or None.
    """

    def __init__(self) -> None:
        self.image: torch.Tensor | None = None
        self._records: dict[str, Gate | Attention] = {}
        self._figure: Any = None

    def __getitem__(self, name: str) -> Gate | Attention:
        if name not in self._records:
            raise KeyError(f"nothing was recorded of {name!r}; there is {', '.join(map(repr, self)) or 'nothing'}")
        return self._records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self._records.values())) or "<nothing recorded>"

    def rollout(self, query: Query = 0, residual: float = 0.5) -> torch.Tensor:
        """What a query of the last layer has seen of the first layer's tokens (Abnar and Zuidema, 2020).

        The row of the query in the product of the layers' ``residual I + (1 - residual) attention``, attention being
        the mean over the heads (https://arxiv.org/abs/2005.00928), computed from the last layer to the first as a
        vector: the N x N products never exist.

        Args:
            query: a token of the last layer, 0 being a class token, or a pixel (row, column).
            residual: the share of a token that passes a layer by.

        Returns:
            (B, N); sums to 1. ``heat`` makes a map of it.

        Raises:
            ValueError: no stack: self-attention of as many tokens in every layer.
        """
        stack = self._stack()
        weights = torch.zeros(stack[-1].batch, stack[-1].queries, device=stack[-1]._first.device)
        weights[:, stack[-1]._number(query)] = 1
        for layer in reversed(stack):
            weights = residual * weights + (1 - residual) * layer.weighted(weights).mean(1)
        return weights

    def _stack(self) -> list[Attention]:
        layers = [record for record in self._records.values() if isinstance(record, Attention)]
        sizes = {(layer.batch, layer.queries, layer.keys) for layer in layers}
        if len(sizes) != 1 or any(layer.queries != layer.keys for layer in layers):
            raise ValueError(f"rollout needs self-attention of as many tokens in every layer, got {layers}")
        return layers

    def heat(self, name: str, query: Query | None = None) -> torch.Tensor:
        """The map (B, H, W) of a layer, or of "rollout", for one query or, in the mean, for all."""
        if name != "rollout":
            return self[name].heat(query)
        last = self._stack()[-1]
        if last.grid is None:
            raise ValueError(f"the {last.keys} tokens are no map that was seen: see .rollout()")
        return self.rollout(0 if query is None else query)[:, last.extra :].unflatten(1, last.grid)

    def overlay(
        self,
        image: Any = None,
        layer: str | None = None,
        query: Query | None = None,
        *,
        index: int = 0,
        alpha: float = 0.6,
    ) -> Any:
        """Draw the map of one layer over the picture.

        Args:
            image: a tensor or array (3, H, W), (1, H, W), (H, W, 3), (H, W) or a batch of the first two, of any range
                of values; the images that the model was given when None.
            layer: a name, or "rollout"; the last that has a map when None.
            query: a token or pixel (row, column) whose attention to draw, and where it is; what the pixels receive when
                None.
            index: which image of the batch.
            alpha: how much the map covers the picture, from 0 to 1.

        Returns:
            A matplotlib figure, which ``save`` writes. Attention is drawn in units of what it were if it were the same
            everywhere.

        Raises:
            ValueError: no picture, nothing to draw, or what ``heat`` raises.
            ImportError: matplotlib is not installed.
        """
        from attnk.inspect.overlay import draw_overlay

        drawn = [name for name, record in self._records.items() if record.has_heat]
        if layer is None and not drawn:
            raise ValueError(f"no layer has a map to draw; recorded was: {self!r}")
        name = drawn[-1] if layer is None else layer
        pixel = query if isinstance(query, tuple) else None
        heat = self._drawn(name, query)[index]
        self._figure = draw_overlay(self._picture(image, index), heat, _caption(name, query), alpha, pixel)
        return self._figure

    def grid(self, image: Any = None, query: Query | None = None, *, index: int = 0, alpha: float = 0.6) -> Any:
        """Draw one figure of all layers: maps over the picture, channel gates as curves.

        Args:
            image, index, alpha: as in ``overlay``.
            query: a token whose attention to draw where there is attention; what the pixels receive when None.

        Returns:
            A matplotlib figure, which ``save`` writes.

        Raises:
            ValueError: no picture, or nothing to draw.
            ImportError: matplotlib is not installed.
        """
        from attnk.inspect.overlay import draw_grid

        panels: list[tuple[str, torch.Tensor]] = []
        for name, record in self._records.items():
            if isinstance(record, Gate):
                panels.append((name, record.heat()[index] if record.has_heat else record.gate[index].flatten().float()))
            elif record.has_heat:
                panels.append((_caption(name, query), self._drawn(name, query)[index]))
        if not panels:
            raise ValueError(f"no layer has anything to draw; recorded was: {self!r}")
        self._figure = draw_grid(self._picture(image, index), panels, alpha)
        return self._figure

    def _drawn(self, name: str, query: Query | None) -> torch.Tensor:
        """What to draw: gates as they are, attention by what it were if it were the same everywhere."""
        heat = self.heat(name, query)
        record = self._stack()[-1] if name == "rollout" else self._records[name]
        return heat * record.keys if isinstance(record, Attention) else heat

    def save(self, path: Any, image: Any = None, dpi: int = 150) -> None:
        """Write the figure that ``overlay`` or ``grid`` drew last, or else all layers over the picture, to a file.

        Args:
            path: where to; its ending says which format.
            image: the picture; all layers are drawn over it, whatever was drawn last.
            dpi: dots an inch.

        Raises:
            ValueError, ImportError: as ``grid``.
        """
        if self._figure is None or image is not None:
            self.grid(image)
        self._figure.savefig(path, dpi=dpi)

    def _picture(self, image: Any, index: int) -> torch.Tensor:
        from attnk.inspect.overlay import as_picture

        image = self.image if image is None else image
        if image is None:
            raise ValueError("the model was not given images of 1 or 3 channels: give the picture to draw on")
        return as_picture(image, index)


class capture:
    """Record what a model attends to: ``with attnk.capture(model) as maps: model(x)``.

    Everything is recorded that attnk's operations compute inside the model, whatever backend runs and whatever class
    calls them, under the name of the innermost module:

    - gates of spatial, channel and coordinate attention (of ``CBAM`` as ``<name>.channel_attention`` and
      ``<name>.spatial_attention``). Channel and coordinate gates cost nothing; a fused spatial gate, which is never
      written in inference, is computed once more, in one more reading of the map.
    - attention: queries and keys are kept as they are. ``maps[name].rows(queries)`` and ``.received()`` compute what is
      asked for then, in memory O(k N); the N x N weights never exist. Dropout is left out.
    - what the tokens' numbers mean: a map with as many pixels that a module gave or took before, and what stands before
      its pixels, such as a class token.

    The output and gradients of the model stay what they are. Inside the block compiled models run uncompiled. A module
    that runs more than once in a forward has records ``name``, ``name#2`` and so on; another forward of the model
    replaces the records of the last.

    ``maps`` is a mapping from names to ``Gate`` or ``Attention``; it remains after the block, and with it the queries
    and keys. ``maps.overlay()``, ``maps.grid()`` and ``maps.save(path)`` draw, ``maps.rollout()`` follows attention
    through all layers. Only what the thread that entered the block runs is recorded.

    Args:
        model: it is not changed.

    Raises:
        TypeError: model is no module.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        self._model = model
        self._maps = Maps()

    def __enter__(self) -> Maps:
        # a compiled model calls the one it was made of, whose names are without a prefix
        self._names = {part: name.replace("_orig_mod.", "") for name, part in self._model.named_modules()}
        self._thread = threading.get_ident()
        self._running: list[nn.Module] = []
        self._counts: dict[str, int] = {}
        self._grouped = False
        self._sizes: dict[int, tuple[int, int]] = {}  # of maps seen, by their number of pixels
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
        for handle in (
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ):
            self._stack.callback(handle.remove)
        _watch.watchers.append(self._told)
        self._stack.callback(_watch.watchers.remove, self._told)
        return self._maps

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        self._running.clear()

    def _is_mine(self, module: nn.Module) -> bool:
        return module in self._names and threading.get_ident() == self._thread

    def _enter_module(self, module: nn.Module, args: tuple) -> None:
        if not self._is_mine(module):
            return
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if not self._running:
            self._counts.clear()
            self._sizes.clear()
            if module is self._model:
                self._maps._records.clear()
            if first is not None and first.dim() == 4 and first.shape[1] in (1, 3):
                self._maps.image = first.detach()
        self._running.append(module)
        self._grouped = False
        self._see(first)

    def _leave_module(self, module: nn.Module, args: tuple, out: Any) -> None:
        if self._is_mine(module) and module in self._running:
            while self._running.pop() is not module:
                pass
            self._see(out)

    def _see(self, x: Any) -> None:
        if isinstance(x, torch.Tensor) and x.dim() == 4:
            self._sizes[x.shape[2] * x.shape[3]] = (x.shape[2], x.shape[3])

    def _told(self, kind: str, what: dict[str, Any]) -> None:
        if not self._running or threading.get_ident() != self._thread:
            return
        if kind == "softmax_attention" and self._grouped:
            return  # groups too long for one program, folded into a batch
        self._grouped = self._grouped or kind == "group_attention"
        module = self._running[-1]
        name = ".".join(filter(None, (self._names[module], what.pop("part", ""))))
        name = name or type(module).__name__
        self._counts[name] = count = self._counts.get(name, 0) + 1
        name = name if count == 1 else f"{name}#{count}"
        # removed first, so that the order is that of the last run
        self._maps._records.pop(name, None)
        with torch.no_grad():
            self._maps._records[name] = (
                self._gate(name, kind, **what) if kind.endswith("gate") else self._attention(name, kind, what)
            )

    def _gate(
        self, name: str, kind: str, gate: Any = None, gate_h: Any = None, gate_w: Any = None
    ) -> Gate:  # fmt: skip
        if kind == "coordinate_gate":
            gate_h, gate_w = (each.detach().clone() for each in (gate_h, gate_w))
            return Gate(name, kind, *(each if each.dim() == 4 else each.unsqueeze(0) for each in (gate_h, gate_w)))
        if callable(gate):
            with _nobody():
                gate = gate()
        gate = gate.detach().clone()
        if kind == "channel_gate":
            return Gate(name, kind, gate.flatten(1)[:, :, None, None])
        return Gate(name, kind, gate if gate.dim() == 4 else gate.unsqueeze(0))

    def _attention(self, name: str, kind: str, what: dict[str, Any]) -> Attention:
        what = {name: _kept(value) for name, value in what.items()}
        if kind == "group_attention":
            return Attention(name, kind, what, tuple(what["k"].shape[1:3]), 0)
        if what.get("grid") is not None:
            return Attention(name, kind, what, tuple(what["grid"]), 0)
        keys = what["weights"].shape[3] if kind == "attention_weights" else what["k"].shape[2]
        for extra in (0, 1, 2):  # none, a class token, a class and a distillation token
            if keys - extra in self._sizes:
                return Attention(name, kind, what, self._sizes[keys - extra], extra)
        return Attention(name, kind, what, None, 0)


@contextlib.contextmanager
def _nobody() -> Iterator[None]:
    """Operations inside are watched by nobody."""
    watchers, _watch.watchers[:] = list(_watch.watchers), []
    try:
        yield
    finally:
        _watch.watchers[:] = watchers


def _caption(name: str, query: Query | None) -> str:
    return name if query is None else f"{name}, query {query}"


def _kept(value: Any) -> Any:
    """Tensors, also in a pair, out of their graph and of inference mode."""
    if isinstance(value, tuple):
        return tuple(map(_kept, value))
    if not isinstance(value, torch.Tensor):
        return value
    with torch.inference_mode(False):
        return value.detach().clone() if value.is_inference() else value.detach()


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In float32, unless it is float64."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _of_queries(term: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    """The rows of a bias or mask (B or 1, heads or 1, Nq or 1, Nk)."""
    return term if term.shape[2] == 1 else term[:, :, numbers]


def _table_rows(table: torch.Tensor, grid: tuple[int, int], numbers: list[int]) -> torch.Tensor:
    """The rows of the bias by relative position, (heads, k, Nk)."""
    height, width = grid
    rows, columns = torch.arange(height * width) // width, torch.arange(height * width) % width
    query = torch.tensor(numbers)
    down = rows[query][:, None] - rows + height - 1
    right = columns[query][:, None] - columns + width - 1
    return table[(down * (2 * width - 1) + right).to(table.device)].permute(2, 0, 1)
