"""The page that `python sample.py explore` writes: what is embedded, and how it acts in a browser.

Tests in a browser need Chromium and playwright, and are skipped without them; .ci/run installs both.
"""
from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from browser import launched
from PIL import Image
from program import of_three_codes, ran

from kernels import sample_tokens
from sample import UNSMOOTHED, Run, load_run
from support import explorer
from support.devices import Machine, choose_machine
from support.figures import attention_weights, code_colours, evenly
from support.images import to_float
from var import VAR

NAMES = ["star", "heart"]
IMAGES = ["star", "star, held-out", "heart", "heart, held-out"]
SEED = 3
SCALES = (1, 2, 4)
STARTS = (0, 1, 5)
LENGTH = 21


@pytest.fixture(scope="module")
def run(judged) -> Run:
    return load_run(judged, choose_machine("cpu", "fp32"), UNSMOOTHED)


@pytest.fixture(scope="module")
def written(judged, tmp_path_factory):
    """The page of two classes, each with a held-out image; and what was said."""
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    said = ran("sample.py", "explore", "--run", judged, "--classes", *NAMES, "--seed", SEED,
               "--device", "cpu", "--precision", "fp32", "--out", path)
    assert said.endswith(f"wrote {path}, to be opened in a browser\n")
    return path


@pytest.fixture(scope="module")
def page(written) -> dict:
    return embedded(written)


def embedded(path) -> dict:
    return json.loads(re.search('id="data">(.*?)</script>', path.read_text("utf-8"), re.S)[1])


