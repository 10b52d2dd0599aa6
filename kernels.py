"""The operations of VAR worth a hand-written kernel, each twice: in Triton for a GPU, in PyTorch for anything else.

Read in this order: `KeyRanges`, the table every attention mask of this project is; then the operations. For each:
what the obvious version costs, the formula, the Triton kernel, the function that launches it, the PyTorch twin.

    block_attention    attention in which every query sees one range of keys     (var.py, every layer)
    nearest_code       index of the closest codebook row                         (tokenizer.py, every scale)
    adaln              layer norm, then a scale and a shift per image            (var.py, every layer)
    sample_tokens      guidance, top-k, top-p and the draw                       (var.py, generation)

Axes: B batch, H heads, L queries, S keys, D head width, W model width, V vocabulary, C code channels, N vectors.
Inside the kernels T is one tile of an axis: q_TD is a tile of queries, scores_TS meets them with a tile of keys.

    python kernels.py    times every operation on this machine against what PyTorch offers
"""
from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:   # as on a Mac: the PyTorch faces do everything
    triton = None

FACE = None   # "triton" or "torch" makes the choice for the whole program; None looks at where the tensors live
kernel = triton.jit if triton else (lambda function: function)


def use_triton(tensor: Tensor) -> bool:
    return FACE == "triton" or (FACE is None and triton is not None and tensor.is_cuda)


@torch.compiler.disable
def launch(function: Callable, programs: int, *arguments, **constants) -> None:
    """Start a kernel where its tensors are: Triton alone would take the current GPU, which may be another."""
    with torch.cuda.device_of(arguments[0]):
        function[(programs,)](*arguments, **constants)


@kernel
def load_row(x_BLW, image, place, strides, columns_W, W):
    """x[image, place] in fp32, with zeros beyond W; the offset of an image in 64 bits."""
    offsets_W = image.to(tl.int64) * strides[0] + place * strides[1] + columns_W * strides[2]
    return tl.load(x_BLW + offsets_W, mask=columns_W < W, other=0.0).to(tl.float32)


@kernel
def store_row(x_BLW, x_W, image, place, strides, columns_W, W):
    offsets_W = image.to(tl.int64) * strides[0] + place * strides[1] + columns_W * strides[2]
    tl.store(x_BLW + offsets_W, x_W.to(x_BLW.dtype.element_ty), mask=columns_W < W)


