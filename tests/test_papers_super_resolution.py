"""A page of papers/: large images of small ones, which were degraded."""
from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from program import copied_run, opened_run, ran, with_moved_weights

from papers import FILTERED, small_images, super_resolution
from papers.damage import saved
from papers.small_images import Looking, degraded, degraded_by_lot, enlarged, upscaled
from papers.super_resolution import MIDDLE, WIDE, Upscaling
from papers.tuning import Tuning
from sample import Run
from support.checkpoint import load_checkpoint
from support.evaluation import Judge, evaluated_images, kept_classifier
from support.images import to_bytes, to_float

COUNT = 16
SHORT = ("--device", "cpu", "--count", COUNT)
NONE = [0], [0], [0]


@pytest.fixture(scope="module")
def folder(judged, tmp_path_factory):
    return copied_run(judged, tmp_path_factory.mktemp("super") / "shapes")


@pytest.fixture(scope="module")
def opened(folder):
    return with_moved_weights(opened_run(folder, *SHORT))


@pytest.fixture(scope="module")
def real(opened):
    """Held-out images, and their labels."""
    return evaluated_images(opened, COUNT)


def halved(images):
    return F.avg_pool2d(images, 2)


def looking(run):
    """A model that heeds what it is shown."""
    model = Looking(run).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(model.look.weight)
    return model


# ------------------------------------------------------------------------------------------------
# Small images


@pytest.mark.parametrize("sigma", small_images.BLUR[1:])
def test_blur_is_a_gaussian(sigma):
    images = torch.zeros(2, 3, 32, 32)
    images[1, 2, 15, 16] = 1
    blurred = small_images.blurred(images, sigma)
    assert blurred[0].abs().max() == blurred[1, :2].abs().max() == 0
    spot = blurred[1, 2].double().numpy()
    y, x = np.mgrid[:32, :32]
    assert spot.sum() == pytest.approx(1, abs=1e-5)
    assert (spot * y).sum() == pytest.approx(15, abs=1e-4)
    assert (spot * x).sum() == pytest.approx(16, abs=1e-4)
    # A sum over pixels is the integral to many digits from a standard deviation of 0.7 on; what is
    # cut off takes 2.7 % of the variance with it.
    for spread in ((spot * (y - 15)**2).sum(), (spot * (x - 16)**2).sum()):
        assert 0.96 * sigma**2 < spread < 1.001 * sigma**2
    assert spot[15, 17] / spot[15, 16] == pytest.approx(np.exp(-1 / (2 * sigma**2)), rel=1e-4)


def test_blur_mirrors_at_the_border():
    images = torch.full((1, 3, 16, 16), 0.25)
    assert torch.allclose(small_images.blurred(images, 2.1), images, atol=1e-6)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    wide = images
    for axis in (2, 3):   # what is at the border is there once
        mirrored = wide.flip(axis)
        wide = torch.cat([mirrored.narrow(axis, 0, 15), wide, mirrored.narrow(axis, 1, 15)], axis)
    blurred = small_images.blurred(wide, 2.1)[..., 15:31, 15:31]
    assert torch.allclose(small_images.blurred(images, 2.1), blurred, atol=1e-6)


def test_small_images_are_enlarged():
    small = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = F.interpolate(small, size=(16, 16), mode="bicubic")
    assert expected.abs().max() > 1
    assert torch.equal(enlarged(small), expected.clamp(-1, 1))


def test_links_of_the_chain(real):
    images, _ = real
    assert torch.allclose(degraded(images, (0, 0, 0)), halved(images), atol=1e-6)
    blurred = halved(small_images.blurred(images, 1.4))
    assert torch.allclose(degraded(images, (2, 0, 0)), blurred, atol=1e-6)
    assert torch.equal(degraded(images, (0, 0, 3)), saved(halved(images), "JPEG", 10))
    torch.manual_seed(0)
    noisy = degraded(torch.zeros(64, 3, 16, 16), (0, 1, 0))
    assert noisy.std().item() / 2 == pytest.approx(0.05, rel=0.05)   # of pixels in [0, 1]
    torch.manual_seed(0)
    noise = 2 * 0.2 * torch.randn(halved(images).shape)
    torch.manual_seed(0)
    chain = degraded(images, (2, 3, 1))
    assert torch.equal(chain, saved(blurred + noise, "JPEG", 60))
    torch.manual_seed(0)
    chain = degraded(images, (2, 3, 0))
    assert torch.allclose(chain, (blurred + noise).clamp(-1, 1), atol=1e-6)


