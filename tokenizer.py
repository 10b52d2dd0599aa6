"""Images to tokens and back: the multi-scale tokenizer of VAR (arXiv 2404.02905, Sec. 3.2).

An encoder turns an image into a latent f: C channels on a grid of S x S. A codebook holds V codes,
vectors of C numbers that are learned; a token is the number of a code. A quantizer writes f as a
sum of K token maps, from 1 x 1 up to S x S, and a decoder makes an image of that sum:

    f_hat = 0                                       nothing is decided yet
    for every scale k, coarse to fine:
        residual = f - f_hat                        what the coarser scales left over
        tokens_k = nearest codes to the residual    averaged over a grid of s_k x s_k areas
        f_hat = f_hat + phi(upsampled codes)        the codes of tokens_k, interpolated to S x S

So every scale corrects the sum of those before it, and the first few maps alone are already an
image: the whole of it, blurred. That is the order in which the transformer will predict the maps.

Why phi? A coarse map reaches S x S by interpolation, which blurs: edges that the codes of a scale
stand for come out soft. phi, a small convolution, repairs what it can, and the scales after it
need not. How much there is to repair depends on the enlargement, so neighbouring scales share one
phi and distant ones do not.

Why does the transformer read f_hat to predict scale k, and not the tokens of scale k-1? There are
fewer of them than places to predict; and a token says only what its own scale corrected. f_hat is
everything decided so far, and can be read at any size.

Read `Quantizer` first. Its `read`, `nearest` and `accumulate` are the loop above, and encoding,
decoding, teaching and generation are loops over them.

Axes: B batch, C channels of the latent and of a code, S side of the latent, s side of one token
map, L tokens of all maps (coarse to fine, sum of s*s), l tokens of one map, V codebook size,
K number of scales, k one of them, 0 the coarsest; N vectors; M residuals of a scale, n codes that
are to move there; X sum of all s.
"""
from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import nearest_code
from support.devices import fp32_convolutions
from support.published import tokenizer_of

PHI_STRENGTH = 0.5    # share of the convolution in phi, as published
L1_WEIGHT = 0.2       # beside the squared error, which hardly pulls where errors are small
COMMITMENT = 0.25     # weight of moving the latent to its codes, against 1 for the codes to it
HITS_DECAY = 0.99     # of the exponential moving average (EMA) of how often a code is hit
DEAD_BELOW = 0.05     # a code that is hit less than this share of the mean is dead


@dataclass(frozen=True)
class TokenizerConfig:
    """It fixes the tokenizer's shape. Raises ValueError for a shape that cannot be."""
    scales: tuple[int, ...]         # sides of the token maps, from 1 to the latent's side
    vocabulary: int                 # V
    code_channels: int              # C
    image_channels: int             # 3 for colour, 1 for grey
    width: int                      # channels at full resolution
    multipliers: tuple[int, ...]    # channels per resolution, in widths; the next has half the side
    blocks: int                     # residual blocks per resolution; the decoder has one more
    phis: int                       # different phis, each shared by neighbouring scales
    norm_groups: int                # of the group norms

    def __post_init__(self):
        growing = all(b > a for a, b in zip(self.scales, self.scales[1:]))
        if not self.scales or self.scales[0] != 1 or not growing:
            raise ValueError(f"scales {self.scales} must start at 1 and grow")
        for multiplier in (1, *self.multipliers):
            if self.width * multiplier % self.norm_groups:
                raise ValueError(f"width {self.width} times {multiplier} is not divisible by "
                                 f"{self.norm_groups} groups")

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    @property
    def image_side(self) -> int:
        return self.scales[-1] * self.downsampling


# -------------------------------------------------------------------------------------------------
# The multi-scale residual quantizer


