"""Data sets: read right from every format, refused in a sentence where a file is damaged or
strange, and folders as people have them: decoded once, with what does not belong left out."""
from __future__ import annotations

import gzip
import hashlib
import inspect
import io
import math
import multiprocessing
import os
import shutil
import struct
import sys
import tarfile
import threading
import unicodedata
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import rgb_to_hsv
from PIL import Image
from program import damaged, draws, read_or_refused

from support import folders
from support.checkpoint import save_checkpoint
from support.cli import UserError
from support.data import (
    PUBLISHED,
    SHAPES,
    Data,
    balanced_subset,
    classifier_images,
    draw_shape,
    draw_shapes,
    fit_side,
    load_data,
    load_held_out,
    read_batches,
    shuffled,
)
from support.folders import read_ahead
from support.images import Walk, read_image
from support.presets import chosen_preset, training_flags

CPU = torch.device("cpu")


def load(name, out: Path = Path("unused"), side: int = 8, channels: int | None = None, **others) -> Data:
    return load_data(str(name), side, channels, out, **{
        "data_dir": Path("unused"), "seed": 0, "workers": 2, "stream": False, **others})


# Data sets that others published


def idx(values: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, values.ndim))
    sizes = b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    return header + sizes + values.astype(np.uint8).tobytes()


