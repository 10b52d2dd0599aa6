"""What the operations of kernels.py cost, and whole models: counted and timed.

    python -m tests.benchmark                 counts tiles and bytes, which takes no GPU, then times
                                              what this machine can run beside what PyTorch offers
    python -m tests.benchmark --generate      times one image of the published size, scale by scale
    python -m tests.benchmark --registers     compiles every kernel for six GPUs that need not be
                                              there, and prints what it takes of each
    python -m tests.benchmark --tiles FILE    draws the tiles that attention visits

Counts are of tiles, bytes, operations and graphs, at the sizes of the published models, and take no
GPU. Times are of what this machine can run, beside what PyTorch offers, and beside a limit: what
the arithmetic or the memory traffic alone takes, at the rates measured of a large matrix product
and a large copy.
"""
from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import var
from kernels import ATTENTION_TILES, HAS_TRITON, KeyRanges, block_attention, triton
from sample import Run, Sampling
from support.cli import Parser, output_as, run_program
from support.devices import Machine, forward_flops, pack
from support.images import save_picture
from support.optim import adamw_and_muon
from support.presets import PRESETS
from tests.registers import print_registers
from tokenizer import Tokenizer, TokenizerConfig
from var import VAR, VARConfig

# -------------------------------------------------------------------------------------------------
# What can be counted without a GPU: tiles and bytes

BENCHMARK_SCALES = {   # by tokens: the published models, a small one, PyTorch's issue 173933
    680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    9451: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
    130: (1, 2, 3, 4, 6, 8),
    521: (1, 2, 4, 6, 8, 20),
}


LENGTHS = (680, 2240, 9451)   # of the published models


def tile_grid(L: int) -> Tensor:
    """[tiles of queries, tiles of keys] of attention_forward: 0 is not visited, 1 cut, 2 whole."""
    TILE_L, TILE_S, *_ = ATTENTION_TILES["forward"][0]
    mask_LS = KeyRanges.from_scales(BENCHMARK_SCALES[L]).dense()
    # As in `plan_tiles`: queries that are not there see what the last one sees, keys are not seen.
    mask_LS = torch.cat([mask_LS, mask_LS[-1:].expand(-L % TILE_L, L)])
    mask_LS = F.pad(mask_LS, (0, -L % TILE_S))
    tiles = mask_LS.unflatten(1, (-1, TILE_S)).unflatten(0, (-1, TILE_L))
    return tiles.any(dim=(1, 3)).long() + tiles.all(dim=3).all(dim=1)


def draw_tiles(file: Path) -> None:
    """The tiles that attention_forward visits at 256 pixels, and the edge of the mask."""
    from matplotlib import colors, pyplot
    last = KeyRanges.from_scales(BENCHMARK_SCALES[680]).last
    figure, panel = pyplot.subplots(figsize=(6, 5.6), layout="constrained")
    panel.pcolormesh(range(0, 705, 64), range(0, 769, 128), tile_grid(680), edgecolors="white",
                     cmap=colors.ListedColormap(["0.93", "tab:orange", "tab:blue"]))
    panel.stairs(last, range(681), orientation="horizontal", color="black")
    panel.set(ylim=(768, 0), xlabel="keys", ylabel="queries",
              title="tiles: whole (blue), cut (orange), not visited")
    save_picture(file, figure)


class BytesMoved(TorchDispatchMode):
    """Adds up what operations read and write. A view moves nothing, nor does mere room, nor a
    question about a tensor without numbers, which is no operation of ATen's."""
    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if moves(function):
            self.total += array_bytes(args, out)
        return out


ROOM = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def moves(function: torch._ops.OpOverload) -> bool:
    name = function.overloadpacket.__name__
    return function.namespace == "aten" and not function.is_view and name not in ROOM


def array_bytes(*values) -> int:
    leaves = torch.utils._pytree.tree_leaves(values)
    return sum(x.nbytes for x in leaves if isinstance(x, Tensor))


