"""Data sets: read right from every format, and refused in a sentence where a file is damaged or strange."""
import gzip
import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import train
from program import damaged, read_or_refused


def idx(values: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, values.ndim)) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    return gzip.compress(header + values.astype(np.uint8).tobytes())


def test_idx_files(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (6, 28, 28)), np.arange(6)
    for name, content in zip(train.IDX_FILES, (x, y, x[:2], y[:2])):
        (tmp_path / name).write_bytes(idx(content))
    data = train.load_data("mnist", tmp_path, 32, 3, 0)
    assert data.train.images.shape == (6, 1, 32, 32) and len(data.held_out) == 2
    assert np.array_equal(data.train.images[:, 0, 2:30, 2:30], x)
    whole = idx(x)
    for broken, told in ((whole[:200], "gzip"), (idx(y), "magic number"), (gzip.compress(gzip.decompress(whole)[:-1]), "header says")):
        (tmp_path / train.IDX_FILES[0]).write_bytes(broken)
        with pytest.raises(train.UserError, match=told):
            train.load_data("mnist", tmp_path, 32, 3, 0)


def write_cifar10(path: Path, records: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in records.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_cifar10_files(tmp_path):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8), np.arange(6, dtype=np.uint8)
    records = [bytes([label]) + image.tobytes() for label, image in zip(labels, pixels)]
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    files, path = dict(zip(names, records)), tmp_path / "cifar-10-binary.tar.gz"
    write_cifar10(path, files)
    data = train.load_data("cifar10", tmp_path, 32, 3, 0)
    assert np.array_equal(data.train.images, pixels[:5]) and data.train.labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(data.held_out.images, pixels[5:]) and data.classes[5] == "dog"
    half = train.load_data("cifar10", tmp_path, 16, 3, 0).held_out.images
    assert np.array_equal(half, pixels[5:].reshape(1, 3, 16, 2, 16, 2).mean(axis=(3, 5)).round())
    whole = path.read_bytes()
    for broken, told in (({**files, "data_batch_2.bin": records[1][:-1]}, "cut short"),
                         ({**files, "test_batch.bin": b"\x0b" + records[5][1:]}, "label over 9"),
                         ({"readme.html": b"no batches"}, "not the binary version"), (whole[:300], "gzip")):
        path.write_bytes(broken) if isinstance(broken, bytes) else write_cifar10(path, broken)
        with pytest.raises(train.UserError, match=told):
            train.load_data("cifar10", tmp_path, 32, 3, 0)


def test_the_built_in_shapes_are_deterministic_and_distinct():
    one, again, other = (train.draw_shapes(30, 32, seed) for seed in (3, 3, 4))
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)
    assert one.labels.bincount().tolist() == [3] * 10
    flat = one.images.flatten(1).float()
    assert flat.std(dim=1).min() > 10   # no shape is hidden in its background


def test_training_order_visits_everything_once_a_pass():
    steps = list(train.shuffled(10, 4, seed=0, begin=0, end=5))
    seen = [i for indices in steps for i in indices]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert list(train.shuffled(10, 4, seed=0, begin=3, end=5)) == steps[3:]


def test_strange_files_among_the_images(tmp_path, capsys):
    data, rng = tmp_path / "data" / "a", np.random.default_rng(0)
    data.mkdir(parents=True)
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(data / "line\nbreak.jpg")
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "outside.png")
    (data / "a.png").write_bytes((tmp_path / "outside.png").read_bytes())
    (data / "link.png").symlink_to(tmp_path / "outside.png")
    (data / "cut\nshort.jpg").write_bytes((data / "line\nbreak.jpg").read_bytes()[:500])
    (data / "folder.png").mkdir()
    (data / "nowhere.png").symlink_to(tmp_path / "missing.png")
    os.mkfifo(data / "pipe.jpg")
    chunks = {b"IHDR": struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0), b"IDAT": b"", b"IEND": b""}
    (data / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk)) + name + chunk + struct.pack(">I", zlib.crc32(name + chunk))
        for name, chunk in chunks.items()))
    before = {path: path.stat().st_mtime for path in tmp_path.rglob("*") if path.exists()}
    loaded = train.load_data(str(tmp_path / "data"), tmp_path, 8, 3, 0)
    assert len(loaded.train) + len(loaded.held_out) == 5
    pixels, labels = loaded.train[[0, 1, 2, 3]]
    assert pixels.shape == (4, 3, 8, 8) and not labels.any()
    bomb, cut = capsys.readouterr().err.splitlines()
    assert "bomb.png cannot be read" in bomb and "exceeds limit" in bomb and "cut short.jpg cannot be read" in cut
    assert before == {path: path.stat().st_mtime for path in tmp_path.rglob("*") if path.exists()}


def test_downloads_are_checked_before_they_are_used(tmp_path):
    served = tmp_path / "served"
    served.write_bytes(b"content")
    right = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"   # of b"content"
    train.download(served.as_uri(), tmp_path / "good", right)
    assert (tmp_path / "good").read_bytes() == b"content"
    for url, checksum, told in ((served.as_uri(), "0" * 64, "not used"), ((tmp_path / "none").as_uri(), right, "cannot download")):
        with pytest.raises(train.UserError, match=told):
            train.download(url, tmp_path / "bad", checksum)
    assert {path.name for path in tmp_path.iterdir()} == {"served", "good"}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """A small file of every format."""
    rng, written = np.random.default_rng(0), {}
    image, exif = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)), Image.Exif()
    exif[0x0112] = 3   # upside down
    for ending in ("png", "jpeg", "webp"):
        file = io.BytesIO()
        image.save(file, ending, exif=exif)
        written[f"image.{ending}"] = file.getvalue()
    return written | {"images.gz": idx(rng.integers(0, 256, (5, 6, 6)))}


def test_an_image_with_damaged_metadata_is_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0   # orientation, resolution
    number = bytes.fromhex("1a01 0500 0100 0000" if b"II*" in exif.tobytes() else "011a 0005 0000 0001")
    text = number.replace(b"\x05", b"\x02")   # the type of its value
    assert number in exif.tobytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "image.jpg", exif=exif.tobytes().replace(number, text))
    with pytest.raises(train.UserError, match="cannot be read as an image"):
        train.read_image(tmp_path / "image.jpg", 8, 3)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["image.png", "image.jpeg", "image.webp", "images.gz"])
def test_damaged_files(files, tmp_path_factory, name, data):
    """JPEG and WebP hold no checksums: where a damaged one can be read at all, it is an image of the right shape."""
    def read(path: Path) -> np.ndarray:
        return train.read_idx(path, 3) if name == "images.gz" else train.read_image(path, 12, 3)

    folder = tmp_path_factory.mktemp("damaged")
    (folder / "whole").write_bytes(files[name])
    whole, found = read(folder / "whole"), read_or_refused(read, folder / name, data.draw(damaged(files[name])))
    if found is not None:
        assert found.shape == whole.shape and found.dtype == np.uint8
        assert np.array_equal(found, whole) or name in ("image.jpeg", "image.webp")
