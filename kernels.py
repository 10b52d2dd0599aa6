"""The operations of VAR worth a hand-written kernel, each in Triton for a GPU and in PyTorch.

    adaln              a branch added, layer norm, scale and shift        (var.py, every layer)
    nearest_code       index of the closest codebook row                  (tokenizer.py, each scale)
    split_heads        queries, keys and values of one matrix product     (var.py, every layer)
    block_attention    attention in which a query sees one range of keys  (var.py, every layer)
    sample_tokens      guidance, top-k, top-p and the draw                (var.py, generation)

They come in this order, the easiest first, and each is told in the same steps: what the obvious
version costs, the formula, the Triton kernel, the function that launches it, its PyTorch twin.
Take `adaln` for example. Of every operation there are three versions, or faces, that agree:

    adaln_triton           the Triton kernel, on an NVIDIA GPU
    adaln_torch            its PyTorch twin, on anything else: a CPU, a Mac
    tests/reference.py     NumPy in float64, slow and obvious, which the tests hold the others to

and `adaln`, which the other files call, checks nothing and computes nothing: it picks a face.
Five words that Triton needs:

    program      A kernel runs many times at once. Each run, a program, does one part of the work
                 and knows which part by its number, tl.program_id(0).
    tile         The block of an array that a program computes with at a time, in registers. Its
                 sides are powers of two; where it sticks out of the array, loads are masked.
    constexpr    An argument known when the kernel is compiled, as the sides of tiles have to be.
                 There is one compiled kernel for every value it is called with.
    warp         32 threads of the GPU, which execute each instruction together. A program is
                 num_warps of them, and the numbers of a tile are dealt out to their threads.
    stage        With num_stages = 3, a loop already fetches what its next two rounds will need
                 while it computes this one, into shared memory, where each stage takes its room.

Axes: B batch, H heads, L queries, S keys, D head width, W model width, V vocabulary, C channels
of a code, N vectors, l tokens of one scale. Inside the kernels T is a tile of an axis: q_TD is a
tile of queries, and scores_TS is what a tile of keys makes of it.

Without a GPU the kernels run in Triton's interpreter, slowly, and print() and pdb work in them.
With TRITON_INTERPRET=1 in the environment of `python`:

    >>> import torch, kernels
    >>> kernels.FACE = "triton"
    >>> x, y = kernels.adaln(*torch.randn(2, 2, 5, 24), *torch.zeros(3, 2, 24))
    >>> y.shape
    torch.Size([2, 5, 24])

Commands, which are in tests/benchmark.py, beside what is counted and timed:

    python kernels.py                 counts tiles and bytes, which takes no GPU, then times what
                                      this machine can run against what PyTorch offers
    python kernels.py --generate      times one image of the published size against its limit
    python kernels.py --registers     compiles every kernel for three GPUs that need not be there
    python kernels.py --tiles FILE    draws the tiles that attention visits
"""
from __future__ import annotations

import contextlib
import copy
import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.types import Number

try:
    import triton
    import triton.language as tl
    HAS_TRITON = True
except ImportError:   # as on a Mac: the kernels stay plain functions that nobody calls
    from types import SimpleNamespace
    triton = SimpleNamespace(jit=lambda function: function, __version__="not installed")
    HAS_TRITON = False

FACE = None   # "triton" or "torch" decides for the whole program; None: by where the tensors live


def use_triton(tensor) -> bool:
    if FACE is None:
        return HAS_TRITON and tensor.is_cuda
    return FACE == "triton"


class Array(NamedTuple):
    """A tensor as kernels get it: a pointer to its first number, and a stride for every axis.

    Triton takes a tuple for an argument and leaves its parts their names: x.start, x.strides[0].
    """
    start: Any
    strides: tuple[int, ...]


def as_arrays(tensors: Sequence[Tensor]) -> list[Array]:
    return [Array(x, x.stride()) for x in tensors]


def launch(kernel: Callable, programs: int, read: list[Tensor], written: list[Tensor],
           *numbers: float, **constants: int) -> None:
    """Start a kernel on the arrays it reads, the arrays it writes, and numbers.

    torch.compile cannot look into it. What it needs to know is what is written, so that there a
    launch is one operator of PyTorch's, for all kernels. Elsewhere it goes the short way: the
    operator takes longer to call than many a kernel to run.
    """
    if torch.compiler.is_compiling():
        launch_compiled(kernel.__name__, programs, read, written, list(numbers),
                        ",".join(constants), list(constants.values()))
    else:
        start(kernel, programs, read + written, numbers, constants)


@torch.library.custom_op("var::launch", mutates_args=["written"])
def launch_compiled(kernel: str, programs: int, read: list[Tensor], written: list[Tensor],
                    numbers: list[Number], names: str, values: list[int]) -> None:
    constants = dict(zip(names.split(","), values))
    start(globals()[kernel], programs, read + written, numbers, constants)


@launch_compiled.register_fake
def launch_nothing(*arguments) -> None:
    """What torch.compile calls to learn the shapes of the outputs: there are none."""


