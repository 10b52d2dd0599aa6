"""What `python -m tests.benchmark` counts, times and compiles for GPUs that are not there."""
from __future__ import annotations

import functools
import itertools
import re
import sys
from dataclasses import replace

import benchmark
import pytest
import torch

import kernels
from kernels import KeyRanges
from support.devices import Machine, forward_flops, peak_flops
from tests import registers
from var import VAR

GPU = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")


def test_operations_are_counted_also_where_a_kernel_or_a_fused_attention_does_them():
    class Model(torch.nn.Module):
        def forward(self, x_BHLD, w_DD):
            return kernels.block_attention(x_BHLD, x_BHLD, x_BHLD, ranges, 1.0) @ w_DD

    ranges = KeyRanges([0] * 70, [70] * 70)
    x_BHLD = torch.zeros(2, 3, 70, 16)
    assert forward_flops(Model(), x_BHLD, torch.zeros(16, 16)) == 2 * 6 * 70 * (70 * 16 * 2 + 16 * 16)
    dropout = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Dropout())
    assert forward_flops(dropout, torch.zeros(3, 4)) == 2 * 3 * 4 * 5 and dropout.training


def test_peaks_are_those_of_the_card(monkeypatch):
    assert peak_flops(Machine(torch.device("cpu"), torch.bfloat16)) is None
    for card, peak in ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA T4", None):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, card=card: card)
        assert peak_flops(Machine(torch.device("cuda", 0), torch.bfloat16)) == peak


def test_bytes_are_those_read_and_written_and_a_view_moves_none():
    x = torch.zeros(8, 16, device="meta")
    with benchmark.BytesMoved() as moved:
        (x.T.reshape(4, 32)[1:] + 1).mul_(2)   # reshape copies
    assert moved.total == 2 * x.nbytes + (1 + 1) * 3 * 32 * 4 + 2 * 3 * 32 * 4


def test_a_question_about_a_tensor_without_numbers_moves_nothing():
    """Such a tensor is asked for its device by an operation that is not ATen's."""
    with benchmark.counting() as work:
        x = torch.empty(8, 16)
        before = work.so_far()
        assert x.device.type == "cpu" and x.shape == (8, 16) and x.is_contiguous() and not x.is_cuda
        kernels.use_triton(x)
        assert work.so_far() - before == {}
        x + 1
    assert work.total == 2 * x.nbytes


@pytest.mark.skipif(GPU, reason="on a GPU this is the long benchmark itself")
def test_the_benchmark_counts_and_times(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "ATTENTION_CASES", {"cpu": [(1, 1, 130, 64)]})
    monkeypatch.setattr(benchmark, "SECONDS", 0)
    monkeypatch.setattr(benchmark, "PUBLISHED_D16", small_geometry())
    monkeypatch.setattr(benchmark, "product_rate", lambda dtype, cold: 1e11)   # bf16 may be emulated, which takes long
    monkeypatch.setattr(benchmark, "LENGTHS", (680,))
    monkeypatch.setattr(benchmark, "count_graphs", lambda geometry: {"sampling": 5, "training": 1, "breaks": 0})
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--plot", str(tmp_path / "plot.png")])
    benchmark.main()
    printed = capsys.readouterr().out
    mask_tiles = benchmark.tile_grid(680)
    assert re.search(rf"L 680 +{(mask_tiles == 2).sum()} +{(mask_tiles == 1).sum()} +{mask_tiles.numel()} ", printed)
    scores = 16 * 680 * 680   # q scaled, the scores, the masked scores and the weights, each written and read
    moved = 2 * (6 * scores + (2 + 4) * 680 * 1024) + 3 * 680 * 680   # and the mask, turned round
    assert re.search(rf"obvious attention, B 1 H 16 L 680 D 64 bfloat16 +{moved / 1e9:.3f} +{4 * 2 * 680 * 1024 / 1e9:.3f}", printed)
    assert printed.count("dense boolean mask") == 4 and "failed" not in printed
    assert (tmp_path / "plot.png").stat().st_size > 0