def publish(monkeypatch, name: str, files: dict[str, bytes]) -> None:
    """As if these were the published contents."""
    sums = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], files=sums))


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """Six images to train on and two to hold out, and where they are."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (8, 28, 28))
    parts = (idx(x[:6]), idx(np.arange(6)), idx(x[6:]), idx(np.arange(2)))
    files = dict(zip(PUBLISHED["mnist"].files, parts))
    publish(monkeypatch, "mnist", files)
    for file, content in files.items():
        (tmp_path / file).write_bytes(gzip.compress(content))
    return x, tmp_path


def load_known(name: str, folder: Path, side: int) -> Data:
    return load(name, side=side, data_dir=folder)


def test_idx_files(mnist):
    x, folder = mnist
    data = load_known("mnist", folder, 32)
    pixels, labels = data.train[[0, 1, 2, 3, 4, 5]]
    assert pixels.shape == (6, 1, 32, 32) and len(data.held_out) == 2 and data.channels == 1
    assert np.array_equal(pixels[:, 0, 2:30, 2:30], x[:6]) and labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert pixels.sum() == x[:6].sum()   # around them it is black
    assert np.array_equal(data.held_out.tensors[0][:, 0, 2:30, 2:30], x[6:])


def test_idx_files_compressed_in_another_way_are_the_same(mnist):
    _, folder = mnist
    before = load_known("mnist", folder, 32).digest
    for path in folder.glob("*.gz"):
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=1, mtime=7))
    assert load_known("mnist", folder, 32).digest == before


def test_idx_files_that_are_others_are_refused(mnist):
    _, folder = mnist
    path = folder / "train-images-idx3-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    for broken in path.read_bytes()[:200], b"no archive", gzip.compress(content[:-1]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="not the published file"):
            load_known("mnist", folder, 32)


def test_cifar10_files(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    path = tmp_path / "cifar-10-binary.tar.gz"
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    with tarfile.open(path, "w:gz") as archive:
        for label, name in enumerate(names):
            record = bytes([label]) + pixels[label].tobytes()
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(record)
            archive.addfile(member, io.BytesIO(record))
    publish(monkeypatch, "cifar10", {path.name: path.read_bytes()})
    data = load_known("cifar10", tmp_path, 32)
    images, labels = data.train[[0, 1, 2, 3, 4]]
    assert np.array_equal(images, pixels[:5]) and labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(data.held_out.tensors[0], pixels[5:]) and data.classes[5] == "dog"
    half = load_known("cifar10", tmp_path, 16).held_out.tensors[0]
    mean = pixels[5:].reshape(1, 3, 16, 2, 16, 2).mean(axis=(3, 5))
    assert np.array_equal(half, mean.round())
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="not the published file"):
        load_known("cifar10", tmp_path, 32)


def test_downloads_are_checked_before_they_are_used(mnist, tmp_path, monkeypatch):
    x, served = mnist
    known = PUBLISHED["mnist"]
    monkeypatch.setitem(PUBLISHED, "mnist", replace(known, url=served.as_uri() + "/"))
    fetched = tmp_path / "fetched"
    data = load_known("mnist", fetched, 32)
    assert np.array_equal(data.train[[0]][0][0, 0, 2:30, 2:30], x[0])
    assert len(list((fetched / "mnist").iterdir())) == 4
    shutil.rmtree(fetched)
    (served / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="cannot download"):
        load_known("mnist", fetched, 32)


def test_files_of_another_data_set_are_passed_over(mnist, tmp_path, monkeypatch):
    x, served = mnist
    others = {file: b"other " + file.encode() for file in PUBLISHED["mnist"].files}
    publish(monkeypatch, "fashion-mnist", others)
    monkeypatch.setitem(
        PUBLISHED, "mnist", replace(PUBLISHED["mnist"], url=served.as_uri() + "/"))
    folder = tmp_path / "both"
    folder.mkdir()
    for file, content in others.items():
        (folder / file).write_bytes(gzip.compress(content))
    data = load_known("mnist", folder, 32)
    assert np.array_equal(data.train[[0]][0][0, 0, 2:30, 2:30], x[0])
    assert len(list((folder / "mnist").iterdir())) == 4


def lens(a: float, b: float, distance: float) -> float:
    """The area that two discs of radius a and b share."""
    along = (distance**2 + a**2 - b**2) / (2 * distance)   # where their borders cross
    half = math.sqrt(a**2 - along**2)
    sectors = a**2 * math.atan2(half, along) + b**2 * math.atan2(half, distance - along)
    return sectors - half * distance


def test_the_built_in_shapes_are_deterministic_and_distinct():
    (one, labels), (again, _), (other, _) = (draw_shapes(30, 32, s).tensors for s in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert labels.bincount().tolist() == [3] * 10
    assert one.flatten(1).float().std(dim=1).min() > 10   # no shape is hidden in its background


@pytest.mark.parametrize("name, area", {
    "circle": math.pi * 0.95**2,
    "ring": math.pi * (0.95**2 - 0.5**2),
    "square": 1.6**2,
    "triangle": 1.9 * 1.75 / 2,
    "star": 5 * 0.48 * math.sin(math.pi / 5),
    "cross": 2 * 2 * 0.6 - 0.6**2,
    "heart": 0.063**2 * 180 * math.pi,
    "crescent": math.pi * 0.95**2 - lens(0.95, 0.75, 0.45),
    "arrow": 1.7 * 0.95 / 2 + 0.64 * 1.05,
    "bar": 2 * 0.6,
}.items())
@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_the_shapes_have_their_areas(name, area, angle):
    cover = draw_shape(name, 0.35, angle, 0.45, 0.55, 128) / 255
    assert cover.mean() == pytest.approx(area * 0.35**2, rel=0.03)
    rows, columns = np.indices(cover.shape) / 128
    if name in ("circle", "ring", "square", "star", "cross"):   # their middle is their centre
        assert (cover * columns).sum() / cover.sum() == pytest.approx(0.45, abs=0.02)
        assert (cover * rows).sum() / cover.sum() == pytest.approx(0.55, abs=0.02)


def test_an_odd_border_is_wider_on_the_right_and_below():
    image = np.full((1, 1, 12, 12), 9, np.uint8)
    pixels = fit_side(image, np.zeros(1), 15).tensors[0]
    assert pixels[0, 0].sum(dim=0).tolist() == pixels[0, 0].sum(dim=1).tolist() == [0, *[108] * 12, 0, 0]


@pytest.mark.parametrize("side", [16, 24])
def test_images_that_are_much_smaller_are_enlarged(side):
    """And not framed in black: 16 is a third more. Where the curve of an edge overshoots, it is cut off."""
    image = np.zeros((1, 3, 12, 12), np.uint8)
    image[..., 6:] = 255
    pixels = fit_side(image, np.zeros(1), side).tensors[0]
    assert pixels.shape == (1, 3, side, side) and pixels.dtype == torch.uint8
    half = side // 2
    assert pixels[..., :half].max() < 128 < pixels[..., half:].min()
    assert not pixels[..., 0].any() and (pixels[..., -1] == 255).all()


# The order of training, and what stands for all


def test_training_order_visits_everything_once_a_pass():
    steps = list(shuffled(10, 4, seed=0, begin=0, end=5))
    seen = [row for rows in steps for row in rows]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert list(shuffled(10, 4, seed=0, begin=3, end=5)) == steps[3:]


def test_a_balanced_subset_has_all_classes():
    labels = torch.tensor([2, 0, 0, 0, 1, 1, 2, 0, 0, 1])
    data = torch.utils.data.TensorDataset(labels, labels)
    rows = balanced_subset(data, 7)
    assert labels[rows].tolist() == [0, 1, 2, 0, 1, 2, 0] and len(set(rows)) == 7
    assert rows[:3] == [1, 4, 0]   # the first of each class
    assert sorted(balanced_subset(data, 99)) == list(range(10))


@pytest.mark.parametrize("side, scales", [(16, (1, 2, 4)), (48, (1, 2, 4, 8, 12)),
                                          (64, (1, 2, 4, 8, 16)), (4, (1,))])
def test_scales_are_derived_and_said(side, scales, capsys):
    """Where those of the preset do not fit."""
    options = training_flags().parse_args(["--image-size", str(side)])
    assert chosen_preset(options).scales == scales
    assert ",".join(map(str, scales)) in capsys.readouterr().out
    chosen_preset(training_flags().parse_args(["--image-size", str(side + 2)]))
    for flags in ("--tokenizer", "a.pt"), ("--stage", "var"):
        chosen_preset(training_flags().parse_args(["--image-size", str(side), *flags]))
    assert not capsys.readouterr().out   # of a side that is refused, and of a tokenizer's own


# Folders of one's own


def draw_folder(root: Path, classes: dict[str, int], side: int = 12) -> Path:
    """Pictures by class; no two are the same."""
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03}.png")
    return root


def break_file(path: Path) -> None:
    path.write_bytes(b"no image")


def everything(data: Data) -> list[torch.Tensor]:
    return [*data.train[list(range(len(data.train)))], *data.held_out.tensors]


def test_a_folder_is_decoded_once(tmp_path, monkeypatch):
    root = draw_folder(tmp_path / "data", {"a": 22, "b": 3})
    break_file(root / "a" / "007.png")
    out = tmp_path / "out"
    data = load(root, out)
    assert len(data.train) == 21 and len(data.held_out) == 3   # every twentieth, at least one
    pixels, labels, held_out, held_out_labels = everything(data)
    names = [f"a/{i:03}" for i in range(22) if i % 20 and i != 7] + ["b/001", "b/002"]
    assert np.array_equal(pixels, [read_image(root / f"{name}.png", 8, 3) for name in names])
    assert labels.tolist() == [0] * 19 + [1] * 2
    names = ["a/000", "b/000", "a/020"]   # the first of every class, then the second
    assert np.array_equal(held_out, [read_image(root / f"{name}.png", 8, 3) for name in names])
    assert held_out_labels.tolist() == [0, 1, 0]
    assert {path.name for path in out.iterdir()} == {"train.npy", "held_out.npy", "decoded.pt"}
    assert np.array_equal(np.load(out / "train.npy"), pixels)

    with monkeypatch.context() as patch:   # again, without an image being opened
        patch.setattr("support.folders.decode_image", None)
        again = load(root, out)
        assert again.digest == data.digest and all(map(torch.equal, everything(again), everything(data)))
        again = load(root.rename(tmp_path / "moved"), out)
        assert again.digest == data.digest
    whole = [x.clone() for x in everything(data)]   # not in files that are written over
    for name in ("train", "held_out"):   # a damaged one is decoded anew
        content = bytearray((out / f"{name}.npy").read_bytes())
        content[-50] ^= 1
        (out / f"{name}.npy").write_bytes(content)
        assert all(map(torch.equal, everything(load(tmp_path / "moved", out)), whole))
    for size in (1000, 0):   # cut by something else
        (out / "train.npy").write_bytes((out / "train.npy").read_bytes()[:size])
        assert torch.equal(load(tmp_path / "moved", out).train[[20]][0], pixels[[20]])
    for name, size, side in (("train", 20, 8), ("held_out", 4, 8), ("train", 21, 4)):   # another run's
        np.save(out / f"{name}.npy", np.zeros((size, 3, side, side), np.uint8))
        assert all(map(torch.equal, everything(load(tmp_path / "moved", out)), whole))


def test_enough_images_are_held_out_whatever_their_size():
    assert folders.HELD_OUT_BYTES // (3 * 256**2) >= 1000


def test_images_of_any_size_are_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "HELD_OUT_BYTES", 100)   # of one there are 192
    root = draw_folder(tmp_path / "data", {"a": 4, "b": 3})
    assert len(load(root, tmp_path / "out").held_out) == 1


def test_folders_may_be_nested_deeply(tmp_path):
    before = os.getcwd()
    try:
        os.chdir(tmp_path)
        for depth in range(300):
            os.mkdir("x")
            os.chdir("x")
    finally:
        os.chdir(before)
    limit = sys.getrecursionlimit()
    deepest = Path(tmp_path, *300 * ["x"])
    Image.new("L", (8, 8)).save(deepest / "a.png")
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        assert Walk(tmp_path).images_below(tmp_path) == [deepest / "a.png"]
    finally:
        sys.setrecursionlimit(limit)


def test_images_are_resized_by_lanczos(tmp_path):
    """The digest of decoded data is of the files: another filter would go unnoticed."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    noise = Image.fromarray(pixels)
    noise.save(tmp_path / "a.png")
    expected = noise.resize((8, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(read_image(tmp_path / "a.png", 8, 1)[0], np.asarray(expected))


def test_held_out_images_of_an_older_run_stay(tmp_path):
    """Before they were kept with a digest of what they are of."""
    save_checkpoint(tmp_path / "held_out.pt", "set of held-out images",
                    images=torch.zeros(1, 3, 8, 8), labels=torch.zeros(1))
    assert load_held_out(tmp_path, None, "a digest")[0] is not None


def test_what_cannot_be_read_again_is_told(tmp_path, monkeypatch):
    root = draw_folder(tmp_path / "data", {"a": 4, "b": 3})
    monkeypatch.setattr("support.folders.load_decoded", lambda *_: None)   # as where none is mapped
    with pytest.raises(UserError, match="out cannot be read again; --stream"):
        load(root, tmp_path / "out")


def test_identity_is_names_sizes_and_content(tmp_path):
    """Data that were copied anew, to another disk or node, are the same data."""
    root = draw_folder(tmp_path / "data", {"a": 4, "b": 3})
    data = load(root, tmp_path / "out")
    copy = shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in copy.rglob("*.png"):
        os.utime(path, (1, 1))
    again = load(copy, tmp_path / "out")
    assert again.digest == data.digest and all(map(torch.equal, everything(again), everything(data)))
    assert load(copy, tmp_path / "out", stream=True).digest == load(root, stream=True).digest
    path = copy / "b" / "001.png"
    content = path.read_bytes()
    other = copy / "b" / "002.png"
    path.write_bytes(other.read_bytes())   # the pictures of two names change places
    other.write_bytes(content)
    assert load(copy, tmp_path / "out").digest != data.digest
    assert load(root, tmp_path / "grey", channels=1).digest != data.digest
    (root / "b" / "001.png").rename(root / "b" / "0015.png")
    streamed = load(copy, stream=True).digest
    (copy / "b" / "001.png").rename(copy / "b" / "0015.png")   # what is streamed is known by its name
    renamed = load(copy, stream=True).digest
    assert renamed != streamed
    (copy / "b" / "0015.png").write_bytes(content + b"more")   # and by its size
    assert load(copy, stream=True).digest != renamed
    assert load(root, tmp_path / "out").digest != data.digest


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_held_out_is_part_of_the_identity(tmp_path, stream):
    root = draw_folder(tmp_path / "data", {"a": 4, "b": 3})
    before = load(root, tmp_path / "out", stream=stream).digest
    shutil.copyfile(root / "a" / "003.png", root / "a" / "000.png")   # the first one is held out
    assert load(root, tmp_path / "out", stream=stream).digest != before


def test_what_cannot_be_read_is_named_and_left_out(tmp_path, capsys):
    """The next one takes the place of what would be held out."""
    root = draw_folder(tmp_path / "data", {"a": 18, "b": 3})
    break_file(root / "a" / "000.png")
    break_file(root / "b" / "002.png")
    for stream in (False, False, True):
        data = load(root, tmp_path / "out", stream=stream)
        said = capsys.readouterr().out
        told = said.splitlines()[-2]
        assert told.startswith(f"{2 - stream} images cannot be read and are left out")
        assert (f"(remove {tmp_path / 'out' / 'decoded.pt'} to try again)" in told) != stream
        assert "a/000.png" in told and ("b/002.png" in told or stream)
        assert np.array_equal(data.held_out.tensors[0][0], read_image(root / "a" / "001.png", 8, 3))
        assert data.held_out.tensors[1].tolist() == [0, 1] and len(data.train) == 17 + stream
    break_file(root / "b" / "001.png")
    with pytest.raises(UserError, match="class b has no image to train on"):
        load(root, tmp_path / "out")
    for path in root.rglob("*.png"):
        break_file(path)
    for stream in (False, True):
        with pytest.raises(UserError, match="none of the 21 images can be read"):
            load(root, tmp_path / "out", stream=stream)


def test_a_folder_is_read_as_training_goes(tmp_path, capsys):
    root = draw_folder(tmp_path / "data", {"a": 22, "b": 3})
    break_file(root / "a" / "007.png")
    decoded = load(root, tmp_path / "one")
    data = load(root, tmp_path / "two", stream=True)
    assert not (tmp_path / "two").exists() and len(data.train) == 22
    assert all(map(torch.equal, data.held_out.tensors, decoded.held_out.tensors))
    pixels, labels = data.train[[5, 6, 7]]   # 006, 007 and 008: the next image stands in for 007
    assert torch.equal(pixels, decoded.train[[5, 6, 6]][0]) and labels.tolist() == [0] * 3
    data.train[[6]]
    assert capsys.readouterr().out.count(f"left out: {root}/a/007.png") == 1 + 1   # once each way
    for some in (data, decoded):
        images, labels = classifier_images(some, workers=2)
        assert images.shape[1:] == (3, 8, 8) and labels.bincount().tolist()[1] == 2


def test_an_image_that_stands_in_keeps_its_label(tmp_path):
    root = draw_folder(tmp_path / "data", {"a": 2, "b": 2})
    data = load(root, stream=True)
    break_file(root / "a" / "001.png")
    images, labels = data.train[[0, 1]]
    assert labels.tolist() == [1, 1] and torch.equal(images[0], images[1])
    root = draw_folder(tmp_path / "more", {"a": 2, "b": 2})
    data = load(root, stream=True)
    break_file(root / "b" / "001.png")   # after the last one comes the first
    assert data.train[[1]][1].tolist() == [0]


@pytest.mark.parametrize("channels, held_out", [(3, 2), (1, 3)])
def test_no_more_is_held_out_than_is_to_be_kept(tmp_path, monkeypatch, channels, held_out):
    """Of bytes, and of images; of every class in turn."""
    root = draw_folder(tmp_path / "data", {name: 2 for name in "abcd"})
    monkeypatch.setattr("support.folders.HELD_OUT_BYTES", 2 * 3 * 8 * 8)
    monkeypatch.setattr("support.folders.HELD_OUT_IMAGES", 3)
    data = load(root, tmp_path / "out", channels=channels)
    assert data.held_out.tensors[1].tolist() == list(range(held_out))
    assert len(data.train) == 8 - held_out


def test_decoding_that_ends_early_leaves_nothing_half_written(tmp_path, monkeypatch):
    root = draw_folder(tmp_path / "data", {"a": 12})
    out = tmp_path / "out"
    whole = everything(load(root, out))
    touched = root / "a" / "001.png"
    status = touched.stat()
    touched.touch()   # so it has to be decoded again
    read = []

    def stop(content, path, *shape):
        read.append(path)
        if len(read) == 7:
            raise KeyboardInterrupt
        return np.zeros((3, 8, 8), np.uint8)

    with monkeypatch.context() as patch:
        patch.setattr("support.folders.decode_image", stop)
        with pytest.raises(KeyboardInterrupt):
            load(root, out)
    assert not list(out.glob("*.partial"))
    os.utime(touched, ns=(status.st_atime_ns, status.st_mtime_ns))   # as it was, but not in `out`
    assert all(map(torch.equal, everything(load(root, out)), whole))


def test_a_full_disk_is_one_sentence(tmp_path):
    """As far as a program sees it: a file may not grow."""
    resource = pytest.importorskip("resource")
    root = draw_folder(tmp_path / "data", {"a": 12})
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="train.npy cannot be written.*too large.*--stream"):
            load(root, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in out.iterdir()] == ["held_out.npy"]


# How files are read meanwhile


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_reading_starts_no_process(tmp_path, monkeypatch, method):
    """So it is the same however they start, and needs no shared memory."""
    root = draw_folder(tmp_path / "data", {"a": 9})
    monkeypatch.setattr(multiprocessing, "Process", None)
    before = multiprocessing.get_start_method(allow_none=True)
    shared = Path("/dev/shm")
    there = set(shared.glob("*"))
    multiprocessing.set_start_method(method, force=True)
    try:
        decoded = load(root, tmp_path / "out")
        data = load(root, stream=True)
        batches = read_batches(data.train, [[0, 1], [2], [7, 0, 3]], 2, CPU)
        images, labels = next(batches)
        assert {path for path in shared.glob("torch_*")} <= there
    finally:
        multiprocessing.set_start_method(before, force=True)
    rest = [images, *(images for images, _ in batches)]
    assert torch.equal(torch.cat(rest), decoded.train[[0, 1, 2, 7, 0, 3]][0])
    assert labels.tolist() == [0, 0]


@pytest.mark.parametrize("workers", [0, 3])
def test_readers_keep_order_and_hand_on_errors(workers):
    main = threading.current_thread()
    assert list(read_ahead(lambda i: i * i, range(20), workers)) == [i * i for i in range(20)]
    asked = []

    def read(i: int) -> int:
        asked.append(i)
        assert (threading.current_thread() is main) == (workers == 0)
        if i == 5:
            raise UserError("the disk is gone")
        return i

    got = []
    with pytest.raises(UserError, match="the disk is gone"):
        for i in read_ahead(read, range(1000), workers):
            got.append(i)
    assert got == list(range(5)) and len(asked) <= 6 + 2 * workers   # and not the whole rest
    given_up = read_ahead(str, range(1000), workers)
    next(given_up)
    given_up.close()
    for thread in threading.enumerate():   # they end, though nobody told them to
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(timeout=10)
            assert not thread.is_alive()


# Folders as people have them


def test_imagenets_own_folder(tmp_path, capsys):
    root = tmp_path / "imagenet"
    draw_folder(root / "train", {"n01": 3, "n02": 3})
    draw_folder(root / "val", {"n01": 2, "n02": 1})
    data = load(root, tmp_path / "out")
    said = capsys.readouterr().out
    assert "train is trained on" in said and "val is held out" in said
    assert "2 classes: n01, n02" in said and data.classes == ["n01", "n02"]
    assert len(data.train) == 6 and data.held_out.tensors[1].tolist() == [0, 1, 0]

    draw_folder(tmp_path / "few" / "train", {"n01": 3, "n02": 3})
    draw_folder(tmp_path / "few" / "val", {"n02": 2})   # would be taken for the first class
    load(tmp_path / "few", tmp_path / "out")
    assert "val does not have images of the same classes" in capsys.readouterr().out

    for path in (root / "val").rglob("*.png"):   # as they come, without folders
        path.rename(root / "val" / f"{path.parent.name}{path.name}")
    draw_folder(root / "test", {"n01": 1, "n02": 1})
    assert load(root, tmp_path / "out").held_out.tensors[1].tolist() == [0, 1]
    said = capsys.readouterr().out
    assert "val does not have images of the same classes" in said and "test is held out" in said
    shutil.rmtree(root / "test")
    data = load(root, tmp_path / "out")
    assert "does not have images of the same classes" in capsys.readouterr().out
    assert len(data.train) == 4 and data.held_out.tensors[1].tolist() == [0, 1]

    shutil.rmtree(root / "val")
    draw_folder(root / "test", {"n01": 1, "n02": 1})
    draw_folder(root / "Val", {"n01": 2, "n02": 2})
    (root / "train").rename(root / "Train")
    assert len(load(root, tmp_path / "out").held_out) == 4   # rather than the test
    for name in ("Val", "test"):
        shutil.rmtree(root / name)
    (root / "Train").rename(root / "vehicles")
    with pytest.raises(UserError, match=r"no sub-folder of .*imagenet \(vehicles\) holds images"):
        load(root)
    (root / "vehicles" / "n01").rename(root / "bus")   # `train` may be a class
    (root / "vehicles").rename(root / "train")
    assert load(root, tmp_path / "out").classes == ["bus", "train"]


def test_a_folder_without_classes_is_refused(tmp_path):
    root = draw_folder(tmp_path, {"data": 3})
    for name, told in (("data", "there are none"), ("nothing", "neither a folder nor one of shapes")):
        with pytest.raises(UserError, match=told):
            load(root / name)
    draw_folder(root, {"one": 1})
    (root / "empty").mkdir()
    with pytest.raises(UserError, match="class empty has no image"):
        load(root, tmp_path / "out")
    (root / "empty").rmdir()
    with pytest.raises(UserError, match="class one has no image to train on, or none beside one that is held out"):
        load(root, tmp_path / "out")


STRAY = ("._000.png", "__MACOSX/a/000.png", ".ipynb_checkpoints/000.png", "@eaDir/000.png",
         ".Trashes/000.png", "lost+found/000.png", "$RECYCLE.BIN/000.png")


@pytest.mark.parametrize("below", ["", "a", "a/deeper"])
def test_hidden_and_system_names_are_no_data(tmp_path, capsys, below):
    root = draw_folder(tmp_path / "data", {"a": 4, "a/deeper": 1, "a/more": 1})
    for name in STRAY:
        path = root / below / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / "a" / "001.png", path)
    data = load(root, tmp_path / "out")
    assert data.classes == ["a"] and len(data.train) + len(data.held_out) == 6
    assert f"hidden or the system's: {len(STRAY)}" in capsys.readouterr().out
    names = [path.relative_to(root).as_posix() for path in Walk(root).images_below(root)]
    assert names == ["a/000.png", "a/001.png", "a/002.png", "a/003.png", "a/deeper/000.png", "a/more/000.png"]


