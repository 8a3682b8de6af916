"""Softmax attention: bytes and memory counted, compilation, host overhead, and time on the CPU and on a GPU."""

import functools
from collections.abc import Callable
from typing import Any

import harness
import pytest
import reporting
import torch
import torch.nn.functional as F
from reporting import replayed
from softmax_attention_cases import GROWTH, PROVIDERS, AttentionCase, SelfAttentionCase
from torch import Tensor

from attnk.ops.softmax_attention import softmax_attention

OP = AttentionCase.op

# Of the tutorials' network at 224 x 224: its blocks 4 and 3.
MODULE_SHAPES = ((2, 784, 512), (1, 3136, 256))
QUICK_MODULE_SHAPES = ((1, 20, 32),)
DROPOUTS = (0.0, 0.1)

CPU_CASES = (
    ("ViT-B 224", ""),
    ("ViT-B 224", "bias"),
    ("ViT-B 224", "dropout"),
    ("ViT-B 384", ""),
    ("DINOv2 518", ""),
    ("SAM-B window", "table"),
    ("SAM-H window", "table"),
    ("VGG block 3", ""),
    ("cross-scale", ""),
)
QUICK_CPU_CASES = (
    *(AttentionCase("quick", 2, 2, 16, 16, 8, extra) for extra in ("", "bias", "table", "dropout")),
    AttentionCase("quick", 1, 2, 16, 5, 8),
)

GPU_COMPILED = 3  # cases that torch.compile and FlexAttention take part in
GPU_CASES = (  # the most telling first: a time box cuts off the last
    ("ViT-B 224", "", "bf16"),
    ("DINOv2 518", "", "bf16"),
    ("DINOv2 518", "bias", "bf16"),
    ("SAM-B window", "table", "bf16"),
    ("DINOv2 518", "", "fp32"),
    ("long", "", "bf16"),
    ("ViT-B 224", "bias", "bf16"),
    ("VGG block 3", "", "bf16"),
    ("cross-scale", "", "bf16"),
    ("ViT-B 224", "dropout", "bf16"),
    ("ViT-B 224", "", "fp32"),
    ("long, D 128", "", "bf16"),
    ("SAM-H window", "table", "bf16"),
    ("ViT-B 384", "", "bf16"),
    ("DINOv2 518", "bias", "fp32"),
    ("ViT-B 384", "bias", "bf16"),
    ("DINOv2 518", "table", "bf16"),
    ("VGG block 3", "dropout", "bf16"),
    ("VGG block 3", "", "fp32"),
    ("ViT-B 224", "", "fp16"),
    ("DINOv2 518", "", "fp16"),
    ("DINOv2 518", "bias", "fp16"),
    ("long", "dropout", "bf16"),
    ("cross-scale", "", "fp32"),
)

GROWTH_TOKENS = (1024, 2048, 4096, 8192, 16384)
QUICK_GROWTH_TOKENS = (16, 32)
QUADRATIC_LIMIT = 4096  # tokens for providers that hold N x N numbers

IO_CASES = tuple(AttentionCase("window", 2, 2, 196, 196, 32, extra) for extra in ("", "bias"))
QUICK_IO_CASES = tuple(AttentionCase("quick", 2, 2, 25, 25, 16, extra) for extra in ("", "bias"))

AOT_KINDS = ((64, "", "bf16"), (64, "bias", "bf16"), (64, "table", "bf16"), (80, "", "bf16"), (128, "", "bf16"),
             (64, "", "fp32"), (64, "dropout", "bf16"))  # fmt: skip


# overhead: the host's part of one call. Timing comes first, before a profiler or compiler has changed the process.


OVERHEAD_PASSES = ("forward", "forward, keeping for backward", "forward and backward")


