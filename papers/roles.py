"""Who needs the past? Cache budgets by attention (ScaleKV, 2505.19602; HACK, 2504.09261).

At its last scale a published VAR holds keys and values of 424 coarser tokens beside its own 256.
Both papers keep fewer of them in some layers or heads than in others, and tell these by how a query
of the last scale attends, q to j:

    ScaleKV   ASI = mean_q sum_{j in own scale} a_qj  *  mean_q (the 4 largest a_qj in the past)
              of layers; low ones spread their attention, are "drafters" and need the past
    HACK      sum_j var_q a_qj
              of heads; high ones are "structural", need the past; the others look all alike

Here the truth stands beside it: by how many nats an image becomes less likely, untrained, when that
layer or head alone sees its own scale only (forgetful.py). Then caches that hold the past of half
of the heads, chosen by either. (The papers keep some keys everywhere; ours are too few for that.)
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf

import torch
from torch import Tensor

from papers import Claim, Trained, open_runs, parser_of, say_evaluations, say_figures, say_verdicts
from papers.forgetful import forgetting, past_bytes, statistics
from papers.tuning import kept_tokens
from sample import Run
from support.cli import UserError, run_program
from support.evaluation import evaluate, evaluated_images
from support.published import PUBLISHED_SCALES

CLAIMS = (   # where it holds, where it is false
    Claim("over layers, low ASI goes with a need of the past: Spearman's correlation > 0.5",
          (0.5, inf), (-inf, 0.2)),
    Claim("over heads, high variance does: Spearman's correlation > 0.5",
          (0.5, inf), (-inf, 0.2)),
    Claim("half of the heads, by variance, lose the past for less than 0.01 nats per token",
          (-inf, 0.01), (0.01, inf)),
    Claim("and for less than a half chosen at random loses it, in nats per token",
          (-inf, 0), (0, inf)),
)
CALIBRATION = 200   # training images, by which heads are chosen
RANDOM = 8          # halves at random, of which nats are the mean
D16_HEADS = 16 * 16   # of all layers, of width 64; in bf16


def rises(run: Run, choices: Iterable[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """By how many nats an image is less likely where only these heads look back, of each choice.

    rows: tokens [B, L] and labels [B].
    """
    tokens_BL, labels_B = rows
    labels = labels_B.tolist()
    models = [run, *(forgetting(run, looks_NH) for looks_NH in choices)]
    usual, *other = [model.log_likelihood(tokens_BL, labels).mean() for model in models]
    return usual - torch.stack(other)


def half(need_NH: Tensor) -> Tensor:
    """Those that need it most."""
    looks_X = torch.zeros(need_NH.numel(), dtype=torch.bool)
    looks_X[need_NH.flatten().topk(len(looks_X) // 2).indices] = True
    return looks_X.view_as(need_NH)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of numbers of which no two are alike."""
    ranks_2X = torch.stack([a.flatten(), b.flatten()]).argsort(dim=1).argsort(dim=1)
    return ranks_2X.double().corrcoef()[0, 1].item()


def study(run: Trained) -> tuple[dict, dict, dict[str, list[Tensor]]]:
    """Of one run: figures of its layers, correlations, and which heads [N, H] a cache may keep."""
    if run.model.config.last_scales is not None:
        raise UserError(f"{run.folder} was trained with --last-scales: it has no past to lose")
    chance = torch.Generator().manual_seed(run.settings.seed)
    train = kept_tokens(run)[0]
    chosen = torch.randperm(len(train), generator=chance)[:CALIBRATION]
    rows = [x.long() for x in train[chosen]]
    past_NH, largest_NH, variance_NH = statistics(run, *rows)
    N, H = past_NH.shape
    if N < 2:
        raise UserError(f"{run.folder} has one layer, and there is nothing to rank")
    head_XNH = torch.eye(N * H).bool().view(-1, N, H)
    layer_NNH = torch.eye(N).bool()[:, :, None].expand(N, N, H)
    need_N = rises(run, ~layer_NNH, rows)
    need_NH = rises(run, ~head_XNH, rows).view(N, H)
    asi_N = (1 - past_NH.mean(dim=1)) * largest_NH.mean(dim=1)
    asi_NH = (1 - past_NH) * largest_NH
    variance_N = variance_NH.mean(dim=1)
    past_N = past_NH.mean(dim=1)
    by_layer = torch.stack([asi_N, variance_N, past_N, need_N], dim=1)
    layers = {f"layer {n + 1}": row for n, row in enumerate(by_layer.tolist())}
    correlations = {}
    for name, of_N, of_NH in (
        ("- ASI", -asi_N, -asi_NH),
        ("variance", variance_N, variance_NH),
        ("on the past", past_N, past_NH),
    ):
        correlations[name] = [rank_correlation(of_N, need_N), rank_correlation(of_NH, need_NH)]
    caches = {
        "all": [torch.ones(N, H).bool()],
        "by variance": [half(variance_NH)],
        "by ASI": [half(-asi_N[:, None].expand(N, H))],
        "by need": [half(need_NH)],
        "at random": [half(torch.rand(N, H, generator=chance)) for _ in range(RANDOM)],
        "none": [torch.zeros(N, H).bool()],
    }
    return layers, correlations, caches


def main() -> None:
    parser = parser_of("roles", __doc__)
    parser.set_defaults(count=500)
    options = parser.parse_args()
    rows = {}
    by_run = []
    for run in open_runs(options):
        layers, correlations, caches = study(run)
        images, labels_N = evaluated_images(run, options.count)
        held_out = run.encode(images)[1], labels_N
        config = run.model.config
        D = config.width // config.heads
        costs = {}
        for name, choices in caches.items():
            part = forgetting(run, choices[0])
            rows.setdefault(name, []).append(evaluate(part, options.count, seeds=[0]))
            heads = choices[0].sum().item()
            d16_heads = heads * D16_HEADS // choices[0].numel()
            costs[name] = [
                rises(run, choices, held_out).mean().item() / config.length,
                past_bytes(heads, config.scales, D, 4) / 1e3,
                past_bytes(d16_heads, PUBLISHED_SCALES, 64, 2) / 1e6,
            ]
        by_run.append((layers, correlations, costs))
    say_evaluations(rows)
    layers, correlations, costs = zip(*by_run)
    say_figures(("", "ASI", "variance", "on the past", "nats/image"), layers, 3)
    ranks = say_figures(("Spearman's", "over layers", "over heads"), correlations, 2)
    cost = say_figures(("past kept by", "nats/token", "kB/image", "at d16: MB"), costs, 4)
    more_R = cost["by variance"][0]
    say_verdicts(CLAIMS, [
        ranks["- ASI"][0], ranks["variance"][1], more_R, more_R - cost["at random"][0]])


if __name__ == "__main__":
    run_program(main)
