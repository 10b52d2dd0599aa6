"""What happens to runs and files: stopping, killing, full disks, damage, malice. Nothing is lost,
and nothing is let in."""
from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sample
import train
from program import ROOT, TINY, damaged, draws, ran, read_or_refused, refused, run, start


def stop_training(stop: int, log: Path, done: str, *flags) -> subprocess.Popen:
    """Start a training, and send it a signal once its log has a certain line."""
    command = [sys.executable, ROOT / "train.py", *flags]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, text=True) as process:
        deadline = time.time() + 240
        while not log.exists() or done not in log.read_text():
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.005)
        process.send_signal(stop)
        process.said = process.communicate()[0]
    return process


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs logged and drew the same, and their weights agree, all bit for bit."""
    for name in ("log.jsonl", "samples.png"):
        if (one / name).read_bytes() != (other / name).read_bytes():
            return False
    for name in ("tokenizer.pt", "var.pt"):
        ours, its = (torch.load(path / name, weights_only=True)["model"] for path in (one, other))
        if not all(torch.equal(ours[key], its[key]) for key in its):
            return False
    return True


# Stopping and going on


def test_interrupted_and_resumed_equals_uninterrupted(folder, finished, tmp_path):
    flags = ["--data", folder, "--out", tmp_path, *TINY]
    log = tmp_path / "log.jsonl"
    for stop, stage, more in ((signal.SIGINT, "tokenizer", []), (signal.SIGTERM, "var", ["--resume"])):
        done = f'"stage": "{stage}", "step": 1, "split": "train"'
        process = stop_training(stop, log, done, *flags, *more)
        assert process.returncode == 130 and "--resume" in process.said
        assert "training" in torch.load(tmp_path / f"{stage}.pt", weights_only=True)
    ran("train.py", *flags, "--resume")
    assert same_run(tmp_path, finished)


def test_killed_and_resumed_equals_uninterrupted(folder, finished, tmp_path):
    flags = ["--data", folder, "--out", tmp_path, *TINY, "--checkpoint-every", 3, "--resume"]
    line = '"stage": "tokenizer", "step": 11, "split": "train"'
    process = stop_training(signal.SIGKILL, tmp_path / "log.jsonl", line, *flags)
    assert process.returncode == -signal.SIGKILL
    sample.load_tokenizer(tmp_path / "tokenizer.pt")
    ran("train.py", *flags)
    assert same_run(tmp_path, finished)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage, step", [("tokenizer", 7), ("tokenizer", 39), ("var", 1), ("var", 22)])
def test_stopped_at_any_step_and_resumed_equals_uninterrupted(
        folder, finished, tmp_path, monkeypatch, stage, step):
    """As if the power failed: nothing is written after that step."""
    flags = ["--data", folder, "--out", tmp_path, *TINY, "--checkpoint-every", 4, "--resume"]
    advance = train.Stage.advance

    def fails(self, *arguments):
        if (self.name, self.step) == (stage, step):
            raise Killed
        return advance(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.Stage, "advance", fails)
        with pytest.raises(Killed):
            run("train.py", *flags)
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
        with pytest.raises(sample.UserError, match="is what it was before.* File too large"):
            sample.save_checkpoint(path, "tokenizer", model=torch.zeros(len(before)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["tokenizer.pt"]


def test_resuming_with_other_flags_is_refused(folder, finished, tmp_path):
    shutil.copy(finished / "tokenizer.pt", tmp_path)
    resume = ("train.py", "--data", folder, "--out", tmp_path, *TINY, "--resume")
    assert "begun with another vocabulary: 32, not 16" in refused(*resume, "--vocabulary", 16)
    assert "another multipliers: (1, 2), not (1, 1)" in refused(
        *resume, "--multipliers", "1,1")
    assert "another seed: 0, not 1" in refused(*resume, "--seed", 1)
    assert "another tokenizer_steps" in refused(*resume, "--tokenizer-steps", 50)
    shutil.copy(finished / "var.pt", tmp_path)
    assert "another muon" in refused(*resume, "--no-muon")
    other = write_other_tokenizer(finished, tmp_path / "other.pt")
    assert "that is another than" in refused(*resume, "--tokenizer", other)
    (tmp_path / "tokenizer.pt").unlink()
    assert "begun with another tokenizer" in refused(*resume, "--tokenizer", other)


def write_other_tokenizer(finished: Path, path: Path) -> Path:
    """One of the same shape, but another."""
    tokenizer = train.Tokenizer(sample.load_tokenizer(finished / "tokenizer.pt").config)
    sample.save_checkpoint(path, "tokenizer", config=asdict(tokenizer.config),
                           model=tokenizer.state_dict())
    return path


def test_resuming_with_other_images_is_refused_and_changes_nothing(folder, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "cat" / "03.png").unlink()
    before = (out / "held_out.pt").read_bytes()
    told = refused("train.py", "--data", data, "--out", out, *TINY, "--resume")
    assert "begun with another data set" in told
    assert (out / "held_out.pt").read_bytes() == before


def test_a_tokenizer_of_another_run_is_copied(folder, finished, tmp_path):
    ran("train.py", "--data", folder, "--out", tmp_path, *TINY, "--var-steps", 2,
        "--tokenizer", finished / "tokenizer.pt")
    ran("sample.py", "--run", tmp_path, "--per-class", 1)
    told = refused("train.py", "--data", folder, "--out", tmp_path, *TINY, "--overwrite",
                   "--tokenizer", finished / "tokenizer.pt", "--vocabulary", 64)
    assert "--vocabulary 64 is not that of the tokenizer" in told and "which has 32" in told
    told = refused("train.py", "--data", folder, "--out", tmp_path, *TINY, "--overwrite",
                   "--tokenizer", finished / "tokenizer.pt", "--tokenizer-width", 16)
    assert "--tokenizer-width 16 is not that of the tokenizer" in told and "which has 8" in told
    again = refused("train.py", "--data", folder, "--out", tmp_path, *TINY, "--resume")
    assert "is a copy of" in again


def test_another_tokenizer_takes_the_place_of_a_run_s_own_if_that_may_be_lost(
        folder, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    other = write_other_tokenizer(finished, tmp_path / "other.pt")
    flags = ["--data", folder, "--out", out, *TINY, "--var-steps", 2, "--tokenizer", other]
    (out / "var.pt").unlink()
    assert "choose another --out" in refused("train.py", *flags)
    assert (out / "tokenizer.pt").read_bytes() == (finished / "tokenizer.pt").read_bytes()
    ran("train.py", *flags, "--overwrite")
    now, asked = (sample.load_tokenizer(path).fingerprint() for path in (out / "tokenizer.pt", other))
    assert now == asked
    ran("sample.py", "--run", out, "--per-class", 1)


def test_a_loss_that_is_no_number_stops_the_run(folder, tmp_path):
    command = ("train.py", "--data", folder, "--out", tmp_path, *TINY, "--stage", "tokenizer",
               "--precision", "fp32", "--tokenizer-lr", "1e30")
    told = refused(*command)
    assert "the tokenizer loss became" in told and "there is no checkpoint yet" in told
    told = refused(*command, "--warmup", 0, "--checkpoint-every", 1)
    assert "the last good checkpoint, of step 1" in told
    weights = torch.load(tmp_path / "tokenizer.pt", weights_only=True)["training"]["model"]
    assert all(weight.isfinite().all() for weight in weights.values())


def tokenizer_stage(out: Path, *flags) -> train.TokenizerStage:
    options = train.parse(["--out", str(out), *TINY, *map(str, flags)])
    train.settle(options)
    images = [train.draw_shapes(count, 8, seed) for seed, count in enumerate((20, 10))]
    return train.TokenizerStage(train.data_of(*images, train.SHAPES), options)


def test_a_gradient_that_is_no_number_is_never_saved(tmp_path, monkeypatch):
    stage = tokenizer_stage(tmp_path)
    weight = stage.model.encoder.conv_in.weight
    loss = stage.loss

    def spoiled(images, labels):
        total, to_log = loss(images, labels)
        if stage.step == 2:
            total = total + 0 * (weight * 0).sum().sqrt()   # finite, but its gradient is 0 times infinity
        return total, to_log

    stage.loss = spoiled
    stage.options.checkpoint_every = 1
    with pytest.raises(sample.UserError, match="gradient nan at step 2; the last good checkpoint, of step 2"):
        stage.run()
    saved = torch.load(stage.path, weights_only=True)["training"]
    assert saved["step"] == 2 and all(x.isfinite().all() for x in saved["model"].values())


def test_a_report_is_read_when_the_next_step_is_on_its_way(tmp_path, monkeypatch):
    """So a GPU always has the next step to compute; before a checkpoint all reports are read."""
    stage = tokenizer_stage(tmp_path)
    stage.options.checkpoint_every = 6
    events = []
    for name in ("advance", "read", "save"):
        method = getattr(stage, name)

        def noted(*arguments, name=name, method=method, **keywords):
            events.append(name)
            return method(*arguments, **keywords)

        monkeypatch.setattr(stage, name, noted)
    monkeypatch.setattr(stage, "validate", lambda model: {"psnr": 0.0})
    stage.steps = 80   # so that held-out images are measured at every tenth step
    stage.quantized_from = 81
    monkeypatch.setattr(stage, "finish", lambda model, log: None)
    stage.run()
    assert events[:13] == ["advance", "advance", "read", "advance", "read", "advance", "read",
                           "advance", "read", "advance", "read", "read", "save"]


def test_resuming_with_another_learning_rate_is_said(folder, tmp_path, monkeypatch):
    flags = ["--data", folder, "--out", tmp_path, *TINY, "--stage", "tokenizer"]
    advance = train.Stage.advance
    with monkeypatch.context() as patch:   # asked to stop at the third step
        patch.setattr(train.Stage, "advance",
                      lambda self, tensors, asked: advance(self, tensors, self.step == 3))
        assert run("train.py", *flags).returncode == 130
    assert "not trained to its end" in refused("train.py", *flags[:-1], "var")
    said = ran("train.py", *flags, "--resume", "--tokenizer-lr", "0.0005")
    assert "was begun with another tokenizer_lr: 0.0015, not 0.0005" in said


def test_a_training_is_not_overwritten_by_mistake(folder, finished, tmp_path, monkeypatch):
    for name in ("tokenizer.pt", "var.pt"):
        shutil.copy(finished / name, tmp_path)
    flags = ("--data", folder, "--out", tmp_path, *TINY)
    assert "tokenizer.pt is there already: --resume goes on with it" in refused("train.py", *flags)
    assert (tmp_path / "tokenizer.pt").read_bytes() == (finished / "tokenizer.pt").read_bytes()
    advance = train.Stage.advance
    monkeypatch.setattr(train.Stage, "advance",
                        lambda self, tensors, asked: advance(self, tensors, self.step == 3))
    result = run("train.py", *flags, "--overwrite")
    assert result.returncode == 130 and "with --resume instead of --overwrite" in result.stdout
    assert not (tmp_path / "var.pt").exists()   # or --resume would take it for this training's
    assert "training" in torch.load(tmp_path / "tokenizer.pt", weights_only=True)


# Tokens are computed once


class Tokens:
    """A run's tokens, as often as one asks for them."""

    def __init__(self, data: Path, tokenizer: Path, out: Path, capsys):
        self.data = data
        self.tokenizer = sample.load_tokenizer(tokenizer)
        self.out = out
        self.capsys = capsys

    def options(self, *flags) -> argparse.Namespace:
        given = ["--data", str(self.data), "--out", str(self.out), *TINY, "--precision", "fp32"]
        options = train.parse([*given, *map(str, flags)])
        train.settle(options)
        return options

    def make(self, *flags) -> tuple[str, list[torch.Tensor]]:
        """What is said about them, and they: tokens and labels of both sets."""
        options = self.options(*flags)
        train_set, held_out = train.tokens_of(self.tokenizer, train.load_data(options), options)
        said = [x for x in self.capsys.readouterr().out.splitlines() if "tokens are" in x]
        return " ".join(said), [*train_set.tensors, *held_out.tensors]


