"""Everything sample.py does with a trained run, through its command line, and what its pictures
hold."""
from __future__ import annotations

import copy
import errno
import os
import shutil
import tempfile
import threading
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from program import ran, refused, tokenizer_stage
from torch._dynamo import config as dynamo_config

import sample
import train
from sample import Known, Run, load_images, load_run
from support import evaluation, holes
from support.asked import asked_classes
from support.checkpoint import save_checkpoint
from support.cli import UserError
from support.commands import COMMANDS, GENERATING, HOLES, parse
from support.data import load_data, load_held_out
from support.devices import Machine, PackedLinear, choose_machine, pack
from support.figures import (
    attention_weights, code_colours, draw_attention, draw_codes, draw_teaching,
)
from support.holes import known_pixels
from support.images import (
    Row, at_a_time, batches, cell_size, grid, label_font, legible, read_images, save_film, save_npz,
    to_bytes, wrapped,
)
from support.presets import PRESETS
from tokenizer import Decoder, Encoder
from var import VAR, Attention, VARConfig

GAP = 4
CELL = 64
CPU = choose_machine("cpu", "fp32")


def draw(out: Path, path: Path, command: str, *arguments) -> tuple[np.ndarray, str]:
    """The picture a command writes, and what it says."""
    said = ran("sample.py", *command.split(), "--run", out, "--precision", "fp32", "--out", path,
               "--cell-size", CELL, *arguments)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")), said


def cells(picture, count: int) -> np.ndarray:
    """The last `count` images of every row of a grid, found by their frames: bytes
    [rows, count, CELL, CELL, 3]."""
    picture = np.asarray(picture)
    first = picture.shape[1] - count * (CELL + GAP)
    line_H = (picture[:, first + 1:first + CELL + 3] == 192).all(axis=(1, 2))
    rows = []
    y = 0
    while y + CELL + 1 < len(picture):
        if line_H[y] and line_H[y + CELL + 1]:   # the upper and the lower line of a frame
            row = picture[y + 1:y + 1 + CELL, first:].reshape(CELL, count, CELL + GAP, 3)
            rows.append(row[:, :, 2:-2].swapaxes(0, 1))
            y += CELL + 1
        y += 1
    return np.array(rows)


@pytest.fixture(scope="module")
def run(judged) -> Run:
    """For numbers that a picture does not show. Nobody changes it."""
    return load_run(judged, CPU)


@pytest.fixture(scope="module")
def given(run) -> sample.Given:
    return load_images(run, [f"data:{i}" for i in range(40)])


# Completing images


