"""Images to tokens and back: the multi-scale tokenizer of VAR (arXiv 2404.02905, Sec. 3.2).

An encoder turns an image into a latent f: C channels on a grid of S x S. A codebook holds V codes,
vectors of C numbers that are learned; a token is the number of a code. A quantizer writes f as a
sum of K token maps, from 1 x 1 up to S x S, and a decoder makes an image of that sum:

    f_hat = 0                                       nothing is decided yet
    for every scale k, coarse to fine:
        residual = f - f_hat                        what the coarser scales left over
        tokens_k = nearest codes                    to its averages over a grid of s_k x s_k areas
        f_hat = f_hat + phi(upsampled codes)        the codes of tokens_k, interpolated to S x S

So every scale corrects the sum of those before it, and the first few maps alone are already an
image: the whole of it, blurred. That is the order in which the transformer will predict the maps.

Why phi? A coarse map reaches S x S by interpolation, which blurs: edges that the codes of a scale
stand for come out soft. phi, a small convolution, repairs what it can, and the scales after it
need not. How much there is to repair depends on the enlargement, so neighbouring scales share one
phi and distant ones do not.

Why does the transformer read f_hat to predict scale k+1, and not the tokens of scale k? There are
fewer of them than places to predict; and a token says only what its own scale corrected. f_hat is
everything decided so far, and can be read at any size.

Read `Quantizer` first. Its `accumulate` and `read` are the two steps of the loop above, and
encoding, decoding, teaching and generation are loops over the two.

Axes: B batch, C channels of the latent and of a code, S side of the latent, s side of one token
map, L tokens of all maps (coarse to fine, sum of s*s), l tokens of one map, V codebook size,
K number of scales, k one of them, 0 the coarsest.
"""
from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import full_precision, nearest_code

PUBLISHED_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)   # of the 256-pixel models
PHI_STRENGTH = 0.5    # phi(h) = (1 - strength) h + strength conv(h), as published
COMMITMENT = 0.25     # weight of moving the latent to its codes, against 1 for the codes to it
L1_WEIGHT = 0.2       # beside the squared error: keeps edges sharp where that is small already
HITS_MEMORY = 0.99    # how much of a code's hit count is carried over from one step to the next
DEAD_BELOW = 0.05     # a code that is hit less than this share of the average is dead
JUDGED_SIDE = 64      # a classifier sees larger images averaged down to this side


