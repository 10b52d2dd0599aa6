"""Images to tokens and back: the multi-scale residual VQ autoencoder of VAR (arXiv 2404.02905, Sec. 3.2).

Read `Quantizer` first: its `accumulate` and `read` are the whole idea, and everything else loops over the two.
An image becomes a latent f [C, S, S]; the quantizer writes f as a sum of K ever finer token maps, each holding what
the coarser ones left over; the decoder turns that sum back into an image.

Axes: B batch, C channels of the latent and of a code, S side of the latent, s side of one token map, L tokens of
all maps (coarse to fine, sum of s*s), l tokens of one map, V codebook size, K number of scales.
"""
from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import nearest_code

PUBLISHED_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)   # of the 256-pixel models
PHI_STRENGTH = 0.5          # phi(h) = (1 - strength) h + strength conv(h), as published
COMMITMENT = 0.25           # weight of pulling the latent to its codes, against 1 for pulling the codes to it
L1_WEIGHT = 0.2             # beside the squared error: keeps edges sharp where the squared error is already small
HITS_MEMORY = 0.99          # how much of a code's hit count is carried over from one step to the next
DEAD_BELOW = 0.05           # a code hit less than this share of the average is dead


@dataclass(frozen=True)
class TokenizerConfig:
    """Everything that fixes the tokenizer's shape; `Tokenizer.from_official` reads the published one off its tensors."""
    scales: tuple[int, ...]         # sides of the token maps, from 1 to the latent's side
    vocabulary: int                 # V
    code_channels: int              # C
    image_channels: int             # 3 for colour, 1 for grey
    width: int                      # channels at full resolution
    multipliers: tuple[int, ...]    # of the width, per resolution; each but the first halves the side
    blocks: int                     # residual blocks per resolution (the decoder has one more)
    phis: int                       # distinct phi convolutions, shared by neighbouring scales
    norm_groups: int                # of the group norms

    def __post_init__(self):
        check_scales(self.scales)
        for multiplier in self.multipliers:
            if self.width * multiplier % self.norm_groups:
                raise ValueError(f"width {self.width} times {multiplier} is not divisible by {self.norm_groups} groups")

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    @property
    def image_side(self) -> int:
        return self.scales[-1] * self.downsampling


def check_scales(scales: tuple[int, ...]) -> None:
    """Raises ValueError unless the scales start at 1 and grow."""
    if not scales or scales[0] != 1 or any(b <= a for a, b in zip(scales, scales[1:])):
        raise ValueError(f"scales {tuple(scales)} must start at 1 and grow")


# ---------------------------------------------------------------------------------------------------------------
# The multi-scale residual quantizer


