"""The channel gate (SE, CBAM's channel half): bytes, memory, compilation, host overhead, time on a CPU and a GPU."""

from channel_gate_cases import ChannelGateCase as GATE
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
