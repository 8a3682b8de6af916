"""``attnk.softmax_attention``: values, gradients, layouts, dropout, edges, errors, its behaviour inside PyTorch."""

import contextlib
import functools
import importlib
import itertools
import math
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from attention_inputs import (
    KERNELS,
    LAYOUTS,
    ORDERS_OF_RESULTS,
    SEED,
    Inputs,
    arranged,
    check,
    cut,
    definition,
    draw,
    draw_mask,
    fused,
    kept,
    run,
)
from helpers import assert_same_bits, needs_interpreter, one_by_one, pairwise
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import attnk
from attnk import dispatch
from attnk.ops import softmax_attention as operation
from attnk.reference.softmax_attention import relative_position_index, softmax_attention_reference
from attnk.testing import Meter, assert_matches_reference

DTYPES = (torch.float64, torch.float32, torch.float16)
NAMES = ("q", "k", "v", "bias", "bias_table")
REPEATS = 1 if dispatch.INTERPRETED else 20


@pytest.fixture
def kernels():
    return pytest.importorskip(KERNELS)


# Values and gradients


@pytest.mark.parametrize(
    "case",
    pairwise(
        dim=(8, 24, 40, 59, 64, 72, 80, 88, 96),
        v_dim=(None, 24, 59),
        tokens=((17, 17), (2, 20), (20, 3), (33, 7)),
        dtype=DTYPES,
        extra=("", "mask", "bias and mask", "dropout"),
        is_causal=(False, True),
        group=(1, 3),
        returns=("out", "both"),
        scale=(None, 0.3, -0.2),
    ),
)
def test_matches_reference(backend, device, case):
    n_queries, n_keys = case["tokens"]
    options = {name: case[name] for name in ("is_causal", "returns", "scale")}
    bias = (1, n_queries, n_keys) if "bias" in case["extra"] else None
    if "mask" in case["extra"]:
        options["mask"] = draw_mask(1, 1, n_queries, n_keys, device=device)
    if "dropout" in case["extra"]:
        options |= {"dropout_p": 0.3, "seed": SEED}
    inputs = draw(
        case["tokens"], case["dim"], case["v_dim"], case["dtype"], device,
        batch=1, heads=case["group"], key_heads=1, bias=bias,
    )  # fmt: skip
    check(backend, inputs, enable_gqa=True, **options)


@pytest.mark.parametrize(
    "case", pairwise(dims=((128, None), (160, None), (256, None), (16, 256), (160, 40), (256, 129)), dtype=DTYPES)
)
def test_wide_heads(backend, device, case):
    inputs = draw((5, 7), *case["dims"], case["dtype"], device, batch=1, heads=1)
    too_wide = device == "cuda" and case["dtype"] == torch.float64 and max(filter(None, case["dims"])) > 128
    if backend == "triton" and too_wide:
        with pytest.raises(dispatch.Unsupported, match="head dimension up to 128 in float64"):
            fused(backend)(**inputs)
        return
    check(backend, inputs, returns="both")


@pytest.mark.parametrize(
    "tokens",
    [(1, 197), (49, 49), (197, 197), (257, 49), (49, 257), (785, 17), (17, 785), (785, 785)],
    ids=str,
)
def test_token_counts(backend, device, tokens):
    inputs = draw(tokens, 16, device=device, batch=1, heads=1)
    with cut(backend, 128, 128, elements=2**14) if dispatch.INTERPRETED else contextlib.nullcontext():
        check(backend, inputs)


