"""Two pages of papers/: guidance trained into the weights, and edges as a second condition."""
from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from program import opened_run, ran, refused, rows_of, tuned_in

from papers import FILTERED, UNFILTERED, cca, control
from papers.tuning import Tuning
from support.checkpoint import fingerprint, load_checkpoint
from support.evaluation import Judge, evaluated_images, kept_classifier
from support.images import to_float


COUNT = 20
SHORT = ("--device", "cpu", "--count", COUNT)


@pytest.fixture(scope="module")
def opened(judged):
    return opened_run(judged, *SHORT)


@pytest.fixture(scope="module")
def real(opened):
    """Held-out images' tokens, labels and edges."""
    images, labels = evaluated_images(opened, 8)
    return opened.encode(images)[1], labels, control.edges_of(images)


# ------------------------------------------------------------------------------------------------
# Contrast


@pytest.mark.parametrize("weight", [0.5, 7.0])
def test_the_contrastive_loss_by_hand(weight):
    own = np.array([1.5, -40.0, 0.0, 3.0])
    other = np.array([20.0, -3.0, 0.5, 3.0])
    contrast = np.array([True, True, False, True])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))   # noqa: E731
    total = 0.0
    for r, r_other, is_contrast in zip(own, other, contrast):
        total -= np.log(sigmoid(cca.BETA * r))
        if is_contrast:
            total -= weight * np.log(1 - sigmoid(cca.BETA * r_other))
        else:
            total -= np.log(sigmoid(cca.BETA * r_other))
    expected = total / 4 / max(1, weight)
    tensors = map(torch.from_numpy, (own, other, contrast))
    assert cca.contrastive_loss(*tensors, weight).item() == pytest.approx(expected, rel=1e-12)


def test_log_likelihood_is_that_of_sample(run, real):
    tokens_NL, labels, _ = real
    inputs = run.tokenizer.teacher_inputs(tokens_NL)
    with torch.no_grad():
        ours = cca.log_likelihood(run.model, tokens_NL, labels, inputs)
    assert torch.allclose(ours, run.log_likelihood(tokens_NL, labels.tolist()), rtol=1e-5)


class Watched(torch.nn.Module):
    """A model that keeps which labels it is asked about, and is `more` sure of its tokens."""

    def __init__(self, model, more):
        super().__init__()
        self.model = model
        self.more = more
        self.seen = []

    def forward(self, labels, inputs):
        self.seen.append(labels.clone())
        return self.model(labels, inputs) * (1 + self.more)


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_what_is_contrasted(run, dropout, monkeypatch):
    run.model.config = replace(run.model.config, label_dropout=dropout)
    stage = cca.Contrast(run, 5.0, 3, 1e-2)
    asked = []
    monkeypatch.setattr(cca, "contrastive_loss",
                        lambda *arguments: asked.append(arguments) or torch.zeros(()))
    tuned = Watched(run.model, 0.1)
    stage.reference = Watched(run.model, 0.0)
    stage.reference.config = run.model.config
    labels = torch.tensor([3, 3, 1, 0] * 16)
    tokens = torch.randint(0, 32, (64, run.model.config.length), dtype=torch.int16)
    _, to_log = stage.loss(tuned, tokens, labels)
    (own, other, contrast, weight), = asked
    (seen,) = tuned.seen
    assert weight == 5 and to_log() == {"own": own.mean(), "other": other.mean()}
    assert torch.equal(seen, stage.reference.seen[0])
    first, second = seen.chunk(2)
    null = run.model.config.classes
    dropped = first == null
    assert torch.equal(dropped, second == null)
    assert dropped.float().mean().item() == pytest.approx(dropout, abs=0.25)
    assert torch.equal(first[~dropped], labels[~dropped])
    assert torch.equal(second[~dropped], labels.roll(-1)[~dropped])
    assert torch.equal(contrast, ~dropped & torch.tensor([False, True, True, True] * 16))
    inputs = run.tokenizer.teacher_inputs(tokens.long())
    with torch.no_grad():
        for r, labels_B in ((own, first), (other, second)):
            logits = run.model(labels_B, inputs)
            after, before = (
                (x * logits).log_softmax(-1).gather(2, tokens.long()[..., None]).sum((1, 2))
                for x in (1.1, 1.0))
            assert torch.allclose(r, after - before, atol=1e-3)


