"""What sweeps of attention kernels share: each kernel's tile by itself, timed as that kernel's own launches."""

import dataclasses
from types import ModuleType
from typing import Any

import harness
import torch
from harness import Provider
from torch import Tensor


class TileTuning:
    """An operation's part of a sweep; what it tries, ``candidates(part, best)``, is left to its own class.

    Attributes:
        start: the table's tiles of the kernels that the case launches, by part.
    """

    def __init__(
        self, case: Any, module: ModuleType, chooser: str, config: type, kernels: dict[str, str], key: str, extra: str
    ) -> None:
        """Find which kernels the case launches.

        Args:
            case: what is swept.
            module: where the launchers are.
            chooser: the function there that chooses a configuration.
            config: class of the configurations; its fields are the parts.
            kernels: how the name of each part's kernel ends.
            key: of the table's row, as it is written.
            extra: the name of what has a gradient besides q, k and v.
        """
        self.case, self.config, self.kernels, self.key = case, config, kernels, key
        self._module, self._chooser = module, chooser
        self._names = ("out", "dq", "dk", "dv", f"d{extra}")
        self.inputs, self.dout = case.inputs()
        self.provider = Provider("attnk", case.attnk_kernels)
        table = case.table_config()
        self._tiles = {part: getattr(table, part) for part in kernels}
        with harness.captured_launches() as launches:
            self.results(self._tiles)
        launched = [name for name, _ in launches]
        self.start = {
            part: tile for part, tile in self._tiles.items() if any(name.endswith(kernels[part]) for name in launched)
        }

    def check(self) -> None:
        """Raise a WrongResult where what the table's configuration computes is wrong."""
        tutorial = self.case.providers(compiled=False)["tutorial"]
        harness.check(self.case, {"tutorial": tutorial, "attnk": self.provider}, self.inputs, self.dout)

    def results(self, values: dict[str, Any]) -> dict[str, Tensor]:
        """What is computed with a configuration."""
        torch.manual_seed(harness.SEED)
        config = self.config(**(self._tiles | values))
        with harness.replaced(self._module, self._chooser, lambda *args, **kwargs: config):
            out = self.provider.forward(self.inputs)
            grads = self.provider.backward(out, self.inputs, self.dout)
        return dict(zip(self._names, (out.detach(), *grads), strict=False))

    def works(self, part: str, values: dict[str, Any]) -> dict[str, harness.Work]:
        """What is timed of it: the launches of the part's kernel, with the arguments they had."""
        with harness.captured_launches() as launches:
            self.results(values)
        own = [launch for name, launch in launches if name.endswith(self.kernels[part])]

        def timed(_: Any) -> None:
            for launch in own:
                launch()

        return {part: (lambda: None, timed)}

    def row(self, values: dict[str, Any]) -> str:
        """The lines of the table that say it."""
        tiles = ", ".join(
            f"{part}={type(tile).__name__}({', '.join(map(str, dataclasses.astuple(tile)))})"
            for part, tile in (self._tiles | values).items()
        )
        name = self.config.__name__
        return f"{name.replace('Config', 'Row')}({self.key}, {name}(\n    {tiles},\n)),"
