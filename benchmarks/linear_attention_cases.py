"""Linear attention's cases, and who computes them: the published code in eager PyTorch and compiled, and attnk."""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from harness import DTYPES, Provider
from tile_tuning import TileTuning
from torch import Tensor

from attnk.ops.linear_attention import PUBLISHED_EPS, linear_attention
from attnk.reference.linear_attention import linear_attention_reference

TITLE = "Linear attention"
PROVIDERS = dict.fromkeys(("cpu", "cuda"), ("tutorial", "torch.compile", "attnk"))

# By name: batch on a GPU and on a CPU, heads, tokens, head dim.
SHAPES = {
    "SANA 1024": (16, 1, 70, 1024, 32),
    "SANA 4096": (2, 1, 70, 16384, 32),
    "EfficientViT-L 512": (64, 4, 16, 1024, 32),
    "EfficientViT-B 224": (256, 16, 16, 196, 16),
    "efficient attention 128": (16, 1, 8, 16384, 64),
    "heads of 128": (16, 1, 8, 4096, 128),
}


def published_attention(q: Tensor, k: Tensor, v: Tensor, feature_map: str) -> Tensor:
    """The attention as its authors wrote it: SANA's LiteMLA, fast-transformers, efficient attention."""
    if feature_map == "softmax":
        return F.softmax(q, 3) @ (F.softmax(k, 2).transpose(2, 3) @ v)
    if feature_map == "relu":
        q, k, v = F.relu(q), F.relu(k), F.pad(v, (0, 1), value=1)
        out = q @ (k.transpose(2, 3) @ v)
        if out.dtype in (torch.float16, torch.bfloat16):
            out = out.float()
        return (out[..., :-1] / (out[..., -1:] + PUBLISHED_EPS["relu"])).to(q.dtype)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bhnd,bhne->bhde", k, v)
    normalizer = 1 / (torch.einsum("bhnd,bhd->bhn", q, k.sum(2)) + PUBLISHED_EPS["elu"])
    return torch.einsum("bhnd,bhde,bhn->bhne", q, state, normalizer)


