"""The whole program through its command line: tiny runs end to end, and every mistake told in one sentence."""
import contextlib
import gzip
import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train

ROOT = Path(__file__).parent.parent
TINY = ["--image-size", "8", "--scales", "1,2,4", "--multipliers", "1,2", "--tokenizer-width", "8", "--vocabulary", "32",
        "--code-channels", "4", "--tokenizer-steps", "40", "--tokenizer-batch", "8", "--depth", "1", "--width", "32",
        "--heads", "2", "--var-steps", "30", "--var-batch", "8", "--warmup", "5"]


def run(script: str, *arguments, timeout: int = 240) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True,
                          timeout=timeout)


def refused(script: str, *arguments) -> str:
    """The one sentence a mistake is told in. In this process: starting one takes longer than the mistake."""
    program, said = {"train.py": train, "sample.py": sample}[script], io.StringIO()
    with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        train.run_program(program.main)
    assert end.value.code == 2, said.getvalue()
    last = said.getvalue().strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A data set of one's own: two classes, several modes and formats, and one file that is no image."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir()
        for i in range(12):
            pixels = (rng.random((10 + i, 14, 3)) * 100 + 120 * label).astype(np.uint8)
            mode, ending = (("RGB", "jpg"), ("L", "png"), ("RGBA", "webp"), ("P", "png"))[i % 4]
            Image.fromarray(pixels).convert(mode).save(root / name / f"{i:02}.{ending}")
    (root / "dog" / "05.jpg").write_bytes(b"this is no image")
    return root


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory) -> Path:
    """A whole run on that folder."""
    out = tmp_path_factory.mktemp("run")
    result = run("train.py", "--data", folder, "--out", out, *TINY)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("05.jpg cannot be read as an image") == 1   # named once, however often it is met
    return out


def test_a_run_writes_what_it_promises(finished):
    assert {p.name for p in finished.iterdir()} == {"tokenizer.pt", "var.pt", "log.jsonl", "reconstructions.png",
                                                    "samples.png", "curves.png"}
    for name in ("reconstructions.png", "samples.png", "curves.png"):
        with Image.open(finished / name) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 20   # not a blank sheet
    log = train.read_log(finished / "log.jsonl")
    for stage, steps in (("tokenizer", 40), ("var", 30)):
        assert [x["step"] for x in log if (x["stage"], x["split"]) == (stage, "train")] == list(range(1, steps, 10))
    health = next(x for x in log if x["stage"] == "tokenizer health")
    assert len(health["psnr_per_scale"]) == 3 and 0 < health["codes_used"] <= 1
    first = next(x for x in log if (x["stage"], x["split"], x["step"]) == ("var", "train", 1))
    assert abs(first["loss"] - np.log(32)) < 0.1


def test_the_losses_fall(finished):
    log = train.read_log(finished / "log.jsonl")
    for stage in ("tokenizer", "var"):
        losses = [x["loss"] for x in log if (x["stage"], x["split"]) == (stage, "train")]
        assert losses[-1] < losses[0]


def test_sampling(finished, tmp_path):
    def draw(name, *arguments):
        result = run("sample.py", "--run", finished, "--out", tmp_path / name, "--per-class", 3, *arguments)
        assert result.returncode == 0, result.stderr
        return Image.open(tmp_path / name)

    one, again, other = draw("a.png", "--seed", 4), draw("b.png", "--seed", 4), draw("c.png", "--seed", 5)
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert one.height == 2 * 66   # a row per class
    assert draw("d.png", "--classes", "dog").height == 66
    progress = draw("e.png", "--classes", "dog", "--progress")
    assert progress.height == 3 * 66   # a row per image
    assert progress.width < one.width + 10   # a column per scale: three


def test_the_stages_alone_equal_the_whole(folder, finished, tmp_path):
    for stage in ("tokenizer", "var"):
        assert run("train.py", "--data", folder, "--out", tmp_path, "--stage", stage, *TINY).returncode == 0
    for name in ("tokenizer.pt", "var.pt"):
        apart, whole = (torch.load(path / name, weights_only=True)["model"] for path in (tmp_path, finished))
        assert all(torch.equal(apart[key], whole[key]) for key in whole)


