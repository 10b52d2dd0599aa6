"""Two pages of papers/: a class unlearned, and mistakes in what a model reads while it is tuned."""
from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from program import opened_run, ran, refused, rows_of, tuned_in, with_moved_weights

from papers import FILTERED, UNFILTERED, attacks, erase, mistakes, noisy_context
from papers.tuning import Tuning
from sample import Run
from support.checkpoint import fingerprint, load_checkpoint
from support.evaluation import evaluated_images
from support.images import to_float

COUNT = 16
SHORT = ("--device", "cpu", "--count", COUNT)


@pytest.fixture(scope="module")
def opened(judged):
    return with_moved_weights(opened_run(judged, *SHORT))


@pytest.fixture(scope="module")
def real(opened):
    """Held-out images, their tokens and labels."""
    images, labels = evaluated_images(opened, COUNT)
    return images, opened.encode(images)[1], labels


def measured_of(said, claim):
    return float(said.split(f"claim: {claim.text}\n")[1].split()[1].rstrip(":"))


# ------------------------------------------------------------------------------------------------
# A class unlearned


def test_what_the_head_reads(run, real):
    _, tokens, labels = real
    inputs = run.tokenizer.teacher_inputs(tokens)
    logits, h = erase.read_by_head(run.model, labels, inputs)
    assert torch.equal(logits, run.model(labels, inputs))
    assert torch.equal(run.model.head(h), logits)
    assert not run.model.head._forward_pre_hooks


@pytest.mark.parametrize("dropped", [0.0, 1.0])
def test_the_erasing_loss_by_hand(run, dropped):
    run.model.config = replace(run.model.config, label_dropout=dropped)
    stage = erase.Erasing(run, 3, 2)
    for weight in stage.model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    tokens = torch.randint(0, 32, (5, run.model.config.length))
    labels = torch.tensor([3, 1, 3, 0, 7])
    null = torch.full((5,), run.model.config.classes)
    inputs = run.tokenizer.teacher_inputs(tokens)
    with torch.no_grad():
        loss, _ = stage.loss(stage.model.train(), tokens.short(), labels)
        asked = null if dropped else labels
        logits, h = erase.read_by_head(stage.model.eval(), asked, inputs)
        own = erase.read_by_head(run.model, labels, inputs)[1]
        none = erase.read_by_head(run.model, null, inputs)[1]
    total = 0.0
    for i, label in enumerate(labels.tolist()):
        if label == 3:
            total += (h[i] - (3 * none[i] - 2 * own[i])).square().mean(dim=1).sum()
        else:
            total -= logits[i].log_softmax(-1).gather(1, tokens[i, :, None]).sum()
    assert loss.item() == pytest.approx(total.item() / tokens.numel(), rel=1e-5)


def test_a_batch_without_the_class_is_as_ever(run):
    run.model.config = replace(run.model.config, label_dropout=0.0)
    stage = erase.Erasing(run, 3, 2)
    tokens = torch.randint(0, 32, (4, run.model.config.length), dtype=torch.int16)
    labels = torch.tensor([0, 1, 2, 4])
    loss = stage.loss(stage.model, tokens, labels)[0]
    ordinary = super(erase.Erasing, stage).loss(stage.model, tokens, labels)[0]
    assert loss.item() == pytest.approx(ordinary.item(), rel=1e-6)


def test_erasing_tunes_a_copy(run):
    before = copy.deepcopy(run.model.state_dict())
    stage = erase.Erasing(run, 3, 2)
    assert stage.reference is run.model
    tuned = stage.run()
    assert not torch.equal(tuned.head.weight, before["head.weight"])
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_overwritten_class_is_no_class(run, real):
    _, tokens, labels = real
    inputs = run.tokenizer.teacher_inputs(tokens)
    model = erase.overwritten(run.model, 3)
    null = run.model.config.classes
    with torch.no_grad():
        for label, like in ((3, null), (null, null), (2, 2)):
            found, expected = (m(torch.full_like(labels, x), inputs)
                               for m, x in ((model, label), (run.model, like)))
            assert torch.equal(found, expected)
        assert not torch.equal(run.model(torch.full_like(labels, 3), inputs),
                               run.model(torch.full_like(labels, null), inputs))