def tiles(address: str, count: int) -> np.ndarray:
    """The tiles [count, side, side, 3] of a picture that is embedded."""
    kind, content = address.split(",")
    assert kind == "data:image/webp;base64"
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))
    side = picture.shape[1] // 8
    assert picture.shape[0] == -(-count // 8) * side
    return np.stack([picture[i // 8 * side:, i % 8 * side:][:side, :side] for i in range(count)])


@pytest.fixture(scope="module")
def facts(run, page) -> list[SimpleNamespace]:
    """Of each image on the page what the model says, by other means than the explorer's."""
    found = []
    labels = [run.classes.index(NAMES[i // 2]) for i in range(4)]
    for image, label in zip(page["images"], labels):
        tokens_1L = torch.tensor([image["tokens"]])
        inputs = run.tokenizer.teacher_inputs(tokens_1L)
        with torch.no_grad():
            cond_LV, null_LV = (run.model(torch.tensor([y]), inputs)[0] for y in (label, 10))
        t_L1 = UNSMOOTHED.cfg * torch.tensor([0] + [0.25] * 4 + [1] * 16)[:, None]   # a growth of 2
        found.append(SimpleNamespace(
            label=label, tokens_1L=tokens_1L, inputs=inputs, cond_LV=cond_LV, null_LV=null_LV,
            plain_LV=F.softmax(cond_LV, 1), guided_LV=F.softmax((1 + t_L1) * cond_LV - t_L1 * null_LV, 1),
            frames=[x[0] for x in run.after_each_scale(tokens_1L)]))
    return found


# What is embedded


def test_the_page_is_whole_and_asks_for_nothing(written):
    text = written.read_text("utf-8")
    assert len(text.encode()) <= 4_000_000 and "{{" not in text
    assert "default-src 'none'" in text
    shell = text.replace(re.search('id="data">(.*?)</script>', text, re.S)[1], "")
    assert not re.search(r"https?:|//\w+\.|@import|url\(|<script src|fetch\(", shell)
    assert len(explorer.TEMPLATE.read_text("utf-8").splitlines()) <= 400


def test_images_are_those_of_the_classes_generated_and_held_out(run, page, facts):
    assert [image["name"] for image in page["images"]] == IMAGES
    assert (page["scales"], page["vocabulary"], page["depth"]) == ([*SCALES], 32, 1)
    assert page["wanted"] == 4 and page["run"] == run.folder.name
    assert page["colours"] == code_colours(run.tokenizer.quantizer.codebook_VC).tolist()
    known = run.held_out.tensors[1].tolist()
    for i in (0, 2):
        label = facts[i].label
        assert torch.equal(facts[i].tokens_1L, run.generate([label], SEED + label))
        pixels = run.held_out[known.index(label)][0]
        assert torch.equal(facts[i + 1].tokens_1L, run.tokenizer.encode(to_float(pixels[None])))


def test_the_first_classes_have_held_out_images_too():
    labels_N = torch.tensor([5, 2, 0, 1, 1, 3, 4])
    run = SimpleNamespace(classes=[*"abcdef"], held_out=SimpleNamespace(tensors=(None, labels_N)))
    assert explorer.chosen(run, range(6)) == [
        ("a", 0, None), ("a, held-out", 0, 2), ("b", 1, None), ("b, held-out", 1, 3),
        ("c", 2, None), ("c, held-out", 2, 1), ("d", 3, None), ("d, held-out", 3, 5),
        ("e", 4, None), ("f", 5, None)]


def test_probabilities_are_the_model_s(run, page, facts):
    for image, fact in zip(page["images"], facts):
        own_L = run.log_likelihood(fact.tokens_1L, [fact.label]).item()
        per_token_L = run.log_likelihoods(fact.tokens_1L, [fact.label])[0]
        assert own_L == pytest.approx(per_token_L.sum().item(), rel=1e-4)
        np.testing.assert_allclose(image["own"], 1e4 * per_token_L.exp(), atol=0.6)
        entropy_L = torch.distributions.Categorical(logits=fact.cond_LV).entropy()
        np.testing.assert_allclose(image["entropy"], 100 * entropy_L, atol=0.6)
        codes, p = image["likely"]
        for i, token in enumerate(image["tokens"]):
            ranked = fact.cond_LV[i].argsort(descending=True).tolist()
            assert ranked.index(token) + 1 == image["rank"][i]
            assert codes[i] == ranked[:10]
            assert image["instead"][i] == ranked[ranked[0] == token]
            np.testing.assert_allclose(p[i], 1e4 * fact.plain_LV[i, codes[i]], atol=0.6)


@pytest.mark.parametrize("sampling", [
    {}, dict(top_k=7, top_p=0.8), dict(cfg=3.0, top_k=0, top_p=1.0), dict(top_p=0.0)])
def test_guidance_and_filters_are_the_sampler_s(run, facts, sampling):
    """A code is left by the filters if it is drawn where the noise is all for it."""
    run = copy.copy(run)
    run.sampling = replace(UNSMOOTHED, **sampling)
    fact = facts[0]
    found = explorer.chances(run, torch.tensor([fact.label, 10]), fact.inputs, fact.tokens_1L[0])
    noise_VlV = torch.ones(32, 1, 32)
    noise_VlV[range(32), 0, range(32)] = 1e-38
    first, last = run.sampling.top_p if sampling == {} else [run.sampling.top_p] * 2
    for i in range(LENGTH):
        progress = ((0 if i < 1 else 1 if i < 5 else 2) / 2) ** run.sampling.growth
        t, top_p = run.sampling.cfg * progress, first + (last - first) * progress
        cond_VlV, null_VlV = (x[i].expand(32, 1, 32) for x in (fact.cond_LV, fact.null_LV))
        drawn_V = sample_tokens(cond_VlV, null_VlV, t, run.sampling.top_k, top_p, noise_VlV)[:, 0]
        left_V = drawn_V == torch.arange(32)
        guided_V = F.softmax((1 + t) * fact.cond_LV[i] - t * fact.null_LV[i], 0)
        assert found["kept"][i] == left_V.sum()
        assert found["held"][i] == pytest.approx(1e4 * guided_V[left_V].sum().item(), abs=0.6)
        codes, plain, guided = (rows[i] for rows in found["guided"])
        assert codes == guided_V.argsort(descending=True)[:10].tolist()
        np.testing.assert_allclose(plain, 1e4 * fact.plain_LV[i, codes], atol=0.6)
        np.testing.assert_allclose(guided, 1e4 * guided_V[codes], atol=0.6)


def test_pictures_are_the_model_s_bit_for_bit(run, page, facts):
    for image, fact in zip(page["images"], facts):
        assert np.array_equal(tiles(image["frames"], 3), fact.frames)
        found = tiles(image["replaced"], LENGTH + 1)
        assert np.array_equal(found[LENGTH], fact.frames[-1])
        for i in (0, 3, 20):
            tokens_1L = fact.tokens_1L.clone()
            tokens_1L[0, i] = image["instead"][i]
            change = run.decode_to_bytes(tokens_1L)[0].astype(int) - fact.frames[-1]
            assert np.abs(change).max() > 0
            assert np.abs(found[i] - (128 + change / 2)).max() <= 0.5


def test_where_tokens_are_many_the_images_without_one_are_smaller(run, page, facts, monkeypatch):
    """Halved as often as it takes."""
    monkeypatch.setattr(explorer, "MOST_PIXELS", LENGTH * 4 * 4)
    image, frame = page["images"][0], facts[0].frames[-1]
    found = tiles(explorer.replaced(run, facts[0].tokens_1L, image["instead"], frame), LENGTH + 1)
    assert found.shape[1:] == (4, 4, 3)
    assert np.abs(found[LENGTH] - frame.reshape(4, 4, 4, 4, 3).mean(axis=(1, 3))).max() <= 0.5


def test_settings_are_compared_with_the_same_noise(run, page, facts):
    assert page["ways"] == [
        "no guidance", "guidance 1", "guidance 1, top-p 1 to 0.1, as above", "the same, guidance 8",
        "always the likeliest code"]   # top-k 900 leaves all 32 codes
    found = tiles(page["images"][0]["compared"], 5)
    label = facts[0].label
    bare = dict(cfg=0.0, top_k=0, top_p=1.0)
    for tile, way in zip(found, [bare, {**bare, "cfg": 1.0}, {}, dict(cfg=8.0), dict(top_k=1)]):
        other = copy.copy(run)
        other.sampling = replace(UNSMOOTHED, **way)
        assert np.array_equal(tile, run.decode_to_bytes(other.generate([label], SEED + label))[0])
    assert np.array_equal(found[2], facts[0].frames[-1])
    none = SimpleNamespace(sampling=replace(UNSMOOTHED, top_k=0), model=run.model)
    assert list(explorer.ways_to_draw(none)) == page["ways"]
    few = SimpleNamespace(sampling=replace(UNSMOOTHED, top_k=5), model=run.model)
    assert list(explorer.ways_to_draw(few))[2:4] == [
        "guidance 1, top-k 5", "guidance 1, top-k 5, top-p 1 to 0.1, as above"]


def test_attention_is_the_model_s(run, page, facts, monkeypatch):
    """Of each head, by the softmax over its own range of keys; and of their mean."""
    assert (page["layers"], page["heads"]) == ([1], 2)
    image, fact = page["images"][0], facts[0]
    maps_HLL = tiles(image["attention"], 2)[..., 0].astype(float)**2
    maps_HLL /= maps_HLL.sum(axis=-1, keepdims=True)
    seen = []
    with run.model.blocks[0].attention.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        run.model(torch.tensor([fact.label]), fact.inputs)
    q_HLD, k_HLD, _, scale = run.model.blocks[0].attention.project(seen[0])
    for i in range(LENGTH):
        last = 1 if i < 1 else 5 if i < 5 else 21
        scores = torch.einsum("hd,hld->hl", q_HLD[0, :, i], k_HLD[0, :, :last]) * scale
        np.testing.assert_allclose(maps_HLL[:, i, :last], scores.softmax(-1).detach(), atol=0.02)
        assert not maps_HLL[:, i, last:].any()
        mean_L = attention_weights(
            run.model, torch.tensor([fact.label]), fact.inputs, [0], slice(i, i + 1))[0].mean(dim=(0, 1))
        np.testing.assert_allclose(maps_HLL[:, i].mean(0), mean_L, atol=0.01)
    monkeypatch.setattr(explorer, "MOST_WEIGHTS", LENGTH**2)   # room for a single map
    mean, nothing = tiles(explorer.attention(run, torch.tensor([fact.label]), fact.inputs), 2)[..., 0]
    weights_LL = attention_weights(run.model, torch.tensor([fact.label]), fact.inputs, [0])[0].numpy().mean(axis=0)
    root_LL = np.sqrt(weights_LL / weights_LL.max(axis=1, keepdims=True))
    np.testing.assert_allclose(mean, explorer.LEVELS * root_LL, atol=0.51)
    assert not nothing.any()   # the rest of the row of tiles


def test_beginnings_are_kept_and_the_rest_is_drawn(run, facts, page, monkeypatch):
    drawn = []
    decode = Run.decode_to_bytes
    monkeypatch.setattr(Run, "decode_to_bytes", lambda run, x: drawn.append(x) or decode(run, x))
    found = explorer.continued(run, facts[0].label, facts[0].tokens_1L, SEED + facts[0].label)
    tokens_K8L = drawn[0].unflatten(0, (3, 8))
    own_L = facts[0].tokens_1L[0]
    for n, tokens_8L in enumerate(tokens_K8L):
        given = STARTS[n]
        assert (tokens_8L[:, :given] == own_L[:given]).all()
        assert len(tokens_8L[:, given:].unique(dim=0)) > 1
    shown = tiles(page["images"][0]["continued"], 24)
    assert np.array_equal(shown, decode(run, drawn[0]))
    spread_K = (shown / 255).reshape(3, 8, -1).std(axis=1).mean(axis=1)
    np.testing.assert_allclose(page["images"][0]["spread"], 1e4 * spread_K, atol=0.6)
    assert found["spread"] == page["images"][0]["spread"]
    monkeypatch.setattr(explorer, "DRAWN", 8)   # which is the most that is shown
    in_parts = replace(run, sampling=replace(UNSMOOTHED, batch=5))
    found = explorer.continued(in_parts, facts[0].label, facts[0].tokens_1L, SEED)
    assert tiles(found["continued"], 24).shape[1] == 8
    found = explorer.about(run, facts[0].label, facts[0].tokens_1L, [UNSMOOTHED], SEED)
    assert tiles(found["compared"], 1).shape[1] == 8
    for given, tokens_8L in zip(STARTS, drawn[1].unflatten(0, (3, 8))):
        assert (tokens_8L[:, :given] == own_L[:given]).all()


def test_where_room_is_short_there_are_fewer_images(run, written, tmp_path, monkeypatch, capsys):
    path = tmp_path / "small.html"
    labels = [run.classes.index(name) for name in NAMES]
    for room, count in ((len(written.read_bytes()) - 1, 3), (1, 1)):   # one, whatever its size
        monkeypatch.setattr(explorer, "MOST_BYTES", room)
        explorer.explore(run, path, labels, SEED)
        found = embedded(path)
        assert (len(found["images"]), found["wanted"]) == (count, 4)
        assert len(path.read_bytes()) <= room or count == 1
        assert f"{count} of 4 images: there is no room for more in 4 MB" in capsys.readouterr().out
    monkeypatch.setattr(explorer, "tokens_of", lambda *_: None)
    monkeypatch.setattr(explorer, "about", lambda *_: {})
    for room in (10**6, 0):   # all of many that take little, and where one byte lacks
        monkeypatch.setattr(explorer, "MOST_BYTES", room or len(path.read_bytes()) - 1)
        explorer.explore(run, path, 10 * labels, SEED)
        assert len(path.read_bytes()) <= explorer.MOST_BYTES


def test_attention_of_many_tokens_is_that_of_fewer_layers_and_their_mean():
    def shown(length, depth, heads):
        return explorer.attention_shown(SimpleNamespace(length=length, depth=depth, heads=heads))

    assert shown(103, 6, 4) == ([0, 1, 2, 3, 4, 5], 4)
    assert shown(680, 16, 16) == ([0, 8, 15], 1)
    assert shown(2240, 36, 36) == ([], 1)
    assert evenly(1000, 3) == [0, 500, 999] and evenly(2, 20) == [0, 1]


def test_names_cannot_end_the_script():
    assert "<" not in explorer.as_json({"name": "</script><b>"})
    assert json.loads(explorer.as_json("</script>é")) == "</script>é"


def test_large_tiles_are_made_smaller_and_grey_ones_stay_grey():
    grey = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 1), dtype=np.uint8)
    assert np.array_equal(tiles(explorer.as_picture(grey), 3), grey.repeat(3, axis=-1))
    small = tiles(explorer.as_picture(grey, 3), 3)[..., 0]
    assert np.abs(small - grey.reshape(3, 3, 2, 3, 2).mean(axis=(2, 4))).max() <= 0.5
    for side, channels in ((64, 3), (100, 1)):   # kept bit for bit: maps, which are grey, of any size
        noise = np.random.default_rng(0).integers(0, 256, (2, side, side, channels), dtype=np.uint8)
        assert np.array_equal(tiles(explorer.as_picture(noise), 2), np.broadcast_to(noise, (2, side, side, 3)))


# In a browser


@pytest.fixture(scope="module")
def browser():
    with contextlib.ExitStack() as stack:
        try:
            started = stack.enter_context(launched())
        except ImportError as lacking:
            pytest.skip(str(lacking))
        yield started


@pytest.fixture(scope="module")
def shared(browser):
    """A page that tests share: to load another document there takes less than to make a page."""
    return browser.new_page()


@pytest.fixture
def opened(browser, shared, written):
    """Opens the page. At the end nothing was asked for but the page, nothing was on the console."""
    contexts, tabs, said, asked = [], [], [], []
    listeners = {"console": lambda message: said.append(message.text),
                 "pageerror": lambda error: said.append(str(error)),
                 "request": lambda request: asked.append(request.url)}

    def open_page(width=1000, height=800, scheme="light", path=written, **own):
        """own: what a context of its own is to have."""
        tab = shared
        if own:
            contexts.append(browser.new_context(**own))
            tab = contexts[-1].new_page()
        tabs.append(tab)
        tab.mouse.move(0, 0)
        tab.set_viewport_size({"width": width, "height": height})
        tab.emulate_media(color_scheme=scheme)
        for event, listener in listeners.items():
            tab.on(event, listener)
        tab.goto(path.as_uri())
        tab.wait_for_selector("body[data-ready]")
        return tab

    yield open_page
    for tab in tabs:
        for event, listener in listeners.items():
            tab.remove_listener(event, listener)
    for context in contexts:
        context.close()
    assert said == []
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert len([url for url in asked if url.startswith("file:")]) == len(tabs)


def pixels(tab, selector: str) -> np.ndarray:
    """Of a canvas: bytes [side, side, 3]."""
    values = tab.eval_on_selector(selector, """canvas => Array.from(canvas.getContext("2d")
        .getImageData(0, 0, canvas.width, canvas.height).data)""")
    return np.array(values, np.uint8).reshape(int(len(values)**0.5) // 2, -1, 4)[..., :3]


def until_shown(tab, image: int) -> None:
    tab.locator(f'#so-far[aria-label^="{IMAGES[image]} after"]').wait_for()


def choose(tab, image: int, k: int, y: int, x: int, picker=0) -> None:
    """By mouse; the scale by the slider's keys."""
    tab.locator("#strip label").nth(image).click()
    until_shown(tab, image)
    tab.locator("#scale").focus()
    tab.keyboard.press("Home")
    for _ in range(k):
        tab.keyboard.press("ArrowRight")
    cell = tab.locator(".picker").nth(picker).locator("button").nth(y * SCALES[k] + x)
    cell.scroll_into_view_if_needed()
    cell.hover()


CELLS = [(0, 0, 0, 0), (1, 1, 0, 1), (2, 2, 3, 1), (3, 2, 0, 2)]   # image, scale, row, column


def test_numbers_on_the_page_are_the_model_s(opened, page, facts, run):
    tab = opened()
    for n, (image, k, y, x) in enumerate(CELLS):
        choose(tab, image, k, y, x, picker=n % 4)
        fact, i = facts[image], STARTS[k] + y * SCALES[k] + x
        token = fact.tokens_1L[0, i].item()
        plain_V = fact.plain_LV[i]
        entropy = torch.distributions.Categorical(plain_V).entropy().item()
        rank = plain_V.argsort(descending=True).tolist().index(token) + 1
        text = tab.inner_text("#token-text")
        said = re.fullmatch(
            rf"Scale {SCALES[k]} × {SCALES[k]}, row {y + 1}, column {x + 1} is code {token}: number {rank} of 32 by "
            r"probability, (\S+) %\. Entropy (\S+) nats: as unsure as of (\S+) equally likely codes\.", text)
        p, nats, codes = map(float, said.groups())
        assert p == pytest.approx(100 * plain_V[token].item(), abs=0.06)
        assert nats == pytest.approx(entropy, abs=0.006) and codes == pytest.approx(np.exp(entropy), rel=0.01, abs=0.06)

        rows = [line.inner_text().split() for line in tab.locator("#likely li").all()]
        assert [int(row[1]) for row in rows] == plain_V.argsort(descending=True)[:10].tolist()
        np.testing.assert_allclose([float(row[2]) for row in rows], 100 * plain_V.sort(descending=True)[0][:10], atol=0.06)

        guided_V = fact.guided_LV[i]
        first = tab.locator("#guided li").first.inner_text().split()
        best = guided_V.argmax().item()
        kept, held = page["images"][image]["kept"][i], page["images"][image]["held"][i]
        assert first[:2] == ["code", str(best)]
        expected = [plain_V[best], guided_V[best], guided_V[best] / guided_V.sort(descending=True)[0][:kept].sum()]
        np.testing.assert_allclose([float(first[j]) for j in (2, 4, 6)], 100 * torch.stack(expected), atol=0.11)
        assert tab.inner_text("#guided").count("cut off") == max(0, 10 - kept)
        assert f"the filters leave {kept} for" in tab.inner_text("#guidance-text")
        assert f"{held / 100:.1f} %" in tab.inner_text("#guidance-text")

        weights_L = attention_weights(
            run.model, torch.tensor([fact.label]), fact.inputs, [0], slice(i, i + 1))[0].mean(dim=(0, 1))
        shares = [weights_L[a:a + s * s].sum().item() for a, s in zip(STARTS, SCALES)][:k + 1]
        maps = [re.fullmatch(r"(\d) × \1: (\d+) %", text) for text in tab.locator("#maps figcaption").all_inner_texts()]
        assert [int(found[1]) for found in maps] == list(SCALES[:k + 1])
        np.testing.assert_allclose([int(found[2]) for found in maps], [100 * share for share in shares], atol=1.5)
        for j, text in enumerate(tab.locator("#beginnings .bar").all_inner_texts()):
            assert float(text.split()[0]) == pytest.approx(page["images"][image]["spread"][j] / 100, abs=0.06)


def test_pictures_on_the_page_are_the_model_s(opened, run, facts, page):
    tab = opened()
    choose(tab, 2, 1, 1, 0)
    fact = facts[2]
    assert np.array_equal(pixels(tab, "#so-far"), fact.frames[1])
    added = 128 + (fact.frames[1].astype(float) - fact.frames[0]) / 2
    assert np.abs(pixels(tab, "#added") - added).max() <= 0.5
    tokens_1L = fact.tokens_1L.clone()
    tokens_1L[0, 3] = instead = page["images"][2]["instead"][3]
    other = run.decode_to_bytes(tokens_1L)[0].astype(int)
    assert f"with code {instead}," in tab.inner_text("#replaced-text")
    assert np.abs(pixels(tab, "#replaced") - other).max() <= 1
    change = np.clip(128 + 4 * (other - fact.frames[-1].astype(int)), 0, 255)
    assert np.abs(pixels(tab, "#change") - change).max() <= 4
    assert np.array_equal(pixels(tab, "#compared figure:nth-child(3) canvas"), fact.frames[-1])
    shown = tiles(page["images"][2]["continued"], 24)
    assert np.array_equal(pixels(tab, ".beginning:nth-child(2) canvas:nth-child(3)"), shown[10])


def test_every_section_reacts_to_what_is_chosen(opened):
    """To another image, another scale, another cell, another head."""
    tab = opened()

    def looks() -> list[str]:
        return tab.evaluate("""[...document.querySelectorAll("section")].map(section => section.innerText +
            [...section.querySelectorAll("canvas")].map(canvas => canvas.toDataURL()))""")

    before = looks()
    assert len(before) == 5
    tab.locator("#strip label").nth(3).click()
    until_shown(tab, 3)
    image = looks()
    assert all(a != b for a, b in zip(before, image))
    choose(tab, 3, 2, 0, 0)
    scale = looks()
    assert all(a != b for a, b in zip(image[:4], scale[:4]))
    choose(tab, 3, 2, 3, 3, picker=2)
    cell = looks()
    assert all(a != b for a, b in zip(scale[1:4], cell[1:4]))
    tab.select_option("#head", label="2")
    tab.select_option("#layer", label="1")
    head = looks()
    assert [a != b for a, b in zip(cell, head)] == [False, False, True, False, False]


def test_the_row_of_the_chosen_scale_is_marked(opened):
    tab = opened()
    choose(tab, 0, 0, 0, 0)
    assert tab.inner_text(".beginning.now span") == "given up to 1 × 1"
    assert tab.locator(".beginning").count() == 3


def test_cells_are_chosen_by_keys_and_the_focus_is_seen(opened):
    tab = opened()
    tab.locator("#play").focus()
    tab.keyboard.press("Tab")
    for key, said in (("ArrowDown", "Scale 2 × 2, row 2, column 2"), ("ArrowLeft", "Scale 2 × 2, row 2, column 1"),
                      ("ArrowUp", "Scale 2 × 2, row 1, column 1"), ("ArrowUp", "Scale 2 × 2, row 1, column 1"),
                      ("PageDown", "Scale 4 × 4, row 2, column 2"), ("ArrowRight", "Scale 4 × 4, row 2, column 3"),
                      ("PageUp", "Scale 2 × 2, row 1, column 2"), ("PageUp", "Scale 1 × 1, row 1, column 1")):
        tab.keyboard.press(key)
        assert tab.inner_text("#token-text").startswith(said + " ")
        focused = tab.evaluate("[getComputedStyle(document.activeElement).outlineStyle, "
                               "parseFloat(getComputedStyle(document.activeElement).outlineWidth), "
                               "document.activeElement.closest('.picker') !== null]")
        assert focused == ["solid", 3, True]
    tab.locator("#strip input").first.focus()
    tab.keyboard.press("ArrowRight")
    until_shown(tab, 1)
    assert tab.evaluate("getComputedStyle(document.querySelector('#strip :checked + canvas')).outlineWidth") == "3px"


def test_cells_are_chosen_by_finger(opened):
    tab = opened(360, 740, has_touch=True, is_mobile=True)
    tab.locator(".picker").nth(1).locator("button").nth(1).tap()
    assert tab.inner_text("#token-text").startswith("Scale 2 × 2, row 1, column 2 ")
    tab.locator("#strip label").nth(1).tap()
    until_shown(tab, 1)


def test_the_film_plays_to_the_end_and_who_acts_stops_it(opened):
    tab = opened(offline=True)   # for the clock, which stays in a context, one of its own
    tab.clock.install()
    tab.locator("#play").click()
    for name in ("1 × 1", "2 × 2", "4 × 4", "4 × 4"):
        assert tab.inner_text("#scale-name") == name
        tab.clock.run_for(900)
    tab.locator("#play").click()
    tab.locator("#scale").press("ArrowRight")
    tab.clock.run_for(3000)
    assert tab.inner_text("#scale-name") == "2 × 2"


@pytest.mark.parametrize("width, scheme", [(360, "light"), (360, "dark"), (1600, "light"), (1600, "dark")])
def test_it_is_read_at_every_width_by_day_and_night(opened, width, scheme):
    """Nothing is wider than the window, words stand out from the ground, pictures have words."""
    tab = opened(width, 900, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    outside = tab.evaluate("""[...document.querySelectorAll("main *")].filter(node => node.getBoundingClientRect().right
        > innerWidth + 1).map(node => node.outerHTML.slice(0, 80))""")
    assert outside == []
    assert tab.evaluate("Math.min(...[...document.querySelectorAll('.picker')].map(p => p.clientWidth))") >= 150
    light = {}
    for selector in ("body", "figcaption", "nav", ".bars .plain", ".bars .left"):
        colour, ground = tab.evaluate("selector => ['color', 'backgroundColor'].map(name => "
                                      "getComputedStyle(document.querySelector(selector))[name])", selector)
        light[selector] = [luminance(colour), luminance(ground)]
    ground = light["body"][1]
    assert (ground > 0.5) == (scheme == "light")
    for value, other, least in ((light["body"][0], ground, 7), (light["figcaption"][0], ground, 4.5),
                                (*light["nav"], 7), (light[".bars .plain"][1], ground, 3),
                                (light[".bars .left"][1], ground, 3)):
        low, high = sorted((value, other))
        assert (high + 0.05) / (low + 0.05) >= least
    unnamed = tab.evaluate("""[...document.querySelectorAll("canvas")].filter(canvas =>
        !canvas.ariaLabel && !(canvas.role === "none" && canvas.closest("label").innerText)).length""")
    assert unnamed == 0 and tab.locator("canvas").count() > 30


def luminance(colour: str) -> float:
    """Relative luminance as in WCAG 2, of rgb(...)."""
    values = np.array([int(x) for x in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055)**2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_fewer_images_are_told_on_the_page(opened, run, tmp_path, monkeypatch):
    """And no map of attention, of very many tokens."""
    monkeypatch.setattr(explorer, "MOST_BYTES", 1)
    monkeypatch.setattr(explorer, "MOST_WEIGHTS", 1)
    explorer.explore(run, tmp_path / "x.html", [0, 1], 0)
    tab = opened(path=tmp_path / "x.html")
    assert tab.inner_text("#run").endswith(
        "In 4 MB is room for 1 of 4 images. Section 3 is left out: of so many tokens, no map of attention has room.")
    assert tab.locator("section:visible").count() == 4
    tab.locator(".picker").first.locator("button").first.click()


def test_of_few_codes_all_are_listed():
    tokenizer, model = of_three_codes()
    run = Run(Path(), tokenizer.eval(), model.eval(), ["a", "b"], None, choose_machine("cpu", "fp32"), UNSMOOTHED)
    tokens_1L = torch.tensor([[0, 1, 2, 0, 1]])
    found = explorer.chances(run, torch.tensor([0, 2]), tokenizer.teacher_inputs(tokens_1L), tokens_1L[0])
    for codes in found["likely"][0], found["guided"][0]:
        assert [sorted(of_token) for of_token in codes] == [[0, 1, 2]] * 5


def test_the_filters_of_a_way_are_those_of_its_name(run):
    own = replace(UNSMOOTHED, top_k=5)
    ways = explorer.ways_to_draw(SimpleNamespace(sampling=own, model=run.model))
    assert ways["guidance 1, top-k 5"] == replace(own, top_p=1.0)
    assert ways["guidance 1"] == replace(own, top_k=0, top_p=1.0)


def test_heads_of_all_layers_together_decide_whether_their_mean_is_shown():
    config = SimpleNamespace(length=130, depth=12, heads=12)   # 144 maps, and there is room for 93
    assert explorer.attention_shown(config) == ([*range(12)], 1)


def test_unless_classes_are_named_those_shown_lie_evenly_among_all(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(explorer, "chosen", lambda run, labels: asked.extend(labels) or [])
    model = SimpleNamespace(config=replace(run.model.config, classes=1000))
    explorer.explore(replace(run, model=model), tmp_path / "x.html", None, 0)
    assert asked == evenly(1000, 20) and asked[-1] == 999


def test_the_model_is_asked_in_its_precision(run, facts):
    seen = []
    half = replace(run, machine=Machine(torch.device("cpu"), torch.bfloat16))
    note = lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    with run.model.blocks[0].attention.register_forward_pre_hook(note):
        explorer.chances(half, torch.tensor([facts[0].label, 10]), facts[0].inputs, facts[0].tokens_1L[0])
        explorer.attention(half, torch.tensor([facts[0].label]), facts[0].inputs)
    assert seen == [True, True]


def test_without_a_filter_all_codes_are_kept_however_unlikely(run):
    """Whose probability is lost when it is added to 1."""
    class Model(SimpleNamespace):
        __call__ = lambda self, labels_2, inputs: torch.tensor([0.0, -60, -70]).expand(2, 1, 3)
    model = Model(config=SimpleNamespace(scales=(1,), vocabulary=3), level_L=torch.zeros(1),
                  fineness=lambda level, growth: level)
    bare = replace(UNSMOOTHED, cfg=0.0, top_k=0, top_p=1.0)
    found = explorer.chances(SimpleNamespace(model=model, sampling=bare, machine=run.machine), None,
                             torch.zeros(1, 0, 4), torch.tensor([0]))
    assert found["kept"] == [3]


VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]


def heat(share) -> np.ndarray:
    """Colours [..., 3] of shares of the largest."""
    return np.stack([np.interp(share, np.linspace(0, 1, 5), channel) for channel in zip(*VIRIDIS)], axis=-1)


def numbers_in(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"[\d.]+", text)]


def test_maps_of_tokens_show_codes_and_their_entropy(opened, page):
    """In numbers and colours, and in words; the brightest is where all codes are equally likely."""
    tab = opened()
    choose(tab, 1, 2, 0, 0)
    image = page["images"][1]
    for picker in (0, 1):
        cells = tab.locator(".picker").nth(picker).locator("button").evaluate_all(
            "cells => cells.map(cell => [cell.textContent, cell.ariaLabel, ...['backgroundColor', 'color'].map("
            "name => getComputedStyle(cell)[name])])")
        assert len(cells) == 16
        for i, (text, label, ground, ink) in enumerate(cells):
            code, nats = image["tokens"][5 + i], image["entropy"][5 + i] / 100
            assert label == f"row {i // 4 + 1}, column {i % 4 + 1}: code {code}, entropy {nats:g}"
            assert abs(float(text) - (nats if picker else code)) <= (0.051 if picker else 0)
            colour = heat(nats / np.log(32)) if picker else page["colours"][code]
            assert np.abs(np.array(numbers_in(ground)[:3]) - colour).max() <= 1
            low, high = sorted((luminance(ink), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) > 3
    assert tab.inner_text("#most-entropy") == f"{np.log(32):.1f}"


def test_the_chosen_cell_is_framed_in_all_pictures(opened):
    tab = opened()
    choose(tab, 0, 2, 1, 3)
    frames = tab.evaluate("""[...document.querySelectorAll(".marker")].map(marker => {
        const [own, whole] = [marker, marker.parentNode].map(node => node.getBoundingClientRect());
        return [own.left - whole.left, own.top - whole.top, own.width, own.height].map(x => x / whole.width)})""")
    assert len(frames) == 4
    np.testing.assert_allclose(frames, [[3 / 4, 1 / 4, 1 / 4, 1 / 4]] * 4, atol=0.02)


def test_what_the_first_scale_adds_is_added_to_grey(opened, facts):
    tab = opened()
    for k, count in ((2, 21), (0, 1)):
        choose(tab, 0, k, 0, 0)
        assert tab.inner_text("#so-far-text") == f"The image so far: {k + 1} of 3 scales, {count} tokens"
    added = 128 + (facts[0].frames[0].astype(float) - 128) / 2
    assert np.abs(pixels(tab, "#added") - added).max() <= 0.5


def test_images_to_choose_from_are_shown_whole(opened, facts):
    tab = opened()
    for i, fact in enumerate(facts):
        assert np.array_equal(pixels(tab, f"#strip label:nth-child({i + 1}) canvas"), fact.frames[-1])


def maps_of(image: dict, count: int) -> np.ndarray:
    """The weights [maps, L, L] that are embedded."""
    maps_NLL = tiles(image["attention"], count)[..., 0].astype(float)**2
    return maps_NLL / maps_NLL.sum(axis=-1, keepdims=True)


def check_maps(tab, weights_L: np.ndarray, k: int) -> None:
    """Of each scale up to this one a map, bright where most of it goes, and its share."""
    said = tab.locator("#maps canvas").evaluate_all("all => all.map(canvas => canvas.ariaLabel)")
    assert len(said) == k + 1
    for j, (label, s) in enumerate(zip(said, SCALES)):
        own_ss = weights_L[STARTS[j]:STARTS[j] + s * s].reshape(s, s)
        share, y, x = map(int, re.fullmatch(
            rf"Attention to {s} × {s}: (\d+) %, most to row (\d+), column (\d+)", label).groups())
        assert abs(share - 100 * own_ss.sum()) <= 0.51
        assert own_ss[y - 1, x - 1] == pytest.approx(own_ss.max())
        shown = pixels(tab, f"#maps figure:nth-child({j + 1}) canvas")
        assert np.abs(shown - heat(own_ss / own_ss.max())).max() <= 1


def test_maps_of_attention_are_of_the_layer_and_the_head(opened, run, tmp_path):
    torch.manual_seed(0)
    model = VAR(replace(run.model.config, depth=3)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    explorer.explore(replace(run, model=model), tmp_path / "x.html", [4], SEED)
    image = embedded(tmp_path / "x.html")["images"][0]
    maps_NLL = maps_of(image, 6)
    tab = opened(path=tmp_path / "x.html")
    choose(tab, 0, 2, 1, 3)
    query = STARTS[2] + 1 * 4 + 3
    check_maps(tab, maps_NLL[:, query].mean(axis=0), 2)
    tab.select_option("#head", label="2")
    check_maps(tab, maps_NLL[1::2, query].mean(axis=0), 2)
    tab.select_option("#layer", label="3")
    check_maps(tab, maps_NLL[5, query], 2)
    tab.select_option("#head", label="all, averaged")
    check_maps(tab, maps_NLL[4:, query].mean(axis=0), 2)


def test_bars_are_as_long_as_what_they_show(opened, page):
    tab = opened()
    choose(tab, 2, 1, 1, 0)
    image, i = page["images"][2], STARTS[1] + 2
    widths = "bars => bars.map(bar => parseFloat(bar.style.width))"
    codes, p = (rows[i] for rows in image["likely"])
    np.testing.assert_allclose(tab.locator("#likely i").evaluate_all(widths), 75 * np.array(p) / p[0], atol=0.01)
    _, plain, guided = (np.array(rows[i]) for rows in image["guided"])
    left = np.where(np.arange(10) < image["kept"][i], 1e4 * guided / image["held"][i], 0)
    bars = np.stack([plain, guided, left], axis=1)
    np.testing.assert_allclose(tab.locator("#guided i").evaluate_all(widths), 75 * bars.ravel() / bars.max(), atol=0.01)
    spread = np.array(image["spread"])
    np.testing.assert_allclose(tab.locator("#beginnings i").evaluate_all(widths), 75 * spread / max(*spread, 1), atol=0.01)


def test_of_two_images_chosen_at_once_the_second_is_shown(opened):
    """Though what the first needs is there later."""
    tab = opened()
    tab.evaluate("""() => {
        const decode = Image.prototype.decode;
        let calls = 0;
        Image.prototype.decode = async function () {
            if (!calls++) await new Promise(done => setTimeout(done, 300));
            return decode.call(this);
        };
        document.querySelectorAll("#strip input")[1].click();
        document.querySelectorAll("#strip input")[2].click();
        setTimeout(() => document.body.dataset.later = "yes", 800);
    }""")
    tab.wait_for_selector("body[data-later]")
    assert tab.get_attribute("#so-far", "aria-label").startswith(f"{IMAGES[2]} after")


def test_a_cell_is_chosen_where_the_pointer_moves_and_not_where_the_page_does(opened):
    tab = opened()
    choose(tab, 0, 2, 0, 0)
    for place, moved, chosen in ((5, {}, (1, 1)), (5, {"movementX": 2}, (2, 2)), (6, {"movementY": -1}, (2, 3))):
        tab.locator(".picker").first.locator("button").nth(place).evaluate(
            "(cell, moved) => cell.dispatchEvent(new PointerEvent('pointermove', moved))", moved)
        assert tab.inner_text("#token-text").startswith(f"Scale 4 × 4, row {chosen[0]}, column {chosen[1]} ")


def test_draws_are_numbered_from_one(opened):
    tab = opened()
    said = tab.locator("#beginnings canvas").evaluate_all("all => all.map(canvas => canvas.ariaLabel)")
    assert said == [f"Draw {i}, {given}" for given in ("nothing given", "given up to 1 × 1", "given up to 2 × 2")
                    for i in range(1, 9)]


def test_codes_that_are_cut_off_have_no_bar(opened, page):
    """Nor has the first of them."""
    tab = opened()
    n, i = next((n, i) for n, image in enumerate(page["images"]) for i in range(LENGTH) if image["kept"][i] < 10)
    k = max(k for k in range(3) if STARTS[k] <= i)
    choose(tab, n, k, *divmod(i - STARTS[k], SCALES[k]))
    widths = tab.locator("#guided i").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.width))")
    kept = page["images"][n]["kept"][i]
    assert all(widths[2:3 * kept:3]) and not any(widths[3 * kept + 2::3])
