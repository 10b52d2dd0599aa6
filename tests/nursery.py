"""Runs graded tests in processes of their own, for assignments.py.

A solution is a stranger's code, so the grader does not import it. This process imports what takes
seconds, torch above all, and forks for every test: a child is born with torch loaded, runs one test
on a copy of the repository, and is gone. What it prints decides nothing. A test has passed if its
process ended by itself, and wrote a secret at the end that was made for this one run.

Talks in lines of JSON, over stdin and stdout. Needs fork and limits as Linux has them.
"""
from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import resource
import secrets
import select
import signal
import sys
import tempfile
import time
import types
from collections.abc import Iterator

MEMORY = 16 * 2**30     # bytes of addresses that a test may ask for
WRITTEN = 2**30         # bytes that a file may have
REFUSED = {             # what no solution needs, by the names of Python's audit events
    "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.system",
    "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate", "shutil.rmtree",
    "socket.bind", "socket.connect", "subprocess.Popen", "ctypes.dlopen",
}
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir"}    # fine inside the test's own folder


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")     # children do not get to see it
    os.dup2(2, 1)
    for name in ("torch._dynamo", "torch.testing", "numpy.random", "hypothesis", "pytest",
                 "PIL.ImageFont", "tqdm", "triton.compiler", "triton.language"):
        try:
            importlib.import_module(name)
        except ImportError:     # of Triton, as on a Mac
            pass
    for line in sys.stdin:
        request = json.loads(line)
        if "names" in request:
            answer = [is_allowed(name) for name in request["names"]]
        else:
            answer = run_tests(**request, close=[0, answers.fileno()])
        print(json.dumps(answer), file=answers, flush=True)


# What nursery.py allows in a body, by what it is: functions of numbers, and no more.
TENSORS = set("""
    shape dtype device T mT H mH ndim requires_grad grad split unflatten unique norm
    append extend insert pop items keys values get index sort reverse add join type
    copy clear remove update setdefault start stop step is_cuda training real
    weight bias in_features out_features num_embeddings
""".split())
OF_TORCH = set("""
    split einsum unique meshgrid broadcast_tensors norm no_grad enable_grad autocast finfo iinfo
    inf nan pi device Tensor Size is_tensor broadcast_shapes
""".split())
OF_TRITON = set("constexpr range static_range".split())
NEVER = set("""
    from_file frombuffer apply_ map_ map2_ set_ resize_ resize_as_ data_ptr numpy backward
    untyped_storage storage record_stream inline_asm_elementwise map_elementwise
""".split())


def is_allowed(name: str) -> bool:
    """Whether a body may use torch.sum, math.sin, triton.language.load or Tensor.sum."""
    import torch
    module, _, last = name.rpartition(".")
    if last in NEVER or last.startswith("_"):
        return False
    if module == "Tensor":
        kind = type(getattr(torch.Tensor, last, None)).__name__
        return last in TENSORS or kind == "method_descriptor"
    if module == "torch":
        return (last in OF_TORCH or isinstance(getattr(torch, last, None), torch.dtype)
                or hasattr(torch._C._VariableFunctions, last))
    if module == "triton":
        return last in {"cdiv", "next_power_of_2"}
    if name == "torch.amp.autocast":
        return True
    if module not in {"math", "torch.nn.functional", "torch.linalg", "triton.language",
                      "triton.language.math"}:
        return False
    value = getattr(importlib.import_module(module), last, None)
    if module.startswith("triton.language"):
        kinds = ("JITFunction", "InterpretedFunction", "dtype")
        return (last in OF_TRITON or hasattr(value, "__triton_builtin__")
                or type(value).__name__ in kinds)
    if module == "math":
        return isinstance(value, (float, types.BuiltinFunctionType))
    return (isinstance(value, types.BuiltinFunctionType)
            or getattr(value, "__module__", None) == "torch.nn.functional" and callable(value))


def run_tests(folder: str, tests: list[str], seconds: float, watch: list[str],
              close: list[int]) -> dict:
    """{passed, failed: {case: message}, seconds} of tests in a copy of the repository.

    passed: whether all cases of all these tests did.
    """
    secret = secrets.token_hex(16)
    read, write = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            for descriptor in (*close, read):
                os.close(descriptor)
            report = in_the_child(folder, tests, seconds, watch)
            os.write(write, json.dumps([secret, report]).encode())
        finally:
            os._exit(0)
    os.close(write)
    written = b"".join(until(read, began + seconds))
    late = time.monotonic() > began + seconds
    os.close(read)
    try:
        os.killpg(child, signal.SIGKILL)    # and whatever it started
    except ProcessLookupError:              # it has not come as far as setsid
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    took = round(time.monotonic() - began, 2)
    try:
        told, (passed, failed) = json.loads(written)
        if told == secret:
            return dict(passed=passed, failed=failed, seconds=took)
    except (ValueError, TypeError):     # nothing was written, or not by the harness
        pass
    message = f"took more than {seconds:.0f} s" if late else "ended before the test did"
    return dict(passed=False, failed={test: message for test in tests}, seconds=took)


def until(descriptor: int, deadline: float) -> Iterator[bytes]:
    """What is written, until the other end is closed or time is up."""
    while select.select([descriptor], [], [], max(0, deadline - time.monotonic()))[0]:
        part = os.read(descriptor, 2**16)
        if not part:
            return
        yield part


