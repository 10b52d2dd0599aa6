"""What an assignment leaves out of the source, given back: the rest of the program needs it.

compiled.bin, beside this file, holds the functions that would show how the assigned ones go. It is
no part of the assignment: neither read it nor change it.
"""
import inspect
import linecache
import marshal
import sys
import zlib
from pathlib import Path

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def restore(module: str, names: dict) -> None:
    """Called at the end of a module. names: all that the module defines."""
    made_by, content = Path(__file__).with_suffix(".bin").read_bytes().split(b"\n", 1)
    if made_by.decode() != PYTHON:
        sys.exit(f"error: this folder was cut for Python {made_by.decode()}, and this is {PYTHON}")
    functions, kernels = marshal.loads(content)[module]
    for name, code in functions.items():
        *owners, last = name.split(".")
        scope = names
        for owner in owners:
            scope = vars(scope[owner])
        inspect.unwrap(scope[last]).__code__ = code
    for name, packed in kernels.items():   # Triton compiles a kernel's text, not its code
        text = zlib.decompress(packed).decode()
        file = f"<compiled {name}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        exec(compile(text, file, "exec"), names)