def cases(new: Callable) -> dict[str, tuple]:
    """{title: (Triton's, PyTorch's, FLOP, backward, *inputs)}; new(*shape) is a tensor.

    backward: how many times as many bytes as the forward it moves at the least; 0: there is none.
    """
    half = partial(new, dtype=torch.bfloat16)
    modulation = [half(64, 1024) for _ in range(3)]

    def both(operation: str, call: Callable) -> tuple[Callable, Callable]:
        return tuple(partial(call, getattr(kernels, f"{operation}_{backend}"))
                     for backend in ("triton", "torch"))

    return {
        "AdaLN, B 64 L 680 W 1024 float32 + bfloat16":
            (*both("adaln", lambda adaln, *inputs: adaln(*inputs, torch.bfloat16)), 0, 3 / 2,
             new(64, 680, 1024), half(64, 680, 1024), *modulation),
        "nearest code, N 43520 V 4096 C 32 float32":
            (*both("nearest_code", lambda nearest, *inputs: nearest(*inputs)),
             2 * 43520 * 4096 * 32, 0, new(43520, 32), new(4096, 32)),
        "heads, B 64 L 680 W 1024 bfloat16":
            (*both("split_heads", lambda split, *inputs: split(*inputs, 16)), 0, 4 / 3,
             half(64, 680, 3072), new(1024), new(1024), new(16)),
        "sampling, B 64 l 256 V 4096 float32":
            (*both("sample_tokens", lambda sample, logits, noise: sample(
                logits, None, 0.0, 900, 0.96, noise)),
             0, 0, new(64, 256, 4096), new(64, 256, 4096)),
    }


def obvious_attention(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask_LS: Tensor) -> Tensor:
    scores_BHLS = (q_BHLD * q_BHLD.shape[3]**-0.5) @ k_BHSD.mT
    return scores_BHLS.masked_fill(~mask_LS, -torch.inf).softmax(dim=-1) @ v_BHSD


def print_counts() -> None:
    """At the sizes of the published models: tiles that are visited, bytes that are moved."""
    print("\nattention_forward, tiles            whole       cut    of all   visited")
    for L in LENGTHS:
        grid = tile_grid(L)
        skipped, cut, whole = grid.flatten().bincount(minlength=3).tolist()
        share = 1 - skipped / grid.numel()
        print(f"  L {L:<26,}{whole:11,}{cut:10,}{grid.numel():10,}{share:10.0%}")
    print(f"\n{'bytes, in GB':50}{'PyTorch':>10}{'ours':>10}")
    with FakeTensorMode():   # shapes and dtypes without numbers
        counted = cases(torch.empty)
        for L in LENGTHS:
            qkv = torch.empty(3, 1, 16, L, 64, dtype=torch.bfloat16)
            mask_LS = torch.empty(L, L, dtype=torch.bool)
            counted[f"obvious attention, B 1 H 16 L {L} D 64 bfloat16"] = (
                None, obvious_attention, 0, 0, *qkv, mask_LS)
        for title, (_, pytorch, _, _, *inputs) in counted.items():
            with BytesMoved() as moved:
                output = pytorch(*inputs)
            ours = array_bytes([x for x in inputs if x.dtype != torch.bool], output)
            print(f"  {title:48}{moved.total / 1e9:10.3f}{ours / 1e9:10.3f}")
    print("  ours: every array once. What a kernel reads again, as attention the keys and values,\n"
          "  it finds in the GPU's cache as long as that has room.")


# -------------------------------------------------------------------------------------------------
# Whole models: what a GPU is asked to do, counted without one

Geometry = tuple[TokenizerConfig, VARConfig]
PUBLISHED_D16 = (TokenizerConfig(**PRESETS["imagenet256"].tokenizer_shape(image_channels=3)),
                 VARConfig(**PRESETS["imagenet256"].var_shape(classes=1000)))
TO_DEVICE = {"lift_fresh", "scalar_tensor", "arange", "searchsorted"}
READ_BACK = {"_local_scalar_dense", "nonzero", "bincount", "equal"}


def random_models(geometry: Geometry) -> tuple[Tokenizer, VAR]:
    torch.manual_seed(0)
    return Tokenizer(geometry[0]).eval(), VAR(geometry[1]).eval()


