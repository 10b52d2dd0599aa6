"""Train VAR from images to samples:  python train.py

Read `main` first; it is the whole program. Stage one (`TokenizerStage`) teaches the tokenizer to write images as
tokens; stage two (`VARStage`) tokenises every image once and teaches the transformer to predict the tokens. Both go
through the same loop, `Stage.run`. What a run writes, all in one folder:

    tokenizer.pt  var.pt     weights, and what they are of: configuration, data, classes
    tokens.pt                all images as tokens, for the next training in this folder
    log.jsonl                one line per few steps, and what was measured on held-out images
    reconstructions.png      held-out images above their reconstructions
    samples.png              generated images, a row per class
    curves.png               both losses; the transformer's loss and accuracy per scale
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import hashlib
import io
import json
import math
import os
import signal
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tokenizer import PUBLISHED_SCALES, Decoder, Encoder, PixelAttention, ResidualBlock, Tokenizer, TokenizerConfig
from var import VAR, Block, VARConfig

matplotlib.use("Agg")   # pictures go to files: no window system is needed
import matplotlib.pyplot as plt  # noqa: E402


class UserError(Exception):
    """A mistake of the user's, told in one sentence; the program ends with exit code 2."""


# ---------------------------------------------------------------------------------------------------------------
# What can be chosen


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Preset:
    """The shape of a model and of its training; every field is a flag."""
    image_size: int = option(32, "side of the images")
    scales: tuple[int, ...] = option((1, 2, 4, 8), "sides of the token maps, from 1 to the latent's side")
    vocabulary: int = option(256, "codes in the codebook")
    code_channels: int = option(8, "channels of a code")
    tokenizer_width: int = option(16, "the tokenizer's channels at full resolution")
    multipliers: tuple[int, ...] = option((1, 4, 4), "of that width, per resolution; each but the first halves the side")
    blocks: int = option(1, "residual blocks per resolution")
    phis: int = option(4, "distinct phi convolutions")
    norm_groups: int = option(2, "groups of the tokenizer's group norms")
    tokenizer_steps: int = option(1100, "training steps of the tokenizer")
    tokenizer_batch: int = option(16, "images per step of the tokenizer")
    tokenizer_lr: float = option(1.5e-3, "peak learning rate of the tokenizer")
    unquantized: float = option(0.1, "share of the tokenizer's steps, at the start, without quantization")
    depth: int = option(4, "layers of the transformer")
    width: int = option(192, "width of the transformer")
    heads: int = option(4, "attention heads")
    shared_adaln: bool = option(False, "one AdaLN modulation shared by all layers")
    normalise_qk: bool = option(True, "unit queries and keys with a learned scale")
    label_dropout: float = option(0.1, "share of labels replaced by the null class in training")
    drop_path: float = option(0.0, "stochastic depth of the last layer; the first has none")
    last_scales: int | None = option(None, "how many scales a token sees, its own among them (default: all so far)")
    var_steps: int = option(800, "training steps of the transformer")
    var_batch: int = option(32, "images per step of the transformer")
    var_lr: float = option(1e-2, "peak learning rate of the transformer")
    muon: bool = option(True, "Muon instead of AdamW for the matrices inside the transformer's layers")
    weight_decay: float = option(0.05, "of the transformer's matrices")
    final_lr: float = option(0.05, "learning rate at the end, as a share of the peak")
    warmup: int = option(30, "steps of linear warm-up, in both stages")
    ema: float = option(0.98, "decay of the running average of the transformer's weights, which is what is kept")

    def tokenizer_config(self, image_channels: int) -> TokenizerConfig:
        return TokenizerConfig(self.scales, self.vocabulary, self.code_channels, image_channels, self.tokenizer_width,
                               self.multipliers, self.blocks, self.phis, self.norm_groups)

    def var_config(self, tokenizer: TokenizerConfig, classes: int) -> VARConfig:
        return VARConfig(tokenizer.scales, tokenizer.vocabulary, tokenizer.code_channels, classes, self.depth,
                         self.width, self.heads, self.shared_adaln, self.normalise_qk, self.label_dropout,
                         self.drop_path, self.last_scales)


PRESETS = {
    "tiny": Preset(),
    "cifar": Preset(scales=(1, 2, 3, 4, 6, 8), vocabulary=1024, code_channels=32, tokenizer_width=96,
                    multipliers=(1, 2, 2), blocks=2, norm_groups=32, tokenizer_steps=20_000, tokenizer_batch=256,
                    tokenizer_lr=4e-4, depth=12, width=768, heads=12, drop_path=0.05, var_steps=40_000, var_batch=256,
                    var_lr=3e-4, muon=False, warmup=1000, ema=0.9995),
    # The published d16 geometry, and its recipe: 200 epochs of ImageNet in batches of 768.
    "imagenet256": Preset(image_size=256, scales=PUBLISHED_SCALES, vocabulary=4096, code_channels=32,
                          tokenizer_width=160, multipliers=(1, 1, 2, 2, 4), blocks=2, norm_groups=32,
                          tokenizer_steps=400_000, tokenizer_batch=128, tokenizer_lr=1e-4, depth=16, width=1024,
                          heads=16, drop_path=0.1 * 16 / 24, var_steps=333_000, var_batch=768, var_lr=3e-4,
                          muon=False, final_lr=0.1, warmup=6000, ema=0.9999),
}


# ---------------------------------------------------------------------------------------------------------------
# Data: each set is its images as bytes, their labels, and the names of the classes


@dataclass
class Data:
    train: ArrayImages | FolderImages
    held_out: ArrayImages | FolderImages
    classes: list[str]
    channels: int

    @cached_property
    def fingerprint(self) -> str:
        """Of both sets and their order: a training goes on only with the same."""
        return hashlib.sha256((self.train.fingerprint() + self.held_out.fingerprint()).encode()).hexdigest()


