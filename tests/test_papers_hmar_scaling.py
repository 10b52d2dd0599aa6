"""Pages of papers/: HMAR, in its three parts, and VAR's scaling law."""
from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from program import copied_run, of_three_codes, opened_run, ran, refused, rows_of

from papers import (
    FILTERED,
    UNFILTERED,
    hmar,
    hmar_markov,
    hmar_passes,
    masked,
    power_law,
    scaling,
)
from papers.masked import MaskedVAR
from papers.tuning import Tuning, kept_tokens
from support.checkpoint import load_checkpoint
from support.evaluation import Judge, evaluated_images, kept_classifier
from var import VAR

COUNT = 20
SHORT = ("--device", "cpu", "--count", COUNT)


@pytest.fixture(scope="module")
def folder(judged, tmp_path_factory):
    return copied_run(judged, tmp_path_factory.mktemp("family") / "shapes")


@pytest.fixture(scope="module")
def opened(folder):
    return opened_run(folder, *SHORT)


@pytest.fixture(scope="module")
def real(opened):
    """Held-out images' tokens and labels."""
    images, labels = evaluated_images(opened, 8)
    return opened.encode(images)[1], labels


@pytest.fixture
def told(run, real):
    """A model that heeds what it is told; held-out images' tokens and labels. The plain one's
    places heed each other more than after a short training."""
    torch.manual_seed(0)
    (block,) = run.model.blocks
    torch.nn.init.normal_(block.modulation.weight)
    torch.nn.init.normal_(block.attention.out.weight)
    torch.nn.init.normal_(run.model.head.weight, std=0.1)
    return heeding(run.model), *real


def heeding(plain: VAR, leaks: bool = False) -> MaskedVAR:
    torch.manual_seed(0)
    model = MaskedVAR(plain, leaks=leaks).eval()
    torch.nn.init.normal_(model.code_embedding.known.weight)
    return model


