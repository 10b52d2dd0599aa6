"""How good images are: each figure against a closed form, and the command that prints them."""
from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import tokenizer
import train
from program import TINY, ran, refused

COUNT = 200
SEEDS = (3, 4)


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
    found = sample.frechet_distance(whitened(50, 3, 0) * s, whitened(80, 3, 1) * t + m)
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
    assert sample.frechet_distance(a_N2, b_N2) == pytest.approx(expected, rel=1e-9)
    assert sample.frechet_distance(b_N2, a_N2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [4, 100])   # fewer vectors than dimensions, and more
def test_the_frechet_distance_of_a_set_to_itself_and_to_itself_shifted(count):
    x_ND = np.random.default_rng(0).standard_normal((count, 16))
    assert sample.frechet_distance(x_ND, x_ND) == pytest.approx(0, abs=1e-6)
    assert sample.frechet_distance(x_ND, x_ND + 0.5) == pytest.approx(16 * 0.25, abs=1e-6)


# Precision and recall


def test_precision_and_recall_of_a_set_with_itself_and_of_disjoint_sets():
    x_ND = np.random.default_rng(0).standard_normal((30, 5))
    assert sample.precision_recall(x_ND, x_ND) == (1, 1)
    assert sample.precision_recall(x_ND, x_ND + 100) == (0, 0)
    alike_ND = np.zeros((30, 5)) + 0.1   # no distance between any two
    assert sample.precision_recall(alike_ND, alike_ND) == (1, 1)


def test_half_the_variety_is_half_the_recall():
    rng = np.random.default_rng(0)
    real_MD = rng.standard_normal((400, 4))
    real_MD[200:] += 50   # two clusters
    made_ND = rng.standard_normal((400, 4)) * 0.5   # the middle of the one
    precision, recall = sample.precision_recall(made_ND, real_MD)
    assert precision > 0.95 and 0.1 < recall < 0.5
    assert sample.precision_recall(real_MD, made_ND) == (recall, precision)


def test_a_neighbour_is_the_third():
    real_M1 = np.array([[0.0], [1.0], [2.0], [3.0]])   # their third neighbours: 3, 2, 2 and 3 away
    made_N1 = np.array([[6.0], [6.5], [-3.5], [1e6]])   # 3 and 3.5 from the 3, 3.5 from the 0
    assert sample.precision_recall(made_N1, real_M1) == (0.25, 1)
    far_N1 = np.array([[4.0], [5.0], [6.0], [7.0]])   # theirs: 3, 2, 2, 3, so the 4 reaches the 1
    assert sample.precision_recall(far_N1, real_M1) == (0.75, 0.75)


# Fine detail


def wave(cycles: float, side: int = 32) -> torch.Tensor:
    x = torch.arange(side) / side
    return torch.sin(2 * torch.pi * cycles * x).expand(2, 3, side, side)


def test_fine_detail_is_what_changes_faster_than_every_four_pixels():
    fast = sample.fine_power(wave(12))
    assert sample.fine_power(wave(12).transpose(2, 3)) == pytest.approx(fast, rel=1e-5)
    assert sample.fine_power(0.5 * wave(12) + 0.3) == pytest.approx(fast / 4, rel=1e-5)
    assert sample.fine_power(wave(12).repeat(3, 1, 1, 1)) == pytest.approx(fast, rel=1e-5)
    assert sample.fine_power(wave(5)) < 0.01 * fast
    assert sample.fine_power(wave(7)) < 0.1 * fast   # the border lies at 8 waves in 32 pixels
    assert sample.fine_power(torch.ones(2, 1, 32, 32)) < 1e-9
    ramp = torch.linspace(-1, 1, 32).expand(2, 1, 32, 32)   # its borders do not meet
    assert sample.fine_power(ramp) < 1e-3 * fast


# The classifier and the judge


@pytest.mark.parametrize("side, channels", [(8, 3), (28, 1), (96, 3)])
def test_the_classifier_takes_images_of_any_side(side, channels, monkeypatch):
    """Dark ones and light ones, told apart after a few steps."""
    monkeypatch.setattr(sample, "CLASSIFIER_STEPS", 12)
    labels = torch.arange(40) % 2
    pixels = torch.randint(0, 128, (40, channels, side, side)) + 100 * labels[:, None, None, None]
    images = pixels.byte()
    shape = {"channels": channels, "side": side, "classes": 2}
    classifier = sample.train_classifier(images, labels, shape, 0, torch.device("cpu"))
    features_ND, taken_for_N = sample.features_and_classes(classifier, sample.to_float(images))
    assert torch.equal(taken_for_N, labels)
    assert features_ND.shape == (40, 128) and features_ND.dtype == np.float64
    small = tokenizer.averaged_down(sample.to_float(images))
    assert small.shape[-1] == min(side, 64)
    assert np.allclose(sample.features_and_classes(classifier, small)[0], features_ND, atol=1e-5)
    assert [x.shape[-1] for x in classifier.maps(small[:1])][0] == (32 if side > 32 else side)


