"""The operations of VAR worth a hand-written kernel, each in Triton for a GPU and in PyTorch.

    adaln              a branch added, layer norm, scale and shift        (var.py, every layer)
    nearest_code       index of the closest codebook row                  (tokenizer.py, each scale)
    split_heads        queries, keys and values of one matrix product     (var.py, every layer)
    block_attention    attention in which a query sees one range of keys  (var.py, every layer)
    sample_tokens      guidance, top-k, top-p and the draw                (var.py, generation)

They come in this order, the easiest first, each in the same steps: what PyTorch's version costs,
the formula, the Triton kernel, what launches it, the PyTorch version, and the function itself, with
its shapes: read that first. `adaln`, say, picks one of two backends, which agree with each other
and with NumPy in float64 (tests/reference.py):

    adaln_triton    launches the Triton kernel: on NVIDIA's GPUs from sm_80 on (RTX 30, A100)
    adaln_torch     the same in PyTorch: on a CPU, a Mac, any other GPU

Five words that Triton needs:

    program      A kernel runs many times at once, in a grid of up to three axes. Each run, a
                 program, does one share of the work and knows which: tl.program_id(axis).
    tile         The block of an array that a program computes with at a time, in registers. Its
                 sides are powers of two; where it sticks out of the array, loads are masked.
    constexpr    An argument known when the kernel is compiled, as the sides of tiles have to be.
                 There is one compiled kernel for every value it is called with.
    warp         32 threads of the GPU, which execute each instruction together. A program is
                 num_warps of them, and the numbers of a tile are dealt out to their threads.
    stage        With num_stages = 3, while a loop computes one round it already fetches what the
                 next two need into shared memory, which the threads of a program have in common.

Axes: B batch, H heads, L queries, S keys, D head width, W model width, X 3 W, V vocabulary,
C channels of a code, N vectors, l tokens of a scale, P programs. Inside the kernels each letter is
a tile of its axis, and T one of rows: of queries in q_TD, of keys in k_TD. Where the two meet, T is
queries and S keys: scores_TS is [queries, keys], scores_ST [keys, queries].

Without a GPU the kernels run in Triton's interpreter, slowly, and print() and pdb work in them.
With TRITON_INTERPRET=1 in the environment of `python`:

    >>> import torch, kernels
    >>> kernels.BACKEND = "triton"
    >>> x, y = kernels.adaln(*torch.randn(2, 2, 5, 24), *torch.zeros(3, 2, 24))
    >>> y.shape
    torch.Size([2, 5, 24])

This counts, draws, compiles and measures what is said here of bytes, tiles, registers and times:

    python -m tests.benchmark [--generate | --registers | --tiles FILE]
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    version = triton.__version__.split(".")
    # 3.5 does not compile attention's backward pass.
    HAS_TRITON = (int(version[0]), int(version[1])) >= (3, 6)
except ImportError:   # as on a Mac: the kernels stay plain functions that nobody calls
    from types import SimpleNamespace
    triton = SimpleNamespace(jit=lambda function: function, __version__="not installed")
    HAS_TRITON = False

BACKEND = None   # "triton" or "torch" for the whole program; None: by where the tensors live


def use_triton(tensor: Tensor) -> bool:
    """Return whether Triton computes: on NVIDIA's GPUs from sm_80 on. On older ones PyTorch has
    tensor cores and Triton has none; for AMD's nobody tuned the kernels."""
    if BACKEND is not None:
        assert HAS_TRITON or BACKEND == "torch", "BACKEND needs Triton 3.6 or later"
        return BACKEND == "triton"
    if not HAS_TRITON or not tensor.is_cuda or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_properties(tensor.device).major >= 8   # PyTorch caches them


def as_arrays(tensors: Sequence[Tensor]) -> list[Tensor | tuple]:
    """Return what kernels get of tensors: a pointer to the first number, and the strides where
    there is more than one axis."""
    return [x if x.dim() == 1 else (x, x.stride()) for x in tensors]


def next_power_of_2(n: int) -> int:
    """triton.next_power_of_2 is for kernels: outside of them a call takes a third of a launch."""
    return 1 << (n - 1).bit_length()


# -------------------------------------------------------------------------------------------------
# Adaptive layer norm
#
# A layer adds its branch h to the residual stream x, each channel times a gate, and what the next
# branch reads is the norm of that, scaled and shifted. PyTorch goes to memory after every step.
# With x in fp32 and h and y in bf16, as under autocast, that is 40 bytes per number, where
# reading x and h and writing x and y is 12.
#
#     x' = x + gate h
#     n  = (x' - mean) / sqrt(variance + 1e-6)                          mean and variance over W
#     y  = n (1 + scale) + shift
#
# Backward, where dz is dL/dz for any z; dx' comes from whatever else reads x':
#
#     g  = dy (1 + scale)
#     dx = dx' + (g - mean(g) - n mean(g n)) / sqrt(variance + 1e-6)
#     dh = gate dx
#     dgate  = sum of dx h over the tokens of an image
#     dscale = sum of dy n over the tokens of an image
#     dshift = sum of dy over the tokens of an image


@triton.jit
def load_token(x_BLW, token, columns_W, W):
    """Return x[image, token] in fp32, of the program's image; zeros in the columns from W on."""
    pointer, strides = x_BLW
    image = tl.program_id(1).to(tl.int64)   # in 64 bits: there may be over 2^31 numbers
    begin = image * strides[0] + token * strides[1]
    pointers_W = pointer + begin + columns_W * strides[2]
    return tl.load(pointers_W, mask=columns_W < W, other=0.0).to(tl.float32)


@triton.jit
def store_token(x_BLW, token, columns_W, W, x_W):
    """x[image, token] = x_W, in the dtype of x."""
    pointer, strides = x_BLW
    image = tl.program_id(1).to(tl.int64)
    begin = image * strides[0] + token * strides[1]
    pointers_W = pointer + begin + columns_W * strides[2]
    tl.store(pointers_W, x_W.to(pointer.dtype.element_ty), mask=columns_W < W)


@triton.jit
def normalise(x_W, columns_W, W):
    """Return n and 1 / sqrt(variance + eps) of a token, in two passes: then nothing cancels."""
    centred_W = tl.where(columns_W < W, x_W - tl.sum(x_W) / W, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred_W * centred_W) / W + 1e-6)
    return centred_W * inverse, inverse


@triton.jit
def adaln_forward(x_BLW, h_BLW, gate_B1W, scale_B1W, shift_B1W, sum_BLW, y_BLW, W,
                  TILE_W: tl.constexpr):
    """One token a program: x, h [B, L, W], gate, scale, shift [B, 1, W] -> sum = x + gate h, y."""
    token = tl.program_id(0)
    columns_W = tl.arange(0, TILE_W)   # the side of a tile, which may be more than W
    x_W = load_token(x_BLW, token, columns_W, W)
    h_W = load_token(h_BLW, token, columns_W, W)
    gate_W = load_token(gate_B1W, 0, columns_W, W)
    sum_W = (x_W + gate_W * h_W).to(sum_BLW[0].dtype.element_ty)
    store_token(sum_BLW, token, columns_W, W, sum_W)
    normed_W, _ = normalise(sum_W.to(tl.float32), columns_W, W)   # rounded, as backward reads it
    scale_W = load_token(scale_B1W, 0, columns_W, W)
    shift_W = load_token(shift_B1W, 0, columns_W, W)
    store_token(y_BLW, token, columns_W, W, normed_W * (1 + scale_W) + shift_W)