@pytest.mark.parametrize("tokens", [(1, 1), (40, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key(backend, device, tokens, dtype):
    """The weights are 1, and what q and k get by way of out is nothing but rounding."""
    inputs = draw(tokens, 16, None, dtype, device, batch=1, bias=(2, *tokens))
    with cut(backend, 32, 16):
        check(backend, inputs, grads=("v",))
        check(backend, inputs, returns="lse", grads=("q", "k", "bias"))
        _, *grads = run(backend, inputs)
    sizes = [inputs[name].abs().max() for name in "qkv"]
    for name, grad in zip(inputs, grads, strict=True):
        if name != "v":
            assert grad.abs().max() < 100 * math.prod(sizes) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extra", ["", "bias", "dropout"])
def test_half_precision_in_pytorch(device, extra, dtype):
    inputs = draw((33, 40), 24, None, dtype, device, bias=(2, 33, 40) if extra == "bias" else None)
    options = {"dropout_p": 0.2, "seed": SEED} if extra == "dropout" else {}
    check("torch", inputs, returns="both", **options)


@pytest.mark.parametrize(
    "case",
    pairwise(
        n_queries=(15, 16, 17, 31, 32, 33),
        n_keys=(15, 16, 17, 31, 32, 33),
        blocks=((16, 32), (32, 16)),
        extra=("", "mask", "bias"),
        is_causal=(False, True),
    ),
)
def test_sizes_around_the_blocks(kernels, device, case):
    n_queries, n_keys, extra = case["n_queries"], case["n_keys"], case["extra"]
    bias = (1, 1, n_queries, n_keys) if extra == "bias" else None
    mask = draw_mask(1, 1, n_queries, n_keys, device=device) if extra == "mask" else None
    inputs = draw((n_queries, n_keys), 16, None, torch.float64, device, batch=1, heads=1, bias=bias)
    with cut("triton", *case["blocks"]):
        check("triton", inputs, mask=mask, is_causal=case["is_causal"])


@pytest.mark.parametrize("tokens", [(37, 37), (5, 37), (37, 5), (24, 40), (40, 24)], ids=str)
@pytest.mark.parametrize("blocks", [(16, 32), (32, 16)], ids=str)
def test_causal(backend, device, tokens, blocks):
    inputs = draw(tokens, 8, 16, torch.float64, device, batch=1)
    with cut(backend, *blocks):
        check(backend, inputs, is_causal=True, returns="both")


def test_causal_counts_from_the_first_key(backend, device):
    values = torch.eye(6, device=device).expand(1, 1, 6, 6)
    q, k = torch.zeros(1, 1, 3, 8, device=device), torch.zeros(1, 1, 6, 8, device=device)
    out = attnk.softmax_attention(q, k, values, is_causal=True, backend=backend)
    expected = torch.ones(3, 6, device=device).tril()
    torch.testing.assert_close(out[0, 0], expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize(("heads", "extra"), [((4, 2), ""), ((6, 2), "bias"), ((3, 1), "dropout")], ids=str)
def test_groups_of_heads(backend, device, heads, extra):
    bias = (heads[0], 9, 11) if extra == "bias" else None
    options = {"dropout_p": 0.3, "seed": SEED} if extra == "dropout" else {}
    inputs = draw((9, 11), 8, None, torch.float64, device, heads=heads[0], key_heads=heads[1], bias=bias)
    check(backend, inputs, enable_gqa=True, **options)


@pytest.mark.parametrize("scale", [0, 0.0, 2, -0.5])
@pytest.mark.parametrize("extra", ["", "bias and mask"])
def test_scale(backend, device, scale, extra):
    inputs = draw(dtype=torch.float64, device=device, bias=(17, 20) if extra else None, batch=1)
    mask = draw_mask(17, 20, device=device) if extra else None
    check(backend, inputs, scale=scale, mask=mask, returns="both")
    check(backend, {name: tensor.float() for name, tensor in inputs.items()}, scale=scale, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_pytorch(backend, device, dtype):
    mask = draw_mask(2, 1, 17, 20, device=device)
    inputs = draw((17, 20), 24, None, dtype, device, heads=4, key_heads=2)
    for is_causal in (False, True):
        seen = mask & mask.new_ones(17, 20).tril() if is_causal else mask
        theirs = functools.partial(F.scaled_dot_product_attention, attn_mask=seen, scale=0.4, enable_gqa=True)
        assert_matches_reference(
            fused(backend, mask=mask, is_causal=is_causal, scale=0.4, enable_gqa=True),
            lambda q, k, v: theirs(q, k, v).nan_to_num(0),  # noqa: B023
            inputs,
            grads=(),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "dim"),
    [((197, 197), 64), ((577, 144), 32), ((785, 785), 64), ((256, 256), 72), ((300, 300), 80), ((49, 200), 96),
     ((257, 257), 128), ((130, 70), 160), ((100, 144), 256)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("extra", ["", "bias", "table", "mask", "dropout", "causal", "everything"])
def test_on_a_gpu(extra, tokens, dim, dtype):
    """The table's own configurations, in every precision."""
    grid = None
    if extra in ("dropout", "everything"):
        tokens = tuple(min(number, 196) for number in tokens)  # ``kept`` has as many columns of values as keys
    if extra in ("table", "everything"):
        grid = (tokens[0] // 7, 7)
        tokens = (math.prod(grid),) * 2
    bias = (1, 4, *tokens) if extra in ("bias", "everything") else None
    inputs = draw(tokens, dim, None, dtype, "cuda", heads=4, bias=bias, grid=grid, layouts="packed")
    options: dict[str, Any] = {} if grid is None else {"grid": grid}
    if extra in ("mask", "everything"):
        options["mask"] = draw_mask(2, 1, *tokens, device="cuda")
    if extra in ("dropout", "everything"):
        options |= {"dropout_p": 0.1, "seed": SEED}
    check("triton", inputs, is_causal=extra == "causal", returns="both", **options)


# Bias, mask, bias table

BROADCAST = [
    *itertools.product((1, 2), (1, 3), (1, 17), (1, 20)),
    *[(3, 17, 20), (3, 1, 20), (1, 17, 1), (17, 20), (1, 20), (17, 1), (20,), (1,), ()],
]


@pytest.mark.parametrize("shape", BROADCAST, ids=str)
def test_bias_of_every_shape(backend, device, shape):
    if backend == "triton" and len(shape) < 4:
        pytest.skip("the operation gives them four axes")
    inputs = draw(dtype=torch.float64, device=device, heads=3, bias=shape)
    with cut(backend, 32, 32):
        check(backend, inputs, returns="both")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((17, 20), torch.float16), ((1, 3, 1, 20), torch.float16), ((2, 1, 17, 1), torch.float32), ((20,), torch.float32)],
    ids=str,
)
def test_bias_in_other_precisions(backend, device, shape, dtype):
    inputs = draw(dtype=dtype, device=device, heads=3, bias=shape)
    with cut(backend, 32, 16):
        check(backend, inputs, returns="both", is_causal=True)


@pytest.mark.parametrize(("dtype", "bias_dtype"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_bias_of_another_dtype(backend, device, dtype, bias_dtype):
    inputs = draw((16, 16), dtype=dtype, device=device, bias=(2, 16, 16), grid=(4, 4))
    for name in ("bias", "bias_table"):
        inputs[name] = inputs[name].to(bias_dtype)
    check(backend, inputs, grid=(4, 4))


def test_layouts_of_the_bias(backend, device):
    bias = torch.randn(2, 2, 17, 20, dtype=torch.float64, device=device)
    for one in (
        bias.mT.contiguous().mT,
        bias.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1),
        torch.cat([bias, bias], -1)[..., ::2],
        bias[:1, :, :1].expand(2, 2, 17, 20),
        bias[..., :1].expand(2, 2, 17, 20),
    ):
        inputs = draw(dtype=torch.float64, device=device) | {"bias": one}
        check(backend, inputs)


@pytest.mark.parametrize("shape", BROADCAST, ids=str)
def test_mask_of_every_shape(backend, device, shape):
    if backend == "triton" and len(shape) < 4:
        pytest.skip("the operation gives them four axes")
    for which in range(2 if shape in ((), (17, 20)) else 1):
        mask = draw_mask(*shape, device=device) if shape else torch.tensor(not which, device=device)
        if which and shape:
            mask = mask.mT.contiguous().mT
        inputs = draw(dtype=torch.float64, device=device, heads=3)
        with cut(backend, 32, 32):
            check(backend, inputs, mask=mask, returns="both")
            if backend == "torch":  # has another way where no gradient is wanted
                check(backend, inputs, mask=mask, grads=())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("extra", ["", "bias", "dropout", "table"])
def test_queries_that_see_no_key(backend, device, extra, dtype):
    grid = (4, 4) if extra == "table" else None
    inputs = draw((16, 16), dtype=dtype, device=device, heads=1, bias=(16, 16) if extra == "bias" else None, grid=grid)
    options = {"dropout_p": 0.3, "seed": SEED} if extra == "dropout" else {}
    mask = torch.rand(2, 1, 16, 16, device=device) < 0.7
    mask[0, :, 3], mask[1] = False, False
    options |= {"mask": mask, "grid": grid}
    check(backend, inputs, returns="both", **options)
    if backend == "torch":
        check(backend, inputs, grads=(), **options)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out, lse = attnk.softmax_attention(**leaves, **options, return_lse=True, backend=backend)
    (out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()).backward()
    assert not out[1].any()
    assert not out[0, :, 3].any()
    assert (lse[1] == -torch.inf).all()
    assert (lse[0, :, 3] == -torch.inf).all()
    assert lse[0, :, 4:].isfinite().all()
    for leaf in leaves.values():
        assert leaf.grad.isfinite().all()


def test_bias_hides_keys(backend, device):
    """A bias of -inf hides a key as a mask does, and where it hides all of them the result is 0."""
    inputs = draw(dtype=torch.float64, device=device, bias=(17, 20))
    inputs["bias"][2, 3:9] = -torch.inf
    inputs["bias"][5] = -torch.inf
    check(backend, inputs, returns="both")
    check(backend, inputs, grads=("q", "k", "v"))
    check(backend, inputs, grads=())
    assert not attnk.softmax_attention(**inputs, backend=backend)[:, :, 5].any()


@pytest.mark.parametrize("shape", [(17, 20), (2, 1, 1, 20), (1, 2, 17, 20)], ids=str)
def test_float_mask_is_a_bias(backend, device, shape):
    inputs = draw(dtype=torch.float64, device=device) | {"mask": torch.randn(shape, dtype=torch.float64, device=device)}
    assert_matches_reference(
        fused(backend), lambda mask, **tensors: softmax_attention_reference(**tensors, bias=mask)[0], inputs
    )


@pytest.mark.parametrize(("dtype", "key_heads"), [*zip(DTYPES, (1, 2, 1), strict=True)])
def test_everything_at_once(backend, device, key_heads, dtype):
    inputs = draw((20, 20), 24, 40, dtype, device, key_heads=key_heads, bias=(1, 2, 1, 20), grid=(4, 5))
    options = {"grid": (4, 5), "dropout_p": 0.3, "seed": SEED, "is_causal": True, "scale": 0.3, "enable_gqa": True}
    with cut(backend, 32, 32):
        check(backend, inputs, mask=draw_mask(2, 1, 20, 20, device=device), returns="both", **options)


@pytest.mark.parametrize(
    "case",
    pairwise(
        grid=((4, 5), (1, 7), (7, 1), (5, 8)),
        dtype=DTYPES,
        extra=("", "mask", "bias", "dropout", "causal"),
        layout=("contiguous", "channel_major"),
    ),
)
def test_bias_table(backend, device, case):
    grid, extra = case["grid"], case["extra"]
    n_tokens = math.prod(grid)
    options = {"grid": grid, "is_causal": extra == "causal"}
    if extra == "mask":
        options["mask"] = draw_mask(n_tokens, n_tokens, device=device)
    if extra == "dropout":
        options |= {"dropout_p": 0.3, "seed": SEED}
    inputs = draw(
        (n_tokens, n_tokens), 16, None, case["dtype"], device, batch=1,
        bias=(n_tokens, n_tokens) if extra == "bias" else None, grid=grid, layouts=case["layout"],
    )  # fmt: skip
    with cut(backend, 32, 32, elements=2 * grid[1] * n_tokens):
        check(backend, inputs, **options)


def test_bias_table_is_the_dense_bias(backend, device):
    """Swin's own formula: the table's rows by relative_position_index, as a bias."""
    height, width, heads = 3, 5, 2
    inputs = draw((15, 15), 8, None, torch.float64, device, heads=heads, grid=(height, width))
    inputs["bias_table"].requires_grad_()
    coords = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).flatten(1)
    relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0)
    index = (relative[..., 0] + height - 1) * (2 * width - 1) + relative[..., 1] + width - 1
    assert torch.equal(index.flatten(), relative_position_index(height, width))
    dense = inputs["bias_table"][index.to(device)].permute(2, 0, 1)
    plain = {name: inputs[name] for name in ("q", "k", "v")}
    expected = attnk.softmax_attention(**plain, bias=dense, backend="reference")
    out = attnk.softmax_attention(**inputs, grid=(height, width), backend=backend)
    torch.testing.assert_close(out, expected)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), inputs["bias_table"])
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["bias_table"])
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize(("programs", "scratch_rows"), [(1, 2), (4, 1), (10**6, 10**6), (10**6, 3)])
def test_chunks_and_slabs_of_the_bias_table(kernels, device, programs, scratch_rows, monkeypatch):
    grid, batch, heads = (5, 3), 3, 2
    row_bytes = heads * grid[1] * math.prod(grid) * 8
    monkeypatch.setattr(f"{KERNELS}.backward.DBIAS_SCRATCH_BYTES", scratch_rows * row_bytes)
    monkeypatch.setattr(f"{KERNELS}.backward.DBIAS_PROGRAMS", programs)
    inputs = draw((15, 15), 16, None, torch.float64, device, batch=batch, heads=heads, grid=grid)
    options = {"dropout_p": 0.2, "seed": SEED, "is_causal": True} if scratch_rows == 3 else {}
    check("triton", inputs, grid=grid, **options)


@pytest.mark.parametrize("dense_bytes", [0, 10**6])
@pytest.mark.parametrize("bias", [None, (2, 1, 15, 15)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_dense_and_gathered_bias_tables(kernels, device, dense_bytes, bias, dropout_p, monkeypatch):
    monkeypatch.setattr(f"{KERNELS}.common.DENSE_TABLE_BYTES", dense_bytes)
    inputs = draw((15, 15), 16, None, torch.float64, device, heads=2, grid=(5, 3), bias=bias)
    check("triton", inputs, grid=(5, 3), dropout_p=dropout_p, seed=SEED if dropout_p else None)


@pytest.mark.parametrize("bias", [None, (1, 2, 5, 7)], ids=str)
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_float64_takes_no_rounded_argument(bias, scale):
    """A kernel's float arguments have 32 bits."""
    common = importlib.import_module(f"{KERNELS}.common")
    inputs = draw((5, 7), 8, dtype=torch.float64, bias=bias)
    q, k, v, extra = (inputs.get(name) for name in ("q", "k", "v", "bias"))
    call = common.Call(q, k, v, extra, None, None, None, 0, scale, False, 0.1, None)
    assert (call.logit_scale, call.dq_scale, call.dk_scale) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("programs", [1, 2, 5, 10**6])
@pytest.mark.parametrize("shape", [(1, 1, 9, 11), (3, 1, 1, 11)], ids=str)
def test_slabs_of_the_bias(kernels, device, programs, shape, monkeypatch):
    monkeypatch.setattr(f"{KERNELS}.backward.DBIAS_PROGRAMS", programs)
    check("triton", draw((9, 11), dtype=torch.float64, device=device, batch=3, bias=shape))


# Dropout


def philox(seed: int, offset: int, n_heads: int, n_queries: int, n_keys: int, rounds: int = 7) -> np.ndarray:
    """The 32 random bits of each weight, (heads of all batches, queries, keys), from Philox-4x32 in NumPy."""
    low = np.uint64(0xFFFFFFFF)
    head, query, key = np.meshgrid(*map(np.arange, (n_heads, n_queries, n_keys)), indexing="ij")
    counts = [key // 16 * 8 + key % 8, query // 16 * 8 + query % 8, head, np.full_like(head, offset & 0xFFFFFFFF)]
    counts = [count.astype(np.uint64) for count in counts]
    keys = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(rounds):
        products = counts[0] * np.uint64(0xD2511F53), counts[2] * np.uint64(0xCD9E8D57)
        counts = [
            products[1] >> np.uint64(32) ^ counts[1] ^ keys[0],
            products[1] & low,
            products[0] >> np.uint64(32) ^ counts[3] ^ keys[1],
            products[0] & low,
        ]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & low, (keys[1] + np.uint64(0xBB67AE85)) & low]
    return np.choose(query // 8 % 2 * 2 + key // 8 % 2, counts)


def test_philox_is_philox():
    # the known answers of Random123 for counter and key 0
    for rounds, first in ((7, 0x5F6FB709), (10, 0x6627E8D5)):
        assert philox(0, 0, 1, 1, 1, rounds).item() == first


@pytest.mark.parametrize(
    ("seed", "blocks"),
    [
        ((0, 0), (16, 16)),
        ((SEED[0].item(), 5), (16, 32)),
        ((2**62 - 1, 2**62 - 1), (32, 16)),
        ((-5, -(2**33)), (32, 64)),
    ],
    ids=str,
)
def test_dropout_is_philox(kernels, device, seed, blocks):
    inputs = draw((20, 36), device=device)
    with cut("triton", *blocks):
        keep = kept("triton", inputs, dropout_p=0.37, seed=torch.tensor(seed))
    expected = philox(*seed, 4, 20, 36).reshape(2, 2, 20, 36) >= round(0.37 * 2**32)
    assert torch.equal(keep.cpu(), torch.from_numpy(expected))


@pytest.mark.parametrize("extra", ["", "bias", "table"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dropout_in_forward_and_backward(backend, device, dtype, extra):
    """Gradients against the definition with the forward's mask: of q, k and v, of a bias, and into a table."""
    grid = (4, 5) if extra == "table" else None
    inputs = draw((20, 20), 8, None, dtype, device, batch=1, bias=(20, 20) if extra == "bias" else None, grid=grid)
    with cut(backend, 16, 32, elements=5 * 20 * 2):
        check(backend, inputs, dropout_p=0.4, seed=SEED, grid=grid, returns="both")


def test_dropout_is_the_same_in_other_tiles(kernels, device):
    inputs = draw((20, 36), device=device, dtype=torch.float64, batch=1, bias=(1, 1, 20, 36))
    keeps, results = [], []
    for blocks in ((16, 16), (32, 64)):
        with cut("triton", *blocks):
            keeps.append(kept("triton", inputs, dropout_p=0.3, seed=SEED))
            results.append(run("triton", inputs, dropout_p=0.3, seed=SEED))
    for keep, result in zip(keeps[1:], results[1:], strict=True):
        assert torch.equal(keep, keeps[0])
        torch.testing.assert_close(result, results[0])


def test_dropout_in_blocks(device):
    """In PyTorch every block of logits has its own draws, of queries, heads and images alike."""
    n_tokens = 24
    inputs = draw((n_tokens, n_tokens), device=device, heads=3)
    for elements in (n_tokens * 6, n_tokens**2, n_tokens**2 * 3, 2**19):
        with cut("torch", elements=elements):
            keep = kept("torch", inputs, dropout_p=0.5, seed=SEED)
            planes = {plane.cpu().numpy().tobytes() for plane in keep.flatten(0, 1)}
            rows = {row.cpu().numpy().tobytes() for row in keep.flatten(0, 2)}
            assert len(planes) == 6
            assert len(rows) == 6 * n_tokens
            check("torch", inputs, dropout_p=0.5, seed=SEED)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9, 0.999])
def test_share_of_dropped_weights(backend, device, dropout_p):
    inputs = draw((64, 128), 16, device=device, batch=1)
    keep = kept(backend, inputs, dropout_p=dropout_p, seed=SEED)
    deviation = math.sqrt(keep.numel() * dropout_p * (1 - dropout_p))
    assert abs((~keep).sum().item() - keep.numel() * dropout_p) < 4.5 * deviation
    for axis in (2, 3):  # over each query's keys and each key's queries
        counts = keep.double().sum(axis)
        n = keep.shape[axis]
        assert (counts - n * (1 - dropout_p)).abs().max() < 5.5 * max(math.sqrt(n * dropout_p * (1 - dropout_p)), 1)


@pytest.mark.parametrize("dropout_p", [0.999, 1, 1 - 2**-40])
def test_dropping_nearly_all(backend, device, dropout_p):
    inputs = draw(dtype=torch.float64, device=device, batch=1, bias=(17, 20))
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out, lse = attnk.softmax_attention(**leaves, dropout_p=dropout_p, seed=SEED, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out.sum() + 0 * lse.sum(), list(leaves.values()))
    assert all(tensor.isfinite().all() for tensor in (out, *grads))
    if dropout_p == 1:
        assert not out.any()
        assert not any(grad.any() for grad in grads)
        check(backend, {name: tensor.detach() for name, tensor in inputs.items()}, dropout_p=1, seed=SEED)
    plain = softmax_attention_reference(**inputs)[1]
    torch.testing.assert_close(lse, plain)


def test_seeds(backend, device):
    inputs = draw((16, 32), device=device, batch=1)
    seeds = [(1, 2), (1, 3), (2, 2), (2, 1), (1 + 2**32, 2)]
    results = [run(backend, inputs, dropout_p=0.3, seed=torch.tensor(seed, device=device)) for seed in seeds]
    assert_same_bits(run(backend, inputs, dropout_p=0.3, seed=torch.tensor(seeds[0], device=device)), results[0])
    for one, other in itertools.combinations(results, 2):
        assert not torch.equal(one[0], other[0])


def test_seed_of_pytorch(backend, device):
    """Without a seed one is drawn from PyTorch's generator at every call."""
    inputs = draw(device=device, batch=1)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append([tensor for _ in range(2) for tensor in run(backend, inputs, dropout_p=0.3)])
    assert_same_bits(results[0], results[1])
    assert not torch.equal(results[0][0], results[2][0])
    assert not torch.equal(results[0][0], results[0][4])


def test_no_dropout_draws_nothing(backend, device):
    inputs = draw(device=device)
    before = torch.get_rng_state()
    run(backend, inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_of_the_reference(device):
    q, k, v = draw((64, 64), device=device).values()
    call = functools.partial(attnk.softmax_attention, q, k, v, dropout_p=0.5, backend="reference")
    assert torch.equal(call(seed=SEED), call(seed=SEED))
    assert not torch.equal(call(seed=SEED), call(seed=SEED + 1))


# Memory: layouts, orders, offsets


@pytest.mark.parametrize("shift", [1, 5])
@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=LAYOUTS)
def test_layouts(backend, device, number, shift):
    """Each layout beside others: of q, k, v and the gradient."""
    q, k, v, dout = (LAYOUTS[(number + i * shift) % len(LAYOUTS)] for i in range(4))
    inputs = draw((5, 7), 6, 10, torch.float64, device, layouts=(q, k, v))
    dout = arranged(torch.randn(2, 2, 5, 10, dtype=torch.float64, device=device), dout)
    assert_matches_reference(lambda **tensors: fused(backend)(**tensors).contiguous(), definition(), inputs, dout=dout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_all_alike(backend, device, layout):
    inputs = draw((17, 20), 24, None, torch.float16, device, layouts=layout)
    dout = arranged(torch.randn(2, 2, 17, 24, device=device).half(), layout)
    one = lambda **tensors: fused(backend)(**tensors).contiguous()  # noqa: E731
    assert_matches_reference(one, definition(), inputs, dout=dout)
    if backend == "torch":
        assert_matches_reference(one, definition(), inputs, grads=())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["plain", "bias", "values_of_another_width", "mask", "dropout", "lse"])
def test_results_lie_as_their_inputs(backend, device, case, layout):
    if backend == "triton" and case != "bias":
        pytest.skip("the kernels have one way for all")
    v_dim = 10 if case == "values_of_another_width" else None
    inputs = draw((5, 7), 6, v_dim, device=device, layouts=layout, bias=(5, 7) if case == "bias" else None)
    options = {"dropout_p": 0.3, "seed": SEED} if case == "dropout" else {}
    options |= {"mask": draw_mask(5, 7, device=device)} if case == "mask" else {}
    order = ORDERS_OF_RESULTS[layout]
    plain = fused(backend, **options)(**inputs)
    assert plain.shape == (2, 2, 5, v_dim or 6)
    assert plain.permute(order).is_contiguous()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out, lse = attnk.softmax_attention(**leaves, **options, return_lse=True, backend=backend)
    assert out.permute(order).is_contiguous()
    assert lse.shape == (2, 2, 5)
    assert lse.is_contiguous()
    loss = out.sum() + lse.sum() if case == "lse" else out.sum()
    for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert (grad if name == "bias" else grad.permute(order)).is_contiguous(), name


def test_tokens_of_a_packed_projection(backend, device):
    """Gradients of q, k and v meet in the projection they are views of, and out needs no copy on its way back."""
    packed = torch.randn(2, 9, 3 * 2 * 8, dtype=torch.float64, device=device)

    def around(attention: Any, packed: torch.Tensor) -> torch.Tensor:
        q, k, v = packed.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return attention(q=q, k=k, v=v).transpose(1, 2).flatten(2)

    assert_matches_reference(
        functools.partial(around, fused(backend)), functools.partial(around, definition()), {"packed": packed}
    )
    q, k, v = packed.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    out = attnk.softmax_attention(q, k, v, backend=backend)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


def test_feature_maps(backend, device):
    """Parts of a (B, 3 x heads x D, height, width) map as tokens and back, in both memory formats."""

    def around(attention: Any, memory_format: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=memory_format)
        q, k, v = x.unflatten(1, (3, 2, 6)).flatten(4).mT.unbind(1)
        return attention(q=q, k=k, v=v).mT.unflatten(-1, x.shape[2:]).flatten(1, 2).contiguous()

    x = torch.randn(2, 36, 3, 4, dtype=torch.float64, device=device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert_matches_reference(
            functools.partial(around, fused(backend), memory_format),
            functools.partial(around, definition(), memory_format),
            {"x": x},
        )


class Copies(TorchDispatchMode):
    """Collects the names of operators that copy."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::copy_", "aten::clone", "aten::_to_copy", "aten::contiguous"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@needs_interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_hidden_copy(kernels, layout):
    q, k, v, bias = draw((5, 7), 8, layouts=layout, bias=(1, 2, 5, 7)).values()
    mask = torch.ones(5, 7, dtype=torch.bool).expand(2, 2, 5, 7)
    rest = (None, None, 0, 0.3, False, 0.0)
    launch = mock.patch("triton.runtime.interpreter.GridExecutor.__call__", autospec=True)
    with Copies() as copies, launch:  # the interpreter itself copies
        out, _, row_max, log_sum = kernels.softmax_attention_forward(q, k, v, bias, mask, *rest)
        dout = torch.empty_like(out).fill_(1.0)
        kernels.softmax_attention_backward(
            dout, None, q, k, v, bias, mask, *rest[:2], out, row_max, log_sum, *rest[2:], True, True, True, False
        )
    assert not copies.names


@pytest.mark.parametrize(
    "kept_axes", [(1, 1, 1, 1), (2, 2, 17, 1), (2, 1, 17, 8), (1, 2, 17, 8), (2, 2, 1, 8)], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "channel_major"])
def test_expanded_gradients(backend, device, kept_axes, layout):
    # the gradients of sum(), mean(3), mean(1), sum(0) and mean(2)
    inputs = draw(device=device, layouts=layout)
    check(backend, inputs, dout=torch.randn(kept_axes, device=device).expand(2, 2, 17, 8))


def test_expanded_gradients_of_lse(backend, device):
    inputs = draw(dtype=torch.float64, device=device)
    for around in (
        lambda lse: lse.sum((1, 2)), lambda lse: lse.mT.contiguous().mT * 2, lambda lse: lse[:, :1].expand(2, 2, 17)
    ):  # fmt: skip
        assert_matches_reference(
            lambda **tensors: around(fused(backend, "lse")(**tensors)),  # noqa: B023
            lambda **tensors: around(definition("lse")(**tensors)),  # noqa: B023
            inputs,
            grads=("q", "k"),
        )


@pytest.mark.parametrize("returns", ["lse", "both"])
@pytest.mark.parametrize("extra", ["", "bias", "mask", "causal", "dropout", "group"])
def test_gradient_of_lse(backend, device, returns, extra):
    if backend == "triton" and returns == "lse" and extra:
        pytest.skip("the kernels have one way for all")
    key_heads = 1 if extra == "group" else None
    inputs = draw(dtype=torch.float64, device=device, key_heads=key_heads, bias=(2, 1, 20) if extra == "bias" else None)
    options = {"is_causal": extra == "causal", "enable_gqa": True}
    options |= {"mask": draw_mask(17, 20, device=device)} if extra == "mask" else {}
    options |= {"dropout_p": 0.3, "seed": SEED} if extra == "dropout" else {}
    grads = [name for name in inputs if returns == "both" or name != "v"]
    check(backend, inputs, returns=returns, grads=grads, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse(backend, device, dtype):
    inputs = draw(dtype=dtype, device=device)
    check(backend, inputs, returns="lse", grads=())
    for wants_grad in (False, True):
        leaves = {name: tensor.detach().requires_grad_(wants_grad) for name, tensor in inputs.items()}
        out, lse = attnk.softmax_attention(**leaves, return_lse=True, backend=backend)
        assert out.dtype == dtype
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert lse.requires_grad == wants_grad


def spread(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The values, lying so far apart; pages that nothing touches take no memory."""
    last = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    sparse = mmap.mmap(-1, values.element_size() * (last + 1))
    return torch.frombuffer(sparse, dtype=values.dtype).as_strided(values.shape, strides).copy_(values)


FAR = 2**31 + 40


@pytest.mark.parametrize(
    "strides",
    [
        (FAR, 64, 8, 1),
        (64, FAR, 8, 1),
        (128, 64, FAR // 3, 1),
        (128, 64, 1, FAR // 4),
        (2**40, 2**39 + 3, 8, 1),
    ],
    ids=["batch", "head", "token", "last", "one_head"],
)
@pytest.mark.parametrize("what", ["qkv", "bias", "mask"])
def test_offsets_beyond_32_bits(backend, device, what, strides):
    if device != "cpu":
        pytest.skip("lies in CPU memory")
    heads = batch = 1 if strides[0] == 2**40 else 2
    inputs = draw((4, 5), 7, None, torch.float16, batch=batch, heads=heads)
    inputs["bias"] = torch.randn(batch, heads, 4, 5).half() if what == "bias" else None
    mask = torch.rand(batch, heads, 4, 5) < 0.8 if what == "mask" else None
    dout = torch.randn(batch, heads, 4, 7).half()
    if what == "mask":
        mask = spread(mask, strides)
    elif what == "bias":
        inputs["bias"] = spread(inputs["bias"], strides)
    else:
        *tensors, dout = (spread(tensor, strides) for tensor in (*(inputs[name] for name in "qkv"), dout))
        inputs = dict(zip("qkv", tensors, strict=True))
    with Meter() if backend == "triton" else contextlib.nullcontext():  # fails on a 32-bit overflow
        check(backend, inputs, mask=mask, dout=dout)


def test_many_heads_of_one_token(device):
    check("torch", draw((1, 3), 4, device=device, batch=65_537, heads=1), grads=())
    check("torch", draw((1, 3), 4, device=device, batch=1, heads=65_537), grads=("q",), returns="lse")


# Edges: empty, wrong, infinite, not a number


@pytest.mark.parametrize(
    "sizes",
    [(0, 2, 5, 7, 8, 8), (2, 0, 5, 7, 8, 8), (2, 2, 0, 7, 8, 8), (2, 2, 5, 0, 8, 8), (2, 2, 0, 0, 8, 8),
     (2, 2, 5, 7, 8, 0), (0, 0, 0, 0, 8, 0)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("extra", ["", "everything"])
def test_empty(backend, device, sizes, extra):
    batch, heads, n_queries, n_keys, dim, v_dim = sizes
    bias = (1, heads, n_queries, n_keys) if extra else None
    options = {"dropout_p": 0.5, "mask": torch.ones(n_queries, n_keys, dtype=torch.bool)} if extra else {}
    inputs = {
        "q": torch.randn(batch, heads, n_queries, dim, device=device),
        "k": torch.randn(batch, heads, n_keys, dim, device=device),
        "v": torch.randn(batch, heads, n_keys, v_dim, device=device),
    }
    if bias:
        inputs["bias"] = torch.randn(bias, device=device)
    options = {name: value.to(device) if name == "mask" else value for name, value in options.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out, lse = attnk.softmax_attention(**leaves, **options, return_lse=True, backend=backend)
    assert out.shape == (batch, heads, n_queries, v_dim)
    assert lse.shape == (batch, heads, n_queries)
    assert not out.any()
    if n_keys == 0:
        assert (lse == -torch.inf).all()
    (out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum()).backward()
    for leaf in leaves.values():
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.isfinite().all()
    with torch.no_grad():
        assert attnk.softmax_attention(**leaves, **options, backend=backend).shape == out.shape


def test_empty_grid(backend, device):
    q = torch.randn(2, 2, 0, 8, device=device)
    for grid in ((0, 5), (0, 0)):
        out = attnk.softmax_attention(q, q, q, bias_table=torch.zeros(9, 2, device=device), grid=grid, backend=backend)
        assert out.shape == q.shape


def test_without_a_batch(backend, device):
    inputs = draw((17, 17), dtype=torch.float64, device=device, batch=1, bias=(2, 17, 17))
    bias = inputs.pop("bias")
    batchless = {name: tensor[0] for name, tensor in inputs.items()} | {"bias": bias}
    for returns in ("out", "lse", "both"):
        assert_matches_reference(
            fused(backend, returns, is_causal=True),
            lambda bias, **tensors: definition(returns, is_causal=True)(  # noqa: B023
                **{name: tensor[None] for name, tensor in tensors.items()}, bias=bias
            )[0],
            batchless,
            grads=("q", "k", "bias") if returns == "lse" else None,
        )
    out = attnk.softmax_attention(*(batchless[name] for name in "qkv"), backend=backend)
    assert out.shape == (2, 17, 8)


Q = torch.zeros(2, 4, 6, 8)
K = torch.zeros(2, 4, 5, 8)
B = torch.zeros(6, 5)
M = torch.ones(6, 5, dtype=torch.bool)
T = torch.zeros(15, 4)


MUST_BE_FLOAT = "must be float16, bfloat16, float32 or float64"
MUST_HAVE_AXES = r"must be \(B, heads, N, D\) or \(heads, N, D\)"
MUST_BROADCAST = r"must broadcast to \(B, heads, Nq, Nk\) = \(2, 4, 6, 5\)"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([1.0], K, K), TypeError, "q must be a tensor, got list"),
        (lambda f: f(Q, None, K), TypeError, "k must be a tensor, got NoneType"),
        (lambda f: f(Q, K, 1.0), TypeError, "v must be a tensor, got float"),
        (lambda f: f(Q[0, 0], K, K), ValueError, rf"q {MUST_HAVE_AXES}, got 2 dimensions: \(6, 8\)"),
        (lambda f: f(Q, K[None], K), ValueError, rf"k {MUST_HAVE_AXES}, got 5 dimensions: \(1, 2, 4, 5, 8\)"),
        (lambda f: f(Q, K, K[0, 0]), ValueError, rf"v {MUST_HAVE_AXES}, got 2 dimensions: \(5, 8\)"),
        (lambda f: f(Q.int(), K, K), TypeError, f"q {MUST_BE_FLOAT}, got torch.int32"),
        (lambda f: f(Q, K.bool(), K), TypeError, f"k {MUST_BE_FLOAT}, got torch.bool"),
        (lambda f: f(Q, K, K.cfloat()), TypeError, f"v {MUST_BE_FLOAT}, got torch.complex64"),
        (lambda f: f(Q.to(torch.float8_e4m3fn), K, K), TypeError, f"q {MUST_BE_FLOAT}, got torch.float8_e4m3fn"),
        (lambda f: f(Q, K.double(), K), TypeError, "k must have the dtype of q, torch.float32, got torch.float64"),
        (lambda f: f(Q, K, K.half()), TypeError, "v must have the dtype of q, torch.float32, got torch.float16"),
        (lambda f: f(Q, K.to("meta"), K), ValueError, "k must be on the device of q, cpu, got meta"),
        (lambda f: f(Q, K, K.to("meta")), ValueError, "v must be on the device of q, cpu, got meta"),
        (lambda f: f(Q, K[0], K), ValueError, r"k must have the batch of q, \(2, 4, 6, 8\), got \(4, 5, 8\)"),
        (lambda f: f(Q[0], K[0], K), ValueError, r"v must have the batch of q, \(4, 6, 8\), got \(2, 4, 5, 8\)"),
        (lambda f: f(Q, K[:1], K[:1]), ValueError, r"k must have the batch of q, .*, got \(1, 4, 5, 8\)"),
        (lambda f: f(Q[..., :0], K[..., :0], K), ValueError,
         r"q must have a head dimension of at least 1, got \(2, 4, 6, 0\)"),
        (lambda f: f(Q, K[..., :7], K), ValueError, r"k must have the head dimension of q, 8, got \(2, 4, 5, 7\)"),
        (lambda f: f(Q, K, K[:, :, :4]), ValueError,
         r"v must have the heads and tokens of k, \(2, 4, 5, 8\), got \(2, 4, 4, 8\)"),
        (lambda f: f(Q, K, K[:, :2]), ValueError, r"v must have the heads and tokens of k, .*, got \(2, 2, 5, 8\)"),
        (lambda f: f(Q, K[:, :2], K[:, :2]), ValueError,
         r"k must have the heads of q \(enable_gqa=True admits fewer\), 4, got 2"),
        (lambda f: f(Q, K[:, :3], K[:, :3], enable_gqa=True), ValueError, "k must have a divisor of .*, 4, got 3"),
        (lambda f: f(Q, K[:, :0], K[:, :0], enable_gqa=True), ValueError, "k must have a divisor of .*, 4, got 0"),
        (lambda f: f(Q[:, :2], K, K, enable_gqa=True), ValueError, "k must have a divisor of q's heads, 2, got 4"),
        (lambda f: f(Q, K, K, scale=torch.ones(())), TypeError,
         "scale must be a number, got Tensor; multiply q by a tensor instead"),
        (lambda f: f(Q, K, K, scale="1"), TypeError, "scale must be a number, got str; multiply q .*"),
        (lambda f: f(Q, K, K, dropout_p=1.5), ValueError, "dropout_p must be a number from 0 to 1, got 1.5"),
        (lambda f: f(Q, K, K, dropout_p=-0.1), ValueError, "dropout_p must be a number from 0 to 1, got -0.1"),
        (lambda f: f(Q, K, K, dropout_p=math.nan), ValueError, "dropout_p must be a number from 0 to 1, got nan"),
        (lambda f: f(Q, K, K, dropout_p=None), ValueError, "dropout_p must be a number from 0 to 1, got None"),
        (lambda f: f(Q, K, K, seed=torch.zeros(2)), ValueError,
         r"seed must be int64 of shape \(2,\), got torch.float32 of shape \(2,\)"),
        (lambda f: f(Q, K, K, seed=SEED[:1]), ValueError,
         r"seed must be int64 of shape \(2,\), got torch.int64 of shape \(1,\)"),
        (lambda f: f(Q, K, K, mask=[True]), TypeError, "mask must be a tensor, got list"),
        (lambda f: f(Q, K, K, mask=M.int()), TypeError, r"mask must be bool \(True .*\) or float, got torch.int32"),
        (lambda f: f(Q, K, K, B, B), ValueError,
         "mask must be bool where there is a bias; a float mask is a bias: add the two"),
        (lambda f: f(Q, K, K, [0.0]), TypeError, "bias must be a float16, .* or float64 tensor, got list"),
        (lambda f: f(Q, K, K, M), TypeError, "bias must be a float16, .* or float64 tensor, got torch.bool"),
        (lambda f: f(Q, K, K, B.long()), TypeError, "bias must be a float16, .* or float64 tensor, got torch.int64"),
        (lambda f: f(Q, K, K, B[:5]), ValueError, rf"bias {MUST_BROADCAST}, got \(5, 5\)"),
        (lambda f: f(Q, K, K, B[None, None, None]), ValueError, rf"bias {MUST_BROADCAST}, got \(1, 1, 1, 6, 5\)"),
        (lambda f: f(Q, K, K, B.expand(3, 1, 6, 5)), ValueError, rf"bias {MUST_BROADCAST}, got \(3, 1, 6, 5\)"),
        (lambda f: f(Q, K, K, B[:, :0]), ValueError, rf"bias {MUST_BROADCAST}, got \(6, 0\)"),
        (lambda f: f(Q, K, K, mask=M.mT), ValueError, rf"mask {MUST_BROADCAST}, got \(5, 6\)"),
        (lambda f: f(Q[0], K[0], K[0], mask=M.expand(2, 4, 6, 5)), ValueError,
         r"mask must broadcast to .* = \(1, 4, 6, 5\), got \(2, 4, 6, 5\)"),
        (lambda f: f(Q, K, K, B.to("meta")), ValueError, "bias must be on the device of q, cpu, got meta"),
        (lambda f: f(Q, K, K, mask=M.to("meta")), ValueError, "mask must be on the device of q, cpu, got meta"),
        (lambda f: f(Q, Q, Q, grid=(2, 3)), ValueError, r"grid is for a bias_table, which is None; got grid=\(2, 3\)"),
        (lambda f: f(Q, Q, Q, bias_table=T), ValueError, r"bias_table needs grid=\(height, width\), got None"),
        (lambda f: f(Q, Q, Q, bias_table=T, grid=(2, 3, 1)), ValueError, r"bias_table needs grid=.*, got \(2, 3, 1\)"),
        (lambda f: f(Q, Q, Q, bias_table=T.long(), grid=(2, 3)), TypeError,
         "bias_table must be a float16, bfloat16, float32 or float64 tensor, got torch.int64"),
        (lambda f: f(Q, Q, Q, bias_table=[T], grid=(2, 3)), TypeError, "bias_table must be a .* tensor, got list"),
        (lambda f: f(Q, K, K, bias_table=T, grid=(2, 3)), ValueError,
         r"grid must have as many places as q and k have tokens, 6 and 5, got \(2, 3\)"),
        (lambda f: f(Q, Q, Q, bias_table=T, grid=(2, 4)), ValueError, r"grid must have as .*, 6 and 6, got \(2, 4\)"),
        (lambda f: f(Q, Q, Q, bias_table=T.mT, grid=(2, 3)), ValueError,
         r"bias_table must be \(\(2 height - 1\) \(2 width - 1\), heads\) = \(15, 4\) for grid=.*, got \(4, 15\)"),
        (lambda f: f(Q, Q, Q, bias_table=T.to("meta"), grid=(2, 3)), ValueError,
         "bias_table must be on the device of q, cpu, got meta"),
        (lambda f: f(Q, K, K, backend="cuda"), ValueError,
         "backend must be one of 'auto', 'triton', 'torch', 'reference', got 'cuda'"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    for function in (attnk.softmax_attention, functools.partial(attnk.explain, "softmax_attention")):
        with pytest.raises(error, match=f"^{message}$"):
            call(function)


def test_errors_in_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        out = attnk.softmax_attention(Q, K.half(), K.double(), B.half())
        assert out.dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"^k must be float16, .*, got torch.int64$"):
            attnk.softmax_attention(Q, K.long(), K)


@pytest.mark.filterwarnings("ignore:attnk.softmax_attention runs in plain PyTorch")
def test_heads_too_wide_for_the_kernels(device):
    for dims in ((257, 8), (8, 257)):
        inputs = draw((3, 4), *dims, device=device)
        with pytest.raises(attnk.Unsupported, match="head dimension up to 256, got 257"):
            attnk.softmax_attention(**inputs, backend="triton")
        check("auto", inputs)
        check("torch", inputs, returns="both")


def spoil(inputs: Inputs, what: str) -> None:
    nan, inf = math.nan, math.inf
    place = (0, 1, 4, 3)
    if what == "nan_query":
        inputs["q"][place] = nan
    elif what == "nan_key":
        inputs["k"][place] = nan
    elif what == "nan_value":
        inputs["v"][place] = nan
    elif what == "nan_bias":
        inputs["bias"][4, 3] = nan
    elif what == "inf_query":
        inputs["q"][place] = inf
    elif what == "inf_key":
        inputs["k"][place] = -inf
    elif what == "inf_value":
        inputs["v"][place] = inf
    elif what == "both_inf_values":
        inputs["v"][0, 1, 4:6, 3] = torch.tensor([inf, -inf])
    elif what == "inf_bias":
        inputs["bias"][4, 3] = inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "what",
    ["nan_query", "nan_key", "nan_value", "nan_bias", "inf_query", "inf_key", "inf_value", "both_inf_values",
     "inf_bias"],
)  # fmt: skip
def test_nan_and_infinities(backend, device, what, dtype):
    infinite = what.startswith("inf") and what != "inf_value"
    if infinite and backend == "torch":
        pytest.skip("PyTorch's own attention on a CPU takes some rows with an infinite logit for rows without keys")
    for bias in ((17, 20), None) if "bias" not in what and backend == "torch" else ((17, 20),):
        inputs = draw(dtype=dtype, device=device, batch=1, bias=bias)
        spoil(inputs, what)
        with cut(backend, 32, 16):
            check(backend, inputs)
            if backend == "torch":
                check(backend, inputs, grads=())
            if not infinite:  # of an infinite logit, lse is NaN as well
                check(backend, inputs, returns="both", grads=())


@pytest.mark.parametrize(("layout", "dim"), [("contiguous", 7), ("channel_major", 24), ("step_2", 7)])
def test_nan_beside_the_tensors_does_not_leak(backend, device, layout, dim):
    """Rows before and behind the tokens, columns beside the head, and keys that lie beyond a block."""
    inputs = {}
    for name, tensor in draw((17, 20), dim, device=device).items():
        larger = torch.full((2, 2, 60, dim + 30), math.nan, device=device)
        inner = arranged(larger, layout)[:, :, 5 : 5 + tensor.shape[2], 3 : 3 + dim]
        inputs[name] = inner.copy_(tensor)
    bias = torch.full((40, 60), math.nan, device=device)[9:26, 7:27].copy_(torch.randn(17, 20))
    check(backend, inputs, is_causal=True, dout=torch.full((2, 2, 40, 90), math.nan)[..., 3:20, 5 : 5 + dim].copy_(
        torch.randn(2, 2, 17, dim)
    ).to(device))  # fmt: skip
    check(backend, inputs | {"bias": bias}, returns="both")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra", ["q", "bias", "negative_bias", "table"])
def test_logits_of_ten_thousand(backend, device, extra, dtype):
    grid = (4, 4) if extra == "table" else None
    inputs = draw((16, 16), dtype=dtype, device=device, bias=(16, 16) if "bias" in extra else None, grid=grid)
    if extra == "q":
        inputs["q"] *= 100
        inputs["k"] *= 30
    elif extra == "table":
        inputs["bias_table"] += 1e4
    else:
        inputs["bias"] += 1e4 if extra == "bias" else -1e4
    if extra == "q":  # without a bias, the kernels add the logarithm of the sum to the maximum, and it is lost
        results = run(backend, inputs)
        assert all(result.isfinite().all() for result in results)
        torch.testing.assert_close(results[0], softmax_attention_reference(**inputs)[0], rtol=1e-2, atol=1e-2)
        return
    check(backend, inputs, grid=grid, returns="both", lse_rounds=False)
    if backend == "torch":
        check(backend, inputs, grid=grid, grads=(), lse_rounds=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 17, 20), (2, 1, 1, 20)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_of_the_smallest_number(backend, device, is_causal, shape, dtype):
    """Additive masks as other libraries make them: rows that hide all keys are even, the gradients finite."""
    inputs = draw(dtype=dtype, device=device, heads=1, bias=shape)
    inputs["bias"].masked_fill_(torch.rand(shape, device=device) < 0.5, torch.finfo(dtype).min)
    inputs["bias"][0, :, -1] = torch.finfo(dtype).min
    ways = (("q", "k", "v"), ("q", "k", "v", "bias"), ()) if backend == "torch" else (("q", "k", "v", "bias"),)
    for grads in ways:
        check(backend, inputs, grads=grads, is_causal=is_causal, lse_rounds=False)


# Autograd


def test_gradcheck(backend, device):
    cases = [
        ({"bias": (2, 1, 4)}, {"is_causal": True}),
        ({"bias": (4, 4), "grid": (2, 2)}, {"grid": (2, 2), "dropout_p": 0.4, "seed": SEED}),
    ]
    for drawn, options in cases:
        inputs = draw((4, 4), 3, 5, torch.float64, device, batch=1, **drawn)

        def call(*tensors: torch.Tensor, names=tuple(inputs), options=options) -> Any:
            return attnk.softmax_attention(
                **dict(zip(names, tensors, strict=True)), **options, return_lse=True, backend=backend
            )

        leaves = [tensor.requires_grad_() for tensor in inputs.values()]
        torch.autograd.gradcheck(call, leaves, fast_mode=backend == "triton" and dispatch.INTERPRETED)


def test_gradcheck_of_the_definition():
    inputs = draw((4, 4), 3, 2, torch.float64, batch=1, heads=2, key_heads=1, bias=(4, 4), grid=(2, 2))
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def call(*tensors: torch.Tensor) -> Any:
        return attnk.softmax_attention(
            **dict(zip(inputs, tensors, strict=True)), grid=(2, 2), dropout_p=0.3, seed=SEED, enable_gqa=True,
            return_lse=True, backend="reference",
        )  # fmt: skip

    torch.autograd.gradcheck(call, leaves)
    torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_second_differentiation_raises(backend, device, name):
    inputs = draw((6, 6), device=device, batch=1, bias=(6, 6), grid=(2, 3))
    attention = functools.partial(attnk.softmax_attention, grid=(2, 3), backend=backend)
    leaf = inputs[name].requires_grad_()
    (grad,) = torch.autograd.grad(attention(**inputs).sum(), leaf, create_graph=True)
    message = "^attnk.softmax_attention: the fused backward cannot be differentiated again; backend='reference' "
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(grad.square().sum(), leaf)

    def once(tensor: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda tensor: attention(**{**inputs, name: tensor}).sum())(tensor).sum()

    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(once)(leaf.detach())


def test_second_differentiation_of_lse_raises(backend, device):
    q, k, v = draw((6, 6), device=device).values()
    lse = attnk.softmax_attention(q.requires_grad_(), k, v, return_lse=True, backend=backend)[1]
    (grad,) = torch.autograd.grad(lse.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        grad.sum().backward()


def test_second_derivative_of_a_sum_raises(backend, device):
    """A constant gradient of the output must not hide that the first derivative depends on q."""
    q, k, v = draw((6, 6), device=device).values()

    def attention(q: torch.Tensor) -> torch.Tensor:
        return attnk.softmax_attention(q, k, v, backend=backend).sum()

    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.functional.vhp(attention, q, torch.ones_like(q))


def test_create_graph_of_a_first_derivative(backend, device):
    inputs = draw(device=device, bias=(17, 20))
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    results = [
        torch.autograd.grad(fused(backend)(**leaves).sum(), list(leaves.values()), create_graph=create)
        for create in (False, True)
    ]
    assert_same_bits([grad.detach() for grad in results[1]], results[0])


@pytest.mark.parametrize(
    "names",
    [("q",), ("k",), ("v",), ("q", "k"), ("k", "v"), ("q", "v"), ("bias",), ("bias_table",), ("q", "bias"),
     ("v", "bias_table"), ("bias", "bias_table")],
    ids="+".join,
)  # fmt: skip
@pytest.mark.parametrize("extras", [False, True])
def test_subsets_of_gradients(backend, device, names, extras):
    if not extras and set(names) & {"bias", "bias_table"}:
        pytest.skip("no such input")
    grid = (3, 4) if extras else None
    inputs = draw((12, 12), dtype=torch.float64, device=device, heads=1, bias=(12, 12) if extras else None, grid=grid)
    check(backend, inputs, grads=names, grid=grid, returns="both")
    leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in inputs.items()}
    fused(backend, grid=grid)(**leaves).sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in names)


@pytest.mark.parametrize("extra", ["", "bias", "lse"])
def test_no_graph_where_none_is_wanted(backend, device, extra):
    inputs = draw(device=device, bias=(17, 20) if extra == "bias" else None)
    attention = fused(backend, "both" if extra == "lse" else "out")
    expected = attention(**inputs)
    assert not expected.requires_grad
    wanting = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    with torch.no_grad():
        out = attention(**wanting)
    assert not out.requires_grad
    assert torch.equal(out, expected)
    with torch.inference_mode():
        out = attention(**wanting)
        assert out.is_inference()
    assert torch.equal(out, expected)
    check(backend, inputs, grads=(), returns="both" if extra == "lse" else "out")


@pytest.mark.parametrize("extra", ["", "bias", "dropout", "table", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_for_backward(backend, device, dtype, extra):
    """Beside inputs and output, two numbers a query: nothing of N x N."""
    n_tokens, grid = 64, (8, 8) if extra == "table" else None
    inputs = draw((n_tokens, n_tokens), 16, None, dtype, device, bias=(64, 64) if extra == "bias" else None, grid=grid)
    options = {"dropout_p": 0.3, "seed": SEED.to(device)} if extra == "dropout" else {"grid": grid}
    mask = draw_mask(64, 64, device=device) if extra == "mask" else None
    saved = []
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = attnk.softmax_attention(**leaves, mask=mask, **options, backend=backend)
    known = {tensor.data_ptr() for tensor in (*leaves.values(), out, mask, options.get("seed")) if tensor is not None}
    others = [tensor for tensor in saved if tensor.data_ptr() not in known]
    assert sum(tensor.numel() * tensor.element_size() for tensor in others) <= 2 * 2 * 2 * n_tokens * 4


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "mask", "bias_table"])
def test_changed_in_place(backend, device, name):
    inputs = draw((12, 12), device=device, bias=(12, 12), grid=(3, 4))
    tensors = {key: tensor.requires_grad_() * 1 for key, tensor in inputs.items()}
    tensors["mask"] = draw_mask(12, 12, device=device)
    out = fused(backend, grid=(3, 4))(**tensors)
    tensors[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("extra", ["", "bias", "dropout", "table"])
def test_retain_graph(backend, device, extra):
    grid = (4, 5) if extra == "table" else None
    inputs = draw((20, 20), device=device, batch=1, bias=(20, 20) if extra == "bias" else None, grid=grid)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    options = {"dropout_p": 0.3} if extra == "dropout" else {"grid": grid}
    out, lse = attnk.softmax_attention(**leaves, **options, return_lse=True, backend=backend)
    douts = [torch.randn_like(out), torch.randn_like(lse)]
    wanted = list(leaves.values())
    first = torch.autograd.grad([out, lse], wanted, douts, retain_graph=True)
    assert_same_bits(first, torch.autograd.grad([out, lse], wanted, douts))


@pytest.mark.parametrize("extra", ["", "bias", "dropout", "table", "causal", "group"])
def test_repeats(backend, device, extra):
    grid = (4, 5) if extra == "table" else None
    inputs = draw(
        (20, 20), device=device, bias=(1, 20, 20) if extra == "bias" else None, grid=grid,
        key_heads=1 if extra == "group" else None,
    )  # fmt: skip
    options = {"dropout_p": 0.3, "seed": SEED} if extra == "dropout" else {"grid": grid}
    options |= {"is_causal": extra == "causal", "enable_gqa": True}
    expected = run(backend, inputs, **options)
    for _ in range(REPEATS if backend == "triton" else 20):
        assert_same_bits(run(backend, inputs, **options), expected)


@pytest.mark.parametrize("alike", ["qkv", "qk", "kv", "qv"])
@pytest.mark.parametrize("extra", ["", "bias", "dropout"])
def test_one_tensor_in_several_places(backend, device, alike, extra):
    x, y, bias = (torch.randn(2, 2, 9, 8, dtype=torch.float64, device=device) for _ in range(3))
    bias = torch.randn(9, 9, dtype=torch.float64, device=device) if extra == "bias" else None
    options = {"dropout_p": 0.3, "seed": SEED} if extra == "dropout" else {}
    keep = kept(backend, {"q": x, "k": y}, **options)

    def around(attention: Any, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return attention(**{name: x if name in alike else y for name in "qkv"}, bias=bias)

    assert_matches_reference(
        functools.partial(around, fused(backend, **options)),
        functools.partial(around, definition(keep=keep, **options)),
        {"x": x, "y": y, "bias": bias},
        grads=("x",) if alike == "qkv" else ("x", "y"),
    )


@pytest.mark.parametrize("returns", ["out", "both"])
@pytest.mark.parametrize("extra", ["", "bias", "mask"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, device, dtype, extra, returns):
    if dtype == torch.bfloat16 and backend == "triton" and dispatch.INTERPRETED:
        pytest.skip("the interpreter multiplies bit patterns of bfloat16")
    inputs = draw(device=device, bias=(17, 20) if extra == "bias" else None)
    inputs["k"] = inputs["k"].to(dtype)
    options = {"mask": draw_mask(17, 20, device=device)} if extra == "mask" else {}

    def under_autocast(attention: Any, **tensors: Any) -> torch.Tensor:
        with torch.autocast(device, dtype):
            return attention(**tensors)

    def rounded(**tensors: Any) -> torch.Tensor:
        wide = tensors["q"].dtype == torch.float64
        tensors |= {} if wide else {name: tensors[name].to(dtype) for name in "qkv"}
        return definition(returns, **options)(**tensors)

    attention = functools.partial(under_autocast, fused(backend, returns, **options))
    assert_matches_reference(attention, rounded, inputs)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out = attention(**leaves)
    assert out.dtype == (dtype if returns == "out" else torch.float32)
    out.float().square().mean().backward()
    for leaf in leaves.values():
        assert leaf.grad.dtype == leaf.dtype


def test_autocast_leaves_float64_alone(backend, device):
    with torch.autocast(device, torch.bfloat16):
        check(backend, draw(dtype=torch.float64, device=device))


def test_gradient_scaler(backend, device):
    """A step of mixed precision: scaled gradients in half precision are finite, and the weights move."""
    x = torch.randn(2, 2, 17, 8, device=device)
    weight = torch.nn.Parameter(torch.randn(8, 8, device=device))
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    with torch.autocast(device, torch.float16):
        tokens = x @ weight
        loss = attnk.softmax_attention(tokens, tokens, tokens, dropout_p=0.1, backend=backend).float().square().mean()
    scaler.scale(loss).backward()
    assert weight.grad.isfinite().all()
    before = weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(backend, device, reentrant, dropout_p):
    inputs = draw(device=device, bias=(17, 20))
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        leaves = [tensor.detach().requires_grad_() for tensor in inputs.values()]
        attention = functools.partial(attnk.softmax_attention, dropout_p=dropout_p, backend=backend)
        if recompute:
            attention = functools.partial(checkpoint.checkpoint, attention, use_reentrant=reentrant)
        out = attention(*leaves)
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert_same_bits(*results)


def test_selective_checkpoint(backend, device):
    inputs = draw(device=device)
    options = {"dropout_p": 0.3, "seed": SEED}
    seen, forward = [], torch.ops.attnk.softmax_attention_forward.default

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
        seen.append((op, context.is_recompute))
        return checkpoint.CheckpointPolicy.MUST_SAVE if op == forward else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    out = checkpoint.checkpoint(
        functools.partial(attnk.softmax_attention, **options, backend=backend), *leaves, use_reentrant=False,
        context_fn=functools.partial(checkpoint.create_selective_checkpoint_contexts, policy),
    )  # fmt: skip
    dout = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
    assert_same_bits([out.detach(), *torch.autograd.grad(out, leaves, dout)], run(backend, inputs, **options))
    assert (forward, False) in seen


def test_threads(backend, device):
    if backend == "triton" and dispatch.INTERPRETED:
        pytest.skip("the interpreter runs one kernel at a time")
    inputs = [draw((30 + i, 40), device=device, bias=(30 + i, 40)) for i in range(8)]
    options = {"dropout_p": 0.3, "seed": SEED}
    expected = [run(backend, one, **options) for one in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            results = pool.map(functools.partial(run, backend, **options), inputs)
            for result, wanted in zip(results, expected, strict=True):
                assert_same_bits(result, wanted)


# torch.compile, torch.export, torch.func

EXTRAS = {
    "plain": ({}, {}),
    "bias": ({"bias": (12, 12)}, {"is_causal": True}),
    "table": ({"grid": (3, 4)}, {"grid": (3, 4)}),
    "dropout": ({"bias": (2, 1, 12)}, {"dropout_p": 0.3, "seed": SEED}),
}
with_extras = pytest.mark.parametrize("extra", EXTRAS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@with_extras
def test_compile(backend, device, extra, fresh_dynamo):
    drawn, options = EXTRAS[extra]
    returns = "out" if extra == "plain" else "both"
    compiled = torch.compile(fused(backend, returns, **options), fullgraph=True, backend="aot_eager")
    inputs = draw((12, 12), device=device, **drawn)
    expected = definition(returns, kept(backend, inputs, **options), **options)
    assert_matches_reference(compiled, expected, inputs)
    if extra == "plain":
        assert_matches_reference(compiled, expected, inputs, grads=())
        for name in "qkv":
            inputs[name] = arranged(inputs[name], "tokens_outside")
        assert_matches_reference(compiled, expected, inputs)


def test_compile_in_a_network(backend, device, fresh_dynamo):
    def network(attention: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = x.sin() * 2
        return attention(q=x, k=x, v=x, bias=bias).cos() + x

    compiled = torch.compile(functools.partial(network, fused(backend)), fullgraph=True, backend="inductor")
    inputs = {"x": torch.randn(2, 2, 9, 8, device=device), "bias": torch.randn(2, 9, 9, device=device)}
    assert_matches_reference(compiled, functools.partial(network, definition()), inputs)


def test_compile_of_one_tensor_in_several_places(backend, device, fresh_dynamo):
    inputs = {"x": torch.randn(2, 2, 9, 8, dtype=torch.float64, device=device)}

    def around(attention: Any, x: torch.Tensor) -> torch.Tensor:
        return attention(q=x, k=x, v=x)

    compiled = torch.compile(functools.partial(around, fused(backend)), fullgraph=True, backend="aot_eager")
    assert_matches_reference(compiled, functools.partial(around, definition()), inputs)


def test_compile_draws_dropout_anew(backend, device, fresh_dynamo):
    q, k, v = (tensor.requires_grad_() for tensor in draw(device=device).values())
    compiled = torch.compile(fused(backend, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    one, other = compiled(q=q, k=k, v=v), compiled(q=q, k=k, v=v)
    torch.manual_seed(1)
    again = compiled(q=q, k=k, v=v)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("extra", ["bias", "table"])
def test_compile_dynamic_shapes(backend, device, extra, fresh_dynamo):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def around(attention: Any, x: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
        """Attention over the tokens of a map."""
        tokens = x.flatten(2).unsqueeze(1).mT
        grid = {"grid": tuple(x.shape[2:])} if extra == "table" else {}
        return attention(q=tokens, k=tokens, v=tokens, **tensors, **grid)

    attention = functools.partial(attnk.softmax_attention, backend=backend)
    compiled = torch.compile(functools.partial(around, attention), fullgraph=True, backend=counter)
    for height, width, batch in ((3, 4, 2), (5, 2, 3), (2, 7, 4)):
        inputs = {"x": torch.randn(batch, 8, height, width, dtype=torch.float64, device=device)}
        n_tokens = height * width
        name, shape = ("bias_table", ((2 * height - 1) * (2 * width - 1), 1))
        if extra == "bias":
            name, shape = "bias", (n_tokens, n_tokens)
        inputs[name] = torch.randn(shape, dtype=torch.float64, device=device)
        reference = lambda **tensors: softmax_attention_reference(**tensors)[0]  # noqa: E731
        assert_matches_reference(
            lambda **tensors: compiled(**tensors).contiguous(), functools.partial(around, reference), inputs
        )
    assert counter.frame_count <= 2


class Network(torch.nn.Module):
    def __init__(self, tensors: Inputs, **options: Any) -> None:
        super().__init__()
        self.tensors, self.names = torch.nn.ParameterDict(tensors), tuple(tensors)
        self.options = options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        tensors = {name: self.tensors[name] for name in self.names}  # torch 2.11 fails to trace **self.tensors
        return attnk.softmax_attention(q, k, v, **tensors, **self.options)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("return_lse", [False, True])
def test_export(backend, device, return_lse, strict, fresh_dynamo):
    inputs = draw((12, 10), dtype=torch.float64, device=device, bias=(2, 1, 1), batch=3)
    network = Network({"bias": inputs.pop("bias")}, backend=backend, return_lse=return_lse)
    size = torch.export.Dim
    n_keys = size("n_keys", min=2)
    shapes = {"q": {0: size("batch"), 2: size("n_queries")}, "k": {0: size("batch"), 2: n_keys}}
    exported = torch.export.export(
        network, tuple(inputs.values()), strict=strict, dynamic_shapes=shapes | {"v": shapes["k"]}
    )
    assert "attnk.softmax_attention_forward" in str(exported)
    inputs = draw((7, 15), dtype=torch.float64, device=device)
    torch.testing.assert_close(exported.module()(*inputs.values()), network(**inputs))


@pytest.mark.parametrize(("extra", "exported_with_grad"), zip(EXTRAS, (False, True, False, True), strict=True))
def test_exported_programs_train(backend, device, extra, exported_with_grad, fresh_dynamo):
    """An exported program calls the operation by itself: with grad mode on, and for its gradients."""
    drawn, options = EXTRAS[extra]
    inputs = draw((12, 12), device=device, **drawn)
    tokens = [inputs.pop(name).requires_grad_() for name in "qkv"]
    options = options | ({"seed": SEED.to(device)} if "seed" in options else {})
    network = Network(inputs, **options, return_lse=True, backend=backend)
    with torch.set_grad_enabled(exported_with_grad):
        program = torch.export.export(network, tuple(tensor.detach() for tensor in tokens)).module()
    results = []
    for module in (network, program):
        out, lse = module(*tokens)
        grads = torch.autograd.grad(out.square().sum() + lse.sum(), [*tokens, *module.parameters()])
        results.append([out.detach(), lse.detach(), *grads])
    assert_same_bits(*results)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("extra", "layout"),
    [("", "tokens_outside"), ("bias", "channel_major"), ("mask", "contiguous"), ("table", "sequence_first"),
     ("dropout", "channel_major")],
)  # fmt: skip
def test_opcheck(backend, device, extra, layout, fresh_dynamo):
    inputs = draw((4, 4), 3, None, torch.float64, device, layouts=layout, bias=(1, 2, 1, 4), grid=(2, 2))
    tensors = [
        *(inputs[name] for name in "qkv"),
        inputs["bias"] if extra == "bias" else None,
        draw_mask(1, 1, 4, 4, device=device) if extra == "mask" else None,
        inputs["bias_table"] if extra == "table" else None,
        SEED.to(device) if extra == "dropout" else None,
    ]
    options = (2 if extra == "table" else 0, 0.3, extra == "bias", 0.4 if extra == "dropout" else 0.0)
    forward, backward = (
        getattr(torch.ops.attnk, f"softmax_attention_{name}").default for name in ("forward", "backward")
    )
    for keep, wants_lse in ((True, True), (False, False)):
        torch.library.opcheck(forward, (*tensors, *options, keep, wants_lse, backend))
    out, lse, row_max, log_sum = forward(*tensors, *options, True, True, backend)
    dout = arranged(torch.randn(out.shape, dtype=out.dtype, device=device), layout)
    for needs in ((True, True), (False, False)):
        needs = (*needs, extra == "bias", extra == "table")
        arguments = (dout, lse if needs[0] else None, *tensors, out, row_max, log_sum, *options, *needs, backend)
        torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("extra", "layout"), [("dropout", "packed"), *(("plain", layout) for layout in LAYOUTS)])
def test_fake_strides_are_real_strides(backend, device, extra, layout):
    drawn, options = EXTRAS[extra]
    inputs = draw((12, 12), device=device, layouts=layout, **drawn)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}

    def results(leaves: Inputs, **options: Any) -> list[torch.Tensor]:
        outs = attnk.softmax_attention(**leaves, **options, return_lse=True, backend=backend)
        return [*outs, *torch.autograd.grad(outs[0].sum() + outs[1].sum(), list(leaves.values()))]

    real = results(leaves, **options)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = {name: mode.from_tensor(leaf).detach().requires_grad_() for name, leaf in leaves.items()}
        options = options | ({"seed": mode.from_tensor(SEED.to(device))} if "seed" in options else {})
        fake = results(fakes, **options)
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@with_extras
def test_func_grad(backend, device, extra):
    drawn, options = EXTRAS[extra]
    inputs = draw((12, 12), device=device, **drawn)
    keep = kept(backend, inputs, **options)

    def gradients(attention: Any, **tensors: torch.Tensor) -> torch.Tensor:
        grads = torch.func.grad(lambda tensors: attention(**tensors).square().sum())(tensors)
        return torch.cat([grad.flatten() for grad in grads.values()])

    assert_matches_reference(
        functools.partial(gradients, fused(backend, "both", **options)),
        functools.partial(gradients, definition("both", keep, **options)),
        inputs,
        grads=(),
    )


def with_mask(tensors: Inputs) -> Inputs:
    """The tensors with the mask, which came as numbers so that it may stand among the inputs, as a mask."""
    return tensors | ({"mask": tensors["mask"] > 0} if "mask" in tensors else {})


VMAPS = {
    "q": {"q": 0},
    "q and k": {"q": 0, "k": 2},
    "all": {"q": 1, "k": 0, "v": 3},
    "v": {"v": 0},
    "bias": {"bias": 0},
    "q and bias": {"q": 1, "bias": 0},
    "mask": {"mask": 2},
    "q and mask": {"q": 4, "mask": 0},
    "table": {"bias_table": 0},
    "everything": {"q": 0, "k": 0, "v": 0, "bias": 0, "mask": 0, "bias_table": 0},
}


@pytest.mark.parametrize(
    ("mapped", "extras"),
    [
        *((mapped, "what is mapped") for mapped in VMAPS),
        ("q", "shared by the batch"),
        ("all", "shared by the batch"),
        ("all", "one an image"),
        ("q and bias", "one an image"),
        ("q", "dropout"),
    ],
)
def test_vmap(backend, device, mapped, extras):
    dims = VMAPS[mapped]
    batch = 2 if extras == "one an image" else 1
    n_bias = (batch, 2, 6, 6) if extras == "one an image" else (6, 6)
    inputs = draw((6, 6), 4, None, torch.float64, device, batch=batch, bias=n_bias, grid=(2, 3))
    inputs["mask"] = draw_mask(*n_bias, device=device).double()
    names = (
        set(dims) | {"q", "k", "v"} | ({"bias", "mask"} if extras in ("shared by the batch", "one an image") else set())
    )
    inputs = {name: tensor for name, tensor in inputs.items() if name in names}
    for name, dim in dims.items():
        one = inputs[name]
        inputs[name] = torch.stack([one, one.flip(-1)], dim)
    options = {"grid": (2, 3)} if "bias_table" in inputs else {}
    if extras == "dropout":
        options |= {"dropout_p": 0.4, "seed": SEED}
    in_dims = tuple(dims.get(name) for name in inputs)
    first = {
        name: tensor if dims.get(name) is None else tensor.select(dims[name], 0) for name, tensor in inputs.items()
    }
    keep = kept(backend, first, **options)

    def called(attention: Any) -> Callable[..., torch.Tensor]:
        return lambda *tensors: attention(**with_mask(dict(zip(inputs, tensors, strict=True))))

    ours = called(fused(backend, "both", **options))
    theirs = called(definition("both", keep, **options))
    assert_matches_reference(
        lambda **tensors: torch.vmap(ours, in_dims)(*tensors.values()),
        lambda **tensors: one_by_one(in_dims, theirs, *tensors.values()),
        inputs,
        grads=[name for name in inputs if name != "mask"],
    )


def test_vmap_without_a_batch(backend, device):
    inputs = draw(device=device)
    assert_matches_reference(
        lambda q, k, v: torch.vmap(functools.partial(attnk.softmax_attention, backend=backend))(q, k, v),
        definition(),
        inputs,
    )


def test_vmap_draws_no_dropout_unasked(backend, device):
    q, k, v = draw(device=device).values()
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(functools.partial(attnk.softmax_attention, dropout_p=0.3, backend=backend))(q, k, v)


@pytest.mark.parametrize("mapped", ["q", "all", "everything"])
def test_vmap_of_grad(backend, device, mapped):
    """Gradients an example, as differentially private training wants them."""
    dims = VMAPS[mapped]
    inputs = draw((6, 6), 4, None, torch.float64, device, batch=1, heads=1, bias=(6, 6), grid=(2, 3))
    inputs["mask"] = draw_mask(6, 6, device=device).double()
    for name, dim in dims.items():
        one = inputs[name]
        inputs[name] = torch.stack([one, one.flip(-1)], dim)
    in_dims = tuple(dims.get(name) for name in inputs)
    wanted = tuple(range(5))

    def gradients(attention: Any, *tensors: torch.Tensor) -> torch.Tensor:
        def loss(*tensors: torch.Tensor) -> torch.Tensor:
            return attention(**with_mask(dict(zip(inputs, tensors, strict=True)))).square().sum()

        return torch.cat([grad.flatten() for grad in torch.func.grad(loss, wanted)(*tensors)])

    ours = functools.partial(gradients, fused(backend, grid=(2, 3)))
    theirs = functools.partial(gradients, definition(grid=(2, 3)))
    assert_matches_reference(
        lambda **tensors: torch.vmap(ours, in_dims)(*tensors.values()),
        lambda **tensors: one_by_one(in_dims, theirs, *tensors.values()),
        inputs,
        grads=(),
    )


@pytest.mark.parametrize("position", range(4))
def test_jacrev(backend, device, position):
    inputs = draw((2, 2), 2, None, torch.float64, device, batch=1, heads=1, bias=(2, 2))
    ours = lambda *tensors: fused(backend)(**dict(zip(inputs, tensors, strict=True)))  # noqa: E731
    theirs = lambda *tensors: definition()(**dict(zip(inputs, tensors, strict=True)))  # noqa: E731
    assert_matches_reference(
        lambda **tensors: torch.func.jacrev(ours, position)(*tensors.values()).contiguous(),
        lambda **tensors: torch.func.jacrev(theirs, position)(*tensors.values()).contiguous(),
        inputs,
        grads=(),
    )


def test_forward_mode_raises(backend, device):
    q, k, v = draw(device=device).values()
    attention = functools.partial(attnk.softmax_attention, k=k, v=v, backend=backend)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(attention, (q,), (torch.ones_like(q),))
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        attention(forward_ad.make_dual(q, torch.ones_like(q)))


def test_traces_take_other_sizes():
    for drawn in ({}, {"bias": (2, 1, 1)}):
        for grad in (False, True):
            tensors = [tensor.requires_grad_(grad) for tensor in draw(**drawn).values()]
            call = lambda *tensors: attnk.softmax_attention(*tensors, is_causal=True)  # noqa: E731
            traced = torch.jit.trace(call, tensors)
            other = draw((31, 24), batch=3, **drawn)
            torch.testing.assert_close(traced(*other.values()), call(*other.values()))


def test_meta_tensors():
    leaves = {name: tensor.to("meta").requires_grad_() for name, tensor in draw((12, 12), bias=(12, 12)).items()}
    out, lse = attnk.softmax_attention(**leaves, is_causal=True, return_lse=True)
    (out.sum() + lse.sum()).backward()
    assert out.shape == leaves["q"].shape
    assert lse.shape == (2, 2, 12)
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values())
    assert attnk.explain("softmax_attention", *leaves.values()).reason == "x lies on the meta device"


@pytest.mark.parametrize(
    "names", [(), ("q",), ("k",), ("v",), ("q", "k"), ("q", "k", "v"), ("bias",), ("q", "k", "v", "bias")], ids="+".join
)
def test_flops(backend, device, names):
    inputs = draw((12, 20), 8, 24, device=device, bias=(12, 20))
    leaves = {name: tensor.requires_grad_(name in names) for name, tensor in inputs.items()}
    with FlopCounterMode(display=False) as forward:
        out = fused(backend)(**leaves)
    with FlopCounterMode(display=False) as backward:
        if names:
            out.sum().backward()
    products = {"logits": 8, "dweights": 24, "dq": 8 * ("q" in names), "dkv": 32 * (len({"k", "v"} & set(names)) > 0)}
    expected = sum(products.values()) if names else 0
    unit = 2 * 2 * 2 * 12 * 20
    assert forward.get_total_flops() == unit * (8 + 24)
    assert backward.get_total_flops() == unit * expected


# Dispatch


def test_explain(device):
    inputs = draw(device=device)
    explanation = attnk.explain("softmax_attention", **inputs, backend="torch")
    assert (explanation.backend, explanation.reason, explanation.config) == ("torch", "asked for", None)
    tuning = pytest.importorskip("attnk.kernels.tuning")
    configs = [tuning.SoftmaxAttentionConfig(*[tuning.Tile(size, size, 4, 1)] * 4) for size in (16, 32, 64)]
    rows = [
        tuning.SoftmaxAttentionRow(2, 256, True, configs[0]),
        tuning.SoftmaxAttentionRow(8, 64, False, configs[1]),
        tuning.SoftmaxAttentionRow(8, 256, True, configs[2]),
    ]
    bias, wide = torch.zeros(17, 20, device=device), draw((17, 20), 8, 65, device=device)
    half = {name: tensor.half() for name, tensor in inputs.items()}
    with mock.patch.dict(tuning.SOFTMAX_ATTENTION_TABLE, default=tuple(rows), clear=True):
        for tensors, options, expected in (
            (half, {}, configs[0]),
            (inputs, {}, configs[1]),
            (inputs, {"return_lse": True}, configs[1]),
            (inputs, {"bias": bias}, configs[2]),
            (inputs, {"mask": bias == 0}, configs[2]),
            (inputs, {"dropout_p": 0.1}, configs[2]),
            (wide, {}, configs[2]),
        ):
            explanation = attnk.explain("softmax_attention", **tensors, **options, backend="triton")
            assert explanation.config is expected
            launched = []

            def noted(*args: Any, launched: list = launched, **kwargs: Any) -> Any:
                launched.append(tuning.softmax_attention_config(*args, **kwargs))
                return launched[-1]

            with mock.patch(f"{KERNELS}.common.softmax_attention_config", noted):
                attnk.softmax_attention(**tensors, **options, backend="triton")
            assert launched == [expected], "explain and the launch must agree"


def test_plain_calls_are_handed_to_pytorch_where_that_is_faster():
    tuning = pytest.importorskip("attnk.kernels.tuning")
    with torch._subclasses.FakeTensorMode():
        table = {"default": (tuning.SdpaRow(itemsize=2, head_dim=128, tokens=1024, source="results.json"),)}
        with (
            mock.patch.object(tuning, "SDPA_TABLE", table),
            mock.patch.object(torch.cuda, "is_available", return_value=False),
        ):

            def explained(n_tokens: int = 1024, dim: int = 128, dtype: Any = torch.float16, **options: Any) -> Any:
                q = torch.empty(1, 2, n_tokens, dim, dtype=dtype, device="cuda")
                v = torch.empty(1, 2, n_tokens, options.pop("v_dim", dim), dtype=dtype, device="cuda")
                return attnk.explain("softmax_attention", q, q, v, **options)

            assert explained().backend == "torch"
            assert explained().reason == "PyTorch's own attention is faster here (results.json)"
            bias = torch.empty(1024, 1024, device="cuda")
            for options in (
                {"n_tokens": 1023}, {"dim": 64}, {"dtype": torch.float32}, {"v_dim": 136}, {"bias": bias},
                {"mask": bias == 0}, {"dropout_p": 0.1}, {"return_lse": True},
            ):  # fmt: skip
                assert explained(**options).backend == "triton", options
                assert explained(**options).reason == "the kernels support this call"
            assert explained(backend="triton").backend == "triton"


def test_example(device):
    for channels_last in (False, True):
        tensors = operation.example([2, 4, 10, 8], torch.float16, torch.device(device), channels_last)
        for tensor in tensors:
            assert tensor.shape == (2, 4, 10, 8)
            assert tensor.transpose(1, 2).is_contiguous() == channels_last
        assert attnk.explain("softmax_attention", *tensors, backend="torch").backend == "torch"


# Bytes and memory


def expected_bytes(
    inputs: Inputs, mask: torch.Tensor | None, dropout: bool, keep: bool, lse: bool, slabs: int
) -> dict[str, tuple[int, int]]:
    """The closed formula in the docstring of ``attnk.kernels.softmax_attention``: loaded and stored, by kernel."""
    q, k, v = (inputs[name] for name in "qkv")
    n_rows, acc = q[..., 0].numel(), 8 if q.dtype == torch.float64 else 4
    bias, table = inputs.get("bias"), inputs.get("bias_table")
    stats = n_rows * acc
    s = 1 if bias is None and table is None else 2
    o_bytes = n_rows * v.shape[-1] * v.element_size()
    qkv = q.nbytes + k.nbytes + v.nbytes
    extras = sum(extra.numel() * extra.element_size() for extra in (bias, table) if extra is not None)
    if mask is not None:
        extras += mask.numel() * (4 if q.dtype == torch.float64 else 1)
    extras += 16 * dropout  # seed and offset
    counts = {"fwd": (qkv + extras, o_bytes + keep * s * stats + lse * stats)}
    if not keep:
        return counts
    counts["bwd_dq"] = (2 * o_bytes + lse * stats + qkv + s * stats + extras, stats + q.nbytes)
    counts["bwd_dkv"] = (qkv + o_bytes + (s + 1) * stats + extras, k.nbytes + v.nbytes)
    if bias is not None:
        sums_queries = bias.shape[-2] == 1 < q.shape[2]
        partial = bias.numel() * (bias.element_size() if slabs == 1 and not sums_queries else acc * slabs)
        if sums_queries:
            partial *= -(-q.shape[2] // 16)
        counts["bwd_dbias"] = (qkv + o_bytes + 3 * stats + extras, partial)
    return counts


@needs_interpreter
@pytest.mark.parametrize(
    "case",
    pairwise(
        tokens=((17, 20), (16, 16), (1, 20), (32, 1)),
        dims=((8, 8), (24, 40), (59, 16)),
        dtype=DTYPES,
        bias=(None, (2, 4, None, None), (1, 4, None, None), (2, 1, 1, None), (1, 1, None, None)),
        mask=(False, True),
        dropout=(False, True),
        key_heads=(1, 2, 4),
        keep=(True, True, False),
        lse=(False, True),
        layout=("contiguous", "packed", "channel_major", "step_2"),
    ),
)
def test_bytes_are_the_formula(kernels, case, monkeypatch):
    n_queries, n_keys = case["tokens"]
    sizes = (2, 4, n_queries, n_keys)
    bias = case["bias"] and tuple(
        full if size is None else size for size, full in zip(case["bias"], sizes, strict=True)
    )
    inputs = draw(
        case["tokens"], *case["dims"], case["dtype"], heads=4, key_heads=case["key_heads"], bias=bias,
        layouts=case["layout"],
    )  # fmt: skip
    mask = draw_mask(n_queries, n_keys) if case["mask"] else None
    leaves = {name: tensor.detach().requires_grad_(case["keep"]) for name, tensor in inputs.items()}
    options = {"dropout_p": 0.3, "seed": SEED} if case["dropout"] else {}
    monkeypatch.setattr(f"{KERNELS}.backward.DBIAS_PROGRAMS", 1)
    with cut("triton", 16, 16), Meter() as meter:
        out, lse = attnk.softmax_attention(
            **leaves, mask=mask, **options, enable_gqa=True, return_lse=True, backend="triton"
        )
        if not case["lse"]:
            meter.launches.clear()
            out = attnk.softmax_attention(**leaves, mask=mask, **options, enable_gqa=True, backend="triton")
        if case["keep"]:
            (out.sum() + lse.sum() if case["lse"] else out.sum()).backward()
    launches = {one.kernel.removeprefix("_softmax_attention_").removesuffix("_kernel"): one for one in meter.launches}
    assert len(launches) == len(meter.launches)
    expected = expected_bytes(inputs, mask, case["dropout"], case["keep"], case["lse"], slabs=1)
    assert {name: (one.loaded, one.stored) for name, one in launches.items()} == expected
    for one in launches.values():
        assert one.atomics == 0
        assert one.store_lanes == one.stored


@needs_interpreter
@pytest.mark.parametrize(("programs", "scratch_rows"), [(1, 10**6), (10**6, 2)])
def test_bytes_of_the_bias_table(kernels, programs, scratch_rows, monkeypatch):
    height, width, batch, heads = 5, 3, 3, 2
    n_tokens = height * width
    monkeypatch.setattr(f"{KERNELS}.backward.DBIAS_SCRATCH_BYTES", scratch_rows * heads * width * n_tokens * 4)
    monkeypatch.setattr(f"{KERNELS}.backward.DBIAS_PROGRAMS", programs)
    monkeypatch.setattr(f"{KERNELS}.common.DENSE_TABLE_BYTES", 0)
    inputs = draw((n_tokens, n_tokens), batch=batch, heads=heads, grid=(height, width))
    table = inputs["bias_table"].requires_grad_()
    with cut("triton", 16, 16), Meter() as meter:
        out = attnk.softmax_attention(**inputs, grid=(height, width), backend="triton")
        out.sum().backward()
    names = [one.kernel.removeprefix("_softmax_attention_").removesuffix("_kernel") for one in meter.launches]
    chunks = -(-height // min(scratch_rows, height))
    slabs = {1: 1, 10**6: batch}[programs]
    assert names == ["fwd", "bwd_dq", *["bwd_dbias", "bwd_dtable"] * chunks]
    forward, delta, *rest = meter.launches
    stats = 4 * batch * heads * n_tokens
    assert forward.loaded == 3 * out.nbytes + table.nbytes
    assert forward.stored == out.nbytes + 2 * stats
    assert (delta.loaded, delta.stored) == (2 * out.nbytes, stats)
    dlogits = slabs * heads * n_tokens**2 * 4
    assert sum(one.stored for one in rest[::2]) == dlogits
    assert max(one.stored for one in rest[::2]) <= slabs * min(scratch_rows, height) * heads * width * n_tokens * 4
    assert sum(one.loaded for one in rest[1::2]) == dlogits + (chunks - 1) * table.nbytes
    assert all(one.stored == one.store_lanes == table.nbytes for one in rest[1::2])


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_bytes_of_a_dense_bias_table(kernels, dtype, monkeypatch):
    """It is written once a pass, and then read as a bias is, up to the size that the tuning tables name."""
    height, width, batch, heads = 5, 3, 3, 2
    n_tokens = height * width
    inputs = draw((n_tokens, n_tokens), dtype=dtype, batch=batch, heads=heads, grid=(height, width))
    table = inputs["bias_table"].requires_grad_()
    size = heads * n_tokens**2 * dtype.itemsize
    for limit in (size, size - 1):
        monkeypatch.setattr(f"{KERNELS}.common.DENSE_TABLE_BYTES", limit)
        with cut("triton", 16, 16), Meter() as meter:
            out = attnk.softmax_attention(**inputs, grid=(height, width), backend="triton")
            out.sum().backward()
        dense = [one for one in meter.launches if "dense_table" in one.kernel]
        assert len(dense) == 2 * (limit == size)
        for one in dense:
            assert (one.loaded, one.stored) == (table.nbytes, size)
        forward = next(one for one in meter.launches if "fwd" in one.kernel)
        assert forward.loaded == 3 * out.nbytes + (size if dense else table.nbytes)


@needs_interpreter
def test_causal_attention_reads_what_it_sees(kernels):
    """Of keys and values that no query sees nothing is read, and programs of early queries stop early."""
    inputs = draw((16, 64), 16, batch=1, heads=1)
    with cut("triton", 16, 16), Meter() as meter:
        run("triton", inputs, is_causal=True)
    seen = {name: inputs[name].nbytes // (4 if name in "kv" else 1) for name in "qkv"}
    assert meter.launches[0].loaded == sum(seen.values())
    assert meter.launches[1].loaded == sum(seen.values()) + 2 * inputs["q"].nbytes + 4 * 16
    inputs = draw((64, 64), 16, batch=1, heads=1)
    lanes = []
    for is_causal in (False, True):
        with cut("triton", 16, 16), Meter() as meter:
            run("triton", inputs, is_causal=is_causal)
        lanes.append([launch.load_lanes for launch in meter.launches])
    for whole, causal in zip(*lanes, strict=True):
        assert causal < 0.8 * whole


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes of CPU memory allocated at once during a call; what it returns is among them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        held = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del held
    return max(itertools.accumulate(sizes, initial=0))


LONG = {
    "plain": ({}, {}),
    "values_of_another_width": ({"v_dim": 12}, {}),
    "causal": ({}, {"is_causal": True}),
    "bias": ({"bias": (1, 4096)}, {}),
    "mask": ({}, {"mask": True}),
    "causal_mask": ({}, {"mask": True, "is_causal": True}),
    "table": ({"grid": (64, 64)}, {"grid": (64, 64)}),
    "dropout": ({}, {"dropout_p": 0.1}),
    "channel_major": ({"layouts": "channel_major"}, {}),
}


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("case", LONG)
def test_memory_without_logits(case, mode):
    """4096 tokens have 64 MiB of logits, of which PyTorch's path holds a few blocks."""
    drawn, options = LONG[case]
    inputs = draw((4096, 4096), 8, batch=1, heads=1, **drawn)
    if "mask" in options:
        options = options | {"mask": draw_mask(1, 4096)}
    for tensor in inputs.values():
        tensor.requires_grad_(mode == "training")

    def call() -> Any:
        out = attnk.softmax_attention(**inputs, **options, backend="torch")
        return (out, torch.autograd.grad(out, list(inputs.values()), out)) if mode == "training" else out

    assert peak_memory(call) < 32 * 2**20


@needs_interpreter
def test_memory_of_the_kernels(kernels):
    """What launches allocate grows with the tokens, and not with their square."""
    inputs = draw((256, 256), 16, bias=(1, 256))
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def call() -> Any:
        out = attnk.softmax_attention(*leaves, dropout_p=0.1, backend="triton")
        return out, torch.autograd.grad(out, leaves, out)

    with cut("triton", 128, 128):
        assert peak_memory(call) < 0.4 * (2 * 2 * 256 * 256 * 4)
