"""What the operations of kernels.py cost, counted and timed:  python kernels.py

Counts are of tiles and bytes, at the sizes of the published models, and take no GPU. Times are of
what this machine can run, beside what PyTorch offers, and beside a limit: what the arithmetic or
the memory traffic alone takes, at the rates measured of a large matrix product and a large copy.
"""
from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import (
    ATTENTION_TILES, KeyRanges, adaln_triton, block_attention, forward_flops, nearest_code,
    obvious_adaln, obvious_attention, obvious_nearest_code, obvious_sampling, obvious_split_heads,
    sample_tokens, split_heads, table, triton,
)

# -------------------------------------------------------------------------------------------------
# What can be counted without a GPU: tiles and bytes

BENCHMARK_SCALES = {   # by tokens: the published models, a small one, PyTorch's issue 173933
    680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    9451: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
    130: (1, 2, 3, 4, 6, 8),
    521: (1, 2, 4, 6, 8, 20),
}


def tile_grid(L: int) -> Tensor:
    """[tiles of queries, tiles of keys] of attention_forward: 0 is not visited, 1 cut, 2 whole."""
    TILE_L, TILE_S, *_ = ATTENTION_TILES["forward"][0]
    mask_LS = KeyRanges.from_scales(BENCHMARK_SCALES[L]).dense()
    # As in `plan_tiles`: queries that are not there see what the last one sees, keys are not seen.
    mask_LS = torch.cat([mask_LS, mask_LS[-1:].expand(-L % TILE_L, L)])
    mask_LS = F.pad(mask_LS, (0, -L % TILE_S))
    tiles = mask_LS.unflatten(1, (-1, TILE_S)).unflatten(0, (-1, TILE_L))
    return tiles.any(dim=(1, 3)).long() + tiles.all(dim=3).all(dim=1)


def draw_tiles(file: str) -> None:
    """The tiles that attention_forward visits at 256 pixels, and the edge of the mask."""
    from matplotlib import colors, pyplot
    last = KeyRanges.from_scales(BENCHMARK_SCALES[680]).last
    figure, panel = pyplot.subplots(figsize=(4.5, 4.2), layout="constrained")
    panel.pcolormesh(range(0, 705, 64), range(0, 769, 128), tile_grid(680), edgecolors="white",
                     cmap=colors.ListedColormap(["0.93", "tab:orange", "tab:blue"]))
    panel.stairs(last, range(681), orientation="horizontal", color="black")
    panel.set(ylim=(768, 0), xlabel="keys", ylabel="queries",
              title="tiles: whole (blue), cut (orange), not visited")
    figure.savefig(file, dpi=100)


class BytesMoved(TorchDispatchMode):
    """Adds up what operations read and write. A view moves nothing."""
    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view and function is not torch.ops.aten._unsafe_view.default:
            self.total += array_bytes(args, out)
        return out


def array_bytes(*values) -> int:
    leaves = torch.utils._pytree.tree_leaves(values)
    return sum(x.nbytes for x in leaves if isinstance(x, Tensor))


def cases(new: Callable) -> dict[str, tuple]:
    """{title: (ours, obvious, FLOP, backward, *inputs)} at width 1024; new(*shape) is a tensor.

    backward: how many times as many bytes as the forward it moves at the least; 0: there is none.
    """
    half = partial(new, dtype=torch.bfloat16)
    modulation = [half(64, 1024) for _ in range(3)]
    return {
        "AdaLN, B 64 L 680 W 1024 float32 + bfloat16":
            (lambda *inputs: adaln_triton(*inputs, torch.bfloat16), obvious_adaln, 0, 3 / 2,
             new(64, 680, 1024), half(64, 680, 1024), *modulation),
        "nearest code, N 43520 V 4096 C 32 float32":
            (nearest_code, obvious_nearest_code, 2 * 43520 * 4096 * 32, 0, new(43520, 32),
             new(4096, 32)),
        "heads, B 64 L 680 W 1024 bfloat16":
            (partial(split_heads, heads=16), obvious_split_heads, 0, 4 / 3,
             half(64, 680, 3072), new(1024), new(1024), new(16)),
        "sampling, B 64 l 256 V 4096 float32":
            (lambda logits, noise: sample_tokens(logits, None, 0.0, 900, 0.96, noise),
             obvious_sampling, 0, 0, new(64, 256, 4096), new(64, 256, 4096)),
    }


def print_counts() -> None:
    """At the sizes of the published models: tiles that are visited, bytes that are moved."""
    new = partial(torch.empty, device="meta")   # shapes and dtypes without numbers
    counted = cases(new)
    print("\nattention_forward, tiles            whole       cut    of all   visited")
    for L in 680, 2240, 9451:
        grid = tile_grid(L)
        skipped, cut, whole = grid.flatten().bincount(minlength=3).tolist()
        share = 1 - skipped / grid.numel()
        print(f"  L {L:<26,}{whole:11,}{cut:10,}{grid.numel():10,}{share:10.0%}")
        qkv = new(3, 1, 16, L, 64, dtype=torch.bfloat16)
        mask_LS = new(L, L, dtype=torch.bool)
        counted[f"attention, B 1 H 16 L {L} D 64 bfloat16"] = (
            block_attention, obvious_attention, 0, 0, *qkv, mask_LS)

    print(f"\n{'bytes, in GB':50}{'obvious':>10}{'ours':>10}")
    for title, (_, obvious, _, _, *inputs) in counted.items():
        with BytesMoved() as moved:
            output = obvious(*inputs)
        ours = array_bytes([x for x in inputs if x.dtype != torch.bool], output)
        print(f"  {title:48}{moved.total / 1e9:10.3f}{ours / 1e9:10.3f}")
    print("  ours: every array once. What a kernel reads again, as attention the keys and values,\n"
          "  it finds in the GPU's cache as long as that has room.")


