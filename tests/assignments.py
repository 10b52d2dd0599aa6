"""Assignments: cut out of the source, and graded by its tests.

    python tests/assignments.py                     the list
    python tests/assignments.py handout 3           the text a student gets
    python tests/assignments.py cut 3 FOLDER        the repository without those bodies
    python tests/assignments.py grade 3 FOLDER      points, test by test

Stubs kept beside a source go stale. Here nothing is kept but names (handouts.py): an assignment
names the functions to write, and those that would show how they go. Their text is found when a
command runs, so all four commands follow the source wherever it goes.

Grading takes nothing from the student's folder but the assigned bodies, puts them into a copy of
this repository, and runs the graded tests there (nursery.py). Before that it reads them: a body is
refused that reaches for more than its assignment needs (`Reader`).
"""
from __future__ import annotations

import argparse
import ast
import csv
import io
import json
import marshal
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import types
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import decode_source
from pathlib import Path

import compiled
from answers import ANSWERS, experiment
from functions import (
    ROOT, Function, body_lines, by_file, find, first_line, is_kernel, lines_of, parsed, path_of,
    text_of, tree_of, with_body, without_body,
)
from handouts import ASSIGNMENTS, Assignment
from rules import Reader, scope_of, symbols_of

TAKEN = ["*.py", "*.md", "LICENSE", "requirements.txt", ".pytest.ini", ".gitignore", ".github/**/*",
         "support/*.py", "support/*.html", "papers/*", "tests/**/*.py", "tests/*.md",
         "tests/golden/*"]
LECTURERS = {"answers.py", "assignments.py", "functions.py", "handouts.py", "mutations.py",
             "nursery.py", "rules.py", "test_assignments.py"}
RUN = ("var.pt", "tokenizer.pt", "held_out.pt", "log.jsonl")   # what is read of it
SECONDS = 120           # a graded test may take
SHORTER = 20            # after one that took longer: what hangs mostly hangs in all
RULE = re.compile("# -{20,}")     # begins a section of a file


class Mistake(Exception):
    """Of who runs the command: told in one sentence."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command")
    for name, what in (("handout", "print the text a student gets"),
                       ("cut", "make a student's folder"),
                       ("grade", "grade folders, or the folders in a folder"),
                       ("answers", "run the open question's experiment, and say what of it")):
        command = commands.add_parser(name, help=what)
        command.add_argument("number", type=int, choices=ASSIGNMENTS, metavar="NUMBER")
        if name == "cut":
            command.add_argument("folder", type=Path, metavar="FOLDER")
        if name in ("cut", "answers"):
            command.add_argument("--run", type=Path, metavar="RUN",
                                 help="a trained run, for the experiments: it is copied")
        if name == "grade":
            command.add_argument("folders", type=Path, metavar="FOLDER", nargs="+")
            command.add_argument("--json", type=Path, metavar="FILE",
                                 help="for the points, as Gradescope reads them")
            command.add_argument("--csv", type=Path, metavar="FILE", help="for a line a folder")
            command.add_argument("--jobs", type=int, default=1, metavar="N",
                                 help="how many folders at a time (default: 1)")
    options = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):   # names of folders may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    if options.command is None:
        print(overview())
        return
    assignment = ASSIGNMENTS[options.number]
    try:
        if options.command == "handout":
            print(handout(assignment))
        elif options.command == "cut":
            cut(assignment, options.folder, options.run)
            print(f"wrote {options.folder}: begin with HANDOUT.md")
        elif options.command == "answers":
            with tempfile.TemporaryDirectory() as place:
                repository(Path(place), options.run)
                print(experiment(assignment, Path(place)), ANSWERS[options.number], sep="\n\n")
        else:
            for path in filter(None, (options.json, options.csv)):
                if not path.absolute().parent.is_dir():
                    raise Mistake(f"{path} cannot be written: there is no such folder")
                if path.is_dir():
                    raise Mistake(f"{path} cannot be written: it is a folder")
                if not os.access(path.resolve().parent, os.W_OK):
                    raise Mistake(f"{path} cannot be written: nothing can, in its folder")
            results = grade_all(assignment, options.folders, max(1, options.jobs))
            if options.json:
                scores = {name: gradescope(result) for name, result in results.items()}
                content = scores if len(scores) > 1 else next(iter(scores.values()))
                write_whole(options.json, json.dumps(content, indent=1) + "\n")
            if options.csv:
                file = io.StringIO()
                csv.writer(file).writerows(table(assignment, results))
                write_whole(options.csv, file.getvalue())
            sys.exit(any(result["points"] < result["of"] for result in results.values()))
    except (Mistake, OSError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place, then rename; what is no file, as /dev/stdout, is written to."""
    path = path.resolve()   # a link stays one
    whole = text.encode(errors="backslashreplace")
    if path.exists() and not path.is_file():
        path.write_bytes(whole)
        return
    beside = path.with_name(f"{path.name}.partial")
    try:
        beside.write_bytes(whole)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def overview() -> str:
    lines = ["      points  hours   after", ""]
    for number, assignment in ASSIGNMENTS.items():
        after = ", ".join(map(str, assignment.after)) or "-"
        numbers = f"{number:3}  {assignment.of:6}  {assignment.hours:7} {after:8}"
        lines.append(f"{numbers} {assignment.title}")
        names = ", ".join(assignment.bodies)
        lines += textwrap.wrap(names, 76, initial_indent=" " * 29, subsequent_indent=" " * 29)
    return "\n".join(lines + ["", "Hours are a guess: of a student who knows PyTorch."])


