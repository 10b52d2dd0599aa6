"""A watermark in the choice of tokens (LBW, arXiv 2506.01011): which codes are green is a secret.

Half of the codes are green. Delta is added to their logits before a token is drawn, so a marked
image has more of them than chance. Who knows the list encodes and counts: with n of T tokens green,

    z = (n - T / 2) / sqrt(T / 4)

has mean 0 and variance 1 without a mark, if codes are used alike and independently. They are not;
so z is compared with that of training images: a find is what 1 % of them pass. But a detector has
no tokens. It encodes an image that was decoded, saved, perhaps changed. What survives that?

Lest a list be learned, an image draws its own from K of them. The largest of K z is the price.
"""
from __future__ import annotations

import copy
import io
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import sample
from papers import Claim, open_runs, parser_of, say_evaluations, say_figures, say_verdicts
from papers.tuning import kept_tokens
from sample import Run, to_bytes, to_float

CLAIMS = (   # where it holds, where it is false
    Claim("of marked images, saved and encoded, 95 % or more are found", (95, np.inf), (-np.inf, 95)),
    Claim("unfiltered, at most 2 points fewer are recognised", (-2, np.inf), (-np.inf, -2)),
    Claim("more of the 1x1 map's tokens survive than of the last's", (0, np.inf), (-np.inf, 0)),
    Claim("of those that were regenerated, 90 % or more are found", (90, np.inf), (-np.inf, 90)),
)
POOLS = (1, 4, 16, 64)
HEADS = (("found of, in %", "held-out", "unmarked samples", "marked samples"),
         ("tokens, in %", "survive", "green: drawn", "read again", "held-out"),
         ("pool", "found %", "false alarms %", "at threshold of 1", "threshold (z)"))
ATTACKS = {   # of images in [-1, 1]; noise is of pixels in [0, 1]
    "saved": lambda run, x: x,
    "JPEG 75": lambda run, x: saved(x, "JPEG"),
    "noise 0.05": lambda run, x: x + torch.tensor(np.random.default_rng(0).normal(0, 0.1, x.shape)),
    "shift by 1": lambda run, x: F.pad(x, (1, 0, 0, 0), "replicate")[..., :-1],
    "crop by 1": lambda run, x: F.interpolate(x[..., 1:-1, 1:-1], x.shape[2:], mode="bicubic"),
    "regenerated": lambda run, x: run.decode(run.encode(x)[1]),
}


def saved(images: Tensor, form: str = "PNG") -> Tensor:
    """Images as they come out of a file."""
    pixels_NHWC = to_bytes(images)
    for i, pixels in enumerate(pixels_NHWC):
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(file, form)
        pixels_NHWC[i] = np.asarray(Image.open(file)).reshape(pixels.shape)
    return to_float(torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2))


def read_back(run: Run, images: Tensor, attack: str) -> Tensor:
    """Tokens [N, L] that a detector sees, of images that were saved, changed and saved again."""
    return run.encode(saved(ATTACKS[attack](run, saved(images))))[1]


def green_list(key: int, V: int) -> Tensor:
    """Which codes are green, half of them: bool [V]."""
    return torch.randperm(V, generator=torch.Generator().manual_seed(key)) < V // 2


def marking(run: Run, green_V: Tensor) -> Run:
    """Its model prefers green codes. Guidance leaves delta as it is: (1 + t) delta - t delta."""
    model = copy.deepcopy(run.model)
    model.head.bias.data += run.options.delta * green_V.to(model.head.bias)
    return replace(run, model=model)


def z_scores(tokens_NL: Tensor, green_V: Tensor) -> Tensor:
    """float64 [N]."""
    T = tokens_NL.shape[1]
    share = green_V.double().mean()
    n_N = green_V[tokens_NL.long()].sum(dim=1)
    return (n_N - share * T) / (T * share * (1 - share)).sqrt()


def scores(tokens_NL: Tensor, lists: list[Tensor], unmarked_NL: Tensor) -> Tensor:
    """The largest z over the lists [N], each in standard deviations from where it is unmarked."""
    best_N = torch.tensor(-torch.inf)
    for green_V in lists:
        usual_N = z_scores(unmarked_NL, green_V)
        z_N = (z_scores(tokens_NL, green_V) - usual_N.mean()) / usual_N.std()
        best_N = torch.maximum(best_N, z_N)
    return best_N


def percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def study(run: Run, lists: list[Tensor]) -> list[dict[str, list[float]]]:
    """Of one run the three tables of HEADS."""
    unmarked_NL = kept_tokens(run)[0].tensors[0]
    score = partial(scores, unmarked_NL=unmarked_NL)
    images, labels_N = sample.evaluated_images(run, run.options.count)
    drawn_NL = run.generate(labels_N.tolist(), 0)
    marked_NL = marking(run, lists[0]).generate(labels_N.tolist(), 0)
    sets = [images, run.decode(drawn_NL), run.decode(marked_NL)]
    read = {name: [read_back(run, x, name) for x in sets] for name in ATTACKS}
    held_out_NL, _, saved_NL = read["saved"]
    read["never decoded"] = [held_out_NL, drawn_NL, marked_NL]
    limit = score(unmarked_NL, lists[:1]).quantile(0.99)
    attacks = {name: [percent(score(tokens_NL, lists[:1]) > limit) for tokens_NL in each]
               for name, each in read.items()}
    scales = {}
    maps = map(run.tokenizer.quantizer.split, (marked_NL, saved_NL, held_out_NL))
    for s, *each in zip(run.model.config.scales, *maps):
        green = [percent(lists[0][tokens_Nl]) for tokens_Nl in each]
        scales[f"{s}x{s}"] = [percent(each[0] == each[1]), *green]
    pools = {}
    for K in POOLS:
        own = score(unmarked_NL, lists[:K]).quantile(0.99)
        false_N = score(held_out_NL, lists[:K])
        shares = [score(marked_NL, lists[:K]) > own, false_N > own, false_N > limit]
        pools[f"{K} lists"] = [*map(percent, shares), own.item()]
    return [attacks, scales, pools]


def main() -> None:
    parser = parser_of("watermark", __doc__)
    parser.add_argument("--delta", type=sample.number(float, 0), default=2.0,
                        help="what is added to green logits (default: 2)")
    options = parser.parse_args()
    found = {"plain": [], "marked": []}
    by_run = []
    for run in open_runs(options):
        lists = [green_list(key, run.model.config.vocabulary) for key in range(POOLS[-1])]
        for name, part in zip(found, (run, marking(run, lists[0]))):
            found[name].append(sample.evaluate(part, options.count, options.seeds))
        by_run.append(study(run, lists))
    figures = say_evaluations(found)
    attacks, scales, _ = [say_figures(*table, 1) for table in zip(HEADS, zip(*by_run))]
    change_R7 = figures["marked"] - figures["plain"]
    first, *_, last = scales.values()
    say_verdicts(CLAIMS, [attacks["saved"][2], change_R7[:, 1], first[0] - last[0],
                          attacks["regenerated"][2]], options.started)


if __name__ == "__main__":
    sample.run_program(main)
