"""Assignments are cut from the source as it is, and grading cannot be fooled.

    pytest tests/test_assignments.py -m long     all planted errors, and every assignment in full
"""
from __future__ import annotations

import ast
import csv
import inspect
import json
import os
import re
import sys
import tempfile
import textwrap
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import answers
import assignments
import pytest
import torch
from assignments import Nursery, carry, grade, repository
from functions import (
    ROOT, body_lines, find, first_line, lines_of, nodes_of, path_of, text_of, with_body,
    without_body,
)
from handouts import ASSIGNMENTS, Assignment
from mutations import EASY, EDGE, IN_PLACE, KINDS, PLANTED
from nursery import CARING, TO_FILL, watched
from rules import Reader, imports_of, stored_attribute

import kernels
from support.presets import PRESETS
from tokenizer import Quantizer, TokenizerConfig

OURS = ("kernels", "tokenizer", "var", "sample")
CAUGHT_LAST: dict[str, str] = {}
SECONDS = 300   # on a machine that does much else
BODIES = {name: number for number, each in ASSIGNMENTS.items() for name in each.bodies}


FEW = replace(ASSIGNMENTS[4], points=dict([*ASSIGNMENTS[4].points.items()][:2]))
ONE = replace(FEW, points=dict([*FEW.points.items()][:1]))


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
    head = lines_of(source)[first_line(node) - 1:
                                        body_lines(source, node)[0] - 1]
    indent = " " * (node.col_offset + 4)
    return "\n".join(head) + "\n" + textwrap.indent(textwrap.dedent(body).strip(), indent)


def stubs(number: int) -> dict[str, str]:
    return {name: text_of(without_body(source_of(name), name, "stub"), name)
            for name in ASSIGNMENTS[number].bodies}


def handed_in(folder: Path, bodies: dict[str, str]) -> Path:
    repository(folder)
    carry(bodies, folder)
    return folder


def graded(each: Assignment, folder: Path, nursery: Nursery, bodies: dict[str, str]) -> dict:
    return grade(each, handed_in(folder, bodies), nursery, SECONDS)


def first_failure(name: str, text: str, nursery: Nursery) -> str | None:
    """A graded test that a function costs its points, or None.

    First comes the one that caught the last error in it, which saves most of the time.
    """
    tests = [*ASSIGNMENTS[BODIES[name]].points]
    tests.sort(key=lambda test: test != CAUGHT_LAST.get(name))
    with tempfile.TemporaryDirectory() as place:
        handed_in(Path(place), {name: text})
        for test in tests:
            if not nursery.run(Path(place), [test], SECONDS, [name])["passed"]:
                CAUGHT_LAST[name] = test
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


def used_by(node: ast.AST, source: str) -> set[str]:
    """The names of ours that a function uses."""
    node = ast.Module(node.body, [])    # without decorators
    ours = {name for name, module in imports_of(source).items() if module in OURS}
    return ({x.attr for x in ast.walk(node) if isinstance(x, ast.Attribute)
             and getattr(x.value, "id", "") != "data" and not hasattr(torch.Tensor, x.attr)}
            | {x.id for x in ast.walk(node) if isinstance(x, ast.Name)} & ours)


@cache
def defined() -> set[str]:
    """Functions, classes, constants and attributes of the files that assignments are cut from."""
    nodes = [node for file in OURS for node in nodes_of((ROOT / f"{file}.py").read_text())]
    return {x.name for x in nodes if isinstance(x, (ast.FunctionDef, ast.ClassDef))} | {
        x.attr for x in nodes if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store)} | {
        x.target.id for x in nodes if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)} | {
        x.id for x in nodes if isinstance(x, ast.Name) and x.id.isupper()}


@pytest.mark.parametrize("number", ASSIGNMENTS)
def test_a_handout_says_all_that_its_tests_and_its_functions_use(number):
    """And the words of errors that a test wants."""
    each = ASSIGNMENTS[number]
    said = set(re.findall(r"\w+", assignments.handout(each)))
    needed = set()
    for test in each.points:
        node = assignments.test_of(test)
        needed |= used_by(node, (ROOT / test.partition("::")[0]).read_text())
        for x in ast.walk(node):
            if isinstance(x, ast.keyword) and x.arg == "match":
                said_so = [y.value for y in ast.walk(x.value) if isinstance(y, ast.Constant)]
                assert set(re.findall(r"\w+", " ".join(said_so))) <= said, test
    made = set()
    for name in each.bodies:
        node = find(source_of(name), name)
        needed |= used_by(node, source_of(name))
        made |= {x.attr for x in ast.walk(node) if stored_attribute(x)}
    assert needed & defined() - made - said == set()


@pytest.mark.parametrize("arguments, told", [
    (["grade", "3", "nowhere"], "nowhere is no folder"), (["cut", "3", "."], ". exists"),
    (["answers", "3", "--run", "nowhere"], "nowhere is no trained run")])