@dataclass(frozen=True)
class TokenizerConfig:
    """Everything that fixes the tokenizer's shape. Raises ValueError for what cannot be."""
    scales: tuple[int, ...]         # sides of the token maps, from 1 to the latent's side
    vocabulary: int                 # V
    code_channels: int              # C
    image_channels: int             # 3 for colour, 1 for grey
    width: int                      # channels at full resolution
    multipliers: tuple[int, ...]    # of the width, per resolution; each but the first halves it
    blocks: int                     # residual blocks per resolution; the decoder has one more
    phis: int                       # different phis, each shared by neighbouring scales
    norm_groups: int                # of the group norms

    def __post_init__(self):
        growing = all(b > a for a, b in zip(self.scales, self.scales[1:]))
        if not self.scales or self.scales[0] != 1 or not growing:
            raise ValueError(f"scales {self.scales} must start at 1 and grow")
        for multiplier in self.multipliers:
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
    """Repairs an upsampled map: phi(h) = h / 2 + conv(h) / 2 (paper: Sec. 3.2, implementation).

    The half that goes around the convolution keeps any phi, however trained, near what it got.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, h_BCSS: Tensor) -> Tensor:
        return torch.lerp(h_BCSS, super().forward(h_BCSS), PHI_STRENGTH)


class Quantizer(nn.Module):
    """A latent as a sum of K upsampled token maps (paper: Algorithms 1 and 2).

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
        # What training remembers of the codebook's use, for `revive`:
        self.register_buffer("hits_V", torch.ones(V))   # how often each code was hit of late
        self.new_hits_V: Tensor | int = 0    # hits since the last `remember`
        self.residuals: list[Tensor] = []    # of the last pass, one [B, l, C] for each scale

    def empty(self, batch: int) -> Tensor:
        """f_hat before any scale: zeros [B, C, S, S]."""
        S = self.scales[-1]
        return self.codebook_VC.new_zeros(batch, self.codebook_VC.shape[1], S, S)

    def accumulate(self, f_hat_BCSS: Tensor, tokens_Bl: Tensor, k: int) -> Tensor:
        """f_hat with scale k, given by its tokens, added to it.

        In fp32 also under autocast, and without TF32: a sum of ever smaller corrections needs the
        digits, and codes would change.
        """
        s = self.scales[k]
        S = self.scales[-1]
        phi = self.phis[self.phi_of_scale[k]]
        with torch.autocast(f_hat_BCSS.device.type, enabled=False), full_precision():
            h_BlC = F.embedding(tokens_Bl, self.codebook_VC)                # [B, l, C]
            h_BCss = h_BlC.transpose(1, 2).unflatten(2, (s, s))             # [B, C, s, s]
            h_BCSS = F.interpolate(h_BCss, size=(S, S), mode="bicubic")     # [B, C, S, S]
            return f_hat_BCSS + phi(h_BCSS)                                 # [B, C, S, S]

    def read(self, f_BCSS: Tensor, k: int) -> Tensor:
        """What scale k sees of a latent: vectors [B, l, C], each the average of an area."""
        s = self.scales[k]
        f_BCss = F.interpolate(f_BCSS, size=(s, s), mode="area")            # [B, C, s, s]
        return f_BCss.flatten(2).transpose(1, 2)                            # [B, l, C]

    def nearest(self, x_BlC: Tensor) -> Tensor:
        """Tokens [B, l] of vectors."""
        tokens_N = nearest_code(x_BlC.flatten(0, 1), self.codebook_VC)
        return tokens_N.view(x_BlC.shape[:2])

    def split(self, tokens_BL: Tensor) -> list[Tensor]:
        """One [B, l] view per scale.

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
        """Tokens [B, L] of a latent: each scale codes what the coarser ones left over."""
        f_hat_BCSS = self.empty(len(f_BCSS))
        tokens = []
        for k in range(len(self.scales)):
            residual_BlC = self.read(f_BCSS - f_hat_BCSS, k)
            tokens_Bl = self.nearest(residual_BlC)
            f_hat_BCSS = self.accumulate(f_hat_BCSS, tokens_Bl, k)
            tokens.append(tokens_Bl)
        return torch.cat(tokens, dim=1)

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """The latent [B, C, S, S] that tokens stand for."""
        f_hat_BCSS = self.empty(len(tokens_BL))
        for k, tokens_Bl in enumerate(self.split(tokens_BL)):
            f_hat_BCSS = self.accumulate(f_hat_BCSS, tokens_Bl, k)
        return f_hat_BCSS

    @torch.no_grad()
    def teacher_inputs(self, tokens_BL: Tensor) -> Tensor:
        """What the transformer reads for scales 2..K: f_hat after each scale, at the next's size.

        [B, L-1, C]. There is nothing to read for scale 1, which is predicted from the class.
        """
        f_hat_BCSS = self.empty(len(tokens_BL))
        inputs = [self.read(f_hat_BCSS, 0)[:, :0]]   # [B, 0, C], all there is if K is 1
        for k, tokens_Bl in enumerate(self.split(tokens_BL)[:-1]):
            f_hat_BCSS = self.accumulate(f_hat_BCSS, tokens_Bl, k)
            inputs.append(self.read(f_hat_BCSS, k + 1))
        return torch.cat(inputs, dim=1)

    # Training. The nearest code is a choice, and a choice has no gradient. So the encoder learns
    # from the image as if it had not been made (straight-through), and a loss of its own holds the
    # two sides together: codes move to the latents that chose them, and a latent moves, a quarter
    # as strongly, to the codes it chose. That second term is the commitment. Without it the
    # latents may run away from their codes for as long as the decoder can follow.

    def forward(self, f_BCSS: Tensor) -> tuple[Tensor, Tensor]:
        """The latent [B, C, S, S] as its tokens give it, and the codebook loss (sg: stop-gradient).

            L_vq = 1/K sum_k [ |f_hat_k - sg f|^2 + 0.25 |sg f_hat_k - f|^2 ]     (means)

        Every scale's running sum is held to the latent, so coarse scales carry what they can. In
        training mode the pass also counts which codes were hit, and keeps the residuals.
        """
        f_hat_BCSS = self.empty(len(f_BCSS))
        loss = 0.0
        tokens = []
        residuals = []
        for k in range(len(self.scales)):
            with torch.no_grad():
                residual_BlC = self.read(f_BCSS - f_hat_BCSS, k)            # [B, l, C]
                tokens_Bl = self.nearest(residual_BlC)                      # [B, l]
            f_hat_BCSS = self.accumulate(f_hat_BCSS, tokens_Bl, k)          # [B, C, S, S]
            to_latent = F.mse_loss(f_hat_BCSS, f_BCSS.detach())
            to_codes = F.mse_loss(f_hat_BCSS.detach(), f_BCSS)
            loss = loss + to_latent + COMMITMENT * to_codes
            residuals.append(residual_BlC)
            tokens.append(tokens_Bl)
        if self.training:
            tokens_N = torch.cat(tokens, dim=1).flatten()
            # On a GPU bincount would wait for the largest token, to know how many counts to make.
            counts_V = torch.zeros_like(self.hits_V, dtype=torch.int64)
            counts_V.scatter_add_(0, tokens_N, torch.ones_like(tokens_N))
            self.new_hits_V = self.new_hits_V + counts_V
            self.residuals = residuals
        # Straight-through: the value of f_hat, the gradient of f.
        straight_BCSS = f_BCSS + (f_hat_BCSS - f_BCSS).detach()             # [B, C, S, S]
        return straight_BCSS, loss / len(self.scales)

    # Codebook collapse: a code that is never the nearest gets no gradient, so it stays where it is
    # and will never be the nearest. A few codes that start well then take everything, for good.
    # Against that, codes start where residuals are, and dead ones are moved there later.

    @torch.no_grad()
    def start_from(self, f_BCSS: Tensor) -> None:
        """The first codebook: residuals of real latents, every scale giving an equal share.

        An equal share, because most residuals are those of the finest scales. Each scale leaves
        over what its codes and those of coarser scales, the only ones so far, cannot say.
        """
        V = len(self.codebook_VC)
        K = len(self.scales)
        f_hat_BCSS = self.empty(len(f_BCSS))
        for k in range(K):
            begin = math.ceil(V * k / K)
            end = math.ceil(V * (k + 1) / K)
            residual_NC = self.read(f_BCSS - f_hat_BCSS, k).flatten(0, 1)
            chosen = torch.randint(len(residual_NC), (end - begin,))
            self.codebook_VC[begin:end] = residual_NC[chosen]
            tokens_N = nearest_code(residual_NC, self.codebook_VC[:end])
            f_hat_BCSS = self.accumulate(f_hat_BCSS, tokens_N.view(len(f_BCSS), -1), k)

    @torch.no_grad()
    def remember(self) -> None:
        """Count the hits of a whole step, however many parts and processes computed it."""
        if dist.is_initialized():
            dist.all_reduce(self.new_hits_V)
        self.hits_V.lerp_(self.new_hits_V.to(self.hits_V), 1 - HITS_MEMORY)
        self.new_hits_V = 0

    @torch.no_grad()
    def revive(self, optimizer: torch.optim.Optimizer) -> int:
        """Move dead codes to where the residuals of the last pass are; returns how many there were.

        The scale of a residual is drawn first, each as likely, and then its place. Of all
        residuals most are those of the finest two scales, and the coarse ones would starve. A
        revived code starts with an average hit count, so it has time to find its place, and
        without the optimizer's memory of the code that it replaces.
        """
        average = self.hits_V.mean()
        dead_N = (self.hits_V < DEAD_BELOW * average).nonzero().flatten()
        scale_N = torch.randint(len(self.scales), dead_N.shape, device=dead_N.device)
        for k, residual_BlC in enumerate(self.residuals):
            residual_MC = over_processes(residual_BlC).flatten(0, 1)
            code_n = dead_N[scale_N == k]
            place_n = torch.randint(len(residual_MC), code_n.shape, device=code_n.device)
            self.codebook_VC[code_n] = residual_MC[place_n]
        self.hits_V[dead_N] = average
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[self.codebook_VC][name][dead_N] = 0
        return len(dead_N)


def over_processes(x_B: Tensor) -> Tensor:
    """The rows of all processes, the same in each: codebooks that draw from them stay alike."""
    if not dist.is_initialized():
        return x_B
    parts = [torch.empty_like(x_B) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x_B.contiguous())
    return torch.cat(parts)


def choose_phis(scales: int, phis: int) -> list[int]:
    """Which phi serves each scale: the one whose place in [0, 1] is nearest to k / (K-1).

    Published checkpoints fall on ties that rounding decides: hence this formula, in float64.
    """
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    places = np.linspace(margin, 1 - margin, phis)
    chosen = []
    for k in range(scales):
        place = k / max(scales - 1, 1)
        chosen.append(int(np.argmin(np.abs(places - place))))
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


class PixelAttention(nn.Module):
    """Every pixel attends to every pixel, with one head."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        qkv_BCHW = self.qkv(self.norm(x_BCHW))                            # [B, 3 C, H, W]
        qkv_B1NC = qkv_BCHW.flatten(2).transpose(1, 2).unsqueeze(1)       # [B, 1, H W, 3 C]
        q_B1NC, k_B1NC, v_B1NC = qkv_B1NC.chunk(3, dim=-1)                # [B, 1, H W, C]
        o_B1NC = F.scaled_dot_product_attention(q_B1NC, k_B1NC, v_B1NC)   # [B, 1, H W, C]
        o_BCHW = o_B1NC.squeeze(1).transpose(1, 2).view_as(x_BCHW)        # [B, C, H, W]
        return x_BCHW + self.out(o_BCHW)                                  # [B, C, H, W]


