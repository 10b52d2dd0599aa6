"""What all pages share: which runs they take, when a claim holds, and what goes on from what."""
import importlib
import re
import shutil
from argparse import ArgumentParser
from dataclasses import replace
from math import inf

import pytest
import torch
from program import ROOT, ran

import papers
from papers import (
    FILTERED, UNFILTERED, Claim, open_runs, parser_of, say_evaluations, say_figures,
)
from papers.tuning import Tuning, kept_images, kept_tokens
from sample import Sampling, load_run
from support.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from support.cli import Parser, UserError
from support.devices import choose_machine
from support.evaluation import Evaluation, Quality
from train import var_optimizers


@pytest.fixture
def copies(judged, tmp_path):
    """Two runs that call themselves the same but for their seeds."""
    folders = []
    for seed in range(2):
        folder = tmp_path / f"shapes-{seed}"
        shutil.copytree(judged, folder, ignore=lambda _, names: {"papers"} & set(names))
        changed(folder, lambda content, seed=seed: content["made_with"].update(seed=seed))
        folders.append(folder)
    return folders


def changed(folder, change, stage="var", kind="transformer"):
    content = load_checkpoint(folder / f"{stage}.pt", kind)
    change(content)
    del content["kind"]
    save_checkpoint(folder / f"{stage}.pt", kind, **content)


def opened(*folders, count=40, flags=()):
    return open_runs(parser_of("hmar", "").parse_args(
        ["--run", *map(str, folders), "--device", "cpu", "--count", str(count), *flags]))


def test_runs_differ_in_their_seed_alone(copies):
    runs = opened(*copies, flags=["--resume"])
    assert [run.settings.seed for run in runs] == [0, 1]
    for run, folder in zip(runs, copies):
        content = load_checkpoint(folder / "var.pt", "transformer")
        assert vars(run.settings.preset) == content["preset"]
        assert run.settings.resume and run.settings.out == run.folder == folder
    with pytest.raises(UserError, match="have the same seed, 1"):
        opened(copies[1], copies[1])
    for stage, kind, values in (
            ("var", "transformer", {"var_lr": 0.5}), ("tokenizer", "tokenizer", {"muon": False})):
        kept = (copies[1] / f"{stage}.pt").read_bytes()
        changed(copies[1], lambda content: content["made_with"].update(values), stage, kind)
        with pytest.raises(UserError, match="shapes-1 and .*shapes-0 differ in more than their"):
            opened(*copies)
        (copies[1] / f"{stage}.pt").write_bytes(kept)
    changed(copies[1], lambda content: content["classes"].reverse())
    with pytest.raises(UserError, match="differ in more than their"):
        opened(*copies)


def test_a_page_has_the_tokenizer_as_it_was_trained(copies, monkeypatch):
    """sample.py casts its decoder on a GPU, and the run's tokens would seem to be of another."""
    def placed(tokenizer, machine):
        tokenizer.cast_decoder(torch.bfloat16)
        return tokenizer

    monkeypatch.setattr("sample.placed", placed)
    (run,) = opened(copies[0])
    assert {weight.dtype for weight in run.tokenizer.parameters()} == {torch.float32}
    assert not run.tokenizer.training and len(kept_tokens(run)[0])


@pytest.mark.parametrize("change, message", [
    (lambda content: content.update(training={"step": 3}), "var.pt is not trained to its end"),
    (lambda content: content.update(classes=["all"]), "has one class"),
])
def test_a_run_that_cannot_be_judged_by(copies, change, message):
    changed(copies[0], change)
    with pytest.raises(UserError, match=message):
        opened(copies[0])


@pytest.mark.parametrize("name, values", [("scale", {"scales": (1,)}), ("code", {"vocabulary": 1})])
def test_a_run_without_anything_to_compare(judged, monkeypatch, name, values):
    run = load_run(judged, choose_machine("cpu"))
    run.model.config = replace(run.model.config, **values)
    monkeypatch.setattr("papers.load_run", lambda *_: run)
    with pytest.raises(UserError, match=f"has one {name}, and the pages compare several"):
        opened(judged)


@pytest.mark.parametrize("count, told", [(41, "it takes an even number"), (200, "there are 50 held-out")])
def test_as_many_held_out_images_as_there_are(judged, count, told):
    with pytest.raises(UserError, match=f"{count} images cannot be judged: .*{told}"):
        opened(judged, count=count)


@pytest.mark.parametrize("figure, verdict", [
    ([2.0, 2.1, 2.2], "holds"),           # 1.9 to 2.3
    ([1.1, 1.2, 1.3], "undecided"),       # from 1.0, just outside
    ([0.5, 0.6, 0.7], "undecided"),
    ([0.0, 0.1, 0.2], "falsified"),       # to 0.3, just inside
    ([-3.0, 0.1, 3.2], "undecided"),
    ([9.0, 9.0], "no verdict, which takes three runs"),
])
def test_verdicts_take_two_standard_deviations(figure, verdict):
    assert Claim("more", holds=(1.002, inf), false=(-inf, 0.301)).verdict(figure) == verdict


