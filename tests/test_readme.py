"""Every command in the README runs, at tiny size."""
from __future__ import annotations

import functools
import re
import shlex
import shutil
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
from PIL import Image
from program import ROOT, TINY, ran, refused

import sample
import train
from sample import DEFAULTS
from support.cli import UserError
from support.commands import parse
from support.data import PUBLISHED
from support.devices import forward_flops
from support.presets import PRESETS, chosen_preset, training_flags
from tests import needs
from tokenizer import Tokenizer, TokenizerConfig
from var import VAR, VARConfig

README = "".join((ROOT / name).read_text() for name in ("README.md", "tests/README.md"))
PYTHON = r"^    (?:\S*python )((?:train|sample)\.py.*|-m tests\.benchmark .*)"
COMMANDS = []
for line in re.findall(PYTHON, README, re.MULTILINE):
    command = line.split("   #")[0].strip()
    if command not in COMMANDS:
        COMMANDS.append(command)
DRAWN = [command for command in COMMANDS if command.startswith("sample.py")]
TRAINED = [command for command in COMMANDS if command.startswith("train.py")]


@pytest.fixture(scope="module")
def shapes(judged, tmp_path_factory) -> Path:
    """A run on the built-in data, and images of one's own beside it."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(judged, folder / "out" / "shapes")
    (folder / "out" / "seed6").symlink_to("shapes")
    (folder / "photos").mkdir()
    white = np.zeros((8, 8), np.uint8)
    white[2:4] = 255
    for name in ("cat.png", "photo.png", "photos/one.png", "painted_is_generated.png"):
        Image.fromarray(white).save(folder / name)
    return folder


def test_the_readme_has_commands():
    assert len(DRAWN) > 10 and len(TRAINED) > 5


@pytest.mark.parametrize("command", DRAWN)
def test_commands_that_draw(shapes, monkeypatch, command):
    monkeypatch.chdir(shapes)
    dozen = " ".join(f"data:{i}" for i in range(12))   # for the shell to expand
    program, *flags = shlex.split(command.replace("data:{0..59}", dozen))
    published = "--published" in flags or any(flag.endswith(".pth") for flag in flags)
    if published or "out/png" in flags:   # see test_parity; of other data
        parse(asdict(DEFAULTS), flags)
        return
    smaller = {"50000": "20", "1000": "40", "16": "4"}   # as many samples; a small image's side
    said = ran(program, *(smaller.get(flag, flag) for flag in flags))
    assert "wrote" in said or "evaluate" in flags


def test_changing_the_model(folder, tmp_path, monkeypatch):
    """The example trains, draws and is no VAR to sample.py."""
    (example,) = re.findall(r"(?:^    .*\n)+", README[README.index("## Change the model"):].split(
        "`python mine.py`")[0], re.MULTILINE)
    example = textwrap.dedent(example)
    own = type("MyTokenizer", (Tokenizer,), {})

    def mine(*flags):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["mine.py", *map(str, flags)])
            for module in (sample, train):   # of what the example replaces: put back at the end
                patch.setattr(module, "VAR", VAR)
                patch.setattr(module, "Tokenizer", own)
            exec(example, {})

    mine("--data", folder, "--out", tmp_path, *TINY, "--tokenizer-steps", 2, "--var-steps", 2)
    mine("draw", "--run", tmp_path, "--per-class", 1)
    assert torch.load(tmp_path / "var.pt", weights_only=True)["class"] == "Mine"
    assert (tmp_path / "grid.png").exists()
    assert "the program that defines Mine opens it" in refused("sample.py", "--run", tmp_path)


@pytest.fixture(scope="module")
def trained() -> set[str]:
    """Commands that were tried, as they are for tiny runs on a folder."""
    return set()


@pytest.mark.parametrize("command", TRAINED)
def test_commands_that_train(folder, trained, tmp_path, monkeypatch, command):
    """On a folder instead of data that would have to be downloaded."""
    monkeypatch.chdir(tmp_path)
    program, *flags = shlex.split(command)
    options = training_flags().parse_args(flags)
    chosen_preset(options)   # the sizes that the command names
    if options.tokenizer:   # a published one, of other sizes
        return
    known = {*PUBLISHED, "FOLDER", "IMAGENET", "/usr/share/openclipart/png"}
    flags = [str(folder) if flag in known else flag for flag in flags]
    if "--data" not in flags:
        flags += ["--data", str(folder)]
    flags += [*TINY, "--tokenizer-steps", "2", "--var-steps", "2", "--preset", "tiny"]
    tiny = str(training_flags().parse_args(flags))
    if tiny in trained:
        return
    trained.add(tiny)
    if "--resume" in flags:
        ran(program, *(flag for flag in flags if flag != "--resume"))
    ran(program, *flags)
    assert list(tmp_path.glob("out/*/log.jsonl"))


def test_the_picture_of_tiles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = [command for command in COMMANDS if "--tiles" in command]
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    benchmark.main()
    grid = benchmark.tile_grid(680)
    skipped, cut, whole = torch.bincount(grid.flatten(), minlength=3).tolist()
    assert Image.open("tiles.png").width > 300 and 0 < cut < whole and skipped > 0
    for flag in ("--tiles", "--plot"):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", flag, "tiles.txt"])
        with pytest.raises(UserError, match="tiles.txt must be named .png"):
            benchmark.main()
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--tiles", "new/tiles.png"])
    benchmark.main()
    assert Path("new/tiles.png").exists()


def test_what_a_preset_needs(monkeypatch, capsys):
    """Of the tokenizer with all losses, and of the transformer by our kernels."""
    for count in ("of_tokenizer", "of_transformer"):   # each counts the same thing once
        monkeypatch.setattr(needs, count, functools.cache(getattr(needs, count)))
    plain_preset = replace(
        PRESETS["tiny"], image_size=16, multipliers=(1, 2), scales=(1, 8), depth=2,
        smaller_weight=0.0)
    both = replace(plain_preset, perceptual_weight=0.1, adversarial_weight=0.1)
    plain, whole = (needs.of_tokenizer(preset, 1000) for preset in (plain_preset, both))
    model = Tokenizer(TokenizerConfig(**plain_preset.tokenizer_shape(3)))
    forward = forward_flops(model, torch.zeros(1, 3, 16, 16))
    assert plain.weights == sum(weight.numel() for weight in model.parameters())
    assert 2.8 * forward < plain.flops < 3 * forward   # the image itself needs no gradient
    assert 1.02 * plain.flops < whole.flops < 2 * plain.flops
    assert plain.weights < whole.weights and plain.bytes_kept < whole.bytes_kept
    layer = 16 * 16 * plain_preset.tokenizer_width * 2   # bytes of one at full resolution
    assert 10 * layer < plain.bytes_kept < 100 * layer

    monkeypatch.setattr(needs, "PRESETS", {"tiny": plain_preset})
    monkeypatch.setattr(sys, "argv", ["needs.py", "--cards"])
    needs.main()
    printed = capsys.readouterr().out
    steps = plain_preset.tokenizer_steps * plain_preset.tokenizer_batch
    hours = steps * plain.flops / (0.4 * 65e12) / 3600
    assert re.search(rf"Tesla T4 +65 +16 +{hours:.2f} \+ [\d.]+; 1\n", printed)
    assert printed.count("; 1\n") == 5
    stages = [(2, 8, needs.Needs(10**8, 10**12, 10**9)), (1, 4, needs.Needs(10**8, 10**12, 10**8))]
    assert needs.hours_on("A100", *stages[0]) == pytest.approx(16e12 / (0.4 * 312e12) / 3600)
    # 2.2 GB of weights, and 1.25 GB an image: 1.875 by PyTorch's functions.
    counts = [needs.micro_batches_on(card, stages) for card in ("RTX 4090", "RTX 3060", "Tesla T4")]
    assert counts == [1, 2, 2]
    stages[0] = (2, 8, needs.Needs(10**8, 10**12, 10**10))
    assert needs.micro_batches_on("RTX 3060", stages) is None

    monkeypatch.setattr(sys, "argv", "needs.py tiny --rate 0".split())
    with pytest.raises(UserError, match="--rate: 0 must be"):
        needs.main()
    monkeypatch.setattr(sys, "argv", "needs.py tiny --rate 0.001 --memory 1".split())
    needs.main()
    *_, head, tokenizer, transformer, disk = capsys.readouterr().out.splitlines()
    assert disk.startswith("disk: 1.0 GB") and "hours an epoch" in head
    name, weights, gflop, hours, on_8, *_ = transformer.split()
    assert name == "transformer"
    assert float(hours) == pytest.approx(1_281_167 * float(gflop) / 3600, rel=0.02)
    assert float(on_8) == pytest.approx(float(hours) / 8, rel=0.01)


def test_what_a_transformer_needs():
    """Of few tokens what is kept of an image is little beside the weights; and it is of our kernels."""
    preset = replace(PRESETS["tiny"], scales=(1, 2), depth=2)
    found = needs.of_transformer(preset, 10)
    model = VAR(VARConfig(**preset.var_shape(10)))
    assert found.weights == sum(weight.numel() for weight in model.parameters())
    image = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4, preset.code_channels)
    assert found.flops == 3 * forward_flops(model, *image)
    row = 5 * preset.width * 2   # bytes of what a layer is given, in bf16
    assert 2 * 10 * row < found.bytes_kept < 2 * 40 * row < found.weights
    keep = needs.Keep()
    x = torch.zeros(3)
    assert keep(x) is keep(x) and keep.bytes() == x.nbytes


def test_the_columns_of_needs(monkeypatch, capsys):
    monkeypatch.setattr(needs, "of_tokenizer", lambda *_: needs.Needs(10**8, 2 * 10**12, 10**9))
    monkeypatch.setattr(needs, "of_transformer", lambda *_: needs.Needs(2 * 10**8, 10**12, 2 * 10**9))
    monkeypatch.setattr(sys, "argv", "needs.py tiny --rate 100 --memory 10".split())
    needs.main()
    _, _, tokenizer, transformer, disk = capsys.readouterr().out.splitlines()
    # 22 bytes a weight; 1.25 times what is kept; and of 10 GB the rest holds so many images
    assert tokenizer.split() == ["tokenizer", "100.0M", "2e+03", "7.12", "0.89", "2.2", "1.25", "6"]
    assert transformer.split() == ["transformer", "200.0M", "1e+03", "3.56", "0.44", "4.4", "2.50", "2"]
    assert disk == "disk: 3.9 GB of images, decoded, and 0.3 GB of tokens"   # 103 of two bytes
    stages = needs.both_stages(PRESETS["tiny"], 10)
    assert [stage[:2] for stage in stages] == [(1200, 8), (2700, 16)]
    monkeypatch.setattr(sys, "argv", "needs.py tiny".split())
    needs.main()
    assert "400 TFLOP/s and 80 GB a card" in capsys.readouterr().out


def test_micro_batches_divide_both_batches_and_leave_a_tenth_of_the_memory():
    small, large = needs.Needs(0, 1, 10**8), needs.Needs(0, 1, 10**9)
    # 1.25 GB an image: 10.8 of the 12 GB of a card hold eight, and of 9 images no half
    assert needs.micro_batches_on("RTX 3060", [(1, 9, large), (1, 9, small)]) == 3
    assert needs.micro_batches_on("RTX 3060", [(1, 8, large), (1, 8, small)]) == 1