def test_contrast_tunes_a_copy(run):
    before = copy.deepcopy(run.model.state_dict())
    stage = cca.Contrast(run, 5.0, 2, 1e-2)
    assert stage.reference is run.model is not stage.model
    assert stage.model.config.label_dropout == 0   # the loss drops them itself, the same for both models
    for name, value in stage.ema.state_dict().items():
        assert torch.equal(value, before[name])
    tuned = stage.run()
    assert not torch.equal(tuned.head.weight, before["head.weight"])
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert run.model.config.label_dropout > 0   # guidance's null class is not lost by the copy


def test_recall_is_compared_with_that_of_guidance_recognised_as_well():
    rows = {
        "plain, cfg 0": [9.0, 60.0, 60.0, 0.0],
        "plain, cfg 4": [9.0, 90.0, 20.0, 0.0],
        "plain, cfg 2": [9.0, 80.0, 50.0, 0.0],   # not in order
        "CCA, lambda 1": [9.0, 70.0, 55.0, 0.0],   # 5 over 50
        "CCA, lambda 9": [9.0, 95.0, 19.0, 0.0],   # recognised best: 1 under 20
        "plain, default": [9.0, 75.0, 0.0, 0.0],
        "CCA, default but cfg 0": [9.0, 75.0, 0.0, 0.0],
    }
    rows = {name: np.array(row) for name, row in rows.items()}
    assert cca.recall_beside(rows) == pytest.approx(2.0)
    assert cca.curve(rows, "CCA, lambda").tolist() == [[70, 95], [55, 19]]


def test_what_is_evaluated(run, monkeypatch):
    """With which guidance and filters, and of that which figures: 0 to 3, or those that are
    filtered."""
    monkeypatch.setattr(Tuning, "run", lambda stage: (
        stage.steps, stage.settings.preset.var_lr) == (3, 0.01) and stage.settings.out.name)
    monkeypatch.setattr(cca, "evaluate", lambda part, count, seeds: seeds == [0] and part)
    monkeypatch.setattr(cca, "figures_of", lambda part: [
        (part.model, part.sampling.cfg, part.sampling.top_p, i) for i in range(7)])
    rows = cca.study(run, (1, 20), 3, 1e-2, COUNT)
    found = {name: list(map(tuple, row.tolist())) for name, row in rows.items()}
    unfiltered = lambda *kind: [tuple(map(str, (*kind, i))) for i in (0, 1, 2, 3)]   # noqa: E731
    filtered = lambda *kind: [tuple(map(str, (*kind, i))) for i in (0, 4, 5, 6)]   # noqa: E731
    cfg, top_p = FILTERED.cfg, FILTERED.top_p
    assert found == {
        "plain, cfg 0": unfiltered("cca-plain", cfg, top_p),
        **{f"plain, cfg {x:g}": filtered("cca-plain", x, 1.0) for x in (0.5, 1.0, 2.0, 4.0)},
        "CCA, lambda 1": unfiltered("cca-1", 0.0, top_p),
        "CCA, lambda 20": unfiltered("cca-20", 0.0, top_p),
        "plain, default": filtered("cca-plain", cfg, top_p),
        "CCA, default but cfg 0": filtered("cca-20", 0.0, top_p),
    }