@triton.jit
def adaln_backward(sum_BLW, h_BLW, gate_B1W, scale_B1W, dsum_BLW, dy_BLW, dx_BLW, dh_BLW,
                   dgate_BPW, dscale_BPW, dshift_BPW, L, W,
                   TOKENS: tl.constexpr, TILE_W: tl.constexpr):
    """A chunk of TOKENS tokens of one image a program: dx, dh, and the chunk's three sums.

    These are [B, P, W] in fp32, P the chunks, and are added up afterwards, always in one order.
    """
    chunk = tl.program_id(0)
    columns_W = tl.arange(0, TILE_W)
    gate_W = load_token(gate_B1W, 0, columns_W, W)
    scale_W = load_token(scale_B1W, 0, columns_W, W)
    dgate_W = tl.zeros([TILE_W], tl.float32)
    dscale_W = tl.zeros([TILE_W], tl.float32)
    dshift_W = tl.zeros([TILE_W], tl.float32)
    end = tl.minimum(L, (chunk + 1) * TOKENS)
    for token in range(chunk * TOKENS, end):
        sum_W = load_token(sum_BLW, token, columns_W, W)
        normed_W, inverse = normalise(sum_W, columns_W, W)
        dy_W = load_token(dy_BLW, token, columns_W, W)
        dscale_W += dy_W * normed_W
        dshift_W += dy_W
        g_W = dy_W * (1 + scale_W)
        mean_gn = tl.sum(g_W * normed_W) / W
        dx_W = (g_W - tl.sum(g_W) / W - normed_W * mean_gn) * inverse
        dx_W += load_token(dsum_BLW, token, columns_W, W)
        store_token(dx_BLW, token, columns_W, W, dx_W)
        dgate_W += dx_W * load_token(h_BLW, token, columns_W, W)
        store_token(dh_BLW, token, columns_W, W, dx_W * gate_W)
    store_token(dgate_BPW, chunk, columns_W, W, dgate_W)
    store_token(dscale_BPW, chunk, columns_W, W, dscale_W)
    store_token(dshift_BPW, chunk, columns_W, W, dshift_W)


def adaln_tiles(W: int) -> dict[str, int]:
    """Return tiles that hold a token in registers; for W from 65 to 2048 that is 4 numbers a
    thread, which in fp32 one load moves."""
    TILE_W = next_power_of_2(W)
    warps = max(1, TILE_W // 128)
    return dict(TILE_W=TILE_W, num_warps=min(16, warps))


class AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BLW, h_BLW, gate_B1W, scale_B1W, shift_B1W, dtype):
        B, L, W = x_BLW.shape
        sum_BLW = x_BLW.new_empty(B, L, W)
        y_BLW = x_BLW.new_empty(B, L, W, dtype=dtype)
        launch(adaln_forward, (L, B),
               [x_BLW, h_BLW, gate_B1W, scale_B1W, shift_B1W],
               [sum_BLW, y_BLW],
               W, **adaln_tiles(W))
        ctx.save_for_backward(sum_BLW, h_BLW, gate_B1W, scale_B1W)
        return sum_BLW, y_BLW

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum_BLW, dy_BLW):
        sum_BLW, h_BLW, gate_B1W, scale_B1W = ctx.saved_tensors
        B, L, W = sum_BLW.shape
        TOKENS = 32   # so the sums are a small share of what is read and written
        chunks = math.ceil(L / TOKENS)
        dx_BLW = torch.empty_like(sum_BLW)
        dh_BLW = torch.empty_like(h_BLW)
        sums_BP3W = sum_BLW.new_empty(B, chunks, 3, W, dtype=torch.float32)
        launch(adaln_backward, (chunks, B),
               [sum_BLW, h_BLW, gate_B1W, scale_B1W, dsum_BLW, dy_BLW],
               [dx_BLW, dh_BLW, *sums_BP3W.unbind(2)],
               L, W, TOKENS=TOKENS, **adaln_tiles(W))
        # dgate, dscale and dshift; autograd casts them:
        sums_B13W = sums_BP3W.sum(dim=1, keepdim=True)
        return dx_BLW, dh_BLW, *sums_B13W.unbind(2), None


def adaln_triton(x_BLW, h_BLW, gate_BW, scale_BW, shift_BW, dtype):
    modulation = [m_BW[:, None] for m_BW in (gate_BW, scale_BW, shift_BW)]
    return AdaLN.apply(x_BLW, h_BLW, *modulation, dtype)


def adaln_torch(x_BLW, h_BLW, gate_BW, scale_BW, shift_BW, dtype):
    modulation = (gate_BW, scale_BW, shift_BW)
    gate_B1W, scale_B1W, shift_B1W = (m_BW.float()[:, None] for m_BW in modulation)
    sum_BLW = torch.addcmul(x_BLW.float(), gate_B1W, h_BLW.float())
    sum_BLW = sum_BLW.to(x_BLW.dtype)
    normed_BLW = F.layer_norm(sum_BLW.float(), x_BLW.shape[-1:], eps=1e-6)
    y_BLW = torch.addcmul(shift_B1W, normed_BLW, 1 + scale_B1W)
    return sum_BLW, y_BLW.to(dtype)


def adaln(x_BLW: Tensor, h_BLW: Tensor, gate_BW: Tensor, scale_BW: Tensor,
          shift_BW: Tensor) -> tuple[Tensor, Tensor]:
    """Return x + gate * h, and layer_norm of that * (1 + scale) + shift, as in DiT.

    x, h [B, L, W]; gate, scale, shift [B, W]; of any dtypes. The norm has eps 1e-6 and no weights,
    and is computed in fp32. The first result has the dtype of x, the second that of autocast where
    it is on, for the matrix product that comes next.
    """
    B, L, W = x_BLW.shape
    assert h_BLW.shape == (B, L, W)
    assert gate_BW.shape == scale_BW.shape == shift_BW.shape == (B, W)
    backend = adaln_triton if use_triton(x_BLW) else adaln_torch
    return backend(x_BLW, h_BLW, gate_BW, scale_BW, shift_BW, product_dtype(x_BLW))


