"""What a solution may not do: `Reader` reads it and says so."""
from __future__ import annotations

import ast
import builtins
import symtable
from collections.abc import Iterable
from functools import cache

from functions import Function, alone, find, is_kernel, nodes_of, parsed, text_of, tree_of

PLAIN = set("""
    abs all any bool dict divmod enumerate filter float int isinstance len list map max min pow
    print range reversed round set slice sorted str sum tuple zip
    NotImplementedError ValueError AssertionError TypeError IndexError RuntimeError
    iter next repr frozenset
""".split())
MODULES = {"torch", "torch.nn", "torch.nn.functional", "math", "triton", "triton.language"}
REFUSED = {
    ast.Import: "imports", ast.ImportFrom: "imports", ast.ClassDef: "defines a class",
    ast.Global: "uses `global`", ast.Match: "uses `match`", ast.AsyncFunctionDef: "is asynchronous",
    ast.Await: "is asynchronous",
}
NOT_COMPILED = (        # what the interpreter takes in a kernel, and the compiler refuses
    ast.Try, ast.With, ast.Lambda, ast.FunctionDef, ast.ListComp, ast.SetComp, ast.DictComp,
    ast.GeneratorExp, ast.Dict, ast.Set, ast.JoinedStr, ast.Yield, ast.Starred)
COMPILED = {"abs", "bool", "float", "int", "len", "max", "min", "print", "range"}


class Reader(ast.NodeVisitor):
    """Reads a body and says what in it is refused, a sentence each.

    Allowed are PLAIN, the names outside that the original bodies use, and attributes that those
    use, that the file's classes have, or that nursery.py allows: `asked`, for it to answer; and
    what a student is shown, `quoted`. What a body binds, in whatever scope, has none of the names
    that could be meant outside of it.
    """

    def __init__(self, name: str, text: str, source: str, bodies: list[str], names: list[str],
                 quoted: Iterable[str]):
        self.name = name
        self.sentences: list[str] = []
        self.asked: set[str] = set()        # as torch.nn.functional.silu, or Tensor.sum
        self.forbidden = set(names)
        self.imports = imports_of(source)
        originals = [find(source, body) for body in bodies]
        inside = [x for original in originals for x in ast.walk(original)]
        symbols = [x for body in bodies for x in symbols_of(scope_of(text_of(source, body)))]
        of_file = {*self.imports} | {getattr(x, "name", None) for x in tree_of(source).body}
        shown = {each.split(".")[1] for each in quoted} & of_file
        self.used = {x.get_name() for x in symbols if x.is_global()} | shown
        self.used -= self.forbidden
        bound = {x.get_name() for x in symbols if not x.is_global()}
        self.compiled = is_kernel(find(source, name))
        self.plain = PLAIN & COMPILED if self.compiled else PLAIN
        self.set = {x.attr for x in inside if stored_attribute(x)} | {     # and buffers
            x.args[0].value for x in nodes_of(source) if isinstance(x, ast.Call)
            and dotted(x.func) == "self.register_buffer"}
        self.filled = {dotted(x.value) for x in inside
                       if isinstance(x, ast.Subscript) and isinstance(x.ctx, ast.Store)}
        self.attributes = {x.attr for x in inside if isinstance(x, ast.Attribute)} | {
            x.attr for x in nodes_of(source) if stored_attribute(x)} | {
            x.name for owner in tree_of(source).body if isinstance(owner, ast.ClassDef)
            for x in owner.body if isinstance(x, Function)}
        self.outside = {*dir(builtins), *of_file} - bound | {"self"}
        node = parsed(text)
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
                elif not (name in self.plain or name in self.used
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
        if self.compiled and isinstance(node, NOT_COMPILED):
            self.refuse(f"has `{ast.unparse(node)[:40]}` in it, which Triton does not compile")
        super().visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        """Not reached from `self.x` and `torch.x`."""
        if node.id == "self":
            self.refuse("hands self around, or calls it")
        elif self.imports.get(node.id) in MODULES and node.id != "Tensor":
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
        chain = dotted(node.value)
        if not isinstance(node.ctx, ast.Load) and chain not in self.filled and (
                chain.partition(".")[0] in self.outside):
            self.refuse(f"changes {ast.unparse(node.value)}, which is not its own")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, (str, bytes)) and "__" in str(node.value):
            self.refuse("has a text with a double underscore in it")


def scope_of(text: str) -> symtable.SymbolTable:
    return symtable.symtable(alone(text), "body", "exec").get_children()[-1]


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


@cache
def imports_of(source: str) -> dict[str, str]:
    """{name: where from} of everything that a file imports."""
    names = {}
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = alias.name
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                where = f"{node.module}.{alias.name}"
                names[alias.asname or alias.name] = where if where in MODULES else node.module
    return names