def test_the_page_on_contrast(judged, monkeypatch):
    monkeypatch.setattr(cca, "GUIDANCE", (0.5, 2.0))
    said = ran("papers.cca", "--run", judged, *SHORT, "--steps", 2, "--weights", "1,20",
               "--lr", "0.02")
    rows = rows_of(said, 4)
    assert list(rows) == [
        "plain, cfg 0", "plain, cfg 0.5", "plain, cfg 2",
        "CCA, lambda 1", "CCA, lambda 20", "plain, default", "CCA, default but cfg 0"]
    assert rows["plain, cfg 0"][0] == rows["plain, default"][0]
    assert rows["CCA, lambda 20"][0] == rows["CCA, default but cfg 0"][0] != rows["plain, cfg 0"][0]
    for claim in cca.CLAIMS:
        assert f"claim: {claim.text}\n" in said
    assert f"measured {rows['CCA, lambda 20'][1] - rows['plain, cfg 0'][1]:.4f}" in said
    assert f"measured {rows['CCA, lambda 20'][1] - rows['plain, cfg 2'][1]:.4f}" in said
    model = opened_run(judged, *SHORT).model
    for name, dropout in (("plain", model.config.label_dropout), ("1", 0.0), ("20", 0.0)):
        model.config = replace(model.config, label_dropout=dropout)
        how = tuned_in(judged)[f"cca-{name}"]   # as long, and from the same weights
        assert (how["steps"], how["lr"], how["first weights"]) == (2, 0.02, fingerprint(model))
    assert Image.open(judged / "papers" / "cca.png").size[0] > 100
    assert "--weights" in refused("papers.cca", "--run", judged, "--weights", "1,-2")


def test_what_is_claimed_and_shown_of_contrast(judged, opened, monkeypatch):
    """A point for each strength of guidance, and of contrast: recognised, and recall."""
    plain = {0: (60, 65), 0.5: (72, 66), 1: (75, 61), 2: (80, 50), 4: (90, 20)}
    tuned = {1: (70, 55), 10: (95, 19)}
    rows = {f"plain, cfg {x}": [9.0, *y, 0.0] for x, y in plain.items()}
    rows |= {f"CCA, lambda {x}": [9.0, *y, 0.0] for x, y in tuned.items()}
    rows = {name: np.array(row) for name, row in rows.items()}
    saved = []
    monkeypatch.setattr(cca, "open_runs", lambda _: [opened])
    monkeypatch.setattr(cca, "study", lambda *_: rows)
    monkeypatch.setattr(cca, "save_picture", lambda *given: saved.append(given))
    said = ran("papers.cca", "--run", judged, "another", *SHORT)
    for claim, figure in zip(cca.CLAIMS, (95 - 60, 95 - 80, (55 - 66 + 19 - 20) / 2), strict=True):
        assert f"claim: {claim.text}\n    measured {figure:.4f}: " in said
    ((path, figure),) = saved
    assert path == judged / "papers" / "cca.png"
    for line, points in zip(figure.axes[0].lines, (plain, tuned), strict=True):
        assert np.array_equal(line.get_xydata(), [*points.values()])


# ------------------------------------------------------------------------------------------------
# Control


@pytest.fixture
def shown(run, real):
    """A controlled model, held-out images' tokens, labels and edges."""
    return control.Controlled(run).eval(), *real


def test_edges_of_a_square():
    image = torch.full((1, 3, 12, 12), -0.5)
    image[..., 4:8, 3:9] = 0.5
    inside = np.zeros((12, 12), bool)
    inside[4:8, 3:9] = True
    expected = np.zeros((12, 12))
    for y in range(1, 11):
        for x in range(1, 11):
            left, right = inside[y, x - 1], inside[y, x + 1]
            above, below = inside[y - 1, x], inside[y + 1, x]
            expected[y, x] = left != right or above != below
    assert np.array_equal(control.edges_of(image)[0, 0].numpy(), expected)
    one_channel = torch.zeros(1, 3, 12, 12)
    one_channel[:, 1, :, 6:] = 0.6   # a slope of 0.3
    faint = torch.zeros(1, 3, 12, 12)
    faint[:, 1, :, 6:] = 0.4
    columns = control.edges_of(torch.cat([one_channel, faint]))[:, 0].mean(dim=1)
    assert columns.tolist() == [[0.0] * 5 + [1.0] * 2 + [0.0] * 5, [0.0] * 12]
    diagonal = torch.arange(12.0) + torch.arange(12.0)[:, None]
    ramps = torch.zeros(2, 3, 12, 12)
    ramps[0, 2] = 0.19 * diagonal   # along a side; the gradient is the square root of 2 as long
    ramps[1, 2] = 0.16 * diagonal
    assert control.edges_of(ramps).mean(dim=(1, 2, 3)).tolist() == [1, 0]