class Work(BytesMoved):
    """Counts operations, too; kernels of ours where they would be launched.

    operations   that start something on a GPU
    ours         of these, kernels of kernels.py
    views        and memory that is taken: the time of the host alone
    to device    tensors made of numbers of Python's
    read back    numbers for which the host waits
    """

    def __init__(self):
        super().__init__()
        self.numbers: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.numbers["to device"] += name in TO_DEVICE
        self.numbers["read back"] += name in READ_BACK
        if moves(function):
            self.numbers["operations"] += 1
        elif function.namespace == "aten":
            self.numbers["views"] += 1
        return super().__torch_dispatch__(function, types, args, kwargs)

    def launch(self, kernel, programs, read, written, *numbers, **constants) -> None:
        self.numbers.update(["operations", "ours"])
        self.total += array_bytes(read, written)

    def so_far(self) -> Counter[str]:
        return self.numbers + Counter(bytes=self.total)


@contextlib.contextmanager
def counting() -> Iterator[Work]:
    """Counts what is computed within, in bf16 by our kernels, on tensors without numbers.

    They are said to be on a CPU, where autocast chooses nearly the dtypes that it does on a GPU.
    """
    work = Work()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(kernels, "BACKEND", "triton"))
        stack.enter_context(mock.patch.object(kernels, "launch", work.launch))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        stack.enter_context(work)
        yield work


def count_sampling(geometry: Geometry, batch: int) -> dict[str, Counter[str]]:
    """Of a first generation with guidance, of a later one, of a layer in it at one scale, on
    average, and of decoding."""
    tokenizer, model = random_models(geometry)
    tokenizer.cast_decoder(torch.bfloat16)
    model.cast_layers(torch.bfloat16)
    counts = {}
    for name in "first generation", "later generation":
        with counting() as work:
            labels_B = torch.empty(batch, dtype=torch.int64)
            layer = Counter()
            hooks = [
                model.blocks[-1].register_forward_pre_hook(lambda *_: layer.subtract(work.so_far())),
                model.blocks[-1].register_forward_hook(lambda *_: layer.update(work.so_far())),
            ]
            model.generate(tokenizer, labels_B)
            counts[name] = work.so_far()
        for hook in hooks:
            hook.remove()
    scales = len(model.config.scales)
    layer = {name: n if name == "bytes" else n / scales for name, n in layer.items()}
    counts["a layer at a scale"] = Counter(layer)
    with counting() as work:
        tokenizer.decode(torch.empty(batch, model.config.length, dtype=torch.int64))
    counts["decoding"] = work.so_far()
    return counts


