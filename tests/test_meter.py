"""The meter on kernels whose bytes and faults are known."""

import os

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from attnk.testing import KernelBytes, Meter

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the meter watches the interpreter: run with TRITON_INTERPRET=1"
)


@triton.jit
def copy_kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < length)
    tl.store(out_ptr + offs, x, mask=offs < length)


@triton.jit
def add_first_kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < length)
    x += tl.load(x_ptr + offs * 0, mask=offs < length)
    x += tl.load(x_ptr)
    tl.store(out_ptr + offs, x, mask=offs < length)


@triton.jit
def unmasked_copy_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def stray_store_kernel(out_ptr, position):
    tl.store(out_ptr + position, 1.0)


@triton.jit
def stray_atomic_kernel(out_ptr, position):
    tl.atomic_add(out_ptr + position, 1.0)


@triton.jit
def store_all_kernel(out_ptr, stride, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0) * stride + tl.arange(0, BLOCK), tl.full([BLOCK], 1.0, tl.float32))


@triton.jit
def store_twice_kernel(out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.full([BLOCK], 1.0, tl.float32))
    tl.store(out_ptr + offs, tl.full([BLOCK], 2.0, tl.float32))


@triton.jit
def count_kernel(counter_ptr):
    tl.atomic_add(counter_ptr, 1)


@triton.jit
def multiply_kernel(out_ptr, stride, WIDE: tl.constexpr):
    image = tl.program_id(0) + 4
    if WIDE:
        image = image.to(tl.int64)
    tl.store(out_ptr, image * stride)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int8])
@pytest.mark.parametrize("length", [1, 16, 37])
def test_copy(dtype, length):
    x = torch.arange(length).to(dtype)
    out = torch.empty_like(x)
    with Meter() as meter:
        copy_kernel[(3,)](x, out, length, BLOCK=16)
    assert torch.equal(out, x)
    size = length * x.element_size()
    assert meter.launches == [KernelBytes("copy_kernel", size, size, size, size, 0)]
    assert meter.bytes == 2 * size


def test_an_address_counts_once_a_launch():
    x = torch.ones(20)
    out = torch.empty_like(x)
    with Meter() as meter:
        add_first_kernel[(2,)](x, out, 20, BLOCK=16)
        copy_kernel[(2,)](x, out, 20, BLOCK=16)
    first, second = meter.launches
    assert (first.kernel, second.kernel) == ("add_first_kernel", "copy_kernel")
    assert (first.loaded, first.stored) == (80, 80)
    assert (first.load_lanes, first.store_lanes) == (80 + 80 + 2 * 4, 80)
    assert (second.loaded, second.stored) == (80, 80)
    assert meter.bytes == 320


def test_atomics_count_apart_and_do_not_race():
    counter = torch.zeros(1, dtype=torch.int32)
    with Meter() as meter:
        count_kernel[(5,)](counter)
    assert counter.item() == 5
    assert meter.launches == [KernelBytes("count_kernel", atomics=20)]
    assert meter.bytes == 0


def test_a_program_may_store_twice():
    out = torch.empty(16)
    with Meter() as meter:
        store_twice_kernel[(1,)](out, BLOCK=16)
    assert out.eq(2).all()
    assert (meter.launches[0].stored, meter.launches[0].store_lanes) == (64, 128)


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (lambda: unmasked_copy_kernel[(2,)](torch.ones(20), torch.empty(32), BLOCK=16), "load of 12 lanes outside"),
        (lambda: unmasked_copy_kernel[(2,)](torch.ones(32), torch.empty(20), BLOCK=16), "store of 12 lanes outside"),
        (lambda: stray_store_kernel[(1,)](torch.empty(8), 8), "store of 1 lanes outside"),
        (lambda: stray_store_kernel[(1,)](torch.empty(8), -1), "store of 1 lanes outside"),
        (lambda: stray_atomic_kernel[(1,)](torch.empty(8), 8), "atomic of 1 lanes outside"),
    ],
)
def test_stray_lanes(launch, words):
    with Meter(), pytest.raises(Exception, match=words):
        launch()


def test_a_view_is_bounded_by_its_storage():
    wide = torch.zeros(40)
    with Meter() as meter:
        copy_kernel[(1,)](wide[8:24], wide[24:], 16, BLOCK=16)
    assert meter.bytes == 128


@pytest.mark.parametrize("stride", [0, 8, 15])
def test_races(stride):
    with Meter(), pytest.raises(RuntimeError, match=f"store_all_kernel: {16 - stride} addresses stored to by two"):
        store_all_kernel[(2,)](torch.empty(32), stride, BLOCK=16)
    with Meter():
        store_all_kernel[(2,)](torch.empty(32), 16, BLOCK=16)


def test_overflow_of_32_bits():
    out = torch.zeros(1, dtype=torch.int64)
    with Meter(), pytest.raises(Exception, match="overflow"):
        multiply_kernel[(1,)](out, 2**30, WIDE=False)
    with Meter():
        multiply_kernel[(1,)](out, 2**30, WIDE=True)
    assert out.item() == 2**32


def test_clean_after_use_and_after_a_fault():
    from triton.runtime import interpreter

    patched = (
        (interpreter.InterpreterBuilder, "create_masked_load"),
        (interpreter.InterpreterBuilder, "create_masked_store"),
        (interpreter.InterpreterBuilder, "create_atomic_rmw"),
        (interpreter.InterpreterBuilder, "set_grid_idx"),
        (interpreter.GridExecutor, "__call__"),
    )
    before = [getattr(owner, name) for owner, name in patched]
    options = interpreter.interpreter_builder.options
    x, out = torch.ones(16), torch.empty(32)

    with Meter() as meter:
        assert [getattr(owner, name) for owner, name in patched] != before
        copy_kernel[(1,)](x, out, 16, BLOCK=16)
    with pytest.raises(RuntimeError, match="two programs"), Meter():
        store_all_kernel[(2,)](out, 0, BLOCK=16)
    with pytest.raises(Exception, match="outside"), Meter():
        stray_store_kernel[(1,)](out, 32)

    assert [getattr(owner, name) for owner, name in patched] == before
    assert interpreter.interpreter_builder.options == options == type(options)()
    store_all_kernel[(2,)](out, 0, BLOCK=16)
    assert len(meter.launches) == 1

    with Meter() as second:  # nothing of the faulty launches is left
        copy_kernel[(1,)](x, out, 16, BLOCK=16)
    assert second.bytes == meter.bytes == 128
    with meter:
        copy_kernel[(1,)](x, out, 16, BLOCK=16)
    assert meter.bytes == 256


def test_goes_on_after_a_fault():
    x, out = torch.ones(16), torch.empty(32)
    with Meter() as meter:
        with pytest.raises(Exception, match="outside"):
            stray_store_kernel[(1,)](out, 32)
        with pytest.raises(RuntimeError, match="two programs"):
            store_all_kernel[(2,)](out, 0, BLOCK=16)
        copy_kernel[(1,)](x, out, 16, BLOCK=16)
    assert meter.launches[-1] == KernelBytes("copy_kernel", 64, 64, 64, 64)
