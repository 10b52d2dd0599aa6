"""The explorer: one page, opened in a browser, on which a run is looked into by touch.

Everything on it is computed here and embedded, as pictures and as numbers; explorer.html, the
template, shows it. Read `explore`, then `about`, what a section is made of.

run: a sample.Run. Probabilities, and other shares, are embedded in 1/10,000.
"""
from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from support.checkpoint import save_whole
from support.devices import progress_bar
from support.figures import attention_weights, code_colours, evenly
from support.images import to_float

TEMPLATE = Path(__file__).with_name("explorer.html")
MOST_BYTES = 4_000_000
GENERATED = 20             # images, at most
HELD_OUT = 4
DRAWS = 8                  # continuations of the same scales
LISTED = 10                # codes of a cell
COLUMNS = 8                # of tiles in a picture of many
LOSSLESS = 64              # the largest side of tiles that are kept bit for bit
DRAWN = 128                # the largest side of continuations
MOST_PIXELS = 3 * 2**20    # of all pictures in which a token is replaced
MOST_WEIGHTS = 3 * 2**19   # of attention, for each image
LEVELS = 63                # of a weight's square root


def explore(run, path: Path, labels: Sequence[int] | None, seed: int) -> None:
    """Write the page, with as many images as there is room for.

    labels: the classes of generated images; None: all, or 20 that lie evenly among them.
    """
    config = run.model.config
    if not labels:
        labels = evenly(config.classes, GENERATED)
    wanted = chosen(run, labels)
    ways = ways_to_draw(run)
    layers, heads = attention_shown(config)
    template = TEMPLATE.read_text("utf-8")
    page = {
        "run": run.folder.resolve().name,
        "scales": config.scales,
        "vocabulary": config.vocabulary,
        "depth": config.depth,
        "colours": code_colours(run.tokenizer.quantizer.codebook_VC).tolist(),
        "layers": [layer + 1 for layer in layers],
        "heads": heads,
        "ways": list(ways),
        "wanted": len(wanted),
        "images": [],
    }
    images = page["images"]
    room = MOST_BYTES - len(template.encode()) - len(as_json(page))
    for name, label, row in progress_bar(wanted, "explore", unit="image"):
        own_seed = seed + label
        tokens_1L = tokens_of(run, label, row, own_seed)
        sections = about(run, label, tokens_1L, ways.values(), own_seed)
        image = {"name": name, **sections}
        room -= len(as_json(image)) + 1
        if room < 0 and images:   # at least one
            break
        images.append(image)
    written = template.replace("{{DATA}}", as_json(page)).encode()
    save_whole(path, lambda file: file.write(written))
    if len(images) < len(wanted):
        print(f"{len(images)} of {len(wanted)} images: there is no room for more in 4 MB")
    print(f"wrote {path}, to be opened in a browser")


