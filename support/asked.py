"""What a command line names: classes and images. Of a run, a sample.Run."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support.cli import UserError, in_short
from support.images import composed, legible, read_images, to_float


@dataclass
class Given:
    """Images named on the command line, in [-1, 1] on the CPU; a label is None if it is unknown."""
    images: Tensor
    names: list[str]
    labels: list[int | None]


def load_images(run, sources: list[str]) -> Given:
    """Files, folders of them, and `data:17`, number 17 of the run's held-out images (from 0)."""
    config = run.tokenizer.config
    found = []
    for source in sources:
        row = source.removeprefix("data:")
        if row == source:
            own = read_images(
                Path(source), config.image_side, config.image_channels, run.white)
            found += [(*image, None) for image in own]
            continue
        count = len(run.held_out_images())
        if row not in map(str, range(count)):
            raise UserError(f"{in_short(source, 40)}: the held-out images are data:0 to "
                            f"data:{count - 1}")
        image, label = run.held_out[int(row)]
        found.append((image, f"{run.classes[label]} {int(row)}", int(label)))
    pixels, names, labels = zip(*found)
    names = list(map(legible, names, range(len(names))))
    return Given(to_float(torch.stack(pixels)), names, list(labels))


def asked_classes(run, names: list[str] | None, per_class: int) -> tuple[list[str], list[int]]:
    """Return how to call each class in a picture, and the class of every image."""
    names = names or run.classes[:20]
    chosen = class_indices(names, run.classes)
    # What was asked for by its number is called by its name, too.
    labels = [name if composed(name) in map(composed, run.classes) else f"{name} {run.classes[i]}"
              for name, i in zip(names, chosen)]
    return list(map(legible, labels, chosen)), np.repeat(chosen, per_class).tolist()


def asked_class(run, name: str | None, own: int | None = None) -> int:
    """Return the class of that name; else the image's own, or the null class if it is unknown."""
    if name is not None:
        return class_indices([name], run.classes)[0]
    return run.model.config.classes if own is None else own


def class_indices(names: list[str], classes: list[str]) -> list[int]:
    """The numbers of classes, named or numbered. é may be one letter or two, by keyboard and file
    system."""
    index = {str(i): i for i in range(len(classes))}
    index |= {composed(name): i for i, name in enumerate(classes)}   # which come before numbers
    chosen = [index.get(composed(name)) for name in names]
    if None in chosen:
        there = ", ".join(classes) if len(classes) <= 20 else f"{classes[0]} to {classes[-1]}"
        lacking = names[chosen.index(None)]
        how = ", and names stand with spaces between them" if "," in lacking else ""
        raise UserError(f"there is no class {lacking}; there are {there}{how}")
    return chosen