def some_known(tokens_NL: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(tokens_NL.shape, generator=generator) < share


# ------------------------------------------------------------------------------------------------
# A VAR that is told


def test_untuned_it_is_the_plain_model(run, told):
    _, tokens_NL, labels = told
    plain = run.model(labels, run.tokenizer.teacher_inputs(tokens_NL))
    model = MaskedVAR(run.model).eval()
    logits = model.told(run.tokenizer, tokens_NL, labels, some_known(tokens_NL), tokens_NL)
    assert torch.equal(logits, plain)


def test_told_nothing_it_is_the_plain_model(run, told):
    model, tokens_NL, labels = told
    inputs = run.tokenizer.teacher_inputs(tokens_NL)
    plain = run.model(labels, inputs)
    assert torch.equal(model(labels, inputs), plain)
    none = torch.zeros_like(tokens_NL, dtype=torch.bool)
    assert torch.equal(model.told(run.tokenizer, tokens_NL, labels, none, tokens_NL), plain)
    heard = model.told(run.tokenizer, tokens_NL, labels, some_known(tokens_NL), tokens_NL)
    assert not torch.allclose(heard, plain, atol=1e-2)


@pytest.mark.parametrize("leaks", [False, True])
def test_the_leak(run, told, leaks):
    """A hidden token of the last scale moves no logit, of whatever token; but where it leaks."""
    _, tokens_NL, labels = told
    model = heeding(run.model, leaks)
    last = run.model.config.spans[-1]
    known = some_known(tokens_NL)
    hidden = 6
    known[:, last.start + hidden] = False
    changed_NL = tokens_NL.clone()
    changed_NL[:, last.start + hidden] = (tokens_NL[:, last.start + hidden] + 7) % 32
    first, second = (model.told(run.tokenizer, tokens, labels, known, tokens)
                     for tokens in (tokens_NL, changed_NL))
    assert torch.equal(first, second) != leaks
    known[:, last.start + hidden] = True
    first, second = (model.told(run.tokenizer, tokens, labels, known, tokens)
                     for tokens in (tokens_NL, changed_NL))
    assert torch.equal(first[:, :last.start], second[:, :last.start])
    assert not torch.equal(first[:, last], second[:, last])


def test_a_hint_is_the_code(run, told):
    """Or, where it leaks, what the map adds to f_hat."""
    model, tokens_NL, _ = told
    quantizer = run.tokenizer.quantizer
    leaking = MaskedVAR(run.model, leaks=True)
    for k, span in enumerate(model.config.spans):
        tokens = tokens_NL[:, span]
        known = some_known(tokens)
        hint = model.hint(quantizer, tokens, known, k)
        for n, i in itertools.product(range(len(tokens)), range(tokens.shape[1])):
            expected = torch.zeros(9)
            if known[n, i]:
                expected = torch.cat([quantizer.codebook_VC[tokens[n, i]], torch.ones(1)])
            assert torch.equal(hint[n, i], expected)
        added = quantizer.read(quantizer.accumulate(quantizer.initial(len(tokens)), tokens, k), k)
        hint = leaking.hint(quantizer, tokens, known, k)
        assert torch.equal(hint, torch.cat([added, hint[..., 8:]], dim=2) * known[..., None])


def drawn_with(run, model, sampling, known=None) -> torch.Tensor:
    return replace(run, model=model, sampling=sampling).generate([0, 3, 5, 5], 7, known)


@pytest.mark.parametrize("sampling", [replace(FILTERED, growth=3.0), UNFILTERED])
def test_one_pass_draws_what_var_draws(run, told, sampling):
    model, tokens_NL, _ = told
    assert torch.equal(drawn_with(run, model, sampling), drawn_with(run, run.model, sampling))
    originals, _ = evaluated_images(run, 4)
    _, known = hmar_passes.left_halves(run, originals)
    untuned = MaskedVAR(run.model).eval()
    completed = drawn_with(run, run.model, sampling, known)
    assert torch.equal(drawn_with(run, untuned, sampling, known), completed)
    assert not torch.equal(drawn_with(run, model, sampling, known), completed)   # it heeds them
    two_scales = lambda rows: replace(known(rows), known_scales=2)   # noqa: E731
    assert torch.equal(drawn_with(run, untuned, sampling, two_scales),
                       drawn_with(run, run.model, sampling, two_scales))


@pytest.mark.parametrize("cfg", [0.0, 2.0])
@pytest.mark.parametrize("surest", [False, True])
def test_passes(run, told, cfg, surest, monkeypatch):
    """What is kept stays, in equal parts; and what generation sees is what training shows."""
    model, _, _ = told
    model.passes = [1, 2, 4]
    model.surest = surest
    hints = []
    logits = []
    scored = []
    hint, draw, score = model.hint, model.draw, model.score
    monkeypatch.setattr(
        model, "hint", lambda *rest: hints.append(rest[1:]) or hint(*rest))
    monkeypatch.setattr(
        model, "draw", lambda *rest: logits.append(rest[0]) or draw(*rest))
    monkeypatch.setattr(
        model, "score", lambda *rest: scored.append(rest[0]) or score(*rest))
    labels = torch.tensor([0, 3, 5, 5])
    generator = torch.Generator().manual_seed(0)
    drawn_NL = model.generate(run.tokenizer, labels, cfg, 0, 1.0, generator)
    monkeypatch.undo()
    again = torch.Generator().manual_seed(0)   # which says what is kept, too
    assert torch.equal(model.generate(run.tokenizer, labels, cfg, 0, 1.0, again), drawn_NL)
    for found, i in zip(scored, (1, 3, 4, 5), strict=True):   # by those of the class, as they are
        assert torch.equal(found, logits[i][:4])
    assert [k for *_, k in hints] == [0, 1, 1, 2, 2, 2, 2]
    counts = [known.sum(dim=1).tolist() for _, known, _ in hints]
    assert counts == [[n] * 4 for n in (0, 0, 2, 0, 4, 8, 12)]
    own = run.tokenizer.quantizer.split(drawn_NL)
    for (tokens, known, k), (_, more, later) in itertools.pairwise(hints):
        assert torch.equal(tokens[known], own[k][known])
        assert k != later or not (known & ~more).any()
    last_passes = [hints[i] for i in (0, 2, 6)]
    known_NL = torch.cat([known for _, known, _ in last_passes], dim=1)
    assert torch.equal(drawn_NL[known_NL],
                       torch.cat([tokens for tokens, _, _ in last_passes], dim=1)[known_NL])
    taught = model.told(run.tokenizer, drawn_NL, labels, known_NL, drawn_NL)
    if cfg:
        null = torch.full_like(labels, model.config.classes)
        taught_null = model.told(run.tokenizer, drawn_NL, null, known_NL, drawn_NL)
        taught = torch.cat([taught, taught_null])
    assert torch.allclose(torch.cat([logits[i] for i in (0, 2, 6)], dim=1), taught, atol=1e-4)


def test_the_surest_are_kept():
    score = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.7, 0.2], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]])
    kept = torch.tensor([[True, False, False, False, False, False], [False] * 6])
    more = masked.keep_more(kept, score, 1)   # half of five, and of six
    assert more.tolist() == [[True, True, False, False, True, False], [True] * 3 + [False] * 3]
    assert masked.keep_more(kept, score, 5).sum(dim=1).tolist() == [1, 1]
    sure = torch.ones(1, 6)   # however sure the others are, what was kept is
    kept = torch.arange(6)[None] % 2 == 1
    assert masked.keep_more(kept, sure, 2)[kept].all()
    model = SimpleNamespace(surest=True)
    logits = torch.randn(2, 6, 9)
    tokens = torch.randint(0, 9, (2, 6))
    found = MaskedVAR.score(model, logits, tokens, None)
    for n, i in itertools.product(range(2), range(6)):
        chances = logits[n, i].exp() / logits[n, i].exp().sum()
        assert found[n, i].item() == pytest.approx(chances[tokens[n, i]].item(), rel=1e-5)
    model.surest = False
    first, second = (MaskedVAR.score(model, logits, tokens, torch.Generator().manual_seed(seed))
                     for seed in (0, 1))
    assert first.shape == (2, 6) and not torch.equal(first, second)


