"""Data sets: the built-in shapes, published ones, and folders of images (see folders.py)."""
from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import math
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from support.checkpoint import blaming, download, load_checkpoint, save_checkpoint
from support.cli import UserError, in_short
from support.devices import check_memory, rank_and_world, say, wait_for_others
from support.evaluation import CLASSIFIER_IMAGES, averaged_down
from support.folders import FolderImages, Form, load_folder, read_ahead


@dataclass
class Data:
    """train and held_out give bytes [n, channels, side, side] and labels [n] for a list of rows."""
    train: Dataset
    held_out: TensorDataset
    classes: list[str]
    digest: str   # of both sets and their order: a training goes on only with the same
    white: int | None = None   # of grey files of 16 bits, see folders.Form

    @property
    def channels(self) -> int:
        return self.held_out.tensors[0].shape[1]

    def keep_held_out(self, out: Path) -> None:
        """In a run's folder, for sample.py."""
        images, labels = self.held_out.tensors
        save_checkpoint(out / "held_out.pt", "set of held-out images", images=images, labels=labels,
                        classes=self.classes, data_set=self.digest)

    def keep_classifier_images(self, out: Path, workers: int) -> None:
        """In a run's folder, for the classifier by which sample.py judges."""
        if rank_and_world()[0] > 0:
            return
        images, labels = classifier_images(self, workers)
        side = self.held_out.tensors[0].shape[-1]
        save_checkpoint(out / "train_images.pt", "set of training images", images=images,
                        labels=labels, side=side, data_set=self.digest)


def load_held_out(folder: Path, config=None, data_set: str | None = None
                  ) -> tuple[TensorDataset | None, list[str] | None]:
    """The images that train.py kept in a run's folder, if any, and the names of their classes.

    config: the tokenizer's. data_set: the digest of what the images should be of; others are left
    out. Raises UserError for those of another size.
    """
    path = folder / "held_out.pt"
    if not path.exists():
        return None, None
    with blaming(path):
        content = load_checkpoint(path, "set of held-out images")
        images = content["images"]
        if config and images.shape[1:] != (config.image_channels, *2 * [config.image_side]):
            raise ValueError("its images are of another size than the tokenizer's")
        if data_set not in (None, content.get("data_set", data_set)):
            print(f"note: {path} is of other images than the transformer was trained on, and is "
                  f"left out; train.py --stage var --resume, with its --data, writes it anew")
            return None, None
        return TensorDataset(images, content["labels"]), content.get("classes")


def load_data(
    name: str,
    side: int,
    channels: int | None,
    out: Path,
    data_dir: Path,
    seed: int,
    workers: int,
    stream: bool,
    white: int | None = None,
) -> Data:
    """Images to train on, and images to hold out.

    name: shapes, a published set, downloaded to `data_dir`, or a folder, decoded to files in `out`
    or, with `stream`, read as training goes. channels: those asked for, if any; a folder is read
    so, else in colour. workers and white (see folders.Form) are for folders, seed for shapes.
    Raises UserError.
    """
    rank, _ = rank_and_world()
    if rank > 0:   # process 0 downloads and decodes what is missing
        wait_for_others()
    if name == "shapes":
        train = draw_shapes(20_000, side, seed=2 * seed)
        held_out = draw_shapes(1000, side, seed=2 * seed + 1)
        data = data_of(train, held_out, SHAPES)
    elif name in PUBLISHED:
        read = read_cifar10 if name == "cifar10" else read_idx
        data = data_of(*read(name, data_dir, side), PUBLISHED[name].classes)
    elif Path(name).is_dir():
        form = Form(side, channels or 3, white)
        folder, classes = load_folder(Path(name), form, out, workers, stream)
        data = Data(folder.train, folder.held_out, classes, folder.digest, white)
    else:
        raise UserError(f"--data {name} is neither a folder nor one of shapes, "
                        f"{', '.join(PUBLISHED)}")
    if rank == 0:
        wait_for_others()
    if name in ("shapes", *PUBLISHED) and Path(name).is_dir():
        say(f"note: {name} is the set of that name; the folder here would be --data ./{name}")
    if channels not in (None, data.channels):
        raise UserError(f"{name} has images of {data.channels} channels, and {channels} are asked "
                        f"for, by --channels or the tokenizer")
    say(f"{name}: {len(data.train)} training and {len(data.held_out)} held-out images, "
        f"{len(data.classes)} classes: {in_short(', '.join(data.classes), 100)}")
    return data


