"""A page of papers/: all tokens from noise, in one pass or in two."""
from __future__ import annotations

import copy
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from program import copied_run, opened_run, ran, refused, rows_of, with_moved_weights

from kernels import sample_tokens
from papers import one_pass, student
from papers.student import Distilling, Student, read_by_pass
from support.checkpoint import load_checkpoint
from support.evaluation import Judge, evaluated_images, kept_classifier
from support.images import grid, to_bytes

COUNT = 20
SHORT = ("--device", "cpu", "--count", COUNT)
KINDS = ("unread", "flow", "gumbel")
LABELS = torch.tensor([0, 3, 5, 5, 9])


@pytest.fixture(scope="module")
def folder(judged, tmp_path_factory):
    return copied_run(judged, tmp_path_factory.mktemp("one_pass") / "shapes")


@pytest.fixture(scope="module")
def opened(folder):
    return with_moved_weights(opened_run(folder, *SHORT))


def heeding(run, kind: str) -> Student:
    """A student that heeds the noise."""
    model = Student(run.model, run.tokenizer.quantizer.codebook_VC, kind).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(model.noise_embedding.weight, std=0.3)
    return model


# ------------------------------------------------------------------------------------------------
# What is read, and what is drawn


def test_what_is_read_is_what_was_drawn_before_the_pass(opened):
    quantizer = opened.tokenizer.quantizer
    torch.manual_seed(0)
    tokens = torch.randint(0, 32, (4, 21))
    all_passes = read_by_pass(quantizer, tokens, [0, 1, 2])
    assert torch.equal(all_passes[:, 1:], quantizer.teacher_inputs(tokens))
    assert not all_passes[:, 0].any()
    assert not read_by_pass(quantizer, tokens, [0]).any()
    two = read_by_pass(quantizer, tokens, [0, 1])
    first = quantizer.accumulate(quantizer.initial(4), tokens[:, :1], 0)
    assert not two[:, 0].any()
    assert torch.equal(two[:, 1:5], quantizer.read(first, 1))
    assert torch.equal(two[:, 5:], quantizer.read(first, 2))
    late = read_by_pass(quantizer, tokens, [0, 2])
    assert not late[:, :5].any() and torch.equal(late[:, 5:], all_passes[:, 5:])


@pytest.mark.parametrize("kind", KINDS)
def test_untuned_it_is_plain_var(opened, kind):
    model = Student(opened.model, opened.tokenizer.quantizer.codebook_VC, kind).eval()
    noise = model.noise(5)
    tokens, logits = model.drawn(opened.tokenizer.quantizer, LABELS, noise)
    with torch.no_grad():
        plain = opened.model(LABELS, opened.tokenizer.teacher_inputs(tokens))
    assert torch.allclose(logits, plain, atol=1e-4)
    if kind != "flow":
        drawn = sample_tokens(logits, None, 0.0, 0, 1.0, (-noise).exp())
        assert torch.equal(tokens, drawn)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("starts", [[0], [0, 1], [0, 2], [0, 1, 2]])
def test_drawing_says_what_teaching_says(opened, kind, starts):
    model = heeding(opened, kind)
    noise = model.noise(5)
    model.starts = starts
    tokens, logits = model.drawn(opened.tokenizer.quantizer, LABELS, noise)
    read = read_by_pass(opened.tokenizer.quantizer, tokens, starts)
    with torch.no_grad():
        taught = model(LABELS, read, noise)
    assert torch.allclose(logits, taught, atol=1e-4)
    assert torch.equal(tokens, model.by_noise(logits, noise))
    others, _ = model.drawn(opened.tokenizer.quantizer, LABELS, model.noise(5))
    assert not torch.equal(tokens, others)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_heeded_by_its_own_scale_and_finer_ones(opened, kind):
    model = heeding(opened, kind)
    noise = model.noise(5)
    read = torch.zeros(5, 21, 8)
    for place, own in ((0, slice(0, 1)), (3, slice(1, 5)), (12, slice(5, 21))):
        other = noise.clone()
        other[:, place] = model.noise(5)[:, place]
        with torch.no_grad():
            moved = (model(LABELS, read, noise) != model(LABELS, read, other)).any(dim=2)
        assert not moved[:, :own.start].any()
        assert moved[:, own.start:].all() == (kind != "unread")
        assert moved[:, own.start:].any() == (kind != "unread")
    torch.nn.init.zeros_(model.noise_embedding.weight)
    with torch.no_grad():   # nothing else of it is read
        assert torch.equal(model(LABELS, read, noise), model(LABELS, read, model.noise(5)))