def test_mistakes_are_told_in_a_sentence(arguments, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["assignments.py", *arguments])
    monkeypatch.setattr(Nursery, "__enter__", lambda self: self)
    monkeypatch.setattr(Nursery, "__exit__", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        assignments.main()
    assert ended.value.code == 2 and f"error: {told}" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------
# What a student gets


@pytest.mark.parametrize("number", ASSIGNMENTS)
def test_what_is_cut_is_gone_and_nothing_else_is(number, tmp_path):
    each = ASSIGNMENTS[number]
    assignments.cut(each, tmp_path / "cut")
    files = {path.relative_to(tmp_path / "cut"):
             "" if path.suffix == ".png" else path.read_text(errors="replace")
             for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    for name in (*each.bodies, *each.give_aways):
        source = files[Path(path_of(name))]
        node = find(source, name)
        assert ast.dump(node.args) == ast.dump(find(source_of(name), name).args)
        assert ast.get_docstring(node) == ast.get_docstring(find(source_of(name), name))
        first, last = body_lines(source_of(name), find(source_of(name), name))
        for line in lines_of(source_of(name))[first - 1:last]:
            assert len(line.strip()) < 20 or line.strip() not in text_of(source, name)
    for path, content in files.items():
        if path.suffix == ".md":
            for link in re.findall(r"\]\((?!http)([^)#]+)", content):
                assert Path(os.path.normpath(path.parent / link)) in files, (path, link)
    assert not any(".git/" in str(path) or "mutations" in str(path) for path in files)
    assert {"HANDOUT.md", "train.py", "tests"} <= {path.parts[0] for path in files}


def test_a_run_is_copied_where_programs_look_for_one(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "var.pt").write_text("weights")
    assignments.cut(FEW, tmp_path / "cut", tmp_path / "run")
    copied = tmp_path / "cut" / "out" / "shapes" / "var.pt"
    assert copied.read_text() == "weights" and not copied.is_symlink()


@pytest.mark.parametrize("number, tests", [
    pytest.param(1, ["test_tokenizer.py::test_gradients_pass_straight_through_to_the_encoder"],
                 marks=pytest.mark.long),
    pytest.param(
        8, ["test_kernels.py::test_top_k_keeps_k_whatever_their_sign_and_their_ties[logits0-triton]"],
        marks=pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")),
])
def test_what_is_compiled_works(number, tests, nursery, tmp_path):
    """In the student's folder: with the assigned bodies back, everything else is there."""
    assignments.cut(ASSIGNMENTS[number], tmp_path / "cut")
    carry({name: text(name) for name in ASSIGNMENTS[number].bodies}, tmp_path / "cut")
    result = nursery.run(tmp_path / "cut", [f"tests/{test}" for test in tests], SECONDS)
    assert result["passed"], result


@pytest.mark.parametrize("number", ASSIGNMENTS)
def test_every_question_has_an_experiment_and_an_answer(number, tmp_path, monkeypatch):
    ran = []
    done = SimpleNamespace(returncode=0, stdout="measured", stderr="")
    monkeypatch.setattr("subprocess.run", lambda command, **how: ran.append(command[3]) or done)
    for file in ("tokenizer.py", "train.py", "sample.py"):
        (tmp_path / file).write_text((ROOT / file).read_text())
    assert answers.experiment(ASSIGNMENTS[number], tmp_path) == "measured"
    (commands,) = ran
    for script in set(re.findall(r"python (\w+\.py)", commands)):
        ast.parse((tmp_path / script).read_text())
    assert "\npython " in commands or "    python " in commands
    assert ("cp " in commands) == ("# changed" in ASSIGNMENTS[number].question)
    if number in answers.CHANGED:
        assert (tmp_path / "tokenizer.changed").read_text() != (ROOT / "tokenizer.py").read_text()
    assert len(answers.ANSWERS[number]) > 300


@pytest.mark.long
@pytest.mark.parametrize("number", [9, 11, 12])     # those that need no run
def test_experiments_run(number, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["assignments.py", "answers", str(number)])
    assignments.main()
    assert answers.ANSWERS[number] in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------
# Grading


def check_full_points(each: Assignment, nursery: Nursery, folder: Path) -> None:
    result = graded(each, folder, nursery, {})
    assert not result["refused"]
    assert [test["test"] for test in result["tests"] if test["points"] < test["of"]] == []
    assert result["points"] == result["of"] == each.of


def test_the_source_gets_full_points(nursery, tmp_path):
    check_full_points(FEW, nursery, tmp_path)


def test_what_may_be_changed_is_named_as_in_the_source():
    assigned = {name for each in ASSIGNMENTS.values() for name in each.bodies}
    assert CARING <= {name.rpartition(".")[2] for name in assigned}
    arguments = {argument.arg for name in assigned
                 for argument in find(source_of(name), name).args.args}
    assert {*TO_FILL} - {"written"} <= arguments
    assert "written" in inspect.signature(kernels.launch).parameters


@pytest.mark.long
@pytest.mark.parametrize("number", ASSIGNMENTS)
def test_the_source_gets_full_points_in_every_assignment(number, nursery, tmp_path):
    check_full_points(ASSIGNMENTS[number], nursery, tmp_path)


@pytest.mark.parametrize("number", ASSIGNMENTS)
def test_the_source_breaks_no_rule(number, nursery, tmp_path):
    assert assignments.solution(ASSIGNMENTS[number], ROOT, nursery)[1] == []


@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.long), 10])
def test_the_stub_fails_every_graded_test(number, nursery, tmp_path):
    """All in one process, which takes less time; one by one for all assignments below."""
    handed_in(tmp_path, stubs(number))
    failed = nursery.run(tmp_path, [*ASSIGNMENTS[number].points], SECONDS)["failed"]
    for test in ASSIGNMENTS[number].points:
        said = [message for case, message in failed.items() if case.startswith(test)]
        assert any("stub" in message for message in said), (test, failed)


