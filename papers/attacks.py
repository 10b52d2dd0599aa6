"""What looks for a class in a model that should have lost it: for the page on erasing."""
from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from papers import FILTERED, UNFILTERED, Trained
from papers.hmar_passes import left_halves
from papers.tuning import Tuning, kept_images
from sample import Run
from support.evaluation import features_and_classes, kept_classifier
from support.images import to_float

LR = 3e-3    # peak learning rate
AGAIN = 20   # steps of learning a class


def of_class(images: Tensor, labels_N: Tensor, label: int, flips: bool) -> Tensor:
    """Images of the class, in [-1, 1]; upside down, they are of a class that nobody has seen."""
    own = to_float(images[labels_N == label])
    return own.flip(2) if flips else own


def learned(run: Trained, model: nn.Module, label: int, name: str, flips: bool = False
            ) -> nn.Module:
    """After training on images of the class alone; not the EMA, which would hold much back."""
    preset = replace(run.settings.preset, ema=0.0, warmup=0)
    run = replace(run, settings=replace(run.settings, preset=preset))
    model = copy.deepcopy(model).requires_grad_(True)
    stage = Tuning(run, model, name, AGAIN, LR)
    tokens_NL = run.encode(of_class(*kept_images(run).train.tensors, label, flips))[1]
    stage.rows = TensorDataset(tokens_NL, torch.full((len(tokens_NL),), label))
    return stage.run()


def found_of(run: Run, label: int, flips: bool = False) -> list[float]:
    """Of all held-out images of the class, nats, the class told or not; of as many that are drawn,
    without filters and with them, and that are completed, told or not: how many are of it, in %."""
    none = run.model.config.classes
    images = of_class(*run.held_out.tensors, label, flips)
    tokens_NL = run.encode(images)[1]
    found = [-run.log_likelihood(tokens_NL, [c] * len(images)).mean().item() for c in (label, none)]
    known = left_halves(run, images)[1]
    for c, sampling, told in ((label, UNFILTERED, None), (label, FILTERED, None),
                              (label, UNFILTERED, known), (none, UNFILTERED, known)):
        tokens_NL = replace(run, sampling=sampling).generate([c] * len(images), 0, told)
        drawn = run.decode(tokens_NL)
        drawn = drawn.flip(2) if flips else drawn
        taken_for_N = features_and_classes(kept_classifier(run), drawn)[1]
        found.append(100 * (taken_for_N == label).double().mean().item())
    return found