@pytest.mark.parametrize("arguments", [["--tiles", "tiles.png"], ["--generate"]])
def test_the_figure_and_the_time_of_one_image(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    if arguments == ["--generate"]:
        monkeypatch.setattr(benchmark, "SECONDS", 0)
        monkeypatch.setattr(benchmark, "PUBLISHED_D16", small_geometry())
    benchmark.main()
    if arguments == ["--tiles", "tiles.png"]:
        assert (tmp_path / "tiles.png").stat().st_size > 0
    else:
        assert re.search(r"  1x1( +[\d.]+){3} +\d+%\n  2x2.*\n  decoder.*\nall scales: ", capsys.readouterr().out)


def small_geometry() -> benchmark.Geometry:
    tokenizer, model = benchmark.PUBLISHED_D16
    return (replace(tokenizer, scales=(1, 2), width=32, multipliers=(1, 2), blocks=1),
            replace(model, scales=(1, 2), width=64, heads=2, depth=2, classes=10))


def test_limits_of_the_scales():
    """By FLOPs as counted; by bytes, of what there is."""
    model = VAR(small_geometry()[1]).eval()
    limits = benchmark.scale_limits(model.config, rate=1.0, reading=1.0)
    labels, read, _ = benchmark.training_inputs(model.config, 2, torch.device("cpu"))
    counted = forward_flops(model, labels, read)
    once = 2 * 2 * (6 * 64 * 64 * 2 + 64 * 2 * 64) + 2 * 2 * 4 * 32 * 64   # modulations, and what is read
    hidden = 2 * 4 * 1 * 4 * 64 * 2   # of the finer scale, which the whole pass computes and masks
    assert sum(by_flops for by_flops, _ in limits) == pytest.approx(counted - once - hidden, rel=1e-6)
    weights = [model.blocks.parameters(), model.head.parameters()]
    matrices = sum(w.numel() for part in weights for w in part if w.ndim == 2) - 2 * 6 * 64 * 64
    caches = [2 * 2 * length * 64 * 2 for length in (1, 5)]
    assert [by_bytes for _, by_bytes in limits] == [4 * (matrices + cache) for cache in caches]


@needs_triton
def test_the_work_of_a_whole_model(monkeypatch, capsys):
    """What a GPU is asked to do, of a later generation: nothing is copied to it, nothing is waited for."""
    monkeypatch.setattr(benchmark, "count_sampling", functools.cache(benchmark.count_sampling))
    geometry = small_geometry()
    counts = benchmark.count_sampling(geometry, 1)
    first, later = counts["first generation"], counts["later generation"]
    assert first["to device"] > 0 and later["to device"] == later["read back"] == 0
    per_layer = counts["a layer at a scale"]["ours"]
    assert per_layer == 4   # AdaLN twice, heads, attention
    assert later["ours"] == 2 * (2 * 4 + 2)   # scales, layers; the head's AdaLN, and drawing
    one = benchmark.count_training(geometry, 2)
    assert one["read back"] == 0 and benchmark.count_training(geometry, 4)["bytes"] < 2 * one["bytes"]
    monkeypatch.setattr(benchmark, "count_training", lambda *_: later)
    benchmark.print_work(geometry, 2)   # compiled: a graph of the first layer and one of all others a scale, and the decoder
    printed = capsys.readouterr().out
    assert "5 graphs for sampling, of 2 scales and the decoder, 1 for training; 0 breaks" in printed
    assert len(re.findall(r"^  (?:first|later) generation, B 1 ", printed, re.MULTILINE)) == 2


@needs_triton
def test_whole_models_are_timed(monkeypatch, capsys):
    geometry = small_geometry()
    cold = torch.zeros(4 * 4096, dtype=torch.uint8)
    monkeypatch.setattr(benchmark, "SECONDS", 0)
    monkeypatch.setattr(torch, "compile", lambda model, **flags: model)
    benchmark.benchmark_sampling(geometry, {"ours": Machine(torch.device("cpu"))}, [1, 2], 1e9, 1e9, cold)
    benchmark.benchmark_training(geometry, 2, 1e9, 1e9, cold)
    printed = capsys.readouterr().out
    assert len(re.findall(r"ours: [\d.]+ images/s; ms per scale [\d.]+ [\d.]+, decoder ", printed)) == 2
    assert printed.count("limit by FLOPs") == 3 and "PyTorch's attention, dense mask" in printed


# Compiled for GPUs that are not there: the interpreter accepts what a GPU refuses


@needs_triton
def test_every_kernel_compiles_and_fits():
    """For a card of readers, which has the least shared memory, with the widest tiles; and for one of data centres. All
    sizes for all cards are compiled by  python -m tests.benchmark --registers."""
    found = list(registers.compiled(registers.some_jobs(), workers=1))
    for report in found:
        assert report.fits(), report
    assert {(report.card, report.kernel) for report in found} == set(itertools.product((86, 90), [
        "attention_forward", "attention_backward_q", "attention_backward_kv", "nearest_code_kernel",
        "adaln_forward", "adaln_backward", "split_heads_forward", "split_heads_backward", "sample_tokens_kernel"]))


FITS = registers.Report(86, "kernel", "bfloat16", 255, 0, 1024, 0, 1, {"TILE_L": 64, "num_warps": 4})


@pytest.mark.parametrize("change, fits", [
    ({}, True), ({"stack": 72}, False), ({"programs": 0}, False), ({"columns": 513}, False), ({"shared": 101_376}, True),
    ({"shared": 101_377}, False), ({"card": 80, "shared": 101_377}, True), ({"constants": {"num_warps": 33}}, False)])
def test_what_fits_a_card(change, fits):
    assert FITS._replace(**change).fits() == fits


def test_how_many_programs_a_multiprocessor_holds():
    card = registers.Card(shared=99 * 1024, warps=48, programs=16)
    assert registers.programs(card, registers=128, shared=0, warps=8) == 2    # 65536 / (128 * 256)
    assert registers.programs(card, registers=129, shared=0, warps=8) == 1    # given out by eights: 136
    assert registers.programs(card, registers=16, shared=0, warps=8) == 6     # 48 warps
    assert registers.programs(card, registers=16, shared=49 * 1024, warps=8) == 2   # of 50 kB each
    assert registers.programs(card, registers=16, shared=50 * 1024, warps=8) == 1
    assert registers.programs(card, registers=16, shared=0, warps=1) == 16


@needs_triton
def test_the_table_of_registers(monkeypatch, capsys):
    spills = FITS._replace(stack=72)
    monkeypatch.setattr(registers, "compiled", lambda jobs: iter([spills, FITS, FITS]))
    registers.print_registers()
    head, first, second, *rest = capsys.readouterr().out.splitlines()
    assert first.split()[:8] == ["sm_86", "kernel", "bfloat16", "255", "72", "1024", "0", "1"]
    assert first.endswith("TILE_L 64 warps 4  <- does not fit") and not second.endswith("fit")
    assert rest[0].startswith("2 kernels.")
    assert rest[-1] == "sm_86: at most 1,024 of 101,376 bytes of shared memory, and 72 bytes spilled"


def test_times_are_told_beside_ours_and_a_limit(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure", lambda calls, cold: {
        name: (seconds, "-") for name, seconds in zip(calls, (0.002, 0.004))})
    cold = torch.zeros(4096)
    assert benchmark.print_table("title", dict.fromkeys(["ours", "other"]), 0.001, cold) == {"ours": 0.002, "other": 0.004}
    assert [line.split() for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["ours", "2.000", "1.00", "50%", "-"], ["other", "4.000", "2.00", "25%", "-"]]
    assert benchmark.product_rate(torch.float32, cold) == 2 * 1024**3 / 0.002
    assert benchmark.copy_rate(cold) == 2 * cold.nbytes / 0.002   # read and written
    assert benchmark.read_rate(cold) == cold.nbytes / 0.002


