"""FlexVAR (arXiv 2502.20313): maps of the latent itself, and positions that can be sampled.

VAR's maps are corrections that add up, and what one corrects depends on those before it. Here each
is the latent itself at its side, and the model reads the one before:

    tokens_s = nearest codes to the latent, averaged down to s x s
    reads    = the codes of the map before, and no sum, interpolated to s x s

A map is an image of its own size, and positions are one map too, resized to any side. So one set of
weights, taught by another list of 3 to 5 sides in each batch, should draw by any list, to any side.
(The authors, as notes on their code say, train from nothing, with unit codes, positions beginning
as sines. Here all but the codes begins as the run's; with --anew nothing does.) The control is the
run, which had as many steps; scales are left out of it, and latents resized. The price is how far,
at as many nats, the PSNR is from the line of VAR's after each scale.
"""
from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from papers import UNFILTERED, Claim, Trained, open_runs, parser_of, say_figures, say_verdicts
from papers.flexible import FlexVAR, TokenizerTuning, left_out, of, resized
from papers.tuning import Tuning
from support.checkpoint import fingerprint
from support.cli import COUNT, UserError, run_program
from support.evaluation import Judge, evaluated_images, kept_classifier, psnr
from support.images import Row, grid, save_picture, to_bytes, to_float
from var import VAR

SIDE = 8   # of the latent
LISTS = ((1, 4, 8), (1, 2, 4, 8), (1, 2, 3, 4, 6, 8), tuple(range(1, 9)))
SIZES = ((1, 2, 4, 6), (1, 2, 3, 5, 8, 10), (1, 2, 3, 5, 8, 12))   # of images of 24, 40, 48 pixels
CLAIMS = tuple(Claim(text, (least, inf), (-inf, least)) for least, text in (   # points, at last dB
    (-3, "by 3, 4, 6 or 8 scales, 6 and 8 never trained on, at most 3 points fewer recognised, "
         "unfiltered, than by the run's own: the worst"),
    (20, "with one of its own scales left out, on average, VAR loses over 20"),
    (-3, "and FlexVAR at most 3"),
    (-10, "at 24, 40 and 48 pixels, two never trained on, at most 10 fewer than at 32: the worst"),
    (0, "on average more than of VAR's latents, resized"),
    (-3, "by the run's own scales at most 3 fewer than of VAR"),
    (-2, "the price, by these: at as many nats at most 2 dB of PSNR"),
))


class FlexTuning(Tuning):
    """Every batch has another list of 3 to 5 sides, from 1 to that of the latent."""

    def __init__(self, run: Trained, steps: int, stage: TokenizerTuning, anew: bool = False):
        plain = VAR(run.model.config).to(run.machine.device) if anew else run.model
        name = "flexvar" + "-anew" * anew
        super().__init__(run, FlexVAR(plain), name, steps, run.settings.preset.var_lr)
        self.flex = replace(run, tokenizer=stage.run())
        self.made_with["tokenizer"] = fingerprint(self.flex.tokenizer)
        self.rows = stage.rows
        self.held_out_rows = run.held_out

    def loss(self, model: FlexVAR, images: Tensor, labels_B: Tensor):
        """Nats per token."""
        device = self.settings.machine.device
        first, *between, last = self.flex.tokenizer.config.scales
        chosen = torch.randperm(len(between))[:1 + torch.randint(3, ()).item()].tolist()
        scales = first, *sorted(between[i] for i in chosen), last
        part = of(replace(self.flex, model=model), scales)
        tokens_BL = part.tokenizer.encode(to_float(images.to(device)))
        inputs = part.tokenizer.teacher_inputs(tokens_BL)
        logits_BLV = part.model(labels_B.to(device), inputs).float()
        return F.cross_entropy(logits_BLV.mT, tokens_BL), dict


