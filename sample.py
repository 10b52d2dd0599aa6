"""A run's folder, what is in it, and everything one does with it:  python sample.py

    python sample.py                                 a grid of images, a row per class
    python sample.py --classes star heart --per-class 12 --seed 7
    python sample.py --progress                      what the image looks like after each scale
    python sample.py --task inpaint --image data:3 data:5 --box 0.5 0 1 1 --seeds 0 1 2
    python sample.py --codes data:3                  an image's token maps, and what each adds
    python sample.py --evaluate 1000                 how good the images are, in figures
    python sample.py --npz 50000 samples.npz         for the field's evaluation programs
    python sample.py --tokenizer vae_ch160v4096z32.pth --var var_d16.pth --classes 207 980

train.py writes a run's folder, out/shapes for one; a published pair of checkpoints does as well.
Read `main`, then `Run`, then `complete`: in-painting, out-painting, editing and upscaling are one
mechanism. `Quality` says what the figures of an evaluation mean. Below them is what train.py uses,
too: pictures, files that are whole or not there, images from files, devices, and how a program
ends; then what train.py alone uses, and the flags.
"""
from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import sys
import zipfile
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm

from kernels import NoLauncher
from tokenizer import Classifier, Tokenizer, TokenizerConfig, average_over_processes, psnr
from var import VAR, Known, VARConfig

# Guidance and filters that trade variety for clean shapes. (The published demonstration has cfg 4,
# top_k 900, top_p 0.95; its FID is measured at cfg 1.5.)
FILTERS = {"cfg": 2.0, "top_k": 900, "top_p": 0.6}
NO_FILTERS = {"cfg": 0.0, "top_k": 0, "top_p": 1.0}   # the model's own distribution

# What can be asked for, in a word: a grid of samples, samples scale by scale, and so on.
GENERATED = ("sample", "progress")
HOLES = ("inpaint", "outpaint", "edit")
COMPLETED = (*HOLES, "upscale")
TASKS = (*COMPLETED, "reconstruct")
LOOKED_INTO = ("codes", "teaching", "attention")


class UserError(Exception):
    """A mistake of the user's, told in one sentence; the program ends with exit code 2."""


def main() -> None:
    options = parse()
    settle_device(options)
    run = load(options)
    plain = options.dtype == torch.float32 and not options.compile
    if options.device.type == "cpu" and plain:
        run.model.pack()
    if options.wish == "evaluate":   # a word for what is asked for: see wish_of
        say_evaluation(evaluate(run, options.evaluate, options.seeds), run)
    elif options.wish in ("npz", "reference"):
        save_sets(run)
    else:
        draw(run)


def draw(run: Run) -> None:
    """Write the picture that is asked for."""
    options = run.options
    if options.wish in GENERATED:
        picture = draw_samples(run)
    else:
        pictures = {
            "attention": draw_attention,
            "codes": draw_codes,
            "teaching": draw_teaching,
            "reconstruct": reconstruct,
        }
        picture = pictures.get(options.wish, complete)(run, load_images(run, options.image))
    path = options.out or path_of_var(options).parent / f"{options.wish}.png"
    save_picture(path, picture)
    print(f"wrote {path}")


# --------------------------------------------------------------------------------------------------
# A run, and drawing from it


@dataclass
class Run:
    """A tokenizer and a transformer that belong together, and how to use them."""
    tokenizer: Tokenizer
    model: VAR | None                   # None while the tokenizer trains
    classes: list[str]
    held_out: TensorDataset | None      # bytes [N, channels, side, side] and labels [N]
    options: Namespace                  # device, autocast, batch, cfg, top_k, top_p

    @torch.no_grad()
    def generate(
        self, labels: list[int], seed: int, known_of: Callable[[slice], Known] | None = None
    ) -> Tensor:
        """Tokens [N, L] of one image per label, on the CPU.

        known_of: what is known of some of the N images.
        """
        options = self.options
        generator = torch.Generator(options.device).manual_seed(seed)
        labels_N = torch.tensor(labels)
        tokens = []
        for rows in batches(len(labels), options.batch, "generate"):
            labels_B = labels_N[rows].to(options.device)
            # Guidance away from "any class" means nothing where no class is asked for.
            cfg = options.cfg if labels_B.min() < self.model.config.classes else 0.0
            known = None if known_of is None else known_of(rows)
            with options.autocast():
                tokens_BL = self.model.generate(
                    self.tokenizer, labels_B, cfg, options.top_k, options.top_p, generator,
                    known)
            tokens.append(tokens_BL.cpu())
        return torch.cat(tokens)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [N, C, S, S] and tokens [N, L], on the CPU."""
        latents = []
        tokens = []
        for some in images.split(at_a_time(images.shape[-1])):
            with self.options.autocast():
                f_BCSS = self.tokenizer.latent(some.to(self.options.device))
            latents.append(f_BCSS.cpu())
            tokens.append(self.tokenizer.quantizer.encode(f_BCSS).cpu())
        return torch.cat(latents), torch.cat(tokens)

    def decode(self, tokens_NL: Tensor) -> Tensor:
        """Images of tokens of all scales, or of the coarser ones, on the CPU."""
        return torch.cat([images.cpu() for images in self.rendered(tokens_NL)])

    def decode_to_bytes(self, tokens_NL: Tensor) -> np.ndarray:
        """The same as bytes [N, side, side, channels]. They are a quarter of what images are, and
        become so on the device."""
        return np.concatenate([to_bytes(images) for images in self.rendered(tokens_NL)])

    def rendered(self, tokens_NL: Tensor) -> Iterator[Tensor]:
        """Images on the device, some at a time.

        Where convolutions are chosen or compiled for a shape, every pass has the same: some images
        of no use make the last one full.
        """
        options = self.options
        size = min(len(tokens_NL), at_a_time(self.tokenizer.config.image_side))
        for tokens_BL in tokens_NL.split(size):
            B = len(tokens_BL)
            if options.device.type == "cuda" or options.compile:
                tokens_BL = F.pad(tokens_BL, (0, 0, 0, size - B))
            with options.autocast():
                images = self.tokenizer.decode(tokens_BL.to(options.device))
            yield images[:B]

    def after_each_scale(self, tokens_NL: Tensor) -> list[np.ndarray]:
        """What the first 1, 2, ... K scales decode to: bytes [N, side, side, channels] for each."""
        return [self.decode_to_bytes(tokens_NL[:, :span.stop]) for span in self.model.config.spans]

    @torch.no_grad()
    def log_likelihood(self, tokens_NL: Tensor, labels: list[int]) -> Tensor:
        """log p(tokens | class) [N], in nats, without guidance."""
        options = self.options
        labels_N = torch.tensor(labels)
        likelihoods = []
        for rows in batches(len(labels), options.batch, "likelihood"):
            tokens_BL = tokens_NL[rows].to(options.device)
            labels_B = labels_N[rows].to(options.device)
            with options.autocast():
                logits_BLV = self.model(labels_B, self.tokenizer.teacher_inputs(tokens_BL))
            logits_BVL = logits_BLV.float().transpose(1, 2)
            nats_BL = F.cross_entropy(logits_BVL, tokens_BL, reduction="none")
            likelihoods.append(-nats_BL.sum(dim=1).cpu())
        return torch.cat(likelihoods)

    def held_out_images(self) -> Tensor:
        if self.held_out is None:
            raise UserError("a published checkpoint comes without images; name files of your own")
        return self.held_out.tensors[0]


def load(options: Namespace) -> Run:
    """Raises UserError where the tokenizer and the transformer do not belong together."""
    tokenizer_path = options.tokenizer or options.run / "tokenizer.pt"
    var_path = path_of_var(options)
    held_out = None
    with blaming(var_path):
        if var_path.suffix == ".pth":
            model = VAR.from_official(read_tensors(var_path, "published checkpoint"))
            classes = [str(label) for label in range(model.config.classes)]
            tokenizer = load_tokenizer(tokenizer_path, model.config.scales)
        else:
            content = load_checkpoint(var_path, "transformer")
            model = VAR(VARConfig(**content["config"]))
            model.load_state_dict(content["model"])
            classes = content["classes"]
            tokenizer = load_tokenizer(tokenizer_path)
            if tokenizer.fingerprint() != content["identity"]["tokenizer"]:
                raise UserError(f"{var_path} was trained on the tokens of another tokenizer than "
                                f"{tokenizer_path}")
            held_out = load_held_out(var_path.parent)
    for name in ("scales", "vocabulary", "code_channels"):
        found = getattr(tokenizer.config, name)
        expected = getattr(model.config, name)
        if found != expected:
            raise UserError(f"{var_path} expects {name.replace('_', ' ')} {expected}, and "
                            f"{tokenizer_path} has {found}")
    prepare(tokenizer, model, options)
    return Run(tokenizer, model, classes, held_out, options)


def path_of_var(options: Namespace) -> Path:
    """The run's own transformer, or another one; its images and its classifier lie beside it."""
    return options.var or options.run / "var.pt"