def test_links_are_followed_once(tmp_path, capsys):
    """And no class gets the images of another by a link."""
    store = draw_folder(tmp_path / "store", {"cats": 25, "dogs": 3, "more": 2})
    root = draw_folder(tmp_path / "data", {"cat": 5, "elk": 2, "elk/calves": 2})
    (root / "dog").symlink_to(store / "dogs")
    (root / "cat" / "linked").symlink_to(store / "cats")
    (root / "cat" / "again").symlink_to(store / "cats")
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "dogs").symlink_to(root / "dog")
    (root / "cat" / "calves").symlink_to(root / "elk" / "calves")
    (store / "cats" / "round").symlink_to(store / "cats")
    (root / "dog" / "one.png").symlink_to(store / "more" / "000.png")
    (root / "dog" / "nowhere.png").symlink_to(store / "missing.png")
    (root / "cat" / "self").symlink_to(root / "cat" / "self")
    data = load(root, tmp_path / "out")
    labels = Counter([*data.train.tensors[1].tolist(), *data.held_out.tensors[1].tolist()])
    assert data.classes == ["cat", "dog", "elk"] and labels == {0: 30, 1: 4, 2: 4}
    said = capsys.readouterr().out
    assert "there already: 5" in said and "links to nowhere, pipes: 1" in said


