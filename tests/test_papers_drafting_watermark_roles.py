"""Three pages of papers/: drafts of a large model, a watermark, and heads that need the past."""
from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmark import obvious_attention
from program import opened_run, ran, refused, rows_of
from torch.utils.data import TensorDataset

from papers import FILTERED, damage, drafting, forgetful, roles, watermark
from papers.tuning import Tuning, kept_tokens
from support.checkpoint import load_checkpoint, save_checkpoint
from support.cli import UserError
from support.evaluation import evaluated_images
from support.published import PUBLISHED_SCALES
from tokenizer import Tokenizer
from var import VAR, VARConfig

COUNT = 16
SHORT = ("--device", "cpu", "--count", COUNT)


def table_of(said: str, cells: int) -> dict[str, list[float]]:
    """The rows that have so many cells and no more."""
    return {name: row for name, row in rows_of(said, cells).items() if "." not in name}


def told_apart(evaluate):
    """`evaluate`, by which each is recognised 3 points more than it is and the one before."""
    found = []

    def evaluated(*what, **how):
        found.append(evaluate(*what, **how))
        found[-1].unfiltered[0].recognised += 0.03 * len(found)
        return found[-1]
    return evaluated


@pytest.fixture(scope="module")
def folder3(judged, tmp_path_factory):
    """The short run with a transformer of three layers, of which every one matters: its weights are
    not trained but drawn."""
    out = tmp_path_factory.mktemp("papers") / "run"
    shutil.copytree(judged, out, ignore=lambda _, names: {"papers"} & set(names))
    content = load_checkpoint(out / "var.pt", "transformer")
    del content["kind"]
    content["config"]["depth"] = 3
    torch.manual_seed(0)
    model = VAR(VARConfig(**content["config"]))
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    save_checkpoint(out / "var.pt", "transformer", **{**content, "model": model.state_dict()})
    return out


@pytest.fixture(scope="module")
def opened(folder3):
    return opened_run(folder3, *SHORT)


@pytest.fixture(scope="module")
def real(opened):
    """Tokens and labels of held-out images."""
    images, labels = evaluated_images(opened, COUNT)
    return opened.encode(images)[1], labels


@pytest.fixture
def other(run):
    torch.manual_seed(3)
    small = VAR(replace(run.model.config, depth=2, width=48, heads=3)).eval()
    for weight in small.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return small


# ------------------------------------------------------------------------------------------------
# Drafts


@torch.no_grad()
def nats_of_scales(run, model, tokens, labels):
    """[N, K], a token at a time."""
    logits = model(labels, run.tokenizer.teacher_inputs(tokens)).double()
    nats = torch.zeros(len(labels), len(model.config.scales), dtype=torch.float64)
    for k, span in enumerate(model.config.spans):
        for i in range(span.start, span.stop):
            chosen = logits[torch.arange(len(labels)), i, tokens[:, i]]
            nats[:, k] += logits[:, i].logsumexp(dim=-1) - chosen
    return nats


@pytest.mark.parametrize("n", [1, 2])
def test_composite_likelihood_is_the_sum_over_scales(run, real, other, n):
    tokens, labels = real
    both = replace(run, model=drafting.Drafted(run.model, other, n))
    large = nats_of_scales(run, run.model, tokens, labels)
    small = nats_of_scales(run, other, tokens, labels)
    expected = large[:, :n].sum(dim=1) + small[:, n:].sum(dim=1)
    found = -both.log_likelihood(tokens, labels.tolist())
    assert torch.allclose(found.double(), expected, rtol=1e-5)
    assert not torch.allclose(expected, large.sum(dim=1), rtol=1e-3)


@pytest.mark.parametrize("cfg", [0.0, 2.0])
@pytest.mark.parametrize("n", [1, 2])
def test_a_model_that_refines_its_own_drafts_is_plain(run, real, n, cfg):
    tokens, labels = real
    # More than one batch: the noise goes on from one to the next.
    run.sampling = replace(FILTERED, cfg=cfg, growth=2.0, batch=5)
    both = replace(run, model=drafting.Drafted(run.model, run.model, n))
    inputs = run.tokenizer.teacher_inputs(tokens)
    assert torch.equal(both.model(labels, inputs), run.model(labels, inputs))
    assert torch.equal(both.generate(labels.tolist(), 4), run.generate(labels.tolist(), 4))