@pytest.fixture
def tokens(folder, finished, tmp_path, capsys):
    data = shutil.copytree(folder, tmp_path / "data")
    return Tokens(data, finished / "tokenizer.pt", tmp_path / "out", capsys)


def test_tokens_are_made_once(tokens):
    kept = tokens.out / "tokens.pt"
    said, first = tokens.make()
    assert said == "" and kept.exists()
    assert len(first[0]) + len(first[2]) == 24   # one of the 25 is no image
    said, again = tokens.make()
    assert said == f"tokens are those in {kept}" and all(map(torch.equal, first, again))
    assert "other precision" in tokens.make("--precision", "bf16")[0]
    assert "other precision" in tokens.make()[0]   # the file is always that of the last
    tokens.data = tokens.data.rename(tokens.data.with_name("moved"))
    elsewhere = kept.rename(tokens.out / "elsewhere.pt")
    assert tokens.make("--tokens", elsewhere)[0] == f"tokens are those in {elsewhere}"
    shutil.copy(tokens.data / "dog" / "00.jpg", tokens.data / "cat" / "00.jpg")
    assert "other images" in tokens.make("--tokens", elsewhere)[0]
    content = torch.load(elsewhere, weights_only=True)
    content["made_with"]["tokenizer"] = "another"
    torch.save(content, elsewhere)
    assert "other tokenizer" in tokens.make("--tokens", elsewhere)[0]


