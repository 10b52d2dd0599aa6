"""Everything one does with a trained VAR:  python sample.py

    python sample.py                                     a grid of images, a row per class, from out/shapes
    python sample.py --run out/shapes --classes star heart --per-class 12 --seed 7
    python sample.py --progress                          what the running latent decodes to after each scale
    python sample.py --tokenizer vae_ch160v4096z32.pth --var var_d16.pth --classes 207 980

Read `main` first. A run's folder holds all that is needed; a published pair of checkpoints does, too.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tokenizer import Tokenizer
from train import (FILTERS, UserError, chunks, device_and_autocast, fingerprint, grid, load_checkpoint, load_published,
                   load_tokenizer, restore, run_program, save_image, to_bytes)
from var import VAR, VARConfig


def load(options: argparse.Namespace) -> tuple[Tokenizer, VAR, list[str]]:
    """The tokenizer, the transformer and the class names. Raises UserError where the two do not belong together."""
    tokenizer_path = options.tokenizer or options.run / "tokenizer.pt"
    var_path = options.var or options.run / "var.pt"
    if var_path.suffix == ".pth":
        model = load_published(var_path, VAR.from_official)
        tokenizer = load_tokenizer(tokenizer_path, model.config.scales)
        classes = [str(i) for i in range(model.config.classes)]
    else:
        content = load_checkpoint(var_path, "transformer")
        model = restore(var_path, lambda: VAR(VARConfig(**content["config"])), content)
        tokenizer, classes = load_tokenizer(tokenizer_path, model.config.scales), content["classes"]
        if fingerprint(tokenizer) != content["tokenizer"]:
            raise UserError(f"{var_path} was trained on the tokens of another tokenizer than {tokenizer_path}")
    ours, its = tokenizer.config, model.config
    if (ours.scales, ours.vocabulary, ours.code_channels) != (its.scales, its.vocabulary, its.code_channels):
        raise UserError(f"{tokenizer_path} has scales {ours.scales}, {ours.vocabulary} codes of {ours.code_channels} "
                        f"channels; {var_path} expects {its.scales}, {its.vocabulary} and {its.code_channels}")
    return tokenizer.to(options.device), model.to(options.device), classes


def class_indices(names: list[str] | None, classes: list[str]) -> list[int]:
    for name in names or []:
        if name not in classes:
            known = ", ".join(classes) if len(classes) <= 20 else f"{classes[0]} to {classes[-1]}"
            raise UserError(f"there is no class {name}; there are {known}")
    return [classes.index(name) for name in names or classes[:20]]


@torch.no_grad()
def generate(tokenizer: Tokenizer, model: VAR, labels: list[int], options: argparse.Namespace) -> Tensor:
    """Tokens [N, L] of one image per label, on the CPU, a batch at a time."""
    generator = torch.Generator(options.device).manual_seed(options.seed)
    batches = list(chunks(len(labels), options.batch))
    tokens = []
    for indices in tqdm(batches, desc="generate", unit="batch", disable=len(batches) == 1):
        labels_B = torch.tensor([labels[i] for i in indices], device=options.device)
        with options.autocast():
            tokens.append(model.generate(tokenizer, labels_B, options.cfg, options.top_k, options.top_p, generator).cpu())
    return torch.cat(tokens)


@torch.no_grad()
def decode(tokenizer: Tokenizer, tokens_NL: Tensor, options: argparse.Namespace) -> np.ndarray:
    """Bytes [N, side, side, channels] of tokens of all scales, or of the coarser ones."""
    images = []
    for indices in chunks(len(tokens_NL), options.batch):
        with options.autocast():
            images.append(to_bytes(tokenizer.decode(tokens_NL[indices].to(options.device))))
    return np.concatenate(images)


def progress_rows(tokenizer: Tokenizer, tokens_NL: Tensor, labels: list[str], options) -> list[tuple[str, np.ndarray]]:
    """A row per image: what its first 1, 2, ... K scales decode to."""
    ends = np.cumsum([s * s for s in tokenizer.config.scales])
    columns = [decode(tokenizer, tokens_NL[:, :end], options) for end in ends]
    return [(label, np.stack([column[i] for column in columns])) for i, label in enumerate(labels)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw images with a trained VAR.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, default=Path("out/shapes"), help="folder that train.py wrote")
    add("--tokenizer", type=Path, help="another tokenizer: a .pt of train.py or a published .pth (default: the run's)")
    add("--var", type=Path, help="another transformer: a .pt of train.py or a published .pth (default: the run's)")
    add("--out", type=Path, help="the PNG to write (default: sample.png or progress.png in the run's folder)")
    add("--classes", nargs="+", metavar="NAME", help="names of classes; numbers for a published model (default: all, at most 20)")
    add("--per-class", type=int, default=8, help="images per class")
    add("--cfg", type=float, default=FILTERS["cfg"], help="strength of classifier-free guidance at the last scale; 0 is none")
    add("--top-k", type=int, default=FILTERS["top_k"], help="draw from the k most likely tokens; 0 is no limit")
    add("--top-p", type=float, default=FILTERS["top_p"], help="draw from the most likely tokens that hold this much probability")
    add("--seed", type=int, default=0, help="the same seed gives the same picture")
    add("--batch", type=int, default=100, help="images generated at a time")
    add("--progress", action="store_true", help="one row per image: the image after each scale, coarse to fine")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, mps, ...")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the device is built for it")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    for name, fine, what in (("per_class", options.per_class >= 1, "1 or more"), ("batch", options.batch >= 1, "1 or more"),
                             ("cfg", 0 <= options.cfg < float("inf"), "0 or more"),
                             ("top_k", options.top_k >= 0, "0 or more"), ("top_p", 0 < options.top_p <= 1, "over 0, at most 1")):
        if not fine:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be {what}")


def main() -> None:
    options = parse()
    check(options)
    options.device, options.autocast = device_and_autocast(options.device, options.precision)
    tokenizer, model, classes = load(options)
    chosen = class_indices(options.classes, classes)
    labels = [label for label in chosen for _ in range(options.per_class)]
    tokens_NL = generate(tokenizer, model, labels, options)
    if options.progress:
        rows = progress_rows(tokenizer, tokens_NL, [classes[label] for label in labels], options)
    else:
        images = decode(tokenizer, tokens_NL, options).reshape(len(chosen), options.per_class, *[tokenizer.config.image_side] * 2, -1)
        rows = [(classes[label], row) for label, row in zip(chosen, images)]
    out = options.out or options.run / ("progress.png" if options.progress else "sample.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_image(out, grid(rows))
    print(f"wrote {out}")


if __name__ == "__main__":
    run_program(main)