# What each page was measured with, beside the flags of all pages; and its claims: over or under
# what they hold, and after a stroke where they are false, if that is not the same.
MEASURED = {
    "scaling": ("1000 (1, 2, 3, 4, 6, 8) 1000", "<-0.99 <2 <-0.99"),
    "hmar": ("1000 200 0.003", ">3 >0 <1 >3 >0"),
    "hmar_passes": ("1000 200 0.003 None", ">0 >0 >0 >0 >5"),
    "hmar_markov": ("1000 600", "<0.02 >0 <0"),
    "drafting": ("500 None", "<2 <0.6 >-2 <0"),
    "cca": ("1000 (1, 10) 200 0.001", ">10 >-3 >0"),
    "control": ("1000 500 ['data:0', 'data:4', 'data:6', 'data:8']", ">0.6/0.4 >0/-3 >0.66667"),
    "watermark": ("1000 2.0", ">95 >-2 >0 >90"),
    "roles": ("500", ">0.5/0.2 >0.5/0.2 <0.01 <0"),
    "erase": ("500 heart 100", "<10 >-2 <0.5 >0.5 <0"),
    "noisy_context": ("300 0.2 near early 100 0.003", ">3 <1 >1 <0"),
    "clusters": ("500 200 0.003 16", ">1 >0 >0 >3 >3 >90"),
    "flexvar": ("200 1000 1550 False", ">-3 >20 >-3 >-10 >0 >-3 >-2"),
    "super_resolution": ("200 120", ">1 >5 >0 >-0.2 >0.5 >0.5"),
    "one_pass": ("300 250 0.01 3", ">70 <30 <0.4 >0 >0.33333 >0"),
    "linear_past": ("500 200 0.003", ">0.01 >0.5 >-2"),
    "low_pass": ("300 250 250", ">3 >-0.2 >3 >-0.2"),
}


@pytest.mark.parametrize("name", MEASURED)
def test_pages_are_as_they_were_measured(monkeypatch, name):
    """Else the figures of papers/README.md are of something else; it counts their lines, too."""
    folder = ROOT / "papers"
    text = (folder / "README.md").read_text()
    (row,) = (row for row in text.splitlines() if row.startswith(f"| [{name}]({name}.py)"))
    (section,) = (part for part in text.split("\n## ") if part.startswith(f"{name}:"))
    lines = [len((folder / f"{name}.py").read_text().splitlines())]
    of_page = r"(\d+)\s+lines"
    of_another = r"and\s+(\d+)\s+(?:in|of)\s+(?:the\s+model\s+in\s+)?\[?(\w+\.py)"
    for count in re.findall(of_page, section):
        assert int(count) == lines[0]
    for count, beside in re.findall(of_another, section):
        lines.append(len((folder / beside).read_text().splitlines()))
        assert int(count) == lines[-1]
    assert row.split("|")[-2].strip() == " + ".join(map(str, lines))
    given = []

    def parse_args(parser):
        given.append(vars(ArgumentParser.parse_args(parser, [])))
        raise SystemExit

    monkeypatch.setattr(Parser, "parse_args", parse_args)
    ran(f"papers.{name}")
    own = [value for flag, value in given[0].items()
           if flag not in ("run", "resume", "device", "precision")]
    flags, claims = MEASURED[name]
    assert " ".join(map(str, own)) == flags
    page = importlib.import_module(f"papers.{name}")
    for claim, said in zip(page.CLAIMS, claims.split(), strict=True):
        holds, _, false = said[1:].partition("/")
        beyond = 1e-5 if said[0] == ">" else -1e-5
        assert claim.verdict([float(holds) + beyond] * 3) == "holds"
        assert claim.verdict([float(false or holds) - beyond] * 3) == "falsified"


# And what is no flag.
NUMBERS = {
    "attacks": {"LR": 0.003, "AGAIN": 20},
    "cca": {"BETA": 0.04, "GUIDANCE": (0.5, 1, 2, 4)},
    "drafting": {"SMALL": {"depth": 2, "width": 48, "heads": 3}},
    "erase": {"ETA": 2},
    "flexvar": {
        "LISTS": ((1, 4, 8), (1, 2, 4, 8), (1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 5, 6, 7, 8)),
        "SIZES": ((1, 2, 4, 6), (1, 2, 3, 5, 8, 10), (1, 2, 3, 5, 8, 12)),
        "SIDE": 8,
    },
    "mistakes": {"NEAREST": 16},
    "noisy_context": {
        "MISTAKES": 100, "TIMES": {"always": (0, 1), "early": (0, 0.5), "late": (0.5, 1)}},
    "roles": {"CALIBRATION": 200, "RANDOM": 8},
    "small_images": {
        "BLUR": (0, 0.7, 1.4, 2.1), "NOISE": (0, 0.05, 0.1, 0.2), "QUALITY": (100, 60, 30, 10)},
    "student": {"FLOW_STEPS": 16},
    "watermark": {"POOLS": (1, 4, 16, 64)},
}