def test_more_processes_than_images_are_left(tmp_path, monkeypatch):
    """Each has one to tokenise, and what is one too many is dropped."""
    stage = tokenizer_stage(tmp_path)
    images = torch.utils.data.TensorDataset(*stage.data.held_out[:5])
    plain = []
    train.tokenise(stage.model, images, plain, stage.options, "plainly")
    for module in (train, sample):
        monkeypatch.setattr(module, "rank_and_ranks", lambda: (7, 8))

    def gather(gathered: list, mine: tuple) -> None:   # of eight processes: 5 rows, and one thrice
        gathered[:] = [(tokens[None], label[None]) for tokens, label in zip(*plain[0])]
        gathered += 3 * [mine]

    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    found = []
    train.tokenise(stage.model, images, found, stage.options, "in eight processes")
    for one, other in zip(map(torch.cat, zip(*found)), map(torch.cat, zip(*plain))):
        assert torch.equal(one, other)


def test_a_file_of_tokens_that_is_none_is_left_alone(tokens, finished):
    tokens.make()
    kept = tokens.out / "tokens.pt"
    cut = kept.read_bytes()[:-1000]
    elsewhere = tokens.out / "elsewhere.pt"
    elsewhere.write_bytes(cut)
    other = finished / "var.pt"
    for path, told in ((elsewhere, "cannot be read"), (other, "is a checkpoint of a transformer")):
        before = path.read_bytes()
        with pytest.raises(sample.UserError, match=told):
            tokens.make("--tokens", path)
        assert path.read_bytes() == before   # it may be dear to somebody
    kept.write_bytes(cut)
    assert "made anew" in tokens.make()[0]   # the run's own
    assert "tokens are those" in tokens.make()[0]