def start(kernel: Callable, programs: int, tensors: Sequence[Tensor], numbers: Sequence[float],
          constants: dict[str, int]) -> None:
    """Where the tensors are: Triton alone takes the current GPU, which may be another.

    Raises NoLauncher where Triton cannot build the C program by which it starts its kernels.
    """
    with torch.cuda.device_of(tensors[0]):
        try:
            kernel[(programs,)](*as_arrays(tensors), *numbers, **constants)
        except (subprocess.CalledProcessError, FileNotFoundError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "C compiler" not in str(error):
                raise
            raise NoLauncher from error


class NoLauncher(RuntimeError):
    """Nothing is wrong with the program: the machine lacks what Triton needs to start kernels."""

    def __str__(self) -> str:
        return ("Triton could not build its launcher, for which it needs a C compiler and Python's "
                "headers (Debian: apt install gcc python3-dev)")


@triton.jit
def product(a_MK, b_KN):
    """a b, summed in fp32. "ieee": the usual TF32 has 10 bits and would change codes."""
    return tl.dot(a_MK, b_KN, input_precision="ieee")


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """fp32 convolutions without TF32, which cuDNN takes unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def check_tensors(axes: dict[str, str], *tensors: Tensor | None, **sizes: int) -> None:
    """ValueError unless all hold floating point numbers, at least one, on one device, and fit.

    axes: of each tensor by its name, as in dict(x="NC", codebook="VC"). An axis has the same size
    wherever it appears, and may be given one. None, which stands for nothing, is passed over.
    """
    devices = {}
    for (name, letters), tensor in zip(axes.items(), tensors):
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        if not tensor.is_floating_point() or tensor.numel() == 0:
            raise ValueError(f"{name} must hold floating point numbers, at least one: "
                             f"it is {tensor.dtype} of shape {shape}")
        if len(shape) == len(letters):
            sizes = dict(zip(letters, shape)) | sizes
        expected = tuple(sizes.get(axis, axis) for axis in letters)
        if shape != expected:
            raise ValueError(f"{name} must be [{', '.join(letters)}], {expected}: it is {shape}")
        devices[name] = tensor.device
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} is on {device}" for name, device in devices.items())
        raise ValueError(f"all on one device, please: {places}")


# -------------------------------------------------------------------------------------------------
# Adaptive layer norm
#
# A layer adds its branch h to the residual stream x, each channel times a gate, and what the next
# branch reads is the norm of that, scaled and shifted. The obvious version goes to memory after
# every step. With x in fp32 and h and y in bf16, as under autocast, that is 44 bytes per number,
# where reading x and h and writing x and y is 12.
#
#     x' = x + gate h
#     n  = (x' - mean) / sqrt(variance + 1e-6)                          mean and variance over W
#     y  = n (1 + scale) + shift
#
# Backward, with d = dL/d of any name; dx' comes from whatever else reads x':
#
#     g  = dy (1 + scale)
#     dx = dx' + (g - mean(g) - n mean(g n)) / sqrt(variance + 1e-6)
#     dh = gate dx
#     dgate  = sum of dx h over the tokens of an image
#     dscale = sum of dy n over the tokens of an image
#     dshift = sum of dy over the tokens of an image


def obvious_adaln(x_BLW, h_BLW, gate_BW, scale_BW, shift_BW):
    x_BLW = x_BLW + gate_BW[:, None] * h_BLW
    normed_BLW = F.layer_norm(x_BLW.float(), x_BLW.shape[-1:], eps=1e-6)
    y_BLW = normed_BLW * (1 + scale_BW[:, None]) + shift_BW[:, None]
    return x_BLW, y_BLW.to(h_BLW.dtype)


def adaln(x_BLW: Tensor, h_BLW: Tensor, gate_BW: Tensor, scale_BW: Tensor,
          shift_BW: Tensor) -> tuple[Tensor, Tensor]:
    """x + gate * h, and layer_norm of that * (1 + scale) + shift (paper: Sec. 3.3).

    x, h [B, L, W]; gate, scale, shift [B, W], one each per image. The norm has eps 1e-6 and no
    weights, and is computed in fp32: a mean and a variance in bf16 are worth little. The first
    result has the dtype of x, the second that of autocast where it is on, for the matrix product
    that comes next. All else may differ in dtype. Raises ValueError where shapes do not fit.
    """
    face = adaln_triton if use_triton(x_BLW) else adaln_torch
    return face(x_BLW, h_BLW, gate_BW, scale_BW, shift_BW, product_dtype(x_BLW))


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product would take x in."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def check_adaln(x_BLW, h_BLW, gate_BW, scale_BW, shift_BW):
    axes = dict(x="BLW", h="BLW", gate="BW", scale="BW", shift="BW")
    check_tensors(axes, x_BLW, h_BLW, gate_BW, scale_BW, shift_BW)


# A row of an array [B, L, W] is named by a tuple: (image, token, columns_W, W), where columns_W
# counts up to the side of a tile, which may be more than W.


@triton.jit
def places_of_row(x_BLW, row):
    """Pointers to x[image, token], and which of them lie within W."""
    image, token, columns_W, W = row
    begin = image.to(tl.int64) * x_BLW.strides[0]   # in 64 bits: there may be over 2^31 numbers
    begin += token * x_BLW.strides[1]
    return x_BLW.start + begin + columns_W * x_BLW.strides[2], columns_W < W


@triton.jit
def load_row(x_BLW, row):
    """x[image, token] in fp32, with zeros from W on."""
    places_W, inside_W = places_of_row(x_BLW, row)
    return tl.load(places_W, mask=inside_W, other=0.0).to(tl.float32)


@triton.jit
def store_row(x_BLW, row, x_W):
    """x[image, token] = x_W, in the dtype of x."""
    places_W, inside_W = places_of_row(x_BLW, row)
    tl.store(places_W, x_W.to(x_BLW.start.dtype.element_ty), mask=inside_W)


@triton.jit
def normalise(x_W, columns_W, W):
    """n of a row, and 1 / sqrt(variance + eps). Two passes over registers: nothing cancels."""
    centred_W = tl.where(columns_W < W, x_W - tl.sum(x_W) / W, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred_W * centred_W) / W + 1e-6)
    return centred_W * inverse, inverse


@triton.jit
def adaln_forward(x_BLW, h_BLW, gate_B1W, scale_B1W, shift_B1W, sum_BLW, y_BLW, L, W,
                  TILE_W: tl.constexpr):
    """One token a program: x, h [B, L, W], gate, scale, shift [B, 1, W] -> x + gate h, y."""
    program = tl.program_id(0)
    image = program // L
    columns_W = tl.arange(0, TILE_W)
    row = (image, program % L, columns_W, W)
    only_row = (image, 0, columns_W, W)
    x_W = load_row(x_BLW, row)
    h_W = load_row(h_BLW, row)
    gate_W = load_row(gate_B1W, only_row)
    sum_W = (x_W + gate_W * h_W).to(sum_BLW.start.dtype.element_ty)
    store_row(sum_BLW, row, sum_W)
    normed_W, _ = normalise(sum_W.to(tl.float32), columns_W, W)   # of what the backward will find
    scale_W = load_row(scale_B1W, only_row)
    shift_W = load_row(shift_B1W, only_row)
    store_row(y_BLW, row, normed_W * (1 + scale_W) + shift_W)


@triton.jit
def adaln_backward(sum_BLW, h_BLW, gate_B1W, scale_B1W, dsum_BLW, dy_BLW, dx_BLW, dh_BLW,
                   dgate_BPW, dscale_BPW, dshift_BPW, L, W,
                   TOKENS: tl.constexpr, TILE_W: tl.constexpr):
    """TOKENS tokens of an image a program -> dx, dh, and part P of the three sums.

    sum = x + gate h. The parts, [B, P, W] in fp32, are added up afterwards, always in one order.
    """
    program = tl.program_id(0)
    parts = tl.cdiv(L, TOKENS)
    image = program // parts
    part = program % parts
    columns_W = tl.arange(0, TILE_W)
    only_row = (image, 0, columns_W, W)
    gate_W = load_row(gate_B1W, only_row)
    scale_W = load_row(scale_B1W, only_row)
    dgate_W = tl.zeros([TILE_W], tl.float32)
    dscale_W = tl.zeros([TILE_W], tl.float32)
    dshift_W = tl.zeros([TILE_W], tl.float32)
    end = tl.minimum(L, (part + 1) * TOKENS)
    for token in range(part * TOKENS, end):
        row = (image, token, columns_W, W)
        sum_W = load_row(sum_BLW, row)
        normed_W, inverse = normalise(sum_W, columns_W, W)
        dy_W = load_row(dy_BLW, row)
        dscale_W += dy_W * normed_W
        dshift_W += dy_W
        g_W = dy_W * (1 + scale_W)
        mean_gn = tl.sum(g_W * normed_W) / W
        dx_W = (g_W - tl.sum(g_W) / W - normed_W * mean_gn) * inverse
        dx_W += load_row(dsum_BLW, row)
        store_row(dx_BLW, row, dx_W)
        dgate_W += dx_W * load_row(h_BLW, row)
        store_row(dh_BLW, row, dx_W * gate_W)
    part_row = (image, part, columns_W, W)
    store_row(dgate_BPW, part_row, dgate_W)
    store_row(dscale_BPW, part_row, dscale_W)
    store_row(dshift_BPW, part_row, dshift_W)


def adaln_tiles(W: int) -> dict[str, int]:
    """A row in registers; from W 65 to 2048 4 numbers a thread, which in fp32 one load moves."""
    TILE_W = triton.next_power_of_2(W)
    return dict(TILE_W=TILE_W, num_warps=min(16, max(1, TILE_W // 128)))


class AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BLW, h_BLW, gate_B1W, scale_B1W, shift_B1W, dtype):
        B, L, W = x_BLW.shape
        sum_BLW = x_BLW.new_empty(B, L, W)
        y_BLW = x_BLW.new_empty(B, L, W, dtype=dtype)
        launch(adaln_forward, B * L, [x_BLW, h_BLW, gate_B1W, scale_B1W, shift_B1W],
               [sum_BLW, y_BLW], L, W, **adaln_tiles(W))
        ctx.save_for_backward(sum_BLW, h_BLW, gate_B1W, scale_B1W)
        return sum_BLW, y_BLW

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum_BLW, dy_BLW):
        sum_BLW, h_BLW, gate_B1W, scale_B1W = ctx.saved_tensors
        B, L, W = sum_BLW.shape
        TOKENS = 32   # so the sums are a small part of what is read and written
        parts = triton.cdiv(L, TOKENS)
        dx_BLW = torch.empty_like(sum_BLW)
        dh_BLW = torch.empty_like(h_BLW)
        sums_3BPW = sum_BLW.new_empty(3, B, parts, W, dtype=torch.float32)
        launch(adaln_backward, B * parts, [sum_BLW, h_BLW, gate_B1W, scale_B1W, dsum_BLW, dy_BLW],
               [dx_BLW, dh_BLW, *sums_3BPW], L, W, TOKENS=TOKENS, **adaln_tiles(W))
        # dgate, dscale and dshift, which autograd brings to the dtypes of the inputs:
        return dx_BLW, dh_BLW, *sums_3BPW.sum(dim=2, keepdim=True), None


def adaln_triton(x_BLW, h_BLW, gate_BW, scale_BW, shift_BW, dtype):
    check_adaln(x_BLW, h_BLW, gate_BW, scale_BW, shift_BW)
    W = x_BLW.shape[2]
    if W > 16384:
        raise ValueError(f"the Triton kernel holds a row in registers, up to 16384: W is {W}")
    modulation = [part[:, None] for part in (gate_BW, scale_BW, shift_BW)]
    return AdaLN.apply(x_BLW, h_BLW, *modulation, dtype)


def adaln_torch(x_BLW, h_BLW, gate_BW, scale_BW, shift_BW, dtype):
    check_adaln(x_BLW, h_BLW, gate_BW, scale_BW, shift_BW)
    gate_B1W, scale_B1W, shift_B1W = (x.float()[:, None] for x in (gate_BW, scale_BW, shift_BW))
    sum_BLW = torch.addcmul(x_BLW.float(), gate_B1W, h_BLW.float()).to(x_BLW.dtype)
    normed_BLW = F.layer_norm(sum_BLW.float(), x_BLW.shape[-1:], eps=1e-6)
    y_BLW = torch.addcmul(shift_B1W, normed_BLW, 1 + scale_B1W)
    return sum_BLW, y_BLW.to(dtype)


# -------------------------------------------------------------------------------------------------
# Nearest code
#
# The obvious version (torch.cdist, then argmin) writes and reads the N V distances: at N 43,520
# and V 4096 in fp32 2 x 0.71 GB, to find 43,520 indices from 5.6 MB of vectors and 0.5 MB of codes.
#
#     |x - e|^2 = |x|^2 - 2 x.e + |e|^2,  and |x|^2 is the same for every code:
#
#     nearest = argmin_v |e_v|^2 - 2 x.e_v
#
# For the cosine e has norm 1, so the first term is left out: argmax x.e = argmin 0 - 2 x.e.


def obvious_nearest_code(x_NC, codebook_VC):
    return torch.cdist(x_NC, codebook_VC).argmin(dim=1)


def nearest_code(x_NC: Tensor, codebook_VC: Tensor, cosine: bool = False) -> Tensor:
    """argmin_v |x_n - e_v|^2 as int64 [N]; the lowest index wins a tie (paper: eq. 3).

    cosine: argmax_v of the cosine of x_n and e_v instead, for a codebook of directions. Always in
    fp32: half precision changes codes. Raises ValueError where widths differ or there is nothing.
    """
    face = nearest_code_triton if use_triton(x_NC) else nearest_code_torch
    return face(x_NC, codebook_VC, cosine)


def code_terms(x_NC, codebook_VC, cosine):
    """x_NC, e_VC and squares_V, in fp32: the nearest code is argmin_v squares_v - 2 x.e_v."""
    check_tensors(dict(x="NC", codebook="VC"), x_NC, codebook_VC)
    e_VC = codebook_VC.float()
    squares_V = e_VC.square().sum(dim=1)
    if cosine:
        e_VC = F.normalize(e_VC, dim=1)
        squares_V = torch.zeros_like(squares_V)
    return x_NC.float(), e_VC, squares_V


@triton.jit
def load_block(x_NC, rows_T, N, channels_T, C):
    """x[rows, channels] of a matrix as [T, T]; zeros outside of it."""
    rows_T1 = rows_T[:, None]
    channels_1T = channels_T[None, :]
    places_TT = x_NC.start + rows_T1 * x_NC.strides[0] + channels_1T * x_NC.strides[1]
    inside_TT = (rows_T1 < N) & (channels_1T < C)
    return tl.load(places_TT, mask=inside_TT, other=0.0)


@triton.jit
def nearest_code_kernel(x_NC, e_VC, squares_V, index_N, N, V, C: tl.constexpr,
                        TILE_N: tl.constexpr, TILE_V: tl.constexpr, TILE_C: tl.constexpr):
    """A tile of vectors a program, against one tile of codes after the other.

    x [N, C], e [V, C] and squares [V] in fp32 -> index [N], int64.
    """
    rows_T = tl.program_id(0).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    # For every vector and column of the tiles of codes: the least so far, and in which tile.
    best_TV = tl.full([TILE_N, TILE_V], float("inf"), tl.float32)
    tile_TV = tl.zeros([TILE_N, TILE_V], tl.int32)
    for tile in range(0, V, TILE_V):
        codes_T = tile + tl.arange(0, TILE_V)
        dots_TV = tl.zeros([TILE_N, TILE_V], tl.float32)
        for channel in range(0, C, TILE_C):
            channels_T = channel + tl.arange(0, TILE_C)
            x_TC = load_block(x_NC, rows_T, N, channels_T, C)
            e_TC = load_block(e_VC, codes_T, V, channels_T, C)
            dots_TV += product(x_TC, e_TC.T)
        squares_T = tl.load(squares_V.start + codes_T, mask=codes_T < V, other=float("inf"))
        distance_TV = squares_T[None, :] - 2 * dots_TV
        closer_TV = distance_TV < best_TV   # not <=: of equal distances the lower index stays
        best_TV = tl.where(closer_TV, distance_TV, best_TV)
        tile_TV = tl.where(closer_TV, tile, tile_TV)
    index_TV = tile_TV + tl.arange(0, TILE_V)[None, :]
    least_T = tl.min(best_TV, 1)
    nearest_TV = tl.where(best_TV == least_T[:, None], index_TV, V)
    index_T = tl.min(nearest_TV, 1)
    tl.store(index_N.start + rows_T, index_T.to(tl.int64), mask=rows_T < N)


def nearest_code_triton(x_NC, codebook_VC, cosine=False):
    x_NC, e_VC, squares_V = code_terms(x_NC.detach(), codebook_VC.detach(), cosine)
    N, C = x_NC.shape
    index_N = torch.empty(N, dtype=torch.int64, device=x_NC.device)
    tiles = dict(TILE_N=64, TILE_V=64, TILE_C=16 if C <= 16 else 32)
    launch(nearest_code_kernel, triton.cdiv(N, 64), [x_NC, e_VC, squares_V], [index_N],
           N, len(e_VC), C=C, **tiles, num_warps=4, num_stages=3)
    return index_N


def nearest_code_torch(x_NC, codebook_VC, cosine=False):
    with torch.no_grad(), torch.autocast(x_NC.device.type, enabled=False):
        x_NC, e_VC, squares_V = code_terms(x_NC, codebook_VC, cosine)
        return torch.addmm(squares_V, x_NC, e_VC.T, alpha=-2).argmin(dim=1)


# -------------------------------------------------------------------------------------------------
# Heads
#
# One matrix product makes queries, keys and values. Before attention reads them they are given
# their biases; queries and keys are normalised, so that scores stay bounded in deep models (paper:
# Sec. 3.3), and each head learns a factor for its queries; and in generation keys and values go to
# where the later scales find them. The obvious version is a dozen operations. With the product in
# bf16 they move 25 bytes for each of its numbers, where reading and writing it is 4.
#
#     q = a n(product_q + bias_q),     n(x) = x / |x|,     a = min(e^log_scale, 100)
#     k = n(product_k)
#     v = product_v + bias_v
#
# Backward, from q and k, which attention keeps anyway, and |x|; dx is dL/d of what n is taken of:
#
#     dx = a (dq - n (n.dq)) / |x|
#     dlog_scale = sum of q.dq, over all queries of a head; 0 where a is 100

LARGEST_LOG_SCALE = math.log(100)


def obvious_split_heads(product_BLX, q_bias_W, v_bias_W, log_scale_H):
    bias_X = torch.cat([q_bias_W, torch.zeros_like(q_bias_W), v_bias_W]).to(product_BLX.dtype)
    split_BL3HD = (product_BLX + bias_X).unflatten(2, (3, len(log_scale_H), -1))
    q_BHLD, k_BHLD, v_BHLD = split_BL3HD.permute(2, 0, 3, 1, 4)
    a_H11 = log_scale_H.clamp(max=LARGEST_LOG_SCALE).exp()[:, None, None]
    q_BHLD = F.normalize(q_BHLD.float(), dim=-1) * a_H11
    k_BHLD = F.normalize(k_BHLD.float(), dim=-1)
    return q_BHLD.to(v_BHLD.dtype), k_BHLD.to(v_BHLD.dtype), v_BHLD


def split_heads(product_BLX: Tensor, q_bias_W: Tensor, v_bias_W: Tensor,
                log_scale_H: Tensor | None, heads: int,
                room: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, L, D] of a product [B, L, 3 W], in its dtype.

    log_scale_H: the learned scale of each head; None leaves queries and keys as they are.
    room: where to put keys and values, [B, H, L, D] both, as in a part of a cache, and where
        they are returned. For generation: no gradient goes through.
    Raises ValueError where the shapes do not fit.
    """
    face = split_heads_triton if use_triton(product_BLX) else split_heads_torch
    return face(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads, room)


def check_heads(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads, room):
    W = product_BLX.shape[-1] // 3
    if W % heads:
        raise ValueError(f"a width of {W} cannot be divided for {heads} heads")
    axes = dict(product="BLX", q_bias="W", v_bias="W", log_scale="H", k_room="BHLD", v_room="BHLD")
    check_tensors(axes, product_BLX, q_bias_W, v_bias_W, log_scale_H, *(room or ()),
                  X=3 * W, W=W, H=heads, D=W // heads)


@triton.jit
def aligned(stride, D: tl.constexpr):
    """The stride, which `rows_first` made a multiple of 8 if D is one, so that it can be seen.

    16 bytes are loaded at once where the compiler can prove that rows begin at multiples of 8
    numbers. It proves that of stride // 8 * 8. With tl.multiple_of(stride, 8) it does not, because
    the stride is a bare argument: D 72 was then loaded 2 bytes at a time (compiled for sm_90).
    """
    return stride // 8 * 8 if D % 8 == 0 else stride


# A tile of the rows of an array [B, H, L, D] is named by a tuple: (head, H, rows_T, L), with heads
# counted over all images. Its width is a power of two: D 72 is computed as 128, 1.8 times the
# products of its own.


@triton.jit
def places_of_rows(x_BHLD, rows, D: tl.constexpr, CUT: tl.constexpr):
    """Pointers to the rows, and which lie within D and, if the tile may be cut, within L."""
    head, H, rows_T, L = rows
    image = (head // H).to(tl.int64) * aligned(x_BHLD.strides[0], D)   # in 64 bits
    begin = image + (head % H).to(tl.int64) * aligned(x_BHLD.strides[1], D)
    rows_T1 = rows_T[:, None] * aligned(x_BHLD.strides[2], D)
    columns_1D = tl.arange(0, triton.next_power_of_2(D))[None, :]
    inside_TD = columns_1D < D
    if CUT:
        inside_TD &= rows_T[:, None] < L
    return x_BHLD.start + begin + rows_T1 + columns_1D, inside_TD


@triton.jit
def load_rows(x_BHLD, rows, D: tl.constexpr, CUT: tl.constexpr = True):
    """The rows as [T, D], with zeros outside of the array."""
    places_TD, inside_TD = places_of_rows(x_BHLD, rows, D, CUT)
    return tl.load(places_TD, mask=inside_TD, other=0.0)


@triton.jit
def store_rows(x_BHLD, rows, x_TD, D: tl.constexpr):
    """Write the rows, in the dtype of the array."""
    places_TD, inside_TD = places_of_rows(x_BHLD, rows, D, True)
    tl.store(places_TD, x_TD.to(x_BHLD.start.dtype.element_ty), mask=inside_TD)


@triton.jit
def places_of_numbers(x_BHL, rows):
    """Pointers to the one number that each of the rows has, and which of them lie within L."""
    head, H, rows_T, L = rows
    return x_BHL.start + head * L + rows_T, rows_T < L


@triton.jit
def load_numbers(x_BHL, rows):
    """The number of each row as [T], with zeros outside of the array."""
    places_T, inside_T = places_of_numbers(x_BHL, rows)
    return tl.load(places_T, mask=inside_T, other=0.0)


@triton.jit
def store_numbers(x_BHL, rows, x_T):
    places_T, inside_T = places_of_numbers(x_BHL, rows)
    tl.store(places_T, x_T, mask=inside_T)


@triton.jit
def load_bias(bias_W, head, H, D: tl.constexpr):
    """A head's part of a bias, [1, D] in fp32."""
    columns_1D = tl.arange(0, triton.next_power_of_2(D))[None, :]
    places_1D = bias_W.start + head % H * D + columns_1D
    return tl.load(places_1D, mask=columns_1D < D, other=0.0).to(tl.float32)


@triton.jit
def learned_factor(log_scale_H, head, H, largest):
    log_scale = tl.load(log_scale_H.start + head % H).to(tl.float32)
    return tl.exp(tl.minimum(log_scale, largest))


@triton.jit
def unit_rows(x_TD):
    """x / |x| of each row, and 1 / |x|."""
    length_T = tl.sqrt(tl.sum(x_TD * x_TD, 1))
    inverse_T = 1 / tl.maximum(length_T, 1e-12)
    return x_TD * inverse_T[:, None], inverse_T


@triton.jit
def unit_backward(n_TD, dn_TD, inverse_T):
    """dL/dx from dL/dn: what goes along n is lost, since n has length 1 whatever x is."""
    along_T = tl.sum(n_TD * dn_TD, 1)
    return (dn_TD - n_TD * along_T[:, None]) * inverse_T[:, None]


@triton.jit
def split_heads_forward(xq_BHLD, xk_BHLD, xv_BHLD, q_bias_W, v_bias_W, log_scale_H,
                        q_BHLD, k_BHLD, v_BHLD, q_inverse_BHL, k_inverse_BHL, largest, H, L,
                        NORMALISED: tl.constexpr, D: tl.constexpr, TILE_L: tl.constexpr):
    """A tile of tokens of one head a program: three views of the product -> q, k, v, 1 / |x|.

    All [B, H, L, D], biases [W], log_scale [H], inverses [B, H, L] in fp32.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(L, TILE_L)
    head = program // tiles
    tokens_T = program % tiles * TILE_L + tl.arange(0, TILE_L)
    rows = (head, H, tokens_T, L)
    q_TD = load_rows(xq_BHLD, rows, D) + load_bias(q_bias_W, head, H, D)
    k_TD = load_rows(xk_BHLD, rows, D).to(tl.float32)
    v_TD = load_rows(xv_BHLD, rows, D) + load_bias(v_bias_W, head, H, D)
    if NORMALISED:
        q_TD, q_inverse_T = unit_rows(q_TD)
        k_TD, k_inverse_T = unit_rows(k_TD)
        q_TD *= learned_factor(log_scale_H, head, H, largest)
        store_numbers(q_inverse_BHL, rows, q_inverse_T)
        store_numbers(k_inverse_BHL, rows, k_inverse_T)
    store_rows(q_BHLD, rows, q_TD, D)
    store_rows(k_BHLD, rows, k_TD, D)
    store_rows(v_BHLD, rows, v_TD, D)


@triton.jit
def split_heads_backward(q_BHLD, k_BHLD, q_inverse_BHL, k_inverse_BHL, log_scale_H,
                         dq_BHLD, dk_BHLD, dv_BHLD, dxq_BHLD, dxk_BHLD, dxv_BHLD,
                         dq_bias_BHPD, dv_bias_BHPD, dlog_scale_BHPD, largest, H, L, parts,
                         NORMALISED: tl.constexpr, D: tl.constexpr, TILE_L: tl.constexpr):
    """A tile of tokens of one head a program -> the product's gradient, and part P of the sums.

    The parts, [B, H, P, D] in fp32, are added up afterwards. That of the log scale by column.
    """
    program = tl.program_id(0)
    head = program // parts
    part_1 = program % parts + tl.arange(0, 1)   # a tile of one row, for load_rows and store_rows
    tokens_T = part_1 * TILE_L + tl.arange(0, TILE_L)
    part = (head, H, part_1, parts)
    rows = (head, H, tokens_T, L)
    dq_TD = load_rows(dq_BHLD, rows, D).to(tl.float32)
    dk_TD = load_rows(dk_BHLD, rows, D).to(tl.float32)
    dv_TD = load_rows(dv_BHLD, rows, D).to(tl.float32)
    if NORMALISED:
        factor = learned_factor(log_scale_H, head, H, largest)
        q_TD = load_rows(q_BHLD, rows, D).to(tl.float32)
        dlog_scale_1D = tl.sum(q_TD * dq_TD, 0)[None, :]
        store_rows(dlog_scale_BHPD, part, dlog_scale_1D, D)
        q_inverse_T = load_numbers(q_inverse_BHL, rows)
        dq_TD = unit_backward(q_TD / factor, dq_TD * factor, q_inverse_T)
        k_TD = load_rows(k_BHLD, rows, D).to(tl.float32)
        k_inverse_T = load_numbers(k_inverse_BHL, rows)
        dk_TD = unit_backward(k_TD, dk_TD, k_inverse_T)
    store_rows(dxq_BHLD, rows, dq_TD, D)
    store_rows(dxk_BHLD, rows, dk_TD, D)
    store_rows(dxv_BHLD, rows, dv_TD, D)
    store_rows(dq_bias_BHPD, part, tl.sum(dq_TD, 0)[None, :], D)
    store_rows(dv_bias_BHPD, part, tl.sum(dv_TD, 0)[None, :], D)


def rows_first(x_BHLD: Tensor) -> Tensor:
    """x if kernels can read it: rows unbroken and, if D is a multiple of 8, so is every stride."""
    *strides, last = x_BHLD.stride()
    multiple = x_BHLD.shape[3] % 8 != 0 or all(stride % 8 == 0 for stride in strides)
    return x_BHLD if last == 1 and multiple else x_BHLD.contiguous()


def heads_tiles(L: int, D: int) -> dict[str, int]:
    """A tile is 2048 numbers at most, of which 128 threads hold 16 each."""
    TILE_L = min(triton.next_power_of_2(L), 2048 // triton.next_power_of_2(D))
    return dict(D=D, TILE_L=TILE_L, num_warps=4)


def three_heads(product_BLX: Tensor, heads: int) -> list[Tensor]:
    """Queries, keys and values [B, H, L, D] as views of the product."""
    return list(product_BLX.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4))


def launch_split_heads(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads, room=None):
    """q, k and v [B, H, L, D], k and v in `room` if there is one, and of q and k 1 / |x|."""
    views = three_heads(product_BLX.contiguous(), heads)
    B, H, L, D = views[0].shape
    q_BHLD = product_BLX.new_empty(B, H, L, D)
    k_BHLD, v_BHLD = room or (torch.empty_like(q_BHLD), torch.empty_like(q_BHLD))
    inverse_2BHL = product_BLX.new_empty(2, B, H, L, dtype=torch.float32)
    normalised = log_scale_H is not None
    scales = log_scale_H if normalised else q_bias_W   # of which nothing is read then
    tiles = heads_tiles(L, D)
    launch(split_heads_forward, B * H * triton.cdiv(L, tiles["TILE_L"]),
           [*views, q_bias_W, v_bias_W, scales], [q_BHLD, k_BHLD, v_BHLD, *inverse_2BHL],
           LARGEST_LOG_SCALE, H, L, NORMALISED=normalised, **tiles)
    return q_BHLD, k_BHLD, v_BHLD, inverse_2BHL


class SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, product_BLX, q_bias_W, v_bias_W, log_scale_H, heads):
        q_BHLD, k_BHLD, v_BHLD, inverse_2BHL = launch_split_heads(
            product_BLX, q_bias_W, v_bias_W, log_scale_H, heads)
        ctx.save_for_backward(q_BHLD, k_BHLD, inverse_2BHL, log_scale_H)
        return q_BHLD, k_BHLD, v_BHLD

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_BHLD, dk_BHLD, dv_BHLD):
        q_BHLD, k_BHLD, inverse_2BHL, log_scale_H = ctx.saved_tensors
        normalised = log_scale_H is not None
        scales = log_scale_H if normalised else inverse_2BHL   # of which nothing is read then
        B, H, L, D = q_BHLD.shape
        tiles = heads_tiles(L, D)
        parts = triton.cdiv(L, tiles["TILE_L"])
        gradients = [rows_first(x) for x in (dq_BHLD, dk_BHLD, dv_BHLD)]
        dproduct_BLX = q_BHLD.new_empty(B, L, 3 * H * D)
        sums_3BHPD = q_BHLD.new_empty(3, B, H, parts, D, dtype=torch.float32)
        launch(split_heads_backward, B * H * parts,
               [q_BHLD, k_BHLD, *inverse_2BHL, scales, *gradients],
               [*three_heads(dproduct_BLX, H), *sums_3BHPD], LARGEST_LOG_SCALE, H, L, parts,
               NORMALISED=normalised, **tiles)
        dq_bias_HD, dv_bias_HD, dlog_scale_HD = sums_3BHPD.sum(dim=(1, 3))
        dlog_scale_H = None
        if normalised:
            free_H = log_scale_H <= LARGEST_LOG_SCALE
            dlog_scale_H = dlog_scale_HD.sum(dim=1) * free_H
        return dproduct_BLX, dq_bias_HD.flatten(), dv_bias_HD.flatten(), dlog_scale_H, None


def split_heads_triton(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads, room=None):
    check_heads(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads, room)
    if room is None:
        return SplitHeads.apply(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads)
    if any(rows_first(x) is not x for x in room):
        raise ValueError("room must have unbroken rows, at multiples of 8 numbers if their width "
                         f"is one: its strides are {[x.stride() for x in room]}")
    return launch_split_heads(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads, room)[:3]


def inverse_norm(x_BHLD):
    """1 / |x|: [B, H, L, 1]. F.normalize divides by it, number by number, which is slower."""
    return x_BHLD.square().sum(dim=-1, keepdim=True).clamp(min=1e-24).rsqrt()


def split_heads_torch(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads, room=None):
    check_heads(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads, room)
    q_BLW, k_BLW, v_BLW = product_BLX.float().chunk(3, dim=2)
    whole = q_BLW + q_bias_W.float(), k_BLW, v_BLW + v_bias_W.float()
    q_BHLD, k_BHLD, v_BHLD = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in whole)
    if log_scale_H is not None:
        factor_H = log_scale_H.float().clamp(max=LARGEST_LOG_SCALE).exp()
        q_BHLD = q_BHLD * (factor_H[:, None, None] * inverse_norm(q_BHLD))
        k_BHLD = k_BHLD * inverse_norm(k_BHLD)
    q_BHLD, k_BHLD, v_BHLD = (x.to(product_BLX.dtype) for x in (q_BHLD, k_BHLD, v_BHLD))
    if room is None:
        return q_BHLD, k_BHLD, v_BHLD
    return q_BHLD, room[0].copy_(k_BHLD), room[1].copy_(v_BHLD)


# -------------------------------------------------------------------------------------------------
# Attention: the mask
#
# In next-scale prediction a query sees one unbroken range of keys, and both ends of the range only
# ever grow from one query to the next. So a mask is a table of two columns, and not L x S numbers:
#
#     scales (1, 2)        every earlier scale      own scale only       the last n lie between
#     query 0              keys 0                   keys 0
#     queries 1..4         keys 0 1 2 3 4           keys 1 2 3 4


class KeyRanges:
    """A mask as a table: query i sees the keys j with first[i] <= j < last[i].

    first, last: L integers each. Raises ValueError where a range is empty or an end decreases.
    """

    def __init__(self, first: Sequence[int], last: Sequence[int]):
        self.first = tuple(map(int, first))
        self.last = tuple(map(int, last))
        self.made: dict[tuple, Any] = {}
        if len(self.first) != len(self.last) or not self.first:
            raise ValueError(f"a range needs both ends: {len(self.first)} firsts and "
                             f"{len(self.last)} lasts given")
        for ends in (self.first, self.last):
            if list(ends) != sorted(ends):
                raise ValueError(f"range ends must not decrease from query to query: {ends}")
        if self.first[0] < 0 or any(b <= a for a, b in zip(self.first, self.last)):
            raise ValueError("every query must see at least one key, and no key before 0")

    @classmethod
    def from_scales(cls, scales: Sequence[int], last_scales: int | None = None) -> KeyRanges:
        """The block-causal table of token maps of s x s tokens, coarse to fine.

        last_scales: how many scales a token sees, its own among them: None is all so far (VAR),
        1 is its own alone (a Markov model).
        """
        if last_scales is not None and last_scales < 1:
            raise ValueError(f"last_scales is {last_scales}: a token sees at least its own scale")
        ends = list(accumulate((s * s for s in scales), initial=0))
        first = []
        last = []
        for k, s in enumerate(scales):
            seen = 0 if last_scales is None else max(0, k + 1 - last_scales)
            first += [ends[seen]] * (s * s)
            last += [ends[k + 1]] * (s * s)
        return cls(first, last)

    def __len__(self) -> int:
        return len(self.first)

    def rows(self, begin: int, end: int) -> KeyRanges:
        """The table of the queries begin .. end-1, as for one scale; keys keep their numbers."""
        return self.once(slice_ranges, begin, end)

    def dense(self) -> Tensor:
        """The same mask as a bool [L, S], S the last key in sight + 1: for pictures and tests."""
        keys_S = torch.arange(self.last[-1])
        first_L1 = torch.tensor(self.first)[:, None]
        last_L1 = torch.tensor(self.last)[:, None]
        return (keys_S >= first_L1) & (keys_S < last_L1)

    def prepare(self, device: torch.device) -> None:
        """Make what both faces read on a device.

        Before torch.compile looks: it would see no table in the first call and one in the second,
        and compile all over again.
        """
        for make in (table, transposed_table, attention_calls):
            self.once(make, device)

    def once(self, make: Callable, *arguments) -> Any:
        """make(self, *arguments), kept: a second generation makes no table and copies none."""
        key = (make, *arguments)
        if key not in self.made:
            self.made[key] = make(self, *arguments)
        return self.made[key]


def slice_ranges(ranges: KeyRanges, begin: int, end: int) -> KeyRanges:
    return KeyRanges(ranges.first[begin:end], ranges.last[begin:end])


def table(ranges: KeyRanges, device: torch.device) -> tuple[Tensor, Tensor]:
    """first_L and last_L as int32 on a device, as the kernels read them."""
    return tuple(torch.tensor(ends, dtype=torch.int32, device=device)
                 for ends in (ranges.first, ranges.last))


# -------------------------------------------------------------------------------------------------
# Attention: forward
#
# The obvious version writes the scores, the masked scores and the weights, each B H L S numbers,
# and reads them again: at B 64, H 16, L 680 in bf16 6 x 0.95 GB, where q, k, v and o together are
# 0.36 GB. And it computes all L S scores, of which the next-scale mask keeps 62 %.
#
# Here a program holds a tile of queries and walks over the tiles of keys in its range, and over
# no others. It keeps the softmax right as it goes (Milakov and Gimelshein, arXiv 1805.02867;
# FlashAttention-2, arXiv 2307.08691), in powers of two, because 2^x is one instruction:
#
#     highest, total, o = -inf, 0, 0           for each query: one number, one number, one row
#
#     for each tile:   scores  = q k^T scale / ln 2           so that exp(scale q.k) = 2^score
#                      new     = max(highest, scores)
#                      weights = 2^(scores - new)
#                      shrink  = 2^(highest - new)            for what was summed up so far
#                      total   = total shrink + sum of weights
#                      o       = o shrink + weights v
#                      highest = new
#
#     o / total                                which is softmax(scale q k^T) v
#     log2sum = highest + log2(total)          of the sum of all 2^score: the backward needs it


def obvious_attention(q_BHLD, k_BHSD, v_BHSD, mask_LS):
    scores_BHLS = (q_BHLD * q_BHLD.shape[3]**-0.5) @ k_BHSD.mT
    return scores_BHLS.masked_fill(~mask_LS, -torch.inf).softmax(dim=-1) @ v_BHSD


def block_attention(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, ranges: KeyRanges,
                    scale: float) -> Tensor:
    """softmax(scale * q k^T over the keys in range) v, as [B, H, L, D] (paper: Sec. 3.2).

    Floating point of one dtype, which autocast chooses where it is on; any strides. scale > 0. In
    Triton D is 16 to 128. Raises ValueError where the ranges do not fit L queries and S keys, and
    for what a face cannot take.
    """
    if torch.is_autocast_enabled(q_BHLD.device.type):
        dtype = product_dtype(q_BHLD)
        q_BHLD, k_BHSD, v_BHSD = (x.to(dtype) for x in (q_BHLD, k_BHSD, v_BHSD))
    face = block_attention_triton if use_triton(q_BHLD) else block_attention_torch
    return face(q_BHLD, k_BHSD, v_BHSD, ranges, scale)


def check_attention(q_BHLD, k_BHSD, v_BHSD, ranges, scale):
    check_tensors(dict(q="BHLD", k="BHSD", v="BHSD"), q_BHLD, k_BHSD, v_BHSD)
    L = q_BHLD.shape[2]
    S = k_BHSD.shape[2]
    if not q_BHLD.dtype == k_BHSD.dtype == v_BHSD.dtype:
        raise ValueError(f"q, k and v must have one dtype: they have {q_BHLD.dtype}, "
                         f"{k_BHSD.dtype}, {v_BHSD.dtype}")
    if len(ranges) != L or ranges.last[-1] > S:
        raise ValueError(f"ranges of {len(ranges)} queries and {ranges.last[-1]} keys do not fit "
                         f"{L} queries and {S} keys")
    if not scale > 0:
        raise ValueError(f"scale must be positive: it is {scale}")


# A tile of keys is whole if every query of the tile of queries sees all of it, and cut if a range
# ends or begins in it, or the array does. Only cut tiles need masks, and few are: of the tiles
# that L 9451 visits, 3 %. So the kernels have two loops, written as one:
#
#     for CUT in tl.static_range(2):
#         for n in range(cut if CUT else whole):
#
# static_range is unrolled before anything is compiled, with CUT a constant 0 and then a constant 1,
# and of `if CUT:` nothing is left in the first copy: no mask, no comparison, no table.


@triton.jit
def plan_tiles(first, last, tile, length, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Which partners the rows of a tile meet: (start, cut before, whole, cut in all).

    first, last: a table of `length` rows. From `start` on there are `cut before` tiles of TILE
    partners that only some rows see, `whole` ones that all rows see, and cut ones again up to the
    last partner of any row. Both ends only grow, so the first and the last row tell it all.
    """
    begin = tile * ROWS
    final = tl.minimum(length, begin + ROWS) - 1
    start = tl.load(first.start + begin)
    all_start = tl.load(first.start + final)
    all_end = tl.load(last.start + begin)
    end = tl.load(last.start + final)
    before = tl.cdiv(all_start - start, TILE)
    whole = tl.maximum(all_end - start - before * TILE, 0) // TILE
    left = end - start - (before + whole) * TILE
    after = tl.cdiv(tl.maximum(left, 0), TILE)
    return start, before, whole, before + after


@triton.jit
def tile_partners(n, start, before, whole, CUT: tl.constexpr, TILE: tl.constexpr):
    """The partners in the n-th cut tile, or in the n-th whole one."""
    if CUT:
        tile = tl.where(n < before, n, n + whole)   # cut tiles lie on both sides of the whole ones
    else:
        tile = before + n
    return start + tile * TILE + tl.arange(0, TILE)


@triton.jit
def seen_by(rows_T, length, first, last, partners_T):
    """Bool [T rows, T partners]: which partner lies in the range of which row of the table."""
    rows_T = tl.minimum(rows_T, length - 1)
    first_T1 = tl.load(first.start + rows_T)[:, None]
    last_T1 = tl.load(last.start + rows_T)[:, None]
    return (partners_T[None, :] >= first_T1) & (partners_T[None, :] < last_T1)


@triton.jit
def attention_forward(q_BHLD, k_BHSD, v_BHSD, first_L, last_L, o_BHLD, log2sum_BHL,
                      scale, H, L, S, D: tl.constexpr, TILE_L: tl.constexpr, TILE_S: tl.constexpr):
    """A tile of queries of one head a program: q, k, v and the table -> o, log2sum.

    q, o [B, H, L, D] and k, v [B, H, S, D] of one dtype; first, last [L] int32; log2sum [B, H, L]
    fp32. The scale comes divided by ln 2.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(L, TILE_L)
    tile = tiles - 1 - program % tiles   # the last queries see most: first within a head
    head = program // tiles
    queries_T = tile * TILE_L + tl.arange(0, TILE_L)
    queries = (head, H, queries_T, L)
    q_TD = load_rows(q_BHLD, queries, D)
    # Not -inf: if a query sees nothing of its first tile, -inf - (-inf) would be NaN.
    highest_T = tl.full([TILE_L], -3.0e38, tl.float32)
    total_T = tl.zeros([TILE_L], tl.float32)
    o_TD = tl.zeros(q_TD.shape, tl.float32)
    start, before, whole, cut = plan_tiles(first_L, last_L, tile, L, TILE_L, TILE_S)
    for CUT in tl.static_range(2):
        for n in range(cut if CUT else whole):
            keys_T = tile_partners(n, start, before, whole, CUT, TILE_S)
            keys = (head, H, keys_T, S)
            k_TD = load_rows(k_BHSD, keys, D, CUT)
            scores_TS = product(q_TD, k_TD.T)
            if CUT:
                seen_TS = seen_by(queries_T, L, first_L, last_L, keys_T)
                scores_TS = tl.where(seen_TS, scores_TS, -float("inf"))
            new_T = tl.maximum(highest_T, tl.max(scores_TS, 1) * scale)
            weights_TS = tl.exp2(scores_TS * scale - new_T[:, None])
            shrink_T = tl.exp2(highest_T - new_T)
            total_T = total_T * shrink_T + tl.sum(weights_TS, 1)
            v_TD = load_rows(v_BHSD, keys, D, CUT)
            o_TD = o_TD * shrink_T[:, None] + product(weights_TS.to(v_TD.dtype), v_TD)
            highest_T = new_T
    store_rows(o_BHLD, queries, o_TD / total_T[:, None], D)
    store_numbers(log2sum_BHL, queries, highest_T + tl.log2(total_T))


# -------------------------------------------------------------------------------------------------
# Attention: backward
#
# The weights are computed again, from log2sum. With d = dL/d of any name, and delta = sum of o do,
# one number per query:
#
#     weights = 2^(scores - log2sum)
#     dv = weights^T do
#     ds = weights (do v^T - delta)
#     dq = scale ds k
#     dk = scale ds^T q
#
# attention_backward_q walks over keys like the forward. attention_backward_kv holds a tile of keys
# and walks over the queries that see it, so it needs the table by keys.


def transposed_table(ranges: KeyRanges, device: torch.device) -> tuple[Tensor, Tensor]:
    """first_S, last_S: key j is seen by the queries first_S[j] <= i < last_S[j], maybe by none.

    They begin after the queries whose range ends at or before j, and end with the last one whose
    range has begun.
    """
    first_L, last_L = ranges.once(table, device)
    keys_S = torch.arange(ranges.last[-1], dtype=torch.int32, device=device)
    first_S = torch.searchsorted(last_L, keys_S, right=True, out_int32=True)
    last_S = torch.searchsorted(first_L, keys_S, right=True, out_int32=True)
    return first_S, last_S


@triton.jit
def attention_backward_q(q_BHLD, k_BHSD, v_BHSD, first_L, last_L, o_BHLD, do_BHLD, log2sum_BHL,
                         delta_BHL, dq_BHLD, scale, H, L, S,
                         D: tl.constexpr, TILE_L: tl.constexpr, TILE_S: tl.constexpr):
    """A tile of queries of one head a program: dq, and delta for attention_backward_kv.

    Arrays as in attention_forward; do and dq are like q, delta like log2sum. The scale comes
    divided by ln 2; dq is left without it.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(L, TILE_L)
    tile = tiles - 1 - program % tiles
    head = program // tiles
    queries_T = tile * TILE_L + tl.arange(0, TILE_L)
    queries = (head, H, queries_T, L)
    q_TD = load_rows(q_BHLD, queries, D)
    o_TD = load_rows(o_BHLD, queries, D)
    do_TD = load_rows(do_BHLD, queries, D)
    log2sum_T = load_numbers(log2sum_BHL, queries)
    delta_T = tl.sum(o_TD.to(tl.float32) * do_TD.to(tl.float32), 1)
    store_numbers(delta_BHL, queries, delta_T)
    dq_TD = tl.zeros(q_TD.shape, tl.float32)
    start, before, whole, cut = plan_tiles(first_L, last_L, tile, L, TILE_L, TILE_S)
    for CUT in tl.static_range(2):
        for n in range(cut if CUT else whole):
            keys_T = tile_partners(n, start, before, whole, CUT, TILE_S)
            keys = (head, H, keys_T, S)
            k_TD = load_rows(k_BHSD, keys, D, CUT)
            v_TD = load_rows(v_BHSD, keys, D, CUT)
            scores_TS = product(q_TD, k_TD.T) * scale
            weights_TS = tl.exp2(scores_TS - log2sum_T[:, None])
            if CUT:
                seen_TS = seen_by(queries_T, L, first_L, last_L, keys_T)
                weights_TS = tl.where(seen_TS, weights_TS, 0.0)
            dweights_TS = product(do_TD, v_TD.T)
            dscores_TS = weights_TS * (dweights_TS - delta_T[:, None])
            dq_TD += product(dscores_TS.to(k_TD.dtype), k_TD)
    dq_TD *= scale * 0.6931471805599453   # ln 2
    store_rows(dq_BHLD, queries, dq_TD, D)


@triton.jit
def attention_backward_kv(q_BHLD, k_BHSD, v_BHSD, first_S, last_S, do_BHLD, log2sum_BHL,
                          delta_BHL, dk_BHSD, dv_BHSD, scale, H, L, S,
                          D: tl.constexpr, TILE_L: tl.constexpr, TILE_S: tl.constexpr):
    """A tile of keys of one head a program: dk and dv, like k and v.

    Arrays as in attention_backward_q, but the table is the transposed one: first, last [S].
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(S, TILE_S)
    tile = program % tiles   # the first keys are seen by most: first within a head
    head = program // tiles
    keys_T = tile * TILE_S + tl.arange(0, TILE_S)
    keys = (head, H, keys_T, S)
    k_TD = load_rows(k_BHSD, keys, D)
    v_TD = load_rows(v_BHSD, keys, D)
    dk_TD = tl.zeros(k_TD.shape, tl.float32)
    dv_TD = tl.zeros(k_TD.shape, tl.float32)
    start, before, whole, cut = plan_tiles(first_S, last_S, tile, S, TILE_S, TILE_L)
    for CUT in tl.static_range(2):
        for n in range(cut if CUT else whole):
            queries_T = tile_partners(n, start, before, whole, CUT, TILE_L)
            queries = (head, H, queries_T, L)
            q_TD = load_rows(q_BHLD, queries, D, CUT)
            do_TD = load_rows(do_BHLD, queries, D, CUT)
            log2sum_T = load_numbers(log2sum_BHL, queries)
            delta_T = load_numbers(delta_BHL, queries)
            scores_ST = product(k_TD, q_TD.T) * scale
            weights_ST = tl.exp2(scores_ST - log2sum_T[None, :])
            if CUT:
                seen_ST = seen_by(keys_T, S, first_S, last_S, queries_T)
                weights_ST = tl.where(seen_ST, weights_ST, 0.0)
            dv_TD += product(weights_ST.to(do_TD.dtype), do_TD)
            dweights_ST = product(v_TD, do_TD.T)
            dscores_ST = weights_ST * (dweights_ST - delta_T[None, :])
            dk_TD += product(dscores_ST.to(q_TD.dtype), q_TD)
    dk_TD *= scale * 0.6931471805599453   # ln 2
    store_rows(dk_BHSD, keys, dk_TD, D)
    store_rows(dv_BHSD, keys, dv_TD, D)


# Queries and keys in a tile, warps, stages. The largest of those tried that spill next to no
# register on sm_80, sm_90 and sm_100 and fit in shared memory, 99 kB on the consumer cards that run
# the code of sm_80 and 227 kB on the other two (python kernels.py --registers prints it). fp32 is
# multiplied without tensor cores, which would round it to TF32, and wants small tiles.
ATTENTION_TILES = {
    "forward": [
        (128, 64, 8, 3),   # 16 bits, D up to 64
        (128, 64, 8, 3),   # 16 bits, D up to 128
        (64, 32, 8, 2),    # fp32, D up to 64
        (32, 64, 8, 2),    # fp32, D up to 128
    ],
    "backward_q": [   # the same four
        (128, 64, 8, 3),
        (64, 64, 4, 2),
        (64, 32, 8, 2),
        (32, 16, 4, 2),
    ],
    "backward_kv": [
        (64, 128, 8, 3),
        (32, 64, 8, 3),
        (32, 32, 8, 2),
        (16, 32, 8, 2),
    ],
}


def attention_tiles(name: str, q_BHLD: Tensor) -> dict[str, int]:
    """As in the table, but in the forward no more than twice as many rows as there are queries.

    The first scales of a generation have 1, 4 and 9: in tiles of 128 nearly all would be padding.
    """
    L, D = q_BHLD.shape[2:]
    in_fp32 = q_BHLD.dtype == torch.float32
    tiles = ATTENTION_TILES[name][2 * in_fp32 + (D > 64)]
    TILE_L, TILE_S, num_warps, num_stages = tiles
    if name == "forward":
        TILE_L = min(TILE_L, max(16, triton.next_power_of_2(L)))   # a product takes 16 or more
        num_warps = max(4, num_warps * TILE_L // tiles[0])
    return dict(TILE_L=TILE_L, TILE_S=TILE_S, num_warps=num_warps, num_stages=num_stages, D=D)


class BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHLD, k_BHSD, v_BHSD, ranges, scale):
        qkv = [rows_first(x) for x in (q_BHLD, k_BHSD, v_BHSD)]
        B, H, L, _ = q_BHLD.shape
        S = k_BHSD.shape[2]
        o_BHLD = torch.empty_like(qkv[0])
        log2sum_BHL = q_BHLD.new_empty(B, H, L, dtype=torch.float32)
        ctx.sizes = scale / math.log(2), H, L, S
        tiles = attention_tiles("forward", q_BHLD)
        launch(attention_forward, B * H * triton.cdiv(L, tiles["TILE_L"]),
               [*qkv, *ranges.once(table, q_BHLD.device)], [o_BHLD, log2sum_BHL],
               *ctx.sizes, **tiles)
        ctx.ranges = ranges
        ctx.save_for_backward(*qkv, o_BHLD, log2sum_BHL)
        return o_BHLD

    @staticmethod
    @once_differentiable
    def backward(ctx, do_BHLD):
        *qkv, o_BHLD, log2sum_BHL = ctx.saved_tensors
        by_query = ctx.ranges.once(table, do_BHLD.device)
        by_key = ctx.ranges.once(transposed_table, do_BHLD.device)
        do_BHLD = rows_first(do_BHLD)
        delta_BHL = torch.empty_like(log2sum_BHL)
        dq_BHLD, dk_BHSD, dv_BHSD = map(torch.empty_like, qkv)
        _, H, L, S = ctx.sizes
        heads = len(do_BHLD) * H
        tiles = attention_tiles("backward_q", do_BHLD)
        launch(attention_backward_q, heads * triton.cdiv(L, tiles["TILE_L"]),
               [*qkv, *by_query, o_BHLD, do_BHLD, log2sum_BHL], [delta_BHL, dq_BHLD],
               *ctx.sizes, **tiles)
        tiles = attention_tiles("backward_kv", do_BHLD)
        launch(attention_backward_kv, heads * triton.cdiv(S, tiles["TILE_S"]),
               [*qkv, *by_key, do_BHLD, log2sum_BHL, delta_BHL], [dk_BHSD, dv_BHSD],
               *ctx.sizes, **tiles)
        return dq_BHLD, dk_BHSD, dv_BHSD, None, None


def block_attention_triton(q_BHLD, k_BHSD, v_BHSD, ranges, scale):
    check_attention(q_BHLD, k_BHSD, v_BHSD, ranges, scale)
    D = q_BHLD.shape[3]
    if not 16 <= D <= 128:
        raise ValueError(f"the Triton kernel takes a head width of 16 to 128: it is {D}")
    if q_BHLD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the Triton kernel takes float32, float16 and bfloat16: "
                         f"q is {q_BHLD.dtype}")
    # Keys after those in sight may hold anything, as in a cache that is not yet full.
    seen = ranges.last[-1]
    return BlockAttention.apply(
        q_BHLD, k_BHSD[:, :, :seen], v_BHSD[:, :, :seen], ranges, float(scale))


class Call(NamedTuple):
    """Queries that the PyTorch twin computes at once: they see the same keys, or have a mask."""
    queries: slice
    keys: slice
    mask_LS: Tensor | None


def attention_calls(ranges: KeyRanges, device: torch.device) -> list[Call]:
    """One call per run of queries with the same range, short runs merged.

    A call of a few queries takes longer to start than to compute: short runs share one masked
    call until it has 64 queries. Measured on two CPU cores at L 130, where one call per scale lost
    to a dense mask.
    """
    calls: list[Call] = []
    end = 0
    for (first, last), run in groupby(zip(ranges.first, ranges.last)):
        begin = end
        end += len(list(run))
        mask_LS = None
        if calls and begin - calls[-1].queries.start < 64:
            short = calls.pop()
            begin, first = short.queries.start, short.keys.start
            mask_LS = ranges.rows(begin, end).dense()[:, first:].to(device)
        calls.append(Call(slice(begin, end), slice(first, last), mask_LS))
    return calls


def plain_attention(q_BHLD, k_BHSD, v_BHSD, attn_mask, scale):
    """scaled_dot_product_attention by its formula; all products are kept for the backward pass."""
    q_NLD, k_NSD, v_NSD = (x.flatten(0, 1) for x in (q_BHLD, k_BHSD, v_BHSD))   # N: B and H
    hidden_LS = k_NSD.new_zeros(q_NLD.shape[1], k_NSD.shape[1])
    if attn_mask is not None:
        hidden_LS = hidden_LS.masked_fill(~attn_mask, float("-inf"))
    scores_NLS = torch.baddbmm(hidden_LS, q_NLD, k_NSD.mT, alpha=scale)
    o_NLD = scores_NLS.softmax(dim=-1) @ v_NSD
    return o_NLD.unflatten(0, q_BHLD.shape[:2])


def block_attention_torch(q_BHLD, k_BHSD, v_BHSD, ranges, scale):
    """An unmasked call per scale, nearly, so that next to nothing is computed in vain.

    Training on a CPU takes the plain products, in fp32: up to L of a few hundred they are faster
    there than PyTorch's fused attention (forward and backward, two cores, B 32, H 4, L 130, D 16:
    4.3 against 5.7 ms), and twice as fast in fp32 as in bf16.
    """
    check_attention(q_BHLD, k_BHSD, v_BHSD, ranges, scale)
    dtype = q_BHLD.dtype
    attention = F.scaled_dot_product_attention
    if q_BHLD.device.type == "cpu" and q_BHLD.requires_grad:
        attention = plain_attention
        q_BHLD, k_BHSD, v_BHSD = q_BHLD.float(), k_BHSD.float(), v_BHSD.float()
    parts = []
    for queries, keys, mask_LS in ranges.once(attention_calls, q_BHLD.device):
        parts.append(attention(
            q_BHLD[:, :, queries], k_BHSD[:, :, keys], v_BHSD[:, :, keys],
            attn_mask=mask_LS, scale=scale))
    o_BHLD = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    return o_BHLD.to(dtype)


# -------------------------------------------------------------------------------------------------
# Sampling
#
# The obvious version sorts every row and moves it some twenty times: sorted logits and their
# 64-bit order, softmax, cumulative sum, two masks, the way back through the order. The kernel
# reads a row once, keeps it in registers, and sorts nothing:
#
#     keep a token if the tokens ranked before it hold less than `target` of weight
#
# is top-k with every weight 1 and target k, and top-p with the probabilities and p. All it takes
# is the threshold: the largest number such that the tokens from there up hold at least the target.
# It is found bit by bit from the top, each bit in one sum over the row, 32 in all, because the
# bits of a float, read as an unsigned integer, can be put in the order of the floats: of positive
# numbers flip the sign bit, so that they come after the negative ones; of negative numbers flip
# all bits, since theirs grow as the number falls.
#
# Probabilities are counted in whole units of 2^-40 of the largest: integer sums are the same in
# every order, so that both faces draw the same token.


def obvious_sampling(logits_BlV, noise_BlV):
    """Top-k 900, top-p 0.96: the row is sorted, and moved some twenty times."""
    ranked_BlV, order_BlV = logits_BlV.sort(dim=-1, descending=True)
    shares_BlV = ranked_BlV.softmax(dim=-1)
    dropped_BlV = shares_BlV.cumsum(dim=-1) - shares_BlV >= 0.96
    dropped_BlV[..., 900:] = True
    ranked_BlV = ranked_BlV.masked_fill(dropped_BlV, -torch.inf)
    logits_BlV = torch.empty_like(logits_BlV).scatter(-1, order_BlV, ranked_BlV)
    return (logits_BlV - noise_BlV.log()).argmax(dim=-1)


def sample_tokens(cond_BlV: Tensor, uncond_BlV: Tensor | None, guidance: float, top_k: int,
                  top_p: float, noise_BlV: Tensor) -> Tensor:
    """Draw one token per place: int64 [B, l].

    logits = (1 + guidance) * cond - guidance * uncond    (classifier-free guidance; None: cond)
    top_k: keep the k most likely tokens; k <= 0 or >= V keeps all. Of equal logits the lower index
        ranks first.
    top_p: of those, keep a token if the tokens ranked before it hold less than p of the
        probability; 1 keeps all.
    noise_BlV: Exponential(1) draws. argmax(logits - ln noise) is a draw from softmax(logits)
        (Gumbel-max).
    """
    face = sample_tokens_triton if use_triton(cond_BlV) else sample_tokens_torch
    return face(cond_BlV, uncond_BlV, guidance, top_k, top_p, noise_BlV)


def check_sampling(cond_BlV, uncond_BlV, noise_BlV):
    axes = dict(cond="BlV", uncond="BlV", noise="BlV")
    check_tensors(axes, cond_BlV, uncond_BlV, noise_BlV)


@triton.jit
def ranked_within(keys_V, weights_V, target):
    """Which tokens have less than `target` of weight before them: higher keys, or equal, left."""
    threshold = tl.zeros([], tl.uint32)
    for bit in range(32):
        higher = threshold | (tl.full([], 0x80000000, tl.uint32) >> bit)
        held = tl.sum(tl.where(keys_V >= higher, weights_V, 0))
        threshold = tl.where(held >= target, higher, threshold)
    above = tl.sum(tl.where(keys_V > threshold, weights_V, 0))
    level_V = tl.where(keys_V == threshold, weights_V, 0)
    before_V = above + tl.cumsum(level_V, 0) - level_V
    return (keys_V > threshold) | ((keys_V == threshold) & (before_V < target))


@triton.jit
def sample_tokens_kernel(cond_BlV, uncond_BlV, noise_BlV, token_Bl, guidance, top_p, top_k, l, V,
                         GUIDED: tl.constexpr, TILE_V: tl.constexpr):
    """One place a program: cond, uncond, noise [B, l, V] -> token [B, l], int64."""
    program = tl.program_id(0)
    tokens_V = tl.arange(0, TILE_V)
    row = (program // l, program % l, tokens_V, V)
    kept_V = tokens_V < V
    logits_V = load_row(cond_BlV, row)
    if GUIDED:
        uncond_V = load_row(uncond_BlV, row)
        logits_V = logits_V + guidance * (logits_V - uncond_V)
    logits_V = tl.where(kept_V, logits_V, -float("inf"))
    bits_V = tl.where(logits_V == 0, 0.0, logits_V).to(tl.uint32, bitcast=True)   # -0 is 0
    keys_V = bits_V ^ tl.where(logits_V < 0, 0xFFFFFFFF, 0x80000000)
    if top_k < V:
        kept_V &= ranked_within(keys_V, kept_V.to(tl.int32), top_k)
    if top_p < 1:
        share_V = tl.exp(logits_V - tl.max(logits_V, 0))
        units_V = tl.where(kept_V, share_V * (1 << 40), 0.0).to(tl.int64)
        target = (tl.sum(units_V).to(tl.float32) * top_p).to(tl.int64)
        target = tl.maximum(target, 1)   # the most likely token stays, whatever p
        kept_V &= ranked_within(keys_V, units_V, target)
    noise_V = load_row(noise_BlV, row)
    score_V = tl.where(kept_V, logits_V - tl.log(noise_V), -float("inf"))
    token = tl.argmax(score_V, 0)
    tl.store(token_Bl.start + program, token.to(tl.int64))


def sample_tokens_triton(cond_BlV, uncond_BlV, guidance, top_k, top_p, noise_BlV):
    check_sampling(cond_BlV, uncond_BlV, noise_BlV)
    B, l, V = cond_BlV.shape
    if V > 65536:
        raise ValueError(f"the Triton kernel holds a row in registers, up to 65536: V is {V}")
    token_Bl = torch.empty(B, l, dtype=torch.int64, device=cond_BlV.device)
    GUIDED = uncond_BlV is not None
    TILE_V = triton.next_power_of_2(V)
    launch(sample_tokens_kernel, B * l,
           [cond_BlV, uncond_BlV if GUIDED else cond_BlV, noise_BlV], [token_Bl],
           float(guidance), float(top_p), top_k if top_k > 0 else V, l, V,
           GUIDED=GUIDED, TILE_V=TILE_V,
           num_warps=min(32, max(1, TILE_V // 512)),   # 16 numbers a thread, if V is 257 to 16,384
           enable_fp_fusion=False)   # a fused multiply-add rounds once, the twin twice: ties break
    return token_Bl


def sample_tokens_torch(cond_BlV, uncond_BlV, guidance, top_k, top_p, noise_BlV):
    """Sorts the k highest logits, no order: how many of them stay, and so the threshold."""
    check_sampling(cond_BlV, uncond_BlV, noise_BlV)
    logits_BlV = cond_BlV.float()
    V = cond_BlV.shape[-1]
    if uncond_BlV is not None:
        logits_BlV = logits_BlV + guidance * (logits_BlV - uncond_BlV.float())
    score_BlV = logits_BlV - noise_BlV.float().log()
    k = top_k if 0 < top_k < V else V
    if k < V or top_p < 1:
        ranked_Blk = logits_BlV.topk(k).values
        count_Bl1 = torch.full_like(ranked_Blk[..., :1], k, dtype=torch.int64)
        if top_p < 1:
            shares_Blk = (ranked_Blk - ranked_Blk[..., :1]).exp()
            units_Blk = (shares_Blk * 2**40).long()
            total_Bl1 = units_Blk.sum(dim=-1, keepdim=True)
            target_Bl1 = (total_Bl1.float() * top_p).long().clamp(min=1)
            before_Blk = units_Blk.cumsum(dim=-1) - units_Blk
            count_Bl1 = (before_Blk < target_Bl1).sum(dim=-1, keepdim=True)
        threshold_Bl1 = ranked_Blk.gather(-1, count_Bl1 - 1)
        above_BlV = logits_BlV > threshold_Bl1
        level_BlV = logits_BlV == threshold_Bl1   # of these the first few, as many as are left
        left_Bl1 = count_Bl1 - above_BlV.sum(dim=-1, keepdim=True)
        kept_BlV = above_BlV | (level_BlV & (level_BlV.cumsum(dim=-1) <= left_Bl1))
        score_BlV.masked_fill_(~kept_BlV, -torch.inf)
    return score_BlV.argmax(dim=-1)


# -------------------------------------------------------------------------------------------------
# Floating point operations: what a model needs, and what a GPU can do


PEAK_TFLOPS = {   # of dense bf16, from the data sheets; the first name that the card's contains
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165,
}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of one GPU in bf16, if the device is a card that we know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def forward_flops(model: torch.nn.Module, *inputs: Tensor) -> int:
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


if __name__ == "__main__":
    from tests.benchmark import main
    main()
