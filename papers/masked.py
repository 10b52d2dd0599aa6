"""A VAR that can be told a part of the scale that it predicts: the model of hmar.py.

The transformer reads, beside f_hat, the codes of those tokens of the scale itself that are known,

    x  =  embed(f_hat at s_k)  +  [known] (embed'(code) + b)

and learns to predict the others. embed' and b start at zero, so it begins as the VAR that it is
tuned from; and half of the training images have nothing known, so it goes on being one. A scale may
then be drawn in any number of passes, each of which sees what those before it drew; and a completed
image may see what it has to fit.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.tuning import Tuning
from tokenizer import Quantizer, Tokenizer
from var import VAR, Known


class ReadAndKnown(nn.Module):
    """VAR's code embedding, and one of known codes: [B, l, C, or 2 C + 1 with hints] to W."""

    def __init__(self, read: nn.Linear):
        super().__init__()
        self.read = read
        self.known = nn.Linear(read.in_features + 1, read.out_features, bias=False)
        nn.init.zeros_(self.known.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        read_BlC, hint_BlX = inputs.tensor_split((self.read.in_features,), dim=-1)
        x_BlW = self.read(read_BlC)
        return x_BlW + self.known(hint_BlX) if hint_BlX.shape[-1] else x_BlW


class MaskedVAR(VAR):
    """A VAR, with its weights, that also reads known tokens.

    passes: over each scale, when images are drawn.
    surest: a pass keeps the tokens that were most probable; or any, at random.
    leaks: tokens that are not known are read, too, as in the published model: see `hint`.
    """

    def __init__(self, plain: VAR, leaks: bool = False):
        super().__init__(plain.config)
        self.load_state_dict(plain.state_dict())
        self.code_embedding = ReadAndKnown(self.code_embedding)
        self.leaks = leaks
        self.passes = (1,) * len(plain.config.scales)
        self.surest = False
        self.to(plain.level_L.device)

    def hint(self, quantizer: Quantizer, tokens_Bl: Tensor, known_Bl: Tensor, k: int) -> Tensor:
        """What is read of the known tokens of scale k, and a 1: [B, l, C + 1]; 0 of the others.

        The published model reads not the code but what it adds to f_hat, at the scale's size: after
        a bicubic and phi, a convolution, which mix in the tokens around, known or not.
        """
        code_BlC = F.embedding(tokens_Bl, quantizer.codebook_VC)
        if self.leaks:
            added_BCSS = quantizer.accumulate(quantizer.empty(len(tokens_Bl)), tokens_Bl, k)
            code_BlC = quantizer.read(added_BCSS, k)
        return F.pad(code_BlC, (0, 1), value=1) * known_Bl[..., None]

    def told(self, tokenizer: Tokenizer, tokens_BL: Tensor, labels_B: Tensor, known_BL: Tensor,
             shown_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of every token, given the coarser scales and the known ones of its own.

        shown_BL: the tokens of which hints are made. The unknown ones matter to a leak alone.
        """
        quantizer = tokenizer.quantizer
        hints = []
        for k, maps in enumerate(zip(quantizer.split(shown_BL), quantizer.split(known_BL))):
            hints.append(self.hint(quantizer, *maps, k))
        hint_BLX = torch.cat(hints, dim=1)[:, 1:]   # scale 1 reads the class
        inputs = torch.cat([tokenizer.teacher_inputs(tokens_BL), hint_BLX], dim=2)
        return self(labels_B, inputs)

    @torch.no_grad()
    def generate(self, tokenizer: Tokenizer, labels_B: Tensor, cfg: float, top_k: int, top_p: float,
                 generator: torch.Generator, known: Known | None = None) -> Tensor:
        """Tokens [B, L], as of `VAR.generate`. What is known of the images is read, too."""
        quantizer = tokenizer.quantizer
        f_hat_BCSS = quantizer.empty(len(labels_B))
        null_B = torch.full_like(labels_B, self.config.classes)
        rows_B = torch.cat([labels_B, null_B]) if cfg else labels_B             # [B or 2 B]
        class_BW = self.class_embedding(rows_B)
        modulations, head_B2W = self.modulations(class_BW)
        caches = self.new_caches()
        tokens = []
        for k, span in enumerate(self.config.spans):
            read_BlC = quantizer.read(f_hat_BCSS, k)
            tokens_Bl = torch.zeros_like(read_BlC[..., 0], dtype=torch.long)
            kept_Bl = torch.zeros_like(tokens_Bl, dtype=torch.bool)
            if known is not None and k < known.scales:
                tokens_Bl = known.tokens(quantizer, f_hat_BCSS, k)
                kept_Bl = known.places(quantizer, k)
            given_B1 = kept_Bl.sum(dim=1, keepdim=True)
            for n in range(1, self.passes[k] + 1):
                hint_BlX = self.hint(quantizer, tokens_Bl, kept_Bl, k)
                x_BlW = self.code_embedding(torch.cat([read_BlC, hint_BlX], dim=2))
                if cfg:
                    x_BlW = x_BlW.repeat(2, 1, 1)                               # [2 B, l, W]
                if k == 0:
                    x_BlW = self.start(class_BW)
                for cache in caches:
                    cache.filled = span.start   # finer scales see the last pass
                stream = self.through_layers(
                    x_BlW, self.places()[:, span], modulations,
                    self.ranges.rows(span.start, span.stop), caches)
                logits_BlV = self.logits(stream, head_B2W)
                drawn_Bl = self.draw(logits_BlV, k, cfg, top_k, top_p, generator)
                tokens_Bl = torch.where(kept_Bl, tokens_Bl, drawn_Bl)
                order_Bl = self.order(logits_BlV[:len(labels_B)], tokens_Bl, kept_Bl, generator)
                goal_B1 = given_B1 + (len(order_Bl[0]) - given_B1) * n // self.passes[k]
                kept_Bl = order_Bl < goal_B1
            tokens.append(tokens_Bl)
            f_hat_BCSS = quantizer.accumulate(f_hat_BCSS, tokens_Bl, k)
        return torch.cat(tokens, dim=1)

    def order(self, logits_BlV: Tensor, tokens_Bl: Tensor, kept_Bl: Tensor,
              generator: torch.Generator) -> Tensor:
        """In which order tokens are kept, from 0: [B, l]. Those that are come first."""
        score_Bl = torch.empty(tokens_Bl.shape, device=tokens_Bl.device)
        score_Bl.uniform_(generator=generator)
        if self.surest:
            score_BlV = logits_BlV.softmax(dim=2)
            score_Bl = score_BlV.gather(2, tokens_Bl[..., None]).squeeze(2)
        return score_Bl.masked_fill(kept_Bl, 2).argsort(descending=True).argsort()


class MaskedTuning(Tuning):
    """Of half of the images a share of the tokens is known, in each another, from 0 to 1."""

    def loss_of(self, model: MaskedVAR, tokens_BL: Tensor, labels_B: Tensor):
        tokens_BL = tokens_BL.to(self.options.device).long()
        labels_B = labels_B.to(self.options.device)
        share_B1 = 2 * torch.rand(len(tokens_BL), 1, device=tokens_BL.device) - 1
        known_BL = torch.rand(tokens_BL.shape, device=tokens_BL.device) < share_B1
        known_BL[:, 0] = False
        logits_BLV = model.told(self.tokenizer, tokens_BL, labels_B, known_BL, tokens_BL)
        return F.cross_entropy(logits_BLV.float()[~known_BL], tokens_BL[~known_BL]), dict