# -------------------------------------------------------------------------------------------------
# Benchmark: python kernels.py

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
        first_L, last_L = ranges.once(table, device)
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
            calls = {name: timed(face, *qkv) for name, face in alternatives.items()}
            title = f"attention {what}, B {B} H {H} L {L} D {D} {str(dtype)[6:]}"
            times = print_table(title, calls, products * flops / rate, cold)
            for name, seconds in times.items() if D == 64 else ():
                curves[what].setdefault(name, []).append((L, seconds))
    return curves


def benchmark_the_rest(rate: float, bandwidth: float, cold: Tensor) -> None:
    """All operations but attention, on a GPU."""
    for title, case in cases(partial(torch.rand, device="cuda", requires_grad=True)).items():
        ours, obvious, flops, backward, *inputs = case
        faces = {"ours": ours, "obvious": obvious,
                 "obvious, compiled": torch.compile(obvious, dynamic=False)}
        bytes_moved = array_bytes(inputs, ours(*inputs))
        limit = max(flops / rate, bytes_moved / bandwidth)
        print_table(title, {name: forward_only(face, *inputs) for name, face in faces.items()},
                    limit, cold)
        if backward:
            print_table(title + ", and backward",
                        {name: with_gradients(face, *inputs) for name, face in faces.items()},
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


PUBLISHED_D16 = dict(width=1024, heads=16, depth=16)


def benchmark_generation(rate: float, device: torch.device) -> None:
    """One image of the published d16, random weights, guidance, fp32: seconds against the limit.

    The limit is what the matrix products alone take at the measured rate. The transformer's
    seconds are those from the first layer to the logits, summed over the scales.
    """
    from tokenizer import Tokenizer, TokenizerConfig
    from var import VAR, VARConfig
    sizes = dict(scales=BENCHMARK_SCALES[680], vocabulary=4096, code_channels=32)
    tokenizer = Tokenizer(TokenizerConfig(
        **sizes, image_channels=3, width=160, multipliers=(1, 1, 2, 2, 4), blocks=2, phis=4,
        norm_groups=32)).to(device).eval()
    model = VAR(VARConfig(
        **sizes, **PUBLISHED_D16, classes=1000, shared_adaln=False, normalise_qk=True,
        label_dropout=0.0, drop_path=0.0, last_scales=None)).to(device).eval()
    label_B = torch.zeros(1, dtype=torch.int64, device=device)
    inputs = torch.zeros(2, model.config.length - 1, 32)
    latent_BCSS = torch.zeros(1, 32, model.config.scales[-1], model.config.scales[-1])
    work = {"transformer": forward_flops(model, label_B.repeat(2), inputs),
            "decoder": forward_flops(tokenizer.decoder, latent_BCSS)}
    marks: list[float] = []   # when a pass begins, when it ends, and so on

    def mark(*_) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    model.blocks[0].register_forward_pre_hook(mark)
    model.head.register_forward_hook(mark)
    tokenizer.decoder.register_forward_pre_hook(mark)
    tokenizer.decoder.register_forward_hook(mark)
    seconds = []
    for _ in range(3):
        marks.clear()
        tokenizer.decode(model.generate(tokenizer, label_B))
        *passes, decoding = (end - begin for begin, end in zip(marks[::2], marks[1::2]))
        seconds.append((sum(passes), decoding))
    print("\nthe published d16, one image, guidance, fp32, fastest of three\n"
          f"{'':14}{'GFLOP':>9}{'limit, s':>10}{'seconds':>9}{'of limit':>10}")
    for (name, flops), least in zip(work.items(), map(min, zip(*seconds))):
        limit = flops / rate
        print(f"{name:14}{flops / 1e9:9.0f}{limit:10.2f}{least:9.2f}{limit / least:10.0%}")


def save_plot(curves: dict, file: str) -> None:
    from matplotlib import pyplot
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for panel, (what, lines) in zip(panels, curves.items()):
        for name, points in lines.items():
            panel.loglog(*zip(*points), marker="o", label=name)
        panel.set(title=f"attention, {what}", xlabel="tokens L", ylabel="seconds")
        panel.legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Count and time every operation, against what PyTorch offers here.")
    parser.add_argument("--plot", metavar="FILE", help="save attention's time against L here")
    parser.add_argument("--tiles", metavar="FILE",
                        help="only draw the tiles that attention visits, and save them here")
    parser.add_argument("--generate", action="store_true",
                        help="only time one image of the published size against its limit")
    options = parser.parse_args()
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
        benchmark_generation(rate, device)
        return
    print_counts()
    curves = benchmark_attention(torch.bfloat16, product_rate(torch.bfloat16, cold), cold)
    benchmark_attention(torch.float32, rate, cold)
    if device.type == "cuda":
        benchmark_the_rest(rate, copy_rate(cold), cold)
    else:
        print("\nThese were the PyTorch faces. To time the Triton kernels takes a GPU.")
    if options.plot:
        save_plot(curves, options.plot)

