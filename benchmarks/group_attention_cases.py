"""What the cases of axial and of window attention share: sizes, the oracle, bytes, tuning and the pictures."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import harness
import torch
import torch.nn.functional as F
from harness import DTYPES, Provider
from softmax_attention_cases import BACKENDS, CHUNK, forced_sdpa, tutorial_attention
from tile_tuning import TileTuning
from torch import Tensor

from attnk.groups import group_window
from attnk.reference.group_attention import group_attention_reference

PROVIDERS = {
    "cpu": ("tutorial", "torch.compile", "sdpa", "attnk"),
    "cuda": (
        "tutorial",
        "torch.compile",
        *(f"sdpa {backend}" for backend in BACKENDS),
        "flex_attention",
        "attnk",
    ),
}

Attend = Callable[..., Tensor]  # of q, k, v (groups, heads, tokens, D) and a bias or None


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's attention, in the place of ``tutorial_attention``."""
    return F.scaled_dot_product_attention(q, k, v, bias)


@dataclasses.dataclass(frozen=True)
class GroupCase:
    """Attention inside groups of a feature map: q, k, v (B, height, width, heads, D).

    Attributes:
        name: what it is taken from.
        batch, height, width, heads, head_dim: the sizes.
        dtype: a key of DTYPES.
        device: "cpu" or "cuda".
        memory: "tokens", channels last in memory as a linear projection leaves them, or "map", as a convolution of a
            contiguous map does.
    """

    op: ClassVar[str]
    random: ClassVar[bool] = False

    name: str
    batch: int
    height: int
    width: int
    heads: int
    head_dim: int
    dtype: str = "fp32"
    device: str = "cpu"
    memory: str = "tokens"

    # What the two operations have of their own

    @property
    def layout(self) -> str:
        """What ``attnk.group_attention`` takes."""
        raise NotImplementedError

    @property
    def geometry(self) -> dict[str, Any]:
        """Window, shift and dilation, as ``attnk.group_attention`` takes them."""
        return {}

    @property
    def entries(self) -> int:
        """Entries of a bias table a head; 0 without one."""
        return 0

    @property
    def extra(self) -> str:
        """What is particular, in words."""
        raise NotImplementedError

    def usual(self, attend: Attend) -> Attend:
        """The usual code, around a function of q, k, v (groups, heads, tokens, D) and a bias."""
        raise NotImplementedError

    def flex(self) -> Attend:
        """The usual code around FlexAttention."""
        raise NotImplementedError

    def attnk(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None, backend: str | None = None) -> Tensor:
        raise NotImplementedError

    def lacks(self, provider: str) -> bool:
        """Whether there is no such code for the case."""
        return False

    # Sizes

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def size(self) -> int:
        """S, the bytes of q."""
        return self.batch * self.height * self.width * self.heads * self.head_dim * self.itemsize

    @property
    def axes(self) -> tuple[str, ...]:
        """The layouts of the kernels' launches."""
        return ("row", "column") if self.layout in ("sum", "criss_cross") else (self.layout,)

    def group(self, layout: str) -> tuple[int, int]:
        """Groups of an image and tokens of a group."""
        window = self.geometry.get("window", (1, 1))
        tokens = math.prod(group_window(layout, self.height, self.width, window))
        if layout != "window":
            return self.height * self.width // tokens, tokens
        reach = zip((self.height, self.width), window, self.geometry["dilation"], strict=True)
        return math.prod(-(-size // (part * step)) * step for size, part, step in reach), tokens

    @property
    def weights(self) -> int:
        """How many attention weights there are."""
        pairs = (groups * tokens**2 for groups, tokens in map(self.group, self.axes))
        return self.batch * self.heads * sum(pairs)

    @property
    def needed_memory(self) -> int:
        eager = 5 * max(self.itemsize, 2) * self.weights
        return max(eager, 64 * CHUNK) + 40 * 8 * self.size // self.itemsize

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.height}x{self.width}x{self.heads}x{self.head_dim}"

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.shape, self.dtype, self.extra)))

    def fields(self) -> dict[str, Any]:
        """The case as columns of a results file."""
        return {"op": self.op, "case": self.name, "shape": self.shape, "dtype": self.dtype, "extra": self.extra}

    def inputs(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """q, k, v and the bias table, requiring grad, and the gradient of the output."""
        generator = torch.Generator(self.device).manual_seed(0)
        options = {"dtype": DTYPES[self.dtype], "device": self.device}
        sizes = (self.batch, self.height, self.width, self.heads, self.head_dim)

        def tensor() -> Tensor:
            if self.memory == "map":
                memory = torch.empty([sizes[axis] for axis in (0, 3, 4, 1, 2)], **options)
                return memory.normal_(generator=generator).permute(0, 3, 4, 1, 2)
            return torch.empty(sizes, **options).normal_(generator=generator)

        found = [tensor() for _ in range(3)]
        if self.entries:
            found.append(torch.empty(self.entries, self.heads, **options).normal_(generator=generator))
        return tuple(tensor.requires_grad_() for tensor in found), tensor()

    def in_order(self, out: Tensor) -> Tensor:
        """The output with its axes in memory as those of q, as the usual code leaves it for what follows."""
        if self.memory == "tokens":
            return out.contiguous()
        return out.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)

    # Who computes it

    def providers(self, compiled: bool = True) -> dict[str, Provider]:
        if compiled:
            torch._dynamo.reset()  # a second shape would otherwise be compiled for any shape
        tutorial, fused = self.usual(tutorial_attention), self.usual(sdpa)
        found = [Provider("tutorial", tutorial)]
        if compiled:
            found.append(Provider("torch.compile", torch.compile(tutorial, fullgraph=True), peer=True))
        if self.device == "cpu":
            found.append(Provider("sdpa", fused, peer=True))
        else:
            found += [
                Provider(f"sdpa {backend}", fused, scope=functools.partial(forced_sdpa, backend), peer=True)
                for backend in BACKENDS
            ]
            flex = self.flex()
            if compiled and flex is not None:
                found.append(Provider("flex_attention", torch.compile(flex, fullgraph=True), peer=True))
        found.append(Provider("attnk", self.attnk if self.device == "cpu" else self.attnk_kernels))
        return {provider.name: provider for provider in found if not self.lacks(provider.name)}

    def attnk_kernels(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        return self.attnk(q, k, v, table, backend="triton")

    def oracle(
        self, provider: Provider, inputs: tuple[Tensor, ...], dout: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        found = [torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device) for tensor in (dout, *inputs)]
        terms = torch.zeros_like(found[3])
        maps, tables = [*(tensor.detach() for tensor in inputs[:3]), dout], [x.detach() for x in inputs[3:]]
        for layout in self.axes if self.layout == "sum" else (self.layout,):
            for part in self._parts(layout):
                leaves = [tensor[part].double().requires_grad_() for tensor in maps[:3]]
                leaves += [table[:, part[3]].double().requires_grad_() for table in tables]
                out = group_attention_reference(
                    *leaves[:3], table=leaves[3] if tables else None, layout=layout, **self.geometry
                )
                grad = maps[3][part].double()
                terms[part] += torch.autograd.grad(out, leaves[2], grad.abs(), retain_graph=True)[0]
                grads = torch.autograd.grad(out, leaves, grad)
                for whole, piece in zip(found, (out.detach(), *grads[:3]), strict=False):
                    whole[part] += piece
                for whole, piece in zip(found[4:], grads[3:], strict=True):
                    whole[:, part[3]] += piece
        return dict(zip(("out", "dq", "dk", "dv", "dtable"), found, strict=False)), {"dv": terms.max().item()}

    def _parts(self, layout: str) -> Iterator[tuple[slice, ...]]:
        """Parts of the map without a pair of tokens across, of one head, as large as memory allows."""
        weights = self.weights // (self.batch * self.heads)
        images = max(1, CHUNK // weights)
        sides = [self.height, self.width]
        if layout in ("row", "column"):  # any of the lines are such a part
            lines = 0 if layout == "row" else 1
            sides[lines] = max(1, min(sides[lines], CHUNK * sides[lines] // weights))
        starts = (
            range(0, size, step)
            for size, step in zip((self.batch, self.height, self.width), (images, *sides), strict=True)
        )
        for h, b, y, x in itertools.product(range(self.heads), *starts):
            yield slice(b, b + images), slice(y, y + sides[0]), slice(x, x + sides[1]), slice(h, h + 1)

    # Bytes

    def minimal_bytes(self, which: str) -> int:
        """The fewest bytes a pass must move: q, k, v, out, their gradients and the table once each."""
        table = self.entries * self.heads * self.itemsize
        forward, backward = 4 * self.size + table, 7 * self.size + 2 * table
        return {"forward": forward, "backward": backward, "training": forward + backward}[which]

    def kernel_bytes(self, which: str, provider: str) -> int:
        """The bytes that attnk's kernels move in a pass: the formula in their file, a table once a launch."""
        from attnk.kernels.tuning import DBIAS_GROUP_PROGRAMS

        table = self.entries * self.heads * self.itemsize
        forward, backward = 4 * self.size + table, 7 * self.size + table
        if self.entries:
            groups, tokens = self.group(self.axes[0])
            all_groups = self.batch * groups
            each = max(1, min(4 * self.table_config().backward.groups, all_groups * self.heads // DBIAS_GROUP_PROGRAMS))
            backward += 4 * -(-all_groups // each) * self.heads * tokens**2
        if len(self.axes) == 2:
            forward, backward = 9 * self.size, 17 * self.size
        if self.layout == "criss_cross":
            rows = 4 * self.size // self.itemsize // self.head_dim
            forward, backward = forward + 3 * rows, backward + 2 * self.size + 2 * rows
        return {"forward": forward, "backward": backward, "training": forward + backward}[which]

    def rates(self, which: str, provider: str, seconds: float, copy: float) -> dict[str, float]:
        rate = self.minimal_bytes(which) / seconds
        return {
            "gbps": round(rate / 1e9, 1),
            "percent_of_copy": round(100 * rate / copy, 1),
            "copy_gbps": round(copy / 1e9, 1),
        }

    def metered(self) -> dict[str, dict[str, int]]:
        from attnk.testing import Meter

        inputs, dout = self.inputs()
        provider = Provider("attnk", self.attnk_kernels)
        with Meter() as forward:
            provider.infer(inputs)
        out = provider.forward(inputs)
        with Meter() as backward:
            provider.backward(out, inputs, dout)
        return {"attnk": {"forward": forward.bytes, "backward": backward.bytes}}

    @property
    def longest(self) -> int:
        """Tokens of the longest group."""
        return max(self.group(axis)[1] for axis in self.axes)

    def table_config(self, architecture: str = "") -> Any:
        """The table's configuration, or None where the case goes to softmax attention's kernels."""
        from attnk.kernels import tuning

        return tuning.group_attention_config(
            architecture or tuning.architecture(torch.device(self.device)),
            itemsize=self.itemsize,
            tokens=self.longest,
            head_dim=self.head_dim,
            extras=bool(self.entries),
        )


# Overhead

OVERHEAD_PASSES = ("forward", "forward, keeping for backward", "forward and backward")


def overhead_calls(case: GroupCase, which: str) -> dict[str, Callable[[], None]]:
    """Calls of a case of one layout by who computes it; "operators" are those that attnk runs."""
    from attnk.fallback import group_attention as fallback

    inputs, dout = case.inputs()
    keeps, differentiates = which != "forward", which == "forward and backward"
    q, k, v, table = (*(tensor.detach() for tensor in inputs), None)[:4]
    sizes = [case.geometry.get(name, other) for name, other in _NO_GEOMETRY.items()]
    options = (case.layout, *sizes, -1, "-inf", case.head_dim**-0.5, 0.0)
    extras = (None, table, None, None)  # a dense bias, the table, that of columns, and the seed

    def with_operators() -> None:
        out, lse = fallback.group_attention_forward(q, k, v, *extras, *options, keeps)
        if differentiates:
            wanted = (True, True, False, table is not None)
            fallback.group_attention_backward(dout, q, k, v, *extras, out, lse, *options, *wanted)

    def with_autograd(provider: Provider) -> Callable[[], None]:
        def call() -> None:
            with torch.set_grad_enabled(keeps):
                out = provider.forward(inputs)
            if differentiates:
                provider.backward(out, inputs, dout)

        return call

    calls = {name: with_autograd(provider) for name, provider in case.providers(compiled=False).items()}
    return {"operators": with_operators, **calls}


_NO_GEOMETRY = {"window": (1, 1), "shift": (0, 0), "dilation": (1, 1)}


# Compiling


def launches(case: GroupCase, architecture: str) -> tuple[Any, ...]:
    """Every kernel of forward and backward once, with the architecture's configuration; none where it has none."""
    from attnk.kernels import group_attention as kernels

    from attnk import dispatch
    from attnk.testing import record_launches

    if case.table_config(architecture) is None:
        return ()
    inputs, dout = case.inputs()
    with (
        harness.replaced(dispatch, "no_kernel_here", lambda x: None),  # nothing will run
        harness.replaced(kernels.common, "architecture", lambda device: architecture),
        record_launches() as recorded,
    ):
        out = case.attnk_kernels(*inputs)
        torch.autograd.grad(out, inputs, dout)
    return tuple({launch.name: launch for launch in recorded}.values())


# Tuning

TILE_KERNELS = {"forward": "_fwd_kernel", "backward": "_bwd_kernel"}


class Tuning(TileTuning):
    """Group attention's part of a sweep: of windows for their own tokens, of lines for as many as a tile holds."""

    def __init__(self, case: GroupCase) -> None:
        from attnk.kernels import group_attention as kernels
        from attnk.kernels.tuning import GroupAttentionConfig

        tokens = case.longest if case.layout == "window" else max(16, 1 << (case.longest - 1).bit_length())
        key = f"{case.itemsize}, {tokens}, {case.head_dim}, {int(bool(case.entries))}"
        config = GroupAttentionConfig
        super().__init__(case, kernels.common, "group_attention_config", config, TILE_KERNELS, key, "table")

    def candidates(self, part: str, best: Any) -> Iterator[Any]:
        """Tiles one step from the best so far."""
        warps, stages, groups = best.num_warps, best.num_stages, best.groups
        changes: list[dict[str, int]] = [
            {"num_warps": 2 * warps},
            {"num_warps": warps // 2},
            {"num_stages": stages + 1},
            {"num_stages": stages - 1},
            {"groups": 2 * groups},
            {"groups": groups // 2},
            {"num_warps": warps // 2, "num_stages": stages + 1},
        ]
        for change in changes:
            tile = dataclasses.replace(best, **change)
            if 1 <= tile.num_warps <= 16 and 1 <= tile.num_stages <= 4 and 1 <= tile.groups <= 256:
                yield tile


# The pictures

PASS_TITLES = {"forward": "inference", "training": "forward + backward"}


def bars(title: str, members: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A panel of times."""
    timed = [record for record in members if "median_us" in record]
    return {"title": title, "records": timed, "label": _label, "section": lambda record: "", **more}


def time_panels(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of panels: on the CPU one with both passes, on a GPU a pass each."""
    gpu = [record for record in records if record["group"] == "gpu"]
    if gpu:
        return [
            [
                bars(
                    f"{which}, {dtype}",
                    [record for record in gpu if (record["pass"], record["dtype"]) == (which, dtype)],
                    value="percent_of_copy",
                    ylabel="% of copy bandwidth",
                    scale=dtype,
                )
            ]
            for dtype in ("bf16", "fp32")
            for which in ("forward", "backward")
        ]
    cpu = [record for record in records if record["group"] == "cpu"]
    return [
        [bars(words, [record for record in cpu if record["pass"] == which])] for which, words in PASS_TITLES.items()
    ]


def _label(record: dict[str, Any]) -> str:
    return "\n".join([*record["case"].split(", "), *record.get("extra", "").split(", ")])