# ------------------------------------------------------------------------------------------------
# From noise to a token


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_drawn_as_often_as_is_likely(opened, kind):
    model = Student(opened.model, opened.tokenizer.quantizer.codebook_VC, kind).eval()
    torch.manual_seed(0)
    logits = 2 * torch.randn(32)
    noise = model.noise(1000).flatten(0, 1)[None, :20_000]
    assert noise.shape[2] == (8 if kind == "flow" else 32)
    tokens = model.by_noise(logits.expand(1, 20_000, -1), noise)
    share = tokens[0].bincount(minlength=32) / 20_000
    chance = logits.softmax(dim=0)
    by_luck = (chance * (1 - chance) / 20_000).sqrt().sum()
    assert (share - chance).abs().sum() < (6 if kind == "flow" else 1.2) * by_luck


def test_the_flow_by_hand(opened):
    """With |x - t e|^2, a place at a time, in fp64."""
    model = Student(opened.model, opened.tokenizer.quantizer.codebook_VC, "flow").eval()
    codes = model.codes_VC.double().numpy()
    book = opened.tokenizer.quantizer.codebook_VC.detach().double().numpy()
    expected = (book - book.mean(axis=0)) / book.std(axis=0, ddof=1)
    assert np.allclose(codes, expected, atol=1e-4)
    torch.manual_seed(0)
    noise = model.noise(3)
    logits = 2 * torch.randn(3, 21, 32)
    tokens = model.by_noise(logits, noise)
    same = 0
    for b in range(3):
        for i in range(21):
            x = noise[b, i].double().numpy()
            log_p = logits[b, i].double().log_softmax(dim=0).numpy()
            for n in range(student.FLOW_STEPS):
                t = n / student.FLOW_STEPS
                w = np.exp(log_p - ((x - t * codes)**2).sum(axis=1) / (2 * (1 - t)**2))
                w /= w.sum()
                x = x + (w @ codes - x) / (1 - t) / student.FLOW_STEPS
            same += w.argmax() == tokens[b, i].item()
            assert np.abs(x - w @ codes).max() < 1e-9   # the last step arrives
    assert same >= 62   # of 63


def test_noise_that_is_alike_flows_to_codes_that_are_alike(opened):
    """Of Gumbel noise that cannot be said."""
    torch.manual_seed(0)
    logits = torch.zeros(1, 500, 32)
    apart = {}
    for kind in ("flow", "gumbel"):
        model = Student(opened.model, opened.tokenizer.quantizer.codebook_VC, kind).eval()
        noise = model.noise(24).flatten(0, 1)[None, :500]
        near, far = (noise + 0.1 * torch.randn_like(noise), noise.roll(1, dims=1))
        own, *others = (model.codes_VC[model.by_noise(logits, x)] for x in (noise, near, far))
        apart[kind] = [(x - own).square().mean().item() for x in others]
    near, far = apart["flow"]
    assert near < 0.2 * far


# ------------------------------------------------------------------------------------------------
# Distilling


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drawn, second", [(-1, 0), (0, 0), (1, 1), (2, 2)])
def test_the_loss_by_hand(run, kind, drawn, second, monkeypatch):
    run.model.config.__dict__["label_dropout"] = 1.0   # which would make all classes one
    stage = Distilling(run, kind, 1, 1e-3)
    model = heeding(run, kind).train()
    asked = []
    monkeypatch.setattr(torch, "randint", lambda low, high, size: asked.append(
        (low, high)) or torch.tensor(drawn))
    torch.manual_seed(7)
    with torch.no_grad():
        loss, to_log = stage.loss(model, None, LABELS)
    assert asked == [(-2, 3)]
    torch.manual_seed(7)
    noise = model.noise(5)
    tokens, own = stage.teacher.drawn(run.tokenizer.quantizer, LABELS, noise)
    read = read_by_pass(run.tokenizer.quantizer, tokens, [0, second])
    with torch.no_grad():
        its = model.eval()(LABELS, read, noise).log_softmax(dim=2)
    own = own.log_softmax(dim=2)
    expected = (own.exp() * (own - its)).sum(dim=2)
    per_scale = [expected[:, x].mean().item() for x in (slice(0, 1), slice(1, 5), slice(5, 21))]
    assert loss.item() == pytest.approx(sum(per_scale) / 3, rel=1e-4)
    assert to_log()["loss_per_scale"].tolist() == pytest.approx(per_scale, rel=1e-4)


