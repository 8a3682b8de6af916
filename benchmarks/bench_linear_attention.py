"""Linear attention: bytes and memory counted, compilation, host overhead, and time on the CPU and on a GPU."""

import functools
from collections.abc import Callable
from typing import Any

import harness
import pytest
import reporting
import torch
from linear_attention_cases import GROWTH, PROVIDERS, LinearCase
from reporting import replayed
from torch import Tensor

from attnk.ops.linear_attention import linear_attention

OP = LinearCase.op

CPU_CASES = (
    ("SANA 1024", "relu"),
    ("SANA 1024", "relu", "map"),
    ("EfficientViT-L 512", "relu"),
    ("EfficientViT-B 224", "relu", "map"),
    ("SANA 1024", "elu"),
    ("efficient attention 128", "softmax", "map"),
    ("SANA 1024", "softmax"),
)
QUICK_CPU_CASES = tuple(
    LinearCase("quick", 2, 2, 16, 8, feature_map, layout=layout)
    for feature_map, layout in (("relu", "tokens"), ("elu", "map"), ("softmax", "tokens"))
)

GPU_COMPILED = 1  # cases that torch.compile and FlexAttention take part in
GPU_CASES = (  # the most telling first: a time box cuts off the last
    ("SANA 1024", "relu", "bf16"),
    ("efficient attention 128", "softmax", "bf16"),
    ("SANA 4096", "relu", "bf16"),
    ("heads of 128", "elu", "bf16"),
    ("SANA 1024", "relu", "fp32"),
    ("EfficientViT-L 512", "relu", "bf16"),
    ("EfficientViT-B 224", "relu", "bf16"),
    ("SANA 1024", "elu", "bf16"),
    ("efficient attention 128", "softmax", "fp32"),
    ("heads of 128", "relu", "fp32"),
    ("SANA 1024", "relu", "fp16"),
)
GPU_MAPS = (("SANA 1024", "relu", "bf16"), ("efficient attention 128", "softmax", "bf16"))

GROWTH_TOKENS = (1024, 4096, 16384, 65536)
QUICK_GROWTH_TOKENS = (16, 32)

IO_CASES = tuple(LinearCase("maps", 1, 2, 3136, 32, feature_map) for feature_map in ("relu", "softmax"))
QUICK_IO_CASES = tuple(LinearCase("quick", 2, 2, 25, 16, feature_map) for feature_map in ("relu", "softmax"))

AOT_KINDS = tuple(
    (head_dim, feature_map, dtype)
    for head_dim in (32, 64, 128)
    for feature_map, dtype in (("relu", "bf16"), ("softmax", "bf16"), ("elu", "fp32"))
)


# overhead: the host's part of one call. Timing comes first, before a profiler or compiler has changed the process.


OVERHEAD_PASSES = ("forward", "forward, keeping for backward", "forward and backward")