@torch.no_grad()
def measure(run: Trained, flex: Trained, count: int) -> tuple:
    """Rows of what is drawn, unfiltered, and of held-out images; a picture; figures of CLAIMS."""
    images, labels_N = evaluated_images(run, count)
    labels = labels_N.tolist()
    judge = Judge(kept_classifier(run), images, run.classes)
    own = run.model.config
    drawn = {}
    rates = {}
    picture = []

    def tokens(part: Trained) -> Tensor:
        return replace(part, sampling=UNFILTERED).generate(labels, 0)

    def look(name: str, made: Tensor) -> float:
        found = judge(resized(made, images.shape[-1]).clamp(-1, 1), labels_N)
        drawn[name] = [100 * found.recognised, 100 * found.recall, found.frechet]
        picture.append(Row(name, to_bytes(made[-4:])))
        return drawn[name][0]

    def draw(kind: str, part: Trained) -> float:
        scales = ",".join(map(str, part.model.config.scales))
        return look(f"{kind} {scales}", part.decode(tokens(part)))

    def rate(kind: str, part: Trained, ends: list[int]) -> None:
        _, tokens_NL = part.encode(images)
        nats_L = -part.log_likelihoods(tokens_NL, labels).mean(dim=0)
        for end in ends:
            error = F.mse_loss(part.decode(tokens_NL[:, :end]), images)
            rates[f"{kind}, {end} tokens"] = [nats_L[:end].sum().item(), psnr(error.item())]

    shorter = [left_out(run, k) for k in range(1, len(own.scales) - 1)]
    var = draw("VAR", run)
    var_shorter = [draw("VAR", part) for part in shorter]
    f_NCSS = run.tokenizer.quantizer.decode(tokens(run).to(run.machine.device))
    var_sizes = [look(f"VAR, resized to {s}", run.tokenizer.render(resized(f_NCSS, s)).cpu())
                 for *_, s in SIZES]
    lists = [own.scales], LISTS, SIZES, [part.model.config.scales for part in shorter]
    (ours,), listed, sizes, ours_shorter = (
        [draw("FlexVAR", of(flex, scales)) for scales in some] for some in lists)
    rate("VAR", run, [span.stop for span in own.spans])
    nats, decibels = np.transpose([*rates.values()])
    for scales in (*LISTS, own.scales):
        rate("FlexVAR", of(flex, scales), [sum(s * s for s in scales)])
    our_nats, our_decibels = rates[f"FlexVAR, {own.length} tokens"]
    return drawn, rates, picture, [
        min(listed) - ours, var - np.mean(var_shorter), np.mean(ours_shorter) - ours,
        min(sizes) - ours, np.mean(sizes) - np.mean(var_sizes), ours - var,
        our_decibels - np.interp(our_nats, nats, decibels),
    ]


def main() -> None:
    parser = parser_of("flexvar", __doc__)
    parser.set_defaults(count=200)
    for name, steps in (("--tokenizer-steps", 1000), ("--steps", 1550)):
        parser.add_argument(name, type=COUNT, default=steps, help="(default: %(default)s)")
    parser.add_argument("--anew", action="store_true", help="begin from no weights of the run's")
    options = parser.parse_args()
    found = []
    for run in open_runs(options):
        own = run.model.config.scales
        if own[-1] != SIDE or len(own) < 3:
            raise UserError(f"{run.folder} has scales {own}, and these lists go to {SIDE}")
        tokenizer = TokenizerTuning(run, options.tokenizer_steps, options.anew)
        stage = FlexTuning(run, options.steps, tokenizer, options.anew)
        found.append(measure(run, replace(stage.flex, model=stage.run()), options.count))
    drawn, rates, pictures, figures = zip(*found)
    say_figures(("unfiltered", "recognised %", "recall %", "Fréchet"), drawn, 1)
    say_figures(("held-out images", "nats", "PSNR"), rates, 2)
    say_verdicts(CLAIMS, np.transpose(figures).tolist())
    save_picture(options.run[0] / "papers/flexvar.png", grid(pictures[0]).quantize())   # small


if __name__ == "__main__":
    run_program(main)
