"""What only a GPU shows: autocast with the kernels, its own random generator, fused optimizers,
torchrun, and that a step waits for nothing. Skipped where there is none."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from program import ROOT, TINY, ran, start

import sample
import train
from support.data import load_data
from support.devices import Machine
from support.presets import PRESETS
from support.watching import read_log

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

ON_GPU = [*TINY, "--device", "cuda"]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    ran("train.py", "--data", folder, "--out", out, *ON_GPU, "--precision", "bf16")
    return out


def losses(out, stage: str) -> list[float]:
    return [x["loss"] for x in read_log(out / "log.jsonl")
            if (x["stage"], x["split"]) == (stage, "train")]


def check_that_losses_fell(out):
    for stage in ("tokenizer", "var"):
        first, *_, last = losses(out, stage)
        assert last < first, stage


def test_a_run_in_bf16(trained, tmp_path):
    check_that_losses_fell(trained)
    for command in (["--per-class", 2], ["inpaint", "data:0"], ["codes", "data:0"],
                    ["attention", "data:0"]):
        ran("sample.py", *command, "--run", trained, "--device", "cuda", "--out", tmp_path / "a.png")


def test_a_run_in_fp16(folder, tmp_path):
    """In its first steps gradients may overflow, and what is left out is not logged."""
    ran("train.py", "--data", folder, "--out", tmp_path, *ON_GPU, "--precision", "fp16",
        "--tokenizer-steps", 44, "--var-steps", 44)
    check_that_losses_fell(tmp_path)
    ran("sample.py", "--run", tmp_path, "--device", "cuda", "--precision", "fp16")


def test_a_run_in_fp32_is_that_of_the_cpu(folder, finished, tmp_path):
    ran("train.py", "--data", folder, "--out", tmp_path, *ON_GPU, "--stage", "tokenizer")
    ours, cpus = (losses(out, "tokenizer")[0] for out in (tmp_path, finished))
    assert ours == pytest.approx(cpus, rel=1e-4)


def test_compiled_parts_draw_images(trained, tmp_path):
    ran("sample.py", "--run", trained, "--device", "cuda", "--compile", "--out", tmp_path / "a.png")


def test_the_same_seed_gives_the_same_images(trained, tmp_path):
    for name in ("a.png", "b.png"):
        ran("sample.py", "--run", trained, "--device", "cuda", "--out", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_torchrun_and_compiled_parts(folder, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1]
    result = start(*torchrun, ROOT / "train.py", "--data", folder, "--out", tmp_path, *ON_GPU,
                   "--precision", "bf16", "--compile")
    assert result.returncode == 0, result.stderr


def test_a_step_waits_for_nothing(folder, trained, tmp_path):
    """Its tensors come from the host, as batches do."""
    machine = Machine(torch.device("cuda"), torch.bfloat16)
    data = load_data(str(folder), 8, 3, tmp_path, tmp_path, 0, 0, False)
    tokenizer = sample.load_tokenizer(trained / "tokenizer.pt").to("cuda")
    config = tokenizer.config
    preset = replace(PRESETS["tiny"], image_size=8, scales=config.scales, vocabulary=config.vocabulary,
                     code_channels=config.code_channels, depth=1, width=32, heads=2, var_steps=30, var_batch=8)
    stage = train.VARStage(tokenizer, data, train.Settings(preset, machine, tmp_path))
    tensors = [tensor.pin_memory() for tensor in stage.rows[list(range(8))]]

    def step() -> None:
        stage.model.zero_grad()
        with machine.autocast():
            loss, _ = stage.loss(stage.model, *tensors)
        loss.backward()
        for optimizer in stage.optimizers:
            optimizer.step()
        train.update_ema(stage.ema, stage.model, 0.9)

    for _ in range(3):   # what is made once, is
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
