"""A training that one can watch: its log, the pictures and curves that are written anew as it goes
on, and TensorBoard's files, if they are asked for."""
from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from support.checkpoint import save_whole
from support.cli import UserError
from support.devices import rank_and_world, say
from support.figures import draw_curves, scale_names
from support.images import Row, grid, save_picture

PICTURES = {"tokenizer": "reconstructions.png", "var": "samples.png"}   # of each stage
SHARE = 0.03       # of a training's time, at most, goes into pictures before its end
FIRST_COST = 0.5   # seconds, until it is known what pictures cost


class WatchedLog:
    """log.jsonl, one JSON object per line, and pictures of what a stage has come to. Of several
    processes, the first one writes them."""

    def __init__(self, stage: str, step: int, steps: int, settings):
        """step, steps: where the training is, and where it ends. settings: a train.Settings.

        Lines that an earlier try left are dropped: of this stage for steps after `step`, and on its
        health, which is written at the end.
        """
        self.out = settings.out
        self.path = self.out / "log.jsonl"
        self.stage = stage
        self.steps = steps
        self.scales = settings.preset.scales
        self.begun = time.monotonic()
        self.spent = 0.0
        self.cost = FIRST_COST
        self.writer = None
        if rank_and_world()[0] > 0:
            return
        text = ""
        for line in read_log(self.path):
            before = line["step"] <= step and line["split"] != "health"
            if line["stage"] != stage or before:
                text += json.dumps(line) + "\n"
        save_whole(self.path, lambda file: file.write(text.encode()))
        if settings.tensorboard:
            folder = str(self.out / "tensorboard" / stage)
            self.writer = settings.tensorboard(folder, purge_step=step + 1)

    def write(self, step: int, split: str, **values) -> None:
        if rank_and_world()[0] > 0:
            return
        line = {"stage": self.stage, "step": step, "split": split, **values}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:   # of a full disk it does not know the name
            error.filename = str(self.path)
            raise
        if self.writer is None:
            return
        for name, value in values.items():
            if isinstance(value, list):
                for scale, one in zip(scale_names(self.scales), value):
                    self.writer.add_scalar(f"{split}/{name}/{scale}", one, step)
            else:
                self.writer.add_scalar(f"{split}/{name}", value, step)
        self.writer.flush()

    def show(self, draw: Callable[[bool], list[Row]], step: int, stopped: bool = False) -> None:
        """Draw a training that goes on or is stopped: pictures with its step above them.

        draw: a stage's `picture`.

        While a training goes on, they are left out where they would take more than their share of
        the time; and what cannot be written, as on a full disk, is no reason to end it.
        """
        begun = time.monotonic()
        too_soon = self.spent + self.cost > SHARE * (begun - self.begun)
        if rank_and_world()[0] > 0 or too_soon and not stopped:
            return
        try:
            self.draw(draw(few=True), step, f"step {step} of {self.steps}")
        except OSError as error:
            say(f"note: no pictures of step {step}: {error}")
        self.cost = time.monotonic() - begun
        self.spent += self.cost

    def draw(self, rows: list[Row], step: int, note: str = "") -> None:
        """Write the stage's picture, of these rows, and the curves, if anything is logged; of no
        rows, nothing."""
        if not rows:
            return
        picture = grid(rows, note=note)
        save_picture(self.out / PICTURES[self.stage], picture)
        if lines := read_log(self.path):
            save_picture(self.out / "curves.png", draw_curves(lines, self.scales))
        if self.writer is not None:
            self.writer.add_image("picture", np.asarray(picture), step, dataformats="HWC")
            self.writer.flush()


def read_log(path: Path) -> list[dict]:
    """The lines of a log; one that a killed run did not finish is left out."""
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        known = {"stage", "step", "split"}
        if not all(isinstance(line, dict) and known <= line.keys()
                   and isinstance(line["step"], int) for line in lines):
            raise ValueError("a line is no record of ours")
        return lines
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); move it away to go on without it")


def summary_writer() -> type:
    """What writes TensorBoard's files. Raises UserError where that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard takes one more package: pip install tensorboard")
    return SummaryWriter


def say_what_next(out: Path, stages: list[str]) -> None:
    """The last line of a training: what to look at, and what to try."""
    pictures = ", ".join(PICTURES[stage] for stage in stages)
    command = "progress" if "var" in stages else "codes data:0"
    done = out if "var" in stages else out / "tokenizer.pt"
    say(f"{done} is complete; look at {pictures} and curves.png in it, then try "
        f"python sample.py {command} --run {shlex.quote(str(out))}")