def training_inputs(config: VARConfig, batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """Labels [B], what is read [B, L-1, C], tokens [B, L]: all zeros."""
    labels_B = torch.zeros(batch, dtype=torch.int64, device=device)
    read_BlC = torch.zeros(batch, config.length - 1, config.code_channels, device=device)
    tokens_BL = torch.zeros(batch, config.length, dtype=torch.int64, device=device)
    return labels_B, read_BlC, tokens_BL


def training_step(model: nn.Module, optimizers: list, labels_B: Tensor, read_BlC: Tensor,
                  tokens_BL: Tensor) -> None:
    """As train.py takes it, but for the clipping and the average of the weights."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    with torch.autocast(labels_B.device.type, torch.bfloat16):
        logits_BLV = model(labels_B, read_BlC).float()
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def adamw(model: VAR) -> list:
    return adamw_and_muon(model, model.blocks, 1e-4, 0.05, False, torch.float32)


def count_training(geometry: Geometry, batch: int) -> Counter[str]:
    """Of a training step that is not the first."""
    model = VAR(geometry[1]).train()
    optimizers = adamw(model)
    for _ in range(2):
        with counting() as work:
            inputs = training_inputs(model.config, batch, torch.device("cpu"))
            work.numbers.clear()
            work.total = 0
            training_step(model, optimizers, *inputs)
    return work.so_far()


def count_graphs(geometry: Geometry) -> dict[str, int]:
    """Graphs and breaks of compiled sampling, twice, and of two compiled training passes.

    They depend on the scales and on nothing else: three narrow layers are enough.
    """
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def run_kernel(kernel, programs, tensors, numbers, constants) -> None:
        tensors[-1].zero_()   # of tokens any will do that is one

    narrow = (replace(geometry[0], width=geometry[0].norm_groups, multipliers=(1,), blocks=1),
              replace(geometry[1], depth=3, width=64, heads=2))
    tokenizer, model = random_models(narrow)
    compile_module = nn.Module.compile
    counting_compile = lambda module, **flags: compile_module(module, backend=count, **flags)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with (mock.patch.object(kernels, "BACKEND", "triton"),
          mock.patch.object(kernels, "run_kernel", run_kernel),
          mock.patch.object(nn.Module, "compile", counting_compile)):
        tokenizer.decoder.compile(dynamic=False)
        model.compile_layers()
        for _ in range(2):
            tokenizer.decode(model.generate(tokenizer, torch.zeros(1, dtype=torch.int64)))
        sampling = len(graphs)
        model = VAR(narrow[1]).train()
        model.compile(dynamic=False)
        for _ in range(2):
            labels_B, read_BlC, _ = training_inputs(model.config, 2, torch.device("cpu"))
            model(labels_B, read_BlC)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return {"sampling": sampling, "training": len(graphs) - sampling, "breaks": breaks}


def print_work(geometry: Geometry, batch: int = 64) -> None:
    """At bf16, with guidance."""
    config = geometry[1]
    sampling = {f"{name}, B 1": (1, n) for name, n in count_sampling(geometry, 1).items()}
    rows = sampling | {f"training step, B {batch}": (batch, count_training(geometry, batch))}
    print(f"\n{f'depth {config.depth}, W {config.width}, L {config.length}, bf16':32}"
          f"{'operations':>11}{'ours':>6}{'views':>8}{'to device':>10}{'read back':>10}"
          f"{'MB a token':>12}")
    for name, (images, numbers) in rows.items():
        print(f"  {name:30}{numbers['operations']:11.0f}{numbers['ours']:6.0f}"
              f"{numbers['views']:8.0f}{numbers['to device']:10.0f}{numbers['read back']:10.0f}"
              f"{numbers['bytes'] / images / config.length / 1e6:12.3f}")
    found = count_graphs(geometry)
    print(f"  under torch.compile: {found['sampling']} graphs for sampling, of {len(config.scales)} "
          f"scales and the decoder, {found['training']} for training; {found['breaks']} breaks")
    print("  operations start something on a GPU, of which ours are kernels of kernels.py; views\n"
          "  and memory that is taken cost time of the host. To device: tensors made of Python's\n"
          "  numbers; read back: numbers for which the host waits. Bytes are read and written.")


# -------------------------------------------------------------------------------------------------
# Times of single operations

ATTENTION_CASES = {   # B, H, L, D
    "cuda": [(64, 16, 680, 64), (16, 16, 2240, 64), (2, 16, 9451, 64), (64, 16, 521, 72)],
    "cpu": [(16, 4, 130, 32), (2, 4, 680, 64), (1, 4, 2240, 64), (1, 1, 9451, 64),
            (2, 4, 521, 72)],
}


SECONDS = 4.0   # that alternatives are timed, in turn


def time_call(call: Callable, cold: Tensor) -> float:
    """Seconds of one call after `cold`, larger than any cache, was written: no cache has an input.

    It also keeps a GPU busy while Python prepares the call, so that Python's time is not measured.
    """
    for _ in range(4 if cold.is_cuda else 1):
        cold.zero_()
    if not cold.is_cuda:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def extra_memory(call: Callable) -> str:
    if not torch.cuda.is_available():
        return "-"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.1f}"


def measure(calls: dict[str, Callable], cold: Tensor) -> dict[str, tuple[float, str]]:
    """{name: (median seconds, peak extra MB or what went wrong)}; in turn, to share the noise."""
    memory = {}
    times = {name: [] for name in calls}
    for name, call in calls.items():
        try:
            call()   # the first call compiles
            memory[name] = extra_memory(call)
        except Exception as error:   # one alternative that fails here must not hide the others
            memory[name] = f"failed: {type(error).__name__}: {error}"[:200]
            times[name] = [math.nan]
    stop = time.monotonic() + SECONDS
    rounds = 0
    while rounds < 5 or time.monotonic() < stop:
        rounds += 1
        for name, call in calls.items():
            if not memory[name].startswith("failed"):
                times[name].append(time_call(call, cold))
    return {name: (statistics.median(times[name]), memory[name]) for name in calls}


def print_table(title: str, calls: dict[str, Callable], limit: float,
                cold: Tensor) -> dict[str, float]:
    """Time the calls, ours first, a line for each. limit: seconds of what cannot be avoided."""
    results = measure(calls, cold)
    ours = results["ours"][0]
    print(f"\n{title:60}{'ms':>10}{'/ ours':>8}{'of limit':>10}{'extra MB':>10}")
    for name, (seconds, memory) in results.items():
        print(f"  {name:58}{seconds * 1e3:10.3f}{seconds / ours:8.2f}{limit / seconds:10.0%}"
              f"{memory:>10}", flush=True)
    return {name: seconds for name, (seconds, _) in results.items()}


def forward_only(function: Callable, *inputs: Tensor) -> Callable:
    return torch.no_grad()(partial(function, *inputs))


def with_gradients(function: Callable, *inputs: Tensor) -> Callable:
    """A call of the function and of its backward."""
    def call():
        out = torch.utils._pytree.tree_leaves(function(*inputs))
        torch.autograd.grad(out, inputs, [x.detach() for x in out])
    return call


def attention_alternatives(ranges: KeyRanges, scale: float, dtype: torch.dtype,
                           device: torch.device) -> dict[str, Callable]:
    mask_LS = ranges.dense().to(device)
    bias_LS = torch.where(mask_LS, 0.0, -torch.inf).to(dtype)
    pytorch = partial(F.scaled_dot_product_attention, scale=scale)
    alternatives = {"ours": partial(block_attention, ranges=ranges, scale=scale),
                    "dense boolean mask": partial(pytorch, attn_mask=mask_LS),
                    "dense additive bias": partial(pytorch, attn_mask=bias_LS)}
    if device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        first_L, last_L = ranges.cached(kernels.table, device)
        block_mask = create_block_mask(lambda b, h, i, j: (j >= first_L[i]) & (j < last_L[i]),
                                       None, None, *mask_LS.shape, device=device)
        # Past a limit of recompilations PyTorch runs a function without compiling it, and
        # says no word. Forget those of the last case; fullgraph makes any more an error.
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        alternatives["compiled FlexAttention"] = partial(
            compiled, block_mask=block_mask, scale=scale)
    return alternatives


def benchmark_attention(dtype: torch.dtype, rate: float, cold: Tensor) -> dict:
    """{forward or both: {alternative: [(L, seconds) of width 64]}}"""
    curves: dict = {"forward": {}, "forward + backward": {}}
    for B, H, L, D in ATTENTION_CASES[cold.device.type]:
        ranges = KeyRanges.from_scales(BENCHMARK_SCALES[L])
        flops = 2 * B * H * D * (sum(ranges.last) - sum(ranges.first))   # of one matrix product
        qkv = torch.randn(3, B, L, H, D, dtype=dtype, device=cold.device).transpose(2, 3)
        qkv = [x.requires_grad_() for x in qkv]
        alternatives = attention_alternatives(ranges, D**-0.5, dtype, cold.device)
        for what, timed, products in zip(curves, (forward_only, with_gradients), (2, 7)):
            calls = {name: timed(call, *qkv) for name, call in alternatives.items()}
            title = f"attention {what}, B {B} H {H} L {L} D {D} {str(dtype)[6:]}"
            times = print_table(title, calls, products * flops / rate, cold)
            for name, seconds in times.items() if D == 64 else ():
                curves[what].setdefault(name, []).append((L, seconds))
    return curves


def benchmark_the_rest(rate: float, bandwidth: float, cold: Tensor) -> None:
    """All operations but attention, on a GPU."""
    for title, case in cases(partial(torch.rand, device="cuda", requires_grad=True)).items():
        ours, pytorch, flops, backward, *inputs = case
        calls = {"ours": ours, "PyTorch": pytorch,
                 "PyTorch, compiled": torch.compile(pytorch, dynamic=False)}
        bytes_moved = array_bytes(inputs, ours(*inputs))
        limit = max(flops / rate, bytes_moved / bandwidth)
        print_table(title, {name: forward_only(call, *inputs) for name, call in calls.items()},
                    limit, cold)
        if backward:
            print_table(title + ", and backward",
                        {name: with_gradients(call, *inputs) for name, call in calls.items()},
                        (1 + backward) * bytes_moved / bandwidth, cold)


def product_rate(dtype: torch.dtype, cold: Tensor) -> float:
    """FLOP/s of a large matrix product."""
    n = 8192 if cold.is_cuda else 1024
    a, b = torch.randn(2, n, n, device=cold.device).to(dtype)
    rate = 2 * n**3 / measure({"product": lambda: a @ b}, cold)["product"][0]
    print(f"a large matrix product in {str(dtype)[6:]}: {rate / 1e9:,.0f} GFLOP/s")
    return rate


def copy_rate(cold: Tensor) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.ones_like(cold)
    seconds = measure({"copy": lambda: source.clone()}, cold)["copy"][0]
    print(f"a large copy: {2 * cold.nbytes / seconds / 1e9:,.0f} GB/s")
    return 2 * cold.nbytes / seconds


def read_rate(cold: Tensor) -> float:
    """Bytes a second of a matrix times a vector, which reads the matrix and writes next to nothing."""
    matrix = cold.view(torch.float32).view(-1, 4096)
    vector = torch.ones(4096, device=cold.device)
    rate = cold.nbytes / measure({"read": lambda: matrix @ vector}, cold)["read"][0]
    print(f"a large matrix times a vector: {rate / 1e9:,.0f} GB/s")
    return rate


# -------------------------------------------------------------------------------------------------
# What a whole model takes, on the device at hand


class Clock:
    """Marks of time on a device, for which nothing waits until they are read."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list = []

    def mark(self) -> None:
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        if not self.on_gpu:
            return [end - begin for begin, end in pairwise(self.marks)]
        self.marks[-1].synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairwise(self.marks)]