def test_numbers_are_as_they_were_measured():
    for name, numbers in NUMBERS.items():
        page = importlib.import_module(f"papers.{name}")
        assert {key: getattr(page, key) for key in numbers} == numbers
    assert (FILTERED, UNFILTERED) == (Sampling(2, 900, 0.6), Sampling(0, 0, 1))


def test_differences_are_taken_in_each_run(capsys):
    by_run = [{"a": [1.0, 5.0], "b": [2.0, 4.9], "c": [1.5, 5.0], "d": [0.0, 5.0]},
              {"a": [3.0, 5.0], "b": [4.1, 5.1], "c": [4.5, 5.0], "d": [1.9, 5.0]},
              {"a": [9.0, 5.0], "b": [9.9, 5.2], "c": [11.5, 5.0], "d": [8.1, 5.0]}]
    figures = say_figures(("", "x", "y"), by_run, 2, base="a")
    assert figures["b"].tolist() == [[2.0, 4.1, 9.9], [4.9, 5.1, 5.2]]
    *_, line, other, less = capsys.readouterr().out.splitlines()
    assert line.split("  ")[0] == "b: difference"
    assert "1.00 ± 0.10 *" in line and line.rstrip().endswith("0.07 ± 0.15")
    assert "1.50 ± 1.00" in other and "*" not in other   # one and a half standard deviations
    assert "-1.00 ± 0.10 *" in less
    say_figures(("", "x", "y"), by_run[:2], 2, base="a")
    assert "*" not in capsys.readouterr().out   # of two runs nothing is an effect


def test_figures_of_evaluations(capsys):
    """Means over the seeds, without filters and with them; rows differ from the first."""
    unfiltered, filtered = ([Quality(x, {}, 30 * x, 0.9, x / 2, 1.0) for x in shares]
                            for shares in ((0.2, 0.8, 0.8), (0.1, 0.1, 0.4)))
    found = Evaluation(1.0, filtered[0], filtered[0], 20.0, 7.0, 0.1, filtered, unfiltered)
    figures = say_evaluations({"a": [found, found], "b": [found, found]})
    for name in ("a", "b"):
        assert figures[name].tolist() == 2 * [pytest.approx([7, 60, 30, 18, 20, 10, 6])]
    said = capsys.readouterr().out
    assert "\nb: difference" in said and "\na: difference" not in said


def test_what_was_tuned_goes_on_only_from_the_same_weights(copies, capsys):
    (run,) = opened(copies[1])
    run.settings = replace(run.settings, preset=replace(run.settings.preset, var_batch=6, ema=0.5))

    def tuning(lr=0.003, resume=True, steps=2):
        settings = replace(run.settings, resume=resume)
        return Tuning(replace(run, settings=settings), run.model, "some", steps, lr)

    first = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    stage = tuning(resume=False)
    assert stage.settings.seed == 1   # the run's
    assert stage.made_with["tokenizer"] == fingerprint(run.tokenizer)
    optimizers = var_optimizers(run.model, stage.settings.preset, torch.float32)
    assert stage.peaks == [[group["lr"] for group in each.param_groups] for each in optimizers]
    assert stage.settings.preset == replace(run.settings.preset, var_steps=2, var_lr=0.003)
    assert stage.batch == 6   # the transformer's; the tokenizer's is another
    assert stage.decay == run.settings.preset.ema == 0.5
    assert len(stage.held_out_rows) == len(run.held_out) < len(stage.rows)
    made_with = load_checkpoint(run.folder / "var.pt", "transformer")["made_with"]
    assert stage.made_with["data set"] == kept_images(run).digest == made_with["data set"]
    tuned = stage.run().state_dict()
    run.model.load_state_dict(first)   # it was changed
    again = tuning()
    for name, weight in again.run().state_dict().items():
        assert torch.equal(weight, tuned[name])
    assert f"{run.folder / 'papers' / 'some' / 'var.pt'} is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="--lr 0.003 and not 0.5"):
        tuning(lr=0.5).run()
    with pytest.raises(UserError, match="--steps 2 and not 3"):
        tuning(steps=3).run()
    run.model.head.bias.data += 1
    with pytest.raises(UserError, match="another first weights"):
        tuning().run()
    run.tokenizer.quantizer.codebook_VC.data += 1
    with pytest.raises(UserError, match="tokens.pt .*the tokens are of another tokenizer"):
        kept_tokens(run)


def test_the_time_a_page_took_is_in_minutes(monkeypatch, capsys):
    monkeypatch.setattr(papers.time, "monotonic", lambda: papers.STARTED + 150)
    papers.say_verdicts([], [])
    assert capsys.readouterr().out == "2.5 minutes\n"