class Downsample(nn.Conv2d):
    """Half the side: a strided convolution, padded at the bottom and the right, as published."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Twice the side: each pixel four times, then a convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: its blocks, each followed by attention if it attends, then to the next."""

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
                self.attentions.append(PixelAttention(channels, groups))
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
        PixelAttention(channels, groups),
        ResidualBlock(channels, channels, groups),
    )


class Encoder(nn.Module):
    """Images [B, channels, side, side] to features [B, C, S, S]; level 0 is full resolution."""

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
            x = level(x)                                # half the side, more channels; at last
        x = self.middle(x)                              # [B, width * last multiplier, S, S]
        return self.conv_out(F.silu(self.norm_out(x)))  # [B, C, S, S]


class Decoder(nn.Module):
    """Features [B, C, S, S] to images: the encoder's way back, each level with one more block."""

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
        return self.conv_out(F.silu(self.norm_out(x)))  # [B, channels, side, side]


# -------------------------------------------------------------------------------------------------
# Losses that keep detail
#
# Where the latent does not tell what a patch of grass looks like in detail, the least squared error
# is that of the average of all it could be: a blur. Two other losses ask for detail, if not for the
# same. A perceptual distance compares what a network that knows images makes of the original and of
# the reconstruction, edges and textures, and not pixel with pixel. And a discriminator, trained at
# the same time, tells originals from reconstructions; the tokenizer is rewarded where it fails to.