def random_run(geometry: Geometry, machine: Machine) -> Run:
    """A run of random weights, as sample.py would load it, packed for a CPU."""
    tokenizer, model = random_models(geometry)
    tokenizer.to(machine.device)
    model.to(machine.device)
    if machine.device.type == "cuda":
        tokenizer.cast_decoder(machine.dtype)
        model.cast_layers(machine.dtype)
    else:
        pack(model)
    if machine.compile:
        tokenizer.decoder.compile(dynamic=False)
        model.compile_layers()
    classes = [str(label) for label in range(model.config.classes)]
    return Run(Path(), tokenizer, model, classes, None, machine, Sampling(1.5, 900, 0.96, batch=100))


def draw(run: Run, batch: int) -> None:
    run.decode_to_bytes(run.generate([0] * batch, seed=0))


def parts_of_drawing(run: Run, batch: int) -> list[float]:
    """Seconds of each scale, up to where the next begins, and of the decoder."""
    clock = Clock(run.machine.device)
    through_layers = run.model.through_layers

    def marked(*arguments):
        clock.mark()
        return through_layers(*arguments)

    with mock.patch.object(run.model, "through_layers", marked):
        tokens_BL = run.generate([0] * batch, seed=0)
    clock.mark()
    run.decode_to_bytes(tokens_BL)
    clock.mark()
    return clock.seconds()


