"""Every operation of kernels.py, each backend of it, against the float64 math of reference.py.

With a GPU the Triton kernels run compiled, in every dtype and at real sizes. Without one they run in Triton's
interpreter at small sizes (attention not in bf16, as its bf16 product is wrong), and are compiled for GPUs that are
not there:

    python -m tests.benchmark --registers        compiles all, for six cards

Random search has a fixed seed. To search on with fresh examples, a thousand a test:

    pytest tests/test_kernels.py --hypothesis-profile=fresh

Rounding errors are in proportion to the terms of a sum, so an error may be, times the size of the terms,
    TERMS[dtype] units of the dtype: the weights, the gradients of the scores and the result are each rounded to it
        once, and in fp32 the sum itself as it grows,
    and four times the rounding of the largest score, since a weight is wrong by as much: the score and the logsumexp
        it is held against are each rounded, and the backward computes both again; and once for every eight of the D
        products in it, which where all are equal round the same way (measured: 2.2 times the allowance without). Scores are kept in fp32, only
        PyTorch's backward may have them in the dtype of its inputs.
"""
from __future__ import annotations

import contextlib
import copy
import doctest
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import benchmark
import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import tokenizer
import var
from kernels import KeyRanges

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OLD_GPU = GPU and torch.cuda.get_device_capability() < (8, 0)   # ours never run there, and attention's do not fit
BACKENDS = ["torch", "triton"] if kernels.HAS_TRITON and not OLD_GPU else ["torch"]
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}   # half the gap after 1
TERMS = {torch.float32: 64, torch.float16: 8, torch.bfloat16: 8}
VAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)   # 680 tokens: the published models at 256 x 256

FRESH = settings().max_examples >= 1000   # the profile "fresh" of conftest.py
draws = settings(max_examples=1000 if FRESH else 200 if GPU else 6, derandomize=not FRESH, deadline=None, database=None,
                 suppress_health_check=list(HealthCheck))
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed, or not for this GPU")


def dtypes(backend: str) -> list[torch.dtype]:
    return [torch.float32, torch.float16] if backend == "triton" and not GPU else list(UNIT)


def operation(name: str, backend: str):
    return getattr(kernels, f"{name}_{backend}")


def values(rng: np.random.Generator, pattern: str, shape: tuple[int, ...]) -> np.ndarray:
    return {"normal": lambda: rng.standard_normal(shape),
            "large": lambda: 8 * rng.standard_normal(shape),
            "tiny": lambda: 1e-3 * rng.standard_normal(shape),
            "ties": lambda: rng.integers(-1, 2, shape).astype(float),
            "equal": lambda: np.full(shape, 0.75)}[pattern]()


patterns = st.sampled_from(["normal", "large", "tiny", "ties", "equal"])


