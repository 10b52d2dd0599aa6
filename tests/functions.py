"""Functions in a source: "tokenizer.Quantizer.encode" is in tokenizer.py, "reference.adaln" in tests."""
from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
Function = ast.FunctionDef


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


@cache
def nodes_of(source: str) -> list[ast.AST]:
    return [*ast.walk(tree_of(source))]


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


def alone(text: str) -> str:
    """A function's text as a module, a method's too; a comment in it may stand at the margin."""
    return f"if True:\n{text}" if text[0].isspace() else text


def parsed(text: str) -> Function:
    return next(x for x in ast.walk(ast.parse(alone(text))) if isinstance(x, Function))


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