def as_json(value) -> str:
    """ASCII, and nothing in it that HTML would take for the end of a script."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def chosen(run, labels: Sequence[int]) -> list[tuple[str, int, int | None]]:
    """Name, class and held-out number of images: generated ones, which have none, and after each of
    the first few a held-out one of its class, so that there are both where room is short."""
    known = []
    if run.held_out is not None:
        known = run.held_out.tensors[1].tolist()
    found = []
    for i, label in enumerate(labels):
        found.append((run.classes[label], label, None))
        if i < HELD_OUT and label in known:
            found.append((f"{run.classes[label]}, held-out", label, known.index(label)))
    return found


def tokens_of(run, label: int, row: int | None, seed: int) -> Tensor:
    """[1, L], of a held-out image, or of a new one of that class."""
    if row is None:
        return run.generate([label], seed)
    pixels, _ = run.held_out[row]
    return run.encode(to_float(pixels[None]))[1]


def about(run, label: int, tokens_1L: Tensor, ways: Sequence, seed: int) -> dict:
    """All that the page shows of an image: an entry, or a few, for each of its five sections."""
    frames = np.concatenate(run.after_each_scale(tokens_1L))
    device = run.machine.device
    labels_2 = torch.tensor([label, run.model.config.classes], device=device)
    inputs = run.tokenizer.teacher_inputs(tokens_1L.to(device))
    found = chances(run, labels_2, inputs, tokens_1L[0])
    drawn = [replace(run, sampling=way).generate([label], seed) for way in ways]
    compared = run.decode_to_bytes(torch.cat(drawn))
    return found | continued(run, label, tokens_1L, seed) | {
        "tokens": tokens_1L[0].tolist(),
        "frames": as_picture(frames),
        "replaced": replaced(run, tokens_1L, found["instead"], frames[-1]),
        "attention": attention(run, labels_2[:1], inputs),
        "compared": as_picture(compared, DRAWN),
    }


# --------------------------------------------------------------------------------------------------
# A token; guidance and filters


@torch.no_grad()
def chances(run, labels_2: Tensor, inputs: Tensor, tokens_L: Tensor) -> dict:
    """The distribution of every token given the coarser scales, without guidance and with it.

    labels_2: the class and the null class. Returns, for each token:
    own, rank: its probability and place, without guidance. entropy: in 1/100 nats.
    instead: the likeliest code but itself.
    likely: the likeliest codes without guidance, and their probabilities.
    guided: those with guidance, and their probabilities without it and with it.
    kept, held: how many of these codes the filters leave, and their probability with guidance.
    """
    config = run.model.config
    sampling = run.sampling
    with run.machine.autocast():
        logits_2LV = run.model(labels_2, inputs.expand(2, -1, -1))
    cond_LV, null_LV = logits_2LV.cpu().double()   # Apple's GPU has no fp64
    level_L1 = run.model.level_L.cpu()[:, None]
    fineness_L1 = run.model.fineness(level_L1, sampling.growth)
    plain_LV = cond_LV.softmax(dim=1)
    guidance_L1 = sampling.cfg * fineness_L1
    guided_LV = (cond_LV + guidance_L1 * (cond_LV - null_LV)).softmax(dim=1)
    own_L1 = plain_LV.gather(1, tokens_L[:, None])
    likely_LX = plain_LV.topk(min(LISTED, config.vocabulary))
    ranked_LV, codes_LV = guided_LV.sort(descending=True, stable=True)
    codes_LX = codes_LV[:, :LISTED]
    first, last = np.broadcast_to(sampling.top_p, 2)   # of the first and of the last scale
    top_p_L1 = first + (last - first) * fineness_L1
    within_LV = ranked_LV[:, :sampling.top_k or None]
    before_LV = within_LV.cumsum(dim=1) - within_LV
    target_L1 = within_LV.sum(dim=1, keepdim=True) * top_p_L1
    kept_LV = (before_LV < target_L1) | (top_p_L1 == 1)   # as in sample_tokens: 1 keeps all,
    kept_LV[:, 0] = True                                  # and 0 the likeliest
    rank_L = (plain_LV > own_L1).sum(dim=1) + 1
    entropy_L = torch.special.entr(plain_LV).sum(dim=1)
    others_LV = plain_LV.scatter(1, tokens_L[:, None], -1)
    return {
        "own": shares(own_L1[:, 0]),
        "rank": rank_L.tolist(),
        "entropy": (100 * entropy_L).round().int().tolist(),
        "instead": others_LV.argmax(dim=1).tolist(),
        "likely": [likely_LX.indices.tolist(), shares(likely_LX.values)],
        "guided": [codes_LX.tolist(), shares(plain_LV.gather(1, codes_LX)),
                   shares(ranked_LV[:, :LISTED])],
        "kept": kept_LV.sum(dim=1).tolist(),
        "held": shares((within_LV * kept_LV).sum(dim=1)),
    }


def shares(p: Tensor) -> list:
    return (10_000 * p).round().int().tolist()


def replaced(run, tokens_1L: Tensor, instead: list[int], image: np.ndarray) -> str:
    """For each token the image with another in its place, less the image: 128 + half of it. The
    last tile is the image."""
    L = len(instead)
    tokens_LL = tokens_1L.repeat(L, 1)
    tokens_LL[range(L), range(L)] = torch.tensor(instead)
    side = len(image)
    while L * side**2 > MOST_PIXELS:
        side //= 2
    images = run.decode_to_bytes(tokens_LL)
    changes = 128 + (images - image.astype(np.float32)) / 2
    return as_picture(np.concatenate([changes, image[None]]), side)


def ways_to_draw(run) -> dict:
    """A sample.Sampling by name: nothing, guidance, the filters one by one, and two extremes.

    The one that is called "as above" is that of all other images.
    """
    own = run.sampling
    bare = replace(own, cfg=0.0, top_k=0, top_p=1.0)
    guided = f"guidance {own.cfg:g}"
    ways = {"no guidance": bare, guided: replace(bare, cfg=own.cfg)}
    if 0 < own.top_k < run.model.config.vocabulary:
        guided += f", top-k {own.top_k}"
        ways[guided] = replace(own, top_p=1.0)
    first, last = np.broadcast_to(own.top_p, 2)
    ways[f"{guided}, top-p {first:g} to {last:g}, as above"] = own
    ways["the same, guidance 8"] = replace(own, cfg=8.0)
    ways["always the likeliest code"] = replace(own, top_k=1)
    return ways


# --------------------------------------------------------------------------------------------------
# Where it looks


def attention_shown(config) -> tuple[list[int], int]:
    """Which layers, and how many heads of each: one that is their mean, where tokens are many."""
    maps = MOST_WEIGHTS // config.length**2
    heads = config.heads if config.depth * config.heads <= maps else 1
    return evenly(config.depth, maps), heads


def attention(run, labels_1: Tensor, inputs: Tensor) -> str:
    """Maps [L, L]: how much each token attends to each, of every head of every layer.

    A row's weights are in shares of the largest (the page makes their sum 1), as square roots,
    which give the small ones their due.
    """
    layers, heads = attention_shown(run.model.config)
    with run.machine.autocast():
        maps = attention_weights(run.model, labels_1, inputs, layers)
    if not maps:
        return ""
    if heads == 1:
        maps = [weights_HLL.mean(dim=0, keepdim=True) for weights_HLL in maps]
    maps_NLL = torch.cat(maps)
    largest_NL1 = maps_NLL.amax(dim=-1, keepdim=True)
    maps_NLL = (maps_NLL / largest_NL1).sqrt()
    return as_picture(LEVELS * maps_NLL[..., None].numpy())


# --------------------------------------------------------------------------------------------------
# What is decided when


@dataclass
class Beginning:
    """Of each image the scales that are given; the rest is drawn. See `VAR.generate`: known."""
    tokens_1L: Tensor
    scales_B1: Tensor   # how many

    def put(self, drawn_Bl: Tensor, quantizer, f_hat_BCSS: Tensor, k: int) -> Tensor:
        own_1l = quantizer.split(self.tokens_1L)[k]
        return torch.where(k < self.scales_B1, own_1l, drawn_Bl)


def continued(run, label: int, tokens_1L: Tensor, seed: int) -> dict:
    """Draws that begin with the image's first 0, 1, ... K-1 scales; and their spread, the standard
    deviation of a pixel over them, of black to white."""
    K = len(run.model.config.scales)
    scales_K = torch.arange(K, device=run.machine.device)
    scales_N1 = scales_K.repeat_interleave(DRAWS)[:, None]
    tokens_1L = tokens_1L.to(run.machine.device)
    tokens_NL = run.generate([label] * len(scales_N1), seed,
                             lambda rows: Beginning(tokens_1L, scales_N1[rows]))
    images = run.decode_to_bytes(tokens_NL)
    by_scales = torch.from_numpy(images / 255).reshape(K, DRAWS, -1)
    spread_K = by_scales.std(dim=1, correction=0).mean(dim=1)
    return {"continued": as_picture(images, DRAWN), "spread": shares(spread_K)}


def as_picture(tiles: np.ndarray, most: int = 2**14) -> str:
    """Many tiles, [N, side, side, channels] of 0 to 255, in one picture, as an address that holds
    it. most: the side to which larger tiles are averaged down (WebP has no larger)."""
    tiles = torch.from_numpy(tiles).float().permute(0, 3, 1, 2)
    side = min(tiles.shape[-1], most)
    tiles = F.interpolate(tiles, size=(side, side), mode="area")
    tiles = tiles.round().clamp(0, 255).byte()
    lacking = -len(tiles) % COLUMNS
    tiles = F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, lacking))
    tiles = tiles.unflatten(0, (-1, COLUMNS))            # [rows, COLUMNS, channels, side, side]
    pixels = tiles.permute(0, 3, 1, 4, 2)                # [rows, side, COLUMNS, side, channels]
    pixels = pixels.flatten(2, 3).flatten(0, 1)
    pixels = pixels.squeeze(-1).numpy()
    file = io.BytesIO()
    lossless = side <= LOSSLESS or pixels.ndim == 2
    Image.fromarray(pixels).save(file, "WEBP", lossless=lossless, quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
