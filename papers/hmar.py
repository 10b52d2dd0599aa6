"""HMAR (arXiv 2506.04421): a scale in two passes, the second told what the first drew. In nats.

VAR draws all tokens of a scale at once, so independently, given the coarser scales. masked.py is a
VAR that can be told some of them. With the places of a scale coloured as a checkerboard, A and B,

    log p(scale) = log p(A | coarser scales) + log p(B | A, coarser scales)

is an exact likelihood of two passes. The difference is what independence costs, at the least.

The leak: the published model's hints are averages over neighbours, hidden ones among them. So in
training they tell more than they may; in sampling, where what is hidden is a draft, less.

The published model has other weights for later passes; here one set serves both. Images drawn so
are in hmar_passes.py, and the paper's attention in hmar_markov.py.
"""
from __future__ import annotations

import copy
from dataclasses import replace
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from papers import Claim, Trained, open_runs, parser_of, say_figures, say_verdicts
from papers.masked import MaskedVAR
from papers.tuning import Tuning
from support.cli import COUNT, Parser, run_program
from support.evaluation import evaluated_images
from support.images import batches
from support.presets import RATE
from tokenizer import Tokenizer
from var import VAR

CLAIMS = (
    Claim("two passes save at least 3 % of the last scale's nats, with the same weights",
          holds=(3, inf), false=(-inf, 3)),
    Claim("two passes save something on one of plain VAR, tuned for as long: % of an image's nats",
          holds=(0, inf), false=(-inf, 0)),
    Claim("the price: one pass takes at most 1 % more nats than plain VAR's",
          holds=(-inf, 1), false=(1, inf)),
    Claim("the leak makes B, given A, look at least 3 % cheaper",
          holds=(3, inf), false=(-inf, 3)),
    Claim("and with drafts for B, as in sampling, it makes it dearer, in %",
          holds=(0, inf), false=(-inf, 0)),
)


class MaskedTuning(Tuning):
    """Of half of the images a share of the tokens is known, in each another, from 0 to 1."""

    def loss(self, model: MaskedVAR, tokens_BL: Tensor, labels_B: Tensor):
        tokens_BL, labels_B = self.on_device(tokens_BL, labels_B)
        share_B1 = 2 * torch.rand(len(tokens_BL), 1, device=tokens_BL.device) - 1
        known_BL = torch.rand(tokens_BL.shape, device=tokens_BL.device) < share_B1
        known_BL[:, 0] = False   # the first scale has nothing that could be told
        logits_BLV = model.told(self.tokenizer, tokens_BL, labels_B, known_BL, tokens_BL)
        return nats(logits_BLV, tokens_BL)[~known_BL].mean(), dict


def add_flags(parser: Parser) -> None:
    parser.add_argument("--steps", type=COUNT, default=200, help="of tuning (default: 200)")
    parser.add_argument("--lr", type=RATE, default=3e-3, help="at its peak (default: 0.003)")


def tuned(run: Trained, kind: str, steps: int, lr: float) -> Trained:
    """The run with its model after so many steps more: "plain", "masked" or "leaking"."""
    model = copy.deepcopy(run.model)
    if kind != "plain":
        model = MaskedVAR(model, leaks=kind == "leaking")
    stage = Tuning if kind == "plain" else MaskedTuning
    return replace(run, model=stage(run, model, f"hmar-{kind}", steps, lr).run())


def checkerboard(model: VAR) -> Tensor:
    """The places of A: bool [L]. The only one of the first scale is among them."""
    colours = []
    for s in model.config.scales:
        colour_ss = torch.arange(s)[:, None] + torch.arange(s)
        colours.append(colour_ss.flatten() % 2)
    return torch.cat(colours).to(model.level_L) == 0


def nats(logits_BLV: Tensor, tokens_BL: Tensor) -> Tensor:
    return F.cross_entropy(logits_BLV.float().mT, tokens_BL, reduction="none")


@torch.no_grad()
def nats_of(tokenizer: Tokenizer, model: MaskedVAR, tokens_BL: Tensor, labels_B: Tensor) -> Tensor:
    """Nats [3, B, L] of the tokens: of one pass; of two, of which the second knows A; and of two
    when hints are made of drafts of B, as one pass draws them."""
    in_a_BL = checkerboard(model).expand_as(tokens_BL)
    none_BL = torch.zeros_like(in_a_BL)
    image = tokenizer, tokens_BL, labels_B
    one_BLV = model.told(*image, none_BL, tokens_BL)
    one_BL = nats(one_BLV, tokens_BL)
    draft_BL = torch.distributions.Categorical(logits=one_BLV).sample()
    found = [one_BL]
    for b_BL in (tokens_BL, draft_BL):
        shown_BL = torch.where(in_a_BL, tokens_BL, b_BL)
        b_BLV = model.told(*image, in_a_BL, shown_BL)
        two_BL = torch.where(in_a_BL, one_BL, nats(b_BLV, tokens_BL))
        found.append(two_BL)
    return torch.stack(found)


def measure(run: Trained, steps: int, lr: float, count: int) -> dict[str, list[float]]:
    """Mean nats of held-out images: of all tokens, of the last scale's, and of B on all scales."""
    images, labels_N = evaluated_images(run, count)
    _, tokens_NL = run.encode(images)
    level_L = run.model.level_L
    parts_3L = [level_L >= 0, level_L == level_L.max(), ~checkerboard(run.model)]
    sums_L3 = torch.stack(parts_3L, dim=1).float()
    rows = {}
    for kind in ("plain", "masked", "leaking"):
        model = tuned(run, kind, steps, lr).model
        if kind == "plain":
            model = MaskedVAR(model).eval()
        torch.manual_seed(0)   # of drafts
        found = []
        for part in batches(len(tokens_NL), run.batch):
            tokens_BL = tokens_NL[part].to(level_L)
            labels_B = labels_N[part].to(level_L)
            found.append(nats_of(run.tokenizer, model, tokens_BL, labels_B))
        found_33 = torch.cat(found, dim=1).mean(dim=1) @ sums_L3
        for way, found_3 in zip(("one pass", "two passes", "with drafts"), found_33):
            rows[f"{kind}, {way}"] = found_3.tolist()
    del rows["plain, two passes"], rows["plain, with drafts"]
    return rows


def main() -> None:
    parser = parser_of("hmar", __doc__)
    add_flags(parser)
    options = parser.parse_args()
    by_run = [measure(run, options.steps, options.lr, options.count) for run in open_runs(options)]
    rows = say_figures(("nats", "image", "last scale", "B"), by_run, 2, base="plain, one pass")
    plain, one, two, drafts, _, leaking, leaking_drafts = rows.values()   # each [3, runs]
    say_verdicts(CLAIMS, [
        100 * (1 - two[1] / one[1]),
        100 * (1 - two[0] / plain[0]),
        100 * (one[0] / plain[0] - 1),
        100 * (1 - leaking[2] / two[2]),
        100 * (leaking_drafts[2] / drafts[2] - 1),
    ])


if __name__ == "__main__":
    run_program(main)