@pytest.mark.long
@pytest.mark.parametrize("number", ASSIGNMENTS)
def test_the_stub_gets_nothing(number, nursery, tmp_path):
    assignments.cut(ASSIGNMENTS[number], tmp_path / "cut")
    result = grade(ASSIGNMENTS[number], tmp_path / "cut", nursery, SECONDS)
    assert result["points"] == 0 and not result["refused"]
    for test in result["tests"]:
        assert test["points"] == 0 and f"assignment {number}" in test["message"], test


# -------------------------------------------------------------------------------------------------
# Forging: no points, and no harm


FORGED = {   # a body of `teacher_inputs` -> what is said of it
    'print("1 passed")\nimport os\nos._exit(0)': "imports",
    "raise SystemExit(0)": "uses SystemExit",
    "raise KeyboardInterrupt": "uses KeyboardInterrupt",
    'exec("x = 1")': "uses exec",
    'open("tests/conftest.py", "w").write("")': "uses open",
    'getattr(torch, "o" + "s").remove("x")': "uses getattr",
    "torch.os.remove('x')": "uses torch.os.remove",
    "torch.serialization.pathlib.Path('tests').unlink()": "uses torch.serialization.pathlib",
    "torch.utils.data.dataset": "uses torch.utils",
    "np.lib.npyio.os.unlink('x')": "uses np,",
    "F.torch.save(self.phis, 'x')": "uses torch.nn.functional.torch.save",
    "F.handle_torch_function(print, ())": "uses torch.nn.functional.handle_torch_function",
    "torch.from_file('x')": "uses torch.from_file",
    "torch.hub.load('x', 'y')": "uses torch.hub",
    "torch.load('x')": "uses torch.load,",
    "torch.manual_seed(0)": "uses torch.manual_seed",
    "torch.Tensor.backward": "uses torch.Tensor",
    "torch.overrides": "uses torch.overrides",
    "tokens_BL.apply_(print)": "uses .apply_",
    "tokens_BL.set_(tokens_BL)": "uses .set_",
    "tokens_BL.untyped_storage()": "uses .untyped_storage",
    "tokens_BL.data = tokens_BL": "changes tokens_BL.data",
    "tokens_BL.numpy()": "uses .numpy",
    "tokens_BL.grad_fn": "uses .grad_fn",
    "tokens_BL.register_hook(print)": "uses .register_hook",
    "t = torch\nt.testing.assert_close = lambda *a, **k: None": "hands torch around",
    "[torch for _ in ()]": "hands torch around",
    "torch.testing.assert_close = lambda *a, **k: None": "changes torch.testing.assert_close",
    "torch.equal = lambda *a: True": "changes torch.equal",
    "Tensor.allclose = lambda *a: True": "changes Tensor.allclose",
    "def patch(self):\n    self.allclose = print\npatch(Tensor)": "gives self another meaning",
    "T = torch.Tensor\nT.shape = (2, 29, 4)": "changes T.shape",
    "for torch.equal in [print]:\n    pass": "changes torch.equal",
    "with torch.no_grad() as torch.equal:\n    pass": "changes torch.equal",
    "del torch.equal": "changes torch.equal",
    "self.read = lambda *a: torch.zeros(1)": "changes self.read",
    "Quantizer.read = Quantizer.initial": "changes Quantizer.read",
    "self.phi_of_scale[0] = 1": "changes self.phi_of_scale, which",
    "self.phis[0] = self.phis[1]": "changes self.phis, which",
    "del self.phis[0]": "changes self.phis, which",
    "().__class__.__base__.__subclasses__()": "double underscore",
    "self.read.__globals__['os']": "double underscore",
    "'{0.__class__}'.format(1)": "a text with a double underscore",
    "('{0._' + '_class_' + '_}').format(1)": "uses .format,",
    "f'{1:{().__class__}}'": "double underscore",
    "'%s' % self": "hands self around",
    "(x for x in ()).gi_frame.f_back": "uses .gi_frame",
    "try:\n    1 / 0\nexcept ValueError as e:\n    e.with_traceback": "uses .with_traceback",
    "class Liar:\n    pass\nreturn Liar()": "defines a class",
    "match self:\n    case object(shape=x):\n        pass": "uses `match`",
    "global PHI_STRENGTH\nPHI_STRENGTH = 0": "uses `global`",
    "return self.decode(tokens_BL)": "uses decode, which this assignment forbids",
    "lambda decode: 0\nreturn self.decode(tokens_BL)": "uses decode, which this assignment",
    "[0 for open in ()]\nopen('x')": "gives open another meaning",
    "lambda eval: 0\neval('1')": "uses eval",
    "(exec := 1)": "gives exec another meaning",
    "[(exec := x) for x in ()]": "gives exec another meaning",
    "def f(x=eval('1')):\n    pass": "uses eval",
    "@eval\ndef f():\n    pass": "uses eval",
    "f'{eval(str(1))}'": "uses eval",
    "for open in ():\n    pass": "gives open another meaning",
    "try:\n    pass\nexcept ValueError as open:\n    pass": "gives open another meaning",
    "nearest_code = 1": "gives nearest_code another meaning",
    "load_module(1)": "uses load_module",
    "Tokenizer(1)": "uses Tokenizer",
    "return self(tokens_BL)": "hands self around, or calls it",
    "f = self\nreturn f(tokens_BL)": "hands self around",
    "return [*map(self, [tokens_BL])][0]": "hands self around",
    "return self.forward(tokens_BL)": "uses forward, which this assignment forbids",
    "return super().teacher_inputs(tokens_BL)": "uses super",
    "type('x', (), {})": "uses type",
    "partial(print)": "uses partial",
    "torch.save(1, 'x')": "uses torch.save",
    "self._forward_hooks": "uses ._forward_hooks",
    "self.register_forward_hook(print)": "uses .register_forward_hook",
    "self.apply(print)": "uses .apply",
    "self.load_state_dict({})": "uses .load_state_dict",
    "breakpoint()": "uses breakpoint",
    "torch = 1": "gives torch another meaning",
}


