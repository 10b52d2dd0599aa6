"""Super-resolution (NSARM, arXiv 2510.00820): a large image of a small one, which may be a bad one.

`sample.py upscale` needs no tuning: the coarse scales are those of the small image, enlarged, and
the finer ones are drawn. But a model has read only what is of one image, and now it reads f_hat of
a blurred or noisy one. So it is tuned on that. The tokens that it is asked for stand for what the
large image has more than the sum so far (the closed loop of `Known`):

    shown_k = tokens_k of the small image                    k < n: the scales that it can hold
    shown_k = nearest codes to read(f - f_hat, k)            k >= n, f of the large one: the targets

NSARM does so with Infinity, all weights tuned, once a new network has learned to make the coarse
scales of the small image. There is no such network here, but two ways to do without. "prefix" is
the above and nothing else. "look" shows the small image's latent at every scale, too:

    x_k = embed(read(f_hat, k)) + Z read(f_small, k) + position        Z is zero at first

No class is told, in tuning or in drawing. Both are tuned on blur and noise of middle strength, or
one of them or none; other strengths and JPEG are for the test (small_images.py). "wide" is "look",
tuned on all kinds and strengths. Its rival is "tokenizer": the enlarged image encoded, and decoded.
"""
from __future__ import annotations

import copy
from collections.abc import Sequence
from math import inf

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from papers import Claim, Trained, open_runs, parser_of, say_figures, say_verdicts
from papers.mistakes import read_and_asked
from papers.small_images import (
    TESTS, Looking, degraded_by_lot, enlarged, large_of, picture_of, scales_of_small, small_of,
)
from papers.tuning import Tuning, kept_images
from support.cli import COUNT, run_program
from support.evaluation import Judge, evaluated_images, kept_classifier, psnr
from support.images import save_picture, to_float
from var import VAR

MIDDLE = [0, 2], [0, 2], [0]   # strengths of blur, noise and JPEG, to draw from
WIDE = ([0, 1, 2, 3],) * 3
HEADS = ("PSNR, dB", "recognised %", "recall %", "Fréchet")
CLAIMS = (
    Claim("blur and noise 2: prefix has 1 dB more than the control", (1, inf), (-inf, 1)),
    Claim("and 5 points more are recognised", (5, inf), (-inf, 5)),
    Claim("look has more dB than the tokenizer alone", (0, inf), (-inf, 0)),
    Claim("wide has at most 0.2 dB less than look", (-0.2, inf), (-inf, -0.2)),
    Claim("blur 3, noise 3: of the dB that wide gains, look gains half", (0.5, inf), (-inf, 0.5)),
    Claim("JPEG 1, JPEG 3, a kind that it has not met: half, too", (0.5, inf), (-inf, 0.5)),
)


class Upscaling(Tuning):
    """Tunes a model on small images and what is missing in them. choices: of strengths."""

    def __init__(self, run: Trained, model: VAR, name: str, choices: tuple, steps: int):
        super().__init__(run, model, f"super-{name}", steps, run.settings.preset.var_lr)
        self.choices = choices
        self.made_with["strengths"] = list(choices)
        self.rows = kept_images(run).train
        self.n = scales_of_small(run)

    def loss(self, model: VAR, images: Tensor, labels_B: Tensor):
        """Nats per token of the scales that are not the small image's."""
        device = self.settings.machine.device
        quantizer = self.tokenizer.quantizer
        large = to_float(images)
        small = enlarged(degraded_by_lot(large, self.choices))
        with torch.no_grad():
            f_BCSS, small_BCSS = (self.tokenizer.latent(x.to(device)) for x in (large, small))
        own = quantizer.split(quantizer.encode(small_BCSS))[:self.n]
        shown_BL, asked_BL = read_and_asked(
            quantizer, f_BCSS, lambda tokens_Bl, k: own[k] if k < self.n else tokens_Bl)
        if isinstance(model, Looking):
            model.show(small_BCSS)
        none_B = torch.full_like(labels_B, self.ema.config.classes).to(device)
        logits_BLV = model(none_B, quantizer.teacher_inputs(shown_BL)).float()
        begin = self.ema.config.spans[self.n].start
        return F.cross_entropy(logits_BLV[:, begin:].mT, asked_BL[:, begin:]), dict

    def validate(self) -> dict:
        """Nothing: the page measures what becomes of it."""
        return {}


def tuned(run: Trained, steps: int) -> dict[str, VAR]:
    """The run's model; the control, ordinary training with no class told; and the others."""
    how = steps, run.settings.preset.var_lr
    control = Tuning(run, copy.deepcopy(run.model), "super-control", *how)
    tokens_NL, labels_N = control.rows.tensors
    control.rows = TensorDataset(tokens_NL, torch.full_like(labels_N, len(run.classes)))
    stages = {
        "control": control,
        "prefix": Upscaling(run, copy.deepcopy(run.model), "prefix", MIDDLE, steps),
        "look": Upscaling(run, Looking(run), "look", MIDDLE, steps),
        "wide": Upscaling(run, Looking(run), "wide", WIDE, steps),
    }
    return {"zero-shot": run.model, **{name: stage.run() for name, stage in stages.items()}}


def measure(run: Trained, steps: int, count: int) -> tuple[dict, Image.Image]:
    """Figures as in HEADS, by test and by what made the large images; and a picture of some."""
    models = tuned(run, steps)
    originals, labels_N = evaluated_images(run, count)
    judge = Judge(kept_classifier(run), originals, run.classes)

    def figures_of(images: Tensor) -> list[float]:
        found = judge(images, labels_N)
        decibels = psnr(F.mse_loss(images, originals).item())
        return [decibels, 100 * found.recognised, 100 * found.recall, found.frechet]

    made = {test: large_of(run, models, small_of(originals, test)) for test in TESTS}
    figures = {test: {name: figures_of(images) for name, images in of_test.items()}
               for test, of_test in made.items()}
    return figures, picture_of(originals, made)


def main() -> None:
    parser = parser_of("super_resolution", __doc__)
    parser.set_defaults(count=200)
    parser.add_argument("--steps", type=COUNT, default=120, help="a tuning (default: %(default)s)")
    options = parser.parse_args()
    runs = open_runs(options)
    by_run, pictures = zip(*(measure(run, options.steps, options.count) for run in runs))
    found = {test: say_figures((test, *HEADS), [figures[test] for figures in by_run], 2, "control")
             for test in TESTS}

    def gained(name: str, tests: Sequence[str]):
        """dB on the control in these tests, in each run."""
        return sum(found[test][name][0] - found[test]["control"][0] for test in tests)

    both = found["blur and noise 2"]   # [4, runs] by name
    say_verdicts(CLAIMS, [
        *(both["prefix"] - both["control"])[:2],
        both["look"][0] - both["tokenizer"][0], both["wide"][0] - both["look"][0],
        *(gained("look", tests) / gained("wide", tests)
          for tests in (("blur 3", "noise 3"), ("JPEG 1", "JPEG 3")))])
    save_picture(options.run[0] / "papers" / "super_resolution.png", pictures[0])


if __name__ == "__main__":
    run_program(main)