def test_with_z_at_zero_it_is_the_plain_model(run, shown):
    model, tokens_NL, labels, edges = shown
    inputs = run.tokenizer.teacher_inputs(tokens_NL)
    plain = run.model(labels, inputs)
    assert torch.equal(model(labels, inputs), plain)
    model.show(edges)
    assert torch.equal(model(labels, inputs), plain)
    for cfg in (0.0, 2.0):
        run.sampling = replace(FILTERED, cfg=cfg)
        with_edges = control.draw(replace(run, model=model), labels.tolist(), edges, 5)
        assert torch.equal(with_edges, run.decode(run.generate(labels.tolist(), 5)))


def test_a_place_is_shown_its_own_pixels(run, shown):
    model, _, _, edges = shown
    model.show(edges)
    cell = run.tokenizer.config.downsampling
    begin = 0
    for s in run.tokenizer.config.scales:
        side = edges.shape[-1] // s
        for y in range(s):
            for x in range(s):
                area = edges[3, 0, y * side:(y + 1) * side, x * side:(x + 1) * side]
                parts = area.unfold(0, cell, cell).unfold(1, cell, cell)
                read = model.edges_BLX[3, begin + y * s + x]
                assert torch.allclose(read, parts.mean(dim=(0, 1)).flatten(), atol=1e-6)
        begin += s * s
    assert begin == model.edges_BLX.shape[1]


def test_edges_go_with_the_class(run, shown):
    model, tokens_NL, labels, edges = shown
    torch.nn.init.normal_(model.control.weight)
    inputs = run.tokenizer.teacher_inputs(tokens_NL)
    null_N = torch.full_like(labels, model.config.classes)
    plain, plain_null = run.model(labels, inputs), run.model(null_N, inputs)
    model.show(edges)
    assert not torch.allclose(model(labels, inputs), plain, atol=1e-2)
    mixed_N = torch.where(torch.arange(8) % 2 == 0, labels, null_N)
    mixed = model(mixed_N, inputs)
    assert torch.allclose(mixed[1::2], plain_null[1::2], atol=1e-5)
    assert not torch.allclose(mixed[::2], plain[::2], atol=1e-2)
    model.train()   # now labels are dropped, and edges with the same ones
    model.config = replace(model.config, label_dropout=1.0)
    model.show(edges)
    assert torch.allclose(model(labels, inputs), plain_null, atol=1e-5)


def test_training_shows_the_edges_of_what_the_tokens_decode_to(run, shown):
    model, tokens_NL, labels, _ = shown
    stage = control.Steering(run, model, "steering", 3, 1e-3)
    stage.loss(model, tokens_NL.short(), labels)
    edges_BLX = model.edges_BLX
    model.show(control.edges_of(run.decode(tokens_NL)))
    assert 0 < edges_BLX.mean() < 1
    assert torch.equal(edges_BLX, model.edges_BLX)


def test_drawing_is_what_was_taught(run, shown, monkeypatch):
    """Logits of generation, with edges, class and null class, against teacher forcing."""
    model, _, labels, edges = shown
    torch.nn.init.normal_(model.control.weight)
    seen = []
    draw = model.draw
    monkeypatch.setattr(
        model, "draw", lambda logits, *rest: seen.append(logits) or draw(logits, *rest))
    model.show(edges, cfg=1.0)
    tokens_NL = model.generate(run.tokenizer, labels, cfg=1.0)
    inputs = run.tokenizer.teacher_inputs(tokens_NL)
    model.show(edges)
    taught = model(labels, inputs)
    null = run.model(torch.full_like(labels, model.config.classes), inputs)
    assert torch.allclose(torch.cat(seen, dim=1), torch.cat([taught, null]), atol=1e-4)