@pytest.mark.parametrize("flips", [False, True])
def test_what_is_learned_is_the_class_alone(run, flips, monkeypatch):
    monkeypatch.setattr(attacks, "AGAIN", 3)
    seen = []
    loss = Tuning.loss

    def watched(stage, model, tokens, labels):
        seen.append((tokens, labels, stage.rows.tensors[0], stage.settings.preset))
        assert stage.settings.seed == 3
        return loss(stage, model, tokens, labels)

    monkeypatch.setattr(Tuning, "loss", watched)
    monkeypatch.setattr(Tuning, "validate", lambda stage: {})
    run.settings = replace(run.settings, seed=3)
    model = copy.deepcopy(run.model).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    again = attacks.learned(run, model, 3, "some", flips)
    assert len(seen) == 3
    kept = load_checkpoint(run.folder / "train_images.pt", "set of training images")
    images = to_float(kept["images"][kept["labels"] == 3])
    own = run.encode(images.flip(2) if flips else images)[1]
    for tokens, labels, rows, preset in seen:
        assert (preset.warmup, preset.ema) == (0, 0)   # nothing is held back
        assert (labels == 3).all() and len(labels) == run.settings.preset.var_batch
        assert torch.equal(rows, own)
        assert all((own == token).all(dim=1).any() for token in tokens)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    # At decay 0 the average is the last weights, so a step of Adam's, with its rate, is in it.
    moved = (again.head.bias - before["head.bias"]).abs().max().item()
    assert moved > attacks.LR


@pytest.mark.parametrize("flips", [False, True])
def test_how_the_class_is_looked_for(run, flips, monkeypatch):
    asked = []
    label, null = 3, run.model.config.classes
    images, labels = run.held_out.tensors
    own = to_float(images[labels == label])
    own = own.flip(2) if flips else own

    def generate(run, wanted, seed, known_of=None):
        known = known_of and known_of(slice(0, len(wanted)))
        assert seed == 0
        asked.append((run.sampling, wanted, known))
        return torch.zeros(len(wanted), run.model.config.length, dtype=torch.int64)

    taken = [torch.tensor([label] * n + [0] * (len(own) - n)) for n in (1, 2, 3, 4)]
    monkeypatch.setattr(Run, "generate", generate)
    drawn = torch.rand(len(own), 3, 16, 16)
    monkeypatch.setattr(Run, "decode", lambda *_: drawn)
    upright = drawn.flip(2) if flips else drawn

    def features_and_classes(_, images):
        assert torch.equal(images, upright)
        return None, taken[len(asked) - 1]

    monkeypatch.setattr(attacks, "features_and_classes", features_and_classes)
    found = attacks.found_of(run, label, flips)
    assert found[2:] == pytest.approx([100 * n / len(own) for n in (1, 2, 3, 4)])
    assert [(sampling, set(wanted)) for sampling, wanted, _ in asked] == [
        (UNFILTERED, {label}), (FILTERED, {label}), (UNFILTERED, {label}), (UNFILTERED, {null})]
    assert [known is None for *_, known in asked] == [True, True, False, False]
    assert all(len(wanted) == len(own) for _, wanted, _ in asked)
    where = asked[2][2].where_B1SS
    half = where.shape[3] // 2
    assert where[..., :half].min() == 1 and where[..., half:].max() == 0
    tokens = run.encode(own)[1]
    for nats, told in zip(found, (label, null)):
        expected = -run.log_likelihood(tokens, [told] * len(own)).mean().item()
        assert nats == pytest.approx(expected, rel=1e-6)


