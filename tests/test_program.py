"""The whole program through its command line: tiny runs end to end, and every mistake told in one
sentence."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import kernels
import sample
import train
from program import ROOT, TINY, ran, refused, run, start
from test_faults import same_run, tokenizer_stage, write_other_tokenizer


def test_a_run_writes_what_it_promises(finished):
    promised = re.findall(r"^    ([a-z_]+\.\w+)(?:  ([a-z]+\.pt))?", train.__doc__, re.MULTILINE)
    files = {name for pair in promised for name in pair if name}
    decoded = {path.name for path in finished.glob("*-*.images")}
    assert len(decoded) == 2
    assert {path.name for path in finished.iterdir()} == files | decoded
    for name in ("reconstructions.png", "samples.png", "curves.png"):
        with Image.open(finished / name) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 20   # not a blank sheet
    log = sample.read_log(finished / "log.jsonl")
    for stage, steps in (("tokenizer", 40), ("var", 30)):
        lines = [line for line in log if line["stage"] == stage]
        assert [x["step"] for x in lines if x["split"] == "train"] == list(range(1, steps, 10))
        held_out = [x["step"] for x in lines if x["split"] == "held_out"]
        assert held_out == sorted({*range(steps // 8, steps + 1, steps // 8), steps})
    health = next(line for line in log if line["split"] == "health")
    assert len(health["psnr_per_scale"]) == 3 and 0 < health["codes_used"] <= 1
    first = next(line for line in log if line["stage"] == "var" and line["split"] == "train")
    assert abs(first["loss"] - np.log(32)) < 0.1


def test_the_losses_fall(finished):
    log = sample.read_log(finished / "log.jsonl")
    for stage in ("tokenizer", "var"):
        losses = [x["loss"] for x in log if (x["stage"], x["split"]) == (stage, "train")]
        assert losses[-1] < losses[0]


def test_the_health_that_is_printed_is_the_one_measured(finished, capsys):
    tokenizer = sample.load_tokenizer(finished / "tokenizer.pt")
    images, _ = sample.load_held_out(finished).tensors
    health = tokenizer.health([sample.to_float(images)])
    log = sample.read_log(finished / "log.jsonl")
    logged = next(line for line in log if line["split"] == "health")
    for name, value in health.items():
        assert np.allclose(logged[name], value, rtol=1e-4), name
    train.say_health(health, tokenizer.config)
    said = capsys.readouterr().out
    assert f"PSNR {health['psnr_per_scale'][-1]:.2f} dB; {health['codes_used']:.0%} of 32" in said
    assert len(said.splitlines()) == 5


def test_sampling(finished, tmp_path):
    def draw(name, *arguments) -> Image.Image:
        ran("sample.py", "--run", finished, "--out", tmp_path / name, "--per-class", 3, *arguments)
        return Image.open(tmp_path / name)

    one, again, other = (draw(name, "--seed", seed) for name, seed in (("a", 4), ("b", 4), ("c", 5)))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert one.height == 2 * 66   # a row per class
    assert draw("d", "--classes", "dog").height == 66
    progress = draw("e", "--classes", "dog", "--progress")
    assert progress.height == 3 * 66   # a row per image
    assert progress.width < one.width + 10   # a column per scale: three


def test_the_stages_alone_equal_the_whole(folder, finished, tmp_path):
    for stage in ("tokenizer", "var"):
        ran("train.py", "--data", folder, "--out", tmp_path, "--stage", stage, *TINY)
    assert same_run(tmp_path, finished)


def test_half_precision(folder, tmp_path):
    flags = ["--tokenizer-steps", 20, "--var-steps", 15, "--precision", "bf16"]
    ran("train.py", "--data", folder, "--out", tmp_path, *TINY, *flags)
    log = sample.read_log(tmp_path / "log.jsonl")
    losses = [line["loss"] for line in log if line["split"] == "train"]
    assert len(losses) == 4 and losses[1] < losses[0] and losses[3] < losses[2]
    ran("sample.py", "--run", tmp_path, "--per-class", 2, "--precision", "bf16")


def test_a_finished_run_is_left_as_it_is(folder, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    said = ran("train.py", "--data", folder, "--out", out, *TINY, "--resume")
    assert said.count("is finished") == 2 and same_run(out, finished)


@pytest.mark.parametrize("how", ["two processes", "parts", "workers"])
def test_the_losses_do_not_depend_on_how_a_batch_is_computed(folder, tmp_path, monkeypatch, how):
    same = ["--data", folder, *TINY, "--label-dropout", 0, "--tokenizer-steps", 30,
            "--var-steps", 12,
            "--var-lr", 1e-3]   # at a high rate, rounding errors double every few steps
    if how == "two processes":   # parts of a step each set the adversarial loss's weight
        same += ["--adversarial-weight", 0.4, "--discriminator-width", 8]
    ran("train.py", "--out", tmp_path / "one", *same)
    other = ["--out", tmp_path / "other", *same]
    if how == "two processes":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
        result = start(*torchrun, ROOT / "train.py", *other)
        assert result.returncode == 0, result.stderr
    elif how == "parts":
        ran("train.py", *other, "--grad-accumulation", 4)
    else:
        monkeypatch.setattr(train, "DISK_SHARE", 0.0)
        (folder / "dog" / "05.jpg").rename(folder / "05.jpg")   # no image: no other stands in for it
        ran("train.py", "--out", tmp_path / "one", *same, "--overwrite", "--workers", 0)
        ran("train.py", *other, "--workers", 2)
        (folder / "05.jpg").rename(folder / "dog" / "05.jpg")
    logs = [sample.read_log(tmp_path / name / "log.jsonl") for name in ("one", "other")]
    keys = [[(line["stage"], line["step"], line["split"]) for line in log] for log in logs]
    assert keys[0] == keys[1]
    losses = [[line["loss"] for line in log if line["split"] == "train"] for log in logs]
    if how == "workers":
        assert losses[0] == losses[1]
    else:
        assert np.allclose(*losses, rtol=0, atol=1e-5)


@pytest.mark.long
def test_imagenet256_goes_through(folder, tmp_path, monkeypatch):
    """Two steps of each stage, each stopped after the first, and then an image of each class."""
    monkeypatch.setattr(sample, "CLASSIFIER_STEPS", 2)
    flags = ["--preset", "imagenet256", "--data", folder, "--out", tmp_path, "--device", "cpu",
             "--tokenizer-steps", 2, "--tokenizer-batch", 2, "--var-steps", 2, "--var-batch", 2,
             "--checkpoint-every", 1, "--workers", 1]
    advance = train.Stage.advance
    stopped = set()

    def stops_once(self, tensors, asked):
        stop = self.step == 1 and self.name not in stopped
        if stop:
            stopped.add(self.name)
        return advance(self, tensors, asked or stop)

    monkeypatch.setattr(train.Stage, "advance", stops_once)
    for stage in ("tokenizer", "var"):
        assert run("train.py", *flags, "--resume").returncode == 130
        assert stopped >= {stage}
    ran("train.py", *flags, "--resume")
    log = sample.read_log(tmp_path / "log.jsonl")
    assert any("discriminator" in line for line in log)
    ran("sample.py", "--run", tmp_path, "--device", "cpu", "--per-class", 1)


# What changes how a model is computed, and not what


def small_var(**values) -> train.VAR:
    preset = train.Preset(scales=(1, 2, 3), depth=2, width=32, heads=2, vocabulary=16, **values)
    return train.VAR(preset.var_config(preset.tokenizer_config(3), 4))


def gradients(model: torch.nn.Module, *inputs) -> list[torch.Tensor]:
    torch.manual_seed(0)   # of dropped labels and layers
    outputs = model(*inputs)
    model.zero_grad()
    loss = outputs[1]["total"] if isinstance(outputs, tuple) else outputs.square().mean()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("which", ["tokenizer", "transformer"])
@pytest.mark.parametrize("how", ["compile", "checkpoint_activations"])
def test_compiling_and_checkpointing_do_not_change_gradients(which, how, monkeypatch):
    torch.manual_seed(0)
    code_channels = 8
    if which == "tokenizer":
        preset = train.Preset(image_size=4, scales=(1, 2), multipliers=(1, 1), tokenizer_width=8)
        model = train.Tokenizer(preset.tokenizer_config(3))
        inputs = (torch.rand(4, 3, 4, 4) * 2 - 1, False)
    else:
        dropped = 0.0 if how == "compile" else 0.5   # compiled, it draws others
        model = small_var(label_dropout=dropped, drop_path=dropped, code_channels=code_channels)
        inputs = (torch.arange(4), torch.randn(4, 13, code_channels))
    for p in model.parameters():   # as initialised, most branches have no gradient
        torch.nn.init.normal_(p, std=0.2)
    before = gradients(model, *inputs)
    if how == "compile":   # captured and differentiated as always; Inductor's code would take long
        compile_module = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **flags: compile_module(
            module, backend="aot_eager", **flags))
    flags = {"compile": False, "checkpoint_activations": False, how: True}
    train.change_parts(model, SimpleNamespace(**flags))
    after = gradients(model, *inputs)
    assert len(before) == len(after) and all(g.abs().max() > 0 for g in before)
    for a, b in zip(before, after):
        if how == "checkpoint_activations":
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_checkpointing_activations_keeps_less():
    def kept(model) -> int:
        """Bytes that the backward pass finds in memory."""
        seen = {}

        def keep(tensor):
            seen[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.arange(4), torch.randn(4, 13, model.config.code_channels))
        return sum(seen.values())

    torch.manual_seed(0)
    model = small_var()
    before = kept(model)
    train.change_parts(model, SimpleNamespace(compile=False, checkpoint_activations=True))
    assert kept(model) < before / 2


def test_a_step_is_computed_in_as_many_parts_as_fit():
    assert train.parts_for(768, 700_000_000, 75 * 10**9) == 12   # 64 images of 1.05 GB
    assert train.parts_for(8, 1, 12) == 1 and train.parts_for(8, 1, 11) == 2
    assert train.parts_for(7, 10, 1) == 7   # not even one fits: there is nothing smaller


def test_bytes_that_the_backward_pass_finds(tmp_path):
    stage = tokenizer_stage(tmp_path)
    assert stage.parts == 1   # on a CPU
    width, side = 8, 8
    convolutions = stage.bytes_for_backward()
    assert convolutions > 10 * width * side * side * 4   # of a dozen maps at full resolution
    stage.model = torch.nn.Linear(5, 7)   # it keeps its input, and for all images its weight
    stage.example = lambda: (torch.zeros(1, 5, requires_grad=True),)
    assert stage.bytes_for_backward() == 5 * 4


def test_parts_follow_from_the_memory_that_is_free(tmp_path, monkeypatch, capsys):
    """A third of an image's memory is for the rest of a step; 16 bytes a weight for training it."""
    stage = tokenizer_stage(tmp_path)
    weights = sum(weight.numel() for weight in stage.model.parameters())
    stage.options.device = SimpleNamespace(type="cuda")
    stage.bytes_for_backward = lambda: 1000
    for images, parts in ((8, 1), (7.9, 2), (4, 2), (2, 4), (0, 8)):
        free = int(16 * weights + 1500 * images)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 0))
        assert stage.parts_that_fit() == parts
        assert ("for memory" in capsys.readouterr().out) == (parts > 1)