def on_device(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(array, dtype=dtype, device=DEVICE)


def double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


@pytest.fixture(autouse=True, scope="module")
def nothing_outside_is_touched():
    """In the interpreter all that a kernel loads and stores lies in an array that it was started on."""
    if GPU or not kernels.HAS_TRITON:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    arrays: list[tuple[int, int]] = []   # their first bytes, and the first ones after them
    start, load, store = kernels.run_kernel, Builder.create_masked_load, Builder.create_masked_store

    def noted(kernel, programs, tensors, *rest):
        arrays.clear()
        for x in tensors:
            numbers = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
            arrays.append((x.data_ptr(), x.data_ptr() + numbers * x.element_size()))
        start(kernel, programs, tensors, *rest)

    def check(pointers, mask):
        touched = pointers.data[mask.data]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        if len(touched):
            assert any(begin <= touched.min() and touched.max() + size <= end for begin, end in arrays)

    def checked_load(builder, pointers, mask, *rest):
        check(pointers, mask)
        return load(builder, pointers, mask, *rest)

    def checked_store(builder, pointers, value, mask, *rest):
        check(pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "run_kernel", noted)
        patch.setattr(Builder, "create_masked_load", checked_load)
        patch.setattr(Builder, "create_masked_store", checked_store)
        yield


@contextlib.contextmanager
def poisoned():
    """Memory that nothing was written to yet holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_close(got: dict, value: dict, size: dict, dtype: torch.dtype, score_error: float = 0.0) -> None:
    for name in value:
        unit = TERMS[dtype] * UNIT[dtype] + 4 * score_error
        allowed = unit * size[name] + torch.finfo(dtype).smallest_normal
        excess = np.abs(double(got[name]) - value[name]) / allowed
        assert np.all(excess <= 1), f"{name}: {np.nanmax(excess):.3g} times the error allowed, NaN: {np.isnan(excess).any()}"


# ---------------------------------------------------------------------------------------------------------------
# Attention


@st.composite
def key_ranges(draw) -> KeyRanges:
    if draw(st.booleans()):
        sides = st.integers(1, 16 if GPU else 4)
        scales = [1] + sorted(draw(st.lists(sides, max_size=6 if GPU else 4)))
        ranges = KeyRanges.from_scales(scales, draw(st.sampled_from([None, 1, 2])))
        begin = draw(st.integers(0, len(ranges) - 1)) if draw(st.booleans()) else 0
        return ranges.rows(begin, draw(st.integers(begin + 1, len(ranges))) if begin else len(ranges))
    L = draw(st.integers(1, 300 if GPU else 40))
    steps = st.lists(st.sampled_from([0, 0, 0, 1, 2, 9]), min_size=L, max_size=L)
    first, width = np.cumsum(draw(steps)), draw(st.lists(st.integers(1, 40), min_size=L, max_size=L))
    return KeyRanges(first, np.maximum.accumulate(first + width))


def heads(rng, pattern: str, layout: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """[B, H, n, D] in one of the ways its memory may be laid out."""
    B, H, n, D = shape
    if layout == "BHLD":
        return on_device(values(rng, pattern, (B, H, n, D)), dtype)
    if layout == "BLHD":
        return on_device(values(rng, pattern, (B, n, H, D)), dtype).transpose(1, 2)
    if layout == "expanded":   # the strides of one token, that all have
        return on_device(values(rng, pattern, (B, H, 1, D)), dtype).expand(B, H, n, D)
    if layout == "padded":   # rows that begin at no multiple of 8
        return on_device(values(rng, pattern, (B, n, H, D + 1)), dtype)[..., :D].transpose(1, 2)
    if layout == "packed":
        return on_device(values(rng, pattern, (B, n, 3, H, D)), dtype)[:, :, 1].transpose(1, 2)
    return on_device(values(rng, pattern, (B, H, D, n)), dtype).mT


def check_block_attention(backend, ranges, S, shape, dtype, scale=0.2, pattern="normal", layout="BLHD", seed=0):
    B, H, D = shape
    rng = np.random.default_rng(seed)
    q, k, v = (heads(rng, pattern, layout, (B, H, n, D), dtype).requires_grad_() for n in (len(ranges), S, S))
    do = heads(rng, "normal" if pattern == "equal" else pattern, layout, (B, H, len(ranges), D), dtype)
    with poisoned():
        o = operation("block_attention", backend)(q, k, v, ranges, scale)
        got = dict(zip(("o", "dq", "dk", "dv"), (o, *torch.autograd.grad(o, (q, k, v), do))))
    for name in ("o", "dq") if backend == "triton" else ():
        assert got[name].transpose(1, 2).is_contiguous()   # so that joining the heads is a view
    value, size = reference.attention(*map(double, (q, k, v)), ranges.first, ranges.last, scale, double(do))
    score = scale * (np.abs(double(q)) @ np.abs(double(k)).swapaxes(2, 3)).max() * (1 + D / 32)
    assert all(tensor.dtype == dtype for tensor in got.values())
    assert_close(got, value, size, dtype, score * UNIT[torch.float32 if backend == "triton" else dtype])


@contextlib.contextmanager
def attention_tiles(tiles: tuple[int, int] | None):
    """Tiles smaller than any that is offered meet more range ends in fewer tokens."""
    offered = dict(kernels.ATTENTION_TILES)
    if tiles:
        kernels.ATTENTION_TILES.update({name: 4 * [(*tiles, 4, 1)] for name in offered})
    try:
        yield
    finally:
        kernels.ATTENTION_TILES.update(offered)


widths_and_tiles = st.tuples(st.sampled_from([16, 17, 64, 72, 80, 128]),
                             st.sampled_from([None, (16, 16), (16, 32), (32, 16)]))
if GPU:   # each of these is compiled for itself, and minutes go by
    widths_and_tiles = st.sampled_from([(16, (16, 16)), (17, (16, 32)), (64, None), (72, (32, 16)), (80, (16, 16)),
                                        (128, None)])


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@draws
def test_attention_and_its_gradients(backend, data):
    draw = data.draw
    ranges = draw(key_ranges())
    B, H = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    D, tiles = draw(widths_and_tiles)
    with attention_tiles(tiles):
        check_block_attention(backend, ranges, ranges.last[-1] + draw(st.sampled_from([0, 0, 1, 30])), (B, H, D),
                              draw(st.sampled_from(dtypes(backend))), draw(st.sampled_from([0.03, 0.25, 1.0])),
                              draw(patterns), draw(st.sampled_from(["BHLD", "BLHD", "packed", "BHDL", "expanded"])),
                              draw(st.integers(0, 99)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_at_the_length_of_the_published_models(backend):
    ranges = KeyRanges.from_scales(VAR_SCALES, last_scales=None if GPU else 2)   # 2: tiles are cut on both sides
    for dtype in dtypes(backend)[:None if GPU or backend == "torch" else 1]:
        with attention_tiles(None if GPU else (128, 64)):   # few, as the interpreter takes as long for any
            check_block_attention(backend, ranges, len(ranges), (2, 4, 64) if GPU else (1, 1, 16), dtype)
            check_block_attention(backend, KeyRanges([0, 0], [4, 9]), 9, (1, 1, 16), dtype)   # more keys than queries


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.03, 1.0])
def test_products_of_any_size_make_weights(backend, scale):
    """Of several hundred: what is taken off before 2^x is the largest score, and not the largest product."""
    for dtype in dtypes(backend):
        check_block_attention(backend, KeyRanges.from_scales((1, 2, 4)), 21, (1, 2, 64), dtype, scale, "large")


@needs_triton
@pytest.mark.parametrize("layout, D", [("padded", 16), ("BHDL", 17)])
def test_rows_may_begin_anywhere_and_be_columns(layout, D):
    check_block_attention("triton", KeyRanges.from_scales((1, 2)), 5, (1, 2, D), torch.float32, layout=layout)


@needs_triton
def test_large_gradients_overflow_nowhere_inside_in_fp16():
    """As those of a scaled loss. All values are the same, so that weights have no gradient."""
    q, k = torch.randn(2, 1, 2, 5, 16, device=DEVICE).half().requires_grad_()
    v = torch.full_like(q, 300.0)
    o = kernels.block_attention_triton(q, k, v, KeyRanges.from_scales((1, 2)), 1.0)
    assert not any(x.any() for x in torch.autograd.grad(o, (q, k), v))


@needs_triton
def test_tiles_out_of_range_are_not_visited():
    """Were a weight of 0 multiplied with their values, NaN would come out."""
    ranges = KeyRanges.from_scales((4, 4, 4), last_scales=1)
    q, k, v = (torch.randn(1, 2, 48, 16, device=DEVICE) for _ in range(3))
    k[:, :, :16], v[:, :, 32:] = torch.nan, torch.nan
    with attention_tiles((16, 16)):
        o = kernels.block_attention_triton(q, k, v, ranges, 1.0)
    assert o[:, :, 16:32].isfinite().all() and o[:, :, :16].isnan().all() and o[:, :, 32:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_unused_end_of_a_cache_may_hold_anything(backend):
    ranges = KeyRanges.from_scales((1, 2, 3)).rows(1, 5)
    q, k, v = (torch.randn(1, 2, n, 16, device=DEVICE) for n in (4, 14, 14))
    k[:, :, 5:], v[:, :, 5:] = torch.nan, torch.inf
    assert operation("block_attention", backend)(q, k, v, ranges, 1.0).isfinite().all()


@pytest.mark.parametrize("last_scales", [None, 1, 2])
@pytest.mark.parametrize("begin, end", [(0, 30), (5, 14), (14, 30)])
def test_the_transposed_table_is_the_transposed_mask(begin, end, last_scales):
    ranges = KeyRanges.from_scales((1, 2, 3, 4), last_scales).rows(begin, end)
    cpu = torch.device("cpu")
    first_L, last_L = ranges.cached(kernels.table, cpu)
    first_S, last_S = ranges.cached(kernels.transposed_table, cpu)
    queries = torch.arange(len(ranges))
    assert torch.equal(((queries >= first_S[:, None]) & (queries < last_S[:, None])).T, ranges.dense())
    assert ranges.cached(kernels.table, cpu)[0] is first_L   # made once


def test_a_table_is_made_once():
    """So that a second generation makes and copies none."""
    ranges = KeyRanges.from_scales((1, 2, 3))
    assert ranges.rows(1, 5) is ranges.rows(1, 5) and ranges.rows(1, 5) is not ranges.rows(1, 6)
    assert (ranges.rows(1, 6).first, ranges.rows(1, 6).last) == ((0,) * 5, (5,) * 4 + (14,))


if kernels.HAS_TRITON:
    @kernels.triton.jit
    def plan_kernel(first_L, last_L, plan_T4, L, TILE_L: kernels.tl.constexpr, TILE_S: kernels.tl.constexpr):
        tile = kernels.tl.program_id(0)
        plan = kernels.plan_tiles(first_L, last_L, tile, L, TILE_L, TILE_S)
        for n in kernels.tl.static_range(4):
            kernels.tl.store(plan_T4[0] + 4 * tile + n, plan[n])


@needs_triton
@pytest.mark.skipif(GPU, reason="runs in the interpreter")
@pytest.mark.parametrize("L", [680, 521])
def test_the_tiles_that_are_counted_and_drawn_are_those_that_are_visited(L):
    grid = benchmark.tile_grid(L)
    plan_T4 = torch.zeros(len(grid), 4, dtype=torch.int32)
    ranges = KeyRanges.from_scales(benchmark.BENCHMARK_SCALES[L])
    table = ranges.cached(kernels.table, torch.device(DEVICE))
    kernels.launch(plan_kernel, (len(grid),), list(table), [plan_T4], L, TILE_L=128, TILE_S=64)
    for tiles_S, (start, before, whole, cut) in zip(grid.tolist(), plan_T4.tolist()):
        assert (start, before, tiles_S) == (0, 0, [2] * whole + [1] * cut + [0] * (len(tiles_S) - whole - cut))


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@needs_triton
def test_attention_allocates_nothing_larger_than_its_inputs(monkeypatch):
    monkeypatch.setattr(kernels, "launch", lambda *arguments, **constants: None)
    ranges = KeyRanges.from_scales(VAR_SCALES)
    q = torch.zeros(1, 1, len(ranges), 16, requires_grad=True)
    with LargestTensor() as largest:
        kernels.block_attention_triton(q, q, q, ranges, 1.0).sum().backward()
    assert largest.numel == q.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_made_for_the_other_backend(backend, monkeypatch):
    monkeypatch.setattr(kernels, "BACKEND", backend)
    ranges = KeyRanges.from_scales((1, 2))
    ranges.prepare(torch.device("cpu"))
    tables = {"torch": {kernels.mask_in_sight}, "triton": {kernels.table, kernels.transposed_table}}
    assert {make for make, _ in ranges.cache} == tables[backend]


@pytest.mark.parametrize("begin, end, masked", [(0, 14, True), (5, 14, False)])
def test_queries_that_all_see_the_same_keys_need_no_mask(begin, end, masked):
    """As at one scale of a generation."""
    ranges = KeyRanges.from_scales((1, 2, 3)).rows(begin, end)
    assert (ranges.cached(kernels.mask_in_sight, torch.device("cpu")) is not None) == masked


@pytest.mark.parametrize("change", [
    dict(k=torch.zeros(1, 2, 5, 16, dtype=torch.float16)), dict(k=torch.zeros(1, 2, 4, 16), v=torch.zeros(1, 2, 4, 16)),
    dict(v=torch.zeros(1, 2, 4, 16)), dict(q=torch.zeros(1, 2, 6, 16)), dict(scale=0.0)])
def test_attention_takes_only_what_fits(change):
    given = dict(q=torch.zeros(1, 2, 5, 16), k=torch.zeros(1, 2, 5, 16), v=torch.zeros(1, 2, 5, 16),
                 ranges=KeyRanges.from_scales((1, 2)), scale=1.0) | change
    with pytest.raises(AssertionError):
        kernels.block_attention(*given.values())


@pytest.mark.parametrize("first, last", [([], []), ([0], [1, 2]), ([1, 0], [2, 2]), ([0, 0], [2, 1]), ([1], [1]), ([-1], [1])])
def test_a_range_is_not_empty_and_its_ends_never_decrease(first, last):
    with pytest.raises(AssertionError):
        KeyRanges(first, last)


@needs_triton
@pytest.mark.parametrize("D", [8, 136])
def test_the_triton_backend_names_the_head_widths_that_it_takes(D):
    q = torch.zeros(1, 2, 5, D)
    with pytest.raises(ValueError, match=f"head width of 16 to 128: it is {D}"):
        kernels.block_attention_triton(q, q, q, KeyRanges.from_scales((1, 2)), 1.0)


@needs_triton
@pytest.mark.parametrize("D, backend", [(15, "torch"), (16, "triton"), (128, "triton"), (129, "torch")])
def test_which_head_widths_the_triton_backend_has(D, backend, monkeypatch):
    monkeypatch.setattr(kernels, "BACKEND", "triton")
    for name in BACKENDS:
        monkeypatch.setattr(kernels, f"block_attention_{name}", lambda *_, name=name: name)
    q = torch.zeros(1, 2, 5, D)
    assert kernels.block_attention(q, q, q, KeyRanges.from_scales((1, 2)), 1.0) == backend


@needs_triton
@pytest.mark.parametrize("D", [8, 136])
def test_a_model_of_other_head_widths_has_pytorchs_attention(D, monkeypatch):
    """As one of papers/scaling.py has, or one that was trained on a CPU."""
    model = small_model(scales=(1, 2), depth=1, width=2 * D, heads=2).eval()
    logits = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(kernels, "BACKEND", backend)
        logits.append(training_pass(model, seed=0))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_chooses_the_dtype_as_it_does_for_pytorch(dtype, backend, monkeypatch):
    monkeypatch.setattr(kernels, "BACKEND", backend)
    q, k, v = (torch.randn(1, 2, n, 16, device=DEVICE) for n in (5, 5, 5))
    with torch.autocast(DEVICE, dtype):
        assert kernels.block_attention(q, k.to(dtype), v, KeyRanges.from_scales((1, 2)), 1.0).dtype == dtype


# ---------------------------------------------------------------------------------------------------------------
# Nearest code


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@draws
def test_nearest_code_is_nearest(backend, data):
    N, V = data.draw(st.integers(1, 150)), data.draw(st.sampled_from([1, 2, 33, 64, 200, 4096 if GPU else 130]))
    C = data.draw(st.sampled_from([1, 5, 16, 32, 40, 100]))
    pattern, dtype = data.draw(patterns), data.draw(st.sampled_from(list(UNIT)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x, codebook = (on_device(values(rng, pattern, shape), dtype) for shape in ((N, C), (V, C)))
    if data.draw(st.booleans()):
        x = x.T.contiguous().T
    with poisoned():
        index = operation("nearest_code", backend)(x, codebook).cpu().numpy()
    distance_NV = reference.distances(double(x), double(codebook))
    chosen_N = distance_NV[np.arange(N), index]
    size_N = np.square(np.abs(double(x)).sum(axis=1) + np.abs(double(codebook)).sum(axis=1).max())
    assert np.all(chosen_N - distance_NV.min(axis=1) <= 4 * UNIT[torch.float32] * size_N)
    if pattern in ("ties", "equal"):   # small whole numbers: exact in fp32, and so are the ties
        assert np.array_equal(index, distance_NV.argmin(axis=1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equally_near_codes_the_first_wins_wherever_it_is(backend):
    """The same four codes fifty times over: the tiles of the kernel, of 64 codes, are all alike."""
    rng = np.random.default_rng(0)
    codes = np.tile(rng.permutation(12).reshape(4, 3), (50, 1))
    x = codes[rng.integers(0, 4, 70)] + rng.integers(-1, 2, (70, 3))
    index = operation("nearest_code", backend)(on_device(x, torch.float32), on_device(codes, torch.float32)).cpu().numpy()
    assert np.array_equal(index, reference.distances(x, codes).argmin(axis=1)) and index.max() < 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_code_at_the_published_size(backend):
    rng = np.random.default_rng(0)
    x, codebook = rng.standard_normal((680 if GPU else 7, 32)), rng.standard_normal((4096, 32))
    codebook[1::2] = codebook[::2]   # every code twice: the first of the two must win
    index = operation("nearest_code", backend)(*(on_device(a, torch.float32) for a in (x, codebook))).cpu().numpy()
    assert index.dtype == np.int64 and np.array_equal(index, reference.distances(x, codebook).argmin(axis=1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_code_stays_in_fp32_under_autocast(backend):
    """Two codes that neither bf16, fp16 nor TF32 can tell apart."""
    x, codebook = torch.tensor([[3.0, 1.0]], device=DEVICE), torch.tensor([[1.0001, 1.0], [1.0003, 1.0]], device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert operation("nearest_code", backend)(x, codebook).item() == 1
    codebook = torch.tensor([[1 + 2.0**-7, 0.0], [1.0, 0.125]], dtype=torch.bfloat16, device=DEVICE)
    assert operation("nearest_code", backend)(torch.zeros_like(x), codebook).item() == 1   # nor their squares


# ---------------------------------------------------------------------------------------------------------------
# Adaptive layer norm


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@draws
def test_adaln_and_its_gradients(backend, data):
    B, L = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 5, 33] + [70] * GPU))
    W = data.draw(st.sampled_from([1, 2, 24, 64, 100] + [1024, 1920] * GPU))
    x_dtype, h_dtype, dtype, y_dtype = (data.draw(st.sampled_from(list(UNIT))) for _ in range(4))
    rng, pattern = np.random.default_rng(data.draw(st.integers(0, 99))), data.draw(patterns)
    x, dsum = (on_device(values(rng, p, (L, B, W)), x_dtype).transpose(0, 1) for p in (pattern, "normal"))
    h, dy = on_device(values(rng, pattern, (B, L, W)), h_dtype), on_device(values(rng, "normal", (B, L, W)), y_dtype)
    if data.draw(st.booleans()):
        x = x[:1].expand(B, L, W)   # as the places of tokens are, which all images share
    modulation = on_device(values(rng, "normal", (B, 4 * W)), dtype)[:, W:]   # as a layer hands it over: slices
    inputs = [part.requires_grad_() for part in (x, h, *modulation.chunk(3, dim=1))]
    with poisoned():
        outputs = operation("adaln", backend)(*inputs, y_dtype)
        gradients = torch.autograd.grad(outputs, inputs, (dsum, dy))
    got = dict(zip(("sum", "y", "dx", "dh", "dgate", "dscale", "dshift"), (*outputs, *gradients)))
    assert [tensor.dtype for tensor in got.values()] == [x_dtype, y_dtype, x_dtype, h_dtype, dtype, dtype, dtype]
    value, size = reference.adaln(*map(double, (*inputs, dsum, dy)))
    coarsest = max(x_dtype, h_dtype, dtype, y_dtype, key=UNIT.get)
    assert_close(got, value, size, coarsest)


@needs_triton
def test_adaln_sums_gradients_in_one_order():
    inputs = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in 2 * [(1, 33, 4)] + 3 * [(1, 4)]]
    outputs = kernels.adaln_triton(*inputs, torch.float32)
    once, again = (torch.autograd.grad(outputs, inputs, inputs[:2], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_in_bf16_rounds_no_other_gradient(backend):
    """257 is no number of bf16. A row of one channel has a norm of 0, through which nothing comes."""
    x = torch.full((1, 2, 1), 256.0, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    h = torch.ones(1, 2, 1, device=DEVICE, requires_grad=True)
    gate, scale, shift = (torch.full((1, 1), 257 / 256, device=DEVICE, requires_grad=True) for _ in range(3))
    outputs = operation("adaln", backend)(x, h, gate, scale, shift, torch.float32)
    given = torch.tensor([[[256.0], [1.0]]], device=DEVICE)
    dh, dgate, dshift = torch.autograd.grad(outputs, (h, gate, shift), (given.bfloat16(), given))
    assert (dh[0, 0].item(), dgate.item(), dshift.item()) == (257, 257, 257)
    if backend == "torch" or GPU:   # the interpreter cuts off
        assert outputs[0].tolist() == [[[258], [258]]]   # 257.004, rounded once


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_is_of_the_sum_as_it_is_stored_and_scaled_in_fp32(backend):
    x_BLW, h_BLW = torch.randn(2, 1, 3, 24, device=DEVICE)
    gate_BW, scale_BW, shift_BW = torch.randn(3, 1, 24, device=DEVICE)
    x_BLW, scale_BW = x_BLW.bfloat16(), scale_BW.bfloat16()
    sum_BLW, y_BLW = operation("adaln", backend)(x_BLW, h_BLW, gate_BW, scale_BW, shift_BW, torch.float32)
    normed_BLW = torch.nn.functional.layer_norm(sum_BLW.float(), (24,), eps=1e-6)
    torch.testing.assert_close(y_BLW, normed_BLW * (1 + scale_BW.float()) + shift_BW, rtol=1e-4, atol=1e-4)


def test_autocast_chooses_the_dtype_of_what_the_next_product_reads():
    x, h, modulation = torch.randn(1, 3, 8), torch.randn(1, 3, 8), torch.randn(3, 1, 8)
    assert [y.dtype for y in kernels.adaln(x, h, *modulation)] == [torch.float32, torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        assert [y.dtype for y in kernels.adaln(x, h, *modulation)] == [torch.float32, torch.bfloat16]


# ---------------------------------------------------------------------------------------------------------------
# Heads


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@draws
def test_split_heads_and_its_gradients(backend, data):
    B, L = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 3, 33] + [70] * GPU))
    H, D = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([1, 16, 17, 64, 72, 128]))
    dtype, bias_dtype = (data.draw(st.sampled_from(dtypes(backend))) for _ in range(2))
    rng, pattern = np.random.default_rng(data.draw(st.integers(0, 99))), data.draw(patterns)
    if pattern == "ties":   # a row of nothing but zeros has no direction
        pattern = "normal"
    product = on_device(values(rng, pattern, (B, L, 3 * H * D)), dtype)
    biases = [on_device(values(rng, "normal", (H * D,)), bias_dtype) for _ in range(2)]
    log_scale = on_device(rng.uniform(0, 6, H), torch.float32)   # up to 400, of which 100 are left
    normalised = data.draw(st.booleans())
    inputs = [x.requires_grad_() for x in (product, *biases, *[log_scale] * normalised)]
    layout = data.draw(st.sampled_from(["BHLD", "BLHD", "BHDL"]))
    gradients = [heads(rng, "normal", layout, (B, H, L, D), dtype) for _ in range(3)]
    with poisoned():
        outputs = operation("split_heads", backend)(product, *biases, log_scale if normalised else None, H)
        found = torch.autograd.grad(outputs, inputs, gradients)
    got = dict(zip(("q", "k", "v", "dproduct", "dq_bias", "dv_bias", "dlog_scale"), (*outputs, *found)))
    assert all(got[name].dtype == dtype for name in ("q", "k", "v", "dproduct"))
    numbers = [double(x) for x in (product, *biases)] + [double(log_scale) if normalised else None]
    value, size = reference.split_heads(*numbers, H, *map(double, gradients))
    assert got.keys() == value.keys()
    assert_close(got, value, size, max(dtype, bias_dtype, key=UNIT.get))


@needs_triton
@pytest.mark.parametrize("normalised", [True, False])
def test_biases_and_scales_may_be_any_views(normalised):
    """Every second number of a longer row, or one number for all; product and gradients are turned round."""
    product, given = (torch.randn(shape, device=DEVICE).mT for shape in ((1, 3 * 256, 17), (1, 2, 128, 17)))   # two tiles
    numbers = torch.randn(512, device=DEVICE, requires_grad=True)
    log_scale_H = numbers[::256] if normalised else None
    for bias in numbers[::2], numbers[:1].expand(256):
        found = []
        for backend in BACKENDS:
            q_BHLD, k_BHLD, v_BHLD = operation("split_heads", backend)(product, bias, bias, log_scale_H, 2)
            gradient, = torch.autograd.grad((q_BHLD, v_BHLD), numbers, (given, given))
            found.append((q_BHLD, k_BHLD, v_BHLD, gradient))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_product_in_bf16_rounds_no_gradient_of_a_bias(backend):
    """Neither 1 / 3, by which that of queries comes back, nor 257 and 771 are numbers of bf16."""
    product = torch.tensor(3 * [3.0, 0.0], dtype=torch.bfloat16, device=DEVICE).expand(1, 2, 6)
    bias, log_scale = torch.zeros(2, 2, device=DEVICE, requires_grad=True), torch.zeros(1, device=DEVICE)
    q_BHLD, _, v_BHLD = operation("split_heads", backend)(product, *bias, log_scale, 1)
    given = torch.tensor([[[[0, 768], [0, 3]]]], dtype=torch.bfloat16, device=DEVICE)
    gradient, = torch.autograd.grad((q_BHLD, v_BHLD), bias, (given, given))
    assert gradient.flatten().tolist() == pytest.approx([0, 257, 0, 771], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_learned_scale_is_free_up_to_its_bound(backend):
    """At the bound it is, too, as torch.clamp has it; above it, nothing moves it."""
    largest = torch.tensor(kernels.LARGEST_LOG_SCALE)
    log_scale_H = torch.stack([largest - 1, largest, largest + 1]).to(DEVICE).requires_grad_()
    product = torch.randn(1, 4, 3 * 48, device=DEVICE)
    bias = torch.zeros(48, device=DEVICE)
    q_BHLD = operation("split_heads", backend)(product, bias, bias, log_scale_H, 3)[0]
    q_BHLD.square().sum().backward()   # the square of the scale, four times
    expected = [8 * math.exp(2 * (kernels.LARGEST_LOG_SCALE + change)) for change in (-1, 0)]
    assert log_scale_H.grad.tolist() == pytest.approx([*expected, 0.0], rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_however_short_a_row_is_it_becomes_a_unit(backend):
    """And however wide: no tile holds 4,096. A row of zeros has no direction."""
    for D in 16, 4096:
        product = 1e-10 * torch.randn(1, 2, 3 * D, device=DEVICE)
        product[:, 1] = 0
        bias = torch.zeros(D, device=DEVICE)
        q_BHLD, k_BHLD, _ = operation("split_heads", backend)(product, bias, bias, torch.zeros(1, device=DEVICE), 1)
        for x_BHLD in (q_BHLD, k_BHLD):
            assert x_BHLD.norm(dim=-1).flatten().tolist() == pytest.approx([1.0, 0.0], rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_however_long_a_row_of_fp16_is_it_becomes_a_unit(backend):
    """The square of 300 is none of its numbers."""
    product = torch.full((1, 1, 3 * 16), 300.0, dtype=torch.float16, device=DEVICE)
    bias = torch.zeros(16, device=DEVICE)
    for x_BHLD in operation("split_heads", backend)(product, bias, bias, torch.zeros(1, device=DEVICE), 1)[:2]:
        assert x_BHLD.tolist() == [[[[0.25] * 16]]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalised, D", [(True, 16), (False, 17)])
@torch.no_grad()
def test_keys_and_values_go_where_there_is_room_and_nowhere_else(backend, normalised, D):
    product, bias, log_scale = torch.randn(2, 5, 3 * 2 * D), torch.randn(2, 2 * D), torch.randn(2)
    arguments = [x.to(DEVICE) for x in (product, *bias)] + [log_scale.to(DEVICE) if normalised else None, 2]
    expected = operation("split_heads", backend)(*arguments)
    cache = torch.full((2, 2, 2, 9, D), 7.0, device=DEVICE)
    got = operation("split_heads", backend)(*arguments, kv_slots=cache[:, :, :, 3:8].unbind())
    assert all(map(torch.equal, got, expected))
    assert torch.equal(cache[:, :, :, 3:8], torch.stack(expected[1:]))
    assert (cache[:, :, :, :3] == 7).all() and (cache[:, :, :, 8:] == 7).all()


@needs_triton
def test_slots_that_the_kernel_cannot_write_to_are_refused():
    kv_slots = torch.zeros(2, 2, 2, 16, 5).mT.unbind()
    with pytest.raises(AssertionError, match="cannot write to such strides"):
        kernels.split_heads_triton(torch.zeros(2, 5, 96), torch.zeros(32), torch.zeros(32), None, 2, kv_slots)


# ---------------------------------------------------------------------------------------------------------------
# Sampling


@st.composite
def sampling_cases(draw) -> dict:
    V = draw(st.sampled_from([1, 2, 7, 33, 64, 300] + [4096] * GPU))
    rng, shape = np.random.default_rng(draw(st.integers(0, 999))), (draw(st.integers(1, 2)), draw(st.integers(1, 3)), V)
    pattern, dtype = draw(patterns), draw(st.sampled_from(list(UNIT)))
    cond, uncond = (on_device(values(rng, pattern, shape), dtype) for _ in range(2))
    if draw(st.booleans()):
        uncond = None
        cond[..., 1:V // 2] = -torch.inf   # tokens that the caller rules out
    noise = on_device(rng.exponential(size=shape) + 1e-30, torch.float32)
    return dict(cond_BlV=cond, uncond_BlV=uncond, noise_BlV=noise,
                guidance=draw(st.sampled_from([0.0, 1.5, 4])), top_k=draw(st.sampled_from([0, 1, 2, 5, V - 1, V, V + 9])),
                top_p=draw(st.sampled_from([1.0, 0.96, 0.5, 0.3, 1e-3, 0.0])))


def scores(case: dict) -> Iterator[tuple[tuple[int, ...], np.ndarray, float]]:
    """Of each place: where it is, the scores [V] of the tokens kept, and how far top-p's edge is."""
    logits, noise = double(case["cond_BlV"]).astype(np.float32), double(case["noise_BlV"])
    if case["uncond_BlV"] is not None:   # in fp32, which makes or breaks ties, and those decide what is kept
        logits += np.float32(case["guidance"]) * (logits - double(case["uncond_BlV"]).astype(np.float32))
    for place in np.ndindex(logits.shape[:2]):
        logits_V = logits[place].astype(float)
        probability_V, margin = reference.kept_probabilities(logits_V, case["top_k"], case["top_p"])
        yield place, np.where(probability_V > 0, logits_V - np.log(noise[place]), -np.inf), margin


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=sampling_cases())
@draws
def test_a_draw_is_the_best_of_the_tokens_kept(backend, case):
    with poisoned():
        token_Bl = operation("sample_tokens", backend)(**case).cpu().numpy()
    for place, score_V, margin in scores(case):
        if margin > 1e-5:   # nearer to the edge of top-p, rounding may decide
            assert score_V[token_Bl[place]] >= score_V.max() - 1e-5 * (1 + np.abs(score_V.max()))