def test_guidance_grows_in_a_draft_as_it_does_without(run):
    """Of three scales of four: of two the growth is that of 0 and of 1, whatever the power."""
    scales = {"scales": (1, 2, 3, 4)}
    torch.manual_seed(0)
    tokenizer = Tokenizer(replace(run.tokenizer.config, **scales))
    model = VAR(replace(run.model.config, **scales)).eval()
    for weight in (tokenizer.quantizer.codebook_VC, *model.parameters()):
        weight.data += 0.1 * torch.randn_like(weight)
    sampling = replace(FILTERED, cfg=8.0, growth=3.0)
    run = replace(run, tokenizer=tokenizer, model=model, sampling=sampling)
    both = replace(run, model=drafting.Drafted(model, model, 3))
    assert torch.equal(both.generate([0, 3, 5, 5], 4), run.generate([0, 3, 5, 5], 4))


@pytest.mark.parametrize("cfg", [0.0, 2.0])
@pytest.mark.parametrize("n", [1, 2])
def test_each_model_draws_its_own_scales(run, real, other, n, cfg):
    """By hand: the tokens that the drafter draws, then the refiner from its own logits of them."""
    labels = real[1]
    run.sampling = sampling = replace(FILTERED, cfg=cfg)
    own = run.model.config.spans[n].start
    drawn = replace(run, model=drafting.Drafted(run.model, other, n)).generate(labels.tolist(), 4)
    large = run.generate(labels.tolist(), 4)
    small = replace(run, model=other).generate(labels.tolist(), 4)
    assert torch.equal(drawn[:, :own], large[:, :own])
    assert not torch.equal(drawn[:, own:], large[:, own:])
    assert not torch.equal(drawn[:, own:], small[:, own:])
    generator = torch.Generator().manual_seed(4)
    inputs = run.tokenizer.teacher_inputs(drawn)
    logits = [other(labels, inputs)]
    if cfg:
        logits.append(other(torch.full_like(labels, other.config.classes), inputs))
    for k, span in enumerate(other.config.spans):
        both = torch.cat([x[:, span] for x in logits]).detach()
        token = other.draw(both, k, cfg, sampling.top_k, sampling.top_p, generator)
        if k >= n:   # what is drawn of earlier scales is of no use
            assert torch.equal(token, drawn[:, span])


def test_takeovers(run, other):
    models = drafting.takeovers(run.model, other)
    assert list(models) == ["large alone", "small from 4x4", "small from 2x2", "small from 1x1"]
    assert models["large alone"] is run.model and models["small from 1x1"] is other
    first = models["small from 4x4"].first
    assert len(first.config.scales) == 2 and not first.training


def test_the_small_model_is_trained_as_the_large_one_was(run, monkeypatch):
    run.settings = replace(run.settings, seed=3)
    preset = run.settings.preset
    begun = []
    monkeypatch.setattr(Tuning, "run", lambda stage: begun.append(stage) or stage.model)
    for steps in (None, 7):
        small = drafting.small_model(run, steps)
        assert (small.config.depth, small.config.width, small.config.heads) == (2, 48, 3)
        torch.manual_seed(3)
        first = VAR(small.config).state_dict()
        assert all(torch.equal(first[name], x) for name, x in small.state_dict().items())
        assert begun[-1].steps == (steps or preset.var_steps)
        assert begun[-1].settings.preset.var_lr == preset.var_lr


def test_the_page_on_drafting(folder3, monkeypatch):
    seconds = iter([4.0, 3.0, 5.0, 1.0])

    def repeat(draw, number, repeat):
        assert len(draw()) == 100 and number == 1
        return [9.0, next(seconds), 9.5]

    monkeypatch.setattr(drafting, "repeat", repeat)
    monkeypatch.setattr(drafting, "evaluate", told_apart(drafting.evaluate))
    said = ran("papers.drafting", "--run", folder3, *SHORT, "--steps", 3)
    shown = table_of(said, 7)
    nats = {name: row[0] for name, row in shown.items()}
    costs = table_of(said, 2)
    names = ["large alone", "small from 4x4", "small from 2x2", "small from 1x1"]
    assert list(costs) == names
    steps = np.diff([nats[name] for name in names]) / [16, 4, 1]
    assert [costs[name][1] for name in names] == pytest.approx([0, *steps], abs=0.02)
    assert [costs[name][0] for name in names] == [1, 0.75, 1.25, 0.25]
    measured = [float(line.split()[1].rstrip(":")) for line in said.splitlines()
                if line.startswith("    measured")]
    more = 100 * (nats["small from 4x4"] / nats["large alone"] - 1)
    assert measured[0] == pytest.approx(more, abs=0.02)
    assert measured[1] == pytest.approx(costs["small from 4x4"][0], abs=6e-4)
    difference = shown["small from 4x4"][1] - shown["large alone"][1]
    assert difference and measured[2] == pytest.approx(difference, abs=0.02)
    assert measured[3] == pytest.approx(steps[0] - steps[1:].mean(), abs=0.02)
    for claim in drafting.CLAIMS:
        assert f"claim: {claim.text}\n" in said
    assert "--steps" in refused("papers.drafting", "--run", folder3, "--steps", "0")