class Looks:
    """A classifier whose features are the first pixels; a bright first one is class 1."""

    head = torch.nn.Linear(4, 2, bias=False)
    head.weight.data = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]])

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0, :4]


def test_a_judge_compares_half_by_half():
    originals = noise()
    labels = (originals[:, 0, 0, 0] > 0).long()
    judge = sample.Judge(Looks(), originals, ["dark", "bright"])
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
    moved[3, 0, 5, 5] = torch.nan
    with pytest.raises(sample.UserError, match="not finite"):
        judge(moved, labels)


# The command


def opened(out: Path, *arguments) -> sample.Run:
    options = sample.parse(["--run", str(out), "--device", "cpu", "--precision", "fp32",
                            "--cfg", "2", *arguments])
    sample.settle_device(options)
    return sample.load(options)


@pytest.fixture(scope="module")
def judged(shapes) -> tuple[sample.Evaluation, list[tuple], list[list[int]]]:
    """What is found, how images were generated for it, and of which classes."""
    run = opened(shapes)
    asked = []
    labels = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "CLASSIFIER_STEPS", 100)
        generate = sample.Run.generate

        def noted(run, wanted, seed):
            asked.append((run.options.cfg, run.options.top_k, run.options.top_p, seed))
            labels.append(wanted)
            return generate(run, wanted, seed)

        patch.setattr(sample.Run, "generate", noted)
        return sample.evaluate(run, COUNT, SEEDS), asked, labels


def test_what_is_judged(shapes, judged):
    found, asked, labels = judged
    assert asked == [(2, 900, 0.6, 3), (2, 900, 0.6, 4), (0, 0, 1, 3), (0, 0, 1, 4)]
    run = opened(shapes)
    originals, own_labels = sample.evaluated_images(run, COUNT)
    assert labels == [own_labels.tolist()] * 4
    counts = [own_labels[half::2].bincount(minlength=10) for half in (0, 1)]
    assert (counts[0] - counts[1]).abs().max() <= 1
    held_out, held_out_labels = run.held_out.tensors
    pixels = ((originals + 1) * 127.5).round().byte().flatten(1)
    for row in (0, 70, COUNT - 1):   # each among the held-out images, with its label
        (place,) = (held_out.flatten(1) == pixels[row]).all(dim=1).nonzero()[0]
        assert held_out_labels[place] == own_labels[row]
    assert len(pixels.unique(dim=0)) == COUNT


def test_the_figures_are_those_of_the_images(shapes, judged):
    found, _, _ = judged
    run = opened(shapes)
    originals, labels = sample.evaluated_images(run, COUNT)
    classifier = sample.kept_classifier(run)
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
    taken_for_N = sample.features_and_classes(classifier, sample.to_float(images))[1]
    assert found.accuracy == pytest.approx((taken_for_N == all_labels).double().mean().item())
    assert found.accuracy > 0.5
    for images, quality in ((results, found.reconstructions), (originals, found.originals)):
        hits = (sample.features_and_classes(classifier, images)[1] == labels).double()
        assert quality.recognised == pytest.approx(hits.mean().item())
        assert quality.per_class["star"] == pytest.approx(hits[labels == 4].mean().item())
    halves_ND = [sample.features_and_classes(classifier, originals[half::2])[0] for half in (0, 1)]
    assert found.originals.frechet == pytest.approx(sample.frechet_distance(*halves_ND), rel=1e-6)
    shares = sample.precision_recall(*halves_ND)
    assert found.originals.precision == found.originals.recall == pytest.approx(np.mean(shares))
    assert found.reconstructions.frechet > 0 and found.reconstructions.detail < 1
    assert len(found.generated) == len(found.unfiltered) == 2
    assert found.generated[0] != found.generated[1]
    assert found.originals.recognised > found.unfiltered[0].recognised