@needs_triton
@given(case=sampling_cases())
@draws
def test_both_backends_draw_the_same_token(case):
    before = case["cond_BlV"].clone()
    ours_Bl, theirs_Bl = (operation("sample_tokens", backend)(**case).cpu().numpy() for backend in BACKENDS)
    for place, score_V, margin in scores(case):
        if ours_Bl[place] != theirs_Bl[place]:   # only a GPU rounds exp and log otherwise, and only a tie tells
            apart = abs(score_V[ours_Bl[place]] - score_V[theirs_Bl[place]])
            assert GPU and (margin <= 1e-5 or apart <= 1e-5 * (1 + np.abs(score_V.max())))
    assert torch.equal(case["cond_BlV"], before)   # the caller's logits are left alone


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.5])
def test_guidance_goes_beyond_the_class(backend, guidance):
    """Noise that makes all guided scores alike, but for one token: any other logits draw another."""
    cond, uncond = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, -0.5, 2.0]], device=DEVICE)
    for token in range(4):
        noise = ((1 + guidance) * cond - guidance * uncond).exp()
        noise[token] *= 0.99
        logits = cond[None, None], uncond[None, None]
        assert operation("sample_tokens", backend)(*logits, guidance, 0, 1.0, noise[None, None]).item() == token


def last_kept(backend: str, logits: list[float], top_k: int, top_p: float) -> int:
    """The rank of the last token kept: with this noise, the later a token ranks, the better is its score."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    cond, noise = torch.tensor(logits, device=DEVICE), torch.empty(len(logits), device=DEVICE)
    for rank, token in enumerate(order):
        noise[token] = math.exp(logits[token] - rank)
    token_Bl = operation("sample_tokens", backend)(cond[None, None], None, 0.0, top_k, top_p, noise[None, None])
    return order.index(token_Bl.item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logits", [[-1.0, -3.0, -2.0, -4.0, -9.0], [2.0, -1.0, 0.5, -2.0, 1.0, -0.5], [3.0, 1.0, 2.0],
                                    [-0.0, 0.0, 0.0, -0.0, -1.0, 1.0, -1.0], [-2.0] * 5,
                                    [0.0, -40.0, -41.0]])   # what is next to impossible, but not ruled out
def test_top_k_keeps_k_whatever_their_sign_and_their_ties(backend, logits):
    for top_k in range(1, len(logits) + 2):
        assert last_kept(backend, logits, top_k, 1.0) == min(top_k, len(logits)) - 1
    unlimited = (last_kept(backend, logits, top_k, 0.999) for top_k in (0, -1, len(logits), len(logits) + 1))
    assert len({*unlimited}) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k, top_p, kept", [(0, 0.0, 1), (0, 0.1, 1), (0, 0.5, 4), (0, 0.51, 5), (0, 1.0, 8),
                                                (4, 0.5, 2), (4, 0.51, 3), (6, 1.0, 6)])
def test_top_p_keeps_what_holds_p_of_what_top_k_left(backend, top_k, top_p, kept):
    assert last_kept(backend, [-3.0] * 8, top_k, top_p) == kept - 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_edge_of_top_p_is_rounded_alike(backend):
    """With the sum and its share in float64, the second token would stay."""
    assert last_kept(backend, [0.0, -8.57], 0, 0.9998103380203247) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank, kept", [(400, True), (600, False)])
def test_rare_tokens_count_for_top_p(backend, rank, kept):
    """1,023 tokens of 2^-32 make 2^-22, of which half is outside of a top-p of 1 - 2^-23."""
    cond = torch.full((1, 1, 1024), -math.log(2.0**32), device=DEVICE)
    cond[..., 0] = 0
    noise = torch.ones_like(cond)
    noise[..., rank] = 1e-30   # it is drawn if it is kept
    token = operation("sample_tokens", backend)(cond, None, 0.0, 0, 1 - 2.0**-23, noise).item()
    assert token == (rank if kept else 0)


@pytest.mark.parametrize("backend", BACKENDS if GPU else ["torch"])   # both backends draw the same token
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (4, 1.0), (0, 0.8), (5, 0.9)])
def test_frequencies_follow_the_distribution(backend, top_k, top_p):
    """Chi-square: with n draws, sum (count - n p)^2 / (n p) passes mean + 5 standard deviations once in millions."""
    draws = 20_000
    logits = np.array([1.0, 0.0, 2.0, 2.0, -1.0, 0.5, -9.0])
    noise = np.random.default_rng(3).exponential(size=(1, draws, len(logits)))
    cond = on_device(np.broadcast_to(logits, noise.shape), torch.float32)
    token_Bl = operation("sample_tokens", backend)(cond, None, 0.0, top_k, top_p, on_device(noise, torch.float32))
    counts = np.bincount(token_Bl.flatten().cpu().numpy(), minlength=len(logits))
    expected = draws * reference.kept_probabilities(logits, top_k, top_p)[0]
    assert np.all(counts[expected == 0] == 0)
    likely = expected >= 5   # where the normal approximation holds
    statistic, freedom = np.sum((counts - expected)[likely] ** 2 / expected[likely]), likely.sum() - 1
    assert statistic <= freedom + 5 * np.sqrt(2 * freedom)


# ---------------------------------------------------------------------------------------------------------------
# Shapes, and the choice of a backend


@needs_triton
@pytest.mark.parametrize("operation", [
    lambda x: kernels.adaln_triton(x, x, x[:, 0], x[:, 0], x[:, 0], x.dtype)[1],
    lambda x: kernels.split_heads_triton(x, x[0, 0, :16], x[0, 0, :16], x[0, 0, :1], 1)[0],
    lambda x: kernels.block_attention_triton(x[None], x[None], x[None], KeyRanges([0, 0], [1, 2]), 1.0)],
    ids=["adaln", "split_heads", "block_attention"])
def test_second_derivatives_are_refused(operation):
    """Of the first ones, which kernels make, autograd knows none."""
    x = torch.randn(1, 2, 48, device=DEVICE, requires_grad=True)
    first, = torch.autograd.grad(operation(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("operation, shapes", [
    ("adaln", [(2, 3, 8), (2, 3, 9), (2, 8), (2, 8), (2, 8)]), ("adaln", [(2, 3, 8), (2, 3, 8), (2, 8), (3, 8), (2, 8)]),
    ("adaln", [(2, 3, 8), (2, 3, 8), (1, 8), (1, 8), (1, 8)]), ("adaln", [(2, 3, 8), (2, 3, 8), (2, 8), (2, 8), (1, 8)]),
    ("nearest_code", [(3, 4), (3, 5)]), ("sample_tokens", [(1, 2, 3), (1, 2, 4), 0.0, 0, 1.0, (1, 2, 3)]),
    ("sample_tokens", [(1, 2, 3), (1, 2, 3), 0.0, 0, 1.0, (1, 2, 4)]),
    ("split_heads", [(2, 5, 97), (32,), (32,), (2,), 2]), ("split_heads", [(2, 5, 96), (32,), (31,), (2,), 2]),
    ("split_heads", [(2, 5, 96), (32,), (32,), (3,), 2]), ("split_heads", [(2, 5, 96), (32,), (32,), (5,), 5]),
    ("split_heads", [(2, 5, 96), (32,), (32,), (2,), 2, 2 * (torch.zeros(2, 2, 4, 16),)]),
    ("split_heads", [(2, 5, 96), (32,), (32,), (2,), 2, (torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 4, 16))])])
def test_shapes_that_do_not_fit_are_refused(operation, shapes):
    inputs = [torch.zeros(x) if isinstance(x, tuple) and isinstance(x[0], int) else x for x in shapes]
    with pytest.raises(AssertionError):
        getattr(kernels, operation)(*inputs)


def test_the_backend_follows_the_tensors_unless_told_otherwise(monkeypatch):
    cpu = torch.zeros(1)
    assert not kernels.use_triton(cpu)
    monkeypatch.setattr(kernels, "BACKEND", "triton")
    assert kernels.use_triton(cpu)
    monkeypatch.setattr(kernels, "BACKEND", "torch")
    assert not kernels.use_triton(torch.zeros(1, device=DEVICE))
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    monkeypatch.setattr(kernels, "BACKEND", "triton")
    with pytest.raises(AssertionError, match="needs Triton"):
        kernels.use_triton(cpu)


@pytest.mark.parametrize("major, hip, triton", [(7, None, False), (8, None, True), (12, None, True), (9, "6.4", False)])
def test_the_triton_backend_is_for_cards_of_nvidia_from_sm_80_on(major, hip, triton, monkeypatch):
    monkeypatch.setattr(kernels, "BACKEND", None)
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    assert kernels.use_triton(SimpleNamespace(is_cuda=True, device="cuda:0")) == triton


def test_without_triton_or_an_old_one_the_pytorch_functions_do_everything():
    """And torch._dynamo, which takes as long to import as torch itself, is not imported.

    The module is loaded anew for the second, as notebooks do when it is edited.
    """
    script = f"""
