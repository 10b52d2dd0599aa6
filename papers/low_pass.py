"""NFIG (arXiv 2503.07076): a scale codes a band of frequencies.

In VAR a token map says what its size lets it say: f - f_hat, averaged over areas. In NFIG scale k
is asked for what lies under an edge e_k of the latent's Fourier transform alone,

    e_k = e_{k-1} + s_k^2 / (sum_j s_j^2) * highest frequency
    tokens_k = nearest codes to read(low_k(f) - f_hat, k)       low_k(f): f without what is above it

which is VAR's quantizer with its target low-passed; losses, decoding and what the transformer reads
are VAR's. Of the 64 frequencies of an 8 x 8 grid, the bands of scales 1, 2, 3, 5, 8 hold 1, 0, 0,
12 and 51: two maps have none of their own. So beside these edges stand those of the sampling
theorem, below s / 2 along each axis: 1, 0, 8, 16 and 39.

(Of the paper the abstract and others' notes were at hand; its tokenizer is stronger. Plain and
low-passed tokenizers, and a transformer for each, are trained from scratch, for as many steps, with
the same seed. No gain is expected: an average over areas is a crude low-pass already. The surprise
would be images that take fewer nats, and are reconstructed as well.)
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import torch
from torch import Tensor, nn

from papers import Claim, Trained, open_runs, parser_of, say_evaluations, say_figures, say_verdicts
from papers.tuning import kept_images
from support.cli import COUNT, run_program
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
    """What frequencies each scale is asked for, as the paper has them: bool [K, S, S]."""
    f_S = torch.fft.fftfreq(scales[-1])
    radius_SS = torch.hypot(f_S[:, None], f_S)
    sizes_K = torch.tensor(scales) ** 2
    edges_K = sizes_K.cumsum(0) / sizes_K.sum() * radius_SS.max()
    return radius_SS <= edges_K[:, None, None]


def by_sampling(scales: tuple[int, ...]) -> Tensor:
    """Likewise, as the sampling theorem has them."""
    f_S = scales[-1] * torch.fft.fftfreq(scales[-1]).abs()
    highest_SS = torch.maximum(f_S[:, None], f_S)
    keep_KSS = highest_SS < torch.tensor(scales)[:, None, None] / 2
    keep_KSS[-1] = True   # the latent's own highest frequency, if S is even
    return keep_KSS


def of_latent(method: Callable) -> Callable:
    """A method of Quantizer that splits up a latent, which `read` knows meanwhile."""
    def known(self, f_BCSS: Tensor):
        self.f_BCSS = f_BCSS.detach()
        result = method(self, f_BCSS)
        self.f_BCSS = None
        return result
    return known


class LowPass(Quantizer):
    """A quantizer whose scales are asked for low frequencies."""
    f_BCSS: Tensor | None = None

    def __init__(self, plain: Quantizer, keep_KSS: Tensor):
        nn.Module.__init__(self)
        vars(self).update(vars(plain))   # also its weights, which an optimizer has already
        self.register_buffer("keep_KSS", keep_KSS.to(self.hits_V.device), persistent=False)

    encode, forward, start_from = map(
        of_latent, (Quantizer.encode, Quantizer.forward, Quantizer.start_from))

    def read(self, x_BCSS: Tensor, k: int) -> Tensor:
        """What scale k sees of f - f_hat; of f_hat, in prediction."""
        if self.f_BCSS is not None:
            above_BCSS = torch.fft.ifft2(torch.fft.fft2(self.f_BCSS) * ~self.keep_KSS[k]).real
            x_BCSS = x_BCSS - above_BCSS
        return super().read(x_BCSS, k)


BANDS = {"share": by_share, "sampling": by_sampling}


def trained(run: Trained, kind: str, tokenizer_steps: int, var_steps: int) -> Trained:
    """The run with another tokenizer and transformer, trained on the images that it kept."""
    data = kept_images(run)
    preset = replace(run.settings.preset, tokenizer_steps=tokenizer_steps, var_steps=var_steps)
    out = run.folder / "papers" / f"low_pass-{kind}"
    settings = replace(run.settings, preset=preset, out=out)
    stage = TokenizerStage(data, settings)
    if kind in BANDS:
        for tokenizer in (stage.model, stage.ema):
            tokenizer.quantizer = LowPass(tokenizer.quantizer, BANDS[kind](preset.scales))
    tokenizer = stage.run()
    model = VARStage(tokenizer, data, settings).run()
    return replace(run, tokenizer=tokenizer, model=model)


def by_scale(run: Trained, count: int) -> list[float]:
    """Of held-out images the nats of each scale's tokens; and the PSNR, in dB, up to that scale."""
    images, labels_N = evaluated_images(run, count)
    _, tokens_NL = run.encode(images)
    nats_L = -run.log_likelihoods(tokens_NL, labels_N.tolist()).mean(dim=0)
    health = tokenizer_health(run.tokenizer, [images.to(run.machine.device)])
    return [nats_L[span].sum().item() for span in run.model.config.spans] + health["psnr_per_scale"]


def main() -> None:
    parser = parser_of("low_pass", __doc__)
    parser.set_defaults(count=300)
    for name in ("--tokenizer-steps", "--var-steps"):
        parser.add_argument(name, type=COUNT, default=250, help="of each (default: 250)")
    options = parser.parse_args()
    found = {kind: [] for kind in ("plain", *BANDS)}
    of_scales = []
    for run in open_runs(options):
        of_scales.append({})
        for kind in found:
            part = trained(run, kind, options.tokenizer_steps, options.var_steps)
            found[kind].append(evaluate(part, options.count, seeds=[0]))
            of_scales[-1][kind] = by_scale(part, options.count)
    for kind, bands in BANDS.items():
        counts = bands(run.model.config.scales).sum(dim=(1, 2)).tolist()
        print(f"{kind}: frequencies up to each scale {counts}")
    nats = {kind: figures_R7[:, 0] for kind, figures_R7 in say_evaluations(found).items()}
    heads = [f"{unit} {s}x{s}" for unit in ("nats of", "dB to") for s in run.model.config.scales]
    rows = say_figures(("", *heads), of_scales, 2, base="plain")
    figures = [(100 * (1 - nats[kind] / nats["plain"]), rows[kind][-1] - rows["plain"][-1])
               for kind in BANDS]
    say_verdicts(CLAIMS, sum(figures, ()))


if __name__ == "__main__":
    run_program(main)
