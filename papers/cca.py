"""Condition contrastive alignment (CCA, arXiv 2410.09347): guidance trained into the weights.

Guidance draws from p(x | c) (p(x | c) / p(x))^t, away from what images of any class would have. At
each scale it takes a second pass, for the null class. But what it asks for can be learned, from
contrast: of images x with their class c, and the same images with the class c' of another. With

    r(x, c) = log p_theta(x | c) - log p_ref(x | c)            ref: the weights before the tuning
    L = -log sigmoid(beta r(x, c)) - lambda log sigmoid(-beta r(x, c'))

an image becomes more likely under its own class and less so under another; log p is the sum over
all tokens. L is least where p_theta is p_ref (p(x | c) / p(x))^(1 / beta) but for a factor, and a
short tuning goes some way there: the further, the larger lambda. One image in ten loses both its
classes and is no contrast, but a right image of the null class, so that guidance works as before.

The rival, guidance, buys recognition with variety: recall is compared where it is recognised alike.
"""
from __future__ import annotations

import copy
from dataclasses import replace
from math import inf

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from papers import Claim, Trained, figures_of, open_runs, parser_of, say_figures, say_verdicts
from papers.tuning import Tuning
from support.cli import COUNT, run_program, several
from support.evaluation import evaluate
from support.images import save_picture
from support.presets import RATE, WEIGHT

BETA = 0.04   # twice the paper's
GUIDANCE = (0.5, 1.0, 2.0, 4.0)
HEADS = ("", "nats/image", "recognised %", "recall %", "Fréchet")
FILTERED = [0, 4, 5, 6]   # of what `figures_of` returns, those of the run's guidance and filters

CLAIMS = (   # in points, without filters; CCA without guidance: the last lambda, then all
    Claim("10 points more recognised than of the control", holds=(10, inf), false=(-inf, 10)),
    Claim("at most 3 fewer than of the control at cfg 2", holds=(-3, inf), false=(-inf, -3)),
    Claim("no less recall than of guidance recognised alike", holds=(0, inf), false=(-inf, 0)),
)


class Contrast(Tuning):
    """Tunes a copy of the run's model against the model itself, wrong classes weighed by lambda."""

    def __init__(self, run: Trained, weight: float, steps: int, lr: float):
        model = copy.deepcopy(run.model)
        model.config = replace(model.config, label_dropout=0.0)   # `loss` drops labels itself
        super().__init__(run, model, f"cca-{weight:g}", steps, lr)
        self.reference = run.model
        self.weight = weight

    def loss(self, model: nn.Module, tokens_BL: Tensor, labels_B: Tensor):
        tokens_BL, labels_B = self.on_device(tokens_BL, labels_B)
        others_B = labels_B.roll(-1)
        chance_B = torch.rand(labels_B.shape, device=labels_B.device)
        dropped_B = chance_B < self.reference.config.label_dropout
        contrast_B = (others_B != labels_B) & ~dropped_B   # a neighbour may be of the same class
        labels_2B = torch.cat([labels_B, others_B])
        labels_2B = labels_2B.masked_fill(dropped_B.repeat(2), self.model.config.classes)
        tokens_2BL = tokens_BL.repeat(2, 1)
        inputs = self.tokenizer.teacher_inputs(tokens_2BL)                      # [2 B, L-1, C]
        with torch.no_grad():
            before_2B = log_likelihood(self.reference, tokens_2BL, labels_2B, inputs)
        after_2B = log_likelihood(model, tokens_2BL, labels_2B, inputs)
        own_B, other_B = (after_2B - before_2B).chunk(2)
        loss = contrastive_loss(own_B, other_B, contrast_B, self.weight)
        return loss, lambda: {"own": own_B.mean(), "other": other_B.mean()}


def log_likelihood(model: nn.Module, tokens_BL: Tensor, labels_B: Tensor, inputs: Tensor) -> Tensor:
    """log p(tokens | class) [B], in nats."""
    logits_BVL = model(labels_B, inputs).float().transpose(1, 2)
    return -F.cross_entropy(logits_BVL, tokens_BL, reduction="none").sum(dim=1)