def test_what_pillow_reads_is_read_and_the_rest_is_counted(tmp_path, capsys):
    root = draw_folder(tmp_path / "data", {"a": 2})
    endings = ("gif", "bmp", "tif", "TIFF", "ppm", "jpg", "JPEG", "webp", "tga", "ico")
    picture = Image.new("RGB", (16, 16), (200, 30, 30))
    for ending in endings:
        picture.save(root / "a" / f"picture.{ending}")
    for i in range(100):
        shutil.copyfile(root / "a" / "000.png", root / f"{i}.png")
    for name in ("notes.txt", "labels.csv", "film.mpeg", "paper.pdf", "README"):
        (root / "a" / name).write_bytes(b"")
    data = load(root, tmp_path / "out")
    assert len(data.train) + len(data.held_out) == 2 + len(endings)
    said = capsys.readouterr().out
    for told in ("beside the folders of classes: 100", ".txt: 1", ".mpeg: 1", ".pdf: 1",
                 "without an ending: 1"):
        assert told in said
    assert "cannot be read" not in said


@pytest.mark.parametrize("names", [
    ["only"], ["two words", "Ελληνικά", "日本語", "1e5"], [f"{i:04}" for i in range(300)]])
def test_classes_of_every_kind(tmp_path, names):
    content = io.BytesIO()
    Image.new("RGB", (2, 2)).save(content, "PNG")
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "data" / name / f"{i}.png").write_bytes(content.getvalue())
    data = load(tmp_path / "data", tmp_path / "out")
    assert data.classes == sorted(names)
    assert data.train.tensors[1].tolist() == data.held_out.tensors[1].tolist() == [*range(len(names))]