def prepare(tokenizer: Tokenizer, model: VAR, options: Namespace) -> None:
    """Both on the device, for drawing and not for training."""
    tokenizer.to(options.device)
    model.to(options.device).eval()
    if options.device.type == "cuda":
        tokenizer.settle_decoder(options.dtype)
    if options.compile:
        check_compiler(options.device)
        tokenizer.decoder.compile(dynamic=False)
        model.compile_layers()


def class_indices(names: list[str], classes: list[str]) -> list[int]:
    for name in names:
        if name not in classes:
            known = ", ".join(classes) if len(classes) <= 20 else f"{classes[0]} to {classes[-1]}"
            raise UserError(f"there is no class {name}; there are {known}")
    return list(map(classes.index, names))


def asked_class(run: Run) -> int:
    """The one of --classes, or the null class."""
    if not run.options.classes:
        return run.model.config.classes
    (label,) = class_indices(run.options.classes, run.classes)
    return label


def draw_samples(run: Run) -> Image.Image:
    """A row per class; with --progress a row per image, after each scale; --gif makes it a film."""
    options = run.options
    names = options.classes or run.classes[:20]
    chosen = class_indices(names, run.classes)
    tokens_NL = run.generate(np.repeat(chosen, options.per_class).tolist(), options.seed)
    if options.progress or options.gif:
        frames_KN = run.after_each_scale(tokens_NL)
    else:
        frames_KN = [run.decode_to_bytes(tokens_NL)]
    if options.gif:
        save_film(options.gif, [grid_of_classes(names, images) for images in frames_KN])
    if options.progress:
        return grid(zip(np.repeat(names, options.per_class), zip(*frames_KN)))
    return grid_of_classes(names, frames_KN[-1])


# --------------------------------------------------------------------------------------------------
# Images of one's own


@dataclass
class Given:
    """Images named on the command line, in [-1, 1] on the CPU; a label is None if it is unknown."""
    images: Tensor
    names: list[str]
    labels: list[int | None]


def load_images(run: Run, sources: list[str]) -> Given:
    """Files, folders of them, and `data:17`, number 17 of the run's held-out images (from 0)."""
    found = [image for source in sources for image in images_at(run, source)]
    pixels, names, labels = zip(*found)
    return Given(to_float(torch.stack(pixels)), list(names), list(labels))


def images_at(run: Run, source: str) -> Iterator[tuple[Tensor, str, int | None]]:
    """Bytes, name and label of each."""
    if source.startswith("data:"):
        row = source.removeprefix("data:")
        last = len(run.held_out_images()) - 1
        if not row.isdecimal() or int(row) > last:
            raise UserError(f"{source}: the held-out images are data:0 to data:{last}")
        image, label = run.held_out[int(row)]
        yield image, f"{run.classes[label]} {int(row)}", int(label)
        return
    config = run.tokenizer.config
    for path in image_files(Path(source)):
        pixels = read_image(path, config.image_side, config.image_channels)
        yield torch.from_numpy(pixels), path.stem, None


def image_files(path: Path) -> list[Path]:
    """The file itself, or those of a folder."""
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_ENDINGS)
    if not found:
        raise UserError(f"{path} holds no images ({', '.join(IMAGE_ENDINGS)})")
    return found


def reconstruct(run: Run, given: Given) -> Image.Image:
    """Images above what is left of them after encoding and decoding."""
    results = run.decode(run.encode(given.images)[1])
    errors_N = (results - given.images).square().mean(dim=(1, 2, 3))
    for name, error in zip(given.names, errors_N.tolist()):
        print(f"{name}: PSNR {psnr(error):.2f} dB")
    return grid_of_pairs(given.images, results)


def complete(run: Run, given: Given) -> Image.Image:
    """In-painting and its kin (paper: Sec. 5.3): itself, what is known, and a result per seed."""
    options = run.options
    images = given.images
    if options.wish == "upscale":
        known_HW = torch.ones(images.shape[2:])
        filled, scales = from_small(run, images)
        shown = filled
    else:
        known_HW = known_pixels(run)
        filled = fill_holes(images, known_HW)
        scales = len(run.tokenizer.config.scales)
        shown = images * known_HW
    labels = [asked_class(run)] * len(images)
    latent_NCSS, tokens_NL = run.encode(filled)
    where_11SS = F.interpolate(known_HW[None, None], size=latent_NCSS.shape[2:], mode="area")
    where_11SS = where_11SS.to(options.device)

    def known_of(rows: slice) -> Known:
        own_tokens_BL = tokens_NL[rows].to(options.device) if options.open_loop else None
        return Known(latent_NCSS[rows].to(options.device), where_11SS, scales, own_tokens_BL)

    results = [run.decode(run.generate(labels, seed, known_of)) for seed in options.seeds]
    if options.paste:
        results = [torch.where(known_HW > 0, images, result) for result in results]
    if options.wish != "upscale":
        report(results, images, known_HW)
    columns = map(to_bytes, (images, shown, *results))
    return grid(zip(given.names, zip(*columns)))


def from_small(run: Run, images: Tensor) -> tuple[Tensor, int]:
    """What upscaling starts from: small images, enlarged; and how many scales they are."""
    config = run.tokenizer.config
    side = run.options.small or config.image_side // 2
    if side >= config.image_side:
        raise UserError(f"--small {side} must be less than the side of the images, "
                        f"{config.image_side}")
    small = F.interpolate(images, size=(side, side), mode="area")
    large = F.interpolate(small, size=images.shape[2:], mode="bicubic")
    scales = sum(s * config.downsampling <= side for s in config.scales)
    return large.clamp(-1, 1), max(1, scales)


def known_pixels(run: Run) -> Tensor:
    """1 where the image is known and 0 where it is generated: float [side, side]."""
    options = run.options
    side = run.tokenizer.config.image_side
    if options.mask:
        white_HW = read_image(options.mask, side, 1)[0] >= 128
        return torch.from_numpy(~white_HW).float()
    y0, x0, y1, x1 = (round(fraction * side) for fraction in options.box)
    if y0 >= y1 or x0 >= x1:
        raise UserError(f"--box {' '.join(map(str, options.box))} must be Y0 X0 Y1 X1 and hold at "
                        f"least a pixel of {side}")
    inside_HW = torch.zeros(side, side)
    inside_HW[y0:y1, x0:x1] = 1
    return inside_HW if options.wish == "outpaint" else 1 - inside_HW