def test_interrupted_and_resumed_equals_uninterrupted(folder, finished, tmp_path):
    command = [sys.executable, ROOT / "train.py", "--data", folder, "--out", tmp_path, *TINY]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.time() + 120
        while not (tmp_path / "log.jsonl").exists() or "train" not in (tmp_path / "log.jsonl").read_text():
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[0]
    assert process.returncode == 130 and "--resume" in said
    assert "training" in torch.load(tmp_path / "tokenizer.pt", weights_only=True)
    assert run("train.py", "--data", folder, "--out", tmp_path, *TINY, "--resume").returncode == 0
    stopped, whole = (train.read_log(path / "log.jsonl") for path in (tmp_path, finished))
    assert stopped == whole


@pytest.mark.parametrize("how", ["two processes", "parts", "workers"])
def test_the_losses_do_not_depend_on_how_a_batch_is_computed(folder, tmp_path, how):
    same = ["--data", folder, *TINY, "--precision", "fp32", "--label-dropout", 0, "--tokenizer-steps", 30, "--var-steps", 12,
            "--var-lr", 1e-3]   # at a high rate, rounding errors double every few steps
    assert run("train.py", "--out", tmp_path / "one", *same).returncode == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if how == "two processes" else []
    extra = {"two processes": [], "parts": ["--grad-accumulation", 4], "workers": ["--workers", 2]}[how]
    command = [sys.executable, *launcher, ROOT / "train.py", "--out", tmp_path / "other", *same, *extra]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    logs = [train.read_log(tmp_path / name / "log.jsonl") for name in ("one", "other")]
    assert [(x["stage"], x["step"], x["split"]) for x in logs[0]] == [(x["stage"], x["step"], x["split"]) for x in logs[1]]
    losses = [[x["loss"] for x in log if x["split"] == "train"] for log in logs]
    assert losses[0] == losses[1] if how == "workers" else np.allclose(*losses, rtol=0, atol=1e-5)


def test_resuming_with_other_flags_is_refused(folder, finished, tmp_path):
    (tmp_path / "tokenizer.pt").write_bytes((finished / "tokenizer.pt").read_bytes())
    resume = ("train.py", "--data", folder, "--out", tmp_path, *TINY, "--resume")
    assert "does not go on with these flags: its config" in refused(*resume, "--vocabulary", 16)
    assert "does not go on with these flags: its config" in refused(*resume, "--multipliers", "1,1")
    assert "does not go on with these flags: its data" in refused(*resume, "--seed", 1)
    (tmp_path / "var.pt").write_bytes((finished / "var.pt").read_bytes())
    other = train.Tokenizer(train.TokenizerConfig(**torch.load(finished / "tokenizer.pt", weights_only=True)["config"]))
    train.save_checkpoint(tmp_path / "other.pt", "tokenizer", other.config, model=other.state_dict())
    assert "with these flags: its tokenizer" in refused(*resume, "--tokenizer", tmp_path / "other.pt")