if True:
        import importlib, sys
        sys.modules["triton"] = None
        import torch, kernels

        def check():
            x = torch.randn(1, 2, 5, 16)
            assert not kernels.HAS_TRITON and "torch._dynamo" not in sys.modules
            ranges = kernels.KeyRanges.from_scales((1, 2))
            assert kernels.block_attention(x, x, x, ranges, 1.0).shape == x.shape
            assert kernels.nearest_code(x[0, 0], x[0, 0]).tolist() == [0, 1, 2, 3, 4]
            assert kernels.adaln(x[0], x[0], *x[0, :, :3].unbind(1))[1].shape == (2, 5, 16)
            assert kernels.split_heads(x[0].repeat(1, 1, 3), *x[0, 0, :2], None, 4)[0].shape == (2, 4, 5, 4)
            assert kernels.sample_tokens(x[0], None, 0.0, 3, 0.9, torch.rand(2, 5, 16)).shape == (2, 5)

        check()
        if {kernels.HAS_TRITON}:
            del sys.modules["triton"]
            import triton
            triton.__version__ = "3.10.0"
            assert importlib.reload(kernels).HAS_TRITON
            triton.__version__ = "3.5.1"
        importlib.reload(kernels)
        check()
    """
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(kernels.__file__).parent)


@needs_triton
@pytest.mark.skipif(GPU, reason="the example is for machines without a GPU")
def test_the_example_in_the_text_runs_the_triton_kernel(monkeypatch):
    launched = []
    monkeypatch.setattr(kernels, "BACKEND", None)
    launch = kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda kernel, *a, **c: launched.append(kernel.__name__) or launch(kernel, *a, **c))
    assert doctest.testmod(kernels) == doctest.TestResults(failed=0, attempted=4)
    assert launched == ["adaln_forward"]


# ---------------------------------------------------------------------------------------------------------------
# Between the kernels: what a whole model makes, copies and compiles


def small_model(**changes):
    config = dict(scales=(1, 2, 3), vocabulary=16, code_channels=4, classes=3, depth=3, width=32, heads=2,
                  shared_adaln=False, normalise_qk=True, label_dropout=0.1, drop_path=0.1, last_scales=None)
    return var.VAR(var.VARConfig(**config | changes)).to(DEVICE)


@pytest.fixture
def small_tokenizer():
    made = tokenizer.Tokenizer(tokenizer.TokenizerConfig(
        scales=(1, 2, 3), vocabulary=16, code_channels=4, image_channels=3, width=8, multipliers=(1, 1), blocks=1,
        phis=2, norm_groups=4))
    return made.to(DEVICE).eval()


class HostArrays(TorchDispatchMode):
    """Names of the operations that make a tensor from numbers of Python or, with a GPU, bring one from the host to it."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        copied = GPU and name.startswith(("aten::_to_copy", "aten::copy_"))
        from_host = copied and any(x.device.type == "cpu" for x in args if isinstance(x, torch.Tensor))
        if from_host or name.startswith(("aten::lift_fresh", "aten::arange", "aten::scalar_tensor", "aten::searchsorted")):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_generation_makes_no_table_and_copies_nothing_to_the_device(backend, small_tokenizer, monkeypatch):
    if not GPU:   # the interpreter is slow, and copies
        monkeypatch.setattr(kernels, "launch", lambda kernel, programs, read, written, *numbers, **constants:
                            [x.zero_() for x in written])
    monkeypatch.setattr(kernels, "BACKEND", backend)
    made, make = [], KeyRanges.__init__
    monkeypatch.setattr(KeyRanges, "__init__", lambda self, *ends: made.append(ends) or make(self, *ends))
    model, labels_B = small_model().eval(), torch.tensor([0, 2], device=DEVICE)
    whole = len(made)
    model.generate(small_tokenizer, labels_B)
    assert len(made) == whole + 3   # a part of the table for every scale
    with HostArrays() as arrays:
        model.generate(small_tokenizer, labels_B)
    assert len(made) == whole + 3 and not arrays.found