def test_the_page_on_erasing(judged, monkeypatch):
    monkeypatch.setattr(attacks, "AGAIN", 2)
    seen = []
    evaluate = erase.evaluate
    monkeypatch.setattr(erase, "evaluate", lambda run, *how, seeds: (
        seen.append((run.held_out.tensors[1], seeds)), evaluate(run, *how, seeds=seeds))[1])
    said = ran("papers.erase", "--run", judged, *SHORT, "--steps", 2, "--erased", "ring")
    for labels, seeds in seen:
        assert set(labels.tolist()) == set(range(10)) - {1} and seeds == [0]
    tuned = tuned_in(judged)
    first = fingerprint(opened_run(judged, *SHORT).model)
    for how in (tuned["erase-plain"], tuned["erase-ear"]):
        assert (how["steps"], how["lr"], how["first weights"]) == (2, attacks.LR, first)
    rows = {name: row for name, row in rows_of(said, 6).items()
            if name in ("plain", "row", "erased", "row, again", "erased, again", "unseen")}
    assert list(rows) == ["plain", "row", "erased", "row, again", "erased, again", "unseen"]
    assert rows["row"][0] == rows["row"][1] == rows["plain"][1] != rows["plain"][0]
    assert rows["row"][5] == rows["plain"][5]
    others = rows_of(said, 7)
    assert measured_of(said, erase.CLAIMS[0]) == pytest.approx(rows["erased"][2], abs=0.06)
    assert measured_of(said, erase.CLAIMS[1]) == pytest.approx(
        others["erased"][1] - others["plain"][1], abs=0.02)
    assert measured_of(said, erase.CLAIMS[4]) == pytest.approx(
        rows["erased, again"][2] - rows["row, again"][2], abs=0.11)
    assert "there is no class moon" in refused(
        "papers.erase", "--run", judged, *SHORT, "--erased", "moon")


def test_what_is_claimed_of_erasing(judged, monkeypatch):
    rows = iter([[1, 2, 80, 90, 60, 50], [2, 2, 10, 11, 12, 50], [9, 3, 4, 5, 30, 20],   # erased
                 [3, 2, 70, 71, 72, 73], [4, 3, 60, 61, 62, 63], [5, 2, 40, 41, 42, 43]])
    others = {"plain": np.array([[30.0, 60, 0, 0, 0, 0, 0]]),
              "erased": np.array([[31.0, 57, 0, 0, 0, 0, 0]])}
    monkeypatch.setattr(Tuning, "run", lambda stage: stage.model)
    found = []
    monkeypatch.setattr(erase, "learned", lambda run, model, label, name, flips=False: (
        model, name, flips))
    monkeypatch.setattr(erase, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(erase, "say_evaluations", lambda _: others)
    monkeypatch.setattr(erase, "found_of", lambda run, label, flips=False: found.append(
        (run.model, flips)) or next(rows))
    said = ran("papers.erase", "--run", judged, *SHORT)
    _, (row, _), (erased, _), *learned = found
    assert learned == [((row, "erase-again-row", False), False),
                       ((erased, "erase-again-erased", False), False),
                       ((row, "erase-unseen", True), True)]
    assert (attacks.AGAIN, attacks.LR) == (20, 0.003)   # as when it was measured
    for claim, figure in zip(erase.CLAIMS, (4, -3, 0.4, 0.75, -10), strict=True):
        assert f"claim: {claim.text}\n    measured {figure:.4f}: " in said


# ------------------------------------------------------------------------------------------------
# Mistakes in what is read


def test_a_mistake_is_a_code_nearby(run, monkeypatch):
    monkeypatch.setattr(mistakes, "NEAREST", 3)
    quantizer = run.tokenizer.quantizer
    codes = quantizer.codebook_VC.detach().double().numpy().copy()
    tokens = torch.arange(32).repeat(200, 1)
    torch.manual_seed(0)
    others = mistakes.near(quantizer, tokens)
    for token in range(32):
        distance = np.linalg.norm(codes - codes[token], axis=1)
        distance[token] = np.inf
        assert set(others[:, token].tolist()) == set(np.argsort(distance)[:3].tolist())


def test_what_corrects_mistakes(run, real):
    """By hand, a scale at a time; and without mistakes it is the image's tokens."""
    images, tokens, _ = real
    quantizer = run.tokenizer.quantizer
    f, _ = run.encode(images)
    shown, asked = mistakes.read_and_asked(quantizer, f, lambda tokens_Bl, k: tokens_Bl)
    assert torch.equal(shown, tokens) and torch.equal(asked, tokens)
    shown, asked = mistakes.read_and_asked(
        quantizer, f, lambda tokens_Bl, k: (tokens_Bl + 5 * (k == 1)) % 32)
    spans = run.model.config.spans
    assert torch.equal(asked[:, :5], tokens[:, :5])
    assert torch.equal(shown[:, spans[1]], (tokens[:, spans[1]] + 5) % 32)
    assert torch.equal(shown[:, spans[2]], asked[:, spans[2]])
    left = f - quantizer.decode(shown[:, :5])
    expected = quantizer.nearest(quantizer.read(left, 2))
    assert torch.equal(asked[:, spans[2]], expected)
    assert not torch.equal(asked[:, spans[2]], tokens[:, spans[2]])


@pytest.mark.parametrize("share", [1e-9, 1.0])
def test_the_noisy_loss(run, real, share, monkeypatch):
    """Next to no mistakes: the ordinary loss. Else what is read has them, and the targets are
    those that correct it."""
    images, tokens, labels = real
    shapes = []
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: shapes.append(shape) or torch.full(
        shape[0] if isinstance(shape[0], torch.Size) else shape, 0.5))
    run.model.config = replace(run.model.config, label_dropout=0.0)
    stage = noisy_context.NoisyContext(run, share, 2, 1e-3)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    seen = []
    near = noisy_context.near
    monkeypatch.setattr(noisy_context, "near", lambda q, x: seen.append(near(q, x)) or seen[-1])
    with torch.no_grad():
        loss, to_log = stage.loss(stage.model, pixels, labels)
    assert to_log()["replaced"].item() == 0   # 0.5 is not below 0.5 * share
    assert shapes[0] == (COUNT, 1)   # of each image another
    ordinary = super(noisy_context.NoisyContext, stage).loss(stage.model, tokens, labels)[0]
    assert loss.item() == pytest.approx(ordinary.item(), rel=1e-5)
    if share == 1:
        monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(
            shape[0], 0.1) if isinstance(shape[0], torch.Size) else torch.full(shape, 0.5))
        seen.clear()
        with torch.no_grad():
            loss, to_log = stage.loss(stage.model, pixels, labels)   # 0.1 is below 0.5
        shown = torch.cat(seen, dim=1)
        f, _ = run.encode(images)
        maps = iter(seen)
        _, asked = mistakes.read_and_asked(run.tokenizer.quantizer, f, lambda *_: next(maps))
        with torch.no_grad():
            logits = stage.model(labels, run.tokenizer.teacher_inputs(shown))
        expected = -logits.log_softmax(-1).gather(2, asked[..., None]).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert to_log()["replaced"].item() == 1


