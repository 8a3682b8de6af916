"""Window attention's cases, and who computes them: the usual code of Swin, PyTorch's attentions, and attnk."""

import argparse
import dataclasses
from typing import Any, ClassVar

import torch
from group_attention_cases import PROVIDERS, Attend, GroupCase, Tuning, time_panels
from torch import Tensor

from attnk.groups import group_places
from attnk.ops.group_attention import window_attention
from attnk.reference.softmax_attention import relative_position_index

__all__ = ["CAPTION", "PROVIDERS", "TITLE", "Tuning", "WindowCase", "panels", "tuned_case", "tuned_cases"]

TITLE = "Window attention"
MASKED = -100.0  # added by the published code to the logits of tokens that a shift made neighbours

# By name: batch on a GPU and on a CPU, height, width, heads, head dim. Stages at 224 x 224; at batch 128 the first of
# Swin has 8192 windows of 49.
SHAPES = {
    **{f"Swin-T, {side}": (128, max(1, 56 // side), side, side, 3 * 56 // side, 32) for side in (56, 28, 14, 7)},
    **{f"Swin-B, {side}": (128, max(1, 56 // side), side, side, 4 * 56 // side, 32) for side in (56, 28, 14, 7)},
    **{f"MaxViT-T, {side}": (128, max(1, 56 // side), side, side, 2 * 56 // side, 32) for side in (56, 28, 14, 7)},
}


@dataclasses.dataclass(frozen=True)
class WindowCase(GroupCase):
    """Attention inside windows, with a bias table by relative position unless it is said not to have one.

    Attributes:
        window: tokens along a window's side.
        shift: by how much windows lie further down and right.
        dilation: steps between the tokens of a window.
        table: whether there is a bias table.
        others: as in GroupCase.
    """

    op: ClassVar[str] = "window_attention"
    layout: ClassVar[str] = "window"

    window: int = 7
    shift: int = 0
    dilation: int = 1
    table: bool = True

    @classmethod
    def named(
        cls, name: str, kind: str = "", dtype: str = "fp32", device: str = "cpu", *, table: bool = True
    ) -> "WindowCase":
        """A case of SHAPES; ``kind`` is "" for windows side by side, "shift" or "grid", which spans the map."""
        gpu_batch, cpu_batch, height, *sizes = SHAPES[name]
        shift, dilation = 3 if kind == "shift" else 0, height // 7 if kind == "grid" else 1
        batch = cpu_batch if device == "cpu" else gpu_batch
        return cls(name, batch, height, *sizes, dtype, device, shift=shift, dilation=dilation, table=table)

    @property
    def geometry(self) -> dict[str, Any]:
        return {name: (getattr(self, name),) * 2 for name in ("window", "shift", "dilation")}

    @property
    def entries(self) -> int:
        return (2 * self.window - 1) ** 2 if self.table else 0

    @property
    def extra(self) -> str:
        kind = "shift" if self.shift else "grid" if self.dilation > 1 else ""
        return ", ".join(filter(None, (kind, "table" if self.table else "")))

    def usual(self, attend: Attend) -> Attend:
        """Roll, cut windows out, attend with a bias for every window, put them together, roll back: Swin as in timm."""
        index, mask = self._index(), self._mask()

        def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
            bias = None if table is None else self._dense(table, index)
            if mask is not None:
                apart = mask.repeat(self.batch, 1, 1).unsqueeze(1).to(q.dtype)
                bias = apart if bias is None else bias + apart
            return self._joined(attend(*(self._windows(tensor) for tensor in (q, k, v)), bias))

        return call

    def flex(self) -> Attend:
        """The same copies; table and parts of the shifted map are read as FlexAttention goes."""
        from torch.nn.attention.flex_attention import flex_attention

        window, groups = self.window, self.group("window")[0]
        parts = self._parts_of_map() if self.shift else None

        def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
            def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                if table is not None:
                    down, right = i // window - j // window + window - 1, i % window - j % window + window - 1
                    score = score + table[down * (2 * window - 1) + right, h]
                if parts is not None:
                    score = torch.where(parts[b % groups, i] == parts[b % groups, j], score, score + MASKED)
                return score

            changed = score_mod if self.entries or self.shift else None
            return self._joined(flex_attention(*(self._windows(x) for x in (q, k, v)), score_mod=changed))

        return call

    def attnk(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None, backend: str | None = None) -> Tensor:
        return window_attention(q, k, v, **self.geometry, bias_table=table, mask_value=MASKED, backend=backend)

    def _index(self) -> Tensor | None:
        """What an entry of the table is for each pair of tokens, as the published modules keep it."""
        return relative_position_index(self.window, self.window, torch.device(self.device)) if self.table else None

    def _parts_of_map(self) -> Tensor:
        """Which part of the shifted map each token of each window comes from."""
        window, shift, dilation = self.geometry.values()
        return group_places(self.height, self.width, window, shift, dilation, torch.device(self.device))[1]

    def _mask(self) -> Tensor | None:
        """The mask (windows, tokens, tokens) that is added, as the published modules keep it."""
        if not self.shift:
            return None
        parts = self._parts_of_map()
        return (parts[:, :, None] != parts[:, None, :]) * MASKED

    def _dense(self, table: Tensor, index: Tensor) -> Tensor:
        tokens = self.window**2
        return table[index].view(tokens, tokens, self.heads).permute(2, 0, 1).contiguous().unsqueeze(0)

    def _windows(self, tensor: Tensor) -> Tensor:
        """(B, height, width, heads, D) as (windows, heads, tokens, D), copied."""
        if self.shift:
            tensor = tensor.roll((-self.shift, -self.shift), (1, 2))
        cut = tensor.unflatten(2, (-1, self.window, self.dilation)).unflatten(1, (-1, self.window, self.dilation))
        return cut.permute(0, 1, 3, 4, 6, 7, 2, 5, 8).flatten(6, 7).flatten(0, 4)

    def _joined(self, out: Tensor) -> Tensor:
        """(windows, heads, tokens, D) as (B, height, width, heads, D), copied."""
        reach = self.window * self.dilation
        down, right = self.height // reach, self.width // reach
        cut = out.unflatten(2, (self.window, self.window))
        cut = cut.unflatten(0, (self.batch, down, self.dilation, right, self.dilation))
        whole = self.in_order(cut.permute(0, 1, 6, 2, 3, 7, 4, 5, 8).flatten(4, 6).flatten(1, 3))
        return whole.roll((self.shift, self.shift), (1, 2)) if self.shift else whole


# Tuning


def tuned_cases() -> list[WindowCase]:
    """What a sweep of the whole table goes through, as far as it has rows."""
    rows = (("Swin-T, 56", "shift", "bf16"), ("Swin-T, 56", "shift", "fp32"))
    cases = [WindowCase.named(*row, device="cuda") for row in rows]
    return [case for case in cases if case.table_config() is not None]


def tuned_case(options: argparse.Namespace) -> WindowCase:
    """The case that the command line of ``tune.py`` names: windows of 7 x 7."""
    sizes = (int(size) for size in (options.shape or "128x56x56x3x32").split("x"))
    shift = 3 if options.extra in ("shift", "shift, table") else 0
    return WindowCase("tuned", *sizes, options.dtype, "cuda", shift=shift, table=options.extra.endswith("table"))


# The picture

CAPTION = (
    "tutorial: roll, cut windows, matmul, bias and mask, softmax, matmul, join, roll back in eager PyTorch (timm's\n"
    "Swin, of projected maps: the module copies x instead of q, k and v); sdpa: with F.scaled_dot_product_attention."
)


def panels(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of panels: a pass each."""
    return time_panels(records)
