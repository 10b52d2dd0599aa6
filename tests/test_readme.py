"""Every command in the README runs, at tiny size."""
from __future__ import annotations

import re
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
from PIL import Image
from program import ROOT, TINY, ran

from sample import DEFAULTS
from support.commands import parse
from support.data import PUBLISHED
from support.devices import forward_flops
from support.presets import PRESETS, chosen_preset, training_flags
from tests import needs
from tokenizer import Tokenizer, TokenizerConfig

README = (ROOT / "README.md").read_text()
PYTHON = r"^    (?:\S*python )((?:train|sample)\.py.*|-m tests\.benchmark .*)"
COMMANDS = []
for line in re.findall(PYTHON, README, re.MULTILINE):
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
    for name in ("cat.png", "small.png", "photos/one.png", "painted_is_generated.png"):
        Image.fromarray(white).save(folder / name)
    return folder


def test_the_readme_has_commands():
    assert len(DRAWN) > 10 and len(TRAINED) > 5


@pytest.mark.parametrize("command", DRAWN)
def test_commands_that_draw(shapes, monkeypatch, command):
    monkeypatch.chdir(shapes)
    dozen = " ".join(f"data:{i}" for i in range(12))   # for the shell to expand
    program, *flags = shlex.split(command.replace("data:{0..59}", dozen))
    if "--published" in flags or any(flag.endswith(".pth") for flag in flags):   # see test_parity
        parse(asdict(DEFAULTS), flags)
        return
    smaller = {"50000": "20", "1000": "40", "16": "4"}   # as many samples; a small image's side
    said = ran(program, *(smaller.get(flag, flag) for flag in flags))
    assert "wrote" in said or "evaluate" in flags


@pytest.mark.parametrize("command", TRAINED)
def test_commands_that_train(folder, tmp_path, monkeypatch, command):
    """On a folder instead of data that would have to be downloaded."""
    monkeypatch.chdir(tmp_path)
    program, *flags = shlex.split(command)
    options = training_flags("").parse_args(flags)
    chosen_preset(options)   # the sizes that the command names
    if options.tokenizer:   # a published one, of other sizes
        return
    known = {*PUBLISHED, "FOLDER", "IMAGENET", "/usr/share/openclipart/png"}
    flags = [str(folder) if flag in known else flag for flag in flags]
    if "--data" not in flags:
        flags += ["--data", str(folder)]
    tiny = [*TINY, "--tokenizer-steps", 2, "--var-steps", 2]
    if "--resume" in flags:
        ran(program, *(flag for flag in flags if flag != "--resume"), *tiny)
    ran(program, *flags, *tiny, "--preset", "tiny")
    assert list(tmp_path.glob("out/*/log.jsonl"))


def test_the_picture_of_tiles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = [command for command in COMMANDS if "--tiles" in command]
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    benchmark.main()
    grid = benchmark.tile_grid(680)
    skipped, cut, whole = torch.bincount(grid.flatten(), minlength=3).tolist()
    assert Image.open("tiles.png").width > 300 and 0 < cut < whole and skipped > 0


def test_what_a_preset_needs(monkeypatch, capsys):
    """Of the tokenizer with all losses, and of the transformer by our kernels."""
    plain_preset = PRESETS["tiny"]
    both = replace(plain_preset, perceptual_weight=0.1, adversarial_weight=0.1)
    plain, whole = (needs.of_tokenizer(preset, 10) for preset in (plain_preset, both))
    model = Tokenizer(TokenizerConfig(**plain_preset.tokenizer_shape(3)))
    forward = forward_flops(model, torch.zeros(1, 3, 32, 32))
    assert plain.weights == sum(weight.numel() for weight in model.parameters())
    assert 2.8 * forward < plain.flops < 3 * forward   # the image itself needs no gradient
    assert 1.02 * plain.flops < whole.flops < 2 * plain.flops
    assert plain.weights < whole.weights and plain.bytes_kept < whole.bytes_kept
    layer = 32 * 32 * plain_preset.tokenizer_width * 2   # bytes of one at full resolution
    assert 10 * layer < plain.bytes_kept < 100 * layer

    monkeypatch.setattr(sys, "argv", "needs.py tiny --rate 0.001 --memory 1".split())
    needs.main()
    *_, head, tokenizer, transformer, disk = capsys.readouterr().out.splitlines()
    assert disk.startswith("disk: 3.9 GB") and "hours an epoch" in head
    name, weights, gflop, hours, on_8, *_ = transformer.split()
    assert name == "transformer"
    assert float(hours) == pytest.approx(1_281_167 * float(gflop) / 3600, rel=0.02)
    assert float(on_8) == pytest.approx(float(hours) / 8, rel=0.01)
