"""What kernels of attention share: constants, dropout by element, and how strides reach a kernel."""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
PHILOX_ROUNDS: tl.constexpr = tl.constexpr(7)  # the fewest that pass BigCrush (Salmon et al., 2011)


@triton.jit
def kept_weights(
    rng_ptr, head, start_m, start_n, THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Which weights of a tile dropout keeps, [BLOCK_M, BLOCK_N]; the tile starts at multiples of 16.

    Philox counts (key, query, batch x head, offset), key and query without their bit 3; these two bits name the word.
    So a weight has its draw whatever the tiles are. A thread holds rows and columns of a product that are 8 apart:
    it finds all four words in its own tile, whichever way that lies.
    """
    seed, offset = tl.load(rng_ptr), tl.load(rng_ptr + 1).to(tl.uint32)
    queries = (start_m // 2 + tl.arange(0, BLOCK_M // 2)).to(tl.uint32)
    keys = (start_n // 2 + tl.arange(0, BLOCK_N // 2)).to(tl.uint32)
    zero = tl.zeros([BLOCK_M // 2, BLOCK_N // 2], tl.uint32)
    word0, word1, word2, word3 = philox(
        seed, zero + keys[None, :], zero + queries[:, None], zero + head.to(tl.uint32), zero + offset
    )
    odd_m = (tl.arange(0, BLOCK_M) // 8 % 2 == 1)[:, None]
    odd_n = (tl.arange(0, BLOCK_N) // 8 % 2 == 1)[None, :]
    word = tl.where(
        odd_m,
        tl.where(odd_n, spread(word3, BLOCK_M, BLOCK_N), spread(word2, BLOCK_M, BLOCK_N)),
        tl.where(odd_n, spread(word1, BLOCK_M, BLOCK_N), spread(word0, BLOCK_M, BLOCK_N)),
    )
    return word >= THRESHOLD


@triton.jit
def spread(word, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Give each word to the four places, 8 apart, that share a count."""
    word = tl.reshape(word, [BLOCK_M // 16, 1, 8, BLOCK_N // 16, 1, 8])
    word = tl.broadcast_to(word, [BLOCK_M // 16, 2, 8, BLOCK_N // 16, 2, 8])
    return tl.reshape(word, [BLOCK_M, BLOCK_N])


@triton.jit
def philox(seed, count0, count1, count2, count3):
    """Philox-4x32 (Salmon et al., 2011), both halves of a product from one instruction, unlike ``tl.philox``."""
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        product0 = count0.to(tl.uint64) * 0xD2511F53
        product1 = count2.to(tl.uint64) * 0xCD9E8D57
        count0 = (product1 >> 32).to(tl.uint32) ^ count1 ^ key0
        count1 = product1.to(tl.uint32)
        count2 = (product0 >> 32).to(tl.uint32) ^ count3 ^ key1
        count3 = product0.to(tl.uint32)
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return count0, count1, count2, count3


def product_precision(dtype: torch.dtype, arch: str, head_dim: int) -> str:
    """How matrix products of a dtype are formed on an architecture, as ``tl.dot`` calls it.

    Of float32: by TF32 where ``torch.backends.cuda.matmul.allow_tf32`` says so, else on sm_90 by three products of
    TF32, of the leading and the trailing bits, which are as exact as float32's own and, measured, four to eight times
    as fast; elsewhere, and with heads of more than 64, whose tiles would spill, in float32 itself.
    """
    if dtype != torch.float32:
        return "ieee"
    if torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "tf32x3" if arch == "sm_90" and head_dim <= 64 else "ieee"


def divided_strides(units: Sequence[tuple[str, int]], tensors: Sequence[torch.Tensor]) -> tuple[str, int, list[int]]:
    """The constexprs UNIT and ALIGN, and the flat list of strides, for tensors of as many axes.

    UNIT names the axis along which all tensors are contiguous, or is "any". There the other strides come divided by
    ALIGN, the largest power of two up to 16 that divides them all: multiplied back in the kernel, they let the compiler
    prove alignment, which it otherwise does for multiples of 16 only (heads of 72 would fall to 2-byte loads).

    Args:
        units: names and numbers of the axes to try, in this order.
        tensors: the tensors.
    """
    return _divided_strides(tuple(units), tuple((tensor.shape, tensor.stride()) for tensor in tensors))


@functools.lru_cache(maxsize=1024)
def _divided_strides(
    units: tuple[tuple[str, int], ...], tensors: tuple[tuple[torch.Size, tuple[int, ...]], ...]
) -> tuple[str, int, list[int]]:
    every = [[0 if n == 1 else step for n, step in zip(size, stride, strict=True)] for size, stride in tensors]
    for unit, axis in units:
        if all(size[axis] == 1 or stride[axis] == 1 for size, stride in tensors):
            align = math.gcd(16, *(step for steps in every for i, step in enumerate(steps) if i != axis))
            return unit, align, [0 if i == axis else step // align for steps in every for i, step in enumerate(steps)]
    return "any", 1, [step for steps in every for step in steps]