def test_what_is_refused_gets_no_points(nursery, tmp_path):
    name = "tokenizer.Quantizer.teacher_inputs"
    result = graded(FEW, tmp_path, nursery, {name: with_lines(name, "raise SystemExit(0)")})
    assert result["points"] == 0 and len(result["refused"]) == 1
    assert [test["message"] for test in result["tests"]] == ["refused", "refused"]


def test_forgeries_are_refused(nursery, tmp_path):
    name = "tokenizer.Quantizer.teacher_inputs"
    repository(tmp_path)
    for body, said in FORGED.items():
        carry({name: with_lines(name, body + "\nreturn torch.zeros(1)")}, tmp_path)
        refused = assignments.solution(ASSIGNMENTS[4], tmp_path, nursery)[1]
        assert said in " ".join(refused), (body, refused)


@pytest.mark.parametrize("number, name, body, said", [
    (9, "kernels.adaln_forward", "adaln_torch(x_BLW, scale_B1W, shift_B1W)", "adaln_torch"),
    (5, "kernels.block_attention_torch",
     "return block_attention_triton(q_BHLD, k_BHSD, v_BHSD, ranges, scale)",
     "block_attention_triton"),
    (8, "kernels.sample_tokens_torch",
     "return sample_tokens_triton(cond_BlV, uncond_BlV, guidance, top_k, top_p, noise_BlV)",
     "sample_tokens_triton"),
    (9, "kernels.normalise", "return F.layer_norm(x_W, (W,)), 1.0", "F"),
    (10, "kernels.nearest_code_kernel", "squares_V.handle.data", "handle"),
    (11, "kernels.attention_forward", "torch.softmax(q_BHLD, 0)", "torch"),
    (11, "kernels.attention_forward", "sorted(tl.static_range(2))", "sorted"),
    (13, "sample.fill_holes", "Path('x').unlink()", "Path"),
    (13, "sample.fill_holes", "os.remove('x')", "os"),
])
def test_the_twin_and_other_libraries_are_refused(number, name, body, said, nursery, tmp_path):
    result = graded(ASSIGNMENTS[number], tmp_path, nursery, {name: with_lines(name, body)})
    assert result["points"] == 0
    assert any(f"{name} uses {said}" in x or f".{said}" in x for x in result["refused"]), result