# ------------------------------------------------------------------------------------------------
# The watermark


@pytest.mark.parametrize("V", [256, 33])
def test_z_of_random_tokens_has_mean_0_and_variance_1(V):
    tokens = torch.randint(0, V, (20_000, 85), generator=torch.Generator().manual_seed(0))
    z = watermark.z_scores(tokens.short(), watermark.green_list(5, V))
    assert z.mean().item() == pytest.approx(0, abs=4 / 20_000**0.5)
    assert z.var().item() == pytest.approx(1, abs=4 * (2 / 20_000)**0.5)


def test_z_and_scores_by_hand():
    green = torch.tensor([True, False, True, False])
    tokens = torch.tensor([[0, 2, 2, 1], [1, 3, 1, 3]])
    assert watermark.z_scores(tokens, green).tolist() == [1.0, -2.0]   # (3 - 2) / 1, (0 - 2) / 1
    usual = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])   # z of 2 and 0: mean 1, deviation sqrt 2
    other = torch.tensor([False, True, False, True])     # all the other way round
    expected = np.array([[0, -3], [0, 3]]) / 2**0.5
    one, two = (watermark.scores(tokens, lists, usual) for lists in ([green], [green, other]))
    assert one.tolist() == pytest.approx(expected[0])
    assert two.tolist() == pytest.approx(expected.max(axis=0))


