"""The pictures that explain: codes, teacher forcing, attention, and a training's curves.

Of a run (a sample.Run) and of `given` images (a sample.Given).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from support.cli import UserError
from support.evaluation import say_table
from support.images import Row, in_colour, to_bytes


def draw_codes(run, given) -> list[Row]:
    """The residual loop: what every scale finds left over, its codes, and the image so far.

    What is left over is bright where it is large, of all scales alike. A code's colour is its place
    along the three directions in which the codebook varies most: like codes, like colours.
    """
    quantizer = run.tokenizer.quantizer
    scales = quantizer.scales
    f_NCSS, tokens_NL = run.encode(given.images)
    f_NCSS = f_NCSS.to(run.machine.device)
    left = []
    f_hat_NCSS = quantizer.empty(len(f_NCSS))
    for k, tokens_Nl in enumerate(quantizer.split(tokens_NL.to(run.machine.device))):
        left.append(quantizer.read(f_NCSS - f_hat_NCSS, k).norm(dim=-1))
        f_hat_NCSS = quantizer.accumulate(f_hat_NCSS, tokens_Nl, k)
    left_NL1 = heat(torch.cat(left, dim=1))
    codes_NL3 = code_colours(quantizer.codebook_VC)[tokens_NL]
    frames_NK = zip(*run.after_each_scale(tokens_NL))
    rows = []
    for name, left_L1, codes_L3, frames_K in zip(given.names, left_NL1, codes_NL3, frames_NK):
        rows.append(Row(f"{name}: left over (black: nothing)", as_maps(left_L1, scales),
                        scale_names(scales)))
        rows.append(Row("its codes, like ones in like colours", as_maps(codes_L3, scales)))
        rows.append(Row("image so far", frames_K))
    return rows


def draw_teaching(run, given) -> list[Row]:
    """Teacher forcing: what the transformer reads for each scale, above what it has to predict."""
    scales = run.model.config.scales
    _, tokens_1L = run.encode(given.images[:1])
    inputs = run.tokenizer.teacher_inputs(tokens_1L.to(run.machine.device))
    size_L = inputs[0].norm(dim=-1)
    size_L = F.pad(size_L, (1, 0), value=size_L.max())   # the first scale reads the class
    codes_L3 = code_colours(run.tokenizer.quantizer.codebook_VC)[tokens_1L[0]]
    read = ["the class", *(f"after {name}" for name in scale_names(scales[:-1]))]
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
    return (255 * x / largest).byte().cpu()[..., None]


def code_colours(codebook_VC: Tensor) -> Tensor:
    """A colour for every code, bytes [V, 3]."""
    codes_VC = codebook_VC.detach().cpu()
    centred_VC = codes_VC - codes_VC.mean(dim=0)
    directions_C3 = torch.linalg.svd(centred_VC, full_matrices=False).Vh[:3].T
    place_V3 = centred_VC @ directions_C3
    place_V3 = (place_V3 / place_V3.std(dim=0) / 2).clamp(-1, 1)
    colours_V3 = ((place_V3 + 1) * 127.5).byte()
    return F.pad(colours_V3, (0, 3 - colours_V3.shape[1]))   # codes of one or two channels


def draw_attention(run, images: Tensor, label: int, cell: tuple[int, int] | None) -> list[Row]:
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
    with run.machine.autocast():
        layers = attention_weights(run.model, labels_B, inputs, query)
    marked = outlined(images, y, x, run.tokenizer.config.downsampling)
    rows = []
    names = scale_names(config.scales)
    table = {"attention to": names}
    shown = np.linspace(0, config.depth - 1, min(8, config.depth))
    for layer in shown.round().astype(int):
        maps = as_maps(layers[layer], config.scales)
        shares = [f"{weights_ss.sum():.0%}" for weights_ss in maps]
        table[f"layer {layer + 1}"] = shares
        captions = [f"cell {y} {x}", *map("{}: {}".format, names, shares)]
        bright = as_maps(heat(layers[layer].sqrt()), config.scales)
        rows.append(Row(f"layer {layer + 1}", [marked, *bright], captions))
    say_table(table)
    return rows


def attention_weights(
    model: nn.Module, labels_B: Tensor, inputs: Tensor, query: int
) -> list[Tensor]:
    """What one token attends to in each layer: weights [L], averaged over heads, on the CPU."""
    return weights_of_layers(
        model, labels_B, inputs, lambda weights_H1L: weights_H1L.mean(dim=0)[0],
        range(model.config.depth), slice(query, query + 1))


@torch.no_grad()
def weights_of_layers(
    model: nn.Module, labels_B: Tensor, inputs: Tensor, keep: Callable[[Tensor], Tensor],
    layers: Sequence[int], queries: slice = slice(None),
) -> list[Tensor]:
    """What is kept of some layers' attention, on the CPU.

    model: a var.VAR. labels_B, inputs: of one image, as in its `forward`. keep: takes the weights
    of a layer [H, l, L], of these queries; all layers' together may be too much.
    """
    visible_lL = model.ranges.dense()[queries].to(inputs.device)
    kept = []

    def note(attention: nn.Module, arguments: tuple) -> None:
        q_BHLD, k_BHLD, _, scale = attention.project(arguments[0])
        scores_HlL = scale * (q_BHLD[0, :, queries] @ k_BHLD[0].mT).float()
        weights_HlL = scores_HlL.masked_fill(~visible_lL, -torch.inf).softmax(dim=-1)
        kept.append(keep(weights_HlL).cpu())

    hooks = [model.blocks[layer].attention.register_forward_pre_hook(note) for layer in layers]
    model(labels_B, inputs)
    for hook in hooks:
        hook.remove()
    return kept


def outlined(images: Tensor, y: int, x: int, size: int) -> np.ndarray:
    """The first image as bytes [side, side, 3], with a frame around the cell (y, x)."""
    image = Image.fromarray(in_colour(to_bytes(images[:1])[0]))
    left = x * size
    top = y * size
    corners = (left, top, left + size - 1, top + size - 1)
    ImageDraw.Draw(image).rectangle(corners, outline="red")
    return np.asarray(image)


CURVES = [   # a list for each row of panels: title, scale of the axis, stage; split, name, legend
    [
        ("tokenizer: errors in training", "log", "tokenizer", [
            ("train", "mse", "squared error"), ("train", "codebook", "codebook loss"),
            ("train", "perceptual", "perceptual distance")]),
        ("tokenizer: PSNR of held-out images, dB", "linear", "tokenizer", [
            ("held_out", "psnr", "from all scales")]),
        ("tokenizer: PSNR after each scale, dB", "linear", "tokenizer", [
            ("health", "psnr_per_scale", "trained, held-out images")]),
    ],
    [
        ("transformer: loss, nats a token", "linear", "var", [
            ("train", "loss", "training images"), ("held_out", "loss", "held-out images")]),
        ("transformer: held-out loss of each scale", "linear", "var", [
            ("held_out", "loss_per_scale", "")]),
        ("transformer: held-out tokens right, of each scale", "linear", "var", [
            ("held_out", "accuracy_per_scale", "")]),
    ],
    [
        ("discriminator", "linear", "tokenizer", [
            ("train", "discriminator", "its loss"),
            ("train", "discriminator_right", "share of patches right")]),
        ("weight of the adversarial loss", "log", "tokenizer", [("train", "balance", "weight")]),
    ],
]


def draw_curves(log: list[dict], scales: tuple[int, ...]):
    """A matplotlib figure of what a training has logged so far, against the step."""
    from matplotlib.figure import Figure   # importing it takes as long as many a command

    def lines_of(stage: str, split: str, name: str) -> list[dict]:
        return [line for line in log
                if (line["stage"], line["split"]) == (stage, split) and name in line]

    rows = [[(title, yscale, stage, curves) for title, yscale, stage, curves in row
             if any(lines_of(stage, split, name) for split, name, _ in curves)] for row in CURVES]
    rows = [row for row in rows if row]
    columns = max(map(len, rows))
    figure = Figure(figsize=(5 * columns, 3.5 * len(rows)))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, row_of_axes in zip(rows, axes):
        for (title, yscale, stage, curves), axis in zip(row, row_of_axes):
            axis.set_axis_on()
            axis.set(title=title, xlabel="step")
            for split, name, label in curves:
                lines = lines_of(stage, split, name)
                steps = [line["step"] for line in lines]
                values = [line[name] for line in lines]
                if split == "health":
                    steps, values = range(len(scales)), values[-1]
                    axis.set(xlabel="scale", xticks=steps, xticklabels=scale_names(scales))
                if lines:
                    axis.plot(steps, values, label=label or scale_names(scales),
                              marker=None if split == "train" else ".")
            axis.set_yscale(yscale, **{"nonpositive": "mask"} if yscale == "log" else {})
            axis.legend(fontsize="small", ncols=2)
    # Room for the words around the panels, in inches: to find it out would draw everything twice.
    wide, high = figure.get_size_inches()
    figure.subplots_adjust(0.6 / wide, 0.6 / high, 1 - 0.2 / wide, 1 - 0.4 / high, 0.16, 0.36)
    return figure
