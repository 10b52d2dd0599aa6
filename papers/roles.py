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

from math import inf

import torch
from torch import Tensor

from papers import Claim, open_runs, parser_of, say_evaluations, say_figures, say_verdicts
from papers.forgetful import forgetting
from papers.tuning import kept_tokens
from sample import Run, UserError, evaluate, run_program
from tokenizer import PUBLISHED_SCALES

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
CALIBRATION = 500   # training images, by which heads are chosen
PUBLISHED = {"depth": 16, "heads": 16, "D": 64, "scales": PUBLISHED_SCALES}   # VAR-d16


@torch.no_grad()
def statistics(run: Run, tokens_BL: Tensor, labels_B: Tensor) -> Tensor:
    """Of the last scale's queries [3, N, H]: how much of their attention is on the past, how much
    on the four largest there, and HACK's variance."""
    seen = []
    hooks = [block.attention.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
             for block in run.model.blocks]
    run.model(labels_B, run.tokenizer.teacher_inputs(tokens_BL))
    for hook in hooks:
        hook.remove()
    begin = run.model.config.spans[-1].start
    found = []
    for block, x_BLW in zip(run.model.blocks, seen):
        q_BHLD, k_BHLD, _, scale = block.attention.project(x_BLW)
        a_BHlL = (scale * q_BHLD[:, :, begin:] @ k_BHLD.mT).softmax(dim=-1)
        past_BHlX = a_BHlL[..., :begin]
        largest_BHlX = past_BHlX.topk(min(4, begin)).values
        found.append(torch.stack([
            past_BHlX.sum(dim=3).mean(dim=(0, 2)),
            largest_BHlX.sum(dim=3).mean(dim=(0, 2)),
            a_BHlL.var(dim=2).sum(dim=2).mean(dim=0),
        ]))
    return torch.stack(found, dim=1).cpu()


def rise(run: Run, looks_NH: Tensor, tokens_NL: Tensor, labels_N: Tensor) -> float:
    """By how many nats an image is less likely where only these heads look back."""
    labels = labels_N.tolist()
    usual_N = run.log_likelihood(tokens_NL, labels)
    return (usual_N - forgetting(run, looks_NH).log_likelihood(tokens_NL, labels)).mean().item()


def half(need_NH: Tensor) -> Tensor:
    """Those that need it most."""
    looks_X = torch.zeros(need_NH.numel(), dtype=torch.bool)
    looks_X[need_NH.flatten().topk(len(looks_X) // 2).indices] = True
    return looks_X.view_as(need_NH)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of numbers of which no two are alike."""
    ranks_2X = torch.stack([a.flatten(), b.flatten()]).argsort(dim=1).argsort(dim=1)
    return ranks_2X.double().corrcoef()[0, 1].item()


def cache_bytes(heads: int, scales: tuple[int, ...], D: int, each: int) -> int:
    """Keys and values of one image, of so many heads; each: bytes of a number."""
    return 2 * heads * sum(s * s for s in scales) * D * each


def study(run: Run) -> tuple[dict, dict, dict[str, list[Tensor]]]:
    """Of one run: figures of its layers, correlations, and which heads N, H a cache keeps."""
    tokens_NL, labels_N = (x[:CALIBRATION].long() for x in kept_tokens(run)[0].tensors)
    past_NH, largest_NH, variance_NH = statistics(run, tokens_NL, labels_N)
    N, H = past_NH.shape
    if N * H < 4 or N < 2:
        raise UserError(f"{run.options.run} has too few layers and heads to rank")
    alone_XNH = torch.eye(N * H, dtype=torch.bool).view(-1, N, H)
    layer_NNH = alone_XNH.view(N, H, N, H).any(dim=1)
    need_N, need_X = (
        torch.tensor([rise(run, ~heads_NH, tokens_NL, labels_N) for heads_NH in parts])
        for parts in (layer_NNH, alone_XNH))
    asi_N = (1 - past_NH.mean(dim=1)) * largest_NH.mean(dim=1)
    asi_NH = (1 - past_NH) * largest_NH
    by_layer = torch.stack([asi_N, variance_NH.mean(dim=1), past_NH.mean(dim=1), need_N])
    layers = {f"layer {n + 1}": row for n, row in enumerate(by_layer.T.tolist())}
    said = {"- ASI": (-asi_N, -asi_NH), "variance": (by_layer[1], variance_NH),
            "on the past": (by_layer[2], past_NH)}
    correlations = {
        name: [rank_correlation(of_N, need_N), rank_correlation(of_NH, need_X)]
        for name, (of_N, of_NH) in said.items()}
    torch.manual_seed(run.options.seed)
    caches = {
        "all heads": [torch.ones(N, H, dtype=torch.bool)],
        "by variance": [half(variance_NH)],
        "by ASI": [half(-asi_N[:, None].expand(N, H))],
        "by need": [half(need_X.view(N, H))],
        "at random": [half(torch.rand(N, H)) for _ in range(RANDOM)],
        "none": [torch.zeros(N, H, dtype=torch.bool)],
    }
    return layers, correlations, caches


def main() -> None:
    parser = parser_of("roles", __doc__)
    parser.set_defaults(count=500)
    options = parser.parse_args()
    rows = {}
    kept = []
    ...