def product_dtype(x: Tensor) -> torch.dtype:
    """Return what a matrix product would take x in."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


# -------------------------------------------------------------------------------------------------
# Nearest code
#
# PyTorch's version writes and reads the N V distances: for all scales of 64 images, N 43,520 and
# V 4096, in fp32 2 x 0.71 GB, where vectors and codes are 6.1 MB.
#
#     |x - e|^2 = |x|^2 - 2 x.e + |e|^2,  and |x|^2 is the same for every code:
#
#     nearest = argmin_v |e_v|^2 - 2 x.e_v


@triton.jit
def load_tile(x_NC, rows_T, N, columns_T, C, CUT: tl.constexpr = True):
    """Return x[rows, columns] as [T, T], with zeros outside. CUT: rows, too, may lie outside."""
    pointer, strides = x_NC
    rows_T1 = rows_T[:, None]
    columns_1T = columns_T[None, :]
    offsets_TT = rows_T1 * strides[0] + columns_1T * strides[1]
    inside_TT = columns_1T < C
    if CUT:
        inside_TT &= rows_T1 < N
    return tl.load(pointer + offsets_TT, mask=inside_TT, other=0.0)


@triton.jit
def product(a_MK, b_KN):
    """Return a b, summed in fp32. "ieee": the usual TF32 has 10 bits and would change codes."""
    return tl.dot(a_MK, b_KN, input_precision="ieee")


@triton.jit
def nearest_code_kernel(x_NC, e_VC, squares_V, index_N, N, V, C: tl.constexpr,
                        TILE_N: tl.constexpr, TILE_V: tl.constexpr, TILE_C: tl.constexpr):
    """A tile of vectors a program, against one tile of codes after the other.

    x [N, C], e [V, C] and squares [V] in fp32 -> index [N], int64.
    """
    first = tl.program_id(0).to(tl.int64) * TILE_N
    rows_T = first + tl.arange(0, TILE_N)
    # For every vector and column of the tiles of codes: the least so far, and its tile's base.
    best_TV = tl.full([TILE_N, TILE_V], float("inf"), tl.float32)
    base_TV = tl.zeros([TILE_N, TILE_V], tl.int32)
    for base in range(0, V, TILE_V):
        codes_V = base + tl.arange(0, TILE_V)
        dots_TV = tl.zeros([TILE_N, TILE_V], tl.float32)
        for channel in range(0, C, TILE_C):
            channels_C = channel + tl.arange(0, TILE_C)
            x_TC = load_tile(x_NC, rows_T, N, channels_C, C)
            codes_VC = load_tile(e_VC, codes_V, V, channels_C, C)
            dots_TV += product(x_TC, codes_VC.T)
        own_V = tl.load(squares_V + codes_V, mask=codes_V < V, other=float("inf"))
        distance_TV = own_V[None, :] - 2 * dots_TV
        closer_TV = distance_TV < best_TV   # not <=: of equal distances the lower index stays
        best_TV = tl.where(closer_TV, distance_TV, best_TV)
        base_TV = tl.where(closer_TV, base, base_TV)
    index_TV = base_TV + tl.arange(0, TILE_V)[None, :]
    least_T1 = tl.min(best_TV, 1, keep_dims=True)
    nearest_TV = tl.where(best_TV == least_T1, index_TV, V)
    index_T = tl.min(nearest_TV, 1)
    tl.store(index_N + rows_T, index_T.to(tl.int64), mask=rows_T < N)


def nearest_code_triton(x_NC, codebook_VC):
    x_NC = x_NC.detach().float()
    e_VC = codebook_VC.detach().float()
    squares_V = e_VC.square().sum(dim=1)
    N, C = x_NC.shape
    index_N = torch.empty(N, dtype=torch.int64, device=x_NC.device)
    tiles = dict(TILE_N=64, TILE_V=64, TILE_C=16 if C <= 16 else 32)
    launch(nearest_code_kernel, (math.ceil(N / 64),),
           [x_NC, e_VC, squares_V], [index_N],
           N, len(e_VC), C=C, **tiles, num_warps=4, num_stages=3)
    return index_N


def nearest_code_torch(x_NC, codebook_VC):
    with torch.no_grad(), torch.autocast(x_NC.device.type, enabled=False):
        e_VC = codebook_VC.float()
        squares_V = e_VC.square().sum(dim=1)
        distance_NV = torch.addmm(squares_V, x_NC.float(), e_VC.T, alpha=-2)
        return distance_NV.argmin(dim=1)


def nearest_code(x_NC: Tensor, codebook_VC: Tensor) -> Tensor:
    """Return argmin_v |x_n - e_v|^2, int64 [N], in fp32; of equals the lowest v (paper: eq. 3)."""
    assert x_NC.shape[1] == codebook_VC.shape[1]
    backend = nearest_code_triton if use_triton(x_NC) else nearest_code_torch
    return backend(x_NC, codebook_VC)


# -------------------------------------------------------------------------------------------------
# Heads
#
# One matrix product makes queries, keys and values. Then they are given their biases; queries and
# keys are normalised, which bounds the scores (and stabilises training, so the paper); each head
# learns a factor for its queries; in generation keys and values go where later scales find them.
# In PyTorch a dozen operations move 31 bytes for each number of a product in bf16, where reading
# and writing it is 4.
#
#     q = a n(product_q + bias_q),     n(x) = x / |x|,     a = min(e^log_scale, 100)
#     k = n(product_k)
#     v = product_v + bias_v
#
# Backward, from |x| and from q and k, which attention keeps anyway; x is what n is taken of:
#
#     dx = a (dq - n (n.dq)) / |x|
#     dlog_scale = sum of q.dq, over all queries of a head; 0 where e^log_scale is above 100
#
# For keys a = 1.

LARGEST_LOG_SCALE = math.log(100)


@triton.jit
def aligned(stride, D: tl.constexpr):
    """Return the stride so that the compiler sees that `rows_first` made it a multiple of 8 if D is
    one, and loads 16 bytes at once. (From tl.multiple_of it did not, for D 72 on sm_90.)"""
    return stride // 8 * 8 if D % 8 == 0 else stride


@triton.jit
def matrix_of(x_BHLD, D: tl.constexpr):
    """Return x of the program's image and head as a matrix [L, D], and the columns of its tiles, a
    power of two: D 72 is computed as 128, with 1.8 times the products."""
    pointer, strides = x_BHLD
    image = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    begin = image * aligned(strides[0], D) + head * aligned(strides[1], D)
    columns_D = tl.arange(0, triton.next_power_of_2(D))
    return (pointer + begin, (aligned(strides[2], D), 1)), columns_D


@triton.jit
def load_head(x_BHLD, rows_T, L, D: tl.constexpr, CUT: tl.constexpr = True):
    """Return the tile x[image, head, rows], [T, D]."""
    x_LD, columns_D = matrix_of(x_BHLD, D)
    return load_tile(x_LD, rows_T, L, columns_D, D, CUT)


@triton.jit
def store_head(x_BHLD, rows_T, L, D: tl.constexpr, x_TD):
    """x[image, head, rows] = x_TD, in the dtype of x."""
    x_LD, columns_D = matrix_of(x_BHLD, D)
    pointer, strides = x_LD
    rows_T1 = rows_T[:, None]
    columns_1D = columns_D[None, :]
    offsets_TD = pointer + rows_T1 * strides[0] + columns_1D
    inside_TD = (rows_T1 < L) & (columns_1D < D)
    tl.store(offsets_TD, x_TD.to(pointer.dtype.element_ty), mask=inside_TD)


@triton.jit
def learned_factor(log_scale_H, largest):
    head = tl.program_id(1)
    log_scale = tl.load(log_scale_H + head).to(tl.float32)
    return tl.exp(tl.minimum(log_scale, largest))


@triton.jit
def unit_rows(x_TD):
    """Return x / |x| of each row, and 1 / |x|."""
    length_T1 = tl.sqrt(tl.sum(x_TD * x_TD, 1, keep_dims=True))
    inverse_T1 = 1 / tl.maximum(length_T1, 1e-12)
    return x_TD * inverse_T1, inverse_T1


@triton.jit
def unit_backward(n_TD, dn_TD, inverse_T1):
    """Return dL/dx from dL/dn: what goes along n is lost, since n has length 1 whatever x is."""
    return (dn_TD - n_TD * tl.sum(n_TD * dn_TD, 1, keep_dims=True)) * inverse_T1


@triton.jit
def split_heads_forward(xq_BHLD, xk_BHLD, xv_BHLD, q_bias_BH1D, v_bias_BH1D, log_scale_H,
                        q_BHLD, k_BHLD, v_BHLD, q_inverse_BHL1, k_inverse_BHL1, largest, L,
                        NORMALISED: tl.constexpr, D: tl.constexpr, TILE_L: tl.constexpr):
    """A tile of tokens of one head a program: three views of the product -> q, k, v, 1 / |x|.

    All [B, H, L, D], log_scale [H], inverses [B, H, L, 1] in fp32.
    """
    rows_T = tl.program_id(0) * TILE_L + tl.arange(0, TILE_L)
    row_1 = tl.arange(0, 1)   # the one row of a bias
    q_bias_1D = load_head(q_bias_BH1D, row_1, 1, D).to(tl.float32)
    v_bias_1D = load_head(v_bias_BH1D, row_1, 1, D).to(tl.float32)
    q_TD = load_head(xq_BHLD, rows_T, L, D) + q_bias_1D
    k_TD = load_head(xk_BHLD, rows_T, L, D).to(tl.float32)
    v_TD = load_head(xv_BHLD, rows_T, L, D) + v_bias_1D
    if NORMALISED:
        q_TD, q_inverse_T1 = unit_rows(q_TD)
        k_TD, k_inverse_T1 = unit_rows(k_TD)
        q_TD *= learned_factor(log_scale_H, largest)
        store_head(q_inverse_BHL1, rows_T, L, 1, q_inverse_T1)
        store_head(k_inverse_BHL1, rows_T, L, 1, k_inverse_T1)
    store_head(q_BHLD, rows_T, L, D, q_TD)
    store_head(k_BHLD, rows_T, L, D, k_TD)
    store_head(v_BHLD, rows_T, L, D, v_TD)


@triton.jit
def split_heads_backward(q_BHLD, k_BHLD, q_inverse_BHL1, k_inverse_BHL1, log_scale_H,
                         dq_BHLD, dk_BHLD, dv_BHLD, dxq_BHLD, dxk_BHLD, dxv_BHLD,
                         dq_bias_BHPD, dv_bias_BHPD, dlog_scale_BHPD, largest, L, P,
                         NORMALISED: tl.constexpr, D: tl.constexpr, TILE_L: tl.constexpr):
    """A tile of tokens of one head a program -> the product's gradient, and the tile's sums.

    These are [B, H, P, D] in fp32, and are added up afterwards.
    """
    tile_1 = tl.program_id(0) + tl.arange(0, 1)   # as [1], a row for store_head
    rows_T = tile_1 * TILE_L + tl.arange(0, TILE_L)
    dq_TD = load_head(dq_BHLD, rows_T, L, D).to(tl.float32)
    dk_TD = load_head(dk_BHLD, rows_T, L, D).to(tl.float32)
    dv_TD = load_head(dv_BHLD, rows_T, L, D).to(tl.float32)
    if NORMALISED:
        factor = learned_factor(log_scale_H, largest)
        q_TD = load_head(q_BHLD, rows_T, L, D).to(tl.float32)
        k_TD = load_head(k_BHLD, rows_T, L, D).to(tl.float32)
        dlog_scale_1D = tl.sum(q_TD * dq_TD, 0, keep_dims=True)
        store_head(dlog_scale_BHPD, tile_1, P, D, dlog_scale_1D)
        q_inverse_T1 = load_head(q_inverse_BHL1, rows_T, L, 1)
        k_inverse_T1 = load_head(k_inverse_BHL1, rows_T, L, 1)
        dq_TD = unit_backward(q_TD / factor, dq_TD * factor, q_inverse_T1)
        dk_TD = unit_backward(k_TD, dk_TD, k_inverse_T1)
    store_head(dxq_BHLD, rows_T, L, D, dq_TD)
    store_head(dxk_BHLD, rows_T, L, D, dk_TD)
    store_head(dxv_BHLD, rows_T, L, D, dv_TD)
    store_head(dq_bias_BHPD, tile_1, P, D, tl.sum(dq_TD, 0, keep_dims=True))
    store_head(dv_bias_BHPD, tile_1, P, D, tl.sum(dv_TD, 0, keep_dims=True))


def rows_first(x_BHLD: Tensor) -> Tensor:
    """Return x, or a copy that kernels can read: rows unbroken, strides multiples of 8 if D is."""
    if torch.compiler.is_compiling():   # `launch_compiled` does it: to ask here copies gradients
        return x_BHLD
    *strides, last = x_BHLD.stride()
    D = x_BHLD.shape[-1]
    multiples = D % 8 != 0 or all(stride % 8 == 0 for stride in strides)
    return x_BHLD if last == 1 and multiples else x_BHLD.contiguous()


def heads_tiles(L: int, D: int) -> dict[str, int]:
    """A tile is 2048 numbers at most, of which 128 threads hold 16 each; or it is one row."""
    TILE_L = min(next_power_of_2(L), max(1, 2048 // next_power_of_2(D)))
    return dict(D=D, TILE_L=TILE_L, num_warps=4)


def three_heads(product_BLX: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Return queries, keys and values [B, H, L, D] as views of the product."""
    product_BL3HD = product_BLX.unflatten(2, (3, heads, -1))
    return product_BL3HD.permute(2, 0, 3, 1, 4).unbind()