def fill_holes(images: Tensor, known_HW: Tensor) -> Tensor:
    """What is not known, grown in from the border: the encoder must not see what was there."""
    known = known_HW[None, None]
    filled = images * known
    while 0 < known.sum() < known.numel():
        near = F.avg_pool2d(known, 3, 1, 1)
        grown = F.avg_pool2d(filled, 3, 1, 1) / near.clamp(min=1e-6)
        filled = torch.where(known > 0, filled, grown)
        known = (near > 0).float()
        filled = filled * known
    return filled


def report(results: list[Tensor], images: Tensor, known_HW: Tensor) -> None:
    """How far the known part drifted, and whether the border of the hole shows, on average."""
    results = torch.stack(results)   # [seeds, N, channels, side, side]
    drift = (results - images) * known_HW / 2
    error = drift.square().mean().item() / max(known_HW.mean().item(), 1e-6)
    own = seam(images, known_HW)
    seen = seam(results.flatten(0, 1), known_HW)
    print(f"known part: mean squared error {error:.5f} (pixels in [0, 1]); "
          f"border: mean step {seen:.4f}, {seen / own if own else math.nan:.2f} of the image's own")


def seam(images: Tensor, known_HW: Tensor) -> float:
    """Mean absolute difference between neighbours of which one is known and the other is not.

    0 if there are none.
    """
    steps = []
    for axis in (-1, -2):
        across_HW = known_HW.diff(dim=axis) != 0
        step = images.diff(dim=axis)[..., across_HW] / 2
        steps.append(step.abs().flatten())
    steps = torch.cat(steps)
    return steps.mean().item() if len(steps) else 0.0


# --------------------------------------------------------------------------------------------------
# Looking inside


def draw_codes(run: Run, given: Given) -> Image.Image:
    """The residual loop: what every scale finds left over, its codes, and the image so far.

    A code's colour is its place along the three directions in which the codebook varies most: like
    codes, like colours.
    """
    quantizer = run.tokenizer.quantizer
    f_NCSS, tokens_NL = run.encode(given.images)
    f_NCSS = f_NCSS.to(run.options.device)
    left = []
    f_hat_NCSS = quantizer.empty(len(f_NCSS))
    for k, tokens_Nl in enumerate(quantizer.split(tokens_NL.to(run.options.device))):
        left.append(heat(quantizer.read(f_NCSS - f_hat_NCSS, k).norm(dim=-1)))
        f_hat_NCSS = quantizer.accumulate(f_hat_NCSS, tokens_Nl, k)
    left_NL1 = torch.cat(left, dim=1)
    codes_NL3 = code_colours(run.tokenizer)[tokens_NL]
    frames_NK = zip(*run.after_each_scale(tokens_NL))
    rows = []
    for name, left_L1, codes_L3, frames_K in zip(given.names, left_NL1, codes_NL3, frames_NK):
        rows.append((f"{name}: left over", as_maps(left_L1, run)))
        rows.append(("its codes", as_maps(codes_L3, run)))
        rows.append(("image so far", frames_K))
    return grid(rows)


def draw_teaching(run: Run, given: Given) -> Image.Image:
    """Teacher forcing: what the transformer reads for each scale, above what it has to predict."""
    _, tokens_1L = run.encode(given.images[:1])
    inputs = run.tokenizer.teacher_inputs(tokens_1L.to(run.options.device))
    size_L = inputs[0].norm(dim=-1)
    size_L = F.pad(size_L, (1, 0), value=size_L.max())   # the first scale reads the class
    codes_L3 = code_colours(run.tokenizer)[tokens_1L[0]]
    return grid([("reads (first: the class)", as_maps(heat(size_L), run)),
                 ("has to predict", as_maps(codes_L3, run))])


def as_maps(x_L: Tensor, run: Run) -> list[Tensor]:
    """Something of every token, [L, ...], as a map [s, s, ...] for each scale."""
    config = run.model.config
    return [x_L[span].unflatten(0, (s, s)) for span, s in zip(config.spans, config.scales)]


def heat(x: Tensor) -> Tensor:
    """Sizes as shades of grey, black for none: bytes [..., 1]."""
    largest = x.amax().clamp(min=1e-6)
    return (255 * x / largest).byte().cpu()[..., None]


def code_colours(tokenizer: Tokenizer) -> Tensor:
    """A colour for every code, bytes [V, 3]."""
    codes_VC = tokenizer.quantizer.codebook_VC.detach().cpu()
    centred_VC = codes_VC - codes_VC.mean(dim=0)
    directions_C3 = torch.linalg.svd(centred_VC, full_matrices=False).Vh[:3].T
    place_V3 = centred_VC @ directions_C3
    place_V3 = (place_V3 / place_V3.std(dim=0) / 2).clamp(-1, 1)
    colours_V3 = ((place_V3 + 1) * 127.5).byte()
    return F.pad(colours_V3, (0, 3 - colours_V3.shape[1]))   # codes of one or two channels