def test_what_is_known_in_training(run, told, monkeypatch):
    model, _, _ = told
    stage = hmar.MaskedTuning(run, model, "none", 1, 1e-3)
    tokens = torch.randint(0, 32, (2000, model.config.length), dtype=torch.int16)
    logits = torch.randn(2000, model.config.length, 32)
    asked = []
    monkeypatch.setattr(model, "told", lambda *rest: asked.append(rest) or logits)
    torch.manual_seed(0)
    loss, to_log = stage.loss(model, tokens, torch.zeros(2000, dtype=torch.long))
    assert to_log() == {}
    (_, given, _, known, shown), = asked
    assert torch.equal(given, tokens.long()) and torch.equal(shown, given)
    assert not known[:, 0].any()
    share = known[:, 1:].float().mean(dim=1).numpy()
    assert np.mean(share == 0) == pytest.approx(0.5 + 0.5 / 21, abs=0.03)
    assert np.quantile(share, (0.625, 0.75, 0.875)) == pytest.approx([0.25, 0.5, 0.75], abs=0.06)
    chances = logits.log_softmax(2).gather(2, given[..., None]).squeeze(2)
    assert loss.item() == pytest.approx(-chances[~known].mean().item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------
# Two passes, in nats


@pytest.mark.parametrize("leaks", [False, True])
def test_two_passes_are_a_likelihood(leaks):
    """Over all images of five tokens of three kinds, probabilities of two passes sum up to 1; but
    with the leak, by which hidden tokens say what they are."""
    tokenizer, plain = of_three_codes()
    model = heeding(plain, leaks)
    images = torch.tensor(list(itertools.product(range(3), repeat=5)))
    labels = torch.ones(len(images), dtype=torch.long)
    one, two, _ = hmar.nats_of(tokenizer, model, images, labels).double().sum(dim=2)
    assert (-one).exp().sum().item() == pytest.approx(1, abs=1e-5)
    total = (-two).exp().sum().item()
    if leaks:
        assert abs(total - 1) > 0.01
    else:
        assert total == pytest.approx(1, abs=1e-5)
        assert not torch.allclose(one, two, atol=1e-2)


def test_the_checkerboard(run):
    model = SimpleNamespace(config=SimpleNamespace(scales=(1, 2, 3)), level_L=torch.zeros(14).long())
    assert hmar.checkerboard(model).int().tolist() == [1, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("leaks", [False, True])
def test_nats_with_drafts(run, told, leaks):
    _, tokens_NL, labels = told
    model = heeding(run.model, leaks)
    in_a = hmar.checkerboard(model)
    torch.manual_seed(0)
    one, two, drafts = hmar.nats_of(run.tokenizer, model, tokens_NL, labels)
    logits = run.model(labels, run.tokenizer.teacher_inputs(tokens_NL))
    assert torch.allclose(one, F.cross_entropy(logits.mT, tokens_NL, reduction="none"), atol=1e-4)
    assert torch.equal(two[:, in_a], one[:, in_a]) and torch.equal(drafts[:, in_a], one[:, in_a])
    assert torch.equal(drafts, two) != leaks
    _, _, others = hmar.nats_of(run.tokenizer, model, tokens_NL, labels)   # drafts are by chance
    assert torch.equal(drafts, others) != leaks


def test_drafts_are_the_same_whatever_was_trained_before(run, monkeypatch):
    seeds = []
    monkeypatch.setattr(hmar, "tuned", lambda run, *_: torch.manual_seed(9) and run)
    monkeypatch.setattr(hmar, "nats_of", lambda _, model, tokens, labels: seeds.append(
        torch.initial_seed()) or torch.zeros(3, *tokens.shape))
    hmar.measure(run, 1, 0.1, COUNT)
    assert seeds == [0, 0, 0]


def nats_by_hand(run, model, scale: int | None = None) -> float:
    """Of one pass, of all tokens or of one scale's."""
    images, labels = evaluated_images(run, COUNT)
    tokens_NL = run.encode(images)[1]
    with torch.no_grad():
        logits = model(labels, run.tokenizer.teacher_inputs(tokens_NL))
    chances = logits.log_softmax(2).gather(2, tokens_NL[..., None]).squeeze(2)
    span = slice(None) if scale is None else model.config.spans[scale]
    return -chances[:, span].sum(dim=1).mean().item()


def tuned_model(folder, name: str, model):
    path = folder / "papers" / name / "var.pt"
    model.load_state_dict(load_checkpoint(path, "transformer")["model"])
    return model.eval()


def test_the_pages_on_passes(run, folder):
    flags = ("--run", folder, *SHORT, "--steps", 2, "--lr", 0.02)
    rows = rows_of(ran("papers.hmar", *flags), 3)
    assert list(rows) == ["plain, one pass"] + [
        f"{kind}, {way}" for kind in ("masked", "leaking")
        for way in ("one pass", "two passes", "with drafts")]
    models = {"plain": tuned_model(folder, "hmar-plain", run.model)}
    for kind in ("masked", "leaking"):
        models[kind] = tuned_model(folder, f"hmar-{kind}", MaskedVAR(run.model))
        assert models[kind].code_embedding.known.weight.any()
    for kind, model in models.items():
        expected = [nats_by_hand(run, model), nats_by_hand(run, model, -1)]
        assert rows[f"{kind}, one pass"][:2] == pytest.approx(expected, abs=0.006)
    assert rows["masked, two passes"] == rows["masked, with drafts"]

    said = ran("papers.hmar_passes", *flags, "--resume")
    assert said.count("is finished") == 3
    rows = rows_of(said, 5)
    assert list(rows) == list(hmar_passes.DRAWN)
    for claim in hmar_passes.CLAIMS:
        assert f"claim: {claim.text}\n" in said
    difference = rows["more passes, at random"][0] - rows["plain VAR"][0]
    assert f"measured {difference:.4f}: no verdict" in said
    originals, labels = evaluated_images(run, COUNT)
    judge = Judge(kept_classifier(run), originals, run.classes)
    for name, kind, sampling, passes in (
            ("plain VAR, top-p 0.9", "plain", replace(UNFILTERED, top_p=0.9), [1, 1, 1]),
            ("filtered: by confidence", "masked", FILTERED, [1, 2, 4]),
            ("halves: by confidence", "masked", FILTERED, [1, 2, 4])):
        models[kind].passes = passes
        models[kind].surest = True
        part = replace(run, model=models[kind], sampling=sampling)
        asked = labels.tolist(), 0
        if name.startswith("halves"):   # of no class, but judged by theirs
            asked = [10] * COUNT, 0, hmar_passes.left_halves(run, originals)[1]
        images = run.decode(part.generate(*asked))
        found = judge(images, labels)
        step, own = ((x[..., 8] - x[..., 7]).abs().mean().item() for x in (images, originals))
        expected = [100 * found.recognised, 100 * found.recall, 100 * found.precision,
                    found.frechet, step / own]
        assert rows[name] == pytest.approx(expected, abs=0.006)
    picture = Image.open(folder / "papers" / "hmar_passes.png")
    assert picture.size[1] == 6 * 100
    assert "--passes 1,2 must be" in refused("papers.hmar_passes", *flags, "--passes", "1,2")


def claimed(page, folder, rows, monkeypatch) -> list[str]:
    """What a page says that it measured where these are its rows; real ones are much alike."""
    monkeypatch.setattr(page, "measure", lambda *_: rows)
    said = ran(page.__name__, "--run", folder, *SHORT)
    first, second, *_ = rows
    assert f"\n{second}: difference" in said and f"\n{first}: difference" not in said
    return [said.split(f"claim: {claim.text}\n")[1].split()[1] for claim in page.CLAIMS]


def test_what_is_claimed_of_passes(folder, monkeypatch):
    rows = {"plain, one pass": [100, 70, 60],
            "masked, one pass": [101, 50, 59], "masked, two passes": [96, 45, 40],
            "masked, with drafts": [98, 47, 50],
            "leaking, one pass": [103, 52, 58], "leaking, two passes": [80, 33, 30],
            "leaking, with drafts": [99, 49, 56]}
    assert claimed(hmar, folder, rows, monkeypatch) == [
        "10.0000:", "4.0000:", "1.0000:", "25.0000:", "12.0000:"]
    # Powers of two: no other difference of two of them is the same.
    rows = {name: [2**n, 0, 0, 3 * 2**n, 0] for n, name in enumerate(hmar_passes.DRAWN)}
    place = {name: 2**n for n, name in enumerate(rows)}
    assert claimed(hmar_passes, folder, rows, monkeypatch) == [f"{figure:.4f}:" for figure in (
        place["more passes, at random"] - place["plain VAR"],
        place["by confidence"] - place["plain VAR, top-p 0.9"],
        place["by confidence"] - place["by confidence, leaking"],
        3 * (place["filtered: plain VAR"] - place["filtered: at random"]),   # by Fréchet distance
        place["halves: at random"] - place["halves: plain VAR"])]


def test_what_is_drawn_and_how(run, monkeypatch):
    """The model, how it is sampled, in which passes, and of what half something is known."""
    asked = []
    images, labels_N = evaluated_images(run, COUNT)

    def draw(model, labels, known, *how):
        asked.append((model, set(labels) == {10}, known is not None, *how))
        return images

    monkeypatch.setattr(hmar_passes, "tuned", lambda run, kind, steps, lr: (kind, steps, lr))
    monkeypatch.setattr(hmar_passes, "draw", draw)
    monkeypatch.setattr(hmar_passes, "save_picture", lambda *_: None)
    rows = hmar_passes.measure(run, [1, 3, 5], 7, 0.5, COUNT)
    assert list(rows) == list(hmar_passes.DRAWN)
    found = Judge(kept_classifier(run), images, run.classes)(images, labels_N)
    assert 0 < found.recognised < 1
    assert {row[0] for row in rows.values()} == {100 * found.recognised}
    for name, found in zip(rows, asked, strict=True):   # as their names say
        half = name.startswith("halves")
        kind = "plain" if "plain" in name else "leaking" if "leaking" in name else "masked"
        sampling = FILTERED if half or name.startswith("filtered") else UNFILTERED
        what, number = name.split()[-2:]
        if what in ("top-p", "cfg"):
            sampling = replace(sampling, **{what.replace("-", "_"): float(number)})
        surest = "by confidence" in name
        passes = [1, 3, 5] if surest or "at random" in name else [1, 1, 1]
        assert found == ((kind, 7, 0.5), half, half, sampling, passes, surest)


def test_the_model_is_told_in_which_passes(run):
    run.model = MaskedVAR(run.model).eval()
    for how in (([1, 2, 4], True), ([1, 1, 3], False)):
        hmar_passes.draw(run, [0, 3], None, UNFILTERED, *how)
        assert (run.model.passes, run.model.surest) == how


def test_halves_are_completed(run, folder):
    originals, _ = evaluated_images(run, 4)
    known_HW, known = hmar_passes.left_halves(run, originals)
    assert known_HW[:, :8].all() and not known_HW[:, 8:].any()
    changed = originals.clone()
    changed[..., 8:] = 0   # the right half tells nothing
    again = hmar_passes.left_halves(run, changed)[1](range(1, 3))
    given = known(range(1, 3))
    assert torch.equal(given.latent_BCSS, again.latent_BCSS) and given.known_scales == 3
    assert given.where_B1SS[:, 0].tolist() == [[[1.0, 1.0, 0.0, 0.0]] * 4] * 2
    assert torch.equal(given.latent_BCSS, known(range(4)).latent_BCSS[1:3])


# ------------------------------------------------------------------------------------------------
# Own-scale attention, and weights


def test_weights_of_the_scales():
    found = hmar_markov.weights_of((1, 2, 4, 8))
    assert found.tolist() == pytest.approx([0.134, 0.342, 0.293, 0.231], abs=5e-4)
    published = hmar_markov.weights_of((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert published[[0, 4, 9]].tolist() == pytest.approx([0.025, 0.140, 0.071], abs=1e-3)


def test_the_weighted_loss(run):
    stage = hmar_markov.WeightedTuning(run, run.model, "none", 1, 1e-3)
    tokens_NL = kept_tokens(run)[0].tensors[0][:6]
    labels = torch.arange(6)
    loss, to_log = stage.loss(run.model, tokens_NL, labels)
    logits = run.model(labels, run.tokenizer.teacher_inputs(tokens_NL.long()))
    expected = 0.0
    for weight, span in zip(hmar_markov.weights_of((1, 2, 4)), run.model.config.spans):
        part = F.cross_entropy(logits[:, span].flatten(0, 1), tokens_NL[:, span].flatten().long())
        expected += weight.item() * part.item()
    assert loss.item() == pytest.approx(expected, rel=1e-5) and to_log() == {}


def test_the_page_on_own_scales(run, folder, monkeypatch):
    starts, kinds, found = [], [], []
    begin, evaluate = Tuning.run, hmar_markov.evaluate

    def noted(stage):
        kinds.append(type(stage))
        starts.append(stage.model.class_embedding.weight.clone())
        return begin(stage)

    def evaluated(*what, **how):
        assert how == {"seeds": [0]}
        found.append(evaluate(*what, **how))
        found[-1].unfiltered[0].frechet += len(starts)**2   # two steps make little difference
        return found[-1]

    monkeypatch.setattr(Tuning, "run", noted)
    monkeypatch.setattr(hmar_markov, "evaluate", evaluated)
    said = ran("papers.hmar_markov", "--run", folder, *SHORT, "--steps", 2)
    assert "1x1 0.249, 2x2 0.442, 4x4 0.309" in said
    assert kinds == [Tuning, Tuning, hmar_markov.WeightedTuning]
    assert all(torch.equal(start, starts[0]) for start in starts)
    rows = rows_of(said, 7)
    assert list(rows)[:3] == ["VAR", "own scale", "own scale, weights"]
    for name, last_scales in (("plain", None), ("own", 1), ("weighted", 1)):
        content = load_checkpoint(
            folder / "papers" / f"hmar_markov-{name}" / "var.pt", "transformer")
        assert content["config"]["last_scales"] == last_scales
    own = VAR(replace(run.model.config, last_scales=1))
    assert rows["own scale"][0] == pytest.approx(
        nats_by_hand(run, tuned_model(folder, "hmar_markov-own", own)), abs=0.006)
    per_token = (found[1].nats_per_image - found[0].nats_per_image) / 21
    plain, own, weighted = (each.unfiltered[0].frechet for each in found)
    figures = per_token, own - plain, weighted - plain
    for claim, figure in zip(hmar_markov.CLAIMS, figures, strict=True):
        (line,) = said.split(f"claim: {claim.text}\n")[1].splitlines()[:1]
        assert float(line.split()[1].strip(":")) == pytest.approx(figure, abs=1e-4)


# ------------------------------------------------------------------------------------------------
# The scaling law


def test_a_power_law_is_found():
    x = np.array([1e3, 2e4, 9e4, 1e6])
    assert power_law.line_of(x, 7 * x**-0.25) == pytest.approx((-0.25, 7, -1))
    exponent, correlation, above = power_law.law_of(x, 7 * x**-0.25 * [1, 1, 1, 1.1])
    assert (exponent, correlation, above) == pytest.approx((-0.25, -1, 10))
    x_N, y_N = np.random.default_rng(0).uniform(1, 9, (2, 7))   # least squares, of all of them
    a_N, b_N = (np.log(z) - np.log(z).mean() for z in (x_N, y_N))
    expected = (a_N @ b_N) / (a_N @ a_N), (a_N @ b_N) / np.sqrt((a_N @ a_N) * (b_N @ b_N))
    assert power_law.line_of(x_N, y_N)[::2] == pytest.approx(expected)
    found = np.array([[x, 6 * x**2, 7 * x**-0.25, 0.9 * x**-0.125],
                      [x, 6 * x**2, 5 * x**-0.5, 0.9 * x**-0.125 * [1, 1, 1, 0.9]]])
    laws = scaling.laws_of(found)
    assert list(laws) == [
        f"{measured} against {axis}" for measured in ("loss, nats/token", "token error")
        for axis in ("parameters", "training FLOPs")]
    for name, law in laws.items():
        expected = [[-0.25, -0.5], [-1, -1], [0, 0]]
        if name.startswith("token"):
            expected = [[-0.125, -0.125], [-1, -1], [0, -10]]
        if name.endswith("FLOPs"):
            expected[0] = np.divide(expected[0], 2)
        assert np.allclose(law, expected)


def test_what_is_said_and_drawn_of_the_law(folder, opened, monkeypatch):
    """Of two runs; lines go through all points but the last, which is red."""
    x = np.array([1e3, 2e4, 9e4, 1e6])
    found = [np.array([x, 6 * x**2, a * x**-0.25 * [1, 1, 1, 1.1], 0.9 * x**-0.125]).T for a in (6, 8)]
    figures = iter(np.concatenate(found))
    pictures = []
    monkeypatch.setattr(scaling, "open_runs", lambda _: [opened, opened])
    monkeypatch.setattr(scaling, "measure", lambda *_: next(figures))
    monkeypatch.setattr(scaling, "save_picture", lambda path, picture: pictures.append(picture))
    said = ran("papers.scaling", "--run", folder, *SHORT, "--depths", "1,2,3,4")
    cells = {line.split("  ")[0]: line for line in said.splitlines()}
    for measured, exponent, above in zip(scaling.MEASURES, (-0.25, -0.125), (10, 0)):
        for axis, part in zip(scaling.AXES, (1, 2)):
            line = cells[f"{measured} against {axis}"].replace("-0.0000", "0.0000")
            for mean in (exponent / part, -1, above):
                assert f"  {mean:.4f} ± 0.0000" in line
    (figure,) = pictures
    mean = np.mean(found, axis=0).T
    pairs = itertools.product(mean[2:], mean[:2])
    names = itertools.product(scaling.MEASURES, scaling.AXES)
    for axis, (y, x), name in zip(figure.axes, pairs, names, strict=True):
        assert (axis.get_ylabel(), axis.get_xlabel()) == name
        line, fitted, last = (each.get_xydata().T for each in axis.lines)
        exponent, factor, _ = power_law.line_of(x[:-1], y[:-1])
        assert np.allclose(line, [x, factor * x**exponent])
        assert np.allclose(fitted, [x[:-1], y[:-1]]) and np.allclose(last, [x[-1:], y[-1:]])
        assert axis.lines[2].get_color() == "red"
        assert axis.lines[0].get_label().startswith(f"exponent {exponent:.3f}, correlation -1.0000")


def test_each_run_s_models_begin_with_its_seed(run, monkeypatch):
    run.settings = replace(run.settings, seed=3)
    begun = []
    monkeypatch.setattr(Tuning, "run", lambda stage: begun.append(stage) or stage.model)
    hmar_markov.trained(run, 1, "own", 1, Tuning)
    scaling.measure(run, 1, 1, COUNT)
    for stage in begun:
        torch.manual_seed(3)
        first = VAR(stage.model.config).state_dict()
        assert all(torch.equal(first[name], x) for name, x in stage.model.state_dict().items())
        assert stage.settings.preset.var_lr == run.settings.preset.var_lr
    assert len(begun) == 2


def test_errors_of_held_out_tokens(run):
    run.sampling = replace(FILTERED, batch=16)
    loss, error = scaling.errors(run, COUNT)
    images, labels = evaluated_images(run, COUNT)
    tokens_NL = run.encode(images)[1]
    nats = -run.log_likelihood(tokens_NL, labels.tolist()).mean().item()
    assert loss == pytest.approx(nats / 21, rel=1e-5)
    with torch.no_grad():
        guess_NL = run.model(labels, run.tokenizer.teacher_inputs(tokens_NL)).argmax(2)
    assert error == pytest.approx((guess_NL != tokens_NL).double().mean().item())


def test_the_page_on_scaling(run, folder):
    said = ran("papers.scaling", "--run", folder, *SHORT, "--steps", 2, "--depths", "1,2,3,4")
    rows = {line.split()[1]: line.split()[2:] for line in said.splitlines()
            if line.startswith("depth ")}
    assert list(rows) == ["1", "2", "3", "4"]
    found = []
    for depth, cells in rows.items():
        config = replace(
            run.model.config, depth=int(depth), width=8 * int(depth), heads=int(depth))
        model = tuned_model(folder, f"scaling-{depth}", VAR(config))
        parameters = sum(weight.numel() for weight in model.blocks.parameters())
        assert cells[0] == f"{parameters:,}"
        errors = scaling.errors(replace(run, model=model), COUNT)
        assert list(map(float, cells[2:])) == pytest.approx(errors, abs=6e-5)
        found.append([parameters, float(cells[1]), *errors])
    # Multiplications for an image in a layer of width 32: of 21 tokens by weights, of each of them
    # by each, twice, and of the class. Then those of codes that are read, and of the head.
    layer = 21 * 12 * 32 * 32 + 2 * 21 * 21 * 32 + 6 * 32 * 32
    outside = 20 * 8 * 32 + 21 * 32 * 32 + 2 * 32 * 32
    images = 2 * 8
    assert found[-1][1] == pytest.approx(3 * 2 * images * (4 * layer + outside), rel=0.005)
    loss = power_law.law_of(*np.transpose(found)[[0, 2]])
    error = power_law.law_of(*np.transpose(found)[[0, 3]])
    for claim, figure in zip(scaling.CLAIMS, (loss[1], abs(loss[2]), error[1])):
        assert f"claim: {claim.text}\n    measured {figure:.4f}: no verdict" in said
    assert Image.open(folder / "papers" / "scaling.png").size == (900, 700)
    for wrong in ("1,2,3", "1,2,2,3", "4,3,2,1"):
        assert f"--depths {wrong} must" in refused(
            "papers.scaling", "--run", folder, *SHORT, "--depths", wrong)


def test_tunings_start_from_the_runs_weights(run):
    """But for what is trained from scratch."""
    assert issubclass(hmar.MaskedTuning, Tuning)
    before = run.model.state_dict()
    for kind in ("plain", "masked", "leaking"):
        model = hmar.tuned(run, kind, 1, 1e-12).model
        assert getattr(model, "leaks", False) == (kind == "leaking")
        for name, value in before.items():
            if not name.startswith("code_embedding"):
                assert torch.allclose(model.state_dict()[name], value, atol=1e-6)


def test_the_nats_of_b_are_those_of_b(run, told, monkeypatch):
    """The third figure of each row: of every place that is not among A, on all scales."""
    monkeypatch.setattr(hmar, "tuned", lambda run, kind, *_: replace(
        run, model=run.model if kind == "plain" else heeding(run.model, kind == "leaking")))
    rows = hmar.measure(run, 1, 0.1, COUNT)
    images, labels = evaluated_images(run, COUNT)
    tokens_NL = run.encode(images)[1]
    in_b = torch.tensor([0, 0, 1, 1, 0] + [0, 1, 0, 1, 1, 0, 1, 0] * 2).bool()
    for kind in ("masked", "leaking"):
        one, two, _ = hmar.nats_of(run.tokenizer, heeding(run.model, kind == "leaking"), tokens_NL, labels)
        for way, nats in (("one pass", one), ("two passes", two)):
            expected = nats[:, in_b].sum(dim=1).mean().item()
            assert rows[f"{kind}, {way}"][2] == pytest.approx(expected, abs=0.01)
    assert rows["masked, one pass"][2] != pytest.approx(rows["masked, two passes"][2], abs=0.1)
