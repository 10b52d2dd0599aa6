"""What happens to runs and files: stopping, killing, full disks, damage, malice. Nothing is lost,
and nothing is let in."""
from __future__ import annotations

import errno
import io
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, replace
from http.client import IncompleteRead
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from program import (
    ROOT, TINY, Killed, at_step, damaged, draws, kill, ran, read_or_refused, refused, run,
    same_run, tokenizer_stage,
)

import sample
import train
from papers.tuning import kept_images
from support import cli
from support.checkpoint import (
    check_made_with, download, fingerprint, load_checkpoint, read_tensors, save_checkpoint,
    save_whole,
)
from support.cli import Interrupt, UserError
from support.data import load_held_out
from support.devices import choose_machine
from support.evaluation import kept_classifier
from support.presets import VARPreset, check_begun, check_folder, chosen_preset, training_options
from support.watching import WatchedLog, read_log
from tokenizer import Tokenizer, TokenizerConfig


@pytest.fixture(autouse=True)
def usual_signals():
    """In the background of a shell, Python finds SIGINT ignored, and so would its children."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


# Stopping and going on


def test_interrupted_and_resumed_equals_uninterrupted(folder, finished, tmp_path):
    """And so do the stages, each alone."""
    flags = ["--data", folder, "--out", tmp_path, *TINY, "--resume"]
    for steps, stage, stop, next_command in ((12, "tokenizer", signal.SIGTERM, "codes data:0"),
                                             (11, "var", signal.SIGINT, "progress")):
        with at_step(steps, 3, lambda: signal.raise_signal(stop)):
            result = run("train.py", *flags, "--stage", stage)
        assert result.returncode == 130 and "--resume" in result.stdout
        content = torch.load(tmp_path / f"{stage}.pt", weights_only=True)
        assert content["training"]["step"] == 4   # the signal is obeyed within ten steps
        if stage == "tokenizer":
            assert "not trained to its end" in refused("train.py", *flags, "--stage", "var")
        said = ran("train.py", *flags, "--stage", stage)
        assert f"then try python sample.py {next_command} --run {tmp_path}\n" in said
    assert same_run(tmp_path, finished)


def test_a_training_that_is_stopped_is_drawn(folder, tmp_path):
    """Where nothing is measured, too."""
    flags = ["--data", folder, "--out", tmp_path, *TINY, "--stage", "tokenizer"]
    with at_step(12, 10, lambda: signal.raise_signal(signal.SIGINT)):
        assert run("train.py", *flags).returncode == 130
    assert torch.load(tmp_path / "tokenizer.pt", weights_only=True)["training"]["step"] == 11
    assert {"reconstructions.png", "curves.png"} <= {path.name for path in tmp_path.iterdir()}


def test_killed_and_resumed_equals_uninterrupted(folder, finished, tmp_path):
    """At steps before and after a checkpoint, in the tokenizer's training and the other; and once
    from outside, a process of its own."""
    flags = ["--data", folder, "--out", tmp_path, *TINY, "--checkpoint-every", 4, "--resume"]

    def killed_at(steps: int, step: int) -> None:
        with at_step(steps, step, kill), pytest.raises(Killed):
            run("train.py", *flags)

    killed_at(12, 3)
    command = [sys.executable, ROOT / "train.py", *flags]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL) as process:
        deadline = time.time() + 240
        while not (tmp_path / "tokenizer.pt").exists():
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    sample.load_tokenizer(tmp_path / "tokenizer.pt")
    killed_at(12, 11)
    killed_at(11, 2)
    killed_at(11, 10)
    ran("train.py", *flags)
    assert same_run(tmp_path, finished)


@pytest.mark.long
def test_a_hundred_kills(folder, finished, tmp_path):
    """Each at a random moment of a training in a process of its own, and then it goes on."""
    draw = random.Random(0)
    for trial in range(100):
        out = tmp_path / str(trial)
        flags = ["--data", folder, "--out", out, *TINY, "--checkpoint-every", 2, "--resume"]
        command = [sys.executable, ROOT / "train.py", *flags]
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as process:
            time.sleep(draw.uniform(3, 12))   # starting takes some of it, drawing the pictures, too
            process.kill()
        ran("train.py", *flags)
        assert same_run(out, finished), trial
        shutil.rmtree(out)


def test_a_full_disk_leaves_the_old_checkpoint(finished, tmp_path):
    """The limit on a file's size fails a write as a full disk does: in its middle."""
    path = tmp_path / "tokenizer.pt"
    before = (finished / "tokenizer.pt").read_bytes()
    path.write_bytes(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match="is what it was before.* File too large"):
            save_checkpoint(path, "tokenizer", model=torch.zeros(len(before)))
        with pytest.raises(UserError, match="new.pt cannot be written: .* File too large"):
            save_checkpoint(tmp_path / "new.pt", "tokenizer", model=torch.zeros(len(before)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["tokenizer.pt"]


def test_resuming_with_other_flags_is_refused(folder, finished, tmp_path):
    shutil.copy(finished / "tokenizer.pt", tmp_path)
    resume = ("train.py", "--data", folder, "--out", tmp_path, *TINY, "--resume")
    assert "made with --vocabulary 32 and not 16" in refused(*resume, "--vocabulary", 16)
    assert "--seed 0 and not 1" in refused(*resume, "--seed", 1)
    assert "--tokenizer-steps 12 and not 50" in refused(*resume, "--tokenizer-steps", 50)
    shutil.copy(finished / "var.pt", tmp_path)
    assert "--muon True and not False" in refused(*resume, "--no-muon")
    assert "--depth 1 and not 2" in refused(*resume, "--depth", 2)
    other = write_other_tokenizer(finished, tmp_path / "other.pt")
    assert "is another tokenizer than" in refused(*resume, "--tokenizer", other)
    (tmp_path / "tokenizer.pt").unlink()
    assert "made with another tokenizer, and goes on only as it began" in refused(*resume, "--tokenizer", other)


def write_other_tokenizer(finished: Path, path: Path) -> Path:
    """One of the same shape, but another."""
    tokenizer = Tokenizer(sample.load_tokenizer(finished / "tokenizer.pt").config)
    save_checkpoint(path, "tokenizer", config=asdict(tokenizer.config),
                    model=tokenizer.state_dict())
    return path


def test_resuming_with_other_images_is_refused_and_changes_nothing(folder, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "cat" / "00.jpg").unlink()   # it is held out
    names = ["held_out.pt", "tokens.pt"]
    before = [(out / name).read_bytes() for name in names]
    for stage in "all", "var":
        told = refused(
            "train.py", "--data", data, "--out", out, *TINY, "--resume", "--stage", stage)
        assert "made with another data set (or of a folder other files, --stream" in told
        assert [(out / name).read_bytes() for name in names] == before


@pytest.mark.parametrize("stage, flag, told", [
    ("all", "--image-size", "--image-size 8 and not 16"), ("tokenizer", "--seed", "--seed 0 and not 16"),
    ("var", "--seed", "--seed 0 and not 16"), ("var", "--var-steps", "--var-steps 11 and not 16")])
def test_resuming_with_other_values_is_refused_before_data_is_read(folder, finished, tmp_path, monkeypatch, stage,
                                                                    flag, told):
    """What is decoded for other values takes the place of what was."""
    monkeypatch.setattr(train, "load_data", pytest.fail)
    changed = [flag, 16] + ["--scales", "1,2,8"] * (flag == "--image-size")
    assert told in refused(
        "train.py", "--data", folder, "--out", finished, *TINY, *changed, "--resume", "--stage", stage)


def test_what_was_white_for_the_tokenizer_is_white_for_the_transformer(tmp_path, monkeypatch):
    root = tmp_path / "data"
    for name in "ab":
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(root / name / f"{i}.tif")
    flags = ["--data", root, *TINY, "--tokenizer-steps", 1, "--var-steps", 1]
    ran("train.py", *flags, "--out", tmp_path / "run", "--stage", "tokenizer", "--white-level", 4095)
    ran("train.py", *flags, "--out", tmp_path / "run", "--stage", "var")
    for stage in "all", "tokenizer", "var":   # which goes on with the same
        ran("train.py", *flags, "--out", tmp_path / "run", "--stage", stage, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_data", pytest.fail)
        for flag, told in (("--white-level", "4095 and not 1"), ("--channels", "3 and not 1")):
            said = refused("train.py", *flags, "--out", tmp_path / "run", "--resume", flag, 1)
            assert f"{flag} {told}" in said
    ran("train.py", *flags, "--out", tmp_path / "other", "--tokenizer", tmp_path / "run" / "tokenizer.pt")
    for out in "run", "other":
        assert (load_held_out(tmp_path / out)[0].tensors[0] == 255).all()
        for name, kind in (("var", "transformer"), ("tokenizer", "tokenizer")):
            assert load_checkpoint(tmp_path / out / f"{name}.pt", kind)["white"] == 4095
    ran("train.py", *flags, "--out", tmp_path / "own", "--tokenizer", tmp_path / "run" / "tokenizer.pt",
        "--white-level", 8190)   # of other data
    assert (load_held_out(tmp_path / "own")[0].tensors[0] == 128).all()
    ran("train.py", *flags, "--out", tmp_path / "own", "--stage", "var", "--resume")   # with its own white


def test_images_of_another_data_set_are_not_taken_for_the_runs_own(folder, finished, tmp_path, capsys):
    """As where a second stage on other data was stopped, or files were copied."""
    out = shutil.copytree(finished, tmp_path / "run")
    names = "held_out.pt", "train_images.pt"
    for name in names:
        content = torch.load(finished / name, weights_only=True)
        torch.save({**content, "data_set": "another"}, out / name)
    run = sample.load_run(out, choose_machine("cpu"))
    advice = "train.py --stage var --resume, with its --data, writes it anew"
    told = "is of other images than the transformer was trained on"
    assert f"note: {out / 'held_out.pt'} {told}, and is left out; {advice}\n" in capsys.readouterr().out
    assert run.held_out is None
    with pytest.raises(UserError, match=re.escape(f"{out / 'train_images.pt'} {told}; {advice}")):
        kept_classifier(run)
    with pytest.raises(UserError, match="train_images.pt is of other images than the run was trained on"):
        kept_images(run)
    ran("train.py", "--data", folder, "--out", out, *TINY, "--stage", "var", "--resume")   # which is good advice
    for name in names:
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    content = torch.load(finished / "held_out.pt", weights_only=True)
    torch.save({**content, "data_set": "another", "classes": ["horse", "pig"]}, out / "held_out.pt")
    run = sample.load_run(out, choose_machine("cpu"), alone=True)   # of which there are others' names
    assert sample.load_images(run, ["data:0"]).names == ["horse 0"]
    for name in "data_set", "classes":   # as runs had it before
        del content[name]
    torch.save(content, out / "held_out.pt")
    assert sample.load_run(out, choose_machine("cpu")).classes == ["cat", "dog"]
    run = sample.load_run(out, choose_machine("cpu"), alone=True)
    assert sample.load_images(run, ["data:0"]).names == ["cat 0"]


def test_a_training_goes_on_with_the_tokens_that_it_began_with(folder, finished, tmp_path):
    """In another precision they might be others."""
    out = shutil.copytree(finished, tmp_path / "run")
    before = (out / "tokens.pt").read_bytes()
    ran("train.py", "--data", folder, "--out", out, *TINY, "--precision", "bf16", "--resume")
    assert (out / "tokens.pt").read_bytes() == before
    (out / "var.pt").unlink()
    ran("train.py", "--data", folder, "--out", out, *TINY, "--precision", "bf16", "--resume",
        "--var-steps", 1)
    assert (out / "tokens.pt").read_bytes() != before


def test_a_tokenizer_of_another_run_is_copied(folder, finished, tmp_path):
    """It decides what the presets' flags for tokenizers would, and those that contradict it are
    named."""
    flags = ["--data", folder, "--out", tmp_path, *TINY, "--var-steps", 2,
             "--tokenizer", finished / "tokenizer.pt"]
    without_shape = ["--data", folder, "--out", tmp_path, *TINY[TINY.index("--tokenizer-steps"):],
                     "--var-steps", 2, "--tokenizer", finished / "tokenizer.pt"]
    for flag, value, has in (("--vocabulary", 64, 32), ("--tokenizer-width", 16, 8),
                             ("--image-size", 16, 8)):
        result = run("train.py", *flags, flag, value)
        told = f"{flag} {value} is not that of the tokenizer, which has {has}"
        assert told in result.stderr and "note: images are" not in result.stdout
    assert "note: images are of side 8, as the tokenizer's are" in ran("train.py", *without_shape)
    assert (tmp_path / "samples.png").exists()
    ran("sample.py", "codes", "data:0", "--run", tmp_path)   # the copy knows the classes
    told = refused("train.py", "--data", folder, "--out", tmp_path, *TINY, "--resume")
    assert "is a copy, and is not trained further; --resume --stage var goes on" in told
    (tmp_path / "var.pt").unlink()
    ran("train.py", "--data", folder, "--out", tmp_path, *TINY, "--var-steps", 2, "--resume",
        "--stage", "var")


def test_a_loss_that_is_no_number_stops_the_run(folder, tmp_path):
    command = ("train.py", "--data", folder, "--out", tmp_path, *TINY, "--stage", "tokenizer",
               "--precision", "fp32", "--tokenizer-lr", "1e30")
    told = refused(*command)
    assert "the tokenizer loss became" in told and "there is no checkpoint yet" in told
    told = refused(*command, "--warmup", 0, "--checkpoint-every", 1)
    assert "the last good checkpoint, of step 1, is" in told
    weights = torch.load(tmp_path / "tokenizer.pt", weights_only=True)["training"]["model"]
    assert all(weight.isfinite().all() for weight in weights.values())


def spoil(stage: train.TokenizerStage, weight: torch.nn.Parameter, step: int) -> None:
    """From a step on the loss is finite, but its gradient is 0 times infinity."""
    loss = stage.loss

    def spoiled(*arguments):
        total, to_log = loss(*arguments)
        if stage.step >= step:
            total = total + 0 * (weight * 0).sum().sqrt()
        return total, to_log

    stage.loss = spoiled


def test_a_gradient_that_is_no_number_is_never_saved(tmp_path):
    stage = tokenizer_stage(tmp_path, "--checkpoint-every", 1)
    spoil(stage, stage.model.encoder.conv_in.weight, 2)
    with pytest.raises(UserError, match="at step 3 .* gradient nan .* checkpoint, of step 2"):
        stage.run()
    saved = torch.load(stage.path, weights_only=True)["training"]
    assert saved["step"] == 2 and all(x.isfinite().all() for x in saved["model"].values())


# Of a loss in which nothing overflows at first.
FP16 = ["--precision", "fp16", "--smaller-weight", 0, "--edge-weight", 1]


def overflow(stage: train.TokenizerStage, steps: set[int]) -> None:
    """In the first micro-batch of these steps a gradient is infinite if it is scaled, and the loss
    finite."""
    loss = stage.loss
    weight = stage.model.encoder.conv_in.weight
    done = set()

    def spoiled(*arguments):
        total, to_log = loss(*arguments)
        if stage.step in steps - done:
            done.add(stage.step)
            total = total + 0.9 * torch.finfo().max * (weight - weight.detach()).sum()
        return total, to_log

    stage.loss = spoiled


def weights_of(stage: train.TokenizerStage) -> list[torch.Tensor]:
    return [p.detach().clone() for p in stage.model.parameters()]


def test_a_step_whose_gradient_overflows_in_fp16_is_left_out(tmp_path):
    flags = [*FP16, "--grad-accumulation", 2, "--adversarial-weight", 0.4, "--adversarial-from", 0,
             "--discriminator-width", 8, "--checkpoint-every", 1]
    stage = tokenizer_stage(tmp_path, *flags, tokenizer_steps=21)
    overflow(stage, {10, 11})   # the first would be logged
    moments, weights, scales = [], [], []
    save = stage.save

    def noted(finished):
        if stage.step in (10, 11, 12, 13):
            save(finished)
            saved = torch.load(stage.path, weights_only=True)["training"]
            weights.append(weights_of(stage) + list(saved["helpers"].values()))
            moments.append([x.clone() for each in saved["optimizers"] for state in
                            each["state"].values() for x in state.values()])
            scales.append(saved["loss_scale"]["scale"])

    stage.save = noted
    stage.run()
    assert scales == [2**16, 2**15, 2**14, 2**14]
    for kept in (moments, weights):
        same = [all(map(torch.equal, before, after)) for before, after in pairwise(kept)]
        assert same == [True, True, False]
    lines = [x for x in read_log(tmp_path / "log.jsonl") if x["split"] == "train"]
    assert [x["step"] for x in lines] == [1, 21] and lines[-1]["mse"] < lines[0]["mse"]
    assert all(p.isfinite().all() for p in weights_of(stage))


def test_a_stop_is_obeyed_where_the_tenth_step_is_left_out(tmp_path):
    stage = tokenizer_stage(tmp_path, *FP16)
    overflow(stage, {10})
    stop = at_step(12, 10, lambda: signal.raise_signal(signal.SIGTERM))
    with stop, pytest.raises(cli.Stopped, match="stopped after step 11 of 12"):
        stage.run()


def test_a_scaled_loss_trains_as_it_does_unscaled(tmp_path, monkeypatch):
    losses = []
    for enabled in (True, False):
        stage = tokenizer_stage(
            tmp_path / str(enabled), *FP16, tokenizer_steps=11)
        assert stage.loss_scale.is_enabled()
        stage.loss_scale._enabled = enabled
        stage.run()
        log = read_log(tmp_path / str(enabled) / "log.jsonl")
        losses.append([x["loss"] for x in log if x["split"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_training_in_fp16_goes_on_with_its_scale(tmp_path):
    flags = [*FP16, "--checkpoint-every", 5]
    whole, broken, going_on = (tokenizer_stage(tmp_path / name, *flags, tokenizer_steps=11)
                               for name in ("whole", "broken", "broken"))
    for stage in (whole, broken):
        overflow(stage, {3})
    whole.run()
    with at_step(11, 7, kill), pytest.raises(Killed):
        broken.run()
    going_on.settings = replace(going_on.settings, resume=True)
    going_on.run()
    going_on.loss_scale.load_state_dict({})   # as of a training in fp32
    assert going_on.loss_scale.state_dict() == whole.loss_scale.state_dict()
    assert whole.loss_scale.factor() == whole.loss_scale.get_scale() == 2**15
    assert all(map(torch.equal, weights_of(whole), weights_of(going_on)))
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "broken")]
    assert logs[0] == logs[1]


def test_what_overflows_however_little_it_is_scaled_is_told(tmp_path):
    stage = tokenizer_stage(tmp_path, *FP16, "--checkpoint-every", 1, tokenizer_steps=24)
    spoil(stage, stage.model.encoder.conv_in.weight, 2)
    told = "its gradient nan .* of step 18, is .*--tokenizer-lr or --precision fp32"
    with pytest.raises(UserError, match=told):   # 16 steps were left out
        stage.run()
    saved = torch.load(stage.path, weights_only=True)["training"]
    assert saved["step"] == 18 and all(x.isfinite().all() for x in saved["model"].values())


def test_numbers_are_read_every_tenth_step_and_before_a_checkpoint(tmp_path, monkeypatch):
    """Each reading waits for the GPU."""
    stage = tokenizer_stage(tmp_path)
    seen = []
    monkeypatch.setattr(train, "average_over_processes",
                        lambda x: seen.append(stage.step) or x)
    stage.run()
    # What is logged, six measurements, and whether a signal came at the last.
    assert seen == [1, 2, 4, 6, 8, 10, 11, 12, 12]


def test_a_training_goes_on_with_another_learning_rate(folder, tmp_path):
    flags = ["--data", folder, "--out", tmp_path, *TINY, "--stage", "tokenizer"]
    with at_step(12, 3, lambda: signal.raise_signal(signal.SIGINT)):
        assert run("train.py", *flags).returncode == 130
    ran("train.py", *flags, "--resume", "--tokenizer-lr", "0.0005")


@pytest.mark.parametrize("method", ["validate", "save"])
def test_a_signal_while_the_last_step_is_measured_or_saved_is_obeyed(tmp_path, method):
    stage = tokenizer_stage(tmp_path, tokenizer_steps=8)
    real = getattr(stage, method)

    def late(*arguments, **named):
        if stage.step == stage.steps:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **named)

    setattr(stage, method, late)
    with pytest.raises(cli.Stopped, match="stopped after step 8 of 8"):
        stage.run()
    assert "training" in torch.load(stage.path, weights_only=True)


def test_a_run_s_own_tokenizer_is_not_replaced_by_its_copy(folder, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    for name in ("var.pt", "held_out.pt"):
        (out / name).unlink()
    before = (out / "tokenizer.pt").read_bytes()
    flags = ["--data", folder, "--out", out, *TINY]
    ran("train.py", *flags, "--tokenizer", out / "tokenizer.pt")
    assert (out / "tokenizer.pt").read_bytes() == before
    (out / "held_out.pt").unlink()
    ran("train.py", *flags, "--resume")   # both are finished, and what was lost is there again
    assert (out / "held_out.pt").exists() and same_run(out, finished)


def test_a_training_is_not_overwritten(folder, finished, tmp_path):
    for name in ("tokenizer.pt", "var.pt"):
        shutil.copy(finished / name, tmp_path)
    told = refused("train.py", "--data", folder, "--out", tmp_path, *TINY)
    assert "tokenizer.pt is there already: --resume goes on with it" in told
    assert (tmp_path / "tokenizer.pt").read_bytes() == (finished / "tokenizer.pt").read_bytes()


# Tokens are computed once


def test_tokens_are_made_once(finished, tmp_path, monkeypatch, capsys):
    stage = tokenizer_stage(tmp_path)
    tokenizer = stage.model.eval()
    made = train.tokens_of(tokenizer, stage.data, stage.settings)
    assert len(made[0]) == 20 and made[0].tensors[0].dtype == torch.int16
    assert torch.equal(made[1].tensors[0].long(), tokenizer.encode(stage.unseen))
    monkeypatch.setattr(Tokenizer, "encode", None)
    again = train.tokens_of(tokenizer, stage.data, stage.settings)
    for one, other in zip(made, again):
        assert all(map(torch.equal, one.tensors, other.tensors))
    monkeypatch.undo()
    assert "made anew" not in capsys.readouterr().out
    stage.data.digest = "of other images"
    train.tokens_of(tokenizer, stage.data, stage.settings)
    assert "it is made anew" in capsys.readouterr().out
    torch.nn.init.normal_(tokenizer.quantizer.codebook_VC)
    train.tokens_of(tokenizer, stage.data, stage.settings)
    assert "it is made anew" in capsys.readouterr().out


def test_more_processes_than_images(tmp_path, monkeypatch):
    """Some have nothing to tokenise; all get everything, in order."""
    stage = tokenizer_stage(tmp_path)
    tokenizer = stage.model.eval()
    images = torch.utils.data.TensorDataset(*stage.data.held_out[:5])
    plain = train.tokenise(tokenizer, images, stage.settings, "plainly")
    shares = []
    for rank in range(8):
        monkeypatch.setattr("support.devices.rank_and_world", lambda: (rank, 8))
        shares.append(train.tokenise(tokenizer, images, stage.settings, "a share"))
    assert [len(labels) for _, labels in shares] == [0, 1, 0, 1, 1, 0, 1, 1]
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(train.dist, "all_gather_object",
                        lambda found, own: found.__setitem__(slice(None), shares))
    gathered = train.tokenise(tokenizer, images, stage.settings, "gathered")
    assert all(map(torch.equal, gathered, plain))


@pytest.mark.parametrize("content", [b"", b"cut", None], ids=["empty", "cut", "half"])
def test_a_damaged_set_of_tokens_is_made_anew(tmp_path, capsys, content):
    stage = tokenizer_stage(tmp_path)
    made = train.tokens_of(stage.model.eval(), stage.data, stage.settings)
    path = tmp_path / "tokens.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2] if content is None else content)
    again = train.tokens_of(stage.model, stage.data, stage.settings)
    assert torch.equal(made[0].tensors[0], again[0].tensors[0])
    assert "it is made anew" in capsys.readouterr().out
    load_checkpoint(path, "set of tokens")


# Malice and damage


class Malicious:
    """What a pickle may do: run anything when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "here")


def test_a_checkpoint_that_would_run_code_does_not(finished, tmp_path):
    trace = tmp_path / "trace"
    content = {"kind": "transformer", "config": Malicious(trace), "pos_1LC": Malicious(trace)}
    for name in ("var.pt", "var.pth"):
        load = ("sample.py", "--run", finished, "--var", tmp_path / name)
        torch.save(content, tmp_path / name)
        assert "holds more than tensors" in refused(*load)
        (tmp_path / name).write_bytes(pickle.dumps(Malicious(trace)))
        assert "more than tensors" in refused(*load)
    assert not trace.exists()
    pickle.loads((tmp_path / "var.pt").read_bytes())
    assert trace.exists()   # so it was a real one


@pytest.mark.parametrize("content, told", [
    (b"", "is empty"), (b"\x89PNG\r\n", "is no checkpoint: it begins with b'\\x89PNG"),
    (b"version https://git-lfs.github.com/spec/v1", "it begins with b'version https://"),
    ({"pos_1LC": torch.ones(1)}, "a published one is read where its name ends in .pth")],
    ids=["empty", "picture", "pointer", "published"])
def test_what_is_no_checkpoint_of_ours_is_told_as_what_it_is(tmp_path, content, told):
    path = tmp_path / "var.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path, "transformer")
    assert str(error.value).startswith(str(path)) and told in str(error.value)


def test_weights_that_are_no_numbers_and_other_classes_are_not_drawn_with(finished, tmp_path):
    for name, key, kind in (("tokenizer.pt", "Tokenizer", "tokenizer"), ("var.pt", "VAR", "var")):
        content = torch.load(finished / name, weights_only=True)
        assert content["class"] == key
        other = tmp_path / name
        torch.save({**content, "class": "Mine"}, other)
        draw = ("sample.py", "--run", finished, f"--{kind}", other, "--out", tmp_path / "a.png")
        assert f"is a checkpoint of the class Mine and not of {key}" in refused(*draw)
        weight = next(iter(content["model"]))
        assert all(tensor.is_contiguous() for tensor in content["model"].values())
        content["model"][weight].view(-1)[0] = math.nan if kind == "var" else math.inf
        torch.save(content, other)
        assert f"{weight} is not finite" in refused(*draw)


def test_a_training_does_not_go_on_with_another_class(tmp_path):
    stage = tokenizer_stage(tmp_path)
    stage.save(finished=False)
    stage.model.__class__ = type("Mine", (Tokenizer,), {})
    with pytest.raises(UserError, match="of the class Tokenizer and not of Mine"):
        stage.resume()


def log_of(folder: Path, stage: str, step: int) -> WatchedLog:
    settings = SimpleNamespace(out=folder, preset=SimpleNamespace(scales=(1, 2)), tensorboard=None)
    return WatchedLog(stage, step, 1000, settings)


def test_a_log_goes_on_where_a_training_does(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    log = log_of(tmp_path, "tokenizer", 0)
    for step, split in ((1, "train"), (2, "train"), (2, "held_out"), (2, "health")):
        log.write(step, split)
    log_of(tmp_path, "var", 0).write(2, "train")
    log_of(tmp_path, "tokenizer", 1)
    left = [(line["stage"], line["step"], line["split"]) for line in read_log(path)]
    assert left == [("tokenizer", 1, "train"), ("var", 2, "train")]
    log_of(tmp_path, "tokenizer", 5).write(5, "health")
    log_of(tmp_path, "tokenizer", 5)   # once more: its health is measured again
    assert all(line["split"] != "health" for line in read_log(path))
    before = path.read_bytes()
    monkeypatch.setattr("support.watching.rank_and_world", lambda: (1, 2))
    log_of(tmp_path, "tokenizer", 0).write(1, "train")
    assert path.read_bytes() == before   # which the first process writes


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: (
            done.append((name, os.path.getsize(given[0]))), real(*given)))
    path = tmp_path / "new" / "folder" / "file"
    save_whole(path, lambda file: file.write(b"content"))
    assert done == [("fsync", 7), ("replace", 7)] and path.read_bytes() == b"content"


@pytest.mark.parametrize("name, error", [
    ("file", OSError(errno.ENOSPC, "No space left on device")), ("folder", None)])
def test_what_cannot_be_written_is_named(tmp_path, name, error):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "folder").mkdir()

    def write(file):
        if error:
            raise error

    with pytest.raises(OSError) as found:
        save_whole(tmp_path / name, write)
    assert found.value.filename == str(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}
    assert (tmp_path / "file").read_bytes() == b"content"


def test_two_programs_write_one_file_at_once(tmp_path, monkeypatch):
    path = tmp_path / "file"

    def write(file):
        file.write(b"the sec")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            save_whole(path, lambda other: other.write(b"the first"))
        assert path.read_bytes() == b"the first"
        file.write(b"ond")

    save_whole(path, write)
    assert path.read_bytes() == b"the second" and len([*tmp_path.iterdir()]) == 1


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "file")
    save_whole(link, lambda file: file.write(b"content"))
    assert link.is_symlink() and (tmp_path / "elsewhere" / "file").read_bytes() == b"content"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_is_obeyed_as_sigterm_is_and_nohup_as_ever(stop, monkeypatch):
    def main():
        with Interrupt() as interrupt:
            signal.raise_signal(stop)
            asked.append(interrupt.asked)
        signal.raise_signal(stop)

    asked = []
    with pytest.raises(SystemExit) as end:
        cli.run_program(main)
    assert end.value.code == 130
    signal.signal(stop, signal.SIG_IGN)
    cli.run_program(main)
    assert asked == [True, False]


def test_a_terminal_that_is_gone_cannot_be_told(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    def main():
        raise cli.Stopped("stopped and saved")

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(SystemExit) as end:
        cli.run_program(main)
    assert end.value.code == 130


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_any_wait(second, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    with Interrupt() as interrupt:
        assert not interrupt.asked
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.asked
        now[0] = 0.5
        signal.raise_signal(signal.SIGTERM)   # torchrun and a process manager each send one
        now[0] = 1.5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL   # as it was before


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    log = log_of(tmp_path, "var", 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            log.write(1, "train", loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(tmp_path / "log.jsonl")


def test_a_signal_that_is_ignored_stays_so():
    """As SIGINT in the background of a shell, where Ctrl-C is meant for another program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert not interrupt.asked
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.asked


def test_a_log_whose_last_line_was_cut_is_read(tmp_path):
    path = tmp_path / "log.jsonl"
    line = '{"stage": "var", "step": 1, "split": "train"}\n'
    path.write_text(line + '{"stage": "va')
    assert read_log(path) == [{"stage": "var", "step": 1, "split": "train"}]
    for other in ('{"stage": "var"}', "[]", "3", "nothing", line.replace("1", '"1"').strip()):
        path.write_text(line + other + "\n")
        with pytest.raises(UserError, match="is damaged"):
            read_log(path)


KINDS = {"tokenizer.pt": "tokenizer", "var.pt": "transformer", "tokens.pt": "set of tokens",
         "held_out.pt": "set of held-out images"}


def same_content(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_content(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_content, a, b))
    return a == b


def loads(path: Path) -> dict:
    return load_checkpoint(path, KINDS[path.name])


@draws(60)
@given(data=st.data())
@pytest.mark.parametrize("name", list(KINDS))
def test_damaged_checkpoints(finished, tmp_path_factory, name, data):
    whole = finished / name
    found = read_or_refused(loads, tmp_path_factory.mktemp("damaged") / name,
                            data.draw(damaged(whole.read_bytes())))
    assert found is None or same_content(found, loads(whole))


def small_checkpoints(finished: Path) -> dict[str, bytes]:
    """Small ones: a byte of an archive's directory counts no less for there being fewer weights."""
    contents = {}
    for name in ("tokenizer.pt", "var.pt", "tokens.pt"):
        content = loads(finished / name)
        if "model" in content:
            content["model"] = dict(list(content["model"].items())[:3])
        contents[name] = content
    return contents


def every_change(size: int) -> list[tuple[int, int]]:
    return [(place, bits) for place in range(size) for bits in (0x01, 0x10, 0x80, 0xFF)]


def check_changes(finished: Path, folder: Path, choose) -> None:
    for name, content in small_checkpoints(finished).items():
        path = folder / name
        torch.save(content, path)
        whole = path.read_bytes()
        for place, bits in choose(every_change(len(whole))):
            changed = bytearray(whole)
            changed[place] ^= bits
            found = read_or_refused(loads, path, bytes(changed))
            assert found is None or same_content(found, content), (name, place, bits)


def test_a_thousand_changed_bytes(finished, tmp_path):
    check_changes(finished, tmp_path, lambda changes: random.Random(0).sample(changes, 334))


@pytest.mark.long
def test_every_changed_byte(finished, tmp_path):
    check_changes(finished, tmp_path, lambda changes: changes)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_in_which_an_entry_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "var.pt"
    save_checkpoint(path, "transformer", config={})
    with zipfile.ZipFile(path, "a") as archive:
        name = archive.namelist()[0]
        archive.writestr(name, archive.read(name))
    with pytest.raises(UserError, match="an entry is there twice"):
        loads(path)


def test_a_checkpoint_is_read_where_no_clock_runs(tmp_path, monkeypatch):
    """An archive cannot be of a time before 1980, which a board without a clock begins at."""
    path = tmp_path / "var.pt"
    save_checkpoint(path, "transformer", config={"depth": 2})
    monkeypatch.setattr(zipfile.time, "time", lambda: 1000.0)
    assert loads(path)["config"] == {"depth": 2}


def test_a_download_that_stands_still_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file",
                        lambda *_: limits.append(socket.getdefaulttimeout()))
    limits, before = [], socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)
    try:
        download("https://example.org/file", tmp_path / "folder" / "file")
    finally:
        socket.setdefaulttimeout(before)
    assert limits == [30]


@pytest.mark.parametrize("error", [TimeoutError(), IncompleteRead(b""), RuntimeError("SHA-256")],
                         ids=lambda error: type(error).__name__)
def test_a_download_that_fails_is_told_in_one_sentence(tmp_path, monkeypatch, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    with pytest.raises(UserError, match="cannot download https://example.org/file"):
        download("https://example.org/file", tmp_path / "file")


def test_an_entry_that_claims_to_be_a_folder_is_read_all_the_same(finished, tmp_path):
    """PyTorch's reader would skip it, and return memory that was never written."""
    content = loads(finished / "var.pt")
    path = tmp_path / "var.pt"
    torch.save(content, path)
    archive = bytearray(path.read_bytes())
    place = archive.find(b"PK\x01\x02")
    while place >= 0:
        archive[place + 38] ^= 0x10   # the attributes of an entry in the directory
        place = archive.find(b"PK\x01\x02", place + 4)
    path.write_bytes(archive)
    assert same_content(loads(path), content)


def test_any_learning_rate_may_change_where_a_training_goes_on():
    names = ("tokenizer_lr", "var_lr", "discriminator_lr", "final_lr")
    before = {"made_with": {**dict.fromkeys(names, 0.1), "ema": 0.9}}
    check_made_with(Path("a.pt"), before, dict.fromkeys(names, 0.2))
    with pytest.raises(UserError, match="--ema 0.9 and not 0.5"):
        check_made_with(Path("a.pt"), before, {"ema": 0.5})


def test_safetensors_are_read_by_their_own_package(tmp_path, monkeypatch):
    path = tmp_path / "var.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        read_tensors(path, "published checkpoint")
    module = SimpleNamespace(load_file=lambda path: {"a": path})
    monkeypatch.setitem(sys.modules, "safetensors", SimpleNamespace(torch=module))
    monkeypatch.setitem(sys.modules, "safetensors.torch", module)
    assert read_tensors(path, "published checkpoint") == {"a": path}


def test_training_goes_on_with_the_same_perceptual_distance_and_images():
    for name, before, now in ("LPIPS", False, True), ("tokenizer", 64 * "a", 64 * "b"):
        with pytest.raises(UserError, match=f"a.pt was made with another {name},"):
            check_made_with(Path("a.pt"), {"made_with": {name: before}}, {name: now})


def test_a_tokenizer_of_other_scales_is_another():
    """Though it has the same weights: as where a published one is opened with other --scales."""
    shape = dict(vocabulary=8, code_channels=4, image_channels=1, width=4, multipliers=(1,), blocks=1, phis=1, norm_groups=1)
    one, other = (Tokenizer(TokenizerConfig(scales=scales, **shape)) for scales in ((1, 2, 4), (1, 3, 4)))
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) != fingerprint(other)


def test_a_tokenizer_whose_transformer_is_still_to_be_trained_is_not_overwritten(tmp_path):
    (tmp_path / "tokenizer.pt").touch()
    with pytest.raises(UserError, match="tokenizer.pt is there already: --resume goes on with it"):
        check_folder("shapes", tmp_path, ["tokenizer", "var"], False)
    check_folder("shapes", tmp_path, ["var"], False)


def test_white_that_is_named_may_be_what_it_is_unless_named(tmp_path):
    stage = tokenizer_stage(tmp_path)
    stage.save(finished=True)
    flags = ["--data", "folder", "--out", str(tmp_path), *TINY, "--stage", "tokenizer", "--resume", "--white-level"]
    options = training_options([*flags, "65535"])
    check_begun(options, chosen_preset(options))
    options = training_options([*flags, "4095"])
    with pytest.raises(UserError, match="--white-level 65535 and not 4095"):
        check_begun(options, chosen_preset(options))


def test_last_scales_of_a_transformer_that_has_all_are_not_changed():
    """None is a value, too."""
    with pytest.raises(UserError, match="--last-scales None and not 2"):
        check_made_with(Path("a.pt"), {"made_with": {"last_scales": None}}, {"last_scales": 2})


def test_channels_that_are_named_are_no_matter_to_a_transformer(tmp_path):
    """Whose checkpoint does not have them: here of a grey run, whose tokenizer is elsewhere."""
    options = training_options(["--data", "folder", "--out", str(tmp_path), *TINY, "--stage", "var", "--channels", "1"])
    preset = chosen_preset(options)
    save_checkpoint(tmp_path / "var.pt", "transformer", config={"depth": 1},
                    made_with={**preset.of(VARPreset), "seed": 0})
    check_begun(options, preset)