def sampling_flops(geometry: Geometry) -> tuple[int, int]:
    """Of one image: of the transformer, with guidance, and of the decoder."""
    tokenizer, model = random_models(geometry)
    labels_B, read_BlC, _ = training_inputs(model.config, 2, torch.device("cpu"))
    S = model.config.scales[-1]
    latent_BCSS = torch.zeros(1, model.config.code_channels, S, S)
    decoder = nn.Sequential(tokenizer.from_latent, tokenizer.decoder)
    return forward_flops(model, labels_B, read_BlC), forward_flops(decoder, latent_BCSS)


def benchmark_sampling(geometry: Geometry, ways: dict[str, Machine], sizes: Sequence[int],
                       rate: float, bandwidth: float, cold: Tensor) -> None:
    """ways: the machine that each is drawn on. sizes: of the batches.

    rate, bandwidth: FLOP/s and bytes/s, for the limit.
    """
    runs = {name: random_run(geometry, machine) for name, machine in ways.items()}
    flops = sampling_flops(geometry)
    for batch in sizes:
        by_flops = [batch * part / rate for part in flops]
        limit = sum(by_flops)
        title = f"sampling with guidance, B {batch}"
        if HAS_TRITON:
            counts = count_sampling(geometry, batch)
            moved = counts["later generation"]["bytes"] + counts["decoding"]["bytes"]
            limit = max(limit, moved / bandwidth)
        times = print_table(
            title, {name: partial(draw, run, batch) for name, run in runs.items()}, limit, cold)
        print("  limit by FLOPs: transformer {:.1f} ms, decoder {:.1f} ms".format(
            *(1e3 * part for part in by_flops)), end="")
        print(f"; by bytes {1e3 * moved / bandwidth:.1f} ms" if HAS_TRITON else "")
        for name, run in runs.items():
            *scales, decoder = parts_of_drawing(run, batch)
            print(f"  {name}: {batch / times[name]:.2f} images/s; ms per scale "
                  f"{' '.join(f'{1e3 * part:.1f}' for part in scales)}, decoder {1e3 * decoder:.1f}")