@dataclasses.dataclass(frozen=True)
class LinearCase:
    """Linear attention of q, k and v (B, heads, tokens, D).

    Attributes:
        name: what it is taken from.
        batch, heads, tokens, head_dim: the sizes.
        feature_map: "relu", "elu" or "softmax".
        dtype: a key of DTYPES.
        device: "cpu" or "cuda".
        layout: "tokens", heads inside tokens in memory, or "map", as a contiguous feature map has them.
    """

    op: ClassVar[str] = "linear_attention"
    random: ClassVar[bool] = False

    name: str
    batch: int
    heads: int
    tokens: int
    head_dim: int
    feature_map: str = "relu"
    dtype: str = "fp32"
    device: str = "cpu"
    layout: str = "tokens"

    @classmethod
    def named(
        cls, name: str, feature_map: str = "relu", dtype: str = "fp32", device: str = "cpu", layout: str = "tokens"
    ) -> "LinearCase":
        """A case of SHAPES."""
        gpu_batch, cpu_batch, *sizes = SHAPES[name]
        return cls(name, cpu_batch if device == "cpu" else gpu_batch, *sizes, feature_map, dtype, device, layout)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def size(self) -> int:
        """S, the bytes of q."""
        return self.batch * self.heads * self.tokens * self.head_dim * self.itemsize

    @property
    def needed_memory(self) -> int:
        return 40 * 8 * self.size // self.itemsize  # the oracle's tensors in float64

    @property
    def extra(self) -> str:
        return self.feature_map if self.layout == "tokens" else f"{self.feature_map}, {self.layout}"

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.heads}x{self.tokens}x{self.head_dim}"

    def __str__(self) -> str:
        return " ".join((self.name, self.shape, self.dtype, self.extra))

    def fields(self) -> dict[str, Any]:
        """The case as columns of a results file."""
        return {"op": self.op, "case": self.name, "shape": self.shape, "dtype": self.dtype, "extra": self.extra}

    def inputs(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """q, k and v, requiring grad, and the gradient of the output."""
        generator = torch.Generator(self.device).manual_seed(0)
        options = {"dtype": DTYPES[self.dtype], "device": self.device}

        def tensor() -> Tensor:
            if self.layout == "map":
                memory = torch.empty(self.batch, self.heads, self.head_dim, self.tokens, **options)
                return memory.normal_(generator=generator).mT
            memory = torch.empty(self.batch, self.tokens, self.heads, self.head_dim, **options)
            return memory.normal_(generator=generator).transpose(1, 2)

        return tuple(tensor().requires_grad_() for _ in range(3)), tensor()

    def providers(self, compiled: bool = True) -> dict[str, Provider]:
        found = [Provider("tutorial", self.tutorial)]
        if compiled:
            torch._dynamo.reset()  # a second shape would otherwise be compiled for any shape
            found.append(Provider("torch.compile", torch.compile(self.tutorial, fullgraph=True), peer=True))
        found.append(Provider("attnk", self.attnk if self.device == "cpu" else self.attnk_kernels))
        return {provider.name: provider for provider in found}

    def tutorial(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return published_attention(q, k, v, self.feature_map)

    def attnk(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, feature_map=self.feature_map)

    def attnk_kernels(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, feature_map=self.feature_map, backend="triton")

    def oracle(
        self, provider: Provider, inputs: tuple[Tensor, ...], dout: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
        eps = PUBLISHED_EPS[self.feature_map]
        out = linear_attention_reference(*leaves, feature_map=self.feature_map, eps=eps)
        grads = torch.autograd.grad(out, leaves, dout.double())
        return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True)), {}

    def minimal_bytes(self, which: str) -> int:
        """The fewest bytes a pass must move: q, k, v, out and their gradients once each."""
        return {"forward": 4, "backward": 7, "training": 11}[which] * self.size

    def kernel_bytes(self, which: str, provider: str) -> int:
        """The bytes that attnk's kernels move in a pass: the formula in their file."""
        from attnk.kernels.linear_attention import slabs
        from attnk.kernels.tuning import LINEAR_ATTENTION_SLAB

        all_heads, config = self.batch * self.heads, self.table_config()
        softmax = self.feature_map == "softmax"
        sums = 4 * all_heads * self.head_dim
        state = sums * self.head_dim
        norm, read = (2 * sums, 0) if softmax else (sums, sums)
        c, c_queries = (
            slabs(self.tokens, all_heads, tile.block_n, LINEAR_ATTENTION_SLAB)[0] for tile in (config.state, config.dq)
        )
        forward = 4 * self.size + c * (state + norm) + state + read
        if c > 1:
            forward += (c + 1) * (state + norm)
        backward = 7 * self.size + 2 * state + read + norm + c_queries * (state + read)
        if c_queries > 1 or softmax:
            backward += c_queries * (state + read) + (1 + softmax) * (state + sums)
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

    def table_config(self) -> Any:
        from attnk.kernels import tuning

        arch = tuning.architecture(torch.device(self.device))
        return tuning.linear_attention_config(arch, itemsize=self.itemsize, head_dim=self.head_dim)


# Tuning

TILE_KERNELS = {
    "state": "_fwd_state_kernel",
    "forward": "_attention_fwd_kernel",
    "dq": "_bwd_dq_kernel",
    "dkv": "_bwd_dkv_kernel",
}


def tuned_cases() -> list[LinearCase]:
    """What a sweep of the whole table goes through."""
    rows = (
        ("SANA 1024", "relu", "bf16"),
        ("efficient attention 128", "softmax", "bf16"),
        ("heads of 128", "elu", "bf16"),
        ("SANA 1024", "relu", "fp32"),
        ("efficient attention 128", "softmax", "fp32"),
    )
    return [LinearCase.named(*row, device="cuda") for row in rows]


def tuned_case(options: argparse.Namespace) -> LinearCase:
    """The case that the command line of ``tune.py`` names."""
    batch, heads, tokens, head_dim = (int(size) for size in (options.shape or "16x70x1024x32").split("x"))
    feature_map = options.extra or "relu"
    return LinearCase("tuned", batch, heads, tokens, head_dim, feature_map, options.dtype, device="cuda")


class Tuning(TileTuning):
    """Linear attention's part of a sweep."""

    def __init__(self, case: LinearCase) -> None:
        from attnk.kernels import linear_attention as kernels
        from attnk.kernels.tuning import LinearAttentionConfig

        key = f"{case.itemsize}, {case.head_dim}"
        super().__init__(case, kernels, "linear_attention_config", LinearAttentionConfig, TILE_KERNELS, key, "")

    def candidates(self, part: str, best: Any) -> Iterator[Any]:
        """Tiles one step from the best so far."""
        n, v, warps, stages = best.block_n, best.block_v, best.num_warps, best.num_stages
        changes: list[dict[str, int]] = [
            {"num_stages": stages + 1},
            {"block_n": 2 * n},
            {"block_n": n // 2},
            {"num_warps": 2 * warps},
            {"num_warps": warps // 2},
            {"num_stages": stages - 1},
            {"block_v": 2 * v},
            {"block_v": v // 2},
            {"block_n": 2 * n, "num_warps": 2 * warps},
        ]
        for change in changes:
            tile = dataclasses.replace(best, **change)
            blocks = 16 <= tile.block_n <= 256 and 16 <= tile.block_v <= max(v, self.case.head_dim)
            if blocks and 1 <= tile.num_warps <= 16 and 1 <= tile.num_stages <= 4:
                yield tile


# The picture

PASS_TITLES = {"forward": "inference", "training": "forward + backward"}
GROWTH = "growth with N"
CAPTION = (
    "tutorial: the published code in eager PyTorch: SANA's LiteMLA (relu), fast-transformers (elu), efficient\n"
    "attention (softmax). Below the bars: where the sizes are from, the number of tokens, the feature map."
)


def panels(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of panels: the passes, memory over the number of tokens; on a GPU a pass each."""

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
                    value="percent_of_copy",
                    ylabel="% of copy bandwidth",
                    scale=dtype,
                )
            ]
            for dtype in ("bf16", "fp32")
            for which in ("forward", "backward")
        ]
    cpu = [record for record in records if record["group"] == "cpu"]
    rows = [
        [bars(words, [record for record in cpu if record["pass"] == which]) for which, words in PASS_TITLES.items()]
    ]
    growth = [record for record in records if record["group"] == "memory" and record["case"] == GROWTH]
    rows.append(
        [
            {
                "title": "memory held at once, forward + backward",
                "records": growth,
                "x": lambda record: int(record["shape"].split("x")[2]),
                "xlabel": "tokens (1 head, D 64)",
            }
        ]
    )
    return rows


def _label(record: dict[str, Any]) -> str:
    return "\n".join([*record["case"].split(" ", 1), f"N {record['shape'].split('x')[2]}", record["extra"]])
