"""Folders of images, one sub-folder for each class: decoded once, or read as training goes.

Threads read image files: Pillow lets go of Python's lock while it decodes and resizes, so they keep
as many cores busy as processes would, and need no shared memory.
"""
from __future__ import annotations

import hashlib
import math
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain, islice, zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from support.checkpoint import load_checkpoint, save_checkpoint, save_whole
from support.cli import UserError, in_short
from support.devices import progress_bar, rank_and_world, say
from support.images import Walk, composed, decode_image, read_file

HELD_OUT_SHARE = 20             # one image of so many of a class is held out, ...
HELD_OUT_IMAGES = 10_000        # ... at most so many in all, ...
HELD_OUT_BYTES = 2**28          # ... and at most so many bytes of them
OTHER_THAN_TRAIN = ("val", "valid", "validation", "test")   # folders that may lie beside `train`
DARK = 65                       # of 255: less than this is what files of 10, 12 or 14 bits come to


class File(NamedTuple):
    label: int
    path: Path
    name: str    # its path from the root, the same wherever the folder lies
    size: int
    time: int    # when it was changed

    def record(self, *more: Any) -> bytes:
        """What a digest takes in of a file."""
        return repr((self.label, self.name, self.size, *more)).encode()


@dataclass(frozen=True)
class Form:
    """What files are made into: bytes [channels, side, side]."""
    side: int
    channels: int
    white: int | None = None   # of grey files of 16 bits; None is 65535

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.side, self.side

    def read(self, file: File) -> tuple[np.ndarray, bytes]:
        """The image, and the digest of what is in the file. Raises UserError."""
        content = read_file(file.path)
        image = decode_image(content, file.path, self.side, self.channels, self.white)
        return image, hashlib.sha256(content).digest()


def read_ahead(read: Callable, items: Iterable, workers: int) -> Iterator[Any]:
    """read(item) for each, in their order; with workers, so many threads read those that follow."""
    if not workers:
        yield from map(read, items)
        return
    items = iter(items)
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = deque(pool.submit(read, item) for item in islice(items, 2 * workers))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(read, item) for item in islice(items, 1))
            yield result
    finally:   # whatever ended it: nobody wants the rest
        pool.shutdown(wait=False, cancel_futures=True)


# --------------------------------------------------------------------------------------------------
# Which files there are


@dataclass
class Listing:
    """The files of each class."""
    classes: list[str]
    train: list[list[File]]
    held_out: list[list[File]] | None = None   # None: some of those to train on are held out

    def made_of(self, form: Form) -> str:
        """What decoded files are known by; of files that were copied it is another."""
        digest = hashlib.sha256(repr((form, self.classes)).encode())
        for file in chain(*self.train, *(self.held_out or [])):
            digest.update(file.record(file.time))
        return digest.hexdigest()


def list_folder(root: Path) -> Listing:
    """One sub-folder for each class; or as ImageNet has them, all in `train` and perhaps in `val`
    again. Raises UserError for anything else."""
    walk = Walk(root)
    folders, _ = walk.look(root)
    by_name = {folder.name.lower(): folder for folder in folders}
    with_images = {name for name, folder in by_name.items()   # in itself, not below
                   if any(walk.kind(path) == "image" for path in folder.iterdir())}
    beside = []
    if "train" in by_name and with_images <= {*OTHER_THAN_TRAIN}:
        root = by_name["train"]
        say(f"{root} is trained on")
        beside = [by_name[name] for name in OTHER_THAN_TRAIN if name in by_name]
    elif not with_images:
        names = in_short(", ".join(by_name), 60) or "there are none"
        raise UserError(f"no sub-folder of {root} ({names}) holds images; --data names the folder "
                        f"whose sub-folders are the classes, with images in them")
    files = files_of_classes(root)
    listing = Listing(list(files), list(files.values()))
    for folder in beside:
        held_out = files_of_classes(folder)
        if held_out.keys() == files.keys() and all(held_out.values()):
            say(f"{folder} is held out")
            listing.held_out = list(held_out.values())
            break
        say(f"{folder} does not have images of the same classes, and is passed over")
    return listing


