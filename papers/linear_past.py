"""M-VAR (arXiv 2411.10433): attention inside a scale, and a linear memory of those before it.

What M-VAR's blocks know of coarser scales, beside f_hat, went through a Mamba: a state of one size,
however long the past. Here is the plainest of its kind, linear attention (2006.16236): a head keeps
only the sum, over all tokens of earlier scales, of

    S  =  sum_j  phi(k_j)^T [v_j, 1]         phi(x) = exp(t x / |x|), t learned in each head

and a query reads phi(q) S, its last number dividing the others. With g learned in each head (it
starts at 1/4), a head returns (1 - g) times what it sees in its own scale, and g times that.

(M-VAR trains a third branch in every block, from scratch, with weights of its own. But trained from
scratch, a model that sees its own scale alone loses nothing: hmar_markov.py. So here models that
were trained with the past lose it, and are tuned, with the linear memory, which adds two weights a
head, and without. What is expected is that tuning alone makes up for the cut, and the memory has
nothing to win back; the surprise would be a cut that costs much, and a memory that helps.)
"""
from __future__ import annotations

from dataclasses import replace
from math import inf, log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import KeyRanges, block_attention
from papers import Claim, hmar, open_runs, parser_of, say_evaluations, say_verdicts
from papers.tuning import Tuning
from support.cli import run_program
from support.evaluation import evaluate
from var import VAR, Attention, VARConfig

CLAIMS = (
    Claim("own-scale attention costs a tuned model over 0.01 nats per token",
          holds=(0.01, inf), false=(-inf, 0.01)),
    Claim("of these a linear memory wins back half, or more", holds=(0.5, inf), false=(-inf, 0.5)),
    Claim("with it, unfiltered, at most 2 points fewer are recognised than of the control",
          holds=(-2, inf), false=(-inf, -2)),
)


class Memory:
    """What a layer keeps of earlier scales, in one forward pass or one generation."""
    sum_BHDX: Tensor | None = None   # X = D + 1

    def read(self, q_BHlD: Tensor) -> Tensor:
        found_BHlX = q_BHlD @ self.sum_BHDX
        return found_BHlX[..., :-1] / found_BHlX[..., -1:]

    def add(self, k_BHlD: Tensor, v_BHlD: Tensor) -> None:
        added_BHDX = k_BHlD.mT @ F.pad(v_BHlD, (0, 1), value=1)
        self.sum_BHDX = added_BHDX if self.sum_BHDX is None else self.sum_BHDX + added_BHDX


class LinearPast(nn.Module):
    """Attention to a token's own scale, and a memory of those before it."""

    def __init__(self, attention: Attention, config: VARConfig):
        super().__init__()
        self.attention = attention
        self.own = KeyRanges.from_scales(config.scales, last_scales=1)
        self.spans = config.spans
        self.odds_H11 = nn.Parameter(torch.full((config.heads, 1, 1), log(1 / 3)))
        self.t_H11 = nn.Parameter(torch.full((config.heads, 1, 1), 4.0))

    def phi(self, x_BHLD: Tensor) -> Tensor:
        return (self.t_H11 * F.normalize(x_BHLD.float(), dim=-1)).exp()

    def forward(self, x_BLW: Tensor, ranges: KeyRanges, memory: Memory | None) -> Tensor:
        """memory: in generation, where x is of one scale; else x is of all."""
        q_BHLD, k_BHLD, v_BHLD, scale = self.attention.project(x_BLW)
        own, spans = self.own, self.spans
        if memory is not None:
            L = x_BLW.shape[1]
            own, spans = KeyRanges([0] * L, [L] * L), [slice(0, L)]
        memory = memory or Memory()
        o_BHLD = block_attention(q_BHLD, k_BHLD, v_BHLD, own, scale).float()
        q_BHLD, k_BHLD = self.phi(q_BHLD), self.phi(k_BHLD)
        parts = []
        with torch.autocast(x_BLW.device.type, enabled=False):   # in fp16 sums would overflow
            for span in spans:
                o_BHlD = o_BHLD[:, :, span]
                if memory.sum_BHDX is not None:   # else nothing was before
                    found_BHlD = memory.read(q_BHLD[:, :, span])
                    o_BHlD = o_BHlD.lerp(found_BHlD, self.odds_H11.sigmoid())
                memory.add(k_BHLD[:, :, span], v_BHLD[:, :, span].float())
                parts.append(o_BHlD)
        return self.attention.out(torch.cat(parts, dim=2).transpose(1, 2).flatten(2))


class LinearVAR(VAR):
    """A VAR, with its weights, that sees its own scale alone and remembers those before it."""

    def __init__(self, plain: VAR):
        super().__init__(plain.config)
        self.load_state_dict(plain.state_dict())
        for block in self.blocks:
            block.attention = LinearPast(block.attention, plain.config)
        self.to(plain.level_L.device)

    def new_caches(self) -> list[Memory]:
        return [Memory() for _ in self.blocks]


def own_scale(plain: VAR) -> VAR:
    """The same weights, but that they see their own scale alone."""
    model = VAR(replace(plain.config, last_scales=1))
    model.load_state_dict(plain.state_dict())
    return model.to(plain.level_L.device)


def main() -> None:
    parser = parser_of("linear_past", __doc__)
    hmar.add_flags(parser)
    parser.set_defaults(count=500)
    options = parser.parse_args()
    how = options.steps, options.lr
    found = {"plain": [], "own scale": [], "linear": []}
    for run in open_runs(options):
        runs = {"plain": hmar.tuned(run, "plain", *how)}
        for name, model in (("own scale", own_scale(run.model)), ("linear", LinearVAR(run.model))):
            stage = Tuning(run, model, f"linear_past-{name.split()[0]}", *how)
            runs[name] = replace(run, model=stage.run())
        for name, part in runs.items():
            found[name].append(evaluate(part, options.count, seeds=[0]))
    config = run.model.config
    D = config.width // config.heads
    past = sum(s * s for s in config.scales[:-1])
    print(f"a head's past, of an image: {2 * past * D} numbers, keys and values; linear: "
          f"{D * (D + 1)}")
    plain_R7, own_R7, linear_R7 = say_evaluations(found).values()
    cut_R, left_R = (x_R7[:, 0] - plain_R7[:, 0] for x_R7 in (own_R7, linear_R7))
    say_verdicts(CLAIMS, [
        cut_R / config.length, 1 - left_R / cut_R, linear_R7[:, 1] - plain_R7[:, 1]])


if __name__ == "__main__":
    run_program(main)