def benchmark_scales(geometry: Geometry, rate: float, cold: Tensor) -> None:
    """One image with guidance in fp32: each scale against its limit, fastest of three.

    The first scales have few tokens to compute with and all weights to read: their limit is memory.
    """
    reading = read_rate(cold)
    run = random_run(geometry, Machine(cold.device))
    times = list(map(min, zip(*(parts_of_drawing(run, 1) for _ in range(3)))))
    limits = scale_limits(geometry[1], rate, reading)
    limits.append((sampling_flops(geometry)[1] / rate, 0.0))
    names = [f"{s}x{s}" for s in geometry[1].scales] + ["decoder"]
    print(f"\n{'one image, fp32':20}{'ms by FLOPs':>13}{'by bytes':>10}{'ms':>8}{'of limit':>10}")
    for name, (by_flops, by_bytes), seconds in zip(names, limits, times):
        share = max(by_flops, by_bytes) / seconds
        print(f"  {name:18}{1e3 * by_flops:13.1f}{1e3 * by_bytes:10.1f}{1e3 * seconds:8.1f}{share:10.0%}")
    limit = sum(map(max, limits[:-1]))
    by_flops = sum(by_flops for by_flops, _ in limits[:-1])
    seconds = sum(times[:-1])
    print(f"all scales: {seconds:.2f} s of which {limit:.2f} are the limit, {limit / seconds:.0%}; "
          f"by FLOPs alone {by_flops:.2f}, {by_flops / seconds:.0%}")


def scale_limits(config: VARConfig, rate: float, reading: float) -> list[tuple[float, float]]:
    """Seconds of each scale of an image with guidance in fp32, by FLOPs and by bytes.

    Bytes are those of the weights, which every scale reads again, and of the keys and values so far.
    """
    W = config.width
    weights = config.depth * 12 * W * W + W * config.vocabulary   # qkv 3, out 1, perceptron 8 W^2
    limits = []
    for span in config.spans:
        tokens = 2 * (span.stop - span.start)                     # for the class and for none
        flops = 2 * tokens * weights + 4 * tokens * span.stop * W * config.depth
        moved = 4 * (weights + 2 * 2 * span.stop * W * config.depth)
        limits.append((flops / rate, moved / reading))
    return limits


