"""Everything one does with a trained VAR:  python sample.py

    python sample.py                                     a grid of images, a row per class, from out/shapes
    python sample.py --run out/shapes --classes star heart --per-class 12 --seed 7
    python sample.py --progress                          what the running latent decodes to after each scale
    python sample.py --task inpaint --image data:3 data:5 --box 0.5 0 1 1 --seeds 0 1 2
    python sample.py --codes data:3                      an image's token maps, and what each adds
    python sample.py --npz 50000 samples.npz             for the field's evaluation programs
    python sample.py --tokenizer vae_ch160v4096z32.pth --var var_d16.pth --classes 207 980

Read `main` first, then `complete`: in-painting, out-painting, editing and upscaling are one mechanism. A run's folder
holds all that is needed; a published pair of checkpoints does, too.
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tokenizer import Tokenizer
from train import (FILTERS, IMAGE_ENDINGS, Data, Help, UserError, chunks, fingerprint, grid, load_checkpoint, load_data,
                   load_published, load_tokenizer, plt, psnr, read_image, restore, run_program, save_image, save_whole,
                   settle_device, to_bytes, to_float)
from var import VAR, Kept, VARConfig

# ---------------------------------------------------------------------------------------------------------------
# A run, and drawing from it


@dataclass
class Run:
    """A tokenizer and a transformer that belong together, and what was asked for on the command line."""
    tokenizer: Tokenizer
    model: VAR
    classes: list[str]
    source: dict | None   # how to load the data it was trained on; a published pair does not say
    options: argparse.Namespace

    @torch.no_grad()
    def generate(self, labels: list[int], seed: int, kept: Callable[[list[int]], Kept] | None = None) -> Tensor:
        """Tokens [N, L] of one image per label, on the CPU, a batch at a time. kept: of these images of the N."""
        o = self.options
        generator, tokens = torch.Generator(o.device).manual_seed(seed), []
        batches = list(chunks(len(labels), o.batch))
        for indices in tqdm(batches, desc="generate", unit="batch", disable=len(batches) == 1):
            labels_B = torch.tensor([labels[i] for i in indices], device=o.device)
            # Guidance away from "any class" means nothing where no class is asked for.
            cfg = o.cfg if labels_B.min() < self.model.config.classes else 0.0
            with o.autocast():
                tokens.append(self.model.generate(self.tokenizer, labels_B, cfg, o.top_k, o.top_p, generator,
                                                  kept and kept(indices)).cpu())
        return torch.cat(tokens)

    @torch.no_grad()
    def decode(self, tokens_NL: Tensor) -> Tensor:
        """Images of tokens of all scales, or of the coarser ones, on the CPU."""
        images = []
        for indices in chunks(len(tokens_NL), self.options.batch):
            with self.options.autocast():
                images.append(self.tokenizer.decode(tokens_NL[indices].to(self.options.device)).cpu())
        return torch.cat(images)

    def after_each_scale(self, tokens_NL: Tensor) -> list[np.ndarray]:
        """What the first 1, 2, ... K scales decode to: bytes [N, side, side, channels] for each."""
        ends = np.cumsum([s * s for s in self.tokenizer.config.scales])
        return [to_bytes(self.decode(tokens_NL[:, :end])) for end in ends]

    @torch.no_grad()
    def log_likelihood(self, tokens_NL: Tensor, labels: list[int]) -> Tensor:
        """log p(tokens | class) [N], in nats, without guidance."""
        parts = []
        for indices in tqdm(list(chunks(len(labels), self.options.batch)), desc="likelihood", unit="batch"):
            tokens_BL = tokens_NL[indices].to(self.options.device)
            labels_B = torch.tensor([labels[i] for i in indices], device=self.options.device)
            with self.options.autocast():
                logits_BLV = self.model(labels_B, self.tokenizer.teacher_inputs(tokens_BL)).float()
            log_p_BL = -F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL, reduction="none")
            parts.append(log_p_BL.sum(dim=1).cpu())
        return torch.cat(parts)

    def data(self) -> Data:
        if self.source is None:
            raise UserError("a published checkpoint does not say what data it was trained on")
        s = self.source
        return load_data(s["name"], Path(s["data_dir"]), s["side"], s["channels"], s["seed"])


def load(options: argparse.Namespace) -> Run:
    """Raises UserError where the tokenizer and the transformer do not belong together."""
    tokenizer_path = options.tokenizer or options.run / "tokenizer.pt"
    var_path = options.var or options.run / "var.pt"
    if var_path.suffix == ".pth":
        model = load_published(var_path, VAR.from_official)
        tokenizer = load_tokenizer(tokenizer_path, model.config.scales)
        classes, source = [str(i) for i in range(model.config.classes)], None
    else:
        content = load_checkpoint(var_path, "transformer", "config", "model", "classes", "source", "tokenizer")
        model = restore(var_path, lambda: VAR(VARConfig(**content["config"])), content)
        tokenizer = load_tokenizer(tokenizer_path, model.config.scales)
        classes, source = content["classes"], content["source"]
        if fingerprint(tokenizer) != content["tokenizer"]:
            raise UserError(f"{var_path} was trained on the tokens of another tokenizer than {tokenizer_path}")
    ours, its = tokenizer.config, model.config
    if (ours.scales, ours.vocabulary, ours.code_channels) != (its.scales, its.vocabulary, its.code_channels):
        raise UserError(f"{tokenizer_path} has scales {ours.scales}, {ours.vocabulary} codes of {ours.code_channels} "
                        f"channels; {var_path} expects {its.scales}, {its.vocabulary} and {its.code_channels}")
    return Run(tokenizer.to(options.device), model.to(options.device), classes, source, options)


def class_indices(names: list[str] | None, classes: list[str]) -> list[int]:
    """Of the classes named, or of the first twenty."""
    for name in names or []:
        if name not in classes:
            known = ", ".join(classes) if len(classes) <= 20 else f"{classes[0]} to {classes[-1]}"
            raise UserError(f"there is no class {name}; there are {known}")
    return [classes.index(name) for name in names or classes[:20]]


def draw_samples(run: Run) -> Image.Image:
    """A row per class; with --progress a row per image, after each scale; with --gif that as a film, too."""
    options, chosen = run.options, class_indices(run.options.classes, run.classes)
    labels = [label for label in chosen for _ in range(options.per_class)]
    tokens_NL = run.generate(labels, options.seed)
    frames_KN = run.after_each_scale(tokens_NL) if options.progress or options.gif else [to_bytes(run.decode(tokens_NL))]

    def by_class(images: np.ndarray) -> Image.Image:
        return grid(list(zip((run.classes[i] for i in chosen), images.reshape(len(chosen), -1, *images.shape[1:]))))

    if options.gif:
        first, *rest = [by_class(images) for images in frames_KN]
        times = [400] * len(rest) + [2000]   # milliseconds
        options.gif.parent.mkdir(parents=True, exist_ok=True)
        film = dict(save_all=True, append_images=rest, duration=times, loop=0)
        save_whole(options.gif, lambda file: first.save(file, "GIF", **film))
        print(f"wrote {options.gif}")
    if options.progress:
        return grid([(run.classes[label], np.stack(row)) for label, *row in zip(labels, *frames_KN)])
    return by_class(frames_KN[-1])


# ---------------------------------------------------------------------------------------------------------------
# Images of one's own


@dataclass
class Given:
    """Images named on the command line: in [-1, 1] on the CPU, with a name and a label each (None: unknown)."""
    images: Tensor
    names: list[str]
    labels: list[int | None]


def load_images(run: Run, sources: list[str]) -> Given:
    """Files, folders of them, and `data:17`, the 17th held-out image of the run's own data (from 0)."""
    config, data, found = run.tokenizer.config, None, []
    for source in sources:
        if source.startswith("data:"):
            data = data or run.data()
            if not source[5:].isdecimal() or int(source[5:]) >= len(data.held_out):
                raise UserError(f"--image {source}: the held-out images are data:0 to data:{len(data.held_out) - 1}")
            image, label = data.held_out[[int(source[5:])]]
            found.append((image[0].numpy(), f"{run.classes[label]} {source[5:]}", int(label)))
            continue
        paths = [Path(source)]
        if paths[0].is_dir():
            paths = sorted(p for p in paths[0].iterdir() if p.suffix.lower() in IMAGE_ENDINGS)
            if not paths:
                raise UserError(f"{source} holds no images ({', '.join(IMAGE_ENDINGS)})")
        found += [(read_image(path, config.image_side, config.image_channels), path.stem[:16], None) for path in paths]
    pixels, names, labels = zip(*found)
    return Given(to_float(torch.from_numpy(np.stack(pixels)), torch.device("cpu")), list(names), list(labels))


