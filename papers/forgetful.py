"""A VAR of which only some heads look back, and how heads attend: for the page on roles."""
from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels import KeyRanges, block_attention
from sample import Run
from var import Attention


class Past:
    """Keys and values of earlier scales, of the heads that look back: a cache, in generation."""
    kept: tuple[Tensor, Tensor] | None = None

    def before(self, k_BhlD: Tensor, v_BhlD: Tensor) -> tuple[Tensor, Tensor]:
        """Those, and these after them."""
        if self.kept is not None:
            k_BhlD = torch.cat([self.kept[0], k_BhlD], dim=2)
            v_BhlD = torch.cat([self.kept[1], v_BhlD], dim=2)
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
        for looks in (True, False):
            heads_H = self.looks_H == looks
            if not heads_H.any():
                continue
            q_BhLD = q_BHLD[:, heads_H]
            k_BhSD = k_BHLD[:, heads_H]
            v_BhSD = v_BHLD[:, heads_H]
            if looks and past is not None:
                k_BhSD, v_BhSD = past.before(k_BhSD, v_BhSD)
            seen = ranges if looks else own
            o_BHLD[:, heads_H] = block_attention(q_BhLD, k_BhSD, v_BhSD, seen, scale)
        return self.attention.out(o_BHLD.transpose(1, 2).flatten(2))


def forgetting(run: Run, looks_NH: Tensor) -> Run:
    """Its layers N have heads H that look back, and others."""
    model = copy.deepcopy(run.model)
    for block, looks_H in zip(model.blocks, looks_NH):
        block.attention = Forgetful(block.attention, looks_H, model.config.scales)
    model.new_caches = lambda: [Past() for _ in model.blocks]
    return replace(run, model=model)


def past_bytes(heads: int, scales: tuple[int, ...], D: int, each: int) -> int:
    """Keys and values of one image in so many heads of all layers, when the last scale, which is
    nobody's past, is drawn; each: bytes of a number."""
    return 2 * heads * sum(s * s for s in scales[:-1]) * D * each


@torch.no_grad()
def statistics(run: Run, tokens_BL: Tensor, labels_B: Tensor) -> Tensor:
    """Of the last scale's queries [3, N, H]: how much of their attention is on the past, how much
    on the four largest there, and HACK's variance."""
    seen = []
    hooks = []
    for block in run.model.blocks:
        hooks.append(block.attention.register_forward_pre_hook(
            lambda _, given: seen.append(given[0])))
    device = run.machine.device
    inputs = run.tokenizer.teacher_inputs(tokens_BL.to(device))
    run.model(labels_B.to(device), inputs)
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