def dense_attention(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, ranges: KeyRanges,
                    scale: float) -> Tensor:
    """What most implementations of VAR do."""
    mask_LS = ranges.cached(dense_mask, q_BHLD.device)
    return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, attn_mask=mask_LS, scale=scale)


def dense_mask(ranges: KeyRanges, device: torch.device) -> Tensor:
    return ranges.dense().to(device)


def benchmark_training(geometry: Geometry, batch: int, rate: float, bandwidth: float,
                       cold: Tensor) -> None:
    """A training step of ours, of ours compiled, and of a twin with PyTorch's dense mask."""
    model = VAR(geometry[1]).to(cold.device).train()
    inputs = training_inputs(model.config, batch, cold.device)
    optimizers = adamw(model)
    ours = partial(training_step, model, optimizers, *inputs)
    compiled = torch.compile(model, dynamic=False)
    ways = {
        "ours": ours,
        "ours, compiled": partial(training_step, compiled, optimizers, *inputs),
        "PyTorch's attention, dense mask":
            mock.patch.object(var, "block_attention", dense_attention)(ours),
    }
    one_image = (x[:1] for x in inputs[:2])
    by_flops = 3 * batch * forward_flops(model, *one_image) / rate   # backward is twice forward
    by_bytes = 0.0
    if HAS_TRITON:
        by_bytes = count_training(geometry, batch)["bytes"] / bandwidth
    print_table(f"training step, B {batch} bf16", ways, max(by_flops, by_bytes), cold)
    print(f"  limit by FLOPs {1e3 * by_flops:.1f} ms, by bytes {1e3 * by_bytes:.1f} ms")


def save_plot(curves: dict, file: Path) -> None:
    from matplotlib import pyplot
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for panel, (what, lines) in zip(panels, curves.items()):
        for name, points in lines.items():
            panel.loglog(*zip(*points), marker="o", label=name)
        panel.set(title=f"attention, {what}", xlabel="tokens L", ylabel="seconds")
        panel.legend()
    save_picture(file, figure)


def main() -> None:
    parser = Parser(
        prog="python -m tests.benchmark",
        description="Count and time every operation, against what PyTorch offers here.")
    parser.add_argument("--plot", type=output_as(".png"), metavar="FILE", help="save attention's time against L here")
    parser.add_argument("--tiles", type=output_as(".png"), metavar="FILE",
                        help="only draw the tiles that attention visits, and save them here")
    parser.add_argument("--generate", action="store_true",
                        help="only time one image of the published size, in fp32, against its limit")
    parser.add_argument("--registers", action="store_true",
                        help="only compile every kernel for six GPUs, and print what it takes of each")
    options = parser.parse_args()
    if options.registers:
        print_registers()
        return
    if options.tiles:
        draw_tiles(options.tiles)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device}, {torch.get_num_threads()} threads; PyTorch {torch.__version__}; "
          f"Triton {triton.__version__}")
    megabytes = 512 if device.type == "cuda" else 64
    cold = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=device)
    rate = product_rate(torch.float32, cold)
    if options.generate:
        benchmark_scales(PUBLISHED_D16, rate, cold)
        return
    bandwidth = copy_rate(cold)
    print_counts()
    if HAS_TRITON:
        print_work(PUBLISHED_D16)
    half_rate = product_rate(torch.bfloat16, cold)
    curves = benchmark_attention(torch.bfloat16, half_rate, cold)
    benchmark_attention(torch.float32, rate, cold)
    if device.type == "cuda":
        benchmark_the_rest(rate, bandwidth, cold)
        ways = {"ours": Machine(device, torch.bfloat16),
                "ours, compiled": Machine(device, torch.bfloat16, compile=True)}
        benchmark_sampling(PUBLISHED_D16, ways, [1, 8, 64], half_rate, bandwidth, cold)
        benchmark_training(PUBLISHED_D16, 64, half_rate, bandwidth, cold)
    else:
        print("\nThese were the PyTorch functions. To time the Triton kernels takes a GPU.")
    if options.plot:
        save_plot(curves, options.plot)


if __name__ == "__main__":
    run_program(main)
