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
import builtins
import csv
import json
import marshal
import os
import re
import select
import shutil
import subprocess
import symtable
import sys
import tempfile
import textwrap
import types
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import compiled
from handouts import ASSIGNMENTS, Assignment

ROOT = Path(__file__).parent.parent
TAKEN = ["*.py", "*.md", "LICENSE", "requirements.txt", ".pytest.ini", ".gitignore", ".github/**/*",
         "support/*.py", "support/*.html", "papers/**/*.py", "tests/**/*.py", "tests/golden/*"]
LECTURERS = {"assignments.py", "handouts.py", "nursery.py", "mutations.py", "test_assignments.py"}
SECONDS = 120           # a graded test may take
RULE = re.compile("# -{20,}")     # begins a section of a file
Function = ast.FunctionDef


class Mistake(Exception):
    """Of who runs the command: told in one sentence."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command")
    for name, what in (("handout", "print the text a student gets"),
                       ("cut", "make a student's folder"),
                       ("grade", "grade folders, or the folders in a folder")):
        command = commands.add_parser(name, help=what)
        command.add_argument("number", type=int, choices=ASSIGNMENTS, metavar="NUMBER")
        if name == "cut":
            command.add_argument("folder", type=Path, metavar="FOLDER")
            command.add_argument("--run", type=Path, metavar="RUN",
                                 help="a trained run, for the experiments: the folder links to it")
        if name == "grade":
            command.add_argument("folders", type=Path, metavar="FOLDER", nargs="+")
            command.add_argument("--json", type=Path, metavar="FILE",
                                 help="for the points, as Gradescope reads them")
            command.add_argument("--csv", type=Path, metavar="FILE", help="for a line a folder")
            command.add_argument("--jobs", type=int, default=1, metavar="N",
                                 help="how many folders at a time (default: 1)")
    options = parser.parse_args()
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
        else:
            results = grade_all(assignment, options.folders, options.jobs)
            if options.json:
                scores = {name: gradescope(result) for name, result in results.items()}
                content = scores if len(scores) > 1 else next(iter(scores.values()))
                options.json.write_text(json.dumps(content, indent=1) + "\n")
            if options.csv:
                with options.csv.open("w", newline="") as file:
                    csv.writer(file).writerows(table(assignment, results))
            sys.exit(any(result["points"] < result["of"] for result in results.values()))
    except (Mistake, OSError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


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
# Functions in a source: "tokenizer.Quantizer.encode" is in tokenizer.py, "reference.adaln" in tests


def path_of(name: str) -> str:
    """Of the file that a qualified name is in, from the root."""
    file = f"{name.split('.')[0]}.py"
    places = (file, f"tests/{file}", f"support/{file}")
    return next((place for place in places if (ROOT / place).exists()), file)


def by_file(names: tuple[str, ...]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(path_of(name), []).append(name)
    return files


@cache
def tree_of(source: str) -> ast.Module:
    return ast.parse(source)


def find(source: str, name: str) -> Function | None:
    """The definition of a function or method in the text of its file."""
    scope = tree_of(source)
    for part in name.split(".")[1:]:
        inside = [node for node in scope.body if getattr(node, "name", None) == part]
        if not inside:
            return None
        scope = inside[-1]
    return scope if isinstance(scope, Function) else None


def lines_of(source: str) -> list[str]:
    """As Python counts them: str.splitlines knows more ends of a line."""
    return source.removesuffix("\n").split("\n")


def first_line(node: Function) -> int:
    """Decorators are part of a function."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def text_of(source: str, name: str) -> str:
    node = find(source, name)
    return "\n".join(lines_of(source)[first_line(node) - 1:node.end_lineno])


def is_kernel(node: Function) -> bool:
    return any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)


def body_lines(source: str, node: Function) -> tuple[int, int]:
    """(first, last) line of what follows signature and docstring, comments among it."""
    lines = lines_of(source)
    documented = ast.get_docstring(node) is not None
    if documented:
        return node.body[0].end_lineno + 1, node.end_lineno
    first = node.body[0].lineno
    while lines[first - 2].strip().startswith("#"):
        first -= 1
    return first, node.end_lineno


def without_body(source: str, name: str, why: str) -> str:
    """The source with a function whose body says why it is not there."""
    node = find(source, name)
    first, last = body_lines(source, node)
    lines = lines_of(source)
    stub = f'raise NotImplementedError("{why}")'
    if is_kernel(node):   # which the interpreter and the compiler both report; they know no raise
        stub = f'tl.static_assert(False, "{why}")'
    lines[first - 1:last] = [" " * (node.col_offset + 4) + stub]
    return "\n".join(lines) + "\n"


