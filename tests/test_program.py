"""The whole program through its command line: tiny runs end to end, and every mistake told in one sentence."""
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import kernels
import train
from program import ROOT, TINY, refused, run


def test_a_run_writes_what_it_promises(finished):
    assert {p.name for p in finished.iterdir()} == {"tokenizer.pt", "var.pt", "log.jsonl", "reconstructions.png",
                                                    "samples.png", "curves.png", "tokens.pt"}
    for name in ("reconstructions.png", "samples.png", "curves.png"):
        with Image.open(finished / name) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 20   # not a blank sheet
    log = train.read_log(finished / "log.jsonl")
    for stage, steps in (("tokenizer", 40), ("var", 30)):
        assert [x["step"] for x in log if (x["stage"], x["split"]) == (stage, "train")] == list(range(1, steps, 10))
    health = next(x for x in log if (x["stage"], x["split"]) == ("tokenizer", "health"))
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


def small_var(**values) -> train.VAR:
    preset = train.Preset(scales=(1, 2, 3), depth=2, width=32, heads=2, vocabulary=16, **values)
    return train.VAR(preset.var_config(preset.tokenizer_config(3), 4))


def gradients(model: torch.nn.Module, *inputs) -> list[torch.Tensor]:
    torch.manual_seed(0)   # of dropped labels and layers
    outputs = model(*inputs)
    model.zero_grad()
    (outputs[1]["total"] if isinstance(outputs, tuple) else outputs.square().mean()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("model", ["tokenizer", "transformer"])
@pytest.mark.parametrize("how", ["compile", "checkpoint_activations"])
def test_compiling_and_checkpointing_do_not_change_gradients(model, how, monkeypatch):
    if how == "compile":
        try:
            train.check_compiler(torch.device("cpu"))
        except train.UserError as error:
            pytest.skip(str(error))
    torch.manual_seed(0)
    if model == "tokenizer":
        preset = train.Preset(image_size=4, scales=(1, 2), multipliers=(1, 1), tokenizer_width=8)
        model, inputs = train.Tokenizer(preset.tokenizer_config(3)), (torch.rand(4, 3, 4, 4) * 2 - 1, False)
    elif how == "compile":   # which has to leave the Triton kernels alone; it draws other dropped labels and layers
        monkeypatch.setattr(kernels, "FACE", "triton" if os.environ.get("TRITON_INTERPRET") and kernels.triton else None)
        model, inputs = small_var(label_dropout=0.0), (torch.arange(4), torch.randn(4, 13, 8))
    else:
        model, inputs = small_var(label_dropout=0.5, drop_path=0.5), (torch.arange(4), torch.randn(4, 13, 8))
    for p in model.parameters():   # as initialised, most branches have no gradient
        torch.nn.init.normal_(p, std=0.2)
    before = gradients(model, *inputs)
    flags = {"compile": False, "checkpoint_activations": False, how: True}
    train.change_parts(model, SimpleNamespace(**flags))
    after = gradients(model, *inputs)
    assert len(before) == len(after) and all(g.abs().max() > 0 for g in before)
    for a, b in zip(before, after):
        assert torch.equal(a, b) if how == "checkpoint_activations" else torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_checkpointing_activations_keeps_less():
    def kept(model) -> int:
        """Bytes that the backward pass finds in memory."""
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
            model(torch.arange(4), torch.randn(4, 13, 8))
        return sum(seen.values())

    torch.manual_seed(0)
    model = small_var()
    before = kept(model)
    train.change_parts(model, SimpleNamespace(compile=False, checkpoint_activations=True))
    assert kept(model) < before / 2


def test_model_flops():
    model = small_var()
    stage = train.VARStage.__new__(train.VARStage)
    stage.average, stage.example = SimpleNamespace(module=model), lambda: (torch.tensor([0]), torch.randn(1, 13, 8))
    W, L, V, C, depth = 32, 14, 16, 8, 2
    per_token = depth * (3 * W * W + W * W + 2 * 4 * W * W) + W * V
    per_image = depth * 6 * W * W + 2 * W * W + (L - 1) * C * W
    seen = L * L   # so short a sequence is one masked call
    assert stage.forward_flops() == 2 * (L * per_token + per_image + depth * 2 * seen * W)


def test_speed(monkeypatch):
    stage = train.VARStage.__new__(train.VARStage)
    stage.model, stage.batch, stage.peak, stage.flops = small_var(), 8, None, 0
    assert stage.speed(None) == "" and stage.speed(2.0) == ", 16 images/s, 224 tokens/s"
    stage.peak, stage.flops = 1e5, 1000   # 16 images of 3000 operations, backward pass included
    assert stage.speed(2.0).endswith(", 48% of peak FLOP/s")
    options = SimpleNamespace(device=torch.device("cuda"), precision="bf16")
    for card, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA T4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
        assert train.peak_flops(options) == peak


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
    for batch in ("--tokenizer-batch", "--var-batch"):
        assert f"{batch} 9 does not divide" in refused("train.py", "--data", folder, "--out", out, *TINY,
                                                       "--grad-accumulation", 2, batch, 9)
    assert "one of them" in refused("train.py", "--data", folder, "--out", out, *TINY, "--resume", "--overwrite")
    (tmp_path / "file").touch()
    assert "File exists" in refused("train.py", "--data", folder, "--out", tmp_path / "file", *TINY)
    assert "no tokenizer checkpoint" in refused("train.py", "--data", folder, "--out", out, *TINY, "--stage", "var")
    assert not (out / "tokenizer.pt").exists()


def test_no_compiler(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nmany lines")

    monkeypatch.setattr(torch, "compile", broken)
    assert refused("train.py", "--out", tmp_path, *TINY, "--compile").endswith("--compile does not work here: no compiler many lines")


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
    assert "cannot be read as a transformer checkpoint" in refused("sample.py", "--run", finished, "--var", cut)
    other = train.Tokenizer(train.TokenizerConfig(**torch.load(finished / "tokenizer.pt", weights_only=True)["config"]))
    train.save_checkpoint(tmp_path / "tokenizer.pt", "tokenizer", config=asdict(other.config), model=other.state_dict())
    assert "another tokenizer" in refused("sample.py", "--run", finished, "--tokenizer", tmp_path / "tokenizer.pt")


def test_help_explains_every_flag():
    for script in ("train.py", "sample.py"):
        text = run(script, "--help").stdout.split("\n\n", 1)[1] + "\n"
        flags = re.findall(r"^  (?:-h, )?(--[a-z-]+)(.*\n(?: {10,}.*\n)*)", text, re.MULTILINE)
        assert len(flags) > 20
        for flag, rest in flags:
            assert re.search(r"(  |\n {10,})\S+ \S+", rest), f"{flag} has no help"


def test_every_preset_is_a_possible_model():
    for preset in train.PRESETS.values():
        config = preset.tokenizer_config(3)
        assert config.image_side == preset.image_size
        preset.var_config(config, 10)
