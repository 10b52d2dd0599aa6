"""A page of papers/: maps of the latent itself, and positions that can be sampled."""
from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from program import copied_run, opened_run, ran, refused, rows_of, with_moved_weights

from papers import UNFILTERED, flexvar
from papers.flexible import FlexQuantizer, FlexTokenizer, FlexVAR, TokenizerTuning, of, resized
from sample import Run
from support.cli import UserError
from support.evaluation import Judge, evaluated_images, kept_classifier, psnr
from support.images import to_bytes, to_float
from tokenizer import Tokenizer, TokenizerConfig
from var import VAR

COUNT = 16
SHORT = ("--device", "cpu", "--count", COUNT)
LISTS = ((1, 3, 4), (1, 2, 3, 4))   # the tiny run has the scales 1, 2, 4
SIZES = ((1, 3), (1, 2, 4, 5), (1, 2, 4, 6))


@pytest.fixture(scope="module")
def folder(judged, tmp_path_factory):
    return copied_run(judged, tmp_path_factory.mktemp("flexvar") / "shapes")


@pytest.fixture(scope="module")
def opened(folder):
    return with_moved_weights(opened_run(folder, *SHORT))


@pytest.fixture(scope="module")
def flex(opened):
    """Of all sides, with the run's weights and other codes."""
    stage = TokenizerTuning(opened, 2)
    stage.before_step()
    model = FlexVAR(opened.model).eval()
    torch.nn.init.normal_(model.position_1WSS)
    return replace(opened, tokenizer=stage.ema, model=model)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(flexvar, "SIDE", 4)
    monkeypatch.setattr(flexvar, "LISTS", LISTS)
    monkeypatch.setattr(flexvar, "SIZES", SIZES)


# ------------------------------------------------------------------------------------------------
# The tokenizer


def test_resizing():
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(resized(x, 8), x)
    assert torch.allclose(resized(x, 4), F.avg_pool2d(x, 2), atol=1e-6)
    for s in (1, 3, 5):
        assert torch.allclose(resized(x, s), F.adaptive_avg_pool2d(x, s), atol=1e-6)
    assert torch.equal(resized(x, 12), F.interpolate(x, size=12, mode="bicubic"))


def test_a_map_is_the_latent_at_its_side(flex, opened):
    """Whatever the other maps are; and what is decoded is the last map alone, of its own size."""
    images, _ = evaluated_images(opened, COUNT)
    assert flex.tokenizer.config.scales == (1, 2, 3, 4)
    f, tokens = flex.encode(images)
    codes = flex.tokenizer.quantizer.codebook_VC
    maps = flex.tokenizer.quantizer.split(tokens)
    for s, own in zip((1, 2, 3, 4), maps):
        vectors = F.adaptive_avg_pool2d(f, s).flatten(2).mT
        nearest = (vectors[:, :, None] - codes).square().sum(dim=3).argmin(dim=2)
        assert torch.equal(own, nearest)
        shown = of(flex, tuple(sorted({1, s}))).decode(torch.cat(maps[:s > 1] + [own], dim=1))
        latent = codes[own].mT.unflatten(2, (s, s))
        expected = flex.tokenizer.render(latent).clamp(-1, 1)
        assert shown.shape[-1] == 4 * s and torch.allclose(shown, expected, atol=1e-5)
    assert torch.equal(of(flex, (1, 3, 4)).encode(images)[1],
                       torch.cat([maps[0], maps[2], maps[3]], dim=1))


def test_what_is_read_is_the_map_before_and_no_sum(flex):
    tokens = torch.randint(0, 32, (2, 1 + 9 + 16))
    read = of(flex, (1, 3, 4)).tokenizer.teacher_inputs(tokens)
    codes = flex.tokenizer.quantizer.codebook_VC
    one = codes[tokens[:, :1]].expand(-1, 9, -1)
    three = codes[tokens[:, 1:10]].mT.unflatten(2, (3, 3))
    assert torch.allclose(read[:, :9], one, atol=1e-6)
    expected = F.interpolate(three, size=4, mode="bicubic").flatten(2).mT
    assert torch.allclose(read[:, 9:], expected, atol=1e-6)


