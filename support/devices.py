"""What a model is computed on: the device, its precision, several processes, and what it can do."""
from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from support.cli import UserError, in_short

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}   # the one to prefer first


@dataclass(frozen=True)
class Machine:
    """The device, the dtype of matrix products on it, and whether models are compiled for it."""
    device: torch.device
    dtype: torch.dtype = torch.float32
    compile: bool = False

    def autocast(self) -> torch.autocast:
        """The context to run a model in: `with machine.autocast():`."""
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if half else None, enabled=half)


@contextlib.contextmanager
def fp32_products(device: str) -> Iterator[None]:
    """Products are in fp32 also within autocast. But where that is on, GPUs that have TF32 compute
    them in it, many times as fast: it keeps three binary places more than bf16.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = before or torch.is_autocast_enabled(device)
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        matmul.allow_tf32 = before


@contextlib.contextmanager
def fp32_convolutions() -> Iterator[None]:
    """fp32 convolutions without TF32, which cuDNN takes unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def choose_machine(device: str, precision: str = "auto", compile: bool = False) -> Machine:
    """The machine that the flags of `cli.add_device_flags` ask for, this process's GPU of several.

    Raises UserError for a device that is not there, and for --compile without a compiler.
    """
    if device == "cuda" and dist.is_torchelastic_launched():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {device} cannot be used: {in_short(error)}")
    if chosen.type == "cuda" and chosen.index is not None:   # else it is the current one
        torch.cuda.set_device(chosen)   # events and streams belong to that
    fast = [name for name in HALF if has_fast(name, chosen)]
    if precision == "auto":   # small models are no faster in half precision on a CPU
        precision = fast[0] if fast and chosen.type != "cpu" else "fp32"
    elif precision not in ("fp32", *fast) and chosen.type in ("cuda", "cpu"):   # others: unknown
        print(f"note: this device has no instructions for {precision} and emulates them; "
              f"--precision fp32 is faster here")
    if chosen.type == "cpu" and torch.get_num_threads() == 1 < own_cores():
        print(f"note: one thread of {own_cores()} is used; OMP_NUM_THREADS says how many")
    # TF32 is for products under autocast alone, see `fp32_products`; a container may turn it on.
    torch.backends.cuda.matmul.allow_tf32 = False
    if precision == "fp32":   # nor in convolutions, in which cuDNN takes it unless told otherwise
        torch.backends.cudnn.allow_tf32 = False
    if compile:
        check_compiler(chosen)
    return Machine(chosen, HALF.get(precision, torch.float32), compile)


def own_cores() -> int:
    """The cores this process may use: under taskset, SLURM or in a container not all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1   # macOS and Windows


def check_memory(needed: int, what: str) -> None:
    """Raises UserError where the machine has less memory than so many bytes: to run out of it is to
    be killed without a word."""
    if not hasattr(os, "sysconf"):   # Windows
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(f"{what} take {needed / 1e9:.0f} GB of memory, of which there are "
                        f"{there / 1e9:.0f}")


def has_fast(half: str, device: torch.device) -> bool:
    """Whether bf16 or fp16 has its own instructions; emulated, it is many times slower than fp32.
    """
    if device.type == "cuda":
        since = {"bf16": (8, 0), "fp16": (7, 0)}   # tensor cores
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip and capability[0] == 10:   # AMD's RX 5000 and 6000 have no bf16
            return half == "fp16"
        return capability >= since[half]
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):   # torch 2.9 has none
        return False
    capable = torch.cpu.get_capabilities()
    return any(capable.get(f"{unit}_{half}") for unit in ("avx512", "amx"))


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile does not work, as without a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:   # each back end has its own
        raise UserError(f"--compile does not work here: {in_short(error)}")


class LossScale(torch.amp.GradScaler):
    """What keeps gradients within fp16, whose smallest number is 6e-8 and whose largest is 65504.

    A loss is multiplied by a power of two, and what gradients of weights come of it divided by it.
    Where one overflows, the step is left out and the power halved; every 2000 steps in which none
    did, it is doubled. In other dtypes nothing is scaled, and nothing waits.
    """

    def __init__(self, machine: Machine):
        super().__init__(machine.device.type, enabled=machine.dtype == torch.float16)
        self.machine = machine

    def load_state_dict(self, state: dict) -> None:
        """state: empty of a training that was not in fp16."""
        if state:
            super().load_state_dict(state)

    def factor(self) -> Tensor:
        """The power of two as a tensor; 1 in other dtypes."""
        return self.scale(torch.ones((), device=self.machine.device))

    def unscale(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Divide the gradients, before they are clipped."""
        for optimizer in optimizers:
            self.unscale_(optimizer)

    def overflowed(self, norm: Tensor) -> bool:
        """Whether the gradients, whose norm this is, did, and what follows for the next step's.

        If so, no optimizer may step, not even one whose own gradients did not: clipping has made
        them 0, or no number. What is too large unscaled is no fault of the scale's.
        """
        found = self.is_enabled() and not norm.isfinite() and self.get_scale() > 1
        self.update()
        return found


