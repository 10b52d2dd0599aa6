"""What happens to runs and files: stopping, killing, full disks, damage, malice. Nothing is lost, nothing is let in."""
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from program import ROOT, TINY, damaged, read_or_refused, refused, run


def stop_training(command: list, stop: int, log: Path, done: str) -> subprocess.Popen:
    """Start a training, and send it a signal once its log has a certain line."""
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.time() + 120
        while not log.exists() or done not in log.read_text():
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.005)
        process.send_signal(stop)
        process.said = process.communicate()[0]
    return process


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs logged the same and drew the same, and their weights agree, all bit for bit."""
    logs = [train.read_log(path / "log.jsonl") for path in (one, other)]
    pictures = [(path / "samples.png").read_bytes() for path in (one, other)]
    weights = [torch.load(path / name, weights_only=True)["model"]
               for path in (one, other) for name in ("tokenizer.pt", "var.pt")]
    return logs[0] == logs[1] and pictures[0] == pictures[1] and all(
        torch.equal(weights[i][key], weights[i + 2][key]) for i in (0, 1) for key in weights[i])


def test_interrupted_and_resumed_equals_uninterrupted(folder, finished, tmp_path):
    command = [sys.executable, ROOT / "train.py", "--data", folder, "--out", tmp_path, *TINY]
    for stop, stage, file in ((signal.SIGINT, "tokenizer", "tokenizer.pt"), (signal.SIGTERM, "var", "var.pt")):
        process = stop_training(command, stop, tmp_path / "log.jsonl", f'"stage": "{stage}", "step": 1, "split": "train"')
        assert process.returncode == 130 and "--resume" in process.said
        assert "training" in torch.load(tmp_path / file, weights_only=True)
        command.append("--resume")
    assert run("train.py", "--data", folder, "--out", tmp_path, *TINY, "--resume").returncode == 0
    assert same_run(tmp_path, finished)


def test_killed_and_resumed_equals_uninterrupted(folder, finished, tmp_path):
    flags = ["--data", folder, "--out", tmp_path, *TINY, "--checkpoint-every", 3, "--resume"]
    command = [sys.executable, ROOT / "train.py", *flags]
    for stage, step in (("tokenizer", 11), ("var", 11)):
        line = f'"stage": "{stage}", "step": {step}, "split": "train"'
        assert stop_training(command, signal.SIGKILL, tmp_path / "log.jsonl", line).returncode == -signal.SIGKILL
        train.load_tokenizer(tmp_path / "tokenizer.pt")
    assert run("train.py", *flags).returncode == 0
    assert same_run(tmp_path, finished)


def test_a_full_disk_leaves_the_old_checkpoint(finished, tmp_path):
    """The limit on a file's size fails a write as a full disk does: in its middle."""
    path, limits = tmp_path / "tokenizer.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(before := (finished / "tokenizer.pt").read_bytes())
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(train.UserError, match="is what it was before.* File too large"):
            train.save_checkpoint(path, "tokenizer", model=torch.zeros(len(before)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["tokenizer.pt"]


def test_resuming_with_other_flags_is_refused(folder, finished, tmp_path):
    (tmp_path / "tokenizer.pt").write_bytes((finished / "tokenizer.pt").read_bytes())
    resume = ("train.py", "--data", folder, "--out", tmp_path, *TINY, "--resume")
    assert "begun with another vocabulary: 32, not 16" in refused(*resume, "--vocabulary", 16)
    assert "another multipliers: (1, 2), not (1, 1)" in refused(*resume, "--multipliers", "1,1")
    assert "another seed: 0, not 1" in refused(*resume, "--seed", 1)
    assert "another tokenizer_steps" in refused(*resume, "--tokenizer-steps", 50)
    (tmp_path / "var.pt").write_bytes((finished / "var.pt").read_bytes())
    assert "another muon" in refused(*resume, "--no-muon")
    other = train.Tokenizer(train.TokenizerConfig(**torch.load(finished / "tokenizer.pt", weights_only=True)["config"]))
    train.save_checkpoint(tmp_path / "other.pt", "tokenizer", config=asdict(other.config), model=other.state_dict())
    assert "that is another than" in refused(*resume, "--tokenizer", tmp_path / "other.pt")
    (tmp_path / "tokenizer.pt").unlink()
    assert "begun with another tokenizer" in refused(*resume, "--tokenizer", tmp_path / "other.pt")


def test_a_tokenizer_of_another_run_is_copied(folder, finished, tmp_path):
    result = run("train.py", "--data", folder, "--out", tmp_path, *TINY, "--var-steps", 2,
                 "--tokenizer", finished / "tokenizer.pt")
    assert result.returncode == 0
    assert run("sample.py", "--run", tmp_path).returncode == 0
    assert "is a copy of" in refused("train.py", "--data", folder, "--out", tmp_path, *TINY, "--resume")


def test_a_loss_that_is_no_number_stops_the_run(folder, tmp_path):
    command = ("train.py", "--data", folder, "--out", tmp_path, *TINY, "--stage", "tokenizer", "--precision", "fp32")
    told = refused(*command, "--tokenizer-lr", "1e30")
    assert "the tokenizer loss became nan" in told and "no checkpoint" in told
    told = refused(*command, "--tokenizer-lr", "1e30", "--warmup", 0, "--checkpoint-every", 1)
    assert "the last good checkpoint, of step 1" in told and (tmp_path / "tokenizer.pt").exists()


def test_a_gradient_that_is_no_number_changes_nothing(finished):
    options = train.parse(["--out", str(finished), *TINY])
    train.settle(options)
    data = train.Data(train.draw_shapes(20, 8, 0), train.draw_shapes(10, 8, 1), list(train.SHAPES), 3)
    stage = train.TokenizerStage(data, options)
    stage.loss = lambda images, labels: (0 * stage.model.encoder.conv_in.weight.sum().sqrt(), {})   # 0 times infinity
    torch.nn.init.zeros_(stage.model.encoder.conv_in.weight)
    before = [p.clone() for p in stage.model.parameters()]
    with pytest.raises(train.UserError, match="its gradient nan"):
        stage.advance(data.train[list(range(8))], False)
    assert all(map(torch.equal, before, stage.model.parameters()))


def test_resuming_with_another_learning_rate_is_said(folder, tmp_path):
    command = [sys.executable, ROOT / "train.py", "--data", folder, "--out", tmp_path, *TINY, "--stage", "tokenizer"]
    assert stop_training(command, signal.SIGTERM, tmp_path / "log.jsonl", '"train"').returncode == 130
    assert "not trained to its end" in refused("train.py", *command[2:-1], "var")
    result = run("train.py", *command[2:], "--resume", "--tokenizer-lr", "0.0005")
    assert result.returncode == 0
    assert "has a peak learning rate of 0.0015 so far, and 0.0005 is asked for" in result.stdout


def test_a_training_is_not_overwritten_by_mistake(folder, finished, tmp_path):
    (tmp_path / "tokenizer.pt").write_bytes((finished / "tokenizer.pt").read_bytes())
    again = ("train.py", "--data", folder, "--out", tmp_path, *TINY, "--stage", "tokenizer", "--tokenizer-steps", 8)
    assert "tokenizer.pt is there already: --resume goes on with it" in refused(*again)
    assert (tmp_path / "tokenizer.pt").read_bytes() == (finished / "tokenizer.pt").read_bytes()
    shutil.copy(finished / "var.pt", tmp_path / "var.pt")
    log = tmp_path / "log.jsonl"
    process = stop_training([sys.executable, ROOT / again[0], *again[1:-4], "--overwrite"], signal.SIGINT, log, '"train"')
    assert process.returncode == 130 and "with --resume instead of --overwrite" in process.said
    assert not (tmp_path / "var.pt").exists()   # or --resume would take it for this training's
    assert "training" in torch.load(tmp_path / "tokenizer.pt", weights_only=True)


def test_tokens_are_made_once(folder, finished, tmp_path, capsys):
    def tokens(*arguments) -> tuple[str, list[torch.Tensor]]:
        """What is said about them, and they."""
        options = train.parse(["--data", str(data_dir), "--out", str(tmp_path), *TINY, "--precision", "fp32",
                               *arguments])
        train.settle(options)
        data = train.load_data(options.data, options.data_dir, 8, 3, 0)
        sets = train.tokens_of(train.load_tokenizer(finished / "tokenizer.pt"), data, options)
        said = [line for line in capsys.readouterr().out.splitlines() if "tokens are" in line]
        return " ".join(said), [x for one in sets for x in (one.tokens_NL, one.labels_N)]

    data_dir = shutil.copytree(folder, tmp_path / "data")
    said, first = tokens()
    kept = tmp_path / "tokens.pt"
    assert said == "" and kept.exists() and len(first[0]) + len(first[2]) == 25
    said, again = tokens()
    assert said == f"tokens are those in {kept}" and all(map(torch.equal, first, again))
    assert "other precision" in tokens("--precision", "bf16")[0]
    assert "other precision" in tokens()[0]   # the file is always that of the last
    data_dir = data_dir.rename(tmp_path / "moved")
    elsewhere = kept.rename(tmp_path / "elsewhere.pt")
    assert tokens("--tokens", str(elsewhere))[0] == f"tokens are those in {elsewhere}"
    (data_dir / "dog" / "00.jpg").rename(data_dir / "dog" / "0.jpg")
    assert "other images" in tokens("--tokens", str(elsewhere))[0]
    content = torch.load(elsewhere, weights_only=True)
    content["made_with"]["tokenizer"] = "another"
    torch.save(content, elsewhere)
    assert "other tokenizer" in tokens("--tokens", str(elsewhere))[0]
    elsewhere.write_bytes(elsewhere.read_bytes()[:-1000])
    for path, told in ((elsewhere, "cannot be read"), (finished / "var.pt", "is a checkpoint of a transformer")):
        before = path.read_bytes()
        with pytest.raises(train.UserError, match=told):
            tokens("--tokens", str(path))
        assert path.read_bytes() == before   # it may be dear to somebody
    kept.write_bytes(elsewhere.read_bytes())
    assert "made anew" in tokens()[0] and "tokens are those" in tokens()[0]   # the run's own


def test_tokens_that_cannot_be_kept_do_not_end_a_training(folder, finished, tmp_path, capsys):
    options = train.parse(["--data", str(folder), "--out", str(tmp_path), *TINY, "--tokens", str(tmp_path / "file" / "tokens.pt")])
    train.settle(options)
    (tmp_path / "file").touch()
    data = train.load_data(options.data, options.data_dir, 8, 3, 0)
    tokens = train.tokens_of(train.load_tokenizer(finished / "tokenizer.pt"), data, options)
    assert len(tokens[0]) == 23 and "the tokens are not kept" in capsys.readouterr().out


class Malicious:
    """What a pickle may do: run anything when it is loaded."""
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "here")


def test_a_checkpoint_that_would_run_code_does_not(finished, tmp_path):
    trace = tmp_path / "trace"
    for name in ("var.pt", "var.pth"):
        torch.save({"kind": "transformer", "config": Malicious(trace), "pos_1LC": Malicious(trace)}, tmp_path / name)
        assert "cannot be read" in refused("sample.py", "--run", finished, "--var", tmp_path / name)
        (tmp_path / name).write_bytes(pickle.dumps(Malicious(trace)))
        assert "cannot be read" in refused("sample.py", "--run", finished, "--var", tmp_path / name)
    assert not trace.exists()
    pickle.loads((tmp_path / "var.pt").read_bytes())
    assert trace.exists()   # so it was a real one


def test_a_log_whose_last_line_was_cut_is_read(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"stage": "var", "step": 1}\n{"stage": "va')
    assert train.read_log(tmp_path / "log.jsonl") == [{"stage": "var", "step": 1}]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["tokenizer.pt", "tokens.pt"])
def test_damaged_checkpoints(finished, tmp_path_factory, name, data):
    def tensors(path: Path) -> list[torch.Tensor]:
        if name == "tokenizer.pt":
            return list(train.load_tokenizer(path).state_dict().values())
        return [x for tokens in train.kept_tokens(path, made_with, SimpleNamespace(tokens=path)) for x in (tokens.tokens_NL, tokens.labels_N)]

    made_with = torch.load(finished / "tokens.pt", weights_only=True)["made_with"]
    found = read_or_refused(tensors, tmp_path_factory.mktemp("damaged") / name,
                            data.draw(damaged((finished / name).read_bytes())))
    assert found is None or all(map(torch.equal, found, tensors(finished / name)))