class Phi(nn.Conv2d):
    """It repairs an upsampled map: phi(h) = h / 2 + conv(h) / 2, as in the published code.

    Where the convolution leaves h as it is, so does phi.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, h_BCSS: Tensor) -> Tensor:
        convolved_BCSS = super().forward(h_BCSS)
        return torch.lerp(h_BCSS, convolved_BCSS, PHI_STRENGTH)


class Quantizer(nn.Module):
    """It approximates a latent by a sum of K upsampled token maps (paper: Algorithms 1 and 2).

        accumulate: f_hat_k = f_hat_{k-1} + phi_k(upsample(codebook[tokens_k]))
        read:       average down to s_k x s_k: the residual, when encoding; f_hat, when predicting
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        V = config.vocabulary
        C = config.code_channels
        self.scales = config.scales
        self.codebook_VC = nn.Parameter(torch.zeros(V, C))   # `start_from` fills it
        self.phis = nn.ModuleList(Phi(C) for _ in range(config.phis))
        self.phi_of_scale = choose_phis(len(config.scales), config.phis)
        # What `read` averages with, the matrices [s, S] of all scales one below the other:
        areas = [area_matrix(s, self.scales[-1]) for s in self.scales]
        self.register_buffer("areas_XS", torch.cat(areas), persistent=False)
        self.register_buffer("hits_V", torch.ones(V))   # EMA of each code's hits per train step
        # What the last training pass leaves for the stage, which cares for the codebook:
        self.last_tokens_BL: Tensor | None = None
        self.last_residuals: list[Tensor] = []   # one [B, l, C] for each scale

    def initial(self, batch: int) -> Tensor:
        """Return f_hat before any scale: zeros [B, C, S, S]."""
        S = self.scales[-1]
        return self.codebook_VC.new_zeros(batch, self.codebook_VC.shape[1], S, S)

    def accumulate(self, f_hat_BCSS: Tensor, tokens_Bl: Tensor, k: int) -> Tensor:
        """Return f_hat with scale k, given by its tokens, added to it."""
        codes_BlC = F.embedding(tokens_Bl, self.codebook_VC)
        return self.add(f_hat_BCSS, codes_BlC, k)

    def add(self, f_hat_BCSS: Tensor, h_BlC: Tensor, k: int) -> Tensor:
        """Return f_hat with scale k, given by the vectors of its places, added to it.

        It is computed in fp32 also under autocast, and without TF32: a sum of ever smaller
        corrections needs the digits, and codes would change.
        """
        s = self.scales[k]
        S = self.scales[-1]
        phi = self.phis[self.phi_of_scale[k]]
        with torch.autocast(f_hat_BCSS.device.type, enabled=False), fp32_convolutions():
            h_BCss = h_BlC.transpose(1, 2).unflatten(2, (s, s))             # [B, C, s, s]
            h_BCSS = F.interpolate(h_BCss, size=(S, S), mode="bicubic")     # [B, C, S, S]
            return f_hat_BCSS + phi(h_BCSS)                                 # [B, C, S, S]

    def read(self, f_BCSS: Tensor, k: int) -> Tensor:
        """Return what scale k sees of a latent: vectors [B, l, C], each the mean of an area.

        Columns are averaged, then rows. (F.interpolate(mode="area") does the same, but not on
        Apple's GPU where s does not divide S.)
        """
        area_sS = self.areas_XS.split(self.scales)[k]
        with torch.autocast(f_BCSS.device.type, enabled=False):
            f_BCss = area_sS @ f_BCSS @ area_sS.T                           # [B, C, s, s]
        return f_BCss.flatten(2).transpose(1, 2)                            # [B, l, C]

    def nearest(self, x_BlC: Tensor) -> Tensor:
        """Return tokens [B, l] of vectors: which code is nearest to each."""
        tokens_N = nearest_code(x_BlC.flatten(0, 1), self.codebook_VC)
        return tokens_N.view(x_BlC.shape[:2])

    def split(self, tokens_BL: Tensor) -> list[Tensor]:
        """Split the tokens of all scales into a view [B, l] for each.

        Fewer tokens are fine if they end with a scale: then there are fewer maps.
        """
        sizes = [s * s for s in self.scales]
        while sum(sizes) > tokens_BL.shape[1]:
            sizes.pop()
        if sum(sizes) != tokens_BL.shape[1]:
            raise ValueError(f"{tokens_BL.shape[1]} tokens are no whole number of the scales "
                             f"{self.scales}")
        return list(tokens_BL.split(sizes, dim=1))

    @torch.no_grad()
    def encode(self, f_BCSS: Tensor) -> Tensor:
        """Return tokens [B, L] of a latent: each scale codes what the coarser ones left over."""
        f_hat_BCSS = self.initial(len(f_BCSS))
        tokens = []
        for k in range(len(self.scales)):
            residual_BlC = self.read(f_BCSS - f_hat_BCSS, k)
            tokens_Bl = self.nearest(residual_BlC)
            f_hat_BCSS = self.accumulate(f_hat_BCSS, tokens_Bl, k)
            tokens.append(tokens_Bl)
        return torch.cat(tokens, dim=1)

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Return the latent [B, C, S, S] that tokens stand for."""
        f_hat_BCSS = self.initial(len(tokens_BL))
        for k, tokens_Bl in enumerate(self.split(tokens_BL)):
            f_hat_BCSS = self.accumulate(f_hat_BCSS, tokens_Bl, k)
        return f_hat_BCSS

    @torch.no_grad()
    def teacher_inputs(self, tokens_BL: Tensor) -> Tensor:
        """Return what the transformer reads for scales 1 to K-1: [B, L-1, C].

        That is f_hat after each scale, at the size of the next. Scale 0 reads nothing of the kind:
        it is predicted from the class.
        """
        f_hat_BCSS = self.initial(len(tokens_BL))
        inputs = [self.read(f_hat_BCSS, 0)[:, :0]]   # [B, 0, C], all there is if K is 1
        for k, tokens_Bl in enumerate(self.split(tokens_BL)[:-1]):
            f_hat_BCSS = self.accumulate(f_hat_BCSS, tokens_Bl, k)
            inputs.append(self.read(f_hat_BCSS, k + 1))
        return torch.cat(inputs, dim=1)

    # Training. The nearest code is a choice, and a choice has no gradient. So the encoder learns
    # as if its latent itself were decoded (straight-through), and a loss for that choice holds the
    # two sides together: every running sum, so its codes and phis, moves to the latent, and the
    # latent, a quarter as strongly, to the sums. That second term is the commitment. Without it
    # latents may run away from their codes for as long as the decoder can follow.

    def forward(self, f_BCSS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent [B, C, S, S] as its tokens give it, and the codebook loss.

            L_vq = 1/K sum_k [ |f_hat_k - sg f|^2 + 0.25 |sg f_hat_k - f|^2 ]    (published code)

        |.|^2 is a mean over B, C, S and S, and sg stops the gradient.

        Every scale's running sum is held to the latent, so coarse scales carry what they can. In
        training mode the pass keeps its tokens and residuals.
        """
        f_hat_BCSS = self.initial(len(f_BCSS))
        loss = 0.0
        tokens = []
        residuals = []
        for k in range(len(self.scales)):
            with torch.no_grad():
                residual_BlC = self.read(f_BCSS - f_hat_BCSS, k)            # [B, l, C]
                tokens_Bl = self.nearest(residual_BlC)                      # [B, l]
            f_hat_BCSS = self.accumulate(f_hat_BCSS, tokens_Bl, k)          # [B, C, S, S]
            codes_loss = F.mse_loss(f_hat_BCSS, f_BCSS.detach())
            commitment = F.mse_loss(f_hat_BCSS.detach(), f_BCSS)
            loss = loss + codes_loss + COMMITMENT * commitment
            residuals.append(residual_BlC)
            tokens.append(tokens_Bl)
        if self.training:
            self.last_tokens_BL = torch.cat(tokens, dim=1)
            self.last_residuals = residuals
        # Straight-through: the value of f_hat, the gradient of f.
        straight_BCSS = f_BCSS + (f_hat_BCSS - f_BCSS).detach()             # [B, C, S, S]
        return straight_BCSS, loss / len(self.scales)

    # Codebook collapse: a code that is never the nearest gets no gradient, so it stays where it is
    # and will never be the nearest. A few codes that start well then take everything, for good.
    # Against that, codes start where residuals are, and dead ones are moved there later. The stage
    # in train.py calls what follows; it alone knows of micro-batches and of other processes.

    @torch.no_grad()
    def start_from(self, f_BCSS: Tensor) -> None:
        """Fill the codebook with residuals of real latents, V / K codes from every scale.

        Drawn from all residuals alike, most would be those of the finest scales. A share is drawn
        from what the coarser scales left over; then its scale is encoded with all codes so far, its
        own among them, and added to f_hat.
        """
        V = len(self.codebook_VC)
        K = len(self.scales)
        f_hat_BCSS = self.initial(len(f_BCSS))
        for k in range(K):
            begin = math.ceil(V * k / K)
            end = math.ceil(V * (k + 1) / K)
            residual_MC = self.read(f_BCSS - f_hat_BCSS, k).flatten(0, 1)
            chosen = torch.randint(len(residual_MC), (end - begin,))
            self.codebook_VC[begin:end] = residual_MC[chosen]
            tokens_M = nearest_code(residual_MC, self.codebook_VC[:end])
            f_hat_BCSS = self.accumulate(f_hat_BCSS, tokens_M.view(len(f_BCSS), -1), k)

    def count(self, tokens: Tensor) -> Tensor:
        """Count how often each code occurs among tokens of any shape: int64 [V]."""
        # On a GPU bincount would wait for the largest token, to know how many counts to make.
        tokens_N = tokens.flatten()
        counts_V = torch.zeros_like(self.hits_V, dtype=torch.int64)
        return counts_V.scatter_add_(0, tokens_N, torch.ones_like(tokens_N))

    @torch.no_grad()
    def update_hits(self, counts_V: Tensor) -> None:
        """Take the counts of one train step, of all its images, into the EMA."""
        self.hits_V.lerp_(counts_V.to(self.hits_V), 1 - HITS_DECAY)

    @torch.no_grad()
    def revive(self, residuals: list[Tensor], optimizer: torch.optim.Optimizer) -> int:
        """Move dead codes to where residuals are, and return how many there were.

        residuals: [B, l, C] for each scale, as in `last_residuals`.

        The scale of a residual is drawn first, each as likely, and then its place. Of all
        residuals most are those of the finest two scales, and the coarse ones would starve. A
        revived code starts with the mean hit count, so it has time to find its place, and without
        the optimizer's moments of the code that it replaces.
        """
        mean = self.hits_V.mean()
        dead_N = (self.hits_V < DEAD_BELOW * mean).nonzero().flatten()
        scale_N = torch.randint(len(self.scales), dead_N.shape, device=dead_N.device)
        for k, residual_BlC in enumerate(residuals):
            residual_MC = residual_BlC.flatten(0, 1)
            code_n = dead_N[scale_N == k]
            place_n = torch.randint(len(residual_MC), code_n.shape, device=code_n.device)
            self.codebook_VC[code_n] = residual_MC[place_n]
        self.hits_V[dead_N] = mean
        moments = optimizer.state[self.codebook_VC]   # none before its first step
        for name in moments.keys() & {"exp_avg", "exp_avg_sq"}:   # AdamW's
            moments[name][dead_N] = 0
        return len(dead_N)