@pytest.mark.parametrize("V", [4, 33, 256])
def test_lists_are_halves_and_differ(V):
    lists = [watermark.green_list(key, V) for key in range(5)]
    assert all(each.sum() == V // 2 for each in lists)
    assert torch.equal(lists[3], watermark.green_list(3, V))
    assert len({tuple(each.tolist()) for each in lists}) > 1


def test_a_mark_is_delta_on_green_logits_with_guidance_too(run, real):
    tokens, labels = real
    green = watermark.green_list(0, run.model.config.vocabulary)
    marked = watermark.marking(run, green, 2.0)
    inputs = run.tokenizer.teacher_inputs(tokens)
    plain = run.model(labels, inputs)
    assert torch.allclose(marked.model(labels, inputs), plain + 2 * green, atol=1e-5)
    assert torch.equal(run.model(labels, inputs), plain)   # the run's own is as it was
    drawn = watermark.marking(run, green, 100.0).generate(labels.tolist(), 0)
    assert green[drawn].all()


def test_saved_is_what_a_file_gives_back():
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    once = damage.saved(x)
    assert torch.equal(once, ((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1)
    grey = damage.saved(x[:, :1], "JPEG")
    assert grey.shape == (3, 1, 8, 8)
    assert 0 < (grey - damage.saved(x[:, :1])).abs().mean() < 0.5
    assert torch.equal(damage.saved(x, "JPEG"), damage.saved(x, "JPEG", quality=75))
    errors = [(damage.saved(x, "JPEG", quality) - once).square().mean() for quality in (10, 75, 95)]
    assert errors[0] > errors[1] > errors[2]


def test_what_a_detector_reads(run, real):
    tokens, _ = real
    images = run.decode(tokens)
    read = damage.read_back(run, tokens, images)
    once = damage.saved(images)
    again = damage.saved(run.decode(run.encode(once)[1]))
    left = torch.cat([once[..., :1], once[..., :-1]], dim=3)
    assert read["never decoded"] is tokens
    noise = torch.randn(once.shape, generator=torch.Generator().manual_seed(0))
    noisy = damage.saved(once + 2 * 0.05 * noise)   # pixels in [0, 1] are here in [-1, 1]
    inner = F.interpolate(once[..., 1:15, 1:15], (16, 16), mode="bicubic")
    for name, changed in (("saved", once), ("regenerated", again), ("shift by 1", left),
                          ("JPEG 75", damage.saved(once, "JPEG")), ("noise 0.05", noisy),
                          ("crop by 1", damage.saved(inner))):
        assert torch.equal(read[name], run.encode(changed)[1])
    for name in ("JPEG 75", "noise 0.05", "crop by 1"):
        assert not torch.equal(read[name], read["saved"])


def test_the_page_on_the_watermark(folder3, run, real, monkeypatch):
    monkeypatch.setattr(watermark, "evaluate", told_apart(watermark.evaluate))
    said = ran("papers.watermark", "--run", folder3, *SHORT, "--delta", 30)
    finds, scales, pools = table_of(said, 3), table_of(said, 5), table_of(said, 4)
    assert finds["never decoded"][2] == 100   # all that was drawn is green
    assert finds["never decoded"][0] == finds["saved"][0] < 20
    assert [scales[name][2] for name in ("1x1", "2x2", "4x4")] == [100, 100, 100]
    assert 20 < scales["4x4"][4] < 80
    drawn = watermark.marking(run, watermark.green_list(0, 32), 30).generate(real[1].tolist(), 0)
    read = run.encode(damage.saved(run.decode(drawn)))[1]
    for name, span in zip(("1x1", "2x2", "4x4"), run.model.config.spans):
        for found, others in zip(scales[name], (read, read.roll(1, dims=0))):
            expected = 100 * (drawn == others)[:, span].double().mean().item()
            assert found == pytest.approx(expected, abs=0.06)
    pools = [pools[f"{K} lists"] for K in watermark.POOLS]
    assert pools[0][1] == pools[0][2] == finds["saved"][0]
    assert pools[0][0] == finds["saved"][2]
    heights = [row[3] for row in pools]
    assert heights == sorted(heights)
    usual = kept_tokens(run)[0].tensors[0]
    for K, height in zip(watermark.POOLS[:2], heights):   # one of a hundred passes it
        scores = watermark.scores(usual, [watermark.green_list(key, 32) for key in range(K)], usual)
        assert height == pytest.approx(scores.quantile(0.99).item(), abs=0.051)
    alarms = [row[2] for row in pools]
    assert alarms == sorted(alarms)
    shown = table_of(said, 7)
    figures = [finds["saved"][2], shown["marked"][1] - shown["unmarked"][1],
               scales["1x1"][0] - scales["4x4"][0], finds["regenerated"][2]]
    assert figures[1]
    for claim, figure in zip(watermark.CLAIMS, figures, strict=True):
        measured = float(said.split(f"claim: {claim.text}\n")[1].split()[1].rstrip(":"))
        assert measured == pytest.approx(figure, abs=0.11)
    assert "--delta" in refused("papers.watermark", "--run", folder3, "--delta", "-1")


def test_finds_and_survival_by_hand(run, monkeypatch):
    """Of given tokens, more or less green by the first list; each set has one more image, which is
    just at the limit."""
    lists = [watermark.green_list(key, 32) for key in range(64)]
    chance = torch.Generator().manual_seed(0)

    def some(count, more):
        weights = 1 + more * lists[0].double()
        return weights.multinomial(count * 21, True, generator=chance).view(count, 21)

    usual = some(101, 0)
    best = {K: watermark.scores(usual, lists[:K], usual).sort() for K in watermark.POOLS}
    at_limit = usual[best[1].indices[99:100]]
    sets = [{name: torch.cat([some(49, more), at_limit])
             for name in ("never decoded", "saved", "regenerated")} for more in (0.5, 1, 2)]
    given = iter(sets)
    monkeypatch.setattr(watermark, "read_back", lambda *_: next(given))
    monkeypatch.setattr(watermark, "kept_tokens", lambda _: (TensorDataset(usual), None))
    finds, survival, pools = watermark.study(run, lists, 1.0, COUNT)

    def share(tokens, K, limit):
        scores = watermark.scores(tokens, lists[:K], usual)
        return 100 * (scores > best[limit].values[99]).double().mean().item()

    held_out, _, marked = sets
    for name, found in finds.items():
        assert found == pytest.approx([share(tokens[name], 1, 1) for tokens in sets])
    for K in watermark.POOLS:
        shares = [share(marked["saved"], K, K), share(held_out["saved"], K, K),
                  share(held_out["saved"], K, 1)]
        assert pools[f"{K} lists"] == pytest.approx([*shares, best[K].values[99].item()])
    drawn, read, others = marked["never decoded"], marked["saved"], held_out["saved"]
    for (name, found), span in zip(survival.items(), run.model.config.spans):
        expected = [drawn == read, drawn == read.roll(1, 0),
                    lists[0][drawn], lists[0][read], lists[0][others]]
        assert found == pytest.approx([100 * x[:, span].double().mean().item() for x in expected])


def test_what_is_claimed_of_the_watermark(opened, monkeypatch):
    finds = {"never decoded": [1, 2, 4], "saved": [8, 16, 32], "regenerated": [64, 128, 256]}
    scales = {"1x1": [90, 1, 2, 3, 4], "2x2": [40, 5, 6, 7, 8], "4x4": [20, 9, 10, 11, 12]}
    monkeypatch.setattr(watermark, "open_runs", lambda _: [opened])
    monkeypatch.setattr(watermark, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(watermark, "say_evaluations", lambda _: {
        "unmarked": np.array([[5, 60, 0, 0, 70, 0, 0]]),
        "marked": np.array([[6, 57, 0, 0, 0, 0, 0]])})
    monkeypatch.setattr(watermark, "study", lambda *_: [finds, scales, {"1 lists": [0, 0, 0, 0]}])
    said = ran("papers.watermark")
    for claim, figure in zip(watermark.CLAIMS, (32, -3, 70, 256), strict=True):
        assert f"claim: {claim.text}\n    measured {figure:.4f}: " in said


# ------------------------------------------------------------------------------------------------
# Roles


def ones(run, value=True):
    config = run.model.config
    return torch.full((config.depth, config.heads), value)


def test_with_all_heads_looking_it_is_the_plain_model(run, real):
    tokens, labels = real
    same = roles.forgetting(run, ones(run))
    inputs = run.tokenizer.teacher_inputs(tokens)
    assert torch.allclose(same.model(labels, inputs), run.model(labels, inputs), atol=1e-5)
    assert torch.equal(same.generate(labels.tolist(), 2), run.generate(labels.tolist(), 2))


def test_with_none_looking_it_is_own_scale_attention(run, real):
    tokens, labels = real
    blind = roles.forgetting(run, ones(run, False))
    markov = VAR(replace(run.model.config, last_scales=1)).eval()
    markov.load_state_dict(run.model.state_dict())
    inputs = run.tokenizer.teacher_inputs(tokens)
    assert torch.allclose(blind.model(labels, inputs), markov(labels, inputs), atol=1e-5)
    assert not torch.allclose(blind.model(labels, inputs), run.model(labels, inputs), atol=1e-2)
    other = replace(run, model=markov)
    assert torch.equal(blind.generate(labels.tolist(), 2), other.generate(labels.tolist(), 2))


def mixed(run):
    looks = ones(run, False)
    looks[0, 0] = looks[1, 1] = looks[2, 0] = looks[2, 1] = True
    return looks


def test_forgetful_attention_by_brute_force(run):
    x = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(0))
    plain = run.model.blocks[0].attention
    q, k, v, scale = plain.project(x)
    level = run.model.level_L
    masks = [level[:, None] >= level, level[:, None] == level]
    q = q * (scale * q.shape[3]**0.5)   # it has a scale of its own
    o = [obvious_attention(q[:, h:h + 1], k[:, h:h + 1], v[:, h:h + 1], masks[h])[:, 0]
         for h in range(2)]
    expected = plain.out(torch.cat(o, dim=2))
    ours = forgetful.Forgetful(plain, torch.tensor([True, False]), run.model.config.scales)
    assert torch.allclose(ours(x, run.model.ranges, None), expected, atol=1e-5)


@pytest.mark.parametrize("cfg", [0.0, 2.0])
def test_what_is_drawn_with_a_forgetful_cache_is_what_was_taught(run, real, cfg):
    labels = real[1]
    part = roles.forgetting(run, mixed(run))
    seen = []
    draw = part.model.draw
    part.model.draw = lambda logits, *rest: seen.append(logits) or draw(logits, *rest)
    part.sampling = replace(FILTERED, cfg=cfg)
    tokens = part.generate(labels.tolist(), 1)
    inputs = run.tokenizer.teacher_inputs(tokens)
    with torch.no_grad():
        taught = part.model(labels, inputs)
    drawn = torch.cat(seen, dim=1)[:len(labels)]
    assert torch.allclose(drawn, taught, atol=1e-4)


def test_bytes_are_what_a_cache_holds(run, real):
    labels = real[1]
    part = roles.forgetting(run, mixed(run))
    part.sampling = replace(FILTERED, cfg=0.0)
    pasts = part.model.new_caches()
    part.model.new_caches = lambda: pasts
    part.generate(labels.tolist(), 1)
    held = sum(tensor.nbytes for past in pasts for tensor in past.kept or ())
    past = forgetful.past_bytes(4, run.model.config.scales, 16, 4)
    assert held * (1 + 4) == len(labels) * past * (1 + 4 + 16)   # 1x1, 2x2; and 4x4, nobody's past
    full = forgetful.past_bytes(256, PUBLISHED_SCALES, 64, 2)
    assert full == 16 * 2 * 424 * 1024 * 2   # layers, keys and values, tokens, width, bf16


def test_statistics_by_brute_force(run, real):
    tokens, labels = real
    found = forgetful.statistics(run, tokens, labels)
    seen = []
    block = run.model.blocks[1]
    hook = block.attention.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        run.model(labels, run.tokenizer.teacher_inputs(tokens))
        q, k, _, scale = (x.double() if torch.is_tensor(x) else x
                          for x in block.attention.project(seen[0]))
    hook.remove()
    for h in range(2):
        past, largest, variance = [], [], []
        for b in range(len(labels)):
            rows = []
            for i in range(5, 21):
                e = torch.exp(scale * (k[b, h] @ q[b, h, i]))
                rows.append((e / e.sum()).numpy())
                past.append(rows[-1][:5].sum())
                largest.append(np.sort(rows[-1][:5])[1:].sum())
            variance.append(sum(np.var([row[j] for row in rows], ddof=1) for j in range(21)))
        expected = [np.mean(past), np.mean(largest), np.mean(variance)]
        assert found[:, 1, h].tolist() == pytest.approx(expected, rel=1e-4)


def test_ranks_and_halves():
    a = torch.tensor([[3.0, 1.0], [2.0, 9.0]])
    assert roles.rank_correlation(a, torch.exp(a)) == pytest.approx(1)
    assert roles.rank_correlation(a, -a) == pytest.approx(-1)
    b = torch.tensor([4.0, 2.0, 1.0, 3.0])   # ranks 2 0 1 3 and 3 1 0 2: 1 - 6 * 4 / (4 * 15)
    assert roles.rank_correlation(a, b) == pytest.approx(0.6)
    assert roles.half(a).tolist() == [[True, False], [False, True]]


def test_rises_are_differences_of_likelihood(run, real):
    tokens, labels = real
    choices = torch.stack([ones(run), mixed(run)])
    found = roles.rises(run, choices, real)
    less = [nats_of_scales(run, roles.forgetting(run, looks).model, tokens, labels).sum(dim=1).mean()
            for looks in choices]
    usual = nats_of_scales(run, run.model, tokens, labels).sum(dim=1).mean()
    assert found.tolist() == pytest.approx([float(x - usual) for x in less], abs=1e-3)
    assert abs(found[1]) > 0.01


def test_which_heads_a_cache_keeps(run, monkeypatch):
    """Those of high variance; whole layers of low ASI; and those whose loss costs most; all by
    images of all classes."""
    monkeypatch.setattr(roles, "CALIBRATION", 20)
    seen = []
    monkeypatch.setattr(roles, "statistics", lambda *given: (
        seen.append(given), forgetful.statistics(*given))[1])
    run.settings = replace(run.settings, seed=3)
    layers, correlations, caches = roles.study(run)
    ((_, tokens, labels),) = seen
    assert len(set(labels.tolist())) > 5
    train = kept_tokens(run)[0]
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(3))[:20]
    assert torch.equal(tokens, train.tensors[0][chosen].long())
    past, largest, variance = forgetful.statistics(run, tokens, labels)
    looks = caches["by variance"][0]
    assert looks.sum() == 3 and variance[looks].min() > variance[~looks].max()
    asi = (1 - past.mean(dim=1)) * largest.mean(dim=1)
    assert [row[0] for row in layers.values()] == pytest.approx(asi.tolist())
    assert caches["by ASI"][0][asi.argmin()].all() and caches["by ASI"][0].sum() == 3
    alone = [~torch.eye(6).bool()[n].view(3, 2) for n in range(6)]
    need = roles.rises(run, torch.stack(alone), (tokens, labels)).view(3, 2)
    looks = caches["by need"][0]
    assert looks.sum() == 3 and need[looks].min() > need[~looks].max()
    for name, of_heads in (
            ("- ASI", (past - 1) * largest), ("variance", variance), ("on the past", past)):
        assert correlations[name][1] == roles.rank_correlation(of_heads, need)
    halves = caches["at random"]   # of all heads: one of each layer, too
    assert len(halves) == 8 and any((looks.sum(dim=1) == 1).all() for looks in halves)
    without = [torch.arange(3)[:, None].expand(3, 2) != n for n in range(3)]
    need = roles.rises(run, torch.stack(without), (tokens, labels))
    assert [row[3] for row in layers.values()] == pytest.approx(need.tolist(), abs=1e-5)
    run.model.config = replace(run.model.config, last_scales=1)
    with pytest.raises(UserError, match="has no past to lose"):
        roles.study(run)


def test_the_page_on_roles(folder3, judged, monkeypatch):
    monkeypatch.setattr(roles, "CALIBRATION", 20)
    monkeypatch.setattr(roles, "RANDOM", 2)
    found = []
    rises = roles.rises
    monkeypatch.setattr(roles, "rises", lambda *given: found.append(rises(*given)) or found[-1])
    said = ran("papers.roles", "--run", folder3, *SHORT)
    layers, caches, ranks = table_of(said, 4), table_of(said, 3), table_of(said, 2)
    asi, variance, past, need = np.transpose([layers[f"layer {n}"] for n in (1, 2, 3)])
    order = lambda x: x.argsort().argsort()   # noqa: E731
    for name, row in (("- ASI", -asi), ("variance", variance), ("on the past", past)):
        if len(set(row)) == len(set(need)) == 3:
            expected = np.corrcoef(order(row), order(need))[0, 1]
            assert ranks[name][0] == pytest.approx(expected, abs=0.006)
    assert list(caches) == ["all", "by variance", "by ASI", "by need", "at random", "none"]
    assert caches["all"] == [0, 3.84, 27.7873]   # 2 x 6 heads x 5 tokens x 16 x 4 bytes
    assert [row[1:] for row in caches.values()][1:5] == [[1.92, 13.8936]] * 4
    assert caches["none"][1:] == [0, 0]
    nats = {name: row[0] for name, row in table_of(said, 7).items()}
    for name, (more, *_) in caches.items():
        if name != "at random":
            assert more * 21 == pytest.approx(nats[name] - nats["all"], abs=0.012)
    (of_two,) = (more for more in found if len(more) == 2)   # halves at random
    assert caches["at random"][0] == pytest.approx(of_two.mean().item() / 21, abs=6e-5)
    figures = [ranks["- ASI"][0], ranks["variance"][1], caches["by variance"][0],
               caches["by variance"][0] - caches["at random"][0]]
    for claim, figure, rounded in zip(roles.CLAIMS, figures, (0.006, 0.006, 2e-4, 2e-4), strict=True):
        measured = float(said.split(f"claim: {claim.text}\n")[1].split()[1].rstrip(":"))
        assert measured == pytest.approx(figure, abs=rounded)
    assert "one layer" in refused("papers.roles", "--run", judged, *SHORT)


def test_the_small_model_s_share_of_flops_is_told(run, monkeypatch, capsys):
    monkeypatch.setattr(Tuning, "run", lambda stage: stage.model)
    monkeypatch.setattr(drafting, "forward_flops", lambda model, *_: 100 if model is run.model else 25)
    drafting.small_model(run, 1)
    assert "the small model takes 25% of the large one's FLOPs" in capsys.readouterr().out


def test_halves_at_random_are_several(run, monkeypatch):
    monkeypatch.setattr(roles, "CALIBRATION", 20)
    halves = roles.study(run)[2]["at random"]
    assert len({tuple(looks.flatten().tolist()) for looks in halves}) > 1
