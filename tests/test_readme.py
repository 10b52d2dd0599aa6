"""Every command in the README runs, at tiny size."""
from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import benchmark
import sample
import train
from program import ROOT, TINY, ran

README = (ROOT / "README.md").read_text()
COMMANDS = []
for line in re.findall(r"^    (?:\S*python )((?:train|sample|kernels)\.py.*)", README, re.MULTILINE):
    command = line.split("   #")[0].strip()
    if command not in COMMANDS:
        COMMANDS.append(command)
DRAWN = [command for command in COMMANDS if command.startswith("sample.py")]
TRAINED = [command for command in COMMANDS if command.startswith("train.py")]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """A run on the built-in data, and images of one's own beside it."""
    folder = tmp_path_factory.mktemp("readme")
    ran("train.py", "--out", folder / "out" / "shapes", *TINY, "--tokenizer-steps", 3,
        "--var-steps", 3)
    (folder / "photos").mkdir()
    white = np.zeros((8, 8), np.uint8)
    white[2:4] = 255
    for name in ("cat.png", "small.png", "photos/one.png", "white_is_generated.png"):
        Image.fromarray(white).save(folder / name)
    return folder


def test_the_readme_has_commands():
    assert len(DRAWN) > 10 and len(TRAINED) > 5


@pytest.mark.parametrize("command", DRAWN)
def test_commands_that_draw(shapes, monkeypatch, command):
    monkeypatch.chdir(shapes)
    program, *flags = shlex.split(command)
    if any(flag.endswith(".pth") for flag in flags):   # tests/test_parity.py runs these
        sample.parse(flags)
        return
    smaller = {"50000": "20", "16": "4"}   # as many samples; the side of a small image
    flags = [smaller.get(flag, flag) for flag in flags]
    said = ran(program, *flags)
    assert "wrote" in said


@pytest.mark.parametrize("command", TRAINED)
def test_commands_that_train(folder, tmp_path, monkeypatch, command):
    """On a folder instead of data that would have to be downloaded."""
    monkeypatch.chdir(tmp_path)
    program, *flags = shlex.split(command)
    options = train.parse(flags)
    if options.preset == "tiny":
        train.settle_preset(options)   # the sizes that the command names
    else:
        assert train.PRESETS[options.preset]
    known = {*train.PUBLISHED, "FOLDER", "IMAGENET"}
    flags = [str(folder) if flag in known else flag for flag in flags]
    if "--resume" in flags:
        ran(program, *flags[:-1], *TINY, "--tokenizer-steps", 2, "--var-steps", 2)
    if options.stage == "var" and not options.tokenizer:
        ran(program, "--stage", "tokenizer", *TINY, "--tokenizer-steps", 2)
    if options.tokenizer:   # a published one, of other sizes
        return
    ran(program, *flags, *TINY, "--tokenizer-steps", 2, "--var-steps", 2, "--preset", "tiny")
    assert list(Path("out").glob("*/log.jsonl"))


def test_the_picture_of_tiles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = [command for command in COMMANDS if "--tiles" in command]
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    benchmark.main()
    grid = benchmark.tile_grid(680)
    skipped, cut, whole = torch.bincount(grid.flatten(), minlength=3).tolist()
    assert Image.open("tiles.png").width > 300 and 0 < cut < whole and skipped > 0
