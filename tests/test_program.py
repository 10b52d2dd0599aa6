"""The whole program through its command line: tiny runs end to end, what changes how a model is
computed and not what, and every mistake told in one sentence."""
from __future__ import annotations

import ast
import gc
import io
import math
import os
import re
import runpy
import shlex
import shutil
import sys
import weakref
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from program import (
    ROOT, TINY, ran, refused, run, run_as_two, same_run, tiny_settings, tokenizer_stage,
)
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils.data import TensorDataset
from tqdm import tqdm

import kernels
import sample
import train
from support import watching
from support.checkpoint import blaming, load_checkpoint, save_checkpoint
from support.cli import UserError, in_short, run_program
from support.commands import parse
from support.data import (
    SHAPES, data_of, draw_shapes, fit_side, load_data, load_held_out, shuffled,
)
from support.devices import (
    PEAK_TFLOPS, LossScale, Machine, Speed, check_memory, choose_machine, copy_from_first,
    forward_flops, fp32_convolutions, fp32_products, gather_over_processes, has_fast,
    join_processes, own_cores, peak_flops, progress_bar, say, wait_for_others,
)
from support.evaluation import say_health, tokenizer_health
from support.images import Row, batches, grid, save_picture, to_float
from support.optim import learning_rate, update_ema
from support.presets import (
    PRESETS, Preset, check_folder, check_sizes, chosen_preset, training_flags, training_options,
    white_level,
)
from support.watching import read_log
from tokenizer import (
    Decoder, Encoder, PlaceAttention, ResidualBlock, Tokenizer, TokenizerConfig,
)
from var import VAR, Block, VARConfig

STACK = ["support", "kernels", "tokenizer", "var", "sample", "train", "papers"]


def test_each_file_imports_only_from_above_itself():
    """And no file of support/ from the five, nor any source from the tests."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("papers/*.py")]:
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                modules = [node.module]
            for module in {name.split(".")[0] for name in modules}:
                assert module not in ("tests", "reference", "program"), path
                if module in STACK:
                    assert STACK.index(module) <= STACK.index(own), f"{path} imports {module}"


def test_a_run_writes_what_it_promises(finished):
    promised = re.findall(r"^    ([a-z_]+\.\w+)(?:  ([a-z_]+\.\w+))?", train.__doc__, re.MULTILINE)
    files = {name for pair in promised for name in pair if name}
    assert {path.name for path in finished.iterdir()} == files
    for name in ("reconstructions.png", "samples.png", "curves.png"):
        with Image.open(finished / name) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 20   # not a blank sheet
    log = read_log(finished / "log.jsonl")
    for stage, steps in (("tokenizer", 12), ("var", 11)):
        lines = [line for line in log if line["stage"] == stage]
        assert [x["step"] for x in lines if x["split"] == "train"] == [1, 11]
        held_out = [x["step"] for x in lines if x["split"] == "held_out"]
        every = math.ceil(steps / 8)
        assert held_out == sorted({*range(every, steps + 1, every), steps})
        losses = [x["loss"] for x in lines if x["split"] == "train"]
        assert losses[-1] < losses[0]
    health = next(line for line in log if line["split"] == "health")
    assert len(health["psnr_per_scale"]) == 3 and 0 < health["codes_used"] <= 1
    assert health["step"] == max(line["step"] for line in log if line["stage"] == "tokenizer")
    first = next(line for line in log if line["stage"] == "var" and line["split"] == "train")
    assert abs(first["loss"] - np.log(32)) < 0.1


def test_a_training_draws_itself_and_computes_the_same(folder, finished, tmp_path, monkeypatch):
    """At each of its measurements, if there is time for it."""
    drawn = []

    def save(path: Path, picture) -> None:
        drawn.append((path.name, getattr(picture, "size", None)))
        save_picture(path, picture)

    monkeypatch.setattr(watching, "save_picture", save)
    monkeypatch.setattr(watching, "SHARE", 1e9)
    said = ran("train.py", "--data", folder, "--out", tmp_path, *TINY)
    assert same_run(tmp_path, finished)
    names = ["reconstructions.png"] * 6 + ["samples.png"] * 6
    assert [name for name, _ in drawn] == [x for name in names for x in (name, "curves.png")]
    few, all_of_them = drawn[12][1], drawn[-2][1]
    assert few[0] < all_of_them[0]
    assert said.splitlines()[-1].endswith(
        f"look at reconstructions.png, samples.png and curves.png in it, then try "
        f"python sample.py progress --run {tmp_path}")


def watched_log(tmp_path: Path, tensorboard: type | None = None, step: int = 0
                ) -> watching.WatchedLog:
    settings = SimpleNamespace(out=tmp_path, preset=SimpleNamespace(scales=(1, 2)),
                               tensorboard=tensorboard)
    return watching.WatchedLog("var", step, 1000, settings)


ROWS = [Row("one", [np.zeros((8, 8, 1), np.uint8)])]


def test_pictures_take_their_share_of_the_time_and_no_more(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: now))
    log = watched_log(tmp_path)
    log.write(1, "train", loss=1.0)
    drawn = []

    def draw(few: bool) -> list[Row]:
        nonlocal now
        drawn.append(step)
        now += 2.0
        return ROWS

    for step in range(10, 500, 10):
        now += 10.0
        log.show(draw, step)
        assert log.spent <= 0.03 * now + 2
    assert drawn[0] == 20 and 5 <= len(drawn) <= 8   # 0.03 of 17 s are half a second
    count = len(drawn)
    for stopped in (False, True):
        log.show(draw, step, stopped)
    assert len(drawn) == count + 1   # of a stopped training there is one in any case


def test_of_nothing_logged_there_are_no_curves(tmp_path, monkeypatch):
    """As where the gradient of the first step overflows in fp16, and a signal comes in it."""
    notes = []
    monkeypatch.setattr(
        watching, "grid", lambda rows, note: notes.append(note) or grid(rows, note=note))
    watched_log(tmp_path).show(lambda few: ROWS, 1, stopped=True)
    assert notes == ["step 1 of 1000"]
    assert (tmp_path / "samples.png").exists() and not (tmp_path / "curves.png").exists()


def test_a_full_disk_does_not_end_a_training_for_its_pictures(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    log = watched_log(tmp_path)
    monkeypatch.setattr(watching, "save_picture", full)
    log.show(lambda few: ROWS, 7, stopped=True)
    assert "no pictures of step 7: [Errno 28]" in capsys.readouterr().out


class Events(dict):
    """What is written for TensorBoard, instead of TensorBoard's writer."""
    made: list[Events] = []

    def __init__(self, folder: str, purge_step: int):
        self.folder = folder
        self.purge_step = purge_step
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self[name, step] = value

    def add_image(self, name: str, image: np.ndarray, step: int, dataformats: str) -> None:
        assert dataformats == "HWC" and image.dtype == np.uint8 and image.shape[2] == 3
        self[name, step] = image

    def flush(self) -> None:
        pass


def test_tensorboard_gets_the_numbers_and_pictures(folder, tmp_path, monkeypatch):
    module = "torch.utils.tensorboard"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(SummaryWriter=Events))
    flags = ["--data", folder, "--out", tmp_path, *TINY, "--tokenizer-steps", 16, "--var-steps", 8,
             "--tensorboard"]
    ran("train.py", *flags)
    log = read_log(tmp_path / "log.jsonl")
    for stage, steps, events in zip(("tokenizer", "var"), (16, 8), Events.made, strict=True):
        assert events.folder == str(tmp_path / "tensorboard" / stage) and events.purge_step == 1
        assert events.pop(("picture", steps)).std() > 10
        expected = {}
        for line in [line for line in log if line["stage"] == stage]:
            for name, value in list(line.items())[3:]:
                key = f"{line['split']}/{name}"
                if isinstance(value, list):
                    assert len(value) == 3
                    by_scale = zip(("1x1", "2x2", "4x4"), value)
                    expected |= {(f"{key}/{scale}", line["step"]): x for scale, x in by_scale}
                else:
                    expected[key, line["step"]] = value
        assert events == expected
    monkeypatch.setitem(sys.modules, module, None)   # as if it could not be imported
    assert refused("train.py", *flags, "--resume").endswith("pip install tensorboard")


