"""NFIG (arXiv 2503.07076): a scale codes a band of frequencies.

What a token map is to say is told by its size alone in VAR: f - f_hat, averaged over areas. NFIG
tells it by frequency, too: scale k may only correct what lies under an edge e_k of the latent's
Fourier transform, and the edges grow as tokens do,

    e_k = e_{k-1} + s_k^2 / (sum_j s_j^2) * highest frequency
    tokens_k = nearest codes to read(low_k(f) - f_hat, k)            low_k: f without what is above

which is VAR's quantizer with its target low-passed. All else is the same: losses, decoding, and
how the transformer reads f_hat. On a grid of 8 x 8, frequencies are few, and for scales 1, 2, 3, 5,
8 the bands have 1, 0, 0, 12 and 51 of 64: the maps of 2 x 2 and 3 x 3 have none of their own. So
beside these edges stand those of the sampling theorem: an s x s map has the frequencies below s / 2
along each axis, which are 1, 0, 8, 16 and 39.

(The paper's tokenizer is stronger in other ways as well: DINOv2, a discriminator. Its text was at
hand only as notes and re-implementations by others. Here plain and low-passed tokenizers, and a
transformer for each, are trained from scratch, for as many steps, with the same seed, on the same
images. What is expected is nothing: an average over areas is a crude low-pass. The surprise would
be an image that takes fewer nats and is reconstructed as well.)
"""
from __future__ import annotations

from dataclasses import replace
from functools import wraps
from math import inf

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from papers import Claim, Trained, open_runs, parser_of, say_evaluations, say_figures, say_verdicts
from support.checkpoint import load_checkpoint
from support.cli import COUNT, run_program
from support.data import Data
from support.evaluation import evaluate, evaluated_images, tokenizer_health
from tokenizer import Quantizer
from train import TokenizerStage, VARStage

FEWER = {"holds": (3, inf), "false": (-inf, 3)}
AS_GOOD = {"holds": (-0.2, inf), "false": (-inf, -0.2)}
CLAIMS = (
    Claim("with the paper's bands an image takes at least 3 % fewer nats", **FEWER),
    Claim("with them its PSNR falls by at most 0.2 dB", **AS_GOOD),
    Claim("with the sampling theorem's bands it takes at least 3 % fewer nats", **FEWER),
    Claim("with these its PSNR falls by at most 0.2 dB", **AS_GOOD),
)


def by_share(scales: tuple[int, ...]) -> Tensor:
    """The frequencies that each scale may correct, as the paper has them: bool [K, S, S]."""
    f_S = torch.fft.fftfreq(scales[-1])
    radius_SS = torch.hypot(f_S[:, None], f_S)
    sizes_K = torch.tensor(scales) ** 2
    edges_K = sizes_K.cumsum(0) / sizes_K.sum() * radius_SS.max()
    return radius_SS <= edges_K[:, None, None]


def by_sampling(scales: tuple[int, ...]) -> Tensor:
    """Likewise, as a map of each scale's size could have them."""
    f_S = scales[-1] * torch.fft.fftfreq(scales[-1]).abs()
    highest_SS = torch.maximum(f_S[:, None], f_S)
    keep_KSS = highest_SS < torch.tensor(scales)[:, None, None] / 2
    keep_KSS[-1] = True   # the latent's own highest frequency, if S is even
    return keep_KSS


def knowing_latent(method):
    """A method of Quantizer that splits up a latent, which `read` knows meanwhile."""
    @wraps(method)
    def known(self, f_BCSS: Tensor):
        self.f_BCSS = f_BCSS.detach()
        try:
            return method(self, f_BCSS)
        finally:
            self.f_BCSS = None
    return known


