"""What each kernel takes of a GPU, from compiling it where there is none.

    python -m tests.benchmark --registers

The launch code of kernels.py says how it wants its kernels; here it is asked for all sizes that
make a difference, and nothing is launched. A multiprocessor holds several programs at a time, so
that one computes while others wait for memory: as many as there are registers, warps and shared
memory for. Registers that do not fit are spilled: kept in memory, on the stack.
"""
from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch

import kernels
from kernels import KeyRanges, triton


class Card(NamedTuple):
    """The limits of one multiprocessor (CUDA C++ Programming Guide, compute capabilities)."""
    shared: int   # bytes that a program may take; each is given 1 kB more
    warps: int
    programs: int
    registers: int = 65536


CARDS = {
    80: Card(163 * 1024, warps=64, programs=32),    # A100
    86: Card(99 * 1024, warps=48, programs=16),     # RTX 30
    89: Card(99 * 1024, warps=48, programs=24),     # RTX 40
    90: Card(227 * 1024, warps=64, programs=32),    # H100
    100: Card(227 * 1024, warps=64, programs=32),   # B200
    120: Card(99 * 1024, warps=48, programs=24),    # RTX 50
}
THREADS = 1024         # a program has at the most
TENSOR_COLUMNS = 512   # of tensor memory, which sm_100 has
SPILLED = 32 if triton.__version__ >= "3.7" else 64   # bytes of a thread: 3.6 uses more registers
HEADS = [(torch.bfloat16, 64), (torch.bfloat16, 72), (torch.bfloat16, 128), (torch.float16, 64),
         (torch.float32, 64), (torch.float32, 128)]
Job = tuple[int, Callable]   # for which card, and what is to be launched there

# -------------------------------------------------------------------------------------------------
# What is launched: every function with the sizes that change what is compiled


def attention(dtype: torch.dtype, D: int) -> None:
    q_BHLD = torch.zeros(2, 2, 128, D, dtype=dtype, requires_grad=True)
    ranges = KeyRanges([0] * 128, [128] * 128)
    kernels.block_attention_triton(q_BHLD, q_BHLD, q_BHLD, ranges, 1.0).sum().backward()


def few_queries(dtype: torch.dtype, D: int, L: int) -> None:
    """As at the first scales of a generation."""
    k_BHSD = torch.zeros(2, 2, 128, D, dtype=dtype)
    ranges = KeyRanges([0] * L, [128] * L)
    kernels.block_attention_triton(k_BHSD[:, :, :L], k_BHSD, k_BHSD, ranges, 1.0)


def heads(dtype: torch.dtype, D: int, normalised: bool) -> None:
    product_BLX = torch.zeros(2, 128, 3 * 2 * D, dtype=dtype, requires_grad=True)
    bias_W = torch.zeros(2 * D)
    log_scale_H = torch.zeros(2) if normalised else None
    qkv = kernels.split_heads_triton(product_BLX, bias_W, bias_W, log_scale_H, 2)
    sum(qkv).sum().backward()


def adaln(dtype: torch.dtype, W: int) -> None:
    """The residual stream stays in fp32."""
    x_BLW = torch.zeros(2, 32, W, requires_grad=True)
    m_BW = torch.zeros(2, W, dtype=dtype)
    sum_BLW, y_BLW = kernels.adaln_triton(x_BLW, x_BLW.to(dtype), m_BW, m_BW, m_BW, dtype)
    (sum_BLW + y_BLW).sum().backward()


def nearest_code(V: int, C: int) -> None:
    kernels.nearest_code_triton(torch.zeros(64, C), torch.zeros(V, C))


def sampling(V: int, guided: bool) -> None:
    logits_BlV = torch.zeros(2, 32, V)
    uncond_BlV = logits_BlV if guided else None
    kernels.sample_tokens_triton(logits_BlV, uncond_BlV, 1.5, 900, 0.95, logits_BlV)


def all_jobs() -> list[Job]:
    """The dearest first: where several processes share them, none ends long after the others."""
    launched = [partial(attention, *head) for head in HEADS]
    launched += [partial(few_queries, *head, L) for head in HEADS for L in (1, 16, 32, 64)]
    launched += [partial(sampling, V, guided) for V in (4096, 33) for guided in (True, False)]
    launched += [partial(heads, *head, normalised) for head in HEADS for normalised in (True, False)]
    launched += [partial(adaln, *size) for size in
                 [(torch.bfloat16, 1024), (torch.bfloat16, 1920), (torch.float32, 64)]]
    launched += [partial(nearest_code, *size) for size in [(4096, 32), (33, 5)]]
    return [(card, call) for call in launched for card in CARDS]