def test_names_are_those_that_keyboards_write(tmp_path):
    """A Mac's disk keeps letters and accents apart: the names, the order and the data are the same."""
    composed = draw_folder(tmp_path / "here", {"café": 3, "cafz": 2})
    apart = tmp_path / "mac"
    for path in composed.rglob("*.png"):
        name = unicodedata.normalize("NFD", path.relative_to(composed).with_suffix("").as_posix())
        (apart / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, (apart / name).with_suffix(".png"))
    assert {path.name for path in apart.iterdir()} == {"cafe\u0301", "cafz"}
    data, same = load(composed, tmp_path / "one"), load(apart, tmp_path / "two")
    assert data.classes == same.classes == ["cafz", "café"] and data.digest == same.digest
    shutil.copytree(composed / "café", apart / "café")   # both ways: one class
    assert load(apart, tmp_path / "two").classes == ["cafz", "café"]


def test_strange_files_among_the_images(tmp_path, capsys):
    root = draw_folder(tmp_path / "data", {"a": 2})
    data = root / "a"
    Image.new("RGB", (20, 20)).save(data / "line\nbreak.jpg")
    (data / "cut\nshort.jpg").write_bytes((data / "line\nbreak.jpg").read_bytes()[:500])
    (data / "folder.png").mkdir()
    os.mkfifo(data / "pipe.jpg")
    (data / os.fsdecode(b"caf\xe9.png")).write_bytes((data / "000.png").read_bytes())   # Latin-1
    chunks = {b"IHDR": struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0), b"IDAT": b"",
              b"IEND": b""}
    bomb = b"\x89PNG\r\n\x1a\n"
    for name, chunk in chunks.items():
        bomb += struct.pack(">I", len(chunk)) + name + chunk
        bomb += struct.pack(">I", zlib.crc32(name + chunk))
    (data / "bomb.png").write_bytes(bomb)
    before = {path: path.stat().st_mtime for path in tmp_path.rglob("*")}
    loaded = load(root, tmp_path / "out")
    assert len(loaded.train) + len(loaded.held_out) == 4
    said = capsys.readouterr().out.splitlines()
    told = sorted(line for line in said if line.startswith("left out"))   # threads read the images
    assert len(told) == 2 and "exceeds limit" in told[0] and "cut short.jpg" in told[1]
    assert before == {path: path.stat().st_mtime for path in before}