def draw_attention(run: Run, given: Given) -> Image.Image:
    """What a cell of the last scale attends to: a row per layer, over heads, a column per scale.

    Maps are as bright as their largest weight; the share that each scale gets is printed.
    """
    config = run.model.config
    side = config.scales[-1]
    y, x = run.options.cell or (side // 2, side // 2)
    if max(y, x) >= side:
        raise UserError(f"--cell {y} {x} must lie within the last map, 0 to {side - 1}")
    label = given.labels[0]
    if run.options.classes or label is None:
        label = asked_class(run)
    labels_B = torch.tensor([label], device=run.options.device)
    _, tokens_1L = run.encode(given.images[:1])
    inputs = run.tokenizer.teacher_inputs(tokens_1L.to(run.options.device))
    query = config.spans[-1].start + y * side + x
    layers = run.model.attention_weights(labels_B, inputs, query)
    marked = outlined(given.images, y, x, run.tokenizer.config.downsampling)
    rows = []
    table = {"attention to": [f"{s}x{s}" for s in config.scales]}
    shown = np.linspace(0, config.depth - 1, min(8, config.depth))
    for layer in shown.round().astype(int):
        name = f"layer {layer + 1}"
        maps = as_maps(layers[layer], run)
        rows.append((name, [marked, *map(heat, maps)]))
        table[name] = [f"{weights_ss.sum():.0%}" for weights_ss in maps]
    say_table(table)
    return grid(rows)


def outlined(images: Tensor, y: int, x: int, size: int) -> np.ndarray:
    """The first image as bytes [side, side, 3], with a frame around the cell (y, x)."""
    image = Image.fromarray(in_colour(to_bytes(images[:1])[0]))
    left = x * size
    top = y * size
    corners = (left, top, left + size - 1, top + size - 1)
    ImageDraw.Draw(image).rectangle(corners, outline="red")
    return np.asarray(image)


# --------------------------------------------------------------------------------------------------
# How good are the images?
#
# No image is the right answer to "draw a star", so a figure of quality compares sets of images:
# here generated ones with held-out ones, of the same classes. What is compared is not pixels but
# what a small classifier, trained on the run's own images, makes of them: the class it takes an
# image for, and its features, the numbers from which it concludes the class.
#
# How far apart two sets seem depends on how many images they hold. So all comparisons are between
# equally many, and the held-out images are compared with themselves, one half with the other: no
# images are nearer to the real ones than other real ones are.


@dataclass
class Quality:
    """What is measured of a set of images.

    recognised   share that the classifier takes for the class they should be of
    per_class    the same of each class's images, by its name
    frechet      Fréchet distance, squared, of the features to those of held-out images: how far two
                 clouds of points lie apart, in place and in spread. Every feature has variance 1
                 over the training images, so 1 is a cloud that is shifted by one standard
                 deviation of one feature.
    precision    share of the images whose features lie among those of held-out images: fidelity
    recall       share of held-out images whose features lie among those of the images: variety.
                 Guidance and filters buy precision with recall.
    detail       power of high spatial frequencies, as a share of the held-out images': 1 is as
                 much fine detail as they have, less is blur
    """
    recognised: float
    per_class: dict[str, float]
    frechet: float
    precision: float
    recall: float
    detail: float


@dataclass
class Evaluation:
    accuracy: float               # share of all held-out images that the classifier recognises
    originals: Quality            # of one half of the held-out images against the other: a ceiling
    reconstructions: Quality      # of the held-out images, against themselves
    psnr: float                   # of the reconstructions, in dB
    nats_per_image: float         # -log p(tokens | class) of the held-out images: exact, and
    nats_per_token: float         # without guidance
    generated: list[Quality]      # for each seed, with the guidance and the filters of the run
    unfiltered: list[Quality]     # for each seed, without any


def evaluate(run: Run, count: int, seeds: Sequence[int]) -> Evaluation:
    """Judge `count` held-out images, their reconstructions and, for each seed, generated images:
    one for each held-out image, of its class, with the guidance and the filters of run.options.

    count: even. Raises UserError where there are fewer held-out images, and for images with NaN.
    """
    originals, labels = evaluated_images(run, count)
    judge = Judge(kept_classifier(run), originals, run.classes)
    all_images, all_labels_N = run.held_out.tensors
    _, taken_for_N = features_and_classes(judge.classifier, all_images)
    # The judge holds even rows against even ones. So, with neighbours swapped, it holds odd
    # originals against even ones: one half against the other.
    other_half = torch.arange(count) ^ 1
    _, tokens_NL = run.encode(originals)
    reconstructions = run.decode(tokens_NL)
    nats = -run.log_likelihood(tokens_NL, labels.tolist()).mean().item()

    def generated(run: Run) -> list[Quality]:
        qualities = []
        for seed in seeds:
            images = run.decode(run.generate(labels.tolist(), seed))
            qualities.append(judge(images, labels))
        return qualities

    without = Namespace(**{**vars(run.options), **NO_FILTERS})
    return Evaluation(
        accuracy=(taken_for_N == all_labels_N).double().mean().item(),
        originals=judge(originals[other_half], labels[other_half]),
        reconstructions=judge(reconstructions, labels),
        psnr=psnr(F.mse_loss(reconstructions, originals).item()),
        nats_per_image=nats,
        nats_per_token=nats / tokens_NL.shape[1],
        generated=generated(run),
        unfiltered=generated(replace(run, options=without)),
    )


def evaluated_images(run: Run, count: int) -> tuple[Tensor, Tensor]:
    """`count` held-out images, drawn at random and in the order of their labels, and these.

    So the even and the odd rows are two halves that hold the same classes.
    """
    total = len(run.held_out_images())
    if count > total:
        raise UserError(f"--evaluate {count}: there are {total} held-out images")
    order_N = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    images, labels_N = run.held_out[order_N[:count]]
    labels_N, by_label_N = labels_N.sort(stable=True)
    return to_float(images[by_label_N]), labels_N


class Judge:
    """Measures the quality of images against held-out ones, `originals`.

    Even rows are compared with even rows and odd ones with odd ones; the figure is the mean.
    """

    def __init__(self, classifier: Classifier, originals: Tensor, classes: list[str]):
        self.classifier = classifier
        self.classes = classes
        self.features_ND = features_and_classes(classifier, originals)[0]
        self.power = fine_power(originals)

    def __call__(self, images: Tensor, labels: Tensor) -> Quality:
        """images: in the originals' order, [N, channels, side, side]; labels: [N]."""
        if not images.isfinite().all():
            raise UserError("the images to judge hold numbers that are not finite: the model that "
                            "made them is broken")
        features_ND, taken_for_N = features_and_classes(self.classifier, images)
        hit_N = (taken_for_N == labels).double()
        per_class = {}
        for label in labels.unique().tolist():
            per_class[self.classes[label]] = hit_N[labels == label].mean().item()
        measured = []
        for first in (0, 1):
            made_ND = features_ND[first::2]
            real_ND = self.features_ND[first::2]
            frechet = frechet_distance(made_ND, real_ND)
            measured.append((frechet, *precision_recall(made_ND, real_ND)))
        frechet, precision, recall = np.mean(measured, axis=0).tolist()
        return Quality(
            recognised=hit_N.mean().item(),
            per_class=per_class,
            frechet=frechet,
            precision=precision,
            recall=recall,
            detail=fine_power(images) / self.power if self.power > 1e-12 else math.nan,
        )


def frechet_distance(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Squared Fréchet distance of two sets of vectors, each taken for a Gaussian (1706.08500).

        |mean_a - mean_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2))        S: the covariances

    It is the least mean squared distance at which one cloud can be moved onto the other. S_a S_b is
    not symmetric, but has the eigenvalues of R S_b R, which is, with R^2 = S_a; and the trace of a
    root is the sum of the roots of the eigenvalues.
    """
    between_D = a_ND.mean(axis=0) - b_MD.mean(axis=0)
    a_DD = np.cov(a_ND, rowvar=False)
    b_DD = np.cov(b_MD, rowvar=False)
    values_D, vectors_DD = np.linalg.eigh(a_DD)
    root_DD = vectors_DD * np.sqrt(values_D.clip(0)) @ vectors_DD.T   # rounding may leave -1e-17
    shared_D = np.linalg.eigvalsh(root_DD @ b_DD @ root_DD).clip(0)
    spread = np.trace(a_DD) + np.trace(b_DD) - 2 * np.sqrt(shared_D).sum()
    return float(between_D @ between_D + spread)


NEIGHBOURS = 3   # as in the paper


def precision_recall(made_ND: np.ndarray, real_MD: np.ndarray) -> tuple[float, float]:
    """Of the vectors made, the share among the real ones, and the reverse (1904.06991, Eq. 1)."""
    return share_among(made_ND, real_MD), share_among(real_MD, made_ND)


def share_among(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """A vector is among those of a set if it is as near to any of them as that one's third
    neighbour in the set is."""
    reach_M = np.sort(distances(b_MD, b_MD), axis=1)[:, NEIGHBOURS]   # 0 is the vector itself
    return float((distances(a_ND, b_MD) <= reach_M).any(axis=1).mean())


def distances(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    """Squared, [N, M]. A vector at a time: exactly 0 from a vector to itself."""
    return np.stack([np.square(b_MD - a_D).sum(axis=1) for a_D in a_ND])


def fine_power(images: Tensor) -> float:
    """Mean power of spatial frequencies above a quarter of a cycle per pixel, half of the highest.

    The images fade to grey at the border. Else the Fourier transform, for which the left border
    is next to the right one, would find an edge there.
    """
    side = images.shape[-1]
    cycles = torch.fft.fftfreq(side)
    fine_HW = torch.hypot(cycles[:, None], cycles) > 0.25
    fade = torch.hann_window(side, periodic=False)
    fade_HW = fade[:, None] * fade
    total = 0.0
    for some in images.split(at_a_time(side)):
        centred = some - some.mean(dim=(2, 3), keepdim=True)
        spectrum = torch.fft.fft2(centred * fade_HW)
        power = spectrum.abs().square()[..., fine_HW]
        total += power.sum(dtype=torch.float64).item()
    return total / images.numel()


def say_evaluation(found: Evaluation, run: Run) -> None:
    """Print it as two tables, of means and, where there are several seeds, of their spread."""
    options = run.options
    asked = f"cfg {options.cfg:g}, top-k {options.top_k}, top-p {options.top_p:g}"
    sets = {
        "held-out, half against half": [found.originals],
        "reconstructions": [found.reconstructions],
        f"generated, {asked}": found.generated,
        "generated, no guidance, no filters": found.unfiltered,
    }
    print(f"{options.evaluate} images of each kind; the classifier recognises {found.accuracy:.1%} "
          f"of all held-out images")
    table = {"": ("recognised", "Fréchet", "precision", "recall", "fine detail")}
    for name, qualities in sets.items():
        table[name] = (
            in_words([100 * x.recognised for x in qualities], 1, " %"),
            in_words([x.frechet for x in qualities], 2),
            in_words([100 * x.precision for x in qualities], 1, " %"),
            in_words([100 * x.recall for x in qualities], 1, " %"),
            in_words([x.detail for x in qualities], 2),
        )
    say_table(table)
    print(f"PSNR of the reconstructions {found.psnr:.2f} dB; held-out images take "
          f"{found.nats_per_image:.2f} nats each, {found.nats_per_token:.3f} per token")
    say_classes(list(sets.values()))
    if len(options.seeds) > 1:
        print(f"± is the standard deviation over the seeds {' '.join(map(str, options.seeds))}")
    print("This Fréchet distance is not FID: its features are those of the run's own classifier,\n"
          "so it compares images of this run's data alone. For FID, which the field's programs\n"
          "measure, this writes the files:\n"
          "    python sample.py --npz 50000 samples.npz --reference reference.npz")


def say_classes(sets: list[list[Quality]]) -> None:
    """The share recognised of each class: of those twenty that are recognised least, when they are
    generated."""
    shares = {}
    for name in sets[0][0].per_class:
        shares[name] = [np.mean([x.per_class[name] for x in qualities]) for qualities in sets]
    table = {"recognised": ("held-out", "reconstructed", "generated", "unfiltered")}
    for name in sorted(shares, key=lambda name: shares[name][2])[:20]:
        table[f"  {name}"] = [f"{share:.1%}" for share in shares[name]]
    say_table(table)


def say_table(rows: dict[str, Sequence[str]]) -> None:
    """Print rows of a name and its columns, the heads first."""
    first = max(map(len, rows))
    width = 3 + max(len(text) for columns in rows.values() for text in columns)
    for name, columns in rows.items():
        print(f"{name:{first}}" + "".join(f"{text:>{width}}" for text in columns))


def in_words(values: list[float], digits: int, unit: str = "") -> str:
    """Their mean and, if they are several, their standard deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean + unit
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}{unit}"


