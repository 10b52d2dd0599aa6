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
from torch import Generator, Tensor, nn

from sample import Known
from tokenizer import Quantizer, Tokenizer
from var import VAR


class ReadAndKnown(nn.Module):
    """VAR's code embedding, and one of hints: [B, l, C], or C + X with hints, to W."""

    def __init__(self, read: nn.Linear, X: int):
        super().__init__()
        self.read = read
        self.known = nn.Linear(X, read.out_features, bias=False)
        nn.init.zeros_(self.known.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        C = self.read.in_features
        x_BlW = self.read(inputs[..., :C])
        if inputs.shape[-1] > C:
            x_BlW = x_BlW + self.known(inputs[..., C:])
        return x_BlW


class MaskedVAR(VAR):
    """A VAR, with its weights, that also reads known tokens.

    passes: over each scale, when images are drawn.
    surest: of what a pass draws the most probable tokens are kept; or else any, at random.
    leaks: what is not known is read, too, as in the published model: see `hint`.
    """

    def __init__(self, plain: VAR, leaks: bool = False):
        super().__init__(plain.config)
        self.load_state_dict(plain.state_dict())
        self.code_embedding = ReadAndKnown(self.code_embedding, plain.config.code_channels + 1)
        self.passes = [1] * len(plain.config.scales)
        self.surest = False
        self.leaks = leaks
        self.to(plain.level_L.device)

    def hint(self, quantizer: Quantizer, tokens_Bl: Tensor, known_Bl: Tensor, k: int) -> Tensor:
        """What is read of the known tokens of scale k, and a 1: [B, l, C + 1]; 0 of the others.

        The published model reads not the code but what it adds to f_hat, at the scale's size: after
        a bicubic and phi, a convolution, which mix in the tokens around, known or not.
        """
        code_BlC = F.embedding(tokens_Bl, quantizer.codebook_VC)
        if self.leaks:
            nothing_BCSS = quantizer.initial(len(tokens_Bl))
            added_BCSS = quantizer.accumulate(nothing_BCSS, tokens_Bl, k)
            code_BlC = quantizer.read(added_BCSS, k)
        return F.pad(code_BlC, (0, 1), value=1) * known_Bl[..., None]

    def told(
        self,
        tokenizer: Tokenizer,
        tokens_BL: Tensor,
        labels_B: Tensor,
        known_BL: Tensor,
        shown_BL: Tensor,
    ) -> Tensor:
        """Logits [B, L, V] of every token, given the coarser scales and the known ones of its own.

        shown_BL: the tokens of which hints are made. The unknown ones matter to a leak alone.
        """
        quantizer = tokenizer.quantizer
        maps = zip(quantizer.split(shown_BL), quantizer.split(known_BL))
        hints = [self.hint(quantizer, *pair, k) for k, pair in enumerate(maps)]
        hint_BLX = torch.cat(hints[1:], dim=1)   # scale 1 reads the class
        read_BLC = tokenizer.teacher_inputs(tokens_BL)
        return self(labels_B, torch.cat([read_BLC, hint_BLX], dim=2))

    @torch.no_grad()
    def generate(
        self, tokenizer: Tokenizer, labels_B: Tensor, cfg: float, top_k: int, top_p: float,
        generator: Generator, known: Known | None = None, growth: float = 1.0,
    ) -> Tensor:
        """Tokens [B, L], as of `VAR.generate`. What is known of the images is read, too."""
        quantizer = tokenizer.quantizer
        B = len(labels_B)
        if cfg:
            null_B = torch.full_like(labels_B, self.config.classes)
            labels_B = torch.cat([labels_B, null_B])                          # [2 B]
        class_BW = self.class_embedding(labels_B)                             # [B or 2 B, W]
        modulations, head_B2W = self.modulations(class_BW)
        caches = self.new_caches()
        f_hat_BCSS = quantizer.initial(B)
        tokens = []
        for k, span in enumerate(self.config.spans):
            ranges = self.ranges.rows(span.start, span.stop)
            positions_1lW = self.positions()[:, span]
            read_BlC = quantizer.read(f_hat_BCSS, k)                          # [B, l, C]
            tokens_Bl = read_BlC.new_zeros(read_BlC.shape[:2], dtype=torch.long)
            kept_Bl = tokens_Bl > 0                                           # none
            if known is not None and k < known.known_scales:
                tokens_Bl = known.tokens(quantizer, f_hat_BCSS, k)
                kept_Bl = known.mask(quantizer, k)
            for left in reversed(range(self.passes[k])):
                hint_BlX = self.hint(quantizer, tokens_Bl, kept_Bl, k)        # [B, l, C + 1]
                x_BlW = self.start(class_BW)
                if k:
                    inputs = torch.cat([read_BlC, hint_BlX], dim=2)
                    x_BlW = self.code_embedding(inputs)                       # [B, l, W]
                    x_BlW = x_BlW.repeat(len(labels_B) // B, 1, 1)
                for cache in caches:
                    cache.filled = span.start   # finer scales see the last pass
                stream = self.through_layers(x_BlW, positions_1lW, modulations, ranges, caches)
                logits_BlV = self.logits(stream, head_B2W)                    # [B or 2 B, l, V]
                drawn_Bl = self.draw(logits_BlV, k, cfg, top_k, top_p, generator, growth)
                tokens_Bl = torch.where(kept_Bl, tokens_Bl, drawn_Bl)         # [B, l]
                if left:
                    score_Bl = self.score(logits_BlV[:B], tokens_Bl, generator)
                    kept_Bl = keep_more(kept_Bl, score_Bl, left)
            tokens.append(tokens_Bl)
            f_hat_BCSS = quantizer.accumulate(f_hat_BCSS, tokens_Bl, k)
        return torch.cat(tokens, dim=1)

    def score(self, logits_BlV: Tensor, tokens_Bl: Tensor, generator: Generator) -> Tensor:
        """By which of the drawn tokens are kept first: [B, l], from 0 to 1."""
        if not self.surest:
            score_Bl = torch.empty(tokens_Bl.shape, device=tokens_Bl.device)
            return score_Bl.uniform_(generator=generator)
        chance_BlV = logits_BlV.softmax(dim=2)   # without guidance
        return chance_BlV.gather(2, tokens_Bl[..., None]).squeeze(2)


def keep_more(kept_Bl: Tensor, score_Bl: Tensor, left: int) -> Tensor:
    """What was kept, and the best of the rest: as many as in each of the `left` passes to come."""
    count_B1 = kept_Bl.sum(dim=1, keepdim=True)
    count_B1 = count_B1 + (kept_Bl.shape[1] - count_B1) // (left + 1)
    ranked_Bl = score_Bl.masked_fill(kept_Bl, 2).argsort(dim=1, descending=True)
    return ranked_Bl.argsort(dim=1) < count_B1
