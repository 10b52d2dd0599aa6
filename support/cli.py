"""How a program starts and ends: flags, mistakes told in one sentence, signals. Boilerplate."""
from __future__ import annotations

import contextlib
import io
import math
import os
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

# A closed terminal sends SIGHUP, which Windows does not have.
ENDING = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


class UserError(Exception):
    """A mistake of the user's, told in one sentence; the program ends with exit code 2."""


class Stopped(Exception):
    """The user asked for it, and everything is saved; the program ends with exit code 130."""


def run_program(main: Callable[[], None]) -> None:
    """Run a program: mistakes end it with one sentence and code 2, Ctrl-C, SIGTERM and a closed
    terminal with 130."""
    with contextlib.suppress(ValueError):   # only the main thread may
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:   # as nohup has it
                signal.signal(number, signal.default_int_handler)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:   # as after 2>&-
            setattr(sys, name, open(os.devnull, "w", errors="replace"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")   # a terminal may lack the letters of a class
    sys.stderr = Unbroken(sys.stderr)
    try:
        main()
    except (UserError, OSError) as error:   # a folder where a file should be, say
        named = getattr(error, "filename", None)
        print(f"error: {f'{named}: {error.strerror}' if named else error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        print(f"error: not enough memory ({in_short(error) or type(error).__name__}); "
              f"--grad-accumulation and --checkpoint-activations make train.py need less; for "
              f"sample.py name fewer or smaller images, or --batch", file=sys.stderr)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt) as stopped:
        with contextlib.suppress(OSError):   # the terminal is gone
            print(str(stopped) or "stopped", flush=True)
        sys.exit(130)


class Unbroken:
    """A stream for progress and mistakes. What cannot be written, as to a full disk or where nobody
    reads any more, is left out: no reason to end a training."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


def lacks_memory(error: Exception) -> bool:
    """Python, NumPy, PyTorch on a CPU and on a GPU, CUDA and its libraries each have their own
    words for it."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    words = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, kinds) or any(some in str(error) for some in words)


def in_short(text: Any, most: int = 200) -> str:
    """The beginning of what an error says: one line of at most so many letters."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[:most - 1] + "…"


class Interrupt:
    """The first Ctrl-C, SIGTERM or SIGHUP sets `asked`, so that a training can save; a second one
    ends any wait with KeyboardInterrupt.

    A process manager and torchrun may both send one at once: within a second they are one. A signal
    that the shell has the program ignore, as SIGINT in the background, stays ignored.
    """

    def __enter__(self) -> Interrupt:
        self.asked_at = math.inf
        self.before = {}
        for number in (signal.SIGINT, *ENDING):
            if signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.ask)
        return self

    @property
    def asked(self) -> bool:
        return self.asked_at < math.inf

    def ask(self, *_) -> None:
        now = time.monotonic()
        if now > self.asked_at + 1:
            raise KeyboardInterrupt
        self.asked_at = min(self.asked_at, now)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


SAME = {"epochs": "steps", "iterations": "steps", "rate": "lr", "resolution": "size"}


class Parser(ArgumentParser):
    """Tells mistakes as everything else here does, and beside an unknown flag those like it."""

    def error(self, message: str):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flags = [flag for action in self._actions for flag in action.option_strings]
            name = unknown.split(" ")[0].split("=")[0]
            words = {SAME.get(word, word) for word in name.strip("-").split("-")}
            like = [flag for flag in flags if words & {*flag.strip("-").split("-")}]
            like = ", ".join(like or get_close_matches(name, flags))
            if name.isdecimal():
                message += "; a list is written with commas, as 1,2,4"
            elif like:
                message += f"; there is {like}"
        raise UserError(in_short(message, 400))


def add_device_flags(parser: ArgumentParser, compile: bool = True) -> None:
    """The flags of which `devices.choose_machine` makes a Machine. compile: with --compile."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device,
                        help="cpu, cuda, cuda:1, mps, ... (default: %(default)s)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                        help="auto: bf16 or else fp16 on a GPU that is built for it, else fp32 "
                             "(default: %(default)s)")
    if compile:
        parser.add_argument(
            "--compile", action="store_true",
            help="compile the models with torch.compile, which takes minutes at first (default: "
                 "do not)")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """The type of a flag that is an int or a float from `low` to `high`."""
    def checked(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            limits = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            whole = "a whole number, " if kind is int else ""
            raise ArgumentTypeError(f"{in_short(text, 40) or repr(text)} must be {whole}{limits}")
        return value
    return checked


def place(text: str) -> Path:
    """The type of a flag that names a file or a folder: "" would be the current one."""
    if not text:
        raise ArgumentTypeError("a name is missing")
    return Path(text)


def output_as(ending: str) -> Callable[[str], Path]:
    """The type of a flag that names a file to write in the format of that ending: its place is
    tried before anything is done."""
    def checked(text: str) -> Path:
        path = place(text)
        if path.exists() and not path.is_file():
            raise ArgumentTypeError(f"{text} is there and is no file")
        if path.suffix.lower() != ending:
            raise ArgumentTypeError(f"{text} must be named {ending}, which it is written as")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise ArgumentTypeError(f"{text} cannot be written: {error.strerror}")
        return path
    return checked


def several(read: Callable) -> Callable:
    """The type of a flag that is a list with commas, as 1,2,4."""
    def read_all(text: str) -> tuple:
        if len(text.split()) > 1 and "," not in text:
            raise ArgumentTypeError(f"write {','.join(text.split())}, with commas")
        return tuple(read(entry) for entry in text.split(","))
    return read_all


COUNT = number(int, 1)
SEED = number(int, 0, 2**31 - 1)
SHARE = number(float, 1e-6, 1)   # over 0, at most 1
PART = number(float, 0, 1)
GUIDANCE = number(float, 0, 100)
GROWTH = number(float, 0.1, 10)
