"""Tokens that are replaced, and what becomes of it: for the page on noisy context."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from papers import UNFILTERED
from sample import Run
from tokenizer import Quantizer

NEAREST = 16   # codes, one of which replaces another


@torch.no_grad()
def near(quantizer: Quantizer, tokens_Bl: Tensor) -> Tensor:
    """For each token another, drawn from those nearest to it."""
    codes_VC = quantizer.codebook_VC
    apart_VV = torch.cdist(codes_VC, codes_VC).fill_diagonal_(inf)
    nearest_VN = apart_VV.topk(min(NEAREST, len(codes_VC) - 1), largest=False).indices
    which_Bl = torch.randint(nearest_VN.shape[1], tokens_Bl.shape, device=tokens_Bl.device)
    return nearest_VN[tokens_Bl, which_Bl]


@torch.no_grad()
def read_and_asked(quantizer: Quantizer, f_BCSS: Tensor, show: Callable[[Tensor, int], Tensor]
                   ) -> tuple[Tensor, Tensor]:
    """Tokens [B, L] that make up what is read, show(tokens_Bl, k), and those that correct it."""
    f_hat_BCSS = quantizer.initial(len(f_BCSS))
    shown = []
    asked = []
    for k in range(len(quantizer.scales)):
        asked.append(quantizer.nearest(quantizer.read(f_BCSS - f_hat_BCSS, k)))
        shown.append(show(asked[-1], k))
        f_hat_BCSS = quantizer.accumulate(f_hat_BCSS, shown[-1], k)
    return torch.cat(shown, dim=1), torch.cat(asked, dim=1)


@dataclass
class Mistake:
    """One token of scale `scale` is another: to `generate`, something that it knows."""
    scale: int | None

    def put(self, drawn_Bl: Tensor, quantizer: Quantizer, _, k: int) -> Tensor:
        if k != self.scale:
            return drawn_Bl
        place_B1 = torch.randint(drawn_Bl.shape[1], (len(drawn_Bl), 1), device=drawn_Bl.device)
        return drawn_Bl.scatter(1, place_B1, near(quantizer, drawn_Bl.gather(1, place_B1)))


def left_of(quantizer: Quantizer, right_NL: Tensor, wrong_NL: Tensor, k: int) -> list[float]:
    """How far the latents are apart after scale k, for which it is 1, and after each later one."""
    ends = list(accumulate(s * s for s in quantizer.scales))
    apart = [quantizer.decode(right_NL[:, :end]) - quantizer.decode(wrong_NL[:, :end])
             for end in ends[k:]]
    return [(x.norm() / apart[0].norm()).item() for x in apart]


def mistakes_of(quantizer: Quantizer, made: Callable[[Mistake], Tensor]) -> list[list[float]]:
    """What is left of a mistake of each scale but the last. made: tokens [N, L] with a mistake."""
    tokens = []
    scales = range(len(quantizer.scales) - 1)
    for scale in (None, *scales):
        torch.manual_seed(0)
        tokens.append(made(Mistake(scale)).to(quantizer.codebook_VC.device))
    return [left_of(quantizer, tokens[0], wrong_NL, k) for k, wrong_NL in enumerate(tokens[1:])]


def by_model(run: Run, labels_N: Tensor) -> list[list[float]]:
    """In images that are drawn, twice with the same noise."""
    drawing = replace(run, sampling=UNFILTERED)
    return mistakes_of(run.tokenizer.quantizer, lambda mistake: drawing.generate(
        labels_N.tolist(), 0, lambda _: mistake))


def by_encoder(run: Run, images: Tensor) -> list[list[float]]:
    """In images that are encoded: all that finer scales can repair."""
    quantizer = run.tokenizer.quantizer
    f_NCSS = run.encode(images)[0].to(run.machine.device)
    return mistakes_of(quantizer, lambda mistake: read_and_asked(
        quantizer, f_NCSS, lambda x_Nl, k: mistake.put(x_Nl, quantizer, None, k))[0])


def drawn(by_run: list[dict[str, list[list[float]]]], scales: tuple[int, ...]) -> Figure:
    """A line for each scale of a mistake, dashed and so on by name; means over the runs."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, style in zip(by_run[0], ("-", "--", ":")):
        for k in range(len(scales) - 1):
            mean = np.mean([rows[name][k] for rows in by_run], axis=0)
            axis.plot(range(k, len(scales)), mean, style, color=f"C{k}", label=None if k else name)
    axis.set(xlabel="after scale", ylabel="distance of the latents", xticks=range(len(scales)),
             xticklabels=[f"{s}x{s}" for s in scales])
    axis.legend()
    return figure