def test_model_flops():
    model = small_var(code_channels=8)
    W, L, V, C, depth = 32, 14, 16, 8, 2
    per_token = depth * (3 * W * W + W * W + 2 * 4 * W * W) + W * V
    per_image = depth * 6 * W * W + 2 * W * W + (L - 1) * C * W
    seen = L * L   # so short a sequence is one masked call
    flops = kernels.forward_flops(model, torch.tensor([0]), torch.randn(1, 13, 8))
    assert flops == 2 * (L * per_token + per_image + depth * 2 * seen * W)


def test_speed(monkeypatch):
    stage = train.VARStage.__new__(train.VARStage)
    stage.model = small_var()
    stage.batch = 8
    stage.peak_flops = None
    assert stage.speed(None) == "" and stage.speed(2.0) == ", 16 images/s, 224 tokens/s"
    stage.peak_flops = 1e5
    stage.flops = 1000   # 16 images of 3000 operations, backward pass included
    assert stage.speed(2.0).endswith(", 48% of peak FLOP/s")
    cuda = torch.device("cuda")
    for card, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 NVL", 835e12),
                       ("NVIDIA T4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
        assert kernels.peak_flops(cuda) == peak
    assert kernels.peak_flops(torch.device("cpu")) is None


def test_what_a_stage_will_take_is_said(folder, tmp_path, monkeypatch):
    real = train.tqdm.format_dict.fget
    slow = property(lambda bar: {**real(bar), "elapsed": 5.0})   # seconds for 20 of the 40 steps
    monkeypatch.setattr(train.tqdm, "format_dict", slow)
    said = ran("train.py", "--data", folder, "--out", tmp_path, *TINY, "--stage", "tokenizer")
    assert "tokenizer: about 0.1 minutes on this machine" in said


def test_learning_rate():
    rates = [train.learning_rate(step, 100, 10, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1 and rates[28] == pytest.approx(0.82)   # a fifth of the way down
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and rates[99] == pytest.approx(0.11)


def test_the_average_of_the_weights(tmp_path):
    stage = tokenizer_stage(tmp_path)
    stage.ema = 0.75
    weight = stage.model.decoder.conv_out.bias
    average = stage.average.decoder.conv_out.bias
    expected = None
    for stage.step in range(4):
        torch.nn.init.constant_(weight, 2.0**stage.step)
        stage.update_average()
        expected = 1.0 if stage.step == 0 else 0.75 * expected + 0.25 * 2.0**stage.step
        assert average.tolist() == pytest.approx([expected] * 3)
    stage.ema = 0.0
    stage.model.quantizer.hits_V += 3
    stage.update_average()
    assert torch.equal(average, weight)
    assert torch.equal(stage.average.quantizer.hits_V, stage.model.quantizer.hits_V)


@pytest.mark.parametrize("flags, revived", [([], [20]), (["--unquantized", 0.5], []),
                                            (["--tokenizer-steps", 100], [20, 40, 60, 80])])
def test_codes_are_revived_now_and_then_until_the_end_is_near(tmp_path, monkeypatch, flags, revived):
    stage = tokenizer_stage(tmp_path, *flags)
    found = []
    monkeypatch.setattr(stage.model.quantizer, "remember", lambda: None)
    monkeypatch.setattr(stage.model.quantizer, "revive", lambda optimizer: found.append(stage.step))
    for stage.step in range(stage.steps):
        stage.after_step()
    assert found == revived


def test_notes_on_what_would_be_faster(monkeypatch, capsys):
    options = SimpleNamespace(device="cpu", precision="bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    sample.settle_device(options)
    said = capsys.readouterr().out
    assert "--precision fp32 is faster here" in said and "one thread of 8 is used" in said
    options = SimpleNamespace(device="cpu", precision="auto")
    sample.settle_device(options)
    assert options.precision == "fp32" and "faster" not in capsys.readouterr().out
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert sample.fast_bf16(torch.device("cpu"))
    for asked, settled in (("auto", "fp32"), ("bf16", "bf16")):
        options = SimpleNamespace(device="cpu", precision=asked)
        sample.settle_device(options)
        assert options.precision == settled and "is faster here" not in capsys.readouterr().out


@pytest.mark.parametrize("precision, allowed", [("fp32", False), ("bf16", True)])
def test_fp32_is_not_tf32(precision, allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    sample.settle_device(SimpleNamespace(device="cpu", precision=precision))
    assert torch.backends.cudnn.allow_tf32 == allowed


# Mistakes


def test_mistakes_in_training(folder, tmp_path):
    def refusal(*arguments, data=folder, out=tmp_path / "out") -> str:
        return refused("train.py", "--data", data, "--out", out, *TINY, *arguments)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "neither a folder nor one of" in refusal(data=tmp_path / "missing")
    assert "no sub-folders" in refusal(data=empty)
    (empty / "nothing").mkdir()
    assert "has 0 images" in refusal(data=empty)
    assert "start at 1" in refusal("--scales", "2,4")
    assert "and grow" in refusal("--scales", "1,4,4")
    assert "are images of 6" in refusal("--scales", "1,2,3")
    assert "are images of 8" in refusal("--image-size", 9)
    wrong = {"--unquantized": 1, "--heads": 0, "--seed": -1, "--last-scales": 0, "--var-lr": "nan", "--tokenizer-lr": 1e39,
             "--tokenizer-batch": 0, "--multipliers": "1,0", "--grad-accumulation": 0,
             "--scales": "1,b", "--ema": 1, "--label-dropout": 1.5, "--var-steps": 2.5, "--final-lr": 1.1, "--depth": 10**9}
    for flag, value in wrong.items():
        told = refusal(flag, value)
        assert f"{flag}: " in told and "must be" in told
    for batch in ("--tokenizer-batch", "--var-batch"):
        told = refusal("--grad-accumulation", 2, batch, 9)
        assert f"{batch} 9 does not divide into 2 parts" in told
    assert "not allowed with argument --resume" in refusal("--resume", "--overwrite")
    for name in ("shapes", "cifar10"):
        assert f"{name} has channels of its own" in refusal("--channels", 1, data=name)
    assert "is without it" in refusal("--stage", "tokenizer", "--tokenizer", "x.pt")
    (tmp_path / "file").touch()
    assert "File exists" in refusal(out=tmp_path / "file") or "Not a directory" in refusal(
        out=tmp_path / "file")
    assert "no tokenizer checkpoint" in refusal("--stage", "var")
    assert "cannot be used" in refusal("--device", "nonsense")
    assert "cannot be used" in refusal("--device", "meta")
    assert "would be taken for data" in refusal(out=folder / "out")
    assert "is below 8" in refusal("--adversarial-weight", 0.1, "--image-size", 4, "--scales", "1,2")
    assert not (tmp_path / "out" / "tokenizer.pt").exists()


def test_weights_that_are_no_numbers_are_not_saved(folder, tmp_path, monkeypatch):
    def after_step(stage) -> None:
        next(stage.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(train.TokenizerStage, "after_step", after_step)
    told = refused("train.py", "--data", folder, "--out", tmp_path, *TINY, "--tokenizer-steps", 1)
    assert "has weights that are no numbers at step 1" in told
    assert not (tmp_path / "tokenizer.pt").exists()


def test_a_refused_training_overwrites_nothing(folder, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "var.pt").read_bytes()
    refused("train.py", "--data", folder, "--out", tmp_path, *TINY, "--overwrite",
            "--tokenizer", tmp_path / "missing.pt")
    assert (tmp_path / "var.pt").read_bytes() == before


def test_no_compiler(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nmany lines")

    monkeypatch.setattr(torch, "compile", broken)
    told = refused("train.py", "--out", tmp_path, *TINY, "--compile")
    assert told.endswith("--compile does not work here: no compiler many lines")


@pytest.mark.parametrize("error", [
    RuntimeError("Failed to find C compiler. Please specify via CC"),
    subprocess.CalledProcessError(1, ["gcc"]), FileNotFoundError("gcc")], ids=type)
def test_a_machine_on_which_triton_cannot_start_kernels(error, finished, monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            raise error

    monkeypatch.setattr(kernels, "FACE", "triton")
    monkeypatch.setattr(kernels, "adaln_forward", Kernel())
    told = refused("sample.py", "--run", finished)
    assert "Triton could not build its launcher" in told and "Python's headers" in told


def test_a_mistake_ends_a_program_with_one_sentence(tmp_path):
    result = start(ROOT / "sample.py", "--run", tmp_path)
    missing = tmp_path / "var.pt"
    assert result.returncode == 2
    assert result.stderr == f"error: there is no transformer checkpoint at {missing}\n"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(
    "DefaultCPUAllocator: can't allocate memory"), RuntimeError("another")], ids=str)
def test_too_little_memory_is_told_in_one_sentence(error, capsys):
    def main():
        raise error

    enough = "another" in str(error)
    with pytest.raises(RuntimeError if enough else SystemExit):
        sample.run_program(main)
    assert ("not enough memory" in capsys.readouterr().err) == (not enough)
    with pytest.raises(sample.UserError if enough else type(error)):   # no file's fault
        with sample.blaming(ROOT):
            raise error


def test_a_terminal_that_does_not_know_a_letter():
    program = "import sample; sample.run_program(lambda: print('Ελλάδα, Fréchet'))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT,
                            env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=240)
    assert result.stdout == "??????, Fr?chet\n", result.stderr


def test_mistakes_in_sampling(finished, tmp_path):
    def refusal(*arguments, run=finished) -> str:
        return refused("sample.py", "--run", run, *arguments)

    assert "no transformer checkpoint" in refusal(run=tmp_path)
    assert "there is no class bird; there are cat, dog" in refusal("--classes", "bird")
    assert "is a checkpoint of a tokenizer" in refusal("--var", finished / "tokenizer.pt")
    assert "must be" in refusal("--top-p", "0")
    cut = tmp_path / "var.pt"
    cut.write_bytes((finished / "var.pt").read_bytes()[:5000])
    assert f"{cut} cannot be read" in refusal("--var", cut)
    other = write_other_tokenizer(finished, tmp_path / "tokenizer.pt")
    assert "another tokenizer" in refusal("--tokenizer", other)
    assert "would be a .png file" in refusal("--out", finished / "var.pt")


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_help_explains_every_flag(program):
    text = run(program, "--help").stdout.split("\n\n", 1)[1] + "\n"
    flags = re.findall(r"^  (?:-h, )?(--[a-z-]+)(.*\n(?: {10,}.*\n)*)", text, re.MULTILINE)
    assert len(flags) > 20
    for flag, rest in flags:
        assert re.search(r"(  |\n {10,})\S+ \S+", rest), f"{flag} has no help"


def test_every_preset_is_a_possible_model():
    for name in train.PRESETS:
        options = train.parse(["--preset", name])
        preset = train.settle_preset(options)
        config = preset.tokenizer_config(3)
        assert config.image_side == preset.image_size
        preset.var_config(config, 10)
