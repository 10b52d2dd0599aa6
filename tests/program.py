"""What the tests of the whole program share: a tiny run's flags, running a program, being refused
by one, and damaged files."""
from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st

import sample

ROOT = Path(__file__).parent.parent
TINY = [
    "--image-size", "8", "--scales", "1,2,4", "--multipliers", "1,2", "--tokenizer-width", "8",
    "--vocabulary", "32", "--code-channels", "4", "--tokenizer-steps", "40",
    "--tokenizer-batch", "8", "--depth", "1", "--width", "32", "--heads", "2", "--var-steps", "30",
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
                sample.run_program(module.main)
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
    except sample.UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None
