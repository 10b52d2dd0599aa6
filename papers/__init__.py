"""What came after VAR, a page for each idea:  python -m papers.NAME --run out/shapes out/shapes-1

A page changes what its paper changes, trains or tunes where it must, and prints claim, measurement
and verdict; README.md shows all of them side by side. The rule for claims:

- A claim, and what falsifies it, stands at the top of its page before anything is measured, and
  stays there with its figures if it fails.
- --run takes finished runs of train.py that differ in their seed. A page compares within a run, for
  nats of two tokenizers cannot be compared, and reports the mean and the standard deviation of the
  difference over the runs. Nothing under two standard deviations is an effect, and fewer than three
  runs have no spread to speak of. (Of differences that are none, 7 % pass for one at three runs.)
- What is tuned is compared with a plain control: as many steps of ordinary training (tuning.py).
- Images are judged as `sample.py evaluate` does: without guidance and filters, where there is
  room, and with those that were its defaults then; and by recall, too, with which recognition is
  easily bought.
"""
from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sample import Run, Sampling, load_run, load_tokenizer
from support.checkpoint import load_checkpoint
from support.cli import Parser, UserError, add_device_flags, number
from support.devices import Machine, choose_machine
from support.evaluation import Evaluation, evaluated_images, in_words, say_table
from support.presets import Preset
from train import Settings

STARTED = time.monotonic()
UNFILTERED = Sampling(cfg=0.0, top_k=0, top_p=1.0)   # the model's own distribution
FILTERED = Sampling(cfg=2.0, top_k=900, top_p=0.6)   # sample.py's defaults when all was measured