def test_stronger_is_worse(real):
    images, _ = real
    for place in range(3):
        errors = []
        for strength in range(4):
            torch.manual_seed(0)
            small = degraded(images, [strength * (i == place) for i in range(3)])
            errors.append((small - halved(images)).square().mean().item())
        assert errors[0] < 1e-10 and errors == sorted(set(errors)) and errors[1] > 1e-4


def test_every_image_draws_its_strengths(real, monkeypatch):
    images = real[0].repeat(4, 1, 1, 1)
    monkeypatch.setattr(small_images, "NOISE", (0, 0, 0, 0))   # so that nothing is by chance
    torch.manual_seed(0)
    small = degraded_by_lot(images, ([0, 2], [1], [0, 3]))
    drawn = []
    for image, made in zip(images, small):
        kinds = [(blur, 1, jpeg) for blur in (0, 2) for jpeg in (0, 3)]
        errors = [(degraded(image[None], kind)[0] - made).abs().max().item() for kind in kinds]
        assert min(errors) < 1e-5
        drawn.append(kinds[int(np.argmin(errors))])
    assert all(5 < drawn.count(kind) < 30 for kind in set(drawn)) and len(set(drawn)) == 4


def test_what_is_tuned_on_and_what_is_left_for_the_test():
    """Of the middle strengths, blur and noise; JPEG and the strong ones are met by "wide" alone."""
    assert WIDE == ([0, 1, 2, 3],) * 3
    strengths = super_resolution.TESTS
    assert len(set(strengths.values())) == len(strengths) == 8
    for i, kind in enumerate(("blur", "noise", "JPEG")):
        for x in (1, 3):
            assert strengths[f"{kind} {x}"] == tuple(x * (i == j) for j in range(3))
    met = {name for name, drawn in strengths.items() if all(map(list.__contains__, MIDDLE, drawn))}
    assert met == {"none", "blur and noise 2"}
    assert all(all(map(list.__contains__, WIDE, drawn)) for drawn in strengths.values())


# ------------------------------------------------------------------------------------------------
# A model that is shown a latent


def test_shown_nothing_it_is_the_model_it_was_made_of(run, real):
    images, labels = real
    latent, tokens = run.encode(images)
    inputs = run.tokenizer.teacher_inputs(tokens)
    model = Looking(run).eval()
    with torch.no_grad():
        expected = run.model(labels, inputs)
        assert torch.equal(model(labels, inputs), expected)
        model.show(latent)
        assert torch.allclose(model(labels, inputs), expected, atol=1e-6)
        model = looking(run)
        assert torch.equal(model(labels, inputs), expected)
        model.show(latent)
        assert not torch.allclose(model(labels, inputs), expected, atol=0.1)