def files_of_classes(root: Path) -> dict[str, list[File]]:
    """The files of each class, by its name. Folders whose names look the same are one class."""
    walk = Walk(root)
    folders, loose = walk.look(root)
    if loose:
        walk.passed_over["images beside the folders of classes"] = len(loose)
    files = {}
    for folder in folders:   # by name, so those of one name are neighbours
        own = files.setdefault(composed(folder.name), [])
        for path in walk.images_below(folder):
            status = path.stat()
            below = composed(path.relative_to(root).as_posix())
            own.append(File(len(files) - 1, path, below, status.st_size, status.st_mtime_ns))
    walk.say_passed_over()
    return files


# --------------------------------------------------------------------------------------------------
# From files to images


class FolderImages(Dataset):
    """Image files, read when asked for: rows -> bytes [n, channels, side, side] and labels [n].

    For one that cannot be read, which is named, the next one stands in.
    """

    def __init__(self, files: list[File], form: Form):
        self.files = files
        self.form = form
        self.unreadable = set()   # rows

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        found = [self.first_readable(chain(range(row, len(self)), range(row))) for row in rows]
        if None in found:
            raise UserError(f"none of the {len(self)} images can be read")
        images = np.stack([image for _, image, _ in found])
        labels = [self.files[row].label for row, _, _ in found]
        return torch.from_numpy(images), torch.tensor(labels)

    def first_readable(self, rows: Iterable[int]) -> tuple[int, np.ndarray, bytes] | None:
        """The first of these rows that can be read: its number, image and digest."""
        for row in rows:
            if row not in self.unreadable:
                try:
                    return row, *self.form.read(self.files[row])
                except UserError as error:
                    self.unreadable.add(row)
                    say(f"left out: {in_short(error)}")
        return None

    def names_of_unreadable(self) -> list[str]:
        return [self.files[row].name for row in sorted(self.unreadable)]


@dataclass
class Folder:
    """A folder of images as it is trained on: bytes [n, channels, side, side] and labels [n]."""
    train: Dataset
    held_out: TensorDataset
    digest: str              # names, sizes and content
    unreadable: list[str]    # the names of files that are left out


def load_folder(
    root: Path, form: Form, out: Path, workers: int, stream: bool
) -> tuple[Folder, list[str]]:
    """A folder and the names of its classes.

    It is decoded to files in `out`, unless an earlier run did so. With `stream` only what is held
    out is read now: of twenty images of a class the first that can be read.
    """
    listing = list_folder(root)
    folder = None if stream else load_decoded(out, listing.made_of(form))
    if folder is None:
        folder = read_folder(listing, form, out, workers, stream)
    if folder.unreadable:
        names = in_short(", ".join(folder.unreadable))
        again = "" if stream else f" (remove {out / DECODED} to try again)"
        say(f"{len(folder.unreadable)} images cannot be read and are left out{again}: {names}")
    brightest = folder.held_out.tensors[0].max()
    if brightest < DARK:
        say(f"note: no pixel of the held-out images is over {brightest} of 255; of grey files, not "
            f"of others, --white-level says what is white, 4095 where 12 of 16 bits are used")
    return folder, listing.classes


def read_folder(
    listing: Listing, form: Form, out: Path, workers: int, stream: bool
) -> Folder:
    classes = listing.held_out or listing.train
    images = FolderImages(list(chain(*classes)), form)
    found = hold_out(images, classes, 1 if listing.held_out else HELD_OUT_SHARE, workers)
    if not found:
        raise UserError(f"none of the {len(images)} images can be read")
    rest = list(chain(*listing.train))
    if listing.held_out is None:
        used = found.keys() | images.unreadable
        rest = [file for row, file in enumerate(rest) if row not in used]
    check_classes(listing.classes, [file.label for file in rest])
    digest = hashlib.sha256(repr((form, listing.classes)).encode())
    for row, (_, content) in found.items():
        digest.update(images.files[row].record(content))
    pixels = np.stack([image for image, _ in found.values()])
    labels = torch.tensor([images.files[row].label for row in found])
    train = FolderImages(rest, form)
    if stream:
        for file in rest:
            digest.update(file.record())
        held_out = TensorDataset(torch.from_numpy(pixels), labels)
        return Folder(train, held_out, digest.hexdigest(), images.names_of_unreadable())
    (out / DECODED).unlink(missing_ok=True)   # until what it is about has been written
    save_whole(out / "held_out.npy", lambda file: np.save(file, pixels))
    train_labels, checksum = decode(train, listing.classes, digest, out / "train.npy", workers)
    made_of = listing.made_of(form)
    save_checkpoint(
        out / DECODED, "decoded folder", made_of=made_of, digest=digest.hexdigest(),
        train_labels=train_labels, held_out_labels=labels,
        checksums=[checksum, zlib.crc32(pixels)],
        unreadable=images.names_of_unreadable() + train.names_of_unreadable())
    folder = load_decoded(out, made_of)
    if folder is None:
        raise UserError(f"what was decoded to {out} cannot be read again; --stream reads the "
                        f"images as training goes instead")
    return folder