def with_body(source: str, name: str, text: str) -> str:
    """The source with a function replaced by the text of another."""
    node = find(source, name)
    lines = lines_of(source)
    lines[first_line(node) - 1:node.end_lineno] = lines_of(text)
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------
# What a student gets


def repository(folder: Path) -> None:
    """Copy the source and its tests: no history, no runs, no caches."""
    for pattern in TAKEN:
        for path in ROOT.glob(pattern):
            if path.is_file():
                copy = folder / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    for name in LECTURERS:
        (folder / "tests" / name).unlink(missing_ok=True)


def cut(assignment: Assignment, folder: Path, run: Path | None = None) -> None:
    if folder.exists():
        raise Mistake(f"{folder} exists: name a new folder")
    if run and not (run / "var.pt").exists():
        raise Mistake(f"{run} is no trained run: it has no var.pt")
    repository(folder)
    if run:     # where the programs look for one that is not named
        (folder / "out").mkdir()
        (folder / "out" / "shapes").symlink_to(run.resolve())
    left_out = {}
    for file, names in by_file(assignment.give_aways).items():
        module = names[0].split(".")[0]
        source = (ROOT / file).read_text()
        left_out[module] = code_of(source, names)
        for name in names:
            source = without_body(source, name, "in compiled.bin")
        restore = f'import compiled  # noqa: E402\ncompiled.restore("{module}", globals())\n'
        before, main, after = source.partition('\n\nif __name__ == "__main__":')
        (folder / file).write_text(f"{before}\n\n{restore}{main}{after}")
    for name in assignment.bodies:
        path = folder / path_of(name)
        path.write_text(without_body(path.read_text(), name, f"assignment {assignment.number}"))
    if left_out:
        content = compiled.PYTHON.encode() + b"\n" + marshal.dumps(left_out)
        (folder / "compiled.bin").write_bytes(content)
        shutil.move(folder / "tests" / "compiled.py", folder / "compiled.py")
    (folder / "HANDOUT.md").write_text(handout(assignment) + "\n")


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


def nested(code: types.CodeType) -> Iterator[tuple[str, types.CodeType]]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant.co_qualname, constant
            yield from nested(constant)


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
        source = (ROOT / file).read_text()
        parts.append(f"From `{file}`:")
        parts += dict.fromkeys(fenced(section_of(source, name)) for name in names)
        parts += [fenced(shown(source, name)) for name in names]
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
    parts.append("\n".join(f"    {of:3}  {test}" for test, of in assignment.points.items()))
    parts.append(filled("A body that is refused, see above, makes the whole assignment 0 points, "
                        "and you are told why."))
    parts += ["## The open question", textwrap.dedent(assignment.question).strip()]
    return "\n\n".join(parts)


def filled(text: str) -> str:
    return textwrap.fill(text, 88, break_on_hyphens=False, break_long_words=False)


def allowed(assignment: Assignment) -> str:
    said = ("What the file imports from Python's library, PyTorch and this project, and Python's "
            "usual built-ins. A helper goes inside the function that needs it. Refused are "
            "`import`, `class`, `global` and `match`; whatever reaches files, processes or the "
            "inside of Python's objects, double underscores among it; and changing what is not "
            "yours, such as an attribute of another object than `self`.")
    if forbidden(assignment):
        said += f" In this assignment also {in_prose(forbidden(assignment))}."
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
    parts = ["\n".join(lines[begin:end])]
    *owners, _ = name.split(".")[1:]
    for owner in owners:
        node = next(x for x in tree_of(source).body if getattr(x, "name", None) == owner)
        if ast.get_docstring(node):
            doc = node.body[0]
            parts += ["", *lines[node.lineno - 1:doc.end_lineno]]
    return "\n".join(parts)


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
# What a solution may not do


PLAIN = set("""
    abs all any bool dict divmod enumerate filter float int isinstance len list map max min pow
    print range reversed round set slice sorted str sum tuple zip
    NotImplementedError ValueError AssertionError
""".split())
MODULES = {"torch", "torch.nn.functional", "math", "triton", "triton.language"}
REFUSED = {
    ast.Import: "imports", ast.ImportFrom: "imports", ast.ClassDef: "defines a class",
    ast.Global: "uses `global`", ast.Match: "uses `match`", ast.AsyncFunctionDef: "is asynchronous",
    ast.Await: "is asynchronous",
}