def area_matrix(s: int, S: int) -> Tensor:
    """Return [s, S], which takes the means over s areas of S places in a row.

    Where s does not divide S, neighbours may overlap.
    """
    return F.adaptive_avg_pool1d(torch.eye(S), s).T


def averaged(x_BCSS: Tensor, s: int) -> Tensor:
    """Return latents or images averaged down: [B, C, s, s]."""
    area_sS = area_matrix(s, x_BCSS.shape[-1])
    area_sS = area_sS.to(x_BCSS, non_blocking=True)   # else a GPU would be waited for
    with torch.autocast(x_BCSS.device.type, enabled=False):
        return area_sS @ x_BCSS @ area_sS.T


def choose_phis(K: int, phis: int) -> list[int]:
    """Return which phi serves each scale: that whose tick in [0, 1] is nearest to k / (K-1).

    As published, with another margin for four phis than for others; and in float64, since
    published checkpoints fall on ties that rounding decides.
    """
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    ticks = np.linspace(margin, 1 - margin, phis)
    chosen = []
    for k in range(K):
        distances = np.abs(ticks - k / max(K - 1, 1))
        chosen.append(int(distances.argmin()))
    return chosen


# -------------------------------------------------------------------------------------------------
# Encoder and decoder: the convolutional pair of latent diffusion (arXiv 2112.10752), as published


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Identity()
        if channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class PlaceAttention(nn.Module):
    """Every place attends to every place, with one head."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCSS: Tensor) -> Tensor:
        qkv_BCSS = self.qkv(self.norm(x_BCSS))                            # [B, 3 C, S, S]
        qkv_B1NC = qkv_BCSS.flatten(2).transpose(1, 2).unsqueeze(1)       # [B, 1, S S, 3 C]
        q_B1NC, k_B1NC, v_B1NC = qkv_B1NC.chunk(3, dim=-1)                # [B, 1, S S, C]
        o_B1NC = F.scaled_dot_product_attention(q_B1NC, k_B1NC, v_B1NC)   # [B, 1, S S, C]
        o_BCSS = o_B1NC.squeeze(1).transpose(1, 2).view_as(x_BCSS)        # [B, C, S, S]
        return x_BCSS + self.out(o_BCSS)                                  # [B, C, S, S]


class Downsample(nn.Conv2d):
    """It halves the side: a strided convolution, padded at bottom and right, as published."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 1, 0, 1))
        return super().forward(padded)


