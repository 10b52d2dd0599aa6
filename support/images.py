"""Files to images, bytes to floats and back, and pictures of many images: grids and films."""
from __future__ import annotations

import functools
import io
import math
import textwrap
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from support.checkpoint import save_whole
from support.cli import UserError, in_short
from support.devices import check_memory, progress_bar, say

NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}   # known to Pillow, but not read by it
SYSTEM_NAMES = {   # of folders that are no data, and may hold images
    "__macosx", "__pycache__", "@eadir", "@tmp", "#recycle", "#snapshot", "~snapshot", "lost+found",
    "$recycle.bin", "recycler", "system volume information", "network trash folder",
    "temporary items",
}
# Of over 89 megapixels, which a scan may have; twice as many are an error, and told.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


@functools.cache
def image_endings() -> set[str]:
    """The endings of files that Pillow reads here: in small letters, with their dot."""
    formats = Image.registered_extensions()   # which loads all of Pillow's readers
    read = {*Image.OPEN} - NO_PICTURES
    return {ending for ending, name in formats.items() if name in read}


def composed(name: str) -> str:
    """A name with accents in their letters, as keyboards write them; Macs keep them apart."""
    return unicodedata.normalize("NFC", name)


class Walk:
    """A look through a folder for its sub-folders and images, which counts what it passes over.

    Links are followed, but no real folder is met twice, nor are links inside of `root`: so loops
    end, and no class gets the images of another.
    """

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.met = {self.root}
        self.passed_over = Counter()

    def look(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """The sub-folders of a folder and the images in it, both by name."""
        found = {"folder": [], "image": []}
        paths = sorted(folder.iterdir(), key=lambda path: composed(path.name))
        for path in paths:
            kind = self.kind(path)
            if kind in found:
                found[kind].append(path)
            else:
                self.passed_over[kind] += 1
        return found["folder"], found["image"]

    def kind(self, path: Path) -> str:
        """A folder, an image, or what else it is, for which it is passed over."""
        ending = path.suffix.lower()
        if path.name.startswith(".") or path.name.lower() in SYSTEM_NAMES:
            return "hidden or the system's"
        if path.is_dir():
            real = path.resolve()
            if real in self.met or path.is_symlink() and real.is_relative_to(self.root):
                return "links to folders that are there already"
            self.met.add(real)
            return "folder"
        if ending not in image_endings():
            return ending or "without an ending"
        return "image" if path.is_file() else "links to nowhere, pipes"

    def images_below(self, folder: Path) -> list[Path]:
        """The images in a folder, then those in its sub-folders."""
        found = []
        left = [folder]
        while left:
            folders, images = self.look(left.pop())
            found += images
            left += reversed(folders)
        return found

    def say_passed_over(self) -> None:
        counts = ", ".join(f"{what}: {count}" for what, count in self.passed_over.most_common())
        if counts:
            say(f"{self.root}: passed over what is no image of it ({in_short(counts)})")


def read_image(path: Path, side: int, channels: int, white: int | None = None) -> np.ndarray:
    """A file as `decode_image` returns it. Raises UserError."""
    return decode_image(read_file(path), path, side, channels, white)


def read_file(path: Path) -> bytes:
    """Raises UserError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}")


def decode_image(
    content: bytes, path: Path, side: int, channels: int, white: int | None = None
) -> np.ndarray:
    """What is in a file, centre-cropped and resized: uint8 [channels, side, side].

    white: of grey files whose 16 bits are not all used, 4095 for 12 bits say. Raises UserError.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()   # compares a PNG's checksums; afterwards it must be opened anew
        with Image.open(io.BytesIO(content)) as image:
            transparency_in_eight_bits(image)
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                image = in_eight_bits(image, white)
            if image.has_transparency_data:   # what lies under it was never meant to be seen
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB" if channels == 3 else "L")
            pixels = np.array(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))
    except Exception as error:   # damaged files make Pillow raise nearly anything
        unknown = isinstance(error, UnidentifiedImageError)   # whose text has no name of a file
        told = "Pillow knows no such format" if unknown else in_short(error)
        raise UserError(f"{path} cannot be read as an image: {told}")
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))


def transparency_in_eight_bits(image: Image.Image) -> None:
    """A PNG names its transparent colour in the bits of the file; Pillow compares it in eight."""
    if image.format == "PNG" and "transparency" in image.info:
        colour = image.info["transparency"]
        match image.tile[0].args:
            case "L;2":
                colour *= 85
            case "L;4":
                colour *= 17
            case "RGB;16B":
                colour = tuple(value >> 8 for value in colour)
        image.info["transparency"] = colour