# Several processes: torchrun starts one for each GPU, and all of them run train.py.


def join_processes() -> None:
    """Meet the other processes that torchrun started."""
    if dist.is_torchelastic_launched():
        # NCCL between GPUs, gloo between CPUs. The others wait for process 0 as long as it takes:
        # to decode a data set may be hours.
        dist.init_process_group(timeout=timedelta(days=30))


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the world size; 0 and 1 without torchrun."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def say(text: str) -> None:
    """Print once, not in every process, and above a progress bar."""
    if rank_and_world()[0] == 0:
        with contextlib.suppress(OSError):   # nobody reads: no reason to end a training
            tqdm.write(text)


say_once = functools.cache(say)


def progress_bar(*arguments, **named) -> tqdm:
    """tqdm's, of the first process; where nobody watches, as in a log, a line a minute."""
    rank, _ = rank_and_world()
    watched = sys.stderr.isatty()
    return tqdm(*arguments, **named, mininterval=0.5 if watched else 60, disable=rank > 0)


def wait_for_others() -> None:
    if dist.is_initialized():
        dist.barrier()


def own_part(rows: list[int]) -> list[int]:
    """This process's share of the rows, in order; the shares of all processes are the rows."""
    rank, world = rank_and_world()
    return rows[len(rows) * rank // world:len(rows) * (rank + 1) // world]


def copy_from_first(x: Tensor) -> None:
    """What process 0 has becomes that of all."""
    if dist.is_initialized():
        dist.broadcast(x, 0)


def sum_over_processes(x: Tensor) -> Tensor:
    """In place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def average_over_processes(x: Tensor) -> Tensor:
    """In place."""
    return sum_over_processes(x).div_(rank_and_world()[1])


def gather_over_processes(x_B: Tensor) -> Tensor:
    """The rows of all processes, the same in each, which have equally many."""
    if not dist.is_initialized():
        return x_B
    parts = [torch.empty_like(x_B) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x_B.contiguous())
    return torch.cat(parts)


# What a model needs, and what a GPU can do.


# TFLOP/s of dense matrix products in bf16, or in fp16 where there is none, that add in fp32, from
# the data sheets; of the first name that the card's contains.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165,
    "RTX 3060": 25,
    "Tesla T4": 65,
}


def peak_flops(machine: Machine) -> float | None:
    """FLOP/s of one GPU, if half precision is what is computed in on a card that we know."""
    if machine.device.type != "cuda" or machine.dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(machine.device)
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items()
                 if re.search(rf"{known}(?! Ti| Laptop|\w)", name)), None)   # no RTX A1000


class Speed:
    """Images per second, and on a card that we know the share of its peak FLOP/s."""

    def __init__(self, machine: Machine, batch: int, model: nn.Module, example: tuple[Tensor, ...]):
        """batch: images of a step, over all processes. example: the model's inputs of one image."""
        self.batch = batch
        self.peak = peak_flops(machine)
        self.flops = forward_flops(model, *example) if self.peak else 0

    def text(self, bar: tqdm) -> str:
        rate = self.batch * (bar.n - bar.initial) / max(1e-9, bar.format_dict["elapsed"])
        if not self.peak:
            return f"{rate:.0f} images/s"
        flops = 3 * self.flops * rate   # the backward pass is twice the forward
        share = flops / self.peak / rank_and_world()[1]
        return f"{rate:.0f} images/s, {share:.0%} of peak FLOP/s"


def forward_flops(model: nn.Module, *inputs: Tensor) -> int:
    """FLOP of a forward pass in evaluation mode, two for a multiplication and its addition.

    The counter knows neither our kernels nor PyTorch's fused attention, so a copy of the model on
    the CPU does the same in plain matrix products.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    twin = copy.deepcopy(model).cpu().eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        twin(*(x.cpu() for x in inputs))
    return counter.get_total_flops()


# Drawing on a CPU: oneDNN's matrix product.


def pack(model: nn.Module) -> None:
    """Replace the linear layers of a model that only draws on a CPU, where PyTorch has oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))


class PackedLinear(nn.Module):
    """A linear layer by oneDNN's product instead of MKL's.

    MKL rearranges the weights at every call, which for the few tokens of the coarse scales takes
    longer than to multiply; oneDNN reads them as they are, and knows more CPUs' widest
    instructions.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight.detach().to_mkldnn()
        self.bias = None if linear.bias is None else linear.bias.detach().to_mkldnn()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.aten.mkldnn_linear(x.to_mkldnn(), self.weight, self.bias)
        return y.to_dense()