@pytest.mark.parametrize("command", ["inpaint", "outpaint", "edit", "upscale"])
def test_completing_keeps_what_is_known(judged, tmp_path, command):
    flags = [] if command == "upscale" else ["--paste", "--box", 0, 0, 0.5, 1]
    if command == "edit":
        flags += ["--class", "star"]
    picture, said = draw(judged, tmp_path / "a.png", f"{command} data:3 data:5 --seeds 0 1", *flags)
    original, shown, first, second = cells(picture, 4).swapaxes(0, 1)
    assert len(original) == 2
    assert not np.array_equal(first, second)   # two seeds
    if command == "upscale":
        assert not np.array_equal(original, shown) and not np.array_equal(shown, first)
        assert "border" not in said   # there is none
        return
    top = np.s_[:, :CELL // 2]
    bottom = np.s_[:, CELL // 2:]
    known, made = (top, bottom) if command == "outpaint" else (bottom, top)
    for column in (shown, first, second):
        assert np.array_equal(column[known], original[known])
    assert not np.array_equal(first[made], original[made])
    assert (shown[made] == 128).all()   # grey
    assert float(said.split("known part ")[1].split(",")[0]) < 1e-4


def test_upscaling_reads_the_small_image_alone(run):
    """Two images with the same small one have the same result."""
    values = torch.randint(-48, 48, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 64
    flat = values.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    rough = flat + torch.tensor([[0.25, -0.25], [-0.25, 0.25]]).repeat(8, 8)   # sums are exact
    found = []
    for images in (flat, rough):
        given = sample.Given(images, ["one"], [None])
        (row,) = sample.complete(run, given, None, label=10, seeds=[1], small_side=4)
        found.append(row.images)
    for column, (one, other) in enumerate(zip(*found)):   # itself, what is known, the result
        assert np.array_equal(one, other) == (column > 0)


@pytest.mark.parametrize("side, scales", [(15, 2), (8, 2), (7, 1), (4, 1), (1, 1)])
def test_small_images_are_as_many_scales_as_they_have_pixels_for(run, given, side, scales):
    """Of 16 pixels a side the scales are 1x1, 2x2 and 4x4, and a code is for 4 x 4 pixels."""
    assert sample.from_small(given.images, side, run.tokenizer.config)[1] == scales
    half, eight = (sample.from_small(given.images, x, run.tokenizer.config)[0] for x in (None, 8))
    assert torch.equal(half, eight)


def test_enlarged_images_are_not_over_white_or_below_black(run):
    """At edges a bicubic curve goes beyond what it joins."""
    board = 2 * torch.eye(2).repeat(2, 2) - 1
    images = board.repeat_interleave(4, dim=0).repeat_interleave(4, dim=1).expand(1, 3, 16, 16)
    large, _ = sample.from_small(images, 8, run.tokenizer.config)
    assert large.max() == 1 and large.min() == -1
    large, _ = sample.from_small(0.5 * images, 8, run.tokenizer.config)
    assert large.max() > 0.5 and large.min() < -0.5


def test_everything_known_is_the_reconstruction(run, given):
    two = sample.Given(given.images[:2], given.names[:2], given.labels[:2])
    everywhere = torch.ones(16, 16)
    plain = sample.reconstruct(run, two)
    for batch in (2, 1):   # at a time, each with what is known of it
        in_parts = replace(run, sampling=replace(run.sampling, batch=batch))
        kept = sample.complete(in_parts, two, everywhere, run.model.config.classes, [0])
        assert np.array_equal([row.images[-1] for row in kept], plain[1].images)


def test_nothing_known_is_plain_generation(run, given):
    latents, _ = run.encode(given.images[:2])
    nowhere = torch.zeros(1, 1, 4, 4)
    made = run.generate([6, 2], 4, lambda rows: Known(latents[rows], nowhere, 3))
    assert run.sampling.smooth and not torch.equal(made, run.generate([6, 2], 4))   # which is smooth
    bare = replace(run, sampling=replace(run.sampling, smooth=0.0))
    assert torch.equal(made, bare.generate([6, 2], 4))


def test_the_open_loop_puts_the_image_s_own_tokens(run, given, monkeypatch):
    """And the closed one others, as soon as a coarser scale was generated."""
    known_HW = known_pixels((0, 0, 0.5, 1), 16)
    tokens = []
    decode = Run.decode
    monkeypatch.setattr(Run, "decode", lambda run, x: tokens.append(x) or decode(run, x))
    for open_loop in (False, True):
        sample.complete(run, given, known_HW, 10, [0], open_loop=open_loop)
    own_NL = run.encode(sample.fill_holes(given.images, known_HW))[1]
    known_L = torch.tensor([1] + [0, 0, 1, 1] + [0] * 8 + [1] * 8).bool()
    closed_NL, open_NL = tokens
    assert torch.equal(open_NL[:, known_L], own_NL[:, known_L])
    assert not torch.equal(closed_NL[:, known_L], own_NL[:, known_L])
    assert torch.equal(closed_NL[:, 0], own_NL[:, 0])   # nothing was generated before it


def test_the_encoder_does_not_see_the_hole(given):
    known_HW = known_pixels((0.25, 0.25, 0.75, 0.75), 16)
    filled = sample.fill_holes(given.images, known_HW)
    other = torch.where(known_HW > 0, given.images, torch.rand_like(given.images))
    assert torch.equal(filled, sample.fill_holes(other, known_HW))
    assert torch.equal(filled * known_HW, given.images * known_HW)
    flat = torch.full_like(given.images, 0.3)
    torch.testing.assert_close(sample.fill_holes(flat * known_HW, known_HW), flat)


def test_a_box_ends_at_the_nearest_pixel():
    known_HW = known_pixels((0, 0, 0.3, 0.77), 16)   # 4.8 and 12.32
    assert not known_HW[:5, :12].any() and known_HW.sum() == 16 * 16 - 5 * 12


@pytest.mark.parametrize("turned", [False, True])
def test_the_report_on_a_completion(capsys, turned):
    images = torch.zeros(2, 3, 4, 4)
    known_HW = torch.ones(4, 4)
    known_HW[:, 2:] = 0
    images[:, :, :, 2:] = 0.5   # a step of 0.5 at the border, 0.25 in [0, 1]
    result = images.clone()
    result[:, :, 0, 0] = 0.4    # one pixel of the 8 that are known
    result[:, :, :, 2:] = 1.0
    if turned:   # the border is then between rows
        images, result, known_HW = images.mT, result.mT, known_HW.T
    sample.say_completion([result, images], images, known_HW)
    said = capsys.readouterr().out
    assert f"known part {0.2**2 / 8 / 2:.5f}, hole {0.25**2 / 2:.5f};" in said
    assert "across the border 0.3750, 1.50 of the image's own" in said
    sample.say_completion([result], 0 * images, known_HW)   # which has no step there
    assert "of the image's own" not in capsys.readouterr().out


@pytest.mark.parametrize("mode, ground, paint", [
    ("L", 0, 255),
    ("RGB", "black", "blue"),
    ("RGBA", "black", "white"),
    ("RGBA", (255, 255, 255, 0), "white"),
    ("RGBA", (0, 0, 0, 0), "red"),
    ("RGBA", (255, 255, 255, 0), "black"),
    ("LA", (0, 0), (60, 255)),
    ("1", 0, 1),
])
def test_what_is_painted_in_a_mask_is_a_hole(tmp_path, mode, ground, paint):
    mask = Image.new(mode, (40, 40), ground)
    mask.paste(paint, (0, 20, 40, 40))
    mask.save(tmp_path / "mask.png")
    known_HW = known_pixels(tmp_path / "mask.png", 8)
    assert known_HW[:4].min() == 1 and known_HW[4:].max() == 0
    exif = Image.Exif()
    exif[0x0112] = 6   # to be shown after a turn to the right: what was below is on the left
    mask.save(tmp_path / "turned.png", exif=exif)
    known_HW = known_pixels(tmp_path / "turned.png", 8)
    assert known_HW[:, 4:].min() == 1 and known_HW[:, :4].max() == 0


def test_a_mask_is_refused_without_a_hole_or_without_anything_known(judged, tmp_path):
    for name, mode, colour, lacks in (("black", "L", 0, "a hole"),
                                      ("clear", "RGBA", (255, 0, 0, 0), "a hole"),
                                      ("white", "RGB", "white", "anything that is known")):
        path = tmp_path / f"{name}.png"
        Image.new(mode, (30, 30), colour).save(path)
        said = refused("sample.py", "inpaint", "data:3", "--run", judged, "--mask", path)
        assert f"{name}.png leaves 16 x 16 pixels without {lacks}" in said
    for command, lacks in (("inpaint", "anything that is known"), ("outpaint", "a hole")):
        said = refused("sample.py", command, "data:3", "--run", judged, "--box", 0, 0, 1, 1)
        assert said.endswith(f"without {lacks}")


# Images of one's own


def test_images_of_any_kind(judged, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for mode, ending in (("L", "png"), ("RGBA", "webp"), ("P", "png"), ("RGB", "jpg"),
                         ("CMYK", "jpg"), ("1", "png"), ("I;16", "png")):
        Image.new(mode, (30, 50)).save(folder / f"{mode.replace(';', '')}.{ending}")
    (folder / "A.png").write_bytes(b"the first by name, and broken")
    picture, said = draw(judged, tmp_path / "a.png", f"reconstruct {folder} data:0")
    assert said.count("PSNR") == 8
    assert said.count("left out") == 1
    assert "A.png cannot be read as an image: Pillow knows no such format" in said
    original, result = cells(picture, 1)[:, 0]   # of data:0
    mse = np.square((original.astype(float) - result) / 255).mean()
    assert float(said.split("PSNR ")[-1].split()[0]) == pytest.approx(-10 * np.log10(mse), abs=0.1)
    assert "cannot be read" in refused(
        "sample.py", "reconstruct", folder / "A.png", "--run", judged)
    (folder / "L.png").rename(folder / "猫.png")
    names = load_images(load_run(judged, CPU), ["data:0", str(folder)]).names
    assert names[0].endswith(" 0") and names[-1] == "7 猫"   # the eighth, whichever source it is of
    for path in folder.iterdir():
        path.write_bytes(b"broken")
    assert "holds no image that can be read" in refused(
        "sample.py", "reconstruct", folder, "--run", judged)


def test_held_out_images_are_numbered_from_0_to_the_last(run):
    images, labels = run.held_out.tensors
    given = load_images(run, ["data:0", f"data:{len(images) - 1}"])
    torch.testing.assert_close(given.images, images[[0, -1]] / 127.5 - 1)
    assert given.labels == labels[[0, -1]].tolist()
    assert [name.rpartition(" ")[2] for name in given.names] == ["0", str(len(images) - 1)]
    for number in (len(images), "-1"):
        with pytest.raises(sample.UserError, match=f"are data:0 to data:{len(images) - 1}$"):
            load_images(run, [f"data:{number}"])


def test_files_are_read_in_the_channels_of_the_tokenizer(run, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    grey = SimpleNamespace(config=replace(run.tokenizer.config, image_channels=1))
    given = load_images(replace(run, tokenizer=grey), [str(tmp_path / "a.png")])
    assert given.images.shape == (1, 1, 16, 16)


def test_names_in_letters_of_any_script():
    assert legible("Ελλάδα", 3) == "Ελλάδα"
    assert legible("cafe\u0301", 3) == "caf\u00e9"
    for name in ("猫", "แมว", "बिल्ली", "고양이"):   # boxes, in the font of the pictures
        assert legible(name, 3) == f"3 {name}"
    classes = ["cafe\u0301", "caf\u00e8", "猫"]   # as a Mac keeps them, and as a keyboard types them
    assert sample.class_indices(["caf\u00e9", "cafe\u0300", "猫"], classes) == [0, 1, 2]
    with pytest.raises(sample.UserError, match="there is no class cat; there are .*, 猫$"):
        sample.class_indices(["猫", "cat"], classes)
    run = SimpleNamespace(classes=["one", "two", "猫"])
    assert asked_classes(run, ["猫"], 2) == (["2 猫"], [2, 2])   # numbered as classes are
    with pytest.raises(sample.UserError, match="there is no class cat; there are a0, .*, a19$"):
        sample.class_indices(["cat"], [f"a{i}" for i in range(20)])
    with pytest.raises(sample.UserError, match="there is no class cat; there are a0 to a20$"):
        sample.class_indices(["cat"], [f"a{i}" for i in range(21)])


def test_a_number_is_a_class_of_that_name_before_it_is_one_of_that_place():
    assert sample.class_indices(["1", "0", "2"], ["1", "0", "cat"]) == [0, 1, 2]


# Pictures


def test_pictures_that_explain(judged, tmp_path):
    codes, _ = draw(judged, tmp_path / "codes.png", "codes data:3 data:4")
    codes = cells(codes, 3)
    assert len(codes) == 6   # left over, codes, image so far
    assert len(np.unique(codes[1, 0].reshape(-1, 3), axis=0)) == 1   # a single code
    teaching, _ = draw(judged, tmp_path / "teaching.png", "teaching data:3 data:4")   # of the first
    read, predicted = cells(teaching, 3)
    for map_read, s in zip(read, (1, 2, 4)):
        assert len(np.unique(map_read.reshape(-1, 3), axis=0)) <= s * s
    assert np.array_equal(predicted, codes[1])
    attention, _ = draw(judged, tmp_path / "attention.png", "attention data:3 --cell 0 3")
    assert len(np.unique(attention.reshape(-1, 3), axis=0)) > 20
    attention = cells(attention, 4)
    red = (attention[0, 0] == (255, 0, 0)).all(axis=-1)   # around the cell
    rows, places = red.nonzero()
    assert (rows.min(), rows.max()) == (0, CELL // 4 - 1)
    assert (places.min(), places.max()) == (CELL * 3 // 4, CELL - 1)


def test_what_is_left_over_is_what_the_coarser_scales_lack(run, given):
    """The length of each mean of a cell, as shades: of all scales and images alike."""
    two = sample.Given(given.images[:2], given.names[:2], given.labels[:2])
    rows = draw_codes(run, two)
    f_NCSS, tokens_NL = run.encode(two.images)
    left = []
    for s, coarser in zip((1, 2, 4), (0, 1, 5)):
        lacking_NCSS = f_NCSS.numpy()
        if coarser:
            lacking_NCSS = lacking_NCSS - run.tokenizer.quantizer.decode(tokens_NL[:, :coarser]).numpy()
        means_NCss = lacking_NCSS.reshape(2, -1, s, 4 // s, s, 4 // s).mean(axis=(3, 5))
        left.append(np.sqrt(np.square(means_NCss).sum(axis=1)))
    largest = max(left_Nss.max() for left_Nss in left)
    for n in range(2):
        for shown, left_Nss in zip(rows[3 * n].images, left, strict=True):
            np.testing.assert_allclose(shown[..., 0], 255 * left_Nss[n] / largest, atol=1.01)
        codes_L3 = torch.cat([shown.flatten(0, 1) for shown in rows[3 * n + 1].images])
        colours_V3 = code_colours(run.tokenizer.quantizer.codebook_VC)
        assert torch.equal(codes_L3, colours_V3[tokens_NL[n]])
        for shown, frames_N in zip(rows[3 * n + 2].images, run.after_each_scale(tokens_NL)):
            assert np.array_equal(shown, frames_N[n])
    assert not torch.equal(rows[0].images[2], rows[3].images[2])


def test_colours_are_of_the_three_directions_in_which_codes_vary_most():
    """Which are the first three channels here; mid grey is the mean, and two deviations are the end."""
    values_VC = np.random.default_rng(0).normal(size=(64, 4))
    q_VC, _ = np.linalg.qr(values_VC - values_VC.mean(axis=0))   # the channels do not correlate
    unit_VC = q_VC * np.sqrt(63)   # and have a variance of 1
    codebook_VC = unit_VC * np.sqrt([9, 4, 1, 0.01]) + 5
    colours_V3 = code_colours(torch.tensor(codebook_VC, dtype=torch.float32)).numpy()
    contrast_V3 = 127.5 * (unit_VC[:, :3] / 2).clip(-1, 1)
    np.testing.assert_allclose(np.abs(colours_V3 - 127.5), np.abs(contrast_V3), atol=1.01)   # of either sign
    few_V3 = code_colours(torch.tensor(codebook_VC[:, :2]))   # of two channels
    assert few_V3.shape == (64, 3) and few_V3[:, :2].any() and not few_V3[:, 2].any()
    assert code_colours(torch.ones(1, 4)).tolist() == [[127, 0, 0]]   # of one code


def test_the_shares_of_all_scales_stand_above_a_row(run, given):
    """And brightness is the root of a weight, in shares of the largest."""
    (row,) = draw_attention(run, given.images, 3, (0, 3))
    where, *shares = row.captions
    assert row.label == "layer 1"
    assert where == "cell 0 3" and [share.split(":")[0] for share in shares] == ["1x1", "2x2", "4x4"]
    whole = sum(float(share.split()[1].strip("%")) for share in shares)
    assert whole == pytest.approx(100, abs=2)
    inputs = run.tokenizer.teacher_inputs(run.encode(given.images[:1])[1])
    weights_H1L = attention_weights(run.model, torch.tensor([3]), inputs, [0], slice(1 + 4 + 3, 1 + 4 + 4))[0]
    weights_L = weights_H1L.mean(dim=(0, 1)).numpy()
    shown_L = np.concatenate([np.ravel(shown) for shown in row.images[1:]])
    np.testing.assert_allclose(shown_L, 255 * np.sqrt(weights_L / weights_L.max()), atol=1.01)


def test_attention_is_drawn_of_the_middle_and_of_eight_layers_at_most(run, given):
    model = VAR(replace(run.model.config, depth=10)).eval()
    rows = draw_attention(replace(run, model=model), given.images, 3, None)
    assert [row.label for row in rows] == [f"layer {n}" for n in (1, 2, 4, 5, 6, 7, 9, 10)]
    assert {row.captions[0] for row in rows} == {"cell 2 2"}


def test_images_forming(judged, tmp_path):
    picture, _ = draw(judged, tmp_path / "a.png", "progress --classes star heart --per-class 2",
                      "--gif", tmp_path / "a.gif")
    picture = cells(picture, 3)
    plain, _ = draw(judged, tmp_path / "b.png", "--classes star heart --per-class 2")
    assert np.array_equal(cells(plain, 2).reshape(4, CELL, CELL, 3), picture[:, -1])
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3 and film.info["loop"] == 0
        times = []
        for frame in range(3):
            film.seek(frame)
            times.append(film.info["duration"])
            last = cells(film.convert("RGB"), 2)
        assert times == [400, 400, 2000]   # the finished images stay for a while
    assert abs(last.reshape(4, CELL, CELL, 3) - picture[:, -1].astype(int)).mean() < 10   # of 255
    black = np.zeros((8, 8, 1), np.uint8)
    save_film(tmp_path / "b.gif", [Row(x, [black], ["1x1"]) for x in "aabb"], 2, CELL, "note")
    with Image.open(tmp_path / "b.gif") as film:   # two rows of the picture are one of the film
        expected = grid([Row(x, [black, black]) for x in "ab"], CELL, "1x1   note")
        assert np.array_equal(film.convert("RGB"), expected)
    many = [Row("one", [black], ["1x1"])] * 700
    with pytest.raises(sample.UserError, match=r"film of 70\d* x .* has at most 65535 a side"):
        save_film(tmp_path / "b.gif", many, 700)


def test_a_picture_is_there_before_its_film(judged, tmp_path, monkeypatch):
    def full(*arguments):
        raise sample.UserError("as if a film were too large")

    monkeypatch.setattr(sample, "save_film", full)
    assert "too large" in refused(
        "sample.py", "progress", "--run", judged, "--per-class", 1, "--classes", "star", "heart",
        "--out", tmp_path / "a.png", "--gif", tmp_path / "a.gif")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_grid_says_what_it_shows():
    """Captions, labels and a note are drawn, and leave the images where they are."""
    black, white = (np.full((8, 8, 1), shade, np.uint8) for shade in (0, 255))
    rows = [Row("one", [black, white], ["first", "second"]), Row("two", [black])]
    bare = [row._replace(captions=[]) for row in rows]
    picture = np.asarray(grid(rows, CELL))
    without = np.asarray(grid(bare, CELL))
    noted = np.asarray(grid(rows, CELL, "note"))
    line = len(picture) - len(without)
    assert 10 < line < 25 and len(without) == 2 * (CELL + GAP)
    assert picture[:line, :-2 * (CELL + GAP)].min() == 255 > picture[:line].min()
    assert np.array_equal(picture[line:], without)
    assert np.array_equal(noted[len(noted) - len(picture):], picture)
    first = picture[line:, -2 * (CELL + GAP):]
    assert (first[2:CELL + 2, 2:CELL + 2] == 0).all()
    seen = first[:CELL + GAP, CELL + GAP:]   # white on white
    assert (seen[2:-2, 2:-2] == 255).all() and (seen[1, 1:-1] == 192).all()
    assert (seen[-2, 1:-1] == 192).all() and (seen[1:-1, [1, -2]] == 192).all()
    assert (seen[0] == 255).all() and (seen[-1] == 255).all()
    assert np.array_equal(grid([rows[0], rows[1]._replace(captions=rows[0].captions)], CELL), picture)
    wide = Row("", [black], ["word " * 9])   # on two lines, and once
    assert grid([wide, wide], CELL).height == grid([wide], CELL).height + CELL + GAP
    long = np.asarray(grid([Row("word " * 40, [black])], CELL))
    assert len(long) == CELL + GAP and 150 < long.shape[1] - CELL - GAP < 250
    assert grid([Row("", [black])], 4).size == (8 + 4 + GAP, 17)   # made smaller, a label has room


@pytest.mark.parametrize("side, count, cell", [
    (32, 10, 96), (32, 1, 160), (32, 6, 128), (32, 7, 128), (28, 5, 140), (64, 10, 128), (8, 2, 160),
    (256, 4, 256), (200, 4, 200)])
def test_images_are_enlarged_by_whole_numbers(side, count, cell):
    assert cell_size(side, count) == cell
    row = Row("", [np.zeros((side, side, 3), np.uint8)])
    assert grid([row] * count).height == count * (cell + GAP)


def test_words_are_wrapped_to_what_they_take():
    font = ImageFont.truetype(label_font(), 13)
    two = font.getlength("one two")
    assert wrapped("one two three", font, two, 5) == "one two\nthree"
    assert wrapped("one two three", font, two - 1, 5) == "one\ntwo\nthree"
    assert wrapped("one two three", font, two - 1, 2) == "one\ntwo"
    assert wrapped("iiiiiiiiii", font, two, 5) == "iiiiiiiiii"
    assert wrapped("MMMMMMMMMM", font, two, 5) == "MMMM\nMMMM\nMM"
    assert wrapped("star 4\n29.3 dB", font, 100, 1) == "star 4\n29.3 dB"
    assert wrapped("ab", font, 1, 2) == "a\nb" and wrapped("", font, 5, 1) == ""


def test_captions(judged, run, given):
    rows = sample.draw_progress(run, ["star", "heart"], 2, 0)
    assert [row.label for row in rows] == ["star", "star", "heart", "heart"]
    assert [list(row.captions) for row in rows] == [["1x1", "2x2", "4x4"]] * 4
    two = sample.Given(given.images[:2], ["one", "two"], [0, 1])
    rows = sample.complete(run, two, known_pixels((0, 0, 0.5, 1), 16), 10, [3, 5])
    assert [list(row.captions) for row in rows] == [["original", "known", "seed 3", "seed 5"]] * 2
    rows = sample.reconstruct(run, two)
    errors = (run.decode(run.encode(two.images)[1]) - two.images).square().mean(dim=(1, 2, 3))
    quality = [f"{10 * np.log10(4 / error):.1f} dB" for error in errors.tolist()]
    assert rows[0].captions == [f"one\n{quality[0]}", f"two\n{quality[1]}"]
    assert [row.label for row in rows] == ["original", "reconstruction"]
    many = sample.reconstruct(run, given)   # 40, eight in a row
    assert len(many) == 10 and {len(row.images) for row in many} == {8}
    assert many[2].captions[0].startswith(given.names[8])


def test_what_is_read_is_not_written_over(judged, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16), "red").save(path)
    before = path.read_bytes()
    for flags in (["reconstruct", path, "--out", path], ["reconstruct", tmp_path, "--out", path],
                  ["reconstruct", tmp_path.parent, "--out", path],
                  ["inpaint", "data:1", "--mask", path, "--out", path]):
        assert "a.png would be written over, and is read" in refused(
            "sample.py", *flags, "--run", judged)
    assert path.read_bytes() == before
    ran("sample.py", "reconstruct", tmp_path, "--out", tmp_path / "b.png", "--run", judged)
    assert path.read_bytes() == before and (tmp_path / "b.png").exists()
    # Pictures of a published model lie beside it.
    parse(asdict(sample.DEFAULTS), ["inpaint", "out/shapes/inpaint.png", "--published", "d16"])
    with pytest.raises(sample.UserError, match="would be written over"):
        parse(asdict(sample.DEFAULTS),
              ["inpaint", "data/published/inpaint.png", "--published", "d16"])


def test_held_out_images_of_another_size_are_refused(judged, tmp_path):
    for name in ("tokenizer.pt", "var.pt", "held_out.pt"):
        shutil.copy(judged / name, tmp_path / name)
    content = torch.load(tmp_path / "held_out.pt", weights_only=True)
    content["images"] = content["images"][..., :8, :8]
    content.pop("kind")
    save_checkpoint(tmp_path / "held_out.pt", "set of held-out images", **content)
    for command in (["grid"], ["codes", "data:1"]):
        assert "its images are of another size than the tokenizer's" in refused(
            "sample.py", *command, "--run", tmp_path)


def teaching(scales: tuple[int, ...], tokens: list[int], inputs: torch.Tensor) -> list[Row]:
    """The picture of what is read and predicted, of a run that is made up."""
    tokenizer = SimpleNamespace(
        teacher_inputs=lambda tokens: inputs,
        quantizer=SimpleNamespace(codebook_VC=torch.randn(8, 4)))
    run = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(scales=scales)), tokenizer=tokenizer,
        encode=lambda images: (None, torch.tensor([tokens])),
        machine=choose_machine("cpu"))
    return draw_teaching(run, SimpleNamespace(images=torch.zeros(1, 3, 4, 4)))


def test_teaching_of_a_single_scale():
    """Which reads the class alone."""
    reads, predicts = teaching((1,), [3], torch.zeros(1, 0, 4))
    assert len(reads.images) == len(predicts.images) == 1


def test_what_is_read_is_as_bright_as_it_is_long():
    """And the class as the longest."""
    vectors = [[6, 0, -8, 0], [0, 0, 0, -5], [0, 0, 0, 0], [1, -1, 1, -1]]   # 10, 5, 0 and 2 long
    reads, _ = teaching((1, 2), [3, 1, 4, 1, 5], torch.tensor([vectors]).float())
    assert [shown.flatten().tolist() for shown in reads.images] == [[255], [255, 127, 0, 51]]
    assert list(reads.captions) == ["the class", "after 1x1"]


def test_an_ending_may_be_in_capitals(tmp_path):
    for name in ("a.png", "A.PNG", "new/folder/a.png"):
        assert parse({}, ["grid", "--out", str(tmp_path / name)]).out == tmp_path / name


def test_a_file_is_not_replaced_without_a_word(judged, tmp_path):
    path = tmp_path / "a.png"
    _, first = draw(judged, path, "--classes star --per-class 1")
    _, second = draw(judged, path, "--classes heart --per-class 1")
    assert first.endswith(f"wrote {path}\n")
    assert second.endswith(f"wrote {path}, in place of an older one\n")


def test_a_tokenizer_alone_can_be_looked_at(judged, tmp_path):
    for name in ("tokenizer.pt", "held_out.pt"):
        shutil.copy(judged / name, tmp_path / name)
    for command in ("reconstruct", "codes"):
        whole, _ = draw(judged, tmp_path / "a.png", f"{command} data:1 data:3")
        alone, said = draw(tmp_path, tmp_path / "b.png", f"{command} data:1 data:3")
        assert np.array_equal(whole, alone) and "note" not in said.replace("note: one thread", "")
    assert "there is no transformer at" in refused(
        "sample.py", "teaching", "data:1", "--run", tmp_path)
    own = "--tokenizer", tmp_path / "tokenizer.pt"
    assert "by --run or by --tokenizer, not both" in refused(
        "sample.py", "codes", "data:1", "--run", judged, *own)
    (tmp_path / "codes.png").mkdir()   # a picture lies beside the tokenizer
    assert "codes.png is there and is no file; --out names another place" in refused(
        "sample.py", "codes", "data:1", *own)
    (tmp_path / "codes.png").rmdir()
    (tmp_path / "explorer.html").mkdir()
    assert "explorer.html is there and is no file" in refused("sample.py", "explore", "--run", tmp_path)
    (tmp_path / "held_out.pt").unlink()
    ran("sample.py", "codes", tmp_path / "a.png", "--run", tmp_path)
    assert "has no held_out.pt" in refused("sample.py", "codes", "data:1", "--run", tmp_path)


def test_an_unfinished_training_is_drawn_with_its_step(judged, tmp_path):
    shutil.copy(judged / "held_out.pt", tmp_path)
    plain = {}
    for name, command in (("tokenizer", "codes data:1"), ("var", "--classes star --per-class 1")):
        plain[name], _ = draw(judged, tmp_path / "a.png", command)
    for name in ("tokenizer", "var"):
        content = torch.load(judged / f"{name}.pt", weights_only=True)
        torch.save({**content, "training": {"step": 7}}, tmp_path / f"{name}.pt")
    for name, command, steps in (("tokenizer", "codes data:1", 24),
                                 ("var", "--classes star --per-class 1", 16)):
        picture, said = draw(tmp_path, tmp_path / "a.png", command)
        assert f"is not finished: step 7 of {steps}" in said
        above = len(picture) - len(plain[name])
        assert above > 10 and picture[:above].min() < 100   # something is written there
        aligned = picture[above:, :plain[name].shape[1]]
        assert np.array_equal(aligned, plain[name])
    widths = []
    for out in (judged, tmp_path):
        draw(out, tmp_path / "a.png", "progress --classes star --per-class 1", "--gif", tmp_path / "a.gif")
        with Image.open(tmp_path / "a.gif") as film:
            assert film.n_frames == 3
            widths.append(film.width)
    assert widths[1] > widths[0] + 50   # for the step is written beside the scale


def test_the_attention_drawn_is_that_of_the_cell(judged, tmp_path, monkeypatch):
    asked = []

    def noted(model, labels_B, inputs, layers, queries):
        asked.append((labels_B.tolist(), queries.start))
        return attention_weights(model, labels_B, inputs, layers, queries)

    monkeypatch.setattr("support.figures.attention_weights", noted)
    label, other = load_held_out(judged)[0].tensors[1][3:5].tolist()
    assert label != other
    for flags in ("", " --class star"):   # of the first image
        draw(judged, tmp_path / "a.png", "attention data:3 data:4 --cell 0 3" + flags)
    assert asked == [([label], 1 + 4 + 3), ([4], 1 + 4 + 3)]


def test_the_class_is_the_one_asked_for_or_the_image_s_own_or_none(run):
    null = run.model.config.classes
    cases = {("star", 0): 4, ("star", None): 4, ("2", 7): 2, (None, 0): 0, (None, 7): 7, (None, None): null}
    assert [sample.asked_class(run, *asked) for asked in cases] == [*cases.values()]


@pytest.mark.parametrize("normalise_qk", [True, False])
def test_attention_weights_are_what_the_layer_computes(run, given, normalise_qk):
    torch.manual_seed(0)
    model = VAR(replace(run.model.config, normalise_qk=normalise_qk)).eval()
    inputs = run.tokenizer.teacher_inputs(run.encode(given.images[:1])[1])
    seen = {}
    block = model.blocks[0].attention
    hook = block.register_forward_hook(
        lambda module, arguments, result: seen.update(x=arguments[0], o=result))
    with torch.no_grad():
        weights_HlL = attention_weights(model, torch.tensor([2]), inputs, [0], slice(4, 5))[0]
        weights_L = weights_HlL.mean(dim=(0, 1))
        hook.remove()
        assert abs(weights_L.sum() - 1) < 1e-5
        assert weights_L[5:].abs().max() == 0   # scales 1x1 and 2x2 alone
        # Averaging over heads is no loss if the values of all heads are the same.
        v_BHLD = block.project(seen["x"])[2]
        q_BHLD, k_BHLD, _, scale = block.project(seen["x"])
        scores_HL = scale * torch.einsum("hd,hld->hl", q_BHLD[0, :, 4], k_BHLD[0, :, :5])
        each_HL = scores_HL.softmax(dim=1)
        torch.testing.assert_close(weights_L[:5], each_HL.mean(dim=0))
        o_W = torch.einsum("hl,hld->hd", each_HL, v_BHLD[0, :, :5]).flatten()
        torch.testing.assert_close(block.out(o_W), seen["o"][0, 4])


# For evaluation


def test_samples_for_evaluation(judged, tmp_path):
    for flags in (["--reference", tmp_path / "b.npz"], ["--rejection", 0.5, "--smooth", 0]):
        said = ran("sample.py", "export", 23, tmp_path / "a.npz", "--run", judged, *flags)
        assert f"wrote 23 images to {tmp_path / 'a.npz'}" in said
        images = np.load(tmp_path / "a.npz")["arr_0"]
        assert images.shape == (23, 16, 16, 3) and images.dtype == np.uint8 and images.std() > 10
    reference = np.load(tmp_path / "b.npz")["arr_0"]
    held_out = load_held_out(judged)[0].tensors[0].permute(0, 2, 3, 1).numpy()
    assert sorted(image.tobytes() for image in reference) == sorted(
        image.tobytes() for image in held_out)


def test_the_rows_for_evaluation_are_of_all_classes_everywhere(tmp_path):
    """ADM's program takes the Inception Score of each 5,000 rows."""
    labels_N = np.repeat(np.arange(100), 30).astype(np.uint8)
    images = np.zeros((3000, 1, 1, 1), np.uint8) + labels_N[:, None, None, None]
    for name in ("a", "b"):
        save_npz(tmp_path / f"{name}.npz", images)
    rows_N = np.load(tmp_path / "a.npz")["arr_0"][:, 0, 0, 0]
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (3000, 1, 1, 3)   # grey ones, too
    assert np.array_equal(np.sort(rows_N), labels_N)
    for part in np.split(rows_N, 5):
        assert len(np.unique(part)) > 90
    assert np.array_equal(rows_N, np.load(tmp_path / "b.npz")["arr_0"][:, 0, 0, 0])


def test_likelihoods(run, given):
    """Against the sum over tokens, one at a time."""
    tokens_NL = run.encode(given.images[:3])[1]
    labels = [0, 4, 7]
    found_N = run.log_likelihood(tokens_NL, labels)
    with torch.no_grad():
        logits_NLV = run.model(torch.tensor(labels), run.tokenizer.teacher_inputs(tokens_NL))
    for n in range(3):
        shares_LV = logits_NLV[n].softmax(dim=-1)
        expected = sum(shares_LV[i, token].log() for i, token in enumerate(tokens_NL[n]))
        torch.testing.assert_close(found_N[n], expected)


def test_smooth_images_are_of_latents(run, monkeypatch):
    """Those of the tokens, moved; progress shows them after each scale, and a grid after the last."""
    assert run.sampling.smooth == 1
    bare = replace(run, sampling=replace(run.sampling, smooth=0.0))
    tokens_NL, latents_NCSS = run.draw([4, 1], 3)
    assert torch.equal(tokens_NL, run.generate([4, 1], 3))
    assert not torch.equal(tokens_NL, bare.generate([4, 1], 3))   # another map was read
    assert latents_NCSS.shape == run.encode(run.decode(tokens_NL))[0].shape
    tokens, drawn = bare.draw([4, 1], 3)
    assert tokens is drawn and torch.equal(drawn, bare.generate([4, 1], 3))
    images = run.decode(latents_NCSS)
    assert not images.requires_grad and not run.decode(tokens_NL).requires_grad   # else no memory is freed
    assert images.abs().max() <= 1 and (images - run.decode(tokens_NL)).abs().mean() > 0.01
    torch.testing.assert_close(images, run.tokenizer.render(latents_NCSS).detach().clamp(-1, 1))
    one = replace(run, sampling=replace(run.sampling, batch=1))
    two_batches = one.decode_to_bytes(one.draw([4, 1], 3)[1])
    forming = sample.draw_progress(one, ["star", "ring"], 1, 3)
    assert np.array_equal(np.stack([each.images[-1] for each in forming]), two_batches)
    (row,) = sample.draw_samples(run, ["star"], 2, 3)
    forming = sample.draw_progress(run, ["star"], 2, 3)
    assert [len(each.images) for each in forming] == [3, 3]
    assert np.array_equal(np.stack([each.images[-1] for each in forming]), np.stack(list(row.images)))
    codes = sample.draw_progress(bare, ["star"], 2, 3)
    expected = bare.after_each_scale(bare.generate([4, 4], 3))
    assert np.array_equal(np.stack([each.images for each in codes], axis=1), np.stack(expected))
    again = sample.draw_progress(run, ["star", "ring"], 1, 3)
    chosen = run.after_each_scale(tokens_NL)[0]   # the first scale has to choose
    assert np.array_equal(np.stack([each.images[0] for each in again]), chosen)
    with monkeypatch.context() as patch:   # what a decoder may do
        patch.setattr(run.tokenizer, "render", lambda f_BCSS: torch.full((len(f_BCSS), 3, 2, 2), -9.0))
        assert (run.decode(latents_NCSS) == -1).all()


def test_rejection_keeps_the_most_likely(run, monkeypatch):
    labels = [label for label in range(10) for _ in range(4)]
    smooth_run = run
    run = replace(run, sampling=sample.UNSMOOTHED)
    tokens_NL = run.generate(labels, 0)
    likelihoods = run.log_likelihood(tokens_NL, labels).view(10, 4)
    shown = []

    def decode_to_bytes(run, tokens_NL):
        shown.append(tokens_NL)
        return np.zeros((len(tokens_NL), 16, 16, 3), np.uint8)

    asked = []
    monkeypatch.setattr(sample, "check_memory", lambda needed, what: asked.append((needed, what)))
    monkeypatch.setattr(Run, "decode_to_bytes", decode_to_bytes)
    sample.draw_many(run, 20, seed=0, rejection=0.5)
    assert asked == [(2 * 20 * 16 * 16 * 3, "20 samples, and a copy in another order,")]
    kept = run.log_likelihood(shown[0], [label for label in range(10) for _ in range(2)])
    best = likelihoods.topk(2, dim=1).values
    torch.testing.assert_close(kept.view(10, 2).sort(dim=1).values, best.sort(dim=1).values)
    tokens_NL, latents_NCSS = smooth_run.draw(labels, 0)
    best = smooth_run.log_likelihood(tokens_NL, labels).view(10, 4).topk(2, dim=1).indices
    sample.draw_many(smooth_run, 20, seed=0, rejection=0.5)
    assert asked.pop()[0] == 2 * 20 * 16 * 16 * 3 + 2 * 40 * latents_NCSS[0].nbytes
    assert torch.equal(shown.pop(), latents_NCSS[(best + 4 * torch.arange(10)[:, None]).flatten()])
    sample.draw_many(run, 20, seed=3, rejection=1)
    assert torch.equal(shown.pop(), run.generate([label for label in range(10) for _ in range(2)], 3))
    drawn = []
    monkeypatch.setattr(Run, "generate", lambda run, labels, seed: drawn.append(labels) or tokens_NL[labels])
    sample.draw_many(run, 13, seed=0, rejection=0.7)   # 2 of each of three classes and 1 of the others
    assert drawn == [[label for label in range(10) for _ in range(3 if label < 3 else 2)]]   # 2 / 0.7, 1 / 0.7
    assert len(shown[1]) == 13


# How images come out


def test_images_become_the_nearest_bytes():
    values = torch.tensor([-1.2, -1, -0.997, -0.995, 0, 0.999, 1.2])   # 0.38, 0.64, 127.5, 254.87
    assert to_bytes(values.view(1, 1, 1, 7)).ravel().tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_a_pass_takes_fewer_large_images_but_one_at_least():
    assert [at_a_time(side) for side in (32, 256, 724, 1024)] == [512, 8, 1, 1]


def test_what_crosses_from_the_device_is_bytes(run, given, monkeypatch):
    tokens_NL = run.encode(given.images)[1]
    expected = to_bytes(run.decode(tokens_NL))
    monkeypatch.setattr(sample, "at_a_time", lambda side: 16)
    crossed = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: crossed.append(x) or cpu(x))
    assert np.array_equal(run.decode_to_bytes(tokens_NL), expected)
    assert [(x.dtype, len(x)) for x in crossed] == 2 * [(torch.uint8, 16)] + [(torch.uint8, 8)]


def test_a_gpu_decodes_in_its_precision_and_encodes_in_fp32():
    done = []
    tokenizer = SimpleNamespace(
        to=lambda device: done.append(device.type), cast_decoder=done.append)
    sample.placed(tokenizer, Machine(torch.device("cuda"), torch.bfloat16))
    assert done == ["cuda", torch.bfloat16]


def test_every_pass_of_a_compiled_decoder_has_the_same_shape(run, given, monkeypatch):
    tokens_NL = run.encode(given.images)[1]
    whole = run.decode(tokens_NL)
    monkeypatch.setattr(sample, "at_a_time", lambda side: 16)
    passes = []
    hook = run.tokenizer.decoder.register_forward_pre_hook(
        lambda _, given: passes.append(len(given[0])))
    for compiled in (False, True):
        own = replace(run, machine=replace(CPU, compile=compiled))
        for drawn_N in (tokens_NL, tokens_NL[:3], run.tokenizer.quantizer.decode(tokens_NL)):
            torch.testing.assert_close(own.decode(drawn_N), whole[:len(drawn_N)])
    hook.remove()
    assert passes == [16, 16, 8, 3, 16, 16, 8] + [16, 16, 16, 3, 16, 16, 16]


class HalfMachine(Machine):
    """One whose autocast asks for another dtype than the decoder was cast to."""

    def autocast(self):
        return torch.autocast("cpu", torch.float16)


def test_a_cast_decoder_computes_in_its_dtype_alone(judged, run, given):
    tokens_NL = run.encode(given.images)[1]
    whole = run.decode(tokens_NL)
    run = load_run(judged, HalfMachine(torch.device("cpu")))
    run.tokenizer.cast_decoder(torch.bfloat16)
    seen = set()
    for part in run.tokenizer.decoder.modules():
        part.register_forward_hook(lambda *parts: seen.add(parts[-1].dtype))
    images = run.decode(tokens_NL)
    assert seen == {torch.bfloat16} and images.dtype == torch.float32
    assert 0 < (images - whole).abs().mean() < 0.02
    weight = run.tokenizer.decoder.conv_out.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert run.encode(given.images)[0].dtype == torch.float32   # the encoder is as before


def test_all_that_a_run_asks_its_models_is_in_its_precision(judged):
    seen = set()

    def note(module, _):
        if isinstance(module, (Encoder, Decoder, Attention)):
            seen.add((type(module), torch.is_autocast_enabled("cpu")))

    run = load_run(judged, Machine(torch.device("cpu"), torch.bfloat16))
    with torch.nn.modules.module.register_module_forward_pre_hook(note):
        tokens_1L = run.generate([0], 0)
        run.log_likelihood(tokens_1L, [0])
        run.encode(run.decode(tokens_1L))
    assert seen == {(Encoder, False), (Decoder, True), (Attention, True)}   # tokens as published


def test_compiled_parts_draw_the_same_images(judged, tmp_path, monkeypatch):
    """Two graphs for each scale, the first layer's and that of all others, and the decoder's; in
    two batches, of which the second compiles nothing."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def compiled(module, **flags):
        assert flags == {"dynamic": False}
        compile_module(module, backend=count, fullgraph=True, **flags)

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    monkeypatch.setattr("support.devices.check_compiler", lambda device: None)
    torch._dynamo.reset()
    plain, _ = draw(judged, tmp_path / "a.png", "--per-class 2 --batch 10")
    with dynamo_config.patch(recompile_limit=8):
        compiled, _ = draw(judged, tmp_path / "b.png", "--per-class 2 --batch 10 --compile")
        assert dynamo_config.recompile_limit == 8 * 3   # or the last scales of many are not
    assert len(graphs) == 3 + 1   # one layer
    assert np.array_equal(plain, compiled)


def test_without_onednn_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    pack(model)
    assert type(model[0]) is torch.nn.Linear


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is without oneDNN")
def test_packed_products_are_the_same(run):
    tokens_NL = run.generate([0, 1, 0], 0)
    likelihoods = run.log_likelihood(tokens_NL, [0, 1, 0])
    packed_run = replace(run, model=copy.deepcopy(run.model))
    pack(packed_run.model)
    packed = [m for m in packed_run.model.modules() if isinstance(m, PackedLinear)]
    plain = [module for module in run.model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(packed) == len(plain) > 5
    assert any(module.bias is None for module in packed)   # queries, keys and values
    assert torch.equal(packed_run.generate([0, 1, 0], 0), tokens_NL)
    likelihood_N = packed_run.log_likelihood(tokens_NL, [0, 1, 0])
    assert torch.allclose(likelihood_N, likelihoods, atol=1e-3)


def test_images_of_a_class_are_guided_beside_one_of_none(run):
    strong = replace(run, sampling=replace(run.sampling, cfg=9.0, smooth=0.0))
    alone, other = strong.generate([3, 3], 0)[0], strong.generate([3, 10], 0)[0]
    assert torch.equal(alone, other)
    assert not torch.equal(alone, replace(strong, sampling=replace(strong.sampling, cfg=0.0)).generate([3, 3], 0)[0])


def test_a_model_without_a_null_class_says_so_once(run, capsys):
    """Where the null class is used: by guidance, or where no class is named."""
    sample.say_once.cache_clear()
    model = copy.copy(run.model)
    model.config = replace(model.config, label_dropout=0.0)
    own = replace(run, model=model, sampling=replace(run.sampling, cfg=0.0))
    own.generate([1, 2], 0)
    assert "null class" not in capsys.readouterr().out
    own.generate([10], 0)
    assert "never saw the null class" in capsys.readouterr().out
    replace(own, sampling=run.sampling).generate([1, 2], 0)
    run.generate([10], 0)
    assert "null class" not in capsys.readouterr().out
    sample.say_once.cache_clear()
    replace(own, sampling=run.sampling).generate([1, 2], 0)
    assert "never saw the null class" in capsys.readouterr().out


@pytest.mark.parametrize("name, cfg, dtype, images", [
    ("tiny", 1.0, torch.float32, 100), ("imagenet256", 4.0, torch.bfloat16, 44),
    ("imagenet256", 4.0, torch.float32, 22), ("imagenet256", 0.0, torch.float16, 89),
    ("d36", 4.0, torch.float32, 1)])
def test_so_many_images_at_a_time_as_have_a_small_cache(run, name, cfg, dtype, images):
    """Of the published d16 with guidance, one image's takes 89 MB in half precision."""
    shape = PRESETS["tiny" if name == "tiny" else "imagenet256"].var_shape(1000)
    if name == "d36":
        shape.update(depth=36, width=2304, scales=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
    model = SimpleNamespace(config=VARConfig(**shape))
    own = replace(run, model=model, machine=Machine(torch.device("cpu"), dtype),
                  sampling=replace(run.sampling, cfg=cfg))
    assert own.batch == images
    assert replace(own, sampling=replace(own.sampling, batch=7)).batch == 7


def test_images_are_drawn_and_judged_so_many_at_a_time(run, monkeypatch):
    whole = run.log_likelihood(run.generate([0, 1, 2], 0), [0, 1, 2])
    sizes = []

    def noted(count, size, what):
        sizes.append(size)
        return batches(count, size)

    monkeypatch.setattr(sample, "batches", noted)
    in_parts = replace(run, sampling=replace(run.sampling, batch=2))
    assert in_parts.generate([0, 1, 2], 0).shape == (3, run.model.config.length)
    part_N = in_parts.log_likelihood(run.generate([0, 1, 2], 0), [0, 1, 2])
    torch.testing.assert_close(part_N, whole)
    assert sizes == [2, 100, 2]


# Files and mistakes


def test_a_run_is_whole_without_its_data(judged, tmp_path):
    """And a picture lies beside the transformer it is of."""
    for name in ("tokenizer.pt", "var.pt", "held_out.pt"):
        shutil.copy(judged / name, tmp_path / name)
    ran("sample.py", "codes", "data:1", "--run", "elsewhere", "--var", tmp_path / "var.pt",
        "--tokenizer", judged / "tokenizer.pt")
    (tmp_path / "codes.png").unlink()
    (tmp_path / "codes.png").mkdir()
    assert "is no file; --out names another place" in refused(
        "sample.py", "codes", "data:1", "--var", tmp_path / "var.pt", "--tokenizer",
        judged / "tokenizer.pt")
    (tmp_path / "codes.png").rmdir()
    ran("sample.py", "--run", tmp_path, "--classes", "star", "--per-class", 1)
    (tmp_path / "held_out.pt").unlink()
    ran("sample.py", "--run", tmp_path, "--classes", "star", "--per-class", 1)
    assert "has no held_out.pt" in refused("sample.py", "codes", "data:1", "--run", tmp_path)
    (tmp_path / "held_out.pt").write_bytes(b"PK and nothing else")
    assert "held_out.pt cannot be read" in refused("sample.py", "codes", "data:1", "--run", tmp_path)


def test_what_does_not_belong_together_is_refused(judged, tmp_path):
    content = torch.load(judged / "tokenizer.pt", weights_only=True)
    content["model"]["quantizer.codebook_VC"] += 1
    torch.save(content, tmp_path / "tokenizer.pt")
    assert "trained on the tokens of another tokenizer" in refused(
        "sample.py", "--run", judged, "--tokenizer", tmp_path / "tokenizer.pt")
    assert "is a checkpoint of a tokenizer, not of a transformer" in refused(
        "sample.py", "--run", judged, "--var", judged / "tokenizer.pt")


def test_mistakes(judged, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for command, told in {
        "inpaint": "required: IMAGE",
        f"--out {tmp_path}/var.pt": "must be named .png",
        f"--out {tmp_path}/a.safetensors": "must be named .png",
        f"--out {tmp_path}/a.jpg": "must be named .png",
        f"progress --gif {tmp_path}/a.png": "must be named .gif",
        "--cell-size 0": "--cell-size: 0 must be",
        "edit data:3": "edit needs --class",
        "inpaint data:3 --box 0 0 1.5 1": "--box: 1.5 must be from 0 to 1",
        "inpaint data:3 --box 0 0 nan 1": "nan must be from 0 to 1",
        "inpaint data:3 --box 0.5 0 0.5 1": "0.5 1.0 holds no pixel: Y0 X0 are",
        "outpaint data:3 --box 0 1 1 0": "1.0 0.0 holds no pixel",
        "inpaint data:3 --box 0 0 1 1": "leaves 16 x 16 pixels without anything that is known",
        "--classes star,heart": "there is no class star,heart; there are circle, ring, square, triangle, star, "
                                "cross, heart, crescent, arrow, bar, and names stand with spaces between them",
        "--per-class 1001": "must be a whole number, from 1 to 1000",
        "inpaint data:3 --mask m.png --box 0 0 1 .5": "not allowed with argument --mask",
        "inpaint data:3 --box .375 .375 .5 .5": "of no cell of the last map, 4 x 4 pixels, it has more",
        "inpaint data:3 --box .25 .25 .375 .5": "of no cell of the last map",   # just half of one
        f"export 9 {tmp_path}/a.npz --rejection .5": "it takes --smooth 0",
        f"inpaint data:3 --mask {tmp_path}/missing.png": "cannot be read",
        "upscale data:3 --small 20": "--small 20 must be less than the side of the images, 16",
        "upscale data:3 --small 16": "--small 16 must be less than the side of the images, 16",
        "upscale data:3 --small 0": "--small: 0 must be",
        "upscale data:3 --paste": "unrecognized arguments: --paste",
        "codes data:1000": "the held-out images are data:0 to data:",
        f"codes {tmp_path}/missing.png": "cannot be read",
        f"codes {tmp_path}/empty": "holds no image that can be read",
        "codes data:0 --cfg 3": "unrecognized arguments: --cfg 3",
        "attention data:3 --cell 4 0": "within the last map",
        "--classes star --class heart moon": "there is no class moon",
        "--seed 100000000000000000000": "must be a whole number, from 0",
        f"--out {tmp_path}": "is there and is no file",
        "--out /dev/null": "is there and is no file",
        "--top-p 1 .8 .6": "--top-p takes one number, or two",
        "--image data:3": "unrecognized arguments: --image data:3",
        "paint data:3": "invalid choice: 'paint'",
        "export many a.npz": "count: many must be a whole number",
        "export 0 a.npz": "0 must be a whole number",
        f"export 3 {tmp_path}/file/a.npz --var missing.pt": "file/a.npz cannot be written",
        "inpaint data:4 --seeds 0 1 0": "--seeds: one is named twice",
        "evaluate 8 --seeds 1 1": "--seeds: one is named twice",
        "inpaint --seeds 0 1 data:4": "data:4 must be a whole number, from 0 to 2147483647; "
                                      "images are named before",
        "codes data:4 --top-p .5 data:4": "unrecognized arguments: --top-p",
        "inpaint --top-p .5 data:4": "images are named before such flags",
        "--top-p .5 0": "argument --top-p: 0 must be",
        "export 3 a.png": "a.png must be named .npz, which it is written as",
        "--per-class 2 codes data:4": "the command comes first: python sample.py codes, then",
        "--batch-size 3": "there is --batch",
        "codes data:" + 5000 * "9": "999…: the held-out images are data:0 to data:",
        f"export 9 {tmp_path}/a.npz --reference {tmp_path}/../{tmp_path.name}/a.npz":
            "a.npz is the name of two outputs",
        "--published d16": "--published names both models",
        "evaluate 7": "count: 7 must be",
    }.items():
        assert told in refused("sample.py", *command.split(), "--run", judged), command
    # Where there are no images nothing is told of them.
    assert refused("sample.py", "--run", judged, "--top-p", 0).endswith("from 1e-06 to 1")
    for flag in ("--tokenizer", "--var"):
        assert "--published names both" in refused("sample.py", "--published", "d16", flag, "a.pth")
    assert "IMAGE: a name is missing" in refused("sample.py", "codes", "", "--run", judged)
    for flag in ("--out", "--run", "--var"):
        assert f"{flag}: a name is missing" in refused("sample.py", flag, "")
    assert f"var.pt is a file; the run is its folder, {judged}" in refused("sample.py", "--run", judged / "var.pt")
    tokenizer = ["--tokenizer", judged / "tokenizer.pt", "--run", tmp_path]   # nothing there is to be gone on with
    assert f"no transformer at {tmp_path / 'var.pt'} yet: python train.py" in refused("sample.py", *tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_a_transformer_comes_with_the_tokenizer_beside_it(judged, tmp_path):
    ran("sample.py", "--var", judged / "var.pt", "--run", tmp_path, "--out", tmp_path / "a.png")
    shutil.copy(judged / "var.pt", tmp_path)
    ran("sample.py", "--var", tmp_path / "var.pt", "--run", judged, "--out", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    run = load_run(judged, CPU, var=tmp_path / "var.pt")   # and with the images held out there
    assert run.held_out is None and not run.model.training and not run.tokenizer.training


def test_a_run_that_cannot_be_written_to_is_told_before_anything_is_drawn(judged, monkeypatch):
    def denied(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    monkeypatch.setattr(sample, "load_run", None)
    for flags in (["--run", judged], ["--var", judged / "var.pt"]):
        told = refused("sample.py", "codes", "data:3", *flags)
        assert f"{judged / 'codes.png'} cannot be written: Read-only file system" in told


def test_white_is_what_it_was_in_training(judged, tmp_path):
    images = tmp_path / "images"
    for name in ("one", "two"):
        (images / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((16, 16), 4095, np.uint16)).save(images / name / f"{i}.png")
    path = images / "one" / "0.png"
    data = load_data(str(images), 16, 3, tmp_path, tmp_path, 0, 0, True, 4095)
    assert data.white == 4095 and data.held_out.tensors[0].min() == 255
    shutil.copytree(judged, tmp_path / "run")
    content = torch.load(judged / "var.pt", weights_only=True)
    for white, seen in ((None, 4095 / 65535), (4095, 1.0)):
        torch.save({**content, "white": white}, tmp_path / "run" / "var.pt")
        run = load_run(tmp_path / "run", choose_machine("cpu"))
        given = sample.load_images(run, [str(path)])
        assert given.images.mean().item() == pytest.approx(2 * seen - 1, abs=0.01)
    content = torch.load(judged / "tokenizer.pt", weights_only=True)
    torch.save({**content, "white": 4095}, tmp_path / "run" / "tokenizer.pt")
    assert load_run(tmp_path / "run", choose_machine("cpu"), alone=True).white == 4095
    stage = tokenizer_stage(tmp_path)
    stage.data.white = 4095
    stage.save(finished=True)
    train.keep_copy(stage.ema, stage.path, tmp_path / "copy.pt", stage.data)
    for saved in (stage.path, tmp_path / "copy.pt"):
        assert torch.load(saved, weights_only=True)["white"] == 4095


def test_every_command_has_a_help_of_its_own():
    for command in COMMANDS:
        said = ran("sample.py", command, "--help")
        assert ("--cfg" in said) == (command in GENERATING.split())
        assert ("--box" in said) == (command in HOLES.split())
    assert all(command in ran("sample.py", "--help") for command in COMMANDS)


def test_of_many_particles_the_one_whose_known_part_is_likely_is_kept(judged, monkeypatch):
    """By log p of the known tokens alone, summed over the scales; each image among its own."""
    run = load_run(judged, choose_machine("cpu"))
    quantizer = run.tokenizer.quantizer
    where_11SS = torch.zeros(1, 1, 4, 4)
    where_11SS[..., :2] = 1   # the left half
    known = Known(torch.zeros(1, quantizer.codebook_VC.shape[1], 4, 4), where_11SS, 3,
                  known_from=0.5)
    places = [known.mask(quantizer, k)[0].tolist() for k in range(3)]
    assert places == [[True], [True, False] * 2, [True, True, False, False] * 4]
    nats_NL = -torch.rand(6, 21)
    nats_NL[0, -1] = nats_NL[4, -1] = -100.0   # where nothing is known: no matter
    monkeypatch.setattr(type(run), "log_likelihoods", lambda self, tokens, labels: nats_NL)
    tokens_NL = torch.arange(6)[:, None].expand(6, 21)
    weights_N = nats_NL[:, sum(places, [])].sum(dim=1)
    best = [weights_N[:3].argmax().item(), 3 + weights_N[3:].argmax().item()]
    assert sample.most_likely(run, tokens_NL, [0] * 6, known, 3)[:, 0].tolist() == best


def test_particles_complete_images(judged, tmp_path):
    flags = ["inpaint", "data:1", "data:2", "--box", 0, 0.5, 1, 1, "--seeds", 0, "--run", judged]
    for particles in (0, 3):
        ran("sample.py", *flags, "--particles", particles, "--out", tmp_path / f"{particles}.png")
    none, three = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in (0, 3))
    assert none.shape == three.shape and not np.array_equal(none, three)


@pytest.mark.parametrize("box, outside, free", [
    ((0, 0, 0.1875, 0.8125), True, 0.5),
    ((0.25, 0.25, 0.75, 0.75), True, 0.5),
    ((0.25, 0.25, 0.75, 0.75), False, 0.25),   # the hole surrounds what is known
    ((0.25, 0.25, 0.75, 1.0), False, 0.5),
    ((0, 0.5, 1, 1), True, 0.5),
])
def test_in_a_hole_all_around_a_quarter_makes_a_coarse_cell_known(
    run, given, monkeypatch, box, outside, free
):
    found = []

    def generate(self, labels, seed, known_of):
        known = known_of(slice(0, 1))
        found.append(known.known_from)
        assert torch.equal(known.where_B1SS[0, 0], known_HW.view(4, 4, 4, 4).mean(dim=(1, 3)))
        return torch.zeros(len(labels), 21, dtype=torch.int64)

    monkeypatch.setattr(Run, "generate", generate)
    known_HW = known_pixels(box, 16, outside)
    for particles in (0, 2):
        sample.complete(run, given, known_HW, 10, [0], particles=particles)
    assert found == [0, free]


def test_a_part_too_small_for_coarse_maps_is_noted(judged, tmp_path):
    flags = "outpaint data:1 --seeds 0 --particles 2".split()
    for box, noted in (("0.25 0.25 0.75 0.75", False), ("0.375 0.375 0.625 0.625", True),
                       ("0.375 0.375 0.625 0.625 --paste", False),
                       ("0.375 0.375 0.625 0.625 --particles 0", False),
                       ("0 0 0.25 0.25", True), ("0 0 1 0.5", False), ("0 0 0.5 0.5", False)):
        said = ran("sample.py", *flags, "--box", *box.split(), "--run", judged,
                   "--out", tmp_path / "a.png")
        assert ("may drift; --paste" in said) == noted


def test_flags_of_completing(judged, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "complete", lambda run, given, known_HW, *how: asked.append(
        (known_HW is not None, *how)) or [Row("", list(to_bytes(given.images)))])
    flags = ["--run", judged, "--out", tmp_path / "a.png"]
    ran("sample.py", "inpaint", "data:1", "--class", "star", "--seeds", 4, 5, "--open-loop",
        "--particles", 3, "--judge", *flags)
    ran("sample.py", "outpaint", "data:1", "--paste", "--particles", 0, *flags)
    ran("sample.py", "upscale", "data:1", "--small", 4, *flags)
    assert asked == [(True, 4, [4, 5], None, True, False, 3, True),
                     (True, 10, (0, 1, 2), None, False, True, 0, False),
                     (False, 10, (0, 1, 2), 4, False, False, 0, False)]


def test_flags_of_drawing(judged, tmp_path, monkeypatch):
    """All that says what is drawn, and how, comes to where it is drawn."""
    asked = []
    rows = [Row("", [np.zeros((8, 8, 1), np.uint8)])]
    for name in ("draw_samples", "draw_progress", "draw_many", "explore"):
        monkeypatch.setattr(sample, name, lambda run, *how, name=name: asked.append(
            (name, run.sampling, *how)) or rows)
    monkeypatch.setattr(sample, "save_npz", lambda *_: None)
    monkeypatch.setattr(sample, "pack", lambda model: asked.append("packed"))
    monkeypatch.setattr(VAR, "cast_layers", lambda model, dtype: asked.append(dtype))
    flags = ["--run", judged, "--seed", 5, "--cfg", 2, "--top-k", 7, "--top-p", 0.9, "--growth", 3,
             "--batch", 6]
    smooth = "--smooth", 0.5
    some = ["--classes", "star", "--per-class", 2, "--out", tmp_path / "a.png"]
    ran("sample.py", *some, *flags, *smooth)
    ran("sample.py", "progress", *some, *flags, *smooth)
    ran("sample.py", "export", 9, tmp_path / "a.npz", *flags, *smooth)
    ran("sample.py", "export", 9, tmp_path / "a.npz", "--rejection", 0.5, *flags, "--smooth", 0)
    ran("sample.py", "explore", *flags, "--precision", "bf16")
    bare = sample.Sampling(2.0, 7, 0.9, 3.0, 0.0, 6)
    way = replace(bare, smooth=0.5)
    assert asked == [
        "packed", ("draw_samples", way, ["star"], 2, 5),
        "packed", ("draw_progress", way, ["star"], 2, 5), "packed", ("draw_many", way, 9, 5, 1.0),
        "packed", ("draw_many", bare, 9, 5, 0.5),
        torch.bfloat16, ("explore", bare, judged / "explorer.html", None, 5)]


def test_what_is_drawn_where_no_flag_says_so(tmp_path):
    """Where images are completed, and in the explorer, tokens are what is drawn, without smoothing."""
    assert sample.DEFAULTS == sample.Sampling(0.6, 900, (1.0, 0.4), 3.5, 1.0)
    assert sample.UNSMOOTHED == sample.Sampling(1.0, 900, (1.0, 0.1), 2.0, 0.0)
    defaults, unsmoothed = asdict(sample.DEFAULTS), asdict(sample.UNSMOOTHED)
    for words, way in (("grid", defaults), ("progress", defaults), ("evaluate 8", defaults),
                       (f"export 9 {tmp_path / 'a.npz'}", defaults), ("explore", unsmoothed),
                       ("inpaint a.png", unsmoothed), ("outpaint a.png", unsmoothed),
                       ("edit a.png --class b", unsmoothed),
                       ("upscale a.png", {**unsmoothed, "top_p": (1.0, 0.6)})):
        options = vars(parse(defaults, words.split(), asdict(sample.PUBLISHED), unsmoothed))
        assert {name: options[name] for name in way} == way
    grid, inpaint, upscale = (parse(defaults, words) for words in (
        ["grid"], ["inpaint", "a.png"], ["upscale", "a.png"]))
    widest = parse(defaults, "grid --cell-size 2048 --top-k 0 --growth 0.1 --cfg 0 --smooth 0".split())
    assert (widest.cell_size, widest.top_k, widest.growth, widest.cfg, widest.smooth) == (2048, 0, 0.1, 0, 0)
    assert widest.run == Path("out/shapes")
    assert (grid.per_class, grid.seed, grid.top_p) == (8, 0, sample.DEFAULTS.top_p)
    assert (inpaint.box, inpaint.top_p) == ((0.25, 0.25, 0.75, 0.75), sample.DEFAULTS.top_p)
    assert upscale.top_p == (1.0, 0.6)
    assert parse(defaults, ["export", "9", str(tmp_path / "a.npz")]).rejection == 1


def test_holes_are_completed_by_particles_unless_a_published_model_takes_long():
    theirs = ["--tokenizer", "vae.pth", "--var", "var.pth"]
    for flags, particles in (([], 32), (["--var", "var.pt"], 32), (["--published", "d16"], 0),
                             (theirs, 0), (["--particles", "5"], 5)):
        assert parse({}, ["inpaint", "a.png", *flags]).particles == particles
    assert parse({}, ["upscale", "a.png"]).particles == 0
    with pytest.raises(UserError, match="from 0 to 65536"):
        parse({}, ["inpaint", "a.png", "--particles", str(2**63)])


def test_published_models_are_drawn_from_as_theirs_are():
    """Unless flags say otherwise; and what differs by model is in the help."""
    ways = asdict(sample.DEFAULTS), asdict(sample.PUBLISHED)
    own = {name: each.default for name, each in signature(VAR.generate).parameters.items()}
    for name, value in dict(cfg=1.5, top_k=900, top_p=0.96, growth=1.0).items():
        assert own[name] == ways[1][name] == value
    said = " ".join(ran("sample.py", "grid", "--help").split())
    for told in ("is none (default: 0.6, and 1.5 for published models)", "no limit (default: 900)",
                 "last scale (default: 1.0 0.4, and 0.96 for published models)",
                 "published figures (default: 1.0, and 0.0 for published models)"):
        assert told in said
    assert "scale (default: 1.0 0.6)" in " ".join(ran("sample.py", "upscale", "--help").split())
    said = " ".join(ran("sample.py", "inpaint", "--help").split())   # without smoothing, others
    assert "last scale (default: 1.0 0.1, and 0.96 for published models)" in said
    theirs = ["--tokenizer", "vae.pth", "--var", "var.pth"]
    for flags, way in ([], 0), (["--var", "var.pt"], 0), (["--published", "d16"], 1), (theirs, 1):
        options = vars(parse(ways[0], ["grid", *flags], ways[1]))
        assert {name: options[name] for name in ways[way]} == ways[way]
    options = parse(ways[0], ["grid", "--published", "d16", "--cfg", "0", "--top-p", "1", "0.5"], ways[1])
    assert (options.cfg, options.top_k, options.top_p) == (0, 900, (1, 0.5))


def test_completions_are_judged(judged, tmp_path, monkeypatch):
    """As images of their own classes, or of the one that is asked for; each seed's for itself."""
    flags = "--box 0 0.5 1 1 --particles 0 --seeds 0 1 --judge".split()
    flags += ["--run", judged, "--out", tmp_path / "a.png"]
    held_out = [f"data:{i}" for i in range(3, 15)]
    said = ran("sample.py", "inpaint", *held_out, *flags)
    row = next(line for line in said.splitlines() if line.startswith("completions"))
    assert row.count("±") == 5 and row.count("%") == 3
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    for wrong in (held_out[:11], held_out[:11] + [tmp_path / "b.png"]):
        with monkeypatch.context() as patch:
            patch.setattr(Run, "generate", None)   # nothing is drawn yet
            assert "--judge needs held-out" in refused("sample.py", "inpaint", *wrong, *flags)

    run = load_run(judged, choose_machine("cpu"))
    given = load_images(run, held_out)
    same = given.images[:1].expand_as(given.images)
    seen = []
    monkeypatch.setattr(holes, "say_qualities", lambda sets: seen.append(sets["completions"]))
    monkeypatch.setattr(evaluation, "features_and_classes", lambda classifier, images: (
        images.flatten(1)[:, :5].double().numpy(), torch.full((len(images),), 3)))
    for asked, share in ((len(run.classes), given.labels.count(3) / 12), (3, 1.0), (4, 0.0)):
        judge = holes.judge_of(run, given)
        holes.judge_completions(judge, given.labels, asked, [given.images, same])
        itself, other = seen.pop()
        assert itself.recognised == other.recognised == share
        assert itself.recall == 1 > other.recall and itself.detail == pytest.approx(1)


@pytest.mark.parametrize("label, particles, tried", [
    (None, 4, [0, 1, 2, 0]),   # no class is told: all in turn
    (None, 3, [0, 1, 2]),
    (None, 2, [3, 3]),         # too few for that: the null class
    (1, 4, [1] * 4),
    (None, 0, [3]),
])
def test_particles_try_the_classes_in_turn_where_none_is_told(
    judged, monkeypatch, label, particles, tried
):
    run = load_run(judged, choose_machine("cpu"))
    run.classes = run.classes[:3]
    label = 3 if label is None else label
    seen, known = [], []

    def generate(self, labels, seed, known_of):
        seen.append(labels)
        known.append(known_of(slice(0, len(labels))))
        return torch.zeros(len(labels), 21, dtype=torch.int64)

    def weigh(self, tokens_NL, labels):
        seen.append(labels)
        return torch.zeros(tokens_NL.shape)

    judged_as = []
    monkeypatch.setattr(Run, "generate", generate)
    monkeypatch.setattr(Run, "log_likelihoods", weigh)
    monkeypatch.setattr(sample, "judge_of", lambda run, given: "judge")
    monkeypatch.setattr(sample, "judge_completions", lambda *how: judged_as.append(how[:3]))
    known_HW = torch.ones(run.tokenizer.config.image_side, run.tokenizer.config.image_side)
    known_HW[:, :4] = 0
    given = load_images(run, ["data:1", "data:2"])
    sample.complete(run, given, known_HW, label, [0], open_loop=True, particles=particles,
                    judge=True)
    assert judged_as == [("judge", given.labels, label)]
    assert seen == [tried * 2] * (2 if particles else 1)
    latents, tokens = run.encode(sample.fill_holes(given.images, known_HW))
    assert not torch.equal(*tokens)
    for row in range(2 * len(tried)):   # the particles of an image stand together
        image = row // len(tried)
        assert torch.equal(known[0].latent_BCSS[row], latents[image])
        assert torch.equal(known[0].own_tokens_BL[row], tokens[image])


def test_the_cell_is_marked_in_red_on_grey_images_too(run, given, monkeypatch):
    tokens = run.encode(given.images[:1])[1]
    monkeypatch.setattr(Run, "encode", lambda run, images: (None, tokens))
    (row,) = draw_attention(run, given.images[:1, :1], 3, (0, 3))
    assert row.images[0].shape == (16, 16, 3) and row.images[0][0, 12].tolist() == [255, 0, 0]


def test_attention_is_drawn_in_the_model_s_precision(run, given):
    seen = []
    half = replace(run, machine=Machine(torch.device("cpu"), torch.bfloat16))
    note = lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    with run.model.blocks[0].attention.register_forward_pre_hook(note):
        draw_attention(half, given.images, 3, None)
    assert seen == [True]


def test_where_there_is_no_border_none_shows():
    assert holes.seam(torch.rand(1, 3, 8, 8), torch.ones(8, 8)) == 0


def test_small_images_are_means(run):
    """Of all pixels: here each four by four are 0 together, though not in their middle."""
    block = torch.full((4, 4), -0.25)
    block[1:3, 1:3] = 0.75
    large, _ = sample.from_small(block.repeat(4, 4).expand(1, 3, 16, 16), 4, run.tokenizer.config)
    torch.testing.assert_close(large, torch.zeros_like(large))


def test_the_largest_image_decides_how_much_a_grid_enlarges():
    maps = [np.zeros((side, side, 1), np.uint8) for side in (1, 2, 48)]
    assert grid([Row("", maps)]).height == 3 * 48 + GAP


def test_images_made_smaller_are_means():
    board = np.indices((8, 8)).sum(axis=0)[..., None].astype(np.uint8) % 2 * 255
    shown = np.asarray(grid([Row("", [board])], 4))[2:6, -6:-2]
    assert set(shown.ravel()) <= {127, 128}


def test_a_film_that_would_be_too_high_is_refused(tmp_path):
    black = np.zeros((8, 8, 1), np.uint8)
    with pytest.raises(sample.UserError, match=r"film of \d+ x 700\d\d .* has at most 65535 a side"):
        save_film(tmp_path / "a.gif", [Row("", [black], ["1x1"])] * 700, 1, 96)


def test_so_many_at_a_time_are_one_or_more():
    for wrong in (0, -3):
        assert f"argument --batch: {wrong} must be" in refused("sample.py", f"--batch={wrong}")


def test_evaluate_has_the_filters_that_images_are_drawn_with():
    options = parse({}, ["evaluate", "8", "--top-k", "5", "--top-p", "1", "0.5"])
    assert (options.top_k, options.top_p) == (5, (1, 0.5))


def test_whatever_is_not_named_pt_is_a_published_model():
    ways = asdict(sample.DEFAULTS), asdict(sample.PUBLISHED)
    options = parse(ways[0], ["inpaint", "a.png", "--var", "var.safetensors"], ways[1])
    assert (options.particles, options.cfg) == (0, sample.PUBLISHED.cfg)


def test_a_number_of_an_image_is_written_in_ascii_digits(run):
    for number in ("²", "1²", "٣x"):
        with pytest.raises(sample.UserError, match="the held-out images are data:0 to data:"):
            load_images(run, [f"data:{number}"])


def test_a_tokenizer_that_does_not_say_its_scales_has_the_transformer_s(judged, monkeypatch):
    asked = []
    load = sample.load_tokenizer
    monkeypatch.setattr(sample, "load_tokenizer", lambda *how: asked.append(how) or load(*how))
    run = load_run(judged, CPU)
    assert asked == [(judged / "tokenizer.pt", run.model.config.scales)]


def test_held_out_images_of_other_channels_are_refused(judged, tmp_path):
    images, labels = load_held_out(judged)[0].tensors
    save_checkpoint(tmp_path / "held_out.pt", "set of held-out images", images=images[:, :1], labels=labels)
    config = sample.load_tokenizer(judged / "tokenizer.pt").config
    with pytest.raises(sample.UserError, match="its images are of another size"):
        load_held_out(tmp_path, config)


def test_a_name_with_an_accent_is_not_taken_for_a_number():
    run = SimpleNamespace(classes=["cafe\u0301", "tea"])
    assert asked_classes(run, ["caf\u00e9", "1"], 1) == (["caf\u00e9", "1 tea"], [0, 1])


def test_an_image_is_named_for_its_file_without_the_ending(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    assert [name for source in (tmp_path / "cat.png", tmp_path) for _, name in read_images(source, 8, 3)] == 2 * ["cat"]


@pytest.mark.parametrize("mode, ground", [("L", 0), ("RGBA", (0, 0, 0, 0))])
def test_a_mask_is_cropped_as_images_are(tmp_path, mode, ground):
    mask = Image.new(mode, (80, 40), ground)
    mask.paste("white", (20, 0, 40, 40))   # of the middle 40 columns the first 20
    mask.save(tmp_path / "mask.png")
    known_HW = known_pixels(tmp_path / "mask.png", 8)
    assert not known_HW[:, :4].any() and known_HW[:, 4:].all()


def test_a_caption_of_two_lines_has_room_for_both():
    """And lies above the image, which is where it was."""
    black = np.zeros((8, 8, 1), np.uint8)
    one, two = (np.asarray(grid([Row("", [black], [text])], 64)) for text in ("a", "a\nb"))
    line = len(two) - len(one)
    assert line > 0 and np.array_equal(two[-68:], one[-68:])
    assert (two[line:-68] < 128).any() and (two[:line] < 128).any()


@pytest.mark.parametrize("flag, value, told", [("--smooth", "1.5", "from 0 to 1"), ("--cfg", "-1", "from 0 to 100"),
                                               ("--growth", "0", "from 0.1 to 10")])
def test_ways_to_draw_have_limits(flag, value, told):
    with pytest.raises(UserError, match=f"argument {flag}: {value} must be {told}"):
        parse({}, ["grid", f"{flag}={value}"])


@pytest.mark.parametrize("mode, paint", [("L", 128), ("RGBA", (0, 0, 0, 128))])
def test_what_is_half_painted_is_painted(mode, paint, tmp_path):
    mask = Image.new(mode, (8, 8), 0 if mode == "L" else (0, 0, 0, 0))
    mask.paste(paint, (0, 4, 8, 8))
    mask.save(tmp_path / "mask.png")
    known_HW = known_pixels(tmp_path / "mask.png", 8)
    assert known_HW[:4].min() == 1 and known_HW[4:].max() == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_mask_may_come_through_a_pipe(tmp_path):
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 4, 8, 8))
    mask.save(tmp_path / "mask.png")
    os.mkfifo(tmp_path / "pipe")
    content = (tmp_path / "mask.png").read_bytes()
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[content], daemon=True)
    writer.start()
    assert known_pixels(tmp_path / "pipe", 8)[4:].max() == 0


def test_a_picture_that_does_not_fit_in_memory_is_refused():
    rows = [Row("star", 1000 * [np.zeros((8, 8, 3), np.uint8)])] * 1000
    with pytest.raises(UserError, match="--cell-size take .* GB of memory"):
        grid(rows, cell=2048)


def test_particles_are_weighed_however_unlikely_all_of_them_are(judged, monkeypatch):
    """An image of the default run has some 270 nats: e to the minus that is 0 in fp32."""
    run = load_run(judged, choose_machine("cpu"))
    known = Known(torch.zeros(1, run.tokenizer.config.code_channels, 4, 4),
                  torch.ones(1, 1, 4, 4), 3, known_from=0.5)
    nats_NL = torch.tensor([-30.0, -20.0, -25.0])[:, None].expand(3, 21)
    monkeypatch.setattr(type(run), "log_likelihoods", lambda self, tokens, labels: nats_NL)
    tokens_NL = torch.arange(3)[:, None].expand(3, 21)
    assert sample.most_likely(run, tokens_NL, [0] * 3, known, 3)[:, 0].tolist() == [1]


def test_evaluate_draws_by_all_the_seeds_it_is_told(judged, monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "evaluate", lambda run, count, seeds: asked.append((count, seeds)))
    monkeypatch.setattr(sample, "say_evaluation", lambda found, count, seeds, sampling: asked.append((count, seeds)))
    ran("sample.py", "evaluate", 40, "--seeds", 3, 5, "--run", judged)
    assert asked == [(40, [3, 5])] * 2


def test_a_name_of_which_one_letter_is_lacking_has_its_number():
    assert legible("Star 星", 3) == "3 Star 星"


def test_one_image_at_a_time_where_its_cache_is_over_4_gb(run):
    shape = PRESETS["imagenet256"].var_shape(1000)
    shape.update(depth=36, width=2304, scales=(1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64))
    own = replace(run, model=SimpleNamespace(config=VARConfig(**shape)),
                  machine=Machine(torch.device("cpu")), sampling=replace(run.sampling, cfg=4.0))
    assert own.batch == 1