class Upsample(nn.Conv2d):
    """It doubles the side: each pixel is there four times, then a convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        enlarged = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return super().forward(enlarged)


class Level(nn.Module):
    """It holds one resolution: blocks, attention after each if it attends, the way to the next."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        blocks: int,
        groups: int,
        attends: bool,
        resample: nn.Module,
    ):
        super().__init__()
        self.blocks = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for i in range(blocks):
            self.blocks.append(ResidualBlock(channels if i else channels_in, channels, groups))
            if attends:
                self.attentions.append(PlaceAttention(channels, groups))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        return self.resample(x)


def middle(channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, groups),
        PlaceAttention(channels, groups),
        ResidualBlock(channels, channels, groups),
    )


class Encoder(nn.Module):
    """It makes features [B, C, S, S] of images; level 0 is full resolution."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        groups = config.norm_groups
        widths = [config.width * m for m in config.multipliers]
        widths_in = [config.width] + widths[:-1]
        lowest = len(widths) - 1
        self.conv_in = nn.Conv2d(config.image_channels, config.width, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            resample = nn.Identity() if i == lowest else Downsample(width)
            self.levels.append(Level(widths_in[i], width, config.blocks, groups,
                                     attends=i == lowest, resample=resample))
        self.middle = middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.code_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)                        # [B, width, side, side]
        for level in self.levels:
            x = level(x)                                # half the side, except at the last level
        x = self.middle(x)                              # [B, width * last multiplier, S, S]
        x = F.silu(self.norm_out(x))
        return self.conv_out(x)                         # [B, C, S, S]


class Decoder(nn.Module):
    """It goes the encoder's way back, to images; each level has one block more."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        groups = config.norm_groups
        widths = [config.width * m for m in config.multipliers]
        widths_in = widths[1:] + widths[-1:]
        lowest = len(widths) - 1
        self.conv_in = nn.Conv2d(config.code_channels, widths[-1], 3, padding=1)
        self.middle = middle(widths[-1], groups)
        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            resample = Upsample(width) if i else nn.Identity()
            self.levels.append(Level(
                widths_in[i], width, config.blocks + 1, groups, attends=i == lowest,
                resample=resample))
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, f_BCSS: Tensor) -> Tensor:
        x = self.conv_in(f_BCSS)                        # [B, width * last multiplier, S, S]
        x = self.middle(x)                              # [B, width * last multiplier, S, S]
        for level in reversed(self.levels):
            x = level(x)                                # twice the side, until the image's
        x = F.silu(self.norm_out(x))
        return self.conv_out(x)                         # [B, channels, side, side]