def test_each_batch_is_shown_its_own_edges(run, shown):
    model, _, labels, edges = shown
    torch.nn.init.normal_(model.control.weight)
    run.sampling = replace(FILTERED, cfg=0.0, batch=3)
    kept = []
    run.model = model
    generate = model.generate
    model.generate = lambda *arguments: kept.append(model.edges_BLX) or generate(*arguments)
    control.draw(run, labels.tolist(), edges, 0)
    model.show(edges)
    assert torch.equal(torch.cat(kept), model.edges_BLX)


@pytest.fixture(scope="module")
def page(judged, tmp_path_factory) -> str:
    """What the page prints, of the shortest tuning, with a drawing of a star."""
    drawing = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(drawing).rectangle((50, 50, 150, 150), outline="red", width=14)
    path = tmp_path_factory.mktemp("drawn") / "star.png"
    drawing.save(path)
    return ran("papers.control", "--run", judged, *SHORT, "--steps", 2, "--image", "data:0", path)


@pytest.mark.parametrize("name", ["plain", "frozen", "all"])
def test_what_is_tuned(run, name, judged, page):
    path = judged / "papers" / f"control-{name}" / "var.pt"
    state = load_checkpoint(path, "transformer")["model"]
    changed = [key for key, value in run.model.state_dict().items() if not value.equal(state[key])]
    assert bool(changed) == (name != "frozen")
    assert state["control.weight"].any() == (name != "plain")


def test_what_is_new_learns_as_fast_as_all_weights(run, monkeypatch):
    rates = {}

    class Noted:
        def __init__(self, run, model, name, steps, lr, optimizers=None):
            self.model = model
            rates[name] = [lr] + [(type(each), group["lr"], group["weight_decay"])
                                  for each in optimizers or [] for group in each.param_groups]

        def run(self):
            return self.model

    for name in ("Tuning", "Steering"):
        monkeypatch.setattr(control, name, Noted)
    monkeypatch.setattr(control, "draw", lambda run, labels, edges_N1HW, seed: images)
    monkeypatch.setattr(control, "Judge", lambda *_: lambda *_: SimpleNamespace(recognised=0.0, recall=0.0))
    images, _ = evaluated_images(run, COUNT)
    control.study(run, 2, COUNT)
    own = run.settings.preset.var_lr
    assert rates == {"control-plain": [own], "control-all": [own],
                     "control-frozen": [own, (torch.optim.AdamW, own, 0.0)]}


def test_the_page_on_control(run, judged, page):
    rows = rows_of(page, 6)
    assert list(rows) == ["reconstructions", "plain", "frozen", "all"]
    assert f"measured {rows['all'][1] - rows['plain'][1]:.4f}" in page
    images, labels = evaluated_images(run, COUNT)
    asked, got = (control.edges_of(x)[:, 0].numpy() > 0
                  for x in (images, run.decode(run.encode(images)[1])))
    expected = np.mean([(a & b).sum() / max((a | b).sum(), 1) for a, b in zip(asked, got)])
    assert rows["reconstructions"][0] == rows["reconstructions"][3] == round(expected, 2)
    model = control.Controlled(run)
    path = judged / "papers" / "control-all" / "var.pt"
    model.load_state_dict(load_checkpoint(path, "transformer")["model"])
    for begin, sampling in ((0, UNFILTERED), (3, FILTERED)):
        tuned = replace(run, model=model.eval(), sampling=sampling)
        drawn = control.draw(tuned, labels.tolist(), control.edges_of(images), 0)
        found = Judge(kept_classifier(run), images, run.classes)(drawn, labels)
        assert rows["all"][begin + 1:begin + 3] == pytest.approx(
            [100 * found.recognised, 100 * found.recall], abs=0.006)