def launch_split_heads(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads, kv_slots=None):
    """Return q, k, v [B, H, L, D], k and v in `kv_slots` if given, and 1 / |x| of q and k."""
    views = three_heads(product_BLX.contiguous(), heads)
    B, H, L, D = views[0].shape
    q_BHLD = product_BLX.new_empty(B, H, L, D)
    k_BHLD, v_BHLD = kv_slots or (torch.empty_like(q_BHLD), torch.empty_like(q_BHLD))
    inverse_BHL21 = product_BLX.new_empty(B, H, L, 2, 1, dtype=torch.float32)
    biases = [bias_W.contiguous().view(H, 1, D).expand(B, H, 1, D)
              for bias_W in (q_bias_W, v_bias_W)]
    normalised = log_scale_H is not None
    scales = log_scale_H.contiguous() if normalised else q_bias_W   # not read then
    tiles = heads_tiles(L, D)
    launch(split_heads_forward, (math.ceil(L / tiles["TILE_L"]), H, B),
           [*views, *biases, scales],
           [q_BHLD, k_BHLD, v_BHLD, *inverse_BHL21.unbind(3)],
           LARGEST_LOG_SCALE, L, NORMALISED=normalised, **tiles)
    return q_BHLD, k_BHLD, v_BHLD, inverse_BHL21


class SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, product_BLX, q_bias_W, v_bias_W, log_scale_H, heads):
        q_BHLD, k_BHLD, v_BHLD, inverse_BHL21 = launch_split_heads(
            product_BLX, q_bias_W, v_bias_W, log_scale_H, heads)
        ctx.save_for_backward(q_BHLD, k_BHLD, inverse_BHL21, log_scale_H)
        return q_BHLD, k_BHLD, v_BHLD

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_BHLD, dk_BHLD, dv_BHLD):
        q_BHLD, k_BHLD, inverse_BHL21, log_scale_H = ctx.saved_tensors
        normalised = log_scale_H is not None
        scales = log_scale_H.contiguous() if normalised else inverse_BHL21   # not read then
        B, H, L, D = q_BHLD.shape
        tiles = heads_tiles(L, D)
        P = math.ceil(L / tiles["TILE_L"])
        gradients = [rows_first(x) for x in (dq_BHLD, dk_BHLD, dv_BHLD)]
        dproduct_BLX = q_BHLD.new_empty(B, L, 3 * H * D)
        sums_BHP3D = q_BHLD.new_empty(B, H, P, 3, D, dtype=torch.float32)
        launch(split_heads_backward, (P, H, B),
               [q_BHLD, k_BHLD, *inverse_BHL21.unbind(3), scales, *gradients],
               [*three_heads(dproduct_BLX, H), *sums_BHP3D.unbind(3)], LARGEST_LOG_SCALE, L, P,
               NORMALISED=normalised, **tiles)
        dq_bias_HD, dv_bias_HD, dlog_scale_HD = sums_BHP3D.sum(dim=(0, 2)).unbind(1)
        dlog_scale_H = None
        if normalised:
            dlog_scale_H = dlog_scale_HD.sum(dim=1) * (log_scale_H <= LARGEST_LOG_SCALE)
        return dproduct_BLX, dq_bias_HD.flatten(), dv_bias_HD.flatten(), dlog_scale_H, None


