"""How good images are: each figure against a closed form, and the command that prints them."""
from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from program import ran, refused
from torch.utils.data import TensorDataset

from sample import DEFAULTS, Run, Sampling, load_run
from support.checkpoint import load_checkpoint
from support.cli import UserError
from support.data import classifier_images, data_of
from support.devices import choose_machine
from support.evaluation import (
    Evaluation,
    Judge,
    Quality,
    averaged_down,
    evaluate,
    evaluated_images,
    features_and_classes,
    fine_power,
    frechet_distance,
    in_words,
    kept_classifier,
    say_classes,
    say_evaluation,
    share_among,
    train_classifier,
)
from support.images import to_float

COUNT = 40
SEEDS = (3, 4)
CPU = choose_machine("cpu", "fp32")


def whitened(count: int, dimensions: int, seed: int) -> np.ndarray:
    """Vectors whose mean is exactly 0 and whose covariance is exactly 1."""
    x_ND = np.random.default_rng(seed).standard_normal((count, dimensions))
    x_ND -= x_ND.mean(axis=0)
    root_DD = np.linalg.cholesky(np.linalg.inv(np.cov(x_ND, rowvar=False)))
    return x_ND @ root_DD


def noise(count: int = 40, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


# Fréchet distance


def test_the_frechet_distance_of_gaussians_along_the_axes():
    """|m|^2 + sum (s - t)^2."""
    s = np.array([1.0, 2.0, 0.5])
    t = np.array([3.0, 1.0, 0.5])
    m = np.array([0.5, -1.0, 2.0])
    found = frechet_distance(whitened(50, 3, 0) * s, whitened(80, 3, 1) * t + m)
    assert found == pytest.approx(0.25 + 1 + 4 + 4 + 1, rel=1e-9)


def test_the_frechet_distance_of_gaussians_along_other_axes():
    """Of a 2 x 2 matrix M, Tr M^(1/2) is (Tr M + 2 det(M)^(1/2))^(1/2)."""
    a_22 = np.array([[2.0, 0.3], [-1.0, 0.7]])
    b_22 = np.array([[0.5, 1.5], [0.2, 1.0]])
    a_N2 = whitened(50, 2, 0) @ a_22
    b_N2 = whitened(60, 2, 1) @ b_22
    product_22 = a_22.T @ a_22 @ b_22.T @ b_22
    root = np.sqrt(np.trace(product_22) + 2 * np.sqrt(np.linalg.det(product_22)))
    expected = np.square(a_22).sum() + np.square(b_22).sum() - 2 * root
    assert frechet_distance(a_N2, b_N2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b_N2, a_N2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [4, 100])   # fewer vectors than dimensions, and more
def test_the_frechet_distance_of_a_set_to_itself_and_to_itself_shifted(count):
    x_ND = np.random.default_rng(0).standard_normal((count, 16))
    assert frechet_distance(x_ND, x_ND) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x_ND, x_ND + 0.5) == pytest.approx(16 * 0.25, abs=1e-6)


# Precision and recall


def precision_recall(made_ND: np.ndarray, real_MD: np.ndarray) -> tuple[float, float]:
    return share_among(made_ND, real_MD), share_among(real_MD, made_ND)


def test_precision_and_recall_of_a_set_with_itself_and_of_disjoint_sets():
    x_ND = np.random.default_rng(0).standard_normal((30, 5))
    assert precision_recall(x_ND, x_ND) == (1, 1)
    assert precision_recall(x_ND, x_ND + 100) == (0, 0)
    alike_ND = np.zeros((30, 5)) + 0.1   # no distance between any two
    assert precision_recall(alike_ND, alike_ND) == (1, 1)


def test_half_the_variety_is_half_the_recall():
    rng = np.random.default_rng(0)
    real_MD = rng.standard_normal((400, 4))
    real_MD[200:] += 50   # two clusters
    made_ND = rng.standard_normal((400, 4)) * 0.5   # the middle of the one
    precision, recall = precision_recall(made_ND, real_MD)
    assert precision > 0.95 and 0.1 < recall < 0.5
    assert precision_recall(real_MD, made_ND) == (recall, precision)


