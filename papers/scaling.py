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

from kernels import forward_flops
from papers import Claim, open_runs, parser_of, say_table, say_verdicts
from papers.tuning import Tuning
from sample import Run, UserError, evaluated_images, in_words, pyplot, run_program, save_picture
from train import COUNT, several
from var import VAR

CLAIMS = (
    Claim("log loss against log parameters is a line: correlation -0.99 or beyond (paper: -0.998)",
          holds=(-1, -0.99), false=(-0.99, 1)),
    Claim("the larger, held-out model's loss lies within 2 % of the line, in % above it",
          holds=(-2, 2), false=(2, inf)),
    Claim("log token error is a line, too: correlation -0.99 or beyond",
          holds=(-1, -0.99), false=(-0.99, 1)),
)
AXES = ("parameters", "training FLOPs")
MEASURES = ("loss, nats/token", "token error")


def sized(run: Run, depth: int) -> VAR:
    """A new model of the run's kind, of another size."""
    torch.manual_seed(run.options.seed)
    config = replace(run.model.config, depth=depth, width=8 * depth, heads=depth)
    return VAR(config).to(run.options.device)


def measure(run: Run, depth: int) -> list[float]:
    """As in AXES and MEASURES, of a model that is trained here; the latter of held-out images."""
    options = run.options
    model = sized(run, depth)
    parameters = sum(weight.numel() for weight in model.blocks.parameters())
    stage = Tuning(run, model, f"scaling-{depth}", options.steps, options.preset.var_lr)
    images = options.steps * options.preset.var_batch
    flops = 3 * images * forward_flops(model, *stage.example())   # the backward pass is two forward
    return [parameters, flops, *errors(replace(run, model=stage.run()))]


@torch.no_grad()
def errors(run: Run) -> tuple[float, float]:
    """Of the tokens of held-out images, as in MEASURES, given the true coarser scales."""
    images, labels_N = evaluated_images(run, run.options.count)
    _, tokens_NL = run.encode(images)
    total = torch.zeros(2, dtype=torch.double)
    for tokens_BL, labels_B in zip(tokens_NL.split(100), labels_N.split(100)):
        tokens_BL = tokens_BL.to(run.options.device)
        inputs = run.tokenizer.teacher_inputs(tokens_BL)
        logits_BLV = run.model(labels_B.to(run.options.device), inputs)
        total[0] += F.cross_entropy(logits_BLV.mT, tokens_BL, reduction="sum").item()
        total[1] += (logits_BLV.argmax(dim=2) != tokens_BL).sum().item()
    loss, error = (total / tokens_NL.numel()).tolist()
    return loss, error


def line_of(x_N: np.ndarray, y_N: np.ndarray) -> tuple[float, float, float]:
    """y = factor x^exponent, by least squares of the logarithms, and their correlation."""
    log_x_N = np.log(x_N)
    log_y_N = np.log(y_N)
    exponent, offset = np.polyfit(log_x_N, log_y_N, 1)
    return exponent, np.exp(offset), np.corrcoef(log_x_N, log_y_N)[0, 1]


def laws_of(found_RD4: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """For both measures against both axes [3, runs]: exponent and correlation of the line through
    all sizes but the last; and by how many percent that one lies above it."""
    laws = {}
    for m, measured in enumerate(MEASURES, start=2):
        for a, axis in enumerate(AXES):
            law_R3 = []
            for found_D4 in found_RD4:
                x_D = found_D4[:, a]
                y_D = found_D4[:, m]
                exponent, factor, correlation = line_of(x_D[:-1], y_D[:-1])
                foretold = factor * x_D[-1] ** exponent
                law_R3.append([exponent, correlation, 100 * (y_D[-1] / foretold - 1)])
            laws[measured, axis] = np.transpose(law_R3)
    return laws


def draw(found_RD4: np.ndarray):
    """Both measures against both axes, means over the runs; the last size is the held-out one."""
    mean_4D = found_RD4.mean(axis=0).T
    figure, axes = pyplot().subplots(2, 2, figsize=(9, 7), layout="constrained")
    for row, measure, y_D in zip(axes, MEASURES, mean_4D[2:]):
        for axis, name, x_D in zip(row, AXES, mean_4D[:2]):
            exponent, factor, correlation = line_of(x_D[:-1], y_D[:-1])
            axis.plot(x_D, factor * x_D**exponent, "--", color="grey",
                      label=f"exponent {exponent:.3f}, correlation {correlation:.4f}")
            axis.plot(x_D[:-1], y_D[:-1], "o")
            axis.plot(x_D[-1], y_D[-1], "s", color="red", label="held out of the fit")
            axis.set(xscale="log", yscale="log", xlabel=name, ylabel=measure)
            axis.yaxis.set_major_formatter("{x:.2f}")
            axis.yaxis.set_minor_formatter("{x:.2f}")
            axis.legend(fontsize="small")
    return figure


def main() -> None:
    parser = parser_of("scaling", __doc__)
    add = parser.add_argument
    add("--depths", type=several(COUNT), default=(1, 2, 3, 4, 6, 8), metavar="DEPTHS",
        help="sizes, the last one held out of the fit (default: 1,2,3,4,6,8)")
    add("--steps", type=COUNT, default=1000, help="of each training (default: 1000)")
    options = parser.parse_args()
    depths = options.depths
    if len(depths) < 4 or list(depths) != sorted(set(depths)):
        raise UserError(f"--depths {','.join(map(str, depths))} must be four or more that grow")
    found_RD4 = np.array([[measure(run, depth) for depth in depths] for run in open_runs(options)])
    rows = {}
    for depth, figures_4R in zip(depths, found_RD4.transpose(1, 2, 0)):
        cells = [f"{figures_4R[0, 0]:,.0f}", f"{figures_4R[1, 0]:.2e}"]
        rows[f"depth {depth}"] = cells + [in_words(list(x_R), 4) for x_R in figures_4R[2:]]
    say_table(("", *AXES, *MEASURES), rows)
    laws = laws_of(found_RD4)
    say_table(("", "exponent", "correlation", "held-out, % above"), {
        f"{measured} against {axis}": [in_words(list(x_R), 4) for x_R in law_3R]
        for (measured, axis), law_3R in laws.items()})
    path = options.run[0] / "papers" / "scaling.png"
    save_picture(path, draw(found_RD4))
    print(f"wrote {path}")
    by_size = laws[MEASURES[0], AXES[0]]
    say_verdicts(CLAIMS, [by_size[1], by_size[2], laws[MEASURES[1], AXES[0]][1]], options.started)


if __name__ == "__main__":
    run_program(main)
