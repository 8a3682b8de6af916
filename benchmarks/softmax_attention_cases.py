"""Softmax attention's cases, and who computes them: the tutorials' code, PyTorch's own attentions, and attnk.

``AttentionCase`` is the function of q, k and v; ``SelfAttentionCase`` is the tutorials' module, projections included.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from harness import DTYPES, SEED, Provider, WrongResult
from tile_tuning import TileTuning
from torch import Tensor

from attnk.ops.softmax_attention import softmax_attention
from attnk.reference.softmax_attention import relative_position_index, softmax_attention_reference
from attnk.testing import published

TITLE = "Softmax attention"
DROPOUT = 0.1
CHUNK = 1 << 25  # weights of the float64 oracle at once
BACKENDS = ("cudnn", "flash", "efficient", "math")  # of scaled_dot_product_attention on a GPU
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

# By name: batch on a GPU and on a CPU, heads, queries, keys, head dim.
SHAPES = {
    "ViT-B 224": (256, 4, 12, 197, 197, 64),
    "ViT-B 384": (64, 1, 12, 577, 577, 64),
    "DINOv2 518": (16, 1, 12, 1370, 1370, 64),
    "SAM-B window": (400, 8, 12, 196, 196, 64),
    "SAM-H window": (400, 8, 16, 196, 196, 80),
    "VGG block 3": (16, 1, 8, 3136, 3136, 32),
    "cross-scale": (32, 1, 8, 3136, 196, 32),
    "long": (4, 1, 12, 4096, 4096, 64),
    "long, D 128": (4, 1, 8, 4096, 4096, 128),
}


def tutorial_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Attention as tutorials write it."""
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    weights = torch.softmax(scores, dim=-1)
    weights = F.dropout(weights, dropout_p)
    return torch.matmul(weights, v)