def data_of(train: TensorDataset, held_out: TensorDataset, classes: Sequence[str]) -> Data:
    """With a digest of what is in the images."""
    digest = hashlib.sha256()
    for tensor in (*train.tensors, *held_out.tensors):
        digest.update(tensor.numpy())
    return Data(train, held_out, list(classes), digest.hexdigest())


def balanced_subset(dataset: TensorDataset, count: int) -> list[int]:
    """At most `count` rows: the first image of every class, then the second of every class, ..."""
    labels_N = dataset.tensors[1].numpy()
    round_N = np.zeros_like(labels_N)
    for label in np.unique(labels_N):
        own = labels_N == label
        round_N[own] = np.arange(own.sum())
    return np.lexsort((labels_N, round_N))[:count].tolist()


def classifier_images(data: Data, workers: int) -> tuple[Tensor, Tensor]:
    """Bytes, no larger than a classifier sees them, and labels, to train it on."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    rows = order[:CLASSIFIER_IMAGES].sort().values
    batches = [some.tolist() for some in rows.split(256)]
    images = []
    labels = []
    loaded = read_batches(data.train, batches, workers, torch.device("cpu"))
    for pixels, labels_B in loaded:
        images.append(averaged_down(pixels.float()).round().byte())
        labels.append(labels_B)
    return torch.cat(images), torch.cat(labels)


def shuffled(count: int, batch: int, seed: int, begin: int, end: int) -> Iterator[list[int]]:
    """The rows of train steps begin .. end-1: each pass over the data in a new order, fixed by the
    seed."""
    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(count, generator=generator).tolist()

    epoch, done = divmod(begin * batch, count)
    passes = map(order, itertools.count(epoch))
    rows = itertools.chain.from_iterable(passes)
    rows = itertools.islice(rows, done, None)
    for _ in range(begin, end):
        yield list(itertools.islice(rows, batch))


def read_batches(
    dataset: Dataset, rows_of_batches: Iterable[list[int]], workers: int, device: torch.device
) -> Iterator[list[Tensor]]:
    """The tensors of each list of rows, ready to be copied to the device.

    Meanwhile `workers` threads read image files; for a GPU one thread reads what is mapped into
    memory, which may have to come from the disk.
    """
    gpu = device.type == "cuda"
    threads = workers if isinstance(dataset, FolderImages) else int(gpu)
    for tensors in read_ahead(dataset.__getitem__, rows_of_batches, threads):
        yield [x.pin_memory() if gpu else x for x in tensors]


SHAPES = ("circle", "ring", "square", "triangle", "star", "cross", "heart", "crescent", "arrow",
          "bar")


def draw_shapes(count: int, side: int, seed: int) -> TensorDataset:
    """The built-in data: a coloured shape on a background that runs from one colour to another."""
    from matplotlib.colors import hsv_to_rgb
    check_memory(62 * count * side**2, f"{count} shapes of --image-size {side}")   # as measured
    rng = np.random.default_rng(seed)
    labels_N = np.arange(count) % len(SHAPES)
    size_N = rng.uniform(0.28, 0.42, count)
    angle_N = rng.uniform(-0.35, 0.35, count)
    x_N, y_N = 0.5 + rng.uniform(-1, 1, (2, count)) * (0.48 - size_N)
    places = zip(labels_N, size_N, angle_N, x_N, y_N)
    covers = [draw_shape(SHAPES[label], *place, side) for label, *place in places]
    cover_N1HW = np.stack(covers)[:, None].astype(np.float32) / 255

    # One is light and the other dark, so that no shape is hidden; the background's two ends have
    # neighbouring hues.
    hue_2N = rng.random((2, count))
    shift_2N = rng.uniform(-0.12, 0.12, (2, count))

    def two_colours(low: list, high: list, hue_N: np.ndarray) -> np.ndarray:
        """[2, N, 3, 1, 1]. low, high: limits of saturation and value."""
        saturation_2N, value_2N = rng.uniform(low, high, (2, 2, count)).swapaxes(0, 1)
        hsv_2N3 = np.stack([(hue_N + shift_2N) % 1, saturation_2N, value_2N], axis=-1)
        return 255 * hsv_to_rgb(hsv_2N3).astype(np.float32)[..., None, None]

    light = two_colours([[0.3], [0.75]], [[0.65], [0.95]], hue_2N[0])
    dark = two_colours([[0.4], [0.28]], [[0.8], [0.52]], hue_2N[1])
    flip_N111 = rng.random((count, 1, 1, 1)) < 0.5
    shape, _ = np.where(flip_N111, light, dark)
    start, end = np.where(flip_N111, dark, light)
    direction_N111 = rng.uniform(0, 2 * math.pi, (count, 1, 1, 1))
    y_HW, x_HW = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    along_N1HW = np.cos(direction_N111) * x_HW + np.sin(direction_N111) * y_HW
    background_N3HW = start + (end - start) * (0.5 + 0.7 * along_N1HW.astype(np.float32))
    images_N3HW = background_N3HW + (shape - background_N3HW) * cover_N1HW
    pixels = images_N3HW.clip(0, 255).round().astype(np.uint8)
    return TensorDataset(torch.from_numpy(pixels), torch.from_numpy(labels_N))


def draw_shape(
    name: str, size: float, angle: float, x: float, y: float, side: int
) -> np.ndarray:
    """Coverage [side, side] in [0, 255] of one shape: drawn four times as large, then averaged.

    size: half the shape's extent; x, y: its centre; both as shares of the side. angle: in radians.
    A point is a complex number, so a turn is a product.
    """
    canvas = Image.new("L", (4 * side, 4 * side))
    draw = ImageDraw.Draw(canvas)
    turn = size * np.exp(1j * angle)

    def place(points):
        return 4 * side * (points * turn + x + 1j * y)

    def disc(centre: float, radius: float, fill: int) -> None:
        middle = place(centre)
        r = 4 * side * radius * size
        box = (middle.real - r, middle.imag - r, middle.real + r, middle.imag + r)
        draw.ellipse(box, fill=fill)

    if name in OUTLINES:
        points = place(np.array(OUTLINES[name]))
        draw.polygon(list(zip(points.real, points.imag)), fill=255)
    else:
        disc(0, 0.95, 255)
    if name == "ring":
        disc(0, 0.5, 0)
    if name == "crescent":
        disc(0.45, 0.75, 0)
    return np.asarray(canvas.reduce(4))


def heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 60)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t)
    y = y - 2 * np.cos(3 * t) - np.cos(4 * t)
    return 0.063 * (x - 1j * y)


TURNS = np.array([1, 1j, -1, -1j])   # by 0, 90, 180 and 270 degrees
OUTLINES = {   # x + 1j y, from -1 to 1, y down
    "square": (-0.8 - 0.8j) * TURNS,
    "triangle": [-1j, 0.95 + 0.75j, -0.95 + 0.75j],
    "star": -1j * np.multiply(
        np.tile([1.0, 0.48], 5),
        np.exp(1j * np.pi / 5 * np.arange(10)),
    ),
    "cross": np.outer(
        TURNS,
        [-0.3 - 1j, 0.3 - 1j, 0.3 - 0.3j],   # an arm
    ).ravel(),
    "heart": heart(),
    "arrow": [
        -1j, 0.85 - 0.05j, 0.32 - 0.05j, 0.32 + 1j,
        -0.32 + 1j, -0.32 - 0.05j, -0.85 - 0.05j,
    ],
    "bar": [
        -1 - 0.3j, 1 - 0.3j,
        1 + 0.3j, -1 + 0.3j,
    ],
}


@dataclass(frozen=True)
class Published:
    """A published data set: where it is downloaded from, and the SHA-256 of its files' content.

    Of the idx files that is what they decompress to, since they are compressed in several ways.
    """
    url: str
    files: dict[str, str]
    classes: Sequence[str]


IDX_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
             "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
PUBLISHED = {
    "mnist": Published("https://storage.googleapis.com/cvdf-datasets/mnist/", dict(zip(IDX_FILES, (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ))), "0123456789"),
    "fashion-mnist": Published("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", dict(
        zip(IDX_FILES, (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ))),
        ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
         "boot")),
    "cifar10": Published("https://www.cs.toronto.edu/~kriz/", {
        "cifar-10-binary.tar.gz":
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    }, ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
        "truck")),
}
SYSTEM_DATA = Path("/usr/share/datasets")   # where Debian's dataset-* packages put theirs


def known_file(name: str, file: str, data_dir: Path) -> bytes:
    """The content of a published file, found or downloaded. Raises UserError for any other."""
    own = data_dir / name / file
    for path in (own, SYSTEM_DATA / name / file, data_dir / file):
        if not path.exists():
            continue
        content = path.read_bytes()
        if file in IDX_FILES:
            with contextlib.suppress(OSError, EOFError, zlib.error):   # a damaged one fails below
                content = gzip.decompress(content)
        found = hashlib.sha256(content).hexdigest()
        if found == PUBLISHED[name].files[file]:
            return content
        # Data sets in MNIST's format have files of the same names: another's is passed over.
        if not any(found in each.files.values() for each in PUBLISHED.values()):
            raise UserError(f"{path} is not the published file, its SHA-256 is another; remove it")
    download(PUBLISHED[name].url + file, own)
    return known_file(name, file, data_dir)


def read_idx(name: str, data_dir: Path, side: int) -> Iterator[TensorDataset]:
    """MNIST's format: a header of 16 or 8 bytes, then a byte for each pixel or each label."""
    for split in ("train", "t10k"):
        pixels = known_file(name, f"{split}-images-idx3-ubyte.gz", data_dir)
        labels = known_file(name, f"{split}-labels-idx1-ubyte.gz", data_dir)
        images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28)
        labels = np.frombuffer(labels, np.uint8, offset=8)
        yield fit_side(images, labels, side)