def test_a_neighbour_is_the_third():
    real_M1 = np.array([[0.0], [1.0], [2.0], [3.0]])   # their third neighbours: 3, 2, 2 and 3 away
    made_N1 = np.array([[6.0], [6.5], [-3.5], [1e6]])   # 3 and 3.5 from the 3, 3.5 from the 0
    assert precision_recall(made_N1, real_M1) == (0.25, 1)
    far_N1 = np.array([[4.0], [5.0], [6.0], [7.0]])   # theirs: 3, 2, 2, 3, so the 4 reaches the 1
    assert precision_recall(far_N1, real_M1) == (0.75, 0.75)


# Fine detail


def wave(cycles: float, side: int = 32) -> torch.Tensor:
    x = torch.arange(side) / side
    return torch.sin(2 * torch.pi * cycles * x).expand(2, 3, side, side)


def test_fine_detail_is_what_changes_faster_than_every_four_pixels():
    fast = fine_power(wave(12))
    assert fine_power(wave(12).transpose(2, 3)) == pytest.approx(fast, rel=1e-5)
    assert fine_power(0.5 * wave(12) + 0.3) == pytest.approx(fast / 4, rel=1e-5)
    assert fine_power(wave(12).repeat(3, 1, 1, 1)) == pytest.approx(fast, rel=1e-5)
    assert fine_power(wave(5)) < 0.01 * fast
    assert fine_power(wave(7)) < 0.1 * fast   # the border lies at 8 waves in 32 pixels
    assert fine_power(torch.ones(2, 1, 32, 32)) < 1e-9
    ramp = torch.linspace(-1, 1, 32).expand(2, 1, 32, 32)   # its borders do not meet
    assert fine_power(ramp) < 1e-3 * fast


def test_fine_detail_is_the_same_in_a_mirror():
    images = noise(2)
    images[..., :4] *= 9   # on the left more than on the right
    assert fine_power(images.flip(3)) == pytest.approx(fine_power(images), rel=1e-5)
    assert fine_power(images.transpose(2, 3).flip(2)) == pytest.approx(fine_power(images), rel=1e-5)


# The classifier and the judge


@pytest.mark.parametrize("side, channels", [(8, 3), (20, 1), (32, 3), (33, 3), (70, 3)])
def test_the_classifier_takes_images_of_any_side(side, channels, monkeypatch):
    """Dark ones and light ones, told apart after a few steps."""
    monkeypatch.setattr("support.evaluation.CLASSIFIER_STEPS", 12)
    monkeypatch.setattr("support.evaluation.CLASSIFIER_BATCH", 16)
    labels = torch.arange(40) % 2
    pixels = torch.randint(0, 128, (40, channels, side, side)) + 100 * labels[:, None, None, None]
    images = pixels.byte()
    shape = {"channels": channels, "side": side, "classes": 2}
    classifier = train_classifier(images, labels, shape, 0, torch.device("cpu"))
    features_ND, taken_for_N = features_and_classes(classifier, to_float(images))
    assert torch.equal(taken_for_N, labels)
    assert features_ND.shape == (40, 128) and features_ND.dtype == np.float64
    small = averaged_down(to_float(images))
    assert small.shape[-1] == min(side, 64)
    assert np.allclose(features_and_classes(classifier, small)[0], features_ND, atol=1e-5)
    first = classifier.maps(small[:1])[0]
    assert first.shape[-1] == {8: 8, 20: 20, 32: 32, 33: 17, 70: 32}[side]   # over 32 halved


