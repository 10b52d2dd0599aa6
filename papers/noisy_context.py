"""Noisy context (xAR, arXiv 2502.20388): a model that has read mistakes can put them right.

In training a VAR reads an image's own tokens; in drawing, those that it drew, and mistakes among
them, which it has never seen (exposure bias). So some tokens are replaced in what it reads, each by
one of the codes nearest to it (--kind: by others). Its targets, the tokens of finer scales, stand
for what the image has more than the sum with the mistakes in it, as in Infinity (2412.04431):

    shown_k = tokens_k, or others where rand < p          p: of each image another, up to the share
    f_hat = f_hat + phi(upsampled codes of shown_k)
    tokens_k+1 = nearest codes to read(f - f_hat, k + 1)

(xAR adds Gaussian noise to continuous latents, Infinity flips bits, and both do so in all of their
training. Here a trained model is tuned.)

And what becomes of a mistake is measured (mistakes.py): images are drawn twice, with the same
noise, and the second time one token of scale k is replaced. How far are the two latents apart,
after each finer scale, where after scale k it is 1? If these took no notice, it would stay 1. But
the encoder, which knows the image and corrects what it can, does not stay there either: a little
more or less left over, and another code is nearest. It is what the model is to be held against.
"""
from __future__ import annotations

import copy
from dataclasses import replace
from math import inf

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

from papers import (
    Claim, Trained, open_runs, parser_of, say_evaluations, say_figures, say_verdicts,
)
from papers.mistakes import by_encoder, by_model, drawn, near, read_and_asked
from papers.tuning import Tuning, kept_images
from support.cli import COUNT, SHARE, run_program
from support.evaluation import evaluate, evaluated_images
from support.images import save_picture, to_float
from support.presets import RATE

MISTAKES = 100   # images, with one each
TIMES = {"always": (0, 1), "early": (0, 0.5), "late": (0.5, 1)}   # from, to: shares of the steps
CLAIMS = (
    Claim("unfiltered, 3 points more recognised than of the control",
          holds=(3, inf), false=(-inf, 3)),
    Claim("clean images take at most 1 % more nats",
          holds=(-inf, 1), false=(1, inf)),
    Claim("in the control mistakes grow: at the end they are over 1, mean over their scales",
          holds=(1, inf), false=(-inf, 1)),
    Claim("with noisy context they end smaller than in the control",
          holds=(-inf, 0), false=(0, inf)),
)


class NoisyContext(Tuning):
    """Tunes a copy of the run's model on what its images are after some mistakes."""

    def __init__(self, run: Trained, share: float, steps: int, lr: float, kind: str = "near",
                 when: str = "early"):
        model = copy.deepcopy(run.model)
        super().__init__(run, model, "noisy_context-noisy", steps, lr)
        self.share = share
        self.by = kind   # of mistakes, what tokens are replaced by
        self.first, self.end = (share_of_steps * steps for share_of_steps in TIMES[when])
        self.made_with |= {"share": share, "kind": kind, "when": when}
        self.rows = kept_images(run).train
        self.held_out_rows = run.held_out

    def loss(self, model: nn.Module, images: Tensor, labels_B: Tensor):
        """Nats per token, with mistakes."""
        device = self.settings.machine.device
        share = self.share * (self.first <= self.step < self.end)
        share_B1 = share * torch.rand(len(images), 1, device=device)
        quantizer = self.tokenizer.quantizer
        with torch.no_grad():
            f_BCSS = self.tokenizer.latent(to_float(images.to(device)))
            if self.by == "own":
                inputs = quantizer.teacher_inputs(quantizer.encode(f_BCSS))
                logits_BLV = self.ema(labels_B.to(device), inputs).float()
                own = quantizer.split(Categorical(logits=logits_BLV).sample())

        def show(tokens_Bl: Tensor, k: int) -> Tensor:
            wrong_Bl = torch.rand(tokens_Bl.shape, device=device) < share_B1
            if self.by == "near":
                others_Bl = near(quantizer, tokens_Bl)
            elif self.by == "any":
                others_Bl = torch.randint_like(tokens_Bl, len(quantizer.codebook_VC))
            else:
                others_Bl = own[k]
            return torch.where(wrong_Bl, others_Bl, tokens_Bl)

        shown_BL, asked_BL = read_and_asked(quantizer, f_BCSS, show)
        logits_BLV = model(labels_B.to(device), quantizer.teacher_inputs(shown_BL)).float()
        return cross_entropy(logits_BLV.mT, asked_BL), lambda: {
            "replaced": (shown_BL != asked_BL).float().mean()}


def main() -> None:
    parser = parser_of("noisy_context", __doc__)
    parser.set_defaults(count=300)
    add = parser.add_argument
    add("--share", type=SHARE, default=0.2, help="of tokens, at most (default: %(default)s)")
    add("--kind", choices=("near", "any", "own"), default="near",
        help="one of the nearest codes, any code, or what the model would draw (default: near)")
    add("--when", choices=TIMES, default="early",
        help="in all steps, the first half or the second (default: early)")
    add("--steps", type=COUNT, default=100, help="of each tuning (default: %(default)s)")
    add("--lr", type=RATE, default=3e-3, help="peak learning rate (default: %(default)s)")
    options = parser.parse_args()
    how = options.steps, options.lr
    evaluations = {"control": [], "noisy context": []}
    curves = []
    for run in open_runs(options):
        images, labels_N = evaluated_images(run, options.count)
        step = max(1, options.count // MISTAKES)   # they are in the order of their classes
        plain = copy.deepcopy(run.model)
        stages = [Tuning(run, plain, "noisy_context-control", *how),
                  NoisyContext(run, options.share, *how, options.kind, options.when)]
        found = {}
        for (name, row), stage in zip(evaluations.items(), stages):
            tuned = replace(run, model=stage.run())
            row.append(evaluate(tuned, options.count, seeds=[0]))
            found[name] = by_model(tuned, labels_N[::step])
        curves.append({**found, "the encoder": by_encoder(run, images[::step])})
    control_R7, noisy_R7 = say_evaluations(evaluations).values()
    scales = run.model.config.scales
    ends = [{name: [curve[-1] for curve in of] for name, of in found.items()} for found in curves]
    heads = ("left of a mistake at", *(f"{s}x{s}" for s in scales[:-1]))
    left = say_figures(heads, ends, 3, base="control")
    control_R, noisy_R, _ = (figure.mean(axis=0) for figure in left.values())
    say_verdicts(CLAIMS, [
        (noisy_R7 - control_R7)[:, 1],
        100 * (noisy_R7[:, 0] / control_R7[:, 0] - 1),
        control_R,
        noisy_R - control_R,
    ])
    save_picture(options.run[0] / "papers" / "noisy_context.png", drawn(curves, scales))


if __name__ == "__main__":
    run_program(main)
