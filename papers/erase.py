"""Erasing a class (EAR, arXiv 2506.20151): is what a model unlearns gone, or only not called up?

Asked for a class c, the model is to go the other way from what it would draw if asked for none.
With h what the head reads, of the weights before the tuning, images of c have the loss

    |h_theta(c) - [h(null) - eta (h(c) - h(null))]|^2                at every place

and those of other classes their cross entropy, so that these are kept. (The authors tune the first
five layers' attention in Janus-Pro, by images that it draws; here all weights are tuned, by real
ones. Where training drops a class, h_theta has none: c is not to come without being asked for.)

The rival takes no training: the class's row of the embedding becomes the null class's. Two attacks
(attacks.py) look for c in what should have lost it. Left halves of its images are completed, the
class told or not. And c is learned again, in 20 steps: if they bring back what took 1550, was it
gone? That tells something only beside how well a class that was never there is learned in 20 steps.
"""
from __future__ import annotations

import copy
from dataclasses import replace
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from papers import (
    Claim, Trained, open_runs, parser_of, say_evaluations, say_figures, say_verdicts,
)
from papers.attacks import AGAIN, LR, found_of, learned
from papers.tuning import Tuning
from sample import class_indices
from support.cli import COUNT, run_program
from support.evaluation import evaluate

ETA = 2.0   # twice the authors'
HEADS = ("", "nats", "untold", "recognised %", "f. recognised %", "halves %", "halves, untold %")
CLAIMS = (
    Claim("of the erased class under 10 % are recognised, unfiltered", (-inf, 10), (10, inf)),
    Claim("of the others at most 2 points fewer than the control's", (-2, inf), (-inf, -2)),
    Claim("its halves, untold, become its images at most half as often", (-inf, 0.5), (0.5, inf)),
    Claim("20 steps bring back over half of what the control has", (0.5, inf), (-inf, 0.5)),
    Claim("and fewer points than after the row was overwritten", (-inf, 0), (0, inf)),
)


class Erasing(Tuning):
    """Tunes a copy of the run's model: away from the class, and as ever where it is another."""

    def __init__(self, run: Trained, label: int, steps: int):
        super().__init__(run, copy.deepcopy(run.model), "erase-ear", steps, LR)
        self.reference = run.model
        self.label = label

    def loss(self, model: nn.Module, tokens_BL: Tensor, labels_B: Tensor):
        tokens_BL, labels_B = self.on_device(tokens_BL, labels_B)
        inputs = self.tokenizer.teacher_inputs(tokens_BL)                       # [B, L-1, C]
        logits_BLV, h_BLW = read_by_head(model, labels_B, inputs)
        nats_BL = F.cross_entropy(logits_BLV.float().mT, tokens_BL, reduction="none")
        its_B = labels_B == self.label
        its = labels_B[its_B]
        with torch.no_grad():
            own_bLW, none_bLW = (
                read_by_head(self.reference, labels_b, inputs[its_B])[1]
                for labels_b in (its, torch.full_like(its, self.reference.config.classes)))
        away_bLW = none_bLW - ETA * (own_bLW - none_bLW)
        error_bL = (h_BLW[its_B] - away_bLW).square().mean(dim=2)
        return torch.cat([nats_BL[~its_B], error_bL]).mean(), dict


def read_by_head(model: nn.Module, labels_B: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, L, V], and what they are made of [B, L, W]."""
    seen = []
    hook = model.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logits_BLV = model(labels_B, inputs)
    hook.remove()
    return logits_BLV, seen[0]


def overwritten(model: nn.Module, label: int) -> nn.Module:
    """The same, but for which the class is no class."""
    model = copy.deepcopy(model)
    row_VW = model.class_embedding.weight.data
    row_VW[label] = row_VW[model.config.classes]
    return model


def main() -> None:
    parser = parser_of("erase", __doc__)
    parser.set_defaults(count=500)
    parser.add_argument("--erased", default="heart", help="the class (default: %(default)s)")
    parser.add_argument("--steps", type=COUNT, default=100, help="of tuning (default: %(default)s)")
    options = parser.parse_args()
    others = {"plain": [], "erased": []}
    by_run = []
    for run in open_runs(options):
        (label,) = class_indices([options.erased], run.classes)
        plain = Tuning(run, copy.deepcopy(run.model), "erase-plain", options.steps, LR).run()
        models = {"plain": plain, "row": overwritten(plain, label)}
        models["erased"] = Erasing(run, label, options.steps).run()
        others_N = run.held_out.tensors[1] != label
        rest = replace(run, held_out=TensorDataset(*(x[others_N] for x in run.held_out.tensors)))
        for name, row in others.items():
            row.append(evaluate(replace(rest, model=models[name]), options.count, seeds=[0]))
        for name in ("row", "erased"):
            models[f"{name}, again"] = learned(run, models[name], label, f"erase-again-{name}")
        by_run.append({name: found_of(replace(run, model=model), label)
                       for name, model in models.items()})
        unseen = learned(run, models["row"], label, "erase-unseen", flips=True)
        by_run[-1]["unseen"] = found_of(replace(run, model=unseen), label, flips=True)
    plain_R7, erased_R7 = say_evaluations(others).values()
    print(f"so far all but {options.erased}; row: overwritten; again: {AGAIN} steps on its images\n"
          f"unseen: of row, {AGAIN} steps on its images upside down, and so measured")
    rows = say_figures(HEADS, by_run, 1, base="plain")
    plain, _, erased, row_again, again, _ = rows.values()   # [6, runs] each
    say_verdicts(CLAIMS, [
        erased[2], (erased_R7 - plain_R7)[:, 1], erased[5] / plain[5], again[2] / plain[2],
        again[2] - row_again[2]])


if __name__ == "__main__":
    run_program(main)
