"""Data sets: read right from every format, refused in a sentence where a file is damaged or
strange, and folders decoded once."""
from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import math
import os
import shutil
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sample
import train
from program import TINY, damaged, draws, ran, read_or_refused, refused


def settled(*arguments) -> argparse.Namespace:
    options = train.parse([*TINY, *map(str, arguments)])
    train.settle(options)
    return options


def load(*arguments) -> train.Data:
    return train.load_data(settled(*arguments))


# Data sets that others published


def idx(values: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, values.ndim))
    sizes = b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    return header + sizes + values.astype(np.uint8).tobytes()


def publish(monkeypatch, name: str, files: dict[str, bytes]) -> None:
    """As if these were the published contents."""
    sums = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    monkeypatch.setitem(train.PUBLISHED, name, replace(train.PUBLISHED[name], files=sums))


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """Six images to train on and two to hold out, and where they are."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (8, 28, 28))
    parts = (idx(x[:6]), idx(np.arange(6)), idx(x[6:]), idx(np.arange(2)))
    files = dict(zip(train.PUBLISHED["mnist"].files, parts))
    publish(monkeypatch, "mnist", files)
    for file, content in files.items():
        (tmp_path / file).write_bytes(gzip.compress(content))
    return x, tmp_path


def load_known(name: str, folder: Path, side: int) -> train.Data:
    scales = "1,2,4,8" if side == 16 else "1,2,4,8,16"
    return load("--data", name, "--data-dir", folder, "--image-size", side, "--scales", scales)


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
    before = load_known("mnist", folder, 32).key
    for path in folder.glob("*.gz"):
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=1, mtime=7))
    assert load_known("mnist", folder, 32).key == before


def test_idx_files_that_are_others_are_refused(mnist):
    _, folder = mnist
    path = folder / "train-images-idx3-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    for broken, told in ((path.read_bytes()[:200], "gzip"),
                         (gzip.compress(content[:-1]), "not the published file")):
        path.write_bytes(broken)
        with pytest.raises(train.UserError, match=told):
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
    with pytest.raises(train.UserError, match="not the published file"):
        load_known("cifar10", tmp_path, 32)


def test_downloads_are_checked_before_they_are_used(mnist, tmp_path, monkeypatch):
    x, served = mnist
    known = train.PUBLISHED["mnist"]
    monkeypatch.setitem(train.PUBLISHED, "mnist", replace(known, url=served.as_uri() + "/"))
    fetched = tmp_path / "fetched"
    data = load_known("mnist", fetched, 32)
    assert np.array_equal(data.train[[0]][0][0, 0, 2:30, 2:30], x[0])
    assert len(list((fetched / "mnist").iterdir())) == 4
    shutil.rmtree(fetched)
    (served / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(train.UserError, match="cannot download"):
        load_known("mnist", fetched, 32)


def lens(a: float, b: float, distance: float) -> float:
    """The area that two discs of radius a and b share."""
    along = (distance**2 + a**2 - b**2) / (2 * distance)   # where their borders cross
    half = math.sqrt(a**2 - along**2)
    sectors = a**2 * math.atan2(half, along) + b**2 * math.atan2(half, distance - along)
    return sectors - half * distance


def test_the_built_in_shapes_are_deterministic_and_distinct():
    (one, labels), (again, _), (other, _) = (train.draw_shapes(30, 32, s).tensors for s in (3, 3, 4))
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
    cover = train.draw_shape(name, 0.35, angle, 0.45, 0.55, 128) / 255
    assert cover.mean() == pytest.approx(area * 0.35**2, rel=0.03)
    rows, columns = np.indices(cover.shape) / 128
    if name in ("circle", "ring", "square", "star", "cross"):   # their middle is their centre
        assert (cover * columns).sum() / cover.sum() == pytest.approx(0.45, abs=0.02)
        assert (cover * rows).sum() / cover.sum() == pytest.approx(0.55, abs=0.02)


def test_an_odd_border_is_wider_on_the_right_and_below():
    image = np.full((1, 1, 3, 3), 9, np.uint8)
    pixels = train.fit_side(image, np.zeros(1), 6).tensors[0]
    assert pixels[0, 0].sum(dim=0).tolist() == pixels[0, 0].sum(dim=1).tolist() == [0, 27, 27, 27, 0, 0]


# The order of training, and what stands for all


def test_training_order_visits_everything_once_a_pass():
    steps = list(train.shuffled(10, 4, seed=0, begin=0, end=5))
    seen = [row for rows in steps for row in rows]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert list(train.shuffled(10, 4, seed=0, begin=3, end=5)) == steps[3:]


def test_a_few_images_stand_for_all_classes():
    labels = torch.tensor([2, 0, 0, 0, 1, 1, 2, 0, 0, 1])
    rows = train.spread(torch.utils.data.TensorDataset(labels, labels), 7)
    assert labels[rows].tolist() == [0, 1, 2, 0, 1, 2, 0] and len(set(rows)) == 7
    assert rows[:3] == [1, 4, 0]   # the first of each class
    assert sorted(train.spread(torch.utils.data.TensorDataset(labels, labels), 99)) == list(range(10))


# Folders of one's own


def draw_folder(root: Path, classes: dict[str, int], side: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03}.png")
    return root


def test_a_folder_is_decoded_once(tmp_path, monkeypatch):
    root = draw_folder(tmp_path / "data", {"a": 22, "b": 3})
    (root / "a" / "007.png").write_bytes(b"no image")
    out = tmp_path / "out"
    flags = ("--data", root, "--out", out)
    data = load(*flags)
    assert len(data.train) == 21 and len(data.held_out) == 3   # every twentieth, at least one
    kept = sorted(out.iterdir())
    assert [path.name.split("-")[0] for path in kept] == ["held_out", "train"]
    pixels, labels = data.train[list(range(21))]
    expected = train.read_image(root / "a" / "001.png", 8, 3)
    assert np.array_equal(pixels[0], expected) and labels.tolist() == [0] * 19 + [1] * 2

    with monkeypatch.context() as patch:   # again, without an image being opened
        patch.setattr(train, "read_image", None)
        again = load(*flags)
    assert again.key == data.key and torch.equal(again.train[list(range(21))][0], pixels)
    moved = root.rename(tmp_path / "moved")
    assert load("--data", moved, "--out", out).key == data.key
    assert sorted(out.iterdir()) == kept

    Image.new("RGB", (12, 12)).save(moved / "b" / "001.png")   # edited: its time and its size are others
    assert load("--data", moved, "--out", out).key != data.key


def test_decoding_that_is_stopped_goes_on(tmp_path, monkeypatch):
    root = draw_folder(tmp_path / "data", {"a": 12})
    options = settled("--data", root, "--out", tmp_path / "out", "--workers", 0)
    files = train.FolderImages(root, [(0, path) for path in sorted(root.rglob("*.png"))], 8, 3)
    read: list[str] = []

    def read_image(path: Path, *shape) -> np.ndarray:   # stopped by Ctrl-C at the seventh
        if len(read) == 7:
            read.append("stopped")
            raise KeyboardInterrupt
        read.append(path.name)
        return sample.read_image(path, *shape)

    monkeypatch.setattr(train, "read_image", read_image)
    with pytest.raises(KeyboardInterrupt):
        train.decoded(files, "train", options)
    (path,) = options.out.iterdir()
    with open(path, "ab") as file:
        file.write(b"\1 half a record")
    images = train.decoded(files, "train", options)
    names = [path.name for path in files.paths]
    assert read == [*names[:7], "stopped", *names[7:]]
    pixels, _ = images[list(range(12))]
    whole = path.read_bytes()
    assert np.array_equal(pixels, [sample.read_image(path, 8, 3) for path in files.paths])
    path.write_bytes(whole[:1000])   # cut short by something else: the rest is decoded again
    images = train.decoded(files, "train", options)
    assert path.read_bytes() == whole and torch.equal(images[list(range(12))][0], pixels)


def test_images_that_cannot_be_read_are_counted_each_time(tmp_path, capsys):
    root = draw_folder(tmp_path / "data", {"a": 4, "b": 3})
    (root / "a" / "002.png").write_bytes(b"no image")
    for _ in range(2):
        load("--data", root, "--out", tmp_path / "out")
        said = capsys.readouterr().out
        assert "1 of 5 train images could not be read" in said and "remove" in said
    for name in ("001.png", "002.png"):
        (root / "b" / name).write_bytes(b"no image")
    told = refused("train.py", "--data", root, "--out", tmp_path / "out", *TINY)
    assert str(root / "b") in told and "to train on" in told
    (root / "b" / "000.png").write_bytes(b"no image")
    (root / "a" / "000.png").write_bytes(b"no image")
    assert "to hold out" in refused("train.py", "--data", root, "--out", tmp_path / "out", *TINY)


def test_what_is_decoded_of_another_folder_is_lost_with_its_training(tmp_path):
    out = tmp_path / "out"
    for name, count in (("one", 3), ("two", 4)):
        root = draw_folder(tmp_path / name, {"a": count})
        ran("train.py", "--data", root, "--out", out, *TINY, "--tokenizer-steps", 2, "--var-steps", 1,
            "--overwrite")
        assert len(list(out.glob("train-*"))) == len(list(out.glob("held_out-*"))) == 1
    assert "another data set" in refused("train.py", "--data", tmp_path / "one", "--out", out, *TINY,
                                         "--tokenizer-steps", 2, "--resume")
    assert len(list(out.glob("train-*"))) == 2   # nothing is lost by a mistake


def test_a_full_disk_ends_in_a_sentence(tmp_path):
    """As far as a program sees it: a file that may not grow."""
    resource = pytest.importorskip("resource")
    root = draw_folder(tmp_path / "data", {"a": 3})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        told = refused("train.py", "--data", root, "--out", tmp_path / "out", *TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "too large" in told


def test_an_image_that_stands_in_keeps_its_label(tmp_path):
    root = draw_folder(tmp_path, {"a": 1, "b": 1})
    files = [(label, root / name / "000.png") for label, name in enumerate("ab")]
    files[0][1].write_bytes(b"no image")
    images, labels = train.FolderImages(root, files, 8, 3)[[0, 1]]
    assert labels.tolist() == [1, 1] and torch.equal(images[0], images[1])


@pytest.mark.parametrize("channels, held_out", [(3, 2), (1, 3)])
def test_no_more_is_held_out_than_is_to_be_kept(tmp_path, monkeypatch, channels, held_out):
    """Of bytes; of every class in turn."""
    root = draw_folder(tmp_path / "data", {name: 2 for name in "abcd"})
    monkeypatch.setattr(train, "HELD_OUT_BYTES", 2 * 3 * 8 * 8)
    monkeypatch.setattr(train, "HELD_OUT_IMAGES", 3)
    data = load("--data", root, "--out", tmp_path / "out", "--channels", channels)
    assert data.held_out.tensors[1].tolist() == list(range(held_out))


def test_a_folder_too_large_to_be_kept_is_read_as_training_goes(tmp_path, monkeypatch, capsys):
    root = draw_folder(tmp_path / "data", {"a": 22, "b": 3})
    (root / "a" / "007.png").write_bytes(b"no image")
    decoded = load("--data", root, "--out", tmp_path / "one")
    monkeypatch.setattr(train, "DISK_SHARE", 0.0)
    assert load("--data", root, "--out", tmp_path / "one").key == decoded.key   # it is there already
    capsys.readouterr()
    data = load("--data", root, "--out", tmp_path / "two")
    assert "are read as training goes" in capsys.readouterr().out
    assert all(map(torch.equal, data.held_out.tensors, decoded.held_out.tensors))
    pixels, labels = data.train[[5, 6, 7]]   # 006, 007 and 008: the next image stands in for 007
    assert torch.equal(pixels, decoded.train[[5, 6, 6]][0]) and labels.tolist() == [0] * 3
    assert len(data.train) == 22 and capsys.readouterr().err.count("007.png") == 1
    for path in root.rglob("*.png"):
        if path.stem != "000":   # which are held out
            path.write_bytes(b"no image")
    assert "none of the" in refused("train.py", "--data", root, "--out", tmp_path / "three", *TINY)
    with pytest.raises(train.UserError, match="none of the 22 images can be read"):
        data.train.unreadable.clear()
        data.train[[0]]


def test_the_same_run_from_files_and_from_decoded_images(folder, finished, tmp_path, monkeypatch):
    """Workers read ahead; the unreadable image is stood in for, so only the length differs."""
    monkeypatch.setattr(train, "DISK_SHARE", 0.0)
    said = ran("train.py", "--data", folder, "--out", tmp_path, *TINY, "--tokenizer-steps", 3,
               "--var-steps", 3, "--workers", 2)
    assert "are read as training goes" in said
    assert (tmp_path / "samples.png").exists() and not list(tmp_path.glob("train-*"))


@pytest.mark.parametrize("side, scales", [(16, (1, 2, 4)), (32, (1, 2, 4, 8)), (48, (1, 2, 4, 8, 12)),
                                          (64, (1, 2, 4, 8, 16)), (4, (1,))])
def test_scales_are_derived_and_said(side, scales, capsys):
    options = train.parse(["--image-size", str(side), "--device", "cpu"])
    train.settle(options)
    assert options.preset.scales == scales
    assert ",".join(map(str, scales)) in capsys.readouterr().out


def test_images_are_laid_on_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))   # red, but nobody can see it
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    image.save(tmp_path / "image.png")
    pixels = train.read_image(tmp_path / "image.png", 8, 3)
    assert pixels[:, 0, 0].tolist() == [0, 0, 255] and pixels[:, 0, 7].tolist() == [255] * 3
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.paste(0, (0, 0, 4, 8))
    palette.save(tmp_path / "palette.png", transparency=0)   # red is
    pixels = train.read_image(tmp_path / "palette.png", 8, 3)
    assert pixels[:, 0, 0].tolist() == [255] * 3 and pixels[:, 0, 7].tolist() == [0, 255, 0]


def test_images_are_cropped_in_the_middle(tmp_path):
    image = Image.new("L", (30, 10), 0)
    image.paste(200, (10, 0, 20, 10))
    image.save(tmp_path / "image.png")
    assert (train.read_image(tmp_path / "image.png", 10, 1)[0, :, 2:8] == 200).all()
    grey16 = Image.fromarray(np.full((8, 8), 51 * 256, np.uint16))
    grey16.save(tmp_path / "grey16.png")
    assert (train.read_image(tmp_path / "grey16.png", 8, 1) == 51).all()


@pytest.mark.parametrize("classes", [
    {"only": 5}, {"two words": 2, "Ελληνικά": 3, "日本語": 2}, {f"{i:04}": 2 for i in range(1000)}])
def test_classes_of_every_kind(tmp_path, classes):
    root = draw_folder(tmp_path / "data", classes, side=4)
    out = tmp_path / "out"
    ran("train.py", "--data", root, "--out", out, *TINY, "--tokenizer-steps", 2, "--var-steps", 2)
    assert Image.open(out / "samples.png").height == min(20, len(classes)) * 66
    name = sorted(classes)[-1]
    ran("sample.py", "--run", out, "--classes", name, "--per-class", 1)
    assert (out / "sample.png").exists()


def test_strange_files_among_the_images(tmp_path, capsys):
    data = tmp_path / "data" / "a"
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(data / "line\nbreak.jpg")
    Image.fromarray(pixels[1]).save(tmp_path / "outside.png")
    (data / "a.png").write_bytes((tmp_path / "outside.png").read_bytes())
    (data / "link.png").symlink_to(tmp_path / "outside.png")
    (data / "cut\nshort.jpg").write_bytes((data / "line\nbreak.jpg").read_bytes()[:500])
    (data / "folder.png").mkdir()
    (data / "nowhere.png").symlink_to(tmp_path / "missing.png")
    os.mkfifo(data / "pipe.jpg")
    chunks = {b"IHDR": struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0), b"IDAT": b"",
              b"IEND": b""}
    bomb = b"\x89PNG\r\n\x1a\n"
    for name, chunk in chunks.items():
        bomb += struct.pack(">I", len(chunk)) + name + chunk
        bomb += struct.pack(">I", zlib.crc32(name + chunk))
    (data / "bomb.png").write_bytes(bomb)
    before = {path: path.stat().st_mtime for path in tmp_path.rglob("*") if path.exists()}
    options = settled("--data", tmp_path / "data", "--out", tmp_path / "out")
    capsys.readouterr()
    for name in ("bomb.png", "cut\nshort.jpg"):
        assert train.try_to_read(data / name, (3, 8, 8)) is None
    bomb, cut = capsys.readouterr().err.splitlines()
    assert "bomb.png cannot be read" in bomb and "exceeds limit" in bomb
    assert "cut short.jpg cannot be read" in cut
    loaded = train.load_data(options)
    assert len(loaded.train) + len(loaded.held_out) == 3
    assert before == {path: path.stat().st_mtime for path in before}


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
    with pytest.raises(train.UserError, match="cannot be read as an image"):
        train.read_image(tmp_path / "image.jpg", 8, 3)


@draws(60)
@given(data=st.data())
@pytest.mark.parametrize("name", ["image.png", "image.jpeg", "image.webp"])
def test_damaged_images(files, tmp_path_factory, name, data):
    """JPEG and WebP have no checksums: a damaged one that can be read is an image of its shape."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "whole").write_bytes(files[name])
    whole = train.read_image(folder / "whole", 12, 3)
    found = read_or_refused(lambda path: train.read_image(path, 12, 3), folder / name,
                            data.draw(damaged(files[name])))
    if found is not None:
        assert found.shape == whole.shape and found.dtype == np.uint8
        assert np.array_equal(found, whole) or name != "image.png"
