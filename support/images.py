"""Files to images, bytes to floats and back, and pictures of many images: grids and films."""
from __future__ import annotations

import functools
import io
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from support.checkpoint import save_whole
from support.cli import UserError, in_short
from support.devices import say

NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}   # known to Pillow, but not read by it
SYSTEM_NAMES = {
    "__macosx", "__pycache__", "@eadir", "@tmp", "#recycle", "#snapshot", "~snapshot", "lost+found",
    "$recycle.bin", "recycler", "system volume information", "thumbs.db", "ehthumbs.db",
    "desktop.ini", "icon\r", "network trash folder", "temporary items",
}


@functools.cache
def image_endings() -> set[str]:
    """The endings of files that Pillow reads here: in small letters, with their dot."""
    formats = Image.registered_extensions()   # which loads all of Pillow's readers
    return {ending for ending, name in formats.items() if name in {*Image.OPEN} - NO_PICTURES}


def composed(name: str) -> str:
    """Letters with their accents in one, as keyboards write them, and not apart as Macs keep them."""
    return unicodedata.normalize("NFC", name)


class Walk:
    """A look through a folder for its images and sub-folders, which counts what it passes over.

    Hidden names and those of the system are no data, wherever they are. Links are followed; a real
    folder is taken once, so that loops end and no class gets the images of another.
    """

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.seen = {self.root}
        self.passed_over: Counter[str] = Counter()

    def look(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """The sub-folders of a folder and the images in it, both by name."""
        folders = []
        images = []
        for entry in sorted(os.scandir(folder), key=lambda entry: composed(entry.name)):
            path = Path(entry.path)
            reason = self.reason_against(entry, path)
            if reason:
                self.passed_over[reason] += 1
            elif path.suffix.lower() in image_endings() and not is_folder(entry):
                images.append(path)
            else:
                self.seen.add(path.resolve())
                folders.append(path)
        return folders, images

    def reason_against(self, entry: os.DirEntry, path: Path) -> str | None:
        if path.name.startswith(".") or path.name.lower() in SYSTEM_NAMES:
            return "hidden or the system's"
        if is_folder(entry):
            real = path.resolve()
            inside = entry.is_symlink() and real.is_relative_to(self.root)
            return "links to folders that are there already" if inside or real in self.seen else None
        if path.suffix.lower() not in image_endings():
            return f"{path.suffix.lower() or 'no ending'}"
        whole = entry.is_file(follow_symlinks=False) or path.is_file()
        return None if whole else "links to nowhere, pipes"

    def images_below(self, folder: Path) -> list[Path]:
        """The images in a folder, then those in its sub-folders."""
        folders, images = self.look(folder)
        for below in folders:
            images += self.images_below(below)
        return images

    def say_passed_over(self) -> None:
        counts = ", ".join(f"{reason}: {count}" for reason, count in self.passed_over.most_common())
        if counts:
            say(f"{self.root}: passed over what is no image ({in_short(counts)})")


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is one or a link to one, at the price of a look at the disk for links alone."""
    return entry.is_dir(follow_symlinks=False) or entry.is_symlink() and os.path.isdir(entry.path)


def image_paths(folder: Path) -> list[Path]:
    """The images in a folder and below it; what else is there is counted and said.

    Raises UserError if there are none.
    """
    walk = Walk(folder)
    found = walk.images_below(folder)
    walk.say_passed_over()
    if not found:
        raise UserError(f"{folder} holds no images")
    return found


def read_image(path: Path, side: int, channels: int, white: int | None = None) -> np.ndarray:
    """A file as `decode_image` returns it. Raises UserError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}")
    return decode_image(content, path, side, channels, white)


def decode_image(
    content: bytes, path: Path, side: int, channels: int, white: int | None = None
) -> np.ndarray:
    """What is in a file, centre-cropped and resized: uint8 [channels, side, side].

    white: of grey files of 16 bits that do not use them all, 4095 for 12 bits say. Raises UserError.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()   # compares a PNG's checksums; afterwards it must be opened anew
        with Image.open(io.BytesIO(content)) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                image = eight_bits(image, white)
            if image.has_transparency_data:   # what lies under it was never meant to be seen
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB" if channels == 3 else "L")
            pixels = np.array(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))
    except UnidentifiedImageError:
        raise UserError(f"{path} cannot be read as an image: Pillow knows no such format")
    except Exception as error:   # damaged files make Pillow raise nearly anything
        raise UserError(f"{path} cannot be read as an image: {in_short(error)}")
    return np.atleast_3d(pixels).transpose(2, 0, 1)


def eight_bits(image: Image.Image, white: int | None) -> Image.Image:
    """Grey of 16 bits, or of real numbers, which Pillow would clip at 255."""
    values_HW = np.nan_to_num(np.asarray(image, np.float64))
    white = white or (255 if image.mode == "F" else 65535)
    grey_HW = (values_HW * 255 / white).round().clip(0, 255)
    opaque_HW = 255 * (values_HW != image.info.get("transparency"))
    return Image.fromarray(np.dstack([grey_HW, opaque_HW]).astype(np.uint8))


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