def test_mistakes_in_training(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    assert "neither a folder nor one of" in refused("train.py", "--data", tmp_path / "missing", "--out", out, *TINY)
    assert "no sub-folders" in refused("train.py", "--data", empty, "--out", out, *TINY)
    (empty / "nothing").mkdir()
    assert "has 0 images" in refused("train.py", "--data", empty, "--out", out, *TINY)
    assert "start at 1" in refused("train.py", "--data", folder, "--out", out, *TINY, "--scales", "2,4")
    assert "and grow" in refused("train.py", "--data", folder, "--out", out, *TINY, "--scales", "1,4,4")
    assert "are images of 6" in refused("train.py", "--data", folder, "--out", out, *TINY, "--scales", "1,2,3")
    assert "are images of 8" in refused("train.py", "--data", folder, "--out", out, *TINY, "--image-size", "9")
    for flag, value in (("--unquantized", 1), ("--heads", 0), ("--seed", -1), ("--last-scales", 0), ("--tokenizer-batch", 0),
                        ("--multipliers", "1,0"), ("--var-lr", "nan"), ("--grad-accumulation", 0)):
        assert f"{flag} " in refused("train.py", "--data", folder, "--out", out, *TINY, flag, value)
    assert "does not divide" in refused("train.py", "--data", folder, "--out", out, *TINY, "--grad-accumulation", 3)
    (tmp_path / "file").touch()
    assert "File exists" in refused("train.py", "--data", folder, "--out", tmp_path / "file", *TINY)
    assert "no tokenizer checkpoint" in refused("train.py", "--data", folder, "--out", out, *TINY, "--stage", "var")
    assert not (out / "tokenizer.pt").exists()


def test_a_loss_that_is_no_number_stops_the_run(folder, tmp_path):
    told = refused("train.py", "--data", folder, "--out", tmp_path, *TINY, "--tokenizer-lr", "1e30", "--precision", "fp32")
    assert "became nan at step" in told and "no checkpoint" in told


def test_a_mistake_ends_a_program_with_one_sentence(tmp_path):
    result = run("sample.py", "--run", tmp_path)
    assert result.returncode == 2 and result.stderr == f"error: there is no transformer checkpoint at {tmp_path / 'var.pt'}\n"


def test_mistakes_in_sampling(finished, tmp_path):
    assert "no transformer checkpoint" in refused("sample.py", "--run", tmp_path)
    assert "there is no class bird; there are cat, dog" in refused("sample.py", "--run", finished, "--classes", "bird")
    assert "is a checkpoint of a tokenizer" in refused("sample.py", "--run", finished, "--var", finished / "tokenizer.pt")
    assert "must be" in refused("sample.py", "--run", finished, "--top-p", "0")
    cut = tmp_path / "var.pt"
    cut.write_bytes((finished / "var.pt").read_bytes()[:5000])
    assert "cannot be read as a checkpoint" in refused("sample.py", "--run", finished, "--var", cut)
    other = train.Tokenizer(train.TokenizerConfig(**torch.load(finished / "tokenizer.pt", weights_only=True)["config"]))
    train.save_checkpoint(tmp_path / "tokenizer.pt", "tokenizer", other.config, model=other.state_dict())
    assert "another tokenizer" in refused("sample.py", "--run", finished, "--tokenizer", tmp_path / "tokenizer.pt")


def idx(values: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, values.ndim)) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    return gzip.compress(header + values.astype(np.uint8).tobytes())


def test_idx_files(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (6, 28, 28)), np.arange(6)
    for name, content in zip(train.IDX_FILES, (x, y, x[:2], y[:2])):
        (tmp_path / name).write_bytes(idx(content))
    data = train.load_data("mnist", tmp_path, 32, 3, 0)
    assert data.train.images.shape == (6, 1, 32, 32) and len(data.held_out) == 2
    assert np.array_equal(data.train.images[:, 0, 2:30, 2:30], x)
    whole = idx(x)
    for broken, told in ((whole[:200], "gzip"), (idx(y), "magic number"), (gzip.compress(gzip.decompress(whole)[:-1]), "header says")):
        (tmp_path / train.IDX_FILES[0]).write_bytes(broken)
        with pytest.raises(train.UserError, match=told):
            train.load_data("mnist", tmp_path, 32, 3, 0)


