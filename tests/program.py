"""What the tests of the whole program share: a tiny run's flags, running a script, being
refused by one, and damaged files."""
import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

import sample
import train

ROOT = Path(__file__).parent.parent
TINY = ["--image-size", "8", "--scales", "1,2,4", "--multipliers", "1,2", "--tokenizer-width", "8", "--vocabulary", "32",
        "--code-channels", "4", "--tokenizer-steps", "40", "--tokenizer-batch", "8", "--depth", "1", "--width", "32",
        "--heads", "2", "--var-steps", "30", "--var-batch", "8", "--warmup", "5", "--device", "cpu"]


def run(script: str, *arguments, timeout: int = 240) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True,
                          timeout=timeout)


def refused(script: str, *arguments) -> str:
    """The one sentence a mistake is told in. In this process: starting one takes longer than the mistake."""
    program, said = {"train.py": train, "sample.py": sample}[script], io.StringIO()
    with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        train.run_program(program.main)
    assert end.value.code == 2, said.getvalue()
    last = said.getvalue().strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


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

    return st.one_of(st.dictionaries(place, st.integers(1, 255), min_size=1, max_size=20).map(changed),
                     place.map(lambda end: whole[:end]), st.tuples(place, place, place).map(swapped))


def read_or_refused(read, path: Path, content: bytes):
    """What `read` makes of a file, or None where it refuses it in one sentence that names the file."""
    path.write_bytes(content)
    try:
        return read(path)
    except train.UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None