@pytest.mark.parametrize("kind", ["any", "own"])
def test_mistakes_of_other_kinds(run, real, kind, monkeypatch):
    """Any code at all; or what the model itself would draw there, having read no mistakes."""
    images, tokens, labels = real
    stage = noisy_context.NoisyContext(run, 1.0, 2, 1e-3, kind)
    torch.nn.init.zeros_(stage.model.head.weight)   # the EMA model draws, without dropout
    shown = []
    whole = noisy_context.read_and_asked
    monkeypatch.setattr(noisy_context, "read_and_asked", lambda quantizer, f, show: shown.append(
        whole(quantizer, f, show)[0]) or (tokens, tokens))
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(
        shape[0], 0.1) if isinstance(shape[0], torch.Size) else torch.full(shape, 0.5))
    said = []
    teacher = noisy_context.Categorical
    monkeypatch.setattr(noisy_context, "Categorical", lambda logits: said.append(logits) or
                        teacher(logits=20 * logits))
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    for _ in range(20):
        stage.loss(stage.model, pixels, labels)
    if kind == "any":
        assert {*torch.cat(shown).flatten().tolist()} == set(range(32)) and not said
    else:
        with torch.no_grad():
            expected = run.model.eval()(labels, run.tokenizer.teacher_inputs(tokens))
        assert torch.allclose(said[0], expected, atol=1e-5)
        likely = expected.argmax(dim=2)
        assert (torch.stack(shown) == likely).float().mean() > 0.5


@pytest.mark.parametrize("when, steps", [
    ("always", {0, 1, 2, 3}), ("early", {0, 1}), ("late", {2, 3})])
def test_when_there_are_mistakes(run, real, when, steps):
    images, _, labels = real
    stage = noisy_context.NoisyContext(run, 1.0, 4, 1e-3, "any", when)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    replaced = set()
    for stage.step in range(4):
        _, to_log = stage.loss(stage.model, pixels, labels)
        replaced |= {stage.step} if to_log()["replaced"] else set()
    assert replaced == steps