def test_tokens_do_not_take_the_place_of_the_tokenizer(folder, tmp_path):
    """Which is not there yet when the flags are read."""
    path = tmp_path / "tokenizer.pt"
    told = refused("train.py", "--data", folder, "--out", tmp_path, *TINY, "--tokenizer-steps", 2,
                   "--tokens", path)
    assert f"{path} is a checkpoint of a tokenizer" in told
    sample.load_tokenizer(path)


def test_tokens_that_cannot_be_kept_do_not_end_a_training(tokens):
    tokens.out.mkdir()
    (tokens.out / "file").touch()
    options = tokens.options("--tokens", tokens.out / "file" / "tokens.pt")
    made, _ = train.tokens_of(tokens.tokenizer, train.load_data(options), options)
    assert len(made) == 22 and "the tokens are not kept" in tokens.capsys.readouterr().out


def test_a_stop_while_tokenising_loses_nothing(tokens, monkeypatch):
    monkeypatch.setattr(train, "at_a_time", lambda side: 4)
    _, expected = tokens.make()
    (tokens.out / "tokens.pt").unlink()
    encode = tokens.tokenizer.encode
    counts = []

    def stops(images):
        counts.append(len(images))
        if len(counts) == 4:
            raise KeyboardInterrupt
        return encode(images)

    monkeypatch.setattr(tokens.tokenizer, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        tokens.make()
    assert all(map(torch.equal, tokens.make()[1], expected))
    assert sum(counts) == 24 + counts[3]   # none twice but those of the step that was stopped


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
        assert "cannot be read" in refused(*load)
        (tmp_path / name).write_bytes(pickle.dumps(Malicious(trace)))
        assert "cannot be read" in refused(*load)
    assert not trace.exists()
    pickle.loads((tmp_path / "var.pt").read_bytes())
    assert trace.exists()   # so it was a real one


def test_a_log_goes_on_where_a_training_does(tmp_path):
    path = tmp_path / "log.jsonl"
    log = sample.Log(path, "tokenizer", 0)
    for step, split in ((1, "train"), (2, "train"), (2, "held_out"), (2, "health")):
        log.write(step, split)
    sample.Log(path, "var", 0).write(2, "train")
    sample.Log(path, "tokenizer", 1)
    left = [(line["stage"], line["step"], line["split"]) for line in sample.read_log(path)]
    assert left == [("tokenizer", 1, "train"), ("var", 2, "train")]
    sample.Log(path, "tokenizer", 5).write(5, "health")
    sample.Log(path, "tokenizer", 5)   # once more: its health is measured again
    assert all(line["split"] != "health" for line in sample.read_log(path))


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: (done.append(name), real(*given)))
    sample.save_whole(tmp_path / "file", lambda file: file.write(b"content"))
    assert done == ["fsync", "replace"] and (tmp_path / "file").read_bytes() == b"content"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "file")
    sample.save_whole(link, lambda file: file.write(b"content"))
    assert link.is_symlink() and (tmp_path / "elsewhere" / "file").read_bytes() == b"content"