class ArrayImages:
    """Images in memory: uint8 [N, channels, side, side]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()


SHAPES = ("circle", "ring", "square", "triangle", "star", "cross", "heart", "crescent", "arrow", "bar")


def draw_shape(name: str, size: float, angle: float, x: float, y: float, side: int) -> np.ndarray:
    """Coverage [side, side] in [0, 255] of one shape: drawn four times as large, then averaged.

    size: half the shape's extent; x, y: its centre; both as shares of the side. angle: in radians.
    """
    canvas = Image.new("L", (4 * side, 4 * side))
    draw = ImageDraw.Draw(canvas)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])

    def place(points) -> list[tuple[float, float]]:
        return [tuple(p) for p in (np.asarray(points) @ turn * size + (x, y)) * 4 * side]

    def disc(centre, radius, fill):
        (cx, cy), r = place([centre])[0], radius * size * 4 * side
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)

    if name in ("circle", "ring", "crescent"):
        disc((0, 0), 0.95, 255)
        if name == "ring":
            disc((0, 0), 0.5, 0)
        if name == "crescent":
            disc((0.45, 0), 0.75, 0)
    else:
        draw.polygon(place(OUTLINES[name]), fill=255)
    return np.asarray(canvas.reduce(4))


def spikes(count: int, inner: float) -> list[tuple[float, float]]:
    return [(r * math.sin(math.pi * i / count), -r * math.cos(math.pi * i / count))
            for i, r in enumerate([1.0, inner] * count)]


OUTLINES = {   # in [-1, 1], y down
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0, -1), (0.95, 0.75), (-0.95, 0.75)],
    "star": spikes(5, 0.48),
    "cross": [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
              (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    "heart": [(0.063 * 16 * math.sin(t) ** 3, -0.063 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)
              - math.cos(4 * t))) for t in np.linspace(0, 2 * math.pi, 60)],
    "arrow": [(0, -1), (0.85, -0.05), (0.32, -0.05), (0.32, 1), (-0.32, 1), (-0.32, -0.05), (-0.85, -0.05)],
    "bar": [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)],
}


def draw_shapes(count: int, side: int, seed: int) -> ArrayImages:
    """The built-in data set: one coloured shape on a background that runs from one colour to another."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(SHAPES)
    size, angle = rng.uniform(0.28, 0.42, count), rng.uniform(-0.35, 0.35, count)
    x, y = 0.5 + rng.uniform(-1, 1, (2, count)) * (0.48 - size)
    cover = np.stack([draw_shape(SHAPES[labels[i]], size[i], angle[i], x[i], y[i], side) for i in range(count)])
    cover = cover[:, None].astype(np.float32) / 255

    # One is light and the other dark, so that no shape is hidden; the background's two ends have neighbouring hues.
    def colours(saturation: tuple[float, float], value: tuple[float, float], hue: np.ndarray) -> np.ndarray:
        hsv = np.stack([hue % 1, rng.uniform(*saturation, count), rng.uniform(*value, count)], axis=-1)
        return 255 * hsv_to_rgb(hsv)

    hue, shift = rng.random((2, count)), rng.uniform(-0.12, 0.12, (2, count))
    light = [colours((0.3, 0.65), (0.75, 0.95), hue[0] + shift[i]) for i in (0, 1)]
    dark = [colours((0.4, 0.8), (0.28, 0.52), hue[1] + shift[i]) for i in (0, 1)]
    flip = (rng.random(count) < 0.5)[:, None]
    shape = np.where(flip, light[0], dark[0])
    start, end = (np.where(flip, dark[i], light[i]) for i in (0, 1))
    direction = rng.uniform(0, 2 * math.pi, (count, 1, 1))
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    blend = (0.5 + 0.7 * (np.cos(direction) * columns + np.sin(direction) * rows))[:, None].astype(np.float32)
    background = start[:, :, None, None] * (1 - blend) + end[:, :, None, None] * blend
    images = background * (1 - cover) + shape[:, :, None, None] * cover
    return ArrayImages(images.clip(0, 255).round().astype(np.uint8), labels)


IDX_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
             "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