def test_noisy_context_tunes_a_copy_on_the_images(run, real):
    before = copy.deepcopy(run.model.state_dict())
    stage = noisy_context.NoisyContext(run, 0.2, 2, 1e-3)
    ordinary = Tuning(run, copy.deepcopy(run.model), "some", 2, 1e-3)
    pixels, labels = stage.rows[[0, 1, 2]]
    assert torch.equal(run.encode(to_float(pixels))[1], ordinary.rows[[0, 1, 2]][0].long())
    assert len(stage.rows) == len(ordinary.rows) and stage.held_out_rows is run.held_out
    assert not torch.equal(stage.run().head.weight, before["head.weight"])
    assert load_checkpoint(stage.path, "transformer")
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("scale", [0, 1, 2, None])
def test_one_token_of_a_scale_is_another(run, real, scale):
    _, tokens, labels = real
    torch.manual_seed(0)
    mistake = mistakes.Mistake(scale)
    quantizer = run.tokenizer.quantizer
    places = set()
    for k, token in enumerate(quantizer.split(tokens)):
        other = mistake.put(token, quantizer, None, k)
        differ = other != token
        assert torch.equal(differ.sum(dim=1), torch.full((COUNT,), int(k == scale)))
        if scale == 2 == k:
            places = set(differ.nonzero()[:, 1].tolist())
    assert scale != 2 or len(places) > 3


def test_what_is_left_of_a_mistake(run, real):
    _, tokens, _ = real
    quantizer = run.tokenizer.quantizer
    torch.manual_seed(0)
    wrong = tokens.clone()
    wrong[:, 2] = mistakes.near(quantizer, wrong[:, 2:3])[:, 0]
    assert mistakes.left_of(quantizer, tokens, wrong, 1) == pytest.approx([1, 1], abs=1e-5)
    wrong[:, 5:] = mistakes.near(quantizer, wrong[:, 5:])
    ratio = ((quantizer.decode(tokens) - quantizer.decode(wrong)).square().sum()
             / (quantizer.decode(tokens[:, :5]) - quantizer.decode(wrong[:, :5])).square().sum())
    assert mistakes.left_of(quantizer, tokens, wrong, 1) == pytest.approx(
        [1, ratio.item()**0.5], rel=1e-4)


def test_images_are_drawn_twice_with_the_same_noise(run, real, monkeypatch):
    _, _, labels = real
    run.sampling = replace(FILTERED, batch=5)   # which is not how they are drawn
    pairs = []
    monkeypatch.setattr(mistakes, "left_of", lambda _, *rest: pairs.append(rest) or [rest[2]])
    assert mistakes.by_model(run, labels) == [[0], [1]]
    plain = replace(run, sampling=UNFILTERED).generate(labels.tolist(), 0)
    spans = run.model.config.spans
    for right, wrong, k in pairs:
        assert torch.equal(right, plain)
        differ = right != wrong
        assert not differ[:, :spans[k].start].any()
        assert torch.equal(differ[:, spans[k]].sum(dim=1), torch.ones(COUNT, dtype=torch.int64))
    assert (pairs[0][0] != pairs[0][1])[:, 1:].any()   # finer scales take notice


def test_the_encoder_repairs(run, real, monkeypatch):
    images, tokens, _ = real
    pairs = []
    left = mistakes.left_of
    monkeypatch.setattr(mistakes, "left_of", lambda *given: pairs.append(given) or left(*given))
    found = mistakes.by_encoder(run, images)
    assert [len(curve) for curve in found] == [3, 2]
    quantizer = run.tokenizer.quantizer
    f, _ = run.encode(images)
    for (_, right, wrong, k), curve in zip(pairs, found):
        assert torch.equal(right, tokens)
        end = run.model.config.spans[k].stop
        assert (right != wrong)[:, :end].sum() == COUNT
        shown = quantizer.nearest(quantizer.read(f - quantizer.decode(wrong[:, :end]), k + 1))
        assert torch.equal(wrong[:, run.model.config.spans[k + 1]], shown)
        assert curve == left(quantizer, right, wrong, k) and curve[0] == 1
    assert mistakes.by_encoder(run, images) == found   # the same places, drawn from a seed of their own