class Reader(ast.NodeVisitor):
    """Reads a body and says what in it is refused, a sentence each.

    Allowed are PLAIN, the names outside that the original bodies use, and attributes that those
    use, that the file's classes have, or that nursery.py allows: `asked`, for it to answer. What a
    body binds, in whatever scope, has none of the names that could be meant outside of it.
    """

    def __init__(self, name: str, text: str, source: str, bodies: list[str], names: list[str]):
        self.name = name
        self.sentences: list[str] = []
        self.asked: set[str] = set()        # as torch.nn.functional.silu, or Tensor.sum
        self.forbidden = set(names)
        self.imports = imports_of(source)
        originals = [find(source, body) for body in bodies]
        inside = [x for original in originals for x in ast.walk(original)]
        symbols = [x for body in bodies for x in symbols_of(scope_of(text_of(source, body)))]
        self.used = {x.get_name() for x in symbols if x.is_global()} - self.forbidden
        bound = {x.get_name() for x in symbols if not x.is_global()}
        self.set = {x.attr for x in inside if stored_attribute(x)}
        self.attributes = {x.attr for x in inside if isinstance(x, ast.Attribute)} | {
            x.attr for x in ast.walk(tree_of(source)) if stored_attribute(x)} | {
            x.name for owner in tree_of(source).body if isinstance(owner, ast.ClassDef)
            for x in owner.body if isinstance(x, Function)}
        self.outside = {*dir(builtins), *self.imports, *self.forbidden} | {
            getattr(x, "name", None) for x in tree_of(source).body}
        self.outside = self.outside - bound | {"self"}
        node = ast.parse(textwrap.dedent(text)).body[0]
        given = {x.arg for x in ast.walk(node.args) if isinstance(x, ast.arg)}
        self.read_scope(scope_of(text), given)
        for statement in node.body[ast.get_docstring(node) is not None:]:
            self.visit(statement)

    def refuse(self, what: str) -> None:
        self.sentences.append(f"{self.name} {what}")

    def read_scope(self, scope: symtable.SymbolTable, given: set[str]) -> None:
        """Hold each name to what Python itself takes it for. given: the arguments."""
        for symbol in scope.get_symbols():
            name = symbol.get_name()
            if "__" in name:
                self.refuse(f"uses {name}, a name with a double underscore")
            elif symbol.is_global():
                if name in self.forbidden:
                    self.refuse(f"uses {name}, which this assignment forbids")
                elif not (name in PLAIN or name in self.used
                          or self.imports.get(name) in MODULES):
                    self.refuse(f"uses {name}, which no solution needs")
            elif name in self.outside and (symbol.is_assigned() or symbol.is_parameter()
                                           or symbol.is_namespace()):
                if name not in given or symbol.is_assigned() and name == "self":
                    self.refuse(f"gives {name} another meaning")
        for inner in scope.get_children():
            self.read_scope(inner, set())

    def visit(self, node: ast.AST) -> None:
        if type(node) in REFUSED:
            self.refuse(REFUSED[type(node)])
        super().visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        """Not reached from `self.x` and `torch.x`."""
        if node.id == "self":
            self.refuse("hands self around, or calls it")
        elif self.imports.get(node.id) in MODULES:
            self.refuse(f"hands {node.id} around, a module")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = dotted(node)
        root = chain.partition(".")[0]
        module = self.imports.get(root)
        if "__" in node.attr:
            self.refuse(f"uses {node.attr}, a name with a double underscore")
        elif node.attr in self.forbidden:
            self.refuse(f"uses {node.attr}, which this assignment forbids")
        if not isinstance(node.ctx, ast.Load) and not (
                chain == f"self.{node.attr}" and node.attr in self.set):
            self.refuse(f"changes {ast.unparse(node)}, which is not its own")
        if module in MODULES:
            if root in self.forbidden:
                self.refuse(f"uses {root}, which this assignment forbids")
            self.asked.add(f"{module}.{chain.partition('.')[2]}")
        elif node.attr not in self.attributes:
            self.asked.add(f"Tensor.{node.attr}")
        if module not in MODULES and chain != f"self.{node.attr}":
            self.visit(node.value)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        root = dotted(node.value).partition(".")[0]
        if not isinstance(node.ctx, ast.Load) and root in self.outside - {"self"}:
            self.refuse(f"changes {ast.unparse(node.value)}, which is not its own")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, (str, bytes)) and "__" in str(node.value):
            self.refuse("has a text with a double underscore in it")