def in_the_child(folder: str, tests: list[str], seconds: float,
                 watch: list[str]) -> tuple[bool, dict[str, str]]:
    """(whether every case passed, what the others said)."""
    import pytest
    import torch
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.chdir(folder)
    tempfile.tempdir = f"{folder}/tmp"
    os.mkdir(tempfile.tempdir)
    torch.set_num_threads(1)
    sys.path[:0] = [folder, f"{folder}/tests"]
    sys.dont_write_bytecode = True
    limit(seconds)
    sys.addaudithook(guard(folder))
    outcomes = Outcomes(watch)
    flags = ["-m", "", "-p", "no:cacheprovider", "--rootdir", folder, "--tb=short",
             "-p", "no:unraisableexception",   # it collects garbage, which takes as long as a test
             "--basetemp", f"{folder}/tmp/pytest"]
    code = pytest.main([*tests, *flags], plugins=[outcomes])
    passed = code == pytest.ExitCode.OK and not outcomes.failed
    if not passed and not outcomes.failed:
        outcomes.failed[tests[0]] = f"no test ran: pytest ended with {code!r}"
    return passed and outcomes.passed > 0, outcomes.failed


class Outcomes:
    """A plugin of pytest: counts what passed, and keeps what the rest said."""

    def __init__(self, watch: list[str]):
        self.watch = watch
        self.passed = 0
        self.failed = {}

    def pytest_sessionstart(self):
        """To make a failing example smaller takes minutes, and points do not need it."""
        from hypothesis import Phase, settings
        settings.register_profile("graded", settings(), phases=[Phase.explicit, Phase.generate])
        settings.load_profile("graded")

    def pytest_collection_finish(self):
        for name in self.watch:
            *owners, last = name.split(".")
            if owners[0] not in sys.modules:    # no graded test needs it
                continue
            owner = sys.modules[owners[0]]
            for part in owners[1:]:
                owner = getattr(owner, part)
            if isinstance(vars(owner)[last], types.FunctionType):
                setattr(owner, last, watched(vars(owner)[last], last))
            elif len(owners) == 1:      # a kernel, whose launch says what it reads and writes
                owner.launch = watched(owner.launch, last)

    def pytest_runtest_setup(self, item):
        """All cases of a test have to pass: once one failed, the others need not run."""
        import pytest
        test = item.nodeid.partition("[")[0]
        if any(case.partition("[")[0] == test for case in self.failed):
            pytest.skip("another case failed")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.passed += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed[report.nodeid] = (crash.message if crash else str(report.longrepr))[:2000]

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed[report.nodeid] = str(report.longrepr)[-2000:]


CARING = {"start_from", "update_hits", "revive", "slots"}     # what these are methods of, they change
TO_FILL = ("kv_slots", "written", "cache", "latents")         # arguments that are to be written to


def watched(function, what: str):
    """The function, which fails if it changes what it is given, unless to write there."""
    import torch
    parameters = inspect.signature(function)

    @functools.wraps(function)
    def call(*given, **named):
        arguments = dict(parameters.bind(*given, **named).arguments)
        for name in (*TO_FILL, *["self"] * (what in CARING)):
            arguments.pop(name, None)
        before = held([*arguments.values()])
        copies = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in before]
        result = function(*given, **named)
        after = held([*arguments.values()])
        if len(after) != len(before) or not all(map(alike, after, before, copies)):
            raise AssertionError(f"{what} changes what it is given")
        return result

    return call


def held(x) -> list:
    """The tensors and numbers in it: of a module its weights and its settings."""
    import torch
    if isinstance(x, torch.Tensor):
        return [x] * (x.device.type != "meta")
    if isinstance(x, (list, tuple)):
        return sum(map(held, x), [])
    if isinstance(x, torch.nn.Module):
        settings = [value for each in x.modules() for value in vars(each).values()
                    if isinstance(value, (int, tuple)) or isinstance(value, list) and all(
                        isinstance(number, int) for number in value)]
        return [*x.parameters(), *x.buffers(), *held(settings)]
    if type(x).__module__ in ("kernels", "tokenizer", "var", "sample"):
        return held([*vars(x).values()])
    return [x] if isinstance(x, (int, float, str)) else []


def alike(x, before, copy) -> bool:
    """Whether it is what it was; a kernel leaves no trace in x._version."""
    import torch
    if not isinstance(x, torch.Tensor):
        return x == copy
    return (x is before and x.dtype == copy.dtype and x.shape == copy.shape
            and torch.equal(x.detach().nan_to_num(), copy.nan_to_num()))


def limit(seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def guard(folder: str):
    """A second line of defence: should a solution reach the operating system, it is refused there.

    Python asks an audit hook before it does any such thing, and a hook cannot be taken off.
    """
    def inside(path) -> bool:
        path = os.path.realpath(os.fsdecode(path))
        return path.startswith((folder + os.sep, "/dev/"))

    def hook(event: str, arguments: tuple) -> None:
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        refused = event in REFUSED
        if event == "open" and not isinstance(arguments[0], int):
            refused = arguments[2] & writes and not inside(arguments[0])
        if event in CHANGES:
            refused = not inside(arguments[0])
        if refused:
            raise PermissionError(f"{event} {arguments[:1]} is not for solutions")

    return hook


if __name__ == "__main__":
    main()