def write_cifar10(path: Path, records: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in records.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_cifar10_files(tmp_path):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8), np.arange(6, dtype=np.uint8)
    records = [bytes([label]) + image.tobytes() for label, image in zip(labels, pixels)]
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    files, path = dict(zip(names, records)), tmp_path / "cifar-10-binary.tar.gz"
    write_cifar10(path, files)
    data = train.load_data("cifar10", tmp_path, 32, 3, 0)
    assert np.array_equal(data.train.images, pixels[:5]) and data.train.labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(data.held_out.images, pixels[5:]) and data.classes[5] == "dog"
    half = train.load_data("cifar10", tmp_path, 16, 3, 0).held_out.images
    assert np.array_equal(half, pixels[5:].reshape(1, 3, 16, 2, 16, 2).mean(axis=(3, 5)).round())
    whole = path.read_bytes()
    for broken, told in (({**files, "data_batch_2.bin": records[1][:-1]}, "cut short"),
                         ({**files, "test_batch.bin": b"\x0b" + records[5][1:]}, "label over 9"),
                         ({"readme.html": b"no batches"}, "not the binary version"), (whole[:300], "not the binary version")):
        path.write_bytes(broken) if isinstance(broken, bytes) else write_cifar10(path, broken)
        with pytest.raises(train.UserError, match=told):
            train.load_data("cifar10", tmp_path, 32, 3, 0)


def test_downloads_are_checked_before_they_are_used(tmp_path):
    served = tmp_path / "served"
    served.write_bytes(b"content")
    right = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"   # of b"content"
    train.download(served.as_uri(), tmp_path / "good", right)
    assert (tmp_path / "good").read_bytes() == b"content"
    for url, checksum, told in ((served.as_uri(), "0" * 64, "not used"), ((tmp_path / "none").as_uri(), right, "cannot download")):
        with pytest.raises(train.UserError, match=told):
            train.download(url, tmp_path / "bad", checksum)
    assert {path.name for path in tmp_path.iterdir()} == {"served", "good"}


def test_the_built_in_shapes_are_deterministic_and_distinct():
    one, again, other = (train.draw_shapes(30, 32, seed) for seed in (3, 3, 4))
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)
    assert one.labels.bincount().tolist() == [3] * 10
    flat = one.images.flatten(1).float()
    assert flat.std(dim=1).min() > 10   # no shape is hidden in its background


def test_training_order_visits_everything_once_a_pass():
    steps = list(train.shuffled(10, 4, seed=0, begin=0, end=5))
    seen = [i for indices in steps for i in indices]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert list(train.shuffled(10, 4, seed=0, begin=3, end=5)) == steps[3:]


def test_help_explains_every_flag():
    for script in ("train.py", "sample.py"):
        text = run(script, "--help").stdout
        assert text.count("\n") > 20 and "==SUPPRESS==" not in text


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


def test_strange_files_among_the_images(tmp_path, capsys):
    data, rng = tmp_path / "data" / "a", np.random.default_rng(0)
    data.mkdir(parents=True)
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(data / "line\nbreak.jpg")
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "outside.png")
    (data / "link.png").symlink_to(tmp_path / "outside.png")
    (data / "cut.jpg").write_bytes((data / "line\nbreak.jpg").read_bytes()[:500])
    (data / "folder.png").mkdir()
    (data / "nowhere.png").symlink_to(tmp_path / "missing.png")
    os.mkfifo(data / "pipe.jpg")
    chunk = struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + chunk))
    (data / "bomb.png").write_bytes(bomb)
    before = {path: path.stat().st_mtime for path in tmp_path.rglob("*") if path.exists()}
    loaded = train.load_data(str(tmp_path / "data"), tmp_path, 8, 3, 0)
    images, labels = loaded.train[list(range(len(loaded.train)))]
    assert len(loaded.train) + len(loaded.held_out) == 4 and images.shape == (3, 3, 8, 8) and not labels.any()
    said = capsys.readouterr().err
    assert "cut.jpg cannot be read" in said or "bomb.png cannot be read" in said
    assert before == {path: path.stat().st_mtime for path in tmp_path.rglob("*") if path.exists()}


def test_a_log_whose_last_line_was_cut_is_read(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"stage": "var", "step": 1}\n{"stage": "va')
    assert train.read_log(tmp_path / "log.jsonl") == [{"stage": "var", "step": 1}]


def test_every_preset_is_a_possible_model():
    for preset in train.PRESETS.values():
        config = preset.tokenizer_config(3)
        assert config.image_side == preset.image_size
        preset.var_config(config, 10)