def test_the_classifier_s_rate_rises_and_falls(monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def noted(optimizer, *arguments):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    monkeypatch.setattr("support.evaluation.CLASSIFIER_STEPS", 20)
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    shape = {"channels": 1, "side": 8, "classes": 2}
    train_classifier(images, torch.arange(4) % 2, shape, 0, torch.device("cpu"))
    assert max(rates) == pytest.approx(5e-3) and rates[0] < 5e-4 and rates[-1] < 1e-4
    assert rates.index(max(rates)) == 5   # of 20


def test_the_classifier_sees_large_images_averaged_down(monkeypatch):
    """Of a folder that lies in the order of its classes it sees them all."""
    fine = torch.randint(0, 256, (12, 1, 128, 128), generator=torch.Generator().manual_seed(0)).byte()
    means = fine.double().unflatten(3, (64, 2)).unflatten(2, (64, 2)).mean(dim=(3, 5))
    assert torch.allclose(averaged_down(fine.float()).double(), means)
    labels = torch.arange(12) // 3
    data = data_of(TensorDataset(fine, labels), TensorDataset(fine, labels), "abcd")
    monkeypatch.setattr("support.data.CLASSIFIER_IMAGES", 6)
    images, own_labels = classifier_images(data, 0)
    assert images.dtype == torch.uint8 and len(images) == 6 and len(own_labels.unique()) >= 3
    rows = [(means - image).abs().amax(dim=(1, 2, 3)).argmin().item() for image in images]
    assert torch.equal(labels[rows], own_labels) and torch.equal(means[rows].round().byte(), images)


class Looks:
    """A classifier whose features are the first pixels; a bright first one is class 1."""

    head = torch.nn.Linear(4, 2, bias=False)
    head.weight.data = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]])

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0, :4]


def test_a_judge_compares_half_by_half():
    originals = noise()
    labels = (originals[:, 0, 0, 0] > 0).long()
    judge = Judge(Looks(), originals, ["dark", "bright"])
    same = judge(originals, labels)
    assert same.recognised == same.precision == same.recall == same.detail == 1
    assert same.frechet == pytest.approx(0, abs=1e-9)
    assert same.per_class == {"dark": 1, "bright": 1}
    moved = originals.clone()
    moved[0::2, :, :, 1] += 2   # a feature of one half
    assert judge(moved, labels).frechet == pytest.approx((2**2 + 0) / 2, abs=1e-6)
    moved[1::2] = 100.0 + originals[1::2]
    quality = judge(moved, labels)
    assert quality.precision < 0.5 and quality.recall < 0.5
    assert quality.per_class["dark"] == pytest.approx(
        (labels[0::2] == 0).sum().item() / (labels == 0).sum().item())
    assert quality.per_class["bright"] == 1
    few = judge(originals[torch.arange(len(originals)) % 4], labels)   # real ones, and few kinds
    assert few.precision == 1 and few.recall < 0.5
    moved[3, 0, 5, 5] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        judge(moved, labels)


# A run's evaluation


@pytest.fixture(scope="module")
def opened(judged) -> Run:
    """Nobody changes it."""
    return load_run(judged, CPU, Sampling(cfg=2.0, top_k=900, top_p=0.6, smooth=0.5))


@pytest.fixture(scope="module")
def evaluated(opened) -> tuple[Evaluation, list[tuple], list[list[int]]]:
    """What is found, how images were generated for it, and of which classes."""
    asked = []
    labels = []
    draw = Run.draw

    def noted(run, wanted, seed):
        sampling = run.sampling
        asked.append((sampling.cfg, sampling.top_k, sampling.top_p, sampling.smooth, seed))
        labels.append(wanted)
        return draw(run, wanted, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "draw", noted)
        return evaluate(opened, COUNT, SEEDS), asked, labels