@torch.no_grad()
def encode(run: Run, images: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [N, C, S, S] and tokens [N, L]."""
    with run.options.autocast():
        latent_BCSS = run.tokenizer.latent(images.to(run.options.device))
    return latent_BCSS, run.tokenizer.quantizer.encode(latent_BCSS)


def reconstruct(run: Run, given: Given) -> Image.Image:
    """Images beside what is left of them after encoding and decoding."""
    results = run.decode(encode(run, given.images)[1])
    errors = (results - given.images).square().mean(dim=(1, 2, 3)).tolist()
    for name, error in zip(given.names, errors):
        print(f"{name}: PSNR {psnr(error):.2f} dB")
    return grid(list(zip(given.names, np.stack([to_bytes(given.images), to_bytes(results)], axis=1))))


# ---------------------------------------------------------------------------------------------------------------
# Completing images: what is kept, and where


def complete(run: Run, given: Given) -> Image.Image:
    """In-painting, out-painting, editing and upscaling: a row per image: itself, what is kept of it, a result per seed."""
    options, N = run.options, len(given.images)
    if options.task == "upscale":
        keep_HW, scales = torch.ones(given.images.shape[2:]), kept_scales(run)
        shown = known = F.interpolate(shrink(run, given.images), size=given.images.shape[2:], mode="bicubic").clamp(-1, 1)
    else:
        keep_HW, scales = kept_pixels(run), len(run.tokenizer.config.scales)
        shown, known = given.images * keep_HW, fill_holes(given.images, keep_HW)
    label = class_indices(options.classes, run.classes)[0] if options.classes else run.model.config.classes
    latent_NCSS, tokens_NL = encode(run, known)
    where_11SS = F.interpolate(keep_HW[None, None].to(options.device), size=latent_NCSS.shape[2:], mode="area")

    def kept(indices: list[int]) -> Kept:
        own = tokens_NL[indices] if options.open_loop else None
        return Kept(latent_NCSS[indices], where_11SS.expand(len(indices), -1, -1, -1), scales, own)

    columns = [given.images, shown]
    for seed in options.seeds:
        result = run.decode(run.generate([label] * N, seed, kept))
        columns.append(torch.where(keep_HW > 0, given.images, result) if options.paste else result)
    if options.task != "upscale":
        report(columns[2:], given.images, keep_HW)
    return grid(list(zip(given.names, np.stack([to_bytes(column) for column in columns], axis=1))))


def kept_pixels(run: Run) -> Tensor:
    """1 where the image is kept and 0 where it is generated: float [side, side], from --box or --mask."""
    options, side = run.options, run.tokenizer.config.image_side
    if options.mask:
        return torch.from_numpy(read_image(options.mask, side, 1)[0] < 128).float()   # white is generated
    y0, x0, y1, x1 = (round(fraction * side) for fraction in options.box)
    if not (0 <= y0 < y1 <= side and 0 <= x0 < x1 <= side):
        raise UserError(f"--box {' '.join(map(str, options.box))} must be Y0 X0 Y1 X1 within [0, 1] and hold at least "
                        f"a pixel of {side}")
    inside = torch.zeros(side, side)
    inside[y0:y1, x0:x1] = 1
    return inside if options.task == "outpaint" else 1 - inside


def fill_holes(images: Tensor, keep_HW: Tensor) -> Tensor:
    """What is not kept, grown in from the border: the encoder sees the whole image, and must not see what was there."""
    known, filled = keep_HW[None, None], images * keep_HW
    while 0 < known.sum() < known.numel():
        near = F.avg_pool2d(known, 3, 1, 1)
        filled = torch.where(known > 0, filled, F.avg_pool2d(filled, 3, 1, 1) / near.clamp(min=1e-6))
        known = (near > 0).float()
        filled = filled * known
    return filled


def shrink(run: Run, images: Tensor) -> Tensor:
    """The small images that upscaling starts from."""
    return F.interpolate(images, size=(run.options.small, run.options.small), mode="area")


def kept_scales(run: Run) -> int:
    """How many scales a small image settles: those whose maps are no finer than its own latent would be."""
    config, small = run.tokenizer.config, run.options.small
    small = config.image_side // 2 if small is None else small
    if not 1 <= small < config.image_side:
        raise UserError(f"--small {small} must be 1 or more and less than the side of the images, {config.image_side}")
    run.options.small = small
    return sum(s * config.downsampling <= small or s == 1 for s in config.scales)


def report(results: list[Tensor], images: Tensor, keep_HW: Tensor) -> None:
    """How far the kept part drifted, and whether the border of the hole shows, averaged over images and seeds."""
    n, kept = len(results) * len(images), keep_HW.sum().item() * images.shape[1]
    drift = sum(((result - images) * keep_HW / 2).square().sum().item() for result in results) / n / max(kept, 1)
    own, seen = seam(images, keep_HW), np.mean([seam(result, keep_HW) for result in results])
    print(f"kept part: mean squared error {drift:.5f} (pixels in [0, 1]); border: mean step {seen:.4f}, "
          f"{seen / own if own else math.nan:.2f} of the image's own")


def seam(images: Tensor, keep_HW: Tensor) -> float:
    """Mean absolute difference between neighbours of which one is kept and the other is not; 0 if there are none."""
    total = pairs = 0.0
    for axis in (-1, -2):
        across_HW = keep_HW.diff(dim=axis).abs()
        total += (images.diff(dim=axis).abs() * across_HW).sum().item() / 2
        pairs += across_HW.sum().item() * images.shape[0] * images.shape[1]
    return total / max(pairs, 1)


# ---------------------------------------------------------------------------------------------------------------
# Looking inside


def draw_codes(run: Run, given: Given) -> Image.Image:
    """For each image its token maps, coarse to fine, and below each map what the scales up to it decode to.

    A code's colour is its place along the three directions in which the codebook varies most: like codes, like colours.
    """
    config, tokens_NL = run.tokenizer.config, encode(run, given.images)[1].cpu()
    codes_VC = run.tokenizer.quantizer.codebook_VC.detach().cpu()
    centred_VC = codes_VC - codes_VC.mean(dim=0)
    directions_C3 = torch.linalg.svd(centred_VC, full_matrices=False).Vh[:3].T
    place_V3 = centred_VC @ directions_C3
    colour_V3 = F.pad(((place_V3 / place_V3.std(dim=0) / 2).clamp(-1, 1) + 1) * 127.5, (0, 3 - place_V3.shape[1])).byte()
    frames_KN = run.after_each_scale(tokens_NL)
    rows = []
    for n, name in enumerate(given.names):
        maps = [colour_V3[map_Nl[n]].view(s, s, 3).numpy()
                for s, map_Nl in zip(config.scales, run.tokenizer.quantizer.split(tokens_NL))]
        rows.append((f"{name}: codes", maps))
        rows.append(("image", [frame[n] for frame in frames_KN]))
    return grid(rows, cell=max(64, config.image_side))


@torch.no_grad()
def draw_attention(run: Run, given: Given) -> plt.Figure:
    """What one cell of the last scale attends to: a row per layer, averaged over heads, a column per scale."""
    model, scales = run.model, run.model.config.scales
    side = scales[-1]
    y, x = run.options.cell or (side // 2, side // 2)
    if not (0 <= y < side and 0 <= x < side):
        raise UserError(f"--cell {y} {x} must lie within the last map, 0 to {side - 1}")
    query = model.config.length - side * side + y * side + x
    label = class_indices(run.options.classes, run.classes)[0] if run.options.classes else given.labels[0]
    labels_B = torch.tensor([model.config.classes if label is None else label], device=run.options.device)
    layers = attention_of(model, labels_B, run.tokenizer.teacher_inputs(encode(run, given.images[:1])[1]), query)
    chosen = np.linspace(0, len(layers) - 1, min(8, len(layers))).round().astype(int)

    figure, axes = plt.subplots(len(chosen), len(scales) + 1, figsize=(1.5 * len(scales) + 2, 1.6 * len(chosen) + 0.4),
                                squeeze=False, constrained_layout=True)
    picture, cell = to_bytes(given.images[:1])[0], given.images.shape[-1] / side
    for row, layer in zip(axes, chosen):
        row[0].imshow(picture.squeeze(), cmap="gray")
        corner = (x * cell - 0.5, y * cell - 0.5)
        row[0].add_patch(plt.Rectangle(corner, cell, cell, fill=False, edgecolor="red", linewidth=2))
        row[0].set_ylabel(f"layer {layer + 1}")
        for axis, s, map_l in zip(row[1:], scales, layers[layer].split([s * s for s in scales])):
            axis.imshow(map_l.view(s, s), vmin=0)
            axis.set_xlabel(f"{map_l.sum():.0%}")
    for axis, s in zip(axes[0][1:], scales):
        axis.set_title(f"{s}x{s}")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure


def attention_of(model: VAR, labels_B: Tensor, inputs: Tensor, query: int) -> list[Tensor]:
    """Attention weights [L] of one query in every layer, averaged over heads; zero out of its range."""
    seen: list[Tensor] = []
    hooks = [block.attention.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
             for block in model.blocks]
    model(labels_B, inputs)
    for hook in hooks:
        hook.remove()
    visible_L = model.ranges.dense()[query].to(inputs.device)
    layers = []
    for block, x_BLW in zip(model.blocks, seen):
        q_BHLD, k_BHLD, _, scale = block.attention.project(x_BLW)
        scores_HL = scale * (k_BHLD[0] @ q_BHLD[0, :, query, :, None]).squeeze(-1)
        layers.append(scores_HL.masked_fill(~visible_L, -torch.inf).softmax(dim=-1).mean(dim=0).cpu())
    return layers


# ---------------------------------------------------------------------------------------------------------------
# For evaluation by others


def draw_many(run: Run, count: int) -> np.ndarray:
    """Bytes [count, side, side, channels], balanced over the classes.

    With --rejection f, count / f are drawn, and of each class those kept that are most likely under the transformer
    without guidance. (The paper's best figures reject by a classifier instead.)
    """
    fraction, classes = run.options.rejection or 1.0, len(run.classes)
    wanted = [len(range(c, count, classes)) for c in range(classes)]
    labels = [c for c in range(classes) for _ in range(math.ceil(wanted[c] / fraction))]
    tokens_NL = run.generate(labels, run.options.seed)
    if fraction < 1:
        likelihood_N, label_N = run.log_likelihood(tokens_NL, labels), torch.tensor(labels)
        best = [(likelihood_N.masked_fill(label_N != c, -torch.inf)).topk(wanted[c]).indices for c in range(classes)]
        tokens_NL = tokens_NL[torch.cat(best)]
    return np.concatenate([to_bytes(run.decode(tokens_NL[part])) for part in chunks(count, run.options.batch)])


def save_npz(path: Path, images: np.ndarray) -> None:
    """`arr_0`, uint8 [N, side, side, 3], as the evaluation program of ADM (Dhariwal and Nichol, 2021) reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_whole(path, lambda file: np.savez(file, arr_0=np.broadcast_to(images, (*images.shape[:3], 3))))
    print(f"wrote {len(images)} images to {path}")


# ---------------------------------------------------------------------------------------------------------------
# The command line


TASKS = ("inpaint", "outpaint", "edit", "upscale", "reconstruct")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw images with a trained VAR.", formatter_class=Help)
    add = parser.add_argument
    add("--run", type=Path, default=Path("out/shapes"), help="folder that train.py wrote")
    add("--tokenizer", type=Path, help="another tokenizer: a .pt of train.py or a published .pth (default: the run's)")
    add("--var", type=Path, help="another transformer: a .pt of train.py or a published .pth (default: the run's)")
    add("--out", type=Path, help="the PNG to write (default: named for what it shows, in the run's folder)")
    add("--classes", nargs="+", metavar="NAME",
        help="names of classes; numbers for a published model (default: all, at most 20)")
    add("--per-class", type=int, default=8, help="images per class")
    add("--cfg", type=float, default=FILTERS["cfg"],
        help="strength of classifier-free guidance at the last scale; 0 is none")
    add("--top-k", type=int, default=FILTERS["top_k"], help="draw from the k most likely tokens; 0 is no limit")
    add("--top-p", type=float, default=FILTERS["top_p"],
        help="draw from the most likely tokens that hold this much probability")
    add("--seed", type=int, default=0, help="the same seed gives the same picture")
    add("--batch", type=int, default=100, help="images generated at a time")
    add("--progress", action="store_true", help="one row per image: the image after each scale, coarse to fine")
    add("--gif", type=Path, metavar="FILE", help="also the images forming, scale by scale, as a film")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, mps, ...")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the device is built for it")

    add = parser.add_argument_group("with images of one's own").add_argument
    add("--task", choices=TASKS, help="inpaint: a box is generated, the rest kept; outpaint: the other way round; edit: "
        "inpaint towards --classes NAME; upscale: fine scales are generated, coarse ones kept; reconstruct: encode and decode")
    add("--image", nargs="+", metavar="IMAGE", help="files, folders, or data:17 for a held-out image of the run's own data")
    add("--box", nargs=4, type=float, default=(0.25, 0.25, 0.75, 0.75), metavar=("Y0", "X0", "Y1", "X1"),
        help="the box, in fractions of the side")
    add("--mask", type=Path, help="an image instead of a box: what is white in it is generated, in outpaint, too")
    add("--seeds", nargs="+", type=int, default=(0, 1, 2), help="one result for each")
    add("--small", type=int, help="upscale: side of the small images (default: half of the run's)")
    add("--paste", action="store_true", help="put the known pixels over the result at the end")
    add("--open-loop", action="store_true", help="keep the image's own tokens, as published, for comparison")
    add("--codes", nargs="+", metavar="IMAGE", help="draw the token maps of images, and the image after each scale")
    add("--attention", metavar="IMAGE", help="draw what a cell of the last scale attends to, in every layer")
    add("--cell", nargs=2, type=int, metavar=("Y", "X"), help="attention: which cell (default: the middle)")

    add = parser.add_argument_group("for evaluation").add_argument
    add("--npz", nargs=2, metavar=("N", "FILE"),
        help="write N samples, balanced over the classes, as ADM's evaluation reads them")
    add("--reference", type=Path, metavar="FILE", help="write the held-out images in the same form")
    add("--rejection", type=float, metavar="FRACTION", help="npz: keep this share of what is drawn, the most likely")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    count = options.npz[0] if options.npz else "1"
    for name, value, fine, what in (
            ("per-class", options.per_class, options.per_class >= 1, "1 or more"),
            ("batch", options.batch, options.batch >= 1, "1 or more"),
            ("cfg", options.cfg, 0 <= options.cfg < math.inf, "0 or more"),
            ("top-k", options.top_k, options.top_k >= 0, "0 or more"),
            ("top-p", options.top_p, 0 < options.top_p <= 1, "over 0, at most 1"),
            ("npz", count, count.isdecimal() and int(count) >= 1, "a number of images, 1 or more, and a file"),
            ("rejection", options.rejection, options.rejection is None or 0 < options.rejection <= 1, "over 0, at most 1"),
            ("box", options.box, all(0 <= fraction <= 1 for fraction in options.box), "fractions, from 0 to 1")):
        if not fine:
            raise UserError(f"--{name} {value} must be {what}")
    for seed in (options.seed, *options.seeds):
        if not 0 <= seed < 2**63:
            raise UserError(f"a seed must be from 0 to 2^63 - 1: it is {seed}")
    asked = {name: getattr(options, name) for name in ("task", "codes", "attention", "npz") if getattr(options, name)}
    if len(asked) > 1:
        raise UserError(f"one thing at a time: {' or '.join('--' + name for name in asked)}")
    if options.rejection and not options.npz:
        raise UserError("--rejection is for --npz")
    if options.npz and options.classes:
        raise UserError("--npz is balanced over all classes and takes no --classes")
    for path in (options.out, options.gif, options.reference, options.npz and Path(options.npz[1])):
        if path and path.is_dir():
            raise UserError(f"{path} is a folder; name a file to write")
    if options.task and not options.image:
        raise UserError(f"--task {options.task} needs --image: a file, a folder, or data:17")
    if options.image and not options.task:
        raise UserError(f"--image needs --task: one of {', '.join(TASKS)}")
    if options.task == "upscale" and options.paste:
        raise UserError("--paste has no known pixels to put over an upscaled image")
    if options.task == "edit" and not options.classes:
        raise UserError("--task edit needs --classes NAME: what to edit towards")
    if (options.task or options.attention) and len(options.classes or []) > 1:
        raise UserError(f"one class here, please: --classes {' '.join(options.classes)} are {len(options.classes)}")


def main() -> None:
    options = parse()
    check(options)
    settle_device(options)
    run = load(options)
    if options.npz or options.reference:
        if options.reference:
            held_out = run.data().held_out
            parts = [held_out[part][0].permute(0, 2, 3, 1).numpy() for part in chunks(len(held_out), 100)]
            save_npz(options.reference, np.concatenate(parts))
        if options.npz:
            save_npz(Path(options.npz[1]), draw_many(run, int(options.npz[0])))
        return
    if options.attention:
        what, figure = "attention", draw_attention(run, load_images(run, [options.attention]))
    elif options.codes:
        what, figure = "codes", draw_codes(run, load_images(run, options.codes))
    elif options.task:
        draw = reconstruct if options.task == "reconstruct" else complete
        what, figure = options.task, draw(run, load_images(run, options.image))
    else:
        what, figure = "progress" if options.progress else "sample", draw_samples(run)
    out = options.out or options.run / f"{what}.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(figure, Image.Image):
        save_image(out, figure)
    else:
        save_whole(out, lambda file: figure.savefig(file, format="png", dpi=90))
    print(f"wrote {out}")


if __name__ == "__main__":
    run_program(main)