class Quantizer(nn.Module):
    """A latent as a sum of K upsampled token maps (paper: Algorithms 1 and 2).

        accumulate: f_hat_k = f_hat_{k-1} + phi_k(upsample(codebook[tokens_k]))
        read:       area-downsample to s_k x s_k: the residual, when encoding; f_hat, when predicting
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.scales, V, C = config.scales, config.vocabulary, config.code_channels
        self.codebook_VC = nn.Parameter(torch.zeros(V, C))   # `start_from` fills it
        self.phis = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(config.phis))   # identity at first
        self.phi_of_scale = choose_phis(len(self.scales), config.phis)
        # Kept while training, for `revive`:
        self.register_buffer("hits_V", torch.ones(V))   # how often each code was hit of late
        self.new_hits_V: Tensor | int = 0               # hits since the last `remember`
        self.residuals: list[Tensor] = []               # what the last pass had to code, scale by scale

    def empty(self, batch: int) -> Tensor:
        """f_hat before any scale: zeros [B, C, S, S]."""
        return self.codebook_VC.new_zeros(batch, self.codebook_VC.shape[1], self.scales[-1], self.scales[-1])

    def accumulate(self, f_hat_BCSS: Tensor, tokens_Bl: Tensor, k: int) -> Tensor:
        """Add scale k, given by its tokens, to the running latent; in fp32, as sums of small differences need."""
        s, S = self.scales[k], self.scales[-1]
        with torch.autocast(f_hat_BCSS.device.type, enabled=False):
            h_BCss = F.embedding(tokens_Bl, self.codebook_VC).transpose(1, 2).unflatten(2, (s, s))
            h_BCSS = h_BCss if s == S else F.interpolate(h_BCss, size=(S, S), mode="bicubic")
            phi = self.phis[self.phi_of_scale[k]]
            return f_hat_BCSS + torch.lerp(h_BCSS, phi(h_BCSS), PHI_STRENGTH)

    def read(self, f_BCSS: Tensor, k: int) -> Tensor:
        """What scale k sees of a latent: vectors [B, l, C]."""
        s, S = self.scales[k], self.scales[-1]
        f_BCss = f_BCSS if s == S else F.interpolate(f_BCSS, size=(s, s), mode="area")
        return f_BCss.flatten(2).transpose(1, 2)

    def nearest(self, x_BlC: Tensor) -> Tensor:
        """Tokens [B, l] of vectors."""
        return nearest_code(x_BlC.flatten(0, 1), self.codebook_VC).view(x_BlC.shape[:2])

    def split(self, tokens_BL: Tensor) -> list[Tensor]:
        """One [B, l] view per scale. Fewer tokens are fine if they end with a scale: then there are fewer maps."""
        sizes = [s * s for s in self.scales]
        while sum(sizes) > tokens_BL.shape[1]:
            sizes.pop()
        if sum(sizes) != tokens_BL.shape[1]:
            raise ValueError(f"{tokens_BL.shape[1]} tokens are no whole number of the scales {self.scales}")
        return list(tokens_BL.split(sizes, dim=1))

    @torch.no_grad()
    def encode(self, f_BCSS: Tensor) -> Tensor:
        """Tokens [B, L] of a latent: each scale takes the codes nearest to what the coarser scales left over."""
        f_hat_BCSS, tokens = self.empty(len(f_BCSS)), []
        for k in range(len(self.scales)):
            tokens.append(self.nearest(self.read(f_BCSS - f_hat_BCSS, k)))
            f_hat_BCSS = self.accumulate(f_hat_BCSS, tokens[-1], k)
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
        """What the transformer reads for scales 2..K, [B, L-1, C]: f_hat after each scale, at the next one's size."""
        f_hat_BCSS, inputs = self.empty(len(tokens_BL)), []
        for k, tokens_Bl in enumerate(self.split(tokens_BL)[:-1]):
            f_hat_BCSS = self.accumulate(f_hat_BCSS, tokens_Bl, k)
            inputs.append(self.read(f_hat_BCSS, k + 1))
        if not inputs:   # a single scale is predicted from the class alone
            return self.codebook_VC.new_zeros(len(tokens_BL), 0, self.codebook_VC.shape[1])
        return torch.cat(inputs, dim=1)

    def forward(self, f_BCSS: Tensor) -> tuple[Tensor, Tensor]:
        """Training: the quantized latent, its gradient passed straight through to f, and the codebook loss.

            L_vq = 1/K sum_k [ |f_hat_k - sg f|^2 + 0.25 |sg f_hat_k - f|^2 ]

        Every scale's running sum is held to the latent, so coarse scales carry as much as they can.
        """
        target_BCSS, f_hat_BCSS = f_BCSS.detach(), self.empty(len(f_BCSS))
        loss, residuals, tokens = 0.0, [], []
        for k in range(len(self.scales)):
            residuals.append(self.read(target_BCSS - f_hat_BCSS.detach(), k))
            tokens.append(self.nearest(residuals[-1]))
            f_hat_BCSS = self.accumulate(f_hat_BCSS, tokens[-1], k)
            loss = loss + F.mse_loss(f_hat_BCSS, target_BCSS) + COMMITMENT * F.mse_loss(f_hat_BCSS.detach(), f_BCSS)
        if self.training:
            hits_V = torch.bincount(torch.cat(tokens, dim=1).flatten(), minlength=len(self.hits_V))
            self.new_hits_V = self.new_hits_V + hits_V
            self.residuals = residuals
        return f_BCSS + (f_hat_BCSS - f_BCSS).detach(), loss / len(self.scales)

    @torch.no_grad()
    def start_from(self, f_BCSS: Tensor) -> None:
        """The first codebook: residuals of real latents, every scale giving an equal share of the codes.

        Codes drawn from N(0, 1), or all near zero, are far from most residuals: a handful of them wins every time,
        for good. These are where the residuals are, of the coarse scales too, from the first quantized step on.
        """
        V, K = len(self.codebook_VC), len(self.scales)
        f_hat_BCSS, self.codebook_VC[:] = self.empty(len(f_BCSS)), 1e4   # far away: no code yet
        for k in range(K):
            residual_BlC = self.read(f_BCSS - f_hat_BCSS, k)
            residual_NC, begin, end = residual_BlC.flatten(0, 1), V * k // K, V * (k + 1) // K
            self.codebook_VC[begin:end] = residual_NC[torch.randint(len(residual_NC), (end - begin,))]
            f_hat_BCSS = self.accumulate(f_hat_BCSS, self.nearest(residual_BlC), k)

    @torch.no_grad()
    def remember(self) -> None:
        """Count the hits of a whole step, however many parts and processes computed it."""
        if dist.is_initialized():
            dist.all_reduce(self.new_hits_V)
        self.hits_V.mul_(HITS_MEMORY).add_(self.new_hits_V, alpha=1 - HITS_MEMORY)
        self.new_hits_V = 0

    @torch.no_grad()
    def revive(self, optimizer: torch.optim.Optimizer) -> int:
        """Move codes that nothing chooses to where the residuals of the last pass are; returns how many.

        A residual's scale is drawn first, each alike, and then its place: drawn from all residuals alike, nine in ten
        would come from the finest two scales, and the coarse ones would starve. A revived code starts with an average
        hit count, so it has time to find its place, and without the momentum of the code it replaces.
        """
        average = self.hits_V.mean()
        dead_N = (self.hits_V < DEAD_BELOW * average).nonzero().flatten()
        scale_N = torch.randint(len(self.scales), dead_N.shape, device=dead_N.device)
        for k, residual_BlC in enumerate(map(over_processes, self.residuals)):
            chosen_n = dead_N[scale_N == k]
            place_n = torch.randint(residual_BlC.shape[:2].numel(), chosen_n.shape, device=dead_N.device)
            self.codebook_VC[chosen_n] = residual_BlC.flatten(0, 1)[place_n]
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
    """Which phi serves each scale: the one whose place in [0, 1] is nearest to the scale's own (k / (K-1)).

    NumPy float64 with this very formula, because published checkpoints fall on ties that rounding decides.
    """
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    places = np.linspace(margin, 1 - margin, phis)
    return [int(np.argmin(np.abs(places - k / max(scales - 1, 1)))) for k in range(scales)]