def test_the_codebook_begins_with_equal_shares_of_all_sides():
    torch.manual_seed(0)
    f = torch.randn(5, 4, 3, 3)
    tokenizer = tiny_flex((1, 2, 3), 8)
    tokenizer.quantizer.start_from(f)
    of_side = [F.adaptive_avg_pool2d(f, s).flatten(2).mT.flatten(0, 1) for s in (1, 2, 3)]
    for i, code in enumerate(tokenizer.quantizer.codebook_VC):
        vectors = of_side[(0, 0, 0, 1, 1, 1, 2, 2)[i]]
        assert (vectors - code).abs().amax(dim=1).min() < 1e-6


def tiny_flex(scales, vocabulary):
    tokenizer = Tokenizer(TokenizerConfig(
        scales=scales, vocabulary=vocabulary, code_channels=4, image_channels=1, width=4,
        multipliers=(1,), blocks=1, phis=1, norm_groups=1))
    tokenizer.__class__ = FlexTokenizer
    tokenizer.quantizer.__class__ = FlexQuantizer
    tokenizer.quantizer.codebook_VC.data.normal_()
    return tokenizer


def test_the_quantizers_loss_and_gradient_by_hand():
    torch.manual_seed(0)
    quantizer = tiny_flex((1, 2), 6).quantizer
    f = torch.randn(3, 4, 2, 2, requires_grad=True)
    maps, loss = quantizer(f)
    codes = quantizer.codebook_VC
    expected = 0.0
    for s, shown, tokens, kept in zip((1, 2), maps, quantizer.split(quantizer.last_tokens_BL),
                                      quantizer.last_residuals):
        x = F.adaptive_avg_pool2d(f, s)
        code = codes[tokens].mT.unflatten(2, (s, s))
        assert torch.allclose(shown, code, atol=1e-6)
        assert torch.allclose(kept, x.flatten(2).mT, atol=1e-6) and not kept.requires_grad
        expected = expected + 1.25 * (code - x).square().mean() / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    by_codes, by_f = torch.autograd.grad(loss, [codes, f], retain_graph=True)
    all_codes, all_f = torch.autograd.grad(expected / 1.25, [codes, f], retain_graph=True)
    assert torch.allclose(by_codes, all_codes, atol=1e-6)
    assert torch.allclose(by_f, all_f / 4, atol=1e-6)
    straight, = torch.autograd.grad(maps[1].sum() + 8 * maps[0].sum(), f)
    assert torch.allclose(straight, torch.full_like(straight, 3))   # 1, and 8 / 4 by the mean


def test_the_tokenizers_loss_has_a_smaller_image(opened, monkeypatch):
    """That of all maps, whatever the run's was."""
    preset = replace(opened.settings.preset, smaller_weight=1.0)
    run = replace(opened, settings=replace(opened.settings, preset=preset))
    stage = TokenizerTuning(run, 2)
    stage.before_step()
    stage.step = 1
    images, labels = stage.rows[list(range(4))]
    for side in (1, 2, 3):   # of 3, all but the whole image's
        of_3 = {3: torch.tensor(side - 1)}
        monkeypatch.setattr(torch, "randint", lambda end, size, of_3=of_3: of_3[end])
        loss, to_log = stage.loss(stage.model, images, labels)
        losses = to_log()
        x = to_float(images)
        maps, codebook = stage.model.quantizer(stage.model.latent(x))
        small = stage.model.render(maps[side - 1])
        assert small.shape[-1] == 4 * side
        target = F.adaptive_avg_pool2d(x, 4 * side)
        error = F.mse_loss(small, target) + 0.2 * F.l1_loss(small, target)
        whole = stage.model.render(maps[3])
        total = F.mse_loss(whole, x) + 0.2 * F.l1_loss(whole, x) + codebook
        assert losses["smaller"].item() == pytest.approx(error.item(), rel=1e-4)
        assert loss.item() == pytest.approx((total + error).item(), rel=1e-4)


