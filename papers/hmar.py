"""HMAR (arXiv 2506.04421): a scale in two passes, the second told what the first drew. In nats.

VAR draws all tokens of a scale at once, so independently, given the coarser scales. masked.py is a
VAR that can be told some of them. With the places of a scale coloured as a checkerboard, A and B,

    log p(scale) = log p(A | coarser scales) + log p(B | A, coarser scales)

is a likelihood of two passes, exact as VAR's of one: the difference is what independence costs.

The leak: the published model's hints are averages over neighbours, hidden ones among them. So in
training they tell more than they may; in sampling, where what is hidden is a draft, less.

hmar_passes.py draws images so, and completes halves; hmar_markov.py is about the paper's attention.
(The published model has a second set of weights for the later passes; here one serves both.)
"""
from __future__ import annotations

import copy
from dataclasses import replace
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from papers import Claim, open_runs, parser_of, say_figures, say_verdicts
from papers.masked import MaskedTuning, MaskedVAR
from papers.tuning import Tuning
from sample import Parser, Run, batches, evaluated_images, run_program
from train import COUNT, RATE

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


def add_flags(parser: Parser) -> None:
    parser.add_argument("--steps", type=COUNT, default=400, help="of tuning (default: 400)")
    parser.add_argument("--lr", type=RATE, default=3e-3, help="at its peak (default: 0.003)")


def tuned(run: Run, kind: str) -> Run:
    """The run with its model after --steps more: "plain", "masked" or "leaking"."""
    model = copy.deepcopy(run.model)
    stage = Tuning
    if kind != "plain":
        model = MaskedVAR(model, leaks=kind == "leaking")
        stage = MaskedTuning
    stage = stage(run, model, f"hmar-{kind}", run.options.steps, run.options.lr)
    return replace(run, model=stage.run())


def checkerboard(scales: tuple[int, ...], device: torch.device) -> Tensor:
    """The places of A: bool [L]. The only one of the first scale is among them."""
    colours = [torch.arange(s)[:, None] + torch.arange(s) for s in scales]
    return torch.cat([colour.flatten() % 2 == 0 for colour in colours]).to(device)


@torch.no_grad()
def nats_of(run: Run, tokens_BL: Tensor, labels_B: Tensor) -> Tensor:
    """Nats [3, B, L] of the tokens: of one pass; of two, which is one with A known, where the token
    is of B; and the same when hints are made of drafts of B, as one pass draws them."""
    board_BL = checkerboard(run.model.config.scales, tokens_BL.device).expand_as(tokens_BL)
    arguments = run.tokenizer, tokens_BL, labels_B
    one_BLV = run.model.told(*arguments, torch.zeros_like(board_BL), tokens_BL)
    one_BL = nats(one_BLV, tokens_BL)
    draft_BL = torch.distributions.Categorical(logits=one_BLV).sample()
    found = [one_BL]
    for shown_BL in (tokens_BL, torch.where(board_BL, tokens_BL, draft_BL)):
        told_BLV = run.model.told(*arguments, board_BL, shown_BL)
        found.append(torch.where(board_BL, one_BL, nats(told_BLV, tokens_BL)))
    return torch.stack(found)


def nats(logits_BLV: Tensor, tokens_BL: Tensor) -> Tensor:
    return F.cross_entropy(logits_BLV.float().transpose(1, 2), tokens_BL, reduction="none")


def measure(run: Run) -> dict[str, list[float]]:
    """Mean nats, of held-out images: of all tokens, of the last scale, and of B on all scales."""
    images, labels_N = evaluated_images(run, run.options.count)
    _, tokens_NL = run.encode(images)
    names = {
        "plain": ["plain VAR, one pass"],
        "masked": ["masked, one pass", "masked, two passes", "masked, with drafts"],
        "leaking": ["leaking, one pass", "leaking, two passes", "leaking, with drafts"],
    }
    rows = {}
    for kind, row_names in names.items():
        model = tuned(run, kind).model
        if kind == "plain":
            model = MaskedVAR(model).eval()   # which with nothing known it is
        torch.manual_seed(0)
        parts = []
        for part in batches(len(tokens_NL), run.options.batch):
            tokens_BL = tokens_NL[part].to(run.options.device)
            labels_B = labels_N[part].to(run.options.device)
            parts.append(nats_of(replace(run, model=model), tokens_BL, labels_B).cpu())
        mean_3L = torch.cat(parts, dim=1).mean(dim=1)
        last = model.config.spans[-1]
        in_b_L = ~checkerboard(model.config.scales, mean_3L.device)
        for name, nats_L in zip(row_names, mean_3L):
            cells = nats_L.sum(), nats_L[last].sum(), nats_L[in_b_L].sum()
            rows[name] = [cell.item() for cell in cells]
    return rows


def main() -> None:
    parser = parser_of("hmar", __doc__)
    add_flags(parser)
    options = parser.parse_args()
    heads = ("nats", "image", "last scale", "B of all scales")
    found = say_figures(heads, [measure(run) for run in open_runs(options)], 2)
    plain, one, two, drafts, _, leaking, leaking_drafts = found.values()   # each [3, runs]

    def saved(more_R, less_R):
        return 100 * (1 - less_R / more_R)
    say_verdicts(CLAIMS, [
        saved(one[1], two[1]),
        saved(plain[0], two[0]),
        -saved(plain[0], one[0]),
        saved(two[2], leaking[2]),
        -saved(drafts[2], leaking_drafts[2]),
    ], options.started)


if __name__ == "__main__":
    run_program(main)
