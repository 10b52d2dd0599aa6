"""Assignments are cut from the source as it is, and grading cannot be fooled.

    pytest tests/test_assignments.py -m long     all planted errors, and every assignment in full
"""
from __future__ import annotations

import ast
import json
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

import assignments
from assignments import ROOT, Nursery, carry, find, forbidden, grade, path_of, repository, text_of
from handouts import ASSIGNMENTS
from mutations import PLANTED

BODIES = {name: number for number, each in ASSIGNMENTS.items() for name in each.bodies}
PLAIN = "1 passed"


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as running:
        yield running


def source_of(name: str) -> str:
    return (ROOT / path_of(name)).read_text()


def text(name: str) -> str:
    return text_of(source_of(name), name)


def with_lines(name: str, body: str) -> str:
    """A function of the source with another body."""
    source = source_of(name)
    node = find(source, name)
    head = assignments.lines_of(source)[assignments.first_line(node) - 1:
                                        assignments.body_lines(source, node)[0] - 1]
    indent = " " * (node.col_offset + 4)
    return "\n".join(head) + "\n" + textwrap.indent(textwrap.dedent(body).strip(), indent)


def stubs(number: int) -> dict[str, str]:
    return {name: text_of(assignments.without_body(source_of(name), name, "stub"), name)
            for name in ASSIGNMENTS[number].bodies}


def handed_in(folder: Path, bodies: dict[str, str]) -> Path:
    repository(folder)
    carry(bodies, folder)
    return folder


def graded(number: int, folder: Path, nursery: Nursery, bodies: dict[str, str], seconds=60) -> dict:
    return grade(ASSIGNMENTS[number], handed_in(folder, bodies), nursery, seconds)


def first_failure(name: str, text: str, nursery: Nursery) -> str | None:
    """The first graded test that a function costs its points, or None."""
    with tempfile.TemporaryDirectory() as place:
        handed_in(Path(place), {name: text})
        for test in ASSIGNMENTS[BODIES[name]].points:
            if not nursery.run(Path(place), test, 60)["passed"]:
                return test
    return None


def mutants(name: str) -> list[str]:
    original = text(name)
    for old, _ in PLANTED[name]:
        assert original.count(old) == 1, (name, old)
    return [original.replace(old, new) for old, new in PLANTED[name]]


# -------------------------------------------------------------------------------------------------
# The list


def test_every_function_and_every_test_is_there():
    for each in ASSIGNMENTS.values():
        for name in (*each.bodies, *each.give_aways):
            assert find(source_of(name), name), name
        for test in each.points:
            file, _, function = test.partition("::")
            assert find((ROOT / file).read_text(), f"x.{function.partition('[')[0]}"), test
        assert not set(each.bodies) & set(each.give_aways)
        assert all(before < 14 for before in each.after) and each.of >= 9


def test_the_list_and_the_handouts_name_what_there_is(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["assignments.py"])
    assignments.main()
    printed = capsys.readouterr().out
    for number, each in ASSIGNMENTS.items():
        assert f"{number:3}  {each.of:6}" in printed
        handout = assignments.handout(each)
        for name in each.bodies:
            node = find(source_of(name), name)
            assert ast.get_docstring(node) is None or ast.get_docstring(node)[:30] in handout
            assert f"def {node.name}(" in handout
            last = ast.unparse(node.body[-1]).splitlines()[0]
            assert last not in handout or len(last) < 12, last


@pytest.mark.parametrize("arguments, told", [
    (["grade", "3", "nowhere"], "nowhere is no folder"), (["cut", "3", "."], ". exists")])
def test_mistakes_are_told_in_a_sentence(arguments, told, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["assignments.py", *arguments])
    monkeypatch.setattr(Nursery, "__enter__", lambda self: self)
    monkeypatch.setattr(Nursery, "__exit__", lambda *_: None)
    with pytest.raises(SystemExit, match=f"error: {told}"):
        assignments.main()


# -------------------------------------------------------------------------------------------------
# What a student gets


@pytest.mark.parametrize("number", ASSIGNMENTS)
def test_what_is_cut_is_gone_and_nothing_else_is(number, tmp_path):
    each = ASSIGNMENTS[number]
    assignments.cut(each, tmp_path / "cut")
    files = {path.relative_to(tmp_path / "cut"): path.read_text(errors="replace")
             for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    for name in (*each.bodies, *each.give_aways):
        source = files[Path(path_of(name))]
        node = find(source, name)
        assert ast.dump(node.args) == ast.dump(find(source_of(name), name).args)
        assert ast.get_docstring(node) == ast.get_docstring(find(source_of(name), name))
        lines = [line.strip() for line in text(name).split("\n")[-3:] if len(line.strip()) > 30]
        assert not any(line in text_of(source, name) for line in lines)
    assert not any(".git/" in str(path) or "mutations" in str(path) for path in files)
    assert {"HANDOUT.md", "train.py", "tests"} <= {path.parts[0] for path in files}


@pytest.mark.parametrize("number, tests", [
    (1, ["test_tokenizer.py::test_gradients_pass_straight_through_to_the_encoder"]),
    (4, ["test_tokenizer.py::test_decode_of_encode_is_the_quantizers_own_output"]),
    (8, ["test_kernels.py::test_top_k_keeps_k_whatever_their_sign_and_their_ties[logits0-triton]"]),
])
def test_what_is_compiled_works(number, tests, nursery, tmp_path):
    """In the student's folder: with the assigned bodies back, everything else is there."""
    assignments.cut(ASSIGNMENTS[number], tmp_path / "cut")
    carry({name: text(name) for name in ASSIGNMENTS[number].bodies}, tmp_path / "cut")
    for test in tests:
        assert nursery.run(tmp_path / "cut", f"tests/{test}", 60)["message"] == ""


# -------------------------------------------------------------------------------------------------
# Grading


def check_full_points(number: int, nursery: Nursery, folder: Path) -> None:
    result = graded(number, folder, nursery, {})
    assert not result["refused"]
    assert [test["test"] for test in result["tests"] if test["points"] < test["of"]] == []
    assert result["points"] == result["of"] == ASSIGNMENTS[number].of


def test_the_source_gets_full_points(nursery, tmp_path, monkeypatch):
    check_full_points(2, nursery, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("number", ASSIGNMENTS)
def test_the_source_gets_full_points_in_every_assignment(number, nursery, tmp_path):
    check_full_points(number, nursery, tmp_path)


@pytest.mark.parametrize("number", ASSIGNMENTS)
def test_the_source_breaks_no_rule(number, nursery, tmp_path):
    assert assignments.solution(ASSIGNMENTS[number], ROOT, nursery)[1] == []


@pytest.mark.parametrize("number", ASSIGNMENTS)
def test_the_stub_gets_nothing(number, nursery, tmp_path):
    assignments.cut(ASSIGNMENTS[number], tmp_path / "cut")
    result = grade(ASSIGNMENTS[number], tmp_path / "cut", nursery, 60)
    assert result["points"] == 0 and not result["refused"]
    for test in result["tests"]:
        assert test["points"] == 0 and f"assignment {number}" in test["message"], test