def test_tuning_begins_as_the_run(opened):
    """But for codes; and it leaves the run as it was."""
    before = copy.deepcopy(opened.tokenizer.state_dict())
    stage = TokenizerTuning(opened, 30)
    for name, weight in stage.model.named_parameters():
        assert torch.equal(weight, before[name]), name
    kept = stage.model.quantizer.codebook_VC.detach().clone()
    stage.before_step()
    assert (stage.model.quantizer.codebook_VC != kept).all(dim=1).all()
    tuned = TokenizerTuning(opened, 2).run()
    assert not torch.equal(tuned.quantizer.codebook_VC, kept)
    assert not torch.equal(tuned.decoder.conv_out.weight, before["decoder.conv_out.weight"])
    for name, weight in opened.tokenizer.state_dict().items():
        assert torch.equal(weight, before[name])
    assert type(opened.tokenizer) is Tokenizer


def test_a_training_anew_begins_as_no_run(opened):
    """At first without codes; in folders of its own."""
    preset = replace(opened.settings.preset, unquantized=0.5)
    run = replace(opened, settings=replace(opened.settings, preset=preset))
    stage = TokenizerTuning(run, 4, anew=True)
    assert stage.quantized_from == 2
    weights = stage.model.decoder.conv_out.weight
    assert not torch.equal(weights, opened.tokenizer.decoder.conv_out.weight)
    images, labels = stage.rows[list(range(4))]
    _, to_log = stage.loss(stage.model, images, labels)
    assert to_log()["codebook"] == 0
    x = to_float(images)
    expected = stage.model.render(stage.model.latent(x))
    assert torch.allclose(stage.model(x, quantize=False)[0], expected, atol=1e-6)
    first = copy.deepcopy(stage.model.state_dict())
    flex = flexvar.FlexTuning(run, 2, stage, anew=True)
    assert flex.settings.preset.var_lr == preset.var_lr   # the run's
    assert not torch.equal(stage.ema.decoder.conv_out.weight, first["decoder.conv_out.weight"])
    assert stage.ema.quantizer.codebook_VC.any(dim=1).all()   # it has codes, at last
    for name, weight in flex.model.named_parameters():
        if weight.dim() > 1 and weight.any():
            assert name == "position_1WSS" or not torch.equal(
                weight, opened.model.get_parameter(name)), name
    for part, name in ((stage, "flexvar-tokenizer-anew"), (flex, "flexvar-anew")):
        assert part.settings.out == opened.folder / "papers" / name


# ------------------------------------------------------------------------------------------------
# The transformer


def test_positions_are_one_map(flex, opened):
    """Averaged down to each side; at first those of the run's finest map."""
    places = of(flex, (1, 3, 4)).model.positions()
    for s, own in zip((1, 3, 4), places.split((1, 9, 16), dim=1)):
        expected = F.adaptive_avg_pool2d(flex.model.position_1WSS, s).flatten(2).mT
        assert torch.allclose(own, expected, atol=1e-6)
    larger = of(flex, (1, 6)).model.positions()[:, 1:]
    expected = F.interpolate(flex.model.position_1WSS, size=6, mode="bicubic").flatten(2).mT
    assert torch.allclose(larger, expected, atol=1e-6)
    first = FlexVAR(opened.model)
    assert torch.allclose(first.positions()[:, -16:], opened.model.positions()[:, -16:], atol=1e-6)
    names = {name for name, _ in first.named_parameters()}
    for name, weight in first.named_parameters():
        if name != "position_1WSS":
            assert torch.equal(weight, opened.model.get_parameter(name))
    assert names == {name for name, _ in opened.model.named_parameters()} - {
        "position_1LW", "level_embedding.weight"} | {"position_1WSS"}


