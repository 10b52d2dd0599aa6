"""What the tests of the whole program share: a tiny run's flags, running a program, being refused
by one, and damaged files."""
from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

import train
from papers import Trained, open_runs, parser_of
from support.checkpoint import load_checkpoint
from support.cli import UserError, run_program
from support.data import SHAPES, data_of, draw_shapes
from support.devices import choose_machine
from support.presets import chosen_preset, training_flags
from tokenizer import Tokenizer, TokenizerConfig
from var import VAR, VARConfig

ROOT = Path(__file__).parent.parent
TINY = [
    "--image-size", "8", "--scales", "1,2,4", "--multipliers", "1,2", "--tokenizer-width", "8",
    "--vocabulary", "32", "--code-channels", "4", "--tokenizer-steps", "12",
    "--tokenizer-batch", "8", "--depth", "1", "--width", "32", "--heads", "2", "--var-steps", "11",
    "--var-batch", "8", "--warmup", "5", "--workers", "1", "--device", "cpu",
    "--precision", "fp32",   # so that every machine computes the same
]
FRESH = settings().max_examples >= 1000   # pytest --hypothesis-profile fresh


def draws(count: int) -> settings:
    """So many examples, the same ones every time; or a thousand fresh ones."""
    return settings(max_examples=1000 if FRESH else count)


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def run(program: str, *arguments) -> Result:
    """Run train.py, sample.py or papers.NAME in this process: starting Python takes longer than
    most of what is tested."""
    module = importlib.import_module(program.removesuffix(".py"))
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [program, *map(str, arguments)])
            try:
                run_program(module.main)
            except SystemExit as end:
                code = end.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def ran(program: str, *arguments) -> str:
    """Run a program that is to succeed; what it prints."""
    result = run(program, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(program: str, *arguments) -> str:
    """The one sentence a mistake is told in."""
    result = run(program, *arguments)
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def rows_of(said: str, cells: int) -> dict[str, list[float]]:
    """Of the tables of numbers in what was printed, the rows that have so many cells; without those
    that say by how much rows differ."""
    rows = {}
    for line in said.splitlines():
        words = line.split()
        if len(words) > cells and "difference" not in words:
            with contextlib.suppress(ValueError):
                rows[" ".join(words[:-cells])] = [float(word) for word in words[-cells:]]
    return rows


def start(*command) -> subprocess.CompletedProcess:
    """A process of its own, where that is the point."""
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=240)


def run_as_two(*arguments) -> Result:
    """train.py in two processes, with what torchrun tells them: one is this process, since each
    takes as long to import PyTorch as a tiny run does."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    told = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
            "WORLD_SIZE": "2"}
    command = [sys.executable, ROOT / "train.py", *arguments]
    other = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL,
                             env=os.environ | told | {"RANK": "1", "LOCAL_RANK": "1"})
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (told | {"RANK": "0", "LOCAL_RANK": "0"}).items():
                patch.setenv(name, value)
            result = run("train.py", *arguments)
        assert other.wait(240) == 0
    finally:
        other.kill()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return result


def with_moved_weights(run):
    """A run whose gates and head are no longer next to zero, as they are after a short training."""
    torch.manual_seed(0)
    for weight in run.model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return run


def copied_run(folder: Path, out: Path) -> Path:
    """A copy, for what is tuned there."""
    return shutil.copytree(folder, out, ignore=lambda _, names: {"papers"} & {*names})


def tuned_in(folder: Path) -> dict[str, dict]:
    """How each model that pages tuned in a run's folder was made, by its name."""
    return {path.parent.name: load_checkpoint(path, "transformer")["made_with"]
            for path in (folder / "papers").glob("*/var.pt")}


def tiny_settings(out: Path, *flags, **values) -> train.Settings:
    """Of a tiny run: with flags of the command line, and values of the preset by name."""
    options = training_flags().parse_args([*TINY, *map(str, flags)])
    machine = choose_machine("cpu", options.precision)
    return train.Settings(
        replace(chosen_preset(options), **values), machine, out,
        checkpoint_every=options.checkpoint_every, grad_accumulation=options.grad_accumulation)


def tokenizer_stage(out: Path, *flags, **values) -> train.TokenizerStage:
    """A tokenizer's training on a few shapes, about to begin."""
    images = [draw_shapes(count, 8, seed) for seed, count in enumerate((20, 10))]
    data = data_of(*images, SHAPES)
    stage = train.TokenizerStage(data, tiny_settings(out, *flags, **values))
    stage.begin()
    return stage


class Killed(BaseException):
    """As if the power failed: nothing is written after it."""


@contextlib.contextmanager
def at_step(steps: int, step: int, act):
    """Inside, `act` is called in that train step of the stage that has so many steps."""
    real = train.learning_rate

    def watched(now: int, of: int, *rest) -> float:
        if (of, now) == (steps, step):
            act()
        return real(now, of, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", watched)
        yield


def kill():
    raise Killed


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs logged and drew the same, and their weights agree, all bit for bit."""
    for name in ("log.jsonl", "samples.png"):
        if (one / name).read_bytes() != (other / name).read_bytes():
            return False
    for name in ("tokenizer.pt", "var.pt"):
        ours, its = (torch.load(path / name, weights_only=True)["model"] for path in (one, other))
        if not all(torch.equal(ours[key], its[key]) for key in its):
            return False
    return True


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Some bytes changed, the end cut off, or two pieces swapped."""
    place = st.integers(0, len(whole) - 1)

    def changed(places: dict[int, int]) -> bytes:
        content = bytearray(whole)
        for i, bits in places.items():
            content[i] ^= bits
        return bytes(content)

    def swapped(places: tuple[int, ...]) -> bytes:
        a, b, c = sorted(places)
        return whole[:a] + whole[b:c] + whole[a:b] + whole[c:]

    return st.one_of(
        st.dictionaries(place, st.integers(1, 255), min_size=1, max_size=20).map(changed),
        place.map(lambda end: whole[:end]),
        st.tuples(place, place, place).map(swapped))


def read_or_refused(read, path: Path, content: bytes):
    """What `read` makes of a file, or None where it refuses it in one sentence that names it."""
    path.write_bytes(content)
    try:
        return read(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None


def opened_run(folder: Path, *flags) -> Trained:
    """As the pages of papers/ open a run."""
    (run,) = open_runs(parser_of("cca", "").parse_args(["--run", str(folder), *map(str, flags)]))
    return run


def of_three_codes() -> tuple[Tokenizer, VAR]:
    """Models of five tokens of three kinds, whose images can all be gone through."""
    torch.manual_seed(2)
    tokenizer = Tokenizer(TokenizerConfig(
        scales=(1, 2), vocabulary=3, code_channels=4, image_channels=1, width=4, multipliers=(1,),
        blocks=1, phis=1, norm_groups=1))
    tokenizer.quantizer.codebook_VC.data.normal_()
    for weight in tokenizer.quantizer.phis.parameters():
        torch.nn.init.normal_(weight)
    plain = VAR(VARConfig(
        scales=(1, 2), vocabulary=3, code_channels=4, classes=2, depth=1, width=16, heads=2,
        shared_adaln=False, normalise_qk=True, label_dropout=0.0, drop_path=0.0, last_scales=None))
    for weight in plain.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return tokenizer, plain