def check_tensors(**tensors: Tensor) -> None:
    """ValueError unless all are floating point, none is empty, and they live on one device."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            raise ValueError(f"{name} must hold floating point numbers, at least one: "
                             f"it is {tensor.dtype} of shape {tuple(tensor.shape)}")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        raise ValueError("all on one device, please: " + ", ".join(f"{n} is on {t.device}" for n, t in tensors.items()))


# ---------------------------------------------------------------------------------------------------------------
# Masks


class KeyRanges:
    """A mask as a table: query i sees the keys j with first[i] <= j < last[i].

    Both ends never decrease with i. That is all the masks of next-scale prediction, in O(L) memory:

        scales (1, 2)        every earlier scale      own scale only       the last n scales lie between
        query 0              keys 0                   keys 0
        queries 1..4         keys 0 1 2 3 4           keys 1 2 3 4

    first, last: L integers each. Raises ValueError where a range is empty or an end decreases.
    """

    def __init__(self, first: Sequence[int], last: Sequence[int]):
        self.first, self.last = tuple(map(int, first)), tuple(map(int, last))
        if len(self.first) != len(self.last) or not self.first:
            raise ValueError(f"a range needs both ends: {len(self.first)} firsts and {len(self.last)} lasts given")
        for ends in (self.first, self.last):
            if any(b < a for a, b in zip(ends, ends[1:])):
                raise ValueError(f"range ends must not decrease from one query to the next: {ends}")
        if self.first[0] < 0 or any(b <= a for a, b in zip(self.first, self.last)):
            raise ValueError("every query must see at least one key, and no key before 0")
        self.runs = self._runs()
        self._tables: dict[torch.device, tuple[Tensor, ...]] = {}
        self._calls: dict[torch.device, list[tuple[int, int, int, int, Tensor | None]]] = {}

    @classmethod
    def from_scales(cls, scales: Sequence[int], last_scales: int | None = None) -> KeyRanges:
        """The block-causal table of token maps of s x s tokens, coarse to fine.

        last_scales: how many scales a token sees, its own among them: None is all of them so far (VAR), 1 is its
        own alone (a Markov model).
        """
        if last_scales is not None and last_scales < 1:
            raise ValueError(f"last_scales is {last_scales}: a token sees at least its own scale, so 1 or more")
        ends = [0]
        for s in scales:
            ends.append(ends[-1] + s * s)
        first, last = [], []
        for k, s in enumerate(scales):
            seen = 0 if last_scales is None else max(0, k + 1 - last_scales)
            first += [ends[seen]] * (s * s)
            last += [ends[k + 1]] * (s * s)
        return cls(first, last)

    def rows(self, begin: int, end: int) -> KeyRanges:
        """The table of the queries begin .. end-1 alone, as when generating one scale; keys keep their numbers."""
        return KeyRanges(self.first[begin:end], self.last[begin:end])

    def dense(self) -> Tensor:
        """The same mask as a bool [L, S], S the highest key in sight + 1: for pictures, tests and comparison."""
        keys = torch.arange(self.last[-1])
        return (keys >= torch.tensor(self.first)[:, None]) & (keys < torch.tensor(self.last)[:, None])

    def __len__(self) -> int:
        return len(self.first)

    def _runs(self) -> list[tuple[int, int, int, int]]:
        """Neighbouring queries with the same range: (first query, last query + 1, first key, last key + 1)."""
        runs, begin = [], 0
        for i in range(1, len(self.first) + 1):
            if i == len(self.first) or (self.first[i], self.last[i]) != (self.first[begin], self.last[begin]):
                runs.append((begin, i, self.first[begin], self.last[begin]))
                begin = i
        return runs

    def tables(self, device: torch.device) -> tuple[Tensor, ...]:
        """The table and its transpose as int32 on a device, made once: first_L, last_L, first_S, last_S.

        The queries that see key j are a range as well, first_S[j] <= i < last_S[j], empty where no query sees it:
        they begin after the queries whose range ends at or before j and end with the last whose range has begun.
        """
        if device not in self._tables:
            first_L, last_L, keys_S = torch.tensor(self.first), torch.tensor(self.last), torch.arange(self.last[-1])
            first_S = torch.searchsorted(last_L, keys_S, right=True)
            last_S = torch.searchsorted(first_L, keys_S, right=True)
            self._tables[device] = tuple(t.to(device, torch.int32) for t in (first_L, last_L, first_S, last_S))
        return self._tables[device]

    def calls(self, device: torch.device) -> list[tuple[int, int, int, int, Tensor | None]]:
        """Runs as (first query, last query + 1, first key, last key + 1, mask or None), short ones merged.

        A call of a few queries takes longer to start than to compute: short runs share one masked call until it
        has 64 queries. Measured on two CPU cores at L 130, where one call per scale lost to a dense mask.
        """
        if device not in self._calls:
            calls: list[tuple[int, int, int, int, bool]] = []
            for begin, end, first, last in self.runs:
                masked = bool(calls) and calls[-1][1] - calls[-1][0] < 64
                if masked:
                    begin, _, first, _, _ = calls.pop()
                calls.append((begin, end, first, last, masked))
            self._calls[device] = [
                (begin, end, first, last, self.rows(begin, end).dense()[:, first:].to(device) if masked else None)
                for begin, end, first, last, masked in calls]
        return self._calls[device]


# ---------------------------------------------------------------------------------------------------------------
# Attention over key ranges
#
# The obvious version writes the scores, the masked scores and the weights, each B H L S numbers, and reads them
# again: at B 64, H 16, L 680 in bf16 that is 6 x 0.95 GB, where q, k, v and o together are 0.36 GB. And it computes
# all L S scores, of which the next-scale mask keeps 62 %.
#
# Here a program holds a tile of queries and walks over the key tiles in its range, and over no others:
#
#     highest, total, o = -inf, 0, 0                                  one number, one number, one row per query
#     for each tile:   new     = max(highest, max scores)             scores = scale q k^T
#                      weights = exp(scores - new)                    what was summed so far shrinks by
#                      total   = total exp(highest - new) + sum of weights              exp(highest - new)
#                      o       = o     exp(highest - new) + weights v
#     o / total,  logsumexp = highest + log total
#
# which is softmax(scores) v (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691). The
# backward computes the weights again from the logsumexp, with d = dL/d for any name and delta = sum of o do per query:
#
#     dv = weights^T do      ds = weights (do v^T - delta)      dq = scale ds k      dk = scale ds^T q
#
# dq walks over keys as above; dk and dv hold a tile of keys and walk over the queries that see it.


def block_attention(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, ranges: KeyRanges, scale: float) -> Tensor:
    """softmax(scale * q k^T over the keys in range) v, as [B, H, L, D] (paper: Sec. 3.2, the block-wise causal mask).

    Floating point of one dtype, which autocast chooses where it is on; any strides. scale > 0. In Triton D is 16 to
    128. Raises ValueError where the ranges do not fit L queries and S keys, and for what a face cannot take.
    """
    if torch.is_autocast_enabled(q_BHLD.device.type):
        dtype = torch.get_autocast_dtype(q_BHLD.device.type)
        q_BHLD, k_BHSD, v_BHSD = q_BHLD.to(dtype), k_BHSD.to(dtype), v_BHSD.to(dtype)
    face = block_attention_triton if use_triton(q_BHLD) else block_attention_torch
    return face(q_BHLD, k_BHSD, v_BHSD, ranges, scale)


def check_attention(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, ranges: KeyRanges, scale: float) -> None:
    check_tensors(q=q_BHLD, k=k_BHSD, v=v_BHSD)
    (B, H, L, D), S = q_BHLD.shape, k_BHSD.shape[2]
    if k_BHSD.shape != (B, H, S, D) or v_BHSD.shape != (B, H, S, D):
        raise ValueError(f"k and v must be {(B, H, 'S', D)} to go with q of {(B, H, L, D)}: "
                         f"they are {tuple(k_BHSD.shape)} and {tuple(v_BHSD.shape)}")
    if not q_BHLD.dtype == k_BHSD.dtype == v_BHSD.dtype:
        raise ValueError(f"q, k and v must have one dtype: they have {q_BHLD.dtype}, {k_BHSD.dtype}, {v_BHSD.dtype}")
    if len(ranges) != L or ranges.last[-1] > S:
        raise ValueError(f"ranges of {len(ranges)} queries and {ranges.last[-1]} keys do not fit "
                         f"{L} queries and {S} keys")
    if not scale > 0:
        raise ValueError(f"scale must be positive: it is {scale}")


@kernel
def plan_tiles(first, last, begin, stop, TILE: tl.constexpr):
    """Which partners the rows begin .. stop - 1 of a table meet: (start, cut before, whole, cut in all).

    From `start` on, tiles of TILE partners: `cut before` tiles that only some rows see, `whole` ones that all rows
    see, and cut ones again up to the last partner that any row sees. Both ends of a range grow with the row, so two
    rows tell it all.
    """
    start, some_end = tl.load(first + begin), tl.load(last + stop - 1)
    all_start, all_end = tl.load(first + stop - 1), tl.load(last + begin)
    before = tl.cdiv(all_start - start, TILE)
    whole = tl.maximum(all_end - start - before * TILE, 0) // TILE
    after = tl.cdiv(tl.maximum(some_end - start - (before + whole) * TILE, 0), TILE)
    return start, before, whole, before + after


@kernel
def tile_partners(n, start, before, whole, CUT: tl.constexpr, TILE: tl.constexpr):
    """The partners in the n-th cut tile, or in the n-th whole one."""
    if CUT:
        tile = tl.where(n < before, n, n + whole)   # the cut tiles lie on both sides of the whole ones
    else:
        tile = before + n
    return start + tile * TILE + tl.arange(0, TILE)


@kernel
def aligned(stride, D: tl.constexpr):
    """The stride, visibly a multiple of 8 where D is one: then 16 bytes can be moved at once. `rows_first` sees to it."""
    return stride // 8 * 8 if D % 8 == 0 else stride


@kernel
def head_offset(batch_head, H, strides, D: tl.constexpr):
    """Where a head of an image begins, in 64 bits: B H L D may pass 2^31."""
    return ((batch_head // H).to(tl.int64) * aligned(strides[0], D)
            + (batch_head % H).to(tl.int64) * aligned(strides[1], D))


@kernel
def row_offsets(rows_T, strides, D: tl.constexpr):
    """Offsets of rows of a head, and which of them lie within D: a block's width must be a power of two."""
    columns = tl.arange(0, triton.next_power_of_2(D))[None, :]
    return rows_T[:, None] * aligned(strides[2], D) + columns, columns < D


@kernel
def load_rows(x_LD, rows_T, end, strides, D: tl.constexpr, CUT: tl.constexpr):
    """Rows of a head as [T, D]; zeros beyond D and, where the tile may reach over it (CUT), from row `end` on."""
    offsets_TD, inside_TD = row_offsets(rows_T, strides, D)
    if CUT:
        inside_TD &= rows_T[:, None] < end
    return tl.load(x_LD + offsets_TD, mask=inside_TD, other=0.0)


@kernel
def store_rows(x_LD, x_TD, rows_T, end, strides, D: tl.constexpr):
    offsets_TD, inside_TD = row_offsets(rows_T, strides, D)
    tl.store(x_LD + offsets_TD, x_TD.to(x_LD.dtype.element_ty), mask=inside_TD & (rows_T[:, None] < end))


@kernel
def seen_by(rows_T, end, first, last, partners_T):
    """Bool [T rows, T partners]: which partner lies in the range of which row; `end` is the length of the table."""
    rows_T = tl.minimum(rows_T, end - 1)
    return ((partners_T[None, :] >= tl.load(first + rows_T)[:, None])
            & (partners_T[None, :] < tl.load(last + rows_T)[:, None]))