# --------------------------------------------------------------------------------------------------
# What a student gets


def repository(folder: Path, run: Path | None = None) -> None:
    """Copy the source and its tests: no history, no caches, and no run but one that is named."""
    if run and not (run / "var.pt").exists():
        raise Mistake(f"{run} is no trained run: it has no var.pt")
    for pattern in TAKEN:
        for path in ROOT.glob(pattern):
            if path.is_file():
                copy = folder / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    for name in LECTURERS:
        (folder / "tests" / name).unlink(missing_ok=True)
    if run:     # where the programs look for one that is not named
        (folder / "out" / "shapes").mkdir(parents=True)
        for name in RUN:
            if (run / name).exists():
                shutil.copyfile(run / name, folder / "out" / "shapes" / name)


def cut(assignment: Assignment, folder: Path, run: Path | None = None) -> None:
    if folder.exists():
        raise Mistake(f"{folder} exists: name a new folder")
    repository(folder, run)
    left_out = {}
    for file, names in by_file(assignment.give_aways).items():
        module = names[0].split(".")[0]
        source = (ROOT / file).read_text("utf-8")
        left_out[module] = code_of(source, names)
        for name in names:
            source = without_body(source, name, "in compiled.bin")
        restore = f'import compiled  # noqa: E402\ncompiled.restore("{module}", globals())\n'
        before, main, after = source.partition('\n\nif __name__ == "__main__":')
        (folder / file).write_text(f"{before}\n\n{restore}{main}{after}", "utf-8")
    for name in assignment.bodies:
        path = folder / path_of(name)
        stub = without_body(path.read_text("utf-8"), name, f"assignment {assignment.number}")
        path.write_text(stub, "utf-8")
    if left_out:
        content = compiled.PYTHON.encode() + b"\n" + marshal.dumps(left_out)
        (folder / "compiled.bin").write_bytes(content)
        shutil.move(folder / "tests" / "compiled.py", folder / "compiled.py")
    (folder / "HANDOUT.md").write_text(handout(assignment) + "\n", "utf-8")


def code_of(source: str, names: list[str]) -> tuple[dict, dict]:
    """Functions as compiled code; Triton's kernels, which it compiles itself, as packed text."""
    codes = dict(nested(compile(source, "<compiled>", "exec")))
    functions = {}
    kernels = {}
    for name in names:
        inside = name.partition(".")[2]
        if is_kernel(find(source, name)):
            kernels[inside] = zlib.compress(text_of(source, name).encode())
        else:
            functions[inside] = codes[inside]
    return functions, kernels


def nested(code: types.CodeType, outside: str = "") -> Iterator[tuple[str, types.CodeType]]:
    """Functions and classes by dotted name. (`co_qualname` came with Python 3.11.)"""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield outside + constant.co_name, constant
            yield from nested(constant, f"{outside}{constant.co_name}.")


