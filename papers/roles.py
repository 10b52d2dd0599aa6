"""Who needs the past? Cache budgets by attention (ScaleKV, 2505.19602; HACK, 2504.09261).

Half of VAR's memory at the last scale is keys and values of coarser scales. Both papers give some
layers or heads more of it than others, and tell by how a query of the last scale attends, q to j:

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

import copy
from argparse import Namespace
from dataclasses import replace
from math import inf

import numpy as np
import torch
from torch import Tensor, nn

from kernels import KeyRanges, block_attention
from papers import Claim, open_runs, parser_of, say_evaluations, say_figures, say_verdicts
from papers.tuning import kept_tokens
from sample import Run, evaluate, evaluated_images, run_program
from tokenizer import PUBLISHED_SCALES
from var import VAR, Attention

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


class Past:
    """Keys and values of earlier scales, of the heads that look back: a cache, in generation."""

    def __init__(self):
        self.kept: tuple[Tensor, Tensor] | None = None

    def before(self, k_BhlD: Tensor, v_BhlD: Tensor) -> tuple[Tensor, Tensor]:
        """Those, and these after them."""
        if self.kept is not None:
            k_BhlD, v_BhlD = (torch.cat(pair, dim=2) for pair in zip(self.kept, (k_BhlD, v_BhlD)))
        self.kept = k_BhlD, v_BhlD
        return self.kept


class Forgetful(nn.Module):
    """Attention of which only some heads see more than their own scale."""

    def __init__(self, attention: Attention, looks_H: Tensor, scales: tuple[int, ...]):
        super().__init__()
        self.attention = attention
        self.looks_H = looks_H
        self.own = KeyRanges.from_scales(scales, last_scales=1)

    def forward(self, x_BLW: Tensor, ranges: KeyRanges, past: Past | None) -> Tensor:
        """past: in generation, where x is of one scale; else x is of all."""
        q_BHLD, k_BHLD, v_BHLD, scale = self.attention.project(x_BLW)
        L = x_BLW.shape[1]
        own = self.own if past is None else KeyRanges([0] * L, [L] * L)
        o_BHLD = torch.empty_like(q_BHLD)
        for heads_H, looks in ((self.looks_H, True), (~self.looks_H, False)):
            if heads_H.any():
                q_BhLD, *kv = (x_BHLD[:, heads_H] for x_BHLD in (q_BHLD, k_BHLD, v_BHLD))
                kv = past.before(*kv) if looks and past is not None else kv
                o_BHLD[:, heads_H] = block_attention(q_BhLD, *kv, ranges if looks else own, scale)
        return self.attention.out(o_BHLD.transpose(1, 2).flatten(2))


def forgetting(run: Run, looks_NH: Tensor) -> Run:
    """Its layers N have heads H that look back, and others."""
    model = copy.deepcopy(run.model)
    for block, looks_H in zip(model.blocks, looks_NH):
        block.attention = Forgetful(block.attention, looks_H, model.config.scales)
    model.new_caches = lambda: [Past() for _ in model.blocks]
    return replace(run, model=model)


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