def test_of_changes_nothing_but_scales(flex):
    model = flex.model
    part = of(flex, (1, 2))
    assert part.model.config.scales == part.tokenizer.config.scales == (1, 2)
    assert model.config.scales == (1, 2, 4) and flex.tokenizer.quantizer.scales == (1, 2, 3, 4)
    assert len(model.ranges) == 21 and part.model.ranges.last == (1, 5, 5, 5, 5)
    assert part.model.head is model.head
    own_scale = replace(flex, model=copy.copy(model))
    own_scale.model.config = replace(model.config, last_scales=1)
    assert of(own_scale, (1, 2)).model.ranges.first == (0, 1, 1, 1, 1)


@pytest.mark.parametrize("cfg", [0.0, 2.0])
@pytest.mark.parametrize("scales", [(1, 3, 4), (1, 2, 3, 4), (1, 2, 4, 6)])
def test_drawing_says_what_teaching_says(flex, scales, cfg, monkeypatch):
    part = of(flex, scales)
    said = []
    draw = part.model.draw
    monkeypatch.setattr(part.model, "draw", lambda *rest: said.append(rest[0]) or draw(*rest))
    labels = torch.tensor([0, 3, 5])
    generator = torch.Generator().manual_seed(0)
    tokens = part.model.generate(part.tokenizer, labels, cfg, 0, 1.0, generator)
    kinds = torch.cat([labels, torch.full_like(labels, part.model.config.classes)])
    kinds = kinds[:len(labels) * (2 if cfg else 1)]
    repeated = tokens.repeat(len(kinds) // 3, 1)
    with torch.no_grad():
        taught = part.model(kinds, part.tokenizer.teacher_inputs(repeated))
    assert torch.allclose(torch.cat(said, dim=1), taught, atol=1e-4)
    assert part.decode(tokens).shape[-1] == 4 * scales[-1]


def test_lists_are_of_three_to_five_sides(opened, monkeypatch):
    """All of them; and the loss is the mean of nats per token, by the list."""
    stage = flexvar.FlexTuning(opened, 2, TokenizerTuning(opened, 2))
    asked = []
    monkeypatch.setattr(flexvar, "of", lambda run, scales: asked.append(scales) or of(run, scales))
    images, labels = stage.rows[list(range(4))]
    stage.model.config = replace(stage.model.config, label_dropout=0.0)
    for seed in range(9):
        torch.manual_seed(seed)
        with torch.no_grad():
            loss, to_log = stage.loss(stage.model, images, labels)
    assert to_log() == {}
    assert set(asked) == {(1, 2, 4), (1, 3, 4), (1, 2, 3, 4)}
    part = replace(of(replace(stage.flex, model=stage.model), asked[-1]))
    _, tokens = part.encode(to_float(images))
    nats = -part.log_likelihoods(tokens, labels.tolist())
    assert loss.item() == pytest.approx(nats.mean().item(), rel=1e-4)
    wide = copy.copy(stage)
    wide.flex = replace(stage.flex, tokenizer=copy.copy(stage.flex.tokenizer))
    wide.flex.tokenizer.config = replace(stage.flex.tokenizer.config, scales=tuple(range(1, 9)))
    asked.clear()
    monkeypatch.setattr(flexvar, "of", lambda run, scales: asked.append(scales) or of(run, (1, 4)))
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            wide.loss(stage.model, images, labels)
    assert {len(scales) for scales in asked} == {3, 4, 5}
    assert {s for scales in asked for s in scales} == set(range(1, 9))
    assert all(scales[0] == 1 and scales[-1] == 8 and list(scales) == sorted(set(scales))
               for scales in asked)


# ------------------------------------------------------------------------------------------------
# What is measured


def test_var_with_a_scale_left_out(opened):
    """Its places, positions and phi are those that the others have in the run."""
    part = flexvar.left_out(opened, 1)
    assert part.model.config.scales == part.tokenizer.config.scales == (1, 4)
    assert torch.equal(part.model.positions(), opened.model.positions()[:, [0, *range(5, 21)]])
    tokens = part.generate([0, 3], 0)
    assert tokens.shape == (2, 17)
    quantizer = opened.tokenizer.quantizer
    f_hat = quantizer.accumulate(quantizer.initial(2), tokens[:, :1], 0)
    read = part.tokenizer.teacher_inputs(tokens)
    assert torch.allclose(read, quantizer.read(f_hat, 2), atol=1e-6)
    f_hat = quantizer.accumulate(f_hat, tokens[:, 1:], 2)
    assert torch.allclose(part.tokenizer.quantizer.decode(tokens), f_hat, atol=1e-6)
    assert opened.model.config.scales == quantizer.scales == (1, 2, 4)
    assert quantizer.phi_of_scale == Tokenizer(opened.tokenizer.config).quantizer.phi_of_scale


def test_figures_are_of_what_was_measured(opened, flex):
    part = replace(of(flex, SIZES[0]), sampling=UNFILTERED)
    _, labels = evaluated_images(opened, COUNT)
    small_ones = part.decode(part.generate(labels.tolist(), 0))[-4:]
    drawn, rates, picture, figures = flexvar.measure(opened, flex, COUNT)
    names = ["VAR 1,2,4", "VAR 1,4", "VAR, resized to 3", "VAR, resized to 5", "VAR, resized to 6",
             "FlexVAR 1,2,4", "FlexVAR 1,3,4", "FlexVAR 1,2,3,4", "FlexVAR 1,3", "FlexVAR 1,2,4,5",
             "FlexVAR 1,2,4,6", "FlexVAR 1,4"]
    assert list(drawn) == names == [row.label for row in picture]
    assert np.array_equal(picture[8].images, to_bytes(small_ones))
    var, short, *var_sizes, ours, three, four, small, large, larger, ours_short = (
        row[0] for row in drawn.values())
    sizes = [small, large, larger]
    assert figures[:6] == pytest.approx([
        min(three, four) - ours, var - short, ours_short - ours, min(sizes) - ours,
        np.mean(sizes) - np.mean(var_sizes), ours - var])
    images, labels = evaluated_images(opened, COUNT)
    judge = Judge(kept_classifier(opened), images, opened.classes)
    part = replace(of(flex, SIZES[2]), sampling=UNFILTERED)
    made = part.decode(part.generate(labels.tolist(), 0))
    assert made.shape[-1] == 24
    found = judge(F.adaptive_avg_pool2d(made, 16), labels)
    assert drawn["FlexVAR 1,2,4,6"] == pytest.approx(
        [100 * found.recognised, 100 * found.recall, found.frechet], rel=1e-4)
    latent = opened.tokenizer.quantizer.decode(
        replace(opened, sampling=UNFILTERED).generate(labels.tolist(), 0))
    with torch.no_grad():
        made = opened.tokenizer.render(F.adaptive_avg_pool2d(latent, 3))
    found = judge(F.interpolate(made, size=16, mode="bicubic").clamp(-1, 1), labels)
    assert drawn["VAR, resized to 3"] == pytest.approx(
        [100 * found.recognised, 100 * found.recall, found.frechet], rel=1e-4)
    assert list(rates) == ["VAR, 1 tokens", "VAR, 5 tokens", "VAR, 21 tokens",
                           "FlexVAR, 26 tokens", "FlexVAR, 30 tokens", "FlexVAR, 21 tokens"]
    _, tokens = opened.encode(images)
    nats = -opened.log_likelihoods(tokens, labels.tolist())
    for end in (1, 5, 21):
        error = (opened.decode(tokens[:, :end]) - images).square().mean().item()
        assert rates[f"VAR, {end} tokens"] == pytest.approx(
            [nats[:, :end].sum(dim=1).mean().item(), psnr(error)], rel=1e-4)
    part = of(flex, (1, 2, 4))
    _, tokens = part.encode(images)
    error = (part.decode(tokens) - images).square().mean().item()
    assert rates["FlexVAR, 21 tokens"] == pytest.approx(
        [-part.log_likelihood(tokens, labels.tolist()).mean().item(), psnr(error)], rel=1e-4)
    at, ours = rates["FlexVAR, 21 tokens"]
    curve = np.array([rates[f"VAR, {end} tokens"] for end in (1, 5, 21)])
    assert figures[6] == pytest.approx(ours - np.interp(at, *curve.T))


def test_each_figure_is_the_claims(opened, flex, monkeypatch):
    """Of shares that all differ, and of nats between those of VAR's scales; two of these may be
    left out."""
    scales = {"scales": (1, 2, 3, 4)}
    tokenizer = Tokenizer(replace(opened.tokenizer.config, **scales))
    torch.nn.init.normal_(tokenizer.quantizer.codebook_VC)
    run = replace(opened, tokenizer=tokenizer, model=VAR(replace(opened.model.config, **scales)))
    shares = iter([0.8, 0.5, 0.4, 0.41, 0.52, 0.63, 0.7, 0.62, 0.66, 0.3, 0.35, 0.27, 0.55, 0.65])

    def judge(made, labels):
        assert made.abs().max() <= 1
        return SimpleNamespace(recognised=next(shares), recall=0.0, frechet=0.0)

    monkeypatch.setattr(flexvar, "Judge", lambda *_: judge)
    monkeypatch.setattr(Run, "log_likelihoods", lambda run, tokens, _: -torch.full(
        tokens.shape, 0.4 if isinstance(run.model, FlexVAR) else 1.0))
    *_, rates, _, figures = flexvar.measure(run, flex, COUNT)
    assert figures[:6] == pytest.approx([62 - 70, 80 - 45, 60 - 70, 27 - 70, 92 / 3 - 52, 70 - 80])
    (_, five), (_, fourteen), (_, ours) = (
        rates[f"{name} tokens"] for name in ("VAR, 5", "VAR, 14", "FlexVAR, 30"))
    on_the_line = five + (fourteen - five) * (0.4 * 30 - 5) / (14 - 5)
    assert figures[6] == pytest.approx(ours - on_the_line, rel=1e-4)


def test_the_page_from_its_command_to_its_verdicts(folder):
    flags = ("--run", folder, *SHORT, "--tokenizer-steps", 2, "--steps", 2)
    said = ran("papers.flexvar", *flags)
    rows = rows_of(said, 3)
    assert rows["FlexVAR 1,2,4,6"][0] <= 100 and "VAR, resized to 6" in rows
    with Image.open(folder / "papers" / "flexvar.png") as picture:
        assert picture.height > 12 * 24
    assert said.count("no verdict, which takes three runs") == len(flexvar.CLAIMS)
    assert ran("papers.flexvar", *flags, "--resume").count("is finished") == 2
    assert rows_of(ran("papers.flexvar", *flags, "--anew"), 3) != rows
    assert "--steps 2 and not 3" in refused(
        "papers.flexvar", *flags, "--steps", 3, "--resume")


def test_what_began_otherwise_does_not_go_on(opened):
    resumed = replace(opened, settings=replace(opened.settings, resume=True))
    TokenizerTuning(opened, 2).run()
    resumed.tokenizer = copy.deepcopy(opened.tokenizer)
    resumed.tokenizer.decoder.conv_out.bias.data += 1
    with pytest.raises(UserError, match="another first weights"):
        TokenizerTuning(resumed, 2).run()
    flexvar.FlexTuning(opened, 2, TokenizerTuning(opened, 2)).run()
    resumed.tokenizer = opened.tokenizer
    stage = TokenizerTuning(resumed, 2)
    stage.ema.quantizer.codebook_VC.data += 1
    stage.run = lambda: stage.ema
    with pytest.raises(UserError, match="another tokenizer"):
        flexvar.FlexTuning(resumed, 2, stage).run()


def test_a_run_of_other_scales(folder, opened, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(flexvar, "open_runs", lambda _: [of(opened, (1, 4))])
        assert "has scales (1, 4)" in refused("papers.flexvar", *SHORT)
    monkeypatch.setattr(flexvar, "SIDE", 8)
    assert f"{folder} has scales (1, 2, 4), and these lists go to 8" in refused(
        "papers.flexvar", "--run", folder, *SHORT)