def training_pass(model, seed: int) -> torch.Tensor:
    """Logits; with another seed, of other images, other labels dropped, other branches skipped."""
    torch.manual_seed(seed)
    inputs = torch.randn(2, model.config.length - 1, 4, device=DEVICE)
    return model(torch.tensor([seed, 1], device=DEVICE), inputs)


def compiled(parts, backend) -> list:
    """The parts, compiled in place; the list grows by a graph at a time. fullgraph: a break in one is an error."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return backend(graph, inputs)

    torch._dynamo.reset()
    for part in parts:
        part.compile(backend=count, fullgraph=True, dynamic=False)
    return graphs


@pytest.mark.parametrize("backend", BACKENDS[-1:])
def test_a_pass_of_training_is_one_graph(backend, monkeypatch):
    """In it kernels get arrays as they get them without, and no copies of gradients."""
    from torch._dynamo.backends.debugging import aot_eager
    monkeypatch.setattr(kernels, "BACKEND", backend)
    run_kernel = kernels.run_kernel
    monkeypatch.setattr(kernels, "run_kernel", lambda kernel, programs, tensors, *rest: (
        strides.append((kernel.__name__, [x.stride() for x in tensors])), run_kernel(kernel, programs, tensors, *rest)))
    model = small_model(scales=(1, 2), depth=1, width=32, heads=2).train()
    twin = copy.deepcopy(model)
    graphs = compiled([twin], aot_eager)
    found = []
    for made in model, twin:
        strides = []
        found.append(strides)
        logits = training_pass(made, seed=0)
        logits.backward(logits)
    assert len(graphs) == 1 and sorted(found[0]) == sorted(found[1])
    for parameter, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad)
    training_pass(twin, seed=2)
    assert len(graphs) == 1


@needs_triton
def test_where_a_written_array_begins_does_not_depend_on_the_batch(monkeypatch):
    """Compiled for batches of any size, those that began elsewhere would all be written at 0, one over the other."""
    monkeypatch.setattr(kernels, "BACKEND", "triton")
    monkeypatch.setattr(kernels, "launch", lambda kernel, programs, read, written, *numbers, **constants:
                        begins.append((kernel.__name__, [x.storage_offset() for x in written])))
    model, found = small_model(), []
    for B in 2, 3:
        begins = []
        model(torch.zeros(B, dtype=torch.int64, device=DEVICE), torch.zeros(B, 13, 4, device=DEVICE)).sum().backward()
        found.append(begins)
    assert found[0] == found[1] and len(found[0]) == 29   # of 3 layers and the head


@needs_triton
def test_shapes_that_the_compiler_leaves_open(monkeypatch):
    """A flag beside an open size would be refused: what a kernel is compiled with are whole numbers."""
    monkeypatch.setattr(kernels, "BACKEND", "triton")
    split = torch.compile(kernels.split_heads, backend="eager", dynamic=True)
    for B in 2, 3:
        inputs = [torch.randn(shape, device=DEVICE) for shape in ((B, 5, 96), (32,), (32,), (2,))]
        assert all(map(torch.equal, split(*inputs, 2), kernels.split_heads(*inputs, 2)))


def test_compiled_code_which_knows_no_strides_has_the_operator_copy(monkeypatch):
    """What is read, where kernels cannot; never what is written."""
    given = []
    monkeypatch.setattr(kernels, "run_kernel", lambda kernel, programs, tensors, *rest: given.extend(tensors))
    odd = torch.zeros(1, 1, 2, 17)[..., :16]
    torch.ops.var.launch("adaln_forward", [1], [odd], [odd], [], "D", [16])
    assert [x.stride() for x in given] == [(32, 32, 16, 1), odd.stride()]


def test_all_layers_are_one_graph():
    """But the first, whose residual stream is the places of tokens, which all images share.

    So compiling the layers, and not the whole, takes as long for a deep model as for a shallow one.
    """
    model = small_model(scales=(1, 2), depth=4, width=16, heads=1).train()
    graphs = compiled(model.blocks, lambda graph, inputs: graph)
    training_pass(model, seed=0)
    assert len(graphs) == 2


@pytest.mark.parametrize("training, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_what_tokens_are_drawn_from_is_fp32_also_under_autocast(training, dtype):
    model = small_model(depth=1).train(training)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert training_pass(model, seed=0).dtype == dtype


def test_no_phi_is_computed_in_tf32(small_tokenizer, monkeypatch):
    quantizer, allowed = small_tokenizer.quantizer, []
    for phi in quantizer.phis:
        phi.register_forward_pre_hook(lambda *_: allowed.append(torch.backends.cudnn.allow_tf32))
    for before in True, False:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
        quantizer.decode(torch.zeros(1, 14, dtype=torch.int64, device=DEVICE))
        assert torch.backends.cudnn.allow_tf32 == before   # what the program chose elsewhere stays
    assert allowed == 6 * [False]


def failing(error: Exception):
    class Kernel:
        def __getitem__(self, grid):
            raise error
    return Kernel()


OutOfResources = type("OutOfResources", (Exception,), {})   # called as Triton's are
PTXASError = type("PTXASError", (Exception,), {})


@pytest.mark.parametrize("error, said", [
    (RuntimeError("Failed to find C compiler. Please specify via CC"), "needs a C compiler and Python's headers"),
    (subprocess.CalledProcessError(1, ["gcc"]), "needs a C compiler"), (FileNotFoundError("gcc"), "needs a C compiler"),
    (RuntimeError("0 active drivers ([]). There should only be one."), "TRITON_INTERPRET=1 must be in the environment"),
    (ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)"), "TRITON_INTERPRET=1 must be"),
    (OutOfResources("shared memory, Required: 98304, Hardware limit: 65536"), "choose smaller tiles"),
    (PTXASError("Value 'sm_130' is not defined"), "install a newer Triton")], ids=lambda x: type(x).__name__)
def test_a_machine_that_cannot_start_kernels_is_told_what_it_lacks(error, said):
    with pytest.raises(OSError, match=said) as raised:
        kernels.launch(failing(error), (1,), [torch.zeros(1)], [])
    assert type(raised.value) is kernels.LaunchError and "\n" not in str(raised.value)


def test_any_other_error_of_a_kernel_stays_as_it_is():
    with pytest.raises(RuntimeError, match="^an error of ours$"):
        kernels.launch(failing(RuntimeError("an error of ours")), (1,), [torch.zeros(1)], [])


@needs_triton
@pytest.mark.skipif(GPU, reason="of machines without a GPU")
def test_a_kernel_outside_of_the_interpreter_asks_for_it():
    """As where TRITON_INTERPRET is set after the import, or not at all."""
    compiled = kernels.triton.runtime.JITFunction(kernels.adaln_forward.fn)
    with pytest.raises(kernels.LaunchError, match="TRITON_INTERPRET=1 must be in the environment before Python starts"):
        kernels.launch(compiled, (1, 1), [torch.zeros(1, 1, 4)] * 5, [torch.zeros(1, 1, 4)] * 2, 4, TILE_W=4)


@needs_triton
@pytest.mark.skipif(GPU, reason="runs in the interpreter")
def test_places_beyond_2_to_the_31_are_found():
    """Of 2 GB a few numbers are touched, and no other takes memory."""
    room = torch.empty(2**31 + 128, dtype=torch.uint8)
    h_BLW, sum_BLW = (room.as_strided((3, 1, 4), (2**30, 4, 1), offset) for offset in (0, 4))
    h_BLW.copy_(torch.arange(12).view(3, 1, 4))
    x_BLW = torch.ones(3, 1, 4)
    kernels.launch(kernels.adaln_forward, (1, 3), [x_BLW, h_BLW, x_BLW, x_BLW, x_BLW],
                   [sum_BLW, torch.empty(3, 1, 4)], 4, **kernels.adaln_tiles(4))
    assert torch.equal(sum_BLW, h_BLW + 1)
    product, bias = torch.arange(3 * 3 * 16.0).view(3, 1, 48).repeat(1, 1, 3), torch.zeros(48)
    for strides in (2**30, 16, 16, 1), (16, 2**30, 16, 1):   # far images, and far heads
        slots = room.as_strided((3, 3, 1, 16), strides)
        kernels.split_heads_triton(product, bias, bias, None, 3, (slots, slots))
        assert torch.equal(slots.transpose(1, 2).flatten(2), product[..., :48])


@needs_triton
def test_every_launch_has_a_warp_and_at_most_32(monkeypatch):
    warps = []
    monkeypatch.setattr(kernels, "launch", lambda *_, num_warps, **__: warps.append(num_warps))
    for size in 1, 100, 40_000:
        x, m = torch.zeros(1, 1, size), torch.zeros(1, size)
        kernels.adaln_triton(x, x, m, m, m, torch.float32)
        kernels.sample_tokens_triton(x, None, 0.0, 0, 1.0, x)
    assert warps == [1, 1, 1, 1, 16, 32]


@pytest.mark.parametrize("L, D, rows", [(1, 64, 1), (3, 64, 4), (680, 64, 32), (680, 72, 16)])
def test_a_tile_of_heads_is_2048_numbers_at_most_and_its_sides_are_powers_of_two(L, D, rows):
    assert kernels.heads_tiles(L, D)["TILE_L"] == rows


@pytest.mark.parametrize("L, rows, warps", [(1, 16, 4), (9, 16, 4), (25, 32, 4), (64, 64, 4), (100, 128, 8), (680, 128, 8)])
def test_a_few_queries_get_a_small_tile(L, rows, warps):
    q_BHLD = torch.zeros(1, 1, L, 64, dtype=torch.bfloat16)
    tiles = kernels.attention_tiles("forward", q_BHLD)
    assert (tiles["TILE_L"], tiles["num_warps"]) == (rows, warps)
    assert kernels.attention_tiles("backward_q", q_BHLD)["TILE_L"] == 128
    assert kernels.attention_tiles("forward", q_BHLD.half()) == tiles
    wide_BHLD = torch.zeros(1, 1, L, 128)
    assert kernels.attention_tiles("forward", wide_BHLD)["TILE_L"] == 32   # in fp32, where 16 spill


@needs_triton
def test_no_multiply_add_of_sampling_is_fused(monkeypatch):
    """It would round once, where PyTorch rounds twice, so that ties break otherwise."""
    asked = []
    monkeypatch.setattr(kernels, "launch", lambda *_, **constants: asked.append(constants))
    kernels.sample_tokens_triton(torch.zeros(1, 1, 4), None, 0.0, 0, 1.0, torch.ones(1, 1, 4))
    assert asked[0]["enable_fp_fusion"] is False
