"""A tokenizer and a VAR of latents at all sides, and the tokenizer's training: for flexvar.py.

Each map of s x s tokens is the latent itself, averaged down to s x s: nothing is subtracted for the
coarser maps, and nothing added up. So it is an image of its own, of its own size, and its tokens do
not depend on which other maps there are.
"""
from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kernels import KeyRanges
from papers import Trained
from support.checkpoint import fingerprint, load_checkpoint
from support.data import Data
from tokenizer import COMMITMENT, Quantizer, Tokenizer, area_matrix
from train import L1_WEIGHT, TokenizerStage
from var import VAR


def resized(x_BCSS: Tensor, s: int) -> Tensor:
    """[B, C, s, s]: the means of areas, or a bicubic where it grows."""
    S = x_BCSS.shape[-1]
    if s > S:
        return F.interpolate(x_BCSS, size=(s, s), mode="bicubic")
    area_sS = area_matrix(s, S).to(x_BCSS)
    with torch.autocast(x_BCSS.device.type, enabled=False):
        return area_sS @ x_BCSS @ area_sS.T


def of(run: Trained, scales: tuple[int, ...]) -> Trained:
    """The run with the same weights, for other scales."""
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.config = replace(tokenizer.config, scales=scales)
    tokenizer.quantizer.scales = scales
    model = copy.copy(run.model)
    model.config = replace(model.config, scales=scales)
    model.ranges = KeyRanges.from_scales(scales, model.config.last_scales)
    return replace(run, tokenizer=tokenizer, model=model)


class FlexQuantizer(Quantizer):
    """Of f_hat there is the newest map alone, at its own side."""

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
        """Return each side's map as its tokens give it, and the codebook loss, a mean over sides.
        The pass keeps its tokens and what they are nearest to."""
        self.last_tokens_BL = self.encode(f_BCSS)
        asked = [resized(f_BCSS, s) for s in self.scales]
        given = [self.accumulate(f_BCSS, tokens_Bl, k)
                 for k, tokens_Bl in enumerate(self.split(self.last_tokens_BL))]
        self.last_residuals = [x_BCss.detach().flatten(2).mT for x_BCss in asked]
        losses = [F.mse_loss(code, x.detach()) + COMMITMENT * F.mse_loss(code.detach(), x)
                  for code, x in zip(given, asked)]
        straight = [x + (code - x).detach() for code, x in zip(given, asked)]   # straight-through
        return straight, torch.stack(losses).mean()

    @torch.no_grad()
    def start_from(self, f_BCSS: Tensor) -> None:
        """Fill the codebook with what is read at the sides, each giving an equal share."""
        for k, share_nC in enumerate(self.codebook_VC.tensor_split(len(self.scales))):
            x_NC = self.read(f_BCSS, k).flatten(0, 1)
            share_nC.copy_(x_NC[torch.randint(len(x_NC), share_nC.shape[:1])])


class FlexTokenizer(Tokenizer):
    """A tokenizer whose scales are all sides. It is made of one of VAR, by TokenizerTuning."""

    def forward(self, images: Tensor, quantize: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Return reconstructions, and the losses by name; "smaller" is that of a smaller map's
        image, any one's, against the averages of the original."""
        maps, codebook_loss = self.quantizer(self.latent(images))
        result = self.render(maps[-1])
        small = self.render(maps[torch.randint(len(maps) - 1, ()).item()])
        target = resized(images, small.shape[-1])
        return result, {
            "mse": F.mse_loss(result, images),
            "l1": F.l1_loss(result, images),
            "codebook": codebook_loss,
            "smaller": F.mse_loss(small, target) + L1_WEIGHT * F.l1_loss(small, target),
        }


class FlexVAR(VAR):
    """A VAR, with its weights. Its positions are one map, resized to every side; it has no levels.
    """

    def __init__(self, plain: VAR):
        super().__init__(plain.config)
        S = plain.config.scales[-1]
        finest_1lW = plain.places()[:, plain.config.spans[-1]].detach()
        del self.position_1LW, self.level_embedding
        self.load_state_dict(plain.state_dict(), strict=False)
        self.position_1WSS = nn.Parameter(finest_1lW.mT.unflatten(2, (S, S)))
        self.to(finest_1lW.device)

    def places(self) -> Tensor:
        """[1, L, W]."""
        maps = [resized(self.position_1WSS, s).flatten(2).mT for s in self.config.scales]
        return torch.cat(maps, dim=1)


class TokenizerTuning(TokenizerStage):
    """Trains a FlexTokenizer from the run's weights, but codes anew, on the images it kept."""

    def __init__(self, run: Trained, steps: int):
        kept = load_checkpoint(run.folder / "train_images.pt", "set of training images")
        images = TensorDataset(kept["images"], kept["labels"])
        sides = tuple(range(1, run.model.config.scales[-1] + 1))
        preset = replace(run.settings.preset, scales=sides, tokenizer_steps=steps)
        out = run.folder / "papers" / "flexvar-tokenizer"
        data = Data(images, run.held_out, run.classes, fingerprint(run.tokenizer))
        super().__init__(data, replace(run.settings, preset=preset, out=out))
        self.quantized_from = 0
        for tokenizer in (self.model, self.ema):   # the same tensors, read by other code
            tokenizer.load_state_dict(run.tokenizer.state_dict())
            tokenizer.__class__ = FlexTokenizer
            tokenizer.quantizer.__class__ = FlexQuantizer

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor):
        loss, to_log = super().loss(model, images, labels)
        return loss + to_log()["smaller"], to_log

    def finish(self, log) -> None:
        """Nothing: the health of a tokenizer is that of maps that add up."""
