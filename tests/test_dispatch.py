"""The backend policy: who is asked, who runs, and what is said about it."""

import os
import re
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnk
from attnk import dispatch

TOO_WIDE = "the kernels take a kernel size up to 15, got 17"


def tensors(device="cpu", kernel_size=7):
    return torch.ones(2, 4, 6, 5, device=device), torch.ones(1, 2, kernel_size, kernel_size, device=device)


def chosen(**options):
    return attnk.explain("spatial_gate", *tensors(), **options).backend


@pytest.fixture
def gpu_tensors():
    """Makes tensors that say they lie on a GPU, which need not exist."""
    with FakeTensorMode():
        yield lambda kernel_size=7: tensors("cuda", kernel_size)


@pytest.fixture
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())


def run(code, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_auto_on_a_cpu_is_torch_and_silent(fresh_warnings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explanation = attnk.explain("spatial_gate", *tensors())
        attnk.spatial_gate(*tensors())
        attnk.spatial_gate(*tensors(kernel_size=17), backend="auto")
    assert (explanation.backend, explanation.reason, explanation.config) == ("torch", "x lies on the CPU", None)


def test_use_backend_nests_and_restores():
    assert chosen() == "torch"
    with attnk.use_backend("reference"):
        assert chosen() == "reference"
        with attnk.use_backend("torch"):
            assert chosen() == "torch"
            with attnk.use_backend("auto"):
                assert attnk.explain("spatial_gate", *tensors()).reason == "x lies on the CPU"
            assert attnk.explain("spatial_gate", *tensors()).reason == "asked for"
        assert chosen() == "reference"
    assert attnk.explain("spatial_gate", *tensors()).reason == "x lies on the CPU"


def test_use_backend_restores_after_an_exception():
    with pytest.raises(KeyError), attnk.use_backend("reference"):
        raise KeyError
    assert chosen() == "torch"
    with pytest.raises(ValueError, match="backend must be one of"), attnk.use_backend("reference"):
        attnk.use_backend("cuda").__enter__()
    assert chosen() == "torch"


def test_use_backend_decorates():
    assert attnk.use_backend("reference")(chosen)() == "reference"
    assert chosen() == "torch"


def test_a_call_overrules_the_ambient_choice():
    with attnk.use_backend("reference"):
        assert chosen(backend="torch") == "torch"
        assert chosen(backend="auto") == "torch"
        assert chosen(backend=None) == "reference"


def test_the_ambient_choice_holds_in_every_thread():
    seen = []
    with attnk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_the_ambient_choice_runs():
    """Only the definition can be differentiated twice."""
    x, weight = tensors()
    x.requires_grad_()
    with attnk.use_backend("reference"):
        (dx,) = torch.autograd.grad(attnk.spatial_gate(x, weight).sum(), x, create_graph=True)
    dx.sum().backward()
    (dx,) = torch.autograd.grad(attnk.spatial_gate(x, weight).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        dx.sum().backward()


def test_torch_compile_guards_on_the_ambient_choice():
    graphs = []

    def remember(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    function = torch.compile(lambda x, weight: attnk.spatial_gate(x, weight), backend=remember, fullgraph=True)
    function(*tensors())
    with attnk.use_backend("reference"):
        function(*tensors())
    function(*tensors())
    assert len(graphs) == 2
    assert "attnk.spatial_gate_infer" in graphs[0]
    assert "conv2d" not in graphs[0]
    assert "conv2d" in graphs[1]
    assert "attnk" not in graphs[1]
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["cuda", "", "Triton", 1])
def test_unknown_backend(backend):
    words = f"backend must be one of 'auto', 'triton', 'torch', 'reference', got {backend!r}"
    with pytest.raises(ValueError, match=words):
        attnk.spatial_gate(*tensors(), backend=backend)
    with pytest.raises(ValueError, match=words):
        attnk.explain("spatial_gate", *tensors(), backend=backend)
    with pytest.raises(ValueError, match=words), attnk.use_backend(backend):
        pass
    with pytest.raises(ValueError, match=words):
        attnk.SpatialAttention(backend=backend)


EXPLAIN = "import torch, attnk; print(attnk.explain('spatial_gate', torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3)))"


def test_environment_chooses():
    process = run(EXPLAIN, ATTNK_BACKEND="reference")
    assert process.stdout == "spatial_gate: reference\n  reason: asked for\n", process.stderr


def test_a_block_overrules_the_environment():
    code = f"import attnk\nwith attnk.use_backend('auto'):\n    {EXPLAIN}\nprint(attnk.dispatch._ambient)"
    process = run(code, ATTNK_BACKEND="triton")
    assert process.stdout == "spatial_gate: torch\n  reason: x lies on the CPU\ntriton\n", process.stderr


def test_environment_with_an_unknown_backend():
    process = run("import attnk", ATTNK_BACKEND="tritn")
    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert last == "ValueError: ATTNK_BACKEND must be one of auto, triton, torch, reference, got 'tritn'"


def test_triton_never_falls_back(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    words = "^spatial_gate: x lies on the CPU, and Triton kernels need a GPU$"
    for call in (
        lambda: attnk.spatial_gate(*tensors(), backend="triton"),
        lambda: attnk.explain("spatial_gate", *tensors(), backend="triton"),
        lambda: attnk.SpatialAttention(backend="triton")(tensors()[0]),
    ):
        with pytest.raises(attnk.Unsupported, match=words):
            call()
    with attnk.use_backend("triton"), pytest.raises(attnk.Unsupported, match=words):
        attnk.spatial_gate(*tensors())
    assert issubclass(attnk.Unsupported, RuntimeError)


def test_triton_on_a_cpu_without_the_interpreter():
    code = "import torch, attnk; attnk.spatial_gate(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3), backend='triton')"
    process = run(code, TRITON_INTERPRET="0")
    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert last == "attnk.dispatch.Unsupported: spatial_gate: x lies on the CPU, and Triton kernels need a GPU"


def test_triton_with_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    explanation = attnk.explain("spatial_gate", *tensors(), backend="triton")
    assert (explanation.backend, explanation.reason) == ("triton", "asked for")
    assert chosen() == "torch"
    with pytest.raises(attnk.Unsupported, match=f"spatial_gate: {TOO_WIDE}"):
        attnk.spatial_gate(*tensors(kernel_size=17), backend="triton")


def test_auto_on_a_gpu(gpu_tensors):
    x, weight = gpu_tensors()
    explanation = attnk.explain("spatial_gate", x, weight)
    assert (explanation.backend, explanation.reason) == ("triton", "the kernels support this call")
    from attnk.kernels.tuning import architecture, spatial_gate_config

    config = spatial_gate_config(architecture(x.device), itemsize=4, pixels=30, channels_last=False)
    assert explanation.config is config
    assert str(explanation) == (
        f"spatial_gate: triton\n  reason: the kernels support this call\n  configuration: {config}"
    )
    x = x.to(memory_format=torch.channels_last)
    config = spatial_gate_config(architecture(x.device), itemsize=4, pixels=30, channels_last=True)
    assert attnk.explain("spatial_gate", x, weight).config is config
    image = torch.empty_strided((4, 6, 5), (1, 20, 4), device="cuda")
    assert attnk.explain("spatial_gate", image, weight).config is config


def test_auto_on_a_gpu_warns_once_for_each_reason(gpu_tensors, fresh_warnings, monkeypatch):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kernel_size in (17, 17, 19, 19, 7, 17):
            out = attnk.spatial_gate(*gpu_tensors(kernel_size))
    assert (out.shape, out.device.type) == ((2, 4, 6, 5), "cuda")
    words = "attnk.spatial_gate runs in plain PyTorch: the kernels take a kernel size up to 15, got"
    assert [str(warning.message) for warning in caught] == [f"{words} 17", f"{words} 19"]
    monkeypatch.setattr(dispatch, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attnk.spatial_gate(*gpu_tensors(17), backend="torch")
        attnk.spatial_gate(*gpu_tensors(17), backend="reference")
        with attnk.use_backend("torch"):
            attnk.spatial_gate(*gpu_tensors(17))


def test_the_warning_points_at_the_call(gpu_tensors, fresh_warnings):
    with pytest.warns(UserWarning, match=TOO_WIDE) as caught:
        attnk.spatial_gate(*gpu_tensors(17))
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("ignore:attnk.spatial_gate runs in plain PyTorch")
def test_explain_says_what_a_gpu_would_do(gpu_tensors):
    explanation = attnk.explain("spatial_gate", *gpu_tensors(17))
    assert (explanation.backend, explanation.reason, explanation.config) == ("torch", TOO_WIDE, None)
    assert str(explanation) == f"spatial_gate: torch\n  reason: {TOO_WIDE}"


def attention_tensors(tokens=1024, head_dim=128, dtype=torch.bfloat16):
    return [torch.empty(1, 2, tokens, head_dim, dtype=dtype, device="cuda") for _ in range(3)]


def test_attention_goes_where_it_was_measured_to_be_faster(gpu_tensors, monkeypatch):
    from attnk.kernels import tuning

    row = tuning.SdpaRow(itemsize=2, head_dim=128, tokens=1024, source="results/some-gpu/bench.json")
    monkeypatch.setitem(tuning.SDPA_TABLE, "default", (row,))

    def answer(*tensors, **options):
        explanation = attnk.explain("softmax_attention", *tensors, **options)
        return explanation.backend, explanation.reason

    words = "PyTorch's own attention is faster here (results/some-gpu/bench.json)"
    assert answer(*attention_tensors()) == ("torch", words)
    assert answer(*attention_tensors(), is_causal=True) == ("torch", words)
    assert answer(*attention_tensors(tokens=1023))[0] == "triton"
    assert answer(*attention_tensors(head_dim=64))[0] == "triton"
    assert answer(*attention_tensors(dtype=torch.float32))[0] == "triton"
    assert answer(*attention_tensors(), backend="triton") == ("triton", "asked for")
    for extra in (
        {"dropout_p": 0.1},
        {"return_lse": True},
        {"bias": torch.empty(1024, 1024, device="cuda")},
        {"mask": torch.empty(1, 1, 1, 1024, dtype=torch.bool, device="cuda")},
    ):
        assert answer(*attention_tensors(), **extra)[0] == "triton"
    monkeypatch.setattr(tuning, "SDPA_TABLE", {})
    assert answer(*attention_tensors()) == ("triton", "the kernels support this call")


def test_handing_over_is_silent(gpu_tensors, fresh_warnings, monkeypatch):
    from attnk.kernels import tuning

    row = tuning.SdpaRow(itemsize=2, head_dim=128, tokens=1024, source="results/some-gpu/bench.json")
    monkeypatch.setitem(tuning.SDPA_TABLE, "default", (row,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = attnk.softmax_attention(*attention_tensors())
    assert (out.shape, out.device.type) == ((1, 2, 1024, 128), "cuda")


@pytest.mark.filterwarnings("ignore:attnk.softmax_attention runs in plain PyTorch")
def test_heads_too_wide_for_the_kernels(gpu_tensors):
    explanation = attnk.explain("softmax_attention", *attention_tensors(head_dim=264))
    assert (explanation.backend, explanation.reason) == (
        "torch",
        "the kernels take a head dimension up to 256, got 264",
    )


def test_float64_heads_too_wide_for_the_kernels(gpu_tensors):
    for head_dim, backend in ((128, "triton"), (129, "torch")):
        tensors = attention_tensors(head_dim=head_dim, dtype=torch.float64)
        assert attnk.explain("softmax_attention", *tensors).backend == backend
    with pytest.raises(attnk.Unsupported, match="up to 128 in float64, got 129"):
        attnk.explain("softmax_attention", *tensors, backend="triton")


def test_explain_does_not_warn(gpu_tensors, fresh_warnings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attnk.explain("spatial_gate", *gpu_tensors(17))
    with pytest.warns(UserWarning, match=TOO_WIDE):  # nor does it swallow the warning of the call
        attnk.spatial_gate(*gpu_tensors(17))


def test_an_old_gpu(gpu_tensors, fresh_warnings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    reason = "the kernels need compute capability 8.0 (Ampere) or later"
    assert dispatch.no_kernel_here(gpu_tensors()[0]) == reason
    with pytest.raises(attnk.Unsupported, match=r"Ampere"):
        attnk.explain("spatial_gate", *gpu_tensors(), backend="triton")
    with pytest.warns(UserWarning, match="Ampere"):
        attnk.spatial_gate(*gpu_tensors())
    monkeypatch.setattr(dispatch, "_capability", lambda device: (8, 0))
    assert dispatch.no_kernel_here(gpu_tensors()[0]) is None


def test_another_device():
    assert dispatch.no_kernel_here(torch.empty(1, device="meta")) == "no kernel for devices of type 'meta'"


def test_without_triton(gpu_tensors, fresh_warnings, monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    reason = "triton is not installed (pip install attnk[triton])"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "torch"
    with pytest.raises(attnk.Unsupported) as caught:
        attnk.spatial_gate(*tensors(), backend="triton")
    assert str(caught.value) == f"spatial_gate: {reason}"
    with pytest.warns(UserWarning, match=re.escape(f"attnk.spatial_gate runs in plain PyTorch: {reason}")):
        attnk.spatial_gate(*gpu_tensors())
    with pytest.raises(attnk.Unsupported):
        attnk.explain("spatial_gate", *gpu_tensors(), backend="triton")


def test_explain_takes_what_the_call_takes():
    x, weight = tensors()
    options = {"order": "max_avg", "output": "map", "ties": "even", "backend": "reference"}
    assert attnk.explain("spatial_gate", x, weight, torch.ones(1), **options).backend == "reference"
    with pytest.raises(ValueError, match="order must be one of"):
        attnk.explain("spatial_gate", x, weight, order="max")
    with pytest.raises(ValueError, match="weight must be"):
        attnk.explain("spatial_gate", x, weight[:, :1])


def test_explain_computes_nothing():
    with FakeTensorMode():
        x, weight = torch.empty(2**20, 2**10, 2**10, 2**10), torch.empty(1, 2, 7, 7)
        assert attnk.explain("spatial_gate", x, weight).backend == "torch"


@pytest.mark.parametrize("op", ["spatial_gat", "_checks", "__init__", "../spatial_gate", ""])
def test_explain_of_an_unknown_operation(op):
    with pytest.raises(ValueError, match=r"op must be one of .*'spatial_gate', got ") as caught:
        attnk.explain(op, *tensors())
    assert repr(op) in str(caught.value)


def test_explanations_are_values():
    assert attnk.explain("spatial_gate", *tensors()) == attnk.Explanation("spatial_gate", "torch", "x lies on the CPU")
    with pytest.raises(AttributeError):
        attnk.explain("spatial_gate", *tensors()).backend = "triton"


@pytest.mark.gpu
def test_auto_on_a_real_gpu():
    x, weight = tensors("cuda")
    assert attnk.explain("spatial_gate", x, weight).backend == "triton"
    assert attnk.spatial_gate(x, weight).device == x.device