def scope_of(text: str) -> symtable.SymbolTable:
    return symtable.symtable(textwrap.dedent(text), "body", "exec").get_children()[-1]


def symbols_of(scope: symtable.SymbolTable) -> list[symtable.Symbol]:
    inside = [symbols_of(inner) for inner in scope.get_children()]
    return sum(inside, scope.get_symbols())


def stored_attribute(node: ast.AST) -> bool:
    """Whether it is self.x as it gets a value."""
    return (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            and dotted(node.value) == "self")


def dotted(node: ast.AST) -> str:
    """a.b.c as a text; nothing if it does not begin with a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        begin = dotted(node.value)
        return begin and f"{begin}.{node.attr}"
    return ""


def imports_of(source: str) -> dict[str, str]:
    """{name: where from} of everything that a file imports."""
    names = {}
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = alias.name
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                where = f"{node.module}.{alias.name}"
                names[alias.asname or alias.name] = where if where in MODULES else node.module
    return names


# --------------------------------------------------------------------------------------------------
# Grading


class Nursery:
    """The process that runs tests, each in a process of its own: nursery.py."""

    def __enter__(self) -> Nursery:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
                       "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}     # GPU or not
        for name in ("PYTEST_ADDOPTS", "HYPOTHESIS_PROFILE", "PYTHONPATH"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("nursery.py")], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=environment)
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
            source = (folder / file).read_text()
            tree_of(source)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            refused.append(f"{file} cannot be read: {' '.join(str(error).split())}")
            continue
        ours = (ROOT / file).read_text()
        for name in names:
            node = find(source, name)
            if node is None or signature(node) != signature(find(ours, name)):
                refused.append(f"{name} is missing, or has another signature than in the original")
                continue
            text = text_of(source, name)
            reader = Reader(name, text, ours, names, forbidden(assignment))
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
        path.write_text(with_body(path.read_text(), name, text))


def grade_all(assignment: Assignment, folders: list[Path], jobs: int) -> dict[str, dict]:
    """{name: result} of all folders, each told as it ends; whatever happens to one of them."""
    for folder in folders:
        if not folder.is_dir():
            raise Mistake(f"{folder} is no folder")
    files = by_file(assignment.bodies)
    folders = [inner for folder in folders for inner in (
        [folder] if any((folder / file).exists() for file in files)
        else sorted(x for x in folder.iterdir() if x.is_dir()) or [folder])]
    pairs = list(zip(names_of(folders), folders))

    def some(pairs: list[tuple[str, Path]]) -> list[tuple[str, dict]]:
        """One process runs the tests of many folders; after a crash the next gets a new one."""
        graded = []
        while len(graded) < len(pairs):
            with Nursery() as nursery:
                for name, folder in pairs[len(graded):]:
                    try:
                        result = grade(assignment, folder, nursery)
                    except Exception as error:      # the others are to be graded all the same
                        why = f"could not be graded: {type(error).__name__}: {error}"
                        result = none(assignment, why)
                    print(f"{name}\n{textwrap.indent(told(result), '    ')}", flush=True)
                    graded.append((name, result))
                    if nursery.process.poll() is not None:
                        break
        return graded

    with ThreadPoolExecutor(jobs) as pool:
        shares = pool.map(some, (pairs[i::jobs] for i in range(jobs)))
        results = dict(sorted(sum(shares, [])))
    first: dict[str, str] = {normal({body: text_of((ROOT / path_of(body)).read_text(), body)
                                     for body in assignment.bodies}): "the original"}
    for name, result in results.items():
        text = normal(result["bodies"]) if result["bodies"] else None
        result["identical"] = first.get(text, "")
        if text and text not in first:
            first[text] = name
    width = max(map(len, results))
    for name, result in results.items():
        said = [f"{len(result['refused'])} times refused"] * bool(result["refused"])
        said += [f"identical to {result['identical']}"] * bool(result["identical"])
        points = f"{result['points']:3} of {result['of']}  {result['seconds']:6.1f} s"
        print(f"{name:{width}}  {points}  {', '.join(said)}".rstrip())
    return results


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
        node = ast.parse(textwrap.dedent(bodies[name])).body[0]
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
