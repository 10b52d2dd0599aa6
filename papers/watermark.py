"""A watermark in the choice of tokens (LBW, arXiv 2506.01011): which codes are green is a secret.

Half of the codes are green. Delta is added to their logits before a token is drawn, so a marked
image has more of them than chance. Who knows the list encodes and counts: with n of T tokens green,

    z = (n - T / 2) / sqrt(T / 4)

has mean 0 and variance 1 without a mark, if codes are used alike and independently. They are not;
so z is compared with that of training images: a find is what 1 % of them pass. But a detector has
no tokens. It encodes an image that was decoded, saved, perhaps changed (damage.py), and a token
that comes back as another is green by chance again. What survives that?

Lest a list be learned, an image draws its own from K of them. The largest of K z is the price.
"""
from __future__ import annotations

import copy
from dataclasses import replace
from math import inf

import torch
from torch import Generator, Tensor

from papers import Claim, open_runs, parser_of, say_evaluations, say_figures, say_verdicts
from papers.damage import read_back
from papers.tuning import kept_tokens
from sample import Run
from support.cli import number, run_program
from support.evaluation import evaluate, evaluated_images

CLAIMS = (   # where it holds, where it is false
    Claim("of marked images, saved and encoded, 95 % or more are found",
          (95, inf), (-inf, 95)),
    Claim("unfiltered, at most 2 points fewer are recognised",
          (-2, inf), (-inf, -2)),
    Claim("more of the 1x1 map's tokens survive than of the last's",
          (0, inf), (-inf, 0)),
    Claim("of those that were regenerated, 90 % or more are found",
          (90, inf), (-inf, 90)),
)
POOLS = (1, 4, 16, 64)


def green_list(key: int, V: int) -> Tensor:
    """Which codes are green, half of them: bool [V]."""
    order_V = torch.randperm(V, generator=Generator().manual_seed(key))
    return order_V < V // 2


def marking(run: Run, green_V: Tensor, delta: float) -> Run:
    """Its model prefers green codes. Guidance leaves delta as it is: (1 + t) delta - t delta."""
    model = copy.deepcopy(run.model)
    model.head.bias.data += delta * green_V.to(model.head.bias)
    return replace(run, model=model)


def z_scores(tokens_NL: Tensor, green_V: Tensor) -> Tensor:
    """float64 [N]."""
    T = tokens_NL.shape[1]
    share = green_V.double().mean()
    n_N = green_V[tokens_NL.long()].sum(dim=1)
    return (n_N - share * T) / (T * share * (1 - share)).sqrt()


def scores(tokens_NL: Tensor, lists: list[Tensor], usual_NL: Tensor) -> Tensor:
    """The largest z over the lists [N], each in standard deviations from where it usually is."""
    best_N = torch.tensor(-inf)
    for green_V in lists:
        usual_N = z_scores(usual_NL, green_V)
        z_N = z_scores(tokens_NL, green_V)
        best_N = best_N.maximum((z_N - usual_N.mean()) / usual_N.std())
    return best_N


def percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def study(run: Run, lists: list[Tensor], delta: float, count: int
          ) -> list[dict[str, list[float]]]:
    """Of one run: what is found, what survives at each scale, and what pools of lists do."""
    usual_NL = kept_tokens(run)[0].tensors[0]
    images, labels_N = evaluated_images(run, count)
    sets = [read_back(run, run.encode(images)[1], images)]
    for model in (run, marking(run, lists[0], delta)):
        drawn_NL = model.generate(labels_N.tolist(), 0)
        sets.append(read_back(run, drawn_NL, run.decode(drawn_NL)))
    held_out, _, marked = sets
    limits = {}
    for K in POOLS:
        limits[K] = scores(usual_NL, lists[:K], usual_NL).quantile(0.99)
    finds = {}
    for name in marked:
        finds[name] = []
        for tokens in sets:
            score_N = scores(tokens[name], lists[:1], usual_NL)
            finds[name].append(percent(score_N > limits[1]))
    survival = {}
    stages = marked["never decoded"], marked["saved"], held_out["saved"]
    maps = map(run.tokenizer.quantizer.split, stages)
    for s, drawn_Nl, read_Nl, usual_Nl in zip(run.model.config.scales, *maps):
        others_Nl = read_Nl.roll(1, dims=0)   # of other images, mostly of the class
        survival[f"{s}x{s}"] = [percent(drawn_Nl == read_Nl), percent(drawn_Nl == others_Nl)]
        for tokens_Nl in (drawn_Nl, read_Nl, usual_Nl):
            survival[f"{s}x{s}"].append(percent(lists[0][tokens_Nl]))
    pools = {}
    for K in POOLS:
        marked_N = scores(marked["saved"], lists[:K], usual_NL)
        others_N = scores(held_out["saved"], lists[:K], usual_NL)
        pools[f"{K} lists"] = [
            percent(marked_N > limits[K]),
            percent(others_N > limits[K]),
            percent(others_N > limits[1]),
            limits[K].item(),
        ]
    return [finds, survival, pools]


def main() -> None:
    parser = parser_of("watermark", __doc__)
    parser.add_argument("--delta", type=number(float, 0), default=2.0,
                        help="what is added to green logits (default: %(default)s)")
    options = parser.parse_args()
    rows = {"unmarked": [], "marked": []}
    by_run = []
    for run in open_runs(options):
        V = run.model.config.vocabulary
        lists = [green_list(key, V) for key in range(POOLS[-1])]
        for row, model in zip(rows.values(), (run, marking(run, lists[0], options.delta))):
            row.append(evaluate(model, options.count, seeds=[0]))
        by_run.append(study(run, lists, options.delta, options.count))
    unmarked_R7, marked_R7 = say_evaluations(rows).values()
    finds, survival, pools = zip(*by_run)
    found = say_figures(("found, in %", "held-out", "unmarked", "marked"), finds, 1)
    scales = say_figures(
        ("tokens, in %", "come back", "by chance", "green: drawn", "read", "held-out"),
        survival, 1)
    coarsest, *_, finest = scales.values()
    say_figures(("pool", "found %", "false alarms %", "at one's z", "z"), pools, 1)
    measured = [
        found["saved"][2],
        (marked_R7 - unmarked_R7)[:, 1],
        coarsest[0] - finest[0],
        found["regenerated"][2],
    ]
    say_verdicts(CLAIMS, measured)


if __name__ == "__main__":
    run_program(main)
