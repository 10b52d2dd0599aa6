"""Collaborative decoding (CoDe, arXiv 2411.17787): a large model drafts, a small one refines.

Most of VAR's time goes into the finest scales; what an image is like is decided at the coarse ones.
So a large model, the drafter, draws the first n scales, and a small one, the refiner, takes over.
Any two VARs over one tokenizer can do that, as they read and write the same tokens. Together they
are one model, with a likelihood,

    log p(r_1 ... r_K) = sum_{k <= n} log p_large(r_k | r_<k) + sum_{k > n} log p_small(r_k | r_<k)

so what a takeover costs is known exactly, for every n, and before anything is drawn. Keys and
values of one mean nothing to the other: the refiner goes through the drafted scales itself. (The
paper also tunes both, each for its own scales, and draws with other filters after the takeover.
Here is what the takeover alone does.)
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from timeit import repeat

import numpy as np
import torch
from torch import Tensor, nn

from papers import Claim, Trained, open_runs, parser_of, say_evaluations, say_figures, say_verdicts
from papers.tuning import Tuning
from support.cli import COUNT, run_program
from support.devices import forward_flops
from support.evaluation import evaluate
from tokenizer import Quantizer, Tokenizer
from var import VAR

CLAIMS = (   # where it holds, where it is false
    Claim("with the last scale by the small model, an image takes less than 2 % more nats",
          (-inf, 2), (2, inf)),
    Claim("and less than 0.6 of the time", (0, 0.6), (0.6, inf)),
    Claim("and, unfiltered, at most 2 points fewer are recognised", (-2, inf), (-inf, -2)),
    Claim("the small model's excess, in nats per token, is less at the last scale than the mean of "
          "that at the others", (-inf, 0), (0, inf)),
)
SMALL = {"depth": 2, "width": 48, "heads": 3}


class Drafted(nn.Module):
    """A VAR of two: the drafter predicts the first n scales, the refiner the others, 1 or more."""

    def __init__(self, drafter: VAR, refiner: VAR, n: int):
        super().__init__()
        self.config = drafter.config
        self.drafter = drafter
        self.first = shortened(drafter, n)
        self.refiner = refiner

    def forward(self, labels_B: Tensor, inputs: Tensor) -> Tensor:
        """Logits [B, L, V], as of `VAR.forward`."""
        own = self.first.config.length
        drafted_BlV = self.drafter(labels_B, inputs)[:, :own]
        refined_BlV = self.refiner(labels_B, inputs)[:, own:]
        return torch.cat([drafted_BlV, refined_BlV], dim=1)

    def generate(self, tokenizer: Tokenizer, labels_B: Tensor, cfg: float, top_k: int, top_p: float,
                 generator: torch.Generator, known: None, growth: float) -> Tensor:
        """Tokens [B, L], as of `VAR.generate`."""
        n = len(self.first.config.scales)
        # Guidance grows, to cfg at the last scale; to a part of it at the drafter's.
        share = ((n - 1) / (len(self.config.scales) - 1)) ** growth
        filters = top_k, top_p, generator
        before = generator.get_state()
        drafted_Bl = self.first.generate(tokenizer, labels_B, cfg * share, *filters, None, growth)
        generator.set_state(before)   # whoever draws a scale meets the same noise there
        drafts = Drafts(tokenizer.quantizer.split(drafted_Bl))
        return self.refiner.generate(tokenizer, labels_B, cfg, *filters, drafts, growth)


@dataclass
class Drafts:
    """The first scales, which the refiner puts for what it draws, as it does a `Known`'s tokens."""
    tokens: list[Tensor]

    def put(self, drawn_Bl: Tensor, quantizer: Quantizer, f_hat_BCSS: Tensor, k: int) -> Tensor:
        return self.tokens[k] if k < len(self.tokens) else drawn_Bl


def shortened(model: VAR, n: int) -> VAR:
    """The same model up to its first n scales, which need nothing of those after them."""
    short = VAR(replace(model.config, scales=model.config.scales[:n]))
    state = model.state_dict()
    state["position_1LW"] = state["position_1LW"][:, :short.config.length]
    state["level_embedding.weight"] = state["level_embedding.weight"][:n]
    short.load_state_dict(state)
    return short.to(model.level_L.device).eval()


def small_model(run: Trained, steps: int | None) -> VAR:
    """Trained as the run's own was."""
    preset = run.settings.preset
    torch.manual_seed(run.settings.seed)
    small = VAR(replace(run.model.config, **SMALL)).to(run.machine.device)
    stage = Tuning(run, small, "drafting", steps or preset.var_steps, preset.var_lr)
    small_flops, large_flops = (forward_flops(x, *stage.example()) for x in (small, run.model))
    print(f"the small model takes {small_flops / large_flops:.0%} of the large one's FLOPs")
    return stage.run()


def takeovers(large: VAR, small: VAR) -> dict[str, nn.Module]:
    """None, at the last scale, at the last two, ... and at all."""
    models = {"large alone": large}
    for n, s in reversed(list(enumerate(large.config.scales))):
        models[f"small from {s}x{s}"] = Drafted(large, small, n) if n else small
    return models


def main() -> None:
    parser = parser_of("drafting", __doc__)
    parser.set_defaults(count=500)
    parser.add_argument("--steps", type=COUNT,
                        help="of the small model's training; if not given, as many as the run's")
    options = parser.parse_args()
    rows = {}
    by_run = []
    for run in open_runs(options):
        models = takeovers(run.model, small_model(run, options.steps))
        labels = [i % len(run.classes) for i in range(100)]   # of the images that are timed
        nats = []
        seconds = []
        for name, model in models.items():
            part = replace(run, model=model)
            found = evaluate(part, options.count, seeds=[0])
            rows.setdefault(name, []).append(found)
            nats.append(found.nats_per_image)
            seconds.append(min(repeat(lambda: part.generate(labels, 0), number=1, repeat=5)))
        sizes = np.square(run.model.config.scales)[::-1]   # as they are taken over
        shares = np.array(seconds) / seconds[0]
        excesses = [0, *np.diff(nats) / sizes]
        by_run.append(dict(zip(models, zip(shares, excesses))))
    large_R7, last_R7, *_ = say_evaluations(rows).values()
    costs = say_figures(("", "share of time", "more nats/token"), by_run, 3)
    _, (share_R, excess_R), *others = costs.values()
    others_R = np.mean(others, axis=0)[1]
    say_verdicts(CLAIMS, [
        100 * (last_R7[:, 0] / large_R7[:, 0] - 1),
        share_R,
        (last_R7 - large_R7)[:, 1],
        excess_R - others_R,
    ])


if __name__ == "__main__":
    run_program(main)