# Files of one's own


def png(depth: int, kind: int, rows: np.ndarray, transparent: tuple[int, ...]) -> bytes:
    """With a colour that is transparent, in any depth; Pillow writes none of these."""
    if depth == 16:
        packed = rows.astype(">u2").view(np.uint8)
    else:
        bits = (rows[..., None] >> np.arange(depth)[::-1]) & 1
        packed = np.packbits(bits.reshape(len(rows), -1).astype(np.uint8), axis=1)
    side = len(rows)
    chunks = {
        b"IHDR": struct.pack(">II5B", side, side, depth, kind, 0, 0, 0),
        b"tRNS": struct.pack(f">{len(transparent)}H", *transparent),
        b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed)),
        b"IEND": b"",
    }
    content = b"\x89PNG\r\n\x1a\n"
    for name, chunk in chunks.items():
        content += struct.pack(">I", len(chunk)) + name + chunk
        content += struct.pack(">I", zlib.crc32(name + chunk))
    return content


@pytest.mark.parametrize("depth, kind, values", [
    (2, 0, (1, 2)), (4, 0, (5, 9)), (8, 0, (10, 99)), (16, 0, (1000, 30_000)),
    (8, 2, (10, 20, 30, 99, 0, 7)), (16, 2, (1000, 2000, 3000, 30_000, 0, 9))])
def test_what_a_png_calls_transparent_is(tmp_path, depth, kind, values):
    """The first colour is, the second is not; in all depths, grey (0) and coloured (2)."""
    length = len(values) // 2
    row = values[:length] * 4 + values[length:] * 4
    content = png(depth, kind, np.array([row] * 8), values[:length])
    (tmp_path / "image.png").write_bytes(content)
    pixels = read_image(tmp_path / "image.png", 8, 3)
    scale = 255 / (2**depth - 1)
    assert (pixels[:, :, :3] == 255).all()
    assert np.allclose(pixels[:, 0, 6], np.array(values[length:]) * scale, atol=1)


def test_sixteen_bits_that_are_not_all_used(tmp_path, capsys):
    """As microscopes and scanners write them: 12 bits, in a file of 16."""
    root = tmp_path / "data"
    (root / "a").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.full((8, 8), 4095 - i * 1000, np.uint16)).save(root / "a" / f"{i}.tif")
    load(root, tmp_path / "out")
    said = capsys.readouterr().out
    assert "no pixel of the held-out images is over 16 of 255" in said and "--white-level" in said
    data = load(root, tmp_path / "out", white=4095)
    assert "--white-level" not in capsys.readouterr().out
    assert data.held_out.tensors[0].unique().tolist() == [255]
    assert data.train.tensors[0].unique().tolist() == [130, 193]
    brightest = tmp_path / "data14" / "a"   # of 14 bits, which is 64 of 255
    brightest.mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.full((8, 8), 16383, np.uint16)).save(brightest / f"{i}.tif")
    load(brightest.parent, tmp_path / "out14")
    assert "--white-level" in capsys.readouterr().out
    real = Image.fromarray(np.full((8, 8), 0.5, np.float32))
    Image.fromarray(np.full((8, 8), 100, np.float32)).save(tmp_path / "real.tif")
    assert read_image(tmp_path / "real.tif", 8, 1).max() == 100   # of 255, unless it is told
    real.save(tmp_path / "real.tif")
    assert read_image(tmp_path / "real.tif", 8, 1, white=1).max() == 128
    assert read_image(tmp_path / "real.tif", 8, 1).max() == 128   # by its values; else white is 255
    Image.fromarray(np.full((8, 8), 51, np.float32)).save(tmp_path / "bright.tif")
    assert read_image(tmp_path / "bright.tif", 8, 1).max() == 51
    values = np.full((8, 8), 0.5, np.float32)
    values[2, 3] = np.nan   # where nothing was measured
    Image.fromarray(values).save(tmp_path / "real.tif")
    with np.errstate(invalid="raise"):   # it would be a warning, and any byte
        pixels = read_image(tmp_path / "real.tif", 8, 1, white=1)[0]
    assert pixels[2, 3] == 0 and sorted(pixels.ravel())[1:] == [128] * 63


