"""Axial attention's cases, and who computes them: the usual code by permutation, PyTorch's attentions, and attnk."""

import argparse
import dataclasses
from typing import Any, ClassVar

import torch
from group_attention_cases import PROVIDERS, Attend, GroupCase, Tuning, time_panels
from torch import Tensor

from attnk.ops.group_attention import axial_attention

__all__ = ["CAPTION", "GROWTH", "PROVIDERS", "TITLE", "AxialCase", "Tuning", "panels", "tuned_case", "tuned_cases"]

TITLE = "Axial attention"

# By name: batch on a GPU and on a CPU, height, width, heads, head dim.
SHAPES = {
    "map 56": (32, 1, 56, 56, 8, 32),
    "map 112": (32, 1, 112, 112, 8, 32),
    "map 28": (128, 8, 28, 28, 16, 32),
    "map 14": (256, 16, 14, 14, 16, 32),
    "map 56, 4 heads": (32, 2, 56, 56, 4, 32),
    "map 112, 4 heads": (8, 1, 112, 112, 4, 32),
    "Axial-DeepLab 56": (32, 2, 56, 56, 8, 16),
    "Axial-DeepLab 112": (8, 1, 112, 112, 8, 16),
    "rows of 1024": (8, 1, 1024, 1024, 1, 32),
}
GROWTH = "growth with the map"


@dataclasses.dataclass(frozen=True)
class AxialCase(GroupCase):
    """Attention along rows, columns or both.

    Attributes:
        layout: "row", "column", "sum" or "criss_cross".
        others: as in GroupCase.
    """

    op: ClassVar[str] = "axial_attention"

    layout: str = "row"

    @classmethod
    def named(
        cls, name: str, layout: str = "row", dtype: str = "fp32", memory: str = "tokens", device: str = "cpu"
    ) -> "AxialCase":
        """A case of SHAPES."""
        gpu_batch, cpu_batch, *sizes = SHAPES[name]
        return cls(name, cpu_batch if device == "cpu" else gpu_batch, *sizes, dtype, device, memory, layout)

    @property
    def extra(self) -> str:
        return self.layout.replace("_", "-") + (", NCHW" if self.memory == "map" else "")

    def lacks(self, provider: str) -> bool:
        """PyTorch's attentions give no statistics by which one softmax over both axes could be made of two."""
        return self.layout == "criss_cross" and provider.startswith(("sdpa", "flex"))

    def usual(self, attend: Attend) -> Attend:
        """Permute, attend, permute back, as lucidrains' axial-attention does; for "criss_cross" as CCNet does."""

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.layout == "criss_cross":
                return self.in_order(ccnet_attention(q, k, v))
            out = along(attend, q, k, v, self.axes[0])
            if len(self.axes) == 2:
                out = out + along(attend, q, k, v, self.axes[1])
            return self.in_order(out)

        return call

    def flex(self) -> Attend:
        from torch.nn.attention.flex_attention import flex_attention

        return self.usual(lambda q, k, v: flex_attention(q, k, v))

    def attnk(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None, backend: str | None = None) -> Tensor:
        axis, combine = ("both", self.layout) if len(self.axes) == 2 else (self.layout, "sum")
        return axial_attention(q, k, v, axis, combine=combine, bias_table=table, backend=backend)


def along(attend: Attend, q: Tensor, k: Tensor, v: Tensor, axis: str) -> Tensor:
    """Attention along one axis of maps (B, height, width, heads, D) by a function of (groups, heads, tokens, D)."""
    order = (0, 1, 3, 2, 4) if axis == "row" else (0, 2, 3, 1, 4)
    back = (0, 1, 3, 2, 4) if axis == "row" else (0, 3, 1, 2, 4)
    batch = (q.shape[0], q.shape[1 if axis == "row" else 2])
    q, k, v = (tensor.permute(order).flatten(0, 1) for tensor in (q, k, v))
    return attend(q, k, v).unflatten(0, batch).permute(back)


def ccnet_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One softmax over row and column: two matrix products, their logits side by side (CCNet)."""
    height = q.shape[1]
    rows, columns = (0, 1, 3, 2, 4), (0, 2, 3, 1, 4)
    q = q * q.shape[-1] ** -0.5
    of_row = q.permute(rows) @ k.permute(rows).mT  # (B, height, heads, width, width)
    of_column = q.permute(columns) @ k.permute(columns).mT  # (B, width, heads, height, height)
    centre = torch.eye(height, dtype=torch.bool, device=q.device)
    of_column = of_column.masked_fill(centre, -torch.inf).permute(0, 3, 2, 1, 4)
    weights = torch.cat([of_row, of_column], -1).softmax(-1)
    of_row, of_column = weights.split([q.shape[2], height], -1)
    from_row = (of_row @ v.permute(rows)).permute(0, 1, 3, 2, 4)
    return from_row + (of_column.permute(0, 3, 2, 1, 4) @ v.permute(columns)).permute(0, 3, 1, 2, 4)


# Tuning


def tuned_cases() -> list[AxialCase]:
    """What a sweep of the whole table goes through, as far as it has rows; windows have rows of their own."""
    rows = (
        ("map 56", "column", "bf16"),
        ("map 112", "column", "bf16"),
        ("map 56", "column", "fp32"),
        ("map 28", "column", "bf16"),
        ("map 14", "column", "bf16"),
    )
    cases = [AxialCase.named(*row, device="cuda") for row in rows]
    return [case for case in cases if case.table_config() is not None]


def tuned_case(options: argparse.Namespace) -> AxialCase:
    """The case that the command line of ``tune.py`` names."""
    sizes = (int(size) for size in (options.shape or "32x56x56x8x32").split("x"))
    return AxialCase("tuned", *sizes, options.dtype, "cuda", layout=options.extra or "row")


# The picture

CAPTION = (
    "tutorial: permute, matmul, softmax, matmul, permute back in eager PyTorch (criss-cross: CCNet's two products\n"
    "side by side); sdpa: the same with F.scaled_dot_product_attention. Below the bars: the map and the axis."
)


def panels(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of panels: the passes, then time and memory over the pixels of the map; on a GPU a pass each."""
    growth = [record for record in records if record.get("case") == GROWTH]
    rows = time_panels([record for record in records if record.get("case") != GROWTH])
    line = {"x": _pixels, "xlabel": "pixels of a square map (4 heads, D 32)", "exponent": True}
    times = {"title": "row + column, forward + backward: time", "column": "median_us", "unit": 1e-3, "ylabel": "ms"}
    memory = {"title": "row + column, forward + backward: memory held at once"}
    last = [
        {**panel, **line, "records": [record for record in growth if record["group"] == group]}
        for panel, group in ((times, "cpu"), (memory, "memory"))
    ]
    return [*rows, last]


def _pixels(record: dict[str, Any]) -> int:
    _, height, width, *_ = record["shape"].split("x")
    return int(height) * int(width)