def split_heads_triton(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads, kv_slots=None):
    if kv_slots is None:
        return SplitHeads.apply(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads)
    assert all(rows_first(x) is x for x in kv_slots), "the kernel cannot write to such strides"
    return launch_split_heads(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads, kv_slots)[:3]


def inverse_norm(x_BHLD):
    """Return 1 / |x|: [B, H, L, 1]. (F.normalize divides every number by |x|, which is slower.)"""
    squares_BHL1 = x_BHLD.square().sum(dim=-1, keepdim=True)
    return squares_BHL1.clamp(min=1e-24).rsqrt()


def split_heads_torch(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads, kv_slots=None):
    q_BLW, k_BLW, v_BLW = product_BLX.float().chunk(3, dim=2)
    whole = q_BLW + q_bias_W.float(), k_BLW, v_BLW + v_bias_W.float()
    q_BHLD, k_BHLD, v_BHLD = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in whole)
    if log_scale_H is not None:
        factor_H = log_scale_H.float().clamp(max=LARGEST_LOG_SCALE).exp()
        q_BHLD = q_BHLD * (factor_H[:, None, None] * inverse_norm(q_BHLD))
        k_BHLD = k_BHLD * inverse_norm(k_BHLD)
    dtype = product_BLX.dtype
    q_BHLD, k_BHLD, v_BHLD = (x.to(dtype) for x in (q_BHLD, k_BHLD, v_BHLD))
    if kv_slots is None:
        return q_BHLD, k_BHLD, v_BHLD
    k_slots_BHLD, v_slots_BHLD = kv_slots
    return q_BHLD, k_slots_BHLD.copy_(k_BHLD), v_slots_BHLD.copy_(v_BHLD)


def split_heads(product_BLX: Tensor, q_bias_W: Tensor, v_bias_W: Tensor,
                log_scale_H: Tensor | None, heads: int,
                kv_slots: tuple[Tensor, Tensor] | None = None
                ) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [B, H, L, D] of a product [B, L, 3 W], in its dtype.

    log_scale_H: the learned scale of each head; None leaves queries and keys as they are.
    kv_slots: where to write keys and values, [B, H, L, D] both, as in a slice of a KV cache. For
        generation: no gradient goes through.
    """
    B, L, X = product_BLX.shape
    W = len(q_bias_W)
    assert X == 3 * W and len(v_bias_W) == W and W % heads == 0
    assert log_scale_H is None or len(log_scale_H) == heads
    if kv_slots is not None:
        k_slots_BHLD, v_slots_BHLD = kv_slots
        assert k_slots_BHLD.shape == v_slots_BHLD.shape == (B, heads, L, W // heads)
    backend = split_heads_triton if use_triton(product_BLX) else split_heads_torch
    return backend(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads, kv_slots)


# -------------------------------------------------------------------------------------------------
# Attention: the mask
#
# In next-scale prediction a query sees one unbroken range of keys, and both ends of the range never
# decrease from one query to the next. So a mask is a table of two columns, and not L x S numbers:
#
#     scales (1, 2)        all scales so far        own scale only
#     query 0              keys 0                   keys 0
#     queries 1..4         keys 0 1 2 3 4           keys 1 2 3 4


class KeyRanges:
    """A mask as a table: query i sees the keys j with first[i] <= j < last[i].

    first, last: L integers each; last is one past the last key. No range is empty, and neither end
    ever decreases.
    """

    def __init__(self, first: Sequence[int], last: Sequence[int]):
        self.first = tuple(map(int, first))
        self.last = tuple(map(int, last))
        self.cache: dict[tuple, Any] = {}
        assert len(self.first) == len(self.last) > 0
        assert list(self.first) == sorted(self.first)
        assert list(self.last) == sorted(self.last)
        assert self.first[0] >= 0
        assert all(a < b for a, b in zip(self.first, self.last))

    @classmethod
    def from_scales(cls, scales: Sequence[int], last_scales: int | None = None) -> KeyRanges:
        """Return the block-causal table of token maps of s x s tokens, coarse to fine.

        last_scales: how many scales a token sees, its own among them: None is all so far (VAR),
        1 is its own alone (a Markov model). Raises ValueError where it is less than 1.
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
        """Return the table of queries begin .. end-1, as for one scale; keys keep their numbers."""
        return self.cached(slice_ranges, begin, end)

    def dense(self) -> Tensor:
        """Return the same mask as a bool [L, S], S = last[-1]."""
        keys_S = torch.arange(self.last[-1])
        first_L1 = torch.tensor(self.first)[:, None]
        last_L1 = torch.tensor(self.last)[:, None]
        return (keys_S >= first_L1) & (keys_S < last_L1)

    def prepare(self, device: torch.device) -> None:
        """Make what the backend reads, before torch.compile traces a call: a cache that it finds
        empty at first, and filled in the next call, would make it compile again."""
        triton_here = use_triton(torch.empty(0, device=device))
        for make in (table, transposed_table) if triton_here else (mask_in_sight,):
            self.cached(make, device)

    def cached(self, make: Callable, *arguments) -> Any:
        """make(self, *arguments), made once: a second generation copies no table."""
        key = (make, *arguments)
        if key not in self.cache:
            self.cache[key] = make(self, *arguments)
        return self.cache[key]


def slice_ranges(ranges: KeyRanges, begin: int, end: int) -> KeyRanges:
    return KeyRanges(ranges.first[begin:end], ranges.last[begin:end])


