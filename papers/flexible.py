"""A tokenizer and a VAR of latents at many sides, and their trainings: the models of flexvar.py.

A map of s x s tokens stands for the latent itself, averaged down to s x s: nothing is subtracted
for coarser maps, and nothing added up. So each map alone is an image, of its own size; and its
tokens do not depend on which other maps there are. A list of sides to be drawn is a schedule; `of`
gives the same weights, for another one.
"""
from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kernels import KeyRanges
from papers import Trained
from papers.tuning import Tuning
from support.checkpoint import load_checkpoint
from support.data import Data, balanced_subset
from support.images import to_float
from support.losses import DetailLosses
from support.optim import adamw_and_muon
from support.presets import TokenizerPreset
from tokenizer import COMMITMENT, Quantizer, Tokenizer, TokenizerConfig, area_matrix
from train import HELD_OUT, L1_WEIGHT, Stage, TokenizerStage, tokens_of
from var import VAR, VARConfig

ranges_of = cache(KeyRanges.from_scales)


def resized(x_BCSS: Tensor, s: int) -> Tensor:
    """[B, C, s, s]: means of areas, or a bicubic where it grows."""
    S = x_BCSS.shape[-1]
    if s > S:
        return F.interpolate(x_BCSS, size=(s, s), mode="bicubic")
    area_sS = area_matrix(s, S).to(x_BCSS)
    with torch.autocast(x_BCSS.device.type, enabled=False):
        return area_sS @ x_BCSS @ area_sS.T


class FlexQuantizer(Quantizer):
    """Of f_hat there is the newest map alone, at the side that it has."""

    def __init__(self, config: TokenizerConfig):
        super().__init__(config)
        self.phis = nn.ModuleList()

    def of(self, scales: tuple[int, ...]) -> FlexQuantizer:
        other = copy.copy(self)
        other.scales = scales
        return other

    def accumulate(self, f_hat_BCSS: Tensor, tokens_Bl: Tensor, k: int) -> Tensor:
        """Return the codes [B, C, s, s] of scale k, which take the place of f_hat."""
        code_BlC = F.embedding(tokens_Bl, self.codebook_VC)
        return code_BlC.mT.unflatten(2, (self.scales[k], self.scales[k]))

    def read(self, f_BCSS: Tensor, k: int) -> Tensor:
        """Return a latent at the side of scale k: [B, l, C]."""
        return resized(f_BCSS, self.scales[k]).flatten(2).mT

    @torch.no_grad()
    def encode(self, f_BCSS: Tensor) -> Tensor:
        tokens = [self.nearest(self.read(f_BCSS, k)) for k in range(len(self.scales))]
        return torch.cat(tokens, dim=1)

    def forward(self, f_BCSS: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the latent at every side [B, C, s, s] as tokens give it, and the codebook loss,
        the mean over the sides."""
        maps = []
        tokens = []
        vectors = []
        loss = 0.0
        for k, s in enumerate(self.scales):
            x_BlC = self.read(f_BCSS, k)
            tokens_Bl = self.nearest(x_BlC.detach())
            code_BlC = F.embedding(tokens_Bl, self.codebook_VC)
            loss = loss + F.mse_loss(code_BlC, x_BlC.detach())
            loss = loss + COMMITMENT * F.mse_loss(code_BlC.detach(), x_BlC)
            straight_BlC = x_BlC + (code_BlC - x_BlC).detach()
            maps.append(straight_BlC.mT.unflatten(2, (s, s)))
            tokens.append(tokens_Bl)
            vectors.append(x_BlC.detach())
        if self.training:
            self.last_tokens_BL = torch.cat(tokens, dim=1)
            self.last_residuals = vectors
        return maps, loss / len(maps)

    @torch.no_grad()
    def start_from(self, f_BCSS: Tensor) -> None:
        """Fill the codebook with what is read at the sides, each giving an equal share."""
        shares = self.codebook_VC.tensor_split(len(self.scales))
        for k, share_nC in enumerate(shares):
            x_NC = self.read(f_BCSS, k).flatten(0, 1)
            share_nC.copy_(x_NC[torch.randint(len(x_NC), share_nC.shape[:1])])


class FlexTokenizer(Tokenizer):
    """It is trained with scales of all sides."""

    def __init__(self, config: TokenizerConfig):
        super().__init__(config)
        self.quantizer = FlexQuantizer(config)

    def of(self, scales: tuple[int, ...]) -> FlexTokenizer:
        other = copy.deepcopy(self)
        other.config = replace(self.config, scales=scales)
        other.quantizer.scales = scales
        return other

    def forward(self, images: Tensor, quantize: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Return reconstructions, and the losses by name. "smaller" is the error of a smaller map's
        image, any one's, against the averages of the original."""
        f_BCSS = self.latent(images)
        codebook_loss = images.new_zeros(())
        maps = [resized(f_BCSS, s) for s in self.config.scales]
        if quantize:
            maps, codebook_loss = self.quantizer(f_BCSS)
        reconstruction = self.render(maps[-1])
        some = maps[torch.randint(len(maps) - 1, ()).item()]
        small = self.render(some)
        target = resized(images, small.shape[-1])
        return reconstruction, {
            "mse": F.mse_loss(reconstruction, images),
            "l1": F.l1_loss(reconstruction, images),
            "codebook": codebook_loss,
            "smaller": F.mse_loss(small, target) + L1_WEIGHT * F.l1_loss(small, target),
        }


class FlexVAR(VAR):
    """Where a token is, is read off one grid, averaged down to the side of its map."""

    def __init__(self, config: VARConfig):
        super().__init__(config)
        del self.position_1LW, self.level_embedding
        self.position_1WSS = nn.Parameter(waves(config.width, 2 * config.scales[-1]))

    def of(self, scales: tuple[int, ...]) -> FlexVAR:
        other = copy.copy(self)
        other.config = replace(self.config, scales=scales)
        other.ranges = ranges_of(scales)
        return other

    def places(self) -> Tensor:
        maps = [resized(self.position_1WSS, s).flatten(2).mT for s in self.config.scales]
        return torch.cat(maps, dim=1)                                       # [1, L, W]


def waves(W: int, side: int) -> Tensor:
    """Half of the channels tell the row and half the column, by sines and cosines of one half to
    side / 4 periods: [1, W, side, side], about as large as VAR's own positions are at first."""
    place_S = (torch.arange(side) + 0.5) / side
    frequency_F1 = torch.logspace(0, math.log2(side / 2), math.ceil(W / 4), base=2)[:, None]
    angle_FS = math.pi * frequency_F1 * place_S
    wave_XS = torch.cat([angle_FS.sin(), angle_FS.cos()]) / math.sqrt(W)
    rows_XSS = wave_XS[:, :, None].expand(-1, -1, side)
    both_WSS = torch.cat([rows_XSS, rows_XSS.mT])[:W]
    return both_WSS[None]


class FlexTokenizerStage(TokenizerStage):
    """Trains a FlexTokenizer as the run's own was, on the images that the run kept."""

    def __init__(self, run: Trained, steps: int):
        sides = tuple(range(1, run.model.config.scales[-1] + 1))
        preset = replace(run.settings.preset, scales=sides, tokenizer_steps=steps)
        settings = replace(run.settings, preset=preset, out=run.folder / "papers" / "flexvar")
        machine = run.machine
        kept = load_checkpoint(run.folder / "train_images.pt", "set of training images")
        train = TensorDataset(kept["images"], kept["labels"])
        data = Data(train, run.held_out, run.classes, kept["data_set"])
        self.quantized_from = int(preset.unquantized * steps)
        self.adversarial_from = int(preset.adversarial_from * steps)
        self.images = to_float(run.held_out.tensors[0][balanced_subset(run.held_out, HELD_OUT)])
        torch.manual_seed(run.settings.seed)
        shape = preset.tokenizer_shape(data.channels)
        model = FlexTokenizer(TokenizerConfig(**shape)).to(machine.device)
        detail = DetailLosses(preset, data.channels, len(run.classes)).to(machine.device)
        layers = nn.ModuleList([model.encoder, model.decoder])
        optimizers = adamw_and_muon(
            model, layers, preset.tokenizer_lr, 0.0, preset.muon, machine.dtype)
        self.hits_V = torch.zeros_like(model.quantizer.hits_V, dtype=torch.int64)
        Stage.__init__(
            self, model, optimizers + detail.optimizers(), train, steps, preset.tokenizer_batch,
            0.0, preset.of(TokenizerPreset), data, settings, detail)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor):
        loss, to_log = super().loss(model, images, labels)
        return loss + to_log()["smaller"], to_log

    def finish(self, log) -> None:
        """Nothing: health is of maps that add up."""