@functools.lru_cache
def overheads(which: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a call on tokens so few that nothing but calls costs."""
    case = AttentionCase("tiny", 1, 2, 8, 8, 16)
    inputs, dout = case.inputs()
    keeps = which != "forward"
    plain = [tensor.detach() for tensor in inputs]

    def with_operators() -> None:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*plain)
        if which == "forward and backward":
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, *plain, out, lse, 0.0, False)

    def with_autograd(forward: Callable[..., Tensor]) -> Callable[[], None]:
        def call() -> None:
            with torch.set_grad_enabled(keeps):
                out = forward(*inputs)
            if which == "forward and backward":
                torch.autograd.grad(out, inputs, dout)

        return call

    calls = {
        "operators": with_operators,
        "attnk.softmax_attention": with_autograd(softmax_attention),
        "sdpa": with_autograd(F.scaled_dot_product_attention),
        "tutorial": with_autograd(case.tutorial),
    }
    return reporting.time_calls(calls, rounds)


@replayed
@pytest.mark.parametrize("threads", [1], indirect=True)  # waiting for a second thread is no work of the host's
@pytest.mark.parametrize("provider", ["operators", "attnk.softmax_attention", "sdpa", "tutorial"])
@pytest.mark.parametrize("which", OVERHEAD_PASSES)
def test_overhead(benchmark: Any, quick: bool, threads: int, which: str, provider: str) -> None:
    benchmark.group = f"overhead/{which}, attention of 8 tokens on the CPU, 1 thread"
    reporting.report_overhead(benchmark, OP, which, provider, overheads(which, 5 if quick else 40))


# cpu and gpu: time


def module_cases(quick: bool, device: str = "cpu") -> list[SelfAttentionCase]:
    shapes = QUICK_MODULE_SHAPES if quick else MODULE_SHAPES
    return [SelfAttentionCase(shape, dropout, device=device) for shape in shapes for dropout in DROPOUTS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    if metafunc.function is test_cpu_module:
        reporting.timed_cases(metafunc, module_cases(quick), ("forward", "training"), PROVIDERS["cpu"])
    elif metafunc.function is test_cpu:
        cases = QUICK_CPU_CASES if quick else [AttentionCase.named(*kind) for kind in CPU_CASES]
        names = [name for name in PROVIDERS["cpu"] if name != "torch.compile"]  # the module's cases show it
        reporting.timed_cases(metafunc, cases, ("forward", "training"), names)
    elif metafunc.function is test_gpu:
        cases = [AttentionCase.named(*kind, device="cuda") for kind in GPU_CASES]
        cases = cases[: 1 if quick or not torch.cuda.is_available() else None]
        reporting.compiled_cases.update(cases[:GPU_COMPILED])
        reporting.timed_cases(metafunc, cases, harness.PASSES, PROVIDERS["cuda"])


@replayed
@pytest.mark.usefixtures("threads")
def test_cpu_module(benchmark: Any, quick: bool, case: SelfAttentionCase, which: str, provider: str) -> None:
    reporting.time_one(benchmark, case, which, provider, not quick, budget=0.2 if quick else 5)


@replayed
@pytest.mark.usefixtures("threads")
def test_cpu(benchmark: Any, quick: bool, case: AttentionCase, which: str, provider: str) -> None:
    reporting.time_one(benchmark, case, which, provider, compiled=False, budget=0.2 if quick else 2.5)


@pytest.mark.gpu
@replayed
def test_gpu(benchmark: Any, quick: bool, case: AttentionCase, which: str, provider: str) -> None:
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
@pytest.mark.parametrize("provider", ["tutorial", "sdpa", "attnk"])
@pytest.mark.parametrize("which", ["forward", "training"])
def test_memory(benchmark: Any, quick: bool, which: str, provider: str) -> None:
    benchmark.group = f"memory/SelfAttention {which} (counted: see the table at the end, this is the time it took)"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in module_cases(quick, device):
        if not (case.random and which == "forward"):
            reporting.report_memory(benchmark, case, provider, which)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("provider", ["tutorial", "sdpa", "attnk"])
@pytest.mark.parametrize("extra", ["", "dropout"])
def test_memory_growth(benchmark: Any, quick: bool, extra: str, provider: str) -> None:
    """What forward and backward hold over the number of tokens: that of attnk must not grow with its square."""
    benchmark.group = f"memory/{GROWTH} {extra} (counted: see the table at the end, this is the time it took)"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = "sdpa efficient" if (provider, device) == ("sdpa", "cuda") else provider  # the one that takes float32
    peaks = []
    for tokens in QUICK_GROWTH_TOKENS if quick else GROWTH_TOKENS:
        squares = provider == "tutorial" or (provider == "sdpa" and extra == "dropout" and device == "cpu")
        if squares and tokens > QUADRATIC_LIMIT:
            continue
        case = AttentionCase(GROWTH, 1, 1, tokens, tokens, 64, extra, device=device)
        peaks.append(reporting.report_memory(benchmark, case, chosen, "training"))
    if provider == "attnk" and not quick:
        assert peaks[-1] < 2.5 * peaks[-2], f"twice the tokens hold {peaks[-1] / peaks[-2]:.1f} times as much"


# aot: what compiling shows


@functools.lru_cache
def launches(head_dim: int, extra: str, dtype: str, architecture: str) -> tuple[Any, ...]:
    """Every kernel of forward and backward once, with the architecture's configuration."""
    from attnk.kernels.softmax_attention import common

    from attnk import dispatch
    from attnk.testing import record_launches

    case = AttentionCase("aot", 2, 4, 196, 196, head_dim, extra, dtype)
    inputs, dout = case.inputs()
    with (
        harness.replaced(dispatch, "no_kernel_here", lambda x: None),  # nothing will run
        harness.replaced(common, "architecture", lambda device: architecture),
        record_launches() as recorded,
    ):
        out = case.attnk_kernels(*inputs)
        torch.autograd.grad(out, inputs, dout)
    return tuple({launch.name: launch for launch in recorded}.values())


@pytest.mark.parametrize("architecture", reporting.ARCHITECTURES)
@pytest.mark.parametrize(("head_dim", "extra", "dtype"), AOT_KINDS)
def test_aot(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, quick: bool, head_dim: int, extra: str, dtype: str,
    architecture: str,
) -> None:  # fmt: skip
    benchmark.group = f"aot/D {head_dim} {extra} {dtype} (time to compile all kernels)"
    reporting.needs_compiler()
    if quick and (architecture, head_dim, extra, dtype) != ("sm_90", *AOT_KINDS[0]):
        pytest.skip("--quick")
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    chosen = launches(head_dim, extra, dtype, architecture)[: 1 if quick else None]
    fields = {"case": f"D {head_dim}", "dtype": dtype, "extra": extra}
    reporting.report_aot(benchmark, OP, chosen, architecture, **fields)
