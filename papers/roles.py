"""Who needs the past? Cache budgets by attention (ScaleKV, 2505.19602; HACK, 2504.09261).

Sampling keeps the keys and values of all scales. Both papers let some layers or heads keep more of
them than others, and tell which by how a query of the last scale attends, a_qj from q to key j:

    ScaleKV   ASI = mean_q sum_{j in own scale} a_qj  *  mean_q (the 4 largest a_qj in the past)
              of layers; low ones spread their attention, are "drafters" and need the past
    HACK      sum_j var_q a_qj
              of heads; high ones are "structural", need the past; the others look all alike

Here the truth stands beside it: by how many nats an image becomes less likely, untrained, when that
layer or head alone sees its own scale only. (The papers keep some keys of any layer; here it is all
or nothing, since with so few keys there is little between. Theirs are large models; nothing is read
from theirs but the rule.) Then a cache that holds the past of half the heads, chosen by either.
"""
from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from papers import Claim, open_runs, parser_of, say_evaluations, say_figures, say_verdicts
from papers.forgetful import cache_bytes, forgetting
from papers.tuning import kept_tokens
from sample import Run, evaluate, evaluated_images, run_program
from train import PRESETS

CLAIMS = (   # where it holds, where it is false
    Claim("over layers, low ASI goes with a need of the past: Spearman's correlation > 0.5",
          (0.5, 1), (-1, 0.2)),
    Claim("over heads, high variance does: Spearman's correlation > 0.5", (0.5, 1), (-1, 0.2)),
    Claim("half of the heads, by variance, lose the past for less than 0.01 nats per token",
          (-inf, 0.01), (0.01, inf)),
    Claim("and for less than a half chosen at random loses it, in nats per token",
          (-inf, 0), (0, inf)),
)
CALIBRATION = 200   # training images


@torch.no_grad()
def statistics(run: Run, tokens_BL: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
    """Of the attention of the last scale's queries, in every layer and head: [N, H]."""
    model = run.model
    seen = []
    hooks = [block.attention.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
             for block in model.blocks]
    model(labels_B, run.tokenizer.teacher_inputs(tokens_BL))
    for hook in hooks:
        hook.remove()
    begin = model.config.spans[-1].start
    found = {"- ASI": [], "variance": [], "on the past": []}
    for block, x_BLW in zip(model.blocks, seen):
        q_BHLD, k_BHLD, _, scale = block.attention.project(x_BLW)
        a_BHlL = (scale * q_BHLD[:, :, begin:] @ k_BHLD.mT).softmax(dim=-1)
        past_BHlL = a_BHlL[..., :begin]
        on_past_H = past_BHlL.sum(dim=3).mean(dim=(0, 2))
        largest = past_BHlL.topk(min(4, begin), dim=3).values
        found["- ASI"].append(-(1 - on_past_H) * largest.sum(dim=3).mean(dim=(0, 2)))
        found["variance"].append(a_BHlL.var(dim=2).sum(dim=2).mean(dim=0))
        found["on the past"].append(on_past_H)
    return {name: torch.stack(values).cpu() for name, values in found.items()}


def rises(run: Run, looks: list[Tensor], tokens_NL: Tensor, labels: list[int]) -> Tensor:
    """How many nats per token images cost more with these heads looking back: [len(looks)]."""
    costs = [-forgetting(run, looks_NH).log_likelihood(tokens_NL, labels) for looks_NH in looks]
    plain = -run.log_likelihood(tokens_NL, labels)
    return (torch.stack(costs) - plain).mean(dim=1) / tokens_NL.shape[1]


def alone(shape: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """All heads look back but those of one layer, for each; and all but one head, for each."""
    layers = []
    heads = []
    for layer in range(shape[0]):
        layers.append(torch.ones(shape, dtype=torch.bool))
        layers[-1][layer] = False
        for head in range(shape[1]):
            heads.append(torch.ones(shape, dtype=torch.bool))
            heads[-1][layer, head] = False
    return layers, heads


def spearman(x_N: Tensor, y_N: Tensor) -> float:
    """Correlation of ranks, of values that are all different."""
    ranks_2N = torch.stack([x_N, y_N]).argsort(dim=1).argsort(dim=1)
    return ranks_2N.double().corrcoef()[0, 1].item()


def upper_half(score_NH: Tensor) -> Tensor:
    return score_NH > score_NH.median()


def study(run: Run) -> tuple[dict[str, list[float]], dict[str, list[float]], Run]:
    """How well statistics tell who needs the past; what caches for half of the heads cost; and the
    run with the one that the variance chooses."""
    train, _, _ = kept_tokens(run)
    tokens_NL, labels_N = train[:CALIBRATION]
    device = run.options.device
    found = statistics(run, tokens_NL.to(device).long(), labels_N.to(device))
    shape = tuple(found["variance"].shape)
    images, labels_N = evaluated_images(run, run.options.count)
    held_out = run.encode(images)[1], labels_N.tolist()
    layers, heads = (rises(run, looks, *held_out) for looks in alone(shape))
    told = {}
    for name, score_NH in found.items():
        told[name] = [spearman(score_NH.mean(dim=1), layers), spearman(score_NH.flatten(), heads)]
    noise = torch.Generator().manual_seed(run.options.seed)
    random = [upper_half(torch.rand(shape, generator=noise)) for _ in range(5)]
    halves = {name: [upper_half(score_NH)] for name, score_NH in found.items()}
    halves |= {"the truth": [upper_half(heads.view(shape))], "chance, mean of 5": random}
    halves |= {"none of them": [torch.zeros(shape, dtype=torch.bool)]}
    whole = cache_bytes(forgetting(run, torch.ones(shape, dtype=torch.bool)))
    caches = {}
    for name, looks in halves.items():
        kept = cache_bytes(forgetting(run, looks[0]))
        caches[name] = [100 * kept / whole, rises(run, looks, *held_out).mean().item()]
    return told, caches, forgetting(run, halves["variance"][0])


def say_published_cache() -> None:
    """Of the published d16, which the preset for ImageNet has the shape of."""
    preset = PRESETS["imagenet256"]
    length = sum(s * s for s in preset.scales)
    numbers = 2 * 2 * length * preset.depth * preset.width   # keys and values; guidance's two rows
    print(f"the published d16 keeps {2 * numbers / 1e6:.0f} MB for an image with guidance in bf16; "
          f"half of its heads are {numbers / 1e6:.0f} MB")


def main() -> None:
    options = parser_of("roles", __doc__).parse_args()
    evaluations = {"all heads look back": [], "half, by variance": []}
    studies = []
    for run in open_runs(options):
        *tables, half = study(run)
        studies.append(tables)
        for found, part in zip(evaluations.values(), (run, half)):
            found.append(evaluate(part, options.count, options.seeds))
    told, caches = zip(*studies)
    told = say_figures(("correlation with the need of", "layers", "heads"), told, 2)
    caches = say_figures(("half of the heads, by", "cache, %", "nats/token more"), caches, 4)
    say_evaluations(evaluations)
    say_published_cache()
    by_variance_R = caches["variance"][1]
    say_verdicts(CLAIMS, [
        told["- ASI"][0],
        told["variance"][1],
        by_variance_R,
        by_variance_R - caches["chance, mean of 5"][1],
    ], options.started)


if __name__ == "__main__":
    run_program(main)