class TutorialWithSDPA(published.SelfAttention):
    """Self-attention as a tutorial writes it, its formula replaced by PyTorch's function."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.p if self.training else 0.0)


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Attention of q (B, heads, queries, D) over k and v (B, heads, keys, D), heads inside tokens in memory.

    Attributes:
        name: what it is taken from.
        batch, heads, queries, keys, head_dim: the sizes.
        extra: "bias" adds a (1, heads, queries, keys) bias with a gradient, "table" one by relative position in a
            square grid, with a gradient of its table, "dropout" drops weights with probability DROPOUT.
        dtype: a key of DTYPES.
        device: "cpu" or "cuda".
    """

    op: ClassVar[str] = "softmax_attention"

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    extra: str = ""
    dtype: str = "fp32"
    device: str = "cpu"

    @classmethod
    def named(cls, name: str, extra: str = "", dtype: str = "fp32", device: str = "cpu") -> "AttentionCase":
        """A case of SHAPES."""
        gpu_batch, cpu_batch, *sizes = SHAPES[name]
        return cls(name, cpu_batch if device == "cpu" else gpu_batch, *sizes, extra, dtype, device)

    @property
    def random(self) -> bool:
        return self.extra == "dropout"

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def weights(self) -> int:
        """How many attention weights there are."""
        return self.batch * self.heads * self.queries * self.keys

    @property
    def size(self) -> int:
        """S, the bytes of q."""
        return self.batch * self.heads * self.queries * self.head_dim * self.itemsize

    @property
    def needed_memory(self) -> int:
        return 40 * self.weights + 64 * CHUNK  # the tutorials' code in float32, and the oracle

    @property
    def grid(self) -> tuple[int, int] | None:
        """Height and width of the tokens, where a bias table asks for them."""
        return (math.isqrt(self.queries),) * 2 if self.extra == "table" else None

    @property
    def dropout_p(self) -> float:
        return DROPOUT if self.extra == "dropout" else 0.0

    @property
    def shape(self) -> str:
        keys = "" if self.keys == self.queries else f" to {self.keys}"
        return f"{self.batch}x{self.heads}x{self.queries}x{self.head_dim}{keys}"

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.shape, self.dtype, self.extra)))

    def fields(self) -> dict[str, Any]:
        """The case as columns of a results file."""
        return {"op": self.op, "case": self.name, "shape": self.shape, "dtype": self.dtype, "extra": self.extra}

    def inputs(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """q, k, v and the bias or its table, requiring grad, and the gradient of the output."""
        generator = torch.Generator(self.device).manual_seed(0)
        options = {"dtype": DTYPES[self.dtype], "device": self.device}

        def tokens(length: int) -> Tensor:
            memory = torch.empty(self.batch, length, self.heads, self.head_dim, **options)
            return memory.normal_(generator=generator).transpose(1, 2)

        found = [tokens(self.queries), tokens(self.keys), tokens(self.keys)]
        if self.extra == "bias":
            found.append(torch.empty(1, self.heads, self.queries, self.keys, **options).normal_(generator=generator))
        if self.grid is not None:
            height, width = self.grid
            entries = (2 * height - 1) * (2 * width - 1)
            found.append(torch.empty(entries, self.heads, **options).normal_(generator=generator))
        return tuple(tensor.requires_grad_() for tensor in found), tokens(self.queries)

    def providers(self, compiled: bool = True) -> dict[str, Provider]:
        if compiled:
            torch._dynamo.reset()  # a second shape would otherwise be compiled for any shape
        found = [Provider("tutorial", self.tutorial)]
        if compiled:
            found.append(Provider("torch.compile", torch.compile(self.tutorial, fullgraph=True), peer=True))
        if self.device == "cpu":
            found.append(Provider("sdpa", self.sdpa, peer=True))
        else:
            found += [
                Provider(f"sdpa {backend}", self.sdpa, scope=functools.partial(forced_sdpa, backend), peer=True)
                for backend in BACKENDS
            ]
            if compiled:
                found.append(Provider("flex_attention", torch.compile(self.flex, fullgraph=True), peer=True))
        found.append(Provider("attnk", self.attnk if self.device == "cpu" else self.attnk_kernels))
        return {provider.name: provider for provider in found}

    def tutorial(self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None = None) -> Tensor:
        return tutorial_attention(q, k, v, self._dense(extra), self.dropout_p)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self._dense(extra), self.dropout_p)

    def flex(self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None = None) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        if self.dropout_p:
            raise NotImplementedError("FlexAttention has no dropout")
        if extra is None:
            return flex_attention(q, k, v)
        if self.grid is None:

            def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return score + extra[0, h, i, j]

        else:
            height, width = self.grid

            def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                down, right = i // width - j // width + height - 1, i % width - j % width + width - 1
                return score + extra[down * (2 * width - 1) + right, h]

        return flex_attention(q, k, v, score_mod=score_mod)

    def attnk(self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None = None, backend: str | None = None) -> Tensor:
        return softmax_attention(
            q, k, v,
            bias=extra if self.extra == "bias" else None,
            bias_table=extra if self.extra == "table" else None,
            grid=self.grid,
            dropout_p=self.dropout_p,
            backend=backend,
        )  # fmt: skip

    def attnk_kernels(self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None = None) -> Tensor:
        """The kernels, also where the library would hand the call to PyTorch."""
        return self.attnk(q, k, v, extra, backend="triton")

    def _dense(self, extra: Tensor | None) -> Tensor | None:
        """The bias (1, heads, queries, keys); of a table as Swin's code makes it."""
        if extra is None or self.grid is None:
            return extra
        index = _index(*self.grid, extra.device)
        return extra[index].view(self.queries, self.keys, self.heads).permute(2, 0, 1).contiguous().unsqueeze(0)

    def oracle(
        self, provider: Provider, inputs: tuple[Tensor, ...], dout: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        q, k, v, *extra = (tensor.detach() for tensor in inputs)
        keep = None
        if self.random:
            keys = torch.zeros_like(k).requires_grad_()
            keep = kept_weights(provider.name, lambda values: provider.forward((inputs[0], keys, values)), q, v)
        names = ("out", "dq", "dk", "dv", f"d{self.extra}")
        found = exact_attention(q, k, v, dout, self.extra, extra[0] if extra else None, self.grid, keep)
        return dict(zip(names, found, strict=False)), {}

    def flops(self, which: str) -> int:
        """Operations of a pass, two for each multiplication and addition of its matrix products."""
        return {"forward": 4, "backward": 10, "training": 14}[which] * self.weights * self.head_dim

    def _tensor_bytes(self) -> tuple[int, int, int]:
        """Bytes of q (and of out), of k (and of v), and of the bias or its table."""
        keys = self.size // self.queries * self.keys
        height, width = self.grid or (0, 0)
        entries = {"bias": self.queries * self.keys, "table": (2 * height - 1) * (2 * width - 1)}.get(self.extra, 0)
        return self.size, keys, entries * self.heads * self.itemsize

    def minimal_bytes(self, which: str) -> int:
        """The fewest bytes a pass must move: q, k, v, out, their gradients and the bias or its table once each."""
        query, key, extra = self._tensor_bytes()
        forward, backward = 2 * query + 2 * key + extra, 4 * query + 4 * key + 2 * extra
        return {"forward": forward, "backward": backward, "training": forward + backward}[which]

    def kernel_bytes(self, which: str, provider: str) -> int:
        """The bytes that attnk's kernels move in a pass: the formula in their file.

        A bias table's gradient is not in it.

        Args:
            which: "forward" (nothing kept), "backward" or "training".
            provider: "attnk".
        """
        query, key, extra = self._tensor_bytes()
        rows = 4 * self.batch * self.heads * self.queries
        kept = rows * (2 if self.extra in ("bias", "table") else 1)
        forward = 2 * query + 2 * key + extra
        dq = 4 * query + 2 * key + kept + rows + extra
        dkv = 2 * query + 4 * key + kept + rows + extra
        dbias = 0
        if self.extra == "bias":
            from attnk.kernels import tuning

            tile = self.table_config().dbias
            programs = self.heads * -(-self.queries // tile.block_m) * -(-self.keys // tile.block_n)
            slab_size = -(-self.batch // min(self.batch, -(-tuning.DBIAS_PROGRAMS // programs)))
            slabs = -(-self.batch // slab_size)
            partial = extra if slabs == 1 else slabs * extra // self.itemsize * 4
            dbias = 2 * query + 2 * key + 3 * rows + extra + partial
        backward = dq + dkv + dbias
        return {"forward": forward, "backward": backward, "training": forward + kept + backward}[which]

    def rates(self, which: str, provider: str, seconds: float, copy: float) -> dict[str, float]:
        rate = self.minimal_bytes(which) / seconds
        return {
            "tflops": round(self.flops(which) / seconds / 1e12, 1),
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

    def table_config(self) -> Any:
        from attnk.kernels import tuning

        return tuning.softmax_attention_config(
            tuning.architecture(torch.device(self.device)),
            itemsize=self.itemsize,
            head_dim=self.head_dim,
            extras=bool(self.extra),
        )


@dataclasses.dataclass(frozen=True)
class SelfAttentionCase:
    """The tutorials' self-attention module over x (B, N, C) with 8 heads; with dropout it is in training.

    Attributes:
        shape: (B, N, C).
        dropout: of the weights.
        dtype: a key of DTYPES.
        device: "cpu" or "cuda".
    """

    op: ClassVar[str] = AttentionCase.op
    HEADS: ClassVar[int] = 8
    PARAMETERS: ClassVar[tuple[str, ...]] = ("qkv_proj.weight", "qkv_proj.bias", "out_proj.weight", "out_proj.bias")

    shape: tuple[int, int, int]
    dropout: float = 0.0
    dtype: str = "fp32"
    device: str = "cpu"

    @property
    def random(self) -> bool:
        return self.dropout > 0

    @property
    def size(self) -> int:
        """S, the bytes of x."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def extra(self) -> str:
        return f"dropout {self.dropout}" if self.dropout else ""

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return " ".join(filter(None, ("SelfAttention", shape, self.dtype, self.extra)))

    def fields(self) -> dict[str, Any]:
        """The case as columns of a results file."""
        shape = "x".join(map(str, self.shape))
        return {"op": self.op, "case": "SelfAttention", "shape": shape, "dtype": self.dtype, "extra": self.extra}

    def inputs(self) -> tuple[tuple[Tensor], Tensor]:
        """x, requiring grad, and the gradient of the output."""
        generator = torch.Generator(self.device).manual_seed(0)
        x, dout = (
            torch.empty(self.shape, dtype=DTYPES[self.dtype], device=self.device).normal_(generator=generator)
            for _ in range(2)
        )
        return (x.requires_grad_(),), dout

    def providers(self, compiled: bool = True) -> dict[str, Provider]:
        from attnk.modules.self_attention import SelfAttention

        classes = {"tutorial": published.SelfAttention, "sdpa": TutorialWithSDPA, "attnk": SelfAttention}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            modules = {
                name: made(self.shape[2], num_heads=self.HEADS, dropout=self.dropout) for name, made in classes.items()
            }
        found = {}
        for name, module in modules.items():
            module.load_state_dict(modules["tutorial"].state_dict())
            module.to(self.device, DTYPES[self.dtype]).train(self.random)
            parameters = tuple(module.get_parameter(path) for path in self.PARAMETERS)
            found[name] = Provider(name, module, parameters, peer=name == "sdpa")
            if compiled and name == "tutorial":
                torch._dynamo.reset()
                module = torch.compile(module, fullgraph=True)
                found["torch.compile"] = Provider("torch.compile", module, parameters, peer=True)
        return found

    def oracle(
        self, provider: Provider, inputs: tuple[Tensor, ...], dout: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        keep = self._keep(provider, inputs[0]) if self.random else None
        x = inputs[0].detach().double().requires_grad_()
        weight, bias, out_weight, out_bias = (
            parameter.detach().double().requires_grad_() for parameter in provider.parameters
        )
        qkv = F.linear(x, weight, bias)
        q, k, v = (self._heads(part.detach()) for part in qkv.chunk(3, dim=-1))
        dout = dout.double()
        extra = "dropout" if self.random else ""
        attended, *grads = exact_attention(q, k, v, self._heads(dout @ out_weight.detach()), extra, None, None, keep)
        attended, *grads = (tensor.transpose(1, 2).flatten(2) for tensor in (attended, *grads))
        dqkv = torch.cat(grads, dim=-1)
        out = F.linear(attended, out_weight, out_bias)
        first = torch.autograd.grad(qkv, (x, weight, bias), dqkv)
        last = torch.autograd.grad(out, (out_weight, out_bias), dout)
        names = [f"d{path}" for path in self.PARAMETERS]
        exact = dict(zip(("out", "dx", *names), (out.detach(), *first, *last), strict=True))
        terms = [  # sums over all tokens, of what a bias and a weight meet
            (gradient.abs().sum((0, 1)).max() * values.abs().max().clamp(min=1)).item()
            for gradient, values in ((dqkv, x.detach()), (dout, attended))
            for _ in range(2)
        ]
        return exact, dict(zip(names, terms, strict=True))

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.HEADS, -1)).transpose(1, 2)

    def _keep(self, provider: Provider, x: Tensor) -> Tensor:
        """Which weights the provider keeps, found with projections that hand the values through."""
        saved = [parameter.detach().clone() for parameter in provider.parameters]
        weight, _, out_weight, _ = provider.parameters
        channels = self.shape[2]
        with torch.no_grad():
            for parameter in provider.parameters:
                parameter.zero_()
            weight[2 * channels :].fill_diagonal_(1)
            out_weight.fill_diagonal_(1)

        def run(values: Tensor) -> Tensor:
            tokens = values.detach().transpose(1, 2).flatten(2).requires_grad_()
            return self._heads(provider.forward((tokens,)))

        try:
            return kept_weights(provider.name, run, self._heads(x), self._heads(x))
        finally:
            with torch.no_grad():
                for parameter, values in zip(provider.parameters, saved, strict=True):
                    parameter.copy_(values)


@functools.lru_cache(maxsize=1)
def _index(height: int, width: int, device: torch.device) -> Tensor:
    return relative_position_index(height, width, device)


@contextlib.contextmanager
def forced_sdpa(backend: str) -> Iterator[None]:
    """Let scaled_dot_product_attention use one backend alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
    with sdpa_kernel(getattr(SDPBackend, names[backend])):
        yield


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    extra: str = "",
    values: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    keep: Tensor | None = None,
) -> list[Tensor]:
    """The definition in float64, as much of it at a time as memory allows.

    Args:
        q, k, v, dout: (B, heads, length, D).
        extra, values: "bias" or "table" and the tensor, or anything else and None.
        grid: of the table.
        keep: the weights that dropout keeps, (B, heads, queries, keys).

    Returns:
        out, dq, dk, dv and, where there are values, their gradient.
    """
    batch, heads, queries, _ = q.shape
    found = [torch.empty(tensor.shape, dtype=torch.float64, device=q.device) for tensor in (dout, q, k, v)]
    dvalues = None if values is None else torch.zeros(values.shape, dtype=torch.float64, device=q.device)
    images = max(1, CHUNK // (queries * k.shape[2]))
    for h in range(heads):
        of_head = (slice(None), slice(h, h + 1))  # of a table [entries, heads] as of a bias [1, heads, ...]
        for start in range(0, batch, images):
            part = (slice(start, start + images), slice(h, h + 1))
            leaves = [tensor[part].double().requires_grad_() for tensor in (q, k, v)]
            options: dict[str, Any] = {}
            if values is not None:
                leaves.append(values[of_head].double().requires_grad_())
                options = {"bias": leaves[3]} if extra == "bias" else {"bias_table": leaves[3], "grid": grid}
            if keep is not None:
                options |= {"dropout_p": DROPOUT, "keep": keep[part]}
            out, _ = softmax_attention_reference(*leaves[:3], **options)
            grads = torch.autograd.grad(out, leaves, dout[part].double())
            for whole, piece in zip(found, (out.detach(), *grads), strict=False):
                whole[part] = piece
            if dvalues is not None:
                dvalues[of_head] += grads[3]
    return found if dvalues is None else [*found, dvalues]


def kept_weights(name: str, run: Callable[[Tensor], Tensor], q: Tensor, v: Tensor) -> Tensor:
    """Which weights dropout keeps after ``torch.manual_seed(SEED)``: bool (B, heads, queries, keys).

    They are read off the output. Where all keys are 0 all weights are equal; a column of the values that holds 1, 2, 4
    and so on for some keys, and 0 for the others, then comes out as a number whose binary digits are those keys.

    Args:
        name: of the provider.
        run: takes values and returns the output, with keys that are 0.
        q, v: tensors of the case; their values do not matter.

    Raises:
        WrongResult: what comes out is no such number, or as many are kept as no chance explains.
    """
    keys, dim = v.shape[-2:]
    digits = {torch.bfloat16: 4, torch.float16: 6, torch.float32: 15}[v.dtype]
    keep = torch.empty(*q.shape[:-1], keys, dtype=torch.bool, device=q.device)
    powers = torch.arange(digits, device=q.device)
    for start in range(0, keys, dim * digits):
        stop = min(start + dim * digits, keys)
        place = torch.arange(stop - start, device=q.device)
        code = torch.zeros(keys, dim, dtype=v.dtype, device=v.device)
        code[start + place, place // digits] = (2.0 ** (place % digits)).to(v.dtype)
        values = torch.zeros_like(v, requires_grad=False).copy_(code).requires_grad_()
        torch.manual_seed(SEED)
        number = (run(values).detach().double() * keys * (1 - DROPOUT)).round().long()
        if number.min() < 0 or number.max() >= 1 << digits:
            raise WrongResult(f"{name}: with equal weights and dropout the output has {number.max()} of {1 << digits}")
        keep[..., start:stop] = (number.unsqueeze(-1) >> powers & 1).flatten(-2)[..., : stop - start].bool()
    share, chance = keep.float().mean().item(), 1 - DROPOUT
    allowed = 1 / 256 + 6 * (DROPOUT * chance / keep.numel()) ** 0.5  # some draw eight bits for a weight
    if abs(share - chance) > allowed:
        raise WrongResult(f"{name}: keeps {share:.4f} of the weights, not {chance}")
    return keep


# Tuning

TILE_KERNELS = {
    "forward": "_fwd_kernel",
    "dq": "_bwd_dq_kernel",
    "dkv": "_bwd_dkv_kernel",
    "dbias": "_bwd_dbias_kernel",
}


def tuned_cases() -> list[AttentionCase]:
    """What a sweep of the whole table goes through."""
    rows = (
        ("DINOv2 518", "", "bf16"),
        ("DINOv2 518", "bias", "bf16"),
        ("VGG block 3", "", "bf16"),
        ("long, D 128", "", "bf16"),
        ("DINOv2 518", "", "fp32"),
        ("SAM-H window", "table", "bf16"),
        ("VGG block 3", "bias", "bf16"),
        ("DINOv2 518", "bias", "fp32"),
        ("SAM-H window", "", "bf16"),
    )
    return [AttentionCase.named(*row, device="cuda") for row in rows]


def tuned_case(options: argparse.Namespace) -> AttentionCase:
    """The case that the command line of ``tune.py`` names."""
    batch, heads, tokens, head_dim = (int(size) for size in (options.shape or "16x12x1370x64").split("x"))
    return AttentionCase("tuned", batch, heads, tokens, tokens, head_dim, options.extra, options.dtype, device="cuda")


class Tuning(TileTuning):
    """Softmax attention's part of a sweep."""

    def __init__(self, case: AttentionCase) -> None:
        from attnk.kernels.softmax_attention import common
        from attnk.kernels.tuning import SoftmaxAttentionConfig

        key = f"{case.itemsize}, {case.head_dim}, {bool(case.extra)}"
        config = SoftmaxAttentionConfig
        super().__init__(case, common, "softmax_attention_config", config, TILE_KERNELS, key, case.extra)

    def candidates(self, part: str, best: Any) -> Iterator[Any]:
        """Tiles one step from the best so far."""
        m, n, warps, stages = best.block_m, best.block_n, best.num_warps, best.num_stages
        changes: list[dict[str, int]] = [
            {"block_m": 2 * m},
            {"block_n": 2 * n},
            {"block_m": m // 2},
            {"block_n": n // 2},
            {"num_stages": stages + 1},
            {"num_stages": stages - 1},
            {"num_warps": 2 * warps},
            {"num_warps": warps // 2},
            {"block_m": 2 * m, "num_warps": 2 * warps},
            {"block_n": 2 * n, "num_warps": 2 * warps},
            {"block_m": 2 * m, "block_n": n // 2},
            {"block_m": m // 2, "block_n": 2 * n},
        ]
        for change in changes:
            tile = dataclasses.replace(best, **change)
            logits = tile.block_m * tile.block_n / (32 * tile.num_warps)  # a thread
            blocks = all(16 <= block <= 256 for block in (tile.block_m, tile.block_n))
            if blocks and 1 <= tile.num_warps <= 16 and 1 <= tile.num_stages <= 4 and 4 <= logits <= 256:
                yield tile


# The picture

PASS_TITLES = {"forward": "inference", "training": "forward + backward"}
GROWTH = "growth with N"
CAPTION = (
    "tutorial: matmul, softmax, dropout, matmul in eager PyTorch; sdpa: the same with F.scaled_dot_product_attention.\n"
    "Below the bars: batch x tokens x channels, or where the sizes are from, and the number of tokens."
)


def panels(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of panels: the tutorials' module, the function, memory over the number of tokens; on a GPU a pass each."""

    def bars(title: str, members: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        timed = [record for record in members if "median_us" in record]
        return {"title": title, "records": timed, "label": _label, "section": lambda record: "", **more}

    gpu = [record for record in records if record["group"] == "gpu"]
    if gpu:
        return [
            [
                bars(
                    f"{which}, {dtype}",
                    [record for record in gpu if (record["pass"], record["dtype"]) == (which, dtype)],
                    value="tflops",
                    ylabel="TFLOP/s",
                    scale=dtype,
                )
            ]
            for dtype in ("bf16", "fp32")
            for which in ("forward", "backward")
        ]
    cpu = [record for record in records if record["group"] == "cpu"]
    rows = []
    for title, wanted in (("SelfAttention, 8 heads", True), ("the function alone", False)):
        members = [record for record in cpu if (record["case"] == "SelfAttention") == wanted]
        rows.append(
            [
                bars(f"{title}: {words}", [record for record in members if record["pass"] == which])
                for which, words in PASS_TITLES.items()
            ]
        )
    growth = [record for record in records if record["group"] == "memory" and record["case"] == GROWTH]
    rows.append(
        [
            {
                "title": f"memory held at once, forward + backward{words}",
                "records": [record for record in growth if record.get("extra", "") == extra],
                "x": lambda record: int(record["shape"].split("x")[2]),
                "xlabel": "tokens (1 head, D 64)",
            }
            for extra, words in (("", ""), ("dropout", f", dropout {DROPOUT}"))
        ]
    )
    return rows


def _label(record: dict[str, Any]) -> str:
    shape = record["shape"]
    if record["case"] == "SelfAttention":
        lines = [shape.replace("x", " x ")]
    else:
        tokens, _, keys = shape.partition(" to ")
        lines = [*record["case"].replace(", ", " ").split(" ", 1), f"N {tokens.split('x')[2]}"]
        lines += [f"to {keys}"] if keys else []
    return "\n".join([*lines, *filter(None, [record.get("extra")])])