def table(ranges: KeyRanges, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return first_L and last_L as int32 on a device, as the kernels read them."""
    return tuple(torch.tensor(ends, dtype=torch.int32, device=device)
                 for ends in (ranges.first, ranges.last))


# -------------------------------------------------------------------------------------------------
# Attention: forward
#
# The obvious version writes the scores, the masked scores and the weights, each B H L S numbers,
# and reads them again: at B 64, H 16, L 680, D 64 in bf16 6 x 0.95 GB, where q, k, v and o together
# are 0.36 GB. And it computes all L S scores, of which the mask keeps 62 %.
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


# A tile of keys is whole if every query of the tile of queries sees all of it, and cut if a range
# ends or begins in it, or the array does. Only cut tiles need masks: of the tiles visited 16 of 50
# at L 680 (256 pixels), 3 % at L 9451 (1024). So the kernels have two loops, written as one:
#
#     for CUT in tl.static_range(2):
#         for n in range(cut if CUT else whole):
#
# static_range is unrolled before it is compiled, with CUT a constant 0 and then 1: in the first
# copy nothing is left of `if CUT:`, no mask of rows, no comparison of ranges, no table.


@triton.jit
def plan_tiles(first, last, tile, length, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Return which partners (keys of queries, or queries of keys) the rows of a tile meet.

    first, last: a table of `length` rows. From `start` on come `before` tiles of TILE partners that
    some rows see, `whole` ones that all see, and cut ones again; the fourth result counts all cut
    ones. Neither end ever decreases, so the first and the last row tell it all.
    """
    begin = tile * ROWS
    final = tl.minimum(length, begin + ROWS) - 1
    start = tl.load(first + begin)
    all_start = tl.load(first + final)
    all_end = tl.load(last + begin)
    end = tl.load(last + final)
    before = tl.cdiv(all_start - start, TILE)
    whole = tl.maximum(all_end - start - before * TILE, 0) // TILE
    left = end - start - (before + whole) * TILE
    after = tl.cdiv(tl.maximum(left, 0), TILE)
    return start, before, whole, before + after


@triton.jit
def tile_partners(n, start, before, whole, CUT: tl.constexpr, TILE: tl.constexpr):
    """Return the partners in the n-th cut tile, or in the n-th whole one."""
    if CUT:
        tile = tl.where(n < before, n, n + whole)   # cut tiles lie on both sides of the whole ones
    else:
        tile = before + n
    return start + tile * TILE + tl.arange(0, TILE)


@triton.jit
def seen_by(rows_T, length, first, last, partners_T):
    """Return bool [T rows, T partners]: which partner lies in the range of which row."""
    rows_T = tl.minimum(rows_T, length - 1)
    first_T1 = tl.load(first + rows_T)[:, None]
    last_T1 = tl.load(last + rows_T)[:, None]
    return (partners_T[None, :] >= first_T1) & (partners_T[None, :] < last_T1)


@triton.jit
def attention_forward(q_BHLD, k_BHSD, v_BHSD, first_L, last_L, o_BHLD, log2sum_BHL1,
                      scale, L, S,
                      D: tl.constexpr, TILE_L: tl.constexpr, TILE_S: tl.constexpr):
    """A tile of queries of one head a program: q, k, v and the table -> o, log2sum.

    q, o [B, H, L, D] and k, v [B, H, S, D] of one dtype; first, last [L] int32; log2sum
    [B, H, L, 1] fp32. The scale comes divided by ln 2.
    """
    # Programs start in order. The last queries, which see most, are the first of each head.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    queries_T = tile * TILE_L + tl.arange(0, TILE_L)
    q_TD = load_head(q_BHLD, queries_T, L, D)
    # Not -inf: if a query sees nothing of its first tile, -inf - (-inf) would be NaN.
    highest_T1 = tl.full([TILE_L, 1], -3.0e38, tl.float32)
    total_T1 = tl.zeros([TILE_L, 1], tl.float32)
    o_TD = tl.zeros(q_TD.shape, tl.float32)
    start, before, whole, cut = plan_tiles(first_L, last_L, tile, L, TILE_L, TILE_S)
    for CUT in tl.static_range(2):
        for n in range(cut if CUT else whole):
            keys_T = tile_partners(n, start, before, whole, CUT, TILE_S)
            k_TD = load_head(k_BHSD, keys_T, S, D, CUT)
            dots_TS = product(q_TD, k_TD.T)
            if CUT:
                seen_TS = seen_by(queries_T, L, first_L, last_L, keys_T)
                dots_TS = tl.where(seen_TS, dots_TS, -float("inf"))
            new_T1 = tl.maximum(highest_T1, tl.max(dots_TS, 1, keep_dims=True) * scale)
            weights_TS = tl.exp2(dots_TS * scale - new_T1)
            shrink_T1 = tl.exp2(highest_T1 - new_T1)
            total_T1 = total_T1 * shrink_T1 + tl.sum(weights_TS, 1, keep_dims=True)
            v_TD = load_head(v_BHSD, keys_T, S, D, CUT)
            o_TD = o_TD * shrink_T1 + product(weights_TS.to(v_TD.dtype), v_TD)
            highest_T1 = new_T1
    store_head(o_BHLD, queries_T, L, D, o_TD / total_T1)
    store_head(log2sum_BHL1, queries_T, L, 1, highest_T1 + tl.log2(total_T1))


# -------------------------------------------------------------------------------------------------
# Attention: backward
#
# The weights are computed again, from log2sum. With dz = dL/dz for any z, s = scale q k^T, which is
# scores without the 1 / ln 2 in them, and delta = sum of o do, one number per query:
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
    """Return first_S, last_S: the queries first_S[j] <= i < last_S[j], if any, see key j.

    first_S[j] counts the ranges that end at or before j; last_S[j], those that begin at or before
    j. As ranges are in order, each count is an index.
    """
    first_L, last_L = ranges.cached(table, device)
    keys_S = torch.arange(ranges.last[-1], dtype=torch.int32, device=device)
    first_S = torch.searchsorted(last_L, keys_S, right=True, out_int32=True)
    last_S = torch.searchsorted(first_L, keys_S, right=True, out_int32=True)
    return first_S, last_S


@triton.jit
def attention_backward_q(q_BHLD, k_BHSD, v_BHSD, first_L, last_L, o_BHLD, do_BHLD, log2sum_BHL1,
                         delta_BHL1, dq_BHLD, scale, L, S,
                         D: tl.constexpr, TILE_L: tl.constexpr, TILE_S: tl.constexpr):
    """A tile of queries of one head a program: dq, and delta for attention_backward_kv.

    Arrays as in attention_forward; do and dq are like q, delta like log2sum. The scale comes
    divided by ln 2, which dq is multiplied with again.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    queries_T = tile * TILE_L + tl.arange(0, TILE_L)
    q_TD = load_head(q_BHLD, queries_T, L, D)
    o_TD = load_head(o_BHLD, queries_T, L, D)
    do_TD = load_head(do_BHLD, queries_T, L, D)
    log2sum_T1 = load_head(log2sum_BHL1, queries_T, L, 1)
    along_TD = o_TD.to(tl.float32) * do_TD.to(tl.float32)
    delta_T1 = tl.sum(along_TD, 1, keep_dims=True)
    store_head(delta_BHL1, queries_T, L, 1, delta_T1)
    dq_TD = tl.zeros(q_TD.shape, tl.float32)
    start, before, whole, cut = plan_tiles(first_L, last_L, tile, L, TILE_L, TILE_S)
    for CUT in tl.static_range(2):
        for n in range(cut if CUT else whole):
            keys_T = tile_partners(n, start, before, whole, CUT, TILE_S)
            k_TD = load_head(k_BHSD, keys_T, S, D, CUT)
            v_TD = load_head(v_BHSD, keys_T, S, D, CUT)
            scores_TS = product(q_TD, k_TD.T) * scale
            weights_TS = tl.exp2(scores_TS - log2sum_T1)
            if CUT:
                seen_TS = seen_by(queries_T, L, first_L, last_L, keys_T)
                weights_TS = tl.where(seen_TS, weights_TS, 0.0)
            dweights_TS = product(do_TD, v_TD.T)
            ds_TS = weights_TS * (dweights_TS - delta_T1)
            dq_TD += product(ds_TS.to(k_TD.dtype), k_TD)
    dq_TD *= scale * 0.6931471805599453   # ln 2
    store_head(dq_BHLD, queries_T, L, D, dq_TD)


@triton.jit
def attention_backward_kv(q_BHLD, k_BHSD, v_BHSD, first_S, last_S, do_BHLD, log2sum_BHL1,
                          delta_BHL1, dk_BHSD, dv_BHSD, scale, L, S,
                          D: tl.constexpr, TILE_L: tl.constexpr, TILE_S: tl.constexpr):
    """A tile of keys of one head a program: dk and dv, like k and v.

    Arrays as in attention_backward_q, but the table is the transposed one: first, last [S].
    """
    tile = tl.program_id(0)   # the first keys, seen by most queries, are the first of each head
    keys_T = tile * TILE_S + tl.arange(0, TILE_S)
    k_TD = load_head(k_BHSD, keys_T, S, D)
    v_TD = load_head(v_BHSD, keys_T, S, D)
    dk_TD = tl.zeros(k_TD.shape, tl.float32)
    dv_TD = tl.zeros(k_TD.shape, tl.float32)
    start, before, whole, cut = plan_tiles(first_S, last_S, tile, S, TILE_S, TILE_L)
    for CUT in tl.static_range(2):
        for n in range(cut if CUT else whole):
            queries_T = tile_partners(n, start, before, whole, CUT, TILE_L)
            q_TD = load_head(q_BHLD, queries_T, L, D, CUT)
            do_TD = load_head(do_BHLD, queries_T, L, D, CUT)
            log2sum_T1 = load_head(log2sum_BHL1, queries_T, L, 1, CUT)
            delta_T1 = load_head(delta_BHL1, queries_T, L, 1, CUT)
            scores_ST = product(k_TD, q_TD.T) * scale
            weights_ST = tl.exp2(scores_ST - log2sum_T1.T)
            if CUT:
                seen_ST = seen_by(keys_T, S, first_S, last_S, queries_T)
                weights_ST = tl.where(seen_ST, weights_ST, 0.0)
            dv_TD += product(weights_ST.to(do_TD.dtype), do_TD)
            dweights_ST = product(v_TD, do_TD.T)
            ds_ST = weights_ST * (dweights_ST - delta_T1.T)
            dk_TD += product(ds_ST.to(q_TD.dtype), q_TD)
    dk_TD *= scale * 0.6931471805599453   # ln 2
    store_head(dk_BHSD, keys_T, S, D, dk_TD)
    store_head(dv_BHSD, keys_T, S, D, dv_TD)


# Queries and keys in a tile, warps, stages: the largest of those tried that spill next to no
# register and fit in 99 kB of shared memory, all that consumer cards have (sm_86, sm_89, sm_120).
# fp32 is multiplied without tensor cores, which would round it to TF32, and wants small tiles.
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
    """Return the tiles of the table, but smaller ones for the first scales of a generation: of a
    tile of 128 queries most would be padding."""
    L, D = q_BHLD.shape[2:]
    in_fp32 = q_BHLD.dtype == torch.float32
    tiles = ATTENTION_TILES[name][2 * in_fp32 + (D > 64)]
    TILE_L, TILE_S, num_warps, num_stages = tiles
    if name == "forward" and TILE_L > 32:   # to make 16 of 32 spills registers (sm_90)
        TILE_L = min(TILE_L, max(16, next_power_of_2(L)))   # a product takes 16 or more
        num_warps = max(4, num_warps * TILE_L // tiles[0])
    return dict(TILE_L=TILE_L, TILE_S=TILE_S, num_warps=num_warps, num_stages=num_stages, D=D)


def new_heads(x_BHLD: Tensor) -> Tensor:
    """Return an empty tensor like x, laid out as [B, L, H, D]: joining the heads copies nothing."""
    B, H, L, D = x_BHLD.shape
    return x_BHLD.new_empty(B, L, H, D).transpose(1, 2)


class BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHLD, k_BHSD, v_BHSD, ranges, scale):
        qkv = [rows_first(x) for x in (q_BHLD, k_BHSD, v_BHSD)]
        B, H, L, _ = q_BHLD.shape
        S = k_BHSD.shape[2]
        o_BHLD = new_heads(q_BHLD)
        log2sum_BHL1 = q_BHLD.new_empty(B, H, L, 1, dtype=torch.float32)
        ctx.numbers = scale / math.log(2), L, S
        tiles = attention_tiles("forward", q_BHLD)
        launch(attention_forward, (math.ceil(L / tiles["TILE_L"]), H, B),
               [*qkv, *ranges.cached(table, q_BHLD.device)],
               [o_BHLD, log2sum_BHL1],
               *ctx.numbers, **tiles)
        ctx.ranges = ranges
        ctx.save_for_backward(*qkv, o_BHLD, log2sum_BHL1)
        return o_BHLD

    @staticmethod
    @once_differentiable
    def backward(ctx, do_BHLD):
        *qkv, o_BHLD, log2sum_BHL1 = ctx.saved_tensors
        by_query = ctx.ranges.cached(table, do_BHLD.device)
        by_key = ctx.ranges.cached(transposed_table, do_BHLD.device)
        do_BHLD = rows_first(do_BHLD)
        delta_BHL1 = torch.empty_like(log2sum_BHL1)
        dq_BHLD, dk_BHSD, dv_BHSD = map(new_heads, qkv)
        B, H, L, _ = do_BHLD.shape
        S = dk_BHSD.shape[2]
        tiles = attention_tiles("backward_q", do_BHLD)
        launch(attention_backward_q, (math.ceil(L / tiles["TILE_L"]), H, B),
               [*qkv, *by_query, o_BHLD, do_BHLD, log2sum_BHL1],
               [delta_BHL1, dq_BHLD],
               *ctx.numbers, **tiles)
        tiles = attention_tiles("backward_kv", do_BHLD)
        launch(attention_backward_kv, (math.ceil(S / tiles["TILE_S"]), H, B),
               [*qkv, *by_key, do_BHLD, log2sum_BHL1, delta_BHL1],
               [dk_BHSD, dv_BHSD],
               *ctx.numbers, **tiles)
        return dq_BHLD, dk_BHSD, dv_BHSD, None, None


def block_attention_triton(q_BHLD, k_BHSD, v_BHSD, ranges, scale):
    D = q_BHLD.shape[3]
    if not 16 <= D <= 128:
        raise ValueError(f"the Triton kernel takes a head width of 16 to 128: it is {D}")
    # Keys after those in sight may hold anything, as in a cache that is not yet full.
    seen = ranges.last[-1]
    k_BHSD = k_BHSD[:, :, :seen]
    v_BHSD = v_BHSD[:, :, :seen]
    return BlockAttention.apply(q_BHLD, k_BHSD, v_BHSD, ranges, float(scale))


def mask_in_sight(ranges: KeyRanges, device: torch.device) -> Tensor | None:
    """Return the mask [L, last[-1] - first[0]] over keys that any query sees; None if all see all,
    as in generation."""
    mask_LS = ranges.dense()[:, ranges.first[0]:]
    return None if mask_LS.all() else mask_LS.to(device)


def block_attention_torch(q_BHLD, k_BHSD, v_BHSD, ranges, scale):
    """PyTorch's fused attention, with a mask unless all queries see the same keys."""
    keys = slice(ranges.first[0], ranges.last[-1])
    mask_LS = ranges.cached(mask_in_sight, q_BHLD.device)
    return F.scaled_dot_product_attention(
        q_BHLD, k_BHSD[:, :, keys], v_BHSD[:, :, keys], attn_mask=mask_LS, scale=scale)


def block_attention(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, ranges: KeyRanges,
                    scale: float) -> Tensor:
    """Return softmax(scale * q k^T over the keys in range) v, as [B, H, L, D] (paper: Sec. 3.2).

    Floating point of one dtype, which autocast chooses where it is on; any strides. scale > 0. The
    Triton kernel, for D from 16 to 128, lays its result out as [B, L, H, D].
    """
    if torch.is_autocast_enabled(q_BHLD.device.type):
        dtype = product_dtype(q_BHLD)
        q_BHLD, k_BHSD, v_BHSD = (x.to(dtype) for x in (q_BHLD, k_BHSD, v_BHSD))
    assert q_BHLD.dtype == k_BHSD.dtype == v_BHSD.dtype and scale > 0
    B, H, L, D = q_BHLD.shape
    S = k_BHSD.shape[2]
    assert k_BHSD.shape == v_BHSD.shape == (B, H, S, D)
    assert len(ranges) == L and ranges.last[-1] <= S
    triton_here = use_triton(q_BHLD) and 16 <= D <= 128
    backend = block_attention_triton if triton_here else block_attention_torch
    return backend(q_BHLD, k_BHSD, v_BHSD, ranges, scale)


# -------------------------------------------------------------------------------------------------
# Sampling
#
# PyTorch's version sorts the k highest logits of a row and moves the row time and again: 98 bytes
# for each logit, where reading it and its noise in fp32 is 8. The kernel reads a row once, keeps it
# in registers, and sorts nothing:
#
#     keep a token if the tokens ranked before it hold less than `target` of weight
#
# is top-k with every weight 1 and target k, and top-p with the probabilities and p. All it takes
# is the threshold: the largest number such that the tokens from there up hold at least the target.
# It is found bit by bit from the top, in 32 sums over the row: the bits of a float, read as an
# unsigned integer, are in the floats' order once the sign bit of positive numbers is flipped, and
# all bits of negative ones.
#
# Probabilities are counted in whole units of 2^-40 of the largest: integer sums are the same in
# every order, so the backends draw the same token unless they round exp or log otherwise.


@triton.jit
def ranked_within(keys_V, weights_V, target):
    """Return which tokens have less than `target` of weight before them: that of higher keys, and
    of equal ones at lower indices."""
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
def sample_tokens_kernel(cond_BlV, uncond_BlV, noise_BlV, token_Bl1, guidance, top_p, top_k, V,
                         GUIDED: tl.constexpr, TILE_V: tl.constexpr):
    """One place a program: cond, uncond, noise [B, l, V] -> token [B, l], int64."""
    place = tl.program_id(0)
    codes_V = tl.arange(0, TILE_V)
    kept_V = codes_V < V
    logits_V = load_token(cond_BlV, place, codes_V, V)
    if GUIDED:
        uncond_V = load_token(uncond_BlV, place, codes_V, V)
        logits_V = logits_V + guidance * (logits_V - uncond_V)
    logits_V = tl.where(kept_V, logits_V, -float("inf"))
    bits_V = tl.where(logits_V == 0, 0.0, logits_V).to(tl.uint32, bitcast=True)   # -0 is 0
    keys_V = bits_V ^ tl.where(logits_V < 0, 0xFFFFFFFF, 0x80000000)
    if top_k < V:
        kept_V &= ranked_within(keys_V, kept_V.to(tl.int32), top_k)
    if top_p < 1:
        share_V = tl.exp(logits_V - tl.max(logits_V, 0))
        units_V = tl.where(kept_V, share_V * (1 << 40), 0.0).to(tl.int64)
        total = tl.sum(units_V).to(tl.float32)
        target = (total * top_p).to(tl.int64)
        target = tl.maximum(target, 1)   # the most likely token stays, whatever p
        kept_V &= ranked_within(keys_V, units_V, target)
    noise_V = load_token(noise_BlV, place, codes_V, V)
    score_V = tl.where(kept_V, logits_V - tl.log(noise_V), -float("inf"))
    token_1 = tl.argmax(score_V, 0, keep_dims=True)
    token_1 = tl.minimum(token_1, V - 1)   # where all are NaN
    store_token(token_Bl1, place, tl.arange(0, 1), 1, token_1)


def sample_tokens_triton(cond_BlV, uncond_BlV, guidance, top_k, top_p, noise_BlV):
    B, l, V = cond_BlV.shape
    token_Bl = torch.empty(B, l, dtype=torch.int64, device=cond_BlV.device)
    GUIDED = uncond_BlV is not None
    TILE_V = next_power_of_2(V)
    launch(sample_tokens_kernel, (l, B),
           [cond_BlV, uncond_BlV if GUIDED else cond_BlV, noise_BlV], [token_Bl[:, :, None]],
           float(guidance), float(top_p), top_k if top_k > 0 else V, V,
           GUIDED=GUIDED, TILE_V=TILE_V,
           num_warps=min(32, max(1, TILE_V // 512)),   # 16 numbers a thread, if V is 257 to 16,384
           enable_fp_fusion=False)   # a fused multiply-add rounds once, PyTorch twice: ties break
    return token_Bl


def sample_tokens_torch(cond_BlV, uncond_BlV, guidance, top_k, top_p, noise_BlV):
    """Sort the k highest logits; the last of those that stay is the threshold."""
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
    assert noise_BlV.shape == cond_BlV.shape
    assert uncond_BlV is None or uncond_BlV.shape == cond_BlV.shape
    backend = sample_tokens_triton if use_triton(cond_BlV) else sample_tokens_torch
    return backend(cond_BlV, uncond_BlV, guidance, top_k, top_p, noise_BlV)


# -------------------------------------------------------------------------------------------------
# How a kernel is launched: nothing of VAR from here on


def launch(kernel: Callable, programs: Sequence[int],
           read: list[Tensor], written: list[Tensor],
           *numbers: float, **constants: int) -> None:
    """Run a kernel on the arrays it reads, the arrays it writes, and numbers.

    Compiled for any batch size, PyTorch 2.13 takes a written array to begin at 0 in its memory, so
    where it begins must not depend on the batch.

    torch.compile cannot look inside and gets one operator; a `custom_op` would take longer.
    """
    if torch.compiler.is_compiling():
        torch.ops.var.launch(kernel.__name__, programs, read, written, numbers,
                             ",".join(constants), list(map(int, constants.values())))
    else:
        run_kernel(kernel, programs, read + written, numbers, constants)


LIBRARY = torch.library.Library("var", "FRAGMENT")   # replaced if this module is loaded anew
LIBRARY.define("launch(str kernel, SymInt[] programs, Tensor[] read, Tensor(a!)[] written, "
               "Scalar[] numbers, str names, SymInt[] values) -> ()")


@torch.library.impl(LIBRARY, "launch", "CompositeExplicitAutograd")
def launch_compiled(kernel, programs, read, written, numbers, names, values):
    constants = dict(zip(names.split(","), values))
    tensors = [*map(rows_first, read), *written]
    run_kernel(globals()[kernel], programs, tensors, numbers, constants)


@torch.library.register_fake("var::launch", lib=LIBRARY)
def launch_nothing(*arguments):
    """What torch.compile calls to learn the outputs: there are none."""


def run_kernel(kernel: Callable, programs: Sequence[int], tensors: Sequence[Tensor],
               numbers: Sequence[float], constants: dict[str, int]) -> None:
    """Run it on the tensors' GPU: by itself Triton takes the current one. Raises LaunchError."""
    with torch.cuda.device_of(tensors[0]):
        try:
            kernel[tuple(programs)](*as_arrays(tensors), *numbers, **constants)
        except Exception as error:
            for sign, sentence in LACKING.items():
                if sign in f"{type(error).__name__}: {error}":
                    raise LaunchError(sentence) from error
            raise


class LaunchError(OSError):
    """The machine lacks what Triton needs to launch a kernel."""


LAUNCHER = ("Triton could not build its launcher, for which it needs a C compiler and Python's "
            "headers (Debian: apt install gcc python3-dev)")
ON_A_CPU = ("Triton sees no GPU, or a tensor that is on none: for its interpreter "
            "TRITON_INTERPRET=1 must be in the environment before Python starts")
WITHOUT = 'or set BACKEND = "torch" in kernels.py'
LACKING = {   # by a word of Triton's error
    "C compiler": LAUNCHER,
    "CalledProcessError": LAUNCHER,
    "FileNotFoundError": LAUNCHER,
    "active drivers": ON_A_CPU,
    "cpu tensor": ON_A_CPU,
    "OutOfResources": "a kernel needs more than this GPU has: choose smaller tiles, "
                      + WITHOUT,
    "PTXASError": "Triton's assembler failed, as it does where it does not know this GPU yet: "
                  "install a newer Triton, " + WITHOUT,
}