def test_nothing_is_lost_where_laws_are_the_same():
    logits = torch.randn(2, 3, 32)
    assert student.lost(logits, logits + 5).abs().max() < 1e-5
    assert (student.lost(logits, 2 * logits) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_distilling_tunes_a_copy(run, kind):
    before = copy.deepcopy(run.model.state_dict())
    stage = Distilling(run, kind, 2, 1e-2)
    assert not stage.teacher.training
    assert stage.ema(*stage.example()).shape == (1, 21, 32)   # of which operations are counted
    assert stage.validate() == {}
    tuned = stage.run()
    assert tuned.noise_embedding.weight.any() == (kind != "unread")
    for name, value in before.items():
        assert torch.equal(run.model.state_dict()[name], value)
        assert torch.equal(stage.teacher.state_dict()[name], value)
    assert not torch.equal(tuned.head.weight, before["head.weight"])


# ------------------------------------------------------------------------------------------------
# The page


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_of_the_same_noise(run, kind):
    run.sampling = replace(run.sampling, batch=3)
    teacher = Student(run.model, run.tokenizer.quantizer.codebook_VC, kind).eval()
    model = heeding(run, kind)
    own, lost, two, led = one_pass.from_same_noise(run, teacher, model, LABELS)
    torch.manual_seed(0)
    noise = torch.cat([model.noise(3), model.noise(2)])
    tokens, logits = teacher.drawn(run.tokenizer.quantizer, LABELS, noise)
    assert torch.equal(own, tokens) and len(two) == len(led) == 3
    for k, starts in enumerate(([0], [0, 1], [0, 2])):
        model.starts = starts
        drawn, its = model.drawn(run.tokenizer.quantizer, LABELS, noise)
        assert torch.equal(two[k], drawn)
        if k == 0:
            assert torch.equal(led[0], drawn)
            assert torch.allclose(lost, student.lost(logits, its), atol=1e-4)
        read = read_by_pass(run.tokenizer.quantizer, own, starts)
        with torch.no_grad():
            after = model.by_noise(model(LABELS, read, noise), noise)
        assert torch.equal(led[k], torch.cat([own[:, :(0, 1, 5)[k]], after[:, (0, 1, 5)[k]:]], 1))
    assert kind == "unread" or not torch.equal(led[2], own)


def measured_of(said, claim):
    return float(said.split(f"claim: {claim.text}\n")[1].split()[1].rstrip(":"))


def test_what_is_timed(run, monkeypatch):
    model = Student(run.model, run.tokenizer.quantizer.codebook_VC, "flow").eval()
    asked = []
    waited = []

    def drawn(_, labels, noise):
        asked.append((labels, noise))
        return SimpleNamespace(cpu=lambda: waited.append(len(labels))), None

    monkeypatch.setattr(model, "drawn", drawn)

    def repeat(draw, number, repeat, timer):
        assert timer is time.process_time and repeat > 1
        draw()
        return [9.0, number, 200.0]

    monkeypatch.setattr(one_pass, "repeat", repeat)
    assert one_pass.seconds(run, model) == [9, 1]
    assert waited == [1, 100]
    (label, alone), (labels, noise) = asked
    assert len(label) == len(alone) == 1 and len(labels) == len(noise) == 100
    assert labels.unique().tolist() == list(range(10))


def test_the_page_on_one_pass(folder, monkeypatch):
    monkeypatch.setattr(one_pass, "seconds", lambda _, model: [
        len(model.starts) + 2 * (model.kind == "flow"), len(model.starts)**2])
    shown = {}
    monkeypatch.setattr(one_pass, "grid", lambda rows: shown.update(
        {row.label: row.images for row in rows}) or grid(rows))
    flags = ("--run", folder, *SHORT, "--lr", 0.1, "--second", 1)
    said = ran("papers.one_pass", *flags, "--steps", 3)
    assert "unread, all passes: difference" not in said
    drawn = rows_of(said, 5)
    assert list(drawn)[:9] == [f"{kind}, {passes}" for kind in KINDS
                               for passes in ("all passes", "two passes", "one pass")]
    for name, row in list(drawn.items())[:9]:
        n = {"all": 3, "two": 2, "one": 1}[name.split()[1]]
        assert row[3:] == pytest.approx([(n + 2 * ("flow" in name)) / 3, n * n / 9], abs=0.006)
    run = opened_run(folder, *SHORT)
    images, labels = evaluated_images(run, COUNT)
    judge = Judge(kept_classifier(run), images, run.classes)
    by_scale = {name: row for name, row in rows_of(said, 3).items() if ": " in name}
    assert len(by_scale) == 12
    frechet = {}   # to all digits: their differences are small
    for kind in KINDS:
        teacher = Student(run.model, run.tokenizer.quantizer.codebook_VC, kind).eval()
        model = copy.deepcopy(teacher)
        content = load_checkpoint(folder / "papers" / f"one_pass-{kind}" / "var.pt", "transformer")
        model.load_state_dict(content["model"])
        own, lost, two, led = one_pass.from_same_noise(run, teacher, model, labels)
        for name, tokens in (("all passes", own), ("two passes", two[1]), ("one pass", two[0])):
            images = run.decode(tokens)
            found = judge(images, labels)
            frechet[f"{kind}, {name}"] = found.frechet
            assert np.array_equal(shown[f"{kind}, {name}"], to_bytes(images)[::COUNT // 10])
            assert drawn[f"{kind}, {name}"][:3] == pytest.approx(
                [100 * found.recognised, 100 * found.recall, found.frechet], abs=0.006)
        recognised = {name: [100 * judge(run.decode(x), labels).recognised for x in tokens]
                      for name, tokens in (("second pass", two), ("teacher before", led))}
        same = 100 * (two[0] == own).float()
        spans = run.model.config.spans
        expected = recognised | {"same tokens %": same, "nats lost": lost}
        for name, values in expected.items():
            title = f"{kind}: {'recognised %, ' * (name in recognised)}{name}"
            if name not in recognised:
                values = [values[:, span].mean().item() for span in spans]
            assert by_scale[title] == pytest.approx(values, abs=0.006)
    own, one = (drawn[f"flow, {name}"] for name in ("all passes", "one pass"))
    figures = [one[0], drawn["unread, one pass"][0], one[3], one[0] - drawn["gumbel, one pass"][0],
               (frechet["flow, one pass"] - frechet["flow, two passes"])
               / (frechet["flow, one pass"] - frechet["flow, all passes"]),
               by_scale["flow: recognised %, teacher before"][1] - (one[0] + own[0]) / 2]
    for claim, figure in zip(one_pass.CLAIMS, figures, strict=True):
        assert measured_of(said, claim) == pytest.approx(figure, abs=0.02)
    with Image.open(folder / "papers" / "one_pass.png") as picture:
        assert picture.height > 9 * 16
    assert "--second 3 leaves nothing" in refused("papers.one_pass", *flags[:-1], 3)


def test_what_is_claimed_of_one_pass(opened, monkeypatch):
    """Of figures of which no two are as far apart as others."""
    ways = [(kind, way) for kind in KINDS for way in ("all passes", "two passes", "one pass")]
    drawn = {f"{kind}, {way}": [2.0**n, 0, 3.0**n, 0.5**n, 0]
             for n, (kind, way) in enumerate(ways)}
    by_scale = {"flow: recognised %, teacher before": [10, 20, 40]}
    monkeypatch.setattr(one_pass, "open_runs", lambda _: [opened])
    monkeypatch.setattr(one_pass, "measure", lambda *_: (drawn, by_scale, []))
    monkeypatch.setattr(one_pass, "grid", lambda rows: rows)
    monkeypatch.setattr(one_pass, "save_picture", lambda *_: None)
    said = ran("papers.one_pass", "--second", 1)
    won_back = (3**5 - 3**4) / (3**5 - 3**3)
    figures = [2**5, 2**2, 0.5**5, 2**5 - 2**8, won_back, 20 - (2**5 + 2**3) / 2]
    for claim, figure in zip(one_pass.CLAIMS, figures, strict=True):
        assert measured_of(said, claim) == pytest.approx(figure, abs=1e-4)