def test_what_is_judged(opened, evaluated):
    _, asked, labels = evaluated
    assert asked == [(2, 900, 0.6, 0.5, 3), (2, 900, 0.6, 0.5, 4), (0, 0, 1, 0, 3), (0, 0, 1, 0, 4)]
    originals, own_labels = evaluated_images(opened, COUNT)
    assert labels == [own_labels.tolist()] * 4
    counts = [own_labels[half::2].bincount(minlength=10) for half in (0, 1)]
    assert (counts[0] - counts[1]).abs().max() <= 1
    held_out, held_out_labels = opened.held_out.tensors
    pixels = ((originals + 1) * 127.5).round().byte().flatten(1)
    for row in (0, COUNT // 3, COUNT - 1):   # each among the held-out images, with its label
        (place,) = (held_out.flatten(1) == pixels[row]).all(dim=1).nonzero()[0]
        assert held_out_labels[place] == own_labels[row]
    assert len(pixels.unique(dim=0)) == COUNT


    first = to_float(held_out[:COUNT]).flatten(1)   # not these: they are drawn at random
    assert len(torch.cat([first, originals.flatten(1)]).unique(dim=0)) > COUNT


def test_every_batch_is_drawn_from_noise_of_its_own(opened, monkeypatch):
    """And with the run's own growth of guidance."""
    asked = []
    draw = opened.model.generate
    monkeypatch.setattr(opened.model, "generate", lambda *how: asked.append(how[-1]) or draw(*how))
    sampling = Sampling(cfg=0.0, top_k=0, top_p=1.0, growth=3.0, batch=2)
    tokens = replace(opened, sampling=sampling).generate([0] * 4, 0)
    assert not torch.equal(tokens[:2], tokens[2:])
    assert asked == [3.0, 3.0]


def test_the_figures_are_those_of_the_images(opened, evaluated):
    found, _, _ = evaluated
    run = opened
    originals, labels = evaluated_images(run, COUNT)
    classifier = kept_classifier(run)
    tokens_NL = run.encode(originals)[1]
    results = run.decode(tokens_NL)
    mse = ((results - originals) / 2).square().mean().item()
    assert found.psnr == pytest.approx(10 * np.log10(1 / mse), abs=1e-3)
    with torch.no_grad():
        logits_NLV = run.model(labels, run.tokenizer.teacher_inputs(tokens_NL))
    nats = torch.nn.functional.cross_entropy(logits_NLV.flatten(0, 1), tokens_NL.flatten())
    assert found.nats_per_token == pytest.approx(nats.item(), rel=1e-4)
    assert found.nats_per_image == pytest.approx(21 * nats.item(), rel=1e-4)
    images, all_labels = run.held_out.tensors
    taken_for_N = features_and_classes(classifier, to_float(images))[1]
    assert found.accuracy == pytest.approx((taken_for_N == all_labels).double().mean().item())
    for images, quality in ((results, found.reconstructions), (originals, found.originals)):
        hits = (features_and_classes(classifier, images)[1] == labels).double()
        assert quality.recognised == pytest.approx(hits.mean().item())
        assert quality.per_class["star"] == pytest.approx(hits[labels == 4].mean().item())
    halves_ND = [features_and_classes(classifier, originals[half::2])[0] for half in (0, 1)]
    assert found.originals.frechet == pytest.approx(frechet_distance(*halves_ND), rel=1e-6)
    shares = precision_recall(*halves_ND)
    assert found.originals.precision == found.originals.recall == pytest.approx(np.mean(shares))
    assert found.reconstructions.frechet > 0 and found.reconstructions.detail < 1
    assert len(found.generated) == len(found.unfiltered) == 2
    smooth = run.decode(run.draw(labels.tolist(), SEEDS[0])[1])
    assert found.generated[0] == Judge(classifier, originals, run.classes)(smooth, labels)
    assert found.generated[0] != found.generated[1]


def test_the_table(opened, evaluated, capsys):
    found, _, _ = evaluated
    say_evaluation(found, COUNT, SEEDS, opened.sampling)
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert f"recognises {found.accuracy:.1%} of all held-out images" in lines[0]
    for line, name, (quality, *more) in zip(
            lines[2:6], ("held-out", "reconstructions", "generated, cfg 2, top-k 900, top-p 0.6, growth 1, smooth 0.5 ",
                         "generated, no guidance"),
            ([found.originals], [found.reconstructions], found.generated, found.unfiltered)):
        assert line.startswith(name)
        for value, digits in ((quality.frechet, 2), (100 * quality.recall, 1)):
            if not more:
                assert f" {value:.{digits}f}" in line
                continue
            other = more[0].frechet if digits == 2 else 100 * more[0].recall
            spread = abs(value - other) / np.sqrt(2)   # the standard deviation of two
            assert f" {(value + other) / 2:.{digits}f} ± {spread:.{digits}f}" in line
    assert f"{found.psnr:.2f} dB" in said and f"{found.nats_per_image:.2f} nats each" in said
    star = next(line for line in lines if line.startswith("  star"))
    expected = [found.originals.per_class["star"], found.reconstructions.per_class["star"]]
    expected += [np.mean([quality.per_class["star"] for quality in qualities])
                 for qualities in (found.generated, found.unfiltered)]
    assert star.split()[1:] == [f"{share:.1%}" for share in expected]
    heads = next(i for i, line in enumerate(lines) if line.startswith("recognised"))
    shares = [float(line.split()[3].strip("%")) for line in lines[heads + 1:heads + 11]]
    assert shares == sorted(shares) and shares[0] < shares[-1]   # of generated ones, the least first
    assert "standard deviation over the seeds 3 4" in said
    assert "is not FID" in said and "export 50000" in said
    assert f"note: {COUNT} images are few" in said
    say_evaluation(found, 500, SEEDS, opened.sampling)
    assert "are few" not in capsys.readouterr().out


def test_one_seed_has_no_spread():
    assert in_words([1.23], 1, " %") == "1.2 %"
    assert in_words([1, 3], 1) == "2.0 ± 1.4"


# The classifier's file


def test_a_classifier_is_trained_once(judged, opened, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(judged, tmp_path / "run")
    run = replace(opened, folder=out)
    whole = (out / "classifier.pt").read_bytes()
    weight = kept_classifier(run).head.weight
    assert torch.equal(weight, kept_classifier(opened).head.weight)
    assert (out / "classifier.pt").read_bytes() == whole
    assert "classifier" not in "".join(capsys.readouterr())
    assert not weight.requires_grad
    content = torch.load(out / "train_images.pt", weights_only=True)
    torch.save({**content, "data_set": "another"}, out / "train_images.pt")
    monkeypatch.setattr("support.evaluation.CLASSIFIER_STEPS", 2)
    run.data_set = "another"
    assert not torch.equal(weight, kept_classifier(run).head.weight)
    assert "trained on other images" in capsys.readouterr().out
    assert (out / "classifier.pt").read_bytes() != whole
    for damaged, told in ((whole[:-500], "cannot be read"),
                          ((out / "var.pt").read_bytes(), "is a checkpoint of a transformer")):
        (out / "classifier.pt").write_bytes(damaged)
        with pytest.raises(UserError, match=told):
            kept_classifier(run)


def test_a_run_s_training_images(judged):
    content = load_checkpoint(judged / "train_images.pt", "set of training images")
    assert content["images"].shape[1:] == (3, 16, 16) and content["side"] == 16
    assert len(content["images"]) == len(content["labels"]) > 100
    made_with = load_checkpoint(judged / "var.pt", "transformer")["made_with"]
    assert content["data_set"] == made_with["data set"]


def test_a_run_that_cannot_be_written_to_is_judged_all_the_same(judged, monkeypatch, tmp_path):
    out = shutil.copytree(judged, tmp_path / "run")
    (out / "classifier.pt").unlink()

    def full(*_):
        raise OSError("Read-only file system")

    monkeypatch.setattr("support.evaluation.CLASSIFIER_STEPS", 3)
    monkeypatch.setattr("support.checkpoint.save_whole", full)
    said = ran("sample.py", "evaluate", 8, "--run", out, "--seeds", 0, "--cfg", 3)
    assert "the classifier is not kept" in said and "Read-only" in said
    assert "8 images of each kind" in said and "generated, cfg 3" in said


# Mistakes


def test_a_classifier_is_trained_where_gradients_are_off(judged, opened, tmp_path, monkeypatch):
    monkeypatch.setattr("support.evaluation.CLASSIFIER_STEPS", 1)
    out = shutil.copytree(judged, tmp_path / "run")
    (out / "classifier.pt").unlink()
    with torch.no_grad():
        kept_classifier(replace(opened, folder=out))
    assert (out / "classifier.pt").exists()


def test_mistakes_in_evaluating(judged, opened, tmp_path):
    out = shutil.copytree(judged, tmp_path / "run")
    (out / "train_images.pt").unlink()
    for count, told in ((10_000, "10000 images cannot be judged: there are 50"),
                        (6, "must be a whole number, 8 or more"),
                        (9, "two halves are compared, so it takes an even number"),
                        (8, "train_images.pt, by which images are judged")):
        assert told in refused("sample.py", "evaluate", count, "--run", out)
    with pytest.raises(UserError, match="one class gives nothing"):
        evaluate(replace(opened, classes=["star"]), 8, (0,))
    with pytest.raises(UserError, match="has no held_out.pt"):
        evaluate(replace(opened, held_out=None), 8, (0,))
    broken = load_run(judged, CPU)
    torch.nn.init.constant_(broken.tokenizer.decoder.conv_out.bias, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluate(broken, 8, (0,))


def test_apples_gpu_is_asked_for_nothing_that_it_lacks(monkeypatch):
    """It has no float64, and averages only over areas that divide the side."""
    moved = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: moved.append(x) or cpu(x))
    images = torch.rand(4, 3, 96, 96)
    averaged_down(images)
    assert moved[0] is images
    moved.clear()
    features_and_classes(Looks(), images)
    assert all(x.dtype != torch.float64 for x in moved)


def test_all_held_out_images_can_be_judged(opened):
    total = len(opened.held_out)
    assert len(evaluated_images(opened, total)[0]) == total


def test_of_many_classes_the_twenty_worst_are_listed(capsys):
    shares = {f"kind{i:02}": (i * 7 % 30) / 30 for i in range(30)}
    say_classes([[Quality(0.5, shares, 1.0, 1.0, 1.0, 1.0)]] * 4)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == sorted(shares, key=shares.get)[:20]


def test_images_without_detail_have_none_to_be_compared_with():
    judge = Judge(Looks(), torch.full((40, 3, 16, 16), 0.3), ["dark", "bright"])
    assert np.isnan(judge(noise(), torch.ones(40, dtype=torch.int64)).detail)


def test_every_figure_stands_in_its_column(capsys):
    """Of sets that are unlike, so that none can be taken for another."""
    def quality(n: int) -> Quality:
        return Quality(0.11 * n, {"cat": 0.1 * n, "dog": 0.4 * (n % 2)}, 1.5 * n, 0.12 * n, 0.13 * n, 1.25 * n)

    say_evaluation(Evaluation(0.8, quality(1), quality(2), 21.5, 40.0, 2.5, [quality(3)], [quality(4)]),
                   500, (7,), DEFAULTS)
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[1].split() == ["recognised", "Fréchet", "precision", "recall", "fine", "detail"]
    for n, line in enumerate(lines[2:6], 1):
        assert line.split()[-8:] == [f"{11 * n:.1f}", "%", f"{1.5 * n:.2f}", f"{12 * n:.1f}", "%",
                                     f"{13 * n:.1f}", "%", f"{1.25 * n:.2f}"]
    assert "held-out images take 40.00 nats each, 2.500 per token" in said
    assert [line.split() for line in lines[7:10]] == [
        ["recognised", "held-out", "reconstructed", "generated", "unfiltered"],
        ["cat", "10.0%", "20.0%", "30.0%", "40.0%"], ["dog", "40.0%", "0.0%", "40.0%", "0.0%"]]
    assert "±" not in said   # of a single seed


def test_a_classifier_begins_as_its_seed_says(monkeypatch):
    """And not as what was drawn until then."""
    monkeypatch.setattr("support.evaluation.CLASSIFIER_STEPS", 1)
    images = torch.randint(0, 256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    heads = []
    for before, seed in enumerate((3, 3, 4)):
        torch.manual_seed(100 + before)
        shape = {"channels": 1, "side": 8, "classes": 2}
        heads.append(train_classifier(images, torch.arange(8) % 2, shape, seed, torch.device("cpu")).head.weight)
    one, same, other = heads
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_step_of_the_classifier_has_the_gradient_of_its_own_batch(monkeypatch):
    """Here the same in all of them, as nothing moves."""
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer, *_: seen.append(
        optimizer.param_groups[0]["params"][-1].grad.clone()))
    monkeypatch.setattr("support.evaluation.CLASSIFIER_STEPS", 3)
    shape = {"channels": 1, "side": 8, "classes": 2}
    train_classifier(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), shape, 0,
                     torch.device("cpu"))
    first, *others = seen
    assert len(others) == 2 and first.any()
    for other in others:
        torch.testing.assert_close(other, first)
