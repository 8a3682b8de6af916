"""How attnk checks itself, for those who add an operation or embed one: parity, layouts, a byte meter, compilation.

- ``assert_matches_reference``: values and gradients against a float64 oracle, with the one tolerance of the project.
- ``layouts``: one tensor in every memory layout an operation must take.
- ``Meter``: counts the bytes of kernels run by the Triton interpreter, and catches stray, racing and overflowing ones.
- ``record_launches``, ``compile_launch``: compile what a call would launch, for any architecture, without a device.
"""

from attnk.testing.ahead import ARCHITECTURES, Compiled, Launch, compile_launch, record_launches
from attnk.testing.meter import KernelBytes, Meter
from attnk.testing.parity import assert_matches_reference, layouts

__all__ = [
    "ARCHITECTURES",
    "Compiled",
    "KernelBytes",
    "Launch",
    "Meter",
    "assert_matches_reference",
    "compile_launch",
    "layouts",
    "record_launches",
]
