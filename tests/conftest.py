"""Shared by all tests: the interpreter where there is no GPU, poisoned allocations, and the marker ``gpu``."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for helpers: the folder is not a package

HAS_GPU = torch.cuda.is_available()
# before any kernel is imported; TRITON_INTERPRET=0 keeps the compiler, which tests/test_aot.py needs
os.environ.setdefault("TRITON_INTERPRET", "0" if HAS_GPU else "1")
INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a GPU, torch sees none")
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poison():
    """Fill what torch.empty returns with NaN, so that a number no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch):
    """No TF32 in cuDNN's convolutions: the definition's error is the measure of ours."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def device() -> str:
    """Where kernels run: the GPU, or the CPU by way of the interpreter."""
    return "cuda" if HAS_GPU and not INTERPRETED else "cpu"


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each implementation in turn."""
    if request.param == "triton" and not (INTERPRETED or HAS_GPU):
        pytest.skip("Triton kernels need a GPU or TRITON_INTERPRET=1")
    return request.param
