"""The pictures that explain: codes, teacher forcing, attention, and a training's curves.

Of a run (a sample.Run) and of `given` images (a sample.Given).
"""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from support.cli import UserError
from support.evaluation import say_table
from support.images import grid, in_colour, to_bytes


def draw_codes(run, given) -> Image.Image:
    """The residual loop: what every scale finds left over, its codes, and the image so far.

    A code's colour is its place along the three directions in which the codebook varies most: like
    codes, like colours.
    """
    quantizer = run.tokenizer.quantizer
    config = run.model.config
    f_NCSS, tokens_NL = run.encode(given.images)
    f_NCSS = f_NCSS.to(run.machine.device)
    left = []
    f_hat_NCSS = quantizer.empty(len(f_NCSS))
    for k, tokens_Nl in enumerate(quantizer.split(tokens_NL.to(run.machine.device))):
        left.append(heat(quantizer.read(f_NCSS - f_hat_NCSS, k).norm(dim=-1)))
        f_hat_NCSS = quantizer.accumulate(f_hat_NCSS, tokens_Nl, k)
    left_NL1 = torch.cat(left, dim=1)
    codes_NL3 = code_colours(quantizer.codebook_VC)[tokens_NL]
    frames_NK = zip(*run.after_each_scale(tokens_NL))
    rows = []
    for name, left_L1, codes_L3, frames_K in zip(given.names, left_NL1, codes_NL3, frames_NK):
        rows.append((f"{name}: left over", as_maps(left_L1, config)))
        rows.append(("its codes", as_maps(codes_L3, config)))
        rows.append(("image so far", frames_K))
    return grid(rows)


def draw_teaching(run, given) -> Image.Image:
    """Teacher forcing: what the transformer reads for each scale, above what it has to predict."""
    config = run.model.config
    _, tokens_1L = run.encode(given.images[:1])
    inputs = run.tokenizer.teacher_inputs(tokens_1L.to(run.machine.device))
    size_L = inputs[0].norm(dim=-1)
    size_L = F.pad(size_L, (1, 0), value=size_L.max())   # the first scale reads the class
    codes_L3 = code_colours(run.tokenizer.quantizer.codebook_VC)[tokens_1L[0]]
    return grid([("reads (first: the class)", as_maps(heat(size_L), config)),
                 ("has to predict", as_maps(codes_L3, config))])


def as_maps(x_L: Tensor, config) -> list[Tensor]:
    """Something of every token, [L, ...], as a map [s, s, ...] for each scale of the config."""
    return [x_L[span].unflatten(0, (s, s)) for span, s in zip(config.spans, config.scales)]


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


def draw_attention(run, images: Tensor, label: int, cell: tuple[int, int] | None) -> Image.Image:
    """What a cell of the last scale attends to: a row per layer, over heads, a column per scale.

    Maps are as bright as their largest weight; the share that each scale gets is printed. Of the
    images it is the first; cell: (y, x), if not the middle.
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
    table = {"attention to": [f"{s}x{s}" for s in config.scales]}
    shown = np.linspace(0, config.depth - 1, min(8, config.depth))
    for layer in shown.round().astype(int):
        name = f"layer {layer + 1}"
        maps = as_maps(layers[layer], config)
        rows.append((name, [marked, *map(heat, maps)]))
        table[name] = [f"{weights_ss.sum():.0%}" for weights_ss in maps]
    say_table(table)
    return grid(rows)


@torch.no_grad()
def attention_weights(
    model: nn.Module, labels_B: Tensor, inputs: Tensor, query: int
) -> list[Tensor]:
    """What one token attends to in each layer: weights [L], averaged over heads, on the CPU.

    model: a var.VAR. labels_B, inputs: of one image, as in its `forward`.
    """
    visible_L = model.ranges.dense()[query].to(inputs.device)
    layers = []

    def note(attention: nn.Module, arguments: tuple) -> None:
        q_BHLD, k_BHLD, _, scale = attention.project(arguments[0])
        q_HD1 = q_BHLD[0, :, query, :, None]
        scores_HL = scale * (k_BHLD[0] @ q_HD1).squeeze(-1).float()
        weights_HL = scores_HL.masked_fill(~visible_L, -torch.inf).softmax(dim=-1)
        layers.append(weights_HL.mean(dim=0).cpu())

    hooks = [block.attention.register_forward_pre_hook(note) for block in model.blocks]
    model(labels_B, inputs)
    for hook in hooks:
        hook.remove()
    return layers


def outlined(images: Tensor, y: int, x: int, size: int) -> np.ndarray:
    """The first image as bytes [side, side, 3], with a frame around the cell (y, x)."""
    image = Image.fromarray(in_colour(to_bytes(images[:1])[0]))
    left = x * size
    top = y * size
    corners = (left, top, left + size - 1, top + size - 1)
    ImageDraw.Draw(image).rectangle(corners, outline="red")
    return np.asarray(image)


def draw_curves(log: list[dict], scales: tuple[int, ...]):
    """A matplotlib figure of the values in a training's log, against the step.

    Both losses, and the transformer's loss and accuracy per scale; and how the discriminator does,
    if there is one.
    """
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