def handout(assignment: Assignment) -> str:
    builds = ", builds on " * bool(assignment.after) + " and ".join(map(str, assignment.after))
    parts = [
        f"# Assignment {assignment.number}: {assignment.title}",
        f"{assignment.of} points, about {assignment.hours} hours{builds}.",
        textwrap.dedent(assignment.text).strip(),
        "## What to write",
        "The bodies of these functions. Signatures stay.",
    ]
    for file, names in by_file(assignment.bodies).items():
        source = (ROOT / file).read_text("utf-8")
        parts.append(f"From `{file}`:")
        parts += dict.fromkeys(fenced(section_of(source, name)) for name in names)
        parts += [fenced(shown(source, name)) for name in names]
    if assignment.quoted:
        parts += ["## What is there already", "\n\n".join(map(quoted, assignment.quoted))]
    parts += ["## What may be used", allowed(assignment)]
    if assignment.give_aways:
        parts += ["## What is compiled", filled(
            f"{in_prose(assignment.give_aways)} would show how yours go. Their text is left out of "
            f"your folder; `compiled.bin` holds them, so that the rest of the program runs (with "
            f"Python {compiled.PYTHON}). They are no part of the assignment.")]
    parts += ["## How it is graded", filled(
        "The assigned bodies are taken out of your folder and put into a copy of the original, so "
        "changes elsewhere do not count. Each of these tests has points, all or none; `pytest "
        "TEST` runs one in your folder:")]
    for test, of in assignment.points.items():
        doc = ast.get_docstring(test_of(test))
        parts.append("\n".join([f"    {of:3}  {test}", *textwrap.wrap(
            doc or "", 80, initial_indent=" " * 9, subsequent_indent=" " * 9)]))
    parts.append(filled(
        f"A test may take {SECONDS} seconds, and {SHORTER} after one that took longer. A body that "
        f"is refused, see above, makes the whole assignment 0 points, and you are told why."))
    parts += ["## The open question", textwrap.dedent(assignment.question).strip()]
    if "out/shapes" in assignment.question:
        parts.append(filled(
            "`out/shapes` is a trained run. If it is not in your folder, `python train.py` makes "
            "it, four to seven minutes on two cores; copy it for the next assignment."))
    return "\n\n".join(parts)


def filled(text: str) -> str:
    return textwrap.fill(text, 88, break_on_hyphens=False, break_long_words=False)


def allowed(assignment: Assignment) -> str:
    said = ("Functions of `torch`, `F` and `math`, methods of tensors, Python's usual built-ins, "
            "and what is shown here; no layers (`nn.SiLU`: take `F.silu`). A helper goes inside "
            "the function that needs it. Refused are `import`, `class`, `global` and `match`; "
            "whatever reaches files, processes or the inside of Python's objects, double "
            "underscores among it; and changing what is not yours, such as an attribute of "
            "another object than `self`; and giving another meaning to a name of the file or of a "
            "built-in: no variable called `max`, or as a function there is.")
    if any(is_kernel(find((ROOT / path_of(x)).read_text("utf-8"), x)) for x in assignment.bodies):
        said += (" In a kernel also what Triton does not compile: comprehensions, inner "
                 "functions, `try`, `with`, f-strings.")
    if forbidden(assignment):
        said += f" Refused in this assignment also: {in_prose(forbidden(assignment))}."
    return filled(said)


def forbidden(assignment: Assignment) -> list[str]:
    """Names that no body may use: those given, and what does the assigned work already."""
    given_away = [name.rpartition(".")[2] for name in assignment.give_aways
                  if not name.startswith("reference.")]     # out of a body's reach anyway
    own = {name.rpartition(".")[2] for name in assignment.bodies}
    return list(dict.fromkeys([*assignment.forbidden, *(x for x in given_away if x not in own)]))


def in_prose(names) -> str:
    *most, last = (f"`{name}`" for name in names)
    return f"{', '.join(most)} and {last}" if most else last


def fenced(text: str) -> str:
    return f"```python\n{textwrap.dedent(text).strip()}\n```"


def section_of(source: str, name: str) -> str:
    """The comment that the function's section of the file begins with, or its class's docstring."""
    lines = lines_of(source)
    first = first_line(find(source, name))
    rules = [i for i, line in enumerate(lines[:first]) if RULE.match(line)]
    begin = rules[-1] + 1 if rules else first
    end = begin
    while lines[end].startswith("#"):
        end += 1
    owner = name.rpartition(".")[0]
    parts = ["\n".join(lines[begin:end]), class_text(source, owner) if "." in owner else ""]
    return "\n\n".join(parts)