# The classifier

CLASSIFIER_IMAGES = 20_000    # train.py keeps at most so many, averaged down, for its training
CLASSIFIER_STEPS = 800
CLASSIFIER_BATCH = 64


@torch.no_grad()
def features_and_classes(classifier: Classifier, images: Tensor) -> tuple[np.ndarray, Tensor]:
    """Features, float64 [N, D], and the classes [N] that images are taken for.

    images: on the CPU, bytes or in [-1, 1].
    """
    features = []
    taken_for = []
    for some in images.split(at_a_time(images.shape[-1])):
        some = some.to(classifier.head.weight.device)
        features_BD = classifier.features(some if some.is_floating_point() else to_float(some))
        features.append(features_BD.double().cpu())
        taken_for.append(classifier.head(features_BD).argmax(dim=1).cpu())
    return torch.cat(features).numpy(), torch.cat(taken_for)


def train_classifier(
    images: Tensor, labels: Tensor, shape: dict[str, int], seed: int, device: torch.device
) -> Classifier:
    """A trained one. images: bytes [N, channels, side, side]; shape: what `Classifier` takes."""
    torch.manual_seed(seed)
    classifier = Classifier(**shape).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, CLASSIFIER_STEPS)
    for _ in tqdm(range(CLASSIFIER_STEPS), desc="classifier", unit="step"):
        rows = torch.randint(len(images), (CLASSIFIER_BATCH,))
        logits = classifier(to_float(images[rows].to(device)))
        loss = F.cross_entropy(logits, labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


def kept_classifier(run: Run) -> Classifier:
    """The classifier in a run's folder; at first, and when the run has other images than it was
    trained on, one is trained on the images that train.py kept.

    Raises UserError where there are none, and for a single class, of which nothing can be learned.
    """
    classes = len(run.classes)
    if classes == 1:
        raise UserError("--evaluate judges by a classifier, to which one class gives nothing to "
                        "learn")
    folder = path_of_var(run.options).parent
    device = run.options.device
    images_path = folder / "train_images.pt"
    with blaming(images_path):
        content = load_checkpoint(images_path, "set of training images")
        images = content["images"]
        labels = content["labels"]
        data_set = content["data_set"]
        shape = {"channels": images.shape[1], "side": content["side"], "classes": classes}
    path = folder / "classifier.pt"
    if path.exists():
        with blaming(path):
            kept = load_checkpoint(path, "classifier")
            if kept["data_set"] == data_set:
                classifier = Classifier(**kept["shape"])
                classifier.load_state_dict(kept["model"])
                return classifier.eval().requires_grad_(False).to(device)
        print(f"{path} was trained on other images: another is trained")
    classifier = train_classifier(images, labels, shape, 0, device)
    try:
        save_checkpoint(path, "classifier", shape=shape, model=classifier.state_dict(),
                        data_set=data_set)
    except UserError as error:   # it serves all the same
        print(f"the classifier is not kept: {error}")
    return classifier


# --------------------------------------------------------------------------------------------------
# For evaluation by others


def draw_many(run: Run, count: int) -> np.ndarray:
    """Bytes [count, side, side, channels], balanced over the classes.

    With --rejection f, count / f are drawn, and of each class those kept that are most likely under
    the transformer without guidance. (The paper's best figures reject by a classifier instead.)
    """
    fraction = run.options.rejection
    classes = len(run.classes)
    wanted = [len(range(label, count, classes)) for label in range(classes)]
    drawn = [math.ceil(n / fraction) for n in wanted]
    labels = np.repeat(range(classes), drawn).tolist()
    tokens_NL = run.generate(labels, run.options.seed)
    if fraction < 1:
        likelihood_N = run.log_likelihood(tokens_NL, labels)
        best = []
        by_class = zip(tokens_NL.split(drawn), likelihood_N.split(drawn), wanted)
        for tokens_nL, likelihood_n, count_of_class in by_class:
            best.append(tokens_nL[likelihood_n.topk(count_of_class).indices])
        tokens_NL = torch.cat(best)
    return run.decode_to_bytes(tokens_NL)


def save_sets(run: Run) -> None:
    """Held-out images, samples, or both."""
    options = run.options
    if options.reference:
        save_npz(options.reference, run.held_out_images().permute(0, 2, 3, 1).numpy())
    if options.npz:
        count, path = options.npz
        save_npz(Path(path), draw_many(run, int(count)))


def save_npz(path: Path, images: np.ndarray) -> None:
    """`arr_0`, uint8 [N, side, side, 3], as ADM's evaluation reads it (arXiv 2105.05233)."""
    save_whole(path, lambda file: np.savez(file, arr_0=in_colour(images)))
    print(f"wrote {len(images)} images to {path}")


# --------------------------------------------------------------------------------------------------
# Pictures


def save_picture(path: Path, picture) -> None:
    """A Pillow image or a matplotlib figure, as PNG."""
    if isinstance(picture, Image.Image):
        save_whole(path, lambda file: picture.save(file, "PNG"))
    else:
        save_whole(path, lambda file: picture.savefig(file, format="png", dpi=90))


def save_film(path: Path, frames: list[Image.Image]) -> None:
    first, *rest = frames
    times = [400] * len(rest) + [2000]   # milliseconds
    save_whole(path, lambda file: first.save(
        file, "GIF", save_all=True, append_images=rest, duration=times, loop=0))
    print(f"wrote {path}")


def grid(rows: Iterable[tuple[str, Sequence[np.ndarray | Tensor]]]) -> Image.Image:
    """A labelled row of images (bytes [side, side, 1 or 3]) per entry; small ones enlarged."""
    import matplotlib   # which brings a font with Greek, Cyrillic, Hebrew and Arabic letters
    font_file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    font = ImageFont.truetype(font_file, 11)
    rows = [(in_short(label, 24), images) for label, images in rows]
    margin = 8 + math.ceil(max(font.getlength(label) for label, _ in rows))
    cell = max(64, *(len(pixels) for _, images in rows for pixels in images))
    step = cell + 2   # and a gap
    columns = max(len(images) for _, images in rows)
    canvas = Image.new("RGB", (margin + columns * step, len(rows) * step), "white")
    draw = ImageDraw.Draw(canvas)
    for r, (label, images) in enumerate(rows):
        draw.text((4, r * step + cell // 2), label, fill="black", font=font, anchor="lm")
        for c, pixels in enumerate(images):
            image = Image.fromarray(in_colour(np.asarray(pixels)))
            image = image.resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(image, (margin + c * step, r * step))
    return canvas


def in_colour(images: np.ndarray) -> np.ndarray:
    """Bytes [..., side, side, 1 or 3] as [..., side, side, 3]."""
    return np.broadcast_to(images, (*images.shape[:-1], 3))


def grid_of_classes(names: list[str], images: np.ndarray) -> Image.Image:
    """A row per class of images that are sorted by class, as many of each."""
    return grid(zip(names, np.split(images, len(names))))


def grid_of_pairs(originals: Tensor, results: Tensor) -> Image.Image:
    """Originals above what became of them, twelve in a row."""
    rows = []
    for some, same in zip(originals.split(12), results.split(12)):
        rows.append(("original", to_bytes(some)))
        rows.append(("reconstruction", to_bytes(same)))
    return grid(rows)


# --------------------------------------------------------------------------------------------------
# Files: written whole or not at all, and read as they were written or not at all


def save_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file beside its place, then rename.

    At any instant, and when the disk is full, the old one or the new one is there.
    """
    path = path.resolve()   # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())   # on the disk before it takes the name: a power cut may follow
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def save_checkpoint(path: Path, kind: str, **content) -> None:
    """Raises UserError where it cannot be written."""
    try:
        save_whole(path, lambda file: torch.save({"kind": kind, **content}, file))
    except (OSError, RuntimeError) as error:   # torch.save may end with the second after the first
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise UserError(f"{path} cannot be written, and is what it was before: {in_short(reason)}")


@contextlib.contextmanager
def blaming(path: Path) -> Iterator[None]:
    """What goes wrong inside is the file's fault: torch, zip, pickle and our own configs each raise
    their own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        raise UserError(f"{path} cannot be read, it is damaged or something else: "
                        f"{in_short(error)}")


def read_tensors(path: Path, what: str) -> Any:
    """Exactly what torch.save wrote, on the CPU; nothing in the file is run.

    PyTorch's reader compares no checksums, and where one bit says that an entry is a folder it
    returns memory that was never written. So Python's reader, which compares them, takes everything
    out, and PyTorch's gets a new archive of it. Raises UserError for anything else.
    """
    if not path.is_file():
        raise UserError(f"there is no {what} at {path}")
    verified = io.BytesIO()
    with blaming(path):
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(verified, "w") as copy:
            names = archive.namelist()
            if len(set(names)) < len(names):
                raise ValueError("an entry is there twice")
            for name in names:
                copy.writestr(name, archive.read(name))
        verified.seek(0)
        return torch.load(verified, map_location="cpu", weights_only=True)


def load_checkpoint(path: Path, kind: str) -> dict:
    """A checkpoint of ours, on the CPU. Raises UserError where it is none, or of another kind."""
    content = read_tensors(path, f"{kind} checkpoint")
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind:
        raise UserError(f"{path} is a checkpoint of a {found or 'something else'}, not of a {kind}")
    return content


def load_tokenizer(path: Path, scales: tuple[int, ...] | None = None) -> Tokenizer:
    """A tokenizer of ours, or a published one (a .pth), whose scales the caller may name."""
    with blaming(path):
        if path.suffix == ".pth":
            return Tokenizer.from_official(read_tensors(path, "published checkpoint"), scales)
        content = load_checkpoint(path, "tokenizer")
        tokenizer = Tokenizer(TokenizerConfig(**content["config"]))
        tokenizer.load_state_dict(content["model"])
        return tokenizer.eval()


def load_held_out(folder: Path) -> TensorDataset:
    """The images that train.py kept in a run's folder."""
    path = folder / "held_out.pt"
    with blaming(path):
        content = load_checkpoint(path, "set of held-out images")
        return TensorDataset(content["images"], content["labels"])


# --------------------------------------------------------------------------------------------------
# Images: bytes [channels, side, side] in files and data sets, [-1, 1] in models

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def read_image(path: Path, side: int, channels: int) -> np.ndarray:
    """A file, centre-cropped and resized: uint8 [channels, side, side]. Raises UserError."""
    try:
        with Image.open(path) as image:
            image.verify()   # compares a PNG's checksums; afterwards it must be opened anew
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):   # 16 bits of grey, which Pillow would clip at 255
                high = np.asarray(image) // 256
                image = Image.fromarray(high.clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:   # what lies under it was never meant to be seen
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB" if channels == 3 else "L")
            pixels = np.array(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))
    except Exception as error:   # damaged files make Pillow raise nearly anything
        raise UserError(f"{path} cannot be read as an image: {in_short(error)}")
    return np.atleast_3d(pixels).transpose(2, 0, 1)


def to_float(images: Tensor) -> Tensor:
    """Bytes to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> np.ndarray:
    """[-1, 1] to bytes [N, side, side, channels], on the CPU."""
    pixels = (images.float() + 1) * 127.5
    pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def at_a_time(side: int) -> int:
    """How many images a pass without gradients takes: 512 of 32 x 32 pixels, 8 of 256 x 256."""
    return max(1, 2**19 // side**2)


def batches(count: int, size: int, what: str | None = None) -> Iterator[slice]:
    """Rows 0 .. count-1, `size` at a time; behind a progress bar if what is done has a name."""
    some = [slice(begin, begin + size) for begin in range(0, count, size)]
    yield from tqdm(some, desc=what, unit="batch", disable=what is None or len(some) == 1)


# --------------------------------------------------------------------------------------------------
# Devices


def settle_device(options: Namespace) -> None:
    """The device, its precision, and what to run a model under: `with options.autocast():`.

    Raises UserError for a device that is not there.
    """
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device} cannot be used: {in_short(error)}")
    fast = fast_bf16(device)
    if options.precision == "auto":   # small models are no faster in bf16 on a CPU
        options.precision = "bf16" if fast and device.type != "cpu" else "fp32"
    elif options.precision == "bf16" and not fast:
        print("note: this device has no instructions for bf16 and emulates them; --precision fp32 "
              "is faster here")
    if device.type == "cpu" and torch.get_num_threads() == 1 < (os.cpu_count() or 1):
        print(f"note: one thread of {os.cpu_count()} is used; OMP_NUM_THREADS says how many")
    half = options.precision == "bf16"
    if not half:   # nor TF32, in which cuDNN convolves fp32 unless told otherwise
        torch.backends.cudnn.allow_tf32 = False
    options.device = device
    options.dtype = torch.bfloat16 if half else torch.float32
    options.autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=half)


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 has its own instructions; emulated, it is many times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capable = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capable.get("avx512_bf16") or capable.get("amx_bf16"))


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile does not work, as without a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:   # each back end has its own
        raise UserError(f"--compile does not work here: {in_short(error)}")


# --------------------------------------------------------------------------------------------------
# How a program ends


def run_program(main: Callable[[], None]) -> None:
    """Run a program of ours: the user's mistakes end it with one sentence and exit code 2, Ctrl-C
    and SIGTERM with 130."""
    with contextlib.suppress(ValueError):   # only the main thread may
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")   # a terminal may not know the letters of a class
    try:
        main()
    except (UserError, NoLauncher, OSError) as error:   # a folder where a file should be, say
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        print(f"error: not enough memory. {in_short(error)}", file=sys.stderr)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt) as stopped:
        print(str(stopped) or "stopped")
        sys.exit(130)


def lacks_memory(error: Exception) -> bool:
    """Python, NumPy, PyTorch on a CPU and on a GPU each have their own words for it."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def in_short(text: Any, most: int = 200) -> str:
    """The beginning of what an error, say, says: one line of at most so many letters."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[:most - 1] + "…"


# --------------------------------------------------------------------------------------------------
# What only a training uses: its log, its curves, its processes, and how it is stopped


class Log:
    """log.jsonl: one JSON object per line. Of several processes, the first one writes it."""

    def __init__(self, path: Path, stage: str, done: int):
        """Lines that an earlier try left are dropped: of this stage for steps after `done`, and on
        its health, which is written at the end."""
        self.path = path
        self.stage = stage
        if rank_and_ranks()[0] > 0:
            return
        text = ""
        for line in read_log(path):
            before = line["step"] <= done and line["split"] != "health"
            if line["stage"] != stage or before:
                text += json.dumps(line) + "\n"
        save_whole(path, lambda file: file.write(text.encode()))

    def write(self, step: int, split: str, **values) -> None:
        if rank_and_ranks()[0] > 0:
            return
        line = {"stage": self.stage, "step": step, "split": split, **values}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict]:
    """The lines of a log; one that a killed run did not finish is left out."""
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        known = {"stage", "step", "split"}
        if not all(isinstance(line, dict) and known <= line.keys() for line in lines):
            raise ValueError("a line is no record of ours")
        return lines
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); move it away to go on without it")


def draw_curves(log: list[dict], scales: tuple[int, ...]):
    """Both losses, and the transformer's loss and accuracy per scale, against the step; and how the
    discriminator does, if there is one."""
    from matplotlib.figure import Figure   # importing it takes as long as many a command
    panels = [   # title, scale of the axis, stage, and which curves: of a split, by its name
        ("tokenizer: training losses", "log", "tokenizer",
         ["train mse", "train codebook", "train perceptual"]),
        ("transformer: held-out loss per scale", "linear", "var", ["held_out loss_per_scale"]),
        ("transformer: loss (nats per token)", "linear", "var", ["train loss", "held_out loss"]),
        ("transformer: held-out accuracy per scale", "linear", "var",
         ["held_out accuracy_per_scale"]),
        ("discriminator: loss, share of patches right", "linear", "tokenizer",
         ["train discriminator", "train discriminator_right"]),
        ("weight of the adversarial loss", "log", "tokenizer", ["train balance"]),
    ]
    if not any("balance" in line for line in log):
        panels = panels[:4]
    columns = len(panels) // 2
    figure = Figure(figsize=(5.5 * columns, 7), layout="constrained")
    axes = figure.subplots(2, columns)
    for axis, (title, yscale, stage, curves) in zip(axes.T.flat, panels):
        axis.set(title=title, yscale=yscale, xlabel="step")
        for curve in curves:
            split, name = curve.split()
            lines = [line for line in log
                     if line["stage"] == stage and line["split"] == split and name in line]
            label = split.replace("_", "-") if name == "loss" else name
            if name.endswith("per_scale"):
                label = [f"{s}x{s}" for s in scales]
            if lines:
                axis.plot([line["step"] for line in lines], [line[name] for line in lines],
                          label=label, marker="." if split == "held_out" else None)
        if axis.lines:
            axis.legend(fontsize="small", ncols=2)
    return figure


# torchrun starts a process for each GPU, and all of them run train.py.


def join_processes(device: torch.device) -> None:
    """Meet the other processes that torchrun started."""
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # NCCL between GPUs, gloo between CPUs. The others wait while process 0 decodes a data set.
        dist.init_process_group(timeout=timedelta(hours=2))


def rank_and_ranks() -> tuple[int, int]:
    """This process's number, and how many there are; 0 and 1 without torchrun."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def say(text: str) -> None:
    """Print once, not in every process."""
    if rank_and_ranks()[0] == 0:
        tqdm.write(text)


def own_part(rows: list[int]) -> list[int]:
    """This process's share of the rows, in order; the shares of all processes are the rows."""
    rank, ranks = rank_and_ranks()
    return rows[len(rows) * rank // ranks:len(rows) * (rank + 1) // ranks]


def mean_over_processes(*numbers: float | Tensor, device: torch.device) -> Tensor:
    """Their means, on the device, which nothing here waits for."""
    values = torch.zeros(len(numbers), device=device)
    for value, number in zip(values, numbers):
        value += number
    return average_over_processes(values)


class Stopped(Exception):
    """The user asked for it; everything is saved."""


class Interrupt:
    """Ctrl-C and SIGTERM end the step at hand, not half of it; a second Ctrl-C ends at once.

    (A second SIGTERM does not: a process manager and torchrun may each send one.)
    """

    def __enter__(self) -> Interrupt:
        self.asked = False
        both = (signal.SIGINT, signal.SIGTERM)
        self.before = {s: signal.signal(s, self.ask) for s in both}
        return self

    def ask(self, *_) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def __exit__(self, *_) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


# --------------------------------------------------------------------------------------------------
# The command line


class Parser(ArgumentParser):
    """Tells mistakes as everything else here does."""

    def error(self, message: str):
        raise UserError(message)

    def add_computer(self) -> None:
        """The flags that say what to compute on."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.add_argument("--device", default=device,
                          help="cpu, cuda, cuda:1, mps, ... (default: %(default)s)")
        self.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                          help="if not given, bf16 on a GPU that is built for it")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """The type of a flag: an int or a float from `low` to `high`."""
    def checked(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            limits = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            whole = "a whole number, " if kind is int else ""
            raise ArgumentTypeError(f"{text} must be {whole}{limits}")
        return value
    return checked


COUNT = number(int, 1)
SEED = number(int, 0, 2**31 - 1)
SHARE = number(float, 1e-6, 1)   # over 0, at most 1
MOST_SAMPLES = 1_000_000


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = Parser(description="Draw images with a trained VAR.")
    add_general(parser.add_argument)
    parser.add_computer()
    wishes = parser.add_argument_group("one of these, or a grid of images is drawn")
    add_wishes(wishes.add_mutually_exclusive_group().add_argument)
    details = parser.add_argument_group("how they are done")
    add_details(details.add_argument)
    add_hole(details.add_mutually_exclusive_group().add_argument)
    parser.set_defaults(**FILTERS)
    options = parser.parse_args(arguments)
    options.wish = wish_of(options)
    check(options, parser)
    if options.wish in LOOKED_INTO:
        options.image = getattr(options, options.wish)
    return options


def wish_of(options: Namespace) -> str:
    """What is to be done, in a word."""
    wishes = (*LOOKED_INTO, "evaluate", "npz", "reference", "progress")
    return options.task or next((wish for wish in wishes if getattr(options, wish)), "sample")


def add_general(add: Callable) -> None:
    add("--run", type=Path, default=Path("out/shapes"), metavar="FOLDER",
        help="what train.py wrote (default: %(default)s)")
    add("--tokenizer", type=Path, metavar="FILE",
        help="another tokenizer than the run's: a .pt of train.py or a published .pth")
    add("--var", type=Path, metavar="FILE",
        help="another transformer than the run's: a .pt of train.py or a published .pth")
    add("--out", type=Path, metavar="FILE",
        help="the PNG to write; if not given, it is named for what it shows, and lies beside the "
             "transformer")
    add("--classes", nargs="+", metavar="NAME",
        help="names of classes, numbers for a published model; if not given, all, but at most 20")
    add("--per-class", type=COUNT, default=8, metavar="N",
        help="images per class (default: %(default)s)")
    add("--cfg", type=number(float, 0, 100),
        help="strength of classifier-free guidance at the last scale; 0 is none "
             "(default: %(default)s)")
    add("--top-k", type=number(int, 0),
        help="draw from the k most likely tokens; 0 is no limit (default: %(default)s)")
    add("--top-p", type=SHARE,
        help="draw from the most likely tokens that hold this much probability "
             "(default: %(default)s)")
    add("--seed", type=SEED, default=0,
        help="the same seed and --batch give the same picture (default: %(default)s)")
    add("--batch", type=COUNT, default=100,
        help="images generated at a time (default: %(default)s)")
    add("--gif", type=Path, metavar="FILE",
        help="also the images forming, scale by scale, as a film")
    add("--compile", action="store_true",
        help="torch.compile the transformer's layers and the decoder: for many images")


def add_wishes(add: Callable) -> None:
    add("--progress", action="store_true",
        help="draw a row per image: the image after each scale, coarse to fine")
    add("--task", choices=TASKS,
        help="inpaint: a box is generated, the rest known; outpaint: the other way round; edit: "
             "inpaint towards --classes NAME; upscale: fine scales are generated, coarse ones "
             "known; reconstruct: encode and decode")
    add("--codes", nargs="+", metavar="IMAGE",
        help="draw what each scale finds left over, its codes, and the image so far")
    add("--teaching", nargs=1, metavar="IMAGE",
        help="draw what the transformer reads in training, above what it has to predict")
    add("--attention", nargs=1, metavar="IMAGE",
        help="draw what a cell of the last scale attends to, in every layer")
    add("--evaluate", type=number(int, 8), metavar="N",
        help="print how good N images are, an even number: generated ones for each of --seeds, "
             "reconstructions, and held-out ones")
    add("--npz", nargs=2, metavar=("N", "FILE"),
        help="write N samples, balanced over the classes, as ADM's evaluation reads them")


def add_details(add: Callable) -> None:
    add("--image", nargs="+", metavar="IMAGE",
        help="task: files, folders, or data:17 for a held-out image of the run's data")
    add("--seeds", nargs="+", type=SEED, default=(0, 1, 2), metavar="SEED",
        help="one result for each; with --evaluate, one set of generated images for each")
    add("--small", type=COUNT, metavar="SIDE",
        help="upscale: side to which images are averaged down at first; if not given, half of the "
             "run's")
    add("--paste", action="store_true", help="put the known pixels over the result at the end")
    add("--open-loop", action="store_true",
        help="put the image's own tokens, as published, for comparison")
    add("--cell", nargs=2, type=number(int, 0), metavar=("Y", "X"),
        help="attention: which cell, if not the middle")
    add("--reference", type=Path, metavar="FILE",
        help="write the held-out images as --npz does samples, with it or alone")
    add("--rejection", type=SHARE, default=1.0, metavar="FRACTION",
        help="npz: keep this share of what is drawn, the most likely")


def add_hole(add: Callable) -> None:
    add("--box", nargs=4, type=number(float, 0, 1), default=(0.25, 0.25, 0.75, 0.75),
        metavar=("Y0", "X0", "Y1", "X1"), help="the box, in fractions of the side")
    add("--mask", type=Path, metavar="FILE",
        help="an image instead of a box: what is white in it is generated, in outpaint, too")


SAMPLED = (*GENERATED, *COMPLETED, "evaluate", "npz")
MEANT_FOR = {   # flags that would do nothing with any other wish
    "cfg": SAMPLED,
    "top_k": SAMPLED,
    "top_p": SAMPLED,
    "batch": SAMPLED,
    "classes": (*GENERATED, *COMPLETED, "attention"),
    "per_class": GENERATED,
    "seed": (*GENERATED, "npz"),
    "seeds": (*COMPLETED, "evaluate"),
    "gif": GENERATED,
    "out": (*GENERATED, *TASKS, *LOOKED_INTO),
    "image": TASKS,
    "box": HOLES,
    "mask": HOLES,
    "paste": HOLES,
    "small": ("upscale",),
    "open_loop": COMPLETED,
    "cell": ("attention",),
    "reference": ("npz", "reference"),
    "rejection": ("npz",),
}


def check(options: Namespace, parser: Parser) -> None:
    """Raises UserError for flags that do not go together."""
    wish = options.wish
    for name, wishes in MEANT_FOR.items():
        given = getattr(options, name) != parser.get_default(name)
        if given and wish not in wishes:
            raise UserError(f"--{name.replace('_', '-')} does nothing for {wish}: it is for "
                            f"{', '.join(wishes)}")
    samples = None
    if options.npz:
        count, path = options.npz
        samples = Path(path)
        if not count.isdecimal() or not 1 <= int(count) <= MOST_SAMPLES:
            raise UserError(f"--npz {count} must be a number of images, 1 to {MOST_SAMPLES}, and a "
                            f"file")
    if options.evaluate and options.evaluate % 2:
        raise UserError(f"--evaluate {options.evaluate} must be even: two halves are compared")
    written = [(options.out, ".png"), (options.gif, ".gif"), (options.reference, ".npz"),
               (samples, ".npz")]
    for path, ending in written:
        if path and path.exists() and not path.is_file():
            raise UserError(f"{path} is there and is no file; name a file to write")
        if path and path.suffix.lower() not in ("", ending):
            raise UserError(f"{path} would be a {ending} file; name it so")
    paths = [path.resolve() for path, _ in written if path]
    if len(set(paths)) < len(paths):
        raise UserError(f"one file cannot hold both: {', '.join(map(str, paths))}")
    if wish in TASKS and not options.image:
        raise UserError(f"--task {wish} needs --image: a file, a folder, or data:17")
    classes = options.classes or []
    if wish == "edit" and not classes:
        raise UserError("--task edit needs --classes NAME: what to edit towards")
    if wish not in GENERATED and len(classes) > 1:
        raise UserError(f"one class here, please: --classes {' '.join(classes)} are "
                        f"{len(classes)}")


if __name__ == "__main__":
    run_program(main)