def test_what_is_told_of_a_run_can_be_typed(capsys):
    watching.say_what_next(Path("my run"), ["var"])
    said = capsys.readouterr().out
    assert "my run is complete; look at samples.png and curves.png" in said and "--run 'my run'" in said
    watching.say_what_next(Path("my run"), ["tokenizer"])
    assert f"{Path('my run/tokenizer.pt')} is complete; look at rec" in capsys.readouterr().out


def test_the_first_process_alone_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(Events, "made", [])
    log = watched_log(tmp_path, Events, step=5)
    assert log.writer.purge_step == 6   # what comes after it is computed again
    log.show(pytest.fail, 6)   # it is too soon
    monkeypatch.setattr(watching, "rank_and_world", lambda: (1, 2))
    log.show(pytest.fail, 6, stopped=True)
    assert watched_log(tmp_path, Events).writer is None


def test_tensorboard_reads_what_is_written(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard")
    log = watched_log(tmp_path, watching.summary_writer())
    log.write(1, "train", loss=0.5, accuracy_per_scale=[0.25, 1.0])
    log.draw(ROWS, 1)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "var")).Reload()
    tags = ["train/loss", "train/accuracy_per_scale/1x1", "train/accuracy_per_scale/2x2"]
    assert [events.Scalars(tag)[0].value for tag in tags] == [0.5, 0.25, 1.0]
    assert events.Images("picture")[0].step == 1


def test_bars_in_a_log_are_a_line_every_so_often(monkeypatch):
    intervals = []
    real = tqdm.__init__

    def noted(bar, *arguments, **named):
        intervals.append(named["mininterval"])
        real(bar, *arguments, **named)

    monkeypatch.setattr(tqdm, "__init__", noted)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert len(list(batches(30, 10, "generate"))) == 3
    assert [len(list(batches(30, *how))) for how in ((10,), (30, "generate"))] == [3, 1]
    assert intervals == [60]


def test_the_health_that_is_printed_is_the_one_measured(finished, capsys):
    tokenizer = sample.load_tokenizer(finished / "tokenizer.pt")
    images, _ = load_held_out(finished)[0].tensors
    health = tokenizer_health(tokenizer, [to_float(images)])
    logged = next(line for line in read_log(finished / "log.jsonl") if line["split"] == "health")
    for name, value in health.items():
        assert np.allclose(logged[name], value, rtol=1e-4), name
    say_health(health, tokenizer.config)
    said = capsys.readouterr().out
    assert f"PSNR {health['psnr_per_scale'][-1]:.2f} dB; {health['codes_used']:.0%} of 32" in said
    assert len(said.splitlines()) == 5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(folder, tmp_path, precision):
    flags = ["--tokenizer-steps", 12, "--var-steps", 12, "--precision", precision,
             "--smaller-weight", 0, "--edge-weight", 1]   # else a step is left out in fp16
    ran("train.py", "--data", folder, "--out", tmp_path, *TINY, *flags)
    losses = [x["loss"] for x in read_log(tmp_path / "log.jsonl") if x["split"] == "train"]
    assert len(losses) == 4 and losses[1] < losses[0] and losses[3] < losses[2]
    ran("sample.py", "--run", tmp_path, "--per-class", 2, "--precision", precision)


