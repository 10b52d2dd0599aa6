"""Files to images, bytes to floats and back, and pictures of many images: grids and films."""
from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm import tqdm

from support.checkpoint import save_whole
from support.cli import UserError, in_short

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


def read_mask(path: Path, side: int) -> np.ndarray:
    """A file, in which something is painted: bool [side, side], true where. Raises UserError.

    Where some of it is transparent, what is opaque is painted, in whatever colour; else what is
    not dark is.
    """
    painted_HW = read_image(path, side, 3).max(axis=0) >= 128
    with Image.open(path) as image:
        if image.has_transparency_data:
            alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
            alpha = ImageOps.fit(alpha, (side, side), Image.Resampling.LANCZOS)
            opaque_HW = np.asarray(alpha) >= 128
            if not opaque_HW.all():
                return opaque_HW
    return painted_HW


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
    font = ImageFont.truetype(label_font(), 11)
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


def label_font() -> Path:
    """Matplotlib brings a font with Greek, Cyrillic, Hebrew and Arabic letters."""
    import matplotlib
    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def legible(name: str, number: int) -> str:
    """A label: the name, with its number beside it where the font lacks a letter of it."""
    from matplotlib.ft2font import FT2Font
    letters = FT2Font(str(label_font())).get_charmap()
    name = unicodedata.normalize("NFC", name)   # else accents lie beside their letters
    return name if all(ord(letter) in letters for letter in name) else f"{number} {name}"


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
