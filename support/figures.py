"""The pictures that explain: reconstructions, codes, teacher forcing, attention, and curves.

Of a run (a sample.Run) and of `given` images (an asked.Given).
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from support.cli import UserError
from support.evaluation import psnr
from support.images import Row, in_colour, rows_of_pairs, to_bytes


def reconstruct(run, given) -> list[Row]:
    """Return images above what is left of them after encoding and decoding."""
    _, tokens_NL = run.encode(given.images)
    results = run.decode(tokens_NL)
    errors_N = (results - given.images).square().mean(dim=(1, 2, 3))
    captions = []
    for name, error in zip(given.names, errors_N.tolist()):
        print(f"{name}: PSNR {psnr(error):.2f} dB")
        captions.append(f"{name}\n{psnr(error):.1f} dB")
    return rows_of_pairs(given.images, results, captions)


def draw_codes(run, given) -> list[Row]:
    """The residual loop: what every scale finds left over, its codes, and the image so far.

    What is left over is bright where it is large, of all scales alike. A code's colour is its place
    along the three directions in which the codebook varies most: like codes, like colours.
    """
    quantizer = run.tokenizer.quantizer
    scales = quantizer.scales
    f_NCSS, tokens_NL = run.encode(given.images)
    f_NCSS = f_NCSS.to(run.machine.device)
    by_scale = quantizer.split(tokens_NL.to(run.machine.device))
    left = []
    f_hat_NCSS = quantizer.initial(len(f_NCSS))
    for k, tokens_Nl in enumerate(by_scale):
        residual_NlC = quantizer.read(f_NCSS - f_hat_NCSS, k)
        left.append(residual_NlC.norm(dim=-1))
        f_hat_NCSS = quantizer.accumulate(f_hat_NCSS, tokens_Nl, k)
    left_NL1 = heat(torch.cat(left, dim=1))
    codes_NL3 = code_colours(quantizer.codebook_VC)[tokens_NL]
    frames_NK = zip(*run.after_each_scale(tokens_NL))
    shown = zip(given.names, left_NL1, codes_NL3, frames_NK)
    rows = []
    for name, left_L1, codes_L3, frames_K in shown:
        rows += [
            Row(f"{name}: left over (black: nothing)", as_maps(left_L1, scales),
                scale_names(scales)),
            Row("its codes, like ones in like colours", as_maps(codes_L3, scales)),
            Row("image so far", frames_K)]
    return rows


def draw_teaching(run, given) -> list[Row]:
    """Teacher forcing: what the transformer reads for each scale, above what it has to predict."""
    scales = run.model.config.scales
    _, tokens_1L = run.encode(given.images[:1])
    inputs = run.tokenizer.teacher_inputs(tokens_1L.to(run.machine.device))
    size_L = F.pad(inputs[0].norm(dim=-1), (1, 0))
    size_L[0] = size_L.max() or 1   # the first scale reads the class; there may be no other
    codes_L3 = code_colours(run.tokenizer.quantizer.codebook_VC)[tokens_1L[0]]
    after = [f"after {name}" for name in scale_names(scales[:-1])]
    read = ["the class", *after]
    return [Row("reads (black: zero)", as_maps(heat(size_L), scales), read),
            Row("has to predict", as_maps(codes_L3, scales), scale_names(scales))]


def scale_names(scales: tuple[int, ...]) -> list[str]:
    return [f"{s}x{s}" for s in scales]


def as_maps(x_L: Tensor, scales: tuple[int, ...]) -> list[Tensor]:
    """Something of every token, [L, ...], as a map [s, s, ...] for each scale."""
    maps = x_L.split([s * s for s in scales])
    return [x_l.unflatten(0, (s, s)) for x_l, s in zip(maps, scales)]


def heat(x: Tensor) -> Tensor:
    """Sizes as shades of grey, black for none: bytes [..., 1]."""
    largest = x.amax().clamp(min=1e-6)
    shades = (255 * x / largest).byte()
    return shades.cpu()[..., None]


def code_colours(codebook_VC: Tensor) -> Tensor:
    """A colour for every code, bytes [V, 3]."""
    codes_VC = codebook_VC.detach().cpu()
    centred_VC = codes_VC - codes_VC.mean(dim=0)
    directions = torch.linalg.svd(centred_VC, full_matrices=False).Vh
    place_V3 = centred_VC @ directions[:3].T
    spread_3 = place_V3.std(dim=0, correction=min(1, len(place_V3) - 1)).clamp(min=1e-12)
    place_V3 = (place_V3 / spread_3 / 2).clamp(-1, 1)
    colours_V3 = ((place_V3 + 1) * 127.5).byte()
    return F.pad(colours_V3, (0, 3 - colours_V3.shape[1]))   # codes of one or two channels


def draw_attention(
    run, images: Tensor, label: int, cell: tuple[int, int] | None
) -> list[Row]:
    """What a cell of the last scale attends to: a row per layer, over heads, a column per scale.

    Brightness is the root of a weight, of all scales alike; the share that each scale gets stands
    above it. images: the first is taken. cell: (y, x), if not the middle.
    """
    config = run.model.config
    side = config.scales[-1]
    y, x = cell or (side // 2, side // 2)
    if max(y, x) >= side:
        raise UserError(f"--cell {y} {x} must lie within the last map, 0 to {side - 1}")
    labels_B = torch.tensor([label], device=run.machine.device)
    _, tokens_1L = run.encode(images[:1])
    inputs = run.tokenizer.teacher_inputs(tokens_1L.to(run.machine.device))
    query = config.spans[-1].start + y * side + x
    layers = evenly(config.depth, 8)
    with run.machine.autocast():
        weights = attention_weights(
            run.model, labels_B, inputs, layers, slice(query, query + 1))
    (image,) = to_bytes(images[:1])
    marked = Image.fromarray(in_colour(image))
    size = run.tokenizer.config.downsampling
    left = x * size
    upper = y * size
    corners = (left, upper, left + size - 1, upper + size - 1)
    ImageDraw.Draw(marked).rectangle(corners, outline="red")
    rows = []
    for layer, weights_H1L in zip(layers, weights):
        weights_L = weights_H1L.mean(dim=(0, 1))
        maps = as_maps(weights_L, config.scales)
        captions = [f"cell {y} {x}"]
        for name, weights_ss in zip(scale_names(config.scales), maps):
            captions.append(f"{name}: {weights_ss.sum():.0%}")
        bright = as_maps(heat(weights_L.sqrt()), config.scales)
        rows.append(Row(f"layer {layer + 1}", [np.asarray(marked), *bright], captions))
    return rows


def evenly(count: int, most: int) -> list[int]:
    """0 .. count-1, or so many of them."""
    places = np.linspace(0, count - 1, min(count, most))
    return places.round().astype(int).tolist()


@torch.no_grad()
def attention_weights(
    model: nn.Module, labels_B: Tensor, inputs: Tensor, layers: Sequence[int],
    queries: slice = slice(None),
) -> list[Tensor]:
    """What these tokens attend to in some layers: the weights [H, l, L] of each, on the CPU.

    model: a var.VAR. labels_B, inputs: of one image, as in its `forward`.
    """
    visible_lL = model.ranges.dense()[queries].to(inputs.device)
    weights = []

    def note(attention: nn.Module, arguments: tuple) -> None:
        q_BHLD, k_BHLD, _, scale = attention.project(arguments[0])
        products_HlL = q_BHLD[0, :, queries] @ k_BHLD[0].mT
        scores_HlL = scale * products_HlL.float()
        scores_HlL = scores_HlL.masked_fill(~visible_lL, -torch.inf)
        weights.append(scores_HlL.softmax(dim=-1).cpu())

    layers = [model.blocks[layer].attention for layer in layers]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    model(labels_B, inputs)
    for hook in hooks:
        hook.remove()
    return weights


CURVES = [   # of each panel the title, the axis, the stage; and of each curve split, name, legend
    ("tokenizer: errors in training", "log", "tokenizer", [
        ("train", "mse", "squared error"), ("train", "codebook", "codebook loss"),
        ("train", "perceptual", "perceptual distance")]),
    ("tokenizer: PSNR of held-out images, dB", "linear", "tokenizer", [
        ("held_out", "psnr", "from all scales")]),
    ("tokenizer: PSNR after each scale, dB", "linear", "tokenizer", [
        ("health", "psnr_per_scale", "trained, held-out images")]),
    ("transformer: loss, nats a token", "linear", "var", [
        ("train", "loss", "training images"), ("held_out", "loss", "held-out images")]),
    ("transformer: held-out loss of each scale", "linear", "var", [
        ("held_out", "loss_per_scale", None)]),
    ("transformer: held-out tokens right, of each scale", "linear", "var", [
        ("held_out", "accuracy_per_scale", None)]),
    ("discriminator", "linear", "tokenizer", [
        ("train", "discriminator", "its loss"),
        ("train", "discriminator_right", "share of patches right")]),
    ("weight of the adversarial loss", "log", "tokenizer", [("train", "balance", "weight")]),
]


def draw_curves(log: list[dict], scales: tuple[int, ...]):
    """A matplotlib figure of what a training has logged so far, against the step."""
    from matplotlib.figure import Figure   # importing it takes as long as many a command

    panels = []
    for title, yscale, stage, curves in CURVES:
        logged = []
        for split, name, label in curves:
            lines = [line for line in log
                     if (line["stage"], line["split"]) == (stage, split) and name in line]
            x = [line["step"] for line in lines]
            y = [line[name] for line in lines]
            if lines:
                logged.append((split, x, y, label))
        if logged:
            panels.append((title, yscale, logged))

    high = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(15, 3.5 * high), layout="constrained")
    for i, (title, yscale, logged) in enumerate(panels):
        axis = figure.add_subplot(high, 3, i + 1)
        axis.set(title=title, xlabel="step", yscale=yscale)
        for split, x, y, label in logged:
            if split == "health":   # which is measured once
                axis.plot(scale_names(scales), y[-1], ".-", label=label)
                axis.set_xlabel("scale")
            else:
                axis.plot(x, y, "-" if split == "train" else ".-",
                          label=label or scale_names(scales))
        axis.legend(fontsize="small", ncols=2)
    return figure