class LowPass(Quantizer):
    """A quantizer whose scales are asked for low frequencies."""
    f_BCSS: Tensor | None = None

    def __init__(self, plain: Quantizer, keep_KSS: Tensor):
        nn.Module.__init__(self)
        vars(self).update(vars(plain))   # also its weights, which an optimizer has already
        self.register_buffer("keep_KSS", keep_KSS.to(plain.hits_V.device), persistent=False)

    encode, forward, start_from = map(
        knowing_latent, (Quantizer.encode, Quantizer.forward, Quantizer.start_from))

    def read(self, x_BCSS: Tensor, k: int) -> Tensor:
        """What scale k sees of f - f_hat; of f_hat, in prediction."""
        if self.f_BCSS is not None:
            above_BCSS = torch.fft.ifft2(torch.fft.fft2(self.f_BCSS) * ~self.keep_KSS[k]).real
            x_BCSS = x_BCSS - above_BCSS
        return super().read(x_BCSS, k)


BANDS = {"share": by_share, "sampling": by_sampling}


def trained(run: Trained, kind: str, tokenizer_steps: int, var_steps: int) -> Trained:
    """The run with another tokenizer and transformer, trained on the images that it kept."""
    kept = load_checkpoint(run.folder / "train_images.pt", "set of training images")
    images = TensorDataset(kept["images"], kept["labels"])
    data = Data(images, run.held_out, run.classes, kept["data_set"])
    preset = replace(run.settings.preset, tokenizer_steps=tokenizer_steps, var_steps=var_steps)
    out = run.folder / "papers" / f"low_pass-{kind}"
    settings = replace(run.settings, preset=preset, out=out)
    stage = TokenizerStage(data, settings)
    if kind != "plain":
        keep_KSS = BANDS[kind](preset.scales)
        for tokenizer in (stage.model, stage.ema):
            tokenizer.quantizer = LowPass(tokenizer.quantizer, keep_KSS)
    tokenizer = stage.run()
    model = VARStage(tokenizer, data, settings).run()
    return replace(run, tokenizer=tokenizer, model=model)


def by_scale(run: Trained, count: int) -> tuple[list[float], list[float]]:
    """Of held-out images the nats of each scale's tokens; and the PSNR, in dB, up to that scale."""
    images, labels_N = evaluated_images(run, count)
    _, tokens_NL = run.encode(images)
    nats_L = -run.log_likelihoods(tokens_NL, labels_N.tolist()).mean(dim=0)
    nats = [nats_L[span].sum().item() for span in run.model.config.spans]
    health = tokenizer_health(run.tokenizer, [images.to(run.machine.device)])
    return nats, health["psnr_per_scale"]


def main() -> None:
    parser = parser_of("low_pass", __doc__)
    parser.set_defaults(count=300)
    add = parser.add_argument
    add("--tokenizer-steps", type=COUNT, default=300, help="of each (default: %(default)s)")
    add("--var-steps", type=COUNT, default=300, help="of each (default: %(default)s)")
    options = parser.parse_args()
    kinds = "plain", *BANDS
    found = {kind: [] for kind in kinds}
    of_scales = []
    for run in open_runs(options):
        runs = {kind: trained(run, kind, options.tokenizer_steps, options.var_steps)
                for kind in kinds}
        for kind, part in runs.items():
            found[kind].append(evaluate(part, options.count, seeds=[0]))
        of_scales.append({kind: by_scale(part, options.count) for kind, part in runs.items()})
    scales = run.model.config.scales
    for kind, bands in BANDS.items():
        print(f"{kind}: frequencies up to each scale", bands(scales).sum(dim=(1, 2)).tolist())
    rows = say_evaluations(found)
    sides = [f"{s}x{s}" for s in scales]
    tables = []
    for i, head in enumerate(("nats of", "PSNR up to")):
        by_run = [{kind: x[i] for kind, x in row.items()} for row in of_scales]
        tables.append(say_figures((head, *sides), by_run, 2, base="plain"))
    figures = []
    for kind in BANDS:
        figures.append(100 * (1 - rows[kind][:, 0] / rows["plain"][:, 0]))
        figures.append(tables[1][kind][-1] - tables[1]["plain"][-1])
    say_verdicts(CLAIMS, figures)


if __name__ == "__main__":
    run_program(main)