def test_a_kernel_has_nothing_that_triton_does_not_compile(nursery, tmp_path):
    """The interpreter would take it."""
    name = "kernels.normalise"
    repository(tmp_path)
    body = "[x for x in (x_W,)]\ndef f():\n    pass\ntry:\n    W\nexcept ValueError:\n    W\nreturn x_W, 1.0"
    carry({name: with_lines(name, body)}, tmp_path)
    refused = assignments.solution(ASSIGNMENTS[9], tmp_path, nursery)[1]
    assert sum("which Triton does not compile" in sentence for sentence in refused) >= 3, refused


def test_another_signature_and_a_file_that_is_none_are_refused(nursery, tmp_path):
    name = "tokenizer.Quantizer.teacher_inputs"
    other = text(name).replace("tokens_BL: Tensor", "tokens_BL: Tensor, more=print(1)")
    result = graded(FEW, tmp_path, nursery, {name: other})
    assert result["points"] == 0 and "another signature" in result["refused"][0]
    for content in (b"def (", b"\xff\xfe", b"x = 1", b"#" * 2**21, None):
        if content is None:     # nobody would ever write to it
            (tmp_path / "tokenizer.py").unlink()
            os.mkfifo(tmp_path / "tokenizer.py")
        else:
            (tmp_path / "tokenizer.py").write_bytes(content)
        result = grade(FEW, tmp_path, nursery)
        assert result["points"] == 0 and len(result["refused"]) == 1


def test_a_comment_at_the_margin_is_as_good_as_any(nursery, tmp_path):
    name = "tokenizer.Quantizer.teacher_inputs"
    commented = text(name).replace("        return", "# print(inputs)\n        return")
    handed_in(tmp_path, {name: commented})
    assert assignments.solution(ASSIGNMENTS[4], tmp_path, nursery) == ({name: commented}, [])
    assert assignments.normal({name: commented}) == assignments.normal({name: text(name)})


def test_only_the_bodies_travel(nursery, tmp_path):
    """Tests that always pass and a conftest that ends the process stay where they are."""
    handed_in(tmp_path, stubs(4))
    for path in (tmp_path / "tests").glob("test_*.py"):
        path.write_text("def test_psnr(): pass\n")
    (tmp_path / "tests" / "conftest.py").write_text("import os; os._exit(0)\n")
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(0)\n")
    with (tmp_path / "tokenizer.py").open("a") as file:
        file.write("\nimport os\nos._exit(0)\n")
    result = grade(ONE, tmp_path, nursery)
    assert result["points"] == 0 and not result["refused"]
    assert all("stub" in test["message"] for test in result["tests"])


def only_called(folder: Path, body: str) -> str:
    """In a folder, what `teacher_inputs` needs, with this body, and a test that calls it: a process
    starts faster on these few files than on all of ours. The name of the test."""
    name = "tokenizer.Quantizer.teacher_inputs"
    for path in (ROOT / "tokenizer.py", ROOT / "kernels.py", *ROOT.glob("support/*.py")):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    carry({name: with_lines(name, body)}, folder)
    (folder / "test_it.py").write_text(
        "from tokenizer import Quantizer\n\n\n"
        "def test_it():\n    Quantizer.teacher_inputs(None, None)\n")
    return "test_it.py::test_it"


LET_THROUGH = {   # what would happen should a rule have a hole: a body, and what the test is told
    "print('1 passed')\nimport os\nos._exit(0)": "ended before the test did",
    """
import os, pathlib, signal, subprocess
told = []
for act in (lambda: os.kill(os.getppid(), signal.SIGKILL), lambda: subprocess.run(["true"]),
            lambda: pathlib.Path("ROOT/LICENSE").unlink(), lambda: open("ROOT/LICENSE", "w")):
    try:
        act()
    except PermissionError as error:
        told.append(str(error).split(" ")[0])
raise AssertionError(told)
""": "['os.kill', 'subprocess.Popen', 'os.remove', 'open']",
    "raise SystemExit(0)": "SystemExit",
    "import os\nos.write(1, b'[null, [true, {}]]')\nos.closerange(3, 50)\nos._exit(0)":
        "ended before the test did",
    "return torch.zeros(10**12)": "memory",
}


def test_what_rules_might_let_through_gets_no_points_and_does_no_harm(nursery, tmp_path):
    """Straight to the process that runs tests, past all rules."""
    before = {path: path.read_bytes() for path in ROOT.glob("*.py")}
    for i, (body, said) in enumerate(LET_THROUGH.items()):
        test = only_called(tmp_path / str(i), body.replace("ROOT", str(ROOT)))
        result = nursery.run(tmp_path / str(i), [test], SECONDS)
        assert not result["passed"] and said in str(result["failed"]), (body, result)
    assert {path: path.read_bytes() for path in ROOT.glob("*.py")} == before
    assert (ROOT / "LICENSE").stat().st_size > 0


def test_a_loop_without_end_is_stopped(nursery, tmp_path):
    test = only_called(tmp_path, "while True:\n    pass")
    assert assignments.solution(ASSIGNMENTS[4], tmp_path, nursery)[1] == []
    result = nursery.run(tmp_path, [test], 1)
    assert not result["passed"] and "took more than 1 s" in str(result["failed"])