def test_images_are_laid_on_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))   # red, but nobody can see it
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    image.save(tmp_path / "image.png")
    pixels = read_image(tmp_path / "image.png", 8, 3)
    assert pixels[:, 0, 0].tolist() == [0, 0, 255] and pixels[:, 0, 7].tolist() == [255] * 3
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.paste(0, (0, 0, 4, 8))
    palette.save(tmp_path / "palette.png", transparency=0)   # red is
    pixels = read_image(tmp_path / "palette.png", 8, 3)
    assert pixels[:, 0, 0].tolist() == [255] * 3 and pixels[:, 0, 7].tolist() == [0, 255, 0]


def test_images_are_cropped_in_the_middle(tmp_path):
    image = Image.new("L", (30, 10), 0)
    image.paste(200, (10, 0, 20, 10))
    image.save(tmp_path / "image.png")
    assert (read_image(tmp_path / "image.png", 10, 1)[0, :, 2:8] == 200).all()
    board = Image.fromarray(np.indices((32, 32)).sum(axis=0).astype(np.uint8) % 2 * 255)
    board.save(tmp_path / "board.png")   # made smaller, pixels are means
    assert np.allclose(read_image(tmp_path / "board.png", 8, 1)[0, 2:6, 2:6], 127.5, atol=10)
    grey16 = Image.fromarray(np.full((8, 8), 51 * 256, np.uint16))
    grey16.save(tmp_path / "grey16.png")
    assert (read_image(tmp_path / "grey16.png", 8, 1) == 51).all()


# Damage


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """A small file of every format."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3   # upside down
    written = {}
    for ending in ("png", "jpeg", "webp"):
        file = io.BytesIO()
        image.save(file, ending, exif=exif)
        written[f"image.{ending}"] = file.getvalue()
    return written


def test_an_image_with_damaged_metadata_is_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6    # orientation
    exif[0x011A] = 72.0   # resolution
    little = b"II*" in exif.tobytes()
    number = bytes.fromhex("1a01 0500 0100 0000" if little else "011a 0005 0000 0001")
    text = number.replace(b"\x05", b"\x02")   # the type of its value
    assert number in exif.tobytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "image.jpg", exif=exif.tobytes().replace(number, text))
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(tmp_path / "image.jpg", 8, 3)


@draws(60)
@given(data=st.data())
@pytest.mark.parametrize("name", ["image.png", "image.jpeg", "image.webp"])
def test_damaged_images(files, tmp_path_factory, name, data):
    """JPEG and WebP have no checksums: a damaged one that can be read is an image of its shape."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "whole").write_bytes(files[name])
    whole = read_image(folder / "whole", 12, 3)
    found = read_or_refused(lambda path: read_image(path, 12, 3), folder / name,
                            data.draw(damaged(files[name])))
    if found is not None:
        assert found.shape == whole.shape and found.dtype == np.uint8
        assert np.array_equal(found, whole) or name != "image.png"


def test_real_numbers_up_to_exactly_1_are_of_1(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "real.tif")
    assert read_image(tmp_path / "real.tif", 8, 1).max() == 255


@pytest.mark.parametrize("brightest", [1.01, 2, np.inf])
def test_a_single_number_over_1_does_not_darken_the_others(tmp_path, brightest):
    values = np.full((8, 8), 0.5, np.float32)
    values[2, 3] = brightest
    Image.fromarray(values).save(tmp_path / "real.tif")
    pixels = read_image(tmp_path / "real.tif", 8, 1)[0]
    assert pixels[2, 3] == 255 and sorted(pixels.ravel())[:-1] == [128] * 63


def test_what_is_over_white_is_white(tmp_path):
    Image.fromarray(np.full((8, 8), 4200, np.uint16)).save(tmp_path / "over.png")
    assert (read_image(tmp_path / "over.png", 8, 1, white=4095) == 255).all()