def test_each_scale_is_shown_its_own_view(run, real):
    latent, _ = run.encode(real[0])
    model = looking(run)
    model.show(latent)
    for k, (span, s) in enumerate(zip(model.config.spans, model.config.scales)):
        area = F.interpolate(latent, size=(s, s), mode="area").flatten(2).mT
        assert torch.allclose(model.shown_BLC[:, span], area, atol=1e-5)
        added = model.positions()[:, span] - run.model.positions()[:, span]
        assert torch.allclose(added, area @ model.look.weight.T, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# Tuning


@pytest.mark.parametrize("looks", [False, True])
def test_the_loss_by_hand(run, real, looks):
    """With the small images' tokens at the first two scales of three; and of the third the tokens
    that correct the sum of them."""
    images, labels = real
    run.model.config = replace(run.model.config, label_dropout=0.0)
    stage = Upscaling(run, looking(run) if looks else run.model, "some", ([2], [0], [0]), 2)
    assert stage.n == 2
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    with torch.no_grad():
        loss, to_log = stage.loss(stage.model, pixels, labels)
    assert to_log() == {}
    large = to_float(pixels)
    f, tokens = run.encode(large)
    f_small, read = run.encode(enlarged(degraded(large, (2, 0, 0))))
    quantizer = run.tokenizer.quantizer
    f_hat = quantizer.decode(read[:, :5])
    asked = quantizer.nearest(quantizer.read(f - f_hat, 2))
    assert not torch.equal(asked, tokens[:, 5:]) and not torch.equal(read[:, :5], tokens[:, :5])
    inputs = run.tokenizer.teacher_inputs(torch.cat([read[:, :5], asked], dim=1))
    if looks:
        stage.model.show(f_small)
    null = torch.full_like(labels, run.model.config.classes)
    with torch.no_grad():
        logits = stage.model(null, inputs)[:, 5:]
    expected = -logits.log_softmax(-1).gather(2, asked[..., None]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_tuned_and_on_what(run, monkeypatch):
    """Copies, each for as long, at the run's own rate; the control on tokens with no class told."""
    started = {}

    def watched(stage):
        started[stage.settings.out.name] = stage
        return stage.model

    monkeypatch.setattr(Tuning, "run", watched)
    models = super_resolution.tuned(run, 3)
    assert models["zero-shot"] is run.model
    assert list(models)[1:] == [name.removeprefix("super-") for name in started]
    for name, stage in started.items():
        assert models[name.removeprefix("super-")] is stage.model is not run.model
        assert stage.steps == 3
        assert stage.settings.preset.var_lr == run.settings.preset.var_lr
        for weight, own in zip(run.model.state_dict().values(), stage.model.state_dict().values()):
            assert weight.data_ptr() != own.data_ptr()
    control = started["super-control"]
    ordinary = Tuning(run, copy.deepcopy(run.model), "other", 3, 1e-3)
    assert type(control) is Tuning
    assert torch.equal(control.rows.tensors[0], ordinary.rows.tensors[0])
    assert (control.rows.tensors[1] == len(run.classes)).all()
    kinds = [(type(stage.model) is Looking, stage.choices) for stage in list(started.values())[1:]]
    assert kinds == [(False, MIDDLE), (True, MIDDLE), (True, WIDE)]


def test_tuning_changes_copies(run):
    before = copy.deepcopy(run.model.state_dict())
    tuned = Upscaling(run, Looking(run), "look-some", WIDE, 2).run()
    assert not torch.equal(tuned.head.weight, before["head.weight"])
    assert tuned.look.weight.any()
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name])
    content = load_checkpoint(run.folder / "papers" / "super-look-some" / "var.pt", "transformer")
    assert content["made_with"]["strengths"] == list(WIDE)


# ------------------------------------------------------------------------------------------------
# Upscaling


@pytest.mark.parametrize("looks", [False, True])
def test_the_coarse_scales_are_those_of_the_small_image(run, real, looks, monkeypatch):
    """The finer ones are drawn, by a model that is shown the image it is drawing."""
    latent, tokens = run.encode(enlarged(halved(real[0])))
    model = looking(run) if looks else run.model
    run = replace(run, model=model, sampling=replace(FILTERED, batch=5))   # more than one batch
    monkeypatch.setattr(Run, "decode", lambda run, tokens: tokens)
    labels = []
    generate = type(model).generate

    def watched(model, tokenizer, labels_B, cfg, top_k, top_p, generator, *rest):
        labels.append(labels_B)
        assert generator.initial_seed() == 0
        return generate(model, tokenizer, labels_B, cfg, top_k, top_p, generator, *rest)

    monkeypatch.setattr(type(model), "generate", watched)
    seen = []
    draw = model.draw
    monkeypatch.setattr(model, "draw", lambda logits, *how: (
        seen.append(logits), draw(logits, *how))[1])
    found = upscaled(run, latent)
    assert torch.equal(found[:, :5], tokens[:, :5])
    assert not torch.equal(found[:, 5:], tokens[:, 5:])
    assert torch.cat(labels).tolist() == [len(run.classes)] * COUNT
    if looks:
        model.show(latent)
    with torch.no_grad():
        logits = model(torch.cat(labels), run.tokenizer.teacher_inputs(found))
    assert torch.allclose(torch.cat(seen[2::3]), logits[:, 5:], atol=1e-4)