# -------------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer(nn.Module):
    """It makes tokens, int64 [B, L], of images, and images of tokens.

    Images are float [B, channels, side, side] in [-1, 1].
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        C = config.code_channels
        self.config = config
        self.encoder = Encoder(config)
        self.to_latent = nn.Conv2d(C, C, 3, padding=1)
        self.quantizer = Quantizer(config)
        self.from_latent = nn.Conv2d(C, C, 3, padding=1)
        self.decoder = Decoder(config)
        self.initialise()
        # A pixel's channels side by side, as convolutions want them: a third less time on a CPU.
        self.to(memory_format=torch.channels_last)

    def latent(self, images: Tensor) -> Tensor:
        """Return the latent f [B, C, S, S].

        Raises ValueError for images of a side that does not fit.
        """
        side = self.config.image_side
        if images.shape[2:] != (side, side):
            raise ValueError(f"images are {tuple(images.shape[2:])}; scales {self.config.scales} "
                             f"at downsampling {self.config.downsampling} need {side} x {side}")
        features = self.encoder(images)             # [B, C, S, S]
        return self.to_latent(features).float()     # [B, C, S, S]

    def render(self, f_BCSS: Tensor) -> Tensor:
        """Return the images of a latent, not clamped."""
        dtype = self.from_latent.weight.dtype
        # A decoder in half precision does without autocast, which would compute norms in fp32.
        half = dtype != torch.float32
        with torch.autocast(f_BCSS.device.type, enabled=False) if half else nullcontext():
            features = self.from_latent(f_BCSS.to(dtype))   # [B, C, S, S]
            return self.decoder(features).float()           # [B, channels, side, side]

    def cast_decoder(self, dtype: torch.dtype) -> None:
        """Decode in this dtype from now on. There is no way back, and no training, from half
        precision."""
        for part in (self.from_latent, self.decoder):
            part.to(dtype)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the tokens [B, L] of images (paper: Algorithm 1)."""
        return self.quantizer.encode(self.latent(images))

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Return images [B, channels, side, side] of tokens (paper: Algorithm 2).

        Tokens of the first scales alone give the images so far.
        """
        return self.render(self.quantizer.decode(tokens_BL)).clamp(-1, 1)

    def teacher_inputs(self, tokens_BL: Tensor) -> Tensor:
        """Return what the transformer reads for scales 1 to K-1 in training: [B, L-1, C]."""
        return self.quantizer.teacher_inputs(tokens_BL)

    def forward(self, images: Tensor, quantize: bool = True, small_s: int | None = None
                ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return reconstructions, and the losses by name, which the stage adds up.

        quantize: False trains the encoder and decoder alone. small_s: the side s of
        `smaller_loss`; None is without it.
        """
        f_BCSS = self.latent(images)                                # [B, C, S, S]
        f_hat_BCSS = f_BCSS
        codebook_loss = images.new_zeros(())
        if quantize:
            f_hat_BCSS, codebook_loss = self.quantizer(f_BCSS)      # [B, C, S, S]
        reconstruction = self.render(f_hat_BCSS)                    # [B, channels, side, side]
        losses = {
            "mse": F.mse_loss(reconstruction, images),
            "l1": F.l1_loss(reconstruction, images),
            "codebook": codebook_loss,
        }
        if small_s is not None:
            losses["smaller"] = self.smaller_loss(f_BCSS, images, small_s)
        return reconstruction, losses

    def smaller_loss(self, f_BCSS: Tensor, images: Tensor, s: int) -> Tensor:
        """Compare what latents averaged down to s x s decode to with images averaged down as much.

        A coarse map is made of such averages. If they are what a small image would be encoded to,
        the map shows that image, and is easier to predict: README, More results, has what it gives.
        (EQ-VAE, arXiv 2502.09509, asks the same of the latents of diffusion models.)
        """
        features = self.from_latent(averaged(f_BCSS, s))
        # Not self.decoder(features): --compile would compile that anew for every side.
        small = self.decoder.forward(features).float()
        target = averaged(images, s * self.config.downsampling)
        squared = F.mse_loss(small, target)
        absolute = F.l1_loss(small, target)
        return squared + L1_WEIGHT * absolute

    @torch.no_grad()
    def initialise(self) -> None:
        """Let convolutions keep a signal's size, residual branches be silent, phi do nothing.

        PyTorch's default shrinks a signal by sqrt(3) per layer, until little is left of it. Silent
        branches leave a plain path, on which colours are found first. A random phi would be noise
        added to every code.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
            if isinstance(module, PlaceAttention):
                nn.init.zeros_(module.out.weight)
            if isinstance(module, Phi):
                nn.init.dirac_(module.weight)

    @classmethod
    def from_official(cls, state_dict: dict, scales: tuple[int, ...] | None = None) -> Tokenizer:
        """Make the published tokenizer of what its file holds: see support/published.py.

        scales: the sides of the token maps, where they are not those of the published models.
        Raises ValueError for a file of anything else.
        """
        values, state = tokenizer_of(state_dict, scales)
        tokenizer = cls(TokenizerConfig(**values))
        tokenizer.load_state_dict(state)
        return tokenizer.eval()
