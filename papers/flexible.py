"""A tokenizer and a VAR of latents at all sides, and the training of the first: for flexvar.py."""
from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import KeyRanges
from papers import Trained
from papers.tuning import kept_images
from support.checkpoint import fingerprint
from tokenizer import COMMITMENT, L1_WEIGHT, Quantizer, Tokenizer, area_matrix
from train import TokenizerStage
from var import VAR


def resized(x_BCSS: Tensor, s: int) -> Tensor:
    """[B, C, s, s]: the means of areas, or a bicubic where it grows."""
    if s > x_BCSS.shape[-1]:
        return F.interpolate(x_BCSS, size=(s, s), mode="bicubic")
    area_sS = area_matrix(s, x_BCSS.shape[-1]).to(x_BCSS)
    with torch.autocast(x_BCSS.device.type, enabled=False):
        return area_sS @ x_BCSS @ area_sS.T


def of(run: Trained, scales: tuple[int, ...]) -> Trained:
    """The run with the same weights, for other scales."""
    shared = run.tokenizer.encoder, run.tokenizer.decoder   # which stay as they are
    tokenizer = copy.deepcopy(run.tokenizer, {id(part): part for part in shared})
    tokenizer.config = replace(tokenizer.config, scales=scales)
    tokenizer.quantizer.scales = scales
    model = copy.copy(run.model)
    model.config = replace(model.config, scales=scales)
    model.ranges = KeyRanges.from_scales(scales, model.config.last_scales)
    return replace(run, tokenizer=tokenizer, model=model)


def left_out(run: Trained, k: int) -> Trained:
    """A run of VAR, weights and all, without one of its scales."""
    config = run.model.config
    rest = [i for i in range(len(config.scales)) if i != k]
    positions_1LW = torch.cat([run.model.positions()[:, config.spans[i]] for i in rest], dim=1)
    part = of(run, tuple(config.scales[i] for i in rest))
    part.model.positions = lambda: positions_1LW
    quantizer = part.tokenizer.quantizer
    quantizer.areas_XS = torch.cat([quantizer.areas_XS.split(config.scales)[i] for i in rest])
    quantizer.phi_of_scale = [quantizer.phi_of_scale[i] for i in rest]
    return part


class FlexQuantizer(Quantizer):
    """Each map is the latent itself, averaged down; f_hat is the newest one, and no sum."""

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
        """Return each side's map as its tokens give it, and the codebook loss, a mean of theirs."""
        self.last_tokens_BL = self.encode(f_BCSS)
        asked = [resized(f_BCSS, s) for s in self.scales]
        self.last_residuals = [x_BCss.detach().flatten(2).mT for x_BCss in asked]
        loss = 0.0
        straight = []
        for k, (x, tokens_Bl) in enumerate(zip(asked, self.split(self.last_tokens_BL))):
            code = self.accumulate(f_BCSS, tokens_Bl, k)
            loss = loss + F.mse_loss(code, x.detach()) + COMMITMENT * F.mse_loss(code.detach(), x)
            straight.append(x + (code - x).detach())   # straight-through
        return straight, loss / len(straight)

    @torch.no_grad()
    def start_from(self, f_BCSS: Tensor) -> None:
        """Fill the codebook with what is read at the sides, each giving an equal share."""
        for k, share_nC in enumerate(self.codebook_VC.tensor_split(len(self.scales))):
            x_NC = self.read(f_BCSS, k).flatten(0, 1)
            share_nC.copy_(x_NC[torch.randint(len(x_NC), share_nC.shape[:1])])


class FlexTokenizer(Tokenizer):
    """A tokenizer whose scales are all sides. TokenizerTuning makes it of one of VAR's."""

    def forward(self, images: Tensor, quantize: bool = True, _=None) -> tuple[Tensor, dict]:
        """Return reconstructions and losses; "smaller" is of a smaller map's image, any one's."""
        f_BCSS = self.latent(images)
        maps, codebook_loss = [resized(f_BCSS, s) for s in self.config.scales], f_BCSS.new_zeros(())
        if quantize:
            maps, codebook_loss = self.quantizer(f_BCSS)
        result = self.render(maps[-1])
        small = self.render(maps[torch.randint(len(maps) - 1, ())])
        target = resized(images, small.shape[-1])
        return result, {
            "mse": F.mse_loss(result, images),
            "l1": F.l1_loss(result, images),
            "codebook": codebook_loss,
            "smaller": F.mse_loss(small, target) + L1_WEIGHT * F.l1_loss(small, target),
        }


class FlexVAR(VAR):
    """A VAR, with its weights; but its positions are one map, resized, and levels it has none."""

    def __init__(self, plain: VAR):
        super().__init__(plain.config)
        finest_1lW = plain.positions()[:, plain.config.spans[-1]].detach()
        del self.position_1LW, self.level_embedding
        self.load_state_dict(plain.state_dict(), strict=False)
        self.position_1WSS = nn.Parameter(finest_1lW.mT.unflatten(2, 2 * plain.config.scales[-1:]))
        self.to(finest_1lW.device)

    def positions(self) -> Tensor:
        maps = [resized(self.position_1WSS, s).flatten(2).mT for s in self.config.scales]
        return torch.cat(maps, dim=1)                                       # [1, L, W]


class TokenizerTuning(TokenizerStage):
    """Trains a FlexTokenizer on a run's images, from its weights but for codes, or anew."""

    def __init__(self, run: Trained, steps: int, anew: bool = False):
        sides = tuple(range(1, run.model.config.scales[-1] + 1))
        preset = replace(
            run.settings.preset, scales=sides, tokenizer_steps=steps, smaller_weight=0.0)
        out = run.folder / "papers" / ("flexvar-tokenizer" + "-anew" * anew)
        super().__init__(kept_images(run), replace(run.settings, preset=preset, out=out))
        first = self.model if anew else run.tokenizer
        self.made_with["first weights"] = fingerprint(first)
        self.quantized_from *= anew   # an encoder that is trained needs no steps without codes
        for tokenizer in (self.model, self.ema):   # the same tensors, read by other code
            tokenizer.load_state_dict(first.state_dict())
            tokenizer.__class__ = FlexTokenizer
            tokenizer.quantizer.__class__ = FlexQuantizer

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor):
        loss, to_log = super().loss(model, images, labels)
        return loss + to_log()["smaller"], to_log

    def finish(self, log) -> None:
        """Nothing: the health of a tokenizer is that of maps that add up."""
