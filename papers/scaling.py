"""VAR's own scaling law (arXiv 2404.02905, Sec. 4.2): held-out loss against size, as a power law.

    loss  =  (a N)^-b,  a straight line of slope -b in log-log     N: parameters, or training FLOPs

and so for the share of tokens that the likeliest guess misses. Models of one shape and many sizes,
of depth d, d heads and width 8 d (published: 64 d), so that layers hold about 1152 d^3 parameters,
are trained for as many steps on the same tokens. The lines go through all sizes but the largest,
which is held out: a law is good for saying beforehand what a larger model will do.

N counts what is in the layers, as the paper does; embeddings and the head come on top.
"""
from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import torch
import torch.nn.functional as F

from papers import Claim, Trained, open_runs, parser_of, say_verdicts
from papers.power_law import draw, law_of
from papers.tuning import Tuning
from sample import Run
from support.cli import COUNT, UserError, run_program, several
from support.devices import forward_flops
from support.evaluation import evaluated_images, in_words, say_table
from support.images import batches, save_picture
from var import VAR

CLAIMS = (
    Claim("log loss against log parameters is a line: correlation -0.99 or beyond (paper: -0.998)",
          holds=(-inf, -0.99), false=(-0.99, inf)),
    Claim("the larger, held-out model's loss lies within 2 % of the line: % from it",
          holds=(-inf, 2), false=(2, inf)),
    Claim("log token error is a line, too: correlation -0.99 or beyond",
          holds=(-inf, -0.99), false=(-0.99, inf)),
)
AXES = ("parameters", "training FLOPs")
MEASURES = ("loss, nats/token", "token error")


def measure(run: Trained, depth: int, steps: int, count: int) -> list[float]:
    """As in AXES and MEASURES, of a new model that is trained here."""
    preset = run.settings.preset
    torch.manual_seed(run.settings.seed)
    config = replace(run.model.config, depth=depth, width=8 * depth, heads=depth)
    model = VAR(config).to(run.machine.device)
    parameters = sum(weight.numel() for weight in model.blocks.parameters())
    stage = Tuning(run, model, f"scaling-{depth}", steps, preset.var_lr)
    images = steps * preset.var_batch
    forward = images * forward_flops(model, *stage.example())
    flops = 3 * forward   # the backward pass is twice the forward
    return [parameters, flops, *errors(replace(run, model=stage.run()), count)]


@torch.no_grad()
def errors(run: Run, count: int) -> list[float]:
    """Of the tokens of held-out images, as in MEASURES, given the true coarser scales."""
    device = run.machine.device
    images, labels_N = evaluated_images(run, count)
    _, tokens_NL = run.encode(images)
    nats = 0.0
    missed = 0
    for part in batches(len(tokens_NL), run.batch):
        tokens_BL = tokens_NL[part].to(device)
        inputs = run.tokenizer.teacher_inputs(tokens_BL)
        logits_BLV = run.model(labels_N[part].to(device), inputs)
        nats += F.cross_entropy(logits_BLV.mT, tokens_BL, reduction="sum").item()
        missed += (logits_BLV.argmax(dim=2) != tokens_BL).sum().item()
    return [nats / tokens_NL.numel(), missed / tokens_NL.numel()]


def laws_of(found_R4D: np.ndarray) -> dict[str, np.ndarray]:
    """Both measures against both axes: what `law_of` says, [3, runs]."""
    laws = {}
    for m, measured in enumerate(MEASURES, start=2):
        for a, axis in enumerate(AXES):
            law_R3 = [law_of(run_4D[a], run_4D[m]) for run_4D in found_R4D]
            laws[f"{measured} against {axis}"] = np.transpose(law_R3)
    return laws


def main() -> None:
    parser = parser_of("scaling", __doc__)
    add = parser.add_argument
    add("--depths", type=several(COUNT), default=(1, 2, 3, 4, 6, 8), metavar="DEPTHS",
        help="sizes, the last one held out of the fit (default: 1,2,3,4,6,8)")
    add("--steps", type=COUNT, default=1000, help="of each training (default: 1000)")
    options = parser.parse_args()
    depths = options.depths
    if len(depths) < 4 or list(depths) != sorted(set(depths)):
        asked = ",".join(map(str, depths))
        raise UserError(f"--depths {asked} must be four or more that grow")
    found_RD4 = []
    for run in open_runs(options):
        found_RD4.append([measure(run, d, options.steps, options.count) for d in depths])
    found_R4D = np.swapaxes(found_RD4, 1, 2)
    rows = {"": (*AXES, *MEASURES)}
    for depth, (sizes_R, flops_R, *measured) in zip(depths, found_R4D.T):
        cells = [f"{sizes_R[0]:,.0f}", f"{flops_R[0]:.2e}"]
        cells += [in_words(list(x_R), 4) for x_R in measured]
        rows[f"depth {depth}"] = cells
    say_table(rows)
    laws = laws_of(found_R4D)
    said = {"": ("exponent", "correlation", "held-out, % above")}
    for name, law_3R in laws.items():
        said[name] = [in_words(list(x_R), 4) for x_R in law_3R]
    say_table(said)
    path = options.run[0] / "papers" / "scaling.png"
    x_AD, y_MD = np.split(found_R4D.mean(axis=0), 2)
    save_picture(path, draw(AXES, x_AD, MEASURES, y_MD))
    print(f"wrote {path}")
    loss, _, error, _ = laws.values()
    say_verdicts(CLAIMS, [loss[1], abs(loss[2]), error[1]])


if __name__ == "__main__":
    run_program(main)
