"""HMAR (arXiv 2506.04421): a token attends to its own scale alone; and scales have weights.

What the past decided is in f_hat, which every token reads. So the published model lets no token
look at coarser scales, `train.py --last-scales 1`, and needs no cache. The cross entropy of a scale
is the mean over its tokens, and scales are weighed by a bell over their relative sides,

    w_k  ~  exp(-z_k^2 / 2),    z = (s - mean of s) / deviation of s,    in reversed order

which gives the finest scale less and the coarse ones more than VAR's mean over all tokens does.

VAR, the same with own-scale attention, and with both, are trained from scratch for as many steps.
"""
from __future__ import annotations

from dataclasses import replace
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from papers import Claim, Trained, open_runs, parser_of, say_evaluations, say_verdicts
from papers.tuning import Tuning
from support.cli import COUNT, run_program
from support.evaluation import evaluate
from var import VAR

CLAIMS = (
    Claim("own-scale attention costs less than 0.02 nats per token",
          holds=(-inf, 0.02), false=(0.02, inf)),
    Claim("alone, it makes images worse, by Fréchet distance (as published: FID 3.50 to 3.76)",
          holds=(0, inf), false=(-inf, 0)),
    Claim("with weights, they are better than VAR's (as published: FID 3.42)",
          holds=(-inf, 0), false=(0, inf)),
)


def weights_of(scales: tuple[int, ...]) -> Tensor:
    """Of the scales, [K]; they sum up to 1."""
    s_K = torch.tensor(scales, dtype=torch.float)
    z_K = (s_K - s_K.mean()) / s_K.std()
    bell_K = -z_K.square() / 2
    return bell_K.softmax(dim=0).flip(0)


class WeightedTuning(Tuning):
    """The mean over a scale's tokens, and then a weighted one over scales."""

    def loss(self, model: VAR, tokens_BL: Tensor, labels_B: Tensor):
        tokens_BL, labels_B = self.on_device(tokens_BL, labels_B)
        inputs = self.tokenizer.teacher_inputs(tokens_BL)
        logits_BLV = model(labels_B, inputs).float()
        loss_BL = F.cross_entropy(logits_BLV.mT, tokens_BL, reduction="none")
        loss_K = self.per_scale(loss_BL)
        return loss_K @ weights_of(model.config.scales).to(loss_K), dict


def trained(run: Trained, steps: int, name: str, last_scales: int | None, kind: type[Tuning]
            ) -> Trained:
    """The run with another model, trained from scratch."""
    torch.manual_seed(run.settings.seed)
    config = replace(run.model.config, last_scales=last_scales)
    model = VAR(config).to(run.machine.device)
    stage = kind(run, model, f"hmar_markov-{name}", steps, run.settings.preset.var_lr)
    return replace(run, model=stage.run())


def main() -> None:
    parser = parser_of("hmar_markov", __doc__)
    parser.add_argument("--steps", type=COUNT, default=600, help="of each training (default: 600)")
    options = parser.parse_args()
    runs = open_runs(options)
    config = runs[0].model.config
    weights = zip(config.scales, weights_of(config.scales).tolist())
    print("weights of the scales: " + ", ".join(f"{s}x{s} {weight:.3f}" for s, weight in weights))
    kinds = {
        "VAR": ("plain", None, Tuning),
        "own scale": ("own", 1, Tuning),
        "own scale, weights": ("weighted", 1, WeightedTuning),
    }
    found = {}
    for name, how in kinds.items():
        models = [trained(run, options.steps, *how) for run in runs]
        found[name] = [evaluate(run, options.count, seeds=[0]) for run in models]
    plain_R7, own_R7, weighted_R7 = say_evaluations(found).values()
    say_verdicts(CLAIMS, [
        (own_R7[:, 0] - plain_R7[:, 0]) / config.length,
        own_R7[:, 3] - plain_R7[:, 3],
        weighted_R7[:, 3] - plain_R7[:, 3],
    ])


if __name__ == "__main__":
    run_program(main)