def test_a_finished_run_is_left_as_it_is(folder, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    said = ran("train.py", "--data", folder, "--out", out, *TINY, "--resume")
    assert said.count("is finished") == 2 and same_run(out, finished)
    said = ran("train.py", "--data", folder, "--out", tmp_path / "mistyped", *TINY, "--resume",
               "--tokenizer-steps", 1, "--var-steps", 1)
    assert f"there is no tokenizer.pt or var.pt in {tmp_path / 'mistyped'} to go on from" in said


COMPARED = ["--label-dropout", 0, "--tokenizer-steps", 20, "--var-steps", 12,
            "--var-lr", 1e-3,   # at a high rate, rounding errors double every few steps
            "--edge-weight", 0]   # the sign of a step near 0 is rounding, too


def losses(out: Path) -> dict[tuple, float]:
    """What a run logged, by stage, step and split: the losses of its train steps."""
    lines = read_log(out / "log.jsonl")
    return {(line["stage"], line["step"], line["split"]):
            line["loss"] if line["split"] == "train" else 0.0 for line in lines}


def test_the_losses_do_not_depend_on_how_a_batch_is_computed(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "dog" / "05.jpg").unlink()   # streamed, another would stand in for it
    same = ["--data", data, *TINY, *COMPARED, "--tokenizer-steps", 6, "--var-steps", 3]
    ran("train.py", "--out", tmp_path / "one", *same)
    expected = losses(tmp_path / "one")
    ran("train.py", "--out", tmp_path / "streamed", *same, "--stream", "--workers", 0)
    assert losses(tmp_path / "streamed") == expected
    ran("train.py", "--out", tmp_path / "divided", *same, "--grad-accumulation", 4)
    assert losses(tmp_path / "divided") == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.parametrize("scales, multipliers, weight, expected", [
    ("1,4", "1,2", 0.7, [2, 3, 2, 3, 2, 3]), ("1,2,4", "1,2", 0, 6 * [None]),
    ("1,2", "1,2,2", 0.7, 6 * [None]), ("1", "1,1,1,1", 0.7, 6 * [None])])
def test_every_step_has_a_smaller_image(tmp_path, scales, multipliers, weight, expected):
    """Their sides in turn, between 1 and the latent's; in the loss they have their weight."""
    stage = tokenizer_stage(
        tmp_path, "--scales", scales, "--multipliers", multipliers, "--smaller-weight", weight,
        "--edge-weight", 0)
    asked = []

    def model(images, quantize, small_s):
        asked.append(small_s)
        return stage.model(images, quantize, small_s)

    for stage.step in range(6):
        images, labels = stage.rows[list(range(4))]
        total, to_log = stage.loss(model, images, labels)
        parts = to_log()
        without = parts["mse"] + 0.2 * parts["l1"] + parts["codebook"]
        added = weight * parts["smaller"] if asked[-1] else 0
        assert total.item() == pytest.approx((without + added).item(), rel=1e-5)
    assert asked == expected


@pytest.mark.filterwarnings("error::FutureWarning")
def test_two_processes_have_the_losses_of_one(folder, tmp_path):
    """With the adversarial loss at last, in three steps: its weight is a micro-batch's."""
    same = ["--data", folder, *TINY, *COMPARED, "--tokenizer-steps", 24, "--var-steps", 2,
            "--adversarial-weight", 0.4, "--discriminator-width", 8, "--adversarial-from", 0.9,
            "--grad-accumulation", 2]
    ran("train.py", "--out", tmp_path / "one", *same)
    result = run_as_two("--out", tmp_path / "two", *same)
    assert result.returncode == 0, result.stderr
    one = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(one, rel=0, abs=1e-5)


@pytest.mark.long
def test_imagenet256_goes_through(folder, tmp_path, monkeypatch):
    """Two steps of each stage, and then an image of each class."""
    monkeypatch.setattr("support.evaluation.CLASSIFIER_STEPS", 2)
    ran("train.py", "--preset", "imagenet256", "--data", folder, "--out", tmp_path, "--device",
        "cpu", "--tokenizer-steps", 2, "--tokenizer-batch", 2, "--var-steps", 2, "--var-batch", 2,
        "--checkpoint-every", 1, "--workers", 1)
    assert any("discriminator" in line for line in read_log(tmp_path / "log.jsonl"))
    ran("sample.py", "--run", tmp_path, "--device", "cpu", "--per-class", 1)


# What changes how a model is computed, and not what


def small_var(**values) -> VAR:
    preset = Preset(scales=(1, 2, 3), depth=2, width=32, heads=2, vocabulary=16, **values)
    return VAR(VARConfig(**preset.var_shape(classes=4)))


def gradients(model: nn.Module, *inputs) -> list[torch.Tensor]:
    torch.manual_seed(0)   # of dropped labels and layers
    outputs = model(*inputs)
    model.zero_grad()
    loss = outputs[1]["mse"] if isinstance(outputs, tuple) else outputs.square().mean()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def settings(out: Path = Path(), compile: bool = False, **values) -> train.Settings:
    machine = Machine(torch.device("cpu"), compile=compile)
    return train.Settings(Preset(), machine, out, **values)


@pytest.mark.parametrize("which", ["tokenizer", "transformer"])
@pytest.mark.parametrize("how", ["compile", "checkpoint_activations"])
def test_compiling_and_checkpointing_do_not_change_gradients(which, how, monkeypatch):
    torch.manual_seed(0)
    if which == "tokenizer":
        preset = Preset(image_size=4, scales=(1, 2), multipliers=(1, 1), tokenizer_width=8)
        model = Tokenizer(TokenizerConfig(**preset.tokenizer_shape(3)))
        inputs = (torch.rand(4, 3, 4, 4) * 2 - 1, False)
    else:
        dropped = 0.0 if how == "compile" else 0.5   # compiled, it draws others
        model = small_var(label_dropout=dropped, drop_path=dropped)
        inputs = (torch.arange(4), torch.randn(4, 13, 8))
    for p in model.parameters():   # as initialised, most branches have no gradient
        nn.init.normal_(p, std=0.2)
    before = gradients(model, *inputs)
    if how == "compile":   # captured and differentiated as always; Inductor's code would take long
        compile_module = nn.Module.compile
        monkeypatch.setattr(nn.Module, "compile", lambda module, **flags: compile_module(
            module, backend="aot_eager", **flags))
    with functorch_config.patch(donated_buffer=True):
        train.wrap_layers(model, settings(**{how: True}))
        assert functorch_config.donated_buffer == (how != "compile")
        after = gradients(model, *inputs)
    twice = {type(module) for module in model.modules() if isinstance(module.forward, partial)}
    layers = {ResidualBlock, PlaceAttention} if which == "tokenizer" else {Block}
    assert twice == (layers if how == "checkpoint_activations" else set())
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
    train.wrap_layers(model, settings(checkpoint_activations=True))
    assert kept(model) < before / 2


def test_model_flops():
    model = small_var()
    W, L, V, C, depth = 32, 14, 16, 8, 2
    per_token = depth * (3 * W * W + W * W + 2 * 4 * W * W) + W * V
    per_image = depth * 6 * W * W + 2 * W * W + (L - 1) * C * W
    seen = L * L   # on a CPU it is one masked call
    flops = forward_flops(model.train(), torch.tensor([0]), torch.randn(1, 13, 8))
    assert model.training
    assert flops == 2 * (L * per_token + per_image + depth * 2 * seen * W)


def test_speed(monkeypatch):
    gpu = Machine(torch.device("cuda"), torch.bfloat16)
    for card, peak in (("NVIDIA GeForce GTX 1080", None), ("NVIDIA H100 NVL", 835e12),
                       ("NVIDIA RTX A1000 Laptop GPU", None), ("NVIDIA A100-SXM4-80GB", 312e12),
                       ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GH200 480GB", 989e12),
                       ("NVIDIA GeForce RTX 3060 Ti", None), ("NVIDIA GeForce RTX 3060", 25e12),
                       ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
        assert peak_flops(gpu) == peak
    assert peak_flops(Machine(torch.device("cuda"))) is None   # fp32
    model = small_var()
    example = torch.tensor([0]), torch.randn(1, 13, 8)
    speed = Speed(Machine(torch.device("cpu")), 8, model, example)
    bar = SimpleNamespace(n=30, initial=10, format_dict={"elapsed": 10.0})
    assert speed.text(bar) == "16 images/s"
    monkeypatch.setattr("support.devices.peak_flops", lambda machine: 1e5)
    speed = Speed(gpu, 8, model, example)
    speed.flops = 1000   # 16 images of 3000 operations, backward pass included
    assert speed.text(bar) == "16 images/s, 48% of peak FLOP/s"
    monkeypatch.setattr("support.devices.rank_and_world", lambda: (0, 2))
    assert speed.text(bar) == "16 images/s, 24% of peak FLOP/s"   # of two cards


def test_learning_rate():
    rates = [learning_rate(step, 100, 10, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1 and rates[28] == pytest.approx(0.82)   # a fifth of the way down
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and rates[99] == pytest.approx(0.11)


def test_the_ema_of_the_weights():
    """Weights are averaged; buffers are copied."""
    model, ema = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    expected = None
    for step in range(4):
        model.weight.data.fill_(2.0**step)
        model.running_mean.fill_(2.0**step)
        model.num_batches_tracked.fill_(step)
        update_ema(ema, model, 0.75 if step else 0.0)
        expected = 1.0 if step == 0 else 0.75 * expected + 0.25 * 2.0**step
        assert ema.weight.tolist() == pytest.approx([expected] * 2)
        assert ema.running_mean.tolist() == [2.0**step] * 2
        assert ema.num_batches_tracked == step
    update_ema(ema, model, 0.0)
    assert torch.equal(ema.weight, model.weight)


def var_stage(out: Path, *flags, **values) -> train.VARStage:
    """A transformer's training on the tokens of a few shapes, about to begin; it draws nothing."""
    first = tokenizer_stage(out, *flags, **values)
    torch.manual_seed(0)
    first.model.quantizer.start_from(torch.randn(16, 4, 4, 4))
    stage = train.VARStage(first.model.eval(), first.data, first.settings)
    stage.picture = lambda few: []
    return stage


def test_the_average_begins_with_the_weights_after_the_first_step(tmp_path):
    stage = var_stage(tmp_path, var_steps=3, ema=0.75)
    seen = []
    stage.after_step = lambda: seen.append([p.detach().clone() for p in stage.model.parameters()])
    averages = list(stage.run().parameters())
    for average, first, second, third in zip(averages, *seen, strict=True):
        torch.testing.assert_close(average, 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third)
    kept = load_checkpoint(stage.path, "transformer")["model"]
    assert all(kept[name].equal(weight) for name, weight in stage.ema.named_parameters())
    assert not any(map(torch.equal, averages, seen[-1]))
    assert not any(average.requires_grad for average in averages)


def test_pictures_are_smaller_while_a_training_goes_on(tmp_path, monkeypatch):
    stage = tokenizer_stage(tmp_path)
    stage.unseen = stage.unseen.repeat(4, 1, 1, 1)
    for few, count in ((True, 16), (False, 32)):
        assert sum(len(row.images) for row in stage.picture(few)) == 2 * count
    asked = []
    monkeypatch.setattr(train, "draw_samples", lambda run, *how: asked.append(how))
    stage = var_stage(tmp_path)
    stage.settings = replace(stage.settings, seed=7)
    for few in (True, False):
        train.VARStage.picture(stage, few)
    assert asked == [(None, 4, 7), (None, 10, 7)]


def test_all_that_a_training_asks_its_models_is_in_its_precision(tmp_path):
    """What is measured and shown as well as what is trained; but tokens are made in fp32, as published."""
    seen = []

    def note(module, _):
        if isinstance(module, (Encoder, Decoder, VAR)):
            seen.append((type(module), torch.is_autocast_enabled("cpu")))

    first = tokenizer_stage(tmp_path, "--precision", "bf16", tokenizer_steps=2, var_steps=1)
    with nn.modules.module.register_module_forward_pre_hook(note):
        tokenizer = first.run()
        assert {*seen} == {(Encoder, True), (Decoder, True)}
        seen.clear()
        stage = train.VARStage(tokenizer, first.data, first.settings)
        assert (Encoder, False) in seen and (Encoder, True) not in seen
        seen.clear()
        stage.run()
    assert {*seen} == {(Decoder, True), (VAR, True)}


def test_optimizers_step_at_the_rates_of_the_schedule(tmp_path):
    stage = var_stage(tmp_path, var_steps=4, var_lr=0.02, warmup=2, final_lr=0.1)
    rates = [[] for _ in stage.optimizers]
    for optimizer, own in zip(stage.optimizers, rates):
        optimizer.register_step_pre_hook(
            lambda this, *_, own=own: own.append({group["lr"] for group in this.param_groups}))
    stage.run()
    assert len(rates) == 2
    for own in rates:   # half, the peak, the peak, and half of the way down to a tenth
        assert [rate for step in own for rate in step] == pytest.approx([0.01, 0.02, 0.02, 0.011])


def test_a_long_gradient_is_clipped_to_length_1(tmp_path):
    stage = var_stage(tmp_path, var_steps=1)
    loss = stage.loss

    def steep(*given):
        total, to_log = loss(*given)
        return 1000 * total, to_log

    stage.loss = steep
    stage.run()
    squares = [p.grad.square().sum() for p in stage.model.parameters() if p.grad is not None]
    assert sum(squares).sqrt().item() == pytest.approx(1, rel=1e-3)


def test_matrices_decay_in_the_transformer_and_nothing_does_in_the_tokenizer(tmp_path):
    values = dict(tokenizer_lr=0.003, var_lr=0.002, weight_decay=0.07)
    for stage, lr, decays in ((tokenizer_stage(tmp_path, **values), 0.003, [(0, 0), (0,)]),
                              (var_stage(tmp_path, **values), 0.002, [(0.07, 0), (0.07,)])):
        groups = [optimizer.param_groups for optimizer in stage.optimizers]   # AdamW's and Muon's
        assert [tuple(group["weight_decay"] for group in some) for some in groups] == decays
        assert all(group["lr"] == lr for some in groups for group in some)


def test_micro_batches_have_the_mean_gradient(tmp_path, monkeypatch):
    """Before it is clipped; afterwards it would have the same length in any case."""
    norms = []
    clip = train.clip_grad_norm_
    monkeypatch.setattr(train, "clip_grad_norm_", lambda *given: norms.append(clip(*given)) or norms[-1])
    for count in (1, 4):
        var_stage(tmp_path / str(count), "--grad-accumulation", count, var_steps=1, label_dropout=0.0).run()
    torch.testing.assert_close(*norms)


def test_held_out_losses_of_the_transformer_are_means_over_images(tmp_path):
    """Of the averaged weights, in batches of 8 and 2, against all ten images at once."""
    stage = var_stage(tmp_path)
    for weight in stage.ema.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    sizes = []
    hook = stage.ema.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    for stage.settings in (replace(stage.settings, grad_accumulation=n) for n in (2, 1)):
        found = stage.validate()
    hook.remove()
    assert sizes == [4, 4, 2, 8, 2]   # as trained
    tokens, labels = (x.long() for x in stage.held_out_rows.tensors)
    assert len(tokens) == 10
    with torch.no_grad():
        chances = stage.ema(labels, stage.tokenizer.teacher_inputs(tokens)).double().softmax(dim=2)
    nats = -chances.gather(2, tokens[..., None]).squeeze(2).log()
    hits = (chances.argmax(dim=2) == tokens).double()
    assert nats.mean(dim=1).std() > 0.1   # images differ
    for name, values in (("loss", nats), ("accuracy", hits)):
        assert found[name] == pytest.approx(values.mean().item(), rel=1e-4)
        by_scale = [values[:, span].mean().item() for span in (slice(0, 1), slice(1, 5), slice(5, 21))]
        assert found[f"{name}_per_scale"] == pytest.approx(by_scale, rel=1e-4)


@pytest.mark.parametrize("vocabulary", [2**15, 2**15 + 1])
def test_the_last_code_of_a_large_vocabulary_is_kept(tmp_path, monkeypatch, vocabulary):
    """int16 goes up to 2^15 - 1."""
    sizes = []
    monkeypatch.setattr(train, "at_a_time", lambda side: 4)
    stage = tokenizer_stage(tmp_path)
    model = stage.model
    model.config = replace(model.config, vocabulary=vocabulary)
    model.encode = lambda images: sizes.append(len(images)) or torch.full(
        (len(images), 21), vocabulary - 1)
    tokens, _ = train.tokenise(model, stage.data.held_out, stage.settings, "tokenise")
    assert (tokens == vocabulary - 1).all() and sizes == [4, 4, 2]
    assert tokens.dtype == (torch.int16 if vocabulary == 2**15 else torch.int32)


@pytest.mark.parametrize("values, revived", [
    ({"tokenizer_steps": 24}, [20]), ({"unquantized": 0.9}, []), ({"tokenizer_steps": 100}, [20, 40, 60, 80]),
    ({"tokenizer_steps": 400}, [*range(60, 341, 20)])])   # from after 40, before 360
def test_codes_are_revived_now_and_then_until_the_end_is_near(
        tmp_path, monkeypatch, values, revived):
    stage = tokenizer_stage(tmp_path, **values)
    quantizer = stage.model.quantizer
    quantizer.last_residuals = [torch.ones(1, 1, 4)]
    counted, found = [], []
    monkeypatch.setattr(quantizer, "update_hits", lambda counts_V: counted.append(counts_V.clone()))
    monkeypatch.setattr(quantizer, "revive", lambda residuals, optimizer: found.append(stage.step))
    for stage.step in range(stage.steps):
        stage.counts_V += 1
        stage.after_step()
    assert found == revived
    assert len(counted) == stage.steps - stage.quantized_from
    assert all(counts_V.max() == 1 for counts_V in counted[1:])   # of the step alone


def test_hits_are_those_of_a_step_in_however_many_micro_batches(tmp_path):
    counts = []
    for count in (1, 2, 4):
        stage = tokenizer_stage(tmp_path)
        torch.manual_seed(0)
        stage.model.quantizer.start_from(torch.randn(16, 4, 4, 4))
        stage.step = stage.quantized_from
        images, labels = stage.rows[:8]
        for some in images.chunk(count):
            stage.loss(stage.model.train(), some, labels)
        counts.append(stage.counts_V)
    assert counts[0].sum() == 8 * 21 and torch.equal(counts[0], counts[1])
    assert torch.equal(counts[0], counts[2])


def test_codes_start_as_those_of_the_first_process(tmp_path, monkeypatch):
    """On other GPUs the same latents, and so the codes, may be rounded otherwise."""
    stage = tokenizer_stage(tmp_path)
    stage.settings = replace(stage.settings, seed=7)
    asked = []
    monkeypatch.setattr(train, "shuffled", lambda *how: asked.append(how) or shuffled(*how))
    monkeypatch.setattr(train, "copy_from_first", lambda x: x.fill_(3))
    for stage.step in stage.quantized_from - 1, stage.quantized_from:
        assert not stage.model.quantizer.codebook_VC.any()
        stage.before_step()
    assert (stage.model.quantizer.codebook_VC == 3).all()
    assert asked == [(20, 20, 7, 0, 1)]   # all images, as there are fewer than 512


def test_codes_are_revived_by_what_all_processes_saw(tmp_path, monkeypatch):
    """Here another process has the residuals of this one, plus 1, and twice its hits."""
    stage = tokenizer_stage(tmp_path, tokenizer_steps=24)
    quantizer = stage.model.quantizer
    quantizer.last_residuals = [torch.randn(2, s * s, 4) for s in (1, 2, 4)]
    monkeypatch.setattr(train, "gather_over_processes", lambda x: torch.cat([x, x + 1]))
    monkeypatch.setattr(train, "sum_over_processes", lambda x: x.mul_(3))
    counted, found = [], []
    monkeypatch.setattr(quantizer, "update_hits", lambda counts_V: counted.append(counts_V.tolist()))
    monkeypatch.setattr(quantizer, "revive", lambda residuals, optimizer: found.append(residuals))
    stage.counts_V += torch.arange(32)
    stage.step = 20
    stage.after_step()
    assert counted == [list(range(0, 96, 3))] and not stage.counts_V.any()
    for all_BlC, own_BlC in zip(*found, quantizer.last_residuals, strict=True):
        assert torch.equal(all_BlC[:2], own_BlC) and torch.equal(all_BlC[2:], own_BlC + 1)


def test_processes_change_the_codebook_alike_and_drop_labels_of_their_own(tmp_path, monkeypatch):
    drawn = []
    for rank in (0, 1):
        stage = tokenizer_stage(tmp_path / str(rank), tokenizer_steps=2)
        stage.picture = lambda few: []
        stage.finish = lambda log: None
        numbers = {"before_step": [], "loss": [], "after_step": []}
        for name, own in numbers.items():
            def noted(*given, own=own, method=getattr(stage, name)):
                own.append(torch.rand(()).item())
                return method(*given)
            setattr(stage, name, noted)
        with monkeypatch.context() as patch:
            patch.setattr(train, "rank_and_world", lambda: (rank, 1))
            stage.run()
        drawn.append(numbers)
    first, second = drawn
    for name in ("before_step", "after_step"):
        assert first[name] == second[name] and len(set(first[name])) == 2
    assert len({*first["loss"], *second["loss"]}) == 4


def test_nothing_of_stage_one_is_in_memory_in_stage_two(folder, tmp_path, monkeypatch):
    """Layers whose activations are not kept refer to themselves."""
    monkeypatch.setattr(train, "gc", gc)   # which conftest.py replaces
    models = []

    class Watched(train.TokenizerStage):
        def begin(self):
            models.append(weakref.ref(self.model))

    def stage_two(*_):
        raise UserError(f"so far {models[0]()} is left")

    monkeypatch.setattr(train, "TokenizerStage", Watched)
    monkeypatch.setattr(train, "VARStage", stage_two)
    gc.disable()
    try:
        told = refused("train.py", "--data", folder, "--out", tmp_path, *TINY, "--tokenizer-steps", 1,
                       "--checkpoint-activations")
    finally:
        gc.enable()
    assert "so far None is left" in told


# What a training sees


def test_data_are_known_by_all_of_them():
    images = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).byte()
    sets = [TensorDataset(images, torch.zeros(2)) for _ in range(2)]
    first = data_of(*sets, ["one"]).digest
    for tensor in (tensor for part in sets for tensor in part.tensors):
        tensor.view(-1)[-1] += 1
        assert data_of(*sets, ["one"]).digest != first
        tensor.view(-1)[-1] -= 1
    assert data_of(*sets, ["one"]).digest == first


def test_every_training_and_what_it_holds_out_has_shapes_of_its_own(monkeypatch, tmp_path, capsys):
    """A folder of that name is not silently passed over."""
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("support.data.draw_shapes", lambda count, side, seed: asked.append(
        (count, seed)) or draw_shapes(10, 8, seed))
    for seed in (0, 1, 2):
        load_data("shapes", 8, None, tmp_path, tmp_path, seed, 0, False)
    assert asked == [(20_000, 0), (1000, 1), (20_000, 2), (1000, 3), (20_000, 4), (1000, 5)]
    assert "note" not in capsys.readouterr().out
    Path("shapes").mkdir()
    load_data("shapes", 8, None, tmp_path, tmp_path, 0, 0, False)
    assert "the folder here would be --data ./shapes" in capsys.readouterr().out


def test_a_shape_is_lighter_or_darker_than_what_is_behind_it():
    images, labels = draw_shapes(400, 32, 0).tensors
    values = images[labels == SHAPES.index("circle")].amax(dim=1).int()
    lighter = values[:, 16, 16] - values[:, 0, 0]
    assert lighter.abs().min() > 25 and 10 < (lighter > 0).sum() < 30   # of 40


def test_no_pass_is_in_the_order_of_another():
    """Neither of the same training nor of one with another seed."""
    passes = [tuple(chain.from_iterable(shuffled(20, 10, seed, 2 * i, 2 * i + 2)))
              for seed in range(3) for i in range(3)]
    assert len(set(passes)) == 9


# Devices


def test_products_in_fp32_are_in_tf32_only_where_autocast_is_on():
    matmul = torch.backends.cuda.matmul
    first = matmul.allow_tf32
    x = torch.ones(2, 2)
    try:
        for before, on in product((False, True), repeat=2):
            matmul.allow_tf32 = before
            with torch.autocast("cpu", torch.bfloat16, enabled=on), fp32_products("cpu"):
                assert matmul.allow_tf32 == (before or on)
                assert (x @ x).dtype == torch.float32
            assert matmul.allow_tf32 == before
    finally:
        matmul.allow_tf32 = first


def test_notes_on_what_would_be_faster(monkeypatch, capsys):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("support.devices.own_cores", lambda: 8)
    assert choose_machine("cpu", "bf16").dtype == torch.bfloat16
    said = capsys.readouterr().out
    assert "--precision fp32 is faster here" in said and "one thread of 8 is used" in said
    monkeypatch.setattr("support.devices.own_cores", lambda: 1)   # as under taskset
    assert choose_machine("cpu", "auto").dtype == torch.float32 and not has_fast("bf16", cpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert has_fast("bf16", cpu) and not has_fast("fp16", cpu)
    assert choose_machine("cpu", "auto").dtype == torch.float32
    assert choose_machine("cpu", "bf16").dtype == torch.bfloat16
    assert capsys.readouterr().out == ""
    assert choose_machine("cpu", "fp16").dtype == torch.float16
    assert "no instructions for fp16" in capsys.readouterr().out
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_fp16": True}, raising=False)
    assert has_fast("fp16", cpu) and not has_fast("bf16", cpu)


def test_two_threads_of_eight_are_somebody_s_choice(monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("support.devices.own_cores", lambda: 8)
    choose_machine("cpu", "fp32")
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
def test_cores_are_those_of_the_process():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert own_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("precision, allowed", [("fp32", False), ("bf16", True)])
def test_fp32_is_not_tf32(precision, allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.backends.cuda.matmul.allow_tf32 = True   # as a container may
    choose_machine("cpu", precision)
    assert torch.backends.cudnn.allow_tf32 == allowed
    assert not torch.backends.cuda.matmul.allow_tf32


def test_the_gpu_that_is_named_becomes_the_current_one(monkeypatch, capsys):
    """Else events and streams would be those of GPU 0. And `auto` is what its generation has."""
    chosen = []
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    by_card = {(9, 0): torch.bfloat16, (8, 0): torch.bfloat16, (7, 5): torch.float16,
               (7, 0): torch.float16, (6, 1): torch.float32}
    for card, dtype in by_card.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
        assert choose_machine("cuda:1", "auto") == Machine(torch.device("cuda:1"), dtype)
    with monkeypatch.context() as patch:   # AMD's numbers are those of its architectures
        patch.setattr(torch.version, "hip", "7.0")
        for card, fast in {(9, 4): True, (10, 3): False, (11, 0): True}.items():
            patch.setattr(torch.cuda, "get_device_capability", lambda device: card)
            assert has_fast("bf16", torch.device("cuda")) == fast
            assert has_fast("fp16", torch.device("cuda"))
    choose_machine("cuda", "fp32")   # is the current one, and PyTorch would refuse to make it that
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    choose_machine("cuda", "fp32")
    choose_machine("cuda:2", "fp32")
    assert chosen == [*5 * [1], 3, 2]
    choose_machine("mps", "bf16")   # of which nobody knows what it emulates
    assert capsys.readouterr().out == ""


def test_nvidia_s_generation_10_has_bf16(monkeypatch):
    """AMD's 10 has not."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert has_fast("bf16", torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_is_scaled_in_fp16_alone(dtype):
    scale = LossScale(Machine(torch.device("cpu"), dtype))
    assert scale.factor() == 1 and not scale.is_enabled() and scale.state_dict() == {}


def test_processes_wait_for_each_other_for_days(monkeypatch):
    """PyTorch's own limit, of half an hour, ends before a large data set is decoded."""
    done = []
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda timeout: done.append(timeout.days))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: done.append("waited"))
    join_processes()
    wait_for_others()
    assert done == [30, "waited"]


def test_the_rows_of_all_processes_come_in_order(monkeypatch):
    def all_gather(parts, own_B):
        assert own_B.is_contiguous()   # NCCL takes no other
        for rank, part_B in enumerate(parts):
            part_B.copy_(own_B + 10 * rank)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    x_B = torch.arange(4)[::2]
    assert gather_over_processes(x_B).tolist() == [0, 2, 10, 12, 20, 22]


def test_all_processes_take_what_the_first_one_has(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda x, src: x.fill_(10 + src))
    x = torch.zeros(2)
    copy_from_first(x)
    assert x.tolist() == [10, 10]


# Mistakes


def test_mistakes_in_training(folder, tmp_path, monkeypatch):
    def refusal(*arguments, data=folder, out=tmp_path / "out") -> str:
        return refused("train.py", "--data", data, "--out", out, *TINY, *arguments)

    assert "start at 1" in refusal("--scales", "2,4")
    assert "and grow" in refusal("--scales", "1,4,4")
    assert "are images of 6" in refusal("--scales", "1,2,3")
    assert "are images of 8" in refusal("--image-size", 9)
    assert "is not divisible by 3 heads" in refusal("--heads", 3)
    wrong = {"--edge-weight": "inf", "--checkpoint-every": 0, "--grad-accumulation": 0,
             "--unquantized": 1, "--heads": 0, "--seed": -1, "--var-lr": "nan",
             "--tokenizer-lr": 1e39, "--multipliers": "1,0", "--scales": "1,b", "--ema": 1,
             "--image-size": 1, "--label-dropout": 1.5, "--var-steps": 2.5, "--depth": 10**9}
    for flag, value in wrong.items():
        told = refusal(flag, value)
        assert f"{flag}: " in told and "must be" in told
    for batch in ("--tokenizer-batch", "--var-batch"):
        told = refusal("--grad-accumulation", 2, batch, 9)
        assert f"{batch} 9 does not divide into 2 micro-batches" in told
    with monkeypatch.context() as patch:
        patch.setattr(train, "rank_and_world", lambda: (0, 3))
        assert "does not divide into 6 micro" in refusal("--grad-accumulation", 2)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"cannot be a folder, as {tmp_path / 'file'} is a file" in refusal(out=out)
    assert "no tokenizer checkpoint" in refusal("--stage", "var")
    assert "is a folder; name the file" in refusal("--stage", "var", "--tokenizer", folder)
    for device in ("nonsense", "meta", "hpu"):
        assert "cannot be used" in refusal("--device", device)
    assert "would be taken for data" in refusal(out=folder / "out")
    monkeypatch.setattr("support.data.draw_shapes",
                        lambda count, side, seed: draw_shapes(count // 100, side, seed))
    assert "shapes has images of 3 channels, and 1 are asked" in refusal("--channels", 1,
                                                                         data="shapes")
    assert not (tmp_path / "out" / "tokenizer.pt").exists()


def test_flags_of_training(tmp_path, monkeypatch):
    """All of them come to where they count."""
    asked = []
    data = tokenizer_stage(tmp_path).data
    data.keep_classifier_images = lambda out, workers: asked.append(workers)
    stage = lambda *made: asked.append(made) or SimpleNamespace(run=lambda: nn.Identity())
    monkeypatch.setattr(train, "load_data", lambda *how: asked.append(how) or data)
    monkeypatch.setattr(train, "TokenizerStage", stage)
    monkeypatch.setattr(train, "VARStage", stage)
    module = SimpleNamespace(SummaryWriter=Events)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    flags = ("--seed 5 --stream --white-level 4095 --checkpoint-activations --checkpoint-every 7 "
             "--grad-accumulation 4 --workers 3 --tensorboard --resume --perceptual vgg.pth "
             "--perceptual-weight 1 --channels 3 --data-dir elsewhere")
    ran("train.py", *TINY, "--data", "photos", "--out", tmp_path / "out", *flags.split())
    loaded, first, second, workers = asked
    assert loaded == ("photos", 8, 3, tmp_path / "out", Path("elsewhere"), 5, 3, True, 4095)
    settings = first[1]
    assert first == (data, settings, Path("vgg.pth")) and second[1:] == (data, settings)
    assert workers == 3 and settings == train.Settings(
        settings.preset, settings.machine, tmp_path / "out", seed=5, resume=True,
        checkpoint_every=7, grad_accumulation=4, checkpoint_activations=True, workers=3,
        tensorboard=Events)


@pytest.mark.parametrize("flags, told", [
    ("--lr 1", "there is --final-lr, --tokenizer-lr, --discriminator-lr, --var-lr"),
    ("--learning-rate 1", "--var-lr"), ("--steps 9", "there is --tokenizer-steps, --var-steps"),
    ("--epochs=9", "there is --tokenizer-steps, --var-steps"),
    ("--iterations 9", "there is --tokenizer-steps, --var-steps"),
    ("--resolution 9", "there is --image-size"),
    pytest.param("--" + 5000 * "x", "unrecognized arguments: --xxx", id="long flag"),
    ("--image-size 2", "scales up to 1 at downsampling 4 are images of 4"),
    ("--batch-size 9", "--tokenizer-batch, --var-batch"), ("--sede 9", "there is --seed"),
    ("--scales 1 2 4 8", "a list is written with commas, as 1,2,4"),
    ("--scales '1 2 4 8'", "--scales: write 1,2,4,8, with commas"),
    ("''", "unrecognized arguments"),
    ("--data ''", "--data: a name is missing"), ("--out ''", "--out: a name is missing"),
    ("--stage tokenizer --tokenizer t.pt", "--tokenizer names a finished one"),
    ("--perceptual vgg.pth", "--perceptual changes nothing without --perceptual-weight"),
    ("--perceptual vgg.pth --preset pixels64 --tokenizer t.pt", "where no tokenizer is trained"),
    ("--perceptual vgg.pth --preset pixels64 --stage var", "where no tokenizer is trained"),
    ("--image-size 4 --scales 1,2 --multipliers 1,2 --adversarial-weight 1", "of side 8 and more"),
    ("--multipliers 1,2,", "--multipliers: '' must be a whole number"),
    pytest.param("--seed " + 5000 * "9", "must be a whole number, from 0", id="long number")])
def test_flags_that_are_not_there_or_contradict_each_other(flags, told):
    said = refused("train.py", *shlex.split(flags))
    assert told in said and len(said) < 450


def test_folders_to_train_in(tmp_path, monkeypatch, capsys):
    """A folder named as a data set is none that holds data; the stage to come has no checkpoint."""
    monkeypatch.chdir(tmp_path)
    check_folder("mnist", Path("mnist") / "run", ["var"], False)
    (tmp_path / "tokenizer.pt").touch()
    check_folder("shapes", tmp_path, ["tokenizer", "var"], True)
    assert not capsys.readouterr().out
    check_folder("shapes", tmp_path, ["var"], True)
    assert "to go on from" in capsys.readouterr().out


def test_a_discriminator_is_for_images_of_side_8_and_more():
    preset = replace(PRESETS["tiny"], scales=(1, 2), image_size=8, adversarial_weight=0.4)
    check_sizes(preset, ["tokenizer"], 1)
    small = replace(preset, scales=(1,), image_size=4)
    check_sizes(small, ["var"], 1)
    with pytest.raises(UserError, match="--adversarial-weight is for images of side 8"):
        check_sizes(small, ["tokenizer"], 1)


def test_channels_that_are_not_the_tokenizer_s(folder, finished, tmp_path):
    flags = ("train.py", "--data", folder, "--out", tmp_path, "--tokenizer",
             finished / "tokenizer.pt", "--channels", 1)
    assert "--channels 1 is not that of the tokenizer, which has 3" in refused(*flags)
    assert training_flags().parse_args([]).channels is None   # what the data have


def test_a_bar_shows_the_loss_that_is_logged(folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(tqdm, "set_postfix_str", lambda bar, text, refresh: shown.append((bar.n, text)))
    ran("train.py", "--stage", "tokenizer", "--data", folder, "--out", tmp_path, *TINY)
    logged = [line for line in read_log(tmp_path / "log.jsonl") if line["split"] == "train"]
    for line in logged:
        (text,) = [text for step, text in shown if step == line["step"]]
        assert text.startswith(f"loss {line['loss']:.4f}, ")
    assert len(logged) == 2


def test_losses_for_detail_are_told_the_scale_of_the_loss(tmp_path, monkeypatch):
    stage = tokenizer_stage(tmp_path)
    asked = []

    class Helpers(torch.nn.Module):
        def forward(self, originals, reconstructions, likeness, last_layer, adversarial, scale):
            asked.append((last_layer is stage.model.decoder.conv_out.weight, adversarial, scale))
            return 2 * likeness, {}

    stage.helpers = Helpers()
    stage.adversarial_from = 3
    monkeypatch.setattr(stage.loss_scale, "factor", lambda: 64.0)
    batch = stage.rows[[0, 1]]
    for stage.step in (2, 3):
        stage.loss(stage.model, *batch)
    assert asked == [(True, False, 64.0), (True, True, 64.0)]


def test_a_resumed_training_knows_what_is_saved(tmp_path):
    stage = tokenizer_stage(tmp_path)
    stage.step = 3
    stage.save(finished=False)
    again = tokenizer_stage(tmp_path)
    again.resume()
    assert again.step == 3
    with pytest.raises(UserError, match="the last good checkpoint, of step 3, is .*tokenizer.pt"):
        again.check(math.nan, 1.0)


def test_samples_of_a_training_are_drawn_as_sample_draws_them(
        folder, finished, tmp_path, monkeypatch):
    """And `parse` finds what a run is drawn with where neither flags nor the command say otherwise."""
    ways = []
    monkeypatch.setattr(train, "draw_samples", lambda run, *how: ways.append(run.sampling) or [
        Row("", [np.zeros((8, 8, 3), np.uint8)])])
    train_it = ["train.py", "--stage", "var", "--tokenizer", finished / "tokenizer.pt", "--data", folder, *TINY]
    ran(*train_it, "--out", tmp_path / "a")
    assert {*ways} == {sample.DEFAULTS}
    ways.clear()
    ran(*train_it, "--out", tmp_path / "b", "--cfg", 2, "--growth", 8, "--smooth", 0)
    own = replace(sample.DEFAULTS, cfg=2.0, growth=8.0, smooth=0.0)
    assert {*ways} == {own}
    defaults, published, unsmoothed = map(asdict, (sample.DEFAULTS, sample.PUBLISHED, sample.UNSMOOTHED))
    run = ["--run", str(tmp_path / "b")]
    var = ["--var", str(tmp_path / "b" / "var.pt")]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "var.pt").write_bytes(b"no checkpoint")
    for words, way in ((["grid", *run], own), (["progress", *var], own), (["evaluate", "8", *run], own),
                       (["export", "8", str(tmp_path / "a.npz"), "--rejection", "0.5", *run], own),
                       (["grid", *run, "--cfg", "3"], replace(own, cfg=3.0)),
                       (["grid", "--run", str(tmp_path / "a")], sample.DEFAULTS),
                       (["grid", "--run", str(tmp_path / "c")], sample.DEFAULTS),
                       (["grid", "--run", str(tmp_path / "b"), "--var", "var.pth"], sample.PUBLISHED),
                       (["explore", *run], sample.UNSMOOTHED), (["inpaint", "a.png", *run], sample.UNSMOOTHED)):
        options = vars(parse(defaults, words, published, unsmoothed))
        assert {name: options[name] for name in asdict(way)} == asdict(way), words
    torch.save({"preset": Touching(tmp_path / "touched")}, tmp_path / "c" / "var.pt")
    parse(defaults, ["grid", "--run", str(tmp_path / "c")])
    assert not (tmp_path / "touched").exists()   # what a file holds is not run


class Touching:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_fashion_mnist_is_drawn_by_codes_alone():
    assert PRESETS["pixels28"].drawing() == dict(cfg=2.0, growth=8.0, smooth=0.0)
    assert not any(preset.drawing() for name, preset in PRESETS.items() if name != "pixels28")


def test_a_few_held_out_images_of_each_class_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MEASURED", 6)
    stage = var_stage(tmp_path)
    tokens_NL, labels_N = stage.held_out_rows.tensors
    labels_N = labels_N % 3
    order_N = labels_N.argsort(stable=True)   # as a folder's images are
    stage.held_out_rows = TensorDataset(tokens_NL[order_N], labels_N[order_N])
    seen = []
    loss = stage.loss
    monkeypatch.setattr(stage, "loss", lambda model, *batch: seen.append(batch) or loss(model, *batch))
    stage.validate()
    labels = torch.cat([batch[1] for batch in seen]).tolist()
    there = labels_N.unique().tolist()
    assert labels == [there[i % len(there)] for i in range(6)]


def test_a_tokenizer_is_measured_on_held_out_images_of_each_class(tmp_path, monkeypatch):
    """Those of a folder lie in the order of their classes."""
    monkeypatch.setattr(train, "HEALTH", 4)
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).repeat(1, 3, 8, 8)
    sets = [TensorDataset(images, torch.arange(12) // 6) for _ in range(2)]
    stage = train.TokenizerStage(data_of(*sets, ["cat", "dog"]), tiny_settings(tmp_path))
    assert ((stage.unseen[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [0, 6, 1, 7]


def test_a_tokenizers_health_is_of_more_images_than_each_measurement(tmp_path, monkeypatch):
    stage = tokenizer_stage(tmp_path)
    monkeypatch.setattr(train, "MEASURED", 3)
    monkeypatch.setattr(train, "say_health", lambda *_: None)
    monkeypatch.setattr(train, "tokenizer_health", lambda _, some: {"images": sum(map(len, some))})
    written = []
    stage.finish(SimpleNamespace(write=lambda *_, **values: written.append(values)))
    assert written == [{"images": 10}]


def test_passes_without_gradients_are_as_large_as_the_images_allow(tmp_path, monkeypatch):
    """And not as the latents would: at 256 pixels that is 8 images, and not 128."""
    stage = tokenizer_stage(tmp_path)
    sides = []
    monkeypatch.setattr(train, "at_a_time", lambda side: sides.append(side) or 3)
    train.tokenise(stage.model.eval(), stage.rows, stage.settings, "")
    assert sides == [8]


def test_the_codebook_starts_from_512_images(tmp_path, monkeypatch):
    stage = tokenizer_stage(tmp_path)
    stage.rows = draw_shapes(600, 8, 0)
    stage.step = stage.quantized_from
    begun = []
    monkeypatch.setattr(
        stage.model.quantizer, "start_from", lambda f_BCSS: begun.append(len(f_BCSS)))
    stage.before_step()
    assert begun == [512]


def test_large_presets_average_over_thousands_of_steps():
    assert PRESETS["imagenet256"].ema == 0.9999 and PRESETS["cifar"].ema == 0.9995


def test_the_authors_stochastic_depth_is_a_tenth_at_24_layers():
    assert PRESETS["imagenet256"].drop_path == pytest.approx(16 / 24 * 0.1)


def test_white_is_first_that_of_the_training_that_goes_on(tmp_path):
    for name, kind, white in (("var", "transformer", 4095), ("tokenizer", "tokenizer", 1023)):
        save_checkpoint(tmp_path / f"{name}.pt", kind, white=white)
    options = SimpleNamespace(stages=["var"], out=tmp_path, tokenizer=None, white_level=None)
    assert white_level(options) == 4095
    (tmp_path / "var.pt").unlink()
    assert white_level(options) == 1023


def test_a_stream_that_nobody_reads_does_not_end_a_training(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    seen = []

    def main():
        seen.extend(tqdm(range(3), mininterval=0))
        sys.stdout = Gone()
        say("a word")
        seen.append("the end")

    run_program(main)
    assert seen == [0, 1, 2, "the end"]


def test_models_begin_as_the_seed_says(tmp_path):
    """And not as what was drawn until then."""
    first = tokenizer_stage(tmp_path)
    begun = {"tokenizer": [], "var": []}
    for before, seed in enumerate((3, 3, 4)):
        settings = replace(first.settings, seed=seed)
        for make in (partial(train.TokenizerStage, first.data),
                     partial(train.VARStage, first.model.eval(), first.data)):
            torch.manual_seed(100 + before)
            stage = make(settings)
            begun[stage.name].append(torch.cat([p.detach().flatten() for p in stage.model.parameters()]))
    for one, same, other in begun.values():
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_images_have_the_channels_of_the_tokenizer(finished, tmp_path, monkeypatch):
    asked = []

    def noted(name, side, channels, *_):
        asked.append((side, channels))
        raise train.UserError("that is enough")

    config = sample.load_tokenizer(finished / "tokenizer.pt").config
    grey = Tokenizer(replace(config, image_channels=1))
    monkeypatch.setattr(train, "finished_tokenizer", lambda *_: grey)
    monkeypatch.setattr(train, "load_data", noted)
    assert "that is enough" in refused("train.py", "--stage", "var", "--out", tmp_path / "a")
    assert asked == [(config.image_side, 1)]


def test_more_memory_than_there_is_is_told_before_it_is_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**6}.get)
    told = refused("train.py", "--out", tmp_path / "out", "--image-size", 4096)
    assert "--image-size 4096 take 20804 GB of memory, of which there are 4" in told
    with pytest.raises(UserError, match="images of --image-size 4096 take 503 GB"):
        fit_side(np.zeros((10_000, 3, 32, 32), np.uint8), np.zeros(10_000, np.uint8), 4096)
    monkeypatch.delattr(os, "sysconf")   # Windows
    check_memory(10**18, "images")


def test_streams_that_are_closed(monkeypatch):
    """As after 2>&-: progress bars ask stderr whether somebody watches."""
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        run_program(lambda: list(progress_bar(range(3))))
        assert sys.stderr.name == os.devnull
        print("a name that is no UTF-8: \udce9", file=sys.stderr)


@pytest.mark.parametrize("watched, seconds", [(True, 0.5), (False, 60)])
def test_a_log_gets_a_line_a_minute(watched, seconds, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched)
    bar = progress_bar(range(3))
    assert bar.mininterval == seconds and not bar.disable


def test_weights_that_are_no_numbers_are_not_saved(folder, tmp_path, monkeypatch):
    def after_step(stage) -> None:
        next(stage.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(train.TokenizerStage, "after_step", after_step)
    told = refused("train.py", "--data", folder, "--out", tmp_path, *TINY, "--tokenizer-steps", 1)
    assert "its largest weight nan" in told and "there is no checkpoint yet" in told
    assert not (tmp_path / "tokenizer.pt").exists()


def test_no_compiler(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nmany lines")

    monkeypatch.setattr(torch, "compile", broken)
    told = refused("train.py", "--out", tmp_path, *TINY, "--compile")
    assert told.endswith("--compile does not work here: no compiler many lines")


def test_a_machine_on_which_triton_cannot_start_kernels(finished, monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            raise FileNotFoundError("gcc")

    monkeypatch.setattr(kernels, "BACKEND", "triton")
    monkeypatch.setattr(kernels, "adaln_forward", Kernel())
    told = refused("sample.py", "--run", finished)
    assert "C compiler" in told and "Python's headers" in told


def test_a_mistake_ends_a_program_with_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--run", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    told = (f"error: there is no transformer at {tmp_path / 'var.pt'} yet: python train.py makes a "
            f"run, in out/shapes or where --out says\n")
    assert end.value.code == 2 and capsys.readouterr().err == told


def test_a_run_whose_transformer_is_still_to_be_trained(finished, tmp_path):
    shutil.copy(finished / "tokenizer.pt", tmp_path)
    told = refused("sample.py", "--run", tmp_path)
    assert "train.py --resume" in told and "reconstruct and codes need none" in told


@pytest.mark.parametrize("error", [MemoryError(), *map(RuntimeError, (
    "DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "another"))], ids=str)
def test_too_little_memory_is_told_in_one_sentence(error, capsys):
    def main():
        raise error

    enough = "another" in str(error)
    with pytest.raises(RuntimeError if enough else SystemExit):
        run_program(main)
    told = capsys.readouterr().err
    assert ("not enough memory" in told and "--batch" in told) == (not enough)
    with pytest.raises(UserError if enough else type(error)):   # no file's fault
        with blaming(ROOT):
            raise error


@pytest.mark.parametrize("error, code, told", [
    (FileNotFoundError(2, "No such file", "a.png"), 2, "error: a.png: No such file"),
    (OSError("cannot be"), 2, "error: cannot be"), (KeyboardInterrupt(), 130, "stopped")])
def test_how_a_program_ends(error, code, told, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_program(main)
    assert end.value.code == code and "".join(capsys.readouterr()) == told + "\n"


def test_what_is_long_is_told_in_short():
    assert in_short("one\n two", 7) == "one two" and in_short(1234567, 6) == "12345…"


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch):
    for device in ("cpu", "cuda"):
        options = training_flags().parse_args([])
        assert (options.device, options.precision) == (device, "auto")
        monkeypatch.setattr("support.cli.torch.cuda.is_available", lambda: True)


def test_a_terminal_that_does_not_know_a_letter(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run_program(lambda: print("Ελλάδα, Fréchet"))
    terminal.flush()
    assert terminal.buffer.getvalue() == b"??????, Fr?chet\n"


def test_help_explains_every_flag():
    text = run("train.py", "--help").stdout
    examples = re.findall(r"^    python train.py ?((?:\S+ )*)  ", text, re.MULTILINE)
    assert len(examples) > 4
    for example in examples:
        training_flags().parse_args(example.split())
    flags = re.findall(r"^  (?:-h, )?(--[a-z-]+)(.*\n(?: {10,}.*\n)*)", text, re.MULTILINE)
    assert len(flags) > 20 and "(default: 1,2,4)" in text   # as it is typed
    for flag, rest in flags:
        assert re.search(r"(  |\n {10,})\S+ \S+", rest), f"{flag} has no help"
        if flag != "--help":
            assert re.search(r"\(default:\s", rest), f"{flag} does not name its default"
    assert [flag for flag, _ in flags[1:11]] == [
        "--data", "--out", "--resume", "--preset", "--image-size", "--tokenizer-steps",
        "--var-steps", "--stage", "--tokenizer", "--seed"]


def test_every_preset_is_a_possible_model():
    for name in PRESETS:
        preset = chosen_preset(training_flags().parse_args(["--preset", name]))
        config = TokenizerConfig(**preset.tokenizer_shape(3))
        assert config.image_side == preset.image_size
        VARConfig(**preset.var_shape(10))
        for value in fields(preset):   # which flags can say, too
            own, read = getattr(preset, value.name), value.metadata["read"]
            if read and own is not None:
                assert read(", ".join(map(str, own)) if isinstance(own, tuple) else str(own)) == own


def test_the_batch_of_a_stage_that_is_not_trained_is_no_matter():
    preset = replace(PRESETS["tiny"], tokenizer_batch=9, var_batch=8)
    check_sizes(preset, ["var"], 2)
    with pytest.raises(UserError, match="--tokenizer-batch 9 does not divide"):
        check_sizes(preset, ["tokenizer"], 2)


def test_a_run_is_named_for_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data, name in (("mnist", "mnist"), ("photos.2024", "photos.2024"), ("photos/../pets", "pets")):
        assert training_options(["--data", data]).out == Path("out", name)


def test_tf32_is_as_it_was_after_convolutions_without_it(monkeypatch):
    for before in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
        with fp32_convolutions():
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32 == before


def test_the_first_process_alone_speaks(monkeypatch, capsys):
    monkeypatch.setattr("support.devices.rank_and_world", lambda: (1, 2))
    say("once")
    assert progress_bar(range(2)).disable
    assert "once" not in capsys.readouterr().out


def test_the_health_of_each_scale_is_a_row(capsys):
    health = dict(psnr_per_scale=[10.0, 20.25], codes_per_scale=[1, 3], usage_per_scale=[1.0, 0.75],
                  perplexity_per_scale=[1.0, 2.5], codes_used=0.5)
    say_health(health, SimpleNamespace(scales=(1, 2), vocabulary=8))
    _, heads, _, second = capsys.readouterr().out.splitlines()
    assert heads.split()[:4] == ["scale", "codes", "usage", "perplexity"]
    assert second.split() == ["2x2", "3", "75%", "2.5", "20.25", "dB"]


@pytest.mark.parametrize("flag, value", [
    ("--drop-path", 1), ("--adversarial-from", 1), ("--final-lr", 1.5), ("--tokenizer-steps", 0), ("--var-steps", 0)])
def test_values_with_which_nothing_is_trained_are_refused(flag, value):
    with pytest.raises(UserError, match=f"{flag}: {value} must be"):
        training_flags().parse_args([flag, str(value)])


def test_the_published_recipe_is_of_200_epochs_of_imagenet():
    """The transformer's, in the authors' batches."""
    preset = PRESETS["imagenet256"]
    assert preset.var_steps * preset.var_batch / 1_281_167 == pytest.approx(200, rel=0.01)


def test_a_machine_s_cores_and_no_more_than_eight_read_images(monkeypatch):
    for cores, workers in ((2, 2), (64, 8)):
        monkeypatch.setattr("support.presets.own_cores", lambda: cores)
        assert training_flags().parse_args([]).workers == workers


def test_a_thousand_steps_at_most_are_lost():
    assert training_flags().parse_args([]).checkpoint_every == 1000


def test_shares_of_the_peak_are_of_dense_products():
    """Data sheets print the figures of sparse ones, twice as large."""
    assert PEAK_TFLOPS["H200"] == PEAK_TFLOPS["H100"] == 989   # the same chip
    assert PEAK_TFLOPS["H100 PCIe"] < PEAK_TFLOPS["H100 NVL"] < PEAK_TFLOPS["H100"] < PEAK_TFLOPS["B200"] == 2250


def test_memory_is_told_in_billions_of_bytes(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**7}.get)
    with pytest.raises(UserError, match="images take 50 GB of memory, of which there are 41$"):
        check_memory(50 * 10**9, "images")


def test_gradients_are_clipped_after_they_are_unscaled(tmp_path):
    """In fp16: what is 1 long is not one 65536th of it."""
    stage = var_stage(tmp_path, "--precision", "fp16", var_steps=1, label_dropout=0.0)
    loss = stage.loss
    stage.loss_scale._init_scale = 1024.0

    def steep(*given):
        total, to_log = loss(*given)
        return 20 * total, to_log

    stage.loss = steep
    stage.run()
    squares = [p.grad.square().sum() for p in stage.model.parameters() if p.grad is not None]
    assert sum(squares).sqrt().item() == pytest.approx(1, rel=1e-3)