class FlexTuning(Tuning):
    """Every batch has another schedule, of 3 to 5 scales."""

    def loss(self, model: FlexVAR, tokens_BL: Tensor, labels_B: Tensor):
        tokens_BL, labels_B = self.on_device(tokens_BL, labels_B)
        scales = drawn_schedule(self.tokenizer.config.scales)
        maps = self.tokenizer.quantizer.split(tokens_BL)
        tokens_Bl = torch.cat([maps[s - 1] for s in scales], dim=1)
        inputs = self.tokenizer.quantizer.of(scales).teacher_inputs(tokens_Bl)
        logits_BlV = model.of(scales)(labels_B, inputs).float()
        return F.cross_entropy(logits_BlV.mT, tokens_Bl), dict


def drawn_schedule(sides: tuple[int, ...]) -> tuple[int, ...]:
    """1, one to three of the sides between, and the last."""
    first, *between, last = sides
    count = 1 + torch.randint(3, ()).item()
    chosen = torch.randperm(len(between))[:count].tolist()
    return first, *sorted(between[i] for i in chosen), last


def flexible(run: Trained, tokenizer_steps: int, steps: int) -> Trained:
    """The run with a tokenizer and a transformer that are trained here, for all schedules."""
    stage = FlexTokenizerStage(run, tokenizer_steps)
    tokenizer = stage.run()
    flex = replace(run, tokenizer=tokenizer, folder=stage.settings.out)
    tokens_of(tokenizer, stage.data, stage.settings)   # kept in the folder, where Tuning looks
    torch.manual_seed(run.settings.seed)
    model = FlexVAR(replace(run.model.config, scales=tokenizer.config.scales))
    model.to(run.machine.device)
    lr = run.settings.preset.var_lr
    return replace(flex, model=FlexTuning(flex, model, "var", steps, lr).run())