def test_files_are_read_as_editors_write_them(nursery, tmp_path):
    """And hints of types, a context and what Python has of its own are no reason for a refusal."""
    name = "tokenizer.Quantizer.teacher_inputs"
    source = source_of(name)
    tabs = re.sub("^(?:    )+", lambda found: "\t" * (len(found[0]) // 4), source, flags=re.MULTILINE)
    lines = ("pieces: list[Tensor] = [next(iter([tokens_BL]))]\n"
             "with torch.amp.autocast('cpu', enabled=False):\n    return pieces[0]")
    allowed = with_body(source, name, with_lines(name, lines))
    for content, same in ((source.encode("utf-8-sig"), True), (tabs.encode(), True), (allowed.encode(), False)):
        (tmp_path / "tokenizer.py").write_bytes(content)
        bodies, refused = assignments.solution(ASSIGNMENTS[4], tmp_path, nursery)
        assert not refused
        assert (assignments.normal(bodies) == assignments.normal({name: text(name)})) == same


def test_whose_folders_are_graded(tmp_path, monkeypatch, capsys):
    """Of anna the files lie further down; of bert and chris the assigned one is missing."""
    for folder in ("anna/handed in", "bert/support", "bert/tests", "chris/tests", "__MACOSX", ".idea"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("anna/handed in/tokenizer.py", "anna/helper.py", "bert/var.py", "roster.py"):
        (tmp_path / file).write_text("")
    monkeypatch.setattr(Nursery, "__enter__", lambda self: self)
    monkeypatch.setattr(Nursery, "__exit__", lambda *_: None)
    monkeypatch.setattr(Nursery, "process", SimpleNamespace(poll=lambda: None), raising=False)
    monkeypatch.setattr(assignments, "grade", lambda each, folder, _: (
        graded.append(folder), assignments.none(each, "not graded"))[1])
    graded = []
    assert [*assignments.grade_all(FEW, [tmp_path], 1)] == ["anna", "bert", "chris"]
    assert graded == [tmp_path / "anna" / "handed in", tmp_path / "bert", tmp_path / "chris"]
    for name in "bert", "chris":
        assert [*assignments.grade_all(FEW, [tmp_path / name], 1)] == [name]
    (tmp_path / "var.py").touch()
    assert "note" not in capsys.readouterr().out
    assert [*assignments.grade_all(FEW, [tmp_path], 1)] == [tmp_path.name]
    assert "folders in it hold files, too" in capsys.readouterr().out
    (tmp_path / "__MACOSX" / "anna.zip").touch()
    with pytest.raises(assignments.Mistake, match="unpack each"):
        assignments.grade_all(FEW, [tmp_path / "__MACOSX"], 1)


def test_ctrl_c_ends_grading_and_gives_nobody_points(tmp_path, monkeypatch, capsys):
    for name in ("anna", "bert", "chris"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "var.py").touch()
    killed = threading.Event()
    monkeypatch.setattr(Nursery, "__enter__", lambda self: self)
    monkeypatch.setattr(Nursery, "__exit__", lambda *_: None)
    monkeypatch.setattr(Nursery, "process", SimpleNamespace(
        poll=lambda: None, kill=killed.set), raising=False)

    def graded(assignment, folder, nursery):
        if folder.name == "anna":
            raise KeyboardInterrupt   # as in the thread that waits
        assert killed.wait(60)
        raise assignments.Mistake("crashed")

    monkeypatch.setattr(assignments, "grade", graded)
    with pytest.raises(KeyboardInterrupt):
        assignments.grade_all(FEW, [tmp_path], 2)
    assert capsys.readouterr().out == ""


def test_what_runs_tests_is_started_alike_however_the_grader_was(monkeypatch):
    """Its asserts count, its files are UTF-8, Ctrl-C does not reach it, and stderr is open."""
    started = []
    monkeypatch.setattr(assignments.subprocess, "Popen", lambda _, **how: started.append(how))
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    Nursery().__enter__()
    monkeypatch.setattr(sys, "stderr", None)
    Nursery().__enter__()
    for how in started:
        assert "PYTHONOPTIMIZE" not in how["env"] and how["env"]["PYTHONUTF8"] == "1"
        assert how["start_new_session"]
    assert [how["stderr"] for how in started] == [None, assignments.subprocess.DEVNULL]


@pytest.mark.parametrize("flag", ["--csv", "--json"])
def test_where_points_cannot_be_written_nothing_is_graded(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.setattr(assignments, "grade_all", None)
    for place, told in (("missing/file", "there is no such folder"), (".", "it is a folder")):
        monkeypatch.setattr(sys, "argv", [
            "assignments.py", "grade", "4", str(tmp_path), flag, str(tmp_path / place)])
        with pytest.raises(SystemExit) as ended:
            assignments.main()
        assert ended.value.code == 2 and told in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(sys, "argv", [
        "assignments.py", "grade", "4", str(tmp_path), flag, str(tmp_path / "file")])
    with pytest.raises(SystemExit) as ended:
        assignments.main()
    assert ended.value.code == 2 and "nothing can, in its folder" in capsys.readouterr().err


def test_names_that_are_no_utf_8_are_written(tmp_path):
    path = tmp_path / "points.csv"
    assignments.write_whole(path, "M\udcfcller,Müller\r\n")
    assert path.read_bytes() == "M\\udcfcller,Müller\r\n".encode()
    assert [*tmp_path.iterdir()] == [path]
    link = tmp_path / "link.csv"
    link.symlink_to(path)
    assignments.write_whole(link, "new")
    assert path.read_bytes() == b"new" and link.is_symlink()
    assignments.write_whole(Path(os.devnull), "nothing")
    assert not Path(os.devnull).is_file()


def test_points_are_told_and_written(nursery, tmp_path, capsys, monkeypatch):
    """A solution with one error, from the command line."""
    name = "tokenizer.Quantizer.teacher_inputs"
    handed_in(tmp_path, {name: mutants(name)[0]})
    monkeypatch.setattr(assignments, "ASSIGNMENTS", {4: FEW})
    monkeypatch.setattr(sys, "argv", ["assignments.py", "grade", "4", str(tmp_path),
                                      "--json", str(tmp_path / "points.json")])
    monkeypatch.setattr(Nursery, "__enter__", lambda self: nursery)
    monkeypatch.setattr(Nursery, "__exit__", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        assignments.main()
    result = json.loads((tmp_path / "points.json").read_text())
    printed = capsys.readouterr().out
    assert ended.value.code == 1 and 0 <= result["score"] < FEW.of
    assert f"{result['score']} of {FEW.of} points\n" in printed
    for test in result["tests"]:
        assert f"{test['score']:3} of {test['max_score']:2}  {test['name']}" in printed
        assert bool(test["output"]) == (test["status"] == "failed")


@pytest.mark.long
def test_a_class_is_graded_whatever_happens_to_one(tmp_path, capsys, monkeypatch):
    """One command, several at once: right, copied, wrong, refused, crashing, no folder of ours."""
    name = "tokenizer.Quantizer.teacher_inputs"
    renamed = text(name).replace("inputs", "x").replace("def teacher_x", "def teacher_inputs")
    bodies = {"anna": text(name), "bert": mutants(name)[0], "cleo": with_lines(name, "open('x')"),
              "dora": mutants(name)[0].replace("tokens_Bl", "t"), "emil": renamed}
    for student, body in bodies.items():
        (tmp_path / "class" / student).mkdir(parents=True)
        source = with_body(source_of(name), name, body)
        (tmp_path / "class" / student / path_of(name)).write_text(source)
    (tmp_path / "class" / "fritz").mkdir()
    real = assignments.solution

    def solution(assignment, folder, nursery):
        if folder.name == "dora":
            nursery.process.kill()
        return real(assignment, folder, nursery)

    one = replace(ONE, points={next(iter(ONE.points)): 3})
    monkeypatch.setattr(assignments, "solution", solution)
    monkeypatch.setattr(assignments, "ASSIGNMENTS", {4: one})
    monkeypatch.setattr(sys, "argv", [
        "assignments.py", "grade", "4", str(tmp_path / "class"), "--csv", str(tmp_path / "class.csv"),
        "--json", str(tmp_path / "class.json"), "--jobs", "2"])
    with pytest.raises(SystemExit) as ended:
        assignments.main()
    assert ended.value.code == 1
    lines = {line["name"]: line for line in csv.DictReader((tmp_path / "class.csv").open())}
    assert {student: line["points"] for student, line in lines.items()} == {
        "anna": "3", "bert": "0", "cleo": "0", "dora": "0", "emil": "3", "fritz": "0"}
    assert lines["anna"]["identical to"] == lines["emil"]["identical to"] == "the original"
    assert "uses open" in lines["cleo"]["refused"] and "crashed" in lines["dora"]["refused"]
    assert "cannot be read" in lines["fritz"]["refused"] and not lines["bert"]["refused"]
    assert json.loads((tmp_path / "class.json").read_text())["anna"]["score"] == 3
    assert "identical to the original" in capsys.readouterr().out


def test_copies_are_known_by_what_they_do():
    name = "tokenizer.Quantizer.forward"
    same = text(name).replace("residual_BlC", "r").replace("    # Straight", "    # straight")
    other = text(name).replace("f_BCSS.detach()", "f_BCSS")
    assert assignments.normal({name: same}) == assignments.normal({name: text(name)})
    assert assignments.normal({name: other}) != assignments.normal({name: text(name)})


CHANGING = [    # what no rule forbids, and all that a test compares with might be lost by
    "tokens_BL.zero_()", "self.codebook_VC.zero_()", "self.phi_of_scale.reverse()", "self.half()",
]


@pytest.mark.parametrize("change", CHANGING)
def test_a_function_that_changes_what_it_is_given_is_seen(change):
    def teacher_inputs(self, tokens_BL):
        inputs = self.teacher_inputs(tokens_BL)
        exec(change)
        return inputs

    quantizer = Quantizer(TokenizerConfig(**PRESETS["tiny"].tokenizer_shape(3))).requires_grad_(False)
    quantizer.codebook_VC.fill_(1)
    tokens_BL = torch.ones(1, 103, dtype=torch.int64)
    with pytest.raises(AssertionError, match="teacher_inputs changes what it is given"):
        watched(teacher_inputs, "teacher_inputs")(quantizer, tokens_BL)


def test_what_is_changed_and_not_given_for_it_costs_points(nursery, tmp_path):
    """With the right result, for the test to compare with."""
    name = "tokenizer.Quantizer.teacher_inputs"
    right = [ast.unparse(x) for x in find(source_of(name), name).body[1:]]
    body = [*right[:-1], "inputs = " + right[-1].removeprefix("return "), CHANGING[0], "return inputs"]
    handed_in(tmp_path, {name: with_lines(name, "\n".join(body))})
    assert assignments.solution(FEW, tmp_path, nursery)[1] == []
    result = nursery.run(tmp_path, [next(iter(FEW.points))], SECONDS, [name])
    assert "teacher_inputs changes what it is given" in str(result["failed"]), result


def test_a_file_that_is_not_there_is_told_beside_those_that_are(nursery, tmp_path):
    (tmp_path / "Tokenizer.ipynb").write_text("{}")
    (tmp_path / "tokenizer.py").symlink_to(ROOT / "tokenizer.py")   # the lecturer's own
    for left in ("`Tokenizer.ipynb` and `tokenizer.py`", "`Tokenizer.ipynb`"):
        _, refused = assignments.solution(FEW, tmp_path, nursery)
        assert refused == [f"tokenizer.py cannot be read: there is no such file, but {left}"]
        (tmp_path / "tokenizer.py").unlink(missing_ok=True)
    (tmp_path / "tokenizer.py").write_text("#" * 2**20 + "\n")
    _, refused = assignments.solution(FEW, tmp_path, nursery)
    assert refused == ["tokenizer.py cannot be read: it has more than a megabyte"]


def test_what_a_hand_out_quotes_may_be_used_and_a_method_s_name_is_no_variable_s():
    name = "tokenizer.Quantizer.forward"
    body = with_lines(name, "tokens = nearest_code(1, 2)\nreturn tokens")
    reader = Reader(name, body, source_of(name), [name], ["tokens"], ["kernels.nearest_code"])
    assert reader.sentences == []
    reader = Reader(name, body, source_of(name), [name], ["tokens"], [])
    assert reader.sentences == [f"{name} uses nearest_code, which no solution needs"]


# -------------------------------------------------------------------------------------------------
# Planted errors


def test_errors_are_planted_in_every_function():
    assert PLANTED.keys() == BODIES.keys()
    for name, planted in PLANTED.items():
        assert len({new for _, new in planted}) >= 5, name
        for mutant in mutants(name):
            assert assignments.normal({name: mutant}) != assignments.normal({name: text(name)}), \
                f"{name}: nothing but the docstring is another"


def of_kind(name: str, pieces: tuple[tuple[str, str], ...]) -> str:
    """A function of the source with one error in it, which may take several changes."""
    changed = text(name)
    for old, new in pieces:
        assert changed.count(old) == 1, (name, old)
        changed = changed.replace(old, new)
    return changed


def test_errors_of_every_kind_are_planted():
    assert KINDS.keys() == ASSIGNMENTS.keys()
    for number, planted in KINDS.items():
        assert {IN_PLACE, EDGE, EASY} <= {kind for kind, *_ in planted}
        for _, name, *pieces in planted:
            assert name in ASSIGNMENTS[number].bodies
            assert ast.parse(textwrap.dedent(of_kind(name, pieces)))


@pytest.mark.long
@pytest.mark.parametrize("number", KINDS)
def test_errors_of_every_kind_cost_points(number, nursery):
    for kind, name, *pieces in KINDS[number]:
        assert first_failure(name, of_kind(name, pieces), nursery), (kind, pieces)


@pytest.mark.long
@pytest.mark.parametrize("name", PLANTED)
def test_every_planted_error_costs_points(name, nursery):
    for (_, new), mutant in zip(PLANTED[name], mutants(name)):
        assert first_failure(name, mutant, nursery), new


def test_copies_have_what_a_source_reads(tmp_path):
    repository(tmp_path)
    assert (tmp_path / "support" / "explorer.html").is_file()