def test_every_changed_byte_of_a_png_is_found(tmp_path):
    """Of one that is easily compressed, too, which without its checksum may be read as another."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (10, 200, 30)).save(file, "png")
    for i in range(len(file.getvalue())):
        content = bytearray(file.getvalue())
        content[i] ^= 2
        found = read_or_refused(lambda path: read_image(path, 64, 3), tmp_path / "image.png", content)
        assert found is None or np.array_equal(found[:, 0, 0], [10, 200, 30]) and not np.ptp(found, axis=(1, 2)).any()


def test_what_is_held_out_beside_train_is_of_its_classes(tmp_path):
    draw_folder(tmp_path / "data" / "train", {"a": 3, "b": 3})
    draw_folder(tmp_path / "data" / "val", {"a": 2, "c": 2})
    data = load(tmp_path / "data", tmp_path / "out")
    assert len(data.train) == 4 and data.held_out.tensors[1].tolist() == [0, 1]


def test_a_class_without_an_image_to_train_on_is_refused_where_images_are_streamed(tmp_path):
    root = draw_folder(tmp_path / "data", {"a": 3, "one": 1})
    with pytest.raises(UserError, match="class one has no image to train on"):
        load(root, stream=True)


def test_the_classifier_s_images_are_the_same_each_time(monkeypatch):
    monkeypatch.setattr("support.data.CLASSIFIER_IMAGES", 5)
    shapes = draw_shapes(40, 8, 0)
    first, again = (classifier_images(Data(shapes, shapes, [], ""), 0) for _ in range(2))
    assert len(first[0]) == 5 and all(map(torch.equal, first, again))


def test_published_files_of_the_system_are_found(mnist, tmp_path, monkeypatch):
    _, folder = mnist
    (tmp_path / "system").mkdir()
    shutil.copytree(folder, tmp_path / "system" / "mnist", ignore=lambda *_: ["system"])
    monkeypatch.setattr("support.data.SYSTEM_DATA", tmp_path / "system")
    assert len(load_known("mnist", tmp_path / "nothing here", 32).train) == 6


def test_a_background_runs_from_one_colour_to_the_other_and_not_beyond():
    """Both are of the dark ones, up to 0.52 of white, or of the light ones, up to 0.95."""
    images, _ = draw_shapes(400, 32, 0).tensors
    corners = images[..., ::31, ::31].amax(dim=1).flatten()   # none is a shape's
    assert ((corners <= 133) | (corners >= 150) & (corners <= 243)).all()


def test_shapes_stand_upright():
    """A heart's and a triangle's points, below and above; a crescent is open to the right."""
    wide = {name: (draw_shape(name, 0.4, 0.0, 0.5, 0.5, 64) > 127).sum(axis=1) for name in
            ("heart", "triangle", "arrow", "star")}
    ends = {name: tuple(width[width > 0][[2, -3]]) for name, width in wide.items()}   # above and below
    assert ends["heart"][0] > 2 * ends["heart"][1]
    for name in ("triangle", "arrow", "star"):
        assert ends[name][1] > 2 * ends[name][0], name
    cover = draw_shape("crescent", 0.4, 0.0, 0.5, 0.5, 64)
    assert cover[:, :32].mean() > 2 * cover[:, 32:].mean()


@pytest.mark.parametrize("angle", [0.0, 0.3, -0.2])
def test_shapes_are_turned(angle):
    """Clockwise, as y goes down: the direction in which a bar is long."""
    cover = draw_shape("bar", 0.4, angle, 0.5, 0.5, 128).astype(float)
    rows, columns = np.indices(cover.shape) - 63.5
    xx, yy, xy = ((cover * product).sum() for product in (columns**2, rows**2, columns * rows))
    assert math.atan2(2 * xy, xx - yy) / 2 == pytest.approx(angle, abs=0.01)


def test_shapes_lie_everywhere_within_the_image(monkeypatch):
    drawn = []
    monkeypatch.setattr("support.data.draw_shape", lambda name, *where: drawn.append(where[:4]) or draw_shape(name, *where))
    draw_shapes(400, 8, 0)
    size_N, angle_N, *places = np.transpose(drawn)
    assert size_N.min() >= 0.28 and size_N.max() <= 0.42
    assert -0.35 <= angle_N.min() < -0.3 and 0.3 < angle_N.max() <= 0.35
    for place_N in places:
        assert (place_N - size_N).min() > 0.019 and (place_N + size_N).max() < 0.981
        assert abs(place_N.mean() - 0.5) < 0.03 and place_N.min() < 0.35 and place_N.max() > 0.65


def test_a_shape_and_its_background_are_of_any_two_colours():
    """And the background runs from one colour to another in any direction."""
    images, labels = draw_shapes(1000, 32, 0).tensors
    circles = images[labels == SHAPES.index("circle")].permute(0, 2, 3, 1).numpy() / 255
    apart = np.abs(rgb_to_hsv(circles[:, 16, 16])[:, 0] - rgb_to_hsv(circles[:, 0, 0])[:, 0])
    assert 0.3 < (np.minimum(apart, 1 - apart) > 0.25).mean() < 0.7
    first, right, below = (images[:, 0, y, x].int() for y, x in ((0, 0), (0, 31), (31, 0)))
    alike = (right - first) * (below - first)
    assert 0.3 < (alike > 0).float().mean() < 0.7


def test_classes_of_published_sets_are_in_their_order():
    names = {"mnist": "0 1 2 3 4 5 6 7 8 9",
             "fashion-mnist": "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot",
             "cifar10": "airplane automobile bird cat deer dog frog horse ship truck"}
    assert {name: " ".join(known.classes) for name, known in PUBLISHED.items()} == names


def test_of_many_images_all_are_resized():
    pixels = fit_side(np.full((1100, 1, 8, 8), 9, np.uint8), np.zeros(1100), 16).tensors[0]
    assert pixels.shape == (1100, 1, 16, 16) and (pixels == 9).all()


def test_how_many_images_there_are_is_told(tmp_path, capsys):
    load(draw_folder(tmp_path / "data", {"a": 4, "b": 3}), stream=True)
    assert "data: 5 training and 2 held-out images, 2 classes: a, b\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "test"])
def test_what_lies_beside_train_is_held_out(tmp_path, name):
    draw_folder(tmp_path / "train", {"a": 3, "b": 3})
    draw_folder(tmp_path / name, {"a": 2, "b": 1})
    data = load(tmp_path, stream=True)
    assert len(data.train) == 6 and data.held_out.tensors[1].tolist() == [0, 1, 0]


SYSTEMS = ("#recycle", "@tmp", "#snapshot", "~snapshot", "lost+found", "RECYCLER", "System Volume Information",
           "Network Trash Folder", "Temporary Items", "__pycache__", "@eaDir", "$RECYCLE.BIN", "__MACOSX")


def test_folders_of_every_system_are_no_data(tmp_path, capsys):
    root = draw_folder(tmp_path / "data", {"a": 2, **{f"a/{name}": 1 for name in SYSTEMS}})
    data = load(root, stream=True)
    assert len(data.train) + len(data.held_out) == 2
    assert f"hidden or the system's: {len(SYSTEMS)}" in capsys.readouterr().out


def test_an_image_in_which_nothing_was_measured_is_black(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "real.tif")
    assert not read_image(tmp_path / "real.tif", 8, 1).any()


def test_classes_after_one_that_is_there_twice_keep_their_numbers(tmp_path):
    """café in one letter and in two, as after a copy from a Mac, is one class; dog the next."""
    draw_folder(tmp_path / "data", {"caf\u00e9": 3, "cafe\u0301": 3, "dog": 3})
    data = load(tmp_path / "data", tmp_path / "out")
    assert data.classes == ["caf\u00e9", "dog"]
    assert data.train.tensors[1].unique().tolist() == [0, 1]
    assert data.held_out.tensors[1].tolist() == [0, 1]