# ---------------------------------------------------------------------------------------------------------------
# Encoder and decoder


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

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
        qkv_B1NC = self.qkv(self.norm(x_BCHW)).flatten(2).transpose(1, 2).unsqueeze(1)
        o_B1NC = F.scaled_dot_product_attention(*qkv_B1NC.chunk(3, dim=-1))
        return x_BCHW + self.out(o_B1NC.squeeze(1).transpose(1, 2).view_as(x_BCHW))


class Downsample(nn.Conv2d):
    """Half the side: a strided convolution, padded at the bottom and the right only, as published."""

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
    """The blocks of one resolution, each followed by attention at the lowest one, then the way to the next."""

    def __init__(self, channels_in: int, channels: int, blocks: int, groups: int, attends: bool, resample: nn.Module):
        super().__init__()
        widths = [channels_in] + [channels] * blocks
        self.blocks = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in zip(widths, widths[1:]))
        self.attentions = nn.ModuleList(PixelAttention(channels, groups) for _ in range(blocks if attends else 0))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        return self.resample(x)


def middle(channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels, channels, groups), PixelAttention(channels, groups),
                         ResidualBlock(channels, channels, groups))


class Encoder(nn.Module):
    """Images [B, channels, side, side] to features [B, C, S, S]; level 0 is full resolution."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        lowest, groups = len(widths) - 1, config.norm_groups
        self.conv_in = nn.Conv2d(config.image_channels, config.width, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(widths[max(i - 1, 0)] if i else config.width, width, config.blocks, groups, attends=i == lowest,
                  resample=nn.Identity() if i == lowest else Downsample(width))
            for i, width in enumerate(widths))
        self.middle = middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.code_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Features [B, C, S, S] to images: the encoder's way back, each level with one more block."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        lowest, groups = len(widths) - 1, config.norm_groups
        self.conv_in = nn.Conv2d(config.code_channels, widths[-1], 3, padding=1)
        self.middle = middle(widths[-1], groups)
        self.levels = nn.ModuleList(
            Level(widths[min(i + 1, lowest)], width, config.blocks + 1, groups, attends=i == lowest,
                  resample=Upsample(width) if i else nn.Identity())
            for i, width in enumerate(widths))
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.conv_in(x))
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


# ---------------------------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer(nn.Module):
    """Images are float [B, channels, side, side] in [-1, 1]; tokens are int64 [B, L], scales coarse to fine."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config, C = config, config.code_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.to_latent = nn.Conv2d(C, C, 3, padding=1)
        self.from_latent = nn.Conv2d(C, C, 3, padding=1)
        self.quantizer = Quantizer(config)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Convolutions that keep the size of what passes through; residual branches silent; phi as the identity.

        PyTorch's default shrinks a signal by sqrt(3) per layer, and cost a small tokenizer 4 dB after 300 steps
        (without quantization, PSNR 19.9 against 24.0, one seed). Silent branches leave a plain path for colour to find. A
        random phi is noise added to every code.
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
        for phi in self.quantizer.phis:
            nn.init.dirac_(phi.weight)

    def latent(self, images: Tensor) -> Tensor:
        """f [B, C, S, S]. Raises ValueError for images of any other side than the scales stand for."""
        side = self.config.image_side
        if images.shape[2:] != (side, side):
            raise ValueError(f"images are {tuple(images.shape[2:])}; scales {self.config.scales} at "
                             f"downsampling {self.config.downsampling} need {side} x {side}")
        return self.to_latent(self.encoder(images)).float()

    def render(self, f_BCSS: Tensor) -> Tensor:
        """A latent as images, not clamped."""
        return self.decoder(self.from_latent(f_BCSS))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images to tokens [B, L] (paper: Algorithm 1)."""
        return self.quantizer.encode(self.latent(images))

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Tokens to images (paper: Algorithm 2). Tokens of the coarser scales alone give the image so far."""
        return self.render(self.quantizer.decode(tokens_BL)).float().clamp(-1, 1)

    def teacher_inputs(self, tokens_BL: Tensor) -> Tensor:
        """What the transformer reads for scales 2..K when it is taught on tokens: [B, L-1, C]."""
        return self.quantizer.teacher_inputs(tokens_BL)

    def forward(self, images: Tensor, quantize: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """One training pass: reconstructions, and the losses by name; `total` is the one to minimise.

            total = |x - y|^2 + 0.2 |x - y|_1 + L_vq       (means over pixels)

        quantize: False trains the encoder and decoder alone.
        """
        f_BCSS, codebook_loss = self.latent(images), images.new_zeros(())
        if quantize:
            f_BCSS, codebook_loss = self.quantizer(f_BCSS)
        reconstruction = self.render(f_BCSS).float()
        mse, l1 = F.mse_loss(reconstruction, images), F.l1_loss(reconstruction, images)
        total = mse + L1_WEIGHT * l1 + codebook_loss
        return reconstruction, {"total": total, "mse": mse, "l1": l1, "codebook": codebook_loss}

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], scales: tuple[int, ...] | None = None) -> Tokenizer:
        """The published tokenizer, from its state dict as downloaded; its shape is read off the tensors.

        They tell how many scales there are but not their sides: ten are taken for those of the 256-pixel models,
        any other number K for 1..K; otherwise name them. Raises ValueError for a state dict of anything else.
        """
        if "quantize.embedding.weight" not in state_dict:
            raise ValueError("not a published VAR tokenizer: it has no quantize.embedding.weight")
        state = {rename(name): tensor for name, tensor in state_dict.items() if "ema_vocab_hit" not in name}
        V, C = state["quantizer.codebook_VC"].shape
        state["quantizer.hits_V"] = torch.ones(V)
        if scales is None:
            K = len(state_dict["quantize.ema_vocab_hit_SV"])
            scales = PUBLISHED_SCALES if K == len(PUBLISHED_SCALES) else tuple(range(1, K + 1))
        width, image_channels = state["encoder.conv_in.weight"].shape[:2]
        levels = count(state, "encoder.levels")
        tokenizer = cls(TokenizerConfig(
            scales=tuple(scales), vocabulary=V, code_channels=C, image_channels=image_channels, width=width,
            multipliers=tuple(len(state[f"encoder.levels.{i}.blocks.0.conv1.bias"]) // width for i in range(levels)),
            blocks=count(state, "encoder.levels.0.blocks"), phis=count(state, "quantizer.phis"), norm_groups=32))
        tokenizer.load_state_dict(state)
        return tokenizer.eval()


def count(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbered modules a state dict has under a name."""
    return len({name[len(prefix):].split(".")[1] for name in state if name.startswith(prefix + ".")})


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
    (r"^quantize\.quant_resi\.qresi_ls\.", "quantizer.phis."),     # several, shared by neighbouring scales
    (r"^quantize\.quant_resi\.qresi\.", "quantizer.phis.0."),      # one for all scales
    (r"^quantize\.quant_resi\.(\d)", r"quantizer.phis.\1"),        # one for each scale
]


def rename(name: str) -> str:
    for pattern, ours in OFFICIAL_NAMES:
        name = re.sub(pattern, ours, name)
    return name