def test_the_table(shapes, judged):
    found, _, _ = judged
    said = ran("sample.py", "--run", shapes, "--precision", "fp32", "--evaluate", COUNT,
               "--seeds", *SEEDS, "--cfg", 2)
    lines = [line for line in said.splitlines() if not line.startswith("note")]
    assert f"recognises {found.accuracy:.1%} of all held-out images" in lines[0]
    for line, name, (quality, *more) in zip(
            lines[2:6], ("held-out", "reconstructions", "generated, cfg 2, top-k 900, top-p 0.6",
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
    assert "standard deviation over the seeds 3 4" in said
    assert "is not FID" in said and "--npz 50000" in said


def test_one_seed_has_no_spread():
    assert sample.in_words([1.23], 1, " %") == "1.2 %"
    assert sample.in_words([1, 3], 1) == "2.0 ± 1.4"


# The classifier's file


def test_a_classifier_is_trained_once(shapes, judged, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(shapes, tmp_path / "run")
    whole = (out / "classifier.pt").read_bytes()
    run = opened(out)
    capsys.readouterr()
    weight = sample.kept_classifier(run).head.weight
    assert torch.equal(weight, sample.kept_classifier(opened(shapes)).head.weight)
    assert (out / "classifier.pt").read_bytes() == whole
    assert "classifier" not in "".join(capsys.readouterr())
    assert not weight.requires_grad
    content = torch.load(out / "train_images.pt", weights_only=True)
    torch.save({**content, "data_set": "another"}, out / "train_images.pt")
    monkeypatch.setattr(sample, "CLASSIFIER_STEPS", 2)
    assert not torch.equal(weight, sample.kept_classifier(opened(out)).head.weight)
    assert "trained on other images" in capsys.readouterr().out
    assert (out / "classifier.pt").read_bytes() != whole
    for damaged, told in ((whole[:-500], "cannot be read"),
                          ((out / "var.pt").read_bytes(), "is a checkpoint of a transformer")):
        (out / "classifier.pt").write_bytes(damaged)
        with pytest.raises(sample.UserError, match=told):
            sample.kept_classifier(opened(out))


def test_training_images_are_kept(folder, tmp_path, monkeypatch):
    """Of a folder: those that can be read, averaged down, and no more than the bound."""
    monkeypatch.setattr(train, "CLASSIFIER_IMAGES", 15)
    monkeypatch.setattr(tokenizer, "JUDGED_SIDE", 4)
    options = train.parse(["--data", str(folder), "--out", str(tmp_path), *TINY])
    train.settle(options)
    data = train.load_data(options)
    images, labels = train.some_images(data, options)
    assert images.shape == (15, 3, 4, 4) and images.dtype == torch.uint8
    assert set(labels.tolist()) == {0, 1}
    all_images, all_labels = data.train[range(len(data.train))]
    averaged = all_images.float().view(-1, 3, 4, 2, 4, 2).mean(dim=(3, 5))
    for image, label in zip(images, labels):
        near = (averaged - image).abs().amax(dim=(1, 2, 3)) <= 0.5
        assert all_labels[near].tolist() == [label]


def test_a_run_s_training_images(finished):
    content = sample.load_checkpoint(finished / "train_images.pt", "set of training images")
    assert content["images"].shape == (22, 3, 8, 8) and content["side"] == 8
    identity = torch.load(finished / "var.pt", weights_only=True)["identity"]
    assert content["data_set"] == identity["data set"]


def test_a_run_that_cannot_be_written_to_is_judged_all_the_same(shapes, monkeypatch, tmp_path):
    run = shutil.copytree(shapes, tmp_path / "run")
    (run / "classifier.pt").unlink(missing_ok=True)

    def full(*_):
        raise OSError("Read-only file system")

    monkeypatch.setattr(sample, "CLASSIFIER_STEPS", 3)
    monkeypatch.setattr(sample, "save_whole", full)
    said = ran("sample.py", "--run", run, "--evaluate", 8, "--seeds", 0)
    assert "the classifier is not kept" in said and "Read-only" in said and "recognised" in said


# Mistakes


def test_mistakes_in_evaluating(shapes, finished, tmp_path, monkeypatch):
    def refusal(*arguments, run=shapes) -> str:
        return refused("sample.py", "--run", run, *arguments)

    assert "--evaluate 1002: there are 1000 held-out images" in refusal("--evaluate", 1002)
    assert "there are 2 held-out" in refusal("--evaluate", 8, run=finished)
    assert "must be a whole number, 8 or more" in refusal("--evaluate", 6)
    assert "must be even" in refusal("--evaluate", 9)
    assert "not allowed with argument --evaluate" in refusal("--evaluate", 8, "--codes", "data:1")
    out = shutil.copytree(shapes, tmp_path / "run")
    (out / "train_images.pt").unlink()
    assert "no set of training images" in refusal("--evaluate", 8, run=out)
    run = opened(shapes)
    with pytest.raises(sample.UserError, match="one class gives nothing"):
        sample.evaluate(sample.replace(run, classes=["star"]), 8, (0,))
    with pytest.raises(sample.UserError, match="comes without images"):
        sample.evaluate(sample.replace(run, held_out=None), 8, (0,))
    torch.nn.init.constant_(run.tokenizer.decoder.conv_out.bias, torch.nan)
    with pytest.raises(sample.UserError, match="not finite"):
        sample.evaluate(run, 8, (0,))


def test_another_transformer_is_judged_by_its_own_folder(shapes):
    options = argparse.Namespace(run=Path("elsewhere"), var=shapes / "var.pt")
    assert sample.path_of_var(options) == shapes / "var.pt"
    options.var = None
    assert sample.path_of_var(options) == Path("elsewhere/var.pt")
