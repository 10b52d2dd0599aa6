"""HMAR (arXiv 2506.04421): images drawn, and completed, in several passes over each scale.

A pass draws all tokens of a scale that are not kept yet, and a part of them is kept, for the next
to see (masked.py). Kept at random, they are what the model says, and what is gained is that tokens
know each other. Kept by confidence, as published, they are also more typical than what it says:
that is a lower temperature, which costs variety, and which a top-p below 1 gives in one pass.

Where knowing a part of a scale should pay most is in-painting: VAR puts an image's own tokens for
those that it drew (`var.Known`), and the others of the scale never see them. Here they do. Halves
of images are completed, their class not told, as by  python sample.py --task inpaint.
"""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from papers import Claim, open_runs, parser_of, say_figures, say_verdicts
from papers.hmar import add_flags, tuned
from sample import (
    FILTERS, NO_FILTERS, Judge, Quality, Run, UserError, evaluated_images, fill_holes, grid,
    kept_classifier, run_program, save_picture, seam, to_bytes,
)
from train import COUNT, several
from var import Known

MORE = {"holds": (0, inf), "false": (-inf, 0)}
CLAIMS = (
    Claim("unfiltered, more passes that keep at random are recognised more, in points", **MORE),
    Claim("those that keep by confidence, more than plain VAR with top-p 0.9", **MORE),
    Claim("without the leak, more than with it", **MORE),
    Claim("with the default filters, more passes lie closer, by Fréchet distance, than one", **MORE),
    Claim("halves completed with the known half in sight are recognised by 5 points more",
          holds=(5, inf), false=(-inf, 5)),
)
HEADS = ("recognised %", "recall %", "precision %", "Fréchet")


def draw(run: Run, labels: list[int], filters: dict, passes: Sequence[int] = (),
         surest: bool = False, known: Callable | None = None) -> Tensor:
    """Images of one seed. passes: over each scale, if not one."""
    one = [1] * len(run.model.config.scales)
    run.model.passes = passes or one
    run.model.surest = surest
    options = Namespace(**{**vars(run.options), **filters})
    return run.decode(replace(run, options=options).generate(labels, 0, known))


def halves(run: Run, originals: Tensor) -> tuple[Tensor, Callable[[range], Known]]:
    """Where images are known, in their left half: float [side, side]; and what is, to `generate`."""
    known_HW = torch.ones(originals.shape[2:])
    known_HW[:, originals.shape[3] // 2:] = 0
    latent_NCSS, _ = run.encode(fill_holes(originals, known_HW))
    where_11SS = F.interpolate(known_HW[None, None], size=latent_NCSS.shape[2:], mode="area")

    def known(rows: range) -> Known:
        latent_BCSS = latent_NCSS[rows].to(run.options.device)
        where_B1SS = where_11SS.expand(len(rows), -1, -1, -1).to(run.options.device)
        return Known(latent_BCSS, where_B1SS, len(run.model.config.scales))
    return known_HW, known


def figures(quality: Quality) -> list[float]:
    """As in HEADS."""
    shares = quality.recognised, quality.recall, quality.precision
    return [*(100 * share for share in shares), quality.frechet]


def measure(run: Run) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Rows of drawn images, and of completed ones."""
    options = run.options
    passes = options.passes or [2**k for k in range(len(run.model.config.scales))]
    if len(passes) != len(run.model.config.scales):
        raise UserError(f"--passes {','.join(map(str, passes))} must be as many numbers as there "
                        f"are scales, {len(run.model.config.scales)}")
    originals, labels_N = evaluated_images(run, options.count)
    judge = Judge(kept_classifier(run), originals, run.classes)
    plain, masked, leaking = (tuned(run, kind) for kind in ("plain", "masked", "leaking"))
    tighter = {**NO_FILTERS, "top_p": 0.9}
    drawn = {
        "plain VAR": (plain, NO_FILTERS),
        "plain VAR, top-p 0.9": (plain, tighter),
        "masked, one pass": (masked, NO_FILTERS),
        "more passes, at random": (masked, NO_FILTERS, passes),
        "by confidence": (masked, NO_FILTERS, passes, True),
        "by confidence, leaking": (leaking, NO_FILTERS, passes, True),
        "filtered: plain VAR": (plain, FILTERS),
        "more passes, at random ": (masked, FILTERS, passes),
        "by confidence ": (masked, FILTERS, passes, True),
    }
    rows = {}
    for name, (part, *how) in drawn.items():
        rows[name] = figures(judge(draw(part, labels_N.tolist(), *how), labels_N))

    known_HW, known = halves(run, originals)
    nothing = [len(run.classes)] * len(originals)   # the null class
    completed = {
        "plain VAR": (plain,),
        "masked, one pass": (masked,),
        "more passes, at random": (masked, passes),
        "by confidence": (masked, passes, True),
    }
    completions = {}
    pictures = [originals, originals * known_HW]
    for name, (part, *how) in completed.items():
        images = draw(part, nothing, FILTERS, *how, known=known)
        border = seam(images, known_HW) / seam(originals, known_HW)
        completions[name] = [*figures(judge(images, labels_N)), border]
        pictures.append(images)
    names = ("original", "known", *completed)
    chosen = torch.arange(0, len(originals), max(1, len(originals) // 16))[:16]
    picture = grid([(name, to_bytes(images[chosen])) for name, images in zip(names, pictures)])
    save_picture(options.run / "papers" / "hmar_passes.png", picture)
    return rows, completions


def main() -> None:
    parser = parser_of("hmar_passes", __doc__)
    add_flags(parser)
    parser.add_argument("--passes", type=several(COUNT),
                        help="over each scale (default: 1,2,4, ...)")
    options = parser.parse_args()
    drawn, completed = zip(*(measure(run) for run in open_runs(options)))
    rows = say_figures(("drawn", *HEADS), drawn, 2)
    completions = say_figures(("completed", *HEADS, "border"), completed, 2)
    print("border: the step across it, as a share of the images' own")
    plain, tighter, _, random, surest, leaking, *filtered = rows.values()   # each [4, runs]
    say_verdicts(CLAIMS, [
        random[0] - plain[0],
        surest[0] - tighter[0],
        surest[0] - leaking[0],
        filtered[0][3] - filtered[1][3],
        completions["more passes, at random"][0] - completions["plain VAR"][0],
    ], options.started)


if __name__ == "__main__":
    run_program(main)