def read_cifar10(name: str, data_dir: Path, side: int) -> Iterator[TensorDataset]:
    """Records of one label byte and 3072 pixel bytes: planes of 32 x 32 red, green and blue."""
    content = known_file(name, "cifar-10-binary.tar.gz", data_dir)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for files in ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]):
            parts = [archive.extractfile(f"cifar-10-batches-bin/{file}").read() for file in files]
            records = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 3073)
            images = records[:, 1:].reshape(-1, 3, 32, 32)
            yield fit_side(images, records[:, 0], side)


def fit_side(images: np.ndarray, labels: np.ndarray, side: int) -> TensorDataset:
    """Images that are a little smaller are padded with black, 28 to 32 say; others are resized."""
    check_memory(math.prod(images.shape[:2]) * side**2, f"images of --image-size {side}")
    border = side - images.shape[-1]
    pixels = torch.tensor(images)
    if 0 <= border <= images.shape[-1] / 4:
        before = border // 2
        after = border - before
        pixels = F.pad(pixels, (before, after, before, after))
    else:
        mode = "area" if border < 0 else "bicubic"
        resized = torch.empty(*pixels.shape[:2], side, side, dtype=torch.uint8)
        # As floats, all take four times as much memory.
        for some, own in zip(pixels.split(1000), resized.split(1000)):
            values = F.interpolate(some.float(), side, mode=mode)
            own[:] = values.round().clamp(0, 255)
        pixels = resized
    return TensorDataset(pixels, torch.tensor(labels, dtype=torch.int64))