def in_eight_bits(image: Image.Image, white: int | None) -> Image.Image:
    """Grey of 16 bits, or of real numbers up to 1 or 255, which Pillow would clip at 255."""
    values_HW = np.asarray(image, np.float64)
    if white is None:
        brightest = values_HW[np.isfinite(values_HW)].max(initial=0)
        of_one = image.mode == "F" and brightest <= 2   # resizing leaves some a little over 1
        white = 1 if of_one else 255 if image.mode == "F" else 65535
    grey_HW = np.nan_to_num(values_HW * 255 / white).round().clip(0, 255)
    opaque_HW = 255 * (values_HW != image.info.get("transparency"))
    return Image.fromarray(np.dstack([grey_HW, opaque_HW]).astype(np.uint8))


def read_mask(path: Path, side: int) -> np.ndarray:
    """A file, in which something is painted: bool [side, side], true where. Raises UserError.

    Where some of it is transparent, what is opaque is painted, in whatever colour; else what is
    not dark is.
    """
    content = read_file(path)   # once: it may come through a pipe
    painted_HW = decode_image(content, path, side, 3).max(axis=0) >= 128
    with Image.open(io.BytesIO(content)) as image:
        alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    alpha = ImageOps.fit(alpha, (side, side), Image.Resampling.LANCZOS)
    opaque_HW = np.asarray(alpha) >= 128
    return painted_HW if opaque_HW.all() else opaque_HW


def read_images(
    source: Path, side: int, channels: int, white: int | None = None
) -> list[tuple[Tensor, str]]:
    """An image file, or all in a folder and below it: bytes [channels, side, side] and the name of
    each. Files of a folder that cannot be read are named and left out, and what is no image is
    counted and said. Raises UserError if none is left.
    """
    if not source.is_dir():
        pixels = read_image(source, side, channels, white)
        return [(torch.from_numpy(pixels), source.stem)]
    walk = Walk(source)
    paths = walk.images_below(source)
    walk.say_passed_over()
    found = []
    for path in paths:
        try:
            pixels = read_image(path, side, channels, white)
            found.append((torch.from_numpy(pixels), path.stem))
        except UserError as error:
            print(f"left out: {error}")
    if not found:
        raise UserError(f"{source} holds no image that can be read")
    return found


