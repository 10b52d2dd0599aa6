"""Edges as a second condition (ControlAR, arXiv 2410.02705, and ECM, 2510.05610).

The model is told where the edges of the image are. Of their map, 0 or 1 at every pixel, the pixels
under a cell of the latent make up a vector e. Each scale reads that as it reads any latent, and a
linear layer Z, which is zero at first, adds it to what the transformer reads anyway:

    x_k = embed(read(f_hat, k)) + Z read(e, k) + position

Where training drops the class it drops the edges: guidance goes away from images with neither.
Tuned are all weights (ControlAR), or only what is new (ECM, whose adapters are much more than Z).
"""
from __future__ import annotations

from dataclasses import replace
from math import inf

import torch
from torch import Tensor, nn

from papers import (
    FILTERED, UNFILTERED, Claim, Trained, open_runs, parser_of, say_figures, say_verdicts,
)
from papers.tuning import Tuning
from sample import Run, class_indices, load_images
from support.cli import COUNT, run_program
from support.evaluation import Judge, evaluated_images, kept_classifier
from support.images import Row, grid, save_picture, to_bytes
from var import VAR

HEADS = ("", "IoU", "recognised %", "recall %", "f. IoU", "f. recognised %", "f. recall %")
CLAIMS = (
    Claim("all weights tuned, an IoU of 0.6, unfiltered", holds=(0.6, inf), false=(-inf, 0.4)),
    Claim("no fewer recognised than of the plain control", holds=(0, inf), false=(-inf, -3)),
    Claim("with VAR frozen, 2/3 of the gain in IoU", holds=(2 / 3, inf), false=(-inf, 2 / 3)),
)


class Controlled(VAR):
    """A VAR that is shown edges. With none, and with Z at zero, it is the VAR it was made of."""

    def __init__(self, run: Run):
        super().__init__(run.model.config)
        self.load_state_dict(run.model.state_dict())
        self.read = run.tokenizer.quantizer.read
        self.cell = run.tokenizer.config.downsampling   # its side in pixels
        self.control = nn.Linear(self.cell**2, self.config.width, bias=False)   # Z
        nn.init.zeros_(self.control.weight)
        self.edges_BLX: Tensor | None = None   # X: pixels of a cell
        self.to(run.machine.device)

    def show(self, edges_B1HW: Tensor, cfg: float = 0.0) -> None:
        """The edges of the images at hand. Of the null class, for guidance, there are none."""
        cells_BXSS = nn.functional.pixel_unshuffle(edges_B1HW, self.cell)
        read = [self.read(cells_BXSS, k) for k in range(len(self.config.scales))]
        edges_BLX = torch.cat(read, dim=1)
        self.edges_BLX = torch.cat([edges_BLX, 0 * edges_BLX]) if cfg else edges_BLX

    def drop_labels(self, labels_B: Tensor) -> Tensor:
        labels_B = super().drop_labels(labels_B)
        if self.edges_BLX is not None:
            self.edges_BLX = self.edges_BLX * (labels_B < self.config.classes)[:, None, None]
        return labels_B

    def positions(self) -> Tensor:
        """What is added to what is read: [1, L, W], and with edges [B, L, W]."""
        added = 0 if self.edges_BLX is None else self.control(self.edges_BLX)
        return super().positions() + added


class Steering(Tuning):
    def loss(self, model: Controlled, tokens_BL: Tensor, labels_B: Tensor):
        """Of a model that is shown the edges of what the tokens decode to."""
        tokens_BL, labels_B = self.on_device(tokens_BL, labels_B)
        model.show(edges_of(self.tokenizer.decode(tokens_BL)))
        return super().loss(model, tokens_BL, labels_B)


def edges_of(images: Tensor) -> Tensor:
    """Where the gradient, of all channels, is over 1/4 per pixel: 0 or 1, [B, 1, side, side]."""
    slopes = torch.cat(torch.gradient(images, dim=(2, 3)), dim=1)   # central differences
    return (slopes.norm(dim=1, keepdim=True) > 0.25).float()


def draw(run: Run, labels: list[int], edges_N1HW: Tensor, seed: int) -> Tensor:
    """Images of these classes with these edges."""
    def show(rows: slice) -> None:   # called before these rows are drawn
        run.model.show(edges_N1HW[rows].to(run.machine.device), run.sampling.cfg)
    return run.decode(run.generate(labels, seed, show))


def study(run: Trained, steps: int, count: int) -> tuple[dict[str, list[float]], Run]:
    """What is measured of one run, as in HEADS; and the run with the model that was tuned whole."""
    lr = run.settings.preset.var_lr
    originals, labels_N = evaluated_images(run, count)
    judge = Judge(kept_classifier(run), originals, run.classes)
    asked_N1HW = edges_of(originals)

    def figures(images: Tensor) -> list[float]:
        found = judge(images, labels_N)
        drawn_N1HW = edges_of(images)
        either_N = torch.maximum(asked_N1HW, drawn_N1HW).sum(dim=(1, 2, 3)).clamp(min=1)
        iou = ((asked_N1HW * drawn_N1HW).sum(dim=(1, 2, 3)) / either_N).mean().item()
        return [iou, 100 * found.recognised, 100 * found.recall]

    rows = {"reconstructions": 2 * figures(run.decode(run.encode(originals)[1]))}
    for name, kind in (("plain", Tuning), ("frozen", Steering), ("all", Steering)):
        model = Controlled(run)
        optimizers = None
        if name == "frozen":
            Z = model.requires_grad_(False).control.requires_grad_(True)
            optimizers = [torch.optim.AdamW(Z.parameters(), lr, weight_decay=0.0)]
        stage = kind(run, model, f"control-{name}", steps, lr, optimizers)
        tuned = replace(run, model=stage.run())
        rows[name] = []
        for sampling in (UNFILTERED, FILTERED):
            part = replace(tuned, sampling=sampling)
            rows[name] += figures(draw(part, labels_N.tolist(), asked_N1HW, seed=0))
    return rows, tuned


def requests(run: Run, sources: list[str]) -> tuple[list[str], list[int], Tensor]:
    """Names, classes and edges of what --image names."""
    given = load_images(run, sources)
    edges_N1HW = edges_of(given.images)
    for i, name in enumerate(given.names):
        if given.labels[i] is None:   # a drawing
            given.labels[i] = class_indices([name], run.classes)[0]
            edges_N1HW[i] = given.images[i].mean(dim=0) < 0.25
    return given.names, given.labels, edges_N1HW


def main() -> None:
    parser = parser_of("control", __doc__)
    parser.add_argument("--steps", type=COUNT, default=500, help="a tuning (default: %(default)s)")
    parser.add_argument("--image", nargs="+", default=["data:0", "data:4", "data:6", "data:8"],
        help="for the picture: data:17, or a drawing, dark on white, named for its class: star.png")
    options = parser.parse_args()
    runs = open_runs(options)
    names, labels, edges_N1HW = requests(runs[0], options.image)
    by_run, tuned = zip(*(study(run, options.steps, options.count) for run in runs))
    figures = say_figures(HEADS, by_run, 2, base="plain")
    gain, frozen_gain = (figures[name] - figures["plain"] for name in ("all", "frozen"))
    say_verdicts(CLAIMS, [figures["all"][0], gain[1], frozen_gain[0] / gain[0]])
    columns = [1 - 2 * edges_N1HW] + [draw(tuned[0], labels, edges_N1HW, seed) for seed in range(3)]
    picture = grid(list(map(Row, names, zip(*map(to_bytes, columns)))))
    save_picture(options.run[0] / "papers" / "control.png", picture)


if __name__ == "__main__":
    run_program(main)
