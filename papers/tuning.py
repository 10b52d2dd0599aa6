"""Training from given weights, with another model, other data or another loss: for the pages."""
from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from sample import Log, Run, UserError, load_checkpoint
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
        folder = run.options.run
        options = Namespace(**vars(run.options))
        options.out = folder / "papers" / name
        options.preset = replace(options.preset, var_steps=steps, var_lr=lr)
        preset = options.preset
        tokens = load_checkpoint(folder / "tokens.pt", "set of tokens")
        made_with = tokens["made_with"]
        fingerprint = run.tokenizer.fingerprint()
        if made_with["tokenizer"] != fingerprint:
            raise UserError(f"{folder / 'tokens.pt'} was made with another tokenizer")
        train, held_out = rows or (gathered(tokens["train"]), gathered(tokens["held_out"]))
        self.held_out = held_out
        data = Data(train, run.held_out, run.classes, made_with["images"])
        recipe = {"tokenizer": fingerprint, "steps": steps}
        if optimizers is None:
            optimizers = model.optimizers(lr, preset.weight_decay, preset.muon, options.dtype)
        Stage.__init__(
            self, model, optimizers, train, steps, preset.var_batch, preset.ema, recipe, data,
            options)

    def finish(self, model: nn.Module, log: Log) -> None:
        """Its page shows what became of it."""


def gathered(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> TensorDataset:
    """Tokens [N, L] and labels [N] of the parts in which they are kept."""
    return TensorDataset(*map(torch.cat, zip(*parts)))