def hold_out(
    images: FolderImages, files: list[list[File]], step: int, workers: int
) -> dict[int, tuple[np.ndarray, bytes]]:
    """Images to hold out and their digests, by row: the first of every class, then the second, ...

    From every `step`-th on the next that can be read is taken.
    """
    ends = accumulate(map(len, files))
    places = [[range(row, end) for row in range(end - len(own), end, step)]
              for own, end in zip(files, ends)]
    rounds = filter(None, chain.from_iterable(zip_longest(*places)))
    bound = min(HELD_OUT_IMAGES, max(1, HELD_OUT_BYTES // math.prod(images.form.shape)))
    found = read_ahead(images.first_readable, islice(rounds, bound), workers)
    return {row: (image, content) for row, image, content in filter(None, found)}


def check_classes(classes: list[str], labels: list[int]) -> None:
    """Raises UserError for a class of which there is nothing to train on."""
    lost = set(range(len(classes))) - set(labels)
    if lost:
        raise UserError(f"class {classes[min(lost)]} has no image to train on, or none beside one "
                        f"that is held out: two are needed that can be read")


# --------------------------------------------------------------------------------------------------
# Decoded files: train.npy and held_out.npy, bytes [N, channels, side, side]


DECODED = "decoded.pt"   # their labels, and what they are made of


def decode(
    images: FolderImages, classes: list[str], digest: hashlib._Hash, path: Path, workers: int,
) -> tuple[Tensor, int]:
    """Write the images that can be read; returns their labels, and the checksum of their pixels.
    The digest takes in the files."""
    shape = images.form.shape
    labels = []
    checksum = 0

    def write(file: BinaryIO) -> None:
        nonlocal checksum
        write_header(file, len(images), shape)
        found = read_ahead(images.first_readable, ([row] for row in range(len(images))), workers)
        bar = progress_bar(found, desc="decode", total=len(images), unit="image")
        for row, image, content in filter(None, bar):
            file.write(image.tobytes())
            checksum = zlib.crc32(image, checksum)
            digest.update(images.files[row].record(content))
            labels.append(images.files[row].label)
        check_classes(classes, labels)
        file.seek(0)
        write_header(file, len(labels), shape)   # as long as the first

    try:
        save_whole(path, write)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; --stream reads the images as training "
                        f"goes instead")
    return torch.tensor(labels), checksum


def write_header(file: BinaryIO, count: int, shape: tuple[int, ...]) -> None:
    about = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, about)


def load_decoded(out: Path, made_of: str) -> Folder | None:
    """What an earlier run decoded, mapped into memory; None if it is of other files, or damaged."""
    try:
        content = load_checkpoint(out / DECODED, "decoded folder")
        sets = [np.load(out / f"{name}.npy", mmap_mode="r") for name in ("train", "held_out")]
    except (UserError, OSError, EOFError, ValueError):
        return None
    if content["made_of"] != made_of:
        return None
    if rank_and_world()[0] == 0:   # for which the others wait meanwhile
        if content.get("checksums") != [zlib.crc32(images) for images in sets]:
            return None   # another run's, perhaps
    with warnings.catch_warnings():   # the arrays cannot be written to, and nobody does
        warnings.simplefilter("ignore")
        train, held_out = map(torch.from_numpy, sets)
    return Folder(
        TensorDataset(train, content["train_labels"]),
        TensorDataset(held_out, content["held_out_labels"]), content["digest"],
        content["unreadable"])
