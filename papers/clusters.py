"""Clusters first, then codes (CTF, arXiv 2503.16194; IAR, 2501.00880), scale by scale. In nats.

Many codes of a large codebook look alike; so CTF clusters them by k-means, lets its model draw the
clusters only, and a second one all codes at once, given all clusters. In a VAR, which draws the
tokens of a scale independently, that is a second pass in which they know of each other:

    log p(scale) = sum_i log p(cluster_i | coarser scales)
                 + sum_i log p(code_i | clusters of the whole scale, coarser scales)

an exact likelihood, as that of hmar.py's two passes, the rival. (CTF draws one token after the
other, with 512 clusters of 16384 codes and two models. Here one set of weights is tuned, on half of
a batch for either pass, so that a step costs what one of ordinary training does: clustered.py. Of
CTF the abstract and others' copies of its tables were at hand, of IAR the abstract and its code.)

Is it the likeness of codes that helps, or any second pass? Clusters of the same sizes, but drawn by
lot, tell. IAR keeps to one pass and adds the cluster's cross entropy to the token's (lambda 1, as
in its code; its clusters are all of one size). And the premise is measured: images of which all
tokens, or those of the last scale, are replaced, each by any of its cluster.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from papers import (
    Claim, Trained, hmar, open_runs, parser_of, say_evaluations, say_figures, say_verdicts,
)
from papers.clustered import ClusteredVAR, ClusterLoss, TwoPasses, k_means
from sample import Run
from support.cli import UserError, number, run_program
from support.evaluation import (
    Evaluation, Judge, evaluate, evaluated_images, kept_classifier,
)
from support.images import batches
from tokenizer import Tokenizer

MORE = {"holds": (0, inf), "false": (-inf, 0)}
CLAIMS = (
    Claim("clusters first save 1 % of an image's nats on plain VAR, tuned for as long",
          holds=(1, inf), false=(-inf, 1)),
    Claim("they save more than clusters drawn by lot, in nats", **MORE),
    Claim("and more than hmar's checkerboard", **MORE),
    Claim("unfiltered, 3 points more are recognised than of plain VAR",
          holds=(3, inf), false=(-inf, 3)),
    Claim("and so with IAR's loss, in one pass", holds=(3, inf), false=(-inf, 3)),
    Claim("nine of ten are recognised with all tokens replaced within their clusters",
          holds=(90, inf), false=(-inf, 90)),
)


class TwoPassRun(Trained):
    """A run whose model has two passes."""

    def log_likelihoods(self, tokens_NL: Tensor, labels: list[int]) -> Tensor:
        return -in_parts(self, self.model.nats, tokens_NL, torch.tensor(labels)).sum(dim=0)


@torch.no_grad()
def in_parts(run: Run, nats: Callable, tokens_NL: Tensor, labels_N: Tensor) -> Tensor:
    """Nats [2, N, L] of either pass, on the CPU. nats: called as `ClusteredVAR.nats`."""
    device = run.machine.device
    found = []
    for rows in batches(len(tokens_NL), run.batch):
        image = tokens_NL[rows].to(device), labels_N[rows].to(device)
        found.append(nats(run.tokenizer, *image).cpu())
    return torch.cat(found, dim=1)


def replaced(tokens_NL: Tensor, cluster_V: Tensor) -> Tensor:
    """Each token by any of its cluster, which may be itself."""
    same_VV = (cluster_V[:, None] == cluster_V).float()
    return same_VV[tokens_NL.flatten()].multinomial(1).view_as(tokens_NL)


def measure(run: Trained, clusters: int, steps: int, lr: float, count: int
            ) -> tuple[dict[str, Evaluation], dict[str, list[float]], dict[str, list[float]]]:
    """What is drawn; nats of an image, and of either pass; and how many are recognised, in %, with
    all tokens, or those of the last scale, replaced."""
    torch.manual_seed(run.settings.seed)
    cluster_V = k_means(run.tokenizer.quantizer.codebook_VC, clusters)
    lot_V = cluster_V[torch.randperm(len(cluster_V))]
    models = {"plain": hmar.tuned(run, "plain", steps, lr).model}
    models["iar"] = ClusterLoss(run, cluster_V, steps, lr).run()
    runs = {name: replace(run, model=model) for name, model in models.items()}
    models = {name: ClusteredVAR(model, cluster_V).eval() for name, model in models.items()}
    for name, of_V in (("clusters", cluster_V), ("lot", lot_V)):
        stage = TwoPasses(run, ClusteredVAR(run.model, of_V), f"clusters-{name}", steps, lr)
        models[name] = stage.run()
        runs[name] = TwoPassRun(**vars(replace(run, model=models[name])))
    rival = hmar.tuned(run, "masked", steps, lr).model
    in_a_L = hmar.checkerboard(rival)

    def by_rival(tokenizer: Tokenizer, tokens_BL: Tensor, labels_B: Tensor) -> Tensor:
        _, two_BL, _ = hmar.nats_of(tokenizer, rival, tokens_BL, labels_B)
        return torch.stack([two_BL * in_a_L, two_BL * ~in_a_L])

    images, labels_N = evaluated_images(run, count)
    _, tokens_NL = run.encode(images)
    nats = {}
    for name, function in [*((n, m.nats) for n, m in models.items()), ("checkerboard", by_rival)]:
        passes_2 = in_parts(run, function, tokens_NL, labels_N).sum(dim=2).mean(dim=1)
        nats[name] = [passes_2.sum().item(), *passes_2.tolist()]
    judge = Judge(kept_classifier(run), images, run.classes)
    last = run.model.config.spans[-1].start
    shares = {}
    for name, of_V in (("clusters", cluster_V.cpu()), ("lot", lot_V.cpu())):
        torch.manual_seed(0)   # whatever was trained before
        shown_NL = replaced(tokens_NL, of_V)
        last_NL = torch.cat([tokens_NL[:, :last], shown_NL[:, last:]], dim=1)
        shares[name] = [100 * judge(run.decode(x_NL), labels_N).recognised
                        for x_NL in (shown_NL, last_NL)]
    return {name: evaluate(part, count, [0]) for name, part in runs.items()}, nats, shares


def main() -> None:
    parser = parser_of("clusters", __doc__)
    hmar.add_flags(parser)
    parser.set_defaults(count=500)
    parser.add_argument("--clusters", type=number(int, 2), default=16,
                        help="of codes (default: %(default)s)")
    options = parser.parse_args()
    runs = open_runs(options)
    V = runs[0].model.config.vocabulary
    if options.clusters >= V:
        raise UserError(f"--clusters {options.clusters} must be fewer than there are codes, {V}")
    found = [measure(run, options.clusters, options.steps, options.lr, options.count)
             for run in runs]
    drawn, nats, shares = zip(*found)
    rows = say_evaluations({name: [of[name] for of in drawn] for name in drawn[0]})
    print("clusters: first, then their codes; lot: the same, but drawn by lot; iar: its loss")
    nats = say_figures(("nats", "image", "first pass", "second pass"), nats, 2, base="plain")
    heads = "recognised %, replaced", "all tokens", "the last scale's"
    shares = say_figures(heads, shares, 1)
    plain, _, clusters, lot, rival = (figure[0] for figure in nats.values())   # [runs] each
    say_verdicts(CLAIMS, [
        100 * (1 - clusters / plain), lot - clusters, rival - clusters,
        (rows["clusters"] - rows["plain"])[:, 1], (rows["iar"] - rows["plain"])[:, 1],
        shares["clusters"][0],
    ])


if __name__ == "__main__":
    run_program(main)