def parser_of(page: str, text: str | None) -> Parser:
    """With the flags that all pages have. text: the page's docstring."""
    parser = Parser(prog=f"python -m papers.{page}", description=(text or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--run", nargs="+", type=Path, default=[Path("out/shapes")], metavar="FOLDER",
        help="finished runs of train.py with different seeds (default: out/shapes)")
    add("--count", type=number(int, 8), default=1000, metavar="N",
        help="held-out images, and generated ones of each kind, even (default: %(default)s)")
    add("--resume", action="store_true", help="go on from what an earlier try of this page trained")
    add_device_flags(parser, compile=False)
    return parser


@dataclass
class Trained(Run):
    """A finished run, and how it was trained."""
    settings: Settings


def open_runs(options: Namespace) -> list[Trained]:
    """The runs that the flags of `parser_of` name. Raises UserError for a folder without a finished
    run, for one with too little in it to be judged by, and for runs that do not make a spread."""
    machine = choose_machine(options.device, options.precision)
    runs = [open_run(folder, machine, options.resume) for folder in options.run]
    recipes = [recipe(run.folder) for run in runs if len(runs) > 1]   # of one, nobody asks
    for i, run in enumerate(runs):
        evaluated_images(run, options.count)   # are there so many?
        for j, other in enumerate(runs[:i]):
            both = f"{run.folder} and {other.folder}"
            if recipes[i] != recipes[j]:
                raise UserError(f"{both} differ in more than their seed")
            if run.settings.seed == other.settings.seed:
                raise UserError(f"{both} have the same seed, {run.settings.seed}")
    return runs


def open_run(folder: Path, machine: Machine, resume: bool) -> Trained:
    run = load_run(folder, machine, FILTERED)
    # Not with a decoder in half precision, as on a GPU: it is known by its weights, and trained.
    run.tokenizer = load_tokenizer(folder / "tokenizer.pt").to(machine.device)
    content = load_checkpoint(folder / "var.pt", "transformer")
    if run.note:
        raise UserError(f"{folder / 'var.pt'} is not trained to its end")
    config = run.model.config
    counts = {"class": len(run.classes), "scale": len(config.scales), "code": config.vocabulary}
    for name, count in counts.items():
        if count == 1:
            raise UserError(f"{folder} has one {name}, and the pages compare several")
    preset = Preset(**content["preset"])
    settings = Settings(preset, machine, folder, content["made_with"]["seed"], resume)
    return Trained(**vars(run), settings=settings)


def recipe(folder: Path) -> dict:
    """What both stages were made with, but for the seed and what follows from it."""
    made_with = {}
    for stage, kind in (("tokenizer", "tokenizer"), ("var", "transformer")):
        content = load_checkpoint(folder / f"{stage}.pt", kind)
        values = {**content["config"], **content["made_with"], "classes": content.get("classes")}
        for name in ("seed", "data set", "tokenizer", "copied from"):
            values.pop(name, None)
        made_with[stage] = values
    return made_with


@dataclass(frozen=True)
class Claim:
    """Where a figure should lie, and where the claim is false: limits, between which it lies."""
    text: str
    holds: tuple[float, float]
    false: tuple[float, float]

    def verdict(self, figure: Sequence[float]) -> str:
        """Of its value in each run, by two standard deviations."""
        if len(figure) < 3:
            return "no verdict, which takes three runs"
        reach = np.mean(figure) + 2 * np.std(figure, ddof=1) * np.array([-1, 1])
        for word, (low, high) in (("holds", self.holds), ("falsified", self.false)):
            if low <= reach[0] and reach[1] <= high:
                return word
        return "undecided"


def say_verdicts(claims: Sequence[Claim], figures: Sequence[list[float]]) -> None:
    """figures: of each claim, in each run."""
    for claim, figure in zip(claims, figures, strict=True):
        measured = in_words(list(figure), 4)
        print(f"claim: {claim.text}\n    measured {measured}: {claim.verdict(figure)}")
    print(f"{(time.monotonic() - STARTED) / 60:.1f} minutes")


def say_figures(heads: Sequence[str], by_run: Sequence[dict[str, Sequence[float]]], digits: int,
                base: str | None = None) -> dict[str, np.ndarray]:
    """Print a table that each run has given, as means and spreads, and how its rows differ from
    that of the name `base`, starred where it is an effect; returns [cells, runs] by row."""
    figures = {name: np.transpose([rows[name] for rows in by_run]) for name in by_run[0]}
    said = {heads[0]: heads[1:]}
    for name, figure in figures.items():
        said[name] = [in_words(list(cell), digits) for cell in figure]
    if base:
        for name, figure in figures.items():
            if name != base:
                differences = figure - figures[base]
                said[f"{name}: difference"] = [in_difference(list(x), digits) for x in differences]
    say_table(said)
    return figures


# Nats per image; then how many are recognised, recall and Fréchet distance, without guidance and
# filters; then these three as FILTERED has them.
HEADS = ("nats/image", "recognised %", "recall %", "Fréchet",
         "f. recognised %", "f. recall %", "f. Fréchet")


def figures_of(found: Evaluation) -> list[float]:
    """As in HEADS, means over the seeds."""
    values = [found.nats_per_image]
    for qualities in (found.unfiltered, found.generated):
        rows = [(100 * x.recognised, 100 * x.recall, x.frechet) for x in qualities]
        values += np.mean(rows, axis=0).tolist()
    return values


def say_evaluations(rows: dict[str, Sequence[Evaluation]]) -> dict[str, np.ndarray]:
    """Print what was found in the runs, and how the rows differ from the first; returns the figures
    [runs, 7] of each row."""
    by_run = []
    for found in zip(*rows.values()):   # of one run
        by_run.append(dict(zip(rows, map(figures_of, found))))
    figures = say_figures(("", *HEADS), by_run, 2, base=next(iter(rows)))
    print("f.: filtered, with cfg 2, top-k 900 and top-p 0.6; *: an effect")
    return {name: figure.T for name, figure in figures.items()}


def in_difference(values: list[float], digits: int) -> str:
    """With a star where it is an effect."""
    spread = np.std(values, ddof=1) if len(values) > 2 else np.inf
    return in_words(values, digits) + " *" * bool(abs(np.mean(values)) > 2 * spread)