def test_what_is_claimed_of_control(judged, opened, monkeypatch):
    """And its picture is of the first run, a column for each seed."""
    rows = {"plain": [0.2, 50.0], "frozen": [0.3, 70.0], "all": [0.6, 65.0]}
    rows = {name: [*row, 0, 0, 0, 0] for name, row in rows.items()}
    first, second = replace(opened), replace(opened)
    drawn = []
    monkeypatch.setattr(control, "open_runs", lambda _: [first, second])
    monkeypatch.setattr(control, "study", lambda run, *_: (rows, run))
    monkeypatch.setattr(control, "draw", lambda run, labels, edges_N1HW, seed: drawn.append(
        (run is first, seed)) or edges_N1HW)
    saved = []
    monkeypatch.setattr(control, "save_picture", lambda path, _: saved.append(path))
    said = ran("papers.control", "--run", judged, "another", *SHORT)
    assert saved == [judged / "papers" / "control.png"]
    assert drawn == [(True, 0), (True, 1), (True, 2)]
    for claim, figure in zip(control.CLAIMS, (0.6, 15, 0.25), strict=True):
        assert f"claim: {claim.text}\n    measured {figure:.4f} ± 0.0000: " in said


def test_the_picture_of_edges(run, judged, page):
    picture = np.asarray(Image.open(judged / "papers" / "control.png"))
    assert picture.shape[0] == 2 * 164

    def edges(row):   # one pixel of each 10 x 10; the first of four columns
        top = 164 * row + 2
        left = picture.shape[1] - 4 * 164 + 2
        return picture[top:top + 160, left:left + 160, 0][::10, ::10]
    drawing = edges(1)   # 16 of 200: the lines at 4 and 11
    assert (drawing[8, [4, 11]] == 0).all()
    assert (drawing[5:11, 5:11] == 255).all() and (drawing[:3] == 255).all()
    images = to_float(run.held_out.tensors[0][:1])
    asked = control.edges_of(images)[0, 0].numpy()
    assert np.array_equal(edges(0) == 0, asked == 1)


def test_what_of_a_drawing_is_a_line(run, tmp_path):
    """What is darker than a light grey, 0.25 of what is from -1 to 1."""
    pixels = np.full((16, 16), 165, np.uint8)
    pixels[:, :8] = 150
    path = tmp_path / "star.png"
    Image.fromarray(pixels).save(path)
    _, labels, edges = control.requests(run, [str(path)])
    assert labels == [run.classes.index("star")]
    assert edges[0, 0].mean(dim=0).tolist() == [1] * 8 + [0] * 8


def test_mistakes_about_drawings(judged, tmp_path):
    Image.new("L", (20, 20)).save(tmp_path / "moon.png")
    wrong = {
        "there is no class moon": tmp_path / "moon.png",
        "star.png": tmp_path / "star.png",
        "data:0 to": "data:9999",
    }
    for said, source in wrong.items():
        assert said in refused("papers.control", "--run", judged, *SHORT, "--image", source)


def test_the_iou_is_of_the_edges_of_either(run, monkeypatch):
    """Of what is drawn here; a training of two dozen steps reconstructs no edges."""
    monkeypatch.setattr(Tuning, "run", lambda stage: stage.model)
    monkeypatch.setattr(control, "Judge", lambda *_: lambda *_: SimpleNamespace(recognised=0.0, recall=0.0))
    monkeypatch.setattr(control, "draw", lambda run, labels, edges_N1HW, seed: images.roll(1, dims=3))
    images, _ = evaluated_images(run, COUNT)
    rows, _ = control.study(run, 2, COUNT)
    asked, drawn = (control.edges_of(x)[:, 0].numpy() > 0 for x in (images, images.roll(1, dims=3)))
    expected = np.mean([(a & b).sum() / max((a | b).sum(), 1) for a, b in zip(asked, drawn)])
    assert 0.1 < expected < 0.9
    assert rows["all"][0] == rows["all"][3] == pytest.approx(expected, rel=1e-5)