def to_float(images: Tensor) -> Tensor:
    """Bytes to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> np.ndarray:
    """[-1, 1] to bytes [N, side, side, channels], on the CPU."""
    pixels = (images.float() + 1) * 127.5
    pixels = pixels.round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def at_a_time(side: int) -> int:
    """How many images a pass without gradients takes: 512 of 32 x 32 pixels, 8 of 256 x 256."""
    return max(1, 2**19 // side**2)


def batches(count: int, size: int, what: str | None = None) -> Iterable[slice]:
    """Rows 0 .. count-1, `size` at a time; behind a progress bar if what is done has a name."""
    begins = range(0, count, size)
    some = [slice(begin, begin + size) for begin in begins]
    if what and len(some) > 1:
        return progress_bar(some, desc=what, unit="batch")
    return some


class Row(NamedTuple):
    """A row of a picture: images, bytes [side, side, 1 or 3], and what is written beside and above
    them. (Captions that are those of the row above are not written again.)"""
    label: str
    images: Sequence[np.ndarray | Tensor]
    captions: Sequence[str] = ()


def save_picture(path: Path, picture, save: Callable = save_whole) -> None:
    """A Pillow image, or a matplotlib figure, as PNG. save: what writes it, `save_told` if the user
    asked for it."""
    write = picture.save if isinstance(picture, Image.Image) else picture.savefig
    save(path, lambda file: write(file, format="png"))


def save_film(path: Path, rows: list[Row], per_class: int, cell: int | None = None,
              note: str = "") -> None:
    """A GIF whose frames are the columns of a picture, by its captions; it stays at the last for a
    while. So many rows, of a class, are one of the film's. note: see `grid`.

    Raises UserError where a GIF cannot be as large.
    """
    labels = [row.label for row in rows[::per_class]]
    columns = zip(*(row.images for row in rows))
    notes = ["   ".join(filter(None, (caption, note))) for caption in rows[0].captions]
    frames = (grid(rows_of_classes(labels, np.stack(column)), cell, text)
              for text, column in zip(notes, columns))
    first = next(frames)
    if max(first.size) >= 2**16:
        raise UserError(f"{path} would be a film of {first.width} x {first.height} pixels, and a "
                        f"GIF has at most 65535 a side; draw fewer images, or smaller ones")
    times = [400] * (len(notes) - 1) + [2000]   # milliseconds
    save_told(path, lambda file: first.save(
        file, "GIF", save_all=True, append_images=frames, duration=times, loop=0))


def save_told(
    path: Path, write: Callable[[BinaryIO], None], what: str = ""
) -> None:
    """Save a file the user asked for, and say so, and whether an older one has made way for it."""
    replaced = ", in place of an older one" if path.exists() else ""
    save_whole(path, write)
    print(f"wrote {what}{path}{replaced}")


def save_npz(path: Path, images: np.ndarray) -> None:
    """`arr_0`, uint8 [N, side, side, 3], as ADM's evaluation reads it (arXiv 2105.05233).

    The rows are shuffled, always alike: that program takes the Inception Score of each 5,000 rows
    and averages, so each must hold all classes.
    """
    order_N = np.random.default_rng(0).permutation(len(images))
    pixels = in_colour(images[order_N])
    save_told(path, lambda file: np.savez(file, arr_0=pixels), f"{len(images)} images to ")


GAP = 4        # pixels between images: a frame around each, and white
LETTERS = 13   # the size of letters
LINE = 17      # the height of a line of them


def grid(rows: list[Row], cell: int | None = None, note: str = "") -> Image.Image:
    """An image of rows of images: each in a thin frame, small ones enlarged.

    cell: the side of each in pixels; if None, see `cell_size`. note: what is written above all.
    """
    columns = max(len(row.images) for row in rows)
    largest = max(len(pixels) for row in rows for pixels in row.images)
    cell = cell or cell_size(largest, max(columns, len(rows)))
    step = cell + GAP
    check_memory(12 * len(rows) * columns * step**2, "pictures of this --cell-size")
    height = max(step, LINE)
    font = ImageFont.truetype(label_font(), LETTERS)
    labels = [wrapped(row.label, font, 200, height // LINE) for row in rows]
    lines = "\n".join(labels).split("\n")
    margin = 8 + math.ceil(max(map(font.getlength, lines)))
    note_width = 8 + math.ceil(font.getlength(note))
    width = max(margin + columns * step, note_width)

    above = LINE + 4 if note else 0
    strip = Image.new("RGB", (width, above), "white")
    ImageDraw.Draw(strip).text((4, 4), note, "black", font)
    strips = [strip]
    written = ()
    for row, label in zip(rows, labels):
        captions = row.captions if row.captions != written else ()
        captions = [wrapped(text, font, cell, 2) for text in captions]
        written = row.captions
        heights = [text.count("\n") + 1 for text in captions]
        above = LINE * max(heights, default=0)
        strip = Image.new("RGB", (width, above + height), "white")
        draw = ImageDraw.Draw(strip)
        draw.text((4, above + height // 2), label, "black", font, "lm")
        for i, text in enumerate(captions):
            middle = margin + i * step + step // 2
            draw.text((middle, above), text, "black", font, "md", align="center")
        for i, pixels in enumerate(row.images):
            left = margin + i * step + 1
            image = Image.fromarray(in_colour(np.asarray(pixels)))
            image = image.resize((cell, cell), Image.Resampling.BOX)   # enlarged, pixels stay sharp
            image = ImageOps.expand(image, 1, "silver")
            strip.paste(image, (left, above + 1))
        strips.append(strip)
    return Image.fromarray(np.concatenate(strips))


def cell_size(side: int, count: int) -> int:
    """A multiple of the images' side, so that all their pixels are as large: the largest up to 160
    at which so many are up to 900, as on a screen; but at least 96."""
    largest = min(160, 900 // count) // side
    least = math.ceil(96 / side)
    return side * max(largest, least)


def wrapped(text: str, font: ImageFont.FreeTypeFont, pixels: int, lines: int) -> str:
    """Each line of it in at most so many lines of so many pixels; what is more is cut off."""
    fitting = []
    for part in text.split("\n"):
        for letters in range(max(1, len(part)), 0, -1):
            some = textwrap.wrap(part, letters)
            if max(map(font.getlength, some), default=0) <= pixels:
                break
        fitting += some[:lines]
    return "\n".join(fitting)


def label_font() -> Path:
    """Matplotlib brings a font with Greek, Cyrillic, Hebrew and Arabic letters."""
    import matplotlib
    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def legible(name: str, number: int) -> str:
    """A label: the name, with its number beside it where the font lacks a letter of it."""
    from matplotlib.ft2font import FT2Font
    letters = FT2Font(str(label_font())).get_charmap()
    name = composed(name)   # else accents lie beside their letters
    return name if all(ord(letter) in letters for letter in name) else f"{number} {name}"


def in_colour(images: np.ndarray) -> np.ndarray:
    """Bytes [..., side, side, 1 or 3] as [..., side, side, 3]."""
    return np.broadcast_to(images, (*images.shape[:-1], 3))


def rows_of_classes(names: list[str], images: np.ndarray) -> list[Row]:
    """A row per class of images that are sorted by class, as many of each."""
    by_class = np.split(images, len(names))
    return list(map(Row, names, by_class))


def rows_of_pairs(
    originals: Tensor, results: Tensor, captions: Sequence[str] = ()
) -> list[Row]:
    """Originals above what became of them, eight in a row. captions: of each pair, if any."""
    rows = []
    for some in batches(len(originals), 8):
        rows.append(Row("original", to_bytes(originals[some]), captions[some]))
        rows.append(Row("reconstruction", to_bytes(results[some])))
    return rows