@kernel
def attention_forward(q_BHLD, k_BHSD, v_BHSD, first_L, last_L, o_BHLD, logsumexp_BHL,
                      q_strides, k_strides, v_strides, o_strides, scale, H, L, S,
                      D: tl.constexpr, TILE_L: tl.constexpr, TILE_S: tl.constexpr):
    tiles = tl.cdiv(L, TILE_L)
    tile, head = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles   # the last see most: they go first
    queries_T = tile * TILE_L + tl.arange(0, TILE_L)
    k_SD = k_BHSD + head_offset(head, H, k_strides, D)
    v_SD = v_BHSD + head_offset(head, H, v_strides, D)
    q_TD = load_rows(q_BHLD + head_offset(head, H, q_strides, D), queries_T, L, q_strides, D, True)
    bits = scale * 1.4426950408889634   # exp(x) = 2^(x log2 e), and 2^x is one instruction
    # Finite, so that a query that sees nothing of its first tile computes exp2(-inf - highest) = 0 and not a NaN.
    highest_T = tl.full([TILE_L], -3.0e38, tl.float32)
    total_T = tl.zeros([TILE_L], tl.float32)
    o_TD = tl.zeros(q_TD.shape, tl.float32)
    start, before, whole, cut = plan_tiles(first_L, last_L, tile * TILE_L, tl.minimum(L, (tile + 1) * TILE_L), TILE_S)
    for CUT in tl.static_range(2):
        for n in range(cut if CUT else whole):
            keys_T = tile_partners(n, start, before, whole, CUT, TILE_S)
            k_TD = load_rows(k_SD, keys_T, S, k_strides, D, CUT)
            scores_TS = tl.dot(q_TD, k_TD.T, input_precision="ieee")
            if CUT:
                scores_TS = tl.where(seen_by(queries_T, L, first_L, last_L, keys_T), scores_TS, -float("inf"))
            new_T = tl.maximum(highest_T, tl.max(scores_TS, 1) * bits)
            weights_TS = tl.exp2(scores_TS * bits - new_T[:, None])
            shrink_T = tl.exp2(highest_T - new_T)
            total_T = total_T * shrink_T + tl.sum(weights_TS, 1)
            v_TD = load_rows(v_SD, keys_T, S, v_strides, D, CUT)
            o_TD = tl.dot(weights_TS.to(v_TD.dtype), v_TD, o_TD * shrink_T[:, None], input_precision="ieee")
            highest_T = new_T
    store_rows(o_BHLD + head_offset(head, H, o_strides, D), o_TD / total_T[:, None], queries_T, L, o_strides, D)
    tl.store(logsumexp_BHL + head * L + queries_T, highest_T + tl.log2(total_T), mask=queries_T < L)


@kernel
def attention_backward_q(q_BHLD, k_BHSD, v_BHSD, first_L, last_L, o_BHLD, do_BHLD, logsumexp_BHL, delta_BHL, dq_BHLD,
                         q_strides, k_strides, v_strides, o_strides, do_strides, dq_strides, scale, H, L, S,
                         D: tl.constexpr, TILE_L: tl.constexpr, TILE_S: tl.constexpr):
    tiles = tl.cdiv(L, TILE_L)
    tile, head = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    queries_T = tile * TILE_L + tl.arange(0, TILE_L)
    k_SD = k_BHSD + head_offset(head, H, k_strides, D)
    v_SD = v_BHSD + head_offset(head, H, v_strides, D)
    q_TD = load_rows(q_BHLD + head_offset(head, H, q_strides, D), queries_T, L, q_strides, D, True)
    o_TD = load_rows(o_BHLD + head_offset(head, H, o_strides, D), queries_T, L, o_strides, D, True)
    do_TD = load_rows(do_BHLD + head_offset(head, H, do_strides, D), queries_T, L, do_strides, D, True)
    logsumexp_T = tl.load(logsumexp_BHL + head * L + queries_T, mask=queries_T < L, other=0.0)
    delta_T = tl.sum(o_TD.to(tl.float32) * do_TD.to(tl.float32), 1)
    tl.store(delta_BHL + head * L + queries_T, delta_T, mask=queries_T < L)   # for attention_backward_kv
    bits = scale * 1.4426950408889634
    dq_TD = tl.zeros(q_TD.shape, tl.float32)
    start, before, whole, cut = plan_tiles(first_L, last_L, tile * TILE_L, tl.minimum(L, (tile + 1) * TILE_L), TILE_S)
    for CUT in tl.static_range(2):
        for n in range(cut if CUT else whole):
            keys_T = tile_partners(n, start, before, whole, CUT, TILE_S)
            k_TD = load_rows(k_SD, keys_T, S, k_strides, D, CUT)
            v_TD = load_rows(v_SD, keys_T, S, v_strides, D, CUT)
            weights_TS = tl.exp2(tl.dot(q_TD, k_TD.T, input_precision="ieee") * bits - logsumexp_T[:, None])
            if CUT:
                weights_TS = tl.where(seen_by(queries_T, L, first_L, last_L, keys_T), weights_TS, 0.0)
            dweights_TS = tl.dot(do_TD, v_TD.T, input_precision="ieee")
            dscores_TS = weights_TS * (dweights_TS - delta_T[:, None])
            dq_TD = tl.dot(dscores_TS.to(k_TD.dtype), k_TD, dq_TD, input_precision="ieee")
    store_rows(dq_BHLD + head_offset(head, H, dq_strides, D), dq_TD * scale, queries_T, L, dq_strides, D)


@kernel
def attention_backward_kv(q_BHLD, k_BHSD, v_BHSD, first_S, last_S, do_BHLD, logsumexp_BHL, delta_BHL, dk_BHSD, dv_BHSD,
                          q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides, scale, H, L, S,
                          D: tl.constexpr, TILE_L: tl.constexpr, TILE_S: tl.constexpr):
    tiles = tl.cdiv(S, TILE_S)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles   # the first keys are seen by most: they go first
    keys_T = tile * TILE_S + tl.arange(0, TILE_S)
    q_LD = q_BHLD + head_offset(head, H, q_strides, D)
    do_LD = do_BHLD + head_offset(head, H, do_strides, D)
    k_TD = load_rows(k_BHSD + head_offset(head, H, k_strides, D), keys_T, S, k_strides, D, True)
    v_TD = load_rows(v_BHSD + head_offset(head, H, v_strides, D), keys_T, S, v_strides, D, True)
    bits = scale * 1.4426950408889634
    dk_TD = tl.zeros(k_TD.shape, tl.float32)
    dv_TD = tl.zeros(k_TD.shape, tl.float32)
    start, before, whole, cut = plan_tiles(first_S, last_S, tile * TILE_S, tl.minimum(S, (tile + 1) * TILE_S), TILE_L)
    for CUT in tl.static_range(2):
        for n in range(cut if CUT else whole):
            queries_T = tile_partners(n, start, before, whole, CUT, TILE_L)
            q_TD = load_rows(q_LD, queries_T, L, q_strides, D, CUT)
            do_TD = load_rows(do_LD, queries_T, L, do_strides, D, CUT)
            logsumexp_T = tl.load(logsumexp_BHL + head * L + queries_T, mask=queries_T < L, other=0.0)
            delta_T = tl.load(delta_BHL + head * L + queries_T, mask=queries_T < L, other=0.0)
            weights_ST = tl.exp2(tl.dot(k_TD, q_TD.T, input_precision="ieee") * bits - logsumexp_T[None, :])
            if CUT:
                weights_ST = tl.where(seen_by(keys_T, S, first_S, last_S, queries_T), weights_ST, 0.0)
            dv_TD = tl.dot(weights_ST.to(do_TD.dtype), do_TD, dv_TD, input_precision="ieee")
            dweights_ST = tl.dot(v_TD, do_TD.T, input_precision="ieee")
            dscores_ST = weights_ST * (dweights_ST - delta_T[None, :])
            dk_TD = tl.dot(dscores_ST.to(q_TD.dtype), q_TD, dk_TD, input_precision="ieee")
    store_rows(dk_BHSD + head_offset(head, H, dk_strides, D), dk_TD * scale, keys_T, S, dk_strides, D)
    store_rows(dv_BHSD + head_offset(head, H, dv_strides, D), dv_TD, keys_T, S, dv_strides, D)


