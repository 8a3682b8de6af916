"""The coordinate gate with its network: bytes, memory, compilation, host overhead, time on a CPU and on a GPU."""

from coordinate_gate_cases import CoordinateGateCase as GATE
from gate_benchmarks import pytest_generate_tests, test_aot, test_cpu, test_gpu, test_io, test_memory, test_overhead

__all__ = [
    "GATE",
    "pytest_generate_tests",
    "test_aot",
    "test_cpu",
    "test_gpu",
    "test_io",
    "test_memory",
    "test_overhead",
]
