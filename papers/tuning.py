"""Training from given weights, with another model, other data or another loss: for the pages."""
from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from sample import Log, Run, blaming, load_checkpoint
from tokenizer import Tokenizer
from train import Data, Stage, VARStage


class Tuning(VARStage):
    """So many steps of VAR's training, from the weights that a model has, on a run's images.

    `run()` trains; what it returns, the average of the weights, lies in the run's folder as well,
    under papers/. A page with another loss overrides `loss_of`; one with more data than tokens and
    labels hands in rows of it, and overrides `loss` and `validate`, which are given those.
    """

    def __init__(
        self, run: Run, model: nn.Module, name: str, steps: int, lr: float,
        rows: tuple[TensorDataset, TensorDataset] | None = None,
        optimizers: list[Optimizer] | None = None,
    ):
        """model: it is changed. name: of the folder, papers/NAME. lr: at the peak.

        rows: to train on, and held-out ones; if not given, the run's tokens and labels.
        optimizers: if not given, the run's own; they take it that everything has a gradient.
        """
        self.tokenizer = run.tokenizer
        options = Namespace(**vars(run.options))
        options.out = options.run / "papers" / name
        options.preset = replace(options.preset, var_steps=steps, var_lr=lr)
        preset = options.preset
        *own, images = kept_tokens(run)
        train, self.held_out_rows = rows or own
        data = Data(train, run.held_out, run.classes, images)
        recipe = {   # --resume takes nothing that began otherwise
            "tokenizer": run.tokenizer.fingerprint(),
            "first weights": Tokenizer.fingerprint(model),
            "steps": steps,
            "lr": lr,
        }
        if optimizers is None:
            optimizers = model.optimizers(lr, preset.weight_decay, preset.muon, options.dtype)
        Stage.__init__(
            self, model, optimizers, train, steps, preset.var_batch, preset.ema, recipe, data,
            options)

    def finish(self, model: nn.Module, log: Log) -> None:
        """Its page shows what became of it."""


def kept_tokens(run: Run) -> tuple[TensorDataset, TensorDataset, str]:
    """Tokens [N, L] and labels [N] of the training and of the held-out images, as train.py kept
    them; and what these images are."""
    path = run.options.run / "tokens.pt"
    content = load_checkpoint(path, "set of tokens")
    with blaming(path):
        if content["made_with"]["tokenizer"] != run.tokenizer.fingerprint():
            raise ValueError("the tokens are of another tokenizer")
        sets = [TensorDataset(*map(torch.cat, zip(*content[name])))
                for name in ("train", "held_out")]
        return *sets, content["made_with"]["images"]