def class_text(source: str, name: str) -> str:
    """What a class is: all before its first method, and how one is made."""
    node = next(x for x in tree_of(source).body if getattr(x, "name", None) == name.split(".")[1])
    lines = lines_of(source)
    begin = first_line(node)
    methods = [x for x in node.body if isinstance(x, Function)]
    end = first_line(methods[0]) - 1 if methods else node.end_lineno
    if methods and methods[0].name == "__init__":
        end = methods[0].end_lineno
    return "\n".join(lines[begin - 1:end])


def quoted(name: str) -> str:
    """What a body or a graded test uses: a function without its body, a class, a line."""
    source = (ROOT / path_of(name)).read_text("utf-8")
    if find(source, name):
        text = shown(source, name)
    elif any(getattr(x, "name", None) == name.split(".")[1] for x in tree_of(source).body):
        text = class_text(source, name)
    else:
        text = re.search(rf"(^#.*\n)*^{name.rpartition('.')[2]} .*", source, re.MULTILINE)[0]
    return f"`{name}`:\n\n{fenced(text)}"


def test_of(test: str) -> Function:
    """The function that pytest calls so."""
    file, _, function = test.partition("::")
    return find((ROOT / file).read_text("utf-8"), f"x.{function.partition('[')[0]}")


def shown(source: str, name: str) -> str:
    """A function's signature and docstring, and the comment before it but for the section's."""
    node = find(source, name)
    lines = lines_of(source)
    begin = first_line(node) - 1
    comment: list[str] = []
    for line in reversed(lines[:begin]):
        if line.strip().startswith("#"):
            comment.insert(0, line)
        elif line.strip() or comment:
            break
    if any(RULE.match(line) for line in comment):
        comment = []
    first, _ = body_lines(source, node)
    dots = " " * (node.col_offset + 4) + "..."
    return "\n".join([*comment, *lines[begin:first - 1], dots])


# --------------------------------------------------------------------------------------------------
# Grading


class Nursery:
    """The process that runs tests, each in a process of its own: nursery.py."""

    def __enter__(self) -> Nursery:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
                       "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "",     # GPU or not
                       "PYTHONUTF8": "1"}
        for name in ("PYTEST_ADDOPTS", "HYPOTHESIS_PROFILE", "PYTHONPATH", "PYTHONOPTIMIZE"):
            environment.pop(name, None)
        # Ctrl-C is for this process; a closed stderr would be taken by the first file opened.
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("nursery.py")], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=None if sys.stderr else subprocess.DEVNULL, text=True,
            env=environment, start_new_session=True)
        return self

    def __exit__(self, *_) -> None:
        with suppress(OSError):
            self.process.stdin.close()
        self.process.wait()

    def ask(self, **request):
        """Raises Mistake if there is no answer: the process crashed, or hangs."""
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            if select.select([self.process.stdout], [], [], request.get("seconds", 0) + 60)[0]:
                return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            pass
        self.process.kill()
        self.process.wait()
        raise Mistake("the process that runs tests crashed, or did not answer")

    def run(self, folder: Path, tests: list[str], seconds: float, watch: list[str] = ()) -> dict:
        """{passed, failed: {case: message}, seconds}, in a copy of the folder that goes with it.

        watch: functions that may not change the tensors they are given.
        """
        with tempfile.TemporaryDirectory() as place:
            copy = os.path.realpath(place)
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            return self.ask(folder=copy, tests=tests, seconds=seconds, watch=list(watch))


def grade(assignment: Assignment, folder: Path, nursery: Nursery,
          seconds: float = SECONDS) -> dict:
    """{assignment, points, of, refused: sentences, tests: [{test, points, of, message, seconds}]}

    refused: why there are no points at all.
    """
    if not folder.is_dir():
        raise Mistake(f"{folder} is no folder")
    bodies, refused = solution(assignment, folder, nursery)
    tests = []
    with tempfile.TemporaryDirectory() as place:
        repository(Path(place))
        carry(bodies, Path(place))
        for test, of in assignment.points.items():
            result = dict(passed=False, failed={test: "refused"}, seconds=0.0)
            if not refused:
                result = nursery.run(Path(place), [test], seconds, list(assignment.bodies))
                seconds = min(seconds, SHORTER) if result["seconds"] > seconds else seconds
            message = next(iter(result["failed"].values()), "")
            tests.append(dict(test=test, points=of if result["passed"] else 0, of=of,
                              message=message, seconds=result["seconds"]))
    points = sum(test["points"] for test in tests)
    return dict(assignment=assignment.number, points=points, of=assignment.of, refused=refused,
                tests=tests, bodies=bodies, seconds=round(sum(x["seconds"] for x in tests), 1))