def some_jobs() -> list[Job]:
    """Every kernel for a card of readers, with the widest tiles, and for one of data centres."""
    jobs: list[Job] = [(90, partial(few_queries, torch.float32, 128, 16))]
    for card, head in (86, HEADS[2]), (90, HEADS[1]):
        jobs.append((card, partial(attention, *head)))
        jobs.append((card, partial(heads, *head, True)))
        jobs.append((card, partial(adaln, torch.bfloat16, 1024)))
        jobs.append((card, partial(nearest_code, 4096, 32)))
        jobs.append((card, partial(sampling, 4096, True)))
    return jobs


# -------------------------------------------------------------------------------------------------
# Compiling it


class Report(NamedTuple):
    """What one kernel takes, for one card."""
    card: int
    kernel: str
    dtype: str
    registers: int   # of a thread
    stack: int       # bytes of a thread that were spilled
    shared: int      # bytes
    columns: int     # of tensor memory
    programs: int    # that a multiprocessor holds at a time
    constants: dict[str, int]

    def fits(self) -> bool:
        """And next to nothing is spilled."""
        threads = 32 * self.constants["num_warps"]
        return (self.programs > 0 and self.shared <= CARDS[self.card].shared
                and threads <= THREADS and self.columns <= TENSOR_COLUMNS and self.stack <= SPILLED)


def compile_for(job: Job) -> list[Report]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    card, call = job
    driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", card, 32),
        get_current_device=lambda: card,
        get_current_stream=lambda device: 0))
    return [report(card, *launch) for launch in launches_of(call)]


def launches_of(call: Callable) -> list[tuple]:
    """(kernel, tensors, numbers, constants) of each launch, in place of launching."""
    found = []

    def keep(kernel, programs, read, written, *numbers, **constants):
        found.append((kernel, read + written, numbers, constants))

    with mock.patch.object(kernels, "launch", keep):
        call()
    return found


def report(card: int, kernel, tensors: list, numbers: tuple, constants: dict) -> Report:
    arrays = kernels.as_arrays(tensors)
    compiled = kernel.warmup(*arrays, *numbers, grid=(1,), **constants)
    registers, stack = usage(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    held = programs(CARDS[card], registers, shared, constants["num_warps"])
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return Report(card, kernel.__name__, dtype, registers, stack, shared, columns, held, constants)


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes on the stack, as the assembler reports them."""
    from triton.backends import nvidia
    dump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [dump, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)


def programs(card: Card, registers: int, shared: int, warps: int) -> int:
    """How many one multiprocessor holds; registers are given out by 8 to each of 32 threads."""
    of_a_warp = -(-registers // 8) * 8 * 32
    by_registers = card.registers // (of_a_warp * warps)
    by_warps = card.warps // warps
    by_memory = (card.shared + 1024) // (shared + 1024)
    return min(by_registers, by_warps, by_memory, card.programs)


def compiled(jobs: list[Job], workers: int | None = None) -> Iterator[Report]:
    """By as many processes as there are cores, new ones: Triton's interpreter is off in them."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="0"):
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for reports in pool.map(compile_for, jobs):
                yield from reports


def print_registers() -> None:
    print(f"{'card':8}{'kernel':23}{'dtype':10}{'registers':>9}{'stack':>6}{'shared':>8}"
          f"{'columns':>8}{'programs':>9}  constants")
    seen: Counter[str] = Counter()
    most: dict[int, tuple[int, int]] = {}   # shared memory and stack, by card
    for found in compiled(all_jobs()):
        constants = " ".join(f"{name.removeprefix('num_')} {value}"
                             for name, value in found.constants.items())
        row = (f"sm_{found.card:<5}{found.kernel:23}{found.dtype:10}{found.registers:9}"
               f"{found.stack:6}{found.shared:8}{found.columns:8}{found.programs:9}  {constants}")
        shared, stack = most.get(found.card, (0, 0))
        most[found.card] = max(shared, found.shared), max(stack, found.stack)
        seen[row] += 1
        if seen[row] == 1:   # sizes that are compiled alike are shown once
            print(row + ("" if found.fits() else "  <- does not fit"), flush=True)
    print(f"{len(seen)} kernels. Registers and stack, in bytes, are a thread's; shared memory, in "
          "bytes, and\ncolumns of tensor memory, a program's; programs are those that a multiprocessor "
          "holds at a time.")
    for card, (shared, stack) in most.items():
        print(f"sm_{card}: at most {shared:,} of {CARDS[card].shared:,} bytes of shared memory, and {stack} "
              f"bytes spilled")