def perceptual_distance(maps_x: list[Tensor], maps_y: list[Tensor]) -> Tensor:
    """How differently a network sees two batches of images (1801.03924, Eq. 1, all weights 1).

        sum over levels of the mean over places of |x / |x| - y / |y||^2     (over channels)

    maps: what each level makes of them, [B, channels, H, W].
    """
    total = 0.0
    for x_BCHW, y_BCHW in zip(maps_x, maps_y):
        difference_BCHW = unit(x_BCHW) - unit(y_BCHW)                       # [B, C, H, W]
        total = total + difference_BCHW.square().sum(dim=1).mean()
    return total


def unit(x_BCHW: Tensor) -> Tensor:
    """Every place's channels as a vector of length 1; near 0 where there is next to nothing."""
    x_BCHW = x_BCHW.float()
    return x_BCHW * (x_BCHW.square().sum(dim=1, keepdim=True) + 1e-6).rsqrt()


class Discriminator(nn.Module):
    """Which patches are of an original? PatchGAN (1611.07004): a logit for each of many overlapping
    patches, 38 pixels wide, above 0 for an original. Texture can be judged by so much, and the
    rest of the image is for the other losses."""

    def __init__(self, image_channels: int, width: int):
        super().__init__()
        widths = (image_channels, width, 2 * width, 4 * width)
        layers = []
        for i, (width_in, width_out) in enumerate(zip(widths, widths[1:])):
            layers.append(nn.Conv2d(width_in, width_out, 4, stride=2, padding=1))
            if i > 0:
                layers.append(nn.GroupNorm(1, width_out))   # no image sees another
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers)
        self.conv_out = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(images)             # [B, 4 width, side / 8, side / 8]
        return self.conv_out(x).float()     # [B, 1, side / 8, side / 8]

    def loss(self, originals: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Its own loss, which leaves the tokenizer alone, and the share of patches it has right.

            1/2 [max(0, 1 - D(x)) + max(0, 1 + D(y))]       the hinge: what is right by 1 is right
        """
        for_x = self(originals)
        for_y = self(reconstructions.detach())
        lost_x = F.relu(1 - for_x).mean()
        lost_y = F.relu(1 + for_y).mean()
        right_x = (for_x > 0).float().mean()
        right_y = (for_y <= 0).float().mean()
        return (lost_x + lost_y) / 2, (right_x + right_y) / 2

    def reward(self, reconstructions: Tensor) -> Tensor:
        """The tokenizer's adversarial loss, -D(y). It leaves the discriminator alone."""
        self.requires_grad_(False)
        loss = -self(reconstructions).mean()
        self.requires_grad_(True)
        return loss


class Classifier(nn.Module):
    """A network that knows a run's images, for a perceptual distance and for `sample.Judge`.

    Four convolutions, each but the first halving the side; the last one's map is averaged over
    places and normalised: these are the features. A linear layer makes logits of them. It is small,
    since it has to be trained within half a minute on two cores.
    """

    def __init__(self, channels: int, side: int, classes: int):
        """side: of the images before they are averaged down."""
        super().__init__()
        widths = (channels, 32, 64, 128, 128)
        strides = (1 if side <= JUDGED_SIDE // 2 else 2, 2, 2, 2)
        self.levels = nn.ModuleList()
        for width_in, width, stride in zip(widths, widths[1:], strides):
            self.levels.append(nn.Sequential(
                nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU()))
        self.normalise = nn.BatchNorm1d(widths[-1], affine=False)   # to mean 0 and variance 1
        self.head = nn.Linear(widths[-1], classes)

    def maps(self, images: Tensor) -> list[Tensor]:
        """What every level makes of images [B, channels, side, side], of any side."""
        maps = []
        for level in self.levels:
            images = level(images)
            maps.append(images)
        return maps

    def features(self, images: Tensor) -> Tensor:
        """[B, D]."""
        last_BDss = self.maps(averaged_down(images))[-1]
        return self.normalise(last_BDss.mean(dim=(2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        return self.head(self.features(images))


def averaged_down(images: Tensor) -> Tensor:
    """Float images as the classifier sees them: their side is JUDGED_SIDE at most."""
    if images.shape[-1] <= JUDGED_SIDE:
        return images
    return F.interpolate(images, size=(JUDGED_SIDE, JUDGED_SIDE), mode="area")


def balance(likeness: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """What to multiply the adversarial loss with, so that it pulls as much as the others do at the
    decoder's last layer (VQGAN, 2012.09841, Eq. 7). A tensor: nobody waits for its value.

        |gradient of likeness| / (|gradient of adversarial| + 1e-6)

    A discriminator that is sure has small gradients: 10,000 is the most. Several processes take
    the gradients of all their images; parts of a step each take their own.
    """
    norms = []
    for loss in (likeness, adversarial):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(average_over_processes(gradient).norm())
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=1e4)


def average_over_processes(x: Tensor) -> Tensor:
    """In place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


# -------------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer(nn.Module):
    """Images, float [B, channels, side, side] in [-1, 1], to tokens, int64 [B, L], and back."""

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

    def latent(self, images: Tensor) -> Tensor:
        """f [B, C, S, S]. Raises ValueError for images of a side that the scales do not fit."""
        side = self.config.image_side
        if images.shape[2:] != (side, side):
            raise ValueError(f"images are {tuple(images.shape[2:])}; scales {self.config.scales} "
                             f"at downsampling {self.config.downsampling} need {side} x {side}")
        return self.to_latent(self.encoder(images)).float()

    def render(self, f_BCSS: Tensor) -> Tensor:
        """A latent as images, not clamped."""
        dtype = self.from_latent.weight.dtype
        device = f_BCSS.device.type
        # In half precision autocast is not asked: it would compute norms in fp32.
        settled = dtype != torch.float32
        with torch.autocast(device, enabled=False) if settled else nullcontext():
            return self.decoder(self.from_latent(f_BCSS.to(dtype))).float()

    def settle_decoder(self, dtype: torch.dtype) -> None:
        """Decode in this dtype from now on, with the channels of a pixel side by side, as a GPU's
        convolutions want them. There is no way back, and no training, from half precision."""
        for part in (self.from_latent, self.decoder):
            part.to(dtype, memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images to tokens [B, L] (paper: Algorithm 1)."""
        return self.quantizer.encode(self.latent(images))

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Tokens to images (paper: Algorithm 2); of the first scales only: to images so far."""
        return self.render(self.quantizer.decode(tokens_BL)).clamp(-1, 1)

    def teacher_inputs(self, tokens_BL: Tensor) -> Tensor:
        """What the transformer reads for scales 2..K when it is taught on tokens: [B, L-1, C]."""
        return self.quantizer.teacher_inputs(tokens_BL)

    def forward(self, images: Tensor, quantize: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """One training pass: reconstructions, and the losses by name; `total` is to be minimised.

            likeness = |x - y|^2 + 0.2 |x - y|_1       (means over pixels)
            total = likeness + L_vq

        quantize: False trains the encoder and decoder alone.
        """
        f_BCSS = self.latent(images)                           # [B, C, S, S]
        codebook_loss = images.new_zeros(())
        if quantize:
            f_BCSS, codebook_loss = self.quantizer(f_BCSS)     # [B, C, S, S]
        reconstruction = self.render(f_BCSS)                   # [B, channels, side, side]
        mse = F.mse_loss(reconstruction, images)
        l1 = F.l1_loss(reconstruction, images)
        likeness = mse + L1_WEIGHT * l1
        losses = {
            "total": likeness + codebook_loss,
            "likeness": likeness,
            "mse": mse,
            "l1": l1,
            "codebook": codebook_loss,
        }
        return reconstruction, losses

    @torch.no_grad()
    def initialise(self) -> None:
        """Convolutions keep the size of a signal; residual branches are silent; phi does nothing.

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
            if isinstance(module, PixelAttention):
                nn.init.zeros_(module.out.weight)
            if isinstance(module, Phi):
                nn.init.dirac_(module.weight)

    @torch.no_grad()
    def health(self, batches: Iterable[Tensor]) -> dict:
        """Is the codebook alive? A list over the scales for each of these, and one number:

            psnr_per_scale         dB, of the images decoded from the scales up to this one
            codes_per_scale        how many codes the scale uses
            usage_per_scale        the same as a share of what it could use, min(V, its tokens)
            perplexity_per_scale   exp(entropy) of its codes: how many, if all were used alike
            codes_used             share of the codebook that is used by any scale

        batches: images on the tokenizer's device.
        """
        V = self.config.vocabulary
        K = len(self.config.scales)
        counts_KV = torch.zeros(K, V)
        errors_K = [0.0] * K
        pixels = 0
        for images in batches:
            f_hat_BCSS = self.quantizer.empty(len(images))
            tokens_BL = self.encode(images)
            for k, tokens_Bl in enumerate(self.quantizer.split(tokens_BL)):
                f_hat_BCSS = self.quantizer.accumulate(f_hat_BCSS, tokens_Bl, k)
                so_far = self.render(f_hat_BCSS).clamp(-1, 1)
                errors_K[k] += F.mse_loss(so_far, images, reduction="sum").item()
                counts_KV[k] += tokens_Bl.flatten().bincount(minlength=V).cpu()
            pixels += images.numel()
        codes_K = (counts_KV > 0).sum(dim=1)
        tokens_K1 = counts_KV.sum(dim=1, keepdim=True)
        most_K = tokens_K1.flatten().clamp(max=V)
        entropy_K = torch.special.entr(counts_KV / tokens_K1).sum(dim=1)
        return {
            "psnr_per_scale": [psnr(error / pixels) for error in errors_K],
            "codes_per_scale": codes_K.tolist(),
            "usage_per_scale": (codes_K / most_K).tolist(),
            "perplexity_per_scale": entropy_K.exp().tolist(),
            "codes_used": counts_KV.any(dim=0).sum().item() / V,
        }

    def fingerprint(self) -> str:
        """SHA-256 of config and weights: a transformer names the tokenizer that it learned from."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name, tensor in sorted(self.named_parameters()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor],
                      scales: tuple[int, ...] | None = None) -> Tokenizer:
        """The published tokenizer, from its state dict as downloaded.

        Its shape is read off the tensors. They tell how many scales there are but not their sides:
        ten are taken for those of the 256-pixel models, any other number K for 1..K; otherwise
        name them. Raises ValueError for a state dict of anything else.
        """
        if "quantize.embedding.weight" not in state_dict:
            raise ValueError("not a published VAR tokenizer: it has no quantize.embedding.weight")
        state = {rename(name): tensor for name, tensor in state_dict.items()}
        V, C = state["quantizer.codebook_VC"].shape
        hits_KV = state.pop("quantize.ema_vocab_hit_SV")   # of its training: only K is of use
        state["quantizer.hits_V"] = torch.ones(V)
        if scales is None and len(hits_KV) == len(PUBLISHED_SCALES):
            scales = PUBLISHED_SCALES
        elif scales is None:
            scales = range(1, len(hits_KV) + 1)
        width, image_channels = state["encoder.conv_in.weight"].shape[:2]
        levels = range(count(state, "encoder.levels"))
        widths = [len(state[f"encoder.levels.{i}.blocks.0.conv1.bias"]) for i in levels]
        tokenizer = cls(TokenizerConfig(
            scales=tuple(scales),
            vocabulary=V,
            code_channels=C,
            image_channels=image_channels,
            width=width,
            multipliers=tuple(w // width for w in widths),
            blocks=count(state, "encoder.levels.0.blocks"),
            phis=count(state, "quantizer.phis"),
            norm_groups=32,
        ))
        tokenizer.load_state_dict(state)
        return tokenizer.eval()


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB, of a mean squared error between images in [-1, 1]."""
    return 10 * math.log10(4 / max(mse, 1e-10))


def count(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbered modules a state dict has under a name."""
    start = prefix + "."
    under = [name.removeprefix(start) for name in state if name.startswith(start)]
    return len({name.split(".")[0] for name in under})


OFFICIAL_NAMES = [   # published name -> ours, applied in this order
    (r"\.(down|up)\.(\d+)\.(downsample|upsample)\.conv\.", r".levels.\2.resample."),
    (r"\.(down|up)\.(\d+)\.block\.", r".levels.\2.blocks."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".levels.\2.attentions."),
    (r"\.mid\.block_1\.", ".middle.0."),
    (r"\.mid\.attn_1\.", ".middle.1."),
    (r"\.mid\.block_2\.", ".middle.2."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.proj_out\.", ".out."),
    (r"^quant_conv\.", "to_latent."),
    (r"^post_quant_conv\.", "from_latent."),
    (r"^quantize\.embedding\.weight$", "quantizer.codebook_VC"),
    (r"^quantize\.quant_resi\.qresi_ls\.", "quantizer.phis."),   # several, of neighbouring scales
    (r"^quantize\.quant_resi\.qresi\.", "quantizer.phis.0."),    # one for all scales
    (r"^quantize\.quant_resi\.(\d)", r"quantizer.phis.\1"),      # one for each scale
]


def rename(name: str) -> str:
    for pattern, ours in OFFICIAL_NAMES:
        name = re.sub(pattern, ours, name)
    return name