def contrastive_loss(own_B: Tensor, other_B: Tensor, contrast_B: Tensor, weight: float) -> Tensor:
    """L of r(x, c) and r(x, c'): the mean over images, over max(1, lambda), as the authors have it.

    contrast_B: where it is false, c' is as right as c, and r(x, c') is to grow like r(x, c).
    """
    right_B = F.logsigmoid(BETA * own_B)
    also_right_B = F.logsigmoid(BETA * other_B)
    wrong_B = weight * F.logsigmoid(-BETA * other_B)
    return -(right_B + wrong_B.where(contrast_B, also_right_B)).mean() / max(1, weight)


def study(run: Trained, weights: tuple[float, ...], steps: int, lr: float, count: int
          ) -> dict[str, np.ndarray]:
    """What is measured of one run, as in HEADS."""
    def figures(model: nn.Module, **sampling: float) -> np.ndarray:
        tuned = replace(run, model=model, sampling=replace(run.sampling, **sampling))
        return np.array(figures_of(evaluate(tuned, count, seeds=[0])))

    plain = Tuning(run, copy.deepcopy(run.model), "cca-plain", steps, lr).run()
    plain_7 = figures(plain)
    rows = {"plain, cfg 0": plain_7[:4]}
    for cfg in GUIDANCE:
        rows[f"plain, cfg {cfg:g}"] = figures(plain, cfg=cfg, top_k=0, top_p=1.0)[FILTERED]
    for weight in weights:
        tuned_7 = figures(Contrast(run, weight, steps, lr).run(), cfg=0.0)
        rows[f"CCA, lambda {weight:g}"] = tuned_7[:4]
    return rows | {"plain, default": plain_7[FILTERED], "CCA, default but cfg 0": tuned_7[FILTERED]}


def curve(rows: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Recognised and recall [2, P, ...] of the rows of this name, a point for each strength."""
    return np.stack([row[1:3] for key, row in rows.items() if key.startswith(name)], axis=1)


def recall_beside(rows: dict[str, np.ndarray]) -> float:
    """How much more recall CCA has than guidance recognised as well, or best; mean over lambda."""
    recognised_P, recall_P = curve(rows, "plain, cfg")
    differences = []
    for recognised, recall in curve(rows, "CCA, lambda").T:
        rivals_P = recall_P[recognised_P >= min(recognised, recognised_P.max())]
        differences.append(recall - rivals_P.max())
    return float(np.mean(differences))


def main() -> None:
    parser = parser_of("cca", __doc__)
    add = parser.add_argument
    add("--weights", type=several(WEIGHT), default=(1, 10), help="lambda, of a tuning each")
    add("--steps", type=COUNT, default=200, help="of every tuning (default: %(default)s)")
    add("--lr", type=RATE, default=1e-3, help="peak learning rate (default: %(default)s)")
    options = parser.parse_args()
    how = options.weights, options.steps, options.lr, options.count
    by_run = [study(run, *how) for run in open_runs(options)]
    figures = say_figures(HEADS, by_run, 2, base="plain, cfg 0")
    tuned_R = figures[f"CCA, lambda {options.weights[-1]:g}"][1]
    differences = [tuned_R - figures[f"plain, cfg {cfg}"][1] for cfg in (0, 2)]
    say_verdicts(CLAIMS, [*differences, list(map(recall_beside, by_run))])
    axis = Figure(figsize=(5, 4), layout="constrained").subplots()
    for name in ("plain, cfg", "CCA, lambda"):
        axis.plot(*curve(figures, name).mean(axis=2), marker="o", label=name)
    axis.set(xlabel="recognised, %", ylabel="recall, %")
    axis.legend()
    save_picture(options.run[0] / "papers" / "cca.png", axis.figure)


if __name__ == "__main__":
    run_program(main)