def test_the_picture_shows_an_image_of_each_test(real, monkeypatch):
    images, _ = real
    rows = []
    monkeypatch.setattr(small_images, "grid", lambda given, _: rows.extend(given))
    made = {test: {"look": images.roll(i, 1)} for i, test in enumerate(super_resolution.TESTS)}
    small_images.picture_of(images, made)
    shown = ("blur and noise 2", "blur 3", "noise 3", "JPEG 3")
    for place, row, test in zip(range(0, COUNT, 4), rows, shown, strict=True):   # of other classes
        columns = small_images.small_of(images, test), made[test]["look"], images
        assert (row.label, row.captions) == (test, ["small", "look", "original"])
        for image, column in zip(row.images, columns, strict=True):
            assert np.array_equal(image, to_bytes(column)[place])


# ------------------------------------------------------------------------------------------------
# The page


def table_of(said, test):
    """Rows of a test: what is said between its head and that of the next."""
    lines = said.split(f"\n{test} ")[1].splitlines()[1:]
    rows = {}
    for line in lines:
        name, *cells = line.split()
        if len(cells) != 4 or ":" in name:
            break
        rows[name] = list(map(float, cells))
    return rows


def test_the_page_on_super_resolution(folder):
    said = "\n" + ran("papers.super_resolution", "--run", folder, *SHORT, "--steps", 2)
    run = opened_run(folder, *SHORT)
    assert run.sampling == FILTERED
    images, labels = evaluated_images(run, COUNT)
    judge = Judge(kept_classifier(run), images, run.classes)
    content = load_checkpoint(folder / "papers" / "super-look" / "var.pt", "transformer")
    model = Looking(run)
    model.load_state_dict(content["model"])
    tables = {test: table_of(said, test) for test in super_resolution.TESTS}
    for test in ("none", "blur and noise 2", "JPEG 3"):
        assert list(tables[test]) == [
            "bicubic", "tokenizer", "zero-shot", "control", "prefix", "look", "wide"]
        torch.manual_seed(0)
        large = enlarged(degraded(images, super_resolution.TESTS[test]))
        latent, tokens = run.encode(large)
        made = {"bicubic": large, "tokenizer": run.decode(tokens),
                "zero-shot": upscaled(run, latent),
                "look": upscaled(replace(run, model=model.eval()), latent)}
        for name, result in made.items():
            found = judge(result, labels)
            decibels = 10 * np.log10(4 / (result - images).square().mean().item())
            assert tables[test][name] == pytest.approx(
                [decibels, 100 * found.recognised, 100 * found.recall, found.frechet], abs=0.006)

    def gained(name, *tests):
        return sum(tables[test][name][0] - tables[test]["control"][0] for test in tests)

    both = tables["blur and noise 2"]
    figures = [both["prefix"][0] - both["control"][0], both["prefix"][1] - both["control"][1],
               both["look"][0] - both["tokenizer"][0], both["wide"][0] - both["look"][0]]
    for claim, figure in zip(super_resolution.CLAIMS, figures):
        measured = said.split(f"claim: {claim.text}\n")[1].split()[1].rstrip(":")
        assert float(measured) == pytest.approx(figure, abs=0.011)
    assert Image.open(folder / "papers" / "super_resolution.png").size[0] > 500


def test_what_is_claimed_of_super_resolution(folder, monkeypatch):
    """Of figures that are given."""
    def measure(run, steps, count):
        rows = {}
        for i, test in enumerate(super_resolution.TESTS):
            dB = {"control": 10.0 + i, "look": 11.0 + i, "wide": 12.0 + 2 * i, "prefix": 10.5 + i,
                  "tokenizer": 9.75 + i}
            rows[test] = {name: [x, 2 * x**2, 0.0, 0.0] for name, x in dB.items()}
        return rows, Image.new("L", (1, 1))

    monkeypatch.setattr(super_resolution, "measure", measure)
    said = ran("papers.super_resolution", "--run", folder, *SHORT)
    figures = [float(said.split(f"claim: {claim.text}\n")[1].split()[1].rstrip(":"))
               for claim in super_resolution.CLAIMS]
    assert figures == pytest.approx([   # blur and noise 2 is the second test
        0.5, 2 * (11.5**2 - 11**2), 12 - 10.75, 14 - 12, 2 / (5 + 7), 2 / (8 + 9)], abs=1e-4)