def solution(assignment: Assignment, folder: Path,
             nursery: Nursery) -> tuple[dict[str, str], list[str]]:
    """({name: text} of the assigned functions in a folder, why they are refused)."""
    bodies = {}
    refused = []
    for file, names in by_file(assignment.bodies).items():
        try:
            path = folder / file
            if path.is_symlink() or not path.is_file():
                names = sorted(x.name for x in folder.glob("*"))[:9]
                raise OSError(f"there is no such file, but {in_prose(names) if names else 'none'}")
            if path.stat().st_size > 2**20:
                raise OSError("it has more than a megabyte")
            source = decode_source(path.read_bytes())     # as Python reads it: BOM, too
            tree_of(source)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            refused.append(f"{file} cannot be read: {' '.join(str(error).split())}")
            continue
        ours = (ROOT / file).read_text("utf-8")
        for name in names:
            node = find(source, name)
            if node is None or signature(node) != signature(find(ours, name)):
                refused.append(f"{name} is missing, or has another signature than in the original")
                continue
            text = text_of(source, name)
            indent = find(ours, name).col_offset
            if "\t" in text or node.col_offset != indent:     # written anew, as the file is
                text = textwrap.indent(ast.unparse(node), " " * indent)
            reader = Reader(name, text, ours, names, forbidden(assignment),
                            (*assignment.quoted, *assignment.bodies))
            refused += reader.sentences
            asked = sorted(reader.asked)
            for each, is_allowed in zip(asked, nursery.ask(names=asked)):
                if not is_allowed:
                    each = each.removeprefix("Tensor")
                    refused.append(f"{name} uses {each}, which no solution needs")
            bodies[name] = text
    return bodies, list(dict.fromkeys(refused))


def signature(node: Function) -> str:
    return ast.dump(node.args) + str([ast.dump(decorator) for decorator in node.decorator_list])


def carry(bodies: dict[str, str], folder: Path) -> None:
    """Put bodies into a copy of the repository."""
    for name, text in bodies.items():
        path = folder / path_of(name)
        path.write_text(with_body(path.read_text("utf-8"), name, text), "utf-8")


def grade_all(assignment: Assignment, folders: list[Path], jobs: int) -> dict[str, dict]:
    """{name: result} of all folders, each told as it ends; whatever happens to one of them."""
    for folder in folders:
        if not folder.is_dir():
            raise Mistake(f"{folder} is no folder")
    folders = [inner for folder in folders for inner in students_folders(folder)]
    pairs = list(zip(names_of(folders), map(submission, folders)))

    running: list[Nursery] = []
    stopped = threading.Event()

    def some(pairs: list[tuple[str, Path]]) -> list[tuple[str, dict]]:
        """One process runs the tests of many folders; after a crash the next gets a new one."""
        graded = []
        while len(graded) < len(pairs):
            with Nursery() as nursery:
                running.append(nursery)     # then look: who stops all kills what is here
                for name, folder in pairs[len(graded):]:
                    if stopped.is_set():
                        return graded
                    try:
                        result = grade(assignment, folder, nursery)
                    except Exception as error:      # the others are to be graded all the same
                        if stopped.is_set():
                            return graded
                        why = f"could not be graded: {type(error).__name__}: {error}"
                        result = none(assignment, why)
                    print(f"{name}\n{textwrap.indent(told(result), '    ')}", flush=True)
                    graded.append((name, result))
                    if nursery.process.poll() is not None:
                        break
        return graded

    with ThreadPoolExecutor(jobs) as pool:
        try:
            shares = pool.map(some, (pairs[i::jobs] for i in range(jobs)))
            results = dict(sorted(sum(shares, [])))
        except KeyboardInterrupt:   # nobody waits for what runs
            stopped.set()
            for nursery in running:
                nursery.process.kill()
            raise
    ours = {body: text_of((ROOT / path_of(body)).read_text("utf-8"), body)
            for body in assignment.bodies}
    first: dict[str, str] = {normal(ours): "the original"}
    for name, result in results.items():
        text = normal(result["bodies"]) if result["bodies"] else None
        result["identical"] = first.get(text, "")
        if text and text not in first:
            first[text] = name
    width = max(map(len, results))
    for name, result in results.items():
        said = ["refused"] * bool(result["refused"])
        said += [f"identical to {result['identical']}"] * bool(result["identical"])
        points = f"{result['points']:3} of {result['of']}  {result['seconds']:6.1f} s"
        print(f"{name:{width}}  {points}  {', '.join(said)}".rstrip())
    return results