DOWNLOADS = {   # data set -> where from, {file: SHA-256}
    "mnist": ("https://storage.googleapis.com/cvdf-datasets/mnist/", dict(zip(IDX_FILES, (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6")))),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", dict(zip(IDX_FILES, (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5")))),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {"cifar-10-binary.tar.gz":
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}),
}
CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
SYSTEM_DATA = Path("/usr/share/datasets")   # where Debian's dataset-* packages put theirs


def find_files(name: str, data_dir: Path) -> Path:
    """The folder that holds a known data set's files, downloaded if no place has them."""
    url, checksums = DOWNLOADS[name]
    for folder in (data_dir, data_dir / name, SYSTEM_DATA / name):
        if all((folder / file).exists() for file in checksums):
            return folder
    folder = data_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, checksum in checksums.items():
        if not (folder / file).exists():
            download(url + file, folder / file, checksum)
    return folder


def download(url: str, path: Path, checksum: str) -> None:
    """Fetch a file; only with the right SHA-256 does it get its name."""
    def fetch(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        with urllib.request.urlopen(url, timeout=30) as response:
            total = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as progress:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    progress.update(len(chunk))
        if digest.hexdigest() != checksum:
            raise UserError(f"{url} has SHA-256 {digest.hexdigest()}, expected {checksum}: not used")

    try:
        save_whole(path, fetch)
    except OSError as error:
        raise UserError(f"cannot download {url} ({error}); put the file into a folder and name it with --data-dir")


def gunzip(path: Path) -> bytes:
    """The whole content of a gzip file, its checksum compared. Raises UserError."""
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read as a gzip file: {error}")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of bytes, as MNIST's: a magic number, the sizes, then the values."""
    content = gunzip(path)
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path} does not begin with the magic number of a {dimensions}-dimensional idx file of bytes")
    shape = tuple(np.frombuffer(content[4:header], ">u4").tolist())
    if len(content) - header != math.prod(shape):
        raise UserError(f"{path} is {len(content) - header} bytes of data where its header says {math.prod(shape)}")
    return np.frombuffer(content[header:], np.uint8).reshape(shape)


def load_idx(name: str, folder: Path, side: int) -> Data:
    train_x, train_y, test_x, test_y = (read_idx(folder / file, 3 if "images" in file else 1) for file in IDX_FILES)
    for x, y in ((train_x, train_y), (test_x, test_y)):
        if len(x) != len(y) or not len(x) or y.max() >= 10:
            raise UserError(f"{folder}: {len(x)} images and {len(y)} labels, of at most 10 classes, do not belong together")
    return Data(ArrayImages(fit_side(train_x[:, None], side), train_y),
                ArrayImages(fit_side(test_x[:, None], side), test_y), list(CLASS_NAMES[name]), 1)


def load_cifar10(folder: Path, side: int) -> Data:
    """The binary version: records of one label byte and 3072 pixel bytes, planes of 32 x 32 red, green, blue."""
    path = folder / "cifar-10-binary.tar.gz"
    splits = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    arrays = {}
    try:
        # Read in place: nothing is unpacked, so no path inside is followed.
        with tarfile.open(fileobj=io.BytesIO(gunzip(path))) as archive:
            for split, names in splits.items():
                content = b"".join(archive.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names)
                if not content or len(content) % 3073:
                    raise UserError(f"{path}: the {split} records are cut short")
                records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
                if records[:, 0].max() >= 10:
                    raise UserError(f"{path}: a label over 9, so this is not CIFAR-10's binary version")
                arrays[split] = ArrayImages(fit_side(records[:, 1:].reshape(-1, 3, 32, 32), side), records[:, 0])
    except (tarfile.TarError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not the binary version of CIFAR-10: {error}")
    return Data(arrays["train"], arrays["test"], list(CLASS_NAMES["cifar10"]), 3)


def fit_side(images: np.ndarray, side: int) -> np.ndarray:
    """Small images padded with their darkest value, 28 to 32 say; large ones averaged down."""
    border = side - images.shape[-1]
    if border >= 0:
        before, after = border // 2, border - border // 2
        return np.pad(images, ((0, 0), (0, 0), (before, after), (before, after)))
    small = F.interpolate(torch.from_numpy(images.copy()).float(), size=(side, side), mode="area")
    return small.round().to(torch.uint8).numpy()


IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class FolderImages:
    """Images on disk, read when asked for; an unreadable one is named once (by each worker), counted, and the next
    one stands in."""

    def __init__(self, root: Path, paths: list[Path], labels: list[int], side: int, channels: int):
        self.root, self.paths, self.labels, self.side, self.channels = root, paths, torch.tensor(labels), side, channels
        self.unreadable: set[Path] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, found = zip(*(self.first_readable(i) for i in indices))
        return torch.stack(images), self.labels[list(found)]

    def fingerprint(self) -> str:
        """Of the list of files and their sizes, wherever the folder lies."""
        digest = hashlib.sha256(f"{self.side} {self.channels}".encode())
        for path in self.paths:
            digest.update(repr((str(path.relative_to(self.root)), path.stat().st_size)).encode())
        return digest.hexdigest()

    def first_readable(self, index: int) -> tuple[Tensor, int]:
        """The image at an index, or the next that can be read; and where that was."""
        for i in (*range(index, len(self)), *range(index)):
            if self.paths[i] in self.unreadable:
                continue
            try:
                return torch.from_numpy(read_image(self.paths[i], self.side, self.channels)), i
            except UserError as error:
                self.unreadable.add(self.paths[i])
                tqdm.write(f"skipped, {len(self.unreadable)} so far: {in_short(error)}", file=sys.stderr)
        raise UserError(f"none of the {len(self)} images can be read")


def read_image(path: Path, side: int, channels: int) -> np.ndarray:
    """An image file, centre-cropped and resized: uint8 [channels, side, side]. Raises UserError."""
    try:
        with Image.open(path) as image:
            image.verify()   # compares the checksums that a PNG has; the image must be opened anew after it
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):   # 16 bits of grey, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
            image = image.convert("RGB" if channels == 3 else "L")
            pixels = np.array(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))
    except Exception as error:   # damaged files make Pillow raise nearly anything
        raise UserError(f"{path} cannot be read as an image: {in_short(error)}")
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def load_folder(folder: Path, side: int, channels: int) -> Data:
    """One sub-folder per class, named for it; every twentieth image of a class, and at least one, is held out."""
    if not folder.is_dir():
        raise UserError(f"--data {folder} is neither a folder nor one of shapes, {', '.join(DOWNLOADS)}")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no sub-folders; it needs one for each class, with images inside")
    split = {"train": ([], []), "held_out": ([], [])}
    for label, name in enumerate(classes):
        paths = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())
        if len(paths) < 2:
            raise UserError(f"{folder / name} has {len(paths)} images ({', '.join(IMAGE_ENDINGS)}); "
                            f"two are needed, one to train on and one to hold out")
        for i, path in enumerate(paths):
            chosen = split["held_out" if i % 20 == 0 else "train"]
            chosen[0].append(path)
            chosen[1].append(label)
    return Data(FolderImages(folder, *split["train"], side, channels),
                FolderImages(folder, *split["held_out"], side, channels), classes, channels)


def load_data(name: str, data_dir: Path, side: int, channels: int, seed: int) -> Data:
    if name == "shapes":
        return Data(draw_shapes(20_000, side, seed=2 * seed), draw_shapes(1000, side, seed=2 * seed + 1), list(SHAPES), 3)
    if name == "cifar10":
        return load_cifar10(find_files(name, data_dir), side)
    if name in DOWNLOADS:
        return load_idx(name, find_files(name, data_dir), side)
    return load_folder(Path(name), side, channels)


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """Bytes to [-1, 1], on the device."""
    return images.to(device, non_blocking=True).float() / 127.5 - 1


def to_bytes(images: Tensor) -> np.ndarray:
    """[-1, 1] to bytes [N, side, side, channels], on the CPU."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def read_ahead(data, steps: Iterable[list[int]], options: argparse.Namespace) -> Iterable[tuple[Tensor, Tensor]]:
    """The rows of each step, read by --workers processes while the step before it is computed."""
    return DataLoader(data, batch_size=None, sampler=steps, num_workers=options.workers,
                      pin_memory=options.device.type == "cuda", generator=torch.Generator())   # leaves the run's draws alone


def shuffled(count: int, batch: int, seed: int, begin: int, end: int) -> Iterator[list[int]]:
    """The indices of training steps begin .. end-1: each pass over the data in a new order, fixed by the seed."""
    epoch, order = -1, None
    for step in range(begin, end):
        indices = []
        for place in range(step * batch, (step + 1) * batch):
            if place // count != epoch:
                epoch = place // count
                order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            indices.append(int(order[place % count]))
        yield indices


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: written whole or not at all


def save_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file beside its place, then rename: at any instant, and when the disk is full, the old one or the new
    one is there."""
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
    except (OSError, RuntimeError) as error:   # torch.save may end with a RuntimeError after an OSError
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise UserError(f"{path} cannot be written, and is what it was before: {in_short(reason)}")


def read_tensors(path: Path, what: str) -> Any:
    """What torch.save wrote, on the CPU; nothing in the file is run. Raises UserError where it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"there is no {what} at {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if part := archive.testzip():   # torch.load compares no checksums
                    raise UserError(f"{path} is damaged: the checksum of {part} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:   # torch, zip and pickle each raise their own for a damaged file
        raise UserError(f"{path} cannot be read as a {what}: {in_short(error)}")


def load_checkpoint(path: Path, kind: str, *parts: str) -> dict:
    """A checkpoint of ours, on the CPU. Raises UserError where it is missing, damaged, or of another kind, and where a
    part is not in it."""
    content = read_tensors(path, f"{kind} checkpoint")
    found = content.get("kind", "something else") if isinstance(content, dict) else "something else"
    if found != kind:
        raise UserError(f"{path} is a checkpoint of a {found}, not of a {kind}")
    for part in parts:
        if part not in content:
            raise UserError(f"{path} is of another version: it has no {part}")
    return content


def fingerprint(tokenizer: Tokenizer) -> str:
    """Tells tokenizers apart: a transformer's checkpoint names the one whose tokens it learned."""
    digest = hashlib.sha256(repr(tokenizer.config).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if name != "quantizer.hits_V":   # a training statistic, not a weight
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_tokenizer(path: Path, scales: tuple[int, ...] | None = None) -> Tokenizer:
    """A tokenizer of ours, or a published one (a .pth), whose scales the caller may name."""
    if path.suffix == ".pth":
        return load_published(path, lambda state: Tokenizer.from_official(state, scales))
    content = load_checkpoint(path, "tokenizer", "config", "model")
    return restore(path, lambda: Tokenizer(TokenizerConfig(**content["config"])), content)


def load_published(path: Path, build: Callable[[dict], nn.Module]) -> nn.Module:
    state = read_tensors(path, "published checkpoint")
    try:
        return build(state)
    except Exception as error:   # a damaged file and a foreign one fail in many ways, all of them the file's fault
        raise UserError(f"{path} cannot be read as a published checkpoint: {in_short(error)}")


def restore(path: Path, build: Callable[[], nn.Module], content: dict) -> nn.Module:
    try:
        model = build()
        model.load_state_dict(content["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or of another version: {in_short(error)}")
    return model.eval()


def in_short(error: Exception) -> str:
    """The beginning of what an error says, in one line."""
    return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------------------------------------------------------
# Several processes: torchrun starts one for each GPU, and all of them run this program


def rank_and_ranks() -> tuple[int, int]:
    """This process's number, and how many there are; 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(text: str) -> None:
    """Print once, not in every process."""
    if rank_and_ranks()[0] == 0:
        print(text)


def join_processes(device: torch.device) -> None:
    """Meet the other processes that torchrun started."""
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # NCCL between GPUs, gloo between CPUs. The others wait where process 0 downloads or reads.
        dist.init_process_group(timeout=timedelta(hours=2))


def own_part(rows: list[int]) -> list[int]:
    """This process's share of the rows, in order; the shares of all processes together are the rows."""
    rank, ranks = rank_and_ranks()
    return rows[len(rows) * rank // ranks:len(rows) * (rank + 1) // ranks]


def mean_over_processes(*numbers: float, device: torch.device) -> list[float]:
    values = torch.tensor(numbers, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    if dist.is_initialized():
        dist.all_reduce(values)
    return (values / rank_and_ranks()[1]).tolist()


# ---------------------------------------------------------------------------------------------------------------
# The loop that both stages share


class Log:
    """log.jsonl: one JSON object per line."""

    def __init__(self, path: Path, stage: str, done: int):
        """Lines that an earlier try left are dropped: of this stage for steps after `done`, and on its health, which is
        written at the end."""
        self.path, self.stage = path, stage
        if rank_and_ranks()[0] > 0:
            return
        kept = [line for line in read_log(path)
                if line["stage"] != stage or (line["step"] <= done and line["split"] != "health")]
        save_whole(path, lambda file: file.write("".join(json.dumps(line) + "\n" for line in kept).encode()))

    def write(self, step: int, split: str, **values) -> None:
        if rank_and_ranks()[0] > 0:
            return
        line = {"stage": self.stage, "step": step, "split": split, **values}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict]:
    """The lines of a log; one that a killed run did not finish is left out."""
    try:
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); move it away to go on without it")


class Interrupt:
    """Ctrl-C and SIGTERM end the step at hand, not half of it; a second Ctrl-C ends at once. (A second SIGTERM does
    not: a process manager and torchrun may each send one.)"""

    def __enter__(self) -> Interrupt:
        self.asked = False
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, *_) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def __exit__(self, *_) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


def learning_rate(step: int, steps: int, warmup: int, final: float) -> float:
    """Linear warm-up, then half a cosine down to the final share; as a share of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


class Stage:
    """What both trainings share: the loop, its log and its checkpoints. A subclass says what is trained, and on what.

    name: of the stage in flags, in the log and in the file's name; kind: what its checkpoint is called; recipe: what of
    the preset shapes the training; spares: whether some steps leave parameters without a gradient, which several
    processes have to look out for.
    """
    name: str
    kind: str
    recipe: tuple[str, ...]
    images: Data
    spares = False

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], data, options: argparse.Namespace,
                 ema: float):
        """data: what `loss` gets its tensors from, by rows. ema: decay of the average of the weights; 0 keeps the last.
        A subclass has set `images`, and whatever `example` needs."""
        self.model, self.optimizers, self.data, self.options = model, optimizers, data, options
        self.steps, self.batch = (getattr(options.preset, f"{self.name}_{what}") for what in ("steps", "batch"))
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema))
        change_parts(model, options)
        self.peak = peak_flops(options)
        self.flops = 0 if self.peak is None else self.forward_flops()
        self.replica = model   # the model, its gradients averaged over the processes
        if dist.is_initialized():
            self.replica = DistributedDataParallel(model, find_unused_parameters=self.spares, gradient_as_bucket_view=True)
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        # What a training that goes on must have in common with the checkpoint:
        self.identity = {"config": asdict(model.config), "data set": self.images.fingerprint,
                         "recipe": {name: getattr(options.preset, name) for name in self.recipe} | {"seed": options.seed}}
        self.path, self.step, self.saved = options.out / f"{self.name}.pt", 0, 0

    def loss(self, *tensors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What to minimise for these rows of the data, and what to log."""
        raise NotImplementedError

    def validate(self, model: nn.Module) -> dict:
        """What to log of held-out images."""
        raise NotImplementedError

    def example(self) -> tuple[Tensor, ...]:
        """What the model takes, for one image; the values do not matter."""
        raise NotImplementedError

    def finish(self, model: nn.Module, log: Log) -> None:
        """What the run shows of the trained model."""
        raise NotImplementedError

    def before_step(self) -> None:
        """What changes the model before a step."""

    def after_step(self) -> None:
        """What else changes the model, once the optimizers have."""

    def run(self) -> nn.Module:
        """Train to the last step, from the checkpoint if asked to; returns the model to keep: the average."""
        options = self.options
        if options.resume and self.path.exists() and self.resume():
            say(f"{self.path} is finished")
            return self.average.module.eval()
        log = Log(options.out / "log.jsonl", self.name, self.step)
        steps = map(own_part, shuffled(len(self.data), self.batch, options.seed, self.step, self.steps))
        with Interrupt() as interrupt, tqdm(initial=self.step, total=self.steps, desc=self.name, unit="step",
                                            mininterval=0.5, disable=rank_and_ranks()[0] > 0) as bar:
            for rows in read_ahead(self.data, steps, options):
                loss, values, stop = self.advance(rows, interrupt.asked)
                bar.set_postfix_str(f"loss {loss:.4f}{self.speed(bar.format_dict.get('rate'))}", refresh=False)
                bar.update()
                if self.step % 10 == 1:
                    log.write(self.step, "train", loss=loss, **{name: value.tolist() for name, value in values.items()})
                if self.step == self.steps or self.step % max(1, self.steps // 8) == 0:
                    log.write(self.step, "held_out", **self.validate(self.average.module.eval()))
                if stop or self.step == self.steps or self.step % options.checkpoint_every == 0:
                    self.save(finished=False)
                if stop:
                    raise Stopped(self.stopped())
            if sum(mean_over_processes(interrupt.asked, device=options.device)):   # during the last step
                raise Stopped(self.stopped())
        model = self.average.module.eval()
        if rank_and_ranks()[0] == 0:
            self.finish(model, log)
        self.save(finished=True)
        return model

    def stopped(self) -> str:
        how = "--resume" + (" instead of --overwrite" if self.options.overwrite else "")
        return (f"stopped after step {self.step} of {self.steps} and saved to {self.options.out}; the same command with "
                f"{how} goes on from there")

    def advance(self, rows: tuple[Tensor, Tensor], asked: bool) -> tuple[float, dict[str, Tensor], bool]:
        """One step of training: the loss before it, what to log, and whether any process was asked to stop."""
        # Every random draw of a step follows from the seed and the step: a resumed run repeats them exactly. All processes
        # draw the same codes, so that codebooks stay alike, but each its own labels to drop.
        seed = self.options.seed * 1_000_003 + self.step
        torch.manual_seed(seed)
        self.before_step()
        torch.manual_seed(seed + 15_485_863 * rank_and_ranks()[0])   # a prime, far from any step
        self.model.train()
        loss, values = self.gradients(rows)
        loss, stop = mean_over_processes(loss, asked, device=self.options.device)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            where = f"the last good checkpoint, of step {self.saved}, is {self.path}" if self.saved else "no checkpoint yet"
            raise UserError(f"the {self.name} loss became {loss} and its gradient {norm} at step {self.step}; {where}; "
                            f"try a lower --{self.name}-lr")
        rate = learning_rate(self.step, self.steps, self.options.preset.warmup, self.options.preset.final_lr)
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * rate
            optimizer.step()
        torch.manual_seed(seed)
        self.after_step()
        self.average.update_parameters(self.model)
        self.step += 1
        return loss, values, stop > 0

    def gradients(self, rows: tuple[Tensor, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The gradients of this process's rows, in --grad-accumulation parts; their mean loss, what the last part logs."""
        self.model.zero_grad()
        parts, total = self.options.grad_accumulation, 0.0
        for i, part in enumerate(zip(*(tensor.chunk(parts) for tensor in rows))):
            last = i + 1 == parts
            alone = contextlib.nullcontext() if last or self.replica is self.model else self.replica.no_sync()
            with alone:   # the processes exchange gradients once, at the last part
                with self.options.autocast():
                    loss, values = self.loss(*part)
                (loss / parts).backward()
            total += loss.item() / parts
        return total, values

    def speed(self, rate: float | None) -> str:
        """What so many steps per second come to, over all processes."""
        if not rate:
            return ""
        images, tokens = rate * self.batch, sum(s * s for s in self.model.config.scales)
        text = f", {images:.0f} images/s, {images * tokens:.0f} tokens/s"
        if self.peak is None:
            return text
        share = 3 * self.flops * images / (self.peak * rank_and_ranks()[1])   # the backward pass is twice the forward
        return f"{text}, {share:.0%} of peak FLOP/s"

    @torch.no_grad()
    def forward_flops(self) -> int:
        """Floating point operations of one image's way through the model, two for a multiplication and its addition."""
        # The counter knows neither our kernels nor PyTorch's fused attention: plain matrix products on a CPU are the same.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            copy.deepcopy(self.average.module).cpu().eval()(*(x.cpu() for x in self.example()))
        return counter.get_total_flops()

    def save(self, finished: bool) -> None:
        """The average is what a checkpoint is for; until the end it also holds what going on takes."""
        o, self.saved = self.options, self.step
        if rank_and_ranks()[0] == 0:
            known = o.data == "shapes" or o.data in DOWNLOADS
            source = {"name": o.data if known else str(Path(o.data).resolve()), "data_dir": str(o.data_dir.resolve()),
                      "side": o.preset.image_size, "channels": o.channels, "seed": o.seed}
            training = {} if finished else {"training": {
                "step": self.step, "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}}
            save_checkpoint(self.path, self.kind, **self.identity, model=self.average.module.state_dict(),
                            rates=self.peaks, source=source, classes=self.images.classes, **training)
        if dist.is_initialized():   # torchrun kills the others once a process has ended
            dist.barrier()

    def compare(self, content: dict) -> None:
        """Raises UserError for a checkpoint of another training; another learning rate is only said."""
        begun, now = flat({name: content[name] for name in self.identity}), flat(self.identity)
        for name in now:
            if begun.get(name) != now[name]:
                values = f": {begun.get(name)}, not {now[name]}" if len(str(now[name])) < 64 else ""   # or a fingerprint
                raise UserError(f"{self.path} does not go on: it was begun with another {name}{values}")
        if (before := content["rates"]) != self.peaks:
            say(f"{self.path} has a peak learning rate of {before[0][0]} so far, and {self.peaks[0][0]} is asked for")

    def resume(self) -> bool:
        """Take over what `save` wrote; returns whether that was a finished training."""
        content = load_checkpoint(self.path, self.kind)
        if "copied_from" in content:
            raise UserError(f"{self.path} is a copy of {content['copied_from']}: --stage var goes on without training one")
        try:
            self.compare(content)
            self.average.module.load_state_dict(content["model"])
            if "training" not in content:
                return True
            self.model.load_state_dict(content["training"]["model"])
            for optimizer, state in zip(self.optimizers, content["training"]["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.step = self.saved = content["training"]["step"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.path} is damaged or of another version: {in_short(error)}")
        self.average.n_averaged.fill_(self.step)
        return False


def flat(content: dict) -> dict:
    """{"recipe": {"seed": 0}, "tokenizer": "3f"} as {"seed": 0, "tokenizer": "3f"}."""
    parts = {}
    for name, value in content.items():
        parts |= value if isinstance(value, dict) else {name: value}
    return parts


class Stopped(Exception):
    """The user asked for it; everything is saved."""


def change_parts(model: nn.Module, options: argparse.Namespace) -> None:
    """What --checkpoint-activations and --compile do to a model. The quantizer's many small steps stay as they are."""
    for module in model.modules():
        if options.checkpoint_activations and isinstance(module, (ResidualBlock, PixelAttention, Block)):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        if options.compile and isinstance(module, (Encoder, Decoder, VAR)):
            module.compile(dynamic=False)   # every batch of a training has the same shape


PEAK_TFLOPS = {   # of dense bf16, from the data sheets; the first name that the card's own contains
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165,
}


def peak_flops(options: argparse.Namespace) -> float | None:
    """FLOP/s of one GPU at bf16, where that is what is used and the card is a known one."""
    if options.device.type != "cuda" or options.precision != "bf16":
        return None
    name = torch.cuda.get_device_name(options.device)
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


# ---------------------------------------------------------------------------------------------------------------
# Stage one: the tokenizer


class TokenizerStage(Stage):
    name, kind, spares = "tokenizer", "tokenizer", True   # no codes at first
    recipe = ("tokenizer_steps", "tokenizer_batch", "unquantized", "final_lr", "warmup")

    def __init__(self, data: Data, options: argparse.Namespace):
        preset, self.images = options.preset, data
        self.quantized_from = int(preset.unquantized * preset.tokenizer_steps)
        torch.manual_seed(options.seed)
        model = Tokenizer(preset.tokenizer_config(data.channels)).to(options.device)
        optimizer = torch.optim.AdamW(model.parameters(), preset.tokenizer_lr, betas=(0.9, 0.95), weight_decay=0.0,
                                      fused=True)
        super().__init__(model, [optimizer], data.train, options, ema=0.0)

    @torch.no_grad()
    def before_step(self) -> None:
        if self.step == self.quantized_from:   # only now is there a latent worth taking codes from
            # (The average, at ema 0, is the model itself, but never compiled: these batches have other shapes.)
            with self.options.autocast():
                latents = [self.average.module.latent(images) for images in self.passes(self.data, 512)]
                self.model.quantizer.start_from(torch.cat(latents))

    def passes(self, images: ArrayImages | FolderImages, count: int) -> Iterator[Tensor]:
        """At most `count` images, evenly over all classes, as many at a time as a pass without gradients takes."""
        sample = spread(images, count)
        for part in chunks(len(sample), at_a_time(self.options.preset.image_size)):
            yield to_float(images[[sample[i] for i in part]][0], self.options.device)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        _, losses = self.replica(to_float(images, self.options.device), quantize=self.step >= self.quantized_from)
        return losses["total"], losses

    def after_step(self) -> None:
        if self.step < self.quantized_from:
            return
        self.model.quantizer.remember()
        if self.quantized_from < self.step < 0.9 * self.steps and self.step % 20 == 0:   # the end is for settling down
            self.model.quantizer.revive(self.optimizers[0])

    @torch.no_grad()
    def validate(self, model: Tokenizer) -> dict:
        with self.options.autocast():
            parts = [(len(images), model(images)[1]["mse"].item()) for images in self.passes(self.images.held_out, 256)]
        return {"psnr": psnr(sum(count * mse for count, mse in parts) / sum(count for count, _ in parts))}

    def example(self) -> tuple[Tensor, ...]:
        return (to_float(self.images.held_out[[0]][0], self.options.device),)

    def finish(self, model: Tokenizer, log: Log) -> None:
        log.write(self.steps, "health", **tokenizer_health(model, self.images, self.options))
        draw_reconstructions(self.options.out / "reconstructions.png", model, self.images, self.options)


def chosen_tokenizer(data: Data, options: argparse.Namespace) -> Tokenizer:
    """The run's own tokenizer, or the one that --tokenizer names, which the run then keeps a copy of."""
    own = options.out / "tokenizer.pt"
    path = options.tokenizer or own
    tokenizer, side = load_tokenizer(path, options.preset.scales), options.preset.image_size
    if path.suffix != ".pth" and "training" in load_checkpoint(path, "tokenizer"):
        raise UserError(f"{path} is not trained to its end; --stage tokenizer --resume, in its folder, goes on with it")
    if (tokenizer.config.image_side, tokenizer.config.image_channels) != (side, data.channels):
        raise UserError(f"{path} is for images of side {tokenizer.config.image_side} with "
                        f"{tokenizer.config.image_channels} channels, and these are {side} with {data.channels}")
    if options.tokenizer and own.exists() and fingerprint(load_tokenizer(own)) != fingerprint(tokenizer):
        raise UserError(f"{options.out} has a tokenizer.pt that is another than {path}; choose another --out")
    if not own.exists() and rank_and_ranks()[0] == 0:
        save_checkpoint(own, "tokenizer", config=asdict(tokenizer.config), model=tokenizer.state_dict(),
                        copied_from=str(path))
    return tokenizer.to(options.device)


def psnr(mse: float) -> float:
    """In dB, of a mean squared error between images in [-1, 1]."""
    return 10 * math.log10(4 / max(mse, 1e-10))


def spread(images: ArrayImages | FolderImages, count: int) -> list[int]:
    """Indices of at most `count` images, evenly over all classes."""
    return np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int).tolist()


def at_a_time(side: int) -> int:
    """How many images of a side a pass without gradients takes: 512 of 32 x 32 pixels, 8 of 256 x 256."""
    return max(1, 2**19 // side**2)


def chunks(count: int, size: int) -> Iterator[list[int]]:
    return (list(range(begin, min(begin + size, count))) for begin in range(0, count, size))


@torch.no_grad()
def tokenizer_health(tokenizer: Tokenizer, data: Data, options: argparse.Namespace) -> dict:
    """Is the codebook alive? On held-out images, per scale: codes used, perplexity, PSNR decoding up to there.

    usage is of the most codes a scale could use, min(V, images * s * s); perplexity is exp of the entropy.
    """
    scales, V = tokenizer.config.scales, tokenizer.config.vocabulary
    counts_KV, errors_K, pixels = torch.zeros(len(scales), V), np.zeros(len(scales)), 0
    sample = spread(data.held_out, 2000)
    for chunk in chunks(len(sample), min(250, at_a_time(tokenizer.config.image_side))):
        images = to_float(data.held_out[[sample[i] for i in chunk]][0], options.device)
        with options.autocast():
            tokens_BL = tokenizer.encode(images)
            for k, tokens_Bl in enumerate(tokenizer.quantizer.split(tokens_BL)):
                counts_KV[k] += torch.bincount(tokens_Bl.flatten().cpu(), minlength=V)
                so_far = tokens_BL[:, :sum(s * s for s in scales[:k + 1])]
                errors_K[k] += (tokenizer.decode(so_far) - images).square().sum().item()
        pixels += images.numel()
    share_KV = counts_KV / counts_KV.sum(dim=1, keepdim=True)
    health = {
        "psnr_per_scale": [psnr(error / pixels) for error in errors_K],
        "codes_per_scale": (counts_KV > 0).sum(dim=1).tolist(),
        "usage_per_scale": [((n > 0).sum() / min(V, n.sum())).item() for n in counts_KV],
        "perplexity_per_scale": torch.special.entr(share_KV).sum(dim=1).exp().tolist(),
        "codes_used": (counts_KV.sum(dim=0) > 0).sum().item() / V,
    }
    print(f"held-out images: PSNR {health['psnr_per_scale'][-1]:.2f} dB; "
          f"{health['codes_used']:.0%} of {V} codes used\n  scale   codes  usage  perplexity  PSNR up to here")
    for s, *row in zip(scales, *(health[f"{name}_per_scale"] for name in ("codes", "usage", "perplexity", "psnr"))):
        print("  {:>2}x{:<3} {:>6} {:>6.0%} {:>11.1f} {:>13.2f} dB".format(s, s, *row))
    return health


# ---------------------------------------------------------------------------------------------------------------
# Stage two: the transformer


def tokens_of(tokenizer: Tokenizer, data: Data, options: argparse.Namespace) -> tuple[TokenData, TokenData]:
    """The training and the held-out images as tokens, which are kept in a file for the next training."""
    path = options.tokens or options.out / "tokens.pt"
    made_with = {"tokenizer": fingerprint(tokenizer), "precision": options.precision, "images": data.fingerprint}
    rank, ranks = rank_and_ranks()
    kept = [kept_tokens(path, made_with, options) if rank == 0 else None]
    if ranks > 1:
        dist.broadcast_object_list(kept, device=options.device)
    if kept[0] is not None:
        return kept[0]
    train = tokenise(tokenizer, data.train, options, "training images")
    held_out = tokenise(tokenizer, data.held_out, options, "held-out images")
    if rank == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, "set of tokens", made_with=made_with, train=vars(train), held_out=vars(held_out))
        except (UserError, OSError) as error:
            print(f"the tokens are not kept: {in_short(error)}")
    return train, held_out


def kept_tokens(path: Path, made_with: dict[str, str], options: argparse.Namespace) -> tuple[TokenData, TokenData] | None:
    """What an earlier training kept, if it was made with the same. Raises UserError where --tokens names a file of
    anything else, which would be lost."""
    if not path.exists():
        return None
    try:
        content = load_checkpoint(path, "set of tokens", "made_with", "train", "held_out")
    except UserError as error:
        if options.tokens:
            raise
        print(f"tokens are made anew: {error}")
        return None
    for name, value in made_with.items():
        if content["made_with"].get(name) != value:
            print(f"tokens are made anew: those in {path} were made with other {name}")
            return None
    print(f"tokens are those in {path}")
    return TokenData(**content["train"]), TokenData(**content["held_out"])


@torch.no_grad()
def tokenise(tokenizer: Tokenizer, images: ArrayImages | FolderImages, options: argparse.Namespace, what: str) -> TokenData:
    """Every image once: the tokenizer does not change any more."""
    kept = torch.int16 if tokenizer.config.vocabulary <= 2 ** 15 else torch.int32
    rank, ranks = rank_and_ranks()
    own = own_part(list(range(len(images))))
    size = min(128, at_a_time(tokenizer.config.image_side))
    batches = [own[begin:begin + size] for begin in range(0, len(own), size)]
    tokens, labels = [], []
    for batch, batch_labels in tqdm(read_ahead(images, batches, options), total=len(batches), desc=f"tokenise {what}",
                                    unit="batch", disable=rank > 0):
        with options.autocast():
            tokens.append(tokenizer.encode(to_float(batch, options.device)).to(kept).cpu())
        labels.append(batch_labels)
    parts = [(tokens, labels)] * ranks
    if ranks > 1:
        dist.all_gather_object(parts, (tokens, labels))
    return TokenData(*(torch.cat([x for part in parts for x in part[i]]) for i in (0, 1)))


class TokenData:
    """Tokens [N, L] and labels [N] of a whole data set."""

    def __init__(self, tokens_NL: Tensor, labels_N: Tensor):
        self.tokens_NL, self.labels_N = tokens_NL, labels_N

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.tokens_NL[indices].long(), self.labels_N[indices]


class VARStage(Stage):
    name, kind = "var", "transformer"
    recipe = ("var_steps", "var_batch", "muon", "weight_decay", "final_lr", "warmup", "ema")

    def __init__(self, tokenizer: Tokenizer, data: Data, options: argparse.Namespace):
        self.tokenizer, self.images = tokenizer, data
        train, self.held_out = tokens_of(tokenizer, data, options)
        torch.manual_seed(options.seed)
        model = VAR(options.preset.var_config(tokenizer.config, len(data.classes))).to(options.device)
        super().__init__(model, var_optimizers(model, options.preset), train, options, options.preset.ema)
        self.identity["tokenizer"] = fingerprint(tokenizer)

    def loss(self, tokens_BL: Tensor, labels_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_of(self.replica, tokens_BL, labels_B)

    def loss_of(self, model: nn.Module, tokens_BL: Tensor, labels_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy over all tokens; beside it, and beside the accuracy, their means per scale."""
        tokens_BL, labels_B = tokens_BL.to(self.options.device), labels_B.to(self.options.device)
        logits_BLV = model(labels_B, self.tokenizer.teacher_inputs(tokens_BL)).float()
        loss_BL = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten(), reduction="none").view(tokens_BL.shape)
        hit_BL, sizes = (logits_BLV.argmax(dim=-1) == tokens_BL).float(), [s * s for s in self.model.config.scales]
        per_scale = {name: torch.stack([x.mean() for x in values_BL.detach().split(sizes, dim=1)])
                     for name, values_BL in (("loss_per_scale", loss_BL), ("accuracy_per_scale", hit_BL))}
        return loss_BL.mean(), {"accuracy": hit_BL.mean(), **per_scale}

    @torch.no_grad()
    def validate(self, model: VAR) -> dict:
        with self.options.autocast():
            loss, values = self.loss_of(model, *self.held_out[spread(self.held_out, 256)])
        return {"loss": loss.item(), **{name: value.tolist() for name, value in values.items()}}

    def example(self) -> tuple[Tensor, ...]:
        tokens_BL, labels_B = self.held_out[[0]]
        return labels_B, self.tokenizer.teacher_inputs(tokens_BL.to(self.options.device))

    def finish(self, model: VAR, log: Log) -> None:
        draw_samples(self.options.out / "samples.png", model, self.tokenizer, self.images.classes, self.options)


def var_optimizers(model: VAR, preset: Preset) -> list[torch.optim.Optimizer]:
    """Decay pulls matrices that multiply features toward zero; biases, embeddings and scales are left alone.

    Muon (Jordan et al., 2024) makes each update of a matrix orthogonal, so that all its directions learn, at the step
    size AdamW would have. Tiny preset but 512 codes, one seed: held-out loss 3.22 after 116 s; AdamW 4.21 after 92 s and
    3.27 after 240 s.
    """
    lr, decay, betas = preset.var_lr, preset.weight_decay, (0.9, 0.95)
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    inside = [m.weight for block in model.blocks for part in (block.attention, block.mlp)
              for m in part.modules() if isinstance(m, nn.Linear)] if preset.muon else []

    def others(parameters, taken) -> list[nn.Parameter]:
        return [p for p in parameters if all(p is not q for q in taken)]

    groups = [{"params": others(matrices, inside), "weight_decay": decay},
              {"params": others(model.parameters(), matrices), "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr, betas=betas, fused=True)]
    if preset.muon:
        optimizers.append(torch.optim.Muon(inside, lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


# ---------------------------------------------------------------------------------------------------------------
# Pictures

# What to draw pictures with: guidance and filters that trade variety for clean shapes. (The published demonstration
# has cfg 4, top_k 900, top_p 0.95; its FID is measured at cfg 1.5.)
FILTERS = {"cfg": 4.0, "top_k": 900, "top_p": 0.75}


def save_image(path: Path, image: Image.Image) -> None:
    save_whole(path, lambda file: image.save(file, format="PNG"))


def grid(rows: list[tuple[str, Sequence[np.ndarray]]], cell: int = 64, gap: int = 2) -> Image.Image:
    """A labelled row of images (bytes [side, side, channels]) for each entry; small images are enlarged."""
    margin = max((len(label) for label, _ in rows), default=0) * 7 + 8
    cell = max(cell, *(len(pixels) for _, images in rows for pixels in images))
    columns = max(len(images) for _, images in rows)
    canvas = Image.new("RGB", (margin + columns * (cell + gap), len(rows) * (cell + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for r, (label, images) in enumerate(rows):
        draw.text((4, r * (cell + gap) + cell // 2 - 6), label, fill="black")
        for c, pixels in enumerate(images):
            image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
            image = image.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(image, (margin + c * (cell + gap), r * (cell + gap)))
    return canvas


@torch.no_grad()
def draw_reconstructions(path: Path, tokenizer: Tokenizer, data: Data, options: argparse.Namespace) -> None:
    """Held-out images above their reconstructions."""
    images = to_float(data.held_out[spread(data.held_out, 36)][0], options.device)
    with options.autocast():
        parts = [tokenizer.decode(tokenizer.encode(part)) for part in images.split(at_a_time(options.preset.image_size))]
    originals, reconstructions, rows = to_bytes(images), to_bytes(torch.cat(parts)), []
    for begin in range(0, len(images), 12):
        rows.append(("original", originals[begin:begin + 12]))
        rows.append(("reconstruction", reconstructions[begin:begin + 12]))
    save_image(path, grid(rows))


@torch.no_grad()
def draw_samples(path: Path, model: VAR, tokenizer: Tokenizer, classes: list[str], options: argparse.Namespace) -> None:
    """A row of generated images per class, for at most twenty classes."""
    names, each, parts = classes[:20], 10, []
    labels_N = torch.arange(len(names), device=options.device).repeat_interleave(each)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    for labels_B in labels_N.split(at_a_time(tokenizer.config.image_side)):
        with options.autocast():
            parts.append(to_bytes(tokenizer.decode(model.generate(tokenizer, labels_B, **FILTERS, generator=generator))))
    pixels = np.concatenate(parts)
    save_image(path, grid(list(zip(names, pixels.reshape(len(names), each, *pixels.shape[1:])))))


def draw_curves(path: Path, log: list[dict], scales: tuple[int, ...]) -> None:
    """Both losses, and the transformer's loss and accuracy per scale, against the step."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    lines = {(stage, split): [x for x in log if (x["stage"], x["split"]) == (stage, split)]
             for stage in ("tokenizer", "var") for split in ("train", "held_out")}

    def curve(axis, stage, split, value, label):
        chosen = [x for x in lines[stage, split] if len(x.get("loss_per_scale", scales)) == len(scales)]
        axis.plot([x["step"] for x in chosen], [value(x) for x in chosen], label=label,
                  marker="." if split == "held_out" else None)

    for name in ("mse", "codebook"):
        curve(axes[0, 0], "tokenizer", "train", lambda x: x[name], name)
    axes[0, 0].set(title="tokenizer: training losses", yscale="log")
    for split in ("train", "held_out"):
        curve(axes[0, 1], "var", split, lambda x: x["loss"], split.replace("_", "-"))
    axes[0, 1].set(title="transformer: loss (nats per token)")
    for axis, name in ((axes[1, 0], "loss"), (axes[1, 1], "accuracy")):
        for k, s in enumerate(scales):
            curve(axis, "var", "held_out", lambda x: x[f"{name}_per_scale"][k], f"{s}x{s}")
        axis.set(title=f"transformer: held-out {name} per scale")
    for axis in axes.flat:
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend(fontsize="small", ncols=2)
    save_whole(path, lambda file: figure.savefig(file, format="png", dpi=90))
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------
# The command line


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are values."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False   # 0 is a value
        return action.help if none else super()._get_help_string(action)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train VAR: the tokenizer, then the transformer.", formatter_class=Help)
    add = parser.add_argument
    add("--data", default="shapes",
        help="shapes (drawn), mnist, fashion-mnist, cifar10, or a folder with one sub-folder of images per class")
    add("--data-dir", type=Path, default=Path("data"), help="where known data sets are looked for first, and downloaded to")
    add("--channels", type=int, choices=(1, 3), default=3, help="3 for colour or 1 for grey, of images in a folder")
    add("--out", type=Path, help="folder to write to (default: out/ and the name of the data)")
    add("--stage", choices=("all", "tokenizer", "var"), default="all", help="what to train")
    add("--tokenizer", type=Path,
        help="train the transformer on this tokenizer, a .pt of this program or a published .pth; it is copied to --out")
    add("--tokens", type=Path, metavar="FILE",
        help="where the images' tokens are kept for the next training (default: tokens.pt in --out)")
    add("--resume", action="store_true", help="go on from the checkpoints in the folder")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a training, which is lost")
    add("--checkpoint-every", type=int, default=1000, help="steps between checkpoints")
    add("--seed", type=int, default=0, help="of every random draw")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, mps, ...")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the device is built for it")
    add("--compile", action="store_true", help="compile the models with torch.compile: slow to start, then faster")
    add("--grad-accumulation", type=int, default=1, metavar="PARTS",
        help="compute a step's batch in this many parts, to need less memory")
    add("--checkpoint-activations", action="store_true",
        help="keep only what enters a layer for the backward pass and compute the rest again: less memory, more time")
    add("--workers", type=int, default=0, help="processes that read images ahead; 4 or so for a folder of large ones")
    add("--preset", choices=PRESETS, default="tiny",
        help="a size of model and training; the flags below change single values of it")
    group = parser.add_argument_group("values of the preset (the defaults shown are those of tiny)")
    for f in fields(Preset):
        kind = {"tuple[int, ...]": numbers, "int": int, "float": float, "int | None": int}.get(f.type)
        how = {"type": kind} if kind else {"action": argparse.BooleanOptionalAction}
        text = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **how)
    return parser.parse_args(arguments)


RANGES = (   # flags, and what they must be
    ("grad_accumulation checkpoint_every image_size scales vocabulary code_channels tokenizer_width multipliers blocks phis "
     "norm_groups tokenizer_steps tokenizer_batch depth width heads last_scales var_steps var_batch",
     lambda x: x >= 1, "1 or more"),
    ("workers warmup", lambda x: x >= 0, "0 or more"),
    ("seed", lambda x: 0 <= x < 2**31, "from 0 to 2147483647"),
    ("tokenizer_lr var_lr", lambda x: 0 < x < math.inf, "more than 0"),
    ("weight_decay final_lr", lambda x: 0 <= x < math.inf, "0 or more"),
    ("unquantized drop_path ema", lambda x: 0 <= x < 1, "from 0 to less than 1"),
    ("label_dropout", lambda x: 0 <= x <= 1, "from 0 to 1"),
)


def settle(options: argparse.Namespace) -> None:
    """Turn flags into the preset, the device and the precision they mean; raises UserError for what cannot be."""
    given = {f.name: getattr(options, f.name) for f in fields(Preset) if hasattr(options, f.name)}
    options.preset = replace(PRESETS[options.preset], **given)
    everything = {**vars(options), **asdict(options.preset)}
    for names, fine, what in RANGES:
        for name in names.split():
            values = everything[name] if isinstance(everything[name], tuple) else (everything[name],)
            if not all(value is None or fine(value) for value in values):
                raise UserError(f"--{name.replace('_', '-')} {everything[name]} must be {what}")
    if options.resume and options.overwrite:
        raise UserError("--resume goes on with a training and --overwrite starts anew: one of them")
    if options.stage == "tokenizer" and options.tokenizer:
        raise UserError("--tokenizer is for the transformer's training, and --stage tokenizer is without it")
    if options.device == "cuda" and dist.is_torchelastic_launched():
        options.device = f"cuda:{os.environ['LOCAL_RANK']}"
    settle_device(options)
    join_processes(options.device)
    if options.compile:
        check_compiler(options.device)
    options.out = options.out or Path("out") / Path(options.data).resolve().name


def stages(options: argparse.Namespace) -> list[str]:
    """What is to be trained."""
    if options.stage != "all":
        return [options.stage]
    return ["var"] if options.tokenizer else ["tokenizer", "var"]


def check_trainings(options: argparse.Namespace) -> None:
    """Raises UserError for what would go wrong later, perhaps after days of the first stage."""
    preset, ranks = options.preset, rank_and_ranks()[1]
    read_log(options.out / "log.jsonl")
    if options.tokens and options.tokens.exists():
        load_checkpoint(options.tokens, "set of tokens")
    for name in stages(options):
        path, batch = options.out / f"{name}.pt", getattr(preset, f"{name}_batch")
        if batch % (ranks * options.grad_accumulation):
            raise UserError(f"--{name}-batch {batch} does not divide into {ranks} processes times --grad-accumulation "
                            f"{options.grad_accumulation}")
        if path.exists() and not (options.resume or options.overwrite):
            raise UserError(f"{path} is there already: --resume goes on with it, --overwrite starts anew, --out names "
                            f"another folder")
    if options.device.type == "cuda" and options.stage != "tokenizer" and not 16 <= preset.width // preset.heads <= 128:
        raise UserError(f"--width {preset.width} over --heads {preset.heads} must be 16 to 128 on a GPU")


def settle_device(options: argparse.Namespace) -> None:
    """The device, fp32 or bf16 on it, and what to run a model under: `with options.autocast():`. Raises UserError for a
    device that is not there."""
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device} cannot be used: {in_short(error)}")
    if options.precision == "auto":
        options.precision = "bf16" if fast_bf16(device) else "fp32"
    options.device = device
    options.autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile does not work, as without a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:   # each back end has its own
        raise UserError(f"--compile does not work here: {in_short(error)}")


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 has its own instructions; emulated, it is slower than fp32.

    Measured on two cores with AVX512-BF16, three runs of the tiny preset, forward and backward: 0.7 to 1.0 of the fp32
    time in the transformer, 0.8 in the tokenizer.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capable = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capable.get("avx512_bf16") or capable.get("amx_bf16"))


def main() -> None:
    options = parse()
    settle(options)
    preset = options.preset
    try:
        config = preset.tokenizer_config(options.channels)
        preset.var_config(config, 1)
    except ValueError as error:
        raise UserError(str(error))
    if config.image_side != preset.image_size:
        raise UserError(f"--image-size {preset.image_size} does not fit: scales up to {preset.scales[-1]} at "
                        f"downsampling {config.downsampling} are images of {config.image_side}")
    check_trainings(options)
    rank, ranks = rank_and_ranks()
    if ranks > 1 and rank > 0:   # process 0 downloads what is missing
        dist.barrier()
    data = load_data(options.data, options.data_dir, preset.image_size, options.channels, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    if ranks > 1 and rank == 0:
        dist.barrier()
    say(f"{options.data}: {len(data.train)} training and {len(data.held_out)} held-out images, {len(data.classes)} "
        f"classes; to {options.out} on {options.device}" + (f" and {ranks - 1} more" if ranks > 1 else ""))
    if options.overwrite and rank == 0:   # all at once: --resume must not find a part of the old training
        for name in stages(options):
            (options.out / f"{name}.pt").unlink(missing_ok=True)
    if "tokenizer" in stages(options):
        tokenizer = TokenizerStage(data, options).run()
    else:
        tokenizer = chosen_tokenizer(data, options)
    if "var" in stages(options):
        VARStage(tokenizer, data, options).run()
    if rank == 0:
        draw_curves(options.out / "curves.png", read_log(options.out / "log.jsonl"), tokenizer.config.scales)
    if ranks > 1:
        dist.destroy_process_group()


def run_program(main: Callable) -> None:
    """Run a program of ours: the user's mistakes end it with one sentence and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:   # a folder where a file should be, a full disk
        print(f"error: {in_short(error)}", file=sys.stderr)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt) as stopped:
        print(str(stopped) or "stopped")
        sys.exit(130)


if __name__ == "__main__":
    run_program(main)
