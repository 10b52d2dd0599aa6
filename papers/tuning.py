"""Training from given weights, with another model or another loss: for the pages."""
from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from papers import Trained
from support.checkpoint import blaming, fingerprint, load_checkpoint
from support.cli import UserError
from support.data import Data
from support.images import Row
from train import Stage, VARStage, var_optimizers


class Tuning(VARStage):
    """So many steps of VAR's training, from the weights that a model has, on a run's images.

    `run()` trains; what it returns, the EMA model, lies in the run's folder as well, under papers/.
    A page with another loss overrides `loss`.
    """

    def __init__(self, run: Trained, model: nn.Module, name: str, steps: int, lr: float,
                 optimizers: list[Optimizer] | None = None):
        """model: it is changed. name: of the folder, papers/NAME. lr: at the peak.

        optimizers: if not given, the run's own; they take it that everything has a gradient.
        """
        self.tokenizer = run.tokenizer
        preset = replace(run.settings.preset, var_steps=steps, var_lr=lr)
        settings = replace(run.settings, preset=preset, out=run.folder / "papers" / name)
        tokens, self.held_out_rows, digest = kept_tokens(run)
        made_with = {   # --resume takes nothing that began otherwise
            "tokenizer": fingerprint(run.tokenizer),
            "first weights": fingerprint(model),
            "steps": steps,
            "lr": lr,
        }
        if optimizers is None:
            optimizers = var_optimizers(model, preset, settings.machine.dtype)
        data = Data(tokens, run.held_out, run.classes, digest)
        Stage.__init__(
            self, model, optimizers, tokens, steps, preset.var_batch, preset.ema, made_with, data,
            settings)

    def on_device(self, tokens_BL: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """What `loss` is given, on the device; tokens as int64."""
        device = self.settings.machine.device
        return tokens_BL.to(device).long(), labels_B.to(device)

    def picture(self, few: bool) -> list[Row]:
        """Nothing: its page shows what became of it."""
        return []


def kept_images(run: Trained) -> Data:
    """The images that the run was trained on, as train.py kept them; and those held out."""
    path = run.folder / "train_images.pt"
    kept = load_checkpoint(path, "set of training images")
    if run.data_set not in (None, kept["data_set"]):
        raise UserError(f"{path} is of other images than the run was trained on")
    images = TensorDataset(kept["images"], kept["labels"])
    return Data(images, run.held_out, run.classes, kept["data_set"])


def kept_tokens(run: Trained) -> tuple[TensorDataset, TensorDataset, str]:
    """Tokens [N, L] and labels [N] of the training and of the held-out images, as train.py kept
    them; and the digest of these images."""
    path = run.folder / "tokens.pt"
    content = load_checkpoint(path, "set of tokens")
    with blaming(path):
        made_with = content["made_with"]
        if made_with["tokenizer"] != fingerprint(run.tokenizer):
            raise ValueError("the tokens are of another tokenizer")
        sets = [TensorDataset(*content[name]) for name in ("train", "held_out")]
        return *sets, made_with["data set"]