@functools.lru_cache
def overheads(which: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a call on tokens so few that nothing but calls costs."""
    from attnk.fallback import linear_attention as fallback

    case = LinearCase("tiny", 1, 2, 8, 16)
    inputs, dout = case.inputs()
    keeps = which != "forward"
    plain = [tensor.detach() for tensor in inputs]

    def with_operators() -> None:
        _, *kept = fallback.linear_attention_forward(*plain, "relu", 1e-15)
        if which == "forward and backward":
            fallback.linear_attention_backward(dout, *plain, *kept, "relu", 1e-15, True, True)

    def with_autograd(forward: Callable[..., Tensor]) -> Callable[[], None]:
        def call() -> None:
            with torch.set_grad_enabled(keeps):
                out = forward(*inputs)
            if which == "forward and backward":
                torch.autograd.grad(out, inputs, dout)

        return call

    calls = {
        "operators": with_operators,
        "attnk.linear_attention": with_autograd(linear_attention),
        "tutorial": with_autograd(case.tutorial),
    }
    return reporting.time_calls(calls, rounds)


@replayed
@pytest.mark.parametrize("threads", [1], indirect=True)  # waiting for a second thread is no work of the host's
@pytest.mark.parametrize("provider", ["operators", "attnk.linear_attention", "tutorial"])
@pytest.mark.parametrize("which", OVERHEAD_PASSES)
def test_overhead(benchmark: Any, quick: bool, threads: int, which: str, provider: str) -> None:
    benchmark.group = f"overhead/{which}, linear attention of 8 tokens on the CPU, 1 thread"
    reporting.report_overhead(benchmark, OP, which, provider, overheads(which, 5 if quick else 40))


# cpu and gpu: time


def cpu_cases(quick: bool) -> list[LinearCase]:
    if quick:
        return list(QUICK_CPU_CASES)
    return [
        LinearCase.named(name, feature_map, layout=layout[0] if layout else "tokens")
        for name, feature_map, *layout in CPU_CASES
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    if metafunc.function is test_cpu:
        reporting.timed_cases(metafunc, cpu_cases(quick), ("forward", "training"), PROVIDERS["cpu"])
    elif metafunc.function is test_gpu:
        cases = [LinearCase.named(*kind, device="cuda") for kind in GPU_CASES]
        cases += [LinearCase.named(*kind, device="cuda", layout="map") for kind in GPU_MAPS]
        cases = cases[: 1 if quick or not torch.cuda.is_available() else None]
        reporting.compiled_cases.update(cases[:GPU_COMPILED])
        reporting.timed_cases(metafunc, cases, harness.PASSES, PROVIDERS["cuda"])


@replayed
@pytest.mark.usefixtures("threads")
def test_cpu(benchmark: Any, quick: bool, case: LinearCase, which: str, provider: str) -> None:
    reporting.time_one(benchmark, case, which, provider, not quick, budget=0.2 if quick else 2.5)


@pytest.mark.gpu
@replayed
def test_gpu(benchmark: Any, quick: bool, case: LinearCase, which: str, provider: str) -> None:
    compiled = not quick and case in reporting.compiled_cases  # compiling takes longer than all the rest
    reporting.time_one(benchmark, case, which, provider, compiled, budget=0.3)


# io: bytes


@pytest.mark.parametrize("provider", ["tutorial", "torch.compile", "attnk"])
@pytest.mark.parametrize("number", range(len(IO_CASES)))
def test_io(benchmark: Any, quick: bool, number: int, provider: str) -> None:
    case = (QUICK_IO_CASES if quick else IO_CASES)[number]
    benchmark.group = f"io/{case} (counted: bytes stand in the table at the end, this is the time it took to count)"
    found = reporting.report_io(benchmark, case, provider, quick)
    if provider == "attnk":
        for which, moved in found["attnk"].items():
            formula = case.kernel_bytes(which, "attnk")
            assert moved == formula, f"{which}: {moved} bytes, by the formula {formula}"


# memory: the peak of what is allocated


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("provider", ["tutorial", "attnk"])
@pytest.mark.parametrize("which", ["forward", "training"])
def test_memory(benchmark: Any, quick: bool, which: str, provider: str) -> None:
    benchmark.group = f"memory/linear attention {which} (counted: see the table at the end, this is the time it took)"
    for case in cpu_cases(quick):
        reporting.report_memory(benchmark, case, provider, which)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("provider", ["tutorial", "attnk"])
def test_memory_growth(benchmark: Any, quick: bool, provider: str) -> None:
    """What forward and backward hold over the number of tokens: that of attnk grows with it."""
    benchmark.group = f"memory/{GROWTH} (counted: see the table at the end, this is the time it took)"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peaks = [
        reporting.report_memory(
            benchmark, LinearCase(GROWTH, 1, 1, tokens, 64, device=device), provider, "training"
        )
        for tokens in (QUICK_GROWTH_TOKENS if quick else GROWTH_TOKENS)
    ]  # fmt: skip
    if provider == "attnk" and not quick:
        assert peaks[-1] < 4.5 * peaks[-2], f"four times the tokens hold {peaks[-1] / peaks[-2]:.1f} times as much"


# aot: what compiling shows


@functools.lru_cache
def launches(head_dim: int, feature_map: str, dtype: str, architecture: str) -> tuple[Any, ...]:
    """Every kernel of forward and backward once, with the architecture's configuration."""
    from attnk.kernels import linear_attention as kernels

    from attnk import dispatch
    from attnk.testing import record_launches

    case = LinearCase("aot", 2, 4, 4096, head_dim, feature_map, dtype)
    inputs, dout = case.inputs()
    with (
        harness.replaced(dispatch, "no_kernel_here", lambda x: None),  # nothing will run
        harness.replaced(kernels, "architecture", lambda device: architecture),
        record_launches() as recorded,
    ):
        out = case.attnk_kernels(*inputs)
        torch.autograd.grad(out, inputs, dout)
    return tuple({launch.name: launch for launch in recorded}.values())


@pytest.mark.parametrize("architecture", reporting.ARCHITECTURES)
@pytest.mark.parametrize(("head_dim", "feature_map", "dtype"), AOT_KINDS)
def test_aot(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, quick: bool, head_dim: int, feature_map: str, dtype: str,
    architecture: str,
) -> None:  # fmt: skip
    benchmark.group = f"aot/D {head_dim} {feature_map} {dtype} (time to compile all kernels)"
    reporting.needs_compiler()
    if quick and (architecture, head_dim, feature_map, dtype) != ("sm_90", *AOT_KINDS[0]):
        pytest.skip("--quick")
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    chosen = launches(head_dim, feature_map, dtype, architecture)[: 1 if quick else None]
    fields = {"case": f"D {head_dim}", "dtype": dtype, "extra": feature_map}
    reporting.report_aot(benchmark, OP, chosen, architecture, **fields)
