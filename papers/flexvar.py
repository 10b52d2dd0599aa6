"""FlexVAR (arXiv 2502.20313): maps of the latent itself, and positions that can be sampled.
"""
from __future__ import annotations

import copy
from dataclasses import replace
from itertools import accumulate
from math import inf

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from papers import (
    FILTERED, UNFILTERED, Claim, Trained, open_runs, parser_of, say_figures, say_verdicts,
)
from papers.flexible import flexible, resized
from support.cli import COUNT, UserError, run_program
from support.evaluation import Judge, evaluated_images, kept_classifier, psnr
from support.images import Row, grid, save_picture, to_bytes
from var import VAR

SCHEDULES = ((1, 4, 8), (1, 2, 4, 8), (1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 5, 6, 7, 8))
SIZES = ((1, 2, 4, 6), (1, 2, 3, 5, 8, 10), (1, 2, 3, 5, 8, 12))
HEADS = ("recognised %", "recall %", "Fréchet", "f. recognised %", "f. recall %")
CLAIMS = ()


def shortened(run: Trained, scales: tuple[int, ...]) -> Trained:
    """The run, weights and all, with the other ones of its scales left out."""
    config = run.model.config
    kept = [config.scales.index(s) for s in scales]
    state = run.model.state_dict()
    places = [state["position_1LW"][:, config.spans[k]] for k in kept]
    state["position_1LW"] = torch.cat(places, dim=1)
    state["level_embedding.weight"] = state["level_embedding.weight"][kept]
    model = VAR(replace(config, scales=scales))
    model.load_state_dict(state)
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.config = replace(tokenizer.config, scales=scales)
    quantizer = tokenizer.quantizer
    areas = quantizer.areas_XS.split(config.scales)
    quantizer.areas_XS = torch.cat([areas[k] for k in kept])
    quantizer.phi_of_scale = [quantizer.phi_of_scale[k] for k in kept]
    quantizer.scales = scales
    return replace(run, model=model.to(run.machine.device).eval(), tokenizer=tokenizer)


def of(flex: Trained, scales: tuple[int, ...]) -> Trained:
    return replace(flex, tokenizer=flex.tokenizer.of(scales), model=flex.model.of(scales))


@torch.no_grad()
def rendered(run: Trained, tokens_NL: Tensor, s: int) -> Tensor:
    """Images of the run's latents at another side."""
    images = []
    for tokens_BL in tokens_NL.split(100):
        f_BCSS = run.tokenizer.quantizer.decode(tokens_BL.to(run.machine.device))
        images.append(run.tokenizer.render(resized(f_BCSS, s)).clamp(-1, 1).cpu())
    return torch.cat(images)


def named(scales: tuple[int, ...]) -> str:
    return ",".join(map(str, scales))


def left_out(scales: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [scales[:k] + scales[k + 1:] for k in range(1, len(scales) - 1)]


def measure(run: Trained, tokenizer_steps: int, steps: int, count: int):
    flex = flexible(run, tokenizer_steps, steps)
    own = run.model.config.scales
    originals, labels_N = evaluated_images(run, count)
    side = originals.shape[-1]
    judge = Judge(kept_classifier(run), originals, run.classes)
    labels = labels_N.tolist()
    qualities = {}
    picture = []

    def look(name, both):
        row = []
        for images in both:
            found = judge(resized(images, side), labels_N)
            row += [100 * found.recognised, 100 * found.recall, found.frechet]
        qualities[name] = row[:5]
        picture.append(Row(name, to_bytes(both[1][-10:])))

    for scales in (own, *SCHEDULES, *SIZES, *left_out(own)):
        part = of(flex, scales)
        look(f"FlexVAR {named(scales)}", [part.decode(replace(part, sampling=x).generate(labels, 0))
                                          for x in (UNFILTERED, FILTERED)])
    for scales in (own, *left_out(own)):
        part = shortened(run, scales)
        drawn = [replace(part, sampling=x).generate(labels, 0) for x in (UNFILTERED, FILTERED)]
        look(f"VAR {named(scales)}", [part.decode(x) for x in drawn])
        if scales == own:
            for *_, s in SIZES:
                look(f"VAR, its latent {s}x{s}", [rendered(run, x, s) for x in drawn])

    rates = {}
    _, tokens_NL = run.encode(originals)
    nats_L = -run.log_likelihoods(tokens_NL, labels).mean(dim=0)
    for span in run.model.config.spans:
        error = F.mse_loss(run.decode(tokens_NL[:, :span.stop]), originals)
        rates[f"VAR to {span.stop}"] = [nats_L[:span.stop].sum().item(), psnr(error.item())]
    for scales in (own, *SCHEDULES):
        part = of(flex, scales)
        _, tokens_NL = part.encode(originals)
        error = F.mse_loss(part.decode(tokens_NL), originals)
        rates[f"FlexVAR {named(scales)}"] = [
            -part.log_likelihood(tokens_NL, labels).mean().item(), psnr(error.item())]
    save_picture(run.folder / "papers" / "flexvar.png", grid(picture))
    return qualities, rates


def main() -> None:
    parser = parser_of("flexvar", __doc__)
    parser.set_defaults(count=300)
    parser.add_argument("--tokenizer-steps", type=COUNT)
    parser.add_argument("--steps", type=COUNT)
    options = parser.parse_args()
    found = []
    for run in open_runs(options):
        preset = run.settings.preset
        found.append(measure(run, options.tokenizer_steps or preset.tokenizer_steps,
                             options.steps or preset.var_steps, options.count))
    qualities, rates = zip(*found)
    say_figures(("", *HEADS), qualities, 1)
    say_figures(("", "nats", "PSNR"), rates, 2)


if __name__ == "__main__":
    run_program(main)