# By kernel, bytes per number and head width up to: queries and keys in a tile, warps, stages of the load pipeline.
# The largest of those tried that spill next to no register on sm_80, sm_90 and sm_100 (tests/test_kernels.py prints
# it) and fit in shared memory, 99 kB on the consumer cards that run the code of sm_80 and 227 kB on the other two.
# fp32 is multiplied without tensor cores, which would round it to TF32, and wants small tiles.
ATTENTION_TILES = {
    ("forward", 2, 64): (128, 64, 8, 3), ("forward", 2, 128): (128, 64, 8, 3),
    ("forward", 4, 64): (64, 32, 8, 2), ("forward", 4, 128): (32, 64, 8, 2),
    ("backward_q", 2, 64): (128, 64, 8, 3), ("backward_q", 2, 128): (64, 64, 4, 2),
    ("backward_q", 4, 64): (64, 32, 8, 2), ("backward_q", 4, 128): (32, 16, 4, 2),
    ("backward_kv", 2, 64): (64, 128, 8, 3), ("backward_kv", 2, 128): (32, 64, 8, 3),
    ("backward_kv", 4, 64): (32, 32, 8, 2), ("backward_kv", 4, 128): (16, 32, 8, 2),
}


def attention_tiles(name: str, q_BHLD: Tensor) -> dict[str, int]:
    width = 64 if q_BHLD.shape[3] <= 64 else 128
    TILE_L, TILE_S, num_warps, num_stages = ATTENTION_TILES[name, q_BHLD.element_size(), width]
    return dict(D=q_BHLD.shape[3], TILE_L=TILE_L, TILE_S=TILE_S, num_warps=num_warps, num_stages=num_stages)


def rows_first(x_BHLD: Tensor) -> Tensor:
    """x itself if the kernels can read it: rows in one piece and, where D is a multiple of 8, so is every stride."""
    *strides, last = x_BHLD.stride()
    fits = last == 1 and (x_BHLD.shape[3] % 8 != 0 or all(stride % 8 == 0 for stride in strides))
    return x_BHLD if fits else x_BHLD.contiguous()


class BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHLD, k_BHSD, v_BHSD, ranges, scale):
        q_BHLD, k_BHSD, v_BHSD = map(rows_first, (q_BHLD, k_BHSD, v_BHSD))
        (B, H, L, _), S = q_BHLD.shape, k_BHSD.shape[2]
        first_L, last_L, _, _ = ranges.tables(q_BHLD.device)
        o_BHLD, logsumexp_BHL = torch.empty_like(q_BHLD), q_BHLD.new_empty(B, H, L, dtype=torch.float32)
        tiles = attention_tiles("forward", q_BHLD)
        launch(attention_forward, B * H * -(-L // tiles["TILE_L"]), q_BHLD, k_BHSD, v_BHSD, first_L, last_L, o_BHLD,
               logsumexp_BHL, q_BHLD.stride(), k_BHSD.stride(), v_BHSD.stride(), o_BHLD.stride(), scale, H, L, S,
               **tiles)
        ctx.save_for_backward(q_BHLD, k_BHSD, v_BHSD, o_BHLD, logsumexp_BHL)
        ctx.ranges, ctx.scale = ranges, scale
        return o_BHLD

    @staticmethod
    @once_differentiable
    def backward(ctx, do_BHLD):
        q_BHLD, k_BHSD, v_BHSD, o_BHLD, logsumexp_BHL = ctx.saved_tensors
        do_BHLD = rows_first(do_BHLD)
        (B, H, L, _), S = q_BHLD.shape, k_BHSD.shape[2]
        first_L, last_L, first_S, last_S = ctx.ranges.tables(q_BHLD.device)
        delta_BHL = torch.empty_like(logsumexp_BHL)
        dq_BHLD, dk_BHSD, dv_BHSD = map(torch.empty_like, (q_BHLD, k_BHSD, v_BHSD))
        strides = q_BHLD.stride(), k_BHSD.stride(), v_BHSD.stride()
        tiles = attention_tiles("backward_q", q_BHLD)
        launch(attention_backward_q, B * H * -(-L // tiles["TILE_L"]), q_BHLD, k_BHSD, v_BHSD, first_L, last_L, o_BHLD,
               do_BHLD, logsumexp_BHL, delta_BHL, dq_BHLD, *strides, o_BHLD.stride(), do_BHLD.stride(),
               dq_BHLD.stride(), ctx.scale, H, L, S, **tiles)
        tiles = attention_tiles("backward_kv", q_BHLD)
        launch(attention_backward_kv, B * H * -(-S // tiles["TILE_S"]), q_BHLD, k_BHSD, v_BHSD, first_S, last_S,
               do_BHLD, logsumexp_BHL, delta_BHL, dk_BHSD, dv_BHSD, *strides, do_BHLD.stride(), dk_BHSD.stride(),
               dv_BHSD.stride(), ctx.scale, H, L, S, **tiles)
        return dq_BHLD, dk_BHSD, dv_BHSD, None, None


def block_attention_triton(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, ranges: KeyRanges, scale: float) -> Tensor:
    check_attention(q_BHLD, k_BHSD, v_BHSD, ranges, scale)
    if not 16 <= q_BHLD.shape[3] <= 128:
        raise ValueError(f"the Triton kernel takes a head width of 16 to 128: it is {q_BHLD.shape[3]}")
    if q_BHLD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the Triton kernel takes float32, float16 and bfloat16: q is {q_BHLD.dtype}")
    seen = ranges.last[-1]
    if seen < k_BHSD.shape[2]:   # the keys after those in sight may hold anything, as in a cache not yet full
        k_BHSD, v_BHSD = k_BHSD[:, :, :seen], v_BHSD[:, :, :seen]
    return BlockAttention.apply(q_BHLD, k_BHSD, v_BHSD, ranges, float(scale))


def block_attention_torch(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, ranges: KeyRanges, scale: float) -> Tensor:
    """One call per run of queries that see the same keys, unmasked: one per scale, and nothing computed in vain."""
    check_attention(q_BHLD, k_BHSD, v_BHSD, ranges, scale)
    parts = [attend(q_BHLD[:, :, begin:end], k_BHSD[:, :, first:last], v_BHSD[:, :, first:last], mask, scale)
             for begin, end, first, last, mask in ranges.calls(q_BHLD.device)]
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def attend(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask_LS: Tensor | None, scale: float) -> Tensor:
    """One call. Training in half precision on a CPU goes through fp32, which is closer and faster there: PyTorch's
    fused backward takes 30 ms in fp32 and 64 in bf16 (B 64, H 4, L 130, D 48, two cores with AVX512-BF16)."""
    dtype = q_BHLD.dtype
    if q_BHLD.device.type == "cpu" and q_BHLD.requires_grad:
        q_BHLD, k_BHSD, v_BHSD = q_BHLD.float(), k_BHSD.float(), v_BHSD.float()
    return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, attn_mask=mask_LS, scale=scale).to(dtype)


# ---------------------------------------------------------------------------------------------------------------
# Nearest code
#
# The obvious version (torch.cdist, then argmin) writes and reads the N V distances: at N 43,520 and V 4096 in fp32
# 2 x 0.71 GB, to find 43,520 indices from 5.6 MB of vectors and 0.5 MB of codes.
#
#     |x - e|^2 = |x|^2 - 2 x.e + |e|^2, where |x|^2 is the same for every code, so       argmin_v |e_v|^2 - 2 x.e_v
#
# For the cosine, e has norm 1 and the first term is left out: argmax x.e = argmin 0 - 2 x.e.


def nearest_code(x_NC: Tensor, codebook_VC: Tensor, cosine: bool = False) -> Tensor:
    """argmin_v |x_n - e_v|^2 as int64 [N]; the lowest index wins a tie (paper: eq. 3).

    cosine: argmax_v of the cosine between x_n and e_v instead, as for a codebook used through its directions.
    Always in fp32: half precision changes codes. Raises ValueError where the widths differ or there is nothing.
    """
    face = nearest_code_triton if use_triton(x_NC) else nearest_code_torch
    return face(x_NC, codebook_VC, cosine)


def code_terms(x_NC: Tensor, codebook_VC: Tensor, cosine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x_NC, e_VC and the squares_V such that the nearest code is argmin_v squares_v - 2 x.e_v, in fp32."""
    check_tensors(x=x_NC, codebook=codebook_VC)
    if x_NC.ndim != 2 or codebook_VC.ndim != 2 or x_NC.shape[1] != codebook_VC.shape[1]:
        raise ValueError(f"x and codebook must be [N, C] and [V, C] with one C: "
                         f"they are {tuple(x_NC.shape)} and {tuple(codebook_VC.shape)}")
    e_VC = codebook_VC.float()
    if cosine:
        e_VC = F.normalize(e_VC, dim=1)
    return x_NC.float(), e_VC, torch.zeros_like(e_VC[:, 0]) if cosine else e_VC.square().sum(dim=1)


@kernel
def nearest_code_kernel(x_NC, e_VC, squares_V, index_N, x_strides, e_strides, N, V,
                        C: tl.constexpr, TILE_N: tl.constexpr, TILE_V: tl.constexpr, TILE_C: tl.constexpr):
    rows_T = tl.program_id(0).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    best_TV = tl.full([TILE_N, TILE_V], float("inf"), tl.float32)   # per vector and column of the tiles of codes,
    tile_TV = tl.zeros([TILE_N, TILE_V], tl.int32)                  # and in which tile: one search at the end
    for tile in range(0, V, TILE_V):
        codes_T = tile + tl.arange(0, TILE_V)
        dots_TV = tl.zeros([TILE_N, TILE_V], tl.float32)
        for channel in range(0, C, TILE_C):
            channels_T = channel + tl.arange(0, TILE_C)
            x_TC = tl.load(x_NC + rows_T[:, None] * x_strides[0] + channels_T[None, :] * x_strides[1],
                           mask=(rows_T[:, None] < N) & (channels_T[None, :] < C), other=0.0)
            e_CT = tl.load(e_VC + codes_T[None, :] * e_strides[0] + channels_T[:, None] * e_strides[1],
                           mask=(codes_T[None, :] < V) & (channels_T[:, None] < C), other=0.0)
            dots_TV = tl.dot(x_TC, e_CT, dots_TV, input_precision="ieee")   # TF32 would change codes
        squares_T = tl.load(squares_V + codes_T, mask=codes_T < V, other=float("inf"))
        distance_TV = squares_T[None, :] - 2 * dots_TV
        closer_TV = distance_TV < best_TV   # not <=: of equal distances the lower index stays
        best_TV = tl.where(closer_TV, distance_TV, best_TV)
        tile_TV = tl.where(closer_TV, tile, tile_TV)
    index_TV = tile_TV + tl.arange(0, TILE_V)[None, :]
    least_T = tl.min(best_TV, 1)
    index_T = tl.min(tl.where(best_TV == least_T[:, None], index_TV, V), 1)
    tl.store(index_N + rows_T, index_T.to(tl.int64), mask=rows_T < N)


def nearest_code_triton(x_NC: Tensor, codebook_VC: Tensor, cosine: bool = False) -> Tensor:
    x_NC, e_VC, squares_V = code_terms(x_NC.detach(), codebook_VC.detach(), cosine)
    (N, C), V = x_NC.shape, len(e_VC)
    index_N = torch.empty(N, dtype=torch.int64, device=x_NC.device)
    launch(nearest_code_kernel, -(-N // 64), x_NC, e_VC, squares_V, index_N, x_NC.stride(), e_VC.stride(), N, V,
           C=C, TILE_N=64, TILE_V=64, TILE_C=16 if C <= 16 else 32, num_warps=4, num_stages=3)
    return index_N


def nearest_code_torch(x_NC: Tensor, codebook_VC: Tensor, cosine: bool = False) -> Tensor:
    with torch.no_grad(), torch.autocast(x_NC.device.type, enabled=False):
        x_NC, e_VC, squares_V = code_terms(x_NC, codebook_VC, cosine)
        return torch.addmm(squares_V, x_NC, e_VC.T, alpha=-2).argmin(dim=1)


# ---------------------------------------------------------------------------------------------------------------
# Adaptive layer norm
#
# In fp32 steps, the obvious version writes and reads the normalised x, then the scaled one, then casts: at bf16
# about 20 bytes per number of x, where reading x and writing y is 4.
#
#     n = (x - mean) / sqrt(variance + 1e-6)       y = n (1 + scale) + shift           mean and variance over W
#
# Backward, with g = dy (1 + scale):   dx = (g - mean(g) - n mean(g n)) / sqrt(variance + 1e-6)
#                                      dscale = sum over the tokens of an image of dy n,       dshift = that of dy


def adaln(x_BLW: Tensor, scale_BW: Tensor, shift_BW: Tensor) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift, one scale and shift per image; the norm has eps 1e-6 and no weights.

    As x in shape and dtype, computed in fp32: a mean and a variance in bf16 are worth little. scale and shift may
    have other dtypes than x, as under autocast. Raises ValueError where the shapes do not fit.
    """
    face = adaln_triton if use_triton(x_BLW) else adaln_torch
    return face(x_BLW, scale_BW, shift_BW)


def check_adaln(x_BLW: Tensor, scale_BW: Tensor, shift_BW: Tensor) -> None:
    check_tensors(x=x_BLW, scale=scale_BW, shift=shift_BW)
    if x_BLW.ndim != 3 or not scale_BW.shape == shift_BW.shape == (x_BLW.shape[0], x_BLW.shape[2]):
        raise ValueError(f"x must be [B, L, W], scale and shift [B, W]: they are {tuple(x_BLW.shape)}, "
                         f"{tuple(scale_BW.shape)} and {tuple(shift_BW.shape)}")


@kernel
def normalise(x_W, inside_W, W):
    """A row with mean 0 and variance 1, and 1 / sqrt(variance + eps); both passes in registers, so nothing cancels."""
    centred_W = tl.where(inside_W, x_W - tl.sum(x_W) / W, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred_W * centred_W) / W + 1e-6)
    return centred_W * inverse, inverse


@kernel
def adaln_forward(x_BLW, scale_B1W, shift_B1W, y_BLW, x_strides, scale_strides, shift_strides, y_strides, L, W,
                  TILE_W: tl.constexpr):
    image, token, columns_W = tl.program_id(0) // L, tl.program_id(0) % L, tl.arange(0, TILE_W)
    x_W = load_row(x_BLW, image, token, x_strides, columns_W, W)
    scale_W = load_row(scale_B1W, image, 0, scale_strides, columns_W, W)
    shift_W = load_row(shift_B1W, image, 0, shift_strides, columns_W, W)
    normed_W, _ = normalise(x_W, columns_W < W, W)
    store_row(y_BLW, normed_W * (1 + scale_W) + shift_W, image, token, y_strides, columns_W, W)


@kernel
def adaln_backward(x_BLW, scale_B1W, dy_BLW, dx_BLW, dscale_BPW, dshift_BPW, x_strides, scale_strides, dy_strides,
                   dx_strides, sum_strides, L, W, TOKENS: tl.constexpr, TILE_W: tl.constexpr):
    """TOKENS tokens of an image, part P of its sums: they are added up afterwards, in the same order every time."""
    parts = tl.cdiv(L, TOKENS)
    image, part, columns_W = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.arange(0, TILE_W)
    scale_W = load_row(scale_B1W, image, 0, scale_strides, columns_W, W)
    dscale_W, dshift_W = tl.zeros([TILE_W], tl.float32), tl.zeros([TILE_W], tl.float32)
    for token in range(part * TOKENS, tl.minimum(L, (part + 1) * TOKENS)):
        normed_W, inverse = normalise(load_row(x_BLW, image, token, x_strides, columns_W, W), columns_W < W, W)
        dy_W = load_row(dy_BLW, image, token, dy_strides, columns_W, W)
        dscale_W += dy_W * normed_W
        dshift_W += dy_W
        g_W = dy_W * (1 + scale_W)
        dx_W = (g_W - tl.sum(g_W) / W - normed_W * (tl.sum(g_W * normed_W) / W)) * inverse
        store_row(dx_BLW, dx_W, image, token, dx_strides, columns_W, W)
    store_row(dscale_BPW, dscale_W, image, part, sum_strides, columns_W, W)
    store_row(dshift_BPW, dshift_W, image, part, sum_strides, columns_W, W)


def adaln_tiles(W: int) -> dict[str, int]:
    """A row in registers, 8 numbers a thread: 16 bytes at a time in bf16."""
    TILE_W = triton.next_power_of_2(W)
    return dict(TILE_W=TILE_W, num_warps=min(16, max(1, TILE_W // 256)))


class AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BLW, scale_B1W, shift_B1W):
        (B, L, W), y_BLW = x_BLW.shape, torch.empty_like(x_BLW)
        launch(adaln_forward, B * L, x_BLW, scale_B1W, shift_B1W, y_BLW, x_BLW.stride(), scale_B1W.stride(),
               shift_B1W.stride(), y_BLW.stride(), L, W, **adaln_tiles(W))
        ctx.save_for_backward(x_BLW, scale_B1W)
        ctx.shift_dtype = shift_B1W.dtype
        return y_BLW

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BLW):
        x_BLW, scale_B1W = ctx.saved_tensors
        (B, L, W), tokens = x_BLW.shape, 32   # the sums are an eighth or less of what is read and written
        parts, dx_BLW = -(-L // tokens), torch.empty_like(x_BLW)
        dscale_BPW, dshift_BPW = x_BLW.new_empty(2, B, parts, W, dtype=torch.float32)
        launch(adaln_backward, B * parts, x_BLW, scale_B1W, dy_BLW, dx_BLW, dscale_BPW, dshift_BPW, x_BLW.stride(),
               scale_B1W.stride(), dy_BLW.stride(), dx_BLW.stride(), dscale_BPW.stride(), L, W, TOKENS=tokens,
               **adaln_tiles(W))
        dscale_B1W, dshift_B1W = dscale_BPW.sum(dim=1, keepdim=True), dshift_BPW.sum(dim=1, keepdim=True)
        return dx_BLW, dscale_B1W.to(scale_B1W.dtype), dshift_B1W.to(ctx.shift_dtype)


def adaln_triton(x_BLW: Tensor, scale_BW: Tensor, shift_BW: Tensor) -> Tensor:
    check_adaln(x_BLW, scale_BW, shift_BW)
    if x_BLW.shape[2] > 16384:
        raise ValueError(f"the Triton kernel holds a row in registers, a width up to 16384: it is {x_BLW.shape[2]}")
    return AdaLN.apply(x_BLW, scale_BW[:, None], shift_BW[:, None])


def adaln_torch(x_BLW: Tensor, scale_BW: Tensor, shift_BW: Tensor) -> Tensor:
    check_adaln(x_BLW, scale_BW, shift_BW)
    normed_BLW = F.layer_norm(x_BLW.float(), x_BLW.shape[-1:], eps=1e-6)
    return torch.addcmul(shift_BW.float()[:, None], normed_BLW, 1 + scale_BW.float()[:, None]).to(x_BLW.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Sampling
#
# The obvious version sorts every row and moves it some twenty times: sorted logits and their 64-bit order, softmax,
# cumulative sum, two masks, the way back through the order. Here a row is read once and stays in registers.
#
# "Drop a token if the tokens ranked before it hold `target` of weight or more" is top-k with every weight 1 and
# target k, and top-p with the probabilities and p. It needs no order, only the largest number such that the tokens
# from there up hold at least the target. A float's bits, read as an unsigned integer with the sign turned round, are
# in the same order as the floats: the number is found bit by bit from the top, in 32 sums over the row.
#
# Probabilities are counted in whole units of 2^-40 of the largest: integer sums are the same in every order, so that
# both faces draw the same token.


def sample_tokens(cond_BlV: Tensor, uncond_BlV: Tensor | None, guidance: float, top_k: int, top_p: float,
                  noise_BlV: Tensor) -> Tensor:
    """Draw one token per place: int64 [B, l].

    logits = (1 + guidance) * cond - guidance * uncond   (classifier-free guidance; uncond None: cond alone)
    top_k: keep the k most likely tokens; k <= 0 or >= V keeps all. Of equal logits the lower index ranks first.
    top_p: of those, keep a token if the tokens ranked before it hold less than p of the probability; 1 keeps all.
    noise_BlV: Exponential(1) draws. argmax(logits - ln noise) is a draw from softmax(logits) (Gumbel-max).
    """
    face = sample_tokens_triton if use_triton(cond_BlV) else sample_tokens_torch
    return face(cond_BlV, uncond_BlV, guidance, top_k, top_p, noise_BlV)


def check_sampling(cond_BlV: Tensor, uncond_BlV: Tensor | None, noise_BlV: Tensor) -> None:
    given = dict(cond=cond_BlV, uncond=uncond_BlV, noise=noise_BlV)
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    check_tensors(**given)
    if cond_BlV.ndim != 3 or any(tensor.shape != cond_BlV.shape for tensor in given.values()):
        raise ValueError("logits and noise must have one shape [B, l, V]: "
                         + ", ".join(f"{name} is {tuple(tensor.shape)}" for name, tensor in given.items()))


@kernel
def ranked_within(keys_V, weights_V, target):
    """Which tokens have less than `target` of weight ranked before them: higher keys, or equal ones further left."""
    threshold = tl.zeros([], tl.uint32)
    for bit in range(32):
        higher = threshold | (tl.full([], 0x80000000, tl.uint32) >> bit)
        held = tl.sum(tl.where(keys_V >= higher, weights_V, 0))
        threshold = tl.where(held >= target, higher, threshold)
    above = tl.sum(tl.where(keys_V > threshold, weights_V, 0))
    level_V = tl.where(keys_V == threshold, weights_V, 0)
    return (keys_V > threshold) | ((keys_V == threshold) & (above + tl.cumsum(level_V, 0) - level_V < target))


@kernel
def sample_tokens_kernel(cond_BlV, uncond_BlV, noise_BlV, token_Bl, cond_strides, uncond_strides, noise_strides,
                         guidance, top_k, top_p, l, V, GUIDED: tl.constexpr, TILE_V: tl.constexpr):
    image, place, tokens_V = tl.program_id(0) // l, tl.program_id(0) % l, tl.arange(0, TILE_V)
    inside_V = tokens_V < V
    logits_V = load_row(cond_BlV, image, place, cond_strides, tokens_V, V)
    if GUIDED:
        uncond_V = load_row(uncond_BlV, image, place, uncond_strides, tokens_V, V)
        logits_V = logits_V + guidance * (logits_V - uncond_V)
    logits_V = tl.where(inside_V, logits_V, -float("inf"))
    bits_V = tl.where(logits_V == 0, 0.0, logits_V).to(tl.uint32, bitcast=True)   # -0 and 0 are one number
    keys_V = bits_V ^ tl.where(logits_V < 0, 0xFFFFFFFF, 0x80000000)
    kept_V = inside_V
    if top_k < V:
        kept_V &= ranked_within(keys_V, inside_V.to(tl.int32), top_k)
    if top_p < 1:
        share_V = tl.exp(logits_V - tl.max(logits_V, 0))
        units_V = tl.where(kept_V, share_V * (1 << 40), 0.0).to(tl.int64)
        target = (tl.sum(units_V).to(tl.float32) * top_p).to(tl.int64)
        kept_V &= ranked_within(keys_V, units_V, tl.maximum(target, 1))   # 1: the most likely token stays, whatever p
    noise_V = load_row(noise_BlV, image, place, noise_strides, tokens_V, V)
    score_V = tl.where(kept_V, logits_V - tl.log(noise_V), -float("inf"))
    tl.store(token_Bl + tl.program_id(0), tl.argmax(score_V, 0).to(tl.int64))


def sample_tokens_triton(cond_BlV: Tensor, uncond_BlV: Tensor | None, guidance: float, top_k: int, top_p: float,
                         noise_BlV: Tensor) -> Tensor:
    check_sampling(cond_BlV, uncond_BlV, noise_BlV)
    B, l, V = cond_BlV.shape
    if V > 65536:
        raise ValueError(f"the Triton kernel holds a row in registers, a vocabulary up to 65536: it is {V}")
    token_Bl = torch.empty(B, l, dtype=torch.int64, device=cond_BlV.device)
    guided, TILE_V = uncond_BlV is not None, triton.next_power_of_2(V)
    uncond_BlV = uncond_BlV if guided else cond_BlV
    launch(sample_tokens_kernel, B * l, cond_BlV, uncond_BlV, noise_BlV, token_Bl, cond_BlV.stride(),
           uncond_BlV.stride(), noise_BlV.stride(), float(guidance), top_k if top_k > 0 else V, float(top_p), l, V,
           GUIDED=guided, TILE_V=TILE_V, num_warps=min(32, max(1, TILE_V // 512)),   # 16 numbers a thread
           enable_fp_fusion=False)   # a fused multiply-add rounds once where the twin rounds twice, and ties break
    return token_Bl


def sample_tokens_torch(cond_BlV: Tensor, uncond_BlV: Tensor | None, guidance: float, top_k: int, top_p: float,
                        noise_BlV: Tensor) -> Tensor:
    check_sampling(cond_BlV, uncond_BlV, noise_BlV)
    logits_BlV, V = cond_BlV.float(), cond_BlV.shape[-1]
    if uncond_BlV is not None:
        logits_BlV = logits_BlV + guidance * (logits_BlV - uncond_BlV.float())
    score_BlV = logits_BlV - noise_BlV.float().log()
    limited = 0 < top_k < V
    if limited or top_p < 1:
        ranked_BlV, order_BlV = logits_BlV.sort(dim=-1, descending=True, stable=True)
        kept_BlV = torch.ones_like(ranked_BlV, dtype=torch.bool)
        if limited:
            kept_BlV[..., top_k:] = False
        if top_p < 1:
            units_BlV = ((ranked_BlV - ranked_BlV[..., :1]).exp() * 2**40).long() * kept_BlV
            target_Bl1 = (units_BlV.sum(dim=-1, keepdim=True).float() * top_p).long().clamp(min=1)
            kept_BlV &= units_BlV.cumsum(dim=-1) - units_BlV < target_Bl1
        score_BlV.masked_fill_(~torch.empty_like(kept_BlV).scatter_(-1, order_BlV, kept_BlV), -torch.inf)
    return score_BlV.argmax(dim=-1)


# ---------------------------------------------------------------------------------------------------------------
# Benchmark: python kernels.py

BENCHMARK_SCALES = {   # tokens: sides of the token maps
    130: (1, 2, 3, 4, 6, 8), 521: (1, 2, 4, 6, 8, 20), 680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), 9451: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)}
ATTENTION_CASES = {    # B, H, L, D: the published models at 256, 512 and 1024 pixels, and PyTorch's issue 173933
    "cuda": [(64, 16, 680, 64), (16, 16, 2240, 64), (2, 16, 9451, 64), (64, 16, 521, 72)],
    "cpu": [(16, 4, 130, 32), (2, 4, 680, 64), (1, 4, 2240, 64), (1, 1, 9451, 64), (2, 4, 521, 72)]}


def time_call(call: Callable, cold: Tensor) -> float:
    """Seconds of one call after `cold`, larger than any cache, was written: no input is in a cache any more.

    It also keeps a GPU busy while Python prepares the call, so that the GPU's time is measured and not Python's.
    """
    cold.zero_()
    if not cold.is_cuda:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def extra_memory(call: Callable, cold: Tensor) -> str:
    if not cold.is_cuda:
        return "-"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.1f}"


def measure(calls: dict[str, Callable], cold: Tensor, seconds: float = 4.0) -> dict[str, tuple[float, str]]:
    """{name: (median seconds, peak extra MB or what went wrong)}; all are called in turn, so that they share the noise."""
    memory, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        try:
            for _ in range(2):   # the first call compiles
                call()
            memory[name] = extra_memory(call, cold)
        except Exception as error:   # one alternative that fails here must not hide the others
            memory[name] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            del times[name]
    stop = time.monotonic() + seconds
    while times and (len(next(iter(times.values()))) < 5 or time.monotonic() < stop):
        for name, samples in times.items():
            samples.append(time_call(calls[name], cold))
    return {name: (statistics.median(times[name]) if name in times else math.nan, memory[name]) for name in calls}


def print_table(title: str, calls: dict[str, Callable], work: float, unit: str, ceiling: float, cold: Tensor) -> dict:
    """Time the calls, ours first, and print a line for each. work: FLOP or bytes that the operation cannot avoid."""
    results = measure(calls, cold)
    ours = next(iter(results.values()))[0]
    print(f"\n{title:58}{'ms':>9}{'/ ours':>8}{unit:>10}{'of ceiling':>12}{'extra MB':>10}")
    for name, (seconds, memory) in results.items():
        print(f"  {name:56}{seconds * 1e3:9.3f}{seconds / ours:8.2f}{work / seconds / 1e9:10.1f}"
              f"{work / seconds / ceiling:12.0%}{memory:>10}", flush=True)
    return {name: seconds for name, (seconds, _) in results.items()}


def with_gradients(function: Callable, *inputs: Tensor) -> Callable:
    """A call of the function and of its backward."""
    def call():
        out = function(*inputs)
        torch.autograd.grad(out, inputs, out.detach())
    return call


def attention_alternatives(ranges: KeyRanges, scale: float, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    mask_LS = ranges.dense().to(device)
    bias_LS = torch.zeros(mask_LS.shape, dtype=dtype, device=device).masked_fill_(~mask_LS, -torch.inf)

    def dense(mask):
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    alternatives = {"ours": lambda q, k, v: block_attention(q, k, v, ranges, scale),
                    "dense boolean mask": dense(mask_LS), "dense additive bias": dense(bias_LS)}
    if device == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        first_L, last_L = ranges.tables(mask_LS.device)[:2]
        block_mask = create_block_mask(lambda b, h, i, j: (j >= first_L[i]) & (j < last_L[i]), None, None,
                                       *mask_LS.shape, device=device)
        compiled = torch.compile(flex_attention, dynamic=False)
        alternatives["compiled FlexAttention"] = lambda q, k, v: compiled(q, k, v, block_mask=block_mask, scale=scale)
    return alternatives


def benchmark_attention(device: str, dtype: torch.dtype, ceiling: float, cold: Tensor) -> dict:
    """{forward or both: {alternative: [(L, seconds) of width 64]}}"""
    curves: dict = {}
    for B, H, L, D in ATTENTION_CASES[device]:
        ranges = KeyRanges.from_scales(BENCHMARK_SCALES[L])
        seen = sum(last - first for first, last in zip(ranges.first, ranges.last))
        q, k, v = (torch.randn(B, L, H, D, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for _ in "qkv")
        alternatives = attention_alternatives(ranges, D**-0.5, dtype, device)
        for what, products in ("forward", 2), ("forward + backward", 7):
            timed = with_gradients if products == 7 else lambda *call: torch.no_grad()(partial(*call))
            calls = {name: timed(function, q, k, v) for name, function in alternatives.items()}
            times = print_table(f"attention {what}, B {B} H {H} L {L} D {D} {str(dtype)[6:]}", calls,
                                2 * products * B * H * D * seen, "GFLOP/s", ceiling, cold)
            for name, seconds in times.items():
                if D == 64:
                    curves.setdefault(what, {}).setdefault(name, []).append((L, seconds))
    return curves


def benchmark_the_rest(flops: float, bandwidth: float, cold: Tensor) -> None:
    """The other three operations at the sizes of the published model of width 1024 with a batch of 64, on a GPU."""
    x_NC, codebook_VC = torch.randn(64 * 680, 32, device="cuda"), torch.randn(4096, 32, device="cuda")
    print_table("nearest code, N 43520 V 4096 C 32 float32", {
        "ours": lambda: nearest_code(x_NC, codebook_VC),
        "cdist, argmin": lambda: torch.cdist(x_NC, codebook_VC).argmin(dim=1),
        "addmm, argmin": lambda: nearest_code_torch(x_NC, codebook_VC),
    }, 2 * 64 * 680 * 4096 * 32, "GFLOP/s", flops, cold)

    x_BLW = torch.randn(64, 680, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    scale_BW, shift_BW = (torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "ab")
    faces = {"ours": adaln, "eager": adaln_torch, "compiled": torch.compile(adaln_torch, dynamic=False)}
    inputs = x_BLW, scale_BW, shift_BW
    print_table("AdaLN forward, B 64 L 680 W 1024 bfloat16",
                {name: torch.no_grad()(partial(face, *inputs)) for name, face in faces.items()},
                2 * 2 * x_BLW.numel(), "GB/s", bandwidth, cold)
    print_table("AdaLN forward + backward, B 64 L 680 W 1024 bfloat16",
                {name: with_gradients(face, *inputs) for name, face in faces.items()},
                2 * 5 * x_BLW.numel(), "GB/s", bandwidth, cold)

    cond_BlV, uncond_BlV, noise_BlV = (torch.rand(64, 256, 4096, device="cuda") for _ in range(3))
    arguments = cond_BlV, uncond_BlV, 1.5, 900, 0.96, noise_BlV
    print_table("sampling, B 64 l 256 V 4096 float32, top-k 900, top-p 0.96",
                {"ours": lambda: sample_tokens(*arguments), "sorted": lambda: sample_tokens_torch(*arguments)},
                3 * 4 * cond_BlV.numel(), "GB/s", bandwidth, cold)


def ceilings(device: str, dtypes: list[torch.dtype], cold: Tensor) -> tuple[float, list[float]]:
    """(bytes a second of a large copy, FLOP/s of a large matrix product in each dtype)"""
    n, flops = 8192 if device == "cuda" else 1024, []
    source, target = torch.ones_like(cold), torch.ones_like(cold)
    bandwidth = 2 * cold.nbytes / measure({"copy": lambda: target.copy_(source)}, cold, 1.0)["copy"][0]
    for dtype in dtypes:
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in "ab")
        flops.append(2 * n**3 / measure({"product": lambda: a @ b}, cold, 1.0)["product"][0])
        print(f"a large matrix product in {str(dtype)[6:]}: {flops[-1] / 1e9:,.0f} GFLOP/s")
    print(f"a large copy: {bandwidth / 1e9:,.0f} GB/s")
    return bandwidth, flops


def save_plot(curves: dict, file: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, panels = pyplot.subplots(1, len(curves), figsize=(11, 4.5), sharey=True, layout="constrained")
    for panel, (what, lines) in zip(panels, curves.items()):
        for name, points in lines.items():
            panel.loglog(*zip(*[(L, seconds * 1e3) for L, seconds in points]), marker="o", label=name)
        panel.set(title=f"attention, {what}", xlabel="tokens L", ylabel="milliseconds")
        panel.legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time every operation against what PyTorch offers, on this machine.")
    parser.add_argument("--plot", metavar="FILE", help="save the time of attention against L, all alternatives, here")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; PyTorch {torch.__version__}; Triton {triton.__version__ if triton else 'not installed'}")
    cold = torch.zeros((512 if device == "cuda" else 64) * 2**20, dtype=torch.uint8, device=device)
    dtypes = [torch.bfloat16, torch.float32]
    bandwidth, flops = ceilings(device, dtypes, cold)
    curves = [benchmark_attention(device, dtype, ceiling, cold) for dtype, ceiling in zip(dtypes, flops)]
    if device == "cuda":
        benchmark_the_rest(flops[1], bandwidth, cold)
    else:
        print("\nThese were the PyTorch faces. The Triton kernels need a GPU to be timed, and there is none here.")
    if arguments.plot:
        save_plot(curves[0], arguments.plot)


if __name__ == "__main__":
    main()
