"""HMAR (arXiv 2506.04421): images drawn, and completed, in several passes over each scale.

A pass draws all tokens of a scale that are not kept yet, and a part of them is kept, for the next
to see (masked.py). Kept at random, they are what the model says, and what is gained is that tokens
know each other. Kept by confidence (as published, but there of guided logits), they are also more
typical than it says, at the price of variety. So are those of a lower top-p or a little guidance.

Where knowing a part of a scale should pay most is in-painting: VAR puts an image's own tokens for
those that it drew, and the others of the scale never see them. Here they do. Halves of images are
completed, their class not told, as by  python sample.py inpaint: there, too, the coarsest
maps are those of the known half, smeared over the hole (`Known`).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from papers import (
    FILTERED, UNFILTERED, Claim, Trained, open_runs, parser_of, say_figures, say_verdicts,
)
from papers.hmar import add_flags, tuned
from sample import Known, Run, Sampling, fill_holes
from support.cli import COUNT, UserError, run_program, several
from support.evaluation import Judge, evaluated_images, kept_classifier
from support.holes import seam
from support.images import Row, grid, save_picture, to_bytes

MORE = {"holds": (0, inf), "false": (-inf, 0)}
CLAIMS = (
    Claim("unfiltered, more passes that keep at random are recognised more, in points", **MORE),
    Claim("those that keep by confidence, more than plain VAR with top-p 0.9", **MORE),
    Claim("without the leak, more than with it", **MORE),
    Claim("filtered, more passes at random lie closer than plain VAR, by Fréchet distance", **MORE),
    Claim("halves completed with the known half in sight are recognised by 5 points more",
          holds=(5, inf), false=(-inf, 5)),
)
HEADS = ("recognised %", "recall %", "precision %", "Fréchet", "border")

# What is drawn: the model, how, whether in more passes, and whether the surest are kept.
DRAWN = {
    "plain VAR": ("plain", UNFILTERED, False, False),
    "plain VAR, top-p 0.9": ("plain", replace(UNFILTERED, top_p=0.9), False, False),
    "plain VAR, top-p 0.8": ("plain", replace(UNFILTERED, top_p=0.8), False, False),
    "plain VAR, cfg 1": ("plain", replace(UNFILTERED, cfg=1.0), False, False),
    "masked, one pass": ("masked", UNFILTERED, False, False),
    "more passes, at random": ("masked", UNFILTERED, True, False),
    "by confidence": ("masked", UNFILTERED, True, True),
    "by confidence, leaking": ("leaking", UNFILTERED, True, True),
    "filtered: plain VAR": ("plain", FILTERED, False, False),
    "filtered: at random": ("masked", FILTERED, True, False),
    "filtered: by confidence": ("masked", FILTERED, True, True),
    "halves: plain VAR": ("plain", FILTERED, False, False),
    "halves: one pass": ("masked", FILTERED, False, False),
    "halves: at random": ("masked", FILTERED, True, False),
    "halves: by confidence": ("masked", FILTERED, True, True),
}


def draw(
    run: Run, labels: list[int], known: Callable[[slice], Known] | None, sampling: Sampling,
    passes: list[int], surest: bool,
) -> Tensor:
    run.model.passes = passes
    run.model.surest = surest
    tokens_NL = replace(run, sampling=sampling).generate(labels, 0, known)
    return run.decode(tokens_NL)


def left_halves(run: Run, originals: Tensor) -> tuple[Tensor, Callable[[slice], Known]]:
    """Where images are known: float [side, side]; and what is known of them, to `generate`."""
    known_HW = torch.ones(originals.shape[2:])
    known_HW[:, originals.shape[3] // 2:] = 0
    filled = fill_holes(originals, known_HW)
    latent_NCSS, _ = run.encode(filled)
    where_11SS = F.interpolate(known_HW[None, None], size=latent_NCSS.shape[2:], mode="area")
    where_N1SS = where_11SS.expand(len(latent_NCSS), -1, -1, -1)
    scales = len(run.model.config.scales)
    device = run.machine.device

    def known(rows: slice) -> Known:
        return Known(latent_NCSS[rows].to(device), where_N1SS[rows].to(device), scales)
    return known_HW, known


def passes_of(run: Run, passes: Sequence[int] | None) -> list[int]:
    """As asked for, or 1, 2, 4 and so on. Raises UserError if there are not as many as scales."""
    K = len(run.model.config.scales)
    passes = passes or [2**k for k in range(K)]
    if len(passes) != K:
        asked = ",".join(map(str, passes))
        raise UserError(f"--passes {asked} must be as many numbers as there are scales, {K}")
    return list(passes)


def measure(run: Trained, many: list[int], steps: int, lr: float, count: int
            ) -> dict[str, list[float]]:
    """Rows as in HEADS, of all that is drawn. many: passes over each scale."""
    one = [1] * len(many)
    originals, labels_N = evaluated_images(run, count)
    known_HW, known = left_halves(run, originals)
    border = seam(originals, known_HW)
    judge = Judge(kept_classifier(run), originals, run.classes)
    models = {kind: tuned(run, kind, steps, lr) for kind in ("plain", "masked", "leaking")}
    nothing = [len(run.classes)] * len(originals)   # the null class
    pictures = {"original": originals, "known": originals * known_HW}
    rows = {}
    for name, (kind, sampling, more, surest) in DRAWN.items():
        completes = name.startswith("halves")
        what = (nothing, known) if completes else (labels_N.tolist(), None)
        images = draw(models[kind], *what, sampling, many if more else one, surest)
        found = judge(images, labels_N)
        shares = found.recognised, found.recall, found.precision
        step = seam(images, known_HW) / border
        rows[name] = [*(100 * share for share in shares), found.frechet, step]
        if completes:
            pictures[name.removeprefix("halves: ")] = images
    shown = [Row(name, to_bytes(images[::len(originals) // 12 or 1][:12]))
             for name, images in pictures.items()]
    save_picture(run.folder / "papers" / "hmar_passes.png", grid(shown))
    return rows


def main() -> None:
    parser = parser_of("hmar_passes", __doc__)
    add_flags(parser)
    parser.add_argument("--passes", type=several(COUNT), help="over each scale (default: 1,2,4...)")
    options = parser.parse_args()
    how = options.steps, options.lr, options.count
    by_run = [measure(run, passes_of(run, options.passes), *how) for run in open_runs(options)]
    rows = say_figures(("", *HEADS), by_run, 2, base="plain VAR")
    print("halves: completed, the class not told; border: the step across the middle of an image, "
          "as a share of the originals'")
    random = rows["more passes, at random"]   # [5, runs]
    surest = rows["by confidence"]
    say_verdicts(CLAIMS, [
        random[0] - rows["plain VAR"][0],
        surest[0] - rows["plain VAR, top-p 0.9"][0],
        surest[0] - rows["by confidence, leaking"][0],
        rows["filtered: plain VAR"][3] - rows["filtered: at random"][3],
        rows["halves: at random"][0] - rows["halves: plain VAR"][0],
    ])


if __name__ == "__main__":
    run_program(main)