def test_times_are_medians_and_need_no_gradient(monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0)
    times = iter([1.0, 2.0, 3.0, 4.0, 90.0])
    monkeypatch.setattr(benchmark, "time_call", lambda call, cold: next(times))
    assert benchmark.measure({"x": lambda: None}, torch.zeros(1))["x"][0] == 3
    x = torch.ones(1, requires_grad=True)
    assert not benchmark.forward_only(torch.exp, x)().requires_grad


def test_limits_are_of_the_arithmetic(monkeypatch, capsys):
    limits = {}

    def noted(title, calls, limit, cold):
        limits[title] = limit
        return dict.fromkeys(calls, 0.5)

    monkeypatch.setattr(benchmark, "print_table", noted)
    monkeypatch.setattr(benchmark, "ATTENTION_CASES", {"cpu": [(2, 3, 130, 16)]})
    cold = torch.zeros(4)
    benchmark.benchmark_attention(torch.float32, 1e9, cold)
    product = 2 * 2 * 3 * 16 * KeyRanges.from_scales((1, 2, 3, 4, 6, 8)).dense().sum().item() / 1e9
    assert limits == {f"attention {what}, B 2 H 3 L 130 D 16 float32": pytest.approx(n * product)
                      for what, n in (("forward", 2), ("forward + backward", 7))}
    geometry = small_geometry()
    inputs = benchmark.training_inputs(geometry[1], 1, torch.device("cpu"))
    forward = forward_flops(VAR(geometry[1]), *inputs[:2])
    monkeypatch.setattr(benchmark, "HAS_TRITON", False)   # nor by bytes
    benchmark.benchmark_training(geometry, 4, 1e9, 1.0, cold)
    assert limits["training step, B 4 bf16"] == pytest.approx(3 * 4 * forward / 1e9)
    monkeypatch.setattr(benchmark, "sampling_flops", lambda _: (3e9, 1e9))
    benchmark.benchmark_sampling(geometry, {"ours": Machine(torch.device("cpu"))}, [2], 1e9, 1.0, cold)
    assert limits["sampling with guidance, B 2"] == 8
    printed = capsys.readouterr().out
    assert "transformer 6000.0 ms, decoder 2000.0 ms" in printed and "ours: 4.00 images/s" in printed