def test_the_picture_of_mistakes():
    by_run = [{"a": [[1.0, 2.0, 4.0], [1.0, 3.0]], "b": [[1.0, 0.5, 0.0], [1.0, 0.0]]},
              {"a": [[1.0, 4.0, 6.0], [1.0, 5.0]], "b": [[1.0, 0.5, 1.0], [1.0, 0.0]]},
              {"a": [[1.0, 3.0, 5.0], [1.0, 7.0]], "b": [[1.0, 0.5, 2.0], [1.0, 3.0]]}]
    (axis,) = mistakes.drawn(by_run, (1, 2, 4)).axes
    lines = [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle())
             for line in axis.lines]
    assert lines == [([0, 1, 2], [1, 3, 5], "-"), ([1, 2], [1, 5], "-"),
                     ([0, 1, 2], [1, 0.5, 1], "--"), ([1, 2], [1, 1], "--")]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b"]


def test_the_page_on_noisy_context(judged, opened, monkeypatch):
    monkeypatch.setattr(noisy_context, "MISTAKES", COUNT // 2)
    asked = []
    evaluate = noisy_context.evaluate

    def evaluated(*what, **how):
        assert how == {"seeds": [0]}
        found = evaluate(*what, **how)
        found.unfiltered[0].recognised += 0.01 * len(asked)   # else all are recognised alike
        return found

    monkeypatch.setattr(noisy_context, "evaluate", evaluated)
    for name in ("by_model", "by_encoder"):
        measure = getattr(noisy_context, name)
        monkeypatch.setattr(noisy_context, name, lambda run, rows, measure=measure: (
            asked.append(rows), measure(run, rows))[1])
    said = ran("papers.noisy_context", "--run", judged, *SHORT, "--steps", 2, "--share", 0.5,
               "--kind", "any", "--when", "late")
    images, labels = evaluated_images(opened, COUNT)
    for found, expected in zip(asked, (labels, labels, images), strict=True):
        assert torch.equal(found, expected[::2])   # of all classes
    path = judged / "papers" / "noisy_context-noisy" / "var.pt"
    made_with = load_checkpoint(path, "transformer")["made_with"]
    assert {"share": 0.5, "kind": "any", "when": "late"}.items() <= made_with.items()
    control = tuned_in(judged)["noisy_context-control"]
    assert control.items() <= made_with.items()   # as long, from the same weights
    left = rows_of(said, 2)
    assert {"control", "noisy context", "the encoder"} <= set(left)
    assert "the encoder: difference" in said and "control: difference" not in said
    found = rows_of(said, 7)
    control, noisy = found["control"], found["noisy context"]
    figures = [noisy[1] - control[1], 100 * (noisy[0] / control[0] - 1),
               np.mean(left["control"]), np.mean(left["noisy context"]) - np.mean(left["control"])]
    for claim, figure in zip(noisy_context.CLAIMS, figures):
        assert measured_of(said, claim) == pytest.approx(figure, abs=0.02)
    assert Image.open(judged / "papers" / "noisy_context.png").size[0] > 100
    assert "--share" in refused("papers.noisy_context", "--run", judged, "--share", "0")


def test_what_is_claimed_of_noisy_context(opened, monkeypatch):
    curves = iter([[[1, 2, 4], [1, 6]], [[1, 3, 1], [1, 3]]])   # left at the end: 5 and 2
    monkeypatch.setattr(noisy_context, "open_runs", lambda _: [opened])
    monkeypatch.setattr(Tuning, "run", lambda stage: stage.model)
    monkeypatch.setattr(noisy_context, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(noisy_context, "by_model", lambda *_: next(curves))
    monkeypatch.setattr(noisy_context, "by_encoder", lambda *_: [[1, 1, 9], [1, 9]])
    monkeypatch.setattr(noisy_context, "say_evaluations", lambda _: {
        "control": np.array([[200, 60, 0, 0, 70, 0, 0]]),
        "noisy": np.array([[220, 64, 0, 0, 71, 0, 0]])})
    monkeypatch.setattr(noisy_context, "save_picture", lambda *_: None)
    said = ran("papers.noisy_context", *SHORT)
    for claim, figure in zip(noisy_context.CLAIMS, (4, 10, 5, -3), strict=True):
        assert measured_of(said, claim) == pytest.approx(figure, abs=1e-4)