def test_a_second_interrupt_ends_at_once():
    with sample.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.asked
    with sample.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        signal.raise_signal(signal.SIGTERM)   # from a process manager, say: the step still ends
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_log_whose_last_line_was_cut_is_read(tmp_path):
    path = tmp_path / "log.jsonl"
    line = '{"stage": "var", "step": 1, "split": "train"}\n'
    path.write_text(line + '{"stage": "va')
    assert sample.read_log(path) == [{"stage": "var", "step": 1, "split": "train"}]
    for other in ('{"stage": "var"}', "[]", "3", "nothing"):
        path.write_text(line + other + "\n")
        with pytest.raises(sample.UserError, match="is damaged"):
            sample.read_log(path)


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
    return sample.load_checkpoint(path, KINDS[path.name])


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


@pytest.mark.skipif(train.fcntl is None, reason="no such lock on Windows")
def test_two_trainings_do_not_share_a_folder(tmp_path):
    out = tmp_path / "out"
    with train.alone_in(out):
        assert f"another training is writing to {out}" in refused("train.py", "--out", out, *TINY)
        (out / "log.jsonl").touch()
    with train.alone_in(out):   # free again
        (out / "log.jsonl").unlink()
    assert not out.exists()   # of a training of which nothing came


@pytest.mark.skipif(train.fcntl is None, reason="no such lock on Windows")
def test_processes_that_read_images_do_not_hold_the_folder(folder, tmp_path):
    """Else they would for seconds after the training that started them is killed."""
    options = train.parse(["--workers", "1"])
    options.device = torch.device("cpu")
    images = train.FolderImages(folder, [(0, path) for path in (folder / "cat").iterdir()], 8, 3)
    with train.alone_in(tmp_path) as options.lock:
        rows = iter(train.read_ahead(images, [[0], [1], [2]], options))
        next(rows)
    with train.alone_in(tmp_path):   # free, while the reader lives
        assert multiprocessing.active_children()


def test_processes_that_read_images_leave_signals_to_the_training(folder, monkeypatch):
    """SIGTERM reaches all processes of a program that a time limit or a scheduler ends."""
    options = train.parse(["--workers", "1"])
    options.device = torch.device("cpu")
    files = [(0, path) for path in sorted((folder / "cat").iterdir())[:4]]
    images = train.FolderImages(folder, files, 8, 3)
    rows = iter(train.read_ahead(images, [[0], [1], [2], [3]], options))
    next(rows)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(rows)) == 3


def test_an_error_while_images_are_read_ends_the_program(folder):
    """The processes that read them ignore SIGTERM, with which Python would end them."""
    program = (
        "import train, torch, pathlib\n"
        "options = train.parse(['--workers', '1'])\n"
        "options.device = torch.device('cpu')\n"
        f"root = pathlib.Path({str(folder)!r})\n"
        "files = train.FolderImages(root, [(0, path) for path in (root / 'cat').iterdir()], 8, 3)\n"
        "rows = iter(train.read_ahead(files, [[0], [1], [2]] * 9, options))\n"
        "next(rows)\n"
        "raise ValueError('an error of any kind')\n")
    result = start("-c", program)
    assert result.returncode == 1 and "an error of any kind" in result.stderr