def students_folders(folder: Path) -> list[Path]:
    """The folder, if it is a student's; those in it, if it is a class's."""
    inner = inner_folders(folder)
    if not inner and any(folder.glob("*.zip")):
        raise Mistake(f"{folder} holds zips: unpack each into a folder of its own")
    if not holds_files(folder):
        return inner or [folder]
    if any(map(holds_files, inner)):
        print(f"note: {folder} is taken for one student's, though folders in it hold files, too")
    return [folder]


def inner_folders(folder: Path) -> list[Path]:
    """Without the repository's own, and what a Mac or an editor leaves: __MACOSX, .idea."""
    return sorted(x for x in folder.iterdir() if x.is_dir() and not x.name.startswith((".", "__"))
                  and x.name not in ("papers", "support", "tests"))


def holds_files(folder: Path) -> bool:
    """Whether files to grade are in the folder itself; others that lie there are nobody's."""
    return any((folder / path.name).is_file() for path in ROOT.glob("*.py"))


def submission(folder: Path) -> Path:
    """Where a student's files are: perhaps in the one folder that is in it, as zips make it."""
    inner = inner_folders(folder)
    return inner[0] if len(inner) == 1 and not holds_files(folder) else folder


def names_of(folders: list[Path]) -> list[str]:
    """The folders' own names, or with what is above where two have the same."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]


def none(assignment: Assignment, why: str) -> dict:
    tests = [dict(test=test, points=0, of=of, message=why, seconds=0.0)
             for test, of in assignment.points.items()]
    return dict(assignment=assignment.number, points=0, of=assignment.of, refused=[why],
                tests=tests, seconds=0.0, bodies={})


def normal(bodies: dict[str, str]) -> str:
    """Bodies without what a copy would change first: layout, comments and the names they bind."""
    parts = []
    for name in sorted(bodies):
        node = parsed(bodies[name])
        own = {x.get_name() for x in symbols_of(scope_of(bodies[name])) if not x.is_global()}
        numbers: dict[str, str] = {}
        for inner in ast.walk(node):
            for field in ("id", "arg", "name"):
                if getattr(inner, field, None) in own:
                    word = getattr(inner, field)
                    setattr(inner, field, numbers.setdefault(word, f"_{len(numbers)}"))
        documented = ast.get_docstring(node) is not None
        parts.append(ast.dump(ast.Module(node.body[documented:], [])))
    return "\n".join(parts)


def table(assignment: Assignment, results: dict[str, dict]) -> list[list]:
    """The lines of the CSV."""
    tests = [test.partition("::")[2] for test in assignment.points]
    lines = [["name", "points", "of", "seconds", "refused", "identical to", *tests]]
    for name, result in results.items():
        points = [test["points"] for test in result["tests"]]
        lines.append([name, result["points"], result["of"], result["seconds"],
                      "; ".join(result["refused"]), result["identical"], *points])
    return lines


def gradescope(result: dict) -> dict:
    """As results.json of an autograder there."""
    tests = [dict(name=test["test"], score=test["points"], max_score=test["of"],
                  status="passed" if test["points"] == test["of"] else "failed",
                  output=test["message"]) for test in result["tests"]]
    output = "\n".join(f"refused: {sentence}" for sentence in result["refused"])
    return dict(score=result["points"], output=output, execution_time=round(result["seconds"]),
                tests=tests)


def told(result: dict) -> str:
    lines = []
    for test in result["tests"]:
        lines.append(f"{test['points']:3} of {test['of']:2}  {test['test']}")
        if test["points"] < test["of"] and not result["refused"]:
            lines.append(textwrap.indent(test["message"][:1000], " " * 12))
    lines += [f"refused: {sentence}" for sentence in result["refused"]]
    return "\n".join([*lines, f"{result['points']} of {result['of']} points"])


if __name__ == "__main__":
    main()
